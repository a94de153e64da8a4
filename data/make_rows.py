"""Train and certify the rows of a table that have no record yet.

    python data/make_rows.py noise-training [--only gaussian-0.25 ...] [--again] [--list]

Settings come from data/rows/TABLE.yaml; votes and card go to data/records/rows/TABLE/ROW. Trainings (checkpoints) and
votes under way are kept in runs/rows/TABLE, where an interrupted run goes on; rows that differ only in how they are
certified share a training. Seeded: the same versions on the same kind of processor give the same rows.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch

from smoothkit import data
from smoothkit.attacks import noisy_logits
from smoothkit.progress import format_seconds, say
from smoothkit.rows import Row, RowError, build, certify_row, keep_row, load_rows, read_card, train_row

HERE = Path(__file__).parent
SETTINGS, KEPT, BUILD = HERE / "rows", HERE / "records" / "rows", HERE.parent / "runs" / "rows"
TRIAL = 64  # images to measure a forward pass with


def state(row: Row, kept: Path) -> str:
    """`missing`, `kept`, or `changed`: kept from other settings."""
    if not (kept / row.name / "run.json").is_file() and not (kept / row.name / "card.json").is_file():
        return "missing"
    try:
        return "kept" if read_card(kept / row.name)[0].made_like(row) else "changed"
    except RowError:
        return "changed"


def cost(rows: list[Row], images: dict[str, tuple[data.Images, data.Images]]) -> tuple[float, float]:
    """Seconds of training and of certifying that the rows will take about, from timed forward passes."""
    training = certifying = 0.0
    seen: set[str] = set()
    for row in rows:
        train, test = images[row.data]
        model = build(row, image_shape=tuple(train[0].shape)).eval()
        batch = train.batch(0, TRIAL)
        with torch.inference_mode():
            model(batch)
            began = time.perf_counter()
            noisy_logits(model, batch, torch.zeros(4, *batch.shape))
        forward = (time.perf_counter() - began) / (4 * len(batch))
        certifying += forward * len(test.take(row.images)) * (row.n0 + row.n)
        if row.method == "clean" or row.training_digest in seen:
            continue
        seen.add(row.training_digest)
        copies = row.loss_settings.get("copies", {"macer": 16, "smoothadv": 2, "consistency": 2}.get(row.loss, 1))
        attacked = row.loss_settings.get("steps", 10) if "epsilon" in row.loss_settings else 0
        passes = 3 * (copies + (row.loss == "stability")) + 3 * copies * attacked  # backward costs about two forwards
        if row.method == "coordinator":
            training += forward * row.steps * row.batch * 2 * row.spsa.get("repeats", 5)
        else:
            training += forward * row.epochs * len(train) * (1 - row.validation) * passes
    return training, certifying


def make(row: Row, images: tuple[data.Images, data.Images], kept: Path, work: Path) -> None:
    train, test = images
    fitted = train_row(row, train, out=work / f"training-{row.training_digest}")
    if fitted.interrupted:
        sys.exit(f"{row.name}: interrupted; the same command goes on")
    record = certify_row(row, fitted.model, test.take(row.images), out=work / f"votes-{row.name}")
    new = kept / f".{row.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    keep_row(row, fitted, record, new)
    shutil.rmtree(kept / row.name, ignore_errors=True)
    new.rename(kept / row.name)
    shutil.rmtree(work / f"votes-{row.name}")


def make_table(
    table: str, *, only: list[str] | None = None, again: bool = False, settings: Path = SETTINGS, kept: Path = KEPT,
    work: Path = BUILD,
) -> list[str]:  # fmt: skip
    """Make the missing rows of a table; returns their names."""
    rows = load_rows(settings / f"{table}.yaml")
    unknown = sorted(set(only or ()) - {row.name for row in rows})
    if unknown:
        raise RowError(f"{table} has no row {', '.join(unknown)}; there are {', '.join(r.name for r in rows)}")
    kept, work = kept / table, work / table
    chosen = [row for row in rows if not only or row.name in only]
    states = {row.name: state(row, kept) for row in chosen}
    changed = [name for name, what in states.items() if what == "changed"]
    if changed and not again:
        say(f"kept from other settings, or unreadable: {', '.join(changed)}; --again makes them anew")
    todo = [row for row in chosen if states[row.name] == "missing" or (again and (only or states[row.name] != "kept"))]
    if not todo:
        say(f"{table}: nothing to make, {sum(s == 'kept' for s in states.values())} rows are kept")
        return []
    images = {name: (data.load(name, split="train"), data.load(name)) for name in {row.data for row in todo}}
    training, certifying = cost(todo, images)
    say(
        f"{table}: {len(todo)} rows to make, about {format_seconds(training)} of training and {format_seconds(certifying)} "
        f"of certifying on this machine; an interrupted run goes on"
    )
    for number, row in enumerate(todo, start=1):
        say(f"row {number} of {len(todo)}: {row.name}")
        if again:
            shutil.rmtree(work / f"votes-{row.name}", ignore_errors=True)
        make(row, images[row.data], kept, work)
    return [row.name for row in todo]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=sorted(p.stem for p in SETTINGS.glob("*.yaml")))
    parser.add_argument("--only", nargs="+", metavar="ROW")
    parser.add_argument("--again", action="store_true", help="also rows whose settings changed, or all of --only")
    parser.add_argument("--list", action="store_true", help="say which rows there are, and make none")
    options = parser.parse_args()
    try:
        if options.list:
            for row in load_rows(SETTINGS / f"{options.table}.yaml"):
                print(f"{state(row, KEPT / options.table):8} {row.name}")
            return
        make_table(options.table, only=options.only, again=options.again)
    except RowError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
