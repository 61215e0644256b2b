"""Write, fit and trust variational autoencoders as Pyro programs.

The names below are loaded when first used, so that ``ppl-vae --help`` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_vae.arviz import to_arviz as to_arviz
    from ppl_vae.checks import check as check
    from ppl_vae.data import load_data as load_data
    from ppl_vae.evaluation import evaluate as evaluate
    from ppl_vae.fitting import fit as fit
    from ppl_vae.guide import AmortizedGuide as AmortizedGuide
    from ppl_vae.guide import Factorized as Factorized
    from ppl_vae.guide import Prior as Prior
    from ppl_vae.model import GenerativeModel as GenerativeModel
    from ppl_vae.recipes import Experiment as Experiment
    from ppl_vae.recipes import load as load
    from ppl_vae.replicas import evaluate_replicas as evaluate_replicas
    from ppl_vae.sites import check_pair as check_pair
    from ppl_vae.svi import SVI as SVI

# A name here must not be that of a submodule: importing the submodule would replace it.
_HOMES = {
    "AmortizedGuide": "guide",
    "Experiment": "recipes",
    "Factorized": "guide",
    "GenerativeModel": "model",
    "Prior": "guide",
    "SVI": "svi",
    "check": "checks",
    "check_pair": "sites",
    "evaluate": "evaluation",
    "evaluate_replicas": "replicas",
    "fit": "fitting",
    "load": "recipes",
    "load_data": "data",
    "to_arviz": "arviz",
}

_MODULES = {
    "checks",
    "conditionals",
    "data",
    "flows",
    "guides",
    "likelihoods",
    "mixtures",
    "models",
    "nn",
    "objectives",
    "plots",
    "pretrained",
    "priors",
    "uses",
}

__all__ = sorted([*_HOMES, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ppl_vae.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"ppl_vae.{name}")
    raise AttributeError(f"module 'ppl_vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
