"""Figures of several noise levels: votes of one image, where images halt, how classifiers fail, PSNR beside votes."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from smoothbook.figures.style import dress, sigma_colour, sigma_label, sigma_style

NO_SCALE = "#C9CED6"


def votes_by_scale(shares: Mapping[float, Sequence[float]], title: str) -> go.Figure:
    """Shares of votes [num_classes] of one image, a group of bars for each class and a colour for each sigma."""
    fig = go.Figure()
    for sigma, share in shares.items():
        fig.add_bar(x=list(range(len(share))), y=share, name=sigma_label(sigma), marker_color=sigma_style(sigma).colour)
    fig.add_hline(y=0.5, line={"color": "#444444", "dash": "dot"})
    dress(fig, title, "class", "share of votes")
    corner = {"x": 0.99, "y": 0.99, "xanchor": "right", "yanchor": "top"}
    return fig.update_layout(barmode="group", xaxis_dtick=1, legend=corner)


def halting_counts(rules: Mapping[str, pd.DataFrame], sigmas: Sequence[float]) -> pd.DataFrame:
    """How many images rest on which scale: a row for each rule, a column for each sigma and one for none (NaN)."""
    counts = {
        rule: [int((t["scale"] == s).sum()) for s in sigmas] + [int(t["scale"].isna().sum())]
        for rule, t in rules.items()
    }
    return pd.DataFrame.from_dict(counts, orient="index", columns=[*sigmas, np.nan])


def halting_figure(counts: pd.DataFrame) -> go.Figure:
    """`halting_counts` as stacked bars."""
    fig = go.Figure()
    for position, sigma in enumerate(counts.columns):
        name, colour = ("none", NO_SCALE) if np.isnan(sigma) else (sigma_label(sigma), sigma_colour(sigma))
        fig.add_bar(x=list(counts.index), y=counts.iloc[:, position], name=name, marker_color=colour)
    dress(fig, "The scale that a certificate rests on, or that stopped the image", None, "images")
    return fig.update_layout(barmode="stack")


def failures_figure(rates: pd.DataFrame) -> go.Figure:
    """Over-smoothing and over-confidence, a panel each; columns row, sigma, over_smoothing, over_confidence (shares)."""
    kinds = ("over_smoothing", "over_confidence")
    heads = [kind.replace("_", "-") for kind in kinds]
    fig = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=heads)
    for col, kind in enumerate(kinds, start=1):
        for sigma, part in rates.groupby("sigma"):
            fig.add_bar(
                x=part[kind], y=part["row"], orientation="h", name=sigma_label(sigma), marker_color=sigma_colour(sigma),
                showlegend=col == 1, row=1, col=col,
            )  # fmt: skip
    dress(fig, "Two ways to fail, before and after fine-tuning", "share of images")
    fig.update_xaxes(range=[0, 1.1 * max(float(rates[list(kinds)].to_numpy().max()), 0.01)])
    fig.update_yaxes(autorange="reversed", automargin=True)
    return fig.update_layout(barmode="group", margin_t=96)


def psnr_figure(points: pd.DataFrame) -> go.Figure:
    """PSNR after denoising against the share of right votes, a point an image; columns sigma, denoised, votes."""
    fig = go.Figure()
    for sigma, part in points.groupby("sigma"):
        style = sigma_style(sigma)
        look = {"color": style.colour, "symbol": style.symbol, "size": 8}
        fig.add_scatter(x=part["denoised"], y=part["votes"], mode="markers", name=sigma_label(sigma), marker=look)
    dress(fig, "Better denoised, better classified?", "PSNR of the denoised image, dB", "share of right votes")
    return fig.update_yaxes(range=[-0.03, 1.03])
