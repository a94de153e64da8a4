"""What the driver of a large run holds and takes: `make scale`.

Everything is real but the network: images are read, tasks made, units handed to an executor, counts written to a record on
disk and read back. The executor draws the votes from made-up probabilities instead of asking anybody. Time is that of
this process; what workers would take is not in it.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import torch
from results import keep
from torch import nn

from smoothkit.certify import certificates
from smoothkit.data import Images
from smoothkit.records import open_record
from smoothkit.sampling import run as sampling_run
from smoothkit.types import StoppingRule

CLASSES = 10
WARM = 100  # images
RULE = StoppingRule(n0=100, n=100, alpha=0.05)


class Nothing(nn.Module):
    """A classifier that only the driver's probe asks."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :1].expand(-1, CLASSES)


class Drawn(Executor):
    """Answers units at once, with votes drawn from probabilities."""

    def __init__(self) -> None:
        self.rng, self.units, self.bytes = np.random.default_rng(0), 0, 0
        self.p = np.array([0.91, *[0.01] * (CLASSES - 1)])
        self.made = {"device": "drawn", "compute_batch": 100, "road": "drawn", "torch": torch.__version__}

    def submit(self, fn, work, token, unit, shared):
        future: Future = Future()
        sizes = np.array([task.stop - task.start for task in unit.tasks])
        future.set_result([(counts, self.made) for counts in self.rng.multinomial(sizes, self.p)])
        self.units += 1
        self.bytes += unit.pixels.numel() * 4 + len(unit.tasks) * CLASSES * 8
        return future


def images_of(number: int) -> Images:
    pixel = torch.zeros(1, 1, 1)
    return Images(
        dataset="drawn",
        split="test",
        subset="all",
        index=np.arange(number),
        keys=tuple(map(str, range(number))),
        labels=np.zeros(number, dtype=np.int64),
        class_names=(),
        grid=None,
        read=lambda i: pixel,
        ids=tuple(range(number)),
    )


def simulate(number: int) -> dict:
    """Seconds and memory of one run, in this process."""
    torch.set_num_threads(1)
    if number > WARM:
        simulate(WARM)  # what the first run of a process imports is not the run's
    with tempfile.TemporaryDirectory() as folder:
        out, executor = Path(folder) / "r", Drawn()
        before, begin = _peak(), time.process_time()
        sampling_run.collect_votes(
            Nothing(), images_of(number), sigma=0.25, stopping_rule=RULE, out=out, progress=False, executor=executor,
            compile=False,
        )  # fmt: skip
        sampled, peak = time.process_time() - begin, _peak()
        record = open_record(out)
        table = certificates(record)
        assert len(table) == number
        disk = sum(part.stat().st_size for part in record.parts())
        return {
            "images": number,
            "units": executor.units,
            "driver seconds": round(sampled, 2),
            "driver us an image": round(1e6 * sampled / number, 1),
            "driver MB": round(peak - before, 1),
            "reading seconds": round(time.process_time() - begin - sampled, 2),
            "reading MB": round(_peak() - before, 1),
            "bytes moved an image": round(executor.bytes / number, 1),
            "record bytes an image": round(disk / number, 1),
            "parts": len(record.parts()),
        }


def _peak() -> float:
    """The most memory this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_024


def run(sizes: list[int]) -> list[dict]:
    """Each size in a process of its own, so that memory is its own."""
    rows = []
    for number in sizes:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            rows.append(pool.apply(simulate, (number,)))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    sizes = parser.parse_args().sizes
    begin = time.perf_counter()
    rows = run(sizes)
    last = rows[-1]
    said = f"{last['images']:,} images: {last['driver seconds']:.0f} s and {last['driver MB']:,.0f} MB in the driver"
    keep("scale", begin, {"made_by": "make scale", "headline": said, "classes": CLASSES, "rows": rows})


if __name__ == "__main__":
    main()
