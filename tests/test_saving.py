"""What JupyterLab, started by `make lab`, writes when it saves a page. Without a browser."""

import asyncio
import os
from pathlib import Path

import nbformat
import pytest
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbformat.sign import NotebookNotary
from traitlets.config import PyFileConfigLoader

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / '.ci/jupyter/jupyter_server_config.py'
WIDGET = 'application/vnd.jupyter.widget-view+json'


def outputs_of_a_run():
    "A progress bar, a closed progress bar, and a figure."
    new = nbformat.v4.new_output
    figure = {'image/png': 'iVBORw0KGgo=', 'text/html': '<b>bold</b>'}
    return [
        new('display_data', {WIDGET: {'model_id': 'abc'}, 'text/plain': 'bar'}),
        new('display_data', {WIDGET: {'model_id': ''}, 'text/plain': ''}),
        new('execute_result', figure, execution_count=7),
        new('stream', text='<object at 0x7f00>\n'),
    ]


def page_of_a_run():
    "A page as JupyterLab sends it to the server."
    notebook = nbformat.v4.new_notebook()
    about = dict(widgets=dict(state={}), language_info=dict(name='python'))
    notebook.metadata = nbformat.from_dict(about)
    metadata = dict(trusted=True, execution=dict(started='now'), jupyter=dict(source_hidden=True))
    cell = nbformat.v4.new_code_cell('1', outputs=outputs_of_a_run(), execution_count=7)
    cell.metadata = nbformat.from_dict(metadata)
    notebook.cells = [nbformat.v4.new_markdown_cell('text'), cell]
    return notebook


@pytest.fixture
def hook():
    "The function that the settings name."
    return PyFileConfigLoader(str(CONFIG)).load_config().ContentsManager.pre_save_hook


@pytest.fixture
def save(hook, tmp_path, monkeypatch):
    "Save a page of a folder with the settings of the repository, and return what is stored."
    for name in ('settings.ini', 'pyproject.toml'):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('JUPYTER_DATA_DIR', str(tmp_path / 'data'))

    def save(notebook, name='page.ipynb', hook=hook):
        contents = AsyncLargeFileManager(root_dir=str(tmp_path), pre_save_hook=hook)
        model = dict(type='notebook', format='json', content=notebook)
        asyncio.run(contents.save(model, name))
        return nbformat.read(tmp_path / name, as_version=4)

    return save


def test_a_saved_page_is_clean(save):
    for _ in range(2):  # a new page, and one that exists
        stored = save(page_of_a_run())
        assert stored.metadata == {}
        cell = stored.cells[1]
        assert cell.metadata == {'jupyter': {'source_hidden': True}}
        assert cell.execution_count is None
        assert [output.output_type for output in cell.outputs] == ['execute_result', 'stream']
        assert cell.outputs[0].data['image/png'] == 'iVBORw0KGgo='
        assert cell.outputs[1].text == '<object>\n'


@pytest.mark.parametrize('trusted', [True, False])
def test_saving_changes_no_trust(save, trusted):
    notebook = page_of_a_run()
    notebook.cells[1].metadata.trusted = trusted
    stored = save(notebook)
    assert NotebookNotary().check_signature(stored) == trusted


def test_a_failed_hook_loses_no_page(save):
    def fail(**_):
        raise RuntimeError('of the test')

    stored = save(page_of_a_run(), hook=fail)
    assert stored.cells[1].execution_count == 7


def test_a_failed_cleaning_loses_no_page(save, hook, monkeypatch):
    def fail(**_):
        raise RuntimeError('of the test')

    monkeypatch.setitem(hook.__globals__, 'clean_jupyter', fail)
    stored = save(page_of_a_run())
    assert stored.cells[1].execution_count == 7
    assert WIDGET not in str(stored)
    assert NotebookNotary().check_signature(stored)


def test_other_files_are_saved_unchanged(hook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = AsyncLargeFileManager(root_dir=str(tmp_path), pre_save_hook=hook)
    asyncio.run(contents.save(dict(type='file', format='text', content='a\n'), 'notes.md'))
    assert (tmp_path / 'notes.md').read_bytes() == b'a\n'.replace(b'\n', os.linesep.encode())
