"""How sure a share or a difference of shares is: exact, Wilson, paired, bootstrap."""

import difflib
import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from smoothkit.reading.accuracy import certified_accuracy
from smoothkit.types import check_alpha

RADII = (0.0, 0.25, 0.5, 0.75)
LEVEL = 0.95  # of an interval, if nothing else is said


def exact_interval(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of a proportion over images drawn like these: never too narrow."""
    return _interval(successes, n, level, "exact")


def wilson_interval(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Two-sided interval of a proportion over images drawn like these, right on average.

    References
    ----------
    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    return _interval(successes, n, level, "wilson")


def _interval(successes: int, n: int, level: float, method: str) -> tuple[float, float]:
    check_alpha(1 - level)
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes must lie in 0..n with n at least 1, got {successes} of {n}")
    found = stats.binomtest(successes, n).proportion_ci(level, method)
    return float(found.low), float(found.high)


def certified_accuracy_interval(table: pd.DataFrame, r: float, level: float = LEVEL) -> tuple[float, float]:
    """`exact_interval` of the certified accuracy at r, over the choice of images.

    It speaks of images drawn like those certified; the failure probability alpha of each certificate is apart.
    """
    return exact_interval(round(float(certified_accuracy(table, [r])[0]) * len(table)), len(table), level)


def paired_bootstrap(
    table: pd.DataFrame,
    reference: pd.DataFrame,
    radii: Sequence[float] = RADII,
    *,
    level: float = LEVEL,
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Differences in certified accuracy and ACR between two classifiers on the same images, with percentile intervals.

    Images are drawn again with replacement, for both at once. The intervals are about the choice of images; they know
    nothing of training again with another seed.

    Returns
    -------
    DataFrame
        One row a radius ("0.25") and one for "ACR": what, difference (table minus reference), low, high.

    Raises
    ------
    ValueError
        If the two are not certificates of the same images.

    References
    ----------
    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, Chapter 13.
    """
    check_alpha(1 - level)
    if not len(table) or draws < 1 or seed < 0 or not all(math.isfinite(r) for r in radii):
        raise ValueError(
            f"a comparison needs images, finite radii, draws of at least 1 and a seed of at least 0, got {len(table)} images, "
            f"radii {list(radii)}, draws {draws} and seed {seed}"
        )
    mine, theirs = _per_image(table, radii), _per_image(reference, radii)
    if not mine.index.equals(theirs.index):
        raise ValueError("the two tables are not of the same images; a paired comparison needs that")
    apart = (mine - theirs).to_numpy(np.float64)  # [images, quantities]
    weights = _kept_weights if len(apart) * draws <= KEPT_WEIGHTS else _weights
    means = weights(len(apart), draws, seed) @ apart / len(apart)  # [draws, quantities]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame({"what": mine.columns, "difference": apart.mean(axis=0), "low": low, "high": high})


def _weights(images: int, draws: int, seed: int) -> np.ndarray:
    """How often each image is drawn: float64 [draws, images]."""
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=draws)
    return drawn.astype(np.float64)


KEPT_WEIGHTS = 10_000_000  # 80 MB at most; to draw them takes longer than all the rest of a comparison
_kept_weights = functools.lru_cache(maxsize=1)(_weights)


def compare(
    tables: dict[str, pd.DataFrame],
    reference: str,
    radii: Sequence[float] = RADII,
    *,
    level: float = LEVEL,
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """`paired_bootstrap` of every table but one against that one; the column `row` says which.

    `verdict` is `above` or `below` where the interval leaves 0 on one side, else `not told apart`.
    """
    if reference not in tables:
        near = difflib.get_close_matches(str(reference), list(tables), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(tables)}"
        raise ValueError(f"reference {reference!r} is unknown; {hint}")
    parts = [
        paired_bootstrap(table, tables[reference], radii, level=level, draws=draws, seed=seed).assign(row=title)
        for title, table in tables.items()
        if title != reference
    ]
    frame = pd.concat(parts, ignore_index=True)[["row", "what", "difference", "low", "high"]]
    sides = np.select([frame["low"] > 0, frame["high"] < 0], ["above", "below"], "not told apart")
    return frame.assign(verdict=sides)


def _per_image(table: pd.DataFrame, radii: Sequence[float]) -> pd.DataFrame:
    right = table["correct"].to_numpy(bool)
    radius = np.where(right, table["radius"].to_numpy(np.float64), 0.0)
    columns = {f"{r:g}": right & (radius >= r) for r in radii} | {"ACR": radius}
    frame = pd.DataFrame(columns, index=pd.Index(table["image_id"].to_numpy())).astype(np.float64)
    if frame.index.has_duplicates:
        raise ValueError("a table has two rows for one image")
    return frame.sort_index()


def paired_difference_interval(gained: int, lost: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval for the difference of two proportions on the same n images.

    `gained` images succeed only in the first, `lost` only in the second. The adjusted Wald interval of
    Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Statistics
    in Medicine 24, 2005: half an observation is added to each of the four cells.
    """
    check_alpha(1 - level)
    if min(gained, lost) < 0 or gained + lost > n or n < 1:
        raise ValueError(
            f"gained and lost must be at least 0 and at most n images together, got {gained}, {lost} of {n}"
        )
    z = stats.norm.ppf((1 + level) / 2)
    b, c, total = gained + 0.5, lost + 0.5, n + 2
    difference = (b - c) / total
    error = z * np.sqrt(b + c - (b - c) ** 2 / total) / total
    return float(difference - error), float(difference + error)
