"""Memory-based certification: every answer is kept as a ball, and later questions inside a ball get its label.

Data-dependent smoothing has another smoothed classifier for every input, so a certified ball of one says nothing about
the next. Alfarra et al. repair this by bookkeeping: a new ball is shrunk, or its label overwritten, so that balls of
different labels never overlap, and a question that falls into a kept ball is answered by the ball's label.

What that promises: once (x, label, radius) is kept, every *later* question z with |z - x| < radius is answered by that
label. Nothing in the proof uses smoothing; any positive numbers would do as radii. What it does not promise: anything
about x + delta asked where x was not asked before, on another replica, or in another order; and whoever asks first
can plant a wrong label. For a claim about one classifier that needs no memory see `selectors`.

The promise is kept to the last bit. Images are float32; whether one lies inside a ball is decided exactly, and kept
radii are rounded down, so that balls of different labels are disjoint in exact arithmetic.

References
----------
Alfarra, Bibi, Torr and Ghanem, "Data Dependent Randomized Smoothing", UAI 2022. arXiv:2012.04351.
"""

import dataclasses
import math
import os
import threading
from collections.abc import Sequence

import numpy as np

from smoothbook.sigma.distances import NormFilter, distances, inside
from smoothbook.sigma.ledger import Ledger, LedgerError, Receipt
from smoothkit.types import ABSTAIN

RULES = ("inside both", "inside the kept ball")
CASES = {
    0: "no kept ball touches",
    1: "every ball that touches has this label",
    2: "inside a ball of another label: the prediction is overwritten",
    3: "outside, but a ball of another label overlaps: the radius is shrunk",
    4: "no answer of its own, inside a ball: the ball's label",
    5: "no answer of its own, outside every ball: no answer, nothing kept",
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a memory answers: a class (or ABSTAIN with radius 0.0), the ball kept for it, and how it came about.

    `radius` is an L2 distance in pixel units: later questions nearer than this get the same answer. `case` is a key
    of `CASES`; `computed` and `computed_radius` are what went in.
    """

    predicted: int
    radius: float
    case: int
    computed: int
    computed_radius: float


def settle(
    x: np.ndarray,
    predicted: int,
    radius: float,
    points: np.ndarray,
    labels: np.ndarray,
    radii: np.ndarray,
    *,
    rule: str = "inside both",
) -> Answer:
    """The answer for a point, from its own certificate and all kept balls at once, in whatever order they come.

    Parameters
    ----------
    x : float32 array [d]
    predicted, radius : int and float
        A class and its L2 radius, pixel units; or ABSTAIN and 0.0.
    points, labels, radii : float32 [N, d], int64 [N], float64 [N]
        Kept balls, of which those with different labels are disjoint.
    rule : "inside both" or "inside the kept ball"
        The ball kept where the label is overwritten: the largest around x inside both balls, or the larger one inside
        the kept ball alone, as the released checker has it. Both keep the promise.
    """
    low, high = distances(x, points)
    holding = inside(x, points, radii, low, high)
    if holding.any():
        label = int(labels[holding][0])
        if (labels[holding] != label).any():
            raise LedgerError("balls of different labels overlap; the memory is damaged: restore it from a copy")
        if label != predicted:
            room = max(0.0, float(_minus_down(radii[holding], high[holding]).max()))
            within_both = rule == "inside both" and predicted != ABSTAIN
            kept = min(radius, room) if within_both else room
            return Answer(label, kept, 4 if predicted == ABSTAIN else 2, predicted, radius)
    if predicted == ABSTAIN:
        return Answer(ABSTAIN, 0.0, 5, ABSTAIN, 0.0)
    other = labels != predicted
    space = max(0.0, float(_minus_down(low[other], radii[other]).min(initial=math.inf)))
    if space < radius:
        return Answer(predicted, space, 3, predicted, radius)
    touches = (low < radius + radii).any()
    return Answer(predicted, radius, 1 if touches else 0, predicted, radius)


def _minus_down(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b, never above the exact difference of these doubles: the error of the subtraction is itself a double."""
    difference = a - b
    back = difference - a
    error = (a - (difference - back)) - (b + back)  # Knuth's TwoSum
    return np.where(error < 0, np.nextafter(difference, -np.inf), difference)


class Memory:
    """Certified balls, kept for ever: in a folder that survives restarts, or with `path=None` while it lives.

    Parameters
    ----------
    path : path or None
    model : str
        What identifies the classifier whose answers are kept: the base classifier's fingerprint
        (`models.identify(...).fingerprint`) and what else decides its answers.
    shape : (C, H, W) of the images
    rule : see `settle`
    check_range : bool
        Refuse images outside [0, 1]; False for examples drawn on a larger plane.
    receipt : Receipt, optional
        Of an earlier time, kept elsewhere: refuses a memory that was put back to before it.

    Raises
    ------
    LedgerError
        If the folder is the memory of another model, image shape or rule, is in use, has lost entries, or was changed.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        *,
        model: str,
        shape: Sequence[int],
        rule: str = "inside both",
        check_range: bool = True,
        receipt: Receipt | None = None,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
        self.model, self.shape, self.rule, self.check_range = model, tuple(int(n) for n in shape), rule, check_range
        size = math.prod(self.shape)
        if size < 1:
            raise ValueError(f"shape must have at least one value, got {self.shape}")
        self._entry = np.dtype([("label", "<i8"), ("radius", "<f8"), ("image", "<f4", (size,))])
        about = {"model": model, "shape": list(self.shape), "rule": rule, "check_range": check_range}
        self._ledger = Ledger(path, about, size=self._entry.itemsize, receipt=receipt)
        self._filter = NormFilter(size)
        self._serial = threading.Lock()
        found = np.frombuffer(b"".join(self._ledger.found), dtype=self._entry)
        self._ledger.found.clear()
        self._count = len(found)
        self._points, self._labels, self._radii = (found[name].copy() for name in ("image", "label", "radius"))
        norms = [self._filter(x) for x in self._points]
        self._norms = np.array(norms).reshape(self._count, len(self._filter.starts))

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder, so that another process can open it."""
        self._ledger.close()

    @property
    def points(self) -> np.ndarray:
        """The images asked about, float32 [N, C, H, W]."""
        return self._points[: self._count].reshape(self._count, *self.shape)

    @property
    def labels(self) -> np.ndarray:
        """What they were answered, int64 [N]."""
        return self._labels[: self._count].copy()

    @property
    def radii(self) -> np.ndarray:
        """The radii kept for them, float64 [N]."""
        return self._radii[: self._count].copy()

    @property
    def receipt(self) -> Receipt:
        """What to keep elsewhere to find out whether entries were lost."""
        return self._ledger.receipt

    def answer(self, image, predicted: int, radius: float) -> Answer:
        """Settle one question and keep its ball; see `answer_all`."""
        return self.answer_all([image], [predicted], [radius])[0]

    def answer_all(self, images, predicted: Sequence[int], radii: Sequence[float]) -> list[Answer]:
        """Settle questions in their order, each in the presence of those before; kept with one write at the end.

        Answers are returned once they are on the disk. The order matters, and belongs in a report.

        Parameters
        ----------
        images : tensors or arrays [C, H, W] on [0, 1], one a question
        predicted : for each the class computed without the memory, or ABSTAIN
        radii : for each its L2 radius, pixel units; 0 on ABSTAIN

        Raises
        ------
        ValueError
            If an image, class or radius is not what was said; then nothing is kept.
        LedgerError
            If the folder cannot be written to, or was closed; then nothing is kept either.
        """
        with self._serial:
            questions = [
                (self._read(image, i), *_check_certificate(c, r, i))
                for i, (image, c, r) in enumerate(zip(images, predicted, radii, strict=True))
            ]
            before = self._count
            try:
                answers = [self._keep(x, self._settle(x, c, r)) for x, c, r in questions]
                self._ledger.append([self._payload(i) for i in range(before, self._count)])
            except BaseException:
                self._count = before
                raise
            return answers

    def look_up(self, image) -> tuple[int, float]:
        """The label of the balls that hold an image and the room left in them, or (ABSTAIN, 0.0); keeps nothing."""
        with self._serial:
            found = self._settle(self._read(image, 0), ABSTAIN, 0.0)
        return found.predicted, found.radius

    def overlaps(self) -> list[tuple[int, int]]:
        """Pairs of entries of different labels whose balls overlap for certain; always none, for audits."""
        pairs = []
        for i in range(self._count):
            near = self._candidates(self._points[i], self._radii[i], stop=i)
            near = near[self._labels[near] != self._labels[i]]
            _, high = distances(self._points[i], self._points[near])
            reach = np.nextafter(self._radii[near] + self._radii[i], 0.0)
            pairs += [(int(j), i) for j in near[high < reach]]
        return pairs

    def candidates(self, image, radius: float) -> int:
        """How many entries a question is compared with; the norm filter leaves out the others."""
        return len(self._candidates(self._read(image, 0), radius, stop=self._count))

    def _settle(self, x: np.ndarray, predicted: int, radius: float) -> Answer:
        near = self._candidates(x, radius, stop=self._count)
        return settle(x, predicted, radius, self._points[near], self._labels[near], self._radii[near], rule=self.rule)

    def _candidates(self, x: np.ndarray, radius: float, *, stop: int) -> np.ndarray:
        """Indices of entries whose balls may touch B(x, radius)."""
        bounds = self._filter.lower_bounds(self._filter(x), self._norms[:stop])
        return np.flatnonzero(bounds <= radius + self._radii[:stop])

    def _keep(self, x: np.ndarray, answer: Answer) -> Answer:
        """Keep the ball of an answer, if it is one."""
        i = self._count
        if answer.predicted == ABSTAIN:
            return answer
        if i == len(self._labels):
            more = max(16, i)
            self._points, self._norms = (np.pad(a, ((0, more), (0, 0))) for a in (self._points, self._norms))
            self._labels, self._radii = (np.pad(a, (0, more)) for a in (self._labels, self._radii))
        self._points[i], self._norms[i] = x, self._filter(x)
        self._labels[i], self._radii[i] = answer.predicted, answer.radius
        self._count = i + 1
        return answer

    def _payload(self, i: int) -> bytes:
        entry = np.zeros((), dtype=self._entry)
        entry["label"], entry["radius"], entry["image"] = self._labels[i], self._radii[i], self._points[i]
        return entry.tobytes()

    def _read(self, image, i: int) -> np.ndarray:
        """The image's values, float32 [d]: what the classifier was asked about."""
        if hasattr(image, "detach"):  # a tensor; this module does without torch
            image = image.detach().cpu().numpy()
        image = np.asarray(image)
        if image.shape != self.shape:
            raise ValueError(f"image {i} has shape {image.shape}, and this memory is of images {self.shape}")
        if not np.issubdtype(image.dtype, np.floating):
            raise ValueError(f"image {i} must be floats on [0, 1], got {image.dtype}; divide by 255")
        x = image.astype(np.float32).reshape(-1)
        if not np.isfinite(x).all():
            raise ValueError(f"image {i} must not contain NaN or infinity")
        if self.check_range and (x.min() < 0 or x.max() > 1):
            raise ValueError(
                f"image {i} must lie in [0, 1], got values from {x.min():.4g} to {x.max():.4g}; clip an attacked image, "
                f"undo a normalisation"
            )
        return x


def _check_certificate(predicted: int, radius: float, i: int) -> tuple[int, float]:
    whole = isinstance(predicted, (int, np.integer)) and not isinstance(predicted, bool)
    if not whole or predicted < ABSTAIN:
        raise ValueError(f"prediction {i} must be a class of at least 0, or ABSTAIN = {ABSTAIN}, got {predicted!r}")
    if not (np.isfinite(radius) and radius >= 0):
        raise ValueError(f"radius {i} must be finite and at least 0, in pixel units, got {radius!r}")
    if predicted == ABSTAIN and radius != 0:
        raise ValueError(f"radius {i} must be 0 where the prediction is ABSTAIN, got {radius!r}")
    return int(predicted), float(radius)
