"""What notebooks read from a table: rows at every noise level, over seeds, beside what was trained just now."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from smoothbook.tables.table import Table
from smoothkit.reading import certified_accuracy, compare

Curves = Mapping[str, pd.DataFrame]  # certificate tables by title


# --- certificates ------------------------------------------------------------------------------------


def curves_of(
    table: Table, names: Iterable[str] | Mapping[str, str], *, shared: bool = False
) -> dict[str, pd.DataFrame]:
    """Certificates by title of those rows that the table has and that are made; none of them is an empty dict.

    Parameters
    ----------
    table : Table
    names : iterable of row names, or a mapping from other titles to them
    shared : bool
        Only the images that all of these rows have.
    """
    titles = names if isinstance(names, Mapping) else None
    found = [name for name in (titles.values() if titles else names) if name in table and table[name].made]
    if not found:
        return {}
    curves = table.certificates(found, shared=shared)
    if titles is None:
        return curves
    kept = [title for title, name in titles.items() if name in found]
    return dict(zip(kept, curves.values(), strict=True))


def records_beside(curves: Curves, image_ids: Iterable[int]) -> dict[str, pd.DataFrame]:
    """The certificates of these images alone, as "TITLE, record", to stand beside what was certified live."""
    return {f"{title}, record": table[table["image_id"].isin(image_ids)] for title, table in curves.items()}


# --- differences -------------------------------------------------------------------------------------


def compare_at_each_sigma(
    curves: Mapping[float, Curves], reference: str, radii: Sequence[float] | Mapping[float, Sequence[float]]
) -> pd.DataFrame:
    """`reading.compare` at every noise level that has the reference and another row.

    Parameters
    ----------
    curves : mapping from sigma to certificate tables by title
    reference : str
        The title to compare with.
    radii : sequence of float, or a mapping from sigma to them
        L2 radii, pixel units on [0, 1].

    Returns
    -------
    DataFrame
        row, what (a radius as "0.25", or "ACR"), difference, low, high, verdict, sigma; no lines where nothing can be
        compared.
    """
    asked = radii if isinstance(radii, Mapping) else dict.fromkeys(curves, radii)
    parts = [
        compare(dict(found), reference, asked[sigma]).assign(sigma=sigma)
        for sigma, found in curves.items()
        if reference in found and len(found) > 1
    ]
    columns = ["row", "what", "difference", "low", "high", "verdict", "sigma"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def format_differences(differences: pd.DataFrame, radius: float, reference: str) -> pd.DataFrame:
    """A line for each noise level and row of `compare_at_each_sigma`: the differences at one radius and in ACR."""
    what, lines = f"{radius:g}", []
    for (sigma, row), part in differences.groupby(["sigma", "row"], sort=False):
        part = part.set_index("what")
        said = {f"{kind}, against {reference}": difference_text(part.loc[kind]) for kind in (what, "ACR")}
        lines.append({"sigma": sigma, "row": row, **said, "verdict on ACR": part["verdict"]["ACR"]})
    return pd.DataFrame(lines).rename(columns={f"{what}, against {reference}": f"at {what}, against {reference}"})


def difference_text(difference: pd.Series, digits: int = 3) -> str:
    """A line of a comparison as text: `+0.012 [-0.008, +0.031]`."""
    shown = [f"{difference[name]:+.{digits}f}" for name in ("difference", "low", "high")]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def seen(differences: pd.DataFrame, row: str, radius: float, curves: Mapping[float, Curves] | None = None) -> str:
    """What a comparison says of one row at one radius, for every noise level: `σ = 0.25: -0.01 [-0.03, +0.01]; ...`.

    With `curves` the certified accuracy of the row stands before its difference.
    """
    part = differences[(differences["row"] == row) & (differences["what"] == f"{radius:g}")]
    said = []
    for _, line in part.iterrows():
        share = f"{certified_accuracy(curves[line['sigma']][row], [radius])[0]:.2f}, " if curves else ""
        said.append(f"σ = {line['sigma']:g}: {share}{difference_text(line, 2)}")
    return "; ".join(said) or "row not made yet"


def compare_over_seeds(pairs: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]], radius: float) -> pd.DataFrame:
    """Two ways of training, each trained from several seeds, on the same images; paired 95% bootstrap intervals.

    The line `mean` averages each image over the seeds before images are drawn again. Its interval is about the choice of
    images as well; the spread over the seeds is what the lines above it show.

    Parameters
    ----------
    pairs : mapping from a seed to the certificate tables of both ways
    radius : float
        L2 radius, pixel units on [0, 1].

    Returns
    -------
    DataFrame
        seed, images, first, second (certified accuracy at the radius), difference, low, high.
    """
    sides = {seed: tuple(_certified(table, radius) for table in both) for seed, both in pairs.items()}
    if len(sides) > 1:
        sides["mean"] = tuple(sum(side) / len(side) for side in zip(*sides.values(), strict=True))
    lines = []
    for seed, (first, second) in sides.items():
        if not first.index.equals(second.index):
            raise ValueError(
                f"the two tables of seed {seed} are not of the same images; a paired comparison needs that"
            )
        low, high = _bootstrap_interval((first - second).to_numpy())
        apart = {"difference": (first - second).mean(), "low": low, "high": high}
        lines.append({"seed": seed, "images": len(first), "first": first.mean(), "second": second.mean(), **apart})
    return pd.DataFrame(lines, columns=["seed", "images", "first", "second", "difference", "low", "high"])


def _certified(table: pd.DataFrame, radius: float) -> pd.Series:
    """Whether each image is certified at the radius, 0 or 1, by image id."""
    right = table["correct"] & (table["radius"] >= radius)
    return pd.Series(right.to_numpy(np.float64), index=pd.Index(table["image_id"])).sort_index()


def _bootstrap_interval(apart: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    weights = np.random.default_rng(0).multinomial(len(apart), np.full(len(apart), 1 / len(apart)), size=draws)
    low, high = np.quantile(weights @ apart / len(apart), [0.025, 0.975])
    return float(low), float(high)


# --- cost --------------------------------------------------------------------------------------------


def trainings_behind(table: Table, names: Iterable[str]) -> list[str]:
    """The rows that were trained for these rows, the pretraining they start from among them; each training once."""
    behind = [other for name in names for other in (*table.rows[name].made_from, name)]
    return list({table.rows[name].training_digest(table.rows): name for name in behind}.values())


def cost_of_trainings(table: Table, ways: Mapping[str, Sequence[str]], again: str) -> pd.DataFrame:
    """What several ways cost for the first task, and for one more once their pretraining is there.

    Parameters
    ----------
    table : Table
    ways : mapping from a title to the names of its rows
        One row for each noise level; a way that is not made whole is left out.
    again : str
        The `images` of rows of the target task, whose trainings one more task needs again.

    Returns
    -------
    DataFrame
        row, trainings, images seen (steps times batch), seconds; and the same for one more task.
    """
    lines = []
    for title, names in ways.items():
        if not all(name in table and table[name].made for name in names):
            continue
        behind = trainings_behind(table, names)
        repeated = [name for name in behind if table.rows[name].images == again]
        first, more = _cost(table, behind), _cost(table, repeated)
        lines.append({"row": title, **first, **{f"one more task: {what}": value for what, value in more.items()}})
    return pd.DataFrame(lines)


def _cost(table: Table, names: Iterable[str]) -> dict[str, int | str]:
    cards = {name: table[name].card for name in names}
    seen_images = sum(card.steps * table.rows[name].batch for name, card in cards.items())
    seconds = round(sum(card.seconds for card in cards.values()))
    return {"trainings": len(cards), "images seen": f"{seen_images:,}", "seconds": seconds}
