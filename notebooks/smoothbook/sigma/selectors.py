"""A sigma for each input that stays the same nearby: certificates of one classifier, which need no memory.

Where sigma(z) is constant on the ball of radius R_sigma around x, the input-dependent classifier is there the
smoothed classifier with that sigma, so its prediction is constant on the ball of radius min(R_sigma, R_c), with R_c
that classifier's certified radius. The radius holds for a fresh question x + delta, in any order, on any machine.

Two selectors from a finite set of sigmas: `NearestPrototype`, whose R_sigma is geometry and never wrong, and
`SmoothedSelector`, itself a smoothed classifier (dual smoothing), whose R_sigma is a certificate that takes a share
of alpha. The two may fail together or not: the shares are added, which needs no independence.

References
----------
Sun, Mao and Vechev, "Dual Randomized Smoothing", ICLR 2026 (the rule and the smoothed selector, from summaries).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from smoothbook.sigma.certificates import frozen_certificates
from smoothbook.sigma.distances import nearest, relative_error
from smoothbook.sigma.sound import by_min_rule
from smoothkit.data import Images, check_images
from smoothkit.types import ABSTAIN, check_alpha, check_sigma


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a selector says about N images.

    Parameters
    ----------
    sigma : float64 [N]
    radius : float64 [N]
        Sigma is the same for all inputs nearer than this; L2, pixel units.
    known : bool [N]
        Whether sigma at the image itself is proved; a selector that abstains proves nothing.
    alpha : float
        Chance that any of this is wrong for an image; 0 for geometry.
    """

    sigma: np.ndarray
    radius: np.ndarray
    known: np.ndarray
    alpha: float


class Selector(Protocol):
    """Anything that chooses sigmas and says within what radius they stay."""

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

    def choose(self, images: Images) -> Choice:
        answers = [self.at(image) for image in images]
        sigma, radius = (np.array(x) for x in zip(*answers, strict=True))
        return Choice(sigma, radius, np.ones(len(answers), dtype=bool), alpha=0.0)

    def at(self, image: Tensor) -> tuple[float, float]:
        """Sigma at an image, decided exactly, and a radius within which it stays; infinite if all sigmas are one.

        The half-space of inputs nearer to prototype i than to j begins at the distance (d_j² - d_i²) / (2 |p_i - p_j|)
        from x. Sigma stays where, for each j of another sigma, some i of this sigma is nearer: the radius is the
        smallest over j of the largest over i. With one sigma a prototype it is exact, else not above the exact one.
        """
        if tuple(image.shape) != self.shape:
            raise ValueError(f"image has shape {tuple(image.shape)}, and the prototypes {self.shape}")
        x = image.detach().cpu().float().reshape(-1).numpy()
        sigma = self.sigmas[nearest(x, self.points)]
        same = self.sigmas == sigma
        margins = [
            max(_margin(x, own, other) for own in self.points[same]) for other in self.points[~same]
        ]  # negative where rounding hides a tie
        return float(sigma), max(0.0, min(margins, default=math.inf))


def _margin(x: np.ndarray, own: np.ndarray, other: np.ndarray) -> float:
    """Distance from x to the inputs as near to `other` as to `own`, rounded down; negative beyond; float32 [d] each.

    d_other² - d_own² = (own - other) · (2x - own - other), which needs no difference of squares.
    """
    x, own, other = (v.astype(np.float64) for v in (x, own, other))
    direction, twice = own - other, 2 * x - own - other
    length = math.sqrt(direction @ direction)
    if length == 0:
        return 0.0  # equal prototypes with two sigmas: nothing separates them
    # what is rounded is of the size of the summands, also where they cancel
    size = np.abs(direction) @ (2 * np.abs(x) + np.abs(own) + np.abs(other))
    error = relative_error(len(x))
    exact_or_less = direction @ twice - error * size
    margin = exact_or_less / (2 * length)
    return float(margin * (1 - error) if margin > 0 else margin * (1 + error))


# --- a smoothed selector -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SmoothedSelector:
    """Dual smoothing: which sigma to use is asked of a smoothed classifier of its own.

    Parameters
    ----------
    base_selector : callable, images [B, C, H, W] on [0, 1] -> logits [B, len(sigmas)]
    sigmas : the sigmas its classes stand for
    sigma_e : float
        Noise of the selector itself; the authors take it at least as large as the largest of the sigmas, so that R_sigma
        is not what limits.
    alpha : float
        Its failure probability for each image: part of what is paid in all.
    n0, n : int
        Samples to guess a sigma, and to bound its probability.
    how : dict
        Settings of `certificates.votes_at`, as seed and batch. At the base classifier's seed it draws the same normals;
        the shares of alpha are added, so that this does no harm.
    """

    base_selector: Callable[[Tensor], Tensor]
    sigmas: tuple[float, ...]
    sigma_e: float
    alpha: float
    n0: int = 100
    n: int = 10_000
    how: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        for s in (*self.sigmas, self.sigma_e):
            check_sigma(s)
        check_alpha(self.alpha)

    def choose(self, images: Images) -> Choice:
        unlabelled = dataclasses.replace(images, labels=np.full(len(images), -1))  # its classes are sigmas
        table = frozen_certificates(
            self.base_selector, unlabelled, self.sigma_e, n0=self.n0, n=self.n, alpha=self.alpha, **self.how
        )
        guessed = table["c_a"].to_numpy()
        if guessed.max() >= len(self.sigmas):
            raise ValueError(f"the selector has more classes than the {len(self.sigmas)} sigmas given")
        known = table["predict"].to_numpy() != ABSTAIN
        return Choice(np.array(self.sigmas)[guessed], table["radius"].to_numpy(), known, self.alpha)


# --- certificates ------------------------------------------------------------------------------------


def sound_certificates(
    base_classifier: Callable[[Tensor], Tensor],
    selector: Selector,
    images: Images,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    **how,
) -> pd.DataFrame:
    """Certificates of the one classifier that smooths each input at the selector's sigma.

    Parameters
    ----------
    alpha : float
        Failure probability of each certificate in all; the selector's share is taken off for the class.
    how : seed, grid, progress, batch, device, precision, compile; see `certificates.votes_at`

    Returns
    -------
    DataFrame as `certify.certificates`, with `radius` by the min rule, and `sigma_radius`, `class_radius` and
    `alpha_class` beside it. Where the selector abstains so does the classifier.
    """
    check_alpha(alpha)
    choice = selector.choose(images)
    alpha_class = alpha - choice.alpha
    if not alpha_class > 0:
        raise ValueError(
            f"alpha={alpha:g} must be above the selector's share, which is {choice.alpha:g}; half is usual"
        )
    table = frozen_certificates(base_classifier, images, choice.sigma, n0=n0, n=n, alpha=alpha_class, **how)
    return by_min_rule(table, choice.radius, choice.known, alpha=alpha)


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
