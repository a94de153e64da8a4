"""Checks for the exercises of the notebooks.

A check prints the first case an answer gets wrong, or that all are right, and raises nothing; a solution
calls the same check with `strict=True`, so that running the notebook proves it.
"""

from collections.abc import Callable, Iterable

import numpy as np
from scipy.special import log_softmax, logsumexp, ndtr, ndtri

from smoothbook.sigma.memory import settle
from smoothkit.certify.bounds import clopper_pearson_lower, clopper_pearson_upper, radius, radius_cap
from smoothkit.types import ABSTAIN


def check_radius(answer: Callable[[int, int, float, float], float], *, strict: bool = False) -> None:
    """`answer(k, n, sigma, alpha)` is the certified radius of k votes in n; 0 where there is none."""
    cases = [
        (990, 1000, 0.25, 0.001), (600, 1000, 0.25, 0.001), (1000, 1000, 0.5, 0.001), (500, 1000, 0.25, 0.001),
        (0, 10, 1.0, 0.05),
    ]  # fmt: skip
    _check(answer, lambda k, n, sigma, alpha: float(radius(clopper_pearson_lower(k, n, alpha), sigma)), cases, strict)


def check_samples_for_radius(answer: Callable[[float, float, float], int], *, strict: bool = False) -> None:
    """`answer(r, sigma, alpha)` is the fewest samples whose unanimous vote certifies radius r."""
    _check(answer, _fewest, [(0.5, 0.25, 0.001), (0.25, 0.25, 0.001), (1.0, 0.5, 0.05)], strict)


def _fewest(r: float, sigma: float, alpha: float) -> int:
    n = 1
    while radius_cap(n, alpha, sigma) < r:
        n += 1
    return n


def check_upper_limit(answer: Callable[[int, int, float], float], *, strict: bool = False) -> None:
    """`answer(k, m, alpha)` is the largest success rate that k successes of m leave possible, at level alpha."""
    cases = [(0, 40, 0.05), (0, 1_000, 0.05), (3, 100, 0.01), (7, 7, 0.05)]
    _check(answer, lambda *case: float(clopper_pearson_upper(*case)), cases, strict)


def check_certified_accuracy(answer: Callable, *, strict: bool = False) -> None:
    """`answer(labels, predictions, radii, r)` is the certified accuracy at radius r over all inputs."""
    labels, predictions = np.array([3, 1, 4, 1, 5]), np.array([3, 1, ABSTAIN, 2, 5])
    radii = np.array([0.5, 0.2, 0.0, 0.9, 0.5])
    shares = {0.0: 0.6, 0.2: 0.6, 0.3: 0.4, 0.5: 0.4, 0.8: 0.0}
    _check(answer, lambda *case: shares[case[-1]], [(labels, predictions, radii, r) for r in shares], strict)


def check_share_certified(answer: Callable, *, strict: bool = False) -> None:
    """`answer(votes, n, sigma, alpha, r)` is the share of images whose certified radius is at least r.

    `votes` holds the votes of each image's selected class among n.
    """
    votes = np.array([1000, 980, 870, 610, 500, 0])
    cases = [(votes, 1000, 0.25, 0.001, r) for r in (0.05, 0.25, 0.5, 0.7)]
    cases += [(votes, 1000, 0.5, 0.3, 0.6), (votes, 1000, 0.25, 0.3, 0.65)]
    _check(answer, _share_certified, cases, strict)


def _share_certified(votes: np.ndarray, n: int, sigma: float, alpha: float, r: float) -> float:
    return float((radius(clopper_pearson_lower(votes, n, alpha), sigma) >= r).mean())


def check_off_the_line(answer: Callable[[np.ndarray, np.ndarray], float], *, strict: bool = False) -> None:
    """`answer(direction, step)` is how far the step leads away from the line along the direction."""
    pairs = [([2.0, 0.0], [3.0, 4.0]), ([1.0, 1.0, 0.0], [1.0, -1.0, 2.0]), ([0.0, 3.0], [0.0, -5.0])]
    _check(answer, _off_the_line, [tuple(map(np.array, pair)) for pair in pairs], strict)


def _off_the_line(direction: np.ndarray, step: np.ndarray) -> float:
    along = direction / np.linalg.norm(direction)
    return float(np.linalg.norm(step - (step @ along) * along))


LOGITS = (  # of a few noisy copies of one image
    np.array([[2.0, 0.0, -1.0], [1.0, 0.5, 0.0]]),
    np.array([[1.0, 0.0], [0.0, 1.0]]),
    np.array([[60.0, -60.0, 0.0], [-60.0, 60.0, 0.0], [0.0, 0.0, 0.0]]),
)


def check_soft_smoothed_loss(answer: Callable[[np.ndarray, int], float], *, strict: bool = False) -> None:
    """`answer(logits, label)` is the attacker's objective of SmoothAdv, from the logits [m, K] of m noisy copies."""
    _check(answer, _soft_smoothed_loss, [(logits, label) for logits in LOGITS for label in (0, 1)], strict)


def _soft_smoothed_loss(logits: np.ndarray, label: int) -> float:
    return float(np.log(len(logits)) - logsumexp(log_softmax(logits, axis=1)[:, label]))


def check_consistency(answer: Callable[[np.ndarray], float], *, strict: bool = False) -> None:
    """`answer(logits)` is the mean divergence KL(mean || each) of m noisy copies, from their logits [m, K]."""
    _check(answer, _consistency, [(logits,) for logits in LOGITS], strict)


def _consistency(logits: np.ndarray) -> float:
    log_each = log_softmax(logits, axis=1)
    log_mean = logsumexp(log_each, axis=0) - np.log(len(logits))
    return float((np.exp(log_mean) * (log_mean - log_each)).sum(axis=1).mean())


def check_slab_radius(answer: Callable[[float], float], *, strict: bool = False) -> None:
    """`answer(sigma)` is the radius that can be certified at 0 for the class |u| < 1 on a line; 0 where there is none."""
    _check(answer, _slab_radius, [(sigma,) for sigma in (0.25, 0.5, 0.75, 1.0, 1.4, 1.6, 3.0)], strict)


def _slab_radius(sigma: float) -> float:
    return max(0.0, float(sigma * ndtri(2 * ndtr(1 / sigma) - 1)))


BALLS = ((0.0, 0, 1.0), (3.0, 1, 1.5))  # x, label, radius on a line


def check_memory_radius(answer: Callable, *, strict: bool = False) -> None:
    """`answer(x, label, radius, balls)` is the radius a memory on a line keeps for x; `balls` holds (x, label, radius)."""
    questions = [
        (1.2, 0, 0.8), (0.4, 0, 0.5), (2.5, 0, 0.25), (2.0, 0, 0.9), (0.9, 1, 0.5), (-3.0, 1, 1.0), (-3.0, 1, 4.0),
    ]  # fmt: skip
    _check(answer, _memory_radius, [(*question, BALLS) for question in questions], strict)


def _memory_radius(x: float, label: int, radius: float, balls: Iterable[tuple[float, int, float]]) -> float:
    points, labels, radii = (np.array(column) for column in zip(*balls, strict=True))
    x32, points32 = np.array([x], dtype=np.float32), points.astype(np.float32)[:, None]
    return settle(x32, label, radius, points32, labels, radii).radius


def check_prototype_margin(answer: Callable, *, strict: bool = False) -> None:
    """`answer(x, near, far)` is the distance from x to the points that are as near to `far` as to `near`."""
    points = [
        ([1.0, 0.0], [0.0, 0.0], [4.0, 0.0]),
        ([0.2, 0.7], [0.0, 1.0], [1.0, 0.0]),
        ([0.5] * 4, [0.4] * 4, [0.9] * 4),
    ]
    _check(answer, _prototype_margin, [tuple(map(np.array, row)) for row in points], strict)


def _prototype_margin(x: np.ndarray, near: np.ndarray, far: np.ndarray) -> float:
    return float((((x - far) ** 2).sum() - ((x - near) ** 2).sum()) / (2 * np.linalg.norm(near - far)))


def check_alpha_bar(answer: Callable[[float], float], *, strict: bool = False) -> None:
    """`answer(sigma)` is the abar_t of a diffusion model on [-1, 1] that noise of sigma on [0, 1] stands for."""
    _check(answer, lambda sigma: 1 / (1 + 4 * sigma**2), [(sigma,) for sigma in (0.12, 0.25, 0.5, 1.0)], strict)


def check_clean_pixel(answer: Callable[[float, float, float], float], *, strict: bool = False) -> None:
    """`answer(x, epsilon, alpha_bar)` is the clean pixel on [0, 1] from x_t and the predicted noise."""
    _check(answer, _clean_pixel, [(0.7, 0.9, 0.8), (-0.3, -0.6, 0.5), (0.1, 0.0, 0.2)], strict)


def _clean_pixel(x: float, epsilon: float, alpha_bar: float) -> float:
    return float(((x - np.sqrt(1 - alpha_bar) * epsilon) / np.sqrt(alpha_bar) + 1) / 2)


def check_two_scales(answer: Callable[[float, float, float, float], float], *, strict: bool = False) -> None:
    """`answer(lower, upper, small, large)` is the radius of a cascade of two sigmas that halts at the smaller one.

    `lower` bounds its class there from below, `upper` every other class at the larger sigma from above; 0 where
    nothing is proved.
    """
    cases = [
        (0.99, 0.3, 0.25, 0.5), (0.99, 0.45, 0.25, 0.5), (0.6, 0.01, 0.25, 1.0), (0.9, 0.52, 0.25, 0.5),
        (0.4, 0.1, 0.5, 1.0),
    ]  # fmt: skip
    _check(answer, _two_scales, cases, strict)


def _two_scales(lower: float, upper: float, small: float, large: float) -> float:
    return float(max(0.0, min(small * ndtri(lower), -large * ndtri(upper))))


def check_alpha_share(answer: Callable[[float, int], float], *, strict: bool = False) -> None:
    """`answer(alpha, scales)` is what each bound may fail with, a lower and an upper one for every scale."""
    _check(answer, lambda alpha, scales: alpha / (2 * scales), [(0.001, 3), (0.05, 2)], strict)


def check_native_radius(answer: Callable[[float, int, int], float], *, strict: bool = False) -> None:
    """`answer(radius, small, large)` is what a radius on bilinearly enlarged images proves at the native size."""
    _check(answer, _native_radius, [(0.5, 32, 224), (1.0, 8, 32), (0.3, 32, 32)], strict)


def _native_radius(radius: float, small: int, large: int) -> float:
    centres = ((np.arange(large) + 0.5) * small / large - 0.5).clip(0, small - 1)
    # the bilinear resize in one dimension, [large, small]
    weights = np.maximum(0.0, 1 - np.abs(centres[:, None] - np.arange(small)))
    return radius / float(np.linalg.norm(weights, 2)) ** 2


def check_pixel_radius(answer: Callable[[float, tuple], float], *, strict: bool = False) -> None:
    """`answer(radius, std)` is what a radius with noise after the normalisation proves in pixels."""
    cases = [(1.0, (0.25,)), (0.5, (0.247, 0.243, 0.262)), (2.0, (1.0, 1.0, 1.0))]
    _check(answer, lambda radius, std: radius * min(std), cases, strict)


def check_noise_left(answer: Callable[[float, float], float], *, strict: bool = False) -> None:
    """`answer(sigma, m)` is the noise level after mixup with weights m and 1 - m."""
    _check(answer, lambda sigma, m: sigma * np.hypot(m, 1 - m), [(0.5, 1.0), (0.5, 0.5), (0.25, 0.2)], strict)


def check_count_trainings(answer: Callable[[int, int, bool], int], *, strict: bool = False) -> None:
    """`answer(tasks, levels, one_model)` is the number of trainings, with one pretraining that all share."""
    cases = [(1, 3, True), (1, 3, False), (10, 3, True), (10, 3, False)]
    _check(answer, lambda tasks, levels, one_model: 1 + tasks * (1 if one_model else levels), cases, strict)


def _check(answer: Callable, right: Callable, cases: Iterable[tuple], strict: bool) -> None:
    """Say of the first case in which `answer` and `right` differ, or that all agree."""
    wrong = next(filter(None, (_wrong(answer, right, case) for case in cases)), "")
    if wrong and strict:
        raise AssertionError(wrong)
    print(f"Not yet: {wrong}" if wrong else "All cases right.")


def _wrong(answer: Callable, right: Callable, case: tuple) -> str:
    """What is wrong with one case, or nothing."""
    shown = ", ".join(str(a.tolist() if isinstance(a, np.ndarray) else a) for a in case)
    expected = right(*case)
    try:
        got = answer(*case)
    except Exception as error:
        return f"answer({shown}) raised {type(error).__name__}: {error}"
    if got is None or got is Ellipsis:
        return "no answer yet: replace the dots"
    if not np.isscalar(got) or not np.isclose(float(got), expected, rtol=1e-6, atol=1e-9):
        return f"answer({shown}) gave {got}, expected {expected:.6g}"
    return ""
