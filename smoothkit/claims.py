"""The papers' claims as rows, each measured from committed records (or published logs) by code.

A claim holds (`yes`) if the measured interval lies wholly on the claimed side, fails (`no`) if wholly on
the other, and is `unclear` if it straddles. It grows with every method of the workbook.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from smoothkit.certify import certificates
from smoothkit.data import data_dir
from smoothkit.records import open_record
from smoothkit.report import cohen_tables

LEVEL = 0.95
COLUMNS = ("system", "claim", "data", "measured", "interval", "holds")
COHEN = "Gaussian smoothing (Cohen et al. 2019)"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row: what a paper says, what was measured, and whether it holds here."""

    system: str
    claim: str
    data: str
    measured: str
    interval: str
    holds: str  # yes, no, unclear


def claims() -> pd.DataFrame:
    """All claims that can be measured from what is at hand, one row each, columns as COLUMNS."""
    return pd.DataFrame([dataclasses.asdict(c) for c in _all()], columns=list(COLUMNS))


def _all() -> Iterator[Claim]:
    yield from _cohen_on_digits()
    yield from _cohen_published()


# --- Cohen et al. 2019 -------------------------------------------------------------------------------


def _cohen_on_digits() -> Iterator[Claim]:
    trained = {sigma: _record(f"digits-vit-{sigma:.2f}-sigma-{sigma:.2f}") for sigma in (0.12, 0.25, 0.5)}
    clean = _record("digits-vit-clean-sigma-0.25")
    fewer = _record("digits-vit-0.25-sigma-0.25", n=1_000)
    for claim, this, other, radius in (
        ("trained with noise, it certifies more than trained on clean images (sigma 0.25)", trained[0.25], clean, 0.25),
        ("a larger sigma certifies more at a large radius (0.25 against 0.12)", trained[0.25], trained[0.12], 0.3),
        ("a larger sigma certifies more at a large radius (0.5 against 0.25)", trained[0.5], trained[0.25], 0.75),
        ("a larger sigma costs accuracy at radius 0 (0.12 against 0.5)", trained[0.12], trained[0.5], 0.0),
        ("more samples certify larger radii (sigma 0.25, n = 10,000 against 1,000)", trained[0.25], fewer, 0.5),
    ):
        yield _more(
            f"{claim}, at radius {radius:g}" if radius else claim, _certified(this, radius), _certified(other, radius)
        )


def _cohen_published() -> Iterator[Claim]:
    root = os.environ.get("SMOOTHKIT_DATA")
    folder = Path(root) / "cohen2019-logs" if root else None
    cells = cohen_tables(folder) if folder and folder.is_dir() else pd.DataFrame()
    for dataset, sigma, radius, printed in (
        ("imagenet", 0.25, 0.5, 0.49),
        ("imagenet", 0.5, 1.0, 0.37),
        ("imagenet", 1.0, 2.0, 0.19),
        ("cifar10", 0.25, 0.25, 0.60),
        ("cifar10", 0.5, 1.0, 0.23),
    ):
        claim = f"certified accuracy {printed:.2f} at radius {radius:g} (sigma {sigma:g})"
        source = f"{dataset}, the published log"
        if cells.empty:
            yield Claim(COHEN, claim, source, "not at hand: SMOOTHKIT_DATA has no cohen2019-logs", "", "unclear")
            continue
        cell = cells[(cells["dataset"] == dataset) & (cells["sigma"] == sigma) & (cells["radius"] == radius)].iloc[0]
        rows = int(cell["rows"])
        low, high = _proportion_interval(round(cell["measured"] * rows), rows)
        holds = "yes" if abs(cell["measured"] - printed) <= 0.005 + 1e-9 else "no"
        yield Claim(
            COHEN, claim, f"{source}, {rows} images", f"{cell['measured']:.3f}", f"[{low:.3f}, {high:.3f}]", holds
        )


# --- how rows are made -------------------------------------------------------------------------------


def _record(name: str, n: int | None = None) -> pd.DataFrame:
    return certificates(open_record(data_dir() / "records" / name), n=n)


def _certified(table: pd.DataFrame, radius: float) -> pd.Series:
    """Whether each image is certified at a radius, by image id."""
    return pd.Series((table["correct"] & (table["radius"] >= radius)).to_numpy(), index=table["image_id"])


def _more(claim: str, this: pd.Series, other: pd.Series, system: str = COHEN, data: str = "digits") -> Claim:
    """`this` certifies a larger share of the same images than `other`: a paired comparison."""
    if set(this.index) != set(other.index):
        raise ValueError(f"{claim}: the two records are of different images")
    other = other.loc[this.index]
    gained, lost, n = int((this & ~other).sum()), int((other & ~this).sum()), len(this)
    low, high = paired_difference_interval(gained, lost, n)
    measured = f"{this.mean():.3f} against {other.mean():.3f}"
    return Claim(
        system, claim, f"{data}, {n} images", measured, f"difference [{low:+.3f}, {high:+.3f}]", _side(low, high)
    )


def _side(low: float, high: float) -> str:
    return "yes" if low > 0 else "no" if high < 0 else "unclear"


def paired_difference_interval(gained: int, lost: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval for the difference of two proportions on the same n images.

    `gained` images succeed only in the first, `lost` only in the second. The adjusted Wald interval of
    Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Statistics
    in Medicine 24, 2005: half an observation is added to each of the four cells.
    """
    z = stats.norm.ppf((1 + level) / 2)
    b, c, total = gained + 0.5, lost + 0.5, n + 2
    difference = (b - c) / total
    error = z * np.sqrt(b + c - (b - c) ** 2 / total) / total
    return float(difference - error), float(difference + error)


def _proportion_interval(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    interval = stats.binomtest(k, n).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)
