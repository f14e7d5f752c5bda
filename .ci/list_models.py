#!/usr/bin/env python3
"""Write pdae_nb/assets/models.json: the trained models of this repository and their files.

python .ci/list_models.py           # write the table from data/models and pdae_nb/assets/models
python .ci/list_models.py --check   # exit 1 and show a diff when it is out of date
python .ci/list_models.py --files FOLDER   # copy the files of a release there, as RUN.FILE

The address of the release files is made from `git_url` and `version` in settings.ini.
"""

import difflib
import json
import shutil
import sys
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

from pdae_nb.release import PACKAGED, describe, with_files

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / 'pdae_nb/assets/models.json'
LICENCE = 'Apache-2.0'  # all models were trained by this project
LICENCES = {'celeba64': 'CelebA: non-commercial research only'}  # data set -> licence of its models
FOLDERS = [ROOT / 'pdae_nb/assets/models', ROOT / 'data/models']


def release_address() -> str:
    "Address of the release of this version; a file RUN.FILE lies directly below."
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    settings = parser['DEFAULT']
    return f'{settings["git_url"]}/releases/download/v{settings["version"]}'


def run_folders() -> dict[str, Path]:
    "Name -> folder of each model of the repository."
    runs = {}
    for folder in FOLDERS:
        for record in folder.glob('*/run.json'):
            run = record.parent
            if run.name in runs:
                raise SystemExit(f'{run.name} is stored twice: {runs[run.name]} and {run}')
            runs[run.name] = run
    return runs


def render() -> str:
    "The text of models.json."
    runs = run_folders()
    rows = []
    for name in sorted(runs):
        info = describe(runs[name])
        licence = LICENCES.get(info.data, LICENCE)
        rows.append(with_files(replace(info, licence=licence), runs[name]))
    return json.dumps(dict(address=release_address(), models=rows), indent=1) + '\n'


def copy_files(folder: Path) -> None:
    "Copy the files of all models that are not in the package, under their names in a release."
    folder.mkdir(parents=True)
    for name, run in run_folders().items():
        if name not in PACKAGED:
            for row in with_files(describe(run), run)['files']:
                shutil.copy(run / row['name'], folder / f'{name}.{row["name"]}')


def main(check: bool) -> int:
    text = render()
    current = PATH.read_text(encoding='utf-8') if PATH.exists() else ''
    if current == text:
        return 0
    if check:
        lines = difflib.unified_diff(current.splitlines(True), text.splitlines(True), str(PATH))
        sys.stdout.writelines(lines)
        return 1
    PATH.write_text(text, encoding='utf-8')
    print(f'wrote {PATH}')
    return 0


if __name__ == '__main__':
    if '--files' in sys.argv[1:]:
        copy_files(Path(sys.argv[sys.argv.index('--files') + 1]))
    else:
        sys.exit(main('--check' in sys.argv[1:]))
