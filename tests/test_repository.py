"""What a good repository keeps true: environment, command list, stripped notebooks, lint, committed data."""

import hashlib
import json
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ANATOMY = (
    "**What you will learn**",
    "**Time:**",
    "**Before this:**",
    "## Exercises",
    "<details>",
    "## What to try next",
    "**References.**",
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_yml_adds_nothing_to_pyproject():
    """Pins live in pyproject.toml alone; conda gets Python, pip, and the project itself."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert [c.split("=")[0] for c in conda] == ["python", "pip"]
    assert conda[0].split("=")[1] in SpecifierSet(PROJECT["requires-python"])
    (project,) = pip
    extras = re.fullmatch(r"-e \.\[(.+)\]", project).group(1).split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_requirements_are_well_formed_and_installed():
    from importlib.metadata import version

    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        assert requirement.specifier, f"{text} needs a lower bound"
        assert version(requirement.name) in requirement.specifier


def test_commands_are_the_same_in_the_parser_and_the_readme():
    done = subprocess.run([sys.executable, "-m", "smoothkit", "--help"], capture_output=True, text=True, check=True)
    offered = set(re.findall(r"^    (\w[\w-]*) ", done.stdout, flags=re.M))
    described = set(re.findall(r"^\| `smoothkit ([\w-]+)", (ROOT / "README.md").read_text(), flags=re.M))
    known = {"run", "certify", "report", "claims", "audit", "merge", "pack", "plan", "bench", "workshop"}
    assert offered == described == known


def test_make_targets_are_described():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    for target in ("run", "test", "lab", "figures", "records"):
        assert re.search(rf"^{target}:", makefile, flags=re.M) and f"make {target}" in readme


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stripped_and_have_their_anatomy(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r"\w+: \w+ = .+  # .+", line), f"a parameter needs a type and a comment: {line}"
    given = [line.split(":")[0] for line in tagged[0].source.splitlines()]
    assert len(given) == len(set(given)), "a parameter is given twice"
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for part in ANATOMY:
        assert part in text, part
    solutions = [cell for cell in notebook.cells if "solution" in cell.metadata.get("tags", [])]
    assert solutions and all(s.source.startswith("# Solution") and s.metadata.jupyter.source_hidden for s in solutions)


@pytest.mark.slow
def test_nbstripout_finds_nothing_to_strip():
    done = subprocess.run(
        [sys.executable, "-m", "nbstripout", "--verify", *map(str, NOTEBOOKS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_committed_data_is_what_its_readme_says():
    """Every model and record has its line in data/README.md: sha256, maker, licence."""
    readme = (ROOT / "data" / "README.md").read_text()
    files = [
        *(ROOT / "data" / "starters").glob("**/*.safetensors"),
        *(ROOT / "data" / "records").glob("*/parts/*.parquet"),
    ]
    assert len(files) >= 8
    for path in files:
        relative = path.relative_to(ROOT / "data").as_posix()
        assert f"`{relative}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}`" in readme, relative
    for table in (
        ROOT / "data" / "records" / "rows"
    ).iterdir():  # one line a table, of all its files as sha256sum lists them
        parts = sorted(p for p in table.rglob("*") if p.suffix in {".parquet", ".safetensors"})
        listed = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(table).as_posix()}\n" for p in parts]
        digest = hashlib.sha256("".join(listed).encode()).hexdigest()
        assert f"`records/rows/{table.name}/ ({len(parts)} files)` | `{digest}`" in readme, table.name
    assert all(p.stat().st_size < 8_000_000 for p in (ROOT / "data").rglob("*") if p.is_file())


@pytest.mark.slow
def test_readme_tables_and_figure_come_from_records():
    done = subprocess.run(
        [sys.executable, str(ROOT / "data" / "make_readme.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_records_cover_all_held_out_digits():
    from smoothkit.certify import certificates
    from smoothkit.records import open_record

    for sigma in (0.12, 0.25, 0.5):
        record = open_record(ROOT / "data" / "records" / f"digits-vit-{sigma:.2f}-sigma-{sigma:.2f}")
        assert (record.sigma, record.stopping_rule.n, record.stopping_rule.n0) == (sigma, 10_000, 100)
        assert len(certificates(record)) == 360
        starter = json.loads((ROOT / "data" / "starters" / f"digits-vit-{sigma:.2f}" / "card.json").read_text())
        assert record.identity.model == f"starter:{starter['name']}"


def test_records_fit_the_starters_they_name():
    from smoothkit import models
    from smoothkit.records import open_record

    for path in (ROOT / "data" / "records").glob("*/run.json"):
        path = path.parent
        identity = open_record(path).identity
        assert models.fingerprint(models.load(identity.model)) == identity.fingerprint


def test_nothing_here_speaks_of_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    home = re.compile(r"/home/[a-z]|/Users/|/root/|C:\\\\Users")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if (
            name
            and path.suffix in {".py", ".md", ".ipynb", ".json", ".yaml", ".yml", ".toml", ".csv", ".svg"}
            and path.is_file()
        ):
            found = home.search(path.read_text())
            assert not found or name in {"tests/test_repository.py", "tests/book/runner/test_workbook.py"}, (
                f"{name} names {found.group()}"
            )
