#!/usr/bin/env python3
"""Write pdae_nb/assets/directions/mnist_pdae.safetensors: the ten classes as directions of codes.

python .ci/make_directions.py

Data: the first 10,000 training images of MNIST. Each direction is a logistic regression on their
normalised codes with C = 0.001, one class against the others, as in `pdae manipulate`.
"""

from pdae_nb.data import mnist
from pdae_nb.edit import attribute, fit_direction, write_directions
from pdae_nb.files import assets_dir
from pdae_nb.hub import load
from pdae_nb.methods.latent import encode_all

MODEL = 'mnist_pdae'
IMAGES = 10_000
C = 1e-3


def main() -> None:
    model = load(MODEL)
    images = mnist('train')[:IMAGES]
    source = f'fitted to the first {len(images):,} training images of mnist, C = {C:g}'
    z = encode_all(model.enc, images)
    directions = {}
    for name in images.classes:
        directions[name] = fit_direction(z, attribute(images, name), source, C)
    path = assets_dir() / 'directions' / f'{MODEL}.safetensors'
    write_directions(path, model, directions)
    print(f'wrote {path}, {path.stat().st_size:,} bytes')


if __name__ == '__main__':
    main()
