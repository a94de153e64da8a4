"""A row of a table of experiments, and its settings as read from data/rows/TABLE.yaml."""

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from smoothbook.settings import RowError, _check_keys, _check_one_of, check_keywords, check_type, read_yaml
from smoothkit.types import check_alpha, check_sigma

CARD = "card.json"
METHODS = (
    "clean", "full", "head", "lora", "bottleneck", "prompts", "certifying", "ensemble", "coordinator", "denoiser",
)  # fmt: skip
WITHOUT_ADAPTER = ("clean", "full", "head", "denoiser")
LOSSES = ("gaussian", "smoothadv", "macer", "consistency", "stability")
ATTACKS = ("pgd", "ddn")
CLASSIFIER, STARTER = "classifier", "starter:"  # a folder beside a record, or one of the workbook's starters
_SHOWN_ONLY = ("name", "title", "note")  # say nothing about how a row is made
HELD_OUT = "held-out"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast where libyaml is there
OF_ROW, RANDOM = "row:", "random:"  # in front of a base: another row's classifier; an architecture with new weights
_CERTIFYING = ("n0", "n", "alpha", "noise_seed", "images", "search", "selector")  # say nothing about how it is trained


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained classifier of a table, and how it is certified.

    `sigma` is the certificate's noise level, and that of training unless `schedule` says otherwise (see
    `training.schedules.parse`; `clean` is no noise). `base` is a name for `models.load`, with `model_args`; `random:`
    in front leaves its weights random, and `row:NAME` is the classifier of another row. `num_classes` puts a new head
    on it. `method` is what is trained: nothing (`clean`), the whole base (`full`), its head (`head`), or an adapter with
    the settings in `adapter`, the keyword arguments of the function of that name in `smoothbook.adapters`; an `ensemble`
    has `members: {SIGMA: row:NAME}` there. `images` are certified, `train_images` trained on, both by `Images.take`;
    `held-out` certifies the share `validation` of the training images that training leaves out.
    With `search` (see `selectors.parse_search`) each image is certified at a sigma of its own, found from `sigma`; with
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
    content = read_yaml(path, loader=_LOADER)
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
    from smoothbook import adapters
    from smoothbook.training import SPSA

    if row.method != "clean":
        _schedule(row)
        _loss(row)
    if row.denoiser:
        from smoothbook.tables.denoisers import check_settings

        check_settings(row.denoiser, trained=row.method == "denoiser")
    if row.search or row.selector:
        from smoothbook.tables.selectors import check_selector, parse_search

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
    from smoothbook.training import parse

    if not row.table:
        return parse(row.schedule or row.sigma)
    from smoothbook.tables.selectors import parse_table

    if row.schedule:
        raise RowError(f"a table of sigmas is a schedule; leave out schedule {row.schedule!r}")
    return parse_table(row.sigma, row.table)


def _loss(row: Row) -> Callable:
    from smoothbook.training import LOSSES as KNOWN
    from smoothbook.training import attacks

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
