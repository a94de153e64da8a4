"""How much of the noise a denoiser takes away, and what a classifier's votes make of it: by image."""

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from smoothbook.denoise.chain import psnr
from smoothkit import Purpose, noisy_copies
from smoothkit.data import Images
from smoothkit.records import Record


def psnr_by_image(
    denoiser: Callable[[Tensor], Tensor], images: Images, sigma: float, *, copies: int = 4, seed: int = 1
) -> pd.DataFrame:
    """The mean PSNR of a few noisy copies of each image, before and after denoising.

    Parameters
    ----------
    denoiser : callable, noisy images [B, C, H, W] -> images on [0, 1]
    images : Images
    sigma : pixel units
    copies : noisy copies of an image; pilot samples, which never certify
    seed : int

    Returns
    -------
    DataFrame with noisy, denoised (decibels), one row an image, by image id
    """
    where = dict(sigma=sigma, seed=seed, purpose=Purpose.PILOT, start=0, stop=copies, grid=images.grid)
    noisy = torch.cat([noisy_copies(images[i], image_id=images.ids[i], **where) for i in range(len(images))])
    truth = images.batch().repeat_interleave(copies, 0)
    with torch.no_grad():
        pair = [psnr(x, truth).reshape(-1, copies).mean(1) for x in (noisy, denoiser(noisy))]
    return pd.DataFrame(torch.stack(pair, 1).numpy(), columns=["noisy", "denoised"], index=list(images.ids))


def right_votes(record: Record) -> pd.Series:
    """The share of estimation votes for the label, by image id."""
    votes = record.votes().set_index("image_id")
    return pd.Series({i: v.counts_estimation[v.label] / v.n for i, v in votes.iterrows()}, dtype=float)


def gain_of_steps(right: dict[int, pd.Series]) -> pd.DataFrame:
    """Shares of right votes after several numbers of denoising calls, beside the first of them, image by image.

    Parameters
    ----------
    right : mapping from calls a vote to `right_votes` of the same images

    Returns
    -------
    DataFrame with `calls a vote`, `right votes` (the mean over images), `gain` (the mean difference to the first), and
    `standard error` (of that mean, over images; NaN for one image)
    """
    first = next(iter(right.values()))
    lines = []
    for calls, share in right.items():
        gain = share - first
        lines.append((calls, share.mean(), gain.mean(), gain.std() / len(gain) ** 0.5))
    return pd.DataFrame(lines, columns=["calls a vote", "right votes", "gain", "standard error"])
