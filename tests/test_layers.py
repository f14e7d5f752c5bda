"""Networks whose layers compute in the dtype of their input.

A model in bf16 equals a model whose parameters were cast to bf16, in losses and gradients.
"""

import copy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import pdae_nb.model as model_module
from pdae_nb.data import Images, to_signed
from pdae_nb.experiments.precision import TIMES, compare_precisions, rounding_of_x0
from pdae_nb.forward import Schedule
from pdae_nb.hub import load
from pdae_nb.layers import Arithmetic, GroupNorm, Network, computing_in
from pdae_nb.methods.classifier import EvalClassifier, NoisyClassifier
from pdae_nb.methods.diffae import DiffAE
from pdae_nb.methods.dpm import DPM, ClassConditionalDPM, DPMSettings
from pdae_nb.methods.label_pdae import LabelPDAE
from pdae_nb.methods.latent import LatentDPM, MLPSkipNet, ZStats
from pdae_nb.methods.pdae import PDAE
from pdae_nb.methods.scorevae import ConditionalDecoder, ScoreVAE
from pdae_nb.methods.vae import VAE
from pdae_nb.model import Draw, GenerativeModel, largest_bf16_timestep
from pdae_nb.recipes import recipe
from pdae_nb.unet import UNet

BF16 = Arithmetic(torch.bfloat16)
TINY = dict(ch=8, mult=(1, 2), n_res=1)
PX = 16

# In these networks the first layer and the embedding of t compute in float32.
IN_FLOAT32 = (
    'down.stem.',
    'time.',
    'label.',
    'body.0.',
    'layers.0.',
    'enc.down.stem.',
    'enc.time.',
)


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (8, 1, PX, PX), generator=g, dtype=torch.uint8)
    return Images(x, torch.arange(8) % 4, tuple('abcd'))


def randomise(model):
    "Random weights in place of the zeros of new layers."
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=g)
    return model


def new_dpm():
    r = recipe('mnist_dpm', 'smoke')
    return randomise(DPM.build(r, data()))


def new_model(method):
    "An untrained model of a class, with random weights."
    from dataclasses import replace

    images = data()
    coded = dict(z_dim=8, **TINY)
    rows = {
        DPM: dict(net=TINY),
        ClassConditionalDPM: dict(net=TINY),
        NoisyClassifier: dict(net=TINY),
        EvalClassifier: dict(net=dict(ch=8)),
        PDAE: dict(encoder=dict(z_dim=8, groups=8)),
        LabelPDAE: dict(),
        DiffAE: dict(net=TINY, encoder=dict(z_dim=8, mult=(1, 2, 2), ch=8)),
        ScoreVAE: dict(encoder=coded),
        ConditionalDecoder: dict(net=TINY, encoder=coded),
        VAE: dict(net=coded),
    }
    base = new_dpm() if method in (PDAE, LabelPDAE, ScoreVAE) else None
    r = replace(recipe('mnist_dpm', 'smoke'), method=method, **(dict(net={}) | rows[method]))
    torch.manual_seed(0)
    return randomise(method.build(r, images, base))


def new_latent():
    autoencoder = new_model(PDAE)
    z = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    return randomise(LatentDPM(MLPSkipNet(8, 16, 4), ZStats(z), autoencoder))


def gradients(model, x0, y):
    "Losses of a step in bf16, and the gradients of all parameters."
    with computing_in(model.networks(), BF16):
        losses, _ = model(x0, y, Draw(0, 0, len(x0)))
        losses.float().mean().backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def cast_copy(model):
    "The same model with its parameters in bf16, but for the layers that compute in float32."
    copied = copy.deepcopy(model)
    for network in copied.children():
        for name, p in network.named_parameters():
            if not name.startswith(IN_FLOAT32):
                p.data = p.data.bfloat16()
    return copied


METHODS = [DPM, ClassConditionalDPM, NoisyClassifier, EvalClassifier, PDAE, LabelPDAE, DiffAE, VAE]


@pytest.mark.parametrize('method', METHODS, ids=lambda method: method.__name__)
def test_gradients_equal_those_of_a_copy_in_bf16_bit_for_bit(method):
    model = new_model(method)
    copied = cast_copy(model)
    assert any(p.dtype == torch.bfloat16 for p in copied.parameters())
    images = data()
    x0 = to_signed(images.x)
    losses, of_model = gradients(model, x0, images.y)
    copied_losses, of_copy = gradients(copied, x0, images.y)
    assert torch.equal(losses, copied_losses)
    for name, gradient in of_model.items():
        assert torch.equal(gradient, of_copy[name].float()), name
    assert sum(bool(gradient.any()) for gradient in of_model.values()) > len(of_model) / 2


def test_gradients_of_a_latent_dpm_equal_those_of_a_copy_in_bf16():
    model = new_latent()
    codes = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    losses, of_model = gradients(model, codes, None)
    copied_losses, of_copy = gradients(cast_copy(model), codes, None)
    assert torch.equal(losses, copied_losses)
    for name, gradient in of_model.items():
        assert torch.equal(gradient, of_copy[name].float()), name


@pytest.mark.parametrize('method', [ScoreVAE, ConditionalDecoder], ids=lambda m: m.__name__)
def test_twice_used_encoders_add_up_their_gradients_in_float32(method):
    "The encoder is used for the code and for the score. A copy adds up both in bf16."
    model = new_model(method)
    images = data()
    x0 = to_signed(images.x)
    losses, of_model = gradients(model, x0, images.y)
    copied_losses, of_copy = gradients(cast_copy(model), x0, images.y)
    assert torch.equal(losses, copied_losses)
    for name, gradient in of_model.items():
        assert gradient.dtype == torch.float32, name
        difference = (gradient - of_copy[name].float()).norm()
        assert difference <= 0.01 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize(
    'method', [*METHODS, ScoreVAE, ConditionalDecoder], ids=lambda m: m.__name__
)
def test_losses_in_bf16_are_close_to_those_in_float32(method):
    model = new_model(method)
    images = data()
    x0 = to_signed(images.x)
    exact, _ = model(x0, images.y, Draw(0, 0, len(x0)))
    rounded, _ = gradients(model, x0, images.y)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.01)
    again, _ = model(x0, images.y, Draw(0, 0, len(x0)))
    assert torch.equal(again, exact), 'afterwards the networks compute in float32'


def test_activation_checkpointing_gives_the_same_gradients():
    model = new_dpm()
    net = model.net
    xt = torch.randn(4, 1, PX, PX)
    t = torch.tensor([1, 300, 600, 1000])

    def gradients_of(forward):
        net.zero_grad()
        with computing_in([net], BF16):
            assert net.embed(t).dtype == torch.bfloat16
            forward().square().mean().backward()
        return [p.grad.clone() for p in net.parameters()]

    plain = gradients_of(lambda: net(xt, t))
    recomputed = gradients_of(lambda: checkpoint(net, xt, t, use_reentrant=False))
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_threads_share_one_network():
    net = new_dpm().net
    xt = torch.randn(8, 1, PX, PX)
    t = torch.tensor([500])
    with torch.no_grad(), computing_in([net], BF16):
        assert net.embed(t).dtype == torch.bfloat16
        expected = [net(x[None], t) for x in xt]
        got = [None] * len(xt)

        def compute(i):
            with torch.no_grad():
                got[i] = net(xt[i][None], t)

        threads = [threading.Thread(target=compute, args=(i,)) for i in range(len(xt))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compiled_network_computes_in_bf16_in_one_graph():
    net = new_dpm().net
    xt = torch.randn(4, 1, PX, PX)
    t = torch.tensor([1, 300, 600, 1000])
    with torch.no_grad():
        exact = net(xt, t)
        with computing_in([net], BF16):
            rounded = net(xt, t)
            compiled = torch.compile(net, backend='eager', fullgraph=True)
            assert torch.equal(compiled(xt, t), rounded)
            fused = torch.compile(net, fullgraph=True)(xt, t)
        assert torch.equal(torch.compile(net, backend='eager')(xt, t), exact)
    torch.compiler.reset()
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, rounded, rtol=0.05, atol=0.02)


def test_first_layer_keeps_the_precision_of_the_image():
    "A difference between two images that bf16 would round away reaches the output."
    net = new_dpm().net
    t = torch.tensor([1])
    x = torch.full((1, 1, PX, PX), 0.898)
    nearly = x + 1e-3  # both are the same number in bf16
    assert torch.equal(x.bfloat16(), nearly.bfloat16())
    with torch.no_grad(), computing_in([net], BF16):
        assert not torch.equal(net.down(x, net.embed(t))[0], net.down(nearly, net.embed(t))[0])
        assert net.down(x, net.embed(t))[0].dtype == torch.bfloat16


class Foreign(nn.Module):
    "A network of other layers than this package's."

    def __init__(self):
        super().__init__()
        self.config = {}
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.dtypes = []

    def forward(self, xt, t):
        out = self.conv(xt)
        self.dtypes.append(out.dtype)
        return out


def test_foreign_networks_run_under_autocast():
    net = Foreign()
    model = DPM(net, Schedule.linear(), (1, PX, PX))
    x0 = to_signed(data().x)
    t = torch.full((len(x0),), 500)
    with computing_in([net], BF16):
        assert model.denoiser()(x0, t).dtype == torch.float32, 'eps is float32 outside a network'
    gradients(model, x0, None)
    model(x0, None, Draw(0, 0, len(x0)))
    assert net.dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert net.conv.weight.grad.dtype == torch.float32
    assert not torch.is_autocast_enabled('cpu')


def test_a_foreign_network_keeps_its_forward():
    net = Foreign()
    x = torch.zeros(1, 1, 4, 4)
    t = torch.tensor([1])
    with computing_in([net], BF16):
        with computing_in([net], None):
            net(x, t)
        net(x, t)
        with computing_in([net], BF16._replace(exact_above=10)):
            net(x, t)
    assert 'forward' not in vars(net)
    net.forward = lambda xt, t: 'its own'
    with computing_in([net], BF16):
        assert net(x, t) == 'its own'
    assert net(x, t) == 'its own'
    assert net.dtypes == [torch.float32, torch.bfloat16, torch.float32]


def test_autocast_ends_when_a_foreign_network_fails():
    net = Foreign()
    with pytest.raises(RuntimeError), computing_in([net], BF16):
        try:
            net(torch.zeros(1, 2, 4, 4), torch.tensor([1]))
        finally:
            assert not torch.is_autocast_enabled('cpu')
    net(torch.zeros(1, 1, 4, 4), torch.tensor([1]))
    assert net.dtypes == [torch.float32]


@pytest.mark.slow
def test_a_compiled_foreign_network_is_trained_in_bf16():
    model = DPM(Foreign(), Schedule.linear(), (1, PX, PX))
    model.net.compile(backend='eager')
    x0 = to_signed(data().x)
    losses, of_model = gradients(model, x0, None)
    torch.compiler.reset()
    assert model.net.dtypes[0] == torch.bfloat16
    assert losses.isfinite().all()
    assert of_model['net.conv.weight'].dtype == torch.float32


CRASHES = """
import torch
from torch import nn
from pdae_nb.layers import GroupNorm

norm = GroupNorm(8, 64)
x = torch.randn(4, 64, 16, 16).to(memory_format=torch.channels_last)
norm(x).pow(3).sum().backward()  # the input needs no gradient
norm.weight.requires_grad_(False)
norm(x).pow(3).sum().backward()  # only the bias does
norm.weight.requires_grad_(True)
conv = nn.Conv2d(64, 64, 1)
torch.autograd.grad(norm(conv(x)).pow(3).sum(), [norm.weight])  # nobody asks for the input's
score = torch.func.grad(lambda x: norm(x).pow(3).sum())(x)
score.square().sum().backward()
print('alive')
"""


@pytest.mark.slow
def test_group_norm_on_frozen_features_does_not_end_the_process():
    done = subprocess.run([sys.executable, '-c', CRASHES], capture_output=True, text=True)
    assert done.stdout.strip() == 'alive', (done.returncode, done.stderr)


def test_arithmetic_is_restored_after_an_error():
    net = new_dpm().net
    with pytest.raises(KeyError), computing_in([net], BF16):
        assert net.arithmetic == BF16
        raise KeyError
    assert net.arithmetic is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize('requires_grad', [False, True])
def test_group_norm_equals_its_definition(dtype, layout, requires_grad):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 5, 7, generator=g).to(dtype).contiguous(memory_format=layout)
    x.requires_grad_(requires_grad)
    layer = GroupNorm(4, 8)
    nn.init.normal_(layer.weight, generator=g)
    nn.init.normal_(layer.bias, generator=g)
    groups = x.double().reshape(3, 4, -1)
    mean = groups.mean(-1, keepdim=True)
    variance = groups.var(-1, correction=0, keepdim=True)
    normal = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    expected = normal * layer.weight.double()[:, None, None] + layer.bias.double()[:, None, None]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    y = layer(x)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert y.stride() == x.stride()
    upstream = torch.randn(x.shape, generator=g)
    (y.float() * upstream).sum().backward()
    of_weight = (normal * upstream).sum((0, 2, 3))
    error = (layer.weight.grad - of_weight).norm() / of_weight.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)


# Sampling


def shipped(name):
    "A shipped model, eight of its test data, and their labels if it is conditioned on labels."
    model = load(name)
    inputs = load_file(Path(__file__).with_name('golden.safetensors'))
    if len(model.shape) == 1:
        codes = inputs[f'input/{name}/codes']
        return model, model.stats.norm(codes), None
    data_name = name.split('_')[0]
    labels = inputs[f'input/{data_name}/y']
    has_labels = model.is_conditional and not model.is_autoencoder
    return model, inputs[f'input/{data_name}/x0'], labels if has_labels else None


PREDICT_EPS = [
    'mnist_dpm',
    'mnist_cdpm',
    'mnist_pdae',
    'mnist_label_pdae',
    'mnist_diffae',
    'mnist_scorevae',
    'mnist_paper_scorevae',
    'mnist_pdae_latent',
    'mnist_diffae_latent',
    'cifar16_dpm',
    'cifar16_paper_scorevae',
]


@pytest.mark.parametrize('name', PREDICT_EPS)
def test_bf16_hardly_changes_x0_of_a_shipped_model(name):
    "At large t, where it would, the networks compute in float32."
    model, x0, y = shipped(name)
    limit = model.exact_above
    changes = rounding_of_x0(model, x0, y=y, exact_above=limit)
    is_exact = torch.tensor(TIMES) > limit
    assert is_exact.any() and not is_exact.all()
    assert not changes[is_exact].any()
    assert (changes[~is_exact] > 0).all()
    assert changes.max() < 0.03
    without_limit = rounding_of_x0(model, x0, [1000], y=y)
    assert without_limit > 0.1, 'the limit is needed'


def test_networks_that_predict_v_use_bf16_at_all_timesteps():
    sched = Schedule.linear()
    nets = [randomise(UNet(c=1, size=PX, **TINY)) for _ in range(2)]
    eps, v = [DPM(nets[i], sched, (1, PX, PX), DPMSettings(k)) for i, k in enumerate(('eps', 'v'))]
    assert eps.exact_above == largest_bf16_timestep(sched)
    assert v.exact_above is None
    x0 = to_signed(data().x)
    assert rounding_of_x0(v, x0, [1000]) < 0.05 < rounding_of_x0(eps, x0, [1000])


def test_the_base_of_pdae_has_the_limit_of_pdae(monkeypatch):
    "Both share the features of one first half, so they compute in the same dtype."
    model = new_model(PDAE)
    model.base = DPM(model.base.net, model.sched, model.shape, DPMSettings('v'))
    monkeypatch.setattr(model_module, 'bf16_pays', lambda device: True)
    with model.in_bf16():
        limits = {m.arithmetic for n in model.networks() for m in n.modules() if is_network(m)}
    assert limits == {Arithmetic(torch.bfloat16, model.exact_above)}


def is_network(module):
    return isinstance(module, Network)


@pytest.mark.parametrize(
    'sched', [Schedule.linear(), Schedule.linear(50), Schedule.constant()], ids=str
)
def test_limit_of_bf16_follows_the_noise_schedule(sched):
    t = largest_bf16_timestep(sched)
    amplification = ((1 - sched.alpha_bar) / sched.alpha_bar).sqrt()
    assert 0 < t < sched.T
    assert amplification[t] <= 7 < amplification[t + 1]


@pytest.mark.parametrize('pays', [False, True])
def test_sampling_in_bf16_where_it_pays(pays, monkeypatch):
    monkeypatch.setattr(model_module, 'bf16_pays', lambda device: pays)
    model = load('mnist_dpm')
    assert isinstance(model, GenerativeModel)
    exact = model.sample(2, steps=5)
    with model.in_bf16():
        images = model.sample(2, steps=5)
    assert images.dtype == torch.float32
    difference = (images - exact).square().mean().sqrt()
    assert (difference > 0) == pays
    assert difference < 0.05
    assert torch.equal(model.sample(2, steps=5), exact)


def test_measured_precisions_are_kept(tmp_path, monkeypatch):
    "A second call reads the file; the runs of both precisions start from the same weights."
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    lines = []
    out = tmp_path / 'smoke.json'
    first = compare_precisions('smoke', 1, out=out, log=lines.append)
    assert set(first['runs']) == {'float32 0', 'bf16 0'}
    assert len(lines) == 2
    assert compare_precisions('smoke', 1, out=out, log=lines.append) == first
    assert len(lines) == 2
    exact, rounded = first['runs']['float32 0'], first['runs']['bf16 0']
    assert exact['all'] != rounded['all']
    assert exact['all'] == pytest.approx(rounded['all'], rel=0.01)
    with pytest.raises(ValueError, match='smoke or lesson'):
        compare_precisions('paper', 1, out=tmp_path / 'paper.json')
    with pytest.raises(ValueError, match='at least 1'):
        compare_precisions('smoke', 0, out=out)
