"""Peak memory of the engine beside that of ART, each in a process of its own."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from smoothbook.bench.engine import ALPHA, N0, SIGMA, SMALL, Case, certify_with, images_for, stream_for
from smoothbook.bench.measure import Result, available_memory, in_a_process, peak_memory, reset_peak_memory
from smoothbook.bench.peers import ART_MISSING, PLAIN_BATCHES, art_certify

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
        row = {"n": n, "engine MB": in_a_process(_child_memory, "engine", n)["MB"]}
        needed = ART_BYTES * n * np.prod(SMALL) / 1e6
        if needed > 0.7 * available_memory():
            left_out.append(f"ART at n={n:,} is left out: it needs {needed:,.0f} MB, which are not free here")
        else:
            found = in_a_process(_child_memory, "ART", n)
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
        certify = _engine(case) if who == "engine" else _art(case)
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


def _engine(case: Case) -> Callable[[int], object]:
    stream = stream_for(case.make(), images_for(case), "cpu")
    return lambda n: certify_with(stream, n0=N0, n=n)


def _art(case: Case) -> Callable[[int], object]:
    image = images_for(case)[0].numpy()
    certify = art_certify(
        case.make(), case.size, num_classes=10, sigma=SIGMA, n0=N0, alpha=ALPHA, batch=PLAIN_BATCHES[0]
    )
    return lambda n: certify(image, n)
