"""Several processes compute what one computes. A process that ends does not cost finished work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdae_nb.files import read_tensors
from pdae_nb.processes import ProcessLost, join, launched, may_mean_a_lost_process
from pdae_nb.training import check_parts

JOBS = Path(__file__).with_name('of_processes.py')
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg')


def run(world, folder, job, *values, options=()):
    "Run a job in `world` processes."
    folder.mkdir(exist_ok=True)
    command = [sys.executable]
    if world > 1:
        command += ['-m', 'torch.distributed.run', '--standalone']
        command += ['--nproc-per-node', str(world), *options]
    command += [str(JOBS), job, str(folder), *values]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=500
    )


def result_of(world, folder, job, *values):
    "What process 0 of a job saved."
    done = run(world, folder, job, *values)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / 'result.pt')


def relative(x, y):
    "Norm of the difference, relative to the norm of y."
    return ((x - y).norm() / y.norm()).item()


def checkpoint(folder):
    "Tensors of the newest checkpoint, and its note."
    newest = max((folder / 'run/checkpoints').glob('step_*.safetensors'))
    return read_tensors(newest)


def assert_same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


METHODS = ['pdae', 'label_pdae', 'scorevae', 'vae', 'eval_classifier', 'latent']
PARTS = {1: (1, 2, 4), 2: (1, 2), 4: (1,)}  # processes -> accumulated parts


@pytest.fixture(scope='module')
def fits(tmp_path_factory):
    "world -> case, e.g. dpm-float64-1 -> results of `fit`. Each number of processes starts once."
    results = {}

    def of(world):
        if world not in results:
            cases = [
                f'dpm-{dtype}-{parts}' for dtype in ('float64', 'float32') for parts in PARTS[world]
            ]
            if world < 4:
                cases += [f'{method}-float64-1' for method in METHODS]
            folder = tmp_path_factory.mktemp(f'fit-{world}')
            results[world] = result_of(world, folder, 'fit', *cases)
        return results[world]

    return of


@pytest.mark.slow
@pytest.mark.parametrize('world, accumulate', [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_processes_and_parts_compute_what_one_process_computes(world, accumulate, fits):
    exact = fits(world)[f'dpm-float64-{accumulate}']
    wanted = fits(1)['dpm-float64-1']
    for name in ('weights', 'average'):
        assert (exact[name] - wanted[name]).abs().max() < 1e-11, name
    assert wanted['weights'].isfinite().all()
    moved = (wanted['weights'] - wanted['average']).abs().max()
    assert moved > 1e-3  # the steps have changed the weights

    rounded = fits(world)[f'dpm-float32-{accumulate}']
    wanted = fits(1)['dpm-float32-1']
    assert relative(rounded['gradient'], wanted['gradient']) < 1e-5
    assert abs(rounded['losses'][-1] / wanted['losses'][-1] - 1) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_two_processes_train_every_method(method, fits):
    pair = fits(2)[f'{method}-float64-1']
    wanted = fits(1)[f'{method}-float64-1']
    assert (pair['weights'] - wanted['weights']).abs().max() < 1e-9
    torch.testing.assert_close(pair['losses'], wanted['losses'], rtol=1e-9, atol=0)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Folder of a run of two processes that nothing has disturbed."
    folder = tmp_path_factory.mktemp('undisturbed')
    done = run(2, folder, 'train')
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_process_ends_the_job_and_the_same_command_continues(rank, undisturbed, tmp_path):
    done = run(2, tmp_path, 'train', str(rank))
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert 'SIGKILL' in said
    if rank == 1:
        assert 'another process of this training has ended' in said
    _, note = checkpoint(tmp_path)
    assert note['i'] in (10, 13)
    assert not (tmp_path / 'run/run.json').exists()

    done = run(2, tmp_path, 'train', str(rank))
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'going on at step' in done.stdout + done.stderr
    assert_same(checkpoint(tmp_path)[0], checkpoint(undisturbed)[0])
    steps = [json.loads(line)['step'] for line in (tmp_path / 'run/log.jsonl').open()]
    assert steps == [5, 10, 15, 20, 24]


@pytest.mark.slow
def test_torchrun_restarts_a_job_whose_process_was_killed(undisturbed, tmp_path):
    done = run(2, tmp_path, 'train', '1', options=['--max-restarts', '3'])
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(checkpoint(tmp_path)[0], checkpoint(undisturbed)[0])
    assert json.loads((tmp_path / 'run/run.json').read_text())['result'] is not None


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step(undisturbed, tmp_path):
    done = run(2, tmp_path, 'train', '-1', '1')
    assert done.returncode != 0
    _, note = checkpoint(tmp_path)
    assert 13 <= note['i'] <= 23
    assert f'saved after step {note["i"]} of 24' in done.stdout + done.stderr
    done = run(2, tmp_path, 'train')
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(checkpoint(tmp_path)[0], checkpoint(undisturbed)[0])


@pytest.mark.slow
def test_a_stop_waits_for_the_checkpoint_of_the_first_process(tmp_path):
    "If another process ended before, `torchrun` would send a second signal, which interrupts."
    done = run(2, tmp_path, 'train', '-1', '0', '3')
    assert done.returncode != 0
    _, note = checkpoint(tmp_path)
    assert note['i'] >= 13
    assert f'saved after step {note["i"]} of 24' in done.stdout + done.stderr


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(tmp_path):
    done = run(2, tmp_path, 'differ')
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert 'processes 0 and 1 have different settings or images: seed 0 and 1' in said
    assert not (tmp_path / 'run/checkpoints').exists()


@pytest.mark.slow
def test_shared_work_gives_the_images_of_one_process(tmp_path, monkeypatch):
    results = {}
    for world in (1, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        monkeypatch.setitem(ENVIRONMENT, 'PDAE_NB_CACHE', str(folder / 'cache'))
        results[world] = result_of(world, folder, 'share')
        sums = json.loads((folder / 'sums.json').read_text())
        assert {row['n'] for row in sums['rows'].values()} == {5}
    assert len(results[1]) > 5
    assert_same(results[3], results[1])


@pytest.mark.slow
def test_two_processes_train_a_latent_dpm(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, 'PDAE_NB_CACHE', str(tmp_path / 'cache'))
    done = run(2, tmp_path, 'latent')
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / 'run/run.json').read_text())
    assert record['images_seen'] == 96
    assert record['hardware'].startswith('2 processes, each ')
    assert len(list((tmp_path / 'cache').glob('codes-*'))) == 2  # of training and test


@pytest.mark.slow
def test_processes_train_twice_and_load_what_they_have_stored(tmp_path):
    done = run(2, tmp_path, 'twice')
    assert done.returncode == 0, done.stdout + done.stderr


def torchrun(folder, *words):
    "Run `pdae` in two processes."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += ['--nproc-per-node', '2', '-m', 'pdae_nb', '--', *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=300
    )


def printed(done):
    "The JSON that a command prints after its messages. Several processes would print it twice."
    assert done.stdout.count('{\n') - done.stdout.count(': {\n') == 1
    return json.loads(done.stdout[done.stdout.index('{\n') :])


@pytest.mark.slow
def test_commands_of_two_processes(tmp_path, monkeypatch):
    "A run whose result is missing is evaluated. Only the first process prints."
    monkeypatch.setitem(ENVIRONMENT, 'PDAE_NB_CACHE', str(tmp_path / 'cache'))
    smoke = ['--size', 'smoke', '--steps', '4', '--device', 'cpu', '--out', 'run']
    done = torchrun(tmp_path, 'train', 'mnist_dpm', *smoke)
    assert done.returncode == 0, done.stdout + done.stderr
    result = printed(done)
    record = json.loads((tmp_path / 'run/run.json').read_text())
    assert record['result'] == result
    (tmp_path / 'run/run.json').write_text(json.dumps(record | dict(result=None)))

    counts = ['--n', '2', '--steps', '2', '--test-images', '4', '--eval-classifier', '']
    done = torchrun(tmp_path, 'evaluate', 'run', *counts, '--out', 'numbers.json')
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed(done)['test_images'] == 4
    assert json.loads((tmp_path / 'run/run.json').read_text())['result'] == result

    done = torchrun(tmp_path, 'sample', 'run', '--n', '3', '--steps', '2', '--out', 'x.png')
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / 'x.png').exists()
    done = torchrun(tmp_path, 'models')
    assert done.returncode != 0
    assert 'models runs in one process, got 2' in done.stderr


@pytest.mark.parametrize(
    'message, is_lost',
    [
        ('[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4', True),
        ('NCCL error: ncclRemoteError: A call failed possibly due to a network error', True),
        ('NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1', False),
        ('The size of tensor a (3) must match the size of tensor b (4)', False),
    ],
)
def test_errors_of_a_lost_process(message, is_lost):
    assert may_mean_a_lost_process(RuntimeError(message)) is is_lost
    assert not may_mean_a_lost_process(ValueError(message))
    assert not may_mean_a_lost_process(ProcessLost(message))


def test_a_batch_that_cannot_be_shared_is_refused():
    check_parts(8, 4)
    with pytest.raises(ValueError, match='a batch of 8 images cannot be shared equally by 1 proc'):
        check_parts(8, 3)
    with pytest.raises(ValueError, match='accumulate must be at least 1, got 0'):
        check_parts(8, 0)


@pytest.mark.parametrize('name', ['RANK', 'WORLD_SIZE', 'LOCAL_RANK'])
def test_variables_that_are_no_numbers_are_refused(name, monkeypatch):
    monkeypatch.setenv(name, '-1')
    with pytest.raises(ValueError, match=f'{name} must be a number of a process'):
        launched()


def test_a_single_process_with_the_variables_of_several_is_told_why(monkeypatch):
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='').items():
        monkeypatch.setenv(name, value)
    assert launched().local == 0
    with pytest.raises(ValueError, match='MASTER_ADDR and MASTER_PORT are not set, but WORLD_SIZE'):
        join('cpu')
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    monkeypatch.setenv('MASTER_PORT', '29519')

    def no_store():
        raise RuntimeError('nobody came')

    monkeypatch.setattr('pdae_nb.processes._store', no_store)
    with pytest.raises(ConnectionError, match='not all of 2 processes came to 127.0.0.1:29519'):
        join('cpu')


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    for name, value in dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1').items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(ValueError, match='process 1 of this machine needs a GPU of its own'):
        join('cuda')
    with pytest.raises(ValueError, match='choose their GPUs themselves, got the device cuda:0'):
        join('cuda:0')
