"""Training runs that are killed, stopped, damaged or misused, tested with real processes.

One process imports torch and forks a child for every run below. `python tests/test_reliability.py`
is that process. A run therefore costs only the time of its training steps. A child can kill itself
at a named moment: `kill=('half', 2)` means when the second file is half written. The tests can also
kill a child at any time.
"""

import copy
import itertools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from pdae_nb import files
from pdae_nb.data import Images, batches, load_images, to_signed, to_uint8
from pdae_nb.denoise import GaussianMixture, denoising_loss
from pdae_nb.files import (
    fill,
    load_checkpoint,
    read_tensors,
    save_checkpoint,
    stoppable,
    write_tensors,
)
from pdae_nb.forward import Schedule, add_noise, posterior
from pdae_nb.methods import dpm
from pdae_nb.model import load_run, save_run
from pdae_nb.recipes import recipe
from pdae_nb.sampling import sample, trajectory
from pdae_nb.solvers import invert_exactly
from pdae_nb.training import EMA, NonFinite, Recipe, fit, train
from pdae_nb.unet import UNet

ROOT = Path(__file__).parent.parent
NAME = 'mnist_dpm'
STEPS = 24
EVERY = 3  # steps between checkpoints
NAN = float('nan')


# ================================================================ the process that forks

# ---------------------------------------------------------------- moments at which a child dies


def emitter(kill):
    "Count the moments by name; kill the process at the one given as (name, number)."
    seen = {}

    def emit(place):
        seen[place] = seen.get(place, 0) + 1
        if kill and (place, seen[place]) == tuple(kill):
            os.kill(os.getpid(), signal.SIGKILL)

    return emit


class HalfFile:
    "A file that reports the moment at which half of a text or of some bytes is written."

    def __init__(self, file, emit, place='half'):
        self.file = file
        self.emit = emit
        self.place = place

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        middle = len(data) // 2
        self.file.write(data[:middle])
        self.file.flush()
        self.emit(self.place)
        self.file.write(data[middle:])


def watched(f, emit, before, after=None):
    "f, which reports the moments before and after each of its calls."

    def call(*args, **kw):
        emit(before)
        out = f(*args, **kw)
        if after:
            emit(after)
        return out

    return call


def watch(emit):
    "Report the moments at which a kill could do damage."

    def open_watched(path, mode='r', *args, **kw):
        file = open(path, mode, *args, **kw)  # noqa: SIM115  the caller closes it
        if 'w' not in mode or '.lock' in str(path):
            return file
        return HalfFile(file, emit)

    def write_text(path, text, *args, **kw):
        with open(path, 'w', *args, **kw) as file:
            HalfFile(file, emit, 'text').write(text)

    files.open = open_watched
    os.fsync = watched(os.fsync, emit, 'fsync')
    Path.replace = watched(Path.replace, emit, 'replace', 'replaced')
    Path.rename = watched(Path.rename, emit, 'rename', 'renamed')
    Path.unlink = watched(Path.unlink, emit, 'unlink')
    Path.write_text = write_text
    torch.optim.AdamW.step = watched(torch.optim.AdamW.step, emit, 'step', 'stepped')


# ---------------------------------------------------------------- what a child does


def small(**changes):
    "Recipe of 8x8 images; flips, dropout, noise and timesteps use random numbers."
    settings = dict(
        px=8,
        batch=8,
        images=8 * STEPS,
        flip=True,
        cool=0.3,
        net=dict(ch=8, mult=(1,), n_res=1, drop=0.1),
    )
    return replace(recipe(NAME, 'smoke'), **(settings | changes))


def ignore(place):
    "Report nothing."


def make_task(r, emit=ignore, slow=0.0, poison=()):
    "The task of the run. Every step takes `slow` seconds longer; the losses at some steps are NaN."
    task = dpm.dpm_task(r)
    numbers = itertools.count(1)

    def loss_fn(x0, y):
        emit('loss')
        time.sleep(slow)
        losses, t = task.loss_fn(x0, y)
        return (losses * NAN if next(numbers) in poison else losses), t

    return replace(task, loss_fn=loss_fn, preview=None)


def job_train(out, *, kill=None, slow=0.0, poison=(), changes=None, fsize=None, every=EVERY):
    "Train. `fsize` limits the size of a file in bytes; `changes` is a change of the recipe."
    emit = emitter(kill)
    if kill:
        watch(emit)
    if fsize:
        import resource  # Windows has none

        resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
    task = partial(make_task, emit=emit, slow=slow, poison=poison)
    train(NAME, small(**(changes or {})), out, task, every=every, log_every=2, log=print)


def job_second_up():
    """A new `Up` on the features of a frozen `Down`, in the memory format channels_last.

    In this step torch 2.13 crashes unless the features require a gradient.
    """
    net = UNet(c=1, ch=8, mult=(1, 2), n_res=1, size=8, drop=0.1)
    net = net.to(memory_format=torch.channels_last).requires_grad_(False)
    up = copy.deepcopy(net.up).requires_grad_(True).train()
    for p in up.parameters():
        nn.init.normal_(p, std=0.05)
    before = [p.clone() for p in up.parameters()]
    opt = torch.optim.AdamW(up.parameters(), fused=True)
    x = torch.randn(4, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    e = net.embed(torch.arange(1, 5))
    for amp in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            with torch.no_grad():
                features = net.down(x, e)
            features = [h.detach().requires_grad_() for h in features]
            up(features, e).float().square().mean().backward()
        opt.step()
        opt.zero_grad()
    for p, old in zip(up.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, old)


def job_view(path):
    "Tensors that were read stay the same when their file is cut short."
    write_tensors(path, dict(w=torch.ones(100_000), step=torch.tensor(3.0)))
    tensors, _ = read_tensors(path)
    os.truncate(path, 0)
    assert tensors['w'].sum() == 100_000
    assert tensors['step'] == 3


JOBS = dict(train=job_train, second_up=job_second_up, view=job_view)

# ---------------------------------------------------------------- forking


def redirect_output(log):
    "Write stdout and stderr, also those of C code, to the file `log`."
    log_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    sys.stdout = os.fdopen(1, 'w', buffering=1)
    sys.stderr = sys.stdout


def fork(job, log, settings):
    "Start a child that does a job. Returns its process id."
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        redirect_output(log)
        JOBS[job](**settings)
        status = 0
    except BaseException as e:
        print(f'{type(e).__name__}: {e}', flush=True)
    finally:
        os._exit(status)


def warm_up():
    "Do all lazy imports, and load the images, before the first fork."
    torch.set_num_threads(1)
    # tqdm must have no thread, and no lock that a killed child could hold for ever.
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    dpm.load_images = cache(dpm.load_images)
    with tempfile.TemporaryDirectory() as folder:
        train(NAME, small(images=16), folder, make_task, log=ignore)
    threads = [p.joinpath('comm').read_text().strip() for p in Path('/proc/self/task').glob('*')]
    if len(threads) > 1:
        print(f'{threads}: a child may inherit a lock that is never released', file=sys.stderr)


def serve():
    "Answer each request, a line of JSON, with a line: a process id or an exit status."
    warm_up()
    print('ready', flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if 'wait' in request:
            _, answer = os.waitpid(request['wait'], 0)
        else:
            answer = fork(request.pop('job'), request.pop('log'), request)
        print(answer, flush=True)


# ================================================================ the tests

ENV = os.environ | dict(
    PYTHONPATH=str(ROOT),
    OMP_NUM_THREADS='1',
    CUDA_VISIBLE_DEVICES='',
    PYTHONHASHSEED='0',
    MPLBACKEND='Agg',
    JE_ARROW_MALLOC_CONF='background_thread:false',
    PYTHONFAULTHANDLER='1',
)


def last_line(path):
    return Path(path).read_text().strip().split('\n')[-1]


class Server:
    "The process that forks, seen from the tests."

    def __init__(self, log):
        self.log = Path(log)  # output of a child, unless `start` is given another file
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENV,
            cwd=ROOT,
        )
        assert self.answer('start') == 'ready\n'

    def answer(self, request, pid=None):
        "Its next line. If none comes, the stacks of the processes go to the log and to stderr."
        readable, _, _ = select.select([self.process.stdout], [], [], 300)
        if not readable:
            for hanging in filter(None, (pid, self.process.pid)):
                os.kill(hanging, signal.SIGABRT)
                time.sleep(1)
            log = self.log.read_text() if self.log.exists() else ''
            raise TimeoutError(f'no answer to {request} for 300 s. {log}')
        return self.process.stdout.readline()

    def ask(self, **request):
        print(json.dumps(request, default=str), file=self.process.stdin, flush=True)
        return int(self.answer(request, request.get('wait')))

    def start(self, job='train', log=None, **settings):
        "Start a job. Returns its process id."
        return self.ask(job=job, log=log or self.log, **settings)

    def wait(self, pid):
        "Wait for the end of a job. Returns its exit status: -n if it was killed by signal n."
        return os.waitstatus_to_exitcode(self.ask(wait=pid))

    def run(self, job='train', **settings):
        "Do a job. Returns its exit status and the last line of its output."
        status = self.wait(self.start(job, **settings))
        return status, last_line(self.log)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp('server') / 'log')
    yield server
    server.close()


# ---------------------------------------------------------------- comparing runs


def checkpoints(out):
    return sorted((out / 'checkpoints').glob('step_*.safetensors'))


def names(paths):
    return [p.name for p in paths]


def contents(paths):
    return {p.name: p.read_bytes() for p in paths}


def newest(out):
    "Tensors and metadata of the newest checkpoint."
    return read_tensors(checkpoints(out)[-1])


def run_json(out):
    return json.loads((out / NAME / 'run.json').read_text())


def log_lines(out):
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def leftovers(folder):
    "Temporary files and folders."
    return [*folder.rglob('*.tmp'), *folder.rglob('*.old')]


def raw(v):
    "The bytes of a tensor. Unlike ==, they distinguish 0 from -0, and a NaN equals itself."
    return v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a, b):
    "Two dictionaries of tensors are equal bit for bit."
    assert a.keys() == b.keys()
    odd = [k for k in a if raw(a[k]) != raw(b[k])]
    assert not odd, f'{len(odd)} of {len(a)} tensors differ, e.g. {odd[:3]}'


def assert_ends_like(out, ref):
    "The run in `out` has the weights, average, optimiser, result and log of the run in `ref`."
    tensors, meta = newest(out)
    ref_tensors, ref_meta = newest(ref)
    assert meta['i'] == ref_meta['i'] == STEPS
    assert meta['skipped'] == ref_meta['skipped']
    assert {k.split('.')[0] for k in tensors} == {'model', 'ema', 'opt'}
    assert any(k.endswith('exp_avg_sq') for k in tensors)
    assert_same(tensors, ref_tensors)

    weights = Path(NAME) / 'dpm.safetensors'
    assert (out / weights).read_bytes() == (ref / weights).read_bytes()
    assert run_json(out)['result'] == run_json(ref)['result']
    assert run_json(out)['images_seen'] == run_json(ref)['images_seen']

    # The log has no gaps and no repetitions.
    assert [line['step'] for line in log_lines(out)] == list(range(2, STEPS + 1, 2))
    assert not leftovers(out), 'temporary files of a killed process were not removed'
    assert len(checkpoints(out)) == 2


@pytest.fixture(scope='module')
def ref_seconds(server, tmp_path_factory):
    "The folder of an uninterrupted run, and the duration of the run."
    out = tmp_path_factory.mktemp('ref')
    start = time.time()
    status, last = server.run(out=out)
    seconds = time.time() - start
    assert status == 0, last
    return out, seconds


@pytest.fixture(scope='module')
def ref(ref_seconds):
    "The folder of an uninterrupted run."
    out, _ = ref_seconds
    return out


@pytest.fixture(scope='module')
def half(server, tmp_path_factory):
    "A run killed in its eighth step, with the checkpoints of steps 3 and 6."
    out = tmp_path_factory.mktemp('half')
    status, _ = server.run(out=out, kill=('loss', 8))
    assert status == -signal.SIGKILL
    assert names(checkpoints(out)) == ['step_000000003.safetensors', 'step_000000006.safetensors']
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / 'run'


@pytest.fixture
def resumed(half, out):
    "A copy of the killed run, for a test to resume."
    return Path(shutil.copytree(half, out))


def assert_completes(server, out, ref, **settings):
    "The same command completes the run, with the same result as an uninterrupted run."
    status, last = server.run(out=out, **settings)
    assert status == 0, last
    assert_ends_like(out, ref)


# ---------------------------------------------------------------- killed


def test_the_uninterrupted_run_is_complete(ref):
    tensors, meta = newest(ref)
    assert meta['i'] == STEPS
    assert meta['skipped'] == 0
    weights = {k: v for k, v in tensors.items() if k.startswith('model.')}
    averages = [tensors['ema' + k.removeprefix('model')] for k in weights]
    equal = [raw(a) == raw(w) for a, w in zip(averages, weights.values(), strict=True)]
    assert not all(equal), 'if they were equal, a lost average would not be noticed'


@pytest.mark.slow
def test_killed_at_random_times(server, ref_seconds, out):
    "At least 20 kills at random times within one run."
    ref, seconds = ref_seconds
    rng = random.Random(0)
    kills = 0
    seen = set()  # names of checkpoints
    for _ in range(60):
        pid = server.start(out=out, every=1)
        time.sleep(rng.uniform(0, 0.3 * seconds))
        os.kill(pid, signal.SIGKILL)
        completed = server.wait(pid) == 0
        if not completed:
            kills += 1
            seen.update(names(checkpoints(out)))
        if kills >= 20 and (completed or len(seen) >= 8):
            break
        if completed:
            assert_ends_like(out, ref)
            shutil.rmtree(out)
    assert kills >= 20
    assert len(seen) >= 3
    assert_completes(server, out, ref, every=1)


PLACES = ['loss', 'step', 'stepped', 'half', 'fsync', 'replace', 'replaced', 'unlink']


@pytest.mark.slow
def test_killed_at_every_dangerous_moment(server, ref, out):
    """One run, killed again and again.

    The moments are: in the forward pass, before and after the update, in the middle of a file,
    before its sync, before and after its renaming, before the removal of the old file, and in the
    middle of the shortened log.
    """
    moments = [('loss', 6), ('text', 1), *itertools.product(PLACES, (1, 2)), ('text', 1)]
    for place, number in moments:
        status, last = server.run(out=out, kill=(place, number))
        assert status == -signal.SIGKILL, f'{place} {number}: {last}'
        if place in ('half', 'fsync') and number == 1:
            assert list(out.rglob('.*.tmp')), 'it was not killed in the middle of writing'
        for p in checkpoints(out):
            read_tensors(p)  # a file with the name of a checkpoint is whole
    assert_completes(server, out, ref)


FINISHING = [
    ('half', 2),
    ('half', 4),
    ('fsync', 4),
    ('replace', 2),
    ('rename', 1),
    ('renamed', 1),
]


@pytest.mark.parametrize('moment', FINISHING, ids=str)
def test_killed_while_finishing(server, ref, out, moment):
    "The folder of the finished run is complete, or it does not exist."
    shutil.copytree(ref, out)
    shutil.rmtree(out / NAME)
    status, last = server.run(out=out, kill=moment)
    assert status == -signal.SIGKILL, last
    if (out / NAME).exists():
        assert load_run(out / NAME).dpm
    assert_completes(server, out, ref)


def test_replacing_a_run_never_loses_it(tmp_path, monkeypatch):
    path = tmp_path / 'a_dpm'
    parts = dict(dpm=tiny())
    save_run(path, parts, None, dict(n=1))
    rename = Path.rename
    calls = []

    def interrupted_at_the_second_call(self, to):
        calls.append(to)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, 'rename', interrupted_at_the_second_call)
    with pytest.raises(KeyboardInterrupt):
        save_run(path, parts, None, dict(n=2))
    monkeypatch.undo()
    assert load_run(path).about['n'] == 1  # the old run is still found
    save_run(path, parts, None, dict(n=3))
    assert load_run(path).about['n'] == 3
    assert names(tmp_path.iterdir()) == ['a_dpm']


# ---------------------------------------------------------------- stopped, doubled, changed


def wait_until(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f'{condition.__name__} is not true after {seconds} s'
        time.sleep(0.005)


@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_asked_to_stop(server, ref, out, sig):
    def four_steps_are_logged():
        log = out / 'log.jsonl'
        return log.exists() and log.read_text().count('\n') >= 2

    pid = server.start(out=out, slow=0.3)
    wait_until(four_steps_are_logged)
    os.kill(pid, sig)
    assert server.wait(pid) == 1
    _, meta = newest(out)
    assert last_line(server.log) == (
        f'Stopped: stopped by {sig.name}: saved after step {meta["i"]} of {STEPS}; '
        'the same command goes on from there'
    )
    assert 4 <= meta['i'] < STEPS
    assert_completes(server, out, ref)


SCRIPT = """
import sys, torch
from pdae_nb.recipes import recipe
from pdae_nb.training import train

def log(line):
    print(line, flush=True)

torch.set_num_threads(1)
train('mnist_dpm', recipe('mnist_dpm', 'smoke'), sys.argv[1], every=10**6, log_every=1, log=log)
"""


@pytest.mark.slow
def test_ctrl_c_on_a_plain_process(out):
    process = subprocess.Popen(
        [sys.executable, '-c', SCRIPT, out],
        env=ENV | dict(PDAE_NB_CACHE=str(out.parent)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while 'loss' not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode != 0
    assert 'Stopped: stopped by SIGINT: saved after step' in err.strip().split('\n')[-1]
    _, meta = newest(out)
    assert meta['i'] >= 1


def test_stoppable_in_another_thread():
    "Only the main thread can handle signals. In another thread `stoppable` does nothing."
    got = []

    def body():
        with stoppable() as signals:
            got.append(signals)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert got == [[]]


def test_second_run_in_one_folder_is_refused(server, ref, out):
    def a_checkpoint_is_written():
        return bool(checkpoints(out))

    first = server.start(out=out, slow=0.05, log=f'{out}.log')
    wait_until(a_checkpoint_is_written)
    status, last = server.run(out=out)
    assert status == 1
    assert last == f'RuntimeError: another run is writing to {out}'
    os.kill(first, signal.SIGKILL)
    assert server.wait(first) == -signal.SIGKILL
    assert_completes(server, out, ref)  # a killed run holds no lock


def test_another_recipe_is_refused(server, resumed, ref, tmp_path):
    kept = contents(checkpoints(resumed))
    status, last = server.run(out=resumed, changes=dict(lr=0.001, seed=7))
    assert status == 1
    refusal = f'ValueError: {resumed} holds a run of another recipe'
    assert last.startswith(f'{refusal}: lr 0.002 → 0.001, seed 0 → 7.'), last
    assert contents(checkpoints(resumed)) == kept

    done = Path(shutil.copytree(ref, tmp_path / 'done'))
    status, last = server.run(out=done, changes=dict(batch=16))
    assert status == 1
    assert 'batch 8 → 16' in last
    assert server.run(out=done) == (0, f'{done / NAME} is done')


# ---------------------------------------------------------------- damaged files


class Bomb:
    "An object that writes a file when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f'open({self.path!r}, "w").close()',)


def pickled(folder):
    "Bytes of a pickle. Whoever loads it writes the file `exploded` to the folder."
    path = folder / 'pickle.pt'
    torch.save(dict(model=torch.zeros(3), bomb=Bomb(folder / 'exploded')), path)
    data = path.read_bytes()
    path.unlink()
    return data


def exploded(folder):
    return list(folder.rglob('exploded'))


def flipped(data, at, bit=2):
    "The bytes, with one bit changed."
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


DAMAGE = {  # name -> (bytes of a checkpoint, its folder) -> damaged bytes
    'empty': lambda data, folder: b'',
    'a few bytes': lambda data, folder: data[:7],
    'half': lambda data, folder: data[: len(data) // 2],
    'last byte missing': lambda data, folder: data[:-1],
    'one byte more': lambda data, folder: data + b'x',
    'zeros': lambda data, folder: bytes(len(data)),
    'random bytes': lambda data, folder: random.Random(0).randbytes(len(data)),
    'pickle': lambda data, folder: pickled(folder),
    'bit in the length': lambda data, folder: flipped(data, 1),
    'bit in the header': lambda data, folder: flipped(data, 3000),
    'bit in the weights': lambda data, folder: flipped(data, len(data) - 5000),
    'bit in the metadata': lambda data, folder: data.replace(b'skipped\\": 0', b'skipped\\": 4'),
    'another safetensors file': lambda data, folder: save(dict(w=torch.zeros(3))),
}


def test_unpickling_is_noticed(tmp_path):
    "The tests below can find out whether a file was unpickled."
    data = pickled(tmp_path)
    assert not exploded(tmp_path)
    path = tmp_path / 'file'
    path.write_bytes(data)
    torch.load(path, weights_only=False)
    assert exploded(tmp_path)


@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_newest_checkpoint(server, ref, resumed, kind):
    "The run continues from the checkpoint before."
    p = checkpoints(resumed)[-1]
    old = p.read_bytes()
    new = DAMAGE[kind](old, p.parent)
    p.write_bytes(new)
    assert new != old
    assert len(checkpoints(resumed)) == 2
    assert_completes(server, resumed, ref)
    said = server.log.read_text()
    assert f'skipping {p}' in said
    assert f'going on at step 3 of {STEPS}' in said
    assert not exploded(resumed), 'it was unpickled'


def test_both_checkpoints_damaged(server, ref, out):
    "New checkpoints are kept, even if the damaged ones have higher numbers."
    folder = out / 'checkpoints'
    folder.mkdir(parents=True)
    for i in (40, 50):
        (folder / f'step_{i:09d}.safetensors').write_bytes(b'garbage')
    status, _ = server.run(out=out, kill=('loss', 5))
    assert status == -signal.SIGKILL
    assert names(checkpoints(out)) == ['step_000000003.safetensors']
    assert_completes(server, out, ref)


def test_a_checkpoint_of_another_network(server, resumed):
    p = checkpoints(resumed)[-1]
    tensors, meta = read_tensors(p)
    first_weight = next(k for k in tensors if k.startswith('model.'))
    del tensors[first_weight]
    write_tensors(p, tensors, meta)
    status, last = server.run(out=resumed)
    assert status == 1
    assert 'the weights do not match the network' in last


def test_every_changed_bit_is_noticed_or_harmless(tmp_path):
    "A file with one changed bit is refused, or it has the same values: a bit of the padding."
    f = tmp_path / 'f'
    w = torch.arange(6.0).reshape(2, 3)
    write_tensors(f, dict(w=w, n=torch.tensor(7)), dict(i=3))
    data = f.read_bytes()

    def assert_values():
        tensors, meta = read_tensors(f)
        assert meta == dict(i=3)
        assert torch.equal(tensors['w'].flatten(), w.flatten())
        assert tensors['n'] == 7

    assert_values()
    refused = 0
    for at in range(len(data)):
        f.write_bytes(flipped(data, at, bit=at % 8))
        try:
            assert_values()
        except ValueError as e:
            refused += 1
            assert str(f) in str(e)
            assert '\n' not in str(e)
    assert refused > len(data) / 2


def test_values_of_every_type_are_restored(tmp_path):
    dtypes = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
    )
    want = {str(dtype): torch.tensor([[1, 0, 1]]).to(dtype) for dtype in dtypes}
    want |= dict(
        scalar=torch.tensor(2.5),
        none=torch.zeros(0, 3),
        last=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        nan=torch.tensor([NAN, float('-inf')]),
    )
    path = tmp_path / 'a/b/f'
    write_tensors(path, want, dict(text='α', none=None))
    got, meta = read_tensors(path)
    assert meta == dict(text='α', none=None)
    assert_same(got, want)
    for k, v in want.items():
        assert got[k].dtype == v.dtype
        assert got[k].shape == v.shape


def test_what_was_read_is_a_copy(server, tmp_path):
    assert server.run('view', path=tmp_path / 'f') == (0, '')


class Training(NamedTuple):
    "A network that is trained, its average and its optimiser."

    net: nn.Module
    ema: EMA
    opt: torch.optim.Optimizer

    @classmethod
    def new(cls, seed):
        torch.manual_seed(seed)
        net = tiny().to(memory_format=torch.channels_last)
        for p in net.parameters():
            p.data.normal_()
        return cls(net, EMA(net), torch.optim.AdamW(net.parameters(), fused=True))

    def step(self):
        x = torch.ones(2, 1, 8, 8)
        self.net(x, torch.tensor([1, 2])).square().mean().backward()
        self.opt.step()
        self.opt.zero_grad()
        self.ema.update(0)


def test_the_optimiser_is_restored_bit_for_bit(tmp_path):
    a = Training.new(0)
    b = Training.new(1)
    a.step()
    save_checkpoint(tmp_path, 1, *a, {})
    load_checkpoint(tmp_path, *b)
    for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True):
        saved = a.opt.state[p]
        loaded = b.opt.state[q]
        assert saved.keys() == {'step', 'exp_avg', 'exp_avg_sq'}
        assert_same(dict(saved), dict(loaded))
        assert all(saved[k].stride() == loaded[k].stride() for k in saved)
    a.step()
    b.step()
    assert_same(a.net.state_dict(), b.net.state_dict())
    assert_same(a.ema.module.state_dict(), b.ema.module.state_dict())
    smaller = torch.optim.AdamW(list(b.net.parameters())[:3])
    with pytest.raises(ValueError, match='the optimiser has no parameter'):
        load_checkpoint(tmp_path, b.net, b.ema, smaller)


# ---------------------------------------------------------------- disk full


def test_file_too_large_for_the_disk(server, ref, resumed):
    kept = contents(checkpoints(resumed))
    status, last = server.run(out=resumed, fsize=20_000)
    assert status == 1
    assert 'cannot write' in last
    assert 'step_000000009.safetensors: File too large' in last
    assert contents(checkpoints(resumed)) == kept
    assert not list(resumed.rglob('*.tmp'))
    assert_completes(server, resumed, ref)


@pytest.mark.parametrize('call', ['os.fsync', 'pathlib.Path.replace', 'pathlib.Path.mkdir'])
def test_no_space_left(tmp_path, monkeypatch, call):
    "The old file is kept."
    f = tmp_path / 'f'
    write_tensors(f, dict(w=torch.zeros(3)), dict(n=1))

    def full(*args, **kw):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(call, full)
    with pytest.raises(OSError, match=f'cannot write {f}: No space left on device'):
        write_tensors(f, dict(w=torch.ones(3)), dict(n=2))
    monkeypatch.undo()
    tensors, meta = read_tensors(f)
    assert meta == dict(n=1)
    assert torch.equal(tensors['w'], torch.zeros(3))
    assert names(tmp_path.iterdir()) == ['f']


# ---------------------------------------------------------------- steps that are not finite


def test_a_step_that_is_not_finite_is_skipped(server, out):
    status, last = server.run(out=out, poison=(4, 9, 10))
    assert status == 0, last
    assert run_json(out)['steps_skipped'] == 3
    assert log_lines(out)[-1]['skipped'] == 3
    tensors, _ = newest(out)
    assert all(v.isfinite().all() for v in tensors.values())
    assert raw(tensors['opt.0.step']) == raw(torch.tensor(STEPS - 3.0))


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run(server, half, out):
    status, last = server.run(out=out, poison=tuple(range(7, 99)))
    message = 'NonFinite: 10 steps in a row were not finite, the last one step 16, at t = ['
    assert status == 1
    assert last.startswith(message), last
    tensors, meta = newest(out)
    assert meta['i'] == 16
    assert meta['skipped'] == 10

    last_finite, meta = newest(half)
    assert meta['i'] == 6
    assert_same(tensors, last_finite)

    # When the losses are finite again, the run can be completed.
    status, last = server.run(out=out)
    assert status == 0, last
    assert run_json(out)['steps_skipped'] == 10


class Line(nn.Module):
    "A network of three weights."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))


LINE_RECIPE = Recipe('digits', 8, {}, images=64, batch=2, lr=0.1)


def ones(n):
    "n batches of two samples."
    return ((torch.ones(2, 3), None) for _ in range(n))


@pytest.mark.parametrize('bad', [NAN, float('inf'), float('-inf')])
@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_a_step_that_is_not_finite_changes_nothing(bad, where):
    "Steps 2 and 3 of 4 change neither weights nor average nor optimiser."
    net = Line()
    ema = EMA(net)
    opt = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    numbers = itertools.count(1)
    t = torch.tensor([3, 5])

    def loss_fn(x0, y):
        losses = (x0 * net.w).square().mean(1)
        if next(numbers) in (2, 3):
            if where == 'loss':
                return losses * bad, t
            losses.register_hook(lambda grad: grad * bad)
        return losses, t

    steps = []
    states = []
    for step in fit(loss_fn, net.parameters(), ones(4), LINE_RECIPE, ema, opt=opt, amp=False):
        state = dict(w=net.w.detach(), average=ema.module.w) | opt.state[net.w]
        steps.append(step)
        states.append({k: v.clone() for k, v in state.items()})
    assert [step.ok for step in steps] == [True, False, False, True]
    assert [step.i for step in steps] == [1, 2, 3, 4]
    assert states[0].keys() == {'w', 'average', 'step', 'exp_avg', 'exp_avg_sq'}
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])
    assert not torch.equal(states[3]['w'], states[0]['w'])


def test_the_noise_of_a_step_depends_only_on_seed_and_step():
    def losses(seed=0, start=0, before=0):
        "Losses after step `start`, a random number each; `before` is the caller's random state."
        torch.manual_seed(before)
        torch.rand(before)
        net = Line()

        def loss_fn(x0, y):
            noisy = x0 * net.w * torch.rand(2, 3) + nn.functional.dropout(net.w)
            return 0 * noisy.mean(1) + torch.rand(2)

        r = replace(LINE_RECIPE, seed=seed)
        steps = fit(loss_fn, net.parameters(), ones(6 - start), r, start=start, amp=False)
        return [step.loss.item() for step in steps]

    whole = losses()
    assert len(set(whole)) == 6
    assert losses(before=5) == whole
    assert losses(start=4) == whole[4:]
    assert not set(losses(seed=1)) & set(whole)


def test_patience_counts_consecutive_steps():
    net = Line()
    numbers = itertools.count()

    def loss_fn(x0, y):
        factor = NAN if next(numbers) % 10 else 1.0
        losses = (net.w.square().sum() * factor).expand(2)
        return losses, torch.tensor([3, 5])

    def n_steps(**settings):
        steps = fit(loss_fn, net.parameters(), ones(30), LINE_RECIPE, amp=False, **settings)
        return len(list(steps))

    assert n_steps() == 30  # after nine steps that are not finite comes a finite one
    message = r'3 steps in a row.*the last one step 4, at t = \[3, 5\]'
    with pytest.raises(NonFinite, match=message):
        n_steps(patience=3)


# ---------------------------------------------------------------- runs that try to do harm


def tiny():
    torch.manual_seed(0)
    return UNet(c=1, ch=4, mult=(1,), n_res=1, size=8)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / 'digits_dpm'
    save_run(path, dict(dpm=tiny()), Schedule.linear(), dict(recipe={}))
    return path


class Edit(NamedTuple):
    "A change of run.json, and words of the error that it must cause."

    change: Callable
    words: str


def part(words, **changes):
    "A change of the description of the network."
    return Edit(lambda about: about['parts']['dpm'].update(changes), words)


def config(words, **changes):
    "A change of the network's keyword arguments."
    return Edit(lambda about: about['parts']['dpm']['config'].update(changes), words)


def second_part(name):
    "One more network, with a name that is not accepted."
    return Edit(
        lambda about: about['parts'].update({name: about['parts']['dpm']}),
        f'{name!r} cannot name a part',
    )


NOT_OURS = 'parts must come from pdae_nb'
NOT_BUILT = 'UNet cannot be built'
INCOMPLETE = 'a part needs a module, a kind and a config'
NO_PARTS = 'lists no parts'
TOUCH = dict(args=['touch', 'exploded'])
BAD_NAMES = (
    '../dpm',
    '/etc/passwd',
    '..',
    '',
    'a/b',
    'a\\b',
    'sched',
    'about',
    '__class__',
    'a b',
    'a\n',
)

HOSTILE = {
    'other package': part(NOT_OURS, module='subprocess', kind='Popen', config=TOUCH),
    'builtins': part(NOT_OURS, module='builtins', kind='exec', config={}),
    'dotted': part(NOT_OURS, module='pdae_nb.files.os'),
    'similar name': part(NOT_OURS, module='pdae_nb_evil.unet'),
    'path': part(NOT_OURS, module='pdae_nb./tmp/evil'),
    'no such module': part("No module named 'pdae_nb.nothing'", module='pdae_nb.nothing'),
    'function': part(
        "has no network 'save_run'", module=save_run.__module__, kind='save_run', config=TOUCH
    ),
    'class that is no network': part(
        "has no network 'Schedule'",
        module=Schedule.__module__,
        kind='Schedule',
        config=dict(beta=[0.1]),
    ),
    'module as kind': part("has no network 'torch'", kind='torch'),
    'unknown argument': config(NOT_BUILT, colour='red'),
    'wrong argument': config(NOT_BUILT, ch='many'),
    'negative': config(NOT_BUILT, ch=-4),
    'wider': config('the network wants', ch=8),
    'deeper': config('the weights do not match the network', n_res=2),
    'kind is no name': part(INCOMPLETE, kind=['UNet']),
    'config is no dict': part(INCOMPLETE, config=[1, 2]),
    'part is no dict': Edit(lambda about: about['parts'].update(dpm='UNet'), INCOMPLETE),
    'no parts': Edit(lambda about: about.pop('parts'), NO_PARTS),
    'parts is a list': Edit(lambda about: about.update(parts=['dpm']), NO_PARTS),
    **{f'name {name!r}': second_part(name) for name in BAD_NAMES},
}


def assert_one_line_with(error, *words):
    "The message of an error is one line of at most 2000 characters that contains all the words."
    said = str(error.value)
    assert all(word in said for word in words), said
    assert '\n' not in said
    assert len(said) < 2000


@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_run_json(stored, kind, monkeypatch):
    monkeypatch.chdir(stored)
    about = json.loads((stored / 'run.json').read_text())
    edit = HOSTILE[kind]
    edit.change(about)
    (stored / 'run.json').write_text(json.dumps(about))
    with pytest.raises(ValueError) as e:
        load_run(stored)
    assert_one_line_with(e, edit.words, str(stored))
    assert not exploded(stored)


NOT_RUN_JSON = [
    (b'', 'is not JSON'),
    (b'{"parts": {', 'is not JSON'),
    (b'\xff\xfe', 'is not JSON'),
    (b'[]', NO_PARTS),
    (b'3', NO_PARTS),
]


@pytest.mark.parametrize('data, words', NOT_RUN_JSON, ids=str)
def test_run_json_with_other_content(stored, data, words):
    (stored / 'run.json').write_bytes(data)
    with pytest.raises(ValueError, match=words):
        load_run(stored)


def test_hostile_weights(stored):
    weights = stored / 'dpm.safetensors'
    good = weights.read_bytes()
    for data in (pickled(stored), good[:-9], flipped(good, len(good) - 9)):
        weights.write_bytes(data)
        with pytest.raises(ValueError, match='dpm.safetensors'):
            load_run(stored)
    assert not exploded(stored)


@pytest.mark.parametrize('name', ['dpm.safetensors', 'sched.safetensors'])
def test_missing_weights(stored, name):
    assert load_run(stored).sched.T == 1000
    (stored / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_run(stored)


# ---------------------------------------------------------------- wrong arguments

SCHED = Schedule.linear()
X = torch.zeros(2, 1, 4, 4)
T = torch.tensor([1, 2])
U8 = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
LINEAR = nn.Linear(2, 3)
W = torch.zeros(3, 2)
B = torch.zeros(3)


def zero(xt, t):
    return torch.zeros_like(xt)


def cropped(xt, t):
    return xt[:, :, :2]


def first_sample(xt, t):
    return xt[0]


class BadCall(NamedTuple):
    "A call with a wrong argument. Its error states what was received and what is accepted."

    call: Callable  # of a folder for temporary files
    error: type
    words: tuple


def type_error(call, *words):
    return BadCall(call, TypeError, words)


def value_error(call, *words):
    return BadCall(call, ValueError, words)


def not_found(call, *words):
    return BadCall(call, FileNotFoundError, words)


BAD_CALLS = {
    # data
    'to_signed of floats': type_error(lambda tmp: to_signed(X), 'uint8', 'float32'),
    'to_uint8 of bytes': type_error(lambda tmp: to_uint8(U8), 'floating-point', 'uint8'),
    'to_uint8 of NaN': value_error(lambda tmp: to_uint8(X * NAN), '32 of 32', 'NaN'),
    'Images of floats': type_error(lambda tmp: Images(X), 'uint8', 'float32'),
    'Images without N': type_error(lambda tmp: Images(U8[0]), '(N,C,H,W)', '(1, 8, 8)'),
    'Images with too few labels': value_error(
        lambda tmp: Images(U8, torch.zeros(3)), '3 labels', '4 images'
    ),
    'unknown split': value_error(lambda tmp: load_images('digits', 'dev'), 'train', "'dev'"),
    'batches of no images': value_error(
        lambda tmp: next(batches(Images(U8[:0]), 2, 1)), 'no images'
    ),
    'batch that cannot be shared': value_error(
        lambda tmp: next(batches(Images(U8), 3, 1, world=2)), 'batch of 3', '2 processes'
    ),
    # noise schedule
    'beta is a matrix': value_error(lambda tmp: Schedule([[0.1]]), '(T,)', '(1, 1)'),
    'beta > 1': value_error(lambda tmp: Schedule([0.1, 1.5]), '(0,1]', '1.5'),
    't is a float': type_error(lambda tmp: SCHED(torch.tensor([1.0])), 'int64', 'float32'),
    't is no tensor': type_error(lambda tmp: SCHED(3), 'int64', 'got int'),
    't > T': value_error(lambda tmp: SCHED(torch.tensor([1001])), '0…1000', '1001'),
    't < 0': value_error(lambda tmp: SCHED(torch.tensor([-1])), '0…1000', '-1'),
    'no steps': value_error(lambda tmp: SCHED.times(0), '1…1000', 'got 0'),
    'equal times': value_error(lambda tmp: SCHED.times([5, 5]), 'strictly', '[5, 5]'),
    'times > T': value_error(lambda tmp: SCHED.times([1001, 0]), '0…1000', '1001'),
    'less noise than data': value_error(
        lambda tmp: add_noise(SCHED, X, T, X[:1]), '(1, 1, 4, 4)', '(2, 1, 4, 4)'
    ),
    'more t than data': value_error(
        lambda tmp: add_noise(SCHED, X, torch.tensor([1, 2, 3]), X), '3 times', 'batch of 2'
    ),
    't is a scalar': value_error(lambda tmp: add_noise(SCHED, X, torch.tensor(1), X), '(B,)', '()'),
    'data are integers': type_error(
        lambda tmp: add_noise(SCHED, X.long(), T, X.long()), 'floating', 'int64'
    ),
    'posterior at t = 0': value_error(
        lambda tmp: posterior(SCHED, X, X, torch.tensor([0, 1])), '1…1000', 'got 0'
    ),
    # denoisers and sampling
    'loss of a cropped prediction': value_error(
        lambda tmp: denoising_loss(cropped, X, SCHED), '(2, 1, 2, 4)', '(2, 1, 4, 4)'
    ),
    'mu is a vector': value_error(
        lambda tmp: GaussianMixture(torch.zeros(3), 1.0, SCHED), '(K,D)', '(3,)'
    ),
    'x_T are integers': type_error(lambda tmp: sample(zero, X.long(), SCHED), 'floating', 'int64'),
    'x_T is NaN': value_error(lambda tmp: sample(zero, X * NAN, SCHED), '32 of 32', 'NaN'),
    'prediction without B': value_error(
        lambda tmp: sample(first_sample, X, SCHED, 2), '(1, 4, 4)', '(2, 1, 4, 4)'
    ),
    'clip from t = 0': value_error(
        lambda tmp: list(trajectory(zero, X, SCHED, [0, 500, 1000], clip=1.0)),
        'clip',
        'None',
        '1.0',
    ),
    'exact inversion in one step': value_error(
        lambda tmp: invert_exactly(zero, X, SCHED, 1), 'at least 2', 'got 1'
    ),
    # training
    'unknown size': value_error(
        lambda tmp: recipe('mnist_dpm', 'huge'), "'huge'", 'mnist_dpm/smoke'
    ),
    'unknown run': value_error(lambda tmp: recipe('nothing_dpm'), "'nothing_dpm'", 'mnist_dpm'),
    'no parameters': value_error(
        lambda tmp: next(fit(zero, [], ones(1), LINE_RECIPE)), 'no parameter'
    ),
    'no gradient': value_error(
        lambda tmp: next(fit(zero, [torch.zeros(3)], ones(1), LINE_RECIPE)), 'requires a gradient'
    ),
    'name without task': value_error(
        lambda tmp: train('mnist', small(), tmp / 'out'), "'mnist'", 'dpm'
    ),
    'every = 0': value_error(
        lambda tmp: train(NAME, small(), tmp / 'out', make_task, every=0),
        'every',
        'at least 1',
        'got 0 and',
    ),
    'log_every = 0': value_error(
        lambda tmp: train(NAME, small(), tmp / 'out', make_task, log_every=0),
        'log_every',
        'at least 1',
        'and 0',
    ),
    'batch = 0': value_error(lambda tmp: small(batch=0), 'batch cannot be 0', '>= 1'),
    'images < 0': value_error(lambda tmp: small(images=-5), 'images cannot be -5', '>= 1'),
    'lr is NaN': value_error(lambda tmp: small(lr=NAN), 'lr cannot be nan', '> 0'),
    'ema > 1': value_error(lambda tmp: small(ema=1.5), 'ema cannot be 1.5', '< 1'),
    # files
    'a list is no tensor': type_error(
        lambda tmp: write_tensors(tmp / 'f', dict(w=[1.0])), "'w'", 'tensor', 'list'
    ),
    'no file': not_found(lambda tmp: read_tensors(tmp / 'nothing'), 'nothing'),
    'missing weight': value_error(lambda tmp: fill(LINEAR, dict(weight=W), 'file'), 'file', 'bias'),
    'transposed weight': value_error(
        lambda tmp: fill(LINEAR, dict(weight=W.T, bias=B), 'file'),
        'file',
        'has shape (2, 3)',
        'wants (3, 2)',
    ),
    'weights are integers': value_error(
        lambda tmp: fill(LINEAR, dict(weight=W.long(), bias=B), 'file'),
        'file',
        'has type torch.int64',
        'wants torch.float32',
    ),
    'network of another package': value_error(
        lambda tmp: save_run(tmp / 'r', dict(net=LINEAR), None, {}), 'pdae_nb', 'Linear'
    ),
    'name of a part': value_error(
        lambda tmp: save_run(tmp / 'r', {'../x': tiny()}, None, {}), "'../x'"
    ),
    'network without config': type_error(
        lambda tmp: save_run(tmp / 'r', dict(dpm=tiny().up), None, {}), 'Up', '.config'
    ),
    'no run': not_found(lambda tmp: load_run(tmp / 'nothing'), 'nothing', 'run.json'),
}


@pytest.mark.parametrize('name', BAD_CALLS)
def test_bad_calls(name, tmp_path):
    bad = BAD_CALLS[name]
    with pytest.raises(bad.error) as e:
        bad.call(tmp_path)
    assert e.type is bad.error
    assert_one_line_with(e, *bad.words)


# ---------------------------------------------------------------- several processes, torch itself


@pytest.mark.parametrize('world', [2, 4])
def test_any_number_of_processes_gets_the_same_batches(world):
    n = 21
    size = 8  # the epochs end inside a batch
    images = Images(torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8), torch.arange(n))

    def get(**settings):
        return list(batches(images, size, 7, flip=True, seed=3, **settings))

    whole = get()
    assert len(whole) == 7
    for rank in range(world):
        share = get(rank=rank, world=world)
        for (x, y), (x_whole, y_whole) in zip(share, whole, strict=True):
            assert torch.equal(x, x_whole[rank::world])
            assert torch.equal(y, y_whole[rank::world])
    for (x, y), (x_whole, y_whole) in zip(get(start=4), whole[4:], strict=True):
        assert torch.equal(x, x_whole)
        assert torch.equal(y, y_whole)

    first_epoch = torch.cat([y for _, y in whole])[:n]
    assert first_epoch.sort().values.tolist() == list(range(n))
    unflipped = [torch.equal(x, to_signed(images.x[y])) for x, y in whole]
    assert not all(unflipped), 'no image is mirrored'


def test_a_second_decoder_on_a_frozen_encoder(server):
    assert server.run('second_up') == (0, '')


if __name__ == '__main__':
    serve()
