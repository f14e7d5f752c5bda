"""A folder of small pictures of odd sizes with a CSV file of labels, for tests."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image


def picture(k: int) -> Image.Image:
    "Picture k: a bright or dark square on a grey ground."
    rng = np.random.default_rng(k)
    height, width = rng.integers(24, 45, 2)
    pixels = rng.integers(90, 140, (height, width, 3))
    middle = slice(height // 4, 3 * height // 4), slice(width // 4, 3 * width // 4)
    pixels[middle] += 100 if k % 2 else -80
    return Image.fromarray(pixels.astype(np.uint8))


def write_pictures(folder: Path, n: int = 40) -> Path:
    "Write n pictures to `photos`, their labels to `labels.csv`, and another picture, `me.jpg`."
    photos = folder / 'photos'
    photos.mkdir(parents=True)
    rows = [('file', 'Smiling', 'Male')]
    for k in range(n):
        picture(k).save(photos / f'{k:02d}.{"jpg" if k % 3 else "png"}')
        rows.append((f'{k:02d}.{"jpg" if k % 3 else "png"}', k % 2, int(k % 4 > 1)))
    with open(folder / 'labels.csv', 'w', encoding='utf-8', newline='') as file:
        csv.writer(file).writerows(rows)
    picture(1000).save(folder / 'me.jpg')
    return photos
