"""Images as figures: grids with captions."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from smoothbook.figures.style import dress

# --- pictures ----------------------------------------------------------------------------------------


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
    pixels = _display_pixels(images)
    captions = _checked_captions(captions, len(pixels))
    columns = min(columns or 8, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    size = size or int(np.clip(816 / columns - 12, 72, 170))  # fits the width of a notebook
    lines = max((c.count("<br>") + 1 if c else 0 for c in captions), default=0)
    gap, head = 12, 10 + 16 * lines
    width, height = columns * (size + gap), rows * (size + head)
    fig = make_subplots(
        rows=rows, cols=columns, horizontal_spacing=gap / width, vertical_spacing=head / height if rows > 1 else 0
    )
    for position, picture in enumerate(pixels):
        fig.add_trace(_picture(picture), row=position // columns + 1, col=position % columns + 1)
    fig.update_xaxes(visible=False, fixedrange=True, constrain="domain", showgrid=False)
    fig.update_yaxes(visible=False, fixedrange=True, constrain="domain", showgrid=False, autorange="reversed")
    _lock_aspect_and_caption(fig, pixels, captions)
    margin = {"l": 8, "r": 8, "t": head + (44 if title else 4), "b": 8}
    dress(fig, title, None, None)
    fig.update_layout(width=max(width + 16, 220), height=height - head + margin["t"] + 8, margin=margin)
    fig.update_layout(showlegend=False, plot_bgcolor="white")
    return fig


def _display_pixels(images: object) -> np.ndarray:
    array = images.detach().cpu().numpy() if hasattr(images, "detach") else np.asarray(images)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or len(array) == 0:
        raise ValueError(f"images must have shape [N, C, H, W] with 1 or 3 channels and N above 0, got {array.shape}")
    array = np.nan_to_num(array.astype(np.float32), nan=0.0).clip(0, 1)
    return np.rint(255 * array.transpose(0, 2, 3, 1)).astype(np.uint8)  # [N, H, W, C]


def _checked_captions(captions: Sequence[str] | None, n: int) -> list[str]:
    captions = [""] * n if captions is None else [str(c) for c in captions]
    if len(captions) != n:
        raise ValueError(f"captions must be one a picture, {n}, got {len(captions)}")
    return captions


def _picture(picture: np.ndarray) -> go.Heatmap | go.Image:
    if picture.shape[-1] == 3:
        return go.Image(z=picture, hovertemplate="row %{y}, column %{x}<br>%{z}<extra></extra>")
    grey = [[0, "#000000"], [1, "#FFFFFF"]]
    hover = "row %{y}, column %{x}<br>%{z:.3f}<extra></extra>"
    z = (picture[..., 0] / 255).astype(np.float32)
    return go.Heatmap(z=z, zmin=0, zmax=1, zsmooth=False, colorscale=grey, showscale=False, hovertemplate=hover)


def _lock_aspect_and_caption(fig: go.Figure, pixels: np.ndarray, captions: list[str]) -> None:
    rows, columns = fig._get_subplot_rows_columns()
    cells = list(itertools.product(rows, columns))
    for caption, (row, col) in zip(captions, cells, strict=False):
        box = fig.get_subplot(row, col)
        box.yaxis.scaleanchor = box.xaxis.plotly_name.replace("axis", "")
        box.xaxis.range = [-0.5, pixels.shape[2] - 0.5]
        if caption:
            where = {"x": sum(box.xaxis.domain) / 2, "y": box.yaxis.domain[1], "xref": "paper", "yref": "paper"}
            look = {"showarrow": False, "font": {"size": 12}, "xanchor": "center", "yanchor": "bottom"}
            fig.add_annotation(text=caption, **where, **look)
