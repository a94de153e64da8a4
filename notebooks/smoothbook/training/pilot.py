"""Noisy copies to look at: other draws than those that train, select or certify."""

import torch
from torch import Tensor, nn

from smoothkit import Purpose, noisy_copies
from smoothkit.data import Images


def pilot_copies(images: Images, sigma: float, *, copies: int = 1, seed: int = 0) -> Tensor:
    """`copies` noisy copies of each image, one image after the other, [N * copies, C, H, W]; the images at sigma 0.

    Parameters
    ----------
    images : Images
    sigma : float
        Pixel units on [0, 1].
    copies, seed : int
    """
    if sigma == 0:
        return images.batch().repeat_interleave(copies, dim=0)
    known = dict(sigma=sigma, seed=seed, purpose=Purpose.PILOT, start=0, stop=copies, grid=images.grid)
    return torch.cat([noisy_copies(images[i], image_id=images.ids[i], **known) for i in range(len(images))])


@torch.inference_mode()
def pilot_answers(model: nn.Module, images: Images, sigma: float, *, copies: int = 1, seed: int = 0) -> Tensor:
    """The class that the base classifier gives to each of `pilot_copies`, int64 [N, copies]."""
    return model(pilot_copies(images, sigma, copies=copies, seed=seed)).argmax(dim=1).reshape(len(images), copies)


def pilot_accuracy(model: nn.Module, images: Images, sigma: float, *, copies: int = 1, seed: int = 0) -> float:
    """The share of `pilot_answers` that are right. It certifies nothing."""
    answers = pilot_answers(model, images, sigma, copies=copies, seed=seed)
    return float((answers == torch.from_numpy(images.labels)[:, None]).float().mean())
