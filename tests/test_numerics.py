"""The outputs of the official implementations, computed with published code in float32 on a CPU.

Their timestep is ours minus 1.
"""

import zlib

import numpy as np
import pytest
import torch
from torch import nn

from pdae_nb.denoise import denoising_loss
from pdae_nb.edit import lerp_trajectories
from pdae_nb.forward import Schedule, score_to_eps, shift_to_eps, snr
from pdae_nb.layers import Arithmetic, computing_in
from pdae_nb.methods.diffae import EncoderBlock, SemanticEncoder
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.latent import MLPSkipNet
from pdae_nb.methods.pdae import EpsAndScore
from pdae_nb.networks import ConvEncoder, GradientEstimator
from pdae_nb.sampling import sample, trajectory
from pdae_nb.solvers import diffae_times, pdae_times
from pdae_nb.unet import Attention, UNet, timestep_embedding

SCHED = Schedule.linear()


def u(name, n):
    "n numbers in [0,1) that are a function of the name: a hash of the name plus 0, 1, 2, …"
    mask = np.uint64(0xFFFFFFFF)
    factor = np.uint64(0x45D9F3B)
    half = np.uint64(16)
    x = (np.arange(n, dtype=np.uint64) + zlib.crc32(name.encode())) % 2**32
    for _ in range(2):
        x = ((x ^ (x >> half)) * factor) & mask
    return (x ^ (x >> half)) / 2**32


def inp(name, shape, scale):
    "A float32 tensor with values in [-scale, scale), a function of the name."
    values = scale * (2 * u(f'input:{name}', int(np.prod(shape))) - 1)
    return torch.from_numpy(values).reshape(shape).float()


def test_deterministic_numbers():
    want = [0.8334091988, 0.3021204264, 0.0728967271]
    np.testing.assert_allclose(u('abc', 3), want, atol=1e-9)


# ---------------------------------------------------------------- official names of the weights


def block(p, b):
    "Official names of a residual block without its attention; p is their prefix."
    yield from (f'{p}.in_layers.0', f'{p}.in_layers.2', f'{p}.emb_layers.1')
    if b.norm2.z is not None:
        scale_and_shift = b.norm2.z.out_features == 2 * b.conv2.out_channels
        yield f'{p}.emb_z_layers.1' if scale_and_shift else f'{p}.cond_emb_layers.1'
    yield from (f'{p}.out_layers.0', f'{p}.out_layers.3')
    if isinstance(b.skip, nn.Conv2d):
        yield f'{p}.skip_connection'


def attention(p, m):
    "Official names of an attention; none if m is no attention."
    if isinstance(m, Attention):
        yield from (f'{p}.norm', f'{p}.qkv', f'{p}.proj_out')


def encoder_block(p, b):
    "Official names of a block of Diff-AE's semantic encoder."
    yield from (f'{p}.in_layers.0', f'{p}.in_layers.2')
    if isinstance(b.skip, nn.Conv2d):
        yield f'{p}.skip_connection'


def second_half(up, p=''):
    "Official names of the second half of a U-Net: middle, up-sampling blocks, output."
    first, second = up.mid
    yield from block(f'{p}middle_block.0', first)
    yield from attention(f'{p}middle_block.1', first.attn)
    yield from block(f'{p}middle_block.2', second)
    number = -1
    place = 0  # of an up-sampling block, which is the last member of the block before
    for b in up.blocks:
        if b.resample:
            yield from block(f'{p}output_blocks.{number}.{place}', b)
        else:
            number += 1
            place = 2 if isinstance(b.attn, Attention) else 1
            yield from block(f'{p}output_blocks.{number}.0', b)
            yield from attention(f'{p}output_blocks.{number}.1', b.attn)
    yield from (f'{p}out.0', f'{p}out.2')


def unet_names(net):
    time = 'time_embed.time_embed' if net.config['dz'] else 'time_embed'
    yield from (f'{time}.0', f'{time}.2', 'input_blocks.0.0')
    for i, b in enumerate(net.down.blocks, 1):
        yield from block(f'input_blocks.{i}.0', b)
        yield from attention(f'input_blocks.{i}.1', b.attn)
    yield from second_half(net.up)


def gradient_estimator_names(net):
    yield 'label_emb'
    yield from second_half(net.up, 'shift_')


def conv_encoder_names(net):
    for i, m in enumerate(net.body):
        if isinstance(m, Attention):
            yield from attention(f'encoder.{i}', m)
        elif list(m.parameters()):
            yield f'encoder.{i}'
    yield f'encoder.{len(net.body) + 1}'


def semantic_encoder_names(net):
    *inputs, first, second = [m for m in net.body if isinstance(m, EncoderBlock)]
    yield 'encoder.input_blocks.0.0'
    for i, b in enumerate(inputs, 1):
        yield from encoder_block(f'encoder.input_blocks.{i}.0', b)
        yield from attention(f'encoder.input_blocks.{i}.1', b.attn)
    yield from encoder_block('encoder.middle_block.0', first)
    yield from attention('encoder.middle_block.1', first.attn)
    yield from encoder_block('encoder.middle_block.2', second)
    yield from ('encoder.out.0', 'encoder.out.3')


def latent_net_names(net):
    yield from ('time_embed.0', 'time_embed.2')
    for i in range(len(net.layers)):
        yield from (f'layers.{i}.linear', f'layers.{i}.linear_emb', f'layers.{i}.norm')
    yield f'layers.{len(net.layers)}.linear'


NAMES = {
    GradientEstimator: gradient_estimator_names,
    ConvEncoder: conv_encoder_names,
    SemanticEncoder: semantic_encoder_names,
    MLPSkipNet: latent_net_names,
}


def official_names(net):
    "The keys of the official state dict without .weight and .bias, in the order of our modules."
    for kind, names in NAMES.items():
        if isinstance(net, kind):
            return names(net)
    return unet_names(net)


def weight_values(key, v):
    "Values for one tensor of a network, a function of its official name."
    uniform = u(key, v.numel())
    if v.ndim > 1:
        outputs = len(v)
        return (2 * uniform - 1) * np.sqrt(3 * outputs / v.numel())
    if key.endswith('weight'):
        return 0.5 + uniform
    return 0.2 * (2 * uniform - 1)


@torch.no_grad()
def fill(net):
    "Set every weight of a network to values that are a function of its official name."
    keys = [f'{name}.{kind}' for name in official_names(net) for kind in ('weight', 'bias')]
    state = net.state_dict()
    for key, v in zip(keys, state.values(), strict=True):
        v.copy_(torch.from_numpy(weight_values(key, v)).reshape(v.shape))


def n_params(net):
    return sum(p.numel() for p in net.parameters())


# ---------------------------------------------------------------- the networks


def fingerprint(x):
    "Mean, mean absolute value, the first five values, the last value."
    return [x.mean(), x.abs().mean(), *x.flatten()[:5], x.flatten()[-1]]


def small_unet(heads=1):
    return UNet(c=3, ch=32, mult=(1, 2, 3), size=32, attn=(16,), heads=heads)


# fmt: off
UNET_EPS = {  # heads -> fingerprint
    1: [.00864899, .448099, -.304033, -.169668, .423158, -.133011, .0911598, .173675],
    4: [.00796018, .446576, -.233284, -.107622, .474691, -.218734, .0925067, .156070],
}
PDAE_GRADIENT = [-.244022, .514594, .269737, .0804855, -.323166, -.190722, .196672, .235316]
PDAE_Z = {  # size of the image -> fingerprint
    128: [-.0361562, .502284, .283429, -.235663, -.485897, -.0508718, .265137, -.431040],
    64: [-.0238055, .501968, .422983, .193701, -.467484, -.348888, -.0205151, -.206516],
}
DIFFAE_Z = [-.0526045, .334231, -.15551, .241757, -.401154, -.0561932, .0693927, .390651]
DIFFAE_EPS = [.0155462, .451765, -.1358, -.0761019, .219588, .483503, .235028, .291843]
DIFFAE_EPS_OF_GIVEN_Z = [
    .0118432, .454347, .0743938, .156425, .133836, -.00374633, -.0308769, .0984921]
LATENT_EPS = [-.0481797, .626398, .539364, -.0566622, .407236, -1.90817, .47236, .0128114]
TIMESTEP_EMBEDDING = [
    -.925125, .0389288, .98829, .817926, -.379664, -.999242, -.152587, .575324]
# fmt: on


@pytest.mark.parametrize('heads', UNET_EPS)
@torch.no_grad()
def test_unet_equals_the_official_one(heads):
    net = small_unet(heads).eval()
    assert n_params(net) == 2_885_827
    fill(net)
    x = inp('x', [2, 3, 32, 32], 1)
    np.testing.assert_allclose(x.flatten()[:3], [0.362935, -0.0195144, 0.438504], atol=1e-6)
    eps = net(x, torch.tensor([7, 613]))
    np.testing.assert_allclose(fingerprint(eps), UNET_EPS[heads], atol=1e-4)


def test_layouts_and_precisions_agree():
    "The U-Net whose weights the official code had."
    unet = small_unet().eval().requires_grad_(False)
    fill(unet)
    x = inp('x', [2, 3, 32, 32], 1)
    t = torch.tensor([7, 613])
    eps = unet(x, t)
    by_channels = unet.to(memory_format=torch.channels_last)(x, t)
    torch.testing.assert_close(by_channels, eps, rtol=0, atol=1e-5)
    with computing_in([unet], Arithmetic(torch.bfloat16)):
        low = unet(x, t)
    assert low.dtype == torch.float32
    assert (low - eps).abs().mean() < 0.01
    double = unet.double()(x.double(), t)
    torch.testing.assert_close(double, eps.double(), rtol=0, atol=1e-5)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(unet.float()(x, t).sum(), x)
    assert gradient.all()  # reaches every pixel


@torch.no_grad()
def test_gradient_estimator_equals_the_official_one():
    unet = small_unet().eval()
    G = GradientEstimator.on(unet, 16).eval()
    fill(unet)
    fill(G)
    eps_and_score = EpsAndScore(DPM(unet, SCHED, (3, 32, 32)), G)
    x = inp('x', [2, 3, 32, 32], 1)
    z = inp('z', [2, 16], 1.5)
    eps, g = eps_and_score(x, torch.tensor([7, 613]), z)
    np.testing.assert_allclose(fingerprint(eps), UNET_EPS[1], atol=1e-4)
    np.testing.assert_allclose(fingerprint(g), PDAE_GRADIENT, atol=1e-4)


@pytest.mark.parametrize('size', PDAE_Z)
@torch.no_grad()
def test_pdae_encoder_equals_the_official_one(size):
    enc = ConvEncoder(3, size).eval()
    fill(enc)
    z = enc(inp(f'x{size}', [1, 3, size, size], 1))
    np.testing.assert_allclose(fingerprint(z), PDAE_Z[size], atol=1e-4)


@torch.no_grad()
def test_diffae_equals_the_official_one():
    enc = SemanticEncoder(3, 32, (1, 2, 2), 32, 64, (16,)).eval()
    unet = UNet(c=3, ch=32, mult=(1, 2), size=32, dz=64, attn=(16,), dt=64, z_shift=False).eval()
    assert n_params(enc) == 326_432
    assert n_params(enc) + n_params(unet) == 1_420_259
    fill(enc)
    fill(unet)
    x0 = inp('x0', [2, 3, 32, 32], 1)
    x = inp('x', [2, 3, 32, 32], 1)
    t = torch.tensor([7, 613])
    z = enc(x0)
    eps = unet(x, t, z)
    eps_of_given_z = unet(x, t, inp('z', [2, 64], 1.5))
    np.testing.assert_allclose(fingerprint(z), DIFFAE_Z, atol=1e-4)
    np.testing.assert_allclose(fingerprint(eps), DIFFAE_EPS, atol=1e-4)
    np.testing.assert_allclose(fingerprint(eps_of_given_z), DIFFAE_EPS_OF_GIVEN_Z, atol=1e-4)


@torch.no_grad()
def test_latent_net_equals_the_official_one():
    net = MLPSkipNet(16, 32, 4).eval()
    fill(net)
    eps = net(inp('zlat', [2, 16], 1), torch.tensor([7, 613]))
    np.testing.assert_allclose(fingerprint(eps), LATENT_EPS, atol=1e-4)


# fmt: off
@pytest.mark.parametrize('config, n', [
    (dict(c=3, ch=128, mult=(1, 1, 2, 3, 4), size=128, attn=(16,)), 98_618_499),
    (dict(c=3, ch=64, mult=(1, 2, 4, 8), size=64, attn=(16,)), 63_958_019),
    (dict(c=3, ch=64, mult=(1, 2, 4, 8), size=64, attn=(16,), dt=512), 67_841_539),
    (dict(c=3, ch=128, mult=(1, 1, 2, 2, 4, 4), size=256, attn=(16,), dt=512), 131_709_827),
    (dict(c=1, ch=64, mult=(1, 2, 2, 4), size=32), 19_404_161),
])
# fmt: on
def test_parameter_counts(config, n):
    with torch.device('meta'):
        net = UNet(**config)
    assert n_params(net) == n


def test_timestep_embedding():
    embedding = timestep_embedding(torch.tensor([613]), 8)[0]
    np.testing.assert_allclose(embedding, TIMESTEP_EMBEDDING, atol=1e-5)


# ---------------------------------------------------------------- the noise schedule

# fmt: off
SCHEDULE_VALUES = [  # their t, alpha_bar, sqrt(1 - alpha_bar), -shift_to_eps of 1, lambda of PDAE
    (1,   .99978012,    .014829293, .0067430, 5.1051e-4),
    (5,   .99910152,    .029974418, .0233177, 1.8118e-3),
    (10,  .99780655,    .04683404,  .0404516, 4.0450e-3),
    (50,  .96995151,    .17334504,  .1671140, .04253198),
    (100, .8951416,     .32381848,  .3176906, .1299368),
    (300, .39401111,    .77845287,  .7729996, .5804557),
    (500, .07779666,    .96031421,  .9546525, .7201784),
    (700, .0068682791,  .99655992,  .9894399, .6039361),
    (900, 2.7024452e-4, .99986488,  .9908062, .4396125),
    (999, 4.0358296e-5, .99997979,  .9899287, .3635612),
]
# fmt: on


def pdae_weight(sched, t):
    "PDAE's weight of the loss: (1/(1+SNR))^0.9·(SNR/(1+SNR))^0.1."
    ratio = snr(sched, t)
    return (1 / (1 + ratio)) ** 0.9 * (ratio / (1 + ratio)) ** 0.1


@pytest.mark.parametrize('their_t, alpha_bar, sigma, shift, weight', SCHEDULE_VALUES)
def test_schedule_values(their_t, alpha_bar, sigma, shift, weight):
    t = torch.tensor([their_t + 1])
    one = torch.ones(1, dtype=torch.float64)
    np.testing.assert_allclose(SCHED(t), [alpha_bar], rtol=2e-5)
    np.testing.assert_allclose((1 - SCHED(t)).sqrt(), [sigma], rtol=2e-5)
    np.testing.assert_allclose(-shift_to_eps(SCHED, t, one), [shift], rtol=2e-5)
    np.testing.assert_allclose(pdae_weight(SCHED, t), [weight], rtol=2e-5)


# ---------------------------------------------------------------- the samplers, on toy denoisers

XS = inp('xs', [2, 3, 4, 4], 1.2)
Z = inp('z', [2, 16], 1.5)


def numbers(x):
    "Mean, the first three values, the last value."
    return [x.mean(), *x.flatten()[:3], x.flatten()[-1]]


def mean_of(z):
    return z.mean(1)[:, None, None, None]


def toy_eps(x, t):
    "A toy for the U-Net."
    their_t = (t - 1).reshape(-1, 1, 1, 1)
    return 0.8 * x + 0.1 * their_t / 1000


def toy_score(x, z=Z):
    "A toy for the gradient estimator G."
    return 0.2 * x - 0.05 * mean_of(z)


def diffae_toy(x, t):
    "A toy for Diff-AE's conditional U-Net."
    return toy_eps(x, t) - 0.05 * mean_of(Z)


def pdae_toy(x, t):
    "eps + sqrt(1-ab)·G, as published."
    return toy_eps(x, t) + score_to_eps(SCHED, t, toy_score(x))


def from_t(toy, first_t):
    "The denoiser `toy`, but without G at timesteps below `first_t`."

    def denoiser(x, t):
        return toy(x, t) if int(t[0]) >= first_t else toy_eps(x, t)

    return denoiser


def with_pure_noise():
    "The schedule with one more timestep, at which alpha_bar = 0, where the official one ends."
    return Schedule(torch.cat([SCHED.beta, torch.ones(1, dtype=torch.float64)]))


def encode_to_pure_noise(toy, steps):
    "x_T of the toy denoiser, on the timesteps of Diff-AE."
    sched = with_pure_noise()
    rising = [t for t in diffae_times(steps)[::-1] if t > 0]
    *_, (_, xT, _) = trajectory(toy, XS.clamp(-1, 1), sched, [*rising, sched.T], clip=1.0)
    return xT


# fmt: off
PDAE_SAMPLES = [  # steps, encoded, decoded, decoded without G in the last 30 % of the steps
    (10,
     [.00838304, .233989, -.235311, -.214885, .119643],
     [-.140313, .242573, -.79074, -.773309, -.304018],
     [-.127787, .211761, -.687616, -.672444, -.267452]),
    (20,
     [.0134896, .237119, -.217846, -.195671, .130237],
     [-.133458, .264726, -.777684, -.760424, -.275891],
     [-.123007, .237108, -.692783, -.677385, -.248139]),
]
PAPER_SAMPLES = [  # the same, for the sampler at the time of the paper
    (10,
     [.010275, .234663, -.228793, -.208413, .125909],
     [-.134221, .277209, -.776964, -.759629, -.288465],
     [-.126456, .25824, -.720892, -.704791, -.269142]),
    (20,
     [.0156486, .240802, -.211487, -.189362, .136634],
     [-.130442, .277816, -.76857, -.751408, -.268098],
     [-.122095, .256504, -.706169, -.690379, -.247978]),
]
DIFFAE_SAMPLES = [  # steps, encoded, decoded
    (10,
     [.0235115, .351809, -.387197, -.360067, .152681],
     [-.150022, .0621373, -.587898, -.57184, -.211054]),
    (20,
     [.0297888, .364434, -.382935, -.355559, .171342],
     [-.144139, .0774675, -.589475, -.572044, -.195182]),
]
INTERPOLATED = [-.139037, .252312, -.790194, -.772763, -.302062]
# fmt: on


@pytest.mark.parametrize('steps, encoded, decoded, decoded_without_G', PDAE_SAMPLES)
def test_pdae_sampler(steps, encoded, decoded, decoded_without_G):
    times = pdae_times(steps)
    rising = times[::-1]
    *_, (_, xT, _) = trajectory(pdae_toy, XS.clamp(-1, 1), SCHED, rising, clip=1.0)
    np.testing.assert_allclose(numbers(xT), encoded, atol=1e-4)

    x0 = sample(pdae_toy, XS, SCHED, times, clip=1.0)
    np.testing.assert_allclose(numbers(x0), decoded, atol=1e-4)

    # Sampling ends at t = 1 = rising[0], where the denoiser is not called.
    without_G = from_t(pdae_toy, rising[int(0.3 * steps) + 1])
    x0 = sample(without_G, XS, SCHED, times, clip=1.0)
    np.testing.assert_allclose(numbers(x0), decoded_without_G, atol=1e-4)


@pytest.mark.parametrize('steps, encoded, decoded, decoded_without_G', PAPER_SAMPLES)
def test_pdae_sampler_of_the_paper(steps, encoded, decoded, decoded_without_G):
    "The timesteps are those of Diff-AE. The steps without G are counted from t = 1."
    xT = encode_to_pure_noise(pdae_toy, steps)
    np.testing.assert_allclose(numbers(xT), encoded, atol=1e-4)

    times = diffae_times(steps)
    x0 = sample(pdae_toy, XS, SCHED, times, clip=1.0)
    np.testing.assert_allclose(numbers(x0), decoded, atol=1e-4)

    rising = [t for t in times[::-1] if t > 0]
    without_G = from_t(pdae_toy, rising[int(0.3 * steps)])
    x0 = sample(without_G, XS, SCHED, times, clip=1.0)
    np.testing.assert_allclose(numbers(x0), decoded_without_G, atol=1e-4)


@pytest.mark.parametrize('steps, encoded, decoded', DIFFAE_SAMPLES)
def test_diffae_sampler(steps, encoded, decoded):
    xT = encode_to_pure_noise(diffae_toy, steps)
    np.testing.assert_allclose(numbers(xT), encoded, atol=1e-4)
    x0 = sample(diffae_toy, XS, SCHED, diffae_times(steps), clip=1.0)
    np.testing.assert_allclose(numbers(x0), decoded, atol=1e-4)


def test_training_losses():
    x0 = XS.clamp(-1, 1)
    given = dict(t=torch.tensor([8, 614]), eps=inp('eps', [2, 3, 4, 4], 1.7))

    def pdae(x, t):
        return toy_eps(x, t) + shift_to_eps(SCHED, t, toy_score(x))

    loss = denoising_loss(pdae, x0, SCHED, **given)
    np.testing.assert_allclose(loss, 0.6610449, atol=1e-5)
    weighted = denoising_loss(pdae, x0, SCHED, pdae_weight, **given)
    np.testing.assert_allclose(weighted, 0.0621293, atol=1e-5)
    diffae = denoising_loss(diffae_toy, x0, SCHED, reduce=None, **given)
    np.testing.assert_allclose(diffae, [1.1448798, 0.0574673], atol=1e-5)


class ToyDPM:
    "A toy with the interface of the frozen DPM. Its only feature map is the input."

    def denoiser(self):
        return toy_eps

    def features(self, xt, t):
        return [xt], t

    def eps_of_features(self, features, e, xt, t):
        return toy_eps(features[0], e)


def toy_gradient_estimator(features, e, z):
    return toy_score(features[0], z)


def test_trajectory_interpolation():
    z2 = inp('z2', [2, 16], 1.5)
    f = lerp_trajectories(
        EpsAndScore(ToyDPM(), toy_gradient_estimator), Z, z2, 0.3, SCHED, score_to_eps
    )
    x0 = sample(f, XS, SCHED, pdae_times(10), clip=1.0)
    np.testing.assert_allclose(numbers(x0), INTERPOLATED, atol=1e-4)
