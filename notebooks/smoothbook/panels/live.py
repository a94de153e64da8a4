"""A plotly figure whose whole picture is the widget's state: a page that was reloaded, or a second tab, shows the same.

plotly's FigureWidget sends changes as one-shot messages instead and is back at its first picture after a reload.
plotly.js (5 MB, sent as 1.5) goes to the page once, however many figures there are.
"""

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import anywidget
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs

from smoothbook import figures

_HERE = Path(__file__).parent


class PlotlyLibrary(anywidget.AnyWidget):
    """plotly.js for the page, packed."""

    _esm = _HERE / "plotly_library.js"
    packed = traitlets.Bytes().tag(sync=True)

    def __init__(self) -> None:
        super().__init__(packed=gzip.compress(get_plotlyjs().encode(), mtime=0))


@functools.cache
def plotly_library() -> PlotlyLibrary:
    """The one that serves all figures of this kernel."""
    return PlotlyLibrary()


class LiveFigure(anywidget.AnyWidget):
    """A plotly figure in a notebook, redrawn whole by `draw`.

    `clicked` holds the last click as trace, point, x, y; `selected` the last box drawn as ranges x and y, empty when
    it is taken away. `on_click` and `on_select` call a function with them.
    """

    _esm = _HERE / "live_figure.js"
    _css = _HERE / "panel.css"
    content = traitlets.Dict().tag(sync=True)  # data and layout, as plotly.js takes them
    config = traitlets.Dict(figures.PLOTLY_CONFIG).tag(sync=True)
    drawn = traitlets.Int(0).tag(sync=True)  # how many times; the page redraws when it grows
    clicked = traitlets.Dict().tag(sync=True)
    selected = traitlets.Dict().tag(sync=True)

    def __init__(self, fig: go.Figure | None = None) -> None:
        plotly_library()
        self.figure = go.Figure() if fig is None else fig
        super().__init__(content=json.loads(self.figure.to_json()))

    def draw(self, fig: go.Figure) -> None:
        """Show `fig`, which is then `self.figure`."""
        self.figure = fig
        with self.hold_sync():  # one message, so that no page draws new data with an old layout
            self.content = json.loads(fig.to_json())
            self.drawn += 1

    def on_click(self, function: Callable[[dict], None]) -> None:
        self.observe(lambda change: function(change["new"]), "clicked")

    def on_select(self, function: Callable[[dict], None]) -> None:
        self.observe(lambda change: function(change["new"]), "selected")
