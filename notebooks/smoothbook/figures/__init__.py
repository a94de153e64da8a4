"""Figures of certificates and votes: what notebooks draw."""

from smoothbook.figures.bars import radius_histogram, votes_figure, votes_trace
from smoothbook.figures.curves import (
    ENVELOPE,
    certified_accuracy_curve,
    certified_accuracy_points,
    certified_accuracy_print,
    difference_figure,
    training_curves,
)
from smoothbook.figures.pictures import add_picture, display_pixels, image_grid
from smoothbook.figures.show import PLOTLY_CONFIG, Live, keep, save_print, show, show_print
from smoothbook.figures.style import (
    RADIUS_AXIS,
    circle,
    dress,
    equal_scale,
    sigma_colour,
    sigma_label,
    sigma_style,
)

__all__ = [
    "ENVELOPE",
    "PLOTLY_CONFIG",
    "RADIUS_AXIS",
    "Live",
    "add_picture",
    "certified_accuracy_curve",
    "certified_accuracy_points",
    "certified_accuracy_print",
    "circle",
    "difference_figure",
    "display_pixels",
    "dress",
    "equal_scale",
    "image_grid",
    "keep",
    "radius_histogram",
    "save_print",
    "show",
    "show_print",
    "sigma_colour",
    "sigma_label",
    "sigma_style",
    "training_curves",
    "votes_figure",
    "votes_trace",
]
