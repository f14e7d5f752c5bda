"""The forward process (page 01): schedules, conversions, error messages and rounding."""

import math

import pytest
import torch

from pdae_nb.forward import (
    Schedule,
    add_noise,
    at,
    eps_to_x0,
    posterior,
    score_to_eps,
    shift_to_eps,
    snr,
    x0_to_eps,
)

LINEAR = Schedule.linear()
THREE = Schedule([0.1, 0.2, 0.3])
F64 = torch.float64


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    'beta, message',
    [
        ([0.1, 0.0, 0.2], r'every beta must be in \(0,1\], got 0 … 0.2'),
        ([0.1, float('nan')], r'every beta must be in \(0,1\]'),
        ([], 'non-empty vector'),
        (0.1, r'got shape \(\)'),
    ],
)
def test_betas_that_are_no_schedule(beta, message):
    with pytest.raises(ValueError, match=message):
        Schedule(beta)


def test_ten_steps_are_too_few_for_the_linear_schedule():
    with pytest.raises(ValueError, match=r'every beta must be in \(0,1\], got 0.01 … 2'):
        Schedule.linear(T=10)


@pytest.mark.parametrize(
    't, error, message',
    [
        (torch.tensor([0, -1]), ValueError, 't must be in 0…3, got -1 … 0'),
        (torch.tensor([4]), ValueError, 'got 4 … 4'),
        (torch.tensor([0.5]), TypeError, 'got torch.float32'),
        (2, TypeError, 'got int'),
    ],
)
def test_timesteps_outside_of_a_schedule(t, error, message):
    with pytest.raises(error, match=message):
        THREE(t)


# alpha_bar of the linear schedule in the official implementations
# fmt: off
OFFICIAL = {
    1: 0.9999, 2: 0.99978012, 6: 0.99910152, 11: 0.99780655, 51: 0.96995151, 101: 0.8951416,
    301: 0.39401111, 501: 0.07779666, 701: 0.0068682791, 901: 2.7024452e-4, 1000: 4.0358296e-5,
}
# fmt: on


@pytest.mark.parametrize('t', OFFICIAL)
def test_the_linear_schedule_is_the_official_one(t):
    assert math.isclose(LINEAR.alpha_bar[t], OFFICIAL[t], rel_tol=1e-7)


def test_the_constant_schedule():
    want = 0.992 ** torch.arange(1001, dtype=F64)
    torch.testing.assert_close(Schedule.constant().alpha_bar, want, rtol=1e-12, atol=0)


def test_only_the_last_beta_of_the_cosine_schedule_is_limited():
    assert (Schedule.cosine().beta == 0.999).nonzero().flatten().tolist() == [999]


def test_the_vp_sde_agrees_with_steps_of_the_equation():
    "Euler steps of the variance of the noise: v' = β(u)·(1 - v)."
    steps = 100_000
    variance = 0.0
    for k in range(steps):
        rate = 0.1 + 19.9 * (k + 0.5) / steps
        variance += rate * (1 - variance) / steps
    assert math.isclose(1 - variance, Schedule.vp_sde().alpha_bar[-1], rel_tol=1e-3)


def test_the_linear_schedule_and_the_vp_sde_differ_by_second_order_terms():
    def log_ratio(T):
        return (Schedule.vp_sde(T).alpha_bar[-1] / Schedule.linear(T).alpha_bar[-1]).log().item()

    series = (LINEAR.beta**2 / 2 + LINEAR.beta**3 / 3).sum().item()
    assert math.isclose(LINEAR.beta.sum(), 10.05)
    assert math.isclose(log_ratio(1000), series, rel_tol=1e-3)
    assert math.isclose(log_ratio(1000), 4 * log_ratio(4000), rel_tol=0.01)
    for weight in (torch.sqrt, lambda alpha_bar: (1 - alpha_bar).sqrt()):
        difference = (weight(LINEAR.alpha_bar) - weight(Schedule.vp_sde().alpha_bar)).abs()
        assert 5e-4 < difference.max() < 1.35e-3


def test_snr():
    ratio = snr(LINEAR, torch.tensor([0, 1, 1000]))
    assert ratio[0] == math.inf
    want = torch.tensor([0.9999 / 0.0001, 4.0359925e-5], dtype=F64)
    torch.testing.assert_close(ratio[1:], want, rtol=1e-7, atol=0)


def test_the_snr_falls_below_1():
    schedules = (LINEAR, Schedule.vp_sde(), Schedule.cosine(), Schedule.constant())
    first = [int((schedule.alpha_bar < 0.5).nonzero()[0]) for schedule in schedules]
    assert first == [260, 259, 497, 87]


def test_a_schedule_of_given_snr():
    "The answer to an exercise of the page."
    ratio = torch.logspace(4, -4, 1000, dtype=F64)
    alpha_bar = torch.cat([torch.ones(1, dtype=F64), ratio / (1 + ratio)])
    schedule = Schedule(1 - alpha_bar[1:] / alpha_bar[:-1])
    got = snr(schedule, torch.arange(1, 1001))
    torch.testing.assert_close(got, ratio, rtol=1e-9, atol=0)


# ---------------------------------------------------------------- jumps and conversions


def test_coefficients_that_do_not_fit_the_data():
    coefficients = LINEAR(torch.tensor([0, 500]))
    with pytest.raises(TypeError, match='got torch.uint8; see `to_signed`'):
        at(coefficients, torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match='2 times for a batch of 5'):
        at(coefficients, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r'got shape \(\)'):
        at(LINEAR(torch.tensor(7)), torch.zeros(5, 3))


def test_noise_of_another_shape():
    t = torch.arange(8)
    with pytest.raises(ValueError, match=r'noise of shape \(1, 4\) for data of shape \(8, 4\)'):
        add_noise(LINEAR, torch.zeros(8, 4), t, torch.zeros(1, 4))


def test_timestep_0_is_the_clean_image():
    x0, eps = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.zeros(3, dtype=torch.int64)
    assert add_noise(LINEAR, x0, t, eps).equal(x0)
    assert x0_to_eps(LINEAR, x0, t, x0).isnan().all(), 'there is no noise to compute'


def test_codes_of_unit_variance_keep_it():
    generator = torch.Generator().manual_seed(1)
    z, eps = torch.randn(2, 4000, 64, generator=generator)
    t = torch.arange(4000) % 1001
    zt = add_noise(Schedule.constant(), z, t, eps)
    as_images = add_noise(Schedule.constant(), z.view(-1, 1, 8, 8), t, eps.view(-1, 1, 8, 8))
    assert zt.equal(as_images.flatten(1))
    assert abs(zt.var() - 1) < 4 * (2 / zt.numel()) ** 0.5


def test_the_inverse_in_float64():
    x0, eps = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(2), dtype=F64)
    t = torch.tensor([0, 10, 200, 700, 1000])
    again = eps_to_x0(LINEAR, add_noise(LINEAR, x0, t, eps), t, eps)
    torch.testing.assert_close(again, x0, rtol=0, atol=5e-13)


def relative_error(values, want):
    return (values.double() / want - 1).abs()


def test_coefficients_are_exact_because_they_are_computed_in_float64():
    want = (1 - LINEAR.alpha_bar[1:]).sqrt()
    in_float32 = (1 - (1 - LINEAR.beta.float()).cumprod(0)).sqrt()
    assert relative_error(in_float32, want)[0] > 1e-5
    assert relative_error(at(want, torch.zeros(1000)), want).max() < 6e-8


def test_expm1_keeps_the_digits_of_a_small_variance():
    u = torch.logspace(-5, 0, 200)
    log_alpha_bar = -(0.1 * u + 19.9 * u**2 / 2)
    want = (-torch.expm1(log_alpha_bar.double())).sqrt()
    naive = relative_error((1 - log_alpha_bar.exp()).sqrt(), want)
    assert naive[:10].max() > 5e-3
    assert relative_error((-torch.expm1(log_alpha_bar)).sqrt(), want).max() < 1.2e-7


# ---------------------------------------------------------------- one step back


def test_nothing_comes_before_timestep_0():
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match='nothing comes before t=0'):
        posterior(LINEAR, x, x, torch.tensor([0]))
    with pytest.raises(ValueError, match='t must be in 1…1000, got 0'):
        shift_to_eps(LINEAR, torch.tensor([0]), x)


def test_the_denominator_of_bayes_rule():
    "The product of both densities integrates to q(x_t|x_0)."

    def gaussian(x, mean, variance):
        return (-((x - mean) ** 2) / (2 * variance)).exp() / (2 * math.pi * variance) ** 0.5

    schedule = Schedule.linear(20)
    now, before = schedule.alpha_bar[6], schedule.alpha_bar[5]
    beta = schedule.beta[5]
    grid = torch.linspace(-4, 4, 8001, dtype=F64)
    from_x0 = gaussian(grid, before.sqrt(), 1 - before)
    to_xt = gaussian(-0.5, (1 - beta).sqrt() * grid, beta)
    want = gaussian(-0.5, now.sqrt(), 1 - now)
    torch.testing.assert_close(torch.trapezoid(from_x0 * to_xt, grid), want, rtol=1e-12, atol=0)

    white = torch.ones(1, 1, dtype=F64)
    mean, variance = posterior(schedule, white, -0.5 * white, torch.tensor([6]))
    product = from_x0 * to_xt / want
    got = gaussian(grid, mean[0], variance[0])
    torch.testing.assert_close(product, got, rtol=0, atol=1e-12)


def test_the_ddim_step_is_diffae_eq_2():
    generator = torch.Generator().manual_seed(2)
    schedule, t = Schedule.linear(20), torch.tensor([6])
    now, before = schedule.alpha_bar[6], schedule.alpha_bar[5]
    x0 = torch.ones(4000, 1, dtype=F64)
    xt = add_noise(schedule, x0, t, torch.randn(4000, 1, generator=generator, dtype=F64))
    by_functions = add_noise(schedule, x0, t - 1, x0_to_eps(schedule, xt, t, x0))
    noise = (xt - now.sqrt() * x0) / (1 - now).sqrt()
    by_formula = before.sqrt() * x0 + (1 - before).sqrt() * noise
    torch.testing.assert_close(by_functions, by_formula, rtol=0, atol=1e-13)


def test_both_conversions_of_a_score_shift_the_posterior_mean():
    "`shift_to_eps` by variance times score, and `score_to_eps` by β/√α times score."
    t = torch.arange(1, 1001)
    generator = torch.Generator().manual_seed(3)
    xt, eps, score = torch.randn(3, 1000, 16, generator=generator, dtype=F64)

    def mean(eps):
        return posterior(LINEAR, eps_to_x0(LINEAR, xt, t, eps), xt, t)[0]

    def shift(to_eps):
        return mean(eps + to_eps(LINEAR, t, score)) - mean(eps)

    _, variance = posterior(LINEAR, xt, xt, t)
    torch.testing.assert_close(shift(shift_to_eps), variance * score, rtol=0, atol=1e-12)
    larger = at(LINEAR.beta / (1 - LINEAR.beta).sqrt(), xt) * score
    torch.testing.assert_close(shift(score_to_eps), larger, rtol=0, atol=1e-12)


# t -> -shift_to_eps of 1, and its ratio to -score_to_eps of 1 (PDAE Eqs 7 and 6)
COEFFICIENTS = {
    2: (0.0067430, 0.4547),
    6: (0.0233177, 0.7779),
    11: (0.0404516, 0.8637),
    51: (0.1671140, 0.9641),
    101: (0.3176906, 0.9811),
    301: (0.7729996, 0.9930),
    501: (0.9546525, 0.9941),
    701: (0.9894399, 0.9929),
    901: (0.9908062, 0.9909),
    1000: (0.9899287, 0.9899),
}


@pytest.mark.parametrize('t', COEFFICIENTS)
def test_the_two_coefficients_of_a_score(t):
    one = torch.full((1, 1), -1.0, dtype=F64)
    shift = shift_to_eps(LINEAR, torch.tensor([t]), one).item()
    score = score_to_eps(LINEAR, torch.tensor([t]), one).item()
    want_shift, want_ratio = COEFFICIENTS[t]
    assert abs(shift - want_shift) < 6e-8
    assert abs(shift / score - want_ratio) < 6e-5


def test_the_shift_at_timestep_1_is_0():
    one = torch.ones(1, 1, dtype=F64)
    assert shift_to_eps(LINEAR, torch.tensor([1]), one).item() == 0


# ---------------------------------------------------------------- timesteps


def test_timesteps_of_a_sampler():
    assert LINEAR.times(4) == [1000, 750, 500, 250, 0]
    assert LINEAR.times(range(0, 1000, 300)) == [0, 300, 600, 900]
    for steps in range(1, 1001):
        assert len(set(LINEAR.times(steps))) == steps + 1


@pytest.mark.parametrize(
    'steps, error, message',
    [
        (0, ValueError, 'steps must be in 1…1000, got 0'),
        (50.0, TypeError, 'float'),
        ([900, 300, 300, 0], ValueError, 'rise or fall strictly'),
        ([1200, 0], ValueError, 'times must be in 0…1000, got 0 … 1200'),
    ],
)
def test_timesteps_that_no_sampler_can_visit(steps, error, message):
    with pytest.raises(error, match=message):
        LINEAR.times(steps)


def test_random_timesteps_are_stratified_and_uniform():
    torch.manual_seed(0)
    samples = torch.stack([LINEAR.rand_t(8) for _ in range(20_000)])  # (20000, 8)
    strata = ((samples - 1) * 8 // 1000).sort(1).values
    assert strata.equal(torch.arange(8).expand(20_000, 8))
    counts = samples[:, 0].bincount(minlength=1001)[1:].float()  # of each timestep: 20 on average
    assert abs(counts.var() / 20 - 1) < 4 * (2 / 999) ** 0.5
    assert counts.min() > 0


def test_stratified_timesteps_vary_the_loss_of_a_batch_less():
    "For Gaussian data of variance 1, the smallest loss at timestep t is alpha_bar of t."
    torch.manual_seed(0)
    independent = LINEAR(torch.randint(1, 1001, (1000, 64))).mean(1)
    stratified = LINEAR(torch.stack([LINEAR.rand_t(64) for _ in range(1000)])).mean(1)
    assert independent.std() / stratified.std() > 8
    bias = stratified.mean() - LINEAR.alpha_bar[1:].mean()
    assert abs(bias) < 3 * stratified.std() / 1000**0.5
