"""Rows of a table: one trained classifier each, described by a few settings, with its vote record and a card.

    data/rows/TABLE.yaml                     settings of all rows          load_rows
    data/records/rows/TABLE/ROW/             vote record and card.json     train_row, certify_row, keep_row
    a DataFrame, certificate tables          what a notebook shows         read_rows, format_rows, read_certificates
    differences between rows, intervals      how sure that is              compare, paired_bootstrap, wilson_interval

Reading needs neither torch nor the models; `data/make_rows.py` makes the rows that are not there yet.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from smoothbook.settings import RowError, _check_one_of, check_keywords, check_type, read_yaml
from smoothbook.sigma.sound import read_sound
from smoothbook.tables.settings import CARD, Row, load_rows
from smoothkit.certify import certificates
from smoothkit.reading import average_certified_radius, certified_accuracy, wilson_interval
from smoothkit.reading.intervals import RADII
from smoothkit.records import PER_IMAGE, RecordError, open_record, parse_json
from smoothkit.types import round_down

_OF_CARD = {"row": dict, "trained": int, "parameters": int, "steps": int, "seconds": float, "queries": int}


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
        variants = dict(read_yaml(path)).get("variants") or {}
        found += [path.stem, *(f"{path.stem}:{variant}" for variant in variants)]
    return [name for name in found if (data_dir() / "records" / "rows" / name.replace(":", "-")).is_dir()]


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
        card = parse_json(path.read_bytes(), f"{path.parent.name}: {CARD}", RowError, "make the row again")
        for name, kind in _OF_CARD.items():
            if name in card or name != "queries":
                check_type(name, kind, card[name])
        check_keywords("row", Row, card["row"])
        return Row(**card["row"]), card
    except FileNotFoundError:
        raise RowError(f"{path.parent.name}: no {CARD}; make the row again") from None
    except RowError:
        raise
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
    """Certificate tables by the title of the row, ready for `figures.certified_accuracy_curve`.

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
