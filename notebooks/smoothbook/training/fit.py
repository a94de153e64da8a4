"""One loop that trains any base classifier, adapted or whole, on noisy images.

Every draw of step t comes from a generator seeded by (seed, what for, t), so a run that was interrupted and taken up
again is the uninterrupted one, bit for bit on a CPU.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from smoothbook.adapters.base import set_train_mode
from smoothbook.training.checkpoint import CHECKPOINT, fill, moving_tensors, read_checkpoint
from smoothbook.training.losses import Gaussian, Terms
from smoothbook.training.run import Fitted, Rows, Run, RunSettings, TrainingDiverged
from smoothbook.training.schedules import generator_for
from smoothkit.data import Images

OPTIMISERS = ("adamw", "sgd")
PRECISIONS = ("float32", "bf16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings(RunSettings):
    """How `fit` trains.

    Parameters
    ----------
    loss : a loss of `training.losses`
    schedule : Schedule, float or str
        The sigma of each image, pixel units; see `schedules.parse`.
    epochs, batch : int
        Passes over the images; images a step. A last incomplete batch is left out, another one in each epoch.
    lr : float
        The highest rate.
    optimiser : `adamw` or `sgd` (Nesterov, with `momentum`)
    weight_decay : float
        Not on biases and norms.
    warmup : float
        Share of the steps over which the rate rises linearly, in [0, 1).
    cosine : bool
        Let the rate fall to 0 by a half cosine afterwards.
    layer_decay : float, optional
        Factor on the rate from each layer to the one below, by timm's grouping; for timm networks trained whole.
    ema : float, optional
        Decay of a running average of the weights (0.998, say), which is validated and is what the model holds afterwards.
    precision : `float32` or `bf16` (autocast; worth it on GPUs)
    clip_norm : float, optional
        Longest gradient.
    augment : callable, optional
        (images, generator) -> images, before the noise; see `schedules.crop_and_flip`.
    validation : float, Images or None
        A share carved from the training images by the seed, or other images, never a test split.
    seed : int
    out : path, optional
        Folder for the checkpoint.
    resume : bool
        Go on from the checkpoint in `out`, if there is one. All settings must be those of the interrupted run.
    checkpoint_every : int
        In epochs.
    progress : bool
        Show a bar with loss and accuracy.
    description : str
        What the bar says; the model's name if not given.

    Raises
    ------
    ValueError
        For a setting out of range.
    """

    loss: Callable[..., Terms] = dataclasses.field(default_factory=Gaussian)
    epochs: int = 10
    lr: float = 1e-3
    optimiser: str = "adamw"
    weight_decay: float = 0.05
    momentum: float = 0.9
    warmup: float = 0.1
    cosine: bool = True
    layer_decay: float | None = None
    ema: float | None = None
    precision: str = "float32"
    clip_norm: float | None = 1.0
    validation: float | Images | None = 0.1
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"epochs and batch must be at least 1, got {self.epochs} and {self.batch}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser must be one of {', '.join(OPTIMISERS)}, got {self.optimiser!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps in [0, 1), got {self.warmup}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie in (0, 1), as 0.998, got {self.ema}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, or None, got {self.clip_norm}")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1 epoch, got {self.checkpoint_every}")


def fit(
    base_classifier: nn.Module,
    images: Images,
    settings: FitSettings | None = None,
    *,
    on_epoch: Callable[[Rows], None] | None = None,
) -> Fitted:
    """Train what has `requires_grad`, in place, on the device where the model is.

    Parameters
    ----------
    base_classifier : nn.Module
        Images [B, C, H, W] on [0, 1] to logits; frozen parts (see `adapters.trainable`) stay in eval mode.
    images : Images
        Labelled training images; a test split is refused.
    settings : FitSettings, optional
    on_epoch : callable, optional
        Called after each epoch with the rows so far: draw a live curve with it.

    Returns
    -------
    Fitted
        Interrupted by Ctrl-C it returns early with what there is, after writing a checkpoint if `out` is given.

    Raises
    ------
    ValueError
        For a test split, nothing to train, or a checkpoint of another run.
    TrainingDiverged
        For a NaN or infinite loss. The last good checkpoint stays, and the model is put back to it.
    """
    return _GradientRun(base_classifier, images, settings or FitSettings()).train(on_epoch)


class _GradientRun(Run):
    """Steps along the gradient of a loss, with an optimiser, a rate that falls, and perhaps an average of the weights."""

    settings: FitSettings

    def __init__(self, model: nn.Module, images: Images, settings: FitSettings) -> None:
        super().__init__(model, images, settings)
        self.row_every = len(self.train_indices) // self.batch  # steps an epoch
        self.steps, self.save_every = settings.epochs * self.row_every, settings.checkpoint_every
        self.optimiser = _optimiser(model, settings, self.trained.trained)
        self._check_answers()
        self.average = None if settings.ema is None else _Average(model, settings.ema)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def train(self, on_row: Callable[[Rows], None] | None = None) -> Fitted:
        done = super().train(on_row)
        if self.average is not None and self.step:
            self.average.swap(self.model)
        return done

    # --- a step

    def take_step(self) -> dict[str, float]:
        step, loss = self.step, self.settings.loss
        chosen, upcoming = self._batch_of(step), self._batch_of(step + 1) if step + 1 < self.steps else None
        pixels, labels, sigma, noise = self.draw(step, chosen, upcoming, copies=loss.copies)
        self.model.train()  # an adapted model may refuse, as one whose adapter is merged
        set_train_mode(self.model)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(step) * group.get("lr_scale", 1.0)
        with self._autocast():
            terms = loss(self.model, pixels, labels, noise=noise, sigma=sigma, epoch=step // self.row_every)
        value = float(terms.loss.detach())
        if not math.isfinite(value):
            self._diverged(f"the loss is {value}")
        self.optimiser.zero_grad(set_to_none=True)
        terms.loss.backward()
        length = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm or math.inf))
        if not math.isfinite(length):
            self._diverged(f"the gradient's length is {length} (the loss is {value:.4g})")
        self.optimiser.step()
        if self.average is not None:
            self.average.update(self.model)
        right = float((terms.logits.detach().argmax(-1) == self.targets(sigma, labels)).float().mean())
        return {"sigma": float(sigma.mean()), "loss": value, "accuracy": right}

    def _batch_of(self, step: int) -> np.ndarray:
        epoch, within = divmod(step, self.row_every)
        if self._order[0] != epoch:
            order = torch.randperm(len(self.train_indices), generator=generator_for(self.settings.seed, "order", epoch))
            self._order = (epoch, self.train_indices[order.numpy()])
        return self._order[1][within * self.batch : (within + 1) * self.batch]

    def sigma_of(self, pixels: Tensor, chosen: np.ndarray, generator: torch.Generator) -> Tensor:
        schedule = self.settings.schedule
        if not hasattr(schedule, "for_images"):
            return super().sigma_of(pixels, chosen, generator)
        # a sigma of its own for each image, which may ask the model
        return schedule.for_images(self.model, pixels, chosen, progress=self.step / self.steps, generator=generator)

    def targets(self, sigma: Tensor, labels: Tensor) -> Tensor:
        loss = self.settings.loss
        return loss.targets(sigma, labels) if hasattr(loss, "targets") else labels

    def _rate(self, step: int) -> float:
        settings = self.settings
        return settings.lr * rate_factor(step, self.steps, warmup=settings.warmup, cosine=settings.cosine)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    # --- a row

    def row(self) -> dict[str, Any]:
        known = {"epoch": self.step // self.row_every, "step": self.step, "lr": self._rate(self.step - 1)}
        return known | super().row()

    def validate(self) -> dict[str, float]:
        with self._averaged(), self._autocast():
            return super().validate()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        if self.average is None:
            yield
            return
        self.average.swap(self.model)
        try:
            yield
        finally:
            self.average.swap(self.model)

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        kept = super().state() | {"optimiser": self.optimiser.state_dict()}
        if self.average is not None:
            kept |= {"average": self.average.tensors, "average_updates": self.average.updates}
        if hasattr(self.settings.schedule, "state"):
            kept["schedule"] = self.settings.schedule.state()
        return kept

    def restore(self, kept: dict[str, Any]) -> None:
        super().restore(kept)
        self.optimiser.load_state_dict(kept["optimiser"])
        if self.average is not None:
            fill(self.average.tensors, kept["average"], self.out)
            self.average.updates = kept["average_updates"]
        if hasattr(self.settings.schedule, "restore"):
            self.settings.schedule.restore(kept["schedule"])

    def save(self) -> None:
        if self.out is not None and not all(bool(p.isfinite().all()) for p in self.parameters):
            self._diverged("a parameter is not finite")
        super().save()

    def _diverged(self, what: str) -> NoReturn:
        step, found = self.step, read_checkpoint(self.out, self.device)
        if found is None:
            left = "no checkpoint had been written" + ("" if self.out else " (give out= to keep one an epoch)")
        else:
            self.restore(found)
            left = f"the last good checkpoint is {self.out / CHECKPOINT}, and the model is back at it"
        raise TrainingDiverged(
            f"{what} at step {step + 1} (epoch {step // self.row_every + 1}); training stopped, {left}. A lower lr, a "
            f"longer warmup or clip_norm may help"
        )

    # --- what must work

    def _check_answers(self) -> None:
        set_train_mode(self.model, False)
        with torch.no_grad():
            logits = self.model(self.images[int(self.train_indices[0])][None].to(self.device))
        if logits.ndim != 2 or len(logits) != 1:
            raise ValueError(f"the base classifier must give logits [batch, num_classes], got {tuple(logits.shape)}")
        highest = int(self.images.labels.max())
        if not hasattr(self.settings.loss, "targets") and highest >= logits.shape[1]:
            raise ValueError(
                f"labels go up to {highest}, but the base classifier has {logits.shape[1]} classes; give it a head with "
                f"num_classes={highest + 1}"
            )


def rate_factor(step: int, steps: int, *, warmup: float, cosine: bool) -> float:
    """The share of the highest rate at a step: a linear rise over `warmup * steps`, then a half cosine to 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if not cosine:
        return 1.0
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def _optimiser(model: nn.Module, settings: FitSettings, trained: int) -> torch.optim.Optimizer:
    # timm takes seconds to import
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    if settings.layer_decay is None:
        groups = param_groups_weight_decay(model, settings.weight_decay)
    else:
        network = getattr(model, "network", model)
        if not hasattr(network, "group_matcher"):
            raise ValueError(f"layer_decay needs a timm network, got {type(network).__name__}; leave it out")
        groups = param_groups_layer_decay(network, settings.weight_decay, layer_decay=settings.layer_decay)
    groups = [g for g in groups if g["params"]]
    if sum(p.numel() for g in groups for p in g["params"]) != trained:
        raise ValueError("layer_decay does not reach all trained parameters; it is for timm networks trained whole")
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


class _Average:
    """A running average of what training moves; its decay rises from 0.1 so that short runs forget their start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.tensors = {name: t.detach().clone() for name, t in self._of(model).items()}

    @staticmethod
    def _of(model: nn.Module) -> dict[str, Tensor]:
        return {name: t for name, t in moving_tensors(model).items() if t.is_floating_point()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        for name, tensor in self._of(model).items():
            self.tensors[name].lerp_(tensor, 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's values with the average's."""
        for name, tensor in self._of(model).items():
            kept = tensor.clone()
            tensor.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
