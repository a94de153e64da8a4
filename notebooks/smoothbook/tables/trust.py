"""What was tried to break the package, as its results are kept in data/trust: for reading."""

import math

import pandas as pd

from smoothbook.tables.table import data_folder
from smoothkit.records import read_json

SLACK = 1e-9  # of sums of float64 probabilities, as the referee allows


def trust_result(name: str) -> dict | None:
    """A result of `make faults`, `make coverage` and others from data/trust; None where it is not made yet.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    path = data_folder() / "trust" / f"{name}.json"
    return read_json(path, ValueError, "restore it", made_by=str) if path.is_file() else None


def rules_refereed(found: dict) -> pd.DataFrame:
    """The worst exact check of each certifying rule, a line a rule.

    Parameters
    ----------
    found : result of `make referee`, whose `rules` have rule, case, `of alpha` and held

    Returns
    -------
    DataFrame with rule, checks (how many), worst of alpha (the largest chance of a false claim over the alpha that is
    promised, rounded up to four decimals), at (the case of it), held.
    """
    lines = []
    for rule, part in pd.DataFrame(found["rules"]).groupby("rule", sort=False):
        worst = part.loc[part["of alpha"].idxmax()]
        share = math.ceil((worst["of alpha"] - SLACK) * 10_000) / 10_000
        lines.append((rule, len(part), f"{share:.4f}", worst["case"], "yes" if part["held"].all() else "NO"))
    return pd.DataFrame(lines, columns=["rule", "checks", "worst of alpha", "at", "held"])


def attacks_refereed(found: dict) -> pd.DataFrame:
    """The attacks of `make referee`: what was tried, and whether it was refused or found out."""
    lines = [(x["attack"], x["about"], "yes" if x["held"] else "NO") for x in found["attacks"]]
    return pd.DataFrame(lines, columns=["attack", "about", "refused or found out"])


def versions_tried(found: dict) -> pd.DataFrame:
    """The environments of `make versions`, a line each: versions of the main packages, tests, and how they went."""
    shown = ("torch", "timm", "peft", "diffusers", "numpy")
    lines = []
    for environment in found["environments"]:
        tests = " ".join(environment["tests"]).replace("--ignore=", "all but ", 1).replace("--ignore=", "and ")
        line = {"versions": environment["name"], **{p: environment["versions"][p] for p in shown}, "tests": tests}
        lines.append(line | {k: environment[k] for k in ("passed", "failed", "skipped")})
    return pd.DataFrame(lines)
