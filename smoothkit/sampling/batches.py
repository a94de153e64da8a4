"""Tasks -> batches of rows -> votes: what happens to one batch, on buffers that stay where they are.

Work is a list of tasks (image, purpose, sample range). Rows of successive tasks fill batches of one padded
size, so images mix freely and the last batch is as large as the first: the logits of a row depend on the batch
size in their last bit, not on the row's place or company. A batch costs one upload of its plan (which draw each
row is), the noise, the forward pass, and the count; on a GPU these three can be replayed as one CUDA graph, and
nothing is read back until somebody asks for the counts.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from smoothkit.kernels.noise import noisy_rows
from smoothkit.kernels.philox import Purpose, counter_word, signed_bits
from smoothkit.kernels.votes import add_votes
from smoothkit.sampling.forward import Forward
from smoothkit.types import NoiseForm

IMAGES_AT_HAND = 192  # images kept beside the model; those of a batch and of the tasks around it
GRAPH_AFTER = 8  # batches; shorter runs do not repay the recording
PADDING = -1


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


@dataclasses.dataclass
class Plan:
    """What the rows of one batch are.

    `rows` is int64 [3, batch]: place of the image at hand, counter word, sample; `scale` float32 [batch];
    `tasks` int64 [batch], the task's number or PADDING; `parts` the same by stretches (task, start, stop);
    `complete` how many tasks are done with this batch.
    """

    rows: np.ndarray
    scale: np.ndarray
    tasks: np.ndarray
    used: int = 0
    complete: int = 0
    parts: list[tuple[Task, int, int]] = dataclasses.field(default_factory=list)

    @classmethod
    def empty(cls, batch: int) -> "Plan":
        rows = np.zeros((3, batch), dtype=np.int64)
        rows[0] = PADDING
        return cls(rows, np.zeros(batch, dtype=np.float32), np.full(batch, PADDING, dtype=np.int64))


class ImagesAtHand:
    """The images that batches under way need, on the device, at places that do not move."""

    def __init__(self, read: Callable[[int], Tensor], shape: tuple[int, ...], device: torch.device) -> None:
        self.tensor = torch.zeros(IMAGES_AT_HAND, *shape, device=device)
        self._read, self._places = read, {}

    def place(self, image: int) -> int:
        if image not in self._places:
            place = len(self._places)
            self.tensor[place].copy_(_pinned(self._read(image), self.tensor.device), non_blocking=True)
            self._places[image] = place
        return self._places[image]

    def room_for(self, image: int) -> bool:
        return image in self._places or len(self._places) < len(self.tensor)

    def clear(self) -> None:
        self._places.clear()


def plans(
    tasks: Sequence[Task], batch: int, at_hand: ImagesAtHand, ids: Sequence[int], scales: np.ndarray
) -> Iterator[Plan]:
    """Full batches for the tasks, in order; padded only at the end, or where more images meet than are kept at hand."""
    plan = Plan.empty(batch)
    for number, task in enumerate(tasks):
        start = task.start
        while start < task.stop:
            if not at_hand.room_for(task.image):
                if plan.used:
                    yield plan
                    plan = Plan.empty(batch)
                at_hand.clear()
            stop = min(task.stop, start + batch - plan.used)
            _add_rows(plan, number, task, start, stop, at_hand.place(task.image), ids[task.image], scales[task.image])
            start = stop
            if plan.used == batch:
                yield plan
                plan = Plan.empty(batch)
    if plan.used:
        yield plan


def _add_rows(plan: Plan, number: int, task: Task, start: int, stop: int, place: int, image_id: int, scale) -> None:
    rows = slice(plan.used, plan.used + stop - start)
    plan.rows[0, rows] = place
    plan.rows[1, rows] = counter_word(task.purpose, image_id)
    plan.rows[2, rows] = np.arange(start, stop)
    plan.scale[rows] = scale
    plan.tasks[rows] = number
    plan.used = rows.stop
    plan.complete = number + (stop == task.stop)
    plan.parts.append((task, start, stop))


class Step:
    """One batch: noise, forward pass, votes, on buffers that stay in place.

    Parameters
    ----------
    forward : Forward
    at_hand : ImagesAtHand
    counts : int64 tensor [slots, num_classes] on the device, to which votes are added; None only makes rows
    exactly : (task, start, stop) -> float32 copies [stop - start, C, H, W] and which failed, for noise drawn exactly
    """

    def __init__(
        self,
        forward: Forward,
        at_hand: ImagesAtHand,
        *,
        batch: int,
        seed: int,
        noise: NoiseForm,
        exactly: Callable[[Task, int, int], tuple[Tensor, Tensor]],
        counts: Tensor | None = None,
    ) -> None:
        self.forward, self.at_hand, self.counts = forward, at_hand, counts
        self.seed, self.noise, self.exactly = signed_bits(seed), noise, exactly
        self.rows = forward.empty_rows(batch, tuple(at_hand.tensor.shape[1:]))
        device = self.rows.device
        self._rows = torch.full((3, batch), PADDING, dtype=torch.int64, device=device)
        self._scale = torch.zeros(batch, device=device)
        self._slots = torch.full((batch,), PADDING, dtype=torch.int64, device=device)
        self._replay: Callable[[], None] | None = None
        self._batches = 0

    def __call__(self, plan: Plan, first_task: int) -> None:
        """Add the plan's votes; the vote of task `first_task` + i goes to row i of the counts."""
        self._load(plan, np.where(plan.tasks == PADDING, PADDING, plan.tasks - first_task))
        if self._batches == GRAPH_AFTER and self.rows.device.type == "cuda" and not self.noise.exact:
            self._capture()
        self._batches += 1
        if self._replay is not None:
            self._replay()
        else:
            self._work()

    def fill(self, plan: Plan) -> None:
        """Make the plan's rows, and nothing else."""
        self._load(plan, plan.tasks)
        if not self.noise.exact:
            self._fill()

    def _load(self, plan: Plan, slots: np.ndarray) -> None:
        for buffer, values in ((self._rows, plan.rows), (self._scale, plan.scale), (self._slots, slots)):
            buffer.copy_(_pinned(torch.from_numpy(values), buffer.device), non_blocking=True)
        if self.noise.exact:
            self._fill_exactly(plan)

    def _work(self) -> None:
        with self.forward.running():
            if not self.noise.exact:
                self._fill()
            add_votes(self.counts, self.forward(self.rows), self._slots)

    def _fill(self) -> None:
        forward, grid = self.forward, self.noise.grid or 0
        noisy_rows(self.rows, self.at_hand.tensor, self._rows, self._scale, self.seed, grid, forward.mean, forward.std)

    def _fill_exactly(self, plan: Plan) -> None:
        first = 0
        for part in plan.parts:
            copies, failed = self.exactly(*part)
            if self.forward.mean is not None:
                mean, std = (x.cpu().reshape(-1, 1, 1) for x in (self.forward.mean, self.forward.std))
                copies = (copies - mean) / std
            rows = slice(first, first + len(copies))
            self.rows[rows].copy_(copies)
            self._slots[rows].masked_fill_(failed.to(self._slots.device), PADDING)  # it votes for nobody, and counts
            first = rows.stop
        self.rows[first:] = 0

    def _capture(self) -> None:
        """Record the work as a CUDA graph: replaying it costs one launch instead of hundreds.

        What cannot be recorded goes on launch by launch. Votes added meanwhile are taken back.
        """
        device, before = self.rows.device, self.counts.clone()
        try:
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(2):  # what is set up on first use must not be recorded
                    self._work()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._work()
            self._replay = graph.replay
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of this network ({str(error).splitlines()[0][:120]})", stacklevel=2)
        self.counts.copy_(before)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Host memory from which a GPU copies by itself; the allocator keeps it until the copy is done."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
