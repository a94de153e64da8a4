"""Run benchmarks and keep what they found as JSON."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from smoothbook.bench.measure import Result, circumstances
from smoothbook.bench.registry import BENCHMARKS, ON_CUDA
from smoothkit.data import data_dir

GPU_SECONDS = 540  # of ten minutes; a case under way then still ends


def run(
    name: str,
    *,
    quick: bool = False,
    device: str = "cpu",
    out: Path | None = None,
    settings: Mapping[str, object] | None = None,
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
    settings : mapping, optional
        Arguments of the benchmark's own function, to make it smaller or larger.

    Raises
    ------
    ValueError
        For a device that is not there, or that the benchmark does not run on.
    """
    _check_device(name, device)
    begin = time.perf_counter()
    result = BENCHMARKS[name].function(name)(quick=quick, device=device, **settings or {})
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
    start = time.perf_counter()
    # the two that take time come last, and overhead then finds its streams compiled by loop
    until = {"loop": start + 0.6 * GPU_SECONDS, "overhead": start + GPU_SECONDS}
    for name in (*(name for name in ON_CUDA if name not in until), *until):
        settings = {"until": until[name]} if name in until else None
        yield name, *run(name, quick=quick, device="cuda", out=out, settings=settings)


def _check_device(name: str, device: str) -> None:
    if device == "cpu":
        return
    if device != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if name not in ON_CUDA:
        raise ValueError(f"bench {name} runs on the CPU only; {', '.join(ON_CUDA)} take --device cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"no CUDA device here; bench {name} runs without --device cuda")
