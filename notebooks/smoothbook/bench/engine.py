"""The engine as a whole: what it adds to the bare network, what it saves over peers, its memory, how it scales."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from smoothbook.bench.measure import (
    Result,
    available_memory,
    clock,
    has_bfloat16,
    interleaved,
    method,
    peak_memory,
    reset_peak_memory,
    spread,
    torch_threads,
)
from smoothbook.bench.peers import ART_MISSING, art_certify, plain_certify
from smoothkit import Purpose, data, models
from smoothkit.certify import certify_votes
from smoothkit.kernels import noise
from smoothkit.sampling.batches import Task
from smoothkit.sampling.stream import VoteStream
from smoothkit.types import Certificate, Votes

SIGMA, ALPHA, N0 = 0.5, 0.001, 100
PLAIN_BATCHES = (400, 1_000)  # of the published scripts, and the published default
PUBLISHED_N = 100_000
SHORT_NAMES = {"bfloat16": "bf16"}
ART_IMPORT = 15.0  # seconds it may take; a quick run has no more to spare


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
    return VoteStream(
        base_classifier,
        images,
        sigma=SIGMA,
        seed=0,
        device=device,
        precision=precision,
        compile=compiled,
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


def _whether_to_compile(device: str, wanted: bool | None) -> tuple[bool, list[str]]:
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


# --- overhead ----------------------------------------------------------------------------------------


def overhead(
    *,
    quick: bool = False,
    device: str = "cpu",
    names: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    until: float | None = None,
    compiled: bool | None = None,
) -> Result:
    """Certifying by the engine over the bare network on as many full batches; both by one road.

    n0 + n fills the engine's batches, as it all but does at n = 100,000. Making the stream is not timed.
    """
    names = names or _networks(quick, device, ("digits-vit", "resnet20"))
    rounds, seconds = rounds or (7 if quick else 15), seconds or (0.4 if quick else 1.5)
    until = until or (time.perf_counter() + 28 if quick else None)
    compiled, left_out = _whether_to_compile(device, compiled)
    precisions = precisions or ("float32", *_short_precisions(device, left_out))
    rows = []
    with torch_threads(1):
        for precision in precisions:
            for name in names:
                if rows and until and time.perf_counter() > until:
                    left_out.append(f"{name} in {precision} is left out: no time left")
                    continue
                ready = prepared(name, precision, device, compiled)
                rows.append(_overhead_of(name, precision, device, ready, rounds, seconds))
                if quick and ready.compiled_anew:
                    compiled = False
                    left_out.append(COLD_CACHE)
    table = pd.DataFrame(rows)
    worst = {p: float(group["ratio"].max()) for p, group in table.groupby("precision")}
    first = precisions[0]
    return Result(
        table,
        worst[first],
        f"certifying over the bare forward pass, the worst of {', '.join(table.network.unique())} in {first}",
        method(device),
        others={SHORT_NAMES.get(p, p): ratio for p, ratio in worst.items() if p != first},
        left_out=tuple(left_out),
    )


SLOW_BFLOAT16 = "bfloat16 is left out: this processor has no instructions for it, and is many times slower with it"


def _short_precisions(device: str, left_out: list[str]) -> tuple[str, ...]:
    """Precisions beside float32 that are worth measuring here."""
    if has_bfloat16(device):
        return ("bfloat16",)
    left_out += [SLOW_BFLOAT16] if SLOW_BFLOAT16 not in left_out else []
    return ()


def _networks(quick: bool, device: str, for_quick: Sequence[str]) -> Sequence[str]:
    return for_quick if quick else AT_32 if device == "cpu" else tuple(CASES)


def _overhead_of(name: str, precision: str, device: str, ready: Prepared, rounds: int, seconds: float) -> dict:
    stream, forward, now = ready.stream, bare_forward(ready.stream), clock(device)
    batches = batches_for(stream, forward, now, seconds)
    samples = batches * stream.batch
    variants = {
        "engine": lambda: certify_with(stream, n0=N0, n=samples - N0),
        "forward": lambda: forward(batches),
    }
    times = interleaved(variants, rounds=rounds, now=now)
    return {
        "network": name,
        "precision": precision,
        "road": stream.road,
        "batch": stream.batch,
        "n": samples - N0,
        "rounds": len(times),
        "forward us": float(times["forward"].median()) / samples * 1e6,
        "engine us": float(times["engine"].median()) / samples * 1e6,
        **spread("ratio", times["engine"] / times["forward"]),
    }


# --- loop --------------------------------------------------------------------------------------------


def loop(
    *,
    quick: bool = False,
    device: str = "cpu",
    names: Sequence[str] | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    least: int | None = None,
    until: float | None = None,
    compiled: bool | None = None,
) -> Result:
    """The plain published loop, and ART, over the engine: one image, the same n0 and n, a sample's cost in each.

    The engine's cost is that of its steady state, which is what counts at n = 100,000: streams are made and
    compiled before, and that is timed apart (`setups` in the file), with the samples after which compiling pays.

    Parameters
    ----------
    names : networks, of `CASES`
    rounds : int
    seconds : about how long the engine takes each time
    least : samples (n0 + n) at least, so that the plain loop has a full batch
    until : `time.perf_counter()` after which no further network or round is begun
    compiled : False keeps to the network as it is
    """
    names = names or _networks(quick, device, (HEADLINE,))
    rounds, seconds = rounds or (3 if quick else 5), seconds or (0.5 if quick else 2.5)
    until = until or (time.perf_counter() + 34 if quick else None)
    least = least or (500 if quick else 1_100)  # n0 and a full batch of the plain loop's
    compiled, left_out = _whether_to_compile(device, compiled)
    rows, setups = [], []
    with torch_threads(1):
        for name in names:
            if rows and until and time.perf_counter() > until:
                left_out.append(f"{name} is left out: no time left")
                continue
            engines = _engines(name, device, compiled, quick, left_out)
            race = _race(name, device, engines, rounds, seconds, least, until, left_out)
            rows += _loop_rows(name, race, engines)
            setups += _setups(name, race, engines)
        if compiled and not quick and not any(s["compiled anew"] for s in setups if s["engine"] == "float32"):
            cold = _in_a_cold_cache(names[0], device)
            by_label = {s["engine"]: s for s in setups if s["network"] == names[0]}
            spent = cold["setup wall s"] - by_label["float32, not compiled"]["setup wall s"]
            setups.append(cold | {"pays after samples": _pays_after(spent, by_label["float32"]["won per sample s"])})
    table = pd.DataFrame(rows)
    head = table[(table.network == names[0]) & (table.peer == _plain(PLAIN_BATCHES[0]))].set_index("engine")["ratio"]
    return Result(
        table,
        float(head["float32"]),
        f"the plain loop (batch {PLAIN_BATCHES[0]}) over the engine, {names[0]}, float32 on both sides",
        method(device),
        others={SHORT_NAMES[p]: float(head[p]) for p in SHORT_NAMES if p in head},
        extra={"setups": setups},
        left_out=tuple(left_out),
    )


def _engines(name: str, device: str, compiled: bool, quick: bool, left_out: list[str]) -> dict[str, Prepared]:
    """The engine in every form it is raced in; the first is the headline's."""
    engines = {"float32": prepared(name, "float32", device, compiled)}
    if quick and engines["float32"].compiled_anew:
        left_out.append(COLD_CACHE)
    if compiled and not quick:
        engines["float32, not compiled"] = prepared(name, "float32", device, False)
    also_compiled = compiled and COLD_CACHE not in left_out
    # the headline's network in any case: a ratio below one is an answer too
    short = ("bfloat16",) if name == HEADLINE and not quick else _short_precisions(device, left_out)
    for precision in (*short, *(("tf32",) if device == "cuda" else ())):
        engines[precision] = prepared(name, precision, device, also_compiled)
    return engines


def _plain(batch: int) -> str:
    return f"plain loop, batch {batch}"


@dataclasses.dataclass(frozen=True)
class Race:
    """Seconds a sample, [rounds x variants], and the samples (n0 + n) of each variant's runs."""

    seconds: pd.DataFrame
    samples: dict[str, int]


def _race(
    name: str,
    device: str,
    engines: dict[str, Prepared],
    rounds: int,
    seconds: float,
    least: int,
    until: float | None,
    left_out: list[str],
) -> Race:
    """Peers and engines in turn. A slower form of the engine draws fewer samples, whole batches of them."""
    now = clock(device)
    samples = {
        label: batches_for(ready.stream, bare_forward(ready.stream), now, seconds) * ready.stream.batch
        for label, ready in engines.items()
    }
    batch = engines["float32"].stream.batch
    samples["float32"] = max(samples["float32"], -(-least // batch) * batch)
    both = samples["float32"] >= sum(PLAIN_BATCHES[1:], N0)
    hurry = until is not None and time.perf_counter() > until - ART_IMPORT
    runs, line = _peers(CASES[name], device, samples["float32"] - N0, both=both, art=not hurry)
    left_out += [line] if line and line not in left_out else []
    samples |= dict.fromkeys(runs, samples["float32"])
    for label, ready in engines.items():
        runs[label] = functools.partial(certify_with, ready.stream, n0=N0, n=samples[label] - N0)
    times = interleaved(runs, rounds=rounds, now=now, until=until)
    return Race(times / pd.Series(samples), samples)


def _peers(
    case: Case, device: str, n: int, *, both: bool, art: bool
) -> tuple[dict[str, Callable[[], object]], str | None]:
    """What to time of the peers, warmed up: the plain loop (`both`: also at the larger batch), and ART or why not."""
    base_classifier, image = case.make().to(device), images_for(case)[0]
    common = dict(sigma=SIGMA, n0=N0, alpha=ALPHA, num_classes=case.num_classes)
    on_device = image.to(device)
    runs = {
        _plain(batch): functools.partial(plain_certify, base_classifier, on_device, n=n, batch=batch, **common)
        for batch in (PLAIN_BATCHES if both else PLAIN_BATCHES[:1])
    }
    plain_certify(base_classifier, on_device, n=1, batch=N0, **common)
    if not art:
        return runs, "ART is left out: no time left to import it"
    try:
        certify = art_certify(base_classifier, case.size, batch=PLAIN_BATCHES[0], device=device, **common)
    except ImportError:
        return runs, ART_MISSING
    certify(image.numpy(), 1)
    return runs | {"ART": lambda: certify(image.numpy(), n)}, None


def _loop_rows(name: str, race: Race, engines: dict[str, Prepared]) -> list[dict]:
    each = race.seconds * 1e6
    return [
        {
            "network": name,
            "peer": peer,
            "engine": label,
            "road": ready.stream.road,
            "batch": ready.stream.batch,
            "n": race.samples[label] - N0,
            "rounds": len(each),
            "peer us": float(each[peer].median()),
            "engine us": float(each[label].median()),
            **spread("ratio", each[peer] / each[label]),
        }
        for peer in each.columns.difference(list(engines), sort=False)
        for label, ready in engines.items()
    ]


def _setups(name: str, race: Race, engines: dict[str, Prepared]) -> list[dict]:
    """What each stream cost to make; for a compiled one, the samples after which that is won back."""
    found = [_setup(name, label, ready) for label, ready in engines.items()]
    for about in found:
        about["s per 100,000 samples"] = float(race.seconds[about["engine"]].median()) * PUBLISHED_N
    if "float32, not compiled" in engines:
        won = float((race.seconds["float32, not compiled"] - race.seconds["float32"]).median())
        spent = engines["float32"].wall_seconds - engines["float32, not compiled"].wall_seconds
        found[0] |= {"won per sample s": won, "pays after samples": _pays_after(spent, won)}
    return found


def _setup(name: str, label: str, ready: Prepared) -> dict:
    return {
        "network": name,
        "engine": label,
        "road": ready.stream.road,
        "setup wall s": ready.wall_seconds,
        "setup cpu s": ready.cpu_seconds,
        "compiled anew": ready.compiled_anew,
    }


def _pays_after(seconds: float, won_per_sample: float) -> float | None:
    """Samples until `seconds` are won back; None if never."""
    return max(0.0, seconds) / won_per_sample if won_per_sample > 0 else None


def _in_a_cold_cache(name: str, device: str) -> dict:
    """What making a compiled stream costs where the compiler has nothing in its cache."""
    with tempfile.TemporaryDirectory() as empty:
        return _in_a_process("_child_setup", name, device, environment={"TORCHINDUCTOR_CACHE_DIR": empty})


def _child_setup(name: str, device: str) -> dict:
    with torch_threads(1):
        return _setup(name, "float32, cold cache", prepared(name, "float32", device, True))


def _in_a_process(function: str, *arguments: object, environment: dict[str, str] | None = None) -> dict:
    """What a function of this module returns in a process of its own."""
    code = f"import json; from smoothbook.bench import engine; print(json.dumps(engine.{function}(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | (environment or {})
    )
    if done.returncode:
        raise RuntimeError(f"{function}{arguments} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- memory ------------------------------------------------------------------------------------------

MEMORY_METHOD = (
    "one process per measurement, one thread: the most resident memory during certification (VmHWM on Linux, reset "
    "before; ru_maxrss elsewhere) less that held just before it, which is after imports, making the classifier "
    "(one linear layer on 3x32x32) and a first certification of a few batches; below 1 MB counts as 1 MB"
)
ART_BYTES = 16  # per value of all its noisy copies at the peak


def memory(*, quick: bool = False, device: str = "cpu", sizes: Sequence[int] | None = None) -> Result:
    """Peak memory of the engine and of ART against n, in MB beyond what imports and the classifier hold."""
    sizes = sizes or ((10_000,) if quick else (1_000, 10_000, 100_000))
    rows, left_out = [], []
    for n in sizes:
        row = {"n": n, "engine MB": _in_a_process("_child_memory", "engine", n)["MB"]}
        needed = ART_BYTES * n * np.prod(SMALL) / 1e6
        if needed > 0.7 * available_memory():
            left_out.append(f"ART at n={n:,} is left out: it needs {needed:,.0f} MB, which are not free here")
        else:
            found = _in_a_process("_child_memory", "ART", n)
            if "MB" in found:
                row["ART MB"] = found["MB"]
                row["ratio"] = max(1.0, found["MB"]) / max(1.0, row["engine MB"])
            elif ART_MISSING not in left_out:
                left_out.append(ART_MISSING)
        rows.append(row)
    table = pd.DataFrame(rows, columns=["n", "engine MB", "ART MB", "ratio"])
    known = table.dropna(subset=["ratio"])
    return Result(
        table,
        float(known["ratio"].iloc[-1]) if len(known) else float("nan"),
        "ART's peak memory over the engine's at the largest n",
        MEMORY_METHOD,
        left_out=tuple(left_out),
    )


def _child_memory(who: str, n: int) -> dict:
    """Runs in a process of its own; nothing but what is measured may happen between the two readings."""
    torch.set_num_threads(1)
    case = Case(_linear, SMALL)
    try:
        certify = {"engine": _engine_for_memory, "ART": _art_for_memory}[who](case)
    except ImportError:
        return {"missing": who}
    certify(1_000 if n > 1_000 else n // 2)
    reset_peak_memory()
    before = peak_memory()
    certify(n)
    return {"MB": peak_memory() - before}


def _linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SMALL)), 10)).eval()


def _engine_for_memory(case: Case) -> Callable[[int], object]:
    stream = stream_for(case.make(), images_for(case), "cpu")
    return lambda n: certify_with(stream, n0=N0, n=n)


def _art_for_memory(case: Case) -> Callable[[int], object]:
    image = images_for(case)[0].numpy()
    certify = art_certify(
        case.make(), case.size, num_classes=10, sigma=SIGMA, n0=N0, alpha=ALPHA, batch=PLAIN_BATCHES[0]
    )
    return lambda n: certify(image, n)


# --- scaling -----------------------------------------------------------------------------------------

SCALING_METHOD = (
    "wall time of certifying all images once the stream is made, medians over rounds in turn; other work on the "
    "machine shows in it"
)


def scaling(
    *,
    quick: bool = False,
    device: str = "cpu",
    numbers: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    n: int | None = None,
    rounds: int | None = None,
    until: float | None = None,
) -> Result:
    """Images a second on the digits, against the number of images and of threads; not compiled."""
    threads = threads or tuple(t for t in (1, 2) if t <= (os.cpu_count() or 1))
    numbers = numbers or ((1, 8) if quick else (1, 8, 64))
    n, rounds = n or (100 if quick else 900), rounds or (5 if quick else 7)
    until = until or (time.perf_counter() + 25 if quick else None)
    case = CASES["digits-vit"]
    variants = {}
    for number in numbers:
        stream = stream_for(case.make(), images_for(case, number), device)
        for t in threads:
            variants[number, t] = functools.partial(_certify_on_threads, stream, t, n)
            variants[number, t]()
    seconds = interleaved(variants, rounds=rounds, now=time.perf_counter, until=until)
    rows = [
        {
            "images": number,
            "threads": t,
            "n": n,
            **spread("images per second", number / seconds[number, t]),
            "ratio": float((seconds[numbers[0], threads[0]] * number / numbers[0] / seconds[number, t]).median()),
        }
        for number, t in variants
    ]
    table = pd.DataFrame(rows)
    most, few = (table[(table.images == numbers[-1]) & (table.threads == t)] for t in (threads[-1], threads[0]))
    return Result(
        table,
        float(most["images per second"].iloc[0] / few["images per second"].iloc[0]),
        f"images a second with {threads[-1]} threads over {threads[0]}, {numbers[-1]} images "
        "(ratios in the table are over the first row)",
        SCALING_METHOD,
    )


def _certify_on_threads(stream: VoteStream, threads: int, n: int) -> None:
    with torch_threads(threads):
        certify_with(stream, n0=N0, n=n)
