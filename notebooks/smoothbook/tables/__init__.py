"""The tables of experiments: `tables.open(name)` reads one; its rows' settings, their making, and what papers claim."""

from smoothbook.tables.claims import ClaimError, claims
from smoothbook.tables.settings import Card, Row, RowError, load_rows
from smoothbook.tables.studies import (
    compare_at_each_sigma,
    compare_over_seeds,
    cost_of_trainings,
    curves_of,
    difference_text,
    format_differences,
    records_beside,
    seen,
)
from smoothbook.tables.summary import Beside, beside, differences_in_words, summary
from smoothbook.tables.table import Table, TableRow, classifier_of, kept, open

__all__ = [
    "Beside", "Card", "ClaimError", "Row", "RowError", "Table", "TableRow", "beside", "claims",
    "classifier_of", "compare_at_each_sigma", "compare_over_seeds", "cost_of_trainings", "curves_of",
    "difference_text", "differences_in_words", "format_differences", "kept", "load_rows", "open", "records_beside",
    "seen", "summary",
]  # fmt: skip
