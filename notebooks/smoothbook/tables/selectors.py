"""Searches, tables and selectors from the settings of a row (`rows.Row`), and sampling votes with them."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smoothbook.settings import check_keywords, check_type
from smoothbook.sigma.search import ClampedRadius, FiniteSampleRadius, ReleasedRadius, SigmaSearch, search_sigma
from smoothbook.sigma.selectors import prototypes_by_sigma, wanted_of
from smoothbook.sigma.sound import GEOMETRY, VOTES, keep_geometry
from smoothbook.sigma.table import SigmaTable
from smoothkit.data import Images
from smoothkit.models import BaseClassifier, fingerprint
from smoothkit.records import Record, compact, open_record, read_json, write_atomically
from smoothkit.sampling.run import collect_votes
from smoothkit.types import StoppingRule, check_sigma

OBJECTIVES = {"clamped": ClampedRadius, "released": ReleasedRadius, "finite": FiniteSampleRadius}
SELECTORS = {
    "prototypes": ("kind", "sigmas", "each", "train_images"),
    "smoothed": ("kind", "sigmas", "sigma_e", "train_images", "epochs", "base"),
}


def parse_search(settings: dict[str, Any]) -> SigmaSearch:
    """`objective: clamped | released | finite` with its settings, and those of `SigmaSearch`."""
    settings = dict(settings)
    objective = settings.pop("objective", "clamped")
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ValueError(f"search: objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    of_objective = {f.name for f in dataclasses.fields(OBJECTIVES[objective])}
    of_search = {f.name for f in dataclasses.fields(SigmaSearch)} - {"objective"}
    _check_known("search", settings, of_objective | of_search)
    own = {k: settings.pop(k) for k in of_objective & settings.keys()}
    check_keywords("search", OBJECTIVES[objective], own)
    check_keywords("search", SigmaSearch, settings)
    made = OBJECTIVES[objective](**own)
    return SigmaSearch(objective=made, **settings)


def parse_table(sigma0: float, settings: dict[str, Any]) -> SigmaTable:
    """`fixed_for`, and the settings of a search; a step an epoch."""
    settings = dict(settings)
    share = {"fixed_for": settings.pop("fixed_for")} if "fixed_for" in settings else {}
    check_keywords("table", SigmaTable, share)
    return SigmaTable(sigma0, parse_search(settings), **share)


def check_selector(settings: dict[str, Any]) -> None:
    """Whether the settings describe a selector; ValueError if not."""
    if not isinstance(settings.get("kind"), str) or settings["kind"] not in SELECTORS:
        raise ValueError(f"selector: kind must be one of {', '.join(SELECTORS)}, got {settings.get('kind')!r}")
    _check_known("selector", settings, SELECTORS[settings["kind"]])
    missing = sorted(set(SELECTORS[settings["kind"]]) - settings.keys())
    if missing:
        raise ValueError(f"selector: {', '.join(missing)} missing")
    types = {
        "kind": str,
        "sigmas": list,
        "each": int,
        "sigma_e": float,
        "train_images": str,
        "epochs": int,
        "base": str,
    }
    for name, value in settings.items():
        check_type(f"selector: {name}", types[name], value)
    sigmas = [*settings["sigmas"], *([settings["sigma_e"]] if "sigma_e" in settings else [])]
    if not settings["sigmas"]:
        raise ValueError("selector: sigmas must not be empty; it is what there is to choose from")
    for sigma in sigmas:
        check_sigma(sigma)
    for name in ("each", "epochs"):
        if settings.get(name, 1) < 1:
            raise ValueError(f"selector: {name} must be at least 1, got {settings[name]}")


def _check_known(what: str, settings: dict[str, Any], known: Sequence[str] | set[str]) -> None:
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ValueError(f"{what}: unknown key {unknown[0]!r}; there are {', '.join(sorted(known))}")


# --- sampling ----------------------------------------------------------------------------------------


def sample_searched(
    model: BaseClassifier, images: Images, *, sigma0: float, search: dict[str, Any], out: Path | None, **sampling
) -> Record:
    """Votes at the sigma found for each image; an interrupted run goes on with the sigmas it had found.

    `out` gets `sigma.json` and the record `votes`; `sampling` is that of `_sample`.
    """
    found = _found(out, model, images, sigma0, search, sampling)
    return _sample(model, images, found, None if out is None else out / "votes", **sampling)


def sample_selected(
    model: BaseClassifier,
    images: Images,
    train: Images,
    *,
    sigma0: float,
    search: dict[str, Any],
    selector: dict[str, Any],
    new_selector: Callable[[int], BaseClassifier],
    out: Path,
    **sampling,
) -> Record:
    """Votes at the sigma a selector chooses for each image, and beside them what the selector said.

    Parameters
    ----------
    train : Images
        The training split. The selector is made of the sigmas searched on `selector["train_images"]` of it.
    new_selector : callable
        Number of classes -> an untrained base classifier for a smoothed selector.
    out : path
        Gets the record `votes`, and `selector.npz` or the record `selector`; see `sound`.
    """
    chosen = train.take(selector["train_images"])
    found = _found(out, model, chosen, sigma0, search, sampling)
    make = _by_prototypes if selector["kind"] == "prototypes" else _by_votes
    sigmas = make(images, chosen, found, selector, new_selector, out, sampling)
    return _sample(model, images, sigmas, out / "votes", **sampling)


def keep_selector(kept: Path, out: Path) -> None:
    """Copy what `sample_selected` left in `out` into the folder of a kept record."""
    if (out / GEOMETRY).is_file():
        write_atomically(kept / GEOMETRY, lambda file: file.write((out / GEOMETRY).read_bytes()))
    else:
        compact(open_record(out / VOTES), kept / VOTES)


def _by_prototypes(images, chosen, found, selector, new_selector, out: Path, sampling) -> np.ndarray:
    made = prototypes_by_sigma(chosen, found, sigmas=selector["sigmas"], each=selector["each"])
    choice = made.choose(images)
    points = made.points.reshape(-1, *made.shape)
    keep_geometry(out, points, made.sigmas, images.ids, choice.radius)
    return choice.sigma


def _by_votes(images, chosen, found, selector, new_selector, out: Path, sampling) -> np.ndarray:
    from smoothbook.training import FitSettings, fit

    sigmas = [float(s) for s in selector["sigmas"]]
    wanted = dataclasses.replace(chosen, labels=wanted_of(found, sigmas), class_names=())
    how = FitSettings(
        schedule=selector["sigma_e"], epochs=selector["epochs"], batch=64, lr=1e-3, weight_decay=0.05, seed=0,
        description="training the selector", out=out / "training", resume=True,
    )  # fmt: skip
    fitted = fit(new_selector(len(sigmas)), wanted, how)
    unlabelled = dataclasses.replace(images, labels=np.full(len(images), -1), class_names=())
    record = _sample(fitted.model, unlabelled, selector["sigma_e"], out / VOTES, **sampling)
    counts = record.votes().set_index("image_id")["counts_selection"].loc[list(images.ids)]
    return np.array(sigmas)[[int(c.argmax()) for c in counts]]


def _sample(
    model, images: Images, sigma, out: Path | None, *, n0: int, n: int, alpha: float, seed: int, **how
) -> Record:
    rule = StoppingRule(n0=n0, n=n, alpha=alpha)
    return collect_votes(model, images, sigma=sigma, stopping_rule=rule, seed=seed, out=out, **how)


def _found(
    out: Path | None, model, images: Images, sigma0: float, search: dict[str, Any], sampling: dict
) -> np.ndarray:
    """The sigmas of a search, from `out/sigma.json` where it was finished before."""
    about = {"fingerprint": fingerprint(model), "images": list(images.ids), "sigma0": sigma0, "search": search}
    about |= {"seed": sampling["seed"]}
    path = None if out is None else out / "sigma.json"
    if path is not None and path.is_file():
        kept = read_json(path, remedy="move it away and run again: the search finds the same", sigma=list)
        if {k: kept.get(k) for k in about} == about:
            return np.array(kept["sigma"])
    searching = {k: sampling[k] for k in ("seed", "progress", "device") if k in sampling}
    found = search_sigma(model, images, sigma0=sigma0, search=parse_search(search), **searching).sigma
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(json.dumps(about | {"sigma": found.tolist()}).encode()))
    return found
