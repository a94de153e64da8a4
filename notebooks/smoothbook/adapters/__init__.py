"""Adapters: few parameters that make a frozen classifier good under noise.

Each takes a BaseClassifier and gives one; `trainable(model)` says what is trained, `model.save(folder)` and
`load(folder, base)` keep it without its base, and refuse another base.
"""

from smoothbook.adapters.base import Adapted, Trainable, load, set_train_mode, trainable
from smoothbook.adapters.black_box import BlackBox, BlackBoxError, Coordinator, coordinator
from smoothbook.adapters.bottleneck import bottleneck
from smoothbook.adapters.certifying import CertifyingClassifier, PerSigma, certifying, ensemble
from smoothbook.adapters.lora import LoraClassifier, lora
from smoothbook.adapters.prompts import prompts

__all__ = [
    "Adapted", "BlackBox", "BlackBoxError", "CertifyingClassifier", "Coordinator", "LoraClassifier", "PerSigma", "Trainable",
    "bottleneck", "certifying", "coordinator", "ensemble", "load", "lora", "prompts", "set_train_mode", "trainable",
]  # fmt: skip
