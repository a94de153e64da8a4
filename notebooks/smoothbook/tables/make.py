"""Making rows: train, certify and keep them; `python data/make_rows.py TABLE` is a front of `make_table`.

data/records/rows/TABLE/ROW/             vote record, card.json, and the classifier if its row keeps it
runs/rows/training-DIGEST/               checkpoints, where an interrupted training goes on, for rows of all tables
runs/rows/TABLE/votes-ROW/               votes under way
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from smoothbook.adapters import trainable
from smoothbook.tables import table as tables
from smoothbook.tables.build import build, certified_images, check_row, loss_of, schedule_of
from smoothbook.tables.cost import cost
from smoothbook.tables.denoisers import read_denoiser
from smoothbook.tables.selectors import Sampling, keep_selector, read_selector, sample_searched
from smoothbook.tables.settings import CARD, CLASSIFIER, STARTER, Card, Row, RowError
from smoothbook.training import SPSA, FitSettings, Fitted, GradientFreeSettings, crop_and_flip, fit, fit_gradient_free
from smoothkit import data as datasets
from smoothkit.data import Images
from smoothkit.models import BaseClassifier, fingerprint, round_to_half, save_local
from smoothkit.records import Record, compact, open_record, read_json
from smoothkit.sampling.progress import format_seconds, say
from smoothkit.types import NoiseForm, StoppingRule

COPIED = ("epochs", "lr", "optimiser", "weight_decay", "warmup", "layer_decay", "ema", "clip_norm", "precision")


# --- one row -----------------------------------------------------------------------------------------


def train_row(
    row: Row,
    images_train: Images,
    *,
    base: BaseClassifier | None = None,
    trained: Callable[[str], BaseClassifier] | None = None,
    device: str | None = None,
    progress: bool = True,
    on_epoch: Callable[[list[dict[str, Any]]], None] | None = None,
    out: str | Path | None = None,
) -> Fitted:
    """Build and train the classifier of a row; a row of method `clean` is its base, untrained.

    Parameters
    ----------
    row : Row
    images_train : Images
        Labelled; a test split is refused. `row.train_images` of them are trained on.
    base, trained : optional
        As in `build.build`.
    device : str, optional
        Where to train; where the base is if not given.
    progress, on_epoch
        As in `training.fit`; a coordinator calls `on_epoch` at every report.
    out : path, optional
        Folder for a checkpoint: an interrupted training goes on from there, a finished one is only read.

    Returns
    -------
    training.Fitted
        With `model` in eval mode.
    """
    model = build(row, base, image_shape=tuple(images_train[0].shape), trained=trained)
    if device is not None:
        model.to(device)
    if not trainable(model).trained:
        return Fitted(model, [], trainable(model), 0, 0.0, False, None)
    if row.train_images != "all":
        images_train = images_train.take(row.train_images)
    shared = dict(
        batch=row.batch, augment=crop_and_flip if row.crop_and_flip else None, validation=row.validation or None,
        seed=row.seed, out=out, resume=out is not None, progress=progress,
    )  # fmt: skip
    if row.method == "coordinator":
        how = GradientFreeSettings(schedule=schedule_of(row), steps=row.steps, spsa=SPSA(**row.spsa), **shared)
        return fit_gradient_free(model, images_train, how, on_report=on_epoch)
    shared |= {name: getattr(row, name) for name in COPIED}
    if row.method == "denoiser":
        done = read_denoiser(row.denoiser, trained=True).train(model, images_train, FitSettings(**shared), on_epoch)
        return dataclasses.replace(done, model=model.eval())
    how = FitSettings(loss=loss_of(row), schedule=schedule_of(row), description=f"training {row.name}", **shared)
    return fit(model, images_train, how, on_epoch=on_epoch)


def certify_row(
    row: Row,
    model: Callable,
    images: Images,
    *,
    out: str | os.PathLike | None = None,
    train: Images | None = None,
    progress: bool = True,
    batch: int | None = None,
    device: str | None = None,
    precision: str = "float32",
    compile: bool | None = None,
) -> Record:
    """The votes of a row's classifier at its sigma, or sigmas, n0, n and alpha.

    Parameters
    ----------
    row : Row
    model : callable, images [B, C, H, W] on [0, 1] -> logits
    images : Images
    out : path, optional
        Folder of the record, where an interrupted run goes on; a row with `search` has more in it.
    train : Images, optional
        The training split, for a row with a selector.
    progress, batch, device, precision, compile
        As in `sampling.run.collect_votes`.

    Raises
    ------
    RowError
        For a row with a selector without `train` and `out`.
    """
    rule, out = StoppingRule(n0=row.n0, n=row.n, alpha=row.alpha), None if out is None else Path(out)
    sampling = Sampling(rule, row.noise_seed, progress, batch, device, precision, compile)
    if not row.search:
        return sampling.votes(model, images, row.sigma, out)
    search = dict(sigma0=row.sigma, search=row.search, sampling=sampling, out=out)
    if not row.selector:
        return sample_searched(model, images, **search)
    if train is None or out is None:
        raise RowError(f"{row.name} has a selector, which needs the training images and a folder; give train= and out=")

    def new_selector(num_classes: int) -> BaseClassifier:
        return build(dataclasses.replace(row, method="full", base=row.selector["base"], num_classes=num_classes))

    selector = read_selector(row.selector)
    return sample_searched(model, images, **search, selector=selector, train=train, new_selector=new_selector)


def keep_row(
    row: Row, fitted: Fitted, record: Record, folder: str | Path, made_from: dict[str, str] | None = None
) -> None:
    """Write the record as one part, with its card beside it; `made_from` holds the digests of the rows it started from."""
    compact(record, folder)
    if row.selector:
        keep_selector(Path(folder), record.path.parent)
    dataclasses.replace(make_card(row, fitted, record), made_from=made_from or {}).write(folder)


def make_card(row: Row, fitted: Fitted, record: Record) -> Card:
    """What a table wants to know of a row beside its votes; no paths or host names."""
    shown = ("epoch", "step", "loss", "accuracy", "validation_loss", "validation_accuracy", "validation_clean_accuracy")
    last = fitted.rows[-1] if fitted.rows else {}
    asked = getattr(fitted.model, "queries", None)
    return Card(
        row=row,
        trained=fitted.trained.trained,
        parameters=fitted.trained.total,
        parts=fitted.trained.parts,
        steps=fitted.steps,
        seconds=round(fitted.seconds, 2),
        threads=torch.get_num_threads(),
        interrupted=fitted.interrupted,
        end={name: round(last[name], 5) for name in shown if name in last},
        fingerprint=record.identity.fingerprint,
        versions={"python": platform.python_version(), **{m: _version(m) for m in ("torch", "timm", "peft", "numpy")}},
        queries=None if asked is None else last.get("queries", asked),
    )


def _version(distribution: str) -> str:
    return version(distribution).split("+")[0]


def save_starter(row: Row, fitted: Fitted, images: Images, folder: str | Path) -> dict[str, Any]:
    """Write a row's classifier as a starter, in timm's layout with `card.json` beside it; returns the card.

    `images` are those it was trained on.
    """
    fitted.model.class_names = tuple(images.class_names)
    folder = save_local(round_to_half(fitted.model), folder)
    config, last = read_json(folder / "config.json"), fitted.rows[-1]
    card = {
        "name": folder.name,
        "architecture": config["architecture"],
        "parameters": fitted.trained.total,
        "base": row.base,
        "trained_on": f"{images.name}, {len(images):,} images",
        "contents": contents_digest(images),
        "sigma": row.schedule or row.sigma,
        "epochs": row.epochs,
        "seed": row.seed,
        "seconds": round(fitted.seconds),
        "threads": torch.get_num_threads(),
        "validation_accuracy": {
            "clean": round(last.get("validation_clean_accuracy", math.nan), 4),
            "in_training": round(last.get("validation_accuracy", math.nan), 4),
        },
        "weights": "rounded to half precision",
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "license": "MIT",
    }
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return card


def contents_digest(images: Images, sample: int = 200) -> str:
    """Of the pixels of every (N / sample)-th image: which data it was, whatever it is called."""
    text = "".join(images.digest(i, 56) for i in range(0, len(images), max(1, len(images) // sample)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# --- a table -----------------------------------------------------------------------------------------


def make_table(
    name: str,
    *,
    only: Iterable[str] | None = None,
    again: bool = False,
    data: str | Path | None = None,
    device: str | None = None,
) -> list[str]:
    """Make the missing rows of a table, and returns their names.

    Parameters
    ----------
    name : str
        As `tables.open` takes it.
    only : iterable of str, optional
        Names of rows.
    again : bool
        Also rows whose settings changed, or all of `only`.
    data : path, optional
        A folder laid out as the workbook's `data`; the folder `runs` for work under way lies beside it.
    device : str, optional
        Where to train; certifying finds its own.

    Raises
    ------
    RowError
        For settings that cannot be read, and where a training is interrupted; the same call goes on.
    """
    data = tables.data_folder() if data is None else Path(data)
    table = tables.open(name, data=data, check=check_row)
    chosen = [table[row] for row in (table if only is None else only)]
    states = {row.row.name: row.state for row in chosen}
    changed = [name for name, state in states.items() if state == "changed"]
    if changed and not again:
        say(f"kept from other settings, or unreadable: {', '.join(changed)}; --again makes them anew")
    wanted = {"missing"} | ({"changed"} if again else set()) | ({"kept"} if again and only else set())
    todo = [name for name, state in states.items() if state in wanted]
    if not todo:
        say(f"{table.folder.name}: nothing to make, {list(states.values()).count('kept')} rows are kept")
        return []
    maker = Maker(table, data.parent / "runs" / "rows", data / "starters", device)
    training, certifying = maker.cost(todo)
    say(
        f"{table.folder.name}: {len(todo)} rows to make, about {format_seconds(training)} of training and "
        f"{format_seconds(certifying)} of certifying on this machine; an interrupted run goes on"
    )
    for number, row in enumerate(todo, start=1):
        say(f"row {number} of {len(todo)}: {row}")
        maker.make(row, again=again)
    return todo


class Maker:
    """Trains, certifies and keeps rows of one table.

    Rows that differ only in how they are certified share a training, of all tables in `work`; a row that another table has
    is copied from there. Seeded: the same versions on the same kind of processor give the same rows.
    """

    def __init__(self, table: tables.Table, work: Path, starters: Path, device: str | None = None) -> None:
        self.table, self.work, self.starters, self.device = table, work, starters, device
        self._opened: dict[str, tuple[Images, Images]] = {}

    def images(self, name: str) -> tuple[Images, Images]:
        """Training and test images of a data set."""
        if name not in self._opened:
            self._opened[name] = datasets.load(name, split="train"), datasets.load(name)
        return self._opened[name]

    def cost(self, names: Iterable[str]) -> tuple[float, float]:
        """Seconds of training and of certifying that rows will take about."""
        rows = [self.table.rows[name] for name in names]
        return cost(rows, {row.data: self.images(row.data) for row in rows})

    def trained(self, name: str) -> Fitted:
        """A row's classifier, trained now unless its training is finished already; rounded if it is to be kept."""
        row = self.table.rows[name]
        out = self.work / f"training-{row.training_digest(self.table.rows)}"
        train, _ = self.images(row.data)
        fitted = train_row(row, train, trained=lambda other: self.trained(other).model, device=self.device, out=out)
        if fitted.interrupted:
            raise RowError(f"{name}: interrupted; the same command goes on")
        if row.keep:
            round_to_half(fitted.model, fitted.model.adapter_state() if _adapted(fitted.model) else None)
        return fitted

    def make(self, name: str, *, again: bool = False) -> None:
        """Make one row; with `again` votes under way are thrown away first."""
        row, votes = self.table.rows[name], self.work / self.table.folder.name / f"votes-{name}"
        new, kept = self.table.folder / f".{name}.new", self.table.folder / name
        shutil.rmtree(new, ignore_errors=True)
        if again:
            shutil.rmtree(votes, ignore_errors=True)
            shutil.rmtree(kept, ignore_errors=True)
        alike = next((path for path in sorted(self.table.folder.parent.glob("*/*")) if _is_alike(path, row)), None)
        if alike is not None:
            say(f"{name}: is {alike.parent.name}/{alike.name}, copied from there")
            shutil.copytree(alike, new)
            dataclasses.replace(Card.read(new), row=row).write(new)
        else:
            self._make(row, votes, new)
        shutil.rmtree(kept, ignore_errors=True)
        new.rename(kept)

    def _make(self, row: Row, votes: Path, new: Path) -> None:
        fitted, (train, test) = self.trained(row.name), self.images(row.data)
        images = certified_images(row, train, test)
        self._copy_votes(row, fitted.model, images, votes)
        record = certify_row(row, fitted.model, images, out=votes, train=train)
        keep_row(row, fitted, record, new, made_from=self.table[row.name].origins)
        if isinstance(row.keep, str):
            starter = self.starters / row.keep.removeprefix(STARTER)
            save_starter(row, fitted, train.take(row.train_images), starter)
        elif row.keep:  # an adapter without its base, anything else in timm's layout
            fitted.model.save(new / CLASSIFIER) if _adapted(fitted.model) else save_local(
                fitted.model, new / CLASSIFIER
            )
        shutil.rmtree(votes)

    def _copy_votes(self, row: Row, model: torch.nn.Module, images: Images, votes: Path) -> None:
        """Where a kept row has the votes of the same classifier on the same noise, they are not sampled again."""
        if row.search or votes.exists():
            return
        noise = str(NoiseForm(images.grid))
        wanted = (fingerprint(model), images.dataset, images.split, images.subset, row.sigma, row.noise_seed, noise)
        rule = StoppingRule(n0=row.n0, n=row.n, alpha=row.alpha)
        for path in sorted(self.table.folder.parent.glob("*/*/run.json")):
            known = open_record(path.parent).identity
            mine = (known.fingerprint, known.dataset, known.split, known.subset, known.sigma, known.seed, known.noise)
            if mine == wanted and known.stopping_rule == rule:
                say(f"{row.name}: has the votes of {path.parent.parent.name}/{path.parent.name}, copied from there")
                shutil.copytree(path.parent / "parts", votes / "parts")
                shutil.copy(path, votes / "run.json")
                return


def _adapted(model: BaseClassifier) -> bool:
    return hasattr(model, "adapter_state")


def _is_alike(path: Path, row: Row) -> bool:
    try:
        return not row.made_from and Card.read(path).row.made_like(row)
    except (RowError, NotADirectoryError):
        return False
