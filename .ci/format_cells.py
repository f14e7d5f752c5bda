#!/usr/bin/env python3
"""Format the exported cells of the notebooks with ruff.

python .ci/format_cells.py [NOTEBOOK ...]           # format them; without a name, all notebooks
python .ci/format_cells.py --check [NOTEBOOK ...]   # exit 1 and name those that are not formatted

Cells that are not exported keep their text. ruff itself reads and writes notebooks, so the cells
are copied into temporary notebooks, formatted there, and copied back.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPORTS = ('#| export', '#|export')


def is_exported(cell: dict) -> bool:
    "Whether nbdev writes this cell into a module."
    first_line = ''.join(cell['source']).split('\n', 1)[0]
    return cell['cell_type'] == 'code' and first_line.startswith(EXPORTS)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding='utf-8'))


def write(path: Path, notebook: dict) -> None:
    text = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False)
    path.write_text(text + '\n', encoding='utf-8', newline='\n')


def formatted(folder: Path) -> None:
    "Sort the imports of all notebooks in a folder, then format them."
    ruff = [sys.executable, '-m', 'ruff']
    config = ['--config', str(ROOT / 'pyproject.toml'), '--quiet']
    subprocess.run([*ruff, 'check', '--fix-only', '--select', 'I', *config, folder], check=True)
    subprocess.run([*ruff, 'format', *config, folder], check=True)


def main(check: bool, names: list[str]) -> int:
    paths = [Path(name).resolve() for name in names] or sorted((ROOT / 'nbs').rglob('*.ipynb'))
    paths = [path for path in paths if '.ipynb_checkpoints' not in path.parts]
    changed = []
    with tempfile.TemporaryDirectory() as name:
        copies = {path: Path(name) / f'{i}.ipynb' for i, path in enumerate(paths)}
        for path, copy in copies.items():
            notebook = read(path)
            notebook['cells'] = [cell for cell in notebook['cells'] if is_exported(cell)]
            write(copy, notebook)
        formatted(Path(name))
        for path, copy in copies.items():
            notebook = read(path)
            sources = {cell['id']: cell['source'] for cell in read(copy)['cells']}
            cells = [cell for cell in notebook['cells'] if cell['id'] in sources]
            if all(''.join(cell['source']) == ''.join(sources[cell['id']]) for cell in cells):
                continue
            changed.append(path.name)
            for cell in cells:
                cell['source'] = sources[cell['id']]
            if not check:
                write(path, notebook)
    for path in changed:
        print(f'{"not formatted" if check else "formatted"}: {path}')
    return int(check and bool(changed))


if __name__ == '__main__':
    arguments = sys.argv[1:]
    sys.exit(main('--check' in arguments, [word for word in arguments if word != '--check']))
