"""A slow reader of certification logs, written from the format alone, to compare `smoothkit.reading.logs` with.

It knows no pandas and no NumPy: it goes line by line and returns (idx, label, predict, radius, correct) tuples, radius None
in a log of predictions, or None where a log should be refused.
"""

import math
import re

NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf|infinity|nan)", re.ASCII | re.IGNORECASE)
NAMES = {
    "idx": ["idx", "original_idx", "image_id"],
    "label": ["label", "original_label"],
    "predict": ["predict", "predicted_class"],
    "radius": ["radius", "radius proved", "l2_radius", "epsilon_value"],
}


def number(text: str) -> float | None:
    return float(text) if NUMBER.fullmatch(text) else None


def whole(text: str) -> int | None:
    value = number(text)
    if value is None or not math.isfinite(value) or value != math.floor(value) or abs(value) >= 2**53:
        return None
    return int(value)


def slow_read(raw: bytes) -> list[tuple] | None:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if "\0" in text or not raw.strip():
        return None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    filled = [line for line in lines if line.strip()]
    if not filled or re.fullmatch(r"o\s+\d+\s+\S+\s+\S+", filled[0].strip()):
        return None
    separator = "\t" if "\t" in filled[0] else "," if "," in filled[0] else None

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.split(separator)]

    header = cells(filled[0].strip())
    if all(number(name) is not None for name in header[:3]):
        return None
    lower = [name.lower() for name in header]
    at = {}
    for ours, theirs in NAMES.items():
        for name in theirs:
            if name in lower and ours not in at:
                at[ours] = lower.index(name)
    if not {"idx", "label", "predict"} <= set(at):
        return None
    rows = [cells(line) for line in filled[1:]]
    last = len(rows)
    while last > 0 and not (len(rows[last - 1]) > at["idx"] and number(rows[last - 1][at["idx"]]) is not None):
        last -= 1
    rows = rows[:last] if last else rows  # prose below the rows
    rows_of_right_length = [row for row in rows if len(row) == len(header)]
    names = [row for row in rows_of_right_length if number(row[at["label"]]) is None]
    by_name = len(names) > len(rows_of_right_length) / 2
    good = []
    for row in rows:
        if row == header or len(row) != len(header):
            continue
        needed = [row[at["idx"]]] if by_name else [row[at[name]] for name in ("idx", "label", "predict")]
        if any(whole(cell) is None for cell in needed):
            continue
        if "radius" in at:
            radius = number(row[at["radius"]])
            if radius is None or not math.isfinite(radius):
                continue
        good.append(row)
    return _table(good, at) if good else None


def _table(rows: list[list[str]], at: dict[str, int]) -> list[tuple]:
    labels, predictions = [row[at["label"]] for row in rows], [row[at["predict"]] for row in rows]
    if all(whole(x) is not None for x in labels + predictions):
        numbered = [(whole(a), whole(b)) for a, b in zip(labels, predictions, strict=True)]
    else:
        codes = {p for p in predictions if re.fullmatch(r"-[1-9]\d{0,8}", p, re.ASCII)}
        order = sorted(set(labels) | (set(predictions) - codes))
        numbered = [
            (order.index(a), int(b) if b in codes else order.index(b)) for a, b in zip(labels, predictions, strict=True)
        ]
    table = []
    for row, (label, predict) in zip(rows, numbered, strict=True):
        radius = number(row[at["radius"]]) if "radius" in at else None
        if predict < 0 or (radius is not None and radius < 0):
            predict, radius = -1, None if radius is None else 0.0
        table.append((whole(row[at["idx"]]), label, predict, radius, predict == label and predict >= 0))
    return table
