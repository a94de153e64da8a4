"""Figures on their way to a reader: shown in a notebook, kept with their numbers, written as pages and for print."""

import html
import io
import itertools
import json
import os
import re
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.offline import get_plotlyjs

from smoothbook.figures.style import FONT
from smoothkit.records import read_json, write_atomically

PLOTLY_JS = "plotly.min.js"
PLOTLY_MIME = "application/vnd.plotly.v1+json"
# plotly 7 puts a button on every figure that uploads it to a cloud service; ours stay here
PLOTLY_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}
_PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
_saved = itertools.count(1)  # the gallery shows figures in the order in which they were made


# --- shown in a notebook -----------------------------------------------------------------------------


class Live:
    """A figure drawn again in place while something runs: `update` at will, then `show(..., live=it)` to keep the last.

    In a plain script `update` draws nothing.
    """

    def __init__(self) -> None:
        self._handle = None

    def update(self, fig: go.Figure, caption: str = "") -> None:
        """Show `fig` in place of what was shown before."""
        bundle = _bundle(fig, caption or _title(fig) or "figure")
        if self._handle is not None:
            self._handle.update(bundle, raw=True)
        elif _in_notebook():
            self._handle = _display(bundle, display_id=True)


def show(
    fig: go.Figure,
    name: str,
    table: pd.DataFrame | None = None,
    *,
    figures_dir: str | Path = "",
    caption: str = "",
    live: Live | None = None,
) -> None:
    """Show a figure in the notebook, in place of what `live` drew if given, and keep it with its numbers in a folder.

    Writes `<name>.html` (drawn by one `plotly.min.js` shared in the folder), `<name>.csv` (the numbers: `table`, or
    what the traces hold) and `<name>.json` (title, caption and the figure, for the gallery).
    """
    caption = caption or _title(fig) or name
    if live is None:
        _display(_bundle(fig, caption))
    else:
        live.update(fig, caption)
    if str(figures_dir):
        keep(fig, name, table, figures_dir=figures_dir, caption=caption)


def show_print(fig: Figure, name: str, table: pd.DataFrame, *, figures_dir: str | Path = "", caption: str = "") -> None:
    """Show a matplotlib figure as SVG and, given a folder, keep it as `<name>.svg`, `.pdf` and `.png` with numbers."""
    caption = caption or name
    _display({"image/svg+xml": _rendered(fig, "svg").decode(), "text/plain": f"[figure: {caption}]"})
    if str(figures_dir):
        keep(fig, name, table, figures_dir=figures_dir, caption=caption)


def _bundle(fig: go.Figure, caption: str) -> dict:
    return {PLOTLY_MIME: {**json.loads(fig.to_json()), "config": PLOTLY_CONFIG}, "text/plain": f"[figure: {caption}]"}


def _display(bundle: dict, **how: object) -> object:
    from IPython.display import display  # slow to load, and of no use outside a notebook

    if _in_notebook():
        return display(bundle, raw=True, **how)
    print(bundle["text/plain"])  # a plain script cannot draw; a line of text beats a page of JSON


def _in_notebook() -> bool:
    from IPython import get_ipython  # as above

    return get_ipython() is not None


def _title(fig: go.Figure) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", fig.layout.title.text or "")).strip()


# --- kept in a folder --------------------------------------------------------------------------------


def keep(
    fig: go.Figure | Figure, name: str, table: pd.DataFrame | None = None, *, figures_dir: str | Path, caption: str = ""
) -> None:
    """Keep a figure with its numbers in a folder, as `show` does (plotly) or `show_print` (matplotlib), unseen."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,79}", name):
        raise ValueError(f"name must be lower-case letters, digits, - and _ (it becomes a file name), got {name!r}")
    folder = Path(figures_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(fig, Figure):
        for ending in ("svg", "pdf", "png"):
            (folder / f"{name}.{ending}").write_bytes(_rendered(fig, ending))
        what = {"image": f"{name}.svg"}
    else:
        ensure_plotly_js(folder)
        what, table = {"figure": json.loads(fig.to_json())}, figure_numbers(fig) if table is None else table
        shown = {"name": name, "figure": _to_draw(what["figure"]), "caption": caption}
        page = _PAGES.get_template("page.html").render(**shown, plotly_js=PLOTLY_JS, font=FONT)
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    table.to_csv(folder / f"{name}.csv", index=False)
    about = {"name": name, "caption": caption, "order": next(_saved), "notebook": os.environ.get("SMOOTHKIT_NOTEBOOK")}
    text = json.dumps({**about, **what})
    write_atomically(folder / f"{name}.json", lambda file: file.write(text.encode()))


def read_figure(path: Path) -> dict:
    """What `keep` wrote as `<name>.json`; a ValueError names a file that is damaged."""
    remedy = "delete it and run its notebook again"
    return read_json(path, ValueError, remedy, name=str, caption=str, order=int, notebook=str | None)


def figure_numbers(fig: go.Figure) -> pd.DataFrame:
    """What the traces of a figure hold, in long form: `trace, x, y`, or `trace, row, column, value` for pictures."""
    frames = []
    for position, trace in enumerate(fig.data):
        name = trace.name or f"trace {position}"
        if getattr(trace, "z", None) is not None:
            z = np.asarray(trace.z)
            index = np.indices(z.shape).reshape(z.ndim, -1)
            named = dict(zip(("row", "column", "channel"), index, strict=False))
            frames.append(pd.DataFrame({"trace": name, **named, "value": z.ravel()}))
        elif trace.y is not None:
            x = trace.x if trace.x is not None else np.arange(len(trace.y))
            frames.append(pd.DataFrame({"trace": name, "x": np.asarray(x), "y": np.asarray(trace.y)}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"trace": []})


def ensure_plotly_js(folder: Path) -> Path:
    """The one copy of plotly.js that every figure in a folder shares; written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path, content = folder / PLOTLY_JS, get_plotlyjs().encode()
    if not path.exists() or path.stat().st_size != len(content):
        write_atomically(path, lambda file: file.write(content))  # notebooks run side by side: one of them wins
    return path


def plotly_div(bundle: dict, div_id: str) -> str:
    """A div and the script that draws the figure in it; the page must have loaded plotly.js."""
    return _PAGES.get_template("plot.html").render(name=div_id, figure=_to_draw(bundle))


def _to_draw(bundle: dict) -> dict:
    return {key: bundle[key] for key in ("data", "layout", "frames") if key in bundle} | {"config": PLOTLY_CONFIG}


def save_print(fig: Figure, path: str | Path, table: pd.DataFrame) -> Path:
    """Write a matplotlib figure to `path` (.svg, .pdf or .png), the same bytes each time, and its numbers as CSV beside it."""
    path = Path(path)
    ending = path.suffix.lstrip(".").lower()
    if ending not in ("svg", "pdf", "png"):
        raise ValueError(f"path must end in .svg, .pdf or .png, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_rendered(fig, ending))
    table.to_csv(path.with_suffix(".csv"), index=False)
    return path


def _rendered(fig: Figure, ending: str) -> bytes:
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[ending]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "smoothkit", "svg.fonttype": "path", "pdf.fonttype": 42}):
        fig.savefig(buffer, format=ending, metadata=undated, dpi=200)
    return buffer.getvalue()
