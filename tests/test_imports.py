"""Imports go one way, and `import smoothkit` is quick and quiet."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# a module may import those before it
ORDER = [
    "types", "kernels", "kernels.noise_cpu", "kernels.noise_triton", "kernels.votes_triton", "noise", "noise_exact",
    "counting", "data", "networks", "models", "progress", "adapters.base", "adapters.lora", "adapters.bottleneck",
    "adapters.prompts", "adapters.certifying", "adapters.black_box", "adapters", "attacks", "training.schedules",
    "training.losses", "training.common", "training.fit", "training.gradient_free", "training", "denoise.chain",
    "denoise.diffusion", "denoise.trained", "denoise.calibrate", "denoise", "denoise.make",
    "forward", "batches", "records", "workers", "votes",
    "bounds", "certify.fixed", "certify.sequential", "certify.cascade", "certify.smoothed", "certify", "certify.scales", "logs",
    "report", "sigma.distances", "sigma.ledger", "sigma.memory", "sigma.search", "sigma.table", "sigma.certificates",
    "sigma.sound", "sigma.selectors", "sigma.settings", "sigma.reading", "sigma",
    "rows", "claims", "sharing", "audit", "plan", "plots", "panels.base", "panels.curve", "panels.compare", "panels.slice",
    "panels.image", "panels.attack", "panels.memory", "panels.explorer", "panels", "bench.measure", "bench.peers",
    "bench.parts", "bench.engine", "bench.samples", "bench.sigma", "bench.panels", "bench",
    "gallery", "workbook", "workshop", "checks", "cli", "__main__",
]  # fmt: skip
PANELS = {name for name in ORDER if name.startswith("panels.")}
# heavy or particular libraries, and the modules named for them
WITHOUT_TORCH = {
    "types", "records", "workers", "progress", "bounds", "certify", "certify.fixed", "certify.sequential", "certify.cascade", "logs",
    "report", "claims", "sharing", "audit", "plots", "panels.base", "panels.curve", "panels.compare", "panels.memory",
    "panels.explorer", "gallery", "workbook", "workshop", "checks", "sigma.distances", "sigma.ledger", "sigma.memory",
    "sigma.reading", "sigma.sound", "sigma",
}  # fmt: skip
ONLY_IN = {
    "timm": {"networks", "models", "adapters.bottleneck", "adapters.certifying", "training.fit"},
    "torch": set(ORDER) - WITHOUT_TORCH,
    "torchvision": {"data"},
    "plotly": {"plots", "gallery", *PANELS},
    "ipywidgets": PANELS,
    "anywidget": {"panels.base"},
    "matplotlib": {"plots", "gallery"},
    "papermill": {"workbook"},
    "nbconvert": {"gallery", "workbook"},
    "triton": {"kernels.noise_triton", "kernels.votes_triton"},
    "numba": {"kernels.noise_cpu"},
    "art": {"bench.peers"},
    "diffusers": {"denoise.diffusion"},
    "peft": {"adapters.lora", "denoise.make"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted((ROOT / "smoothkit").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "smoothkit").with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.Module, package: str) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"smoothkit.{node.module}" if node.level else node.module
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


MODULES = modules()


def test_every_module_has_its_place():
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    ours = {x.removeprefix("smoothkit.") for x in imported(MODULES[name], name) if x.startswith("smoothkit.")} & set(
        ORDER
    )
    allowed = set(ORDER[: ORDER.index(name)])
    if name == "certify":  # the package re-exports its parts
        allowed |= {"certify.fixed", "certify.sequential", "certify.smoothed"}
    assert ours - {name} <= allowed, f"{name} imports {sorted(ours - allowed)}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_in_their_modules(library):
    users = {name for name, tree in MODULES.items() if any(x.split(".")[0] == library for x in imported(tree, name))}
    assert users <= ONLY_IN[library]


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
        "from smoothkit.certify import certificates\n"
        "from smoothkit.records import open_record\n"
        "from smoothkit.report import certified_accuracy\n"
        f"table = certificates(open_record(r'{ROOT / 'data' / 'records' / 'digits-vit-clean-sigma-0.25'}'), alpha=0.01)\n"
        "assert len(table) == 360 and 0 < certified_accuracy(table, [0.0])[0] < 1\n"
    )
    assert not {"torch", "timm"} & loaded_after(code)


def test_public_names():
    import smoothkit

    for name in smoothkit.__all__:
        assert getattr(smoothkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        smoothkit.nothing  # noqa: B018
