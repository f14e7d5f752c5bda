"""Data are never other than meant: readers refuse what is unclear, and the cache repairs itself."""

import io
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pdae_nb import cache, decode, files
from pdae_nb.data import DataOptions, as_x0, folder, load_images, to_signed
from pdae_nb.files import locked, write_json
from pdae_nb.hub import train
from pdae_nb.methods.classifier import EvalClassifier
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.latent import encode_all
from pdae_nb.metrics import Feats, Stats, fid, kid, reference_stats
from pdae_nb.training import Recipe


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "Data and cache in a temporary folder, which is the working folder too."
    monkeypatch.setenv('PDAE_NB_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)


def png(value=0, mode='L', size=(8, 8), **options) -> bytes:
    "The bytes of a PNG file of one value."
    file = io.BytesIO()
    Image.new(mode, size, value).save(file, 'PNG', **options)
    return file.getvalue()


def jpeg(value=0, size=(178, 218)) -> bytes:
    "The bytes of a JPEG file of one grey value."
    file = io.BytesIO()
    Image.new('RGB', size, (value,) * 3).save(file, 'JPEG')
    return file.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def layout(root: Path, *names: str) -> Path:
    "A folder with small images; the value of each is its number."
    for i, name in enumerate(names):
        write(root / name, png(i))
    return root


ALL = DataOptions(hold_out=0)  # each split of a folder without splits has all images


def values(images) -> list[int]:
    return images.x.float().mean((1, 2, 3)).int().tolist()


def loaded(root, split='train', **options):
    "Values, labels and classes of a split."
    images = load_images(root, split, 8, options=ALL, **options)
    return values(images), None if images.y is None else images.y.tolist(), images.classes


@pytest.fixture
def told():
    "Messages about data."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        yield lambda: ' | '.join(str(warning.message) for warning in caught)


# Folders


@pytest.mark.parametrize(
    'names',
    [
        ('training', 'validation', 'testing'),
        ('Train', 'Valid', 'Test'),
        ('TRAIN', 'VAL', 'TEST'),
        ('train_images', 'val_images', 'test_images'),
        ('trainset', 'devset', 'testset'),
        ('train2017', 'val2017', 'test2017'),
        ('train_set', 'dev', 'test_set'),
        ('seg_train', 'seg_val', 'seg_test'),
        ('zip/pets/train', 'zip/pets/val', 'zip/pets/test'),
        ('train/train', 'val/val', 'test/test'),
    ],
    ids=' '.join,
)
def test_folders_of_splits(tmp_path, names):
    a, b, c = names
    files = [f'{a}/cat/1.png', f'{a}/dog/2.png', f'{b}/dog/3.png', f'{c}/cat/4.png']
    root = layout(tmp_path / 'mine', *files)
    assert loaded(root) == ([0, 1], [0, 1], ['cat', 'dog'])
    assert loaded(root, 'validation') == ([2], [1], ['cat', 'dog'])
    assert loaded(root, 'test') == ([3], [0], ['cat', 'dog'])


@pytest.mark.parametrize(
    'names, words',
    {
        'a split beside images': (['train/1.png', '2.png'], 'unclear'),
        'a split beside classes': (['train/1.png', 'car/2.png'], 'unclear'),
        'a class like a split': (['test/1.png', 'cat/2.png', 'dog/3.png'], 'unclear'),
        'two folders of a split': (['train/1.png', 'Train/2.png', 'test/3.png'], 'unclear'),
        'val and valid': (['val/1.png', 'valid/2.png'], 'unclear'),
        'an unknown split': (['train/1.png', 'eval/2.png'], 'unclear'),
        'train and test in one name': (['train_test/1.png', 'test/2.png'], 'unclear'),
        'splits of two sets': (
            ['a_train/1.png', 'a_test/2.png', 'b_train/1.png', 'b_test/2.png'],
            'unclear',
        ),
        'splits in classes': (['cat/train/1.png', 'dog/test/2.png'], 'at the top'),
        'splits in splits': (['train/cat/1.png', 'train/val/2.png', 'test/cat/3.png'], None),
        'no test': (['train/1.png'], 'only of'),
        'no images': (['read.me'], 'no images'),
        'parquet beside images': (['a.png', 'train.parquet'], 'one kind'),
    }.values(),
    ids=lambda words: words if isinstance(words, str) else '',
)
def test_unclear_folders_are_refused(tmp_path, names, words):
    root = layout(tmp_path / 'mine', *names)
    if words is None:  # `val` is a class here
        assert loaded(root) == ([0, 1], [0, 1], ['cat', 'val'])
        return
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_images(root, 'test', 8)


def test_without_held_out_images_the_test_has_the_same_images_and_this_is_said(tmp_path, told):
    root = layout(tmp_path / 'mine', 'cat/1.png', 'dog/2.png')
    assert loaded(root) == ([0, 1], [0, 1], ['cat', 'dog'])
    assert not told()
    assert loaded(root, 'test') == ([0, 1], [0, 1], ['cat', 'dog'])
    assert 'same images' in told()


def test_images_without_classes_are_named(tmp_path, told):
    root = layout(tmp_path / 'mine', 'train/cat/1.png', 'train/2.png', 'test/cat/3.png')
    for _ in range(2):  # the second time from the cache
        assert loaded(root) == ([1, 0], None, ['cat'])
    assert told().count('no classes') == 2
    assert loaded(root, 'test') == ([2], [0], ['cat'])


def test_nested_classes_and_missing_classes_are_named(tmp_path, told):
    root = layout(tmp_path / 'mine', 'train/a/x/1.png', 'train/b/2.png', 'test/b/3.png')
    assert loaded(root) == ([0, 1], [0, 1], ['a', 'b'])
    assert 'nested' in told() and 'no images of the classes a' in told()


def test_hidden_and_foreign_files(tmp_path, told):
    names = ['train/1.png', 'train/._1.png', 'train/.DS_Store', 'train/Thumbs.db', '.git/2.png']
    names += ['train/@eaDir/3.png', '__MACOSX/train/4.png', 'test/5.png']
    root = layout(tmp_path / 'mine', *names, 'train/6.HEIC', 'train/7.svg')
    assert loaded(root) == ([0], None, [])
    assert '6.HEIC' in told() and '7.svg' in told() and '._1' not in told()
    assert [file.name for file in decode.picture_files([str(root / 'train')])] == ['1.png']


@pytest.mark.parametrize('suffix', ['.jfif', '.jpe', '.tga', '.jp2', '.avif', '.dib', '.pnm'])
def test_every_suffix_that_pillow_reads(tmp_path, suffix):
    if suffix not in decode.image_types():
        pytest.skip('not part of this Pillow')
    (tmp_path / 'mine').mkdir()
    Image.new('RGB', (8, 8), (90, 90, 90)).save(tmp_path / f'mine/a{suffix}')
    layout(tmp_path / 'mine', 'b.png')
    assert len(folder(tmp_path / 'mine', size=8)) == 2
    assert len(decode.picture_files([tmp_path / 'mine'])) == 2


def test_links_are_followed_and_loops_are_refused(tmp_path):
    layout(tmp_path / 'elsewhere', 'cat/1.png')
    root = layout(tmp_path / 'mine', 'dog/0.png')
    (root / 'cat').symlink_to(tmp_path / 'elsewhere/cat', target_is_directory=True)
    assert loaded(root)[1:] == ([0, 1], ['cat', 'dog'])
    (root / 'dog/loop').symlink_to(root, target_is_directory=True)
    with pytest.raises(ValueError, match='one folder'):
        load_images(root, size=8)
    (root / 'dog/loop').unlink()
    (root / 'dog/lost.png').symlink_to(root / 'nowhere.png')
    with pytest.raises(ValueError, match=r'lost\.png.*broken link'):
        load_images(root, size=8)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes')
def test_a_pipe_is_not_an_image(tmp_path):
    root = layout(tmp_path / 'mine', 'a.png')
    os.mkfifo(root / 'b.png')
    with pytest.raises(ValueError, match=r'b\.png'):
        load_images(root, size=8)
    with pytest.raises(ValueError, match='not a file'):
        as_x0(root / 'b.png', 8, 1)


def test_folder_refuses_splits(tmp_path):
    root = layout(tmp_path / 'mine', 'train/1.png', 'test/2.png')
    with pytest.raises(ValueError, match='load_images'):
        folder(root)


# Paths


def test_an_existing_path_is_used_as_it_is(tmp_path, monkeypatch):
    layout(tmp_path / 'data/here', '1.png')
    layout(tmp_path / 'photos/of/me', '1.png', '2.png')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    for name in ('photos/of/me', './photos/of/me/', Path('photos/of/me'), '~/photos/of/me'):
        assert len(loaded(name)[0]) == 2
    assert len(loaded(tmp_path / 'photos/of/me')[0]) == 2
    assert len(loaded('here')[0]) == 1
    assert len(decode.picture_files(['~/photos'])) == 2
    monkeypatch.chdir(tmp_path / 'photos')
    assert len(loaded('of')[0]) == 2
    layout(tmp_path / 'photos/here', '1.png', '2.png', '3.png')
    with pytest.raises(ValueError, match='./here'):
        load_images('here', size=8)
    assert len(loaded('./here')[0]) == 3
    write(tmp_path / 'photos/file.zip', b'')
    with pytest.raises(NotADirectoryError, match='is a file'):
        load_images('./file.zip', size=8)


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems store names as Unicode')
def test_names_that_are_not_text(tmp_path):
    root = tmp_path / os.fsdecode(b'mine\xff')
    layout(root, 'train/1.png', 'test/2.png')
    with pytest.raises(ValueError, match=r'mine\\udcff is not UTF-8'):
        train('x', Recipe(DPM, data=str(root), px=8, images=1), out=tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    write(tmp_path / 'odd/a\n\x1b[2J.png', b'no image')
    with pytest.raises(ValueError) as e:
        load_images(tmp_path / 'odd', size=8)
    assert 'a\\n\\x1b[2J.png' in str(e.value) and str(e.value).isprintable()
    layout(tmp_path / 'classes', os.fsdecode(b'cat\xff/1.png'), 'dog/2.png')
    with pytest.raises(ValueError, match=r'cat\\udcff is not UTF-8'):
        load_images(tmp_path / 'classes', size=8)


# Splits fit together


def test_channels_are_settled_over_all_splits(tmp_path):
    root = layout(tmp_path / 'mine', 'test/1.png', 'test/2.png')
    write(root / 'train/1.png', png((9, 8, 7), 'RGB'))
    assert load_images(root, 'train', 8).x.shape == (1, 3, 8, 8)
    assert load_images(root, 'test', 8).x.shape == (2, 3, 8, 8)
    write(root / 'train/1.png', png(5))
    assert load_images(root, 'test', 8).x.shape == (2, 1, 8, 8)


def test_a_damaged_test_image_is_found_before_training(tmp_path):
    root = layout(tmp_path / 'mine', 'train/1.png')
    write(root / 'test/1.png', b'no image')
    with pytest.raises(ValueError, match='not a readable image'):
        load_images(root, 'train', 8)


def test_models_of_labels_need_labels_of_the_test(tmp_path):
    root = layout(tmp_path / 'mine', 'train/a/1.png', 'train/b/2.png', 'test/3.png')
    recipe = Recipe(EvalClassifier, data=str(root), px=8, images=1)
    with pytest.raises(ValueError, match='one label per image'):
        train('x', recipe, out=tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


# CelebA


def celeba(root: Path, images='img_align_celeba', suffix='.txt', partition=True) -> Path:
    "CelebA with six images; the value of image i is 10 i, its first attribute is i > 2."
    for i in range(6):
        write(root / images / f'{i}.jpg', jpeg(10 * i))
    separator = ' ' if suffix == '.txt' else ','
    splits = [f'{i}.jpg{separator}{i % 3}' for i in (3, 1, 0, 2, 5, 4)]
    flags = [separator.join([f'{i}.jpg', str(2 * (i > 2) - 1), '1']) for i in (5, 4, 0, 1, 3, 2)]
    if suffix == '.txt':
        flags = ['6', 'Male Young', *flags]
    else:
        splits = ['image_id,partition', *splits]
        flags = ['image_id,Male,Young', *flags]
    write(root / f'list_attr_celeba{suffix}', '\n'.join(flags))
    if partition:
        write(root / f'list_eval_partition{suffix}', '\n'.join(splits))
    return root


@pytest.mark.parametrize('inner', ['.', 'archive'])
@pytest.mark.parametrize(
    'images, suffix', [('img_align_celeba', '.txt'), ('img_align_celeba/img_align_celeba', '.csv')]
)
def test_celeba_of_the_authors_and_of_kaggle(tmp_path, images, suffix, inner):
    celeba(tmp_path / 'faces' / inner, images, suffix)
    for i, split in enumerate(('train', 'validation', 'test')):
        found = loaded(tmp_path / 'faces', split)
        assert found == ([10 * i, 10 * (i + 3)], [[0, 1], [1, 1]], ['Male', 'Young'])


def test_celeba_at_a_path_has_its_crop(tmp_path):
    root = celeba(tmp_path / 'faces')
    image = Image.new('L', (178, 218), 0)
    image.paste(255, (25, 57, 153, 185))
    image.save(root / 'img_align_celeba/0.jpg', quality=100)
    assert load_images(root, 'train', 8).x[0].min() > 250


def test_celeba_without_its_lists(tmp_path, told):
    for images in ('img_align_celeba', 'img_align_celeba/img_align_celeba'):
        root = celeba(tmp_path / images.replace('/', '-'), images, '.csv', partition=False)
        with pytest.raises(FileNotFoundError, match='list_eval_partition'):
            load_images(root, 'test', 8)
        (root / 'list_attr_celeba.csv').unlink()
        with pytest.raises(FileNotFoundError, match='list_eval_partition'):
            load_images(root, 'test', 8)
    layout(tmp_path / 'data/celeba', '0.jpg', '1.jpg')
    with pytest.raises(FileNotFoundError, match='list_eval_partition'):
        load_images('celeba', 'test', 8)
    root = celeba(tmp_path / 'faces')
    (root / 'list_attr_celeba.txt').unlink()
    (root / 'img_align_celeba/3.jpg').unlink()
    write(root / 'img_align_celeba/9.jpg', jpeg())
    assert loaded(root) == ([0], None, [])
    for words in ('no attributes', 'lacks 1 of 6', '1 images that'):
        assert words in told()


@pytest.mark.parametrize(
    'line, words',
    [('7.jpg', '2 entries'), ('7.jpg 3', '0, 1 or 2'), ('../7.jpg 0', 'not the name')],
)
def test_damaged_lists_of_celeba_are_named(tmp_path, line, words):
    root = celeba(tmp_path / 'faces')
    path = root / 'list_eval_partition.txt'
    path.write_text(path.read_text() + '\n' + line)
    with pytest.raises(ValueError, match=rf'list_eval_partition\.txt line 7: .*{words}'):
        load_images(root, 'train', 8)


# Parquet


def table(path: Path, rows: list[dict], features: dict | None = None, **options) -> Path:
    "A parquet file, with the description of a Hugging Face data set if `features` are given."
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pa.Table.from_pylist(rows)
    if features:
        about = json.dumps(dict(info=dict(features=features)))
        content = content.replace_schema_metadata(dict(huggingface=about))
    pq.write_table(content, path, **options)
    return path


def rows(labels, column='label', image='image', **more) -> list[dict]:
    return [{image: png(i), column: label, **more} for i, label in enumerate(labels)]


def class_label(*names, column='label') -> dict:
    return {'image': dict(_type='Image'), column: dict(_type='ClassLabel', names=list(names))}


@pytest.mark.parametrize('column', ['label', 'labels', 'fine_label', 'animal'])
def test_class_names_of_the_schema(tmp_path, column):
    features = class_label('cat', 'dog', 'owl', column=column)
    table(tmp_path / 'mine/train.parquet', rows([2, 0], column), features)
    table(tmp_path / 'mine/test.parquet', rows([1], column), features)
    assert loaded(tmp_path / 'mine') == ([0, 1], [2, 0], ['cat', 'dog', 'owl'])
    assert loaded(tmp_path / 'mine', 'test') == ([0], [1], ['cat', 'dog', 'owl'])


def test_of_two_labels_the_fine_one_is_taken_and_the_other_is_named(tmp_path, told):
    table(tmp_path / 'mine/train.parquet', rows([1, 0], 'fine_label', coarse_label=0))
    assert loaded(tmp_path / 'mine')[1:] == ([1, 0], ['0', '1'])
    assert 'coarse_label' in told()


@pytest.mark.parametrize(
    'train_labels, test_labels, y, classes',
    {
        'numbers': ([0, 2], [3], [0, 2], ['0', '1', '2', '3']),
        'texts': (['dog', 'cat'], ['ant'], [2, 1], ['ant', 'cat', 'dog']),
        'texts of numbers': (['10', '9'], ['1'], [2, 1], ['1', '9', '10']),
        'floats': ([1.0, 0.0], [1.0], [1, 0], ['0', '1']),
        'flags': ([True, False], [True], [1, 0], ['0', '1']),
        'all missing': ([None, None], [None], None, []),
        'no test labels': ([1, 0], [-1], [1, 0], ['0', '1']),
    }.values(),
    ids=str,
)
def test_labels_of_all_kinds(tmp_path, train_labels, test_labels, y, classes):
    table(tmp_path / 'mine/train.parquet', rows(train_labels))
    table(tmp_path / 'mine/test.parquet', rows(test_labels))
    assert loaded(tmp_path / 'mine')[1:] == (y, classes)
    assert loaded(tmp_path / 'mine', 'test')[2] == classes


@pytest.mark.parametrize(
    'labels, words',
    [
        ([0, None], '1 of 2 labels are missing'),
        ([0, -1], '1 of 2 labels are missing'),
        ([0.5, 1.0], '0.5 is neither the number'),
        ([[0], [1, 2]], 'neither the number'),
        ([0, 10**9], 'expected numbers below'),
        ([float('inf'), 0.0], 'neither the number'),
        ([-2, 1], '-2 is neither'),
    ],
    ids=str,
)
def test_unclear_labels_are_refused(tmp_path, labels, words):
    table(tmp_path / 'mine/train.parquet', rows(labels))
    with pytest.raises(ValueError, match=words):
        load_images(tmp_path / 'mine', size=8)


def test_a_label_beyond_the_declared_classes_is_refused(tmp_path):
    table(tmp_path / 'mine/train.parquet', rows([0, 2]), class_label('cat', 'dog'))
    with pytest.raises(ValueError, match='a label is 2'):
        load_images(tmp_path / 'mine', size=8)


@pytest.mark.parametrize('image', ['image', 'img', 'pixels'])
@pytest.mark.parametrize('is_struct', [False, True])
def test_columns_of_images(tmp_path, image, is_struct):
    content = [{image: dict(bytes=png(7), path=None) if is_struct else png(7)}]
    table(tmp_path / 'mine/train.parquet', content)
    assert loaded(tmp_path / 'mine') == ([7], None, [])


@pytest.mark.parametrize(
    'cell, words',
    [
        (dict(bytes=None, path='secret.png'), 'names the file secret.png'),
        ('secret.png', 'in place of the bytes'),
        ([1, 2, 3], 'in place of the bytes'),
        (b'', 'not a readable image'),
        (b'abc', 'not a readable image'),
    ],
    ids=str,
)
def test_cells_that_hold_no_image(tmp_path, cell, words):
    write(tmp_path / 'secret.png', png())
    table(tmp_path / 'mine/train.parquet', [dict(image=cell)])
    with pytest.raises(ValueError, match=rf'train\.parquet row 0.*{words}'):
        load_images(tmp_path / 'mine', size=8)


@pytest.mark.parametrize(
    'names, words',
    {
        'one of two': (['train-00000-of-00002'], 'numbers 1 are missing'),
        'middle': (['train-00000-of-00003', 'train-00002-of-00003'], 'numbers 1 are missing'),
        'unnamed middle': (['train/0000', 'train/0002'], 'numbers 1 are missing'),
        'two totals': (['train-00000-of-00001', 'train-00001-of-00002'], 'several data sets'),
        'two copies': (['train-00000-of-00001', 'train-00000-of-00001 (1)'], 'several data sets'),
        'two sets': (['cats/train', 'dogs/train'], 'several data sets'),
        'two names': (['cats_train', 'dogs_train'], 'several data sets'),
        'sets across splits': (['cats_train', 'dogs_test'], 'several data sets'),
        'two splits in a name': (['train_test', 'test'], 'unclear'),
    }.values(),
    ids=lambda words: words if isinstance(words, str) else ' '.join(words),
)
def test_parquet_files_that_do_not_fit(tmp_path, names, words):
    for name in names:
        table(tmp_path / f'mine/{name}.parquet', rows([0]))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_images(tmp_path / 'mine', size=8)


# Files of one data set: two files for training, and one for validation
HUB_NAMES = [
    'data/train-00000-of-00002-a09b74b3ef9c3b56',
    'data/train-00001-of-00002-b5fa8ee4ab1c8d12',
    'data/validation-00000-of-00001-deadbeefdeadbeef',
]


@pytest.mark.parametrize(
    'names',
    [
        HUB_NAMES,
        ['default/train/0000', 'default/train/0001', 'default/validation/0000'],
        ['mnist_train_1', 'mnist_train_2', 'mnist_val_10000'],
        ['TRAIN-00000-of-00002', 'TRAIN-00001-of-00002', 'Valid'],
    ],
    ids=str,
)
def test_parquet_files_of_one_split(tmp_path, names):
    for i, name in enumerate(names):
        table(tmp_path / f'mine/{name}.parquet', [dict(image=png(i))])
    assert loaded(tmp_path / 'mine')[0] == [0, 1]
    assert loaded(tmp_path / 'mine', 'validation')[0] == [2]


def test_parquet_files_with_other_columns_are_refused(tmp_path):
    table(tmp_path / 'mine/train.parquet', rows([0]))
    table(tmp_path / 'mine/test.parquet', rows([0], image='img'))
    with pytest.raises(
        ValueError, match=r'test\.parquet has other columns|train\.parquet has other'
    ):
        load_images(tmp_path / 'mine', size=8)


def test_hidden_and_unnamed_parquet_files(tmp_path, told):
    table(tmp_path / 'mine/train.parquet', [dict(image=png(3))])
    write(tmp_path / 'mine/._train.parquet', b'rubbish')
    table(tmp_path / 'mine/extra.parquet', [dict(image=png(4))])
    assert loaded(tmp_path / 'mine')[0] == [3]
    assert 'extra.parquet' in told()


def test_a_parquet_bomb_is_refused(tmp_path):
    bomb = [dict(image=png(), more=bytes(2**26 + 1))]
    path = table(tmp_path / 'mine/train.parquet', bomb, compression='zstd')
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match='the limit is'):
        load_images(tmp_path / 'mine', size=8)


# Images


BOMBS = """
import resource, sys
from pdae_nb.data import load_images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_images(sys.argv[1], size=8)
except ValueError as e:
    print(e)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems count memory in other units')
def test_image_bombs_are_refused(tmp_path):
    bomb = png(0, 'RGB', (9300, 9300))
    assert len(bomb) < 300_000
    for i in range(8):
        write(tmp_path / f'mine/{i}.png', bomb)
    command = [sys.executable, '-c', BOMBS, str(tmp_path / 'mine')]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, megabytes = result.stdout.split('\n')[:-1]
    assert '9300x9300 pixels, the limit is 67,108,864' in ' '.join(lines)
    assert int(megabytes) < 300
    for source in (tmp_path / 'mine/0.png', bomb, Image.open(io.BytesIO(bomb))):
        with pytest.raises(ValueError, match='the limit is'):
            as_x0(source, 8, 3)


def ignore(message):
    pass


def both(path: Path, c=3, size=8, log=ignore):
    "A file by its path, and as a PIL image."
    with Image.open(path) as image:
        return as_x0(path, size, c, log), as_x0(image, size, c, log)


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation_of_files_and_pil_images(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / 'a.png', exif=exif)
    by_path, by_image = both(tmp_path / 'a.png')
    assert torch.equal(by_path, by_image)
    unturned = as_x0(Image.fromarray(noise(8, 8, 3)), 8, 3)
    assert torch.equal(by_path, unturned) == (orientation == 1)


@pytest.mark.parametrize(
    'mode, suffix',
    [('CMYK', 'jpg'), ('1', 'png'), ('P', 'png'), ('L', 'png'), ('LA', 'png'), ('RGBA', 'png'),
     ('YCbCr', 'jpg'), ('I;16', 'png')],
)  # fmt: skip
def test_modes_of_files_and_pil_images(tmp_path, mode, suffix):
    image = Image.fromarray(noise(8, 8, 3))
    if mode == 'I;16':
        image = Image.fromarray(noise(8, 8).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(tmp_path / f'a.{suffix}')
    for c in (1, 3):
        by_path, by_image = both(tmp_path / f'a.{suffix}', c)
        assert torch.equal(by_path, by_image) and by_path.shape == (1, c, 8, 8)
        assert by_path.std() > 0.1


@pytest.mark.parametrize('top, shift', [(255, 0), (4095, 4), (65535, 8)])
def test_grey_values_of_8_12_and_16_bits(tmp_path, top, shift):
    grey = np.linspace(0, top, 64).round().astype(np.uint16).reshape(8, 8)
    wanted = to_signed(torch.from_numpy((grey >> shift).astype(np.uint8))[None, None])
    (tmp_path / 'mine').mkdir()
    Image.fromarray(grey).save(tmp_path / 'mine/a.png')
    said = []
    for x0 in (*both(tmp_path / 'mine/a.png', 1, log=said.append),):
        assert torch.equal(x0, wanted)
    assert (f'{8 + shift} bits' in ' '.join(said)) == (shift < 8)
    assert torch.equal(as_x0(Image.fromarray(grey.astype(np.int32)), 8, 1, ignore), wanted)
    Image.fromarray(grey).save(tmp_path / 'mine/b.tif')
    assert torch.equal(to_signed(folder(tmp_path / 'mine', size=8).x[1:]), wanted)


def test_bits_of_grey_values_are_settled_over_all_splits(tmp_path, told):
    dark = np.full((8, 8), 200, np.uint16)
    for split, values in (('train', dark), ('test', dark * 300)):
        (tmp_path / 'mine' / split).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / 'mine' / split / 'a.png')
    assert loaded(tmp_path / 'mine')[0] == [0]
    assert not told()
    Image.fromarray(dark * 20).save(tmp_path / 'mine/test/a.png')
    assert loaded(tmp_path / 'mine')[0] == [200 >> 4]
    assert '12 bits' in told()


@pytest.mark.parametrize(
    'image, words',
    [
        (Image.new('F', (8, 8), 0.5), 'floating-point'),
        (Image.new('I', (8, 8), 70_000), '70000'),
        (Image.new('I', (8, 8), -1), '-1'),
        (Image.new('RGB', (0, 8)), '0x8'),
    ],
    ids=lambda value: getattr(value, 'mode', value),
)
def test_images_without_a_known_white_are_refused(image, words):
    with pytest.raises(ValueError, match=words):
        as_x0(image, 8, 1)


def test_transparency_is_shown_on_white_and_named(tmp_path, told):
    (tmp_path / 'mine').mkdir()
    Image.new('RGBA', (8, 8), (0, 0, 0, 0)).save(tmp_path / 'mine/a.png')
    palette = Image.new('P', (8, 8), 0)
    palette.save(tmp_path / 'mine/b.png', transparency=0)
    Image.new('LA', (8, 8), (0, 0)).save(tmp_path / 'mine/c.png')
    Image.new('RGBA', (8, 8), (9, 9, 9, 255)).save(tmp_path / 'mine/d.png')
    assert loaded(tmp_path / 'mine')[0] == [255, 255, 255, 9]
    assert '3 of 4 images: transparent pixels are shown on white' in told()
    for name in 'abc':
        said = []
        for x0 in both(tmp_path / f'mine/{name}.png', log=said.append):
            assert (x0 == 1).all()
        assert 'on white' in said[0]


def test_of_several_frames_the_first_is_taken_and_this_is_said(tmp_path, told):
    frames = [Image.new('RGB', (8, 8), (v, v, v)) for v in (10, 200)]
    (tmp_path / 'mine').mkdir()
    frames[0].save(tmp_path / 'mine/a.gif', save_all=True, append_images=frames[1:])
    assert loaded(tmp_path / 'mine')[0] == [10]
    assert 'several frames' in told()


@pytest.mark.parametrize(
    'array, error, words',
    [
        (np.zeros((8, 8, 3), np.uint8), ValueError, 'first axis'),
        (np.zeros((2, 8, 8, 3), np.uint8), ValueError, 'first axis'),
        (np.full((8, 8), 255.0), ValueError, r'in \[-1,1\]'),
        (np.full((8, 8), np.nan), ValueError, 'NaN'),
        (torch.full((1, 8, 8), float('inf')), ValueError, 'NaN or infinite'),
        (np.zeros((8, 8), np.int64), TypeError, 'uint8 or float'),
        (np.zeros((8, 8), bool), TypeError, 'uint8 or float'),
        (np.zeros((0, 8, 8), np.uint8), ValueError, 'must be'),
        (7, TypeError, 'must be a path'),
    ],
    ids=str,
)
def test_arrays_of_other_forms_are_refused(array, error, words):
    with pytest.raises(error, match=words):
        as_x0(array, 8, 3)


def test_arrays_of_a_doubtful_range_are_named():
    said = []
    as_x0(torch.rand(1, 8, 8), 8, 1, said.append)
    as_x0(torch.eye(8, dtype=torch.uint8), 8, 1, said.append)
    assert '[0,1]' in said[0] and '255' in said[1]
    x = noise(3, 8, 8)
    assert torch.equal(as_x0(x, 8, 3), to_signed(torch.from_numpy(x)[None]))


# Metrics


def pixels(x):
    "The mean of each channel and its standard deviation, as features."
    return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def test_metrics_refuse_images_of_different_sizes(tmp_path):
    feats = Feats('pixels', pixels)
    small = torch.rand(40, 1, 28, 28)
    large = torch.rand(40, 1, 32, 32)
    for metric in (fid, kid):
        with pytest.raises(ValueError, match=r'\(1, 28, 28\) and \(1, 32, 32\)'):
            metric(feats, small, large)
        metric(feats, small, small.flip(0))
    layout(tmp_path / 'mine', *(f'{i}.png' for i in range(4)))
    known = reference_stats(feats, load_images(tmp_path / 'mine', size=28))
    with pytest.raises(ValueError, match='one shape'):
        fid(feats, known, large)
    assert fid(feats, known, small) > 0
    assert fid(feats, Stats(known.mean, known.cov), large) > 0


# The cache


@pytest.fixture
def mine(tmp_path):
    "A data set in the cache."
    root = layout(tmp_path / 'mine', 'train/a/0.png', 'train/b/1.png', 'test/b/2.png')
    load_images(root, 'train', 8)
    return root


def cache_file(tmp_path) -> Path:
    (path,) = (tmp_path / 'cache').glob('*.images')
    return path


DAMAGE = {
    'empty': lambda data: b'',
    'short': lambda data: data[:-1],
    'half': lambda data: data[: len(data) // 2],
    'long': lambda data: data + b'0',
    'zeros': lambda data: bytes(len(data)),
    'flipped pixel': lambda data: bytes([data[0] ^ 1]) + data[1:],
    'flipped label': lambda data: data[:128] + bytes([data[128] ^ 1]) + data[129:],
    'other class': lambda data: data.replace(b'"b"', b'"c"'),
    'no labels': lambda data: data.replace(b'"y_shape": [2]', b'"y_shape":null'),
    'a list': lambda data: b'[]' + b'%016d' % 2,
    'other text': lambda data: b'x' * 100,
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_cache_is_made_again(tmp_path, mine, told, damage):
    path = cache_file(tmp_path)
    good = path.read_bytes()
    path.write_bytes(DAMAGE[damage](good))
    assert path.read_bytes() != good
    assert loaded(mine) == ([0, 1], [0, 1], ['a', 'b'])
    assert path.name in told() and 'damaged' in told()
    assert path.read_bytes() == good
    assert list((tmp_path / 'cache').iterdir()) == [path]


def test_the_cache_notices_other_files(tmp_path, mine):
    write(mine / 'train/a/0.png', png(77, size=(9, 9)))
    assert loaded(mine)[0] == [77, 1]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, told):
    root = layout(tmp_path / 'mine', '0.png', '1.png')
    write(tmp_path / 'file', b'')
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'file/cache'))
    assert loaded(root)[0] == [0, 1]
    assert '$PDAE_NB_CACHE' in told() and 'file/cache' in told()

    def read_only(*args, **options):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    with monkeypatch.context() as patch:
        patch.setattr('tempfile.NamedTemporaryFile', read_only)
        patch.setattr('tempfile.mkstemp', read_only)
        assert loaded(root)[0] == [0, 1]
        assert 'Read-only file system' in told()
    assert not list((tmp_path / 'cache').iterdir())
    assert loaded(root)[0] == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr('tempfile.NamedTemporaryFile', read_only)
        assert loaded(root)[0] == [0, 1]  # from the cache file


@pytest.mark.skipif(files.fcntl is None, reason='no file locks')
def test_a_file_system_without_locks(tmp_path, monkeypatch, told):
    def flock(file, operation):
        raise OSError(37, 'No locks available')

    monkeypatch.setattr(files.fcntl, 'flock', flock)
    assert loaded(layout(tmp_path / 'mine', '0.png', '1.png'))[0] == [0, 1]
    assert 'No locks available' in told()


FIRST_LOAD = """
import sys, time
from pdae_nb import decode
if sys.argv[2] == 'slow':
    read_image = decode.read_image
    def slow(*args):
        print('decoding', flush=True)
        time.sleep(60)
        return read_image(*args)
    decode.read_image = slow
from pdae_nb.data import load_images
load_images(sys.argv[1], size=64)
"""


def test_leftovers_of_a_killed_load_are_removed(tmp_path):
    root = layout(tmp_path / 'mine', '0.png', '1.png')
    command = [sys.executable, '-c', FIRST_LOAD, str(root), 'slow']
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        held = list((tmp_path / 'cache').glob('.*.part'))
        assert held[0].stat().st_size == 64 * 64 + 8 + len('0.png')
        cache.remove_leftovers(tmp_path / 'cache')
        assert held[0].exists()  # its process runs
        process.kill()
    cache.remove_leftovers(tmp_path / 'cache')
    assert held[0].exists()  # it is new: another process may be about to lock such a file
    os.utime(held[0], (time.time() - 120,) * 2)
    foreign = ['.video.mp4.part', '.mine/x.npy', '.dir.tmp/thesis.txt', '.notes.tmp']
    for name in foreign:
        write(tmp_path / 'cache' / name, b'')
        os.utime(tmp_path / 'cache' / name, (0, 0))
    assert len(load_images(root, size=64)) == 1
    assert not held[0].exists()
    assert all((tmp_path / 'cache' / name).exists() for name in foreign)


def test_a_full_disk_is_an_error_before_decoding(tmp_path, monkeypatch):
    root = layout(tmp_path / 'mine', '0.png', '1.png')

    def full(descriptor, start, length):
        raise OSError(28, 'No space left on device')

    def decode_nothing(*args):
        raise AssertionError('decoded')

    monkeypatch.setattr(decode, 'read_image', decode_nothing)
    if hasattr(os, 'posix_fallocate'):
        monkeypatch.setattr(os, 'posix_fallocate', full)
        with pytest.raises(OSError, match=r'no room.*\$PDAE_NB_CACHE'):
            load_images(root, size=8)
    assert not list((tmp_path / 'cache').iterdir())


def test_two_first_loads_decode_once(tmp_path):
    root = tmp_path / 'mine'
    for i in range(20):
        write(root / f'train/{i}.png', png(i, size=(64, 64)))
    command = [sys.executable, '-c', FIRST_LOAD, str(root), 'fast']
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and not errors
    assert [path.suffix for path in (tmp_path / 'cache').iterdir()] == ['.images']


def test_codes_and_statistics_without_a_cache(tmp_path, monkeypatch, told):
    class Network(torch.nn.Module):
        config = {}

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x0):
            return self.scale * pixels(x0)

    write(tmp_path / 'file', b'')
    images = load_images(layout(tmp_path / 'mine', *(f'{i}.png' for i in range(4))), size=8)
    feats = Feats('pixels', pixels, key='1')
    network = Network().eval()
    wanted = encode_all(network, images), reference_stats(feats, images)
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'file/cache'))
    z, known = encode_all(network, images), reference_stats(feats, images)
    assert torch.equal(z, wanted[0]) and torch.equal(known.mean, wanted[1].mean)
    assert known.shape == (1, 8, 8)
    assert told().count('$PDAE_NB_CACHE') == 2


def test_home_is_expanded_where_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('USERPROFILE', str(tmp_path / 'home'))
    write_json('~/a/b.json', {})
    with locked('~/run'):
        pass
    assert (tmp_path / 'home/a/b.json').exists() and (tmp_path / 'home/run').is_dir()
    assert not (tmp_path / '~').exists()


def test_a_recipe_may_name_its_data_by_a_path():
    recipe = Recipe(DPM, data=Path('mine'), px=8, images=1)
    assert recipe.as_json()['data'] == os.path.join('.', 'mine')


@pytest.mark.parametrize('inner', ['images', 'imgs', 'data'])
def test_a_folder_called_images_is_no_class(tmp_path, told, inner):
    root = layout(tmp_path / 'mine', f'train/{inner}/1.png', f'test/{inner}/2.png')
    assert loaded(root, 'test') == ([1], None, [])
    root = layout(tmp_path / 'more', 'train/a/1.png', 'train/b/2.png', f'val/{inner}/3.png')
    assert loaded(root, 'validation') == ([2], None, ['a', 'b'])
    assert 'no classes' in told()
    assert loaded(layout(tmp_path / 'plain', f'{inner}/1.png')) == ([0], None, [])


def test_parquet_files_without_rows_or_splits(tmp_path):
    pq.write_table(
        pa.table(dict(image=pa.array([], pa.binary()))), write(tmp_path / 'a/train.parquet', b'')
    )
    with pytest.raises(FileNotFoundError, match="no images of the split 'train'"):
        load_images('./a', size=8)
    table(tmp_path / 'b/faces.parquet', rows([0]))
    with pytest.raises(FileNotFoundError, match=r'faces\.parquet name none of the splits'):
        load_images('./b', size=8)


def test_a_file_with_postscript_starts_no_other_program(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **k: pytest.fail('a program was started'))
    monkeypatch.setattr(subprocess, 'check_call', lambda *a, **k: pytest.fail('a program started'))
    text = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n'
    write(tmp_path / 'mine/0.png', text)
    with pytest.raises(ValueError, match='not a readable image'):
        load_images(tmp_path / 'mine', 'train', 8)


def test_the_cache_tells_folders_of_one_relative_name_apart(tmp_path, monkeypatch):
    for name, value in (('A', 10), ('B', 200)):
        for i in range(2):
            file = write(tmp_path / name / f'faces/{i}.png', png(value))
            os.utime(file, (1e9, 1e9))
    for name, value in (('A', 10), ('B', 200)):
        monkeypatch.chdir(tmp_path / name)
        assert loaded('./faces')[0] == [value, value]


def test_attributes_that_differ_between_splits_are_refused(tmp_path):
    for split, second in (('train', 'Smiling'), ('test', 'Young')):
        row = dict(image=dict(bytes=png(), path=None), attributes={'Male': 1, second: 0})
        path = tmp_path / f'data/mine/{split}.parquet'
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(ValueError, match='attributes|differ'):
        load_images('mine', 'train', 8)


ATTRIBUTES = '2\nMale Young\n000001.jpg 1 -1\n000002.jpg -1 1\n'


@pytest.mark.parametrize(
    'text, wanted',
    [
        ('3\nMale Young\n000001.jpg 1 -1\n000001.jpg -1 1\n', 'listed twice'),
        ('2\nMale Male\n000001.jpg 1 -1\n', 'names of the attributes'),
        ('', 'no list of CelebA'),
        ('2\n', 'no list of CelebA'),
        (ATTRIBUTES.encode() + b'\xff', 'not a readable list'),
    ],
)
def test_damaged_lists_of_attributes(tmp_path, text, wanted):
    root = tmp_path / 'data/celeba'
    for i in (1, 2):
        write(root / f'img_align_celeba/00000{i}.jpg', jpeg())
    write(root / 'list_eval_partition.txt', '000001.jpg 0\n000002.jpg 0\n')
    write(root / 'list_attr_celeba.txt', text)
    with pytest.raises(ValueError, match=wanted):
        load_images('celeba', 'train', 8)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes')
def test_a_pipe_in_place_of_a_table(tmp_path):
    (tmp_path / 'mine').mkdir()
    os.mkfifo(tmp_path / 'mine/train.parquet')
    with pytest.raises(ValueError, match='no regular file|broken link'):
        load_images(tmp_path / 'mine', 'train', 8)


def test_a_table_with_more_rows_than_bytes_is_refused(tmp_path):
    n = 20_000
    images = pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), pa.array([png()]))
    labels = pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), pa.array(['x' * 9000]))
    path = tmp_path / 'mine/train.parquet'
    path.parent.mkdir()
    pq.write_table(pa.table(dict(image=images, label=labels)), path, compression='zstd')
    with pytest.raises(ValueError, match='20,000 rows of images in'):
        load_images(tmp_path / 'mine', 'train', 8)


def test_a_partition_without_a_header_keeps_its_first_image(tmp_path):
    from pdae_nb.readers import _partition

    file = write(tmp_path / 'list_eval_partition.csv', '1.jpg,0\n2.jpg,0\n3.jpg,2\n')
    assert _partition(file) == {'1.jpg': 'train', '2.jpg': 'train', '3.jpg': 'test'}


@pytest.mark.parametrize('label', [1e300, 2.0**63])
def test_a_label_that_int64_cannot_hold_is_refused(tmp_path, label):
    path = tmp_path / 'mine/train.parquet'
    path.parent.mkdir()
    row = dict(image=dict(bytes=png(), path=None), label=label)
    pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(ValueError, match='neither the number of a class'):
        load_images(tmp_path / 'mine', 'train', 8)


def test_attributes_of_another_kind_are_refused(tmp_path):
    path = tmp_path / 'mine/train.parquet'
    path.parent.mkdir()
    row = dict(image=dict(bytes=png(), path=None), attributes=dict(colour=1))
    pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(ValueError, match='no attributes of CelebA'):
        load_images(tmp_path / 'mine', 'train', 8)
