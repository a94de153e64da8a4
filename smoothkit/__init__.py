"""Kernels for sampling, voting and certification in randomized smoothing."""

from smoothkit.types import ABSTAIN, Certificate, StoppingRule, Votes

__version__ = "0.1.0"
__all__ = ["ABSTAIN", "Certificate", "Smoothed", "StoppingRule", "Votes", "data", "models"]

_MODULES = {
    "adapters", "attacks", "bounds", "certify", "data", "denoise", "logs", "models", "noise", "plots", "records", "report",
    "rows", "sigma", "training", "votes",
}  # fmt: skip
_LAZY = {"Smoothed": "smoothkit.certify.smoothed"}


def __getattr__(name: str):
    """Torch is imported when first asked for: `import smoothkit` is quick."""
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"smoothkit.{name}")
    raise AttributeError(f"module 'smoothkit' has no attribute {name!r}")
