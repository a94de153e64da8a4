"""One loop that trains any base classifier, adapted or whole, on noisy images.

Every draw of step t comes from a generator seeded by (seed, what for, t), so a run that was interrupted and taken up
again is the uninterrupted one, bit for bit on a CPU.
"""

import contextlib
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

from smoothbook.adapters.base import device_of, set_train_mode, trainable
from smoothbook.training.attacks import noisy_logits
from smoothbook.training.common import (
    Fitted,
    Interrupt,
    Pixels,
    TrainingDiverged,
    TrainingProgress,
    check_identity,
    describe,
    fill,
    find_checkpoint,
    frozen_digest,
    ids_digest,
    moving_tensors,
    split_images,
    write_checkpoint,
)
from smoothbook.training.losses import Gaussian, Terms
from smoothbook.training.schedules import Schedule, derived_seed, draw_noise, generator_for, parse
from smoothkit.data import Images
from smoothkit.sampling.progress import say

OPTIMISERS = ("adamw", "sgd")
PRECISIONS = ("float32", "bf16")


def fit(
    base_classifier: nn.Module,
    images: Images,
    *,
    loss: Callable[..., Terms] | None = None,
    schedule: Schedule | float | str = 0.25,
    epochs: int = 10,
    batch: int = 128,
    lr: float = 1e-3,
    optimiser: str = "adamw",
    weight_decay: float = 0.05,
    momentum: float = 0.9,
    warmup: float = 0.1,
    cosine: bool = True,
    layer_decay: float | None = None,
    ema: float | None = None,
    precision: str = "float32",
    clip_norm: float | None = 1.0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    validation: float | Images | None = 0.1,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 1,
    progress: bool = True,
    description: str | None = None,
    on_epoch: Callable[[list[dict[str, Any]]], None] | None = None,
) -> Fitted:
    """Train what has `requires_grad`, in place, on the device where the model is.

    Parameters
    ----------
    base_classifier : nn.Module
        Images [B, C, H, W] on [0, 1] to logits; frozen parts (see `adapters.trainable`) stay in eval mode.
    images : Images
        Labelled training images; a test split is refused.
    loss : a loss of `training.losses`; Gaussian() if not given
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
        Folder for checkpoints.
    resume : bool
        Go on from the checkpoint in `out`, if there is one. All settings must be those of the interrupted run.
    checkpoint_every : int
        In epochs.
    progress : bool
        Show a bar with loss and accuracy.
    on_epoch : callable, optional
        Called after each epoch with the rows so far: draw a live curve with it.

    Returns
    -------
    Fitted
        Interrupted by Ctrl-C it returns early with what there is, after writing a checkpoint if `out` is given.

    Raises
    ------
    ValueError
        For a setting out of range, a test split, nothing to train, or a checkpoint of another run.
    TrainingDiverged
        For a NaN or infinite loss. The last good checkpoint stays, and the model is put back to it.
    """
    run = _Run(
        model=base_classifier, images=images, loss=loss or Gaussian(), schedule=parse(schedule), epochs=epochs, batch=batch,
        lr=lr, optimiser_name=optimiser, weight_decay=weight_decay, momentum=momentum, warmup=warmup, cosine=cosine,
        layer_decay=layer_decay, ema=ema, precision=precision, clip_norm=clip_norm, augment=augment,
        validation=validation, seed=seed, out=None if out is None else Path(out),
    )  # fmt: skip
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1 epoch, got {checkpoint_every}")
    run.start(resume)
    total = run.steps * run.batch
    title = description or f"training {getattr(base_classifier, 'name', type(base_classifier).__name__)}"
    with (
        TrainingProgress(total, title, show=progress) as bar,
        _global_draws_kept(run.device),
        Interrupt() as interrupt,
    ):
        bar.update(run.step * run.batch)
        try:
            while run.step < run.steps and not interrupt.asked:
                run.train_step()
                bar.note(run.summary())
                bar.update(run.batch)
                if run.step % run.steps_per_epoch == 0:
                    run.end_epoch(checkpoint_every)
                    interrupt.call(on_epoch, run.rows)
        finally:
            run.close()
    done = run.finish(interrupt.asked)
    if interrupt.asked:
        kept = "" if run.out is None else f"; resume=True goes on from {run.out}"
        say(f"interrupted after step {run.step} of {run.steps}{kept}")
    return done


class _Run:
    """The state of one training: model, optimiser, average, step, and the sums of the epoch under way."""

    def __init__(
        self, *, model: nn.Module, images: Images, validation: float | Images | None, out: Path | None, **settings
    ) -> None:
        for name, value in settings.items():
            setattr(self, name, value)
        self.model, self.out, self.device = model, out, device_of(model)
        _check_settings(self)
        train_indices, held_out = split_images(images, validation, self.seed)
        self.batch = min(self.batch, len(train_indices))
        self.train_images, self.train_indices, self.grid = images, train_indices, images.grid
        self.validation_images, self.validation_indices = held_out
        self.steps_per_epoch = len(train_indices) // self.batch
        self.steps = self.epochs * self.steps_per_epoch
        self.trained = trainable(model)
        if not self.trained.trained:
            raise ValueError("nothing to train: no parameter of the model has requires_grad")
        self.identity = self._identity(images, validation)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = _optimiser(self)
        self.step, self.saved_step, self.rows, self.seconds = 0, 0, [], 0.0
        self.sums = _no_sums()
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    # --- beginning and end

    def start(self, resume: bool) -> None:
        self._check_answers()
        self.average = None if self.ema is None else _Average(self.model, self.ema)
        found = None if self.out is None else find_checkpoint(self.out)
        if found is not None and not resume:
            raise ValueError(f"{self.out} holds a checkpoint of an earlier run; give resume=True or another folder")
        if found is not None:
            self._restore(found, check=True)
        self.pixels = Pixels(self.train_images, self.device)
        validated = self.validation_images
        shared = validated is self.train_images
        self.validation_pixels = (
            self.pixels if shared else None if validated is None else Pixels(validated, self.device)
        )

    def close(self) -> None:
        self.pixels.close()
        if self.validation_pixels is not None:
            self.validation_pixels.close()

    def finish(self, interrupted: bool) -> Fitted:
        if self.out is not None and self.step > self.saved_step:
            self._save()
        if self.average is not None and self.step:
            self.average.swap(self.model)
        self.model.eval()
        return Fitted(self.model, self.rows, self.trained, self.step, self.seconds, interrupted, self.out)

    # --- a step

    def train_step(self) -> None:
        began = time.perf_counter()
        step, epoch = self.step, self.step // self.steps_per_epoch
        chosen, upcoming = self._batch_of(step), self._batch_of(step + 1) if step + 1 < self.steps else None
        pixels, labels = self.pixels.batch(chosen, upcoming)
        torch.manual_seed(derived_seed(self.seed, "dropout", step))
        generator = generator_for(self.seed, "noise", step, self.device)
        if self.augment is not None:
            pixels = self.augment(pixels, generator)
        if hasattr(self.schedule, "for_images"):  # a sigma of its own for each image, which may ask the model
            sigma = self.schedule.for_images(
                self.model, pixels, chosen, progress=step / self.steps, generator=generator
            )
        else:
            sigma = self.schedule(len(pixels), progress=step / self.steps, generator=generator).to(self.device)
        noise = draw_noise(pixels, sigma, copies=self.loss.copies, grid=self.grid, generator=generator)
        self.model.train()  # an adapted model may refuse, as one whose adapter is merged
        set_train_mode(self.model)
        rate = self._set_rate(step)
        with self._autocast():
            terms = self.loss(self.model, pixels, labels, noise=noise, sigma=sigma, epoch=epoch)
        value = float(terms.loss.detach())
        if not math.isfinite(value):
            self._diverged(f"the loss is {value}")
        self.optimiser.zero_grad(set_to_none=True)
        terms.loss.backward()
        length = float(nn.utils.clip_grad_norm_(self.parameters, self.clip_norm or math.inf))
        if not math.isfinite(length):
            self._diverged(f"the gradient's length is {length} (the loss is {value:.4g})")
        self.optimiser.step()
        if self.average is not None:
            self.average.update(self.model)
        targets = self.loss.targets(sigma, labels) if hasattr(self.loss, "targets") else labels
        right = float((terms.logits.detach().argmax(-1) == targets).float().mean())
        self.sums = {
            "steps": self.sums["steps"] + 1, "loss": self.sums["loss"] + value, "accuracy": self.sums["accuracy"] + right,
            "sigma": self.sums["sigma"] + float(sigma.mean()), "lr": rate,
        }  # fmt: skip
        self.step += 1
        self.seconds += time.perf_counter() - began

    def _batch_of(self, step: int) -> np.ndarray:
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = torch.randperm(len(self.train_indices), generator=generator_for(self.seed, "order", epoch))
            self._order = (epoch, self.train_indices[order.numpy()])
        return self._order[1][within * self.batch : (within + 1) * self.batch]

    def _set_rate(self, step: int) -> float:
        rate = self.lr * rate_factor(step, self.steps, warmup=self.warmup, cosine=self.cosine)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def summary(self) -> str:
        n = max(1, self.sums["steps"])
        return f"loss {self.sums['loss'] / n:.3f}, accuracy {self.sums['accuracy'] / n:.1%}"

    # --- an epoch

    def end_epoch(self, checkpoint_every: int) -> None:
        began = time.perf_counter()
        n, epoch = self.sums["steps"], self.step // self.steps_per_epoch
        row = {"epoch": epoch, "step": self.step, "lr": self.sums["lr"]}
        row |= {name: self.sums[name] / n for name in ("sigma", "loss", "accuracy")}
        row |= self._validate()
        self.seconds += time.perf_counter() - began
        self.rows = [*self.rows, {**row, "seconds": self.seconds}]
        self.sums = _no_sums()
        if self.out is not None and (epoch % checkpoint_every == 0 or self.step == self.steps):
            self._save()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """On the same noise in every epoch, drawn as the schedule is at the end of training."""
        if self.validation_pixels is None:
            return {}
        indices, totals = self.validation_indices, np.zeros(3)
        set_train_mode(self.model, False)
        with self._averaged(), self._autocast():
            for low in range(0, len(indices), self.batch):
                chosen = indices[low : low + self.batch]
                upcoming = indices[low + self.batch : low + 2 * self.batch]
                pixels, labels = self.validation_pixels.batch(chosen, upcoming if len(upcoming) else None)
                generator = generator_for(self.seed, "validation", low, self.device)
                sigma = self.schedule(len(pixels), progress=1.0, generator=generator).to(self.device)
                noise = draw_noise(pixels, sigma, grid=self.grid, generator=generator)
                targets = self.loss.targets(sigma, labels) if hasattr(self.loss, "targets") else labels
                noisy, clean = noisy_logits(self.model, pixels, noise)[0].float(), self.model(pixels)
                totals += [
                    float(nn.functional.cross_entropy(noisy, targets, reduction="sum")),
                    int((noisy.argmax(1) == targets).sum()),
                    int((clean.argmax(1) == labels).sum()),
                ]
        names = ("validation_loss", "validation_accuracy", "validation_clean_accuracy")
        return dict(zip(names, (totals / len(indices)).tolist(), strict=True))

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

    def _save(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            self._diverged("a parameter is not finite")
        state = {
            "step": self.step, "seconds": self.seconds, "rows": self.rows, "sums": self.sums, "identity": self.identity,
        }  # fmt: skip
        tensors = {"weights": moving_tensors(self.model)}
        if self.average is not None:
            state["average_updates"] = self.average.updates
            tensors["average"] = self.average.tensors
        if hasattr(self.schedule, "state"):
            tensors["schedule"] = self.schedule.state()
        write_checkpoint(self.out, tensors, self.optimiser.state_dict(), state)
        self.saved_step = self.step

    def _restore(self, folder: Path, *, check: bool) -> None:
        state = json.loads((folder / "state.json").read_text())
        if check:
            check_identity(state["identity"], self.identity, self.out)
        fill(moving_tensors(self.model), load_file(folder / "weights.safetensors"), folder)
        if hasattr(self.schedule, "restore"):
            self.schedule.restore(load_file(folder / "schedule.safetensors"))
        if not check:
            return
        self.optimiser.load_state_dict(torch.load(folder / "optimiser.pt", weights_only=True, map_location=self.device))
        if self.average is not None:
            fill(self.average.tensors, load_file(folder / "average.safetensors"), folder)
            self.average.updates = state["average_updates"]
        self.step, self.rows, self.seconds, self.sums = state["step"], state["rows"], state["seconds"], state["sums"]
        self.saved_step = self.step

    def _diverged(self, what: str) -> None:
        epoch = self.step // self.steps_per_epoch + 1
        found = None if self.out is None else find_checkpoint(self.out)
        if found is None:
            left = "no checkpoint had been written" + ("" if self.out else " (give out= to keep one an epoch)")
        else:
            self._restore(found, check=False)
            left = f"the last good checkpoint is {found}, and the model is back at it"
        raise TrainingDiverged(
            f"{what} at step {self.step + 1} (epoch {epoch}); training stopped, {left}. A lower lr, a longer warmup or "
            f"clip_norm may help"
        )

    # --- what must agree, and what must work

    def _identity(self, images: Images, validation: float | Images | None) -> dict[str, Any]:
        identity = {key: getattr(self, key) for key in (
            "epochs", "batch", "lr", "optimiser_name", "weight_decay", "momentum", "warmup", "cosine", "layer_decay", "ema",
            "precision", "clip_norm", "seed",
        )}  # fmt: skip
        identity |= {name: describe(getattr(self, name)) for name in ("loss", "schedule", "augment")}
        identity["images"] = f"{images.name} ({len(images)}, {ids_digest(images)})"
        by_share = isinstance(validation, float | int) or validation is None
        identity["validation"] = validation if by_share else f"{validation.name} ({ids_digest(validation)})"
        identity["trained"] = self.trained.parts
        identity["frozen"] = frozen_digest(self.model)
        return json.loads(json.dumps(identity))

    def _check_answers(self) -> None:
        set_train_mode(self.model, False)
        with torch.no_grad():
            logits = self.model(self.train_images[int(self.train_indices[0])][None].to(self.device))
        if logits.ndim != 2 or len(logits) != 1:
            raise ValueError(f"the base classifier must give logits [batch, num_classes], got {tuple(logits.shape)}")
        highest = int(self.train_images.labels.max())
        if not hasattr(self.loss, "targets") and highest >= logits.shape[1]:
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


def _optimiser(run: _Run) -> torch.optim.Optimizer:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    if run.layer_decay is None:
        groups = param_groups_weight_decay(run.model, run.weight_decay)
    else:
        network = getattr(run.model, "network", run.model)
        if not hasattr(network, "group_matcher"):
            raise ValueError(f"layer_decay needs a timm network, got {type(network).__name__}; leave it out")
        groups = param_groups_layer_decay(network, run.weight_decay, layer_decay=run.layer_decay)
    groups = [g for g in groups if g["params"]]
    if sum(p.numel() for g in groups for p in g["params"]) != run.trained.trained:
        raise ValueError("layer_decay does not reach all trained parameters; it is for timm networks trained whole")
    if run.optimiser_name == "adamw":
        return torch.optim.AdamW(groups, lr=run.lr)
    return torch.optim.SGD(groups, lr=run.lr, momentum=run.momentum, nesterov=run.momentum > 0)


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


# --- small things ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _global_draws_kept(device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global generators: they are seeded in every step and put back at the end."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _no_sums() -> dict[str, float]:
    return {"steps": 0, "loss": 0.0, "accuracy": 0.0, "sigma": 0.0, "lr": 0.0}


def _check_settings(run: _Run) -> None:
    if run.epochs < 1 or run.batch < 1:
        raise ValueError(f"epochs and batch must be at least 1, got {run.epochs} and {run.batch}")
    if not 0 < run.lr < math.inf:
        raise ValueError(f"lr must be above 0, got {run.lr}")
    if run.optimiser_name not in OPTIMISERS:
        raise ValueError(f"optimiser must be one of {', '.join(OPTIMISERS)}, got {run.optimiser_name!r}")
    if run.precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {run.precision!r}")
    if not 0 <= run.warmup < 1:
        raise ValueError(f"warmup is a share of the steps in [0, 1), got {run.warmup}")
    if run.ema is not None and not 0 < run.ema < 1:
        raise ValueError(f"ema must lie in (0, 1), as 0.998, got {run.ema}")
    if run.layer_decay is not None and not 0 < run.layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {run.layer_decay}")
    if run.clip_norm is not None and not run.clip_norm > 0:
        raise ValueError(f"clip_norm must be above 0, or None, got {run.clip_norm}")
