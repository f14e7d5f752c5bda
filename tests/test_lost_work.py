"""Finished work is kept, and what cannot be finished is refused before it starts."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from pdae_nb import cli, commands, evaluation
from pdae_nb.data import digits, to_signed
from pdae_nb.files import PICTURES, finite, output_file, save_checkpoint, write_json
from pdae_nb.forward import Schedule
from pdae_nb.gap import FIG1_TIMES, scaled_times
from pdae_nb.hub import load, train
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.pdae import PDAE
from pdae_nb.model import StepNoise, noise
from pdae_nb.sampling import ddim_step, sample
from pdae_nb.training import EMA, NonFinite, Recipe, optimiser, train_model
from pdae_nb.unet import UNet

NET = dict(ch=8, mult=(1, 2), n_res=1, groups=8)
SHORT = dict(data='digits', px=14, images=48, batch=16, lr=2e-3, ema=0.5)
IMAGES = digits('train', 14)
TEST = digits('test', 14)
RECIPE = Recipe(DPM, **SHORT, net=NET)


def no_log(message):
    "A log function that drops its message."


def untrained(recipe=RECIPE):
    torch.manual_seed(0)
    return recipe.method.build(recipe, IMAGES)


def trained(out, model=None, recipe=RECIPE, **options):
    "Train in the folder `out`."
    options = dict(log=no_log, every=1) | options
    return train_model(model or untrained(), recipe, out, IMAGES, TEST, **options)


def dpm_of(T):
    "An untrained DPM with T timesteps."
    torch.manual_seed(0)
    return DPM(UNet(c=1, size=14, **NET), Schedule.linear(T), (1, 14, 14))


# Evaluations that fail


class NoResult(DPM):
    "A DPM whose evaluation fails."

    def test_result(self, x0, y):
        raise ArithmeticError('no number')


def fails_to_evaluate(monkeypatch):
    monkeypatch.setattr(DPM, 'test_result', NoResult.test_result)


def test_a_failing_evaluation_keeps_the_finished_training(tmp_path, monkeypatch):
    out = tmp_path / 'run'
    reference = trained(tmp_path / 'reference')
    with monkeypatch.context() as patched:
        fails_to_evaluate(patched)
        with pytest.raises(RuntimeError, match=r'stored in .*run\. .*ArithmeticError: no number'):
            trained(out)
        kept = load(out)
    assert kept.card.result is None
    assert kept.card.images_seen == 48
    for a, b in zip(kept.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_same_call_adds_the_result(tmp_path, monkeypatch):
    out = tmp_path / 'run'
    with monkeypatch.context() as patched:
        fails_to_evaluate(patched)
        with pytest.raises(RuntimeError):
            trained(out)
    calls = []
    original = DPM.loss
    monkeypatch.setattr(DPM, 'loss', lambda *a: calls.append(1) or original(*a))
    again = trained(out)
    assert calls == []  # no step is repeated
    assert again.card.result == trained(tmp_path / 'reference').card.result


def test_pdae_evaluate_adds_the_result(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'run'
    with monkeypatch.context() as patched:
        fails_to_evaluate(patched)
        with pytest.raises(RuntimeError):
            trained(out)
    words = ['--test-images', '8', '--steps', '2', '--eval-classifier', '']
    results = tmp_path / 'results.json'
    assert cli.main(['evaluate', str(out), *words, '--out', str(results)]) == 0
    reference = trained(tmp_path / 'reference').card.result
    assert load(out).card.result == pytest.approx(reference, abs=1e-5)
    assert json.loads(results.read_text('utf-8'))['test_images'] == 8


def test_a_failing_look_at_the_end_keeps_the_finished_training(tmp_path):
    out = tmp_path / 'run'

    def look(seen, model):
        raise OSError('no space')

    with pytest.raises(RuntimeError, match='OSError: no space'):
        trained(out, look=look, every=1000)
    assert load(out).card.images_seen == 48


def test_a_preview_that_fails_does_not_stop_the_training(tmp_path, monkeypatch):
    def preview(self, x0, y):
        raise OSError('no space')

    monkeypatch.setattr(DPM, 'preview', preview)
    lines = []
    model = trained(tmp_path / 'run', log=lines.append)
    assert model.card.result['test_images'] == len(TEST)
    assert 'no preview of step 1: OSError: no space' in lines


def test_a_result_that_is_not_defined_is_null(tmp_path):
    assert finite(dict(a=math.nan, b=[1.5, -math.inf], c=(2, 'x'))) == dict(
        a=None, b=[1.5, None], c=[2, 'x']
    )
    path = tmp_path / 'x.json'
    write_json(path, dict(se=math.nan))
    assert json.loads(path.read_text('utf-8')) == dict(se=None)


def test_the_standard_error_of_one_number_is_not_defined():
    assert evaluation.Estimate.of(torch.tensor([2.0])).se is None
    assert evaluation.Estimate.of(torch.tensor([2.0, 4.0])).se == 1.0
    row = dict(n=1, mse=[3.0, 9.0])
    assert evaluation._means(row) == dict(n=1, mse=[3.0, None])


# Too few images


@pytest.mark.parametrize(
    'run, words, wanted',
    [
        ('mnist_dpm', ['--test-images', '3'], 'test_images must be at least 4, got 3'),
        ('mnist_dpm', ['--steps', '1'], 'steps must be at least 2, got 1'),
        ('mnist_cdpm', ['--test-images', '9'], 'test_images must be at least 10, got 9'),
        ('mnist_classifier', ['--n', '19'], 'n must be at least 20, got 19'),
        ('mnist_pdae', ['--test-images', '1'], 'test_images must be at least 2, got 1'),
        ('mnist_pdae', ['--gap-images', '1'], 'gap_images must be at least 2, got 1'),
    ],
)
def test_too_few_images_are_refused_before_the_evaluation(run, words, wanted, tmp_path, capsys):
    out = tmp_path / 'x.json'
    assert cli.main(['evaluate', run, *words, '--out', str(out)]) == 1
    assert wanted in capsys.readouterr().err
    assert not out.exists()


# Noise schedules with another T


@pytest.mark.parametrize('T', [50, 100, 500])
def test_a_base_with_another_T_trains_and_is_evaluated(tmp_path, T):
    recipe = Recipe(PDAE, **SHORT, encoder=dict(z_dim=4, groups=8), base=dpm_of(T))
    model = train('coder', recipe, out=tmp_path / 'coder', log=no_log)
    ts = model.card.result['t']
    assert 1 <= min(ts) < max(ts) <= T
    dpm = model.base
    dpm.card.recipe = RECIPE.as_json()
    numbers = evaluation.evaluate_dpm(dpm, test_images=16, steps=2)
    assert max(numbers['curve']['t']) == T
    gaps = evaluation._gaps(model, to_signed(TEST.x[:2]))
    assert max(gaps['t']) == T
    assert len(gaps['pdae']['mean']) == len(gaps['t'])


def test_timesteps_of_the_papers_are_scaled():
    assert scaled_times(FIG1_TIMES, Schedule.linear()) == FIG1_TIMES
    for T in (1, 50, 500, 2000):
        ts = scaled_times(FIG1_TIMES, Schedule.linear(T))
        assert ts == sorted(set(ts))
        assert ts[-1] == T


@pytest.mark.parametrize('predicts', ['eps', 'v'])
def test_a_schedule_that_ends_with_alpha_bar_0_is_refused(predicts):
    beta = Schedule.linear().beta.clone()
    beta[-1] = 1.0
    with pytest.raises(ValueError, match='zero terminal SNR'):
        DPM(UNet(c=1, size=14, **NET), Schedule(beta), (1, 14, 14))


# Checkpoints


def test_states_that_are_not_finite_are_never_saved(tmp_path):
    model = untrained()
    opt = optimiser(model.trainable(), RECIPE)
    ema = EMA(model, 0.5)
    save_checkpoint(tmp_path, 1, model, ema, opt, {})
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = math.inf
    with pytest.raises(ValueError, match='would hold NaN or infinite numbers, e.g. in model'):
        save_checkpoint(tmp_path, 2, model, ema, opt, {})
    assert [path.name for path in tmp_path.iterdir()] == ['step_000000001.safetensors']


def test_weights_that_become_infinite_leave_the_last_finite_checkpoint(tmp_path):
    out = tmp_path / 'run'
    model = untrained()
    lines = []
    recipe = replace(RECIPE, images=30 * 16)
    original = model.loss
    steps = []

    def loss(x0, y, draw):
        steps.append(1)
        if len(steps) == 14:
            with torch.no_grad():
                model.net.up.out[-1].weight.fill_(math.inf)
        return original(x0, y, draw)

    model.loss = loss
    with pytest.raises((NonFinite, ValueError)):
        trained(out, model, recipe, every=5, log=lines.append)
    names = sorted(path.name for path in (out / 'checkpoints').iterdir())
    assert names == ['step_000000005.safetensors', 'step_000000010.safetensors']
    lines.clear()
    trained(out, untrained(), recipe, log=lines.append, every=5)
    assert any('going on at step 10' in line for line in lines)


def test_a_checkpoint_that_is_not_finite_is_passed_over(tmp_path, monkeypatch):
    "Such as one that an earlier version of this package wrote."
    import pdae_nb.files as files

    out = tmp_path / 'run'
    trained(out, recipe=replace(RECIPE, images=32))
    shutil.rmtree(out / 'samples')
    (out / 'run.json').unlink()
    newest = out / 'checkpoints/step_000000002.safetensors'
    tensors, meta = files.read_tensors(newest)
    name = next(name for name in tensors if name.startswith('ema.'))
    tensors[name] = torch.full_like(tensors[name], math.nan)
    files.write_tensors(newest, tensors, meta)
    lines = []
    trained(out, recipe=replace(RECIPE, images=32), log=lines.append)
    assert any('skipping' in line and 'NaN' in line for line in lines)
    assert any('going on at step 1 of 2' in line for line in lines)
    assert newest.with_name(f'{newest.name}.damaged').exists()


@pytest.mark.parametrize('error', [MemoryError('no memory'), KeyError('x'), SystemExit(3)])
def test_any_exception_is_preceded_by_a_checkpoint(tmp_path, error):
    out = tmp_path / 'run'

    def look(seen, model):
        raise error

    recipe = replace(RECIPE, images=64)
    with pytest.raises(type(error)):
        trained(out, recipe=recipe, look=look, every=2)
    names = sorted(path.name for path in (out / 'checkpoints').iterdir())
    assert names[-1] == 'step_000000002.safetensors'
    resumed = trained(out, recipe=recipe)
    reference = trained(tmp_path / 'reference', recipe=recipe)
    for a, b in zip(resumed.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_exception_in_a_step_keeps_the_steps_before_it(tmp_path):
    out = tmp_path / 'run'
    model = untrained()
    original = model.loss
    calls = []

    def loss(x0, y, draw):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError('in step 4')
        return original(x0, y, draw)

    model.loss = loss
    recipe = replace(RECIPE, images=96)
    lines = []
    with pytest.raises(MemoryError):
        trained(out, model, recipe, every=500, log=lines.append)
    assert 'saved after step 3 of 6' in lines
    resumed = trained(out, recipe=recipe, every=500)
    reference = trained(tmp_path / 'reference', recipe=recipe, every=500)
    for a, b in zip(resumed.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('change', ['pixel', 'label', 'order', 'fewer'])
def test_a_resume_on_other_images_is_refused(tmp_path, change):
    out = tmp_path / 'run'
    recipe = replace(RECIPE, images=32)
    trained(out, recipe=recipe)
    (out / 'run.json').unlink()
    images = digits('train', 14)
    if change == 'pixel':
        images.x[0, 0, 0, 0] += 1
    elif change == 'label':
        images.y[0] = (images.y[0] + 1) % 10
    elif change == 'order':
        images.x[:2] = images.x[:2].flip(0)
        images.y[:2] = images.y[:2].flip(0)
    else:
        images.x, images.y = images.x[1:], images.y[1:]
    with pytest.raises(ValueError, match='was trained on images with checksum'):
        train_model(untrained(), recipe, out, images, TEST, log=no_log)


# A user's folder


@pytest.mark.parametrize('command', ['train', 'save'])
def test_a_folder_with_other_files_is_not_deleted(tmp_path, command, capsys):
    folder = tmp_path / 'o' / 'mnist_dpm'
    folder.mkdir(parents=True)
    precious = folder / 'precious.txt'
    precious.write_text('notes', 'utf-8')
    with pytest.raises(FileExistsError, match='precious'):
        untrained().save(folder) if command == 'save' else trained(folder)
    assert precious.read_text('utf-8') == 'notes'


# Paths of outputs


@pytest.mark.parametrize(
    'command, words',
    [
        ('sample', ['mnist_dpm']),
        ('reconstruct', ['mnist_dpm']),
        ('interpolate', ['mnist_pdae']),
        ('manipulate', ['mnist_pdae', '--attribute', '9']),
    ],
)
@pytest.mark.parametrize('out', ['pic', 'pic.doc', 'folder.png', 'file.txt/pic.png'])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    command, words, out, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path('folder.png').mkdir()
    Path('file.txt').touch()
    for module in (cli, commands):
        monkeypatch.setattr(module, 'load_run', lambda *a, **k: pytest.fail('the work began'))
    assert cli.main([command, *words, '--out', out]) == 1
    assert out in capsys.readouterr().err


def test_the_tilde_of_an_output_is_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert output_file('~/a/x.png', PICTURES) == tmp_path / 'a' / 'x.png'
    assert (tmp_path / 'a').is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_a_read_only_place_is_found_before_the_work(tmp_path, monkeypatch):
    def touch(self, *a, **k):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(Path, 'touch', touch)
    with pytest.raises(OSError, match='cannot write .*x.json: Permission denied'):
        output_file(tmp_path / 'x.json')


# Noise of samples


def test_noise_of_stochastic_steps_depends_on_seed_and_index_only():
    def images(n, seed, first=0):
        dpm = dpm_of(100)
        step = partial(ddim_step, noise=StepNoise(n, seed, first))
        xT = noise((1, 14, 14), n, seed, first)
        return sample(dpm.denoiser(), xT, dpm.sched, 4, 1.0, 1.0, step)

    many = images(5, seed=3)
    assert torch.equal(images(2, seed=3), many[:2])
    assert torch.equal(images(2, seed=3, first=3), many[3:])
    assert not torch.equal(images(2, seed=4099), many[:2])


def test_pdae_sample_gives_the_same_images_for_another_n(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(cli, 'save_pictures', lambda x, out, *a, **k: shown.append(x) or str(out))
    monkeypatch.chdir(tmp_path)
    for n in (3, 66):
        words = ['--n', str(n), '--steps', '2', '--eta', '1', '--seed', '7']
        assert cli.main(['sample', 'mnist_dpm', *words]) == 0
    few, many = shown
    # At t = 1000, a rounding error of eps is multiplied by 157.
    torch.testing.assert_close(few, many[:3], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    'new, old, less',
    [
        ([10, 20, 50, 100], [10, 20, 50, 100], False),
        ([100], [10, 20, 50, 100], True),
        ([10, 20, 50, 100], [100], False),
        (100, 1000, True),
        ([100], 100, False),  # a file that has only the largest number
    ],
)
def test_a_table_of_fewer_numbers_of_steps_is_less(new, old, less):
    assert cli._is_less(new, old) is less
