"""Benchmarks: ratios measured side by side in one run, saved with machine and versions.

`measure` says how; `samples` is a simulation on probabilities recovered from published logs, and does not depend
on the machine.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from smoothbook.bench import engine, parts
from smoothbook.bench import sigma as sigma_bench
from smoothbook.bench.measure import Result, circumstances
from smoothbook.bench.panels import panels
from smoothbook.bench.samples import samples
from smoothkit.data import data_dir

BENCHMARKS: dict[str, Callable[..., Result]] = {
    "overhead": engine.overhead,
    "loop": engine.loop,
    "noise": parts.noise,
    "votes": parts.votes,
    "bounds": parts.bounds,
    "samples": samples,
    "memory": engine.memory,
    "scaling": engine.scaling,
    "sigma": sigma_bench.sigma,
    "balls": sigma_bench.balls,
    "panels": panels,
}
ON_CUDA = ("noise", "votes", "bounds", "loop", "overhead")  # in the order of `gpu`: the quick ones first
GPU_SECONDS = 540  # of ten minutes; a case under way then still ends


def run(
    name: str, *, quick: bool = False, device: str = "cpu", out: Path | None = None, **settings
) -> tuple[Result, Path]:
    """Run a benchmark and save it as JSON.

    Parameters
    ----------
    name : str
        A key of `BENCHMARKS`.
    quick : bool
        A part of it, within 50 seconds on two cores once what it compiles is in the compiler's cache.
    device : `cpu` or `cuda`
    out : path, optional
        Folder of the file; data/benchmarks if not given.
    settings
        As in the benchmark's own function, to make it smaller or larger.

    Raises
    ------
    ValueError
        For a device that is not there, or that the benchmark does not run on.
    """
    _check_device(name, device)
    begin = time.perf_counter()
    result = BENCHMARKS[name](quick=quick, device=device, **settings)
    about = {
        "benchmark": name,
        "quick": quick,
        **circumstances(device),
        "threads": 1 if name != "scaling" else "in the table",
        "method": result.method,
        "seconds": round(time.perf_counter() - begin, 1),
        "headline": result.headline,
        "ratio": result.ratio,
        "others": dict(result.others),
        **result.extra,
        "left_out": list(result.left_out),
        "rows": json.loads(result.table.to_json(orient="records")),
    }
    ending = ("-quick" if quick else "") + ("-cuda" if device == "cuda" else "")
    path = (out or data_dir() / "benchmarks") / f"{name}{ending}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1) + "\n")
    return result, path


def run_gpu(*, quick: bool = False, out: Path | None = None) -> Iterator[tuple[str, Result, Path]]:
    """All benchmarks a GPU has a part in, each saved as soon as it is done, within ten minutes.

    Raises
    ------
    ValueError
        Without a CUDA device, naming the numbers that are then missing.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"bench gpu needs a CUDA device and found none; missing are the GPU's {', '.join(ON_CUDA)}")
    end = time.perf_counter() + GPU_SECONDS
    half = time.perf_counter() + 0.6 * GPU_SECONDS  # overhead then finds its streams compiled by loop
    limits = {"loop": {"until": half}, "overhead": {"until": end}}
    for name in ON_CUDA:
        yield name, *run(name, quick=quick, device="cuda", out=out, **limits.get(name, {}))


def _check_device(name: str, device: str) -> None:
    if device == "cpu":
        return
    if device != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if name not in ON_CUDA:
        raise ValueError(f"bench {name} runs on the CPU only; {', '.join(ON_CUDA)} take --device cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"no CUDA device here; bench {name} runs without --device cuda")
