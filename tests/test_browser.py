"""Pages in JupyterLab, in a real browser: sliders, the saved file, the reopened page.

The tests need playwright and Chromium. Without them they are skipped.
"""

import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

pytest.importorskip(
    'playwright.sync_api', reason="needs playwright: pip install -e '.[browser]' -c constraints.txt"
)
import lab

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(lab.CHROMIUM is None, reason='needs Chromium: apt-get install chromium'),
    pytest.mark.skipif(shutil.which('sh') is None, reason='needs sh, which starts JupyterLab'),
]

OWN = 'nbs/toolbox/own.ipynb'
REAL = 'nbs/toolbox/plot.ipynb'
WIDGET = 'application/vnd.jupyter.widget-view+json'
HINT = 'Run this cell, or trust the page, to move the slider.'
CELLS = [
    """
    import time

    import matplotlib.pyplot as plt
    from pdae_nb.plot import animation, bar, sliders
    from pdae_nb.theme import WIDTH, setup_plots

    setup_plots()
    """,
    """
    def line(slope, colour):
        _, ax = plt.subplots(figsize=(WIDTH, 2.5))
        ax.plot([0, 1], [0, slope], color=colour)
        ax.set_ylim(-1, 1)
        return ax


    sliders(line, {'slope': [-1.0, -0.5, 0.0, 0.5, 1.0], 'colour of the line': ['red', 'green']})
    """,
    "animation(lambda slope: line(slope, 'red'), [-1.0, 0.0, 1.0])",
    """
    for _ in bar(range(4)):
        time.sleep(0.8)
    print('done')
    """,
    "line(0.5, 'green');",
]


def write_page(path: Path) -> None:
    "The page of these tests, without outputs, as `nbdev-clean` leaves it."
    notebook = nbformat.v4.new_notebook()
    name = 'python3'
    notebook.metadata.kernelspec = dict(display_name=name, language='python', name=name)
    for i, source in enumerate(CELLS):
        lines = [line.removeprefix('    ') for line in source.strip('\n').split('\n')]
        cell = nbformat.v4.new_code_cell('\n'.join(lines).strip(), id=f'cell{i}')
        notebook.cells.append(cell)
    nbformat.write(notebook, path)


def nbdev(command: str, repository: Path, home: Path, *arguments: str) -> None:
    "Run a command of nbdev in a copy of the repository."
    env = lab.environment(repository, home) | dict(MPLBACKEND='Agg')
    options = dict(cwd=repository, env=env, capture_output=True, text=True, timeout=600)
    result = subprocess.run([command, *arguments], **options)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('home')


@pytest.fixture(scope='module')
def repository(tmp_path_factory, home):
    "A copy of the repository with the page of these tests. A real page has the outputs of nbdev."
    copy = lab.copy_repository(tmp_path_factory.mktemp('lab') / 'repository')
    write_page(copy / OWN)
    nbdev('nbdev-test', copy, home, REAL, '--n-workers', '0', '--save')
    nbdev('nbdev-clean', copy, home)
    return copy


@pytest.fixture(scope='module')
def browser(home):
    with lab.running_browser(home) as browser:
        yield browser


@pytest.fixture(scope='module')
def server(repository, home):
    with lab.running_lab(repository, home) as server:
        yield server


@pytest.fixture(scope='module')
def page(browser, server):
    "The page of these tests, all of whose cells have run."
    page = lab.Page(browser, server, OWN)
    page.run_all()
    yield page
    assert not page.errors
    page.close()


@pytest.fixture
def handles(page):
    return lab.Handles(page)


def assert_not_stretched(image):
    width, height = image['size']
    shown_width, shown_height = image['shown']
    assert 0 < shown_width <= image['full_width'] + 1
    assert shown_width / shown_height == pytest.approx(width / height, rel=0.01)


def test_the_image_changes_while_the_handle_is_held(handles):
    handles.hold()
    before = handles.image()
    text = handles.text()
    assert before['size'][0] > 0
    assert_not_stretched(before)
    handles.move(0.5)
    during = handles.image()
    assert handles.text() == '0' != text
    assert during['src'] != before['src']
    assert during['pixels'] != before['pixels']
    assert during['size'] == before['size']
    handles.move(1.0)
    assert handles.text() == '1'
    assert handles.image()['pixels'] not in (before['pixels'], during['pixels'])
    handles.release()
    assert handles.text() == '1'


def test_each_handle_has_its_own_value(handles):
    before = handles.image()
    slope = handles.text(0)
    colour = handles.text(1)
    handles.hold(1)
    handles.move(0.0 if colour == 'green' else 1.0, 1)
    handles.release()
    assert {colour, handles.text(1)} == {'red', 'green'}
    assert handles.text(0) == slope
    assert handles.image()['pixels'] != before['pixels']


def test_a_narrow_window_does_not_stretch_the_image(page, handles):
    wide = page.tab.viewport_size
    page.tab.set_viewport_size(dict(width=800, height=1000))
    narrow = lab.until(
        lambda: (image := handles.image())['shown'][0] < image['full_width'] - 1 and image,
        10,
        'the image keeps its width',
    )
    assert_not_stretched(narrow)
    page.tab.set_viewport_size(wide)


def test_keys_move_the_handle_and_select_no_other_cell(page, handles):
    handles.hold()
    handles.move(0.5)
    handles.release()
    image = handles.image()
    cell = page.active_cell()
    values = []
    for key in ('ArrowRight', 'ArrowLeft', 'ArrowUp', 'ArrowDown', 'End', 'Home'):
        page.tab.keyboard.press(key)
        values.append(handles.text())
    assert values == ['0.5', '0', '0.5', '0', '1', '-1']
    assert handles.image()['pixels'] != image['pixels']
    assert page.active_cell() == cell


def test_a_saved_page_is_clean(page, repository, home):
    assert WIDGET in page.cells()[3]['forms'], 'JupyterLab shows no progress bar'
    page.save()
    saved = (repository / OWN).read_bytes()
    outputs = [cell['outputs'] for cell in json.loads(saved)['cells']]
    forms = [{*output.get('data', {})} for cell in outputs for output in cell]
    moving = {'image/png', 'text/html', 'text/plain'}
    assert forms == [moving, moving, set(), {'image/png', 'text/plain'}]
    assert [output['text'] for output in outputs[3]] == [['done\n']]
    nbdev('nbdev-clean', repository, home, '--fname', OWN)
    assert (repository / OWN).read_bytes() == saved


def test_a_saved_page_equals_the_page_that_nbdev_stores(browser, server, repository):
    path = repository / REAL
    before = path.read_bytes()
    page = lab.Page(browser, server, REAL)
    written = path.stat().st_mtime_ns
    page.run_all()
    page.save()
    assert path.stat().st_mtime_ns != written
    assert path.read_bytes() == before
    page.close()


def test_a_reopened_page_has_moving_sliders(page, browser, repository, home):
    "`make lab` trusts the stored pages. No cell runs."
    page.save()
    with lab.running_lab(repository, home) as server:
        again = lab.Page(browser, server, OWN)
        handles = lab.Handles(again)
        before = handles.image()
        assert before['size'][0] > 0
        assert HINT not in lab.visible_text(handles.element)
        handles.hold()
        handles.move(1.0)
        assert handles.text() == '1'
        assert handles.image()['pixels'] != before['pixels']
        handles.release()
        assert not any(cell['number'] for cell in again.cells())
        assert not again.errors
        again.close()


def test_a_page_without_trust_has_a_still_image(browser, repository, tmp_path):
    with lab.running_lab(repository, tmp_path, trust=False) as server:
        page = lab.Page(browser, server, OWN)
        handles = lab.Handles(page)
        image = handles.image()
        assert image['size'][0] > 0
        assert_not_stretched(image)
        assert HINT in lab.visible_text(handles.element)
        assert handles.inputs.first.is_disabled()
        assert handles.element.get_attribute('oninput') is None
        page.close()
