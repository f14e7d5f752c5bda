"""Comparison of methods by their codes and samples: what is kept, what is refused, what changes."""

import json
import shutil

import pytest
import torch

from pdae_nb.cli import main
from pdae_nb.data import digits, to_uint8
from pdae_nb.evaluation import reconstruction_table
from pdae_nb.experiments.autoencoding import _drawn, _published, _restored, evaluate_space
from pdae_nb.experiments.generation import drawn, evaluate_latent, shuffled, ways
from pdae_nb.hub import load, train
from pdae_nb.methods.classifier import EvalClassifier, EvalClassifierNet
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.latent import LatentDPM
from pdae_nb.methods.scorevae import ConditionalDecoder, ScoreVAE, code_noise, kl_to_prior
from pdae_nb.methods.vae import VAE
from pdae_nb.metrics import eval_feats, features
from pdae_nb.training import Recipe
from pdae_nb.unet import HalfUNet, UNet

NET = dict(ch=8, mult=(1, 2), n_res=1)


def no_log(line):
    "A log function that drops its message."


def trained(folder, method, images=128, **parts):
    "Train a model with scikit-learn's digits for a few steps, in `folder`."
    r = Recipe(method, 'digits', 28, images, batch=16, lr=2e-3, warmup=5, ema=0.9, **parts)
    return train(folder.name, r, out=folder, log=no_log)


def trained_latent(model):
    "Train a latent DPM in the folder beside its autoencoder, like those of `data/models`."
    folder = model.path.with_name(f'{model.path.name}_latent')
    return trained(folder, LatentDPM, images=1024, base=model, net=dict(hidden=16, layers=2))


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "Briefly trained models: ScoreVAE and a VAE with latent DPMs, and what they need."
    folder = tmp_path_factory.mktemp('runs')
    codes = dict(z_dim=6)
    dpm = trained(folder / 'digits_dpm', DPM, net=NET)
    scorevae = trained(folder / 'digits_scorevae', ScoreVAE, base=dpm, encoder=codes | NET)
    vae = trained(folder / 'digits_vae', VAE, net=codes | NET)
    conditional = trained(
        folder / 'digits_conditional', ConditionalDecoder, net=NET, encoder=codes | NET
    )
    return dict(
        dpm=dpm,
        eval_classifier=trained(folder / 'digits_eval', EvalClassifier, net=dict(ch=8)),
        scorevae=scorevae,
        vae=vae,
        conditional=conditional,
        scorevae_latent=trained_latent(scorevae),
        vae_latent=trained_latent(vae),
    )


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    "An empty cache for each test."
    monkeypatch.setenv('PDAE_NB_CACHE', str(tmp_path / 'cache'))


# Samples


def test_shuffled_images_keep_their_labels():
    images = digits('test', 8)
    a = shuffled(images)
    b = shuffled(images)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.y, b.y)
    assert not torch.equal(a.x, images.x)
    assert torch.equal(a.y.bincount(), images.y.bincount())
    same = (images.x == a.x[0]).flatten(1).all(1)
    assert same.any()
    assert (images.y[same] == a.y[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    'kind, name',
    [('scorevae', 'ScoreVAE, latent DPM'), ('vae', 'beta-VAE, latent DPM')],
)
def test_latent_dpm_of_random_codes(models, kind, name, tmp_path):
    "A latent DPM of ScoreVAE or of the VAE is evaluated, and sampled from Python and the shell."
    latent = models[f'{kind}_latent']
    d = evaluate_latent(latent, models['eval_classifier'], 20, (1, 2), chunk=20, log=no_log)
    rows = set()
    for way in (name, f'{name} + codes in 100 steps', f'{name} + autoencoding'):
        rows |= {f'{way} 1', f'{way} 2'}
    assert set(d['table']) == rows
    assert d['drawing'] == f'{name} + codes in 100 steps 2'
    assert list(d['floor']) == ['20']

    x = latent.base.sample(3, prior=latent, seed=1, steps=3)
    other_codes = latent.base.sample_codes(latent.codes(3, 2), seed=1, steps=3)
    assert x.shape == (3, 1, 28, 28)
    assert x.isfinite().all()
    assert not torch.equal(x, other_codes)

    file = tmp_path / 'x.png'
    command = ['sample', str(latent.path), '--n', '2', '--steps', '2', '--out', str(file)]
    assert main(command) == 0
    assert file.exists()


@pytest.mark.slow
def test_only_models_with_a_source_of_codes_sample(models):
    "The class of a model decides in which ways it samples."
    assert list(ways(models['dpm'])) == ['DDIM']
    assert list(ways(models['vae'])) == ['beta-VAE', 'beta-VAE + autoencoding']
    with pytest.raises(ValueError, match='new images come from an unconditional DPM'):
        ways(models['eval_classifier'])


@pytest.mark.slow
def test_number_of_samples_for_equal_numbers_of_calls(models):
    "With `calls`, a row with three times the steps has a third of the images, but at least 20."
    dpm = models['dpm']
    eval_classifier = models['eval_classifier']
    d = evaluate_latent(dpm, eval_classifier, 90, (1, 3), chunk=20, calls=60, log=no_log)
    assert {k: row['n'] for k, row in d['table'].items()} == {'DDIM 1': 90, 'DDIM 3': 20}
    with pytest.raises(ValueError, match='a row of 19 images is too short for FIDs'):
        evaluate_latent(dpm, eval_classifier, 60, (1, 3), calls=59, log=no_log)


def test_samples_with_nan_are_not_stored():
    "The chunk before the NaN is stored and kept. The chunk with NaN is sampled again."
    feats = eval_feats(EvalClassifier(EvalClassifierNet(ch=8), (1, 28, 28)))

    def zeros_then_nan(n, seed, steps):
        value = torch.nan if seed else 0.0
        return torch.full((n, 1, 28, 28), value), torch.zeros(n, 0)

    def ones(n, seed, steps):
        return torch.ones(n, 1, 28, 28), torch.zeros(n, 0)

    with pytest.raises(ValueError, match='4 of 4 images have NaN'):
        drawn(zeros_then_nan, [], 'way', feats, 8, 2, chunk=4, log=no_log)
    d = drawn(ones, [], 'way', feats, 8, 2, chunk=4, log=no_log)
    assert len(d.x) == 8
    assert (d.x[:4] == to_uint8(torch.zeros(1))).all()
    assert (d.x[4:] == to_uint8(torch.ones(1))).all()


@pytest.mark.slow
def test_samples_are_measured_again_for_other_weights_only(models, tmp_path):
    feats = eval_feats(models['eval_classifier'])
    real = features(feats, digits('train', 28))
    asked = []

    def real_features():
        asked.append(1)
        return real

    def measure(model, old):
        return _drawn(model, old, real_features, feats, 250, 1, log=no_log)

    scorevae = models['scorevae']
    d = measure(scorevae, {})
    assert {'ScoreVAE', 'ScoreVAE, latent DPM'} < set(d)
    marked = {way: row | dict(fid=[-1.0, 0.0]) for way, row in d.items()}
    asked.clear()
    assert measure(scorevae, marked) == marked
    assert not asked, 'features of the training images are not needed'

    latent = 'ScoreVAE, latent DPM'
    outdated = marked[latent] | dict(weights='of an older network')
    new = measure(scorevae, marked | {latent: outdated})
    assert new['ScoreVAE'] == marked['ScoreVAE']
    assert new[latent] == d[latent]

    shutil.copytree(models['dpm'].path, tmp_path / 'digits_dpm')
    shutil.copytree(scorevae.path, tmp_path / 'digits_scorevae')
    shutil.copytree(models['vae'].path, tmp_path / 'digits_vae')
    shutil.copytree(models['vae_latent'].path, tmp_path / 'digits_scorevae_latent')
    with pytest.raises(ValueError, match='generates codes for another autoencoder'):
        measure(load(tmp_path / 'digits_scorevae'), {})


@pytest.mark.slow
def test_published_errors_build_no_graph(models, monkeypatch):
    "The parameters of a loaded model require a gradient. The measurement computes none."
    vae = load(models['vae'].path)
    assert all(p.requires_grad for p in vae.parameters())
    graphs = []

    def noted_kl(mean, log_variance):
        graphs.append(mean.requires_grad)
        return kl_to_prior(mean, log_variance)

    monkeypatch.setattr('pdae_nb.experiments.autoencoding.kl_to_prior', noted_kl)
    x0 = torch.rand(2, 1, 28, 28) * 2 - 1
    assert set(_published(vae, x0, eval_feats(models['eval_classifier']))) == {'mean', 'drawn'}
    assert graphs == [False]


@pytest.mark.slow
def test_reconstruction_errors_are_those_of_the_table(models):
    "The numbers are those of `reconstruction_table`, without the rows of the DPM."
    x0 = torch.rand(4, 1, 28, 28) * 2 - 1
    y = torch.arange(4)
    eval_classifier = models['eval_classifier']
    scorevae = models['scorevae']
    rows = _restored(scorevae, x0, y, eval_classifier, eval_feats(eval_classifier), 2)
    assert list(rows) == ['random', 'inferred']
    way = 'inferred, DDIM'
    table = reconstruction_table(
        scorevae, x0, y, eval_classifier, None, (2,), log=no_log, ways=(way,)
    )
    expected = table[f'ScoreVAE {way} 2']
    assert rows['inferred'].keys() == expected.keys()
    for key in ('mse', 'ssim', 'lpips', 'kept'):
        assert rows['inferred'][key] == pytest.approx(expected[key], rel=1e-4)


# The file of results


def compare(path, models, **names):
    "`evaluate_space` with few images; `names`: label of a row -> key of `models`."
    chosen = {label: models[key] for label, key in names.items()}
    settings = dict(fid_images=20, seconds=0.01, log=no_log)
    return evaluate_space(path, chosen, models['eval_classifier'], 3, 1, **settings)


def row_of(path, label):
    "A row of a file of results."
    return json.loads(path.read_text())['rows'][label]


@pytest.mark.slow
def test_interrupted_comparison_is_continued(models, tmp_path, monkeypatch):
    path = tmp_path / 'space.json'
    first = compare(path, models, DDIM='dpm')['rows']['DDIM']
    assert first.keys() == {'weights', 'ppl', 'restored', 'drawn', 'cost'}
    assert first['cost']['step_ratio'] == 1

    def interrupted(*args, **kw):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr('pdae_nb.experiments.autoencoding._rough', interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(path, models, DDIM='dpm', VAE='vae')
    half = row_of(path.with_name('space.part.json'), 'VAE')
    assert {'nonlinearity', 'legible'} <= half.keys()
    assert 'ppl' not in half
    assert row_of(path, 'DDIM') == first

    vae = compare(path, models, DDIM='dpm', VAE='vae')['rows']['VAE']
    assert vae['legible'] == half['legible']
    assert {'published', 'cost'} < vae.keys()
    random = vae['restored']['random']['mse'][0]
    inferred = vae['restored']['inferred']['mse'][0]
    assert abs(random - inferred) < 1e-3, 'the output of a VAE does not depend on x_T'


@pytest.fixture(scope='module')
def space(models, tmp_path_factory):
    "A file of results of a DPM and a VAE; how often the training images' features were computed."
    path = tmp_path_factory.mktemp('space') / 'space.json'
    computed = []

    def counted_features(feats, images):
        if len(images) == len(digits('train', 28)):
            computed.append(1)
        return features(feats, images)

    with pytest.MonkeyPatch.context() as m:
        m.setattr('pdae_nb.experiments.autoencoding.features', counted_features)
        compare(path, models, DDIM='dpm', VAE='vae')
    return path, len(computed)


@pytest.fixture(scope='module')
def space_file(space):
    "A file of results of a DPM and a VAE."
    path, _ = space
    return path


@pytest.mark.slow
def test_features_of_training_images_are_computed_once(space):
    _, computed = space
    assert computed == 1


@pytest.mark.slow
def test_comparison_of_other_runs_is_an_error(models, space_file):
    "The file has results of other weights, or relative to another first run. It is unchanged."
    before = space_file.read_bytes()
    with pytest.raises(ValueError, match='other weights of VAE'):
        compare(space_file, models, DDIM='dpm', VAE='scorevae')
    with pytest.raises(ValueError, match='of other settings .yard '):
        compare(space_file, models, VAE='vae')
    assert space_file.read_bytes() == before


@pytest.mark.slow
def test_damaged_file_of_results_is_an_error(models, space_file, tmp_path):
    path = tmp_path / 'space.json'
    cut_off = space_file.read_bytes()[:100]
    for damaged in (cut_off, b'{}', b'[]', b'{"about": {}, "rows": {"VAE": {}}, "seconds": 0}'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match='holds no measurement of codes'):
            compare(path, models, DDIM='dpm')


# Networks


@pytest.mark.slow
def test_stored_conditional_decoder(models):
    "The denoiser depends on the codes of the images, as does the stored network."
    model = load(models['conditional'].path)
    x0 = torch.rand(2, 1, 28, 28) * 2 - 1
    t = torch.full((2,), 400)
    assert model.title == 'conditional decoder'
    assert [name for name, _ in model.named_children()] == ['enc', 'net']
    with torch.no_grad():
        z = model.condition(x0)
        eps = model.denoiser(z)(x0, t)
        assert torch.allclose(z, model.enc(x0))
        assert torch.allclose(eps, model.net(x0, t, z), atol=1e-5)
        assert not torch.allclose(eps, model.net(x0, t, -z), atol=1e-5)


def test_noise_of_codes_differs_from_noise_of_images():
    "The same seed gives different noise. The first code does not depend on their number."
    first = code_noise(1, 64, 7)[0]
    for n in (64, 784):
        noise = torch.randn(n, generator=torch.Generator().manual_seed(7))
        assert not torch.equal(first, noise[:64])
    assert torch.equal(first, code_noise(3, 64, 7)[0])


@pytest.mark.parametrize('kw', [{}, dict(lag=1), dict(dt=48)])
def test_half_unet_is_the_first_half_of_a_unet(kw):
    torch.manual_seed(0)
    whole = UNet(1, 8, (1, 2), 28, n_res=1, **kw)
    half = HalfUNet(1, 8, (1, 2), 28, n_res=1, **kw)
    for p in half.parameters():
        torch.nn.init.normal_(p, std=0.2)  # also the zero-initialised ones
    assert not whole.load_state_dict(half.state_dict(), strict=False).unexpected_keys
    x = torch.randn(2, 1, 28, 28)
    t = torch.tensor([3, 700])
    features = half.deepest(x, t)
    assert torch.equal(features, whole.down(x, whole.embed(t))[-1])
    assert not torch.equal(features, half.deepest(x, t.flip(0)))

    rebuilt = HalfUNet(**half.config)
    rebuilt.load_state_dict(half.state_dict())
    assert torch.equal(rebuilt.deepest(x, t), features)
