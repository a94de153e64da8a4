"""The images of a training: which are trained on and which are validated on, and their pixels by batches."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from smoothbook.training.schedules import generator_for
from smoothkit.data import Images

IN_MEMORY = 2**31  # bytes of pixels kept; larger data sets are read batch by batch


def split_images(
    images: Images, validation: float | Images | None, seed: int
) -> tuple[np.ndarray, tuple[Images | None, np.ndarray]]:
    """Training positions, and (images, positions) to validate on."""
    if not isinstance(images, Images):
        raise ValueError(
            f"images must be an Images, got {type(images).__name__}; use smoothkit.data.load or from_arrays"
        )
    _check_trainable(images, "images")
    everything = np.arange(len(images))
    if validation is None:
        return everything, (None, everything[:0])
    if isinstance(validation, Images):
        _check_trainable(validation, "validation")
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


def _check_trainable(images: Images, name: str) -> None:
    if images.split == "test":
        raise ValueError(
            f"{name} is {images.name}, a test split, which is certified; train and validate on the training split"
        )
    if (images.labels < 0).any():
        raise ValueError(f"{name} has {int((images.labels < 0).sum())} images without a label")


def describe_images(images: Images) -> str:
    """Their name and number, and a digest of their ids."""
    digest = hashlib.blake2b(repr(images.ids).encode(), digest_size=6).hexdigest()
    return f"{images.name} ({len(images)}, {digest})"


class Pixels:
    """Batches by position: from memory if all pixels fit there, else read by threads, one batch ahead."""

    def __init__(self, images: Images, device: torch.device) -> None:
        self.images, self.device = images, device
        self.labels = torch.from_numpy(np.asarray(images.labels)).to(device)
        small = 4 * images[0].numel() * len(images) <= IN_MEMORY
        self.kept = images.batch().to(device) if small else None
        self._readers = None if small else ThreadPoolExecutor(4)
        self._ahead: tuple[bytes, list[Future]] = (b"", [])

    def batch(self, chosen: np.ndarray, upcoming: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels at these positions; those at `upcoming` are read meanwhile."""
        where = torch.from_numpy(chosen).to(self.device)
        if self.kept is not None:
            return self.kept[where], self.labels[where]
        key, futures = self._ahead
        if key != chosen.tobytes():
            futures = self._read(chosen)
        if upcoming is not None and len(upcoming):
            self._ahead = (upcoming.tobytes(), self._read(upcoming))
        return torch.stack([f.result() for f in futures]).to(self.device), self.labels[where]

    def _read(self, chosen: np.ndarray) -> list[Future]:
        return [self._readers.submit(self.images.__getitem__, int(i)) for i in chosen]

    def close(self) -> None:
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)
