"""A sigma of its own for each training image, moved by one step of the search whenever the image comes up."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from smoothbook.sigma.search import SigmaSearch, slope_of, soft_probabilities, step_of
from smoothkit.models import evaluating
from smoothkit.types import check_sigma


@dataclasses.dataclass
class SigmaTable:
    """A schedule for `training.fit`: Algorithm 2 of Alfarra et al. 2022 (DS²), which warm-starts from epoch to epoch.

    Each image is trained with its own sigma, after one step uphill from the one it had, on the images as augmented. The
    search asks the base classifier in eval mode: in train mode, as in the released scripts, it would move the
    statistics of BatchNorm. The class is the one predicted now, and nothing guards a single step.

    Parameters
    ----------
    sigma0 : float
        Every image's sigma at first, above 0, pixel units.
    search : SigmaSearch
        Its objective, step size and draws are used; the paper takes 1 draw, and 8 for MACER.
    fixed_for : float
        Share of the training in which sigmas stay at sigma0, in [0, 1]; the paper: 50 of 200 epochs.
    """

    sigma0: float
    search: SigmaSearch = dataclasses.field(default_factory=SigmaSearch)
    fixed_for: float = 0.25

    def __post_init__(self) -> None:
        check_sigma(self.sigma0)
        if not 0 <= self.fixed_for <= 1:
            raise ValueError(f"fixed_for must be a share of the training in [0, 1], got {self.fixed_for}")
        self._sigmas = torch.empty(0, dtype=torch.float64)

    @property
    def sigmas(self) -> np.ndarray:
        """The sigmas so far by position among the training images, float64; sigma0 for those not met yet."""
        return self._sigmas.numpy().copy()

    def __call__(self, n: int, *, progress: float, generator: torch.Generator) -> Tensor:
        """For images that are not in the table, as in validation: the table's mean, or sigma0 while it is empty."""
        mean = float(self._sigmas.mean()) if len(self._sigmas) else self.sigma0
        return torch.full((n,), mean, device=generator.device)

    def for_images(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        images: Tensor,
        positions: np.ndarray,
        *,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        """The sigmas [B] of these training images, after a step of the search.

        Parameters
        ----------
        images : Tensor [B, C, H, W], as augmented
        positions : int array [B], of the images in the training set, each at most once
        progress : share of the training done
        generator : torch.Generator on the images' device; the search draws its noise from it
        """
        positions = torch.as_tensor(np.asarray(positions), dtype=torch.long)
        if progress == 0:  # another training begins
            self._sigmas = self._sigmas[:0]
        if (new := int(positions.max()) + 1 - len(self._sigmas)) > 0:
            self._sigmas = torch.cat([self._sigmas, torch.full((new,), float(self.sigma0), dtype=torch.float64)])
        sigma = self._sigmas[positions]
        if progress >= self.fixed_for:
            sigma = self._step(base_classifier, images, sigma.to(images.device), generator).cpu()
            self._sigmas[positions] = sigma
        return sigma.to(images)

    def _step(self, base_classifier: Callable, images: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        shape = (self.search.draws, *images.shape)
        z = torch.randn(shape, generator=generator, device=images.device)

        def probabilities(sigma: Tensor, step: int) -> Tensor:
            return soft_probabilities(base_classifier, images, sigma, z)

        with evaluating(base_classifier):
            with torch.no_grad():
                c_a = probabilities(sigma, 0).argmax(1)
            _, slope = slope_of(self.search.objective, probabilities, c_a, sigma, 0)
        return step_of(sigma, slope, self.search)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        return {"sigmas": self._sigmas.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        sigmas = state["sigmas"].double().cpu()
        if sigmas.ndim != 1 or not bool((sigmas > 0).all()):
            raise ValueError("the table's sigmas must be above 0; the checkpoint is damaged")
        self._sigmas = sigmas.clone()
