"""JupyterLab in a browser, for `test_browser.py` and `.ci/measure_sliders.py`.

JupyterLab starts as in `make lab`, in a copy of the repository, with a user who has no settings.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ['.ci', 'nbs', 'pdae_nb', 'data/models', 'data/results', 'settings.ini', 'pyproject.toml']
NAMES = ['chromium', 'google-chrome', 'chromium-browser']
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = [
    '--no-sandbox',
    '--disable-dev-shm-usage',
    '--disable-gpu',
    '--disable-background-networking',
    '--no-first-run',
    '--disable-sync',
    '--disable-component-update',
]
TOKEN = 'secret'
LIGHT = 'JupyterLab Light'
DARK = 'JupyterLab Dark'

# JavaScript for the console of JupyterLab
CELLS = """() => {
    const cells = [...jupyterapp.shell.currentWidget.content.model.cells];
    return cells.filter(cell => cell.type === 'code').map(cell => ({
        number: cell.executionCount,
        running: cell.executionState !== 'idle',
        errors: cell.outputs.toJSON().filter(output => output.output_type === 'error').length,
        forms: cell.outputs.toJSON().flatMap(output => Object.keys(output.data ?? {})),
    }));
}"""
CHANGED = '() => jupyterapp.shell.currentWidget.context.model.dirty'
CELLS_WITH = """text => {
    const cells = [...jupyterapp.shell.currentWidget.content.model.cells];
    const outputs = cells.map(cell => JSON.stringify(cell.outputs?.toJSON() ?? []));
    return outputs.flatMap((output, number) => output.includes(text) ? [number] : []);
}"""
SCROLL = 'cell => jupyterapp.shell.currentWidget.content.scrollToItem(cell)'
ACTIVE_CELL = '() => jupyterapp.shell.currentWidget.content.activeCellIndex'
IMAGE = """async image => {
    await image.decode();
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext('2d').drawImage(image, 0, 0);
    const box = image.getBoundingClientRect();
    return {
        src: image.src,
        pixels: canvas.toDataURL(),
        size: [image.naturalWidth, image.naturalHeight],
        shown: [box.width, box.height],
        full_width: +image.getAttribute('width'),
    };
}"""


def until(check: Callable, seconds: float, what: str):
    "The first true result of `check()`. A TimeoutError that says what did not happen."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = check()
        if result:
            return result
        time.sleep(0.1)
    raise TimeoutError(f'{what} within {seconds:g} s')


def copy_repository(target: Path) -> Path:
    "A copy of the files that pages need."
    ignored = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.last_checked')
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def environment(repository: Path, home: Path) -> dict[str, str]:
    "The variables of a user without settings. Pages have size `smoke`."
    dropped = ('IN_TEST', 'MPLBACKEND', 'PDAE_NB_', 'JUPYTER', 'PYTHONPATH')
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get('PATH', '')])
    return kept | dict(
        PATH=path,
        HOME=str(home),
        JUPYTER_CONFIG_DIR=str(home / 'config'),
        JUPYTER_DATA_DIR=str(home / 'data'),
        JUPYTER_RUNTIME_DIR=str(home / 'runtime'),
        IPYTHONDIR=str(home / 'ipython'),
        XDG_CACHE_HOME=str(home / 'cache'),
        PYTHONPATH=str(repository),
        PDAE_NB_SIZE='smoke',
        PDAE_NB_DATA=os.environ.get('PDAE_NB_DATA', str(home)),
        PDAE_NB_CACHE=str(home / 'cache'),
        OMP_NUM_THREADS='1',
        HF_HUB_OFFLINE='1',
    )


def set_theme(home: Path, theme: str) -> None:
    "Choose the theme of JupyterLab, and do not ask for news."
    folder = home / 'config/lab/user-settings/@jupyterlab/apputils-extension'
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(themes=dict(theme=theme), notification=dict(fetchNews='false'))
    for name, values in settings.items():
        (folder / f'{name}.jupyterlab-settings').write_text(json.dumps(values), encoding='utf-8')


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


class Lab:
    "A running JupyterLab."

    def __init__(self, repository: Path, port: int, process: subprocess.Popen):
        self.repository = repository
        self.url = f'http://127.0.0.1:{port}'
        self.process = process

    def ask(self, path: str, method: str = 'GET'):
        "An answer of the server's interface, or None."
        headers = {'Authorization': f'token {TOKEN}'}
        url = f'{self.url}/api/{path}'
        request = urllib.request.Request(url, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or 'null')
        except OSError:
            return None

    def has_idle_kernel(self, path: str) -> bool:
        "Whether the kernel of a page waits for its cells and the browser listens to it."
        kernels = [s['kernel'] for s in self.ask('sessions') or [] if s['path'] == path]
        return any(k['execution_state'] == 'idle' and k['connections'] for k in kernels)


@contextmanager
def running_lab(
    repository: Path, home: Path, theme: str = LIGHT, trust: bool = True
) -> Iterator[Lab]:
    "JupyterLab as in `make lab`; or, without trust, the program alone."
    set_theme(home, theme)
    port = free_port()
    program = ['sh', '.ci/lab'] if trust else ['jupyter-lab', f'--ServerApp.root_dir={repository}']
    options = [
        '--no-browser',
        '--allow-root',
        '--ip=127.0.0.1',
        f'--port={port}',
        '--ServerApp.port_retries=0',
        f'--IdentityProvider.token={TOKEN}',
        '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
        '--LabApp.expose_app_in_browser=True',
    ]
    log = home / f'lab-{port}.log'
    with log.open('w', encoding='utf-8') as file:
        process = subprocess.Popen(
            [*program, *options],
            cwd=repository,
            env=environment(repository, home),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    lab = Lab(repository, port, process)
    try:
        until(lambda: lab.ask('status') or process.poll() is not None, 120, 'no answer')
        if process.poll() is not None:
            raise RuntimeError(log.read_text(encoding='utf-8'))
        yield lab
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    "Stop the server, which stops its kernels."
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def running_browser(home: Path) -> Iterator:
    "Chromium, without a window."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        env = os.environ | dict(HOME=str(home))
        browser = play.chromium.launch(executable_path=CHROMIUM, args=OPTIONS, env=env)
        yield browser
        browser.close()


class Page:
    "A notebook in JupyterLab in a new browser context."

    def __init__(self, browser, lab: Lab, path: str):
        self.lab = lab
        self.path = path
        self.errors = []
        self.tab = browser.new_context(viewport=dict(width=1300, height=1000)).new_page()
        self.tab.set_default_timeout(60_000)
        self.tab.on('pageerror', lambda error: self.errors.append(str(error)))
        self.tab.goto(f'{lab.url}/lab/tree/{path}?token={TOKEN}&reset')
        self.tab.wait_for_selector('.jp-NotebookPanel .jp-Cell')
        # JupyterLab loses a command to run that it gets before the kernel has answered.
        until(lambda: lab.has_idle_kernel(path), 120, f'no idle kernel for {path}')

    def close(self) -> None:
        self.tab.context.close()

    def cells(self) -> list[dict]:
        return self.tab.evaluate(CELLS)

    def run_all(self, seconds: float = 300) -> None:
        "Run all cells by the menu, and wait for the last one."
        for _ in range(4):
            self.tab.get_by_role('menuitem', name='Run', exact=True).click()
            self.tab.locator('.lm-Menu-item', has_text='Run All Cells').first.click()
            try:
                until(lambda: any(c['running'] or c['number'] for c in self.cells()), 10, 'no run')
                break
            except TimeoutError:
                continue
        until(self.has_run, seconds, f'{self.path} has not run')

    def has_run(self) -> bool:
        cells = self.cells()
        failed = [cell for cell in cells if cell['errors']]
        if failed:
            raise RuntimeError(f'{self.path}: the cell {failed[0]["number"]} failed')
        return all(cell['number'] and not cell['running'] for cell in cells)

    def save(self) -> None:
        "Save by the keyboard, and wait."
        self.tab.keyboard.press('Control+s')
        until(lambda: not self.tab.evaluate(CHANGED), 60, f'{self.path} is not saved')

    def active_cell(self) -> int:
        return self.tab.evaluate(ACTIVE_CELL)

    def cells_with(self, text: str) -> list[int]:
        "The numbers of the cells, among all cells, whose outputs hold a text."
        return self.tab.evaluate(CELLS_WITH, text)

    def show(self, cell: int):
        "Scroll to a cell, which JupyterLab renders when it comes near."
        self.tab.evaluate(SCROLL, cell)
        return self.tab.locator(f'.jp-Cell[data-windowed-list-index="{cell}"]')

    def end_kernel(self) -> None:
        "Close the page and end its kernel."
        self.close()
        for session in self.lab.ask('sessions') or []:
            if session['path'] == self.path:
                self.lab.ask(f'sessions/{session["id"]}', 'DELETE')


class Handles:
    "A slider of a page: its handles and its image."

    def __init__(self, page: Page, cell: int | None = None):
        "The slider of a cell; of the first that has one, if no cell is given."
        self.page = page
        cell = page.cells_with('pdae-slider')[0] if cell is None else cell
        self.element = page.show(cell).locator('.pdae-slider')
        self.element.scroll_into_view_if_needed()
        self.inputs = self.element.locator('input')

    def count(self) -> int:
        return self.inputs.count()

    def image(self) -> dict:
        "The image, decoded."
        return self.element.locator('img').evaluate(IMAGE)

    def text(self, number: int = 0) -> str:
        "The value beside a handle."
        return self.element.locator('output').nth(number).inner_text()

    def hold(self, number: int = 0) -> None:
        "Press the mouse on a handle."
        self.move(self.share(number), number)
        self.page.tab.mouse.down()

    def share(self, number: int = 0) -> float:
        "Where a handle is, from 0 to 1."
        handle = self.inputs.nth(number)
        return int(handle.input_value()) / int(handle.get_attribute('max'))

    def move(self, share: float, number: int = 0, steps: int = 4) -> None:
        "Move the mouse to a place from 0 to 1 on the track of a handle."
        box = self.inputs.nth(number).bounding_box()
        half = box['height'] / 2  # of the handle, which is round
        x = box['x'] + half + share * (box['width'] - 2 * half)
        self.page.tab.mouse.move(x, box['y'] + half, steps=steps)

    def release(self) -> None:
        self.page.tab.mouse.up()


def visible_text(element) -> str:
    "The text of an element in one line."
    return re.sub(r'\s+', ' ', element.inner_text())
