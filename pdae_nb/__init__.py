"""Diffusion autoencoders: PDAE, Diff-AE and ScoreVAE on one small interface.

The names below are imported at their first use. Importing the package imports no torch.
"""

import importlib

__version__ = '0.1.0'

_MODULES = {  # public name: module that defines it
    'load': 'hub',
    'train': 'hub',
    'images': 'hub',
    'recipe': 'recipes',
    'sample': 'sampling',
    'invert': 'sampling',
    'guided': 'guidance',
    'interpolate': 'edit',
    'manipulate': 'edit',
    'encode': 'pictures',
    'direction': 'pictures',
    'evaluate': 'cli',
    'show': 'plot',
    'Schedule': 'forward',
    'Model': 'model',
    'GenerativeModel': 'model',
    'Recipe': 'training',
    'DataOptions': 'splits',
    'DPM': 'methods.dpm',
    'PDAE': 'methods.pdae',
    'DiffAE': 'methods.diffae',
    'ScoreVAE': 'methods.scorevae',
}

__all__ = list(_MODULES)


def __getattr__(name: str):
    "The object of a public name, from its module."
    if name not in _MODULES:
        raise AttributeError(f'module pdae_nb has no attribute {name!r}')
    value = getattr(importlib.import_module(f'pdae_nb.{_MODULES[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
