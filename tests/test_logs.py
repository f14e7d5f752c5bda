"""Training logs: reading, disks and pipes that fail, TensorBoard, learning curves."""

import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from pdae_nb import cli, training
from pdae_nb.files import is_locked, locked
from pdae_nb.hub import train
from pdae_nb.learning_curves import plot_log
from pdae_nb.logs import Board, Log, read_history, read_log, summary_writer, while_open
from pdae_nb.recipes import recipe
from pdae_nb.training import Step, _Log, _trim_log

ROOT = Path(__file__).parent.parent


def entry(step, **changes):
    numbers = dict(step=step, seen=8 * step, loss=1 / step, lr=0.1, images_per_s=50.0)
    return numbers | dict(loss_by_t_quarter=[0.4, 0.3, None, 0.1]) | changes


def write_log(folder, steps, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry(step, **changes)) + '\n' for step in steps]
    (folder / 'log.jsonl').write_text(''.join(lines), encoding='utf-8')
    return folder


def steps_of(path):
    return [line['step'] for line in read_log(path).entries]


def tiny(**changes):
    "Recipe of eight training steps on 8x8 images."
    net = dict(ch=8, mult=(1,), n_res=1)
    return replace(recipe('mnist_dpm', 'smoke'), px=8, batch=8, images=64, net=net, **changes)


@pytest.fixture(autouse=True)
def no_preview(monkeypatch):
    "Sampling the previews would take most of the time."
    monkeypatch.setattr(tiny().method, 'preview', lambda self, x0, y: None)


def train_tiny(out, **options):
    return train('tiny', tiny(), out=out, every=4, log_every=2, **options)


# ---------------------------------------------------------------- reading


def test_the_later_line_of_a_step_counts(tmp_path):
    path = tmp_path / 'log.jsonl'
    lines = [entry(2), entry(4), entry(6), entry(4, loss=9.0)]
    path.write_text('\n'.join(map(json.dumps, lines)), encoding='utf-8')
    log = read_log(path)
    assert [line['step'] for line in log.entries] == [2, 4, 6]
    assert log.entries[1]['loss'] == 9.0
    assert log.damaged == 0


@pytest.mark.parametrize(
    'line',
    [
        bytes(50),
        bytes(50) + b'{"step": 4, "seen": 32}',
        b'{"step": 4, "seen',
        b'4',
        b'"step"',
        b'["step", "seen"]',
        b'{"step": "4", "seen": 32}',
        b'{"step": true, "seen": 32}',
        b'{"step": 4.5, "seen": 32}',
        b'{"step": 4}',
        b'{"step": -4, "seen": 32}',
        b'{"step": 4, "seen": 32, "loss": "low"}',
        b'{"step": 4, "seen": 32, "loss": {"mean": 1}}',
        b'{"step": 4, "seen": 32, "loss": [[1]]}',
        b'{"step": 4, "seen": \xff32}',
        b'\xff\xfe{\x00}\x00',
        b'[' * 100_000,
        b'{"step": ' + b'9' * 5000 + b', "seen": 32}',
    ],
    ids=lambda line: repr(line[:30]),
)
def test_damaged_lines_are_skipped_and_counted(tmp_path, line):
    path = tmp_path / 'log.jsonl'
    first, last = (json.dumps(entry(step)).encode() for step in (2, 6))
    path.write_bytes(b'\n'.join([first, line, last, b'', line]))
    log = read_log(path)
    assert [row['step'] for row in log.entries] == [2, 6]
    assert log.damaged == 2


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='log.jsonl'):
        read_log(tmp_path / 'run/log.jsonl')


def test_a_log_is_shortened_to_the_checkpoint(tmp_path):
    path = write_log(tmp_path, [2, 4, 6, 8]) / 'log.jsonl'
    with open(path, 'ab') as f:
        f.write(bytes(10) + b'\n')
    said = []
    kept = _trim_log(path, 4, said.append)
    assert steps_of(path) == [2, 4]
    assert read_log(path).damaged == 0
    assert kept.entries == read_log(path).entries
    assert len(said) == 1
    assert 'dropped: 1' in said[0]


# ---------------------------------------------------------------- disks that fail


class HalfFile:
    "A file that takes half of a text and then fails."

    def __init__(self, path, mode, **options):
        self.file = open(path, mode, **options)  # noqa: SIM115  __exit__ closes it

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk:
    "Replaces `open` in the module `training`. While it is full, half a line is written."

    def __init__(self):
        self.is_full = True

    def __call__(self, path, mode, **options):
        if not self.is_full:
            return open(path, mode, **options)
        return HalfFile(path, mode, **options)


def step(i):
    one = torch.tensor(1.0)
    times = torch.tensor([1, 300, 600, 1000])
    return Step(i, one, 4 * i, 0.1, one, True, torch.ones(4), times, 0.1)


def test_lines_that_a_full_disk_refused_are_written_later(tmp_path, monkeypatch):
    disk = FullDisk()
    monkeypatch.setattr(training, 'open', disk, raising=False)
    said = []
    log = _Log(tmp_path / 'log.jsonl', 1, 5, 1000, said.append)
    log.add(step(1), 0)
    log.add(step(2), 0)
    assert log.path.stat().st_size > 0
    assert read_log(log.path).damaged == 1
    disk.is_full = False
    log.add(step(3), 0)
    log.add(step(4), 0)
    assert steps_of(log.path) == [1, 2, 3, 4]
    warnings = [line for line in said if 'cannot write' in line]
    assert len(warnings) == 1
    assert 'No space left' in warnings[0]
    assert log.unwritten == []


def test_a_training_goes_on_without_its_log(tmp_path):
    (tmp_path / 'log.jsonl').mkdir()
    said = []
    model = train_tiny(tmp_path, log=said.append)
    assert model.card.images_seen == 64
    assert sum('cannot write' in line for line in said) == 1
    assert (tmp_path / 'run.json').exists()


def test_a_log_that_cannot_be_replaced(tmp_path, monkeypatch):
    path = write_log(tmp_path, [2, 4, 6]) / 'log.jsonl'
    said = []

    def refuse(self, to):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(Path, 'replace', refuse)
    kept = _trim_log(path, 4, said.append)
    assert [line['step'] for line in kept.entries] == [2, 4]
    assert 'Permission denied' in said[0]


# ---------------------------------------------------------------- output that fails


@pytest.mark.parametrize('error', [BrokenPipeError, OSError])
@pytest.mark.parametrize('lines', [0, 1, 3])
def test_output_stops_no_training(tmp_path, error, lines):
    "`log` fails after some lines, and is not called again."
    said = []
    calls = []

    def say(line):
        calls.append(line)
        if len(said) == lines:
            raise error(errno.EPIPE, 'Broken pipe')
        said.append(line)

    model = train_tiny(tmp_path, log=say)
    assert model.card.result is not None
    assert (tmp_path / 'checkpoints/step_000000008.safetensors').exists()
    assert len(said) == lines
    assert len(calls) == lines + 1
    assert steps_of(tmp_path / 'log.jsonl') == [2, 4, 6, 8]


def test_other_errors_of_the_output_are_raised():
    def wrong(line):
        raise ValueError(line)

    with pytest.raises(ValueError, match='a line'):
        while_open(wrong)('a line')


COMMAND = [sys.executable, '-m', 'pdae_nb', 'train', 'mnist_dpm', '--size=smoke', '--steps=4']


def environment(tmp_path):
    return os.environ | dict(
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        PDAE_NB_CACHE=str(tmp_path / 'cache'),
        OMP_NUM_THREADS='1',
        MPLBACKEND='Agg',
    )


def assert_finished(out):
    assert json.loads((out / 'run.json').read_text('utf-8'))['result'] is not None
    assert list((out / 'checkpoints').glob('step_*.safetensors'))


@pytest.mark.slow
@pytest.mark.parametrize('streams', ['stdout', 'both'])
def test_a_reader_that_stops_reading_ends_no_training(tmp_path, streams):
    "The process of `pdae train NAME | head -n 1`; with `both`, of `2>&1 | head -n 1`."
    out = tmp_path / 'run'
    errors = subprocess.STDOUT if streams == 'both' else subprocess.PIPE
    process = subprocess.Popen(
        [*COMMAND, '--out', str(out)],
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    process.stdout.close()  # before the first line
    said = b'' if streams == 'both' else process.stderr.read()
    assert process.wait(300) == 0, said
    assert b'Traceback' not in said
    assert b'BrokenPipe' not in said
    assert_finished(out)


@pytest.mark.slow
@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_full_disk_for_the_output_ends_no_training(tmp_path):
    out = tmp_path / 'run'
    with open('/dev/full', 'w') as full:
        result = subprocess.run(
            [*COMMAND, '--out', str(out)],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=environment(tmp_path),
        )
    assert result.returncode == 0, result.stderr
    assert_finished(out)


class Closed(io.StringIO):
    "A stream whose reader is gone."

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def test_results_that_cannot_be_printed(monkeypatch):
    "A closed pipe is no error. A full disk is one, unless the result is stored elsewhere."

    def result():
        "A command."
        return dict(a=1)

    monkeypatch.setattr(cli, 'COMMANDS', dict(train=result, evaluate=result))
    closed = BrokenPipeError(errno.EPIPE, 'Broken pipe')
    full = OSError(errno.ENOSPC, 'No space left on device')
    wanted = {('train', closed): 0, ('train', full): 0, ('evaluate', closed): 0}
    wanted['evaluate', full] = 1
    for (name, error), status in wanted.items():
        monkeypatch.setattr(sys, 'stdout', Closed(error))
        assert cli.main([name]) == status


def test_characters_that_the_terminal_lacks_are_no_error(monkeypatch):
    "The output of Windows has code pages without →."
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding='cp1252'))
    monkeypatch.setattr(cli, 'COMMANDS', {})
    monkeypatch.setattr(sys, 'argv', ['pdae', '→'])
    assert cli.main() == 2
    assert b'\\u2192' in sys.stderr.buffer.getvalue()


# ---------------------------------------------------------------- TensorBoard


class Writer:
    "The calls of `SummaryWriter` that this package makes. `fail` makes all of them fail."

    made = []

    def __init__(self, log_dir, purge_step=None):
        self.purge_step = purge_step
        self.scalars = []
        self.images = []
        self.closed = False
        self.fail = False
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        (Path(log_dir) / f'events.{len(self.made)}').touch()
        self.made.append(self)

    def add_scalar(self, tag, value, seen):
        if self.fail:
            raise OSError(errno.ENOSPC, 'No space left on device')
        self.scalars.append((tag, seen, value))

    def add_image(self, tag, image, seen):
        self.images.append((tag, seen, tuple(image.shape), image.dtype))

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    "TensorBoard's module is replaced. The list of the writers that were made."
    made = []
    writer = type('SummaryWriter', (Writer,), dict(made=made))
    module = type(sys)('torch.utils.tensorboard')
    module.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    return made


def seen_of(writer, tag='loss'):
    return [seen for name, seen, _ in writer.scalars if name == tag]


def test_tensorboard_gets_every_number_of_the_log(tmp_path, writers):
    train_tiny(tmp_path, log=lambda line: None, tensorboard=True)
    (writer,) = writers
    assert writer.closed
    wanted = []
    for line in read_log(tmp_path / 'log.jsonl').entries:
        quarters = line.pop('loss_by_t_quarter')
        numbers = line | {f'loss_by_t_quarter/{i}': v for i, v in enumerate(quarters, 1)}
        seen = numbers.pop('seen')
        del numbers['step']
        wanted += [(tag, seen, v) for tag, v in numbers.items() if v is not None]
    assert writer.scalars == wanted
    assert seen_of(writer) == [16, 32, 48, 64]


def test_tensorboard_gets_the_previews(tmp_path, writers, monkeypatch):
    def preview(self, x0, y):
        return torch.zeros(2, 1, 8, 8)

    monkeypatch.setattr(tiny().method, 'preview', preview)
    train_tiny(tmp_path, log=lambda line: None, tensorboard=True)
    (writer,) = writers
    assert [seen for _, seen, _, _ in writer.images] == [32, 64]
    for tag, _, shape, dtype in writer.images:
        assert tag == 'preview'
        assert shape[0] == 3
        assert dtype == torch.uint8


class Killed(BaseException):
    "Ends a training as a kill does: without a last checkpoint."


def killed_after(steps, monkeypatch):
    "The training ends after some steps, without a last checkpoint, as if the process were killed."
    monkeypatch.setattr(training, '_save_if_possible', lambda run, log: None)
    loss = tiny().method.loss
    numbers = iter(range(steps))

    def dying_loss(self, x0, y, draw):
        if next(numbers, None) is None:
            raise Killed
        return loss(self, x0, y, draw)

    return monkeypatch.setattr(tiny().method, 'loss', dying_loss)


def test_a_resumed_training_repeats_no_point(tmp_path, writers, monkeypatch):
    "TensorBoard drops the points from `purge_step` on. They are written again."
    with monkeypatch.context() as patch:
        killed_after(7, patch)
        with pytest.raises(Killed):
            train_tiny(tmp_path, log=lambda line: None, tensorboard=True)
    train_tiny(tmp_path, log=lambda line: None, tensorboard=True)
    first, second = writers
    assert first.closed
    assert first.purge_step is None
    assert seen_of(first) == [16, 32, 48]
    assert second.purge_step == 32
    shown = [seen for seen in seen_of(first) if seen < second.purge_step] + seen_of(second)
    assert shown == [16, 32, 48, 64]


def test_tensorboard_may_begin_later_than_the_training(tmp_path, writers, monkeypatch):
    with monkeypatch.context() as patch:
        killed_after(7, patch)
        with pytest.raises(Killed):
            train_tiny(tmp_path, log=lambda line: None)
    train_tiny(tmp_path, log=lambda line: None, tensorboard=True)
    (writer,) = writers
    assert writer.purge_step is None
    assert seen_of(writer) == [16, 32, 48, 64]


def test_a_full_disk_ends_tensorboard_and_not_the_training(tmp_path, writers):
    said = []
    board = Board(tmp_path, 0, Log([], 0), said.append)
    writers[0].fail = True
    board.add(entry(2))
    board.add(entry(4))
    board.close()
    assert len(said) == 1
    assert 'No space left' in said[0]


def test_without_tensorboard_no_training_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)  # its import fails
    monkeypatch.setattr('pdae_nb.hub.load_images', lambda *names: pytest.fail('images were read'))
    with pytest.raises(RuntimeError, match=r"pip install 'pdae_nb\[tensorboard\]'"):
        train_tiny(tmp_path / 'run', tensorboard=True)
    assert not (tmp_path / 'run').exists()


def test_tensorboard_reads_what_is_written(tmp_path):
    "With the real package, where it is installed."
    pytest.importorskip('tensorboard')
    summary_writer()
    events = 'tensorboard.backend.event_processing.event_accumulator'
    accumulator = pytest.importorskip(events).EventAccumulator
    entries = [entry(i) for i in (2, 4, 6)]
    board = Board(tmp_path, 0, Log([], 0))
    for line in entries:
        board.add(line)
    board.add_image(torch.zeros(3, 8, 8, dtype=torch.uint8), 32)
    board.close()
    board = Board(tmp_path, 32, Log(entries[:2], 0))
    board.add(entries[2])
    board.add_image(torch.zeros(3, 8, 8, dtype=torch.uint8), 32)
    board.close()
    shown = accumulator(str(tmp_path))
    shown.Reload()
    assert [point.step for point in shown.Scalars('loss')] == [16, 32, 48]
    assert [point.step for point in shown.Images('preview')] == [32]


# ---------------------------------------------------------------- learning curves


def titles(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


@pytest.fixture
def figure():
    "Plots, and closes the figures afterwards."
    yield plot_log
    plt.close('all')


def test_states_of_runs(tmp_path, figure):
    "A finished run, a run in progress and an interrupted one in one figure."
    runs = [write_log(tmp_path / name, range(1, 41)) for name in ('a', 'b', 'c')]
    record = dict(recipe=dict(images=320), images_seen=320, result=dict(test_noise_mse=0.02))
    (runs[0] / 'run.json').write_text(json.dumps(record), 'utf-8')
    with locked(runs[1]):
        assert [read_history(run).state for run in runs] == [
            'finished',
            'in progress',
            'interrupted',
        ]
        fig = figure(runs)
    assert titles(fig) == [
        'a, 320 images',
        'b, in progress: 320 images',
        'c, interrupted: 320 images',
    ]
    assert len(fig.axes) == 4, 'the finished run has an error on test images'
    for ax in fig.axes:
        assert ax.get_xlabel().startswith('images seen')
        assert ax.get_title(loc='left')


def test_a_checkpoint_tells_the_length_of_the_training(tmp_path, monkeypatch):
    killed_after(7, monkeypatch)
    with pytest.raises(Killed):
        train_tiny(tmp_path, log=lambda line: None)
    history = read_history(tmp_path)
    assert history.state == 'interrupted'
    assert history.images == 64
    assert not is_locked(tmp_path)


def test_curves_hold_the_numbers_of_the_log(tmp_path, figure):
    write_log(tmp_path, range(1, 41))
    fig = figure(tmp_path)
    loss, rate, speed = fig.axes
    raw, mean = loss.lines[:2]
    assert list(raw.get_xdata()) == [8 * i for i in range(1, 41)]
    assert list(raw.get_ydata()) == [1 / i for i in range(1, 41)]
    assert mean.get_ydata()[0] == pytest.approx((1 + 1 / 2) / 2)  # a twentieth of 40 lines is 2
    assert loss.get_yscale() == 'log'
    assert set(rate.lines[0].get_ydata()) == {0.1}
    assert set(speed.lines[0].get_ydata()) == {50.0}


def test_held_out_errors_are_plotted(tmp_path, figure):
    write_log(tmp_path, range(1, 5))
    lines = [dict(seen=8, noise_mse=0.5, standard_error=0.1), dict(seen=16, noise_mse=0.3)]
    text = '\n'.join(map(json.dumps, lines)) + '\n{"seen": 32, "noi\n[1]\n{"seen": 1}'
    (tmp_path / 'held_out.jsonl').write_text(text, 'utf-8')
    ax = figure(tmp_path).axes[1]
    assert list(ax.lines[0].get_xdata()) == [8, 16]
    assert list(ax.lines[0].get_ydata()) == [0.5, 0.3]


def test_losses_that_are_not_finite_leave_gaps(tmp_path, figure):
    write_log(tmp_path / 'a', range(1, 41), loss=None)
    figure(tmp_path / 'a').canvas.draw()
    write_log(tmp_path / 'b', [1], loss=-3.0)
    fig = figure([tmp_path / 'a', tmp_path / 'b'])
    fig.canvas.draw()
    assert fig.axes[0].get_yscale() == 'linear'


def test_background_and_text_fit_light_and_dark_pages(tmp_path, figure):
    fig = figure(write_log(tmp_path, range(1, 5)))
    assert fig.get_facecolor()[3] == 0
    for ax in fig.axes:
        assert ax.get_facecolor()[3] == 0
        assert ax.xaxis.label.get_color() == '#767676'


def test_plot_log_changes_no_setting(tmp_path, figure):
    before = dict(plt.rcParams)
    figure(write_log(tmp_path, range(1, 5)))
    assert dict(plt.rcParams) == before


def test_runs_of_one_name_are_told_apart(tmp_path, figure):
    runs = [write_log(tmp_path / name / 'run', [1, 2]) for name in ('a', 'b')]
    shown = titles(figure(runs))
    assert 'a' in Path(shown[0].split(',')[0]).parts
    assert 'b' in Path(shown[1].split(',')[0]).parts


def test_pdae_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / 'runs/mine', range(1, 5))
    with open(tmp_path / 'runs/mine/log.jsonl', 'ab') as f:
        f.write(bytes(20) + b'\n{"step')
    write_log(tmp_path / 'other', range(1, 5))
    assert cli.main(['plot', 'mine', 'other', '--out', 'curves.png']) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert [run['images_seen'] for run in result['runs']] == [32, 32]
    assert 'skipped: 2' in said.err
    assert (tmp_path / 'curves.png').read_bytes()[:4] == b'\x89PNG'


def test_pdae_plot_names_the_missing_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    for name in ('empty', 'nothing', 'mnist_dpm'):
        assert cli.main(['plot', name]) == 1
        said = capsys.readouterr().err
        assert name in said
        assert 'log.jsonl' in said
    assert not (tmp_path / 'out').exists()
    write_log(tmp_path / 'new', [])
    assert cli.main(['plot', 'new']) == 1
    assert 'no entries yet' in capsys.readouterr().err
