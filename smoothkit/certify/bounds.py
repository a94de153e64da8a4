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

from smoothkit.types import NoiseForm, check_alpha, check_samples, check_sigma

OUTWARD = 1e-12  # above the error of what is rounded (tests/certify/test_bounds.py measures it), below anything printed
TAIL_ERROR = 1e-9  # relative; how well the tail at a bound must meet alpha
SMALLEST_ALPHA = 1e-100  # of a bound; below, the tails lose their digits


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
    return np.where(k == 0, 0.0, bound)


def _upper(k: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    # by symmetry, in the tail where digits are kept: 1 - alpha would lose those of a small alpha
    safe_k = np.where(k == n, 0, k)
    bound = _beta_inverse(safe_k + 1, n - safe_k, alpha, special.betainccinv, special.betaincc)
    bound = np.where(k == 0, -np.expm1(math.log(alpha) / n), bound)
    return np.where(k == n, 1.0, bound)


def _beta_inverse(a: np.ndarray, b: np.ndarray, alpha: float, inverse, tail) -> np.ndarray:
    """x with tail(a, b, x) = alpha, by SciPy's inverse and one Newton step; by bisection where that is not right.

    The solver stops when the tail is right to some 5e-9, which is 2e-12 of x for large a and b, always above; the
    distribution it inverts is right to 1e-12 of the tail for counts up to a million. At b = 1,000 and a above some 3e7
    the solver stops far away (a tail of 1.04e-3 for 1e-3 at a = 1e8), so the tail of every answer is looked at.
    """
    x = np.asarray(inverse(a, b, alpha))
    sign = -1 if tail is special.betainc else 1  # betainc grows with x, betaincc falls
    with np.errstate(all="ignore"):
        density = np.exp(special.xlogy(a - 1, x) + special.xlog1py(b - 1, -x) - special.betaln(a, b))
        step = sign * (tail(a, b, x) - alpha) / density
        x = x + np.where(np.abs(step) < 1e-6 * x, step, 0.0)  # where x has rounded to 1 there is no density to go by
        wrong = ~(np.abs(tail(a, b, x) / alpha - 1) <= TAIL_ERROR)
    if wrong.any():
        x[wrong] = _bisect_tail(a[wrong], b[wrong], alpha, tail)
    return x


def _bisect_tail(a: np.ndarray, b: np.ndarray, alpha: float, tail) -> np.ndarray:
    """The last float64 x on the safe side: tail(a, b, x) <= alpha."""
    rising = tail is special.betainc
    low, high = np.zeros(a.shape), np.ones(a.shape)
    while True:
        middle = (low + high) / 2
        inside = (low < middle) & (middle < high)
        if not inside.any():
            return low if rising else high
        to_low = (tail(a, b, middle) <= alpha) == rising
        low, high = np.where(inside & to_low, middle, low), np.where(inside & ~to_low, middle, high)


def _by_distinct_pairs(bound, k, n, alpha: float) -> np.ndarray:
    """Evaluate `bound` once for each distinct (k, n): a million images share some 50,000 counts."""
    check_alpha(alpha)
    if alpha < SMALLEST_ALPHA:
        raise ValueError(f"alpha must be at least {SMALLEST_ALPHA:g} for a bound, got {alpha!r}; no data needs less")
    k, n = np.broadcast_arrays(np.asarray(k), np.asarray(n))
    if not (np.issubdtype(k.dtype, np.integer) and np.issubdtype(n.dtype, np.integer)):
        raise ValueError(f"k and n must be whole numbers, got {k.dtype} and {n.dtype}")
    if k.size and (k.min() < 0 or n.min() < 1 or (k > n).any()):
        raise ValueError(f"counts must satisfy 0 <= k <= n and n >= 1, got k up to {k.max()}, n down to {n.min()}")
    if k.size and n.max() >= 2**31:
        raise ValueError(f"n must lie below 2**31, got {n.max()}")
    if k.size and n.min() == n.max() < k.size:  # one n and most of its counts: a table, and nothing to sort
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
    table = clopper_pearson_lower(np.arange(n + 1), n, alpha)
    table.flags.writeable = False
    return table


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


def sigma_of_proof(sigma: np.ndarray | float, noise: NoiseForm) -> np.ndarray | float:
    """The sigma for which a radius is proved: a little below the noise's own where float noise is rounded to a grid.

    With s = sigma * grid, the noise in grid steps is rint(s z) with s z a float32. In [2^a, 2^(a+1)) these are eps = 2^(a-23)
    apart, and a value half-way between two steps goes to the even one, so even steps are likelier by a share eps. Over
    s z ~ N(0, s^2) the mean of eps^2 is (.737 s 2^-23)^2. Shifting a value by one step then separates the two
    distributions by 1 / s^2 (Gaussian) + 4 E eps^2 (parity) in squared units of sigma, in place of 1 / s^2; shifts
    by more steps gain less. A radius in units of sigma is too long by the root of their ratio at the most,

        sqrt(1 + 4 (.737 s 2^-23)^2 s^2) < 1 + (s / 2800)^4,

    which is 2.7e-7 at 8 bits and sigma 0.25, 7.0e-5 at s = 256, and 28 % at s = 2,040: above s = 256 such noise is not
    used (`NoiseForm.check`). Noise drawn exactly on the grid needs no correction. Float noise on images of no
    grid leaks in other ways, which no factor mends; its certificates say so.
    """
    if noise.grid is None or noise.exact:
        return sigma
    return sigma / (1 + (np.asarray(sigma) * noise.grid / 2800) ** 4)


def radius_for_all(radius: np.ndarray | float, values: int, grid: int) -> np.ndarray:
    """What a radius proved for perturbations on a grid says of all real ones: max(R / 2, R - sqrt(d) / (2 grid)).

    The deployed classifier rounds its input to the grid. For a real perturbation t of a value on the grid, in steps,
    |round(t)| <= 2 |t| and |round(t) - t| <= 1/2; summed over d values, the rounded perturbation is at most twice as
    long, and at most sqrt(d) / 2 steps longer. Rounded down; float64, units of `radius`.

    Parameters
    ----------
    radius : L2, on the grid
    values : d, the number of values of an image, C * H * W
    grid : steps from 0 to 1
    """
    longest = np.maximum(np.asarray(radius) / 2, radius - math.sqrt(values) / (2 * grid))
    return np.maximum(0.0, np.nextafter(longest * (1 - OUTWARD), 0.0))


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
