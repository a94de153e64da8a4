"""How benchmarks measure: variants in turn, ratios within a round, and the circumstances kept with them."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

PACKAGES = ("torch", "numpy", "scipy", "timm", "numba", "triton", "adversarial-robustness-toolbox")

CPU_METHOD = (
    "CPU time of the process with one torch thread (close to the wall time of a free core, and blind to other "
    "processes); variants in turn A B C A B C, ratios taken within a round, medians with min and max over rounds"
)
CUDA_METHOD = (
    "wall time with the device synchronised before and after; variants in turn A B C A B C, ratios taken within a "
    "round, medians with min and max over rounds"
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a benchmark found: `ratio` is its headline, which `headline` puts in words.

    `others` are further ratios worth a line of their own, by name; `extra` goes into the file only;
    `left_out` are lines about what could not be measured here.
    """

    table: pd.DataFrame
    ratio: float
    headline: str
    method: str
    others: Mapping[str, float] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, object] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()


# --- time --------------------------------------------------------------------------------------------


def clock(device: str) -> Callable[[], float]:
    """Seconds so far: of CPU time on a CPU; of wall time on a GPU, once it has done what it was asked."""
    if device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def method(device: str) -> str:
    """How times of `clock(device)` were taken, in words."""
    return CPU_METHOD if device == "cpu" else CUDA_METHOD


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """So many threads for torch and the noise kernel; the former number is given back."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    now: Callable[[], float],
    until: float | None = None,
) -> pd.DataFrame:
    """Seconds each variant takes, one row a round: A B C, A B C, so that a busy machine disturbs all alike.

    Parameters
    ----------
    variants : name -> what to time
    rounds : int
    now : a clock
    until : `time.perf_counter()` after which no further round begins; one is always run.
    """
    seconds = []
    while not seconds or (len(seconds) < rounds and (until is None or time.perf_counter() < until)):
        row = {}
        for name, function in variants.items():
            begin = now()
            function()
            row[name] = now() - begin
        seconds.append(row)
    return pd.DataFrame(seconds)


def spread(name: str, values: pd.Series | np.ndarray) -> dict[str, float]:
    """Median, min and max over rounds, as columns name, name_min, name_max."""
    values = np.asarray(values, dtype=float)
    return {name: float(np.median(values)), f"{name}_min": float(values.min()), f"{name}_max": float(values.max())}


# --- circumstances -----------------------------------------------------------------------------------


def circumstances(device: str) -> dict:
    """Machine and versions, as they are kept in a benchmark's file."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_bfloat16(device: str) -> bool:
    """Whether bfloat16 is done in hardware: elsewhere it is many times slower than float32. In doubt yes."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = _system_line("/proc/cpuinfo", "flags") if platform.machine() == "x86_64" else None
    return flags is None or bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def _processor() -> str:
    """The processor's name; platform.processor() has none on Linux."""
    return _system_line("/proc/cpuinfo", "model name") or platform.processor() or "unknown"


def _system_line(path: str, key: str) -> str | None:
    """What stands behind "key:" in a file of /proc; None where there is no such file or line."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


# --- memory ------------------------------------------------------------------------------------------


def reset_peak_memory() -> None:
    """Forget the peak so far where the system allows it (Linux), so that what follows is seen alone."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """The most memory this process has held, in MB (10^6 bytes).

    On Linux from VmHWM: ru_maxrss of a child also holds what its parent had when it was started.
    """
    on_linux = _system_line("/proc/self/status", "VmHWM")
    if on_linux is not None:
        return int(on_linux.split()[0]) * 1024 / 1e6
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if platform.system() == "Darwin" else peak * 1024 / 1e6


def available_memory() -> float:
    """Memory a new process can have, in MB; infinite where the system does not say."""
    available = _system_line("/proc/meminfo", "MemAvailable")
    return float("inf") if available is None else int(available.split()[0]) * 1024 / 1e6


# --- processes ---------------------------------------------------------------------------------------


def in_a_process(function: Callable[..., dict], *arguments: object, environment: dict[str, str] | None = None) -> dict:
    """What a function of a module returns, as JSON, in a process of its own that has done nothing else."""
    module, name = function.__module__, function.__name__
    code = f"import json, {module} as m; print(json.dumps(m.{name}(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | (environment or {})
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{name}{arguments} failed: {said}")
    return json.loads(done.stdout.splitlines()[-1])
