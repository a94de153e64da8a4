"""Votes on disk that can be resumed, merged and checked: append-only records."""

from smoothkit.records.format import (
    BLOCK_KEY,
    ESTIMATE,
    PER_IMAGE,
    SELECT,
    Identity,
    RecordError,
    Row,
    has_checksum,
    parse_json,
    read_json,
    write_atomically,
)
from smoothkit.records.record import Record, create_record, open_record
from smoothkit.records.share import compact, merge, pack

__all__ = [
    "BLOCK_KEY", "ESTIMATE", "PER_IMAGE", "SELECT", "Identity", "Record", "RecordError", "Row", "compact", "create_record",
    "has_checksum", "merge", "open_record", "pack", "parse_json", "read_json", "write_atomically",
]  # fmt: skip
