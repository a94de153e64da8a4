"""A table of experiments: its rows, and the votes and cards of those that are made.

    data/rows/TABLE.yaml                     settings of all rows
    data/records/rows/TABLE/ROW/             vote record and card.json

Reading needs neither torch nor the models; `python data/make_rows.py TABLE` makes the rows that are not there yet.
"""

import functools
import html
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from smoothbook.settings import check_one_of
from smoothbook.sigma.sound import read_sound
from smoothbook.tables.settings import CARD, Card, Row, RowError, load_rows, variants_of
from smoothkit.certify import certificates
from smoothkit.reading import average_certified_radius, certified_accuracy, wilson_interval
from smoothkit.reading import compare as compare_tables
from smoothkit.reading.intervals import RADII
from smoothkit.records import PER_IMAGE, Record, RecordError, open_record
from smoothkit.types import round_down

if TYPE_CHECKING:
    from smoothkit.models import BaseClassifier

Names = Iterable[str] | None


def data_folder() -> Path:
    """The workbook's own `data`."""
    from smoothkit.data import data_dir  # brings torch, which importing this module must not

    return data_dir()


def open(name: str, *, data: str | Path | None = None, check: Callable[[Row], Any] | None = None) -> "Table":
    """One of the workbook's tables by name.

    Parameters
    ----------
    name : str
        A file in data/rows, with `:VARIANT` for one of its variants, as `cifar10-peft:reduced`.
    data : path, optional
        A folder laid out as the workbook's `data`, which is taken by default.
    check : callable, optional
        Is called with each row and may refuse it, as `build.check_row`.

    Raises
    ------
    RowError
        If there is no such table, or its settings cannot be read.
    """
    data = data_folder() if data is None else Path(data)
    table, colon, variant = name.partition(":")
    check_one_of("table", table, sorted(path.stem for path in (data / "rows").glob("*.yaml")), error=RowError)
    rows = load_rows(data / "rows" / f"{table}.yaml", variant if colon else None, check=check)
    return Table(name, rows, data / "records" / "rows" / name.replace(":", "-"))


def kept() -> list[str]:
    """The tables, as `TABLE` or `TABLE:VARIANT`, of which the workbook holds records."""
    files = sorted((data_folder() / "rows").glob("*.yaml"))
    names = [name for path in files for name in (path.stem, *(f"{path.stem}:{v}" for v in variants_of(path)))]
    return [name for name in names if (data_folder() / "records" / "rows" / name.replace(":", "-")).is_dir()]


def classifier_of(record: str | Path) -> "BaseClassifier | None":
    """The classifier behind the record of a kept row, None for a record that is none; RowError if it was not stored."""
    path = Path(record).resolve()
    if (path / CARD).is_file():
        for name in kept():
            if (table := open(name)).folder.resolve() == path.parent:
                return table[path.name].classifier()
    return None


class TableRow:
    """One row of a table: its settings (`row`), and what was made of it.

    `card`, `record` and `certificates` raise RowError where the row is not made yet or cannot be read.
    """

    def __init__(self, table: "Table", row: Row) -> None:
        self.table, self.row, self.folder = table, row, table.folder / row.name

    @property
    def state(self) -> str:
        """`missing`, `kept`, or `changed`: made from other settings, its own or those of a row it is made from."""
        if not (self.folder / "run.json").is_file() and not (self.folder / CARD).is_file():
            return "missing"
        try:
            card = Card.read(self.folder)
        except RowError:
            return "changed"
        return "kept" if card.row.made_like(self.row) and card.made_from == self.origins else "changed"

    @property
    def origins(self) -> dict[str, str]:
        """The rows that this one is made from, with the digests of their settings."""
        rows = self.table.rows
        return {name: rows[name].training_digest(rows) for name in self.row.made_from}

    @property
    def made(self) -> bool:
        """Whether there is something to read."""
        return self.folder.is_dir()

    @property
    def card(self) -> Card:
        """What is kept of its training; `card.row` has the settings it was made with."""
        self._check_made()
        return Card.read(self.folder)

    @property
    def record(self) -> Record:
        """Its votes."""
        self._check_made()
        return open_record(self.folder)

    @property
    def certificates(self) -> pd.DataFrame:
        """A row an image, as `certify.certificates` of its record; of a row with a selector, by the min rule of `sigma.sound`."""
        card, record = self.card, self.record
        rule, row = record.stopping_rule, card.row
        stated = {
            "sigma": (record.sigma, PER_IMAGE if row.search else row.sigma), "n": (rule.n, row.n), "n0": (rule.n0, row.n0),
            "fingerprint": (record.identity.fingerprint, card.fingerprint),
        }  # fmt: skip
        odd = [
            f"{name} {mine} in the record, {said} in the card" for name, (mine, said) in stated.items() if mine != said
        ]
        if odd:
            raise RowError(f"{row.name}: record and card do not belong together: {'; '.join(odd)}; make the row again")
        files = {p.relative_to(self.folder): p.stat() for p in self.folder.rglob("*") if p.is_file()}
        stamps = tuple(sorted((str(name), found.st_mtime_ns, found.st_size) for name, found in files.items()))
        return _computed(self.folder, stamps, tuple(row.selector["sigmas"]) if row.selector else None).copy()

    def classifier(self) -> "BaseClassifier":
        """Its trained classifier as stored, or the base of a row of method `clean`; RowError if it was not stored."""
        from smoothbook.tables.build import load_classifier  # brings torch, which reading does without

        return load_classifier(self.row, self.table.rows, self.table.folder)

    def base(self) -> "BaseClassifier":
        """What it is trained from."""
        from smoothbook.tables.build import load_base  # as above

        return load_base(self.row, self.table.rows, self.table.folder)

    def _check_made(self) -> None:
        if not self.made:
            raise RowError(f"{self.row.name} is not made yet: {self.table.command} --only {self.row.name}")

    def __repr__(self) -> str:
        return f"<{self.row.name} of {self.table.name}: {self.row.title}, sigma {self.row.sigma:g}, {self.state}>"


@functools.lru_cache(maxsize=1024)
def _computed(folder: Path, stamps: tuple, sigmas: tuple[float, ...] | None) -> pd.DataFrame:
    """Certificates of a row, computed once as long as none of its files changes (`stamps`)."""
    return certificates(open_record(folder)) if sigmas is None else read_sound(folder, sigmas=sigmas)


class Table(Mapping[str, TableRow]):
    """A table of experiments: a mapping from the names of its rows, made or not, in the order of their settings.

    Where a method takes them, `names` are those of rows, in this order (all by default), of which the ones that are not
    made are left out; with `sigma` only rows certified at it count, and with `shared` only images that all of them have.
    Each raises RowError for an unknown name and where no row is left, RecordError for votes that cannot be read.

    Parameters
    ----------
    name : str
        As `open` takes it.
    rows : iterable of Row
    folder : path
        Of the rows that are made; it need not exist.

    Examples
    --------
    >>> table = tables.open("peft")
    >>> table["lora-16-0.25"].certificates
    >>> table.frame(radii=[0.0, 0.25])
    >>> table.compare("full-0.25", radii=[0.0, 0.25])
    """

    def __init__(self, name: str, rows: Iterable[Row], folder: str | Path) -> None:
        self.name, self.folder = name, Path(folder)
        self.rows: dict[str, Row] = {row.name: row for row in rows}

    def __getitem__(self, name: str) -> TableRow:
        check_one_of("row", name, self.rows, error=RowError)
        return TableRow(self, self.rows[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    @property
    def command(self) -> str:
        """What makes the rows that are missing."""
        return f"python data/make_rows.py {self.name.replace(':', ' --variant ')}"

    @property
    def made(self) -> list[str]:
        """Names of the rows that are made."""
        return [name for name in self if self[name].made]

    def missing(self) -> list[str]:
        """Names of the rows that are not made yet."""
        return [name for name in self if not self[name].made]

    def certificates(
        self, names: Names = None, *, sigma: float | None = None, shared: bool = False
    ) -> dict[str, pd.DataFrame]:
        """Certificate tables by the title of the row, ready for `figures.certified_accuracy_curve`.

        RowError also says that a row cannot be read, or that two have one title.
        """
        rows = self._chosen(names, sigma)
        titles = [row.card.row.title for row in rows]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise RowError(f"two rows have the title {twice[0]!r}; give sigma= or names=")
        common = _common(rows) if shared else None
        return {title: _among(row.certificates, common) for title, row in zip(titles, rows, strict=True)}

    def frame(
        self, radii: Sequence[float] = RADII, names: Names = None, *, sigma: float | None = None, shared: bool = False
    ) -> pd.DataFrame:
        """A line for each row: certified accuracy at L2 radii (pixel units), and what its training took.

        Returns
        -------
        DataFrame
            name, title, method, sigma, trained, parameters, epochs (0 if not trained), seconds, queries (0 for white
            boxes), images; the certified accuracy at each radius in a column as "0.25"; ACR; and `problem`, empty or what
            is wrong with a row that could not be read. A row with a problem also warns.
        """
        rows = self._chosen(names, sigma)
        common = _common(rows) if shared else None
        table = pd.DataFrame([_line(row, radii, common) for row in rows])
        for problem in table.loc[table["problem"] != "", "problem"]:
            warnings.warn(problem, stacklevel=2)
        return table

    def format(
        self, radii: Sequence[float] = RADII, names: Names = None, *,
        sigma: float | None = None, shared: bool = False, level: float = 0.95,
    ) -> pd.DataFrame:  # fmt: skip
        """`frame` for reading: certified accuracy with its Wilson interval at `level`, ACR rounded down."""
        frame = self.frame(radii, names, sigma=sigma, shared=shared)
        trained, seconds = [f"{n:,}" for n in frame["trained"]], [f"{s:,.0f}" for s in frame["seconds"].fillna(0)]
        shown = frame[["title", "sigma"]].assign(
            **{"trained parameters": trained}, epochs=frame["epochs"], seconds=seconds
        )
        if frame["queries"].any():
            shown["queries"] = [f"{n:,}" for n in frame["queries"]]
        for r in radii:
            shares = zip(frame[f"{r:g}"], frame["images"], strict=True)
            shown[f"at {r:g}"] = [_with_interval(share, images, level) for share, images in shares]
        shown["ACR"] = ["" if math.isnan(acr) else round_down(acr, 3) for acr in frame["ACR"]]
        return shown

    def compare(
        self, reference: str, radii: Sequence[float] = RADII, names: Names = None, *, shared: bool = False, level: float = 0.95
    ) -> pd.DataFrame:  # fmt: skip
        """Differences of rows (all of its sigma by default) to the row `reference`, with paired bootstrap intervals.

        Returns
        -------
        DataFrame
            As `reading.compare`: row (the title), what (a radius as "0.25", or "ACR"), difference, low, high, verdict.

        Raises
        ------
        ValueError
            If the rows are not of the same images, unless `shared`.
        """
        sigma = self[reference].row.sigma
        asked = [name for name in self if self.rows[name].sigma == sigma] if names is None else names
        curves = self.certificates(dict.fromkeys([*asked, reference]), shared=shared)
        return compare_tables(curves, self[reference].card.row.title, radii, level=level)

    def protocol(self, names: Names = None) -> str:
        """How rows were trained and certified, for captions: data as the records name it, images, n, alpha, epochs.

        A variant is named, so that a reduced run cannot be taken for a full one.
        """
        chosen = self._chosen(names)
        rows, data = [row.row for row in chosen], {row.record.identity.dataset for row in chosen}
        epochs = [row.epochs for row in rows if row.method != "clean" and row.steps is None]
        variant = self.name.partition(":")[2]
        return ", ".join([
            *sorted(data), f"{_span([len(row.certificates) for row in chosen])} test images",
            f"n = {_span([row.n for row in rows])}", f"alpha = {_span([row.alpha for row in rows])}",
            *([f"{_span(epochs)} epochs"] if epochs else []), *([f"{variant} run"] if variant else []),
        ])  # fmt: skip

    def _chosen(self, names: Names, sigma: float | None = None) -> list[TableRow]:
        """The rows that are made, among those asked for."""
        if not self.made:
            raise RowError(f"{self.folder} holds no rows; make them with {self.command}")
        asked = [self[name] for name in (self if names is None else names)]
        found = [row for row in asked if row.made and sigma in (None, row.row.sigma)]
        if not found:
            at = "" if sigma is None else f" at sigma {sigma:g}"
            raise RowError(f"{self.name} has no row{at} that is made, among {', '.join(r.row.name for r in asked)}")
        return found

    def __repr__(self) -> str:
        said = f"{self.name}: {len(self.made)} of {len(self)} rows are made"
        return said + (f"; {self.command} makes {', '.join(missing)}" if (missing := self.missing()) else "")

    def _repr_html_(self) -> str:
        """What the table is, and what is missing."""
        name, command, missing = (html.escape(s) for s in (self.name, self.command, ", ".join(self.missing())))
        about = f"<p><b>{name}</b>: {len(self.made)} of {len(self)} rows are made"
        about += f" ({html.escape(self.protocol())})</p>" if self.made else "</p>"
        return about + (f"<p>not made yet (<code>{command}</code>): {missing}</p>" if missing else "")


def _common(rows: Iterable[TableRow]) -> set[int]:
    """Ids of the images that all rows have."""
    return set.intersection(*(set(row.certificates["image_id"]) for row in rows))


def _among(table: pd.DataFrame, images: set[int] | None) -> pd.DataFrame:
    return table if images is None else table[table["image_id"].isin(images)]


def _line(row: TableRow, radii: Sequence[float], images: set[int] | None) -> dict[str, Any]:
    name, counts = row.row.name, dict.fromkeys(("trained", "parameters", "epochs"), 0)
    line = {"name": name, "title": name, "method": "", "sigma": math.nan, **counts, "seconds": math.nan, "queries": 0}
    line |= {"images": 0, **{f"{r:g}": math.nan for r in radii}, "ACR": math.nan, "problem": ""}
    try:
        card = row.card
        line |= {what: getattr(card.row, what) for what in ("title", "method", "sigma")}
        line |= {what: getattr(card, what) for what in ("trained", "parameters", "seconds")}
        line |= {
            "epochs": card.row.epochs if card.steps and card.row.steps is None else 0,
            "queries": card.queries or 0,
        }
        table = _among(row.certificates, images)
    except (RowError, RecordError) as error:
        text = str(error).removeprefix(f"{name}: ").replace(str(row.folder), name)
        return line | {"problem": f"{name}: {text}"}
    shares = {f"{r:g}": float(share) for r, share in zip(radii, certified_accuracy(table, radii), strict=True)}
    return line | {"images": len(table), **shares, "ACR": average_certified_radius(table)}


def _with_interval(share: float, images: int, level: float) -> str:
    if math.isnan(share):
        return "unreadable"
    low, high = wilson_interval(round(share * images), images, level)
    return f"{share:.3f} [{low:.3f}, {high:.3f}]"


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
