"""A memory of certified balls in two dimensions, to click questions into.

What a memory answers depends on what was asked before: ask the same questions in the reverse order, plant a ball of the
wrong label first, or ask about a point near another one that was never asked, and see.
"""

from collections.abc import Sequence
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import traitlets

from smoothbook import figures
from smoothbook.panels.base import LABEL, Panel, linked, note, row
from smoothbook.sigma.memory import CASES, RULES, Answer, Memory
from smoothkit.types import ABSTAIN, round_down

WIDTH, HEIGHT, CELL = 6.0, 4.0, 0.05  # of the plane, and of what can be clicked
ORDERS = ("as asked", "reversed")
LABELS = {"A": 0, "B": 1, "no answer": ABSTAIN}
NAMES = {label: name for name, label in LABELS.items()}
_COLOURS = {0: "#0072B2", 1: "#D55E00", ABSTAIN: "#6B7785"}
_PALE = {0: "#CFE3F1", 1: "#F8DCC8"}


class Question(NamedTuple):
    """A point, and what is computed for it without the memory: a label (0 or 1, or ABSTAIN) and a radius."""

    x: float
    y: float
    label: int
    radius: float


def replay(questions: Sequence[Question], *, rule: str = RULES[0]) -> list[Answer]:
    """What a memory that was empty answers to the questions, one after the other."""
    memory = Memory(model="plane", shape=(1, 1, 2), rule=rule, check_range=False)
    points = [np.array([[[q.x, q.y]]], dtype=np.float32) for q in questions]
    return memory.answer_all(points, [q.label for q in questions], [q.radius for q in questions])


def memory_figure(questions: Sequence[Question], answers: Sequence[Answer], *, title: str = "A memory") -> go.Figure:
    """Kept balls, filled in the colour of their label; dotted, the certificate that was computed; numbers are the order."""
    fig = go.Figure(_background(questions, answers))
    for number, (q, a) in enumerate(zip(questions, answers, strict=True), start=1):
        if a.computed != ABSTAIN and (a.case == 2 or a.computed_radius != a.radius):
            look = {"color": _COLOURS[a.computed], "dash": "dot", "width": 1.5}
            fig.add_scatter(**figures.circle(a.computed_radius, q.x, q.y), line=look, mode="lines", hoverinfo="skip")
        if a.predicted != ABSTAIN:
            look = {"color": _COLOURS[a.predicted], "width": 2}
            fig.add_scatter(**figures.circle(a.radius, q.x, q.y), line=look, mode="lines", hoverinfo="skip")
        fig.add_scatter(
            x=[q.x], y=[q.y], mode="markers+text", text=[str(number)], textposition="top center",
            marker={"size": 9, "color": _COLOURS[a.predicted], "symbol": "circle" if a.case not in (2, 4) else "x"},
            hovertemplate=f"{_sentence(number, q, a)}<extra></extra>",
        )  # fmt: skip
    figures.dress(fig, title, "x", "y")
    fig.update_xaxes(range=[0, WIDTH], constrain="domain", showgrid=False)
    fig.update_yaxes(range=[0, HEIGHT], scaleanchor="x", constrain="domain", showgrid=False)
    return fig.update_layout(showlegend=False, height=470, dragmode=False, uirevision="memory")


def _background(questions: Sequence[Question], answers: Sequence[Answer]) -> go.Heatmap:
    """The label that a look-up gives, cell by cell; also what a click falls on."""
    x, y = np.arange(CELL / 2, WIDTH, CELL), np.arange(CELL / 2, HEIGHT, CELL)
    held = np.full((len(y), len(x)), np.nan)
    for q, a in zip(questions, answers, strict=True):
        if a.predicted != ABSTAIN:
            held[(x - q.x) ** 2 + (y[:, None] - q.y) ** 2 < a.radius**2] = a.predicted
    white = np.nan_to_num(held, nan=-1.0)
    scale = [[0, "#FFFFFF"], [1 / 3, "#FFFFFF"], [1 / 3, _PALE[0]], [2 / 3, _PALE[0]], [2 / 3, _PALE[1]], [1, _PALE[1]]]
    return go.Heatmap(
        x=x, y=y, z=white, zmin=-1.5, zmax=1.5, colorscale=scale, showscale=False, hovertemplate="(%{x:.2f}, %{y:.2f})<extra></extra>"
    )  # fmt: skip


def _sentence(number: int, q: Question, a: Answer) -> str:
    computed = NAMES[a.computed] + (f" {round_down(a.computed_radius)}" if a.computed != ABSTAIN else "")
    answered = NAMES[a.predicted] + (f" {round_down(a.radius)}" if a.predicted != ABSTAIN else "")
    return f"{number}: computed {computed}, answered {answered} ({CASES[a.case]})"


class MemoryPanel(Panel):
    """Click a question into the plane; it is asked with the label and the radius set above.

    Parameters
    ----------
    questions : sequence of (x, y, label, radius)
        Asked so far, in this order; label 0 (A), 1 (B) or -1 (no answer, radius 0). Lengths are those of the plane,
        which is WIDTH by HEIGHT.
    label, radius : int and float
        What the next click computes.
    rule : one of `sigma.memory.RULES`
    order : "as asked" or "reversed"
        The order in which an empty memory is asked all of them again.
    """

    questions = traitlets.Tuple().tag(setting=True)
    label = traitlets.Enum(tuple(NAMES), default_value=0).tag(setting=True)
    radius = traitlets.Float(0.8).tag(setting=True)
    rule = traitlets.Enum(RULES, default_value=RULES[0]).tag(setting=True)
    order = traitlets.Enum(ORDERS, default_value=ORDERS[0]).tag(setting=True)

    def __init__(
        self,
        questions: Sequence[Sequence[float]] = (),
        *,
        label: int = 0,
        radius: float = 0.8,
        rule: str = RULES[0],
        order: str = ORDERS[0],
    ) -> None:
        super().__init__(dict(questions=tuple(questions), label=label, radius=radius, rule=rule, order=order))
        self.live.on_click(self.ask)

    @traitlets.validate("questions")
    def _valid_questions(self, proposal: dict) -> tuple[Question, ...]:
        return tuple(_question(q) for q in proposal["value"])

    @traitlets.validate("radius")
    def _valid_radius(self, proposal: dict) -> float:
        if not 0 < proposal["value"] <= WIDTH:
            raise traitlets.TraitError(f"radius must lie in (0, {WIDTH:g}], got {proposal['value']}")
        return proposal["value"]

    def ask(self, clicked: dict) -> None:
        """Add a question at a click's x and y."""
        if clicked.get("x") is None or clicked.get("y") is None:
            return
        radius = 0.0 if self.label == ABSTAIN else self.radius
        self.questions = (*self.questions, Question(clicked["x"], clicked["y"], self.label, radius))

    def undo(self, _button: object = None) -> None:
        """Take the last question back, as no memory in use may."""
        self.questions = self.questions[:-1]

    def clear(self, _button: object = None) -> None:
        self.questions = ()

    def controls(self) -> Sequence[widgets.Widget]:
        narrow = {**LABEL, "button_width": "6em"}
        labels = widgets.ToggleButtons(options=list(LABELS.items()), description="answer", style=narrow)
        slider = widgets.FloatSlider(value=self.radius, min=0.05, max=3, step=0.05, description="radius", style=LABEL)
        rule = widgets.Dropdown(options=RULES, description="rule", style=LABEL, layout={"width": "16em"})
        order = widgets.ToggleButtons(options=ORDERS, description="asked", style=narrow)
        self.undo_button, self.clear_button = widgets.Button(description="Undo"), widgets.Button(description="Clear")
        self.undo_button.on_click(self.undo)
        self.clear_button.on_click(self.clear)
        return [
            row(linked(self, "label", labels), linked(self, "radius", slider)),
            row(linked(self, "order", order), linked(self, "rule", rule), self.undo_button, self.clear_button),
        ]

    def asked(self) -> tuple[Question, ...]:
        """The questions in the order of now."""
        return self.questions if self.order == ORDERS[0] else self.questions[::-1]

    def draw(self) -> tuple[go.Figure, str]:
        asked = self.asked()
        answers = replay(asked, rule=self.rule)
        fig = memory_figure(asked, answers, title=f"{len(asked)} questions, {self.order}")
        fig.layout.meta = self.chosen("label", "radius", "rule", "order")
        lines = "<br>".join(_sentence(i, q, a) for i, (q, a) in enumerate(zip(asked, answers, strict=True), start=1))
        return fig, note(lines or "Click into the plane to ask.")


def _question(values: Sequence[float]) -> Question:
    if len(values) != 4:
        raise traitlets.TraitError(f"a question is (x, y, label, radius), got {values!r}")
    x, y, label, radius = values
    if not (0 <= x <= WIDTH and 0 <= y <= HEIGHT):
        raise traitlets.TraitError(f"a question must lie in [0, {WIDTH:g}] x [0, {HEIGHT:g}], got ({x}, {y})")
    if label not in NAMES:
        raise traitlets.TraitError(f"a question's label must be 0, 1 or {ABSTAIN}, got {label!r}")
    if not 0 <= radius < np.inf or (label == ABSTAIN and radius):
        raise traitlets.TraitError(
            f"a question's radius must be at least 0, and 0 where there is no answer, got {radius!r}"
        )
    return Question(float(x), float(y), int(label), float(radius))
