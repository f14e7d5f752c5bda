"""ScoreVAE: Bayes' rule with an encoder, its bound, its second derivatives, its presets; and the VAE beside it"""

import json
from dataclasses import replace
import numpy as np
import pytest, torch
from torch import nn
from pdae_nb import scorevae
from pdae_nb.cli import main
from pdae_nb.data import load_images, to_signed
from pdae_nb.denoise import GaussianMixture
from pdae_nb.model import load_run
from pdae_nb.forward import Schedule, add_noise
from pdae_nb.guidance import grad_log
from pdae_nb.edit import between, edit, fit_probe
from pdae_nb.hub import decode, decoder_of, kind_of, learnt, reconstruct
from pdae_nb.solvers import em_step, heun, karras_times
from pdae_nb.sampling import sample
from pdae_nb.experiments.scorevae import CASES, compare_cases
from pdae_nb.methods.scorevae import PRESETS, Posterior, TimeEncoder, conditional_loss, kl_to_prior, prior_z, score, scorevae_denoiser, scorevae_loss
from pdae_nb.methods.vae import BetaVAE, vae_loss
from pdae_nb.weighting import w_bound, w_half
from pdae_nb.training import Recipe
from pdae_nb.hub import train
from pdae_nb.unet import UNet

SCHED = Schedule.linear()
tiny = dict(c=1, ch=8, mult=(1, 2), size=28, n_res=1, groups=8)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A DPM, ScoreVAE with either preset on it, and a VAE: minutes-old, from scikit-learn's digits"
    d = tmp_path_factory.mktemp('runs'); quiet = dict(log=lambda s: None); net = dict(ch=8, mult=(1, 2), n_res=1)
    dpm = train('digits_dpm', Recipe('digits', 28, net, 128, 16, 2e-3, 5, ema=.9), d/'dpm', **quiet); row = lambda **kw: Recipe('digits', 28, net | dict(z_dim=6) | kw, 128, 16, 2e-3, 5, ema=.9)
    return dict(dpm=dpm, release=train('digits_scorevae', row(dpm=str(dpm), preset='release'), d/'r', **quiet), paper=train('digits_scorevae', row(dpm=str(dpm), preset='paper', log_norm=False), d/'p', **quiet), vae=train('digits_vae', row(), d/'v', **quiet))

# ---- laws
class Wavy(Posterior):
    def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 6)).double()
    def moments(self, xt, t): return self.net(xt).chunk(2, 1)

class Exact(Posterior):
    "x_0 ~ N(0, std²), and z = a·x_0 + noise is a unit Gaussian: what x_t says of z, by the rule for joint Gaussians"
    def __init__(self, a, std): super().__init__(); self.a, self.v = a, std**2
    def moments(self, xt, t): ab = SCHED(t)[:, None]; cov, var = self.a*ab.sqrt()*self.v, ab*self.v + 1 - ab; return cov/var*xt, (1 - cov**2/var).log().expand_as(xt)

def test_the_pushes_of_all_codes_cancel_with_the_log_norm_and_not_without():
    torch.manual_seed(3); q, n = Wavy(), 300_000; x, t = torch.tensor([[.4, -.6]]).double().expand(n, 2), torch.ones(n, dtype=torch.long)
    with torch.no_grad(): z = q.dist(x, t).sample(); s, bare = (score(q, x, t, z, k) for k in (True, False))
    half = torch.func.grad(lambda o: q.moments(o, t[:1])[1].sum()/2)(x[:1])[0]; err = s.std(0)/n**.5
    assert (s.mean(0).abs() < 5*err).all() and (bare.mean(0) - half).abs().max() < 5*err.max() < half.abs().max()

@pytest.mark.parametrize('t', [1, 2, 50, 400, 999, 1000])
@pytest.mark.parametrize('a, std', [(.9, 1.), (.3, 2.), (1.9, .5)])
def test_the_exact_posterior_gives_the_exact_conditional_noise(t, a, std):
    world, q, v = GaussianMixture(torch.zeros(1, 3).double(), std, SCHED), Exact(a, std), std**2
    g = torch.Generator().manual_seed(0); xt, z = (torch.randn(20, 3, generator=g).double() for _ in range(2)); t = torch.full((20,), t); ab = SCHED(t)[:, None]
    exact = (1 - ab).sqrt()*(xt - ab.sqrt()*a*v*z)/(ab*(v - a**2*v**2) + 1 - ab)
    for keep in (True, False): np.testing.assert_allclose(scorevae_denoiser(world, q, z, SCHED, keep)(xt, t), exact, atol=1e-10)

def test_three_ways_to_the_score():
    torch.manual_seed(0); q = TimeEncoder(z_dim=5, attn=(14,), **tiny).double(); [nn.init.normal_(p, std=.1) for p in q.parameters()]
    x, t, z = torch.randn(4, 1, 28, 28).double(), torch.tensor([0, 3, 500, 1000]), torch.randn(4, 5).double(); (mu, lv), pull = torch.func.vjp(lambda o: q.moments(o, t), x)
    for keep in (True, False):
        a, b, (c,) = score(q, x, t, z, keep), grad_log(lambda o: q.log_p(o, t, z, keep), x), pull(((z - mu)*(-lv).exp(), ((z - mu)**2*(-lv).exp() - float(keep))/2))
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8); torch.testing.assert_close(a, c, atol=1e-10, rtol=1e-8)

def test_the_likelihood_weight_is_half_g2_on_the_score():
    t = torch.tensor([1, 10, 500, 1000]); ab, ab1 = SCHED(t), SCHED(t - 1)
    np.testing.assert_allclose(w_bound(SCHED, t)/1000, (1 - ab/ab1)/2/(1 - ab), rtol=1e-12); np.testing.assert_allclose(w_half(SCHED, t), .5)

def test_the_loss_is_its_parts():
    torch.manual_seed(0); q, dpm = TimeEncoder(z_dim=5, **tiny), UNet(**tiny); x0 = torch.rand(4, 1, 28, 28)*2 - 1; t, eps, xi = torch.tensor([1, 9, 500, 1000]), torch.randn(4, 1, 28, 28), torch.randn(4, 5)
    mu, lv = q.moments(x0, torch.zeros(4, dtype=torch.long)); z = mu + (lv/2).exp()*xi; xt = add_noise(SCHED, x0, t, eps)
    hat = dpm(xt, t) - (1 - SCHED(t)).sqrt().float()[:, None, None, None]*score(q, xt, t, z)
    want = w_bound(SCHED, t).float()*(hat - eps).square().flatten(1).sum(1) + .3*kl_to_prior(mu, lv)
    torch.testing.assert_close(scorevae_loss(dpm, q, x0, SCHED, .3, t=t, eps=eps, xi=xi, reduce=None), want, rtol=1e-4, atol=1e-3)
    unet = UNet(dz=5, z_shift=False, **tiny); [nn.init.normal_(p, std=.05) for p in unet.parameters()]; cond = conditional_loss(unet, q, x0, SCHED, .3, w_half, t=t, eps=eps, xi=xi, reduce=None)
    torch.testing.assert_close(cond, 392*(unet(xt, t, z) - eps).square().flatten(1).mean(1) + .3*kl_to_prior(mu, lv), rtol=1e-4, atol=1e-3)
    assert any(g is not None and g.any() for g in torch.autograd.grad(conditional_loss(unet, q, x0, SCHED, 0., w_half, t=t, eps=eps, xi=xi), list(q.parameters()), allow_unused=True))      # through z alone: it is reparametrised

# ---- second derivatives
@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('bf16', [False, True])
def test_every_weight_hears_of_the_loss(mode, bf16):
    torch.manual_seed(0); q, dpm = getattr(TimeEncoder(z_dim=5, attn=(14,), heads=2, **tiny).to(memory_format=torch.channels_last), mode)(), UNet(**tiny).requires_grad_(False)
    [nn.init.normal_(p, std=.1) for p in q.parameters()]; x0 = torch.rand(4, 1, 28, 28)*2 - 1; kept = x0.clone(); t = torch.tensor([1, 300, 600, 1000])
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = scorevae_loss(dpm, q, x0, SCHED, t=t)
    loss.backward(); assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters()) and all(p.grad is None for p in dpm.parameters())
    assert not x0.requires_grad and torch.equal(x0, kept) and torch.is_grad_enabled()

def test_the_frozen_dpm_leaves_no_graph():
    torch.manual_seed(0); q, dpm = TimeEncoder(z_dim=5, **tiny), UNet(**tiny).requires_grad_(False); seen = []
    dpm.register_forward_hook(lambda m, i, o: seen.append((i[0].requires_grad, o.requires_grad))); scorevae_loss(dpm, q, torch.rand(2, 1, 28, 28), SCHED).backward()
    assert seen == [(False, False)]

def test_grad_modes_stay_as_they_were():
    q, dpm = TimeEncoder(z_dim=5, **tiny), UNet(**tiny); x, t, z = torch.randn(2, 1, 28, 28), torch.tensor([5, 500]), torch.randn(2, 5)
    with torch.no_grad(): a = scorevae_denoiser(dpm, q, z, SCHED)(x, t); assert not a.requires_grad and not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and not x.requires_grad
    x.requires_grad_(); y = scorevae_denoiser(dpm, q, z, SCHED)(x, t); assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()           # differentiable in x, too

def test_compile_takes_the_whole_loss():
    torch.manual_seed(0); q, dpm = TimeEncoder(z_dim=3, **tiny), UNet(**tiny).requires_grad_(False); [nn.init.normal_(p, std=.1) for p in q.parameters()]
    x0, t, eps, xi = torch.rand(2, 1, 28, 28), torch.tensor([10, 700]), torch.randn(2, 1, 28, 28), torch.randn(2, 3)
    loss = lambda x0, t, eps, xi: scorevae_loss(dpm, q, x0, SCHED, t=t, eps=eps, xi=xi)
    a = loss(x0, t, eps, xi); ga = torch.autograd.grad(a, list(q.parameters())); b = torch.compile(loss, backend='aot_eager')(x0, t, eps, xi); gb = torch.autograd.grad(b, list(q.parameters()))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    for u, v in zip(ga, gb): torch.testing.assert_close(u, v, rtol=1e-3, atol=1e-3*float(u.abs().max() + 1e-6))

def test_a_frozen_prior_keeps_its_dropout_asleep(tmp_path):
    from pdae_nb.model import save_run
    save_run(tmp_path/'digits_dpm', dict(dpm=UNet(drop=.5, **tiny)), SCHED, {}); modes = []
    from pdae_nb.methods.scorevae import scorevae_task
    def task(r):
        t = scorevae_task(r); inner = t.loss_fn; t.loss_fn = lambda x, y: (modes.append((t.parts['dpm'].training, t.parts['enc'].training)), inner(x, y))[1]; return t
    train('digits_scorevae', Recipe('digits', 28, dict(dpm=str(tmp_path/'digits_dpm'), z_dim=4, ch=8, mult=(1, 2), n_res=1), 32, 16, 1e-3, ema=.9), tmp_path/'r', task, log=lambda s: None)
    assert set(modes) == {(False, True)}

# ---- the encoder at the door
@pytest.mark.parametrize('call, said', [
    (lambda q, x, t: q.moments(x, t + 1), 'times must be in 0…1000, got 1 … 1001'), (lambda q, x, t: q.moments(x, t - 1), r'times must be in 0…1000, got -1 … 999'), (lambda q, x, t: q(x*float('nan')), 'are NaN or infinite'),
    (lambda q, x, t: q(x[..., :20]), r'images \(B,1,28,28\), got \(2, 1, 28, 20\)'), (lambda q, x, t: q.log_p(x, t, torch.zeros(2, 4)), r'wants codes \(2,5\), got \(2, 4\)'), (lambda q, x, t: q.log_p(x, t, torch.zeros(3, 5)), r'wants codes \(2,5\), got \(3, 5\)'),
    (lambda q, x, t: TimeEncoder(z_dim=5, limit=0, **tiny), 'limit must be positive, or None'), (lambda q, x, t: karras_times(SCHED, 0), 'steps must be in 1…500'), (lambda q, x, t: em_step(SCHED, x, t, t, x, eta=1.), 'clips nothing')])
def test_bad_input_is_named(call, said):
    q, x, t = TimeEncoder(z_dim=5, **tiny), torch.rand(2, 1, 28, 28), torch.tensor([0, 1000])
    with pytest.raises(ValueError, match=said): call(q, x, t)

def test_the_variance_is_bounded_softly():
    q = TimeEncoder(z_dim=5, **tiny); x, t = torch.randn(3, 1, 28, 28), torch.tensor([0, 10, 900])
    for scale, at_most in ((1e3, 6.), (1e-3, .1)):
        with torch.no_grad(): q.head.weight.normal_(std=scale)
        lv = q.moments(x, t)[1]; assert lv.abs().max() <= at_most + 1e-6
    free = TimeEncoder(z_dim=5, limit=None, **tiny)
    with torch.no_grad(): free.head.weight.normal_(std=1e3); assert free.moments(x, t)[1].abs().max() > 100

# ---- samplers and presets
def test_presets_say_what_the_two_programs_do():
    assert (PRESETS['paper']['beta'], PRESETS['paper']['weight'], PRESETS['release']['beta'], PRESETS['release']['weight']) == (.01, w_bound, 1e-3, w_half)
    calls = []; count = lambda x, t: (calls.append(int(t[0])), .1*x)[1]; xT = torch.randn(2, 3)
    for k, n, last in (('paper', 1000, 1), ('release', 255, 1)): calls.clear(); PRESETS[k]['decode'](count, xT, SCHED); assert (len(calls), calls[-1]) == (n, last)

def test_heun_is_second_order():
    blobs = GaussianMixture(torch.tensor([[-1.2, -.7], [1.2, -.4], [-.1, 1.1]]).double(), .3, SCHED); xT = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double()
    def off(n, f): ts = list(range(1000, -1, -1000//n)); return (sample(f(ts), xT, SCHED, ts) - sample(blobs, xT, SCHED, 1000)).norm(dim=1).mean()
    assert off(50, lambda ts: heun(blobs, SCHED, ts)) < .75*off(100, lambda ts: blobs) and off(100, lambda ts: heun(blobs, SCHED, ts)) < .4*off(50, lambda ts: heun(blobs, SCHED, ts))

def test_euler_maruyama_keeps_a_gaussian():
    torch.manual_seed(0); g = GaussianMixture(torch.zeros(1, 1).double(), .5, SCHED); x = sample(g, torch.randn(4000, 1).double(), SCHED, 1000, solver=em_step)
    assert abs(x.std() - .5) < .03 and abs(x.mean()) < .04

# ---- the study
def test_cases_are_compared_once(tmp_path, monkeypatch):
    "every row is kept, the same call measures nothing again, other seeds do not overwrite"
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path)); monkeypatch.setattr(scorevae, 'CASES', {k: CASES[k] for k in ('release', 'paper', 'conditional decoder', 'VAE, β = 1')})
    path, said = tmp_path/'cases.json', []; d = compare_cases(path, 'smoke', (0,), log=said.append); assert len(said) == 8 and len(d['runs']) == 4 and set(d['priors']) == {f'{k} 0' for k in ('own', 'half', 'twice', 'twice, trained on it')}
    assert d['priors']['own 0']['mse_random'] == d['runs']['release 0']['mse_random'] != d['priors']['twice 0']['mse_random'] and d['dpm']['twice']['images'] == 2*d['dpm']['own']['images'] and 'bound' not in d['runs']['VAE, β = 1 0']
    for i, (k, (what, _)) in enumerate(scorevae.CASES.items()):        # the loss on the way is the trainer's own
        last = json.loads((tmp_path/f'runs/mnist14_{what}-smoke-0-{i}/log.jsonl').read_text().splitlines()[-1]); assert d['runs'][f'{k} 0']['curve'][-1] == [last['seen'], last['loss']]
    assert compare_cases(path, 'smoke', (0,), log=said.append) == d and len(said) == 8
    path.write_text(json.dumps(d | dict(runs=d['runs'] | {f'{k} {s}': {} for k in CASES for s in (1, 2)})))
    for seeds, what in (((0,), f'holds {4 + 2*len(CASES)} runs, 1 seeds would give 4'), ((), '0 seeds would give 0')):
        with pytest.raises(ValueError, match=what): compare_cases(path, 'smoke', seeds)
    path.write_text('[]')
    with pytest.raises(ValueError, match='holds no comparison of cases'): compare_cases(path, 'smoke', (0,))

@pytest.mark.parametrize('task', [scorevae.scorevae_task, scorevae.conditional_task])
def test_prices(runs, task):
    row = Recipe('digits', 28, dict(ch=8, mult=(1, 2), n_res=1, z_dim=4) | (dict(dpm=str(runs['dpm'])) if task is scorevae.scorevae_task else {}), 32, 16, 1e-3); x = to_signed(load_images('digits', 'train', 28).x[:4])
    def loss(**kw): torch.manual_seed(0); t = task(replace(row, net=row.net | kw)); torch.manual_seed(1); return t.loss_fn(x, None)[0].sum().item()
    base, dear, paper = loss(), loss(beta=1.), loss(preset='paper', beta=1e-3); assert dear > base != paper
    with pytest.raises(ValueError, match="preset must be one of paper, release, pdae, got 'papr'"): loss(preset='papr')

def test_too_few_to_judge_by(monkeypatch):
    monkeypatch.setattr(scorevae, 'load_images', lambda *a, real=scorevae.load_images: real(*a)[:19])
    with pytest.raises(ValueError, match='digits has 19 test images; at least 20'): scorevae.vae_task(Recipe('digits', 28, dict(ch=8, mult=(1, 2), n_res=1, z_dim=4), 32, 16, 1e-3))

# ---- runs
def test_runs_know_what_they_are(runs):
    r, v = load_run(runs['release']), load_run(runs['vae']); x0 = torch.rand(3, 1, 28, 28)*2 - 1
    assert [kind_of(o) for o in (r, v)] == ['ScoreVAE', 'VAE'] and learnt(r) == sum(p.numel() for p in r.enc.parameters()) and v.enc is v.vae.enc
    with torch.no_grad():
        for o in (r, v): torch.testing.assert_close(decoder_of(o, x0)(x0, torch.full((3,), 500)), decode(o, o.enc(x0))(x0, torch.full((3,), 500)), atol=1e-5, rtol=1e-5)
        for steps in (1, 5): torch.testing.assert_close(sample(decoder_of(v, x0), torch.randn_like(x0), v.sched, steps), v.vae(x0), atol=1e-4, rtol=1e-3)
    seen, back = reconstruct(x0, r, 2); walk = between(r, x0[:1], x0[1:2], [0, .5, 1], 2); assert torch.equal(seen, x0) and not torch.equal(back, x0)
    torch.testing.assert_close(walk[0], back[:1], atol=1e-2, rtol=1e-2); assert walk.shape == (3, 1, 1, 28, 28) and not torch.allclose(walk[0], walk[1])
    z = torch.randn(40, 6); pushed = edit(v, x0, fit_probe(z, z[:, 0] > 0), [0., .2], 2); torch.testing.assert_close(pushed[0], v.vae(x0).detach(), atol=1e-3, rtol=1e-3); assert not torch.allclose(pushed[1], pushed[0])
    assert load_run(runs['paper']).recipe['net']['log_norm'] is False and torch.equal(prior_z(r.enc, 4, 1), prior_z(r.enc, 4, 1)) and not torch.equal(prior_z(r.enc, 4, 1), prior_z(r.enc, 4, 2))

def test_the_vae_loss():
    torch.manual_seed(0); vae, x0, xi = BetaVAE(z_dim=5, **tiny), torch.rand(3, 1, 28, 28)*2 - 1, torch.randn(3, 5); mu, lv = vae.enc.moments(x0, torch.zeros(3, dtype=torch.long)); back = vae.dec(mu + (lv/2).exp()*xi)
    torch.testing.assert_close(vae_loss(vae, x0, .5, xi=xi), ((x0 - back).square().flatten(1).sum(1)/2 + .5*kl_to_prior(mu, lv)).mean())
    assert any(g is not None and g.any() for g in torch.autograd.grad(vae_loss(vae, x0, 0., xi=xi), list(vae.enc.parameters()), allow_unused=True))          # through z alone: it is reparametrised
    with pytest.raises(ValueError, match='wants codes'): vae.enc.log_p(x0, torch.zeros(3, dtype=torch.long), torch.zeros(3, 4))

def test_from_the_shell(runs, tmp_path, capsys):
    for k in ('release', 'vae'):
        assert main(['sample', str(runs[k]), '--n', '3', '--steps', '2', '--out', str(tmp_path/f'{k}.png')]) == 0 and (tmp_path/f'{k}.png').exists()
        assert main(['reconstruct', str(runs[k]), '--n', '2', '--steps', '2', '--out', str(tmp_path/f'{k}2.png')]) == 0
    assert main(['sample', str(runs['vae']), '--label', '3']) == 1 and 'takes no --label' in capsys.readouterr().err
