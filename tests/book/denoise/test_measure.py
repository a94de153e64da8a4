"""PSNR and right votes by image, and what more denoising calls gain."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from smoothbook.denoise import Identity
from smoothbook.denoise.measure import gain_of_steps, psnr_by_image, right_votes
from smoothkit import Smoothed, data


def test_psnr_is_that_of_the_noise_where_nothing_is_denoised_and_infinite_where_all_is():
    images = data.from_arrays(torch.full((3, 1, 32, 32), 0.5))
    images = data.from_arrays(images.batch() + torch.arange(3).reshape(3, 1, 1, 1) / 16)
    found = psnr_by_image(Identity(), images, 0.1)
    assert found.index.tolist() == list(images.ids) and found["noisy"].equals(found["denoised"])
    assert found["noisy"].to_numpy() == pytest.approx(20, abs=0.5)  # -10 log10(0.1^2); 4 x 1,024 normals
    perfect = psnr_by_image(lambda noisy: images.batch().repeat_interleave(4, 0), images, 0.1)
    assert np.isinf(perfect["denoised"]).all()


def test_right_votes_are_shares_of_the_label():
    class Bright(torch.nn.Module):
        def forward(self, x):
            above = x.flatten(1).mean(1) - 0.5
            return torch.stack([-above, above], 1)

    images = data.from_arrays(torch.stack([torch.full((1, 8, 8), v) for v in (0.0, 1.0, 0.5)]), np.array([0, 0, 1]))
    right = right_votes(Smoothed(Bright(), 0.25).sample(images, n=400, noise="float", progress=False))
    assert right.index.tolist() == list(images.ids)
    assert right.iloc[0] == 1 and right.iloc[1] == 0 and right.iloc[2] == pytest.approx(0.5, abs=0.15)


def test_gains_are_paired_with_the_first_number_of_steps():
    found = gain_of_steps({1: pd.Series([0.5, 0.7]), 4: pd.Series([0.6, 0.9])})
    assert found["calls a vote"].tolist() == [1, 4] and found["gain"].tolist() == pytest.approx([0, 0.15])
    assert found["standard error"].tolist() == pytest.approx([0, math.sqrt(0.005) / math.sqrt(2)])
