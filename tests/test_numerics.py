"""Numbers of the official implementations, as published code gives them in float32 on a CPU; their time index is ours minus one."""
import zlib
import numpy as np
import pytest, torch
from torch import nn
from pdae_nb.denoise import denoising_loss
from pdae_nb.forward import Schedule, score_to_eps, shift_to_eps, snr
from pdae_nb.sample import diffae_times, pdae_times, sample, trajectory
from pdae_nb.diffae import EncoderBlock, SemanticEncoder
from pdae_nb.latent import MLPSkipNet
from pdae_nb.pdae import ConvEncoder, GradientEstimator, lerp_trajectories
from pdae_nb.unet import Attention, UNet, timestep_embedding

SCHED = Schedule.linear()

def u(name, n):
    "A deterministic fill, uniform in [0,1)"
    x, m = (np.arange(n, dtype=np.uint64) + zlib.crc32(name.encode())) % 2**32, np.uint64(0xFFFFFFFF)
    for _ in range(2): x = ((x ^ (x >> np.uint64(16)))*np.uint64(0x45d9f3b)) & m
    return (x ^ (x >> np.uint64(16)))/2**32

def inp(name, shape, scale): return torch.from_numpy(scale*(2*u(f'input:{name}', int(np.prod(shape))) - 1)).reshape(shape).float()

def test_the_fill_itself(): np.testing.assert_allclose(u('abc', 3), [.8334091988, .3021204264, .0728967271], atol=1e-9)

# ---- the network
def block(p, b):
    yield from (f'{p}.{k}' for k in ('in_layers.0', 'in_layers.2', 'emb_layers.1'))
    if b.norm2.z is not None: yield f'{p}.emb_z_layers.1' if b.norm2.z.out_features == 2*b.conv2.out_channels else f'{p}.cond_emb_layers.1'
    yield from (f'{p}.{k}' for k in ('out_layers.0', 'out_layers.3'))
    if isinstance(b.skip, nn.Conv2d): yield f'{p}.skip_connection'

def attention(p, m):
    if isinstance(m, Attention): yield from (f'{p}.{k}' for k in ('norm', 'qkv', 'proj_out'))

def encoder_block(p, b):
    yield from (f'{p}.in_layers.0', f'{p}.in_layers.2')
    if isinstance(b.skip, nn.Conv2d): yield f'{p}.skip_connection'

def second_half(up, p=''):
    yield from block(f'{p}middle_block.0', up.mid[0]); yield from attention(f'{p}middle_block.1', up.mid[0].attn); yield from block(f'{p}middle_block.2', up.mid[1])
    k, j = -1, 0
    for b in up.blocks:
        if b.resample: yield from block(f'{p}output_blocks.{k}.{j}', b); continue
        k += 1; j = 1 + isinstance(b.attn, Attention)
        yield from block(f'{p}output_blocks.{k}.0', b); yield from attention(f'{p}output_blocks.{k}.1', b.attn)
    yield from (f'{p}out.0', f'{p}out.2')

def official_names(net):
    "The official state-dict keys, in the order of our modules"
    if isinstance(net, GradientEstimator):
        yield from official_names(net.dpm); yield 'label_emb'; yield from second_half(net.up, 'shift_'); return
    if isinstance(net, ConvEncoder):
        for i, m in enumerate(net.body):
            if isinstance(m, Attention): yield from attention(f'encoder.{i}', m)
            elif list(m.parameters()): yield f'encoder.{i}'
        yield f'encoder.{len(net.body) + 1}'; return
    if isinstance(net, SemanticEncoder):
        blocks = [m for m in net.body if isinstance(m, EncoderBlock)]
        yield 'encoder.input_blocks.0.0'
        for i, b in enumerate(blocks[:-2], 1): yield from encoder_block(f'encoder.input_blocks.{i}.0', b); yield from attention(f'encoder.input_blocks.{i}.1', b.attn)
        yield from encoder_block('encoder.middle_block.0', blocks[-2]); yield from attention('encoder.middle_block.1', blocks[-2].attn); yield from encoder_block('encoder.middle_block.2', blocks[-1])
        yield from ('encoder.out.0', 'encoder.out.3'); return
    if isinstance(net, MLPSkipNet):
        yield from ('time_embed.0', 'time_embed.2')
        for i in range(len(net.layers)): yield from (f'layers.{i}.linear', f'layers.{i}.linear_emb', f'layers.{i}.norm')
        yield f'layers.{len(net.layers)}.linear'; return
    time = 'time_embed.time_embed' if net.config['dz'] else 'time_embed'
    yield from (f'{time}.0', f'{time}.2', 'input_blocks.0.0')
    for i, b in enumerate(net.down.blocks, 1): yield from block(f'input_blocks.{i}.0', b); yield from attention(f'input_blocks.{i}.1', b.attn)
    yield from second_half(net.up)

@torch.no_grad()
def fill(net):
    keys = [f'{n}.{s}' for n in official_names(net) for s in ('weight', 'bias')]
    state = net.state_dict()
    assert len(keys) == len(state)
    for k, v in zip(keys, state.values()):
        w, n = u(k, v.numel()), v.numel()
        w = (2*w - 1)*np.sqrt(3*len(v)/n) if v.ndim > 1 else .5 + w if k.endswith('weight') else .2*(2*w - 1)
        v.copy_(torch.from_numpy(w).reshape(v.shape))

@pytest.mark.parametrize('heads, mean, abs_mean, first, last', [
    (1, .00864899, .448099, [-.304033, -.169668, .423158, -.133011, .0911598], .173675),
    (4, .00796018, .446576, [-.233284, -.107622, .474691, -.218734, .0925067], .15607)])
def test_unet_equals_the_official_one(heads, mean, abs_mean, first, last):
    net = UNet(c=3, ch=32, mult=(1, 2, 3), size=32, attn=(16,), heads=heads).eval()
    assert sum(p.numel() for p in net.parameters()) == 2_885_827
    fill(net)
    x = inp('x', [2, 3, 32, 32], 1)
    np.testing.assert_allclose(x.flatten()[:3], [.362935, -.0195144, .438504], atol=1e-6)
    with torch.no_grad(): e = net(x, torch.tensor([7, 613]))
    np.testing.assert_allclose([e.mean(), e.abs().mean(), *e.flatten()[:5], e.flatten()[-1]], [mean, abs_mean, *first, last], atol=1e-4)

def fingerprint(x): return [x.mean(), x.abs().mean(), *x.flatten()[:5], x.flatten()[-1]]

def test_gradient_estimator_equals_the_official_one():
    G = GradientEstimator(UNet(c=3, ch=32, mult=(1, 2, 3), size=32, attn=(16,)), 16).eval(); fill(G)
    with torch.no_grad(): eps, g = G(inp('x', [2, 3, 32, 32], 1), torch.tensor([7, 613]), inp('z', [2, 16], 1.5))
    np.testing.assert_allclose(fingerprint(eps), [.00864899, .448099, -.304033, -.169668, .423158, -.133011, .0911598, .173675], atol=1e-4)
    np.testing.assert_allclose(fingerprint(g), [-.244022, .514594, .269737, .0804855, -.323166, -.190722, .196672, .235316], atol=1e-4)

@pytest.mark.parametrize('size, want', [(128, [-.0361562, .502284, .283429, -.235663, -.485897, -.0508718, .265137, -.43104]),
    (64, [-.0238055, .501968, .422983, .193701, -.467484, -.348888, -.0205151, -.206516])])
def test_encoder_equals_the_official_one(size, want):
    enc = ConvEncoder(3, size).eval(); fill(enc)
    with torch.no_grad(): z = enc(inp(f'x{size}', [1, 3, size, size], 1))
    np.testing.assert_allclose(fingerprint(z), want, atol=1e-4)

def test_diffae_equals_the_official_one():
    enc = SemanticEncoder(3, 32, (1, 2, 2), 32, 64, (16,)).eval(); unet = UNet(c=3, ch=32, mult=(1, 2), size=32, dz=64, attn=(16,), dt=64, z_shift=False).eval()
    counts = [sum(p.numel() for p in m.parameters()) for m in (enc, unet)]
    assert counts[0] == 326_432 and sum(counts) == 1_420_259
    fill(enc); fill(unet)
    x0, x, t = inp('x0', [2, 3, 32, 32], 1), inp('x', [2, 3, 32, 32], 1), torch.tensor([7, 613])
    with torch.no_grad(): z = enc(x0); own, given = unet(x, t, z), unet(x, t, inp('z', [2, 64], 1.5))
    np.testing.assert_allclose(fingerprint(z), [-.0526045, .334231, -.15551, .241757, -.401154, -.0561932, .0693927, .390651], atol=1e-4)
    np.testing.assert_allclose(fingerprint(own), [.0155462, .451765, -.1358, -.0761019, .219588, .483503, .235028, .291843], atol=1e-4)
    np.testing.assert_allclose(fingerprint(given), [.0118432, .454347, .0743938, .156425, .133836, -.00374633, -.0308769, .0984921], atol=1e-4)

def test_latent_net_equals_the_official_one():
    net = MLPSkipNet(16, 32, 4).eval(); fill(net)
    with torch.no_grad(): e = net(inp('zlat', [2, 16], 1), torch.tensor([7, 613]))
    np.testing.assert_allclose(fingerprint(e), [-.0481797, .626398, .539364, -.0566622, .407236, -1.90817, .47236, .0128114], atol=1e-4)

@pytest.mark.parametrize('kw, n', [
    (dict(c=3, ch=128, mult=(1, 1, 2, 3, 4), size=128, attn=(16,)), 98_618_499), (dict(c=3, ch=64, mult=(1, 2, 4, 8), size=64, attn=(16,)), 63_958_019),
    (dict(c=3, ch=64, mult=(1, 2, 4, 8), size=64, attn=(16,), dt=512), 67_841_539), (dict(c=3, ch=128, mult=(1, 1, 2, 2, 4, 4), size=256, attn=(16,), dt=512), 131_709_827),
    (dict(c=1, ch=64, mult=(1, 2, 2, 4), size=32), 19_404_161)])
def test_parameter_counts(kw, n):
    with torch.device('meta'): assert sum(p.numel() for p in UNet(**kw).parameters()) == n

def test_timestep_embedding():
    want = [-.925125, .0389288, .98829, .817926, -.379664, -.999242, -.152587, .575324]
    np.testing.assert_allclose(timestep_embedding(torch.tensor([613]), 8)[0], want, atol=1e-5)

# ---- the table
@pytest.mark.parametrize('t, ab, sigma, c, lam', [   # their t
    (1, .99978012, .014829293, .0067430, 5.1051e-4), (5, .99910152, .029974418, .0233177, 1.8118e-3), (10, .99780655, .04683404, .0404516, 4.0450e-3),
    (50, .96995151, .17334504, .1671140, .04253198), (100, .8951416, .32381848, .3176906, .1299368), (300, .39401111, .77845287, .7729996, .5804557),
    (500, .07779666, .96031421, .9546525, .7201784), (700, .0068682791, .99655992, .9894399, .6039361), (900, 2.7024452e-4, .99986488, .9908062, .4396125),
    (999, 4.0358296e-5, .99997979, .9899287, .3635612)])
def test_schedule_values(t, ab, sigma, c, lam):
    t = torch.tensor([t + 1]); one = torch.ones(1, dtype=torch.float64); r = snr(SCHED, t)
    got = [SCHED(t), (1 - SCHED(t)).sqrt(), -shift_to_eps(SCHED, t, one), (1/(1 + r))**.9*(r/(1 + r))**.1]
    np.testing.assert_allclose(torch.stack(got).flatten(), [ab, sigma, c, lam], rtol=2e-5)

# ---- the samplers, on toy decoders
XS, Z = inp('xs', [2, 3, 4, 4], 1.2), inp('z', [2, 16], 1.5)
ZM = Z.mean(1)[:, None, None, None]
theirs = lambda t: ((t - 1)/1000).reshape(-1, 1, 1, 1)

def pdae_toy(steps, p=0.):
    "eps + sqrt(1-ab)·G as published, without G in the last p of the steps"
    rank, stop = {t: i for i, t in enumerate(pdae_times(steps)[::-1])}, int(p*steps)
    def denoiser(x, t):
        shift = score_to_eps(SCHED, t, .2*x - .05*ZM) if p == 0 or rank[int(t[0])] - 1 >= stop else 0
        return .8*x + .1*theirs(t) + shift
    return denoiser

def numbers(x): return [x.mean(), *x.flatten()[:3], x.flatten()[-1]]

@pytest.mark.parametrize('steps, encode, decode, decode_p3', [
    (10, [.00838304, .233989, -.235311, -.214885, .119643], [-.140313, .242573, -.79074, -.773309, -.304018], [-.127787, .211761, -.687616, -.672444, -.267452]),
    (20, [.0134896, .237119, -.217846, -.195671, .130237], [-.133458, .264726, -.777684, -.760424, -.275891], [-.123007, .237108, -.692783, -.677385, -.248139])])
def test_pdae_sampler(steps, encode, decode, decode_p3):
    times = pdae_times(steps)
    *_, (_, up, _) = trajectory(pdae_toy(steps), XS.clamp(-1, 1), SCHED, times[::-1], clip=1.)
    np.testing.assert_allclose(numbers(up), encode, atol=1e-4)
    np.testing.assert_allclose(numbers(sample(pdae_toy(steps), XS, SCHED, times, clip=1.)), decode, atol=1e-4)
    np.testing.assert_allclose(numbers(sample(pdae_toy(steps, .3), XS, SCHED, times, clip=1.)), decode_p3, atol=1e-4)

@pytest.mark.parametrize('steps, encode, decode', [
    (10, [.0235115, .351809, -.387197, -.360067, .152681], [-.150022, .0621373, -.587898, -.57184, -.211054]),
    (20, [.0297888, .364434, -.382935, -.355559, .171342], [-.144139, .0774675, -.589475, -.572044, -.195182])])
def test_diffae_sampler(steps, encode, decode):
    toy = lambda x, t: .8*x + .1*theirs(t) - .05*ZM
    to_noise = Schedule(torch.cat([SCHED.beta, torch.ones(1, dtype=torch.float64)]))   # they land on alpha_bar = 0
    up = [t for t in diffae_times(steps)[::-1] if t] + [to_noise.T]
    *_, (_, xT, _) = trajectory(toy, XS.clamp(-1, 1), to_noise, up, clip=1.)
    np.testing.assert_allclose(numbers(xT), encode, atol=1e-4)
    np.testing.assert_allclose(numbers(sample(toy, XS, SCHED, diffae_times(steps), clip=1.)), decode, atol=1e-4)

def test_training_losses():
    x0, eps, t = XS.clamp(-1, 1), inp('eps', [2, 3, 4, 4], 1.7), torch.tensor([8, 614])
    pdae = lambda x, t: .8*x + .1*theirs(t) + shift_to_eps(SCHED, t, .2*x - .05*ZM)
    lam = lambda sched, t: (1/(1 + snr(sched, t)))**.9*(snr(sched, t)/(1 + snr(sched, t)))**.1
    np.testing.assert_allclose(denoising_loss(pdae, x0, SCHED, t=t, eps=eps), .6610449, atol=1e-5)
    np.testing.assert_allclose(denoising_loss(pdae, x0, SCHED, lam, t=t, eps=eps), .0621293, atol=1e-5)
    diffae = lambda x, t: .8*x + .1*theirs(t) - .05*ZM
    np.testing.assert_allclose(denoising_loss(diffae, x0, SCHED, t=t, eps=eps, reduce=None), [1.1448798, .0574673], atol=1e-5)

# ---- the paper-era sampler of PDAE, and its trajectory interpolation
def pdae_era_toy(steps, p=0.):
    "As `pdae_toy`, on the stride grid; the stage without G counts from the clean end"
    rank, stop = {t: i for i, t in enumerate(t for t in diffae_times(steps)[::-1] if t)}, int(p*steps)
    return lambda x, t: .8*x + .1*theirs(t) + (score_to_eps(SCHED, t, .2*x - .05*ZM) if rank[int(t[0])] >= stop else 0)

@pytest.mark.parametrize('steps, encode, decode, decode_p3', [
    (10, [.010275, .234663, -.228793, -.208413, .125909], [-.134221, .277209, -.776964, -.759629, -.288465], [-.126456, .25824, -.720892, -.704791, -.269142]),
    (20, [.0156486, .240802, -.211487, -.189362, .136634], [-.130442, .277816, -.76857, -.751408, -.268098], [-.122095, .256504, -.706169, -.690379, -.247978])])
def test_pdae_sampler_of_the_paper(steps, encode, decode, decode_p3):
    to_noise = Schedule(torch.cat([SCHED.beta, torch.ones(1, dtype=torch.float64)]))   # they land on alpha_bar = 0
    up = [t for t in diffae_times(steps)[::-1] if t] + [to_noise.T]
    *_, (_, xT, _) = trajectory(pdae_era_toy(steps), XS.clamp(-1, 1), to_noise, up, clip=1.)
    np.testing.assert_allclose(numbers(xT), encode, atol=1e-4)
    for p, want in ((0., decode), (.3, decode_p3)): np.testing.assert_allclose(numbers(sample(pdae_era_toy(steps, p), XS, SCHED, diffae_times(steps), clip=1.)), want, atol=1e-4)

def test_trajectory_interpolation():
    class Toy:
        dpm = type('D', (), dict(up=staticmethod(lambda x, t: .8*x + .1*theirs(t)), __call__=lambda self, x, t: .8*x + .1*theirs(t)))()
        def shared(self, xt, t): return xt, t
        def score(self, x, t, z): return .2*x - .05*z.mean(1)[:, None, None, None]
    f = lerp_trajectories(Toy(), Z, inp('z2', [2, 16], 1.5), .3, SCHED, score_to_eps)
    np.testing.assert_allclose(numbers(sample(f, XS, SCHED, pdae_times(10), clip=1.)), [-.139037, .252312, -.790194, -.772763, -.302062], atol=1e-4)
