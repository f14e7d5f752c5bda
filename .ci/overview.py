#!/usr/bin/env python3
"""Write data/results/overview.png: diagrams of the three methods, and digits that they reconstruct.

python .ci/overview.py
"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

import pdae_nb
from pdae_nb.data import mnist_or_digits, to_signed
from pdae_nb.diagrams import Sizes, three_methods
from pdae_nb.theme import DPI, png_file, setup_plots

PATH = Path(__file__).resolve().parent.parent / 'data/results/overview.png'
MODELS = ['mnist_pdae', 'mnist_diffae', 'mnist_scorevae']  # in the order of the diagrams
DIGITS = 5
STEPS = 20
SEED = 0


def reconstructions(name, x0):
    "A grid: input, decoded from the code and a random x_T, and from the code and the inferred x_T."
    model = pdae_nb.load(name)
    codes = model.encode(x0)
    rows = {
        'input': x0,
        'code, random $x_T$': model.sample_codes(codes, seed=SEED, steps=STEPS),
        'code, inferred $x_T$': model.reconstruct(x0, steps=STEPS),
    }
    names = [name if name == 'input' else name.replace(', ', ',\n') for name in rows]
    ax = pdae_nb.show(dict(zip(names, rows.values(), strict=True)), scale=0.44)
    file = io.BytesIO()
    ax.figure.savefig(file, format='png', dpi=DPI)
    plt.close(ax.figure)
    return Image.open(file)


def main():
    setup_plots()
    x0 = to_signed(mnist_or_digits('test').x[:DIGITS])
    sizes = Sizes.of(pdae_nb.load('mnist_pdae'))
    diagram = Image.open(io.BytesIO(three_methods(sizes).png())).convert('RGBA')
    grids = [reconstructions(name, x0) for name in MODELS]
    height = max(grid.height for grid in grids)
    picture = Image.new('RGBA', (diagram.width, diagram.height + height))
    picture.paste(diagram)
    for i, grid in enumerate(grids):
        picture.paste(grid, (i * diagram.width // len(grids), diagram.height))
    PATH.write_bytes(png_file(picture))
    print(PATH)


if __name__ == '__main__':
    main()
