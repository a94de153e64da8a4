"""A sigma for each input that stays the same nearby: certificates of one classifier, which need no memory.

A selector chooses one of a few sigmas and says within which radius R_sigma it stays. `NearestPrototype` has an R_sigma
that is geometry and never wrong. `SmoothedSelector` is itself a smoothed classifier (dual smoothing), and its R_sigma a
certificate that takes a share of alpha. The shares are added, which needs no independence. By the min rule (`sound`) the
radius of both together holds for a fresh question x + delta, in any order, on any machine.

References
----------
Sun, Mao and Vechev, "Dual Randomized Smoothing", ICLR 2026 (the rule and the smoothed selector, from summaries).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from smoothbook.sigma.distances import exact_squared_distance, root_below
from smoothbook.sigma.sound import Choice, by_min_rule, choice_by_votes, places
from smoothkit.certify import certificates
from smoothkit.certify.bounds import check_reach
from smoothkit.data import Images, check_images
from smoothkit.sampling.run import collect_votes
from smoothkit.sampling.smoothed import Smoothed
from smoothkit.types import NoiseForm, StoppingRule, check_alpha, check_sigma


class Selector(Protocol):
    """Anything that chooses sigmas and says within which radius they stay."""

    def choose(self, images: Images) -> Choice: ...


# --- the nearest prototype ---------------------------------------------------------------------------


class NearestPrototype:
    """The sigma of the nearest of a few prototype images; the first of several at one distance.

    Prototypes and sigmas must be fixed before the certified images are looked at: from training images, say.

    Parameters
    ----------
    prototypes : Tensor [M, C, H, W], float32
    sigmas : float, one for each prototype; several may share one
    check_range : bool
        Refuse prototypes outside [0, 1]; False for examples drawn on a larger plane.
    """

    def __init__(self, prototypes: Tensor, sigmas: Sequence[float], *, check_range: bool = True) -> None:
        check_images(prototypes, name="prototypes", check_range=check_range)
        self.shape = tuple(prototypes.shape[1:])
        self.points = prototypes.detach().cpu().float().flatten(1).numpy()
        self.sigmas = np.asarray(sigmas, dtype=np.float64)
        if self.sigmas.shape != (len(self.points),):
            raise ValueError(f"sigmas must be one for each of {len(self.points)} prototypes, got {self.sigmas.shape}")
        for s in np.unique(self.sigmas):
            check_sigma(float(s))
        self._apart = {}
        for i, j in itertools.combinations(range(len(self.points)), 2):
            if self.sigmas[i] != self.sigmas[j]:
                self._apart[i, j] = self._apart[j, i] = exact_squared_distance(self.points[i], self.points[j])

    def choose(self, images: Images) -> Choice:
        sigma, radius = (np.array(x) for x in zip(*map(self.at, images), strict=True))
        return Choice(sigma, radius, np.ones(len(sigma), dtype=bool), alpha=0.0)

    def at(self, image: Tensor) -> tuple[float, float]:
        """Sigma at an image and a radius within which it stays; infinite if all sigmas are one.

        The inputs as near to prototype j as to i lie at the distance (d_j² - d_i²) / (2 |p_i - p_j|) from x, where d are
        the distances of x. Sigma stays where, for each j of another sigma, some i of this sigma is nearer: the radius is
        the smallest over j of the largest over i. With one sigma a prototype that is the true one, else not above it.

        It is not above it by a last bit either, nor another one on another machine: squared distances of float32
        images are fractions without rounding, so sigma and the square of the radius are exact, and `root_below` rounds
        the radius down.
        """
        if tuple(image.shape) != self.shape:
            raise ValueError(f"image has shape {tuple(image.shape)}, and the prototypes {self.shape}")
        x = image.detach().cpu().float().reshape(-1).numpy()
        squared = [exact_squared_distance(x, p) for p in self.points]
        sigma = self.sigmas[squared.index(min(squared))]
        same, others = np.flatnonzero(self.sigmas == sigma), np.flatnonzero(self.sigmas != sigma)
        if not len(others):
            return float(sigma), math.inf
        square = min(max(_signed_square(squared[j] - squared[i], self._apart[i, j]) for i in same) for j in others)
        return float(sigma), root_below(square)


def _signed_square(difference: Fraction, apart: Fraction) -> Fraction:
    """The square of difference / (2 sqrt(apart)), negative as the difference; 0 between equal prototypes."""
    return difference * abs(difference) / (4 * apart) if apart else Fraction(0)


# --- a smoothed selector -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SmoothedSelector:
    """Dual smoothing: which sigma to use is asked of a smoothed classifier of its own.

    Parameters
    ----------
    smoothed : Smoothed
        Its base classifier has a class for each of the sigmas. The authors take its own noise at least as large as the
        largest of them, so that R_sigma is not what limits.
    sigmas : the sigmas its classes stand for
    alpha : float
        Its failure probability for each image: part of what is paid in all.
    n0, n : int
        Samples to guess a sigma, and to bound its probability.
    noise, seed, progress : as in `Smoothed.sample`
        At the base classifier's seed it draws the same normals; the shares of alpha are added, so this does no harm.
    """

    smoothed: Smoothed
    sigmas: tuple[float, ...]
    alpha: float
    n0: int = 100
    n: int = 10_000
    noise: str | NoiseForm | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        for s in self.sigmas:
            check_sigma(s)
        check_alpha(self.alpha)

    def choose(self, images: Images) -> Choice:
        unlabelled = dataclasses.replace(images, labels=np.full(len(images), -1), class_names=())  # classes are sigmas
        how = dict(n0=self.n0, n=self.n, alpha=self.alpha, noise=self.noise, seed=self.seed, progress=self.progress)
        return choice_by_votes(self.smoothed.sample(unlabelled, **how), self.sigmas, images.ids, alpha=self.alpha)


# --- certificates ------------------------------------------------------------------------------------


def sound_certificates(
    base_classifier: Callable[[Tensor], Tensor],
    selector: Selector,
    images: Images,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    noise: str | NoiseForm | None = None,
    seed: int = 0,
    batch: int | None = None,
    device: str | None = None,
    precision: str = "float32",
    compile: bool | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Certificates of the one classifier that smooths each input at the selector's sigma.

    Parameters
    ----------
    alpha : float
        Failure probability of each certificate in all; the selector's share is taken off for the class.
    noise, seed, batch, device, precision, compile, progress : as in `sampling.run.collect_votes`

    Returns
    -------
    DataFrame in the order of the images, as `certify.certificates`, with `radius` by the min rule, and `sigma_radius`,
    `class_radius` and `alpha_class` beside it. Where the selector abstains so does the classifier.
    """
    check_alpha(alpha)
    choice = selector.choose(images)
    alpha_class = alpha - choice.alpha
    if not alpha_class > 0:
        raise ValueError(
            f"alpha={alpha:g} must be above the selector's share, which is {choice.alpha:g}; half is usual"
        )
    check_reach(n, alpha_class)
    record = collect_votes(
        base_classifier, images, sigma=choice.sigma, stopping_rule=StoppingRule(n0=n0, n=n, alpha=alpha_class), noise=noise,
        seed=seed, batch=batch, device=device, precision=precision, compile=compile, progress=progress,
    )  # fmt: skip
    table = certificates(record)
    table = table.iloc[places(table["image_id"], images.ids, "the record")].reset_index(drop=True)
    return by_min_rule(table, choice, alpha=alpha)


def wanted_of(found: Sequence[float], sigmas: Sequence[float]) -> np.ndarray:
    """Which of a few sigmas is nearest, by ratio, to each that was found: int64 [N]."""
    found, sigmas = (np.asarray(s, dtype=np.float64) for s in (found, sigmas))
    return np.abs(np.log(found)[:, None] - np.log(sigmas)).argmin(1)


def prototypes_by_sigma(
    images: Images, found: Sequence[float], *, sigmas: Sequence[float], each: int = 1, seed: int = 0
) -> NearestPrototype:
    """A nearest-prototype selector from sigmas searched on training images: k-means of the images nearest to each sigma.

    Parameters
    ----------
    images : Images
        Training images, never those to be certified.
    found : float, one for each image, as `search.search_sigma` gives them
    sigmas : the finite set to choose from
    each : int
        Prototypes for each sigma that is found at all.
    """
    from sklearn.cluster import KMeans

    if images.split == "test":
        raise ValueError(f"{images.name} is a test split, which is certified; choose prototypes on training images")
    found, sigmas = np.asarray(found, dtype=np.float64), np.asarray(sorted(sigmas), dtype=np.float64)
    if found.shape != (len(images),):
        raise ValueError(f"found must hold one sigma for each of {len(images)} images, got {found.shape}")
    wanted = wanted_of(found, sigmas)
    pixels = images.batch()
    centres, chosen = [], []
    for k in np.unique(wanted):
        mine = pixels[torch.from_numpy(wanted == k)].flatten(1).numpy()
        means = KMeans(min(each, len(mine)), n_init=4, random_state=seed).fit(mine).cluster_centers_
        centres.append(means.clip(0, 1).astype(np.float32))
        chosen += [sigmas[k]] * len(means)
    prototypes = torch.from_numpy(np.concatenate(centres)).reshape(-1, *pixels.shape[1:])
    return NearestPrototype(prototypes, chosen)
