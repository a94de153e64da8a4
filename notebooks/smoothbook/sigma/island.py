"""A line with an island, exact: a classifier that chooses sigma anew answers differently inside a frozen radius."""

import dataclasses

import numpy as np
import torch
from scipy.special import ndtr, ndtri

from smoothbook.sigma.search import ClampedRadius, SigmaSearch, ascend


@dataclasses.dataclass(frozen=True)
class Island:
    """A base classifier on a line: class 1 between `low` and `high`, class 0 elsewhere."""

    low: float = 0.5
    high: float = 1.0

    def chance(self, x: np.ndarray | float, sigma: np.ndarray | float) -> np.ndarray:
        """The exact probability of class 1 at x under noise sigma."""
        return ndtr((self.high - x) / sigma) - ndtr((self.low - x) / sigma)

    def deployed(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The classifier that searches sigma at every x, on exact probabilities.

        Returns
        -------
        (sigma, class, radius) : arrays as x; the radius is frozen: that of the smoothed classifier with this sigma everywhere
        """
        x = np.atleast_1d(np.asarray(x, dtype=np.float64))
        centre = torch.from_numpy(x)

        def probabilities(sigma: torch.Tensor, step: int) -> torch.Tensor:
            p = torch.special.ndtr((self.high - centre) / sigma) - torch.special.ndtr((self.low - centre) / sigma)
            return torch.stack([1 - p, p], dim=1)

        how = SigmaSearch(ClampedRadius(1e-9), steps=150, step_size=0.03)
        sigma = ascend(probabilities, torch.full((len(x),), 0.25, dtype=torch.float64), how).sigma
        p = self.chance(x, sigma)
        likelier = np.clip(np.maximum(p, 1 - p), 0.5, 1 - 1e-15)
        return sigma, (p > 0.5).astype(int), sigma * np.maximum(0, ndtri(likelier))

    def broken(self, x: float, line: np.ndarray) -> float:
        """The point of `line` nearest to x, within its frozen radius, that is answered differently; NaN if there is none."""
        (_,), (own,), (radius,) = self.deployed(x)
        _, there, _ = self.deployed(line)
        points = line[(np.abs(line - x) < radius) & (there != own)]
        return float(points[np.abs(points - x).argmin()]) if len(points) else float("nan")
