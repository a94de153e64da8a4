"""How soon panels answer: a slider over alpha on 10,000 images, and votes on the points of a slice."""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from smoothbook import figures
from smoothbook.bench.measure import CPU_METHOD, Result, clock, interleaved, spread, torch_threads
from smoothbook.bench.plan import made_up_rows
from smoothkit import data, models
from smoothkit.certify import certificates
from smoothkit.records import Identity, Record, create_record
from smoothkit.types import StoppingRule

SIGMA, CLASSES, N0 = 0.25, 10, 100
ALPHA_LIMIT, SLICE_LIMIT = 0.1, 5.0  # seconds in which a slider should answer, and a slice of 16x16 points appear


def panels(
    *,
    quick: bool = False,
    device: str = "cpu",
    images: int = 10_000,
    n: int = 100_000,
    sides: Sequence[int] | None = None,
    samples: int = 100,
    rounds: int | None = None,
) -> Result:
    """The alpha slider of the curve panel beside reading the record anew, and slices on the digits.

    Votes of the record are drawn, not sampled from images: p_A of each is Beta(4, 1/2), so that many radii differ. A
    slice is counted with the starter at sigma 0.25, the image's own votes and the base classifier's regions included.

    Returns
    -------
    A table with what, seconds of CPU time (median, min and max over rounds) and, where there is one, the limit in
    seconds. The headline is reading the record and drawing its exact curve over moving the slider.
    """
    from smoothbook.panels.curve import CurvePanel  # widgets and plotly, which no other bench needs

    rounds = rounds or (3 if quick else 7)
    record = _record(images, n)
    panel = CurvePanel(record)
    alphas = itertools.cycle([0.01, 0.02, 0.05, 0.001])

    def slide() -> None:
        panel.alpha = next(alphas)

    def anew() -> None:
        figures.certified_accuracy_curve({SIGMA: certificates(record, alpha=next(alphas))}).to_json()

    seconds = interleaved({"slide": slide, "anew": anew}, rounds=rounds, now=clock("cpu"))
    rows = [
        {"what": f"alpha on {images:,} images, n = {n:,}", **spread("seconds", seconds["slide"]), "limit": ALPHA_LIMIT},
        {"what": f"the same from the record, {images:,} images", **spread("seconds", seconds["anew"])},
    ]
    rows += _slices(sides or ((16,) if quick else (16, 64)), samples, rounds=1 if quick else 3)
    ratios = spread("ratio", seconds["anew"] / seconds["slide"])
    limited = {row["what"]: row["limit"] / row["seconds"] for row in rows if "limit" in row}
    return Result(
        pd.DataFrame(rows),
        ratios["ratio"],
        f"reading the record and drawing its curve over moving alpha, {images:,} images",
        CPU_METHOD,
        extra={"ratio_over_rounds": ratios},
        others={f"time allowed over {what}": ratio for what, ratio in limited.items()},
    )


def _slices(sides: Sequence[int], samples: int, rounds: int) -> list[dict]:
    from smoothbook.panels.plane import EDGES, base_regions, centre_votes, make_plane, sample_plane

    images, model = data.load("digits"), models.load(f"starter:digits-vit-{SIGMA:g}")
    how = dict(sigma=SIGMA, seed=0)
    around = dict(pool=images.batch(), pool_labels=images.labels)

    def draw(side: int, n: int) -> None:
        plane = make_plane(model, images, 0, direction="towards another image", **how, **around)
        base_regions(model, plane)
        centre_votes(model, images, 0, **how)
        list(sample_plane(model, plane, side, **how, edges=(n,)))

    rows = []
    with torch_threads(1):
        for side, n in itertools.product(sides, (EDGES[0], samples)):
            work = {side: functools.partial(draw, side, n)}
            taken = interleaved(work, rounds=rounds if side <= 16 else 1, now=clock("cpu"))  # a fine one is long enough
            what = f"a slice of {side}x{side} points, " + (f"n = {n}" if n == samples else f"first shown at n = {n}")
            rows.append({"what": what, **spread("seconds", taken[side])})
            if (side, n) == (16, EDGES[0]):
                rows[-1]["limit"] = SLICE_LIMIT
    return rows


def _record(images: int, n: int) -> Record:
    """A record in memory with votes at the ends of its blocks drawn from known probabilities."""
    rng, rule = np.random.default_rng(0), StoppingRule(n0=N0, n=n, alpha=0.001)
    identity = Identity(
        dataset="drawn", split="test", subset="all", model="drawn", fingerprint="", num_classes=CLASSES, sigma=SIGMA,
        seed=0, noise="float", precision="float32", stopping_rule=rule,
    )  # fmt: skip
    record, rows = create_record(None, identity), []
    for i, p_a in enumerate(rng.beta(4, 0.5, images)):
        p = np.zeros(CLASSES)
        p[rng.choice(CLASSES, 2, replace=False)] = p_a, 1 - p_a
        rows += made_up_rows(rng, i, p, N0, n)
    record.append(rows, {})
    return record
