#!/usr/bin/env python3
"""Measure the milliseconds of a move of each slider, in JupyterLab in Chromium.

python .ci/measure_sliders.py [PAGE ...]   # writes data/results/sliders/moves.json

A page is a path in `nbs/`, such as `toolbox/plot`. Without a page, all pages with a slider are
measured. The sliders are those of the stored page. If it has none, its cells run at size `smoke`,
in a copy of the repository. A page whose cells fail is named in the file and left out.

The mouse holds the handle and moves it from value to value. The time of a move is that from the
browser's `input` event to the next painted frame that has the new image. This needs playwright and
Chromium: `pip install -e '.[browser]' -c constraints.txt`.
"""

import importlib.metadata
import json
import os
import re
import signal
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tests'))
import lab  # noqa: E402 (the folder of the tests is in the path now)

TARGET = ROOT / 'data/results/sliders/moves.json'
MOVES = 60

# The listener runs after the slider's own, because the event reaches the parent later.
RECORD = """slider => {
    const image = slider.querySelector('img');
    window.moves = [];
    slider.parentElement.addEventListener('input', async event => {
        await image.decode();
        requestAnimationFrame(() => {
            const channel = new MessageChannel();  // its message arrives after the frame is painted
            channel.port1.onmessage = () => moves.push(performance.now() - event.timeStamp);
            channel.port2.postMessage(0);
        });
    });
}"""
RECORDED = '() => moves.length'
MEASURED = '() => moves'


def pages_with_sliders() -> list[str]:
    "The pages that call `slider` or `sliders`."
    found = []
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
        calls = re.compile(r'^(?!\s*(def|from|import)\b).*\bsliders?\(', re.M)
        if '.ipynb_checkpoints' not in path.parts and any(map(calls.search, sources)):
            found.append(str(path.relative_to(ROOT / 'nbs').with_suffix('')))
    return found


def milliseconds(handles: lab.Handles) -> list[float]:
    "The times of some moves of the first handle."
    tab = handles.page.tab
    most = int(handles.inputs.first.get_attribute('max'))
    handles.element.evaluate(RECORD)
    handles.hold()
    value = int(handles.inputs.first.input_value())
    for move in range(MOVES):
        # Fourteen values make a sweep, or as many as there are.
        step = max(1, most // 14)
        value = value + step if value + step <= most else 0
        handles.move(value / most, steps=1)
        lab.until(lambda n=move: tab.evaluate(RECORDED) > n, 10, 'the image did not change')
    handles.release()
    return tab.evaluate(MEASURED)


def measured(page: lab.Page) -> list[dict]:
    "A row for each slider of a page."
    rows = []
    for cell in page.cells_with('pdae-slider'):
        handles = lab.Handles(page, cell)
        moves = milliseconds(handles)
        names = [handles.inputs.nth(i).get_attribute('aria-label') for i in range(handles.count())]
        frames = handles.element.get_attribute('data-frames').split(' ')
        row = dict(
            page=page.path.removeprefix('nbs/').removesuffix('.ipynb'),
            slider=', '.join(names),
            frames=len(frames),
            kB=round(sum(map(len, frames)) * 3 / 4 / 1000),
            pixels=handles.image()['size'],
            moves=len(moves),
            median_ms=round(statistics.median(moves), 1),
            p95_ms=round(statistics.quantiles(moves, n=20)[-1], 1),
        )
        print(row, flush=True)
        rows.append(row)
    return rows


def stop_on_signal(server: lab.Lab) -> None:
    "Where this process is told to end, JupyterLab ends too."

    def stop(*_):
        lab.stop(server.process)
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)


def main(names: list[str]) -> None:
    result = dict(
        moves='from the input event to the painted frame, in milliseconds',
        cores=os.cpu_count(),
        load=os.getloadavg()[:2],
        jupyterlab=importlib.metadata.version('jupyterlab'),
    )
    rows = []
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / 'home'
        home.mkdir()
        repository = lab.copy_repository(Path(folder) / 'repository')
        with lab.running_lab(repository, home) as server, lab.running_browser(home) as browser:
            stop_on_signal(server)
            result['browser'] = f'Chromium {browser.version}'
            for name in names or pages_with_sliders():
                page = lab.Page(browser, server, f'nbs/{name}.ipynb')
                try:
                    if not page.cells_with('pdae-slider'):
                        page.run_all()
                    rows += measured(page)
                except (RuntimeError, TimeoutError) as error:
                    print(error, flush=True)
                    failed.append(name)
                page.end_kernel()
    text = json.dumps(result | dict(left_out=failed, rows=rows), indent=1)
    TARGET.write_text(text + '\n', encoding='utf-8', newline='\n')


if __name__ == '__main__':
    main(sys.argv[1:])
