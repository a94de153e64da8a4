"""Tables of certificates: from records, one row an image, by the rule they were sampled under."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from smoothkit.certify.bounds import sigma_of_proof
from smoothkit.certify.cascade import (
    NO_SCALE,
    alpha_per_statement,
    at_scale,
    certify_cascade,
    check_p0,
    check_sigmas,
)
from smoothkit.certify.fixed import certify_counts
from smoothkit.certify.sequential import certify_looks
from smoothkit.records.format import RecordError
from smoothkit.records.record import Record
from smoothkit.types import ABSTAIN, NoiseForm, check_alpha


def certificate_table(images: Mapping, predict: np.ndarray, radius: np.ndarray, **columns: object) -> pd.DataFrame:
    """The table that everything reads: idx, label, predict, radius, correct, then `columns`, then key and image_id.

    Parameters
    ----------
    images : DataFrame or mapping with index, label and image_id, and key if it is known; one entry an image
    predict : int array [images], ABSTAIN = -1 where nothing is certified
    radius : float64 array [images], rounded down
    columns : one value for all, or an array [images]
    """
    label = np.asarray(images["label"])
    known = {
        "idx": np.asarray(images["index"]), "label": label, "predict": predict, "radius": radius,
        "correct": (predict == label) & (predict != ABSTAIN), **columns,
        **({"key": np.asarray(images["key"])} if "key" in images else {}), "image_id": np.asarray(images["image_id"]),
    }  # fmt: skip
    return pd.DataFrame(known)


def certificates(record: Record, *, alpha: float | None = None, n: int | None = None) -> pd.DataFrame:
    """Certificates of all complete images of a record, by the rule it was sampled under.

    A record of fixed n can be read at any `alpha`, and at an `n` that is a block edge. One that stopped early accepts
    only its own rule: reading its counts as a fixed sample would take a second look for nothing.

    Parameters
    ----------
    record : Record
        With one sigma, or one for each image: that certificate holds of the smoothed classifier with *this* sigma for
        all inputs; it says nothing of a classifier that would choose another sigma nearby.
    alpha : float, optional
        Failure probability of each certificate; the record's own by default. It is per image: for m images at once,
        divide by m.
    n : int, optional
        Use only the first n estimation samples; a block edge of the record. Fix it before looking.

    Returns
    -------
    DataFrame with idx, label, predict (ABSTAIN = -1), radius (float64, rounded down), correct, sigma, n0, n (the samples
    taken), alpha, c_a, n_a, p_a_lower (what is proved of p_A), noise, key, image_id; one row an image, by idx. Images
    whose votes are not complete, or whose rule has not stopped, are left out.

    Raises
    ------
    RecordError
        If another alpha or n is asked of a record that stopped early, or no image is complete yet.
    """
    rule = record.stopping_rule
    if rule.kind == "fixed":
        return _of_fixed_n(record, rule.alpha if alpha is None else alpha, n)
    if alpha not in (None, rule.alpha) or n not in (None, rule.n):
        raise RecordError(
            f"{record.path or 'the record'} stopped early by the rule {rule.kind!r} at alpha={rule.alpha:g}; "
            f"it can be read by that rule only: leave alpha and n out"
        )
    return _of_looks(record)


def _of_fixed_n(record: Record, alpha: float, n: int | None) -> pd.DataFrame:
    check_alpha(alpha)
    votes = record.votes(n)
    if votes.empty:
        raise RecordError(
            f"{record.path or 'the record'} has no complete image yet; run the same command again to go on"
        )
    selection, estimation = (np.stack(votes[f"counts_{x}"].to_list()) for x in ("selection", "estimation"))
    sigma, n0, n_of = (votes[x].to_numpy() for x in ("sigma", "n0", "n"))
    proof = sigma_of_proof(sigma, NoiseForm.parse(record.identity.noise))
    found = certify_counts(selection, estimation, n_of, sigma=proof, alpha=alpha)
    settings = {"sigma": sigma, "n0": n0, "n": n_of, "alpha": alpha}
    return _with_settings(votes, found, settings, record)


def _of_looks(record: Record) -> pd.DataFrame:
    rule, looks = record.stopping_rule, record.looks()
    proof = float(sigma_of_proof(record.sigma, NoiseForm.parse(record.identity.noise)))
    finished, found = certify_looks(rule, proof, list(looks.itertuples()))
    if not len(finished):
        raise RecordError(
            f"{record.path or 'the record'} has no decided image yet; run the same command again to go on"
        )
    settings = {"sigma": record.sigma, "n0": rule.n0, "n": found.pop("n"), "alpha": rule.alpha}
    return _with_settings(looks.iloc[finished], found, settings, record)


def _with_settings(images: pd.DataFrame, found: dict, settings: dict, record: Record) -> pd.DataFrame:
    counted = {name: found[name] for name in ("c_a", "n_a", "p_a_lower")}
    return certificate_table(
        images, found["predict"], found["radius"], **settings, **counted, noise=record.identity.noise
    )


# --- the cascade -------------------------------------------------------------------------------------


def cascade_certificates(
    records: Mapping[float, Record] | Sequence[Record],
    *,
    alpha: float | None = None,
    p0: float = 0.5,
    rule: str = "max",
    upper: str = "runner-up",
    n: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Certificates of the images that all records hold complete: `certify_cascade` for a table.

    The theorem takes each scale's base classifier as it comes, one network for all scales or another for each. Equal
    seeds give the scales equal draws, scaled; that correlates their errors and leaves the certificates valid.

    Parameters
    ----------
    records : mapping from sigma to Record, or Records
        Votes on the same images, of fixed n, one record a scale. An image needs no votes at the scales below the one
        that `cascade` or `released` halts at; one that lacks others is left out.
    alpha : float, optional
        For each image, over all scales; the records' own by default.
    p0, rule, upper : as in `certify_cascade`
    n : int, optional
        Use only the first n estimation samples; a block edge of every record. Fix it before looking.
    sigmas : floats, optional
        Those of the cascade, if no image came to some of them so that there is no record. By default those that
        `sampling.cascade` wrote into the records, else the records' own. They share alpha whether asked or not.

    Returns
    -------
    DataFrame with idx, label, predict (ABSTAIN = -1), radius (rounded down), correct, scale (the sigma the certificate
    rests on, and which a halting rule halts at; NaN if none), reason, own_radius and negative_radius (R_k and R_neg of
    that scale; NaN if none), calls (base classifier calls the rule needs: of all scales for `max`, else from the largest
    to the one halted at), n0, n (of one scale), alpha (for `released` what is
    proved, K times that of a stage), alpha_statement (NaN for `released`), p0, rule, noise, key, image_id; one row an image, by idx.

    Raises
    ------
    RecordError
        If the records are not of the same images, or no image is complete in all of them.
    """
    by_sigma = _by_sigma(records)
    sigmas = _scales_of(list(by_sigma.values()), sigmas)
    if set(by_sigma) - set(sigmas) or sigmas[-1] not in by_sigma:
        raise RecordError(
            f"records at sigma {', '.join(f'{s:g}' for s in sorted(by_sigma))} do not fit sigmas {sigmas}"
        )
    chosen = [by_sigma[s] for s in sorted(by_sigma)]
    _check_same_data(chosen)
    alpha = _one_of({r.stopping_rule.alpha for r in chosen}, "alpha") if alpha is None else alpha
    about = chosen[-1].votes(n).set_index("image_id").sort_values("index")
    if about.empty:
        raise RecordError(f"no image is complete at the scale {sigmas[-1]:g}, which is asked first")
    votes = [by_sigma[s].votes(n).set_index("image_id") if s in by_sigma else about[:0] for s in sigmas]
    for v, sigma in zip(votes, sigmas, strict=True):
        both = v.index.intersection(about.index)
        if not np.array_equal(v["label"][both], about["label"][both]):
            raise RecordError(f"the record at sigma {sigma:g} gives other labels than the one at {sigmas[-1]:g}")
    num_classes = chosen[0].identity.num_classes
    counts = [
        np.stack([_counts_of(v[c], about.index, num_classes) for v in votes], axis=1) for c in _COUNTS
    ]  # [images, K, num_classes]
    samples, spent = (
        np.stack([v[list(columns)].sum(axis=1).reindex(about.index, fill_value=0).to_numpy() for v in votes], axis=1)
        for columns in (("n",), ("n0", "n"))
    )  # [images, K]
    proof = sigma_of_proof(np.array(sigmas), NoiseForm.parse(chosen[0].identity.noise))
    found = certify_cascade(*counts, n=samples, sigmas=proof, alpha=alpha, p0=p0, rule=rule, upper=upper)
    needed = np.arange(len(sigmas)) >= (0 if rule == "max" else np.maximum(found.scale, 0)[:, None])
    complete = ((samples > 0) | ~needed).all(axis=1)
    if not complete.any():
        raise RecordError(f"no image is complete at all of the scales {', '.join(f'{s:g}' for s in sigmas)}")
    none = found.scale == NO_SCALE
    table = certificate_table(
        about.reset_index(), found.predict, found.radius,
        scale=np.where(none, np.nan, np.array(sigmas)[found.scale]), reason=found.reason,
        own_radius=np.where(none, np.nan, at_scale(found.own, found.scale)),
        negative_radius=np.where(none, np.nan, at_scale(found.negative, found.scale)), calls=(spent * needed).sum(axis=1),
        n0=about["n0"].to_numpy(), n=about["n"].to_numpy(),
        alpha=min(1.0, alpha * len(sigmas)) if rule == "released" else alpha,
        alpha_statement=np.nan if rule == "released" else alpha_per_statement(alpha, len(sigmas)),
        p0=p0, rule=rule, noise=chosen[0].identity.noise,
    )  # fmt: skip
    return table[complete].reset_index(drop=True)


_COUNTS = ("counts_selection", "counts_estimation")


def _counts_of(votes: pd.Series, ids: pd.Index, num_classes: int) -> np.ndarray:
    """Counts [images, num_classes] of these images, zeros for those without votes."""
    found = dict(votes)
    nothing = np.zeros(num_classes, dtype=np.int64)
    return np.stack([found.get(i, nothing) for i in ids])


def error_rates(
    records: Mapping[float, Record] | Sequence[Record], *, p0: float = 0.5, n: int | None = None
) -> pd.DataFrame:
    """Where each scale fails, by the shares of its estimation votes: what fine-tuning is meant to move.

    Over-smoothing is that no class has a share above p0, over-confidence that a wrong one has. These are shares of
    images, from estimates and not from bounds; for comparison only.

    Returns
    -------
    DataFrame with sigma, images, right, over_smoothing, over_confidence; one row a scale, by sigma.
    """
    check_p0(p0)
    rows = []
    for sigma, record in sorted(_by_sigma(records).items()):
        votes = record.votes(n)
        if votes.empty:
            raise RecordError(f"the record at sigma {sigma:g} has no complete image yet")
        share = np.stack(votes["counts_estimation"].to_list()) / votes["n"].to_numpy()[:, None]
        above, right = share.max(axis=1) > p0, share.argmax(axis=1) == votes["label"].to_numpy()
        rows.append((sigma, len(votes), (above & right).mean(), (~above).mean(), (above & ~right).mean()))
    return pd.DataFrame(rows, columns=["sigma", "images", "right", "over_smoothing", "over_confidence"])


def _scales_of(records: Sequence[Record], sigmas: Sequence[float] | None) -> list[float]:
    """All scales of the cascade: those given, those the records were sampled for, or else those of the records."""
    sampled_for = {record.identity.scales for record in records if record.identity.scales}
    if sigmas is None:
        return sorted(_one_of(sampled_for, "scales")) if sampled_for else sorted(record.sigma for record in records)
    sigmas = check_sigmas(sigmas).tolist()
    if any(sorted(scales) != sigmas for scales in sampled_for):
        raise RecordError(
            f"the records were sampled for the scales {sorted(sampled_for)[0]}, which share alpha; got {sigmas}"
        )
    return sigmas


def _by_sigma(records: Mapping[float, Record] | Sequence[Record]) -> dict[float, Record]:
    if not isinstance(records, Mapping):
        records = list(records)
        if len({r.sigma for r in records}) < len(records):
            raise RecordError(f"a cascade needs one record a sigma, got {[r.sigma for r in records]}")
        records = {r.sigma: r for r in records}
    for sigma, record in records.items():
        if float(sigma) != record.sigma:
            raise RecordError(f"the record given for sigma {sigma:g} was sampled at {record.sigma}")
    if not records:
        raise RecordError("a cascade needs at least one record")
    return {record.sigma: record for record in records.values()}


def _check_same_data(records: Sequence[Record]) -> None:
    for what in ("dataset", "split", "num_classes", "noise"):
        _one_of({getattr(r.identity, what) for r in records}, what)
    digests: dict[int, str] = {}
    for record in records:
        rows = record.rows()
        for image_id, digest in zip(rows["image_id"], rows["digest"], strict=True):
            known = digests.setdefault(image_id, digest)
            if len(known) == len(digest) and known != digest:
                raise RecordError(f"the records hold different images under the id {image_id}")


def _one_of(values: set, what: str):
    if len(values) != 1:
        raise RecordError(f"the records of a cascade must agree in {what}, got {', '.join(map(str, sorted(values)))}")
    return next(iter(values))
