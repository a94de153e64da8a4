"""All tests with the lowest versions that pyproject.toml allows, and with those of this environment: `make versions`.

The lowest ones go into an environment of their own, made by uv (as many GB as the usual one); `--lowest FOLDER` takes one
that is there. `--tests` names some of the tests where all are too long, and any other option is pytest's, as
`--ignore=tests/book/test_notebooks.py`; what was run is kept with the result.
"""

import argparse
import json
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from results import FOLDER, ROOT, keep, read

PACKAGES = (
    "torch",
    "timm",
    "peft",
    "diffusers",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "plotly",
    "numba",
)
_VERSIONS = f"""
import importlib.metadata, json, platform
print(json.dumps({{"python": platform.python_version(), **{{p: importlib.metadata.version(p) for p in {PACKAGES}}}}}))
"""


def make_lowest(folder: Path) -> Path:
    """An environment with the lowest version of each direct dependency."""
    python = folder / "bin" / "python"
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch,) = (d.replace(">=", "==") for d in stated if d.startswith("torch>="))  # else the newest torchvision rules
    subprocess.run(["uv", "venv", "--quiet", "--allow-existing", "-p", sys.executable, folder], check=True)
    lowest = ["--resolution", "lowest-direct", "-e", f"{ROOT}[test]", torch]
    subprocess.run(["uv", "pip", "install", "--quiet", "-p", python, *lowest], check=True)
    return folder


def try_with(python: Path, name: str, tests: list[str], workers: int) -> dict:
    """Versions, counts, and what failed, of the tests run by one Python."""
    begin, found = time.perf_counter(), ROOT / "runs" / f"versions-{name}.xml"
    found.parent.mkdir(exist_ok=True)
    found.unlink(missing_ok=True)
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-n",
        str(workers),
        f"--junitxml={found}",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    ended = subprocess.run(command, cwd=ROOT)
    if not found.is_file():
        raise SystemExit(f"pytest ended with status {ended.returncode} and without a result in {found.name}")
    return describe(python, name, tests, found) | {"test_seconds": round(time.perf_counter() - begin)}


def describe(python: Path, name: str, tests: list[str], junit: Path) -> dict:
    versions = subprocess.run([python, "-c", _VERSIONS], check=True, capture_output=True, text=True).stdout
    return {"name": name, "versions": json.loads(versions), "tests": tests or ["all"], **read_result(junit)}


def read_result(junit: Path) -> dict:
    """How many tests passed, failed and were skipped by a JUnit file, and the first line of each failure."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        wrong = [part for kind in ("failure", "error") if (part := case.find(kind)) is not None]
        counts["failed" if wrong else "skipped" if case.find("skipped") is not None else "passed"] += 1
        for part in wrong:
            said = (part.get("message") or "").strip().splitlines()
            failures.append(
                {"test": f"{case.get('classname')}::{case.get('name')}", "said": said[0][:200] if said else ""}
            )
    return counts | {"failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lowest", type=Path, help="an environment with the lowest versions; made in runs/ if not given"
    )
    parser.add_argument("--only", choices=("lowest", "newest"), help="try one, and keep the other as it was last found")
    parser.add_argument("--tests", nargs="*", default=[], help="files of tests; all if not given")
    parser.add_argument(
        "--result", type=Path, help="of the newest: what `make test` left, as runs/tests.xml, and run none"
    )
    parser.add_argument("--workers", type=int, default=2)
    chosen, of_pytest = parser.parse_known_args()
    begin = time.perf_counter()
    known = {e["name"]: e for e in read("versions")["environments"]} if (FOLDER / "versions.json").is_file() else {}
    for name in ("lowest", "newest"):
        if chosen.only in (None, name):
            folder = Path(sys.executable).parent.parent
            if name == "lowest":
                folder = chosen.lowest or make_lowest(ROOT / "runs" / "lowest")
            tests = [*chosen.tests, *of_pytest]
            if name == "newest" and chosen.result:
                known[name] = describe(folder / "bin" / "python", name, tests, chosen.result)
                continue
            known[name] = try_with(folder / "bin" / "python", name, tests, chosen.workers)
    found = list(known.values())
    keep(
        "versions",
        begin,
        {
            "made_by": "make versions",
            "headline": "; ".join(f"{e['name']}: {e['passed']} passed, {e['failed']} failed" for e in found),
            "environments": found,
        },
    )
    sys.exit(any(e["failed"] for e in found))


if __name__ == "__main__":
    main()
