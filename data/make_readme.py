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
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from smoothbook import figures, tables
from smoothbook.bench.registry import BENCHMARKS
from smoothbook.runner.notebooks import About, about, notebook_names
from smoothkit.certify import certificates
from smoothkit.reading import format_table, report
from smoothkit.records import open_record, read_json

HERE = Path(__file__).parent
ROOT = HERE.parent
TIMES = HERE / "benchmarks" / "workbook-digits.json"
FIGURE = HERE / "figures" / "certified-accuracy-digits.svg"
RECORDS = [f"digits-vit-{sigma}-sigma-{sigma}" for sigma in ("0.12", "0.25", "0.50")]
SIGMAS = ("0", "0.12", "0.25", "0.5", "1")  # at which cards and rules say how a base classifier does


def records_table() -> str:
    paths = [HERE / "records" / name for name in [*RECORDS, "digits-vit-clean-sigma-0.25"]]
    frame = report(paths, (0.0, 0.25, 0.5, 0.75, 1.0))
    return format_table(frame.assign(path=[p.name for p in paths]).rename(columns={"path": "record"}), "markdown")


def notebooks_table() -> str:
    rows = [
        (f"[{name}](notebooks/{name}.ipynb)", known.level, f"{seconds:.0f} s", known.title)
        for name, seconds, known in _notebooks()
    ]
    return _markdown(rows, ["notebook", "level", "measured", "title"])


def exercises_table() -> str:
    """What to plan for each notebook: how long it runs, how many exercises it has and the minutes they ask for."""
    rows = [
        (f"[{name}]({name}.ipynb)", f"{seconds:.0f} s", str(len(known.minutes)), f"{sum(known.minutes)} min")
        for name, seconds, known in _notebooks()
    ]
    return _markdown(rows, ["notebook", "runs in", "exercises", "time for them"])


def _notebooks() -> Iterator[tuple[str, float, About]]:
    """Name, measured seconds and what it says of itself, of each notebook in order."""
    seconds = read_json(TIMES)["notebooks"]
    return ((name, seconds[name], about(ROOT / "notebooks" / f"{name}.ipynb")) for name in notebook_names())


def _markdown(rows: list[tuple], columns: list[str]) -> str:
    return format_table(pd.DataFrame(rows, columns=columns), "markdown")


def times_sentence() -> str:
    times = read_json(TIMES)
    notebooks, tests = sum(times["notebooks"].values()), times["tests"]
    skipped = f"{tests['skipped']} skipped" if tests["skipped"] else "none skipped, with the public data at hand"
    return (
        f"Measured on {times['cores']} CPU cores ({times['machine']}, Python {times['python']}, torch {times['torch']}): "
        f"`make run` executes the {len(times['notebooks'])} notebooks in {notebooks / 60:.1f} minutes, `make test` runs "
        f"{tests['passed']} tests in {tests['seconds'] / 60:.1f} minutes ({skipped}). "
        "The installation comes on top, once.\n"
    )


def starters_table() -> str:
    rows = []
    for card in _cards("digits-vit*"):
        accuracy = card["test_accuracy_of_the_base_classifier_by_sigma"]
        about = (f"`{card['name']}`", f"{card['parameters']:,}", f"{card['sigma']:g}", card["epochs"])
        rows.append((*about, *(f"{accuracy[s]:.3f}" for s in SIGMAS)))
    rule = read_json(HERE / "starters" / "mixture-rule.json")
    rows.append(("mixture rule", "-", "-", "-", *(f"{rule[s]:.3f}" for s in SIGMAS)))
    return _markdown(rows, ["starter", "parameters", "trained at", "epochs", *(f"accuracy at {s}" for s in SIGMAS)])


def pretrained_table() -> str:
    """Starters on natural images, from their cards."""
    rows = []
    for card in _cards("*"):
        if "validation_accuracy" in card:
            noise, seen = card["sigma"], card["validation_accuracy"]
            about = (f"`{card['name']}`", f"{card['parameters']:,}", card["trained_on"])
            trained = (noise if isinstance(noise, str) else f"{noise:g}", card["epochs"], card["seconds"])
            rows.append((*about, *trained, f"{seen['clean']:.3f}", f"{seen['in_training']:.3f}"))
    columns = ["starter", "parameters", "trained on", "noise", "epochs", "seconds", "clean", "under its noise"]
    return _markdown(rows, columns)


def diffusion_table() -> str:
    """Diffusion models, from their cards."""
    rows = []
    for card in _cards("*-ddpm*"):
        seen = card["test_psnr_of_one_shot_denoising_by_sigma"]
        about = (
            f"`{card['name']}`",
            f"{card['parameters']:,}",
            card["trained_on"],
            f"{card['steps']:,}",
            card["seconds"],
        )
        rows.append((*about, *(f"{seen[s]:.1f}" for s in ("0.25", "0.5", "1"))))
    columns = ["starter", "parameters", "trained on", "steps", "seconds", "PSNR at 0.25", "PSNR at 0.5", "PSNR at 1"]
    return _markdown(rows, columns)


def _cards(pattern: str) -> list[dict]:
    return [read_json(path) for path in sorted((HERE / "starters").glob(f"{pattern}/card.json"))]


def _sigma_of(row) -> str:
    """The noise level, or whose radius it is where each image has one of its own."""
    if not row.search:
        return f"{row.sigma:g}"
    return "per image, sound radius" if row.selector else "per image, frozen radius"


def natural_table() -> str:
    """Rows of all tables on CIFAR-10."""
    lines = []
    for name in (name for name in tables.kept() if name.startswith("cifar10")):
        table = tables.open(name)
        found = table.frame((0.0, 0.25, 0.5))
        where = [_sigma_of(table.rows[name]) for name in found.name]
        trained = [f"{t:,}" for t in found.trained]
        lines.append(found.assign(table=f"`{name}`", row=found.title, sigma=where, trained=trained))
    frame = pd.concat(lines)[["table", "row", "sigma", "trained", "images", "0", "0.25", "0.5", "ACR"]]
    return format_table(frame, "markdown")


def benchmarks_table() -> str:
    rows, machines = [], set()
    for name in BENCHMARKS:
        full, quick = (HERE / "benchmarks" / f"{name}{kind}.json" for kind in ("", "-quick"))
        about = read_json(full if full.exists() else quick)
        others = "; ".join(f"{what}: {ratio:.2f}" for what, ratio in about["others"].items())
        bench = f"`{name}`{' (quick)' if about['quick'] else ''}"
        rows.append((bench, about["headline"], f"{about['ratio']:.2f}", others or "-"))
        machines.add(f"{about['processor']}, {about['machine']}, Python {about['python']}, torch {about['torch']}")
    table = _markdown(rows, ["bench", "what over what", "ratio", "also"])
    return f"{table}\nMeasured on {'; '.join(sorted(machines))}. No GPU was at hand for these.\n"


MAKERS = {  # by what a starter's name begins with
    "digits-vit": "data/make_starters.py", "digits-ddpm": "data/make_diffusion.py",
    "tin32": "data/make_pretrained.py", "cifar10-ddpm": "data/make_diffusion.py", "cifar10": "data/make_rows.py",
}  # fmt: skip


def files_table() -> str:
    """Every weight file and record with its sha256; the records of a table's rows as one, with that of their list."""
    found = {
        path: next(maker for start, maker in MAKERS.items() if path.relative_to(HERE).parts[1].startswith(start))
        for path in sorted(HERE.glob("starters/**/*.safetensors"))
    }
    found |= dict.fromkeys(sorted(HERE.glob("records/*/parts/*.parquet")), "data/make_records.py")
    digests = [(path.relative_to(HERE).as_posix(), _sha256(path.read_bytes()), maker) for path, maker in found.items()]
    for table in sorted(p for p in (HERE / "records" / "rows").iterdir() if p.is_dir()):
        parts = [p for p in sorted(table.rglob("*")) if p.suffix in {".parquet", ".safetensors"}]
        listed = "".join(f"{_sha256(p.read_bytes())}  {p.relative_to(table).as_posix()}\n" for p in parts)
        name = f"{table.relative_to(HERE).as_posix()}/ ({len(parts)} files)"
        digests.append((name, _sha256(listed.encode()), "data/make_rows.py"))
    lines = ["| file | sha256 | maker | licence |", "| --- | --- | --- | --- |"]
    lines += [f"| `{name}` | `{digest}` | `{maker}` | MIT |" for name, digest, maker in digests]
    return "\n".join(lines) + "\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


PARTS = {
    ROOT / "README.md": {
        "records": records_table,
        "natural": natural_table,
        "notebooks": notebooks_table,
        "times": times_sentence,
        "benchmarks": benchmarks_table,
    },
    ROOT / "notebooks" / "README.md": {"exercises": exercises_table},
    HERE / "README.md": {
        "starters": starters_table,
        "pretrained": pretrained_table,
        "diffusion": diffusion_table,
        "files": files_table,
    },
}


def keep_times(runs: Path) -> None:
    """From run.json of `make run` and tests.xml of `make test`, both under `runs`."""
    run = read_json(runs / "digits" / "run.json")["notebooks"]
    bad = [name for name in notebook_names() if run.get(name, {}).get("status") != "ok"]
    if bad:
        sys.exit(f"make run has not finished {', '.join(bad)}")
    suite = ET.parse(runs / "tests.xml").getroot().find("testsuite").attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    if failed:
        sys.exit(f"{failed} tests failed")
    about = {
        "notebooks": {name: round(run[name]["seconds"], 1) for name in notebook_names()},
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
    curves = {(record := open_record(HERE / "records" / name)).sigma: certificates(record) for name in RECORDS}
    wanted = {path: filled(path.read_text(), parts) for path, parts in PARTS.items()}
    # the SVG's bytes vary with matplotlib's version; its numbers, in the CSV beside it, do not
    wanted[FIGURE.with_suffix(".csv")] = figures.certified_accuracy_points(curves).to_csv(index=False)
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
        figures.save_print(figures.certified_accuracy_print(curves), FIGURE, figures.certified_accuracy_points(curves))


if __name__ == "__main__":
    main()
