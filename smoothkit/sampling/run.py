"""Fill a record: what is missing, handed to this process or to workers, block by block."""

import copy
import dataclasses
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smoothkit.certify.bounds import sigma_of_proof
from smoothkit.certify.sequential import check_rule, still_open
from smoothkit.data import Images
from smoothkit.kernels.philox import DIGEST_BITS, Purpose
from smoothkit.models.base import identify
from smoothkit.records.format import BLOCK_KEY, ESTIMATE, PER_IMAGE, SELECT, Identity, Row
from smoothkit.records.record import Record, create_record, open_record
from smoothkit.sampling.batches import Task
from smoothkit.sampling.progress import Progress, format_seconds, say
from smoothkit.sampling.stream import PURPOSES, VoteStream, noise_of
from smoothkit.sampling.workers import spread
from smoothkit.types import NoiseForm, StoppingRule, block_edges, check_sigma

PART_ROWS = 50_000  # of a part; what a driver of many workers holds
PART_SECONDS = 10.0  # between parts of a record; what a killed run loses at most
UNIT_SAMPLES = 20_000  # of the tasks that are handed to a worker together
LONG_RUN = 20.0  # seconds; a longer run announces its cost


def open_run(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    *,
    sigma: float | Sequence[float],
    stopping_rule: StoppingRule,
    noise: str | NoiseForm | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    batch: int | None = None,
    device: str | None = None,
    precision: str = "float32",
    compile: bool | None = None,
    model_id: str | None = None,
    scales: Sequence[float] = (),
) -> tuple[Record, VoteStream]:
    """The record a run writes into and the stream that fills it; parameters as in `collect_votes`."""
    noise = noise_of(noise, images, sigma)
    if out is None and not isinstance(base_classifier, nn.Module):
        model_id = model_id or "unnamed"  # votes in memory are never mixed with those of another run
    known = identify(base_classifier, model_id)
    batch, compile = _as_before(out, batch, compile)
    stream = VoteStream(
        base_classifier, images, sigma=sigma, seed=seed, noise=noise, batch=batch, device=device, precision=precision,
        compile=compile, fingerprint=known.fingerprint, digest_bits=_digest_bits(out),
    )  # fmt: skip
    _check_labels(images, stream.num_classes)
    identity = Identity(
        dataset=images.dataset, split=images.split, subset=images.subset, model=known.name, fingerprint=known.fingerprint,
        num_classes=stream.num_classes, sigma=float(sigma) if np.ndim(sigma) == 0 else PER_IMAGE, seed=seed,
        noise=str(noise), precision=precision, stopping_rule=stopping_rule,
        probe=stream.forward.answers.text, scales=tuple(map(float, scales)),
    )  # fmt: skip
    names = images.class_names or getattr(base_classifier, "class_names", ())
    return create_record(out, identity, names), stream


def _check_labels(images: Images, num_classes: int) -> None:
    if images.labels.max() >= num_classes:
        worst = int(images.labels.argmax())
        raise ValueError(
            f"label {images.labels[worst]} of image {images.keys[worst]!r} lies outside the base classifier's {num_classes} classes"
        )


def _as_before(out, batch: int | None, compile: bool | None) -> tuple[int | None, bool | None]:
    """Compute batch and road of a record that is gone on with, where none are given: a change could move a last bit."""
    if out is None or not (Path(out) / "run.json").is_file():
        return batch, compile
    for part in open_record(out).provenance()[-1:]:
        batch = part.get("compute_batch") if batch is None else batch
        if compile is None and "road" in part:
            compile = part["road"].startswith("compiled")
    return batch, compile


def _digest_bits(out: str | os.PathLike | None) -> int:
    """Of the images of a record that is gone on with, or of a new one."""
    rows = open_record(out).rows() if out is not None and (Path(out) / "run.json").is_file() else ()
    return 4 * len(rows["digest"].iloc[0]) if len(rows) else DIGEST_BITS


def collect_votes(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    *,
    sigma: float | Sequence[float],
    stopping_rule: StoppingRule,
    noise: str | NoiseForm | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    batch: int | None = None,
    device: str | None = None,
    precision: str = "float32",
    compile: bool | None = None,
    model_id: str | None = None,
    scales: Sequence[float] = (),
    progress: bool = True,
    executor: Executor | None = None,
) -> Record:
    """Sample all votes a stopping rule asks for, into a record that survives interruption.

    Under a sequential rule each image is sampled until the rule says stop; images still open share the batches.

    Parameters
    ----------
    base_classifier : callable, images [B, C, H, W] on [0, 1] -> logits [B, num_classes]
    images : Images
    sigma : float, or one for each image
        Several are kept image by image; they must not depend on the samples drawn here. They go with a fixed rule.
    stopping_rule : StoppingRule, as `StoppingRule(n0, n, alpha)` or `certify.sequential_rule`
    noise : optional, see `NoiseForm.parse`
        "grid", "exact-grid", "grid:255", "exact-grid:255" or "float"; by default the data's grid where it has one.
    seed : int
    out : path, optional
        The record's folder; an unfinished record of the same run goes on where it stopped. Without it
        the record lives in memory.
    batch, device, precision, compile : see `VoteStream`
    model_id : str, optional
        Name of a base classifier that cannot be fingerprinted; needed for a record on disk.
    scales : sigmas, optional
        All of the cascade that this record is one scale of; see `sampling.cascade`.
    progress : bool
        Show a progress bar, and before a long run a line that says what it will cost.
    executor : concurrent.futures.Executor, optional
        Does the work in other processes or on other machines, as `client.get_executor()` of Dask; this process then
        reads images, makes decisions and writes the record. The counts are the same.

    Returns
    -------
    Record, to be read with `certify.certificates`

    Raises
    ------
    RecordError
        If `out` holds another run, or images differ from those recorded.
    ValueError
        If a radius of a sequential rule is beyond what unanimous votes certify; see `certify.sequential.check_rule`.
    KeyboardInterrupt
        Passed on after all finished blocks are written.
    """
    noise = noise_of(noise, images, sigma)
    if stopping_rule.kind != "fixed":
        check_rule(stopping_rule, _proof(sigma, noise))
    record, stream = open_run(
        base_classifier, images, sigma=sigma, stopping_rule=stopping_rule, noise=noise, seed=seed, out=out, batch=batch,
        device=device, precision=precision, compile=compile, model_id=model_id, scales=scales,
    )  # fmt: skip
    fill = _fill if stopping_rule.kind == "fixed" else _fill_look_by_look
    fill(record, stream, executor, progress)
    return record


def _fill(record: Record, stream: VoteStream, executor: Executor | None, progress: bool) -> None:
    images, rule = stream.images, record.stopping_rule
    check_sigmas(record, stream)
    tasks = missing_tasks(record, images)
    if not tasks:
        return
    samples, per_image = sum(t.stop - t.start for t in tasks), rule.n0 + rule.n
    announce(stream, samples, len({t.image for t in tasks}))
    with (
        Progress(len(images), f"votes at {_sigma_in_words(record)}", show=progress) as bar,
        RecordWriter(record, stream) as writer,
    ):
        bar.update(len(images) - samples / per_image)
        for task, counts, made in run_on(executor, stream, tasks, lambda done: bar.update(done / per_image)):
            writer.add(task, counts, made)


def _fill_look_by_look(record: Record, stream: VoteStream, executor: Executor | None, progress: bool) -> None:
    images, rule = stream.images, record.stopping_rule
    check_contents(record, images)
    looks = _Looks(record, images)
    announce(stream, len(images) * (rule.n0 + rule.looks[0]), len(images), how="at the least ")
    with (
        Progress(len(images), f"decisions at {_sigma_in_words(record)}", show=progress) as bar,
        RecordWriter(record, stream) as writer,
    ):
        undecided = list(range(len(images)))
        while undecided:
            tasks = looks.next_tasks(undecided)
            bar.update(len(undecided) - len(tasks))
            undecided = [task.image for task in tasks]
            for task, counts, made in run_on(executor, stream, tasks):
                looks.add(task, counts)
                writer.add(task, counts, made)


def _proof(sigma: float, noise: NoiseForm) -> float:
    check_sigma(sigma)  # a sequential rule is for one sigma
    return float(sigma_of_proof(sigma, noise))


class _Looks:
    """What a sequential rule has seen of each image, and which block it wants next."""

    def __init__(self, record: Record, images: Images) -> None:
        self.rule, self.labels = record.stopping_rule, images.labels
        self.sigma = _proof(record.sigma, NoiseForm.parse(record.identity.noise))
        known = record.looks().set_index("image_id")
        self._seen = {
            purpose: [list(known.at[i, purpose_name]) if i in known.index else [] for i in images.ids]
            for purpose, purpose_name in ((Purpose.SELECT, "selection"), (Purpose.ESTIMATE, "estimation"))
        }
        self._select = list(itertools.pairwise(block_edges(self.rule.n0)))
        self._estimate = list(itertools.pairwise(self.rule.edges()))

    def add(self, task: Task, counts: np.ndarray) -> None:
        self._seen[task.purpose][task.image].append(counts)

    def next_tasks(self, candidates: Sequence[int]) -> list[Task]:
        """The next block of each candidate that the rule has not stopped."""
        selected, estimated = self._seen[Purpose.SELECT], self._seen[Purpose.ESTIMATE]
        tasks = {
            i: Task(i, Purpose.SELECT, *self._select[len(selected[i])])
            for i in candidates
            if len(selected[i]) < len(self._select)
        }
        guessed = {i: int(np.sum(selected[i], axis=0).argmax()) for i in candidates if i not in tasks}
        wanted = [i for i, c_a in guessed.items() if not (self.rule.skip_wrong and c_a != self.labels[i])]
        successes = [np.cumsum([counts[guessed[i]] for counts in estimated[i]], dtype=np.int64) for i in wanted]
        for i, is_open in zip(wanted, still_open(self.rule, self.sigma, successes), strict=True):
            if is_open:
                tasks[i] = Task(i, Purpose.ESTIMATE, *self._estimate[len(estimated[i])])
        return [tasks[i] for i in candidates if i in tasks]


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
        if image_id in digests and digests[image_id] != images.digest(i, 4 * len(digests[image_id])):
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


def as_run(precision: str, made: dict) -> str:
    """How the base classifier was run, in words, from a part's provenance: precision, compute batch, form, device."""
    return f"{precision}, batch {made['compute_batch']}, {made['road']}, {made['device']}"


def now_in_words() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
