"""Estimated radii against sigma, the island, and what a selector is said to choose."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import ndtr

from smoothbook.figures import selection as drawn
from smoothbook.sigma.island import Island
from smoothbook.sigma.landscape import found_and_best, radius_landscape
from smoothbook.sigma.reading import selector_in_words
from smoothbook.sigma.search import ClampedRadius, SigmaSearch
from smoothkit import data


class Certain(torch.nn.Module):
    """Class 0 whatever comes, by logits that pass a gradient."""

    def forward(self, images):
        return torch.stack([60.0 + 0 * images.flatten(1).sum(1), 0 * images.flatten(1).sum(1)], dim=1)


def test_where_the_class_is_certain_the_estimate_is_a_multiple_of_sigma():
    images = data.from_arrays(torch.rand(2, 1, 4, 4))
    grid = np.linspace(0.1, 1.0, 10)
    curves, paths = radius_landscape(
        Certain(), images, {"clamped": ClampedRadius(0.02)}, sigma0=0.25, grid=grid, draws=4,
        search=SigmaSearch(steps=7, step_size=1e-3, pilot=4, guard=False), names=["a", "b"],
    )  # fmt: skip
    assert list(curves.columns) == ["objective", "image", "sigma", "value"] and len(curves) == 20
    assert np.allclose(curves["value"], 2.053748910631823 * curves["sigma"], rtol=1e-6)  # Phi^-1(0.98)
    a = paths[paths["image"] == "a"]
    assert a["step"].tolist() == [0, 5, 7] and a["sigma"].iloc[0] == 0.25 and a["sigma"].is_monotonic_increasing
    assert np.allclose(a["value"], 2.053748910631823 * a["sigma"], rtol=1e-6)
    ends = found_and_best(curves, paths)
    assert ends["found"].tolist() == paths[paths["step"] == 7]["sigma"].tolist()
    assert ends["best on the grid"].tolist() == [1.0, 1.0]
    fig = drawn.objectives_figure(curves, paths)
    assert len(fig.data) == 4 and list(fig.data[0].y) == curves[curves["image"] == "a"]["value"].tolist()


def test_the_island_is_exact_and_breaks_a_frozen_radius():
    island = Island()
    assert island.chance(0.75, 0.25) == pytest.approx(ndtr(1.0) - ndtr(-1.0))
    (sigma,), (own,), (radius,) = island.deployed(0.0)
    assert own == 0 and radius > 0.5
    assert (island.chance(np.linspace(0, radius, 500)[:-1], sigma) < 0.5).all()  # true of the frozen classifier
    delta = island.broken(0.0, np.linspace(-0.3, 1.3, 161))
    assert 0.5 < delta < radius and island.deployed(delta)[1] == 1 and sigma > island.deployed(delta)[0]
    assert np.isnan(Island(5.0, 6.0).broken(0.0, np.linspace(-0.3, 0.3, 5)))


def test_what_a_selector_chose_is_said():
    few = pd.DataFrame({
        "sigma": [0.25, 0.5, 0.25], "predict": [1, 2, -1], "sigma_radius": [0.1, 0.4, 0.0], "class_radius": [0.2, 0.3, 0.9],
    })  # fmt: skip
    assert selector_in_words(few) == (
        "sigma 0.25 (2 images), 0.5 (1 images); R_sigma limits 50% of 2 answers, its median is 0.25"
    )
    many = pd.DataFrame({"sigma": np.linspace(0.1, 0.6, 6), "predict": 0})
    assert selector_in_words(many) == "sigma from 0.10 to 0.60, median 0.35"


def test_gains_and_envelopes_are_drawn_as_given():
    pairs = pd.DataFrame({
        "sigma": [0.2, 0.3], "radius": [0.5, 0.1], "radius fixed": [0.4, 0.3], "correct": [True, True],
        "correct fixed": [True, False],
    })  # fmt: skip
    both, one = drawn.gain_figure(pairs, 0.25).data
    assert list(both.y) == pytest.approx([0.1]) and list(one.y) == pytest.approx([-0.2])
    over = pd.DataFrame({"radius": [0.0, 1.0], "envelope": [0.9, 0.1]})
    over.attrs["label"] = "best"
    band = drawn.add_envelope(drawn.gain_figure(pairs, 0.25), over).data[-1]
    assert (band.name, list(band.y)) == ("best", [0.9, 0.1])
    points = pd.DataFrame({"input": [0.0, 0.6], "chance": [0.1, 0.7], "name": ["x", "x + δ"]})
    line = np.array([0.0, 1.0])
    fig = drawn.island_figure(line, np.array([0.1, 0.2]), np.array([0.1, 0.9]), radius=0.7, points=points)
    assert [list(t.y) for t in fig.data] == [[0.1, 0.2], [0.1, 0.9], [0.1, 0.7]]
