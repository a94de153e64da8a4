"""The papers' claims as rows, each measured from committed records (or published logs) by code.

A claim holds (`yes`) if the measured interval lies wholly on the claimed side of its margin, fails (`no`) if wholly on
the other, and is `unclear` if it straddles. Comparisons of two rows stand in data/claims.yaml, with margins that were
fixed before the records were made.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from smoothbook.settings import read_settings, read_yaml
from smoothbook.tables.published import cohen_tables
from smoothbook.tables.table import Table, data_folder, open
from smoothkit.certify import cascade_certificates, certificates
from smoothkit.reading import paired_difference_interval
from smoothkit.reading.intervals import exact_interval
from smoothkit.records import open_record

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
    measured: str = "no record yet"
    interval: str = ""
    holds: str = "not measured"  # or yes, no, unclear


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A claim of data/claims.yaml on rows of `tables`, each with its sigmas, which stand for {sigma} in the rows' names.

    One of `more`: a row and the one it must exceed in certified accuracy at `radius` by more than `margin`; `alike`: two
    rows that must differ by less than `margin`; `least`: a row that must reach `margin`. `RULE: ROW ROW ...` in place of a
    row is several scales in one certificate.
    """

    claim: str
    tables: dict[str, list[float]]
    more: list[str] | None = None
    alike: list[str] | None = None
    least: str | None = None
    radius: float = 0.25
    margin: float = 0.0

    def __post_init__(self) -> None:
        given = [side for side in (self.more, self.alike, self.least and [self.least]) if side is not None]
        if len(given) != 1 or len(self.sides) != (1 if self.least else 2):
            raise ClaimError("give one of more: [ROW, ROW], alike: [ROW, ROW] and least: ROW")
        if self.radius < 0:
            raise ClaimError(f"radius must be at least 0, got {self.radius}")

    @property
    def sides(self) -> list[str]:
        """The rows that are compared, or the one that stands alone."""
        return self.more or self.alike or [self.least]


@dataclasses.dataclass(frozen=True)
class _Group:
    claims: list[dict]
    system: str = "no system"
    source: str = "no source"


def claims(table: str | None = None) -> pd.DataFrame:
    """All claims that can be measured from what is at hand, one row each, columns as the fields of Claim.

    With `table` only those of data/claims.yaml on that table (as `tables.open` names it).
    """
    found = list(read_claims(data_folder() / "claims.yaml", table))
    if table is None:
        found = [*_cohen_on_digits(), *_cohen_published(), *_memory_on_digits(), *found]
    return pd.DataFrame(found, columns=[f.name for f in dataclasses.fields(Claim)])


def read_claims(path: str | Path, table: str | None = None) -> Iterator[Claim]:
    """The claims of a YAML file laid out as data/claims.yaml, measured; with `table` those on that table only.

    Raises
    ------
    ClaimError
        For a file that is none, or a claim that lacks something; it names the claim.
    RowError, RecordError
        For a table, row or record that cannot be read.
    """
    for system, comparison in _read_comparisons(Path(path)):
        for name, sigmas in comparison.tables.items():
            if table in (None, name):
                opened = open(name)
                yield from (_compared(system, comparison, opened, sigma) for sigma in sigmas)


def _read_comparisons(path: Path) -> list[tuple[str, Comparison]]:
    try:
        groups = read_yaml(path)
        if not isinstance(groups, list):
            raise ClaimError(f"{path.name} must list groups, each with system, source and a list of claims")
        groups = [read_settings(_Group, group, where=path.name) for group in groups]
        return [
            (f"{g.system}, {g.source}", read_settings(Comparison, c, where=f"{path.name}, {c.get('claim')!r}"))
            for g in groups
            for c in g.claims
        ]
    except ValueError as error:
        raise ClaimError(str(error)) from None


# --- rows of tables ----------------------------------------------------------------------------------


def _compared(system: str, comparison: Comparison, table: Table, sigma: float) -> Claim:
    """A claim of data/claims.yaml in one table at one sigma."""
    names = [name.replace("{sigma}", f"{sigma:.2f}") for name in comparison.sides]
    margin = f"within {comparison.margin:g}" if comparison.alike else f"{comparison.margin:+g}"
    parts = [part for name in names for part in _parts(name)[1]]
    unknown = [part for part in parts if part not in table]
    if unknown or not parts:
        raise ClaimError(f"{comparison.claim!r}: {table.name} has no row {(unknown or names)[0]!r}")
    words = f"{comparison.claim}, at radius {comparison.radius:g} (sigma {sigma:g})"
    experiment = f"{table.folder.name}: {' - '.join(names)}"
    open_claim = Claim(system, words, experiment, table.rows[parts[0]].data, margin)
    if not all(table[part].made for part in parts):
        return open_claim
    sides = [_certified(_side(table, name), comparison.radius) for name in names]
    return _decided(open_claim, sides, comparison.margin, alike=bool(comparison.alike))


def _parts(name: str) -> tuple[str, list[str]]:
    """The rule and the rows of one side: `RULE: ROW ROW ...` for several scales in one certificate, else one row."""
    rule, _, rest = name.rpartition(": ")
    return rule, rest.split()


def _side(table: Table, name: str) -> pd.DataFrame:
    rule, parts = _parts(name)
    if rule:
        return cascade_certificates([table[part].record for part in parts], rule=rule)
    return table[parts[0]].certificates


def _decided(claim: Claim, sides: list[pd.Series], margin: float, alike: bool = False) -> Claim:
    if len(sides) == 1:
        (alone,) = sides
        low, high = exact_interval(int(alone.sum()), len(alone))
        measured, interval, n = f"{alone.mean():.3f}", f"[{low:.3f}, {high:.3f}]", len(alone)
    else:
        low, high, measured, n = _paired(claim.claim, *sides)
        interval = f"difference [{low:+.3f}, {high:+.3f}]"
    yes, no = (
        (-margin < low and high < margin, high < -margin or low > margin) if alike else (low > margin, high < margin)
    )
    holds = "yes" if yes else "no" if no else "unclear"
    return dataclasses.replace(
        claim, data=f"{claim.data}, {n} images", measured=measured, interval=interval, holds=holds
    )


def _paired(claim: str, this: pd.Series, other: pd.Series) -> tuple[float, float, str, int]:
    """Interval of the difference in the share of the same images, the shares in words, and how many images."""
    common = this.index.intersection(other.index)
    if len(common) < min(len(this), len(other)):
        raise ValueError(f"{claim}: the two records are of different images")
    this, other = this.loc[common], other.loc[common]
    gained, lost = int((this & ~other).sum()), int((other & ~this).sum())
    low, high = paired_difference_interval(gained, lost, len(common))
    return low, high, f"{this.mean():.3f} against {other.mean():.3f}", len(common)


def _certified(table: pd.DataFrame, radius: float) -> pd.Series:
    """Whether each image is certified at a radius, by image id."""
    return pd.Series((table["correct"] & (table["radius"] >= radius)).to_numpy(), index=table["image_id"])


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
        open_claim = Claim(COHEN, words, "the records of the starters", "digits", "+0")
        yield _decided(open_claim, [_certified(this, radius), _certified(other, radius)], 0.0)


def _record(name: str, n: int | None = None) -> pd.DataFrame:
    return certificates(open_record(data_folder() / "records" / name), n=n)


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
        words = f"certified accuracy {printed:.2f} at radius {radius:g} (sigma {sigma:g})"
        source = f"{dataset}, the published log"
        if cells.empty:
            missing = "not at hand: SMOOTHKIT_DATA has no cohen2019-logs"
            yield Claim(COHEN, words, source, source, "", missing)
            continue
        cell = cells[(cells["dataset"] == dataset) & (cells["sigma"] == sigma) & (cells["radius"] == radius)].iloc[0]
        rows, measured = int(cell["rows"]), float(cell["measured"])
        low, high = exact_interval(round(measured * rows), rows)
        holds = "yes" if abs(measured - printed) <= 0.005 + 1e-9 else "no"
        about, interval = f"{dataset}, {rows} images", f"[{low:.3f}, {high:.3f}]"
        yield Claim(COHEN, words, source, about, "as printed", f"{measured:.3f}", interval, holds)


# --- Alfarra et al. 2022 -----------------------------------------------------------------------------


def _memory_on_digits() -> Iterator[Claim]:
    """That certified balls of different labels never meet, so that a memory changes no answer."""
    from smoothbook.sigma.memory import Memory  # these three bring torch, which reading a table does without
    from smoothbook.sigma.reading import through_memory
    from smoothkit.data import load

    system, images, table = "Data-dependent smoothing (Alfarra et al. 2022), main text", load("digits"), open("sigma")
    place = {image_id: i for i, image_id in enumerate(images.ids)}
    for name in ("gaussian-ds", "smoothadv-ds", "macer-ds"):
        words = f"the memory changes no answer: no certified balls of different labels overlap ({name})"
        claim = Claim(system, words, f"{table.folder.name}: {name}", "digits", "none")
        if not table[name].made:
            yield claim
            continue
        found = table[name].certificates
        memory = Memory(model=name, shape=tuple(images[0].shape))
        asked = through_memory(memory, [images[place[i]] for i in found["image_id"]], found)
        changed, n = int(asked["case"].isin([2, 3, 4]).sum()), len(asked)
        low, high = exact_interval(changed, n)
        yield dataclasses.replace(
            claim, data=f"digits, {n} images", measured=f"{changed} of {n}", interval=f"[{low:.3f}, {high:.3f}]",
            holds="no" if changed else "yes",
        )  # fmt: skip
