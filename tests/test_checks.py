"""Checks of exercises: silent about nothing, loud only when strict."""

import math

import numpy as np
import pytest
from scipy import special, stats

from smoothkit import checks


def right_radius(k, n, sigma, alpha):
    bound = stats.beta.ppf(alpha, k, n - k + 1) if k else 0.0
    return sigma * stats.norm.ppf(bound) if bound > 0.5 else 0.0


def right_consistency(logits):
    p = special.softmax(logits, axis=1)
    return np.mean([stats.entropy(p.mean(0), each) for each in p])


RIGHT = {
    checks.check_radius: right_radius,
    checks.check_samples_for_radius: lambda r, s, a: math.ceil(math.log(a) / stats.norm.logcdf(r / s)),
    checks.check_certified_accuracy: lambda y, p, radii, r: ((y == p) & (p != -1) & (radii >= r)).mean(),
    checks.check_soft_smoothed_loss: lambda logits, y: -np.log(special.softmax(logits, axis=1)[:, y].mean()),
    checks.check_consistency: right_consistency,
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


def test_the_traps_of_training_are_caught(capsys):
    """The mean of logs in place of the log of the mean, and the divergence the other way round; numbers of the note."""
    mean_of_logs = lambda logits, y: -special.log_softmax(logits, axis=1)[:, y].mean()  # noqa: E731
    assert mean_of_logs(checks.LOGITS[0], 0) == pytest.approx(0.4250578451)
    assert checks._soft_smoothed_loss(checks.LOGITS[0], 0) == pytest.approx(0.3928388122)
    assert checks._consistency(checks.LOGITS[0]) == pytest.approx(0.0756631103)
    assert checks._consistency(checks.LOGITS[1]) == pytest.approx(0.1201145070)
    other_way = lambda logits: np.mean(  # noqa: E731
        [stats.entropy(each, special.softmax(logits, axis=1).mean(0)) for each in special.softmax(logits, axis=1)]
    )
    for check, answer in ((checks.check_soft_smoothed_loss, mean_of_logs), (checks.check_consistency, other_way)):
        check(answer)
        assert "Not yet" in capsys.readouterr().out
