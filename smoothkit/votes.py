"""Noisy copies -> base classifier -> votes, streamed in batches: the engine.

Work is a list of tasks (image, purpose, sample range). Rows of successive tasks fill batches of one
padded size, so images mix freely and the last batch is as large as the first: the logits of a row
depend on the batch size in their last bit, not on the row's place or company. Counts stay on the
device until a group of tasks is done.
"""

import contextlib
import dataclasses
import itertools
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from smoothkit.data import Images
from smoothkit.models import identify
from smoothkit.noise import Purpose, content_digest, noisy_copies
from smoothkit.progress import Progress, format_seconds, say
from smoothkit.records import BLOCK_KEY, ESTIMATE, SELECT, Identity, Record, Row, create_record
from smoothkit.types import StoppingRule, block_edges, check_samples, check_sigma

DEFAULT_BATCH = {"cpu": 100, "cuda": 400}  # on a CPU larger batches lose to page faults
FLUSH_TASKS, FLUSH_SECONDS = 64, 1.0  # counts come to the host after so many tasks, or so long
PART_SECONDS = 10.0  # between parts of a record; what a killed run loses at most
LONG_RUN = 20.0  # seconds; a longer run announces its cost

PURPOSES = {SELECT: Purpose.SELECT, ESTIMATE: Purpose.ESTIMATE}


@dataclasses.dataclass(frozen=True)
class Task:
    """Samples start..stop-1 of images[image], for one purpose."""

    image: int
    purpose: Purpose
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a task needs 0 <= start < stop, got start={self.start}, stop={self.stop}")


def count_votes_reference(logits: Tensor) -> Tensor:
    """Votes of logits [n, num_classes]: ties go to the lowest class, a row with NaN votes for nobody."""
    voting = ~logits.isnan().any(dim=-1)  # [n]
    return torch.bincount(logits[voting].argmax(dim=-1), minlength=logits.shape[-1])


@contextlib.contextmanager
def evaluating(base_classifier: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Modules in eval mode and no gradients; the mode is given back afterwards."""
    modules = list(base_classifier.modules()) if isinstance(base_classifier, nn.Module) else []
    were_training = [m for m in modules if m.training]
    for m in were_training:
        m.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for m in were_training:
            m.training = True


class VoteStream:
    """Runs tasks through a base classifier and yields (task, counts, batch) in order of completion.

    Parameters
    ----------
    base_classifier : callable, float32 images [batch, C, H, W] -> logits [batch, num_classes]
    images : Images
    sigma, seed, grid : the noise, as in `noise.noisy_copies`
    batch : int, optional
        Rows of every forward pass; halved when memory runs out.
    device : str, optional
        Where batches go; by default where a module's parameters are.
    """

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        images: Images,
        *,
        sigma: float,
        seed: int,
        grid: int | None,
        batch: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        check_sigma(sigma)
        self.base_classifier, self.images = base_classifier, images
        self.sigma, self.seed, self.grid = sigma, seed, grid
        self.device = torch.device(device) if device else _device_of(base_classifier)
        if isinstance(base_classifier, nn.Module):
            base_classifier.to(self.device)
        self.batch = DEFAULT_BATCH.get(self.device.type, 100) if batch is None else batch
        check_samples("batch", self.batch)
        self._last_image: tuple[int, Tensor] | None = None
        self.digests: dict[int, str] = {}  # of every image read so far
        self.num_classes, self.samples_per_second = self._probe()

    def image(self, i: int) -> Tensor:
        """images[i], read once for all its successive batches."""
        if self._last_image is None or self._last_image[0] != i:
            self._last_image = (i, self.images[i])
            if i not in self.digests:
                self.digests[i] = content_digest(self._last_image[1])
        return self._last_image[1]

    def _noisy(self, task: Task, start: int, stop: int) -> Tensor:
        return noisy_copies(
            self.image(task.image),
            sigma=self.sigma,
            seed=self.seed,
            purpose=task.purpose,
            image_id=self.images.ids[task.image],
            start=start,
            stop=stop,
            grid=self.grid,
        )

    def _logits(self, rows: Tensor) -> Tensor:
        logits = self.base_classifier(rows.to(self.device, non_blocking=True))
        if (
            not isinstance(logits, Tensor)
            or logits.ndim != 2
            or len(logits) != len(rows)
            or not logits.is_floating_point()
        ):
            found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the base classifier must give float logits [{len(rows)}, num_classes], got {found}")
        return logits

    def _probe(self) -> tuple[int, float]:
        """One batch thrice: number of classes, whether answers repeat, and how fast they come."""
        task = Task(0, Purpose.PILOT, 0, self.batch)
        with evaluating(self.base_classifier):
            while True:
                try:
                    first = self._logits(self._noisy(task, 0, self.batch))
                    break
                except torch.OutOfMemoryError:
                    self._halve()
            begin = time.perf_counter()
            again = [self._logits(self._noisy(task, 0, self.batch)).cpu() for _ in range(2)]
            seconds = (time.perf_counter() - begin) / 2
        first = first.cpu()
        if bool(first.isnan().all()):
            raise ValueError(
                "the base classifier gives NaN for every logit of a probe batch; check its weights and normalisation"
            )
        _warn_if_not_repeatable(first, again[1])
        return first.shape[1], self.batch / seconds

    def _halve(self) -> None:
        if self.batch == 1:
            raise MemoryError(
                "the device ran out of memory with a single image; use a smaller model or device='cpu'"
            ) from None
        self.batch = max(1, self.batch // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory: going on with a compute batch of {self.batch}", stacklevel=3)

    def run(
        self, tasks: Sequence[Task], progress: Callable[[int], None] = lambda samples: None
    ) -> Iterator[tuple[Task, np.ndarray, int]]:
        """Yield (task, int64 counts [num_classes], batch) for every task; `progress` hears of samples done."""
        remaining = list(tasks)
        while remaining:
            finished = 0
            try:
                for result in self._run_at_one_batch_size(remaining, progress):
                    finished += 1
                    yield result
                return
            except torch.OutOfMemoryError:
                remaining = remaining[finished:]
                self._halve()

    def _run_at_one_batch_size(self, tasks: Sequence[Task], progress) -> Iterator[tuple[Task, np.ndarray, int]]:
        # a batch completes at most `batch` tasks beyond a nearly full group
        slots_at_once = FLUSH_TASKS + self.batch + 1
        counts = torch.zeros(slots_at_once * self.num_classes + 1, dtype=torch.int64, device=self.device)
        by_slot = counts[:-1].view(slots_at_once, self.num_classes)
        group_start, last_flush = 0, time.perf_counter()
        for rows, numbers, used, complete in self._batches(tasks):
            self._add_votes(counts, rows, numbers - group_start, used)
            progress(used)
            done = complete - group_start
            if done and (
                done >= FLUSH_TASKS or complete == len(tasks) or time.perf_counter() - last_flush > FLUSH_SECONDS
            ):
                for task, votes in zip(tasks[group_start:complete], by_slot[:done].cpu().numpy().copy(), strict=True):
                    yield task, votes, self.batch
                under_way = by_slot[done].clone()
                counts.zero_()
                by_slot[0] = under_way
                group_start, last_flush = complete, time.perf_counter()

    def _add_votes(self, counts: Tensor, rows: Tensor, slots: np.ndarray, used: int) -> None:
        """Add a batch to the histogram over (slot, class). Padding and NaN rows go to its last cell, which nobody reads."""
        with evaluating(self.base_classifier):
            logits = self._logits(rows)
            nobody = len(counts) - 1
            cells = torch.from_numpy(slots).to(self.device) * self.num_classes + logits.argmax(dim=-1)
            cells[used:] = nobody
            cells = torch.where(logits.isnan().any(dim=-1), nobody, cells)
            counts.index_add_(0, cells, torch.ones_like(cells))

    def _batches(self, tasks: Sequence[Task]) -> Iterator[tuple[Tensor, np.ndarray, int, int]]:
        """Full batches of rows, their tasks' numbers, rows used, and how many tasks are then complete."""
        rows, slots, filled = None, np.zeros(self.batch, dtype=np.int64), 0
        for number, task in enumerate(tasks):
            start = task.start
            while start < task.stop:
                stop = min(task.stop, start + self.batch - filled)
                noisy = self._noisy(task, start, stop)
                if rows is None:
                    rows = torch.zeros(self.batch, *noisy.shape[1:])
                rows[filled : filled + stop - start] = noisy
                slots[filled : filled + stop - start] = number
                filled += stop - start
                start = stop
                if filled == self.batch or (number == len(tasks) - 1 and start == task.stop):
                    slots[filled:] = number
                    rows[filled:] = 0
                    yield rows, slots, filled, number + (start == task.stop)
                    rows, slots, filled = torch.zeros_like(rows), np.zeros_like(slots), 0


def _device_of(base_classifier: Callable) -> torch.device:
    if isinstance(base_classifier, nn.Module):
        for tensor in (*base_classifier.parameters(), *base_classifier.buffers()):
            return tensor.device
    return torch.device("cpu")


def _warn_if_not_repeatable(first: Tensor, again: Tensor) -> None:
    if torch.equal(first.nan_to_num(), again.nan_to_num()):
        return
    difference = float((first - again).abs().nan_to_num().max())
    flipped = int((first.argmax(1) != again.argmax(1)).sum())
    warnings.warn(
        f"the base classifier is not deterministic: the same batch gave logits {difference:.3g} apart and changed "
        f"{flipped} of {len(first)} votes; certificates hold only if its randomness does not depend on the image",
        stacklevel=4,
    )


# --- filling a record --------------------------------------------------------------------------------


def noise_name(grid: int | None) -> str:
    return "float" if grid is None else f"grid:{grid}"


def open_run(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    *,
    sigma: float,
    stopping_rule: StoppingRule,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    grid: int | str | None = "data",
    batch: int | None = None,
    device: str | None = None,
    model_id: str | None = None,
) -> tuple[Record, VoteStream]:
    """The record a run writes into and the stream that fills it; parameters as in `collect_votes`."""
    check_sigma(sigma)
    grid = images.grid if grid == "data" else grid
    if out is None and not isinstance(base_classifier, nn.Module):
        model_id = model_id or "unnamed"  # votes in memory are never mixed with those of another run
    known = identify(base_classifier, model_id)
    stream = VoteStream(base_classifier, images, sigma=sigma, seed=seed, grid=grid, batch=batch, device=device)
    if images.labels.max() >= stream.num_classes:
        worst = int(images.labels.argmax())
        raise ValueError(
            f"label {images.labels[worst]} of image {images.keys[worst]!r} lies outside the base classifier's {stream.num_classes} classes"
        )
    identity = Identity(
        dataset=images.dataset,
        split=images.split,
        subset=images.subset,
        model=known.name,
        fingerprint=known.fingerprint,
        num_classes=stream.num_classes,
        sigma=float(sigma),
        seed=seed,
        noise=noise_name(grid),
        precision="float32",
        stopping_rule=stopping_rule,
    )
    names = images.class_names or getattr(base_classifier, "class_names", ())
    return create_record(out, identity, names), stream


def collect_votes(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    *,
    sigma: float,
    stopping_rule: StoppingRule,
    progress: bool = True,
    **settings,
) -> Record:
    """Sample all votes a fixed stopping rule asks for, into a record that survives interruption.

    Parameters
    ----------
    base_classifier : callable, images [B, C, H, W] on [0, 1] -> logits [B, num_classes]
    images : Images
    sigma : float
    stopping_rule : StoppingRule
    progress : bool
        Show a progress bar, and before a long run a line that says what it will cost.
    seed : int
    out : path, optional
        The record's folder; an unfinished record of the same run goes on where it stopped. Without it
        the record lives in memory.
    grid : "data" (the data set's own), a number of steps, or None for float noise
    batch, device : see `VoteStream`
    model_id : str, optional
        Name of a base classifier that cannot be fingerprinted; needed for a record on disk.

    Raises
    ------
    RecordError
        If `out` holds another run, or images differ from those recorded.
    KeyboardInterrupt
        Passed on after all finished blocks are written.
    """
    record, stream = open_run(base_classifier, images, sigma=sigma, stopping_rule=stopping_rule, **settings)
    tasks = missing_tasks(record, images)
    if not tasks:
        return record
    samples, per_image = sum(t.stop - t.start for t in tasks), stopping_rule.n0 + stopping_rule.n
    announce(stream, samples, len({t.image for t in tasks}))
    with (
        Progress(len(images), f"votes at sigma {sigma:g}", show=progress) as bar,
        RecordWriter(record, stream) as writer,
    ):
        bar.update(len(images) - samples / per_image)
        for task, counts, batch in stream.run(tasks, lambda done: bar.update(done / per_image)):
            writer.add(task, counts, batch)
    return record


def missing_tasks(record: Record, images: Images) -> list[Task]:
    """What the record's fixed stopping rule still asks for, image by image."""
    done, rule = check_contents(record, images), record.stopping_rule
    blocks = [(SELECT, a, b) for a, b in itertools.pairwise(block_edges(rule.n0))]
    blocks += [(ESTIMATE, a, b) for a, b in itertools.pairwise(rule.edges())]
    return [
        Task(i, PURPOSES[p], a, b)
        for i, image_id in enumerate(images.ids)
        for p, a, b in blocks
        if (image_id, p, a, b) not in done
    ]


def check_contents(record: Record, images: Images) -> set[tuple[int, str, int, int]]:
    """Blocks already counted, as (image_id, purpose, start, stop); refuses images that are not those recorded."""
    rows = record.rows()
    digests = dict(zip(rows["image_id"], rows["digest"], strict=True))
    for i, image_id in enumerate(images.ids):
        if image_id in digests and digests[image_id] != images.digest(i):
            raise ValueError(
                f"image {images.keys[i]!r} of {images.dataset} is not the one recorded in {record.path}: its contents differ; "
                f"restore the data or give another folder"
            )
    return set(rows[BLOCK_KEY].itertuples(index=False, name=None))


def announce(stream: VoteStream, samples: int, images: int, how: str = "") -> None:
    """One line about the cost of a long run, before it starts."""
    seconds = samples / stream.samples_per_second
    if seconds > LONG_RUN:
        say(
            f"{how}{samples:,} samples to draw for {images:,} images at about {stream.samples_per_second:,.0f} a second on "
            f"{stream.device}: {format_seconds(seconds)}. It can be interrupted and goes on where it stopped."
        )


class RecordWriter:
    """Gathers finished tasks and writes them as parts, now and then and at the end: on Ctrl-C nothing finished is lost."""

    def __init__(self, record: Record, stream: VoteStream) -> None:
        self.record, self.stream = record, stream
        self._pending: dict[int, list[Row]] = {}  # by compute batch: each part has one
        self._last_part = time.perf_counter()

    def add(self, task: Task, counts: np.ndarray, batch: int) -> None:
        images, i = self.stream.images, task.image
        row = Row(
            index=int(images.index[i]),
            key=images.keys[i],
            image_id=images.ids[i],
            digest=self.stream.digests[i],
            label=int(images.labels[i]),
            purpose=task.purpose.name.lower(),
            start=task.start,
            stop=task.stop,
            counts=tuple(counts.tolist()),
        )
        self._pending.setdefault(batch, []).append(row)
        if time.perf_counter() - self._last_part > PART_SECONDS:
            self.write()

    def write(self) -> None:
        for batch, rows in self._pending.items():
            self.record.append(rows, provenance(self.stream.device, batch))
        self._pending.clear()
        self._last_part = time.perf_counter()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.write()


def provenance(device: torch.device, batch: int) -> dict:
    """What may differ between parts of one record, kept with each."""
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "compute_batch": batch,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
