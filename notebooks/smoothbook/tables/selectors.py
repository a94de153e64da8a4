"""Searches, tables and selectors from the settings of a row (`settings.Row`), and sampling votes with them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smoothbook.settings import check_keywords, read_settings
from smoothbook.sigma.search import ClampedRadius, FiniteSampleRadius, ReleasedRadius, SigmaSearch, search_sigma
from smoothbook.sigma.selectors import prototypes_by_sigma, wanted_of
from smoothbook.sigma.sound import GEOMETRY, VOTES, keep_geometry
from smoothbook.sigma.table import SigmaTable
from smoothbook.training import FitSettings, fit
from smoothkit.certify.bounds import check_reach
from smoothkit.data import Images
from smoothkit.models import BaseClassifier, fingerprint
from smoothkit.records import Record, compact, open_record, read_json, write_atomically
from smoothkit.sampling.run import collect_votes
from smoothkit.types import StoppingRule, check_samples, check_sigma

NewSelector = Callable[[int], BaseClassifier]  # number of classes -> an untrained base classifier
OBJECTIVES = {"clamped": ClampedRadius, "released": ReleasedRadius, "finite": FiniteSampleRadius}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the votes of a row are taken; batch, device, precision and compile as in `collect_votes`."""

    rule: StoppingRule
    seed: int  # of the noise, and of searching sigma: they share no draws
    progress: bool = True
    batch: int | None = None
    device: str | None = None
    precision: str = "float32"
    compile: bool | None = None

    def __post_init__(self) -> None:
        check_reach(self.rule.n, self.rule.alpha)

    def votes(self, model: Callable, images: Images, sigma: float | np.ndarray, out: Path | None) -> Record:
        """At one sigma, or one for each image; kept in the folder `out`, where an interrupted run goes on."""
        return collect_votes(
            model, images, sigma=sigma, stopping_rule=self.rule, seed=self.seed, out=out, batch=self.batch,
            device=self.device, precision=self.precision, compile=self.compile, progress=self.progress,
        )  # fmt: skip


# --- settings ----------------------------------------------------------------------------------------


def read_search(settings: dict[str, Any]) -> SigmaSearch:
    """`objective: clamped | released | finite` with its settings, and those of `SigmaSearch`."""
    settings = {"objective": "clamped"} | settings
    return read_settings(SigmaSearch, settings, where="search", parts={"objective": OBJECTIVES})


def read_table(sigma0: float, settings: dict[str, Any]) -> SigmaTable:
    """`fixed_for`, and the settings of a search; a step an epoch."""
    own = check_keywords("table", SigmaTable, {k: v for k, v in settings.items() if k == "fixed_for"})
    return SigmaTable(sigma0, read_search({k: v for k, v in settings.items() if k not in own}), **own)


@dataclasses.dataclass(frozen=True)
class Prototypes:
    """A nearest-prototype selector: `each` prototypes of every sigma, from sigmas searched on `train_images`."""

    sigmas: list[float]
    each: int
    train_images: str

    def __post_init__(self) -> None:
        _check_sigmas(self.sigmas)
        check_samples("each", self.each)

    def choose(
        self, images: Images, chosen: Images, found: np.ndarray, new: NewSelector, sampling: Sampling, out: Path
    ) -> np.ndarray:
        """A sigma for each image, from those `found` for the images `chosen` to make the selector, which is kept in `out`."""
        made = prototypes_by_sigma(chosen, found, sigmas=self.sigmas, each=self.each)
        choice = made.choose(images)
        keep_geometry(out, made.points.reshape(-1, *made.shape), made.sigmas, images.ids, choice.radius)
        return choice.sigma


@dataclasses.dataclass(frozen=True)
class SmoothedVotes:
    """A smoothed selector at noise `sigma_e`: the classifier `base`, trained to name the sigmas searched on `train_images`."""

    sigmas: list[float]
    sigma_e: float
    train_images: str
    epochs: int
    base: str

    def __post_init__(self) -> None:
        _check_sigmas([*self.sigmas, self.sigma_e])
        check_samples("epochs", self.epochs)

    def choose(
        self, images: Images, chosen: Images, found: np.ndarray, new: NewSelector, sampling: Sampling, out: Path
    ) -> np.ndarray:
        """As above; `out` keeps the votes of the selector."""
        sigmas = [float(s) for s in self.sigmas]
        wanted = dataclasses.replace(chosen, labels=wanted_of(found, sigmas), class_names=())
        how = FitSettings(
            schedule=self.sigma_e, epochs=self.epochs, batch=64, description="training the selector",
            out=out / "training", resume=True,
        )  # fmt: skip
        fitted = fit(new(len(sigmas)), wanted, how)
        unlabelled = dataclasses.replace(images, labels=np.full(len(images), -1), class_names=())
        record = sampling.votes(fitted.model, unlabelled, self.sigma_e, out / VOTES)
        counts = record.votes().set_index("image_id")["counts_selection"].loc[list(images.ids)]
        return np.array(sigmas)[[int(c.argmax()) for c in counts]]


SELECTORS = {"prototypes": Prototypes, "smoothed": SmoothedVotes}


@dataclasses.dataclass(frozen=True)
class _Chosen:
    kind: Prototypes | SmoothedVotes


def read_selector(settings: dict[str, Any]) -> Prototypes | SmoothedVotes:
    """`kind: prototypes | smoothed` with its settings."""
    return read_settings(_Chosen, settings, where="selector", parts={"kind": SELECTORS}).kind


def _check_sigmas(sigmas: list[float]) -> None:
    if not sigmas:
        raise ValueError("sigmas must not be empty; give several, as [0.18, 0.25, 0.35]")
    for sigma in sigmas:
        check_sigma(sigma)


# --- sampling ----------------------------------------------------------------------------------------


def sample_searched(
    model: BaseClassifier, images: Images, *, sigma0: float, search: dict[str, Any], sampling: Sampling, out: Path | None,
    selector: Prototypes | SmoothedVotes | None = None, train: Images | None = None, new_selector: NewSelector | None = None,
) -> Record:  # fmt: skip
    """Votes at the sigma found for each image, or at the one a selector chooses; an interrupted run goes on.

    Parameters
    ----------
    model, images, sampling
    sigma0, search
        Where the search begins (pixel units), and the settings that `read_search` takes.
    out : path, optional
        Gets `sigma.json`, the record `votes` and, of a selector, `selector.npz` or the record `selector`; see `sigma.sound`.
    selector, train, new_selector : optional
        A selector is made of the sigmas searched on `selector.train_images` of the training split, and needs `out`;
        `new_selector` gives an untrained base classifier of so many classes.
    """
    chosen = images if selector is None else train.take(selector.train_images)
    sigmas = _search(model, chosen, sigma0, search, sampling, out)
    if selector is not None:
        sigmas = selector.choose(images, chosen, sigmas, new_selector, sampling, out)
    return sampling.votes(model, images, sigmas, None if out is None else out / "votes")


def keep_selector(kept: Path, out: Path) -> None:
    """Copy what `sample_searched` left in `out` into the folder of a kept record."""
    if (out / GEOMETRY).is_file():
        write_atomically(kept / GEOMETRY, lambda file: file.write((out / GEOMETRY).read_bytes()))
    else:
        compact(open_record(out / VOTES), kept / VOTES)


def _search(
    model: BaseClassifier, images: Images, sigma0: float, search: dict[str, Any], sampling: Sampling, out: Path | None
) -> np.ndarray:
    """The sigmas of a search, from `out/sigma.json` where it was finished before."""
    about = {"fingerprint": fingerprint(model), "images": list(images.ids), "sigma0": sigma0, "search": search}
    about |= {"seed": sampling.seed}
    path = None if out is None else out / "sigma.json"
    if path is not None and path.is_file():
        kept = read_json(path, remedy="move it away and run again: the search finds the same", sigma=list)
        if {k: kept.get(k) for k in about} == about:
            return np.array(kept["sigma"])
    found = search_sigma(
        model, images, sigma0=sigma0, search=read_search(search), seed=sampling.seed, device=sampling.device,
        progress=sampling.progress,
    ).sigma  # fmt: skip
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(json.dumps(about | {"sigma": found.tolist()}).encode()))
    return found
