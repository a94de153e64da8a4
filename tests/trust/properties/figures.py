"""Figures."""

import contextlib

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from properties.inputs import (
    certificate_tables,
    float32s,
    holds,
    mostly,
    names,
    numbers,
    odd_tables,
    right_tables,
    shares,
    sigmas,
    small,
    texts,
    wholes,
)
from smoothbook import figures
from smoothkit.reading import (
    intervals,
)


@holds(
    mostly(
        st.dictionaries(st.sampled_from(["a", 0.25, 0.5]), right_tables, min_size=1, max_size=3),
        st.dictionaries(sigmas, odd_tables, max_size=2),
    ),
    mostly(st.none(), st.lists(numbers, max_size=2)),
    mostly(st.just(12), small),
    st.booleans(),
    share=0.1,
)
def figures_of_any_table(found, radii, bins, best):
    points = figures.certified_accuracy_points(found, radii=radii, envelope=best)
    assert points["certified_accuracy"].between(0, 1).all()
    for fig in (figures.certified_accuracy_curve(found, envelope=best), figures.radius_histogram(found, bins=bins)):
        assert fig.data and "nan" not in fig.layout.title.text.lower()


@holds(st.one_of(sigmas, names))
def looks_of_a_sigma(sigma):
    assert figures.sigma_label(sigma)
    if not isinstance(sigma, str):
        assert (
            figures.sigma_colour(sigma) == figures.sigma_style(sigma).colour and len(figures.sigma_colour(sigma)) == 7
        )


@holds(
    mostly(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.lists(small, max_size=3)),
    st.lists(st.text(max_size=3), max_size=3),
    mostly(st.just(120), wholes),
    mostly(st.just(12), small),
)
def figures_of_any_votes(counts, class_names, n, most):
    fig = figures.votes_figure(counts, class_names, n, most=most)
    assert all(0 <= y <= 1 for y in fig.data[0].y)


@holds(
    npst.arrays(
        np.float32, mostly(st.just((2, 1, 3, 3)), npst.array_shapes(max_dims=5, max_side=3)), elements=float32s
    ),
    mostly(st.none(), st.lists(texts, max_size=2)),
    mostly(st.none(), small),
)
def grids_of_any_images(images, captions, columns):
    assert len(figures.image_grid(images, captions, columns).data) == len(images)


@holds(
    mostly(right_tables, certificate_tables),
    st.lists(st.fixed_dictionaries({"epoch": small, "loss": numbers, "accuracy": shares}), max_size=3),
    share=0.1,
)
def figures_of_training_and_differences(table, epochs):
    with contextlib.suppress(ValueError):
        assert figures.training_curves(epochs).data
    found = intervals.compare({"a": table, "b": table}, "b", draws=20)
    fig = figures.difference_figure(found, "b")
    figures.dress(fig, "title", "x", "y")
    assert fig.data and fig.layout.title.text
