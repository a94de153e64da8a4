"""Noisy copies to look at, and how estimated slopes are held against the true gradient."""

import pytest
import torch
from torch import nn

from smoothbook import adapters, tables
from smoothbook.training.estimates import gradient_cosines
from smoothbook.training.pilot import pilot_accuracy, pilot_answers, pilot_copies
from smoothkit import Purpose, data, models, noisy_copies


@pytest.fixture(scope="module")
def few():
    return data.load("digits", subset="first:4")


def test_copies_are_draws_of_their_own(few):
    copies = pilot_copies(few, 0.25, copies=3, seed=1)
    known = dict(sigma=0.25, seed=1, start=0, stop=3, image_id=few.ids[2], grid=few.grid)
    assert torch.equal(copies[6:9], noisy_copies(few[2], purpose=Purpose.PILOT, **known))
    assert not torch.equal(copies[6:9], noisy_copies(few[2], purpose=Purpose.ESTIMATE, **known))
    assert torch.equal(pilot_copies(few, 0.0, copies=2)[2:4], few[1].expand(2, -1, -1, -1))


def test_answers_stand_in_the_line_of_their_image(few):
    class Labelled(nn.Module):
        """Right for all images but the last; it tells them by their mean."""

        def forward(self, x):
            means = torch.stack([few[i].mean() for i in range(len(few))])
            nearest = (x.mean(dim=(1, 2, 3))[:, None] - means).abs().argmin(dim=1)
            right = torch.from_numpy(few.labels)[nearest]
            return nn.functional.one_hot(torch.where(nearest == 3, (right + 1) % 10, right), 10).float()

    assert pilot_answers(Labelled(), few, 0.0, copies=2).shape == (4, 2)
    assert pilot_accuracy(Labelled(), few, 0.0, copies=2) == 0.75


@pytest.mark.slow
def test_a_question_for_each_image_buys_more_of_the_gradient():
    """What notebook 21 says of its coordinator: all weights at once give about sqrt(k / d), each image by itself more."""
    row, base = tables.open("peft").rows["coordinator-0.25"], models.load("starter:digits-vit-clean")
    trial = adapters.coordinator(base, base, image_shape=(1, 8, 8), **row.adapter)
    train = data.load("digits", split="train").take("first:128")
    labels = torch.from_numpy(train.labels)
    found = gradient_cosines(trial, base, train.batch(), labels, 0.25, directions=(16,), estimates=3)
    assert found.queries.tolist() == [2 * 16 * 128] * 2 and found.attrs["pixels"] == 64
    weights, images = found.set_index("displaced")["mean"][["all weights at once", "each image by itself"]]
    assert weights == pytest.approx((16 / found.attrs["weights"]) ** 0.5, abs=0.05) and images > 3 * weights
