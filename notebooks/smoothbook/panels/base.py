"""What all panels share: settings that are checked, one lock, errors shown in place, and the controls of alpha and n.

Callbacks may run on another thread than the notebook's cell: they read finished arrays and hold the panel's lock.
"""

import base64
import html
import io
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import traitlets
from PIL import Image
from traitlets import TraitError

from smoothbook import figures
from smoothbook.panels.job import Job
from smoothbook.panels.live import LiveFigure
from smoothkit.types import check_alpha

STATIC_VARIABLE = "SMOOTHKIT_NOTEBOOK"  # set where notebooks are executed to be kept, see `runner.run`
LABEL = {"description_width": "4.5em"}  # the style of a control with a label before it
_NUMBER = {"width": "7em", "margin": "2px 2px 2px 12px"}  # the layout of the number beside a slider


class Panel(widgets.VBox):
    """Controls, a live figure, words below it, and a place for errors.

    A subclass keeps its data as plain attributes, set before this `__init__`, declares its settings as traits tagged
    `setting=True`, and has `draw`, a function of both that returns the figure and a sentence of HTML. Whatever moves a
    setting, a control or a line of Python, moves the figure. Values are checked by the traits: in Python a bad one
    raises TraitError, in the page the controls do not offer it. The settings alpha, n and image are checked here: n
    against `edges` where votes were counted in blocks, image against `images`.
    """

    error = traitlets.Unicode("", help="what went wrong last, as the panel shows it; empty when nothing did")
    edges: Sequence[int] = ()  # block edges of the votes at hand, the values that n may have
    job: Job | None = None  # work that takes a while, where a panel has any

    def __init__(self, settings: Mapping[str, object]) -> None:
        self.lock = threading.RLock()
        super().__init__(**settings)
        self.live, self._alert, self._words = LiveFigure(), widgets.HTML(), widgets.HTML()
        self.children = [*self.controls(), self._alert, self.live, self._words]
        self.observe(self.refresh, self.settings())
        self.refresh()

    @classmethod
    def settings(cls) -> list[str]:
        """The names of what may be set."""
        return sorted(cls.class_trait_names(setting=True))

    def chosen(self, *names: str) -> dict[str, object]:
        """The values of these settings."""
        return {name: getattr(self, name) for name in names}

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
        if self.job is not None:
            self.job.wait()

    def complain(self, error: BaseException | None) -> None:
        """Show what went wrong, or with None take it away."""
        self.error = "" if error is None else f"{type(error).__name__}: {error}"
        said = f'<div role="alert" class="smoothkit-alert">{html.escape(self.error)}</div>'
        self._alert.value = said if self.error else ""

    @traitlets.validate("alpha")
    def _valid_alpha(self, proposal: dict) -> float:
        return _valid(check_alpha, proposal["value"])

    @traitlets.validate("n")
    def _valid_n(self, proposal: dict) -> int:
        return _valid(check_edge, proposal["value"], self.edges) if self.edges else proposal["value"]

    @traitlets.validate("image")
    def _valid_image(self, proposal: dict) -> int:
        if not 0 <= proposal["value"] < len(self.images):
            raise TraitError(f"image must lie in 0..{len(self.images) - 1}, got {proposal['value']}")
        return proposal["value"]


def _valid(check: Callable, value: object, *others: object) -> object:
    """The value, or what `check` says against it as the error of a trait."""
    try:
        check(value, *others)
    except ValueError as error:
        raise TraitError(str(error)) from None
    return value


def check_edge(n: int, edges: Sequence[int]) -> None:
    """Refuse an n at which votes were not counted."""
    if n not in edges:
        raise ValueError(f"n must be a block edge, one of {', '.join(f'{e:,}' for e in edges)}; got {n:,}")


# --- controls ----------------------------------------------------------------------------------------


def row(*children: widgets.Widget) -> widgets.Box:
    """Controls side by side, on a second line where the page is narrow."""
    return widgets.Box(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px 18px"))


def linked(panel: Panel, name: str, control: widgets.Widget) -> widgets.Widget:
    """The control, moving the panel's setting and moved by it."""
    widgets.link((panel, name), (control, "value"))
    return control


def image_number(panel: Panel) -> widgets.Widget:
    """The image looked at, as a number to type."""
    most = len(panel.images) - 1
    return linked(panel, "image", widgets.BoundedIntText(min=0, max=most, description="image", style=LABEL))


def sigma_slider(panel: Panel) -> widgets.Widget:
    """sigma as a slider that asks for votes when it is let go."""
    how = dict(min=0.02, max=2.0, step=0.01, continuous_update=False, style=LABEL)
    return linked(panel, "sigma", widgets.FloatSlider(value=panel.sigma, description="sigma", **how))


class AlphaControl(widgets.Box):
    """alpha as a slider from one in a million to one half, and as a number for any value between."""

    def __init__(self, panel: Panel) -> None:
        self.slider = widgets.FloatLogSlider(
            value=panel.alpha, base=10, min=-6, max=-0.3, step=0.05, description="alpha", readout=False,
            tooltip="failure probability of a certificate", style=LABEL,
        )  # fmt: skip
        number = widgets.BoundedFloatText(value=panel.alpha, min=1e-300, max=1 - 1e-9, step=None, layout=_NUMBER)
        self.number, self.panel, self._following = linked(panel, "alpha", number), panel, False
        super().__init__([self.slider, self.number], layout={"align_items": "center"})
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
    """n as a slider that stops at a panel's block edges, and as a number: the largest edge not above it is taken."""

    def __init__(self, panel: Panel) -> None:
        self.panel = panel
        self.slider = widgets.SelectionSlider(
            options=[(f"{e:,}", e) for e in panel.edges], value=panel.n, description="n", readout=False, style=LABEL,
            tooltip="samples used: the first n, at the edges of blocks that were counted",
        )  # fmt: skip
        self.number = widgets.BoundedIntText(value=panel.n, min=panel.edges[0], max=panel.edges[-1], layout=_NUMBER)
        super().__init__([linked(panel, "n", self.slider), self.number], layout={"align_items": "center"})
        panel.observe(self._follow, "n")
        self.number.observe(self._typed, "value")

    def _follow(self, change: dict) -> None:
        self.number.value = change["new"]

    def _typed(self, change: dict) -> None:
        self.panel.n = max(e for e in self.panel.edges if e <= change["new"])
        self.number.value = self.panel.n


# --- words and small pictures ------------------------------------------------------------------------


def note(text: str) -> str:
    """A sentence under a figure, readable on a dark page."""
    return f'<p class="smoothkit-note">{text}</p>'


def thumbnail(pixels: np.ndarray, caption: str, *, side: int = 56, crossing: bool = False) -> str:
    """A small picture [C, H, W] on [0, 1], `side` screen pixels wide, with a line of HTML below it.

    `crossing` frames it in the colour of an attack that crossed its certified radius.
    """
    shown = np.rint(255 * np.nan_to_num(np.asarray(pixels, dtype=np.float32)).clip(0, 1)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(shown[0] if len(shown) == 1 else shown.transpose(1, 2, 0)).save(file, format="png")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    plain = html.escape(caption.replace("<br>", ", "), quote=True)
    return (
        f'<figure class="smoothkit-thumbnail{" crossing" if crossing else ""}">'
        f'<img src="{source}" alt="{plain}" width="{side}" height="{side}"><figcaption>{caption}</figcaption></figure>'
    )


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
        from IPython.display import display  # loaded only where there is a notebook

        display(panel)
    else:
        still(panel, name or f"panel-{next(_names)}", figures_dir=figures_dir, caption=caption)


def still(panel: Panel, name: str, *, figures_dir: str | Path = "", caption: str = "") -> None:
    """Show, and given a folder keep, a panel's figure as it is now, after the work it has under way."""
    panel.settle()
    if panel.error:
        raise RuntimeError(f"{type(panel).__name__} says: {panel.error}")
    figures.show(panel.figure, name, figures_dir=figures_dir, caption=caption)
