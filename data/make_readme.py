"""Numbers and the figure of README.md and data/README.md, from records: `make readme`.

python data/make_readme.py                       rewrite what stands between the markers
python data/make_readme.py --check               fail if anything would change
python data/make_readme.py --measured runs       first keep the times of `make run` and `make test`
"""

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd
import torch

from smoothkit import models, plots
from smoothkit.certify import certificates
from smoothkit.records import open_record
from smoothkit.report import format_table, report

HERE = Path(__file__).parent
ROOT = HERE.parent
TIMES = HERE / "benchmarks" / "workbook-digits.json"
FIGURE = HERE / "figures" / "certified-accuracy-digits.svg"
RECORDS = [f"digits-vit-{sigma}-sigma-{sigma}" for sigma in ("0.12", "0.25", "0.50")]
BENCHMARKS = ("overhead", "loop", "noise", "votes", "bounds", "samples", "memory", "scaling")
# notebook -> level and the question it answers
NOTEBOOKS = {
    "00_start_here": ("beginner", "What is a certificate, and what does it cost?"),
    "10_certification": (
        "beginner",
        "From a Python loop to kernels: the same votes, faster; alpha, n0, n, early stopping",
    ),
    "20_noise_training": (
        "intermediate",
        "Why a clean model fails under noise; Gaussian, stability, consistency, MACER, SmoothAdv",
    ),
    "21_peft_smoothing": ("intermediate", "PEFTSmoothing: LoRA, adapters, prompts; a black box"),
    "60_paper_figures": ("all", "Every figure and table again from records, beside the published values"),
}


def records_table() -> str:
    paths = [HERE / "records" / name for name in [*RECORDS, "digits-vit-clean-sigma-0.25"]]
    frame = report(paths, (0.0, 0.25, 0.5, 0.75, 1.0))
    return format_table(frame.assign(path=[p.name for p in paths]).rename(columns={"path": "record"}), "markdown")


def notebooks_table() -> str:
    seconds = _times()["notebooks"]
    rows = [
        (f"[{name}](notebooks/{name}.ipynb)", level, f"{seconds[name]:.0f} s", what)
        for name, (level, what) in NOTEBOOKS.items()
    ]
    return format_table(pd.DataFrame(rows, columns=["notebook", "level", "measured", "question"]), "markdown")


def times_sentence() -> str:
    times = _times()
    notebooks, tests = sum(times["notebooks"].values()), times["tests"]
    return (
        f"Measured on {times['cores']} CPU cores ({times['machine']}, Python {times['python']}, torch {times['torch']}): "
        f"`make run` executes the {len(times['notebooks'])} notebooks in {notebooks / 60:.1f} minutes, `make test` runs "
        f"{tests['passed']} tests in {tests['seconds'] / 60:.1f} minutes ({_skipped(tests['skipped'])}). "
        "The installation comes on top, once.\n"
    )


def _skipped(number: int) -> str:
    return f"{number} skipped" if number else "none skipped, with the public data at hand"


def starters_table() -> str:
    rows = []
    for name in [name for name in models.starters() if name.startswith("digits-vit")]:
        card = models.starter_card(name)
        accuracy = card["test_accuracy_of_the_base_classifier_by_sigma"]
        rows.append(
            (
                f"`{name}`",
                f"{card['parameters']:,}",
                f"{card['sigma']:g}",
                card["epochs"],
                *(f"{accuracy[s]:.3f}" for s in ("0", "0.12", "0.25", "0.5", "1")),
            )
        )
    rule = json.loads((HERE / "starters" / "mixture-rule.json").read_text())
    rows.append(("mixture rule", "-", "-", "-", *(f"{rule[s]:.3f}" for s in ("0", "0.12", "0.25", "0.5", "1"))))
    columns = [
        "starter",
        "parameters",
        "trained at",
        "epochs",
        *(f"accuracy at {s}" for s in ("0", "0.12", "0.25", "0.5", "1")),
    ]
    return format_table(pd.DataFrame(rows, columns=columns), "markdown")


def benchmarks_table() -> str:
    rows, machines = [], set()
    for name in BENCHMARKS:
        full, quick = (HERE / "benchmarks" / f"{name}{kind}.json" for kind in ("", "-quick"))
        about = json.loads((full if full.exists() else quick).read_text())
        others = "; ".join(f"{what}: {ratio:.2f}" for what, ratio in about["others"].items())
        rows.append(
            (
                f"`{name}`{' (quick)' if about['quick'] else ''}",
                about["headline"],
                f"{about['ratio']:.2f}",
                others or "-",
            )
        )
        machines.add(f"{about['processor']}, {about['machine']}, Python {about['python']}, torch {about['torch']}")
    table = format_table(pd.DataFrame(rows, columns=["bench", "what over what", "ratio", "also"]), "markdown")
    return f"{table}\nMeasured on {'; '.join(sorted(machines))}. No GPU was at hand for these.\n"


def files_table() -> str:
    kinds = {
        "starters/*/model.safetensors": "data/make_starters.py",
        "records/*/parts/*.parquet": "data/make_records.py",
        "records/rows/*/*/parts/*.parquet": "data/make_rows.py",
    }
    lines = ["| file | sha256 | maker | licence |", "| --- | --- | --- | --- |"]
    for pattern, maker in kinds.items():
        for path in sorted(HERE.glob(pattern)):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(f"| `{path.relative_to(HERE).as_posix()}` | `{digest}` | `{maker}` | MIT |")
    return "\n".join(lines) + "\n"


PARTS = {
    ROOT / "README.md": {
        "records": records_table,
        "notebooks": notebooks_table,
        "times": times_sentence,
        "benchmarks": benchmarks_table,
    },
    HERE / "README.md": {"starters": starters_table, "files": files_table},
}


def _times() -> dict:
    return json.loads(TIMES.read_text())


def keep_times(runs: Path) -> None:
    """From run.json of `make run` and tests.xml of `make test`, both under `runs`."""
    run = json.loads((runs / "digits" / "run.json").read_text())["notebooks"]
    bad = [name for name in NOTEBOOKS if run.get(name, {}).get("status") != "ok"]
    if bad:
        sys.exit(f"make run has not finished {', '.join(bad)}")
    suite = ET.parse(runs / "tests.xml").getroot().find("testsuite").attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    if failed:
        sys.exit(f"{failed} tests failed")
    about = {
        "notebooks": {name: round(run[name]["seconds"], 1) for name in NOTEBOOKS},
        "tests": {
            "passed": int(suite["tests"]) - int(suite["skipped"]),
            "skipped": int(suite["skipped"]),
            "seconds": round(float(suite["time"])),
        },
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
    }
    TIMES.parent.mkdir(exist_ok=True)
    TIMES.write_text(json.dumps(about, indent=2) + "\n")


def filled(text: str, parts: dict) -> str:
    for name, make in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, make=make: m[1] + make() + m[2], text, flags=re.S)
        if found != 1:
            sys.exit(f"expected one pair of markers <!-- {name} --> ... <!-- /{name} -->, found {found}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measured", type=Path, metavar="RUNS")
    options = parser.parse_args()
    if options.measured:
        keep_times(options.measured)
    tables = {(record := open_record(HERE / "records" / name)).sigma: certificates(record) for name in RECORDS}
    wanted = {path: filled(path.read_text(), parts) for path, parts in PARTS.items()}
    # the SVG's bytes vary with matplotlib's version; its numbers, in the CSV beside it, do not
    wanted[FIGURE.with_suffix(".csv")] = plots.certified_accuracy_points(tables).to_csv(index=False)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if options.check:
        if stale or not FIGURE.exists():
            sys.exit(
                f"out of date: {', '.join(str(p.relative_to(ROOT)) for p in stale) or FIGURE.name}; run make readme"
            )
        return
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
    if FIGURE.with_suffix(".csv") in stale or not FIGURE.exists():
        plots.print_certified_accuracy(tables, FIGURE)


if __name__ == "__main__":
    main()
