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
from pdae_nb.data import digits, load_images, to_signed
from pdae_nb.edit import lerp_trajectories
from pdae_nb.experiments.training_efficiency import beta_to_eps
from pdae_nb.files import Stopped
from pdae_nb.forward import Schedule, score_to_eps, shift_to_eps
from pdae_nb.hub import images, load, train
from pdae_nb.methods.dpm import DPM, ClassConditionalDPM, LabelUNet
from pdae_nb.methods.pdae import PDAE, PDAESettings, pdae_denoiser, pdae_loss
from pdae_nb.networks import ConvEncoder, GradientEstimator
from pdae_nb.training import Recipe
from pdae_nb.unet import UNet

SCHED = Schedule.linear()
STEPS = 6


def no_log(message):
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
    DPM(net, SCHED, (1, 28, 28)).save(path)
    return path


@pytest.fixture(scope='module')
def untrained(dpm, tmp_path_factory):
    "Folder of a PDAE on this DPM, with random weights, none of them zero."
    torch.manual_seed(1)
    base = load(dpm)
    enc = ConvEncoder(1, 28, 4, groups=8)
    G = GradientEstimator.on(base.net, 4)
    perturb(G.up)
    path = tmp_path_factory.mktemp('untrained') / 'toy_pdae'
    PDAE(enc, G, base).save(path)
    return path


@pytest.fixture
def model(untrained):
    "The PDAE with random weights."
    return load(untrained)


@pytest.fixture
def x0():
    "Three test images: (3,1,28,28)."
    return to_signed(digits('test', 28).x[:3])


# ---------------------------------------------------------------- training and stored runs


def recipe_on(dpm):
    "Recipe of a PDAE on the DPM of a run folder."
    encoder = dict(z_dim=4, groups=8)
    training = dict(batch=8, lr=1e-2, ema=0.5)
    return Recipe(PDAE, 'digits', 28, 8 * STEPS, base=str(dpm), encoder=encoder, **training)


@pytest.fixture(scope='module')
def trained(dpm, tmp_path_factory):
    "Folder of a PDAE that was trained without interruption and without checkpoints."
    out = tmp_path_factory.mktemp('trained') / 'toy_pdae'
    return train('toy_pdae', recipe_on(dpm), out=out, log=no_log).path


def weights(path):
    "All tensors of a run folder, under the names file/tensor."
    tensors = {}
    for file in path.glob('*.safetensors'):
        for name, v in load_file(file).items():
            tensors[f'{file.name}/{name}'] = v
    return tensors


@pytest.mark.slow
def test_training_leaves_the_frozen_dpm_unchanged(dpm, trained):
    before = load(dpm).state_dict()
    model = load(trained)
    base = model.base
    assert base.path == dpm.resolve()
    assert base.state_dict().keys() == before.keys()
    for name, v in base.state_dict().items():
        assert torch.equal(v, before[name]), name
    assert not any(p.requires_grad for p in base.parameters())
    assert model.G.up.out[-1].weight.any()


@pytest.mark.slow
def test_a_trained_run_does_not_store_the_frozen_dpm(trained):
    expected = {'G.safetensors', 'enc.safetensors', 'sched.safetensors'}
    assert {path.name for path in trained.glob('*.safetensors')} == expected
    assert not (trained / 'base').exists()
    assert {name.split('.')[0] for name in load(trained).state_dict()} == {'enc', 'G'}


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
        train('toy_pdae', recipe, out=tmp_path, every=2, log=no_log)
    resumed = weights(train('toy_pdae', recipe, out=tmp_path, every=2, log=no_log).path)
    whole = weights(trained)
    assert resumed.keys() == whole.keys()
    for name, v in whole.items():
        assert torch.equal(v, resumed[name]), name
    assert 3 < len(steps) < 3 + STEPS  # the second call did not begin at step 1


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['float32', 'bf16'])
def test_a_resumed_training_gives_the_same_bits_in_each_precision(
    dpm, tmp_path, monkeypatch, precision
):
    how = dict(every=2, log=no_log, precision=precision)
    whole = train('toy_pdae', recipe_on(dpm), out=tmp_path / 'whole', **how)
    ask_to_stop_after(3, monkeypatch)
    with pytest.raises(Stopped):
        train('toy_pdae', recipe_on(dpm), out=tmp_path / 'resumed', **how)
    resumed = train('toy_pdae', recipe_on(dpm), out=tmp_path / 'resumed', **how)
    assert whole.card.precision == resumed.card.precision == precision
    expected = weights(whole.path)
    for name, v in weights(resumed.path).items():
        assert torch.equal(v, expected[name]), name


@pytest.mark.slow
def test_a_training_that_goes_on_in_another_precision_says_so(dpm, tmp_path, monkeypatch):
    lines = []
    ask_to_stop_after(3, monkeypatch)
    with pytest.raises(Stopped):
        train('toy_pdae', recipe_on(dpm), out=tmp_path, precision='float32', log=no_log)
    model = train('toy_pdae', recipe_on(dpm), out=tmp_path, precision='bf16', log=lines.append)
    assert any('computed in float32, the next ones in bf16' in line for line in lines)
    assert model.card.precision == 'float32, bf16'
    (tmp_path / 'run.json').unlink()  # the checkpoints of a finished training remain
    again = train('toy_pdae', recipe_on(dpm), out=tmp_path, precision='float32', log=lines.append)
    assert again.card.precision == 'float32, bf16', 'no step was done'
    assert len([line for line in lines if 'the next ones' in line]) == 1


@pytest.mark.slow
def test_the_precisions_give_different_weights(dpm, tmp_path):
    how = dict(log=no_log)
    in_bf16 = train('toy_pdae', recipe_on(dpm), out=tmp_path / 'a', precision='bf16', **how)
    exact = train('toy_pdae', recipe_on(dpm), out=tmp_path / 'b', precision='float32', **how)
    a, b = weights(in_bf16.path), weights(exact.path)
    assert any(not torch.equal(a[name], b[name]) for name in a)


STEP = """
import torch
from pdae_nb.forward import Schedule
from pdae_nb.methods.dpm import DPM
from pdae_nb.layers import Arithmetic, computing_in
from pdae_nb.methods.pdae import PDAE, pdae_loss
from pdae_nb.networks import ConvEncoder, GradientEstimator
from pdae_nb.unet import UNet

last = dict(memory_format=torch.channels_last)
net = UNet(c=1, ch=32, mult=(1, 2), n_res=1, size=28).to(**last)
base = DPM(net, Schedule.linear(), (1, 28, 28))
G = GradientEstimator.on(net, 8)
model = PDAE(ConvEncoder(1, 28, 8), G, base).to(**last).train()
for bf16 in (False, True):
    x0 = torch.rand(4, 1, 28, 28).to(**last)
    with computing_in(model.networks(), Arithmetic(torch.bfloat16) if bf16 else None):
        loss = pdae_loss(model.enc, model.eps_and_score, x0, model.sched)
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
def test_guidance_scale_0_gives_the_dpm(model, x0, to_eps):
    t = torch.tensor([2, 300, 1000])
    denoiser = pdae_denoiser(model.eps_and_score, model.enc(x0), SCHED, to_eps, scale=0.0)
    assert torch.equal(denoiser(x0, t), model.base.net(x0, t))


@torch.no_grad()
@pytest.mark.parametrize('to_eps', [shift_to_eps, beta_to_eps, score_to_eps])
def test_outside_its_window_the_decoder_is_the_dpm(model, x0, to_eps):
    outside = [0, 2]
    inside = 1
    t = torch.tensor([2, 300, 1000])
    dpm = model.base.net(x0, t)
    z = model.enc(x0)
    decoded = pdae_denoiser(model.eps_and_score, z, SCHED, to_eps, window=(100, 500))(x0, t)
    assert torch.equal(decoded[outside], dpm[outside])
    assert not torch.equal(decoded[inside], dpm[inside])


@torch.no_grad()
def test_the_shift_is_off_at_the_end_only_with_codes_of_a_prior(model, x0):
    z = model.encode(x0)
    for t, is_off in ((300, True), (301, False)):
        times = torch.full((3,), t)
        base_eps = model.base.denoiser()(x0, times)
        assert torch.equal(model.prior_denoiser(z)(x0, times), base_eps) == is_off
        assert not torch.equal(model.denoiser(z)(x0, times), base_eps)


@torch.no_grad()
@pytest.mark.parametrize('to_eps, name', [(shift_to_eps, 'shift'), (score_to_eps, 'score')])
def test_the_coefficient_of_the_settings_is_that_of_the_equation(model, x0, to_eps, name):
    changed = PDAE(model.enc, model.G, model.base, PDAESettings(coefficient=name))
    t = torch.tensor([2, 300, 1000])
    z = model.encode(x0)
    want = pdae_denoiser(model.eps_and_score, z, SCHED, to_eps)(x0, t)
    assert torch.equal(changed.denoiser(z)(x0, t), want)


@torch.no_grad()
def test_one_code_serves_all_images_of_a_batch(model, x0):
    t = torch.full((3,), 400)
    z = model.enc(x0[:1])
    _, score = model.eps_and_score(x0, t, z)
    _, want = model.eps_and_score(x0, t, z.expand(3, -1))
    torch.testing.assert_close(score, want)


def test_gradients_reach_the_encoder_and_not_the_dpm(model, x0):
    model.requires_grad_(True)
    pdae_loss(model.enc, model.eps_and_score, x0, SCHED).backward()
    assert model.enc.head.weight.grad.any()
    assert all(p.grad is None for p in model.base.parameters())


@torch.no_grad()
def test_interpolated_scores_end_at_the_decoders_of_the_two_codes(model, x0):
    t = torch.full((3,), 400)
    z1 = model.enc(x0)
    z2 = z1.roll(1, 0)
    for lam, z in ((0.0, z1), (1.0, z2)):
        got = lerp_trajectories(model.eps_and_score, z1, z2, lam, SCHED)(x0, t)
        want = pdae_denoiser(model.eps_and_score, z, SCHED)(x0, t)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64(model, x0):
    model.double()
    model.base.double()
    xT = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    out = model.decode(model.encode(x0.double()), xT, steps=2)
    assert out.dtype == torch.float64


# ---------------------------------------------------------------- images of other forms


@torch.no_grad()
def test_pil_image_file_and_tensor_give_the_same_reconstruction(model, tmp_path):
    pixels = digits('test', 28).x[0]
    image = Image.fromarray(pixels[0].numpy())
    image.save(tmp_path / 'a.png')
    said = []
    want = model.reconstruct(images(image, model, log=said.append), steps=3)
    for source in (str(tmp_path / 'a.png'), pixels):
        got = model.reconstruct(images(source, model, log=said.append), steps=3)
        assert torch.equal(got, want)
    assert not said


def test_conversion_of_an_image_is_reported(model):
    image = Image.fromarray(digits('test', 28).x[0, 0].numpy())
    said = []
    x0 = images(image.resize((90, 60)).convert('RGB'), model, log=said.append)
    assert x0.shape == (1, 1, 28, 28)
    assert said == ['the picture: 90x60 grey taken as 28x28 grey']


@torch.no_grad()
def test_samples_of_codes_follow_the_seed(model, x0):
    z = model.encode(x0)
    first = model.sample_codes(z, seed=1, steps=3)
    again = model.sample_codes(z, seed=1, steps=3)
    other = model.sample_codes(z, seed=2, steps=3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_the_noise_of_a_sample_does_not_depend_on_the_size_of_the_parts(model, x0):
    z = model.encode(x0)
    whole = model.sample_codes(z, seed=1, steps=3)
    parts = model.sample_codes(z, seed=1, steps=3, bs=2)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(px=14), ValueError, re.escape('the frozen DPM is for images of shape (1, 28, 28)')),
        (dict(base='nowhere'), FileNotFoundError, "no run 'nowhere'"),
        (dict(base=None), ValueError, 'must be an unconditional DPM, got no model'),
        (dict(px=20), ValueError, re.escape('the data have (1, 20, 20)')),
    ],
    ids=['14 pixels', 'no run', 'no base', '20 pixels'],
)
def test_a_dpm_that_does_not_fit_is_refused(dpm, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        train('toy_pdae', replace(recipe_on(dpm), **change), out=tmp_path, log=no_log)


@pytest.mark.parametrize(
    'module, message',
    [
        ('os', 'parts must come from pdae_nb'),
        ('torch.nn', 'parts must come from pdae_nb'),
        ('pdae_nb.files.os', "No module named 'pdae_nb.files.os'"),
    ],
)
def test_run_json_cannot_name_a_class_of_another_package(untrained, tmp_path, module, message):
    shutil.copytree(untrained, tmp_path / 'bad')
    file = tmp_path / 'bad/run.json'
    record = json.loads(file.read_text())
    record['networks']['G']['module'] = module
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / 'bad')


@pytest.mark.parametrize('path', ['os.PDAE', 'torch.nn.Linear', 'pdae_nb.model.Card'])
def test_run_json_cannot_name_a_class_that_is_no_model(untrained, tmp_path, path):
    shutil.copytree(untrained, tmp_path / 'bad')
    file = tmp_path / 'bad/run.json'
    record = json.loads(file.read_text())
    record['method'] = path
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match='must come from pdae_nb|has no model'):
        load(tmp_path / 'bad')


@pytest.mark.parametrize('kind', ['code', 'label'])
def test_a_conditional_dpm_is_refused(kind):
    geometry = dict(c=1, ch=8, mult=(1,), n_res=1, size=8)
    net = UNet(dz=3, **geometry) if kind == 'code' else LabelUNet(10, **geometry)
    with pytest.raises(ValueError, match='must be unconditional'):
        GradientEstimator.on(net, 4)


def test_a_class_conditional_base_is_refused():
    net = LabelUNet(10, c=1, ch=8, mult=(1, 2), n_res=1, size=28, groups=8)
    base = ClassConditionalDPM(net, SCHED, (1, 28, 28))
    recipe = Recipe(PDAE, 'digits', 28, 64, encoder=dict(z_dim=4, groups=8))
    with pytest.raises(ValueError, match='must be an unconditional DPM, got ClassConditionalDPM'):
        PDAE.build(recipe, load_images('digits', 'test', 28), base)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r'images \(B,3,64,64\), got \(2, 3, 128, 128\)'):
        ConvEncoder(3, 64)(torch.zeros(2, 3, 128, 128))


def test_settings_outside_their_range_are_refused():
    with pytest.raises(ValueError, match='gamma must be in 0…1, got 1.5'):
        PDAESettings(gamma=1.5)
