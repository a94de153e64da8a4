"""What all panels share: a live figure that survives a reload, one lock, errors shown in place, work with a stop button.

`LiveFigure` keeps the whole figure in one synced trait, so whoever asks the kernel for its state, a page that was
reloaded or a second tab, gets what is shown now. plotly's FigureWidget sends changes as one-shot messages instead and
is back at its first picture after a reload. plotly.js (5 MB, sent as 1.5) goes to the page once, however many figures
there are.

Callbacks may run on another thread than the notebook's cell: they read finished arrays and hold the panel's lock.
"""

import base64
import difflib
import functools
import gzip
import html
import io
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import traitlets
from PIL import Image
from plotly.offline import get_plotlyjs
from traitlets import TraitError

from smoothbook import figures
from smoothkit.types import check_alpha

CONFIG = figures.PLOTLY_CONFIG
STATIC_VARIABLE = "SMOOTHKIT_NOTEBOOK"  # set where notebooks are executed to be kept, see `workbook`

# The page has it before the first figure needs it. Unpacking is not waited for: a widget has two seconds to start.
_LIBRARY = """
async function unpack(packed) {
  const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const code = `const module = {exports: {}}, define = undefined;\n${text}\nexport default module.exports;`;
  const url = URL.createObjectURL(new Blob([code], {type: "text/javascript"}));
  const found = await import(url);
  URL.revokeObjectURL(url);
  return found.default;
}
export default {
  initialize({ model }) { globalThis[Symbol.for("smoothkit.plotly")] ??= unpack(model.get("packed")); }
};
"""

_FIGURE = """
const key = Symbol.for("smoothkit.plotly");
async function library() {
  for (let i = 0; !globalThis[key]; i++) {
    if (i > 1200) throw new Error("plotly.js has not come from the kernel; run the cell again");
    await new Promise(resolve => setTimeout(resolve, 50));
  }
  return globalThis[key];
}
export default {
  async render({ model, el }) {
    const plotly = await library();
    const box = document.createElement("div");
    box.className = "smoothkit-figure";
    box.setAttribute("role", "img");
    el.appendChild(box);
    let drawing = false, again = false, listening = false, gone = false;
    async function draw() {
      if (drawing) { again = true; return; }
      drawing = true;
      do {
        again = false;
        const { data, layout } = structuredClone(model.get("content"));
        box.setAttribute("aria-label", layout?.title?.text ?? "figure");
        await plotly.react(box, data ?? [], layout ?? {}, model.get("config"));
        box.dataset.drawn = model.get("drawn");
        if (!listening) { listen(); listening = true; }
      } while (again && !gone);
      drawing = false;
    }
    let events = 0;
    function tell(name, what) {
      model.set(name, { ...what, event: ++events + Date.now() });
      model.save_changes();
    }
    function listen() {
      box.on("plotly_click", ({ points }) => {
        const p = points[0], i = p.pointNumber ?? null;
        tell("clicked", { trace: p.curveNumber, point: i, x: p.x ?? null, y: p.y ?? null });
      });
      box.on("plotly_selected", found => {
        if (found?.range) tell("selected", { x: found.range.x ?? null, y: found.range.y ?? null });
      });
      box.on("plotly_deselect", () => tell("selected", {}));
    }
    model.on("change:drawn", draw);
    const watch = new ResizeObserver(() => { if (box.offsetParent && listening) plotly.Plots.resize(box); });
    watch.observe(el);
    await draw();
    return () => { gone = true; watch.disconnect(); model.off("change:drawn", draw); plotly.purge(box); };
  }
};
"""


class PlotlyLibrary(anywidget.AnyWidget):
    """plotly.js for the page, packed; one is enough for all figures of a kernel."""

    _esm = _LIBRARY
    packed = traitlets.Bytes().tag(sync=True)

    def __init__(self) -> None:
        super().__init__(packed=gzip.compress(get_plotlyjs().encode(), mtime=0))


@functools.cache
def _library() -> PlotlyLibrary:
    return PlotlyLibrary()


class LiveFigure(anywidget.AnyWidget):
    """A plotly figure in a notebook, redrawn whole by `draw`; what is shown is the widget's state.

    `clicked` holds the last click as trace, point, x, y; `selected` the last box drawn as ranges x and y, empty when
    it is taken away. `on_click` and `on_select` call a function with them.
    """

    _esm = _FIGURE
    content = traitlets.Dict().tag(sync=True)  # data and layout, as plotly.js takes them
    config = traitlets.Dict(CONFIG).tag(sync=True)
    drawn = traitlets.Int(0).tag(sync=True)  # how many times; the page redraws when it grows
    clicked = traitlets.Dict().tag(sync=True)
    selected = traitlets.Dict().tag(sync=True)

    def __init__(self, fig: go.Figure | None = None) -> None:
        _library()
        self.figure = go.Figure() if fig is None else fig
        super().__init__(content=_content(self.figure))

    def draw(self, fig: go.Figure) -> None:
        """Show `fig`, which is then `self.figure`."""
        self.figure = fig
        with self.hold_sync():  # one message, so that no page draws new data with an old layout
            self.content = _content(fig)
            self.drawn += 1

    def on_click(self, function: Callable[[dict], None]) -> None:
        self.observe(lambda change: function(change["new"]), "clicked")

    def on_select(self, function: Callable[[dict], None]) -> None:
        self.observe(lambda change: function(change["new"]), "selected")


def _content(fig: go.Figure) -> dict:
    return json.loads(fig.to_json())


# --- panels ------------------------------------------------------------------------------------------


class Panel(widgets.VBox):
    """Controls, a live figure, words below it, and a place for errors.

    A subclass keeps its data as plain attributes, set before this `__init__`, declares its settings as traits tagged
    `setting=True`, and has `draw`, a function of both that returns the figure and a sentence of HTML. Whatever moves
    a setting, a control or a line of Python, moves the figure. Values are checked by the traits: in Python a bad one
    raises TraitError, in the page the controls do not offer it.
    """

    error = traitlets.Unicode("", help="what went wrong last, as the panel shows it; empty when nothing did")

    def __init__(self, **settings) -> None:
        refuse_unknown(type(self), settings)
        self.lock = threading.RLock()
        super().__init__(**settings)
        self.live, self._alert, self._words = LiveFigure(), widgets.HTML(), widgets.HTML()
        self.children = [*self.controls(), self._alert, self.live, self._words, *self.below()]
        self.observe(self.refresh, self.settings())
        self.refresh()

    @classmethod
    def settings(cls) -> list[str]:
        """The names of what may be set."""
        return sorted(cls.class_trait_names(setting=True))

    @property
    def figure(self) -> go.Figure:
        """The figure as it is shown now."""
        return self.live.figure

    @property
    def words(self) -> str:
        """The HTML below the figure."""
        return self._words.value

    def controls(self) -> Sequence[widgets.Widget]:
        """Widgets above the figure, linked to the settings."""
        return ()

    def below(self) -> Sequence[widgets.Widget]:
        """Widgets under the words."""
        return ()

    def draw(self) -> tuple[go.Figure, str]:
        raise NotImplementedError

    def refresh(self, _change: object = None) -> None:
        """Draw again from the settings; what goes wrong is shown in the panel, and the last figure stays."""
        with self.lock:
            try:
                fig, words = self.draw()
            except Exception as error:  # shown where the reader looks; a callback's traceback would go to a log
                self.complain(error)
                return
            self.live.draw(fig)
            self._words.value = words
            self.complain(None)

    def settle(self) -> None:
        """Wait for work under way, where a panel has any."""

    def complain(self, error: BaseException | None) -> None:
        self.error = "" if error is None else f"{type(error).__name__}: {error}"
        look = (
            "border-left:4px solid #D55E00;padding:.4em .8em;margin:.3em 0;"
            "background:var(--jp-layout-color2,#f3f3f3);color:var(--jp-ui-font-color1,#1f2933)"
        )
        self._alert.value = f'<div role="alert" style="{look}">{html.escape(self.error)}</div>' if self.error else ""

    @traitlets.validate("alpha")
    def _valid_alpha(self, proposal: dict) -> float:
        try:
            check_alpha(proposal["value"])
        except ValueError as error:
            raise TraitError(str(error)) from None
        return proposal["value"]


def refuse_unknown(panel: type[Panel], given: Iterable[str]) -> None:
    """A misspelt setting is an error that names it; ipywidgets would only warn."""
    known = panel.settings()
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{panel.__name__} has no setting {name!r}{hint or ';'} it has {', '.join(known)}")


def row(*children: widgets.Widget) -> widgets.Box:
    """Controls side by side, on a second line where the page is narrow."""
    return widgets.Box(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px 18px"))


class AlphaControl(widgets.Box):
    """alpha as a slider from one in a million to one half, and as a number for any value between."""

    def __init__(self, panel: Panel) -> None:
        self.slider = widgets.FloatLogSlider(
            value=panel.alpha, base=10, min=-6, max=-0.3, step=0.05, description="alpha", readout=False,
            tooltip="failure probability of a certificate", style={"description_width": "4em"},
        )  # fmt: skip
        self.number = widgets.BoundedFloatText(
            value=panel.alpha,
            min=1e-300,
            max=1 - 1e-9,
            step=None,
            layout={"width": "7em", "margin": "2px 2px 2px 12px"},
        )
        super().__init__([self.slider, self.number], layout=widgets.Layout(align_items="center"))
        self.panel, self._following = panel, False
        widgets.link((panel, "alpha"), (self.number, "value"))
        panel.observe(self._follow, "alpha")
        self.slider.observe(self._moved, "value")

    def _follow(self, change: dict) -> None:
        self._following = True  # a value beyond the slider's ends leaves it there, and stands
        self.slider.value = change["new"]
        self._following = False

    def _moved(self, change: dict) -> None:
        """The page answers a value between two steps with the nearest step; that is no wish of the reader's."""
        if not self._following and round(self._steps(change["new"])) != round(self._steps(self.panel.alpha)):
            self.panel.alpha = change["new"]

    def _steps(self, alpha: float) -> float:
        return math.log10(alpha) / self.slider.step


class EdgeControl(widgets.Box):
    """n as a slider that stops at block edges, and as a number: the largest edge not above it is taken."""

    value = traitlets.Int()

    def __init__(self, edges: Sequence[int], value: int, description: str = "n") -> None:
        self.edges = sorted(edges)
        self.slider = widgets.SelectionSlider(
            options=[(f"{e:,}", e) for e in self.edges], value=value, description=description, readout=False,
            tooltip="samples used: the first n, at the edges of blocks that were counted",
            style={"description_width": "4em"},
        )  # fmt: skip
        self.number = widgets.BoundedIntText(
            value=value,
            min=self.edges[0],
            max=self.edges[-1],
            step=1,
            layout={"width": "7em", "margin": "2px 2px 2px 12px"},
        )
        super().__init__([self.slider, self.number], layout=widgets.Layout(align_items="center"))
        self.value = value
        widgets.link((self, "value"), (self.slider, "value"))
        self.observe(self._show, "value")
        self.number.observe(self._typed, "value")

    def _show(self, change: dict) -> None:
        self.number.value = change["new"]

    def _typed(self, change: dict) -> None:
        self.value = max(e for e in self.edges if e <= change["new"])
        self.number.value = self.value


def choose_edge(edges: Sequence[int], n: int) -> int:
    """n if it is one of the edges; else an error that names them."""
    if n not in edges:
        raise TraitError(f"n must be a block edge, one of {', '.join(f'{e:,}' for e in edges)}; got {n:,}")
    return n


def linked(panel: Panel, name: str, control: widgets.Widget) -> widgets.Widget:
    """The control, moving the panel's setting and moved by it."""
    widgets.link((panel, name), (control, "value"))
    return control


def note(text: str) -> str:
    """A sentence under a figure, readable on a dark page."""
    return f'<p style="margin:.2em 0;line-height:1.5;color:var(--jp-ui-font-color1,#1f2933)">{text}</p>'


def thumbnail(pixels: np.ndarray, caption: str, *, side: int = 56, mark: str = "transparent") -> str:
    """A small picture [C, H, W] on [0, 1] with a line of HTML below it; `mark` colours its frame."""
    shown = np.rint(255 * np.nan_to_num(np.asarray(pixels, dtype=np.float32)).clip(0, 1)).astype(np.uint8)
    image = Image.fromarray(shown[0] if len(shown) == 1 else shown.transpose(1, 2, 0))
    file = io.BytesIO()
    image.save(file, format="png")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    plain = html.escape(caption.replace("<br>", ", "), quote=True)
    return (
        f'<figure style="display:inline-block;margin:2px 5px;text-align:center;vertical-align:top">'
        f'<img src="{source}" alt="{plain}" width="{side}" height="{side}" '
        f'style="image-rendering:pixelated;border:3px solid {mark}">'
        f'<figcaption style="font-size:11px;line-height:1.25">{caption}</figcaption></figure>'
    )


# --- work that takes a while -------------------------------------------------------------------------


class Job(widgets.HBox):
    """A start button, a stop button and a bar around work done on a thread of its own.

    `work(job)` looks at `job.stopped` between its pieces and tells `job.progress(share)`. What it raises is given to
    `complain`. One piece of work at a time: `start` while it runs is ignored, `restart` ends what runs and begins anew.
    `start_with` is called when the start button is pressed.
    """

    running = traitlets.Bool(False)

    def __init__(
        self,
        start: str,
        work: Callable[["Job"], None],
        complain: Callable[[BaseException | None], None],
        *,
        start_with: Callable[[], None] = lambda: None,
    ) -> None:
        self._work, self._complain, self._stop = work, complain, threading.Event()
        self._thread: threading.Thread | None = None
        self._guard, self._again = threading.Lock(), False
        self.start_button = widgets.Button(description=start, icon="play", button_style="primary")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.bar = widgets.FloatProgress(min=0, max=1, layout={"width": "12em"})
        self.label = widgets.Label()
        super().__init__([self.start_button, self.stop_button, self.bar, self.label])
        self.start_button.on_click(lambda _: (start_with(), self.start()))
        self.stop_button.on_click(lambda _: self.stop())

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def start(self) -> None:
        with self._guard:
            if self.running:
                return
            self._begin_work()

    def restart(self) -> None:
        with self._guard:
            if self.running:
                self._again = True
                self._stop.set()
            else:
                self._begin_work()

    def _begin_work(self) -> None:
        self._stop.clear()
        self._again, self.running = False, True
        self.start_button.disabled, self.stop_button.disabled = True, False
        self._begin, self._told, self._next = time.perf_counter(), 0.0, 0.0
        self._thread = threading.Thread(target=self._run, name="smoothkit-panel", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the work to end after the piece it is at."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until the work is done, or the seconds have passed."""
        if self._thread is not None:
            self._thread.join(seconds)

    def progress(self, share: float, what: str = "") -> None:
        """At most ten messages a second."""
        if share < 1 and time.perf_counter() - self._told < 0.1:
            return
        self._told = time.perf_counter()
        self.bar.value = share
        self.label.value = f"{what} {self._told - self._begin:.1f} s"

    def now_and_then(self, draw: Callable[[], None]) -> None:
        """Draw, unless that was done just now: drawing may take a third of the time, and is a fifth of a second apart."""
        begin = time.perf_counter()
        if begin < self._next:
            return
        draw()
        end = time.perf_counter()
        self._next = end + max(0.2, 2 * (end - begin))

    def _run(self) -> None:
        while True:
            try:
                self._work(self)
            except Exception as error:
                self._complain(error)
            with self._guard:
                if self._again:
                    self._again = False
                    self._stop.clear()
                    continue
                self.start_button.disabled, self.stop_button.disabled = False, True
                self.running = False
                return


# --- live or kept ------------------------------------------------------------------------------------


def is_live() -> bool:
    """Whether a person is there: in a notebook's kernel, and not in a run that keeps figures (`smoothkit run`)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel") and not os.environ.get(STATIC_VARIABLE)


_names = itertools.count(1)


def show(panel: Panel, name: str = "", *, figures_dir: str | Path = "", caption: str = "") -> None:
    """The panel itself where a person is there to move it; else its figure, which is also kept if given a folder."""
    if is_live() and not str(figures_dir):
        from IPython.display import display

        display(panel)
        return
    panel.settle()
    if panel.error:
        raise RuntimeError(panel.error)
    figures.show(panel.figure, name or f"panel-{next(_names)}", figures_dir=figures_dir, caption=caption)
