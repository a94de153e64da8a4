"""Figures of several noise levels draw the numbers they are given."""

import math

import numpy as np
import pandas as pd

from smoothbook import figures
from smoothbook.figures import scales as drawn

NAN = math.nan


def test_votes_have_the_colour_of_their_sigma():
    fig = drawn.votes_by_scale({0.25: [0.9, 0.1], 0.5: [0.4, 0.6]}, "Votes")
    assert [list(t.y) for t in fig.data] == [[0.9, 0.1], [0.4, 0.6]]
    assert [t.marker.color for t in fig.data] == [figures.sigma_colour(s) for s in (0.25, 0.5)]


def test_every_image_rests_on_one_scale_or_none():
    rules = {"cascade": pd.DataFrame({"scale": [0.5, 0.25, NAN]}), "max": pd.DataFrame({"scale": [0.25, 0.25, 0.5]})}
    counts = drawn.halting_counts(rules, [0.25, 0.5])
    assert counts.loc["cascade"].tolist() == [1, 1, 1] and counts.loc["max"].tolist() == [2, 1, 0]
    fig = drawn.halting_figure(counts)
    assert [(t.name, list(t.y)) for t in fig.data] == [("σ = 0.25", [1, 2]), ("σ = 0.5", [1, 1]), ("none", [1, 0])]


def test_failures_have_a_panel_each():
    rates = pd.DataFrame({
        "row": ["a", "b", "a", "b"], "sigma": [0.25, 0.25, 0.5, 0.5], "over_smoothing": [0.1, 0.2, 0.3, 0.4],
        "over_confidence": [0.0, 0.0, 0.0, 0.05],
    })  # fmt: skip
    fig = drawn.failures_figure(rates)
    assert [list(t.x) for t in fig.data] == [[0.1, 0.2], [0.3, 0.4], [0.0, 0.0], [0.0, 0.05]]
    assert [bool(t.showlegend) for t in fig.data] == [True, True, False, False]
    assert np.isclose(fig.layout.xaxis.range[1], 0.44)


def test_psnr_and_votes_are_a_point_an_image():
    points = pd.DataFrame({"sigma": [0.25, 0.5], "denoised": [20.0, 15.0], "votes": [0.9, 0.4]})
    assert [(list(t.x), list(t.y)) for t in drawn.psnr_figure(points).data] == [([20.0], [0.9]), ([15.0], [0.4])]
