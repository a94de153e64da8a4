"""Tasks become batches: every draw once, in order, each beside its own image."""

import numpy as np
import pytest
import torch

from smoothkit import Purpose
from smoothkit.kernels.philox import counter_word
from smoothkit.sampling import batches
from smoothkit.sampling.batches import PADDING, ImagesAtHand, Task, plans
from smoothkit.types import NoiseForm


def at_hand(images: int = 1000) -> ImagesAtHand:
    return ImagesAtHand(lambda i: torch.full((1, 2, 2), float(i)), (1, 2, 2), torch.device("cpu"))


def drawn(tasks, batch, near) -> list[tuple]:
    """(image's value, counter word, sample, task number) of every row that is not padding."""
    found = []
    for plan in plans(tasks, batch, near, ids=range(10_000), scales=np.arange(10_000, dtype=np.float32)):
        assert plan.rows.shape == (3, batch) and (plan.tasks[plan.used :] == PADDING).all()
        assert (plan.rows[0, plan.used :] == PADDING).all() and sum(b - a for _, a, b in plan.parts) == plan.used
        for place, word, sample, task, scale in zip(*plan.rows, plan.tasks, plan.scale, strict=True):
            if task != PADDING:
                image = float(near.tensor[place, 0, 0, 0])
                assert scale == image
                found.append((int(image), int(word), int(sample), int(task)))
        assert plan.complete == max(t for *_, t in found) + (
            found[-1][2] == tasks[found[-1][3]].stop - 1 and found[-1][3] == max(t for *_, t in found)
        )
    return found


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize(
    "ranges", [[(0, 0, 1)], [(3, 5, 30), (0, 0, 7), (3, 0, 5)], [(i, i, i + 1 + i % 3) for i in range(400)]]
)
def test_every_draw_once_and_in_order(ranges, batch):
    tasks = [Task(i, Purpose.ESTIMATE, a, b) for i, a, b in ranges]
    expected = [
        (i, counter_word(Purpose.ESTIMATE, i), sample, number)
        for number, (i, a, b) in enumerate(ranges)
        for sample in range(a, b)
    ]
    assert drawn(tasks, batch, at_hand()) == expected


def test_more_images_in_a_batch_than_are_kept_at_hand(monkeypatch):
    monkeypatch.setattr(batches, "IMAGES_AT_HAND", 3)
    tasks = [Task(i % 8, Purpose.SELECT, i, i + 1) for i in range(20)]
    near = at_hand()
    assert [(i, s) for i, _, s, _ in drawn(tasks, 16, near)] == [(i % 8, i) for i in range(20)]


def test_names_of_noise():
    assert [str(NoiseForm(*x)) for x in ((None,), (255,), (255, True))] == ["float", "grid:255", "exact-grid:255"]
