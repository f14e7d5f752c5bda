"""Where models, results and data are found, and release files from a server on this machine."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import pdae_nb.files
from pdae_nb import cli, hub, release
from pdae_nb.data import (
    cache_dir,
    data_dir,
    digits,
    load_images,
    mnist_or_digits,
    mnist_test_images,
    to_signed,
)
from pdae_nb.edit import (
    attribute,
    fit_direction,
    read_directions,
    stored_direction,
    stored_directions,
    write_directions,
)
from pdae_nb.files import (
    assets_dir,
    checkout,
    find_results,
    home,
    load_results,
    models_dir,
    models_dirs,
    results_path,
    write_json,
)
from pdae_nb.hub import load
from pdae_nb.model import model_fingerprint
from pdae_nb.release import PACKAGED, download, released, sha256_of

ROOT = Path(__file__).parent.parent
CLOSED = 'http://127.0.0.1:9'  # nothing listens at this port
EMPTY = str(ROOT / 'tests/no_such_folder')


class Handler(BaseHTTPRequestHandler):
    "Serves the files of its server, from the byte that is asked for."

    def do_GET(self):
        server = self.server
        data = server.files.get(self.path[1:])
        asked = self.headers.get('Range')
        server.requests.append((self.path[1:], asked))
        if data is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix('bytes=').rstrip('-')) if asked and server.ranges else 0
        if start >= len(data) > 0:
            self.send_error(416)
            return
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header('Content-Length', str(len(data) - start))
        if asked and server.ranges:
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        self.end_headers()
        end = server.cuts.pop() if server.cuts else None
        self.wfile.write(data[start:][:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    "A server on the loopback address, which serves the models of this checkout."
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.files = {}  # name -> bytes
    server.requests = []  # name and Range header of each request
    server.cuts = []  # bytes after which the next answers end
    server.ranges = True  # whether Range is understood
    server.address = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('PDAE_NB_RELEASE', server.address)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    "As if the package were installed outside a checkout, with an empty user's folder."
    monkeypatch.setattr(pdae_nb.files, 'checkout', lambda: None)
    monkeypatch.setattr('pdae_nb.data.checkout', lambda: None)
    monkeypatch.setattr(hub, 'checkout', lambda: None)
    monkeypatch.delenv('PDAE_NB_MODELS', raising=False)
    monkeypatch.delenv('PDAE_NB_CACHE', raising=False)
    monkeypatch.setenv('PDAE_NB_HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'home'


@pytest.fixture
def without_mnist(monkeypatch, tmp_path):
    "No data set on this machine, and no network."
    monkeypatch.setenv('PDAE_NB_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('PDAE_NB_DATA', raising=False)
    monkeypatch.setattr('pdae_nb.data.checkout', lambda: None)
    monkeypatch.chdir(tmp_path)

    def unreachable(name, split):
        raise ConnectionError('no network')

    monkeypatch.setattr('pdae_nb.data.HubSource', unreachable)


def serve_from_checkout(server, name):
    "Put the files of a model on the server, from the checkout."
    for file in released()[name].files:
        path = ROOT / 'data/models' / name / file.name
        server.files[f'{name}.{file.name}'] = path.read_bytes()


# Places


def test_checkout_is_recognised():
    assert checkout() == ROOT


def test_places_of_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv('PDAE_NB_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('PDAE_NB_MODELS', raising=False)
    assert models_dir() == ROOT / 'data/models'
    assert models_dirs() == [ROOT / 'data/models', assets_dir() / 'models']
    assert results_path('x') == ROOT / 'data/results/x/lesson.json'
    (tmp_path / 'home/models').mkdir(parents=True)
    (tmp_path / 'mine').mkdir()
    monkeypatch.setenv('PDAE_NB_MODELS', str(tmp_path / 'mine'))
    assert models_dirs() == [
        tmp_path / 'mine',
        ROOT / 'data/models',
        tmp_path / 'home/models',
        assets_dir() / 'models',
    ]


def test_places_of_an_installation(installed):
    assert home() == installed
    assert models_dir() == installed / 'models'
    assert results_path('x') == installed / 'results/x/lesson.json'
    assert models_dirs() == [assets_dir() / 'models']
    assert cache_dir() == installed / 'cache'
    (installed / 'data/mine').mkdir(parents=True)
    assert data_dir('mine') == installed / 'data/mine'
    assert data_dir('no_such_data') is None


def test_home_without_a_variable_is_that_of_platformdirs(monkeypatch):
    monkeypatch.delenv('PDAE_NB_HOME', raising=False)
    monkeypatch.delenv('PDAE_NB_CACHE', raising=False)
    monkeypatch.setattr('platformdirs.user_data_path', lambda name, appauthor: Path('/d') / name)
    assert home() == Path('/d/pdae_nb')


@pytest.mark.skipif(sys.platform != 'linux', reason='the folder of Linux')
def test_cache_without_a_variable_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv('PDAE_NB_HOME', raising=False)
    monkeypatch.delenv('PDAE_NB_CACHE', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_dir() == tmp_path / 'pdae_nb'


def test_own_results_come_before_those_of_the_package(installed):
    stored = find_results('critical_stage_ddim')
    assert stored == assets_dir() / 'results/critical_stage_ddim/lesson.json'
    write_json(results_path('critical_stage_ddim'), dict(mine=1))
    assert load_results('critical_stage_ddim') == dict(mine=1)
    assert find_results('no_such_experiment') is None
    with pytest.raises(FileNotFoundError, match='no results .*no_such_experiment'):
        load_results('no_such_experiment')


def test_a_smaller_evaluation_does_not_hide_results_of_the_package(installed, monkeypatch):
    path = assets_dir() / 'results/mnist_pdae/lesson.json'
    before = path.read_bytes()
    with pytest.raises(ValueError, match='holds a larger measurement'):
        cli.cmd_evaluate('mnist_pdae', test_images=2, gap_images=2, eval_classifier='')
    assert path.read_bytes() == before
    assert not results_path('mnist_pdae').exists()


# The table


def test_the_table_is_that_of_the_run_folders():
    ci('.ci/list_models.py', '--check')


def ci(*words):
    "Run a script of `.ci`; return its output."
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_files_of_a_release_are_those_of_the_table(tmp_path):
    ci('.ci/list_models.py', '--files', str(tmp_path / 'files'))
    wanted = {}
    for name, info in released().items():
        if name not in PACKAGED:
            wanted |= {f'{name}.{file.name}': file.sha256 for file in info.files}
    assert {path.name: sha256_of(path) for path in (tmp_path / 'files').iterdir()} == wanted


@pytest.mark.skipif(data_dir('mnist') is None, reason='MNIST is not here')
def test_the_test_images_of_the_package_are_those_of_mnist():
    ci('.ci/make_mnist_test.py', '--check')


def test_each_model_is_stored_once():
    folders = (assets_dir() / 'models', ROOT / 'data/models')
    names = [path.parent.name for folder in folders for path in folder.glob('*/run.json')]
    assert sorted(names) == sorted(set(names)) == sorted(released())
    packaged = {path.parent.name for path in (assets_dir() / 'models').glob('*/run.json')}
    assert packaged == set(PACKAGED)


def test_models_are_listed_with_their_place(installed, capsys):
    places = {info.name: info.where for info in hub.models()}
    assert places['mnist_dpm'] == 'package'
    assert places['mnist_diffae'] == 'to download'
    shutil.copytree(assets_dir() / 'models/mnist_dpm', installed / 'models/mine')
    (installed / 'models/broken').mkdir()
    (installed / 'models/broken/run.json').write_text('{', encoding='utf-8')
    rows = {info.name: info for info in hub.models()}
    assert rows['mine'].where == 'home'
    assert rows['mine'].images_seen == 720_000
    assert rows['broken'].method == 'unreadable'
    cli.cmd_models()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ['name', 'class', 'data']
    line = next(line for line in lines if line.startswith('mnist_diffae '))
    for word in ('DiffAE', 'mnist 28×28', '976,000', 'noise MSE 0.0149', '5.2', 'Apache-2.0'):
        assert word in line
    assert line.endswith('to download')


# Downloads


@pytest.fixture
def file(server, tmp_path):
    "A file on the server: its address, where to write it, its content and its sum."
    data = np.random.default_rng(0).bytes(600_000)
    server.files['x.bin'] = data
    (tmp_path / 'x').write_bytes(data)
    sha256 = sha256_of(tmp_path / 'x')
    return f'{server.address}/x.bin', tmp_path / 'got/x.bin', data, sha256


def test_a_file_is_downloaded(file):
    url, path, data, sha256 = file
    download(url, path, len(data), sha256)
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ['x.bin']


def test_a_half_downloaded_file_is_continued(server, file):
    url, path, data, sha256 = file
    server.cuts.append(250_000)
    with pytest.raises(OSError, match='x.bin'):
        download(url, path, len(data), sha256)
    assert not path.exists()
    part = path.with_name('x.bin.part')
    have = part.stat().st_size
    assert 0 < have <= 250_000
    download(url, path, len(data), sha256)
    assert server.requests[-1] == ('x.bin', f'bytes={have}-')
    assert path.read_bytes() == data
    assert not part.exists()


def test_a_server_without_ranges_sends_the_whole_file_again(server, file):
    url, path, data, sha256 = file
    server.ranges = False
    path.parent.mkdir()
    path.with_name('x.bin.part').write_bytes(data[:1000])
    download(url, path, len(data), sha256)
    assert path.read_bytes() == data


def test_a_wrong_sum_deletes_the_download(file):
    url, path, data, sha256 = file
    wrong = '0' * 64
    with pytest.raises(ValueError, match=f'SHA-256 {wrong}, got .* with {sha256}'):
        download(url, path, len(data), wrong)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize('excess', [1, 2_000_000])
def test_a_file_that_is_too_long_is_refused(server, file, excess):
    url, path, data, sha256 = file
    server.files['x.bin'] = data + bytes(excess)
    with pytest.raises(ValueError, match='expected 600,000 bytes'):
        download(url, path, len(data), sha256)
    assert list(path.parent.iterdir()) == []


def test_a_part_of_another_file_is_replaced_at_the_second_try(server, file):
    url, path, data, sha256 = file
    path.parent.mkdir()
    path.with_name('x.bin.part').write_bytes(bytes(1000))
    with pytest.raises(ValueError, match='SHA-256'):
        download(url, path, len(data), sha256)
    download(url, path, len(data), sha256)
    assert path.read_bytes() == data


def test_a_model_that_is_not_here_is_downloaded(server, installed, capsys):
    serve_from_checkout(server, 'mnist_label_pdae')
    model = load('mnist_label_pdae')
    assert model.path == (installed / 'models/mnist_label_pdae').resolve()
    assert model.base.card.name == 'mnist_dpm'
    assert len(server.requests) == 3
    load('mnist_label_pdae')
    assert len(server.requests) == 3
    assert 'downloading 3.6 MB' in capsys.readouterr().err
    names = {path.name for path in (installed / 'models').iterdir()}
    assert names == {'mnist_label_pdae', '.downloads'}


def test_the_base_of_a_downloaded_model_is_downloaded(server, installed):
    for name in ('mnist_diffae_latent', 'mnist_diffae'):
        serve_from_checkout(server, name)
    model = load('mnist_diffae_latent')
    assert model.base.path == (installed / 'models/mnist_diffae').resolve()


def test_half_of_a_model_is_not_found_and_is_continued(server, installed):
    name = 'mnist_eval_classifier'
    serve_from_checkout(server, name)
    server.cuts.append(1000)  # of the first file, the weights
    with pytest.raises(FileNotFoundError, match='could not be downloaded'):
        load(name)
    assert hub._local_run(name) is None
    load(name)
    ranges = [asked for file, asked in server.requests if file.endswith('net.safetensors')]
    assert ranges == [None, 'bytes=1000-']


def test_a_model_with_a_wrong_file_is_not_found(server, installed):
    name = 'mnist_eval_classifier'
    serve_from_checkout(server, name)
    good = server.files[f'{name}.net.safetensors']
    server.files[f'{name}.net.safetensors'] = bytes(len(good))
    with pytest.raises(ValueError, match='expected .* got'):
        load(name)
    assert hub._local_run(name) is None
    server.files[f'{name}.net.safetensors'] = good
    load(name)


def test_without_a_network_the_error_says_what_to_do(installed, monkeypatch):
    monkeypatch.setenv('PDAE_NB_RELEASE', CLOSED)
    with pytest.raises(FileNotFoundError) as error:
        load('mnist_vae')
    message = str(error.value)
    folder = installed / 'models/mnist_vae'
    for part in (
        'mnist_vae.net.safetensors',
        'mnist_vae.run.json',
        CLOSED,
        str(folder),
        'data/models/mnist_vae',
    ):
        assert part in message
    folder.mkdir(parents=True)  # as the message says
    for path in (ROOT / 'data/models/mnist_vae').iterdir():
        shutil.copy(path, folder / path.name)
    assert load('mnist_vae').path == folder.resolve()


def test_as_long_as_no_release_exists_the_error_is_the_same(server, installed):
    with pytest.raises(FileNotFoundError, match='404.*Get the files mnist_vae.net.safetensors'):
        load('mnist_vae')


def test_an_unknown_model_is_not_asked_for(server, installed):
    with pytest.raises(FileNotFoundError, match="no run 'mnist_dmp'"):
        load('mnist_dmp')
    assert server.requests == []
    with pytest.raises(ValueError, match="no model 'mnist_dmp' in the release"):
        release.fetch_run('mnist_dmp')


def test_the_address_is_made_from_the_settings(monkeypatch):
    monkeypatch.delenv('PDAE_NB_RELEASE', raising=False)
    version = pdae_nb.__version__
    assert release.address().endswith(f'/pdae_nb/releases/download/v{version}')


# An installation without its assets


@pytest.fixture
def no_assets(installed, monkeypatch, tmp_path):
    for module in (pdae_nb.files, hub, release):
        monkeypatch.setattr(module, 'assets_dir', lambda: tmp_path / 'assets')
    for module in ('data', 'edit'):
        monkeypatch.setattr(f'pdae_nb.{module}.assets_dir', lambda: tmp_path / 'assets')


@pytest.mark.parametrize('call', [lambda: load('mnist_dpm'), cli.cmd_demo, mnist_test_images])
def test_an_installation_without_its_assets_says_so(no_assets, call):
    with pytest.raises(FileNotFoundError, match='incomplete.*pip install --force-reinstall'):
        call()


def test_a_missing_model_of_the_package_is_not_downloaded(no_assets, server, tmp_path):
    (tmp_path / 'assets').mkdir()
    shutil.copy(ROOT / 'pdae_nb/assets/models.json', tmp_path / 'assets/models.json')
    with pytest.raises(FileNotFoundError, match='incomplete.*mnist_dpm'):
        load('mnist_dpm')
    assert server.requests == []


# Images and directions inside the package


def test_test_images_of_the_package():
    images = mnist_test_images()
    assert images.x.shape == (1000, 1, 28, 28)
    assert images.x.dtype == torch.uint8
    with np.load(assets_dir() / 'mnist_test.npz') as file:
        assert file['index'].tolist() == list(range(0, 10_000, 10))
    # The first eleven labels of MNIST's test set are 7 2 1 0 4 1 4 9 5 9 0.
    assert images.y[:2].tolist() == [7, 0]
    assert mnist_test_images(14).x.shape == (1000, 1, 14, 14)


def test_images_in_place_of_mnist(without_mnist):
    said = []
    test = mnist_or_digits('test', log=said.append)
    assert torch.equal(test.x, mnist_test_images().x)
    assert 'every tenth MNIST test image' in said[0]
    train = mnist_or_digits('train', log=said.append)
    assert torch.equal(train.x, digits('train', 28).x)
    assert 'scikit-learn digits' in said[1]


def test_the_evaluation_classifier_reads_the_test_images_of_the_package():
    images = mnist_test_images()
    clf = load('mnist_eval_classifier')
    with torch.no_grad():
        predicted = clf.net(to_signed(images.x[:200])).argmax(1)
    assert (predicted == images.y[:200]).float().mean() > 0.97


def test_stored_directions_belong_to_the_stored_model():
    model = load('mnist_pdae')
    directions = stored_directions(model)
    assert list(directions) == [str(k) for k in range(10)]
    images = mnist_test_images()
    with torch.no_grad():
        z = model.encode(to_signed(images.x[:300]))
    logits = torch.stack([d.probe.logit(z) for d in directions.values()], 1)
    assert (logits.argmax(1) == images.y[:300]).float().mean() > 0.7
    for name, direction in directions.items():
        assert direction.labels == 10_000
        assert 800 < direction.positives < 1200
        assert direction.median > direction.probe.logit(z[images.y[:300] != int(name)]).median()
    with pytest.raises(ValueError, match="no attribute 'nine'"):
        stored_direction(model, 'nine')


def test_directions_of_another_model_are_refused(tmp_path):
    model = load('mnist_pdae')
    images = digits('train', 28)[:200]
    with torch.no_grad():
        z = model.encode(to_signed(images.x))
    made = {'3': fit_direction(z, attribute(images, 3), 'a test')}
    write_directions(tmp_path / 'd.safetensors', model, made)
    again = read_directions(tmp_path / 'd.safetensors', model)['3']
    assert torch.equal(again.probe.w, made['3'].probe.w)
    assert again.median == pytest.approx(made['3'].median)
    assert (again.labels, again.positives, again.source) == (200, made['3'].positives, 'a test')
    with torch.no_grad():
        model.enc.head.weight.mul_(2)
    assert model_fingerprint(model) != model_fingerprint(load('mnist_pdae'))
    with pytest.raises(ValueError, match='directions of mnist_pdae with fingerprint'):
        read_directions(tmp_path / 'd.safetensors', model)
    assert stored_directions(model) == {}


def test_manipulate_without_training_images(without_mnist, tmp_path, capsys):
    said = cli.cmd_manipulate(
        'mnist_pdae', attribute='9', n=2, steps=2, scales='.2', out=tmp_path / 'nines.png'
    )
    assert 'first 10,000 training images of mnist' in said['directions']
    assert said['labels'] == 10_000
    assert 'Using the direction in the package' in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        load_images('mnist', 'train')


def test_a_users_run_of_the_same_name_is_not_replaced(tmp_path):
    run = tmp_path / 'cifar16_dpm'
    run.mkdir()
    (run / 'run.json').write_text('{}', 'utf-8')
    with pytest.raises(FileExistsError, match='holds another run'):
        release.fetch_run('cifar16_dpm', tmp_path)
    assert (run / 'run.json').read_text('utf-8') == '{}'
    training = tmp_path / 'mnist_vae'
    (training / 'checkpoints').mkdir(parents=True)
    with pytest.raises(FileExistsError, match='holds another run'):
        release.fetch_run('mnist_vae', tmp_path)


@pytest.mark.parametrize('url', ['/mnt/mirror', 'file:///mnt/mirror', 'mirror.example'])
def test_an_address_of_another_kind_is_refused(url, monkeypatch):
    monkeypatch.setenv('PDAE_NB_RELEASE', url)
    with pytest.raises(ValueError, match='http or https'):
        release.address()


def test_only_models_of_the_release_have_its_licence(tmp_path, monkeypatch):
    source = ROOT / 'data/models/mnist_cdpm'
    folder = tmp_path / 'mnist_cdpm'
    shutil.copytree(source, folder)
    record = json.loads((folder / 'run.json').read_text('utf-8'))
    record['images_seen'] = 5
    (folder / 'run.json').write_text(json.dumps(record), 'utf-8')
    monkeypatch.setenv('PDAE_NB_MODELS', str(tmp_path))
    licences = {info.name: info.licence for info in hub.models()}
    assert licences['mnist_cdpm'] == ''
    assert licences['mnist_dpm'] == 'Apache-2.0'


def test_two_downloads_of_one_model_at_once(server, installed):
    serve_from_checkout(server, 'mnist_cdpm')
    folders = []

    def fetch():
        folders.append(release.fetch_run('mnist_cdpm', installed, log=lambda line: None))

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [installed / 'mnist_cdpm'] * 3
    names = [name for name, _ in server.requests]
    assert sorted(names) == sorted(set(names))  # each file was asked for once
    assert load('mnist_cdpm').card.images_seen == 720_000


def test_a_hostile_description_does_not_hide_the_other_models(tmp_path, monkeypatch):
    (tmp_path / 'hostile').mkdir()
    (tmp_path / 'hostile' / 'run.json').write_text('[' * 200_000, 'utf-8')
    monkeypatch.setenv('PDAE_NB_MODELS', str(tmp_path))
    methods = {info.name: info.method for info in hub.models()}
    assert methods['hostile'] == 'unreadable'
    assert methods['mnist_dpm'] == 'DPM'
