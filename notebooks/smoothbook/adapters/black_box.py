"""The coordinator: an image is changed before it reaches a black box, of which only answers are seen.

    z    = e(x)                      a frozen encoder of one's own, [B, dim]
    h(x) = decoder([z ; trigger])    an image made from z and a learned vector
    F(x) = box( clip(x + strength h(x), 0, 1) )

Decoder and trigger are trained by `training.gradient_free`. The coordinator reads the noisy image, so F is one
deterministic function of it, and what is certified is F.

References
----------
Oh et al., "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning", CVPR 2023. arXiv:2303.14773; on noisy
images: Fu and Wang, "Certified PEFTSmoothing", 2024.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from smoothbook.adapters.base import Adapted, base_identity, check_base, device_of, frozen_copy, loads, seeded
from smoothbook.adapters.certifying import Features
from smoothbook.settings import check_keywords
from smoothkit.models import BaseClassifier, identify

KIND = "coordinator"
SEES = ("features", "pixels", "both")


class BlackBoxError(RuntimeError):
    """The black box raised, or gave an answer that cannot be used."""


class BlackBox:
    """A callable of images [B, C, H, W] on [0, 1], asked without gradients; counts what it is asked.

    Parameters
    ----------
    ask : callable
        Returns a tensor [B, K]. A module is put into eval mode; it is neither moved nor saved. Anything that takes a
        tensor will do, as a function that calls a remote service.
    returns : `logits` or `probabilities`
        What it returns. Certification only needs the largest entry; training needs to know, since a softmax of
        probabilities is nearly flat. Labels alone are not enough.
    model_id : str, optional
        A name that changes when the black box does; needed unless it is a module.
    """

    def __init__(
        self, ask: Callable[[Tensor], Tensor], *, returns: str = "logits", model_id: str | None = None
    ) -> None:
        if returns not in {"logits", "probabilities"}:
            raise ValueError(f"returns must be logits or probabilities, got {returns!r}")
        identity = identify(ask, model_id)  # refuses what is not callable, or has no name
        self.ask = ask.eval() if isinstance(ask, nn.Module) else ask
        self.returns, self.name, self.fingerprint = returns, identity.name, identity.fingerprint
        self.calls, self.images = 0, 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, K]; probabilities become their logarithms."""
        self.calls, self.images = self.calls + 1, self.images + len(images)
        try:
            answer = self.ask(images)
        except Exception as error:
            raise BlackBoxError(
                f"the black box {self.name!r} raised {type(error).__name__} ({error}) on images of shape "
                f"{tuple(images.shape)}, after {self.images - len(images):,} answered queries"
            ) from error
        return self._logits(answer, len(images))

    def _logits(self, answer: Tensor, batch: int) -> Tensor:
        who = f"the black box {self.name!r}"
        if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != batch or not answer.is_floating_point():
            found = f"{tuple(answer.shape)} {answer.dtype}" if isinstance(answer, Tensor) else type(answer).__name__
            raise BlackBoxError(
                f"{who} must return floats [{batch}, num_classes], logits or probabilities; got {found}"
            )
        said, seen = self.returns == "probabilities", looks_like_probabilities(answer)
        if said and not seen:
            raise BlackBoxError(
                f"{who} was said to return probabilities, but its rows are not on [0, 1] with sum 1 "
                f"(values from {float(answer.min()):.4g} to {float(answer.max()):.4g}); give returns='logits'"
            )
        if seen and not said:
            raise BlackBoxError(
                f"{who} seems to return probabilities (rows on [0, 1] with sum 1), not logits; a second "
                f"softmax would flatten them: give returns='probabilities'"
            )
        return answer.clamp_min(1e-12).log() if said else answer


def looks_like_probabilities(answer: Tensor) -> bool:
    """Whether all rows lie on [0, 1] and sum to 1, up to 1e-3; rows of NaN say nothing."""
    rows = answer[~answer.isnan().any(1)]
    if not len(rows):
        return False
    return bool((rows >= 0).all() and (rows <= 1 + 1e-3).all() and ((rows.sum(1) - 1).abs() < 1e-3).all())


class Decoder(nn.Module):
    """Features and trigger -> an image [B, channels, H, W], by transposed convolutions that double the side.

    Each step but the last is a grouped 2x2 stride-2 transposed convolution, a 1x1 convolution without bias, BatchNorm and
    GELU; the last is a plain 2x2 stride-2 transposed convolution, which starts at zero so that nothing is
    changed at first (the released code starts at random).
    """

    def __init__(
        self, dim: int, image_shape: tuple[int, int, int], *, cube: int, widths: tuple[int, ...] | None
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        steps = _doublings(height, width, len(widths) + 1 if widths is not None else None)
        self.cube_shape = (cube, height >> steps, width >> steps)
        numbers = cube * self.cube_shape[1] * self.cube_shape[2]
        if numbers <= dim:
            raise ValueError(
                f"cube={cube} gives {numbers} numbers of {self.cube_shape[1]}x{self.cube_shape[2]}, no room for the encoder's {dim} "
                f"and a trigger; give cube={dim // (numbers // cube) + 1} or more"
            )
        self.trigger = nn.Parameter(torch.empty(numbers - dim).uniform_(0, 0.1))
        layers: list[nn.Module] = []
        before = cube
        for middle, out in _decoder_widths(steps) if widths is None else [(w, w) for w in widths]:
            groups = _common_groups(before, middle)
            layers += [
                nn.ConvTranspose2d(before, middle, 2, 2, groups=groups), nn.Conv2d(middle, out, 1, bias=False),
                nn.BatchNorm2d(out), nn.GELU(),
            ]  # fmt: skip
            before = out
        last = nn.ConvTranspose2d(before, channels, 2, 2, bias=False)
        nn.init.zeros_(last.weight)
        self.body = nn.Sequential(*layers, last)

    def forward(self, z: Tensor) -> Tensor:
        cube = torch.cat([z, self.trigger.expand(len(z), -1).to(z.dtype)], dim=1)
        return self.body(cube.unflatten(1, self.cube_shape))


def _doublings(height: int, width: int, wanted: int | None) -> int:
    """Halve the sides while they stay even, down to 4 or an odd number, twice if possible: 224 is 7 doubled five times."""
    steps = 0
    while (
        height % 2 == 0
        and width % 2 == 0
        and (steps < wanted if wanted is not None else min(height, width) > 4 or steps < 2)
    ):
        height, width, steps = height // 2, width // 2, steps + 1
    if steps == 0 or (wanted is not None and steps < wanted):
        raise ValueError(f"the image's sides must be divisible by 2 for each of {wanted or 1} steps of the decoder")
    return steps


def _decoder_widths(steps: int) -> list[tuple[int, int]]:
    """(grouped, 1x1) channels of each step but the last; for 224 pixels BlackVIP's 9,120 parameters with cube 32."""
    return [(64, 64), (64, 32), (32, 32), (32, 16)][-(steps - 1) :] if steps > 1 else []


def _common_groups(a: int, b: int) -> int:
    return next(g for g in range(min(a, b), 0, -1) if a % g == 0 and b % g == 0)


class Code(nn.Module):
    """What the decoder gets to know of an image: the encoder's features, the image shrunk to at most 8x8, or both."""

    def __init__(self, encoder: nn.Module, sees: str) -> None:
        super().__init__()
        self.encoder, self.sees = encoder, sees

    def forward(self, images: Tensor) -> Tensor:
        height, width = (min(8, side) for side in images.shape[-2:])
        shrunk = nn.functional.adaptive_avg_pool2d(images, (height, width)).flatten(1)
        return shrunk if self.sees == "pixels" else torch.cat([self.encoder(images), shrunk], dim=1)


class CoordinatorNetwork(nn.Module):
    """box(clip(x + strength * decoder(encoder(x)))); the box is no submodule, its weights are not ours."""

    def __init__(self, box: BlackBox, encoder: nn.Module, decoder: Decoder, strength: float) -> None:
        super().__init__()
        object.__setattr__(self, "box", box)
        self.encoder, self.decoder, self.strength = encoder, decoder, strength

    def encoded(self, images: Tensor) -> Tensor:
        """The frozen encoder's features; training computes them once a step."""
        with torch.no_grad():
            return self.encoder(images)

    def changed(self, images: Tensor, z: Tensor | None = None) -> Tensor:
        """Images plus the decoder's, not yet clipped: where this is differentiable, all that is ours ends."""
        return images + self.strength * self.decoder(self.encoded(images) if z is None else z)

    def prompted(self, images: Tensor, z: Tensor | None = None) -> Tensor:
        """What the black box gets to see."""
        return self.changed(images, z).clamp(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.box(self.prompted(images))

    def extra_repr(self) -> str:  # part of a record's fingerprint
        return f"box={self.box.name} {self.box.fingerprint}, strength={self.strength}"


class Coordinator(Adapted):
    """A black box behind a coordinator, as a base classifier; `box` counts the queries."""

    @property
    def box(self) -> BlackBox:
        return self.network.box

    @property
    def queries(self) -> int:
        """Images the black box was asked about so far."""
        return self.box.images


def coordinator(
    box: BlackBox | Callable[[Tensor], Tensor],
    encoder: BaseClassifier | nn.Module,
    *,
    image_shape: tuple[int, int, int],
    sees: str = "features",
    strength: float = 0.5,
    cube: int = 32,
    widths: tuple[int, ...] | None = None,
    returns: str = "logits",
    model_id: str | None = None,
    class_names: tuple[str, ...] = (),
    seed: int = 0,
) -> Coordinator:
    """A coordinator in front of a black box.

    Parameters
    ----------
    box : BlackBox or callable
        Images [B, C, H, W] on [0, 1] to logits or probabilities [B, K]; see BlackBox for `returns` and `model_id`.
    encoder : BaseClassifier or nn.Module
        Frozen. Of a BaseClassifier the features before its head are taken; a module must give [B, dim].
    image_shape : (C, H, W)
        H and W even.
    sees : `features`, `pixels` or `both`
        What the decoder makes its image from: the encoder's features, as in BlackVIP; the image itself, shrunk to at most
        8x8, where features made for clean images say little of noisy ones; or both.
    strength : float
        In front of the decoder's image; BlackVIP takes 0.2 to 1.
    cube : int
        Channels of the small image that encoder and trigger are laid out as; the trigger fills what the encoder leaves.
    widths : tuple of int, optional
        Channels of the decoder's steps but the last; by default as in BlackVIP, fewer for small images.
    seed : int
        For decoder and trigger.

    Raises
    ------
    ValueError
        For a box that is not callable or has no name, an encoder that does not give vectors, or a cube too small.
    """
    if not isinstance(box, BlackBox):
        box = BlackBox(box, returns=returns, model_id=model_id)
    if not 0 < strength < math.inf:
        raise ValueError(f"strength must be above 0, got {strength}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be channels, height and width, each at least 1, got {image_shape}")
    if cube < 1 or any(w < 1 for w in widths or ()):
        raise ValueError(f"cube and widths must be at least 1, got {cube} and {widths}")
    if sees not in SEES:
        raise ValueError(f"sees must be one of {', '.join(SEES)}, got {sees!r}")
    base = encoder if isinstance(encoder, BaseClassifier) else BaseClassifier(encoder)
    frozen = Features(encoder) if isinstance(encoder, BaseClassifier) else frozen_copy(base).network.eval()
    identity = (
        f"{base_identity(base, 'trained' if isinstance(encoder, BaseClassifier) else 'frozen')}:{box.fingerprint}"
    )
    blank = torch.zeros(2, *image_shape, device=device_of(base))
    with torch.no_grad():
        z = frozen(blank)
        if z.ndim != 2:
            raise ValueError(f"the encoder must give vectors [B, dim], got shape {tuple(z.shape)}")
        if sees != "features":
            frozen = Code(frozen, sees)
            z = frozen(blank)
    with seeded(seed):
        decoder = Decoder(z.shape[1], tuple(image_shape), cube=cube, widths=widths)
    settings = dict(
        image_shape=list(image_shape), sees=sees, strength=strength, cube=cube, widths=widths and list(widths)
    )
    made = Coordinator(
        CoordinatorNetwork(box, frozen, decoder, strength), base, kind=KIND, settings=settings,
        own=("network.decoder.",), base_fingerprint=identity, class_names=class_names, raw=True,
    )  # fmt: skip
    made.base_name, made.name = box.name, f"{box.name}+{KIND}"
    return made


@loads(KIND)
def _load(config: dict, encoder: BaseClassifier | nn.Module, folder: Path, given: dict) -> Coordinator:
    if given["box"] is None:
        raise ValueError(
            f"{folder} holds a coordinator; give box=, the black box it was made for, and its encoder as base"
        )
    check_keywords(f"{folder}: settings", coordinator, config["settings"])
    widths = config["settings"].get("widths")
    settings = {**config["settings"], "widths": widths and tuple(widths)}
    made = coordinator(given["box"], encoder, **settings, class_names=tuple(config["class_names"]))
    check_base(config, made.base_fingerprint, made, folder)
    return made.load_weights(folder)
