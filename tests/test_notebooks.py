"""Every notebook, from the first cell to the last, in a fresh process at size `smoke`.

The notebooks have neither a data set nor a network.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').rglob('*.ipynb'))

pytestmark = pytest.mark.slow


@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    "Notebook -> future of its process. Two notebooks run at once."
    home = tmp_path_factory.mktemp('notebooks')
    env = os.environ | dict(
        PDAE_NB_SIZE='smoke',
        MPLBACKEND='Agg',
        OMP_NUM_THREADS='1',
        PDAE_NB_CACHE=str(home / 'cache'),
        PDAE_NB_DATA=str(home),
        HF_HUB_OFFLINE='1',
    )
    nbdev_test = Path(sys.executable).with_name('nbdev-test')

    def run(path):
        command = [str(nbdev_test), str(path), '--n-workers', '0']
        options = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        return subprocess.run(command, **options)

    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run, path) for path in NOTEBOOKS}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_alone(path, runs):
    result = runs[path].result()
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    assert 'Success' in output, output[-4000:]
