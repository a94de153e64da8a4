"""Bars: how many inputs have which radius, and how many votes each class has."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from smoothbook.figures.curves import Tables, check_tables
from smoothbook.figures.style import NO_ANSWER, QUIET, RADIUS_AXIS, WRONG, dress, sigma_colour, sigma_label, style_of
from smoothkit.types import ABSTAIN, round_down


def radius_histogram(
    tables: pd.DataFrame | Tables, *, bins: int = 24, title: str = "How far the certificates reach"
) -> go.Figure:
    """How many inputs have which radius; wrong answers are hatched, and no answer has its own bar on the left."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    single = isinstance(tables, pd.DataFrame)
    tables = check_tables({"certificates": tables} if single else tables)
    top = max(float(table["radius"].max()) for table in tables.values()) or 0.1
    edges = np.linspace(0, top * (1 + 1e-9), bins + 1)
    names = None if single else [sigma_label(key) for key in tables]
    fig = make_subplots(
        rows=len(tables), cols=1, shared_xaxes=True, subplot_titles=names, vertical_spacing=0.12 / len(tables)
    )
    for row, (key, table) in enumerate(tables.items(), start=1):
        correct = "correct" if single else "correct, in σ’s colour"
        for bar in _histogram_bars(table, edges, correct, style_of(key, row - 1).colour):
            fig.add_trace(bar.update(showlegend=row == 1), row=row, col=1)
    dress(fig, title)
    height = 430 if len(tables) == 1 else 120 + 230 * len(tables)
    fig.update_layout(barmode="stack", bargap=0.06, height=height, margin_b=84)  # two lines of ticks and the title
    ticks, width = _round_ticks(top), edges[1]
    fig.update_xaxes(
        tickvals=[-2 * width, *ticks], ticktext=["no<br>answer", *[f"{t:g}" for t in ticks]], tickangle=0,
        range=[-3.6 * width, top + width],
    )  # fmt: skip
    fig.update_xaxes(title_text=RADIUS_AXIS, row=len(tables), col=1)
    return fig.update_yaxes(title_text="inputs", rangemode="tozero")


def _histogram_bars(table: pd.DataFrame, edges: np.ndarray, correct: str, colour: str) -> list[go.Bar]:
    radius, right = table["radius"].to_numpy(dtype=float), table["correct"].to_numpy(dtype=bool)
    answered = table["predict"].to_numpy() != ABSTAIN
    width, centres = edges[1], (edges[:-1] + edges[1:]) / 2
    bins = [f"radius from {round_down(a)} to {round_down(b)}<br>" for a, b in itertools.pairwise(edges)]
    return [
        _bar(correct, centres, np.histogram(radius[right & answered], edges)[0], 0.94 * width, colour, "", bins),
        _bar("wrong", centres, np.histogram(radius[~right & answered], edges)[0], 0.94 * width, WRONG, "/", bins),
        _bar("no answer", [-2 * width], [int((~answered).sum())], 1.7 * width, NO_ANSWER, ".", [""]),
    ]


def _bar(name: str, x, y, width: float, colour: str, hatch: str, bins: list[str]) -> go.Bar:
    pattern = {"shape": hatch, "fgcolor": "white", "bgcolor": colour, "size": 6, "solidity": 0.25} if hatch else None
    return go.Bar(
        x=x, y=y, width=np.full(len(x), width), name=name, legendgroup=name, customdata=bins,
        marker={"color": colour, "line": {"width": 0}, "pattern": pattern},
        hovertemplate=f"%{{customdata}}%{{y}} inputs<extra>{name}</extra>",
    )  # fmt: skip


def _round_ticks(top: float) -> np.ndarray:
    step = 10.0 ** math.floor(math.log10(top))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if top / s <= 8)
    return np.round(np.arange(0, top + step / 2, step), 10)


def votes_figure(
    counts: Sequence[int],
    class_names: Sequence[str],
    n: int,
    title: str = "Votes",
    *,
    limits: Mapping[int, tuple[float, float]] | None = None,
    sigma: float | None = None,
    most: int = 12,
) -> go.Figure:
    """The votes of one image as bars, the winner in colour; the line at one half is what a certificate must pass.

    `limits` maps a class to a lower and an upper confidence limit on its probability. Of many classes only the
    `most` voted for are shown; the rest, and copies that voted for nobody, get bars of their own.
    """
    fig = go.Figure(votes_trace(counts, class_names, n, limits=limits, sigma=sigma, most=most))
    fig.add_hline(y=0.5, line={"color": "#444444", "dash": "dot", "width": 1.5})
    dress(fig, title, "class", f"share of {n:,} votes")
    fig.update_xaxes(type="category", showgrid=False)
    fig.update_yaxes(range=[0, 1.02], dtick=0.25)
    return fig.update_layout(showlegend=False, height=380, bargap=0.25)


def votes_trace(
    counts: Sequence[int],
    class_names: Sequence[str],
    n: int,
    *,
    limits: Mapping[int, tuple[float, float]] | None = None,
    sigma: float | None = None,
    most: int = 12,
) -> go.Bar:
    """The bars of `votes_figure` alone."""
    counts = np.asarray(counts, dtype=np.int64)
    if counts.ndim != 1 or len(class_names) != counts.size:
        raise ValueError(f"class_names must name the {counts.size} classes of counts, got {len(class_names)} names")
    if (counts < 0).any() or most < 1:
        raise ValueError(f"counts must be at least 0 and most at least 1, got {counts.tolist()} and {most}")
    if n < max(1, int(counts.sum())):
        raise ValueError(f"n must be at least 1 and at least the number of votes {int(counts.sum())}, got {n}")
    shown = sorted(np.argsort(-counts, kind="stable")[:most].tolist())
    names, votes = [str(class_names[c]) for c in shown], [int(counts[c]) for c in shown]
    winner = "#0072B2" if sigma is None else sigma_colour(sigma)
    colours = [winner if c == counts.argmax() else QUIET for c in shown]
    for label, amount in (("all others", int(counts.sum()) - sum(votes)), ("no vote", n - int(counts.sum()))):
        if amount:
            names, votes, colours = [*names, label], [*votes, amount], [*colours, NO_ANSWER]
    share = np.array(votes) / n
    return go.Bar(
        x=names, y=share, customdata=votes, marker_color=colours, error_y=_error_bars(shown, share, limits or {}),
        hovertemplate=f"%{{x}}<br>%{{customdata}} of {n:,} votes (%{{y:.2%}})<extra></extra>",
    )  # fmt: skip


def _error_bars(shown: list[int], share: np.ndarray, limits: Mapping[int, tuple[float, float]]) -> dict | None:
    up, down = np.full(len(share), np.nan), np.full(len(share), np.nan)
    for position, c in enumerate(shown):
        if c in limits:
            low, high = limits[c]
            down[position], up[position] = share[position] - low, high - share[position]
    look = {"type": "data", "color": "#222222", "thickness": 1.8, "width": 7}
    return {**look, "array": up, "arrayminus": down} if limits else None
