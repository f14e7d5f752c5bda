"""Compiled, checkpointed and accumulated trainings compute what plain ones compute."""

import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from pdae_nb import training
from pdae_nb.files import read_tensors
from pdae_nb.hub import load, train
from pdae_nb.recipes import recipe
from pdae_nb.training import READ_EVERY


def small(name='mnist_dpm', steps=12, **changes):
    "A short run of the size smoke."
    return replace(recipe(name, 'smoke'), batch=8, images=8 * steps, **changes)


def trained(out, r, **options):
    "Train on the CPU in float32. Returns the weights of the last checkpoint, and what was logged."
    lines = []
    defaults = dict(device='cpu', precision='float32', every=100, log=lines.append)
    train('mnist_dpm', r, out=out, **defaults | options)
    newest = max((out / 'checkpoints').glob('*.safetensors'))
    tensors, _ = read_tensors(newest)
    return tensors, lines


def assert_same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp('plain') / 'run', small())[0]


def test_a_checkpointed_training_equals_a_plain_one(plain, tmp_path):
    assert_same(trained(tmp_path / 'run', small(), checkpoint=True)[0], plain)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(accumulate=3), 'a batch of 8 images cannot be shared equally by 1 processes in 3'),
        (dict(accumulate=0), 'accumulate must be at least 1, got 0'),
        (dict(compile=True), 'compile must be auto, on or off, got True'),
        (dict(compile='yes'), "compile must be auto, on or off, got 'yes'"),
    ],
)
def test_options_are_refused_before_the_images_are_read(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr('pdae_nb.hub.load_images', None)
    with pytest.raises(ValueError, match=message):
        train('mnist_dpm', small(), out=tmp_path / 'run', **options)
    assert not (tmp_path / 'run').exists()


def test_scorevae_cannot_be_checkpointed(tmp_path):
    r = replace(small('mnist_scorevae'), base='mnist_dpm', px=28)
    with pytest.raises(ValueError, match='TimeEncoder'):
        train('mnist_scorevae', r, out=tmp_path / 'run', checkpoint=True, log=print)


@pytest.mark.slow
def test_a_compiled_training_resumes_bit_for_bit(plain, tmp_path, monkeypatch):
    monkeypatch.setenv('PDAE_NB_HOME', str(tmp_path / 'home'))
    whole, lines = trained(tmp_path / 'whole', small(), compile='on')
    compiling = [line for line in lines if line.startswith('compiling ')]
    assert len(compiling) == 1
    assert ' blocks of ' in compiling[0]
    # No code is stored if PyTorch's own cache on this machine had all of it.
    assert list((tmp_path / 'home/compile').rglob('measured.json'))
    first, _ = trained(tmp_path / 'first', small(steps=1, warmup=10**6))  # nearly untrained
    names = [name for name in plain if name.startswith('model.')]
    moved = torch.cat([(plain[name] - first[name]).flatten() for name in names])
    changed = torch.cat([(plain[name] - whole[name]).flatten() for name in names])
    assert changed.norm() < 0.1 * moved.norm()
    trained(tmp_path / 'parts', small(steps=6, cooldown=0.0), compile='on')
    r = small(cooldown=0.0)
    resumed, _ = trained(tmp_path / 'parts', r, compile='on')
    uninterrupted, _ = trained(tmp_path / 'uninterrupted', r, compile='on')
    assert_same(resumed, uninterrupted)


@dataclass
class Run:
    "What `_Compilation` needs of a run."

    steps: int
    device: str = 'cuda'
    is_compiled: bool | None = None
    accumulate: int = 2
    batch: int = 8
    networks: dict = field(default_factory=dict)

    @property
    def recipe(self):
        return SimpleNamespace(batch=self.batch, steps=self.steps)

    @property
    def model(self):
        device = torch.device(self.device)
        return SimpleNamespace(device=device, named_networks=lambda: self.networks)


@pytest.fixture
def compiled(monkeypatch):
    "The calls of `compiled_blocks`. A compilation is expected to take 7 seconds."
    calls = []

    @contextmanager
    def record(networks, *, batch, log):
        calls.append(batch)
        yield SimpleNamespace(plan='2 blocks', keep=lambda: calls.append('kept'))
        calls.append('ended')

    monkeypatch.setattr(training, 'compiled_blocks', record)
    monkeypatch.setattr(training, 'expected_seconds', lambda *args: 7.0)
    return calls


def decided(run, name, seconds=1.0, start=0):
    "Whether a run is compiled after each of 40 steps."
    states = []
    with ExitStack() as stack:
        compilation = training._Compilation(run, name, print, stack)
        for i in range(start + 1, start + 41):
            compilation.add(SimpleNamespace(i=i, seconds=seconds))
            states.append(run.is_compiled)
    return states


def test_auto_compiles_a_long_run_after_20_steps(compiled):
    states = decided(Run(steps=91), 'auto')
    assert states[: 2 * READ_EVERY - 1] == [None] * 19
    assert states[19:] == [False] + [True] * 20
    assert compiled == [4, 'kept', 'kept', 'ended']


def test_auto_does_not_compile_a_short_run(compiled):
    assert decided(Run(steps=90), 'auto')[-1] is False  # 70 steps are left, ten times 7 seconds
    assert compiled == []


def test_auto_does_not_compile_on_a_cpu(compiled):
    assert decided(Run(steps=10_000, device='cpu'), 'auto')[0] is False
    assert compiled == []


def test_a_compiler_that_fails_does_not_end_the_training(compiled, monkeypatch):
    said = []

    def fail(networks, *, batch, log):
        raise RuntimeError('no compiler')

    monkeypatch.setattr(training, 'compiled_blocks', fail)
    run = Run(steps=10_000)
    with ExitStack() as stack:
        compilation = training._Compilation(run, 'auto', said.append, stack)
        for i in range(1, 31):
            compilation.add(SimpleNamespace(i=i, seconds=1.0))
    assert run.is_compiled is False
    assert said == ['the blocks are not compiled: RuntimeError: no compiler']


def test_the_decision_is_stored_after_a_compiled_step_only(compiled):
    "If the compiler fails in the step, the same command goes on without it."
    states = decided(Run(steps=10_000), 'auto')
    assert states[18:21] == [None, False, True]


@pytest.mark.parametrize('was_compiled', [True, False])
def test_a_resumed_run_keeps_the_decision(was_compiled, compiled):
    run = Run(steps=10_000, is_compiled=was_compiled)
    assert decided(run, 'auto', start=500)[0] is was_compiled
    assert bool(compiled) is was_compiled


def test_on_and_off_are_obeyed(compiled):
    assert decided(Run(steps=1, device='cpu'), 'on')[0] is True
    assert decided(Run(steps=10_000, is_compiled=True), 'off')[0] is False


@pytest.mark.parametrize(
    'stored, expected',
    [
        (dict(device='cpu', images=96, is_compiled=True), True),
        (dict(device='cuda', images=96, is_compiled=True), None),
        (dict(device='cpu', images=8, is_compiled=False), None),
        ({}, None),
    ],
)
def test_auto_decides_again_on_another_device_or_for_another_length(
    stored, expected, tmp_path, monkeypatch
):
    run = SimpleNamespace(
        model=SimpleNamespace(device=torch.device('cpu')),
        recipe=SimpleNamespace(images=96, steps=12),
        is_compiled=None,
        ema=None,
        opt=None,
        out=tmp_path,
        dtype='float32',
    )
    note = dict(i=3, seconds=1, skipped=0, compiled=stored)
    monkeypatch.setattr(training, 'load_checkpoint', lambda *args, **options: note)
    training._load_newest(run, print)
    assert run.is_compiled is expected


def test_the_decision_is_stored(tmp_path):
    r = small(steps=1)
    trained(tmp_path / 'run', r)
    newest = max((tmp_path / 'run/checkpoints').glob('*.safetensors'))
    _, note = read_tensors(newest)
    assert note['compiled'] == dict(device='cpu', images=8, is_compiled=False)
    assert json.loads((tmp_path / 'run/run.json').read_text())['images_seen'] == 8
    assert load(tmp_path / 'run').card.images_seen == 8
