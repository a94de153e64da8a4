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
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import smoothbook.training.common as common
from smoothbook.adapters.base import device_of, set_train_mode, trainable
from smoothbook.adapters.black_box import BlackBoxError, Coordinator
from smoothbook.training.schedules import Schedule, draw_noise, generator_for, parse
from smoothkit.data import Images
from smoothkit.sampling.progress import say


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


def minimise(
    loss: Callable[[Tensor], float], w: Tensor, *, steps: int, spsa: SPSA | None = None, seed: int = 0
) -> Tensor:
    """Descend on any function of a vector; `fit_gradient_free` is this on a coordinator's weights."""
    spsa, momentum = spsa or SPSA(), None
    for i in range(1, steps + 1):
        generator = generator_for(seed, "spsa", i, w.device)
        slope, _ = slopes(loss, w, displacement=spsa.displacement(i), repeats=spsa.repeats, generator=generator)
        w, momentum = spsa_step(w, momentum, slope, rate=spsa.rate(i), beta=spsa.beta)
    return w


def fit_gradient_free(
    coordinator: Coordinator,
    images: Images,
    *,
    schedule: Schedule | float | str = 0.25,
    steps: int = 500,
    batch: int = 128,
    spsa: SPSA | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    validation: float | Images | None = None,
    report_every: int = 25,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_report: Callable[[list[dict[str, Any]]], None] | None = None,
) -> common.Fitted:
    """Train a coordinator's decoder from the black box's answers, in place.

    Parameters
    ----------
    coordinator : Coordinator
    images : Images
        Labelled training images; a test split is refused.
    schedule, augment, seed
        As in `fit`.
    steps, batch : int
        Each step asks the box about 2 * spsa.repeats * batch images.
    spsa : SPSA, optional
        What is displaced, how far, and the rates.
    validation : float, Images or None
        As in `fit`; asked about at every report, which costs queries too.
    report_every : int
        Steps a row of the history, and a checkpoint where `out` is given.
    out, resume
        Folder for checkpoints; go on from there. The query counter goes on as well.
    on_report : callable, optional
        Called with the rows so far.

    Returns
    -------
    Fitted
        With one row a report: step, loss and accuracy on the noisy training images (as displaced),
        queries (images asked so far), seconds, and validation_loss and validation_accuracy.

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
    if steps < 1 or batch < 1 or report_every < 1:
        raise ValueError(f"steps, batch and report_every must be at least 1, got {steps}, {batch} and {report_every}")
    run = _Run(coordinator, images, parse(schedule), steps, batch, spsa or SPSA(), augment, validation, seed, out)
    run.start(resume)
    name = f"training {coordinator.name}"
    with common.TrainingProgress(steps * run.batch, name, show=progress) as bar, common.Interrupt() as interrupt:
        bar.update(run.step * run.batch)
        try:
            while run.step < steps and not interrupt.asked:
                run.train_step()
                bar.note(run.summary())
                bar.update(run.batch)
                if run.step % report_every == 0 or run.step == steps:
                    run.report()
                    interrupt.call(on_report, run.rows)
        except BlackBoxError:
            run.save()
            raise
        finally:
            run.close()
    if interrupt.asked:
        run.save()
        say(f"interrupted after step {run.step} of {steps}, {coordinator.queries:,} queries")
    return common.Fitted(
        coordinator.eval(), run.rows, trainable(coordinator), run.step, run.seconds, interrupt.asked, run.out
    )


class _Run:
    """The state of one gradient-free training."""

    def __init__(self, model, images, schedule, steps, batch, spsa, augment, validation, seed, out) -> None:
        self.model, self.schedule, self.spsa, self.augment, self.seed = model, schedule, spsa, augment, seed
        self.out = None if out is None else Path(out)
        self.device, self.grid, self.steps = (
            device_of(model),
            images.grid if isinstance(images, Images) else None,
            steps,
        )
        self.train_indices, (self.validated, self.validation_indices) = common.split_images(images, validation, seed)
        self.batch = min(batch, len(self.train_indices))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.momentum: Tensor | None = None  # weights displaced
        self.adam = torch.optim.Adam(self.parameters, betas=(self.spsa.beta, 0.999))  # images displaced
        self.step, self.rows, self.seconds, self.sums = 0, [], 0.0, [0, 0.0, 0.0]
        self.images = images
        by_share = isinstance(validation, float | int) or validation is None
        self.identity = json.loads(json.dumps({
            "steps": steps, "batch": self.batch, "spsa": repr(spsa), "schedule": common.describe(schedule), "seed": seed,
            "augment": common.describe(augment), "images": f"{images.name} ({common.ids_digest(images)})",
            "validation": validation if by_share else f"{validation.name} ({common.ids_digest(validation)})",
            "coordinator": [model.base_fingerprint, model.settings],
        }))  # fmt: skip

    def start(self, resume: bool) -> None:
        found = None if self.out is None else common.find_checkpoint(self.out)
        if found is not None and not resume:
            raise ValueError(f"{self.out} holds a checkpoint of an earlier run; give resume=True or another folder")
        if found is not None:
            self._restore(found)
        self.pixels = common.Pixels(self.images, self.device)
        shared = self.validated is self.images
        fresh = None if self.validated is None or shared else common.Pixels(self.validated, self.device)
        self.validation_pixels = self.pixels if shared else fresh

    def close(self) -> None:
        self.pixels.close()
        if self.validation_pixels is not None:
            self.validation_pixels.close()

    # --- a step

    @torch.no_grad()
    def train_step(self) -> None:
        began, i = time.perf_counter(), self.step + 1
        noisy, labels = self._noisy_batch(i)
        z = self.model.network.encoded(noisy)
        set_train_mode(self.model)
        generator = generator_for(self.seed, "spsa", i, self.device)
        step = self._displace_weights if self.spsa.per == "weights" else self._displace_images
        seen, right = step(i, noisy, z, labels, generator)
        self.sums = [self.sums[0] + 1, self.sums[1] + seen, self.sums[2] + right]
        self.step += 1
        self.seconds += time.perf_counter() - began

    def _displace_weights(self, i: int, noisy: Tensor, z: Tensor, labels: Tensor, generator) -> tuple[float, float]:
        network, start, right = self.model.network, parameters_to_vector(self.parameters), []

        def loss(w: Tensor) -> float:
            vector_to_parameters(w, self.parameters)
            each, share = self._ask(i, network.prompted(noisy, z), labels)
            right.append(share)
            return float(each.mean())

        try:
            with statistics_held(self.model):
                slope, seen = slopes(
                    loss, start, displacement=self.spsa.displacement(i), repeats=self.spsa.repeats, generator=generator
                )
        except BaseException:  # whatever happened, the weights are no half of a step
            vector_to_parameters(start, self.parameters)
            raise
        w, self.momentum = spsa_step(start, self.momentum, slope, rate=self.spsa.rate(i), beta=self.spsa.beta)
        vector_to_parameters(w, self.parameters)
        network.prompted(noisy, z)  # BatchNorm's statistics move once a step, at the new weights; no query
        return seen, float(np.mean(right))

    def _displace_images(self, i: int, noisy: Tensor, z: Tensor, labels: Tensor, generator) -> tuple[float, float]:
        seen: list[tuple[float, float]] = []

        def losses(images: Tensor) -> Tensor:
            each, share = self._ask(i, images, labels)
            seen.append((float(each.mean()), share))
            return each

        with torch.enable_grad(), statistics_held(self.model):
            shown = self.model.network.changed(noisy, z)
        slope = image_slopes(
            losses,
            shown.detach(),
            displacement=self.spsa.displacement(i),
            repeats=self.spsa.repeats,
            generator=generator,
        )
        self.adam.zero_grad()
        shown.backward(slope / len(slope))
        self.adam.param_groups[0]["lr"] = self.spsa.rate(i)
        self.adam.step()
        self.model.network.changed(noisy, z)  # as above
        loss, right = np.mean(seen, axis=0)
        return float(loss), float(right)

    def _ask(self, i: int, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """The box's loss on each image [B], and its accuracy."""
        logits = self.model.network.box(images).float()
        each = F.cross_entropy(logits / self.spsa.temperature, labels, reduction="none")
        if not bool(each.isfinite().all()):
            raise common.TrainingDiverged(
                f"the loss is {float(each.mean())} at step {i}, after {self.model.queries:,} queries; the weights are those "
                f"before that step. A smaller a or c may help"
            )
        return each, float((logits.argmax(1) == labels).float().mean())

    def _noisy_batch(self, i: int) -> tuple[Tensor, Tensor]:
        generator = generator_for(self.seed, "noise", i, self.device)
        which = torch.randperm(len(self.train_indices), generator=generator_for(self.seed, "order", i))[: self.batch]
        pixels, labels = self.pixels.batch(self.train_indices[which.numpy()], None)
        if self.augment is not None:
            pixels = self.augment(pixels, generator)
        sigma = self.schedule(len(pixels), progress=(i - 1) / self.steps, generator=generator).to(self.device)
        return pixels + draw_noise(pixels, sigma, grid=self.grid, generator=generator)[0], labels

    def summary(self) -> str:
        n = max(1, self.sums[0])
        return f"loss {self.sums[1] / n:.3f}, accuracy {self.sums[2] / n:.1%}, {self.model.queries:,} queries"

    # --- a report

    def report(self) -> None:
        n, loss, accuracy = self.sums
        row = {"step": self.step, "loss": loss / max(1, n), "accuracy": accuracy / max(1, n)} | self._validate()
        self.rows = [*self.rows, {**row, "queries": self.model.queries, "seconds": self.seconds}]
        self.sums = [0, 0.0, 0.0]
        self.save()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        if self.validation_pixels is None:
            return {}
        indices, loss, right = self.validation_indices, 0.0, 0
        set_train_mode(self.model, False)
        for low in range(0, len(indices), self.batch):
            pixels, labels = self.validation_pixels.batch(indices[low : low + self.batch], None)
            generator = generator_for(self.seed, "validation", low, self.device)
            sigma = self.schedule(len(pixels), progress=1.0, generator=generator).to(self.device)
            logits = self.model(pixels + draw_noise(pixels, sigma, grid=self.grid, generator=generator)[0]).float()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
        return {"validation_loss": loss / len(indices), "validation_accuracy": right / len(indices)}

    # --- checkpoints

    def save(self) -> None:
        if self.out is None:
            return
        state = {
            "step": self.step, "seconds": self.seconds, "rows": self.rows, "sums": self.sums, "identity": self.identity,
            "queries": [self.model.box.calls, self.model.box.images],
        }  # fmt: skip
        tensors = {"weights": common.moving_tensors(self.model)}
        if self.spsa.per == "images":
            optimiser = {"adam": self.adam.state_dict()}
        else:
            optimiser = {} if self.momentum is None else {"momentum": self.momentum}
        common.write_checkpoint(self.out, tensors, optimiser, state)

    def _restore(self, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        common.check_identity(state["identity"], self.identity, self.out)
        common.fill(common.moving_tensors(self.model), load_file(folder / "weights.safetensors"), folder)
        saved = torch.load(folder / "optimiser.pt", weights_only=True, map_location=self.device)
        self.momentum = saved.get("momentum")
        if "adam" in saved:
            self.adam.load_state_dict(saved["adam"])
        self.step, self.rows, self.seconds, self.sums = state["step"], state["rows"], state["seconds"], state["sums"]
        self.model.box.calls, self.model.box.images = state["queries"]


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
