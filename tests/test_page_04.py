"""The U-Net: what page 4 of the course does not show, such as errors and odd inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pdae_nb.layers import GroupNorm, norm
from pdae_nb.unet import AdaGN, Attention, Block, Down, HalfUNet, UNet, Up, timestep_embedding

SHAPE = dict(ch=32, mult=(1, 2, 3), size=28, n_res=1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def net():
    "A U-Net whose output is not zero."
    unet = UNet(c=1, **SHAPE)
    nn.init.normal_(unet.up.out[2].weight)
    return unet


XT = torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)
T = torch.tensor([7, 613])


# ---------------------------------------------------------------- layers


def test_embedding_of_an_odd_width_ends_with_zero():
    assert timestep_embedding(torch.tensor([613]), 9)[0, 8] == 0


def test_embeddings_of_all_timesteps_differ():
    psi = timestep_embedding(torch.arange(1001), 64).double()
    torch.testing.assert_close(psi[200] @ psi[230], psi[800] @ psi[830], rtol=0, atol=1e-3)
    assert (psi @ psi.T).triu(1).max() < 31.95 < psi[500] @ psi[500]


def test_embedding_wants_a_vector():
    with pytest.raises(ValueError, match=r'vector of times \(B,\), got shape \(2, 1\)'):
        timestep_embedding(torch.zeros(2, 1), 8)


def test_groups_of_a_norm():
    assert [norm(c).num_groups for c in (8, 48, 64, 384)] == [8, 16, 32, 32]  # gcd(32,c)


def test_adagn_of_two_values():
    "A channel of ±1, with scale 0.5 and shift 0.1 by t, then scale 1 and shift -0.2 by z."
    layer = AdaGN(1, dt=3, dz=2)
    for linear, output in ((layer.t, [0.5, 0.1]), (layer.z, [1.0, -0.2])):
        nn.init.zeros_(linear.weight)
        linear.bias.data = torch.tensor(output)
    h = torch.tensor([[[[-5.0, 9.0]]]])  # normalised to -1 and 1
    values = layer(h, torch.zeros(1, 3), torch.zeros(1, 2)).flatten()
    torch.testing.assert_close(values, torch.tensor([-3.0, 3.0]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r'conditioned on a code z \(B,2\), got None'):
        layer(h, torch.zeros(1, 3))


@pytest.mark.parametrize('z_shift', [False, True])
def test_adagn_is_the_equation_of_both_papers(z_shift):
    h = torch.randn(2, 6, 4, 4) * 7 + 40
    t, z = 3 * torch.randn(2, 5), 3 * torch.randn(2, 4)
    layer = AdaGN(6, 5, 4, z_shift, groups=3)
    t_scale, t_b = layer.t(F.silu(t))[..., None, None].split(6, 1)
    z_scale, *rest = layer.z(F.silu(z))[..., None, None].split(6, 1)
    z_b = rest[0] if z_shift else 0
    normalised = GroupNorm(3, 6)(h)
    expected = (1 + z_scale) * ((1 + t_scale) * normalised + t_b) + z_b
    torch.testing.assert_close(layer(h, t, z), expected, rtol=0, atol=1e-4)


def test_resampling_has_a_name():
    with pytest.raises(ValueError, match="'down' or 'up', got 'half'"):
        Block(1, 1, 4, resample='half')


def test_heads_of_attention():
    assert Attention(8, head_channels=4).heads == 2
    with pytest.raises(ValueError, match='8 channels cannot be shared by 3 heads'):
        Attention(8, heads=3)
    with pytest.raises(ValueError, match='heads of 3 channels'):
        Attention(8, head_channels=3)


def attend(layer, x, qkv):
    "Attention head by head, for one image; qkv is (heads,3,d,H·W)."
    heads = [v @ (q.T @ k / len(q) ** 0.5).softmax(-1).T for q, k, v in qkv]
    return x + layer.out(torch.cat(heads).reshape(x.shape))


def test_the_order_of_channels_in_attention():
    "Heads outside, q, k, v inside. A permutation of rows converts the other order."
    layer = Attention(8, heads=2, groups=2)
    nn.init.normal_(layer.out.weight)
    x = torch.randn(1, 8, 4, 4)
    qkv = layer.qkv(layer.norm(x))
    ours = attend(layer, x, qkv.reshape(2, 3, 4, 16))
    torch.testing.assert_close(layer(x), ours, rtol=0, atol=1e-5)
    other = attend(layer, x, qkv.reshape(3, 2, 4, 16).transpose(0, 1))
    assert (other - ours).abs().max() > 0.1
    order = torch.arange(24).reshape(3, 2, 4).transpose(0, 1).flatten()
    converted = attend(layer, x, qkv.flatten(2)[0, order].reshape(2, 3, 4, 16))
    torch.testing.assert_close(converted, other, rtol=0, atol=1e-6)


def gradient_of_gradient(layer, x, layout):
    x = x.contiguous(memory_format=layout).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    return second


def test_attention_with_second_derivatives():
    layer = Attention(8, heads=2, groups=2)
    nn.init.normal_(layer.out.weight)
    twice = Attention(8, heads=2, groups=2, twice=True)
    twice.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8, 4, 4)
    by_rows = gradient_of_gradient(twice, x, torch.contiguous_format)
    by_channels = gradient_of_gradient(twice, x, torch.channels_last)
    torch.testing.assert_close(by_channels, by_rows, rtol=0, atol=1e-2)
    with pytest.raises(RuntimeError, match='not implemented'):
        gradient_of_gradient(layer, x, torch.channels_last)


# ---------------------------------------------------------------- the network


def test_feature_maps_of_both_halves():
    down = Down(c=1, dt=16, **SHAPE)
    maps = down(XT[:1], torch.zeros(1, 16))
    sizes = [(h.shape[1], h.shape[2]) for h in maps]
    assert sizes == [(32, 28), (32, 28), (32, 14), (64, 14), (64, 7), (96, 7)]
    up = Up(c=1, dt=16, chs=down.chs, **SHAPE)
    assert len(up.mid) + len(up.blocks) == 2 + 3 * 2 + 2
    assert torch.equal(up(maps, torch.zeros(1, 16)), torch.zeros(1, 1, 28, 28))
    with pytest.raises(ValueError, match='divisible by 8, got 28'):
        Down(c=1, dt=16, ch=32, mult=(1, 2, 2, 4), size=28)


def test_half_a_unet():
    half = HalfUNet(1, **SHAPE)
    assert half.deepest(XT[:1], torch.tensor([3])).shape == (1, 96, 7, 7)
    assert half.embed(torch.tensor([3])).shape == (1, 128)
    with pytest.raises(ValueError, match=r'images \(B,1,28,28\), got \(1, 1, 28, 26\)'):
        half.deepest(XT[:1, ..., 2:], torch.tensor([3]))


def test_a_new_network_predicts_zero():
    noise = torch.randn(64, 1, 28, 28)
    eps = UNet(c=1, **SHAPE)(noise, T[:1])
    assert not eps.any()
    assert abs((eps - noise).square().mean() - 1) < 0.02


def test_lag_is_subtracted_from_t(net):
    late = UNet(c=1, lag=1, **SHAPE)
    late.load_state_dict(net.state_dict())
    assert torch.equal(late(XT, T + 1), net(XT, T))
    assert late.geometry == net.geometry


def test_errors_of_the_network(net):
    with pytest.raises(ValueError, match=r'images \(B,1,28,28\), got \(2, 1, 28, 26\)'):
        net(XT[..., 2:], T)
    with pytest.raises(ValueError, match=r'\(B,1,28,28\), got \(2, 3, 28, 28\)'):
        net(XT.expand(-1, 3, -1, -1), T)
    with pytest.raises(TypeError, match='xt must be float'):
        net(XT.long(), T)
    with pytest.raises(ValueError, match=r't of shape \(3,\) for a batch of 2'):
        net(XT, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r'without one \(dz=0\)'):
        net(XT, T, torch.zeros(2, 4))
    with_z = UNet(c=1, dz=4, **SHAPE)
    with pytest.raises(ValueError, match=r'conditioned on a code z \(B,4\), got None'):
        with_z(XT, T)
    with pytest.raises(ValueError, match=r'a code z \(2,4\), got \(2, 5\)'):
        with_z(XT, T, torch.zeros(2, 5))


@pytest.mark.slow
def test_one_graph_is_compiled():
    net = UNet(c=3, ch=8, mult=(1, 2), size=32, n_res=1)
    compiled = torch.compile(net, backend='eager', fullgraph=True)
    xt = torch.randn(2, 3, 32, 32)
    assert compiled(xt, T).shape == xt.shape
    torch.compiler.reset()
