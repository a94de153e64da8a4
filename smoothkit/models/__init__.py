"""A classifier with an identity: timm networks, folders and starters, loaded and known again."""

from smoothkit.models.base import (
    BaseClassifier,
    ModelIdentity,
    evaluating,
    fingerprint,
    identify,
    round_to_half,
    structure,
    wrap,
)
from smoothkit.models.load import load, save_local, starter_card, starters

__all__ = [
    "BaseClassifier", "ModelIdentity", "evaluating", "fingerprint", "identify", "load", "round_to_half", "save_local",
    "starter_card", "starters",
    "structure", "wrap",
]  # fmt: skip
