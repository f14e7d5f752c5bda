"""Every notebook, top to bottom, in a fresh process, at `smoke` size, without a dataset or a network."""
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
NBS = sorted((ROOT/'nbs').glob('*.ipynb'))

@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp('notebooks')
    env = os.environ | dict(PDAE_NB_SIZE='smoke', MPLBACKEND='Agg', OMP_NUM_THREADS='1', PDAE_NB_CACHE=str(home/'cache'), HF_HUB_OFFLINE='1', PDAE_NB_DATA=str(home))
    def one(p):
        return subprocess.run([str(Path(sys.executable).with_name('nbdev-test')), str(p), '--n-workers', '0'], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    with ThreadPoolExecutor(2) as pool: yield {p: pool.submit(one, p) for p in NBS}

@pytest.mark.parametrize('p', NBS, ids=lambda p: p.stem)
def test_notebook_runs_alone(p, runs):
    r = runs[p].result()
    assert r.returncode == 0, (r.stdout + r.stderr)[-4000:]
