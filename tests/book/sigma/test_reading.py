"""Three radii kept apart, and a global sigma chosen on other images."""

import numpy as np
import pandas as pd
import pytest

from smoothbook.sigma.memory import Memory
from smoothbook.sigma.reading import READINGS, accuracy_by_reading, best_of_grid, three_radii, through_memory
from smoothkit.reading import envelope
from smoothkit.types import ABSTAIN


def certificates(predict, radius, label=(0, 0, 1, 1), sigma=0.25, ids=None) -> pd.DataFrame:
    n = len(predict)
    predict, label = np.array(predict), np.array(label[:n])
    return pd.DataFrame(
        {
            "idx": range(n), "label": label, "predict": predict, "radius": np.array(radius, dtype=float),
            "correct": predict == label, "sigma": sigma, "key": [str(i) for i in range(n)],
            "image_id": list(range(n)) if ids is None else ids,
        }
    )  # fmt: skip


POINTS = [np.full((1, 1, 1), x, dtype=np.float32) for x in (0.0, 0.25, 1.0, 0.5)]
FROZEN = certificates([0, ABSTAIN, 1, 1], [0.375, 0.0, 0.25, 0.5])


def test_through_a_memory_labels_and_correctness_are_made_anew():
    table = through_memory(Memory(model="toy", shape=(1, 1, 1)), POINTS, FROZEN)
    assert table["predict"].tolist() == [0, 0, 1, 1] and table["case"].tolist() == [0, 4, 0, 3]
    assert table["radius"].tolist() == pytest.approx([0.375, 0.125, 0.25, 0.125])
    assert table["correct"].tolist() == [True, True, True, True] and table["asked"].tolist() == [0, 1, 2, 3]
    backwards = through_memory(Memory(model="toy", shape=(1, 1, 1)), POINTS[::-1], FROZEN[::-1])
    assert backwards["predict"].tolist() == [1, 1, 1, 0] and backwards["correct"].tolist() == [True, True, False, True]
    assert backwards["radius"].tolist()[-1] == 0 and backwards["case"].tolist() == [0, 1, 4, 3]


def test_three_radii_side_by_side():
    memory = through_memory(Memory(model="toy", shape=(1, 1, 1)), POINTS, FROZEN)
    sound = certificates([0, 0, 1, ABSTAIN], [0.1, 0.05, 0.2, 0.0], sigma=0.5)[::-1]  # in another order
    tables = {"frozen": FROZEN, "memory": memory, "sound": sound}
    table = three_radii(tables)
    assert table["sound_radius"].tolist() == [0.1, 0.05, 0.2, 0.0] and (table["sound_sigma"] == 0.5).all()
    assert table["frozen_radius"].tolist() == [0.375, 0.0, 0.25, 0.5] and "radius" not in table
    assert table.attrs["readings"] == READINGS
    shares = accuracy_by_reading(tables, [0.0, 0.1, 0.3])
    assert shares["reading"].tolist() == ["frozen", "memory", "sound"]
    assert shares[["0", "0.1", "0.3"]].to_numpy().tolist() == [[0.75, 0.75, 0.5], [1.0, 1.0, 0.25], [0.75, 0.5, 0.0]]
    assert shares["about"].tolist() == list(READINGS.values())
    with pytest.raises(ValueError, match="other images"):
        three_radii({"frozen": FROZEN, "sound": sound.assign(image_id=[9, 8, 7, 6])})
    for tables, got in (({"best": FROZEN}, "best"), ({}, "none")):
        with pytest.raises(ValueError, match=f"readings must be some of frozen, memory, sound, got {got}"):
            three_radii(tables)


def test_best_sigma_of_a_grid():
    held_out = {0.5: certificates([0, 1, 1, 0], [1, 1, 1, 1]), 0.25: certificates([0, 0, 1, 1], [0.4, 0.4, 0.4, 0.4])}
    assert best_of_grid(held_out).sigma == 0.5  # ACR 0.5 against 0.4
    chosen = best_of_grid(held_out, at=0.25)
    assert (chosen.sigma, chosen.scores, chosen.by) == (0.25, {0.25: 1.0, 0.5: 0.5}, "certified accuracy at 0.25")
    with pytest.raises(ValueError, match="1 held-out images are among those certified"):
        best_of_grid(held_out, certified=[3, 99])
    with pytest.raises(ValueError, match="different images"):
        best_of_grid({**held_out, 1.0: certificates([0], [1.0])})
    with pytest.raises(ValueError, match="at least one sigma"):
        best_of_grid({})
    curve = envelope({f"sigma {s:g}": t for s, t in held_out.items()}, [0.25, 0.75])
    assert curve["envelope"].tolist() == [1.0, 0.5] and "envelope" in curve.attrs["label"]
