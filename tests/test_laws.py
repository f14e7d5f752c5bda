"""The laws of the interface, in float64, on a mixture whose every answer can be written down."""
import pytest, torch
from pdae_nb.denoise import GaussianMixture, denoising_loss, loss_curve, predict_x0
from pdae_nb.gap import gap_curve, gap_factor, posterior_gap
from pdae_nb.guidance import classifier_guided, grad_log, guided, stage_accuracy, stage_grid
from pdae_nb.forward import Schedule, add_noise, at, eps_to_x0, posterior, score_to_eps, shift_to_eps, x0_to_eps
from pdae_nb.sample import belm_step, ddim_step, dpmpp_step, invert, invert_exactly, sample, trajectory

SCHED = Schedule.linear()
TIMES = [1, 2, 5, 50, 300, 700, 1000]
f64 = dict(dtype=torch.float64)

@pytest.fixture
def gm():
    torch.manual_seed(0)
    return GaussianMixture(torch.tensor([[.8, .6], [-.9, .3], [.1, -1.]], **f64), .15, SCHED)

def noisy(gm, t, n=200):
    x0, y = gm.sample(n); t = torch.full((n,), t)
    eps = torch.randn_like(x0)
    return x0, y, t, eps, add_noise(SCHED, x0, t, eps)

@pytest.mark.parametrize('t', TIMES)
def test_bayes_rule_for_scores(gm, t):
    "eps + score_to_eps(grad log p(y|x_t)) is the exact conditional eps"
    _, y, t, _, xt = noisy(gm, t)
    one = guided(lambda xt, t: (gm(xt, t), grad_log(lambda x: gm.log_p(x, t, y), xt)), SCHED)
    for f in (one, classifier_guided(gm, gm, y, SCHED)): torch.testing.assert_close(f(xt, t), gm(xt, t, y), rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('window', [(0, 1), (0, 1000), (300, 700), (999, 1000)])
def test_guidance_acts_in_its_window_and_nowhere_else(gm, window):
    x0, y, _, eps, _ = noisy(gm, 1, 50)
    asked = []
    both = lambda xt, t: asked.append(t) or (gm(xt, t), grad_log(lambda x: gm.log_p(x, t, y), xt))
    f = guided(both, SCHED, window=window, unguided=gm)
    for t in (1, 2, 300, 301, 700, 701, 999, 1000):
        tt = torch.full((50,), t); xt = add_noise(SCHED, x0, tt, eps)
        inside = window[0] < t <= window[1]; before = len(asked)
        torch.testing.assert_close(f(xt, tt), gm(xt, tt, y) if inside else gm(xt, tt), rtol=1e-9, atol=1e-9)
        assert (len(asked) > before) == inside, 'the score is computed inside the window, and only there'
    t = torch.arange(1, 51)*20; xt = add_noise(SCHED, x0, t, eps)           # and sample by sample in one batch
    want = torch.where(((window[0] < t) & (t <= window[1]))[:, None], gm(xt, t, y), gm(xt, t))
    torch.testing.assert_close(f(xt, t), want, rtol=1e-9, atol=1e-9)

def test_a_score_leaves_the_caller_alone(gm):
    _, y, t, _, xt = noisy(gm, 500)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            before = torch.is_grad_enabled(), xt.requires_grad
            score = grad_log(lambda x: gm.log_p(x, t, y), xt)
            assert (torch.is_grad_enabled(), xt.requires_grad) == before
            assert score.requires_grad == (mode is torch.enable_grad)        # differentiable in a loss, without a graph in a sampler
    temper = torch.ones((), **f64, requires_grad=True)
    grad_log(lambda x: temper*gm.log_p(x, t, y), xt).square().sum().backward()
    torch.testing.assert_close(temper.grad, 2*score.square().sum())          # d/da (a·score)² at a = 1: a second derivative

@pytest.mark.parametrize('eta', [0., 1.])
def test_shared_beginnings_change_nothing(gm, eta):
    "every window of the grid equals mixed sampling from the start, draw for draw"
    y, xT = torch.arange(60) % 3, torch.randn(60, 2, **f64)
    kw = dict(step=250, substeps=5, eta=eta, clip=None, scale=2.)
    judge = lambda x: -torch.cdist(x, gm.mu)
    cells = stage_grid(gm, gm, judge, xT, y, SCHED, **kw)
    assert len(cells) == 11
    for w in cells:
        if w != (0, 0): assert torch.equal(cells[w], stage_accuracy(gm, gm, judge, xT, y, SCHED, window=w, **kw))

@pytest.mark.parametrize('t', TIMES)
def test_posterior_mean_from_eps_is_the_textbook_one(gm, t):
    "mu~(x_t, x0_hat(eps)) = (x_t - beta/sqrt(1-ab) eps)/sqrt(alpha)"
    _, _, t, _, xt = noisy(gm, t)
    eps, a, ab = gm(xt, t), SCHED(t)/SCHED(t - 1), SCHED(t)
    want = (xt - at((1 - a)/(1 - ab).sqrt(), xt)*eps)/at(a.sqrt(), xt)
    torch.testing.assert_close(posterior(SCHED, eps_to_x0(SCHED, xt, t, eps), xt, t)[0], want, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('t', TIMES)
def test_shift_moves_the_posterior_mean_by_variance_times_score(gm, t):
    _, _, t, _, xt = noisy(gm, t)
    eps, score = gm(xt, t), torch.randn_like(xt)
    mean = lambda e: posterior(SCHED, eps_to_x0(SCHED, xt, t, e), xt, t)
    (before, var), (after, _) = mean(eps), mean(eps + shift_to_eps(SCHED, t, score))
    torch.testing.assert_close(after - before, var*score, rtol=1e-7, atol=1e-10)

@pytest.mark.parametrize('t', TIMES)
def test_ddim_with_eta_1_is_ddpm(gm, t):
    "one step of eta=1 to t-1 has the posterior's mean and variance"
    _, _, t, _, xt = noisy(gm, t)
    eps = gm(xt, t)
    torch.manual_seed(1); xs, x0 = ddim_step(SCHED, xt, t, t - 1, eps, eta=1.)
    torch.manual_seed(1); noise = torch.randn_like(xt)
    mean, var = posterior(SCHED, x0, xt, t)
    torch.testing.assert_close(xs, mean + var.sqrt()*noise, rtol=1e-8, atol=1e-8)

def test_t0_is_clean(gm):
    x0, _, _, eps, _ = noisy(gm, 1)
    assert torch.equal(add_noise(SCHED, x0, torch.zeros(len(x0), dtype=torch.int64), eps), x0)

@pytest.mark.parametrize('t', TIMES)
def test_a_denoiser_that_knows_x0_has_no_gap(gm, t):
    x0, _, t, eps, xt = noisy(gm, t)
    oracle = lambda xt, t: x0_to_eps(SCHED, xt, t, x0)
    assert posterior_gap(oracle, x0, SCHED, t, eps).max() < 1e-18
    assert denoising_loss(oracle, x0, SCHED, t=t, eps=eps) < 1e-18

@pytest.mark.parametrize('t', TIMES)
def test_gap_and_loss_are_one_measurement(gm, t):
    x0, _, t, eps, _ = noisy(gm, t)
    loss = denoising_loss(gm, x0, SCHED, t=t, eps=eps, reduce=None)
    torch.testing.assert_close(posterior_gap(gm, x0, SCHED, t, eps), 2*gap_factor(SCHED, t)*loss, rtol=1e-8, atol=1e-14)

@pytest.mark.parametrize('bad', [[0], [5, 0], [-3], [1001]])
def test_no_gap_where_there_is_no_step(gm, bad):
    "the error says what came, and what was wanted"
    want = '1…1000' if 0 in bad else '…1000'
    with pytest.raises(ValueError, match=rf't must be in .*{want}, got .*{bad[-1]}'): gap_factor(SCHED, torch.tensor(bad))
    with pytest.raises(ValueError, match=rf't must be in .*{want}, got .*{bad[-1]}'): gap_curve(gm, gm.sample(4)[0], SCHED, bad)
    with pytest.raises(TypeError, match='int64'): gap_factor(SCHED, torch.tensor([.5]))

@pytest.mark.parametrize('bs', [1, 7, 30, 45, 10_000])
def test_no_pass_is_larger_than_asked_for(gm, bs):
    "whatever the size of a pass: the same losses, in the same order, each sample with its own label and noise"
    x0, y = gm.sample(30); ts, sizes, told = [1, 300, 700], [], []
    def noted(xt, t, y): sizes.append(len(xt)); told.append(y); return gm(xt, t, y)
    got = loss_curve(noted, x0, SCHED, ts, y=y, bs=bs)
    assert max(sizes) <= bs and sum(sizes) == 90 and torch.equal(torch.cat(told), y.repeat(3))
    torch.testing.assert_close(got, loss_curve(lambda xt, t: gm(xt, t, y), x0, SCHED, ts, bs=30), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got, torch.stack([denoising_loss(lambda xt, t: gm(xt, t, y), x0, SCHED, t=torch.full((30,), t),
        eps=torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), **f64), reduce=None) for t in ts]), rtol=1e-12, atol=1e-15)

def test_the_label_narrows_the_gap_at_every_t(gm):
    x0, y = gm.sample(20_000)
    gaps = [(u.mean(), c.mean()) for u, c in zip(gap_curve(gm, x0, SCHED, TIMES[1:]), gap_curve(gm, x0, SCHED, TIMES[1:], y=y))]
    assert all(cond <= uncond*(1 + 1e-9) for uncond, cond in gaps)
    assert any(cond < .5*uncond for uncond, cond in gaps)

@pytest.mark.parametrize('solver', [ddim_step, dpmpp_step], ids=lambda f: f.__name__)
def test_inversion_comes_back_the_better_the_more_steps(gm, solver):
    x0, _ = gm.sample(300)
    err = [(sample(gm, invert(gm, x0, SCHED, n, solver=solver), SCHED, n, solver=solver) - x0).square().mean().sqrt() for n in (20, 100, 500)]
    assert err[0] > 1.5*err[1] > 2*err[2]

@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize('steps', [2, 10, 100])
def test_exact_inversion_loses_only_rounding(gm, steps, dtype, tol):
    x0 = gm.sample(300)[0].to(dtype)
    back = sample(gm, invert_exactly(gm, x0, SCHED, steps), SCHED, steps, solver=belm_step)
    assert (back - x0).abs().max() < tol
    ddim = sample(gm, invert(gm, x0, SCHED, steps), SCHED, steps)
    assert (ddim - x0).abs().max() > 100*tol

@pytest.fixture(scope='module')
def ode():
    "The probability-flow ODE from one noise down to a small t: its end, and what each number of steps makes of it"
    sched = Schedule.vp_sde(2**12); T, lo = sched.T, 30
    gm = GaussianMixture(torch.tensor([[.8, .6], [-.9, .3], [.1, -1.]], **f64), .15, sched)
    xT = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), **f64)
    lam = (sched.alpha_bar/(1 - sched.alpha_bar)).log()
    def grid(n):   # evenly in log SNR
        want = torch.linspace(lam[T], lam[lo], n + 1, **f64)
        return sorted({int((lam[1:] - w).abs().argmin()) + 1 for w in want}, reverse=True)
    exact = sample(gm, xT, sched, list(range(T, lo - 1, -1)), solver=dpmpp_step)
    return lambda solver, n: (sample(gm, xT, sched, grid(n), solver=solver) - exact).abs().mean().log2().item()

@pytest.mark.parametrize('solver, order', [(ddim_step, 1), (dpmpp_step, 2), (belm_step, 2)], ids=lambda o: getattr(o, '__name__', o))
def test_order_of_convergence(solver, order, ode):
    "four times the steps, 4^order times the accuracy"
    assert abs((ode(solver, 32) - ode(solver, 128))/2 - order) < .3

def test_samples_follow_the_mixture(gm):
    x = sample(gm, torch.randn(4000, 2, **f64), SCHED, 200)
    d = (x[:, None] - gm.mu).norm(dim=-1)
    share = d.argmin(1).bincount(minlength=3)/len(x)
    assert (share - 1/3).abs().max() < .05
    near = x - gm.mu[d.argmin(1)]
    assert abs(near.std().item()/gm.std - 1) < .1

def test_latents_and_images_take_the_same_road(gm):
    "the same numbers, whether a batch is (B,4) or (B,1,2,2)"
    eps = lambda xt, t: .3*xt + at(SCHED(t), xt)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for f in (lambda x: sample(eps, x, SCHED, 10), lambda x: invert(eps, x, SCHED, 10), lambda x: invert_exactly(eps, x, SCHED, 10).xT):
        assert torch.equal(f(x), f(x.reshape(5, 1, 2, 2)).reshape(5, 4))

def test_the_exact_denoiser_cannot_be_beaten(gm):
    x0, _ = gm.sample(5000)
    ts = [20, 300, 800]
    best = loss_curve(gm, x0, SCHED, ts).mean(1)
    for other in (lambda xt, t: gm(xt, t) + .05, lambda xt, t: 1.1*gm(xt, t), lambda xt, t: torch.zeros_like(xt)):
        assert (loss_curve(other, x0, SCHED, ts).mean(1) > best).all()

def test_a_trajectory_names_where_it_lands(gm):
    path = list(trajectory(gm, torch.randn(3, 2, **f64), SCHED, 4))
    assert [s for s, _, _ in path] == [750, 500, 250, 0]
    torch.testing.assert_close(path[-1][1], path[-1][2])   # at t=0 the state is the predicted x_0
