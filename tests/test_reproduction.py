"""The list of figures and tables, the files of results, and how `pdae reproduce` runs an item."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from pdae_nb.cli import main
from pdae_nb.experiments import runs, training_efficiency
from pdae_nb.experiments.critical_stage import unpack_cells
from pdae_nb.experiments.items import ITEMS, PAPERS, STATUSES, Item, find_item, markdown, table
from pdae_nb.experiments.runs import EXPERIMENTS, reproduce, run_page, sizes_of, write_figure
from pdae_nb.experiments.training_efficiency import training_race
from pdae_nb.files import find_results, load_results
from pdae_nb.store import ResultFile, differences

matplotlib.use('Agg')

ROOT = Path(__file__).parent.parent


def by_name(item):
    "The id of a parametrised test."
    return item.name


def content(name):
    "A file of results at size lesson."
    return load_results(name)


def is_measured(name):
    "Whether there is a file of results at size lesson."
    try:
        content(name)
    except FileNotFoundError:
        return False
    return True


def cells_of(page):
    "Cells of a page by their ids."
    path = ROOT / 'nbs' / f'{page}.ipynb'
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return {cell['id']: cell for cell in cells}


# The list


def test_every_figure_and_table_of_the_papers_is_an_item():
    "Figures and tables are numbered from 1 on, without gaps, up to the last of each paper."
    counts = {
        'pdae-fig': 9,
        'pdae-table': 3,
        'diffae-fig': 22,
        'diffae-table': 10,
        'scorevae-fig': 6,
        'scorevae-table': 2,
    }
    names = {item.name for item in ITEMS}
    for kind, count in counts.items():
        numbers = {int(m[1]) for name in names if (m := re.fullmatch(rf'{kind}(\d+)', name))}
        assert numbers == set(range(1, count + 1)), kind


def test_names_are_unique_and_sorted():
    names = [item.name for item in ITEMS]
    assert len(names) == len(set(names))
    assert names == [item.name for item in sorted(ITEMS, key=lambda item: item.order)]


def test_order_of_names():
    "Numbers are compared as numbers: figure 10 comes after figure 9, and tables after figures."
    names = ['diffae-table1', 'diffae-fig10', 'diffae-appA.1', 'diffae-fig9', 'pdae-sec4.1']
    items = [Item(name, '', '', '', None, None, 'agrees', '') for name in names]
    ordered = [item.name for item in sorted(items, key=lambda item: item.order)]
    assert ordered == [
        'pdae-sec4.1',
        'diffae-fig9',
        'diffae-fig10',
        'diffae-table1',
        'diffae-appA.1',
    ]


@pytest.mark.parametrize('item', ITEMS, ids=by_name)
def test_an_item_is_complete(item):
    assert item.paper in PAPERS
    assert item.status in STATUSES
    assert item.title and item.statement and item.remark
    if item.status == 'not done':
        assert not item.is_runnable
        assert (item.n, item.seeds, item.data) == (None, None, '')
    else:
        assert item.page and item.data
        assert item.is_runnable or item.data == 'formulas'
    if item.data in ('', 'formulas'):
        assert item.n is None and item.seeds is None
    if item.minutes is not None:
        assert item.results


@pytest.mark.parametrize('item', [item for item in ITEMS if item.page], ids=by_name)
def test_the_cells_of_an_item_show_pictures(item):
    cells = cells_of(item.page)
    for cell in item.cells:
        assert cell in cells, f'{item.page} has no cell {cell}'
        assert 'image/png' in json.dumps(cells[cell]['outputs'])


MEASURED = [item for item in ITEMS if item.results and all(map(is_measured, item.results))]


def test_most_experiments_were_measured():
    measured = {name for item in MEASURED for name in item.results}
    assert set(EXPERIMENTS) - measured == {'mnist14_diffae'}


@pytest.mark.parametrize('item', MEASURED, ids=by_name)
def test_numbers_of_an_item_are_those_of_its_file(item):
    for name in item.results:
        d = content(name)
        value = d
        for key in item.n_key.split('/') if item.n_key else ():
            value = value[key]
        if item.n_key:
            assert item.n == value, f'{name}: {item.n_key}'
        rows = d.get('runs', {}).values()
        seeds = {row['seed'] for row in rows} if rows else {0}
        assert item.seeds == len(seeds)
    if item.n is not None:
        assert item.n_key


@pytest.mark.parametrize('item', MEASURED, ids=by_name)
def test_minutes_of_an_item_are_those_of_its_files(item):
    if item.minutes is not None:
        seconds = sum(content(name)['seconds'] for name in item.results)
        assert item.minutes == round(seconds / 60)


def test_order_of_pdae_and_ddim_in_table_2():
    "The remarks on PDAE's Table 2 and Diff-AE's Table 4 state what the files say."
    pdae = content('mnist_pdae_latent')['table']
    diffae = content('mnist_diffae_latent')['table']
    for steps in (10, 20, 50, 100):
        others = [pdae[f'DDIM {steps}']['fid'][0], diffae[f'Diff-AE {steps}']['fid'][0]]
        assert pdae[f'PDAE {steps}']['fid'][0] < min(others)
    assert diffae['Diff-AE 10']['fid'][0] > pdae['DDIM 10']['fid'][0]
    images = [pdae[f'PDAE {steps}']['n'] for steps in (10, 20, 50, 100)]
    assert images == [10_000, 1_000, 400, 200]


def test_contradictions_are_in_the_files():
    "ScoreVAE has a larger L2 than the VAE on CIFAR-10, and the remark quotes both."
    rows = content('cifar16_space')['rows']
    scorevae = rows['ScoreVAE, paper']['published']['mean']
    vae = rows['beta-VAE']['published']['mean']
    assert scorevae['l2'][0] > vae['l2'][0]
    assert scorevae['lpips'][0] > vae['lpips'][0]
    remark = find_item('scorevae-table1').remark
    assert f'({scorevae["l2"][0]:.2f} and {vae["l2"][0]:.2f})' in remark


def test_numbers_of_remarks_are_in_the_files():
    def share(grid, window):
        return unpack_cells(content(grid))[window].double().mean().item()

    remark = find_item('pdae-fig3').remark
    for grid in ('critical_stage_ddim', 'critical_stage_ddpm'):
        assert f'{100 * share(grid, (400, 700)):.1f} %' in remark
        needed = 0.95 * content(grid)['shortest']['full']
        assert f'{100 * needed:.1f} %' in remark
        assert share(grid, (400, 700)) < needed
    truncation = content('mnist_label_pdae')['truncation']
    fid = dict(zip(truncation['scale'], truncation['fid'], strict=True))
    remark = find_item('pdae-fig9').remark
    for scale in (0, 1.5, 3):
        assert f'{fid[scale]:.1f} ±' in remark
    copies = content('mnist_diffae_latent')['copies']
    assert all(space['third'] == 0 for space in copies.values())
    nearer = copies['pixels']['distance']['nearer']
    assert f'{100 * nearer:.1f} % of the samples are nearer' in find_item('diffae-fig9').remark
    rows = content('mnist_space')['rows']
    remark = find_item('diffae-table8').remark
    for label in ('Diff-AE', 'pixels', 'PCA, 64'):
        assert f'{100 * rows[label]["legible"]["accuracy"][0]:.1f} %' in remark


FINISHED = [
    'mnist14_scorevae',
    'mnist_cdpm',
    'mnist_diffae',
    'mnist_diffae_latent',
    'mnist_label_pdae',
    'mnist_pdae',
    'mnist_pdae_latent',
]


@pytest.mark.parametrize('name', FINISHED)
def test_a_shipped_measurement_is_not_repeated(name, tmp_path, monkeypatch):
    import pdae_nb.experiments.scorevae as scorevae

    def refuse(*args, **options):
        pytest.fail('a model was loaded or trained')

    monkeypatch.setattr(runs, 'load', refuse)
    monkeypatch.setattr(scorevae, 'cached_run', refuse)
    item = next(item for item in ITEMS if item.results == (name,))
    path = tmp_path / name / 'lesson.json'
    path.parent.mkdir()
    path.write_bytes(find_results(name).read_bytes())
    before = path.read_bytes()
    result = runs.reproduce(item.name, 'lesson', out=tmp_path, log=lambda line: None)
    assert result['finished_before']
    assert path.read_bytes() == before
    assert all(Path(picture).stat().st_size > 1000 for picture in result['pictures'])


def test_an_undefined_number_is_stored_as_null(tmp_path):
    results = ResultFile(tmp_path / 'x.json', {}, ('rows',))
    assert results.keep('rows', 'a', lambda: dict(se=float('nan'), mean=1.5))['se'] is None
    assert results.finish(largest=float('inf'))['largest'] is None
    stored = json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))
    assert stored['rows'] == dict(a=dict(se=None, mean=1.5))


def test_a_figure_is_drawn_again_from_its_numbers(tmp_path):
    path = tmp_path / 'mnist_cdpm' / 'lesson.json'
    path.parent.mkdir()
    path.write_bytes(find_results('mnist_cdpm').read_bytes())
    picture = path.with_suffix('.png')
    picture.write_bytes(b'an old or unfinished picture')
    reproduce('pdae-fig1', 'lesson', out=tmp_path, log=lambda line: None)
    assert Image.open(picture).size[0] > 100


# What is printed and written


def test_reproduction_file_is_the_list():
    text = (ROOT / 'REPRODUCTION.md').read_text(encoding='utf-8')
    assert text == markdown(), 'run python .ci/write_reproduction.py'
    for item in ITEMS:
        assert text.count(f'| **{item.name}** ') == 1
    for page in re.findall(r'\]\(([^)]+)\)', text):
        assert (ROOT / page).exists(), page


def test_rows_of_the_tables_have_all_columns():
    rows = [line for line in markdown().splitlines() if line.startswith('| **')]
    assert {row.count(' | ') for row in rows} == {9}


def test_printed_list(capsys):
    assert main(['reproduce']) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == table().strip()
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 120
    starts = {line.index(' mnist 28 ') for line in lines if ' mnist 28 ' in line}
    assert len(starts) == 1, 'the columns are aligned'
    counts = dict.fromkeys(STATUSES, 0)
    for item in ITEMS:
        counts[item.status] += 1
    summary = ', '.join(f'{count} {status}' for status, count in counts.items())
    assert lines[-1] == f'{len(ITEMS)} items: {summary}'


# Which items can be run


def test_every_runnable_item_has_a_size_and_a_function():
    for item in ITEMS:
        assert bool(sizes_of(item)) == item.is_runnable
        assert all(name in EXPERIMENTS for name in item.results)
    assert {name for item in ITEMS for name in item.results} == set(EXPERIMENTS)


@pytest.mark.parametrize(
    'words, message',
    [
        (['pdae-fig33'], "no item 'pdae-fig33'; similar ones are pdae-fig3"),
        (['pdae-fig4', 'fig3'], "no item 'fig3'"),
        (['pdae-fig3', '--size', 'huge'], "no size 'huge'; its sizes are smoke, lesson, paper"),
        (['pdae-fig4', '--size', 'paper'], "no size 'paper'; its sizes are smoke, lesson"),
        (['diffae-table8', '--size', 'smoke'], "no size 'smoke'; its sizes are lesson"),
        (['diffae-fig1', '--size', 'smoke'], 'diffae-fig1 is not made by a command'),
        (['pdae-fig3', '--size', 'smoke', '--seeds', '2'], 'takes no --seeds'),
        (['pdae-sec3.4', '--size', 'smoke', '--seeds', '0'], '--seeds must be at least 1, got 0'),
        (['pdae-sec3.4', '--size', 'smoke', '--device', 'cpu'], 'takes no --device'),
        (['--size', 'smoke'], '--size belongs to an item'),
    ],
)
def test_bad_input_is_an_error(words, message, tmp_path, capsys):
    assert main(['reproduce', *words, *([] if words[0][0] == '-' else ['--out', str(tmp_path)])])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_former_commands_are_gone(capsys):
    for name in ('stages', 'study'):
        assert main([name]) == 2
        assert 'reproduce' in capsys.readouterr().err


@pytest.mark.parametrize('name', sorted({name for item in MEASURED for name in item.results}))
def test_figure_of_a_shipped_file(name, tmp_path):
    "The figure is not empty."
    path = Path(write_figure(EXPERIMENTS[name].figure(content(name)), tmp_path / 'x.png'))
    darkest, brightest = Image.open(path).convert('L').getextrema()
    assert darkest < 100 < brightest


def test_figure_of_the_same_file_has_the_same_bytes(tmp_path):
    d = content('mnist_label_pdae')
    files = [tmp_path / 'a.png', tmp_path / 'b.png']
    for file in files:
        write_figure(EXPERIMENTS['mnist_label_pdae'].figure(d), file)
    assert files[0].read_bytes() == files[1].read_bytes()


# Evaluations of shipped runs


def test_finished_evaluation_is_not_measured_again(tmp_path, monkeypatch):
    def forbidden(*args, **kw):
        raise AssertionError('nothing is loaded')

    monkeypatch.setattr(runs, 'load', forbidden)
    folder = tmp_path / 'mnist_label_pdae'
    folder.mkdir()
    file = folder / 'lesson.json'
    file.write_text(json.dumps(content('mnist_label_pdae')), encoding='utf-8')
    lines = []
    done = reproduce('pdae-fig9', 'lesson', out=tmp_path, log=lines.append)
    assert done['finished_before']
    assert done['files'] == [str(file)]
    assert Path(done['pictures'][0]).exists()
    assert lines == ['pdae-fig9, size lesson: finished before, nothing was measured']

    results = json.loads(file.read_text(encoding='utf-8'))
    results['counts']['n'] = 20
    file.write_text(json.dumps(results), encoding='utf-8')
    with pytest.raises(ValueError, match='holds another evaluation .n 20, not 500'):
        reproduce('pdae-fig9', 'lesson', out=tmp_path)
    file.write_text('[]', encoding='utf-8')
    with pytest.raises(ValueError, match='holds no evaluation'):
        reproduce('pdae-fig9', 'lesson', out=tmp_path)


# Files of results


def test_differences_name_nested_settings():
    old = dict(n=1, recipe=dict(lr=1.0, px=2), t=[1, 2])
    assert differences(old, old) == []
    new = dict(n=1, recipe=dict(lr=2.0, px=2), t=[1])
    assert differences(old, new) == ['recipe.lr 1.0, not 2.0', 't [1, 2], not [1]']
    assert differences(dict(a=1), dict(b=1)) == ['a 1, not None', 'b None, not 1']


def test_finished_file_is_replaced_only_when_the_measurement_is_complete(tmp_path):
    path = tmp_path / 'x.json'
    unfinished = tmp_path / 'x.part.json'
    results = ResultFile(path, dict(n=1))
    results.put('rows', 'a', 1)
    results.finish(total=1)
    before = path.read_bytes()
    assert not unfinished.exists()

    longer = ResultFile(path, dict(n=1))
    assert longer.is_finished
    longer.put('rows', 'b', 2)
    assert not longer.is_finished
    assert path.read_bytes() == before, 'the finished file stays until the new parts are complete'

    resumed = ResultFile(path, dict(n=1))
    assert not resumed.is_finished
    assert resumed.data['rows'] == dict(a=1, b=2)
    final = resumed.finish(total=3)
    assert (final['total'], final['rows']) == (3, dict(a=1, b=2))
    assert json.loads(path.read_text(encoding='utf-8')) == final
    assert not unfinished.exists()
    assert {'hardware', 'versions', 'seconds', 'about'} <= final.keys()


def test_file_of_other_settings_is_an_error_and_stays(tmp_path):
    path = tmp_path / 'x.json'
    ResultFile(path, dict(recipe=dict(lr=1.0))).finish()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r'numbers of other settings \(recipe.lr 1.0, not 2.0\)'):
        ResultFile(path, dict(recipe=dict(lr=2.0)), kind='numbers')
    for damaged in ('', '{', '[]', '{}', '{"about": {}, "seconds": "a", "rows": {}}'):
        path.write_text(damaged, encoding='utf-8')
        with pytest.raises(ValueError, match='x.json holds no numbers'):
            ResultFile(path, {}, kind='numbers')
        assert path.read_text(encoding='utf-8') == damaged
    path.write_bytes(before)
    results = ResultFile(path, dict(recipe=dict(lr=1.0)))
    results.put('rows', 'PDAE', dict(weights='1f'))
    with pytest.raises(ValueError, match='other weights of PDAE'):
        results.check_weights('rows', dict(PDAE='2f'))
    results.check_weights('rows', dict(PDAE='1f', other='2f'))


def test_failed_measurement_leaves_the_earlier_parts(tmp_path):
    path = tmp_path / 'x.json'
    results = ResultFile(path, {})
    results.keep('rows', 'a', lambda: 1)

    def fails():
        raise RuntimeError('out of memory')

    with pytest.raises(RuntimeError):
        results.keep('rows', 'b', fails)
    assert not path.exists()
    again = ResultFile(path, {})
    assert again.keep('rows', 'a', fails) == 1
    assert again.get('rows', 'b') is None


# Runs


ENV = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', HF_HUB_OFFLINE='1')


def command(folder, *words):
    "The command line `pdae reproduce …`, with an empty cache in the folder."
    env = ENV | dict(PDAE_NB_CACHE=str(folder / 'cache'), PDAE_NB_DATA=str(folder / 'data'))
    line = [sys.executable, '-m', 'pdae_nb', 'reproduce', *words, '--out', str(folder / 'out')]
    return line, env


@pytest.mark.slow
def test_measuring_item_is_continued_after_it_was_killed(tmp_path):
    "Finished windows are kept. Then the item is finished, and a third call measures nothing."
    line, env = command(tmp_path, 'pdae-fig3', '--size', 'smoke')
    part = tmp_path / 'out/critical_stage_ddim/smoke.part.json'
    process = subprocess.Popen(line, env=env)
    end = time.time() + 240
    while not part.exists() and process.poll() is None and time.time() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = json.loads(part.read_text(encoding='utf-8'))['cells']
    assert kept

    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert not result['finished_before']
    for file, picture in zip(result['files'], result['pictures'], strict=True):
        d = json.loads(Path(file).read_text(encoding='utf-8'))
        assert len(d['cells']) == d['calls']['cells'] + 1 == 11
        assert d['shortest']['samples'] == 20
        assert Path(picture).exists()
    cells = json.loads(Path(result['files'][0]).read_text(encoding='utf-8'))['cells']
    assert kept.items() <= cells.items()
    assert not part.exists()

    again = subprocess.run(line, env=env, capture_output=True, text=True)
    assert json.loads(again.stdout)[0]['finished_before']
    assert 'finished before' in again.stderr


@pytest.mark.slow
def test_interrupted_race_is_continued(tmp_path, monkeypatch):
    "The finished run is kept; step times are measured once; fewer seeds than runs are an error."
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    path = tmp_path / 'race.json'
    curve_of = training_efficiency._learning_curve
    trained = []

    def one_run(name, *args):
        trained.append(name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return curve_of(name, *args)

    monkeypatch.setattr(training_efficiency, '_learning_curve', one_run)
    with pytest.raises(KeyboardInterrupt):
        training_race(path, 'smoke', (0,), 10)
    assert not path.exists()
    d = training_race(path, 'smoke', (0,), 10)
    assert trained == ['mnist14_pdae', 'mnist14_diffae', 'mnist14_diffae']
    assert list(d['runs']) == ['mnist14_pdae 0', 'mnist14_diffae 0']
    assert d['step_seconds'].keys() == d['about']['recipes'].keys()
    assert training_race(path, 'smoke', (0,), 10) == d
    assert len(trained) == 3
    with pytest.raises(ValueError, match='images 10, not 11'):
        training_race(path, 'smoke', (0,), 11)
    with pytest.raises(ValueError, match='holds 2 runs, 0 seeds would give 0'):
        training_race(path, 'smoke', (), 10)
    write_figure(EXPERIMENTS['mnist14_diffae'].figure(d), tmp_path / 'race.png')


@pytest.mark.slow
def test_page_item_writes_the_pictures_of_its_cell(tmp_path):
    page = ROOT / 'nbs/course/10_diffae.ipynb'
    before = page.read_bytes()
    line, env = command(tmp_path, 'diffae-fig3', '--size', 'smoke')
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    (picture,) = map(Path, result['pictures'])
    assert picture.parent == tmp_path / 'out/diffae-fig3'
    assert Image.open(picture).width > 100
    d = json.loads(Path(result['files'][0]).read_text(encoding='utf-8'))
    assert d['about'] == dict(
        item='diffae-fig3', page='course/10_diffae', cells=['73327ef7'], size='smoke'
    )
    assert d['pictures'] == {picture.name: dict(cell='73327ef7')}
    assert page.read_bytes() == before

    again = subprocess.run(line, env=env, capture_output=True, text=True)
    assert json.loads(again.stdout)[0]['finished_before']
    picture.unlink()
    third = subprocess.run(line, env=env, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert picture.exists()


def test_page_without_notebooks_is_an_error(tmp_path, monkeypatch):
    package = tmp_path / 'site-packages/pdae_nb/__init__.py'
    monkeypatch.setattr('pdae_nb.__file__', str(package))
    with pytest.raises(FileNotFoundError, match='an installed package has none'):
        run_page('course/10_diffae', ('73327ef7',), 'smoke')


def test_missing_packages_and_cells_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="has no cell 'nowhere'"):
        run_page('course/10_diffae', ('nowhere',), 'smoke')
    monkeypatch.setitem(sys.modules, 'nbclient', None)
    with pytest.raises(ImportError, match='needs nbformat, nbclient and ipykernel'):
        run_page('course/10_diffae', ('73327ef7',), 'smoke')
