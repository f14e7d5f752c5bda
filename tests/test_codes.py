"""Diff-AE and the DPM over codes, end to end at toy size: resume, shipping, codes computed once, edits, few labels, bad input."""
import subprocess, sys
from dataclasses import replace
import pytest, torch
from pdae_nb.data import Images, batches, digits, to_signed
from pdae_nb.diffae import SemanticEncoder, coded_mse, diffae_denoiser, diffae_loss, held_out, images_to_reach, looks
from pdae_nb.files import Stopped, fingerprint, load_run
from pdae_nb.forward import Schedule
from pdae_nb.latent import MLPSkipNet, Probe, ZStats, accept, attribute, between, draw, edit, encode_all, fit_probe, lerp, move, oversample, sample_z, slerp, to_median
from pdae_nb.pdae import decode, decoder_of, encode, reconstruct
from pdae_nb.train import Recipe, train
from pdae_nb.unet import UNet
import pdae_nb.train as train_module

NET = dict(ch=8, mult=(1, 2), n_res=1, groups=8, z_dim=6, enc_mult=(1, 2, 2))
ROW = Recipe('digits', 28, NET, 48, 8, 1e-2, ema=.5)
quiet = dict(every=2, log=lambda s: None)

@pytest.fixture(scope='module')
def coder(tmp_path_factory): return train('toy_diffae', ROW, tmp_path_factory.mktemp('coder'), **quiet)

@pytest.fixture(scope='module')
def latent(coder, tmp_path_factory): return train('toy_diffae_latent', Recipe('digits', 28, dict(run=str(coder), hidden=16, layers=3), 640, 64, 1e-2, ema=.5, wd=.01), tmp_path_factory.mktemp('latent'), **quiet)

@pytest.fixture
def runs(coder, latent): return load_run(coder), load_run(latent)

@pytest.fixture
def x0(): return to_signed(digits('test', 28).x[:4])

def same(a, b):
    from safetensors.torch import load_file
    return all(torch.equal(v, load_file(b/p.name)[k]) for p in a.glob('*.safetensors') for k, v in load_file(p).items())

def stops_after(n, monkeypatch):
    real, seen = train_module.fit, []
    def fit(*a, **kw):
        for step in real(*a, **kw):
            seen.append(step.i); yield step
            if len(seen) == n: import signal; signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(train_module, 'fit', fit)

@pytest.mark.parametrize('which', ['coder', 'latent'])
def test_an_interrupted_training_ends_with_the_same_bits(which, request, tmp_path, monkeypatch):
    done = request.getfixturevalue(which); run = load_run(done); name = done.name
    r = Recipe(**run.recipe); stops_after(3, monkeypatch)
    with pytest.raises(Stopped): train(name, r, tmp_path, **quiet)
    assert same(done, train(name, r, tmp_path, **quiet))

def test_a_run_is_stored_with_all_that_it_needs(runs, coder, latent):
    assert sorted(p.name for p in coder.iterdir()) == ['enc.safetensors', 'run.json', 'sched.safetensors', 'unet.safetensors']
    assert sorted(p.name for p in latent.iterdir()) == ['net.safetensors', 'run.json', 'sched.safetensors', 'stats.safetensors']
    z = encode_all(runs[0].enc, digits('train', 28))
    torch.testing.assert_close(runs[1].stats.mean, z.mean(0), atol=2e-3, rtol=2e-3); assert runs[1].sched(torch.tensor([1000])).item() == pytest.approx(.992**1000)

STEP = '''
import torch
from pdae_nb.diffae import SemanticEncoder, diffae_loss
from pdae_nb.forward import Schedule
from pdae_nb.unet import UNet
last = dict(memory_format=torch.channels_last)
enc, unet = SemanticEncoder(1, 32, (1, 2), 28, 8, n_res=1).to(**last).train(), UNet(c=1, ch=32, mult=(1, 2), n_res=1, size=28, dz=8, z_shift=False).to(**last).train()
for bf16 in (False, True):
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16): diffae_loss(enc, unet, torch.rand(4, 1, 28, 28).to(**last), Schedule.linear()).backward()
print(all(p.grad is not None and p.grad.isfinite().all() for m in (enc, unet) for p in m.parameters()))'''

def test_the_first_step_does_not_kill_the_process():
    r = subprocess.run([sys.executable, '-c', STEP], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.strip() == 'True', r.stderr

def test_the_code_only_scales_and_does_so_in_both_halves():
    torch.manual_seed(0); net = UNet(c=1, ch=8, mult=(1, 2), n_res=1, size=28, dz=4, z_shift=False, groups=8)
    blocks = [*net.down.blocks, *net.up.mid, *net.up.blocks]
    assert all(b.norm2.z.out_features == b.conv2.out_channels for b in blocks) and len(blocks) == 3 + 2 + 5

def test_reconstruct_knows_diffae(runs, x0):
    with torch.no_grad():
        mine, back = reconstruct(digits('test', 28).x[0], runs[0], 3); assert back.shape == mine.shape == (1, 1, 28, 28)
        t = torch.full((4,), 300); assert torch.equal(decoder_of(runs[0], x0)(x0, t), diffae_denoiser(runs[0].unet, encode(runs[0].enc, x0))(x0, t))
    assert coded_mse(runs[0], x0).shape == (4,)

def test_a_look_is_written_once_for_each_point(runs, x0, tmp_path):
    look = held_out(tmp_path/'deep/looks.jsonl', x0)
    for n in (8, 16, 16, 8): look(n, dict(enc=runs[0].enc, unet=runs[0].unet), runs[0].sched)
    c = looks(tmp_path/'deep/looks.jsonl'); assert c['seen'] == [8, 16] and c['noise_mse'][0] == pytest.approx(coded_mse(runs[0], x0).mean().item())
    assert images_to_reach([8, 16], [2., 1.], .5) is None and images_to_reach([8, 16], [2., 1.], 1.25) == 14

# ---- codes
def test_codes_are_computed_once_and_follow_the_weights(runs, monkeypatch, tmp_path):
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path)); im = digits('test', 28)[slice(5)]; enc = runs[0].enc
    z = encode_all(enc, im); assert len(list(tmp_path.glob('codes-*'))) == 1 and torch.equal(z, encode_all(enc, im))
    before = fingerprint(enc); enc.head.bias.data += 1; assert fingerprint(enc) != before
    torch.testing.assert_close(encode_all(enc, im), z + 1, atol=1e-4, rtol=1e-4); assert len(list(tmp_path.glob('codes-*'))) == 2
    assert not torch.equal(encode_all(enc, digits('test', 28)[slice(5, 10)]), z + 1)
    (f := sorted(tmp_path.glob('codes-*'))[0]).write_bytes(f.read_bytes()[:50]); encode_all(enc, im)                # a damaged file is made anew

def test_codes_go_through_batches_as_they_are():
    z = torch.randn(10, 3)
    assert torch.equal(torch.cat([b for b, _ in batches(Images(z), 5, 2)]).sort(0).values, z.sort(0).values)
    with pytest.raises(TypeError, match='float32 .N,D. for codes'): Images(torch.randn(2, 3, 4))

def test_one_sampler_serves_codes_and_images(runs):
    z = sample_z(runs[1], 5, 10); assert z.shape == (5, 6) and torch.equal(z, sample_z(runs[1], 5, 10)) and not torch.equal(z, sample_z(runs[1], 5, 10, seed=1))
    assert runs[1].stats.norm(sample_z(runs[1], 50, 10, clip=1.)).abs().max() < 1.5
    xT = torch.randn(3, 1, 28, 28); x = draw(runs[1], runs[0], xT, 3, bs=2); assert x.abs().max() <= 1 and not torch.allclose(x, xT.clamp(-1, 1), atol=.1)
    assert not torch.equal(x, draw(runs[1], runs[0], xT, 3, bs=2, seed=1))                                           # the codes count

def test_the_published_latent_loop():
    from pdae_nb.sample import pdae_times, sample
    from test_numerics import inp
    z, sched = inp('zlat', [2, 16], 2), Schedule.constant(); toy = lambda z, t: .5*z + .1*((t - 1)/1000)[:, None]
    want = {1.: ([-1.13761, -1.0557, -1.14495], 1.13186), None: ([-11.5823, -5.45592, -12.1313], 9.41352)}
    for clip, (first, last) in want.items():
        got = sample(toy, z, sched, pdae_times(10), clip=clip).flatten()
        torch.testing.assert_close(torch.cat([got[:3], got[-1:]]), torch.tensor([*first, last]), atol=1e-4, rtol=1e-5)

# ---- lines, directions, rejection
def test_lines_and_arcs_in_float64():
    a, b = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    for f in (lerp, slerp): torch.testing.assert_close(f(a, b, 0.), a); torch.testing.assert_close(f(a, b, 1.), b); assert f(a, b, .3).dtype == torch.float64
    torch.testing.assert_close(slerp(a, a, .3), a); u, v = (o.flatten(1)/o.flatten(1).norm(dim=1, keepdim=True) for o in (a, b))
    torch.testing.assert_close(slerp(u, v, .4).norm(dim=1), torch.ones(3, dtype=torch.float64))

@pytest.fixture
def probe():
    g = torch.Generator().manual_seed(0); z = torch.randn(500, 6, generator=g)*3 + 1
    return z, fit_probe(z, z[:, 2] > 1)

def test_a_step_to_the_median_arrives(probe):
    z, p = probe; has = z[:, 2] > 1
    torch.testing.assert_close(p.logit(move(z, p, to_median(z, p, z[has]))), p.logit(z[has]).median().expand(500), atol=1e-3, rtol=1e-3)
    step = p.stats.norm(move(z, p, .5)) - p.stats.norm(z); torch.testing.assert_close(step.norm(dim=1), torch.full((500,), .5*6**.5), atol=1e-3, rtol=1e-3)

def test_rejection_keeps_what_it_should(probe):
    z, p = probe; kept = accept(z, p, seed=1)
    assert (p.prob(kept) >= .5).all() and torch.equal(kept, accept(z, p, seed=1)) and len(accept(z, p, 5)) == 5
    flat = Probe(torch.zeros(6), torch.logit(torch.tensor(.75)).item(), ZStats(6)); assert abs(len(accept(torch.randn(20_000, 6), flat))/20_000 - .75) < .02

def test_walks_and_edits_begin_at_the_picture(runs, x0, probe):
    from pdae_nb.sample import invert, sample
    run = runs[0]; z = encode(run.enc, x0); back = sample(decode(run, z), invert(decode(run, z), x0, run.sched, 4), run.sched, 4)
    w = between(run, x0[:2], x0[2:], [0, 1], 4); torch.testing.assert_close(w[0], back[:2], atol=1e-3, rtol=1e-3); torch.testing.assert_close(w[1], back[2:], atol=1e-3, rtol=1e-3)
    still, pushed = edit(run, x0, probe[1], [0., 3.], 4); torch.testing.assert_close(still, back, atol=1e-3, rtol=1e-3); assert not torch.allclose(still, pushed, atol=1e-4)

# ---- bad input
@pytest.mark.parametrize('what, why', [
    (lambda z, p: p.prob(z[:, :4]), r'codes \(N,6\), got \(500, 4\)'), (lambda z, p: fit_probe(z, torch.zeros(500)), '500 codes are labelled 0, 0 not'),
    (lambda z, p: fit_probe(z, torch.arange(500) < 3, folds=5), '5 folds need as many codes of each class, got 3'), (lambda z, p: fit_probe(z, torch.zeros(4)), 'a label for each'),
    (lambda z, p: fit_probe(z, torch.arange(500) % 3), 'two classes'), (lambda z, p: accept(z, p, 500), 'were accepted, 500 are wanted'), (lambda z, p: oversample(torch.ones(3).bool()), 'needs both classes'),
    (lambda z, p: ZStats(z[:1]), 'at least 2 images'), (lambda z, p: MLPSkipNet(6, 8, 1), 'at least 2 layers, got 1'), (lambda z, p: MLPSkipNet(6, 8, 2)(z[:, :5], torch.ones(500)), r'codes \(B,6\), got \(500, 5\)'),
    (lambda z, p: attribute(digits('test'), 'eight'), "no attribute 'eight'; there are 0, 1, 2"), (lambda z, p: attribute(Images(torch.zeros(1, 1, 2, 2).byte(), torch.ones(1, 1), ['Wavy_Hair']), 'Wavy Hair'), "did you mean 'Wavy_Hair'"),
    (lambda z, p: attribute(Images(torch.zeros(1, 1, 2, 2).byte()), '1'), 'no labels'), (lambda z, p: SemanticEncoder(1, 8, (1,)*6, 28), 'to nothing')])
def test_bad_input_is_met_at_the_door(what, why, probe):
    with pytest.raises(ValueError, match=why): what(*probe)

def test_what_does_not_belong_together(runs, coder, x0, tmp_path):
    with pytest.raises(ValueError, match='learnt the codes of toy_diffae, not of'): draw(runs[1], load_run('mnist_dpm'), x0)
    with pytest.raises(ValueError, match='no encoder'): train('toy_latent', Recipe('digits', 28, dict(run='mnist_dpm', hidden=8, layers=2), 64, 8), tmp_path, **quiet)
    with pytest.raises(ValueError, match=r'wants a code z \(4,6\), got \(4, 5\)'): diffae_denoiser(runs[0].unet, torch.zeros(4, 5))(x0, torch.ones(4))
    with pytest.raises(ValueError, match='two images of one shape'): between(runs[0], x0, x0[:2], [0])
    with pytest.raises(ValueError, match='decodes no codes'): decode(load_run('mnist_dpm'), torch.zeros(1, 6))
    with pytest.raises(ValueError, match='another recipe'): train('toy_diffae', replace(ROW, lr=1.), coder.parent, **quiet)
