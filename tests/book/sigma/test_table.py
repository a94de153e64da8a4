"""Training with a sigma of its own for each image."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from smoothbook.sigma.search import ClampedRadius, SigmaSearch
from smoothbook.sigma.table import SigmaTable
from smoothbook.training import FitSettings, fit
from smoothbook.training.schedules import generator_for
from smoothkit import data, models
from smoothkit.models import BaseClassifier


@pytest.fixture(scope="module")
def images():
    return data.load("digits", split="train", subset="first:130")


@pytest.fixture(scope="module")
def network() -> BaseClassifier:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    return models.wrap(nn.Sequential(*layers), mean=(0.3,), std=(0.4,), name="small")


def table(**settings) -> SigmaTable:
    search = SigmaSearch(ClampedRadius(0.02), step_size=0.01)
    return SigmaTable(**{"sigma0": 0.25, "search": search, "fixed_for": 0.25, **settings})


def trained(network: nn.Module, images, schedule: SigmaTable, on_epoch=None, **settings):
    settings = dict(epochs=4, batch=32, lr=3e-3, validation=0.2, progress=False, schedule=schedule) | settings
    return fit(copy.deepcopy(network), images, FitSettings(**settings), on_epoch=on_epoch)


def test_sigmas_stay_at_first_and_then_move_by_one_step_an_epoch(network, images):
    schedule, seen = table(), []
    done = trained(network, images, schedule, on_epoch=lambda rows: seen.append(schedule.sigmas))
    assert (seen[0] == 0.25).all()  # fixed for the first quarter
    moved = (np.diff(np.stack([np.pad(s, (0, 130 - len(s)), constant_values=0.25) for s in seen]), axis=0) != 0).sum(1)
    assert (moved <= 96).all() and moved.min() > 80  # 104 images for training, in three batches of 32
    assert (schedule.sigmas > 0).all()
    rows = done.rows
    assert rows[0]["sigma"] == pytest.approx(0.25) and rows[-1]["sigma"] != pytest.approx(0.25, abs=1e-4)


def test_the_search_asks_in_eval_mode_and_leaves_the_model_alone(network, images):
    model = copy.deepcopy(network).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generator = generator_for(0, "noise", 3)
    schedule = table(fixed_for=0.0)
    sigma = schedule.for_images(model, images.batch(0, 8), np.arange(8) * 3, progress=0.5, generator=generator)
    assert sigma.shape == (8,) and sigma.dtype == torch.float32 and not sigma.requires_grad
    assert (schedule.sigmas[::3][:8] != 0.25).all() and (schedule.sigmas[1::3] == 0.25).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_resumed_is_uninterrupted(network, images, tmp_path):
    """The table is part of the checkpoint."""

    def stop(rows):
        if len(rows) == 3:
            raise KeyboardInterrupt

    whole_table, first, second = table(), table(), table()
    whole = trained(network, images, whole_table)
    assert trained(network, images, first, out=tmp_path, on_epoch=stop).interrupted
    resumed = trained(network, images, second, out=tmp_path, resume=True)
    assert np.array_equal(whole_table.sigmas, second.sigmas) and not np.array_equal(first.sigmas, second.sigmas)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    again = trained(network, images, second)  # a table is begun anew with a training
    assert again.rows[-1]["loss"] == whole.rows[-1]["loss"]
    with pytest.raises(ValueError, match="schedule was"):
        trained(network, images, table(sigma0=0.5), out=tmp_path, resume=True)


def test_validation_is_at_the_mean_sigma():
    schedule, generator = table(), torch.Generator()
    assert schedule(3, progress=1.0, generator=generator).tolist() == [0.25] * 3
    schedule.restore({"sigmas": torch.tensor([0.2, 0.4])})
    assert schedule(2, progress=1.0, generator=generator).tolist() == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("sigma0", [0.0, -1.0, math.nan])
def test_bad_settings(sigma0):
    with pytest.raises(ValueError, match="above 0"):
        table(sigma0=sigma0)
    with pytest.raises(ValueError, match="fixed_for"):
        table(fixed_for=1.5)
    with pytest.raises(ValueError, match="damaged"):
        table().restore({"sigmas": torch.tensor([0.2, -0.1])})
