"""A denoiser from the few settings that a row of a table gives it, and its training.

{diffusion: SOURCE, lora: 4, calibration: {brier: 1, anti: 0.1}, sigmas: [0.25, 0.5], noise, clamp, steps, pad_to}
{dncnn: {depth: 8, width: 48}, objective: mse, mse: {epochs: 20}}
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch

from smoothbook.adapters.base import seeded
from smoothbook.denoise import Calibration, DenoisedClassifier, Denoiser, DnCNN, calibrate, fit_denoiser, load_diffusion
from smoothbook.settings import check_keywords, read_settings
from smoothbook.training import FitSettings, Fitted
from smoothkit.data import Images
from smoothkit.types import check_sigma

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclasses.dataclass(frozen=True)
class DiffusionSettings:
    """A diffusion model in front of the classifier; with `calibration` it is trained, at the noise levels `sigmas`."""

    diffusion: str  # what load_diffusion takes
    noise: str = "exact"
    clamp: str = "hard"
    steps: int = 1
    pad_to: int | None = None
    lora: int | None = None  # rank of adapters in the attention of the UNet, which alone are then trained
    calibration: Calibration | None = None
    sigmas: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.calibration is not None and not self.sigmas:
            raise ValueError("calibration needs sigmas, a list of the noise levels to calibrate for")
        for sigma in self.sigmas:
            check_sigma(sigma)

    def make(self, sigma: float, channels: int, seed: int) -> Denoiser:
        """The denoiser before its training, with `requires_grad` where it will be trained."""
        how = {name: getattr(self, name) for name in ("noise", "clamp", "steps", "pad_to")}
        denoiser = load_diffusion(self.diffusion, sigma=sigma, **how)
        if self.lora is not None:
            put_lora(denoiser.unet, rank=self.lora, seed=seed)
        elif self.calibration is not None:
            denoiser.unet.requires_grad_(True)
        return denoiser

    def train(
        self, chain: DenoisedClassifier, images: Images, how: FitSettings, on_epoch: Callable | None = None
    ) -> Fitted:
        """Calibrate the diffusion model of a chain, in place."""
        # one training serves all sigmas; what is told apart by sigma, the timestep, must not get into its checkpoint
        shared = chain.denoiser.at(min(self.sigmas))
        return calibrate(
            shared, chain.classifier, images, how, sigmas=tuple(self.sigmas), loss=self.calibration, on_epoch=on_epoch
        )


@dataclasses.dataclass(frozen=True)
class DnCNNSettings:
    """A DnCNN, by the keyword arguments in `dncnn`, trained for an objective of `denoise.trained`."""

    dncnn: dict | None
    objective: Literal["mse", "stability", "classification", "stability-after-mse"] = "mse"
    mse: dict | None = None  # settings of the first training of stability-after-mse, where they differ

    def __post_init__(self) -> None:
        check_keywords("dncnn", DnCNN, self.dncnn or {}, leave_out=("channels", "sigma", "seed"))

    def make(self, sigma: float, channels: int, seed: int) -> Denoiser:
        """The denoiser before its training."""
        return DnCNN(channels, sigma=sigma, seed=seed, **(self.dncnn or {}))

    def train(
        self, chain: DenoisedClassifier, images: Images, how: FitSettings, on_epoch: Callable | None = None
    ) -> Fitted:
        """Train the denoiser of a chain, in place."""
        return fit_denoiser(
            chain.denoiser, images, how, objective=self.objective, classifier=chain.classifier, mse=self.mse,
            on_epoch=on_epoch,
        )  # fmt: skip


KINDS = {"diffusion": DiffusionSettings, "dncnn": DnCNNSettings}


def read_denoiser(settings: dict[str, Any], *, trained: bool) -> DiffusionSettings | DnCNNSettings:
    """The settings of a denoiser; `trained` says whether the row trains it.

    Raises
    ------
    ValueError
        If they make no denoiser; it names the setting and what would do.
    """
    kinds = [kind for kind in KINDS if kind in settings]
    if len(kinds) != 1:
        raise ValueError(f"denoiser must have one of the keys {' and '.join(KINDS)}, got {sorted(settings)}")
    if kinds == ["dncnn"] and not trained:
        raise ValueError("a dncnn is trained: give the row the method denoiser")
    if kinds == ["diffusion"] and trained != (settings.get("calibration") is not None):
        raise ValueError(
            "a diffusion model is calibrated by the method denoiser with the key calibration, and not without"
        )
    return read_settings(KINDS[kinds[0]], settings, where="denoiser")


def put_lora(unet: torch.nn.Module, *, rank: int, seed: int = 0) -> torch.nn.Module:
    """Low-rank adapters in the attention of a UNet2DModel, in place: they alone have `requires_grad` afterwards."""
    import peft  # takes seconds, and few rows want it

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION), init_lora_weights=True)
    with seeded(seed):
        unet = peft.inject_adapter_in_model(config, unet)
    for name, p in unet.named_parameters():
        p.requires_grad_("lora_" in name)
    return unet
