"""Images as figures: small pictures side by side, with captions."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from smoothbook.figures.style import dress, equal_scale


def image_grid(
    images: object, captions: Sequence[str] | None = None, columns: int | None = None, *, title: str = "", size: int = 0
) -> go.Figure:
    """Small pictures side by side, every pixel a square; values are clipped to [0, 1] for display only.

    Parameters
    ----------
    images : tensor or array
        Shape [N, C, H, W] with 1 or 3 channels, values on [0, 1].
    captions : sequence of str, optional
        One a picture, shown above it; `<br>` starts a new line.
    columns : int, optional
        Pictures in a row; at most 8 if not given.
    size : int
        Side of a picture in screen pixels; 0 chooses by the number of columns.
    """
    pixels = display_pixels(images)
    captions = [""] * len(pixels) if captions is None else [str(c) for c in captions]
    if len(captions) != len(pixels):
        raise ValueError(f"captions must be one a picture, {len(pixels)}, got {len(captions)}")
    columns = min(columns or 8, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    size = size or int(np.clip(816 / columns - 12, 72, 170))  # fits the width of a notebook
    lines = max((c.count("<br>") + 1 if c else 0 for c in captions), default=0)
    gap, head = 12, 10 + 16 * lines
    width, height = columns * (size + gap), rows * (size + head)
    fig = make_subplots(
        rows=rows, cols=columns, horizontal_spacing=gap / width, vertical_spacing=head / height if rows > 1 else 0
    )
    margin = {"l": 8, "r": 8, "t": head + (44 if title else 4), "b": 8}
    dress(fig, title)
    fig.update_layout(width=max(width + 16, 220), height=height - head + margin["t"] + 8, margin=margin)
    for picture, caption, (row, col) in zip(
        pixels, captions, itertools.product(range(1, rows + 1), range(1, columns + 1)), strict=False
    ):
        add_picture(fig, picture, caption, row=row, col=col)
    fig.update_xaxes(visible=False).update_yaxes(visible=False)  # the cells without a picture
    return fig.update_layout(showlegend=False)


def add_picture(fig: go.Figure, pixels: np.ndarray, caption: str, *, row: int, col: int, size: int = 12) -> None:
    """Draw pixels, uint8 [H, W, C], in a subplot without axes, every pixel a square, with a caption above it."""
    fig.add_trace(_picture(pixels), row=row, col=col)
    box = fig.get_subplot(row, col)
    box.xaxis.update(visible=False, fixedrange=True, constrain="domain", range=[-0.5, pixels.shape[1] - 0.5])
    box.yaxis.update(visible=False, fixedrange=True, constrain="domain", autorange="reversed")
    equal_scale(box)
    if caption:
        where = {"x": sum(box.xaxis.domain) / 2, "y": box.yaxis.domain[1], "xref": "paper", "yref": "paper"}
        look = {"showarrow": False, "font": {"size": size}, "xanchor": "center", "yanchor": "bottom"}
        fig.add_annotation(text=caption, **where, **look)


def display_pixels(images: object) -> np.ndarray:
    """Images [N, C, H, W] on [0, 1], tensor or array, as pixels for a screen: uint8 [N, H, W, C]."""
    array = images.detach().cpu().numpy() if hasattr(images, "detach") else np.asarray(images)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or len(array) == 0:
        raise ValueError(f"images must have shape [N, C, H, W] with 1 or 3 channels and N above 0, got {array.shape}")
    array = np.nan_to_num(array.astype(np.float32), nan=0.0).clip(0, 1)
    return np.rint(255 * array.transpose(0, 2, 3, 1)).astype(np.uint8)


def _picture(picture: np.ndarray) -> go.Heatmap | go.Image:
    if picture.shape[-1] == 3:
        return go.Image(z=picture, hovertemplate="row %{y}, column %{x}<br>%{z}<extra></extra>")
    grey = [[0, "#000000"], [1, "#FFFFFF"]]
    hover = "row %{y}, column %{x}<br>%{z:.3f}<extra></extra>"
    z = (picture[..., 0] / 255).astype(np.float32)
    return go.Heatmap(z=z, zmin=0, zmax=1, zsmooth=False, colorscale=grey, showscale=False, hovertemplate=hover)
