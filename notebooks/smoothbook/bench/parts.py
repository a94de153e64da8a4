"""The parts of a certificate on their own: noise, votes and bounds, per element."""

import functools
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from scipy import stats

from smoothbook.bench.measure import Result, clock, interleaved, method, spread, torch_threads
from smoothkit import Purpose, noisy_copies
from smoothkit.certify.bounds import clopper_pearson_lower
from smoothkit.kernels.noise import backend, noise_scale, noisy_rows, standard_normal, standard_normal_reference
from smoothkit.kernels.philox import counter_word
from smoothkit.kernels.votes import add_votes

SHAPES = ((400, 3, 32, 32), (16, 3, 224, 224))
CLASSES = (10, 1_000)
SIGMA, GRID = 0.5, 255
COUNTER = dict(seed=0, purpose=Purpose.ESTIMATE, image_id=1, start=0)


# --- noise -------------------------------------------------------------------------------------------


def noise(
    *,
    quick: bool = False,
    device: str = "cpu",
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    rounds: int | None = None,
    calls: int | None = None,
) -> Result:
    """Nanoseconds a value of our noise, of torch.randn, of the NumPy reference, and of what ART and the plain loop do.

    "Rows" is what the engine asks for: normals, scaled, rounded to the grid and added to an image, in a buffer that
    stays. It is compared with torch.randn into such a buffer, which makes the normals only.
    """
    calls = calls or (5 if device == "cpu" else 100)
    rows = []
    with torch_threads(1):
        for shape in shapes:
            seconds = _seconds(_noises(shape, device), calls, rounds or (5 if quick else 15), device)
            for name in seconds.columns:
                rows.append(
                    {
                        "shape": "x".join(map(str, shape)),
                        "made by": name,
                        **spread("ns", seconds[name] / (calls * np.prod(shape)) * 1e9),
                        **spread("ratio", seconds[RANDN] / seconds[name]),
                    }
                )
                if REFERENCE in seconds:
                    rows[-1]["over reference"] = float((seconds[REFERENCE] / seconds[name]).median())
    table = pd.DataFrame(rows)
    return Result(
        table,
        float(table[table["made by"] == OURS]["ratio"].min()),
        f"{RANDN} (normals only) over {OURS} (normals, scaled, rounded to the grid, added), the smaller over shapes; "
        f"ours made by {', '.join(sorted({backend(int(np.prod(s[1:])), device) for s in shapes}))}",
        method(device),
    )


RANDN, OURS, REFERENCE = "torch.randn into a buffer", "our rows into a buffer", "numpy reference, normals"


def _noises(shape: tuple[int, ...], device: str) -> dict[str, Callable[[], object]]:
    """Every way to make noise of shape [n, C, H, W]; those of NumPy on a CPU only."""
    n, *image_shape = shape
    pixels = int(np.prod(image_shape))
    image, buffer = torch.full(tuple(image_shape), 128 / GRID, device=device), torch.empty(shape, device=device)
    as_art = functools.partial(np.random.normal, scale=SIGMA, size=shape)  # what ART calls
    anywhere = {
        RANDN: lambda: torch.randn(shape, out=buffer, device=device),
        OURS: _row_filler(image, buffer),
        "plain loop: repeat, randn, scale, add": lambda: _plain_copies(image, n),
    }
    on_cpu = {
        "torch.randn, fresh memory": lambda: torch.randn(shape),
        "our normals, fresh memory": lambda: standard_normal(pixels, stop=n, **COUNTER),
        "our copies, fresh memory": lambda: noisy_copies(image, sigma=SIGMA, grid=GRID, stop=n, **COUNTER),
        REFERENCE: lambda: standard_normal_reference(pixels, stop=n, **COUNTER),
        "ART: np.random.normal float64, cast": lambda: as_art().astype(np.float32),
    }
    return anywhere | on_cpu if device == "cpu" else anywhere


def _row_filler(image: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    """Noise for `out` [n, C, H, W] as the engine asks for it: every row names its image and draw."""
    rows = torch.zeros((3, len(out)), dtype=torch.int64)
    rows[1], rows[2] = counter_word(Purpose.ESTIMATE, 1), torch.arange(len(out))
    rows = rows.to(out.device)
    scale = torch.full((len(out),), float(noise_scale(SIGMA, GRID)), device=out.device)
    return lambda: noisy_rows(out, image[None], rows, scale, 0, GRID)


def _plain_copies(image: torch.Tensor, n: int) -> torch.Tensor:
    copies = image.repeat((n, 1, 1, 1))
    return copies + torch.randn_like(copies) * SIGMA


def _seconds(
    variants: Mapping[str, Callable[[], object]], calls: int, rounds: int, device: str = "cpu"
) -> pd.DataFrame:
    """Seconds of so many calls of each variant, [rounds x variants], once each has been called."""

    def repeated(function: Callable[[], object]) -> None:
        for _ in range(calls):
            function()

    for function in variants.values():
        function()
    work = {name: functools.partial(repeated, function) for name, function in variants.items()}
    return interleaved(work, rounds=rounds, now=clock(device))


# --- votes -------------------------------------------------------------------------------------------


def votes(
    *,
    quick: bool = False,
    device: str = "cpu",
    classes: tuple[int, ...] = CLASSES,
    batch: int = 400,
    rounds: int | None = None,
    calls: int | None = None,
) -> Result:
    """Nanoseconds a sample from logits [batch, K] to counts: argmax, copy and a Python loop, over the engine's counting."""
    calls = calls or (25 if quick else 100)
    rows = []
    with torch_threads(1):
        for num_classes in classes:
            logits = torch.randn((batch, num_classes), generator=torch.Generator().manual_seed(0)).to(device)
            counts = torch.zeros((1, num_classes), dtype=torch.int64, device=device)
            variants = {
                "python loop": _loop_counter(logits, np.zeros(num_classes, dtype=np.int64)),
                "ours": _our_counter(logits, counts),
            }
            seconds = _seconds(variants, calls, rounds or (5 if quick else 15), device)
            ns = seconds.median() / (calls * batch) * 1e9
            rows.append(
                {
                    "K": num_classes,
                    "batch": batch,
                    "python loop ns": ns["python loop"],
                    "ours ns": ns["ours"],
                    **spread("ratio", seconds["python loop"] / seconds["ours"]),
                }
            )
    table = pd.DataFrame(rows)
    return Result(
        table,
        float(table["ratio"].min()),
        "argmax, copy to the host and a Python loop over our counting (argmax included), the smaller over K",
        method(device),
    )


def _loop_counter(logits: torch.Tensor, counts: np.ndarray) -> Callable[[], None]:
    """As the plain loop counts; counts [K]."""

    def count() -> None:
        for c in logits.argmax(1).cpu().numpy():
            counts[c] += 1

    return count


def _our_counter(logits: torch.Tensor, counts: torch.Tensor) -> Callable[[], None]:
    """As the engine counts, with a task number for each row; here all rows are of one task. counts [1, K]."""
    tasks = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return lambda: add_votes(counts, logits, tasks)


# --- bounds ------------------------------------------------------------------------------------------


def bounds(
    *,
    quick: bool = False,
    device: str = "cpu",
    many: int = 1_000_000,
    few: int | None = None,
    rounds: int | None = None,
    n: int = 100_000,
    alpha: float = 0.001,
) -> Result:
    """Clopper-Pearson bounds: SciPy called once an image over ours on `many` counts at once. Always on the CPU."""
    few = few or (500 if quick else 2_000)
    k = np.random.default_rng(0).integers(n // 2, n + 1, many)
    variants = {
        "scipy, one call each": lambda: [float(stats.beta.ppf(alpha, a, n - a + 1)) for a in k[:few].tolist()],
        "ours": lambda: clopper_pearson_lower(k, n, alpha),
    }
    with torch_threads(1):
        seconds = _seconds(variants, 1, rounds or (3 if quick else 7))
    sizes = {"scipy, one call each": few, "ours": many}
    each = seconds / pd.Series(sizes)
    ratio = each["scipy, one call each"] / each["ours"]
    table = pd.DataFrame(
        {
            "computed by": name,
            "bounds": sizes[name],
            **spread("seconds per million", each[name] * 1e6),
            **spread("ratio", each["scipy, one call each"] / each[name]),
        }
        for name in variants
    )
    return Result(
        table,
        float(ratio.median()),
        f"SciPy once an image over ours on {many:,} counts of n={n:,} ({len(np.unique(k)):,} of them distinct)",
        method("cpu"),
    )
