"""Training from predictions alone, by simultaneous perturbation (SPSA).

Two evaluations of the loss at opposite random displacements estimate all slopes at once. Both must see the same
images and the same noise. What is displaced makes the difference:

    weights   the decoder's weights, one direction for the batch, and a look-ahead momentum (SPSA-GC, as BlackVIP)
    images    what the box is shown, a direction for each image; the decoder is ours, so the chain rule does the rest

An estimate from k directions in d dimensions has a cosine of about sqrt(k / d) with the gradient. For 2 * 128 queries the
first has one direction in thousands of weights, the second 128 directions in 64 pixels each.

References
----------
Spall, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation", IEEE TAC 1992;
weights: Oh et al., "BlackVIP", CVPR 2023, Section 4.2, arXiv:2303.14773; images: the idea, there on the code of an
autoencoder, of Zhang et al., "How to Robustify Black-Box ML Models? A Zeroth-Order Optimization Perspective", ICLR 2022,
arXiv:2203.14195.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from smoothbook.adapters.base import set_train_mode
from smoothbook.adapters.black_box import BlackBoxError, Coordinator
from smoothbook.training.run import Fitted, Rows, Run, RunSettings, TrainingDiverged
from smoothbook.training.schedules import generator_for
from smoothkit.data import Images


@dataclasses.dataclass(frozen=True)
class SPSA:
    """The settings of simultaneous perturbation; the defaults are those of BlackVIP's code.

    Step i = 1, 2, ... has rate a / (i + o)^alpha and displacement c / i^gamma; `repeats` estimates are averaged, and
    `beta` is the momentum. A step costs 2 * repeats evaluations of the loss. `per` says what is displaced, `weights`
    or `images`; for images c is in pixel units, and the step is Adam's with first decay `beta`. Logits are divided by
    `temperature` in the loss: a network that is sure of its errors has slopes of which a batch says little.
    """

    a: float = 0.01
    c: float = 0.01
    o: float = 1.0
    alpha: float = 0.4
    gamma: float = 0.1
    beta: float = 0.9
    repeats: int = 5
    per: str = "weights"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.per not in {"weights", "images"}:
            raise ValueError(f"per must be weights or images, got {self.per!r}")
        if not (self.a > 0 and self.c > 0):
            raise ValueError(f"a and c must be above 0, got {self.a} and {self.c}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta}")
        if self.o < 0 or self.alpha < 0 or self.gamma < 0:
            raise ValueError(f"o, alpha and gamma must be at least 0, got {self.o}, {self.alpha} and {self.gamma}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")

    def rate(self, i: int) -> float:
        return self.a / (i + self.o) ** self.alpha

    def displacement(self, i: int) -> float:
        return self.c / i**self.gamma


def slopes(
    loss: Callable[[Tensor], float], w: Tensor, *, displacement: float, repeats: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """The simultaneous-perturbation estimate of the gradient at w [d], and the mean loss of the evaluations.

    Each entry of a direction is +-u with u uniform on [0.5, 1]: its inverse moments are finite, which a normal's are not.
    """
    _check_probes(displacement, repeats)
    total, seen = torch.zeros_like(w), 0.0
    for _ in range(repeats):
        direction = _direction(w, generator)
        above, below = loss(w + displacement * direction), loss(w - displacement * direction)
        total += (above - below) / (2 * displacement * direction)
        seen += (above + below) / 2
    return total / repeats, seen / repeats


def _check_probes(displacement: float, repeats: int) -> None:
    if not 1e-30 < displacement < 1e30 or repeats < 1:  # beyond, float32 has nothing to divide by
        raise ValueError(
            f"displacement must lie in (1e-30, 1e30) and repeats at least 1, got {displacement} and {repeats}"
        )


def _direction(like: Tensor, generator: torch.Generator) -> Tensor:
    sign = torch.randint(2, like.shape, generator=generator, device=like.device) * 2 - 1
    return sign * (0.5 + 0.5 * torch.rand(like.shape, generator=generator, device=like.device))


def image_slopes(
    losses: Callable[[Tensor], Tensor],
    shown: Tensor,
    *,
    displacement: float,
    repeats: int,
    generator: torch.Generator,
) -> Tensor:
    """The estimate [B, C, H, W] of each image's gradient of its own loss, where the box sees `shown` clipped to [0, 1].

    `losses` gives one number an image, [B]. A pixel that clipping holds where it is on both sides has slope 0.
    """
    _check_probes(displacement, repeats)
    total = torch.zeros_like(shown)
    for _ in range(repeats):
        direction = displacement * _direction(shown, generator)
        above, below = (shown + direction).clamp(0, 1), (shown - direction).clamp(0, 1)
        rise = (losses(above) - losses(below)).reshape(-1, 1, 1, 1)
        total += torch.where(above == below, 0.0, rise / (2 * direction))
    return total / repeats


def spsa_step(w: Tensor, momentum: Tensor | None, slope: Tensor, *, rate: float, beta: float) -> tuple[Tensor, Tensor]:
    """(w, m) after one step: m <- beta m + g (g at first), w <- w - rate (g + beta m)."""
    momentum = slope if momentum is None else beta * momentum + slope
    return w - rate * (slope + beta * momentum), momentum


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientFreeSettings(RunSettings):
    """How `fit_gradient_free` trains.

    Parameters
    ----------
    steps, batch : int
        Each step asks the box about 2 * spsa.repeats * batch images.
    spsa : SPSA
        What is displaced, how far, and the rates.
    report_every : int
        Steps a row of the history, and a checkpoint where `out` is given.
    validation : float, Images or None
        As in `FitSettings`; asked about at every report, which costs queries too.
    schedule, augment, seed, out, resume, progress, description
        As in `FitSettings`. Where a run goes on the query counter goes on as well.
    """

    steps: int = 500
    spsa: SPSA = SPSA()
    report_every: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.steps, self.batch, self.report_every)
        if min(counts) < 1:
            raise ValueError("steps, batch and report_every must be at least 1, got {}, {} and {}".format(*counts))


def fit_gradient_free(
    coordinator: Coordinator,
    images: Images,
    settings: GradientFreeSettings | None = None,
    *,
    on_report: Callable[[Rows], None] | None = None,
) -> Fitted:
    """Train a coordinator's decoder from the black box's answers, in place.

    Parameters
    ----------
    coordinator : Coordinator
    images : Images
        Labelled training images; a test split is refused.
    settings : GradientFreeSettings, optional
    on_report : callable, optional
        Called with the rows so far.

    Returns
    -------
    Fitted
        With one row a report: step, loss and accuracy on the noisy training images (as displaced),
        validation_loss and validation_accuracy, queries (images asked so far), seconds.

    Raises
    ------
    BlackBoxError
        If the box raises or answers with something else than it was said to; weights are those of the last whole step, and a
        checkpoint is written first where `out` is given.
    TrainingDiverged
        For a NaN or infinite loss.
    """
    if not isinstance(coordinator, Coordinator):
        raise ValueError(
            f"coordinator must be a Coordinator, got {type(coordinator).__name__}; see adapters.coordinator"
        )
    return _GradientFreeRun(coordinator, images, settings or GradientFreeSettings()).train(on_report)


class _GradientFreeRun(Run):
    """Steps along slopes that are estimated from the black box's answers."""

    settings: GradientFreeSettings
    clean_accuracy = False  # each question is paid for

    def __init__(self, model: Coordinator, images: Images, settings: GradientFreeSettings) -> None:
        super().__init__(model, images, settings)
        self.steps, self.row_every, self.spsa = settings.steps, settings.report_every, settings.spsa
        self.momentum: Tensor | None = None  # weights displaced
        self.adam = torch.optim.Adam(self.parameters, betas=(self.spsa.beta, 0.999))  # images displaced

    def train(self, on_row: Callable[[Rows], None] | None = None) -> Fitted:
        try:
            return super().train(on_row)
        except BlackBoxError:
            self.save()
            raise

    # --- a step

    @torch.no_grad()
    def take_step(self) -> dict[str, float]:
        i, seed = self.step + 1, self.settings.seed
        which = torch.randperm(len(self.train_indices), generator=generator_for(seed, "order", i))[: self.batch]
        pixels, labels, _, noise = self.draw(i, self.train_indices[which.numpy()])
        noisy = pixels + noise[0]
        z = self.model.network.encoded(noisy)
        set_train_mode(self.model)
        probes = {
            "displacement": self.spsa.displacement(i), "repeats": self.spsa.repeats,
            "generator": generator_for(seed, "spsa", i, self.device),
        }  # fmt: skip
        move = self._displace_weights if self.spsa.per == "weights" else self._displace_images
        loss, right = move(noisy, z, labels, self.spsa.rate(i), probes)
        return {"loss": loss, "accuracy": right}

    def _displace_weights(
        self, noisy: Tensor, z: Tensor, labels: Tensor, rate: float, probes: dict
    ) -> tuple[float, float]:
        network, start, right = self.model.network, parameters_to_vector(self.parameters), []

        def loss(w: Tensor) -> float:
            vector_to_parameters(w, self.parameters)
            each, share = self._ask(network.prompted(noisy, z), labels)
            right.append(share)
            return float(each.mean())

        try:
            with statistics_held(self.model):
                slope, seen = slopes(loss, start, **probes)
        except BaseException:  # whatever happened, the weights are no half of a step
            vector_to_parameters(start, self.parameters)
            raise
        w, self.momentum = spsa_step(start, self.momentum, slope, rate=rate, beta=self.spsa.beta)
        vector_to_parameters(w, self.parameters)
        network.prompted(noisy, z)  # BatchNorm's statistics move once a step, at the new weights; no query
        return seen, float(np.mean(right))

    def _displace_images(
        self, noisy: Tensor, z: Tensor, labels: Tensor, rate: float, probes: dict
    ) -> tuple[float, float]:
        seen: list[tuple[float, float]] = []

        def losses(images: Tensor) -> Tensor:
            each, share = self._ask(images, labels)
            seen.append((float(each.mean()), share))
            return each

        with torch.enable_grad(), statistics_held(self.model):
            shown = self.model.network.changed(noisy, z)
        slope = image_slopes(losses, shown.detach(), **probes)
        self.adam.zero_grad()
        shown.backward(slope / len(slope))
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.model.network.changed(noisy, z)  # as above
        loss, right = np.mean(seen, axis=0)
        return float(loss), float(right)

    def _ask(self, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """The box's loss on each image [B], and its accuracy."""
        logits = self.model.network.box(images).float()
        each = F.cross_entropy(logits / self.spsa.temperature, labels, reduction="none")
        if not bool(each.isfinite().all()):
            raise TrainingDiverged(
                f"the loss is {float(each.mean())} at step {self.step + 1}, after {self.model.queries:,} queries; the weights "
                f"are those before that step. A smaller a or c may help"
            )
        return each, float((logits.argmax(1) == labels).float().mean())

    # --- rows and checkpoints

    def summary(self) -> str:
        return f"{super().summary()}, {self.model.queries:,} queries"

    def validate(self) -> dict[str, float]:
        return super().validate() | {"queries": self.model.queries}

    def state(self) -> dict[str, Any]:
        optimiser = self.adam.state_dict() if self.spsa.per == "images" else self.momentum
        return super().state() | {"optimiser": optimiser, "queries": (self.model.box.calls, self.model.box.images)}

    def restore(self, kept: dict[str, Any]) -> None:
        super().restore(kept)
        if self.spsa.per == "images":
            self.adam.load_state_dict(kept["optimiser"])
        else:
            self.momentum = kept["optimiser"]
        self.model.box.calls, self.model.box.images = kept["queries"]


@contextlib.contextmanager
def statistics_held(model: nn.Module) -> Iterator[None]:
    """BatchNorm uses the batch but does not move its running statistics, as at displaced weights it must not."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    momenta = [m.momentum for m in layers]
    buffers = [m.num_batches_tracked.clone() if m.num_batches_tracked is not None else None for m in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum, seen in zip(layers, momenta, buffers, strict=True):
            layer.momentum = momentum
            if seen is not None:
                layer.num_batches_tracked.copy_(seen)
