"""Every rule that certifies, against exact probabilities; and every known way to a certificate of something else: `make referee`.

For a rule: the chance of a false claim, by summing over all counts or by dynamic programming, never by simulation, at the
probabilities where it is largest; as a multiple of alpha it must not exceed 1. For an attack: what was tried, and whether
it was refused or found out. A rule of the package that is not listed here fails a test.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from results import ROOT, keep
from scipy import special, stats
from torch import nn

from smoothbook.adapters import lora
from smoothkit import Smoothed, certificates, data, models, open_record
from smoothkit.certify import sequential_rule
from smoothkit.certify.betting import decision_probabilities
from smoothkit.certify.bounds import clopper_pearson_lower, sigma_of_proof
from smoothkit.certify.cascade import RULES as CASCADE_RULES
from smoothkit.certify.cascade import cascade_radii, certify_cascade
from smoothkit.certify.fixed import predict_counts
from smoothkit.certify.sequential import boundaries, lower_bounds
from smoothkit.reading import audit
from smoothkit.reading.audit import votes_apart, without_votes
from smoothkit.records import ESTIMATE, RecordError, Row, create_record
from smoothkit.types import ABSTAIN, RULE_KINDS, NoiseForm

SLACK = 1e-9  # relative; of sums of float64 probabilities
ALPHAS = (0.1, 0.01, 1e-3, 1e-6)


# --- rules: (what, chance of a false claim, alpha that is promised) -------------------------------------

Case = tuple[str, float, float]


def fixed(thorough: bool) -> Iterator[Case]:
    """CERTIFY: the largest chance that the bound lies above p is just below one of its own values."""
    for n in (12, 100, 1_000, 10_000)[: None if thorough else 3]:
        for alpha in ALPHAS:
            lower = clopper_pearson_lower(np.arange(n + 1), n, alpha)
            p = np.nextafter(lower[1:], 0)  # at each, every larger bound is a false one
            yield f"n = {n:,}", float(stats.binom.sf(np.arange(1, n + 1) - 1, n, p).max()), alpha


def predict(thorough: bool) -> Iterator[Case]:
    """PREDICT between two equal classes, and three: naming one given class is an error."""
    for n in (12, 40, 200):
        for alpha in (0.1, 0.01, 1e-3):
            if 2.0 ** (1 - n) > alpha:
                continue
            k = np.arange(n + 1)
            answers = predict_counts(np.stack([k, n - k], axis=1), n, alpha=alpha)
            yield f"two classes, n = {n}", float(stats.binom.pmf(k, n, 0.5)[answers == 0].sum()), alpha


def at_one_radius(kind: str) -> Callable[[bool], Iterator[Case]]:
    def cases(thorough: bool) -> Iterator[Case]:
        """At the probability that the radius needs, where certifying it is false; looks after every few draws."""
        for n_max, looks in ((60, range(1, 61)), (2_000, range(50, 2_001, 50)))[: None if thorough else 1]:
            for alpha in (0.1, 0.01, 1e-3):
                for r in (0.0, 0.1, 0.25):
                    rule = sequential_rule([r], kind=kind, n_max=n_max, alpha=alpha, beta=alpha, looks=list(looks))
                    up, down = boundaries(rule, 0.25)
                    p = float(special.ndtr(r / 0.25))
                    chance = decision_probabilities(rule.looks, up[0], down[0], p)["certified"]
                    yield f"radius {r:g}, {len(looks)} looks up to {n_max:,}", chance, alpha

    return cases


def to_radius(thorough: bool) -> Iterator[Case]:
    """The chance that any of the bounds at the looks ever lies above p; nothing is given up."""
    looks = np.arange(5, 201, 5)
    for alpha in (0.1, 0.01):
        rule = sequential_rule(within=1e-6, n_max=200, alpha=alpha, looks=looks.tolist())
        h, t = np.meshgrid(np.arange(201), looks)
        bound = lower_bounds(rule, np.minimum(h, t), t)
        for p in (0.5, 0.7, 0.9, 0.99):
            up = np.array([np.searchsorted(row[: m + 1], p, side="right") for row, m in zip(bound, looks, strict=True)])
            chance = decision_probabilities(looks, up, np.full(len(looks), -1), p)["certified"]
            yield f"p_A = {p:g}, {len(looks)} looks", chance, alpha


def cascade(rule: str) -> Callable[[bool], Iterator[Case]]:
    def cases(thorough: bool) -> Iterator[Case]:
        """Two scales, two classes: all pairs of counts, each scale's guess drawn apart, over a grid of probabilities."""
        n, alpha, sigmas = 16, 0.1, (0.5, 1.0)
        k = np.arange(n + 1)
        counts = np.stack([k, n - k], axis=1)
        pairs = np.stack([np.repeat(counts, n + 1, 0), np.tile(counts, (n + 1, 1))], axis=1)  # [pairs, 2, classes]
        grid = np.linspace(0.02, 0.98, 49 if thorough else 17)
        worst = 0.0
        for guess in ((0, 0), (0, 1), (1, 0), (1, 1)):
            select = np.broadcast_to(np.eye(2, dtype=np.int64)[list(guess)], pairs.shape)
            found = certify_cascade(select, pairs, n=n, sigmas=sigmas, alpha=alpha, rule=rule)
            for p in np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2):
                true = cascade_radii(*[np.stack([p, 1 - p], axis=1)] * 2, sigmas=sigmas).max(axis=0)
                false = (found.predict != ABSTAIN) & (found.radius > true[found.predict])
                chances = stats.binom.pmf(pairs[false, 0, 0], n, p[0]) * stats.binom.pmf(pairs[false, 1, 0], n, p[1])
                worst = max(worst, float(chances.sum()))
        yield f"two scales, n = {n}", worst, alpha * len(sigmas) if rule == "released" else alpha

    return cases


def least_of_two(thorough: bool) -> Iterator[Case]:
    """A radius that is the least of two: equal, opposed and independent draws, each claim with a share of alpha."""
    n, alpha = 60, 0.1
    lower = clopper_pearson_lower(np.arange(n + 1), n, alpha / 2)
    joint = {"equal": lambda a, b: np.diag(a), "opposed": lambda a, b: np.diag(a)[:, ::-1], "independent": np.outer}
    for how, law in joint.items():
        worst = 0.0
        for p in (0.5, 0.6, 0.8, 0.95):
            q = 1 - p if how == "opposed" else p
            chances = law(stats.binom.pmf(np.arange(n + 1), n, p), stats.binom.pmf(np.arange(n + 1), n, p))
            claim = np.minimum(special.ndtri(lower)[:, None], special.ndtri(lower)[None, :])
            worst = max(worst, float(chances[claim > min(special.ndtri(p), special.ndtri(q))].sum()))
        yield f"{how} draws, n = {n}", worst, alpha


RULES = {
    "fixed": fixed, "predict": predict, **{kind: at_one_radius(kind) for kind in ("hybrid", "kt", "staged")},
    "radius": to_radius, **{f"cascade {rule}": cascade(rule) for rule in CASCADE_RULES}, "least of two": least_of_two,
}  # fmt: skip
OF_THE_PACKAGE = {*RULE_KINDS, "predict", *(f"cascade {rule}" for rule in CASCADE_RULES), "least of two"}


# --- attacks: what was tried, and whether it was refused or found out ------------------------------------


def refused(call: Callable[[], object], kind: type[Exception] = ValueError) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def digits_base() -> models.BaseClassifier:
    return models.load("starter:digits-vit-0.25")


def few() -> data.Images:
    return data.load("digits", subset="first:4")


def parity() -> bool:
    """Rounded noise on a fine grid: even steps are likelier. Refused above 256 steps; below, the factor covers it."""
    fine = data.from_arrays(torch.full((1, 1, 4, 4), 3_000 / 4_095), grid=4_095)
    s, exponents = 256.0, np.arange(-40, 12)
    share = special.ndtr(2.0 ** (exponents + 1) / s) - special.ndtr(2.0**exponents / s)
    leak = 4 * (2 * share * 4.0 ** (exponents - 23)).sum()
    covered = np.sqrt(1 + leak * s**2) <= 1.0 / sigma_of_proof(1.0, NoiseForm(256))
    return bool(covered) and refused(lambda: Smoothed(digits_base(), 1.0).sample(fine, n=100, noise="grid"))


def fold() -> bool:
    """A preprocessing of one's own must not be folded away."""
    base = digits_base()

    class Negative(models.BaseClassifier):
        def preprocess(self, images):
            return super().preprocess(1 - images)

    changed = Negative(
        base.network, mean=tuple(base.mean.flatten().tolist()), std=tuple(base.std.flatten().tolist())
    ).eval()
    found = Smoothed(changed, 0.02).certify(few(), n=100, seed=0, progress=False)
    with torch.no_grad():
        truth = changed(few().batch()).argmax(1).tolist()
    return all(c.predicted in (ABSTAIN, t) for c, t in zip(found, truth, strict=True))


def adapter() -> bool:
    """Two adapters on one network: in bfloat16, the copy of one must not be run for the other."""
    two = lora(digits_base(), rank=4, name="one").eval()
    two.add("two")
    with torch.no_grad():
        for name, value in two.named_parameters():
            if "head.modules_to_save.two" in name:
                value.zero_()
                value[3] = 50.0 if name.endswith("bias") else 0.0
    two.use("one")
    Smoothed(two.eval(), 0.02, precision="bfloat16", batch=50).certify(few(), n=100, seed=0, progress=False)
    two.use("two")
    found = Smoothed(two.eval(), 0.02, precision="bfloat16", batch=50).certify(few(), n=100, seed=0, progress=False)
    return [c.predicted for c in found] == [3] * 4


class Threshold(nn.Module):
    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def forward(self, images):
        above = images.flatten(1).sum(1) - self.at
        return torch.stack([above, -above], 1)


def another_goes_on() -> bool:
    """A record that one classifier began must not be filled by another of the same structure and weights."""
    images = data.from_arrays(few().batch())
    with tempfile.TemporaryDirectory() as folder:
        ask = dict(n=20, alpha=0.05, out=Path(folder) / "r", progress=False)
        Smoothed(Threshold(0.0), 0.25).sample(images, **ask)
        return refused(lambda: Smoothed(Threshold(40.0), 0.25).sample(images, **ask), RecordError)


def company() -> bool:
    """Statistics of the batch make the votes of a batch one vote."""

    class OfTheBatch(nn.Module):
        def forward(self, images):
            middle = images.flatten(1).sum(1).mean() - 32
            return torch.stack([middle, -middle]).expand(len(images), 2)

    return refused(lambda: Smoothed(OfTheBatch(), 0.25).sample(few(), n=100, progress=False))


def off_the_grid() -> bool:
    """An image declared to lie on a grid that it is not on is certified as another image."""
    off = few().batch() + 0.3 / 256
    return refused(
        lambda: Smoothed(digits_base(), 0.25).certify(off.clamp(0, 1), n=100, noise="grid:256", progress=False)
    )


def seed() -> bool:
    """Whoever knows the seed can look for an image with a false certificate, so nobody is to know it."""
    drawn = {Smoothed(digits_base(), 0.6).certify(few(), n=500, progress=False)[3].n_a for _ in range(4)}
    fixed_one = Smoothed(digits_base(), 0.6).certify(few(), n=100, seed=0, progress=False)[0]
    return len(drawn) > 1 and "fixed beforehand" in fixed_one.sentence()


def forged_votes() -> bool:
    """One vote in 1,000 moved to the guessed class of every image, in a record that names another device."""
    source = open_record(ROOT / "data" / "records" / "digits-vit-0.25-sigma-0.25")
    true = certificates(source)
    guess, moved = dict(zip(true.image_id, true.c_a, strict=True)), votes_apart(source.stopping_rule.n)
    left = dict.fromkeys(guess, moved)
    made = {k: v for k, v in source.provenance()[-1].items() if k != "time"}
    made = {**made.get("parts", [made])[-1], "device": "of somebody else"}
    with tempfile.TemporaryDirectory() as folder:
        forged, rows = create_record(Path(folder) / "r", source.identity, source.class_names), []
        for row in source.rows().sort_values(["index", "purpose", "start"]).to_dict("records"):
            counts, own = np.array(row["counts"]), guess[row["image_id"]]
            for c in np.argsort(-counts) if row["purpose"] == ESTIMATE else ():
                if c != own:
                    taken = min(counts[c], left[row["image_id"]])
                    counts[[c, own]] += [-taken, taken]
                    left[row["image_id"]] -= taken
            rows.append(Row(**{**row, "counts": tuple(counts.tolist())}))
        forged.append(rows, made)
        claimed, vouched = certificates(forged), without_votes(forged, moved)
        found = audit(forged.path, redraw=2, seed=0)
    gained = (claimed["radius"].to_numpy() > true["radius"].to_numpy()).any()
    covered = (vouched["radius"].to_numpy() <= true["radius"].to_numpy()).all()
    said = any(check.name == "radii without them" for check in found.checks) or found.verdict == "failed"
    return bool(gained and covered and said)


ATTACKS = {
    "parity of a fine grid": parity, "a preprocessing folded away": fold, "another adapter's copy": adapter,
    "another classifier goes on": another_goes_on, "statistics of the batch": company, "an image off its grid": off_the_grid,
    "a seed known beforehand": seed, "votes moved within an audit's tolerance": forged_votes,
}  # fmt: skip


def judge(thorough: bool = True) -> dict:
    """All rules and attacks; `held` says whether all is as it should be."""
    rules, attacks = [], []
    for name, cases in RULES.items():
        for case, chance, alpha in cases(thorough):
            rules.append(
                {"rule": name, "case": case, "alpha": alpha, "chance": chance, "of alpha": chance / alpha}
                | {"held": chance <= alpha * (1 + SLACK)}
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, attack in ATTACKS.items():
            about = " ".join((attack.__doc__ or "").split())
            attacks.append({"attack": name, "about": about, "held": attack()})
    return {"rules": rules, "attacks": attacks, "held": all(x["held"] for x in [*rules, *attacks])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the one-minute form that the tests run; keeps nothing")
    options = parser.parse_args()
    begin = time.perf_counter()
    found = judge(not options.quick)
    for x in [*found["rules"], *found["attacks"]]:
        if not x["held"]:
            print(f"NOT HELD: {x}", file=sys.stderr)
    worst = max(found["rules"], key=lambda x: x["of alpha"])
    headline = (
        f"{len(found['rules'])} exact checks of {len(RULES)} rules, the worst at {worst['of alpha']:.4f} alpha "
        f"({worst['rule']}, {worst['case']}); {sum(x['held'] for x in found['attacks'])} of {len(ATTACKS)} attacks refused or found out"
    )
    print(headline)
    if not options.quick:
        keep("referee", begin, {"made_by": "make referee", "headline": headline, **found})
    return 0 if found["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
