"""Identities of the interface, in float64, on a Gaussian mixture with known densities."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pdae_nb.denoise import GaussianMixture, denoising_loss, loss_curve
from pdae_nb.experiments.critical_stage import stage_accuracy, stage_grid
from pdae_nb.forward import Schedule, add_noise, at, eps_to_x0, posterior, shift_to_eps, x0_to_eps
from pdae_nb.gap import gap_curve, gap_factor, posterior_gap
from pdae_nb.guidance import grad_log, guided
from pdae_nb.methods.classifier import classifier_guided
from pdae_nb.sampling import ddim_step, invert, sample, trajectory
from pdae_nb.solvers import belm_step, dpmpp_step, invert_exactly

SCHED = Schedule.linear()
TIMES = [1, 2, 5, 50, 300, 700, 1000]
F64 = torch.float64


def mixture(sched):
    mu = torch.tensor([[0.8, 0.6], [-0.9, 0.3], [0.1, -1.0]], dtype=F64)
    return GaussianMixture(mu, 0.15, sched)


@pytest.fixture
def gm():
    torch.manual_seed(0)
    return mixture(SCHED)


class Noisy(NamedTuple):
    "Samples of the mixture at one timestep."

    x0: Tensor
    y: Tensor
    t: Tensor
    eps: Tensor
    xt: Tensor


def noisy(gm, t, n=200):
    x0, y = gm.sample(n)
    t = torch.full((n,), t)
    eps = torch.randn_like(x0)
    return Noisy(x0, y, t, eps, add_noise(SCHED, x0, t, eps))


def eps_and_score(gm, y):
    "For `guided`: the unconditional eps and the exact score grad log p(y|x_t)."

    def both(xt, t):
        score = grad_log(lambda x: gm.log_p(x, t, y), xt)
        return gm(xt, t), score

    return both


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize('t', TIMES)
def test_bayes_rule_for_scores(gm, t):
    "eps + score_to_eps(grad log p(y|x_t)) is the exact conditional eps."
    d = noisy(gm, t)
    conditional = gm(d.xt, d.t, d.y)
    by_score = guided(eps_and_score(gm, d.y), SCHED)
    by_classifier = classifier_guided(gm, gm, d.y, SCHED)
    torch.testing.assert_close(by_score(d.xt, d.t), conditional, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_classifier(d.xt, d.t), conditional, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('window', [(0, 1), (0, 1000), (300, 700), (999, 1000)])
def test_guidance_acts_only_in_its_window(gm, window):
    t1, t2 = window
    d = noisy(gm, 1, 50)
    both = eps_and_score(gm, d.y)
    calls = []

    def counted(xt, t):
        calls.append(t)
        return both(xt, t)

    f = guided(counted, SCHED, window=window, unguided=gm)
    for time in (1, 2, 300, 301, 700, 701, 999, 1000):
        t = torch.full((50,), time)
        xt = add_noise(SCHED, d.x0, t, d.eps)
        inside = t1 < time <= t2
        want = gm(xt, t, d.y) if inside else gm(xt, t)
        calls.clear()
        torch.testing.assert_close(f(xt, t), want, rtol=1e-9, atol=1e-9)
        assert len(calls) == int(inside), 'the score is computed only inside the window'

    # Each sample of a batch may have its own timestep.
    t = torch.arange(1, 51) * 20
    xt = add_noise(SCHED, d.x0, t, d.eps)
    inside = (t1 < t) & (t <= t2)
    want = torch.where(inside[:, None], gm(xt, t, d.y), gm(xt, t))
    torch.testing.assert_close(f(xt, t), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_score_leaves_xt_and_the_grad_mode_unchanged(gm, mode):
    d = noisy(gm, 500)
    with mode():
        grad_enabled = torch.is_grad_enabled()
        score = grad_log(lambda x: gm.log_p(x, d.t, d.y), d.xt)
        assert torch.is_grad_enabled() == grad_enabled
        assert not d.xt.requires_grad
        assert d.xt.grad is None
        # In a loss the score is differentiable. In a sampler it keeps no graph.
        assert score.requires_grad == (mode is torch.enable_grad)


def test_a_score_can_be_differentiated(gm):
    "The derivative of ‖a·score‖² with respect to a, at a = 1, is 2·‖score‖²."
    d = noisy(gm, 500)
    score = grad_log(lambda x: gm.log_p(x, d.t, d.y), d.xt).detach()
    assert score.square().sum() > 0
    a = torch.ones((), dtype=F64, requires_grad=True)
    grad_log(lambda x: a * gm.log_p(x, d.t, d.y), d.xt).square().sum().backward()
    torch.testing.assert_close(a.grad, 2 * score.square().sum())


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_grid_cells_equal_separate_sampling(gm, eta):
    "Every window of the grid gives exactly the result of mixed sampling from x_T."
    y = torch.arange(60) % 3
    xT = torch.randn(60, 2, dtype=F64)
    settings = dict(step=250, substeps=5, eta=eta, clip=None, scale=2.0)

    def classify(x):
        return -torch.cdist(x, gm.mu)

    cells = stage_grid(gm, gm, classify, xT, y, SCHED, **settings)
    assert len(cells) == 11
    for window, cell in cells.items():
        if window != (0, 0):
            alone = stage_accuracy(gm, gm, classify, xT, y, SCHED, window=window, **settings)
            assert torch.equal(cell, alone)


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize('t', TIMES)
def test_posterior_mean_as_a_function_of_eps(gm, t):
    "mu~(x_t, x0_hat(eps)) = (x_t - beta/sqrt(1-ab) eps)/sqrt(alpha)."
    d = noisy(gm, t)
    eps = gm(d.xt, d.t)
    alpha_bar = SCHED(d.t)
    alpha = alpha_bar / SCHED(d.t - 1)
    beta = 1 - alpha
    want = (d.xt - at(beta / (1 - alpha_bar).sqrt(), d.xt) * eps) / at(alpha.sqrt(), d.xt)
    mean, _ = posterior(SCHED, eps_to_x0(SCHED, d.xt, d.t, eps), d.xt, d.t)
    torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('t', TIMES)
def test_shift_moves_the_posterior_mean_by_variance_times_score(gm, t):
    d = noisy(gm, t)
    eps = gm(d.xt, d.t)
    score = torch.randn_like(d.xt)
    shifted_eps = eps + shift_to_eps(SCHED, d.t, score)
    before, var = posterior(SCHED, eps_to_x0(SCHED, d.xt, d.t, eps), d.xt, d.t)
    after, _ = posterior(SCHED, eps_to_x0(SCHED, d.xt, d.t, shifted_eps), d.xt, d.t)
    torch.testing.assert_close(after - before, var * score, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize('t', TIMES)
def test_ddim_with_eta_1_is_ddpm(gm, t):
    "One step of eta=1 to t-1 has the posterior's mean and variance."
    d = noisy(gm, t)
    eps = gm(d.xt, d.t)
    torch.manual_seed(1)
    xs, x0 = ddim_step(SCHED, d.xt, d.t, d.t - 1, eps, eta=1.0)
    torch.manual_seed(1)
    noise = torch.randn_like(d.xt)
    mean, var = posterior(SCHED, x0, d.xt, d.t)
    torch.testing.assert_close(xs, mean + var.sqrt() * noise, rtol=1e-8, atol=1e-8)


def test_no_noise_is_added_at_t_0(gm):
    d = noisy(gm, 1)
    t = torch.zeros(len(d.x0), dtype=torch.int64)
    assert torch.equal(add_noise(SCHED, d.x0, t, d.eps), d.x0)


# ---------------------------------------------------------------- losses and gaps


@pytest.mark.parametrize('t', TIMES)
def test_a_denoiser_that_returns_the_true_noise_has_no_gap(gm, t):
    d = noisy(gm, t)

    def oracle(xt, t):
        return x0_to_eps(SCHED, xt, t, d.x0)

    assert posterior_gap(oracle, d.x0, SCHED, d.t, d.eps).max() < 1e-18
    assert denoising_loss(oracle, d.x0, SCHED, t=d.t, eps=d.eps) < 1e-18


@pytest.mark.parametrize('t', TIMES)
def test_gap_is_a_multiple_of_the_loss(gm, t):
    "posterior_gap = 2·gap_factor(t)·loss, sample by sample."
    d = noisy(gm, t)
    loss = denoising_loss(gm, d.x0, SCHED, t=d.t, eps=d.eps, reduce=None)
    gap = posterior_gap(gm, d.x0, SCHED, d.t, d.eps)
    torch.testing.assert_close(gap, 2 * gap_factor(SCHED, d.t) * loss, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    'bad, accepted',
    [([0], '1…1000'), ([5, 0], '1…1000'), ([-3], '0…1000'), ([1001], '0…1000')],
)
def test_gap_refuses_timesteps_without_a_step(gm, bad, accepted):
    "The error states the timestep received and the timesteps accepted."
    x0, _ = gm.sample(4)
    message = rf't must be in {accepted}, got {bad[-1]}\b'
    with pytest.raises(ValueError, match=message):
        gap_factor(SCHED, torch.tensor(bad))
    with pytest.raises(ValueError, match=message):
        gap_curve(gm, x0, SCHED, bad)


def test_gap_refuses_timesteps_that_are_not_integers():
    with pytest.raises(TypeError, match='int64'):
        gap_factor(SCHED, torch.tensor([0.5]))


@pytest.mark.parametrize('bs', [1, 7, 30, 45, 10_000])
def test_loss_curve_is_the_same_for_every_batch_size(gm, bs):
    "No pass is larger than `bs`. Each sample keeps its own label and noise."
    x0, y = gm.sample(30)
    ts = [1, 300, 700]
    sizes = []
    labels = []

    def recorded(xt, t, y):
        sizes.append(len(xt))
        labels.append(y)
        return gm(xt, t, y)

    def labelled(xt, t):
        return gm(xt, t, y)

    got = loss_curve(recorded, x0, SCHED, ts, y=y, bs=bs)
    assert max(sizes) <= bs
    assert sum(sizes) == 90
    assert torch.equal(torch.cat(labels), y.repeat(3))

    one_pass_per_t = loss_curve(labelled, x0, SCHED, ts, bs=30)
    torch.testing.assert_close(got, one_pass_per_t, rtol=1e-12, atol=1e-15)

    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    want = []
    for time in ts:
        t = torch.full((30,), time)
        want.append(denoising_loss(labelled, x0, SCHED, t=t, eps=eps, reduce=None))
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-15)


def test_the_label_reduces_the_gap_at_every_t(gm):
    x0, y = gm.sample(20_000)
    unconditional = gap_curve(gm, x0, SCHED, TIMES[1:]).mean(1)
    conditional = gap_curve(gm, x0, SCHED, TIMES[1:], y=y).mean(1)
    assert unconditional.shape == conditional.shape == (len(TIMES) - 1,)
    assert (conditional <= unconditional * (1 + 1e-9)).all()
    assert (conditional < 0.5 * unconditional).any()


def test_other_denoisers_have_a_higher_loss_than_the_exact_one(gm):
    x0, _ = gm.sample(5000)
    ts = [20, 300, 800]

    def shifted(xt, t):
        return gm(xt, t) + 0.05

    def scaled(xt, t):
        return 1.1 * gm(xt, t)

    def zero(xt, t):
        return torch.zeros_like(xt)

    best = loss_curve(gm, x0, SCHED, ts).mean(1)
    for other in (shifted, scaled, zero):
        assert (loss_curve(other, x0, SCHED, ts).mean(1) > best).all()


# ---------------------------------------------------------------- sampling and inversion


def rms_after_inversion(gm, x0, n, solver):
    "Root mean square error of inversion and sampling in n steps each."
    xT = invert(gm, x0, SCHED, n, solver=solver)
    return (sample(gm, xT, SCHED, n, solver=solver) - x0).square().mean().sqrt()


@pytest.mark.parametrize('solver', [ddim_step, dpmpp_step], ids=lambda f: f.__name__)
def test_inversion_error_falls_with_the_number_of_steps(gm, solver):
    x0, _ = gm.sample(300)
    of_20, of_100, of_500 = [rms_after_inversion(gm, x0, n, solver) for n in (20, 100, 500)]
    assert of_20 > 1.5 * of_100
    assert 1.5 * of_100 > 2 * of_500


@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize('steps', [2, 10, 100])
def test_exact_inversion_loses_only_rounding(gm, steps, dtype, tol):
    x0 = gm.sample(300)[0].to(dtype)
    inverted = invert_exactly(gm, x0, SCHED, steps)
    exact = sample(gm, inverted, SCHED, steps, solver=belm_step)
    assert (exact - x0).abs().max() < tol
    ddim = sample(gm, invert(gm, x0, SCHED, steps), SCHED, steps)
    assert (ddim - x0).abs().max() > 100 * tol


@pytest.fixture(scope='module')
def log2_error():
    """The error of a solver at n steps, as a power of 2.

    The probability-flow ODE runs from x_T to a small timestep, with n steps evenly in log SNR. The
    reference takes every timestep.
    """
    sched = Schedule.vp_sde(2**12)
    first = sched.T
    last = 30
    gm = mixture(sched)
    xT = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    log_snr = (sched.alpha_bar / (1 - sched.alpha_bar)).log()

    def grid(n):
        want = torch.linspace(log_snr[first], log_snr[last], n + 1, dtype=F64)
        nearest = {int((log_snr[1:] - w).abs().argmin()) + 1 for w in want}
        return sorted(nearest, reverse=True)

    every_t = list(range(first, last - 1, -1))
    exact = sample(gm, xT, sched, every_t, solver=dpmpp_step)

    def error(solver, n):
        x = sample(gm, xT, sched, grid(n), solver=solver)
        return (x - exact).abs().mean().log2().item()

    return error


@pytest.mark.slow
@pytest.mark.parametrize(
    'solver, order',
    [(ddim_step, 1), (dpmpp_step, 2), (belm_step, 2)],
    ids=lambda o: getattr(o, '__name__', o),
)
def test_order_of_convergence(solver, order, log2_error):
    "With 4 times the steps, the error is divided by 4^order."
    measured = (log2_error(solver, 32) - log2_error(solver, 128)) / 2
    assert abs(measured - order) < 0.3


def test_samples_follow_the_mixture(gm):
    x = sample(gm, torch.randn(4000, 2, dtype=F64), SCHED, 200)
    distances = (x[:, None] - gm.mu).norm(dim=-1)
    nearest = distances.argmin(1)
    share = nearest.bincount(minlength=3) / len(x)
    assert (share - 1 / 3).abs().max() < 0.05
    deviation = x - gm.mu[nearest]
    assert abs(deviation.std().item() / gm.std - 1) < 0.1


def test_sampling_does_not_depend_on_the_shape_of_the_data():
    "The same numbers for codes (B,4) and images (B,1,2,2)."
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def eps(xt, t):
        return 0.3 * xt + at(SCHED(t), xt)

    def sampled(x):
        return sample(eps, x, SCHED, 10)

    def inverted(x):
        return invert(eps, x, SCHED, 10)

    def inverted_exactly(x):
        return invert_exactly(eps, x, SCHED, 10).xT

    for f in (sampled, inverted, inverted_exactly):
        images = f(x.reshape(5, 1, 2, 2))
        assert torch.equal(f(x), images.reshape(5, 4))


def test_a_trajectory_yields_the_timesteps_it_arrives_at(gm):
    path = list(trajectory(gm, torch.randn(3, 2, dtype=F64), SCHED, 4))
    assert [s for s, _, _ in path] == [750, 500, 250, 0]
    _, x, x0 = path[-1]
    torch.testing.assert_close(x, x0)  # at t = 0 the state is the predicted x_0


def test_exact_inversion_and_decoding_switch_tf32_off(gm, monkeypatch):
    "The denoiser is called without TF32, and TF32 is on again between the steps and afterwards."
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, 'allow_tf32', True)
    seen = []

    def recording(xt, t):
        seen.append(cudnn.allow_tf32)
        return gm(xt, t)

    x0, _ = gm.sample(4)
    pair = invert_exactly(recording, x0, SCHED, 5)
    assert cudnn.allow_tf32
    for _ in trajectory(recording, pair, SCHED, 5, solver=belm_step):
        assert cudnn.allow_tf32
    assert seen == [False] * (5 + 4)
    sample(recording, x0, SCHED, 5)
    assert seen[9:] == [True] * 5  # DDIM sampling may use TF32
    cudnn.allow_tf32 = False
    sample(recording, x0, SCHED, 5)
    assert seen[14:] == [False] * 5  # unless the caller forbids it
    assert not cudnn.benchmark
