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
import re
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
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from pdae_nb import files, hub
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
from pdae_nb.hub import load, train
from pdae_nb.methods.dpm import DPM, ClassConditionalDPM
from pdae_nb.methods.latent import LatentDPM
from pdae_nb.model import Card, read_model, spec_of, write_model
from pdae_nb.recipes import RECIPES, recipe
from pdae_nb.sampling import sample, trajectory
from pdae_nb.solvers import invert_exactly
from pdae_nb.training import EMA, NonFinite, Recipe, fit
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
        cooldown=0.3,
        net=dict(ch=8, mult=(1,), n_res=1, drop=0.1),
    )
    return replace(recipe(NAME, 'smoke'), **(settings | changes))


def first_rows():
    "The first row of size `smoke` of each method with each of its settings: title -> run."
    rows = {}
    for (name, size), r in RECIPES.items():
        preset = getattr(r.settings, 'preset', '')
        if size == 'smoke':
            rows.setdefault(f'{r.method.__name__} {preset}'.strip(), name)
    return rows


KINDS = first_rows()
KIND_STEPS = 6
DROPOUT = ('DPM', 'ClassConditionalDPM', 'PDAE', 'LabelPDAE', 'DiffAE', 'ConditionalDecoder')


def small_of(kind, bases=None):
    "Recipe of one kind of model on 14x14 images; `bases` is the folder with its base."
    r = recipe(KINDS[kind], 'smoke')
    net = r.net | dict(drop=0.1) if kind in DROPOUT else r.net
    base = None if r.base is None else f'{bases}/{r.base.split("_")[-1]}'
    flip = r.method is not LatentDPM  # codes cannot be mirrored
    return replace(r, px=14, batch=8, images=8 * KIND_STEPS, net=net, base=base, flip=flip)


def ignore(place):
    "Report nothing."


def instrument(method, emit=ignore, slow=0.0, poison=()):
    """Change the class of a model in this process, which runs one training.

    Every step takes `slow` seconds longer. The losses at some steps are NaN. No preview is made.
    """
    loss = method.loss
    numbers = itertools.count(1)

    def watched_loss(self, x0, y, draw):
        emit('loss')
        time.sleep(slow)
        losses, t = loss(self, x0, y, draw)
        return (losses * NAN if next(numbers) in poison else losses), t

    def no_preview(self, x0, y):
        return None

    method.loss = watched_loss
    method.preview = no_preview


def first_images(name, split, px, options):
    "The first 32 images of a data set, so that encoding and evaluation take little time."
    images = load_images(name, split, px, options=options)
    return images[:32]


def job_train(
    out,
    *,
    kind=None,
    bases=None,
    kill=None,
    slow=0.0,
    poison=(),
    changes=None,
    fsize=None,
    every=EVERY,
):
    """Train. `fsize` limits the size of a file in bytes; `changes` is a change of the recipe.

    `kind` selects the kind of model, a key of `KINDS`, whose base is in the folder `bases`.
    """
    emit = emitter(kill)
    if kill:
        watch(emit)
    if fsize:
        import resource  # Windows has none

        resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
    r = small_of(kind, bases) if kind else small(**(changes or {}))
    if kind:
        hub.load_images = first_images
    instrument(r.method, emit, slow, poison)
    train(NAME, r, out=out, every=every, log_every=2, log=print)


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
    for dtype in (torch.float32, torch.bfloat16):
        e = e.to(dtype)
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
    hub.load_images = cache(hub.load_images)
    with tempfile.TemporaryDirectory() as folder:
        train(NAME, small(images=16), out=folder, log=ignore)
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
            env=ENV | dict(PDAE_NB_CACHE=str(self.log.parent / 'cache')),
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
    if sys.platform != 'linux':
        pytest.skip('these tests fork a process that has imported torch, which needs Linux')
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
    return json.loads((out / 'run.json').read_text())


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


def weight_files(out):
    "Names and contents of the weights and the noise schedule of a finished run."
    return contents(out.glob('*.safetensors'))


def assert_ends_like(out, ref, steps=STEPS):
    "The run in `out` has the weights, average, optimiser, result and log of the run in `ref`."
    tensors, meta = newest(out)
    ref_tensors, ref_meta = newest(ref)
    assert meta['i'] == ref_meta['i'] == steps
    assert meta['skipped'] == ref_meta['skipped']
    assert {k.split('.')[0] for k in tensors} == {'model', 'ema', 'opt'}
    assert any(k.endswith('exp_avg_sq') for k in tensors)
    assert_same(tensors, ref_tensors)

    assert weight_files(out)
    assert weight_files(out) == weight_files(ref)
    assert run_json(ref)['result'] is not None
    assert run_json(out)['result'] == run_json(ref)['result']
    assert run_json(out)['images_seen'] == run_json(ref)['images_seen']

    # The log has no gaps and no repetitions.
    assert [line['step'] for line in log_lines(out)] == list(range(2, steps + 1, 2))
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


# The first file is the checkpoint. The model is written without its result (files 2, 3 and 4:
# weights, noise schedule, run.json). Then run.json (file 5) is written with the result. Of the
# replaced files, the log comes before the checkpoint. Each file is synced, and its folder, too.
FINISHING = [
    ('half', 2),
    ('half', 4),
    ('fsync', 4),
    ('replace', 3),
    ('replaced', 3),
    ('replaced', 4),
    ('replace', 5),
    ('replaced', 5),
    ('half', 5),
    ('fsync', 5),
    ('replace', 6),
    ('replaced', 6),
]


@pytest.mark.parametrize('moment', FINISHING, ids=str)
def test_killed_while_finishing(server, ref, out, moment):
    "The model of the finished run is complete, or it does not exist."
    shutil.copytree(ref, out)
    for path in (out / 'run.json', *out.glob('*.safetensors')):
        path.unlink()
    status, last = server.run(out=out, kill=moment)
    assert status == -signal.SIGKILL, last
    if (out / 'run.json').exists():
        assert_same(load(out).state_dict(), load(ref).state_dict())
    assert_completes(server, out, ref)


def interrupted_at_the_second_call(monkeypatch):
    "The second renaming of a file or a folder raises KeyboardInterrupt."
    rename = Path.rename
    calls = itertools.count(1)

    def interrupted(self, to):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, 'rename', interrupted)


def test_replacing_a_run_never_loses_it(tmp_path, monkeypatch):
    path = tmp_path / 'a_dpm'
    model = tiny_dpm()

    def save_with(images_seen):
        model.card.images_seen = images_seen
        model.save(path)

    save_with(1)
    interrupted_at_the_second_call(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        save_with(2)
    monkeypatch.undo()
    assert load(path).card.images_seen == 1  # the old run is still found
    save_with(3)
    assert load(path).card.images_seen == 3
    assert names(tmp_path.iterdir()) == ['a_dpm']


# ---------------------------------------------------------------- every kind of model


def perturb(model):
    "Add noise to every weight, so that no layer is zero-initialised."
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def new_model(kind, bases=None):
    "An untrained model of a kind, with random weights."
    r = small_of(kind, bases)
    base = None if r.base is None else load(r.base)
    images = load_images(r.data, 'train', r.px)
    torch.manual_seed(1)
    return perturb(r.method.build(r, images, base))


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    "A folder with a DPM and a PDAE, the bases of other models."
    folder = tmp_path_factory.mktemp('bases')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PDAE_NB_CACHE', str(folder / 'cache'))
        new_model('DPM').save(folder / 'dpm')
        new_model('PDAE', folder).save(folder / 'pdae')
        yield folder


def kinds(slow):
    "Parameters of a test: all kinds of models, of which some are slow."
    return [pytest.param(k, marks=pytest.mark.slow) if k in slow else k for k in KINDS]


IMPORTED = ('DiffusersDPM',)  # importing diffusers takes seconds
SLOW = (*IMPORTED, 'PDAE', 'ScoreVAE release', 'ScoreVAE paper')


def test_the_kinds_are_those_of_the_table():
    in_table = {r.method for r in RECIPES.values()}
    assert {recipe(name, 'smoke').method for name in KINDS.values()} == in_table
    assert len(in_table) == 13
    assert len(KINDS) == 14, 'ScoreVAE has two settings'


def has_dropout(model):
    "Whether a model has a dropout layer that is not switched off."
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(layer.p > 0 for layer in layers)


@pytest.mark.parametrize('kind', kinds(SLOW))
def test_every_kind_of_model_resumes_bit_for_bit(server, bases, tmp_path, kind):
    ref = tmp_path / 'ref'
    out = tmp_path / 'run'
    settings = dict(kind=kind, bases=bases, every=2)
    status, last = server.run(out=ref, **settings)
    assert status == 0, last
    status, last = server.run(out=out, kill=('loss', KIND_STEPS), **settings)
    assert status == -signal.SIGKILL, last
    assert names(checkpoints(out)) == ['step_000000002.safetensors', 'step_000000004.safetensors']
    before, _ = newest(out)
    status, last = server.run(out=out, **settings)
    assert status == 0, last
    assert f'going on at step 4 of {KIND_STEPS}' in server.log.read_text()
    assert_ends_like(out, ref, KIND_STEPS)

    # The steps after the kill changed the weights, and the average differs from the weights.
    tensors, _ = newest(out)
    assert any(raw(before[k]) != raw(v) for k, v in tensors.items() if k.startswith('model.'))
    average = {k.removeprefix('ema.'): v for k, v in tensors.items() if k.startswith('ema.')}
    assert any(raw(tensors[f'model.{k}']) != raw(v) for k, v in average.items())

    # The stored model is the average, rounded to float16.
    model = load(out)
    assert type(model) is small_of(kind).method
    rounded = {k: v.half().float() if v.is_floating_point() else v for k, v in average.items()}
    assert_same(model.state_dict(), rounded)
    assert kind not in DROPOUT or has_dropout(model)


@pytest.mark.parametrize('kind', kinds(IMPORTED))
def test_every_kind_of_model_is_the_same_after_writing_and_reading(bases, tmp_path, kind):
    model = new_model(kind, bases)
    model.card = Card(name='a', images_seen=7, result=dict(loss=0.5))
    asked = []

    def find_base(record, folder):
        asked.append((record['name'], folder))
        return model.base

    write_model(model, tmp_path / 'a', torch.float32)
    again = read_model(tmp_path / 'a', find_base)
    assert type(again) is type(model)
    assert_same(again.state_dict(), model.state_dict())
    assert any(v.any() for v in again.state_dict().values())
    assert again.settings == model.settings
    assert again.shape == model.shape
    assert again.card == model.card
    assert again.base is model.base
    assert not again.training
    has_schedule = kind not in ('EvalClassifier', 'AttributeClassifier')
    assert (again.sched is not None) == (model.sched is not None) == has_schedule
    if has_schedule:
        assert_same(dict(beta=again.sched.beta), dict(beta=model.sched.beta))
    wanted = [] if model.base is None else [(model.base.card.name, (tmp_path / 'a').resolve())]
    assert asked == wanted

    # Weights of 16 bits are restored, too.
    rounded = copy.deepcopy(model).half().float()
    write_model(rounded, tmp_path / 'b')
    assert_same(read_model(tmp_path / 'b', find_base).state_dict(), rounded.state_dict())
    different = raw(torch.cat([v.flatten() for v in rounded.parameters()]))
    assert different != raw(torch.cat([v.flatten() for v in model.parameters()]))


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
from pdae_nb.hub import train
from pdae_nb.recipes import recipe

def log(line):
    print(line, flush=True)

torch.set_num_threads(1)
r = recipe('mnist_dpm', 'smoke')
train('mnist_dpm', r, out=sys.argv[1], every=10**6, log_every=1, log=log)
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
    assert last == f'Busy: another run is writing to {out}'
    os.kill(first, signal.SIGKILL)
    assert server.wait(first) == -signal.SIGKILL
    assert_completes(server, out, ref)  # a killed run holds no lock


def files_with_times(folder):
    "Contents and times of the last change of all files below a folder."
    paths = [p for p in folder.rglob('*') if p.is_file()]
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


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

    # The same recipe loads the finished run. No step is done, and no file is written.
    kept = files_with_times(done)
    assert server.run(out=done) == (0, f'{done} is finished')
    assert files_with_times(done) == kept


# ---------------------------------------------------------------- damaged files


class CodeInPickle:
    "An object that writes a file when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f'open({self.path!r}, "w").close()',)


def pickled(folder):
    "Bytes of a pickle. Whoever loads it writes the file `code_was_run` to the folder."
    path = folder / 'pickle.pt'
    torch.save(dict(model=torch.zeros(3), code=CodeInPickle(folder / 'code_was_run')), path)
    data = path.read_bytes()
    path.unlink()
    return data


def code_was_run(folder):
    return list(folder.rglob('code_was_run'))


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
    assert not code_was_run(tmp_path)
    path = tmp_path / 'file'
    path.write_bytes(data)
    torch.load(path, weights_only=False)
    assert code_was_run(tmp_path)


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
    assert not code_was_run(resumed), 'it was unpickled'


LINE = b'{"step": 8, "seen": 64, "loss": 0.5}\n'
LOG_DAMAGE = {  # name -> lines of the log of a killed run -> damaged bytes
    'NULs at the end': lambda lines: b''.join(lines) + bytes(100),
    'NULs in the middle': lambda lines: lines[0] + bytes(100) + b'\n' + b''.join(lines[1:]),
    'cut line': lambda lines: b''.join(lines) + LINE[:20],
    'cut line in the middle': lambda lines: lines[0] + LINE[:20] + b'\n' + b''.join(lines[1:]),
    'number': lambda lines: b''.join(lines) + b'8\n',
    'text': lambda lines: b''.join(lines) + b'"step"\n',
    'list': lambda lines: b''.join(lines) + b'["step"]\n',
    'step is a text': lambda lines: b''.join(lines) + LINE.replace(b'8', b'"8"'),
    'step is null': lambda lines: b''.join(lines) + LINE.replace(b'8', b'null'),
    'invalid UTF-8': lambda lines: b''.join(lines) + LINE.replace(b'8', b'\xff8'),
    'deeply nested': lambda lines: b''.join(lines) + b'[' * 100_000 + b'\n',
    'duplicate step': lambda lines: b''.join(lines) + lines[-1],
}


@pytest.mark.parametrize('kind', LOG_DAMAGE)
def test_damaged_log(server, ref, resumed, kind):
    "The run continues, and its log is that of an undamaged run."
    path = resumed / 'log.jsonl'
    lines = path.read_bytes().splitlines(True)
    assert len(lines) == 3
    damaged = LOG_DAMAGE[kind](lines)
    path.write_bytes(damaged)
    assert_completes(server, resumed, ref)
    said = server.log.read_text()
    assert ('damaged lines, dropped: 1' in said) == (kind != 'duplicate step')


def test_empty_log(server, ref, resumed):
    (resumed / 'log.jsonl').write_bytes(b'')
    assert server.run(out=resumed)[0] == 0
    assert_same(newest(resumed)[0], newest(ref)[0])
    assert [line['step'] for line in log_lines(resumed)] == list(range(8, STEPS + 1, 2))


def test_log_that_cannot_be_written(server, ref, resumed):
    "A folder has the name of the log."
    (resumed / 'log.jsonl').unlink()
    (resumed / 'log.jsonl').mkdir()
    assert server.run(out=resumed)[0] == 0
    assert server.log.read_text().count('cannot write') == 1
    assert_same(newest(resumed)[0], newest(ref)[0])
    assert weight_files(resumed) == weight_files(ref)


def test_a_checkpoint_is_damaged_twice(resumed):
    "Its new name may exist already. `rename` refuses this on Windows."
    path = checkpoints(resumed)[-1]
    for text in (b'first', b'second'):
        path.write_bytes(text)
        files._newest(path.parent, ignore)
        assert not path.exists()
    assert Path(f'{path}.damaged').read_bytes() == b'second'


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
    with pytest.raises(OSError, match=re.escape(f'cannot write {f}: No space left on device')):
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
    assert meta['i'] == 20  # the device is read every ten steps
    assert meta['skipped'] == 14

    last_finite, meta = newest(half)
    assert meta['i'] == 6
    assert_same(tensors, last_finite)

    # When the losses are finite again, the run can be completed.
    status, last = server.run(out=out)
    assert status == 0, last
    assert run_json(out)['steps_skipped'] == 14


class Line(nn.Module):
    "A network of three weights."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))


LINE_RECIPE = Recipe(DPM, 'digits', 8, images=64, batch=2, lr=0.1)


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

    def loss_fn(x0, y, draw):
        losses = (x0 * net.w).square().mean(1)
        if next(numbers) in (2, 3):
            if where == 'loss':
                return losses * bad, t
            losses.register_hook(lambda grad: grad * bad)
        return losses, t

    steps = []
    states = []
    for step in fit(
        loss_fn, net.parameters(), ones(4), LINE_RECIPE, ema, opt=opt, precision='float32'
    ):
        state = dict(w=net.w.detach(), average=ema.module.w) | opt.state[net.w]
        steps.append(step)
        states.append({k: v.clone() for k, v in state.items()})
    assert [step.ok for step in steps] == [True, False, False, True]
    assert [step.i for step in steps] == [1, 2, 3, 4]
    assert states[0].keys() == {'w', 'average', 'step', 'exp_avg', 'exp_avg_sq'}
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])
    assert not torch.equal(states[3]['w'], states[0]['w'])


def numbers_of_the_global_generator(draw):
    return torch.rand(2)


def dropout_of_ones(draw):
    return nn.functional.dropout(torch.ones(2, 64)).mean(1)


def normal_numbers(draw):
    return draw.normal(3).mean(1)


def timesteps(draw):
    return draw.times(SCHED).float()


def integers(draw):
    return draw.integers(0, 2**40).double()


SOURCES = [
    numbers_of_the_global_generator,
    dropout_of_ones,
    normal_numbers,
    timesteps,
    integers,
]


@pytest.mark.parametrize('source', SOURCES)
def test_the_random_numbers_of_a_step_depend_only_on_seed_and_step(source):
    def losses(seed=0, start=0, before=0):
        "Losses after step `start`, random numbers; `before` is the caller's random state."
        torch.manual_seed(before)
        torch.rand(before)
        net = Line()

        def loss_fn(x0, y, draw):
            return 0 * net.w.sum() + source(draw), None

        r = replace(LINE_RECIPE, seed=seed)
        steps = fit(loss_fn, net.parameters(), ones(6 - start), r, start=start, precision='float32')
        return [tuple(step.losses.tolist()) for step in steps]

    whole = losses()
    assert len(set(whole)) == 6
    assert losses(before=5) == whole
    assert losses(start=4) == whole[4:]
    assert not set(losses(seed=1)) & set(whole)


def test_patience_counts_consecutive_steps():
    net = Line()
    numbers = itertools.count()

    def loss_fn(x0, y, draw):
        factor = NAN if next(numbers) % 10 else 1.0
        losses = (net.w.square().sum() * factor).expand(2)
        return losses, torch.tensor([3, 5])

    def n_steps(**settings):
        steps = fit(
            loss_fn, net.parameters(), ones(30), LINE_RECIPE, precision='float32', **settings
        )
        return len(list(steps))

    assert n_steps() == 30  # after nine steps that are not finite comes a finite one
    message = r'3 steps in a row.*the last one step 4, at t = \[3, 5\]'
    with pytest.raises(NonFinite, match=message):
        n_steps(patience=3)


# ---------------------------------------------------------------- runs that try to do harm


def tiny():
    torch.manual_seed(0)
    return UNet(c=1, ch=4, mult=(1,), n_res=1, size=8)


def tiny_dpm():
    return DPM(tiny(), Schedule.linear(), (1, 8, 8))


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / 'digits_dpm'
    tiny_dpm().save(path)
    return path


@pytest.fixture
def stored_by_version_1(tmp_path):
    path = tmp_path / 'digits_dpm'
    write_tensors(path / 'dpm.safetensors', tiny().state_dict())
    write_tensors(path / 'sched.safetensors', dict(beta=Schedule.linear().beta))
    parts = dict(dpm=spec_of(tiny(), 'dpm'))
    (path / 'run.json').write_text(json.dumps(dict(parts=parts, recipe={})))
    return path


class Edit(NamedTuple):
    "A change of run.json, and words of the error that it must cause."

    change: Callable
    words: str


def network(words, **changes):
    "A change of the description of the network."
    return Edit(lambda record: record['networks']['net'].update(changes), words)


def config(words, **changes):
    "A change of the network's keyword arguments."
    return Edit(lambda record: record['networks']['net']['config'].update(changes), words)


def second_network(name):
    "One more network, with a name that is not accepted."
    return Edit(
        lambda record: record['networks'].update({name: record['networks']['net']}),
        f'{name!r} cannot name a network',
    )


def change(words, **changes):
    "A change of the record itself."
    return Edit(lambda record: record.update(changes), words)


def without(key, words):
    "A record that lacks a key."
    return Edit(lambda record: record.pop(key), words)


NOT_OURS = 'parts must come from pdae_nb'
MODEL_NOT_OURS = 'the class of a model must come from pdae_nb'
NOT_BUILT = 'UNet cannot be built'
INCOMPLETE = 'a part needs a module, a kind and a config'
NO_RECORD = 'needs format 2, a method, networks and a shape'
NO_BASE = 'a base needs a name and a fingerprint'
TOUCH = dict(args=['touch', 'code_was_run'])
MODEL = 'pdae_nb.model'  # a module with functions and with classes that are no networks
BAD_NAMES = (
    '../net',
    '/etc/passwd',
    '..',
    '',
    'a/b',
    'a\\b',
    '__class__',
    '_modules',
    'a b',
    'a\n',
)
TAKEN_NAMES = ('sched', 'shape', 'settings', 'base')  # other arguments of the class of a model

HOSTILE = {
    'other package': network(NOT_OURS, module='subprocess', kind='Popen', config=TOUCH),
    'builtins': network(NOT_OURS, module='builtins', kind='exec', config={}),
    'the package itself': network(NOT_OURS, module='pdae_nb'),
    'empty name of a module': network(NOT_OURS, module='pdae_nb.unet.'),
    'module of a module': network("No module named 'pdae_nb.files.os'", module='pdae_nb.files.os'),
    'similar name': network(NOT_OURS, module='pdae_nb_evil.unet'),
    'path': network(NOT_OURS, module='pdae_nb./tmp/evil'),
    'no such module': network("No module named 'pdae_nb.nothing'", module='pdae_nb.nothing'),
    'function': network(
        "has no network 'write_model'", module=MODEL, kind='write_model', config=TOUCH
    ),
    'class that is no network': network(
        "has no network 'Schedule'",
        module=Schedule.__module__,
        kind='Schedule',
        config=dict(beta=[0.1]),
    ),
    'module as kind': network("has no network 'torch'", kind='torch'),
    'unknown argument': config(NOT_BUILT, colour='red'),
    'wrong argument': config(NOT_BUILT, ch='many'),
    'negative': config(NOT_BUILT, ch=-4),
    'wider': config('the network wants', ch=8),
    'deeper': config('the weights do not match the network', n_res=2),
    'kind is no name': network(INCOMPLETE, kind=['UNet']),
    'config is no dict': network(INCOMPLETE, config=[1, 2]),
    'network is no dict': Edit(lambda record: record['networks'].update(net='UNet'), INCOMPLETE),
    'no networks': without('networks', NO_RECORD),
    'networks is a list': change(NO_RECORD, networks=['net']),
    'networks is empty': change("'net'", networks={}),
    'no format': without('format', NO_RECORD),
    'later format': change(NO_RECORD, format=3),
    'no shape': without('shape', NO_RECORD),
    'no method': without('method', NO_RECORD),
    'method of another package': change(MODEL_NOT_OURS, method='subprocess.Popen'),
    'method of a builtin': change(MODEL_NOT_OURS, method='exec'),
    'method of a similar package': change(MODEL_NOT_OURS, method='pdae_nb_evil.dpm.DPM'),
    'method is a module': change("has no model 'os'", method='pdae_nb.files.os'),
    'method is a function': change("has no model 'write_model'", method=f'{MODEL}.write_model'),
    'method is another model': change(
        "'enc' and 'G'", method='pdae_nb.methods.pdae.PDAE', settings=None
    ),
    'method is a network': change("has no model 'UNet'", method='pdae_nb.unet.UNet'),
    'unknown setting': change('do not fit DPM', settings=dict(colour='red')),
    'wrong setting': change('do not fit DPM', settings=dict(predicts='x0')),
    'settings is a list': change('do not fit DPM', settings=[1]),
    'base without fingerprint': change(NO_BASE, base=dict(name='dpm')),
    'base is a text': change(NO_BASE, base='dpm'),
    'base that is not there': change(
        "needs the base 'nothing' with fingerprint 00000000",
        base=dict(name='nothing', fingerprint='00000000', path='../nothing'),
    ),
    'path as name': change('cannot name a run', name='../../x'),
    **{f'name {name!r}': second_network(name) for name in BAD_NAMES},
}


def assert_one_line_with(error, *words):
    "The message of an error is one line of at most 2000 characters that contains all the words."
    said = str(error.value)
    assert all(word in said for word in words), said
    assert '\n' not in said
    assert len(said) < 2000


def assert_refused(folder, edit):
    "A changed run.json is refused, and nothing that it names is run."
    record = json.loads((folder / 'run.json').read_text())
    load(folder)
    edit.change(record)
    (folder / 'run.json').write_text(json.dumps(record))
    with pytest.raises(ValueError) as e:
        load(folder)
    assert_one_line_with(e, edit.words, str(folder))
    assert not code_was_run(folder)


@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_run_json(stored, kind, monkeypatch):
    monkeypatch.chdir(stored)
    assert_refused(stored, HOSTILE[kind])


@pytest.mark.parametrize('kind', ['PDAE', 'LabelPDAE', 'ScoreVAE paper'])
def test_a_model_that_lost_its_base_is_refused(bases, tmp_path, kind):
    new_model(kind, bases).save(tmp_path / 'a')
    assert_refused(tmp_path / 'a', change(small_of(kind).method.__name__, base=None))


@pytest.mark.parametrize('name', TAKEN_NAMES)
def test_a_network_cannot_replace_another_part_of_the_model(stored, name):
    "A network with the name of another argument is refused, or the stored argument is kept."
    record = json.loads((stored / 'run.json').read_text())
    record['networks'][name] = record['networks']['net']
    (stored / 'run.json').write_text(json.dumps(record))
    if name != 'sched':
        shutil.copy(stored / 'net.safetensors', stored / f'{name}.safetensors')
    try:
        model = load(stored)
    except ValueError as e:
        assert name in str(e)
        return
    want = tiny_dpm()
    assert model.shape == want.shape
    assert model.settings == want.settings
    assert model.base is None
    assert_same(dict(beta=model.sched.beta), dict(beta=want.sched.beta))


def part_of_version_1(words, **changes):
    "A change of the description of the network in a run of version 1."
    return Edit(lambda record: record['parts']['dpm'].update(changes), words)


HOSTILE_VERSION_1 = {
    'other package': part_of_version_1(NOT_OURS, module='subprocess', kind='Popen', config=TOUCH),
    'no such module': part_of_version_1(
        "No module named 'pdae_nb.nothing'", module='pdae_nb.nothing'
    ),
    'function': part_of_version_1(
        "has no network 'write_model'", module=MODEL, kind='write_model', config=TOUCH
    ),
    'wrong argument': part_of_version_1(NOT_BUILT, config=dict(ch='many')),
    'part is no dict': Edit(lambda record: record['parts'].update(dpm='UNet'), INCOMPLETE),
    'parts is a list': change('lists no parts', parts=['dpm']),
    'unknown part': Edit(
        lambda record: record['parts'].update({'../x': record['parts']['dpm']}), "'../x'"
    ),
    'no part': change('no run of the parts', parts={}),
}


@pytest.mark.parametrize('kind', HOSTILE_VERSION_1)
def test_hostile_run_json_of_version_1(stored_by_version_1, kind, monkeypatch):
    monkeypatch.chdir(stored_by_version_1)
    assert_refused(stored_by_version_1, HOSTILE_VERSION_1[kind])


def test_a_run_of_version_1_is_read(stored_by_version_1):
    model = load(stored_by_version_1)
    assert type(model) is DPM
    assert_same(model.net.state_dict(), tiny().state_dict())


NOT_RUN_JSON = [
    (b'', 'is not JSON'),
    (b'{"networks": {', 'is not JSON'),
    (b'\xff\xfe', 'is not JSON'),
    (b'[]', 'must hold an object, got list'),
    (b'3', 'must hold an object, got int'),
    (b'{}', NO_RECORD),
]


@pytest.mark.parametrize('data, words', NOT_RUN_JSON, ids=str)
def test_run_json_with_other_content(stored, data, words):
    (stored / 'run.json').write_bytes(data)
    with pytest.raises(ValueError, match=words):
        load(stored)


def test_hostile_weights(stored):
    weights = stored / 'net.safetensors'
    good = weights.read_bytes()
    for data in (pickled(stored), good[:-9], flipped(good, len(good) - 9)):
        weights.write_bytes(data)
        with pytest.raises(ValueError, match='net.safetensors'):
            load(stored)
    assert not code_was_run(stored)


@pytest.mark.parametrize('name', ['net.safetensors', 'sched.safetensors'])
def test_missing_weights(stored, name):
    assert load(stored).sched.T == 1000
    (stored / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(stored)


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


def small_pdae(base):
    return replace(small_of('PDAE'), base=base)


def overflowing():
    "A DPM with a weight that float16 cannot hold."
    model = tiny_dpm()
    next(model.parameters()).data.fill_(1e5)
    return model


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
    'training of an unknown run': value_error(
        lambda tmp: train('nothing_dpm', out=tmp / 'out'), "'nothing_dpm'", 'mnist_dpm'
    ),
    'method is no class': type_error(lambda tmp: small(method='DPM'), 'class of models', "'DPM'"),
    'method is no model': type_error(lambda tmp: small(method=UNet), 'class of models', 'UNet'),
    'base for other images': value_error(
        lambda tmp: train('a', small_pdae(tiny_dpm()), out=tmp / 'out'), '(1, 8, 8)', '(1, 14, 14)'
    ),
    'PDAE without base': value_error(
        lambda tmp: train('a', small_pdae(None), out=tmp / 'out'),
        'unconditional DPM',
        'got no model',
    ),
    'labels without labels': value_error(
        lambda tmp: ClassConditionalDPM.build(small(), Images(U8)), 'digits', 'one label per image'
    ),
    'every = 0': value_error(
        lambda tmp: train(NAME, small(), out=tmp / 'out', every=0),
        'every',
        'at least 1',
        'got 0 and',
    ),
    'log_every = 0': value_error(
        lambda tmp: train(NAME, small(), out=tmp / 'out', log_every=0),
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
    'network of another package': type_error(
        lambda tmp: DPM(LINEAR, SCHED, (2,)).save(tmp / 'r'), 'r', 'Linear', '.config'
    ),
    'network without config': type_error(
        lambda tmp: DPM(tiny().up, SCHED, (1, 8, 8)).save(tmp / 'r'), 'r', 'Up', '.config'
    ),
    'weight too large for float16': value_error(
        lambda tmp: overflowing().save(tmp / 'r'), 'r', 'net.', '1e+05', 'float16'
    ),
    'no run': not_found(lambda tmp: load(tmp / 'nothing'), 'nothing', 'run.json'),
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
