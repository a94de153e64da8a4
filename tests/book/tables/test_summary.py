"""Curves side by side: their numbers, differences in words, and a record beside a run only at equal settings."""

import pandas as pd
import pytest
from conftest import ROOT

from smoothbook import tables
from smoothkit import Smoothed, certificates, data, models
from smoothkit.types import ABSTAIN

RECORD = ROOT / "data" / "records" / "digits-vit-0.25-sigma-0.25"


def test_a_summary_counts_all_images_and_rounds_radii_down():
    table = pd.DataFrame({
        "label": [0, 0, 0, 0], "predict": [0, 0, 1, ABSTAIN], "radius": [0.29996, 0.5, 0.7, 0.0],
        "correct": [True, True, False, False],
    })  # fmt: skip
    (line,) = tables.summary({0.25: table}, [0.0, 0.3]).to_dict("records")
    assert line == {
        "curve": "σ = 0.25", "images": 4, "at 0": 0.5, "at 0.3": 0.25, "ACR": "0.199", "largest radius": "0.700",
    }  # fmt: skip


def test_differences_are_said_for_the_radii_asked():
    found = pd.DataFrame({
        "row": ["a", "a", "b"], "what": ["0.5", "ACR", "0.25"], "difference": [0.1, -0.02, 0.3], "low": [0.0, -0.05, 0.2],
        "high": [0.2, 0.01, 0.4], "verdict": ["above", "not told apart", "above"],
    })  # fmt: skip
    assert tables.differences_in_words(found, ["0.5", "ACR"]) == (
        "- a, at radius 0.5: +0.100 [+0.000, +0.200], above\n- a, ACR: -0.020 [-0.050, +0.010], not told apart"
    )


def sampled(sigma: float = 0.25, subset: str = "first:3", model: str = "starter:digits-vit-0.25", **settings):
    images = data.load("digits", subset=subset)
    return Smoothed(models.load(model), sigma).sample(images, n=100, progress=False, **settings)


def test_a_record_stands_beside_a_run_of_its_own_settings():
    live = sampled()
    kept = tables.beside(live, RECORD, alpha=0.001)
    assert kept.certificates["image_id"].tolist() == certificates(live)["image_id"].tolist()
    assert kept.words == "The record digits-vit-0.25-sigma-0.25 is read for the same 3 images, with n = 10,000."


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(sigma=0.5), "sigma 0.5 here, 0.25 there"),
        (dict(model="starter:digits-vit-0.50"), "base classifier "),
        (dict(noise="float"), "noise float here, grid:256 there"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_no_record_of_something_else_stands_beside_a_run(settings, words):
    kept = tables.beside(sampled(**settings), RECORD, alpha=0.001)
    assert kept.certificates is None and words in kept.words


def test_every_image_has_to_be_in_the_record():
    kept = tables.beside(sampled(subset="first:3"), sampled(subset="first:2"), alpha=0.001)
    assert kept.certificates is None and "it lacks 1 of the 3 images" in kept.words
