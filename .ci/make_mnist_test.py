#!/usr/bin/env python3
"""Write pdae_nb/assets/mnist_test.npz: every tenth image of MNIST's test set.

python .ci/make_mnist_test.py           # write the file from the MNIST of `pdae_nb.data`
python .ci/make_mnist_test.py --check   # exit 1 if the file holds other images

The file holds x (uint8, 1000x1x28x28), y (uint8, the classes) and index (int64: 0, 10, …, 9990).
"""

import sys

import numpy as np

from pdae_nb.data import mnist
from pdae_nb.files import assets_dir

STEP = 10
PATH = assets_dir() / 'mnist_test.npz'


def chosen() -> dict[str, np.ndarray]:
    "The images, their classes and their indices in the official test set."
    images = mnist('test')
    if len(images) != 10_000:
        raise SystemExit(f"MNIST's test set has 10,000 images, got {len(images)}")
    index = np.arange(0, len(images), STEP)
    x = images.x[index].numpy()
    y = images.y[index].numpy().astype(np.uint8)
    return dict(x=x, y=y, index=index)


def main(check: bool) -> int:
    arrays = chosen()
    if not check:
        np.savez_compressed(PATH, **arrays)
        print(f'wrote {PATH}, {PATH.stat().st_size:,} bytes')
        return 0
    with np.load(PATH) as file:
        differ = [name for name in arrays if not np.array_equal(file[name], arrays[name])]
    for name in differ:
        print(f'{PATH}: {name} differs from the data set')
    return int(bool(differ))


if __name__ == '__main__':
    sys.exit(main('--check' in sys.argv[1:]))
