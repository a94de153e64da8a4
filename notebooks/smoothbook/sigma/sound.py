"""The min rule: radii of one input-dependent classifier, and reading them again from records.

Where sigma is the same within R_sigma of an image, the classifier that chooses sigma for itself is there the smoothed
classifier with that sigma, and keeps its class within min(R_sigma, R_c), R_c being that one's certified radius. What a
selector of a kept run said stands beside the votes:

    FOLDER/run.json, parts/         votes at the sigma chosen for each image
    FOLDER/selector.npz             of a nearest-prototype selector: prototypes, their sigmas, R_sigma of each image
    FOLDER/selector/                of a smoothed selector: the record of its own votes, its classes standing for sigmas
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from smoothkit.certify import certificates
from smoothkit.records import Record, RecordError, open_record
from smoothkit.types import ABSTAIN, check_alpha

GEOMETRY, VOTES = "selector.npz", "selector"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a selector says about N images.

    Parameters
    ----------
    sigma : float64 [N]
    radius : float64 [N]
        Sigma is the same for all inputs nearer than this; L2, pixel units.
    known : bool [N]
        Whether sigma at the image itself is proved; a selector that abstains proves nothing.
    alpha : float
        Chance that any of this is wrong for an image; 0 for geometry.
    """

    sigma: np.ndarray
    radius: np.ndarray
    known: np.ndarray
    alpha: float


def min_rule(sigma_radius: float | np.ndarray, class_radius: float | np.ndarray) -> float | np.ndarray:
    """The radius of the input-dependent classifier: within it neither sigma changes nor the class at that sigma."""
    for name, radius in (("sigma_radius", sigma_radius), ("class_radius", class_radius)):
        if not np.all(np.asarray(radius) >= 0):
            raise ValueError(f"{name} must be at least 0, an L2 radius in pixel units, got {radius}")
    return np.minimum(sigma_radius, class_radius)


def by_min_rule(table: pd.DataFrame, choice: Choice, *, alpha: float) -> pd.DataFrame:
    """Certificates of the input-dependent classifier from those at the chosen sigmas.

    Parameters
    ----------
    table : DataFrame
        As `certify.certificates`, at the sigma chosen for each image and the class's share of alpha.
    choice : Choice
        Of the images of the table, in its order. Where it is not known the classifier abstains.
    alpha : float
        Failure probability in all.

    Returns
    -------
    DataFrame
        With `predict`, `radius`, `correct` and `alpha` made anew; `sigma_radius`, `class_radius`, `alpha_class` are added.
    """
    answered = choice.known & (table["predict"].to_numpy() != ABSTAIN)
    predict = np.where(answered, table["predict"], ABSTAIN)
    return table.assign(
        predict=predict,
        radius=np.where(answered, min_rule(choice.radius, table["radius"].to_numpy()), 0.0),
        correct=(predict == table["label"]) & answered,
        alpha=alpha,
        sigma_radius=np.where(choice.known, choice.radius, 0.0),
        class_radius=table["radius"],
        alpha_class=table["alpha"],
    )


def choice_by_votes(votes: Record, sigmas: Sequence[float], ids: Iterable[int], *, alpha: float) -> Choice:
    """What a smoothed selector's own votes say about images (by id): the sigma its top class stands for, and how far it holds.

    `sigmas` are those its classes stand for, `alpha` is its failure probability for each image.
    """
    if len(sigmas) != votes.num_classes:
        raise RecordError(
            f"{votes.path or 'the selector'} has {votes.num_classes} classes, and there are {len(sigmas)} sigmas"
        )
    table = certificates(votes, alpha=alpha)
    table = table.iloc[places(table["image_id"], ids, votes.path or "the selector's votes")]
    sigma = np.array(sigmas, dtype=np.float64)[table["c_a"]]
    return Choice(sigma, table["radius"].to_numpy(), table["predict"].to_numpy() != ABSTAIN, alpha)


def places(kept: Iterable[int], ids: Iterable[int], where: object) -> np.ndarray:
    """Where images stand among those kept: int64 [N], by id."""
    place = {image_id: i for i, image_id in enumerate(kept)}
    if not set(ids) <= place.keys():
        raise RecordError(f"{where} lacks images of the record; make the row again")
    return np.array([place[image_id] for image_id in ids], dtype=np.int64)


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
        kept, table = read_geometry(folder), certificates(record, alpha=alpha)
        radius = kept["radius"][places(kept["image_ids"].tolist(), table["image_id"], folder / GEOMETRY)]
        known = np.ones(len(table), dtype=bool)
        return by_min_rule(table, Choice(table["sigma"].to_numpy(), radius, known, alpha=0.0), alpha=alpha)
    table = certificates(record, alpha=alpha / 2)
    choice = choice_by_votes(open_record(folder / VOTES), sigmas, table["image_id"], alpha=alpha / 2)
    if not np.array_equal(choice.sigma, table["sigma"]):
        raise RecordError(f"{folder}: the votes are not at the sigmas the selector chooses; make the row again")
    return by_min_rule(table, choice, alpha=alpha)
