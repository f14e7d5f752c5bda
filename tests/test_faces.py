"""The shipped models of faces: recorded values, and what belongs together.

The inputs are random numbers, because the images of CelebA are no part of the repository.

    python tests/test_faces.py     # writes tests/faces.json
"""

import json
from pathlib import Path

import pytest
import torch

from pdae_nb.edit import stored_directions
from pdae_nb.hub import load
from pdae_nb.model import model_fingerprint

FILE = Path(__file__).with_name('faces.json')
TIMES = (20, 300, 800)


def inputs():
    "Two smooth random images, and their noisy versions at three timesteps."
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(2, 3, 8, 8, generator=generator)
    x0 = torch.nn.functional.interpolate(coarse, size=64, mode='bilinear').clamp(-1, 1)
    noise = torch.randn(2, 3, 64, 64, generator=generator)
    return x0, noise


def summary(tensor):
    "Root mean square of each sample, and its first three numbers."
    flat = tensor.flatten(1)
    rms = flat.square().mean(1).sqrt()
    return torch.cat([rms[:, None], flat[:, :3]], 1).flatten().tolist()


@torch.no_grad()
def values() -> dict[str, list[float]]:
    "Quantity -> numbers of the four models."
    x0, noise = inputs()
    latent = load('celeba64_pdae_latent')
    coder = latent.base
    dpm = coder.base
    z = coder.encode(x0)
    found = {'celeba64_pdae code': summary(z)}
    for t in TIMES:
        alpha_bar = dpm.sched.alpha_bar[t].float()
        xt = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        ts = torch.tensor([t, t])
        found[f'celeba64_dpm eps at t = {t}'] = summary(dpm.denoiser(None)(xt, ts))
        found[f'celeba64_pdae eps at t = {t}'] = summary(coder.denoiser(z)(xt, ts))
    found['celeba64_pdae_latent codes'] = summary(latent.codes(2, seed=0, steps=5))
    classifier = load('celeba64_eval_classifier')
    found['celeba64_eval_classifier logits'] = summary(classifier.logits(x0))
    return found


@pytest.fixture(scope='module')
def computed():
    return values()


RECORDED = json.loads(FILE.read_text('utf-8')) if FILE.exists() else {}


@pytest.mark.parametrize('name', RECORDED)
def test_a_value_is_the_recorded_one(computed, name):
    got = torch.tensor(computed[name])
    torch.testing.assert_close(got, torch.tensor(RECORDED[name]), rtol=2e-3, atol=2e-4)


def test_every_value_was_recorded(computed):
    assert list(computed) == list(RECORDED)
    assert len(RECORDED) == 3 + 2 * len(TIMES)


def test_the_models_belong_together():
    latent = load('celeba64_pdae_latent')
    coder = latent.base
    assert coder.card.images_seen == 162_080
    assert coder.base.card.images_seen == 389_760
    assert coder.base.settings.predicts == 'v'
    directions = stored_directions(coder)
    assert len(directions) == 40
    assert {'Smiling', 'Male', 'Young'} <= set(directions)
    record = json.loads((latent.path / 'run.json').read_text('utf-8'))
    assert record['base']['fingerprint'] == model_fingerprint(coder)


def test_the_code_changes_the_prediction_where_the_gap_is_large(computed):
    at_800 = torch.tensor(computed['celeba64_pdae eps at t = 800'])
    unconditional = torch.tensor(computed['celeba64_dpm eps at t = 800'])
    assert (at_800 - unconditional).abs().max() > 0.01


if __name__ == '__main__':
    FILE.write_text(json.dumps(values(), indent=1) + '\n', 'utf-8')
    print(f'wrote {FILE}')
