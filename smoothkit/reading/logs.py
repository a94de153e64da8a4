"""Other people's certification logs: their dialects, their damage, and the alpha their radii fit.

The field prints its results as tables with one row an image, `idx label predict radius correct time`, after
Cohen, Rosenfeld and Kolter (ICML 2019). `read_log` reads that table and the variants of it that are in
circulation, recomputes what can be recomputed, and names every row that it had to mend or leave out.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from smoothkit.reading.dialects import (
    COLUMNS,
    Layout,
    LogError,
    Problem,
    columns_of,
    count_of,
    dialect_of,
    is_negative,
    is_whole,
    layout_of,
    rows_of,
    shared,
    text_of,
)
from smoothkit.types import ABSTAIN, check_sigma, round_down

_SET_SIZES = (1_797, 10_000, 50_000, 1_281_167)  # digits, CIFAR-10 test, ImageNet validation (CIFAR-10 train), train
_TABLE_STEP = 0.25  # published tables step by 0.25 or 0.5


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
    lines = text_of(path).split("\n")
    layout, first = layout_of(path, lines)
    rows, problems = rows_of(layout, lines, first)
    if not rows:
        reason = f"; {problems[0]}" if problems else ""
        raise LogError(f"{path}: a header and no row that could be read{reason}; the run may have been cut short")
    frame, numbers = columns_of(layout, rows), np.array([line for line, _ in rows])
    table, mended = _table(layout, frame, numbers)
    problems += mended + _duplicates(table, numbers) + _short(path, table, numbers, expected_rows)
    if "radius" in layout.at:
        problems += _rounded(frame["radius"], table, numbers)
    running = any("running total" in problem.what for problem in problems)
    known_sigma, source = _sigma(path, sigma, table)
    return Log(
        path=path,
        dialect=dialect_of(layout, running),
        kind="certify" if "radius" in layout.at else "predict",
        table=table,
        problems=tuple(sorted(problems, key=lambda problem: problem.row)),
        sigma=known_sigma,
        sigma_source=source,
    )


def _table(layout: Layout, frame: dict[str, np.ndarray], lines: np.ndarray) -> tuple[pd.DataFrame, list[Problem]]:
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
        problems.append(shared(lines[unread], "time is neither seconds nor h:mm:ss; left as NaN"))
    if "radius proved" in (name.lower() for name in layout.names):
        problems.append(
            Problem(1, "'radius proved' is the radius that was tested, not the largest that holds: read no ACR from it")
        )
    return pd.DataFrame({**columns, **{n: column for n, column in extra.items() if n not in columns}}), problems


def _classes(frame: dict[str, np.ndarray], lines: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Problem]]:
    """Labels and predictions as integers; class names are numbered in alphabetical order."""
    if all(map(is_whole, frame["label"])) and all(map(is_whole, frame["predict"])):
        return *(frame[name].astype(float).astype(np.int64) for name in ("label", "predict")), []
    predicted_names = {text for text in frame["predict"] if not is_negative(text)}
    number = {name: i for i, name in enumerate(sorted(set(frame["label"]) | predicted_names))}
    frame["label_name"], frame["predict_name"] = frame["label"], frame["predict"]
    label = np.array([number[text] for text in frame["label"]], np.int64)
    predict = np.array([int(text) if is_negative(text) else number[text] for text in frame["predict"]], np.int64)
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
    problems = [shared(lines[where], what) for where, what in found if where.any()]
    abstained = abstained | negative
    radius = np.where(abstained & ~np.isnan(radius), 0.0, radius)
    return np.where(abstained, ABSTAIN, predict), radius, problems


def _own_correct(frame: dict[str, np.ndarray], correct: np.ndarray, lines: np.ndarray) -> list[Problem]:
    """What the file's own `correct` column says otherwise than its labels and predictions."""
    if "correct" not in frame:
        return []
    own, unread = _column(frame, "correct", _truth)
    if unread.any():
        return [shared(lines[unread], "correct is neither 0/1 nor True/False; recomputed")]
    if np.array_equal(own, correct):
        return []
    with np.errstate(invalid="ignore"):  # inf - inf, in a column that is no total
        steps = np.diff(own, prepend=0.0)
    if np.array_equal(own, correct.cumsum()) or ((steps >= 0).all() and own[-1] > 1):
        what = f"correct is a running total (up to {own[-1]:g}), not 0/1; recomputed from label and predict"
        wrong = np.flatnonzero(steps != correct)
        more = [shared(lines[wrong], "the running total moves otherwise than label and predict")] if wrong.size else []
        return [Problem(int(lines[0]), what), *more]
    return [shared(lines[own != correct], "correct disagrees with label and predict; recomputed")]


def _duplicates(table: pd.DataFrame, lines: np.ndarray) -> list[Problem]:
    repeated = table["idx"].duplicated(keep=False).to_numpy()
    if not repeated.any():
        return []
    distinct = table.loc[repeated, "idx"].nunique()
    again = int(table["idx"].duplicated().sum())
    what = f"{count_of(distinct, 'index', 'indices')} more than once, {count_of(again, 'row')} too many; all rows kept"
    return [shared(lines[repeated], what)]


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
        f"radii have three digits and may have been rounded up; {count_of(int(on_table.sum()), 'row')} "
        f"exactly on a multiple of {_TABLE_STEP:g}"
    )
    return [shared(where, what) if on_table.any() else Problem(int(where[0]), what)]


def _is_coarse(text: str) -> bool:
    """Whether a radius was printed with three significant digits, or three decimals, or fewer."""
    mantissa = text.lower().split("e")[0].lstrip("+-")
    decimals = len(mantissa.partition(".")[2])
    return len(mantissa.replace(".", "").lstrip("0")) <= 3 or (decimals <= 3 and "e" not in text.lower())


def _sigma(path: Path, given: float | None, table: pd.DataFrame) -> tuple[float | None, str | None]:
    if given is not None:
        return float(given), "argument"
    match = re.search(r"sigma[_=-]?(\d+(?:\.\d+)?)", path.name)
    if match and 0 < float(match[1]) <= 20:
        return float(match[1]), "file name"
    if "sigma" in table and pd.api.types.is_numeric_dtype(table["sigma"]) and table["sigma"].nunique() == 1:
        return float(table["sigma"].iloc[0]), "column"
    return None, None  # unknown, or one for each image


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
