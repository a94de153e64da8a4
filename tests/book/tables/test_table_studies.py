"""What notebooks read from tables: at every noise level, over seeds, beside live certificates, and what it cost."""

import numpy as np
import pandas as pd
import pytest

from smoothbook import tables
from smoothbook.tables import studies
from smoothkit.reading import paired_bootstrap

PEFT, CERTIFYING, PRETRAINING = (tables.open(name) for name in ("peft", "certifying", "noise-pretraining"))


def certificates(radii: list[float], correct: list[bool] | None = None) -> pd.DataFrame:
    ids = range(len(radii))
    right = [True] * len(radii) if correct is None else correct
    return pd.DataFrame({"image_id": ids, "label": 0, "predict": 0, "radius": radii, "correct": right})


def test_rows_that_are_not_there_are_left_out():
    curves = studies.curves_of(PEFT, ["full-0.25", "no-such-row", "lora-4-0.25"])
    assert list(curves) == ["full noise training", "LoRA, rank 4"]
    assert studies.curves_of(PEFT, ["no-such-row"]) == {}
    named = studies.curves_of(
        CERTIFYING, {"small": "caf-0.50", "none": "no-such-row", "whole": "full-0.50"}, shared=True
    )
    assert list(named) == ["small", "whole"]
    assert named["small"].image_id.tolist() == named["whole"].image_id.tolist()


def test_records_beside_live_certificates_are_of_the_same_images():
    beside = studies.records_beside({"a": certificates([0.1, 0.2, 0.3])}, [0, 2])
    assert list(beside) == ["a, record"] and beside["a, record"].radius.tolist() == [0.1, 0.3]


def test_differences_at_each_sigma():
    low, high = certificates([0.1] * 20), certificates([0.4] * 20)
    curves = {0.25: {"low": low, "high": high}, 0.5: {"high": high}, 1.0: {"low": low, "high": low}}
    found = studies.compare_at_each_sigma(curves, "low", {0.25: [0.25], 1.0: [0.0]})
    assert list(zip(found.sigma, found.what, found.verdict, strict=True)) == [
        (0.25, "0.25", "above"), (0.25, "ACR", "above"), (1.0, "0", "not told apart"), (1.0, "ACR", "not told apart"),
    ]  # fmt: skip
    assert studies.compare_at_each_sigma(curves, "no such row", [0.25]).empty
    shown = studies.format_differences(found[found.sigma == 0.25], 0.25, "low")
    assert shown.iloc[0].tolist() == [0.25, "high", "+1.000 [+1.000, +1.000]", "+0.300 [+0.300, +0.300]", "above"]
    assert list(shown.columns)[2:4] == ["at 0.25, against low", "ACR, against low"]
    assert studies.seen(found, "high", 0.25) == "σ = 0.25: +1.00 [+1.00, +1.00]"
    assert studies.seen(found, "high", 0.25, curves) == "σ = 0.25: 1.00, +1.00 [+1.00, +1.00]"
    assert studies.seen(found, "other", 0.25) == "row not made yet"


def test_one_seed_is_the_paired_bootstrap():
    both = tuple(PEFT[name].certificates for name in ("lora-16-0.25", "full-0.25"))
    (line,) = studies.compare_over_seeds({"0": both}, 0.25).itertuples()
    expected = paired_bootstrap(*both, [0.25]).iloc[0]
    assert (line.difference, line.low, line.high) == pytest.approx((expected.difference, expected.low, expected.high))


def test_the_mean_over_seeds_averages_each_image_first():
    first = [certificates([0.3, 0.3, 0.0, 0.3]), certificates([0.3, 0.0, 0.0, 0.3])]
    second = [certificates([0.3, 0.0, 0.0, 0.0]), certificates([0.0, 0.3, 0.0, 0.3])]
    found = studies.compare_over_seeds(dict(zip("01", zip(first, second, strict=True), strict=True)), 0.25)
    assert found.seed.tolist() == ["0", "1", "mean"]
    assert found.difference.tolist() == pytest.approx([0.5, 0.0, 0.25])
    apart = np.array([0.5, 0.0, 0.0, 0.5])  # of each image, over the seeds
    assert found.low.iloc[-1] >= apart.min() and found.high.iloc[-1] <= apart.max()
    with pytest.raises(ValueError, match="seed 0 are not of the same images"):
        studies.compare_over_seeds({"0": (first[0], second[0].head(2))}, 0.25)


def test_a_training_that_rows_share_is_paid_for_once():
    names = ["mixture-clean-0.25", "mixture-clean-0.50"]
    behind = studies.trainings_behind(PRETRAINING, names)
    assert len(behind) == 2 and {PRETRAINING.rows[n].method for n in behind} == {"full"}  # pretraining, one fine-tuning
    again = PRETRAINING.rows[names[0]].images
    ways = {"one model": names, "a model per σ": ["mixture-sigma-0.25", "mixture-sigma-0.50"], "missing": ["no-such"]}
    costs = studies.cost_of_trainings(PRETRAINING, ways, again).set_index("row")
    assert costs["trainings"].to_dict() == {"one model": 2, "a model per σ": 3}
    assert costs["one more task: trainings"].to_dict() == {"one model": 1, "a model per σ": 2}
    card = PRETRAINING["mixture-clean-0.25"].card
    assert costs["one more task: images seen"]["one model"] == f"{card.steps * card.row.batch:,}"
