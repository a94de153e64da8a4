"""Checks for the exercises of the notebooks.

A check prints the first case an answer gets wrong, or that all are right, and raises nothing; a solution
calls the same check with `strict=True`, so that running the notebook proves it.
"""

from collections.abc import Callable, Iterable

import numpy as np
from scipy.special import log_softmax, logsumexp

from smoothkit.bounds import clopper_pearson_lower, radius, radius_cap
from smoothkit.types import ABSTAIN


def check_radius(answer: Callable[[int, int, float, float], float], *, strict: bool = False) -> None:
    """`answer(k, n, sigma, alpha)` is the certified radius of k votes in n; 0 where there is none."""
    cases = [
        (990, 1000, 0.25, 0.001),
        (600, 1000, 0.25, 0.001),
        (1000, 1000, 0.5, 0.001),
        (500, 1000, 0.25, 0.001),
        (0, 10, 1.0, 0.05),
    ]
    return _numbers(
        answer,
        [(case, float(radius(clopper_pearson_lower(case[0], case[1], case[3]), case[2]))) for case in cases],
        strict,
    )


def check_samples_for_radius(answer: Callable[[float, float, float], int], *, strict: bool = False) -> None:
    """`answer(r, sigma, alpha)` is the fewest samples whose unanimous vote certifies radius r."""
    cases = [(0.5, 0.25, 0.001), (0.25, 0.25, 0.001), (1.0, 0.5, 0.05)]
    return _numbers(answer, [(case, _fewest(*case)) for case in cases], strict)


def _fewest(r: float, sigma: float, alpha: float) -> int:
    n = 1
    while radius_cap(n, alpha, sigma) < r:
        n += 1
    return n


def check_certified_accuracy(answer: Callable, *, strict: bool = False) -> None:
    """`answer(labels, predictions, radii, r)` is the certified accuracy at radius r over all inputs."""
    labels, predictions, radii = (
        np.array([3, 1, 4, 1, 5]),
        np.array([3, 1, ABSTAIN, 2, 5]),
        np.array([0.5, 0.2, 0.0, 0.9, 0.5]),
    )
    cases = [
        ((labels, predictions, radii, r), share)
        for r, share in ((0.0, 0.6), (0.2, 0.6), (0.3, 0.4), (0.5, 0.4), (0.8, 0.0))
    ]
    return _numbers(answer, cases, strict)


LOGITS = (  # of a few noisy copies of one image
    np.array([[2.0, 0.0, -1.0], [1.0, 0.5, 0.0]]),
    np.array([[1.0, 0.0], [0.0, 1.0]]),
    np.array([[60.0, -60.0, 0.0], [-60.0, 60.0, 0.0], [0.0, 0.0, 0.0]]),
)


def check_soft_smoothed_loss(answer: Callable[[np.ndarray, int], float], *, strict: bool = False) -> None:
    """`answer(logits, label)` is the attacker's objective of SmoothAdv, from the logits [m, K] of m noisy copies."""
    cases = [((logits, label), _soft_smoothed_loss(logits, label)) for logits in LOGITS for label in (0, 1)]
    return _numbers(answer, cases, strict)


def _soft_smoothed_loss(logits: np.ndarray, label: int) -> float:
    return float(np.log(len(logits)) - logsumexp(log_softmax(logits, axis=1)[:, label]))


def check_consistency(answer: Callable[[np.ndarray], float], *, strict: bool = False) -> None:
    """`answer(logits)` is the mean divergence KL(mean || each) of m noisy copies, from their logits [m, K]."""
    return _numbers(answer, [((logits,), _consistency(logits)) for logits in LOGITS], strict)


def _consistency(logits: np.ndarray) -> float:
    log_each = log_softmax(logits, axis=1)
    log_mean = logsumexp(log_each, axis=0) - np.log(len(logits))
    return float((np.exp(log_mean) * (log_mean - log_each)).sum(axis=1).mean())


def _numbers(answer: Callable, cases: Iterable[tuple[tuple, float]], strict: bool) -> None:
    for arguments, expected in cases:
        shown = ", ".join(str(a.tolist() if isinstance(a, np.ndarray) else a) for a in arguments)
        try:
            got = answer(*arguments)
        except Exception as error:
            return _wrong(f"answer({shown}) raised {type(error).__name__}: {error}", strict)
        if got is None or got is Ellipsis:
            return _wrong("no answer yet: replace the dots", strict)
        if not np.isscalar(got) or not np.isclose(float(got), expected, rtol=1e-6, atol=1e-9):
            return _wrong(f"answer({shown}) gave {got}, expected {expected:.6g}", strict)
    print("All cases right.")


def _wrong(what: str, strict: bool) -> None:
    if strict:
        raise AssertionError(what)
    print(f"Not yet: {what}")
