"""Bytes that a training step moves, counted on meta tensors."""

import pytest
import torch
import torch.nn.functional as F

from pdae_nb.recipes import recipe
from pdae_nb.traffic import bytes_per_image_step, step_traffic, traffic_of

PAPER = dict(c=3, size=64) | recipe('celeba64_dpm', 'paper').net | dict(drop=0.0)
TINY = dict(c=1, size=8, ch=8, mult=(1, 2), n_res=1)


def test_a_step_at_the_papers_geometry_moves_few_bytes():
    "CelebA-64, 128 images, attention as one operation, without dropout."
    counted = bytes_per_image_step(PAPER, z_dim=512)
    assert counted['dpm']['bf16'] <= 510e6
    assert counted['pdae']['bf16'] <= 630e6
    assert counted['dpm']['float32'] > 950e6
    assert counted['pdae']['update'] < counted['dpm']['update'] == 63_958_019 * 52 // 128


def test_bytes_of_one_layer():
    "A convolution reads x, weight and bias and writes y; its backward reads and writes their like."
    conv = torch.nn.Conv2d(2, 3, 1, device='meta')
    x = torch.empty(4, 2, 5, 5, device='meta', requires_grad=True)
    traffic = traffic_of(lambda: conv(x).square().sum())
    numbers = dict(x=4 * 2 * 25, weight=6, bias=3, y=4 * 3 * 25)
    forward = 4 * sum(numbers.values())
    backward = 4 * (numbers['y'] + 2 * (numbers['x'] + numbers['weight']) + numbers['bias'])
    assert traffic.bytes['convolution'] == forward
    assert traffic.bytes['convolution_backward'] == backward
    assert traffic.calls['convolution'] == 1


def test_expanded_tensors_and_new_tensors_are_not_counted_in_full():
    x = torch.empty(10, device='meta', requires_grad=True)
    wide = torch.empty(10, 100, device='meta')

    def loss():
        torch.empty_like(wide)
        return (wide + x[:, None].expand(10, 100)).square().sum()

    traffic = traffic_of(loss)
    assert traffic.bytes['add'] == 4 * (1000 + 10 + 1000)
    assert 'empty_like' not in traffic.bytes


@pytest.mark.parametrize('p, is_training, calls', [(0.1, True, 1), (0.1, False, 0), (0.0, True, 0)])
def test_dropout_is_one_operation_where_it_acts(p, is_training, calls):
    x = torch.empty(100, device='meta', requires_grad=True)
    traffic = traffic_of(lambda: F.dropout(x, p, is_training).sum())
    assert traffic.calls['dropout'] == traffic.calls['dropout_backward'] == calls


def test_the_count_depends_on_dtype_and_batch_as_it_should():
    def total(dtype, batch):
        return step_traffic(TINY, dtype=dtype, batch=batch).total

    in_bf16 = total(torch.bfloat16, 64)
    in_float32 = total(torch.float32, 64)
    assert 0.5 < in_bf16 / in_float32 < 0.7
    features = total(torch.float32, 128) - in_float32
    assert in_float32 < 2 * features, 'twice the images, less than twice the bytes'
    assert features == total(torch.float32, 192) - total(torch.float32, 128)
