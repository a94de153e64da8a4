"""How a certification log is laid out: the dialects of the field, their columns, and the rows that parse."""

import csv
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")

# what a dialect calls each column; the first name found in the header wins
_ALIASES = {
    "idx": ("idx", "original_idx", "image_id"),
    "label": ("label", "original_label"),
    "predict": ("predict", "predicted_class"),
    "radius": ("radius", "radius proved", "l2_radius", "epsilon_value"),
    "correct": ("correct",),
    "time": ("time", "total_time"),
}

# a column that gives a dialect away; tried in this order
_TELLTALE = (
    ("epsilon_value", "hydra-csv"),
    ("original_idx", "hydra"),
    ("basepredict", "smoothadv-predict"),
    ("correct_num", "lora-denoising"),
    ("pred_uc", "multi-scale"),
    ("radius proved", "adaptive-sampling"),
    ("l2_radius", "adaptive-smoothing"),
    ("samplesize", "input-specific-sampling"),
    ("pa samplesize", "input-specific-sampling"),
    ("sigma", "data-dependent"),
)


class LogError(ValueError):
    """The file cannot be read as a certification log; the message says what was found and what would do."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something in a log that was mended, left out or should be known.

    `row` is the line in the file, the header being line 1; where several lines share a problem, the first.
    """

    row: int
    what: str
    severity: str = "warning"  # or "error": rows were lost

    def __str__(self) -> str:
        return f"line {self.row}: {self.what}"


def text_of(path: Path) -> str:
    if path.is_dir():
        raise LogError(f"{path} is a folder, not a log; name one file in it")
    if not path.is_file():
        raise LogError(f"{path}: no such file; check the path")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if not text.strip():  # of the text: what is blank in it may be no blank byte, as a byte order mark
        raise LogError(f"{path} is empty ({len(raw)} bytes); the run that should have written it left nothing")
    if "\0" in text:
        raise LogError(f"{path} holds binary data (starts with {raw[:8]!r}); a log is a text table with a header line")
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclasses.dataclass(frozen=True)
class Layout:
    names: tuple[str, ...]  # the header's names, as printed
    at: dict[str, int]  # our name -> position
    separator: str | None  # None: any run of blanks

    def split(self, line: str) -> list[str]:
        if self.separator == "," and '"' in line and len(line) < csv.field_size_limit():
            return [field.strip() for field in next(csv.reader([line]), [])]
        return [field.strip() for field in line.split(self.separator)]


def layout_of(path: Path, lines: Sequence[str]) -> tuple[Layout, int]:
    """The columns, from the first line that is not blank, and the position of the line after it."""
    at = next(i for i, line in enumerate(lines) if line.strip())
    header = lines[at]
    if re.fullmatch(r"o\s+\d+\s+\S+\s+\S+", header.strip()):
        raise LogError(
            f"{path} is a double-sampling log ('o idx lower upper'): bounds without labels or predictions; "
            "use a log with the columns idx label predict radius"
        )
    separator = "\t" if "\t" in header else "," if "," in header else None
    names = tuple(Layout((), {}, separator).split(header.strip()))
    if all(is_number(name) for name in names[:3]):
        raise LogError(f"{path}: no header, the first line is a row; put '{' '.join(COLUMNS)}' above it, with tabs")
    lower = [name.lower() for name in names]
    found = {ours: next((lower.index(n) for n in theirs if n in lower), None) for ours, theirs in _ALIASES.items()}
    missing = [name for name in ("idx", "label", "predict") if found[name] is None]
    if missing:
        shown = header.strip()[:60].replace("\t", " ")
        raise LogError(
            f"{path} is not a certification log: its first line, {shown!r}, has no column {', '.join(missing)}; "
            f"expected a header such as '{' '.join(COLUMNS)}'"
        )
    return Layout(names, {ours: i for ours, i in found.items() if i is not None}, separator), at + 1


def rows_of(layout: Layout, lines: Sequence[str], first: int) -> tuple[list[tuple[int, list[str]]], list[Problem]]:
    """The rows that parse, with their line numbers, and what is wrong with the others."""
    filled = [(i + 1, lines[i]) for i in range(first, len(lines)) if lines[i].strip()]
    fields = [(number, layout.split(line.strip("\n"))) for number, line in filled]
    fields, tail = _without_tail(layout, fields)
    headers = [number for number, row in fields if tuple(row) == layout.names]
    by_name = _labels_are_names(layout, fields)
    good, problems = [], [] if not tail else [tail]
    if headers:
        problems.append(shared(headers, "the header line again (joined logs?); left out"))
    for number, row in fields:
        if number in headers:
            continue
        fault = _fault(layout, row, by_name)
        if fault:
            problems.append(Problem(number, f"{fault}; row left out of every rate", "error"))
        else:
            good.append((number, row))
    return good, problems


def _without_tail(layout: Layout, fields: list) -> tuple[list, Problem | None]:
    """Split off lines of prose below the last row, such as a summary of the run."""
    at, end = layout.at["idx"], len(fields)
    while end and not any(is_number(text) for text in fields[end - 1][1][at : at + 1]):
        end -= 1
    tail = fields[end:]
    if not tail or not end:
        return fields, None
    return fields[:end], Problem(tail[0][0], f"{count_of(len(tail), 'line')} of text below the rows, skipped")


def _labels_are_names(layout: Layout, fields: list) -> bool:
    column = [row[layout.at["label"]] for _, row in fields if len(row) == len(layout.names)]
    return sum(not is_number(text) for text in column) > len(column) / 2


def _fault(layout: Layout, row: list[str], by_name: bool) -> str | None:
    if len(row) != len(layout.names):
        return f"{count_of(len(row), 'field')} where the header has {len(layout.names)}"
    for name in ("idx",) if by_name else ("idx", "label", "predict"):
        text = row[layout.at[name]]
        if not is_whole(text):
            return f"{name} is {text!r}, not a whole number"
    if "radius" in layout.at:
        text = row[layout.at["radius"]]
        if not (is_number(text) and np.isfinite(float(text))):
            return f"radius is {text!r}, not a finite number"
    return None


def columns_of(layout: Layout, rows: list) -> dict[str, np.ndarray]:
    """All columns as text: ours under our names, the others under their own; of two with one name the first."""
    ours = {position: name for name, position in layout.at.items()}
    frame: dict[str, np.ndarray] = {}
    for i, name in enumerate(layout.names):
        frame.setdefault(ours.get(i, name), np.array([row[i] for _, row in rows], dtype=object))
    return frame


def dialect_of(layout: Layout, running: bool) -> str:
    lower = [name.lower() for name in layout.names]
    told = next((dialect for name, dialect in _TELLTALE if name in lower), None)
    if told:
        return told
    if running:
        return "running-correct"
    if lower == ["idx", "correct", "radius", "label", "predict"]:
        return "vision-api"
    if set(lower) == set(COLUMNS):
        return "cohen"
    return "cohen-predict" if set(lower) == set(COLUMNS) - {"radius"} else "other"


# as programs print numbers; float() would also take 1_000 and the digits of other scripts
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf|infinity|nan)", re.ASCII | re.IGNORECASE)


def is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def is_whole(text: str) -> bool:
    return is_number(text) and float(text).is_integer() and abs(float(text)) < 2**53  # else a float is not exact


def is_negative(text: str) -> bool:
    return re.fullmatch(r"-[1-9]\d{0,8}", text, re.ASCII) is not None


def count_of(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def shared(lines: Sequence[int], what: str) -> Problem:
    """One problem for several lines; the first eight are named."""
    named = ", ".join(str(int(line)) for line in lines[:8]) + (", ..." if len(lines) > 8 else "")
    where = f" ({count_of(len(lines), 'row')}: lines {named})" if len(lines) > 1 else ""
    return Problem(int(lines[0]), what + where)
