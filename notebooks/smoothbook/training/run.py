"""What both ways of training share: the loop with its rows, validation and checkpoints, the progress bar, and Ctrl-C."""

import abc
import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothbook.adapters.base import Trainable, device_of, set_train_mode, trainable
from smoothbook.training.attacks import noisy_logits
from smoothbook.training.checkpoint import check_identity, fill, moving_tensors, read_checkpoint, write_checkpoint
from smoothbook.training.images import Pixels, describe_images, split_images
from smoothbook.training.schedules import Schedule, derived_seed, draw_noise, generator_for, parse
from smoothkit.data import Images
from smoothkit.models import fingerprint
from smoothkit.sampling.progress import Progress, say

Rows = list[dict[str, Any]]
# settings that may change when a run is resumed; all others must agree
OF_NO_RESULT = {"out", "resume", "progress", "description", "checkpoint_every", "report_every"}
VALIDATED = ("validation_loss", "validation_accuracy", "validation_clean_accuracy")


class TrainingDiverged(RuntimeError):
    """A loss or gradient was NaN or infinite; the message names the step and the checkpoint that is left."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training gave.

    `rows` holds one dict an epoch: epoch, step, lr, sigma (mean), loss and accuracy (on the noisy training copies),
    validation_loss and validation_accuracy (on noisy validation images), validation_clean_accuracy, seconds.
    """

    model: nn.Module
    rows: Rows
    trained: Trainable
    steps: int
    seconds: float
    interrupted: bool
    out: Path | None

    @property
    def history(self):
        """The rows as a pandas table."""
        import pandas as pd

        return pd.DataFrame(self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What `FitSettings` and `GradientFreeSettings` share; `FitSettings` says what each is."""

    schedule: Schedule | float | str = 0.25
    batch: int = 128
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    validation: float | Images | None = None
    seed: int = 0
    out: str | Path | None = None
    resume: bool = False
    progress: bool = True
    description: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", parse(self.schedule))


class Run(abc.ABC):
    """One training under way. A subclass sets `steps`, and after how many a row is written, and takes the steps."""

    steps: int
    row_every: int
    save_every: int = 1  # in rows
    clean_accuracy: bool = True  # validation also asks about images without noise

    def __init__(self, model: nn.Module, images: Images, settings: RunSettings) -> None:
        self.model, self.images, self.settings, self.device = model, images, settings, device_of(model)
        self.train_indices, held_out = split_images(images, settings.validation, settings.seed)
        self.validated, self.validation_indices = held_out
        self.batch = min(settings.batch, len(self.train_indices))
        self.trained = trainable(model)
        if not self.trained.trained:
            raise ValueError("nothing to train: no parameter of the model has requires_grad")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.out = None if settings.out is None else Path(settings.out)
        self.identity = self._identity()
        self.step, self.saved_step, self.seconds = 0, 0, 0.0
        self.rows: Rows = []
        self.sums: dict[str, float] = {}  # over the steps since the last row

    def train(self, on_row: Callable[[Rows], None] | None = None) -> Fitted:
        """All steps that are left; after each row `on_row` gets the rows so far."""
        self._resume()
        self.pixels = self.validation_pixels = Pixels(self.images, self.device)
        if self.validated is not self.images:
            self.validation_pixels = None if self.validated is None else Pixels(self.validated, self.device)
        title = self.settings.description or f"training {getattr(self.model, 'name', type(self.model).__name__)}"
        with (
            _Bar(self.steps * self.batch, title, show=self.settings.progress) as bar,
            _global_draws_kept(self.device),
            _interruptible() as interrupt,
        ):
            bar.update(self.step * self.batch)
            try:
                while self.step < self.steps and not interrupt.asked:
                    self._advance()
                    bar.note(f"{title}, {self.summary()}")
                    bar.update(self.batch)
                    if self.step % self.row_every == 0 or self.step == self.steps:
                        self._end_row()
                        interrupt.asked |= _asks_to_stop(on_row, self.rows)
            finally:
                for pixels in {self.pixels, self.validation_pixels} - {None}:
                    pixels.close()
        if self.step > self.saved_step:
            self.save()
        if interrupt.asked:
            kept = "" if self.out is None else f"; resume=True goes on from {self.out}"
            say(f"interrupted after step {self.step} of {self.steps}{kept}")
        self.model.eval()
        return Fitted(self.model, self.rows, self.trained, self.step, self.seconds, interrupt.asked, self.out)

    # --- a step

    @abc.abstractmethod
    def take_step(self) -> dict[str, float]:
        """Change the weights once; returns what is averaged in the row, loss and accuracy among it."""

    def draw(
        self, key: int, chosen: np.ndarray, upcoming: np.ndarray | None = None, *, copies: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images [B, C, H, W] as augmented, labels, sigma [B] and noise [copies, B, C, H, W], drawn anew for each key."""
        pixels, labels = self.pixels.batch(chosen, upcoming)
        generator = generator_for(self.settings.seed, "noise", key, self.device)
        if self.settings.augment is not None:
            pixels = self.settings.augment(pixels, generator)
        sigma = self.sigma_of(pixels, chosen, generator)
        return pixels, labels, sigma, self._noise(pixels, sigma, generator, copies)

    def sigma_of(self, pixels: Tensor, chosen: np.ndarray, generator: torch.Generator) -> Tensor:
        return self._scheduled(len(pixels), self.step / self.steps, generator)

    def targets(self, sigma: Tensor, labels: Tensor) -> Tensor:
        """The classes that accuracy is counted against."""
        return labels

    def summary(self) -> str:
        means = self._means()
        return f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.1%}"

    def _advance(self) -> None:
        began = time.perf_counter()
        torch.manual_seed(derived_seed(self.settings.seed, "dropout", self.step))
        seen = self.take_step()
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in seen.items()}
        self.step += 1
        self.seconds += time.perf_counter() - began

    def _scheduled(self, n: int, progress: float, generator: torch.Generator) -> Tensor:
        return self.settings.schedule(n, progress=progress, generator=generator).to(self.device)

    def _noise(self, pixels: Tensor, sigma: Tensor, generator: torch.Generator, copies: int = 1) -> Tensor:
        return draw_noise(pixels, sigma, copies=copies, grid=self.images.grid, generator=generator)

    # --- a row

    def row(self) -> dict[str, Any]:
        """What is said of the steps since the last row."""
        return {"step": self.step, **self._means()}

    def _means(self) -> dict[str, float]:
        n = self.step - (self.rows[-1]["step"] if self.rows else 0)
        return {name: total / n for name, total in self.sums.items()}

    def _end_row(self) -> None:
        began = time.perf_counter()
        row = self.row() | self.validate()
        self.seconds += time.perf_counter() - began
        self.rows, self.sums = [*self.rows, {**row, "seconds": self.seconds}], {}
        if len(self.rows) % self.save_every == 0 or self.step == self.steps:
            self.save()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and accuracy on noise that is the same each time, drawn as the schedule is at the end of training."""
        if self.validation_pixels is None:
            return {}
        indices, totals = self.validation_indices, 0.0
        set_train_mode(self.model, False)
        for low in range(0, len(indices), self.batch):
            chosen, upcoming = (indices[start : start + self.batch] for start in (low, low + self.batch))
            pixels, labels = self.validation_pixels.batch(chosen, upcoming)
            generator = generator_for(self.settings.seed, "validation", low, self.device)
            sigma = self._scheduled(len(pixels), 1.0, generator)
            logits = noisy_logits(self.model, pixels, self._noise(pixels, sigma, generator))[0].float()
            targets = self.targets(sigma, labels)
            seen = [float(F.cross_entropy(logits, targets, reduction="sum")), int((logits.argmax(1) == targets).sum())]
            if self.clean_accuracy:
                seen.append(int((self.model(pixels).argmax(1) == labels).sum()))
            totals = totals + np.array(seen, dtype=np.float64)
        return dict(zip(VALIDATED, (totals / len(indices)).tolist(), strict=False))

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {name: getattr(self, name) for name in ("identity", "step", "seconds", "rows", "sums")}
        return kept | {"weights": moving_tensors(self.model)}

    def restore(self, kept: dict[str, Any]) -> None:
        fill(moving_tensors(self.model), kept["weights"], self.out)
        self.step, self.rows, self.seconds, self.sums = (kept[name] for name in ("step", "rows", "seconds", "sums"))
        self.saved_step = self.step

    def save(self) -> None:
        if self.out is not None:
            write_checkpoint(self.out, self.state())
            self.saved_step = self.step

    def _resume(self) -> None:
        found = read_checkpoint(self.out, self.device)
        if found is None:
            return
        if not self.settings.resume:
            raise ValueError(f"{self.out} holds a checkpoint of an earlier run; give resume=True or another folder")
        check_identity(found["identity"], self.identity, self.out)
        self.restore(found)

    def _identity(self) -> dict[str, Any]:
        """What must agree to go on: settings, images, what is trained, and what it stands on."""
        names = [f.name for f in dataclasses.fields(self.settings) if f.name not in OF_NO_RESULT]
        identity = {name: describe(getattr(self.settings, name)) for name in names}
        identity |= {"images": describe(self.images), "trained": self.trained.parts}
        identity["frozen"] = fingerprint(self.model, without=moving_tensors(self.model))
        return json.loads(json.dumps(identity))


def describe(setting: Any) -> Any:
    """How a run's identity names a setting: numbers and texts as they are, dataclasses by value, functions by name."""
    if setting is None or isinstance(setting, int | float | str):
        return setting
    if isinstance(setting, Images):
        return describe_images(setting)
    if dataclasses.is_dataclass(setting):
        return repr(setting)
    if hasattr(setting, "func"):  # functools.partial
        return f"{describe(setting.func)}{setting.args}{setting.keywords}"
    return f"{setting.__module__}.{getattr(setting, '__qualname__', type(setting).__qualname__)}"


# --- the reader, the keyboard, the global generator ------------------------------------------------


@contextlib.contextmanager
def _global_draws_kept(device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global generators: they are seeded in every step and put back at the end."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


class _Bar(Progress):
    def note(self, text: str) -> None:
        """Another text in front, as loss and accuracy change."""
        self.description = text
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)


@contextlib.contextmanager
def _interruptible() -> Iterator[SimpleNamespace]:
    """Ctrl-C sets `asked`, so that the step under way is finished; a second one stops at once."""
    interrupt, before = SimpleNamespace(asked=False), None

    def ask(*_: object) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, ask)
    try:
        yield interrupt
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _asks_to_stop(on_row: Callable[[Rows], None] | None, rows: Rows) -> bool:
    """Hand the rows on; raising KeyboardInterrupt is how a callback asks."""
    try:
        if on_row is not None:
            on_row(rows)
    except KeyboardInterrupt:
        return True
    return False
