"""Guidance by classifiers: a model, its network, any network of logits, a mixture."""

import pytest
import torch
from torch import nn

from pdae_nb.denoise import GaussianMixture
from pdae_nb.forward import Schedule
from pdae_nb.methods.classifier import (
    EvalClassifier,
    EvalClassifierNet,
    NoisyClassifier,
    NoisyClassifierNet,
    classifier_accuracy,
    classifier_guided,
    classifier_loss,
    log_probability,
)
from pdae_nb.model import Draw
from pdae_nb.sampling import sample
from pdae_nb.unet import UNet

SCHED = Schedule.linear()
TINY = dict(ch=8, mult=(1, 2), n_res=1, size=8, groups=8)
Y = torch.tensor([3, 0, 7, 9])
T = torch.tensor([1, 250, 600, 1000])


class Linear(nn.Module):
    "A network of logits without `log_p` and without `config`: the logits are W·x_t·(1 + t/1000)."

    def __init__(self, classes=10):
        super().__init__()
        self.w = nn.Linear(64, classes)

    def forward(self, xt, t):
        return self.w(xt.flatten(1)) * (1 + t / 1000)[:, None]


def rand(*shape, seed=0):
    "Standard normal numbers."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def xt():
    return rand(4, 1, 8, 8)


@pytest.fixture
def dpm():
    torch.manual_seed(0)
    net = UNet(**TINY).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(std=0.2)
    return net


@pytest.fixture
def linear():
    torch.manual_seed(1)
    return Linear().requires_grad_(False)


@pytest.fixture
def model():
    torch.manual_seed(2)
    net = NoisyClassifierNet(**TINY).eval().requires_grad_(False)
    return NoisyClassifier(net, SCHED, (1, 8, 8))


def test_guidance_by_a_plain_network_is_the_closed_form(dpm, linear, xt):
    # ∇ log softmax_y = (1 + t/1000)·(w_y - Σ_k p_k w_k)
    w = linear.w.weight
    p = linear(xt, T).softmax(1)
    score = (1 + T / 1000)[:, None] * (w[Y] - p @ w)
    size = (1 - SCHED.alpha_bar[T]).sqrt().float()
    want = dpm(xt, T) - 2 * size[:, None, None, None] * score.view_as(xt)
    with torch.no_grad():
        got = classifier_guided(dpm, linear, Y, SCHED, scale=2.0)(xt, T)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, dpm(xt, T), atol=1e-3)


@pytest.mark.parametrize('y', [3, [3, 0, 7, 9], Y])
def test_model_network_and_function_of_logits_guide_alike(dpm, model, xt, y):
    with torch.no_grad():
        want = classifier_guided(dpm, model.net, y, SCHED)(xt, T)
        for clf in (model, model.net.forward, lambda x, t: model.net(x, t)):
            assert torch.equal(classifier_guided(dpm, clf, y, SCHED)(xt, T), want)
    assert not torch.equal(want, dpm(xt, T))


def test_a_mixture_is_its_own_classifier():
    blobs = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]).double(), 0.3, SCHED)
    points = rand(4, 2).double()
    y = torch.tensor([0, 1, 1, 0])
    want = blobs(points, T, y)
    for clf in (blobs, lambda x, t: blobs.log_p(x, t)):
        got = classifier_guided(blobs, clf, y, SCHED)(points, T)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_samples_are_guided_by_a_plain_network(dpm, linear):
    xT = rand(4, 1, 8, 8, seed=1)
    with torch.inference_mode():
        plain = sample(dpm, xT, SCHED, 5, clip=1.0)
        asked = sample(classifier_guided(dpm, linear, Y, SCHED, scale=5.0), xT, SCHED, 5, clip=1.0)
    zero = torch.zeros(4, dtype=torch.long)
    rise = log_probability(linear, asked, zero, Y) - log_probability(linear, plain, zero, Y)
    assert (rise > 0).all()


def test_labels_that_are_no_classes_are_refused(dpm, linear, model, xt):
    for clf in (model, model.net):  # the number of classes is known before the first step
        with pytest.raises(ValueError, match='labels must be in 0…9, got 10'):
            classifier_guided(dpm, clf, 10, SCHED)
    with pytest.raises(ValueError, match='labels must be in 0…9, got 10'):
        classifier_guided(dpm, linear, 10, SCHED)(xt, T)
    with pytest.raises(ValueError, match='expected 4 labels'):
        classifier_guided(dpm, linear, [1, 2], SCHED)(xt, T)


def test_images_of_other_sizes_are_refused(dpm):
    net = NoisyClassifierNet(**TINY | dict(size=16))
    for clf in (net, NoisyClassifier(net, SCHED, (1, 16, 16))):
        with pytest.raises(ValueError, match=r'\(1, 8\), the classifier was built for \(1, 16\)'):
            classifier_guided(dpm, clf, 3, SCHED)


def test_log_probabilities_of_a_plain_network(linear, xt):
    every = log_probability(linear, xt, T)
    torch.testing.assert_close(every, linear(xt, T).log_softmax(1))
    assert torch.equal(log_probability(linear, xt, T, Y), every[range(4), Y])
    assert torch.equal(log_probability(linear, xt, T, torch.tensor([5])), every[:, 5])


def test_a_classifier_model_takes_a_plain_network(linear, xt):
    model = NoisyClassifier(linear, SCHED, (1, 8, 8))
    want = nn.functional.cross_entropy(linear(xt, T), Y, reduction='none')
    torch.testing.assert_close(-model.log_p(xt, T, Y), want)
    loss, t = model(xt, Y, Draw(0, 0, 4))
    draw = Draw(0, 0, 4)
    assert torch.equal(t, draw.times(SCHED))
    eps = draw.normal(1, 8, 8)
    again = classifier_loss(linear, xt, Y, SCHED, t=t, eps=eps, reduce=None)
    assert torch.equal(loss, again)
    assert torch.equal(
        classifier_accuracy(model, xt, Y, SCHED, [0, 500]),
        classifier_accuracy(linear, xt, Y, SCHED, [0, 500]),
    )


def test_probabilities_of_the_evaluation_classifier():
    torch.manual_seed(0)
    model = EvalClassifier(EvalClassifierNet(ch=4).eval(), (1, 8, 8))
    x = rand(501, 1, 8, 8)
    p = model.probabilities(x)
    assert not p.requires_grad
    torch.testing.assert_close(p.sum(1), torch.ones(501))
    torch.testing.assert_close(p[-1:], model.net(x[-1:]).softmax(1))
    result = model.test_result(x, p.argmax(1))
    assert result.test_accuracy == 1
    assert result.test_images == 501
    assert model.test_result(x, (p.argmax(1) + 1) % 10).test_accuracy == 0
