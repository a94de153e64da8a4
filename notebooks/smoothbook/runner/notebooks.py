"""What notebooks and presets there are, and what a notebook says of itself."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path

import nbformat

from smoothbook.settings import read_yaml

BOOK = Path(__file__).resolve().parents[2]  # where smoothbook lies: in a checkout the folder of the notebooks


@dataclasses.dataclass(frozen=True)
class About:
    """What the text of a notebook says: its title, for whom it is, and how many minutes each exercise takes."""

    title: str
    level: str
    minutes: tuple[int, ...]


def about(path: Path) -> About:
    """Read title (the first heading), **Level:** and the exercises from the text of a notebook; "" for what is not said."""
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    title, level = re.search(r"^# (.+)$", text, re.MULTILINE), re.search(r"\*\*Level:\*\* (\w+)", text)
    minutes = re.findall(r"^\*\*\d+\. .*?\*\* \((\d+) minutes", text, re.MULTILINE)
    return About(title[1] if title else "", level[1] if level else "", tuple(map(int, minutes)))


def notebooks_dir() -> Path:
    """The folder of numbered notebooks: that of this package in a checkout, else `notebooks` in the current folder."""
    for folder in (BOOK, Path.cwd() / "notebooks"):
        if any(folder.glob("[0-9][0-9]_*.ipynb")):
            return folder
    raise FileNotFoundError(f"no folder 'notebooks' beside the package or in {Path.cwd()}; run from a checkout")


def notebook_names(source: Path | None = None) -> list[str]:
    """The names (file name without .ipynb) of all notebooks, in order."""
    return sorted(path.stem for path in (source or notebooks_dir()).glob("*.ipynb"))


def chosen_notebooks(names: Iterable[str] | str | None, source: Path) -> list[str]:
    """Full names for what was asked for: `00_start_here`, `00_start_here.ipynb` and `00` are the same."""
    known = notebook_names(source)
    chosen = []
    for name in known if names is None else [names] if isinstance(names, str) else names:
        stem = Path(name).name.removesuffix(".ipynb")
        matches = [k for k in known if k.split("_")[0] == stem]
        stem = matches[0] if len(matches) == 1 else stem
        _check_known("notebook", stem, known)
        chosen.append(stem)
    return list(dict.fromkeys(chosen))


def check_parameters(path: Path, parameters: dict) -> dict[str, dict]:
    """What papermill knows of a notebook's parameters; a ValueError for a name that it does not have.

    papermill itself only warns about a misspelt name and runs with the default.
    """
    from papermill import inspect_notebook  # slow to import, and reading names does not need it

    known = inspect_notebook(str(path))
    for name in parameters:
        _check_known(f"{path.stem}: parameter", name, known)
    return known


# --- presets -----------------------------------------------------------------------------------------


def presets(source: Path | None = None) -> dict[str, str]:
    """The presets there are, each with its description."""
    return {name: _read(path).get("_description", "") for name, path in _preset_files(source).items()}


def load_preset(name: str, source: Path | None = None) -> dict[str, dict]:
    """Notebook name to parameters, as `notebooks/presets/<name>.yaml` has them.

    Raises
    ------
    ValueError
        If there is no such preset, or it names a notebook that does not exist.
    """
    files = _preset_files(source)
    _check_known("preset", name, files)
    content = {k: {} if v is None else v for k, v in _read(files[name]).items() if k != "_description"}
    for notebook, parameters in content.items():
        _check_known(f"preset {name!r}: notebook", notebook, notebook_names(source))
        if not isinstance(parameters, dict):
            raise ValueError(f"preset {name!r}: {notebook} must map parameters to values, got {parameters!r}")
    return content


def _preset_files(source: Path | None) -> dict[str, Path]:
    return {path.stem: path for path in sorted(((source or notebooks_dir()) / "presets").glob("*.yaml"))}


def _read(path: Path) -> dict:
    content = read_yaml(path, ValueError) or {}
    if not isinstance(content, dict):
        raise ValueError(f"preset {path.stem!r} must map notebooks to parameters, got {type(content).__name__}")
    return content


def _check_known(what: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{what} {name!r} is unknown{hint} There are: {', '.join(known) or 'none'}")
