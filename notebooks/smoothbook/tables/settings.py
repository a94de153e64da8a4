"""A row of a table of experiments: its settings, read from data/rows/TABLE.yaml, and the card kept beside its votes."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from smoothbook.settings import check_fields, check_one_of, check_type, read_settings, read_yaml
from smoothkit.records import parse_json
from smoothkit.types import check_alpha, check_sigma

CARD = "card.json"
METHODS = Literal[
    "clean", "full", "head", "lora", "bottleneck", "prompts", "certifying", "ensemble", "coordinator", "denoiser"
]
WITHOUT_ADAPTER = ("clean", "full", "head", "denoiser")
LOSSES = Literal["gaussian", "smoothadv", "macer", "consistency", "stability"]
CLASSIFIER, STARTER = "classifier", "starter:"  # a folder beside a record, or one of the workbook's starters
HELD_OUT = "held-out"
OF_ROW, RANDOM = "row:", "random:"  # in front of a base: another row's classifier; an architecture with new weights
_SHOWN_ONLY = ("name", "title", "note")  # say nothing about how a row is made
_CERTIFYING = ("n0", "n", "alpha", "noise_seed", "images", "search", "selector")  # say nothing about how it is trained


class RowError(ValueError):
    """A table or row that cannot be read or made; the message names it and says what would do."""


@dataclass(frozen=True)
class Row:
    """One trained classifier of a table, and how it is certified."""

    name: str
    sigma: float  # of the certificate, pixel units, and of training unless `schedule` says otherwise
    title: str = ""
    note: str = ""
    # what is trained: nothing (clean), the whole base (full), its head, a denoiser in front of it, or an adapter
    method: METHODS = "full"
    base: str = "starter:digits-vit-clean"  # for models.load; row:NAME is another row's classifier, random: new weights
    model_args: dict = field(default_factory=dict)
    num_classes: int | None = None  # of a new head
    data: str = "digits"
    train_images: str = "all"  # by Images.take
    loss: LOSSES = "gaussian"
    loss_settings: dict = field(default_factory=dict)  # and those of its attack, as {attack: pgd, epsilon: 1}
    schedule: str = ""  # a line as training.schedules.parse reads it; clean is no noise
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
    # keyword arguments of the function in smoothbook.adapters; {members: {SIGMA: row:NAME}} of an ensemble, and
    # {encoder: MODEL} of a coordinator, among them
    adapter: dict = field(default_factory=dict)
    denoiser: dict = field(default_factory=dict)  # in front of the classifier, see `denoisers`
    steps: int | None = None  # of a coordinator, with `spsa`, in place of epochs and lr
    spsa: dict = field(default_factory=dict)
    n0: int = 100
    n: int = 1_000
    alpha: float = 0.001
    noise_seed: int = 0
    images: str = "all"  # to certify, by Images.take; "held-out" is the share `validation` that training leaves out
    # keep the classifier, rounded to half precision, beside its record, or as the starter "starter:NAME"
    keep: bool | str = False
    search: dict = field(default_factory=dict)  # for a sigma for each image, starting at `sigma`; see `selectors`
    selector: dict = field(default_factory=dict)  # chooses one of a few sigmas, made of searched ones; see `selectors`
    table: dict = field(default_factory=dict)  # trains each image at a sigma of its own; see `sigma.table`

    def __post_init__(self) -> None:
        check_fields(self)
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
        settings = {k: v for k, v in asdict(self).items() if k not in (*_SHOWN_ONLY, *_CERTIFYING, "keep")}
        settings["schedule"] = "" if self.method == "clean" else self.schedule or f"fixed:{self.sigma:g}"
        del settings["sigma"]
        if self.method == "clean":
            settings = {k: settings[k] for k in ("method", "base", "model_args", "num_classes", "denoiser")}
        settings["made_from"] = [(rows[name].training_digest(rows), bool(rows[name].keep)) for name in self.made_from]
        plain = {f.name: f.default for f in fields(self)} | {"model_args": {}, "table": {}, "denoiser": {}}
        settings = {k: v for k, v in settings.items() if k not in plain or v != plain[k]}  # new fields change no digest
        text = json.dumps(settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def made_like(self, other: "Row") -> bool:
        """Whether the other's record would be this one's: all settings agree but name, title and note."""
        mine, theirs = asdict(self), asdict(other)
        return all(mine[k] == theirs[k] for k in mine if k not in _SHOWN_ONLY)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is kept of a row beside its votes.

    Numbers of trained and of all parameters, trained ones by part of the network, steps and seconds of training, CPU
    threads, the end of its history, the fingerprint of what was certified, versions of packages; `queries` of a black
    box; `made_from` holds the digests of the rows it started from.
    """

    row: Row
    trained: int
    parameters: int
    parts: dict = field(default_factory=dict)
    steps: int
    seconds: float
    threads: int = 1
    interrupted: bool = False
    end: dict = field(default_factory=dict)
    fingerprint: str
    versions: dict = field(default_factory=dict)
    queries: int | None = None
    made_from: dict = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> "Card":
        """The card in the folder of a kept row.

        Raises
        ------
        RowError
            If it is missing or cannot be read.
        """
        folder = Path(folder)
        try:
            content = (folder / CARD).read_bytes()
            return read_settings(cls, parse_json(content, CARD, RowError), where=CARD)
        except FileNotFoundError:
            raise RowError(f"{folder.name}: no {CARD}; make the row again") from None
        except ValueError as error:
            raise RowError(f"{folder.name}: {CARD} cannot be read ({error}); make the row again") from None

    def write(self, folder: str | Path) -> None:
        """Write it into a folder; `queries` and `made_from` only where there are any."""
        known = {k: v for k, v in asdict(self).items() if k not in ("queries", "made_from") or v}
        (Path(folder) / CARD).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


# --- tables of rows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """What data/rows/TABLE.yaml may hold."""

    rows: list[dict]
    title: str = ""
    defaults: dict = field(default_factory=dict)
    variants: dict[str, dict] = field(default_factory=dict)


def load_rows(path: str | Path, variant: str | None = None, *, check: Callable[[Row], Any] | None = None) -> list[Row]:
    """The rows of a table from a YAML file.

    `defaults` holds settings for all rows and `rows` a list of settings. Where `sigma` or `seed` is a list, a row is
    made for each, named NAME-SIGMA and NAME-seedSEED, and `{sigma}` in a base's or a member's name becomes SIGMA.
    `variants` maps names to settings that go over all others, as those of a reduced run; `random: true` among them leaves
    all weights random, for a trial where none are at hand.

    Parameters
    ----------
    path : path
    variant : str, optional
    check : callable, optional
        Is called with each row and may refuse it, as `build.check_row`.

    Raises
    ------
    RowError
        For a misspelt key (the near one is named), a value that cannot be, or two rows of one name.
    """
    path, rows = Path(path), []
    try:
        content = _read_file(path)
        if variant is not None:
            check_one_of(f"{path.name}: variant", variant, content.variants)
        for number, settings in enumerate(content.rows, start=1):
            where = f"{path.name}, row {settings.get('name', number)}"
            merged = {**content.defaults, **settings, **content.variants.get(variant, {})}
            rows += _read_rows(merged, where, check or (lambda row: None))
    except ValueError as error:
        raise RowError(str(error)) from None
    _check_names(path.name, rows)
    return rows


def variants_of(path: str | Path) -> list[str]:
    """The names of the variants in a table's YAML file."""
    return list(_read_file(Path(path)).variants)


def _read_file(path: Path) -> _File:
    content = read_yaml(path)
    if isinstance(content, dict):  # a key with nothing behind it is as good as none
        content = {k: v for k, v in content.items() if v is not None}
    return read_settings(_File, content, where=path.name)


def _read_rows(settings: dict[str, Any], where: str, check: Callable[[Row], Any]) -> Iterator[Row]:
    check_type(f"{where}: name", str, settings.get("name"))
    if settings.pop("random", False):
        settings = _with_random_weights(settings)
    for one in _spread(settings, where):
        row = read_settings(Row, one, where=where)
        try:
            check(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        yield row


def _check_names(file: str, rows: list[Row]) -> None:
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RowError(f"{file} has two rows named {', '.join(twice)}")
    for number, row in enumerate(rows):
        if later := [name for name in row.made_from if name not in names[:number]]:
            raise RowError(f"{file}, row {row.name}: made from {', '.join(later)}, which is no row before it")


def _spread(settings: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """One mapping for each sigma and seed, where they are lists."""
    spread = [settings]
    for key, form, words in (("sigma", "{:.2f}", ""), ("seed", "seed{}", ", seed {}")):
        if isinstance(settings.get(key), list):
            values = check_type(f"{where}: {key}", list[Row.__dataclass_fields__[key].type], settings[key])
            title = check_type(f"{where}: title", str, settings.get("title", settings["name"]))
            spread = [
                _named(one, key, value, form.format(value), title + words.format(value))
                for one in spread
                for value in values
            ]
    return spread


def _named(settings: dict[str, Any], key: str, value: float, form: str, title: str) -> dict[str, Any]:
    if key == "sigma":
        settings = _filled(settings, form)
    return settings | {key: value, "name": f"{settings['name']}-{form}", "title": title}


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
