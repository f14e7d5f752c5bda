"""Drawings and codes side by side: what is kept, what is refused, what goes stale"""

import json, shutil
from pathlib import Path
import pytest, torch
from pdae_nb.cli import main
from pdae_nb.data import digits
from pdae_nb.model import load_run
from pdae_nb.experiments.generation import drawn, evaluate_latent, shuffled
from pdae_nb.edit import draw
from pdae_nb.metrics import judge_feats
from pdae_nb.hub import decoder_of, kind_of, net_of, weights_of
from pdae_nb.methods.scorevae import code_noise
from pdae_nb.experiments.autoencoding import _drawn, evaluate_space
from pdae_nb.training import Recipe
from pdae_nb.hub import train
from pdae_nb.unet import HalfUNet, UNet

quiet = dict(log=lambda s: None)
NET = dict(ch=8, mult=(1, 2), n_res=1)

def made(name, where, images=128, **net): return train(name, Recipe('digits', 28, net, images, 16, 2e-3, 5, ema=.9), where, **quiet)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A DPM, a judge, ScoreVAE and a VAE with latent runs beside them, PDAE, and the conditional decoder: seconds old"
    d = tmp_path_factory.mktemp('runs'); dpm = made('digits_dpm', d/'dpm', **NET); s = made('digits_scorevae', d/'r', dpm=str(dpm), z_dim=6, **NET); v = made('digits_vae', d/'v', z_dim=6, **NET)
    latent = {k: Path(shutil.copytree(made(f'digits_{k}_latent', d/f'{k}l', 1024, run=str(p), hidden=16, layers=2), p.with_name(f'digits_{k}_latent'))) for k, p in dict(scorevae=s, vae=v).items()}      # beside its autoencoder, as those that ship
    return dict(dpm=dpm, judge=made('digits_judge', d/'j', ch=8), scorevae=s, vae=v, conditional=made('digits_conditional', d/'c', z_dim=6, **NET), scorevae_latent=latent['scorevae'], vae_latent=latent['vae'])

@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path): monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path/'cache'))

def eyes_of(runs): return judge_feats(load_run(runs['judge']).judge)

def test_another_order_of_the_same_images():
    images = digits('test', 8); a, b = shuffled(images), shuffled(images)
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and not torch.equal(a.x, images.x) and torch.equal(a.y.bincount(), images.y.bincount())
    i = next(i for i in range(len(images)) if torch.equal(images.x[i], a.x[0])); assert images.y[i] == a.y[0]                  # labels go with their images

@pytest.mark.parametrize('kind, name', [('scorevae', 'ScoreVAE, latent DPM'), ('vae', 'VAE, latent DPM')])
def test_latent_runs_of_random_codes_are_judged_and_drawn(runs, kind, name):
    d = evaluate_latent(runs[f'{kind}_latent'], 20, (1, 2), runs['judge'], chunk=20, **quiet)
    assert set(d['table']) == {f'{w} {s}' for w in (name, f'{name} + codes in 100 steps', f'{name} + autoencoding') for s in (1, 2)} and d['drawing'] == f'{name} + codes in 100 steps 2' and list(d['floor']) == ['20']
    run, base = load_run(runs[f'{kind}_latent']), load_run(runs[kind]); x = draw(run, base, torch.randn(3, 1, 28, 28), 3, z_steps=2, seed=1)
    assert x.shape == (3, 1, 28, 28) and x.isfinite().all() and not torch.equal(x, draw(run, base, torch.randn(3, 1, 28, 28), 3, z_steps=2, seed=2))
    assert main(['sample', str(runs[f'{kind}_latent']), '--n', '2', '--steps', '2', '--out', str(runs['dpm'].parent/'x.png')]) == 0

def test_equal_work(runs):
    d = evaluate_latent(runs['dpm'], 90, (1, 3), runs['judge'], chunk=20, calls=60, **quiet); assert {k: v['n'] for k, v in d['table'].items()} == {'DDIM 1': 90, 'DDIM 3': 20}
    with pytest.raises(ValueError, match='a row of 19 images is too short for FIDs'): evaluate_latent(runs['dpm'], 60, (1, 3), runs['judge'], calls=59, **quiet)

def test_a_drawing_of_nan_is_not_kept(runs):
    eyes = eyes_of(runs); bad = lambda n, seed, steps: (torch.full((n, 1, 28, 28), float('nan') if seed else 0.), torch.zeros(n, 0))
    with pytest.raises(ValueError, match='4 of 4 images have NaN'): drawn(bad, [], 'bad', eyes, 8, 2, chunk=4, **quiet)
    good = lambda n, seed, steps: (torch.full((n, 1, 28, 28), float(seed)), torch.zeros(n, 0)); d = drawn(good, [], 'bad', eyes, 8, 2, chunk=4, **quiet)
    assert d.x[:4].float().std() == 0 and (d.x[:4] != d.x[4:]).all()                                                  # the first chunk had been kept, the second is the good one's

def test_drawings_follow_their_weights(runs, tmp_path):
    run, images, eyes = load_run(runs['scorevae']), digits('train', 28), eyes_of(runs); ask = lambda run, old: _drawn(run, old, images, eyes, 250, 1, **quiet)
    d = ask(run, {}); assert {'ScoreVAE', 'ScoreVAE, latent DPM'} < set(d); told = {k: v | dict(fid=[-1., 0.]) for k, v in d.items()}
    assert ask(run, told) == told                                                                                       # measured before: not drawn again
    old = told | {'ScoreVAE, latent DPM': told['ScoreVAE, latent DPM'] | dict(weights='of an older net')}; new = ask(run, old)
    assert new['ScoreVAE'] == told['ScoreVAE'] and new['ScoreVAE, latent DPM'] == d['ScoreVAE, latent DPM']
    shutil.copytree(runs['scorevae'], tmp_path/'digits_scorevae'); shutil.copytree(runs['vae_latent'], tmp_path/'digits_scorevae_latent')
    with pytest.raises(ValueError, match='draws codes for another autoencoder'): ask(load_run(tmp_path/'digits_scorevae'), {})

def test_one_file_for_all_methods(runs, tmp_path, monkeypatch):
    path = tmp_path/'space.json'; ask = lambda **names: evaluate_space(path, names, runs['judge'], 3, 1, fid_images=20, seconds=.01, **quiet)
    first = ask(DDIM=runs['dpm']); assert first['rows']['DDIM'].keys() == {'weights', 'ppl', 'restored', 'drawn', 'cost'} and first['rows']['DDIM']['cost']['step_ratio'] == 1
    def broken(*a, **kw): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr('pdae_nb.space._rough', broken)
        with pytest.raises(KeyboardInterrupt): ask(DDIM=runs['dpm'], VAE=runs['vae'])
    half = json.loads(path.read_text()); assert {'nonlinearity', 'legible'} <= half['rows']['VAE'].keys() and 'ppl' not in half['rows']['VAE'] and half['rows']['DDIM'] == first['rows']['DDIM']
    d = ask(DDIM=runs['dpm'], VAE=runs['vae']); assert d['rows']['VAE']['legible'] == half['rows']['VAE']['legible'] and {'published', 'cost'} < d['rows']['VAE'].keys()
    assert abs(d['rows']['VAE']['restored']['random']['mse'][0] - d['rows']['VAE']['restored']['inferred']['mse'][0]) < 1e-3   # a VAE does not look at x_T
    before = path.read_bytes()
    with pytest.raises(ValueError, match='other weights of VAE'): ask(DDIM=runs['dpm'], VAE=runs['scorevae'])
    with pytest.raises(ValueError, match='by another judge or yardstick'): ask(VAE=runs['vae'])
    assert path.read_bytes() == before
    for torn in (before[:100], b'{}', b'[]', b'{"about": {}, "rows": {"VAE": {}}, "seconds": 0}'):
        path.write_bytes(torn)
        with pytest.raises(ValueError, match='holds no measurement of codes'): ask(DDIM=runs['dpm'])

def test_the_conditional_decoder_is_a_run(runs):
    run = load_run(runs['conditional']); x0 = torch.rand(2, 1, 28, 28)*2 - 1; t = torch.full((2,), 400)
    assert kind_of(run) == 'conditional decoder' and net_of(run) is run.decoder and len(weights_of(run)) == 2
    with torch.no_grad(): a, b = decoder_of(run, x0)(x0, t), run.decoder(x0, t, run.enc(x0)); assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, run.decoder(x0, t, -run.enc(x0)), atol=1e-5)

def test_noise_of_codes_is_not_that_of_images():
    a = code_noise(1, 64, 7)[0]; assert not any(torch.equal(a, torch.randn(n, generator=torch.Generator().manual_seed(7))[:64]) for n in (64, 784)) and torch.equal(a, code_noise(3, 64, 7)[0])

@pytest.mark.parametrize('kw', [{}, dict(lag=1), dict(dt=48)])
def test_a_half_is_the_half_of_a_whole(kw):
    torch.manual_seed(0); whole, half = (net(1, 8, (1, 2), 28, n_res=1, **kw) for net in (UNet, HalfUNet)); again = HalfUNet(**half.config)
    for p in half.parameters(): torch.nn.init.normal_(p, std=.2)                                                        # awake
    assert not whole.load_state_dict(half.state_dict(), strict=False).unexpected_keys
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700]); assert torch.equal(half.deepest(x, t), whole.down(x, whole.embed(t))[-1])
    again.load_state_dict(half.state_dict()); assert torch.equal(again.deepest(x, t), half.deepest(x, t)) and not torch.equal(half.deepest(x, t), half.deepest(x, t.flip(0)))
