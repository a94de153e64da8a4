"""The short version of `make fuzz`, and that no pickle is ever loaded."""

import ast
import importlib
import json
import pickle
import re
import types
from pathlib import Path

import pytest
from fuzz_logs import difference, fuzz_logs
from properties import PROPERTIES, ROOMS, TRIED, inputs
from results import read

from smoothkit import data, models
from smoothkit.reading import LogError, dialects, read_log
from smoothkit.records import RecordError, create_record, open_record


@pytest.mark.slow
def test_mutated_logs_are_read_as_the_slow_reader_does():
    found = fuzz_logs(150, seed=5)
    assert found["wrong"] == [] and found["read"] > 40 and found["refused"] > 20


def test_the_fuzzer_would_notice(monkeypatch, tmp_path):
    """A reader that takes what float() takes is found out."""
    log = b"idx\tlabel\tpredict\tradius\n1_000\t1\t1\t0.5\n2\t1\t1\t0.5\n"
    assert difference(log, tmp_path / "log") == ("read", "")
    monkeypatch.setattr(
        dialects, "is_number", lambda text: bool(text) and text.replace("_", "").replace(".", "").isdigit()
    )
    assert "instead of" in difference(log, tmp_path / "log")[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PROPERTIES if name != "command_lines"])
def test_properties_of_public_functions(name):
    before = TRIED[name]
    PROPERTIES[name](8)  # raises where the property does not hold
    assert TRIED[name] > before


# --- what is public, and has a property ---

ROOT = Path(__file__).resolve().parent.parent.parent
WITHOUT_PROPERTY = {
    "data_dir": "takes nothing",
    "show": "displays a figure made by a function that has one",
    "show_print": "the same, for print",
    "certified_accuracy_print": "matplotlib's drawing of the points that have one, and slow",
    "Live": "the same, for a figure that changes while something runs",
}
OF_ONE_NOTEBOOK = {  # what a notebook measures and draws of its own results, tested with right values beside its module
    *(f"smoothbook.figures.{part}" for part in ("scales", "selection", "studies", "trust")),
    *(f"smoothbook.tables.{part}" for part in ("cost", "studies", "summary", "trust")),
    *(
        f"smoothbook.{part}"
        for part in ("bench.batch", "denoise.measure", "sigma.island", "sigma.landscape", "sigma.reading")
    ),
    *(f"smoothbook.training.{part}" for part in ("estimates", "pilot")),
    "smoothbook.runner.exercises",  # one property takes every check of an exercise, by the beginning of its name
}
PACKAGES = (
    "smoothkit",
    "smoothkit.certify",
    *(f"smoothbook.{part}" for part in ("adapters", "denoise", "training")),
)


def public_callables() -> set[tuple[str, str]]:
    """(module, name) of what a user calls.

    By this rule: what a code cell of a notebook, or Python in the README, imports from smoothkit, takes as an attribute of
    a module it imported from there, or what a package of smoothkit lists in `__all__`.
    """
    texts = [re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts.append(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    asked = {(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__}
    for cells in texts:  # a name may stand for one module in one notebook and for another in the next
        asked |= _asked_in(cells)
    return {
        where for where in asked if callable(_look_up(*where)) and not isinstance(_look_up(*where), types.ModuleType)
    }


def _asked_in(cells: list[str]) -> set[tuple[str, str]]:
    nodes = [node for cell in cells for node in ast.walk(ast.parse(re.sub(r"(?m)^[%!].*$", "", cell)))]
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("smoothkit", "smoothbook")
        for alias in node.names
    }
    modules = {name: _look_up(*where) for name, where in imported.items()}
    return set(imported.values()) | {
        (modules[node.value.id].__name__, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if isinstance(modules.get(node.value.id), types.ModuleType)
    }


def _look_up(module: str, name: str):
    found = importlib.import_module(module)
    return getattr(found, name) if hasattr(found, name) else importlib.import_module(f"{module}.{name}")


def test_every_public_callable_is_exercised_by_a_property():
    used = set()
    for module in (*ROOMS, inputs):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            used |= (
                {node.id} if isinstance(node, ast.Name) else {node.attr} if isinstance(node, ast.Attribute) else set()
            )
    public = public_callables()
    assert len(public) > 150 and ("smoothkit.certify", "certificates") in public
    left = {
        name for where, name in public if name not in used and _look_up(where, name).__module__ not in OF_ONE_NOTEBOOK
    }
    assert left == set(WITHOUT_PROPERTY)


@pytest.mark.slow
def test_command_lines():
    before = TRIED["command_lines"]
    PROPERTIES["command_lines"](15)
    assert TRIED["command_lines"] >= before + 5


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_is_ever_loaded(tmp_path):
    sprung = tmp_path / "sprung"
    planted = pickle.dumps(Trap(sprung))
    for suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".safetensors"):
        (tmp_path / f"weights{suffix}").write_bytes(planted)
        for name in (f"local-dir:{tmp_path}/weights{suffix}", str(tmp_path / f"weights{suffix}")):
            with pytest.raises((ValueError, OSError)):
                models.load(name)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "resnet18"}')
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(planted)
        with pytest.raises((ValueError, OSError)):
            models.load(f"local-dir:{folder}")
        (folder / name).unlink()
    record = fuzz_record(tmp_path / "record")
    (record.path / "parts" / "part-000000-0.parquet").write_bytes(planted)
    with pytest.raises(RecordError, match="is damaged"):
        record.rows()
    (record.path / "run.json").write_bytes(planted)
    with pytest.raises(RecordError):
        open_record(record.path)
    (tmp_path / "x.parquet").write_bytes(planted)
    with pytest.raises((ValueError, OSError)):
        data.load(f"parquet:{tmp_path / 'x.parquet'}")
    (tmp_path / "log").write_bytes(planted)
    with pytest.raises(LogError):
        read_log(tmp_path / "log")
    assert not sprung.exists()
    pickle.loads(planted).close()  # the trap works
    assert sprung.exists()


def fuzz_record(path):
    from smoothkit.records import Identity
    from smoothkit.types import StoppingRule

    rule = StoppingRule(n0=10, n=20, alpha=0.05)
    return create_record(path, Identity("d", "test", "all", "m", "f", 2, 0.25, 0, "float", "float32", rule))


def test_the_kept_result():
    kept = read("fuzz")
    assert kept["silent_errors"] == 0 and kept["logs"]["tried"] >= 100_000 and not kept["logs_read_wrongly"]
    assert {p["property"] for p in kept["properties"]} == set(PROPERTIES)
    assert all(p["tried"] and not p["problem"] for p in kept["properties"])
