"""Records and classifiers small enough that a panel answers at once."""

import numpy as np
import pytest
import torch

from smoothkit import data
from smoothkit.records import open_record
from smoothkit.sampling.run import collect_votes
from smoothkit.types import StoppingRule

RECORDS = data.data_dir() / "records"


@pytest.fixture(scope="session")
def kept():
    """The committed records of three noise-trained models on all held-out digits."""
    return {path.name: open_record(path) for path in sorted(RECORDS.glob("digits-vit-0.*"))}


class HalfSpace(torch.nn.Module):
    """Class 1 where the mean of the pixels passes one half: its radius and the smoothed classifier's are known."""

    class_names = ("dark", "bright")

    def forward(self, images):
        side = images.flatten(1).mean(dim=1) - 0.5
        return torch.stack([-side, side], dim=1)


@pytest.fixture
def half_space():
    return HalfSpace()


@pytest.fixture
def patches():
    """Eight grey images [1, 2, 2] on the 8-bit grid, of brightness 0.1 to 0.9; the border lies at one half."""
    values = np.rint(255 * np.linspace(0.1, 0.9, 8)) / 255
    images = torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(8, 1, 2, 2).contiguous()
    return data.from_arrays(images, (values > 0.5).astype(np.int64), class_names=HalfSpace.class_names, grid=255)


@pytest.fixture
def patch_record(half_space, patches):
    rule = StoppingRule(n0=50, n=1_000, alpha=0.001)
    return collect_votes(half_space, patches, sigma=0.25, stopping_rule=rule, model_id="half-space", progress=False)
