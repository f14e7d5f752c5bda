"""Denoising (page 02): the loss, its bound, the Gaussian mixture and `loss_curve`."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import distributions as D

from pdae_nb.denoise import GaussianMixture, denoising_loss, loss_curve, predict_x0, square
from pdae_nb.forward import Schedule, add_noise, posterior, snr

SCHED = Schedule.linear()
F64 = torch.float64
CENTRES = torch.tensor([[-1.2, -0.7], [1.2, -0.4], [-0.1, 1.1]], dtype=F64)
N = 20_000


def halve(xt, t):
    return xt / 2


def at_all_timesteps():
    "One image at each timestep, with noise."
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 1, 8, 8, generator=generator)
    noise = torch.randn(1000, 1, 8, 8, generator=generator)
    t = torch.arange(1, 1001)
    return image.expand(1000, -1, -1, -1), t, noise


@pytest.fixture(scope='module')
def data():
    "Samples of a mixture, with noise."
    generator = torch.Generator().manual_seed(0)
    mixture = GaussianMixture(CENTRES, 0.3, SCHED)
    x0, y = mixture.sample(N, generator)
    eps = torch.randn(N, 2, generator=generator, dtype=F64)
    t = torch.randint(1, 1001, (N,), generator=generator)
    xt = add_noise(SCHED, x0, t, eps)
    return SimpleNamespace(mixture=mixture, x0=x0, y=y, eps=eps, t=t, xt=xt)


# ---------------------------------------------------------------- the loss


def test_square():
    assert square(torch.tensor([-3.0, 0, 0.5])).equal(torch.tensor([9, 0, 0.25]))


def test_the_loss_is_diffae_eq_6_divided_by_timesteps_and_pixels():
    x0, t, eps = at_all_timesteps()
    alpha_bar = SCHED(t).float().view(-1, 1, 1, 1)
    xt = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    eq_6 = (halve(xt, t) - eps).square().sum((1, 2, 3)).sum()
    loss = denoising_loss(halve, x0, SCHED, t=t, eps=eps)
    assert math.isclose(eq_6, 1000 * 64 * loss, rel_tol=1e-5)


def test_timesteps_and_noise_are_sampled_unless_they_are_given():
    x0, t, eps = at_all_timesteps()

    def seeded(seed):
        torch.manual_seed(seed)
        return denoising_loss(halve, x0, SCHED)

    assert seeded(0) == seeded(0) != seeded(1)

    state = torch.get_rng_state()
    first = denoising_loss(halve, x0, SCHED, t=t, eps=eps)
    assert first == denoising_loss(halve, x0, SCHED, t=t, eps=eps)
    assert torch.get_rng_state().equal(state), 'no random number was used'

    seen = []

    def record(xt, t):
        seen.append(t)
        return xt

    denoising_loss(record, x0[:100], SCHED)
    assert ((seen[0].sort().values - 1) // 10).equal(torch.arange(100)), 'one in each hundredth'


def test_weight_distance_and_reduction():
    x0, t, eps = at_all_timesteps()
    options = dict(t=t, eps=eps)
    loss = denoising_loss(halve, x0, SCHED, **options)
    each = denoising_loss(halve, x0, SCHED, **options, reduce=None)
    early = denoising_loss(halve, x0, SCHED, lambda sched, t: 10 * (t <= 100), **options)
    absolute = denoising_loss(halve, x0, SCHED, **options, dist=torch.abs)
    torch.testing.assert_close(each.mean(), loss)
    torch.testing.assert_close(each[:100].mean(), early)
    xt = add_noise(SCHED, x0, t, eps)
    torch.testing.assert_close(absolute, (halve(xt, t) - eps).abs().mean())


def test_inputs_that_do_not_fit():
    x0, t, eps = [values[:8] for values in at_all_timesteps()]

    def loss(denoiser=halve, x0=x0, t=t, eps=eps):
        return denoising_loss(denoiser, x0, SCHED, t=t, eps=eps)

    message = r'returned shape \(8, 8, 8\) for data of shape \(8, 1, 8, 8\)'
    with pytest.raises(ValueError, match=message):
        loss(lambda xt, t: xt.mean(1))
    with pytest.raises(ValueError, match=r'noise of shape \(1, 1, 8, 8\)'):
        loss(eps=eps[:1])
    with pytest.raises(TypeError, match='got torch.uint8'):
        loss(x0=torch.zeros(8, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match='t must be an int64 tensor'):
        loss(t=t / 1000)
    with pytest.raises(ValueError, match='3 times for a batch of 8'):
        loss(t=t[:3])


def test_each_term_of_the_bound_is_a_weighted_squared_error(data):
    "KL of the model's step (variance β_t) from the posterior, t > 1 (DDPM Eq. 12)."
    late = data.t > 1
    t, x0, eps, xt = data.t[late], data.x0[late], data.eps[late], data.xt[late]
    mean, variance = posterior(SCHED, x0, xt, t)
    model_mean, _ = posterior(SCHED, predict_x0(halve, xt, t, SCHED), xt, t)
    beta = SCHED.beta[t - 1]
    step_of_q = D.Normal(mean, variance.sqrt())
    step_of_model = D.Normal(model_mean, beta.sqrt()[:, None])
    kl = D.kl_divergence(step_of_q, step_of_model).sum(1)

    weight = beta / (2 * (1 - beta) * (1 - SCHED(t)))
    each = denoising_loss(halve, x0, SCHED, t=t, eps=eps, reduce=None)
    ratio = variance[:, 0] / beta
    constant = ratio - 1 - ratio.log()  # D/2 is 1
    torch.testing.assert_close(kl, 2 * weight * each + constant, rtol=1e-6, atol=1e-9)


def test_the_loss_of_x0_has_the_weight_of_the_inverse_snr(data):
    "The answer to an exercise of the page."

    def with_sine(xt, t):
        return data.mixture(xt, t) + 0.3 * torch.sin(2 * xt)

    error = (predict_x0(with_sine, data.xt, data.t, SCHED) - data.x0).square().mean()
    weighted = denoising_loss(
        with_sine, data.x0, SCHED, lambda sched, t: 1 / snr(sched, t), t=data.t, eps=data.eps
    )
    torch.testing.assert_close(weighted, error, rtol=1e-9, atol=0)


DENOISERS = {
    'optimal': lambda mixture: mixture,
    'with sine': lambda mixture: lambda xt, t: mixture(xt, t) + 0.3 * torch.sin(2 * xt),
    'halve': lambda mixture: halve,
    'zero': lambda mixture: lambda xt, t: torch.zeros_like(xt),
}


@pytest.mark.parametrize('name', DENOISERS)
@pytest.mark.parametrize('likelihood', [False, True])
def test_denoising_score_matching_is_the_weighted_loss(data, name, likelihood):
    "ScoreVAE Eq. 7 with λ = 1 - ᾱ_t, and with ScoreVAE's g²."
    denoiser = DENOISERS[name](data.mixture)
    noise_variance = 1 - SCHED(data.t)
    scale = 1000 * SCHED.beta[data.t - 1] if likelihood else noise_variance
    score = -data.eps / noise_variance.sqrt()[:, None]
    predicted = -denoiser(data.xt, data.t) / noise_variance.sqrt()[:, None]
    dsm = (scale * (score - predicted).square().sum(1) / 2).mean()
    loss = denoising_loss(
        denoiser, data.x0, SCHED, lambda sched, t: scale / noise_variance, t=data.t, eps=data.eps
    )
    torch.testing.assert_close(dsm, loss, rtol=1e-9, atol=0)  # D/2 is 1


@pytest.mark.parametrize('name', DENOISERS)
def test_score_matching_and_denoising_score_matching_differ_by_a_constant(data, name):
    noise_variance = (1 - SCHED(data.t))[:, None]
    x = data.xt.clone().requires_grad_()
    log_density = classes_at(data.mixture, data.t).log_prob(x[:, None]).logsumexp(1)
    (score_of_p,) = torch.autograd.grad(log_density.sum(), x)
    score_of_q = -data.eps / noise_variance.sqrt()

    def half_square(score, denoiser):
        predicted = -denoiser(data.xt, data.t) / noise_variance.sqrt()
        return (noise_variance * (score - predicted).square()).sum(1) / 2

    constant = half_square(score_of_q, data.mixture)
    denoiser = DENOISERS[name](data.mixture)
    rest = half_square(score_of_q, denoiser) - half_square(score_of_p, denoiser) - constant
    assert rest.mean().abs() <= 4 * rest.std() / N**0.5


# ---------------------------------------------------------------- the mixture


def classes_at(mixture, t):
    "p(x_t|k) of all classes, by torch.distributions."
    alpha_bar = mixture.sched(t)[:, None, None]
    std = (alpha_bar * mixture.std**2 + 1 - alpha_bar).sqrt()
    return D.Independent(D.Normal(alpha_bar.sqrt() * mixture.mu, std), 1)


def test_shapes_that_are_no_mixture():
    with pytest.raises(ValueError, match=r'mu must be \(K,D\), got shape \(3,\)'):
        GaussianMixture(torch.zeros(3), 0.1, SCHED)
    mixture = GaussianMixture(CENTRES, 0.3, SCHED)
    t = torch.arange(1, 5)
    with pytest.raises(ValueError, match=r'xt must be \(B,2\), got shape \(4, 1\)'):
        mixture(torch.zeros(4, 1), t)
    with pytest.raises(RuntimeError, match='must match'):
        mixture.log_p(torch.zeros(4, 2, dtype=F64), t, torch.arange(3))


def test_densities_and_gradients_of_the_classes(data):
    points, t = data.xt[:500], data.t[:500]
    log_p, minus_gradient = data.mixture._modes(points, t)
    x = points.clone().requires_grad_()
    by_torch = classes_at(data.mixture, t).log_prob(x[:, None])
    want = by_torch.detach().diff(dim=1)
    torch.testing.assert_close(log_p.diff(dim=1), want, rtol=0, atol=1e-8)
    for k in range(3):
        (gradient,) = torch.autograd.grad(by_torch[:, k].sum(), x, retain_graph=True)
        torch.testing.assert_close(-minus_gradient[:, k], gradient, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize('t', [0, 300, 1000])
def test_noisy_samples_of_a_class_are_gaussian(data, t):
    t = torch.tensor([t])
    of_class = classes_at(data.mixture, t)
    centred = add_noise(SCHED, data.x0, t, data.eps) - of_class.mean[0, data.y]
    units = centred / of_class.stddev[0, data.y]
    assert units.mean(0).abs().max() < 4 / N**0.5
    assert (units.var(0) - 1).abs().max() < 4 * (2 / N) ** 0.5


def test_log_p_of_given_classes_and_the_conditional_prediction(data):
    points, t, y = data.xt[:500], data.t[:500], data.y[:500]
    rows = torch.arange(500)
    assert data.mixture.log_p(points, t, y).equal(data.mixture.log_p(points, t)[rows, y])
    x = points.clone().requires_grad_()
    log_density = classes_at(data.mixture, t).log_prob(x[:, None])[rows, y]
    (score,) = torch.autograd.grad(log_density.sum(), x)
    want = -(1 - SCHED(t)).sqrt()[:, None] * score
    torch.testing.assert_close(data.mixture(points, t, y), want, rtol=0, atol=1e-10)


def test_the_mean_of_the_conditional_predictions_is_the_unconditional_one(data):
    "The answer to an exercise of the page."
    points, t = data.xt[:500], data.t[:500]
    p = data.mixture.log_p(points, t).exp()
    parts = [data.mixture(points, t, torch.full((500,), k)) for k in range(3)]
    mixed = sum(p[:, k : k + 1] * part for k, part in enumerate(parts))
    torch.testing.assert_close(mixed, data.mixture(points, t), rtol=0, atol=1e-12)


def test_late_arrows_point_to_the_middle(data):
    line = torch.linspace(-2.8, 2.8, 71, dtype=F64)[3::9]
    grid = torch.cartesian_prod(line, line)
    rim = grid[grid.norm(dim=1) > 1]

    def inward(t):
        denoised = -data.mixture(rim, torch.full((len(rim),), t))
        return torch.cosine_similarity(denoised, -rim).min()

    assert inward(1000) > 0.99
    assert inward(50) < 0.5


# ---------------------------------------------------------------- loss_curve

TIMES = [1, 3, 10, 20, 50, 100, 150, 200, 300, 400, 500, 700, 1000]


def test_loss_curve_is_reproducible_and_does_not_depend_on_the_batch_size(data):
    few = dict(x0=data.x0[:90], sched=SCHED, ts=TIMES)
    y = data.y[:90]

    def with_classes(xt, t):
        return data.mixture(xt, t, y)

    want = loss_curve(with_classes, **few, bs=90)
    assert loss_curve(with_classes, **few, bs=90).equal(want)
    sizes = []

    def record(xt, t, y):
        sizes.append(len(xt))
        return data.mixture(xt, t, y)

    for bs in (500, 40):
        got = loss_curve(record, **few, y=y, bs=bs)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert max(sizes) <= bs
        sizes.clear()


def standard_errors(a, b):
    "The largest difference of the means of two curves, in standard errors."
    difference = a - b
    return (difference.mean(1) / (difference.std(1) / N**0.5)).abs().max()


def test_the_irreducible_error(data):
    "It is 1 minus the second moment of the optimum; for one class, it has a formula."
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(data.x0.shape, generator=generator, dtype=F64)  # that of `loss_curve`
    options = dict(sched=SCHED, ts=TIMES, bs=N)

    def second_moment(f):
        values = []
        for t in TIMES:
            xt = add_noise(SCHED, data.x0, torch.tensor([t]), noise)
            values.append(f(xt, torch.full((N,), t)).square().mean(1))
        return torch.stack(values)

    def sine(xt, t):
        return 0.3 * torch.sin(2 * xt)

    def with_sine(xt, t):
        return data.mixture(xt, t) + sine(xt, t)

    def class_term(xt, t):
        return data.mixture(xt, t, data.y) - data.mixture(xt, t)

    optimal = loss_curve(data.mixture, data.x0, **options)
    given_class = loss_curve(data.mixture, data.x0, y=data.y, **options)
    excess = loss_curve(with_sine, data.x0, **options) - optimal
    assert standard_errors(optimal, 1 - second_moment(data.mixture)) < 4
    assert standard_errors(excess, second_moment(sine)) < 4
    assert standard_errors((optimal - given_class)[4:], second_moment(class_term)[4:]) < 4

    one_class = GaussianMixture(CENTRES[:1], 0.3, SCHED)
    x0, _ = one_class.sample(N, torch.Generator().manual_seed(1))
    alpha_bar = SCHED(torch.tensor(TIMES))[:, None]
    formula = alpha_bar * 0.3**2 / (alpha_bar * 0.3**2 + 1 - alpha_bar)
    assert standard_errors(loss_curve(one_class, x0, **options), formula) < 4
