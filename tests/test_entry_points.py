"""Entry points: order of arguments, counts, longer runs, initial weights, names, signals, locks."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from pdae_nb import cli, commands, files, hub
from pdae_nb.data import digits, to_signed
from pdae_nb.evaluation import data_of
from pdae_nb.files import locked, stoppable
from pdae_nb.forward import Schedule
from pdae_nb.hub import load, model_card, train
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.pdae import PDAE
from pdae_nb.model import read_model
from pdae_nb.training import Recipe
from pdae_nb.unet import UNet

NET = dict(ch=8, mult=(1, 2), n_res=1, groups=8)
SHORT = dict(data='digits', px=14, images=48, batch=16, lr=2e-3, ema=0.5)
RECIPE = Recipe(DPM, **SHORT, net=NET)


def no_log(message):
    "A log function that drops its message."


def same_weights(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.fixture(scope='module')
def dpm(tmp_path_factory):
    "A trained DPM."
    return train('dpm', RECIPE, out=tmp_path_factory.mktemp('runs') / 'dpm', log=no_log)


# Commands


def test_files_may_come_after_options(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('mine.png', 'yours.png'):
        (tmp_path / name).touch()
    files_of = []

    def inputs(images, model, n, most):
        files_of.append(images)
        return to_signed(digits('test', 28).x[:2]), None, []

    monkeypatch.setattr(commands, 'inputs', inputs)
    words = ['--n', '2', '--steps', '2', '--exact', '--out', 'back.png', 'mine.png', 'yours.png']
    assert cli.main(['reconstruct', 'mnist_dpm', *words]) == 0
    assert cli.main(['reconstruct', 'mnist_dpm', 'mine.png', '--steps', '2', 'yours.png']) == 0
    assert files_of == [('mine.png', 'yours.png')] * 2
    capsys.readouterr()


@pytest.mark.parametrize('value', ['0', '-1'])
@pytest.mark.parametrize(
    'words',
    [
        'sample mnist_dpm --n',
        'reconstruct mnist_dpm --n',
        'reconstruct mnist_dpm --steps',
        'manipulate mnist_pdae --attribute 9 --probe',
        'evaluate mnist_dpm --test-images',
        'reproduce pdae-fig3 --seeds',
        'train mnist_dpm --every',
    ],
)
def test_counts_below_1_are_refused(words, value, capsys, monkeypatch):
    for module in (cli, commands):
        monkeypatch.setattr(module, 'load_run', lambda *a, **k: pytest.fail('the work began'))
    option = words.split()[-1]
    assert cli.main([*words.split(), value]) == 1
    assert f'{option} must be at least 1, got {value}' in capsys.readouterr().err


def test_a_negative_seed_is_refused(capsys):
    assert cli.main(['sample', 'mnist_dpm', '--seed', '-1']) == 1
    assert '--seed must be at least 0, got -1' in capsys.readouterr().err


def test_many_images_are_reconstructed_in_parts(tmp_path, monkeypatch, capsys):
    x0 = to_signed(digits('test', 28).x[:130])
    monkeypatch.setattr(commands, 'inputs', lambda images, model, n, most: (x0[:n], None, []))
    sizes = []
    original = commands.round_trip

    def round_trip(denoiser, part, *args):
        sizes.append(len(part))
        return original(denoiser, part, *args)

    monkeypatch.setattr(commands, 'round_trip', round_trip)
    results = {}
    for n in ('3', '130'):
        out = str(tmp_path / 'x.png')
        assert cli.main(['reconstruct', 'mnist_dpm', '--n', n, '--steps', '2', '--out', out]) == 0
        results[n] = json.loads(capsys.readouterr().out)
    assert sizes == [3, 64, 64, 2]
    assert results['130']['images'] == 130


@pytest.mark.parametrize(
    'text, number',
    [('48', 48), ('2M', 2_000_000), ('1.5m', 1_500_000), ('3k', 3000), ('1_000', 1000)],
)
def test_numbers_of_images(text, number):
    assert cli._number_of(text) == number


@pytest.mark.parametrize('text', ['', 'many', '2G', 'k', 'nan', 'inf'])
def test_other_numbers_of_images_are_refused(text):
    with pytest.raises(ValueError, match='expected a number of images'):
        cli._number_of(text)


def test_timesteps_of_a_cosine_schedule(dpm, tmp_path):
    from pdae_nb.pretrained import to_official

    torch.save(to_official(dpm.net), tmp_path / 'x.pt')
    words = ['--size', '14', '--groups', '8', '--lag', '0', '--cosine', '--timesteps', '250']
    assert cli.main(['convert', str(tmp_path / 'x.pt'), str(tmp_path / 'run'), *words]) == 0
    assert repr(load(tmp_path / 'run').sched) == repr(Schedule.cosine(250))


def test_a_model_without_data_says_so(dpm, tmp_path, capsys):
    model = DPM(dpm.net, dpm.sched, dpm.shape)
    model.save(tmp_path / 'plain')
    with pytest.raises(ValueError, match='no recipe that names its data'):
        data_of(load(tmp_path / 'plain'))
    for words in (['reconstruct'], ['evaluate', '--eval-classifier', '']):
        command, *options = words
        out = str(tmp_path / ('x.png' if command == 'reconstruct' else 'x.json'))
        assert cli.main([command, str(tmp_path / 'plain'), *options, '--out', out]) == 1
        assert 'no recipe that names its data' in capsys.readouterr().err


# Longer runs, initial weights, and bases with several names


def test_a_finished_run_is_continued_with_more_images(tmp_path):
    out = tmp_path / 'run'
    train('dpm', RECIPE, out=out, log=no_log)
    lines = []
    longer = replace(RECIPE, images=96)
    model = train('dpm', longer, out=out, log=lines.append)
    assert 'going on at step 3 of 6' in lines
    assert any('48 images and now has 96' in line for line in lines)
    assert model.card.images_seen == 96
    assert load(out).card.recipe['images'] == 96
    # Without warmup and cooldown, the learning rate does not depend on the length.
    same_weights(model, train('dpm', longer, out=tmp_path / 'at once', log=no_log))


def test_fewer_images_are_another_recipe(tmp_path):
    out = tmp_path / 'run'
    train('dpm', RECIPE, out=out, log=no_log)
    with pytest.raises(ValueError, match='another recipe: images 48 → 32'):
        train('dpm', replace(RECIPE, images=32), out=out, log=no_log)


def test_training_may_start_from_another_run(dpm, tmp_path, monkeypatch):
    seen = []
    original = hub.train_model

    def train_model(model, *args, **options):
        seen.append([p.detach().clone() for p in model.parameters()])
        return original(model, *args, **options)

    monkeypatch.setattr(hub, 'train_model', train_model)
    model = train('on', RECIPE, out=tmp_path / 'on', init=dpm.path, log=no_log)
    for a, b in zip(seen[0], dpm.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert model.card.recipe['init'] == str(dpm.path)
    with pytest.raises(ValueError, match='another recipe: init'):
        train('on', RECIPE, out=tmp_path / 'on', log=no_log)


def test_initial_weights_of_another_class_are_refused(dpm, tmp_path):
    recipe = Recipe(PDAE, **SHORT, base=dpm, encoder=dict(z_dim=4, groups=8))
    with pytest.raises(ValueError, match='must be those of a PDAE, .* is a DPM'):
        train('on', recipe, out=tmp_path / 'on', init=dpm.path, log=no_log)
    assert not (tmp_path / 'on' / 'run.json').exists()


def test_a_base_may_be_named_in_several_ways(dpm, tmp_path, monkeypatch):
    recipe = Recipe(PDAE, **SHORT, encoder=dict(z_dim=4, groups=8))
    out = tmp_path / 'coder'
    monkeypatch.chdir(dpm.path.parent)
    names = ['dpm', './dpm', str(dpm.path), dpm]
    first, *others = (train('coder', recipe, out=out, base=base, log=no_log) for base in names)
    for other in others:
        same_weights(first, other)
    torch.manual_seed(1)
    another = DPM(UNet(c=1, size=14, **NET), Schedule.linear(), (1, 14, 14))
    with pytest.raises(ValueError, match='fingerprint'):
        train('coder', recipe, out=out, base=another, log=no_log)


def test_a_longer_run_needs_checkpoints(tmp_path):
    out = tmp_path / 'run'
    first = train('dpm', RECIPE, out=out, log=no_log)
    shutil.rmtree(out / 'checkpoints')
    with pytest.raises(ValueError, match='has no checkpoints'):
        train('dpm', replace(RECIPE, images=96), out=out, log=no_log)
    same_weights(load(out), first)


def test_a_model_without_result_and_checkpoints_is_evaluated_only(tmp_path, monkeypatch):
    out = tmp_path / 'run'
    first = train('dpm', RECIPE, out=out, log=no_log)
    shutil.rmtree(out / 'checkpoints')
    record = json.loads((out / 'run.json').read_text('utf-8'))
    (out / 'run.json').write_text(json.dumps(record | dict(result=None)), 'utf-8')
    monkeypatch.setattr(hub, 'train_model', lambda *a, **k: pytest.fail('trained again'))
    again = train('dpm', RECIPE, out=out, log=no_log)
    same_weights(again, first)
    assert again.card.result == pytest.approx(first.card.result, abs=1e-5)
    assert load(out).card.result == pytest.approx(first.card.result, abs=1e-5)


@pytest.mark.parametrize('name', ['a/b', '', '..', 'x\udcff', 'a\0b'])
def test_a_name_that_cannot_name_a_run_is_refused_first(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, 'load_images', lambda *a, **k: pytest.fail('the work began'))
    with pytest.raises(ValueError, match='cannot name a run'):
        train(name, RECIPE, out=tmp_path / 'run')


def test_a_base_that_was_changed_in_memory_is_stored(dpm, tmp_path):
    dpm.save(tmp_path / 'base')
    base = load(tmp_path / 'base')
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.1)
    recipe = Recipe(PDAE, **SHORT, encoder=dict(z_dim=4, groups=8), base=base)
    train('coder', recipe, out=tmp_path / 'coder', log=no_log)
    same_weights(load(tmp_path / 'coder').base, base)
    same_weights(load(tmp_path / 'base'), dpm)


class Tied(UNet):
    "A network of a user with tied weights."

    def __init__(self, c, size, **kw):
        super().__init__(c=c, size=size, **kw)
        self.config = dict(c=c, size=size, **kw)
        self.a = torch.nn.Linear(3, 3)
        self.b = torch.nn.Linear(3, 3)
        self.b.weight = self.a.weight


class Infinite(UNet):
    "A network of a user with a buffer that is not finite."

    def __init__(self, c, size, **kw):
        super().__init__(c=c, size=size, **kw)
        self.config = dict(c=c, size=size, **kw)
        self.register_buffer('mask', torch.tensor([0.0, -torch.inf]))


class TooLarge(UNet):
    "A network of a user with a buffer that float16 cannot hold."

    def __init__(self, c, size, **kw):
        super().__init__(c=c, size=size, **kw)
        self.config = dict(c=c, size=size, **kw)
        self.register_buffer('table', torch.tensor([1e5]))


def test_tied_weights_are_stored(tmp_path):
    model = train('tied', RECIPE, out=tmp_path / 'run', build=Tied, log=no_log)
    same_weights(load(tmp_path / 'run', network=Tied), model)


@pytest.mark.parametrize('network', [Infinite, TooLarge])
def test_a_network_that_cannot_be_stored_is_refused_first(network, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, 'train_model', lambda *a, **k: pytest.fail('the work began'))
    with pytest.raises(ValueError, match='too much for torch.float16'):
        train('x', RECIPE, out=tmp_path / 'run', build=network, log=no_log)


@pytest.mark.parametrize('shape', [[1, 200_000, 200_000], [1, 28, 28], [3, 14, 14]])
def test_a_shape_that_is_not_that_of_the_network_is_refused(dpm, tmp_path, shape):
    dpm.save(tmp_path / 'x')
    file = tmp_path / 'x' / 'run.json'
    file.write_text(json.dumps(json.loads(file.read_text('utf-8')) | dict(shape=shape)), 'utf-8')
    with pytest.raises(ValueError, match='is for images of shape'):
        load(tmp_path / 'x')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes')
@pytest.mark.parametrize('name', ['run.json', 'net.safetensors'])
def test_pipes_are_not_read(dpm, tmp_path, name):
    dpm.save(tmp_path / 'x')
    (tmp_path / 'x' / name).unlink()
    os.mkfifo(tmp_path / 'x' / name)
    with pytest.raises(ValueError, match='no regular file'):
        read_model(tmp_path / 'x', None)


def test_temporary_files_of_others_are_kept(tmp_path):
    out = tmp_path / 'run'
    train('dpm', RECIPE, out=out, log=no_log)
    (out / '.notes.tmp').write_text('notes', 'utf-8')
    (out / '.run.json.123.tmp').touch()
    (out / 'log.txt').write_text('mine', 'utf-8')
    (out / '.lock').write_text('text', 'utf-8')
    train('dpm', replace(RECIPE, images=96), out=out, log=no_log)
    assert (out / '.notes.tmp').read_text('utf-8') == 'notes'
    assert (out / '.lock').read_text('utf-8') == 'text'
    assert not (out / '.run.json.123.tmp').exists()


def test_a_model_that_cannot_be_replaced_whole_is_no_mixture(dpm, tmp_path, monkeypatch):
    import pdae_nb.model as module

    out = tmp_path / 'coder'
    recipe = Recipe(PDAE, **SHORT, encoder=dict(z_dim=4, groups=8), base=dpm)
    train('coder', recipe, out=out, log=no_log)
    written = []
    original = module.write_tensors

    def second_fails(path, tensors, *a):
        if path.parent == out:
            written.append(path.name)
        if len(written) == 2:
            raise OSError(28, 'No space left on device')
        return original(path, tensors, *a)

    longer = replace(recipe, images=96)
    with monkeypatch.context() as patch:
        patch.setattr(module, 'write_tensors', second_fails)
        with pytest.raises(OSError):
            train('coder', longer, out=out, log=no_log)
    assert not (out / 'run.json').exists()
    model = train('coder', longer, out=out, log=no_log)  # from the last checkpoint
    assert model.card.images_seen == 96


# Signals, locks, replaced folders


def test_a_second_signal_interrupts():
    with pytest.raises(KeyboardInterrupt), stoppable() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


@pytest.mark.skipif(files.fcntl is None, reason='no file locks')
def test_a_run_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(37, 'No locks available')

    monkeypatch.setattr(files.fcntl, 'flock', flock)
    with pytest.warns(UserWarning, match='without locks'), locked(tmp_path / 'run'):
        assert (tmp_path / 'run').is_dir()


def test_a_cached_run_waits_for_another_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path))

    def train_alone(name, recipe, out, log):
        with locked(out):
            return time.monotonic()

    monkeypatch.setattr(hub, 'train', train_alone)
    out = tmp_path / 'runs' / 'mnist_dpm-smoke'
    released = []
    ready = threading.Event()

    def other():
        with locked(out):
            ready.set()
            time.sleep(1.5)
            released.append(time.monotonic())

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    began = hub.cached_run('mnist_dpm', 'smoke')
    thread.join()
    assert began > released[0]
    assert 'waiting for another process' in capsys.readouterr().out


def test_a_folder_that_is_replaced_while_it_is_read(dpm, tmp_path, monkeypatch):
    "The weights and the description are of one version."
    import pdae_nb.model as module

    folder = tmp_path / 'x'
    dpm.save(folder)
    other = DPM(UNet(c=1, size=14, **NET), Schedule.linear(500), (1, 14, 14))
    replaced = []
    original = module.read_sched

    def read_sched(path):
        if not replaced:
            replaced.append(1)
            other.save(folder)  # the weights have been read, the schedule has not
        return original(path)

    monkeypatch.setattr(module, 'read_sched', read_sched)
    try:
        got = read_model(folder, None)
    except ValueError as e:
        assert 'run.json says' in str(e)  # noticed
    else:
        same_weights(got, load(folder))


def test_leftovers_of_killed_processes_are_removed(dpm, tmp_path):
    names = ['.x[1].123.tmp', '.x[1].456.tmp', '.x1.123.tmp', '.x[1].old.tmp']
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'net.safetensors').touch()
        if '456' not in name:  # a process that is writing now
            os.utime(tmp_path / name, (0, 0))
    model = DPM(dpm.net, dpm.sched, dpm.shape)
    model.save(tmp_path / 'x[1]')
    assert {path.name for path in tmp_path.iterdir()} == {'x[1]', *names[1:]}


# Texts from files


def test_texts_of_a_model_card_are_escaped(dpm):
    model = DPM(dpm.net, dpm.sched, dpm.shape)
    model.card = replace(
        dpm.card, name='<b>x</b>', source='a|b\n---\n<script>', result={'<i>|': 1.0}
    )
    text = model_card(model, licence='x\nfoo: bar')
    assert '<b>' not in text
    assert '<script>' not in text
    assert '<i>' not in text
    head = text.split('---')[1]
    assert 'license: "x\\nfoo: bar"' in head
    assert '\nfoo:' not in head
