"""The min rule: radii of one input-dependent classifier, and reading them again from records.

Where sigma is the same within R_sigma of an image and the class at that sigma within R_c, the classifier that chooses
sigma for itself keeps its class within min(R_sigma, R_c). What a selector of a kept run said stands beside the votes:

    FOLDER/run.json, parts/         votes at the sigma chosen for each image
    FOLDER/selector.npz             of a nearest-prototype selector: prototypes, their sigmas, R_sigma of each image
    FOLDER/selector/                of a smoothed selector: the record of its own votes, its classes standing for sigmas
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from smoothkit.certify import certificates
from smoothkit.records import Record, RecordError, open_record
from smoothkit.types import ABSTAIN, check_alpha

GEOMETRY, VOTES = "selector.npz", "selector"


def min_rule(sigma_radius: float, class_radius: float) -> float:
    """The radius of the input-dependent classifier: within it neither sigma changes nor the class at that sigma."""
    for name, radius in (("sigma_radius", sigma_radius), ("class_radius", class_radius)):
        if not radius >= 0:
            raise ValueError(f"{name} must be at least 0, an L2 radius in pixel units, got {radius}")
    return min(sigma_radius, class_radius)


def by_min_rule(table: pd.DataFrame, sigma_radius: np.ndarray, known: np.ndarray, *, alpha: float) -> pd.DataFrame:
    """Certificates of the input-dependent classifier from those at the chosen sigmas.

    Parameters
    ----------
    table : DataFrame
        As `certify.certificates`, at the sigma chosen for each image and the class's share of alpha.
    sigma_radius, known : float64 [N] and bool [N]
        Within which radius sigma stays, and whether that is proved; where it is not, the classifier abstains.
    alpha : float
        Failure probability in all.

    Returns
    -------
    DataFrame
        With `predict`, `radius`, `correct` and `alpha` made anew; `sigma_radius`, `class_radius`, `alpha_class` are added.
    """
    class_radius = table["radius"].to_numpy()
    answered = known & (table["predict"].to_numpy() != ABSTAIN)
    radius = [min_rule(r, c) if a else 0.0 for r, c, a in zip(sigma_radius, class_radius, answered, strict=True)]
    predict = np.where(answered, table["predict"], ABSTAIN)
    return table.assign(
        predict=predict,
        radius=radius,
        correct=(predict == table["label"]) & answered,
        alpha=alpha,
        sigma_radius=np.where(known, sigma_radius, 0.0),
        class_radius=class_radius,
        alpha_class=table["alpha"],
    )


def keep_geometry(
    folder: str | Path, prototypes: np.ndarray, sigmas: np.ndarray, image_ids: Sequence[int], radius: np.ndarray
) -> None:
    """Write what a nearest-prototype selector is and says: prototypes [M, C, H, W] with sigmas [M], R_sigma [N] of images."""
    np.savez_compressed(
        Path(folder) / GEOMETRY, prototypes=prototypes, sigmas=sigmas, image_ids=np.array(image_ids, np.int64), radius=radius
    )  # fmt: skip


def read_geometry(folder: str | Path) -> dict[str, np.ndarray]:
    """What `keep_geometry` wrote.

    Raises
    ------
    RecordError
        If it is missing or damaged.
    """
    path = Path(folder) / GEOMETRY
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {name: kept[name] for name in ("prototypes", "sigmas", "image_ids", "radius")}
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise RecordError(f"{path} cannot be read ({error}); restore it from a copy, or make the row again") from None


def read_sound(folder: str | Path, *, sigmas: Sequence[float] = (), alpha: float | None = None) -> pd.DataFrame:
    """Certificates of an input-dependent classifier, computed again from what its folder holds.

    Parameters
    ----------
    folder : path
        See the module's description.
    sigmas : the sigmas that a smoothed selector's classes stand for
    alpha : float, optional
        In all, the record's own by default. A smoothed selector takes half of it, geometry nothing.

    Returns
    -------
    DataFrame as `by_min_rule` gives it.

    Raises
    ------
    RecordError
        If the votes are not at the sigmas the selector chooses, or something is missing.
    """
    folder = Path(folder)
    record = open_record(folder)
    alpha = record.stopping_rule.alpha if alpha is None else alpha
    check_alpha(alpha)
    if (folder / GEOMETRY).is_file():
        kept = read_geometry(folder)
        table = certificates(record, alpha=alpha)
        radius = dict(zip(kept["image_ids"].tolist(), kept["radius"].tolist(), strict=True))
        if not set(table["image_id"]) <= radius.keys():
            raise RecordError(f"{folder / GEOMETRY} lacks images of the record; make the row again")
        sigma_radius = table["image_id"].map(radius).to_numpy(np.float64)
        return by_min_rule(table, sigma_radius, np.ones(len(table), dtype=bool), alpha=alpha)
    table = certificates(record, alpha=alpha / 2)
    choice = _smoothed_choice(folder, sigmas, alpha / 2).reindex(table["image_id"])
    if not np.array_equal(choice["sigma"].to_numpy(), table["sigma"].to_numpy()):
        raise RecordError(f"{folder}: the votes are not at the sigmas the selector chooses; make the row again")
    return by_min_rule(table, choice["radius"].to_numpy(), choice["known"].to_numpy(bool), alpha=alpha)


def _smoothed_choice(folder: Path, sigmas: Sequence[float], alpha: float) -> pd.DataFrame:
    selector: Record = open_record(folder / VOTES)
    table = certificates(selector, alpha=alpha)
    if len(sigmas) != selector.num_classes:
        raise RecordError(f"{folder / VOTES} has {selector.num_classes} classes, and there are {len(sigmas)} sigmas")
    chosen = {
        "sigma": np.array(sigmas, dtype=np.float64)[table["c_a"]],
        "radius": table["radius"].to_numpy(),
        "known": table["predict"].to_numpy() != ABSTAIN,
    }
    return pd.DataFrame(chosen, index=table["image_id"].to_numpy())
