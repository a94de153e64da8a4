"""One page of everything a run made: figures, numbers, executed notebooks. It opens from disk with no network.

The folder holds `run.json` (how each notebook ended), `notebooks/` (executed copies) and `figures/` (what
`figures.show` kept, and the one plotly.js that all pages share).
"""

import base64
import datetime
import functools
import html
import importlib.metadata
import io
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from nbconvert.preprocessors import Preprocessor

from smoothbook import figures
from smoothbook.figures.show import PLOTLY_CONFIG, PLOTLY_JS, PLOTLY_MIME, ensure_plotly_js, plotly_div, script_json
from smoothkit.reading import ReportError, about_records, load_result
from smoothkit.reading.report import Result
from smoothkit.records import open_record

_WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


def build_gallery(out: str | Path) -> Path:
    """Write OUT/index.html, and OUT/notebooks/<name>.html for each executed notebook that has changed.

    Returns
    -------
    Path
        The index page.
    """
    out = Path(out)
    run = _read_run(out)
    ensure_plotly_js(out / "figures")
    for path in sorted((out / "notebooks").glob("*.ipynb")):
        page = path.with_suffix(".html")
        if not page.exists() or page.stat().st_mtime_ns <= path.stat().st_mtime_ns:
            page.write_text(notebook_page(path), encoding="utf-8")
    index = out / "index.html"
    part = index.with_suffix(".part")
    part.write_text(_index(run, _read_figures(out), out), encoding="utf-8")
    os.replace(part, index)
    return index


def report_figures(paths: Sequence[str | Path], out: str | Path, *, alpha: float | None = None) -> Path:
    """The figures that records and certification logs give, for screen and for print, on one offline page.

    Writes OUT/figures (HTML, SVG, PDF, PNG, the numbers as CSV) and OUT/index.html; each caption says what was certified
    how, as far as the file knows.

    Returns
    -------
    Path
        The index page.

    Raises
    ------
    ReportError
        If a path holds no result, or predictions without radii.
    """
    results = [load_result(path, alpha=alpha) for path in paths]
    without = [result.name for result in results if result.kind == "predict"]
    if without:
        raise ReportError(f"{', '.join(without)} holds predictions without radii, of which there is no curve to draw")
    sigmas = [result.sigma for result in results]
    by_sigma = None not in sigmas and len(set(sigmas)) == len(sigmas)
    tables = dict(zip(sigmas if by_sigma else unique_names(results), (r.table for r in results), strict=True))
    records = [open_record(result.path) for result in results if result.kind == "record"]
    about = [about_records(records, alpha)] if records else []
    about += [f"log {r.name}, σ = {r.sigma}, α {r.alpha_text}" for r in results if r.kind != "record"]
    points, kept = figures.certified_accuracy_points(tables), Path(out) / "figures"
    for fig, name, numbers, what in (
        (figures.certified_accuracy_curve(tables, title="Certified accuracy"), "certified-accuracy", points, "Certified accuracy"),
        (figures.certified_accuracy_print(tables), "certified-accuracy-print", points, "Certified accuracy, for print"),
        (figures.radius_histogram(tables, title="Certified radii"), "certified-radii", None, "Certified radii; wrong answers hatched"),
    ):  # fmt: skip
        figures.keep(fig, name, numbers, figures_dir=kept, caption=f"{what}: {'; '.join(about)}.")
    return build_gallery(out)


def unique_names(results: Sequence[Result]) -> list[str]:
    """A name for each result: the last folders of its path, as few as tell all apart."""
    parts = [result.path.resolve().parts for result in results]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ReportError(f"{results[0].path} is named twice; name each record or log once")


def _read_run(out: Path) -> dict:
    path = out / "run.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"preset": "", "notebooks": {}} | run


def _read_figures(out: Path) -> list[dict]:
    figures = [json.loads(path.read_text(encoding="utf-8")) for path in (out / "figures").glob("*.json")]
    return sorted(figures, key=lambda figure: (figure["notebook"] or "~", figure["order"], figure["name"]))


# --- executed notebooks as pages ---------------------------------------------------------------------

# the parts of nbconvert's page that would ask the network for require.js, MathJax, mermaid and widgets
_TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{% block html_head_js_requirejs %}<script charset="utf-8" src="../figures/PLOTLY_JS"></script>{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}<style>
main { max-width: 1060px; margin: 0 auto; padding: 1rem; }
.sk-plot { overflow-x: auto; }
.sk-back { font-family: var(--jp-ui-font-family); margin: 0 0 1rem; }
.sk-note { color: #555; font-style: italic; }
.jp-RenderedHTMLCommon img.sk-math { display: inline; margin: 0; max-width: none; background: none; }
.sk-display { display: block; text-align: center; margin: .6em 0; overflow-x: auto; }
details.sk-solution > summary { cursor: pointer; padding: .3em 0; font-family: var(--jp-ui-font-family); }
</style>{% endblock %}
{% block body_header %}{{ super() }}<p class="sk-back"><a href="../index.html">← gallery</a></p>{% endblock %}
{% block input_group %}
{%- if 'solution' in cell.metadata.get('tags', []) -%}
<details class="sk-solution"><summary>Solution</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{% endblock %}
""".replace("PLOTLY_JS", PLOTLY_JS)


class OfflineOutputs(Preprocessor):
    """Turn plotly outputs into divs drawn by the shared plotly.js, TeX into pictures, widgets into a remark."""

    def preprocess_cell(self, cell, resources, index):
        if cell.cell_type == "markdown":
            cell.source = math_to_pictures(cell.source)
        for number, output in enumerate(cell.get("outputs", [])):
            data = output.get("data", {})
            if PLOTLY_MIME in data:
                bundle = json.loads(json.dumps(data[PLOTLY_MIME]))
                output.data = nbformat.from_dict({"text/html": plotly_div(bundle, f"plot-{index}-{number}")})
            elif _WIDGET_MIME in data:
                remark = '<p class="sk-note">An interactive panel: open the notebook in JupyterLab to use it.</p>'
                output.data = nbformat.from_dict({"text/html": remark})
            elif "text/latex" in data and "text/html" not in data:
                output.data = nbformat.from_dict({"text/html": math_to_pictures(data["text/latex"])})
        return cell, resources


def notebook_page(path: Path) -> str:
    """An executed notebook as HTML that loads nothing but `../figures/plotly.min.js`."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    exporter = HTMLExporter(extra_loaders=[DictLoader({"offline.html.j2": _TEMPLATE})], template_file="offline.html.j2")
    exporter.register_preprocessor(OfflineOutputs(), enabled=True)
    resources = {"metadata": {"name": path.stem, "path": str(path.parent)}}
    page, _ = exporter.from_notebook_node(notebook, resources)
    return strip_remote(page)


_REMOTE = re.compile(
    r"<script\b[^>]*\bsrc\s*=\s*[\"']?(?:https?:)?//[^>]*>\s*</script>|<link\b[^>]*\bhref\s*=\s*[\"']?(?:https?:)?//[^>]*>",
    re.IGNORECASE,
)


def strip_remote(page: str) -> str:
    """The page without script and link elements that would be fetched from the network."""
    return _REMOTE.sub("", page)


# --- TeX without MathJax -----------------------------------------------------------------------------

_CODE_OR_MATH = re.compile(
    r"(?P<code>```.*?```|~~~.*?~~~|`+[^`]*`+)|\$\$(?P<display>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$`](?:[^$\n`]*[^\s$\\`])?)\$(?!\d)",
    re.DOTALL,
)
# spellings that MathJax knows and matplotlib does not
_SPELLINGS = [
    (r"\\[tdc]?frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\[tdc]frac", r"\\frac"),
    (r"\\lVert|\\rVert|\\Vert", r"\\|"),
    (r"\\lvert|\\rvert|\\vert", "|"),
    (r"\\(?:big|Big|bigg|Bigg)[lr]?(?![a-z])", ""),
    (r"\\operatorname\*?\{([^{}]*)\}", r"\\mathrm{\1}"),
    (r"\\arg\s*\\max", r"\\mathrm{arg\\,max}"),
    (r"\\(?:text|textrm|textnormal)\{([^{}]*)\}", lambda found: r"\mathrm{" + found[1].replace(" ", r"\ ") + "}"),
    (r"\\tag\{([^{}]*)\}", r"\\qquad(\1)"),
    (r"\\mid(?![a-z])", r"\\,|\\,"),
    (r"\\(?:lbrace|\{)", r"\\{"),
    (r"\\(le|ge|ne)(?![a-zA-Z])", r"\\\1q"),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:display|text|script)style|\\(?:no)?limits", ""),
    (r"\\mathop\{\s*\\rm\s+([^{}]*)\}", r"\\mathrm{\1}"),
    (r"\\coloneqq", ":="),
    (r"\\implies", r"\\Rightarrow"),
    (r"\\iff", r"\\Leftrightarrow"),
    (r"\\!", ""),
]


def math_to_pictures(markdown: str) -> str:
    """Markdown with its TeX drawn by matplotlib, as pictures in the text; what it cannot draw stays as code."""

    def replace(found: re.Match) -> str:
        if found["code"]:
            return found["code"]
        if found["display"]:
            return f'<span class="sk-display">{_tex_picture(found["display"])}</span>'
        return _tex_picture(found["inline"])

    return _CODE_OR_MATH.sub(replace, markdown)


@functools.lru_cache(maxsize=4096)
def _tex_picture(tex: str) -> str:
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser, math_to_image

    size = 12
    prop = FontProperties(size=size, math_fontfamily="stix")
    drawn = " ".join(tex.split())
    for pattern, spelling in _SPELLINGS:
        drawn = re.sub(pattern, spelling, drawn)
    shown = html.escape(" ".join(tex.split()), quote=True).replace("|", "&#124;")
    buffer = io.BytesIO()
    try:
        _, height, depth, *_ = MathTextParser("path").parse(f"${drawn}$", dpi=72, prop=prop)
        math_to_image(f"${drawn}$", buffer, prop=prop, dpi=72, format="svg")
    except (ValueError, RuntimeError):
        return f"<code>{shown}</code>"
    data = base64.b64encode(buffer.getvalue()).decode()
    style = f"height:{height / size * 1.15:.3f}em;vertical-align:{-depth / size * 1.15:.3f}em"
    return f'<img class="sk-math" alt="{shown}" style="{style}" src="data:image/svg+xml;base64,{data}">'


# --- the index ---------------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6774; --page: #f6f7f9; --card: #fff; --line: #dfe3e8;
  --link: #005a8f; --good: #00704f; --bad: #b34700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3adb8; --page: #15191e; --card: #1e242b;
  --line: #343c45; --link: #6cb8ea; --good: #4cc79c; --bad: #ff9a56; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 Arial, Helvetica, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
a { color: var(--link); } .soft { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; width: 100%; background: var(--card); }
th, td { text-align: left; padding: .45rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } .scroll { overflow-x: auto; }
.ok { color: var(--good); } .failed, .interrupted { color: var(--bad); font-weight: bold; }
details table { width: auto; } summary { cursor: pointer; }
code { font-size: .9em; overflow-wrap: anywhere; }
.figures { display: grid; gap: 1rem; grid-auto-flow: dense; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; background: var(--card); min-width: 0; }
figure.wide { grid-column: 1 / -1; }
.plot { background: #fff; border-radius: 6px 6px 0 0; overflow-x: auto; padding: 4px; }
.plot img { max-width: 100%; display: block; margin: auto; }
figcaption { padding: .5rem .8rem .7rem; font-size: .92rem; } figcaption a { margin-left: .6rem; white-space: nowrap; }
"""

# a figure is drawn when it comes near the window: fifty at once would keep the page busy for long
_SCRIPT = """
const config = CONFIG;
const seen = new IntersectionObserver(entries => entries.forEach(entry => {
  const div = entry.target;
  if (!entry.isIntersecting || div.dataset.drawn) return;
  div.dataset.drawn = "yes";
  const figure = JSON.parse(document.getElementById("data-" + div.id).textContent);
  Plotly.newPlot(div, {data: figure.data, layout: figure.layout, frames: figure.frames, config: config});
}), {rootMargin: "600px"});
document.querySelectorAll(".plotly").forEach(div => seen.observe(div));
"""


def _index(run: dict, figures: list[dict], out: Path) -> str:
    preset = f"preset <b>{html.escape(run['preset'])}</b> · " if run["preset"] else ""
    dates = [entry["date"] for entry in run["notebooks"].values()]
    date = max(dates, default=datetime.datetime.now().astimezone().isoformat(timespec="minutes"))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>smoothkit{f": {html.escape(run['preset'])}" if run["preset"] else ""}</title><style>{_CSS}</style>
<script charset="utf-8" src="figures/{PLOTLY_JS}"></script></head><body><main>
<h1>Certified robustness by randomized smoothing</h1>
<p class="soft">{preset}{html.escape(date.replace("T", " "))} · {html.escape(_versions())}</p>
{_notebook_table(run["notebooks"], out)}
{_error_table(run["notebooks"])}
{_figure_sections(run["notebooks"], figures, out)}
</main><script>{_SCRIPT.replace("CONFIG", json.dumps(PLOTLY_CONFIG))}</script></body></html>
"""


def _versions() -> str:
    shown = [f"python {platform.python_version()}"]
    for package in ("torch", "plotly", "smoothkit"):
        try:
            shown.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            shown.append(f"{package} (source tree)")
    return " · ".join(shown)


def _notebook_table(notebooks: dict[str, dict], out: Path) -> str:
    rows = "".join(_notebook_row(name, notebooks[name], out) for name in sorted(notebooks))
    head = "<tr><th>notebook</th><th>status</th><th>seconds</th><th>preset</th><th></th><th></th></tr>"
    return f'<h2>Notebooks</h2><div class="scroll"><table>{head}{rows}</table></div>' if rows else ""


def _notebook_row(name: str, entry: dict, out: Path) -> str:
    page, status = f"notebooks/{name}.html", html.escape(entry["status"])
    title = f'<a href="{html.escape(page)}">{html.escape(name)}</a>' if (out / page).exists() else html.escape(name)
    executed = out / f"notebooks/{name}.ipynb"
    source = f'<a href="notebooks/{html.escape(name)}.ipynb">.ipynb</a>' if executed.exists() else ""
    settings = "".join(
        f"<tr><td><code>{html.escape(what)}</code></td><td><code>{html.escape(value)}</code></td></tr>"
        for what, value in (notebook_settings(executed) if executed.exists() else {}).items()
    )
    shown = f"<details><summary>settings</summary><table>{settings}</table></details>" if settings else ""
    cells = f'<td>{title}</td><td class="{status}">{status}</td><td class="number">{entry["seconds"]:.0f}</td>'
    return f"<tr>{cells}<td>{html.escape(entry['preset'])}</td><td>{shown}</td><td>{source}</td></tr>"


def notebook_settings(executed: Path) -> dict[str, str]:
    """The parameters that an executed notebook ran with, as written: its defaults, and what papermill put over them."""
    found = {}
    for cell in nbformat.read(executed, as_version=4).cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            given = re.findall(r"^(\w+)(?:: \w+)? = (.+?)(?:  # .*)?$", cell.source, flags=re.MULTILINE)
            found |= {name: value for name, value in given if name != "figures_dir"}
    return found


def _error_table(notebooks: dict[str, dict]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(entry['error'])}</code></td></tr>"
        for name, entry in sorted(notebooks.items())
        if entry["error"]
    )
    return f'<h2>What went wrong</h2><div class="scroll"><table>{rows}</table></div>' if rows else ""


def _figure_sections(notebooks: dict[str, dict], figures: list[dict], out: Path) -> str:
    sections: dict[str, list[str]] = {}
    for figure in figures:
        sections.setdefault(figure["notebook"] or ("Other figures" if notebooks else "Figures"), []).append(
            _figure_card(figure, out)
        )
    return "".join(
        f'<h2 id="{html.escape(name)}">{html.escape(name)}</h2><div class="figures">{"".join(cards)}</div>'
        for name, cards in sections.items()
    )


def _figure_card(figure: dict, out: Path) -> str:
    name = html.escape(figure["name"])
    links = "".join(
        f'<a href="figures/{name}.{ending}">{text}</a>'
        for ending, text in (
            ("html", "own page"),
            ("svg", "SVG"),
            ("pdf", "PDF"),
            ("png", "PNG"),
            ("csv", "numbers (CSV)"),
        )
        if (out / f"figures/{figure['name']}.{ending}").exists()
    )
    caption = f"<figcaption>{html.escape(figure['caption'])} {links}</figcaption>"
    if "image" in figure:
        source = html.escape(figure["image"])
        picture = f'<img loading="lazy" alt="{html.escape(figure["caption"])}" src="figures/{source}">'
        return f'<figure><div class="plot">{picture}</div>{caption}</figure>'
    layout = figure["figure"].get("layout", {})
    wide = " class=wide" if (layout.get("width") or 0) > 520 or (layout.get("height") or 0) > 520 else ""
    div = f'<div id="{name}" class="plotly" style="min-height:{int(layout.get("height") or 430)}px"></div>'
    data = f'<script type="application/json" id="data-{name}">{script_json(figure["figure"])}</script>'
    return f'<figure{wide}><div class="plot">{div}</div>{data}{caption}</figure>'
