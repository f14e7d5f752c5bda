"""Settings of the JupyterLab that `.ci/lab` starts: pages are saved as `nbdev-clean` leaves them.

Jupyter executes this file. If the hook fails, Jupyter logs the error and saves the page anyway.
"""

import contextlib
import warnings

from nbdev.clean import clean_jupyter

WIDGET = 'application/vnd.jupyter.widget-view+json'


def without_bars(outputs: list[dict]) -> list[dict]:
    "The outputs that are not the widget of a progress bar."
    return [output for output in outputs if WIDGET not in output.get('data', {})]


def clean(path: str, model: dict, **_) -> None:
    "Clean a page that is about to be saved. If Jupyter trusts its cells, this stays so."
    notebook = model.get('content')
    if model['type'] != 'notebook' or notebook['nbformat'] != 4:
        return
    notebook['metadata'].pop('widgets', None)
    cells = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    trusted = [cell['metadata'].get('trusted', False) for cell in cells]
    for cell in cells:
        cell['outputs'] = without_bars(cell['outputs'])
    try:
        # nbdev also signs the file that is replaced. A new page has none.
        with contextlib.suppress(FileNotFoundError):
            clean_jupyter(path=path, model=model)
    finally:
        for cell, mark in zip(cells, trusted, strict=True):
            cell['metadata']['trusted'] = mark  # Jupyter reads this mark and does not write it


# Jupyter sets the hook twice, and warns.
warnings.filterwarnings('ignore', 'Overriding existing pre_save_hook')
c = get_config()  # noqa: F821 (Jupyter defines this name)
c.ContentsManager.pre_save_hook = clean
