"""Pictures of one's own: names, what is held out, labels and subjects, ranges, arrays, paths."""

import io
import json
import os
import tracemalloc
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pdae_nb import cache
from pdae_nb.data import DataOptions, Images, as_x0, folder, load_images, to_signed
from pdae_nb.decode import find_files
from pdae_nb.evaluation import data_of, held_out_images, inputs, options_of
from pdae_nb.hub import images as images_of
from pdae_nb.hub import load, push_run, train
from pdae_nb.methods.dpm import DPM
from pdae_nb.names import Names
from pdae_nb.readers import FolderSource
from pdae_nb.splits import held_out, share_of
from pdae_nb.training import Recipe

NET = dict(ch=8, mult=(1, 2), n_res=1, groups=8)
MANY = tuple(f'{i:03}.png' for i in range(60))


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "Data and cache in a temporary folder, which is the working folder too."
    monkeypatch.setenv('PDAE_NB_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def told():
    "Messages about data."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        yield lambda: ' | '.join(str(warning.message) for warning in caught)


def no_log(message):
    "A log function that drops its message."


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def pictures(root: Path, *names: str) -> Path:
    "A folder of grey pictures of odd sizes. The value of each is its number."
    for i, name in enumerate(names):
        save(root / name, np.full((9 + i % 5, 11), i, np.uint8))
    return root


def values(images) -> list[int]:
    return images.x.float().mean((1, 2, 3)).round().int().tolist()


def both(root, options=DataOptions()):  # noqa: B008
    return tuple(load_images(root, split, 8, options=options) for split in ('train', 'test'))


# Names


def test_names_follow_the_images(tmp_path):
    root = pictures(tmp_path / 'mine', 'train/b/ä 1.png', 'train/a/x\n.png', 'test/a/1.png')
    for _ in range(2):  # the second time from the cache
        images = load_images(root, 'train', 8)
        assert images.names == ['train/a/x\n.png', 'train/b/ä 1.png']
        assert values(images) == [1, 0]
    assert images[1].names == images[[1]].names == images[-1:].names == ['train/b/ä 1.png']
    assert images[torch.tensor([1, 0])].names[0] == images[images.y == 1].names[0]
    assert images[:0].names == images[[]].names == []
    assert images.to('cpu')[images.y == 0].names == ['train/a/x\n.png']
    assert load_images(root, 'test', 8).names == ['test/a/1.png']


@pytest.mark.skipif(os.name == 'nt', reason='names are Unicode')
def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b'a\xff.png')
    root = pictures(tmp_path / 'mine', name, 'b.png')
    for _ in range(2):
        assert folder(root, 8).names == [name, 'b.png']


def test_names_of_rows_and_of_images_without_files(tmp_path):
    buffer = io.BytesIO()
    Image.new('L', (8, 8)).save(buffer, 'PNG')
    rows = [dict(image=buffer.getvalue(), label=i) for i in range(3)]
    for number in (0, 1):
        path = tmp_path / f'mine/data/train-0000{number}-of-00002.parquet'
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    names = load_images(tmp_path / 'mine', 'train', 8).names
    assert names[4] == 'data/train-00001-of-00002.parquet:1' and len(names) == 6
    assert load_images('digits', 'test')[7].names == ['1444']
    assert Images(torch.zeros(9, 2))[3:][::2].names == ['3', '5', '7']
    with pytest.raises(ValueError, match='2 names for 3 images'):
        Images(torch.zeros(3, 2), names=['a', 'b'])


def test_a_changed_name_in_the_cache_is_found(tmp_path, told):
    root = pictures(tmp_path / 'mine', 'train/1.png', 'train/2.png')
    load_images(root, 'train', 8)
    (path,) = (tmp_path / 'cache').glob('*.images')
    good = path.read_bytes()
    path.write_bytes(good.replace(b'train/2.png', b'train/3.png'))
    assert load_images(root, 'train', 8).names == ['train/1.png', 'train/2.png']
    assert 'damaged' in told() and path.read_bytes() == good


def test_the_order_is_that_of_folders_and_names(tmp_path):
    names = ('b.png', 'a/z.png', 'a.png', 'a-b/c.png', 'a/b/c.png', 'B/1.png', 'a0/x.png')
    root = pictures(tmp_path / 'mine', *names)
    wanted = sorted(path for path in root.rglob('*.png'))
    assert [root / name for name in find_files(root).images] == wanted


# What is held out


def test_training_and_test_are_disjoint_and_this_is_said_once(tmp_path):
    root = pictures(tmp_path / 'mine', *MANY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter('default')
        images, test = both(root)
    assert len(test) and sorted([*images.names, *test.names]) == list(MANY)
    (message,) = [str(w.message) for w in caught if 'held out' in str(w.message)]
    assert f'{len(test)} of 60 images are held out' in message and 'uncertain' not in message


def test_a_picture_stays_in_its_split_when_others_are_added(tmp_path):
    _, test = both(pictures(tmp_path / 'mine', *MANY))
    more = pictures(tmp_path / 'mine', *(f'more/{i}.png' for i in range(40)))
    images, larger = both(more)
    assert {name for name in larger.names if '/' not in name} == set(test.names)
    assert not set(images.names) & set(larger.names)


def test_the_choice_is_the_same_on_each_machine():
    names = [f'{i}.png' for i in range(40)]
    found = [name for name, held in zip(names, held_out(names, 0.1), strict=True) if held]
    assert found == ['0.png', '6.png', '8.png', '33.png']
    composed = ['Jürg', 'Zoë', *names]
    decomposed = [unicodedata.normalize('NFD', name) for name in composed]
    assert composed != decomposed
    assert (held_out(composed, 0.4) == held_out(decomposed, 0.4)).all()


@pytest.mark.parametrize('n', [2, 3, 7, 49])
def test_small_folders_have_both_splits(tmp_path, told, n):
    images, test = both(pictures(tmp_path / 'mine', *MANY[:n]))
    assert len(images) and len(test) and len(images) + len(test) == n
    assert 'results of the test are uncertain' in told()


@pytest.mark.parametrize('n', [4, 7, 20, 30, 60])
def test_two_pictures_at_least_are_held_out(n):
    for start in range(200):
        held = held_out([f'{start + i}.png' for i in range(n)], 0.1)
        assert 2 <= held.sum() <= n - 2
    assert held_out([f'{i}.png' for i in range(n)], 0.999).sum() <= n - 2


def test_a_choice_that_can_change_is_said(tmp_path, told):
    "The pictures with the smallest numbers are held out: a new one can take their place."
    numbers = {name: share_of(name) for name in (f'{i}.png' for i in range(200))}
    late = [name for name, number in numbers.items() if number > 0.2][:12]
    early = [name for name, number in numbers.items() if number < 0.1][:3]
    _, test = both(pictures(tmp_path / 'few', *late))
    assert len(test) == 2 and 'This choice can change when images are added' in told()
    _, larger = both(pictures(tmp_path / 'few', *late, *early))
    assert set(larger.names) == set(early)


def test_a_choice_that_stays_is_not_said_to_change(tmp_path, told):
    both(pictures(tmp_path / 'mine', *MANY))
    assert 'are held out' in told() and 'can change' not in told()


def test_of_subjects_with_one_picture_two_are_held_out(tmp_path):
    for start in range(20):
        options = slices(tmp_path / f'{start}', 20, 1)
        _, test = both(tmp_path / f'{start}', options)
        assert len(test) >= 2
    options = slices(tmp_path / 'more', 4, 6)
    assert len(both(tmp_path / 'more', options)[1]) == 6


def test_of_one_picture_nothing_is_held_out(tmp_path, told):
    root = pictures(tmp_path / 'mine', 'only.png')
    assert len(load_images(root, 'train', 8)) == 1
    with pytest.raises(FileNotFoundError, match='With a single image.*add images, or set hold_out'):
        load_images(root, 'test', 8)
    images, test = both(root, DataOptions(hold_out=0))
    assert images.names == test.names == ['only.png']
    assert "the split 'test' has the same images as the training" in told()
    with pytest.raises(FileNotFoundError, match='single image'):
        train('x', Recipe(DPM, data=str(root), px=8, images=8, net=NET), out='run', log=no_log)
    assert not Path('run').exists()


def test_there_is_no_validation_without_a_folder(tmp_path):
    root = pictures(tmp_path / 'mine', *MANY)
    with pytest.raises(FileNotFoundError, match='and no validation'):
        load_images(root, 'validation', 8)


@pytest.mark.parametrize('hold_out', [0.3, 0.9])
def test_another_fraction_is_held_out(tmp_path, hold_out):
    _, test = both(pictures(tmp_path / 'mine', *MANY), DataOptions(hold_out=hold_out))
    assert abs(len(test) / 60 - hold_out) < 0.2


def test_classes_of_which_all_pictures_are_held_out_are_named(tmp_path, told):
    names = [f'cat/{i}.png' for i in range(30)]
    _, test = both(pictures(tmp_path / 'mine', *names, 'dog/1.png'), DataOptions(hold_out=0.99))
    assert test.classes == ['cat', 'dog'] and 'dog' in told() and 'are held out' in told()


def test_folder_has_all_pictures(tmp_path, told):
    assert len(folder(pictures(tmp_path / 'mine', *MANY[:3]), 8)) == 3
    assert 'held out' not in told()


# Labels and subjects from a table


def table(root: Path, text: str | bytes, name='labels.csv') -> DataOptions:
    write(root / name, text)
    return DataOptions(labels=name)


def labelled(tmp_path, text, names=('a.png', 'b.png', 'c/d.png'), **options):
    root = pictures(tmp_path / 'mine', *names)
    write(root / 'labels.csv', text)
    options = DataOptions(labels='labels.csv', hold_out=0, **options)
    return load_images(root, 'train', 8, options=options)


@pytest.mark.parametrize(
    'text, classes, y',
    {
        'attributes': ('file,x,y\na.png,1,-1\nc/d.png,0,1\nb.png,yes,no\n', ['x', 'y'],
                       [[1, 0], [1, 0], [0, 1]]),
        'words': ('file,x,y\na.png,TRUE,No\nb.png,false,Yes\nc/d.png,True,no', ['x', 'y'],
                  [[1, 0], [0, 1], [1, 0]]),
        'one attribute': ('file,smiling\na.png,0\nb.png,1\nc/d.png,1\n', ['smiling'],
                          [[0], [1], [1]]),
        'classes': ('file,kind\na.png,dog\nb.png,cat\nc/d.png,dog\n', ['cat', 'dog'], [1, 0, 1]),
        'numbers of classes': ('file,kind\na.png,10\nb.png,9\nc/d.png,0\n', ['0', '9', '10'],
                               [2, 1, 0]),
        'long numbers': ('file,kind\na.png,2\nb.png,' + '1' * 5000 + '\nc/d.png,007\n',
                         ['2', '007', '1' * 5000], [0, 2, 1]),
        'classes 0 and 1': ('file,label\na.png,1\nb.png,0\nc/d.png,1\n', ['0', '1'], [1, 0, 1]),
        'semicolons and a mark': ('\ufefffile;x\r\na.png;1\r\nb.png;0\r\n\r\nc/d.png;0\r\n;\r\n',
                                  ['x'], [[1], [0], [0]]),
        'tabs': ('x\tfile_name\n1\ta.png\n0\tb.png\n0\tc/d.png\n', ['x'], [[1], [0], [0]]),
        'quotes': ('file,kind\n"a.png","big, dog"\nb.png,cat\n"c/d.png",cat\n', ['big, dog', 'cat'],
                   [0, 1, 1]),
        'other spellings': ('file,x\n./a.png,1\nc/../b.png,0\nc\\d.png,0\n', ['x'],
                            [[1], [0], [0]]),
    }.values(),
    ids=str,
)  # fmt: skip
def test_tables(tmp_path, text, classes, y):
    images = labelled(tmp_path, text)
    assert (images.classes, images.y.tolist()) == (classes, y)
    assert images.names == ['a.png', 'b.png', 'c/d.png']


@pytest.mark.parametrize(
    'text, words',
    {
        'missing file': ('file,x\na.png,1\nz.png,0\n', r'line 3: z\.png is no picture of .*a\.png'),
        'left out': ('file,x\na.png,1\n', r'leaves out 2 of 3 pictures of .*b\.png, c/d\.png'),
        'twice': ('file,x\na.png,1\nb.png,0\na.png,1\n', 'line 4: a.png is listed twice.*line 2'),
        'bad value': ('file,x,y\na.png,1,0\nb.png,2,0\nc/d.png,1,1',
                      "line 3: .*'x': .* or 1/-1, got '2'"),
        'bad value among words': ('file,x\na.png,yes\nb.png,ja\nc/d.png,no\n', "line 3: .*'ja'"),
        'empty value': ('file,x\na.png,1\nb.png,\n', "line 3: the column 'x' is empty"),
        'too short': ('file,x,y\na.png,1,0\nb.png,1\n', 'line 3: expected 3 entries.*got 2'),
        'too long': ('file,x\na.png,1,0\n', 'line 2: expected 2 entries.*got 3'),
        'no names': ('a.png,1\nb.png,1\n', 'line 1: expected the names of the columns'),
        'no file column': ('picture,x\na.png,1\n', 'line 1: no column of file names, called file,'),
        'two file columns': ('file,path,x\na.png,a.png,1\n', '2 columns of file names'),
        'a column twice': ('file,x,x\na.png,1,0\n', "two columns are called 'x'"),
        'an index': (',file,x\n0,a.png,1\n', r'column 1 has no name.*index=False'),
        'odd columns': ('file,x\x1b[2J\na.png,1\n', 'expected printable names of columns'),
        'empty': ('', 'is empty: expected the names'),
        'blank lines': ('\n\n', 'is empty'),
        'not UTF-8': (b'file,x\na.png,\xff\n', 'no text in UTF-8'),
        'a NUL': (b'file,x\na.png,\0\n', 'no readable CSV|line 2: .* printable'),
        'an open quote': ('file,x\n"a.png,1\n', 'no readable CSV'),
        'outside': ('file,x\n../mine/../b.png,1\n', 'line 2: .*is no picture'),
        'a long line': (b'file' + b'x' * 2**21, 'the first line has over'),
    }.values(),
    ids=str,
)  # fmt: skip
def test_damaged_tables_are_errors_that_name_the_line(tmp_path, text, words):
    with pytest.raises(ValueError, match=rf'labels\.csv.*{words}') as error:
        labelled(tmp_path, text)
    assert str(error.value).isprintable()


def test_a_table_that_is_no_file(tmp_path):
    root = pictures(tmp_path / 'mine', 'a.png')
    with pytest.raises(FileNotFoundError, match=r'none\.csv does not exist; expected a CSV'):
        load_images(root, size=8, options=DataOptions(labels='none.csv'))
    (root / 'place.csv').mkdir()
    with pytest.raises(OSError, match='no regular file'):
        load_images(root, size=8, options=DataOptions(labels='place.csv'))
    if hasattr(os, 'mkfifo'):
        os.mkfifo(tmp_path / 'pipe.csv')
        with pytest.raises(OSError, match='no regular file'):
            load_images(root, size=8, options=DataOptions(labels=str(tmp_path / 'pipe.csv')))


def test_columns_select_labels(tmp_path):
    text = 'file,patient,age,x,kind\na.png,1,7,yes,p\nb.png,2,8,no,q\nc/d.png,2,8,no,q\n'
    assert labelled(tmp_path, text, columns=['x']).y.tolist() == [[1], [0], [0]]
    assert labelled(tmp_path, text, columns=('kind',)).classes == ['p', 'q']
    with pytest.raises(ValueError, match="line 1: no column 'sex' among file, patient, age"):
        labelled(tmp_path, text, columns=['sex'])
    with pytest.raises(ValueError, match="'age': .*name the columns that are labels"):
        labelled(tmp_path, text, columns=['age', 'x'])


def test_names_may_be_relative_to_the_table(tmp_path):
    pictures(tmp_path / 'set/photos', 'a.png', 'b.png')
    write(tmp_path / 'set/labels.csv', 'file,x\nphotos/a.png,1\nphotos/b.png,0\n')
    for labels in ('set/labels.csv', '../labels.csv', str(tmp_path / 'set/labels.csv')):
        options = DataOptions(labels=labels, hold_out=0)
        assert load_images('set/photos', size=8, options=options).y.tolist() == [[1], [0]]
    write(tmp_path / 'set/photos/c/labels.csv', 'file,x\n../a.png,0\n../b.png,1\n')
    options = DataOptions(labels='c/labels.csv', hold_out=0)
    assert load_images('set/photos', size=8, options=options).y.tolist() == [[0], [1]]
    pictures(tmp_path / 'set/photos', 'c/a.png')
    with pytest.raises(ValueError, match=r'line 2: .*a\.png is no picture|leaves out'):
        load_images('set/photos', size=8, options=options)
    write(tmp_path / 'set/photos/c/labels.csv', 'file,x\na.png,0\n')
    with pytest.raises(ValueError, match=r'line 2: a\.png may be .*c/a\.png'):
        load_images('set/photos', size=8, options=options)


def test_two_tables_of_one_name_are_refused(tmp_path):
    pictures(tmp_path / 'mine', 'a.png')
    write(tmp_path / 'mine/t.csv', 'file,x\na.png,0\n')
    write(tmp_path / 't.csv', 'file,x\na.png,1\n')
    with pytest.raises(ValueError, match='write the whole path'):
        load_images('mine', size=8, options=DataOptions(labels='t.csv'))


def test_a_table_that_is_not_named_is_not_read(tmp_path, told):
    root = pictures(tmp_path / 'mine', 'train/cat/1.png', 'train/dog/2.png')
    write(root / 'labels.csv', 'rubbish')
    assert load_images(root, 'train', 8).classes == ['cat', 'dog']
    assert 'labels.csv: not read' in told() and 'The option labels' in told()


def test_a_table_of_subjects_leaves_the_sub_folders_as_classes(tmp_path):
    text = 'file,who\ncat/1.png,x\ncat/2.png,y\ndog/3.png,y\n'
    names = ('cat/1.png', 'cat/2.png', 'dog/3.png')
    images = labelled(tmp_path, text, names, group='who')
    assert (images.classes, images.y.tolist()) == (['cat', 'dog'], [0, 0, 1])


def slices(root: Path, n=12, per=5) -> DataOptions:
    "Several pictures of each patient, and a table."
    names = [f'{i:03}_{k}.png' for i in range(n) for k in range(per)]
    pictures(root, *names)
    rows = [f'{name},patient {name[:3]},{int(name[2]) % 2}' for name in names]
    write(root / 'table.csv', 'file,patient,ill\n' + '\n'.join(rows))
    return DataOptions(labels='table.csv', group='patient')


def test_all_pictures_of_a_subject_are_in_one_split(tmp_path, told):
    options = slices(tmp_path / 'mine')
    images, test = both(tmp_path / 'mine', options)
    patients = [{name[:3] for name in split.names} for split in (images, test)]
    assert patients[1] and not patients[0] & patients[1] and len(images) + len(test) == 60
    assert images.classes == ['ill'] and test.y.shape == (len(test), 1)
    assert f'all those of {len(patients[1])} of 12 entries of' in told()
    slices(tmp_path / 'mine', 20)
    _, larger = both(tmp_path / 'mine', options)
    assert {name for name in larger.names if name < '012'} == set(test.names)


def test_of_one_subject_nothing_is_held_out(tmp_path):
    options = slices(tmp_path / 'mine', 1)
    assert len(load_images(tmp_path / 'mine', size=8, options=options)) == 5
    with pytest.raises(FileNotFoundError, match="single entry of 'patient', patient 000"):
        load_images(tmp_path / 'mine', 'test', 8, options=options)


def test_a_subject_in_two_folders_of_splits_is_refused(tmp_path):
    root = pictures(tmp_path / 'mine', 'train/1.png', 'train/2.png', 'test/3.png')
    rows = ['train/1.png,a', 'train/2.png,b', 'test/3.png,b']
    write(root / 't.csv', 'file,who\n' + '\n'.join(rows))
    with pytest.raises(ValueError, match="'b' of 'who' are in the folders of test and of train"):
        load_images(root, 'train', 8, options=DataOptions(labels='t.csv', group='who'))
    write(root / 't.csv', 'file,who\n' + '\n'.join([*rows[:2], 'test/3.png,c']))
    images, test = both(root, DataOptions(labels='t.csv', group='who'))
    assert (images.names, test.names) == (['train/1.png', 'train/2.png'], ['test/3.png'])


def test_tables_are_for_folders(tmp_path):
    table = pa.Table.from_pylist([dict(image=b'', label=0)])
    (tmp_path / 'mine').mkdir()
    pq.write_table(table, tmp_path / 'mine/train.parquet')
    with pytest.raises(ValueError, match='is for a folder of image files'):
        load_images('mine', 'train', 8, options=DataOptions(labels='t.csv'))
    with pytest.raises(ValueError, match='for a folder of image files'):
        load_images('cifar10', 'train', 8, options=DataOptions(labels='t.csv'))
    with pytest.raises(ValueError, match='takes none'):
        load_images('digits', 'train', 8, options=DataOptions(range=(0, 1)))


# Ranges of grey values


def twelve_bits(shape=(10, 13)) -> np.ndarray:
    return np.linspace(0, 4095, shape[0] * shape[1]).reshape(shape).astype(np.uint16)


def test_a_range_maps_values_by_rounding(tmp_path, told):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    for split in ('train', 'test'):
        save(tmp_path / f'mine/{split}/a.png', ramp)
        save(tmp_path / f'mine/{split}/b.tif', ramp.astype(np.int32))
    images, test = both('mine', DataOptions(range=(0, 4095)))
    wanted = np.rint(ramp / 4095 * 255).astype(np.uint8)
    for image in (*images.x, *test.x):
        assert np.array_equal(image[0], wanted)
    assert not told()
    assert not np.array_equal(load_images('mine', size=8).x[0, 0], wanted)  # drops the last bits


def test_values_outside_of_the_range_are_clipped_and_counted(tmp_path, told):
    for i in range(3):
        save(tmp_path / f'mine/train/{i}.png', np.full((8, 8), 300 * (i + 1), np.uint16))
    images = load_images('mine', size=8, options=DataOptions(range=(400, 800)))
    assert values(images) == [0, 128, 255]
    assert '2 of 3 images: grey values outside of 400 … 800 are clipped' in told()


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_negative_values_and_floats_need_a_range(tmp_path, dtype):
    hounsfield = np.linspace(-1024, 3071, 64).reshape(8, 8).astype(dtype)
    save(tmp_path / 'mine/train/a.tif', hounsfield)
    images = load_images('mine', size=8, options=DataOptions(range=(-1024, 3071)))
    wanted = np.rint((hounsfield.astype(float) + 1024) / 4095 * 255)
    assert np.array_equal(images.x[0, 0], wanted)
    with pytest.raises(ValueError, match='-1024|floating-point'):
        load_images('mine', size=8)


def test_without_a_range_the_choice_is_reported(tmp_path, told):
    save(tmp_path / 'mine/train/a.png', np.full((8, 8), 1500, np.uint16))
    assert values(load_images('mine', size=8)) == [1500 >> 4]
    assert 'largest of the 16-bit grey values is 1500' in told()
    assert '0 … 4095 become black … white' in told()


@pytest.mark.parametrize(
    'array, words',
    [
        (np.zeros((8, 8), np.uint8), 'has 8 bits.*ends at 4095'),
        (np.zeros((8, 8, 3), np.uint8), 'for grey images.*RGB'),
        (np.full((8, 8), np.nan, np.float32), '64 of 64 pixels are not finite'),
    ],
    ids=str,
)
def test_images_that_have_no_such_range(tmp_path, array, words):
    save(tmp_path / 'mine/train/a.tif', array)
    save(tmp_path / 'mine/train/b.png', twelve_bits())
    with pytest.raises(ValueError, match=rf'a\.tif: not a readable image .*{words}'):
        load_images('mine', size=8, options=DataOptions(range=(0, 4095)))


def test_a_range_of_8_bits(tmp_path):
    save(tmp_path / 'mine/train/a.png', np.full((8, 8), 100, np.uint8))
    assert values(load_images('mine', size=8, options=DataOptions(range=(50, 150)))) == [128]


def test_a_pgm_file_has_its_own_unit(tmp_path):
    "Pillow multiplies its values, so that the largest possible value becomes 65535."
    pixels = np.full(64, 1000, '>u2').tobytes()
    write(tmp_path / 'mine/train/a.pgm', b'P5 8 8 4095 ' + pixels)
    write(tmp_path / 'mine/train/b.pgm', b'P5 8 8 65535 ' + pixels)
    images = load_images('mine', size=8, options=DataOptions(range=(0, 4095)))
    assert values(images) == [round(1000 / 4095 * 255)] * 2


NO_RANGES = [(1, 1), (5, 2), (0, float('inf')), (0,), 'ab', '05', ['0', '5'], 7, (None, 1)]


@pytest.mark.parametrize('ends', [*NO_RANGES, (0, 10**400), (False, 2), b'05'], ids=repr)
def test_ranges_that_are_none(ends):
    with pytest.raises(ValueError, match='LOW < HIGH'):
        DataOptions(range=ends)
    with pytest.raises(ValueError, match='LOW < HIGH'):
        Images.from_arrays(np.zeros((2, 8, 8)), range=ends)


def test_one_file_has_the_scale_of_the_data_set(tmp_path):
    file = save(tmp_path / 'mine/train/a.png', twelve_bits())
    images = load_images('mine', size=8, options=DataOptions(range=(0, 4095)))
    assert torch.equal(as_x0(file, 8, 1, no_log, range=(0, 4095)), to_signed(images.x))
    with Image.open(file) as picture:
        assert torch.equal(as_x0(picture, 8, 1, no_log, range=(0, 4095)), to_signed(images.x))
    said = []
    done = save(tmp_path / 'done.png', images.x[0, 0].numpy())
    assert torch.equal(as_x0(done, 8, 1, said.append, range=(0, 4095)), to_signed(images.x))
    assert '8 bits, taken as it is' in said[0]
    with pytest.raises(ValueError, match='from_arrays'):
        as_x0(twelve_bits(), 8, 1, range=(0, 1))


# Arrays


@pytest.mark.parametrize('form', ['NHW', 'NHWC', 'NCHW', 'NHW3', 'N3HW'])
def test_arrays_of_all_forms(form):
    grey = np.random.default_rng(0).integers(0, 256, (5, 7, 9), np.uint8)
    colour = np.stack([grey, 255 - grey, grey], 3)
    array = {
        'NHW': grey,
        'NHWC': grey[..., None],
        'NCHW': grey[:, None],
        'NHW3': colour,
        'N3HW': colour.transpose(0, 3, 1, 2),
    }[form]
    images = Images.from_arrays(array)
    wanted = colour.transpose(0, 3, 1, 2) if '3' in form else grey[:, None]
    assert np.array_equal(images.x, wanted) and images.names == ['0', '1', '2', '3', '4']
    assert torch.equal(Images.from_arrays(torch.from_numpy(array)).x, images.x)
    assert Images.from_arrays(array, size=6).x.shape == (5, wanted.shape[1], 6, 6)


def test_arrays_and_files_have_one_result(tmp_path, told):
    arrays = [twelve_bits() // k for k in (1, 2, 3)]
    for i, array in enumerate(arrays):
        save(tmp_path / f'mine/train/{i}.png', array)
    images = load_images('mine', 'train', 8, options=DataOptions(range=(0, 4000)))
    names = list(images.names)
    x = np.stack(arrays)[:, None]
    ours = Images.from_arrays(x, names=names, range=(0, 4000), size=8)
    assert torch.equal(ours.x, images.x) and ours.names == images.names
    assert told().count('1 of 3 images') == 2


@pytest.mark.parametrize(
    'x, options, words',
    {
        'one picture': (np.zeros((8, 8), np.uint8), {}, r'x\[None\]'),
        'one in colour': (np.zeros((8, 8, 3), np.uint8), {}, 'may be 8 grey images or one'),
        'three or one': (np.zeros((3, 8, 8), np.uint8), {}, 'may be 3 grey images or one'),
        'thin': (np.zeros((2, 3, 8, 1), np.uint8), {}, r'may be \(N,C,H,W\) or \(N,H,W,C\)'),
        'four channels': (np.zeros((2, 8, 8, 4), np.uint8), {}, '1 or 3 channels'),
        'none': (np.zeros((0, 8, 8), np.uint8), {}, 'shape'),
        'volume': (np.zeros((1, 2, 8, 8, 1), np.uint8), {}, 'shape'),
        '16 bits': (np.full((2, 8, 8), 900, np.uint16), {}, '900 … 900: state the range'),
        'floats': (np.zeros((2, 8, 8)), {}, 'float64.*state the range'),
        'NaN': (np.full((2, 8, 8), np.nan), dict(range=(0, 1)), '128 of 128 values'),
        'size': (np.zeros((2, 8, 8), np.uint8), dict(size=0), 'size must be'),
        'labels': (np.zeros((2, 8, 8), np.uint8), dict(y=[1]), r'expected \(2,\) or \(2,A\)'),
        'negative': (np.zeros((2, 8, 8), np.uint8), dict(y=[-1, 1]), '-1 … 1, expected'),
        'half': (np.zeros((2, 8, 8), np.uint8), dict(y=[0.5, 1]), 'whole numbers'),
        'attributes': (np.zeros((2, 8, 8), np.uint8), dict(y=[[0], [2]]), 'expected attributes'),
        'mixed': (np.zeros((2, 8, 8), np.uint8), dict(y=[[0, -1], [1, 1]]), 'expected attributes'),
        'names': (np.zeros((2, 8, 8), np.uint8), dict(names=['a']), '1 names for 2'),
        'same names': (np.zeros((2, 8, 8), np.uint8), dict(names=['a', 'a']), 'have the name a'),
        'classes': (np.zeros((2, 8, 8), np.uint8), dict(y=['a', 'b'], classes=['a']), "'b'"),
        'ragged': ([np.zeros((8, 8)), np.zeros((9, 8))], {}, 'different shapes'),
    }.values(),
    ids=str,
)
def test_arrays_of_doubtful_meaning_are_refused(x, options, words):
    with pytest.raises(ValueError, match=words):
        Images.from_arrays(x, **options)


@pytest.mark.parametrize('dtype', [bool, complex, 'U1'])
def test_arrays_that_hold_no_numbers(dtype):
    with pytest.raises(TypeError, match='integers or floating-point'):
        Images.from_arrays(np.zeros((2, 8, 8), dtype), range=(0, 1))


def test_labels_of_arrays():
    x = np.zeros((3, 8, 8, 1), np.uint8)
    images = Images.from_arrays(x, ['b', '10', 'b'], ['p', 'q', 'r'])
    assert (images.classes, images.y.tolist()) == (['10', 'b'], [1, 0, 1])
    images = Images.from_arrays(x, [[1, -1], [-1, 1], [1, 1]], classes=('old', 'ill'))
    assert (images.classes, images.y.tolist()) == (['old', 'ill'], [[1, 0], [0, 1], [1, 1]])
    assert Images.from_arrays(x, torch.tensor([2, 0, 1])).classes == ['0', '1', '2']


# Small pictures


def test_pictures_smaller_than_the_network_are_enlarged_and_counted(tmp_path, told):
    save(tmp_path / 'mine/train/a.png', np.zeros((5, 40), np.uint8))
    save(tmp_path / 'mine/train/b.png', np.zeros((40, 41), np.uint8))
    assert load_images('mine', size=32).x.shape == (2, 1, 32, 32)
    assert '1 of 2 images: smaller than 32 pixels, so they are enlarged' in told()


# Runs


def recipe(data, **options) -> Recipe:
    how = DataOptions(**options)
    return Recipe(DPM, data=data, px=8, images=16, batch=8, net=NET, ema=0.5, options=how)


def test_options_are_a_part_of_the_recipe(tmp_path):
    options = DataOptions('t.csv', ['ill'], 'patient', (0, 4095), 0.2)
    stored = recipe('mine', **vars(options)).as_json()['options']
    assert stored == dict(
        labels='t.csv', columns=['ill'], group='patient', range=[0.0, 4095.0], hold_out=0.2
    )
    assert DataOptions.of(json.loads(json.dumps(stored))) == options
    assert 'options' not in recipe('mine').as_json()
    assert DataOptions.of(None) == DataOptions.of({}) == DataOptions()
    with pytest.raises(ValueError, match='expected options among'):
        DataOptions.of(dict(colour=1))
    with pytest.raises(TypeError, match='options must be DataOptions'):
        Recipe(DPM, data='mine', px=8, images=8, options=dict(labels='t.csv'))
    for wrong in (dict(group='patient'), dict(columns=['ill'])):
        with pytest.raises(ValueError, match='needs labels'):
            DataOptions(**wrong)
    for wrong in (-0.1, 1, float('nan'), True, '0.1'):
        with pytest.raises(ValueError, match='hold_out must be'):
            DataOptions(hold_out=wrong)
    for wrong in ('ill', 7):
        with pytest.raises(TypeError, match=f'list of names, got {wrong!r}'):
            DataOptions('t.csv', columns=wrong)
    for wrong in (None, 3, ' ', Path('x')):
        with pytest.raises(TypeError, match='columns must be a text'):
            DataOptions('t.csv', columns=(wrong,))
    for wrong in (Path('x'), 3, ''):
        with pytest.raises(TypeError, match='group must be a text'):
            DataOptions('t.csv', group=wrong)


@pytest.fixture
def run(tmp_path):
    "A finished run on 12-bit slices, named by a relative path."
    rng = np.random.default_rng(0)
    root = tmp_path / 'here/slices'
    rows = ['file,patient,ill']
    for i in range(24):
        save(root / f'{i}.png', rng.integers(0, 3000, (9, 10)).astype(np.uint16))
        rows.append(f'{i}.png,{i // 3},{i % 2}')
    write(root / 't.csv', '\n'.join(rows))
    os.chdir(tmp_path / 'here')
    how = dict(labels='slices/t.csv', group='patient', range=(0, 4095))
    train('mine', recipe('./slices', **how), out=tmp_path / 'run', log=no_log)
    return tmp_path / 'run'


def test_a_run_finds_its_pictures_from_elsewhere(tmp_path, run, monkeypatch):
    stored = json.loads((run / 'run.json').read_text())['recipe']
    root = tmp_path / 'here/slices'
    assert stored['data'] == str(root) and stored['options']['labels'] == str(root / 't.csv')
    monkeypatch.chdir('/')
    model = load(run)
    assert (data_of(model), options_of(model).range) == (str(root), (0, 4095))
    x0, y = held_out_images(model, 3)
    test = load_images(root, 'test', 8, options=options_of(model))
    assert torch.equal(x0.cpu(), to_signed(test.x[:3])) and torch.equal(y.cpu(), test.y[:3])
    file = root / test.names[0]
    for one in (images_of(file, model, no_log), inputs([file], model, 1, no_log)[0]):
        assert torch.equal(one.cpu(), to_signed(test.x[:1]))
    said = []
    again = recipe(root, labels='t.csv', group='patient', range=(0, 4095))
    train('mine', again, out=run, log=said.append)  # the same recipe in another spelling
    assert 'is finished' in said[0]
    with pytest.raises(ValueError, match='options .*4095.* → '):
        train('mine', recipe(root, labels='t.csv', group='patient'), out=run, log=no_log)


def grey_of_16_bits(root):
    "A training of pictures with the maxima 60000 and 200, and a test."
    ramp = np.linspace(0, 1, 90).reshape(9, 10)
    for split in ('train', 'test'):
        for i in range(8):
            pixels = (ramp * (60_000, 200)[i % 2]).astype(np.uint16)
            save(root / f'{split}/{i}.png', pixels)


def faces(root):
    "Pictures of the size of CelebA's, of which both papers take a square."
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        for i in range(8):
            save(root / f'{split}/{i}.png', rng.integers(0, 255, (218, 178, 3), np.uint8))


@pytest.mark.parametrize(
    'name, write_files, decoding',
    [
        ('slices', grey_of_16_bits, dict(bits=16, crop=None)),
        ('celeba_own', faces, dict(bits=None, crop=[25, 57, 128])),
        ('faces', faces, dict(bits=None, crop=None)),
    ],
)
def test_a_file_is_decoded_as_the_training_pictures(tmp_path, name, write_files, decoding):
    root = tmp_path / name
    write_files(root)
    train('mine', recipe(root), out=tmp_path / 'run', log=no_log)
    model = load(tmp_path / 'run')
    assert model.card.decoding == decoding
    images = load_images(root, 'train', 8)
    wanted = to_signed(images.x)
    files = [root / file for file in images.names]
    assert torch.equal(inputs(files, model, 1, no_log)[0], wanted)
    assert torch.equal(images_of(root / 'train', model, no_log), wanted)
    for k, file in enumerate(files[:2]):
        assert torch.equal(images_of(file, model, no_log), wanted[k : k + 1])
        with Image.open(file) as picture:
            assert torch.equal(images_of(picture, model, no_log), wanted[k : k + 1])
    model.card.decoding = None  # a run of an earlier version
    same = torch.equal(images_of(files[1], model, no_log), wanted[1:2])
    assert same == (name != 'slices')
    assert torch.equal(images_of(files[1], load(tmp_path / 'run'), no_log), wanted[1:2])


def test_values_outside_of_the_bits_are_reported(tmp_path):
    said = []
    file = save(tmp_path / 'a.png', np.full((8, 8), 60_000, np.uint16))
    assert as_x0(file, 8, 1, said.append, bits=12).min() == 1
    assert said == [f'{file}: grey values outside of 0 … 4095 are clipped']


def test_the_bits_come_from_the_cache_too(tmp_path):
    grey_of_16_bits(tmp_path / 'mine')
    for _ in range(2):
        images = load_images(tmp_path / 'mine', 'test', 8)
        assert images[1:].to('cpu').decoding == (None, 16, None)


def test_a_run_of_an_earlier_version_is_read(tmp_path, run, monkeypatch):
    record = json.loads((run / 'run.json').read_text())
    record['recipe']['data'] = './slices'  # as it was given
    del record['recipe']['options']
    (run / 'run.json').write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path / 'here')
    assert options_of(load(run)) == DataOptions()
    said = []
    train('mine', recipe('slices'), out=run, log=said.append)
    assert 'is finished' in said[0]


def test_a_published_run_has_no_paths(tmp_path, run):
    class Api:
        def create_repo(self, *args, **options):
            pass

        def upload_folder(self, folder_path, repo_id):
            return {p.name: p.read_bytes() for p in Path(folder_path).rglob('*') if p.is_file()}

    files = push_run(run, 'me/mine', api=Api())
    assert json.loads(files['run.json'])['recipe']['options']['labels'] == 't.csv'
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name


@pytest.mark.parametrize('name', ['photos', './photos', 'photos/', '~/photos', Path('photos')])
def test_paths_of_folders(tmp_path, monkeypatch, name):
    from pdae_nb.data import stored_place

    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    pictures(tmp_path / 'photos', *MANY[:3])
    assert len(load_images(name, size=8)) == 2
    assert stored_place(name) == str(tmp_path / 'photos')
    pictures(tmp_path / 'data/known', *MANY[:3])
    assert stored_place('known') == 'known'
    assert stored_place('mnist') == 'mnist' and stored_place('unknown') == 'unknown'


def test_a_folder_that_does_not_exist(tmp_path):
    for name in ('./photos', tmp_path / 'photos', 'no/photos'):
        with pytest.raises(FileNotFoundError, match='photos does not exist, expected a folder'):
            load_images(name, size=8)
    with pytest.raises(FileNotFoundError, match=r'photos does not exist, expected a folder'):
        train('x', recipe('./photos', labels='t.csv'), out='run', log=no_log)
    assert not Path('run').exists()


def test_a_link_to_itself_is_named(tmp_path):
    root = pictures(tmp_path / 'mine', *MANY[:3])
    (root / 'loop.png').symlink_to('loop.png')
    with pytest.raises(ValueError, match=r'loop\.png: a broken link'):
        load_images(root, size=8)


# Memory


def test_a_large_folder_needs_few_bytes_for_each_file(tmp_path):
    n = 5000
    first = save(tmp_path / 'mine/p0/slice-000000.png', np.zeros((8, 8), np.uint8))
    for i in range(1, n):
        folder = tmp_path / f'mine/p{i // 100}'
        folder.mkdir(exist_ok=True)
        os.link(first, folder / f'slice-{i:06}.png')
    # pathlib interns names: once before the measurement, so that Python's table of them is large
    assert cache.stamp_of(FolderSource(tmp_path / 'mine', find_files(tmp_path / 'mine').images))
    tracemalloc.start()
    source = FolderSource(tmp_path / 'mine', find_files(tmp_path / 'mine').images)
    assert cache.stamp_of(source)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(source.sizes.values()) == n
    assert kept / n < 80 and peak / n < 160, (kept / n, peak / n)


def test_many_names_take_few_bytes():
    tracemalloc.start()
    names = Names.of(f'p{i // 100}/slice-{i:06}.png' for i in range(20_000))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / len(names) < 40 and names[19_999] == 'p199/slice-019999.png'
