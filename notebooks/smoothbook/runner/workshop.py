"""Participants' copies of the notebooks: the exercises without their solutions.

A copy keeps the stub, the hint and the check of each exercise; the solution cell goes, and an answer in prose makes room
for one's own. The notebooks of the repository remain the teacher's.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import nbformat

from smoothbook.runner.notebooks import chosen_notebooks, notebooks_dir
from smoothkit.records import write_atomically

_ANSWER = re.compile(r"<details>\s*<summary>(?:Answer|Solution)[^<]*</summary>.*?</details>", re.DOTALL)
YOUR_ANSWER = "*Your answer: double-click here and write.*"


def write_workshop(out: str | Path, names: Iterable[str] | None = None, *, again: bool = False) -> list[Path]:
    """Write the copies of some notebooks, or of all.

    Parameters
    ----------
    out : folder, made if it is not there
    names : as `00_start_here` or `00`; all notebooks if not given
    again : bool
        Write over copies that somebody has worked in.

    Returns
    -------
    list of the paths written, those equal already among them

    Raises
    ------
    ValueError
        If a name is unknown, if `out` is the folder of the notebooks themselves, or if a copy there differs.
    """
    out, source = Path(out), notebooks_dir()
    if out.resolve() == source.resolve():
        raise ValueError(f"out={str(out)!r} holds the notebooks themselves, with their solutions; name another folder")
    copies = {
        out / f"{name}.ipynb": nbformat.writes(participants_copy(nbformat.read(source / f"{name}.ipynb", 4))) + "\n"
        for name in chosen_notebooks(names, source)
    }
    touched = [path.name for path, text in copies.items() if path.exists() and path.read_text("utf-8") != text]
    if touched and not again:
        raise ValueError(
            f"{', '.join(touched)} in {out} differ from what would be written: somebody worked there. "
            "Name another folder, or write over them with --again"
        )
    out.mkdir(parents=True, exist_ok=True)
    for path, text in copies.items():
        write_atomically(path, lambda file, text=text: file.write(text.encode("utf-8")))
    return list(copies)


def participants_copy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without solution cells and without answers; cell ids stay, so that copies can be compared."""
    copy = nbformat.from_dict(notebook)
    copy.cells = [cell for cell in copy.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in copy.cells:
        if cell.cell_type == "markdown":
            cell.source = _ANSWER.sub(YOUR_ANSWER, cell.source)
    return copy
