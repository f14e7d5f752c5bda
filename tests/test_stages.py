"""The value of a label: conditional DPM, noisy classifier, and the grid of guidance windows."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.nn.functional as F

from pdae_nb.curves import band, plot_gap
from pdae_nb.data import load_images
from pdae_nb.experiments.critical_stage import shortest_window, stage_grid, unpack_cells
from pdae_nb.files import find_results, load_results, results_path
from pdae_nb.forward import Schedule
from pdae_nb.gap import FIG1_TIMES
from pdae_nb.hub import load
from pdae_nb.layers import Arithmetic, computing_in
from pdae_nb.learning_curves import plot_training
from pdae_nb.methods.classifier import NoisyClassifierNet, classifier_guided, classifier_loss
from pdae_nb.methods.dpm import DPM, ClassConditionalDPM, LabelUNet
from pdae_nb.model import Draw, model_fingerprint
from pdae_nb.recipes import recipe
from pdae_nb.unet import UNet
from pdae_nb.weighting import stage_share, w_pdae

matplotlib.use('Agg')

ROOT = Path(__file__).parent.parent
SCHED = Schedule.linear()
TINY = dict(c=1, size=8, ch=8, mult=(1, 2), n_res=1)


def with_random_weights(net):
    "The network with random weights, also in its zero-initialised layers."
    torch.manual_seed(1)
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return net


def zero_noise(xt, t):
    "A denoiser that predicts zero, so that a guided denoiser returns the guidance term."
    return torch.zeros_like(xt)


# Conditional DPM and noisy classifier


def built(r):
    "The untrained model of a recipe, at seed 0."
    torch.manual_seed(0)
    return r.method.build(r, load_images(r.data, 'train', r.px))


def first_step(model, x0, y):
    "Losses of a training step at seed 5."
    losses, _ = model.loss(x0, y, Draw(5, 0, len(x0)))
    return losses


def test_conditional_dpm_begins_as_the_unconditional_one():
    "Equal weights but for the labels', and equal first losses: these weights start at zero."
    for size in ('smoke', 'lesson'):
        r = recipe('mnist_cdpm', size)
        assert r.method is ClassConditionalDPM
        assert replace(r, method=DPM) == recipe('mnist_dpm', size)
    unconditional = built(recipe('mnist_dpm', 'smoke'))
    conditional = built(recipe('mnist_cdpm', 'smoke'))
    a = unconditional.net.state_dict()
    b = conditional.net.state_dict()
    assert set(b) - set(a) == {'label.weight'}
    assert all(torch.equal(a[k], b[k]) for k in a)
    x0 = torch.rand(8, 1, 28, 28) * 2 - 1
    y = torch.arange(8)
    assert torch.equal(first_step(unconditional, x0, y), first_step(conditional, x0, y))


def test_label_changes_every_pixel():
    net = with_random_weights(LabelUNet(10, **TINY))
    x = torch.randn(2, 1, 8, 8)
    t = torch.tensor([5, 900])
    ones = net(x, t, torch.tensor([1, 1]))
    twos = net(x, t, torch.tensor([2, 2]))
    assert (ones != twos).all()
    assert torch.equal(net(x, t, torch.tensor([1])), ones), 'one label is used for all images'


@pytest.mark.parametrize(
    'y, error, words',
    [
        (10, ValueError, 'labels must be in 0…9, got 10'),
        (-1, ValueError, 'got -1'),
        ([1, 2, 3], ValueError, 'expected 2 labels'),
        ([1.0, 2.0], TypeError, 'integers'),
        ([[1, 2]], ValueError, 'shape'),
    ],
)
def test_errors_of_wrong_labels(y, error, words):
    net = LabelUNet(10, **TINY)
    clf = NoisyClassifierNet(**TINY)
    x = torch.randn(2, 1, 8, 8)
    t = torch.tensor([5, 900])
    with pytest.raises(error, match=words):
        net(x, t, torch.as_tensor(y))
    with pytest.raises(error, match=words):
        clf.log_p(x, t, torch.as_tensor(y))


@pytest.mark.parametrize('window', [(700, 400), (400, 400), (-1, 400), (400, 1001)])
def test_errors_of_wrong_windows(window):
    net = UNet(**TINY)
    clf = NoisyClassifierNet(**TINY)
    with pytest.raises(ValueError, match=r'0 <= t1 < t2 <= 1000'):
        classifier_guided(net, clf, 3, SCHED, window=window)
    with pytest.raises(ValueError, match=r'0 <= t1 < t2 <= 1000'):
        stage_share(w_pdae, SCHED, window)


def test_classifier_of_another_image_size_is_an_error():
    larger = NoisyClassifierNet(**TINY | dict(size=16))
    with pytest.raises(ValueError, match='16'):
        classifier_guided(UNet(**TINY), larger, 3, SCHED)
    with pytest.raises(ValueError, match='built for images'):
        NoisyClassifierNet(**TINY)(torch.randn(2, 1, 16, 16), torch.tensor([1, 2]))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_guidance_in_bf16_is_close_to_float64(dtype):
    "The relative error is small, and smaller than the effect of another label."
    clf = with_random_weights(NoisyClassifierNet(**TINY))
    x = torch.randn(4, 1, 8, 8)
    t = torch.tensor([1, 100, 500, 1000])
    y = torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        want = classifier_guided(zero_noise, clf.double(), y, SCHED)(x.double(), t)
        other = classifier_guided(zero_noise, clf.double(), y + 1, SCHED)(x.double(), t)
        with computing_in([clf.float()], Arithmetic(dtype)):
            got = classifier_guided(zero_noise, clf, y, SCHED)(x, t)
    assert got.dtype == torch.float32
    assert want.norm() > 0

    def relative_error(a):
        return (a.double() - want).norm() / want.norm()

    bound = 1e-4 if dtype == torch.float32 else 0.1
    assert relative_error(got) < bound < relative_error(other)


@pytest.mark.slow
def test_compiled_classifier_equals_the_plain_one():
    "Loss, gradients of the weights, and the gradient with respect to the image for guidance."
    clf = with_random_weights(NoisyClassifierNet(**TINY))
    x0 = torch.randn(4, 1, 8, 8)
    y = torch.tensor([1, 2, 3, 4])
    t = torch.tensor([1, 100, 500, 1000])
    eps = torch.randn(4, 1, 8, 8)

    def measure():
        clf.zero_grad()
        loss = classifier_loss(clf, x0, y, SCHED, t=t, eps=eps)
        loss.backward()
        with torch.no_grad():
            guidance = classifier_guided(zero_noise, clf, y, SCHED)(x0, t)
        grads = [p.grad.clone() for p in clf.parameters() if p.grad is not None]
        return [loss.detach(), guidance, *grads]

    plain = measure()
    clf.compile(backend='aot_eager')
    compiled = measure()
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# The file of a grid of windows

PROGRAM = """
import sys
import time

import torch

from pdae_nb.denoise import GaussianMixture
from pdae_nb.experiments.critical_stage import stage_grid
from pdae_nb.forward import Schedule

path, pause = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
sched = Schedule.linear()
mu = torch.tensor([[0.8, 0.6], [-0.9, 0.3], [0.1, -1.0]], dtype=torch.float64)
mixture = GaussianMixture(mu, 0.15, sched)
calls = []


def eval_classifier(x):
    calls.append(len(x))
    time.sleep(float(pause))
    return -torch.cdist(x, mu)


xT = torch.randn(30, 2, dtype=torch.float64)
y = torch.arange(30) % 3
settings = dict(step=100, eta=1.0, clip=None, path=path)
stage_grid(mixture, mixture, eval_classifier, xT, y, sched, **settings)
print(len(calls))
"""


def start(path, pause):
    "Start PROGRAM, which writes a grid to `path` and pauses for some seconds before each cell."
    command = [sys.executable, '-c', PROGRAM, str(path), str(pause)]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def computed_cells(path):
    "Run PROGRAM to its end; return the number of cells that it has computed."
    process = start(path, 0)
    printed, _ = process.communicate()
    assert process.returncode == 0
    return int(printed)


def unfinished(path):
    "The file that keeps the parts of a measurement until it is finished."
    return path.with_name(f'{path.stem}.part.json')


def cells_of(path):
    "The packed cells of a grid, finished or not; none if there is no file."
    for file in (unfinished(path), path):
        if file.exists():
            return json.loads(file.read_text(encoding='utf-8'))['cells']
    return {}


@pytest.mark.slow
def test_killed_grid_is_continued(tmp_path):
    "After SIGKILL, the next call keeps the finished cells and ends with the same bits."
    killed = tmp_path / 'killed.json'
    whole = tmp_path / 'whole.json'
    process = start(killed, 0.05)
    end = time.time() + 120
    while len(cells_of(killed)) < 5 and time.time() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = cells_of(killed)
    assert 5 <= len(kept) < 56
    assert not killed.exists(), 'the file is there only when it is complete'
    assert computed_cells(killed) == 56 - len(kept)
    assert computed_cells(whole) == 56
    assert cells_of(killed) == cells_of(whole)
    assert len(cells_of(whole)) == 56
    assert not unfinished(killed).exists()
    assert json.loads(killed.read_text(encoding='utf-8'))['shortest']['samples'] == 30


class SquaredNorm:
    "In the place of a noisy classifier: log p is minus the squared norm, whatever the class."

    def log_p(self, xt, t, y):
        return -xt.square().sum(1)


def test_nan_is_an_error_and_no_cell(tmp_path):
    "A denoiser that returns NaN in the last step leaves no file behind."

    def broken(xt, t):
        value = torch.nan if t[0] <= 250 else 0.0
        return torch.full_like(xt, value)

    def eval_classifier(x):
        return F.one_hot(torch.zeros(len(x), dtype=torch.int64), 3).float()

    path = tmp_path / 'g.json'
    xT = torch.randn(6, 2)
    y = torch.arange(6) % 3
    with pytest.raises(ValueError, match='NaN'):
        stage_grid(broken, SquaredNorm(), eval_classifier, xT, y, SCHED, step=250, path=path)
    assert not path.exists()
    assert not unfinished(path).exists()


DAMAGED = [
    '',
    '{',
    '[]',
    '{"about": {}}',
    '{"about": {"samples": 6}, "seconds": 1, "cells": {"0-250": "zz"}}',
]


@pytest.mark.parametrize('text', DAMAGED)
def test_damaged_file_of_a_grid_is_an_error(tmp_path, text):
    path = tmp_path / 'g.json'
    path.write_text(text)
    xT = torch.randn(6, 2)
    y = torch.arange(6) % 3
    with pytest.raises(ValueError, match='g.json holds no stage grid'):
        stage_grid(None, None, None, xT, y, SCHED, step=250, path=path)
    assert path.read_text() == text, 'the file is unchanged'


# Confidence intervals and held-out samples


@pytest.mark.parametrize('n, level', [(2, 0.95), (5, 0.95), (5, 0.5), (40, 0.99)])
def test_coverage_of_the_band_is_its_level(n, level):
    "Within 4 standard errors, over 20,000 intervals of n normal values."
    intervals = 20_000
    generator = torch.Generator().manual_seed(n)
    v = torch.randn(n, intervals, generator=generator, dtype=torch.float64) + 7
    mean, half = band(v, level)
    torch.testing.assert_close(mean, v.mean(0))
    covered = ((mean - 7).abs() <= half).double().mean()
    error = (level * (1 - level) / intervals) ** 0.5
    assert abs(covered - level) < 4 * error


def test_single_repeat_has_no_band():
    mean, half = band([[1.0, 2.0]])
    assert mean.tolist() == [1, 2]
    assert half.isnan().all()
    ax = plot_gap({'one': [1.0, 2.0]}, [1, 2])
    assert list(ax.lines[0].get_ydata()) == [1, 2]
    assert ax.get_ylim()[0] > 0


def y_data(line):
    "The values of a plotted line: float64."
    return torch.as_tensor(line.get_ydata()).double()


def test_plotted_training_of_a_pair():
    "The middle panel has the mean paired difference, the right one the ratio in each quarter."
    n = 40
    window = n // 10
    loss = 1 + torch.linspace(0, 1, n, dtype=torch.float64)
    ratios = torch.tensor([0.5, 0.6, 0.7, 0.8], dtype=torch.float64)
    unconditional = loss[:, None].expand(n, 4)
    conditional = unconditional * ratios
    d = dict(
        seen=[3200 * (i + 1) for i in range(n)],
        unconditional=unconditional[:, 0].tolist(),
        conditional=conditional[:, 0].tolist(),
        quarters=dict(unconditional=unconditional.tolist(), conditional=conditional.tolist()),
    )
    _, middle, right = plot_training(d).axes
    difference = (unconditional - conditional)[:, 0]
    torch.testing.assert_close(y_data(middle.lines[0]), difference.unfold(0, window, 1).mean(-1))
    assert middle.lines[0].get_xdata()[0] == pytest.approx(8.0)
    assert len(right.lines) >= 4
    for line, ratio in zip(right.lines[:4], ratios, strict=True):
        assert (y_data(line) - ratio).abs().max() < 1e-12


def cells_with_equal_windows(n, generator):
    "Random cells: 20 windows of equal length and accuracy 0.9, none (0.1) and everywhere (0.97)."

    def hits(p):
        return torch.rand(n, generator=generator) < p

    cells = {(0, 0): hits(0.1), (0, 1000): hits(0.97)}
    for t in range(0, 1000, 50):
        cells[t, t + 50] = hits(0.9)
    return cells


@pytest.mark.parametrize('n', [60, 200])
def test_held_out_accuracy_is_unbiased(n):
    """Of 20 equally good windows, the best one has too high an accuracy on the samples themselves.

    On the samples that did not take part in its selection, the accuracy is right on average.
    """
    generator = torch.Generator().manual_seed(n)
    rows = []
    for _ in range(60):
        d = shortest_window(cells_with_equal_windows(n, generator), 0.8, boots=100)
        rows.append([d['accuracy'], d['held_out']['accuracy'], d['held_out']['full']])
    selected, held_out, full = torch.tensor(rows, dtype=torch.float64).T

    def standard_error(v):
        return v.std().item() / len(v) ** 0.5

    assert selected.mean() - 0.9 > 8 * standard_error(selected)
    assert abs(held_out.mean() - 0.9) < 4 * standard_error(held_out)
    assert abs(full.mean() - 0.97) < 4 * standard_error(full)


def test_held_out_accuracy_agrees_if_one_window_is_clearly_best():
    u = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    accuracy = {
        (0, 0): 0.1,
        (0, 100): 0.3,
        (100, 200): 0.95,
        (200, 300): 0.3,
        (0, 200): 0.96,
        (100, 300): 0.96,
        (0, 300): 0.97,
    }
    d = shortest_window({window: u < p for window, p in accuracy.items()}, 0.9, boots=200)
    assert d['window'] == [100, 200]
    assert d['length_interval'] == [100, 100]
    assert abs(d['held_out']['accuracy'] - d['accuracy']) < 0.002
    assert abs(d['held_out']['full'] - d['full']) < 0.002
    json.dumps(d, allow_nan=False)


# The shipped results belong to the shipped weights

GRIDS = [
    f'critical_stage_{sampler}'
    for sampler in ('ddim', 'ddpm')
    if find_results(f'critical_stage_{sampler}')
]


def test_there_is_a_grid():
    assert 'critical_stage_ddim' in GRIDS


@pytest.mark.parametrize('name', GRIDS)
def test_shipped_grid_belongs_to_the_shipped_weights(name):
    settings = load_results(name)['about']
    names = dict(dpm='dpm', clf='classifier', eval_classifier='eval_classifier')
    assert settings['weights'].keys() == names.keys()
    for part, key in names.items():
        fingerprint = model_fingerprint(load(settings[key]))
        assert settings['weights'][part] == fingerprint, f'the grid was of another {key}'


@pytest.mark.parametrize('name', GRIDS)
def test_shortest_window_of_the_shipped_grid(name):
    "The stored window is the one that the stored samples give."
    d = load_results(name)
    n = d['about']['samples']
    cells = unpack_cells(d)
    assert n >= 500
    assert len(cells) == 211
    assert {len(hits) for hits in cells.values()} == {n}
    again = shortest_window(cells)
    assert again['window'] == d['shortest']['window']
    assert abs(again['accuracy'] - d['shortest']['accuracy']) < 1e-12
    lowest, highest = again['length_interval']
    assert lowest <= again['length'] <= highest
    assert again['held_out']['accuracy'] <= again['accuracy'] + 0.02
    if name.endswith('ddim'):  # these numbers are on the page of the experiment
        assert again['window'] == [400, 750]
        assert round(again['accuracy'], 3) == 0.928
        assert round(again['held_out']['accuracy'], 3) == 0.928


def test_shipped_dpms_were_trained_alike():
    "Recipe, images and skipped steps of the conditional and the unconditional DPM are equal."
    unconditional = load('mnist_dpm').card
    conditional = load('mnist_cdpm').card
    methods = (unconditional.recipe.pop('method'), conditional.recipe.pop('method'))
    assert methods == ('pdae_nb.methods.dpm.DPM', 'pdae_nb.methods.dpm.ClassConditionalDPM')
    assert unconditional.recipe == conditional.recipe
    assert unconditional.images_seen == conditional.images_seen
    assert unconditional.steps_skipped == conditional.steps_skipped == 0
    d = load_results('mnist_cdpm')
    assert d['t'] == FIG1_TIMES
    assert d['against'] == 'mnist_dpm'
    assert len(d['conditional']) == d['repeats'] >= 3


def test_accuracy_of_the_shipped_evaluation_classifier():
    assert load('mnist_eval_classifier').card.result['test_accuracy'] >= 0.99


@pytest.mark.skipif(
    not results_path('mnist_cdpm', 'training').exists(),
    reason='the training logs of the two DPMs are not here',
)
def test_training_logs_of_the_shipped_dpms():
    "The logs are of the same steps, and of the same batches and noise."
    d = load_results('mnist_cdpm', 'training')
    n = len(d['seen'])
    assert n >= 20
    assert d['seen'] == sorted(set(d['seen']))
    assert d['seen'][0] == d['batch'] * d['every']
    assert 0 < d['seen'][-1] <= d['images']
    losses = {}
    for k in ('unconditional', 'conditional'):
        losses[k] = torch.tensor(d[k], dtype=torch.float64)
        quarters = torch.tensor(d['quarters'][k], dtype=torch.float64)
        assert losses[k].shape == (n,)
        assert quarters.shape == (n, 4)
        assert losses[k].min() > 0
        assert quarters.min() > 0
    both = torch.stack([losses['unconditional'], losses['conditional']])
    assert torch.corrcoef(both)[0, 1] > 0.9
    difference = losses['unconditional'] - losses['conditional']
    assert difference[n // 2 :].std() < losses['unconditional'][n // 2 :].std()
