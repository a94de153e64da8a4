"""Tables from certificates: certified accuracy, average certified radius, and Cohen's tables cell by cell.

Everything here reads a table with a row an image and the columns idx, label, predict, radius, correct; where it
came from, a vote record or somebody's log, matters to `load_result` alone.
"""

import dataclasses
import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from smoothkit.certify.table import certificates
from smoothkit.reading.accuracy import _right, average_certified_radius, certified_accuracy
from smoothkit.reading.alpha import infer_alpha
from smoothkit.reading.logs import read_log
from smoothkit.records.format import Identity
from smoothkit.records.record import Record, open_record
from smoothkit.types import ABSTAIN, check_alpha, round_down

SHARED_DRAWS = (
    "two rules on one seed share their draws; whoever takes the better of the two claims errs with up to twice alpha"
)
FORMATS = ("table", "csv", "markdown", "latex")


class ReportError(ValueError):
    """A path that holds no result; the message says what was found and what would do."""


# --- results from paths --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A certificate table with what is known of it.

    `kind` is "record", "certify" or "predict" (logs). `alpha` and `n` are None where a log's radii do not tell;
    `alpha_text` is for a table cell: "0.001", "0.01 (claimed 0.001)" or "? (claimed 0.001)".
    """

    path: Path
    name: str
    kind: str
    table: pd.DataFrame
    sigma: float | None
    alpha: float | None
    n: int | None
    alpha_text: str
    warnings: tuple[str, ...]
    identity: Identity | None = None  # of a record


def load_result(
    path: str | Path,
    *,
    alpha: float | None = None,
    sigma: float | None = None,
    n: int = 100_000,
    claimed: float = 0.001,
) -> Result:
    """Load a vote record (a folder with run.json) or a log (a file).

    Parameters
    ----------
    path : str or Path
        The folder or the file.
    alpha : float, optional
        Read a record at this failure probability; a log keeps its own and warns.
    sigma, n, claimed : float, int, float
        For logs: the noise level if the file name does not say, the samples and the alpha that the paper states.

    Raises
    ------
    ReportError, LogError, RecordError
        All ValueErrors of one line.
    """
    path = Path(path)
    if alpha is not None:
        check_alpha(alpha)
    if (path / "run.json").is_file():
        return _from_record(path, alpha)
    if path.is_dir():
        raise ReportError(_folder_without_record(path))
    if not path.exists():
        raise ReportError(f"{path}: no such file or folder; name a vote record (a folder with run.json) or a log")
    if zipfile.is_zipfile(path):
        raise ReportError(f"{path} is a zip file; unpack it and name the folder that holds run.json, or the log")
    return _from_log(path, alpha, sigma=sigma, n=n, claimed=claimed)


def _folder_without_record(path: Path) -> str:
    inside = sorted(path.iterdir())
    records = [child.name for child in inside if (child / "run.json").is_file()]
    if records:
        return f"{path} has no run.json, but holds records: name {records[0]}" + (" or another" if records[1:] else "")
    files = [child.name for child in inside if child.is_file()]
    hint = f"name a log in it, such as {files[0]}" if files else "name a vote record (a folder with run.json) or a log"
    return f"{path} is a folder without run.json, so no vote record; {hint}"


def _from_record(path: Path, alpha: float | None) -> Result:
    record = open_record(path)
    table = certificates(record, alpha=alpha)
    rule = record.stopping_rule
    begun = record.rows()["image_id"].nunique()
    warnings = []
    if begun > len(table):
        warnings.append(f"unfinished: {begun - len(table)} of {begun} images lack votes and count in no rate")
    used = rule.alpha if alpha is None else alpha
    return Result(
        path=path,
        name=path.name,
        kind="record",
        table=table,
        sigma=None if record.per_image else float(record.sigma),
        alpha=used,
        n=rule.n,
        alpha_text=f"{used:g}",
        warnings=tuple(warnings),
        identity=record.identity,
    )


def _from_log(path: Path, alpha: float | None, *, sigma: float | None, n: int, claimed: float) -> Result:
    log = read_log(path, sigma=sigma)
    warnings = [f"{problem}" for problem in log.problems]
    if alpha is not None:
        warnings.append(f"a log holds radii, not votes: it cannot be read at alpha = {alpha:g} and keeps its own")
    known, text = None, f"? (claimed {claimed:g})"
    if log.kind == "certify" and log.sigma is None:
        warnings.append("sigma is not known, so alpha is not checked; give sigma or name the file like sigma_0.25")
    elif log.kind == "certify":
        finding = infer_alpha(log.table, log.sigma, n, claimed)
        known, text = finding.alpha, finding.text
        if claimed not in finding.consistent:
            warnings.append(finding.sentence)
    return Result(
        path=path,
        name=path.name,
        kind=log.kind,
        table=log.table,
        sigma=log.sigma,
        alpha=known,
        n=n if known is not None else None,
        alpha_text=text,
        warnings=tuple(warnings),
    )


def about_records(records: Sequence[Record], alpha: float | None = None) -> str:
    """Data, base classifier, sigma, n0, n, alpha, noise and date of one or more vote records in a line, for a caption.

    What the records share is said once; what differs stands with each record's name.
    """
    if not records:
        raise ReportError("records must hold at least one record")
    said = [_about(record, alpha) for record in records]
    shared = [text for text in said[0] if all(text in other for other in said)]
    own = []
    for record, texts in zip(records, said, strict=True):
        rest = ", ".join(text for text in texts if text not in shared)
        name = record.path.name if record.path else "in memory"
        own.append(f"{name} ({rest})" if rest else name)
    return f"{', '.join(shared)}; record{'s' if len(own) > 1 else ''} {', '.join(own)}"


def _about(record: Record, alpha: float | None) -> list[str]:
    known, rule = record.identity, record.stopping_rule
    sampled = record.sampled()[:10]
    return [
        f"{known.dataset} {known.split} ({known.subset})",
        known.model,
        "a σ for each image" if record.per_image else f"σ = {record.sigma:g}",
        f"n0 = {rule.n0:,}",
        f"n = {rule.n:,}" if rule.kind == "fixed" else f"n up to {rule.n:,} (rule {rule.kind})",
        f"α = {rule.alpha if alpha is None else alpha:g}",
        f"{known.noise} noise",
        *([f"sampled {sampled}"] if sampled else []),
    ]


# --- reports -------------------------------------------------------------------------------------------


def report(paths: Sequence[str | Path], radii: Sequence[float], alpha: float | None = None) -> pd.DataFrame:
    """One row a record or log: rows, sigma, alpha, certified accuracy at each radius, ACR.

    Parameters
    ----------
    paths : sequence of str or Path
        Vote records and logs, mixed as you like.
    radii : sequence of float
        Radii of the columns, named "0", "0.25", ...; units of sigma.
    alpha : float, optional
        Read the records at this failure probability; logs keep their own.

    Returns
    -------
    DataFrame
        path, rows, sigma, alpha (text), one column a radius, ACR; with a prediction log among the paths also correct
        and abstain. `frame.attrs["warnings"]` is a list of strings, one line each, that belong on standard error.
    """
    results = [load_result(path, alpha=alpha) for path in paths]
    frame = pd.DataFrame([_row(result, radii) for result in results])
    if not any(result.kind == "predict" for result in results):
        frame = frame.drop(columns=["correct", "abstain"], errors="ignore")
    shared = [
        f"{a.path} and {b.path}: {SHARED_DRAWS}" for a, b in itertools.combinations(results, 2) if _share_draws(a, b)
    ]
    frame.attrs["warnings"] = [f"{result.path}: {text}" for result in results for text in result.warnings] + shared
    return frame


def _share_draws(a: Result, b: Result) -> bool:
    """Whether two records are read from the same noise by two rules."""
    if a.identity is None or b.identity is None or a.identity.stopping_rule == b.identity.stopping_rule:
        return False
    same = ("dataset", "split", "fingerprint", "sigma", "seed", "noise", "precision")
    return all(getattr(a.identity, name) == getattr(b.identity, name) for name in same)


def _row(result: Result, radii: Sequence[float]) -> dict[str, object]:
    table = result.table
    has_radii = result.kind != "predict"
    accuracy = certified_accuracy(table, radii)
    return {
        "path": str(result.path),
        "rows": len(table),
        "sigma": np.nan if result.sigma is None else result.sigma,
        "alpha": result.alpha_text,
        "correct": float(_right(table).mean()),
        "abstain": float((table["predict"] == ABSTAIN).mean()),
        **{f"{r:g}": float(value) if has_radii else np.nan for r, value in zip(radii, accuracy, strict=True)},
        "ACR": average_certified_radius(table) if has_radii else np.nan,
    }


def format_table(frame: pd.DataFrame, fmt: str = "table") -> str:
    """A table as text.

    Accuracies are rounded to nearest at three decimals. Radii (columns ACR and radius) are rounded down: three
    decimals, six in CSV. CSV keeps accuracies unrounded. What is not there is left blank.
    """
    if fmt not in FORMATS:
        raise ValueError(f"fmt must be one of {', '.join(FORMATS)}, got {fmt!r}")
    head = [str(name) for name in frame.columns]
    body = [[_cell(name, row[i], fmt) for i, name in enumerate(head)] for row in frame.itertuples(index=False)]
    if fmt == "csv":
        return pd.DataFrame(body, columns=head).to_csv(index=False, lineterminator="\n")
    right = [_is_numeric(frame.iloc[:, i]) for i in range(len(head))]
    return {"table": _plain, "markdown": _markdown, "latex": _latex}[fmt](head, body, right)


def _cell(name: str, value: object, fmt: str) -> str:
    if value is None or value is pd.NA or (isinstance(value, (float, np.floating)) and np.isnan(value)):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if not isinstance(value, (float, np.floating)) or name == "sigma":
        return f"{value:g}" if isinstance(value, (float, np.floating)) else str(value)
    if name.lower() in ("acr", "radius"):
        return round_down(float(value), 6 if fmt == "csv" else 3)
    return repr(float(value)) if fmt == "csv" else f"{value:.3f}"


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _aligned(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    cells = zip(row, widths, right, strict=True)
    return [text.rjust(width) if to_right else text.ljust(width) for text, width, to_right in cells]


def _plain(head: list[str], body: list[list[str]], right: list[bool]) -> str:
    widths = _widths([head, *body])
    return "".join("  ".join(_aligned(row, widths, right)).rstrip() + "\n" for row in [head, *body])


def _markdown(head: list[str], body: list[list[str]], right: list[bool]) -> str:
    rows = [[text.replace("\\", "\\\\").replace("|", "\\|") for text in row] for row in [head, *body]]
    widths = [max(3, width) for width in _widths(rows)]
    rule = ["-" * (width - 1) + ":" if to_right else "-" * width for width, to_right in zip(widths, right, strict=True)]
    lines = [_aligned(rows[0], widths, right), rule, *(_aligned(row, widths, right) for row in rows[1:])]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def _latex(head: list[str], body: list[list[str]], right: list[bool]) -> str:
    def line(row: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(character, character) for character in text) for text in row) + r" \\"

    columns = "".join("r" if to_right else "l" for to_right in right)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", line(head), r"\hline"]
    return "\n".join([*lines, *map(line, body), r"\hline", r"\end{tabular}"]) + "\n"
