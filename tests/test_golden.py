"""Every shipped run gives the numbers that version 1 gave.

`golden_record.py` has written the inputs and the expected values, `golden_adapter.py` maps them
to the present API. No data set is needed.
"""

import json
from collections.abc import Iterator

import golden_adapter as adapter
import pytest
import torch
from golden_record import GOLDEN, INPUT, Tensors, inputs_of, largest_difference, this_machine
from safetensors.torch import load_file
from torch import Tensor

NOTE = json.loads(GOLDEN.with_suffix('.json').read_text())
KEYS: list[tuple[str, str]] = []
for _run, _names in NOTE['quantities'].items():
    KEYS.extend((_run, _name) for _name in _names)

TIGHT = 1e-5
LOOSE = 1e-3
ELSEWHERE = 2e-3
WHAT_FIXES_THE_DIGITS = ('capability', 'machine', 'cpu', 'torch')


@pytest.fixture(scope='module', autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread, and forget the loaded runs afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    adapter.release()


@pytest.fixture(scope='module')
def stored() -> Tensors:
    """Read the stored inputs and expected values."""
    return load_file(GOLDEN)


def is_loose(name: str) -> bool:
    """Return whether a quantity is the end of a sampler, where rounding errors add up."""
    return name == 'reconstruction' or name.endswith('samples')


def on_recorded_machine() -> bool:
    """Return whether CPU and torch are those of the recording."""
    here = this_machine()
    recorded = NOTE['recorded_on']
    return all(here[fact] == recorded[fact] for fact in WHAT_FIXES_THE_DIGITS)


def tolerance_of(name: str) -> float:
    """Return the tolerance of a quantity on this machine."""
    if not on_recorded_machine():
        return ELSEWHERE
    return LOOSE if is_loose(name) else TIGHT


def scale_of(want: Tensor) -> Tensor:
    """Return the largest magnitude of each row; of a vector, that of the whole vector."""
    if want.ndim < 2:
        return want.abs().max()
    largest = want.flatten(1).abs().amax(1)
    return largest.reshape(-1, *[1] * (want.ndim - 1))


def check(key: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Assert |got - want| <= tolerance * (scale + |want|); integers must be equal."""
    assert got.shape == want.shape, f'{key}: shape {tuple(got.shape)}, not {tuple(want.shape)}'
    assert got.dtype == want.dtype, f'{key}: {got.dtype}, not {want.dtype}'
    if not want.is_floating_point():
        assert torch.equal(got, want), f'{key}: got {got.tolist()}, expected {want.tolist()}'
        return
    want = want.double()
    allowed = tolerance * (scale_of(want) + want.abs())
    error = (got.double() - want).abs()
    worst = largest_difference(got, want.to(got.dtype))
    message = f'{key}: largest difference {worst:.3g}, tolerance {tolerance:.0e}'
    assert (error <= allowed).all(), f'{message}, {(error / allowed).max():.3g} times the allowed'


@pytest.mark.parametrize(('run', 'name'), KEYS)
def test_value_is_that_of_version_1(run: str, name: str, stored: Tensors) -> None:
    """Compare one quantity of one run with its recorded value."""
    key = f'{run}/{name}'
    got = adapter.compute(run, name, inputs_of(run, stored))
    check(key, got, stored[key], tolerance_of(name))


@pytest.mark.parametrize('run', adapter.shipped_runs())
def test_every_shipped_run_has_golden_values(run: str) -> None:
    """Require at least two quantities of each run in `data/models`."""
    assert len(NOTE['quantities'].get(run, [])) >= 2, f'{run}: fewer than two golden quantities'


def test_adapter_and_files_fit_together(stored: Tensors) -> None:
    """Compare keys and settings of the adapter with those of the recording."""
    expected = {key for key in stored if not key.startswith(INPUT)}
    assert expected == {f'{run}/{name}' for run, name in KEYS}
    assert {run: list(table) for run, table in adapter.QUANTITIES.items()} == NOTE['quantities']
    assert NOTE['settings'] == adapter.SETTINGS


@pytest.mark.parametrize(('run', 'name'), KEYS)
def test_a_changed_value_fails(run: str, name: str, stored: Tensors) -> None:
    """Change each recorded value by 1 %, by 0.1 % where the tolerance is tight, integers by 1."""
    key = f'{run}/{name}'
    want = stored[key]
    changes = [(want * 1.01, ELSEWHERE), (want * 1.01, LOOSE), (want * 1.001, TIGHT)]
    if not want.is_floating_point():
        changes = [(want + 1, TIGHT)]
    for changed, tolerance in changes:
        check(key, want, want, tolerance)
        with pytest.raises(AssertionError, match=key):
            check(key, changed, want, tolerance)
