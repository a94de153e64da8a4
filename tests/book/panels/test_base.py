"""What panels share: a figure that is its own state, errors in place, work that can be stopped."""

import gzip
import inspect
import re
import threading

import ipywidgets as widgets
import plotly.graph_objects as go
import pytest
import traitlets

from smoothbook.panels import base, live
from smoothbook.panels.attack import AttackPanel
from smoothbook.panels.base import AlphaControl, EdgeControl, Panel
from smoothbook.panels.compare import ComparePanel
from smoothbook.panels.curve import CurvePanel
from smoothbook.panels.explorer import Explorer
from smoothbook.panels.image import ImagePanel
from smoothbook.panels.job import Job
from smoothbook.panels.live import LiveFigure
from smoothbook.panels.memory import MemoryPanel
from smoothbook.panels.slice import SlicePanel


class Line(Panel):
    alpha = traitlets.Float(0.1).tag(setting=True)
    n = traitlets.Int(1000).tag(setting=True)
    slope = traitlets.Float(1.0).tag(setting=True)
    edges = (100, 1000, 10_000)

    def __init__(self, *, alpha=0.1, slope=1.0):
        super().__init__(dict(alpha=alpha, slope=slope))

    def controls(self):
        self.alpha_control, self.n_control = AlphaControl(self), EdgeControl(self)
        return [self.alpha_control, self.n_control]

    def draw(self):
        if self.slope < 0:
            raise ValueError("slope must not fall")
        return go.Figure(go.Scatter(x=[0, 1], y=[0, self.slope]), {"title": "A line"}), base.note("rising")


def test_a_live_figure_is_its_own_state():
    """What a page asks the kernel for after a reload is what is shown now, data and layout."""
    figure = LiveFigure(go.Figure(go.Scatter(y=[1, 2])))
    figure.draw(go.Figure(go.Scatter(y=[3, 4]), {"title": "later"}))
    state = figure.get_state()
    assert state["content"]["data"][0]["y"] == [3, 4] and state["content"]["layout"]["title"]["text"] == "later"
    assert state["drawn"] == 1 and state["config"]["showSendToCloud"] is False


def test_plotly_goes_to_the_page_once():
    first, second = LiveFigure(), LiveFigure()
    assert len(first._esm) < 10_000 and first._esm == second._esm
    packed = live.plotly_library().packed
    assert live.plotly_library() is live.plotly_library() and len(packed) < 2_000_000 < len(gzip.decompress(packed))


def test_a_figure_brings_its_script_and_its_style():
    """Files beside the module: a wheel that lacks one would show a path, or nothing."""
    state = LiveFigure().get_state()
    assert "async render" in state["_esm"] and ".smoothkit-note" in state["_css"]
    assert "initialize" in live.plotly_library().get_state()["_esm"]


def test_clicks_and_boxes_reach_python():
    figure, heard = LiveFigure(), []
    figure.on_click(heard.append)
    figure.on_select(heard.append)
    figure.set_state({"clicked": {"trace": 0, "point": 3, "x": 1.0, "y": 2.0, "event": 1}})
    figure.set_state({"selected": {"x": [0.1, 0.2], "y": None, "event": 2}})
    assert [event["x"] for event in heard] == [1.0, [0.1, 0.2]]


def test_a_setting_moves_the_figure():
    panel = Line()
    panel.slope = 3.0
    assert panel.figure.data[0].y == (0, 3.0) and panel.live.drawn == 2 and "rising" in panel.words


@pytest.mark.parametrize("panel", [CurvePanel, ComparePanel, ImagePanel, SlicePanel, AttackPanel, MemoryPanel])
def test_a_panel_takes_its_settings_by_name(panel):
    """A reader's `?` shows all of them, with the defaults of the traits; a misspelt one is Python's own error."""
    given = inspect.signature(panel).parameters
    assert not [p.name for p in given.values() if p.kind is p.VAR_KEYWORD]
    traits = panel.class_traits(setting=True)
    assert set(traits) <= set(given)
    for name, trait in traits.items():
        assert given[name].default in (trait.default_value, trait.default(), None), name
        assert re.search(rf"^    [\w, ]*\b{name}\b[\w, ]* : ", panel.__doc__, re.MULTILINE), name


@pytest.mark.parametrize("alpha", [0.0, 1.0, 95])
def test_alpha_is_checked(alpha):
    panel = Line()
    with pytest.raises(traitlets.TraitError, match=r"alpha must lie in \(0, 1\)"):
        panel.alpha = alpha
    assert panel.alpha == 0.1
    with pytest.raises(traitlets.TraitError, match="alpha must lie"):
        Line(alpha=alpha)


def test_errors_are_shown_in_the_panel_and_the_figure_stays():
    panel = Line()
    panel.slope = -1.0
    assert panel.error == "ValueError: slope must not fall" and 'role="alert"' in panel._alert.value
    assert panel.figure.data[0].y == (0, 1.0)
    panel.slope = 2.0
    assert not panel.error and not panel._alert.value and panel.figure.data[0].y == (0, 2.0)


def test_alpha_can_be_typed_to_any_value():
    """The page answers 0.02, which is between two steps of the slider, with the nearest step: that changes nothing."""
    panel = Line()
    panel.alpha_control.number.value = 0.02
    assert panel.alpha == panel.alpha_control.slider.value == 0.02
    panel.alpha_control.slider.value = 10**-1.7
    assert panel.alpha == 0.02
    panel.alpha_control.slider.value = 10**-1.6
    assert panel.alpha == panel.alpha_control.number.value == 10**-1.6
    for beyond in (1e-9, 0.9):  # the slider's ends are not the setting's
        panel.alpha = beyond
        assert panel.alpha == panel.alpha_control.number.value == beyond


def test_n_stops_at_edges():
    panel = Line()
    control = panel.n_control
    control.number.value = 9_999
    assert panel.n == control.number.value == control.slider.value == 1000
    control.number.value = 10_000
    assert panel.n == control.slider.value == 10_000
    control.slider.value = 100
    assert panel.n == control.number.value == 100
    panel.n = 1000
    assert control.slider.value == control.number.value == 1000
    with pytest.raises(traitlets.TraitError, match="n must be a block edge, one of 100, 1,000, 10,000; got 9,999"):
        panel.n = 9_999


def test_changes_from_many_threads_end_in_one_state():
    panel = Line()
    threads = [threading.Thread(target=setattr, args=(panel, "slope", float(s))) for s in range(2, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert panel.figure.data[0].y == (0, panel.slope) and not panel.error
    assert panel.live.content["data"][0]["y"] == [0, panel.slope]


def test_a_job_can_be_stopped_and_started_anew():
    rounds, begun, free = [], threading.Event(), threading.Event()

    def work(job):
        begun.set()
        free.wait(600)
        rounds.append(job.stopped)

    job = Job("Go", work, lambda error: None)
    job.start_button.click()
    assert begun.wait(600) and job.running and job.start_button.disabled and not job.stop_button.disabled
    job.start()  # ignored
    job.restart()  # ends what runs, and begins anew
    free.set()
    job.wait(600)
    assert rounds == [True, False] and not job.running and not job.start_button.disabled


def test_what_a_job_raises_is_shown():
    panel = Line()

    def work(job):
        raise RuntimeError("no memory left")

    job = Job("Go", work, panel.complain)
    job.start()
    job.wait(600)
    assert panel.error == "RuntimeError: no memory left" and not job.running


def test_an_explorer_makes_panels_when_asked(tmp_path, capsys):
    made = []
    explorer = Explorer({"one": lambda: made.append(1) or Line(), "two": lambda: made.append(2) or Line(slope=2.0)})
    assert not made
    explorer.still("two", figure="line", figures_dir=tmp_path, caption="A line")
    assert made == [2] and (tmp_path / "line.csv").is_file()
    assert explorer["two"] is explorer["two"] and made == [2]
    explorer.show()
    assert "stills" in capsys.readouterr().out
    explorer.buttons.value = "two"
    explorer._turn()
    assert explorer.current == "two" and explorer.children[1] is explorer["two"]
    with pytest.raises(traitlets.TraitError, match="current must be one of one, two"):
        explorer.current = "three"
    with pytest.raises(KeyError, match="there are one, two"):
        explorer["three"]


def test_a_panel_in_trouble_has_no_still():
    explorer = Explorer({"line": lambda: Line(slope=-1.0)})
    with pytest.raises(RuntimeError, match="slope must not fall"):
        explorer.still("line", figure="line")


def test_nothing_is_live_in_a_plain_script(capsys):
    assert not base.is_live()
    base.show(Line(), "line")
    assert "[figure: A line]" in capsys.readouterr().out


def test_controls_are_ordinary_widgets():
    """Sliders, boxes and buttons of ipywidgets take focus and keys; a panel must not replace them."""
    panel = Line()
    kinds = (widgets.Box, widgets.HTML, LiveFigure)
    assert all(isinstance(child, kinds) for child in panel.children)
