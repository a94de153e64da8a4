"""Every notebook, executed by papermill at the smoke preset."""

import ast
import json

import pandas as pd
import pytest
from conftest import ROOT

from smoothbook.runner.notebooks import load_preset, notebook_names, presets
from smoothbook.runner.run import run_notebooks

NAMES = notebook_names()


def test_every_notebook_has_a_preset_and_every_preset_fits():
    assert {"smoke", "digits"} <= set(presets())
    for preset in presets():
        assert set(load_preset(preset)) <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_at_the_smoke_preset(name, tmp_path):
    said = []
    summary = run_notebooks([name], preset="smoke", out=tmp_path, log=said.append)
    assert summary.ok, "\n".join(said)
    executed = json.loads((tmp_path / "notebooks" / f"{name}.ipynb").read_text())
    text = "".join(str(o.get("text", "")) for cell in executed["cells"] for o in cell.get("outputs", []))
    assert "All cases right." in text or name == "60_paper_figures"  # solutions prove themselves
    figures = [json.loads(p.read_text()) for p in (tmp_path / "figures").glob("*.json")]
    assert figures and all(f["notebook"] == name and f["caption"] for f in figures)
    for figure in figures:
        assert len(pd.read_csv(tmp_path / "figures" / f"{figure['name']}.csv")) > 0
    page = (tmp_path / "index.html").read_text()
    assert name in page and all(f["caption"] in page or f["name"] in page for f in figures)


def test_figure_names_are_used_once():
    names = []
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        calls = [x for cell in cells for x in ast.walk(ast.parse("".join(cell["source"]))) if isinstance(x, ast.Call)]
        shown = [x for x in calls if ast.unparse(x.func) in {"figures.show", "figures.show_print"}]
        names += [ast.unparse(x.args[1]) for x in shown]  # after the figure
    assert len(names) >= 70 and len(names) == len(set(names))
