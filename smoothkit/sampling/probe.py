"""What a base classifier answers on fixed rows, asked before any vote counts, as its owner would call it.

The rows are the same on every machine, for every run. What is seen there decides three things: whether the engine's way of
running the classifier is the classifier (`forward`), whether a record is gone on with by the classifier that began it
(`Identity.probe`: in the answers everything counts, also what structure and weights do not show, as the adapter in use or
a plain number), and whether a row is answered on its own, whatever lies beside it in a batch.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from smoothkit.kernels.noise import standard_normal_reference
from smoothkit.kernels.philox import Purpose
from smoothkit.models.base import evaluating

ROWS = 8
DIRECTIONS = 2  # random signs by which a row's logits are summed; their sums are kept
SEED = 20_130_826  # of the rows and the signs; part of the meaning of every kept probe


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What a classifier gave for `probe_rows`: twice, and whether it left the rows as they were."""

    rows: Tensor  # float32 [ROWS, C, H, W]
    logits: Tensor  # float32 [ROWS, num_classes]
    repeatable: bool
    in_place: bool

    @property
    def digest(self) -> str:
        """Of every bit; for one process on one machine."""
        return hashlib.sha256(self.logits.cpu().numpy().tobytes()).hexdigest()

    @property
    def text(self) -> str:
        """Numbers for `Identity.probe`, which other machines get but for last digits; empty where answers do not repeat."""
        if not self.repeatable:
            return ""
        logits = np.nan_to_num(self.logits.cpu().double().numpy(), nan=0.0, posinf=0.0, neginf=0.0)
        signs = np.sign(_normals(logits.shape[1], Purpose.PILOT, DIRECTIONS)).T  # [num_classes, DIRECTIONS]
        return " ".join(f"{number:.5g}" for number in (logits @ signs / np.sqrt(len(signs))).ravel())


@functools.lru_cache(maxsize=8)
def probe_rows(shape: tuple[int, ...]) -> Tensor:
    """Float32 [ROWS, C, H, W]: half of it pictures of noise on [0, 1], half noisy copies of them, beyond it."""
    z = _normals(int(np.prod(shape)), Purpose.PILOT, ROWS).reshape(ROWS, *shape)
    pictures = np.clip(0.5 + 0.25 * z[: ROWS // 2], 0, 1)
    rows = np.concatenate([pictures, pictures + np.float32(0.5) * z[ROWS // 2 :]]).astype(np.float32)
    return torch.from_numpy(rows)


def _normals(count: int, purpose: Purpose, samples: int) -> np.ndarray:
    return standard_normal_reference(count, seed=SEED, purpose=purpose, image_id=0, start=0, stop=samples)


def ask(base_classifier: Callable[[Tensor], Tensor], shape: tuple[int, ...], device: torch.device) -> Answers:
    """Call a base classifier on the fixed rows, twice.

    Raises
    ------
    ValueError
        If it gives anything but float logits of at least two classes, a row an image, some of them finite.
    """
    rows = probe_rows(tuple(shape)).to(device)
    dtype = torch.bfloat16 if _is_bfloat16(base_classifier) else torch.float32
    with evaluating(base_classifier), exactly():
        given = rows.to(dtype, copy=True)
        logits = in_parts(base_classifier, given)
        again = in_parts(base_classifier, rows.to(dtype, copy=True))
        in_place = not torch.equal(given, rows.to(dtype))
    if not bool(logits.isfinite().any()):
        raise ValueError(
            "the base classifier gives NaN or infinity for every logit of a probe batch; check its weights and normalisation"
        )
    repeatable = torch.equal(logits.nan_to_num(), again.nan_to_num())
    return Answers(rows, logits, repeatable, in_place)


def in_parts(call: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Logits float32 of a few rows at once, or of fewer where memory is short.

    Raises
    ------
    MemoryError
        If it does not even last for one.
    """
    at_once = len(rows)
    while True:
        try:
            return torch.cat([check_logits(call(part), len(part)).float() for part in rows.split(at_once)]).clone()
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise MemoryError(
                    "the device ran out of memory with a single image; use a smaller model or device='cpu'"
                ) from None
            at_once //= 2


def check_logits(logits: object, rows: int, num_classes: int = 0) -> Tensor:
    """Refuse what is no batch of votes; `num_classes` 0 means: not known yet."""
    good = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == rows and logits.shape[1] > 0
    if not good or not logits.is_floating_point() or (num_classes and logits.shape[1] != num_classes):
        found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the base classifier must give float logits [{rows}, {num_classes or 'num_classes'}], got {found}"
        )
    if logits.shape[1] == 1:
        raise ValueError(
            "the base classifier has one logit, so one class, which every image has for certain; for two classes give two "
            "logits, as torch.cat([-x, x], dim=1)"
        )
    return logits


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two batches of logits, in units of the first's largest; infinity where they do not compare."""
    a, b = a.float(), b.float()
    both = a.isfinite() & b.isfinite()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    if not both.any():
        return 0.0
    return float((a - b)[both].abs().max() / a[both].abs().max().clamp(min=1e-30))


@contextlib.contextmanager
def exactly(short: bool = False) -> Iterator[None]:
    """No gradients, and matrix products of IEEE float32, or with `short` of the GPU's shorter kind (tf32)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if short else "highest")
    torch.backends.cudnn.allow_tf32 = short
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _is_bfloat16(base_classifier: object) -> bool:
    parameters = base_classifier.parameters() if isinstance(base_classifier, nn.Module) else ()
    return any(p.dtype == torch.bfloat16 for p in parameters)
