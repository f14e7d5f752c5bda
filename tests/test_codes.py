"""Diff-AE and the latent DPM at toy size.

Resumed training, stored runs, the cache of codes, edits of codes, and messages about bad input.
"""

import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_numerics import inp

import pdae_nb.training as training_module
from pdae_nb.data import Images, batches, digits, to_signed
from pdae_nb.edit import (
    accept,
    attribute,
    fit_probe,
    interpolate,
    lerp,
    manipulate,
    move,
    oversample,
    slerp,
    to_median,
)
from pdae_nb.experiments.training_efficiency import held_out, images_to_reach, looks
from pdae_nb.files import Stopped, fingerprint
from pdae_nb.forward import Schedule
from pdae_nb.hub import cached_run, load, train
from pdae_nb.methods.diffae import DiffAE, SemanticEncoder, diffae_denoiser
from pdae_nb.methods.latent import LatentDPM, MLPSkipNet, Probe, ZStats, encode_all
from pdae_nb.sampling import sample
from pdae_nb.solvers import pdae_times
from pdae_nb.training import Recipe, noise_mse
from pdae_nb.unet import UNet

NET = dict(ch=8, mult=(1, 2), n_res=1, groups=8)
ENCODER = dict(z_dim=6, mult=(1, 2, 2))
RECIPE = Recipe(
    DiffAE, 'digits', 28, images=48, net=NET, encoder=ENCODER, batch=8, lr=1e-2, ema=0.5
)


def no_log(message):
    "A log function that drops its message."


def latent_recipe(base):
    "Recipe of a latent DPM of the codes of an autoencoder."
    return Recipe(
        LatentDPM,
        'digits',
        28,
        images=640,
        base=base,
        net=dict(hidden=16, layers=3),
        batch=64,
        lr=1e-2,
        ema=0.5,
        weight_decay=0.01,
    )


@pytest.fixture(scope='module')
def coder(tmp_path_factory):
    "Folder of a Diff-AE that was trained without interruption and without checkpoints."
    out = tmp_path_factory.mktemp('coder') / 'toy_diffae'
    return train('toy_diffae', RECIPE, out=out, log=no_log).path


@pytest.fixture(scope='module')
def latent(coder, tmp_path_factory):
    "Folder of a latent DPM of the codes of `coder`."
    out = tmp_path_factory.mktemp('latent') / 'toy_diffae_latent'
    return train('toy_diffae_latent', latent_recipe(coder), out=out, log=no_log).path


@pytest.fixture
def base(coder):
    "The Diff-AE."
    return load(coder)


@pytest.fixture
def prior(latent):
    "The latent DPM."
    return load(latent)


@pytest.fixture
def x0():
    "Four test images: (4,1,28,28)."
    return to_signed(digits('test', 28).x[:4])


# ---------------------------------------------------------------- training and stored runs


def weights(path):
    "All tensors of a run folder, under the names file/tensor."
    tensors = {}
    for file in path.glob('*.safetensors'):
        for name, v in load_file(file).items():
            tensors[f'{file.name}/{name}'] = v
    return tensors


def assert_same_weights(first, second):
    "Two run folders hold the same tensors, bit for bit."
    a = weights(first)
    b = weights(second)
    assert a
    assert a.keys() == b.keys()
    for name, v in a.items():
        assert torch.equal(v, b[name]), name


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


@pytest.mark.parametrize('which', [pytest.param('coder', marks=pytest.mark.slow), 'latent'])
def test_interrupted_and_resumed_training_gives_the_same_bits(
    which, request, tmp_path, monkeypatch
):
    done = request.getfixturevalue(which)
    recipe = RECIPE if which == 'coder' else latent_recipe(request.getfixturevalue('coder'))
    out = tmp_path / 'run'
    steps = ask_to_stop_after(3, monkeypatch)
    with pytest.raises(Stopped):
        train(done.name, recipe, out=out, every=2, log=no_log)
    resumed = train(done.name, recipe, out=out, every=2, log=no_log)
    assert_same_weights(done, resumed.path)
    assert 3 < len(steps) < 3 + recipe.steps  # the second call did not begin at step 1


def files_of_the_model(path):
    "The files of a run folder that hold the model, without those of its training."
    return sorted(file.name for file in path.iterdir() if file.suffix in ('.json', '.safetensors'))


def test_files_of_a_stored_run(coder, latent):
    files = files_of_the_model(coder)
    assert files == ['enc.safetensors', 'net.safetensors', 'run.json', 'sched.safetensors']
    files = files_of_the_model(latent)
    assert files == ['net.safetensors', 'run.json', 'sched.safetensors', 'stats.safetensors']


def test_latent_run_stores_the_statistics_of_the_codes_and_its_schedule(base, prior):
    z = encode_all(base.enc, digits('train', 28))
    torch.testing.assert_close(prior.stats.mean, z.mean(0), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(prior.stats.std, z.std(0), atol=2e-3, rtol=2e-3)
    assert prior.sched(torch.tensor([1000])).item() == pytest.approx(0.992**1000)


STEP = """
import torch
from pdae_nb.methods.diffae import SemanticEncoder, diffae_loss
from pdae_nb.forward import Schedule
from pdae_nb.layers import Arithmetic, computing_in
from pdae_nb.unet import UNet

last = dict(memory_format=torch.channels_last)
enc = SemanticEncoder(1, 32, (1, 2), 28, 8, n_res=1).to(**last).train()
unet = UNet(c=1, ch=32, mult=(1, 2), n_res=1, size=28, dz=8, z_shift=False).to(**last).train()
for bf16 in (False, True):
    x0 = torch.rand(4, 1, 28, 28).to(**last)
    with computing_in([enc, unet], Arithmetic(torch.bfloat16) if bf16 else None):
        loss = diffae_loss(enc, unet, x0, Schedule.linear())
        loss.backward()
grads = [p.grad for m in (enc, unet) for p in m.parameters()]
print(all(g is not None and g.isfinite().all() for g in grads))
"""


@pytest.mark.slow
def test_first_training_step_in_a_new_process_gives_finite_gradients():
    r = subprocess.run([sys.executable, '-c', STEP], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert r.stdout.strip() == 'True', r.stderr


def test_code_scales_each_block_of_both_halves_and_does_not_shift():
    net = UNet(c=1, ch=8, mult=(1, 2), n_res=1, size=28, dz=4, z_shift=False, groups=8)
    blocks = [*net.down.blocks, *net.up.mid, *net.up.blocks]
    assert len(blocks) == 3 + 2 + 5
    for block in blocks:
        assert block.norm2.z.out_features == block.conv2.out_channels


@torch.no_grad()
def test_a_diffae_reconstructs(base, x0):
    back = base.reconstruct(x0, steps=3)
    assert back.shape == x0.shape
    t = torch.full((4,), 300)
    want = diffae_denoiser(base.net, base.encode(x0))(x0, t)
    assert torch.equal(base.denoiser(base.encode(x0))(x0, t), want)


def test_repeated_looks_count_once(base, x0, tmp_path):
    file = tmp_path / 'deep/looks.jsonl'
    look = held_out(file, x0)
    for seen in (8, 16, 16, 8):
        look(seen, base)
    curve = looks(file)
    assert curve['seen'] == [8, 16]
    assert len(curve['noise_mse']) == 2
    losses, _ = noise_mse(base.denoiser(base.encode(x0)), x0, base.sched)
    assert curve['noise_mse'][0] == pytest.approx(losses.mean().item())


def test_images_to_reach_a_level():
    assert images_to_reach([8, 16], [2.0, 1.0], 0.5) is None
    assert images_to_reach([8, 16], [2.0, 1.0], 1.25) == 14


# ---------------------------------------------------------------- codes


@pytest.fixture
def cache(monkeypatch, tmp_path):
    "An empty cache folder."
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path))
    return tmp_path


def cached_codes(cache):
    "Files of codes in the cache."
    return sorted(cache.glob('codes-*'))


def test_codes_are_computed_once(base, cache, monkeypatch):
    images = digits('test', 28)[slice(5)]
    z = encode_all(base.enc, images)
    assert len(cached_codes(cache)) == 1

    def fail(x0):
        raise AssertionError('the codes were computed again')

    monkeypatch.setattr(base.enc, 'forward', fail)
    assert torch.equal(z, encode_all(base.enc, images))


def test_cached_codes_belong_to_the_weights_and_the_images(base, cache):
    enc = base.enc
    images = digits('test', 28)[slice(5)]
    z = encode_all(enc, images)
    before = fingerprint(enc)
    enc.head.bias.data += 1
    assert fingerprint(enc) != before
    torch.testing.assert_close(encode_all(enc, images), z + 1, atol=1e-4, rtol=1e-4)
    assert len(cached_codes(cache)) == 2
    others = encode_all(enc, digits('test', 28)[slice(5, 10)])
    assert not torch.allclose(others, z + 1, atol=1e-4)
    assert len(cached_codes(cache)) == 3


def test_codes_of_a_network_in_training_mode_are_refused(base, cache):
    base.enc.train()
    with pytest.raises(ValueError, match='the encoder is in training mode'):
        encode_all(base.enc, digits('test', 28)[slice(5)])
    assert not cached_codes(cache)


def test_networks_of_equal_weights_and_other_configurations_have_codes_of_their_own(base, cache):
    images = digits('test', 28)[slice(5)]
    encode_all(base.enc, images)
    base.enc.config = base.enc.config | dict(heads=2)
    encode_all(base.enc, images)
    assert len(cached_codes(cache)) == 2


def test_damaged_file_of_codes_is_replaced(base, cache):
    images = digits('test', 28)[slice(5)]
    z = encode_all(base.enc, images)
    (file,) = cached_codes(cache)
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    assert torch.equal(encode_all(base.enc, images), z)
    assert file.read_bytes() == whole


def test_batches_of_codes_hold_each_code_once():
    z = torch.randn(10, 3)
    shuffled = torch.cat([batch for batch, _ in batches(Images(z), 5, 2)])
    assert sorted(shuffled.tolist()) == sorted(z.tolist())
    with pytest.raises(TypeError, match='float32 .N,D. for codes'):
        Images(torch.randn(2, 3, 4))


def test_sampled_codes_follow_the_seed(prior):
    z = prior.codes(5, seed=0, steps=10)
    assert z.shape == (5, 6)
    assert torch.equal(z, prior.codes(5, seed=0, steps=10))
    assert not torch.equal(z, prior.codes(5, seed=1, steps=10))


def test_clipped_sampling_of_codes_stays_in_range(prior):
    zT = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    z = prior.decode(None, zT, steps=10, clip=1.0)
    assert prior.stats.norm(z).abs().max() < 1.5
    free = prior.decode(None, zT, steps=10)
    assert prior.stats.norm(free).abs().max() > 1.5


def test_sampled_images_depend_on_the_codes_and_not_on_the_parts(base, prior):
    x = base.sample(3, prior=prior, seed=0, steps=3, bs=2)
    assert x.shape == (3, 1, 28, 28)
    assert x.abs().max() <= 1
    whole = base.sample(3, prior=prior, seed=0, steps=3)
    torch.testing.assert_close(x, whole, atol=1e-4, rtol=1e-4)
    codes = prior.codes(3, seed=1)
    assert not torch.equal(x, base.sample_codes(codes, seed=0, steps=3))


@pytest.mark.parametrize(
    'clip, first, last',
    [
        (1.0, [-1.13761, -1.0557, -1.14495], 1.13186),
        (None, [-11.5823, -5.45592, -12.1313], 9.41352),
    ],
)
def test_latent_sampler_gives_the_published_numbers(clip, first, last):
    def toy(z, t):
        time = (t - 1) / 1000
        return 0.5 * z + 0.1 * time[:, None]

    z = inp('zlat', [2, 16], 2)
    got = sample(toy, z, Schedule.constant(), pdae_times(10), clip=clip).flatten()
    ends = torch.cat([got[:3], got[-1:]])
    torch.testing.assert_close(ends, torch.tensor([*first, last]), atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------- interpolation, probes, rejection


def unit(x):
    "Vectors of length 1 over all axes but the first, flattened."
    flat = x.flatten(1)
    return flat / flat.norm(dim=1, keepdim=True)


@pytest.mark.parametrize('f', [lerp, slerp])
def test_interpolation_ends_at_its_arguments_in_float64(f):
    a, b = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(f(a, b, 0.0), a)
    torch.testing.assert_close(f(a, b, 1.0), b)
    assert f(a, b, 0.3).dtype == torch.float64


def test_slerp_keeps_the_length_and_equal_arguments():
    a, b = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    lengths = slerp(unit(a), unit(b), 0.4).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(3, dtype=torch.float64))


@pytest.fixture
def codes():
    "500 codes: (500,6)."
    return torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.fixture
def probe(codes):
    "A probe of the sign of the third number of a code, less 1."
    return fit_probe(codes, codes[:, 2] > 1)


def test_step_to_the_median_gives_the_median_logit(codes, probe):
    positives = codes[codes[:, 2] > 1]
    moved = move(codes, probe, to_median(codes, probe, positives))
    median = probe.logit(positives).median().expand(500)
    torch.testing.assert_close(probe.logit(moved), median, atol=1e-3, rtol=1e-3)


def test_step_is_in_units_of_the_square_root_of_the_width(codes, probe):
    step = probe.stats.norm(move(codes, probe, 0.5)) - probe.stats.norm(codes)
    length = torch.full((500,), 0.5 * 6**0.5)
    torch.testing.assert_close(step.norm(dim=1), length, atol=1e-3, rtol=1e-3)


def test_rejection_keeps_probable_codes_and_follows_the_seed(codes, probe):
    kept = accept(codes, probe, seed=1)
    assert 0 < len(kept) < 500
    assert (probe.prob(kept) >= 0.5).all()
    assert torch.equal(kept, accept(codes, probe, seed=1))
    assert len(accept(codes, probe, 5)) == 5


def test_rejection_accepts_with_the_probability_of_the_attribute():
    constant = Probe(torch.zeros(6), torch.logit(torch.tensor(0.75)).item(), ZStats(6))
    kept = accept(torch.randn(20_000, 6), constant)
    assert abs(len(kept) / 20_000 - 0.75) < 0.02


@pytest.fixture
def restored(base, x0):
    "The four images, encoded, inverted and decoded."
    return base.reconstruct(x0, steps=4)


def test_interpolation_of_images_ends_at_the_reconstructions(base, x0, restored):
    first, last = interpolate(base, x0[:2], x0[2:], [0, 1], 4)
    torch.testing.assert_close(first, restored[:2], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(last, restored[2:], atol=1e-3, rtol=1e-3)


def test_edit_of_size_0_is_the_reconstruction(base, x0, restored, probe):
    unchanged, changed = manipulate(base, x0, probe, [0.0, 3.0], 4)
    torch.testing.assert_close(unchanged, restored, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(unchanged, changed, atol=1e-4)


# ---------------------------------------------------------------- bad input


def one_image(labels=None, classes=()):
    "A data set of one image of 2×2 pixels."
    return Images(torch.zeros(1, 1, 2, 2).byte(), labels, classes)


BAD_INPUT = [
    (lambda z, p: p.prob(z[:, :4]), r'codes \(N,6\), got \(500, 4\)'),
    (lambda z, p: fit_probe(z, torch.zeros(500)), '500 codes are labelled 0, 0 not'),
    (
        lambda z, p: fit_probe(z, torch.arange(500) < 3, folds=5),
        '5 folds need as many codes of each class, got 3',
    ),
    (lambda z, p: fit_probe(z, torch.zeros(4)), 'a label for each'),
    (lambda z, p: fit_probe(z, torch.arange(500) % 3), 'two classes'),
    (lambda z, p: accept(z, p, 500), 'were accepted, 500 are wanted'),
    (lambda z, p: oversample(torch.ones(3).bool()), 'needs both classes'),
    (lambda z, p: ZStats(z[:1]), 'at least 2 images'),
    (lambda z, p: MLPSkipNet(6, 8, 1), 'at least 2 layers, got 1'),
    (
        lambda z, p: MLPSkipNet(6, 8, 2)(z[:, :5], torch.ones(500)),
        r'codes \(B,6\), got \(500, 5\)',
    ),
    (
        lambda z, p: attribute(digits('test'), 'eight'),
        "no attribute 'eight'; there are 0, 1, 2",
    ),
    (
        lambda z, p: attribute(one_image(torch.ones(1, 1), ['Wavy_Hair']), 'Wavy Hair'),
        "did you mean 'Wavy_Hair'",
    ),
    (lambda z, p: attribute(one_image(), '1'), 'no labels'),
    (lambda z, p: SemanticEncoder(1, 8, (1,) * 6, 28), 'to nothing'),
]


@pytest.mark.parametrize('call, message', BAD_INPUT, ids=[message for _, message in BAD_INPUT])
def test_bad_input_is_named(call, message, codes, probe):
    with pytest.raises(ValueError, match=message):
        call(codes, probe)


def test_a_latent_dpm_has_the_autoencoder_whose_codes_it_learnt(prior, base, x0):
    assert isinstance(prior.base, DiffAE)
    assert torch.equal(prior.base.encode(x0), base.encode(x0))


def test_a_latent_dpm_wants_an_autoencoder(tmp_path):
    with pytest.raises(ValueError, match='the base must be an autoencoder, got DPM'):
        train('toy_latent', latent_recipe('mnist_dpm'), out=tmp_path / 'run', log=no_log)
    assert not (tmp_path / 'run').exists()


def test_a_dpm_decodes_no_codes():
    dpm = cached_run('mnist_dpm')
    with pytest.raises(ValueError, match='this DPM is unconditional'):
        dpm.denoiser(torch.zeros(1, 6))


def test_shapes_that_do_not_fit_a_run_are_named(base, x0):
    with pytest.raises(ValueError, match=r'wants a code z \(4,6\), got \(4, 5\)'):
        diffae_denoiser(base.net, torch.zeros(4, 5))(x0, torch.ones(4))
    with pytest.raises(ValueError, match='two images of one shape'):
        interpolate(base, x0, x0[:2], [0])


def test_another_recipe_does_not_continue_a_run(coder):
    with pytest.raises(ValueError, match='another recipe'):
        train('toy_diffae', replace(RECIPE, lr=1.0), out=coder, every=2, log=no_log)
