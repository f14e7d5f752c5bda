"""Windows, macOS and Apple GPUs, as far as they can be tested elsewhere."""

import ast
import errno
import os
import signal
import subprocess
import types
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from pdae_nb import files, forward, training
from pdae_nb.data import Images
from pdae_nb.forward import Schedule, add_noise, eps_to_x0, posterior, real_type, x0_to_eps
from pdae_nb.gap import gap_factor
from pdae_nb.guidance import guided
from pdae_nb.layers import arithmetic_of
from pdae_nb.metrics import ssim
from pdae_nb.recipes import RECIPES, recipe
from pdae_nb.sampling import ddim_step, trajectory
from pdae_nb.solvers import belm_step, dpmpp_step
from pdae_nb.training import memory_layout, seeded
from pdae_nb.weighting import (
    w_bound,
    w_half,
    w_likelihood,
    w_min_snr,
    w_p2,
    w_pdae,
    w_simple,
    w_vlb,
)

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'pdae_nb'
MODULES = sorted(PACKAGE.rglob('*.py'))
SCHED = Schedule.linear()
WEIGHTS = [w_bound, w_half, w_likelihood, w_min_snr, w_p2, w_pdae, w_simple, w_vlb]


# ---------------------------------------------------------------- files

TEXT_METHODS = ('read_text', 'write_text')


def is_text_mode(call):
    "Whether a call of `open` opens a text file."
    modes = [arg.value for arg in call.args[1:2] if isinstance(arg, ast.Constant)]
    modes += [k.value.value for k in call.keywords if k.arg == 'mode']
    return not any('b' in mode for mode in modes)


def names_encoding(call, position):
    return len(call.args) > position or any(k.arg == 'encoding' for k in call.keywords)


def calls_without_encoding(path):
    "Lines that read or write text in the encoding of the machine."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in TEXT_METHODS:
            position = TEXT_METHODS.index(node.func.attr)
            if not names_encoding(node, position):
                yield node.lineno
        is_open = isinstance(node.func, ast.Name) and node.func.id == 'open'
        if is_open and is_text_mode(node) and not names_encoding(node, 3):
            yield node.lineno


SCRIPTS = [*MODULES, *sorted((ROOT / '.ci').glob('*.py'))]


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_name_their_encoding(path):
    "The default is not UTF-8 on Windows."
    assert not list(calls_without_encoding(path))


def test_missing_encodings_are_found(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text(
        "p.read_text()\np.read_text('utf-8')\np.write_text(a)\np.write_text(a, encoding='utf-8')\n"
        "open(p)\nopen(p, 'rb')\nopen(p, 'a', encoding='utf-8')\nopen(p, 'w')\n",
        encoding='utf-8',
    )
    assert sorted(calls_without_encoding(path)) == [1, 3, 5, 8]


POSIX_ONLY = {'fcntl', 'resource', 'pwd', 'grp', 'termios', 'pty', 'posix'}
ONLY_GUARDED = {'fcntl': 'files.py', 'msvcrt': 'files.py'}


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_of_one_platform_are_imported_in_one_place(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    for name in names & (POSIX_ONLY | {'msvcrt', 'winreg'}):
        assert ONLY_GUARDED.get(name) == path.name


def reserved(name):
    "Whether Windows refuses the name of a file."
    stem = name.split('.')[0].upper()
    devices = {'CON', 'PRN', 'AUX', 'NUL', *(f'{d}{i}' for d in ('COM', 'LPT') for i in range(10))}
    return bool(set('<>:"\\|?*') & set(name)) or stem in devices or name[-1] in ' .'


def test_windows_can_check_out_the_repository():
    listed = subprocess.run(['git', 'ls-files', '-z'], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip('not a git checkout')
    names = [Path(name) for name in listed.stdout.split('\0') if name]
    assert not [name for name in names if any(map(reserved, name.parts))]
    lower = [str(name).lower() for name in names]
    assert len(lower) == len(set(lower)), 'two names differ only in upper and lower case'
    assert reserved('a:b') and reserved('nul.txt') and not reserved('.lock')


def test_windows_can_hold_the_names_of_runs():
    assert not [name for name, _ in RECIPES if reserved(name)]


def test_a_folder_is_not_opened_on_windows(tmp_path, monkeypatch):
    "There `os.open` refuses folders."

    def refuse(path, *flags):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    monkeypatch.setattr(files.os, 'open', refuse)
    with pytest.raises(OSError, match='Permission denied'):
        files.write_bytes(tmp_path / 'a', b'1')
    with monkeypatch.context() as patch:
        # `os.name` also decides what `Path` makes: only the module `files` may see the change.
        patch.setattr(files, 'os', types.SimpleNamespace(**vars(os) | dict(name='nt')))
        files.write_bytes(tmp_path / 'b', b'2')
    assert (tmp_path / 'b').read_bytes() == b'2'


class Locks:
    "The module `msvcrt` of Windows, with one lock."

    LK_NBLCK = 2

    def __init__(self):
        self.is_taken = False

    def locking(self, descriptor, mode, count):
        assert mode == self.LK_NBLCK
        assert count == 1
        if self.is_taken:
            raise PermissionError(errno.EACCES, 'Permission denied')
        self.is_taken = True


def test_windows_locks_a_run_with_its_own_locks(tmp_path, monkeypatch):
    locks = Locks()
    monkeypatch.setattr(files, 'fcntl', None)
    monkeypatch.setattr(files, 'msvcrt', locks)
    with files.locked(tmp_path):
        assert locks.is_taken
        assert files.is_locked(tmp_path)
        with pytest.raises(RuntimeError, match='another run is writing to'):
            files.locked(tmp_path).__enter__()
    locks.is_taken = False
    assert not files.is_locked(tmp_path)


def test_locks_of_this_platform(tmp_path):
    assert not files.is_locked(tmp_path)
    with files.locked(tmp_path):
        assert files.is_locked(tmp_path)
        with pytest.raises(RuntimeError, match='another run is writing to'):
            files.locked(tmp_path).__enter__()
    assert not files.is_locked(tmp_path)


def test_signals_that_every_platform_has():
    "`stoppable` needs SIGTERM and SIGINT, which Windows has, and no others."
    tree = ast.parse(Path(files.__file__).read_text(encoding='utf-8'))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith('SIG')
    }
    assert used == {'SIGTERM', 'SIGINT'}
    with files.stoppable() as received:
        signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]


# ---------------------------------------------------------------- Apple GPUs


class NoFloat64(TorchDispatchMode):
    "Raises if an operation returns a float64 tensor on a device of the type `meta`."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == 'meta':
            return True  # the answer of `bool`: such a tensor has no values
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        for v in tensors:
            if torch.is_tensor(v) and v.device.type == 'meta' and v.dtype == torch.float64:
                raise TypeError(f'{func} made a float64 tensor on a device without float64')
        return out


@pytest.fixture
def no_float64(monkeypatch):
    "Devices of the type `meta` stand for Apple's GPUs: operations there have shapes and types."
    monkeypatch.setattr(forward, '_WITHOUT_FLOAT64', {'mps', 'meta'})
    with NoFloat64():
        yield torch.device('meta')


def test_real_type():
    wanted = dict(cpu=torch.float64, cuda=torch.float64, mps=torch.float32)
    assert {device: real_type(device) for device in wanted} == wanted
    assert real_type(torch.device('mps', 0)) == torch.float32


def test_float64_tensors_are_noticed(monkeypatch):
    with NoFloat64(), pytest.raises(TypeError, match='float64'):
        Schedule.linear()(torch.tensor([1], device='meta'))


def test_the_schedule_of_another_device(no_float64):
    sched = Schedule.linear()
    t = torch.tensor([0, 1, 1000], device=no_float64)
    assert sched(t).dtype == torch.float32
    assert sched(t.new_empty(3)).device.type == 'meta'
    on_cpu = sched(torch.tensor([0, 1, 1000]))
    assert on_cpu.dtype == torch.float64
    assert sched.alpha_bar.dtype == torch.float64


def test_float32_tables_are_precise_enough(monkeypatch):
    "Relative errors of the coefficients of x_t and of the posterior, at every timestep."
    t = torch.arange(1, 1001)
    exact = SCHED(t)
    exact_beta = 1 - exact / SCHED(t - 1)
    monkeypatch.setattr(forward, '_WITHOUT_FLOAT64', {'cpu'})
    rounded = Schedule.linear()
    rounded._on_device = {}
    alpha_bar = rounded(t)
    assert alpha_bar.dtype == torch.float32
    noise_std = (1 - alpha_bar).sqrt() / (1 - exact).sqrt() - 1
    assert noise_std.abs().max() < 3e-4
    beta = (1 - alpha_bar / rounded(t - 1)) / exact_beta - 1
    assert beta.abs().max() < 2e-3


def test_formulas_need_no_float64(no_float64):
    x = torch.empty(3, 1, 8, 8, device=no_float64)
    t = torch.ones(3, dtype=torch.long, device=no_float64)
    sched = Schedule.linear()
    for formula in (add_noise, eps_to_x0, x0_to_eps):
        assert formula(sched, x, t, x).dtype == torch.float32
    mean, variance = posterior(sched, x, x, t)
    assert mean.dtype == variance.dtype == torch.float32
    assert gap_factor(sched, t).dtype == torch.float32
    assert sched.rand_t(3, no_float64).dtype == torch.int64
    assert guided(lambda xt, t: (xt, xt), sched)(x, t).dtype == torch.float32


def test_ssim_in_float32(monkeypatch):
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    exact = ssim(x, y)
    monkeypatch.setattr(forward, '_WITHOUT_FLOAT64', {'cpu'})
    rounded = ssim(x, y)
    assert not torch.equal(rounded, exact), 'it was computed in float64'
    assert torch.allclose(rounded, exact, atol=1e-4)


@pytest.mark.parametrize('weight', WEIGHTS, ids=lambda weight: weight.__name__)
def test_weights_need_no_float64(no_float64, weight):
    t = torch.ones(3, dtype=torch.long, device=no_float64)
    assert weight(Schedule.linear(), t).dtype == torch.float32


@pytest.mark.parametrize('step', [ddim_step, dpmpp_step, belm_step])
def test_sampling_needs_no_float64(no_float64, step):
    sched = Schedule.linear()
    x = torch.empty(3, 1, 8, 8, device=no_float64)
    states = list(trajectory(lambda xt, t: xt, x, sched, 4, solver=step))
    assert len(states) == 4


class MetaDraw:
    "`Draw` on a device without random numbers."

    def __init__(self, n, device):
        self.n = n
        self.device = device

    def times(self, sched):
        return sched.rand_t(self.n, self.device)

    def normal(self, *shape):
        return torch.empty(self.n, *shape, device=self.device)

    def integers(self, low, high, shape=(), *, per_batch=False):
        if per_batch:  # the caller reads these numbers
            return torch.zeros(shape, dtype=torch.long)
        return torch.zeros(self.n, *shape, dtype=torch.long, device=self.device)


METHODS = [
    'mnist_dpm',
    'mnist_cdpm',
    'mnist_pdae',
    'mnist_label_pdae',
    'mnist14_diffae',
    'mnist_scorevae',
    'mnist_paper_scorevae',
    'mnist_conditional',
    'mnist_vae',
    'mnist_classifier',
    'mnist_eval_classifier',
]
IMAGES = Images(torch.zeros(4, 1, 14, 14, dtype=torch.uint8), torch.arange(4), list('0123456789'))


@pytest.mark.parametrize('name', METHODS)
def test_losses_need_no_float64(no_float64, name):
    "One training step of each method, without the update."
    r = replace(recipe(name, 'smoke'), px=14)
    dpm = replace(recipe('mnist_dpm', 'smoke'), px=14)
    base = None if r.base is None else dpm.method.build(dpm, IMAGES, None)
    model = r.method.build(r, IMAGES, base)
    if base is not None:
        base.to(no_float64)
    model.to(no_float64)
    x0 = torch.empty(4, 1, 14, 14, device=no_float64)
    y = torch.zeros(4, dtype=torch.long, device=no_float64)
    losses, t = model.loss(x0, y, MetaDraw(4, no_float64))
    assert losses.dtype == torch.float32
    losses.mean().backward()
    gradients = [p.grad for p in model.trainable() if p.grad is not None]
    assert gradients
    assert {grad.dtype for grad in gradients} == {torch.float32}


class AppleGenerator:
    "The functions of `torch.mps` that concern random numbers."

    def __init__(self):
        self.state = 'before'

    def get_rng_state(self):
        return self.state

    def manual_seed(self, seed):
        self.state = seed

    def set_rng_state(self, state):
        self.state = state


def test_the_generator_of_apple_gpus_is_seeded_and_restored(monkeypatch):
    generator = AppleGenerator()
    monkeypatch.setattr(torch, 'mps', generator)
    with seeded(7, torch.device('mps')):
        assert generator.state == 7
    assert generator.state == 'before'
    with pytest.raises(RuntimeError), seeded(7, torch.device('mps')):
        raise RuntimeError
    assert generator.state == 'before'
    with seeded(7, torch.device('cpu')):
        assert generator.state == 'before'


def test_settings_of_apple_gpus():
    layouts = dict(cpu=torch.channels_last, cuda=torch.channels_last, mps=torch.contiguous_format)
    assert {device: memory_layout(torch.device(device)) for device in layouts} == layouts
    assert arithmetic_of('auto', 'mps') is None, 'float32, where bf16 is not known to pay'
    assert 'Apple' in training.hardware(torch.device('mps'))


def test_gradients_on_apple_gpus_are_clipped_one_by_one(monkeypatch):
    "`foreach=True` is an error there."
    given = []

    def clip(params, limit, foreach):
        given.append((params[0].device.type, foreach))
        return torch.tensor(1.0)

    monkeypatch.setattr(training.nn.utils, 'clip_grad_norm_', clip)

    class Parameter(torch.nn.Parameter):
        device = torch.device('mps')

    for p in (torch.nn.Parameter(torch.ones(2)), Parameter(torch.ones(2))):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        training._update(torch.tensor(1.0), [p], opt, 1.0)
    assert given == [('cpu', True), ('mps', False)]


# ---------------------------------------------------------------- continuous integration

WORKFLOW = ROOT / '.github/workflows/test.yml'


def workflow():
    return yaml.safe_load(WORKFLOW.read_text(encoding='utf-8'))


def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def test_the_workflow_is_complete():
    "Every system with every version of Python, once; all tests on one of them."
    jobs = workflow()['jobs']
    matrix = jobs['fast']['strategy']['matrix']
    assert matrix['os'] == ['ubuntu-latest', 'windows-latest', 'macos-latest']
    assert matrix['python'] == ['3.11', '3.12', '3.13']
    assert matrix['python'][0] == settings()['min_python']
    assert jobs['fast']['runs-on'] == '${{ matrix.os }}'
    assert jobs['full']['runs-on'] == 'ubuntu-latest'
    for job in jobs.values():
        assert job['defaults']['run']['shell'] == 'bash', 'Windows has another shell'
        commands = [step['run'] for step in job['steps'] if 'run' in step]
        assert [command.split()[:2] for command in commands] == [['sh', '.ci/run']]
        assert job['timeout-minutes'] <= 90
    assert jobs['fast']['steps'][-1]['run'] == 'sh .ci/run fast'
    assert jobs['full']['steps'][-1]['run'] == 'sh .ci/run'


def test_versions_in_the_workflow_are_texts():
    "YAML reads 3.10 as the number 3.1."
    for job in workflow()['jobs'].values():
        setup = next(step for step in job['steps'] if 'setup-python' in step.get('uses', ''))
        assert isinstance(setup['with']['python-version'], str)
    assert all(
        isinstance(v, str) for v in workflow()['jobs']['fast']['strategy']['matrix']['python']
    )


def test_line_ends_are_the_same_on_every_system():
    text = (ROOT / '.gitattributes').read_text(encoding='utf-8')
    assert '* text=auto eol=lf' in text.splitlines()
    for path in [*ROOT.glob('*.*'), *MODULES, *ROOT.glob('nbs/**/*.ipynb')]:
        if path.is_file() and path.suffix in ('.py', '.ipynb', '.md', '.toml', '.ini'):
            assert b'\r\n' not in path.read_bytes(), path
