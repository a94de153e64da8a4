"""Checks of exercises: silent about nothing, loud only when strict."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from smoothbook.runner import exercises as checks


def right_radius(k, n, sigma, alpha):
    bound = stats.beta.ppf(alpha, k, n - k + 1) if k else 0.0
    return sigma * stats.norm.ppf(bound) if bound > 0.5 else 0.0


def right_consistency(logits):
    p = special.softmax(logits, axis=1)
    return np.mean([stats.entropy(p.mean(0), each) for each in p])


def right_memory_radius(x, label, radius, balls):
    room = [r - abs(x - z) for z, c, r in balls if c != label and abs(x - z) < r]
    if room:
        return min(radius, max(room))
    return max(0.0, min([radius, *(abs(x - z) - r for z, c, r in balls if c != label)]))


def operator_norm(small, large):
    """Of torch's bilinear resize, as notebook 21 computes it."""
    eye = torch.eye(small, dtype=torch.float64)[:, None]
    matrix = torch.nn.functional.interpolate(eye, large, mode="linear", align_corners=False)[:, 0]
    return float(torch.linalg.svdvals(matrix).max()) ** 2


RIGHT = {
    checks.check_radius: right_radius,
    checks.check_samples_for_radius: lambda r, s, a: math.ceil(math.log(a) / stats.norm.logcdf(r / s)),
    checks.check_upper_limit: lambda k, m, a: stats.beta.ppf(1 - a, k + 1, m - k) if k < m else 1.0,
    checks.check_certified_accuracy: lambda y, p, radii, r: ((y == p) & (p != -1) & (radii >= r)).mean(),
    checks.check_soft_smoothed_loss: lambda logits, y: -np.log(special.softmax(logits, axis=1)[:, y].mean()),
    checks.check_consistency: right_consistency,
    checks.check_slab_radius: lambda s: max(0.0, s * stats.norm.ppf(2 * stats.norm.cdf(1 / s) - 1)),
    checks.check_memory_radius: right_memory_radius,
    checks.check_alpha_bar: lambda s: 1 / (1 + (2 * s) ** 2),
    checks.check_clean_pixel: lambda x, e, a: 0.5 + (x - math.sqrt(1 - a) * e) / math.sqrt(a) / 2,
    checks.check_two_scales: lambda lower, upper, small, large: max(
        0.0, min(small * stats.norm.ppf(lower), large * stats.norm.isf(upper))
    ),
    checks.check_alpha_share: lambda alpha, scales: alpha / scales / 2,
    checks.check_native_radius: lambda radius, small, large: radius / operator_norm(small, large),
    checks.check_pixel_radius: lambda radius, std: radius * min(std),
    checks.check_noise_left: lambda sigma, m: math.sqrt((m * sigma) ** 2 + ((1 - m) * sigma) ** 2),
    checks.check_count_trainings: lambda tasks, levels, one: 1 + tasks if one else 1 + tasks * levels,
    checks.check_prototype_margin: lambda x, near, far: (far - near) @ ((near + far) / 2 - x) / math.dist(near, far),
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


def test_the_traps_of_a_sigma_for_each_input_are_caught(capsys):
    """Worked values of the note; the ball that is not shrunk, and the margin of half the difference of distances."""
    assert [round(checks._slab_radius(s), 6) for s in (0.25, 0.5, 0.75, 1.0)] == [
        0.958204,
        0.845072,
        0.679629,
        0.475233,
    ]
    assert checks._memory_radius(1.2, 0, 0.8, checks.BALLS) == pytest.approx(0.3)
    assert checks._prototype_margin(np.array([1.0, 0.0]), np.zeros(2), np.array([4.0, 0.0])) == 1.0
    not_shrunk = lambda x, label, radius, balls: radius  # noqa: E731
    half = lambda x, near, far: (math.dist(x, far) - math.dist(x, near)) / 2  # noqa: E731
    for check, answer in ((checks.check_memory_radius, not_shrunk), (checks.check_prototype_margin, half)):
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


def test_noise_left_after_mixup_is_that_of_many_draws():
    a, b = np.random.default_rng(0).standard_normal((2, 200_000))
    for sigma, m in ((0.5, 1.0), (0.5, 0.5), (0.25, 0.2)):
        assert (sigma * (m * a + (1 - m) * b)).std() == pytest.approx(sigma * math.hypot(m, 1 - m), rel=0.01)


def test_enlarging_bilinearly_lengthens_a_change_as_many_times_as_the_side():
    assert 0.5 / checks._native_radius(0.5, 32, 224) == pytest.approx(7, rel=1e-3)
    assert 1.0 / checks._native_radius(1.0, 8, 32) == pytest.approx(4, rel=1e-3)
