"""Counts -> confidence bounds and radii: float64, rounded outward.

SciPy's inverse of the beta distribution comes out too large, by 1e-14 of itself for a hundred samples and 2e-12
for a million, so one Newton step with the distribution itself brings it within 1e-13. Every lower bound is then taken
down by a relative 1e-12 (upper bounds up), many times that error and too little to see: 4e-9 sigma of radius
at n = 100,000. Radii are rounded towards zero.
"""

import functools
import math

import numpy as np
from scipy import special, stats

from smoothkit.types import check_alpha, check_samples, check_sigma

OUTWARD = 1e-12  # above the error of what is rounded (tests/test_bounds.py measures it), below anything printed


def clopper_pearson_lower(k: np.ndarray | int, n: np.ndarray | int, alpha: float) -> np.ndarray:
    """One-sided Clopper-Pearson lower confidence bound, never above the exact one.

    Parameters
    ----------
    k, n : int or arrays, broadcast against each other
        Successes and trials, 0 <= k <= n, n >= 1.
    alpha : float
        Chance that the bound lies above the true probability; one-sided, in (0, 1).

    Returns
    -------
    float64 array of the broadcast shape: inf{p : P(Bin(n, p) >= k) > alpha}, rounded down; 0 for k = 0.

    References
    ----------
    Clopper and Pearson, Biometrika 26, 1934; Cohen, Rosenfeld and Kolter, ICML 2019, Section 3.2.2.
    """
    return np.maximum(0.0, np.nextafter(_by_distinct_pairs(_lower, k, n, alpha) * (1 - OUTWARD), 0.0))


def clopper_pearson_upper(k: np.ndarray | int, n: np.ndarray | int, alpha: float) -> np.ndarray:
    """One-sided Clopper-Pearson upper confidence bound, never below the exact one; 1 for k = n."""
    return np.minimum(1.0, np.nextafter(_by_distinct_pairs(_upper, k, n, alpha) * (1 + OUTWARD), 1.0))


def _lower(k: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    safe_k = np.where(k == 0, 1, k)
    bound = _beta_inverse(safe_k, n - safe_k + 1, alpha, special.betaincinv, special.betainc)
    bound = np.where(k == n, alpha ** (1.0 / n), bound)
    return np.where((k == 0) | np.isnan(bound), 0.0, bound)  # SciPy gives up at some alpha below 1e-200


def _upper(k: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    # by symmetry, in the tail where digits are kept: 1 - alpha would lose those of a small alpha
    safe_k = np.where(k == n, 0, k)
    bound = _beta_inverse(safe_k + 1, n - safe_k, alpha, special.betainccinv, special.betaincc)
    bound = np.where(k == 0, -np.expm1(math.log(alpha) / n), bound)
    return np.where((k == n) | np.isnan(bound), 1.0, bound)


def _beta_inverse(a: np.ndarray, b: np.ndarray, alpha: float, inverse, tail) -> np.ndarray:
    """x with tail(a, b, x) = alpha, by SciPy's inverse and one Newton step.

    The solver stops when the tail is right to some 5e-9, which is 2e-12 of x for large a and b, always above; the
    distribution it inverts is right to 1e-12 of the tail for counts up to a million.
    """
    x = inverse(a, b, alpha)
    sign = -1 if tail is special.betainc else 1  # betainc grows with x, betaincc falls
    with np.errstate(all="ignore"):
        density = np.exp(special.xlogy(a - 1, x) + special.xlog1py(b - 1, -x) - special.betaln(a, b))
        step = sign * (tail(a, b, x) - alpha) / density
    return x + np.where(np.abs(step) < 1e-6 * x, step, 0.0)  # where x has rounded to 1 there is no density to go by


def _by_distinct_pairs(bound, k, n, alpha: float) -> np.ndarray:
    """Evaluate `bound` once for each distinct (k, n): a million images share some 50,000 counts."""
    check_alpha(alpha)
    k, n = np.broadcast_arrays(np.asarray(k), np.asarray(n))
    if not (np.issubdtype(k.dtype, np.integer) and np.issubdtype(n.dtype, np.integer)):
        raise ValueError(f"k and n must be whole numbers, got {k.dtype} and {n.dtype}")
    if k.size and (k.min() < 0 or n.min() < 1 or (k > n).any()):
        raise ValueError(f"counts must satisfy 0 <= k <= n and n >= 1, got k up to {k.max()}, n down to {n.min()}")
    if k.size and n.max() >= 2**31:
        raise ValueError(f"n must lie below 2**31, got {n.max()}")
    if k.size > n.max(initial=0) == n.min(initial=2**31):  # one n, and many of its counts: no need to sort
        return _by_distinct_counts(bound, k, int(n.flat[0]), alpha)
    pairs, inverse = np.unique(n.astype(np.int64) << 32 | k.astype(np.int64), return_inverse=True)
    return bound(pairs & 0xFFFFFFFF, pairs >> 32, alpha)[inverse.ravel()].reshape(k.shape)


def _by_distinct_counts(bound, k: np.ndarray, n: int, alpha: float) -> np.ndarray:
    present = np.zeros(n + 1, dtype=bool)
    present[k] = True
    counts = np.flatnonzero(present)
    table = np.zeros(n + 1)
    table[counts] = bound(counts, np.full(len(counts), n), alpha)
    return table[k]


MOST_OF_A_TABLE = 10_000_000  # half a minute, and 80 MB


@functools.lru_cache(maxsize=8)
def lower_bound_table(n: int, alpha: float) -> np.ndarray:
    """`clopper_pearson_lower` of every count, for look-up where the counts are: `table[n_a]`.

    Cached and read-only. On a device: `torch.tensor(lower_bound_table(n, alpha), device=device)[counts]`, which
    copies; keep it in float64.

    Returns
    -------
    float64 array [n + 1]
    """
    check_samples("n", n)
    if n > MOST_OF_A_TABLE:
        raise ValueError(f"a table of {n:,} counts takes too long; bound the counts at hand with clopper_pearson_lower")
    return _read_only(clopper_pearson_lower(np.arange(n + 1), n, alpha))


@functools.lru_cache(maxsize=8)
def radius_table(n: int, alpha: float, sigma: float) -> np.ndarray:
    """`radius` of every entry of `lower_bound_table`: float64 [n + 1], in the units of `sigma`, cached, read-only."""
    return _read_only(radius(lower_bound_table(n, alpha), sigma))


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def radius(p_a_lower: np.ndarray | float, sigma: np.ndarray | float) -> np.ndarray:
    """L2 radius sigma * Phi^-1(p_a_lower), rounded down; 0 where p_a_lower <= 1/2.

    The two-class simplification p_B = 1 - p_A of Cohen et al. 2019, Theorem 1. Units of `sigma`, which is one for all or
    an array of the same shape.
    """
    for s in np.unique(sigma):
        check_sigma(float(s))
    p = np.asarray(p_a_lower, dtype=np.float64)
    if p.size and not ((p >= 0) & (p < 1)).all():
        raise ValueError(f"p_a_lower must lie in [0, 1), got values from {p.min()} to {p.max()}")
    exact = sigma * special.ndtri(np.maximum(p, 0.5))
    return np.maximum(0.0, np.nextafter(exact * (1 - OUTWARD), 0.0))


def two_class_radius(p_a_lower: float, p_b_upper: float, sigma: float) -> float:
    """L2 radius (sigma / 2)(Phi^-1(p_a_lower) - Phi^-1(p_b_upper)), rounded down; 0 if the bounds cross.

    The full form of Cohen et al. 2019, Theorem 1. alpha must have been split between the two bounds.
    """
    check_sigma(sigma)
    if not (0 <= p_a_lower < 1 and 0 < p_b_upper <= 1):
        raise ValueError(
            f"p_a_lower must lie in [0, 1) and p_b_upper in (0, 1], as no samples prove more, got {p_a_lower} and {p_b_upper}"
        )
    exact = sigma / 2 * float(special.ndtri(p_a_lower) - special.ndtri(p_b_upper))
    return max(0.0, math.nextafter(exact * (1 - OUTWARD), 0.0)) if exact > 0 else 0.0


def radius_cap(n: int, alpha: float, sigma: float) -> float:
    """The largest radius that n samples can certify: that of n unanimous votes."""
    return float(radius(clopper_pearson_lower(n, n, alpha), sigma))


def predict_p_value(top: np.ndarray | int, runner_up: np.ndarray | int) -> np.ndarray:
    """Two-sided p-value of the top count against the runner-up at p = 1/2 (PREDICT of Cohen et al. 2019)."""
    top, runner_up = np.asarray(top), np.asarray(runner_up)
    tail = stats.binom.sf(np.maximum(top, runner_up) - 1, top + runner_up, 0.5)
    return np.minimum(1.0, 2 * tail * (1 + OUTWARD))


def smallest_n_certify(alpha: float) -> int:
    """The fewest samples whose unanimous vote certifies a radius above 0 (10 at alpha = 0.001)."""
    check_alpha(alpha)
    n = max(1, math.floor(-math.log2(alpha)))
    while not radius_cap(n, alpha, 1.0) > 0:
        n += 1
    return n


def smallest_n_predict(alpha: float) -> int:
    """The fewest samples whose unanimous vote lets PREDICT answer (11 at alpha = 0.001)."""
    check_alpha(alpha)
    n = max(1, math.floor(-math.log2(alpha)))
    while predict_p_value(n, 0) > alpha:
        n += 1
    return n


def check_reach(n: int, alpha: float, *, predict: bool = False) -> None:
    """Refuse an n from which no votes, however clear, could give an answer at alpha."""
    check_samples("n", n)
    least = smallest_n_predict(alpha) if predict else smallest_n_certify(alpha)
    if n < least:
        raise ValueError(
            f"n={n} cannot reach alpha={alpha:g}: even unanimous votes would abstain; use n of at least {least}"
        )


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
