"""Kernels for sampling, voting and certification in randomized smoothing, and readers of what they wrote.

The rooms in the order of their imports: `types`, `kernels`, `records`, `data`, `certify`, `models`, `sampling`, `reading`.
"""

import importlib

from smoothkit.types import ABSTAIN, Certificate, StoppingRule, Votes

__version__ = "0.1.0"

# what brings pandas, SciPy or torch along is imported when it is first asked for: `import smoothkit` is quick
_DOORS = {
    "Purpose": "smoothkit.kernels.philox",
    "Smoothed": "smoothkit.sampling.smoothed",
    "certificates": "smoothkit.certify",
    "data": "smoothkit.data",
    "models": "smoothkit.models",
    "noisy_copies": "smoothkit.kernels.noise",
    "open_record": "smoothkit.records",
    "sequential_rule": "smoothkit.certify",
}
__all__ = ["ABSTAIN", "Certificate", "StoppingRule", "Votes", *_DOORS]


def __getattr__(name: str):
    if name not in _DOORS:
        raise AttributeError(f"module 'smoothkit' has no attribute {name!r}")
    module = importlib.import_module(_DOORS[name])
    return module if module.__name__ == f"smoothkit.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_DOORS])
