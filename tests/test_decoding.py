"""Data sets that are decoded in worker processes: the same result, flat memory, clear errors."""

import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pdae_nb import cache, workers
from pdae_nb.data import D2C_CROP, DataOptions, folder, load_images
from pdae_nb.decode import Decoder
from pdae_nb.readers import Row
from pdae_nb.tables import local_source

needs_proc = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
needs_posix = pytest.mark.skipif(os.name != 'posix', reason='needs signals of POSIX')


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "Data and cache in a temporary folder, which is the working folder too."
    monkeypatch.setenv('PDAE_NB_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def started(monkeypatch):
    "Two workers decode even few images. The list holds all workers whose start succeeded."
    all_workers = []
    is_ready = workers._Worker.is_ready

    def recorded(worker):
        if is_ready(worker):
            all_workers.append(worker)
            return True
        return False

    monkeypatch.setattr(workers._Worker, 'is_ready', recorded)
    monkeypatch.setattr(workers, 'usable_cores', lambda: 2)
    monkeypatch.setattr(cache, '_SECONDS_ALONE', 0)
    return all_workers


def picture(number: int, size=(30, 20)) -> Image.Image:
    "A small picture with its own colours."
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8))


def as_bytes(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


ALL = DataOptions(hold_out=0)  # of a folder without splits, all pictures


def write_pictures(root: Path, n: int) -> Path:
    root.mkdir(parents=True)
    for i in range(n):
        picture(i).save(root / f'{i:04}.png')
    return root


def write_links(root: Path, n: int) -> Path:
    "A folder of n names of one image file."
    root.mkdir(parents=True)
    first = root / '000000.png'
    picture(0).save(first)
    for i in range(1, n):
        os.link(first, root / f'{i:06}.png')
    return root


def write_mixed_folder(root: Path) -> Path:
    "Two classes, and the kinds of images that are decoded in different ways."
    write_pictures(root / 'train/cat', 90)
    write_pictures(root / 'train/dog', 70)
    write_pictures(root / 'test/cat', 5)
    dog = root / 'train/dog'
    grey = np.arange(600, dtype=np.uint16).reshape(20, 30)
    Image.fromarray(grey).save(dog / 'a_12_bits.png')
    Image.fromarray(grey * 6).save(dog / 'a_brighter.png')
    picture(1).convert('RGBA').save(dog / 'b_opaque.png')
    clear = picture(2).convert('RGBA')
    clear.putalpha(90)
    clear.save(dog / 'b_clear.png')
    picture(3).quantize(8).save(dog / 'c_palette.png', transparency=1)
    frames = [picture(i) for i in range(3)]
    frames[0].save(dog / 'd_frames.gif', save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(4).save(dog / 'e_turned.jpg', exif=exif)
    Image.new('1', (5000, 4000)).save(dog / 'f_large.png')
    picture(5, (218, 178)).save(dog / 'g.webp')
    return root


def write_celeba(root: Path) -> Path:
    faces = root / 'img_align_celeba'
    faces.mkdir(parents=True)
    names = [f'{i:06}.jpg' for i in range(1, 151)]
    for i, name in enumerate(names):
        picture(i, (218, 178)).save(faces / name)
    splits = [f'{name} {0 if i < 140 else 2}' for i, name in enumerate(names)]
    flags = [f'{name} {1 - 2 * (i % 2)} -1' for i, name in enumerate(names)]
    (root / 'list_eval_partition.txt').write_text('\n'.join(splits), encoding='utf-8')
    attributes = [str(len(names)), 'Male Smiling', *flags]
    (root / 'list_attr_celeba.txt').write_text('\n'.join(attributes), encoding='utf-8')
    return root


def write_parquet(root: Path) -> Path:
    root.mkdir(parents=True)
    for split, n in dict(train=150, test=20).items():
        images = [as_bytes(picture(i), 'JPEG' if i % 2 else 'PNG') for i in range(n)]
        columns = dict(image=[dict(bytes=b) for b in images], label=[i % 3 for i in range(n)])
        pq.write_table(pa.table(columns), root / f'{split}.parquet')
    return root


def decoded(root: Path, split: str = 'train') -> cache.Stored:
    "A split in memory. What all images have in common is found anew."
    cache._surveys.clear()
    return cache._in_memory(cache.plan(local_source(root), split, 16, None, crop=D2C_CROP))


def all_ended(all_workers) -> bool:
    return all(worker.process.poll() is not None for worker in all_workers)


# The same result


WRITE = dict(folder=write_mixed_folder, celeba=write_celeba, parquet=write_parquet)


@pytest.mark.parametrize('kind', WRITE)
def test_workers_do_not_change_the_result(tmp_path, started, monkeypatch, kind):
    root = WRITE[kind](tmp_path / 'mine')
    found = decoded(root)
    assert len(started) == 4 and all_ended(started)  # two opened the images, two decoded them
    monkeypatch.setattr(workers, 'usable_cores', lambda: 1)
    wanted = decoded(root)
    assert len(started) == 4
    assert np.array_equal(found.x, wanted.x)
    assert np.array_equal(found.y, wanted.y)
    assert (found.classes, found.notes) == (wanted.classes, wanted.notes)
    assert len(np.unique(found.x.reshape(len(found.x), -1), axis=0)) > 80


def test_remarks_are_counted(tmp_path, started):
    notes = ' | '.join(decoded(write_mixed_folder(tmp_path / 'mine')).notes)
    for words in ('only the first is used', '16-bit grey values', 'shown on white'):
        assert words in notes


@pytest.mark.parametrize('cores, count', [(1, 0), (2, 2), (16, 16), (64, 16)])
def test_number_of_workers(monkeypatch, cores, count):
    monkeypatch.setattr(workers, 'usable_cores', lambda: cores)
    assert workers.worker_count() == count


def test_short_work_starts_no_workers(tmp_path, started, monkeypatch):
    monkeypatch.setattr(cache, '_SECONDS_ALONE', 1000)
    decoded(write_pictures(tmp_path / 'mine', 30))
    assert not started


def test_workers_take_over_after_a_time(tmp_path, started, monkeypatch):
    "By a clock that shows a second more at each look, the caller decodes four chunks of 8 images."
    clock = SimpleNamespace(monotonic=iter(range(1000)).__next__)
    monkeypatch.setattr(workers, 'time', clock)
    files = sorted(write_pictures(tmp_path / 'mine', 100).iterdir())
    rows = [Row(path.name, path) for path in files]
    decoder = Decoder(8, 3)
    options = dict(n=100, where='mine', workers=2, seconds_alone=5)
    pixels = []
    sizes = []
    for chunk in workers.each_image(decoder, rows, **options):
        assert bool(started) == (len(pixels) >= 32)
        sizes.append(len(chunk))
        pixels += [image.pixels for image in chunk]
    assert sizes == [8, 8, 8, 8, 12, 12, 12, 12, 12, 8]
    assert np.array_equal(pixels, [decoder(path).pixels for path in files])
    assert len(started) == 2 and all_ended(started)


def test_large_images_are_left_to_the_caller(tmp_path):
    Image.new('1', (5000, 4000)).save(tmp_path / 'large.png')
    decoder = Decoder(size=8, channels=1)
    assert workers._attempt(decoder, tmp_path / 'large.png') is None
    picture(0).save(tmp_path / 'small.png')
    assert workers._attempt(decoder, tmp_path / 'small.png').result.pixels.shape == (1, 8, 8)


# Errors and warnings


def message_of(f) -> str:
    with pytest.raises(ValueError) as error:
        f()
    return str(error.value)


@pytest.mark.parametrize('content', [b'', b'no image', None], ids=['empty', 'text', 'cut off'])
def test_a_damaged_image_gives_the_same_error(tmp_path, started, monkeypatch, content):
    root = write_pictures(tmp_path / 'mine', 120)
    whole = (root / '0077.png').read_bytes()
    (root / '0077.png').write_bytes(whole[: len(whole) // 2] if content is None else content)
    message = message_of(lambda: load_images(root, 'train', 8))
    assert started and all_ended(started)
    monkeypatch.setattr(workers, 'usable_cores', lambda: 1)
    assert message == message_of(lambda: load_images(root, 'train', 8))
    assert message.startswith(f'{root / "0077.png"}: not a readable image')
    assert message.endswith('repair or remove it')
    assert not list((tmp_path / 'cache').iterdir())


def test_the_first_damaged_image_is_named(tmp_path, started):
    root = write_pictures(tmp_path / 'mine', 120)
    for name in ('0101', '0050', '0119'):
        (root / f'{name}.png').write_bytes(b'no image')
    assert '0050.png' in message_of(lambda: decoded(root))


CORRUPT_EXIF = b'Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00'  # announces five entries


def test_warnings_of_workers_are_given(tmp_path, started, monkeypatch):
    root = write_pictures(tmp_path / 'mine', 40)
    picture(0).save(root / '0030.jpg', exif=CORRUPT_EXIF)
    told = []
    for cores in (2, 1):
        monkeypatch.setattr(workers, 'usable_cores', lambda cores=cores: cores)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            decoded(root)
        told.append([(str(w.message), w.category) for w in caught])
    assert started
    assert told[0] == told[1]
    assert 'Corrupt EXIF' in told[0][0][0]
    messages = set()
    for cores in (2, 1):
        monkeypatch.setattr(workers, 'usable_cores', lambda cores=cores: cores)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            messages.add(message_of(lambda: decoded(root)))
    assert len(messages) == 1 and '0030.jpg: not a readable image (UserWarning' in messages.pop()


@needs_posix
def test_a_killed_worker_is_an_error_that_names_the_data(tmp_path, started, monkeypatch):
    root = write_pictures(tmp_path / 'mine', 120)
    cache.survey(local_source(root, ALL))
    started.clear()
    ask = workers._Worker.ask
    asked = []

    def killed(worker, chunk, where):
        asked.append(chunk)
        if len(asked) == 5:
            os.kill(worker.process.pid, signal.SIGKILL)
        return ask(worker, chunk, where)

    monkeypatch.setattr(workers._Worker, 'ask', killed)
    with pytest.raises(ChildProcessError) as error:
        folder(root, 8)
    words = str(error.value)
    assert words.startswith(f'{root}: ') and 'SIGKILL' in words and 'repeat' in words
    assert all_ended(started)
    assert not list((tmp_path / 'cache').iterdir())
    monkeypatch.setattr(workers._Worker, 'ask', ask)
    assert len(folder(root, 8)) == 120


def test_workers_end_with_the_consumer(tmp_path, started):
    rows = [Row(path.name, path) for path in write_pictures(tmp_path / 'mine', 100).iterdir()]
    options = dict(n=100, where='mine', workers=2)
    with closing(workers.each_image(Decoder(8, 3), rows, **options)) as chunks:
        next(chunks)
        assert len(started) == 2 and not all_ended(started)
    assert all_ended(started)


def test_workers_end_if_nothing_can_be_written(tmp_path, started, monkeypatch):
    root = write_pictures(tmp_path / 'mine', 60)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(cache.zlib, 'crc32', full)
    with pytest.raises(OSError, match='has no room'):
        load_images(root, 'train', 8)
    assert started and all_ended(started)


# Processes that cannot start


def refuse(*args, **kwargs):
    raise OSError(11, 'Resource temporarily unavailable')


@pytest.mark.parametrize(
    'reason', ['no processes', 'no Python', 'another program', 'no package', 'frozen']
)
def test_without_workers_the_caller_decodes(tmp_path, started, monkeypatch, capfd, reason):
    root = write_mixed_folder(tmp_path / 'mine')
    wanted = decoded(root)
    started.clear()
    if reason == 'no processes':
        monkeypatch.setattr(subprocess, 'Popen', refuse)
    elif reason == 'no Python':
        monkeypatch.setattr(sys, 'executable', '')
    elif reason == 'another program':
        monkeypatch.setattr(sys, 'executable', shutil.which('true') or shutil.which('where'))
    elif reason == 'no package':
        monkeypatch.setattr(sys, 'path', [])
    else:
        monkeypatch.setattr(sys, 'frozen', True, raising=False)
    found = decoded(root)
    assert np.array_equal(found.x, wanted.x) and found.notes == wanted.notes
    assert not started
    assert capfd.readouterr().err == ''


def test_one_of_two_workers_is_enough(tmp_path, started, monkeypatch):
    root = write_pictures(tmp_path / 'mine', 60)
    wanted = decoded(root)
    popen = subprocess.Popen
    calls = []

    def every_second(*args, **kwargs):
        calls.append(args)
        return refuse() if len(calls) % 2 == 0 else popen(*args, **kwargs)

    monkeypatch.setattr(subprocess, 'Popen', every_second)
    started.clear()
    assert np.array_equal(decoded(root).x, wanted.x)
    assert len(calls) == 4 and len(started) == 2


# Programs of users


COUNTED = """
from pdae_nb import cache, workers
cache._SECONDS_ALONE = 0
workers.usable_cores = int('2').__int__
is_ready = workers._Worker.is_ready
pids = []
def recorded(worker):
    ready = is_ready(worker)
    if ready:
        pids.append(worker.process.pid)
    return ready
workers._Worker.is_ready = recorded
"""
LOAD = """
from pdae_nb.data import folder
images = folder('./mine', 8)
print(len(images), len(pids), sum(images.x.sum((1, 2, 3)) > 0).item())
"""


def run_script(tmp_path, *parts: str, **options) -> subprocess.CompletedProcess:
    "Run a program that has no `__main__` guard."
    script = tmp_path / 'script.py'
    script.write_text('print("begin")\n' + ''.join(parts), encoding='utf-8')
    command = [sys.executable, '-W', 'ignore', str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


THREADS = """
import torch
torch.set_num_threads(2)
for _ in range(20):
    torch.rand(500, 500) @ torch.rand(500, 500)
"""
NO_SEMAPHORES = """
import _multiprocessing
class Refused(_multiprocessing.SemLock):
    def __new__(cls, *args):
        raise OSError(38, 'Function not implemented')
_multiprocessing.SemLock = Refused
"""
NO_COPY = """
import multiprocessing
multiprocessing.set_start_method('spawn')
"""


@pytest.mark.parametrize(
    'before',
    dict(nothing='', threads=THREADS, semaphores=NO_SEMAPHORES, spawn=NO_COPY).values(),
    ids=['nothing', 'threads of torch', 'no semaphores', 'spawn'],
)
def test_a_script_without_a_guard_runs_once(tmp_path, before):
    write_links(tmp_path / 'mine', 600)
    result = run_script(tmp_path, before, COUNTED, LOAD)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ['begin', '600', '4', '600']
    assert result.stderr == '', 'no progress bar without a terminal'


def test_a_daemonic_process_loads_images(tmp_path):
    if 'fork' not in multiprocessing.get_all_start_methods():
        pytest.skip('needs fork')
    write_links(tmp_path / 'mine', 600)
    body = textwrap.indent(COUNTED + LOAD, '    ')
    result = run_script(
        tmp_path,
        'import multiprocessing\ndef load():\n',
        body,
        "\nprocess = multiprocessing.get_context('fork').Process(target=load, daemon=True)\n",
        'process.start()\nprocess.join()\nprint(process.exitcode)\n',
    )
    assert result.stdout.split()[-4:] == ['600', '4', '600', '0'], result.stderr


def test_a_notebook_loads_images(tmp_path):
    manager = pytest.importorskip('jupyter_client.manager')
    pytest.importorskip('ipykernel')
    write_links(tmp_path / 'mine', 600)
    kernel, client = manager.start_new_kernel(cwd=str(tmp_path))
    texts = []

    def hook(message):
        texts.append(message['content'].get('text', ''))

    try:
        reply = client.execute_interactive(COUNTED + LOAD, timeout=300, output_hook=hook)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert reply['content']['status'] == 'ok', reply
    output = ''.join(texts)
    assert output.split()[-3:] == ['600', '4', '600'], output
    assert '%|' not in output


@needs_posix
def test_a_program_without_standard_streams_loads_images(tmp_path):
    write_links(tmp_path / 'mine', 600)
    script = tmp_path / 'script.py'
    write = "\nopen('result', 'w').write(f'{len(images)} {len(pids)}')\n"
    script.write_text(COUNTED + LOAD.replace('print', 'max') + write, encoding='utf-8')
    command = [sys.executable, '-W', 'ignore', str(script)]
    subprocess.run(['sh', '-c', '"$@" <&- >&- 2>&-', 'sh', *command], timeout=300)
    assert Path('result').read_text(encoding='utf-8') == '600 4'


@needs_posix
def test_a_terminal_shows_a_progress_bar(tmp_path):
    write_links(tmp_path / 'mine', 600)
    termios = pytest.importorskip('termios')
    mine, its = os.openpty()
    termios.tcsetwinsize(its, (24, 80))
    script = tmp_path / 'script.py'
    script.write_text(COUNTED + LOAD, encoding='utf-8')
    command = [sys.executable, '-W', 'ignore', str(script)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=its, text=True)
    os.close(its)
    shown = b''
    with suppress(OSError):  # the other side of the terminal is closed
        while part := os.read(mine, 1000):
            shown += part
    os.close(mine)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    assert output.split() == ['600', '4', '600'], 'the standard output has no bar'
    for doing in (b'open images', b'decode train'):
        assert doing + b':   0%|' in shown and b'/600' in shown


def is_running(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').split()[2] != 'Z'
    except OSError:
        return False


TELLING = """
import signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
def tell():
    while len(pids) < 2:
        time.sleep(.01)
    print('pids', *pids, flush=True)
threading.Thread(target=tell, daemon=True).start()
"""


@needs_proc
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGKILL', 'SIGHUP'])
def test_workers_end_with_the_caller(tmp_path, name):
    "The signal goes to the process group, as Ctrl-C in a terminal."
    write_links(tmp_path / 'mine', 20_000)
    script = tmp_path / 'script.py'
    script.write_text(COUNTED + TELLING + LOAD, encoding='utf-8')
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(word) for word in process.stdout.readline().split()[1:]]
    assert len(pids) == 2
    os.killpg(process.pid, signal.Signals[name])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.Signals[name]
    assert errors.count('Traceback') == (name == 'SIGINT'), errors
    end = time.monotonic() + 60
    while any(is_running(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]


# Memory


def test_few_rows_are_read_ahead(tmp_path, started):
    "Four chunks of at most 12 rows are in work, and one more is read."
    image = as_bytes(picture(0), 'PNG')
    read = []

    def rows():
        for i in range(100):
            read.append(i)
            yield Row(f'row {i}', image)

    done = 0
    for chunk in workers.each_image(Decoder(8, 3), rows(), n=100, where='mine', workers=2):
        assert len(read) - done <= 5 * 12
        done += len(chunk)
    assert done == 100


def test_large_files_in_tables_are_sent_one_by_one(started, monkeypatch):
    "The bytes in work are limited. A row that has more is alone."
    monkeypatch.setattr(workers, '_CHUNK_BYTES', 10_000)
    monkeypatch.setattr(workers, '_BYTES_IN_WORK', 30_000)
    image = as_bytes(picture(0), 'PNG')
    padded = image + bytes(25_000 - len(image))
    read = []

    def rows():
        for i in range(20):
            read.append(i)
            yield Row(f'row {i}', padded)

    done = 0
    for chunk in workers.each_image(Decoder(8, 3), rows(), n=20, where='mine', workers=2):
        assert len(chunk) == 1
        assert len(read) - done <= 2  # one is in work, and one is read
        done += len(chunk)
    assert done == 20


PEAK = """
from pathlib import Path
from pdae_nb.data import load_images
load_images('./mine', 'train', 128)
(line,) = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]
print(line.split()[1])
"""


@needs_proc
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    "3,000 more images have 147 MB of pixels. The peak of the caller grows by less than 32 MB."
    peaks = {}
    for n in (1000, 4000):
        write_links(tmp_path / 'mine', n)
        result = run_script(tmp_path, COUNTED, PEAK)
        assert result.returncode == 0, result.stderr
        peaks[n] = int(result.stdout.split()[-1]) / 1024
        shutil.rmtree(tmp_path / 'mine')
    assert abs(peaks[4000] - peaks[1000]) < 32, peaks


# Imports


def test_workers_import_little():
    code = 'import sys, pdae_nb.workers; print(*sys.modules)'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    modules = set(result.stdout.split())
    assert 'numpy' in modules
    assert not modules & {'torch', 'pyarrow', 'datasets', 'matplotlib', 'scipy', 'tqdm', 'IPython'}


def test_one_image_is_read_in_a_new_process(tmp_path):
    "The formats of Pillow are registered when the first image is opened."
    picture(0).save(tmp_path / 'one.jpg')
    code = """
from pathlib import Path
from pdae_nb.decode import read_image
print(read_image(Path('one.jpg')).image.size)
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.strip() == '(20, 30)', result.stderr
