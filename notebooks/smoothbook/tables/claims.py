"""The papers' claims as rows, each measured from committed records (or published logs) by code.

A claim holds (`yes`) if the measured interval lies wholly on the claimed side of its margin, fails (`no`) if wholly on
the other, and is `unclear` if it straddles. Comparisons of two rows stand in data/claims.yaml, with margins that were
fixed before the records were made.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from smoothbook.tables.published import cohen_tables
from smoothbook.tables.table import open_table, read_certificates
from smoothkit.certify import cascade_certificates, certificates
from smoothkit.data import data_dir
from smoothkit.reading import paired_difference_interval
from smoothkit.reading.intervals import _proportion_interval
from smoothkit.records import open_record

COLUMNS = ("system", "claim", "experiment", "data", "margin", "measured", "interval", "holds")
COHEN = "Gaussian smoothing (Cohen et al. 2019)"


class ClaimError(ValueError):
    """A claim that cannot be read; the message says which and what would do."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row: what a paper says, what was measured, and whether it holds here."""

    system: str
    claim: str
    experiment: str  # records it was measured from
    data: str
    margin: str
    measured: str
    interval: str
    holds: str  # yes, no, unclear, not measured


def claims(table: str | None = None) -> pd.DataFrame:
    """All claims that can be measured from what is at hand, one row each, columns as COLUMNS.

    With `table` only those of data/claims.yaml on that table (as `table.open_table` names it).
    """
    found = _all() if table is None else _of_file(table)
    return pd.DataFrame([dataclasses.asdict(c) for c in found], columns=list(COLUMNS))


def _all() -> Iterator[Claim]:
    yield from _cohen_on_digits()
    yield from _cohen_published()
    yield from _memory_on_digits()
    yield from _of_file()


def _of_file(table: str | None = None) -> Iterator[Claim]:
    yield from read_claims(data_dir() / "claims.yaml", table)


def read_claims(path: str | Path, table: str | None = None) -> Iterator[Claim]:
    """The claims of a YAML file laid out as data/claims.yaml, measured; with `table` those on that table only.

    Raises
    ------
    ClaimError
        For a file that is none, or a claim that lacks something; it names the claim.
    RowError, RecordError
        For a table, row or record that cannot be read.
    """
    path = Path(path)
    try:
        groups = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ClaimError(f"{path.name} is no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("claims"), list) for g in groups
    ):
        raise ClaimError(f"{path.name} must list groups, each with system, source and a list of claims")
    for group in groups:
        system = f"{group.get('system', 'no system')}, {group.get('source', 'no source')}"
        for claim in group["claims"]:
            _check_claim(path.name, claim)
            tables = {name: sigmas for name, sigmas in claim["tables"].items() if table in (None, name)}
            yield from _of_rows(system, claim | {"tables": tables})


def _check_claim(file: str, claim: Any) -> None:
    """Refuse a claim that does not say what is measured, where, and against what."""
    if not isinstance(claim, dict) or not isinstance(claim.get("claim"), str):
        raise ClaimError(f"{file}: a claim must map settings to values, `claim` (its words) among them; got {claim!r}")
    where = f"{file}, {claim['claim']!r}: "
    sides = [claim[kind] for kind in ("more", "alike", "least") if kind in claim]
    names = [sides[0]] if sides and isinstance(sides[0], str) else sides[0] if sides else None
    wanted = 1 if "least" in claim else 2
    if (
        len(sides) != 1
        or not isinstance(names, list)
        or len(names) != wanted
        or not all(isinstance(n, str) for n in names)
    ):
        raise ClaimError(f"{where}give one of more: [ROW, ROW], alike: [ROW, ROW] and least: ROW")
    tables = claim.get("tables")
    if not isinstance(tables, dict) or not all(isinstance(s, list) for s in tables.values()):
        raise ClaimError(f"{where}tables must map a table's name to a list of sigmas, got {tables!r}")
    values = {"radius": [claim.get("radius", 0.25)], "margin": [claim.get("margin", 0.0)]}
    for name, given in (values | {"sigma": [s for sigmas in tables.values() for s in sigmas]}).items():
        for value in given:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ClaimError(f"{where}{name} must be a finite number, got {value!r}")
    if values["radius"][0] < 0:
        raise ClaimError(f"{where}radius must be at least 0, got {values['radius'][0]}")


# --- rows of tables ----------------------------------------------------------------------------------


def _of_rows(system: str, claim: dict[str, Any]) -> Iterator[Claim]:
    """A claim of data/claims.yaml, once for each table and sigma."""
    radius, margin = claim.get("radius", 0.25), claim.get("margin", 0.0)
    names = claim.get("more") or claim.get("alike") or [claim["least"]]
    for table, sigmas in claim["tables"].items():
        rows, folder = open_table(table)
        for sigma in sigmas:
            filled = [name.replace("{sigma}", f"{sigma:.2f}") for name in names]
            words = f"{claim['claim']}, at radius {radius:g} (sigma {sigma:g})"
            experiment = f"{folder.name}: {' - '.join(filled)}"
            shown = f"within {margin:g}" if "alike" in claim else f"{margin:+g}"
            known = dict(system=system, claim=words, experiment=experiment, margin=shown)
            parts = [part for name in filled for part in _parts(name)[1]]
            unknown = [part for part in parts if part not in rows]
            if unknown or not parts:
                raise ClaimError(f"{claim['claim']!r}: {table} has no row {(unknown or filled)[0]!r}")
            missing = [part for part in parts if not (folder / part).is_dir()]
            data = rows[parts[0]].data
            if missing:
                yield Claim(**known, data=data, measured="no record yet", interval="", holds="not measured")
                continue
            sides = [_certified(_table(folder, name), radius) for name in filled]
            yield _decided(known, data, sides, margin, alike="alike" in claim)


def _parts(name: str) -> tuple[str, list[str]]:
    """The rule and the rows of one side: `RULE: ROW ROW ...` for several scales in one certificate, else one row."""
    rule, _, rest = name.rpartition(": ")
    return rule, rest.split()


def _table(folder: Path, name: str) -> pd.DataFrame:
    rule, parts = _parts(name)
    if rule:
        return cascade_certificates([open_record(folder / part) for part in parts], rule=rule)
    return next(iter(read_certificates(folder, names=parts).values()))


def _decided(known: dict[str, str], data: str, sides: list[pd.Series], margin: float, alike: bool = False) -> Claim:
    if len(sides) == 1:
        (alone,) = sides
        low, high = _proportion_interval(int(alone.sum()), len(alone))
        measured, interval, n = f"{alone.mean():.3f}", f"[{low:.3f}, {high:.3f}]", len(alone)
    else:
        low, high, measured, n = _paired(known["claim"], *sides)
        interval = f"difference [{low:+.3f}, {high:+.3f}]"
    holds = _within(low, high, margin) if alike else _side(low, high, margin)
    return Claim(**known, data=f"{data}, {n} images", measured=measured, interval=interval, holds=holds)


# --- Cohen et al. 2019 -------------------------------------------------------------------------------


def _cohen_on_digits() -> Iterator[Claim]:
    trained = {sigma: _record(f"digits-vit-{sigma:.2f}-sigma-{sigma:.2f}") for sigma in (0.12, 0.25, 0.5)}
    clean = _record("digits-vit-clean-sigma-0.25")
    fewer = _record("digits-vit-0.25-sigma-0.25", n=1_000)
    for claim, this, other, radius in (
        ("trained with noise, it certifies more than trained on clean images (sigma 0.25)", trained[0.25], clean, 0.25),
        ("a larger sigma certifies more at a large radius (0.25 against 0.12)", trained[0.25], trained[0.12], 0.3),
        ("a larger sigma certifies more at a large radius (0.5 against 0.25)", trained[0.5], trained[0.25], 0.75),
        ("a larger sigma costs accuracy at radius 0 (0.12 against 0.5)", trained[0.12], trained[0.5], 0.0),
        ("more samples certify larger radii (sigma 0.25, n = 10,000 against 1,000)", trained[0.25], fewer, 0.5),
    ):
        words = f"{claim}, at radius {radius:g}" if radius else claim
        known = dict(system=COHEN, claim=words, experiment="the records of the starters", margin="+0")
        yield _decided(known, "digits", [_certified(this, radius), _certified(other, radius)], 0.0)


def _cohen_published() -> Iterator[Claim]:
    root = os.environ.get("SMOOTHKIT_DATA")
    folder = Path(root) / "cohen2019-logs" if root else None
    cells = cohen_tables(folder) if folder and folder.is_dir() else pd.DataFrame()
    for dataset, sigma, radius, printed in (
        ("imagenet", 0.25, 0.5, 0.49),
        ("imagenet", 0.5, 1.0, 0.37),
        ("imagenet", 1.0, 2.0, 0.19),
        ("cifar10", 0.25, 0.25, 0.60),
        ("cifar10", 0.5, 1.0, 0.23),
    ):
        claim = f"certified accuracy {printed:.2f} at radius {radius:g} (sigma {sigma:g})"
        source = f"{dataset}, the published log"
        if cells.empty:
            yield Claim(
                COHEN,
                claim,
                source,
                source,
                "",
                "not at hand: SMOOTHKIT_DATA has no cohen2019-logs",
                "",
                "not measured",
            )
            continue
        cell = cells[(cells["dataset"] == dataset) & (cells["sigma"] == sigma) & (cells["radius"] == radius)].iloc[0]
        rows = int(cell["rows"])
        low, high = _proportion_interval(round(cell["measured"] * rows), rows)
        holds = "yes" if abs(cell["measured"] - printed) <= 0.005 + 1e-9 else "no"
        yield Claim(
            COHEN, claim, source, f"{dataset}, {rows} images", "as printed", f"{cell['measured']:.3f}",
            f"[{low:.3f}, {high:.3f}]", holds,
        )  # fmt: skip


# --- Alfarra et al. 2022 -----------------------------------------------------------------------------


def _memory_on_digits() -> Iterator[Claim]:
    """That certified balls of different labels never meet, so that a memory changes no answer."""
    from smoothbook.sigma.memory import Memory
    from smoothbook.sigma.reading import through_memory
    from smoothkit.data import load

    system = "Data-dependent smoothing (Alfarra et al. 2022), main text"
    _, folder = open_table("sigma")
    for name in ("gaussian-ds", "smoothadv-ds", "macer-ds"):
        claim = f"the memory changes no answer: no certified balls of different labels overlap ({name})"
        known = dict(system=system, claim=claim, experiment=f"{folder.name}: {name}", margin="none")
        if not (folder / name).is_dir():
            yield Claim(**known, data="digits", measured="no record yet", interval="", holds="not measured")
            continue
        (table,) = read_certificates(folder, names=[name]).values()
        images = load("digits")
        place = {image_id: i for i, image_id in enumerate(images.ids)}
        memory = Memory(model=name, shape=tuple(images[0].shape))
        asked = through_memory(memory, [images[place[i]] for i in table["image_id"]], table)
        changed, n = int(asked["case"].isin([2, 3, 4]).sum()), len(asked)
        low, high = _proportion_interval(changed, n)
        holds = "no" if changed else "yes"
        yield Claim(
            **known, data=f"digits, {n} images", measured=f"{changed} of {n}", interval=f"[{low:.3f}, {high:.3f}]", holds=holds
        )  # fmt: skip


# --- how rows are made -------------------------------------------------------------------------------


def _record(name: str, n: int | None = None) -> pd.DataFrame:
    return certificates(open_record(data_dir() / "records" / name), n=n)


def _certified(table: pd.DataFrame, radius: float) -> pd.Series:
    """Whether each image is certified at a radius, by image id."""
    return pd.Series((table["correct"] & (table["radius"] >= radius)).to_numpy(), index=table["image_id"])


def _paired(claim: str, this: pd.Series, other: pd.Series) -> tuple[float, float, str, int]:
    """Interval of the difference in the share of the same images, the shares in words, and how many images."""
    common = this.index.intersection(other.index)
    if len(common) < min(len(this), len(other)):
        raise ValueError(f"{claim}: the two records are of different images")
    this, other = this.loc[common], other.loc[common]
    gained, lost = int((this & ~other).sum()), int((other & ~this).sum())
    low, high = paired_difference_interval(gained, lost, len(common))
    return low, high, f"{this.mean():.3f} against {other.mean():.3f}", len(common)


def _side(low: float, high: float, margin: float) -> str:
    return "yes" if low > margin else "no" if high < margin else "unclear"


def _within(low: float, high: float, margin: float) -> str:
    return "yes" if -margin < low and high < margin else "no" if high < -margin or low > margin else "unclear"
