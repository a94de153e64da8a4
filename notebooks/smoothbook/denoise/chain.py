"""A denoiser in front of a classifier: again a base classifier, images with noise to logits.

Noise is added to the image, in its own pixel units, before anything here; which range and scaling a denoiser was
trained with stays inside. So votes, records and certificates need not know that there is one.
"""

import abc

import torch
from torch import Tensor, nn

from smoothkit.models import BaseClassifier


class Denoiser(nn.Module, abc.ABC):
    """Noisy images [B, C, H, W] in pixel units -> clean images of the same shape on [0, 1].

    A subclass gives `estimate`, from rows that are normalised as it was trained: rows = (images - mean) / std. The
    engine makes the rows in the pass that adds the noise (see `BaseClassifier.fold`).

    Parameters
    ----------
    sigma : float, optional
        The noise it is made for, pixel units on [0, 1]; None where one denoiser serves all.
    mean, std : float
    name : str
    """

    def __init__(self, *, sigma: float | None = None, mean: float = 0.0, std: float = 1.0, name: str = "") -> None:
        super().__init__()
        self.sigma, self.mean, self.std = sigma, mean, std
        self.name = name or type(self).__name__

    def forward(self, images: Tensor) -> Tensor:
        return self.estimate((images - self.mean) / self.std)

    @abc.abstractmethod
    def estimate(self, rows: Tensor) -> Tensor:
        """Clean images on [0, 1] from normalised rows."""


class Identity(Denoiser):
    """No denoising: the classifier sees the noisy image. With it everything is Cohen's procedure."""

    def __init__(self) -> None:
        super().__init__(name="identity")

    def estimate(self, rows: Tensor) -> Tensor:
        return rows


class DenoisedClassifier(BaseClassifier):
    """Denoise, then classify: a BaseClassifier for images with noise.

    Parameters
    ----------
    denoiser : Denoiser
    classifier : nn.Module
        Images on [0, 1] to logits, with its resize and normalisation inside, as a BaseClassifier.
    name : str, optional
        How records call the model; the names of both by default.

    References
    ----------
    Salman, Sun, Yang, Kapoor and Kolter, "Denoised Smoothing: A Provable Defense for Pretrained Classifiers",
    NeurIPS 2020. arXiv:2003.01908.
    """

    def __init__(self, denoiser: Denoiser, classifier: nn.Module, *, name: str | None = None) -> None:
        for what, value, kind in (("denoiser", denoiser, Denoiser), ("classifier", classifier, nn.Module)):
            if not isinstance(value, kind):
                raise ValueError(f"{what} must be a {kind.__name__}, got {type(value).__name__}")
        super().__init__(
            _Chain(denoiser, classifier),
            mean=(denoiser.mean,),
            std=(denoiser.std,),
            class_names=getattr(classifier, "class_names", ()),
            name=name or f"{denoiser.name}+{getattr(classifier, 'name', type(classifier).__name__)}",
        )

    @property
    def denoiser(self) -> Denoiser:
        """What takes the noise away."""
        return self.network.denoiser

    @property
    def classifier(self) -> nn.Module:
        """What sees the clean image."""
        return self.network.classifier

    @property
    def sigma(self) -> float | None:
        """The noise that the denoiser is made for."""
        return self.denoiser.sigma

    @torch.no_grad()
    def denoise(self, images: Tensor) -> Tensor:
        """What the classifier gets to see: clean images on [0, 1] from noisy ones."""
        return self.denoiser(images)


class _Chain(nn.Module):
    """Rows, normalised as the denoiser wants them, to logits."""

    def __init__(self, denoiser: Denoiser, classifier: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier

    def forward(self, rows: Tensor) -> Tensor:
        return self.classifier(self.denoiser.estimate(rows))


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image [B] in decibels, for images [B, C, H, W] on [0, 1]."""
    if images.ndim < 2 or images.shape[1:] != clean.shape[1:] or len(clean) not in (1, len(images)):
        raise ValueError(f"images and clean must have one shape, got {tuple(images.shape)} and {tuple(clean.shape)}")
    return -10 * (images - clean).double().square().flatten(1).mean(1).log10()
