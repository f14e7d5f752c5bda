"""What the README says is run: its Python, its `pdae` lines, its links, its numbers."""
import json, os, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text()
ENV = os.environ | dict(PDAE_NB_SIZE='smoke', MPLBACKEND='Agg', OMP_NUM_THREADS='2', HF_HUB_OFFLINE='1')

def percent(v): return f'{v:.1%}'.replace('%', ' %')
def blocks(kind): return re.findall(rf'^```{kind}\n(.*?)^```', README, re.M | re.S)

def test_python_stands_by_line_20():
    assert README[:README.index('```python')].count('\n') < 20

def test_python_blocks_run_in_order(tmp_path):
    code = '\n'.join(blocks('python'))
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert list(tmp_path.glob('*.png')), 'the README promises a picture'

PDAE = [l.split('#')[0].strip() for b in blocks('sh') for l in b.split('\n') if l.startswith('pdae ')]

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "scikit-learn's digits in MNIST's clothes: the Hub's columns, as a parquet file"
    import io
    import pyarrow as pa, pyarrow.parquet as pq
    from PIL import Image
    from pdae_nb.data import digits
    def png(x): b = io.BytesIO(); Image.fromarray(x[0].numpy()).save(b, 'png'); return dict(bytes=b.getvalue(), path=None)
    im, root = digits('test', 28), tmp_path_factory.mktemp('data')
    (root/'mnist').mkdir()
    table = pa.table(dict(image=[png(x) for x in im.x], label=im.y.tolist()))
    for split in ('train', 'test'): pq.write_table(table, root/f'mnist/{split}-00000-of-00001.parquet')
    return dict(PDAE_NB_DATA=str(root), PDAE_NB_CACHE=str(root/'cache'))

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Where all lines run, one after the other, as a reader's would; with the checkpoint that the README's Python writes"
    import torch
    from pdae_nb.pretrained import to_official
    from pdae_nb.train import load_run
    d = tmp_path_factory.mktemp('lines'); torch.save(dict(ema_denoise_fn=to_official(load_run('mnist_dpm').dpm)), d/'checkpoint.pt'); return d

@pytest.mark.parametrize('line', PDAE)
def test_shell_lines_run(line, place, data):
    exe = str(Path(sys.executable).with_name('pdae'))
    r = subprocess.run([exe, *line.split()[1:]], cwd=place, env=ENV | data, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

def test_there_are_lines_to_run(): assert PDAE and blocks('python')

def test_make_targets_exist():
    make = (ROOT/'Makefile').read_text()
    for t in set(re.findall(r'`?make (\w+)', README)): assert re.search(rf'^{t}:', make, re.M), f'no target {t}'

def test_links_lead_somewhere():
    for f in ('README.md', 'CONTRIBUTING.md'):
        for link in re.findall(r'\]\((?!https?:|#)([^)#]+)', (ROOT/f).read_text()): assert (ROOT/link).exists(), f'{f}: {link}'

def test_numbers_are_those_of_the_run():
    about = json.loads((ROOT/'data/models/mnist_dpm/run.json').read_text())
    assert f'{about["result"]["test_noise_mse"]:.4f}' in README
    assert f'{about["images_seen"]:,} images' in README
    ev = json.loads((ROOT/'data/results/mnist_dpm/lesson.json').read_text())
    assert f'{ev["judge"]["sure_of_samples"]:.1%}'.replace('%', ' %') in README

def test_the_critical_stage_is_the_one_measured():
    d = json.loads((ROOT/'data/results/critical_stage_ddim/lesson.json').read_text()); f, about = d['shortest'], d['about']
    a, b = f['window']
    assert f'{a} < t ≤ {b}, {percent(f["accuracy"])} of {f["samples"]} samples' in README
    assert f'{percent(f["full"])} when guided throughout and {percent(f["none"])} when never' in README
    assert f'keeps {f["share"]:.0%}'.replace('%', ' %') in README and f'scale {about["scale"]:g})' in README and f'{about["T"]//about["step"]*about["substeps"]} steps' in README
    d = json.loads((ROOT/'data/results/critical_stage_ddpm/lesson.json').read_text()); f = d['shortest']; a, b = f['window']
    assert d['about']['eta'] == 1 and f'it is {a} < t ≤ {b}, with {percent(f["accuracy"])} ({percent(f["full"])}, {percent(f["none"])})' in README

def test_the_twin_gains_what_the_readme_says():
    "lower by up to a fifth; at t <= 150 by nothing"
    d = json.loads((ROOT/'data/results/mnist_cdpm/lesson.json').read_text())
    ratio = {t: sum(c[i]/u[i] for c, u in zip(d['conditional'], d['unconditional']))/d['repeats'] for i, t in enumerate(d['t'])}
    assert .77 < min(ratio.values()) < .83 and all(abs(r - 1) < .005 for t, r in ratio.items() if t <= 150)

def test_pdae_does_what_the_readme_says():
    run, d = (json.loads((ROOT/'data'/p).read_text()) for p in ('models/mnist_pdae/run.json', 'results/mnist_pdae/lesson.json'))
    of = lambda k, m='mse': d['table'][k][m][0]
    left = {t: a/b for t, a, b in zip(d['gap']['t'], d['gap']['pdae']['mean'], d['gap']['dpm']['mean'])}; best = min(left, key=left.get)
    assert f'writes {run["recipe"]["net"]["z_dim"]} numbers' in README and f'in {run["images_seen"]:,} images and {run["seconds"]/60:.0f} minutes' in README
    assert f'up to {100*(1 - left[best]):.0f} % of the gap ({d["gap"]["images"]:,} test digits, t = {best})' in README
    assert f'{percent(of("PDAE random, DDIM 20", "kept"))} of {d["table"]["PDAE random, DDIM 20"]["n"]} test digits' in README and f'error of {of("PDAE random, DDIM 20"):.4f} (pixels' in README
    assert f'{of("PDAE inferred, DDIM 100"):.1e} in 100 DDIM steps, where the model alone loses {of("DPM inferred, DDIM 100"):.1e}, and {of("PDAE inferred, DPM++ 20"):.1e} in 20 steps of DPM-Solver++' in README

def test_diff_ae_needs_what_the_readme_says():
    from pdae_nb.diffae import images_to_reach, looks
    pdae, diffae, dpm = (json.loads((ROOT/f'data/models/mnist_{k}/run.json').read_text()) for k in ('pdae', 'diffae', 'dpm')); way = looks(ROOT/'data/results/mnist_diffae/training.jsonl')
    assert f'as many images in all ({diffae["images_seen"]:,})' in README and diffae['images_seen'] == pdae['images_seen'] + dpm['images_seen']
    assert 'a noise MSE of {:.4f} on test digits, PDAE at {:.4f}, the DPM alone at {:.4f}'.format(*(o['result']['test_noise_mse'] for o in (diffae, pdae, dpm))) in README
    assert f'Diff-AE\'s in {diffae["seconds"]/60:.0f} minutes' in README and diffae['hardware'].startswith('2 CPU cores')
    there = int(re.search(r'where PDAE ends after ([\d,]+) images', README)[1].replace(',', '')); assert abs(there/images_to_reach(way['seen'], way['noise_mse'], pdae['result']['test_noise_mse']) - 1) < .05        # the page asks PDAE on the 2,000 images of the curve
    assert f'PDAE needed {pdae["images_seen"]/there:.0%} of them'.replace('%', ' %') in README and f'with its DPM\'s {diffae["images_seen"]/there:.0%}'.replace('%', ' %') in README

def test_scorevae_is_as_measured():
    bayes, vae = (json.loads((ROOT/f'data/models/mnist_{k}/run.json').read_text()) for k in ('scorevae', 'vae')); rows = json.loads((ROOT/'data/results/mnist_space/lesson.json').read_text())['rows']
    assert f'After {bayes["images_seen"]:,} images ({bayes["seconds"]/60:.0f} minutes of one thread) its noise MSE on test digits is {bayes["result"]["test_noise_mse"]:.4f}, the lowest here, at {bayes["result"]["kl"]:.0f} nats' in README and f'nearer still, at {vae["result"]["kl"]:.0f} nats' in README
    assert bayes['result']['test_noise_mse'] < min(json.loads((ROOT/f'data/models/mnist_{k}/run.json').read_text())['result']['test_noise_mse'] for k in ('dpm', 'pdae', 'diffae', 'paper_scorevae'))
    mse = {k: r['restored']['random']['mse'][0] for k, r in rows.items() if 'random' in r.get('restored', {})}; assert mse['beta-VAE'] < mse['ScoreVAE'] < min(mse['PDAE'], mse['Diff-AE'])
    theirs = json.loads((ROOT/'data/models/mnist_paper_scorevae/run.json').read_text()); assert f'{theirs["images_seen"]:,} images, too, the noise MSE is {theirs["result"]["test_noise_mse"]:.4f} at {theirs["result"]["kl"]:.0f} nats' in README and max(mse, key=mse.get) == 'ScoreVAE, paper'
    assert {k for _, k in sorted((r['legible']['accuracy'][0], k) for k, r in rows.items() if 'legible' in r)[:2]} == {'ScoreVAE', 'ScoreVAE, paper'} and all(rows[k]['drawn'][w]['fid'][0] > 10*rows['DDIM']['drawn']['DDIM']['fid'][0] for k, w in (('ScoreVAE', 'ScoreVAE'), ('ScoreVAE, paper', 'ScoreVAE'), ('beta-VAE', 'VAE')))
    names = sorted(p.parent.name for p in (ROOT/'data/models').glob('*/run.json')); count = ['', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven', 'twelve']; of = lambda d: count[sum(n.startswith(d + '_') for n in names)]
    assert f'{of("mnist")} models of MNIST, and {of("cifar16")} small ones of CIFAR-10 at 16×16' in README and {n.split('_')[0] for n in names} == {'mnist', 'cifar16'}

def test_the_latent_model_took_what_the_readme_says():
    run = json.loads((ROOT/'data/models/mnist_pdae_latent/run.json').read_text()); base = json.loads((ROOT/'data/models/mnist_pdae/run.json').read_text())
    assert f'a DPM over the {base["recipe"]["net"]["z_dim"]} numbers, {run["seconds"]/60:.0f} minutes of training' in README

def test_the_methods_stand_side_by_side_as_measured():
    from pdae_nb.space import RIVALS
    d = json.loads((ROOT/'data/results/mnist_space/lesson.json').read_text()); pm = lambda v, f: '–' if v is None else f'{v[0]:{f}} ± {v[1]:{f}}'; rows = {k: r for k, r in d['rows'].items() if 'cost' in r}
    runs = {k: json.loads((ROOT/f'data/models/mnist_{RIVALS[k]}/run.json').read_text()) for k in rows}; base = lambda k: f' + {runs["DDIM"]["images_seen"]:,}'*('dpm' in runs[k]['recipe']['net'])
    assert f'in {d["about"]["steps"]} steps: {d["about"]["n"]} test digits' in README and f'FID of {d["about"]["fid_images"]:,} drawn digits' in README
    for k, r in rows.items():
        o, c, own = r['restored'], r['cost'], [v['fid'] for w, v in r['drawn'].items() if '+' not in w and 'to the end' not in w]; of = lambda m, f: pm(o.get('random', {}).get(m), f)
        assert f'| {k} | {of("mse", ".4f")} | {pm(o["inferred"]["mse"], ".5f")} | {of("ssim", ".3f")} | {of("lpips", ".4f")} | {pm(r.get("legible", {}).get("accuracy"), ".1%")} | {" / ".join(pm(v, ".1f") for v in own)} | {c["images"]:,}{base(k)} | {c["weights"]/1e6:.2f} M | {c["step_ratio"]:.2g} | {c["reconstruction_ratio"]:.2g} |' in README
    assert set(rows) >= {'DDIM', 'PDAE', 'Diff-AE'}
    t = json.loads((ROOT/'data/results/mnist_label_pdae/lesson.json').read_text())['truncation']; at = dict(zip(t['scale'], t['accuracy']))
    assert f'obeys in {percent(at[0])} of {t["n"]} samples at scale 0 (it is not heard), {percent(at[1])} at scale 1 and {percent(at[3])} at scale 3; the best FID is at scale {min(zip(t["fid"], t["scale"]))[1]:g}' in README

def test_drawn_digits_are_as_measured():
    p, d = (json.loads((ROOT/f'data/results/mnist_{k}_latent/lesson.json').read_text()) for k in ('pdae', 'diffae')); fid = lambda o: f'{o["fid"][0]:.2f} ± {o["fid"][1]:.2f}'
    t = p['table'] | d['table']; n = t['PDAE 10']['n']; of = lambda k: fid(t[f'{k} 10']); assert {v['n'] for k, v in t.items() if k.endswith(' 10')} == {n}
    assert f'{n:,} digits each' in README and f'{of("DDIM")} for the DPM alone; with codes in ten steps, too, as in the papers, {of("PDAE")} for PDAE and {of("Diff-AE")} for Diff-AE; with codes in a hundred' in README
    pair = lambda way: ' and '.join(of(f'{k} + {way}') for k in ('PDAE', 'Diff-AE')); assert f'of the picture, {pair("codes in 100 steps")}. Codes of test digits would bring {pair("autoencoding")}, real test digits get {fid(p["floor"][str(n)])}' in README
    spaces = [c for o in (p, d) for c in o['copies'].values()]; assert f'Of {spaces[0]["ratio"]["n"]:,} digits of either method, drawn with codes in a hundred, none' in README and all(c['third'] == 0 for c in spaces)
