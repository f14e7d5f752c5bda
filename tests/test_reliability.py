"""Killed, stopped, damaged, poisoned, misused: real processes, on a run small enough to be repeated forty times.

One process imports torch and forks a child for every run below (`python tests/test_reliability.py` is that process), so that a run costs what its steps cost.
A child can be told to kill itself at a named moment (`kill=('half', 2)`: when the second file is half written), or be killed from here at any moment."""
import itertools, json, os, random, select, shutil, signal, subprocess, sys, time
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAME, STEPS, EVERY = 'mnist_dpm', 24, 3

# ---------------------------------------------------------------- the forking process and what its children do

def emitter(kill):
    "Counts moments by name; the process dies at the chosen one"
    seen = {}
    def emit(place):
        seen[place] = seen.get(place, 0) + 1
        if kill and (place, seen[place]) == tuple(kill): os.kill(os.getpid(), signal.SIGKILL)
    return emit

class HalfFile:
    "A file that pauses in the middle of every write"
    def __init__(self, f, emit, place='half'): self.f, self.emit, self.place = f, emit, place
    def __enter__(self): self.f.__enter__(); return self
    def __exit__(self, *a): return self.f.__exit__(*a)
    def __getattr__(self, k): return getattr(self.f, k)
    def write(self, data): self.f.write(data[:len(data)//2]); self.f.flush(); self.emit(self.place); self.f.write(data[len(data)//2:])
    def write_all(self, data):
        with self: self.write(data)

def watched(f, emit, before, after=None):
    def call(*args, **kw):
        emit(before); out = f(*args, **kw)
        if after: emit(after)
        return out
    return call

def watch(emit):
    "Name the dangerous moments"
    import torch
    from pdae_nb import files
    files.open = lambda path, mode='r', *a, **kw: HalfFile(open(path, mode, *a, **kw), emit) if 'w' in mode and '.lock' not in str(path) else open(path, mode, *a, **kw)
    os.fsync = watched(os.fsync, emit, 'fsync')
    Path.replace = watched(Path.replace, emit, 'replace', 'replaced')
    Path.rename = watched(Path.rename, emit, 'rename', 'renamed')
    Path.unlink = watched(Path.unlink, emit, 'unlink')
    Path.write_text = lambda self, text, *a, **kw: HalfFile(open(self, 'w', *a, **kw), emit, 'text').write_all(text)
    torch.optim.AdamW.step = watched(torch.optim.AdamW.step, emit, 'step', 'stepped')

def small(**kw):
    "The smoke recipe, smaller: 8x8 digits, with everything that draws random numbers"
    from dataclasses import replace
    from pdae_nb.train import recipe
    return replace(recipe(NAME, 'smoke'), **dict(px=8, batch=8, images=8*STEPS, flip=True, cool=.3, net=dict(ch=8, mult=(1,), n_res=1, drop=.1)) | kw)

def task(r, emit=lambda _: None, slow=0., poison=()):
    "The task of the run, told to be slow or to lose its mind at some steps"
    from dataclasses import replace
    from pdae_nb.train import dpm_task
    t, n = dpm_task(r), itertools.count(1)
    def loss_fn(x0, y, inner=t.loss_fn):
        emit('loss'); time.sleep(slow)
        losses, ts = inner(x0, y)
        return (losses*float('nan') if next(n) in poison else losses), ts
    return replace(t, loss_fn=loss_fn, preview=None)

def job_train(out, kill=None, slow=0., poison=(), recipe={}, fsize=None, every=EVERY, name=NAME):
    from pdae_nb.train import train
    emit = emitter(kill)
    if kill: watch(emit)
    if fsize: import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
    train(name, small(**recipe), out, partial(task, emit=emit, slow=slow, poison=poison), every=every, log_every=2, log=print)

def job_second_up():
    "A new `Up` on the features of a frozen `Down`, channels last: the step in which torch 2.13 dies unless the features ask for a gradient"
    import copy, torch
    from pdae_nb.unet import UNet
    net = UNet(c=1, ch=8, mult=(1, 2), n_res=1, size=8, drop=.1).to(memory_format=torch.channels_last).requires_grad_(False)
    up = copy.deepcopy(net.up).requires_grad_(True).train()
    for p in up.parameters(): torch.nn.init.normal_(p, std=.05)
    before, opt = [p.clone() for p in up.parameters()], torch.optim.AdamW(up.parameters(), fused=True)
    x, e = torch.randn(4, 1, 8, 8).contiguous(memory_format=torch.channels_last), net.embed(torch.arange(1, 5))
    for amp in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            with torch.no_grad(): hs = net.down(x, e)
            up([h.detach().requires_grad_() for h in hs], e).float().square().mean().backward()
        opt.step(); opt.zero_grad()
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(up.parameters(), before))

def job_view(path):
    "Tensors that were read stay what they are when the file is cut short under them"
    import torch
    from pdae_nb.files import read_tensors, write_tensors
    write_tensors(path, dict(w=torch.ones(100_000), step=torch.tensor(3.)))
    tensors, _ = read_tensors(path); os.truncate(path, 0)
    assert tensors['w'].sum() == 100_000 and tensors['step'] == 3

def fork(job):
    if pid := os.fork(): return pid
    status = 1
    try:
        log = os.open(job.pop('log'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC); os.dup2(log, 1); os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(1, 'w', buffering=1)
        globals()['job_' + job.pop('job')](**job); status = 0
    except BaseException as e: print(f'{type(e).__name__}: {e}', flush=True)
    finally: os._exit(status)

def serve():
    import tempfile, threading, torch
    from tqdm import tqdm
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0; tqdm.set_lock(threading.RLock())           # no thread of tqdm's, and no lock that a killed child could take with it
    import pdae_nb.train as T
    T.load_images = cache(T.load_images)                                  # the children find the digits in memory
    with tempfile.TemporaryDirectory() as d: T.train(NAME, small(images=16), d, task, log=lambda s: None)   # … and all lazy imports done
    tasks = [p.joinpath('comm').read_text().strip() for p in Path('/proc/self/task').glob('*')]
    if len(tasks) > 1: print(f'{tasks}: a child may inherit a lock that nobody will open', file=sys.stderr)
    print('ready', flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(os.waitpid(job['wait'], 0)[1] if 'wait' in job else fork(job), flush=True)

if __name__ == '__main__': serve(); sys.exit()

# ---------------------------------------------------------------- this side

import pytest, torch
from torch import nn
from pdae_nb.data import Images, batches, load_images, to_signed, to_uint8
from pdae_nb.denoise import GaussianMixture, denoising_loss
from pdae_nb.files import fill, load_checkpoint, load_run, read_tensors, save_checkpoint, save_run, stoppable, write_tensors
from pdae_nb.forward import Schedule, add_noise, posterior
from pdae_nb.sample import invert_exactly, sample, trajectory
from pdae_nb.train import EMA, NonFinite, Recipe, fit, recipe, train
from pdae_nb.unet import UNet

ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONHASHSEED='0', MPLBACKEND='Agg', JE_ARROW_MALLOC_CONF='background_thread:false', PYTHONFAULTHANDLER='1')

class Server:
    def __init__(self, log):
        self.log, self.p = str(log), subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV, cwd=ROOT)
        assert self.answer('start') == 'ready\n'
    def answer(self, job, pid=None):
        "Its next line; if none comes, the stacks of whoever hangs go to the log and to stderr, and all later runs fail at once"
        if not select.select([self.p.stdout], [], [], 300)[0]:
            for p in filter(None, (pid, self.p.pid)): os.kill(p, signal.SIGABRT); time.sleep(1)
            raise TimeoutError(f'no answer to {job} for 300 s. {Path(self.log).read_text() if Path(self.log).exists() else ""}')
        return self.p.stdout.readline()
    def ask(self, **job): print(json.dumps(job), file=self.p.stdin, flush=True); return int(self.answer(job, job.get('wait')))
    def start(self, job='train', log=None, **kw): return self.ask(job=job, log=log or self.log, **{k: str(v) if isinstance(v, Path) else v for k, v in kw.items()})
    def wait(self, pid): return os.waitstatus_to_exitcode(self.ask(wait=pid))
    def run(self, job='train', **kw):
        "Exit status (negative: killed by that signal) and the last line that was printed"
        status = self.wait(self.start(job, **kw))
        return status, (Path(self.log).read_text().strip().split('\n') or [''])[-1]

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    s = Server(tmp_path_factory.mktemp('server')/'log')
    yield s
    s.p.stdin.close(); s.p.wait()

def checkpoints(out): return sorted((out/'checkpoints').glob('step_*.safetensors'))
def newest(out): return read_tensors(checkpoints(out)[-1])
def raw(v): return v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

def same(a, b, what=''):
    "Two lots of tensors, equal bit for bit"
    assert a.keys() == b.keys()
    assert not (odd := [k for k in a if k.startswith(what) and raw(a[k]) != raw(b[k])]), f'{len(odd)} of {len(a)} tensors differ, e.g. {odd[:3]}'

def ends_like(out, ref):
    "Weights, average, optimiser, the run that came out of them, and a log without gaps or repetitions"
    (a, ma), (b, mb) = newest(out), newest(ref)
    assert ma['i'] == mb['i'] == STEPS and ma['skipped'] == mb['skipped']
    assert {k.split('.')[0] for k in a} == {'model', 'ema', 'opt'} and any(k.endswith('exp_avg_sq') for k in a)
    same(a, b)
    assert (out/NAME/'dpm.safetensors').read_bytes() == (ref/NAME/'dpm.safetensors').read_bytes()
    (ra, rb) = (json.loads((o/NAME/'run.json').read_text()) for o in (out, ref))
    assert ra['result'] == rb['result'] and ra['images_seen'] == rb['images_seen']
    assert [json.loads(l)['step'] for l in (out/'log.jsonl').read_text().splitlines()] == list(range(2, STEPS + 1, 2))
    assert not list(out.rglob('*.tmp')) and not list(out.rglob('*.old')), 'what a kill left is cleared away'
    assert len(checkpoints(out)) == 2

@pytest.fixture(scope='module')
def ref(server, tmp_path_factory):
    "The uninterrupted run"
    out = tmp_path_factory.mktemp('ref')
    t = time.time(); status, last = server.run(out=out); Server.seconds = time.time() - t
    assert status == 0, last
    return out

@pytest.fixture(scope='module')
def half(server, tmp_path_factory):
    "A run killed in its eighth step, with the checkpoints of steps 3 and 6"
    out = tmp_path_factory.mktemp('half')
    assert server.run(out=out, kill=('loss', 8))[0] == -signal.SIGKILL
    assert [p.name for p in checkpoints(out)] == ['step_000000003.safetensors', 'step_000000006.safetensors']
    return out

@pytest.fixture
def out(tmp_path): return tmp_path/'run'

@pytest.fixture
def resumed(half, out): return Path(shutil.copytree(half, out))

# ---------------------------------------------------------------- killed

PLACES = ['loss', 'step', 'stepped', 'half', 'fsync', 'replace', 'replaced', 'unlink']   # and 'text', while the log is trimmed

def test_the_reference_run_learns(ref):
    tensors, meta = newest(ref)
    assert meta['i'] == STEPS and meta['skipped'] == 0
    assert not all(raw(v) == raw(tensors['ema' + k[5:]]) for k, v in tensors.items() if k.startswith('model.')), 'an average that is no average would hide what it forgets'

def test_killed_at_random_times(server, ref, out):
    "At least 20 kills from outside, at times that nobody chose, over one run"
    rng, kills, steps = random.Random(0), 0, set()
    for _ in range(60):
        pid = server.start(out=out, every=1)
        time.sleep(rng.uniform(0, .3*Server.seconds)); os.kill(pid, signal.SIGKILL)
        if server.wait(pid) == 0:                           # faster than the kill: done
            if kills >= 20: break
            ends_like(out, ref); shutil.rmtree(out)
        else: kills += 1; steps |= {p.name for p in checkpoints(out)} if out.exists() else set()
        if kills >= 20 and len(steps) >= 8: break
    assert kills >= 20 and len(steps) >= 3, f'{kills} kills, {len(steps)} checkpoints'
    assert server.run(out=out, every=1)[0] == 0
    ends_like(out, ref)

def test_killed_at_every_dangerous_place(server, ref, out):
    "One run, killed in the forward pass, around the update, in the middle of a file, before and after its sync, its renaming and the removal of the old one"
    for place, n in [('loss', 6), ('text', 1), *itertools.product(PLACES, (1, 2)), ('text', 1)]:
        status, last = server.run(out=out, kill=(place, n))
        assert status == -signal.SIGKILL, f'{place} {n}: {last}'
        if place in ('half', 'fsync') and n == 1: assert list(out.rglob('.*.tmp')), 'killed in the middle of writing'
        for p in checkpoints(out): read_tensors(p)          # what has its name is whole
    assert server.run(out=out)[0] == 0
    ends_like(out, ref)

@pytest.mark.parametrize('place', [('half', 2), ('half', 4), ('fsync', 4), ('replace', 2), ('rename', 1), ('renamed', 1)], ids=str)
def test_killed_while_finishing(server, ref, out, place):
    "The run folder is there whole or not at all, too"
    shutil.copytree(ref, out); shutil.rmtree(out/NAME)
    status, last = server.run(out=out, kill=place)
    assert status == -signal.SIGKILL, last
    if (out/NAME).exists(): assert load_run(out/NAME).dpm
    assert server.run(out=out)[0] == 0
    ends_like(out, ref)

def test_replacing_a_run_never_loses_it(tmp_path, monkeypatch):
    net = tiny(); save_run(tmp_path/'a_dpm', dict(dpm=net), None, dict(n=1))
    rename, calls = Path.rename, []
    def dies_second(self, to):
        calls.append(to)
        if len(calls) == 2: raise KeyboardInterrupt
        return rename(self, to)
    monkeypatch.setattr(Path, 'rename', dies_second)
    with pytest.raises(KeyboardInterrupt): save_run(tmp_path/'a_dpm', dict(dpm=net), None, dict(n=2))
    monkeypatch.undo()
    assert load_run(tmp_path/'a_dpm').about['n'] == 1       # the old one is still found
    save_run(tmp_path/'a_dpm', dict(dpm=net), None, dict(n=3))
    assert load_run(tmp_path/'a_dpm').about['n'] == 3 and [p.name for p in tmp_path.iterdir()] == ['a_dpm']

# ---------------------------------------------------------------- asked to stop, two at once, another recipe

def until(done, seconds=120):
    end = time.time() + seconds
    while not done():
        assert time.time() < end, 'it did not come to that'
        time.sleep(.005)

@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_asked_to_stop(server, ref, out, sig):
    pid = server.start(out=out, slow=.3)
    until(lambda: (out/'log.jsonl').exists() and (out/'log.jsonl').read_text().count('\n') >= 2)
    os.kill(pid, sig)
    assert server.wait(pid) == 1
    last = Path(server.log).read_text().strip().split('\n')[-1]
    _, meta = newest(out)
    assert last == f'Stopped: stopped by {sig.name}: saved after step {meta["i"]} of {STEPS}; the same command goes on from there'
    assert 4 <= meta['i'] < STEPS
    assert server.run(out=out)[0] == 0
    ends_like(out, ref) if meta['i'] % 2 == 0 else same(newest(out)[0], newest(ref)[0])

SCRIPT = '''
import sys, torch
from pdae_nb.train import recipe, train
torch.set_num_threads(1)
train('mnist_dpm', recipe('mnist_dpm', 'smoke'), sys.argv[1], every=10**6, log_every=1, log=lambda s: print(s, flush=True))'''

def test_ctrl_c_on_a_plain_process(out):
    p = subprocess.Popen([sys.executable, '-c', SCRIPT, out], env=ENV | dict(PDAE_NB_CACHE=str(out.parent)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while 'loss' not in p.stdout.readline(): assert p.poll() is None, p.stderr.read()
    p.send_signal(signal.SIGINT); _, err = p.communicate()
    assert p.returncode != 0 and 'Stopped: stopped by SIGINT: saved after step' in err.strip().split('\n')[-1]
    assert newest(out)[1]['i'] >= 1

def test_stoppable_off_the_main_thread():
    import threading
    got = []
    def body():
        with stoppable() as asked: got.append(asked)
    th = threading.Thread(target=body); th.start(); th.join()
    assert got == [[]]

def test_second_run_on_one_folder_is_refused(server, ref, out):
    first = server.start(out=out, slow=.05, log=str(out) + '.log')
    until(lambda: checkpoints(out))
    status, last = server.run(out=out)
    assert status == 1 and last == f'RuntimeError: another run is writing to {out}'
    os.kill(first, signal.SIGKILL); assert server.wait(first) == -signal.SIGKILL
    assert server.run(out=out)[0] == 0                       # a dead run holds no lock
    ends_like(out, ref)

def test_another_recipe_is_refused(server, resumed, ref, tmp_path):
    kept = {p.name: p.read_bytes() for p in checkpoints(resumed)}
    status, last = server.run(out=resumed, recipe=dict(lr=.001, seed=7))
    assert status == 1 and last.startswith(f'ValueError: {resumed} holds a run of another recipe: lr 0.002 → 0.001, seed 0 → 7.'), last
    assert {p.name: p.read_bytes() for p in checkpoints(resumed)} == kept
    done = Path(shutil.copytree(ref, tmp_path/'done'))
    status, last = server.run(out=done, recipe=dict(batch=16))
    assert status == 1 and 'batch 8 → 16' in last
    assert server.run(out=done) == (0, f'{done/NAME} is done')

# ---------------------------------------------------------------- damaged

class Bomb:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return exec, (f'open({self.path!r}, "w").close()',)

def pickled(path): torch.save(dict(model=torch.zeros(3), bomb=Bomb(path.with_name('exploded'))), path.with_name('p.pt')); return path.with_name('p.pt').rename(path).read_bytes()
def flipped(data, at): return data[:at] + bytes([data[at] ^ 4]) + data[at + 1:]

DAMAGE = dict(empty=lambda b, p: b'', a_few_bytes=lambda b, p: b[:7], half=lambda b, p: b[:len(b)//2], last_byte_missing=lambda b, p: b[:-1], one_byte_more=lambda b, p: b + b'x',
              zeros=lambda b, p: bytes(len(b)), garbage=lambda b, p: random.Random(0).randbytes(len(b)), pickle=lambda b, p: pickled(p),
              bit_in_length=lambda b, p: flipped(b, 1), bit_in_header=lambda b, p: flipped(b, 3000), bit_in_weights=lambda b, p: flipped(b, len(b) - 5000), bit_in_note=lambda b, p: b.replace(b'skipped\\": 0', b'skipped\\": 4'),
              another_safetensors=lambda b, p: __import__('safetensors.torch').torch.save(dict(w=torch.zeros(3))))

@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_newest_checkpoint(server, ref, resumed, kind):
    p = checkpoints(resumed)[-1]; old = p.read_bytes(); new = DAMAGE[kind](old, p); p.write_bytes(new)
    assert new != old and len(checkpoints(resumed)) == 2
    status, last = server.run(out=resumed)
    said = Path(server.log).read_text()
    assert status == 0, last
    assert f'skipping {p}' in said and f'going on at step 3 of {STEPS}' in said
    assert not list(resumed.rglob('exploded')), 'it was unpickled'
    ends_like(resumed, ref)

def test_both_checkpoints_damaged(server, ref, out):
    "Even when they had higher numbers than what comes next: it must not be deleted in their favour"
    (out/'checkpoints').mkdir(parents=True)
    for i in (40, 50): (out/f'checkpoints/step_{i:09d}.safetensors').write_bytes(b'garbage')
    assert server.run(out=out, kill=('loss', 5))[0] == -signal.SIGKILL
    assert [p.name for p in checkpoints(out)] == ['step_000000003.safetensors']
    assert server.run(out=out)[0] == 0
    ends_like(out, ref)

def test_a_checkpoint_of_another_network(server, resumed):
    p = checkpoints(resumed)[-1]; tensors, meta = read_tensors(p)
    del tensors[next(k for k in tensors if k.startswith('model.'))]; write_tensors(p, tensors, meta)
    status, last = server.run(out=resumed)
    assert status == 1 and 'the weights do not match the network' in last

def test_every_single_flip_is_noticed(tmp_path):
    f = tmp_path/'f'; write_tensors(f, dict(w=torch.arange(6.).reshape(2, 3), n=torch.tensor(7)), dict(i=3)); data = f.read_bytes()
    for at in range(len(data)):
        f.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1:])
        try: tensors, meta = read_tensors(f)
        except ValueError as e: assert str(f) in str(e) and '\n' not in str(e)
        else: assert meta == dict(i=3) and torch.equal(tensors['w'].flatten(), torch.arange(6.)) and tensors['n'] == 7, 'a wrong value without a word'   # e.g. in the padding

def test_values_of_every_type_come_back(tmp_path):
    want = {str(d): torch.tensor([[1, 0, 1]]).to(d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)}
    want |= dict(scalar=torch.tensor(2.5), none=torch.zeros(0, 3), last=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), nan=torch.tensor([float('nan'), float('-inf')]))
    write_tensors(tmp_path/'a/b/f', want, dict(text='α', none=None)); got, meta = read_tensors(tmp_path/'a/b/f')
    same(got, want); assert meta == dict(text='α', none=None) and all(got[k].dtype == want[k].dtype and got[k].shape == want[k].shape for k in want)

def test_what_was_read_is_a_copy(server, tmp_path): assert server.run('view', path=tmp_path/'f') == (0, '')

def test_the_optimiser_comes_back_bit_for_bit(tmp_path):
    def make(seed):
        torch.manual_seed(seed); net = tiny().to(memory_format=torch.channels_last)
        for p in net.parameters(): p.data.normal_()
        return net, EMA(net), torch.optim.AdamW(net.parameters(), fused=True)
    def step(net, ema, opt): net(torch.ones(2, 1, 8, 8), torch.tensor([1, 2])).square().mean().backward(); opt.step(); opt.zero_grad(); ema.update(0)
    a, b = make(0), make(1)
    step(*a); save_checkpoint(tmp_path, 1, *a, {}); load_checkpoint(tmp_path, *b)
    for p, q in zip(a[0].parameters(), b[0].parameters()):
        sa, sb = a[2].state[p], b[2].state[q]
        same(dict(sa), dict(sb)); assert sa.keys() == {'step', 'exp_avg', 'exp_avg_sq'} and all(sa[k].stride() == sb[k].stride() for k in sa)
    step(*a); step(*b)
    same(a[0].state_dict(), b[0].state_dict()); same(a[1].module.state_dict(), b[1].module.state_dict())
    with pytest.raises(ValueError, match='the optimiser has no parameter'): load_checkpoint(tmp_path, b[0], b[1], torch.optim.AdamW(list(b[0].parameters())[:3]))

# ---------------------------------------------------------------- disk full

def test_file_too_large_for_the_disk(server, ref, resumed):
    kept = {p.name: p.read_bytes() for p in checkpoints(resumed)}
    status, last = server.run(out=resumed, fsize=20_000)
    assert status == 1 and 'cannot write' in last and 'step_000000009.safetensors: File too large' in last
    assert {p.name: p.read_bytes() for p in checkpoints(resumed)} == kept and not list(resumed.rglob('*.tmp'))
    assert server.run(out=resumed)[0] == 0
    ends_like(resumed, ref)

@pytest.mark.parametrize('call', ['os.fsync', 'pathlib.Path.replace', 'pathlib.Path.mkdir'])
def test_no_space_left(tmp_path, monkeypatch, call):
    f = tmp_path/'f'; write_tensors(f, dict(w=torch.zeros(3)), dict(n=1))
    def full(*a, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(call, full)
    with pytest.raises(OSError, match=f'cannot write {f}: No space left on device'): write_tensors(f, dict(w=torch.ones(3)), dict(n=2))
    monkeypatch.undo()
    assert read_tensors(f)[1] == dict(n=1) and [p.name for p in tmp_path.iterdir()] == ['f']

# ---------------------------------------------------------------- not a number

def test_a_step_that_is_not_finite_is_skipped(server, ref, out):
    assert server.run(out=out, poison=(4, 9, 10))[0] == 0
    about = json.loads((out/NAME/'run.json').read_text())
    assert about['steps_skipped'] == 3 and json.loads((out/'log.jsonl').read_text().splitlines()[-1])['skipped'] == 3
    assert all(v.isfinite().all() for v in newest(out)[0].values())
    assert raw(newest(out)[0]['opt.0.step']) == raw(torch.tensor(STEPS - 3.))

def test_ten_in_a_row_stop_the_run(server, half, ref, out):
    status, last = server.run(out=out, poison=tuple(range(7, 99)))
    assert status == 1 and last.startswith('NonFinite: 10 steps in a row were not finite, the last one step 16, at t = ['), last
    tensors, meta = newest(out)
    assert meta['i'] == 16 and meta['skipped'] == 10
    good, meta = newest(half); assert meta['i'] == 6
    same(tensors, good)                                      # exactly what the last good step left
    status, last = server.run(out=out)                       # the illness is cured: it can go on
    assert status == 0 and json.loads((out/NAME/'run.json').read_text())['steps_skipped'] == 10

class Line(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(3))

ROW = Recipe('digits', 8, {}, images=64, batch=2, lr=.1)
def rows(n): return ((torch.ones(2, 3), None) for _ in range(n))

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_fit_leaves_everything_alone(bad, where):
    m, n = Line(), itertools.count(); ema = EMA(m); opt = torch.optim.AdamW(m.parameters(), lr=.1, fused=True)
    def loss_fn(x0, y):
        loss = (x0*m.w).square().mean(1)
        if next(n) in (1, 2):
            if where == 'loss': return loss*bad, torch.tensor([3, 5])
            loss.register_hook(lambda g: g*bad)
        return loss, torch.tensor([3, 5])
    seen = [(s, [m.w.detach().clone(), ema.module.w.clone(), *(v.clone() for v in opt.state[m.w].values())]) for s in fit(loss_fn, m.parameters(), rows(4), ROW, ema, opt=opt, amp=False)]
    assert [s.ok for s, _ in seen] == [True, False, False, True] and [s.i for s, _ in seen] == [1, 2, 3, 4]
    for k in (1, 2): assert all(raw(a) == raw(b) for a, b in zip(seen[k][1], seen[0][1]))
    assert not torch.equal(seen[3][1][0], seen[0][1][0])

def test_the_noise_of_a_step_depends_on_seed_and_step_alone():
    from dataclasses import replace
    def losses(seed=0, start=0, before=0):
        torch.manual_seed(before); torch.rand(before)
        m = Line(); loss_fn = lambda x0, y: (x0*m.w*torch.rand(2, 3) + nn.functional.dropout(m.w)).mean(1)*0 + torch.rand(2) + 0*m.w.sum()
        return [s.loss.item() for s in fit(loss_fn, m.parameters(), rows(6 - start), replace(ROW, seed=seed), start=start, amp=False)]
    whole = losses()
    assert len(set(whole)) == 6 and losses(before=5) == whole and losses(start=4) == whole[4:] and not set(losses(seed=1)) & set(whole)

def test_patience_counts_steps_in_a_row():
    m, n = Line(), itertools.count()
    def loss_fn(x0, y): return (m.w.square().sum()*(float('nan') if next(n) % 10 else 1.)).expand(2), torch.tensor([3, 5])
    assert len(list(fit(loss_fn, m.parameters(), rows(30), ROW, amp=False))) == 30     # nine, one good, nine …
    with pytest.raises(NonFinite, match=r'3 steps in a row.*the last one step 4, at t = \[3, 5\]'): list(fit(loss_fn, m.parameters(), rows(30), ROW, amp=False, patience=3))

# ---------------------------------------------------------------- hostile runs

def tiny(): torch.manual_seed(0); return UNet(c=1, ch=4, mult=(1,), n_res=1, size=8)

@pytest.fixture
def stored(tmp_path):
    save_run(tmp_path/'digits_dpm', dict(dpm=tiny()), Schedule.linear(), dict(recipe={}))
    return tmp_path/'digits_dpm'

def part(about): return about['parts']['dpm']
HOSTILE = dict(
    other_package=(lambda a: part(a).update(module='subprocess', kind='Popen', config=dict(args=['touch', 'exploded'])), 'parts must come from pdae_nb'),
    builtins=(lambda a: part(a).update(module='builtins', kind='exec', config={}), 'parts must come from pdae_nb'),
    dotted=(lambda a: part(a).update(module='pdae_nb.files.os'), 'parts must come from pdae_nb'),
    lookalike=(lambda a: part(a).update(module='pdae_nb_evil.unet'), 'parts must come from pdae_nb'),
    path=(lambda a: part(a).update(module='pdae_nb./tmp/evil'), 'parts must come from pdae_nb'),
    no_such_module=(lambda a: part(a).update(module='pdae_nb.nothing'), "No module named 'pdae_nb.nothing'"),
    function=(lambda a: part(a).update(module='pdae_nb.files', kind='save_run', config=dict(path='x')), "has no network 'save_run'"),
    no_network=(lambda a: part(a).update(module='pdae_nb.forward', kind='Schedule', config=dict(beta=[.1])), "has no network 'Schedule'"),
    module_as_kind=(lambda a: part(a).update(kind='torch'), "has no network 'torch'"),
    unknown_argument=(lambda a: part(a)['config'].update(colour='red'), 'UNet cannot be built'),
    wrong_argument=(lambda a: part(a)['config'].update(ch='many'), 'UNet cannot be built'),
    negative=(lambda a: part(a)['config'].update(ch=-4), 'UNet cannot be built'),
    wider=(lambda a: part(a)['config'].update(ch=8), 'the network wants'),
    deeper=(lambda a: part(a)['config'].update(n_res=2), 'the weights do not match the network'),
    kind_is_no_name=(lambda a: part(a).update(kind=['UNet']), 'a part needs a module, a kind and a config'),
    config_is_no_dict=(lambda a: part(a).update(config=[1, 2]), 'a part needs a module, a kind and a config'),
    part_is_no_dict=(lambda a: a['parts'].update(dpm='UNet'), 'a part needs a module, a kind and a config'),
    no_parts=(lambda a: a.pop('parts'), 'lists no parts'),
    parts_is_a_list=(lambda a: a.update(parts=['dpm']), 'lists no parts'),
    **{f'name {k!r}': (lambda a, k=k: a['parts'].update({k: part(a)}), 'cannot name a part') for k in ('../dpm', '/etc/passwd', '..', '', 'a/b', 'a\\b', 'sched', 'about', '__class__', 'a b', 'a\n')})

@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_run_json(stored, kind, monkeypatch):
    monkeypatch.chdir(stored)
    about = json.loads((stored/'run.json').read_text()); edit, words = HOSTILE[kind]; edit(about)
    (stored/'run.json').write_text(json.dumps(about))
    with pytest.raises(ValueError) as e: load_run(stored)
    assert words in str(e.value) and str(stored) in str(e.value) and '\n' not in str(e.value)
    assert not list(stored.rglob('exploded'))

@pytest.mark.parametrize('data, words', [(b'', 'is not JSON'), (b'{"parts": {', 'is not JSON'), (b'\xff\xfe', 'is not JSON'), (b'[]', 'lists no parts'), (b'3', 'lists no parts')], ids=str)
def test_run_json_that_is_none(stored, data, words):
    (stored/'run.json').write_bytes(data)
    with pytest.raises(ValueError, match=words): load_run(stored)

def test_hostile_weights(stored):
    good = (stored/'dpm.safetensors').read_bytes()
    for data in (pickled(stored/'dpm.safetensors'), good[:-9], flipped(good, len(good) - 9)):
        (stored/'dpm.safetensors').write_bytes(data)
        with pytest.raises(ValueError, match='dpm.safetensors'): load_run(stored)
    assert not list(stored.rglob('exploded'))
    (stored/'dpm.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='dpm.safetensors'): load_run(stored)
    (stored/'dpm.safetensors').write_bytes(good); assert load_run(stored).sched.T == 1000
    (stored/'sched.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='sched.safetensors'): load_run(stored)

# ---------------------------------------------------------------- misused

SCHED, X, T3 = Schedule.linear(), torch.zeros(2, 1, 4, 4), torch.tensor([1, 2])
U8 = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
def zero(xt, t): return torch.zeros_like(xt)
def bad_task(**kw): return lambda tmp: train('digits_dpm', small(**kw), tmp/'o', task)

BAD = [   # call, error, what its message must name: what came, what was wanted
    (lambda _: to_signed(X), TypeError, 'uint8', 'float32'),
    (lambda _: to_uint8(U8), TypeError, 'float', 'uint8'),
    (lambda _: to_uint8(X/0), ValueError, '32 of 32', 'NaN'),
    (lambda _: Images(X), TypeError, 'uint8', 'float32'),
    (lambda _: Images(U8[0]), TypeError, '(N,C,H,W)', '(1, 8, 8)'),
    (lambda _: Images(U8, torch.zeros(3)), ValueError, '3 labels', '4 images'),
    (lambda _: load_images('digits', 'dev'), ValueError, 'train', "'dev'"),
    (lambda _: next(batches(Images(U8[:0]), 2, 1)), ValueError, 'no images'),
    (lambda _: next(batches(Images(U8), 3, 1, world=2)), ValueError, 'batch of 3', '2 processes'),
    (lambda _: Schedule([[.1]]), ValueError, '(T,)', '(1, 1)'),
    (lambda _: Schedule([.1, 1.5]), ValueError, '(0,1]', '1.5'),
    (lambda _: SCHED(torch.tensor([1.])), TypeError, 'int64', 'float32'),
    (lambda _: SCHED(3), TypeError, 'int64', 'int'),
    (lambda _: SCHED(torch.tensor([1001])), ValueError, '0…1000', '1001'),
    (lambda _: SCHED(torch.tensor([-1])), ValueError, '0…1000', '-1'),
    (lambda _: SCHED.times(0), ValueError, '1…1000', '0'),
    (lambda _: SCHED.times([5, 5]), ValueError, 'strictly', '[5, 5]'),
    (lambda _: SCHED.times([1001, 0]), ValueError, '0…1000', '1001'),
    (lambda _: add_noise(SCHED, X, T3, X[:1]), ValueError, '(1, 1, 4, 4)', '(2, 1, 4, 4)'),
    (lambda _: add_noise(SCHED, X, torch.tensor([1, 2, 3]), X), ValueError, '3', '2'),
    (lambda _: add_noise(SCHED, X, torch.tensor(1), X), ValueError, '(B,)', '()'),
    (lambda _: add_noise(SCHED, X.long(), T3, X.long()), TypeError, 'floating', 'int64'),
    (lambda _: posterior(SCHED, X, X, torch.tensor([0, 1])), ValueError, '1…1000', '0'),
    (lambda _: denoising_loss(lambda xt, t: xt[:, :, :2], X, SCHED), ValueError, '(2, 1, 2, 4)', '(2, 1, 4, 4)'),
    (lambda _: GaussianMixture(torch.zeros(3), 1., SCHED), ValueError, '(K,D)', '(3,)'),
    (lambda _: sample(zero, X.long(), SCHED), TypeError, 'floating', 'int64'),
    (lambda _: sample(zero, X*float('nan'), SCHED), ValueError, '32 of 32', 'NaN'),
    (lambda _: sample(lambda xt, t: xt[0], X, SCHED, 2), ValueError, '(1, 4, 4)', '(2, 1, 4, 4)'),
    (lambda _: list(trajectory(zero, X, SCHED, [0, 500, 1000], clip=1.)), ValueError, 'clip', 'None'),
    (lambda _: invert_exactly(zero, X, SCHED, 1), ValueError, 'at least 2'),
    (lambda _: recipe('mnist_dpm', 'huge'), ValueError, "'huge'", 'mnist_dpm/smoke'),
    (lambda _: recipe('nothing_dpm'), ValueError, "'nothing_dpm'", 'mnist_dpm'),
    (lambda _: next(fit(zero, [], rows(1), ROW)), ValueError, 'no parameter'),
    (lambda _: next(fit(zero, [torch.zeros(3)], rows(1), ROW)), ValueError, 'requires a gradient'),
    (lambda d: train('mnist', small(), d/'o'), ValueError, "'mnist'", 'dpm'),
    (lambda d: train(NAME, small(), d/'o', task, every=0), ValueError, 'every', '0'),
    (lambda d: train(NAME, small(), d/'o', task, log_every=0), ValueError, 'log_every', '0'),
    (lambda _: small(batch=0), ValueError, 'batch', '0'),
    (lambda _: small(images=-5), ValueError, 'images', '-5'),
    (lambda _: small(lr=float('nan')), ValueError, 'lr', 'nan'),
    (lambda _: small(ema=1.5), ValueError, 'ema', '1.5'),
    (lambda d: write_tensors(d/'f', dict(w=[1.])), TypeError, "'w'", 'tensor', 'list'),
    (lambda d: read_tensors(d/'nothing'), FileNotFoundError, 'nothing'),
    (lambda _: fill(nn.Linear(2, 3), dict(weight=torch.zeros(3, 2)), 'file'), ValueError, 'file', 'bias'),
    (lambda _: fill(nn.Linear(2, 3), dict(weight=torch.zeros(2, 3), bias=torch.zeros(3)), 'file'), ValueError, '(2, 3)', '(3, 2)'),
    (lambda _: fill(nn.Linear(2, 3), dict(weight=torch.zeros(3, 2).long(), bias=torch.zeros(3)), 'file'), ValueError, 'int64', 'float32'),
    (lambda d: save_run(d/'r', dict(net=nn.Linear(2, 3)), None, {}), ValueError, 'pdae_nb', 'Linear'),
    (lambda d: save_run(d/'r', {'../x': tiny()}, None, {}), ValueError, "'../x'"),
    (lambda d: save_run(d/'r', dict(dpm=tiny().up), None, {}), TypeError, 'Up', '.config'),
    (lambda d: load_run(d/'nothing'), FileNotFoundError, 'nothing', 'run.json'),
]

@pytest.mark.parametrize('k', range(len(BAD)))
def test_bad_calls(k, tmp_path):
    call, error, *words = BAD[k]
    with pytest.raises(error) as e: call(tmp_path)
    said = str(e.value)
    assert e.type is error and all(w in said for w in words) and '\n' not in said and len(said) < 2000, said

# ---------------------------------------------------------------- two processes, and torch itself

@pytest.mark.parametrize('world', [2, 4])
def test_any_number_of_processes_sees_the_same_batches(world):
    n, bs, steps = 21, 8, 7                                 # epochs end inside a batch
    images = Images(torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8), torch.arange(n))
    see = lambda rank=0, world=1, start=0: list(batches(images, bs, steps, flip=True, seed=3, start=start, rank=rank, world=world))
    whole, shares = see(), [see(r, world) for r in range(world)]
    for k, (x, y) in enumerate(whole):
        for r in range(world): assert torch.equal(shares[r][k][0], x[r::world]) and torch.equal(shares[r][k][1], y[r::world])
    for a, b in zip(see(start=4), whole[4:]): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert torch.cat([y for _, y in whole])[:n].sort().values.tolist() == list(range(n)), 'every image once per epoch'
    assert any(not torch.equal(x, to_signed(images.x[y])) for x, y in whole), 'flips happen'

def test_a_second_decoder_on_a_frozen_encoder(server): assert server.run('second_up') == (0, '')
