"""PDAE end to end at toy size: the frozen half stays frozen, an interrupted training goes on bit for bit, the process survives its first step."""
import copy, json, subprocess, sys
from dataclasses import replace
import pytest, torch
from pdae_nb.data import digits, to_signed
from pdae_nb.files import Stopped, load_run, save_run
from pdae_nb.forward import Schedule, score_to_eps, shift_to_eps
from pdae_nb.pdae import ConvEncoder, GradientEstimator, decoder_of, lerp_trajectories, pdae_denoiser, pdae_loss, reconstruct
from pdae_nb.sample import sample
from pdae_nb.study import beta_to_eps
from pdae_nb.train import Recipe, train
from pdae_nb.unet import UNet
import pdae_nb.train as train_module

SCHED = Schedule.linear()

@pytest.fixture(scope='module')
def dpm(tmp_path_factory):
    "A DPM whose layers all speak, on disk as a run"
    torch.manual_seed(0); net = UNet(c=1, ch=8, mult=(1, 2), n_res=1, size=28, groups=8)
    for p in net.parameters(): p.data += .1*torch.randn_like(p)
    path = tmp_path_factory.mktemp('dpm')/'toy_dpm'; save_run(path, dict(dpm=net), SCHED, {})
    return path

def row(dpm, steps=6): return Recipe('digits', 28, dict(dpm=str(dpm), z_dim=4, groups=8), 8*steps, 8, 1e-2, ema=.5)

def go(dpm, out, **kw): return train('toy_pdae', row(dpm), out, every=2, log=lambda s: None, **kw)

def weights(path): return {f'{p.name}/{k}': v for p in sorted(path.glob('*.safetensors')) for k, v in __import__('safetensors.torch').torch.load_file(p).items()}

@pytest.fixture(scope='module')
def done(dpm, tmp_path_factory): return go(dpm, tmp_path_factory.mktemp('whole'))

def test_the_frozen_part_is_the_one_that_went_in(dpm, done):
    a, run = load_run(dpm).dpm.state_dict(), load_run(done)
    assert run.dpm is run.G.dpm
    for k, v in run.dpm.state_dict().items(): assert torch.equal(v, a[k]), k
    assert run.G.up.out[-1].weight.any() and not any(p.requires_grad for p in run.dpm.parameters())

def test_the_frozen_part_is_stored_once(done): assert sorted(p.name for p in done.iterdir()) == ['G.safetensors', 'enc.safetensors', 'run.json', 'sched.safetensors']

def test_an_interrupted_training_ends_with_the_same_bits(dpm, done, tmp_path, monkeypatch):
    seen, real = [], train_module.fit
    def stops(*a, **kw):
        for step in real(*a, **kw):
            seen.append(step.i); yield step
            if step.i == 3 and len(seen) == 3: import signal; signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(train_module, 'fit', stops)
    with pytest.raises(Stopped): go(dpm, tmp_path)
    again = go(dpm, tmp_path)
    a, b = weights(done), weights(again)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert 3 < len(seen) < 9                                            # it did go on, and not from the start

STEP = '''
import torch
from pdae_nb.forward import Schedule
from pdae_nb.pdae import ConvEncoder, GradientEstimator, pdae_loss
from pdae_nb.unet import UNet
last = dict(memory_format=torch.channels_last)
G = GradientEstimator(UNet(c=1, ch=32, mult=(1, 2), n_res=1, size=28).to(**last), 8).to(**last).train(); enc = ConvEncoder(1, 28, 8).to(**last)
for bf16 in (False, True):
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16): pdae_loss(enc, G, torch.rand(4, 1, 28, 28).to(**last), Schedule.linear()).backward()
print(all(p.grad is not None and p.grad.isfinite().all() for p in G.up.parameters()))'''

def test_the_first_step_does_not_kill_the_process():
    r = subprocess.run([sys.executable, '-c', STEP], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.strip() == 'True', r.stderr

@pytest.fixture
def run(done): return load_run(done)

@pytest.fixture
def x0(): return to_signed(digits('test', 28).x[:3])

@pytest.mark.parametrize('to_eps', [shift_to_eps, beta_to_eps, score_to_eps])
def test_scale_0_and_an_empty_window_are_the_dpm_alone(run, x0, to_eps):
    t, z = torch.tensor([2, 300, 1000]), run.enc(x0)
    with torch.no_grad():
        assert torch.equal(pdae_denoiser(run.G, z, SCHED, to_eps, scale=0.)(x0, t), run.dpm(x0, t))
        part = pdae_denoiser(run.G, z, SCHED, to_eps, window=(100, 500))(x0, t)
        assert torch.equal(part[[0, 2]], run.dpm(x0, t)[[0, 2]]) and not torch.equal(part[1], run.dpm(x0, t)[1])

def test_one_code_serves_a_whole_batch(run, x0):
    t, z = torch.full((3,), 400), run.enc(x0[:1])
    with torch.no_grad(): torch.testing.assert_close(run.G(x0, t, z)[1], run.G(x0, t, z.expand(3, -1))[1])

def test_a_gradient_reaches_the_encoder_once_the_new_half_speaks(run, x0):
    for p in [*run.enc.parameters(), *run.G.up.parameters()]: p.requires_grad_(True)
    pdae_loss(run.enc, run.G, x0, SCHED).backward()
    assert run.enc.head.weight.grad.any() and all(p.grad is None for p in run.dpm.parameters())

def test_a_line_between_scores_has_the_right_ends(run, x0):
    t, z = torch.full((3,), 400), run.enc(x0).detach()
    with torch.no_grad():
        for lam, end in (0., z), (1., z.roll(1, 0)): torch.testing.assert_close(lerp_trajectories(run.G, z, z.roll(1, 0), lam, SCHED)(x0, t), pdae_denoiser(run.G, end, SCHED)(x0, t), rtol=1e-5, atol=1e-5)

def test_reconstruct_takes_what_people_have(run, tmp_path):
    from PIL import Image
    im = Image.fromarray(digits('test', 28).x[0, 0].numpy()); im.save(tmp_path/'a.png'); said = []
    with torch.no_grad():
        a, b, c = (reconstruct(o, run, 3, log=said.append)[1] for o in (im, str(tmp_path/'a.png'), digits('test', 28).x[0]))
        assert torch.equal(a, b) and torch.equal(a, c) and not said
        reconstruct(im.resize((90, 60)).convert('RGB'), run, 2, log=said.append); assert said == ['the picture: 90x60 grey taken as 28x28 grey']
        assert torch.equal(*(reconstruct(im, run, 3, seed=1)[1] for _ in range(2))) and not torch.equal(*(reconstruct(im, run, 3, seed=s)[1] for s in (1, 2)))

@pytest.mark.parametrize('bad, why', [(dict(px=14), "the frozen DPM is for images of {'c': 1, 'size': 28}"), (dict(net=dict(dpm='nowhere', z_dim=4)), "no run 'nowhere'"), (dict(px=20), 'encoders for images of|the data are')])
def test_a_dpm_that_does_not_fit(dpm, tmp_path, bad, why):
    with pytest.raises((ValueError, FileNotFoundError), match=why.replace('{', r'\{').replace('}', r'\}')): train('toy_pdae', replace(row(dpm), **bad), tmp_path, log=lambda s: None)

def test_a_stranger_cannot_name_another_class_for_the_frozen_dpm(done, tmp_path):
    import shutil
    shutil.copytree(done, tmp_path/'bad'); f = tmp_path/'bad/run.json'; about = json.loads(f.read_text())
    for module in ('os', 'pdae_nb.files.os', 'torch.nn'):
        evil = copy.deepcopy(about); evil['parts']['G']['config']['dpm']['module'] = module; f.write_text(json.dumps(evil))
        with pytest.raises(ValueError, match='parts must come from pdae_nb'): load_run(tmp_path/'bad')

def test_conditions_of_another_kind_are_refused():
    from pdae_nb.gap import LabelUNet
    for net in (UNet(c=1, ch=8, mult=(1,), n_res=1, size=8, dz=3), LabelUNet(10, c=1, ch=8, mult=(1,), n_res=1, size=8)):
        with pytest.raises(ValueError, match='must be unconditional'): GradientEstimator(net, 4)
    with pytest.raises(ValueError, match=r'images \(B,3,64,64\), got \(2, 3, 128, 128\)'): ConvEncoder(3, 64)(torch.zeros(2, 3, 128, 128))

def test_float64_stays_float64(run, x0):
    run.G.double(); run.enc.double(); x = x0.double()
    out = sample(decoder_of(run, x), torch.randn(3, 1, 28, 28, dtype=torch.float64), SCHED, 2)
    assert out.dtype == torch.float64
