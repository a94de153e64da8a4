"""Curves: certified accuracy against the radius as numbers, to look around in and to print; training; differences.

A certificate table is a DataFrame with at least the columns `idx, label, predict, radius, correct`; `predict` is
ABSTAIN (-1), with radius 0, where there is no answer. Several tables come as a mapping from sigma, or from a name,
to a table. A sigma has one colour, one dash pattern and one marker in all figures, so that they read in grey too.
Titles use unicode (σ, Φ⁻¹): LaTeX in plotly needs the network.
"""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from smoothbook.figures.style import RADIUS_AXIS, STYLES, Style, dress, sigma_label, style_of
from smoothkit.types import ABSTAIN, round_down

COLUMNS = ("idx", "label", "predict", "radius", "correct")
ENVELOPE = "best at each radius"

Tables = Mapping[float | str, pd.DataFrame]


# --- the numbers -------------------------------------------------------------------------------------


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
        Columns `curve, sigma, radius, certified_accuracy, certified, inputs`; sigma is NaN for named tables, and
        `certified` and `inputs`, which count images, are -1 for the envelope.
    """
    tables = check_tables(tables)
    certified = {key: _certified_radii(table) for key, table in tables.items()}
    frames = []
    for key, found in certified.items():
        at = _steps(found) if radii is None else np.asarray(radii, dtype=np.float64)
        count, inputs = _count_at_least(found, at), len(tables[key])
        sigma = math.nan if isinstance(key, str) else key
        frames.append(_points(sigma_label(key), sigma, at, count / inputs, count, inputs))
    if envelope:
        at = _steps(np.concatenate(list(certified.values()))) if radii is None else frames[0]["radius"].to_numpy()
        best = np.max([_count_at_least(found, at) / len(tables[key]) for key, found in certified.items()], axis=0)
        frames.append(_points(ENVELOPE, math.nan, at, best, -1, -1))
    return pd.concat(frames, ignore_index=True)


def _points(curve: str, sigma: float, at, accuracy, certified, inputs: int) -> pd.DataFrame:
    columns = {"radius": at, "certified_accuracy": accuracy, "certified": certified, "inputs": inputs}
    return pd.DataFrame({"curve": curve, "sigma": sigma, **columns})


def _certified_radii(table: pd.DataFrame) -> np.ndarray:
    counts = table["correct"].to_numpy(dtype=bool) & (table["predict"].to_numpy() != ABSTAIN)
    return np.sort(table["radius"].to_numpy(dtype=np.float64)[counts])


def _steps(certified: np.ndarray) -> np.ndarray:
    if certified.size == 0:
        return np.zeros(1)
    return np.unique(np.concatenate([[0.0], certified, [np.nextafter(certified.max(), np.inf)]]))


def _count_at_least(certified: np.ndarray, at: np.ndarray) -> np.ndarray:
    return certified.size - np.searchsorted(certified, at, side="left")


def check_tables(tables: Tables) -> dict[float | str, pd.DataFrame]:
    """The tables, each with its columns, at least one row, and finite radii of at least 0; else ValueError."""
    if not isinstance(tables, Mapping) or not tables:
        raise ValueError(f"tables must map a sigma or a name to a certificate table, got {type(tables).__name__}")
    for key, table in tables.items():
        label, missing = sigma_label(key), [c for c in COLUMNS if c not in table.columns]
        if missing:
            raise ValueError(f"table {label!r} lacks the columns {missing}; it has {list(table.columns)}")
        radius = table["radius"].to_numpy(dtype=np.float64)
        if len(radius) == 0:
            raise ValueError(f"table {label!r} is empty; certified accuracy is a share of its rows")
        if not (np.isfinite(radius) & (radius >= 0)).all():
            raise ValueError(
                f"table {label!r} must have finite radii, at least 0, got {radius.min()} to {radius.max()}"
            )
    return {key if isinstance(key, str) else float(key): table for key, table in tables.items()}


# --- the figures -------------------------------------------------------------------------------------


def certified_accuracy_curve(
    tables: Tables, *, envelope: bool = False, title: str = "Certified accuracy", most: int | None = None
) -> go.Figure:
    """Certified accuracy against the radius, one exact step curve for each table.

    With `most` a curve of more steps is drawn with that many of them, at or below the exact one, never above.
    """
    tables = check_tables(tables)
    points = certified_accuracy_points(tables, envelope=envelope)
    fig = go.Figure()
    if envelope:  # first, so that it lies below the curves
        fig.add_trace(_envelope_trace(points[points["curve"] == ENVELOPE]))
    for position, key in enumerate(tables):
        curve = _fewer_steps(points[points["curve"] == sigma_label(key)], most)
        fig.add_trace(_step_trace(curve, sigma_label(key), style_of(key, position)))
    dress(fig, title, RADIUS_AXIS, "certified accuracy")
    fig.update_yaxes(range=[0, 1.02], dtick=0.2)
    fig.update_xaxes(range=[0, _nice_end(points["radius"].max())])
    corner = {"x": 0.99, "y": 0.99, "xanchor": "right", "yanchor": "top"}  # the curves fall away from there
    return fig.update_layout(legend=corner)


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


def _envelope_trace(best: pd.DataFrame) -> go.Scatter:
    return go.Scatter(
        x=best["radius"], y=best["certified_accuracy"], name=ENVELOPE, mode="lines", customdata=_shown(best["radius"]),
        line={"color": "#C9CED6", "width": 9, "shape": "vh"},
        hovertemplate="radius %{customdata}<br>best of the curves %{y:.3f}<extra></extra>",
    )  # fmt: skip


def _step_trace(curve: pd.DataFrame, name: str, style: Style) -> go.Scatter:
    return go.Scatter(
        x=curve["radius"], y=curve["certified_accuracy"], name=name, mode="lines+markers",
        customdata=list(zip(_shown(curve["radius"]), curve["certified"], curve["inputs"], strict=True)),
        line={"color": style.colour, "dash": style.dash, "width": 2.2, "shape": "vh"},
        marker={"symbol": style.symbol, "size": 8, "color": style.colour, "maxdisplayed": 8},
        hovertemplate="radius ≥ %{customdata[0]}<br>certified accuracy %{y:.3f} "
        "(%{customdata[1]} of %{customdata[2]})<extra>" + html.escape(name) + "</extra>",
    )  # fmt: skip


def _shown(radii: pd.Series) -> list[str]:
    return [round_down(r, 4) for r in radii]


def _nice_end(radius: float) -> float:
    return max(0.1, 1.04 * float(radius))


def certified_accuracy_print(
    tables: Tables, *, envelope: bool = False, title: str = "", size: tuple[float, float] = (5.2, 3.4)
) -> Figure:
    """The curves as a matplotlib figure of `size` inches, wider with a long legend; no pyplot, so safe in any thread."""
    tables = check_tables(tables)
    points = certified_accuracy_points(tables, envelope=envelope)
    fig = Figure(figsize=size, layout="constrained")
    ax = fig.add_subplot()
    if envelope:
        best = points[points["curve"] == ENVELOPE]
        ax.step(best["radius"], best["certified_accuracy"], where="pre", color="#C9CED6", linewidth=5, label=ENVELOPE)
    for position, key in enumerate(tables):
        style, label = style_of(key, position), sigma_label(key)
        curve = points[points["curve"] == label]
        ax.step(
            curve["radius"], curve["certified_accuracy"], where="pre", label=label, color=style.colour, linewidth=1.5,
            linestyle=style.line, marker=style.marker, markersize=4.5, markevery=0.12,
        )  # fmt: skip
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


# --- training and comparing --------------------------------------------------------------------------


def training_curves(rows: pd.DataFrame | Sequence[Mapping], title: str = "Training") -> go.Figure:
    """Loss on the left, accuracies on the right, an epoch a point: the history of a `training.Fitted`."""
    history = pd.DataFrame(rows)
    step = "epoch" if "epoch" in history else "step"
    if step not in history or "loss" not in history:
        raise ValueError(f"rows must have epoch (or step) and loss, got the columns {list(history.columns)}")
    fig = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    curves = (
        ("loss", "loss, training", STYLES[0], 1), ("validation_loss", "loss, validation", STYLES[1], 1),
        ("accuracy", "noisy, training", STYLES[0], 2), ("validation_accuracy", "noisy, validation", STYLES[1], 2),
        ("validation_clean_accuracy", "clean, validation", STYLES[2], 2),
    )  # fmt: skip
    for column, name, style, panel in curves:
        if column in history:
            fig.add_scatter(
                x=history[step], y=history[column], name=name, showlegend=panel == 2, mode="lines+markers",
                line={"color": style.colour, "dash": style.dash, "width": 2.2}, row=1, col=panel,
                marker={"symbol": style.symbol, "size": 6, "color": style.colour, "maxdisplayed": 10},
            )  # fmt: skip
    dress(fig, title, step)
    fig.update_yaxes(title_text="loss", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title_text="accuracy", range=[0, 1.02], row=1, col=2)
    return fig.update_layout(height=340, legend={"x": 0.99, "y": 0.04, "xanchor": "right", "yanchor": "bottom"})


def difference_figure(differences: pd.DataFrame, reference: str, title: str = "") -> go.Figure:
    """Differences to one row with their intervals, a panel for each radius and one for ACR; 0 is no difference.

    A mark is filled and blue where its interval leaves 0 on one side, open and grey where it does not. `differences`
    has the columns row, what, difference, low, high of `smoothkit.reading.compare`.
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
    dress(fig, title or f"Difference to {reference}, with 95% intervals")
    fig.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=names, automargin=True)
    fig.update_xaxes(nticks=3, tickangle=0, zeroline=False)
    return fig.update_layout(showlegend=False, height=150 + 44 * len(names), margin_l=24, margin_t=96)


def _difference(part: pd.DataFrame, name: str) -> go.Scatter:
    clear = ((part["low"] > 0) | (part["high"] < 0)).all()
    colour = "#0072B2" if clear else "#6B7785"
    error = {"type": "data", "array": part["high"] - part["difference"], "arrayminus": part["difference"] - part["low"]}
    return go.Scatter(
        x=part["difference"], y=[name] * len(part), name=name, mode="markers",
        marker={"size": 10, "color": colour, "symbol": "circle" if clear else "circle-open", "line": {"width": 2}},
        error_x={**error, "color": colour, "thickness": 1.8, "width": 5}, customdata=part[["low", "high"]].to_numpy(),
        hovertemplate="%{x:+.3f}, from %{customdata[0]:+.3f} to %{customdata[1]:+.3f}"
        f"<extra>{html.escape(name)}</extra>",
    )  # fmt: skip
