"""Train and certify the rows of a table that have no record yet.

    python data/make_rows.py noise-training [--variant reduced] [--only gaussian-0.25 ...] [--again] [--list] [--device cuda]

Settings come from data/rows/TABLE.yaml; votes and card go to data/records/rows/TABLE/ROW (TABLE-VARIANT for a variant).
Trainings (checkpoints) and votes under way are kept in runs/rows, where an interrupted run goes on; rows that differ only
in how they are certified share a training, of all tables, and a row that another table has is copied from there. Seeded:
the same versions on the same kind of processor give the same rows. A row with `keep: starter:NAME` writes that starter.
"""

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path

import torch

from smoothbook.settings import RowError
from smoothbook.sigma.search import SigmaSearch
from smoothbook.tables.make import (
    build,
    certified_images,
    certify_row,
    finish,
    keep_row,
    relabel,
    save_classifier,
    save_starter,
    train_row,
)
from smoothbook.tables.selectors import parse_search
from smoothbook.tables.settings import STARTER, Row, load_rows
from smoothbook.tables.table import read_card
from smoothbook.training import Fitted
from smoothbook.training.attacks import noisy_logits
from smoothkit import data
from smoothkit.models import fingerprint
from smoothkit.records import open_record
from smoothkit.sampling.progress import format_seconds, say
from smoothkit.types import NoiseForm, StoppingRule

HERE = Path(__file__).parent
STARTERS = HERE / "starters"
SETTINGS, KEPT, BUILD = HERE / "rows", HERE / "records" / "rows", HERE.parent / "runs" / "rows"
TRIAL = 64  # images to measure a forward pass with


def state(row: Row, kept: Path, rows: dict[str, Row]) -> str:
    """`missing`, `kept`, or `changed`: kept from other settings, its own or those of a row it is made from."""
    if not (kept / row.name / "run.json").is_file() and not (kept / row.name / "card.json").is_file():
        return "missing"
    try:
        known, card = read_card(kept / row.name)
    except RowError:
        return "changed"
    same = known.made_like(row) and (not row.made_from or card.get("made_from") == origins(row, rows))
    return "kept" if same else "changed"


def origins(row: Row, rows: dict[str, Row]) -> dict[str, str]:
    """The rows that a row is made from, with the digests of their settings."""
    return {name: rows[name].training_digest(rows) for name in row.made_from}


def cost(rows: list[Row], images: dict[str, tuple[data.Images, data.Images]]) -> tuple[float, float]:
    """Seconds of training and of certifying that the rows will take about, from timed forward passes.

    Rows made from others are not built for it; a pass of theirs counts as the average of the rest.
    """
    forward, by_name = {}, {row.name: row for row in rows}
    for row in rows:
        if not row.made_from:
            forward[row.name] = forward_seconds(row, images[row.data][0])
    average = sum(forward.values()) / max(1, len(forward))
    training, certifying, seen = 0.0, 0.0, set()
    for row in rows:
        train, test = images[row.data]
        seconds, trained = forward.get(row.name, average), set(row.made_from) <= by_name.keys()
        certifying += seconds * certifying_passes(row, len(certified_images(row, train, test)), train)
        if trained and (digest := row.training_digest(by_name)) not in seen:
            seen.add(digest)
            training += seconds * training_passes(row, len(train.take(row.train_images)))
    return training, certifying


def forward_seconds(row: Row, train: data.Images) -> float:
    """Seconds of a forward pass of one image."""
    model = build(row, image_shape=tuple(train[0].shape)).eval()
    batch = train.batch(0, TRIAL)
    with torch.inference_mode():
        model(batch)
        began = time.perf_counter()
        noisy_logits(model, batch, torch.zeros(4, *batch.shape))
    return (time.perf_counter() - began) / (4 * len(batch))


def certifying_passes(row: Row, images: int, train: data.Images) -> float:
    """Forward passes that the votes cost, those of searching sigmas and making a selector among them."""
    search = SigmaSearch() if not row.search else parse_search(row.search)
    searched = 3 * search.steps * search.draws + 2 * search.pilot
    if not row.selector:
        return images * (row.n0 + row.n + bool(row.search) * searched)
    made_on = len(train.take(row.selector["train_images"]))
    smoothed = row.selector["kind"] == "smoothed"
    trained = 3 * row.selector["epochs"] * made_on if smoothed else 0
    return images * (row.n0 + row.n) * (1 + smoothed) + made_on * searched + trained


def training_passes(row: Row, images: int) -> float:
    """Forward passes that a training costs, a backward pass counted as two."""
    if row.method == "clean":
        return 0.0
    if row.method == "coordinator":
        return row.steps * row.batch * 2 * row.spsa.get("repeats", 5)
    if row.method == "denoiser":  # calibration denoises two copies, and has the diffusion model's own loss
        copies, before = 3 if "calibration" in row.denoiser else 1, row.denoiser.get("mse", {}).get("epochs", 0)
        return (row.epochs + before) * images * (1 - row.validation) * 3 * copies
    copies = row.loss_settings.get("copies", {"macer": 16, "smoothadv": 2, "consistency": 2}.get(row.loss, 1))
    attacked = row.loss_settings.get("steps", 10) if "epsilon" in row.loss_settings else 0
    passes = 3 * (copies + (row.loss == "stability")) + 3 * copies * attacked
    return row.epochs * images * (1 - row.validation) * passes


class Maker:
    """Trains, certifies and keeps rows of one table."""

    def __init__(self, rows: list[Row], kept: Path, work: Path, device: str | None) -> None:
        self.rows, self.kept, self.work, self.device = {row.name: row for row in rows}, kept, work, device
        self.starters = STARTERS
        self._opened: dict[str, tuple[data.Images, data.Images]] = {}

    def images(self, name: str) -> tuple[data.Images, data.Images]:
        """Training and test images of a data set."""
        if name not in self._opened:
            self._opened[name] = data.load(name, split="train"), data.load(name)
        return self._opened[name]

    def trained(self, name: str) -> Fitted:
        """A row's classifier, trained now unless its training is finished already."""
        row = self.rows[name]
        out = self.work / f"training-{row.training_digest(self.rows)}"
        fitted = train_row(
            row, self.images(row.data)[0], trained=lambda other: self.trained(other).model, device=self.device, out=out
        )
        if fitted.interrupted:
            sys.exit(f"{row.name}: interrupted; the same command goes on")
        return dataclasses.replace(fitted, model=finish(row, fitted.model))

    def make(self, row: Row) -> None:
        new = self.kept / f".{row.name}.new"
        shutil.rmtree(new, ignore_errors=True)
        alike = next((path for path in sorted(self.kept.parent.glob("*/*")) if _is_alike(path, row)), None)
        if alike is not None:
            say(f"{row.name}: is {alike.parent.name}/{alike.name}, copied from there")
            shutil.copytree(alike, new)
            relabel(new, row)
        else:
            votes = self.work / self.kept.name / f"votes-{row.name}"
            fitted = self.trained(row.name)
            train, test = self.images(row.data)
            images = certified_images(row, train, test)
            self.copy_votes(row, fitted.model, images, votes)
            record = certify_row(row, fitted.model, images, out=votes, train=train)
            keep_row(row, fitted, record, new, made_from=origins(row, self.rows))
            if isinstance(row.keep, str):
                trained_on = self.images(row.data)[0].take(row.train_images)
                save_starter(row, fitted, trained_on, self.starters / row.keep.removeprefix(STARTER))
            elif row.keep:
                save_classifier(row, fitted.model, new)
            shutil.rmtree(votes)
        shutil.rmtree(self.kept / row.name, ignore_errors=True)
        new.rename(self.kept / row.name)

    def copy_votes(self, row: Row, model: torch.nn.Module, images: data.Images, votes: Path) -> None:
        """Where a kept row has the votes of the same classifier on the same noise, they are not sampled again."""
        if row.search or votes.exists():
            return
        noise = str(NoiseForm(images.grid))
        wanted = (fingerprint(model), images.dataset, images.split, images.subset, row.sigma, row.noise_seed, noise)
        rule = StoppingRule(n0=row.n0, n=row.n, alpha=row.alpha)
        for path in sorted(self.kept.parent.glob("*/*/run.json")):
            known = open_record(path.parent).identity
            mine = (known.fingerprint, known.dataset, known.split, known.subset, known.sigma, known.seed, known.noise)
            if mine == wanted and known.stopping_rule == rule:
                say(f"{row.name}: has the votes of {path.parent.parent.name}/{path.parent.name}, copied from there")
                shutil.copytree(path.parent / "parts", votes / "parts")
                shutil.copy(path, votes / "run.json")
                return


def _is_alike(path: Path, row: Row) -> bool:
    try:
        return not row.made_from and read_card(path)[0].made_like(row)
    except (RowError, NotADirectoryError):
        return False


def make_table(
    table: str, *, variant: str | None = None, only: list[str] | None = None, again: bool = False,
    settings: Path = SETTINGS, kept: Path = KEPT, work: Path = BUILD, device: str | None = None,
) -> list[str]:  # fmt: skip
    """Make the missing rows of a table; returns their names."""
    rows = load_rows(settings / f"{table}.yaml", variant)
    by_name = {row.name: row for row in rows}
    unknown = sorted(set(only or ()) - by_name.keys())
    if unknown:
        raise RowError(f"{table} has no row {', '.join(unknown)}; there are {', '.join(by_name)}")
    kept = kept / (table if variant is None else f"{table}-{variant}")
    chosen = [row for row in rows if not only or row.name in only]
    states = {row.name: state(row, kept, by_name) for row in chosen}
    changed = [name for name, what in states.items() if what == "changed"]
    if changed and not again:
        say(f"kept from other settings, or unreadable: {', '.join(changed)}; --again makes them anew")
    todo = [row for row in chosen if states[row.name] == "missing" or (again and (only or states[row.name] != "kept"))]
    if not todo:
        say(f"{kept.name}: nothing to make, {sum(s == 'kept' for s in states.values())} rows are kept")
        return []
    maker = Maker(rows, kept, work, device)
    training, certifying = cost(todo, {row.data: maker.images(row.data) for row in todo})
    say(
        f"{kept.name}: {len(todo)} rows to make, about {format_seconds(training)} of training and "
        f"{format_seconds(certifying)} of certifying on this machine; an interrupted run goes on"
    )
    for number, row in enumerate(todo, start=1):
        say(f"row {number} of {len(todo)}: {row.name}")
        if again:
            shutil.rmtree(work / kept.name / f"votes-{row.name}", ignore_errors=True)
            shutil.rmtree(kept / row.name, ignore_errors=True)
        maker.make(row)
    return [row.name for row in todo]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=sorted(p.stem for p in SETTINGS.glob("*.yaml")))
    parser.add_argument("--only", nargs="+", metavar="ROW")
    parser.add_argument("--again", action="store_true", help="also rows whose settings changed, or all of --only")
    parser.add_argument("--variant", help="settings of the table that go over all others, as reduced")
    parser.add_argument("--device", help="where to train, as cuda; certifying finds its own")
    parser.add_argument("--list", action="store_true", help="say which rows there are, and make none")
    options = parser.parse_args()
    try:
        if options.list:
            rows = load_rows(SETTINGS / f"{options.table}.yaml", options.variant)
            kept = KEPT / (f"{options.table}-{options.variant}" if options.variant else options.table)
            for row in rows:
                print(f"{state(row, kept, {r.name: r for r in rows}):8} {row.name}")
            return
        make_table(
            options.table, variant=options.variant, only=options.only, again=options.again, device=options.device
        )
    except RowError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
