"""An executed notebook as a page that loads nothing but the plotly.js of its gallery."""

import html
import json
import re
from pathlib import Path

import nbformat
from jinja2 import FileSystemLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.preprocessors import Preprocessor

from smoothbook.figures.show import PLOTLY_JS, PLOTLY_MIME, plotly_div

TEMPLATES = Path(__file__).parent / "templates"
_WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


def notebook_page(path: Path) -> str:
    """An executed notebook as HTML that loads nothing but `../figures/plotly.min.js`."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    exporter = HTMLExporter(extra_loaders=[FileSystemLoader(TEMPLATES)], template_file="page.html.j2")
    exporter.register_preprocessor(OfflineOutputs(), enabled=True)
    resources = {"metadata": {"name": path.stem, "path": str(path.parent)}, "plotly_js": PLOTLY_JS}
    page, _ = exporter.from_notebook_node(notebook, resources)
    return strip_remote(page)


class OfflineOutputs(Preprocessor):
    """Turn plotly outputs into divs drawn by the shared plotly.js, TeX into MathML, widgets into a remark."""

    def preprocess_cell(self, cell, resources, index):
        if cell.cell_type == "markdown":
            cell.source = tex_to_mathml(cell.source)
        for number, output in enumerate(cell.get("outputs", [])):
            shown, data = None, output.get("data", {})
            if PLOTLY_MIME in data:
                shown = plotly_div(json.loads(json.dumps(data[PLOTLY_MIME])), f"plot-{index}-{number}")
            elif _WIDGET_MIME in data:
                shown = '<p class="sk-note">An interactive panel: open the notebook in JupyterLab to use it.</p>'
            elif "text/latex" in data and "text/html" not in data:
                shown = tex_to_mathml(data["text/latex"])
            if shown is not None:
                output.data = nbformat.from_dict({"text/html": shown})
        return cell, resources


_REMOTE = re.compile(
    r"<script\b[^>]*\bsrc\s*=\s*[\"']?(?:https?:)?//[^>]*>\s*</script>|<link\b[^>]*\bhref\s*=\s*[\"']?(?:https?:)?//[^>]*>",
    re.IGNORECASE,
)


def strip_remote(page: str) -> str:
    """The page without script and link elements that would be fetched from the network."""
    return _REMOTE.sub("", page)


# --- TeX without MathJax -----------------------------------------------------------------------------

_CODE_OR_TEX = re.compile(
    r"(?P<code>```.*?```|~~~.*?~~~|`+[^`]*`+)|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$`](?:[^$\n`]*[^\s$\\`])?)\$(?!\d)",
    re.DOTALL,
)


def tex_to_mathml(markdown: str) -> str:
    """Markdown with its TeX as MathML, which browsers draw by themselves; what cannot be converted stays as code."""
    return _CODE_OR_TEX.sub(lambda found: found["code"] or _mathml(found[found.lastgroup], found.lastgroup), markdown)


def _mathml(tex: str, display: str) -> str:
    tex = " ".join(tex.split())
    try:
        shown = convert(tex.replace(r"\arg", r"\operatorname{arg}"), display=display, xmlns="")
    except Exception:  # latex2mathml has a dozen kinds without a common one
        shown = ""
    if not shown or re.search(r">\\\w|&amp;", shown):  # a command that latex2mathml does not know stays in its text
        shown = f"<code>{html.escape(tex)}</code>"
    return re.sub(r"[*_`|~\[\]\\$]", lambda found: f"&#{ord(found[0])};", shown)  # Markdown must not read it again
