"""The API reference, a page a module from its docstrings, to be opened offline: `make docs` writes runs/docs.

Run it as `python -m smoothbook.runner.reference FOLDER`, in a process of its own: it imports every module and adds to
`__all__` of packages what pdoc shall list.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import pdoc

from smoothbook.runner.gallery import build_gallery
from smoothbook.runner.pages import TEMPLATES


def build_reference(out: str | Path, modules: Sequence[str] = ("smoothkit", "smoothbook")) -> Path:
    """Write the pages of modules, and of all modules inside where one is a package; returns OUT/index.html."""
    for name in modules:
        _list_everything(name)
    pdoc.render.configure(docformat="numpy", template_directory=TEMPLATES / "reference")
    pdoc.pdoc(*modules, output_directory=Path(out))
    return Path(out) / "index.html"


def _list_everything(name: str) -> None:
    """Have `__all__` of a package name its modules too, and what it imports on demand be there: pdoc looks no further."""
    package = importlib.import_module(name)
    inside = [m.name for m in pkgutil.iter_modules(getattr(package, "__path__", ())) if not m.name.startswith("_")]
    for module in inside:
        _list_everything(f"{name}.{module}")
    if not inside:
        vars(package).pop("__all__", None)  # timm writes one into modules whose networks it registers
    elif hasattr(package, "__all__"):
        vars(package).update({member: getattr(package, member) for member in package.__all__})
        package.__all__ = [*dict.fromkeys([*package.__all__, *inside])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="FOLDER")
    index = build_reference(parser.parse_args().out)
    for run in index.parent.parent.glob("*/run.json"):  # galleries that were built before link to it from now on
        build_gallery(run.parent)
    print(f"API reference: {index}")
