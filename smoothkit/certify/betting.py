"""Tests that may be looked at again and again: wealth of a bettor, its boundaries, and confidence sequences."""

import math

import numpy as np
from scipy import special, stats

from smoothkit.certify.bounds import OUTWARD, _by_distinct_pairs, _lower
from smoothkit.types import check_alpha

# --- stopping boundaries: tests that may be looked at again and again ----------------------------------

WEALTH_MARGIN = 1e-6  # log wealth is compared with this much to spare; far above its rounding error


def log_wealth_above(h: np.ndarray | int, t: np.ndarray | int, p_r: np.ndarray | float) -> np.ndarray:
    """Log of the wealth of a bettor who says p > p_r, after h successes in t draws.

    A Beta(1/2, 1/2) mixture of likelihood ratios (Krichevsky-Trofimov), cut to q > p_r. Whatever the true
    p <= p_r, the wealth is a non-negative supermartingale that starts at 1, so the chance that it *ever*
    reaches 1 / alpha is at most alpha (Ville): it may be looked at as often as one likes.

    References
    ----------
    Voráček, "Treatment of Statistical Estimation Problems in Randomized Smoothing", NeurIPS 2024, for the
    two-sided wealth; the cut makes it one-sided, and sharper.
    """
    return _log_wealth(h, t, p_r, special.betaincc)


def log_wealth_below(h: np.ndarray | int, t: np.ndarray | int, p_r: np.ndarray | float) -> np.ndarray:
    """The same for a bettor who says p < p_r: the mixture cut to q < p_r."""
    return _log_wealth(h, t, p_r, special.betainc)


def _log_wealth(h, t, p_r, tail) -> np.ndarray:
    a, b = np.asarray(h) + 0.5, np.asarray(t) - np.asarray(h) + 0.5
    with np.errstate(divide="ignore"):  # a tail that underflows is log 0: no evidence, the safe side
        mixture = special.betaln(a, b) + np.log(tail(a, b, p_r))
    start = special.betaln(0.5, 0.5) + np.log(tail(0.5, 0.5, p_r))
    return mixture - start - special.xlogy(a - 0.5, p_r) - special.xlog1py(b - 0.5, -p_r)


def kt_boundaries(looks: np.ndarray, p_r: float, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """At each look, the fewest successes that prove p > p_r and the most that prove p < p_r.

    Parameters
    ----------
    looks : int array, numbers of draws at which is looked, increasing
    p_r : float in (0, 1)
    alpha : float
        Chance of ever proving p > p_r although p <= p_r.
    beta : float
        The same for p < p_r. It ends hopeless cases early and costs power only, never soundness.

    Returns
    -------
    up, down : int64 arrays [len(looks)]; up is looks + 1 and down is -1 where nothing proves it.
    """
    check_alpha(alpha)
    check_alpha(beta)
    _check_p_r(p_r)
    looks = _checked_looks(looks)
    up = _smallest(looks, lambda h: log_wealth_above(h, looks, p_r) >= -math.log(alpha) + WEALTH_MARGIN)
    down = looks - _smallest(
        looks, lambda misses: log_wealth_below(looks - misses, looks, p_r) >= -math.log(beta) + WEALTH_MARGIN
    )
    return up, down


def kt_lower(h: np.ndarray | int, t: np.ndarray | int, alpha: float) -> np.ndarray:
    """Lower confidence sequence for p: the chance that it *ever* lies above p, over all t together, is at most alpha.

    The largest p_r at which `log_wealth_above` has reached log(1 / alpha), rounded down. That is a bound: the wealth
    falls as p_r grows, so if it has reached 1 / alpha at some p_r >= p, it has at p, and Ville's inequality applies.
    It falls because with p_r = sin² x the prior is even over x in (0, pi / 2), and the wealth is the mean over s in
    (0, 1) of G(x + s (pi / 2 - x)) / G(x), where G(x) = sin(x)^2h cos(x)^2(t - h). log G is concave, so each term
    falls while log G rises, that is for p_r <= h / t; beyond, no term is above 1. The largest of the bounds at several
    t is a bound as well, and so is the one at a t chosen by looking at the draws.

    Parameters
    ----------
    h, t : int or arrays, broadcast against each other
        Successes and draws, 0 <= h <= t, t >= 1.
    alpha : float in (0, 1), one-sided

    Returns
    -------
    float64 array of the broadcast shape; 0 for h = 0. Never above `clopper_pearson_lower`, the best bound for one t.

    References
    ----------
    Voráček, "Treatment of Statistical Estimation Problems in Randomized Smoothing", NeurIPS 2024, two-sided.
    """
    return np.maximum(0.0, np.nextafter(_by_distinct_pairs(_kt_lower, h, t, alpha) * (1 - OUTWARD), 0.0))


def kt_upper(h: np.ndarray | int, t: np.ndarray | int, beta: float) -> np.ndarray:
    """Upper confidence sequence for p, the mirror image of `kt_lower`; 1 for h = t, never rounded down."""
    return np.minimum(1.0, np.nextafter(1 - kt_lower(np.asarray(t) - np.asarray(h), t, beta), 2.0))


KT_STEPS, KT_NUDGE = 10, 1e-8  # in log-odds; what is left costs less than WEALTH_MARGIN does


def _kt_lower(h: np.ndarray, t: np.ndarray, alpha: float) -> np.ndarray:
    """Regula falsi (Illinois) in log-odds: `low` only ever moves to where the wealth suffices, so any step is safe."""
    some = h > 0
    answer = np.zeros(h.shape)
    h, t = h[some], t[some]

    def excess(log_odds: np.ndarray) -> np.ndarray:
        return log_wealth_above(h, t, special.expit(log_odds)) + math.log(alpha) - WEALTH_MARGIN

    # the wealth at p is at least 1 / (4 t) over the binomial tail, and the tail at this `low` is alpha / (4 t)
    low, high = special.logit(_lower(h, t, alpha / (4 * t))), special.logit(_lower(h, t, alpha))
    at_low, at_high = excess(low), excess(high)
    proved = at_low >= 0
    was_enough = np.zeros(h.shape, dtype=np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):  # a NaN is not enough, and only `high` takes it
        for _ in range(KT_STEPS):
            middle = high - at_high * (high - low) / (at_high - at_low)
            at_middle = excess(middle)
            enough = at_middle >= 0
            at_high = np.where(enough, np.where(was_enough > 0, at_high / 2, at_high), at_middle)
            at_low = np.where(enough, at_middle, np.where(was_enough < 0, at_low / 2, at_low))
            low, high = np.where(enough, middle, low), np.where(enough, high, middle)
            was_enough = np.where(enough, 1, -1)
        nearer = high - KT_NUDGE
        low = np.where(excess(nearer) >= 0, np.maximum(low, nearer), low)
    answer[some] = np.where(proved, special.expit(low), 0.0)
    return answer


def clopper_pearson_count(n: np.ndarray | int, p_r: float, alpha: float) -> np.ndarray:
    """The fewest successes in n that put the Clopper-Pearson lower bound above p_r; n + 1 if none do."""
    check_alpha(alpha)
    _check_p_r(p_r)
    n = _checked_samples(n)
    return _smallest(n, lambda k: stats.binom.sf(k - 1, n, p_r) < alpha * (1 - 1e-9))


def _check_p_r(p_r: float) -> None:
    if not 0 < p_r < 1:
        raise ValueError(f"p_r must lie in (0, 1), got {p_r}")


def _checked_samples(n: np.ndarray | int) -> np.ndarray:
    n = np.asarray(n)
    if n.size and not (np.issubdtype(n.dtype, np.integer) and n.min() >= 1 and n.max() < 2**31):
        raise ValueError(f"numbers of samples must be whole and lie in 1..{2**31 - 1:,}, got {n.tolist()}")
    return n.astype(np.int64)


def _checked_looks(looks: np.ndarray) -> np.ndarray:
    looks = _checked_samples(looks)
    if looks.ndim != 1 or (np.diff(looks) <= 0).any():
        raise ValueError(f"looks must be increasing numbers of samples, got {looks.tolist()}")
    return looks


def _smallest(n: np.ndarray, proves) -> np.ndarray:
    """Bisection for the smallest k in 0..n at which a condition monotone in k holds; n + 1 if it never does."""
    low, high = np.full(n.shape, -1, dtype=np.int64), n + 1  # fails at low, holds at high
    while (high - low > 1).any():
        middle = np.where(high - low > 1, (low + high) // 2, low)
        holds = (middle >= 0) & proves(np.maximum(middle, 0))
        high, low = np.where(holds & (high - low > 1), middle, high), np.where(~holds, middle, low)
    return high


MOST_BETWEEN_LOOKS = 10_000_000  # of `decision_probabilities`: each takes a float or two


def decision_probabilities(looks: np.ndarray, up: np.ndarray, down: np.ndarray, p: float) -> dict[str, float]:
    """Exact chances that a test with boundaries ends one way or the other, when draws succeed with probability p.

    Dynamic programming over the number of successes of runs that are undecided at each look. Outcomes of
    chance below 1e-25 are dropped.

    Returns
    -------
    dict with `certified`, `rejected`, `undecided` (at the last look) and `draws`, the mean number of draws.
    """
    looks, up, down = _checked_looks(looks), np.asarray(up), np.asarray(down)
    if not up.shape == down.shape == looks.shape:
        raise ValueError(
            f"up and down must have a value for each of {len(looks)} looks, got {up.shape} and {down.shape}"
        )
    if (up <= down).any():
        raise ValueError(f"up must lie above down at every look, got {up.tolist()} and {down.tolist()}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    if np.diff(looks, prepend=0).max(initial=0) > MOST_BETWEEN_LOOKS:
        raise ValueError(
            f"looks must be at most {MOST_BETWEEN_LOOKS:,} samples apart to be computed exactly, got {looks.tolist()}"
        )
    alive, lowest = np.ones(1), 0  # alive[i]: chance of lowest + i successes so far, undecided
    certified = rejected = draws = 0.0
    previous = 0
    for look, high, low in zip(looks, up, down, strict=True):
        step = int(look - previous)
        draws += step * alive.sum()
        alive = np.convolve(alive, stats.binom.pmf(np.arange(step + 1), step, p))
        successes = lowest + np.arange(len(alive))
        certified += alive[successes >= high].sum()
        rejected += alive[successes <= low].sum()
        keep = (successes < high) & (successes > low) & (alive > 1e-25)
        if not keep.any():
            alive = np.zeros(1)
            break
        inside = slice(keep.argmax(), len(keep) - keep[::-1].argmax())
        alive, lowest, previous = alive[inside], int(successes[inside][0]), look
    return {
        "certified": float(certified),
        "rejected": float(rejected),
        "undecided": float(alive.sum()),
        "draws": float(draws),
    }
