"""PDAE at toy size: the frozen DPM, resumed training, and what a decoder does with its code."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pdae_nb.training as training_module
from pdae_nb.data import digits, to_signed
from pdae_nb.experiments.training_efficiency import beta_to_eps
from pdae_nb.files import Stopped
from pdae_nb.forward import Schedule, score_to_eps, shift_to_eps
from pdae_nb.hub import decoder_of, reconstruct, train
from pdae_nb.methods.dpm import LabelUNet
from pdae_nb.methods.pdae import (
    ConvEncoder,
    GradientEstimator,
    lerp_trajectories,
    pdae_denoiser,
    pdae_loss,
)
from pdae_nb.model import load_run, save_run
from pdae_nb.sampling import sample
from pdae_nb.training import Recipe
from pdae_nb.unet import UNet

SCHED = Schedule.linear()
STEPS = 6


def silent(message):
    "A log function that drops its message."


def perturb(net, std=0.1):
    "Add noise to every weight, so that no layer is zero-initialised."
    for p in net.parameters():
        p.data += std * torch.randn_like(p)
    return net


@pytest.fixture(scope='module')
def dpm(tmp_path_factory):
    "Folder of an unconditional DPM with random weights, none of them zero."
    torch.manual_seed(0)
    net = perturb(UNet(c=1, ch=8, mult=(1, 2), n_res=1, size=28, groups=8))
    path = tmp_path_factory.mktemp('dpm') / 'toy_dpm'
    save_run(path, dict(dpm=net), SCHED, {})
    return path


@pytest.fixture(scope='module')
def untrained(dpm, tmp_path_factory):
    "Folder of a PDAE on this DPM, with random weights, none of them zero."
    torch.manual_seed(1)
    base = load_run(dpm)
    enc = ConvEncoder(1, 28, 4, groups=8)
    G = GradientEstimator(base.dpm, 4)
    perturb(G.up)
    path = tmp_path_factory.mktemp('untrained') / 'toy_pdae'
    save_run(path, dict(enc=enc, G=G, dpm=G.dpm), SCHED, {})
    return path


@pytest.fixture
def run(untrained):
    "The PDAE with random weights as a run."
    return load_run(untrained)


@pytest.fixture
def x0():
    "Three test images: (3,1,28,28)."
    return to_signed(digits('test', 28).x[:3])


# ---------------------------------------------------------------- training and stored runs


def recipe_on(dpm):
    "Recipe of a PDAE on the DPM of a run folder."
    net = dict(dpm=str(dpm), z_dim=4, groups=8)
    return Recipe('digits', 28, net, images=8 * STEPS, batch=8, lr=1e-2, ema=0.5)


@pytest.fixture(scope='module')
def trained(dpm, tmp_path_factory):
    "Folder of a PDAE that was trained without interruption and without checkpoints."
    return train('toy_pdae', recipe_on(dpm), tmp_path_factory.mktemp('trained'), log=silent)


def weights(path):
    "All tensors of a run folder, under the names file/tensor."
    tensors = {}
    for file in path.glob('*.safetensors'):
        for name, v in load_file(file).items():
            tensors[f'{file.name}/{name}'] = v
    return tensors


@pytest.mark.slow
def test_training_leaves_the_frozen_dpm_unchanged(dpm, trained):
    before = load_run(dpm).dpm.state_dict()
    run = load_run(trained)
    assert run.dpm is run.G.dpm
    assert run.dpm.state_dict().keys() == before.keys()
    for name, v in run.dpm.state_dict().items():
        assert torch.equal(v, before[name]), name
    assert not any(p.requires_grad for p in run.dpm.parameters())
    assert run.G.up.out[-1].weight.any()


@pytest.mark.slow
def test_a_trained_run_stores_the_frozen_dpm_once(trained):
    files = sorted(path.name for path in trained.iterdir())
    assert files == ['G.safetensors', 'enc.safetensors', 'run.json', 'sched.safetensors']


def ask_to_stop_after(n, monkeypatch):
    "Make `fit` raise SIGTERM after n steps, once; the list returned collects all its steps."
    fit = training_module.fit
    steps = []

    def interrupted(*args, **kw):
        for step in fit(*args, **kw):
            steps.append(step.i)
            yield step
            if len(steps) == n:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training_module, 'fit', interrupted)
    return steps


@pytest.mark.slow
def test_interrupted_and_resumed_training_gives_the_same_bits(dpm, trained, tmp_path, monkeypatch):
    steps = ask_to_stop_after(3, monkeypatch)
    recipe = recipe_on(dpm)
    with pytest.raises(Stopped):
        train('toy_pdae', recipe, tmp_path, every=2, log=silent)
    resumed = weights(train('toy_pdae', recipe, tmp_path, every=2, log=silent))
    whole = weights(trained)
    assert resumed.keys() == whole.keys()
    for name, v in whole.items():
        assert torch.equal(v, resumed[name]), name
    assert 3 < len(steps) < 3 + STEPS  # the second call did not begin at step 1


STEP = """
import torch
from pdae_nb.forward import Schedule
from pdae_nb.methods.pdae import ConvEncoder, GradientEstimator, pdae_loss
from pdae_nb.unet import UNet

last = dict(memory_format=torch.channels_last)
dpm = UNet(c=1, ch=32, mult=(1, 2), n_res=1, size=28).to(**last)
G = GradientEstimator(dpm, 8).to(**last).train()
enc = ConvEncoder(1, 28, 8).to(**last)
for bf16 in (False, True):
    x0 = torch.rand(4, 1, 28, 28).to(**last)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        loss = pdae_loss(enc, G, x0, Schedule.linear())
        loss.backward()
print(all(p.grad is not None and p.grad.isfinite().all() for p in G.up.parameters()))
"""


@pytest.mark.slow
def test_first_training_step_in_a_new_process_gives_finite_gradients():
    r = subprocess.run([sys.executable, '-c', STEP], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert r.stdout.strip() == 'True', r.stderr


# ---------------------------------------------------------------- the decoder


@torch.no_grad()
@pytest.mark.parametrize('to_eps', [shift_to_eps, beta_to_eps, score_to_eps])
def test_guidance_scale_0_gives_the_dpm(run, x0, to_eps):
    t = torch.tensor([2, 300, 1000])
    denoiser = pdae_denoiser(run.G, run.enc(x0), SCHED, to_eps, scale=0.0)
    assert torch.equal(denoiser(x0, t), run.dpm(x0, t))


@torch.no_grad()
@pytest.mark.parametrize('to_eps', [shift_to_eps, beta_to_eps, score_to_eps])
def test_outside_its_window_the_decoder_is_the_dpm(run, x0, to_eps):
    outside = [0, 2]
    inside = 1
    t = torch.tensor([2, 300, 1000])
    dpm = run.dpm(x0, t)
    decoded = pdae_denoiser(run.G, run.enc(x0), SCHED, to_eps, window=(100, 500))(x0, t)
    assert torch.equal(decoded[outside], dpm[outside])
    assert not torch.equal(decoded[inside], dpm[inside])


@torch.no_grad()
def test_one_code_serves_all_images_of_a_batch(run, x0):
    t = torch.full((3,), 400)
    z = run.enc(x0[:1])
    _, score = run.G(x0, t, z)
    _, want = run.G(x0, t, z.expand(3, -1))
    torch.testing.assert_close(score, want)


def test_gradients_reach_the_encoder_and_not_the_dpm(run, x0):
    for p in [*run.enc.parameters(), *run.G.up.parameters()]:
        p.requires_grad_(True)
    pdae_loss(run.enc, run.G, x0, SCHED).backward()
    assert run.enc.head.weight.grad.any()
    assert all(p.grad is None for p in run.dpm.parameters())


@torch.no_grad()
def test_interpolated_scores_end_at_the_decoders_of_the_two_codes(run, x0):
    t = torch.full((3,), 400)
    z1 = run.enc(x0)
    z2 = z1.roll(1, 0)
    for lam, z in ((0.0, z1), (1.0, z2)):
        got = lerp_trajectories(run.G, z1, z2, lam, SCHED)(x0, t)
        want = pdae_denoiser(run.G, z, SCHED)(x0, t)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64(run, x0):
    run.G.double()
    run.enc.double()
    xT = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    out = sample(decoder_of(run, x0.double()), xT, SCHED, 2)
    assert out.dtype == torch.float64


# ---------------------------------------------------------------- reconstruct


@torch.no_grad()
def test_pil_image_file_and_tensor_give_the_same_reconstruction(run, tmp_path):
    pixels = digits('test', 28).x[0]
    image = Image.fromarray(pixels[0].numpy())
    image.save(tmp_path / 'a.png')
    said = []
    _, want = reconstruct(image, run, 3, log=said.append)
    for source in (str(tmp_path / 'a.png'), pixels):
        _, got = reconstruct(source, run, 3, log=said.append)
        assert torch.equal(got, want)
    assert not said


@torch.no_grad()
def test_conversion_of_an_image_is_reported(run):
    image = Image.fromarray(digits('test', 28).x[0, 0].numpy())
    said = []
    reconstruct(image.resize((90, 60)).convert('RGB'), run, 2, log=said.append)
    assert said == ['the picture: 90x60 grey taken as 28x28 grey']


@torch.no_grad()
def test_reconstruction_from_random_noise_follows_the_seed(run):
    pixels = digits('test', 28).x[0]
    _, first = reconstruct(pixels, run, 3, seed=1)
    _, again = reconstruct(pixels, run, 3, seed=1)
    _, other = reconstruct(pixels, run, 3, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'change, error, message',
    [
        (
            dict(px=14),
            ValueError,
            re.escape("the frozen DPM is for images of {'c': 1, 'size': 28}"),
        ),
        (dict(net=dict(dpm='nowhere', z_dim=4)), FileNotFoundError, "no run 'nowhere'"),
        (dict(px=20), ValueError, 'the data are'),
    ],
    ids=['14 pixels', 'no run', '20 pixels'],
)
def test_a_dpm_that_does_not_fit_is_refused(dpm, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        train('toy_pdae', replace(recipe_on(dpm), **change), tmp_path, log=silent)


@pytest.mark.parametrize('module', ['os', 'pdae_nb.files.os', 'torch.nn'])
def test_run_json_cannot_name_a_class_of_another_package(untrained, tmp_path, module):
    shutil.copytree(untrained, tmp_path / 'bad')
    file = tmp_path / 'bad/run.json'
    about = json.loads(file.read_text())
    about['parts']['G']['config']['dpm']['module'] = module
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match='parts must come from pdae_nb'):
        load_run(tmp_path / 'bad')


@pytest.mark.parametrize('kind', ['code', 'label'])
def test_a_conditional_dpm_is_refused(kind):
    geometry = dict(c=1, ch=8, mult=(1,), n_res=1, size=8)
    net = UNet(dz=3, **geometry) if kind == 'code' else LabelUNet(10, **geometry)
    with pytest.raises(ValueError, match='must be unconditional'):
        GradientEstimator(net, 4)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r'images \(B,3,64,64\), got \(2, 3, 128, 128\)'):
        ConvEncoder(3, 64)(torch.zeros(2, 3, 128, 128))
