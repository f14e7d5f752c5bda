#!/usr/bin/env python3
"""Draw data/results/overview.png: the three methods as diagrams, and digits that they reconstruct.

python .ci/overview.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch

import pdae_nb
from pdae_nb.data import mnist_or_digits, to_signed

ROOT = Path(__file__).resolve().parent.parent
FROZEN = '#b8b8b8'
TRAINED = '#f2a65a'
DATA = '#ffffff'
INK = '#222222'
DIGITS = 5
STEPS = 20
SEED = 0


def box(ax, center, text, colour):
    "A block of a diagram, 0.3 wide and 0.19 high."
    x, y = center
    width, height = 0.3, 0.19
    corner = (x - width / 2, y - height / 2)
    style = 'round,pad=0.005,rounding_size=0.02'
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=colour, ec=INK, lw=0.8))
    ax.text(x, y, text, ha='center', va='center', fontsize=7.5, color=INK)


def label(ax, center, text):
    ax.text(*center, text, ha='center', va='center', fontsize=9, color=INK)


def arrow(ax, start, end):
    ax.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', lw=0.9, color=INK))


def draw_pdae(ax):
    label(ax, (0.05, 0.8), '$x_0$')
    label(ax, (0.05, 0.3), '$x_t, t$')
    box(ax, (0.33, 0.8), 'encoder', TRAINED)
    box(ax, (0.33, 0.3), 'U-Net,\nfirst half', FROZEN)
    box(ax, (0.73, 0.55), 'gradient\nestimator', TRAINED)
    box(ax, (0.73, 0.3), 'U-Net,\nsecond half', FROZEN)
    label(ax, (0.57, 0.86), '$z$')
    arrow(ax, (0.09, 0.8), (0.17, 0.8))
    arrow(ax, (0.11, 0.3), (0.17, 0.3))
    arrow(ax, (0.49, 0.8), (0.66, 0.66))
    arrow(ax, (0.49, 0.34), (0.57, 0.5))
    arrow(ax, (0.49, 0.3), (0.57, 0.3))
    label(ax, (0.97, 0.42), r'$\hat\epsilon$')
    arrow(ax, (0.89, 0.52), (0.95, 0.45))
    arrow(ax, (0.89, 0.33), (0.95, 0.39))


def draw_diffae(ax):
    label(ax, (0.05, 0.8), '$x_0$')
    label(ax, (0.05, 0.3), '$x_t, t$')
    box(ax, (0.33, 0.8), 'encoder', TRAINED)
    box(ax, (0.62, 0.3), 'U-Net', TRAINED)
    label(ax, (0.57, 0.72), '$z$')
    label(ax, (0.97, 0.3), r'$\hat\epsilon$')
    arrow(ax, (0.09, 0.8), (0.17, 0.8))
    arrow(ax, (0.11, 0.3), (0.46, 0.3))
    arrow(ax, (0.49, 0.75), (0.6, 0.41))
    arrow(ax, (0.78, 0.3), (0.93, 0.3))


def draw_scorevae(ax):
    label(ax, (0.05, 0.3), '$x_t, t$')
    label(ax, (0.05, 0.8), '$z$')
    box(ax, (0.4, 0.8), 'encoder of $x_t$:\n' + r'log $p(z|x_t)$', TRAINED)
    box(ax, (0.4, 0.3), 'U-Net', FROZEN)
    arrow(ax, (0.09, 0.8), (0.24, 0.8))
    arrow(ax, (0.11, 0.3), (0.24, 0.3))
    arrow(ax, (0.11, 0.36), (0.27, 0.69))
    label(ax, (0.97, 0.42), r'$\hat\epsilon$')
    label(ax, (0.76, 0.78), r'$\nabla_{x_t}$')
    arrow(ax, (0.56, 0.76), (0.95, 0.47))
    arrow(ax, (0.56, 0.3), (0.95, 0.38))


METHODS = [
    ('PDAE', 'mnist_pdae', draw_pdae),
    ('Diff-AE', 'mnist_diffae', draw_diffae),
    ('ScoreVAE', 'mnist_scorevae', draw_scorevae),
]


def reconstructions(name, x0):
    "Input, decoded from the code and a random x_T, and from the code and the inferred x_T."
    model = pdae_nb.load(name)
    codes = model.encode(x0)
    return [
        x0,
        model.sample_codes(codes, seed=SEED, steps=STEPS),
        model.reconstruct(x0, steps=STEPS),
    ]


def draw_digits(ax, rows):
    "Rows of images as one grey picture."
    pixels = [torch.cat(list(row[:, 0]), dim=1) for row in rows]
    ax.imshow(torch.cat(pixels).clamp(-1, 1), cmap='gray', vmin=-1, vmax=1)
    ax.set(xticks=[], yticks=[])


def main():
    x0 = to_signed(mnist_or_digits('test').x[:DIGITS])
    fig, axes = plt.subplots(2, 3, figsize=(9.5, 4.1), height_ratios=(1, 1.05), dpi=160)
    size = x0.shape[-1]
    captions = ['input', 'code and\nrandom $x_T$', 'code and\ninferred $x_T$']
    for column, (title, name, draw_diagram) in enumerate(METHODS):
        diagram, digits = axes[:, column]
        diagram.set(xlim=(0, 1.02), ylim=(0.12, 1))
        diagram.set_title(title, fontsize=12, color=INK)
        diagram.axis('off')
        draw_diagram(diagram)
        draw_digits(digits, reconstructions(name, x0))
        if column == 0:
            ticks = [size * (row + 0.5) for row in range(len(captions))]
            digits.set_yticks(ticks, captions, fontsize=8)
            digits.tick_params(length=0)
    frozen, trained = (plt.Rectangle((0, 0), 1, 1, fc=c, ec=INK, lw=0.8) for c in (FROZEN, TRAINED))
    names = ['frozen', 'trained']
    fig.legend([frozen, trained], names, loc='lower center', ncol=2, frameon=False, fontsize=9)
    fig.tight_layout(rect=(0, 0.05, 1, 1), w_pad=2)
    path = ROOT / 'data' / 'results' / 'overview.png'
    fig.savefig(path, facecolor='white')
    print(path)


if __name__ == '__main__':
    main()
