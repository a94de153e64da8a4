"""Other people's certification logs: their dialects, their damage, and the alpha their radii fit.

The field prints its results as tables with one row an image, `idx label predict radius correct time`, after
Cohen, Rosenfeld and Kolter (ICML 2019). `read_log` reads that table and the variants of it that are in
circulation, recomputes what can be recomputed, and names every row that it had to mend or leave out.
"""

import csv
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from smoothkit.types import ABSTAIN, check_sigma, round_down

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

_SET_SIZES = (1_797, 10_000, 50_000, 1_281_167)  # digits, CIFAR-10 test, ImageNet validation (CIFAR-10 train), train
_TABLE_STEP = 0.25  # published tables step by 0.25 or 0.5
_DISTINCT_NEEDED = 3  # distinct large radii below which two values of alpha can fit by chance
_TOP = 2_000  # votes missing from n up to which radii could be resolved; 76 suffice at n = 100,000


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


@dataclasses.dataclass(frozen=True, eq=False)
class Log:
    """A log as read.

    `table` has a row an image: idx, label, predict (int64), radius (float64, units of sigma, NaN in a predict
    log), correct (bool, recomputed), seconds (float64, NaN if absent), then the file's other columns under their
    own names. `sigma_source` says how sigma is known: "argument", "file name", "column" or None.
    """

    path: Path
    dialect: str
    kind: str  # "certify" or "predict"
    table: pd.DataFrame
    problems: tuple[Problem, ...]
    sigma: float | None
    sigma_source: str | None


# --- reading -------------------------------------------------------------------------------------------


def read_log(path: str | Path, *, sigma: float | None = None, expected_rows: int | None = None) -> Log:
    """Read a certification or prediction log of any known dialect.

    Parameters
    ----------
    path : str or Path
        A text file with a header line; tabs, commas or blanks between the columns.
    sigma : float, optional
        Noise level of the log, pixel units on [0, 1]; otherwise taken from a file name such as
        `sigma_0.25` or from a constant `sigma` column.
    expected_rows : int, optional
        Rows of the full log. Without it a short log is guessed from the spacing of its indices.

    Returns
    -------
    Log
        Rows that could be read, in the order of the file, with `problems`. `correct` is recomputed from label and
        prediction. An abstention has radius 0.0; a code below -1 or a negative radius is read as an abstention.

    Raises
    ------
    LogError
        If the file is missing, empty, binary, prose, without rows, or its header lacks a column.

    References
    ----------
    Format: Cohen, Rosenfeld and Kolter, ICML 2019, released logs and `certify.py`.
    """
    path = Path(path)
    if sigma is not None:
        check_sigma(sigma)
    lines = _text(path).split("\n")
    layout, first = _layout(path, lines)
    rows, problems = _rows(layout, lines, first)
    if not rows:
        reason = f"; {problems[0]}" if problems else ""
        raise LogError(f"{path}: a header and no row that could be read{reason}; the run may have been cut short")
    frame, numbers = _frame(layout, rows), np.array([line for line, _ in rows])
    table, mended = _table(layout, frame, numbers)
    problems += mended + _duplicates(table, numbers) + _short(path, table, numbers, expected_rows)
    if "radius" in layout.at:
        problems += _rounded(frame["radius"], table, numbers)
    running = any("running total" in problem.what for problem in problems)
    known_sigma, source = _sigma(path, sigma, table)
    return Log(
        path=path,
        dialect=_dialect(layout, running),
        kind="certify" if "radius" in layout.at else "predict",
        table=table,
        problems=tuple(sorted(problems, key=lambda problem: problem.row)),
        sigma=known_sigma,
        sigma_source=source,
    )


def _text(path: Path) -> str:
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
class _Layout:
    names: tuple[str, ...]  # the header's names, as printed
    at: dict[str, int]  # our name -> position
    separator: str | None  # None: any run of blanks

    def split(self, line: str) -> list[str]:
        if self.separator == "," and '"' in line and len(line) < csv.field_size_limit():
            return [field.strip() for field in next(csv.reader([line]), [])]
        return [field.strip() for field in line.split(self.separator)]


def _layout(path: Path, lines: Sequence[str]) -> tuple[_Layout, int]:
    """The columns, from the first line that is not blank, and the position of the line after it."""
    at = next(i for i, line in enumerate(lines) if line.strip())
    header = lines[at]
    if re.fullmatch(r"o\s+\d+\s+\S+\s+\S+", header.strip()):
        raise LogError(
            f"{path} is a double-sampling log ('o idx lower upper'): bounds without labels or predictions; "
            "use a log with the columns idx label predict radius"
        )
    separator = "\t" if "\t" in header else "," if "," in header else None
    names = tuple(_Layout((), {}, separator).split(header.strip()))
    if all(_is_number(name) for name in names[:3]):
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
    return _Layout(names, {ours: i for ours, i in found.items() if i is not None}, separator), at + 1


def _rows(layout: _Layout, lines: Sequence[str], first: int) -> tuple[list[tuple[int, list[str]]], list[Problem]]:
    """The rows that parse, with their line numbers, and what is wrong with the others."""
    filled = [(i + 1, lines[i]) for i in range(first, len(lines)) if lines[i].strip()]
    fields = [(number, layout.split(line.strip("\n"))) for number, line in filled]
    fields, tail = _without_tail(layout, fields)
    headers = [number for number, row in fields if tuple(row) == layout.names]
    by_name = _labels_are_names(layout, fields)
    good, problems = [], [] if not tail else [tail]
    if headers:
        problems.append(_shared(headers, "the header line again (joined logs?); left out"))
    for number, row in fields:
        if number in headers:
            continue
        fault = _fault(layout, row, by_name)
        if fault:
            problems.append(Problem(number, f"{fault}; row left out of every rate", "error"))
        else:
            good.append((number, row))
    return good, problems


def _without_tail(layout: _Layout, fields: list) -> tuple[list, Problem | None]:
    """Split off lines of prose below the last row, such as a summary of the run."""
    at, end = layout.at["idx"], len(fields)
    while end and not any(_is_number(text) for text in fields[end - 1][1][at : at + 1]):
        end -= 1
    tail = fields[end:]
    if not tail or not end:
        return fields, None
    return fields[:end], Problem(tail[0][0], f"{_count(len(tail), 'line')} of text below the rows, skipped")


def _labels_are_names(layout: _Layout, fields: list) -> bool:
    column = [row[layout.at["label"]] for _, row in fields if len(row) == len(layout.names)]
    return sum(not _is_number(text) for text in column) > len(column) / 2


def _fault(layout: _Layout, row: list[str], by_name: bool) -> str | None:
    if len(row) != len(layout.names):
        return f"{_count(len(row), 'field')} where the header has {len(layout.names)}"
    for name in ("idx",) if by_name else ("idx", "label", "predict"):
        text = row[layout.at[name]]
        if not _is_whole(text):
            return f"{name} is {text!r}, not a whole number"
    if "radius" in layout.at:
        text = row[layout.at["radius"]]
        if not (_is_number(text) and np.isfinite(float(text))):
            return f"radius is {text!r}, not a finite number"
    return None


def _frame(layout: _Layout, rows: list) -> dict[str, np.ndarray]:
    """All columns as text: ours under our names, the others under their own; of two with one name the first."""
    ours = {position: name for name, position in layout.at.items()}
    frame: dict[str, np.ndarray] = {}
    for i, name in enumerate(layout.names):
        frame.setdefault(ours.get(i, name), np.array([row[i] for _, row in rows], dtype=object))
    return frame


def _table(layout: _Layout, frame: dict[str, np.ndarray], lines: np.ndarray) -> tuple[pd.DataFrame, list[Problem]]:
    label, predict, problems = _classes(frame, lines)
    radius = frame["radius"].astype(float) if "radius" in frame else np.full(len(lines), np.nan)
    codes = predict.copy()
    predict, radius, mended = _mend(predict, radius, lines)
    correct = (predict == label) & (predict >= 0)
    seconds, unread = _column(frame, "time", _seconds)
    columns = {
        "idx": frame["idx"].astype(float).astype(np.int64),
        "label": label,
        "predict": predict,
        "radius": radius,
        "correct": correct,
        "seconds": seconds,
    }
    if (codes < ABSTAIN).any():
        columns["predict_code"] = codes
    extra = {name: _numeric(frame[name]) for name in frame if name not in COLUMNS}
    problems += mended + _own_correct(frame, correct, lines)
    if unread.any():
        problems.append(_shared(lines[unread], "time is neither seconds nor h:mm:ss; left as NaN"))
    if "radius proved" in (name.lower() for name in layout.names):
        problems.append(
            Problem(1, "'radius proved' is the radius that was tested, not the largest that holds: read no ACR from it")
        )
    return pd.DataFrame({**columns, **{n: column for n, column in extra.items() if n not in columns}}), problems


def _classes(frame: dict[str, np.ndarray], lines: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Problem]]:
    """Labels and predictions as integers; class names are numbered in alphabetical order."""
    if all(map(_is_whole, frame["label"])) and all(map(_is_whole, frame["predict"])):
        return *(frame[name].astype(float).astype(np.int64) for name in ("label", "predict")), []
    predicted_names = {text for text in frame["predict"] if not _is_negative(text)}
    number = {name: i for i, name in enumerate(sorted(set(frame["label"]) | predicted_names))}
    frame["label_name"], frame["predict_name"] = frame["label"], frame["predict"]
    label = np.array([number[text] for text in frame["label"]], np.int64)
    predict = np.array([int(text) if _is_negative(text) else number[text] for text in frame["predict"]], np.int64)
    return label, predict, [Problem(int(lines[0]), "classes are names; numbered here in alphabetical order")]


def _mend(predict: np.ndarray, radius: np.ndarray, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Problem]]:
    """Give every abstention -1 and 0.0, and make abstentions of rows that claim nothing."""
    abstained, negative = predict < 0, radius < 0
    found = [
        (predict < ABSTAIN, "a code below -1 instead of a class, read as abstain (kept in predict_code)"),
        (abstained & negative, "a negative radius on an abstention, set to 0"),
        (abstained & (radius > 0), "a positive radius on an abstention, set to 0"),
        (~abstained & negative, "a negative radius beside a class, read as abstain"),
    ]
    problems = [_shared(lines[where], what) for where, what in found if where.any()]
    abstained = abstained | negative
    radius = np.where(abstained & ~np.isnan(radius), 0.0, radius)
    return np.where(abstained, ABSTAIN, predict), radius, problems


def _own_correct(frame: dict[str, np.ndarray], correct: np.ndarray, lines: np.ndarray) -> list[Problem]:
    """What the file's own `correct` column says otherwise than its labels and predictions."""
    if "correct" not in frame:
        return []
    own, unread = _column(frame, "correct", _truth)
    if unread.any():
        return [_shared(lines[unread], "correct is neither 0/1 nor True/False; recomputed")]
    if np.array_equal(own, correct):
        return []
    with np.errstate(invalid="ignore"):  # inf - inf, in a column that is no total
        steps = np.diff(own, prepend=0.0)
    if np.array_equal(own, correct.cumsum()) or ((steps >= 0).all() and own[-1] > 1):
        what = f"correct is a running total (up to {own[-1]:g}), not 0/1; recomputed from label and predict"
        wrong = np.flatnonzero(steps != correct)
        more = [_shared(lines[wrong], "the running total moves otherwise than label and predict")] if wrong.size else []
        return [Problem(int(lines[0]), what), *more]
    return [_shared(lines[own != correct], "correct disagrees with label and predict; recomputed")]


def _duplicates(table: pd.DataFrame, lines: np.ndarray) -> list[Problem]:
    repeated = table["idx"].duplicated(keep=False).to_numpy()
    if not repeated.any():
        return []
    distinct = table.loc[repeated, "idx"].nunique()
    again = int(table["idx"].duplicated().sum())
    what = f"{_count(distinct, 'index', 'indices')} more than once, {_count(again, 'row')} too many; all rows kept"
    return [_shared(lines[repeated], what)]


def _short(path: Path, table: pd.DataFrame, lines: np.ndarray, expected_rows: int | None) -> list[Problem]:
    """Rows that should be there and are not, by the caller's count or by the spacing of the indices."""
    rows, last_line = len(table), int(lines[-1])
    if expected_rows is not None:
        few = rows < expected_rows
        return [Problem(last_line, f"{rows} rows where {expected_rows} were expected")] if few else []
    indices = np.unique(table["idx"])
    if len(indices) < 10:
        return []  # too few to speak of a spacing
    gaps = np.diff(indices)
    values, counts = np.unique(gaps, return_counts=True)
    step = int(values[counts.argmax()])
    if step < 2 or (gaps % step).any() or (gaps == step).mean() < 0.5:
        return []
    problems = []
    grid = int((indices[-1] - indices[0]) // step) + 1
    if grid > len(indices):
        absent, first = grid - len(indices), int(indices[(gaps != step).argmax()]) + step
        what = f"{rows} rows; indices in steps of {step} leave out {absent} of {grid} (first {first})"
        problems.append(Problem(last_line, what))
    if indices[0] < step and not any(indices[-1] < size <= indices[-1] + step for size in _sizes(path)):
        problems += _stops_early(rows, int(indices[0]), int(indices[-1]), step, _sizes(path), last_line)
    return problems


def _sizes(path: Path) -> tuple[int, ...]:
    hints = {"imagenet": (50_000, 1_281_167), "cifar": (10_000, 50_000)}
    return next((sizes for name, sizes in hints.items() if name in str(path).lower()), _SET_SIZES)


def _stops_early(rows: int, start: int, last: int, step: int, sizes: Iterable[int], line: int) -> list[Problem]:
    size = min((size for size in sizes if size > last), default=None)
    if size is None:
        return []
    grid_end = start + step * ((size - 1 - start) // step)
    what = f"{rows} rows; indices in steps of {step} end at {last}"
    full = (grid_end - start) // step + 1
    return [Problem(line, f"{what}; over {size:,} images they would go on to {grid_end} ({full} rows)")]


def _rounded(printed: np.ndarray, table: pd.DataFrame, lines: np.ndarray) -> list[Problem]:
    """Three printed digits are rounded to nearest: a radius just below a tabulated one may sit on it."""
    certified = ((table["predict"] != ABSTAIN) & (table["radius"] > 0)).to_numpy()
    texts = printed[certified]
    if not len(texts) or not all(_is_coarse(text) for text in texts):
        return []
    steps = table["radius"].to_numpy()[certified] / _TABLE_STEP
    on_table = steps == np.round(steps)
    where = lines[certified][on_table] if on_table.any() else lines[:1]
    what = (
        f"radii have three digits and may have been rounded up; {_count(int(on_table.sum()), 'row')} "
        f"exactly on a multiple of {_TABLE_STEP:g}"
    )
    return [_shared(where, what) if on_table.any() else Problem(int(where[0]), what)]


def _is_coarse(text: str) -> bool:
    """Whether a radius was printed with three significant digits, or three decimals, or fewer."""
    mantissa = text.lower().split("e")[0].lstrip("+-")
    decimals = len(mantissa.partition(".")[2])
    return len(mantissa.replace(".", "").lstrip("0")) <= 3 or (decimals <= 3 and "e" not in text.lower())


def _dialect(layout: _Layout, running: bool) -> str:
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


def _sigma(path: Path, given: float | None, table: pd.DataFrame) -> tuple[float | None, str | None]:
    if given is not None:
        return float(given), "argument"
    match = re.search(r"sigma[_=-]?(\d+(?:\.\d+)?)", path.name)
    if match and 0 < float(match[1]) <= 20:
        return float(match[1]), "file name"
    if "sigma" in table and pd.api.types.is_numeric_dtype(table["sigma"]) and table["sigma"].nunique() == 1:
        return float(table["sigma"].iloc[0]), "column"
    return None, None  # unknown, or one for each image


# --- small readers of text -----------------------------------------------------------------------------


# as programs print numbers; float() would also take 1_000 and the digits of other scripts
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf|infinity|nan)", re.ASCII | re.IGNORECASE)


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _is_whole(text: str) -> bool:
    return _is_number(text) and float(text).is_integer() and abs(float(text)) < 2**53  # else a float is not exact


def _is_negative(text: str) -> bool:
    return re.fullmatch(r"-[1-9]\d{0,8}", text, re.ASCII) is not None


def _seconds(text: str) -> float:
    """`15.4`, `0:00:14.2` or `1 day, 0:00:14.2` in seconds; ValueError for anything else."""
    days, _, clock = text.rpartition(",")
    total = 86_400.0 * float(days.split()[0]) if days else 0.0
    parts = clock.split(":")
    if len(parts) > 3:
        raise ValueError(text)
    for power, part in enumerate(reversed(parts)):
        total += float(part) * 60**power
    return total


def _truth(text: str) -> float:
    return {"true": 1.0, "false": 0.0}[text.lower()] if text.lower() in ("true", "false") else float(text)


def _column(frame: dict[str, np.ndarray], name: str, read: Callable[[str], float]) -> tuple[np.ndarray, np.ndarray]:
    """A column read cell by cell, NaN where absent or unread, and where it could not be read."""
    rows = len(frame["idx"])
    values, unread = np.full(rows, np.nan), np.zeros(rows, dtype=bool)
    for i, text in enumerate(frame.get(name, ())):
        try:
            values[i] = read(text)
        except ValueError:
            unread[i] = True
    return values, unread


def _numeric(column: np.ndarray) -> np.ndarray:
    try:
        return pd.to_numeric(column)
    except (ValueError, TypeError):
        return column


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _shared(lines: Sequence[int], what: str) -> Problem:
    """One problem for several lines; the first eight are named."""
    named = ", ".join(str(int(line)) for line in lines[:8]) + (", ..." if len(lines) > 8 else "")
    where = f" ({_count(len(lines), 'row')}: lines {named})" if len(lines) > 1 else ""
    return Problem(int(lines[0]), what + where)


def write_log(table: pd.DataFrame, path: str | Path) -> None:
    """Write the six-column log of the field, which drops the counts: keep the record too.

    Parameters
    ----------
    table : DataFrame
        Columns idx, label, predict, radius; seconds if known (else the time is `nan`).
    path : str or Path
        Radii get six decimals, rounded down; an abstention is -1 with radius 0.0.

    Raises
    ------
    ValueError
        If a column is missing or an answered row has a radius that is negative or not finite.
    """
    missing = [name for name in ("idx", "label", "predict", "radius") if name not in table]
    if missing:
        raise ValueError(f"a log needs the columns idx, label, predict and radius; missing: {', '.join(missing)}")
    answered = table["predict"] != ABSTAIN
    radii = table.loc[answered, "radius"]
    if not (np.isfinite(radii) & (radii >= 0)).all():
        raise ValueError("radius must be finite and at least 0 on every row with a prediction")
    seconds = table["seconds"] if "seconds" in table else np.full(len(table), np.nan)
    rows = zip(table["idx"], table["label"], table["predict"], table["radius"], seconds, strict=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(COLUMNS) + "\n")
        file.writelines(_line(*row) for row in rows)


def _line(idx: int, label: int, predict: int, radius: float, seconds: float) -> str:
    shown = "0.0" if predict == ABSTAIN else round_down(radius, 6)
    correct = int(predict == label and predict != ABSTAIN)
    return f"{int(idx)}\t{int(label)}\t{int(predict)}\t{shown}\t{correct}\t{float(seconds):.3f}\n"
