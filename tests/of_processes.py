"""Jobs that `test_processes.py` runs in one process, or in several that `torchrun` starts.

`python tests/of_processes.py JOB FOLDER [VALUE …]` runs a job. Process 0 saves its result.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_model as models

from pdae_nb.data import Images, batches, load_images
from pdae_nb.evaluation import reconstruction_table
from pdae_nb.hub import load, train
from pdae_nb.methods.dpm import DPM
from pdae_nb.methods.latent import LatentDPM, MLPSkipNet, ZStats, encode_all
from pdae_nb.processes import averaging, join, launched, processes, shared
from pdae_nb.recipes import recipe
from pdae_nb.training import EMA, Recipe, fit

STEPS = 30


def new_latent():
    "A latent DPM with random weights."
    base = models.new_pdae()
    torch.manual_seed(2)
    return LatentDPM(models.perturb(MLPSkipNet(4, 16, 3)), ZStats(torch.randn(50, 4)), base)


METHODS = dict(
    dpm=models.new_dpm,
    pdae=models.new_pdae,
    label_pdae=models.new_label_pdae,
    scorevae=models.new_scorevae,
    vae=models.new_vae,
    eval_classifier=models.new_eval_classifier,
    latent=new_latent,
)


def chain(model):
    "A model, its base, …"
    return [model] if model.base is None else [model, *chain(model.base)]


def data_of(model):
    "Small digits, or codes for a latent DPM."
    images = load_images('digits', 'train', 14)[:50]
    if not isinstance(model, LatentDPM):
        return images
    generator = torch.Generator().manual_seed(3)
    return Images(torch.randn(50, 4, generator=generator))


def in_dtype(data, dtype):
    "Batches whose images have another dtype."
    for x0, y in data:
        yield x0.to(dtype), y


def job_fit(folder, *cases):
    "`fitted` for cases such as dpm-float64-1: method, dtype and number of accumulated parts."
    own = join('cpu')
    return {case: fitted(own, *case.split('-')) for case in cases}


def fitted(own, method, dtype, accumulate):
    "Thirty steps of `fit`: losses, gradient norms, the gradient of step 1 and the last weights."
    dtype = getattr(torch, dtype)
    model = METHODS[method]().train()
    for part in chain(model):
        part.to(dtype)
    row = Recipe(DPM, 'digits', 14, images=8 * STEPS, batch=8, lr=1e-3, clip=1.0)
    data = batches(data_of(model), 8, STEPS, seed=0, rank=own.rank, world=own.world)
    ema = EMA(model)
    gradients = []
    first = next(iter(model.trainable()))
    first.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    opt = torch.optim.AdamW(model.trainable(), lr=1e-3, fused=True)
    moments = []
    losses = []
    norms = []
    steps = fit(
        averaging(model),
        model.trainable(),
        in_dtype(data, dtype),
        row,
        ema,
        opt=opt,
        precision='float32',
        accumulate=int(accumulate),
    )
    for step in steps:
        losses.append(step.loss)
        norms.append(step.grad_norm)
        if not moments:  # after step 1 it is a tenth of the clipped gradient
            moments = [10 * opt.state[p]['exp_avg'].clone() for p in model.trainable()]
    return dict(
        losses=torch.stack(losses).double(),
        norms=torch.stack(norms).double(),
        gradient=torch.cat([moment.flatten() for moment in moments]),
        weights=torch.cat([p.detach().flatten() for p in model.trainable()]),
        average=torch.cat([p.flatten() for p in ema.module.parameters()]),
    )


class Killer:
    "Ends a process by SIGKILL when it is called, but only once."

    def __init__(self, folder, rank):
        self.mark = Path(folder) / 'killed'
        self.rank = rank

    def __call__(self, *step):
        if processes().rank == self.rank and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def job_differ(folder):
    "Each process trains with another seed."
    row = replace(recipe('mnist_dpm', 'smoke'), batch=8, images=8 * 24, seed=launched().rank)
    train('mnist_dpm', row, out=Path(folder) / 'run', device='cpu')
    return {}


def job_train(folder, killed='-1', stopped='-1', seconds='0'):
    """Train a DPM of 24 steps. The process `killed` ends after step 13, `stopped` gets a SIGTERM.

    Each checkpoint takes some seconds more.
    """
    row = replace(recipe('mnist_dpm', 'smoke'), batch=8, images=8 * 24)
    kill = Killer(folder, int(killed))
    add = fit_module()._Run.add
    rank = launched().rank

    def counting(run, step):
        add(run, step)
        if run.i == 13:
            kill()
        if run.i == 13 and rank == int(stopped):
            os.kill(os.getpid(), signal.SIGTERM)

    fit_module()._Run.add = counting
    save = fit_module().save_checkpoint

    def slowly(*args):
        time.sleep(float(seconds))
        save(*args)

    fit_module().save_checkpoint = slowly
    out = Path(folder) / 'run'
    train('mnist_dpm', row, out=out, device='cpu', precision='float32', every=5, log_every=5)
    return {}


def fit_module():
    "The module of the training loop."
    import pdae_nb.training

    return pdae_nb.training


def job_share(folder):
    "Codes, samples, reconstruction errors and losses of shipped models, shared by the processes."
    join('cpu')
    pdae = load('mnist_pdae')
    test = load_images('digits', 'test', 28)[:50]
    x0 = test.x.float() / 127.5 - 1
    with shared():
        codes = pdae.encode(x0, bs=8)
        return dict(
            codes=codes,
            kept=encode_all(pdae.enc, test, bs=8),
            samples=pdae.sample_codes(codes[:20], steps=2, bs=8),
            of_dpm=load('mnist_dpm').sample(20, steps=2, bs=8),
            result=torch.tensor(pdae.base.test_result(x0, None).test_noise_mse),
            **table_of_errors(pdae, x0[:5], test.y[:5], folder),
        )


def table_of_errors(model, x0, y, folder):
    "All numbers of a small table of reconstruction errors, whose sums are kept in a file."
    table = reconstruction_table(
        model,
        x0,
        y,
        load('mnist_eval_classifier'),
        Path(folder) / 'sums.json',
        steps=(2, 3),
        chunk=3,
        log=no_log,
        ways=('random, DDIM', 'inferred, DDIM'),
    )
    numbers = {}
    for row, metrics in table.items():
        assert metrics.pop('n') == 5
        for metric, (mean, se) in metrics.items():
            numbers[f'{row} {metric}'] = torch.tensor([mean, se])
    return numbers


def no_log(message):
    "A log function that drops its message."


def job_twice(folder):
    "Two trainings in one program. Each process loads what they have stored, and trains on it."
    row = replace(recipe('mnist_dpm', 'smoke'), batch=8, images=8 * 2)
    out = Path(folder) / 'dpm'
    options = dict(device='cpu', precision='float32')
    train('mnist_dpm', row, out=out, **options)
    assert load(out).card.result is not None
    row = replace(recipe('mnist_pdae', 'smoke'), batch=8, images=8 * 2)
    trained = train('mnist_pdae', row, out=Path(folder) / 'pdae', base=out, **options)
    assert trained.card.result == load(Path(folder) / 'pdae').card.result
    return {}


def job_latent(folder):
    "Train a latent DPM, whose data are codes that all processes compute."
    row = replace(recipe('mnist_pdae_latent', 'smoke'), batch=8, images=8 * 12, base='mnist_pdae')
    row = replace(row, px=28, data='digits')
    train('latent', row, out=Path(folder) / 'run', device='cpu', precision='float32', every=5)
    return {}


def job_pictures(folder):
    "All sections of the evaluation of a small PDAE, as one vector of numbers."
    from test_any_evaluation import FEW, attribute_classifier, evaluate_pictures, numbers_of

    join('cpu')
    settings = FEW | dict(data='digits', eval_classifier=attribute_classifier())
    with shared():
        path = Path(folder) / 'sums.json'
        result = evaluate_pictures(models.new_pdae().eval(), path=path, **settings)
    return dict(numbers=torch.tensor(numbers_of(result), dtype=torch.float64))


def main():
    job, folder, *values = sys.argv[1:]
    torch.set_num_threads(1)
    result = globals()[f'job_{job}'](folder, *values)
    if processes().is_first and result:
        torch.save(result, Path(folder) / 'result.pt')


if __name__ == '__main__':
    main()
