"""Runs that start from another run: geometry, prediction type, noise schedule, and refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pdae_nb import cli, hub
from pdae_nb.adapters import DiffusersDPM
from pdae_nb.data import Images, load_images
from pdae_nb.files import write_tensors
from pdae_nb.forward import Schedule
from pdae_nb.hub import load, train
from pdae_nb.methods.classifier import EvalClassifier, NoisyClassifier
from pdae_nb.methods.diffae import DiffAE
from pdae_nb.methods.dpm import DPM, ClassConditionalDPM, DPMSettings
from pdae_nb.methods.label_pdae import LabelPDAE
from pdae_nb.methods.latent import LatentDPM
from pdae_nb.methods.pdae import PDAE, PDAESettings
from pdae_nb.methods.scorevae import ConditionalDecoder, ScoreVAE
from pdae_nb.methods.vae import VAE
from pdae_nb.model import spec_of
from pdae_nb.recipes import recipe as named_recipe
from pdae_nb.training import Recipe
from pdae_nb.unet import UNet

SHAPE = (1, 14, 14)
NET = dict(ch=8, mult=(1, 2), n_res=1, groups=8)  # of the rows
OTHER = dict(ch=4, mult=(1, 3), n_res=2, groups=2, attn=(7,), drop=0.1)  # of the parents
SHORT = dict(data='digits', px=14, images=48, batch=16, lr=2e-3, ema=0.5)
V = DPMSettings('v')
ROW = Recipe(DPM, **SHORT, net=NET)


def no_log(message):
    "A log function that drops its message."


def digits14():
    return load_images('digits', 'train', 14)


def with_random_weights(model):
    for p in model.parameters():
        p.data = (p.data + 0.1 * torch.randn_like(p)).half().float()
    return model


def built(recipe, base=None, images=None):
    "An untrained model with random weights, none of them zero."
    torch.manual_seed(0)
    return with_random_weights(recipe.method.build(recipe, images or digits14(), base)).eval()


def dpm_of(net, settings=None, sched=None):
    model = built(replace(ROW, net=net, settings=settings))
    model.sched = sched or model.sched
    return model


@pytest.fixture(scope='module')
def parents(tmp_path_factory):
    "Folders of DPMs of another geometry than the row's, which predict eps and v."
    folder = tmp_path_factory.mktemp('parents')
    dpm_of(OTHER).save(folder / 'eps')
    dpm_of(OTHER, V).save(folder / 'v')
    return folder


@pytest.fixture
def starts(monkeypatch):
    "The (model, recipe) of each training, which is not carried out."
    found = []

    def train_model(model, recipe, *args, **options):
        found.append((model, recipe))
        return model

    monkeypatch.setattr(hub, 'train_model', train_model)
    return found


def assert_same_networks(model, parent):
    for (name, ours), (_, theirs) in zip(
        model.named_children(), parent.named_children(), strict=True
    ):
        described = [json.loads(json.dumps(spec_of(network, name))) for network in (ours, theirs)]
        assert described[0] == described[1]
    for a, b in zip(model.state_dict().values(), parent.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def recipe_of(stored):
    "A recipe as `run.json` holds it."
    fields = dict(stored)
    del fields['method'], fields['base'], fields['init']
    settings = fields['settings']
    return Recipe(
        DPM, **fields | dict(settings=None if settings is None else DPMSettings(**settings))
    )


# Geometry


def test_the_geometry_is_that_of_the_parent(parents, tmp_path):
    lines = []
    out = tmp_path / 'run'
    model = train('run', ROW, out=out, init=parents / 'eps', log=lines.append)
    about = f'{parents / "eps"} gives the initial weights and the arguments of the networks'
    assert f'{about}; the network predicts eps, as there' in lines
    stored = load(out).card.recipe
    assert {k: stored['net'][k] for k in OTHER} == json.loads(json.dumps(OTHER))
    assert stored['init'] == str(parents / 'eps')
    assert stored['lr'] == ROW.lr
    again = DPM.build(recipe_of(stored), digits14())
    assert spec_of(again.net, 'net') == spec_of(model.net, 'net')


def kinds():
    encoder = dict(z_dim=3, groups=4, heads=2)
    time = dict(z_dim=3, **OTHER)
    narrow = dict(z_dim=3, ch=4, mult=(1, 2, 2), groups=4)
    return dict(
        dpm=(DPM, dict(net=OTHER), dict(net=NET)),
        cdpm=(ClassConditionalDPM, dict(net=OTHER | dict(lag=1)), dict(net=NET)),
        pdae=(
            PDAE,
            dict(net=dict(drop=0.3), encoder=encoder),
            dict(encoder=dict(z_dim=8, groups=8)),
        ),
        label_pdae=(LabelPDAE, dict(net=dict(drop=0.3)), {}),
        scorevae=(ScoreVAE, dict(encoder=time), dict(encoder=dict(z_dim=8, **NET))),
        diffae=(
            DiffAE,
            dict(net=OTHER, encoder=narrow),
            dict(net=NET, encoder=dict(z_dim=4, mult=(1, 2, 2))),
        ),
        conditional=(
            ConditionalDecoder,
            dict(net=OTHER, encoder=time),
            dict(net=NET, encoder=dict(z_dim=8, **NET)),
        ),
        vae=(VAE, dict(net=time), dict(net=dict(z_dim=8, **NET))),
        classifier=(NoisyClassifier, dict(net=OTHER), dict(net=NET)),
        eval_classifier=(EvalClassifier, dict(net=dict(ch=4)), dict(net=dict(ch=8))),
        latent=(LatentDPM, dict(net=dict(hidden=8, layers=4)), dict(net=dict(hidden=16, layers=2))),
    )


@pytest.mark.parametrize('kind', kinds())
def test_every_method_takes_the_geometry_of_its_parent(kind, starts, tmp_path):
    method, of_parent, of_row = kinds()[kind]
    base = None
    if method in (PDAE, LabelPDAE, ScoreVAE):
        base = dpm_of(OTHER)
        base.save(tmp_path / 'base')
    if method is LatentDPM:
        base = built(Recipe(VAE, **SHORT, net=dict(z_dim=5, **NET)))
        base.save(tmp_path / 'base')
    parent = built(Recipe(method, **SHORT, **of_parent), base)
    parent.save(tmp_path / 'parent')
    row = Recipe(method, **SHORT, **of_row, base=base)
    train('run', row, out=tmp_path / 'run', init=tmp_path / 'parent', log=no_log)
    ((model, recipe),) = starts
    assert_same_networks(model, load(tmp_path / 'parent'))
    again = method.build(recipe, digits14(), base)
    assert_shapes_equal(again, parent)


def assert_shapes_equal(a, b):
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (a, b)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_networks_of_diffusers_take_the_geometry_of_their_parent(starts, tmp_path):
    from pdae_nb.recipes import RECIPES

    row = RECIPES['mnist_diffusers_dpm', 'smoke']
    wider = row.net | dict(block_out_channels=(16, 32), norm_num_groups=4)
    parent = built(replace(row, net=wider), images=load_images('digits', 'train', 28))
    assert isinstance(parent, DiffusersDPM)
    parent.save(tmp_path / 'parent')
    train('run', row, out=tmp_path / 'run', init=tmp_path / 'parent', log=no_log)
    ((model, _),) = starts
    assert_same_networks(model, parent)


def test_an_encoder_with_other_groups_than_the_u_net_stays_as_it_is(starts, tmp_path):
    images = digits14()
    parent = built(
        Recipe(DiffAE, **SHORT, net=NET, encoder=dict(z_dim=4, mult=(1, 2, 2), groups=4))
    )
    del parent.enc.config['groups']  # a network of 32 groups does not state their number
    parent.enc = type(parent.enc)(**parent.enc.config)
    with_random_weights(parent).save(tmp_path / 'parent')
    row = Recipe(DiffAE, **SHORT, net=NET, encoder=dict(z_dim=4, mult=(1, 2, 2)))
    train('run', row, out=tmp_path / 'run', init=tmp_path / 'parent', log=no_log)
    ((model, _),) = starts
    x0 = images.x[:2].float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(model.enc(x0), parent.enc(x0), rtol=1e-4, atol=1e-5)


# Prediction type


@pytest.mark.parametrize('parent', ['eps', 'v'])
@pytest.mark.parametrize('row', [None, V])
@pytest.mark.parametrize('named', [None, 'eps', 'v'])
def test_the_prediction_type(parent, row, named, starts, request):
    "It is that of the parent, if the call names no other one."
    parents = request.getfixturevalue('parents')
    out = request.getfixturevalue('tmp_path') / 'run'
    wanted = named or parent
    lines = []
    options = dict(init=parents / parent, predicts=named, log=lines.append)
    train('run', replace(ROW, settings=row), out=out, **options)
    ((model, used),) = starts
    assert model.predicts == wanted
    assert used.settings == (V if wanted == 'v' else None)
    end = 'as there' if wanted == parent else f'there it predicts {parent}'
    assert lines[0].endswith(f'the network predicts {wanted}, {end}')


@pytest.mark.parametrize('named', [None, 'eps', 'v'])
def test_the_prediction_type_of_a_diffae(named, starts, tmp_path):
    recipe = Recipe(DiffAE, **SHORT, net=OTHER, encoder=dict(z_dim=3, mult=(1, 2, 2)))
    built(recipe).save(tmp_path / 'parent')
    recipe = replace(recipe, settings=V)
    train('run', recipe, out=tmp_path / 'run', init=tmp_path / 'parent', predicts=named, log=no_log)
    assert starts[0][0].predicts == (named or 'eps')


def test_a_prediction_type_without_parent(starts, tmp_path):
    for settings, named, wanted in ((None, 'v', V), (V, 'eps', None), (V, None, V)):
        recipe = replace(ROW, settings=settings)
        train('run', recipe, out=tmp_path / 'run', predicts=named, log=no_log)
        assert starts.pop()[1].settings == wanted


@pytest.mark.parametrize('method', [PDAE, EvalClassifier, LatentDPM])
def test_a_prediction_type_of_another_method_is_refused(method, tmp_path):
    recipe = Recipe(method, **SHORT)
    with pytest.raises(ValueError, match=f'{method.__name__} has no prediction type to choose'):
        train('run', recipe, out=tmp_path / 'run', predicts='v', log=no_log)
    assert not (tmp_path / 'run').exists()


# The same command again


class Interrupted(Exception):
    "Raised in the middle of a training."


def interrupt(seen, model):
    raise Interrupted


@pytest.mark.parametrize('named', [None, 'v'])
def test_the_same_call_resumes_bit_for_bit(named, parents, tmp_path):
    shutil.copytree(parents / 'eps', tmp_path / 'parent')
    options = dict(init=tmp_path / 'parent', predicts=named)
    recipe = replace(ROW, settings=V)
    whole = train('run', recipe, out=tmp_path / 'whole', log=no_log, **options)
    out = tmp_path / 'run'
    with pytest.raises(Interrupted):
        train('run', recipe, out=out, every=1, look=interrupt, log=no_log, **options)
    lines = []
    resumed = train('run', recipe, out=out, log=lines.append, **options)
    assert 'going on at step 1 of 3' in lines
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.card.recipe == whole.card.recipe
    assert load(out).predicts == (named or 'eps')
    shutil.rmtree(tmp_path / 'parent')  # a finished run does not need it
    lines = []
    train('run', recipe, out=out, log=lines.append, **options)
    assert lines == [f'{out} is finished']
    other = 'eps' if named == 'v' else 'v'
    with pytest.raises(ValueError, match='another recipe: settings'):
        train('run', recipe, out=out, log=no_log, init=tmp_path / 'parent', predicts=other)


def test_a_run_without_result_keeps_the_noise_schedule(tmp_path):
    dpm_of(OTHER, sched=Schedule.cosine(250)).save(tmp_path / 'parent')
    out = tmp_path / 'run'
    first = train('run', ROW, out=out, init=tmp_path / 'parent', log=no_log)
    record = json.loads((out / 'run.json').read_text('utf-8'))
    (out / 'run.json').write_text(json.dumps(record | dict(result=None)), 'utf-8')
    again = train('run', ROW, out=out, init=tmp_path / 'parent', log=no_log)
    assert repr(again.sched) == repr(first.sched) == repr(Schedule.cosine(250))
    assert again.card.result == first.card.result


# Parents without a recipe


def test_a_converted_parent_keeps_its_lag_and_its_noise_schedule(starts, tmp_path):
    parent = dpm_of(OTHER | dict(lag=1, heads=2), sched=Schedule.cosine(250))
    assert parent.card.recipe is None
    parent.save(tmp_path / 'parent')
    train('run', ROW, out=tmp_path / 'run', init=tmp_path / 'parent', log=no_log)
    ((model, recipe),) = starts
    assert_same_networks(model, parent)
    assert recipe.net['lag'] == 1
    assert repr(model.sched) == repr(Schedule.cosine(250))


def version_1(folder, predict=None):
    "A DPM as version 1 stored it, without a recipe."
    folder.mkdir()
    torch.manual_seed(0)
    net = with_random_weights(UNet(c=1, size=14, **OTHER))
    write_tensors(folder / 'dpm.safetensors', net.state_dict())
    write_tensors(folder / 'sched.safetensors', dict(beta=Schedule.linear().beta))
    part = dict(module='pdae_nb.unet', kind='UNet', config=net.config)
    record = dict(name=folder.name, parts=dict(dpm=part))
    if predict is not None:
        record['predict'] = predict
    (folder / 'run.json').write_text(json.dumps(record), 'utf-8')
    return net


@pytest.mark.parametrize('predict, wanted', [(None, 'eps'), ('v', 'v')])
def test_a_parent_of_version_1(predict, wanted, starts, tmp_path):
    net = version_1(tmp_path / 'old', predict)
    assert load(tmp_path / 'old').predicts == wanted
    train('run', ROW, out=tmp_path / 'run', init=tmp_path / 'old', log=no_log)
    ((model, _),) = starts
    assert model.predicts == wanted
    for a, b in zip(model.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)


# Refusals, before the first step


def test_a_parent_of_another_class_is_refused(parents, tmp_path):
    recipe = Recipe(ClassConditionalDPM, **SHORT, net=NET)
    with pytest.raises(ValueError, match='must be those of a ClassConditionalDPM, .* is a DPM'):
        train('run', recipe, out=tmp_path / 'run', init=parents / 'eps', log=no_log)
    assert not (tmp_path / 'run').exists()


def test_a_parent_of_other_images_is_refused(parents, tmp_path):
    recipe = replace(ROW, px=28)
    wanted = r'images of shape \(1, 14, 14\), those of digits have the shape \(1, 28, 28\)'
    with pytest.raises(ValueError, match=wanted):
        train('run', recipe, out=tmp_path / 'run', init=parents / 'eps', log=no_log)
    colour = DPM(UNet(c=3, size=14, **NET), Schedule.linear(), (3, 14, 14))
    colour.save(tmp_path / 'colour')
    with pytest.raises(ValueError, match=r'images of shape \(3, 14, 14\)'):
        train('run', ROW, out=tmp_path / 'run', init=tmp_path / 'colour', log=no_log)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'method', [ClassConditionalDPM, NoisyClassifier, EvalClassifier, LabelPDAE]
)
def test_a_parent_of_other_classes_is_refused(method, tmp_path):
    images = digits14()
    few = Images(images.x, images.y % 5, images.classes[:5])
    net = dict(ch=8) if method is EvalClassifier else NET
    base = dpm_of(NET) if method is LabelPDAE else None
    recipe = Recipe(method, **SHORT, net={} if base else net, base=base)
    if base:
        base.save(tmp_path / 'base')
    built(recipe, base, few).save(tmp_path / 'parent')
    with pytest.raises(ValueError, match='has 5 classes, digits has 10'):
        train('run', recipe, out=tmp_path / 'run', init=tmp_path / 'parent', log=no_log)
    assert not (tmp_path / 'run').exists()


@pytest.fixture
def pdae(parents, tmp_path):
    "Folder of a PDAE on the DPM that predicts eps."
    recipe = Recipe(PDAE, **SHORT, encoder=dict(z_dim=4, groups=8))
    built(recipe, load(parents / 'eps')).save(tmp_path / 'pdae')
    return tmp_path / 'pdae'


PDAE_ROW = Recipe(PDAE, **SHORT, encoder=dict(z_dim=4, groups=8))


def test_a_pdae_may_start_from_one_on_a_base_of_its_geometry(pdae, parents, starts, tmp_path):
    row = replace(PDAE_ROW, base=str(parents / 'v'))
    train('run', row, out=tmp_path / 'run', init=pdae, log=no_log)
    ((model, _),) = starts
    assert_same_networks(model, load(pdae))
    assert model.base.predicts == 'v'


@pytest.mark.parametrize('change', [dict(ch=8), dict(lag=1), dict(attn=())])
def test_a_pdae_on_a_base_of_another_geometry_is_refused(change, pdae, tmp_path):
    dpm_of(OTHER | change).save(tmp_path / 'base')
    row = replace(PDAE_ROW, base=str(tmp_path / 'base'))
    (name,) = change
    with pytest.raises(ValueError, match=f'fits only a base with the geometry .* net.{name} '):
        train('run', row, out=tmp_path / 'run', init=pdae, log=no_log)
    assert not (tmp_path / 'run').exists()


def test_a_base_with_another_noise_schedule_is_refused(pdae, tmp_path):
    dpm_of(OTHER, sched=Schedule.cosine(1000)).save(tmp_path / 'base')
    row = replace(PDAE_ROW, base=str(tmp_path / 'base'))
    with pytest.raises(ValueError, match='was trained with the noise schedule'):
        train('run', row, out=tmp_path / 'run', init=pdae, log=no_log)
    assert not (tmp_path / 'run').exists()


# The command


def test_the_command_names_parent_and_prediction_type(tmp_path, capsys):
    torch.manual_seed(0)
    net = with_random_weights(UNet(c=1, size=28, **OTHER))
    DPM(net, Schedule.linear(), (1, 28, 28)).save(tmp_path / 'parent')
    words = ['train', 'mnist_dpm', '--size', 'smoke', '--steps', '2']
    words += ['--init', str(tmp_path / 'parent'), '--out', str(tmp_path / 'run')]
    assert cli.main([*words, '--predicts', 'v']) == 0
    model = load(tmp_path / 'run')
    assert model.predicts == 'v'
    assert list(model.net.config['mult']) == [1, 3]
    said = capsys.readouterr().out
    assert cli.main([*words, '--predicts', 'v']) == 0
    assert capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1]
    assert cli.main([*words, '--predicts', 'eps']) == 1
    assert 'another recipe: settings' in capsys.readouterr().err


@pytest.mark.parametrize(
    'words, message',
    [
        ('mnist_pdae --predicts v', 'PDAE has no prediction type'),
        ('mnist_dpm --predicts x0', "must be 'eps' or 'v', got 'x0'"),
    ],
)
def test_a_wrong_prediction_type_is_an_error_of_the_command(words, message, tmp_path, capsys):
    out = str(tmp_path / 'run')
    assert cli.main(['train', *words.split(), '--size', 'smoke', '--out', out]) == 1
    assert message in capsys.readouterr().err


class OwnNet(UNet):
    "A network of a user: its class is not of the package."


def test_a_users_own_network_takes_the_geometry_of_its_parent(starts, tmp_path):
    parent = DPM(with_random_weights(OwnNet(c=1, size=14, **OTHER)), Schedule.linear(), SHAPE)
    parent.save(tmp_path / 'parent')
    options = dict(out=tmp_path / 'run', init=tmp_path / 'parent', log=no_log)
    train('run', ROW, build=OwnNet, **options)
    ((model, _),) = starts
    assert_same_networks(model, parent)
    with pytest.raises(ValueError, match=r'parts must come from pdae_nb, got .*OwnNet'):
        train('run', ROW, **options)


# What else a parent decides


def latent_row(base, seed=0):
    return Recipe(
        LatentDPM, 'digits', 28, 64, base=base, net=dict(hidden=16, layers=3), batch=16, seed=seed
    )


@pytest.fixture(scope='module')
def autoencoders(tmp_path_factory):
    "Two PDAEs of the same widths with other weights."
    folder = tmp_path_factory.mktemp('autoencoders')
    for seed in (0, 1):
        row = replace(named_recipe('mnist_pdae', 'smoke'), images=32, seed=seed)
        train(f'ae{seed}', row, out=folder / f'ae{seed}', log=no_log)
    return folder


def test_a_latent_dpm_keeps_the_statistics_of_its_own_base(autoencoders, tmp_path):
    parent = tmp_path / 'parent'
    train('parent', latent_row(autoencoders / 'ae0'), out=parent, log=no_log)
    lines = []
    row = latent_row(autoencoders / 'ae1')
    child = train('child', row, out=tmp_path / 'child', init=parent, log=lines.append)
    alone = train('alone', row, out=tmp_path / 'alone', log=no_log)
    torch.testing.assert_close(child.stats.mean, alone.stats.mean)
    torch.testing.assert_close(child.stats.std, alone.stats.std)
    about = next(line for line in lines if 'gives the initial weights' in line)
    assert 'the base is ae1' in about and 'there ae0' in about


def test_an_interrupted_run_refuses_another_parent_of_its_name(tmp_path):
    "The schedule and the initial weights come from the parent, so it must be the same one."
    parent = tmp_path / 'parent'
    model = DPM.build(ROW, load_images(ROW.data, 'train', ROW.px))
    model.save(parent)
    options = dict(init=parent, every=1, log=no_log)
    with pytest.raises(Interrupted):
        train('run', ROW, out=tmp_path / 'run', look=interrupt, **options)
    other = DPM(model.net, Schedule.linear(500), model.shape, model.settings)
    other.save(parent)
    with pytest.raises(ValueError, match='began with the weights of a run'):
        train('run', ROW, out=tmp_path / 'run', **options)
    model.save(parent)
    train('run', ROW, out=tmp_path / 'run', **options)


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'begins with the weights of .*gone.*\(init\)'):
        train('run', ROW, out=tmp_path / 'run', init=tmp_path / 'gone', log=no_log)


def test_the_coefficient_comes_from_the_parent_and_other_settings_are_named(tmp_path):
    row = replace(named_recipe('mnist_pdae', 'smoke'), images=32)
    settings = PDAESettings(gamma=0.5, coefficient='score')
    parent = tmp_path / 'parent'
    train('parent', replace(row, settings=settings), out=parent, log=no_log)
    lines = []
    child = train('child', row, out=tmp_path / 'child', init=parent, log=lines.append)
    assert child.settings == PDAESettings(gamma=0.1, coefficient='score')
    assert any('gamma is 0.1, there 0.5' in line for line in lines)
    assert train('child', row, out=tmp_path / 'child', init=parent, log=no_log).path == child.path


@pytest.mark.parametrize('init', ['', '/', '.'])
def test_a_parent_without_a_name_is_refused(init, tmp_path):
    with pytest.raises(ValueError, match='init must name a run'):
        train('run', ROW, out=tmp_path / 'run', init=init, log=no_log)


def test_a_parent_may_be_a_path_in_any_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    DPM.build(ROW, load_images(ROW.data, 'train', ROW.px)).save('parent')
    row = replace(ROW, init=Path('parent'))
    first = train('run', row, out='run', log=no_log)
    assert first.card.recipe['init'] == 'parent'
    assert (
        train('run', ROW, out='run', init='./parent/', log=no_log).card.recipe == first.card.recipe
    )


def test_a_name_that_cannot_be_stored_is_refused_before_the_training(tmp_path):
    with pytest.raises(ValueError, match='no UTF-8'):
        train('run', ROW, out=tmp_path / 'run', init='p\udce4', log=no_log)


def test_weights_of_a_parent_that_cannot_be_stored_are_refused_first(tmp_path):
    model = DPM.build(ROW, load_images(ROW.data, 'train', ROW.px))
    model.net.time[0].bias.data[0] = 7e4
    model.save(tmp_path / 'big', dtype=torch.float32)
    with pytest.raises(ValueError, match='too much for torch.float16'):
        train('run', ROW, out=tmp_path / 'run', init=tmp_path / 'big', log=no_log)
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_an_unknown_precision_is_refused_for_a_finished_run_too(tmp_path):
    train('run', ROW, out=tmp_path / 'run', log=no_log)
    with pytest.raises(ValueError, match='auto, bf16 or float32'):
        train('run', ROW, out=tmp_path / 'run', precision='fp16', log=no_log)


def test_an_empty_prediction_type_is_refused(parents, tmp_path):
    with pytest.raises(ValueError, match='predicts must be'):
        train('run', ROW, out=tmp_path / 'run', init=parents / 'eps', predicts='', log=no_log)


def test_a_diffae_of_version_1_that_predicts_v(tmp_path):
    model = load('mnist_diffae')
    folder = tmp_path / 'old'
    folder.mkdir()
    networks = dict(enc=model.enc, unet=model.net)
    for name, network in networks.items():
        write_tensors(folder / f'{name}.safetensors', network.state_dict())
    write_tensors(folder / 'sched.safetensors', dict(beta=model.sched.beta))
    record = dict(name='old', parts={k: spec_of(v, k) for k, v in networks.items()}, predict='v')
    (folder / 'run.json').write_text(json.dumps(record))
    assert load(folder).predicts == 'v'
    (folder / 'run.json').write_text(json.dumps(record | dict(predict='V')))
    with pytest.raises(ValueError, match="old/run.json: predict must be 'eps' or 'v', got 'V'"):
        load(folder)
