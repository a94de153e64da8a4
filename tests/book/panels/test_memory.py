"""The memory panel, moved by its traits, its buttons and a click, without a browser."""

import pytest
from traitlets import TraitError

from smoothbook.panels.memory import HEIGHT, MemoryPanel, Question, memory_figure, replay
from smoothbook.sigma.memory import RULES
from smoothkit.types import ABSTAIN

A, B = 0, 1
ORDER = [(4.0, 2.0, B, 1.5), (2.2, 2.0, A, 0.8)]


def test_the_figure_is_a_function_of_questions_and_answers():
    questions = [Question(*q) for q in ORDER]
    answers = replay(questions)
    assert [(a.predicted, a.case) for a in answers] == [(B, 0), (A, 3)]
    fig = memory_figure(questions, answers)
    held = fig.data[0]
    at = {(round(x, 3), round(y, 3)): held.z[j][i] for i, x in enumerate(held.x) for j, y in enumerate(held.y)}
    assert at[(4.025, 2.025)] == B and at[(2.225, 2.025)] == A and at[(0.025, 0.025)] == -1
    circles = [t for t in fig.data if t.type == "scatter" and t.mode == "lines"]
    assert [t.line.dash for t in circles] == [None, "dot", None]  # the shrunk ball has its computed one beside it
    assert memory_figure([], []).data[0].type == "heatmap"


def test_order_and_rule_move_the_figure():
    panel = MemoryPanel(ORDER)
    drawn = panel.live.drawn
    assert "answered B 1.500" in panel.words and "answered A 0.299" in panel.words  # a memory errs below 0.3
    panel.order = "reversed"
    assert panel.live.drawn > drawn and "answered A 0.800" in panel.words and "answered B 0.999" in panel.words
    panel = MemoryPanel([(3.0, 2.0, B, 1.5), (2.5, 2.0, A, 0.25)])
    assert "2: computed A 0.250, answered B 0.250" in panel.words
    panel.rule = RULES[1]
    assert "2: computed A 0.250, answered B 0.999" in panel.words


def test_a_click_asks_and_the_buttons_take_back():
    panel = MemoryPanel()
    assert "Click into the plane" in panel.words
    panel.label, panel.radius = B, 1.0
    panel.live.clicked = {"trace": 0, "point": None, "x": 1.9, "y": 2.0, "event": 1}
    panel.label, panel.radius = A, 1.0
    panel.live.clicked = {"trace": 0, "point": None, "x": 1.0, "y": 2.0, "event": 2}
    assert panel.questions == ((1.9, 2.0, B, 1.0), (1.0, 2.0, A, 1.0))
    assert "2: computed A 1.000, answered B 0.100" in panel.words  # whoever asks first decides
    panel.label = ABSTAIN
    panel.live.clicked = {"trace": 0, "point": None, "x": 5.0, "y": 3.5, "event": 3}
    assert panel.questions[-1] == (5.0, 3.5, ABSTAIN, 0.0) and "answered no answer" in panel.words
    panel.undo_button.click()
    assert len(panel.questions) == 2
    panel.clear_button.click()
    assert panel.questions == () and panel.error == ""
    panel.live.clicked = {"trace": 0, "point": None, "x": None, "y": None, "event": 4}
    assert panel.questions == ()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ((1, 1, A), "x, y, label, radius"),
        ((1, HEIGHT + 1, A, 1), "must lie in"),
        ((1, 1, 7, 1), "label must be 0, 1 or -1"),
        ((1, 1, A, -1), "at least 0"),
        ((1, 1, ABSTAIN, 1), "0 where there is no answer"),
    ],
)
def test_bad_questions_are_refused_and_change_nothing(question, message):
    panel = MemoryPanel(ORDER)
    with pytest.raises(TraitError, match=message):
        panel.questions = (*panel.questions, question)
    assert len(panel.questions) == 2


def test_bad_settings():
    with pytest.raises(TraitError, match="radius must lie in"):
        MemoryPanel(radius=0.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'raduis'"):
        MemoryPanel(raduis=1.0)
    with pytest.raises(TraitError):
        MemoryPanel(order="backwards")
