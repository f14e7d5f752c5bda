"""The README: its Python and its `pdae` lines run, its links exist, its numbers are the results."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pdae_nb.data import digits
from pdae_nb.experiments.autoencoding import rival_runs
from pdae_nb.experiments.training_efficiency import images_to_reach, looks
from pdae_nb.files import load_results
from pdae_nb.hub import find_run, load
from pdae_nb.model import read_record
from pdae_nb.pretrained import to_official
from pdae_nb.release import released

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
ENV = os.environ | dict(
    PDAE_NB_SIZE='smoke',
    MPLBACKEND='Agg',
    OMP_NUM_THREADS='1',
    HF_HUB_OFFLINE='1',
)
COUNTS = [
    '',
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
]


def percent(v, digits=1):
    "A fraction as the README writes it: '92.8 %'."
    return f'{v:.{digits}%}'.replace('%', ' %')


def about(name):
    "The run.json of a trained run."
    return read_record(find_run(name))


def results(experiment):
    "The results of an experiment at size `lesson`."
    return load_results(experiment)


def noise_mse_of(name):
    "The noise MSE of a trained run on the test images."
    return about(name)['result']['test_noise_mse']


def rate_of(name):
    "Kullback–Leibler divergence of a run's codes from the prior, nats."
    return about(name)['result']['kl']


def blocks(kind):
    "The README's blocks of code in a language."
    return re.findall(rf'^```{kind}\n(.*?)^```', README, re.M | re.S)


def pdae_lines():
    "The README's lines of shell code that begin with `pdae`, without comments."
    lines = '\n'.join(blocks('sh')).splitlines()
    return [line.split('#')[0].strip() for line in lines if line.startswith('pdae ')]


# Code


def test_first_python_block_begins_before_line_20():
    start = README.index('```python')
    assert README[:start].count('\n') < 20


def test_there_is_code_to_run():
    assert pdae_lines()
    assert blocks('python')


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path):
    code = '\n'.join(blocks('python'))
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
    "Folder in which all lines run in order, with the checkpoint that the README's Python writes."
    folder = tmp_path_factory.mktemp('lines')
    dpm = load('mnist_dpm')
    torch.save(dict(ema_denoise_fn=to_official(dpm.net)), folder / 'checkpoint.pt')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('line', pdae_lines())
def test_shell_lines_run(line, place, data):
    program = str(Path(sys.executable).with_name('pdae'))
    command = [program, *line.split()[1:]]
    done = subprocess.run(command, cwd=place, env=ENV | data, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Targets and links


def test_make_targets_exist():
    makefile = (ROOT / 'Makefile').read_text()
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
        for link in local_links((ROOT / file).read_text()):
            assert (ROOT / link).exists(), f'{file}: {link}'


# Numbers


def test_numbers_of_the_dpm():
    assert f'{noise_mse_of("mnist_dpm"):.4f}' in README
    assert f'{about("mnist_dpm")["images_seen"]:,} images' in README
    evaluation = results('mnist_dpm')
    assert percent(evaluation['eval_classifier']['sure_of_samples']) in README


def test_critical_stage_with_ddim():
    d = results('critical_stage_ddim')
    settings = d['about']
    found = d['shortest']
    t1, t2 = found['window']
    accuracy = percent(found['accuracy'])
    guided = percent(found['full'])
    unguided = percent(found['none'])
    steps = settings['T'] // settings['step'] * settings['substeps']
    assert f'{t1} < t ≤ {t2}, {accuracy} of {found["samples"]} samples' in README
    assert f'{guided} when guided throughout and {unguided} when never' in README
    assert f'keeps {percent(found["share"], 0)}' in README
    assert f'scale {settings["scale"]:g})' in README
    assert f'{steps} steps' in README


def test_critical_stage_with_ddpm():
    d = results('critical_stage_ddpm')
    found = d['shortest']
    t1, t2 = found['window']
    accuracy = percent(found['accuracy'])
    guided = percent(found['full'])
    unguided = percent(found['none'])
    assert d['about']['eta'] == 1
    assert f'it is {t1} < t ≤ {t2}, with {accuracy} ({guided}, {unguided})' in README


def test_gain_of_the_conditional_dpm():
    "The label lowers the loss by up to a fifth, and by nothing at t <= 150."
    assert 'its loss is lower by up to a fifth' in README
    assert 'below t = 150, by nothing' in README
    d = results('mnist_cdpm')
    conditional = torch.tensor(d['conditional'], dtype=torch.float64)  # (repeats, timesteps)
    unconditional = torch.tensor(d['unconditional'], dtype=torch.float64)
    assert len(conditional) == d['repeats']
    ratio = (conditional / unconditional).mean(0)
    early = torch.tensor(d['t']) <= 150
    assert early.any()
    assert 0.77 < ratio.min() < 0.83
    assert (ratio[early] - 1).abs().max() < 0.005


def test_numbers_of_pdae():
    run = about('mnist_pdae')
    d = results('mnist_pdae')
    gap = d['gap']
    table = d['table']
    random = table['PDAE random, DDIM 20']
    inferred = table['PDAE inferred, DDIM 100']['mse'][0]
    inferred_dpm = table['DPM inferred, DDIM 100']['mse'][0]
    inferred_dpmpp = table['PDAE inferred, DPM++ 20']['mse'][0]

    left = {}  # timestep -> fraction of the gap that is left
    curves = zip(gap['t'], gap['pdae']['mean'], gap['dpm']['mean'], strict=True)
    for t, pdae, dpm in curves:
        left[t] = pdae / dpm
    best = min(left, key=left.get)
    filled = 100 * (1 - left[best])

    minutes = run['seconds'] / 60
    assert f'writes {run["recipe"]["encoder"]["z_dim"]} numbers' in README
    assert f'in {run["images_seen"]:,} images and {minutes:.0f} minutes' in README
    test_digits = f'{gap["images"]:,} test digits'
    assert f'up to {filled:.0f} % of the gap ({test_digits}, t = {best})' in README
    assert f'{percent(random["kept"][0])} of {random["n"]} test digits' in README
    assert f'error of {random["mse"][0]:.4f} (pixels' in README
    assert (
        f'{inferred:.1e} in 100 DDIM steps, where the model alone loses {inferred_dpm:.1e}, '
        f'and {inferred_dpmpp:.1e} in 20 steps of DPM-Solver++'
    ) in README


def test_noise_mse_of_diff_ae_and_pdae():
    diffae = about('mnist_diffae')
    pdae = about('mnist_pdae')
    dpm = about('mnist_dpm')
    assert f'as many images in all ({diffae["images_seen"]:,})' in README
    assert diffae['images_seen'] == pdae['images_seen'] + dpm['images_seen']
    assert (
        f'a noise MSE of {noise_mse_of("mnist_diffae"):.4f} on test digits, '
        f'PDAE at {noise_mse_of("mnist_pdae"):.4f}, '
        f'the DPM alone at {noise_mse_of("mnist_dpm"):.4f}'
    ) in README
    assert f"Diff-AE's in {diffae['seconds'] / 60:.0f} minutes" in README
    assert diffae['hardware'].startswith('2 CPU cores')


def test_images_that_diff_ae_needs_for_the_noise_mse_of_pdae():
    diffae = about('mnist_diffae')
    pdae = about('mnist_pdae')
    curve = looks(ROOT / 'data/results/mnist_diffae/training.jsonl')
    final = noise_mse_of('mnist_pdae')
    reached = images_to_reach(curve['seen'], curve['noise_mse'], final)
    stated = re.search(r'where PDAE ends after ([\d,]+) images', README)
    images = int(stated[1].replace(',', ''))
    # The README's number is for PDAE's noise MSE on the 2,000 images of the curve.
    assert abs(images / reached - 1) < 0.05
    assert f'PDAE needed {percent(pdae["images_seen"] / images, 0)} of them' in README
    assert f"with its DPM's {percent(diffae['images_seen'] / images, 0)}" in README


def test_noise_mse_and_rate_of_scorevae():
    release = about('mnist_scorevae')
    minutes = release['seconds'] / 60
    assert (
        f'After {release["images_seen"]:,} images ({minutes:.0f} minutes of one thread) '
        f'its noise MSE on test digits is {noise_mse_of("mnist_scorevae"):.4f}, '
        f'the lowest here, at {rate_of("mnist_scorevae"):.0f} nats'
    ) in README
    others = ('mnist_dpm', 'mnist_pdae', 'mnist_diffae', 'mnist_paper_scorevae')
    assert noise_mse_of('mnist_scorevae') < min(map(noise_mse_of, others))
    assert f'nearer still, at {rate_of("mnist_vae"):.0f} nats' in README
    assert (
        f'{about("mnist_paper_scorevae")["images_seen"]:,} images, too, '
        f'the noise MSE is {noise_mse_of("mnist_paper_scorevae"):.4f} '
        f'at {rate_of("mnist_paper_scorevae"):.0f} nats'
    ) in README


def test_scorevae_among_the_methods():
    "Squared errors from random noise; accuracies of probes; FIDs of samples from the prior."
    rows = results('mnist_space')['rows']
    mse = {}
    for label, row in rows.items():
        if 'random' in row.get('restored', {}):
            mse[label] = row['restored']['random']['mse'][0]
    assert mse['beta-VAE'] < mse['ScoreVAE'] < min(mse['PDAE'], mse['Diff-AE'])
    assert max(mse, key=mse.get) == 'ScoreVAE, paper'

    accuracy = {k: row['legible']['accuracy'][0] for k, row in rows.items() if 'legible' in row}
    lowest = sorted(accuracy, key=accuracy.get)[:2]
    assert set(lowest) == {'ScoreVAE', 'ScoreVAE, paper'}

    ways = {'ScoreVAE': 'ScoreVAE', 'ScoreVAE, paper': 'ScoreVAE', 'beta-VAE': 'beta-VAE'}
    fid_of_ddim = rows['DDIM']['drawn']['DDIM']['fid'][0]
    for label, way in ways.items():
        assert rows[label]['drawn'][way]['fid'][0] > 10 * fid_of_ddim


def test_number_of_shipped_models():
    names = [info.name for info in released().values()]
    data_sets = [name.split('_')[0] for name in names]
    mnist = COUNTS[data_sets.count('mnist')]
    cifar = COUNTS[data_sets.count('cifar16')]
    assert set(data_sets) == {'mnist', 'cifar16'}
    assert f'{mnist} models of MNIST, and {cifar} small ones of CIFAR-10 at 16×16' in README


def test_training_time_of_the_latent_dpm():
    minutes = about('mnist_pdae_latent')['seconds'] / 60
    z_dim = about('mnist_pdae')['recipe']['encoder']['z_dim']
    assert f'a DPM over the {z_dim} numbers, {minutes:.0f} minutes of training' in README


def with_error(v, form):
    "A value with its standard error, in a cell of the table; None is a dash."
    if v is None:
        return '–'
    value, error = v
    return f'{value:{form}} ± {error:{form}}'


def images_cell(label, row):
    "Images of a method, and of the frozen DPM on which it was trained."
    run = about(rival_runs('mnist')[label])
    cell = f'{row["cost"]["images"]:,}'
    if run['base'] is not None:
        cell += f' + {about(run["base"]["name"])["images_seen"]:,}'
    return cell


def table_row(label, row):
    "A method's row in the README's table, from its results."
    random = row['restored'].get('random', {})
    inferred = row['restored']['inferred']
    cost = row['cost']
    fids = []
    for way, result in row['drawn'].items():
        if '+' not in way and 'to the end' not in way:
            fids.append(with_error(result['fid'], '.1f'))
    cells = [
        label,
        with_error(random.get('mse'), '.4f'),
        with_error(inferred['mse'], '.5f'),
        with_error(random.get('ssim'), '.3f'),
        with_error(random.get('lpips'), '.4f'),
        with_error(row.get('legible', {}).get('accuracy'), '.1%'),
        ' / '.join(fids),
        images_cell(label, row),
        f'{cost["weights"] / 1e6:.2f} M',
        f'{cost["step_ratio"]:.2g}',
        f'{cost["reconstruction_ratio"]:.2g}',
    ]
    return f'| {" | ".join(cells)} |'


def test_table_of_methods():
    d = results('mnist_space')
    settings = d['about']
    rows = {label: row for label, row in d['rows'].items() if 'cost' in row}
    assert f'in {settings["steps"]} steps: {settings["n"]} test digits' in README
    assert f'FID of {settings["fid_images"]:,} drawn digits' in README
    assert set(rows) >= {'DDIM', 'PDAE', 'Diff-AE'}
    for label, row in rows.items():
        assert table_row(label, row) in README


def test_guidance_by_a_label():
    d = results('mnist_label_pdae')['truncation']
    accuracy = dict(zip(d['scale'], d['accuracy'], strict=True))
    fid = dict(zip(d['scale'], d['fid'], strict=True))
    best = min(fid, key=fid.get)
    assert (
        f'obeys in {percent(accuracy[0])} of {d["n"]} samples at scale 0 (it is not heard), '
        f'{percent(accuracy[1])} at scale 1 and {percent(accuracy[3])} at scale 3; '
        f'the best FID is at scale {best:g}'
    ) in README


def fid_cell(row):
    "The FID of a row of results, with its standard error."
    return with_error(row['fid'], '.2f')


def test_fids_of_samples_in_ten_steps():
    d = results('mnist_pdae_latent')
    table = d['table'] | results('mnist_diffae_latent')['table']
    n = table['PDAE 10']['n']
    fid = {}  # way to sample -> FID of samples in ten steps
    for key, row in table.items():
        way, _, steps = key.rpartition(' ')
        if steps == '10':
            assert row['n'] == n
            fid[way] = fid_cell(row)
    real = fid_cell(d['floor'][str(n)])
    pdae = 'PDAE + codes in 100 steps'
    diffae = 'Diff-AE + codes in 100 steps'
    assert f'{n:,} digits each' in README
    assert (
        f'{fid["DDIM"]} for the DPM alone; with codes in ten steps, too, as in the papers, '
        f'{fid["PDAE"]} for PDAE and {fid["Diff-AE"]} for Diff-AE; with codes in a hundred'
    ) in README
    assert (
        f'of the picture, {fid[pdae]} and {fid[diffae]}. Codes of test digits would bring '
        f'{fid["PDAE + autoencoding"]} and {fid["Diff-AE + autoencoding"]}, '
        f'real test digits get {real}'
    ) in README


def test_no_sample_is_a_copy():
    copies = []
    for experiment in ('mnist_pdae_latent', 'mnist_diffae_latent'):
        copies.extend(results(experiment)['copies'].values())
    n = copies[0]['ratio']['n']
    assert (
        f'Of {n:,} digits of either method, drawn with codes in a hundred, none is three times '
        'as near to one training image as to any other'
    ) in README
    assert all(space['third'] == 0 for space in copies)
