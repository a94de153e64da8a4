"""A row of a table: build its classifier, train it, certify it, keep it."""

import copy
import dataclasses
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoothbook.settings import RowError, _check_one_of
from smoothbook.tables.settings import (
    CARD,
    CLASSIFIER,
    HELD_OUT,
    OF_ROW,
    RANDOM,
    WITHOUT_ADAPTER,
    Row,
    _loss,
    _schedule,
)
from smoothbook.tables.table import kept_tables, open_table, read_card
from smoothkit.records import Record, compact

if TYPE_CHECKING:
    from smoothbook.training import Fitted
    from smoothkit.data import Images
    from smoothkit.models import BaseClassifier


# --- making ----------------------------------------------------------------------------------------


def build(
    row: Row,
    base: "BaseClassifier | None" = None,
    *,
    image_shape: tuple[int, int, int] | None = None,
    trained: "Callable[[str], BaseClassifier] | None" = None,
) -> "BaseClassifier":
    """The classifier of a row before training: what is trained has `requires_grad`.

    Parameters
    ----------
    row : Row
    base : BaseClassifier, optional
        In place of the one that `row.base` names, as for a base that was itself just trained. It is copied.
    image_shape : (C, H, W), optional
        Of the images; a coordinator needs it.
    trained : callable, optional
        Gives the trained classifier of another row by its name, where this one is made from others.
    """
    if row.denoiser:
        plain = dataclasses.replace(row, denoiser={}, method="clean" if row.method == "denoiser" else row.method)
        return _behind_denoiser(row, build(plain, base, image_shape=image_shape, trained=trained), image_shape)
    from smoothbook import adapters

    if row.method == "ensemble":
        members = {float(s): trained(name.removeprefix(OF_ROW)) for s, name in row.adapter["members"].items()}
        return adapters.ensemble(members, seed=row.seed, design=row.adapter.get("design", "logits"))
    base = _base(row, trained) if base is None else base
    if row.method in WITHOUT_ADAPTER:
        return _whole(row, base)
    settings = {"seed": row.seed, **row.adapter}
    if row.num_classes is not None:
        settings |= {"num_classes": row.num_classes, "class_names": ()}
    if row.method != "coordinator":
        return getattr(adapters, row.method)(base, **settings)
    encoder = settings.pop("encoder", None)
    encoder = _loaded(encoder, row.seed) if isinstance(encoder, str) else encoder or base
    return adapters.coordinator(base, encoder, image_shape=image_shape, **settings)


def _base(row: Row, trained: "Callable[[str], BaseClassifier] | None") -> "BaseClassifier":
    if row.base.startswith(OF_ROW):
        if trained is None:
            raise RowError(
                f"{row.name} is made from the {row.base.replace(':', ' ')}; give base=load_base(rows, folder, row), or trained="
            )
        return trained(row.base.removeprefix(OF_ROW))
    return _loaded(row.base, row.seed, **row.model_args)


def _loaded(name: str, seed: int, **model_args) -> "BaseClassifier":
    from smoothbook.adapters.base import seeded
    from smoothkit import models

    if not name.startswith(RANDOM):
        return models.load(name, **model_args)
    with seeded(seed):
        return models.load(name.removeprefix(RANDOM), pretrained=False, **model_args)


def _behind_denoiser(
    row: Row, classifier: "BaseClassifier", image_shape: tuple[int, int, int] | None
) -> "BaseClassifier":
    from smoothbook.denoise import DenoisedClassifier
    from smoothbook.tables.denoisers import make_denoiser

    channels = 1 if image_shape is None else image_shape[0]
    denoiser = make_denoiser(row.denoiser, sigma=row.sigma, channels=channels, seed=row.seed)
    return DenoisedClassifier(denoiser, classifier).eval()


def _whole(row: Row, base: "BaseClassifier") -> "BaseClassifier":
    """A copy of the base, with a new head if asked for, of which nothing, all or the head is trained."""
    from smoothbook.adapters.base import prepare_head, seeded

    model = copy.deepcopy(base).requires_grad_(False)
    if row.num_classes is not None or row.method == "head":
        with seeded(row.seed):
            prepare_head(model.network, "trained", row.num_classes)
        model.class_names = model.class_names if row.num_classes is None else ()
    if row.method != "head":
        model.requires_grad_(row.method == "full")
    return model.eval()


def train_row(
    row: Row,
    images_train: "Images",
    *,
    base: "BaseClassifier | None" = None,
    trained: "Callable[[str], BaseClassifier] | None" = None,
    device: str | None = None,
    progress: bool = True,
    on_epoch: Callable[[list[dict[str, Any]]], None] | None = None,
    out: str | Path | None = None,
) -> "Fitted":
    """Build and train the classifier of a row; a row of method `clean` is its base, untrained.

    Parameters
    ----------
    row : Row
    images_train : Images
        Labelled; a test split is refused. `row.train_images` of them are trained on.
    base, trained : optional
        As in `build`.
    device : str, optional
        Where to train; where the base is if not given.
    progress, on_epoch
        As in `training.fit`; a coordinator calls `on_epoch` at every report.
    out : path, optional
        Folder for checkpoints: an interrupted training goes on from there, a finished one is only read.

    Returns
    -------
    training.Fitted
        With `model` in eval mode.
    """
    from smoothbook import training
    from smoothbook.adapters import trainable

    model = build(row, base, image_shape=tuple(images_train[0].shape), trained=trained)
    if device is not None:
        model.to(device)
    if not trainable(model).trained:
        return training.Fitted(model, [], trainable(model), 0, 0.0, False, None)
    if row.train_images != "all":
        images_train = images_train.take(row.train_images)
    shared = dict(
        schedule=_schedule(row), batch=row.batch, augment=training.crop_and_flip if row.crop_and_flip else None,
        validation=row.validation or None, seed=row.seed, out=out, resume=out is not None, progress=progress,
    )  # fmt: skip
    if row.method == "coordinator":
        how = training.GradientFreeSettings(steps=row.steps, spsa=training.SPSA(**row.spsa), **shared)
        return training.fit_gradient_free(model, images_train, how, on_report=on_epoch)
    copied = ("epochs", "lr", "optimiser", "weight_decay", "warmup", "layer_decay", "ema", "clip_norm", "precision")
    shared |= {name: getattr(row, name) for name in copied}
    if row.method == "denoiser":
        from smoothbook.tables.denoisers import train_denoiser

        del shared["schedule"]
        return train_denoiser(model, images_train, row.denoiser, training.FitSettings(**shared), on_epoch)
    how = training.FitSettings(loss=_loss(row), description=f"training {row.name}", **shared)
    return training.fit(model, images_train, how, on_epoch=on_epoch)


def certify_row(
    row: Row,
    model: Callable,
    images: "Images",
    *,
    out: str | os.PathLike | None = None,
    train: "Images | None" = None,
    progress: bool = True,
    **how,
) -> Record:
    """The votes of a row's classifier at its sigma, or sigmas, n0, n and alpha; kept in the folder `out`, where a run goes on.

    `train` is the training split, for a row with a selector; `how` goes to `Smoothed`: batch, device, precision, compile.
    """
    from smoothkit import Smoothed

    settings = dict(n0=row.n0, n=row.n, alpha=row.alpha, seed=row.noise_seed, progress=progress)
    if row.search:
        return _certify_searched(row, model, images, None if out is None else Path(out), train, **settings, **how)
    return Smoothed(model, row.sigma, **how).sample(images, out=out, **settings)


def _certify_searched(
    row: Row, model, images: "Images", out: Path | None, train: "Images | None", **settings
) -> Record:
    from smoothbook.tables.selectors import sample_searched, sample_selected

    settings |= dict(sigma0=row.sigma, search=row.search, out=out)
    if not row.selector:
        return sample_searched(model, images, **settings)
    if train is None or out is None:
        raise RowError(f"{row.name} has a selector, which needs the training images and a folder; give train= and out=")

    def new_selector(num_classes: int) -> "BaseClassifier":
        return build(dataclasses.replace(row, method="full", base=row.selector["base"], num_classes=num_classes))

    return sample_selected(model, images, train, selector=row.selector, new_selector=new_selector, **settings)


def certified_images(row: Row, train: "Images", test: "Images") -> "Images":
    """Those a row is certified on: of the test split, or the ones its training holds out."""
    if row.images != HELD_OUT:
        return test.take(row.images)
    from smoothbook.training.images import split_images

    images, positions = split_images(train.take(row.train_images), row.validation, row.seed)[1]
    return images.at(positions, f"{HELD_OUT}:{row.validation:g}:seed{row.seed}")


def keep_row(
    row: Row, fitted: "Fitted", record: Record, folder: str | Path, made_from: dict[str, str] | None = None
) -> Path:
    """Write the record as one part with `card.json` beside it: settings, trained parameters, seconds, versions.

    `made_from` holds the digests of the rows it started from.
    """
    folder = Path(folder)
    compact(record, folder)
    if row.selector:
        from smoothbook.tables.selectors import keep_selector

        keep_selector(folder, record.path.parent)
    card = make_card(row, fitted, record) | ({"made_from": made_from} if made_from else {})
    _write_card(folder, card)
    return folder


def relabel(folder: str | Path, row: Row) -> None:
    """Give a kept row the name, title and note of another that is made like it."""
    known, card = read_card(folder)
    if not known.made_like(row):
        raise RowError(f"{Path(folder).name} is not made like {row.name}")
    _write_card(Path(folder), card | {"row": dataclasses.asdict(row)})


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def make_card(row: Row, fitted: "Fitted", record: Record) -> dict[str, Any]:
    """What a table wants to know of a row beside its votes; no paths or host names."""
    import torch

    kept = ("epoch", "step", "loss", "accuracy", "validation_loss", "validation_accuracy", "validation_clean_accuracy")
    last = fitted.rows[-1] if fitted.rows else {}
    card = {
        "row": dataclasses.asdict(row),
        "trained": fitted.trained.trained,
        "parameters": fitted.trained.total,
        "parts": fitted.trained.parts,
        "steps": fitted.steps,
        "seconds": round(fitted.seconds, 2),
        "threads": torch.get_num_threads(),
        "interrupted": fitted.interrupted,
        "end": {k: round(last[k], 5) for k in kept if k in last},
        "fingerprint": record.identity.fingerprint,
        "versions": {
            "python": platform.python_version(),
            **{m: _version(m) for m in ("torch", "timm", "peft", "numpy")},
        },
    }
    if hasattr(fitted.model, "queries"):
        card["queries"] = last.get("queries", fitted.model.queries)
    return card


def _version(distribution: str) -> str:
    from importlib.metadata import version

    return version(distribution).split("+")[0]


def finish(row: Row, model: "BaseClassifier") -> "BaseClassifier":
    """What is certified, and what other rows start from, once a row is trained."""
    from smoothkit.models.base import round_to_half

    if not row.keep:
        return model
    return round_to_half(model, model.adapter_state() if hasattr(model, "adapter_state") else None)


def save_classifier(row: Row, model: "BaseClassifier", folder: str | Path) -> Path:
    """Store a row's classifier beside its record: an adapter without its base, anything else in timm's layout."""
    from smoothkit.models import save_local

    folder = Path(folder) / CLASSIFIER
    return model.save(folder) if hasattr(model, "adapter_state") else save_local(model, folder)


def save_starter(row: Row, fitted: "Fitted", images: "Images", folder: str | Path) -> dict[str, Any]:
    """Write a row's classifier as a starter, in timm's layout with `card.json` beside it; returns the card.

    `images` are those it was trained on.
    """
    import torch

    from smoothkit.models import save_local
    from smoothkit.models.base import round_to_half

    fitted.model.class_names = tuple(images.class_names)
    folder = save_local(round_to_half(fitted.model), folder)
    config, last = json.loads((folder / "config.json").read_text()), fitted.rows[-1]
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
    _write_card(folder, card)
    return card


def contents_digest(images: "Images", sample: int = 200) -> str:
    """Of the pixels of every (N / sample)-th image: which data it was, whatever it is called."""
    text = "".join(images.digest(i) for i in range(0, len(images), max(1, len(images) // sample)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def load_classifier(rows: dict[str, Row], folder: str | Path, name: str) -> "BaseClassifier":
    """A row's trained classifier as it was stored, or the base of a row of method `clean`.

    Parameters
    ----------
    rows, folder
        As `open_table` gives them.
    name : str

    Raises
    ------
    RowError
        If it was not stored.
    """
    from smoothbook import adapters
    from smoothkit import models

    _check_one_of("row", name, list(rows))
    row, stored = rows[name], Path(folder) / name / CLASSIFIER
    if row.method == "clean":
        return load_base(rows, folder, row)
    if isinstance(row.keep, str):
        return models.load(row.keep)
    if not stored.is_dir():
        raise RowError(f"the classifier of {name} was not stored; set keep: true in its row and make it again")
    if row.method in WITHOUT_ADAPTER:
        return models.load(f"local-dir:{stored}")
    return adapters.load(stored, load_base(rows, folder, row))


def load_base(rows: dict[str, Row], folder: str | Path, row: Row) -> "BaseClassifier":
    """What a row is trained from."""
    return _base(row, lambda name: load_classifier(rows, folder, name))


def classifier_of(record: str | Path) -> "BaseClassifier | None":
    """The stored classifier behind the record of a kept row; None for a record that is no row of a table.

    Raises
    ------
    RowError
        If it was not stored.
    """
    path = Path(record).resolve()
    if not (path / CARD).is_file():
        return None
    for name in kept_tables():
        rows, folder = open_table(name)
        if folder.resolve() == path.parent:
            return load_classifier(rows, folder, path.name)
    return None
