"""Images a second, against the number of images and of threads."""

import functools
import os
import time
from collections.abc import Sequence

import pandas as pd

from smoothbook.bench.engine import CASES, N0, certify_with, images_for, stream_for
from smoothbook.bench.measure import Result, interleaved, spread, torch_threads
from smoothkit.sampling.stream import VoteStream

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
