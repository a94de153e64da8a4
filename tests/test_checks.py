"""Checks of exercises: silent about nothing, loud only when strict."""

import math

import pytest
from scipy import stats

from smoothkit import checks


def right_radius(k, n, sigma, alpha):
    bound = stats.beta.ppf(alpha, k, n - k + 1) if k else 0.0
    return sigma * stats.norm.ppf(bound) if bound > 0.5 else 0.0


RIGHT = {
    checks.check_radius: right_radius,
    checks.check_samples_for_radius: lambda r, s, a: math.ceil(math.log(a) / stats.norm.logcdf(r / s)),
    checks.check_certified_accuracy: lambda y, p, radii, r: ((y == p) & (p != -1) & (radii >= r)).mean(),
}


@pytest.mark.parametrize("check", RIGHT, ids=lambda c: c.__name__)
def test_right_answers(check, capsys):
    check(RIGHT[check], strict=True)
    assert capsys.readouterr().out == "All cases right.\n"


@pytest.mark.parametrize("check", RIGHT, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda *_: 0.123, "gave 0.123, expected"), (lambda *_: None, "no answer yet"), (lambda: 1, "raised TypeError")],
)
def test_wrong_answers(check, answer, message, capsys):
    check(answer)
    assert message in capsys.readouterr().out
    with pytest.raises(AssertionError, match=message):
        check(answer, strict=True)


def test_the_traps_are_caught(capsys):
    two_sided = lambda k, n, s, a: right_radius(k, n, s, a / 2)  # noqa: E731
    counts_abstentions = lambda y, p, radii, r: ((y == p) & (radii >= r)).sum() / (p != -1).sum()  # noqa: E731
    strictly_above = lambda y, p, radii, r: ((y == p) & (radii > r)).mean()  # noqa: E731
    for check, answer in ((checks.check_radius, two_sided), (checks.check_certified_accuracy, counts_abstentions),
                          (checks.check_certified_accuracy, strictly_above)):  # fmt: skip
        check(answer)
        assert "Not yet" in capsys.readouterr().out
