"""Record the golden values of all shipped runs, or compare two recordings bit for bit.

    PDAE_NB_DATA=… python tests/golden_record.py --out tests/golden
    python tests/golden_record.py --compare OTHER.safetensors

The data sets are needed only to record. The package that is recorded is the one that Python
imports; `PYTHONPATH=/path/of/another/checkout` chooses another one.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import golden_adapter as adapter
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).with_name('golden.safetensors')
INPUT = 'input/'
IMAGES = 8
STEP_TIMES = (1, 20, 100, 500, 1000)
GAP_TIMES = (2, 50, 300, 800)

# group of runs (the first part of their names): data set, pixels, sampled images, code width, seed
GROUPS = {
    'mnist': ('mnist', 28, 4, 64, 1),
    'cifar16': ('cifar10', 16, 2, 96, 2),
}

# With the right labels the losses of these runs are nearly 0, where float32 rounds them.
WRONG_LABELS = ('mnist_judge', 'cifar16_judge')

Tensors = dict[str, Tensor]


def group_inputs(group: str) -> Tensors:
    """Return real images with their labels, and random draws for all runs of a group."""
    data, px, sampled, width, seed = GROUPS[group]
    x0, y = adapter.real_images(data, px, IMAGES)
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randperm(IMAGES, generator=generator)
    inputs = {
        'x0': x0,
        'y': y,
        't': spread * 125 + 60,
        'step_t': torch.tensor(STEP_TIMES),
        'gap_t': torch.tensor(GAP_TIMES),
        'eps': torch.randn(x0.shape, generator=generator),
        'x_T': torch.randn(sampled, *x0.shape[1:], generator=generator),
        'xi': torch.randn(IMAGES, width, generator=generator),
    }
    return {f'{INPUT}{group}/{name}': value.clone() for name, value in inputs.items()}


def inputs_of(run: str, stored: Tensors) -> Tensors:
    """Return the stored inputs of a run: its group's, then its own, and its inferred x_T."""
    found = {}
    for owner in (run.split('_')[0], run):
        prefix = f'{INPUT}{owner}/'
        for key, value in stored.items():
            if key.startswith(prefix):
                found[key.removeprefix(prefix)] = value
    if f'{run}/x_T' in stored:
        found['inferred_x_T'] = stored[f'{run}/x_T']
    return found


def record() -> Tensors:
    """Return all inputs and all golden values."""
    stored: Tensors = {}
    for group in GROUPS:
        stored |= group_inputs(group)
    for latent, base in adapter.LATENT_BASES.items():
        stored[f'{INPUT}{latent}/codes'] = adapter.compute(base, 'codes', inputs_of(base, stored))
    for run in WRONG_LABELS:
        stored[f'{INPUT}{run}/y'] = inputs_of(run, stored)['y'].roll(1)
    for run, quantities in adapter.QUANTITIES.items():
        start = time.perf_counter()
        for quantity in quantities:
            value = adapter.compute(run, quantity, inputs_of(run, stored))
            stored[f'{run}/{quantity}'] = value.clone()
        print(f'{time.perf_counter() - start:6.2f} s  {run}: {", ".join(quantities)}')
    return stored


def cpu_name() -> str:
    """Return the model name of the CPU, or an empty string."""
    info = Path('/proc/cpuinfo')
    if not info.exists():
        return platform.processor()
    for line in info.read_text().splitlines():
        if line.startswith('model name'):
            return line.split(':', 1)[1].strip()
    return ''


def this_machine() -> dict[str, str | int]:
    """Return what the last digits of a number depend on."""
    return {
        'capability': torch.backends.cpu.get_cpu_capability(),
        'machine': platform.machine(),
        'cpu': cpu_name(),
        'torch': torch.__version__,
        'numpy': np.__version__,
        'python': platform.python_version(),
        'threads': torch.get_num_threads(),
    }


def package_commit() -> str:
    """Return the commit of the recorded package's checkout, or an empty string."""
    folder = str(Path(adapter.PACKAGE_FILE).parent)
    command = ['git', '-C', folder, 'rev-parse', 'HEAD']
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def write(stem: Path, stored: Tensors) -> None:
    """Write the tensors, and beside them the machine, the settings and the list of keys."""
    save_file(stored, stem.with_suffix('.safetensors'))
    quantities = {run: list(table) for run, table in adapter.QUANTITIES.items()}
    note = {
        'recorded_on': this_machine(),
        'package_version': adapter.PACKAGE_VERSION,
        'commit': package_commit(),
        'settings': adapter.SETTINGS,
        'quantities': quantities,
    }
    stem.with_suffix('.json').write_text(json.dumps(note, indent=1) + '\n')


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference, infinite for other shapes or types."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float('inf')
    if not a.numel():
        return 0.0
    difference = (a.double() - b.double()).abs()
    return difference.nan_to_num(nan=float('inf')).max().item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same type, shape and bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def compare(first: Path, second: Path) -> int:
    """Print each key with its largest difference; return how many keys differ in any bit."""
    a = load_file(first)
    b = load_file(second)
    differing = 0
    for key in sorted(a.keys() | b.keys()):
        if key not in a or key not in b:
            print(f'only in {first if key in a else second}: {key}')
            differing += 1
            continue
        same = same_bits(a[key], b[key])
        differing += not same
        mark = 'same     ' if same else 'DIFFERENT'
        print(f'{mark} {largest_difference(a[key], b[key]):9.3g}  {key}')
    print(f'{differing} of {len(a.keys() | b.keys())} keys differ')
    return differing


def main() -> int:
    """Record or compare, as the command line says."""
    parser = argparse.ArgumentParser(description='Record or compare golden values.')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--out', type=Path, help='stem of the files to write, e.g. tests/golden')
    what.add_argument('--compare', type=Path, help='recording to compare')
    parser.add_argument('--against', type=Path, default=GOLDEN, help='the other recording')
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.compare:
        return int(compare(args.compare, args.against) > 0)
    print(f'recording {adapter.PACKAGE_FILE}')
    write(args.out, record())
    return 0


if __name__ == '__main__':
    sys.exit(main())
