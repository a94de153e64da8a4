"""Certificates of a record, one row an image, by the rule it was sampled under."""

import pandas as pd

from smoothkit.certify import fixed
from smoothkit.certify.sequential import sequential_certificates
from smoothkit.records.format import RecordError
from smoothkit.records.record import Record


def certificates(record: Record, *, alpha: float | None = None, n: int | None = None) -> pd.DataFrame:
    """Certificates of all complete images of a record, by the rule it was sampled under.

    A record of fixed n can be read at any `alpha`, and at an `n` that is a block edge; see
    `fixed.certificates`, also for the columns. One that stopped early accepts only its own rule:
    reading its counts as a fixed sample would take a second look for nothing.

    Raises
    ------
    RecordError
        If another alpha or n is asked of a record that stopped early, or no image is complete yet.
    """
    rule = record.stopping_rule
    if rule.kind == "fixed":
        return fixed.certificates(record, alpha=alpha, n=n)
    if alpha not in (None, rule.alpha) or n not in (None, rule.n):
        raise RecordError(
            f"{record.path or 'the record'} stopped early by the rule {rule.kind!r} at alpha={rule.alpha:g}; "
            f"it can be read by that rule only: leave alpha and n out"
        )
    return sequential_certificates(record)
