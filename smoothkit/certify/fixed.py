"""Certification and prediction from a fixed number of samples: CERTIFY and PREDICT of Cohen et al. 2019."""

import numpy as np
import pandas as pd

from smoothkit.certify.bounds import check_reach, clopper_pearson_lower, predict_p_value, radius
from smoothkit.records.format import RecordError
from smoothkit.records.record import Record
from smoothkit.types import ABSTAIN, Certificate, Votes, check_alpha, check_sigma


def certify_votes(
    selection: Votes,
    estimation: Votes,
    *,
    sigma: float,
    alpha: float,
    noise: str = "unstated",
    class_names: tuple[str, ...] = (),
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
        selection, estimation, p_a_lower, sigma=sigma, alpha=alpha, noise=noise, class_names=class_names
    )


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
) -> Certificate:
    """The certificate of the class with most votes in `selection`, given a bound on its probability from `estimation`."""
    c_a, certified = selection.top, float(radius(p_a_lower, sigma))
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
    )


def certificates(record: Record, *, alpha: float | None = None, n: int | None = None) -> pd.DataFrame:
    """Certificates of all complete images of a record: `certify_votes`, for many at once.

    Parameters
    ----------
    record : Record
        With one sigma, or one for each image: that certificate holds of the smoothed classifier with *this* sigma for
        all inputs (see `sigma.selectors` for one classifier with several).
    alpha : float, optional
        Failure probability of each certificate; the record's own by default. Any value is allowed for
        a record of fixed n. It is per image: for m images at once, divide by m.
    n : int, optional
        Use only the first n estimation samples; a block edge of the record. Fix it before looking.

    Returns
    -------
    DataFrame with idx, label, predict (ABSTAIN = -1), radius (float64, rounded down), correct, sigma,
    n0, n, alpha, c_a, n_a, p_a_lower, noise, key, image_id; one row an image, by idx.
    """
    rule = record.stopping_rule
    alpha = rule.alpha if alpha is None else alpha
    check_alpha(alpha)
    votes = record.votes(n)
    if votes.empty:
        raise RecordError(
            f"{record.path or 'the record'} has no complete image yet; run the same command again to go on"
        )
    selection = np.stack(votes["counts_selection"].to_list())  # [images, num_classes]
    estimation = np.stack(votes["counts_estimation"].to_list())
    c_a = selection.argmax(axis=1)
    n_a = estimation[np.arange(len(votes)), c_a]
    p_a_lower = clopper_pearson_lower(n_a, votes["n"].to_numpy(), alpha)
    radii = radius(p_a_lower, votes["sigma"].to_numpy())
    predict = np.where(radii > 0, c_a, ABSTAIN)
    return pd.DataFrame(
        {
            "idx": votes["index"].to_numpy(),
            "label": votes["label"].to_numpy(),
            "predict": predict,
            "radius": radii,
            "correct": (predict == votes["label"].to_numpy()) & (predict != ABSTAIN),
            "sigma": votes["sigma"].to_numpy(),
            "n0": votes["n0"].to_numpy(),
            "n": votes["n"].to_numpy(),
            "alpha": alpha,
            "c_a": c_a,
            "n_a": n_a,
            "p_a_lower": p_a_lower,
            "noise": record.identity.noise,
            "key": votes["key"].to_numpy(),
            "image_id": votes["image_id"].to_numpy(),
        }
    )


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
    check_reach(votes.n, alpha, predict=True)
    top = votes.top
    others = np.delete(votes.counts, top)
    runner_up = int(others.max()) if others.size else 0
    return top if predict_p_value(int(votes.counts[top]), runner_up) <= alpha else ABSTAIN
