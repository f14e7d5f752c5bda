#!/usr/bin/env python3
"""Write pdae_nb/assets/directions: attributes as directions of the codes of a shipped model.

python .ci/make_directions.py [MODEL ...]   # default: mnist_pdae, celeba64_pdae

Data: the first 10,000 training images of the model's data set. Each direction is a logistic
regression on their normalised codes with C = 0.001, images with the attribute against the others,
as in `pdae manipulate`. The attributes are the ten digits, or the 40 attributes of CelebA.
"""

import sys

from pdae_nb.data import load_images
from pdae_nb.edit import attribute, fit_direction, write_directions
from pdae_nb.evaluation import data_of
from pdae_nb.files import assets_dir
from pdae_nb.hub import load
from pdae_nb.methods.latent import encode_all

MODELS = ['mnist_pdae', 'celeba64_pdae']
IMAGES = 10_000
C = 1e-3


def make(name: str) -> None:
    "Write the directions of one model."
    model = load(name)
    data = data_of(model)
    images = load_images(data, 'train', model.shape[-1])[:IMAGES]
    source = f'fitted to the first {len(images):,} training images of {data}, C = {C:g}'
    z = encode_all(model.enc, images)
    directions = {}
    for label in images.classes:
        directions[label] = fit_direction(z, attribute(images, label), source, C)
    path = assets_dir() / 'directions' / f'{name}.safetensors'
    write_directions(path, model, directions)
    print(f'wrote {path}, {path.stat().st_size:,} bytes')


if __name__ == '__main__':
    for name in sys.argv[1:] or MODELS:
        make(name)
