"""ScoreVAE and its baseline, the VAE.

Bayes' rule with an encoder, the bound, second derivatives, presets, the comparison of cases, runs.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

from pdae_nb.cli import main
from pdae_nb.data import load_images, to_signed
from pdae_nb.denoise import GaussianMixture
from pdae_nb.edit import fit_probe, interpolate, manipulate
from pdae_nb.experiments.scorevae import CASES, compare_cases
from pdae_nb.forward import Schedule, add_noise
from pdae_nb.guidance import grad_log
from pdae_nb.hub import images, load, train
from pdae_nb.layers import Arithmetic, computing_in
from pdae_nb.methods.diffae import diffae_denoiser
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.scorevae import (
    PRESETS,
    ConditionalDecoder,
    Posterior,
    ScoreVAE,
    ScoreVAESettings,
    TimeEncoder,
    conditional_loss,
    kl_to_prior,
    score,
    scorevae_denoiser,
    scorevae_loss,
)
from pdae_nb.methods.vae import VAE, BetaVAE, vae_denoiser, vae_loss
from pdae_nb.model import Draw
from pdae_nb.sampling import sample
from pdae_nb.solvers import em_step, heun, karras_times
from pdae_nb.training import Recipe
from pdae_nb.unet import UNet
from pdae_nb.weighting import w_bound, w_half

SCHED = Schedule.linear()
NET = dict(ch=8, mult=(1, 2), n_res=1)
TINY = dict(c=1, size=28, groups=8) | NET


def no_log(line):
    "A log function that drops its message."


def randomise(net, std):
    "Sample all weights from N(0, std²), also the zero-initialised ones."
    for p in net.parameters():
        nn.init.normal_(p, std=std)


def random_images(n):
    "Images of noise in [-1,1]."
    return torch.rand(n, 1, 28, 28) * 2 - 1


def timestep_zero(x0):
    "Timestep 0 for each image."
    return torch.zeros(len(x0), dtype=torch.long)


def any_gradient(loss, net):
    "Whether the loss has a gradient other than zero with respect to some weight."
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return any(g is not None and g.any() for g in grads)


def brief_recipe(method, **parts):
    "A recipe of 8 steps with scikit-learn's digits."
    return Recipe(method, 'digits', 28, 128, batch=16, lr=2e-3, warmup=5, ema=0.9, **parts)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Folders of briefly trained runs: a DPM, ScoreVAE with two presets on it, and a VAE."
    folder = tmp_path_factory.mktemp('runs')
    coded = NET | dict(z_dim=6)
    dpm = train('digits_dpm', brief_recipe(DPM, net=NET), out=folder / 'dpm', log=no_log)
    recipes = dict(
        release=brief_recipe(ScoreVAE, base=dpm, encoder=coded),
        paper=brief_recipe(
            ScoreVAE,
            base=dpm,
            encoder=coded | dict(log_norm=False),
            settings=ScoreVAESettings('paper'),
        ),
        conditional=brief_recipe(ConditionalDecoder, net=NET, encoder=coded),
        vae=brief_recipe(VAE, net=coded),
    )
    for name, r in recipes.items():
        train(f'digits_{name}', r, out=folder / name, log=no_log)
    return {name: folder / name for name in ('dpm', *recipes)}


# Bayes' rule


class RandomPosterior(Posterior):
    "A posterior of 3 numbers whose mean and variance are nonlinear in two pixels."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 6)).double()

    def moments(self, xt, t):
        return self.net(xt).chunk(2, 1)


class GaussianPosterior(Posterior):
    """The exact posterior of z for Gaussian data.

    x_0 ~ N(0, std²), and z is a·x_0 plus noise, with variance 1. So x_t and z are jointly Gaussian.
    """

    def __init__(self, a, std):
        super().__init__()
        self.a = a
        self.v = std**2

    def moments(self, xt, t):
        alpha_bar = SCHED(t)[:, None]
        covariance = self.a * alpha_bar.sqrt() * self.v
        variance = alpha_bar * self.v + 1 - alpha_bar
        mu = covariance / variance * xt
        lv = (1 - covariance**2 / variance).log()
        return mu, lv.expand_as(xt)


def test_mean_score_is_zero_with_the_normalising_constant_only():
    """The expectation of ∇log q(z|x_t) over z ~ q is zero.

    Without the terms -(log σ² + log 2π)/2, it is half the gradient of Σ log σ².
    """
    torch.manual_seed(3)
    q = RandomPosterior()
    n = 300_000
    x = torch.tensor([[0.4, -0.6]]).double().expand(n, 2)
    t = torch.ones(n, dtype=torch.long)
    with torch.no_grad():
        z = q.dist(x, t).sample()
        full = score(q, x, t, z, True)
        bare = score(q, x, t, z, False)

    def half_log_variance(x):
        _, lv = q.moments(x, t[:1])
        return lv.sum() / 2

    half = torch.func.grad(half_log_variance)(x[:1])[0]
    error = full.std(0) / n**0.5
    assert (full.mean(0).abs() < 5 * error).all()
    assert (bare.mean(0) - half).abs().max() < 5 * error.max() < half.abs().max()


@pytest.mark.parametrize('t', [1, 2, 50, 400, 999, 1000])
@pytest.mark.parametrize('a, std', [(0.9, 1.0), (0.3, 2.0), (1.9, 0.5)])
def test_exact_posterior_gives_the_exact_conditional_noise(t, a, std):
    "For Gaussian data, E[ε|x_t,z] has a closed form."
    dpm = GaussianMixture(torch.zeros(1, 3).double(), std, SCHED)
    q = GaussianPosterior(a, std)
    v = std**2
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(20, 3, generator=generator).double()
    z = torch.randn(20, 3, generator=generator).double()
    t = torch.full((20,), t)
    alpha_bar = SCHED(t)[:, None]
    variance = alpha_bar * (v - a**2 * v**2) + 1 - alpha_bar  # of x_t, given z
    exact = (1 - alpha_bar).sqrt() * (xt - alpha_bar.sqrt() * a * v * z) / variance
    for log_norm in (True, False):
        eps = scorevae_denoiser(dpm, q, z, SCHED, log_norm)(xt, t)
        np.testing.assert_allclose(eps, exact, atol=1e-10)


@pytest.mark.parametrize('log_norm', [True, False])
def test_score_equals_two_other_computations(log_norm):
    "By `grad_log` of the log density, and by the chain rule through the moments."
    torch.manual_seed(0)
    q = TimeEncoder(z_dim=5, attn=(14,), **TINY).double()
    randomise(q, 0.1)
    x = torch.randn(4, 1, 28, 28).double()
    t = torch.tensor([0, 3, 500, 1000])
    z = torch.randn(4, 5).double()

    def moments(x):
        return q.moments(x, t)

    def log_q(x):
        return q.log_p(x, t, z, log_norm)

    s = score(q, x, t, z, log_norm)
    (mu, lv), backward = torch.func.vjp(moments, x)
    by_mu = (z - mu) * (-lv).exp()
    by_lv = ((z - mu) ** 2 * (-lv).exp() - float(log_norm)) / 2
    (by_chain_rule,) = backward((by_mu, by_lv))
    torch.testing.assert_close(s, grad_log(log_q, x), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(s, by_chain_rule, atol=1e-10, rtol=1e-8)


# Losses


def test_weights_of_the_two_presets():
    "w_bound is T·g²/2 on the score, so g²/(2(1-ᾱ)) on eps for each timestep; w_half is 1/2."
    t = torch.tensor([1, 10, 500, 1000])
    alpha_bar = SCHED(t)
    beta = 1 - alpha_bar / SCHED(t - 1)
    np.testing.assert_allclose(w_bound(SCHED, t) / 1000, beta / 2 / (1 - alpha_bar), rtol=1e-12)
    np.testing.assert_allclose(w_half(SCHED, t), 0.5)


def encoder_and_noise():
    "An encoder, images, the timesteps and noise of a loss, and the codes and KL that they give."
    torch.manual_seed(0)
    q = TimeEncoder(z_dim=5, **TINY)
    x0 = random_images(4)
    draws = dict(
        t=torch.tensor([1, 9, 500, 1000]),
        eps=torch.randn(4, 1, 28, 28),
        xi=torch.randn(4, 5),
    )
    mu, lv = q.moments(x0, timestep_zero(x0))
    z = mu + (lv / 2).exp() * draws['xi']
    return q, x0, draws, z, kl_to_prior(mu, lv)


def test_terms_of_the_loss_of_scorevae():
    q, x0, draws, z, kl = encoder_and_noise()
    dpm = UNet(**TINY)
    randomise(dpm, 0.05)
    t = draws['t']
    eps = draws['eps']
    xt = add_noise(SCHED, x0, t, eps)
    noise_level = (1 - SCHED(t)).sqrt().float()[:, None, None, None]
    predicted = dpm(xt, t) - noise_level * score(q, xt, t, z)
    squared_error = (predicted - eps).square().flatten(1).sum(1)
    want = w_bound(SCHED, t).float() * squared_error + 0.3 * kl
    loss = scorevae_loss(dpm, q, x0, SCHED, 0.3, **draws, reduce=None)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-3)


def test_terms_of_the_loss_of_the_conditional_decoder():
    q, x0, draws, z, kl = encoder_and_noise()
    unet = UNet(dz=5, z_shift=False, **TINY)
    randomise(unet, 0.05)
    t = draws['t']
    eps = draws['eps']
    xt = add_noise(SCHED, x0, t, eps)
    squared_error = (unet(xt, t, z) - eps).square().flatten(1).sum(1)
    loss = conditional_loss(unet, q, x0, SCHED, 0.3, w_half, **draws, reduce=None)
    torch.testing.assert_close(loss, squared_error / 2 + 0.3 * kl, rtol=1e-4, atol=1e-3)
    without_kl = conditional_loss(unet, q, x0, SCHED, 0.0, w_half, **draws)
    assert any_gradient(without_kl, q), 'the gradient passes through the sampled z'


def test_terms_of_the_loss_of_the_vae():
    torch.manual_seed(0)
    vae = BetaVAE(z_dim=5, **TINY)
    x0 = random_images(3)
    xi = torch.randn(3, 5)
    mu, lv = vae.enc.moments(x0, timestep_zero(x0))
    decoded = vae.dec(mu + (lv / 2).exp() * xi)
    squared_error = (x0 - decoded).square().flatten(1).sum(1)
    want = (squared_error / 2 + 0.5 * kl_to_prior(mu, lv)).mean()
    torch.testing.assert_close(vae_loss(vae, x0, 0.5, xi=xi), want)
    without_kl = vae_loss(vae, x0, 0.0, xi=xi)
    assert any_gradient(without_kl, vae.enc), 'the gradient passes through the sampled z'


# Second derivatives


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('bf16', [False, True])
def test_every_weight_of_the_encoder_has_a_gradient(mode, bf16):
    "The frozen DPM, the images and the grad mode are left as they were."
    torch.manual_seed(0)
    q = TimeEncoder(z_dim=5, attn=(14,), heads=2, **TINY).to(memory_format=torch.channels_last)
    q.train(mode == 'train')
    randomise(q, 0.1)
    dpm = UNet(**TINY).requires_grad_(False)
    x0 = random_images(4)
    before = x0.clone()
    t = torch.tensor([1, 300, 600, 1000])
    with computing_in([q, dpm], Arithmetic(torch.bfloat16) if bf16 else None):
        loss = scorevae_loss(dpm, q, x0, SCHED, t=t)
    loss.backward()
    for name, p in q.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if not name.endswith('conv1.bias'):  # a norm with one channel per group removes this bias
            assert p.grad.any(), name
    assert all(p.grad is None for p in dpm.parameters())
    assert not x0.requires_grad
    assert torch.equal(x0, before)
    assert torch.is_grad_enabled()


def test_no_graph_is_recorded_in_the_frozen_dpm():
    torch.manual_seed(0)
    q = TimeEncoder(z_dim=5, **TINY)
    dpm = UNet(**TINY).requires_grad_(False)
    recorded = []

    def hook(module, inputs, output):
        recorded.append((inputs[0].requires_grad, output.requires_grad))

    dpm.register_forward_hook(hook)
    scorevae_loss(dpm, q, torch.rand(2, 1, 28, 28), SCHED).backward()
    assert recorded == [(False, False)]


def test_denoiser_keeps_the_grad_mode():
    "Without gradients its output has no graph; with gradients it is differentiable in x_t."
    q = TimeEncoder(z_dim=5, **TINY)
    dpm = UNet(**TINY)
    x = torch.randn(2, 1, 28, 28)
    t = torch.tensor([5, 500])
    z = torch.randn(2, 5)
    denoiser = scorevae_denoiser(dpm, q, z, SCHED)
    with torch.no_grad():
        eps = denoiser(x, t)
        assert not eps.requires_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert not x.requires_grad
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(denoiser(x, t).sum(), x)
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.slow
def test_compiled_loss_equals_the_plain_one():
    torch.manual_seed(0)
    q = TimeEncoder(z_dim=3, **TINY)
    dpm = UNet(**TINY).requires_grad_(False)
    randomise(q, 0.1)
    x0 = torch.rand(2, 1, 28, 28)
    t = torch.tensor([10, 700])
    eps = torch.randn(2, 1, 28, 28)
    xi = torch.randn(2, 3)

    def loss_fn(x0, t, eps, xi):
        return scorevae_loss(dpm, q, x0, SCHED, t=t, eps=eps, xi=xi)

    def loss_and_gradients(loss_fn):
        loss = loss_fn(x0, t, eps, xi)
        return loss, torch.autograd.grad(loss, list(q.parameters()))

    plain, plain_grads = loss_and_gradients(loss_fn)
    compiled, compiled_grads = loss_and_gradients(torch.compile(loss_fn, backend='aot_eager'))
    torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-3)
    for a, b in zip(plain_grads, compiled_grads, strict=True):
        atol = 1e-3 * float(a.abs().max() + 1e-6)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=atol)


@pytest.mark.slow
def test_dropout_of_the_frozen_dpm_is_off_in_training(tmp_path):
    DPM(UNet(drop=0.5, **TINY), SCHED, (1, 28, 28)).save(tmp_path / 'digits_dpm')
    modes = set()

    class RecordingScoreVAE(ScoreVAE):
        def loss(self, x0, y, draw):
            modes.add((self.base.net.training, self.enc.training))
            return super().loss(x0, y, draw)

    r = Recipe(
        RecordingScoreVAE,
        'digits',
        28,
        32,
        base=tmp_path / 'digits_dpm',
        encoder=NET | dict(z_dim=4),
        batch=16,
        lr=1e-3,
        ema=0.9,
    )
    train('digits_scorevae', r, out=tmp_path / 'scorevae', log=no_log)
    assert modes == {(False, True)}


# Bad input


def late_times(q, x, t):
    q.moments(x, t + 1)


def early_times(q, x, t):
    q.moments(x, t - 1)


def nan_pixels(q, x, t):
    q(x * torch.nan)


def narrow_images(q, x, t):
    q(x[..., :20])


def narrow_codes(q, x, t):
    q.log_p(x, t, torch.zeros(2, 4))


def too_many_codes(q, x, t):
    q.log_p(x, t, torch.zeros(3, 5))


def limit_of_zero(q, x, t):
    TimeEncoder(z_dim=5, limit=0, **TINY)


def no_steps(q, x, t):
    karras_times(SCHED, 0)


def noise_option_of_em_step(q, x, t):
    em_step(SCHED, x, t, t, x, eta=1.0)


def codes_of_another_width_for_the_vae(q, x, t):
    BetaVAE(z_dim=5, **TINY).enc.log_p(x, t, torch.zeros(2, 4))


@pytest.mark.parametrize(
    'call, words',
    [
        (late_times, 'times must be in 0…1000, got 1 … 1001'),
        (early_times, 'times must be in 0…1000, got -1 … 999'),
        (nan_pixels, 'are NaN or infinite'),
        (narrow_images, r'images \(B,1,28,28\), got \(2, 1, 28, 20\)'),
        (narrow_codes, r'wants codes \(2,5\), got \(2, 4\)'),
        (too_many_codes, r'wants codes \(2,5\), got \(3, 5\)'),
        (limit_of_zero, 'limit must be positive, or None'),
        (no_steps, 'steps must be in 1…500'),
        (noise_option_of_em_step, 'never clips: eta must be 0 and clip None, got 1.0 and None'),
        (codes_of_another_width_for_the_vae, r'wants codes \(2,5\), got \(2, 4\)'),
    ],
)
def test_errors_of_bad_input(call, words):
    q = TimeEncoder(z_dim=5, **TINY)
    x = torch.rand(2, 1, 28, 28)
    t = torch.tensor([0, 1000])
    with pytest.raises(ValueError, match=words):
        call(q, x, t)


def largest_log_variance(q, std):
    "Largest |log σ²| of the encoder if the weights of its last layer are sampled from N(0, std²)."
    with torch.no_grad():
        q.head.weight.normal_(std=std)
        x = torch.randn(3, 1, 28, 28)
        t = torch.tensor([0, 10, 900])
        _, lv = q.moments(x, t)
        return lv.abs().max()


def test_log_variance_is_bounded_softly():
    "The bound is 6 by default. Small values are far below it. Without a limit there is no bound."
    torch.manual_seed(0)
    bounded = TimeEncoder(z_dim=5, **TINY)
    assert 5.9 < largest_log_variance(bounded, 1e3) <= 6.0 + 1e-6
    assert 0 < largest_log_variance(bounded, 1e-3) <= 0.1 + 1e-6
    unbounded = TimeEncoder(z_dim=5, limit=None, **TINY)
    assert largest_log_variance(unbounded, 1e3) > 100


# Samplers and presets


def test_presets_have_the_published_settings():
    paper = PRESETS['paper']
    release = PRESETS['release']
    assert (paper['beta'], paper['weight']) == (0.01, w_bound)
    assert (release['beta'], release['weight']) == (1e-3, w_half)


@pytest.mark.parametrize('preset, calls', [('paper', 1000), ('release', 255)])
def test_number_of_network_calls_of_a_preset(preset, calls):
    "1,000 steps of Euler–Maruyama; 128 of Heun, of which the last is DDIM's. The last t is 1."
    ts = []

    def denoiser(x, t):
        ts.append(int(t[0]))
        return 0.1 * x

    PRESETS[preset]['decode'](denoiser, torch.randn(2, 3), SCHED)
    assert len(ts) == calls
    assert ts[-1] == 1


def test_heun_is_of_second_order():
    "Twice the steps: an error below 40 %. Equal calls of the network: lower errors than DDIM."
    mu = torch.tensor([[-1.2, -0.7], [1.2, -0.4], [-0.1, 1.1]]).double()
    mixture = GaussianMixture(mu, 0.3, SCHED)
    xT = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double()
    exact = sample(mixture, xT, SCHED, 1000)

    def grid(steps):
        return list(range(1000, -1, -1000 // steps))

    def error(denoiser, steps):
        return (sample(denoiser, xT, SCHED, grid(steps)) - exact).norm(dim=1).mean()

    heun_50 = error(heun(mixture, SCHED, grid(50)), 50)
    heun_100 = error(heun(mixture, SCHED, grid(100)), 100)
    ddim_100 = error(mixture, 100)
    assert heun_50 < 0.75 * ddim_100
    assert heun_100 < 0.4 * heun_50


def test_euler_maruyama_samples_a_gaussian():
    torch.manual_seed(0)
    gaussian = GaussianMixture(torch.zeros(1, 1).double(), 0.5, SCHED)
    xT = torch.randn(4000, 1).double()
    x = sample(gaussian, xT, SCHED, 1000, solver=em_step)
    assert abs(x.std() - 0.5) < 0.03
    assert abs(x.mean()) < 0.04


# The comparison of cases

FOUR_CASES = {k: CASES[k] for k in ('release', 'paper', 'conditional decoder', 'VAE, β = 1')}


def compare_four_cases(folder):
    "The results of `compare_cases` for one seed of FOUR_CASES, and its log."
    lines = []
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PDAE_NB_CACHE', str(folder))
        m.setattr('pdae_nb.experiments.scorevae.CASES', FOUR_CASES)
        results = compare_cases(folder / 'cases.json', 'smoke', (0,), log=lines.append)
    return results, lines


@pytest.fixture(scope='module')
def comparison(tmp_path_factory):
    "A comparison of four cases: its folder, its results, and its log."
    folder = tmp_path_factory.mktemp('comparison')
    return folder, *compare_four_cases(folder)


@pytest.mark.slow
def test_rows_of_the_comparison(comparison):
    _, d, lines = comparison
    assert len(lines) == 8
    assert len(d['runs']) == 4
    assert set(d['priors']) == {'own 0', 'half 0', 'twice 0', 'twice, trained on it 0'}
    own = d['priors']['own 0']['mse_random']
    assert own == d['runs']['release 0']['mse_random']
    assert own != d['priors']['twice 0']['mse_random']
    assert d['dpm']['twice']['images'] == 2 * d['dpm']['own']['images']
    assert 'bound' in d['runs']['release 0']
    assert 'bound' not in d['runs']['VAE, β = 1 0']


@pytest.mark.slow
def test_repeated_comparison_measures_nothing(comparison):
    folder, d, _ = comparison
    again, lines = compare_four_cases(folder)
    assert again == d
    assert not lines


@pytest.mark.slow
def test_curves_of_the_comparison_are_the_training_logs(comparison):
    folder, d, _ = comparison
    for i, (name, case) in enumerate(FOUR_CASES.items()):
        log = folder / f'runs/mnist14_{case.method}-smoke-0-{i}/log.jsonl'
        last = json.loads(log.read_text().splitlines()[-1])
        assert d['runs'][f'{name} 0']['curve'][-1] == [last['seen'], last['loss']]


def test_comparison_with_fewer_seeds_is_an_error(tmp_path):
    "Rows of more seeds are not overwritten."
    path = tmp_path / 'cases.json'
    rows = {f'{case} {seed}': {} for case in CASES for seed in (0, 1, 2)}
    about = dict(size='smoke')
    path.write_text(json.dumps(dict(about=about, seconds=0, runs=rows, priors={})))
    before = path.read_bytes()
    n = len(CASES)
    with pytest.raises(ValueError, match=f'holds {3 * n} runs, 1 seeds would give {n}'):
        compare_cases(path, 'smoke', (0,))
    with pytest.raises(ValueError, match='0 seeds would give 0'):
        compare_cases(path, 'smoke', ())
    assert path.read_bytes() == before


def test_damaged_file_of_a_comparison_is_an_error(tmp_path):
    path = tmp_path / 'cases.json'
    path.write_text('[]')
    with pytest.raises(ValueError, match='holds no comparison of cases'):
        compare_cases(path, 'smoke', (0,))


@pytest.mark.slow
@pytest.mark.parametrize('method', [ScoreVAE, ConditionalDecoder])
def test_preset_and_beta_of_a_recipe(runs, method):
    "A larger β gives a larger loss, and another preset another loss, with the same weights."
    base = load(runs['dpm']) if method is ScoreVAE else None
    net = {} if method is ScoreVAE else NET
    data = load_images('digits', 'train', 28)
    x0 = to_signed(data.x[:4])

    def loss(**settings):
        r = brief_recipe(
            method,
            base=base,
            net=net,
            encoder=NET | dict(z_dim=4),
            settings=ScoreVAESettings(**settings),
        )
        torch.manual_seed(0)
        model = method.build(r, data, base)
        losses, _ = model.loss(x0, None, Draw(1, 0, len(x0)))
        return losses.sum().item()

    release = loss()
    assert loss(preset='release', beta=1e-3) == release
    assert loss(beta=1.0) > release
    assert loss(preset='paper', beta=1e-3) != release
    with pytest.raises(ValueError, match="preset must be one of paper, release, pdae, got 'papr'"):
        loss(preset='papr')


def small_vae():
    "An untrained VAE with 6 numbers in a code."
    return VAE(BetaVAE(z_dim=6, **TINY), SCHED, (1, 28, 28))


def test_too_few_test_images_are_an_error():
    with pytest.raises(ValueError, match='at least 20 test images are needed, got 19'):
        small_vae().test_result(random_images(19), None)


# Runs


@pytest.mark.slow
def test_methods_and_parts_of_runs(runs):
    release = load(runs['release'])
    paper = load(runs['paper'])
    vae = load(runs['vae'])
    assert (release.title, vae.title) == ('ScoreVAE', 'beta-VAE')
    weights = [p.numel() for p in release.enc.parameters()]
    assert [p.numel() for p in release.parameters()] == weights, 'the base is not part of it'
    assert vae.enc is vae.net.enc
    assert release.settings == ScoreVAESettings()
    assert paper.settings == ScoreVAESettings('paper')
    assert paper.card.recipe['settings'] == dict(preset='paper', beta=None)
    assert paper.card.recipe['encoder']['log_norm'] is False
    assert paper.enc.log_norm is False
    assert release.enc.log_norm is True


def bound_denoiser(model, z):
    "The denoiser for codes by the function of the method."
    if isinstance(model, VAE):
        return vae_denoiser(model.net, z, model.sched)
    if isinstance(model, ConditionalDecoder):
        return diffae_denoiser(model.net, z)
    return scorevae_denoiser(model.base.net, model.enc, z, model.sched)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['release', 'conditional', 'vae'])
def test_decoder_of_images_is_that_of_their_codes(runs, name):
    model = load(runs[name])
    x0 = random_images(3)
    t = torch.full((3,), 500)
    with torch.no_grad():
        of_images = model.denoiser(model.condition(x0))(x0, t)
        of_codes = bound_denoiser(model, model.enc(x0))(x0, t)
    torch.testing.assert_close(of_images, of_codes, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('steps', [1, 5])
def test_samples_of_the_vae_do_not_depend_on_noise_and_steps(runs, steps):
    model = load(runs['vae'])
    x0 = random_images(3)
    z = model.encode(x0)
    with torch.no_grad():
        decoded = model.net(x0)
        x = sample(model.denoiser(z), torch.randn_like(x0), model.sched, steps)
    torch.testing.assert_close(x, decoded, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.decode(z, torch.randn_like(x0), steps=steps), decoded)
    torch.testing.assert_close(model.reconstruct(x0, steps=steps), decoded)


@pytest.mark.slow
def test_interpolation_begins_with_the_reconstruction(runs):
    model = load(runs['release'])
    x0 = random_images(3)
    seen = images(x0, model)
    reconstructed = model.reconstruct(seen, steps=2)
    assert torch.equal(seen, x0)
    assert not torch.equal(reconstructed, x0)
    path = interpolate(model, x0[:1], x0[1:2], [0, 0.5, 1], 2)
    assert path.shape == (3, 1, 1, 28, 28)
    torch.testing.assert_close(path[0], reconstructed[:1], atol=1e-2, rtol=1e-2)
    assert not torch.allclose(path[0], path[1])


@pytest.mark.slow
def test_edit_with_step_zero_is_the_reconstruction(runs):
    model = load(runs['vae'])
    x0 = random_images(3)
    z = torch.randn(40, 6)
    probe = fit_probe(z, z[:, 0] > 0)
    unchanged, edited = manipulate(model, x0, probe, [0.0, 0.2], 2)
    with torch.no_grad():
        torch.testing.assert_close(unchanged, model.net(x0), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(edited, unchanged)


def test_codes_of_the_prior_depend_on_the_seed_only():
    model = small_vae()
    codes = model.codes(4, 1)
    assert codes.shape == (4, 6)
    assert torch.equal(codes, small_vae().codes(4, 1))
    assert not torch.equal(codes, model.codes(4, 2))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['release', 'vae'])
def test_samples_from_the_prior_are_those_of_its_codes(runs, name):
    "The model is its own prior, and `seed` is that of the codes and of the noise."
    model = load(runs[name])
    samples = model.sample(2, prior=model, seed=3, steps=2)
    codes = model.codes(2, 3)
    assert torch.equal(samples, model.sample_codes(codes, seed=3, steps=2))
    assert not torch.equal(samples, model.sample_codes(codes.roll(1, 0), seed=3, steps=2))


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['release', 'paper'])
def test_published_sampler_of_a_run(runs, preset, monkeypatch):
    "`decode_as_published` gives the denoiser of the codes to the sampler of the model's preset."
    model = load(runs[preset])
    z = model.codes(2, 0)
    xT = torch.randn(2, 1, 28, 28)
    t = torch.full((2,), model.sched.T)

    def first_call(denoiser, xT, sched):
        assert sched is model.sched
        return denoiser(xT, t)

    monkeypatch.setitem(PRESETS[preset], 'decode', first_call)
    with torch.no_grad():
        want = scorevae_denoiser(model.base.net, model.enc, z, model.sched)(xT, t)
    assert torch.equal(model.decode_as_published(z, xT), want)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['release', 'vae'])
def test_sample_and_reconstruct_from_the_shell(runs, tmp_path, name):
    for command in ('sample', 'reconstruct'):
        file = tmp_path / f'{command}.png'
        options = ['--n', '2', '--steps', '2', '--out', str(file)]
        assert main([command, str(runs[name]), *options]) == 0
        assert file.exists()


@pytest.mark.slow
def test_label_for_a_vae_is_an_error_in_the_shell(runs, capsys):
    assert main(['sample', str(runs['vae']), '--label', '3']) == 1
    assert 'takes no --label' in capsys.readouterr().err
