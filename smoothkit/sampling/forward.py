"""How a base classifier is run: precision, layout, compilation. Settled once for a run and stated with its votes.

The roads to the logits differ in speed, and in the last bit: `eager` or `compiled`, images in plain or
`channels_last` order. Precision is more than that. A network in bfloat16 is another base classifier, whose
certificates hold for it alone, so precision is never chosen for you and belongs to a record's identity.

What is run is first compared with the classifier as given, on the fixed rows of `probe`; a road that gives something
else, or is no faster, is left.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from smoothkit.models.base import evaluating
from smoothkit.sampling.probe import Answers, ask, check_logits, difference, exactly, in_parts

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
    rows can fold it in; `dtype` and `channels_last` say what the rows should be. What is made ready is then compared with
    the classifier as given, on the fixed rows of `probe`; a way of running it that gives something else is left.

    Parameters
    ----------
    base_classifier : callable, images [batch, C, H, W] -> logits [batch, num_classes]
    answers : Answers
        What the classifier gave when it was called as it is.
    device : torch.device
    precision : one of `PRECISIONS`
        `float32` is IEEE float32, also on GPUs whose default is shorter; `tf32` allows those shorter
        products (CUDA only); `bfloat16` casts the network.

    Raises
    ------
    ValueError
        For a precision the device or the classifier does not have, or a classifier whose answer for a row depends on
        the rows beside it.
    """

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        answers: Answers,
        *,
        device: torch.device,
        precision: str = "float32",
    ) -> None:
        check_precision(base_classifier, precision, device)
        self.base_classifier, self.answers, self.device, self.precision = base_classifier, answers, device, precision
        self.num_classes = answers.logits.shape[1]
        self.samples_per_second: float | None = None
        self._copy: nn.Module | None = None
        if precision == "bfloat16":
            _warn_if_slow(device)
        self._settle()
        if answers.repeatable:
            self._check_company()

    # --- which way of running it is the classifier ---

    def _settle(self) -> None:
        """The fastest way to run the classifier that gives its answers."""
        *faster, plain = self._ways()
        for way in faster:
            self._prepare(*way)
            try:
                apart = self._apart()
            except MemoryError:
                raise
            except Exception as error:
                fault = _first_line(error)
            else:
                if apart <= DIFFERENCE[self.precision]:
                    return
                fault = f"its logits are {apart:.2g} of their size apart"
            how = "" if self.mean is None else ", normalised beforehand"
            warnings.warn(f"the network does not run {self.road}{how} ({fault}); going on without", stacklevel=5)
        self._prepare(*plain)
        apart = self._apart()
        if not apart <= DIFFERENCE[self.precision]:
            raise ValueError(
                f"in {self.precision} the logits of this base classifier are {apart:.2g} of their size away from those it gave when "
                f"called as it is; it must not change from call to call, and in another precision than its own it is cast: "
                f"certify it in float32, or cast inside a callable of your own"
            )

    def _apart(self) -> float:
        """How far the logits of this way of running are from the classifier's own, where those repeat."""
        with self.evaluating(), self.running():
            logits = in_parts(self, self.rows_of(self.answers.rows))
        return difference(self.answers.logits, logits) if self.answers.repeatable else 0.0

    def _ways(self) -> list[tuple[bool, bool]]:
        """(take the normalisation out, channels_last), the fastest first; the last is the classifier as it is."""
        layouts = [True, False] if _is_convolutional(self.base_classifier) else [False]
        folds = [True, False] if self._folded() is not None else [False]
        return [(fold, layout) for fold in folds for layout in layouts]

    def _folded(self) -> tuple[nn.Module, Tensor, Tensor] | None:
        fold = getattr(self.base_classifier, "fold", None)
        return None if fold is None else fold(tuple(self.answers.rows.shape[1:]))

    def _prepare(self, fold: bool, channels_last: bool) -> None:
        self.dtype, self.mean, self.std = torch.float32, None, None
        self.road = Road(channels_last=channels_last)
        network = self.base_classifier
        if fold:
            network, self.mean, self.std = self._folded()
        if self.precision == "bfloat16":
            network = self._cast(network, fold)
        self._plain = self._call = _on_a_copy(network) if self.answers.in_place else network

    def _cast(self, network: nn.Module, folded: bool) -> Callable[[Tensor], Tensor]:
        """A bfloat16 copy; what a BaseClassifier does around its network stays in float32."""
        self._copy = made = copy.deepcopy(network)
        inner = getattr(made, "network", None)
        if folded or not isinstance(inner, nn.Module):
            made.to(torch.bfloat16)
        else:
            inner.to(torch.bfloat16).register_forward_pre_hook(lambda _, rows: tuple(r.bfloat16() for r in rows))
            return made
        if folded:
            self.dtype = torch.bfloat16
            return made
        return lambda rows: made(rows.bfloat16())

    def _check_company(self) -> None:
        """Refuse a classifier that answers a row otherwise in another place, or beside other rows."""
        rows = self.rows_of(self.answers.rows)
        half = len(rows) // 2
        turned, others = rows.flip(0), torch.cat([rows[:half], rows[:half].flip(0) * 0.5])
        with self.evaluating(), self.running():
            alone = in_parts(self, rows.clone())
            apart = max(
                difference(alone, in_parts(self, _like(turned, rows)).flip(0)),
                difference(alone[:half], in_parts(self, _like(others, rows))[:half]),
            )
        if not apart <= DIFFERENCE[self.precision]:
            raise ValueError(
                f"the base classifier looks at its batch: with other rows beside it, the logits of a row moved by {apart:.2g} of "
                f"their size. Votes must be independent; give normalisation layers running statistics, or adapt them beforehand"
            )

    # --- running it ---

    def rows_of(self, images: Tensor) -> Tensor:
        """Images as the rows that this way of running the classifier takes."""
        rows = images if self.mean is None else (images - self.mean[:, None, None]) / self.std[:, None, None]
        return _like(rows.to(self.dtype, copy=True), self.empty_rows(1, tuple(images.shape[1:])))

    def empty_rows(self, batch: int, shape: tuple[int, ...]) -> Tensor:
        """A buffer for a batch of rows, zero."""
        layout = torch.channels_last if self.road.channels_last else torch.contiguous_format
        return torch.zeros(batch, *shape, dtype=self.dtype, device=self.device).to(memory_format=layout)

    def __call__(self, rows: Tensor) -> Tensor:
        return check_logits(self._call(rows), len(rows), self.num_classes)

    def running(self) -> contextlib.AbstractContextManager:
        """No gradients, and matrix products of the stated precision; modules must be in eval mode already."""
        return exactly(short=self.precision == "tf32")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Modules in eval mode, also the copy; the mode is given back afterwards."""
        with evaluating(self.base_classifier), evaluating(self._copy):
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
            apart = difference(self._plain(rows), logits)
        if not apart <= DIFFERENCE[self.precision]:
            warnings.warn(f"the compiled network gives logits {apart:.2g} apart; going on without", stacklevel=2)
            return
        faster = how_much_faster(functools.partial(self.seconds, rows), self._plain, compiled)
        if faster >= WORTH or keep_slower:
            self._call, self.road = compiled, dataclasses.replace(self.road, compiled=True)
            if self.samples_per_second:
                self.samples_per_second *= faster


def how_much_faster(seconds: Callable[[Callable], float], plain: Callable, other: Callable, rounds: int = 3) -> float:
    """Median over rounds of the plain call's time over the other's, in turn; `seconds` measures one call."""
    return statistics.median(seconds(plain) / seconds(other) for _ in range(rounds))


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
    """A `Forward`; with the `fingerprint` of a module, the one made earlier in this process for the same classifier.

    The same is what has the same weights and gives the same answers now: an adapter may have been changed since, or a number.
    """
    check_precision(base_classifier, precision, device)
    answers = ask(base_classifier, shape, device)
    if fingerprint is None or not isinstance(base_classifier, nn.Module) or not answers.repeatable:
        return Forward(base_classifier, answers, device=device, precision=precision)
    # by object as well: an equal module of the past may have been trained since
    key = id(base_classifier), fingerprint, answers.digest, tuple(shape), str(device), precision, batch
    if key not in _PREPARED:
        _PREPARED[key] = Forward(base_classifier, answers, device=device, precision=precision)
        while len(_PREPARED) > KEPT:
            _PREPARED.popitem(last=False)
    _PREPARED.move_to_end(key)
    return _PREPARED[key]


def _on_a_copy(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """For a network that changes its input in place: the rows are used again."""
    return lambda rows: network(rows.clone())


def _like(rows: Tensor, other: Tensor) -> Tensor:
    last = other.is_contiguous(memory_format=torch.channels_last) and not other.is_contiguous()
    return rows.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


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


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
