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
import pdae_nb.layers as layers
from pdae_nb.data import batches, load_images
from pdae_nb.layers import Conv2d, Network
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


def losses(precision='float32', steps=30):
    "Losses of the first training steps of mnist_dpm, on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        r = recipe('mnist_dpm', 'smoke')
        images = load_images(r.data, 'train', r.px)
        torch.manual_seed(r.seed)
        model = r.method.build(r, images).train()
        data = batches(images, r.batch, steps, flip=r.flip, seed=r.seed)
        steps_done = fit(model, model.trainable(), data, r, precision=precision)
        return [step.loss.item() for step in steps_done]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_thirty_steps_in_float32_give_the_stored_losses(monkeypatch):
    "Also on devices with bf16 arithmetic."
    monkeypatch.setattr(layers, 'bf16_pays', lambda device: True)
    golden = json.loads(GOLDEN.read_text())
    # Other versions and other CPUs round differently.
    tolerance = 1e-6 if golden['made_with'] == environment() else 2e-3
    got = losses()
    np.testing.assert_allclose(got, golden['loss'], atol=tolerance)
    assert got[-1] < 0.8 * got[0]


@pytest.mark.slow
def test_thirty_steps_in_bf16_give_nearly_the_stored_losses():
    "Also on CPUs without bf16 arithmetic, where bf16 is slower than float32."
    golden = json.loads(GOLDEN.read_text())
    got = losses('bf16')
    np.testing.assert_allclose(got, golden['loss'], atol=2e-2)
    assert got[-1] < 0.8 * got[0]
    difference = np.abs(np.subtract(got, golden['loss']))
    assert difference.max() > 2e-4, 'the losses were not rounded to bf16'


class TwoLayers(Network):
    "A first layer in the dtype of the image and a second one in the chosen dtype."

    def __init__(self):
        super().__init__()
        self.stem = Conv2d(1, 2, 1)
        self.last = Conv2d(2, 1, 1)
        self.dtypes = []

    def forward(self, x):
        h = self.stem(x).to(self.dtype_at())
        self.dtypes.append(h.dtype)
        return self.last(h).float()


def dtypes_in_training(**settings):
    "The dtype in which a network computes: before, in and after a training step."
    net = TwoLayers()
    x = torch.ones(4, 1, 2, 2)

    def loss_fn(x0, y, draw):
        return net(x0).square().mean((1, 2, 3)), None

    net(x)
    steps = fit(
        loss_fn,
        net.parameters(),
        [(x, None), (x, None)],
        recipe('mnist_dpm', 'smoke'),
        networks=[net],
        **settings,
    )
    next(steps)
    net(x)
    next(steps)
    return net.dtypes


@pytest.mark.parametrize('pays, dtype', [(False, torch.float32), (True, torch.bfloat16)])
def test_bf16_only_on_devices_with_bf16_arithmetic(pays, dtype, monkeypatch):
    "On CPUs without bf16 arithmetic, bf16 is many times slower than float32."
    monkeypatch.setattr(layers, 'bf16_pays', lambda device: pays)
    assert dtypes_in_training() == [torch.float32, dtype, torch.float32, dtype]


@pytest.mark.parametrize('pays', [False, True])
@pytest.mark.parametrize('name, dtype', [('float32', torch.float32), ('bf16', torch.bfloat16)])
def test_a_named_precision_is_used_on_every_device(pays, name, dtype, monkeypatch):
    monkeypatch.setattr(layers, 'bf16_pays', lambda device: pays)
    expected = [torch.float32, dtype, torch.float32, dtype]
    assert dtypes_in_training(precision=name) == expected


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="auto, bf16 or float32, got 'fp8'"):
        dtypes_in_training(precision='fp8')


def test_bf16_of_a_loss_without_networks_is_refused():
    layer = torch.nn.Linear(1, 1)
    r = recipe('mnist_dpm', 'smoke')
    steps = fit(lambda x0, y, draw: (layer(x0), None), layer.parameters(), [], r, precision='bf16')
    with pytest.raises(ValueError, match='needs `networks`'):
        next(steps)


def test_one_module_calls_autocast():
    package = Path(pdae_nb.__file__).parent
    callers = [p for p in package.rglob('*.py') if 'torch.autocast(' in p.read_text()]
    assert callers == [Path(layers.__file__)]


if __name__ == '__main__':
    golden = dict(made_with=environment(), loss=losses())
    GOLDEN.write_text(json.dumps(golden, indent=1) + '\n')
