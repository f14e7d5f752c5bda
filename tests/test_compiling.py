"""Compiled blocks: how many compilations, the same numbers, kept code, nothing left behind."""

import copy
import gc
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from pdae_nb import compiling
from pdae_nb.compiling import (
    Compilations,
    Measured,
    artifacts_dir,
    compilations,
    compiled_blocks,
    expected_seconds,
    load_artifacts,
    pays,
    plan_of,
    repeated_blocks,
    shape_of,
)
from pdae_nb.forward import Schedule
from pdae_nb.layers import Arithmetic, computing_in
from pdae_nb.methods.classifier import EvalClassifierNet
from pdae_nb.methods.diffae import EncoderBlock, SemanticEncoder
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.latent import MLPSkipNet
from pdae_nb.methods.pdae import EpsAndScore
from pdae_nb.methods.scorevae import TimeEncoder, scorevae_loss
from pdae_nb.networks import ConvEncoder, GradientEstimator
from pdae_nb.recipes import RECIPES
from pdae_nb.unet import Block, UNet

BF16 = Arithmetic(torch.bfloat16)
TINY = dict(c=1, size=8, ch=8, mult=(1,), n_res=1, groups=4)  # 5 blocks of 3 shapes


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    "No test reads or writes the user's folder, and none leaves compiled code behind."
    monkeypatch.setenv('PDAE_NB_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(compiling, '_LOADED', set())
    yield
    compiling._compiled_call.cache_clear()
    torch.compiler.reset()


def filled(network: nn.Module) -> nn.Module:
    "The network without zeros among its weights: zero-initialised layers would hide errors."
    torch.manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return network


def tiny(**kw) -> UNet:
    torch.manual_seed(0)
    return filled(UNet(**TINY | kw))


def images(n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 1, 8, 8, generator=g), torch.randint(1, 1000, (n,), generator=g)


def relative_errors(got, expected) -> torch.Tensor:
    "Of each tensor, the norm of the difference over that of the expected tensor."
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(got, expected, strict=True)])


# What is compiled


def paper_networks() -> tuple[UNet, GradientEstimator, ConvEncoder]:
    "Networks of the paper's PDAE on CelebA-64, on the device meta."
    with torch.device('meta'):
        net = UNet(c=3, size=64, **RECIPES['celeba64_dpm', 'paper'].net)
        recipe = RECIPES['celeba64_pdae', 'paper']
        enc = ConvEncoder(c=3, size=64, **recipe.encoder)
        G = GradientEstimator.on(net, recipe.encoder['z_dim'], **recipe.net)
    return net, G, enc


def test_one_compilation_for_each_shape_of_the_papers_dpm(monkeypatch):
    "With a limit of one compilation, no two shapes can share a function."
    monkeypatch.setattr(compiling, '_RECOMPILE_LIMIT', 1)
    net, _, _ = paper_networks()
    x = torch.zeros(2, 3, 64, 64, device='meta')
    t = torch.zeros(2, dtype=torch.long, device='meta')
    counter = CompileCounterWithBackend('eager')
    with compiled_blocks(dict(net=net), backend=counter) as running:
        for _ in range(2):
            net(x, t).square().mean().backward()
        assert running.spent.graphs == 24
    assert counter.frame_count == len(set(running.plan.shapes)) == 24
    assert len(running.plan.blocks) == 28


def test_pdae_adds_the_shapes_of_its_own_networks():
    "The frozen DPM has as many shapes as a trained one, and they are others."
    net, G, enc = paper_networks()
    trained = set(plan_of(dict(net=net)).shapes)
    net.requires_grad_(False).eval()
    frozen = set(plan_of(dict(net=net)).shapes)
    assert len(frozen) == len(trained) == 24
    assert not frozen & trained
    assert len(set(plan_of(dict(base=net, G=G)).shapes)) == 24 + 15
    assert len(set(plan_of(dict(base=net, G=G, enc=enc)).shapes)) == 24 + 15 + 1  # an attention


def test_one_compilation_for_each_shape_of_pdae():
    parts = parts_of_pdae().to(memory_format=torch.contiguous_format)
    x = torch.zeros(2, 1, 16, 16)
    t = torch.tensor([1, 500])
    counter = CompileCounterWithBackend('eager')
    with compiled_blocks(dict(parts.items()), backend=counter) as running:
        for _ in range(2):
            pdae_gradients(parts, x, t)
    assert counter.frame_count == len(set(running.plan.shapes)) == 3 + 3 + 2  # base, G, encoder


def test_networks_of_the_package_and_their_blocks():
    assert len(repeated_blocks(tiny())) == 5
    assert all(isinstance(block, Block) for block in repeated_blocks(tiny()))
    enc = SemanticEncoder(c=1, ch=8, mult=(1, 2), size=8, z_dim=4, n_res=1)
    kinds = [type(block) for block in repeated_blocks(enc)]
    assert kinds == 5 * [EncoderBlock]
    assert len(repeated_blocks(MLPSkipNet(d=4, hidden=8, layers=4))) == 3
    assert repeated_blocks(EvalClassifierNet()) == []


def test_a_block_inside_of_a_block_is_part_of_it():
    inner = nn.Sequential(nn.ModuleDict(dict(layer=nn.Linear(2, 2))))
    outer = nn.ModuleList([nn.ModuleDict(dict(inner=inner))])
    assert repeated_blocks(outer) == [outer[0]]


@pytest.mark.parametrize(
    'change',
    [
        dict(co=16),
        dict(dz=4),
        dict(attn=True),
        dict(resample='up'),
        dict(drop=0.1),
        dict(groups=4),
    ],
    ids=str,
)
def test_shapes_differ_where_compiled_code_does(change):
    kw = dict(ci=8, co=8, dt=4)
    assert shape_of(Block(**kw)) == shape_of(filled(Block(**kw)))
    assert shape_of(Block(**kw)) != shape_of(Block(**kw | change))
    assert shape_of(Block(**kw)) != shape_of(Block(**kw).eval())
    assert shape_of(Block(**kw)) != shape_of(Block(**kw).requires_grad_(False))
    assert shape_of(Block(**kw)) != shape_of(Block(**kw).double())


def test_shapes_are_the_same_in_another_process():
    code = 'from pdae_nb.compiling import shape_of; from pdae_nb.unet import Block; '
    code += 'print(shape_of(Block(8, 8, 4)))'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.strip() == shape_of(Block(8, 8, 4)), result.stderr


def test_networks_that_are_left_out_are_named():
    enc = TimeEncoder(size=8, ch=8, mult=(1, 2), z_dim=4)
    foreign = nn.Sequential(nn.TransformerEncoderLayer(8, 2))
    plan = plan_of(dict(net=tiny(), enc=enc, other=foreign))
    assert str(plan) == (
        '5 blocks of 3 shapes; left out: '
        'enc (TimeEncoder): it is built for second derivatives, '
        'other (Sequential): it consists of layers of another library'
    )
    with (
        pytest.raises(ValueError, match=r'nothing can be compiled: enc \(TimeEncoder\)'),
        compiled_blocks(dict(enc=enc)),
    ):
        pass
    with pytest.raises(ValueError, match='there are no networks'), compiled_blocks({}):
        pass


# The limit of compilations


def test_reaching_the_limit_is_an_error(monkeypatch):
    net = tiny()
    x, t = images(3)
    monkeypatch.setattr(compiling, '_RECOMPILE_LIMIT', 2)
    with compiled_blocks(dict(net=net), backend='eager'):
        for n in (1, 2):
            net(x[:n], t[:n])
        with pytest.raises(FailOnRecompileLimitHit):
            net(x, t)


def test_only_calls_with_the_batch_size_are_compiled():
    net = tiny()
    x, t = images(4)
    expected = [net(x[:n], t[:n]) for n in range(1, 5)]
    counter = CompileCounterWithBackend('eager')
    with compiled_blocks(dict(net=net), batch=4, backend=counter):
        for n in range(1, 4):
            assert torch.equal(net(x[:n], t[:n]), expected[n - 1])
        assert counter.frame_count == 0
        assert torch.equal(net(x, t), expected[-1])
        assert counter.frame_count == 3
        with torch.no_grad():
            net(x, t)
        assert counter.frame_count == 6


def test_a_wrong_batch_size_is_a_message():
    net = tiny()
    x, t = images(3)
    lines = []
    for batch in (2, 3):
        with compiled_blocks(dict(net=net), batch=batch, backend='eager', log=lines.append):
            net(x, t)
    assert lines == ['no block ran compiled: wanted batches of 2, got 3']


def test_an_old_pytorch_is_named(monkeypatch):
    monkeypatch.delattr(torch.compiler, 'save_cache_artifacts')
    with pytest.raises(RuntimeError, match='2.7 or newer'), compiled_blocks(dict(net=tiny())):
        pass


# Nothing is left behind


def test_the_network_is_as_before():
    net = tiny()
    before = [dict(vars(module)) for module in net.modules()]
    names = list(net.state_dict())
    limit = torch._dynamo.config.recompile_limit
    x, t = images()
    counter = CompileCounterWithBackend('eager')
    with pytest.raises(KeyError), compiled_blocks(dict(net=net), backend=counter):
        net(x, t)
        assert counter.frame_count == 3
        assert list(net.state_dict()) == names
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert twin.down.blocks[0]._compiled_call_impl is None
            assert torch.equal(twin(x, t), net(x, t))
        raise KeyError
    assert [dict(vars(module)) for module in net.modules()] == before
    assert torch._dynamo.config.recompile_limit == limit
    assert not torch._dynamo.config.fail_on_recompile_limit_hit
    assert compiling._CLOCK.start not in torch._dynamo.callback.callback_handler.start_callbacks


def test_a_block_keeps_its_own_compiled_call():
    net = tiny()
    block = net.down.blocks[0]
    block.compile(backend='eager')
    own = block._compiled_call_impl
    with compiled_blocks(dict(net=net), backend='eager'):
        with compiled_blocks(dict(net=net), backend='eager'):
            assert block._compiled_call_impl is not own
        assert block._compiled_call_impl is not own
    assert block._compiled_call_impl is own


def test_code_is_used_again_and_holds_no_network():
    x, t = images()
    counter = CompileCounterWithBackend('eager')
    net = tiny()
    with compiled_blocks(dict(net=net), backend=counter):
        net(x, t).sum().backward()
    weight = weakref.ref(net.down.blocks[0].conv1.weight)
    del net
    gc.collect()
    assert weight() is None
    assert counter.frame_count == 3
    other = tiny()
    expected = other(x, t)
    with compiled_blocks(dict(other=other), backend=counter) as running:
        assert torch.equal(other(x, t), expected)
        assert running.spent == Compilations(0, 0, 0.0)


def test_hooks_of_a_block_are_called():
    net = tiny()
    seen = []
    net.up.mid[0].register_forward_hook(lambda module, inputs, output: seen.append(1))
    with compiled_blocks(dict(net=net), backend='eager'):
        net(*images())
    assert seen == [1]


# The same numbers


def assert_checkpoints_equal(block, *inputs):
    "The first call of a block is one that is computed again in the backward pass."

    def recomputed(*inputs):
        return checkpoint(block, *inputs, use_reentrant=False)

    results = []
    for call in (recomputed, block):
        torch.manual_seed(3)
        block.zero_grad()
        y = call(*inputs)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in block.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('arithmetic', [None, BF16], ids=['float32', 'bf16'])
def test_checkpoints_recompute_compiled_blocks(arithmetic):
    "Also with dropout: the second pass draws the same random numbers."
    net = tiny(drop=0.3)
    x, t = images()
    with computing_in([net], arithmetic):
        h = net.down.stem(x).to(net.dtype_at(t)).detach()
        e = net.embed(t).detach()
    counter = CompileCounterWithBackend('aot_eager')
    with compiled_blocks(dict(net=net), backend=counter):
        assert_checkpoints_equal(net.down.blocks[0], h, e)
    assert counter.frame_count == 1


def test_scorevae_trains_with_a_compiled_base():
    base = tiny().requires_grad_(False).eval()
    enc = filled(TimeEncoder(size=8, ch=8, mult=(1, 2), z_dim=4))
    x, t = images()
    sched = Schedule.linear()
    draws = dict(t=t, eps=x.flip(0), xi=torch.randn(2, 4))

    def loss_and_gradients():
        enc.zero_grad()
        loss = scorevae_loss(base, enc, x, sched, **draws)
        loss.backward()
        return [loss.detach(), *(p.grad for p in enc.parameters())]

    expected = loss_and_gradients()
    with compiled_blocks(dict(enc=enc, base=base), backend='aot_eager') as running:
        got = loss_and_gradients()
        assert running.spent.graphs == 3
    assert relative_errors(got, expected).max() < 1e-5


def parts_of_pdae():
    "A frozen DPM, a gradient estimator and an encoder in the layout of a training."
    net = tiny(size=16).requires_grad_(False).eval()
    G = filled(GradientEstimator.on(net, z_dim=4))
    enc = SemanticEncoder(c=1, ch=8, mult=(1,), size=16, z_dim=4, n_res=1, groups=4)
    for network in (net, G, filled(enc)):
        network.to(memory_format=torch.channels_last)
    return nn.ModuleDict(dict(base=net, G=G, enc=enc))


def pdae_gradients(parts, x, t):
    "Outputs and gradients of all trained parameters."
    parts.zero_grad()
    pair = EpsAndScore(DPM(parts.base, Schedule.linear(), (1, 16, 16)), parts.G)
    eps, score = pair(x, t, parts.enc(x))
    (eps + score).square().mean().backward()
    gradients = [p.grad for p in parts.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [eps.detach(), score.detach(), *gradients]


@pytest.mark.slow
def test_inductors_numbers_are_those_of_eager():
    "For PDAE: an encoder, and G on frozen features, in the channels_last layout."
    parts = parts_of_pdae()
    torch.manual_seed(4)
    x = torch.randn(4, 1, 16, 16).to(memory_format=torch.channels_last)
    t = torch.tensor([1, 300, 600, 1000])
    with computing_in(parts.values(), BF16):
        in_bf16 = pdae_gradients(parts, x, t)
    expected = pdae_gradients(parts, x, t)
    with compiled_blocks(dict(G=parts.G, enc=parts.enc), batch=4) as running:
        shapes = len(set(running.plan.shapes))
        got = pdae_gradients(parts, x, t)
        assert running.spent.graphs == shapes
        with computing_in(parts.values(), BF16):
            rounded = pdae_gradients(parts, x, t)
        assert running.spent.graphs == 2 * shapes
        assert running.spent.seconds > 0
        assert_checkpoints_equal(parts.enc.body[1], torch.randn(4, 8, 16, 16))
    assert relative_errors(got, expected).max() < 1e-5
    errors = relative_errors(rounded, expected)
    assert errors.max() < 0.05  # the spacing of bf16 numbers is 0.004 to 0.008
    assert errors.mean() < 1.5 * relative_errors(in_bf16, expected).mean()


# Kept code


class Compiler:
    "Stands in for PyTorch's two functions: the code of this process is `code`."

    def __init__(self, monkeypatch, code=b'code'):
        self.code = code
        self.loaded = []
        monkeypatch.setattr(torch.compiler, 'save_cache_artifacts', self.save)
        monkeypatch.setattr(torch.compiler, 'load_cache_artifacts', self.load)

    def save(self):
        return self.code, None

    def load(self, data):
        self.loaded.append(data)
        return True


COMPILED = Compilations(graphs=8, loaded=0, seconds=40.0)


def kept(log, spent=COMPILED):
    "A `CompiledBlocks` that has compiled this much, after it was asked to keep the code."
    now = compilations()
    before = Compilations(*(a - b for a, b in zip(now, spent, strict=True)))
    plan = plan_of(dict(net=tiny()))
    running = compiling.CompiledBlocks(plan, torch.device('cpu'), 4, log, before, before)
    running.keep()
    return running


def kept_code() -> list[bytes]:
    "The code in each stored file."
    paths = artifacts_dir('cpu').glob('*.zip')
    return [zipfile.ZipFile(path).read('artifacts') for path in paths]


def test_kept_code_is_loaded_once(monkeypatch):
    compiler = Compiler(monkeypatch)
    kept(pytest.fail)
    assert kept_code() == [b'code']
    assert load_artifacts('cpu', pytest.fail) == 0, 'it comes from this process'
    compiling._LOADED.clear()
    assert load_artifacts('cpu', pytest.fail) == 1
    assert load_artifacts('cpu', pytest.fail) == 0
    assert compiler.loaded == [b'code']


def test_libraries_are_put_where_the_compiler_looks(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    Compiler(monkeypatch)
    libraries = {'ab/kernel.main.so': b'library', '../outside.so': b'no', 'ab/text.txt': b'no'}
    monkeypatch.setattr(compiling, '_libraries', lambda: libraries)
    kept(pytest.fail)
    compiling._LOADED.clear()
    assert load_artifacts('cpu', pytest.fail) == 1
    assert (tmp_path / 'cache/ab/kernel.main.so').read_bytes() == b'library'
    assert [path.name for path in tmp_path.rglob('*.so')] == ['kernel.main.so']
    assert list(tmp_path.rglob('*.txt')) == []


def test_damaged_files_are_deleted_with_a_message(monkeypatch):
    compiler = Compiler(monkeypatch)
    kept(pytest.fail)
    (path,) = artifacts_dir('cpu').glob('*.zip')
    path.write_bytes(path.read_bytes()[:-1])
    path.with_name('foreign.zip').write_bytes(b'virus')
    compiling._LOADED.clear()
    lines = []
    assert load_artifacts('cpu', lines.append) == 0
    assert compiler.loaded == []
    assert len(lines) == 2
    assert all('ignored, deleted and compiled again' in line for line in lines)
    assert kept_code() == []
    kept(pytest.fail)
    assert kept_code() == [b'code']


@pytest.mark.parametrize('data', [b'no archive', compiling._pack(b'no compiled code', {})])
def test_a_file_that_pytorch_does_not_accept(data):
    path = artifacts_dir('cpu') / f'{hashlib.sha256(data).hexdigest()}.zip'
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    lines = []
    assert load_artifacts('cpu', lines.append) == 0
    assert len(lines) == 1
    assert not path.exists()


def test_a_damaged_file_that_cannot_be_deleted(monkeypatch):
    Compiler(monkeypatch)
    path = artifacts_dir('cpu') / 'damaged.zip'
    (path / 'inside').mkdir(parents=True)  # a folder in place of a file
    path.with_name('foreign.zip').write_bytes(b'virus')

    def refuse(path):
        raise PermissionError(13, 'no permission')

    monkeypatch.setattr(Path, 'unlink', refuse)
    lines = []
    assert load_artifacts('cpu', lines.append) == 0
    assert len(lines) == 2


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    Compiler(monkeypatch)
    (tmp_path / 'home').write_text('a file where the folder should be')
    lines = []
    kept(lines.append)
    assert len(lines) == 1
    assert 'the compiled code is not kept' in lines[0]
    assert load_artifacts('cpu', pytest.fail) == 0


def test_old_files_are_deleted(monkeypatch):
    compiler = Compiler(monkeypatch)
    kept(pytest.fail)
    compiler.code = b'second'
    kept(pytest.fail)
    assert sorted(kept_code()) == [b'code', b'second']
    monkeypatch.setattr(compiling, 'MOST_BYTES', 1)
    compiler.code = b'third'
    kept(pytest.fail)
    assert kept_code() == [b'third']
    assert len(Measured.read('cpu').shapes) == 1


def test_other_versions_and_hardware_have_other_folders(monkeypatch):
    before = artifacts_dir('cpu')
    monkeypatch.setattr(torch, '__version__', '9.0')
    assert artifacts_dir('cpu') != before
    monkeypatch.undo()
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 77)
    assert '77-threads' in artifacts_dir('cpu').name


# Whether it pays


def test_it_pays_in_long_runs():
    assert pays(1001, 100)
    assert not pays(1000, 100)
    assert not pays(1e9, math.inf)


def test_expected_seconds_follow_the_measurement(monkeypatch):
    Compiler(monkeypatch)
    networks = dict(net=tiny())
    compiled, loaded = compiling.DEFAULT_SECONDS['cpu']
    assert expected_seconds(networks, 'cpu', batch=4) == 3 * compiled
    kept(pytest.fail)
    assert Measured.read('cpu').compile_seconds == pytest.approx(5)
    assert expected_seconds(networks, 'cpu', batch=4) == pytest.approx(3 * loaded)
    assert expected_seconds(networks, 'cpu', batch=5) == pytest.approx(3 * 5)
    kept(pytest.fail, Compilations(8, 8, 16.0))
    assert expected_seconds(networks, 'cpu', batch=4) == pytest.approx(3 * 2)
    kept(pytest.fail, Compilations(8, 3, 1e6))
    assert expected_seconds(networks, 'cpu', batch=5) == pytest.approx(3 * 5), 'of two kinds'
    for path in artifacts_dir('cpu').glob('*.zip'):
        path.unlink()
    assert expected_seconds(networks, 'cpu', batch=4) == pytest.approx(3 * 5)
    assert expected_seconds(dict(other=nn.Linear(2, 2)), 'cpu') == math.inf


@pytest.mark.parametrize('text', ['', '[]', '{"compile_seconds": "x"}', '{"shapes": 3}'])
def test_a_damaged_measurement_is_ignored(text):
    path = artifacts_dir('cpu') / 'measured.json'
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert Measured.read('cpu') == Measured(*compiling.DEFAULT_SECONDS['cpu'])


FIRST_STEP = """
import json, torch
from pdae_nb.compiling import compiled_blocks, expected_seconds
from pdae_nb.methods.latent import MLPSkipNet
torch.manual_seed(0)
networks = dict(net=MLPSkipNet(d=4, hidden=8, layers=3))
before = expected_seconds(networks, 'cpu', batch=2)
with compiled_blocks(networks, batch=2) as running:
    loss = networks['net'](torch.randn(2, 4), torch.tensor([1, 500])).square().mean()
    loss.backward()
inductor = torch._dynamo.utils.counters['inductor']
misses = inductor['fxgraph_cache_miss']
print(json.dumps([*running.spent[:2], misses, inductor['fxgraph_cache_hit'], before]))
"""


def counting_compiler(folder) -> tuple[dict[str, str], Path]:
    "Environment in which the inductor calls g++ through a script, and the log of the calls."
    log = folder / 'calls'
    script = folder / 'g++'
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {shutil.which("g++")} "$@"\n')
    script.chmod(0o755)
    return os.environ | dict(CXX=str(script)), log


@pytest.mark.slow
@pytest.mark.skipif(
    not Path('/proc/self/maps').exists() or not shutil.which('g++'), reason='Linux with g++'
)
def test_a_second_process_compiles_nothing(tmp_path):
    "The folder of the inductor is empty at the start of each process."
    env, log = counting_compiler(tmp_path)
    results = []
    kernels = []
    for name in ('first', 'second'):
        log.write_text('')
        run = subprocess.run(
            [sys.executable, '-c', FIRST_STEP],
            capture_output=True,
            text=True,
            env=env | dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / name)),
        )
        assert run.returncode == 0, run.stderr
        results.append(json.loads(run.stdout))
        kernels.append(log.read_text().count('.main.cpp'))
    (graphs, loaded, misses, hits, before), second = results
    assert (graphs, loaded, hits) == (2, 0, 0)
    assert misses == 4  # a forward and a backward pass of each shape
    assert kernels[0] >= 4
    assert kernels[1] == 0
    assert second[:4] == [2, 2, 0, 4]
    assert second[4] < before


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='Windows has no named pipes')
@pytest.mark.parametrize('kind', ['pipe', 'device', 'too large'])
def test_what_is_no_file_of_compiled_code_is_not_read(kind, tmp_path, monkeypatch):
    "Reading a pipe would wait for ever, and reading /dev/zero would fill the memory."
    monkeypatch.setenv('PDAE_NB_HOME', str(tmp_path))
    folder = compiling.artifacts_dir('cpu')
    folder.mkdir(parents=True)
    path = folder / 'a.zip'
    if kind == 'pipe':
        os.mkfifo(path)
        os.mkfifo(folder / 'measured.json')
    elif kind == 'device':
        path.symlink_to('/dev/zero')
    else:
        with path.open('wb') as file:
            file.truncate(compiling.MOST_BYTES + 1)
    said = []
    assert compiling.load_artifacts('cpu', said.append) == 0
    assert len(said) == 1
    assert 'no regular file' in said[0] or 'the limit is' in said[0]
    assert not path.exists()
    compiling.Measured.read('cpu')
