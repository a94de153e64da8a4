"""No text that a reader sees, on a figure, on hovering or below it, says a radius above the certified one."""

import html
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from smoothbook import figures
from smoothbook.panels.attack import AttackPanel, Broken, attack_figure, attack_table
from smoothbook.panels.compare import ComparePanel
from smoothbook.panels.curve import CurvePanel, curve_frames, read_counts
from smoothbook.panels.image import ImagePanel
from smoothbook.panels.memory import MemoryPanel
from smoothbook.panels.slice import SlicePanel
from smoothkit import data
from smoothkit.certify import certificates
from smoothkit.certify.bounds import radius_cap
from smoothkit.sampling.run import collect_votes
from smoothkit.types import StoppingRule

BELOW = 0.29 - 1e-9  # to two, three or four digits the nearest is 0.29, which is more than is certified
ALPHA, N = 0.001, 100


def texts(fig) -> list[str]:
    """What a figure says: title, annotations and labels, and the text of every point on hovering, as plotly fills it in."""
    said = [fig.layout.title.text or "", *(a.text for a in fig.layout.annotations)]
    for trace in fig.data:
        if trace.type in ("heatmap", "image"):  # pixels, and points of a plane
            continue
        if trace.type == "scatter" and "text" in (trace.mode or ""):
            said += trace.text
        for i in range(len(trace.x) if trace.hovertemplate else 0):
            said.append(re.sub(r"%\{(.*?)\}", lambda found, t=trace, i=i: filled(found[1], t, i), trace.hovertemplate))
    return said


def filled(field: str, trace, i: int) -> str:
    name, _, form = field.partition(":")
    name, _, place = name.partition("[")
    value = getattr(trace, name)
    value = value if isinstance(value, str) else value[i]
    value = value[int(place.rstrip("]"))] if place else value
    return format(value, form) if form else str(value)


def radii_near(said: list[str], radius: float) -> set[float]:
    numbers = re.findall(r"(?<![\d.])\d\.\d+", " ".join(html.unescape(text) for text in said))
    return {float(x) for x in numbers if abs(float(x) - radius) < 0.011}


@pytest.fixture(scope="module")
def table():
    return pd.DataFrame(
        {"idx": [4], "label": [1], "predict": [1], "radius": [BELOW], "correct": [True], "image_id": [9]}
    )


DRAWN = {
    "curve": lambda t: figures.certified_accuracy_curve({0.25: t}),
    "envelope": lambda t: figures.certified_accuracy_curve({"a": t, "b": t}, envelope=True),
    "histogram": lambda t: figures.radius_histogram(t),
    "attack": lambda t: attack_figure(
        attack_table(t, [Broken(0.5, 0, np.zeros((1, 2, 2)))]), sigma=0.25, reach=1.0, title=""
    ),
    "crossing": lambda t: attack_figure(
        attack_table(t, [Broken(0.2, 0, np.zeros((1, 2, 2)))]), sigma=0.25, reach=1.0, title=""
    ),
    "none succeeds": lambda t: attack_figure(attack_table(t, [None]), sigma=0.25, reach=1.0, title=""),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_a_figure_says_no_more_than_is_certified(kind, table):
    found = radii_near(texts(DRAWN[kind](table)), BELOW)
    assert found and max(found) <= BELOW


@pytest.fixture(scope="module")
def bright():
    """A classifier that always says 1, images, and a record of it: N unanimous votes that certify BELOW at its sigma."""
    values = torch.tensor([0.0, 0.9, 1.0])[:, None, None, None]
    images = data.from_arrays(values.expand(3, 1, 2, 2).contiguous(), np.array([0, 1, 1]))

    def classifier(x):
        brightness = x.flatten(1).mean(dim=1)
        return torch.stack([0 * brightness, 1 + 0 * brightness], dim=1)

    rule, sigma = StoppingRule(n0=10, n=N, alpha=ALPHA), BELOW / float(radius_cap(N, ALPHA, 1.0))
    record = collect_votes(classifier, images, sigma=sigma, stopping_rule=rule, model_id="one way", progress=False)
    return classifier, images, record


PANELS = {
    "curve": lambda f, x, record: CurvePanel(record, brush=(0.2, 0.4)),
    "curve, brushed from the radius": lambda f, x, record: CurvePanel(record, brush=(BELOW - 1e-12, 0.4)),
    "compare": lambda f, x, record: ComparePanel({"a": record, "b": record}),
    "attack": lambda f, x, record: AttackPanel(f, x, record),
    "slice": lambda f, x, record: SlicePanel(f, x, image=1, sigma=record.sigma),
    "memory": lambda f, x, record: MemoryPanel([(1.0, 1.0, 0, BELOW), (4.0, 2.0, 1, BELOW)]),
    "image": lambda f, x, record: ImagePanel(f, x, certificates(record), image=1, sigma=0.4, n=N),
}


@pytest.mark.parametrize("kind", PANELS)
def test_a_panel_says_no_more_than_is_certified(kind, bright):
    panel = PANELS[kind](*bright)
    if kind == "attack":
        panel.job.start()
    panel.settle()
    offered = panel.picker.options if kind == "image" else ()  # its certificate is another, by a confidence sequence
    found = radii_near([*texts(panel.figure), panel.words, *(text for text, _ in offered)], BELOW)
    assert not panel.error and found and max(found) <= BELOW


def test_frames_say_no_more_than_is_certified(bright):
    (frame,) = curve_frames({0.25: read_counts(bright[-1])}, n=N, alphas=(ALPHA,)).frames
    found = radii_near(texts(go.Figure(frame.data)), BELOW)
    assert found and max(found) <= BELOW
