"""The one file that maps each golden quantity to the package's present API.

When the API changes, change the imports and the functions here, and nothing else. The settings
below belong to the recording: `test_golden.py` compares them with `golden.json`.
"""

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import pdae_nb
from pdae_nb.data import load_images, to_signed
from pdae_nb.denoise import denoising_loss
from pdae_nb.methods.diffae import diffae_loss
from pdae_nb.model import load_run
from pdae_nb.files import models_dir
from pdae_nb.forward import Schedule, add_noise
from pdae_nb.gap import posterior_gap
from pdae_nb.methods.classifier import classifier_guided, classifier_loss
from pdae_nb.guidance import grad_log
from pdae_nb.edit import draw
from pdae_nb.methods.latent import latent_loss, sample_z
from pdae_nb.hub import decode
from pdae_nb.methods.pdae import pdae_denoiser, pdae_loss
from pdae_nb.solvers import em_step, heun, karras_times
from pdae_nb.sampling import invert, sample
from pdae_nb.methods.scorevae import PRESETS, kl_to_prior, score, scorevae_loss
from pdae_nb.methods.vae import vae_loss
from pdae_nb.training import _seed as seed_training_step
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

Run = SimpleNamespace
Inputs = dict[str, Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]
Bind = Callable[[Run, Inputs, int], Denoiser]
Losses = Callable[..., Tensor]
Quantity = Callable[[Run, Inputs], Tensor]


# ---- loading


def shipped_runs() -> list[str]:
    """Return the names of all runs that are shipped with the package."""
    return sorted(path.parent.name for path in models_dir().glob('*/run.json'))


@cache
def load(name: str) -> Run:
    """Load a shipped run once and keep it."""
    return load_run(name)


def real_images(data: str, px: int, n: int) -> tuple[Tensor, Tensor]:
    """Return the first `n` test images in [-1, 1] and their labels; needs the data set."""
    images = load_images(data, 'test', px)
    return to_signed(images.x[:n]), images.y[:n]


# ---- denoisers with their conditions bound, for the first n images


def plain_denoiser(run: Run, inputs: Inputs, n: int) -> Denoiser:
    """Return the unconditional denoiser."""
    return run.dpm


def class_denoiser(run: Run, inputs: Inputs, n: int) -> Denoiser:
    """Return the class-conditional denoiser with the labels bound."""
    return partial(run.dpm, y=inputs['y'][:n])


def label_pdae_denoiser(run: Run, inputs: Inputs, n: int) -> Denoiser:
    """Return the PDAE decoder of `label_task`, with one-hot labels as codes."""
    return pdae_denoiser(run.G, one_hot(run, inputs['y'][:n]), run.sched)


def code_denoiser(run: Run, inputs: Inputs, n: int) -> Denoiser:
    """Return an autoencoder's decoder with the codes of the images bound."""
    return decode(run, run.enc(inputs['x0'][:n]))


def window_denoiser(run: Run, inputs: Inputs, n: int) -> Denoiser:
    """Return the PDAE decoder with a guidance scale, inside a window of timesteps only."""
    codes = run.enc(inputs['x0'][:n])
    return decode(run, codes, scale=SETTINGS['window_scale'], window=SETTINGS['window'])


def classifier_denoiser(run: Run, inputs: Inputs, n: int) -> Denoiser:
    """Return the denoiser of `mnist_dpm`, guided by the noisy classifier."""
    dpm = load('mnist_dpm').dpm
    scale = SETTINGS['classifier_scale']
    return classifier_guided(dpm, run.clf, inputs['y'][:n], run.sched, scale=scale)


# ---- quantities of every denoiser


def noisy_images(run: Run, inputs: Inputs) -> Tensor:
    """Return one noisy image for each of the stored step timesteps."""
    n = len(inputs['step_t'])
    return add_noise(run.sched, inputs['x0'][:n], inputs['step_t'], inputs['eps'][:n])


def one_step_eps(bind: Bind, run: Run, inputs: Inputs) -> Tensor:
    """Return the predicted noise at the stored step timesteps."""
    t = inputs['step_t']
    return bind(run, inputs, len(t))(noisy_images(run, inputs), t)


def gap_curve(bind: Bind, run: Run, inputs: Inputs) -> Tensor:
    """Return the posterior gap of two images at each of the stored gap timesteps."""
    x0 = inputs['x0'][:2]
    eps = inputs['eps'][:2]
    denoiser = bind(run, inputs, 2)
    rows = []
    for t in inputs['gap_t']:
        rows.append(posterior_gap(denoiser, x0, run.sched, t.repeat(2), eps))
    return torch.stack(rows)


def inferred_x_T(bind: Bind, run: Run, inputs: Inputs) -> Tensor:
    """Invert the first images with DDIM."""
    n = len(inputs['x_T'])
    denoiser = bind(run, inputs, n)
    return invert(denoiser, inputs['x0'][:n], run.sched, SETTINGS['ddim_steps'])


def reconstruction(bind: Bind, run: Run, inputs: Inputs) -> Tensor:
    """Decode the recorded inferred x_T with DDIM, without clipping."""
    x_T = inputs['inferred_x_T']
    return sample(bind(run, inputs, len(x_T)), x_T, run.sched, SETTINGS['ddim_steps'])


def samples(bind: Bind, run: Run, inputs: Inputs) -> Tensor:
    """Decode the stored random x_T with DDIM, clipped to [-1, 1]."""
    x_T = inputs['x_T']
    denoiser = bind(run, inputs, len(x_T))
    return sample(denoiser, x_T, run.sched, SETTINGS['ddim_steps'], clip=1.0)


# ---- per-image losses of each method; what `draws` lacks is drawn as in training


def dpm_losses(run: Run, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the denoising loss of each image."""
    return denoising_loss(run.dpm, x0, run.sched, reduce=None, **draws)


def class_losses(run: Run, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the denoising loss of each image, given its label."""
    return denoising_loss(partial(run.dpm, y=y), x0, run.sched, reduce=None, **draws)


def pdae_losses(run: Run, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the PDAE loss of each image."""
    return pdae_loss(run.enc, run.G, x0, run.sched, reduce=None, **draws)


def label_pdae_losses(run: Run, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the PDAE loss of each image, with its one-hot label as code."""
    denoiser = pdae_denoiser(run.G, one_hot(run, y), run.sched)
    return denoising_loss(denoiser, x0, run.sched, w_pdae, reduce=None, **draws)


def diffae_losses(run: Run, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the Diff-AE loss of each image."""
    return diffae_loss(run.enc, run.unet, x0, run.sched, reduce=None, **draws)


def scorevae_losses(run: Run, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the ScoreVAE loss of each image, with weight and beta as trained."""
    preset = PRESETS[run.recipe['net']['preset']]
    beta = preset['beta']
    weight = preset['weight']
    return scorevae_loss(run.dpm, run.enc, x0, run.sched, beta, weight, reduce=None, **draws)


def vae_losses(run: Run, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the beta-VAE loss of each image, with beta as trained."""
    return vae_loss(run.vae, x0, run.recipe['net'].get('beta', 0.01), reduce=None, **draws)


def classifier_losses(run: Run, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the cross-entropy of the noisy classifier for each image."""
    return classifier_loss(run.clf, x0, y, run.sched, reduce=None, **draws)


def judge_losses(run: Run, x0: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the cross-entropy of the evaluation classifier for each clean image."""
    return F.cross_entropy(run.judge(x0), y, reduction='none')


def code_losses(run: Run, codes: Tensor, y: Tensor, **draws: Tensor) -> Tensor:
    """Return the loss of the latent denoiser for each code."""
    return latent_loss(run.net, run.stats.norm(codes), run.sched, reduce=None, **draws)


# ---- losses with stored draws, and those of one training step


def stored_loss(losses: Losses, names: tuple[str, ...], run: Run, inputs: Inputs) -> Tensor:
    """Return the loss of each image with the stored draws."""
    draws = {name: inputs[name] for name in names}
    return losses(run, inputs['x0'], inputs['y'], **draws)


def begin_training_step() -> None:
    """Seed the random draws as the trainer does for the recorded training step."""
    seed_training_step(SETTINGS['training_seed'], SETTINGS['training_step'])


def training_step_t(run: Run, inputs: Inputs) -> Tensor:
    """Return the timesteps that the trainer draws."""
    begin_training_step()
    return run.sched.rand_t(len(inputs['x0']))


def training_step_loss(losses: Losses, run: Run, inputs: Inputs) -> Tensor:
    """Return the loss of each image as the trainer computes it: first t is drawn, then the rest."""
    begin_training_step()
    t = run.sched.rand_t(len(inputs['x0']))
    with torch.enable_grad():
        return losses(run, inputs['x0'], inputs['y'], t=t)


def untimed_training_step_loss(losses: Losses, run: Run, inputs: Inputs) -> Tensor:
    """Return the loss of each image as the trainer computes it, for a method without timesteps."""
    begin_training_step()
    with torch.enable_grad():
        return losses(run, inputs['x0'], inputs['y'])


def judge_training_step_shift(run: Run, inputs: Inputs) -> Tensor:
    """Return the random shift, in pixels, that the trainer draws for a batch."""
    begin_training_step()
    return torch.randint(-2, 3, (2,))


def judge_training_step_loss(run: Run, inputs: Inputs) -> Tensor:
    """Return the loss of each randomly shifted image as the trainer computes it."""
    shift = judge_training_step_shift(run, inputs).tolist()
    with torch.enable_grad():
        return judge_losses(run, inputs['x0'].roll(shift, (2, 3)), inputs['y'])


# ---- codes


def codes(run: Run, inputs: Inputs) -> Tensor:
    """Return the codes of the clean images; of a random code, its mean."""
    return run.enc(inputs['x0'])


def moments(run: Run, inputs: Inputs, t: int) -> tuple[Tensor, Tensor]:
    """Return mean and log variance of the codes of images noised to timestep `t`."""
    x0 = inputs['x0']
    times = torch.full((len(x0),), t)
    xt = add_noise(run.sched, x0, times, inputs['eps'])
    return run.enc.moments(xt, times)


def code_means(t: int, run: Run, inputs: Inputs) -> Tensor:
    """Return the means of the codes at timestep `t`."""
    return moments(run, inputs, t)[0]


def code_log_variances(t: int, run: Run, inputs: Inputs) -> Tensor:
    """Return the log variances of the codes at timestep `t`."""
    return moments(run, inputs, t)[1]


def code_kl(run: Run, inputs: Inputs) -> Tensor:
    """Return the KL divergence of each image's code from the prior."""
    return kl_to_prior(*moments(run, inputs, 0))


# ---- quantities of single methods


def one_hot(run: Run, y: Tensor) -> Tensor:
    """Return labels as the codes of a label-conditioned PDAE."""
    return F.one_hot(y, run.G.z_dim).float()


def pdae_pair(run: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the frozen noise prediction and the score of PDAE from one forward pass."""
    t = inputs['step_t']
    return run.G(noisy_images(run, inputs), t, run.enc(inputs['x0'][: len(t)]))


def pdae_eps(run: Run, inputs: Inputs) -> Tensor:
    """Return the frozen noise prediction inside PDAE."""
    return pdae_pair(run, inputs)[0]


def pdae_score(run: Run, inputs: Inputs) -> Tensor:
    """Return the score of PDAE's gradient estimator, given the codes."""
    return pdae_pair(run, inputs)[1]


def label_pdae_score(run: Run, inputs: Inputs) -> Tensor:
    """Return the score of the gradient estimator, given the labels."""
    t = inputs['step_t']
    return run.G(noisy_images(run, inputs), t, one_hot(run, inputs['y'][: len(t)]))[1]


def scorevae_score(run: Run, inputs: Inputs) -> Tensor:
    """Return the gradient of the log density of the clean images' codes."""
    t = inputs['step_t']
    return score(run.enc, noisy_images(run, inputs), t, run.enc(inputs['x0'][: len(t)]))


def euler_maruyama_samples(run: Run, inputs: Inputs) -> Tensor:
    """Decode two stored x_T by Euler-Maruyama, which the preset 'paper' uses in all steps."""
    x_T = inputs['x_T'][:2]
    denoiser = code_denoiser(run, inputs, 2)
    torch.manual_seed(SETTINGS['sampler_seed'])
    return sample(denoiser, x_T, run.sched, SETTINGS['euler_maruyama_steps'], solver=em_step)


def heun_samples(run: Run, inputs: Inputs) -> Tensor:
    """Decode two stored x_T by Heun's method, which the preset 'release' uses."""
    times = karras_times(run.sched, SETTINGS['heun_steps'])
    denoiser = heun(code_denoiser(run, inputs, 2), run.sched, times)
    return sample(denoiser, inputs['x_T'][:2], run.sched, times)


def vae_reconstruction(run: Run, inputs: Inputs) -> Tensor:
    """Return the decoded mean codes of the first images."""
    return run.vae(inputs['x0'][: len(inputs['x_T'])])


def vae_decoded_codes(run: Run, inputs: Inputs) -> Tensor:
    """Return the decoded code noise, as codes of the prior."""
    return run.vae.dec(inputs['xi'][: len(inputs['x_T'])])


def classifier_logits(run: Run, inputs: Inputs) -> Tensor:
    """Return the logits of the noisy classifier at the stored step timesteps."""
    return run.clf(noisy_images(run, inputs), inputs['step_t'])


def classifier_score(run: Run, inputs: Inputs) -> Tensor:
    """Return the gradient of log p(y|x_t) of the noisy classifier."""
    t = inputs['step_t']
    log_p = partial(run.clf.log_p, t=t, y=inputs['y'][: len(t)])
    return grad_log(log_p, noisy_images(run, inputs))


def judge_logits(run: Run, inputs: Inputs) -> Tensor:
    """Return the logits of the evaluation classifier for the clean images."""
    return run.judge(inputs['x0'])


def stratified_t(run: None, inputs: Inputs) -> Tensor:
    """Return stratified random timesteps after a fixed seed."""
    torch.manual_seed(SETTINGS['stratified_seed'])
    return Schedule.linear().rand_t(SETTINGS['stratified_count'])


# ---- latent runs; their inputs 'codes' are codes of the base run, not normalised


def latent_eps(run: Run, inputs: Inputs) -> Tensor:
    """Return the predicted noise in normalised codes at the stored step timesteps."""
    t = inputs['step_t']
    clean = run.stats.norm(inputs['codes'][: len(t)])
    return run.net(add_noise(run.sched, clean, t, inputs['xi'][: len(t)]), t)


def latent_stored_loss(run: Run, inputs: Inputs) -> Tensor:
    """Return the loss of each code with the stored timesteps and noise."""
    return code_losses(run, inputs['codes'], inputs['y'], t=inputs['t'], eps=inputs['xi'])


def latent_training_step_loss(run: Run, inputs: Inputs) -> Tensor:
    """Return the loss of each code as the trainer computes it."""
    return training_step_loss(code_losses, run, inputs | {'x0': inputs['codes']})


def sampled_codes(run: Run, inputs: Inputs) -> Tensor:
    """Return new codes from a fixed seed."""
    n = len(inputs['x_T'])
    return sample_z(run, n, SETTINGS['code_steps'], seed=SETTINGS['code_seed'])


def latent_samples(run: Run, inputs: Inputs) -> Tensor:
    """Return new images: new codes, decoded by the base run from the stored x_T."""
    base = load(run.recipe['net']['run'])
    steps = SETTINGS['latent_image_steps']
    seed = SETTINGS['code_seed']
    return draw(run, base, inputs['x_T'], steps, z_steps=SETTINGS['code_steps'], seed=seed)


# ---- the table: run -> quantity -> function of the run and its stored inputs


def decoder_table(bind: Bind) -> dict[str, Quantity]:
    """Return the quantities of a denoiser that can both invert and sample."""
    return {
        'gap': partial(gap_curve, bind),
        'x_T': partial(inferred_x_T, bind),
        'reconstruction': partial(reconstruction, bind),
        'samples': partial(samples, bind),
    }


def loss_table(losses: Losses, names: tuple[str, ...] = ('t', 'eps')) -> dict[str, Quantity]:
    """Return the loss with stored draws, and the losses and timesteps of one training step."""
    return {
        'loss': partial(stored_loss, losses, names),
        'training_step_loss': partial(training_step_loss, losses),
        'training_step_t': training_step_t,
    }


DENOISER_TABLE = {
    'eps': partial(one_step_eps, plain_denoiser),
    **loss_table(dpm_losses),
    **decoder_table(plain_denoiser),
}

CLASS_DENOISER_TABLE = {
    'eps': partial(one_step_eps, class_denoiser),
    **loss_table(class_losses),
    **decoder_table(class_denoiser),
}

PDAE_TABLE = {
    'codes': codes,
    'eps': pdae_eps,
    'score': pdae_score,
    'decoder_eps': partial(one_step_eps, code_denoiser),
    **loss_table(pdae_losses),
    **decoder_table(code_denoiser),
    'window_samples': partial(samples, window_denoiser),
}

LABEL_PDAE_TABLE = {
    'score': label_pdae_score,
    'decoder_eps': partial(one_step_eps, label_pdae_denoiser),
    **loss_table(label_pdae_losses),
    'gap': partial(gap_curve, label_pdae_denoiser),
    'samples': partial(samples, label_pdae_denoiser),
}

DIFFAE_TABLE = {
    'codes': codes,
    'eps': partial(one_step_eps, code_denoiser),
    **loss_table(diffae_losses),
    **decoder_table(code_denoiser),
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
    'decoder_eps': partial(one_step_eps, code_denoiser),
    **loss_table(scorevae_losses, ('t', 'eps', 'xi')),
    **decoder_table(code_denoiser),
    'euler_maruyama_samples': euler_maruyama_samples,
    'heun_samples': heun_samples,
}

VAE_TABLE = {
    **RANDOM_CODE_TABLE,
    'loss': partial(stored_loss, vae_losses, ('xi',)),
    'training_step_loss': partial(untimed_training_step_loss, vae_losses),
    'reconstruction': vae_reconstruction,
    'decoded_codes': vae_decoded_codes,
}

CLASSIFIER_TABLE = {
    'logits': classifier_logits,
    'score': classifier_score,
    **loss_table(classifier_losses),
    'guided_samples': partial(samples, classifier_denoiser),
}

JUDGE_TABLE = {
    'logits': judge_logits,
    'loss': partial(stored_loss, judge_losses, ()),
    'training_step_loss': judge_training_step_loss,
    'training_step_shift': judge_training_step_shift,
}

LATENT_TABLE = {
    'eps': latent_eps,
    'loss': latent_stored_loss,
    'training_step_loss': latent_training_step_loss,
    'training_step_t': training_step_t,
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
