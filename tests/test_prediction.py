"""Networks that predict eps and networks that predict v: errors, colours, the file of results."""

import json
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from pdae_nb.data import load_images, to_signed, to_uint8
from pdae_nb.experiments import prediction
from pdae_nb.experiments.prediction import (
    ERROR_TIMES,
    KINDS,
    SIZES,
    amplification,
    colour_distances,
    distance_table,
    figure_errors,
    figure_samples,
    mean_colours,
    measure_prediction,
    picture_path,
    prediction_recipe,
    trained_run,
    x0_errors,
)
from pdae_nb.forward import Schedule, add_noise, eps_to_x0
from pdae_nb.methods.dpm import DPM, DPMSettings
from pdae_nb.unet import UNet

matplotlib.use('Agg')

SCHED = Schedule.linear()


def no_log(message):
    "A log function that drops its message."


def without_seconds(d):
    "The rows of a file of results without their durations."
    return {key: {k: v for k, v in row.items() if k != 'seconds'} for key, row in d['runs'].items()}


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    "A folder of the cache for the runs of this module."
    folder = tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PDAE_NB_CACHE', str(folder))
        yield folder


@pytest.fixture(scope='module')
def measured(cache, tmp_path_factory):
    "Path and content of a measurement with one seed."
    path = tmp_path_factory.mktemp('results') / 'smoke.json'
    return path, measure_prediction('smoke', seeds=1, out=path, log=no_log)


def random_dpm(predicts):
    "A DPM whose output is not zero."
    torch.manual_seed(0)
    net = UNet(c=3, size=8, ch=8, mult=(1, 2), n_res=1)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return DPM(net, SCHED, (3, 8, 8), DPMSettings(predicts)).eval()


# Errors of x̂_0


@pytest.mark.parametrize('predicts', KINDS)
def test_the_errors_are_those_of_x0_hat(predicts):
    "Computed from the raw output of the network, by the formula of each type."
    model = random_dpm(predicts)
    x0 = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x0[0] *= 5  # images with different errors: the root is taken after the mean
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    got = x0_errors(model, x0, seed=3, bs=4)
    assert got.shape == (len(ERROR_TIMES),)
    for error, t in zip(got, ERROR_TIMES, strict=True):
        timesteps = torch.full((6,), t)
        alpha_bar = SCHED.alpha_bar[t]
        xt = add_noise(SCHED, x0, timesteps, noise)
        with torch.no_grad():
            output = model.net(xt, timesteps)
        if predicts == 'v':
            x0_hat = alpha_bar.sqrt() * xt - (1 - alpha_bar).sqrt() * output
        else:
            x0_hat = eps_to_x0(SCHED, xt, timesteps, output)
        want = (x0_hat - x0).double().square().mean().sqrt()
        assert error == pytest.approx(want.item(), rel=1e-3)


def test_the_factors_are_those_of_the_equations():
    t = [1, 500, 1000]
    for i, alpha_bar in enumerate(SCHED.alpha_bar[t].tolist()):
        assert amplification(SCHED, t, 'eps')[i] == pytest.approx((1 / alpha_bar - 1) ** 0.5)
        assert amplification(SCHED, t, 'v')[i] == pytest.approx((1 - alpha_bar) ** 0.5)
    with pytest.raises(ValueError, match="'eps' or 'v', got 'x0'"):
        amplification(SCHED, t, 'x0')


# Colours


def test_a_set_has_no_distance_to_itself():
    x = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert list(colour_distances(x, x)) == ['mean_colour', 'colours_4x4']
    for distance in colour_distances(x, x).values():
        assert distance == pytest.approx(0, abs=1e-9)


def test_a_shift_of_all_colours_is_its_squared_length():
    x = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    shift = torch.tensor([0.1, 0.0, -0.2]).reshape(1, 3, 1, 1)
    distances = colour_distances(x, x + shift)
    assert distances['mean_colour'] == pytest.approx(0.05, rel=1e-4)
    assert distances['colours_4x4'] == pytest.approx(16 * 0.05, rel=1e-4)


def test_mean_colours_are_means_over_rectangles():
    x = torch.rand(2, 3, 8, 12)
    assert torch.allclose(mean_colours(x), x.mean((2, 3)))
    parts = mean_colours(x, 4).reshape(2, 3, 4, 4)
    assert torch.allclose(parts[:, :, 1, 2], x[:, :, 2:4, 6:9].mean((2, 3)))
    with pytest.raises(ValueError, match='8x12 pixels cannot be divided by 8'):
        mean_colours(x, 8)


# The measurement


@pytest.mark.parametrize('size', SIZES)
def test_the_two_types_differ_in_their_settings_only(size):
    of_eps = prediction_recipe(size, 'eps', 2)
    assert of_eps.settings == DPMSettings('eps')
    assert of_eps.seed == 2
    assert replace(of_eps, settings=DPMSettings('v')) == prediction_recipe(size, 'v', 2)


def test_the_file_holds_what_was_measured(measured):
    path, d = measured
    assert json.loads(path.read_text(encoding='utf-8')) == d
    assert list(d['runs']) == ['eps 0', 'v 0']
    assert d['about']['size'] == 'smoke'
    assert d['about']['n'] == SIZES['smoke'].n
    assert d['seeds'] == 1
    assert d['hardware']
    assert d['versions']['pdae_nb']


def test_a_row_is_measured_on_the_run_of_its_key(measured):
    path, d = measured
    size = SIZES['smoke']
    test = to_signed(load_images('digits', 'test', 16).x)
    for kind in KINDS:
        model = trained_run('smoke', kind)
        assert model.settings.predicts == kind
        row = d['runs'][f'{kind} 0']
        assert row['errors'] == x0_errors(model, test[: size.error_images]).tolist()
        samples = model.sample(size.n, steps=size.steps)
        assert row['distances'] == colour_distances(test[: size.n], samples)
        assert row['noise_mse'] == model.card.result['test_noise_mse']
        file = picture_path(path, kind)
        assert file.stat().st_size <= 150_000
        with Image.open(file) as picture:
            pixels = torch.from_numpy(np.array(picture))
        assert torch.equal(pixels, torch.cat([*to_uint8(samples[:8, 0])], 1))


def test_the_reference_is_of_constant_predictions_and_real_images(measured):
    _, d = measured
    size = SIZES['smoke']
    test = to_signed(load_images('digits', 'test', 16).x)
    mean = to_signed(load_images('digits', 'train', 16).x).double().mean(0)
    error = (test[: size.error_images] - mean).square().mean().sqrt().item()
    assert d['reference']['mean_image_error'] == pytest.approx(error, rel=1e-5)
    want = colour_distances(test[: size.n], test[size.n : 2 * size.n])
    assert d['reference']['distances'] == want
    assert min(want.values()) > 0


def test_an_interrupted_measurement_goes_on(measured, tmp_path, monkeypatch):
    "The finished run is not measured again, and the file is that of a single call."
    _, whole = measured
    path = tmp_path / 'smoke.json'
    asked = []

    def is_interrupted(size, kind, seed):
        asked.append(kind)
        if kind == 'v':
            raise KeyboardInterrupt
        return trained_run(size, kind, seed)

    monkeypatch.setattr(prediction, 'trained_run', is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_prediction('smoke', seeds=1, out=path, log=no_log)
    assert not path.exists()

    def goes_on(size, kind, seed):
        asked.append(kind)
        return trained_run(size, kind, seed)

    monkeypatch.setattr(prediction, 'trained_run', goes_on)
    d = measure_prediction('smoke', seeds=1, out=path, log=no_log)
    assert asked == ['eps', 'v', 'v']
    assert without_seconds(d) == without_seconds(whole)
    assert d['reference'] == whole['reference']
    assert measure_prediction('smoke', seeds=1, out=path, log=no_log) == d
    assert asked == ['eps', 'v', 'v']


def test_the_numbers_are_a_function_of_the_seed(measured, tmp_path, monkeypatch):
    "Trained again in another cache they are equal; a second seed gives others, and is added."
    path, whole = measured
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    out = tmp_path / 'smoke.json'
    d = measure_prediction('smoke', seeds=1, out=out, log=no_log)
    assert without_seconds(d) == without_seconds(whole)
    more = measure_prediction('smoke', seeds=2, out=out, log=no_log)
    assert more['seeds'] == 2
    assert more['runs'] | d['runs'] == more['runs']
    for kind in KINDS:
        assert more['runs'][f'{kind} 1']['errors'] != more['runs'][f'{kind} 0']['errors']
    with pytest.raises(ValueError, match='holds 4 runs, 1 seeds would give 2'):
        measure_prediction('smoke', seeds=1, out=out, log=no_log)


def test_a_file_of_other_settings_is_refused(measured, monkeypatch):
    path, _ = measured
    before = path.read_bytes()
    other = SIZES['smoke']._replace(steps=4)
    monkeypatch.setitem(SIZES, 'smoke', other)
    with pytest.raises(ValueError, match='other settings .steps 3, not 4'):
        measure_prediction('smoke', seeds=1, out=path, log=no_log)
    recipe = replace(other.recipe, lr=1.0)
    monkeypatch.setitem(SIZES, 'smoke', other._replace(steps=3, recipe=recipe))
    with pytest.raises(ValueError, match='recipe.lr 0.002, not 1.0'):
        measure_prediction('smoke', seeds=1, out=path, log=no_log)
    assert path.read_bytes() == before


def test_wrong_arguments_are_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, 'trained_run', None)
    with pytest.raises(ValueError, match="smoke or lesson, got 'paper'"):
        measure_prediction('paper', out=tmp_path / 'a.json')
    with pytest.raises(ValueError, match='seeds must be at least 1, got 0'):
        measure_prediction('smoke', seeds=0, out=tmp_path / 'a.json')
    with pytest.raises(ValueError, match='must end in .json'):
        measure_prediction('smoke', out=tmp_path / 'a.png')
    monkeypatch.setitem(SIZES, 'smoke', SIZES['smoke']._replace(n=200))
    with pytest.raises(ValueError, match='at least 400 test images, got 360'):
        measure_prediction('smoke', out=tmp_path / 'a.json')
    assert not list(tmp_path.iterdir())


# Figures and table


def three_seeds(measured):
    "A measurement whose rows are known: three seeds with distances 1, 2, 3 times a constant."
    path, d = measured
    runs = {}
    for kind, distance in (('eps', 10.0), ('v', 1.0)):
        for seed in range(3):
            distances = dict(mean_colour=distance * (seed + 1), colours_4x4=distance)
            row = dict(seed=seed, distances=distances, noise_mse=0.5)
            runs[f'{kind} {seed}'] = d['runs'][f'{kind} 0'] | row
    return path, d | dict(runs=runs, seeds=3)


def test_the_table_has_means_and_standard_errors(measured):
    _, d = three_seeds(measured)
    of_eps, of_v, real = distance_table(d).rows
    exact = ['10.0000 ± 0.0000', '0.500000 ± 0.000000']
    assert of_eps == ['predicts ε', '20.00000 ± 5.77350', *exact]
    assert of_v == ['predicts v', '2.00000 ± 0.57735', '1.0000 ± 0.0000', exact[1]]
    assert real[0] == 'other test images'
    assert real[-1] == '–'
    assert '±' not in str(distance_table(measured[1]))


def test_the_figure_has_a_line_for_each_run(measured):
    _, d = three_seeds(measured)
    (ax,) = figure_errors(d).axes
    curves = [line for line in ax.lines if len(line.get_xdata()) == len(ERROR_TIMES)]
    assert len(curves) == 6
    assert {line.get_color() for line in curves[:3]}.isdisjoint(
        line.get_color() for line in curves[3:]
    )
    assert list(curves[0].get_ydata()) == d['runs']['eps 0']['errors']
    assert ax.get_yscale() == 'log'


def test_the_figure_of_samples_shows_both_pictures(measured, tmp_path):
    path, d = measured
    axes = figure_samples(d, path).axes
    assert [ax.get_ylabel() for ax in axes] == ['predicts ε', 'predicts v']
    assert [ax.images[0].get_size() for ax in axes] == [(16, 128), (16, 128)]
    with pytest.raises(FileNotFoundError, match='smoke-eps.png'):
        figure_samples(d, tmp_path / 'smoke.json')
