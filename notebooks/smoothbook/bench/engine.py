"""The engine and the networks it is measured with."""

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from smoothbook.bench.measure import has_bfloat16
from smoothkit import Purpose, data, models
from smoothkit.certify import certify_votes
from smoothkit.kernels import noise
from smoothkit.sampling.batches import Task
from smoothkit.sampling.stream import VoteStream
from smoothkit.types import Certificate, Votes

SIGMA, ALPHA, N0 = 0.5, 0.001, 100
PUBLISHED_N = 100_000
SHORT_NAMES = {"bfloat16": "bf16"}


# --- networks ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A network to measure with: `make` gives it with the same weights each time, `size` is its images' [C, H, W]."""

    make: Callable[[], nn.Module]
    size: tuple[int, int, int]
    num_classes: int = 10


def _random(name: str, **model_args) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.load(name, pretrained=False, **model_args)
    model.size = None  # the images have the network's size
    return model


SMALL, LARGE = (3, 32, 32), (3, 224, 224)
CASES = {
    "resnet20": Case(lambda: _random("resnet20_cifar"), SMALL),
    "digits-vit": Case(lambda: models.load("starter:digits-vit-0.25"), (1, 8, 8)),
    "vit-tiny-32": Case(
        lambda: _random("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10), SMALL
    ),
    "resnet50": Case(lambda: _random("resnet50"), LARGE, 1_000),
    "vit-b-16": Case(lambda: _random("vit_base_patch16_224"), LARGE, 1_000),
}  # fmt: skip
HEADLINE = "resnet20"
AT_32 = (HEADLINE, "digits-vit", "vit-tiny-32")  # 32 pixels a side at most: what a CPU can do


def images_for(case: Case, number: int = 1) -> data.Images:
    """Digits where they fit, else random images on the 8-bit grid from a fixed seed."""
    if case.size == (1, 8, 8):
        return data.load("digits", subset=f"first:{number}")
    steps = torch.randint(0, 256, (number, *case.size), generator=torch.Generator().manual_seed(0))
    return data.from_arrays(steps / 255, grid=255, name="random")


def networks_for(quick: bool, device: str, for_quick: Sequence[str]) -> Sequence[str]:
    return for_quick if quick else AT_32 if device == "cpu" else tuple(CASES)


# --- the engine, prepared ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A stream ready to run, and what making it cost: probing, and compiling if it compiles.

    `wall_seconds` include the compiler's own processes, `cpu_seconds` do not. `compiled_anew` is False where
    all that was compiled came from the compiler's cache.
    """

    stream: VoteStream
    wall_seconds: float
    cpu_seconds: float
    compiled_anew: bool


@functools.cache
def prepared(name: str, precision: str, device: str, compiled: bool) -> Prepared:
    """The engine for a network; made once a process, so that `bench gpu` compiles nothing twice."""
    case = CASES[name]
    noise.load_kernels()  # as runs of any length do
    base_classifier, images = case.make(), images_for(case)
    misses = _compiler_misses()
    wall, cpu = time.perf_counter(), time.process_time()
    stream = stream_for(base_classifier, images, device, precision, compiled)
    certify_with(stream, n0=1, n=2 * stream.batch - 1)  # whatever is left for the first run
    return Prepared(
        stream, time.perf_counter() - wall, time.process_time() - cpu, compiled and _compiler_misses() > misses
    )


def stream_for(
    base_classifier: nn.Module, images: data.Images, device: str, precision: str = "float32", compiled: bool = False
) -> VoteStream:
    """A stream over images, with the settings that all benchmarks share."""
    return VoteStream(
        base_classifier, images, sigma=SIGMA, seed=0, device=device, precision=precision, compile=compiled
    )


def _compiler_misses() -> int:
    """Graphs compiled so far in this process that were not in the compiler's cache."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"]


def has_compiler(device: str) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler on a CPU, Triton on a GPU."""
    if device == "cuda":
        return torch.utils._triton.has_triton()
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)


NO_COMPILER = "compiling is left out: no C++ compiler (CXX, g++, clang++), or on a GPU no Triton, here"
COLD_CACHE = "the compiler's cache was cold: what came after the first network is not compiled this time"


def whether_to_compile(device: str, wanted: bool | None) -> tuple[bool, list[str]]:
    """Whether streams are compiled, and what to say if they cannot be."""
    if wanted is None and not has_compiler(device):
        return False, [NO_COMPILER]
    return wanted is not False, []


def certify_with(stream: VoteStream, *, n0: int, n: int, alpha: float = ALPHA) -> list[Certificate]:
    """Certificates of all images of a stream made with SIGMA: votes, bounds and radii, without a record."""
    tasks = []
    for i in range(len(stream.images)):
        tasks += [Task(i, Purpose.SELECT, 0, n0), Task(i, Purpose.ESTIMATE, 0, n)]
    votes = {(task.image, task.purpose): Votes(counts, task.stop) for task, counts, _ in stream.run(tasks)}
    return [
        certify_votes(votes[i, Purpose.SELECT], votes[i, Purpose.ESTIMATE], sigma=SIGMA, alpha=alpha)
        for i in range(len(stream.images))
    ]


def bare_forward(stream: VoteStream) -> Callable[[int], None]:
    """The network alone on one full batch, so many times; on a GPU replayed as a CUDA graph, as the engine does."""
    example = stream.example()
    once = functools.partial(stream.forward, example)
    if example.device.type == "cuda":
        once = _as_graph(stream, once)

    def run(batches: int) -> None:
        with stream.forward.running():
            for _ in range(batches):
                once()

    return run


def _as_graph(stream: VoteStream, once: Callable[[], object]) -> Callable[[], object]:
    """One launch in place of hundreds; what cannot be recorded stays as it is, as in the engine."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with stream.forward.running():
            with torch.cuda.stream(side):
                for _ in range(2):  # what is set up on first use must not be recorded
                    once()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                once()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return once
    return graph.replay


def batches_for(stream: VoteStream, forward: Callable[[int], None], now: Callable[[], float], seconds: float) -> int:
    """Full batches `forward` does in about so many seconds, with n0 + 1 rows at least."""
    least = N0 // stream.batch + 1
    forward(1)
    begin = now()
    forward(least)
    each = (now() - begin) / least
    return max(least, round(min(seconds / max(each, 1e-9), PUBLISHED_N / stream.batch)))


SLOW_BFLOAT16 = "bfloat16 is left out: this processor has no instructions for it, and is many times slower with it"


def short_precisions(device: str, left_out: list[str]) -> tuple[str, ...]:
    """Precisions beside float32 that are worth measuring here."""
    if has_bfloat16(device):
        return ("bfloat16",)
    left_out += [SLOW_BFLOAT16] if SLOW_BFLOAT16 not in left_out else []
    return ()
