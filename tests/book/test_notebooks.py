"""Every notebook, executed by papermill at the smoke preset."""

import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from smoothbook.runner import run
from smoothbook.runner.notebooks import load_preset, notebook_names, presets

NAMES = notebook_names()
WARM = Path(__file__).with_name("warm_kernel.py")


@pytest.fixture(scope="session")
def warm_kernels(tmp_path_factory):
    """Where processes can be forked, kernels come from one that has imported what takes long; else as everywhere."""
    if sys.platform != "linux":
        yield
        return
    folder = tmp_path_factory.mktemp("warm")
    with tempfile.TemporaryDirectory() as short, pytest.MonkeyPatch.context() as patch:  # names of sockets are short
        socket = str(Path(short) / "s")
        argv = [sys.executable, str(WARM), "ask", socket, "{connection_file}"]
        (folder / "kernels" / "python3").mkdir(parents=True)
        spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
        (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
        known = run._environment("warm", folder, 1)
        server = subprocess.Popen([sys.executable, str(WARM), "serve", socket], stdin=subprocess.PIPE, env=known)
        while not Path(socket).exists():
            assert server.poll() is None
        original = run._environment
        patch.setattr(run, "_environment", lambda *of: original(*of) | {"JUPYTER_PATH": str(folder)})
        yield
        server.stdin.close()
        server.wait()


def test_every_notebook_has_a_preset_and_every_preset_fits():
    assert {"smoke", "digits"} <= set(presets())
    for preset in presets():
        assert set(load_preset(preset)) <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_at_the_smoke_preset(name, tmp_path, warm_kernels):
    said = []
    summary = run.run_notebooks([name], preset="smoke", out=tmp_path, log=said.append)
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
