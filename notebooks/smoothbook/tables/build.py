"""The classifier of a row: built from its settings, or read back as it was stored. What is heavy about rows begins here."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from smoothbook import adapters
from smoothbook.adapters.base import prepare_head, seeded
from smoothbook.denoise import DenoisedClassifier
from smoothbook.settings import check_keywords, read_settings
from smoothbook.tables.denoisers import read_denoiser
from smoothbook.tables.selectors import read_search, read_selector, read_table
from smoothbook.tables.settings import CLASSIFIER, HELD_OUT, OF_ROW, RANDOM, WITHOUT_ADAPTER, Row, RowError
from smoothbook.training import LOSSES, SPSA, parse
from smoothbook.training.attacks import DDN, PGD
from smoothbook.training.images import split_images
from smoothkit import models
from smoothkit.data import Images
from smoothkit.models import BaseClassifier

ATTACKS = {"pgd": PGD, "ddn": DDN}
# what a row says of an adapter beyond the keyword arguments of its function
_MORE = {"coordinator": ("encoder",), "ensemble": ("members",)}


# --- settings ----------------------------------------------------------------------------------------


def check_row(row: Row) -> None:
    """Read all settings of a row that training and certifying will read, so that an error comes before anything runs.

    Raises
    ------
    ValueError
        Names the setting and what would do.
    """
    if row.method != "clean":
        schedule_of(row)
        loss_of(row)
    if row.denoiser:
        read_denoiser(row.denoiser, trained=row.method == "denoiser")
    if row.search:
        read_search(row.search)
    if row.selector:
        read_selector(row.selector)
    read_settings(SPSA, row.spsa, where="spsa")
    if row.method not in WITHOUT_ADAPTER:
        own = {k: v for k, v in row.adapter.items() if k not in _MORE.get(row.method, ())}
        leave_out = ("base", "box", "encoder", "members", "image_shape", "seed")
        check_keywords(f"adapter ({row.method})", getattr(adapters, row.method), own, leave_out=leave_out)


def schedule_of(row: Row) -> Callable:
    """The sigma that each image is trained with: a schedule, or a table of sigmas."""
    if not row.table:
        return parse(row.schedule or row.sigma)
    if row.schedule:
        raise RowError(f"a table of sigmas is a schedule; leave out schedule {row.schedule!r}")
    return read_table(row.sigma, row.table)


def loss_of(row: Row) -> Callable:
    """The loss of a row, with its attack."""
    settings = {"attack": "pgd"} | row.loss_settings if row.loss == "smoothadv" else row.loss_settings
    where = f"loss_settings ({row.loss})"
    return read_settings(LOSSES[row.loss], settings, where=where, parts={"attack": ATTACKS})


# --- building ----------------------------------------------------------------------------------------


def build(
    row: Row,
    base: BaseClassifier | None = None,
    *,
    image_shape: tuple[int, int, int] | None = None,
    trained: Callable[[str], BaseClassifier] | None = None,
) -> BaseClassifier:
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
        classifier = build(plain, base, image_shape=image_shape, trained=trained)
        channels = 1 if image_shape is None else image_shape[0]
        denoiser = read_denoiser(row.denoiser, trained=row.method == "denoiser").make(row.sigma, channels, row.seed)
        return DenoisedClassifier(denoiser, classifier).eval()
    if row.method == "ensemble":
        members = {float(s): trained(name.removeprefix(OF_ROW)) for s, name in row.adapter["members"].items()}
        return adapters.ensemble(members, seed=row.seed, design=row.adapter.get("design", "logits"))
    base = base_of(row, trained) if base is None else base
    if row.method in WITHOUT_ADAPTER:
        return _whole(row, base)
    settings = {"seed": row.seed, **row.adapter}
    if row.num_classes is not None:
        settings |= {"num_classes": row.num_classes, "class_names": ()}
    if row.method != "coordinator":
        return getattr(adapters, row.method)(base, **settings)
    encoder = settings.pop("encoder", None)
    encoder = _load(encoder, row.seed) if isinstance(encoder, str) else encoder or base
    return adapters.coordinator(base, encoder, image_shape=image_shape, **settings)


def base_of(row: Row, trained: Callable[[str], BaseClassifier] | None = None) -> BaseClassifier:
    """What a row is trained from; `trained` gives the classifiers of other rows."""
    if row.base.startswith(OF_ROW):
        if trained is None:
            raise RowError(
                f"{row.name} is made from the {row.base.replace(':', ' ')}; give base=table[{row.name!r}].base(), or trained="
            )
        return trained(row.base.removeprefix(OF_ROW))
    return _load(row.base, row.seed, row.model_args)


def _load(name: str, seed: int, model_args: Mapping | None = None) -> BaseClassifier:
    if not name.startswith(RANDOM):
        return models.load(name, **(model_args or {}))
    with seeded(seed):
        return models.load(name.removeprefix(RANDOM), pretrained=False, **(model_args or {}))


def _whole(row: Row, base: BaseClassifier) -> BaseClassifier:
    """A copy of the base, with a new head if asked for, of which nothing, all or the head is trained."""
    model = copy.deepcopy(base).requires_grad_(False)
    if row.num_classes is not None or row.method == "head":
        with seeded(row.seed):
            prepare_head(model.network, "trained", row.num_classes)
        model.class_names = model.class_names if row.num_classes is None else ()
    if row.method != "head":
        model.requires_grad_(row.method == "full")
    return model.eval()


def certified_images(row: Row, train: Images, test: Images) -> Images:
    """Those a row is certified on: of the test split, or the ones its training holds out."""
    if row.images != HELD_OUT:
        return test.take(row.images)
    images, positions = split_images(train.take(row.train_images), row.validation, row.seed)[1]
    return images.at(positions, f"{HELD_OUT}:{row.validation:g}:seed{row.seed}")


# --- what was stored ---------------------------------------------------------------------------------


def load_classifier(row: Row, rows: Mapping[str, Row], folder: str | Path) -> BaseClassifier:
    """A row's trained classifier as it was stored, or the base of a row of method `clean`.

    Parameters
    ----------
    row : Row
    rows : mapping
        All rows of its table by name, among them those it is made from.
    folder : path
        Of the table's records.

    Raises
    ------
    RowError
        If it was not stored.
    """
    stored = Path(folder) / row.name / CLASSIFIER
    if row.method == "clean":
        return load_base(row, rows, folder)
    if isinstance(row.keep, str):
        return models.load(row.keep)
    if not stored.is_dir():
        raise RowError(f"the classifier of {row.name} was not stored; set keep: true in its row and make it again")
    if row.method in WITHOUT_ADAPTER:
        return models.load(f"local-dir:{stored}")
    return adapters.load(stored, load_base(row, rows, folder))


def load_base(row: Row, rows: Mapping[str, Row], folder: str | Path) -> BaseClassifier:
    """What a row is trained from; arguments as in `load_classifier`."""
    return base_of(row, lambda name: load_classifier(rows[name], rows, folder))
