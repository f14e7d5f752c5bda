"""The wheel, installed outside the checkout: models, results and test images come with it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from pdae_nb.release import PACKAGED, released

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
PICTURES = [
    'coded.png',
    'edited.png',
    'gap.png',
    'inverted.png',
    'reconstructed-ddim.png',
    'reconstructed-o-belm.png',
    'samples.png',
    'stages.png',
    'trajectory.png',
]


class Installation:
    "A fresh environment with the wheel, an empty working folder, and no network."

    def __init__(self, folder, wheel):
        self.folder = folder
        self.wheel = wheel
        self.place = folder / 'empty'
        self.place.mkdir()
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder / 'venv'], check=True)
        self.bin = folder / 'venv' / ('Scripts' if os.name == 'nt' else 'bin')
        self.python = self.bin / Path(sys.executable).name
        if not self.python.exists():
            self.python = self.bin / 'python'
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        found = subprocess.run([self.python, '-c', code], capture_output=True, text=True)
        self.site_packages = Path(found.stdout.strip())
        dependencies = self.site_packages / 'dependencies.pth'
        dependencies.write_text(sysconfig.get_path('purelib') + '\n', encoding='utf-8')
        pip = [sys.executable, '-m', 'pip', '--python', self.python, 'install']
        options = ['--no-deps', '--no-index', '--no-compile', '--quiet', '--force-reinstall']
        subprocess.run([*pip, *options, wheel], check=True)

    @property
    def env(self):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(('PDAE_NB_', 'PYTHON'))}
        return kept | dict(
            HOME=str(self.folder / 'user'),
            PDAE_NB_HOME=str(self.folder / 'home'),
            PDAE_NB_RELEASE='http://127.0.0.1:9',
            HF_HUB_OFFLINE='1',
            HF_ENDPOINT='http://127.0.0.1:9',
            MPLBACKEND='Agg',
            PYTHONDONTWRITEBYTECODE='1',
        )

    def run(self, *command):
        return subprocess.run(
            command, cwd=self.place, env=self.env, capture_output=True, text=True, timeout=1500
        )

    def pdae(self, *words):
        return self.run(self.bin / 'pdae', *words)

    def listing(self):
        "Path -> size and date of each file of the installed package."
        files = [path for path in (self.site_packages).rglob('*') if path.is_file()]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope='module')
def installation(tmp_path_factory):
    "An installation of a wheel that is built from a copy of the tracked files."
    folder = tmp_path_factory.mktemp('wheel')
    listed = subprocess.run(['git', 'ls-files', '-z'], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip('not a git checkout')
    for name in listed.stdout.split('\0'):
        if name and not name.startswith('nbs/') and (ROOT / name).is_file():
            (folder / 'source' / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / 'source' / name)
    build = [sys.executable, '-m', 'pip', 'wheel', '.', '--quiet', '-w', folder / 'dist']
    options = ['--no-deps', '--no-build-isolation', '--no-index']
    subprocess.run([*build, *options], cwd=folder / 'source', check=True)
    (wheel,) = (folder / 'dist').glob('*.whl')
    return Installation(folder, wheel)


def test_the_wheel_contains_the_assets_and_no_other_models(installation):
    with zipfile.ZipFile(installation.wheel) as file:
        names = set(file.namelist())
    tracked = [path for path in (ROOT / 'pdae_nb/assets').rglob('*') if path.is_file()]
    assert tracked
    assert {path.relative_to(ROOT).as_posix() for path in tracked} <= names
    assert not [name for name in names if name.startswith(('data/', 'nbs/', 'tests/'))]
    assert installation.wheel.stat().st_size < 12e6


def test_models_of_the_wheel_load(installation):
    code = (
        "import pdae_nb; model = pdae_nb.load('mnist_pdae'); "
        'print(pdae_nb.__file__, model.card.name, model.base.card.name)'
    )
    done = installation.run(installation.python, '-c', code)
    assert done.returncode == 0, done.stderr
    path, *names = done.stdout.split()
    assert Path(path).is_relative_to(installation.site_packages)
    assert names == ['mnist_pdae', 'mnist_dpm']


def test_demo_runs_in_an_empty_folder(installation):
    before = installation.listing()
    done = installation.pdae('demo')
    assert done.returncode == 0, done.stderr
    pictures = installation.place / 'out'
    assert sorted(path.name for path in pictures.iterdir()) == PICTURES
    assert all(path.stat().st_size > 2000 for path in pictures.iterdir())
    random, inferred = re.search(
        r'random x_T ([\d.]+), inferred x_T ([\d.e-]+)', done.stdout
    ).groups()
    assert 0.007 < float(random) < 0.018  # on scikit-learn's digits it is 0.0965
    assert float(inferred) < 0.001
    edited = re.search(r'classified as 9: (\d) before, (\d) after', done.stdout)
    assert int(edited[2]) > int(edited[1])
    assert installation.listing() == before


def test_commands_write_into_the_users_folder(installation):
    before = installation.listing()
    counts = ['--n', '2', '--steps', '2', '--test-images', '4']
    done = installation.pdae('evaluate', 'mnist_dpm', *counts, '--eval-classifier', '')
    assert done.returncode == 1  # there is no MNIST: an evaluation takes no other images
    assert "no dataset 'mnist'" in done.stderr
    done = installation.pdae('reconstruct', 'mnist_pdae', '--n', '2', '--steps', '2')
    assert done.returncode == 0, done.stderr
    assert 'every tenth MNIST test image' in done.stderr
    code = "from pdae_nb.files import results_path, write_json; write_json(results_path('x'), 1)"
    assert installation.run(installation.python, '-c', code).returncode == 0
    assert (installation.folder / 'home/results/x/lesson.json').exists()
    assert installation.listing() == before


def test_models_of_the_release_are_listed(installation):
    done = installation.pdae('models')
    assert done.returncode == 0, done.stderr
    place = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert set(place) == set(released())
    for name, line in place.items():
        assert line.endswith('package' if name in PACKAGED else 'to download')


def test_without_its_assets_the_demo_says_how_to_repair_the_installation(installation):
    assets = installation.site_packages / 'pdae_nb/assets'
    assets.rename(assets.with_name('elsewhere'))
    try:
        done = installation.pdae('demo')
    finally:
        assets.with_name('elsewhere').rename(assets)
    assert done.returncode == 1
    assert 'incomplete' in done.stderr
    assert 'pip install --force-reinstall --no-deps pdae_nb' in done.stderr
