"""One's own pictures: methods by name, sizes, encoders, codes, directions, and bad input."""

import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from own_pictures import picture, write_pictures
from PIL import Image
from safetensors import safe_open

import pdae_nb
from pdae_nb import cli, commands, evaluation, hub, training
from pdae_nb.data import Images, as_x0, load_images, to_signed
from pdae_nb.decode import picture_files
from pdae_nb.forward import Schedule
from pdae_nb.hub import find_recipe, load, train
from pdae_nb.methods.dpm import DPM, DPMSettings
from pdae_nb.methods.latent import LatentDPM, encode_all
from pdae_nb.methods.pdae import PDAE
from pdae_nb.methods.scorevae import ScoreVAE
from pdae_nb.networks import ENCODERS, ConvEncoder
from pdae_nb.own import (
    METHODS,
    ROWS,
    SIDES,
    _say_if_small,
    check_px,
    own_data,
    own_recipe,
    px_for,
    recipe_for,
    row_for,
    unet_for,
)
from pdae_nb.pictures import direction, encode, read_codes
from pdae_nb.solvers import round_trip
from pdae_nb.splits import DataOptions
from pdae_nb.training import Recipe, duration
from pdae_nb.unet import UNet

pytestmark = pytest.mark.filterwarnings('ignore:.*held out for the test')


def no_log(message):
    "A log function that drops its message."


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    "The cache of this module's tests, instead of the user's own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PDAE_NB_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Folder of 40 pictures; beside it are labels.csv and me.jpg."
    return write_pictures(tmp_path_factory.mktemp('own'))


@pytest.fixture(scope='module')
def labels(photos):
    return DataOptions(labels=str(photos.parent / 'labels.csv'))


@pytest.fixture(scope='module')
def dpm(photos, labels, tmp_path_factory):
    "A DPM of the pictures, after two steps."
    recipe = find_recipe('dpm', size='smoke', data=photos, px=16, options=labels, log=no_log)
    return short(recipe, tmp_path_factory.mktemp('runs') / 'mine')


@pytest.fixture(scope='module')
def coder(dpm):
    "A PDAE on the DPM, after two steps."
    recipe = find_recipe('pdae', size='smoke', base=dpm, log=no_log)
    return short(recipe, dpm.path.parent / 'coder')


def short(recipe, out):
    "Two steps of a training."
    return train(out.name, replace(recipe, images=2 * recipe.batch), out=out, log=no_log)


@pytest.fixture
def untrained(monkeypatch):
    "The recipes of trainings, which are not carried out."
    recipes = []

    def train_model(model, recipe, *args, **options):
        recipes.append(recipe)
        return model

    monkeypatch.setattr(hub, 'train_model', train_model)
    return recipes


# Encoders


def test_the_published_encoders_come_out():
    assert ENCODERS[128] == ((64, 128, 256, 256, 256), 3)
    assert ENCODERS[64] == ((64, 128, 128, 128), 2)
    assert ENCODERS[32] == ((32, 64, 128), 2)
    assert ENCODERS[28] == ((32, 64, 128), 2)
    assert ENCODERS[16] == ((32, 64), 1)
    assert ENCODERS[14] == ((32, 64), 1)
    assert set(ENCODERS) == {14, 28, *range(16, 257, 8)}


@pytest.mark.parametrize('size', sorted(ENCODERS))
def test_an_encoder_of_each_size(size):
    with torch.device('meta'):
        encoder = ConvEncoder(3, size, 6)
        assert encoder(torch.zeros(2, 3, size, size)).shape == (2, 6)


def test_pdae_at_256_pixels_builds():
    with torch.device('meta'):
        net = UNet(c=3, size=256, **unet_for(256, row_for(256, 'paper')))
    dpm = DPM(net, Schedule.linear(), (3, 256, 256))
    pictures = Images(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    with torch.device('meta'):
        model = PDAE.build(recipe_for('pdae', 'x', 256, 200, 'paper'), pictures, dpm)
        assert model.enc(torch.zeros(1, 3, 256, 256)).shape == (1, 512)
    assert model.G.config['size'] == 256


# Sizes


@pytest.mark.parametrize('px', [0, 8, 15, 24.5, 50, 264, 1024])
def test_other_sizes_are_refused(px):
    with pytest.raises(ValueError, match=r'multiple of 8 from 16 to 256, got .* nearest sizes'):
        check_px(px)


@pytest.mark.parametrize('size', ROWS)
@pytest.mark.parametrize('px', SIDES)
def test_each_size_has_a_network(px, size):
    row = row_for(px, size)
    net = unet_for(px, row)
    levels = [px // 2**k for k in range(len(row.mult))]
    assert px % 2 ** (len(row.mult) - 1) == 0
    assert net['attn'][0] in levels
    if px in (16, 32, 64, 128, 256) and size != 'smoke':
        assert net['attn'] == (16,)


def test_pixels_fit_the_pictures():
    assert px_for([]) == 64
    assert px_for([100, 70, 300]) == 64
    assert px_for([45, 50, 300]) == 48
    assert px_for([3, 4, 5]) == 16


def test_the_number_of_pictures_gives_the_length():
    lengths = [recipe_for('dpm', 'x', 64, n).images for n in (10, 200, 1000, 10**7)]
    assert lengths == [50_000, 50_000, 250_000, 5_000_000]
    assert recipe_for('dpm', 'x', 64, 200).settings == DPMSettings('v')
    batches = [recipe_for('dpm', 'x', px, 200).batch for px in (16, 64, 128, 256)]
    assert batches == sorted(batches, reverse=True)


@pytest.mark.parametrize('name', sorted(METHODS))
def test_each_method_builds(name, dpm, coder):
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    pictures = Images(pixels, torch.tensor([0, 1]), ['a', 'b'])
    base = {'': None, 'a DPM': dpm, 'an autoencoder': coder}[METHODS[name].base]
    recipe = recipe_for(name, 'x', 16, 200, 'smoke', base=base)
    model = recipe.method.build(recipe, pictures, base)
    assert type(model) is METHODS[name].cls
    assert model.shape == ((16,) if name == 'latent' else (3, 16, 16))


@pytest.mark.parametrize('px', [28, 64, 104, 168, 256])
def test_the_network_of_a_latent_dpm_depends_on_the_size(px):
    "At 28, 104 and 168 pixels, the U-Net has fewer levels than its row of the table."
    layers = {
        size: tuple(recipe_for('latent', 'x', px, 200, size).net.values())
        for size in ('smoke', 'lesson', 'paper')
    }
    lesson = (384, 8) if px == 28 else (1024, 4)
    assert layers == dict(smoke=(64, 4), lesson=lesson, paper=(2048, 10))


def test_a_latent_dpm_of_wide_codes_has_the_recipe_of_the_table():
    own = recipe_for('latent', 'x', 64, 10**6)
    table = pdae_nb.recipe('celeba64_pdae_latent', 'lesson')
    assert (own.net, own.images, own.batch) == (table.net, table.images, table.batch)


# Recipes


def test_data_and_pixels_are_those_of_the_base(dpm, photos, labels, untrained):
    train('pdae', base=dpm.path, size='smoke', out=dpm.path.parent / 'next', log=no_log)
    (recipe,) = untrained
    assert (recipe.data, recipe.px, recipe.options) == (str(photos), 16, labels)
    assert recipe.encoder['z_dim'] == 16


def test_the_pixels_are_chosen(photos):
    recipe = find_recipe('dpm', size='smoke', data=photos, log=no_log)
    assert recipe.px == 28
    assert recipe.method is DPM
    assert recipe.data == str(photos)


def test_labels_in_the_folder_of_the_pictures(photos, tmp_path):
    folder = tmp_path / 'photos'
    shutil.copytree(photos, folder)
    shutil.copy(photos.parent / 'labels.csv', folder)
    options = DataOptions(labels='labels.csv')
    recipe = find_recipe('dpm', size='smoke', data=folder, px=16, options=options, log=no_log)
    assert recipe.options.labels == str(folder / 'labels.csv')


def test_data_of_a_run_of_the_table(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    recipe = find_recipe('celeba64_dpm', size='lesson', data='photos', px=32)
    assert (recipe.data, recipe.px, recipe.batch) == (str(photos), 32, 256)


def test_a_method_takes_its_name_from_the_folder(dpm):
    assert dpm.card.name == 'mine'
    assert load(dpm.path).card.recipe['options'] == dict(
        labels=dpm.card.recipe['options']['labels']
    )


def test_initial_weights_give_networks_and_prediction(dpm, photos, untrained, tmp_path):
    other = Recipe(DPM, 'digits', 16, 16, net=dict(ch=8, mult=(1, 3), n_res=1, groups=8), batch=8)
    pictures = load_images(photos, 'train', 16)
    torch.manual_seed(0)
    parent = DPM.build(other, pictures)
    parent.save(tmp_path / 'parent')
    recipe = find_recipe('dpm', size='smoke', data=photos, init=tmp_path / 'parent', log=no_log)
    assert recipe.px == 16
    train('dpm', recipe, init=tmp_path / 'parent', out=tmp_path / 'fine', log=no_log)
    (used,) = untrained
    assert used.net['mult'] == (1, 3)
    assert used.settings is None  # eps, as the parent; the usual choice for own pictures is v
    assert used.lr == ROWS['smoke'][0].lr / 2


def test_the_base_is_that_of_the_parent(coder, dpm, untrained, tmp_path):
    train('pdae', size='smoke', init=coder.path, out=tmp_path / 'fine', log=no_log)
    (recipe,) = untrained
    assert recipe.base.path == dpm.path
    assert recipe.px == 16


def test_a_latent_dpm_of_own_codes(coder, untrained, tmp_path):
    model = train('latent', base=coder, size='smoke', out=tmp_path / 'latent', log=no_log)
    assert isinstance(model, LatentDPM)
    assert model.shape == (16,)
    assert untrained[0].images == 2048


def test_scorevae_by_name(dpm, labels, untrained, tmp_path):
    own = dict(size='smoke', out=tmp_path / 'score', log=no_log)
    with pytest.raises(ValueError, match='at least 8 and 20 are needed.*--hold-out, now 0.1'):
        train('scorevae', base=dpm, **own)
    model = train('scorevae', base=dpm, options=dict(hold_out=0.6), **own)
    assert isinstance(model, ScoreVAE)
    assert untrained[0].options == replace(labels, hold_out=0.6)


def test_the_data_are_those_of_the_parent_unless_a_base_is_named(coder, photos, labels):
    parent = load(coder.path)
    parent.base.card.recipe = dict(data='digits')
    recipe = own_recipe('pdae', size='smoke', parent=parent, log=no_log)
    assert (recipe.data, recipe.options) == (str(photos), labels)
    assert recipe.base is parent.base
    recipe = own_recipe('pdae', size='smoke', parent=parent, base=coder.base, log=no_log)
    assert recipe.base is coder.base


def test_options_of_the_base_are_kept_for_its_own_folder(dpm, photos, labels, tmp_path):
    said = []
    own = dict(size='smoke', base=dpm, log=said.append)
    assert find_recipe('pdae', data=photos, **own).options == labels
    kept = find_recipe('pdae', data=photos, options=dict(hold_out=0.3), **own).options
    assert kept == replace(labels, hold_out=0.3)
    assert find_recipe('pdae', options=DataOptions(), **own).options == DataOptions()
    assert not [line for line in said if 'not used' in line]
    shutil.copytree(photos, tmp_path / 'others')
    assert find_recipe('pdae', data=tmp_path / 'others', **own).options == DataOptions()
    (line,) = [line for line in said if 'not used' in line]
    assert str(tmp_path / 'others') in line and 'labels.csv' in line


def test_an_option_can_be_given_its_usual_value(dpm, photos, tmp_path):
    other = tmp_path / 'other.csv'
    shutil.copy(photos.parent / 'labels.csv', other)
    base = load(dpm.path)
    labels = base.card.recipe['options']['labels']
    stored = dict(labels=labels, columns=['Smiling'], range=[0, 255], hold_out=0.3)
    base.card.recipe['options'] = stored
    own = dict(px=None, model=base, log=no_log)
    assert own_data(None, options=None, **own).options == DataOptions.of(stored)
    changed = own_data(None, options=dict(range=None, hold_out=0.1), **own).options
    assert changed == DataOptions(labels=labels, columns=('Smiling',))
    changed = own_data(None, options=dict(labels=str(other)), **own).options
    assert changed == DataOptions(labels=str(other), range=(0, 255), hold_out=0.3)
    with pytest.raises(ValueError, match="expected options among .*'colour'"):
        own_data(None, options=dict(colour=1), **own)


def test_the_command_line_gives_single_options(dpm, photos, monkeypatch, untrained, tmp_path):
    words = ['train', 'pdae', '--base', str(dpm.path), '--hold-out', '0.3', '--size', 'smoke']
    assert cli.main([*words, '--out', str(tmp_path / 'out')]) == 0
    assert untrained[0].options.hold_out == 0.3
    assert untrained[0].options.labels == str(photos.parent / 'labels.csv')


def test_usual_pixels_of_data_sets_and_of_named_folders(photos, monkeypatch, tmp_path):
    shutil.copytree(photos, tmp_path / 'data/mine')
    monkeypatch.setenv('PDAE_NB_DATA', str(tmp_path / 'data'))
    said = []
    own = dict(px=None, options=None, model=None, log=said.append)
    assert own_data('mnist', **own).px == 28
    assert own_data('digits', **own).px == 16
    assert own_data('mine', **own) == ('mine', 28, DataOptions())
    assert own_data(tmp_path / 'data/mine', **own).px == 28
    assert not said
    with pytest.raises(ValueError, match='got 0; the nearest'):
        own_data('mine', **own | dict(px=0))


@pytest.mark.parametrize(
    'side, px, said',
    [
        (100, 64, None),
        (64, 64, None),
        (100, 128, '40 of 40 .* 128 pixels, and are enlarged; with --px 96, 40 of them'),
        (63, 64, 'with --px 56, 40 of them are large enough'),
        (9, 14, '40 of 40 pictures are smaller than 14 pixels, and are enlarged$'),
    ],
)
def test_the_advice_on_small_pictures_is_true(side, px, said):
    lines = []
    _say_if_small('photos', [side] * 40, px, lines.append)
    assert (lines == []) if said is None else re.search(said, lines[0])


@pytest.mark.parametrize('n', [24, 30, 40])
def test_a_small_folder_is_accepted(n, tmp_path):
    photos = write_pictures(tmp_path / 'few', n)
    recipe = find_recipe('dpm', size='smoke', data=photos, px=16, log=no_log)
    assert len(load_images(recipe.data, 'test', 16)) >= 2


# Forecast


def test_durations_in_words():
    assert duration(0.1) == '1 s'
    assert duration(89) == '89 s'
    assert duration(600) == '10 min'
    assert duration(10 * 3600) == '10.0 h'
    assert duration(72 * 3600) == '3.0 days'


def test_a_forecast_after_20_steps_and_every_10_steps(dpm):
    lines = []
    bar = training.tqdm(total=60, disable=True)
    shown = []
    bar.set_postfix_str = lambda text, refresh: shown.append(text)
    run = SimpleNamespace(recipe=replace(Recipe(DPM, 'x', 16, 60 * 4), batch=4), model=dpm)
    forecast = training._Forecast(run, lines.append, bar)
    for i in range(1, 61):
        forecast.add(SimpleNamespace(i=i, seconds=3.0 if i < 11 else 60.0))
    (line,) = lines
    assert '60 s per step: about 40 min for the other 40 steps on this machine' in line
    assert shown == [f'about {n} min left' for n in (40, 30, 20, 10)]


@pytest.mark.slow
def test_training_reports_the_expected_time(photos, tmp_path):
    shown = []
    bars = training.tqdm

    class Bar(bars):
        def set_postfix_str(self, s='', refresh=True):
            shown.append(s)

    training.tqdm, lines = Bar, []
    try:
        recipe = find_recipe('dpm', size='smoke', data=photos, px=14, log=no_log)
        recipe = replace(recipe, images=31 * 4, batch=4)
        train('mine', recipe, out=tmp_path / 'run', log=lines.append)
    finally:
        training.tqdm = bars
    (line,) = [line for line in lines if 's per step' in line]
    assert 'for the other 11 steps on this machine' in line
    assert len(shown) == 2 and all(text.endswith('left') for text in shown)


# Codes and directions


@pytest.mark.parametrize('suffix', ['csv', 'npz', 'safetensors'])
def test_a_row_for_each_file(coder, photos, tmp_path, suffix):
    written = encode(coder, photos, tmp_path / f'codes.{suffix}', no_log)
    table = read_codes(written.path)
    assert table.files == sorted(path.name for path in photos.iterdir())
    assert table.z.shape == (40, 16)
    one = encode(coder, photos / table.files[7], tmp_path / f'one.{suffix}', no_log)
    torch.testing.assert_close(read_codes(one.path).z, table.z[7:8], rtol=1e-4, atol=1e-5)


def test_codes_are_those_of_the_training_data(coder, photos, tmp_path):
    table = read_codes(encode(coder, photos, tmp_path / 'codes.npz', no_log).path)
    train_set = load_images(photos, 'train', 16)
    rows = [table.files.index(name) for name in train_set.names]
    codes = coder.encode(train_set.x / 127.5 - 1)
    torch.testing.assert_close(table.z[rows], codes, rtol=1e-4, atol=1e-5)


def test_few_pictures_are_in_memory_at_once(coder, tmp_path, monkeypatch):
    folder = tmp_path / 'many'
    folder.mkdir()
    for k in range(150):
        picture(0).save(folder / f'{k}.png')
    sizes = []
    original = type(coder).encode

    def encoding(self, x0):
        sizes.append(len(x0))
        return original(self, x0)

    monkeypatch.setattr(type(coder), 'encode', encoding)
    encode(coder, folder, tmp_path / 'codes.safetensors', no_log)
    assert sizes == [64, 64, 22]


@pytest.mark.parametrize('bits, said', [(16, None), (12, 'are clipped'), (None, 'up to 200')])
def test_a_file_is_encoded_as_the_training_pictures(coder, tmp_path, bits, said):
    "The bits of grey values are those of the training pictures, not those of each file."
    model = load(coder.path)
    model.card.decoding = dict(bits=bits, crop=None)
    ramp = np.linspace(0, 1, 900).reshape(30, 30)
    for name, top in (('dark', 200), ('light', 60_000)):
        (tmp_path / 'grey').mkdir(exist_ok=True)
        Image.fromarray((ramp * top).astype(np.uint16)).save(tmp_path / f'grey/{name}.png')
    lines = []
    found = read_codes(encode(model, tmp_path / 'grey', tmp_path / 'c.npz', lines.append).path)
    x0 = [as_x0(tmp_path / f'grey/{name}', 16, 3, no_log, bits=bits) for name in found.files]
    torch.testing.assert_close(found.z, model.encode(torch.cat(x0)), rtol=1e-4, atol=1e-5)
    if bits == 16:
        assert x0[0].max() == -1 and x0[1].max() > 0.8
    assert lines == [] if said is None else any(said in line for line in lines)


def test_remarks_on_values_are_counted(coder, tmp_path):
    for k in range(70):
        Image.new('RGBA', (20, 20), (0, 0, 0, 0)).save(tmp_path / f'{k}.png')
    lines = []
    encode(coder, tmp_path, tmp_path / 'c.npz', lines.append)
    assert lines == ['70 of 70 pictures: transparent pixels are shown on white']


@pytest.mark.parametrize('suffix', ['csv', 'npz', 'safetensors'])
def test_names_in_tables_are_those_of_the_files(coder, photos, tmp_path, suffix):
    names = ['Bildschirmfoto 12.00.00\u202fPM.png', 'tab\t"quote",.png', 'y.ä.png']
    wanted = list(names)
    if os.name != 'nt':
        names.append(os.fsdecode(b'z\xff.png'))
        wanted.append('z\\udcff.png')
    else:
        del names[1], wanted[1]
    (tmp_path / 'odd').mkdir()
    for name in names:
        shutil.copy(photos / '00.png', tmp_path / 'odd' / name)
    written = encode(coder, tmp_path / 'odd', tmp_path / f'codes.{suffix}', no_log)
    assert read_codes(written.path).files == wanted


def test_the_header_of_a_table_does_not_grow_with_the_names(coder, tmp_path):
    (tmp_path / 'p').mkdir()
    for k in range(30):
        picture(0).save(tmp_path / 'p' / f'{"long" * 50}{k}.png')
    path = encode(coder, tmp_path / 'p', tmp_path / 'c.safetensors', no_log).path
    assert int.from_bytes(path.read_bytes()[:8], 'little') < 600
    with safe_open(path, 'pt') as file:
        assert set(file.keys()) == {'codes', 'files', 'ends'}
        assert set(file.metadata()) == {'model', 'fingerprint'}


def test_each_picture_has_one_name(coder, tmp_path, monkeypatch):
    for k, place in enumerate(('x/photos', 'y/photos', 'z')):
        (tmp_path / place).mkdir(parents=True)
        picture(k).save(tmp_path / place / '1.png')
    monkeypatch.chdir(tmp_path)

    def names(*paths):
        return [file.name for file in picture_files(paths)]

    assert names('x') == ['photos/1.png']
    assert names('x/photos', 'z') == ['photos/1.png', 'z/1.png']
    assert names('x/photos', 'y/photos') == ['x/photos/1.png', 'y/photos/1.png']
    assert names('z', 'z/1.png', tmp_path / 'z') == ['z/1.png']
    assert names('z/1.png', 'z/../z/1.png') == ['z/1.png']
    written = encode(coder, ['x/photos', 'y/photos', 'y/photos/1.png'], 'c.csv', no_log)
    assert read_codes(written.path).files == ['x/photos/1.png', 'y/photos/1.png']
    with pytest.raises(FileNotFoundError, match='no picture or folder nowhere'):
        names('x', 'nowhere')


def test_files_that_cannot_be_read_are_left_out(coder, photos, tmp_path, capsys):
    folder = tmp_path / 'photos'
    shutil.copytree(photos, folder)
    (folder / 'broken.png').write_bytes(b'no picture')
    words = ['encode', str(coder.path), str(folder), '--out', str(tmp_path / 'codes.csv')]
    assert cli.main(words) == 1
    assert '1 could not be read: broken.png' in capsys.readouterr().err
    assert len(read_codes(tmp_path / 'codes.csv').files) == 40


def test_an_interrupted_encoding_leaves_the_old_table(coder, photos, tmp_path, monkeypatch):
    out = tmp_path / 'codes.csv'
    encode(coder, photos, out, no_log)
    before = out.read_bytes()

    def interrupted(path, *args):
        path.write_bytes(b'file,z0\n0')
        raise KeyboardInterrupt

    monkeypatch.setitem(pdae_nb.pictures._WRITERS, '.csv', interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(coder, photos, out, no_log)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ['codes.csv']


@pytest.fixture
def fits(monkeypatch):
    "The arguments of each fit of a direction."
    calls = []
    original = pdae_nb.pictures.fit_direction

    def fit(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(pdae_nb.pictures, 'fit_direction', fit)
    return calls


def test_directions_of_own_attributes_are_cached(coder, fits, monkeypatch, tmp_path):
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path))
    first = direction(coder, 'Smiling', log=no_log)
    assert len(fits) == 1
    again = direction(coder, 'Smiling', log=no_log)
    assert len(fits) == 1
    assert torch.equal(first.probe.w, again.probe.w)
    assert first[1:] == again[1:]
    monkeypatch.setattr(pdae_nb.pictures, '_C', 1.0)
    assert not torch.equal(direction(coder, 'Smiling', log=no_log).probe.w, first.probe.w)
    monkeypatch.setattr(pdae_nb.pictures, '_FORMAT', 99)
    direction(coder, 'Smiling', log=no_log)
    assert len(fits) == 3


def test_an_unknown_attribute_lists_the_known_ones(coder):
    with pytest.raises(ValueError, match="did you mean 'Smiling'. there are Smiling, Male"):
        direction(coder, 'Smilng', log=no_log)
    with pytest.raises(ValueError, match='there are Smiling, Male'):
        direction(coder, None, log=no_log)


def test_labels_of_another_file(coder, photos, tmp_path):
    lines = ['file,first', *(f'{path.name},{int(path.name < "20")}' for path in photos.iterdir())]
    (tmp_path / 'other.csv').write_text('\n'.join(lines), 'utf-8')
    found = direction(coder, 'first', tmp_path / 'other.csv', log=no_log)
    train_names = load_images(photos, 'train', 16).names
    assert found.positives == sum(name < '20' for name in train_names)
    assert found.labels == len(train_names)
    with pytest.raises(FileNotFoundError, match='there is no file'):
        direction(coder, 'first', tmp_path / 'no.csv', log=no_log)


def test_labels_of_another_file_without_the_subjects(coder, photos, tmp_path):
    "The pictures are those of the training, although the other file has no column of subjects."
    rows = [f'{path.name},{k // 4},{k % 2}' for k, path in enumerate(sorted(photos.iterdir()))]
    (tmp_path / 'own.csv').write_text('\n'.join(['file,who,odd', *rows]), 'utf-8')
    rows = [f'{path.name},{int(path.name < "20")}' for path in photos.iterdir()]
    (tmp_path / 'other.csv').write_text('\n'.join(['file,first', *rows]), 'utf-8')
    model = load(coder.path)
    own = DataOptions(labels=str(tmp_path / 'own.csv'), columns=('odd',), group='who')
    model.card.recipe['options'] = own.as_json()
    found = direction(model, 'first', tmp_path / 'other.csv', log=no_log)
    names = load_images(photos, 'train', 16, options=own).names
    assert (found.labels, found.positives) == (len(names), sum(name < '20' for name in names))
    assert set(names) != set(load_images(photos, 'train', 16).names)


def test_a_direction_of_grey_pictures_in_a_model_of_colours(coder, tmp_path):
    for k in range(30):
        place = tmp_path / 'grey' / ('a' if k % 2 else 'b')
        place.mkdir(parents=True, exist_ok=True)
        picture(k).convert('L').save(place / f'{k}.png')
    model = load(coder.path)
    model.card.recipe |= dict(data=str(tmp_path / 'grey'), options={})
    assert load_images(tmp_path / 'grey', 'train', 16).x.shape[1] == 1
    assert direction(model, 'a', log=no_log).probe.w.shape == (16,)


def test_a_direction_is_refused_before_the_pictures_are_read(coder, dpm, monkeypatch):
    monkeypatch.setattr(pdae_nb.pictures, 'load_images', lambda *a, **k: pytest.fail('read'))
    with pytest.raises(ValueError, match='is a DPM: it has no encoder'):
        direction(dpm, 'Smiling')
    for n in (0, -1):
        with pytest.raises(ValueError, match=f'at least 1 training picture, got {n}'):
            direction(coder, 'Smiling', n=n)


def test_training_pictures_are_encoded_in_parts(coder, monkeypatch):
    sizes = []

    def encoding(enc, images, bs):
        sizes.append(bs)
        return encode_all(enc, images, bs)

    monkeypatch.setattr(pdae_nb.pictures, 'encode_all', encoding)
    monkeypatch.setattr(type(coder), 'batch_size', lambda self, n, most=None: 7)
    direction(coder, 'Male', log=no_log)
    assert sizes == [7]


def test_an_attribute_that_all_pictures_have(coder, photos, tmp_path):
    lines = ['file,all', *(f'{path.name},1' for path in photos.iterdir())]
    (tmp_path / 'all.csv').write_text('\n'.join(lines), 'utf-8')
    with pytest.raises(ValueError, match="training pictures have the attribute 'all'"):
        direction(coder, 'all', tmp_path / 'all.csv', log=no_log)


@pytest.mark.parametrize('command', ['reconstruct', 'interpolate', 'manipulate'])
def test_relative_paths_and_the_home_folder(command, coder, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.chdir(photos.parent)
    shutil.copy(photos.parent / 'me.jpg', tmp_path / 'me.jpg')
    words = [command, str(coder.path), 'photos/01.jpg', '~/me.jpg', '--steps', '2']
    words += ['--attribute', 'Male'] if command == 'manipulate' else []
    assert cli.main([*words, '--out', '~/out.png']) == 0, capsys.readouterr().err
    assert (tmp_path / 'out.png').exists()


@pytest.mark.parametrize('command', ['reconstruct', 'manipulate'])
def test_given_pictures_are_cut_and_computed_in_parts(
    command, coder, photos, tmp_path, monkeypatch, capsys
):
    decoded = []
    parts = []
    original = evaluation.as_x0

    def decoding(file, *args, **options):
        decoded.append(file.name)
        return original(file, *args, **options)

    def batch(self, x0, condition=None, **options):
        parts.append(len(x0))
        return PDAE.infer_xT(self, x0, condition, **options)

    def trip(denoiser, x0, *args):
        parts.append(len(x0))
        return round_trip(denoiser, x0, *args)

    class Counted(PDAE):
        infer_xT = batch

    def counted(*args):
        model = load(coder.path)
        model.__class__ = Counted
        return model

    monkeypatch.setattr(evaluation, 'as_x0', decoding)
    monkeypatch.setattr(commands, 'round_trip', trip)
    monkeypatch.setattr(commands, '_autoencoder', counted)
    monkeypatch.setattr(PDAE, 'batch_size', lambda self, n, most=None: 2)
    run = getattr(commands, f'cmd_{command}')
    own = dict(attribute='Male') if command == 'manipulate' else {}
    out = tmp_path / 'out.png'
    assert run(str(coder.path), str(photos), n=5, steps=2, out=out, **own)['images'] == 5
    assert decoded == sorted(path.name for path in photos.iterdir())[:5]
    assert parts == [2, 2, 1]


def test_manipulated_parts_are_those_of_one_batch(coder, photos, monkeypatch):
    x0 = to_signed(load_images(photos, 'test', 16).x[:3])
    towards = direction(coder, 'Male', log=no_log)
    scales = [0.2, torch.tensor([0.1, -0.3, 0.4])]
    whole = pdae_nb.manipulate(coder, x0, towards.probe, scales, 3)
    monkeypatch.setattr(PDAE, 'batch_size', lambda self, n, most=None: 2)
    parts = commands._manipulated(coder, x0, towards.probe, scales, 3)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


def test_a_manipulation_states_its_rows(coder, photos, tmp_path):
    me = str(photos / '01.jpg')
    own = dict(attribute='Male', steps=2, out=tmp_path / 'out.png')
    said = commands.cmd_manipulate(str(coder.path), me, scales='-.1,.25', **own)
    assert (said['scales'], said['steps']) == ([-0.1, 0.25], 2)


@pytest.mark.parametrize(
    'words, said',
    [
        ('--attribute Male --scales .1,0.1', 'different labels, got s = 0.1, s = 0.1'),
        ('--attribute Male --scales 0,nan', "must be finite numbers .* got '0,nan'"),
        ('--attribute Male --scales inf', 'must be finite numbers'),
        ('--attribute Male --n 0', 'n must be at least 1, got 0'),
        ('--attribute Male --steps 0', 'steps must be at least 1, got 0'),
        ('--attribute Male --probe 0', 'probe must be at least 1, got 0'),
        ('', 'needs --attribute NAME'),
        ('--attribute Male nowhere.jpg', 'no picture or folder nowhere.jpg'),
    ],
)
def test_manipulations_are_refused_before_the_run_is_loaded(words, said, monkeypatch, capsys):
    monkeypatch.setattr(commands, 'load_run', lambda *a: pytest.fail('the run was loaded'))
    assert cli.main(['manipulate', 'run', *words.split()]) == 1
    assert re.search(said, capsys.readouterr().err)


def test_inputs_are_read_before_the_training_pictures(coder, tmp_path, monkeypatch, capsys):
    (tmp_path / 'torn.png').write_bytes(b'no picture')
    monkeypatch.setattr(pdae_nb.pictures, 'load_images', lambda *a, **k: pytest.fail('read'))
    words = ['manipulate', str(coder.path), str(tmp_path / 'torn.png'), '--attribute', 'Male']
    assert cli.main(words) == 1
    assert 'none of 1 pictures could be read' in capsys.readouterr().err


def test_names_with_dollars_are_no_formulas(coder, photos, tmp_path, monkeypatch):
    shutil.copytree(coder.path.parent, tmp_path / 'runs')
    (tmp_path / 'runs/coder').rename(tmp_path / r'runs/$\frac{$')
    for name in ('a$_$.jpg', 'b$\\x$.jpg' if os.name != 'nt' else 'b$^$.jpg'):
        shutil.copy(photos / '01.jpg', tmp_path / name)
    monkeypatch.chdir(tmp_path)
    run = r'runs/$\frac{$'
    files = sorted(str(path.name) for path in tmp_path.glob('*.jpg'))
    own = dict(steps=2, out='out.png')
    assert commands.cmd_reconstruct(run, *files, **own)['images'] == 2
    assert commands.cmd_interpolate(run, *files, n=2, **own)['stops'] == 2
    assert commands.cmd_manipulate(run, files[0], attribute='Male', **own)['images'] == 1


def test_few_of_many_unreadable_files_are_named(coder, photos, tmp_path, capsys):
    shutil.copy(photos / '01.jpg', tmp_path / 'good.jpg')
    for k in range(30):
        (tmp_path / f'bad{k:02}\n.png' if os.name != 'nt' else tmp_path / f'bad{k:02}.png').touch()
    words = ['encode', str(coder.path), str(tmp_path), '--out', str(tmp_path / 'codes.csv')]
    assert cli.main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'has 1 pictures; 30 could not be read: ' in last
    assert last.endswith('and 22 more') and 'bad07' in last and 'bad08' not in last


# Bad input: one clear sentence, before a training starts


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    "A function that runs a command, which must fail before it trains, and returns its message."
    monkeypatch.setattr(hub, 'train_model', lambda *a, **k: pytest.fail('the training began'))

    def run(*words):
        words = [*map(str, words), '--out', str(tmp_path / 'out')]
        assert cli.main(words) == 1
        lines = capsys.readouterr().err.splitlines()
        assert not (tmp_path / 'out').exists()
        return lines[-1]

    return run


@pytest.mark.parametrize('n', [1, 3])
def test_very_few_pictures(n, refused, tmp_path):
    write_pictures(tmp_path / 'few', n)
    said = refused('train', 'dpm', '--data', tmp_path / 'few/photos', '--px', '16')
    assert 'With a single image' in said or 'at least 8 and 2 are needed' in said


def test_pictures_smaller_than_the_network(photos, capsys, untrained, tmp_path):
    words = ['train', 'dpm', '--data', str(photos), '--px', '64', '--size', 'smoke']
    assert cli.main([*words, '--out', str(tmp_path / 'out')]) == 0
    said = capsys.readouterr().err
    assert '40 of 40 pictures are smaller than 64 pixels' in said
    assert 'with --px 28, 27 of them are large enough' in said


def test_a_base_of_another_size(dpm, refused):
    said = refused('train', 'pdae', '--base', dpm.path, '--px', '32')
    assert 'mine is a model of images of 16×16 pixels, got px=32' in said


def test_a_folder_that_does_not_exist(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused('train', 'dpm', '--data', 'fotos')
    assert f'there is no folder fotos in {tmp_path};' in said
    said = refused('train', 'dpm', '--data', tmp_path / 'fotos')
    assert f'there is no folder {tmp_path / "fotos"};' in said
    assert 'one of the data sets digits, mnist' in said


def test_a_file_in_place_of_a_folder(photos, refused):
    assert 'is a file' in refused('train', 'dpm', '--data', photos / '01.jpg')


def test_pixels_that_are_not_possible(photos, refused):
    said = refused('train', 'dpm', '--data', photos, '--px', '50')
    assert 'must be 14, 28 or a multiple of 8 from 16 to 256, got 50' in said
    assert 'the nearest sizes are 48 and 56' in said


def test_labels_of_missing_pictures(photos, refused, tmp_path):
    text = (photos.parent / 'labels.csv').read_text('utf-8') + 'nowhere.png,1,0\n'
    (tmp_path / 'labels.csv').write_text(text, 'utf-8')
    said = refused('train', 'dpm', '--data', photos, '--labels', tmp_path / 'labels.csv')
    assert 'labels.csv line 42: nowhere.png is no picture of' in said


def test_a_labels_file_that_does_not_exist(photos, refused):
    said = refused('train', 'dpm', '--data', photos, '--labels', 'no.csv')
    assert 'no.csv does not exist' in said


@pytest.mark.parametrize(
    'words, said',
    [
        ('train dpm', 'which pictures? Name a folder with --data'),
        ('train pdae --data PHOTOS', 'pdae needs a DPM underneath: name its run with --base'),
        ('train latent --data PHOTOS', 'latent needs an autoencoder underneath'),
        ('train dpm --data PHOTOS --base DPM', 'takes no --base'),
        ('train dmp --data PHOTOS', "'dmp' is neither a method nor a run of the table"),
        ('train dpm --data PHOTOS --range 5', 'range must be'),
        ('train dpm --data PHOTOS --group who', 'needs labels'),
        ('train dpm --data PHOTOS --size huge', 'size must be one of smoke, lesson, paper'),
        ('train pdae --base nowhere', "no run 'nowhere'"),
    ],
)
def test_other_mistakes(words, said, refused, photos, dpm):
    words = words.replace('PHOTOS', str(photos)).replace('DPM', str(dpm.path)).split()
    assert said in refused(*words)


@pytest.mark.parametrize('words', ['train pdae --base RUN', 'reconstruct RUN'])
def test_a_run_whose_training_is_not_finished(words, tmp_path, capsys):
    (tmp_path / 'run/checkpoints').mkdir(parents=True)
    words = words.replace('RUN', str(tmp_path / 'run')).split()
    assert cli.main([*words, '--out', str(tmp_path / 'out.png')]) == 1
    assert 'is not finished: repeat its command' in capsys.readouterr().err


def test_classes_are_needed_by_a_classifier(photos, refused):
    assert 'has no classes' in refused('train', 'classifier', '--data', photos, '--px', '16')


# From a folder to an edited picture


@pytest.mark.slow
def test_six_commands(tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PDAE_NB_SIZE', 'smoke')
    results = []
    for line in (
        'train dpm --data photos --labels labels.csv --out runs/mine',
        'train pdae --base runs/mine --out runs/coder',
        'train latent --base runs/coder --out runs/latent',
        'encode runs/coder photos --out codes.csv',
        'reconstruct runs/coder me.jpg --steps 5 --out again.png',
        'manipulate runs/coder me.jpg --attribute Smiling --steps 5 --out smiling.png',
    ):
        assert cli.main(line.split()) == 0, capsys.readouterr().err
        results.append(capsys.readouterr().out)
    assert len(read_codes('codes.csv').files) == 40
    assert (tmp_path / 'again.png').exists()
    edited = json.loads(results[-1])
    assert edited['picture'] == 'smiling.png'
    assert edited['labels'] == len(load_images('photos', 'train', 28))


@pytest.mark.slow
def test_six_lines_of_python(tmp_path, monkeypatch):
    write_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = pdae_nb.DataOptions(labels='labels.csv')
    own = dict(data='photos', options=options, px=16)
    dpm = pdae_nb.train('dpm', **own, size='smoke', out='runs/mine', log=no_log)
    coder = pdae_nb.train('pdae', base=dpm, size='smoke', out='runs/coder', log=no_log)
    latent = pdae_nb.train('latent', base=coder, size='smoke', out='runs/latent', log=no_log)
    codes = pdae_nb.encode(coder, 'photos', 'codes.csv')
    me = pdae_nb.images('me.jpg', coder, no_log)
    again = coder.reconstruct(me, steps=5)
    smiling = pdae_nb.manipulate(coder, me, pdae_nb.direction(coder, 'Smiling').probe, [0.3], 5)
    assert (codes.pictures, codes.width) == (40, 16)
    assert again.shape == smiling[0].shape == (1, 3, 16, 16)
    assert np.isfinite(latent.codes(2, seed=0).numpy()).all()
