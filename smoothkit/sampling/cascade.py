"""Sampling for the cascade from the largest scale down, no further than each image needs."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from smoothkit.certify.bounds import check_reach, clopper_pearson_lower
from smoothkit.certify.cascade import alpha_per_statement, check_p0, check_sigmas
from smoothkit.data import Images
from smoothkit.records.record import Record
from smoothkit.sampling.progress import say
from smoothkit.sampling.run import collect_votes
from smoothkit.types import StoppingRule


def sample_cascade(
    base_classifiers: Mapping[float, Callable[[Tensor], Tensor]],
    images: Images,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    p0: float = 0.5,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    progress: bool = True,
    batch: int | None = None,
    device: str | None = None,
    precision: str = "float32",
    compile: bool | None = None,
) -> dict[float, Record]:
    """Votes of each scale from the largest down, of those images alone that no larger scale has decided.

    What the rule `cascade` proves of them is what it proves of votes at all scales, or very little less: bounds that
    depend on the guesses of scales not asked are taken as if those disagreed. The rule `max` needs all scales.

    Parameters
    ----------
    base_classifiers : mapping from sigma (pixel units) to a base classifier
        One network for all scales, or a denoiser in front of it for each.
    images : Images
    n0, n, alpha, seed
        As in `Smoothed.sample`, for every scale; alpha is that of an image's certificate over all scales.
    p0 : float in [1/2, 1)
        Of the cascade.
    out : path, optional
        A folder; each scale's record is kept in `sigma-SIGMA` there, where an interrupted run goes on.
    batch, device, precision, compile : as in `Smoothed`

    Returns
    -------
    dict from sigma to Record, for `certify.cascade_certificates` with rule `cascade`. A scale that no image came
    to has none; the records know of all scales, so that the images do not choose how alpha is shared.
    """
    check_p0(p0)
    sigmas = check_sigmas(sorted(base_classifiers)).tolist()
    share = alpha_per_statement(alpha, len(sigmas))
    check_reach(n, share)
    records: dict[float, Record] = {}
    left = images
    for number, sigma in enumerate(reversed(sigmas)):
        folder = None if out is None else Path(out) / f"sigma-{sigma:g}"
        record = collect_votes(
            base_classifiers[sigma], left, sigma=sigma, stopping_rule=StoppingRule(n0=n0, n=n, alpha=alpha), seed=seed,
            out=folder, batch=batch, device=device, precision=precision, compile=compile, scales=sigmas, progress=progress,
        )  # fmt: skip
        records[sigma] = record
        passed = _passed(record, left, share, p0)
        if progress:
            say(f"sigma {sigma:g}: {len(left) - len(passed)} of {len(left)} images decided")
        if number + 1 == len(sigmas) or not len(passed):
            break
        left = left.at(passed, f"passed-{sigma:g}")
    return records


def _passed(record: Record, images: Images, share: float, p0: float) -> np.ndarray:
    """Positions of the images whose guessed class is not proved to be above p0."""
    votes = record.votes().set_index("image_id").loc[list(images.ids)]
    guessed = np.stack(votes["counts_selection"].to_list()).argmax(axis=1)
    n_a = np.stack(votes["counts_estimation"].to_list())[np.arange(len(guessed)), guessed]
    return np.flatnonzero(clopper_pearson_lower(n_a, votes["n"].to_numpy(), share) <= p0)
