"""A diffusion model, called once, as the denoiser in front of a classifier.

A DDPM knows noisy images x_t = sqrt(abar_t) z + sqrt(1 - abar_t) g of z = 2x - 1. Noise of sigma in pixel units is
2 sigma in z, so the image with noise, scaled by sqrt(abar_t), is such an x_t where (1 - abar_t) / abar_t = (2 sigma)^2.
The model's answer at that t gives the clean image in one call.

References
----------
Carlini, Tramèr, Dvijotham, Rice, Sun and Kolter, "(Certified!!) Adversarial Robustness for Free!", ICLR 2023.
arXiv:2206.10550. Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020.
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothbook.denoise.chain import Denoiser
from smoothbook.settings import read_settings
from smoothkit.data import data_dir
from smoothkit.records import read_json
from smoothkit.types import check_sigma

PREDICTIONS = ("epsilon", "sample", "v_prediction")
NOISE = ("exact", "schedule")
CLAMPS = ("hard", "straight-through", "none")
WEIGHTS, WEIGHTS_END = "diffusion_pytorch_model", ("safetensors", "safetensors.index.json")
UNET, SCHEDULER = ("unet", "config.json"), ("scheduler", "scheduler_config.json")
MOST_TIMESTEPS = 100_000


# --- the schedule ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Timestep:
    """A step of a diffusion schedule: its index, abar_t, and the noise it stands for in pixel units."""

    t: int
    alpha_bar: float
    sigma: float


def schedule_sigmas(alphas_bar: np.ndarray) -> np.ndarray:
    """The noise level of every timestep, sqrt((1 - abar_t) / abar_t) / 2, in pixel units on [0, 1]; float64."""
    alphas_bar = np.asarray(alphas_bar, dtype=np.float64)
    inside = alphas_bar.ndim == 1 and alphas_bar.size and ((alphas_bar >= 0) & (alphas_bar <= 1)).all()
    if not inside or (np.diff(alphas_bar) > 0).any():
        raise ValueError(f"alphas_bar must be numbers [T] that fall from 1 to 0, got {alphas_bar.tolist()}"[:300])
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - alphas_bar) / alphas_bar) / 2  # half: the model's images have range 2


def timestep_for(alphas_bar: np.ndarray, sigma: float) -> Timestep:
    """The first timestep that is at least as noisy as sigma.

    Parameters
    ----------
    alphas_bar : float array [T], falling
    sigma : float, pixel units on [0, 1]

    Raises
    ------
    ValueError
        If no step is that noisy; it says how far the schedule reaches.
    """
    check_sigma(sigma)
    levels = schedule_sigmas(alphas_bar)
    reached = np.flatnonzero((levels >= sigma) & np.isfinite(levels))  # at abar = 0 nothing is left of the image
    if not len(reached):
        reach = math.floor(levels[np.isfinite(levels)].max(initial=0.0) * 1e4) / 1e4
        raise ValueError(
            f"the diffusion schedule reaches sigma {reach:g} (pixel units) at most, "
            f"got {sigma:g}; take a smaller sigma or a model with a longer schedule"
        )
    t = int(reached[0])
    return Timestep(t, float(alphas_bar[t]), float(levels[t]))


def alphas_bar_of(scheduler: object) -> np.ndarray:
    """abar_t of a diffusers scheduler, as float64 [T]: the product of its 1 - beta, which it keeps in float32 itself."""
    betas = scheduler.betas.double().numpy()
    if not (betas.ndim == 1 and betas.size and ((betas >= 0) & (betas <= 1)).all()):
        raise ValueError(f"the scheduler's betas must be numbers [T] in [0, 1], got {betas.tolist()}"[:300])
    return np.cumprod(1 - betas)


# --- the denoiser ------------------------------------------------------------------------------------


class DiffusionDenoiser(Denoiser):
    """One-shot denoising with an unconditional diffusion model.

    Parameters
    ----------
    unet : nn.Module
        `unet(x_t, timesteps)` gives a tensor, or an object with `.sample`, of as many channels as x_t, or twice as
        many (a learned variance, which is left out). A diffusers UNet2DModel, usually; see `load_diffusion`.
    alphas_bar : float array [T]
        abar_t of the schedule it was trained with.
    sigma : float
        The noise to remove, pixel units on [0, 1], at the image's own resolution.
    prediction : `epsilon`, `sample` (the clean image) or `v_prediction`
        What the model gives.
    noise : str
        At which level votes are to be drawn, `noise_sigma`. `exact`: at sigma; the model is told the next level of
        the schedule, less than a percent above. `schedule`: at that level, as Carlini et al. do; a certificate then
        holds for it, and all the more for sigma.
    clamp : `hard`, `straight-through` or `none`
        The estimate is clamped to the range of images. A hard clamp passes no gradient where it clamps.
    steps : int
        Calls of the model: 1, or more along a deterministic DDIM path, which costs as many times more and is no better
        for certificates as a rule.
    pad_to : int, optional
        Height and width that smaller images are padded to by reflection, and cropped from afterwards. Padding to a
        multiple of what the model halves is done anyway.
    name : str

    Raises
    ------
    ValueError
        For a sigma that the schedule does not reach, a class-conditional model, or a head of unknown width.
    """

    def __init__(
        self,
        unet: nn.Module,
        alphas_bar: np.ndarray,
        *,
        sigma: float,
        prediction: str = "epsilon",
        noise: str = "exact",
        clamp: str = "hard",
        steps: int = 1,
        pad_to: int | None = None,
        name: str = "diffusion",
    ) -> None:
        for what, value, known in (
            ("prediction", prediction, PREDICTIONS), ("noise", noise, NOISE), ("clamp", clamp, CLAMPS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
        self.alphas_bar = np.asarray(alphas_bar, dtype=np.float64)
        step = timestep_for(self.alphas_bar, sigma)
        super().__init__(sigma=float(sigma), mean=0.5, std=0.5 / math.sqrt(step.alpha_bar), name=f"{name}@{sigma:g}")
        self.step, self.prediction, self.noise, self.clamp, self.pad_to = step, prediction, noise, clamp, pad_to
        self.noise_sigma = float(sigma) if noise == "exact" else step.sigma
        self.unet = unet
        self.channels, self.multiple = _check_unet(unet)
        path = _path(step.t, steps)
        self._path_alphas_bar = [float(self.alphas_bar[t]) for t in path]
        self.register_buffer("timesteps", torch.tensor(path))

    def at(
        self, sigma: float, *, noise: str | None = None, clamp: str | None = None, steps: int | None = None
    ) -> "DiffusionDenoiser":
        """The same model, sharing its weights, for another sigma; other settings stay unless given."""
        return DiffusionDenoiser(
            self.unet, self.alphas_bar, sigma=sigma, prediction=self.prediction, noise=noise or self.noise,
            clamp=clamp or self.clamp, steps=len(self.timesteps) if steps is None else steps, pad_to=self.pad_to,
            name=self.name.rpartition("@")[0],
        )  # fmt: skip

    def estimate(self, rows: Tensor) -> Tensor:
        """Clean images on [0, 1] from x_t, which is (images - mean) / std."""
        x, window = self.pad(rows)
        path = self._path_alphas_bar
        for i, (alpha_bar, following) in enumerate(zip(path, [*path[1:], None], strict=True)):
            clean = self.predict_clean(x, self.timesteps[i], alpha_bar)
            if following is not None:
                epsilon = (x - math.sqrt(alpha_bar) * clean) / math.sqrt(1 - alpha_bar)
                x = math.sqrt(following) * clean + math.sqrt(1 - following) * epsilon
        return (clean[window] + 1) / 2

    def predict(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """What the model says of x_t [B, C, H, W]: its `prediction`, without a learned variance behind it."""
        answer = self.unet(x, timesteps)
        return getattr(answer, "sample", answer)[:, : x.shape[1]]

    def predict_clean(self, x: Tensor, timesteps: Tensor, alpha_bar: Tensor | float) -> Tensor:
        """The clean image z on [-1, 1] from x_t [B, C, H, W]; one timestep, or with alpha_bar [B, 1, 1, 1] one an image."""
        answer = self.predict(x, timesteps)
        keep, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.prediction == "epsilon":
            clean = (x - noise * answer) / keep
        elif self.prediction == "v_prediction":
            clean = keep * x - noise * answer
        else:
            clean = answer
        if self.clamp == "none":
            return clean
        clamped = clean.clamp(-1, 1)
        return clamped if self.clamp == "hard" else clean + (clamped - clean).detach()

    def pad(self, rows: Tensor) -> tuple[Tensor, tuple]:
        """Rows padded by reflection to a size the model takes, and the window in which the images lie."""
        if self.channels is not None and rows.shape[1] != self.channels:
            raise ValueError(f"{self.name} denoises images of {self.channels} channels, got shape {tuple(rows.shape)}")
        window, padding = [...], []
        for size in rows.shape[-2:]:
            missing = math.ceil(max(size, self.pad_to or 0) / self.multiple) * self.multiple - size
            before, after = missing // 2, missing - missing // 2
            if after >= size:
                padded_to = f", padded to {self.pad_to}" if self.pad_to else ""
                raise ValueError(
                    f"{self.name} wants images whose height and width are multiples of {self.multiple}{padded_to}; "
                    f"{tuple(rows.shape[-2:])} is too small to be padded by reflection"
                )
            window.append(slice(before, before + size))
            padding = [before, after, *padding]  # the last axis comes first
        return F.pad(rows, padding, mode="reflect") if any(padding) else rows, tuple(window)

    def extra_repr(self) -> str:
        return (
            f"sigma={self.sigma:g}, noise={self.noise}, t={self.timesteps.tolist()}, prediction={self.prediction}, "
            f"clamp={self.clamp}, pad_to={self.pad_to}"
        )


def _path(t: int, steps: int) -> list[int]:
    """Timesteps from t towards 0, evenly spaced."""
    if steps < 1 or steps > t + 1:
        raise ValueError(f"steps must lie between 1 and {t + 1}, the timesteps up to {t}, got {steps}")
    return [round(t * (steps - i) / steps) for i in range(steps)]


def _check_unet(unet: nn.Module) -> tuple[int | None, int]:
    """Channels of the images, and what their height and width must be multiples of; other modules may take anything."""
    config = getattr(unet, "config", None)
    if config is None:
        return None, 1
    config = dict(config)
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        raise ValueError(
            "the diffusion model is class-conditional: it wants the class that is to be found out; take an unconditional one"
        )
    channels, out = config["in_channels"], config["out_channels"]
    if out not in (channels, 2 * channels):
        raise ValueError(
            f"the diffusion model takes {channels} channels and gives {out}; {channels} are wanted, or {2 * channels} with a "
            f"learned variance"
        )
    return channels, 2 ** (len(config["block_out_channels"]) - 1)


# --- loading -----------------------------------------------------------------------------------------


def load_diffusion(
    source: str | Path,
    *,
    sigma: float,
    prediction: str | None = None,
    noise: str = "exact",
    clamp: str = "hard",
    steps: int = 1,
    pad_to: int | None = None,
    name: str | None = None,
) -> DiffusionDenoiser:
    """A diffusion denoiser from a diffusers pipeline, in eval mode, its weights frozen.

    Parameters
    ----------
    source : str or path
        A folder, `starter:NAME`, or a hub id as `google/ddpm-cifar10-32`. Both layouts are read: `unet/` and
        `scheduler/`, or all files side by side. Weights must be safetensors.
    sigma : float
        See DiffusionDenoiser; `denoiser.at(other)` shares the weights with another sigma.
    prediction : str, optional
        What the scheduler's config says, if not given.
    noise, clamp, steps, pad_to, name : as there; the folder's name if none is given

    Raises
    ------
    FileNotFoundError
        If the folder lacks a part, or the hub cannot be reached.
    ValueError
        For a pickle, a model that is no unconditional UNet2DModel, or a scheduler without a DDPM's betas.
    """
    folder, known_as = _folder_of(source)
    unet_at, scheduler_at = _find_parts(folder)
    unet_config = read_json(unet_at / UNET[1], ValueError)
    kind = unet_config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"{known_as} holds a {kind}; only unconditional pixel models (UNet2DModel) denoise images")
    alphas_bar, predicts = _read_schedule(scheduler_at / SCHEDULER[1], known_as)
    from diffusers import UNet2DModel  # heavy: only where a pipeline is read

    unet = UNet2DModel.from_pretrained(unet_at, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False)
    unet = unet.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    return DiffusionDenoiser(
        unet.requires_grad_(False), alphas_bar, sigma=sigma, prediction=prediction or predicts, noise=noise, clamp=clamp,
        steps=steps, pad_to=pad_to, name=name or known_as,
    ).eval()  # fmt: skip


def _folder_of(source: str | Path) -> tuple[Path, str]:
    text = str(source)
    kind, _, rest = text.partition(":")
    if kind == "starter":
        folder = data_dir() / "starters" / rest
        if not folder.is_dir():
            raise FileNotFoundError(f"no starter {rest!r} in {folder.parent}; run data/make_diffusion.py")
        _check_sha256(folder)
        return folder, rest
    folder = Path(rest if kind == "local-dir" else text).expanduser()
    if folder.is_dir():
        return folder, folder.name
    if kind == "local-dir" or isinstance(source, Path) or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no folder {folder}; give a diffusers pipeline folder, starter:NAME or a hub id ORG/MODEL"
        )
    return _fetch(text), text.rpartition("/")[2]


def _fetch(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [f"{prefix}{name}" for prefix in ("", "unet/") for name in ("config.json", f"{WEIGHTS}*.safetensors*")]
    wanted += ["model_index.json", SCHEDULER[1], "/".join(SCHEDULER)]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=["*fp16*", "*non_ema*"]))
    except Exception as error:  # the hub's errors have many bases
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise FileNotFoundError(
            f"{repository} is not at hand ({reason}); connect to the network once, set HF_HOME to a cache that has it, or "
            f"give a folder"
        ) from None


def _find_parts(folder: Path) -> tuple[Path, Path]:
    """Where the network and the scheduler are; names everything that is missing."""
    unet, scheduler = (
        next((at for at in (folder / sub, folder) if (at / file).is_file()), None) for sub, file in (UNET, SCHEDULER)
    )
    missing = ["/".join(part) for part, at in ((UNET, unet), (SCHEDULER, scheduler)) if at is None]
    if unet is not None and not any((unet / f"{WEIGHTS}.{end}").is_file() for end in WEIGHTS_END):
        pickles = sorted(unet.glob("*.bin")) + sorted(unet.glob("*.pt"))
        if pickles:
            raise ValueError(
                f"{unet} holds a pickle ({pickles[0].name}), which can run code when loaded, and no safetensors; convert it "
                f"once, where you trust it: UNet2DModel.from_pretrained(folder, use_safetensors=False).save_pretrained(folder)"
            )
        missing.append(f"{unet.relative_to(folder) / WEIGHTS}.safetensors")
    if missing:
        raise FileNotFoundError(f"{folder} is no complete diffusers pipeline: it lacks {' and '.join(missing)}")
    return unet, scheduler


def _read_schedule(file: Path, name: str) -> tuple[np.ndarray, str]:
    from diffusers import DDPMScheduler

    config = read_json(file, ValueError)
    if not {"beta_schedule", "trained_betas", "beta_start"} & config.keys():
        raise ValueError(
            f"{name} has the scheduler {config.get('_class_name', 'without a name')}, which has no betas; a variance-preserving "
            f"one (DDPM, DDIM and the like) is needed"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"{name} predicts {prediction!r}; known are {', '.join(PREDICTIONS)}")
    known = {field.name for field in dataclasses.fields(_Betas)}
    betas = read_settings(_Betas, {k: v for k, v in config.items() if k in known}, where=str(file))
    return alphas_bar_of(DDPMScheduler(**dataclasses.asdict(betas))), prediction


@dataclasses.dataclass(frozen=True)
class _Betas:
    """What the betas of a scheduler depend on, with the defaults of diffusers."""

    num_train_timesteps: int = 1_000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    trained_betas: list[float] | None = None
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_train_timesteps <= MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps must lie in 1..{MOST_TIMESTEPS:,}, got {self.num_train_timesteps}")


def _check_sha256(folder: Path) -> None:
    stated = read_json(folder / "card.json", ValueError, sha256=str)["sha256"]
    weights = folder / UNET[0] / f"{WEIGHTS}.safetensors"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != stated:
        raise ValueError(f"{weights} is not the file its card describes; restore it or run data/make_diffusion.py")
