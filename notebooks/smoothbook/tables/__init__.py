"""The tables of experiments: `tables.open(name)` reads one; its rows' settings, their making, and what papers claim."""

from smoothbook.tables.claims import ClaimError, claims
from smoothbook.tables.settings import Card, Row, RowError, load_rows
from smoothbook.tables.table import Table, TableRow, classifier_of, kept, open

__all__ = [
    "Card", "ClaimError", "Row", "RowError", "Table", "TableRow", "claims", "classifier_of", "kept", "load_rows", "open",
]  # fmt: skip
