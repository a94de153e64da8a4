"""Noisy copies -> base classifier -> votes, streamed in batches: the engine.

`VoteStream` runs tasks (image, purpose, sample range) through a base classifier; `batches` says what happens to a
batch, `forward` how the classifier is run. Counts stay on the device until a group of tasks is done.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from smoothkit.data import Images
from smoothkit.kernels.noise import load_kernels, noise_scale
from smoothkit.kernels.noise_exact import exact_noisy_copies
from smoothkit.kernels.philox import DIGEST_BITS, OFF_GRID, Purpose, content_digest, off_grid
from smoothkit.records.format import ESTIMATE, SELECT
from smoothkit.sampling.batches import ImagesAtHand, Plan, Step, Task, plans
from smoothkit.sampling.forward import COMPILE_AFTER, WORTH, Forward, now, prepare
from smoothkit.sampling.progress import say
from smoothkit.types import NoiseForm, check_samples, check_sigma

CPU_BATCH = 100  # larger batches lose to page faults
CUDA_BATCHES = (256, 512, 1024, 2048, 4096)  # tried in turn while they are faster
FLUSH_TASKS, FLUSH_SECONDS = 64, 1.0  # counts come to the host after so many tasks, or so long
KERNELS_AFTER = 60.0  # seconds of run that repay loading numba's kernel for images of any size

PURPOSES = {SELECT: Purpose.SELECT, ESTIMATE: Purpose.ESTIMATE}


class VoteStream:
    """Runs tasks through a base classifier and yields (task, counts, batch) in order of completion.

    Parameters
    ----------
    base_classifier : callable, float32 images [batch, C, H, W] -> logits [batch, num_classes]
    images : Images
    sigma : float, or one for each image
    seed : int
    noise : optional, see `NoiseForm.parse`
        By default on the images' own grid, or float where they have none.
    batch : int, optional
        Rows of every forward pass; 100 on a CPU, measured on a GPU. Halved when memory runs out.
    device : str, optional
        Where batches go; by default where a module's parameters are.
    precision : "float32", "tf32" or "bfloat16", see `forward.Forward`
    compile : bool, optional
        Compile the network, or not; by default where the run is long enough to repay it.
    fingerprint : str, optional
        Of the classifier's weights; a classifier prepared before in this process is then used again.
    digest_bits : int
        Of the digests of images; 56 in records of earlier versions.
    """

    def __init__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        images: Images,
        *,
        sigma: float | Sequence[float],
        seed: int,
        noise: str | NoiseForm | None = None,
        batch: int | None = None,
        device: str | torch.device | None = None,
        precision: str = "float32",
        compile: bool | None = None,
        fingerprint: str | None = None,
        digest_bits: int = DIGEST_BITS,
    ) -> None:
        self.base_classifier, self.images, self.seed = base_classifier, images, seed
        self._digest_bits = digest_bits
        self.sigmas = np.broadcast_to(np.asarray(sigma, dtype=np.float64), len(images))
        self.noise = noise_of(noise, images, sigma)
        self._scales = np.array([noise_scale(float(s), self.noise.grid) for s in self.sigmas])
        self.device = torch.device(device) if device else _device_of(base_classifier)
        if isinstance(base_classifier, nn.Module):
            base_classifier.to(self.device)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
        if batch is not None:
            check_samples("batch", batch)
        self._asked = dict(seed=seed, noise=self.noise, device=device, precision=precision, compile=compile)
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

    @property
    def num_classes(self) -> int:
        return self.forward.num_classes

    @property
    def samples_per_second(self) -> float:
        """As measured on the probe batch, and again once compiled."""
        return self.forward.samples_per_second

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
                self._check_grid(i, self._last_image[1])
                self.digests[i] = content_digest(self._last_image[1], self._digest_bits)
        return self._last_image[1]

    def _check_grid(self, i: int, image: Tensor) -> None:
        if self.noise.grid is not None and (off := off_grid(image, self.noise.grid)) > OFF_GRID:
            raise ValueError(
                f"image {self.images.keys[i]!r} has values up to {off:.3f} steps off the 1/{self.noise.grid} grid that noise "
                f"{str(self.noise)!r} stands for; a certificate would be of another image: use noise='float'"
            )

    # --- before the run ---

    def example(self) -> Tensor:
        """A full batch of noisy rows of the first image, in the dtype and layout the forward pass takes."""
        step = self._step()
        step.fill(next(self._plans([Task(0, Purpose.PILOT, 0, self.batch)])))
        self._at_hand.clear()
        return step.rows

    def _probe(self) -> None:
        """One batch twice: whether answers repeat, and how fast they come."""
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
            begin = now(self.device)
            again = forward(rows)
            seconds = now(self.device) - begin
            _warn_if_not_repeatable(first.cpu(), again.cpu())
        forward.samples_per_second = self.batch / max(seconds, 1e-9)

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


def noise_of(noise: str | NoiseForm | None, images: Images, sigma: float | Sequence[float]) -> NoiseForm:
    """The form of the noise that is asked for these images, checked against every sigma."""
    for s in np.unique(sigma):
        check_sigma(s.item() if isinstance(s, np.generic) else s)
    largest = float(np.max(sigma))
    form = NoiseForm.parse(noise, images.grid, sigma=largest)
    form.check(largest)
    return form


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
