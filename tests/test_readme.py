"""The README: its Python and its `pdae` lines run, its links exist, its numbers are the results."""

import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from own_pictures import write_pictures
from PIL import Image

from pdae_nb.data import digits
from pdae_nb.experiments.autoencoding import rival_runs
from pdae_nb.experiments.critical_stage import unpack_cells
from pdae_nb.experiments.items import ITEMS
from pdae_nb.files import assets_dir, load_results, models_dirs
from pdae_nb.hub import find_run, load
from pdae_nb.pretrained import to_official
from pdae_nb.recipes import recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text('utf-8')
ENV = os.environ | dict(
    PDAE_NB_SIZE='smoke',
    MPLBACKEND='Agg',
    OMP_NUM_THREADS='1',
    HF_HUB_OFFLINE='1',
)
WORDS = [
    'zero',
    'one',
    'two',
    'three',
    'four',
    'five',
    'six',
    'seven',
    'eight',
    'nine',
    'ten',
    'eleven',
    'twelve',
    'thirteen',
    'fourteen',
]


def percent(v, digits=1):
    "A fraction as the README writes it: '92.8 %'."
    return f'{v:.{digits}%}'.replace('%', ' %')


def about(name):
    "The run.json of a trained run."
    return json.loads((find_run(name) / 'run.json').read_text('utf-8'))


def results(experiment):
    "The results of an experiment at size `lesson`."
    return load_results(experiment)


def blocks(kind):
    "The README's blocks of code in a language."
    return re.findall(rf'^```{kind}\n(.*?)^```', README, re.M | re.S)


def pdae_lines():
    "The README's lines of shell code that begin with `pdae` or `torchrun`, without comments."
    lines = '\n'.join(blocks('sh')).splitlines()
    programs = ('pdae ', 'torchrun ')
    return [line.split('#')[0].strip() for line in lines if line.startswith(programs)]


# Code


def test_first_python_block_begins_before_line_40():
    start = README.index('```python')
    assert README[:start].count('\n') < 40


def test_there_is_code_to_run():
    assert pdae_lines()
    assert blocks('python')


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path):
    code = '\n'.join(blocks('python'))
    write_pictures(tmp_path)
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob('*.png')), 'the README promises a picture'


def png(pixels):
    "An image (1,H,W) as the Hub's column stores it."
    file = io.BytesIO()
    Image.fromarray(pixels[0].numpy()).save(file, 'png')
    return dict(bytes=file.getvalue(), path=None)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Environment in which MNIST is a parquet file with the Hub's columns and scikit-learn's digits."
    root = tmp_path_factory.mktemp('data')
    images = digits('test', 28)
    columns = dict(image=[png(x) for x in images.x], label=images.y.tolist())
    (root / 'mnist').mkdir()
    for split in ('train', 'test'):
        pq.write_table(pa.table(columns), root / f'mnist/{split}-00000-of-00001.parquet')
    return dict(PDAE_NB_DATA=str(root), PDAE_NB_CACHE=str(root / 'cache'))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Folder in which all lines run in order, with pictures, and a checkpoint as from the Python."
    folder = tmp_path_factory.mktemp('lines')
    write_pictures(folder)
    dpm = load('mnist_dpm')
    torch.save(dict(ema_denoise_fn=to_official(dpm.net)), folder / 'checkpoint.pt')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('line', pdae_lines())
def test_shell_lines_run(line, place, data):
    name, *words = line.split()
    command = [str(Path(sys.executable).with_name(name)), *words]
    done = subprocess.run(command, cwd=place, env=ENV | data, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Targets and links


def test_make_targets_exist():
    makefile = (ROOT / 'Makefile').read_text('utf-8')
    targets = set(re.findall(r'`?make (\w+)', README))
    assert targets
    for target in targets:
        assert re.search(rf'^{target}:', makefile, re.M), f'no target {target}'


def local_links(text):
    "The targets of Markdown links that are paths."
    return re.findall(r'\]\((?!https?:|#)([^)#]+)', text)


def test_local_links_exist():
    assert local_links(README)
    for file in ('README.md', 'CONTRIBUTING.md'):
        for link in local_links((ROOT / file).read_text('utf-8')):
            assert (ROOT / link).exists(), f'{file}: {link}'


# Numbers


def test_statuses_of_the_items():
    assert f'lists {len(ITEMS)} figures, tables and claims' in README
    statuses = Counter(item.status for item in ITEMS)
    assert set(statuses) == {'agrees', 'weaker', 'contradicts', 'not done'}
    for status, n in statuses.items():
        assert re.search(rf'^\| {status} \| .* \| {n} \|$', README, re.M), status


def test_critical_stage_with_ddim():
    d = results('critical_stage_ddim')
    cells = unpack_cells(d)
    first, last = d['shortest']['window']
    T = d['about']['T']
    windows = [(0, 0), (0, first), (first, last), (last, T), (0, T)]
    shares = [percent(cells[window].double().mean().item()) for window in windows]
    head = f'none | 0 < t ≤ {first} | {first} < t ≤ {last} | {last} < t ≤ {T} | all'
    assert f'| guided timesteps | {head} |' in README
    assert f'| share in the requested class | {" | ".join(shares)} |' in README
    steps = T // d['about']['step'] * d['about']['substeps']
    assert f'Share of {d["about"]["samples"]} samples' in README
    assert f'DDIM with {steps} steps, guidance scale {d["about"]["scale"]:g}' in README


def test_critical_stage_with_ddpm():
    d = results('critical_stage_ddpm')
    found = d['shortest']
    t1, t2 = found['window']
    assert d['about']['eta'] == 1
    assert (
        f'the window {t1} to {t2} ({percent(found["accuracy"])}, against '
        f'{percent(found["full"])} with guidance at all timesteps and '
        f'{percent(found["none"])} without)'
    ) in README


def test_gap_that_remains():
    gap = results('mnist_pdae')['gap']
    left = {}  # timestep -> fraction of the gap that is left
    for t, pdae, dpm in zip(gap['t'], gap['pdae']['mean'], gap['dpm']['mean'], strict=True):
        left[t] = pdae / dpm
    best = min(left, key=left.get)
    remains = percent(left[best], 0)
    assert f'{remains} of the gap remains at t = {best}, averaged over {gap["images"]:,}' in README
    assert 'At t ≤ 20, the code closes less than 1 % of the gap' in README
    assert all(share > 0.99 for t, share in left.items() if t <= 20)
    assert 'From t = 400 to 900, less than 40 % remains' in README
    assert all(share < 0.4 for t, share in left.items() if 400 <= t <= 900)


LABELS = {  # of the README's table -> of the results
    'DPM (no code)': 'DDIM',
    'PDAE': 'PDAE',
    'Diff-AE': 'Diff-AE',
    'ScoreVAE, official preset': 'ScoreVAE',
    'ScoreVAE, paper preset': 'ScoreVAE, paper',
    'β-VAE': 'beta-VAE',
}


def with_error(v, form, unit=''):
    "A value with its standard error, in a cell of the table; None is a dash."
    if v is None:
        return '–'
    value, error = v
    return f'{value:{form}} ± {error:{form}}{unit}'


def images_cell(label, row):
    "Images of a method, and of the frozen DPM on which it was trained."
    run = about(rival_runs('mnist')[label])
    assert row['cost']['images'] == run['images_seen']
    cell = f'{row["cost"]["images"]:,}'
    if run['base'] is not None:
        cell += f' + {about(run["base"]["name"])["images_seen"]:,}'
    return cell


def table_row(title, row):
    "A method's row in the README's table, from its results."
    label = LABELS[title]
    fids = []
    for way, result in row['drawn'].items():
        if '+' not in way and 'to the end' not in way:
            fids.append(with_error(result['fid'], '.1f'))
    accuracy = row.get('legible', {}).get('accuracy')
    cells = [
        title,
        with_error(row['restored'].get('random', {}).get('mse'), '.5f'),
        with_error(row['restored']['inferred']['mse'], '.5f'),
        with_error(accuracy and [100 * v for v in accuracy], '.1f', ' %'),
        ' / '.join(fids),
        images_cell(label, row),
    ]
    return f'| {" | ".join(cells)} |'


def test_table_of_methods():
    d = results('mnist_space')
    settings = d['about']
    assert f'DDIM with {settings["steps"]} steps, one training run each' in README
    assert f'Errors: {settings["n"]} test images' in README
    assert f'distance of {settings["fid_images"]:,} samples' in README
    probe = d['rows']['PDAE']['legible']
    assert f'{probe["train"]:,} training codes, tested on {probe["test"]:,} test codes' in README
    measured = {label for label, row in d['rows'].items() if 'cost' in row}
    assert set(LABELS.values()) == measured
    for title, label in LABELS.items():
        assert table_row(title, d['rows'][label]) in README
    floor = results('mnist_pdae_latent')['floor'][str(settings['fid_images'])]['fid']
    assert f'Real test images have {with_error(floor, ".1f")} at this number' in README
    codes = d['rows']['ScoreVAE']['drawn']['ScoreVAE + autoencoding']['fid']
    assert f'With codes of test images, ScoreVAE has {with_error(codes, ".1f")}' in README
    pdae = results('mnist_pdae_latent')['table']['PDAE 20']
    diffae = results('mnist_diffae_latent')['table']['Diff-AE 20']
    assert pdae['n'] == diffae['n'] == settings['fid_images']
    assert (
        f'gives {with_error(pdae["fid"], ".1f")} for PDAE and '
        f'{with_error(diffae["fid"], ".1f")} for Diff-AE'
    ) in README


def test_what_contradicts_the_papers():
    *names, last = (item.name for item in ITEMS if item.status == 'contradicts')
    count = WORDS[len(names) + 1].capitalize()
    assert f'{count} items contradict the papers: {", ".join(names)} and {last}.' in README
    rows = results('cifar16_space')['rows']
    scorevae, vae = (rows[label]['published']['mean'] for label in ('ScoreVAE, paper', 'beta-VAE'))
    assert (
        f'We measure {with_error(scorevae["l2"], ".2f")} for ScoreVAE and '
        f'{with_error(vae["l2"], ".2f")} for a β-VAE, on {vae["n"]} test images'
    ) in README
    assert scorevae['n'] == vae['n']
    seen = about('cifar16_paper_scorevae')['images_seen']
    assert f'(one run each; {seen:,} images seen, with repetition)' in README
    assert about('cifar16_vae')['images_seen'] == seen
    times = recipe('cifar10_paper_scorevae', 'paper').images / seen
    stated = int(re.search(r'about (\d+) times as many of them', README)[1])
    assert abs(stated / times - 1) < 0.01


def test_number_of_shipped_models():
    names = {path.parent.name for folder in models_dirs() for path in folder.glob('*/run.json')}
    data_sets = Counter(name.split('_')[0] for name in names)
    assert set(data_sets) == {'mnist', 'cifar16', 'celeba64'}
    mnist = WORDS[data_sets['mnist']]
    cifar = WORDS[data_sets['cifar16']]
    faces = WORDS[data_sets['celeba64']]
    assert (
        f'contains {mnist} models of 28×28 MNIST images, {cifar} of 16×16 CIFAR-10 images '
        f'and {faces} of 64×64 faces'
    ) in README
    seen = [f'{about(name)["images_seen"]:,}' for name in ('celeba64_dpm', 'celeba64_pdae')]
    assert f'{seen[0]} images for the DPM and {seen[1]} for PDAE' in README
    papers = [recipe(name, 'paper').images for name in ('celeba64_dpm', 'celeba64_pdae')]
    assert papers == [72_000_000, 38_000_000]
    assert 'against 72 and 38 million in the paper' in README
    inside = list((assets_dir() / 'models').glob('*/run.json'))
    assert f'{WORDS[len(inside)].capitalize()} of them are in the package' in README


def test_speed_of_training():
    run = about('mnist_dpm')
    speed = run['images_seen'] / run['seconds']
    assert f'mnist_dpm: {speed:.0f} images/s on 2 cores' in README
    assert run['hardware'].startswith('2 CPU cores')


def test_length_of_the_prose():
    "Without code, tables and pictures."
    prose = re.sub(r'^```.*?^```', '', README, flags=re.M | re.S)
    prose = re.sub(r'^\|.*$', '', prose, flags=re.M)
    prose = re.sub(r'!\[.*?\]\(.*?\)', '', prose)
    assert 300 < len(prose.split()) <= 900
