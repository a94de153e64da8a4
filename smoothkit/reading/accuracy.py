"""Certified accuracy, average certified radius and envelopes of certificate tables."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from smoothkit.types import ABSTAIN

# --- rates ---------------------------------------------------------------------------------------------


def certified_accuracy(table: pd.DataFrame, radii: Sequence[float]) -> np.ndarray:
    """Certified accuracy at each radius, shape (radii,).

    The share of ALL rows, abstentions and errors included, that are correct with `radius >= r` (Cohen et al. 2019,
    Section 4). A prediction log has no radii and gets 0 throughout.
    """
    wanted = np.asarray(radii, dtype=np.float64).reshape(-1)
    if not (np.isfinite(wanted) & (wanted >= 0)).all():
        raise ValueError(f"radii must be finite and at least 0, got {list(radii)}")
    right, radius = _right(table), table["radius"].to_numpy(np.float64)
    return np.array([(right & (radius >= r)).mean() for r in wanted])


def average_certified_radius(table: pd.DataFrame) -> float:
    """ACR: mean over all rows of the radius where correct, else 0; units of sigma (Zhai et al., MACER, 2020)."""
    return float(np.where(_right(table), table["radius"].to_numpy(np.float64), 0.0).mean())


def envelope(tables: Mapping[str, pd.DataFrame], radii: Sequence[float]) -> pd.DataFrame:
    """The largest certified accuracy at each radius over several tables, and whose it is.

    No single classifier reaches an envelope: a curve drawn from it should be labelled as one (`frame.attrs["label"]`).

    Returns
    -------
    DataFrame
        Columns radius, envelope, which (a key of `tables`; the first on a tie).
    """
    if not tables:
        raise ValueError("an envelope needs at least one table")
    names = list(tables)
    values = np.stack([certified_accuracy(tables[name], radii) for name in names])  # [tables, radii]
    best = values.argmax(axis=0)
    frame = pd.DataFrame({"radius": list(radii), "envelope": values.max(axis=0), "which": [names[i] for i in best]})
    frame.attrs["label"] = f"envelope: largest of {len(names)} at each radius"
    return frame


def _right(table: pd.DataFrame) -> np.ndarray:
    missing = [name for name in ("predict", "radius", "correct") if name not in table]
    if missing:
        raise ValueError(f"a certificate table needs the columns predict, radius and correct; missing: {missing}")
    if table.empty:
        raise ValueError("the certificate table has no rows, so no rate; certify at least one image")
    return (table["correct"].astype(bool) & (table["predict"] != ABSTAIN)).to_numpy()
