"""What a record or a foreign log says: accuracy, intervals, reports, logs, audits."""

from smoothkit.reading.accuracy import average_certified_radius, certified_accuracy, envelope
from smoothkit.reading.alpha import consistent_alphas, infer_alpha
from smoothkit.reading.audit import audit
from smoothkit.reading.intervals import (
    certified_accuracy_interval,
    compare,
    exact_interval,
    paired_bootstrap,
    paired_difference_interval,
    wilson_interval,
)
from smoothkit.reading.logs import LogError, read_log, write_log
from smoothkit.reading.report import ReportError, about_records, format_table, load_result, report

__all__ = [
    "LogError", "ReportError", "about_records", "audit", "average_certified_radius", "certified_accuracy",
    "certified_accuracy_interval", "compare", "consistent_alphas", "envelope", "exact_interval", "format_table", "infer_alpha",
    "load_result",
    "paired_bootstrap", "paired_difference_interval", "read_log", "report", "wilson_interval", "write_log",
]  # fmt: skip
