"""Thirty steps at `smoke` size, against the losses that were committed.  `python tests/test_training.py` writes them anew."""
import json
from pathlib import Path
import numpy as np, pytest, torch
import pdae_nb.unet as unet

GOLDEN = Path(__file__).with_name('golden_loss.json')

def here():
    "What the last digits depend on"
    import PIL, platform, sklearn
    info = Path('/proc/cpuinfo')
    cpu = next((l.split(':')[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')), '') if info.exists() else platform.processor()
    return dict(torch=torch.__version__.split('+')[0], numpy=np.__version__, pillow=PIL.__version__, sklearn=sklearn.__version__, cpu=cpu, isa=torch.backends.cpu.get_cpu_capability())

def losses(amp=False, steps=30):
    from pdae_nb.data import batches
    from pdae_nb.train import dpm_task, fit, recipe
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        r = recipe('mnist_dpm', 'smoke')
        torch.manual_seed(r.seed)
        task = dpm_task(r)
        data = batches(task.images, r.batch, steps, r.flip, r.seed)
        return [s.loss.item() for s in fit(task.loss_fn, task.parts['dpm'].parameters(), data, r, amp=amp)]
    finally: torch.set_num_threads(threads)

@pytest.mark.parametrize('amp', [False, True])
def test_thirty_steps_give_the_committed_losses(amp, monkeypatch):
    "In float32, and in bf16 whether it pays here or not"
    monkeypatch.setattr(unet, 'bf16_pays', lambda device: True)
    golden, got = json.loads(GOLDEN.read_text()), losses(amp)
    same = golden['made_with'] == here()
    np.testing.assert_allclose(got, golden['loss'], atol=2e-2 if amp else 1e-6 if same else 2e-3)   # other versions round otherwise, and drift
    assert got[-1] < .8*got[0]
    if amp: assert any(abs(a - b) > 2e-4 for a, b in zip(got, golden['loss'])), 'rounded to bf16, the losses would not be these'

@pytest.mark.parametrize('pays', [False, True])
def test_bf16_only_where_it_pays(pays, monkeypatch):
    "On CPUs without bf16 arithmetic it is many times slower than float32, so nothing may ask for it there"
    from pdae_nb.train import fit, recipe
    monkeypatch.setattr(unet, 'bf16_pays', lambda device: pays)
    layer, seen = torch.nn.Linear(2, 2), []
    def loss_fn(x0, y): out = layer(x0); seen.append(out.dtype); return out.square().mean()
    list(fit(loss_fn, layer.parameters(), iter([(torch.ones(4, 2), None)]), recipe('mnist_dpm', 'smoke')))
    assert seen == [torch.bfloat16 if pays else torch.float32]
    package = Path(unet.__file__).parent
    assert [p.name for p in package.glob('*.py') if 'torch.autocast(' in p.read_text()] == ['unet.py'], 'one place decides'

if __name__ == '__main__': GOLDEN.write_text(json.dumps(dict(made_with=here(), loss=losses()), indent=1) + '\n')
