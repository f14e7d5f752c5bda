"""Models: the frozen base, the random numbers of a step, files, and a user's own network."""

import copy
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

import pdae_nb
import pdae_nb.hub as hub
from pdae_nb.data import load_images, to_signed
from pdae_nb.files import models_dirs, read_tensors, write_tensors
from pdae_nb.forward import Schedule
from pdae_nb.hub import load, train
from pdae_nb.methods.classifier import EvalClassifier, EvalClassifierNet
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.label_pdae import LabelPDAE
from pdae_nb.methods.latent import LatentDPM, MLPSkipNet, ZStats
from pdae_nb.methods.pdae import PDAE
from pdae_nb.methods.scorevae import ScoreVAE, ScoreVAESettings, TimeEncoder, code_noise
from pdae_nb.methods.vae import VAE, BetaVAE, VAESettings
from pdae_nb.model import Draw, model_fingerprint, noise, spec_of
from pdae_nb.networks import ConvEncoder, GradientEstimator
from pdae_nb.training import EMA, Recipe, fit
from pdae_nb.unet import UNet

SCHED = Schedule.linear()
SHAPE = (1, 14, 14)
SMALL = dict(c=1, ch=8, mult=(1, 2), n_res=1, size=14, groups=8)
SHIPPED = sorted({
    path.parent.name for folder in models_dirs() for path in folder.glob('*/run.json')
})


def no_log(message):
    "A log function that drops its message."


def perturb(module, std=0.1):
    "Add noise to every weight, so that no layer is zero-initialised."
    for p in module.parameters():
        p.data += std * torch.randn_like(p)
    return module


def new_dpm(seed=0, **kw):
    "A DPM with random weights."
    torch.manual_seed(seed)
    return DPM(perturb(UNet(**SMALL, **kw)), SCHED, SHAPE)


def new_pdae(base=None, seed=1):
    "A PDAE with random weights; dropout only in its base, if at all."
    base = base or new_dpm()
    torch.manual_seed(seed)
    enc = ConvEncoder(1, 14, 4, groups=8)
    return PDAE(enc, perturb(GradientEstimator.on(base.net, 4)), base)


def new_label_pdae():
    "A PDAE of labels, with random weights."
    base = new_dpm()
    torch.manual_seed(1)
    return LabelPDAE(perturb(GradientEstimator.on(base.net, 10)), base)


def new_scorevae():
    "A ScoreVAE with random weights."
    torch.manual_seed(1)
    return ScoreVAE(perturb(TimeEncoder(**SMALL, z_dim=4)), new_dpm())


def new_vae():
    "A VAE with random weights."
    torch.manual_seed(1)
    return VAE(BetaVAE(**SMALL, z_dim=4), SCHED, SHAPE)


def new_eval_classifier():
    "An evaluation classifier with random weights."
    torch.manual_seed(1)
    return EvalClassifier(EvalClassifierNet(1, ch=8), SHAPE)


def new_latent(base):
    "A latent DPM of this PDAE, with random weights."
    torch.manual_seed(2)
    return LatentDPM(MLPSkipNet(4, hidden=8, layers=2), ZStats(torch.randn(9, 4)), base)


def some_digits(n):
    "Test images in [-1,1] (n,1,14,14), and their labels."
    images = load_images('digits', 'test', 14)
    return to_signed(images.x[:n]), images.y[:n]


def copy_of_weights(model):
    "The weights of a model, copied."
    return {name: v.clone() for name, v in model.state_dict().items()}


def assert_same_weights(got, want):
    "Compare two dicts of tensors bit for bit."
    assert got.keys() == want.keys()
    for name, v in want.items():
        assert got[name].dtype == v.dtype, name
        assert torch.equal(got[name], v), name


# ---------------------------------------------------------------- the frozen base


def test_the_base_is_no_part_of_the_model():
    model = new_pdae()
    names = {name.split('.')[0] for name in model.state_dict()}
    assert names == {'enc', 'G'}
    assert {name for name, _ in model.named_children()} == {'enc', 'G'}
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in model.base.parameters()}
    assert model.base not in list(model.modules())


def test_dropout_of_the_base_stays_off_while_the_model_trains():
    base = new_dpm(drop=0.5).train()
    x0, y = some_digits(4)
    t = torch.tensor([1, 300, 600, 1000])
    assert not torch.equal(base.net(x0, t), base.net(x0, t))
    model = new_pdae(base).train()
    assert model.training and model.G.training and not base.training
    assert not any(module.training for module in base.modules())
    first, _ = model.loss(x0, y, Draw(0, 0, 4))
    again, _ = model.loss(x0, y, Draw(0, 0, 4))
    assert torch.equal(first, again)


def test_parameters_of_the_base_get_no_gradient():
    model = new_pdae().train()
    x0, y = some_digits(4)
    losses, _ = model(x0, y, Draw(0, 0, 4))
    losses.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.base.parameters())
    assert {id(p) for p in model.trainable()} == {id(p) for p in model.parameters()}


def test_training_changes_the_model_and_its_average_but_not_the_base():
    model = new_pdae().train()
    base_before = copy_of_weights(model.base)
    before = copy_of_weights(model)
    recipe = Recipe(PDAE, 'digits', 14, 16, batch=4, lr=1e-2)
    x0, y = some_digits(4)
    average = EMA(model, 0.5)
    assert average.module.base is model.base
    list(fit(model, model.trainable(), [(x0, y)] * 2, recipe, average))
    assert_same_weights(model.base.state_dict(), base_before)
    for weights in (model.state_dict(), average.module.state_dict()):
        assert weights.keys() == before.keys()
        assert not torch.equal(weights['enc.head.weight'], before['enc.head.weight'])


def test_a_deep_copy_shares_the_base_only():
    model = new_pdae()
    other = copy.deepcopy(model)
    assert other.base is model.base
    assert_same_weights(other.state_dict(), copy_of_weights(model))
    with torch.no_grad():
        other.enc.head.weight.zero_()
    assert model.enc.head.weight.any()
    other.card.name = 'other'
    assert model.card.name == 'untrained'


@pytest.mark.slow
def test_checkpoints_and_saved_weights_do_not_contain_the_base(tmp_path):
    base = new_dpm()
    base.save(tmp_path / 'dpm')
    settings = dict(encoder=dict(z_dim=4, groups=8), batch=4, lr=1e-2)
    recipe = Recipe(PDAE, 'digits', 14, 8, base=str(tmp_path / 'dpm'), **settings)
    out = tmp_path / 'pdae'
    model = train('pdae', recipe, out=out, every=1, log=no_log)
    names = set(model.state_dict())
    checkpoints = sorted((out / 'checkpoints').glob('*.safetensors'))
    assert len(checkpoints) == 2
    for path in checkpoints:
        stored = {name for name in read_tensors(path)[0] if not name.startswith('opt.')}
        assert stored == {f'{part}.{name}' for part in ('model', 'ema') for name in names}
    files = {path.name for path in out.glob('*.safetensors')}
    assert files == {'enc.safetensors', 'G.safetensors', 'sched.safetensors'}
    stored = set(read_tensors(out / 'G.safetensors')[0])
    assert stored == {name.removeprefix('G.') for name in names if name.startswith('G.')}
    assert not (out / 'base').exists()


def test_casts_do_not_reach_the_base():
    model = new_pdae()
    before = copy_of_weights(model.base)
    for change in (model.double, model.half, model.bfloat16):
        change()
        assert_same_weights(model.base.state_dict(), before)
    assert model.enc.head.weight.dtype == torch.bfloat16


def test_empty_and_meta_weights_do_not_reach_the_base():
    model = new_pdae()
    before = copy_of_weights(model.base)
    model.to('meta')
    assert model.device.type == 'meta'
    assert_same_weights(model.base.state_dict(), before)
    model.to_empty(device='cpu')
    assert model.device.type == 'cpu'
    assert_same_weights(model.base.state_dict(), before)


def test_the_base_follows_to_another_device():
    model = new_pdae()
    moved = []
    model.base.to = moved.append
    model.to('cpu')
    assert moved == [torch.device('cpu')]


def test_another_base_can_be_assigned():
    model = new_pdae()
    old = model.base
    before = copy_of_weights(old)
    own = copy_of_weights(model)
    new = new_dpm(seed=5).train()
    model.base = new
    assert not new.training
    assert not any(p.requires_grad for p in new.parameters())
    assert_same_weights(old.state_dict(), before)
    assert_same_weights(model.state_dict(), own)
    x0, _ = some_digits(2)
    t = torch.tensor([300, 600])
    with torch.no_grad():
        eps, _ = model.eps_and_score(x0, t, model.encode(x0))
        assert torch.equal(eps, new.net(x0, t))


# ---------------------------------------------------------------- random numbers of a step


def draws(world, rank, step=3):
    "All kinds of random numbers of one process, one after the other."
    draw = Draw(7, step, 12, rank=rank, world=world)
    return dict(
        t=draw.times(SCHED),
        shift=draw.integers(-2, 3, (2,), per_batch=True),
        integers=draw.integers(0, 1000),
        pairs=draw.integers(0, 1000, (2,)),
        eps=draw.normal(1, 3, 3),
        xi=draw.normal(4),
    )


@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_processes_together_use_the_random_numbers_of_one(world):
    whole = draws(1, 0)
    assert whole['t'].shape == whole['integers'].shape == (12,)
    assert whole['pairs'].shape == (12, 2) and whole['shift'].shape == (2,)
    for rank in range(world):
        part = draws(world, rank)
        assert torch.equal(part.pop('shift'), whole['shift'])
        for name, rows in part.items():
            assert len(rows) == 12 // world
            assert torch.equal(rows, whole[name][rank::world]), name


def test_another_step_has_other_random_numbers():
    a = draws(1, 0, step=3)
    b = draws(1, 0, step=4)
    same = {name for name in a if torch.equal(a[name], b[name])}
    assert not same - {'shift'}  # two small integers may be equal by chance


def test_draws_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws(1, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match='3 processes cannot share a batch of 8 images'):
        Draw(0, 0, 8, world=3)


@pytest.mark.parametrize(
    'new', [new_pdae, new_label_pdae, new_scorevae, new_vae, new_eval_classifier]
)
def test_two_processes_compute_the_losses_of_one(new):
    model = new().double().train()  # float32 rounds each batch size in its own way
    if model.base is not None:
        model.base.double()
    x0, y = some_digits(8)
    x0 = x0.double()
    whole, t = model.loss(x0, y, Draw(0, 3, 8))
    assert whole.dtype == torch.float64 and whole.isfinite().all() and whole.any()
    for rank in range(2):
        draw = Draw(0, 3, 8, rank=rank, world=2)
        part, times = model.loss(x0[rank::2], y[rank::2], draw)
        torch.testing.assert_close(part, whole[rank::2], rtol=1e-6, atol=1e-6)
        assert (t is None) == (times is None)
        assert t is None or torch.equal(times, t[rank::2])


# ---------------------------------------------------------------- noise of samples


def test_noise_of_a_sample_depends_on_the_seed_and_its_index_only():
    whole = noise(SHAPE, 6, seed=3)
    assert torch.equal(noise(SHAPE, 2, seed=3, first=4), whole[4:])
    assert not torch.equal(noise(SHAPE, 6, seed=4), whole)
    assert not torch.equal(noise(SHAPE, 1, seed=2**32 + 3), whole[:1])


# ---------------------------------------------------------------- files


@pytest.mark.parametrize('name', SHIPPED)
def test_every_shipped_model_is_the_same_after_save_and_load(name, tmp_path):
    model = load(name)
    fingerprint = model_fingerprint(model)
    model.save(tmp_path / name)
    again = load(tmp_path / name)
    assert type(again) is type(model)
    assert not again.training
    assert_same_weights(again.state_dict(), copy_of_weights(model))
    assert model_fingerprint(again) == fingerprint
    assert again.card == model.card
    assert again.settings == model.settings
    assert again.shape == model.shape
    if model.sched is not None:
        assert torch.equal(again.sched.beta, model.sched.beta)
    if model.base is not None:
        assert again.base.path == model.base.path
        assert model_fingerprint(again.base) == model_fingerprint(model.base)
        assert not (tmp_path / name / 'base').exists()


@pytest.mark.parametrize('name', SHIPPED)
def test_the_text_of_a_shipped_model_has_at_most_ten_lines(name):
    lines = repr(load(name)).splitlines()
    assert len(lines) <= 10
    assert repr(name) in lines[0]
    assert max(len(line) for line in lines) <= 200


def test_the_fingerprint_depends_on_weights_settings_schedule_and_class():
    model = new_pdae()
    prints = {model_fingerprint(model)}
    prints.add(model_fingerprint(new_pdae(seed=9)))
    changed = copy.deepcopy(model)
    changed.settings = type(model.settings)(gamma=0.5)
    prints.add(model_fingerprint(changed))
    changed = copy.deepcopy(model)
    changed.sched = Schedule(SCHED.beta / 2)
    prints.add(model_fingerprint(changed))

    class Other(PDAE):
        pass

    prints.add(model_fingerprint(Other(model.enc, model.G, model.base)))
    assert len(prints) == 5


def test_minus_zero_does_not_change_the_fingerprint():
    model = new_pdae()
    with torch.no_grad():
        model.enc.head.bias.zero_()
    before = model_fingerprint(model)
    with torch.no_grad():
        model.enc.head.bias.neg_()
    assert str(model.enc.head.bias[0].item()) == '-0.0'
    assert model_fingerprint(model) == before


def test_weights_of_float32_keep_their_fingerprint_when_float16_is_stored(tmp_path):
    model = new_pdae()
    fingerprints = model_fingerprint(model), model_fingerprint(model.base)
    model.base.save(tmp_path / 'dpm')
    model.save(tmp_path / 'pdae')
    again = load(tmp_path / 'pdae')
    assert not torch.equal(again.enc.head.weight, model.enc.head.weight)
    assert (model_fingerprint(again), model_fingerprint(again.base)) == fingerprints


def test_a_bundle_contains_the_base_and_its_base(tmp_path, monkeypatch):
    latent = new_latent(new_pdae())
    latent.save(tmp_path / 'latent', bundle=True)
    assert latent.path == (tmp_path / 'latent').resolve()
    assert latent.base.base.path == latent.path / 'base/base'
    shutil.move(tmp_path / 'latent', tmp_path / 'far/away')
    monkeypatch.setenv('PDAE_NB_MODELS', str(tmp_path / 'nothing'))
    again = load(tmp_path / 'far/away')
    assert type(again.base) is PDAE and type(again.base.base) is DPM
    for got, want in ((again, latent), (again.base, latent.base)):
        assert model_fingerprint(got) == model_fingerprint(want)
        assert model_fingerprint(got.base) == model_fingerprint(want.base)


def test_without_a_bundle_a_moved_model_needs_its_base(tmp_path, monkeypatch):
    base = new_dpm()
    base.save(tmp_path / 'here/dpm')
    new_pdae(base).save(tmp_path / 'here/pdae')
    monkeypatch.setenv('PDAE_NB_MODELS', str(tmp_path / 'models'))
    shutil.move(tmp_path / 'here/pdae', tmp_path / 'there/pdae')
    with pytest.raises(ValueError, match="needs the base 'dpm' with fingerprint .*found none"):
        load(tmp_path / 'there/pdae')
    shutil.copytree(tmp_path / 'here/dpm', tmp_path / 'models/dpm')
    found = load(tmp_path / 'there/pdae').base
    assert found.path == (tmp_path / 'models/dpm').resolve()


def test_another_base_is_refused_by_its_fingerprint(tmp_path):
    base = new_dpm()
    base.save(tmp_path / 'dpm')
    model = new_pdae(base)
    model.save(tmp_path / 'pdae')
    wanted = model_fingerprint(base)
    other = new_dpm(seed=5)
    other.save(tmp_path / 'dpm')
    message = f"'dpm' with fingerprint {wanted}; found .*{model_fingerprint(other)}"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / 'pdae')
    base.save(tmp_path / 'pdae/base')
    assert model_fingerprint(load(tmp_path / 'pdae').base) == wanted


def test_a_base_in_the_folder_of_its_model_survives_another_save(tmp_path):
    model = new_pdae()
    model.save(tmp_path / 'pdae', bundle=True)
    model.save(tmp_path / 'pdae')
    again = load(tmp_path / 'pdae')
    assert model_fingerprint(again.base) == model_fingerprint(model.base)


def test_a_model_saved_onto_its_own_base_keeps_the_base(tmp_path):
    new_dpm().save(tmp_path / 'model')
    base = load(tmp_path / 'model')
    before = copy_of_weights(base)
    new_pdae(base).save(tmp_path / 'model')
    again = load(tmp_path / 'model')
    assert isinstance(again, PDAE)
    assert_same_weights(again.base.state_dict(), before)


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/thesis.txt').write_text('text')
    with pytest.raises(FileExistsError, match='holds something else than a model'):
        new_dpm().save(tmp_path / 'notes')
    assert (tmp_path / 'notes/thesis.txt').read_text() == 'text'


@pytest.mark.skipif(os.name == 'nt', reason='links need a privilege on Windows')
def test_a_model_can_be_saved_twice_through_a_link(tmp_path):
    new_dpm().save(tmp_path / 'model')
    (tmp_path / 'link').symlink_to(tmp_path / 'model')
    second = new_dpm(seed=5)
    second.save(tmp_path / 'link')
    second.save(tmp_path / 'link')
    assert (tmp_path / 'link').is_symlink()
    assert model_fingerprint(load(tmp_path / 'model')) == model_fingerprint(second)


def test_bfloat16_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match='stored as float16 or float32, got torch.bfloat16'):
        new_dpm().save(tmp_path / 'model', dtype=torch.bfloat16)
    assert not (tmp_path / 'model').exists()


def test_sampling_a_conditional_model_without_a_prior_is_refused():
    with pytest.raises(ValueError, match='PDAE.sample needs prior='):
        new_pdae().sample(2)


def test_an_unconditional_model_has_no_codes():
    with pytest.raises(TypeError, match='DPM is unconditional: it has no codes'):
        new_dpm().encode(torch.zeros(2, *SHAPE))


def test_a_latent_dpm_inverts_what_it_decodes():
    "`infer_xT` takes codes in the units of the base's codes, which `decode` returns."
    torch.manual_seed(3)
    stats = ZStats(5 + 3 * torch.randn(100, 4))
    model = LatentDPM(MLPSkipNet(4, 16, 2), stats, None).eval()
    model.net.out.weight.data *= 0.1  # a smooth ODE, whose inversion is accurate
    codes = 5 + 3 * torch.randn(8, 4)
    back = model.reconstruct(codes, steps=1000)
    torch.testing.assert_close(back, codes, atol=0.2, rtol=0)
    with pytest.raises(ValueError, match='a latent DPM is unconditional'):
        model.decode(codes, codes)


class UnetOfTheUser(UNet):
    "A network of the user with the name of one of the package."


UnetOfTheUser.__name__ = 'UNet'
UnetOfTheUser.__module__ = '__main__'


def test_a_users_subclass_is_not_taken_for_the_class_of_the_same_name():
    spec = spec_of(UnetOfTheUser(**SMALL), 'test')
    assert spec['module'] == '__main__'
    assert spec_of(UNet(**SMALL), 'test')['module'] == 'pdae_nb.unet'


def test_a_failed_save_leaves_the_old_model_in_place(tmp_path):
    model = new_pdae()
    model.save(tmp_path / 'pdae', bundle=True)
    before = model_fingerprint(model)
    base_path = model.base.path
    with torch.no_grad():
        model.enc.head.bias.fill_(1e6)  # more than float16 holds
    with pytest.raises(ValueError, match=r'enc\.head\.bias'):
        model.save(tmp_path / 'pdae', bundle=True)
    assert model_fingerprint(load(tmp_path / 'pdae')) == before
    assert (model.path, model.base.path) == ((tmp_path / 'pdae').resolve(), base_path)
    assert [path.name for path in tmp_path.iterdir()] == ['pdae']


# ---------------------------------------------------------------- a user's own network


class OwnNet(nn.Module):
    "A network from outside the package: (xt,t) -> eps."

    def __init__(self, c, size, width=8):
        super().__init__()
        self.config = dict(c=c, size=size, width=width)
        self.first = nn.Conv2d(c, width, 3, padding=1)
        self.last = nn.Conv2d(width, c, 3, padding=1)

    def forward(self, xt, t):
        h = self.first(xt).relu()
        return self.last(h * (t / 1000).view(-1, 1, 1, 1))


class WithoutConfig(OwnNet):
    "A network that cannot be described."

    def __init__(self, **kw):
        super().__init__(**kw)
        del self.config


class WithWrongWidth(OwnNet):
    "A network whose `.config` builds another one."

    def __init__(self, width=8, **kw):
        super().__init__(width=width, **kw)
        self.config['width'] = width + 1


class WithUnknownArgument(OwnNet):
    "A network whose `.config` builds nothing."

    def __init__(self, **kw):
        super().__init__(**kw)
        self.config['depth'] = 3


class WithTensorInConfig(OwnNet):
    "A network whose `.config` cannot be stored as JSON."

    def __init__(self, **kw):
        super().__init__(**kw)
        self.config['width'] = torch.tensor(8)


def own_recipe():
    "Three steps of a DPM with a network of the user."
    return Recipe(DPM, 'digits', 14, 48, net=dict(width=4), batch=16, lr=1e-2, ema=0.5)


def test_a_network_of_the_user_trains_is_saved_and_loaded(tmp_path):
    out = tmp_path / 'own'
    model = train('own', own_recipe(), out=out, build=OwnNet, log=no_log)
    assert type(model.net) is OwnNet
    assert model.card.images_seen == 48
    assert model.card.result['test_images'] > 0
    with pytest.raises(ValueError, match=r'parts must come from pdae_nb, got test_model\.OwnNet'):
        load(out)
    for again in (load(out, network=OwnNet), load(out, trust=True)):
        assert type(again.net) is OwnNet
        assert_same_weights(again.state_dict(), copy_of_weights(model))
        assert model_fingerprint(again) == model_fingerprint(model)
    finished = train('own', own_recipe(), out=out, build=OwnNet, log=no_log)
    assert_same_weights(finished.state_dict(), copy_of_weights(model))
    model.save(tmp_path / 'copy')
    moved = load(tmp_path / 'copy', trust=True)
    assert moved.sample(2, steps=3).shape == (2, *SHAPE)


def test_a_model_on_a_network_of_the_user_is_loaded_with_it(tmp_path):
    torch.manual_seed(0)
    base = DPM(OwnNet(1, 14), SCHED, SHAPE)
    model = ScoreVAE(TimeEncoder(**SMALL, z_dim=4), base)
    model.save(tmp_path / 'scorevae', bundle=True)
    with pytest.raises(ValueError, match='parts must come from pdae_nb'):
        load(tmp_path / 'scorevae')
    for again in (
        load(tmp_path / 'scorevae', network=OwnNet),
        load(tmp_path / 'scorevae', trust=True),
    ):
        assert type(again.base.net) is OwnNet
        assert model_fingerprint(again.base) == model_fingerprint(base)


@pytest.mark.parametrize(
    'build, error, message',
    [
        (WithoutConfig, TypeError, r'WithoutConfig has no `\.config`'),
        (WithWrongWidth, ValueError, r'`\.config` of WithWrongWidth builds another network'),
        (WithUnknownArgument, ValueError, 'WithUnknownArgument cannot be built from'),
        (WithTensorInConfig, TypeError, 'not JSON serializable'),
    ],
)
def test_a_network_that_cannot_be_built_again_is_refused_before_step_1(
    build, error, message, tmp_path, monkeypatch
):
    def train_model(*args, **kw):
        pytest.fail('the training began')

    monkeypatch.setattr(hub, 'train_model', train_model)
    out = tmp_path / 'own'
    with pytest.raises(error, match=message):
        train('own', own_recipe(), out=out, build=build, log=no_log)
    assert not out.exists()


def test_the_text_of_a_model_names_networks_base_and_settings():
    lines = repr(new_pdae()).splitlines()
    assert lines[0] == "PDAE 'untrained'"
    assert lines[1].startswith('  enc: ConvEncoder, ') and lines[1].endswith(' weights')
    assert lines[2].startswith('  G: GradientEstimator, ')
    assert lines[3] == "  PDAESettings(gamma=0.1, coefficient='shift')"
    assert lines[4] == "  on DPM 'untrained', frozen"
    assert len(lines) == 5


# ---------------------------------------------------------------- the public names


@pytest.mark.parametrize('name', pdae_nb.__all__)
def test_public_names_exist(name):
    assert callable(getattr(pdae_nb, name))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A DPM and a PDAE on it, trained for two steps on digits."
    folder = tmp_path_factory.mktemp('runs')
    short = dict(data='digits', px=14, images=16, batch=8)
    net = dict(ch=8, mult=(1, 2), n_res=1, groups=8)
    dpm = train('dpm', Recipe(DPM, **short, net=net), out=folder / 'dpm', log=no_log)
    recipe = Recipe(PDAE, **short, base=dpm, encoder=dict(z_dim=4, groups=8))
    return dpm, recipe, train('pdae', recipe, out=folder / 'pdae', log=no_log)


@pytest.mark.slow
def test_evaluate_measures_a_model_on_its_data(trained):
    dpm, _, _ = trained
    numbers = pdae_nb.evaluate(dpm, n=4, steps=2, test_images=4)
    assert numbers['test_images'] == 4
    assert numbers['test_noise_mse'] > 0


def test_a_finished_run_on_another_base_of_the_same_name_is_refused(trained, tmp_path):
    dpm, recipe, pdae = trained
    again = train('pdae', recipe, out=pdae.path, log=no_log)
    assert_same_weights(again.state_dict(), copy_of_weights(pdae))
    other = copy.deepcopy(dpm)
    perturb(other.net)
    other.save(tmp_path / 'dpm')
    with pytest.raises(ValueError, match='holds a run on a base with fingerprint'):
        train('pdae', replace(recipe, base=other), out=pdae.path, log=no_log)


def test_a_name_without_recipe_is_not_advised(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run 'mnist_dmp'") as e:
        load('mnist_dmp')
    assert 'pdae train' not in str(e.value)


@pytest.mark.parametrize('seed', [0, 1, 7])
def test_noise_of_codes_and_of_images_are_different_numbers(seed):
    codes = code_noise(2, 64, seed).flatten()
    images = noise((1, 28, 28), 8, seed).flatten(1)
    for image in images:
        assert not torch.equal(image[:64], codes[:64])


@pytest.mark.parametrize('settings', [VAESettings, ScoreVAESettings])
@pytest.mark.parametrize('beta', [-1.0, float('nan')])
def test_an_impossible_weight_of_the_kl_term_is_refused(settings, beta):
    with pytest.raises(ValueError, match='beta must be at least 0'):
        settings(beta=beta)


def test_one_test_image_is_too_few():
    with pytest.raises(ValueError, match='at least 2 test samples are needed, got 1'):
        new_dpm().check_test(1)


def test_training_into_the_folder_of_a_model_without_recipe_is_refused(trained, tmp_path):
    new_dpm().save(tmp_path / 'mine')
    _, recipe, _ = trained
    with pytest.raises(ValueError, match='holds a model without a recipe'):
        train('mine', recipe, out=tmp_path / 'mine', log=no_log)


def test_codes_are_not_images():
    latent = new_latent(new_pdae())
    with pytest.raises(ValueError, match='LatentDPM is a model of .*, not of images'):
        pdae_nb.images(torch.zeros(1, 1, 14, 14), latent)


def short_pdae_recipe(base):
    "A PDAE on a DPM, two steps."
    encoder = dict(z_dim=4, groups=8)
    return Recipe(PDAE, 'digits', 14, images=16, base=base, encoder=encoder, batch=8)


def test_a_refused_base_does_not_replace_the_base_of_a_run(tmp_path):
    "Both bases have no folder: the first one is kept in the folder of the run."
    first, second = new_dpm(), new_dpm(seed=5)
    out = tmp_path / 'run'
    train('run', short_pdae_recipe(first), out=out, log=no_log)
    (out / 'run.json').unlink()  # as if the training had been killed before its end
    with pytest.raises(ValueError, match='holds a run on a base with fingerprint'):
        train('run', short_pdae_recipe(second), out=out, log=no_log)
    assert model_fingerprint(load(out / 'base')) == model_fingerprint(first)


def test_a_base_whose_folder_was_deleted_is_stored_with_the_run(tmp_path):
    base = new_dpm()
    base.save(tmp_path / 'base')
    shutil.rmtree(tmp_path / 'base')
    model = train('run', short_pdae_recipe(base), out=tmp_path / 'run', log=no_log)
    assert model_fingerprint(load(model.path).base) == model_fingerprint(base)
    base.path = tmp_path / 'base'  # deleted: a saved model, too, holds the base then
    model.save(tmp_path / 'saved')
    assert model_fingerprint(load(tmp_path / 'saved').base) == model_fingerprint(base)


def test_a_run_folder_is_not_replaced_by_save(trained):
    dpm, _, _ = trained
    with pytest.raises(FileExistsError, match="holds something else than a model, e.g. '"):
        load(dpm.path).save(dpm.path)
    assert (dpm.path / 'checkpoints').is_dir()


def rewritten(folder, **changes):
    "A saved DPM with changes in `run.json`."
    new_dpm().save(folder)
    record = json.loads((folder / 'run.json').read_text())
    (folder / 'run.json').write_text(json.dumps(record | changes))
    return folder


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(shape=['a']), 'is not the shape of a sample'),
        (dict(shape=[1, 0, 14]), 'is not the shape of a sample'),
        (dict(sched='Schedule(T=7)'), r'run.json says Schedule\(T=7\)'),
        (dict(networks={}), 'does not describe a DPM'),
    ],
)
def test_a_record_that_does_not_fit_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(rewritten(tmp_path / 'model', **changes))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    new_dpm().save(tmp_path / 'model')
    file = tmp_path / 'model/net.safetensors'
    tensors, _ = read_tensors(file)
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], value)
    write_tensors(file, tensors)
    with pytest.raises(ValueError, match=f'{name} holds NaN or infinite numbers'):
        load(tmp_path / 'model')
