"""Where the time of one batch goes, on the machine at hand: a glance for a notebook, not a benchmark."""

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from smoothkit.kernels.votes import add_votes
from smoothkit.sampling.stream import VoteStream


def median_seconds(function: Callable[[], object], repeats: int = 15) -> float:
    """Median time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def time_of_parts(stream: VoteStream, repeats: int = 15) -> pd.DataFrame:
    """Noise, forward pass and votes, each alone on one batch of the stream; columns part, µs a sample, share."""
    rows, counts = stream.example(), torch.zeros(1, stream.num_classes, dtype=torch.int64)
    slots = torch.zeros(stream.batch, dtype=torch.int64)  # all rows are copies of one image
    with stream.forward.evaluating(), stream.forward.running():
        logits = stream.forward(rows)
        seconds = {
            "noise": median_seconds(stream.example, repeats),
            "forward pass": median_seconds(lambda: stream.forward(rows), repeats),
            "votes": median_seconds(lambda: add_votes(counts, logits, slots), repeats),
        }
    parts = pd.DataFrame({"part": seconds.keys(), "µs a sample": [1e6 * s / stream.batch for s in seconds.values()]})
    return parts.assign(share=parts["µs a sample"] / parts["µs a sample"].sum())


def forward_microseconds(stream: VoteStream, repeats: int = 5) -> float:
    """Time of the prepared forward pass, in µs a sample."""
    rows = stream.example()
    with stream.forward.evaluating(), stream.forward.running():
        return 1e6 * median_seconds(lambda: stream.forward(rows), repeats) / stream.batch
