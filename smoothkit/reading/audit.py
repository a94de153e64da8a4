"""Checking a vote record that somebody else made: files, settings, digests, radii, and votes drawn again.

What cannot be checked, because the images or the classifier are not at hand, is said and never counted as passed.
Votes are equal where compute batch, road, device and versions are those of the record. Elsewhere a logit may
differ in its last bit and move the vote of a noisy copy that lies on the edge between two classes; of those votes at most
`votes_apart(samples)` an image and purpose are let pass, and the audit says what the radii are without them.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import special, stats

from smoothkit.certify.betting import log_wealth_above
from smoothkit.certify.bounds import sigma_of_proof
from smoothkit.certify.fixed import certify_counts
from smoothkit.certify.table import certificate_table, certificates
from smoothkit.reading.accuracy import average_certified_radius
from smoothkit.records.format import ESTIMATE, SELECT, RecordError, has_checksum, read_json, same_probe
from smoothkit.records.record import Record, open_record
from smoothkit.types import ABSTAIN, NoiseForm, StoppingRule, block_edges, check_sigma, round_down

if TYPE_CHECKING:
    from smoothkit.data import Images  # it brings torch; so do the imports inside functions here: reading needs none

PASSED, FAILED, NOT_CHECKED = "passed", "failed", "not checked"
EXIT = {PASSED: 0, FAILED: 1, NOT_CHECKED: 3}  # 2 is bad input, as of every command
SHARE_APART, LEAST_APART = 1e-3, 2  # of votes that another device or batch may move
ROUNDING = 1e-9  # relative; between two ways to compute one tail probability


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at: its name, a verdict, and a sentence."""

    name: str
    verdict: str
    what: str


@dataclasses.dataclass(frozen=True)
class Audit:
    """All checks of a record. The verdict is the worst: failed, else not checked, else passed."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> str:
        found = {check.verdict for check in self.checks}
        return next((v for v in (FAILED, NOT_CHECKED) if v in found), PASSED)

    @property
    def exit_status(self) -> int:
        return EXIT[self.verdict]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame([dataclasses.asdict(check) for check in self.checks])


def votes_apart(samples: int) -> int:
    """How many of an image's votes may differ where compute batch, device or versions do: 1 in 1,000, two at the least."""
    return max(LEAST_APART, int(SHARE_APART * samples))


def audit(
    path: str | Path,
    *,
    redraw: int = 20,
    seed: int | None = None,
    images: "Images | None" = None,
    base_classifier: Callable | None = None,
    device: str | None = None,
    compile: bool = False,
) -> Audit:
    """Check a record.

    Parameters
    ----------
    path : path of a record's folder
    redraw : int
        Images whose votes are drawn again, all of them, and compared; chosen at random.
    seed : int, optional
        Of that choice; a fresh one if not given, so that nobody can know it beforehand.
    images, base_classifier : optional
        What was certified, if the record's names do not lead to it: a folder of pictures that moved, a callable.
    device : str, optional
        Where votes are drawn again.
    compile : bool
        Compile the network where the record's was, up to a minute; else its votes are those of another road.

    Returns
    -------
    Audit
    """
    if redraw < 0:
        raise ValueError(f"redraw must be at least 0 images, got {redraw}")
    record = open_record(path)
    checks = list(_files(record))
    try:
        rows = record.rows()
        provenance = record.provenance()
    except RecordError as error:
        return Audit(record.path, (*checks, Check("rows", FAILED, str(error))))
    checks += [_settings(record, provenance), _keys(record, rows), _blocks(record, rows), *_radii(record)]
    at_hand, said = _images(record, rows, images)
    checks.append(_contents(rows, at_hand, said) if at_hand is not None else Check("images", NOT_CHECKED, said))
    classifier, said = _classifier(record, base_classifier)
    checks.append(Check("classifier", PASSED if classifier is not None else NOT_CHECKED, said))
    failed = any(check.verdict == FAILED for check in checks)
    if failed or at_hand is None or classifier is None or not redraw:
        why = (
            "a check before it failed"
            if failed
            else "it needs images and classifier"
            if redraw
            else "none was asked for"
        )
        checks.append(Check("votes drawn again", NOT_CHECKED, why))
    else:
        rng = np.random.default_rng(seed)
        how = dict(device=device, compile=compile)
        drawn, differs = _redraw(record, rows, provenance, at_hand, classifier, redraw, rng, how)
        checks.append(drawn)
        if differs and drawn.verdict == PASSED:
            checks.append(_vouched(record))
    return Audit(record.path, tuple(checks))


# --- what the folder says ----------------------------------------------------------------------------


def _files(record: Record) -> Iterator[Check]:
    parts, journals = record.parts(), record.journals()
    bad = []
    with_checksum = 0
    for part in parts:
        try:
            record.read_part(part)
            with_checksum += has_checksum(part)
        except RecordError as error:
            bad.append(str(error))
    if bad:
        yield Check("files", FAILED, "; ".join(bad))
        return
    stated = "sha256" in read_json(record.path / "run.json")
    older = len(parts) - with_checksum
    what = f"{len(parts)} parts read, pages fit their checksums" + (
        f", {with_checksum} their sha256" if with_checksum else ""
    )
    what += f"; {len(journals)} journals of unfinished runs" if journals else ""
    what += f"; {older} of an earlier version, without a sha256 of all" if older else ""
    what += "" if stated else "; run.json states no checksum"
    yield Check(
        "files", PASSED if parts or journals else NOT_CHECKED, what if parts or journals else "the record is empty"
    )


def _settings(record: Record, provenance: Sequence[dict[str, Any]]) -> Check:
    """What Identity and rule cannot refuse by themselves, and the card of a table's row if there is one."""
    known, faults = record.identity, []
    if not record.per_image:
        try:
            check_sigma(known.sigma)
        except ValueError as error:
            faults.append(str(error))
    try:
        NoiseForm.parse(known.noise)
    except ValueError:
        faults.append(f"noise {known.noise!r} is no form of noise")
    lacking = [
        p for p in provenance for part in p.get("parts", [p]) if not {"device", "compute_batch", "torch"} <= set(part)
    ]
    if lacking:
        faults.append(f"{len(lacking)} parts do not say device, compute batch and torch")
    card = record.path / "card.json"
    if card.is_file():
        try:
            stated = read_json(card, fingerprint=str)["fingerprint"]
            if stated != known.fingerprint:
                faults.append(f"card.json is of the classifier {stated}, the record of {known.fingerprint}")
        except RecordError as error:
            faults.append(str(error))
    if faults:
        return Check("settings", FAILED, "; ".join(faults))
    rule = known.stopping_rule
    where = "a sigma for each image" if record.per_image else f"sigma {known.sigma:g}"
    return Check(
        "settings", PASSED, f"{where}, noise {known.noise}, {rule.kind} n0={rule.n0} n={rule.n} alpha={rule.alpha:g}"
    )


def _keys(record: Record, rows: pd.DataFrame) -> Check:
    """Ids follow from names or contents: otherwise two images might share their noise, or one be certified as another."""
    from smoothkit.kernels.philox import image_id

    about = rows[["index", "key", "image_id", "digest", "label"]].drop_duplicates()
    if about["image_id"].duplicated().any():
        twice = about.loc[about["image_id"].duplicated(), "key"].iloc[0]
        return Check("image ids", FAILED, f"image {twice} has more than one index, key, digest or label")
    known = record.identity
    if known.dataset.partition(":")[0] in ("folder", "parquet"):  # their paths may have been cut from the name
        return Check("image ids", PASSED, f"{len(about)} images, each with an id of its own")
    odd = [
        key
        for key, id_, digest in about[["key", "image_id", "digest"]].itertuples(index=False)
        if id_ not in (image_id(f"{known.dataset}:{known.split}:{key}"), int(digest, 16))
        and f"{id_:014x}" != key  # images of a tensor are named by their contents
    ]
    if odd:
        return Check("image ids", FAILED, f"{len(odd)} ids do not follow from the images' names, such as {odd[0]}")
    return Check("image ids", PASSED, f"{len(about)} images, each with an id of its name or contents")


def _blocks(record: Record, rows: pd.DataFrame) -> Check:
    rule = record.stopping_rule
    wanted = {SELECT: block_edges(rule.n0), ESTIMATE: rule.edges()}
    allowed = {(p, a, b) for p, edges in wanted.items() for a, b in itertools.pairwise(edges)}
    found = collections.Counter(rows[["purpose", "start", "stop"]].itertuples(index=False, name=None))
    odd = sorted(set(found) - allowed)
    if odd:
        return Check("blocks", FAILED, f"block {odd[0]} is none of the stopping rule's; {len(odd)} such")
    if (rows["counts"].map(min) < 0).any():
        return Check("blocks", FAILED, "a count is below 0")
    return Check(
        "blocks",
        PASSED,
        f"{len(rows):,} blocks, {int((rows['stop'] - rows['start']).sum()):,} samples, all of the rule's grid",
    )


# --- radii -------------------------------------------------------------------------------------------


def _radii(record: Record) -> Iterator[Check]:
    """Each radius computed from the counts, then proved a second way: by the tail, without inverting anything."""
    try:
        table = certificates(record)
    except RecordError as error:
        yield Check("radii", NOT_CHECKED, str(error))
        return
    claimed = table[table["predict"] != ABSTAIN]
    p_r = special.ndtr(claimed["radius"] / claimed["sigma"]).to_numpy()
    if record.stopping_rule.kind == "fixed":
        chance = stats.binom.sf(claimed["n_a"] - 1, claimed["n"], p_r)  # of so many votes if p_A were what it needs
        proved = chance <= claimed["alpha"] * (1 + ROUNDING)
    else:
        proved = _proved_at_some_look(record, claimed, p_r)
    wrong = claimed[~np.asarray(proved, dtype=bool)]
    if len(wrong):
        worst = wrong.iloc[0]
        such = f"such as {worst['radius']:.4f} of image {worst['key']}"
        yield Check("radii", FAILED, f"{len(wrong)} radii are not proved by the counts, {such}")
        return
    proved = f"{len(claimed)} radii, each proved from the counts by its tail probability"
    yield Check("radii", PASSED, f"{len(table)} images, {proved}")


def _proved_at_some_look(record: Record, claimed: pd.DataFrame, p_r: np.ndarray) -> list[bool]:
    rule, looks = record.stopping_rule, record.looks().set_index("image_id")["estimation"]
    answers = []
    for image, c_a, p in zip(claimed["image_id"], claimed["c_a"], p_r, strict=True):
        h = looks.loc[image][:, c_a].cumsum()
        t = np.array(rule.looks[: len(h)])
        answers.append(bool((_evidence(rule, h, t, min(p, 1 - 1e-16)) >= -ROUNDING).any()))
    return answers


def _evidence(rule: StoppingRule, h: np.ndarray, t: np.ndarray, p: float) -> np.ndarray:
    """At each look, by how much the log evidence against p_A <= p exceeds what the rule asks for."""
    if rule.kind == "staged":
        return np.log(rule.alpha / len(rule.looks)) - stats.binom.logsf(h - 1, t, p)
    share = rule.alpha if rule.kind == "kt" else rule.alpha / 2
    by_wealth = log_wealth_above(h, t, p) + np.log(share)
    if rule.kind == "kt":
        return by_wealth
    return np.maximum(by_wealth, np.where(t == rule.n, np.log(share) - stats.binom.logsf(h - 1, t, p), -np.inf))


# --- images, classifier, votes -----------------------------------------------------------------------


def _images(record: Record, rows: pd.DataFrame, images: "Images | None") -> tuple["Images | None", str]:
    from smoothkit import data

    known = record.identity
    if images is None:
        name = "cifar10" if known.dataset.startswith("cifar10") else known.dataset
        try:
            images = data.load(name, split=known.split, subset=known.subset)
        except (ValueError, OSError, ImportError) as error:
            return None, f"{known.dataset} is not at hand: {' '.join(str(error).split())}"
    kind = known.dataset.partition(":")[0]
    if kind in ("folder", "parquet") and images.dataset.startswith(f"{kind}:"):  # wherever it lies: known by its keys
        ids = dict(zip(rows["key"], rows["image_id"], strict=True))
        images = dataclasses.replace(
            images,
            dataset=known.dataset,
            ids=tuple(ids.get(key, own) for key, own in zip(images.keys, images.ids, strict=True)),
        )
    if images.dataset != known.dataset:
        return None, f"{images.dataset} is at hand where the record is of {known.dataset}"
    return images, images.name


def _contents(rows: pd.DataFrame, images: "Images", name: str) -> Check:
    from smoothkit.data import UNLABELLED

    recorded = dict(zip(rows["image_id"], rows["digest"], strict=True))
    labels = dict(zip(rows["image_id"], rows["label"], strict=True))
    place = {image: i for i, image in enumerate(images.ids)}
    missing = [image for image in recorded if image not in place]
    if missing:
        return Check("images", FAILED, f"{len(missing)} recorded images are not in {name}")
    odd = [
        images.keys[place[i]] for i, digest in recorded.items() if images.digest(place[i], 4 * len(digest)) != digest
    ]
    if odd:
        return Check("images", FAILED, f"{len(odd)} images differ from those recorded, such as {odd[0]}")
    stated = {} if set(labels.values()) == {UNLABELLED} else labels  # votes of a selector have none
    odd = [images.keys[place[i]] for i, label in stated.items() if int(images.labels[place[i]]) != label]
    if odd:
        return Check("images", FAILED, f"{len(odd)} labels differ from those recorded, such as that of {odd[0]}")
    return Check("images", PASSED, f"{len(recorded)} images of {name} have the digests and labels recorded")


def _classifier(record: Record, base_classifier: Callable | None) -> tuple[Callable | None, str]:
    """The base classifier that the fingerprint asks for, wherever it can be found."""
    from smoothkit import models

    known, tried = record.identity, []
    for find in (lambda: base_classifier, lambda: models.load(known.model)):
        try:
            found = find()
            if found is None:
                continue
            at_hand = models.identify(found, known.model)
        except (ValueError, OSError, ImportError, KeyError) as error:
            tried.append(" ".join(str(error).split()))
            continue
        if at_hand.fingerprint == known.fingerprint:
            kind = (
                "structure, weights and answers"
                if known.probe
                else "structure and weights; of an earlier version, without answers"
            )
            return found, f"{at_hand.name} has the fingerprint {known.fingerprint} ({kind})"
        tried.append(f"{at_hand.name} has the fingerprint {at_hand.fingerprint}")
    return None, f"the classifier {known.fingerprint} is not at hand: {'; '.join(tried)}"


def _redraw(
    record: Record,
    rows: pd.DataFrame,
    provenance: Sequence[dict[str, Any]],
    images: "Images",
    base_classifier: Callable,
    number: int,
    rng: np.random.Generator,
    how: dict[str, Any],
) -> tuple[Check, list[str]]:
    """Draw all recorded blocks of some images again, at the compute batch of the record's last part."""
    from smoothkit.sampling.batches import Task
    from smoothkit.sampling.run import provenance as here
    from smoothkit.sampling.stream import PURPOSES, VoteStream

    known = record.identity
    ways = [way for p in provenance for way in p.get("parts", [p])]
    way = ways[-1]
    begun = rows["image_id"].unique()
    chosen = rng.choice(begun, size=min(number, len(begun)), replace=False)
    mine = rows[rows["image_id"].isin(chosen)]
    place = {image: i for i, image in enumerate(images.ids)}
    sigma = known.sigma
    if record.per_image:
        kept = dict(zip(rows["image_id"], rows["sigma"], strict=True))
        sigma = [kept.get(i, 1.0) for i in images.ids]
    stream = VoteStream(
        base_classifier,
        images,
        sigma=sigma,
        seed=known.seed,
        noise=known.noise,
        batch=way["compute_batch"],
        precision=known.precision,
        device=how["device"],
        compile=how["compile"] and way.get("road", "").startswith("compiled"),
        fingerprint=known.fingerprint,
    )
    tasks = [
        Task(place[i], PURPOSES[p], a, b)
        for i, p, a, b in mine[["image_id", "purpose", "start", "stop"]].itertuples(index=False)
    ]
    recorded = {
        (place[i], p, a): np.array(c)
        for i, p, a, c in mine[["image_id", "purpose", "start", "counts"]].itertuples(index=False)
    }
    apart, samples = collections.Counter(), collections.Counter()
    for task, counts, _ in stream.run(tasks):
        purpose = task.purpose.name.lower()
        moved = np.abs(counts - recorded[task.image, purpose, task.start]).sum()
        apart[task.image, purpose] += int(moved + 1) // 2  # a moved vote changes two counts
        samples[task.image, purpose] += task.stop - task.start
    if not same_probe(known.probe, stream.forward.answers.text):
        what = "the classifier has the record's structure and weights, and answers otherwise on the fixed rows"
        return Check("votes drawn again", FAILED, what), []
    now = here(stream.device, stream.batch, stream.road)
    differs = [name for name in SAME if any(w.get(name) != now[name] for w in ways)]
    return _compared(apart, samples, images, differs), differs


def without_votes(record: Record, moved: int) -> pd.DataFrame:
    """The certificates of a record of fixed n if so many votes of each image for its guessed class were taken away."""
    votes = record.votes()
    selection, estimation = (np.stack(votes[f"counts_{x}"].to_list()) for x in ("selection", "estimation"))
    image, c_a = np.arange(len(votes)), selection.argmax(axis=1)
    estimation[image, c_a] -= np.minimum(moved, estimation[image, c_a])
    sigma = sigma_of_proof(votes["sigma"].to_numpy(), NoiseForm.parse(record.identity.noise))
    found = certify_counts(selection, estimation, votes["n"].to_numpy(), sigma=sigma, alpha=record.stopping_rule.alpha)
    return certificate_table(votes, found["predict"], found["radius"])


def _vouched(record: Record) -> Check:
    """What is left of the radii if every vote that may differ was moved on purpose: this much an audit vouches for."""
    if record.stopping_rule.kind != "fixed":
        return Check(
            "radii without them", NOT_CHECKED, "the record stopped early; what moved votes would do to it is not known"
        )
    moved = votes_apart(record.stopping_rule.n)
    stated, left = (average_certified_radius(t) for t in (certificates(record), without_votes(record, moved)))
    what = f"if {moved} votes of every image were moved, its ACR is {round_down(left)} and not {round_down(stated)}"
    return Check("radii without them", PASSED, f"{what}; draw again on the record's own device to tell")


SAME = ("device", "cpu", "compute_batch", "road", "threads", "torch")  # what votes may depend on in a last bit


def _compared(
    apart: collections.Counter, samples: collections.Counter, images: "Images", differs: Sequence[str]
) -> Check:
    total, drawn = sum(apart.values()), sum(samples.values())
    of = f"{len({image for image, _ in samples})} images, {drawn:,} votes drawn again"
    allowed = {key: votes_apart(n) if differs else 0 for key, n in samples.items()}
    over = [key for key in samples if apart[key] > allowed[key]]
    because = (
        f"{', '.join(differs)} not known to be the record's" if differs else "same device, batch, road and versions"
    )
    if over:
        image, purpose = over[0]
        what = f"{apart[over[0]]} of {samples[over[0]]:,} {purpose} votes of image {images.keys[image]} differ, {allowed[over[0]]} allowed"
        return Check("votes drawn again", FAILED, f"{of} ({because}): {what}; {len(over)} such")
    within = (
        f"{total} differ; at most {max(allowed.values())} an image and purpose are let pass" if total else "all equal"
    )
    return Check("votes drawn again", PASSED, f"{of} ({because}): {within}")
