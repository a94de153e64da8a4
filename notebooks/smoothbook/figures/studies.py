"""Figures of single notebooks: each draws a table of numbers that its notebook made."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from smoothbook.figures.curves import ENVELOPE, Tables, certified_accuracy_points
from smoothbook.figures.style import RADIUS_AXIS, STYLES, Style, dress, sigma_colour, sigma_label, sigma_style

GUIDE = {"dash": "dot", "color": "#444444"}  # a line that marks a value
TOP_RIGHT = {"x": 0.99, "y": 0.99, "xanchor": "right"}
TOP_LEFT = {"x": 0.02, "y": 0.98}


# --- certification -----------------------------------------------------------------------------------


def parts_of_a_batch(parts: pd.DataFrame, batch: int) -> go.Figure:
    """The share of the time that each part of a batch takes; `parts` as from `bench.batch.time_of_parts`."""
    text = [f"{share:.1%}" for share in parts["share"]]
    fig = go.Figure(go.Bar(x=parts["share"], y=parts["part"], orientation="h", text=text, textposition="outside"))
    dress(fig, f"One batch of {batch}", "share of the time", "")
    fig.update_xaxes(range=[0, 1.12], tickformat=".0%")
    return fig.update_yaxes(autorange="reversed")


def largest_radius(caps: pd.DataFrame) -> go.Figure:
    """The radius of unanimous votes against their number; `caps` has n and a column for each curve, in units of sigma."""
    fig = go.Figure()
    for name, style in zip(caps.columns.drop("n"), STYLES, strict=False):
        fig.add_scatter(x=caps["n"], y=caps[name], name=name, line={"dash": style.dash, "color": style.colour})
    dress(
        fig, "The cap: no votes certify more", "n, samples to estimate p<sub>A</sub>", "largest radius, in units of σ"
    )
    fig.update_xaxes(type="log").update_yaxes(rangemode="tozero")
    return fig.update_layout(legend=TOP_LEFT)


def samples_to_decide(exact: pd.DataFrame, radius: float, sigma: float, n_max: int, p_needed: float) -> go.Figure:
    """Mean samples against p_A, columns p_a and draws; dotted lines mark `n_max` and the p_A that the radius needs."""
    fig = go.Figure(go.Scatter(x=exact["p_a"], y=exact["draws"], line={"color": sigma_colour(sigma)}))
    fig.add_hline(y=n_max, line=GUIDE).add_vline(x=p_needed, line=GUIDE)
    title = f"Samples to decide radius {radius:g} at σ = {sigma:g}"
    dress(fig, title, "p<sub>A</sub>, the probability of the class", "mean number of samples")
    return fig.update_yaxes(type="log", dtick=1)


# --- training ----------------------------------------------------------------------------------------


def accuracy_under_noise(points: pd.DataFrame, styles: Sequence[Style], chance: float) -> go.Figure:
    """Accuracy of base classifiers against the noise level; `points` has model, sigma, accuracy, a style for each model."""
    fig = go.Figure()
    for (name, part), style in zip(points.groupby("model", sort=False), styles, strict=True):
        fig.add_trace(_marked_line(part["sigma"], part["accuracy"], name, style))
    fig.add_hline(
        y=chance, line={"dash": "dot", "color": "#777777"}, annotation_text="chance", annotation_position="bottom left"
    )
    dress(fig, "Accuracy of the base classifier under noise", "σ of the noise, pixel units on [0, 1]", "accuracy")
    return fig.update_yaxes(range=[0, 1.02]).update_layout(legend=TOP_RIGHT)


def parameters_against_accuracy(frame: pd.DataFrame, radius: float, whole: int) -> go.Figure:
    """Certified accuracy at `radius` against trained parameters; `frame` has sigma, label, trained, accuracy."""
    fig = go.Figure()
    for sigma, part in frame.groupby("sigma"):
        style = sigma_style(sigma)
        above = ["top center" if i % 2 else "bottom center" for i in range(len(part))]  # neighbours on two sides
        fig.add_scatter(
            x=part["trained"], y=part["accuracy"], text=part["label"], textposition=above, mode="markers+text",
            name=sigma_label(sigma), marker={"color": style.colour, "symbol": style.symbol, "size": 11}, textfont={"size": 12},
        )  # fmt: skip
    title = f"Certified accuracy at r = {radius:g}"
    dress(fig, title, f"trained parameters, of {whole:,}", "certified accuracy")
    fig.update_xaxes(type="log", range=[2.8, math.log10(whole) + 0.4], dtick=1).update_yaxes(range=[-0.08, 1.02])
    return fig.update_layout(legend={"x": 0.01, "y": 0.99})


def gradient_for_questions(cosines: pd.DataFrame) -> go.Figure:
    """Cosine with the true gradient against questions, as from `training.estimates.gradient_cosines`."""
    fig = go.Figure()
    for (name, part), sigma in zip(cosines.groupby("displaced"), (0.5, 0.25), strict=True):
        line = _marked_line(part["queries"], part["mean"], name, sigma_style(sigma), size=9)
        fig.add_trace(line.update(error_y={"array": part["std"], "thickness": 1.5}))
    title = "How much of the gradient a question buys"
    dress(fig, title, "questions to the box for one estimate", "cosine with the true gradient")
    asked = sorted(cosines["queries"].unique())
    fig.update_xaxes(type="log", tickvals=asked, ticktext=[f"{q:,}" for q in asked])
    return fig.update_yaxes(range=[-0.4, 1]).update_layout(legend=TOP_LEFT)


def feature_lengths(history: pd.DataFrame) -> go.Figure:
    """Mean L2 lengths of frozen and adapter features by epoch; columns epoch, frozen, adapter."""
    fig = go.Figure()
    for part, name, sigma in (("frozen", "|z|, frozen features", 0.0), ("adapter", "|z<sub>a</sub>|, adapter", 0.25)):
        fig.add_trace(_marked_line(history["epoch"], history[part], name, sigma_style(sigma), size=6))
    dress(fig, "Which half is heard?", "epoch", "mean L2 length")
    low_right = {"x": 0.99, "y": 0.04, "xanchor": "right", "yanchor": "bottom"}
    return fig.update_yaxes(rangemode="tozero").update_layout(height=340, legend=low_right)


def forgetting(watched: pd.DataFrame) -> go.Figure:
    """Accuracy by epoch of fine-tuning, a curve for each rate and noise level; columns rate, sigma, epoch, accuracy."""
    fig = go.Figure()
    dashes = dict(zip(watched["rate"].unique(), ("solid", "dash", "dot", "dashdot"), strict=False))
    for (rate, sigma), part in watched.groupby(["rate", "sigma"], sort=False):
        fig.add_scatter(
            x=part["epoch"], y=part["accuracy"], mode="lines", name=f"{sigma_label(sigma)}, rate {rate:g}",
            line={"color": sigma_colour(sigma), "dash": dashes.get(rate, "solid"), "width": 2.2},
        )  # fmt: skip
    title = "Accuracy of the plain network while it is fine-tuned clean"
    dress(fig, title, "epoch", "accuracy, held-back images")
    return fig.update_yaxes(range=[0, 1.02])


def envelope_points(rows: Mapping[str, Tables]) -> pd.DataFrame:
    """The envelope of each row over its noise levels, from its certificate tables by sigma; columns row, radius,
    certified_accuracy."""
    points = {row: certified_accuracy_points(curves, envelope=True) for row, curves in rows.items()}
    best = [found[found["curve"] == ENVELOPE].assign(row=row) for row, found in points.items()]
    return pd.concat(best, ignore_index=True)[["row", "radius", "certified_accuracy"]]


def envelopes(points: pd.DataFrame, title: str) -> go.Figure:
    """Step curves of `envelope_points`, of up to three rows."""
    fig = go.Figure()
    looks = zip(("#000000", "#E69F00", "#CC79A7"), (0.25, 0.5, 1.0), strict=True)
    for (row, part), (colour, sigma) in zip(points.groupby("row", sort=False), looks, strict=False):
        fig.add_scatter(
            x=part["radius"], y=part["certified_accuracy"], name=row, mode="lines",
            line={"color": colour, "dash": sigma_style(sigma).dash, "width": 2.4, "shape": "vh"},
        )  # fmt: skip
    dress(fig, title, RADIUS_AXIS, "certified accuracy")
    return fig.update_yaxes(range=[0, 1.02]).update_layout(legend=TOP_RIGHT)


def _marked_line(x: pd.Series, y: pd.Series, name: str, style: Style, size: int = 8) -> go.Scatter:
    return go.Scatter(
        x=x, y=y, name=name, mode="lines+markers", line={"color": style.colour, "dash": style.dash},
        marker={"symbol": style.symbol, "size": size},
    )  # fmt: skip
