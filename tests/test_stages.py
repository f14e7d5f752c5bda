"""The label's rooms: conditional network, noisy classifier, and a map of stages that survives its killer."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from pdae_nb.evaluate import part_of
from pdae_nb.files import fingerprint
from pdae_nb.forward import Schedule
from pdae_nb.gap import FIG1_TIMES, LabelUNet, band, cdpm_task, load_results, plot_gap, plot_training, results_path
from pdae_nb.guidance import NoisyClassifier, classifier_guided, classifier_loss, shortest_window, stage_grid, unpack_cells
from pdae_nb.train import dpm_task, load_run, recipe
from pdae_nb.unet import UNet
from pdae_nb.weighting import stage_share, w_pdae

ROOT = Path(__file__).parent.parent
SCHED = Schedule.linear()
TINY = dict(c=1, size=8, ch=8, mult=(1, 2), n_res=1)

def wake(net):
    torch.manual_seed(1)
    for p in net.parameters(): torch.nn.init.normal_(p, std=.2) if p.ndim > 1 else None
    return net

def test_the_pair_differs_by_the_label_alone():
    "same initial weights, and at the first step the same loss, because the label is silent at birth"
    r = recipe('mnist_cdpm', 'smoke')
    assert r == recipe('mnist_dpm', 'smoke') and recipe('mnist_cdpm', 'lesson') == recipe('mnist_dpm', 'lesson')
    tasks = []
    for f in (dpm_task, cdpm_task): torch.manual_seed(0); tasks.append(f(r))
    a, b = (t.parts['dpm'].state_dict() for t in tasks)
    assert set(b) - set(a) == {'label.weight'} and all(torch.equal(a[k], b[k]) for k in a)
    x0, y = torch.rand(8, 1, 28, 28)*2 - 1, torch.arange(8)
    losses = []
    for t in tasks: torch.manual_seed(5); losses.append(t.loss_fn(x0, y)[0])
    assert torch.equal(*losses)

def test_a_label_reaches_every_pixel():
    net = wake(LabelUNet(10, **TINY)); x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 900])
    a, b = (net(x, t, torch.tensor([k, k])) for k in (1, 2))
    assert (a != b).all() and torch.equal(net(x, t, torch.tensor([1])), a), 'one label serves for all'

@pytest.mark.parametrize('y, error, words', [(10, ValueError, 'labels must be in 0…9, got 10'), (-1, ValueError, 'got -1'), ([1, 2, 3], ValueError, 'expected 2 labels'), ([1., 2.], TypeError, 'integers'), ([[1, 2]], ValueError, 'shape')])
def test_wrong_labels_are_named(y, error, words):
    net, clf = LabelUNet(10, **TINY), NoisyClassifier(**TINY); x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 900])
    with pytest.raises(error, match=words): net(x, t, torch.as_tensor(y))
    with pytest.raises(error, match=words): clf.log_p(x, t, torch.as_tensor(y))

@pytest.mark.parametrize('window', [(700, 400), (400, 400), (-1, 400), (400, 1001)])
def test_wrong_windows_are_named(window):
    net, clf = UNet(**TINY), NoisyClassifier(**TINY)
    with pytest.raises(ValueError, match=r'0 <= t1 < t2 <= 1000'): classifier_guided(net, clf, 3, SCHED, window=window)
    with pytest.raises(ValueError, match=r'0 <= t1 < t2 <= 1000'): stage_share(w_pdae, SCHED, window)

def test_a_classifier_of_another_size_is_refused():
    with pytest.raises(ValueError, match='16'): classifier_guided(UNet(**TINY), NoisyClassifier(**TINY | dict(size=16)), 3, SCHED)
    with pytest.raises(ValueError, match='built for images'): NoisyClassifier(**TINY)(torch.randn(2, 1, 16, 16), torch.tensor([1, 2]))

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_guidance_under_autocast_follows_float64(dtype):
    clf = wake(NoisyClassifier(**TINY)); x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([1, 100, 500, 1000]), torch.tensor([1, 2, 3, 4])
    silent = lambda xt, t: torch.zeros_like(xt)                              # what is left is the push
    with torch.no_grad():
        want = classifier_guided(silent, clf.double(), y, SCHED)(x.double(), t)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16): got = classifier_guided(silent, clf.float(), y, SCHED)(x, t)
        other = classifier_guided(silent, clf.double(), y + 1, SCHED)(x.double(), t)
    assert got.dtype == torch.float32 and want.norm() > 0
    off = lambda a: (a.double() - want).norm()/want.norm()
    assert off(got) < (1e-4 if dtype == torch.float32 else .1) < off(other)

def test_a_classifier_learns_under_compile():
    "the compiled forward, its gradient and the gradient for guidance agree with the plain ones"
    clf = wake(NoisyClassifier(**TINY)); x0, y, t, eps = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4]), torch.tensor([1, 100, 500, 1000]), torch.randn(4, 1, 8, 8)
    def measure():
        clf.zero_grad(); loss = classifier_loss(clf, x0, y, SCHED, t=t, eps=eps); loss.backward()
        with torch.no_grad(): push = classifier_guided(lambda x, t: torch.zeros_like(x), clf, y, SCHED)(x0, t)
        return [loss.detach(), push, *(p.grad.clone() for p in clf.parameters() if p.grad is not None)]
    plain = measure(); clf.compile(backend='aot_eager')
    for a, b in zip(plain, measure(), strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

CODE = '''
import sys, time, torch
from pdae_nb.denoise import GaussianMixture
from pdae_nb.forward import Schedule
from pdae_nb.guidance import stage_grid
torch.set_num_threads(1); torch.manual_seed(0)
gm = GaussianMixture(torch.tensor([[.8, .6], [-.9, .3], [.1, -1.]], dtype=torch.float64), .15, Schedule.linear())
def judge(x): time.sleep(float(sys.argv[2])); return -torch.cdist(x, gm.mu)
stage_grid(gm, gm, judge, torch.randn(30, 2, dtype=torch.float64), torch.arange(30) % 3, gm.sched, step=100, eta=1., clip=None, path=sys.argv[1])
'''

def test_a_map_that_was_killed_is_gone_on_with(tmp_path):
    "SIGKILL in the middle; the second call keeps the finished windows and ends with the same bits"
    def start(name, pause): return subprocess.Popen([sys.executable, '-c', CODE, str(tmp_path/name), str(pause)], env=os.environ | dict(OMP_NUM_THREADS='1'))
    count = lambda name: len(json.loads((tmp_path/name).read_text())['cells']) if (tmp_path/name).exists() else 0
    p = start('killed.json', .05); end = time.time() + 120
    while count('killed.json') < 5 and time.time() < end: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait(); kept = count('killed.json')
    assert 5 <= kept < 56
    for name in ('killed.json', 'whole.json'): assert start(name, 0).wait() == 0
    killed, whole = (json.loads((tmp_path/n).read_text()) for n in ('killed.json', 'whole.json'))
    assert killed['cells'] == whole['cells'] and len(whole['cells']) == 56

def test_nan_is_no_class(tmp_path):
    "a denoiser that fails at the last step must not leave cells behind"
    broken = lambda xt, t: torch.full_like(xt, torch.nan) if t[0] <= 250 else torch.zeros_like(xt)
    judge = lambda x: torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 3).float()
    clf = type('', (), dict(log_p=lambda self, xt, t, y: -xt.square().sum(1)))()
    with pytest.raises(ValueError, match='NaN'): stage_grid(broken, clf, judge, torch.randn(6, 2), torch.arange(6) % 3, SCHED, step=250, path=tmp_path/'g.json')
    assert not (tmp_path/'g.json').exists()

@pytest.mark.parametrize('text', ['', '{', '[]', '{"about": {}}', '{"about": {"samples": 6}, "seconds": 1, "cells": {"0-250": "zz"}}'])
def test_a_damaged_map_is_named(tmp_path, text):
    (path := tmp_path/'g.json').write_text(text)
    with pytest.raises(ValueError, match='g.json is not a whole stage grid'): stage_grid(None, None, None, torch.randn(6, 2), torch.arange(6) % 3, SCHED, step=250, path=path)
    assert path.read_text() == text, 'nothing is lost'

# what a few samples tell

@pytest.mark.parametrize('n, level', [(2, .95), (5, .95), (5, .5), (40, .99)])
def test_a_band_holds_the_truth_as_often_as_it_says(n, level):
    v = torch.randn(n, 20_000, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 7
    mean, half = band(v, level)
    torch.testing.assert_close(mean, v.mean(0))
    assert abs(((mean - 7).abs() <= half).double().mean() - level) < 4*(level*(1 - level)/20_000)**.5

def test_a_single_repeat_has_no_band():
    mean, half = band([[1., 2.]])
    assert mean.tolist() == [1, 2] and half.isnan().all()
    import matplotlib; matplotlib.use('Agg')
    ax = plot_gap({'one': [1., 2.]}, [1, 2])
    assert list(ax.lines[0].get_ydata()) == [1, 2] and ax.get_ylim()[0] > 0

def test_the_training_of_a_pair_is_drawn_from_its_numbers():
    import matplotlib; matplotlib.use('Agg')
    n, up = 40, torch.linspace(0, 1, 40, dtype=torch.float64)
    q = dict(unconditional=(1 + up[:, None].expand(n, 4)).tolist(), conditional=(.5 + up[:, None].expand(n, 4)/2).tolist())
    d = dict(seen=[3200*(i + 1) for i in range(n)], quarters=q, **{k: [o[0] for o in v] for k, v in q.items()})
    left, middle, right = plot_training(d).axes
    want = (torch.tensor(d['unconditional']) - torch.tensor(d['conditional'])).unfold(0, 4, 1).mean(-1)
    torch.testing.assert_close(torch.as_tensor(middle.lines[0].get_ydata()).double(), want.double())
    assert middle.lines[0].get_xdata()[0] == pytest.approx(8.0) and all(abs(l.get_ydata() - .5).max() < 1e-12 for l in right.lines[:4])

@pytest.mark.parametrize('n', [60, 200])
def test_held_out_samples_do_not_fall_for_the_luckiest_window(n):
    "twenty windows that are equally good: the best one looks better than it is, the samples without a say are right on average"
    g = torch.Generator().manual_seed(n); coin = lambda p: torch.rand(n, generator=g) < p
    def one():
        d = shortest_window({(0, 0): coin(.1), (0, 1000): coin(.97)} | {(t, t + 50): coin(.9) for t in range(0, 1000, 50)}, .8, boots=100)
        return d['accuracy'], d['held_out']['accuracy'], d['held_out']['full']
    seems, held, full = torch.tensor([one() for _ in range(60)], dtype=torch.float64).T
    error = lambda v: v.std().item()/len(v)**.5
    assert seems.mean() - .9 > 8*error(seems)
    assert abs(held.mean() - .9) < 4*error(held) and abs(full.mean() - .97) < 4*error(full)

def test_where_no_luck_is_needed_held_out_agrees():
    g = torch.Generator().manual_seed(0); u = torch.rand(2000, generator=g)
    d = shortest_window({(0, 0): u < .1, (0, 100): u < .3, (100, 200): u < .95, (200, 300): u < .3, (0, 200): u < .96, (100, 300): u < .96, (0, 300): u < .97}, .9, boots=200)
    assert d['window'] == [100, 200] and d['length_interval'] == [100, 100]
    assert abs(d['held_out']['accuracy'] - d['accuracy']) < .002 and abs(d['held_out']['full'] - d['full']) < .002
    json.dumps(d, allow_nan=False)

# what is shipped must be what was measured

MAPS = sorted(p.parent.name for p in (ROOT/'data/results').glob('critical_stage_*/lesson.json'))

def test_there_is_a_map(): assert 'critical_stage_ddim' in MAPS

@pytest.mark.parametrize('name', MAPS)
def test_the_shipped_maps_say_what_their_samples_say(name):
    d = load_results(name); cells, n = unpack_cells(d), d['about']['samples']
    assert n >= 500 and len(cells) == 211 and {len(v) for v in cells.values()} == {n}
    for k, what in dict(dpm='dpm', clf='classifier', judge='judge').items():
        assert d['about']['weights'][k] == fingerprint(part_of(d['about'][what], k, 'cpu')[1]), f'the map was made with another {what} than the one shipped'
    again = shortest_window(cells)
    assert again['window'] == d['shortest']['window'] and abs(again['accuracy'] - d['shortest']['accuracy']) < 1e-12
    lo, hi = again['length_interval']; assert lo <= again['length'] <= hi
    assert again['held_out']['accuracy'] <= again['accuracy'] + .02
    if name.endswith('ddim'): assert [again['window'], round(again['accuracy'], 3), round(again['held_out']['accuracy'], 3)] == [[400, 750], .928, .928], 'as 07_guidance says'

def test_the_shipped_pair_is_a_pair():
    a, b = load_run('mnist_dpm'), load_run('mnist_cdpm')
    assert a.recipe == b.recipe and a.about['images_seen'] == b.about['images_seen'] and a.about['steps_skipped'] == b.about['steps_skipped'] == 0
    d = load_results('mnist_cdpm')
    assert d['t'] == FIG1_TIMES and d['against'] == 'mnist_dpm' and len(d['conditional']) == d['repeats'] >= 3
    assert load_run('mnist_judge').about['result']['test_accuracy'] >= .99

@pytest.mark.skipif(not results_path('mnist_cdpm', 'training').exists(), reason='the logs of the pair are not here')
def test_the_logs_of_the_pair_are_a_pair():
    d = load_results('mnist_cdpm', 'training'); n = len(d['seen'])
    assert n >= 20 and d['seen'] == sorted(set(d['seen'])) and 0 < d['seen'][-1] <= d['images'] and d['seen'][0] == d['batch']*d['every']
    for k in ('unconditional', 'conditional'): assert len(d[k]) == n and all(len(q) == 4 and min(q) > 0 for q in d['quarters'][k]) and min(d[k]) > 0
    u, c = (torch.tensor(d[k], dtype=torch.float64) for k in ('unconditional', 'conditional'))
    assert torch.corrcoef(torch.stack([u, c]))[0, 1] > .9 and (u - c)[n//2:].std() < u[n//2:].std(), 'the same batches and noise'
