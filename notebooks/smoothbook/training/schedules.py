"""What an image goes through before the network sees it in training: augmentation, a sigma of its own, noise last.

A schedule draws one sigma an image. `progress` is the share of the training done, from 0 to 1. All draws come
from a torch generator handed in; `fit` seeds a new one for every step from (seed, what for, step), so that nothing
need be remembered to go on after an interruption. These generators have nothing in common with the
counters of `smoothkit.kernels.noise`, which certification draws from: on a CPU they are Mersenne twisters, and a CUDA
generator is Philox with a last counter word of 0, where every purpose but TRAIN has another value.
"""

import dataclasses
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from smoothkit.types import check_sigma

Schedule = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The same sigma for every image; 0 is clean training."""

    sigma: float

    def __post_init__(self) -> None:
        _check_sigma("sigma", self.sigma)

    def __call__(self, n: int, *, progress: float, generator: torch.Generator) -> Tensor:
        return torch.full((n,), float(self.sigma), device=generator.device)


@dataclasses.dataclass(frozen=True)
class Grid:
    """One of several sigmas; `balanced` puts equally many images of each into every batch (the lowest variance)."""

    sigmas: tuple[float, ...]
    balanced: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        if not self.sigmas:
            raise ValueError("sigmas must not be empty; give several, as (0, 0.25, 0.5, 1)")
        for sigma in self.sigmas:
            _check_sigma("sigmas", sigma)

    def __call__(self, n: int, *, progress: float, generator: torch.Generator) -> Tensor:
        device, k = generator.device, len(self.sigmas)
        if self.balanced:  # a shuffled deck; who is left over when k does not divide n is drawn as well
            start = torch.randint(k, (), generator=generator, device=device)
            which = (torch.arange(n, device=device) + start) % k
            which = which[torch.randperm(n, generator=generator, device=device)]
        else:
            which = torch.randint(k, (n,), generator=generator, device=device)
        return torch.tensor(self.sigmas, device=device)[which]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Sigma uniform between `low` and `high`."""

    high: float
    low: float = 0.0

    def __post_init__(self) -> None:
        _check_sigma("low", self.low)
        _check_sigma("high", self.high)
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got low={self.low}, high={self.high}")

    def __call__(self, n: int, *, progress: float, generator: torch.Generator) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(n, generator=generator, device=generator.device)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Clean with probability `clean_share`, otherwise as `noisy` says: the mixture of noise pretraining."""

    clean_share: float
    noisy: Schedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "noisy", parse(self.noisy))
        if not 0 <= self.clean_share <= 1:
            raise ValueError(f"clean_share must lie in [0, 1], got {self.clean_share}")

    def __call__(self, n: int, *, progress: float, generator: torch.Generator) -> Tensor:
        sigma = self.noisy(n, progress=progress, generator=generator)
        clean = torch.rand(n, generator=generator, device=generator.device) < self.clean_share
        return torch.where(clean, torch.zeros_like(sigma), sigma)


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Another schedule's sigmas, scaled from `start` to 1 over the first share `over` of the training."""

    target: Schedule
    start: float = 0.25
    over: float = 1 / 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", parse(self.target))
        if not 0 <= self.start <= 1:
            raise ValueError(f"start must lie in [0, 1], a factor on sigma, got {self.start}")
        if not 0 < self.over <= 1:
            raise ValueError(f"over must lie in (0, 1], a share of the training, got {self.over}")

    def __call__(self, n: int, *, progress: float, generator: torch.Generator) -> Tensor:
        factor = self.start + (1 - self.start) * min(1.0, progress / self.over)
        return factor * self.target(n, progress=progress, generator=generator)


def parse(schedule: "Schedule | float | str") -> Schedule:
    """A schedule from a number or a line of a preset.

    A number is a fixed sigma. Lines: `clean`, `fixed:0.25`, `grid:0,0.25,0.5,1`, `uniform:1` or `uniform:0.1:1`,
    `mix:0.25:1` (a quarter clean, else uniform up to 1) or `mix:0.25:grid:0.25,0.5`, and
    `curriculum:fixed:0.5` in front of any of them.
    """
    if callable(schedule):
        return schedule
    if isinstance(schedule, int | float) and not isinstance(schedule, bool):
        return Fixed(float(schedule))
    remedy = "use clean, fixed:0.25, grid:0,0.25,0.5, uniform:1, mix:0.25:1, or curriculum: before one of them"
    if not isinstance(schedule, str):
        raise ValueError(f"schedule must be a number, a line or a schedule, got {schedule!r}; {remedy}")
    kind, _, rest = schedule.partition(":")
    try:
        if kind == "clean" and not rest:
            return Fixed(0.0)
        if kind == "fixed":
            return Fixed(float(rest))
        if kind == "grid":
            return Grid(tuple(float(s) for s in rest.split(",")))
        if kind == "uniform":
            low, two, high = rest.rpartition(":")
            return Uniform(float(high), low=float(low) if two else 0.0)
        if kind == "curriculum" and rest:
            return Curriculum(parse(rest))
        if kind == "mix":
            share, _, noisy = rest.partition(":")
            return Mixture(float(share), parse(noisy) if ":" in noisy else Uniform(float(noisy)))
    except ValueError as error:
        raise ValueError(f"cannot read schedule {schedule!r} ({error}); {remedy}") from None
    raise ValueError(f"unknown schedule {schedule!r}; {remedy}")


def draw_noise(
    images: Tensor, sigma: Tensor, *, copies: int = 1, grid: int | None = None, generator: torch.Generator
) -> Tensor:
    """Noise [copies, B, C, H, W] for images [B, C, H, W], of standard deviation sigma [B], pixel units.

    Add it last and do not clip: noise that is mixed, cut out or clipped afterwards is weaker than what is certified.
    `grid` rounds it to multiples of 1/grid, as certification does where the data set declares a grid.
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    if grid is not None and grid < 1:
        raise ValueError(f"grid must be a number of steps of at least 1, or None for float noise, got {grid}")
    shape = (copies, *images.shape)
    noise = torch.randn(shape, generator=generator, device=images.device) * sigma.reshape(1, -1, 1, 1, 1)
    return noise if grid is None else (noise * grid).round() / grid


def crop_and_flip(images: Tensor, generator: torch.Generator, *, pad: int = 4, flip: bool = True) -> Tensor:
    """Shift each image by up to `pad` pixels (black beyond the edge) and mirror half of them; values keep their grid."""
    if pad < 0:
        raise ValueError(f"pad must be at least 0 pixels, got {pad}")
    n, _, height, width = images.shape
    device = images.device
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator, device=device)
    rows = (top + torch.arange(height, device=device))[:, None, :, None]
    columns = left + torch.arange(width, device=device)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    channels = torch.arange(images.shape[1], device=device)[None, :, None, None]
    return padded[torch.arange(n, device=device)[:, None, None, None], channels, rows, columns[:, None, None, :]]


def generator_for(seed: int, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by a digest of (seed, purpose, step): equal again after an interruption."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, purpose, step))


def derived_seed(seed: int, purpose: str, step: int) -> int:
    digest = hashlib.blake2b(f"smoothkit.training:{seed}:{purpose}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch wants a signed 64-bit seed


def _check_sigma(name: str, sigma: float) -> None:
    if not sigma >= 0:
        raise ValueError(f"{name} must be at least 0, in pixel units on [0, 1], got {sigma}")
    if sigma > 0:  # 0 is clean training
        check_sigma(sigma, name)
