"""Figures of sigma selection: objectives against sigma, what a search gains, an envelope, the island."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from smoothbook.figures.style import STYLES, dress

COLOURS = [style.colour for style in STYLES]
DOTTED = {"color": "#444444", "dash": "dot", "width": 1}


def objectives_figure(curves: pd.DataFrame, paths: pd.DataFrame) -> go.Figure:
    """A panel for each objective: estimated radii against sigma, and where a search passes; see `sigma.landscape`."""
    objectives, images = list(dict.fromkeys(curves["objective"])), list(dict.fromkeys(curves["image"]))
    fig = make_subplots(
        rows=1, cols=len(objectives), shared_yaxes=True, subplot_titles=objectives, horizontal_spacing=0.03
    )
    for col, objective in enumerate(objectives, start=1):
        for image, colour in zip(images, COLOURS, strict=False):
            look = {"legendgroup": image, "row": 1, "col": col}
            curve, path = (t[(t["objective"] == objective) & (t["image"] == image)] for t in (curves, paths))
            fig.add_scatter(
                x=curve["sigma"], y=curve["value"], name=image, mode="lines", line={"color": colour}, showlegend=col == 1,
                **look,
            )  # fmt: skip
            ring = {"color": colour, "size": 5, "symbol": "circle-open"}
            fig.add_scatter(
                x=path["sigma"],
                y=path["value"],
                name="its search",
                mode="markers",
                marker=ring,
                showlegend=False,
                **look,
            )
    dress(fig, "Estimated radius against σ, and the way of each search")
    fig.update_xaxes(title_text="σ, pixel units").update_yaxes(range=[0, 1])
    return fig.update_yaxes(title_text="estimated L2 radius", col=1).update_annotations(font_size=13)


def gain_figure(pairs: pd.DataFrame, sigma0: float) -> go.Figure:
    """What a search wins, an image a point; columns sigma, radius, radius fixed, correct, correct fixed."""
    gain, right = pairs["radius"] - pairs["radius fixed"], pairs["correct"] & pairs["correct fixed"]
    fig = go.Figure()
    for some, name, symbol, colour in (
        (right, "right at both", "circle", COLOURS[0]),
        (~right, "right at one of them", "x", COLOURS[1]),
    ):
        look = {"symbol": symbol, "color": colour, "size": 8, "opacity": 0.6}
        fig.add_scatter(x=pairs["sigma"][some], y=gain[some], mode="markers", name=name, marker=look)
    fig.add_hline(y=0, line=DOTTED)
    dress(fig, "What the search wins, image by image", "σ found, pixel units", f"radius minus radius at σ = {sigma0:g}")
    return fig


def add_envelope(fig: go.Figure, over: pd.DataFrame) -> go.Figure:
    """A grey band behind the curves: `reading.envelope`, with the name that it gives itself."""
    line = {"color": "#777777", "dash": "dot", "width": 5}
    return fig.add_scatter(x=over["radius"], y=over["envelope"], name=over.attrs["label"], line=line, opacity=0.5)


def island_figure(
    line: np.ndarray, frozen: np.ndarray, deployed: np.ndarray, *, radius: float, points: pd.DataFrame
) -> go.Figure:
    """The chance of class 1 along a line, with sigma frozen and as deployed; a point each for x and its attack.

    Parameters
    ----------
    line : inputs [L]
    frozen, deployed : chances [L] of class 1
    radius : the frozen radius of x = 0
    points : DataFrame with input, chance, name
    """
    fig = go.Figure()
    fig.add_scatter(x=line, y=frozen, name="σ frozen at that of x = 0", line={"color": COLOURS[0]})
    dashed = {"color": COLOURS[1], "dash": "dash"}
    fig.add_scatter(x=line, y=deployed, name="σ searched at each point, as deployed", line=dashed)
    fig.add_vrect(
        x0=float(line.min()), x1=min(radius, float(line.max())), fillcolor=COLOURS[0], opacity=0.08, line_width=0,
        annotation_text="frozen radius of x = 0", annotation_position="top left",
    )  # fmt: skip
    fig.add_hline(y=0.5, line=DOTTED)
    fig.add_scatter(
        x=points["input"], y=points["chance"], text=points["name"], mode="markers+text", textposition="top center",
        marker={"size": 10, "color": "#1F2933"}, showlegend=False,
    )  # fmt: skip
    dress(fig, "An attack inside a frozen radius", "input", "probability of class 1")
    below = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    return fig.update_yaxes(range=[0, 1.05]).update_layout(height=460, legend=below)
