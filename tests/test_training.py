"""Losses of 30 training steps at size `smoke`, compared with stored losses.

`python tests/test_training.py` stores them again.
"""

import json
import platform
from pathlib import Path

import numpy as np
import PIL
import pytest
import sklearn
import torch

import pdae_nb
import pdae_nb.unet as unet
from pdae_nb.data import batches, load_images
from pdae_nb.recipes import recipe
from pdae_nb.training import fit

GOLDEN = Path(__file__).with_name('golden_loss.json')


def cpu_name():
    info = Path('/proc/cpuinfo')
    if not info.exists():
        return platform.processor()
    for line in info.read_text().splitlines():
        if line.startswith('model name'):
            return line.split(':')[1].strip()
    return ''


def environment():
    "What the last digits of the losses depend on."
    return dict(
        torch=torch.__version__.split('+')[0],
        numpy=np.__version__,
        pillow=PIL.__version__,
        sklearn=sklearn.__version__,
        cpu=cpu_name(),
        isa=torch.backends.cpu.get_cpu_capability(),
    )


def losses(amp=False, steps=30):
    "Losses of the first training steps of mnist_dpm, on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        r = recipe('mnist_dpm', 'smoke')
        images = load_images(r.data, 'train', r.px)
        torch.manual_seed(r.seed)
        model = r.method.build(r, images).train()
        data = batches(images, r.batch, steps, flip=r.flip, seed=r.seed)
        steps_done = fit(model, model.trainable(), data, r, amp=amp)
        return [step.loss.item() for step in steps_done]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_thirty_steps_in_float32_give_the_stored_losses(monkeypatch):
    "Without `amp`, also on devices with bf16 arithmetic."
    monkeypatch.setattr(unet, 'bf16_pays', lambda device: True)
    golden = json.loads(GOLDEN.read_text())
    # Other versions and other CPUs round differently.
    tolerance = 1e-6 if golden['made_with'] == environment() else 2e-3
    got = losses()
    np.testing.assert_allclose(got, golden['loss'], atol=tolerance)
    assert got[-1] < 0.8 * got[0]


@pytest.mark.slow
def test_thirty_steps_in_bf16_give_nearly_the_stored_losses(monkeypatch):
    "Also on CPUs without bf16 arithmetic, where bf16 is slower than float32."
    monkeypatch.setattr(unet, 'bf16_pays', lambda device: True)
    golden = json.loads(GOLDEN.read_text())
    got = losses(amp=True)
    np.testing.assert_allclose(got, golden['loss'], atol=2e-2)
    assert got[-1] < 0.8 * got[0]
    difference = np.abs(np.subtract(got, golden['loss']))
    assert difference.max() > 2e-4, 'the losses were not rounded to bf16'


def dtypes_in_training(**settings):
    "The data types of the output of a layer in one training step."
    layer = torch.nn.Linear(2, 2)
    dtypes = []

    def loss_fn(x0, y, draw):
        out = layer(x0)
        dtypes.append(out.dtype)
        return out.square().mean(1), None

    one_batch = [(torch.ones(4, 2), None)]
    list(fit(loss_fn, layer.parameters(), one_batch, recipe('mnist_dpm', 'smoke'), **settings))
    return dtypes


@pytest.mark.parametrize('pays, dtype', [(False, torch.float32), (True, torch.bfloat16)])
def test_bf16_only_on_devices_with_bf16_arithmetic(pays, dtype, monkeypatch):
    "On CPUs without bf16 arithmetic, bf16 is many times slower than float32."
    monkeypatch.setattr(unet, 'bf16_pays', lambda device: pays)
    assert dtypes_in_training() == [dtype]
    assert dtypes_in_training(amp=True) == [dtype]


@pytest.mark.parametrize('pays', [False, True])
def test_no_bf16_without_amp(pays, monkeypatch):
    monkeypatch.setattr(unet, 'bf16_pays', lambda device: pays)
    assert dtypes_in_training(amp=False) == [torch.float32]


def test_one_module_calls_autocast():
    package = Path(pdae_nb.__file__).parent
    callers = [p for p in package.rglob('*.py') if 'torch.autocast(' in p.read_text()]
    assert callers == [Path(unet.__file__)]


if __name__ == '__main__':
    golden = dict(made_with=environment(), loss=losses())
    GOLDEN.write_text(json.dumps(golden, indent=1) + '\n')
