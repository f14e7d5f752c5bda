"""Networks that predict v: the denoiser, the loss, every method on such a base, and resumed runs.

The networks are tiny and have random weights, none of them zero. The images are test images of
MNIST at 14 pixels.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pdae_nb.data import mnist_or_digits, to_signed
from pdae_nb.edit import interpolate
from pdae_nb.forward import Schedule, add_noise, shift_to_eps
from pdae_nb.hub import load, train
from pdae_nb.methods.classifier import NoisyClassifier, NoisyClassifierNet, classifier_guided
from pdae_nb.methods.diffae import DiffAE, SemanticEncoder
from pdae_nb.methods.dpm import DPM, ClassConditionalDPM, DPMSettings, LabelUNet, NoisePredictor
from pdae_nb.methods.label_pdae import LabelPDAE
from pdae_nb.methods.latent import LatentDPM
from pdae_nb.methods.pdae import PDAE
from pdae_nb.methods.scorevae import ScoreVAE
from pdae_nb.model import Draw, model_fingerprint
from pdae_nb.pretrained import to_official
from pdae_nb.recipes import RECIPES
from pdae_nb.sampling import invert, sample
from pdae_nb.solvers import belm_step, invert_exactly
from pdae_nb.training import Recipe
from pdae_nb.unet import UNet

SCHED = Schedule.linear()
SHAPE = (1, 14, 14)
NET = dict(ch=8, mult=(1, 2), n_res=1, groups=8)
V = DPMSettings('v')
SHORT = dict(data='digits', px=14, images=48, batch=16, lr=2e-3, ema=0.5)
CODE = dict(z_dim=4, groups=8)
TIME_CODE = dict(z_dim=4, **NET)


def no_log(message):
    "A log function that drops its message."


def perturbed(network, std=0.1):
    "The network, with noise added to every weight, so that no layer is zero-initialised."
    for p in network.parameters():
        p.data += std * torch.randn_like(p)
    return network


def dpm_of(settings):
    torch.manual_seed(0)
    return DPM(perturbed(UNet(c=1, size=14, **NET)), SCHED, SHAPE, settings)


def cdpm_of(settings):
    torch.manual_seed(1)
    net = perturbed(LabelUNet(classes=10, c=1, size=14, **NET))
    return ClassConditionalDPM(net, SCHED, SHAPE, settings)


def diffae_of(settings):
    torch.manual_seed(2)
    enc = SemanticEncoder(c=1, size=14, z_dim=4, ch=8, mult=(1, 2, 2), n_res=1, groups=8)
    net = perturbed(UNet(c=1, size=14, dz=4, z_shift=False, **NET))
    return DiffAE(enc, net, SCHED, SHAPE, settings)


MODELS = dict(dpm=dpm_of, cdpm=cdpm_of, diffae=diffae_of)


@pytest.fixture(scope='module')
def images():
    "Eight test images and their labels."
    test = mnist_or_digits('test', 14)
    return to_signed(test.x[:8]), test.y[:8].long()


@pytest.fixture
def noisy(images):
    "Clean images, noise, timesteps 1…1000 and noisy images."
    x0, y = images
    t = torch.tensor([1, 50, 200, 400, 600, 800, 990, 1000])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    return x0, y, eps, t, add_noise(SCHED, x0, t, eps)


def per_image(values):
    "float64 (B,) as float32 (B,1,1,1)."
    return values.float().reshape(-1, 1, 1, 1)


def output_of(model, xt, t, condition):
    "What the network itself returns."
    return model.net(xt, t) if condition is None else model.net(xt, t, condition)


# The denoiser and the loss


class TrueV(nn.Module):
    "A network that returns v of known images."

    def __init__(self, x0, eps):
        super().__init__()
        self.x0 = x0
        self.eps = eps

    def forward(self, xt, t, condition=None):
        alpha_bar = SCHED.alpha_bar[t]
        return per_image(alpha_bar.sqrt()) * self.eps - per_image((1 - alpha_bar).sqrt()) * self.x0


@pytest.mark.parametrize('kind', MODELS)
def test_the_denoiser_of_a_network_of_v_returns_the_noise(kind, noisy):
    x0, y, eps, t, xt = noisy
    model = MODELS[kind](V)
    condition = model.condition(x0, y)
    model.net = TrueV(x0, eps)
    torch.testing.assert_close(model.denoiser(condition)(xt, t), eps, rtol=0, atol=1e-5)


@pytest.mark.parametrize('kind', MODELS)
def test_without_settings_or_with_eps_the_output_is_the_noise(kind, noisy):
    x0, y, _, t, xt = noisy
    for settings in (DPMSettings('eps'), None):
        model = MODELS[kind](settings)
        assert model.predicts == 'eps' and model.weight is None
        condition = model.condition(x0, y)
        with torch.no_grad():
            wanted = output_of(model, xt, t, condition)
            assert torch.equal(model.denoiser(condition)(xt, t), wanted)


@pytest.mark.parametrize('kind', MODELS)
def test_the_loss_is_the_squared_error_of_v(kind, images):
    x0, y = images
    model = MODELS[kind](V)
    losses, t = model.loss(x0, y, Draw(0, 3, len(x0)))
    draw = Draw(0, 3, len(x0))
    assert torch.equal(draw.times(SCHED), t)
    eps = draw.normal(*SHAPE)
    xt = add_noise(SCHED, x0, t, eps)
    v = TrueV(x0, eps)(xt, t)
    error = output_of(model, xt, t, model.condition(x0, y)) - v
    wanted = error.square().flatten(1).mean(1)
    torch.testing.assert_close(losses, wanted, rtol=2e-3, atol=1e-6)


def test_gradients_of_the_loss_are_those_of_the_squared_error_of_v(images):
    x0, _ = images
    model = dpm_of(V)
    losses, t = model.loss(x0, None, Draw(0, 3, len(x0)))
    got = torch.autograd.grad(losses.mean(), list(model.parameters()))
    draw = Draw(0, 3, len(x0))
    draw.times(SCHED)
    eps = draw.normal(*SHAPE)
    xt = add_noise(SCHED, x0, t, eps)
    error = model.net(xt, t) - TrueV(x0, eps)(xt, t)
    wanted = torch.autograd.grad(error.square().mean(), list(model.parameters()))
    largest = max(float(b.abs().max()) for b in wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4 * largest)


def test_fingerprints_tell_eps_and_v_apart():
    assert model_fingerprint(dpm_of(V)) != model_fingerprint(dpm_of(DPMSettings()))
    assert model_fingerprint(diffae_of(V)) != model_fingerprint(diffae_of(None))


def test_other_prediction_types_are_refused():
    with pytest.raises(ValueError, match="must be 'eps' or 'v', got 'x0'"):
        DPMSettings('x0')


# Methods on a base that predicts v


def eps_of_base(base, xt, t):
    "The noise of a base that predicts v, by the formula."
    alpha_bar = SCHED.alpha_bar[t]
    v = base.net(xt, t)
    return per_image(alpha_bar.sqrt()) * v + per_image((1 - alpha_bar).sqrt()) * xt


def built(method, images, **parts):
    "A model on a base that predicts v, with random weights, none of them zero."
    recipe = Recipe(method, **SHORT, **parts)
    test = mnist_or_digits('test', 14)
    torch.manual_seed(5)
    return perturbed(method.build(recipe, test, dpm_of(V))).eval()


@pytest.mark.parametrize('method', [PDAE, LabelPDAE])
def test_shifted_models_shift_the_noise_of_the_base(method, noisy):
    x0, y, _, t, xt = noisy
    model = built(method, x0, **(dict(encoder=CODE) if method is PDAE else {}))
    condition = model.condition(x0, y)
    with torch.no_grad():
        features, e = model.base.features(xt, t)
        score = model.G(features, e, model.vector(condition))
        wanted = eps_of_base(model.base, xt, t) + shift_to_eps(SCHED, t, score)
        got = model.denoiser(condition)(xt, t)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_scorevae_adds_the_score_to_the_noise_of_the_base(noisy):
    x0, _, _, t, xt = noisy
    model = built(ScoreVAE, x0, encoder=TIME_CODE)
    codes = model.condition(x0).detach()
    x = xt.clone().requires_grad_(True)
    score = torch.autograd.grad(model.enc.log_p(x, t, codes).sum(), x)[0]
    with torch.no_grad():
        wanted = eps_of_base(model.base, xt, t)
    wanted = wanted - per_image((1 - SCHED.alpha_bar[t]).sqrt()) * score
    with torch.no_grad():
        got = model.denoiser(codes)(xt, t)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_classifier_guidance_of_a_base_of_v(noisy):
    _, y, _, t, xt = noisy
    torch.manual_seed(3)
    net = perturbed(NoisyClassifierNet(1, size=14, classes=10, **NET))
    classifier = NoisyClassifier(net, SCHED, SHAPE)
    base = dpm_of(V)
    x = xt.clone().requires_grad_(True)
    score = torch.autograd.grad(classifier.log_p(x, t, y).sum(), x)[0]
    with torch.no_grad():
        got = classifier_guided(base.denoiser(), classifier, y, SCHED, scale=2.0)(xt, t)
        wanted = eps_of_base(base, xt, t)
    wanted = wanted - 2 * per_image((1 - SCHED.alpha_bar[t]).sqrt()) * score
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Folders of briefly trained runs that predict v, or have such a base."
    folder = tmp_path_factory.mktemp('runs')
    dpm = train('dpm', Recipe(DPM, **SHORT, net=NET, settings=V), out=folder / 'dpm', log=no_log)
    recipes = dict(
        pdae=Recipe(PDAE, **SHORT, base=dpm, encoder=CODE),
        label_pdae=Recipe(LabelPDAE, **SHORT, base=dpm),
        scorevae=Recipe(ScoreVAE, **SHORT, base=dpm, encoder=TIME_CODE),
        cdpm=Recipe(ClassConditionalDPM, **SHORT, net=NET, settings=V),
        diffae=Recipe(DiffAE, **SHORT, net=NET, encoder=dict(z_dim=4, mult=(1, 2, 2)), settings=V),
    )
    for name, recipe in recipes.items():
        train(name, recipe, out=folder / name, log=no_log)
    for name in ('pdae', 'diffae'):
        recipe = Recipe(LatentDPM, **SHORT, base=folder / name, net=dict(hidden=16, layers=3))
        train(f'{name}_latent', recipe, out=folder / f'{name}_latent', log=no_log)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dpm', 'pdae', 'label_pdae', 'scorevae', 'cdpm', 'diffae'])
def test_the_inferred_noise_gives_the_image_again(name, runs, images):
    x0, y = images[0][:2], images[1][:2]
    model = load(runs / name)
    condition = model.condition(x0, y)
    if condition is not None:
        condition = condition.detach()
    denoiser = model.denoiser(condition)
    with torch.no_grad():
        xT = invert(denoiser, x0, model.sched, 80)
        again = sample(denoiser, xT, model.sched, 80)
    assert xT.std() > 0.3
    assert (again - x0).square().mean().sqrt() < 0.05
    if name == 'dpm':
        with torch.no_grad():
            pair = invert_exactly(denoiser, x0, model.sched, 10)
            exact = sample(denoiser, pair, model.sched, 10, solver=belm_step)
        torch.testing.assert_close(exact, x0, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pdae', 'diffae'])
def test_interpolations_end_at_the_images(name, runs, images):
    x0, _ = images
    model = load(runs / name)
    got = interpolate(model, x0[:2], x0[2:4], [0, 0.5, 1], steps=40)
    assert got.shape == (3, 2, *SHAPE)
    assert got.isfinite().all()
    for end, wanted in ((got[0], x0[:2]), (got[2], x0[2:4])):
        assert (end - wanted).square().mean().sqrt() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pdae', 'diffae'])
def test_latent_dpms_are_priors_of_models_of_v(name, runs):
    latent = load(runs / f'{name}_latent')
    model = load(runs / name)
    assert model_fingerprint(latent.base) == model_fingerprint(model)
    samples = model.sample(2, prior=latent, seed=1, steps=5)
    assert samples.shape == (2, *SHAPE)
    assert samples.isfinite().all()
    assert torch.equal(samples, model.sample(2, prior=latent, seed=1, steps=5))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dpm', 'cdpm', 'diffae', 'pdae', 'scorevae', 'label_pdae'])
def test_a_stored_model_is_the_same_after_loading(name, runs, noisy, tmp_path):
    x0, y, _, t, xt = noisy
    model = load(runs / name)
    model.save(tmp_path / 'copy', bundle=True)
    again = load(tmp_path / 'copy')
    of_v = again if again.base is None else again.base
    assert of_v.settings == V
    assert model_fingerprint(again) == model_fingerprint(model)
    with torch.no_grad():
        outputs = [m.denoiser(m.condition(x0, y))(xt, t) for m in (model, again)]
    assert torch.equal(*outputs)


class Interrupted(Exception):
    "Raised in the middle of a training."


def interrupt(seen, model):
    raise Interrupted


def recipes_to_resume(runs):
    base = runs / 'dpm'
    return dict(
        dpm=Recipe(DPM, **SHORT, net=NET, settings=V),
        diffae=Recipe(DiffAE, **SHORT, net=NET, encoder=dict(z_dim=4, mult=(1, 2, 2)), settings=V),
        pdae=Recipe(PDAE, **SHORT, base=str(base), encoder=CODE),
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dpm', 'diffae', 'pdae'])
def test_a_resumed_run_ends_with_the_same_weights(name, runs, tmp_path):
    recipe = recipes_to_resume(runs)[name]
    out = tmp_path / name
    with pytest.raises(Interrupted):
        train(name, recipe, out=out, every=1, look=interrupt, log=no_log)
    assert not (out / 'run.json').exists()
    lines = []
    resumed = train(name, recipe, out=out, log=lines.append)
    assert 'going on at step 1 of 3' in lines
    for a, b in zip(resumed.parameters(), load(runs / name).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_run_of_v_is_not_continued_as_eps(runs):
    recipe = recipes_to_resume(runs)['dpm']
    with pytest.raises(ValueError, match="another recipe: settings {'predicts': 'v'} → None"):
        train('dpm', replace(recipe, settings=None), out=runs / 'dpm', log=no_log)


def test_the_official_format_has_no_v(images):
    with pytest.raises(ValueError, match='predicts v'):
        to_official(built(PDAE, images, encoder=CODE).eps_and_score)


# Rows of the table

COLOUR = ('cifar10', 'cifar16', 'celeba64', 'celebahq128', 'ffhq128', 'horse128', 'bedroom128')


@pytest.mark.parametrize('method', [DPM, DiffAE])
def test_lesson_rows_of_colour_images_predict_v(method):
    rows = {
        name: row.settings
        for (name, size), row in RECIPES.items()
        if row.method is method and size == 'lesson' and name.startswith(COLOUR)
    }
    names = dict(
        DPM=[f'{data}_dpm' for data in COLOUR],
        DiffAE=['celeba64_diffae'],
    )[method.__name__]
    assert sorted(rows) == sorted(names)
    shipped = rows.pop('cifar16_dpm', None)
    assert shipped is None, 'the stored model predicts eps'
    assert set(rows.values()) == {V}


def test_other_rows_predict_eps():
    for (name, size), row in RECIPES.items():
        if size != 'lesson' or not name.startswith(COLOUR):
            assert getattr(row.settings, 'predicts', 'eps') == 'eps', (name, size)


def test_rows_of_stored_models_have_their_prediction_type():
    root = Path(__file__).parent.parent
    for folder in [*(root / 'data/models').iterdir(), *(root / 'pdae_nb/assets/models').iterdir()]:
        row = RECIPES.get((folder.name, 'lesson'))
        if row is not None and issubclass(row.method, NoisePredictor):
            assert load(folder).predicts == getattr(row.settings, 'predicts', 'eps'), folder.name


def test_the_geometry_of_celeba_lessons():
    dpm = RECIPES['celeba64_dpm', 'lesson']
    diffae = RECIPES['celeba64_diffae', 'lesson']
    assert dpm.net == diffae.net == dict(ch=48, mult=(1, 2, 3, 4), n_res=1, attn=(16,))
    assert diffae.encoder['mult'] == (*dpm.net['mult'], dpm.net['mult'][-1])
