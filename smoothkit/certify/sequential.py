"""Certification at given radii with as few samples as it takes: tests that may be looked at again and again.

An image is sampled in steps, and after each step every radius is certified, given up, or left open; it
stops when nothing is open. Three rules:

- `kt`: one-sided Krichevsky-Trofimov wealth against p_r = Phi(radius / sigma); valid at every look together.
- `hybrid`: the same at alpha / 2, and at the last look one Clopper-Pearson test with the other half. It loses
  less where p_A is close to p_r, or the radius to the cap.
- `staged`: Clopper-Pearson at each of a few looks, alpha shared equally: the easiest to explain.

The class is guessed on n0 samples that are then thrown away, so a wrong guess can only abstain. Several radii
share one alpha without correction: the boundaries are made increasing in the radius, so whenever any false radius
is certified, the smallest false one has crossed its own boundary, which happens with probability at most alpha.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import special

from smoothkit.bounds import OUTWARD, check_reach, clopper_pearson_count, kt_boundaries
from smoothkit.records import ESTIMATE, SELECT, Record, RecordError
from smoothkit.types import ABSTAIN, StoppingRule, block_edges, check_samples, check_sigma

OPEN, CERTIFIED, GIVEN_UP = 0, 1, -1


def default_looks(n_max: int, first: int = 100, growth: float = 1.05) -> tuple[int, ...]:
    """Looks at 100, 200, ... and further apart as samples grow, by 5%; the last at n_max."""
    looks = [min(first, n_max)]
    while looks[-1] < n_max:
        looks.append(min(n_max, max(looks[-1] + first, int(looks[-1] * growth) // first * first)))
    return tuple(looks)


def sequential_rule(
    radii: Sequence[float],
    *,
    n0: int = 100,
    n_max: int = 100_000,
    alpha: float = 0.001,
    beta: float = 0.001,
    kind: str = "hybrid",
    looks: Sequence[int] | None = None,
    skip_wrong: bool = False,
) -> StoppingRule:
    """A stopping rule for `certify_sequentially`; see `StoppingRule` for the parameters.

    `staged` looks at 100, 1,000, 10,000, ... and the others at `default_looks`, unless `looks` are given.
    """
    if kind == "fixed":
        raise ValueError("kind must be hybrid, kt or staged; a fixed n is what Smoothed.sample does")
    check_samples("n_max", n_max)
    if looks is None:
        looks = [*(10**k for k in range(2, 12) if 10**k < n_max), n_max] if kind == "staged" else default_looks(n_max)
    return StoppingRule(n0, n_max, alpha, kind, tuple(sorted(radii)), tuple(looks), beta, skip_wrong)


@functools.lru_cache(maxsize=32)
def boundaries(rule: StoppingRule, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Votes for the guessed class that certify (`up`, at least) and give up (`down`, at most) each radius.

    Returns
    -------
    up, down : int64 arrays [len(rule.radii), len(rule.looks)]
    """
    check_sigma(sigma)
    looks = np.array(rule.looks)
    pairs = [_boundaries_of_one_radius(rule, looks, _p_r(r, sigma)) for r in rule.radii]
    up, down = (np.stack(x) for x in zip(*pairs, strict=True))
    return np.maximum.accumulate(up, axis=0), np.maximum.accumulate(down, axis=0)


def _p_r(radius: float, sigma: float) -> float:
    """Phi(radius / sigma), rounded up: more than this must be proved."""
    p = float(special.ndtr(radius / sigma)) * (1 + OUTWARD)
    if p >= 1:
        raise ValueError(f"radius {radius:g} is {radius / sigma:.1f} sigma; no number of samples certifies that")
    return p


def _boundaries_of_one_radius(rule: StoppingRule, looks: np.ndarray, p_r: float) -> tuple[np.ndarray, np.ndarray]:
    if rule.kind == "staged":
        share = len(looks)
        up = clopper_pearson_count(looks, p_r, rule.alpha / share)
        return up, looks - clopper_pearson_count(looks, 1 - p_r, rule.beta / share)
    up, down = kt_boundaries(looks, p_r, rule.alpha / 2 if rule.kind == "hybrid" else rule.alpha, rule.beta)
    if rule.kind == "hybrid":
        up[-1] = min(up[-1], clopper_pearson_count(looks[-1:], p_r, rule.alpha / 2)[0])
    return up, down


def decide(rule: StoppingRule, sigma: float, successes: np.ndarray) -> np.ndarray:
    """OPEN, CERTIFIED or GIVEN_UP for each radius, from votes for the guessed class at the looks so far.

    Parameters
    ----------
    successes : int array [looks done], cumulative
    """
    if len(successes) == 0:
        return np.full(len(rule.radii), OPEN)
    up, down = (b[:, : len(successes)] for b in boundaries(rule, sigma))
    certified, given_up = successes >= up, successes <= down  # [radii, looks done]
    first = np.where(certified.any(1), certified.argmax(1), len(successes))
    ended = np.where(given_up.any(1), given_up.argmax(1), len(successes))
    state = np.where(first < ended, CERTIFIED, np.where(ended < first, GIVEN_UP, OPEN))
    return np.where((state == OPEN) & (len(successes) == len(rule.looks)), GIVEN_UP, state)


def sequential_certificates(record: Record) -> pd.DataFrame:
    """Certificates of a sequential record: its decisions, made again from the counts.

    Returns
    -------
    DataFrame as `certify.certificates`; `radius` is the largest radius of the rule's that was certified,
    `n` the samples it took, `p_a_lower` the probability proved. Images still open are left out.
    """
    rule, sigma = record.stopping_rule, record.sigma
    rows = []
    for image in record.looks().itertuples():
        if len(image.selection) < len(block_edges(rule.n0)) - 1:
            continue
        c_a = int(image.selection.sum(axis=0).argmax())
        successes = image.estimation[:, c_a].cumsum()
        skipped = rule.skip_wrong and c_a != image.label
        if not skipped and (decide(rule, sigma, successes) == OPEN).any():
            continue
        certified = (
            np.flatnonzero(decide(rule, sigma, successes) == CERTIFIED) if not skipped else np.array([], dtype=int)
        )
        radius = rule.radii[certified[-1]] if len(certified) else 0.0
        predict = c_a if len(certified) else ABSTAIN
        rows.append(
            {
                "idx": image.index,
                "label": image.label,
                "predict": predict,
                "radius": radius,
                "correct": predict == image.label and predict != ABSTAIN,
                "sigma": sigma,
                "n0": rule.n0,
                "n": rule.looks[len(successes) - 1] if len(successes) else 0,
                "alpha": rule.alpha,
                "c_a": c_a,
                "n_a": int(successes[-1]) if len(successes) else 0,
                "p_a_lower": float(special.ndtr(radius / sigma)) if len(certified) else 0.0,
                "noise": record.identity.noise,
                "key": image.key,
                "image_id": image.image_id,
            }
        )
    if not rows:
        raise RecordError(
            f"{record.path or 'the record'} has no decided image yet; run the same command again to go on"
        )
    return pd.DataFrame(rows).sort_values("idx", ignore_index=True)


def certify_sequentially(
    base_classifier: Callable,
    images,
    *,
    sigma: float,
    rule: StoppingRule,
    progress: bool = True,
    **settings,
) -> Record:
    """Sample each image until all radii of the rule are decided; undecided images share the batches.

    Parameters
    ----------
    base_classifier, images, sigma, and settings (seed, out, grid, batch, device, model_id) : as in
        `smoothkit.votes.collect_votes`
    rule : StoppingRule, from `sequential_rule`

    Returns
    -------
    Record, to be read with `certify.certificates`

    Raises
    ------
    ValueError
        If the rule cannot certify its smallest radius with n_max unanimous votes.
    """
    from smoothkit.progress import Progress
    from smoothkit.votes import PURPOSES, RecordWriter, Task, announce, check_contents, open_run

    check_reach(rule.n, rule.alpha)
    up, _ = boundaries(rule, sigma)
    if up[0, -1] > rule.n:
        raise ValueError(
            f"radius {rule.radii[0]:g} is beyond reach: even {rule.n:,} unanimous votes do not certify it at sigma={sigma:g}"
        )
    record, stream = open_run(base_classifier, images, sigma=sigma, stopping_rule=rule, **settings)
    check_contents(record, images)
    known = record.looks().set_index("image_id")
    counted = [
        (list(known.at[i, "selection"]), list(known.at[i, "estimation"])) if i in known.index else ([], [])
        for i in images.ids
    ]
    select = list(itertools.pairwise(block_edges(rule.n0)))
    estimate = list(itertools.pairwise(rule.edges()))
    announce(stream, len(images) * (rule.n0 + rule.looks[0]), len(images), how="at the least ")

    def next_task(i: int) -> Task | None:
        selection, estimation = counted[i]
        if len(selection) < len(select):
            return Task(i, PURPOSES[SELECT], *select[len(selection)])
        c_a = int(np.sum(selection, axis=0).argmax())
        if rule.skip_wrong and c_a != images.labels[i]:
            return None
        successes = np.cumsum([counts[c_a] for counts in estimation], dtype=np.int64)
        still_open = (decide(rule, sigma, successes) == OPEN).any()
        return Task(i, PURPOSES[ESTIMATE], *estimate[len(estimation)]) if still_open else None

    with (
        Progress(len(images), f"decisions at sigma {sigma:g}", show=progress) as bar,
        RecordWriter(record, stream) as writer,
    ):
        undecided = list(range(len(images)))
        while undecided:
            tasks = [task for i in undecided if (task := next_task(i)) is not None]
            bar.update(len(undecided) - len(tasks))
            undecided = [task.image for task in tasks]
            for task, counts, batch in stream.run(tasks):
                counted[task.image][task.purpose == PURPOSES[ESTIMATE]].append(counts)
                writer.add(task, counts, batch)
    return record
