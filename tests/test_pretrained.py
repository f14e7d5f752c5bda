"""Published checkpoints: networks from names and shapes, files of every format, hostile files."""

import copy
import io
import json
import os
import pickle
import shutil
import sys
import types
import warnings
import zipfile

import huggingface_hub.constants as hub_constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_numerics import SCHED, fingerprint, inp, official_names, second_half, weight_values

from pdae_nb.adapters import DiffusersUNet, read_official
from pdae_nb.cli import cmd_convert, main
from pdae_nb.forward import Schedule
from pdae_nb.hub import images, load, load_base, push_run
from pdae_nb.methods.diffae import DiffAE, SemanticEncoder
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.latent import LatentDPM, MLPSkipNet, ZStats
from pdae_nb.methods.pdae import PDAE, EpsAndScore, pdae_loss
from pdae_nb.model import model_fingerprint
from pdae_nb.networks import ConvEncoder, GradientEstimator
from pdae_nb.pretrained import (
    OfficialHead,
    from_official,
    load_dpm,
    load_official,
    load_stats,
    to_official,
)
from pdae_nb.unet import UNet


def no_log(message):
    "A log function that drops its message."


# ---------------------------------------------------------------- names and shapes


def official_shape(key, v):
    "Shape of a weight in the official implementations."
    if key.endswith(('qkv.weight', 'proj_out.weight')):
        return v.shape[:3]
    if key == 'encoder.out.3.weight':
        return (*v.shape, 1, 1)
    return v.shape


def names_of(net):
    "Official names of the layers of a network, in the order of our modules."
    if isinstance(net, GradientEstimator):
        return ['label_emb', *second_half(net.up, 'shift_')]
    return official_names(net)


def state_of(net):
    """Official name -> weight in the official shape, with the values of the published outputs.

    The official decoder of PDAE is the frozen U-Net and the gradient estimator together.
    """
    if isinstance(net, EpsAndScore):
        return state_of(net.base.net) | state_of(net.G)
    keys = [f'{name}.{kind}' for name in names_of(net) for kind in ('weight', 'bias')]
    state = {}
    for key, v in zip(keys, net.state_dict().values(), strict=True):
        values = torch.from_numpy(weight_values(key, v))
        state[key] = values.reshape(official_shape(key, v)).float()
    return state


def assert_fingerprint(x, want):
    np.testing.assert_allclose(fingerprint(x), want, atol=1e-5)


def assert_equal_tensors(got, want):
    "`got` holds every tensor of `want`, with the same values."
    for name, v in want.items():
        assert torch.equal(got[name], v.float()), name


def pair(unet, G):
    "A frozen U-Net and its gradient estimator as one function of (xt, t, z)."
    size = unet.config['size']
    return EpsAndScore(DPM(unet, SCHED, (unet.config['c'], size, size)), G)


def new_pair(unet, z_dim):
    "A U-Net with a new gradient estimator."
    return pair(unet, GradientEstimator.on(unet, z_dim))


def n_params(*nets):
    return sum(p.numel() for net in nets for p in net.parameters())


X = inp('x', [2, 3, 32, 32], 1)
T = torch.tensor([8, 614])  # 7 and 613 in the official implementations
SMALL = dict(c=3, ch=32, mult=(1, 2, 3), size=32, attn=(16,))
UNET_OUTPUT = [0.00864899, 0.448099, -0.304033, -0.169668, 0.423158, -0.133011, 0.0911598, 0.173675]


def small_autoencoder():
    "Encoder and U-Net of a small Diff-AE."
    enc = SemanticEncoder(3, 32, (1, 2, 2), 32, 64, (16,))
    unet = UNet(c=3, ch=32, mult=(1, 2), size=32, dz=64, attn=(16,), dt=64, z_shift=False)
    return enc, unet


@torch.no_grad()
@pytest.mark.parametrize(
    'hints, want',
    [
        (dict(heads=1), UNET_OUTPUT),
        (
            dict(heads=4),
            [0.00796018, 0.446576, -0.233284, -0.107622, 0.474691, -0.218734, 0.0925067, 0.15607],
        ),
        (
            dict(heads=4, new_order=True),
            [0.00906511, 0.447228, -0.210317, -0.0394762, 0.532006, -0.0487052, 0.170024, 0.165108],
        ),
    ],
    ids=['1 head', '4 heads', '4 heads, new order'],
)
def test_unet_gives_the_published_output(hints, want):
    parts = from_official(state_of(UNet(**SMALL)), size=32, **hints)
    assert list(parts) == ['dpm']
    assert n_params(parts['dpm']) == 2_885_827
    assert_fingerprint(parts['dpm'](X, T), want)


@torch.no_grad()
def test_gradient_estimator_gives_the_published_output():
    parts = from_official(state_of(new_pair(UNet(**SMALL), 16)), size=32)
    assert set(parts) == {'dpm', 'G'}
    eps, score = pair(parts['dpm'], parts['G'])(X, T, inp('z', [2, 16], 1.5))
    assert_fingerprint(eps, UNET_OUTPUT)
    assert_fingerprint(
        score,
        [-0.244022, 0.514594, 0.269737, 0.0804855, -0.323166, -0.190722, 0.196672, 0.235316],
    )


@torch.no_grad()
@pytest.mark.parametrize(
    'size, want',
    [
        (
            128,
            [-0.0361562, 0.502284, 0.283429, -0.235663, -0.485897, -0.0508718, 0.265137, -0.43104],
        ),
        (
            64,
            [-0.0238055, 0.501968, 0.422983, 0.193701, -0.467484, -0.348888, -0.0205151, -0.206516],
        ),
    ],
)
def test_pdae_encoder_gives_the_published_output(size, want):
    enc = from_official(state_of(ConvEncoder(3, size)))['enc']
    assert enc.config['size'] == size
    assert_fingerprint(enc(inp(f'x{size}', [1, 3, size, size], 1)), want)


@torch.no_grad()
def test_diffae_autoencoder_gives_the_published_outputs():
    enc, unet = small_autoencoder()
    parts = from_official(state_of(enc) | state_of(unet), size=32)
    assert n_params(*parts.values()) == 1_420_259
    z = parts['enc'](inp('x0', [2, 3, 32, 32], 1))
    assert_fingerprint(
        z, [-0.0526045, 0.334231, -0.15551, 0.241757, -0.401154, -0.0561932, 0.0693927, 0.390651]
    )
    assert_fingerprint(
        parts['unet'](X, T, z),
        [0.0155462, 0.451765, -0.1358, -0.0761019, 0.219588, 0.483503, 0.235028, 0.291843],
    )
    assert_fingerprint(
        parts['unet'](X, T, inp('z', [2, 64], 1.5)),
        [0.0118432, 0.454347, 0.0743938, 0.156425, 0.133836, -0.00374633, -0.0308769, 0.0984921],
    )


@torch.no_grad()
def test_latent_network_with_second_names_gives_the_published_output():
    state = state_of(MLPSkipNet(16, 32, 4))
    aliases = {
        name.replace('linear_emb', 'cond_layers.1'): v
        for name, v in state.items()
        if 'linear_emb' in name
    }
    assert aliases
    net = from_official(state | aliases)['net']
    assert_fingerprint(
        net(inp('zlat', [2, 16], 1), T),
        [-0.0481797, 0.626398, 0.539364, -0.0566622, 0.407236, -1.90817, 0.47236, 0.0128114],
    )


@pytest.mark.parametrize(
    'net',
    [
        UNet(**SMALL),
        new_pair(UNet(**SMALL), 16),
        ConvEncoder(3, 64),
        SemanticEncoder(3, 32, (1, 2, 2), 32, 64, (16,)),
        UNet(c=3, ch=32, mult=(1, 2), size=32, dz=64, dt=64, z_shift=False),
    ],
    ids=['UNet', 'EpsAndScore', 'ConvEncoder', 'SemanticEncoder', 'conditional UNet'],
)
def test_to_official_gives_the_published_names_and_shapes(net):
    ours = {name: v.shape for name, v in to_official(net).items()}
    theirs = {name: v.shape for name, v in state_of(net).items()}
    assert ours == theirs


def drop_a_block(state):
    for name in list(state):
        if name.startswith('input_blocks.2.'):
            del state[name]


MISFITS = {
    'missing weight': (
        lambda state: state.pop('out.2.bias'),
        r'1 tensors are missing \(out.2.bias\) and 0 are left over',
    ),
    'extra weight': (
        lambda state: state.update(stray=torch.zeros(1)),
        r'0 tensors are missing \(\) and 1 are left over \(stray\)',
    ),
    'wrong shape': (
        lambda state: state.update({'out.0.weight': torch.zeros(3)}),
        'has shape',
    ),
    'NaN': (
        lambda state: state['out.0.weight'].fill_(float('nan')),
        '32 of 32 numbers of up.out.0.weight are NaN',
    ),
    'wrong number of channels': (
        lambda state: state.update({'input_blocks.0.0.weight': torch.zeros(16, 3, 3, 3)}),
        'no multiples',
    ),
    'missing block': (drop_a_block, 'no whole number of levels'),
    'added time': (
        lambda state: state.update({'input_blocks.1.0.emb_layers.1.weight': torch.zeros(32, 128)}),
        'adds the time instead of scaling',
    ),
}


@pytest.mark.parametrize('change, message', MISFITS.values(), ids=MISFITS.keys())
def test_weights_that_do_not_fit_are_named(change, message):
    state = state_of(UNet(**SMALL))
    change(state)
    with pytest.raises(ValueError, match=message):
        from_official(state, size=32)


# ---------------------------------------------------------------- formats


class ModelCheckpoint:
    "Stands for the class of PyTorch Lightning that Diff-AE's checkpoints name."


ModelCheckpoint.__module__ = 'pytorch_lightning.callbacks.model_checkpoint'


def save_lightning(contents, path, monkeypatch):
    "Write a checkpoint as PyTorch Lightning does. It names `ModelCheckpoint`."
    package, callbacks, module = ModelCheckpoint.__module__.split('.')
    header = {
        'epoch': 1,
        'global_step': 11,
        'pytorch-lightning_version': '1.4.5',
        'callbacks': {ModelCheckpoint: dict(best_model_score=None)},
        'optimizer_states': [],
        'lr_schedulers': [],
    }
    with monkeypatch.context() as m:
        for name in (package, f'{package}.{callbacks}', f'{package}.{callbacks}.{module}'):
            m.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[ModelCheckpoint.__module__].ModelCheckpoint = ModelCheckpoint
        torch.save(header | contents, path)


def prefixed(prefix, state):
    return {f'{prefix}{name}': v for name, v in state.items()}


def zeros_like(state):
    return {name: torch.zeros_like(v) for name, v in state.items()}


def random_half_state(net):
    "Random weights in half precision under the official names."
    return {name: (torch.rand(v.shape) * 0.02).half() for name, v in to_official(net).items()}


@pytest.mark.slow
def test_pdae_checkpoint_at_its_real_size(tmp_path):
    "FFHQ-128: 177 million weights in half precision, with the published names and counts."
    with torch.device('meta'):
        dpm = UNet(c=3, ch=128, mult=(1, 1, 2, 3, 4), size=128, attn=(16,))
        decoder_pair = new_pair(dpm, 512)
        enc = ConvEncoder(3, 128)
    decoder = random_half_state(decoder_pair)
    encoder = random_half_state(enc)
    assert len(decoder) == 744
    assert len(encoder) == 28
    assert sum(v.numel() for v in decoder.values()) == 177_140_870
    new = [v for name, v in decoder.items() if name.startswith(('shift_', 'label_emb'))]
    assert sum(v.numel() for v in new) == 78_522_371
    file = tmp_path / 'checkpoint.pt'
    torch.save(dict(step=500_000, ema_encoder=encoder, ema_decoder=decoder), file)
    model = load_official(file, log=no_log)
    assert isinstance(model, PDAE)
    assert model.shape == (3, 128, 128)
    assert model.base.net.config['attn'] == (16,)
    assert model.base.net.config['size'] == 128
    assert not any(p.requires_grad for p in model.base.parameters())
    assert n_params(model) == n_params(model.enc, model.G)
    assert model.enc.config['heads'] == 4
    assert model.card.source == 'checkpoint.pt, step 500000'
    assert_equal_tensors(to_official(model.eps_and_score), decoder)
    assert_equal_tensors(to_official(model.enc), encoder)


def diffae_weights():
    "State dict of a Diff-AE checkpoint: averaged weights; the raw weights are zero."
    enc, unet = small_autoencoder()
    averaged = state_of(unet) | state_of(enc)
    x_T = dict(x_T=torch.zeros(32, 3, 32, 32))
    return prefixed('ema_model.', averaged) | prefixed('model.', zeros_like(averaged)) | x_T


def test_diffae_checkpoint_gives_the_averaged_weights(tmp_path, monkeypatch):
    file = tmp_path / 'last.ckpt'
    config = dict(model_conf=dict(image_size=32, num_heads=1))
    contents = dict(state_dict=diffae_weights(), hyper_parameters=config)
    save_lightning(contents, file, monkeypatch)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    model = load_official(file)
    enc, unet = small_autoencoder()
    assert isinstance(model, DiffAE)
    assert_equal_tensors(to_official(model.net), state_of(unet))
    assert_equal_tensors(to_official(model.enc), state_of(enc))


def test_converted_latent_dpm_of_diffae_samples_images(tmp_path, monkeypatch):
    file = tmp_path / 'latent.ckpt'
    stats = dict(conds_mean=torch.randn(1, 64), conds_std=torch.rand(1, 64) + 0.5)
    net = prefixed('ema_model.latent_net.', state_of(MLPSkipNet(64, 32, 3)))
    weights = diffae_weights() | stats | net
    config = dict(model_conf=dict(image_size=32))
    save_lightning(dict(state_dict=weights, hyper_parameters=config), file, monkeypatch)
    runs = tmp_path / 'runs'
    autoencoder = str(runs / 'faces_diffae')
    cmd_convert(str(file), autoencoder, 'autoencoder', data='faces')
    out = str(runs / 'faces_diffae_latent')
    with pytest.raises(ValueError, match='name that run as base'):
        cmd_convert(str(file), out)
    said = cmd_convert(str(file), out, base=autoencoder)
    assert set(said['networks']) == {'net', 'stats'}
    latent = load(out)
    assert isinstance(latent, LatentDPM)
    assert model_fingerprint(latent.base) == model_fingerprint(load(autoencoder))
    assert latent.base.card.recipe == dict(data='faces')
    assert torch.equal(latent.stats.mean, stats['conds_mean'][0])
    assert torch.equal(latent.stats.std, stats['conds_std'][0])
    sampled = latent.base.decode(latent.codes(2, 0, steps=2), torch.randn(2, 3, 32, 32), steps=2)
    assert sampled.shape == (2, 3, 32, 32)
    assert sampled.isfinite().all()


@pytest.fixture
def small_pdae():
    "Encoder, and the pair of frozen U-Net and gradient estimator, of a PDAE of 28×28 pixels."
    dpm = UNet(c=1, ch=8, mult=(1, 2), size=28, n_res=1, groups=8)
    return ConvEncoder(1, 28, 6, groups=8), new_pair(dpm, 6)


@pytest.fixture
def converted(small_pdae, tmp_path):
    "Folder of the run that was converted from a checkpoint of this PDAE."
    enc, decoder = small_pdae
    torch.save(dict(ema_encoder=state_of(enc), ema_decoder=state_of(decoder)), tmp_path / 'c.pt')
    out = tmp_path / 'mine_pdae'
    cmd_convert(str(tmp_path / 'c.pt'), str(out), size=28, groups=8)
    return out


def test_convert_overwrites_no_folder(converted):
    file = converted.parent / 'c.pt'
    with pytest.raises(ValueError, match='is there already'):
        cmd_convert(str(file), str(converted), size=28)


def test_convert_stores_all_networks_in_float32(small_pdae, converted):
    enc, decoder = small_pdae
    model = load(converted)
    assert isinstance(model, PDAE)
    assert model.base.path == converted / 'base'
    assert_equal_tensors(to_official(model.enc), state_of(enc))
    assert_equal_tensors(to_official(model.eps_and_score), state_of(decoder))


@torch.no_grad()
def test_converted_pdae_counts_timesteps_from_one(small_pdae, converted):
    _, official = small_pdae
    model = load(converted)
    xt = torch.rand(2, 1, 28, 28) * 2 - 1
    t = torch.tensor([2, 700])
    z = model.encode(xt)
    parts = from_official(state_of(official), size=28, groups=8, lag=0)
    eps, score = model.eps_and_score(xt, t, z)
    want_eps, want_score = pair(parts['dpm'], parts['G'])(xt, t - 1, z)
    assert torch.allclose(eps, want_eps, atol=1e-5)
    assert torch.allclose(score, want_score, atol=1e-5)
    assert want_score.any()


def test_converted_pdae_reconstructs_and_trains(converted):
    model = load(converted)
    x0 = torch.rand(2, 1, 28, 28) * 2 - 1
    assert torch.equal(images(x0, model), x0)
    back = model.reconstruct(x0, steps=2)
    assert back.shape == x0.shape
    assert not torch.equal(back, x0)
    assert torch.isfinite(pdae_loss(model.enc, model.eps_and_score, x0, model.sched))


VERSION_1_PDAE = dict(  # of `run.json`
    name='old_pdae',
    parts=dict(
        enc=dict(
            module='pdae_nb.pdae',
            kind='ConvEncoder',
            config=dict(c=1, size=28, z_dim=6, groups=8, heads=4),
        ),
        G=dict(
            module='pdae_nb.pdae',
            kind='GradientEstimator',
            config=dict(
                dpm=dict(
                    module='pdae_nb.unet',
                    kind='UNet',
                    config=dict(c=1, ch=8, mult=[1, 2], size=28, n_res=1, groups=8),
                ),
                z_dim=6,
                drop=0.0,
            ),
        ),
        dpm=dict(within='G.dpm'),
    ),
    recipe=dict(data='mnist', net=dict(dpm='old_dpm', z_dim=6, groups=8)),
    result=dict(test_noise_mse=0.5),
)


def test_convert_rewrites_a_run_folder_of_version_1(small_pdae, tmp_path):
    enc, decoder = small_pdae
    folder = tmp_path / 'old_pdae'
    folder.mkdir()
    (folder / 'run.json').write_text(json.dumps(VERSION_1_PDAE))
    frozen = prefixed('dpm.', decoder.base.net.state_dict())
    save_file(decoder.G.state_dict() | frozen, folder / 'G.safetensors')
    save_file(enc.state_dict(), folder / 'enc.safetensors')
    save_file(dict(beta=SCHED.beta), folder / 'sched.safetensors')
    said = cmd_convert(str(folder), str(tmp_path / 'new_pdae'))
    assert set(said['networks']) == {'enc', 'G'}
    record = json.loads((tmp_path / 'new_pdae/run.json').read_text())
    assert record['format'] == 2
    assert record['base']['name'] == 'old_dpm'
    model = load(tmp_path / 'new_pdae')
    assert model.card.result == dict(test_noise_mse=0.5)
    assert model.card.recipe['base'] == 'old_dpm'
    assert_equal_tensors(model.enc.state_dict(), enc.state_dict())
    assert_equal_tensors(model.G.state_dict(), decoder.G.state_dict())
    assert_equal_tensors(model.base.net.state_dict(), decoder.base.net.state_dict())


@pytest.mark.parametrize(
    'kind, contents, reports_raw_weights',
    [
        (
            '.pt',
            lambda state: dict(step=3, denoise_fn=zeros_like(state), ema_denoise_fn=state),
            False,
        ),
        ('.pt', lambda state: dict(denoise_fn=state), True),
        ('.pt', lambda state: state, False),
        ('.safetensors', lambda state: state, False),
    ],
    ids=['averaged and raw weights', 'raw weights', 'state dict', 'safetensors'],
)
def test_files_of_a_dpm(tmp_path, kind, contents, reports_raw_weights):
    file = tmp_path / f'file{kind}'
    save = save_file if kind == '.safetensors' else torch.save
    save(contents(state_of(UNet(**SMALL))), file)
    said = []
    model = load_official(file, size=32, log=said.append)
    assert type(model) is DPM
    assert model.shape == (3, 32, 32)
    messages = ' '.join(said)
    assert ('no averaged weights' in messages) == reports_raw_weights
    assert 'heads' in messages
    assert 'noise schedule' in messages
    with torch.no_grad():
        assert_fingerprint(model.denoiser()(X, T), UNET_OUTPUT)


def test_statistics_of_codes_from_a_file_of_their_own(tmp_path):
    mean = torch.arange(16.0)
    std = torch.arange(1.0, 17.0)
    torch.save(dict(mean=mean, std=std), tmp_path / 'stats.pt')
    torch.save(dict(ema_latent_denoise_fn=state_of(MLPSkipNet(16, 32, 3))), tmp_path / 'net.pt')
    latent = load_official(tmp_path / 'net.pt', stats=tmp_path / 'stats.pt', log=no_log)
    assert isinstance(latent, LatentDPM)
    assert latent.base is None
    assert repr(latent.sched) == repr(Schedule.constant())
    assert torch.equal(latent.stats.std, std)
    assert torch.equal(latent.stats.denorm(torch.zeros(1, 16))[0], mean)
    assert torch.equal(load_stats(tmp_path / 'stats.pt').std, std)
    with pytest.raises(ValueError, match='no mean and standard deviation'):
        load_official(tmp_path / 'net.pt', stats=tmp_path / 'net.pt', log=no_log)
    with pytest.raises(ValueError, match='no mean and standard deviation'):
        load_official(tmp_path / 'net.pt', log=no_log)
    with pytest.raises(ValueError, match='only the mean and standard deviation'):
        load_official(tmp_path / 'stats.pt', log=no_log)


def test_a_latent_dpm_of_other_codes_than_the_base_has_is_refused(small_pdae, tmp_path):
    enc, decoder = small_pdae
    stats = dict(mean=torch.zeros(16), std=torch.ones(16))
    file = tmp_path / 'net.pt'
    torch.save(stats | dict(ema_latent_denoise_fn=state_of(MLPSkipNet(16, 32, 3))), file)
    pdae = PDAE(enc, decoder.G, decoder.base)
    with pytest.raises(ValueError, match='codes of width 16, .* codes of width 6'):
        load_official(file, base=pdae, log=no_log)
    with pytest.raises(ValueError, match='must be an autoencoder, got DPM'):
        load_official(file, base=decoder.base, log=no_log)


def test_an_encoder_alone_is_no_model(small_pdae, tmp_path):
    enc, _ = small_pdae
    torch.save(dict(ema_encoder=state_of(enc)), tmp_path / 'enc.pt')
    with pytest.raises(ValueError, match='holds enc, which make no model'):
        load_official(tmp_path / 'enc.pt', groups=8, log=no_log)


def test_the_base_of_a_pdae_file_can_be_loaded_alone(small_pdae, tmp_path):
    enc, decoder = small_pdae
    torch.save(dict(ema_encoder=state_of(enc), ema_decoder=state_of(decoder)), tmp_path / 'c.pt')
    dpm = load_dpm(tmp_path / 'c.pt', size=28, groups=8, log=no_log)
    assert type(dpm) is DPM
    assert_equal_tensors(to_official(dpm.net), state_of(decoder.base.net))


def test_linear_classifier_from_a_file(tmp_path):
    weights = dict(weight=torch.eye(3, 16), bias=torch.arange(3.0))
    file = tmp_path / 'classifier.pt'
    torch.save(dict(ema_classifier=weights), file)
    model = load_official(file, log=no_log)
    assert isinstance(model, OfficialHead)
    assert model.stats is None
    cmd_convert(str(file), str(tmp_path / 'run'))
    for head in (model.head, load(tmp_path / 'run').head):
        probe = head.probe(1, ZStats(16))
        assert torch.equal(probe.w, torch.eye(3, 16)[1])
        assert probe.b == 1
    with pytest.raises(ValueError, match='holds a OfficialHead, no DPM'):
        load_dpm(file, log=no_log)


# ---------------------------------------------------------------- hostile files


class CallsSystem:
    "Runs a shell command when it is unpickled."

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)


class CallsEval:
    "Evaluates an expression when it is unpickled."

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return eval, (f'open({self.mark!r}, "w")',)


class HidesInATensor:
    "Runs a shell command as the first argument of a function that tensors need."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        arguments = (CallsSystem(self.mark), 0, (1,), (1,), False, {})
        return torch._utils._rebuild_tensor_v2, arguments


class Lookalike:
    "Builds the one class of PyTorch Lightning that is accepted, in a place where none belongs."

    def __reduce__(self):
        return ModelCheckpoint, ()


def saved(o, **kw):
    "The bytes that `torch.save` writes."
    file = io.BytesIO()
    torch.save(o, file, **kw)
    return file.getvalue()


def saved_as_pickle(o):
    "The bytes of `torch.save` in the format before torch 1.6, which is no zip archive."
    return saved(o, _use_new_zipfile_serialization=False)


def repacked(archive, compression=zipfile.ZIP_STORED, twice=False):
    "The same zip archive, compressed, or with its first member twice."
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as a, zipfile.ZipFile(out, 'w', compression) as b:
        for member in a.infolist():
            b.writestr(member.filename, a.read(member))
        if twice:
            with warnings.catch_warnings(action='ignore'):
                b.writestr(a.infolist()[0].filename, b'x')
    return out.getvalue()


PLACES = {
    'alone': lambda o: o,
    'beside a tensor': lambda o: dict(state_dict=dict(a=torch.zeros(1), b=o)),
    'in lists': lambda o: {'callbacks': {'x': [[(o,)]]}},
    'as a key': lambda o: {o: 1},
}


@pytest.mark.parametrize('save', [saved, saved_as_pickle])
@pytest.mark.parametrize('attack', [CallsSystem, CallsEval, HidesInATensor])
@pytest.mark.parametrize('place', PLACES.values(), ids=PLACES.keys())
def test_no_function_that_a_file_names_is_called(tmp_path, save, attack, place):
    mark = tmp_path / 'it_ran'
    file = tmp_path / 'f.ckpt'
    file.write_bytes(save(place(attack(mark))))
    with pytest.raises(ValueError, match='cannot be read safely'):
        load_official(file)
    assert not mark.exists()


@pytest.mark.parametrize('attack', [CallsSystem, CallsEval, HidesInATensor])
def test_an_attack_works_on_an_unsafe_reader(tmp_path, attack):
    "Otherwise the test above could not fail."
    mark = tmp_path / 'it_ran'
    data = pickle.dumps(attack(mark))
    try:
        pickle.loads(data)
    except AttributeError:
        assert attack is HidesInATensor  # the result of os.system is no storage of a tensor
    assert mark.exists()


NINE = dict(a=torch.zeros(9))
THOUSAND = dict(a=torch.zeros(1000))
DAMAGED = {
    'deflated': (repacked(saved(NINE), zipfile.ZIP_DEFLATED), 'is compressed'),
    'member twice': (repacked(saved(NINE), twice=True), 'two members of one name'),
    'cut at the end': (saved(THOUSAND)[:-100], 'cannot be read safely'),
    'cut at the start': (saved(THOUSAND)[:50], 'cannot be read safely'),
    'pickle cut at the end': (saved_as_pickle(THOUSAND)[:-100], 'cannot be read safely'),
    'empty': (b'', 'cannot be read safely'),
    'zeros after a zip header': (b'PK\3\4' + b'\0' * 99, 'cannot be read safely'),
    'list': (saved([torch.zeros(3)]), 'holds a list'),
    'tensor': (saved(torch.zeros(3)), 'holds a Tensor'),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('data, message', DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused(tmp_path, data, message):
    (tmp_path / 'f.pt').write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_official(tmp_path / 'f.pt')


def test_a_plain_pickle_is_refused(tmp_path):
    mark = tmp_path / 'it_ran'
    (tmp_path / 'f.pt').write_bytes(pickle.dumps(CallsSystem(mark)))
    with pytest.raises(ValueError, match='cannot be read safely'):
        load_official(tmp_path / 'f.pt')
    assert not mark.exists()


def test_nested_references_take_no_exponential_time(tmp_path):
    nested = [torch.zeros(1)]
    for _ in range(60):
        nested = [nested] * 8  # 8^60 ways to one tensor
    torch.save(dict(state_dict=dict(a=nested)), tmp_path / 'f.pt')
    with pytest.raises(ValueError, match='none of the networks|no weights'):
        load_official(tmp_path / 'f.pt', log=no_log)


@pytest.fixture
def zip_bomb(tmp_path):
    "A small file whose only member has 100 MB when it is decompressed."
    file = tmp_path / 'zip.pt'
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('archive/data.pkl', bytes(10**8))
    assert file.stat().st_size < 200_000
    return file


def test_a_zip_bomb_is_refused(zip_bomb):
    with pytest.raises(ValueError, match='is compressed'):
        load_official(zip_bomb)


def test_a_zip_bomb_that_only_torch_takes_for_an_archive_is_refused(zip_bomb):
    zip_bomb.write_bytes(zip_bomb.read_bytes() + b'PK\5\6')
    with pytest.raises(ValueError, match='cannot be read safely'):
        load_official(zip_bomb)


def test_a_member_that_claims_2_gib_is_refused(tmp_path):
    data = bytearray(saved(NINE))
    entry = data.rfind(b'PK\1\2')  # of the last member in the central directory
    size = slice(entry + 24, entry + 28)
    data[size] = (2**31).to_bytes(4, 'little')
    (tmp_path / 'f.pt').write_bytes(data)
    with pytest.raises(ValueError, match='claims to hold'):
        load_official(tmp_path / 'f.pt')


def test_tensors_larger_than_the_file_are_refused(tmp_path):
    state = state_of(UNet(**SMALL))
    state['out.2.bias'] = torch.zeros(1).expand(10**12)
    stats = dict(mean=torch.zeros(1).expand(10**10), std=torch.ones(1).expand(10**10))
    for contents in (state, stats):
        torch.save(contents, tmp_path / 'f.pt')
        with pytest.raises(ValueError, match='bytes in a file of'):
            load_official(tmp_path / 'f.pt')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('shape', [(10**5, 1), (10**6, 0)])
def test_a_network_of_many_gigabytes_is_not_built_without_its_weights(tmp_path, shape):
    state = {f'layers.{i}.linear.weight': torch.zeros(shape) for i in range(3)}
    torch.save(state, tmp_path / 'f.pt')
    with pytest.raises(ValueError, match='are missing'):
        load_official(tmp_path / 'f.pt', log=no_log)


def test_a_pickle_that_asks_for_2_gib_is_refused(tmp_path):
    call = b'\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.'
    (tmp_path / 'f.pt').write_bytes(call)
    with pytest.raises(ValueError, match='it wants __builtin__.bytearray'):
        load_official(tmp_path / 'f.pt')


def test_the_accepted_class_of_lightning_builds_an_empty_object(tmp_path, monkeypatch):
    contents = dict(state_dict={}, extra=Lookalike())
    save_lightning(contents, tmp_path / 'f.ckpt', monkeypatch)
    extra = read_official(tmp_path / 'f.ckpt')['extra']
    assert type(extra).__name__ == '_Callback'
    assert not vars(extra)


# ---------------------------------------------------------------- diffusers


@pytest.fixture(scope='module')
def diffusers():
    "The package diffusers; without it the tests are skipped."
    return pytest.importorskip('diffusers')


@pytest.fixture(scope='module')
def unet2d(diffusers):
    "A small U-Net of diffusers with random weights."
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
    )
    return net.eval()


@pytest.mark.parametrize('safe', [True, False], ids=['safetensors', 'pickle'])
@pytest.mark.parametrize('folders', [('unet', 'scheduler'), ('.', '.')], ids=['pipeline', 'U-Net'])
def test_a_diffusers_folder_gives_network_and_schedule(diffusers, unet2d, tmp_path, safe, folders):
    unet_folder, scheduler_folder = folders
    unet2d.save_pretrained(tmp_path / unet_folder, safe_serialization=safe)
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule='squaredcos_cap_v2')
    scheduler.save_pretrained(tmp_path / scheduler_folder)
    model = load_dpm(tmp_path, log=no_log)
    x = torch.randn(2, 3, 32, 32)
    t = torch.tensor([1, 1000])
    with torch.no_grad():
        assert torch.allclose(model.denoiser()(x, t), unet2d(x, t - 1).sample, atol=1e-5)
    np.testing.assert_allclose(model.sched.alpha_bar, Schedule.cosine().alpha_bar, atol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.path is None
    assert model.card.source == str(tmp_path)


def test_nan_in_a_diffusers_model_is_named(unet2d, tmp_path):
    bad = copy.deepcopy(unet2d)
    bad.conv_in.bias.data[3] = float('nan')
    bad.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='conv_in.bias holds numbers that are NaN'):
        load_dpm(tmp_path, log=no_log)
    with pytest.raises(ValueError, match='in_memory: conv_in.bias holds'):
        load_dpm(bad, log=no_log)


def clone_weights(net):
    return {name: v.clone() for name, v in net.state_dict().items()}


@pytest.mark.slow
def test_pdae_trains_on_a_diffusers_dpm_and_leaves_it_unchanged(unet2d):
    torch.manual_seed(0)
    dpm = load_dpm(unet2d)
    before = clone_weights(dpm)
    model = PDAE(ConvEncoder(3, 32, 8, groups=8), GradientEstimator.on(dpm.net, 8), dpm).train()
    opt = torch.optim.Adam(model.trainable(), 3e-3)
    x0 = inp('d', [4, 3, 32, 32], 1)
    eps = inp('e', [4, 3, 32, 32], 1.7)
    t = torch.tensor([50, 300, 600, 900])
    losses = []
    for _ in range(12):
        opt.zero_grad()
        loss = pdae_loss(model.enc, model.eps_and_score, x0, SCHED, t=t, eps=eps)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    for name, v in dpm.state_dict().items():
        assert torch.equal(v, before[name]), name


@torch.no_grad()
def test_a_stored_pdae_on_a_diffusers_dpm_decodes_as_before(unet2d, tmp_path):
    torch.manual_seed(0)
    dpm = load_dpm(unet2d)
    enc = ConvEncoder(3, 32, 8, groups=8)
    model = PDAE(enc, GradientEstimator.on(dpm.net, 8), dpm).eval()
    for p in model.G.up.parameters():
        p.add_(0.1 * torch.randn_like(p))
    x0 = inp('d', [4, 3, 32, 32], 1)
    t = torch.tensor([50, 300, 600, 900])
    want = model.denoiser(model.encode(x0))(x0, t)
    model.save(tmp_path / 'guest_pdae', bundle=True, dtype=torch.float32)
    again = load(tmp_path / 'guest_pdae')
    assert isinstance(again.base.net, DiffusersUNet)
    assert again.eps_and_score.base is again.base
    assert torch.allclose(again.denoiser(again.encode(x0))(x0, t), want, atol=1e-5)
    assert not torch.allclose(dpm.denoiser()(x0, t), want, atol=1e-2)


def test_the_command_convert_takes_a_diffusers_folder(unet2d, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    unet2d.save_pretrained(tmp_path / 'theirs')
    out = tmp_path / 'runs/theirs_dpm'
    assert main(['convert', str(tmp_path / 'theirs'), str(out)]) == 0
    assert 'DiffusersUNet' in capsys.readouterr().out
    assert load(out).net.config['size'] == 32


def test_a_base_is_loaded_from_any_source(unet2d, converted, tmp_path):
    unet2d.save_pretrained(tmp_path / 'theirs')
    x = torch.randn(2, 3, 32, 32)
    t = torch.tensor([1, 1000])
    for source in (unet2d, tmp_path / 'theirs', str(tmp_path / 'theirs')):
        base = load_base(source, log=no_log)
        with torch.no_grad():
            assert torch.allclose(base.denoiser()(x, t), unet2d(x, t - 1).sample, atol=1e-5)
    assert load_base(base) is base
    assert load_base('mnist_dpm').card.name == 'mnist_dpm'
    assert isinstance(load_base(converted), PDAE)
    from_file = load_base(converted.parent / 'c.pt', size=28, groups=8, log=no_log)
    assert model_fingerprint(from_file) == model_fingerprint(load(converted).base)


def test_a_name_without_run_is_refused():
    with pytest.raises(FileNotFoundError, match='no run'):
        load_base('nowhere_dpm')


# ---------------------------------------------------------------- the Hub


class FakeHub:
    "Replaces the client of the Hub. It stores uploaded files as the cache of the Hub does."

    def __init__(self, root):
        self.root = root

    def create_repo(self, repo, exist_ok):
        folder = self.root / f'models--{repo.replace("/", "--")}'
        self.snapshot = folder / 'snapshots/0'
        self.snapshot.mkdir(parents=True)
        (folder / 'refs').mkdir()
        (folder / 'refs/main').write_text('0')

    def upload_folder(self, folder_path, repo_id):
        shutil.copytree(folder_path, self.snapshot, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "The Hub without a network: its cache is a temporary folder."
    monkeypatch.setattr(hub_constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(hub_constants, 'HF_HUB_OFFLINE', True)
    return FakeHub(tmp_path)


def test_model_card_of_a_pushed_run_has_facts_and_code_that_runs(hub):
    push_run('mnist_pdae', 'someone/digits-pdae', api=hub)
    card = (hub.snapshot / 'README.md').read_text()
    mse = load('mnist_pdae').card.result['test_noise_mse']
    for words in (
        'license: "apache-2.0"',
        'mnist',
        '256,000 images',
        f'{mse:.4g}',
        'PDAE',
        "pdae_nb.load('someone/digits-pdae')",
    ):
        assert words in card
    code = card.split('```python\n')[1].split('```')[0]
    names = {}
    exec(code, names)
    assert names['model'].card.name == 'mnist_pdae'
    with pytest.raises(ValueError, match='user/name'):
        push_run('mnist_pdae', 'digits', api=hub)


def test_a_pushed_run_loads_from_the_hub(hub):
    push_run('mnist_pdae', 'someone/digits-pdae', api=hub)
    here = load('mnist_pdae')
    there = load('someone/digits-pdae')
    assert_equal_tensors(there.state_dict(), here.state_dict())
    assert_equal_tensors(there.base.state_dict(), here.base.state_dict())
    assert there.base.path == hub.snapshot / 'base'  # the upload holds the base, too
    assert load_base('someone/digits-pdae').card.name == 'mnist_pdae'
    with pytest.raises(FileNotFoundError, match='the Hub did not give it either'):
        load('someone/nothing')
