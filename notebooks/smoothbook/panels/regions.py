"""The figure of a plane: decision regions, the certified circle, the images and the attack's path."""

import html
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy import ndimage

from smoothbook import figures
from smoothbook.panels.plane import Plane
from smoothkit.types import ABSTAIN, Certificate

SMOOTHED = "smoothed classifier<br>white: no answer"
# light enough for black labels on them; Paul Tol, "Colour Schemes", 2021: light
COLOURS = (
    "#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#44BB99", "#99DDFF", "#BBCC33", "#DDAADD", "#C8B88A", "#AAAAAA",
)  # fmt: skip


def slice_figure(
    plane: Plane,
    base: np.ndarray,
    smoothed: np.ndarray | None,
    *,
    shares: np.ndarray | None = None,
    certificate: Certificate | None,
    class_names: Sequence[str],
    title: str,
) -> go.Figure:
    """Decision regions of the base classifier on the left and of the smoothed one on the right, to one scale.

    Parameters
    ----------
    base, smoothed : int arrays [side, side], rows from the bottom, ABSTAIN where there is no answer; `smoothed` may
        have another side, or be None while votes are awaited
    shares : float array like `smoothed`, share of votes of the largest class
    certificate : of the image in the middle, whose circle is drawn
    """
    fig = make_subplots(rows=1, cols=2, horizontal_spacing=0.07, subplot_titles=("base classifier, no noise", SMOOTHED))
    present = sorted({int(c) for grid in (base, smoothed) if grid is not None for c in np.unique(grid)} - {ABSTAIN})
    for col, grid, share in ((1, base, None), (2, smoothed, shares)):
        if grid is not None:
            fig.add_trace(_regions(plane, grid, share, present, class_names), row=1, col=col)
            fig.add_trace(_labels(plane, grid, class_names), row=1, col=col)
        for trace in _overlays(plane, certificate, legend=col == 1):
            fig.add_trace(trace, row=1, col=col)
    figures.dress(fig, title)
    for col in (1, 2):
        figures.equal_scale(fig.get_subplot(1, col))
    axes = {"range": [-plane.half, plane.half], "constrain": "domain", "zeroline": False, "showgrid": False}
    fig.update_xaxes(title_text=f"L2 distance,<br>{plane.names[0]}", **axes).update_yaxes(**axes)
    fig.update_yaxes(title_text=f"L2 distance, {plane.names[1]}", col=1)
    if smoothed is None:
        fig.add_annotation(text="votes are on their way", x=0, y=0.6 * plane.half, showarrow=False, row=1, col=2)
    below = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.2, "yanchor": "top"}
    return fig.update_layout(height=600, legend=below, margin={"t": 116, "b": 40}, uirevision="slice")


def _regions(plane, grid, shares, present: list[int], class_names: Sequence[str]) -> go.Heatmap:
    place = {c: i for i, c in enumerate(present)} | {ABSTAIN: -1}
    z = np.vectorize(place.__getitem__, otypes=[int])(grid)
    colours = ["#FFFFFF", *(COLOURS[c % len(COLOURS)] for c in present)]
    scale = [(k / len(colours), c) for i, c in enumerate(colours) for k in (i, i + 1)]
    said = np.vectorize(lambda c: "no answer" if c == ABSTAIN else f"“{class_names[c]}”", otypes=[object])(grid)
    if shares is not None:
        said = said + np.vectorize(lambda s: f", {s:.0%} of the votes", otypes=[object])(shares)
    axis = plane.axis(len(grid))
    return go.Heatmap(
        x=axis, y=axis, z=z, zmin=-1.5, zmax=len(present) - 0.5, colorscale=scale, showscale=False, zsmooth=False,
        text=said, hovertemplate="%{text}<br>at (%{x:.2f}, %{y:.2f})<extra></extra>", name="regions",
    )  # fmt: skip


def _labels(plane: Plane, grid: np.ndarray, class_names: Sequence[str]) -> go.Scatter:
    """The name of each class in the middle of its larger regions, so that colour is not needed to read them."""
    axis, where, least = plane.axis(len(grid)), [], max(2, 0.008 * grid.size)
    for c in set(np.unique(grid).tolist()) - {ABSTAIN}:
        pieces, number = ndimage.label(grid == c)
        for piece in range(1, number + 1):
            inside = pieces == piece
            if inside.sum() < least:
                continue
            depth = ndimage.distance_transform_cdt(np.pad(inside, 1))[1:-1, 1:-1]
            i, j = np.unravel_index(depth.argmax(), depth.shape)
            where.append((axis[j], axis[i], str(class_names[c])))
    x, y, text = zip(*where, strict=True) if where else ((), (), ())
    return go.Scatter(
        x=x, y=y, text=text, mode="text", textfont={"size": 15, "color": "#000000"}, showlegend=False,
        hoverinfo="skip", name="labels",
    )  # fmt: skip


def _overlays(plane: Plane, certificate: Certificate | None, *, legend: bool) -> list[go.Scatter]:
    """The certified circle, the image, other images, and the attack's path, white below so that they show anywhere."""
    lines = []
    if certificate is not None and certificate.radius > 0:
        ring = figures.circle(certificate.radius)
        lines.append(("certified circle", ring, "lines", {"color": "#000000", "width": 3}))
    if len(plane.path):
        path = {"x": plane.path[:, 0], "y": plane.path[:, 1]}
        lines.append(("the attack’s path", path, "lines+markers", {"color": "#7A0177", "width": 2.5, "dash": "dot"}))
    found = []
    for name, at, mode, line in lines:
        shared = {**at, "hoverinfo": "skip", "legendgroup": name}
        white = {"color": "#FFFFFF", "width": line["width"] + 3}
        found.append(go.Scatter(mode="lines", line=white, showlegend=False, name="", **shared))
        found.append(go.Scatter(mode=mode, line=line, marker={"size": 7}, name=name, showlegend=legend, **shared))
    marker = {"size": 9, "color": "#000000", "line": {"width": 1.5, "color": "#FFFFFF"}}
    marks = [("the image", (0.0, 0.0), "circle"), *((name, at, "square") for name, at in plane.marks.items())]
    for name, at, symbol in marks:
        found.append(go.Scatter(
            x=[at[0]], y=[at[1]], mode="markers", marker={**marker, "symbol": symbol}, name=html.escape(name),
            legendgroup=name, showlegend=legend, hovertemplate=html.escape(name) + "<extra></extra>",
        ))  # fmt: skip
    return found
