"""How a base classifier is run: precision, layout, compilation. Settled once for a run and stated with its votes.

The roads to the logits differ in speed, and in the last bit: `eager` or `compiled`, images in plain or
`channels_last` order. Precision is more than that. A network in bfloat16 is another base classifier, whose
certificates hold for it alone, so precision is never chosen for you and belongs to a record's identity.

Whatever a road gives is first compared with the plain forward pass on a probe batch; one that is no faster, or
that gives something else, is left.
"""

import collections
import contextlib
import copy
import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from smoothkit.models.base import evaluating

PRECISIONS = ("float32", "tf32", "bfloat16")
CONVOLUTIONS = 4  # a network with more spatial convolutions than this is run in channels_last order
COMPILE_AFTER = 240.0  # seconds of plain forward passes that are left; below that compiling (10 to 60 s) is not repaid
WORTH = 1.03  # a road must be this much faster to be taken
DIFFERENCE = {"float32": 1e-3, "tf32": 3e-2, "bfloat16": 1e-1}  # of logits, in units of their own size
KEPT = 4  # prepared networks that a process keeps


@dataclasses.dataclass(frozen=True)
class Road:
    """What is done to the forward pass; the words of `str(road)` stand in a record's provenance."""

    channels_last: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return ("compiled" if self.compiled else "eager") + (" channels_last" if self.channels_last else "")


class Forward:
    """A base classifier made ready: noisy rows in the `dtype` and layout it wants -> logits.

    Where the classifier begins with a normalisation, it is taken out (`mean`, `std`) so that whoever makes the
    rows can fold it in; `dtype` and `channels_last` say what the rows should be.

    Parameters
    ----------
    base_classifier : callable, images [batch, C, H, W] -> logits [batch, num_classes]
    shape : (C, H, W) of the images
    device : torch.device
    precision : one of `PRECISIONS`
        `float32` is IEEE float32, also on GPUs whose default is shorter; `tf32` allows those shorter
        products (CUDA only); `bfloat16` casts the network.

    Raises
    ------
    ValueError
        For a precision the device or the classifier does not have.
    """

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        *,
        device: torch.device,
        precision: str = "float32",
    ) -> None:
        check_precision(base_classifier, precision, device)
        self.base_classifier, self.device, self.precision = base_classifier, device, precision
        self.dtype, self.mean, self.std = torch.float32, None, None
        self.road = Road(channels_last=_is_convolutional(base_classifier))
        self._network, self._plain = base_classifier, base_classifier
        fold = getattr(base_classifier, "fold", None)
        folded = fold(shape) if fold is not None else None
        if folded is not None:
            self._network, self.mean, self.std = folded
        if precision == "bfloat16":
            _warn_if_slow(device)
            self._cast(folded is not None)
        self._plain = self._call = self._network
        self.num_classes = 0  # known after the first batch
        self.samples_per_second: float | None = None

    def _cast(self, folded: bool) -> None:
        """A bfloat16 copy of the network; preprocessing stays in float32 where it can be told apart."""
        preprocess = None if folded else getattr(self.base_classifier, "preprocess", None)
        network = copy.deepcopy(self._network if preprocess is None else self.base_classifier.network)
        network = network.to(torch.bfloat16)
        if folded:
            self.dtype, self._network = torch.bfloat16, network
        elif preprocess is None:
            self._network = lambda rows: network(rows.bfloat16())
        else:
            self._network = lambda rows: network(preprocess(rows).bfloat16())
        self._copy = network

    def empty_rows(self, batch: int, shape: tuple[int, ...]) -> Tensor:
        """A buffer for a batch of rows, zero."""
        layout = torch.channels_last if self.road.channels_last else torch.contiguous_format
        return torch.zeros(batch, *shape, dtype=self.dtype, device=self.device).to(memory_format=layout)

    def __call__(self, rows: Tensor) -> Tensor:
        logits = self._call(rows)
        self._check(logits, rows)
        return logits

    def _check(self, logits: object, rows: Tensor) -> None:
        good = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(rows) and logits.shape[1] > 0
        if not good or not logits.is_floating_point() or (self.num_classes and logits.shape[1] != self.num_classes):
            found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            wanted = self.num_classes or "num_classes"
            raise ValueError(f"the base classifier must give float logits [{len(rows)}, {wanted}], got {found}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """No gradients, and matrix products of the stated precision; modules must be in eval mode already."""
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        short = self.precision == "tf32"
        torch.set_float32_matmul_precision("high" if short else "highest")
        torch.backends.cudnn.allow_tf32 = short
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Modules in eval mode, also the copy; the mode is given back afterwards."""
        with evaluating(self.base_classifier), evaluating(getattr(self, "_copy", None)):
            yield

    def seconds(self, rows: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> float:
        """Time of one forward pass."""
        begin = now(self.device)
        with self.running():
            (self._call if call is None else call)(rows)
        return now(self.device) - begin

    def compile(self, rows: Tensor, *, keep_slower: bool = False) -> None:
        """Compile for batches like `rows`; kept only where it is faster and gives the same logits.

        A machine without a compiler, or a network that cannot be compiled, goes on as it was, with a warning.
        """
        if self.road.compiled:
            return
        compiled = torch.compile(self._plain, dynamic=False)
        begin = time.perf_counter()
        try:
            with _quietly(), self.running():
                logits = compiled(rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            warnings.warn(f"compiling did not work ({_first_line(error)}); going on without", stacklevel=2)
            return
        self.compile_seconds = time.perf_counter() - begin
        with self.running():
            apart = _relative_difference(self._plain(rows), logits)
        if not apart <= DIFFERENCE[self.precision]:
            warnings.warn(f"the compiled network gives logits {apart:.2g} apart; going on without", stacklevel=2)
            return
        faster = self._how_much_faster(rows, compiled)
        if faster >= WORTH or keep_slower:
            self._call, self.road = compiled, dataclasses.replace(self.road, compiled=True)
            if self.samples_per_second:
                self.samples_per_second *= faster

    def _how_much_faster(self, rows: Tensor, other: Callable[[Tensor], Tensor], rounds: int = 3) -> float:
        """Median over rounds of the plain forward's time over the other's, in turn."""
        ratios = sorted(self.seconds(rows, self._plain) / self.seconds(rows, other) for _ in range(rounds))
        return ratios[rounds // 2]


_PREPARED: collections.OrderedDict[tuple, Forward] = collections.OrderedDict()


def prepare(
    base_classifier: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    device: torch.device,
    precision: str = "float32",
    fingerprint: str | None = None,
    batch: int | None = None,
) -> Forward:
    """A `Forward`; with the `fingerprint` of a module, the one made earlier in this process for the same weights."""
    if fingerprint is None or not isinstance(base_classifier, nn.Module):
        return Forward(base_classifier, shape, device=device, precision=precision)
    # by object as well: an equal module of the past may have been trained since
    key = id(base_classifier), fingerprint, tuple(shape), str(device), precision, batch
    if key not in _PREPARED:
        _PREPARED[key] = Forward(base_classifier, shape, device=device, precision=precision)
        while len(_PREPARED) > KEPT:
            _PREPARED.popitem(last=False)
    _PREPARED.move_to_end(key)
    return _PREPARED[key]


def check_precision(base_classifier: Callable, precision: str, device: torch.device) -> None:
    if precision not in PRECISIONS:
        near = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "float16": "bfloat16"}.get(precision)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}{hint}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision 'tf32' is a property of NVIDIA GPUs, and this run is on {device}; use 'float32'")
    if not isinstance(base_classifier, nn.Module):
        if precision == "bfloat16":
            raise ValueError("precision 'bfloat16' needs an nn.Module; a plain callable casts inside, under 'float32'")
        return
    types = {p.dtype for p in base_classifier.parameters() if p.is_floating_point()}
    if not types <= {torch.float32, torch.bfloat16} or (precision != "bfloat16" and torch.bfloat16 in types):
        found = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        raise ValueError(
            f"the base classifier's parameters are {found}, and precision is {precision!r}; call .float() on it, "
            f"or ask for precision='bfloat16'"
        )


def _warn_if_slow(device: torch.device) -> None:
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        warnings.warn(
            "this processor has no bfloat16 instructions, so bfloat16 is many times slower here than float32",
            stacklevel=6,
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the compiler's remarks about itself and about GPUs that are not there."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _is_convolutional(base_classifier: Callable) -> bool:
    if not isinstance(base_classifier, nn.Module):
        return False
    spatial = (m for m in base_classifier.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1)
    return sum(1 for _ in spatial) > CONVOLUTIONS


def _relative_difference(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.float()
    both = a.isfinite() & b.isfinite()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()) or not both.any():
        return float("inf")
    return float((a - b)[both].abs().max() / a[both].abs().max().clamp(min=1e-30))


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
