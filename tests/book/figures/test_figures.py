"""Figures: the numbers in them, the look of a sigma, and what is kept on disk."""

import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from smoothbook import figures
from smoothbook.figures.show import figure_numbers, plotly_div


def table(radius, correct=None, predict=None) -> pd.DataFrame:
    n = len(radius)
    predict = np.zeros(n, int) if predict is None else predict
    correct = np.ones(n, bool) if correct is None else correct
    return pd.DataFrame({"idx": range(n), "label": 0, "predict": predict, "radius": radius, "correct": correct})


@pytest.fixture
def small() -> pd.DataFrame:
    # two certified at 0.3, one at 0.5, one wrong at 0.9, one without an answer
    return table([0.3, 0.5, 0.3, 0.9, 0.0], correct=[True, True, True, False, True], predict=[1, 1, 1, 1, -1])


# --- one sigma, one look ---


def test_a_sigma_has_one_colour_everywhere(small):
    alone = figures.certified_accuracy_curve({0.5: small})
    among = figures.certified_accuracy_curve({0.12: small, 0.25: small, 0.5: small})
    assert alone.data[0].line.color == among.data[2].line.color == figures.sigma_colour(0.5)
    assert figures.radius_histogram({0.5: small}).data[0].marker.color == figures.sigma_colour(0.5)
    assert figures.votes_figure([3, 1], ["a", "b"], 4, sigma=0.5).data[0].marker.color[0] == figures.sigma_colour(0.5)


def test_many_names_have_many_looks(small):
    fig = figures.certified_accuracy_curve({f"row {i}": small for i in range(16)})
    looks = {(t.line.color, t.line.dash, t.marker.symbol) for t in fig.data if t.name}
    assert len(looks) == 16


def test_usual_sigmas_differ_in_colour_dash_and_marker():
    styles = [figures.sigma_style(sigma) for sigma in (0, 0.12, 0.25, 0.5, 1.0)]
    for what in ("colour", "dash", "symbol"):
        assert len({getattr(style, what) for style in styles}) == len(styles), what


def test_other_sigmas_get_a_colour_from_their_value_alone():
    others = [0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.75, 1.5, 2.0]
    colours = [figures.sigma_colour(sigma) for sigma in others]
    assert colours == [figures.sigma_colour(sigma) for sigma in others]
    assert len(set(colours)) == len(others)
    assert figures.sigma_colour(0.1 + 0.2) == figures.sigma_colour(0.3)  # not another colour for a last bit
    with pytest.raises(ValueError, match=r"sigma must be a finite number, at least 0, got -1"):
        figures.sigma_colour(-1)


# --- certified accuracy ---


def test_points_are_the_exact_steps(small):
    points = figures.certified_accuracy_points({0.5: small})
    assert points["radius"].tolist() == [0.0, 0.3, 0.5, np.nextafter(0.5, 1)]
    assert points["certified"].tolist() == [3, 3, 1, 0]
    assert points["certified_accuracy"].tolist() == [0.6, 0.6, 0.2, 0.0]


def test_points_agree_with_the_definition():
    rng = np.random.default_rng(0)
    radius = np.round(rng.gamma(2, 0.3, 60), 2)  # ties
    predict = rng.integers(-1, 3, 60)
    radius[predict == -1] = 0
    drawn = table(radius, correct=rng.random(60) < 0.7, predict=predict)
    at = np.linspace(0, 2, 41)
    got = figures.certified_accuracy_points({0.25: drawn}, radii=at)["certified_accuracy"]
    for r, value in zip(at, got, strict=True):
        assert value == (drawn["correct"] & (drawn["predict"] != -1) & (drawn["radius"] >= r)).mean()


def test_the_curve_is_left_continuous(small):
    """plotly's vh draws y[i] between x[i - 1] and x[i]: the value at a radius still counts that radius."""
    curve = figures.certified_accuracy_curve({0.5: small}).data[0]
    assert curve.line.shape == "vh"
    assert figures.certified_accuracy_print({0.5: small}).axes[0].lines[0].get_drawstyle() == "steps-pre"


def test_envelope_is_the_best_at_each_radius(small):
    other = table([0.1, 0.1, 0.1, 0.1, 0.1])
    best = figures.certified_accuracy_points({0.12: other, 0.5: small}, envelope=True)
    best = best[best["curve"] == figures.ENVELOPE].set_index("radius")["certified_accuracy"]
    assert best[0.0] == best[0.1] == 1.0
    assert best[0.3] == 0.6
    assert best.iloc[-1] == 0.0


def test_axes_say_their_units_and_start_at_zero(small):
    fig = figures.certified_accuracy_curve({0.5: small, "MACER": small}, envelope=True)
    assert fig.layout.xaxis.title.text == "L2 radius, pixel units on [0, 1]"
    assert fig.layout.yaxis.title.text == "certified accuracy"
    assert fig.layout.yaxis.range[0] == 0 and fig.layout.xaxis.range[0] == 0
    assert [trace.name for trace in fig.data] == [figures.ENVELOPE, "σ = 0.5", "MACER"]


def test_hover_never_shows_a_larger_radius():
    curve = figures.certified_accuracy_curve({0.5: table([0.123499999])}).data[0]
    assert all(float(shown) <= r for (shown, *_), r in zip(curve.customdata, curve.x, strict=True))


@pytest.mark.parametrize("kind", ["none certified", "one row"])
def test_small_tables(kind):
    drawn = table([0.0, 0.0], predict=[-1, -1]) if kind == "none certified" else table([0.4])
    assert figures.certified_accuracy_points({1.0: drawn})["certified_accuracy"].iloc[0] == (kind == "one row")
    figures.certified_accuracy_curve({1.0: drawn}, envelope=True)
    figures.radius_histogram({1.0: drawn})
    figures.certified_accuracy_print({1.0: drawn}, envelope=True)


def test_tables_are_checked(small):
    with pytest.raises(ValueError, match=r"lacks the columns \['radius'\]"):
        figures.certified_accuracy_curve({0.5: small.drop(columns="radius")})
    with pytest.raises(ValueError, match="is empty"):
        figures.certified_accuracy_curve({0.5: small.head(0)})
    with pytest.raises(ValueError, match="finite radii"):
        figures.certified_accuracy_curve({0.5: table([np.nan])})
    with pytest.raises(ValueError, match="tables must map a sigma or a name"):
        figures.certified_accuracy_curve(small)


# --- histogram, votes, pictures ---


def test_histogram_counts_every_input_once(small):
    fig = figures.radius_histogram(small)
    counts = {trace.name: int(np.sum(trace.y)) for trace in fig.data}
    assert counts == {"correct": 3, "wrong": 1, "no answer": 1}
    several = figures.radius_histogram({0.25: small, 0.5: small})
    assert sum(int(np.sum(trace.y)) for trace in several.data) == 2 * len(small)


def test_votes_bars_add_up_to_n():
    fig = figures.votes_figure([3, 0, 90], ["cat", "dog", "bird"], 100, limits={2: (0.8, 0.95)})
    bars = fig.data[0]
    assert list(bars.x) == ["cat", "dog", "bird", "no vote"]
    assert sum(bars.customdata) == 100
    assert bars.error_y.arrayminus[2] == pytest.approx(0.1) and bars.error_y.array[2] == pytest.approx(0.05)
    many = figures.votes_figure(np.arange(1000), [str(i) for i in range(1000)], 499_500, most=5).data[0]
    assert list(many.x) == ["995", "996", "997", "998", "999", "all others"]
    assert sum(many.customdata) == 499_500


def test_votes_are_checked():
    with pytest.raises(ValueError, match="name the 2 classes"):
        figures.votes_figure([1, 2], ["a"], 3)
    with pytest.raises(ValueError, match="at least the number of votes 3, got 2"):
        figures.votes_figure([1, 2], ["a", "b"], 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_clips_and_keeps_square_pixels(channels):
    images = np.random.default_rng(0).normal(0.5, 1, (5, channels, 8, 8))
    fig = figures.image_grid(images, [f"no. {i}" for i in range(5)], 3)
    assert len(fig.data) == 5
    assert [a.text for a in fig.layout.annotations] == [f"no. {i}" for i in range(5)]
    z = np.asarray(fig.data[0].z, dtype=float) / (1 if channels == 1 else 255)
    assert z.min() == 0 and z.max() == 1
    np.testing.assert_allclose(z.reshape(8, 8, -1), images[0].clip(0, 1).transpose(1, 2, 0), atol=1 / 255)
    assert fig.layout.yaxis.scaleanchor == "x" and fig.layout.yaxis5.scaleanchor == "x5"
    assert fig.layout.yaxis.autorange == "reversed"


def test_image_grid_checks_its_input():
    with pytest.raises(ValueError, match=r"shape \[N, C, H, W\] with 1 or 3 channels"):
        figures.image_grid(np.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match="captions must be one a picture, 2, got 1"):
        figures.image_grid(np.zeros((2, 1, 8, 8)), ["a"])


# --- showing and keeping ---


def test_show_keeps_page_numbers_and_figure(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMOOTHKIT_NOTEBOOK", "10_certification")
    fig = figures.certified_accuracy_curve({0.5: small})
    figures.show(fig, "curve", figures_dir=tmp_path / "figures", caption="A <curve>")
    figures.show(fig, "again", pd.DataFrame({"a": [1]}), figures_dir=tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    kept = {f"{name}.{ending}" for name in ("curve", "again") for ending in ("html", "csv", "json")}
    assert names == kept | {"plotly.min.js"}
    page = (tmp_path / "figures/curve.html").read_text()
    assert len(page) < 60_000 and 'src="plotly.min.js"' in page and "A &lt;curve&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    about = json.loads((tmp_path / "figures/curve.json").read_text())
    assert about["notebook"] == "10_certification" and about["caption"] == "A <curve>"
    assert go.Figure(about["figure"]) == fig
    numbers = pd.read_csv(tmp_path / "figures/curve.csv")
    assert numbers["y"].tolist() == [0.6, 0.6, 0.2, 0.0]
    assert pd.read_csv(tmp_path / "figures/again.csv")["a"].tolist() == [1]
    assert "[figure: A <curve>]" in capsys.readouterr().out


def test_show_without_a_folder_writes_nothing(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures.show(figures.radius_histogram(small), "h")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../up", "a/b", "Übersicht", "a b", "A", "-x", ".hidden"])
def test_show_refuses_names_that_are_no_file_names(name, small, tmp_path):
    with pytest.raises(ValueError, match="name must be"):
        figures.show(figures.radius_histogram(small), name, figures_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_figure_offers_to_upload_itself():
    assert figures.PLOTLY_CONFIG["showSendToCloud"] is False and figures.PLOTLY_CONFIG["plotlyServerURL"] == ""


def test_numbers_of_pictures_can_be_read_back():
    images = np.random.default_rng(1).random((2, 3, 4, 5))
    numbers = figure_numbers(figures.image_grid(images))
    assert len(numbers) == images.size
    first = numbers[(numbers["trace"] == "trace 1") & (numbers["channel"] == 2)]["value"].to_numpy().reshape(4, 5)
    np.testing.assert_array_equal(first, np.rint(255 * images[1, 2]).astype(int))


def test_json_in_a_page_cannot_end_its_script():
    div = plotly_div({"data": [], "layout": {"title": {"text": "</script><!-- x"}}}, "plot")
    assert div.count("</script>") == 1 and "<!--" not in div
    shown = json.loads(div.split('Plotly.newPlot("plot", ')[1].split(");</script>")[0])
    assert shown["layout"]["title"]["text"] == "</script><!-- x"


# --- print ---


@pytest.mark.parametrize("ending", ["svg", "pdf", "png"])
def test_print_writes_the_same_bytes_each_time(ending, small, tmp_path):
    tables = {0.25: small, 0.5: small}
    points = figures.certified_accuracy_points(tables, envelope=True)
    first, second = (
        figures.save_print(figures.certified_accuracy_print(tables, envelope=True), tmp_path / f"{x}.{ending}", points)
        for x in "ab"
    )
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 1000
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a.csv"), points, check_dtype=False)


def test_print_refuses_other_endings(small, tmp_path):
    with pytest.raises(ValueError, match=r"must end in .svg, .pdf or .png"):
        figures.save_print(figures.certified_accuracy_print({0.5: small}), tmp_path / "a.jpg", small)


def test_show_print_keeps_vector_files(small, tmp_path):
    tables = {0.5: small}
    points = figures.certified_accuracy_points(tables)
    figures.show_print(
        figures.certified_accuracy_print(tables), "fig1", points, figures_dir=tmp_path, caption="Figure 1"
    )
    assert {path.name for path in tmp_path.iterdir()} == {f"fig1.{end}" for end in ("svg", "pdf", "png", "csv", "json")}
    assert "<svg" in (tmp_path / "fig1.svg").read_text()
