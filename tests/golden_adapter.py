"""The one file that maps each golden quantity to the package's present API.

When the API changes, change the imports and the functions here, and nothing else. The settings
below belong to the recording: `test_golden.py` compares them with `golden.json`.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import pdae_nb
import pdae_nb.hub
from pdae_nb.data import load_images, to_signed
from pdae_nb.denoise import denoising_loss
from pdae_nb.files import models_dirs
from pdae_nb.forward import Schedule, add_noise
from pdae_nb.gap import posterior_gap
from pdae_nb.guidance import grad_log
from pdae_nb.methods.classifier import (
    EvalClassifier,
    NoisyClassifier,
    classifier_guided,
    classifier_loss,
)
from pdae_nb.methods.diffae import DiffAE, diffae_loss
from pdae_nb.methods.dpm import DPM, ClassConditionalDPM
from pdae_nb.methods.label_pdae import LabelPDAE
from pdae_nb.methods.latent import LatentDPM, latent_loss
from pdae_nb.methods.pdae import PDAE, pdae_loss
from pdae_nb.methods.scorevae import ScoreVAE, kl_to_prior, score, scorevae_loss
from pdae_nb.methods.vae import VAE, vae_loss
from pdae_nb.model import Draw, GenerativeModel, Model
from pdae_nb.sampling import sample
from pdae_nb.solvers import em_step, heun, karras_times
from pdae_nb.weighting import w_pdae

PACKAGE_FILE = pdae_nb.__file__
PACKAGE_VERSION = pdae_nb.__version__

SETTINGS = {
    'ddim_steps': 8,
    'euler_maruyama_steps': 10,
    'heun_steps': 8,
    'code_steps': 10,
    'latent_image_steps': 5,
    'sampler_seed': 1,
    'code_seed': 0,
    'window': [300, 1000],
    'window_scale': 1.5,
    'classifier_scale': 2.0,
    'training_seed': 0,
    'training_step': 3,
    'stratified_seed': 7,
    'stratified_count': 16,
}

Inputs = dict[str, Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]
Bind = Callable[[Model, Inputs, int], Denoiser]
Losses = Callable[..., Tensor]
Quantity = Callable[[Model, Inputs], Tensor]

NEW_NAMES = {  # name of a run in the keys: its name now
    'mnist_judge': 'mnist_eval_classifier',
    'cifar16_judge': 'cifar16_eval_classifier',
}


# ---- loading


def shipped_runs() -> list[str]:
    """Return the golden names of all shipped runs that version 1 had, too.

    The models of faces came with version 2. `test_faces.py` has their values.
    """
    golden_names = {new: old for old, new in NEW_NAMES.items()}
    paths = [path for folder in models_dirs() for path in folder.glob('*/run.json')]
    names = {path.parent.name for path in paths if not path.parent.name.startswith('celeba64')}
    return sorted(golden_names.get(name, name) for name in names)


@cache
def load(name: str) -> Model:
    """Load a shipped run once and keep it."""
    return pdae_nb.hub.load(NEW_NAMES.get(name, name))


def real_images(data: str, px: int, n: int) -> tuple[Tensor, Tensor]:
    """Return the first `n` test images in [-1, 1] and their labels; needs the data set."""
    images = load_images(data, 'test', px)
    return to_signed(images.x[:n]), images.y[:n]


# ---- denoisers with their conditions bound, for the first n images


def condition(model: GenerativeModel, inputs: Inputs, n: int) -> Tensor | None:
    """Return the codes or the labels of the images, or None for an unconditional model."""
    return model.condition(inputs['x0'][:n], inputs['y'][:n])


def own_denoiser(model: GenerativeModel, inputs: Inputs, n: int) -> Denoiser:
    """Return the model's denoiser with its condition bound."""
    return model.denoiser(condition(model, inputs, n))


def window_denoiser(model: PDAE, inputs: Inputs, n: int) -> Denoiser:
    """Return the PDAE decoder with a guidance scale, inside a window of timesteps only."""
    guidance = dict(scale=SETTINGS['window_scale'], window=SETTINGS['window'])
    return model.denoiser(condition(model, inputs, n), **guidance)


def classifier_denoiser(model: NoisyClassifier, inputs: Inputs, n: int) -> Denoiser:
    """Return the denoiser of `mnist_dpm`, guided by the noisy classifier."""
    dpm = load('mnist_dpm').denoiser()
    scale = SETTINGS['classifier_scale']
    return classifier_guided(dpm, model, inputs['y'][:n], model.sched, scale=scale)


# ---- quantities of every denoiser


def noisy_images(model: Model, inputs: Inputs) -> Tensor:
    """Return one noisy image for each of the stored step timesteps."""
    n = len(inputs['step_t'])
    return add_noise(model.sched, inputs['x0'][:n], inputs['step_t'], inputs['eps'][:n])


def one_step_eps(model: GenerativeModel, inputs: Inputs) -> Tensor:
    """Return the predicted noise at the stored step timesteps."""
    t = inputs['step_t']
    return own_denoiser(model, inputs, len(t))(noisy_images(model, inputs), t)


def gap_curve(model: GenerativeModel, inputs: Inputs) -> Tensor:
    """Return the posterior gap of two images at each of the stored gap timesteps."""
    x0 = inputs['x0'][:2]
    eps = inputs['eps'][:2]
    denoiser = own_denoiser(model, inputs, 2)
    rows = []
    for t in inputs['gap_t']:
        rows.append(posterior_gap(denoiser, x0, model.sched, t.repeat(2), eps))
    return torch.stack(rows)


def inferred_x_T(model: GenerativeModel, inputs: Inputs) -> Tensor:
    """Invert the first images with DDIM."""
    n = len(inputs['x_T'])
    given = condition(model, inputs, n)
    return model.infer_xT(inputs['x0'][:n], given, steps=SETTINGS['ddim_steps'])


def reconstruction(model: GenerativeModel, inputs: Inputs) -> Tensor:
    """Decode the recorded inferred x_T with DDIM, without clipping."""
    x_T = inputs['inferred_x_T']
    given = condition(model, inputs, len(x_T))
    return model.decode(given, x_T, steps=SETTINGS['ddim_steps'], clip=None)


def samples(model: GenerativeModel, inputs: Inputs) -> Tensor:
    """Decode the stored random x_T with DDIM, clipped to [-1, 1]."""
    x_T = inputs['x_T']
    given = condition(model, inputs, len(x_T))
    return model.decode(given, x_T, steps=SETTINGS['ddim_steps'])


def guided_samples(bind: Bind, model: Model, inputs: Inputs) -> Tensor:
    """Decode the stored random x_T with a guided denoiser, clipped to [-1, 1]."""
    x_T = inputs['x_T']
    denoiser = bind(model, inputs, len(x_T))
    return sample(denoiser, x_T, model.sched, SETTINGS['ddim_steps'], clip=1.0)


# ---- losses of each image by the functions of the equations, with stored draws


def dpm_losses(model: DPM, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the denoising loss of each image."""
    return denoising_loss(model.net, x0, model.sched, reduce=None, **draws)


def class_losses(model: ClassConditionalDPM, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the denoising loss of each image, given its label."""
    return denoising_loss(partial(model.net, y=y), x0, model.sched, reduce=None, **draws)


def pdae_losses(model: PDAE, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the PDAE loss of each image."""
    return pdae_loss(model.enc, model.eps_and_score, x0, model.sched, reduce=None, **draws)


def label_pdae_losses(model: LabelPDAE, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the PDAE loss of each image, with its one-hot label as code."""
    return denoising_loss(model.denoiser(y), x0, model.sched, w_pdae, reduce=None, **draws)


def diffae_losses(model: DiffAE, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the Diff-AE loss of each image."""
    return diffae_loss(model.enc, model.net, x0, model.sched, reduce=None, **draws)


def scorevae_losses(model: ScoreVAE, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the ScoreVAE loss of each image, with weight and beta as trained."""
    beta = model.settings.kl_weight
    weight = model.settings.weight
    dpm = model.base.denoiser()
    return scorevae_loss(dpm, model.enc, x0, model.sched, beta, weight, reduce=None, **draws)


def vae_losses(model: VAE, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the beta-VAE loss of each image, with beta as trained."""
    return vae_loss(model.net, x0, model.settings.beta, reduce=None, **draws)


def classifier_losses(model: NoisyClassifier, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the cross-entropy of the noisy classifier for each image."""
    return classifier_loss(model.net, x0, y, model.sched, reduce=None, **draws)


def judge_losses(model: EvalClassifier, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the cross-entropy of the evaluation classifier for each clean image."""
    return F.cross_entropy(model.net(x0), y, reduction='none')


def code_losses(model: LatentDPM, codes: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the loss of the latent denoiser for each code."""
    return latent_loss(model.net, model.stats.norm(codes), model.sched, reduce=None, **draws)


def stored_loss(losses: Losses, names: tuple[str, ...], model: Model, inputs: Inputs) -> Tensor:
    """Return the loss of each image with the stored draws."""
    draws = {name: inputs[name] for name in names}
    return losses(model, inputs['x0'], inputs['y'], **draws)


# ---- losses of one training step, by the model's own loss


def step_draw(inputs: Inputs) -> Draw:
    """Return the random numbers of the recorded training step."""
    total = len(inputs['x0'])
    return Draw(SETTINGS['training_seed'], SETTINGS['training_step'], total)


def training_step(model: Model, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Return losses and timesteps as the trainer computes them."""
    with torch.enable_grad():
        return model.loss(inputs['x0'], inputs['y'], step_draw(inputs))


def training_step_loss(model: Model, inputs: Inputs) -> Tensor:
    """Return the loss of each image in the training step."""
    return training_step(model, inputs)[0]


def training_step_t(model: Model, inputs: Inputs) -> Tensor:
    """Return the timesteps of the training step."""
    return training_step(model, inputs)[1]


def training_step_shift(model: EvalClassifier, inputs: Inputs) -> Tensor:
    """Return the random shift, in pixels, that the trainer draws for a batch."""
    return step_draw(inputs).integers(-2, 3, (2,), per_batch=True)


# ---- codes


def codes(model: GenerativeModel, inputs: Inputs) -> Tensor:
    """Return the codes of the clean images; of a random code, its mean."""
    return model.encode(inputs['x0'])


def moments(model: ScoreVAE | VAE, inputs: Inputs, t: int) -> tuple[Tensor, Tensor]:
    """Return mean and log variance of the codes of images noised to timestep `t`."""
    x0 = inputs['x0']
    times = torch.full((len(x0),), t)
    xt = add_noise(model.sched, x0, times, inputs['eps'])
    return model.enc.moments(xt, times)


def code_means(t: int, model: ScoreVAE, inputs: Inputs) -> Tensor:
    """Return the means of the codes at timestep `t`."""
    return moments(model, inputs, t)[0]


def code_log_variances(t: int, model: ScoreVAE | VAE, inputs: Inputs) -> Tensor:
    """Return the log variances of the codes at timestep `t`."""
    return moments(model, inputs, t)[1]


def code_kl(model: ScoreVAE | VAE, inputs: Inputs) -> Tensor:
    """Return the KL divergence of each image's code from the prior."""
    return kl_to_prior(*moments(model, inputs, 0))


# ---- quantities of single methods


def pdae_pair(model: PDAE | LabelPDAE, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the frozen noise prediction and the score of PDAE from one forward pass."""
    t = inputs['step_t']
    z = model.vector(condition(model, inputs, len(t)))
    return model.eps_and_score(noisy_images(model, inputs), t, z)


def pdae_eps(model: PDAE, inputs: Inputs) -> Tensor:
    """Return the frozen noise prediction inside PDAE."""
    return pdae_pair(model, inputs)[0]


def pdae_score(model: PDAE | LabelPDAE, inputs: Inputs) -> Tensor:
    """Return the score of the gradient estimator, given the codes or the labels."""
    return pdae_pair(model, inputs)[1]


def scorevae_score(model: ScoreVAE, inputs: Inputs) -> Tensor:
    """Return the gradient of the log density of the clean images' codes."""
    t = inputs['step_t']
    z = condition(model, inputs, len(t))
    return score(model.enc, noisy_images(model, inputs), t, z)


def euler_maruyama_samples(model: ScoreVAE, inputs: Inputs) -> Tensor:
    """Decode two stored x_T by Euler-Maruyama, which the preset 'paper' uses in all steps."""
    x_T = inputs['x_T'][:2]
    z = condition(model, inputs, 2)
    torch.manual_seed(SETTINGS['sampler_seed'])
    steps = SETTINGS['euler_maruyama_steps']
    return model.decode(z, x_T, steps=steps, solver=em_step, clip=None)


def heun_samples(model: ScoreVAE, inputs: Inputs) -> Tensor:
    """Decode two stored x_T by Heun's method, which the preset 'release' uses."""
    times = karras_times(model.sched, SETTINGS['heun_steps'])
    denoiser = heun(own_denoiser(model, inputs, 2), model.sched, times)
    return sample(denoiser, inputs['x_T'][:2], model.sched, times)


def vae_reconstruction(model: VAE, inputs: Inputs) -> Tensor:
    """Return the decoded mean codes of the first images."""
    return model.reconstruct(inputs['x0'][: len(inputs['x_T'])])


def vae_decoded_codes(model: VAE, inputs: Inputs) -> Tensor:
    """Return the decoded code noise, as codes of the prior."""
    return model.decode(inputs['xi'][: len(inputs['x_T'])])


def classifier_logits(model: NoisyClassifier, inputs: Inputs) -> Tensor:
    """Return the logits of the noisy classifier at the stored step timesteps."""
    return model.net(noisy_images(model, inputs), inputs['step_t'])


def classifier_score(model: NoisyClassifier, inputs: Inputs) -> Tensor:
    """Return the gradient of log p(y|x_t) of the noisy classifier."""
    t = inputs['step_t']
    log_p = partial(model.log_p, t=t, y=inputs['y'][: len(t)])
    return grad_log(log_p, noisy_images(model, inputs))


def judge_logits(model: EvalClassifier, inputs: Inputs) -> Tensor:
    """Return the logits of the evaluation classifier for the clean images."""
    return model.net(inputs['x0'])


def stratified_t(model: None, inputs: Inputs) -> Tensor:
    """Return stratified random timesteps after a fixed seed."""
    torch.manual_seed(SETTINGS['stratified_seed'])
    return Schedule.linear().rand_t(SETTINGS['stratified_count'])


# ---- latent runs; their inputs 'codes' are codes of the base run, not normalised


def latent_eps(model: LatentDPM, inputs: Inputs) -> Tensor:
    """Return the predicted noise in normalised codes at the stored step timesteps."""
    t = inputs['step_t']
    clean = model.stats.norm(inputs['codes'][: len(t)])
    return model.denoiser()(add_noise(model.sched, clean, t, inputs['xi'][: len(t)]), t)


def latent_stored_loss(model: LatentDPM, inputs: Inputs) -> Tensor:
    """Return the loss of each code with the stored timesteps and noise."""
    return code_losses(model, inputs['codes'], inputs['y'], t=inputs['t'], eps=inputs['xi'])


def latent_training_step_loss(model: LatentDPM, inputs: Inputs) -> Tensor:
    """Return the loss of each normalised code in the training step."""
    return training_step_loss(model, normalised(model, inputs))


def latent_training_step_t(model: LatentDPM, inputs: Inputs) -> Tensor:
    """Return the timesteps of the codes in the training step."""
    return training_step_t(model, normalised(model, inputs))


def normalised(model: LatentDPM, inputs: Inputs) -> Inputs:
    """Return the inputs with the normalised codes as clean data."""
    return inputs | {'x0': model.stats.norm(inputs['codes'])}


def sampled_codes(model: LatentDPM, inputs: Inputs) -> Tensor:
    """Return new codes from a fixed seed."""
    n = len(inputs['x_T'])
    return model.codes(n, SETTINGS['code_seed'], SETTINGS['code_steps'])


def latent_samples(model: LatentDPM, inputs: Inputs) -> Tensor:
    """Return new images: new codes, decoded by the base from the stored x_T."""
    base = model.base
    denoiser = base.prior_denoiser(sampled_codes(model, inputs))
    steps = SETTINGS['latent_image_steps']
    return sample(denoiser, inputs['x_T'], base.sched, steps, clip=1.0)


# ---- the table: run -> quantity -> function of the run and its stored inputs


DECODER_TABLE: dict[str, Quantity] = {
    'gap': gap_curve,
    'x_T': inferred_x_T,
    'reconstruction': reconstruction,
    'samples': samples,
}


def loss_table(losses: Losses, names: tuple[str, ...] = ('t', 'eps')) -> dict[str, Quantity]:
    """Return the loss with stored draws, and the losses and timesteps of one training step."""
    return {
        'loss': partial(stored_loss, losses, names),
        'training_step_loss': training_step_loss,
        'training_step_t': training_step_t,
    }


DENOISER_TABLE = {'eps': one_step_eps, **loss_table(dpm_losses), **DECODER_TABLE}

CLASS_DENOISER_TABLE = {'eps': one_step_eps, **loss_table(class_losses), **DECODER_TABLE}

PDAE_TABLE = {
    'codes': codes,
    'eps': pdae_eps,
    'score': pdae_score,
    'decoder_eps': one_step_eps,
    **loss_table(pdae_losses),
    **DECODER_TABLE,
    'window_samples': partial(guided_samples, window_denoiser),
}

LABEL_PDAE_TABLE = {
    'score': pdae_score,
    'decoder_eps': one_step_eps,
    **loss_table(label_pdae_losses),
    'gap': gap_curve,
    'samples': samples,
}

DIFFAE_TABLE = {
    'codes': codes,
    'eps': one_step_eps,
    **loss_table(diffae_losses),
    **DECODER_TABLE,
}

RANDOM_CODE_TABLE = {
    'codes': codes,
    'log_variances': partial(code_log_variances, 0),
    'kl': code_kl,
}

SCOREVAE_TABLE = {
    **RANDOM_CODE_TABLE,
    'means_500': partial(code_means, 500),
    'log_variances_500': partial(code_log_variances, 500),
    'score': scorevae_score,
    'decoder_eps': one_step_eps,
    **loss_table(scorevae_losses, ('t', 'eps', 'xi')),
    **DECODER_TABLE,
    'euler_maruyama_samples': euler_maruyama_samples,
    'heun_samples': heun_samples,
}

VAE_TABLE = {
    **RANDOM_CODE_TABLE,
    'loss': partial(stored_loss, vae_losses, ('xi',)),
    'training_step_loss': training_step_loss,
    'reconstruction': vae_reconstruction,
    'decoded_codes': vae_decoded_codes,
}

CLASSIFIER_TABLE = {
    'logits': classifier_logits,
    'score': classifier_score,
    **loss_table(classifier_losses),
    'guided_samples': partial(guided_samples, classifier_denoiser),
}

JUDGE_TABLE = {
    'logits': judge_logits,
    'loss': partial(stored_loss, judge_losses, ()),
    'training_step_loss': training_step_loss,
    'training_step_shift': training_step_shift,
}

LATENT_TABLE = {
    'eps': latent_eps,
    'loss': latent_stored_loss,
    'training_step_loss': latent_training_step_loss,
    'training_step_t': latent_training_step_t,
    'sampled_codes': sampled_codes,
    'samples': latent_samples,
}

QUANTITIES: dict[str, dict[str, Quantity]] = {
    'noise_schedule': {'stratified_t': stratified_t},
    'mnist_dpm': DENOISER_TABLE,
    'cifar16_dpm': DENOISER_TABLE,
    'mnist_cdpm': CLASS_DENOISER_TABLE,
    'mnist_pdae': PDAE_TABLE,
    'mnist_label_pdae': LABEL_PDAE_TABLE,
    'mnist_diffae': DIFFAE_TABLE,
    'mnist_scorevae': SCOREVAE_TABLE,
    'mnist_paper_scorevae': SCOREVAE_TABLE,
    'cifar16_paper_scorevae': SCOREVAE_TABLE,
    'mnist_vae': VAE_TABLE,
    'cifar16_vae': VAE_TABLE,
    'mnist_classifier': CLASSIFIER_TABLE,
    'mnist_judge': JUDGE_TABLE,
    'cifar16_judge': JUDGE_TABLE,
    'mnist_pdae_latent': LATENT_TABLE,
    'mnist_diffae_latent': LATENT_TABLE,
}

LATENT_BASES = {
    'mnist_pdae_latent': 'mnist_pdae',
    'mnist_diffae_latent': 'mnist_diffae',
}

WITHOUT_RUN = ('noise_schedule',)


def compute(run: str, quantity: str, inputs: Inputs) -> Tensor:
    """Compute one golden quantity; the global random state stays as it was."""
    loaded = None if run in WITHOUT_RUN else load(run)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        value = QUANTITIES[run][quantity](loaded, inputs)
    return value.detach().contiguous()


def release() -> None:
    """Forget all loaded runs."""
    load.cache_clear()
