"""Imports go one way, `smoothkit` knows nothing of `smoothbook`, and `import smoothkit` is quick and quiet."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# a room or module may import those before it, and a module those of its own room that stand before it
ROOMS = {
    "smoothkit": ["types", "kernels", "records", "data", "certify", "models", "sampling", "reading", "__main__"],
    "smoothbook": [
        "settings", "adapters", "training", "figures", "denoise", "sigma", "tables", "panels", "bench", "runner", "cli",
    ],
}  # fmt: skip
MODULES_OF = {
    "smoothkit.kernels": ["philox", "noise_numba", "noise_triton", "noise", "noise_exact", "votes_triton", "votes"],
    "smoothkit.records": ["format", "record", "share"],
    "smoothkit.certify": ["bounds", "betting", "fixed", "sequential", "cascade", "table"],
    "smoothkit.models": ["base", "resnet_cifar", "load"],
    "smoothkit.sampling": ["progress", "workers", "probe", "forward", "batches", "stream", "run", "smoothed", "cascade"],
    "smoothkit.reading": ["accuracy", "intervals", "dialects", "logs", "alpha", "report", "audit"],
    "smoothbook.adapters": ["base", "lora", "bottleneck", "prompts", "certifying", "black_box"],
    "smoothbook.training": ["attacks", "schedules", "losses", "images", "checkpoint", "run", "fit", "gradient_free", "pilot", "estimates"],
    "smoothbook.figures": ["style", "show", "pictures", "curves", "bars", "studies", "trust", "selection", "scales"],
    "smoothbook.denoise": ["chain", "diffusion", "trained", "calibrate", "measure"],
    "smoothbook.sigma": [
        "distances", "ledger", "memory", "search", "landscape", "island", "table", "sound", "selectors", "reading",
    ],
    "smoothbook.tables": [
        "settings", "denoisers", "selectors", "build", "table", "studies", "cost", "make", "published", "claims", "summary", "trust",
    ],
    "smoothbook.panels": [
        "live", "job", "base", "curve", "compare", "plane", "regions", "slice", "image", "attack", "memory", "explorer",
    ],
    "smoothbook.bench": [
        "registry", "measure", "batch", "peers", "plan", "parts", "engine", "overhead", "loop", "memory", "scaling", "samples",
        "sigma", "panels", "run",
    ],
    "smoothbook.runner": ["notebooks", "pages", "gallery", "reference", "run", "workshop", "exercises"],
}  # fmt: skip
WHERE = {"smoothkit": ROOT / "smoothkit", "smoothbook": ROOT / "notebooks" / "smoothbook"}
BOTH = [*(f"smoothkit.{room}" for room in ROOMS["smoothkit"]), *(f"smoothbook.{room}" for room in ROOMS["smoothbook"])]


def modules() -> dict[str, ast.Module]:
    found = {}
    for package, folder in WHERE.items():
        for path in sorted(folder.rglob("*.py")):
            name = ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES: dict[str, ast.Module] = modules()


def imported(tree: ast.Module) -> set[str]:
    """Modules and names a module imports, at its head or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside if inside <= set(MODULES) else {node.module, *inside}
    return names


def room_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def test_nothing_in_smoothkit_imports_smoothbook():
    """The border: who wants to certify reads smoothkit and needs nothing else."""
    crossing = {name for name, tree in MODULES.items() if name.startswith("smoothkit")
                and any(x.split(".")[0] == "smoothbook" for x in imported(tree))}  # fmt: skip
    assert not crossing


def test_every_module_has_its_place():
    placed = {*WHERE, *BOTH, *(f"{room}.{leaf}" for room, leaves in MODULES_OF.items() for leaf in leaves)}
    assert set(MODULES) == placed


def test_smoothkit_has_eight_rooms():
    top = {p.stem for p in WHERE["smoothkit"].iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}
    assert top == {*ROOMS["smoothkit"], "__init__"} and len(top - {"__init__", "__main__"}) == 8


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name):
    ours = {x for x in imported(MODULES[name]) if x in MODULES} - {name, "smoothkit", "smoothbook"}
    room = room_of(name)
    for other in ours:
        if room_of(other) != room:
            assert name in WHERE or BOTH.index(room_of(other)) < BOTH.index(room), f"{name} imports {other}"
        elif name != room:  # a package may import any of its modules; a module those before it, and never its package
            leaves = MODULES_OF[room]
            before = leaves[: leaves.index(name.removeprefix(f"{room}."))]
            assert other.removeprefix(f"{room}.") in before, f"{name} imports {other}"


# heavy or particular libraries, and the modules named for them
ONLY_IN = {
    "timm": {"smoothkit.models.load", "smoothkit.models.resnet_cifar", "smoothbook.adapters", "smoothbook.training.fit"},
    "torchvision": {"smoothkit.data"},
    "triton": {"smoothkit.kernels.noise_triton", "smoothkit.kernels.votes_triton"},
    "numba": {"smoothkit.kernels.noise_numba"},
    "plotly": {"smoothbook.figures", "smoothbook.panels"},
    "ipywidgets": {"smoothbook.panels"},
    "anywidget": {"smoothbook.panels.live"},
    "matplotlib": {"smoothbook.figures"},
    "papermill": {"smoothbook.runner"},
    "nbconvert": {"smoothbook.runner"},
    "pdoc": {"smoothbook.runner.reference"},
    "art": {"smoothbook.bench.peers"},
    "diffusers": {"smoothbook.denoise.diffusion"},
    "peft": {"smoothbook.adapters.lora", "smoothbook.tables.denoisers"},
    "torch": {
        "smoothkit.kernels", "smoothkit.data", "smoothkit.models", "smoothkit.sampling", "smoothbook.adapters",
        "smoothbook.training", "smoothbook.denoise", "smoothbook.sigma", "smoothbook.tables", "smoothbook.panels",
        "smoothbook.bench", "smoothbook.cli",
    },
}  # fmt: skip


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_in_their_modules(library):
    users = {name for name, tree in MODULES.items() if any(x.split(".")[0] == library for x in imported(tree))}
    assert all({name, room_of(name)} & ONLY_IN[library] for name in users), users


def loaded_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_import_smoothkit_is_quick_and_quiet():
    assert not {"torch", "scipy", "pandas", "timm", "plotly", "triton", "numba"} & loaded_after("import smoothkit")


def test_everything_after_the_votes_works_without_torch():
    code = (
        "from smoothkit import certificates, open_record, types\n"
        "from smoothkit.reading import certified_accuracy\n"
        f"table = certificates(open_record(r'{ROOT / 'data' / 'records' / 'digits-vit-clean-sigma-0.25'}'), alpha=0.01)\n"
        "assert len(table) == 360 and 0 < certified_accuracy(table, [0.0])[0] < 1\n"
    )
    assert not {"torch", "timm"} & loaded_after(code)


@pytest.mark.slow
def test_figures_and_pages_of_kept_votes_need_no_torch():
    code = "import smoothbook.figures, smoothbook.tables.table, smoothbook.runner.gallery, smoothbook.panels.curve"
    assert not {"torch", "timm"} & loaded_after(code)


def test_public_names():
    import smoothkit

    for name in smoothkit.__all__:
        assert getattr(smoothkit, name) is not None and name in dir(smoothkit)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        smoothkit.nothing  # noqa: B018
