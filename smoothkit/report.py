"""Tables from certificates: certified accuracy, average certified radius, and Cohen's tables cell by cell.

Everything here reads a table with a row an image and the columns idx, label, predict, radius, correct; where it
came from, a vote record or somebody's log, matters to `load_result` alone.
"""

import dataclasses
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from smoothkit.logs import infer_alpha, read_log, round_down
from smoothkit.types import ABSTAIN, check_alpha

if TYPE_CHECKING:
    from smoothkit.records import Record

FORMATS = ("table", "csv", "markdown", "latex")


class ReportError(ValueError):
    """A path that holds no result; the message says what was found and what would do."""


# --- rates ---------------------------------------------------------------------------------------------


def certified_accuracy(table: pd.DataFrame, radii: Sequence[float]) -> np.ndarray:
    """Certified accuracy at each radius, shape (radii,).

    The share of ALL rows, abstentions and errors included, that are correct with `radius >= r` (Cohen et al. 2019,
    Section 4). A prediction log has no radii and gets 0 throughout.
    """
    wanted = np.asarray(radii, dtype=np.float64).reshape(-1)
    if not (np.isfinite(wanted) & (wanted >= 0)).all():
        raise ValueError(f"radii must be finite and at least 0, got {list(radii)}")
    right, radius = _right(table), table["radius"].to_numpy(np.float64)
    return np.array([(right & (radius >= r)).mean() for r in wanted])


def average_certified_radius(table: pd.DataFrame) -> float:
    """ACR: mean over all rows of the radius where correct, else 0; units of sigma (Zhai et al., MACER, 2020)."""
    return float(np.where(_right(table), table["radius"].to_numpy(np.float64), 0.0).mean())


def certified_accuracy_interval(table: pd.DataFrame, r: float, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided Clopper-Pearson interval of the certified accuracy at r, over the choice of images.

    It speaks of images drawn like those certified; the failure probability alpha of each certificate is apart.
    """
    check_alpha(1 - level)
    rows = len(table)
    certified = round(float(certified_accuracy(table, [r])[0]) * rows)
    interval = stats.binomtest(certified, rows).proportion_ci(level, "exact")
    return float(interval.low), float(interval.high)


def envelope(tables: Mapping[str, pd.DataFrame], radii: Sequence[float]) -> pd.DataFrame:
    """The largest certified accuracy at each radius over several tables, and whose it is.

    No single classifier reaches an envelope: a curve drawn from it should be labelled as one (`frame.attrs["label"]`).

    Returns
    -------
    DataFrame
        Columns radius, envelope, which (a key of `tables`; the first on a tie).
    """
    if not tables:
        raise ValueError("an envelope needs at least one table")
    names = list(tables)
    values = np.stack([certified_accuracy(tables[name], radii) for name in names])  # [tables, radii]
    best = values.argmax(axis=0)
    frame = pd.DataFrame({"radius": list(radii), "envelope": values.max(axis=0), "which": [names[i] for i in best]})
    frame.attrs["label"] = f"envelope: largest of {len(names)} at each radius"
    return frame


def _right(table: pd.DataFrame) -> np.ndarray:
    missing = [name for name in ("predict", "radius", "correct") if name not in table]
    if missing:
        raise ValueError(f"a certificate table needs the columns predict, radius and correct; missing: {missing}")
    if table.empty:
        raise ValueError("the certificate table has no rows, so no rate; certify at least one image")
    return (table["correct"].astype(bool) & (table["predict"] != ABSTAIN)).to_numpy()


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
    from smoothkit.certify import certificates
    from smoothkit.records import open_record

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


def about_records(records: Sequence["Record"], alpha: float | None = None) -> str:
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


def _about(record: "Record", alpha: float | None) -> list[str]:
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
    frame.attrs["warnings"] = [f"{result.path}: {text}" for result in results for text in result.warnings]
    return frame


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


# --- Cohen's tables ------------------------------------------------------------------------------------

# Published to two decimals: analysis/latex/vary_noise_{cifar10,imagenet} of the code released with Cohen, Rosenfeld
# and Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019 (the paper's tables of certified
# accuracy, ResNet-110 and ResNet-50); ImageNet at radius 0 from the README there. Keys: dataset, sigma (equal in
# training and certification); a cell for each of COHEN_RADII, "-" where nothing is published.
COHEN_PUBLISHED: dict[str, dict[float, str]] = {
    "cifar10": {
        0.12: "-    0.59 0.00 0.00 0.00 0.00 0.00",
        0.25: "-    0.60 0.43 0.27 0.00 0.00 0.00",
        0.50: "-    0.55 0.41 0.32 0.23 0.15 0.09",
        1.00: "-    0.39 0.34 0.28 0.22 0.17 0.14",
    },
    "imagenet": {
        0.25: "0.67 0.49 0.00 0.00 0.00 0.00 0.00",
        0.50: "0.57 0.46 0.37 0.29 0.00 0.00 0.00",
        1.00: "0.44 0.38 0.33 0.26 0.19 0.15 0.12",
    },
}

COHEN_RADII = {"cifar10": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5), "imagenet": (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)}
_COHEN_MODEL = {"cifar10": "resnet110", "imagenet": "resnet50"}


@dataclasses.dataclass(frozen=True)
class Misprint:
    """A published number that the published logs contradict: where it stands, what it says, what they say."""

    where: str
    printed: str
    logs_say: str


KNOWN_MISPRINTS = (
    Misprint("README of the released code, ImageNet sigma 0.50, radius 1.0", "0.38", "0.372, so 0.37"),
    Misprint("README of the released code, ImageNet sigma 0.50, radius 1.5", "0.28", "0.286, so 0.29"),
    Misprint(
        "README of the released code, CIFAR-10 table (commented out)",
        "13 of its 18 cells above 0 differ, such as 0.24 for sigma 0.25 at radius 0.75",
        "0.266, so 0.27; the released logs do not give that table",
    ),
    Misprint(
        "Table 1 of the paper, ImageNet radius 2.0",
        "sigma 0.50, standard accuracy 57%",
        "sigma 1.00, standard accuracy 44%: sigma 0.50 cannot reach 2.0; the 19% is sigma 1.00",
    ),
    Misprint("ImageNet sigma 0.25", "a row like the others, of 500 images", "427 images: 0.67 and 0.49 are over 427"),
)


def cohen_log(root: str | Path, dataset: str, *, trained: float, sigma: float, split: str = "test") -> Path:
    """Where the released logs of Cohen et al. keep the certification of a model trained with one sigma at another."""
    if dataset not in _COHEN_MODEL:
        raise ReportError(f"dataset must be one of {', '.join(_COHEN_MODEL)}, got {dataset!r}")
    model = _COHEN_MODEL[dataset]
    return Path(root) / "certify" / dataset / model / f"noise_{trained:.2f}" / split / f"sigma_{sigma:.2f}"


def cohen_tables(root: str | Path) -> pd.DataFrame:
    """Cohen's tables of certified accuracy from the released logs, beside what was published.

    Parameters
    ----------
    root : str or Path
        The folder of the logs, which holds `certify/`.

    Returns
    -------
    DataFrame
        A row a cell: dataset, sigma, radius, measured, published (float, NaN where nothing was), rows (images in the
        log), agrees (to two decimals, rounded to nearest; NA where nothing was published).
    """
    if not (Path(root) / "certify").is_dir():
        raise ReportError(f"{root} has no folder certify; name the folder with the logs released by Cohen et al. 2019")
    cells = []
    for dataset, by_sigma in COHEN_PUBLISHED.items():
        for sigma, published in by_sigma.items():
            table = read_log(cohen_log(root, dataset, trained=sigma, sigma=sigma), sigma=sigma).table
            accuracy = certified_accuracy(table, COHEN_RADII[dataset])
            for r, measured, text in zip(COHEN_RADII[dataset], accuracy, published.split(), strict=True):
                agrees = pd.NA if text == "-" else f"{measured:.2f}" == text
                printed = np.nan if text == "-" else float(text)
                cells.append((dataset, sigma, r, measured, printed, len(table), agrees))
    names = ["dataset", "sigma", "radius", "measured", "published", "rows", "agrees"]
    return pd.DataFrame(cells, columns=names).astype({"agrees": "boolean"})
