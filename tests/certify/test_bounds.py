"""Bounds and radii: never too large, and equal to golden values."""

import functools
import os
import warnings

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats

from smoothkit.certify import bounds

# closed forms and R's binom.test (4.3) to all digits: (k, n, alpha) -> lower bound
GOLDEN = {
    (990, 1000, 0.001): 0.9760361871553114,
    (1000, 1000, 0.001): 0.9931160484209338,
    (999, 1000, 0.001): 0.9908045023646124,
    (950, 1000, 0.001): 0.9250467800609440,
    (600, 1000, 0.001): 0.5510754739370525,
    (100, 100, 0.001): 0.9332543007969910,
    (99000, 100000, 0.001): 0.9889893403774748,
    (99900, 100000, 0.001): 0.9986509924467530,
    (99999, 100000, 0.001): 0.9999076696662654,
    (100000, 100000, 0.001): 0.9999309248330094,
    (50500, 100000, 0.001): 0.5001089517395879,
    (9, 10, 0.05): 0.6058366975634952,
    (10, 10, 0.05): 0.7411344491069477,
}
GOLDEN_RADII = {  # (k, n, sigma) at alpha 0.001
    (990, 1000, 0.25): 0.4945023955,
    (990, 1000, 0.5): 0.9890047911,
    (1000, 1000, 0.25): 0.6158156537,
    (999, 1000, 0.25): 0.5894126426,
    (950, 1000, 0.25): 0.3599655053,
    (600, 1000, 0.25): 0.0320947491,
    (100, 100, 0.25): 0.3751187560,
    (99000, 100000, 0.25): 0.5724999888,
    (99900, 100000, 0.5): 1.5001004938,
    (99999, 100000, 0.25): 0.9347816671,
    (100000, 100000, 0.25): 0.9528641408,
    (100000, 100000, 0.5): 1.9057282817,
    (100000, 100000, 1.0): 3.8114565634,
    (50500, 100000, 0.25): 6.83e-5,
}


@pytest.mark.parametrize(("case", "value"), GOLDEN.items())
def test_golden_lower_bounds(case, value):
    k, n, alpha = case
    assert float(bounds._lower(np.array(k), np.array(n), alpha)) == pytest.approx(value, rel=1e-14)
    assert value * (1 - 2e-12) < float(bounds.clopper_pearson_lower(k, n, alpha)) < value


@pytest.mark.parametrize(("case", "value"), GOLDEN_RADII.items())
def test_golden_radii(case, value):
    k, n, sigma = case
    digits = 1e-7 if value < 1e-3 else 5.1e-9  # as many as are given; the last is k = n, where 1e-12 of p costs 4e-9
    assert float(bounds.radius(bounds.clopper_pearson_lower(k, n, 0.001), sigma)) == pytest.approx(value, abs=digits)


# --- never on the wrong side, against mpmath ---------------------------------------------------------------

# A lower bound p is at most the exact one if and only if P(Bin(n, p) >= k) <= alpha: the tail grows with p. The tail is
# lead * S with lead = C(n, k) p^k (1 - p)^(n - k) and S = 1 + r_1 + r_1 r_2 + ..., r_j = (n - k - j + 1) / (k + j) odds.
# The lead, where digits could be lost, is mpmath's with 26 digits. S has positive terms only and is summed in float64:
# each term costs four roundings more than the one before, so J terms are right to 5 (J + 1) 2^-53. Where that could
# hide a fault, and for a share of the cases chosen at random, S is mpmath's as well.

DIGITS = 26
ALPHAS = [0.5, 0.1, 0.05, 0.01, 1e-3, 1e-4, 1e-6, 1e-9, 1e-12]


def series(n: np.ndarray, k: np.ndarray, odds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S and a bound on its relative error, for arrays of one length."""
    total, terms = np.ones(len(n)), np.ones(len(n))
    left, j = np.arange(len(n)), 0
    a, b, odds, term, partial = n - k, k, odds.copy(), np.ones(len(n)), np.ones(len(n))
    while len(left):
        term = term * ((a - j) / (b + j + 1.0) * odds)
        partial = partial + term
        j += 1
        ratio = (a - j) / (b + j + 1.0) * odds  # falls with j: what is left out is below a geometric series
        rest = np.where(ratio < 1, term * ratio / np.where(ratio < 1, 1 - ratio, 1), np.where(term > 0, np.inf, 0))
        done = (rest <= 1e-17 * partial) | (a <= j)
        total[left[done]], terms[left[done]] = partial[done], j
        keep = ~done
        left, a, b, odds, term, partial = (x[keep] for x in (left, a, b, odds, term, partial))
    return total, 5 * (terms + 1) * 2.0**-53


@functools.cache
def log_factorial(n: int) -> mpmath.mpf:
    return mpmath.loggamma(n + 1)


@functools.cache
def log_of(alpha: float) -> mpmath.mpf:
    return mpmath.log(alpha)


def log_lead(n: int, k: int, p: mpmath.mpf) -> mpmath.mpf:
    choose = log_factorial(n) - log_factorial(k) - log_factorial(n - k)
    return choose + k * mpmath.log(p) + ((n - k) * mpmath.log(1 - p) if n > k else 0)


def exact_series(n: int, k: int, p: mpmath.mpf) -> mpmath.mpf:
    total = term = mpmath.mpf(1)
    j, odds = 0, p / (1 - p) if p < 1 else mpmath.inf
    while j < n - k and term > total * mpmath.mpf("1e-25"):
        term *= odds * (n - k - j) / (k + j + 1)
        total += term
        j += 1
    return total


def log_tails_over_alpha(n, k, p, alpha, in_full: np.ndarray) -> np.ndarray:
    """log P(Bin(n, p) >= k) - log alpha, at most 0 where the bound p is sound; rounded up by the error of S.

    `p` is a list of mpf: one minus an upper bound is no float.
    """
    odds = np.array([float(x / (1 - x)) if x < 1 else np.inf for x in p])
    total, error = series(n, k, odds)
    result = np.empty(len(n))
    for i, (m, h, x, a) in enumerate(zip(n.tolist(), k.tolist(), p, alpha.tolist(), strict=True)):
        lead = log_lead(m, h, x) - log_of(a)
        fast = float(lead + mpmath.log(total[i])) + error[i]
        exact = None
        if in_full[i] or fast > -error[i]:
            exact = float(lead + mpmath.log(exact_series(m, h, x)))
            assert abs(fast - exact) <= 2 * error[i] + 1e-20  # the quick road keeps what it promises
        result[i] = fast if exact is None else exact
    return result


def random_cases(size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n log-uniform up to a million; k uniform, binomial, near 0, near n, and log-uniform from n."""
    rng = np.random.default_rng(seed)
    n = np.minimum(np.exp(rng.uniform(0, np.log(1e6 + 1), size)).astype(np.int64), 10**6)
    few = np.minimum(n, rng.geometric(0.2, size) - 1)
    from_n = (n + 1.0) ** rng.random(size) - 1
    kinds = np.stack([rng.integers(0, n + 1), rng.binomial(n, rng.random(size)), few, n - few, n - from_n.astype(int)])
    return n, kinds[rng.integers(0, len(kinds), size), np.arange(size)], rng.choice(ALPHAS, size)


def edge_cases() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Few or no successes and failures, one half and its neighbours, tiny and huge alpha; n from 1 to ten million."""
    cases = [
        (n, k, alpha)
        for n in (1, 2, 3, 10, 11, 100, 1_000, 9_999, 100_000, 10**6, 10**7)
        for k in {0, 1, 2, n // 10, n // 2, n // 2 + 1, n - 2, n - 1, n} & set(range(n + 1))
        for alpha in (0.9, 0.5, 0.05, 1e-3, 1e-6, 1e-12, 1e-15, 1e-100)
        if not (alpha == 0.9 and n > 10**6)  # a long sum, and nobody's alpha
    ]
    return tuple(np.array(column) for column in zip(*cases, strict=True))


def by_alpha(bound, n: np.ndarray, k: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    result = np.empty(len(n))
    for a in np.unique(alpha):
        result[alpha == a] = bound(k[alpha == a], n[alpha == a], a)
    return result


def check_lower_bounds(n, k, alpha, in_full) -> None:
    lower = by_alpha(bounds.clopper_pearson_lower, n, k, alpha)
    assert (lower[k == 0] == 0).all() and ((lower >= 0) & (lower < 1)).all()
    some = (k > 0) & (lower > 0)
    assert some[k > 0].all()
    with mpmath.workdps(DIGITS):
        p = [mpmath.mpf(x) for x in lower[some].tolist()]
        excess = log_tails_over_alpha(n[some], k[some], p, alpha[some], in_full[some])
    assert excess.max() <= 0, f"{(excess > 0).sum()} lower bounds lie above the exact one"
    # and tight: log tail grows with log p, at most n times as fast, and p is 1e-12 lower
    assert (excess > -1.02e-12 * n[some] - 1e-13).all()


def check_upper_bounds(n, k, alpha, in_full) -> None:
    upper = by_alpha(bounds.clopper_pearson_upper, n, k, alpha)
    assert (upper[k == n] == 1).all() and ((upper > 0) & (upper <= 1)).all()
    some = upper < 1  # 1 is above every exact bound
    with mpmath.workdps(DIGITS):
        p = [1 - mpmath.mpf(x) for x in upper[some].tolist()]  # the mirror image
        excess = log_tails_over_alpha(n[some], (n - k)[some], p, alpha[some], in_full[some])
    assert excess.max() <= 0, f"{(excess > 0).sum()} upper bounds lie below the exact one"


def check_radii(p_a_lower: np.ndarray, sigma: float) -> None:
    """A radius r is at most the exact one if Phi(r / sigma) <= p, and with p so is one from p's exact value."""
    radii = bounds.radius(p_a_lower, sigma)
    assert (radii[p_a_lower <= 0.5] == 0).all()
    with mpmath.workdps(DIGITS):
        root = mpmath.mpf(sigma) * mpmath.sqrt(2)
        for r, p in zip(radii.tolist(), p_a_lower.tolist(), strict=True):
            if r > 0:
                assert mpmath.erfc(r / root) >= 2 * (1 - mpmath.mpf(p))


@pytest.mark.slow
def test_no_bound_or_radius_on_the_wrong_side_at_the_edges():
    n, k, alpha = edge_cases()
    in_full = n <= 10_000
    check_lower_bounds(n, k, alpha, in_full)
    check_upper_bounds(n, k, alpha, in_full)
    for sigma in (0.12, 0.25, 1.0):
        check_radii(by_alpha(bounds.clopper_pearson_lower, n, k, alpha), sigma)


# 10,000 cases in every run, the 100,000 with SMOOTHKIT_LONG_TESTS=1
RANDOM_CASES = 100_000 if os.environ.get("SMOOTHKIT_LONG_TESTS") else 10_000


@pytest.mark.slow
def test_no_bound_or_radius_on_the_wrong_side_in_random_cases():
    n, k, alpha = random_cases(RANDOM_CASES, seed=0)
    in_full = np.random.default_rng(1).random(len(n)) < 200 / len(n)
    check_lower_bounds(n, k, alpha, in_full)
    check_upper_bounds(n, k, alpha, in_full)
    check_radii(by_alpha(bounds.clopper_pearson_lower, n, k, alpha), 0.25)


def test_scipy_alone_would_be_unsound():
    """Why there is a Newton step: SciPy's inverse lies above the exact bound by more than OUTWARD takes away."""
    n, k, alpha = 990_217, 135_769, 1.2800282993901703e-10
    with mpmath.workdps(DIGITS):
        for bound, above in ((special.betaincinv(k, n - k + 1, alpha) * (1 - bounds.OUTWARD), True),
                             (float(bounds.clopper_pearson_lower(k, n, alpha)), False)):  # fmt: skip
            p = mpmath.mpf(float(bound))
            assert (log_lead(n, k, p) + mpmath.log(exact_series(n, k, p)) > mpmath.log(alpha)) == above


def test_alpha_too_small_for_float64_tails_is_refused():
    for bound in (bounds.clopper_pearson_lower, bounds.clopper_pearson_upper):
        with pytest.raises(ValueError, match=r"alpha must be at least 1e-100 for a bound, got 1e-250"):
            bound(6, 8, 1e-250)
        assert 0 <= float(bound(6, 8, 1e-100)) <= 1


@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6, 1e-9, 1e-30])
def test_the_tail_at_every_bound_is_alpha_where_scipys_inverse_is_not(alpha):
    """Around 999 misses in 3e7 trials and more SciPy's inverse stops early: the bound was above p up to 1,200 alpha."""
    misses = np.concatenate([np.arange(990, 1_010), [1, 10, 500, 5_000, 20_000]])
    for n in (10**7, 3 * 10**7, 10**8, 740_515_122, 10**9):
        lower, upper = (
            bounds.clopper_pearson_lower(n - misses, n, alpha),
            bounds.clopper_pearson_upper(misses, n, alpha),
        )
        tails = special.betainc(n - misses, misses + 1.0, lower), special.betaincc(misses + 1.0, n - misses, upper)
        for tail in tails:
            assert (tail <= alpha * (1 + 1e-9)).all() and (tail >= alpha * (1 - 1e-3)).all()
        order = np.argsort(misses)
        assert (np.diff(lower[order]) < 0).all() and (np.diff(upper[order]) > 0).all()


# --- tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.05), (100, 0.001), (1_003, 1e-6)])
def test_tables_hold_what_the_functions_give(n, alpha):
    lower = bounds.lower_bound_table(n, alpha)
    assert lower.shape == (n + 1,) and lower.dtype == np.float64
    assert [float(bounds.clopper_pearson_lower(k, n, alpha)) for k in range(n + 1)] == lower.tolist()


def test_tables_are_made_once_and_cannot_be_changed():
    table = bounds.lower_bound_table(100, 0.001)
    assert bounds.lower_bound_table(100, 0.001) is table
    with pytest.raises(ValueError, match="read-only"):
        table[3] = 1.0
    with pytest.raises(ValueError, match="n must be"):
        bounds.lower_bound_table(0, 0.001)


def test_a_table_looks_up_on_a_device():
    counts = torch.tensor([[990, 1000], [0, 500]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.tensor(bounds.lower_bound_table(1000, 0.001), device=counts.device)[counts]
    assert np.array_equal(found.numpy(), bounds.clopper_pearson_lower(counts.numpy(), 1000, 0.001))


def test_many_counts_of_one_n_are_as_few():
    """One n with many counts takes another way than pairs; the bits are the same."""
    k = np.random.default_rng(0).integers(0, 501, (40, 50))
    many = bounds.clopper_pearson_lower(k, 500, 0.001)
    pairs = bounds.clopper_pearson_lower(k.ravel()[:100], np.array([500] * 99 + [501]), 0.001)
    assert many.shape == k.shape and np.array_equal(many.ravel()[:99], pairs[:99])
    assert bounds.clopper_pearson_lower(np.array([], dtype=int), 500, 0.001).shape == (0,)


def test_a_million_bounds_are_as_many_as_their_counts(monkeypatch):
    """Counts as a million images have them, n_a / n from 0.5 to 1: each distinct one is inverted once, none by bisection."""
    k = np.random.default_rng(0).integers(50_000, 100_001, 10**6)
    asked, inverse = [], special.betaincinv
    monkeypatch.setattr(bounds.special, "betaincinv", lambda a, b, y: (asked.append(a.size), inverse(a, b, y))[1])
    monkeypatch.setattr(bounds, "_bisect_tail", None)
    bounds.clopper_pearson_lower(k, 100_000, 0.001)
    assert asked == [len(np.unique(k))]


# --- properties --------------------------------------------------------------------------------------------


def test_coverage_by_exact_sums():
    """Over all counts, the chance that the bound lies above p is at most alpha."""
    n = 200
    for alpha in (0.05, 0.001):
        lower = bounds.clopper_pearson_lower(np.arange(n + 1), n, alpha)
        for p in (0.3, 0.5, 0.8, 0.95, 0.999):
            assert stats.binom.pmf(np.arange(n + 1), n, p)[lower > p].sum() <= alpha * (1 + 1e-9)


def test_monotone_and_below_the_mean():
    k = np.arange(1001)
    lower = bounds.clopper_pearson_lower(k, 1000, 0.001)
    assert lower[0] == 0 and (np.diff(lower) > 0).all() and (lower[1:] < k[1:] / 1000).all()
    assert (bounds.clopper_pearson_lower(k[1:], 1000, 0.01) > lower[1:]).all()
    upper = bounds.clopper_pearson_upper(k, 1000, 0.001)
    assert upper[-1] == 1 and (upper[:-1] > k[:-1] / 1000).all()


def test_shapes_and_repeats():
    k = np.array([[990, 1000, 990], [0, 5, 1000]])
    n = np.array([1000, 1000, 2000])
    lower = bounds.clopper_pearson_lower(k, n, 0.001)
    assert lower.shape == (2, 3)
    assert lower[0, 0] == bounds.clopper_pearson_lower(990, 1000, 0.001) and lower[0, 0] != lower[0, 2]


@pytest.mark.parametrize(
    ("n", "cap"), [(100, 1.500475), (10**3, 2.463263), (10**4, 3.198578), (10**5, 3.811457), (10**6, 4.346774)]
)
def test_radius_cap(n, cap):
    assert bounds.radius_cap(n, 0.001, 1.0) == pytest.approx(cap, abs=5e-7)


@pytest.mark.parametrize(("least", "n"), [(66, 100), (550, 1000), (50_490, 100_000)])
def test_smallest_count_that_certifies(least, n):
    radii = bounds.radius(bounds.clopper_pearson_lower(np.array([least - 1, least]), n, 0.001), 1.0)
    assert radii[0] == 0 < radii[1]


def test_radius_scales_and_vanishes_at_one_half():
    assert bounds.radius(0.5, 1.0) == 0 and bounds.radius(0.2, 1.0) == 0
    assert bounds.radius(0.9, 0.5) == pytest.approx(0.5 * bounds.radius(0.9, 1.0), rel=1e-11)
    assert bounds.radius(0.9, 1.0) <= stats.norm.ppf(0.9)


def test_two_class_radius():
    assert bounds.two_class_radius(0.8, 0.1, 0.5) == pytest.approx(0.5307931998, abs=1e-10)
    assert bounds.two_class_radius(0.8, 0.2, 0.5) == pytest.approx(0.4208106168, abs=1e-10)
    assert bounds.two_class_radius(0.3, 0.4, 0.5) == 0


@pytest.mark.parametrize(
    ("top", "second", "p"),
    [(60, 40, 0.05688793), (66, 34, 0.00178989), (67, 33, 0.00087372), (550, 450, 0.00173054), (600, 400, 2.728e-10)],
)
def test_predict_p_values(top, second, p):
    assert float(bounds.predict_p_value(top, second)) == pytest.approx(p, rel=1e-4)
    assert float(bounds.predict_p_value(top, second)) == pytest.approx(
        stats.binomtest(top, top + second).pvalue, rel=1e-9
    )


def test_least_samples():
    assert bounds.smallest_n_certify(0.001) == 10 and bounds.smallest_n_predict(0.001) == 11
    with pytest.raises(ValueError, match="use n of at least 10"):
        bounds.check_reach(9, 0.001)
    with pytest.raises(ValueError, match="use n of at least 11"):
        bounds.check_reach(10, 0.001, predict=True)
    bounds.check_reach(10, 0.001)
    bounds.check_reach(11, 0.001, predict=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.clopper_pearson_lower(5, 4, 0.1), "0 <= k <= n"),
        (lambda: bounds.clopper_pearson_lower(-1, 4, 0.1), "0 <= k <= n"),
        (lambda: bounds.clopper_pearson_lower(1.5, 4, 0.1), "whole numbers"),
        (lambda: bounds.clopper_pearson_lower(1, 4, 95), r"alpha must lie in \(0, 1\), got 95; did you mean 0.05"),
        (lambda: bounds.clopper_pearson_lower(1, 2**31, 0.1), "below 2"),
        (lambda: bounds.radius(1.0, 0.5), "p_a_lower"),
        (lambda: bounds.radius(0.9, 0.0), "sigma must be"),
        (lambda: bounds.radius(0.9, 64), "did you mean 0.251"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
