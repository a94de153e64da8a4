"""One page of everything a run made: figures, numbers, executed notebooks. It opens from disk with no network.

The folder holds `run.json` (how each notebook ended), `notebooks/` (executed copies) and `figures/` (what
`figures.show` kept, and the one plotly.js that all pages share). `templates` holds what the page looks like.
"""

import datetime
import importlib.metadata
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader

from smoothbook import figures
from smoothbook.figures.show import PLOTLY_CONFIG, PLOTLY_JS, ensure_plotly_js, read_figure
from smoothbook.runner.notebooks import about
from smoothbook.runner.pages import TEMPLATES, notebook_page
from smoothkit.reading import ReportError, about_records, load_result
from smoothkit.reading.report import Result
from smoothkit.records import open_record, read_json, write_atomically

_PAGES = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
_REFERENCE = "../docs/index.html"  # where `make docs` puts the API reference, seen from runs/PRESET
_LINKS = {"html": "own page", "svg": "SVG", "pdf": "PDF", "png": "PNG", "csv": "numbers (CSV)"}


def build_gallery(out: str | Path) -> Path:
    """Write OUT/index.html, and OUT/notebooks/<name>.html for each executed notebook that has changed.

    Returns
    -------
    Path
        The index page.
    """
    out = Path(out)
    ensure_plotly_js(out / "figures")
    for path in sorted((out / "notebooks").glob("*.ipynb")):
        page = path.with_suffix(".html")
        if not page.exists() or page.stat().st_mtime_ns <= path.stat().st_mtime_ns:
            page.write_text(notebook_page(path), encoding="utf-8")
    index = _index(_read_run(out), _read_figures(out), out).encode()
    write_atomically(out / "index.html", lambda file: file.write(index))
    return out / "index.html"


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
    said = [about_records(records, alpha)] if records else []
    said += [f"log {r.name}, σ = {r.sigma}, α {r.alpha_text}" for r in results if r.kind != "record"]
    points, kept = figures.certified_accuracy_points(tables), Path(out) / "figures"
    for fig, name, numbers, what in (
        (figures.certified_accuracy_curve(tables, title="Certified accuracy"), "certified-accuracy", points, "Certified accuracy"),
        (figures.certified_accuracy_print(tables), "certified-accuracy-print", points, "Certified accuracy, for print"),
        (figures.radius_histogram(tables, title="Certified radii"), "certified-radii", None, "Certified radii; wrong answers hatched"),
    ):  # fmt: skip
        figures.keep(fig, name, numbers, figures_dir=kept, caption=f"{what}: {'; '.join(said)}.")
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
    run = read_json(path, ReportError, "delete it and run the notebooks again") if path.exists() else {}
    return {"preset": "", "notebooks": {}} | run


def _read_figures(out: Path) -> list[dict]:
    figures = [read_figure(path) for path in (out / "figures").glob("*.json")]
    return sorted(figures, key=lambda figure: (figure["notebook"] or "~", figure["order"], figure["name"]))


# --- the index ---------------------------------------------------------------------------------------


def _index(run: dict, figures: list[dict], out: Path) -> str:
    notebooks, sections = run["notebooks"], {}
    for figure in figures:
        heading = figure["notebook"] or ("Other figures" if notebooks else "Figures")
        sections.setdefault(heading, []).append(_figure(figure, out))
    now = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    return _PAGES.get_template("index.html.j2").render(
        preset=run["preset"],
        date=max((entry["date"] for entry in notebooks.values()), default=now).replace("T", " "),
        versions=_versions(),
        reference=_REFERENCE if (out / _REFERENCE).exists() else "",
        notebooks=[_notebook(name, entry, out) for name, entry in sorted(notebooks.items())],
        sections=sections,
        config=PLOTLY_CONFIG,
        plotly_js=PLOTLY_JS,
    )


def _versions() -> str:
    shown = [f"python {platform.python_version()}"]
    for package in ("torch", "plotly", "smoothkit"):
        try:
            shown.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            shown.append(f"{package} (source tree)")
    return " · ".join(shown)


def _notebook(name: str, entry: dict, out: Path) -> dict:
    """A line of the table of notebooks: how it ended, its title, its settings, and where its files are."""
    page, executed = (f"notebooks/{name}{ending}" for ending in (".html", ".ipynb"))
    known = {"page": page if (out / page).exists() else "", "executed": "", "title": "", "settings": {}}
    if (out / executed).exists():
        known |= {
            "executed": executed,
            "title": about(out / executed).title,
            "settings": notebook_settings(out / executed),
        }
    return {"name": name, **entry, **known}


def notebook_settings(executed: Path) -> dict[str, str]:
    """The parameters that an executed notebook ran with, as written: its defaults, and what papermill put over them."""
    found = {}
    for cell in nbformat.read(executed, as_version=4).cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            given = re.findall(r"^(\w+)(?:: \w+)? = (.+?)(?:  # .*)?$", cell.source, flags=re.MULTILINE)
            found |= {name: value for name, value in given if name != "figures_dir"}
    return found


def _figure(figure: dict, out: Path) -> dict:
    """A card of the index: the figure with its links, and how much room it needs."""
    layout = figure.get("figure", {}).get("layout", {})
    width, height = layout.get("width") or 0, layout.get("height") or 0
    links = {ending: text for ending, text in _LINKS.items() if (out / f"figures/{figure['name']}.{ending}").exists()}
    return {**figure, "links": links, "wide": max(width, height) > 520, "height": int(height or 430)}
