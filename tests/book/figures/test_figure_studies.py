"""Figures of single notebooks show the numbers they are given."""

import pandas as pd

from smoothbook import figures
from smoothbook.figures import studies


def certificates(radii: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"idx": range(len(radii)), "label": 0, "predict": 0, "radius": radii, "correct": True})


def test_certification():
    parts = pd.DataFrame({"part": ["noise", "forward pass"], "share": [0.25, 0.75]})
    (bars,) = studies.parts_of_a_batch(parts, 100).data
    assert list(bars.x) == [0.25, 0.75] and list(bars.text) == ["25.0%", "75.0%"]
    caps = pd.DataFrame({"n": [10, 100], "α = 0.01": [0.3, 1.7], "α = 0.001": [0.1, 1.5]})
    fig = studies.largest_radius(caps)
    assert [t.name for t in fig.data] == ["α = 0.01", "α = 0.001"] and list(fig.data[1].y) == [0.1, 1.5]
    exact = pd.DataFrame({"p_a": [0.6, 0.9], "draws": [50.0, 800.0]})
    fig = studies.samples_to_decide(exact, 0.25, 0.5, 1_000, 0.69)
    assert list(fig.data[0].y) == [50.0, 800.0]
    assert [(line.y0, line.x0) for line in fig.layout.shapes] == [(1_000, 0), (0, 0.69)]  # n_max, and what r needs


def test_a_sigma_keeps_its_colour():
    points = pd.DataFrame({"model": ["a", "a", "b"], "sigma": [0.0, 0.5, 0.5], "accuracy": [1.0, 0.4, 0.8]})
    styles = [figures.sigma_style(0.0), figures.sigma_style(0.25)]
    fig = studies.accuracy_under_noise(points, styles, chance=0.1)
    assert [list(t.y) for t in fig.data] == [[1.0, 0.4], [0.8]]
    assert fig.data[1].line.color == figures.sigma_colour(0.25)
    frame = pd.DataFrame({"sigma": [0.5, 0.25], "label": "x", "trained": [10, 100], "accuracy": [0.1, 0.2]})
    fig = studies.parameters_against_accuracy(frame, 0.25, 1_000)
    assert [t.marker.color for t in fig.data] == [figures.sigma_colour(0.25), figures.sigma_colour(0.5)]
    assert [(*t.x, *t.y) for t in fig.data] == [(100, 0.2), (10, 0.1)]


def test_curves_of_training():
    cosines = pd.DataFrame({"displaced": ["a", "b"], "queries": 2_000, "mean": [0.1, 0.6], "std": [0.02, 0.03]})
    fig = studies.gradient_for_questions(cosines)
    assert [(*t.y, *t.error_y.array) for t in fig.data] == [(0.1, 0.02), (0.6, 0.03)]
    assert list(fig.layout.xaxis.ticktext) == ["2,000"]
    fig = studies.feature_lengths(pd.DataFrame({"epoch": [0, 1], "frozen": [9.0, 9.0], "adapter": [0.0, 4.0]}))
    assert [list(t.y) for t in fig.data] == [[9.0, 9.0], [0.0, 4.0]]
    watched = pd.DataFrame({"rate": [0.1, 0.1, 0.2], "sigma": [0.0, 0.5, 0.5], "epoch": 1, "accuracy": [0.9, 0.3, 0.2]})
    fig = studies.forgetting(watched)
    assert [(t.name, t.line.dash, *t.y) for t in fig.data] == [
        ("σ = 0, rate 0.1", "solid", 0.9),
        ("σ = 0.5, rate 0.1", "solid", 0.3),
        ("σ = 0.5, rate 0.2", "dash", 0.2),
    ]


def test_an_envelope_is_the_best_at_each_radius():
    rows = {
        "one": {0.25: certificates([0.2, 0.2]), 0.5: certificates([0.1, 0.6])},
        "two": {0.25: certificates([0.3, 0.3])},
    }
    points = studies.envelope_points(rows)
    one = points[points.row == "one"].set_index("radius").certified_accuracy
    assert (one[0.2], one[0.6]) == (1.0, 0.5)
    assert [t.name for t in studies.envelopes(points, "").data] == ["one", "two"]
