"""Three radii that must not be mixed up, a global sigma chosen fairly, and what is an envelope only.

- *frozen*: of the smoothed classifier with the sigma of this image for all inputs; another classifier for each image.
- *memory*: what a memory promises about later questions, given all that was asked before.
- *sound*: of one input-dependent classifier, for fresh questions (`selectors`).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from smoothbook.sigma.memory import Memory
from smoothkit.reading import average_certified_radius, certified_accuracy
from smoothkit.types import ABSTAIN

READINGS = {
    "frozen": "the smoothed classifier with this image's sigma frozen; a different classifier for each image",
    "memory": "later questions only, in the order asked, as long as the memory is kept",
    "sound": "one deployed classifier, fresh questions, no memory",
}


def through_memory(memory: Memory, images: Sequence, table: pd.DataFrame) -> pd.DataFrame:
    """A table of certificates asked of a memory, image by image in the order of the table.

    Parameters
    ----------
    memory : Memory
    images : tensors or arrays [C, H, W], one a row of the table, in its order
    table : DataFrame
        As `certify.certificates` gives it.

    Returns
    -------
    DataFrame
        The table with the memory's `predict` and `radius` and with `correct` made anew, since a label may have been
        overwritten; `case` (see `memory.CASES`) and `asked`, the place in the order, are added.
    """
    answers = memory.answer_all(list(images), table["predict"].tolist(), table["radius"].tolist())
    predict = np.array([a.predicted for a in answers], dtype=np.int64)
    return table.assign(
        predict=predict,
        radius=[a.radius for a in answers],
        correct=(predict == table["label"].to_numpy()) & (predict != ABSTAIN),
        case=[a.case for a in answers],
        asked=np.arange(len(answers)),
    )


def three_radii(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Frozen, memory and sound certificates of the same images side by side, under names that say which is which.

    Parameters
    ----------
    tables : mapping from some of `READINGS` to certificates of the same images, by `image_id`

    Returns
    -------
    DataFrame with idx, label, key, image_id, and for each reading given `<reading>_predict`, `<reading>_radius`,
    `<reading>_sigma`. `frame.attrs["readings"]` says what each is about.
    """
    if not tables or not tables.keys() <= READINGS.keys():
        raise ValueError(f"readings must be some of {', '.join(READINGS)}, got {', '.join(tables) or 'none'}")
    joined = next(iter(tables.values())).set_index("image_id")[["idx", "label", "key"]]
    for name, table in tables.items():
        mine = table.set_index("image_id")[["predict", "radius", "sigma"]]
        if not mine.index.is_unique or set(mine.index) != set(joined.index):
            raise ValueError(f"the {name} certificates are of other images, or of some twice; certify the same images")
        joined = joined.join(mine.add_prefix(f"{name}_"))
    joined = joined.reset_index()
    joined.attrs["readings"] = {name: READINGS[name] for name in tables}
    return joined


def accuracy_by_reading(tables: Mapping[str, pd.DataFrame], radii: Sequence[float]) -> pd.DataFrame:
    """Certified accuracy at each radius, a row for each reading, with what the row is about.

    `tables` are as for `three_radii`; the columns are `reading`, `about`, one for each radius, and `acr`.
    """
    three_radii(tables)  # refuses other readings, and tables of different images
    rows = []
    for name, table in tables.items():
        shares = certified_accuracy(table, radii)
        row = {"reading": name, "about": READINGS[name]} | {f"{r:g}": s for r, s in zip(radii, shares, strict=True)}
        rows.append(row | {"acr": average_certified_radius(table)})
    return pd.DataFrame(rows)


@dataclasses.dataclass(frozen=True)
class GlobalSigma:
    """The best of several sigmas on a held-out split: `scores` by sigma, `by` what they are."""

    sigma: float
    scores: dict[float, float]
    by: str


def best_of_grid(
    held_out: Mapping[float, pd.DataFrame], *, at: float | None = None, certified: Sequence[int] = ()
) -> GlobalSigma:
    """One sigma for all images, by certified accuracy at a radius, or by ACR, on images that will not be certified.

    Choosing it on the certified images and reporting their best curve would be an envelope; for that, and labelled so,
    there is `smoothkit.reading.envelope`.

    Parameters
    ----------
    held_out : tables of certificates of the same held-out images, by sigma
    at : float, optional
        The radius that matters; the average certified radius if not given.
    certified : image ids that are or will be certified; none may be among the held-out ones

    Returns
    -------
    GlobalSigma; the smallest sigma where several are equally good.
    """
    if not held_out:
        raise ValueError("held_out must hold a table for at least one sigma")
    ids = [set(table["image_id"]) for table in held_out.values()]
    if any(i != ids[0] for i in ids):
        raise ValueError("the tables are of different images; certify the same held-out images at each sigma")
    shared = ids[0] & set(certified)
    if shared:
        raise ValueError(f"{len(shared)} held-out images are among those certified; choose sigma on other images")
    scores = {
        float(sigma): average_certified_radius(table) if at is None else float(certified_accuracy(table, [at])[0])
        for sigma, table in sorted(held_out.items())
    }
    by = "average certified radius" if at is None else f"certified accuracy at {at:g}"
    return GlobalSigma(max(scores, key=scores.get), scores, by)


def selector_in_words(table: pd.DataFrame) -> str:
    """Which sigmas a table of certificates has: each with its images if they are few, else their range.

    Of a sound selector also the share of its answers whose radius is limited by R_sigma and not by the class's own, and the
    median of R_sigma over them.
    """
    counts = table["sigma"].value_counts().sort_index()
    if len(counts) <= 5:
        said = "sigma " + ", ".join(f"{s:g} ({k} images)" for s, k in counts.items())
    else:
        low, middle, high = table["sigma"].min(), table["sigma"].median(), table["sigma"].max()
        said = f"sigma from {low:.2f} to {high:.2f}, median {middle:.2f}"
    if "sigma_radius" not in table:
        return said
    answered = table[table["predict"] != ABSTAIN]
    limited = answered["sigma_radius"] < answered["class_radius"]
    return f"{said}; R_sigma limits {limited.mean():.0%} of {len(answered)} answers, its median is {answered['sigma_radius'].median():.2f}"
