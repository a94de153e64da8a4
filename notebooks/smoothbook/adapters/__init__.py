"""Adapters: few parameters that make a frozen classifier good under noise.

Each takes a BaseClassifier and gives one; `trainable(model)` says what is trained, `model.save(folder)` and
`load(folder, base)` keep it without its base, and refuse another base.
"""

from pathlib import Path

from smoothbook.adapters.base import Adapted, Trainable, set_train_mode, trainable
from smoothbook.adapters.black_box import BlackBox, BlackBoxError, Coordinator, coordinator
from smoothbook.adapters.bottleneck import bottleneck
from smoothbook.adapters.certifying import CertifyingClassifier, PerSigma, certifying, ensemble, per_sigma
from smoothbook.adapters.lora import LoraClassifier, lora
from smoothbook.adapters.prompts import prompts
from smoothkit.models import BaseClassifier

__all__ = [
    "Adapted", "BlackBox", "BlackBoxError", "CertifyingClassifier", "Coordinator", "LoraClassifier", "PerSigma", "Trainable",
    "bottleneck", "certifying", "coordinator", "ensemble", "load", "lora", "per_sigma", "prompts", "set_train_mode",
    "trainable",
]  # fmt: skip


def load(folder: str | Path, base: BaseClassifier) -> "Adapted | PerSigma":
    """Read an adapter of any kind back, on the base it was made for; for a coordinator see `black_box.load`.

    Raises
    ------
    ValueError
        If it was made for another base, or its kind is unknown.
    FileNotFoundError
        If the folder holds no adapter.
    """
    # the functions above have the names of their modules, so these are taken under others
    from importlib import import_module

    from smoothbook.adapters.base import read_config

    modules = {
        "lora": ("lora", "load"),
        "bottleneck": ("bottleneck", "load"),
        "prompts": ("prompts", "load"),
        "certifying": ("certifying", "load"),
        "certifying-ensemble": ("certifying", "load_ensemble"),
        "certifying-per-sigma": ("certifying", "load_per_sigma"),
    }
    kind = read_config(folder, kind_only=True)["kind"]
    if kind not in modules:
        hint = "; use smoothbook.adapters.black_box.load, which wants the black box" if kind == "coordinator" else ""
        raise ValueError(f"{folder} holds an adapter of kind {kind!r}, which load does not know{hint}")
    module, function = modules[kind]
    return getattr(import_module(f"smoothbook.adapters.{module}"), function)(folder, base)
