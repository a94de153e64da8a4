"""Votes and certificates of images that are smoothed with a sigma each."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from smoothkit import Purpose
from smoothkit.certify import certify_votes
from smoothkit.certify.bounds import check_reach
from smoothkit.data import Images
from smoothkit.sampling.batches import Task
from smoothkit.sampling.progress import Progress
from smoothkit.sampling.stream import VoteStream
from smoothkit.types import NoiseForm, Votes, check_alpha, check_samples


def votes_at(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    sigmas: float | Sequence[float],
    *,
    n0: int,
    n: int,
    seed: int = 0,
    noise: str | None = None,
    progress: bool = True,
    **how,
) -> tuple[list[Votes], list[Votes], str]:
    """Selection and estimation votes of each image at its own sigma, and the form of the noise.

    The samples are those of `sampling.run.collect_votes` at the same seed: at one sigma for all the counts are the same.

    Parameters
    ----------
    sigmas : float, or one for each image; pixel units, above 0
    n0, n : int
        Samples to select a class, and to estimate its probability.
    how : batch, device, precision, compile, as in `votes.VoteStream`
    """
    check_samples("n0", n0)
    check_samples("n", n)
    noise = NoiseForm.parse(noise, images.grid)
    stream = VoteStream(base_classifier, images, sigma=sigmas, seed=seed, noise=noise, **how)
    tasks = [
        Task(i, purpose, 0, stop)
        for i in range(len(images))
        for purpose, stop in ((Purpose.SELECT, n0), (Purpose.ESTIMATE, n))
    ]
    counted: dict[Purpose, dict[int, Votes]] = {Purpose.SELECT: {}, Purpose.ESTIMATE: {}}
    with Progress(len(images), "votes at a sigma each", show=progress) as bar:
        for task, counts, _ in stream.run(tasks, lambda samples: bar.update(samples / (n0 + n))):
            counted[task.purpose][task.image] = Votes(counts, task.stop)
    selection, estimation = ([counted[p][i] for i in range(len(images))] for p in counted)
    return selection, estimation, str(noise)


def frozen_certificates(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    sigmas: float | Sequence[float],
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    **how,
) -> pd.DataFrame:
    """CERTIFY at a sigma for each image that was fixed beforehand: what data-dependent smoothing reports.

    Each certificate is true, but of a classifier of its own: the smoothed classifier with *this* sigma for all inputs.
    Of the classifier that would choose another sigma at x + delta it says nothing. Sigmas must not depend on the
    samples drawn here; those of `search.search_sigma` come from pilot samples.

    Parameters
    ----------
    sigmas : float, or one for each image
    alpha : float
        Failure probability of each certificate.
    how : seed, noise, progress, batch, device, precision, compile; see `votes_at`

    Returns
    -------
    DataFrame with the columns of `certify.certificates`; `sigma` differs by row.
    """
    check_alpha(alpha)
    check_reach(n, alpha)
    sigmas = np.broadcast_to(np.asarray(sigmas, dtype=np.float64), len(images))
    selection, estimation, noise = votes_at(base_classifier, images, sigmas, n0=n0, n=n, **how)
    rows = []
    for i, (select, estimate) in enumerate(zip(selection, estimation, strict=True)):
        certificate = certify_votes(select, estimate, sigma=float(sigmas[i]), alpha=alpha, noise=noise)
        label = int(images.labels[i])
        rows.append(
            {
                "idx": int(images.index[i]),
                "label": label,
                "predict": certificate.predicted,
                "radius": certificate.radius,
                "correct": certificate.predicted == label and not certificate.abstained,
                "sigma": certificate.sigma,
                "n0": n0,
                "n": n,
                "alpha": alpha,
                "c_a": select.top,
                "n_a": certificate.n_a,
                "p_a_lower": certificate.p_a_lower,
                "noise": noise,
                "key": images.keys[i],
                "image_id": images.ids[i],
            }
        )
    return pd.DataFrame(rows)
