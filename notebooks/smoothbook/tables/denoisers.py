"""A denoiser from the few settings that a row of a table gives it, and its training.

    {diffusion: SOURCE, lora: 4, calibration: {brier: 1, anti: 0.1}, sigmas: [0.25, 0.5], noise, steps, pad_to}
    {dncnn: {depth: 8, width: 48}, objective: mse, mse: {epochs: 20}}

SOURCE is what `load_diffusion` takes. `lora` puts low-rank adapters into the attention of the UNet, which alone are then
trained; `calibration` are the weights of `Calibration`, and `sigmas` the noise levels it is calibrated for.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from smoothbook.adapters.base import seeded
from smoothbook.denoise.calibrate import Calibration, calibrate
from smoothbook.denoise.chain import DenoisedClassifier, Denoiser
from smoothbook.denoise.diffusion import load_diffusion
from smoothbook.denoise.trained import AFTER, OBJECTIVES, DnCNN, fit_denoiser
from smoothbook.settings import check_keywords, check_type
from smoothbook.training import FitSettings, Fitted
from smoothkit.data import Images
from smoothkit.types import check_sigma

KINDS = ("diffusion", "dncnn")
_OF_DIFFUSION = ("diffusion", "noise", "clamp", "steps", "pad_to", "lora", "calibration", "sigmas")
_OF_DNCNN = ("dncnn", "objective", "mse")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def check_settings(settings: dict[str, Any], *, trained: bool) -> None:
    """Refuse settings that make no denoiser; `trained` says whether one is to be trained.

    Raises
    ------
    ValueError
        Names the setting and what would do.
    """
    kinds = [kind for kind in KINDS if kind in settings]
    if len(kinds) != 1:
        raise ValueError(f"denoiser must have one of the keys {' and '.join(KINDS)}, got {sorted(settings)}")
    known = _OF_DIFFUSION if kinds == ["diffusion"] else _OF_DNCNN
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"denoiser has the unknown key {unknown[0]!r}; of a {kinds[0]} there are {', '.join(known)}")
    if kinds == ["dncnn"]:
        if not trained:
            raise ValueError("a dncnn is trained: give the row the method denoiser")
        check_type("dncnn", dict | None, settings["dncnn"])
        check_keywords("dncnn", DnCNN, settings["dncnn"] or {}, leave_out=("channels", "sigma", "seed"))
        check_type("mse", dict, settings.get("mse", {}))
        if settings.get("objective", "mse") not in [*OBJECTIVES, AFTER]:
            raise ValueError(
                f"objective must be one of {', '.join((*OBJECTIVES, AFTER))}, got {settings['objective']!r}"
            )
        return
    of_diffusion = {"diffusion": str, "noise": str, "clamp": str, "steps": int, "pad_to": int | None, "lora": int}
    for name, kind in of_diffusion.items():
        if name in settings:
            check_type(name, kind, settings[name])
    if trained != ("calibration" in settings):
        raise ValueError(
            "a diffusion model is calibrated by the method denoiser with the key calibration, and not without"
        )
    if trained:
        check_keywords("calibration", Calibration, settings["calibration"])
        Calibration(**settings["calibration"])
        if not settings.get("sigmas") or not isinstance(settings["sigmas"], list):
            raise ValueError("calibration needs sigmas, a list of the noise levels to calibrate for")
        for sigma in settings["sigmas"]:
            check_sigma(sigma)


def make_denoiser(settings: dict[str, Any], *, sigma: float, channels: int, seed: int = 0) -> Denoiser:
    """The denoiser before its training, with `requires_grad` where it will be trained; settings as above."""
    if "dncnn" in settings:
        return DnCNN(channels, sigma=sigma, seed=seed, **(settings["dncnn"] or {}))
    how = {name: settings[name] for name in ("noise", "clamp", "steps", "pad_to") if name in settings}
    denoiser = load_diffusion(settings["diffusion"], sigma=sigma, **how)
    if "lora" in settings:
        put_lora(denoiser.unet, rank=settings["lora"], seed=seed)
    elif "calibration" in settings:
        denoiser.unet.requires_grad_(True)
    return denoiser


def put_lora(unet: torch.nn.Module, *, rank: int, seed: int = 0) -> torch.nn.Module:
    """Low-rank adapters in the attention of a UNet2DModel, in place: they alone have `requires_grad` afterwards."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION), init_lora_weights=True)
    with seeded(seed):
        unet = peft.inject_adapter_in_model(config, unet)
    for name, p in unet.named_parameters():
        p.requires_grad_("lora_" in name)
    return unet


def train_denoiser(
    model: DenoisedClassifier, images: Images, settings: dict[str, Any], how: FitSettings, on_epoch: Callable | None
) -> Fitted:
    """Train the denoiser of a DenoisedClassifier by its settings, in place.

    `how` and `on_epoch` go to `training.fit`. The classifier stays; in `Fitted`, `model` is the whole chain.
    """
    if "dncnn" in settings:
        objective = settings.get("objective", "mse")
        done = fit_denoiser(
            model.denoiser, images, how, objective=objective, classifier=model.classifier, mse=settings.get("mse"),
            on_epoch=on_epoch,
        )  # fmt: skip
        return dataclasses.replace(done, model=model.eval())
    sigmas = tuple(settings["sigmas"])
    # one training serves all sigmas; what is told apart by sigma, the timestep, must not get into its checkpoint
    shared = model.denoiser.at(min(sigmas))
    done = calibrate(
        shared, model.classifier, images, how, sigmas=sigmas, loss=Calibration(**settings["calibration"]),
        on_epoch=on_epoch,
    )  # fmt: skip
    return dataclasses.replace(done, model=model.eval())
