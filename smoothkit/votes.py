"""Noisy copies -> base classifier -> votes, streamed in batches: the engine.

`VoteStream` runs tasks (image, purpose, sample range) through a base classifier; `batches` says what happens to a
batch, `forward` how the classifier is run. Counts stay on the device until a group of tasks is done.
"""

import copy
import dataclasses
import itertools
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smoothkit.batches import ImagesAtHand, NoiseForm, Plan, Step, Task, plans
from smoothkit.data import Images
from smoothkit.forward import COMPILE_AFTER, WORTH, Forward, now, prepare
from smoothkit.models import identify
from smoothkit.noise import Purpose, content_digest, load_kernels, noise_scale
from smoothkit.noise_exact import exact_noisy_copies
from smoothkit.progress import Progress, format_seconds, say
from smoothkit.records import BLOCK_KEY, ESTIMATE, PER_IMAGE, SELECT, Identity, Record, Row, create_record, open_record
from smoothkit.types import StoppingRule, block_edges, check_samples, check_sigma
from smoothkit.workers import spread

CPU_BATCH = 100  # larger batches lose to page faults
CUDA_BATCHES = (256, 512, 1024, 2048, 4096)  # tried in turn while they are faster
FLUSH_TASKS, FLUSH_SECONDS = 64, 1.0  # counts come to the host after so many tasks, or so long
PART_ROWS = 50_000  # of a part; what a driver of many workers holds
PART_SECONDS = 10.0  # between parts of a record; what a killed run loses at most
KERNELS_AFTER = 60.0  # seconds of run that repay loading numba's kernel for images of any size
UNIT_SAMPLES = 20_000  # of the tasks that are handed to a worker together
LONG_RUN = 20.0  # seconds; a longer run announces its cost

PURPOSES = {SELECT: Purpose.SELECT, ESTIMATE: Purpose.ESTIMATE}


class VoteStream:
    """Runs tasks through a base classifier and yields (task, counts, batch) in order of completion.

    Parameters
    ----------
    base_classifier : callable, float32 images [batch, C, H, W] -> logits [batch, num_classes]
    images : Images
    sigma : float, or one for each image
    seed : int
    grid : int, None or NoiseForm
        Steps of the grid that noise is rounded to; None for float noise.
    batch : int, optional
        Rows of every forward pass; 100 on a CPU, measured on a GPU. Halved when memory runs out.
    device : str, optional
        Where batches go; by default where a module's parameters are.
    precision : "float32", "tf32" or "bfloat16", see `forward.Forward`
    compile : bool, optional
        Compile the network, or not; by default where the run is long enough to repay it.
    fingerprint : str, optional
        Of the classifier's weights; a classifier prepared before in this process is then used again.
    """

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        images: Images,
        *,
        sigma: float | Sequence[float],
        seed: int,
        grid: int | NoiseForm | None,
        batch: int | None = None,
        device: str | torch.device | None = None,
        precision: str = "float32",
        compile: bool | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.base_classifier, self.images, self.seed = base_classifier, images, seed
        self.sigmas = np.broadcast_to(np.asarray(sigma, dtype=np.float64), len(images))
        for s in np.unique(self.sigmas):
            check_sigma(float(s))
        self.noise = grid if isinstance(grid, NoiseForm) else NoiseForm(grid)
        self._scales = np.array([noise_scale(float(s), self.noise.grid) for s in self.sigmas])
        self.device = torch.device(device) if device else _device_of(base_classifier)
        if isinstance(base_classifier, nn.Module):
            base_classifier.to(self.device)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
        if batch is not None:
            check_samples("batch", batch)
        self._asked = dict(seed=seed, grid=self.noise, device=device, precision=precision, compile=compile)
        self._fingerprint = fingerprint
        self._last_image: tuple[int, Tensor] | None = None
        self.digests: dict[int, str] = {}  # of every image read so far
        self.shape = tuple(self.image(0).shape)
        self._compile, self._drawn = compile, 0
        self.forward: Forward = prepare(
            base_classifier, self.shape, device=self.device, precision=precision, fingerprint=fingerprint, batch=batch
        )
        self._at_hand = ImagesAtHand(self.image, self.shape, self.device)
        with self.forward.evaluating():
            self.batch = batch or self._find_batch()
            self._probe()

    num_classes = property(lambda self: self.forward.num_classes)
    samples_per_second = property(lambda self: self.forward.samples_per_second)

    @property
    def settings(self) -> dict:
        """With which another process makes the same stream."""
        return {**self._asked, "batch": self.batch, "fingerprint": self._fingerprint}

    @property
    def road(self) -> str:
        """How the forward pass is run, as provenance keeps it."""
        return str(self.forward.road)

    def image(self, i: int) -> Tensor:
        """images[i], read once for all its successive batches."""
        if self._last_image is None or self._last_image[0] != i:
            self._last_image = (i, self.images[i])
            if i not in self.digests:
                self.digests[i] = content_digest(self._last_image[1])
        return self._last_image[1]

    # --- before the run ---

    def example(self) -> Tensor:
        """A full batch of noisy rows of the first image, in the dtype and layout the forward pass takes."""
        step = self._step()
        step.fill(next(self._plans([Task(0, Purpose.PILOT, 0, self.batch)])))
        self._at_hand.clear()
        return step.rows

    def _probe(self) -> None:
        """One batch twice: number of classes, whether answers repeat, and how fast they come."""
        rows = None
        while rows is None:
            try:
                rows = self.example()
                if self.forward.samples_per_second is None:
                    self._probe_with(rows)
                if self._compile:
                    self.forward.compile(rows, keep_slower=True)
            except torch.OutOfMemoryError:
                rows = None
                self._halve()

    def _probe_with(self, rows: Tensor) -> None:
        forward = self.forward
        with forward.running():
            first = forward(rows).clone()
            if not bool(first.isfinite().any()):
                raise ValueError(
                    "the base classifier gives NaN or infinity for every logit of a probe batch; "
                    "check its weights and normalisation"
                )
            begin = now(self.device)
            again = forward(rows)
            seconds = now(self.device) - begin
            _warn_if_not_repeatable(first.cpu(), again.cpu())
        forward.num_classes, forward.samples_per_second = first.shape[1], self.batch / max(seconds, 1e-9)

    def _find_batch(self) -> int:
        """The default on a CPU; on a GPU larger ones while they are faster."""
        if self.device.type != "cuda":
            return CPU_BATCH
        best, rate = CUDA_BATCHES[0], 0.0
        for batch in CUDA_BATCHES:
            try:
                rows = self.forward.empty_rows(batch, self.shape)
                with self.forward.running():
                    self.forward(rows)
                seconds = min(self.forward.seconds(rows) for _ in range(3))
            except torch.OutOfMemoryError:
                break
            if batch / seconds < rate * WORTH:
                break
            best, rate = batch, batch / seconds
        return best

    def _halve(self) -> None:
        if self.batch == 1:
            raise MemoryError(
                "the device ran out of memory with a single image; use a smaller model or device='cpu'"
            ) from None
        self.batch = max(1, self.batch // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory: going on with a compute batch of {self.batch}", stacklevel=3)

    def _settle(self, samples: int) -> None:
        """Load kernels, and compile, once the run is known to be long enough or has shown it."""
        if samples / self.samples_per_second > KERNELS_AFTER and self.device.type == "cpu":
            load_kernels()
        undecided = self._compile is None and isinstance(self.base_classifier, nn.Module)
        if undecided and max(samples, self._drawn) / self.samples_per_second > COMPILE_AFTER:
            self._compile = True
            say("compiling the network first: up to a minute, once; this run repays it")
            self.forward.compile(self.example())
            say(f"going on {self.road}, at about {self.samples_per_second:,.0f} samples a second")

    # --- the run ---

    def run(
        self, tasks: Sequence[Task], progress: Callable[[int], None] = lambda samples: None
    ) -> Iterator[tuple[Task, np.ndarray, int]]:
        """Yield (task, int64 counts [num_classes], batch) for every task; `progress` hears of samples done."""
        remaining = list(tasks)
        with self.forward.evaluating():
            self._settle(sum(t.stop - t.start for t in remaining))
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
        counts = torch.zeros(FLUSH_TASKS + self.batch + 1, self.num_classes, dtype=torch.int64, device=self.device)
        step = self._step(counts)
        first, complete, last_flush = 0, 0, time.perf_counter()
        for plan in self._plans(tasks):
            try:
                step(plan, first)
            except (Exception, KeyboardInterrupt):  # what was finished before is not lost
                yield from self._finished(tasks[first:complete], counts)
                raise
            complete = plan.complete
            progress(plan.used)
            self._drawn += plan.used
            done = complete - first
            if done and (
                self.device.type == "cpu"  # where reading counts costs nothing
                or done >= FLUSH_TASKS
                or complete == len(tasks)
                or time.perf_counter() - last_flush > FLUSH_SECONDS
            ):
                yield from self._finished(tasks[first:complete], counts)
                under_way = counts[done].clone()
                counts.zero_()
                counts[0] = under_way
                self._at_hand.clear()
                first, last_flush = complete, time.perf_counter()

    def _finished(self, tasks: Sequence[Task], counts: Tensor) -> Iterator[tuple[Task, np.ndarray, int]]:
        for task, votes in zip(tasks, counts[: len(tasks)].cpu().numpy().copy(), strict=True):
            yield task, votes, self.batch

    def _plans(self, tasks: Sequence[Task]) -> Iterator[Plan]:
        return plans(tasks, self.batch, self._at_hand, self.images.ids, self._scales)

    def _step(self, counts: Tensor | None = None) -> Step:
        return Step(
            self.forward,
            self._at_hand,
            batch=self.batch,
            seed=self.seed,
            noise=self.noise,
            counts=counts,
            exactly=self._exact_copies,
        )

    def _exact_copies(self, task: Task, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return exact_noisy_copies(
            self.image(task.image),
            sigma=float(self.sigmas[task.image]),
            seed=self.seed,
            purpose=task.purpose,
            image_id=self.images.ids[task.image],
            start=start,
            stop=stop,
            grid=self.noise.grid,
        )


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
        stacklevel=5,
    )


# --- filling a record --------------------------------------------------------------------------------


def noise_form(grid: int | str | None, images: Images) -> NoiseForm:
    """The noise that `grid` asks for: "data", "exact", a number of steps, or None for float noise."""
    if grid == "exact":
        if images.grid is None:
            raise ValueError(
                f"grid='exact' needs data that declares a grid, and {images.dataset} declares none; use grid=None"
            )
        return NoiseForm(images.grid, exact=True)
    return NoiseForm(images.grid if grid == "data" else grid)


def open_run(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    *,
    sigma: float | Sequence[float],
    stopping_rule: StoppingRule,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    grid: int | str | None = "data",
    batch: int | None = None,
    device: str | None = None,
    precision: str = "float32",
    compile: bool | None = None,
    model_id: str | None = None,
) -> tuple[Record, VoteStream]:
    """The record a run writes into and the stream that fills it; parameters as in `collect_votes`."""
    noise = noise_form(grid, images)
    if out is None and not isinstance(base_classifier, nn.Module):
        model_id = model_id or "unnamed"  # votes in memory are never mixed with those of another run
    known = identify(base_classifier, model_id)
    batch, compile = _as_before(out, batch, compile)
    stream = VoteStream(
        base_classifier,
        images,
        sigma=sigma,
        seed=seed,
        grid=noise,
        batch=batch,
        device=device,
        precision=precision,
        compile=compile,
        fingerprint=known.fingerprint,
    )
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
        sigma=float(sigma) if np.ndim(sigma) == 0 else PER_IMAGE,
        seed=seed,
        noise=str(noise),
        precision=precision,
        stopping_rule=stopping_rule,
    )
    names = images.class_names or getattr(base_classifier, "class_names", ())
    return create_record(out, identity, names), stream


def _as_before(out, batch: int | None, compile: bool | None) -> tuple[int | None, bool | None]:
    """Compute batch and road of a record that is gone on with, where none are given: a change could move a last bit."""
    if out is None or not (Path(out) / "run.json").is_file():
        return batch, compile
    for part in open_record(out).provenance()[-1:]:
        batch = part.get("compute_batch") if batch is None else batch
        if compile is None and "road" in part:
            compile = part["road"].startswith("compiled")
    return batch, compile


def collect_votes(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    *,
    sigma: float | Sequence[float],
    stopping_rule: StoppingRule,
    progress: bool = True,
    executor: Executor | None = None,
    **settings,
) -> Record:
    """Sample all votes a fixed stopping rule asks for, into a record that survives interruption.

    Parameters
    ----------
    base_classifier : callable, images [B, C, H, W] on [0, 1] -> logits [B, num_classes]
    images : Images
    sigma : float, or one for each image
        Several are kept image by image; they must not depend on the samples drawn here (see `sigma.search`).
    stopping_rule : StoppingRule
    progress : bool
        Show a progress bar, and before a long run a line that says what it will cost.
    executor : concurrent.futures.Executor, optional
        Does the work in other processes or on other machines, as `client.get_executor()` of Dask; this process then
        reads images and writes the record. The counts are the same.
    seed : int
    out : path, optional
        The record's folder; an unfinished record of the same run goes on where it stopped. Without it
        the record lives in memory.
    grid : "data" (the data set's own), a number of steps, None for float noise, or "exact"
        Noise is rounded to this grid before it is added; "exact" draws it on the data's grid by exact thresholds.
    batch, device, precision, compile : see `VoteStream`
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
    check_sigmas(record, stream)
    tasks = missing_tasks(record, images)
    if not tasks:
        return record
    samples, per_image = sum(t.stop - t.start for t in tasks), stopping_rule.n0 + stopping_rule.n
    announce(stream, samples, len({t.image for t in tasks}))
    with (
        Progress(len(images), f"votes at {_sigma_in_words(record)}", show=progress) as bar,
        RecordWriter(record, stream) as writer,
    ):
        bar.update(len(images) - samples / per_image)
        for task, counts, made in run_on(executor, stream, tasks, lambda done: bar.update(done / per_image)):
            writer.add(task, counts, made)
    return record


# --- on other processes and machines -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Job:
    """What every worker needs once."""

    base_classifier: Callable[[Tensor], Tensor]
    settings: dict


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Tasks that are done together, with the images they need; `tasks` count within `images`."""

    number: int
    tasks: tuple[Task, ...]
    pixels: Tensor  # [images, C, H, W]
    sigmas: tuple[float, ...]
    ids: tuple[int, ...]
    keys: tuple[str, ...]


def run_on(
    executor: Executor | None,
    stream: VoteStream,
    tasks: Sequence[Task],
    progress: Callable[[int], None] = lambda samples: None,
) -> Iterator[tuple[Task, np.ndarray, dict]]:
    """Yield (task, counts, provenance) for every task, done by the stream itself or by an executor's workers."""
    if executor is None:
        for task, counts, batch in stream.run(tasks, progress):
            yield task, counts, provenance(stream.device, batch, stream.road)
        return
    groups: dict[int, list[Task]] = {}
    base = stream.base_classifier
    if isinstance(base, nn.Module) and stream.device.type != "cpu":
        base = copy.deepcopy(base).cpu()
    for unit, results in spread(executor, _do_unit, _Job(base, stream.settings), _units(stream, tasks, groups)):
        for task, (counts, made) in zip(groups.pop(unit.number), results, strict=True):
            progress(task.stop - task.start)
            yield task, counts, made


def _units(stream: VoteStream, tasks: Iterable[Task], groups: dict[int, list[Task]]) -> Iterator[_Unit]:
    """Successive tasks of some UNIT_SAMPLES samples; an image travels with each unit that needs it."""
    group: list[Task] = []
    samples = 0
    for number, task in enumerate(tasks):
        group.append(task)
        samples += task.stop - task.start
        if samples >= UNIT_SAMPLES:
            groups[number] = group
            yield _unit(stream, number, group)
            group, samples = [], 0
    if group:
        groups[-1] = group
        yield _unit(stream, -1, group)


def _unit(stream: VoteStream, number: int, tasks: Sequence[Task]) -> _Unit:
    needed = list(dict.fromkeys(task.image for task in tasks))
    place = {image: i for i, image in enumerate(needed)}
    return _Unit(
        number,
        tuple(dataclasses.replace(task, image=place[task.image]) for task in tasks),
        torch.stack([stream.image(i) for i in needed]),
        tuple(float(stream.sigmas[i]) for i in needed),
        tuple(stream.images.ids[i] for i in needed),
        tuple(stream.images.keys[i] for i in needed),
    )


def _do_unit(job: _Job, unit: _Unit) -> list[tuple[np.ndarray, dict]]:
    """A worker's part: counts and provenance of each task."""
    images = Images(
        dataset="unit",
        split="all",
        subset="all",
        index=np.arange(len(unit.keys)),
        keys=unit.keys,
        labels=np.full(len(unit.keys), -1),
        class_names=(),
        grid=None,
        read=unit.pixels.__getitem__,
        ids=unit.ids,
    )
    stream = VoteStream(job.base_classifier, images, sigma=unit.sigmas, **job.settings)
    found = {
        task: (counts, provenance(stream.device, batch, stream.road)) for task, counts, batch in stream.run(unit.tasks)
    }
    return [found[task] for task in unit.tasks]


def _sigma_in_words(record: Record) -> str:
    return "a sigma for each image" if record.per_image else f"sigma {record.sigma:g}"


def check_sigmas(record: Record, stream: VoteStream) -> None:
    """Refuse to go on with a record that has an image at another sigma."""
    if not record.per_image:
        return
    rows = record.rows()
    kept = dict(zip(rows["image_id"], rows["sigma"], strict=True))
    for key, image_id, sigma in zip(stream.images.keys, stream.images.ids, stream.sigmas, strict=True):
        if kept.get(image_id, sigma) != sigma:
            raise ValueError(
                f"image {key!r} was sampled at sigma {kept[image_id]!r} in {record.path}, and now is to be at {float(sigma)!r}; "
                f"give the sigmas of that run, or another folder"
            )


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
    """Notes finished tasks in the journal, and writes them as parts now and then and at the end.

    Nothing finished is lost, on Ctrl-C or when the process is killed.
    """

    def __init__(self, record: Record, stream: VoteStream) -> None:
        self.record, self.stream = record, stream
        self._journal = record.journal()
        self._pending: dict[str, tuple[dict, list[Row]]] = {}  # by provenance: each part has one
        self._last_part, self._rows = time.perf_counter(), 0

    def add(self, task: Task, counts: np.ndarray, made: dict) -> None:
        """Keep the counts of a finished task; `made` is their provenance."""
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
            sigma=float(self.stream.sigmas[i]) if self.record.per_image else None,
        )
        known = json.dumps({name: value for name, value in made.items() if name != "time"})
        self._pending.setdefault(known, (made, []))[1].append(row)
        self._journal.add(row, made)
        self._rows += 1
        if self._rows >= PART_ROWS or time.perf_counter() - self._last_part > PART_SECONDS:
            self.write()

    def write(self) -> None:
        for made, rows in self._pending.values():
            self.record.append(rows, made | {"time": now_in_words()})
        self._pending.clear()
        self._rows = 0
        self._journal.clear()
        self._journal = self.record.journal()
        self._last_part = time.perf_counter()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.write()


def provenance(device: torch.device, batch: int, road: str) -> dict:
    """What may differ between parts of one record, kept with each."""
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "compute_batch": batch,
        "road": road,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "time": now_in_words(),
    }


def now_in_words() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
