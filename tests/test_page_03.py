"""Samplers: what page 3 of the course does not show, such as errors and odd inputs."""

import io
import math

import pytest
import torch
from PIL import Image

from pdae_nb.data import mnist_test_images, to_signed
from pdae_nb.denoise import GaussianMixture
from pdae_nb.forward import Schedule, add_noise, posterior
from pdae_nb.plot import animation
from pdae_nb.sampling import Pair, Past, ddim_step, invert, restored, sample, trajectory
from pdae_nb.solvers import belm_step, dpmpp_step, em_step

SCHED = Schedule.linear()
STD = 0.15
F64 = torch.float64


def rms(difference):
    return difference.square().mean().sqrt().item()


@pytest.fixture
def blobs():
    angle = torch.arange(5, dtype=F64) * 2 * math.pi / 5
    return GaussianMixture(torch.stack([angle.cos(), angle.sin()], 1), STD, SCHED)


@pytest.fixture
def x0(blobs):
    clean, _ = blobs.sample(1000, torch.Generator().manual_seed(0))
    return clean


@pytest.fixture
def noise():
    return torch.randn(1000, 2, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.fixture
def digits():
    "256 images as the means of a mixture."
    centres = to_signed(mnist_test_images().x[:256]).flatten(1)
    return GaussianMixture(centres, 0.1, SCHED)


def full(t, n=1000):
    return torch.full((n,), t)


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize('s', [0, 100, 499, 501, 1000])
def test_a_step_with_the_true_noise_is_the_forward_process(x0, noise, s):
    xt = add_noise(SCHED, x0, full(500), noise)
    xs, _ = ddim_step(SCHED, xt, full(500), full(s), noise)
    torch.testing.assert_close(xs, add_noise(SCHED, x0, full(s), noise), rtol=0, atol=1e-13)


def test_a_step_is_the_equation_of_the_papers(blobs, noise):
    t = full(500)
    eps = blobs(noise, t)
    alpha_bar, alpha_bar_s = SCHED.alpha_bar[[500, 400]]
    x0_hat = (noise - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    expected = alpha_bar_s.sqrt() * x0_hat + (1 - alpha_bar_s).sqrt() * eps
    xs, predicted = ddim_step(SCHED, noise, t, t - 100, eps)
    torch.testing.assert_close(xs, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(predicted, x0_hat, rtol=0, atol=1e-13)


def test_clipping_keeps_the_state(blobs, noise):
    "The noise is computed again, so that the clipped prediction and the noise still make x_t."
    t = full(500)
    eps = blobs(noise, t)
    same, clipped = ddim_step(SCHED, noise, t, t, eps, clip=0.5)
    torch.testing.assert_close(same, noise, rtol=0, atol=1e-13)
    _, unclipped = ddim_step(SCHED, noise, t, t, eps)
    assert clipped.abs().max() == 0.5 < unclipped.abs().max()


@pytest.mark.parametrize(('eta', 's'), [(1.0, 499), (0.6, 400)])
def test_new_noise(blobs, noise, eta, s):
    t = full(500)
    eps = blobs(noise, t)
    new = torch.randn(1000, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    xs, x0_hat = ddim_step(SCHED, noise, t, full(s), eps, eta=eta, noise=lambda xt: new)
    alpha_bar, alpha_bar_s = SCHED.alpha_bar[[500, s]]
    sigma = eta * ((1 - alpha_bar_s) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_s)).sqrt()
    old = (1 - alpha_bar_s - sigma**2).sqrt() * eps
    expected = alpha_bar_s.sqrt() * x0_hat + old + sigma * new
    torch.testing.assert_close(xs, expected, rtol=0, atol=1e-13)
    if eta == 1:  # DDPM
        mean, variance = posterior(SCHED, x0_hat, noise, t)
        torch.testing.assert_close(xs, mean + variance.sqrt() * new, rtol=0, atol=1e-13)


def test_new_noise_is_of_the_global_generator(blobs, noise):
    t = full(500)
    eps = blobs(noise, t)
    torch.manual_seed(0)
    new = torch.randn_like(noise)
    torch.manual_seed(0)
    by_default, _ = ddim_step(SCHED, noise, t, t - 1, eps, eta=1.0)
    given, _ = ddim_step(SCHED, noise, t, t - 1, eps, eta=1.0, noise=lambda xt: new)
    assert torch.equal(by_default, given)


# ---------------------------------------------------------------- the loop


def test_the_loop_is_the_step_repeated(digits):
    xT = torch.randn(8, 784, generator=torch.Generator().manual_seed(0))
    timesteps = SCHED.times(50)
    states = list(trajectory(digits, xT, SCHED, 50))
    assert [s for s, _, _ in states] == timesteps[1:]
    x = xT
    for t, s in zip(timesteps, timesteps[1:], strict=False):
        alpha_bar, alpha_bar_s = SCHED.alpha_bar[t], SCHED.alpha_bar[s]
        eps = digits(x, full(t, 8))
        x0_hat = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        x = alpha_bar_s.sqrt() * x0_hat + (1 - alpha_bar_s).sqrt() * eps
    _, last, predicted = states[-1]
    torch.testing.assert_close(last, x, rtol=0, atol=2e-3)
    assert torch.equal(last, predicted)  # at s=0 the state is the prediction
    assert torch.equal(sample(digits, xT, SCHED, 50), last)
    nearest = torch.cdist(x, digits.mu).min(1).values
    assert (nearest / 784**0.5 < 0.11).all()  # each sample is one of the images, with noise of 0.1


def test_timesteps_may_be_an_iterator_and_a_batch_may_be_empty(digits):
    xT = torch.randn(2, 784, generator=torch.Generator().manual_seed(0))
    by_iterator = sample(digits, xT, SCHED, iter([1000, 400, 0]))
    assert torch.equal(by_iterator, sample(digits, xT, SCHED, [1000, 400, 0]))
    assert sample(digits, xT[:0], SCHED, 2).shape == (0, 784)


def test_samples_have_the_width_and_the_shares_of_the_data(blobs):
    xT = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    for eta in (0.0, 1.0):
        torch.manual_seed(0)
        distance, nearest = torch.cdist(sample(blobs, xT, SCHED, 500, eta), blobs.mu).min(1)
        shares = nearest.bincount(minlength=5) / 2000
        assert (shares - 0.2).abs().max() < 4 * (0.2 * 0.8 / 2000) ** 0.5  # four standard errors
        width = (distance.square().mean() / 2).sqrt().item()
        assert abs(width - STD) < (0.01 if eta else 4 * STD / (4 * 2000) ** 0.5)


def test_one_step_returns_the_mean_of_the_data(blobs, noise):
    assert sample(blobs, noise, SCHED, 1).norm(dim=1).max() < 0.05  # the mean is 0


def first(denoiser, *args, **kw):
    return next(trajectory(denoiser, *args, **kw))


def test_errors_of_the_loop(blobs, noise, x0):
    with pytest.raises(TypeError, match='got torch.int64'):
        first(blobs, noise.long(), SCHED)
    with pytest.raises(ValueError, match='2000 of 2000 values are NaN'):
        first(blobs, noise * float('nan'), SCHED)
    with pytest.raises(ValueError, match=r'returned shape \(1000, 1\) for \(1000, 2\)'):
        first(lambda x, t: x[:, :1], noise, SCHED)
    with pytest.raises(TypeError, match='must return a tensor, got NoneType'):
        first(lambda x, t: None, noise, SCHED)
    with pytest.raises(ValueError, match='clip must be'):
        first(blobs, x0, SCHED, [0, 500, 1000], clip=1.0)
    with pytest.raises(ValueError, match='eta must be'):
        first(blobs, x0, SCHED, [0, 500, 1000], eta=1.0)
    with pytest.raises(ValueError, match='strictly'):
        trajectory(blobs, noise, SCHED, [5, 5])  # at the call, before the first step


# ---------------------------------------------------------------- a pair of states


def test_a_pair_is_a_start_for_belm(blobs, noise, x0):
    xt = add_noise(SCHED, x0, full(500), noise)
    eps = blobs(xt, full(500))
    past = Past(full(1000), noise, None)
    expected, _ = belm_step(SCHED, xt, full(500), full(0), eps, past=past)
    assert torch.equal(sample(blobs, Pair(noise, xt), SCHED, 2, solver=belm_step), expected)


def test_errors_of_a_pair(blobs, noise):
    pair = Pair(noise, noise)
    with pytest.raises(ValueError, match='at least 2 steps'):
        trajectory(blobs, pair, SCHED, 1, solver=belm_step)
    with pytest.raises(ValueError, match=r'\(1000, 2\) and \(1, 2\)'):
        trajectory(blobs, Pair(noise, noise[:1]), SCHED, solver=belm_step)
    with pytest.raises(TypeError, match='got torch.int64'):
        trajectory(blobs, Pair(noise, noise.long()), SCHED, solver=belm_step)
    with pytest.raises(ValueError, match='a tuple of 3'):
        trajectory(blobs, (noise, noise, noise), SCHED, solver=belm_step)
    with pytest.raises(ValueError, match='got the solver `ddim_step`'):
        trajectory(blobs, pair, SCHED, 2)
    for solver in (dpmpp_step, em_step):
        with pytest.raises(ValueError, match='not from a Pair'):
            sample(blobs, pair, SCHED, 2, solver=solver)


# ---------------------------------------------------------------- inversion


@pytest.mark.parametrize('steps', [[1000, 500, 0], [0, 500, 1000], 2])
def test_inversion_is_the_step_with_rising_timesteps(blobs, x0, steps):
    "The denoiser is called with t=1 at t=0."
    alpha_bar, alpha_bar_T = SCHED.alpha_bar[[500, 1000]]
    x500 = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * blobs(x0, full(1))
    eps = blobs(x500, full(500))
    x0_hat = (x500 - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    xT = alpha_bar_T.sqrt() * x0_hat + (1 - alpha_bar_T).sqrt() * eps
    torch.testing.assert_close(invert(blobs, x0, SCHED, steps), xT, rtol=0, atol=1e-13)


def test_the_error_of_inversion_falls_with_the_steps_but_not_if_it_clips(blobs, x0):
    def error(n):
        return rms(sample(blobs, invert(blobs, x0, SCHED, n), SCHED, n) - x0)

    def clipped_error(n):
        rising = [1, *SCHED.times(n)[-2::-1]]
        *_, (_, xT, _) = trajectory(blobs, x0, SCHED, rising, clip=1.0)
        return rms(sample(blobs, xT, SCHED, n, clip=1.0) - x0)

    assert abs(math.log(error(100) / error(500), 5) - 1) < 0.1
    assert clipped_error(500) > 10 * error(500)
    assert clipped_error(500) > 0.8 * clipped_error(100)


def test_other_steps_invert_too(blobs, x0):
    assert invert(blobs, x0, SCHED, 20, solver=dpmpp_step).isfinite().all()


def test_restored_decodes_an_inferred_or_a_random_noise(digits):
    clean, _ = digits.sample(3, torch.Generator().manual_seed(1))
    inferred = restored(digits, clean, SCHED, 50)
    assert torch.equal(inferred, sample(digits, invert(digits, clean, SCHED, 50), SCHED, 50))
    xT = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    random = restored(digits, clean, SCHED, 50, seed=0)
    assert torch.equal(random, sample(digits, xT, SCHED, 50, clip=1.0))
    assert rms(inferred - clean) < 0.1 < rms(random - clean)


# ---------------------------------------------------------------- the figure


def test_frames_of_an_animation_share_a_palette():
    "Then what stands still is equal in all frames, and the file is small."
    import matplotlib.pyplot as plt

    def draw(t):
        fig, ax = plt.subplots(figsize=(3, 2), layout='none')
        ax.imshow(torch.linspace(0, 1, 40).outer(torch.linspace(0, 1, 40)), cmap='viridis')
        ax.plot([0, t], [0, 39], color='red')
        return fig

    moving = Image.open(io.BytesIO(animation(draw, [0, 10, 20, 30]).webp()))
    colours = set()
    for number in range(moving.n_frames):
        moving.seek(number)
        colours |= {colour for _, colour in moving.convert('RGBA').getcolors(1 << 20)}
    assert len(colours) <= 256
