"""Participants' copies: nothing of the solutions, everything else, and no work of theirs lost."""

import ast
import re

import nbformat
import pytest
from conftest import ROOT

from smoothbook.cli import main
from smoothbook.runner.notebooks import notebook_names
from smoothbook.runner.workshop import YOUR_ANSWER, participants_copy, write_workshop

NAMES = notebook_names()


def original(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)


def is_solution(cell):
    return "solution" in cell.metadata.get("tags", [])


def names_of(source, kind):
    tree = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith(("%", "!"))))
    made = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for n in ast.walk(tree):
        if isinstance(n, ast.Import | ast.ImportFrom):
            made |= {alias.asname or alias.name.split(".")[0] for alias in n.names}
    seen = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, kind)}
    return seen | made if kind is ast.Store else seen


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_notebook_without_its_solutions(name):
    before, copy = original(name), participants_copy(original(name))
    assert [c.id for c in copy.cells] == [c.id for c in before.cells if not is_solution(c)]
    assert len(copy.cells) < len(before.cells)
    text = "\n".join(c.source for c in copy.cells)
    assert (
        "# Solution" not in text
        and "<summary>Answer" not in text
        and not re.search(r"^check_\w+\(.*strict=True", text, flags=re.M)
    )
    assert text.count("<summary>Hint") == "\n".join(c.source for c in before.cells).count("<summary>Hint") > 0
    nbformat.validate(copy)


@pytest.mark.parametrize("name", NAMES)
def test_no_later_cell_needs_what_a_solution_defines(name):
    """A name that only a solution makes, used further down, would break the participants' copy."""
    code = [(is_solution(c), c.source) for c in original(name).cells if c.cell_type == "code"]
    made = set()
    for number, (solution, source) in enumerate(code):
        if solution:
            only_here = names_of(source, ast.Store) - made
            for later_solution, later in code[number + 1 :]:
                if not later_solution:
                    assert not only_here & names_of(later, ast.Load) - names_of(later, ast.Store)
        else:
            made |= names_of(source, ast.Store)


def test_work_is_not_written_over(tmp_path):
    out = tmp_path / "workshop"
    assert [p.name for p in write_workshop(out, ["00"])] == ["00_start_here.ipynb"]
    write_workshop(out, ["00_start_here"])  # untouched copies may be written again
    path = out / "00_start_here.ipynb"
    worked = nbformat.read(path, 4)
    worked.cells[0].source += "\n\nmy notes"
    nbformat.write(worked, path)
    with pytest.raises(ValueError, match=r"00_start_here.ipynb .* differ .*--again"):
        write_workshop(out)
    assert not (out / "10_certification.ipynb").exists()  # nothing is written before all is known to be safe
    assert "my notes" in path.read_text()
    write_workshop(out, ["00"], again=True)
    assert "my notes" not in path.read_text()


def test_refusals():
    with pytest.raises(ValueError, match=r"hold.* the notebooks themselves"):
        write_workshop(ROOT / "notebooks")
    with pytest.raises(ValueError, match="unknown; did you mean '00_start_here'"):
        write_workshop("unused", ["00_start_hear"])


def test_command(tmp_path, capsys):
    assert main(["workshop", "60", "--out", str(tmp_path / "w")]) == 0
    assert "1 notebooks without solutions" in capsys.readouterr().out
    copy = nbformat.read(tmp_path / "w" / "60_paper_figures.ipynb", 4)
    assert any(YOUR_ANSWER in c.source for c in copy.cells)


def test_the_two_routes_name_notebooks_that_exist_and_fit_their_time():
    text = (ROOT / "notebooks" / "README.md").read_text()
    for title, limit in (("90 minutes", 90), ("Half a day", 210)):
        part = text.split(f"## {title}")[1].split("\n## ")[0]
        rows = re.findall(r"^\| (\d+) \| `(\w+)`", part, flags=re.M)
        assert len(rows) >= 4 and {name for _, name in rows} <= set(NAMES)
        assert sum(int(minutes) for minutes, _ in rows) <= limit
