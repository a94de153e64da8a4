"""The curve panel: its numbers are those of `certificates`, and its settings move them."""

import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import traitlets

from smoothbook import figures
from smoothbook.panels.curve import (
    STEPS,
    Counts,
    CurvePanel,
    brushed,
    curve_figure,
    curve_frames,
    read_counts,
)
from smoothkit.certify import certificates
from smoothkit.records import RecordError
from smoothkit.types import NoiseForm


@pytest.fixture(scope="module")
def record(kept):
    return kept["digits-vit-0.50-sigma-0.50"]


@pytest.mark.parametrize("alpha", [0.001, 0.2])
@pytest.mark.parametrize("n", [100, 10_000])
def test_certificates_from_counts_are_those_of_the_record(record, alpha, n):
    counts = read_counts(record)
    assert counts.edges == (100, 1000, 10_000) and counts.sigma == 0.5
    mine = counts.certificates(alpha=alpha, n=n)
    theirs = certificates(record, alpha=alpha, n=n)
    pd.testing.assert_frame_equal(mine, theirs[mine.columns.to_list()], check_dtype=False)


def test_an_empty_record_says_what_to_do(half_space, patches, tmp_path):
    from smoothkit.sampling.run import open_run
    from smoothkit.types import StoppingRule

    rule = StoppingRule(n0=10, n=100, alpha=0.001)
    record, _ = open_run(half_space, patches, sigma=0.25, stopping_rule=rule, model_id="half-space")
    with pytest.raises(RecordError, match="no complete image yet"):
        read_counts(record, "mine")


def test_alpha_and_n_move_the_curve(kept, record):
    panel = CurvePanel(record)
    assert panel.n == 10_000 and not panel.error
    for alpha, n in ((0.001, 10_000), (0.3, 1000), (1e-5, 100)):
        panel.alpha, panel.n = alpha, n
        exact = figures.certified_accuracy_points({0.5: certificates(record, alpha=alpha, n=n)})
        trace = panel.figure.data[0]
        assert np.array_equal(trace.x, exact["radius"]) and np.array_equal(trace.y, exact["certified_accuracy"])
        assert panel.figure.layout.meta == {"alpha": alpha, "n": n}
        assert f"n = {n:,}" in panel.figure.layout.title.text
        assert panel.live.content["layout"]["meta"]["alpha"] == alpha


def test_controls_and_settings_move_each_other(record):
    panel = CurvePanel(record)
    panel.n_control.slider.value = 1000
    panel.alpha_control.slider.value = 0.01
    assert (panel.n, panel.alpha) == (1000, 0.01)
    panel.n, panel.alpha, panel.brush = 100, 0.05, (0.1, 0.2)
    assert (panel.n_control.number.value, panel.alpha_control.number.value) == (100, 0.05)
    assert panel.range.value == (0.1, 0.2)
    panel.range.value = (0.1, 0.3)
    assert panel.brush == (0.1, 0.3)
    panel.range.value = (0.0, 0.0)
    assert panel.brush == ()


def test_a_brush_picks_the_images_whose_certificates_end_there(record, digits):
    panel = CurvePanel(record, digits, alpha=0.01)
    panel.live.set_state({"selected": {"x": [0.45, 0.3], "y": [0, 1], "event": 1}})
    assert panel.brush == (0.3, 0.45)
    table = certificates(record, alpha=0.01)
    wanted = table[table["correct"] & (table["radius"] >= 0.3) & (table["radius"] <= 0.45)]
    found = brushed(panel.tables(), panel.brush)
    assert set(found["idx"]) == set(wanted["idx"]) and found["radius"].is_monotonic_increasing
    assert f"{len(wanted)} certificates end between 0.30 and 0.45" in panel.words
    assert panel.words.count("<img") == min(24, len(wanted))
    assert panel.figure.layout.shapes[0].x0 == 0.3
    panel.live.set_state({"selected": {"event": 2}})
    assert panel.brush == () and not panel.figure.layout.shapes and "Drag across" in panel.words


def test_without_pictures_images_have_numbers(record):
    panel = CurvePanel(record, brush=(0.0, 0.1))
    assert "<img" not in panel.words and "image " in panel.words


def test_records_of_one_sigma_go_by_name(record):
    panel = CurvePanel({"a": record, "b": record})
    assert [trace.name for trace in panel.figure.data] == ["a", "b"]


def test_settings_are_checked(record):
    with pytest.raises(traitlets.TraitError, match=r"n must be a block edge, one of 100, 1,000, 10,000; got 500"):
        CurvePanel(record, n=500)
    panel = CurvePanel(record)
    with pytest.raises(traitlets.TraitError, match="brush must be two radii"):
        panel.brush = (0.4, 0.1)
    with pytest.raises(ValueError, match="at least one record"):
        CurvePanel({})


def many(images=10_000, n=100_000) -> Counts:
    rng = np.random.default_rng(0)
    p, index = rng.beta(4, 0.5, images), np.arange(images)
    zeros = np.zeros(images, dtype=np.int64)
    return Counts("many", 0.5, NoiseForm(None), (n,), index, index, zeros, zeros, rng.binomial(n, p)[None])


def test_many_images_are_drawn_with_fewer_steps_and_never_above():
    table = many().certificates(alpha=0.001, n=100_000)
    trace = curve_figure({0.5: table}, alpha=0.001, n=100_000).data[0]
    exact = figures.certified_accuracy_points({0.5: table})
    assert len(trace.x) <= STEPS < len(exact)
    # shape "vh" draws y[i] between x[i - 1] and x[i]: the value there must not pass the exact one anywhere between
    at = exact["radius"].to_numpy()
    drawn = np.asarray(trace.y)[np.searchsorted(np.asarray(trace.x), at, side="left")]
    assert (drawn <= exact["certified_accuracy"].to_numpy()).all()
    assert np.abs(drawn - exact["certified_accuracy"]).max() < 0.02


def test_frames_hold_the_curve_of_each_alpha(record):
    counts = read_counts(record)
    fig = curve_frames({0.5: counts}, n=1000, alphas=(0.5, 0.001))
    assert [frame.name for frame in fig.frames] == ["0.5", "0.001"] and fig.layout.sliders[0].active == 1
    for frame in fig.frames:
        exact = figures.certified_accuracy_points({0.5: counts.certificates(alpha=float(frame.name), n=1000)})
        assert np.array_equal(frame.data[0].y, exact["certified_accuracy"])
    assert fig.layout.xaxis.range[1] >= max(fig.frames[0].data[0].x)
    assert len(json.loads(fig.to_json())["frames"]) == 2 and isinstance(fig, go.Figure)
