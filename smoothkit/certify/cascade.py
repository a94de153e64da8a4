"""Several noise scales in one smoothed classifier: the cascade, its certificate, and the best of all scales.

Everything here is a function of counts. With P_k(x)[c] the chance that the base classifier says c on x plus noise of
sigma_k, the cascade asks the largest scale first, answers with the first class whose probability exceeds p0, and
abstains if no scale has one. It answers y within the radius R(k, y) around x, for any scale k:

    R_k   = sigma_k (Phi^-1(P_k[y]) - Phi^-1(p0))                        y keeps its majority at scale k
    R_neg = min over j > k, c != y of sigma_j (Phi^-1(p0) - Phi^-1(P_j[c]))    no larger scale says anything else
    R(k, y) = min(R_k, R_neg)

because each Phi^-1(P_j[c]) is 1/sigma_j-Lipschitz: within the radius a larger scale can only pass on or say y, and
scale k says y at the latest. It needs p0 >= 1/2, so that no second class can exceed p0 beside y. The published
rule takes the scale at which the cascade halts; the largest R(k, y) over all k is proved by the same words.

References
----------
Jeong and Shin, "Multi-scale Diffusion Denoised Smoothing", NeurIPS 2023. arXiv:2310.16779.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import special

from smoothkit.certify.bounds import OUTWARD, clopper_pearson_lower, clopper_pearson_upper
from smoothkit.types import ABSTAIN, check_alpha, check_sigma

RULES = ("max", "cascade", "released")
UPPER = ("classes", "runner-up")
NO_SCALE = -1


# --- the theorem, for known probabilities ------------------------------------------------------------


def cascade_classes(probabilities: np.ndarray, *, p0: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """What the cascade answers where the class probabilities of every scale are known.

    Parameters
    ----------
    probabilities : float array [..., K, num_classes]
        Row k belongs to the k-th smallest sigma.
    p0 : float in [1/2, 1)

    Returns
    -------
    classes, scales : int64 arrays [...]
        The class (ABSTAIN where no scale has one above p0) and the scale halted at (NO_SCALE = -1 if none).
    """
    check_p0(p0)
    return _classes(np.asarray(probabilities, dtype=np.float64), p0)


def cascade_radii(lower: np.ndarray, upper: np.ndarray, *, sigmas: Sequence[float], p0: float = 0.5) -> np.ndarray:
    """R(k, y) of every scale and class, from bounds on the class probabilities of every scale.

    Parameters
    ----------
    lower, upper : float arrays [..., K, num_classes]
        Bounds on P_k(x)[c] that hold together; the probabilities themselves where they are known.
    sigmas : K floats, increasing, pixel units on [0, 1]
    p0 : float in [1/2, 1)

    Returns
    -------
    float64 array [..., K, num_classes], rounded down, in the units of sigma: no perturbation shorter than
    R(k, y) keeps the cascade from answering y; 0 where nothing is proved.

    Raises
    ------
    ValueError
        For p0 below 1/2, where the statement is false, or sigmas that do not increase.
    """
    check_p0(p0)
    sigmas = check_sigmas(sigmas)
    lower, upper = np.broadcast_arrays(np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64))
    if lower.ndim < 2 or lower.shape[-2] != len(sigmas):
        raise ValueError(f"bounds must have shape [..., {len(sigmas)}, num_classes], got {lower.shape}")
    return _radii(lower, upper, sigmas, p0)


def _classes(probabilities: np.ndarray, p0: float) -> tuple[np.ndarray, np.ndarray]:
    scales = _largest_true(probabilities.max(axis=-1) > p0)
    top = np.take_along_axis(probabilities.argmax(axis=-1), np.maximum(scales, 0)[..., None], axis=-1)[..., 0]
    return np.where(scales == NO_SCALE, ABSTAIN, top), scales


def _radii(lower: np.ndarray, upper: np.ndarray, sigmas: np.ndarray, p0: float) -> np.ndarray:
    scales, classes = lower.shape[-2:]
    others = np.stack([np.delete(upper, y, axis=-1).max(axis=-1, initial=0.0) for y in range(classes)], axis=-1)
    negative = _gap(p0, others, sigmas[:, None])  # [..., K, num_classes]: of scale j for the class y
    own = _gap(lower, p0, sigmas[:, None])
    return np.stack(
        [np.minimum(own[..., k, :], negative[..., k + 1 :, :].min(axis=-2, initial=np.inf)) for k in range(scales)],
        axis=-2,
    )


def _gap(high: np.ndarray | float, low: np.ndarray | float, sigma: np.ndarray) -> np.ndarray:
    """sigma (Phi^-1(high) - Phi^-1(low)), rounded down; 0 where it is not positive.

    With low = 1/2 it is `bounds.radius`, to the last bit. A difference of two quantiles keeps the error of the smaller.
    """
    z_high, z_low = special.ndtri(high), special.ndtri(low)
    with np.errstate(invalid="ignore"):
        exact = sigma * (z_high - z_low)
        down = exact * (1 - OUTWARD) - 2 * OUTWARD * sigma * np.minimum(np.abs(z_high), np.abs(z_low))
    down = np.where(np.isposinf(exact), exact, np.nextafter(down, 0.0))
    return np.maximum(0.0, np.nan_to_num(down, nan=0.0, posinf=np.inf, neginf=-np.inf))


def _largest_true(holds: np.ndarray) -> np.ndarray:
    """The last index along the last axis at which it holds; NO_SCALE where it never does."""
    last = holds.shape[-1] - 1 - holds[..., ::-1].argmax(axis=-1)
    return np.where(holds.any(axis=-1), last, NO_SCALE)


# --- from counts -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class CascadeCertificates:
    """What the counts of several scales prove, one entry an image; K scales, by increasing sigma.

    `predict` is a class or ABSTAIN (with radius 0); `radius` is in the units of sigma. `scale` is the scale the
    certificate rests on, and for the rules that halt also the one halted at, NO_SCALE if none. `reason` is

    - `certified`
    - `contested`: a class is above p0 at `scale`, but at a larger scale another class may be as well
    - `undecided`: no class is proved to be above p0 (rule `released`: not at `scale`, where it stops)
    - `passed`: rule `released` only, every scale was proved to be below p0

    `classes` and `radii` hold the guessed class of each scale and what R(k, class) is proved there, so that rules can
    be compared on one set of bounds; for `released` those of each scale with its own share of alpha.
    """

    predict: np.ndarray  # int64 [...]
    radius: np.ndarray  # float64 [...]
    scale: np.ndarray  # int64 [...]
    reason: np.ndarray  # str [...]
    classes: np.ndarray  # int64 [..., K]
    radii: np.ndarray  # float64 [..., K]
    own: np.ndarray  # float64 [..., K], R_k
    negative: np.ndarray  # float64 [..., K], R_neg; infinite at the largest scale


def alpha_per_statement(alpha: float, scales: int) -> float:
    """What each of the statements about K scales may fail with so that all hold with probability 1 - alpha.

    A lower bound and a family of upper bounds for every scale make 2K statements. With one scale there is nothing
    to exclude, and its lower bound has the whole of alpha.
    """
    check_alpha(alpha)
    if scales < 1:
        raise ValueError(f"scales must be at least 1, got {scales}")
    share = alpha if scales == 1 else alpha / (2 * scales)
    check_alpha(share, f"alpha={alpha:g} shared among {scales} scales")
    return share


def certify_cascade(
    selection: np.ndarray,
    estimation: np.ndarray,
    *,
    n: np.ndarray | int,
    sigmas: Sequence[float],
    alpha: float,
    p0: float = 0.5,
    rule: str = "max",
    upper: str = "runner-up",
) -> CascadeCertificates:
    """Certify the cascade from the counts of every scale.

    The class of each scale is guessed on `selection`; bounds come from `estimation`, separate draws.

    Parameters
    ----------
    selection, estimation : int arrays [..., K, num_classes]
        Row k holds the counts at the k-th smallest sigma.
    n : int or int array, broadcast to [..., K]
        Estimation samples, those without a vote included. A scale with 0 was not asked: it proves nothing and excludes
        nothing. `cascade` and `released` do without the scales below the one they halt at (`certify.scales`).
    sigmas : K floats, increasing, pixel units on [0, 1]
    alpha : float
        Chance, over the sampling, that the certificate of an image is wrong; in (0, 1).
    p0 : float in [1/2, 1)
    rule : str
        `max` takes the largest R(k, class of k) of all scales, and needs all of them sampled. `cascade` takes the
        largest scale whose class is proved to be above p0. Both give every statement alpha / (2K), so that all hold
        at once, whichever is used afterwards. `released` is the rule of the published code with exact bounds: the
        s-th scale from the top has alpha / s, and a scale neither proved above nor below p0 ends in abstention. Each
        stage alone keeps alpha, but the stage is chosen by the same counts, so the whole is proved for K alpha only.
    upper : str
        What an upper bound on the other classes of a scale costs. `runner-up`: only the likeliest of them need be
        bounded. Which one that is, is no matter of chance, and the bound of the largest count is at least its own, so one
        statement is enough for a guessed class y; two serve every y, as the likeliest class but y is the likeliest of all,
        or the second where y is that. `classes`: equal shares for all classes, whose bounds then hold at once; looser.

    Returns
    -------
    CascadeCertificates, of arrays [...]

    Raises
    ------
    ValueError
        For p0 below 1/2, sigmas that do not increase, shapes that do not fit, or an unknown rule.
    """
    check_p0(p0)
    check_alpha(alpha)
    sigmas = check_sigmas(sigmas)
    for name, value, known in (("rule", rule, RULES), ("upper", upper, UPPER)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    selection, estimation, n = _check_counts(selection, estimation, n, len(sigmas))
    certify = _released if rule == "released" else _all_at_once
    return certify(selection, estimation, n, sigmas, alpha, p0, rule, upper)


def _all_at_once(selection, estimation, n, sigmas, alpha, p0, rule, upper) -> CascadeCertificates:
    scales, num_classes = estimation.shape[-2:]
    a = alpha_per_statement(alpha, scales)
    asked = n > 0
    classes = np.where(asked, selection.argmax(axis=-1), ABSTAIN)  # [..., K]
    n = np.maximum(n, 1)  # for a bound that says nothing
    own = np.where(asked, _gap(clopper_pearson_lower(_take(estimation, classes), n, a), p0, sigmas), 0.0)
    # how many upper bounds at a scale must hold at once: to exclude all but one known class, or all but any class
    for_one_class, for_any_class = (
        (num_classes - 1, num_classes) if upper == "classes" else (min(1, num_classes - 1), 2)
    )
    negative = np.full(own.shape, np.inf)
    for j in range(1, scales):
        # the guesses do not depend on the estimation samples; if all smaller scales guess one class, its votes need no bound.
        # a scale not asked has no guess, so it agrees with none: stopping early never proves more than asking all scales
        agree = (classes[..., :j] == classes[..., :1]).all(axis=-1)
        for k in range(j):
            most = _most_of_others(estimation[..., j, :], classes[..., k])
            up_for_one, up_for_any = (_upper_bound(most, n[..., j], a, m) for m in (for_one_class, for_any_class))
            up = np.where(asked[..., j], np.where(agree, up_for_one, up_for_any), 1.0)
            negative[..., k] = np.minimum(negative[..., k], _gap(p0, up, sigmas[j]))
    radii = np.minimum(own, negative)
    halted = _largest_true(own > 0)
    best = scales - 1 - radii[..., ::-1].argmax(axis=-1)  # of equal ones the largest scale
    scale = np.where(radii.max(axis=-1) > 0, best, halted) if rule == "max" else halted
    radius = at_scale(radii, scale)
    reason = np.where(radius > 0, "certified", np.where(scale == NO_SCALE, "undecided", "contested"))
    predict = np.where(radius > 0, at_scale(classes, scale), ABSTAIN)
    return CascadeCertificates(predict, radius, scale, reason, classes, radii, own, negative)


def _released(selection, estimation, n, sigmas, alpha, p0, rule, upper) -> CascadeCertificates:
    scales, num_classes = estimation.shape[-2:]
    asked, n = n > 0, np.maximum(n, 1)
    classes = selection.argmax(axis=-1)
    n_a = _take(estimation, classes)
    own, negative = np.zeros(n_a.shape), np.full(n_a.shape, np.inf)
    halts, stops = np.zeros(n_a.shape, dtype=bool), np.zeros(n_a.shape, dtype=bool)
    for k in range(scales):
        a = alpha / (scales - k)  # as many statements as scales have been asked
        lower = clopper_pearson_lower(n_a[..., k], n[..., k], a)
        halts[..., k] = lower >= p0
        stops[..., k] = asked[..., k] & (clopper_pearson_upper(n_a[..., k], n[..., k], a) >= p0)
        own[..., k] = _gap(lower, p0, sigmas[k])
        for j in range(k + 1, scales):
            most = _most_of_others(estimation[..., j, :], classes[..., k])
            share = num_classes - 1 if upper == "classes" else min(1, num_classes - 1)
            up = np.where(asked[..., j], _upper_bound(most, n[..., j], a, share), 1.0)
            negative[..., k] = np.minimum(negative[..., k], _gap(p0, up, sigmas[j]))
    radii = np.minimum(own, negative)
    scale = _largest_true(stops)  # whoever halts stops
    radius = np.where(at_scale(halts, scale), at_scale(radii, scale), 0.0)
    reason = np.select(
        [scale == NO_SCALE, ~at_scale(halts, scale), radius > 0], ["passed", "undecided", "certified"], "contested"
    )
    predict = np.where(radius > 0, at_scale(classes, scale), ABSTAIN)
    return CascadeCertificates(predict, radius, scale, reason, classes, radii, own, negative)


def _upper_bound(k: np.ndarray, n: np.ndarray, a: float, share: int) -> np.ndarray:
    """Upper bounds at a / share; with no other class (share 0) the chance is 0."""
    return clopper_pearson_upper(k, n, a / share) if share else np.zeros(k.shape)


def _most_of_others(counts: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The largest count of a class but the given one; counts [..., num_classes], classes [...]."""
    return np.where(np.arange(counts.shape[-1]) == classes[..., None], 0, counts).max(axis=-1)


def _take(counts: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return np.take_along_axis(counts, classes[..., None], axis=-1)[..., 0]


def at_scale(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """values [..., K] at a scale [...]; 0 or False at NO_SCALE."""
    found = np.take_along_axis(values, np.maximum(scale, 0)[..., None], axis=-1)[..., 0]
    return np.where(scale == NO_SCALE, np.zeros((), values.dtype), found)


# --- from records ------------------------------------------------------------------------------------


# --- prediction without a certificate ----------------------------------------------------------------


def fast_predict(
    counts: np.ndarray, clean_logits: np.ndarray, *, n: np.ndarray | int, p0: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """The published fast prediction: few votes a scale as a prior on the unsmoothed classifier's answer.

    It accepts the largest scale whose top class has a share of at least p0 of the votes and returns the argmax of
    log softmax(clean logits) + log(0.9 votes / n + 0.1 / num_classes); where no scale is accepted, the clean answer.
    Nothing about it is certified, and its accuracy must not stand beside certified accuracy as if it were.

    Parameters
    ----------
    counts : int array [..., K, num_classes]
        Row k holds the votes at the k-th smallest sigma (200 a scale in the released code).
    clean_logits : float array [..., num_classes]
    n : int or int array, broadcast to [..., K]

    Returns
    -------
    classes, scales : int64 arrays [...]; NO_SCALE where no scale was accepted.
    """
    check_p0(p0)
    counts, logits = np.asarray(counts), np.asarray(clean_logits, dtype=np.float64)
    _, counts, n = _check_counts(counts, counts, n, counts.shape[-2] if counts.ndim > 1 else 1)
    if logits.shape != (*counts.shape[:-2], counts.shape[-1]):
        raise ValueError(f"clean_logits {logits.shape} do not fit counts {counts.shape}: [..., num_classes] is wanted")
    share = counts / n[..., None]
    scales = _largest_true(share.max(axis=-1) >= p0)
    accepted = np.take_along_axis(share, np.maximum(scales, 0)[..., None, None], axis=-2)[..., 0, :]
    prior = np.where((scales == NO_SCALE)[..., None], 1.0, 0.9 * accepted + 0.1 / counts.shape[-1])
    return (logits + np.log(prior)).argmax(axis=-1), scales


# --- checks ------------------------------------------------------------------------------------------


def check_p0(p0: float) -> None:
    """p0 must be at least 1/2: below, two classes can exceed it at once, and certificates would be false."""
    if not (isinstance(p0, (int, float, np.floating)) and 0.5 <= p0 < 1):
        raise ValueError(f"p0 must lie in [1/2, 1), got {p0!r}: below 1/2 two classes can exceed it at once")


def check_sigmas(sigmas: Sequence[float]) -> np.ndarray:
    """The scales of a cascade as a float64 array; they must increase, as the rows of the counts do."""
    sigmas = np.asarray(sigmas, dtype=np.float64).reshape(-1)
    for sigma in sigmas:
        check_sigma(float(sigma))
    if not len(sigmas) or (np.diff(sigmas) <= 0).any():
        raise ValueError(f"sigmas must increase, as the rows of the counts do, got {sigmas.tolist()}")
    return sigmas


def _check_counts(selection, estimation, n, scales: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    selection, estimation = np.asarray(selection), np.asarray(estimation)
    if selection.shape != estimation.shape or estimation.ndim < 2 or estimation.shape[-2] != scales:
        raise ValueError(
            f"counts must both have shape [..., {scales}, num_classes], got {selection.shape} and {estimation.shape}"
        )
    if not (np.issubdtype(selection.dtype, np.integer) and np.issubdtype(estimation.dtype, np.integer)):
        raise ValueError(f"counts must be whole numbers, got {selection.dtype} and {estimation.dtype}")
    n = np.broadcast_to(np.asarray(n), estimation.shape[:-1])
    if not np.issubdtype(n.dtype, np.integer):
        raise ValueError(f"n must be whole numbers below 2**63, got {n.dtype}")
    if (estimation < 0).any() or (estimation.sum(axis=-1) > n).any():
        raise ValueError("estimation counts must be at least 0 and sum to at most n at every scale")
    return selection, estimation, n
