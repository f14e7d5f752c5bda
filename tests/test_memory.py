"""Peak memory counted on meta tensors, and batches that fit."""

from functools import partial
from threading import Event, Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pdae_nb import memory
from pdae_nb.data import Images
from pdae_nb.layers import Arithmetic, computing_in
from pdae_nb.memory import (
    TrainingBytes,
    batch_for,
    checkpointing_blocks,
    forward_bytes,
    free_bytes,
    largest_batch,
    micro_batch,
    on_meta,
    peak_bytes,
    step_bytes,
    training_peak_bytes,
    whole_operations,
)
from pdae_nb.methods.diffae import EncoderBlock, SemanticEncoder
from pdae_nb.methods.latent import MLPSkipNet
from pdae_nb.model import Draw
from pdae_nb.networks import ConvEncoder
from pdae_nb.recipes import recipe
from pdae_nb.unet import Block, UNet

GB = 10**9
FAMILIES = ('dpm', 'cdpm', 'pdae', 'label_pdae', 'diffae', 'scorevae', 'conditional', 'vae')


def untrained(run, size='smoke'):
    "An untrained model of a recipe, in eval mode."
    r = recipe(run, size)
    base = untrained(r.base, size) if r.base else None
    x = torch.zeros(2, 1 if 'mnist' in run else 3, r.px, r.px, dtype=torch.uint8)
    images = Images(x, torch.zeros(2, dtype=torch.long), list('0123456789'))
    return r.method.build(r, images, base).eval()


@pytest.fixture
def no_counts(monkeypatch):
    "Forget the counts of other tests."
    monkeypatch.setattr(memory, '_COUNTED', {})


# the count


@pytest.mark.parametrize('device', ['meta', 'cpu'])
def test_peak_of_a_linear_layer(device):
    layer = nn.Linear(8, 8, device=device)
    x = torch.ones(4, 8, device=device)
    assert peak_bytes(lambda: layer(x)) == 4 * 32
    assert peak_bytes(lambda: layer(x).relu().sum()) == 4 * (32 + 32)
    # sum, its gradient, gradients at ReLU's input, of the weight and of the bias
    step_peak = peak_bytes(lambda: layer(x).relu().sum().backward())
    assert step_peak == 4 * (1 + 1 + 32 + 64 + 8)


def test_views_need_no_memory_and_released_memory_is_subtracted():
    x = torch.empty(100, device='meta')
    assert peak_bytes(lambda: x.view(10, 10).t()[2:].expand(5, 8, 10)) == 0
    assert peak_bytes(lambda: x.add_(1)) == 0

    def one_after_the_other():
        for _ in range(5):
            y = x + 1
            del y

    def all_at_once():
        return [x + 1 for _ in range(5)]

    assert peak_bytes(one_after_the_other) == 400
    assert peak_bytes(all_at_once) == 5 * 400


def sines(x, n):
    for _ in range(n):
        x = x.sin()
    return x


def test_activations_are_kept_for_the_backward_pass_or_computed_again():
    "Sine keeps its input. 16 sines of 100 numbers: with 4 parts, one part is kept at a time."
    x = torch.empty(100, device='meta', requires_grad=True)
    assert peak_bytes(lambda: sines(x.detach(), 16)) == 2 * 400

    def plain():
        torch.autograd.backward(sines(x, 16), torch.empty_like(x))

    def in_parts():
        y = x
        for _ in range(4):
            y = checkpoint(sines, y, 4, use_reentrant=False)
        torch.autograd.backward(y, torch.empty_like(x))

    assert peak_bytes(plain) >= 16 * 400
    assert peak_bytes(in_parts) <= 10 * 400


def attention_step(n, backend=SDPBackend.FLASH_ATTENTION):
    q = torch.empty(1, 2, n, 8, device='meta', requires_grad=True)
    with sdpa_kernel(backend):
        F.scaled_dot_product_attention(q, q, value=q).sum().backward()


def test_fused_attention_is_linear_in_the_positions_and_the_math_backend_is_not():
    fused = [peak_bytes(partial(attention_step, n)) for n in (1000, 2000)]
    assert fused[1] < 2.01 * fused[0]
    matrix = 4 * 2 * 1000**2
    assert fused[0] < matrix < peak_bytes(partial(attention_step, 1000, SDPBackend.MATH))


def test_attention_and_dropout_in_a_checkpointed_part_are_one_operation_each():
    "The part runs again inside the backward pass."
    q = torch.empty(1, 2, 1000, 8, device='meta', requires_grad=True)

    def part(q):
        return F.dropout(F.scaled_dot_product_attention(q, q, q), 0.1)

    def step():
        checkpoint(part, q, use_reentrant=False).sum().backward()

    assert peak_bytes(step) < 4 * 2 * 1000**2


def test_dropout_keeps_one_byte_for_each_number():
    x = torch.empty(1000, device='meta')
    assert peak_bytes(lambda: F.dropout(x, 0.5)) == 5000
    assert peak_bytes(lambda: F.dropout(x, 0.5, training=False)) == 0
    assert peak_bytes(lambda: F.dropout(x, 0.0)) == 0


def test_attention_and_dropout_of_other_devices_compute():
    x = torch.ones(1, 1, 4, 8)
    out = []
    peak_bytes(lambda: out.append(F.scaled_dot_product_attention(x, x, x)))
    peak_bytes(lambda: out.append(F.dropout(x, 1.0)))
    assert torch.equal(out[0], x)
    assert torch.equal(out[1], 0 * x)


def test_training_peak_bytes_by_part():
    frozen = nn.Linear(8, 8, device='meta').requires_grad_(False)
    trained = nn.Linear(8, 8, bias=False, device='meta')
    x = torch.empty(4, 8, device='meta')
    counted = training_peak_bytes(lambda: trained(frozen(x)).sum(), [frozen, trained])
    assert counted.parameters == 4 * (72 + 64)
    assert counted.gradients == counted.average == 4 * 64
    assert counted.moments == 2 * 4 * 64
    # frozen output, sum, its gradient, gradient of the weight
    assert counted.activations == 4 * (32 + 1 + 1 + 64)
    assert counted.total == sum(counted)
    assert trained.weight.grad is None


def test_training_peak_bytes_names_what_is_wrong():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"device meta, got \['cpu'\]"):
        training_peak_bytes(lambda: layer(torch.ones(1, 2)).sum(), [layer])
    with pytest.raises(ValueError, match='no parameter'):
        training_peak_bytes(lambda: None, [nn.Linear(2, 2, device='meta').requires_grad_(False)])


# free memory


def cgroup(tmp_path, monkeypatch, lines, files):
    "Pretend that this process is in these control groups."
    (tmp_path / 'self').write_text(lines)
    for name, text in files.items():
        path = tmp_path / 'fs' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / 'meminfo').write_text('MemTotal: 9 kB\nMemAvailable:    1000 kB\n')
    monkeypatch.setattr(memory, '_OWN_CGROUP', tmp_path / 'self')
    monkeypatch.setattr(memory, '_CGROUPS', tmp_path / 'fs')
    monkeypatch.setattr(memory, '_MEMORY_INFO', tmp_path / 'meminfo')


V2 = {'memory.max': '500000\n', 'memory.current': '400000\n', 'memory.stat': 'inactive_file 5000\n'}
V1 = {'memory.limit_in_bytes': '600000', 'memory.usage_in_bytes': '1000'}
CGROUPS = {
    'none': ('', {}, 1_024_000),
    'no limit': ('0::/a\n', {'a/memory.max': 'max\n', 'a/memory.current': '7\n'}, 1_024_000),
    'own': ('0::/a\n', {f'a/{name}': text for name, text in V2.items()}, 105_000),
    'parent': ('0::/a/b\n', {f'a/{name}': text for name, text in V2.items()}, 105_000),
    'root': ('0::/\n', V2, 105_000),
    'version 1': (
        '5:cpu:/a\n4:memory:/a\n',
        {f'memory/a/{name}': text for name, text in V1.items()},
        599_000,
    ),
}


@pytest.mark.parametrize('name', CGROUPS)
def test_free_memory_respects_control_groups(name, tmp_path, monkeypatch):
    lines, files, expected = CGROUPS[name]
    cgroup(tmp_path, monkeypatch, lines, files)
    assert free_bytes('cpu') == expected


def test_free_memory_of_a_system_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, '_OWN_CGROUP', tmp_path / 'none')
    monkeypatch.setattr(memory, '_MEMORY_INFO', tmp_path / 'none')
    pages = {'SC_PHYS_PAGES': 1000, 'SC_PAGE_SIZE': 4096}
    monkeypatch.setattr(memory.os, 'sysconf', pages.__getitem__)
    assert free_bytes('cpu') == 2_048_000

    def unknown(name):
        raise ValueError('unrecognized configuration name')

    monkeypatch.setattr(memory.os, 'sysconf', unknown)
    assert free_bytes('cpu') == 4 * 2**30


def test_free_memory_of_a_gpu_includes_what_the_allocator_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 70)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 30)
    assert free_bytes('cuda') == 140


def test_free_memory_of_an_unknown_device():
    with pytest.raises(ValueError, match='cpu, cuda and mps, got meta'):
        free_bytes('meta')


# batches


@pytest.mark.parametrize('most', [1, 2, 3, 64, 100])
@pytest.mark.parametrize('budget', [0, 139, 140, 141, 999, 3000, 10**6])
def test_largest_batch_is_the_largest_that_fits(most, budget):
    def bytes_of(batch):
        return max(100 + 20 * batch, 60 + 40 * batch)

    batches = sorted({2**k for k in range(8) if 2**k < most} | {most})
    fitting = [batch for batch in batches if bytes_of(batch) <= budget]
    assert largest_batch(bytes_of, budget, most) == (fitting[-1] if fitting else 1)


def test_largest_batch_counts_few_batches():
    counted = []

    def bytes_of(batch):
        counted.append(batch)
        return 1000 * batch

    assert largest_batch(bytes_of, budget=17_000, most=1000) == 16
    assert counted == [1000, 1, 2, 16]
    counted.clear()
    assert largest_batch(bytes_of, budget=10**7, most=1000) == 1000
    assert counted == [1000]
    with pytest.raises(ValueError, match='most=0'):
        largest_batch(bytes_of, 1, most=0)


@pytest.mark.parametrize('family', [*FAMILIES, 'diffusers_dpm', 'diffusers_pdae'])
def test_models_of_all_families_can_be_counted(family):
    model = untrained(f'mnist_{family}')
    before = {name: p.device for name, p in model.named_parameters()}
    counts = [forward_bytes(model, batch) for batch in (1, 2, 3)]
    assert 0 < counts[2] - counts[1] == counts[1] - counts[0]
    step = step_bytes(model.train(), 2)
    assert step.activations > counts[1]
    assert step.gradients == sum(4 * p.numel() for p in model.trainable())
    networks = {id(p): p for network in model.networks() for p in network.parameters()}
    assert step.parameters >= sum(4 * p.numel() for p in networks.values())
    assert {name: p.device for name, p in model.named_parameters()} == before


@pytest.mark.parametrize('run', ['mnist_eval_classifier', 'mnist_classifier'])
def test_classifiers_are_counted_with_their_own_forward_pass(run, no_counts):
    model = untrained(run)

    def classify(model, images, labels):
        inputs = (images,) if 'eval' in run else (images, labels)
        return model.net(*inputs)

    assert 0 < forward_bytes(model, 4, classify) < 4 * 10**7
    assert batch_for(model, 100, classify) == 100
    assert step_bytes(model, 4).activations > forward_bytes(model, 4, classify)


def test_bf16_needs_half_of_the_activations():
    model = untrained('mnist_dpm')
    exact = forward_bytes(model, 4)
    with computing_in(model.networks(), Arithmetic(torch.bfloat16)):
        half = forward_bytes(model, 4)
    assert 0.45 < half / exact < 0.6


@pytest.mark.parametrize('family', ['dpm', 'cdpm', 'pdae', 'diffae', 'scorevae', 'conditional'])
def test_a_forward_pass_is_counted_at_a_timestep_that_is_computed_in_float32(family):
    model = untrained(f'mnist_{family}')
    exact = forward_bytes(model, 4)
    with computing_in(model.networks(), Arithmetic(torch.bfloat16, 500)):
        assert forward_bytes(model, 4) >= exact


def test_on_meta_copies_no_weights():
    model = untrained('mnist_pdae')
    copied = on_meta(model)
    assert all(p.is_meta for network in copied.networks() for p in network.parameters())
    assert not any(p.is_meta for network in model.networks() for p in network.parameters())
    frozen = [p.requires_grad for network in copied.networks() for p in network.parameters()]
    assert frozen == [p.requires_grad for network in model.networks() for p in network.parameters()]


def test_batch_for_fits_half_of_the_free_memory(monkeypatch, no_counts):
    model = untrained('mnist_dpm')
    for n in (1, 8, 32):
        monkeypatch.setattr(memory, 'free_bytes', lambda device, n=n: 2 * forward_bytes(model, n))
        assert batch_for(model, 100) == n
    monkeypatch.setattr(memory, 'free_bytes', lambda device: 0)
    assert batch_for(model, 100) == 1
    monkeypatch.setattr(memory, 'free_bytes', lambda device: 100 * GB)
    assert batch_for(model, 100) == 100
    assert batch_for(model, 1) == 1


def test_batch_for_counts_equal_models_once(monkeypatch, no_counts):
    calls = []

    def counting(model, batch, forward):
        calls.append(batch)
        return batch

    monkeypatch.setattr(memory, 'forward_bytes', counting)
    for run in ('mnist_dpm', 'mnist_dpm', 'mnist_diffae'):
        batch_for(untrained(run), 4)
    assert calls == [4] * 2
    model = untrained('mnist_dpm')
    with computing_in(model.networks(), Arithmetic(torch.bfloat16)):
        batch_for(model, 4)
    assert calls == [4] * 3
    monkeypatch.setattr(memory, 'free_bytes', lambda device: 2 * 2)
    assert batch_for(model, 4) == 2
    assert batch_for(model, 4) == 2
    assert calls == [4] * 3 + [1, 2]


class ReadsValues(nn.Module):
    "A network that cannot compute on meta."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, xt, t):
        return xt * self.scale.detach().numpy()[0]


def test_a_network_that_cannot_compute_on_meta_gets_the_largest_batch(no_counts):
    model = untrained('mnist_dpm')
    model.net = ReadsValues()
    with pytest.raises((RuntimeError, TypeError)):
        forward_bytes(model, 1)
    assert batch_for(model, 77) == 77


def test_counts_in_two_threads_leave_the_functions_as_they_were():
    "The second thread waits until the first one has restored the functions."
    attention, dropout = F.scaled_dot_product_attention, F.dropout
    is_inside = Event()
    may_end = Event()

    def count():
        is_inside.set()
        may_end.wait(10)

    with whole_operations():
        thread = Thread(target=peak_bytes, args=(count,))
        thread.start()
        assert not is_inside.wait(0.3)
    may_end.set()
    thread.join()
    assert is_inside.is_set()
    assert F.scaled_dot_product_attention is attention
    assert F.dropout is dropout


# activation checkpointing

CHECKPOINTED = ('mnist_dpm', 'mnist_cdpm', 'mnist_pdae', 'mnist_label_pdae', 'mnist_diffae')


def with_dropout(run):
    "A model in training mode with dropout. No layer is zero, so that all parts have gradients."
    model = untrained(run).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + scale * noise
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return model


def losses_and_gradients(model):
    "One step: losses, and the gradients by name. Dropout uses PyTorch's own generator."
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(4, *model.shape, generator=generator) * 2 - 1
    model.zero_grad()
    torch.manual_seed(2)
    losses, _ = model(x0, torch.arange(4), Draw(0, 0, 4))
    losses.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), gradients, torch.rand(1)  # the state of the generator afterwards


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('run', CHECKPOINTED)
def test_losses_and_gradients_are_equal_with_checkpointing(run, dtype):
    model = with_dropout(run)
    with computing_in(model.networks(), None if dtype is None else Arithmetic(dtype)):
        losses, gradients, after = losses_and_gradients(model)
        again, _, _ = losses_and_gradients(model)
        assert torch.equal(losses, again)
        with checkpointing_blocks(model.networks()):
            others, other_gradients, other_after = losses_and_gradients(model)
    assert torch.equal(losses, others)
    assert torch.equal(after, other_after)
    assert gradients.keys() == other_gradients.keys()
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.any() for gradient in gradients.values())
    unequal = [n for n in gradients if not torch.equal(gradients[n], other_gradients[n])]
    assert not unequal


def test_checkpointing_makes_the_counted_peak_fall():
    shape = dict(ch=16, mult=(1, 2, 2), size=32)
    with torch.device('meta'):
        net = UNet(**shape)
        enc = SemanticEncoder(c=1, z_dim=8, **shape)
        x = torch.empty(8, 1, 32, 32)
        t = torch.empty(8, dtype=torch.int64)
        for network, inputs in ((net, (x, t)), (enc, (x,))):

            def loss(network=network, inputs=inputs):
                return network(*inputs).square().mean()

            kept = training_peak_bytes(loss, [network])
            with checkpointing_blocks([network]):
                computed_again = training_peak_bytes(loss, [network])
            assert kept[:4] == computed_again[:4]
            assert computed_again.activations < 0.5 * kept.activations


def calls_of_blocks(model, monkeypatch):
    "Count the calls of the residual blocks by way of what `torch.compile` sets."
    calls = {}
    for network in model.networks():
        for module in network.modules():
            if isinstance(module, Block | EncoderBlock):
                calls[module] = 0

                def call(*args, module=module):
                    calls[module] += 1
                    return module._call_impl(*args)

                monkeypatch.setattr(module, '_compiled_call_impl', call)
    return calls


def test_blocks_are_called_as_modules_and_frozen_blocks_run_once(monkeypatch):
    model = with_dropout('mnist_pdae')
    calls = calls_of_blocks(model, monkeypatch)
    trained = {block: next(block.parameters()).requires_grad for block in calls}
    assert set(trained.values()) == {True, False}
    checkpoints = []

    def counted_checkpoint(*args, **kwargs):
        checkpoints.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(memory, 'checkpoint', counted_checkpoint)
    with checkpointing_blocks(model.networks()):
        losses_and_gradients(model)
        assert calls == {block: 1 + trained[block] for block in calls}
        assert len(checkpoints) == sum(trained.values())
        calls.update(dict.fromkeys(calls, 0))
        model.encode(torch.zeros(2, *model.shape))
        model.decode(torch.zeros(2, 64), torch.zeros(2, *model.shape), steps=1)
    assert set(calls.values()) == {1}
    assert len(checkpoints) == sum(trained.values())


def test_blocks_of_the_encoder_of_diffae_run_twice(monkeypatch):
    model = with_dropout('mnist_diffae')
    calls = calls_of_blocks(model, monkeypatch)
    losses_and_gradients(model)
    assert set(calls.values()) == {1}
    with checkpointing_blocks(model.networks()):
        losses_and_gradients(model)
    assert set(calls.values()) == {3}


def test_the_setting_is_restored_and_is_not_stored():
    net = UNet(ch=8, mult=(1, 2), size=8, n_res=1)
    config = dict(net.config)
    with checkpointing_blocks([net]):
        assert net.down.checkpointing and net.up.checkpointing
        assert net.config == config
        with pytest.raises(RuntimeError, match='inside'), checkpointing_blocks([net]):
            raise RuntimeError('inside')
        assert net.down.checkpointing and net.up.checkpointing
    assert not net.down.checkpointing and not net.up.checkpointing
    assert 'checkpointing' not in ''.join(net.state_dict())


def test_networks_that_cannot_be_checkpointed_are_named():
    model = untrained('mnist_scorevae')
    with (
        pytest.raises(ValueError, match='TimeEncoder is differentiated twice'),
        checkpointing_blocks(model.networks()),
    ):
        pass
    assert not model.enc.down.checkpointing
    others = [ConvEncoder(1, 28, 8), MLPSkipNet(8, hidden=8, layers=2)]
    with (
        pytest.raises(ValueError, match='got ConvEncoder, MLPSkipNet'),
        checkpointing_blocks(others),
    ):
        pass


# Diff-AE at 256 pixels


@pytest.fixture(scope='module')
def diffae256():
    "The model of the recipe for FFHQ-256, on the device meta."
    return on_meta(untrained('ffhq256_diffae', 'paper')).train()


def test_diffae_at_256_pixels_trains_on_24_gb(diffae256):
    "bf16, checkpointing, accumulated gradients: two micro-batches of 32 images make the batch."
    batch = recipe('ffhq256_diffae', 'paper').batch
    with (
        computing_in(diffae256.networks(), Arithmetic(torch.bfloat16)),
        checkpointing_blocks(diffae256.networks()),
    ):
        assert micro_batch(diffae256, 24 * GB, batch) == 32
        counted = step_bytes(diffae256, 32)
    assert counted.total <= 24 * GB
    parameters = sum(p.numel() for p in diffae256.parameters())
    assert parameters == 168_492_291  # of the published model
    assert counted.parameters == counted.gradients == counted.average == 4 * parameters
    assert counted.moments == 8 * parameters


def test_diffae_at_256_pixels_without_checkpointing_needs_smaller_micro_batches(diffae256):
    assert step_bytes(diffae256, 4).total <= 24 * GB < step_bytes(diffae256, 8).total


def test_sharding_divides_all_but_the_activations():
    counted = TrainingBytes(100, 80, 160, 80, 1000)
    assert counted.sharded(1) == counted
    assert counted.sharded(8) == TrainingBytes(13, 10, 20, 10, 1000)
