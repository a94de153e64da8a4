"""Rows of a table: one trained classifier each, described by a few settings, with its vote record and a card.

    data/rows/TABLE.yaml                     settings of all rows          load_rows
    data/records/rows/TABLE/ROW/             vote record and card.json     train_row, certify_row, keep_row
    a DataFrame, certificate tables          what a notebook shows         read_rows, format_rows, read_certificates
    differences between rows, intervals      how sure that is              compare, paired_bootstrap, wilson_interval

Reading needs neither torch nor the models; `data/make_rows.py` makes the rows that are not there yet.
"""

import copy
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from smoothkit.certify import certificates
from smoothkit.logs import round_down
from smoothkit.records import PER_IMAGE, Record, RecordError, compact, open_record
from smoothkit.report import average_certified_radius, certified_accuracy
from smoothkit.sigma.sound import read_sound
from smoothkit.types import check_alpha, check_keywords, check_sigma, check_type

if TYPE_CHECKING:
    from smoothkit.data import Images
    from smoothkit.models import BaseClassifier
    from smoothkit.training import Fitted

CARD = "card.json"
METHODS = (
    "clean", "full", "head", "lora", "bottleneck", "prompts", "certifying", "ensemble", "coordinator", "denoiser",
)  # fmt: skip
WITHOUT_ADAPTER = ("clean", "full", "head", "denoiser")
LOSSES = ("gaussian", "smoothadv", "macer", "consistency", "stability")
ATTACKS = ("pgd", "ddn")
RADII = (0.0, 0.25, 0.5, 0.75)
CLASSIFIER, STARTER = "classifier", "starter:"  # a folder beside a record, or one of the workbook's starters
_SHOWN_ONLY = ("name", "title", "note")  # say nothing about how a row is made
HELD_OUT = "held-out"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast where libyaml is there
OF_ROW, RANDOM = "row:", "random:"  # in front of a base: another row's classifier; an architecture with new weights
_OF_CARD = {"row": dict, "trained": int, "parameters": int, "steps": int, "seconds": float, "queries": int}
_CERTIFYING = ("n0", "n", "alpha", "noise_seed", "images", "search", "selector")  # say nothing about how it is trained


class RowError(ValueError):
    """A row that cannot be read; the message names the file, the row and what would do."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained classifier of a table, and how it is certified.

    `sigma` is the certificate's noise level, and that of training unless `schedule` says otherwise (see
    `training.schedules.parse`; `clean` is no noise). `base` is a name for `models.load`, with `model_args`; `random:`
    in front leaves its weights random, and `row:NAME` is the classifier of another row. `num_classes` puts a new head
    on it. `method` is what is trained: nothing (`clean`), the whole base (`full`), its head (`head`), or an adapter with
    the settings in `adapter`, the keyword arguments of the function of that name in `smoothkit.adapters`; an `ensemble`
    has `members: {SIGMA: row:NAME}` there. `images` are certified, `train_images` trained on, both by `Images.take`;
    `held-out` certifies the share `validation` of the training images that training leaves out.
    With `search` (see `sigma.settings.parse_search`) each image is certified at a sigma of its own, found from `sigma`; with
    `selector` beside it (`sigma.settings.SELECTORS`) at the one a sound selector chooses. A `table` of sigmas trains
    each image with its own (`sigma.table.SigmaTable`).
    `denoiser` puts a denoiser in front (settings as in `denoise.make`), which stays as it is while the classifier learns on
    denoised images; the method `denoiser` trains it in place of the classifier.
    A classifier to `keep` is rounded to half precision after training, and stored beside its record, or, where `keep`
    is `starter:NAME`, as that starter.
    `loss_settings` are those of the loss; its attack is `attack` (pgd or ddn) with `epsilon`,
    `steps`, `step_size`, `gamma`, `levels`. A coordinator takes `steps` and `spsa` in place of epochs and lr, and
    `adapter: {encoder: MODEL}`.
    """

    name: str
    sigma: float
    title: str = ""
    note: str = ""
    method: str = "full"
    base: str = "starter:digits-vit-clean"
    model_args: dict = dataclasses.field(default_factory=dict)
    num_classes: int | None = None
    data: str = "digits"
    train_images: str = "all"
    loss: str = "gaussian"
    loss_settings: dict = dataclasses.field(default_factory=dict)
    schedule: str = ""
    epochs: int = 40
    batch: int = 64
    lr: float = 1e-3
    optimiser: str = "adamw"
    weight_decay: float = 0.05
    warmup: float = 0.1
    layer_decay: float | None = None
    ema: float | None = None
    clip_norm: float | None = 1.0
    crop_and_flip: bool = False
    precision: str = "float32"
    validation: float = 0.1
    seed: int = 0
    adapter: dict = dataclasses.field(default_factory=dict)
    denoiser: dict = dataclasses.field(default_factory=dict)
    steps: int | None = None
    spsa: dict = dataclasses.field(default_factory=dict)
    n0: int = 100
    n: int = 1_000
    alpha: float = 0.001
    noise_seed: int = 0
    images: str = "all"
    keep: bool | str = False
    search: dict = dataclasses.field(default_factory=dict)
    selector: dict = dataclasses.field(default_factory=dict)
    table: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_type(field.name, field.type, getattr(self, field.name))
        object.__setattr__(self, "sigma", float(self.sigma))
        object.__setattr__(self, "title", self.title or self.name)
        if "members" in self.adapter:  # as a card's JSON has them
            check_type("members", dict, self.adapter["members"])
            members = {f"{float(sigma):g}": str(name) for sigma, name in self.adapter["members"].items()}
            object.__setattr__(self, "adapter", self.adapter | {"members": members})
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", self.name):
            raise RowError(
                f"name must be lower-case letters, digits, . - and _ (it becomes a folder), got {self.name!r}"
            )
        _check_one_of("method", self.method, METHODS)
        _check_one_of("loss", self.loss, LOSSES)
        check_sigma(self.sigma)
        check_alpha(self.alpha)
        if isinstance(self.keep, str) and (not self.keep.startswith(STARTER) or self.method not in WITHOUT_ADAPTER):
            raise RowError(f"keep must be true, false or, for a model trained whole, {STARTER}NAME, got {self.keep!r}")
        if self.method == "coordinator" and self.steps is None:
            raise RowError("a coordinator is trained by steps, not epochs; give steps: 500")
        if self.keep and self.denoiser:
            raise RowError("a row with a denoiser is not kept; leave keep out")
        if self.method == "denoiser" and not self.denoiser:
            raise RowError("the method denoiser needs a denoiser, as denoiser: {dncnn: {depth: 8}}")
        if self.adapter and self.method in WITHOUT_ADAPTER:
            raise RowError(f"adapter settings {sorted(self.adapter)} with method {self.method}, which has no adapter")
        if self.selector and not self.search:
            raise RowError("a selector is made of searched sigmas; give search: {steps: 100} or the like")

    @property
    def made_from(self) -> tuple[str, ...]:
        """Names of the rows whose classifiers this one starts from."""
        named = [self.base, *(self.adapter.get("members") or {}).values()]
        return tuple(name.removeprefix(OF_ROW) for name in named if str(name).startswith(OF_ROW))

    def training_digest(self, rows: "dict[str, Row] | None" = None) -> str:
        """Of all that training depends on: rows with the same one are the same trained classifier.

        `rows` holds, by name, the rows that this one is made from.
        """
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k not in (*_SHOWN_ONLY, *_CERTIFYING, "keep")}
        settings["schedule"] = "" if self.method == "clean" else self.schedule or f"fixed:{self.sigma:g}"
        del settings["sigma"]
        if self.method == "clean":
            settings = {k: settings[k] for k in ("method", "base", "model_args", "num_classes", "denoiser")}
        settings["made_from"] = [(rows[name].training_digest(rows), bool(rows[name].keep)) for name in self.made_from]
        plain = {f.name: f.default for f in dataclasses.fields(self)} | {"model_args": {}, "table": {}, "denoiser": {}}
        settings = {k: v for k, v in settings.items() if k not in plain or v != plain[k]}  # new fields change no digest
        text = json.dumps(settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def made_like(self, other: "Row") -> bool:
        """Whether the other's record would be this one's: all settings agree but name, title and note."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return all(mine[k] == theirs[k] for k in mine if k not in _SHOWN_ONLY)


# --- settings --------------------------------------------------------------------------------------


def load_rows(path: str | Path, variant: str | None = None) -> list[Row]:
    """The rows of a table from a YAML file.

    `defaults` holds settings for all rows and `rows` a list of settings. Where `sigma` or `seed` is a list, a row is
    made for each, named NAME-SIGMA and NAME-seedSEED, and `{sigma}` in a base's or a member's name becomes SIGMA.
    `variants` maps names to settings that go over all others, as those of a reduced run; `random: true` among them leaves
    all weights random, for a trial where none are at hand.

    Raises
    ------
    RowError
        For a misspelt key (the near one is named), a value that cannot be, or two rows of one name.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except yaml.YAMLError as error:
        raise RowError(f"{path.name} is no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise RowError(f"{path.name} must map `rows` to a list of rows (and may have `title` and `defaults`)")
    _check_keys(f"{path.name}: ", content, ("title", "defaults", "variants", "rows"))
    defaults, variants = content.get("defaults") or {}, content.get("variants") or {}
    for name, settings in (("defaults", defaults), ("variants", variants)):
        if not isinstance(settings, dict):
            raise RowError(f"{path.name}: {name} must map settings to values, got {settings!r}")
    if variant is not None:
        _check_one_of(f"{path.name}: variant", variant, list(variants))
        if not isinstance(variants[variant], dict):
            raise RowError(f"{path.name}: variant {variant} must map settings to values, got {variants[variant]!r}")
    rows = []
    for number, settings in enumerate(content["rows"], start=1):
        if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
            raise RowError(
                f"{path.name}: row {number} must map settings to values, `name` (a text) among them; got {settings!r}"
            )
        where = f"{path.name}, row {settings['name']}: "
        merged = {**defaults, **settings, **variants.get(variant, {})}
        if merged.pop("random", False):
            merged = _with_random_weights(merged)
        _check_keys(where, merged, [f.name for f in dataclasses.fields(Row)])
        if "sigma" not in merged:
            raise RowError(f"{where}sigma is missing; it is the noise level to certify at")
        try:
            rows += [_checked(Row(**one)) for one in _spread(merged)]
        except ValueError as error:
            raise RowError(f"{where}{error}") from None
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RowError(f"{path.name} has two rows named {', '.join(twice)}")
    for number, row in enumerate(rows):
        later = [name for name in row.made_from if name not in names[:number]]
        if later:
            raise RowError(f"{path.name}, row {row.name}: made from {', '.join(later)}, which is no row before it")
    return rows


def open_table(name: str) -> tuple[dict[str, Row], Path]:
    """The rows of one of the workbook's tables by name, and the folder with their records.

    `name` is that of a file in data/rows, with `:VARIANT` for one of its variants, as `cifar10-peft:reduced`.
    """
    from smoothkit.data import data_dir

    table, colon, variant = name.partition(":")
    known = sorted(path.stem for path in (data_dir() / "rows").glob("*.yaml"))
    _check_one_of("table", table, known)
    rows = load_rows(data_dir() / "rows" / f"{table}.yaml", variant if colon else None)
    return {row.name: row for row in rows}, data_dir() / "records" / "rows" / name.replace(":", "-")


def kept_tables() -> list[str]:
    """The tables, as `TABLE` or `TABLE:VARIANT`, of which the workbook holds records."""
    from smoothkit.data import data_dir

    found = []
    for path in sorted((data_dir() / "rows").glob("*.yaml")):
        variants = yaml.safe_load(path.read_text(encoding="utf-8")).get("variants") or {}
        found += [path.stem, *(f"{path.stem}:{variant}" for variant in variants)]
    return [name for name in found if (data_dir() / "records" / "rows" / name.replace(":", "-")).is_dir()]


def _spread(settings: dict[str, Any]) -> list[dict[str, Any]]:
    spread = [settings]
    for key, form, words in (("sigma", "{:.2f}", ""), ("seed", "seed{}", ", seed {}")):
        values = settings.get(key)
        if isinstance(values, list):
            for value in values:
                check_type(key, Row.__dataclass_fields__[key].type, value)
            check_type("title", str, settings.get("title", ""))
            spread = [
                {
                    **(_filled(one, form.format(value)) if key == "sigma" else one),
                    key: value,
                    "name": f"{one['name']}-{form.format(value)}",
                    "title": one.get("title", one["name"]) + words.format(value),
                }
                for one in spread
                for value in values
            ]
    return spread


def _filled(value: Any, sigma: str) -> Any:
    """`{sigma}` in every text replaced."""
    if isinstance(value, dict):
        return {k: _filled(v, sigma) for k, v in value.items()}
    return value.replace("{sigma}", sigma) if isinstance(value, str) else value


def _with_random_weights(settings: dict[str, Any]) -> dict[str, Any]:
    """The architecture of base and encoder in place of their weights; another row's classifier stays."""

    def random(name: Any) -> Any:  # what is no text is refused later
        return name if not isinstance(name, str) or name.startswith((OF_ROW, RANDOM)) else RANDOM + name

    adapter = settings.get("adapter")
    if isinstance(adapter, dict) and "encoder" in adapter:
        settings = {**settings, "adapter": {**adapter, "encoder": random(adapter["encoder"])}}
    return {**settings, "base": random(settings.get("base", Row.base))}


def _checked(row: Row) -> Row:
    """Build everything small that training would build, so that an error comes before anything runs."""
    from smoothkit import adapters
    from smoothkit.training import SPSA

    if row.method != "clean":
        _schedule(row)
        _loss(row)
    if row.denoiser:
        from smoothkit.denoise.make import check_settings

        check_settings(row.denoiser, trained=row.method == "denoiser")
    if row.search or row.selector:
        from smoothkit.sigma.settings import check_selector, parse_search

        parse_search(row.search)
        if row.selector:
            check_selector(row.selector)
    _check_keys("spsa: ", row.spsa, [f.name for f in dataclasses.fields(SPSA)])
    check_keywords("spsa", SPSA, row.spsa)
    SPSA(**row.spsa)
    if row.method not in WITHOUT_ADAPTER:
        function = getattr(adapters, row.method)
        known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        more = {"coordinator": ["encoder"], "ensemble": ["members"]}.get(row.method, [])
        _check_keys(f"adapter ({row.method}): ", row.adapter, [k for k in known if k != "seed"] + more)
        own = {k: v for k, v in row.adapter.items() if k not in more}
        check_keywords(f"adapter ({row.method})", function, own)
    return row


def _schedule(row: Row) -> Callable:
    from smoothkit.training import parse

    if not row.table:
        return parse(row.schedule or row.sigma)
    from smoothkit.sigma.settings import parse_table

    if row.schedule:
        raise RowError(f"a table of sigmas is a schedule; leave out schedule {row.schedule!r}")
    return parse_table(row.sigma, row.table)


def _loss(row: Row) -> Callable:
    from smoothkit import attacks
    from smoothkit.training import LOSSES as KNOWN

    settings, kind = dict(row.loss_settings), KNOWN[row.loss]
    known, where = [f.name for f in dataclasses.fields(kind)], f"loss_settings ({row.loss})"
    attack = settings.pop("attack", "pgd" if row.loss == "smoothadv" else None) if "attack" in known else None
    if attack is None:
        _check_keys(f"{where}: ", settings, known)
        check_keywords(where, kind, settings)
        return kind(**settings)
    _check_one_of("attack", attack, ATTACKS)
    make = {"pgd": attacks.PGD, "ddn": attacks.DDN}[attack]
    budget = [f.name for f in dataclasses.fields(make)]
    _check_keys(f"{where}: ", settings, [*known, *budget])
    if "epsilon" not in settings:
        raise RowError(f"{where}: an attack needs epsilon, its L2 radius in pixel units")
    of_attack = {k: settings.pop(k) for k in budget if k in settings}
    check_keywords(where, make, of_attack)
    check_keywords(where, kind, settings)
    return kind(attack=make(**of_attack), **settings)


def _check_keys(where: str, settings: dict, known: Sequence[str]) -> None:
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise RowError(f"{where}unknown key {key!r}; {hint}")


def _check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        raise RowError(f"{name} {value!r} is unknown; {hint}")


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
    from smoothkit import adapters

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
    from smoothkit import models
    from smoothkit.adapters.base import seeded

    if not name.startswith(RANDOM):
        return models.load(name, **model_args)
    with seeded(seed):
        return models.load(name.removeprefix(RANDOM), pretrained=False, **model_args)


def _behind_denoiser(
    row: Row, classifier: "BaseClassifier", image_shape: tuple[int, int, int] | None
) -> "BaseClassifier":
    from smoothkit.denoise import DenoisedClassifier
    from smoothkit.denoise.make import make_denoiser

    channels = 1 if image_shape is None else image_shape[0]
    denoiser = make_denoiser(row.denoiser, sigma=row.sigma, channels=channels, seed=row.seed)
    return DenoisedClassifier(denoiser, classifier).eval()


def _whole(row: Row, base: "BaseClassifier") -> "BaseClassifier":
    """A copy of the base, with a new head if asked for, of which nothing, all or the head is trained."""
    from smoothkit.adapters.base import prepare_head, seeded

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
    from smoothkit.adapters import trainable
    from smoothkit.training import SPSA, Fitted, crop_and_flip, fit, fit_gradient_free

    model = build(row, base, image_shape=tuple(images_train[0].shape), trained=trained)
    if device is not None:
        model.to(device)
    if not trainable(model).trained:
        return Fitted(model, [], trainable(model), 0, 0.0, False, None)
    if row.train_images != "all":
        images_train = images_train.take(row.train_images)
    shared = dict(
        schedule=_schedule(row), batch=row.batch, augment=crop_and_flip if row.crop_and_flip else None,
        validation=row.validation or None, seed=row.seed, out=out, resume=out is not None, progress=progress,
    )  # fmt: skip
    if row.method == "coordinator":
        return fit_gradient_free(
            model, images_train, steps=row.steps, spsa=SPSA(**row.spsa), on_report=on_epoch, **shared
        )
    copied = ("epochs", "lr", "optimiser", "weight_decay", "warmup", "layer_decay", "ema", "clip_norm", "precision")
    how = {name: getattr(row, name) for name in copied}
    if row.method == "denoiser":
        from smoothkit.denoise.make import train_denoiser

        del shared["schedule"]
        return train_denoiser(model, images_train, row.denoiser, on_epoch=on_epoch, **how, **shared)
    return fit(
        model, images_train, loss=_loss(row), description=f"training {row.name}", on_epoch=on_epoch, **how, **shared
    )


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
    from smoothkit.certify import Smoothed

    settings = dict(n0=row.n0, n=row.n, alpha=row.alpha, seed=row.noise_seed, progress=progress)
    if row.search:
        return _certify_searched(row, model, images, None if out is None else Path(out), train, **settings, **how)
    return Smoothed(model, row.sigma, **how).sample(images, out=out, **settings)


def _certify_searched(
    row: Row, model, images: "Images", out: Path | None, train: "Images | None", **settings
) -> Record:
    from smoothkit.sigma.settings import sample_searched, sample_selected

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
    from smoothkit.training.common import split_images

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
        from smoothkit.sigma.settings import keep_selector

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
    from smoothkit.models import round_to_half

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

    from smoothkit.models import round_to_half, save_local

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
    from smoothkit import adapters, models

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


# --- reading ---------------------------------------------------------------------------------------


def row_folders(folder: str | Path) -> list[Path]:
    """The folders of a table's rows, in the order of their names.

    Raises
    ------
    RowError
        If there is none.
    """
    folder = Path(folder)
    found = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
    if not found:
        raise RowError(f"{folder} holds no rows; make them with python data/make_rows.py {folder.name}")
    return found


def read_card(folder: str | Path) -> tuple[Row, dict[str, Any]]:
    """The settings and the card of a kept row.

    Raises
    ------
    RowError
        If it is missing or cannot be read.
    """
    path = Path(folder) / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        check_type("the card", dict, card)
        for name, kind in _OF_CARD.items():
            if name in card or name != "queries":
                check_type(name, kind, card[name])
        check_keywords("row", Row, card["row"])
        return Row(**card["row"]), card
    except FileNotFoundError:
        raise RowError(f"{path.parent.name}: no {CARD}; make the row again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(f"{path.parent.name}: {CARD} cannot be read ({error}); make the row again") from None


def read_rows(
    folder: str | Path, radii: Sequence[float] = RADII, *, order: Iterable[str] | None = None
) -> pd.DataFrame:
    """A table of all kept rows of a folder, from their records and cards.

    Parameters
    ----------
    folder : path
    radii : sequence of float
    order : iterable of str, optional
        Names of rows, as those of the settings: these alone and in this order, as far as they are there.

    Returns
    -------
    DataFrame
        name, title, method, sigma, trained, parameters, epochs (0 if not trained), seconds, queries (0 for white
        boxes), images; the certified accuracy at each radius in a column as "0.25"; ACR; and `problem`, empty or what is
        wrong with a row that could not be read. A row with a problem also warns.
    """
    paths = {path.name: path for path in row_folders(folder)}
    names = paths if order is None else [name for name in order if name in paths]
    table = pd.DataFrame([_read_row(paths[name], radii) for name in names])
    for problem in table.loc[table["problem"] != "", "problem"]:
        warnings.warn(problem, stacklevel=2)
    return table


def _read_row(path: Path, radii: Sequence[float]) -> dict[str, Any]:
    blank = {
        "name": path.name, "title": path.name, "method": "", "sigma": math.nan, "trained": 0, "parameters": 0, "epochs": 0,
        "seconds": math.nan, "queries": 0, "images": 0, **{f"{r:g}": math.nan for r in radii}, "ACR": math.nan, "problem": "",
    }  # fmt: skip
    try:
        row, card = read_card(path)
        known = {
            "title": row.title, "method": row.method, "sigma": row.sigma, "trained": card["trained"],
            "parameters": card["parameters"], "epochs": row.epochs if card["steps"] and row.steps is None else 0,
            "seconds": card["seconds"], "queries": card.get("queries", 0),
        }  # fmt: skip
        blank |= known
        table = _certificates(path, row, card)
    except (RowError, RecordError) as error:
        text = str(error).removeprefix(f"{path.name}: ").replace(str(path), path.name)
        return blank | {"problem": f"{path.name}: {text}"}
    shares = zip(radii, certified_accuracy(table, radii), strict=True)
    return blank | {
        "images": len(table), **{f"{r:g}": float(share) for r, share in shares}, "ACR": average_certified_radius(table)
    }  # fmt: skip


def _certificates(path: Path, row: Row, card: dict[str, Any]) -> pd.DataFrame:
    record = open_record(path)
    rule = record.stopping_rule
    stated = {
        "sigma": (record.sigma, PER_IMAGE if row.search else row.sigma), "n": (rule.n, row.n), "n0": (rule.n0, row.n0),
        "fingerprint": (record.identity.fingerprint, card["fingerprint"]),
    }  # fmt: skip
    odd = [
        f"{name} {mine} in the record, {card_says} in the card"
        for name, (mine, card_says) in stated.items()
        if mine != card_says
    ]
    if odd:
        raise RowError(f"record and card do not belong together: {'; '.join(odd)}; make the row again")
    return _table_of(path, row)


def _table_of(path: Path, row: Row) -> pd.DataFrame:
    """The certificates of a row's record, computed once as long as none of its files changes."""
    stats_of = {p.relative_to(path): p.stat() for p in path.rglob("*") if p.is_file()}
    files = tuple(sorted((str(name), found.st_mtime_ns, found.st_size) for name, found in stats_of.items()))
    return _computed(path, files, tuple(row.selector["sigmas"]) if row.selector else None).copy()


@functools.lru_cache(maxsize=1024)
def _computed(path: Path, files: tuple, sigmas: tuple[float, ...] | None) -> pd.DataFrame:
    return certificates(open_record(path)) if sigmas is None else read_sound(path, sigmas=sigmas)


def protocol(table: str, names: Iterable[str] | None = None) -> str:
    """How rows were trained and certified, for captions: data as the records name it, images, n, alpha, epochs.

    Parameters
    ----------
    table : str
        As in `open_table`; a variant is named, so that a reduced run cannot be taken for a full one.
    names : iterable of str, optional
        Of the rows that are shown; all kept ones if not given.
    """
    rows, folder = open_table(table)
    kept = [path.name for path in row_folders(folder)]
    chosen = [name for name in kept if names is None or name in set(names)]
    records, trained = [open_record(folder / name) for name in chosen], [rows[n] for n in chosen]
    data = {record.identity.dataset for record in records}
    images = [len(_table_of(record.path, row)) for record, row in zip(records, trained, strict=True)]
    epochs = [row.epochs for row in trained if row.method != "clean" and row.steps is None]
    variant = table.partition(":")[2]
    return ", ".join([
        *sorted(data), f"{_span(images)} test images", f"n = {_span([row.n for row in trained])}",
        f"alpha = {_span([row.alpha for row in trained])}", *([f"{_span(epochs)} epochs"] if epochs else []),
        *([f"{variant} run"] if variant else []),
    ])  # fmt: skip


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def read_certificates(
    folder: str | Path, *, sigma: float | None = None, names: Sequence[str] | None = None
) -> dict[str, pd.DataFrame]:
    """Certificate tables by the title of the row, ready for `plots.certified_accuracy_curve`.

    Parameters
    ----------
    folder : path
        Of the table.
    sigma : float, optional
        Only rows certified at it.
    names : sequence of str, optional
        Only these rows, in this order; all by name if not given.

    Raises
    ------
    RowError, RecordError
        For a row that cannot be read, two rows of one title, or none.
    """
    paths = {path.name: path for path in row_folders(folder)}
    for name in names or ():
        _check_one_of("row", name, list(paths))
    tables: dict[str, pd.DataFrame] = {}
    for name in paths if names is None else names:
        row, card = read_card(paths[name])
        if sigma is not None and row.sigma != sigma:
            continue
        if row.title in tables:
            raise RowError(f"two rows have the title {row.title!r}; give sigma= or names=")
        tables[row.title] = _certificates(paths[name], row, card)
    if not tables:
        raise RowError(f"{folder} has no row" + (f" at sigma {sigma:g}" if sigma is not None else ""))
    return tables


def format_rows(table: pd.DataFrame, radii: Sequence[float] = RADII, level: float = 0.95) -> pd.DataFrame:
    """A table of `read_rows` for reading: certified accuracy with its Wilson interval, ACR rounded down."""
    shown = table[["title", "sigma", "trained", "epochs", "seconds"]].rename(columns={"trained": "trained parameters"})
    shown["trained parameters"] = [f"{n:,}" for n in table["trained"]]
    shown["seconds"] = [f"{s:,.0f}" for s in table["seconds"].fillna(0)]
    if table["queries"].any():
        shown["queries"] = [f"{n:,}" for n in table["queries"]]
    for r in radii:
        shown[f"at {r:g}"] = [
            _with_interval(p, n, level) for p, n in zip(table[f"{r:g}"], table["images"], strict=True)
        ]
    shown["ACR"] = ["" if math.isnan(acr) else round_down(acr, 3) for acr in table["ACR"]]
    return shown


def _with_interval(share: float, images: int, level: float) -> str:
    if math.isnan(share):
        return "unreadable"
    low, high = wilson_interval(round(share * images), images, level)
    return f"{share:.3f} [{low:.3f}, {high:.3f}]"


# --- how sure --------------------------------------------------------------------------------------


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of a proportion over images drawn like these.

    References
    ----------
    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    check_alpha(1 - level)
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes must lie in 0..n with n at least 1, got {successes} of {n}")
    z = stats.norm.ppf((1 + level) / 2)
    p, spread = successes / n, z**2 / n
    middle = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def paired_bootstrap(
    table: pd.DataFrame,
    reference: pd.DataFrame,
    radii: Sequence[float] = RADII,
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Differences in certified accuracy and ACR between two classifiers on the same images, with percentile intervals.

    Images are drawn again with replacement, for both at once. The intervals are about the choice of images; they know
    nothing of training again with another seed.

    Returns
    -------
    DataFrame
        One row a radius ("0.25") and one for "ACR": what, difference (table minus reference), low, high.

    Raises
    ------
    ValueError
        If the two are not certificates of the same images.

    References
    ----------
    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, Chapter 13.
    """
    check_alpha(1 - level)
    if not len(table) or draws < 1 or seed < 0 or not all(math.isfinite(r) for r in radii):
        raise ValueError(
            f"a comparison needs images, finite radii, draws of at least 1 and a seed of at least 0, got {len(table)} images, "
            f"radii {list(radii)}, draws {draws} and seed {seed}"
        )
    mine, theirs = _per_image(table, radii), _per_image(reference, radii)
    if not mine.index.equals(theirs.index):
        raise ValueError("the two tables are not of the same images; a paired comparison needs that")
    apart = (mine - theirs).to_numpy(np.float64)  # [images, quantities]
    weights = np.random.default_rng(seed).multinomial(len(apart), np.full(len(apart), 1 / len(apart)), size=draws)
    means = weights @ apart / len(apart)  # [draws, quantities]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame({"what": mine.columns, "difference": apart.mean(axis=0), "low": low, "high": high})


def compare(tables: dict[str, pd.DataFrame], reference: str, radii: Sequence[float] = RADII, **how) -> pd.DataFrame:
    """`paired_bootstrap` of every table but one against that one; the column `row` says which.

    `verdict` is `above` or `below` where the interval leaves 0 on one side, else `not told apart`.
    """
    _check_one_of("reference", reference, list(tables))
    parts = [
        paired_bootstrap(table, tables[reference], radii, **how).assign(row=title)
        for title, table in tables.items()
        if title != reference
    ]
    frame = pd.concat(parts, ignore_index=True)[["row", "what", "difference", "low", "high"]]
    sides = np.select([frame["low"] > 0, frame["high"] < 0], ["above", "below"], "not told apart")
    return frame.assign(verdict=sides)


def _per_image(table: pd.DataFrame, radii: Sequence[float]) -> pd.DataFrame:
    right = table["correct"].to_numpy(bool)
    radius = np.where(right, table["radius"].to_numpy(np.float64), 0.0)
    columns = {f"{r:g}": right & (radius >= r) for r in radii} | {"ACR": radius}
    frame = pd.DataFrame(columns, index=pd.Index(table["image_id"].to_numpy())).astype(np.float64)
    if frame.index.has_duplicates:
        raise ValueError("a table has two rows for one image")
    return frame.sort_index()
