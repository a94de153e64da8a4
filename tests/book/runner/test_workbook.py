"""Running notebooks and the gallery, on tiny notebooks written here."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from smoothbook.runner import gallery, notebooks, pages
from smoothbook.runner import run as workbook

HINT = "<details><summary>Hint</summary>\n\nCount *twice*.\n\n</details>"
PROSE = (
    f"# Good\n{HINT}\n\n"
    + r"""The radius is $R = \sigma\,\Phi^{-1}(p_A)$, and `$x$` is code.

$$\Pr[a] \ge \text{one half}$$
"""
)
PARAMETERS = 'n: int = 3  # how many\nfigures_dir: str = ""  # where figures are kept'
FIGURE = """
import plotly.graph_objects as go
from smoothbook import figures
fig = go.Figure().add_scatter(y=list(range(n)), name="line")
figures.show(fig, "line", figures_dir=figures_dir, caption="A line & more")
"""
WHERE = "import os, sys\nprint(sys.prefix, os.getcwd(), figures_dir, os.environ['IPYTHONDIR'])"


def write_notebook(path: Path, *cells: tuple[str, str] | str) -> None:
    nodes = []
    for cell in cells:
        source, tag = cell if isinstance(cell, tuple) else (cell, "")
        make = new_markdown_cell if source.startswith("#") else new_code_cell
        nodes.append(make(source, metadata={"tags": [tag]} if tag else {}))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=nodes, metadata={"kernelspec": kernel}), path)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workbook") / "notebooks"
    (folder / "presets").mkdir(parents=True)
    parameters = (PARAMETERS, "parameters")
    write_notebook(folder / "00_good.ipynb", PROSE, parameters, FIGURE, "fig", WHERE, ("answer = 42", "solution"))
    write_notebook(folder / "10_fails.ipynb", "1 + 1", "raise RuntimeError('first line\\nno data here')", "never = 1")
    write_notebook(folder / "20_slow.ipynb", ("wait: float = 600.0", "parameters"), "import time\ntime.sleep(wait)")
    presets = {
        "digits": "_description: The default.\n00_good: {n: 5}\n",
        "misspelt": "00_good: {figure_dir: x}\n",
        "unknown": "00_goood: {}\n",
    }
    for name, text in presets.items():
        (folder / "presets" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("run") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", "/nowhere")
        summary = workbook.run_notebooks(["00", "10_fails.ipynb"], out=out, jobs=2, log=lines.append, source=source)
    return summary, lines


# --- names, presets, parameters ---


def test_committed_presets_load():
    assert {"smoke", "digits"} <= set(notebooks.presets())
    for name, description in notebooks.presets().items():
        assert description
        notebooks.load_preset(name)


def test_preset_and_notebook_names_are_checked(source, tmp_path):
    with pytest.raises(ValueError, match=r"preset 'digit' is unknown; did you mean 'digits'\? There are: digits, "):
        notebooks.load_preset("digit", source)
    with pytest.raises(ValueError, match=r"notebook '00_goood' is unknown; did you mean '00_good'\?"):
        notebooks.load_preset("unknown", source)
    with pytest.raises(ValueError, match=r"notebook '30' is unknown") as failure:
        workbook.run_notebooks(["30"], out=tmp_path, source=source)
    assert "\n" not in str(failure.value)
    assert notebooks.presets(source)["digits"] == "The default."


def test_a_misspelt_parameter_is_an_error_before_anything_runs(source, tmp_path):
    expected = r"00_good: parameter 'figure_dir' is unknown; did you mean 'figures_dir'\?"
    with pytest.raises(ValueError, match=expected):
        workbook.run_notebooks(preset="misspelt", out=tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()


def test_jobs_are_checked(source, tmp_path):
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        workbook.run_notebooks(out=tmp_path, jobs=0, source=source)


# --- a run ---


@pytest.mark.slow
def test_summary_and_lines(run):
    summary, lines = run
    good, fails = summary.results
    assert (good.name, good.status, good.error) == ("00_good", "ok", "")
    assert (fails.name, fails.status) == ("10_fails", "failed")
    assert fails.error == "RuntimeError: no data here (cell 2)"
    assert not summary.ok and summary.exit_status == 1 and summary.failed == (fails,)
    assert sorted(lines)[:2] == [f"00_good  ok  {good.seconds:.0f} s", "00_good  started"]
    assert len(lines) == 4


@pytest.mark.slow
def test_executed_notebooks_are_kept_without_machine_paths(run):
    summary, _ = run
    good = nbformat.read(summary.out / "notebooks/00_good.ipynb", as_version=4)
    assert "n = 5" in next(cell.source for cell in good.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert "widgets" not in good.metadata
    printed = good.cells[-2].outputs[0].text.split()
    assert printed == ["[environment]", "[notebooks]", "../figures", "../.ipython"]
    fails = nbformat.read(summary.out / "notebooks/10_fails.ipynb", as_version=4)
    assert any(output.output_type == "error" for cell in fails.cells for output in cell.get("outputs", []))
    for path in (summary.out / "notebooks").iterdir():
        for machine in (str(summary.out), sys.prefix, str(Path(workbook.__file__).parents[1])):
            assert machine not in path.read_text(), (path.name, machine)


@pytest.mark.slow
def test_figures_are_kept_with_their_notebook(run):
    summary, _ = run
    about = json.loads((summary.out / "figures/line.json").read_text())
    assert (about["notebook"], about["caption"]) == ("00_good", "A line & more")
    assert (summary.out / "figures/line.csv").read_text().splitlines()[0] == "trace,x,y"


@pytest.mark.slow
def test_index_shows_everything(run):
    summary, _ = run
    page = summary.index.read_text()
    assert page.count("notebooks/00_good.html") == 1 and "notebooks/10_fails.ipynb" in page
    assert "RuntimeError: no data here" in page and "A line &amp; more" in page
    assert "figures/line.csv" in page and 'id="data-line"' in page
    assert "preset <b>digits</b>" in page and "plotly 7" in page


@pytest.mark.slow
def test_no_page_needs_the_network(run):
    summary, _ = run
    pages = list(summary.out.rglob("*.html"))
    assert len(pages) == 4  # index, two notebooks, one figure
    remote = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)\s*=\s*[\"']?(?:https?:)?//", re.IGNORECASE)
    for page in pages:
        text = page.read_text()
        assert not remote.search(text), page
        assert not re.search(r"cdnjs|unpkg|jsdelivr|mathjax.*\.js|import\(", text), page
        for local in re.findall(r"<script[^>]*\bsrc=\"([^\"]+)\"", text):
            assert (page.parent / local).is_file(), (page, local)
    assert len(list(summary.out.rglob("plotly*.js"))) == 1


@pytest.mark.slow
def test_notebook_page_draws_plotly_and_formulas(run):
    summary, _ = run
    page = (summary.out / "notebooks/00_good.html").read_text()
    assert page.count("Plotly.newPlot(") == 2  # figures.show and a figure as the value of a cell
    assert page.count("<math ") == 2 and page.count('display="inline"') == 1 and "<code>$x$</code>" in page
    assert '<details class="sk-solution">' in page
    assert re.search(r"<summary>Hint</summary>\s*<p>Count <em>twice</em>.</p>\s*</details>", page)
    assert len(page) < 1_000_000


@pytest.mark.slow
def test_nothing_is_written_to_the_home_folder(source, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    write_notebook(tmp_path / "50_tiny.ipynb", "1 + 1")
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/digits.yaml").write_text("_description: none\n")
    summary = workbook.run_notebooks(out=tmp_path / "out", source=tmp_path, log=lambda line: None)
    assert summary.ok and summary.exit_status == 0
    assert list(home.iterdir()) == []


@pytest.mark.slow
def test_a_partial_run_keeps_the_others_and_forgets_old_figures(run, source):
    summary, _ = run
    stale = summary.out / "figures/stale.json"
    about = {
        "name": "stale",
        "caption": "old",
        "order": 1,
        "notebook": "10_fails",
        "figure": {"data": [], "layout": {}},
    }
    stale.write_text(json.dumps(about))
    again = workbook.run_notebooks("10_fails", out=summary.out, log=lambda line: None, source=source)
    assert [result.name for result in again.results] == ["10_fails"]
    page = again.index.read_text()
    assert "00_good" in page and "A line &amp; more" in page
    assert not stale.exists()


@pytest.mark.slow
def test_timeout_stops_one_notebook(source, tmp_path):
    summary = workbook.run_notebooks("20_slow", out=tmp_path, timeout=4, log=lambda line: None, source=source)
    (slow,) = summary.results
    assert slow.status == "failed" and slow.error == "stopped after 4 s, its timeout"
    assert slow.seconds < 600  # it would wait as long


def running_under(folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for left-over processes in /proc")
def test_ctrl_c_leaves_a_gallery_and_no_kernel(source, tmp_path):
    code = (
        "import sys; from pathlib import Path; from smoothbook.runner.run import run_notebooks\n"
        "summary = run_notebooks(['20_slow', '00_good'], out=sys.argv[1], source=Path(sys.argv[2]))\n"
        "sys.exit(summary.exit_status)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(source)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 600
    while len(running_under(tmp_path / "out")) < 2 and time.monotonic() < deadline:  # the worker and its kernel
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 130, printed
    assert "20_slow  interrupted" in printed
    assert (tmp_path / "out/index.html").exists()
    assert running_under(tmp_path / "out") == []


# --- pieces of the gallery ---


def test_tex_that_cannot_be_converted_stays_readable():
    shown = html.unescape(pages.tex_to_mathml(r"see $\left( a < b$ and $\nonsense x$, $5 or $6, and `$y$`"))
    assert shown == r"see <code>\left( a < b</code> and <code>\nonsense x</code>, $5 or $6, and `$y$`"


@pytest.mark.parametrize(
    ("tex", "holds"),
    [
        (r"\tfrac12", "<mfrac><mn>1</mn><mn>2</mn></mfrac>"),
        (r"\lVert x \rVert_2 \le r", "‖"),
        (r"\operatorname{argmax}_c p_c", "<mo>argmax</mo>"),
        (r"x_{\text{max}} \ge \textstyle 1", "<mtext>max</mtext>"),
        (r"g(x) = \arg\max_c \mathbb{P}(f(x + \varepsilon) = c)", "<mo>arg</mo>"),
        (r"\begin{cases} a & a < b \\ b & \text{otherwise} \end{cases}", "<mtable"),
        (r"R = \sigma\,\Phi^{-1}(\underline{p_A})", "<munder>"),
    ],
)
def test_common_tex_is_drawn(tex, holds):
    shown = html.unescape(pages.tex_to_mathml(f"${tex}$"))
    assert shown.startswith("<math ") and holds in shown and "\\" not in shown


def test_markdown_leaves_formulas_alone(tmp_path):
    """Stars, bars and underscores of a formula are nobody's emphasis or table."""
    write_notebook(tmp_path / "a.ipynb", "# $p^* * q^*$ and $a\\_b | c\\_d$\n\n| $|x|$ | y |\n| - | - |\n| 1 | 2 |")
    page = pages.notebook_page(tmp_path / "a.ipynb")
    assert page.count("<math ") == 3 and page.count("<em>") == 0 and "<td>2</td>" in page


def test_remote_elements_are_stripped():
    page = '<script src="https://a.b/c.js"></script><link rel=x href=//a.b/c.css><script src="here.js"></script>'
    assert pages.strip_remote(page) == '<script src="here.js"></script>'


def test_paths_inside_longer_words_stay():
    paths = {"/home/me": "~", "/home/me/env": "[environment]"}
    text = "/home/me/env/lib /home/me/x /home/metoo /data/home/me"
    assert workbook.without_paths(text, paths) == "[environment]/lib ~/x /home/metoo /data/home/me"


def test_index_of_an_empty_folder(tmp_path):
    assert gallery.build_gallery(tmp_path).read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("name", notebooks.notebook_names())
def test_every_notebook_says_what_it_is(name):
    about = notebooks.about(notebooks.notebooks_dir() / f"{name}.ipynb")
    assert about.title and about.level in {"beginner", "intermediate", "advanced", "all"}
    assert len(about.minutes) >= 2 and all(0 < m <= 30 for m in about.minutes)


def test_settings_are_what_the_notebook_ran_with(tmp_path):
    path = tmp_path / "ran.ipynb"
    injected = ('n = 5\nfigures_dir = "/somewhere"', "injected-parameters")
    write_notebook(
        path,
        ('n: int = 3  # copies\nwhere: str = "a # b"  # a place\nfigures_dir: str = ""  # -', "parameters"),
        injected,
    )
    assert gallery.notebook_settings(path) == {"n": "5", "where": '"a # b"'}


# --- the API reference ---


def test_the_reference_has_signatures_and_shapes_and_asks_no_network(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed: pip install -e '.[docs]'")
    from smoothbook.runner.reference import build_reference

    build_reference(tmp_path, ["smoothkit.certify.fixed", "smoothkit.types"])
    text = html.unescape(re.sub(r"<[^>]+>", "", (tmp_path / "smoothkit/certify/fixed.html").read_text()))
    assert re.search(r"def\s+certify_votes\(\s*selection:\s*smoothkit\.types\.Votes,\s*estimation:", text)
    assert re.search(r"selection \(Votes\):\s+Counts of shape \(num_classes,\) over n0 noisy copies\.", text)
    start = (tmp_path / "index.html").read_text()
    assert 'href="smoothkit/certify/fixed.html"' in start and "<p>Certification and prediction from" in start
    for page in tmp_path.rglob("*.html"):
        found = re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"([^\"]*)", page.read_text())
        assert all(source.startswith("data:") for source in found), page
        assert not re.search(r"url\(\"?(?:https?:)?//|@import|fetch\(\"?http", page.read_text()), page


def test_the_index_links_to_the_reference_where_there_is_one(tmp_path):
    assert "API reference" not in gallery.build_gallery(tmp_path / "digits").read_text()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.html").write_text("")
    assert '<a href="../docs/index.html">API reference</a>' in gallery.build_gallery(tmp_path / "digits").read_text()
