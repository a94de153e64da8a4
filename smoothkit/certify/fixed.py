"""Certification and prediction from a fixed number of samples: CERTIFY and PREDICT of Cohen et al. 2019."""

import numpy as np

from smoothkit.certify.bounds import (
    check_reach,
    clopper_pearson_lower,
    predict_p_value,
    radius,
    radius_for_all,
    sigma_of_proof,
)
from smoothkit.types import ABSTAIN, Certificate, NoiseForm, Votes, check_alpha, check_sigma


def certify_votes(
    selection: Votes,
    estimation: Votes,
    *,
    sigma: float,
    alpha: float,
    noise: str = "unstated",
    class_names: tuple[str, ...] = (),
    values: int | None = None,
    seed: int | None = None,
    run: str = "",
) -> Certificate:
    """Certify one input from two independent sets of votes.

    The class is guessed on `selection` and its probability bounded on `estimation`. The guarantee
    needs the two to be separate draws.

    Parameters
    ----------
    selection : Votes
        Counts of shape (num_classes,) over `n0` noisy copies.
    estimation : Votes
        Counts of shape (num_classes,) over `n` further copies.
    sigma : float
        Standard deviation of the Gaussian noise, pixel units on [0, 1], above 0.
    alpha : float
        Chance, over the sampling, that the certificate is wrong; in (0, 1).
    noise : str
        As records name it, see `NoiseForm`: "grid:255", "exact-grid:255", "float".
    class_names : tuple of str
    values : int, optional
        How many values an image has, C * H * W: what is proved for perturbations off the grid depends on it.
    seed, run : for the certificate's sentence; see `Certificate`

    Returns
    -------
    Certificate
        `predicted` is a class index, or ABSTAIN if the bound on p_A is not above one half.
        `radius` is an L2 distance in the units of `sigma`; 0.0 on ABSTAIN.

    Raises
    ------
    ValueError
        If `sigma` or `alpha` is out of range, or the two counts differ in shape.

    References
    ----------
    Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing",
    ICML 2019, Section 3.2.2 (CERTIFY). arXiv:1902.02918.
    """
    check_sigma(sigma)
    check_alpha(alpha)
    if selection.counts.shape != estimation.counts.shape:
        raise ValueError(
            f"selection has {len(selection.counts)} classes, estimation {len(estimation.counts)}; they must be equal"
        )
    n_a = int(estimation.counts[selection.top])
    p_a_lower = float(clopper_pearson_lower(n_a, estimation.n, alpha))
    return from_lower_bound(
        selection, estimation, p_a_lower, sigma=sigma, alpha=alpha, noise=noise, class_names=class_names, values=values,
        seed=seed, run=run,
    )  # fmt: skip


def from_lower_bound(
    selection: Votes,
    estimation: Votes,
    p_a_lower: float,
    *,
    sigma: float,
    alpha: float,
    noise: str,
    class_names: tuple[str, ...] = (),
    rule: str = "fixed",
    values: int | None = None,
    seed: int | None = None,
    run: str = "",
) -> Certificate:
    """The certificate of the class with most votes in `selection`, given a bound on its probability from `estimation`."""
    form = NoiseForm.parse(noise)
    c_a, certified = selection.top, float(radius(p_a_lower, sigma_of_proof(sigma, form)))
    known = form.grid is not None and values is not None
    return Certificate(
        predicted=c_a if certified > 0 else ABSTAIN,
        radius=certified,
        sigma=sigma,
        n0=selection.n,
        n=estimation.n,
        alpha=alpha,
        p_a_lower=p_a_lower,
        n_a=int(estimation.counts[c_a]),
        noise=noise,
        rule=rule,
        class_name=class_names[c_a] if certified > 0 and c_a < len(class_names) else None,
        radius_for_all=float(radius_for_all(certified, values, form.grid)) if known else None,
        seed=seed,
        run=run,
    )


def certify_counts(
    selection: np.ndarray, estimation: np.ndarray, n: np.ndarray | int, *, sigma: np.ndarray | float, alpha: float
) -> dict[str, np.ndarray]:
    """`certify_votes` of many inputs at once.

    Parameters
    ----------
    selection, estimation : int arrays [images, num_classes]
    n : int or int array [images]
        Estimation samples, those without a vote included.
    sigma : float or float array [images], pixel units on [0, 1]
        The sigma of the proof, see `bounds.sigma_of_proof`.
    alpha : float in (0, 1)

    Returns
    -------
    dict of arrays [images]: predict (ABSTAIN = -1), radius (float64, rounded down), c_a, n_a, p_a_lower.
    """
    check_alpha(alpha)
    c_a = selection.argmax(axis=1)
    n_a = estimation[np.arange(len(c_a)), c_a]
    p_a_lower = clopper_pearson_lower(n_a, n, alpha)
    radii = radius(p_a_lower, sigma)
    return {
        "predict": np.where(radii > 0, c_a, ABSTAIN), "radius": radii, "c_a": c_a, "n_a": n_a, "p_a_lower": p_a_lower
    }  # fmt: skip


def predict_votes(votes: Votes, *, alpha: float) -> int:
    """The smoothed classifier's class, wrong with probability at most alpha, or ABSTAIN.

    The two largest counts are compared by a two-sided binomial test at 1/2.

    Raises
    ------
    ValueError
        If even unanimous votes over `votes.n` copies would abstain.

    References
    ----------
    Cohen, Rosenfeld and Kolter, ICML 2019, Section 3.2.1 (PREDICT).
    """
    return int(predict_counts(votes.counts[None], votes.n, alpha=alpha)[0])


def predict_counts(counts: np.ndarray, n: int, *, alpha: float) -> np.ndarray:
    """`predict_votes` of many inputs at once: counts int [images, num_classes] over n copies each -> classes int64 [images]."""
    check_reach(n, alpha, predict=True)
    counts = np.asarray(counts)
    largest = np.sort(counts, axis=1)[:, ::-1]
    runner_up = largest[:, 1] if counts.shape[1] > 1 else np.zeros(len(counts), dtype=np.int64)
    return np.where(predict_p_value(largest[:, 0], runner_up) <= alpha, counts.argmax(axis=1), ABSTAIN)
