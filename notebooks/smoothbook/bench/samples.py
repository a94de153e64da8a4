"""Samples a fixed n takes over those sequential certification takes."""

import itertools
import os
from pathlib import Path

import numpy as np
import pandas as pd

from smoothbook.bench.measure import Result
from smoothbook.tables.published import cohen_log
from smoothkit import data, models
from smoothkit.certify import certificates, sequential_rule
from smoothkit.certify.bounds import clopper_pearson_lower, radius
from smoothkit.certify.sequential import boundaries
from smoothkit.data import DataMissing
from smoothkit.reading import infer_alpha, read_log
from smoothkit.sampling.run import collect_votes
from smoothkit.types import ABSTAIN

N = 100_000  # what the published certificates used
N0 = 100
REPEATS = 5
RADII = {"cifar10": (0.25, 0.5), "imagenet": (0.5, 1.0)}

METHOD = (
    "simulation on the probabilities recovered from published logs, the same on every machine; on the digits, live "
    "runs of a starter model"
)


def samples(*, quick: bool = False, device: str = "cpu", live: int | None = None) -> Result:
    """Samples of a fixed n = 100,000 over those sequential certification needs, on published probabilities.

    Each image's votes are recovered from its logged radius (abstained images count as p = 1/2, no image is
    skipped by its label), and votes with that probability are drawn again, five times an image. `live` images of
    the digits are then certified by the engine itself.

    Returns
    -------
    A table with data, sigma, radius, rule, mean and median samples, ratio (n0 on both sides), and certified
    accuracy by the fixed n and by the sequential rule; then the same over all sigmas of a data set ("all"), and the
    digits. The headline is the smallest ratio over data and radii, at the default rule and all sigmas together.
    """
    table = _published(quick)
    headline = table[(table["sigma"] == "all") & (table["rule"] == "hybrid")]["ratio"].min()
    live = (0 if quick else 20) if live is None else live
    if live:
        table = pd.concat([table, pd.DataFrame([_live_on_digits(live)])], ignore_index=True)
    return Result(
        table,
        float(headline),
        f"a fixed n={N:,} over sequential certification (hybrid rule), the smallest over data and radii",
        METHOD,
    )


def _live_on_digits(images: int, sigma: float = 0.25, r: float = 0.25) -> dict:
    """The first test digits, certified at one radius by the engine; the fixed n is not run."""
    record = collect_votes(
        models.load(f"starter:digits-vit-{sigma:g}"),
        data.load("digits", subset=f"first:{images}"),
        sigma=sigma,
        stopping_rule=sequential_rule([r], n0=N0, n_max=N),
        progress=False,
    )
    found = certificates(record)
    return {
        "data": f"{images} digits, live",
        "sigma": sigma,
        "radius": r,
        "rule": "hybrid",
        "mean": float(found["n"].mean()),
        "median": float(found["n"].median()),
        "ratio": float((N + N0) / (found["n"].mean() + N0)),
        "sequential": float(found["correct"].mean()),
    }


def _published(quick: bool) -> pd.DataFrame:
    """The comparison on published logs, one row a case, then all sigmas of a data set together."""
    root = Path(os.environ.get("SMOOTHKIT_DATA", ".")) / "cohen2019-logs"
    if not (root / "certify").is_dir():
        raise DataMissing(
            "bench samples needs the published logs; put cohen2019-logs under the folder SMOOTHKIT_DATA names"
        )
    rows, kinds = [], ("hybrid",) if quick else ("hybrid", "kt", "staged")
    for (dataset, radii), sigma in itertools.product(RADII.items(), (0.25, 0.5, 1.0)):
        p, correct = _probabilities(cohen_log(root, dataset, trained=sigma, sigma=sigma))
        for r, kind in itertools.product((r for r in radii if r < 3.5 * sigma), kinds):  # beyond, n is near its cap
            about = {"data": dataset, "sigma": sigma, "radius": r, "rule": kind}
            rows.append(about | _compare(p, correct, sigma, r, kind))
    table = pd.DataFrame(rows)
    pooled = table.groupby(["data", "radius", "rule"], as_index=False)[["mean", "fixed", "sequential"]].mean()
    pooled = pooled.assign(sigma="all", ratio=(N + N0) / (pooled["mean"] + N0))
    return pd.concat([table, pooled], ignore_index=True)


def _probabilities(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Each image's share of votes, recovered from its logged radius, and whether its class is right."""
    log = read_log(path)
    alpha = infer_alpha(log.table, log.sigma).alpha or 0.001
    attainable = radius(clopper_pearson_lower(np.arange(N + 1), N, alpha), log.sigma)
    k = np.searchsorted(attainable, log.table["radius"].to_numpy())
    answered = (log.table["predict"] != ABSTAIN).to_numpy()
    return np.where(answered, np.minimum(k, N) / N, 0.5), log.table["correct"].to_numpy(dtype=bool)


def _compare(p: np.ndarray, correct: np.ndarray, sigma: float, r: float, kind: str, alpha: float = 0.001) -> dict:
    rule = sequential_rule([r], n0=N0, n_max=N, alpha=alpha, kind=kind)
    up, down = boundaries(rule, sigma)
    looks = np.array(rule.looks)
    p, correct = np.repeat(p, REPEATS), np.repeat(correct, REPEATS)
    successes = np.random.default_rng(0).binomial(np.diff(looks, prepend=0), p[:, None]).cumsum(axis=1)
    ended = (successes >= up[0]) | (successes <= down[0])
    stop = np.where(ended.any(axis=1), ended.argmax(axis=1), len(looks) - 1)
    certified = successes[np.arange(len(p)), stop] >= up[0][stop]
    fixed = radius(clopper_pearson_lower(successes[:, -1], N, alpha), sigma) >= r
    used = looks[stop]
    return {
        "mean": float(used.mean()),
        "median": float(np.median(used)),
        "ratio": float((N + N0) / (used.mean() + N0)),
        "fixed": float((fixed & correct).mean()),
        "sequential": float((certified & correct).mean()),
    }
