"""Curves of certificates side by side: as numbers, in a sentence, and a kept record beside a run of today."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from smoothkit.certify import certificates
from smoothkit.reading import average_certified_radius, certified_accuracy
from smoothkit.records import Record, open_record
from smoothkit.types import round_down


def summary(curves: Mapping[float | str, pd.DataFrame], radii: Sequence[float]) -> pd.DataFrame:
    """Tables of certificates in numbers, a line for each.

    Parameters
    ----------
    curves : mapping from a name or a sigma to a table of `certificates`
    radii : L2, pixel units

    Returns
    -------
    DataFrame
        curve, images, the certified accuracy at each radius as "at 0.25" (three decimals), and as text, rounded down, ACR
        and the largest radius of all answers, right or wrong.
    """
    lines = []
    for name, table in curves.items():
        shares = certified_accuracy(table, radii)
        line = {"curve": name if isinstance(name, str) else f"σ = {name:g}", "images": len(table)}
        line |= {f"at {r:g}": round(float(share), 3) for r, share in zip(radii, shares, strict=True)}
        lines.append(
            line
            | {
                "ACR": round_down(average_certified_radius(table)),
                "largest radius": round_down(table["radius"].max()),
            }
        )
    return pd.DataFrame(lines)


def differences_in_words(differences: pd.DataFrame, what: Iterable[str]) -> str:
    """The lines of `reading.compare` about these radii (as "0.5") or "ACR", as a Markdown list."""
    some = differences[differences["what"].isin(list(what))]
    return "\n".join(
        f"- {row}, {'ACR' if what == 'ACR' else f'at radius {what}'}: {d:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}"
        for row, what, d, low, high, verdict in some[
            ["row", "what", "difference", "low", "high", "verdict"]
        ].itertuples(index=False)
    )


@dataclasses.dataclass(frozen=True)
class Beside:
    """A kept record held beside a live one: its `certificates` of the same images, or None; `words` says which or why."""

    certificates: pd.DataFrame | None
    words: str


def beside(live: Record, kept: str | Path | Record, *, alpha: float) -> Beside:
    """Certificates of a kept record of fixed n for the images of a live one, if only the number of samples differs.

    Two curves in one figure are a comparison. So the kept record must be of the same data, base classifier, sigma, noise
    and precision, and hold every image of the live one; `words` names what differs otherwise.

    Parameters
    ----------
    live : Record
    kept : Record, or the path of one
    alpha : float
        At which the kept one is read.
    """
    kept = kept if isinstance(kept, Record) else open_record(kept)
    mine, theirs = live.identity, kept.identity
    pairs = {
        "data": (f"{mine.dataset}, {mine.split}", f"{theirs.dataset}, {theirs.split}"),
        "base classifier": (mine.fingerprint, theirs.fingerprint),
        **{name: (getattr(mine, name), getattr(theirs, name)) for name in ("sigma", "noise", "precision")},
    }
    about = kept.path.name if kept.path else theirs.model
    odd = [f"{name} {a} here, {b} there" for name, (a, b) in pairs.items() if a != b]
    asked, known = (dict(zip(r.rows()["image_id"], r.rows()["digest"], strict=True)) for r in (live, kept))
    lacking = [i for i, digest in asked.items() if not _same_digest(digest, known.get(i))]
    if lacking and not odd:
        odd = [f"it lacks {len(lacking)} of the {len(asked)} images"]
    if odd:
        return Beside(None, f"The record {about} is not shown beside: {'; '.join(odd)}.")
    table = certificates(kept, alpha=alpha)
    table = table[table["image_id"].isin(set(asked))].reset_index(drop=True)
    return Beside(
        table, f"The record {about} is read for the same {len(table)} images, with n = {kept.stopping_rule.n:,}."
    )


def _same_digest(one: str, other: str | None) -> bool:
    """Whether two digests can be of one image: those of an earlier version are shorter and cannot be compared."""
    return other is not None and (len(one) != len(other) or one == other)
