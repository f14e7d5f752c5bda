"""One's own pictures: methods by name, sizes, encoders, codes, directions, and bad input."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from own_pictures import picture, write_pictures

import pdae_nb
from pdae_nb import cli, hub, training
from pdae_nb.data import Images, load_images
from pdae_nb.forward import Schedule
from pdae_nb.hub import find_recipe, load, train
from pdae_nb.methods.dpm import DPM, DPMSettings
from pdae_nb.methods.latent import LatentDPM
from pdae_nb.methods.pdae import PDAE
from pdae_nb.methods.scorevae import ScoreVAE
from pdae_nb.networks import ENCODERS, ConvEncoder
from pdae_nb.own import METHODS, ROWS, SIDES, check_px, px_for, recipe_for, row_for, unet_for
from pdae_nb.pictures import direction, encode, read_codes
from pdae_nb.splits import DataOptions
from pdae_nb.training import Recipe, duration
from pdae_nb.unet import UNet

pytestmark = pytest.mark.filterwarnings('ignore:.*held out for the test')


def no_log(message):
    "A log function that drops its message."


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


@pytest.mark.parametrize('name', sorted(set(METHODS) - {'latent'}))
def test_each_method_builds(name, dpm):
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    pictures = Images(pixels, torch.tensor([0, 1]), ['a', 'b'])
    base = dpm if METHODS[name].base else None
    recipe = recipe_for(name, 'x', 16, 200, 'smoke', base=base)
    model = recipe.method.build(recipe, pictures, base)
    assert type(model) is METHODS[name].cls
    assert model.shape == (3, 16, 16)


# Recipes


def test_data_and_pixels_are_those_of_the_base(dpm, photos, labels, untrained):
    train('pdae', base=dpm.path, size='smoke', out=dpm.path.parent / 'next', log=no_log)
    (recipe,) = untrained
    assert (recipe.data, recipe.px, recipe.options) == (str(photos), 16, labels)
    assert recipe.encoder['z_dim'] == 16


def test_the_pixels_are_chosen(photos):
    recipe = find_recipe('dpm', size='smoke', data=photos, log=no_log)
    assert recipe.px == 32 or recipe.px == 28
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


def test_scorevae_by_name(dpm, untrained, tmp_path):
    model = train('scorevae', base=dpm, size='smoke', out=tmp_path / 'score', log=no_log)
    assert isinstance(model, ScoreVAE)


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

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(pdae_nb.pictures._WRITERS, '.csv', interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(coder, photos, out, no_log)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ['codes.csv']


def test_directions_of_own_attributes_are_cached(coder, monkeypatch):
    first = direction(coder, 'Smiling', log=no_log)
    monkeypatch.setattr(pdae_nb.pictures, 'fit_direction', lambda *a: pytest.fail('fitted again'))
    again = direction(coder, 'Smiling', log=no_log)
    assert torch.equal(first.probe.w, again.probe.w)
    assert first[1:] == again[1:]


def test_an_unknown_attribute_lists_the_known_ones(coder):
    with pytest.raises(ValueError, match="did you mean 'Smiling'. there are Smiling, Male"):
        direction(coder, 'Smilng', log=no_log)
    with pytest.raises(ValueError, match='there are Smiling, Male'):
        direction(coder, None, log=no_log)


def test_labels_of_another_file(coder, photos, tmp_path):
    lines = ['file,first', *(f'{path.name},{int(path.name < "20")}' for path in photos.iterdir())]
    (tmp_path / 'other.csv').write_text('\n'.join(lines), 'utf-8')
    found = direction(coder, 'first', tmp_path / 'other.csv', log=no_log)
    assert 10 < found.positives < 21
    with pytest.raises(FileNotFoundError, match='there is no file'):
        direction(coder, 'first', tmp_path / 'no.csv', log=no_log)


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
    assert 'of 40 pictures are smaller than 64 pixels' in said
    assert 'fits most of them' in said


def test_a_base_of_another_size(dpm, refused):
    said = refused('train', 'pdae', '--base', dpm.path, '--px', '32')
    assert 'mine is a model of images of 16×16 pixels, got px=32' in said


def test_a_folder_that_does_not_exist(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused('train', 'dpm', '--data', 'fotos')
    assert f'there is no folder fotos in {tmp_path}' in said
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
