"""Certification with as few samples as it takes: tests and bounds that may be looked at again and again.

At given radii: an image is sampled in steps, and after each step every radius is certified, given up, or left open;
it stops when nothing is open. Three rules:

- `kt`: one-sided Krichevsky-Trofimov wealth against p_r = Phi(radius / sigma); valid at every look together.
- `hybrid`: the same at alpha / 2, and at the last look one Clopper-Pearson test with the other half. It loses
  less where p_A is close to p_r, or the radius to the cap.
- `staged`: Clopper-Pearson at each of a few looks, alpha shared equally: the easiest to explain.

The class is guessed on n0 samples that are then thrown away, so a wrong guess can only abstain. Several radii
share one alpha without correction: the boundaries are made increasing in the radius, so whenever any false radius
is certified, the smallest false one has crossed its own boundary, which happens with probability at most alpha.

To find the radius: the rule `radius` bounds p_A from below at every look and stops when sampling on would lengthen the
certified radius by no more than a stated precision. Its claim is the largest bound of all looks: that of a confidence
sequence at alpha / 2 (`betting.kt_lower`, above p_A at *any* look with probability at most alpha / 2) and, at the last
look, the Clopper-Pearson bound with the other half. That one is above p_A with probability at most alpha / 2 had
all n samples been drawn, so no more often if only some images get there. Either fails with probability at most
alpha, whatever made the sampling stop.
"""

import functools
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from smoothkit.certify.betting import clopper_pearson_count, kt_boundaries, kt_lower, kt_upper
from smoothkit.certify.bounds import OUTWARD, check_reach, clopper_pearson_lower, radius, radius_cap
from smoothkit.types import ABSTAIN, MOST_SAMPLES, StoppingRule, block_edges, check_samples, check_sigma, round_down

OPEN, CERTIFIED, GIVEN_UP = 0, 1, -1


def default_looks(n_max: int, first: int = 100, growth: float = 1.05) -> tuple[int, ...]:
    """Looks at 100, 200, ... and further apart as samples grow, by 5%; the last at n_max."""
    looks = [min(first, n_max)]
    while looks[-1] < n_max:
        looks.append(min(n_max, max(looks[-1] + first, int(looks[-1] * growth) // first * first)))
    return tuple(looks)


def sequential_rule(
    radii: Sequence[float] = (),
    *,
    within: float | None = None,
    n0: int = 100,
    n_max: int = 100_000,
    alpha: float = 0.001,
    beta: float | None = None,
    kind: str | None = None,
    looks: Sequence[int] | None = None,
    skip_wrong: bool = False,
) -> StoppingRule:
    """A stopping rule for `Smoothed.sample`: to decide `radii`, or to find the radius to `within` so much.

    Parameters
    ----------
    radii : L2 radii, units of sigma
    within : float, instead of radii
        Sampling stops when it would lengthen the radius by no more than this; units of sigma.
    n0, n_max, alpha, skip_wrong : see `StoppingRule`, where n_max is `n`
    beta : float, optional
        0.001 with radii, 0.05 with `within` if not given. It costs power only, never soundness.
    kind : str, optional
        "hybrid" (what is used if not given), "kt" or "staged" with radii; "radius" with `within`.
    looks : sample counts, optional
        `staged` looks at 100, 1,000, 10,000, ... and the others at `default_looks` if not given.
    """
    if kind == "fixed":
        raise ValueError("kind must be hybrid, kt or staged; a fixed n is what Smoothed.sample does")
    if within is not None and len(radii):
        raise ValueError(f"give radii to decide, or within to find the radius, not both: {radii}, {within}")
    check_samples("n_max", n_max)
    kind = kind or ("hybrid" if within is None else "radius")
    if beta is None:
        beta = 0.05 if kind == "radius" else 0.001
    looks = _default_looks_of(kind, n_max) if looks is None else looks
    return StoppingRule(n0, n_max, alpha, kind, tuple(sorted(radii)), tuple(looks), beta, skip_wrong, within)


def _default_looks_of(kind: str, n_max: int) -> tuple[int, ...]:
    if kind == "staged":
        return (*(10**k for k in range(2, 12) if 10**k < n_max), n_max)
    return default_looks(n_max)


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
    p = _rounded_up_p_r(radius, sigma)
    if p >= 1:
        raise ValueError(f"radius {radius:g} is {radius / sigma:.1f} sigma; no number of samples certifies that")
    return p


def _rounded_up_p_r(radius: float, sigma: float) -> float:
    return float(special.ndtr(radius / sigma)) * (1 + OUTWARD)


def _boundaries_of_one_radius(rule: StoppingRule, looks: np.ndarray, p_r: float) -> tuple[np.ndarray, np.ndarray]:
    if rule.kind == "staged":
        share = len(looks)
        up = clopper_pearson_count(looks, p_r, rule.alpha / share)
        return up, looks - clopper_pearson_count(looks, 1 - p_r, rule.beta / share)
    up, down = kt_boundaries(looks, p_r, rule.alpha / 2 if rule.kind == "hybrid" else rule.alpha, rule.beta)
    if rule.kind == "hybrid":
        up[-1] = min(up[-1], clopper_pearson_count(looks[-1:], p_r, rule.alpha / 2)[0])
    return up, down


def check_rule(rule: StoppingRule, sigma: float) -> None:
    """Refuse, before sampling, a rule with a radius or a `within` that no votes could meet.

    Raises
    ------
    ValueError
        Names the radii, the cap for n, and the n that would do.
    """
    check_sigma(sigma)
    check_reach(rule.n, rule.alpha)
    cap, unanimous = _cap(rule, sigma), f"{rule.n:,} unanimous votes at alpha={rule.alpha:g} and sigma={sigma:g}"
    if rule.kind == "radius":
        if cap <= rule.within:
            raise ValueError(
                f"within={rule.within:g} is too coarse: {unanimous} certify a radius of {round_down(cap)}; "
                f"use a smaller one"
            )
        return
    beyond = [r for r in rule.radii if r > cap]
    if beyond:
        names = f"radius {beyond[0]:g} is" if len(beyond) == 1 else f"radii {', '.join(f'{r:g}' for r in beyond)} are"
        raise ValueError(
            f"{names} beyond reach: {unanimous} certify at most the cap, {round_down(cap)}; "
            f"leave out what is above it, {_what_would_do(rule, beyond[-1], sigma)}"
        )


def _what_would_do(rule: StoppingRule, radius: float, sigma: float) -> str:
    p_r = _rounded_up_p_r(radius, sigma)
    n = _smallest_n(rule, p_r) if p_r < 1 else None
    if n is None:
        return f"since no number of samples up to {MOST_SAMPLES:,} certifies {radius / sigma:.1f} sigma"
    return f"or use n of at least {n:,}"


def _cap(rule: StoppingRule, sigma: float) -> float:
    """The largest radius that a rule can certify: that of unanimous votes at the last look."""
    if rule.kind == "kt":
        return float(radius(kt_lower(rule.n, rule.n, rule.alpha), sigma))
    share = len(rule.looks) if rule.kind == "staged" else 2
    return radius_cap(rule.n, rule.alpha / share, sigma)


def _smallest_n(rule: StoppingRule, p_r: float) -> int | None:
    """The fewest samples whose unanimous votes prove more than p_r by a rule of this kind; None if beyond all reason."""
    low, high = rule.n, 2 * rule.n
    while not _unanimous_suffice(rule, high, p_r):
        low, high = high, 2 * high
        if high > MOST_SAMPLES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _unanimous_suffice(rule, middle, p_r) else (middle, high)
    return high


def _unanimous_suffice(rule: StoppingRule, n: int, p_r: float) -> bool:
    if rule.kind == "kt":
        return bool(kt_boundaries(np.array([n]), p_r, rule.alpha, rule.beta)[0][0] <= n)
    share = len(_default_looks_of("staged", n)) if rule.kind == "staged" else 2
    return bool(clopper_pearson_count(n, p_r, rule.alpha / share) <= n)


def decide(rule: StoppingRule, sigma: float, successes: np.ndarray) -> np.ndarray:
    """OPEN, CERTIFIED or GIVEN_UP for each radius, from votes for the guessed class at the looks so far.

    Parameters
    ----------
    successes : int array [looks done], cumulative
    """
    if len(successes) > len(rule.looks):
        raise ValueError(f"successes must be those at the {len(rule.looks)} looks at the most, got {len(successes)}")
    if len(successes) == 0:
        return np.full(len(rule.radii), OPEN)
    up, down = (b[:, : len(successes)] for b in boundaries(rule, sigma))
    certified, given_up = successes >= up, successes <= down  # [radii, looks done]
    first = np.where(certified.any(1), certified.argmax(1), len(successes))
    ended = np.where(given_up.any(1), given_up.argmax(1), len(successes))
    state = np.where(first < ended, CERTIFIED, np.where(ended < first, GIVEN_UP, OPEN))
    return np.where((state == OPEN) & (len(successes) == len(rule.looks)), GIVEN_UP, state)


# --- finding the radius --------------------------------------------------------------------------------


def lower_bounds(rule: StoppingRule, h: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Lower bounds on p_A by the rule `radius`, from h votes for the guessed class at the look t; float64.

    All of them together, and so the largest, lie above p_A with probability at most `rule.alpha`.
    """
    h, t = np.asarray(h), np.asarray(t)
    bound = kt_lower(h, t, rule.alpha / 2)
    at_the_end = t == rule.n
    bound[at_the_end] = np.maximum(
        bound[at_the_end], clopper_pearson_lower(h[at_the_end], t[at_the_end], rule.alpha / 2)
    )
    return bound


def possible_gain(rule: StoppingRule, sigma: float, h: np.ndarray, t: np.ndarray) -> np.ndarray:
    """By how much the bound at n could lengthen the certified radius if sampling went on; units of sigma.

    With probability 1 - `rule.beta` it will not be more where sampling stops: half of beta goes to an upper confidence
    sequence for p_A, the other to the votes that so large a p_A would still bring.

    Parameters
    ----------
    h, t : int arrays of one shape, votes for the guessed class and samples at the latest look
    """
    h, t = np.asarray(h), np.asarray(t)
    p_a_upper = kt_upper(h, t, rule.beta / 2)
    to_come = np.where(p_a_upper < 1, stats.binom.isf(rule.beta / 2, rule.n - t, p_a_upper), rule.n - t)
    at_the_end = clopper_pearson_lower(h + to_come.astype(np.int64), np.full_like(t, rule.n), rule.alpha / 2)
    return np.maximum(0.0, radius(at_the_end, sigma) - radius(lower_bounds(rule, h, t), sigma))


# --- records -------------------------------------------------------------------------------------------


def still_open(rule: StoppingRule, sigma: float, successes: Sequence[np.ndarray]) -> np.ndarray:
    """Which images need a further look: bool [images].

    Parameters
    ----------
    successes : for each image, int array [looks done] of votes for the guessed class, cumulative
    """
    if rule.kind != "radius":
        return np.array([(decide(rule, sigma, s) == OPEN).any() for s in successes], dtype=bool)
    done = np.array([len(s) for s in successes], dtype=np.int64)
    begun = done > 0
    h = np.array([s[-1] for s in successes if len(s)], dtype=np.int64)
    t = np.array(rule.looks)[done[begun] - 1]
    is_open = np.ones(len(successes), dtype=bool)
    is_open[begun] = (t < rule.n) & (possible_gain(rule, sigma, h, t) > rule.within)
    return is_open


def claims(rule: StoppingRule, sigma: float, successes: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """For each image the lower bound on p_A that the looks so far prove and its radius; 0 and 0 if none."""
    if rule.kind != "radius":
        largest = [
            max((r for r, d in zip(rule.radii, decide(rule, sigma, s), strict=True) if d == CERTIFIED), default=None)
            for s in successes
        ]
        return [(0.0, 0.0) if r is None else (float(special.ndtr(r / sigma)), r) for r in largest]
    ends = np.cumsum([len(s) for s in successes])
    t = np.concatenate([np.array(rule.looks)[: len(s)] for s in successes])
    bounds = lower_bounds(rule, np.concatenate(successes).astype(np.int64), t)
    best = np.array([b.max(initial=0.0) for b in np.split(bounds, ends[:-1])])
    return list(zip(best.tolist(), radius(best, sigma).tolist(), strict=True))


def certify_looks(rule: StoppingRule, sigma: float, looks: Sequence) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Decisions or bounds of images that were sampled by a sequential rule, made again from the counts.

    Parameters
    ----------
    rule : StoppingRule
    sigma : float, pixel units on [0, 1]
    looks : for each image, something with `label`, and `selection` and `estimation`: int arrays [blocks, num_classes]

    Returns
    -------
    finished : int array
        Positions in `looks` of the images that need no further look.
    found : dict of arrays [finished]
        predict (ABSTAIN = -1); radius, the largest of the rule's that was certified or that of the largest bound; n, the
        samples it took; c_a, n_a; and p_a_lower, the probability proved.
    """
    selected = len(block_edges(rule.n0)) - 1
    guessed = [int(x.selection.sum(axis=0).argmax()) for x in looks]
    skipped = np.array([rule.skip_wrong and c != x.label for x, c in zip(looks, guessed, strict=True)], dtype=bool)
    successes = [
        x.estimation[: 0 if skip else None, c].cumsum() for x, c, skip in zip(looks, guessed, skipped, strict=True)
    ]
    whole = np.array([len(x.selection) == selected for x in looks], dtype=bool)
    finished = np.flatnonzero(whole & (skipped | ~still_open(rule, sigma, successes)))
    proved = np.array(claims(rule, sigma, [successes[i] for i in finished])).reshape(-1, 2)
    c_a = np.array([guessed[i] for i in finished], dtype=np.int64)
    done = [successes[i] for i in finished]
    # a radius of 0 among those to decide is certified by p_A > 1/2, and then p_a_lower is 1/2
    answered = proved[:, 1] > 0 if rule.kind == "radius" else proved[:, 0] > 0
    return finished, {
        "predict": np.where(answered, c_a, ABSTAIN),
        "radius": proved[:, 1],
        "n": np.array([rule.looks[len(s) - 1] if len(s) else 0 for s in done], dtype=np.int64),
        "c_a": c_a,
        "n_a": np.array([s[-1] if len(s) else 0 for s in done], dtype=np.int64),
        "p_a_lower": proved[:, 0],
    }
