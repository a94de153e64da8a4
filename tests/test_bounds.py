"""Bounds and radii: never too large, and equal to golden values."""

import mpmath
import numpy as np
import pytest
from scipy import stats

from smoothkit import bounds

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


def exact_tail(k: int, n: int, p: float) -> mpmath.mpf:
    """P(Bin(n, p) >= k), all terms positive."""
    p = mpmath.mpf(p)
    return mpmath.fsum(mpmath.binomial(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-6])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 313])
def test_lower_bound_is_never_above_the_exact_one(n, alpha):
    """The exact bound solves P_p(Bin >= k) = alpha, and that tail grows with p: at our bound it is at most alpha."""
    with mpmath.workdps(40):
        for k in sorted({1, 2, n // 2, n - 2, n - 1, n} & set(range(1, n + 1))):
            lower = float(bounds.clopper_pearson_lower(k, n, alpha))
            assert exact_tail(k, n, lower) <= alpha
            assert exact_tail(k, n, min(1.0, lower * (1 + 4e-12))) >= alpha  # and tight
            upper = float(bounds.clopper_pearson_upper(n - k, n, alpha))  # the mirror image
            assert exact_tail(k, n, 1 - mpmath.mpf(upper)) <= alpha
            assert upper <= (1 - lower) + 4e-12


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
