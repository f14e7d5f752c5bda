"""The table of `pdae bench`, its time budget, and the costs of the papers' runs."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pdae_nb import bench as bench_module
from pdae_nb.bench import (
    GEOMETRIES,
    MODES,
    OFFICIAL,
    Row,
    bench,
    bench_table,
    build_model,
    default_modes,
    races,
    rows_of,
    throughput,
)
from pdae_nb.cli import cmd_bench
from pdae_nb.costs import (
    STANDS_FOR,
    VERSION_1_ON_H200,
    Cost,
    StepBytes,
    cost_table,
    model_of,
    paper_costs,
    row_gflops,
    sampling_bytes,
    sampling_gflops,
    shapes_only,
    training_bytes,
    training_gflops,
    untrained,
)
from pdae_nb.forward import Schedule
from pdae_nb.layers import Conv2d, Linear, Network
from pdae_nb.methods.dpm import DPM
from pdae_nb.recipes import RECIPES
from pdae_nb.speed import PDAE_GEOMETRIES, run_rounds, typical_seconds
from pdae_nb.unet import UNet

PLAIN = MODES[:1]  # float32 only: the shortest measurement
SHORT = dict(size='smoke', device='cpu', seconds=0.01)


def quiet(line):
    "Do not print."


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    "A complete smoke measurement: the file and the result."
    path = tmp_path_factory.mktemp('bench') / 'cpu.json'
    result = bench(path, **SHORT, minutes=5, modes=MODES[:2], log=quiet)
    return path, result


# --- counting ---


class Attentive(Network):
    "A denoiser with a convolution, an attention with one head, and a linear layer of t."

    def __init__(self):
        super().__init__()
        self.first = Conv2d(2, 6, 3, padding=1)
        self.time = Linear(1, 6)
        self.last = Conv2d(6, 2, 1)

    def forward(self, xt, t):
        h = self.first(xt) + self.time(t[:, None].float())[..., None, None]
        places = h.flatten(2).transpose(1, 2)[:, None]  # (B,1,64,6)
        h = F.scaled_dot_product_attention(places, places, places)
        return self.last(h[:, 0].transpose(1, 2).unflatten(2, (8, 8)))


def test_the_count_agrees_with_a_hand_count():
    "8x8 pixels. A backward pass has two products for each product, or one without a gradient of x."
    model = DPM(Attentive(), Schedule.linear(), (2, 8, 8))
    first = 2 * 64 * 9 * 2 * 6
    linear = 2 * 1 * 6
    attention = 2 * (2 * 64 * 64 * 6)
    last = 2 * 64 * 6 * 2
    forward = first + linear + attention + last
    assert sampling_gflops(model) * 1e9 == pytest.approx(forward)
    backward = first + linear + 2 * attention + 2 * last
    assert training_gflops(model) * 1e9 == pytest.approx(forward + backward)


def test_the_count_is_that_of_pytorch_for_a_u_net():
    "The counter of PyTorch follows modules; ours also counts losses with a gradient inside."
    model = build_model(races()[0], 'smoke')
    x = torch.zeros(2, *model.shape)
    t = torch.tensor([5, 500])
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model.net(x, t).sum().backward()
    assert training_gflops(model) * 2e9 == pytest.approx(counter.get_total_flops())


def test_bytes_of_a_step_depend_on_dtype_and_batch():
    model = build_model(races()[2], 'smoke')
    for bytes_of in (training_bytes, sampling_bytes):
        exact = bytes_of(model, 4, torch.float32)
        half = bytes_of(model, 4, torch.bfloat16)
        assert half.traffic < exact.traffic
        assert half.memory < exact.memory
        assert bytes_of(model, 8, torch.float32).memory > exact.memory
    assert (
        sampling_bytes(model, 4, torch.float32).memory
        < training_bytes(model, 4, torch.float32).memory
    )


def test_networks_without_numbers_and_afterwards_with_numbers():
    with shapes_only():
        model = untrained('mnist_pdae_latent', 'lesson')
    tensors = [p for net in model.networks() for p in (*net.parameters(), *net.buffers())]
    assert {tensor.device.type for tensor in tensors} == {'meta'}
    with pytest.raises(RuntimeError, match='inside'), shapes_only():
        raise RuntimeError('inside')
    assert UNet(c=1, size=8, ch=8, mult=(1,), n_res=1).time[0].weight.device.type == 'cpu'


def test_a_run_without_a_recipe_is_refused_by_name():
    with pytest.raises(ValueError, match="no recipe for 'mnist_gan' at size 'paper'"):
        untrained('mnist_gan', 'paper')


# --- costs of the papers' runs ---


@pytest.fixture(scope='module')
def costs():
    return paper_costs()


def test_every_row_of_the_papers_has_a_cost(costs):
    assert [cost.run for cost in costs] == [name for name, size in RECIPES if size == 'paper']
    for cost in costs:
        assert cost.images == RECIPES[cost.run, 'paper'].images
        assert 0 < cost.hours < 10_000


def test_hours_of_the_measured_runs_are_images_over_speed(costs):
    measured = {cost.run: cost for cost in costs if cost.scaled_from is None}
    assert measured.keys() == VERSION_1_ON_H200.images_per_s.keys()
    for run, speed in VERSION_1_ON_H200.images_per_s.items():
        assert measured[run].hours == pytest.approx(measured[run].images / speed / 3600)
    # 951 images per second are 76 TFLOP/s
    assert VERSION_1_ON_H200.tflops['celeba64_dpm'] == pytest.approx(76, abs=0.5)


def test_hours_of_another_geometry_are_scaled_by_arithmetic(costs):
    by_run = {cost.run: cost for cost in costs}
    small = by_run['celeba64_pdae']
    large = by_run['ffhq128_pdae']
    assert large.scaled_from == 'celeba64_pdae'
    ratio = large.images * large.gflops / (small.images * small.gflops)
    assert large.hours == pytest.approx(small.hours * ratio)
    assert by_run['ffhq128_diffae'].scaled_from == 'celeba64_dpm'


def test_a_base_without_a_recipe_is_named(costs):
    stand_ins = {cost.run: cost.stand_in for cost in costs if cost.stand_in}
    assert stand_ins == {'imagenet64_label_pdae': 'celeba64_dpm'}
    assert 'celeba64_dpm' in STANDS_FOR.values()
    with shapes_only():
        model = untrained('imagenet64_label_pdae', 'paper')
    assert model.classes == 1000


def test_the_table_of_costs_says_what_was_measured():
    cost = Cost('a', 'DPM', 2_500_000, 1234.5, 0.12, scaled_from='b', stand_in=None)
    table = cost_table([cost])
    assert table.rows == [['a', 'DPM', '2.5', '1,234', '0.12', 'scaled from b']]
    assert '951' in table.caption
    assert '810' in table.caption
    assert 'H200' in table.caption


# --- time ---


class Clock:
    "A clock that work moves."

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        "A function that takes this long."

        def f():
            self.now += seconds

        return f


@pytest.mark.parametrize(
    'seconds, limit, rounds', [(0, 100, 3), (6, 100, 4), (100, 5, 2), (100, 0, 1)]
)
def test_rounds_follow_seconds_and_limit(seconds, limit, rounds):
    "A round of two functions takes 3 s. The limit ends it after at least one round."
    clock = Clock()
    calls = dict(a=clock.work(1), b=clock.work(2))
    times = run_rounds(calls, seconds, clock, limit=limit)
    assert times.tolist() == [[1, 2]] * rounds
    assert typical_seconds(times).tolist() == [1, 2]


class Measurements:
    "Stands for everything that `bench` measures. Each race takes as long as it is told."

    def __init__(self, monkeypatch, seconds):
        self.clock = Clock()
        self.seconds = seconds  # of a race
        self.keys = []  # of the races that were measured
        self.shares = []  # seconds that each race could have had
        monkeypatch.setattr(bench_module, '_measure', self.measure)
        monkeypatch.setattr(bench_module, '_compared', self.compare)

    def measure(self, race, bench):
        self.keys.append(race.key)
        self.shares.append(bench.budget.left / bench.parts_left)
        self.clock.now += self.seconds
        return [a_row(geometry=race.geometry.title, method=race.method, step=race.step)]

    def compare(self, name, *others):
        self.clock.now += self.seconds
        return {}


def a_row(**changed):
    "A row of the table."
    row = Row(
        geometry=GEOMETRIES[0].title, method='DPM', step='training', mode='float32', batch=128,
        dropout=0.1, dtype='float32', seconds=0.5, rounds=3, gflops=80.0, peak_gflops=1e5,
        traffic=1e9, counted_memory=20 * 10**9, used_memory=None,
    )  # fmt: skip
    return row._replace(**changed)


def test_what_would_begin_after_the_end_is_left_out(monkeypatch):
    "Ten seconds for each part, 95 s in all: the tenth part is the last one."
    fake = Measurements(monkeypatch, seconds=10)
    result = bench(**SHORT, minutes=95 / 60, modes=PLAIN, clock=fake.clock, log=quiet)
    assert fake.keys == [race.key for race in races()[:10]]
    assert fake.clock.now == 100
    assert len(result['rows']) == 10
    names = [race.key for race in races()[10:]] + list(PDAE_GEOMETRIES)
    assert result['left_out'] == [f'{name}: the time is over' for name in names]


def test_fast_parts_leave_their_time_to_the_others(monkeypatch):
    fake = Measurements(monkeypatch, seconds=1)
    result = bench(**SHORT, minutes=3, modes=PLAIN, clock=fake.clock, log=quiet)
    assert result['left_out'] == []
    assert fake.shares[0] == pytest.approx(180 / 18)
    assert fake.shares == sorted(fake.shares)
    assert fake.shares[15] == pytest.approx((180 - 15) / 3)


def test_compiling_is_left_out_if_it_would_take_too_long(monkeypatch):
    clock = Clock()
    lines = []
    state = bench_module._Bench(
        'lesson', torch.device('cpu'), MODES, 1.0, bench_module.Budget(100, clock), {},
        lines.append, [],
    )  # fmt: skip
    model = build_model(races()[0], 'smoke')
    monkeypatch.setattr(bench_module, 'expected_seconds', lambda *a: 40)
    assert state.compiles(MODES[2], model, 4, 'a race')
    clock.now = 30  # 70 s are left
    assert not state.compiles(MODES[2], model, 4, 'a race')
    assert state.compiles(MODES[1], model, 4, 'a race')
    assert state.left_out == ['a race, compiled: about 40 s of compiling, 70 s left']
    assert lines == [f'left out: {state.left_out[0]}']


def test_a_part_without_memory_is_left_out(monkeypatch):
    fake = Measurements(monkeypatch, seconds=1)

    def compare(name, *others):
        raise torch.OutOfMemoryError('too large\nby far')

    monkeypatch.setattr(bench_module, '_compared', compare)
    result = bench(**SHORT, modes=PLAIN, clock=fake.clock, log=quiet)
    assert len(result['rows']) == 16
    assert result['left_out'] == [
        f'{name}: OutOfMemoryError: too large' for name in PDAE_GEOMETRIES
    ]


# --- a stop ---


def test_a_stopped_measurement_keeps_its_rows_and_continues(monkeypatch, tmp_path):
    path = tmp_path / 'cpu.json'
    path.write_text('{"an": "older result"}')
    fake = Measurements(monkeypatch, seconds=1)
    lines = count(1)

    def stop(line):
        if next(lines) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(path, **SHORT, modes=PLAIN, clock=fake.clock, log=stop)
    assert path.read_text() == '{"an": "older result"}'
    assert len(fake.keys) == 3
    kept = json.loads((tmp_path / 'cpu-running.part.json').read_text())
    assert list(kept['rows']) == [race.key for race in races()[:2]]

    result = bench(path, **SHORT, modes=PLAIN, clock=fake.clock, log=quiet)
    assert fake.keys[3:] == [race.key for race in races()[2:]]
    assert len(result['rows']) == 16
    assert json.loads(path.read_text()) == result
    assert list(tmp_path.iterdir()) == [path]


def test_a_later_call_measures_what_was_left_out(monkeypatch, tmp_path):
    path = tmp_path / 'cpu.json'
    fake = Measurements(monkeypatch, seconds=10)
    short = bench(path, **SHORT, minutes=1, modes=PLAIN, clock=fake.clock, log=quiet)
    assert len(short['rows']) == 6
    assert json.loads(path.read_text()) == short
    full = bench(path, **SHORT, minutes=10, modes=PLAIN, clock=fake.clock, log=quiet)
    assert len(fake.keys) == 16
    assert full['left_out'] == []
    assert full['rows'][:6] == short['rows']


def test_a_stopped_measurement_with_other_settings_is_refused(monkeypatch, tmp_path):
    path = tmp_path / 'cpu.json'
    fake = Measurements(monkeypatch, seconds=10)
    bench(path, **SHORT, minutes=1, modes=PLAIN, clock=fake.clock, log=quiet)
    with pytest.raises(ValueError, match='other settings .modes'):
        bench(path, **SHORT, modes=MODES[:2], clock=fake.clock, log=quiet)


# --- the table ---


def test_a_measurement_has_all_rows(measured):
    path, result = measured
    assert json.loads(path.read_text()) == result
    rows = rows_of(result)
    wanted = {
        (race.geometry.title, race.method, race.step, mode.name)
        for race in races()
        for mode in MODES[:2]
    }
    assert {(row.geometry, row.method, row.step, row.mode) for row in rows} == wanted
    assert len(rows) == len(wanted) == 32
    for row in rows:
        assert row.images_per_s == row.batch / row.seconds > 0
        assert row.share == pytest.approx(row.tflops / (row.peak_gflops / 1000))
        assert row.peak_gflops == result['peak_gflops'][row.dtype]['matmul']
        assert row.traffic > 0
        assert row.counted_memory > 0
        assert row.used_memory is None
    assert {row.dropout for row in rows if 'paper' in row.geometry} == {0.1}
    assert result['pdae'].keys() == PDAE_GEOMETRIES.keys()
    assert {'hardware', 'threads', 'versions', 'seconds', 'load'} <= result.keys()


def test_modes_of_a_row_share_its_arithmetic(measured):
    _, result = measured
    by_race = {}
    for row in rows_of(result):
        by_race.setdefault((row.geometry, row.method, row.step), set()).add(row.gflops)
    assert len(by_race) == 16
    assert all(len(gflops) == 1 for gflops in by_race.values())


def test_a_compiled_mode_is_one_more_row_and_its_failure_is_none(monkeypatch):
    only = races()[:1]
    monkeypatch.setattr(bench_module, 'races', lambda: only)
    monkeypatch.setattr(bench_module, '_compared', lambda *a: {})
    result = bench(**SHORT, modes=MODES, log=quiet)
    assert [row.mode for row in rows_of(result)] == ['float32', 'eager', 'compiled']
    assert result['left_out'] == []

    def fail(*args, **kw):
        raise RuntimeError('no compiler\nin this test')

    monkeypatch.setattr(bench_module, 'compiled_blocks', fail)
    result = bench(**SHORT, modes=MODES, log=quiet)
    assert [row.mode for row in rows_of(result)] == ['float32', 'eager']
    assert result['left_out'] == [f'{only[0].key}, compiled: RuntimeError: no compiler']


def test_a_failure_of_another_mode_is_an_error(monkeypatch):
    def fail(*args):
        raise AttributeError('of a training')

    monkeypatch.setattr(bench_module, 'training_call', fail)
    with pytest.raises(AttributeError, match='of a training'):
        bench(**SHORT, modes=PLAIN, log=quiet)


def a_result(hardware, rows):
    "A stored result with these rows."
    peaks = dict(float32=dict(matmul=1e5, conv=1e5))
    return dict(
        hardware=hardware,
        versions=dict(torch='2.11'),
        peak_gflops=peaks,
        rows=[row._asdict() for row in rows],
        left_out=['a row: the time is over'],
    )


def table_of(hardware):
    "The table of two rows on this hardware."
    is_gpu = 'H200' in hardware
    rows = [
        a_row(used_memory=21 * 10**9 if is_gpu else None),
        a_row(mode='compiled', seconds=0.125, used_memory=12_345_678_901 if is_gpu else None),
        a_row(method='PDAE'),
        a_row(geometry='MNIST lesson'),
    ]
    return bench_table(a_result(hardware, rows))


def cells_of(table, *words):
    "The cells of the first line that begins with these words."
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if tuple(cells[: len(words)]) == words:
            return cells
    raise AssertionError(f'no line {words}')


def test_official_numbers_stand_beside_ours_on_the_same_device_and_geometry_only():
    table = table_of('NVIDIA H200')
    heads = cells_of(table, 'step')
    assert heads[-2:] == ['used', 'official']
    assert cells_of(table, 'DPM training', 'float32')[-1] == '1,177'
    assert cells_of(table, 'PDAE training', 'float32')[-1] == '897'
    mnist = table[table.index('MNIST') :]
    assert cells_of(mnist, 'DPM training', 'float32')[-1] == '–'
    other = table_of('NVIDIA A100')
    assert 'official' not in cells_of(other, 'step')
    for official in OFFICIAL:
        assert f'{official.images_per_s:,} images/s, batch 128, one H200' in other


def test_cells_of_a_row():
    "128 images in half a second are 256 images/s, 20.48 TFLOP/s and a fifth of 100 TFLOP/s."
    cells = cells_of(table_of('a CPU'), 'DPM training', 'float32')
    assert cells[2:] == ['256', '1.00', '20.5', '20%', '1,000', '20']
    compiled = cells_of(table_of('a CPU'), 'DPM training', 'compiled')
    assert compiled[2:4] == ['1,024', '4.00']


def test_few_rounds_are_named():
    table = bench_table(a_result('a CPU', [a_row(rounds=2), a_row(method='PDAE')]))
    lines = [line for line in table.splitlines() if line.startswith('fewer')]
    assert lines == ['fewer than three rounds: CelebA-64 paper, DPM training']


@pytest.mark.parametrize('hardware', ['NVIDIA H200', '2 CPU cores (x86_64, bf16), 1 threads'])
def test_the_table_fits_100_columns(hardware):
    assert max(map(len, table_of(hardware).splitlines())) <= 100


def test_measured_rows_become_hours():
    rows = [a_row(), a_row(method='PDAE', seconds=1.0), a_row(method='PDAE', step='sampling')]
    measured = throughput(a_result('a GPU', rows), 'float32')
    assert measured.images_per_s == dict(celeba64_dpm=256, celeba64_pdae=128)
    assert measured.tflops['celeba64_dpm'] == pytest.approx(
        0.256 * row_gflops('celeba64_dpm', 'paper')
    )
    with pytest.raises(ValueError, match='0 of 2 rows of CelebA-64 paper in mode eager'):
        throughput(a_result('a GPU', rows), 'eager')


# --- a GPU, without one ---


def test_memory_on_a_gpu_is_what_the_second_call_adds(monkeypatch):
    "The first call may search for algorithms, which needs memory once."
    state = dict(now=100, peak=0)
    needed = iter([900, 40])

    def step():
        state['peak'] = max(state['peak'], state['now'] + next(needed))

    def reset(device):
        state['peak'] = state['now']

    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', reset)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: state['peak'])
    assert bench_module._warm_up(step, torch.device('cuda'), before=70) == 30 + 40
    assert bench_module._warm_up(lambda: None, torch.device('cpu'), before=0) is None


@pytest.mark.parametrize('free, batch', [(10**12, 128), (10**6, 4), (1, 1)])
def test_the_batch_on_a_gpu_fits_its_memory(monkeypatch, free, batch):
    "A training needs 100 kB, and 120 kB for each image; 70 % of the free memory may be used."
    monkeypatch.setattr(bench_module, 'free_bytes', lambda device: free)
    model = build_model(races()[0], 'smoke')

    def bytes_of(n, dtype):
        assert dtype == torch.float32
        return StepBytes(0.0, 100_000 + 120_000 * n)

    assert bench_module.batch_of(model, torch.device('cuda'), 'lesson', bytes_of) == batch


# --- the command ---


@pytest.mark.parametrize(
    'wrong, text', [(dict(size='paper'), "got 'paper'"), (dict(minutes=0), 'above 0, got 0')]
)
def test_wrong_arguments_are_refused_before_work_starts(wrong, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        bench(tmp_path / 'cpu.json', **(SHORT | wrong), log=quiet)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_table_and_names_the_file(monkeypatch, tmp_path, capsys):
    asked = {}

    def measured(path, **kw):
        asked.update(kw, path=Path(path))
        return a_result('a CPU', [a_row()]) | dict(seconds=7)

    monkeypatch.setattr('pdae_nb.cli.bench', measured)
    out = tmp_path / 'speed.json'
    result = cmd_bench(minutes=2.0, size='smoke', device='cpu', out=str(out))
    assert result == dict(written=str(out), seconds=7, left_out=['a row: the time is over'])
    assert 'DPM training' in capsys.readouterr().out
    assert asked['path'] == out
    assert (asked['minutes'], asked['size']) == (2.0, 'smoke')
    assert asked['modes'] == default_modes('cpu')
    cmd_bench(compile=True, device='cpu', out=str(out))
    assert asked['modes'] == MODES


def test_a_gpu_is_measured_in_all_modes():
    assert default_modes('cuda') == MODES
    assert [mode.name for mode in default_modes('cpu')] == ['float32', 'eager']


def test_the_stored_measurement_agrees_with_itself():
    folder = Path(__file__).parent.parent / 'data/results/bench'
    result = json.loads((folder / 'cpu.json').read_text(encoding='utf-8'))
    rows = rows_of(result)
    assert {(row.geometry, row.method, row.step) for row in rows} == {
        (race.geometry.title, race.method, race.step) for race in races()
    }
    gflops = {
        (row.method, row.step): row.gflops for row in rows if row.geometry == rows[0].geometry
    }
    assert gflops['DPM', 'training'] == pytest.approx(row_gflops('celeba64_dpm', 'paper'), rel=1e-3)
    assert result['seconds_to_first_sample'] > 0
    assert result['import_seconds_beyond_torch'] > 0
    assert {'train_ratio', 'forward_ratio', 'saved_by_skipping_G'} <= result['pdae'][
        'celeba64 paper'
    ].keys()


def test_the_recipe_of_a_model_decides_its_geometry():
    assert model_of(RECIPES['mnist_dpm', 'lesson']).shape == (1, 28, 28)
    assert model_of(RECIPES['celeba64_dpm', 'lesson']).shape == (3, 64, 64)
