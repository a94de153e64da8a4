"""A sigma for each input: what searching it costs beside a certificate, and what a memory of 10,000 images costs."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from smoothbook.bench.engine import CASES
from smoothbook.bench.measure import CPU_METHOD, Result, clock, interleaved, spread, torch_threads
from smoothbook.bench.plan import sequential_means
from smoothbook.sigma.memory import Memory
from smoothbook.sigma.search import SigmaSearch, search_sigma
from smoothkit import Purpose, data
from smoothkit.data import DataMissing
from smoothkit.sampling.batches import Task
from smoothkit.sampling.stream import VoteStream

N, N0, STEPS, SIGMA = 100_000, 100, 900, 0.25
IMAGES = 500  # of the paper's certified subset of ImageNet and of Cohen's of CIFAR-10
DRAWS = {"1 draw a step (Gaussian, SmoothAdv)": 1, "8 draws a step (MACER)": 8}


def sigma(
    *,
    quick: bool = False,
    device: str = "cpu",
    network: str = "resnet20",
    images: int = 32,
    steps: int = 2,
    samples: int | None = None,
    rounds: int | None = None,
) -> Result:
    """Searching sigma by the paper's setting (900 steps) over certifying with a fixed n = 100,000, an image each.

    A step is timed on a batch, in the difference of a search of `steps` steps and one of 1; a sample by the engine, not
    compiled, in its own batches. 900 steps, n and 500 images are then multiplied out: both sides are proportional to
    them. What fixes the class and compares the ends (`pilot`) is on the search's side. The share of a sequential
    certificate is by the mean samples in `samples.json`.
    """
    case = CASES[network]
    model = case.make().eval()
    pixels = torch.rand((images, *case.size), generator=torch.Generator().manual_seed(0))
    few = data.from_arrays(pixels)
    samples = samples or (500 if quick else 1_000)
    stream = VoteStream(model, few, sigma=SIGMA, seed=0, noise="float", compile=False, batch=min(100, samples))

    def search(steps: int, draws: int) -> Callable[[], object]:
        how = SigmaSearch(steps=steps, draws=draws, pilot=1)
        return lambda: search_sigma(model, few, sigma0=SIGMA, search=how, batch=images, progress=False)

    def certify() -> None:
        list(stream.run([Task(0, Purpose.ESTIMATE, 0, samples)]))

    variants = {"certificate": certify}
    for what, draws in DRAWS.items():
        variants |= {f"one step, {what}": search(1, draws), f"{what}": search(1 + steps, draws)}
    with torch_threads(1):
        seconds = interleaved(variants, rounds=rounds or (2 if quick else 4), now=clock("cpu"))
    sample = seconds["certificate"] / samples
    sequential = sequential_means("cifar10")[0.5] + N0
    rows = []
    for what, draws in DRAWS.items():
        step = (seconds[what] - seconds[f"one step, {what}"]).clip(lower=1e-9) / (steps * images)
        searched = STEPS * step + 2 * SigmaSearch().pilot * sample
        rows.append(
            {
                "search": what,
                "draws": draws,
                **spread("step over sample", step / sample),
                f"search of {IMAGES} images s": float(IMAGES * searched.median()),
                f"certificate of {IMAGES} images s": float(IMAGES * (N + N0) * sample.median()),
                **spread("ratio", searched / ((N + N0) * sample)),
                "share of a sequential certificate": float((searched / (sequential * sample)).median()),
            }
        )
    table = pd.DataFrame(rows)
    return Result(
        table,
        float(table["ratio"][0]),
        f"searching sigma ({STEPS} steps, 1 draw) over a certificate with n = {N:,}, {network}, extrapolated from {steps} "
        f"steps and {samples:,} samples",
        CPU_METHOD,
        others={"MACER, 8 draws": float(table["ratio"][1]), "of a sequential one": float(table.iloc[0, -1])},
        extra={"extrapolated": True, "steps timed": steps, "samples timed": samples, "sequential samples": sequential},
    )


# --- a memory ----------------------------------------------------------------------------------------


def balls(
    *, quick: bool = False, device: str = "cpu", sizes: tuple[int, ...] | None = None, target: int = 10_000
) -> Result:
    """Seconds until a memory on disk has answered 10,000 questions of CIFAR's shape, and what the norm filter saves.

    The images are CIFAR-10's test images where SMOOTHKIT_DATA has them; and independent pixels, once with radii like
    certified ones and once with radii so large that the filter leaves out nothing: the worst case. Times up to the last
    of `sizes` (a fifth of them in the worst case) are measured; a quadratic through them goes on to `target` where that
    was not reached, marked so.
    """
    sizes = sizes or ((250, 500, 1_000) if quick else (2_500, 5_000, 10_000))
    rows, left_out = [], []
    for what, (pixels, scale) in _image_sets(max(sizes), left_out).items():
        asked = sizes if scale < ABSURD else tuple(size // 5 for size in sizes)
        seconds, share = _fill(pixels, asked, scale)
        coefficients = np.polyfit([0, *asked], [0.0, *seconds], 2)
        points = dict(zip(asked, seconds, strict=True))
        points.setdefault(target, float(np.polyval(coefficients, target)))
        rows += [
            {
                "images": what,
                "questions": n,
                "measured": n in asked,
                "seconds": s,
                "share of balls compared with": share,
            }
            for n, s in points.items()
        ]
    table = pd.DataFrame(rows)
    ends = table[table["questions"] == target].set_index("images")["seconds"] / 60
    how = "measured, or extrapolated where the table says so"
    return Result(
        table,
        float(ends.max()),
        f"minutes of one core for a memory of {target:,} images of 3 x 32 x 32, the worst of {len(ends)} cases; {how}",
        CPU_METHOD.partition(";")[0],
        others={f"{what}, minutes": float(minutes) for what, minutes in ends.items()},
        left_out=tuple(left_out),
    )


CERTIFIED, ABSURD = 0.4, 50.0  # mean radii


def _image_sets(number: int, left_out: list[str]) -> dict[str, tuple[np.ndarray, float]]:
    """Images [number, 3, 32, 32] and the mean of their radii, by name."""
    sets = {}
    try:
        sets["CIFAR-10"] = data.load("cifar10", subset=f"first:{number}").batch().numpy(), CERTIFIED
    except (DataMissing, ValueError):
        left_out.append("CIFAR-10: SMOOTHKIT_DATA has none")
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 1, (number, 3, 32, 32)).astype(np.float32)
    return sets | {"independent pixels": (pixels, CERTIFIED), "no filter": (pixels, ABSURD)}


def _fill(pixels: np.ndarray, sizes: tuple[int, ...], scale: float) -> tuple[list[float], float]:
    """CPU seconds until so many questions were answered, and the mean share of balls that were looked at."""
    rng, now = np.random.default_rng(1), clock("cpu")
    radii, labels = rng.exponential(scale, len(pixels)), rng.integers(0, 10, len(pixels))
    seconds, top = [], max(sizes)
    with (
        tempfile.TemporaryDirectory() as folder,
        Memory(Path(folder) / "m", model="bench", shape=pixels.shape[1:]) as memory,
    ):
        begin = now()
        for low in range(0, top, 50):
            memory.answer_all(pixels[low : low + 50], labels[low : low + 50].tolist(), radii[low : low + 50].tolist())
            if low + 50 in sizes:
                seconds.append(now() - begin)
        looked = [memory.candidates(pixels[i], radii[i]) / len(memory) for i in range(0, top, max(1, top // 20))]
    return seconds, float(np.mean(looked))
