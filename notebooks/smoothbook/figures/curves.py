"""Figures: pure functions from tables of certificates to pictures, plotly to look around and matplotlib to print.

A certificate table is a DataFrame with at least the columns `idx, label, predict, radius, correct`; `predict` is
ABSTAIN (-1), with radius 0, where there is no answer. Several tables come as a mapping from sigma, or from a name,
to a table. A sigma has one colour, one dash pattern and one marker in all figures, so that they read in grey too.
Titles use unicode (σ, Φ⁻¹): LaTeX in plotly needs the network.
"""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from smoothbook.figures.show import save_print
from smoothbook.figures.style import (
    _NO_ANSWER,
    _QUIET,
    _STYLES,
    _WRONG,
    RADIUS_AXIS,
    Style,
    _style_of,
    dress,
    sigma_colour,
    sigma_label,
)
from smoothkit.types import ABSTAIN

COLUMNS = ("idx", "label", "predict", "radius", "correct")
ENVELOPE = "best at each radius"

Tables = Mapping[float | str, pd.DataFrame]


# --- certified accuracy ------------------------------------------------------------------------------


def certified_accuracy_points(
    tables: Tables, *, radii: Sequence[float] | None = None, envelope: bool = False
) -> pd.DataFrame:
    """Certified accuracy as numbers: the share of all inputs that are correct, answered and have `radius >= r`.

    It is a step function that falls right after each certified radius. Without `radii` the table holds every step:
    a row is the value up to and at its radius, the first row is radius 0, and the last row, one float above the
    largest radius, is 0.

    Parameters
    ----------
    tables : mapping from sigma or name to certificate table
    radii : sequence of float, optional
        Evaluate at these radii instead.
    envelope : bool
        Add the best value over the tables at each radius. It is a choice made afterwards: the share of alpha that
        such a choice spends is not in the curve.

    Returns
    -------
    DataFrame
        Columns `curve, sigma, radius, certified_accuracy, certified, inputs`; sigma is NaN for named tables.
    """
    tables = _checked_tables(tables)
    certified = {key: _certified_radii(table) for key, table in tables.items()}
    frames = []
    for key, table in tables.items():
        at = _steps(certified[key]) if radii is None else np.asarray(radii, dtype=np.float64)
        frames.append(_points(sigma_label(key), key, at, certified[key], len(table)))
    if envelope:
        at = _steps(np.concatenate(list(certified.values()))) if radii is None else frames[0]["radius"].to_numpy()
        frames.append(_envelope_points(at, [(certified[key], len(table)) for key, table in tables.items()]))
    return pd.concat(frames, ignore_index=True)


def _certified_radii(table: pd.DataFrame) -> np.ndarray:
    counts = table["correct"].to_numpy(dtype=bool) & (table["predict"].to_numpy() != ABSTAIN)
    return np.sort(table["radius"].to_numpy(dtype=np.float64)[counts])


def _steps(certified: np.ndarray) -> np.ndarray:
    if certified.size == 0:
        return np.zeros(1)
    return np.unique(np.concatenate([[0.0], certified, [np.nextafter(certified.max(), np.inf)]]))


def _count_at_least(certified: np.ndarray, at: np.ndarray) -> np.ndarray:
    return certified.size - np.searchsorted(certified, at, side="left")


def _points(curve: str, key: float | str, at: np.ndarray, certified: np.ndarray, inputs: int) -> pd.DataFrame:
    count = _count_at_least(certified, at)
    sigma = math.nan if isinstance(key, str) else float(key)
    columns = {"radius": at, "certified_accuracy": count / inputs, "certified": count, "inputs": inputs}
    return pd.DataFrame({"curve": curve, "sigma": sigma, **columns})


def _envelope_points(at: np.ndarray, curves: list[tuple[np.ndarray, int]]) -> pd.DataFrame:
    best = np.max([_count_at_least(certified, at) / inputs for certified, inputs in curves], axis=0)
    columns = {"radius": at, "certified_accuracy": best, "certified": -1, "inputs": -1}
    return pd.DataFrame({"curve": ENVELOPE, "sigma": math.nan, **columns})


def certified_accuracy_curve(
    tables: Tables, *, envelope: bool = False, title: str = "Certified accuracy", most: int | None = None
) -> go.Figure:
    """Certified accuracy against the radius, one exact step curve for each table.

    With `most` a curve of more steps is drawn with that many of them, at or below the exact one, never above.
    """
    tables = _checked_tables(tables)
    points = certified_accuracy_points(tables, envelope=envelope)
    fig = go.Figure()
    if envelope:  # first, so that it lies below the curves
        best = points[points["curve"] == ENVELOPE]
        line = {"color": "#C9CED6", "width": 9, "shape": "vh"}
        hover = "radius %{x:.4f}<br>best of the curves %{y:.3f}<extra></extra>"
        fig.add_scatter(
            x=best["radius"], y=best["certified_accuracy"], name=ENVELOPE, line=line, mode="lines", hovertemplate=hover
        )
    for position, key in enumerate(tables):
        curve = _fewer_steps(points[points["curve"] == sigma_label(key)], most)
        fig.add_trace(_step_trace(curve, sigma_label(key), _style_of(key, position)))
    dress(fig, title, RADIUS_AXIS, "certified accuracy")
    fig.update_yaxes(range=[0, 1.02], dtick=0.2)
    fig.update_xaxes(range=[0, _nice_end(points["radius"].max())])
    fig.update_layout(
        legend={"x": 0.99, "y": 0.99, "xanchor": "right", "yanchor": "top"}
    )  # the curves fall away from there
    return fig


def _fewer_steps(curve: pd.DataFrame, most: int | None) -> pd.DataFrame:
    """Some of the steps, first and last among them; between two of them the value of the right one is drawn.

    Half of them are spread over the steps, half over the accuracies, so that neither a crowd of steps nor a deep one
    is lost.
    """
    if most is None or len(curve) <= most:
        return curve
    steps = np.linspace(0, len(curve) - 1, most // 2).astype(int)
    depth = -curve["certified_accuracy"].to_numpy()  # increasing
    levels = np.linspace(depth[0], depth[-1], most // 2)
    return curve.iloc[np.union1d(steps, np.searchsorted(depth, levels, side="right") - 1)]


def _step_trace(curve: pd.DataFrame, name: str, style: Style) -> go.Scatter:
    # hover text is rounded down: a certificate must not grow on display
    shown = [f"{math.floor(r * 1e4) / 1e4:.4f}" for r in curve["radius"]]
    return go.Scatter(
        x=curve["radius"],
        y=curve["certified_accuracy"],
        customdata=list(zip(shown, curve["certified"], curve["inputs"], strict=True)),
        name=name,
        mode="lines+markers",
        line={"color": style.colour, "dash": style.dash, "width": 2.2, "shape": "vh"},
        marker={"symbol": style.symbol, "size": 8, "color": style.colour, "maxdisplayed": 8},
        hovertemplate="radius ≥ %{customdata[0]}<br>certified accuracy %{y:.3f} "
        "(%{customdata[1]} of %{customdata[2]})<extra>" + html.escape(name) + "</extra>",
    )


def _nice_end(radius: float) -> float:
    return max(0.1, 1.04 * float(radius))


# --- histograms and votes ----------------------------------------------------------------------------


def radius_histogram(
    tables: pd.DataFrame | Tables, *, bins: int = 24, title: str = "How far the certificates reach"
) -> go.Figure:
    """How many inputs have which radius; wrong answers are hatched, and no answer has its own bar on the left."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    single = isinstance(tables, pd.DataFrame)
    tables = _checked_tables({"certificates": tables} if single else tables)
    top = max(float(table["radius"].max()) for table in tables.values()) or 0.1
    edges = np.linspace(0, top * (1 + 1e-9), bins + 1)
    names = None if single else [sigma_label(key) for key in tables]
    fig = make_subplots(
        rows=len(tables), cols=1, shared_xaxes=True, subplot_titles=names, vertical_spacing=0.12 / len(tables)
    )
    for row, (key, table) in enumerate(tables.items(), start=1):
        for trace in _histogram_traces(
            table, edges, _style_of(key, row - 1).colour, first=row == 1, several=not single
        ):
            fig.add_trace(trace, row=row, col=1)
    dress(fig, title, "", "")
    fig.update_layout(barmode="stack", bargap=0.06, height=120 + 230 * len(tables) if len(tables) > 1 else 430)
    ticks = _round_ticks(top)
    width = edges[1]
    fig.update_xaxes(
        tickvals=[-2 * width, *ticks],
        ticktext=["no<br>answer", *[f"{t:g}" for t in ticks]],
        range=[-3.6 * width, top + width],
        tickangle=0,
    )
    fig.update_xaxes(title_text=RADIUS_AXIS, row=len(tables), col=1)
    fig.update_layout(margin_b=84)  # room for two lines of ticks and the title
    fig.update_yaxes(title_text="inputs", rangemode="tozero")
    return fig


def _histogram_traces(
    table: pd.DataFrame, edges: np.ndarray, colour: str, *, first: bool, several: bool
) -> list[go.Bar]:
    radius, correct = table["radius"].to_numpy(dtype=float), table["correct"].to_numpy(dtype=bool)
    answered = table["predict"].to_numpy() != ABSTAIN
    width = edges[1] - edges[0]
    centres = (edges[:-1] + edges[1:]) / 2
    kinds = [
        ("correct, in σ’s colour" if several else "correct", correct & answered, colour, ""),
        ("wrong", ~correct & answered, _WRONG, "/"),
    ]
    traces = [
        _bar(name, centres, np.histogram(radius[mask], edges)[0], width, fill, hatch, first)
        for name, mask, fill, hatch in kinds
    ]
    none = np.array([int((~answered).sum())])
    return [*traces, _bar("no answer", np.array([-2 * width]), none, 1.8 * width, _NO_ANSWER, ".", first)]


def _bar(name: str, x: np.ndarray, y: np.ndarray, width: float, colour: str, hatch: str, first: bool) -> go.Bar:
    where = "" if name == "no answer" else f"radius within {width / 2:.3f} of %{{x:.3f}}<br>"
    marker = {"color": colour, "line": {"width": 0}}
    if hatch:
        marker["pattern"] = {"shape": hatch, "fgcolor": "white", "bgcolor": colour, "size": 6, "solidity": 0.25}
    return go.Bar(
        x=x,
        y=y,
        width=np.full(len(x), 0.94 * width),
        name=name,
        legendgroup=name,
        showlegend=first,
        marker=marker,
        hovertemplate=f"{where}%{{y}} inputs<extra>{name}</extra>",
    )


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
    fig.update_layout(showlegend=False, height=380, bargap=0.25)
    return fig


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
    shown = _classes_to_show(counts, most)
    names, votes = [str(class_names[c]) for c in shown], [int(counts[c]) for c in shown]
    winner = int(counts.argmax())
    colours = [(sigma_colour(sigma) if sigma is not None else "#0072B2") if c == winner else _QUIET for c in shown]
    for label, amount in (("all others", int(counts.sum()) - sum(votes)), ("no vote", n - int(counts.sum()))):
        if amount:
            names, votes, colours = [*names, label], [*votes, amount], [*colours, _NO_ANSWER]
    share = np.array(votes) / n
    return go.Bar(
        x=names,
        y=share,
        customdata=votes,
        marker_color=colours,
        error_y=_error_bars(shown, share, limits),
        hovertemplate=f"%{{x}}<br>%{{customdata}} of {n:,} votes (%{{y:.2%}})<extra></extra>",
    )


def _classes_to_show(counts: np.ndarray, most: int) -> list[int]:
    if counts.size <= most:
        return list(range(counts.size))
    return sorted(np.argsort(-counts, kind="stable")[:most].tolist())


def _error_bars(shown: list[int], share: np.ndarray, limits: Mapping[int, tuple[float, float]] | None) -> dict | None:
    if not limits:
        return None
    up, down = np.full(len(share), np.nan), np.full(len(share), np.nan)
    for position, cls in enumerate(shown):
        if cls in limits:
            low, high = limits[cls]
            down[position], up[position] = share[position] - low, high - share[position]
    return {"type": "data", "array": up, "arrayminus": down, "color": "#222222", "thickness": 1.8, "width": 7}


# --- training and comparing --------------------------------------------------------------------------


def training_curves(rows: pd.DataFrame | Sequence[Mapping], title: str = "Training") -> go.Figure:
    """Loss on the left, accuracies on the right, an epoch a point: the history of a `training.Fitted`."""
    history = pd.DataFrame(rows)
    step = "epoch" if "epoch" in history else "step"
    if step not in history or "loss" not in history:
        raise ValueError(f"rows must have epoch (or step) and loss, got the columns {list(history.columns)}")
    fig = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    curves = (
        ("loss", "loss, training", 0, 1), ("validation_loss", "loss, validation", 1, 1),
        ("accuracy", "noisy, training", 0, 2), ("validation_accuracy", "noisy, validation", 1, 2),
        ("validation_clean_accuracy", "clean, validation", 2, 2),
    )  # fmt: skip
    for column, name, look, panel in curves:
        if column in history:
            fig.add_trace(
                _curve(history[step], history[column], name, _STYLES[look], legend=panel == 2), row=1, col=panel
            )
    dress(fig, title, step, None)
    fig.update_yaxes(title_text="loss", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title_text="accuracy", range=[0, 1.02], row=1, col=2)
    fig.update_layout(height=340, legend={"x": 0.99, "y": 0.04, "xanchor": "right", "yanchor": "bottom"})
    return fig


def _curve(x: pd.Series, y: pd.Series, name: str, style: Style, *, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=x, y=y, name=name, showlegend=legend, mode="lines+markers",
        line={"color": style.colour, "dash": style.dash, "width": 2.2},
        marker={"symbol": style.symbol, "size": 6, "color": style.colour, "maxdisplayed": 10},
    )  # fmt: skip


def difference_figure(differences: pd.DataFrame, reference: str, title: str = "") -> go.Figure:
    """Differences to one row with their intervals, a panel for each radius and one for ACR; 0 is no difference.

    `differences` has the columns row, what, difference, low, high of `smoothkit.reading.compare`.
    """
    missing = [c for c in ("row", "what", "difference", "low", "high") if c not in differences]
    if missing or differences.empty:
        raise ValueError(f"differences lacks {missing or 'rows'}; make it with smoothkit.reading.compare")
    kinds, names = list(dict.fromkeys(differences["what"])), list(dict.fromkeys(differences["row"]))
    heads = [kind if kind == "ACR" else f"at r = {kind}" for kind in kinds]
    fig = make_subplots(rows=1, cols=len(kinds), shared_yaxes=True, subplot_titles=heads, horizontal_spacing=0.03)
    for panel, kind in enumerate(kinds, start=1):
        for name in names:
            part = differences[(differences["what"] == kind) & (differences["row"] == name)]
            fig.add_trace(_difference(part, name), row=1, col=panel)
        fig.add_vline(x=0, line={"color": "#444444", "width": 1, "dash": "dot"}, row=1, col=panel)
    dress(fig, title or f"Difference to {reference}, with 95% intervals", None, None)
    fig.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names)
    fig.update_xaxes(nticks=3, tickangle=0, zeroline=False)
    fig.update_layout(showlegend=False, height=150 + 44 * len(names), margin_l=24, margin_t=96)
    fig.update_yaxes(automargin=True)
    return fig


def _difference(part: pd.DataFrame, name: str) -> go.Scatter:
    """Filled and blue where the interval leaves 0 on one side, open and grey where it does not."""
    clear = ((part["low"] > 0) | (part["high"] < 0)).to_numpy()
    colour = "#0072B2" if clear.all() else "#6B7785"
    error = {"type": "data", "array": part["high"] - part["difference"], "arrayminus": part["difference"] - part["low"]}
    return go.Scatter(
        x=part["difference"], y=[name] * len(part), name=name, mode="markers",
        marker={"size": 10, "color": colour, "symbol": "circle" if clear.all() else "circle-open", "line": {"width": 2}},
        error_x={**error, "color": colour, "thickness": 1.8, "width": 5},
        customdata=part[["low", "high"]].to_numpy(),
        hovertemplate="%{x:+.3f}, from %{customdata[0]:+.3f} to %{customdata[1]:+.3f}<extra>" + html.escape(name) + "</extra>",
    )  # fmt: skip


# --- print figures -----------------------------------------------------------------------------------


def certified_accuracy_print(
    tables: Tables, *, envelope: bool = False, title: str = "", size: tuple[float, float] = (5.2, 3.4)
) -> Figure:
    """The certified-accuracy curves as a matplotlib figure of `size` inches, wider with a long legend; no pyplot, so safe in any thread."""
    tables = _checked_tables(tables)
    points = certified_accuracy_points(tables, envelope=envelope)
    fig = Figure(figsize=size, layout="constrained")
    ax = fig.add_subplot()
    if envelope:
        best = points[points["curve"] == ENVELOPE]
        ax.step(best["radius"], best["certified_accuracy"], where="pre", color="#C9CED6", linewidth=5, label=ENVELOPE)
    for position, key in enumerate(tables):
        style, label = _style_of(key, position), sigma_label(key)
        curve = points[points["curve"] == label]
        ax.step(
            curve["radius"],
            curve["certified_accuracy"],
            where="pre",
            label=label,
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
            markersize=4.5,
            markevery=0.12,
            linewidth=1.5,
        )
    ax.set(xlabel=RADIUS_AXIS, ylabel="certified accuracy", ylim=(0, 1), xlim=(0, _nice_end(points["radius"].max())))
    ax.set_title(title, loc="left", fontsize=11)
    ax.grid(color="#E3E7EC", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if len(tables) <= 4:
        ax.legend(frameon=False, handlelength=3.2)
    else:  # it would lie on the curves
        fig.legend(frameon=False, handlelength=3.2, loc="outside right upper", fontsize="small")
        fig.set_size_inches(size[0] + 2.2, size[1])
    return fig


def print_certified_accuracy(tables: Tables, path: str | Path, *, envelope: bool = False, title: str = "") -> Path:
    """Write the curves to `path` (.svg, .pdf or .png), the same bytes each time, and the numbers to a CSV beside it."""
    fig = certified_accuracy_print(tables, envelope=envelope, title=title)
    return save_print(fig, path, certified_accuracy_points(tables, envelope=envelope))


# --- checks ------------------------------------------------------------------------------------------


def _checked_tables(tables: Tables) -> dict[float | str, pd.DataFrame]:
    if not isinstance(tables, Mapping) or not tables:
        raise ValueError(f"tables must map a sigma or a name to a certificate table, got {type(tables).__name__}")
    for key, table in tables.items():
        _check_table(sigma_label(key), table)
    return {key if isinstance(key, str) else float(key): table for key, table in tables.items()}


def _check_table(label: str, table: pd.DataFrame) -> None:
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise ValueError(f"table {label!r} lacks the columns {missing}; it has {list(table.columns)}")
    radius = table["radius"].to_numpy(dtype=np.float64)
    if len(radius) == 0:
        raise ValueError(f"table {label!r} is empty; certified accuracy is a share of its rows")
    if not (np.isfinite(radius) & (radius >= 0)).all():
        raise ValueError(f"table {label!r} must have finite radii, at least 0, got {radius.min()} to {radius.max()}")
