"""A step reads no numbers from its device: on a GPU, the CPU would wait for all queued work."""

import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_model import (
    new_dpm,
    new_eval_classifier,
    new_label_pdae,
    new_pdae,
    new_scorevae,
    new_vae,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pdae_nb.data import Images, batches, load_images
from pdae_nb.layers import Arithmetic, computing_in
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.latent import LatentDPM, MLPSkipNet, ZStats
from pdae_nb.sampling import ddim_step, trajectory
from pdae_nb.solvers import dpmpp_step, em_step, heun
from pdae_nb.training import EMA, READ_EVERY, Recipe, fit

READS = {'_local_scalar_dense', 'is_nonzero', 'equal', 'nonzero', 'masked_select', 'item'}
# These functions read only tensors on the CPU, and check this first.
CHECKS_ON_THE_CPU = {
    ('dpm.py', '_check_labels'),
    ('label_pdae.py', 'vector'),  # PyTorch's `one_hot` checks the classes on the CPU only
    ('scorevae.py', '_check_values'),
    ('forward.py', '__call__'),
    ('forward.py', '_now_and_before'),
    ('solvers.py', 'em_step'),
}


def is_read(func, args):
    "Whether an operation returns a number, or a tensor whose shape depends on numbers."
    name = func.__name__.split('.')[0]
    masks = args[1] if name == 'index' else ()
    return name in READS or any(m is not None and m.dtype == torch.bool for m in masks)


def place_of_a_read():
    "The frame that reads, or None if it is one of the checks of tensors on the CPU."
    frames = [f for f in traceback.extract_stack() if 'site-packages' not in f.filename]
    frame = [f for f in frames if f.name not in MODES][-1]
    is_check = (Path(frame.filename).name, frame.name) in CHECKS_ON_THE_CPU
    return None if is_check else f'{frame.name}, {frame.filename}:{frame.lineno}'


MODES = ('__torch_dispatch__', '__torch_function__', 'place_of_a_read')


class Operations(TorchDispatchMode):
    "Notes operations that read numbers."

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_read(func, args):
            self.reads.append((str(func), place_of_a_read()))
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    "Notes methods that read numbers. On the CPU, some of them are no operations."

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        if name in ('tolist', 'cpu', 'numpy', 'item'):
            self.reads.append((name, place_of_a_read()))
        return func(*args, **(kwargs or {}))


@contextmanager
def reads_within():  # yields the list of the reads
    "Collect the reads within the block, apart from the checks of tensors on the CPU."
    reads = []
    with Operations(reads), Methods(reads):
        yield reads
    reads[:] = [read for read in reads if read[1] is not None]


@contextmanager
def no_reads():
    "Fail if a number is read within the block."
    with reads_within() as reads:
        yield
    assert not reads, reads


def new_latent():
    base = new_pdae()
    return LatentDPM(MLPSkipNet(4, 16, 3), ZStats(torch.randn(50, 4)), base)


METHODS = dict(
    dpm=new_dpm,
    pdae=new_pdae,
    label_pdae=new_label_pdae,
    scorevae=new_scorevae,
    vae=new_vae,
    eval_classifier=new_eval_classifier,
    latent=new_latent,
)


def number(x):
    return x.sum().item()


def condition(x):
    return 1 if (x > 1).any() else 0


def selection(x):
    return x[x > 1]


def copy(x):
    return x.cpu()


def numbers(x):
    return x.tolist()


@pytest.mark.parametrize('read', [number, condition, selection, copy, numbers])
def test_a_read_is_found(read):
    with pytest.raises(AssertionError, match=f'{read.__name__}, '), no_reads():
        read(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
@pytest.mark.parametrize('name', METHODS)
def test_a_training_step_reads_nothing(name, precision):
    model = METHODS[name]().train()
    images = load_images('digits', 'train', 14)[:64]
    if name == 'latent':
        images = Images(torch.randn(64, 4))
    steps = READ_EVERY - 1
    row = Recipe(DPM, 'digits', 14, images=8 * steps, batch=8)
    done = fit(
        model,
        model.trainable(),
        batches(images, 8, steps, flip=name != 'latent'),
        row,
        EMA(model),
        precision=precision,
        accumulate=2,
    )
    next(done)  # the first step makes the optimiser's state
    seen = []
    with no_reads():
        for _ in range(steps - 1):
            seen.append(next(done))
    assert len(seen) == steps - 1
    assert all(bool(step.ok) for step in seen)


def test_the_device_is_read_every_ten_steps():
    "The reading is inside of the measured time, so the seconds of ten steps are right."
    model = new_dpm().train()
    images = load_images('digits', 'train', 14)[:64]
    row = Recipe(DPM, 'digits', 14, images=8 * 30, batch=8)
    done = fit(model, model.trainable(), batches(images, 8, 30), row, precision='float32')
    next(done)
    at = []
    for i in range(2, 31):
        with reads_within() as reads:
            next(done)
        if reads:
            at.append(i)
    assert at == [10, 20, 30]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('solver', [ddim_step, dpmpp_step, em_step, 'heun'])
@pytest.mark.parametrize('name', ['dpm', 'pdae', 'prior', 'scorevae'])
def test_a_sampling_step_reads_nothing(name, solver, dtype):
    "Neither a guidance window nor the limit of bf16 reads the timesteps."
    model = METHODS['pdae' if name == 'prior' else name]().eval()
    xT = torch.randn(2, 1, 14, 14)
    codes = None if name == 'dpm' else torch.randn(2, 4)
    of = model.prior_denoiser if name == 'prior' else model.denoiser
    denoiser = of(codes)
    times = [1000, 700, 400, 100, 0]
    if solver == 'heun':
        denoiser = heun(denoiser, model.sched, times)
    step = ddim_step if solver == 'heun' else solver
    arithmetic = Arithmetic(dtype, exact_above=600)
    with computing_in(model.networks(), arithmetic):
        path = trajectory(denoiser, xT, model.sched, times, solver=step)
        states = []
        with no_reads():
            for _, xs, _ in path:
                states.append(xs)
    assert len(states) == 4
