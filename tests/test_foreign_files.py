"""Checkpoints of other programs: prefixes, wrappers, precisions, damage, absurd sizes."""

import json
import zipfile

import pytest
import torch

from pdae_nb.adapters import read_official
from pdae_nb.files import write_tensors
from pdae_nb.forward import Schedule
from pdae_nb.hub import load
from pdae_nb.methods.dpm import DPM
from pdae_nb.networks import ConvEncoder, GradientEstimator
from pdae_nb.pretrained import load_dpm, to_official
from pdae_nb.unet import UNet

NET = dict(c=1, ch=8, mult=(1, 2), n_res=1, size=14, groups=8)
HINTS = dict(size=14, groups=8, lag=0)


@pytest.fixture(scope='module')
def dpm():
    torch.manual_seed(0)
    net = UNet(**NET)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return DPM(net, Schedule.linear(), (1, 14, 14)).eval()


def same_noise(a, b):
    "Whether two DPMs predict the same noise."
    x = torch.randn(2, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 900])
    with torch.no_grad():
        torch.testing.assert_close(a.denoiser()(x, t), b.denoiser()(x, t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'model.', 'module._orig_mod.'])
@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict', 'ema', 'ema_denoise_fn'])
def test_prefixes_and_wrappers(dpm, tmp_path, prefix, wrapper):
    weights = {prefix + k: v for k, v in to_official(dpm.net).items()}
    file = tmp_path / 'x.pt'
    torch.save(weights if wrapper is None else {wrapper: weights, 'step': 7}, file)
    said = []
    same_noise(load_dpm(file, log=said.append, **HINTS), dpm)
    first = prefix.split('.')[0]
    # Diff-AE's own files also have names that begin with `model.`
    if prefix and not (wrapper == 'state_dict' and prefix == 'model.'):
        assert any(first in line for line in said)
    if wrapper in ('model', 'ema'):
        assert any(f'under {wrapper!r}' in line for line in said)


def test_the_average_is_taken_before_the_raw_weights(dpm, tmp_path):
    weights = to_official(dpm.net)
    other = {k: torch.zeros_like(v) for k, v in weights.items()}
    file = tmp_path / 'x.pt'
    torch.save(dict(model=other, ema=weights), file)
    same_noise(load_dpm(file, log=lambda line: None, **HINTS), dpm)


@pytest.mark.parametrize('step', [dict(a=1), [1, 2], 'x', 1.5, torch.zeros(3)])
def test_a_step_that_is_no_integer_is_ignored(dpm, tmp_path, step):
    file = tmp_path / 'x.pt'
    torch.save(dict(ema_denoise_fn=to_official(dpm.net), step=step), file)
    assert load_dpm(file, log=lambda line: None, **HINTS).card.source == 'x.pt'


def test_damage_of_a_zip_file_is_noticed(dpm, tmp_path):
    file = tmp_path / 'x.pt'
    torch.save(to_official(dpm.net), file)
    whole = file.read_bytes()
    noticed = 0
    places = range(len(whole) // 20, len(whole) - 4000, len(whole) // 20)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 16
        file.write_bytes(damaged)
        try:
            read_official(file)
        except ValueError:
            noticed += 1
    # Zip files have padding between their members, which holds no data.
    assert noticed >= len(places) - 2


@pytest.mark.parametrize('name', ['archive/DATA.PKL', 'archive/Data.pkl', 'archive\\data.pkl'])
def test_a_second_pickle_under_another_spelling_is_refused(dpm, tmp_path, name):
    file = tmp_path / 'x.pt'
    torch.save(to_official(dpm.net), file)
    with zipfile.ZipFile(file, 'a') as archive:
        root = archive.namelist()[0].split('/')[0]
        archive.writestr(name.replace('archive', root), b'cos\nsystem\n(S"true"\ntR.')
    with pytest.raises(ValueError, match='two members of one name|which is not a tensor'):
        read_official(file)


diffusers = pytest.importorskip('diffusers')


def unet2d():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=('DownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'UpBlock2D'),
        norm_num_groups=4,
    )


@pytest.mark.parametrize('variant', ['fp16', 'non_ema'])
def test_a_diffusers_folder_with_one_variant_only(tmp_path, variant):
    unet2d().save_pretrained(tmp_path / 'unet', variant=variant)
    names = {path.name for path in (tmp_path / 'unet').iterdir()}
    assert f'diffusion_pytorch_model.{variant}.safetensors' in names
    said = []
    model = load_dpm(tmp_path, log=said.append)
    assert any(f'variant {variant}' in line for line in said)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_half_precision_unet_takes_float32_images(dtype):
    said = []
    model = load_dpm(unet2d().to(dtype), log=said.append)
    eps = model.denoiser()(torch.randn(2, 1, 16, 16), torch.tensor([5, 500]))
    assert eps.dtype == torch.float32
    assert any(str(dtype) in line for line in said)


def test_a_scheduler_with_zero_terminal_snr_is_refused():
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match='zero terminal SNR'):
        load_dpm(unet2d(), scheduler, log=lambda line: None)


# Run folders whose description does not fit their weights


def described(folder, dpm, **config):
    "A run folder whose network is described with another configuration."
    dpm.save(folder)
    file = folder / 'run.json'
    record = json.loads(file.read_text('utf-8'))
    record['networks']['net']['config'] |= config
    file.write_text(json.dumps(record), 'utf-8')


@pytest.mark.parametrize(
    'config',
    [
        dict(ch=1 << 20),
        dict(ch=1 << 14, mult=[1, 64]),
        dict(n_res=10**7),
        dict(mult=[1] * 14),
        dict(dt=1 << 30),
        dict(ch=16),
        dict(n_res=2),
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_before_memory_is_taken(dpm, tmp_path, config, monkeypatch):
    described(tmp_path / 'x', dpm, **config)
    taken = []
    original = torch.nn.init.kaiming_uniform_

    def kaiming_uniform_(tensor, *a, **k):
        if not tensor.is_meta:
            taken.append(tensor.numel())
        return original(tensor, *a, **k)

    monkeypatch.setattr(torch.nn.init, 'kaiming_uniform_', kaiming_uniform_)
    with pytest.raises(ValueError):
        load(tmp_path / 'x')
    assert taken == []


def test_absurd_sizes_in_a_run_folder_of_version_1(dpm, tmp_path, monkeypatch):
    folder = tmp_path / 'old'
    folder.mkdir()
    G = GradientEstimator.on(dpm.net, 4)
    enc = ConvEncoder(1, 14, 4, groups=8)
    tensors = {f'dpm.{k}': v for k, v in dpm.net.state_dict().items()} | G.state_dict()
    write_tensors(folder / 'G.safetensors', tensors)
    write_tensors(folder / 'enc.safetensors', enc.state_dict())
    write_tensors(folder / 'sched.safetensors', dict(beta=dpm.sched.beta))
    unet = dict(module='pdae_nb.unet', kind='UNet', config=dict(dpm.net.config))
    part = dict(module='pdae_nb.pdae', kind='GradientEstimator', config=dict(dpm=unet, z_dim=4))
    encoder = dict(module='pdae_nb.pdae', kind='ConvEncoder', config=dict(enc.config))
    record = dict(name='old', parts=dict(G=part, enc=encoder, dpm=unet), recipe=None)
    (folder / 'run.json').write_text(json.dumps(record), 'utf-8')
    load(folder)  # the folder itself is whole
    unet['config']['ch'] = 4096
    (folder / 'run.json').write_text(json.dumps(record), 'utf-8')
    taken = []
    original = torch.nn.init.kaiming_uniform_

    def kaiming_uniform_(tensor, *a, **k):
        if not tensor.is_meta:
            taken.append(tensor.numel())
        return original(tensor, *a, **k)

    monkeypatch.setattr(torch.nn.init, 'kaiming_uniform_', kaiming_uniform_)
    with pytest.raises(ValueError):
        load(folder)
    assert taken == []
