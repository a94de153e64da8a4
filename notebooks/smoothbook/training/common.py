"""What both ways of training need: checkpoints, batches of images, the progress bar, and Ctrl-C.

A checkpoint is a folder that appears by rename:

    weights.safetensors   what training moves: trained parameters and all buffers
    average.safetensors   their running average, if one is kept
    optimiser.pt          the optimiser's state, read with weights_only=True
    state.json            step, history, and the settings that must agree to resume
"""

import dataclasses
import hashlib
import json
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smoothbook.adapters.base import Trainable
from smoothbook.training.schedules import generator_for
from smoothkit.data import Images
from smoothkit.sampling.progress import Progress

IN_MEMORY = 2**31  # bytes of pixels kept; larger data sets are read batch by batch


class TrainingDiverged(RuntimeError):
    """A loss or gradient was NaN or infinite; the message names the step and the checkpoint that is left."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training gave.

    `rows` holds one dict an epoch: epoch, step, lr, sigma (mean), loss and accuracy (on the noisy training copies),
    validation_loss and validation_accuracy (on noisy validation images), validation_clean_accuracy, seconds.
    """

    model: nn.Module
    rows: list[dict[str, Any]]
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


# --- checkpoints -----------------------------------------------------------------------------------


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training may change: parameters with `requires_grad`, and buffers."""
    moving = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return moving | {name: b.detach() for name, b in model.named_buffers()}


def write_checkpoint(out: Path, tensors: dict[str, dict[str, Tensor]], optimiser: dict, state: dict) -> None:
    """Write the folder `checkpoint` under another name and rename it; at every moment one good one is there."""
    new, now, old = out / "checkpoint.new", out / "checkpoint", out / "checkpoint.old"
    for stale in (new, old) if now.is_dir() else (new,):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir(parents=True)
    for name, group in tensors.items():
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in group.items()}, new / f"{name}.safetensors")
    torch.save(optimiser, new / "optimiser.pt")
    (new / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    if now.is_dir():
        now.rename(old)
    new.rename(now)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(out: Path) -> Path | None:
    """The good checkpoint in a folder, if there is one."""
    return next((out / n for n in ("checkpoint", "checkpoint.old") if (out / n / "state.json").is_file()), None)


def check_identity(saved: dict, wanted: dict, out: Path) -> None:
    """Refuse to go on with other settings than the run began with."""
    different = [f"{k} was {saved.get(k)!r}, now {wanted.get(k)!r}" for k in wanted if saved.get(k) != wanted[k]]
    if different:
        raise ValueError(f"the checkpoint in {out} is of another run: {'; '.join(different)}")


def fill(tensors: dict[str, Tensor], saved: dict[str, Tensor], folder: Path) -> None:
    if tensors.keys() != saved.keys():
        odd = sorted(tensors.keys() ^ saved.keys())
        raise ValueError(f"the checkpoint {folder} is of another model: {len(odd)} names differ, as {odd[0]!r}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


def frozen_digest(model: nn.Module) -> str:
    """A digest of what training does not move, so that a resumed run stands on the same base."""
    digest = hashlib.blake2b(digest_size=8)
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)}".encode())
        if not p.requires_grad:
            digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe(part: Any) -> str | None:
    """How a run's identity names a loss, schedule or augmentation: values for dataclasses, else the name."""
    if part is None or dataclasses.is_dataclass(part):
        return part and repr(part)
    if hasattr(part, "func"):  # functools.partial
        return f"{describe(part.func)}{part.args}{part.keywords}"
    return f"{part.__module__}.{getattr(part, '__qualname__', type(part).__qualname__)}"


# --- images ----------------------------------------------------------------------------------------


def split_images(images: Images, validation: float | Images | None, seed: int) -> tuple[np.ndarray, tuple]:
    """Training positions, and (images, positions) to validate on."""
    if not isinstance(images, Images):
        raise ValueError(
            f"images must be an Images, got {type(images).__name__}; use smoothkit.data.load or from_arrays"
        )
    _check_trainable_images(images, "images")
    everything = np.arange(len(images))
    if validation is None:
        return everything, (None, everything[:0])
    if isinstance(validation, Images):
        _check_trainable_images(validation, "validation")
        shared = set(images.ids) & set(validation.ids)
        if shared:
            raise ValueError(f"{len(shared)} validation images are among the training images")
        return everything, (validation, np.arange(len(validation)))
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a share in (0, 1), Images or None, got {validation}")
    held = round(validation * len(images))
    if not 0 < held < len(images):
        raise ValueError(f"validation={validation} of {len(images)} images leaves one side empty")
    order = torch.randperm(len(images), generator=generator_for(seed, "split", 0)).numpy()
    return np.sort(order[held:]), (images, np.sort(order[:held]))


def _check_trainable_images(images: Images, name: str) -> None:
    if images.split == "test":
        raise ValueError(
            f"{name} is {images.name}, a test split, which is certified; train and validate on the training split"
        )
    if (images.labels < 0).any():
        raise ValueError(f"{name} has {int((images.labels < 0).sum())} images without a label")


def ids_digest(images: Images) -> str:
    return hashlib.blake2b(repr(images.ids).encode(), digest_size=6).hexdigest()


class Pixels:
    """Batches by position: from memory if all pixels fit there, else read by threads, one batch ahead."""

    def __init__(self, images: Images, device: torch.device) -> None:
        self.images, self.device = images, device
        self.labels = torch.from_numpy(np.asarray(images.labels)).to(device)
        small = 4 * images[0].numel() * len(images) <= IN_MEMORY
        self.kept = images.batch().to(device) if small else None
        self._readers = None if small else ThreadPoolExecutor(4)
        self._ahead: tuple[bytes, list[Future]] = (b"", [])

    def batch(self, chosen: np.ndarray, upcoming: np.ndarray | None) -> tuple[Tensor, Tensor]:
        where = torch.from_numpy(chosen).to(self.device)
        if self.kept is not None:
            return self.kept[where], self.labels[where]
        key, futures = self._ahead
        if key != chosen.tobytes():
            futures = self._read(chosen)
        if upcoming is not None:
            self._ahead = (upcoming.tobytes(), self._read(upcoming))
        return torch.stack([f.result() for f in futures]).to(self.device), self.labels[where]

    def _read(self, chosen: np.ndarray) -> list[Future]:
        return [self._readers.submit(self.images.__getitem__, int(i)) for i in chosen]

    def close(self) -> None:
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)


# --- the reader, the keyboard, the global generator ------------------------------------------------


class TrainingProgress(Progress):
    """The progress bar with a changing note, as loss and accuracy."""

    def __init__(self, total: int, description: str, *, show: bool = True) -> None:
        self._title = description
        super().__init__(total, description, show=show)

    def note(self, text: str) -> None:
        self.description = f"{self._title}, {text}"
        if self._bar is not None:
            self._bar.set_description_str(self.description, refresh=False)


class Interrupt:
    """Ctrl-C asks to stop after the step under way; a second one stops at once."""

    def __enter__(self) -> "Interrupt":
        self.asked, self._before = False, None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def call(self, callback: Callable[[list], None] | None, rows: list[dict[str, Any]]) -> None:
        """A callback between steps may also ask, by raising KeyboardInterrupt."""
        try:
            if callback is not None:
                callback(rows)
        except KeyboardInterrupt:
            self.asked = True

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
