"""The estimated radius of images against sigma, and the way a search takes on it: what notebook 30 draws first."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from smoothbook.sigma.search import Objective, PilotNoise, SigmaSearch, search_sigma, soft_probabilities
from smoothkit.data import Images


def radius_landscape(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    objectives: Mapping[str, Objective],
    *,
    sigma0: float,
    grid: Sequence[float],
    draws: int,
    search: SigmaSearch,
    names: Sequence[str],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each objective of a few images on a grid of sigmas, and the sigmas that a search for it passes through.

    All values are from the same `draws` pilot copies; the class of an image is that at the grid's sigma nearest to sigma0.

    Parameters
    ----------
    objectives : mapping from a name to an objective; it takes the place of the search's own
    sigma0 : where the search begins, pixel units
    grid : increasing sigmas, pixel units
    draws : noisy copies of an image
    names : what the images are called, one each

    Returns
    -------
    (curves, paths) : DataFrames
        objective, image, sigma, value (the estimated L2 radius); of `paths` every fifth step, by `step`, with the value
        interpolated on the grid.
    """
    noise = PilotNoise(images.ids, tuple(images[0].shape), 0, "cpu")(0, draws)
    at = torch.as_tensor(np.asarray(grid), dtype=torch.float64)
    few = len(images)
    with torch.no_grad():
        soft = torch.stack([soft_probabilities(base_classifier, images.batch(), s.expand(few), noise) for s in at])
        c_a = soft[(at - sigma0).abs().argmin()].argmax(1)
    curves, paths = [], []
    for name, objective in objectives.items():
        how = dataclasses.replace(search, objective=objective)
        trace = search_sigma(base_classifier, images, sigma0=sigma0, search=how, progress=False).trace  # [steps + 1, B]
        value = torch.stack([objective(p, c_a, s.expand(few)) for p, s in zip(soft, at, strict=True)]).numpy()
        for i, image in enumerate(names):
            steps = np.union1d(np.arange(0, len(trace), 5), len(trace) - 1)
            path, who = trace[steps, i], {"objective": name, "image": image}
            curves.append(pd.DataFrame({**who, "sigma": at.numpy(), "value": value[:, i]}))
            seen = np.interp(path, at.numpy(), value[:, i])
            paths.append(pd.DataFrame({**who, "step": steps, "sigma": path, "value": seen}))
    return pd.concat(curves, ignore_index=True), pd.concat(paths, ignore_index=True)


def found_and_best(curves: pd.DataFrame, paths: pd.DataFrame) -> pd.DataFrame:
    """Where each search ended, beside the best sigma of the grid: objective, image, found, best on the grid."""
    keys = ["objective", "image"]
    found = paths.sort_values("step").groupby(keys, sort=False)["sigma"].last().rename("found")
    best = curves.loc[curves.groupby(keys, sort=False)["value"].idxmax()].set_index(keys)["sigma"]
    return pd.concat([found, best.rename("best on the grid")], axis=1).reset_index()
