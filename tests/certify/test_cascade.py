"""The cascade over several noise scales: the theorem by brute force, its bounds by simulation, worked counts."""

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from smoothkit import Smoothed
from smoothkit.certify import cascade as cascade_module
from smoothkit.certify import cascade_certificates, certificates, certify_votes
from smoothkit.certify.bounds import clopper_pearson_lower, clopper_pearson_upper, radius
from smoothkit.certify.cascade import (
    NO_SCALE,
    alpha_per_statement,
    cascade_classes,
    cascade_radii,
    certify_cascade,
    fast_predict,
)
from smoothkit.certify.table import error_rates
from smoothkit.reading import average_certified_radius, certified_accuracy
from smoothkit.records import Identity, RecordError, Row, create_record
from smoothkit.sampling.cascade import sample_cascade
from smoothkit.types import ABSTAIN, StoppingRule, Votes

SIGMAS = (0.25, 0.5, 1.0)


def certify(*rows, n=10_000, sigmas=(0.5, 1.0), alpha=0.001, selection=None, **settings):
    """One image; rows of counts from the smallest sigma to the largest."""
    counts = np.array(rows)
    selection = counts if selection is None else np.array(selection)
    return certify_cascade(selection, counts, n=n, sigmas=sigmas, alpha=alpha, **settings)


# --- the theorem -----------------------------------------------------------------------------------------


def interval_classifiers(seed: int, number: int, *, shared: bool, scales=SIGMAS, classes: int = 3) -> np.ndarray:
    """Exact P_k(x)[c] of random piecewise constant classifiers on the line: [number, points, K, classes]."""
    generator = np.random.default_rng(seed)
    result = np.zeros((number, len(POINTS), len(scales), classes))
    for i in range(number):
        for k, sigma in enumerate(scales):
            if k == 0 or not shared:  # a denoiser makes another classifier of each scale
                cuts = np.sort(generator.uniform(-3, 3, generator.integers(1, 9)))
                said = generator.integers(0, classes, len(cuts) + 1)
            edges = np.concatenate([[-np.inf], cuts, [np.inf]])
            z = (edges - POINTS[:, None]) / sigma
            a, b = z[:, :-1], z[:, 1:]
            # in the upper tail by survival functions: small probabilities keep their digits
            mass = np.where(a > 0, stats.norm.sf(a) - stats.norm.sf(b), stats.norm.cdf(b) - stats.norm.cdf(a))
            for c in range(classes):
                result[i, :, k, c] = mass[:, said == c].sum(axis=1)
    return np.clip(result, 0, 1)


POINTS = np.linspace(-4, 4, 161)
ROUNDING = 1e-9  # near 1 a float64 has lost the digits that Phi^-1 would need


def broken(classes: np.ndarray, claimed: np.ndarray, radii: np.ndarray) -> int:
    """How many claims (class, radius) at a point are wrong at another point of the line within the radius."""
    distance = np.abs(POINTS[:, None] - POINTS)
    within = distance < radii[..., None] - 1e-9
    return int((within & (classes[:, None, :] != claimed[..., None])).any(axis=-1).sum())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("p0", [0.5, 0.6, 0.7])
def test_no_point_within_a_radius_is_answered_otherwise(p0, shared):
    probabilities = interval_classifiers(1, 40, shared=shared)
    classes, scales = cascade_classes(probabilities, p0=p0)
    bounds = np.maximum(probabilities - ROUNDING, 0), np.minimum(probabilities + ROUNDING, 1)
    radii = cascade_radii(*bounds, sigmas=SIGMAS, p0=p0)  # [classifiers, points, K, classes]
    at_halt = np.take_along_axis(radii, np.maximum(scales, 0)[..., None, None], axis=2)[:, :, 0]
    cascade = np.take_along_axis(at_halt, np.maximum(classes, 0)[..., None], axis=2)[..., 0] * (classes != ABSTAIN)
    assert broken(classes, classes, cascade) == 0
    best = radii.max(axis=2)  # [classifiers, points, classes]
    assert ((best > 0).sum(axis=-1) <= 1).all()  # no two classes are ever proved at once
    assert broken(classes, best.argmax(axis=-1), best.max(axis=-1)) == 0
    assert (best.max(axis=-1) >= cascade).all() and (best.max(axis=-1) > cascade + 1e-6).mean() > 0.05
    assert (cascade > 0).mean() > 0.3


@pytest.mark.parametrize("p0", [0.3, 0.4])
def test_below_one_half_the_statement_is_false(p0):
    probabilities = interval_classifiers(1, 40, shared=True)
    classes, scales = cascade_module._classes(probabilities, p0)
    radii = cascade_module._radii(probabilities, probabilities, np.array(SIGMAS), p0)
    at_halt = np.take_along_axis(radii, np.maximum(scales, 0)[..., None, None], axis=2)[:, :, 0]
    claimed = np.take_along_axis(at_halt, np.maximum(classes, 0)[..., None], axis=2)[..., 0] * (classes != ABSTAIN)
    assert broken(classes, classes, claimed) > 0.2 * classes.size
    for call in (
        lambda: cascade_classes(probabilities, p0=p0),
        lambda: cascade_radii(probabilities, probabilities, sigmas=SIGMAS, p0=p0),
        lambda: certify((10, 0), (10, 0), n=10, p0=p0),
        lambda: fast_predict(np.ones((2, 2), int), np.zeros(2), n=2, p0=p0),
    ):
        with pytest.raises(ValueError, match=r"p0 must lie in \[1/2, 1\), got 0\.[34]: below 1/2 two classes"):
            call()


# --- the bounds ------------------------------------------------------------------------------------------

# the truth just where a certificate becomes true, by (smallest, ..., largest) scale
EDGES = {
    "own scale": ((0.5, 0.5, 0.0), (0.3, 0.35, 0.35)),
    "another class at the larger scale": ((0.99, 0.01, 0.0), (0.49, 0.5, 0.01)),
    "both": ((0.5, 0.25, 0.25), (0.5, 0.5, 0.0)),
    "two others": ((0.98, 0.01, 0.01), (0.02, 0.49, 0.49)),
    "three scales": ((0.98, 0.02, 0.0), (0.5, 0.5, 0.0), (0.0, 0.5, 0.5)),
}


@pytest.mark.parametrize("upper", ["classes", "runner-up"])
@pytest.mark.parametrize("rule", ["max", "cascade", "released"])
@pytest.mark.parametrize("edge", EDGES)
def test_false_certificates_are_at_most_alpha(edge, rule, upper):
    """6,000 images each; a rate of alpha shows as more than 1.2 alpha with a chance below 1e-6."""
    truth, n, alpha, images = np.array(EDGES[edge]), 100, 0.1, 6_000
    generator = np.random.default_rng(5)
    sigmas = np.array(SIGMAS[-len(truth) :])
    selection, estimation = (
        np.stack([generator.multinomial(size, row, images) for row in truth], axis=1) for size in (5, n)
    )
    found = certify_cascade(selection, estimation, n=n, sigmas=sigmas, alpha=alpha, rule=rule, upper=upper)
    true = cascade_radii(truth, truth, sigmas=sigmas)  # [K, classes]
    claimed = found.radius > 0
    false = claimed & (found.radius > true[np.maximum(found.scale, 0), np.maximum(found.predict, 0)])
    assert false.mean() <= 1.2 * alpha
    if rule == "max":
        proved = [np.where(found.radii > 0, found.classes == c, False).any(axis=-1) for c in range(3)]
        assert (np.sum(proved, axis=0) > 1).mean() <= 1.2 * alpha  # two classes at once: one of them is false


def test_statements_share_alpha():
    assert alpha_per_statement(0.001, 3) == pytest.approx(0.001 / 6) and alpha_per_statement(0.001, 1) == 0.001
    # at the third stage of the released rule, n = 10,000, where Goodman's asymptotic interval gives 0.1126 for ten classes
    for count, classes, bound in [(1000, 10, 0.1124), (1000, 1000, 0.1156), (0, 10, 0.0010), (0, 1000, 0.0015)]:
        assert clopper_pearson_upper(count, 10_000, 0.001 / 3 / (classes - 1)) == pytest.approx(bound, abs=6e-5)
    # guesses that differ must all be excluded: the larger scale's bounds are shared by 3 classes instead of 2
    same = certify((9900, 50, 50), (4000, 3000, 3000), selection=[[9, 0, 0], [9, 0, 0]], upper="classes")
    assert same.negative[0] == pytest.approx(-special.ndtri(stats.beta.ppf(1 - 0.001 / 4 / 2, 3001, 7000)), rel=1e-9)
    rows = ((9900, 50, 50), (4000, 3000, 3000), (4000, 3000, 3000))
    differ = certify(*rows, sigmas=SIGMAS, selection=[[9, 0, 0], [0, 9, 0], [9, 0, 0]], upper="classes")
    expected = special.ndtri(stats.beta.ppf(1 - 0.001 / 6 / 3, 3001, 7000))
    assert differ.negative[0] == pytest.approx(
        min(-0.5 * special.ndtri(stats.beta.ppf(1 - 0.001 / 6 / 2, 3001, 7000)), -expected)
    )


# --- worked counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["max", "cascade", "released"])
def test_one_scale_is_cohen(rule):
    for k in (0, 40, 60, 99, 100):
        found = certify((k, 100 - k), n=100, sigmas=(0.25,), selection=[[9, 0]], rule=rule)
        cohen = certify_votes(Votes(np.array([9, 0]), 9), Votes(np.array([k, 100 - k]), 100), sigma=0.25, alpha=0.001)
        assert (found.predict, found.radius) == (cohen.predicted, cohen.radius)  # to the last bit


def test_halting_at_the_largest_scale_excludes_nothing():
    found = certify((9900, 50, 50), (9000, 500, 500), rule="cascade")
    assert found.scale == 1 and found.negative[1] == np.inf
    assert found.radius == radius(clopper_pearson_lower(9000, 10_000, 0.001 / 4), 1.0)
    above = certify((9900, 50, 50), (9000, 500, 500), rule="cascade", p0=0.6)
    assert above.radius == pytest.approx(found.radius - special.ndtri(0.6), rel=1e-9)


def test_the_larger_scale_limits_the_radius():
    found = certify((9900, 50, 50), (4000, 3000, 3000), upper="classes")
    assert found.own[0] == pytest.approx(1.099, abs=5e-4) and found.radius == pytest.approx(0.476, abs=5e-4)
    assert (found.predict, found.scale, found.reason) == (0, 0, "certified")


@pytest.mark.parametrize("rule", ["max", "cascade"])
def test_another_class_at_the_larger_scale_forbids_a_certificate(rule):
    contested = certify((9900, 50, 50), (5000, 4900, 100), rule=rule, upper="classes")
    assert (contested.predict, contested.radius, contested.reason) == (ABSTAIN, 0.0, "contested")
    assert clopper_pearson_upper(4900, 10_000, 0.001 / 8) == pytest.approx(0.508, abs=5e-4)
    found = certify((9900, 50, 50), (5000, 4800, 200), rule=rule, upper="classes")
    assert found.radius == pytest.approx(0.004, abs=5e-4) and found.reason == "certified"


def test_the_sharper_upper_bound_is_sharper():
    everywhere, runner_up = (certify((9900, 50, 50), (4000, 3000, 3000), **u) for u in ({"upper": "classes"}, {}))
    assert everywhere.radius < runner_up.radius
    assert runner_up.radius == pytest.approx(-special.ndtri(stats.beta.ppf(1 - 0.001 / 4, 3001, 7000)), rel=1e-9)


@pytest.mark.parametrize(("n", "low", "high"), [(10_000, 4845, 5155), (1000, 451, 549), (200, 78, 122)])
def test_the_released_rule_stops_undecided(n, low, high):
    """The band of counts at the first scale that ends in abstention, whatever the smaller scale would say."""
    for k, reason in [(low - 1, "certified"), (low, "undecided"), (high, "undecided"), (high + 1, "certified")]:
        found = certify((n, 0, 0), (k, (n - k) // 2, (n - k) // 2), n=n, rule="released")
        assert found.reason == reason and (found.scale == 1) == (k >= low)
    assert certify((n, 0, 0), (low, 0, 0), n=n, rule="max").reason == "certified"  # it goes on
    nothing = certify((0, n // 4, 0), (0, n // 4, 0), n=n, rule="released")
    assert (nothing.predict, nothing.scale, nothing.reason) == (ABSTAIN, NO_SCALE, "passed")


def test_the_released_rule_spends_alpha_by_stage():
    found = certify((9900, 50, 50), (1000, 1000, 1000), rule="released")
    assert found.own[0] == radius(clopper_pearson_lower(9900, 10_000, 0.001 / 2), 0.5)
    top = certify((0, 0, 0), (9900, 50, 50), rule="released")
    assert top.radius == radius(clopper_pearson_lower(9900, 10_000, 0.001), 1.0)


def test_max_reaches_beyond_the_scale_halted_at():
    """Barely above p0 at the largest scale, no rival there, almost certain at the smaller one."""
    rows = ((9990, 5, 5), (5300, 2350, 2350))
    cascade, best = certify(*rows, rule="cascade"), certify(*rows, rule="max")
    assert cascade.scale == 1 and cascade.radius < 0.1
    assert best.scale == 0 and best.radius > 0.6


def test_max_is_never_below_the_cascade():
    generator = np.random.default_rng(0)
    counts = np.stack([generator.multinomial(1000, p, 1) for p in generator.dirichlet(np.full(4, 0.5), 900)])
    counts = counts.reshape(300, 3, 4)
    found = {
        rule: certify_cascade(counts, counts, n=1000, sigmas=SIGMAS, alpha=0.01, rule=rule)
        for rule in ("max", "cascade")
    }
    assert (found["max"].radius >= found["cascade"].radius).all()
    assert (found["max"].radius > found["cascade"].radius).any()


@pytest.mark.parametrize("upper", ["classes", "runner-up"])
def test_stopping_early_proves_what_all_scales_prove_and_never_more(upper):
    """Counts of the scales below the one halted at are taken away: n = 0 there."""
    generator = np.random.default_rng(3)
    counts = np.stack([generator.multinomial(1000, p) for p in generator.dirichlet(np.full(4, 0.4), 900)])
    counts = counts.reshape(300, 3, 4)
    settings = dict(sigmas=SIGMAS, alpha=0.01, upper=upper)
    for rule in ("cascade", "released"):
        whole = certify_cascade(counts, counts, n=1000, rule=rule, **settings)
        asked = np.arange(3) >= np.maximum(whole.scale, 0)[:, None]
        less = counts * asked[..., None]
        early = certify_cascade(less, less, n=1000 * asked, rule=rule, **settings)
        assert (early.scale == whole.scale).all() and (early.radius <= whole.radius).all()
        assert (whole.radius - early.radius).max() < 0.02 and (early.radius > 0).sum() > 100
        below = early.scale > 0
        assert below.sum() > 50 and (early.classes[below, 0] == ABSTAIN).all() == (rule == "cascade")
    nothing = np.zeros((1, 3, 4), dtype=int)
    assert certify_cascade(nothing, nothing, n=0, **settings).reason == "undecided"


def test_failed_samples_count_against_every_class():
    whole, short = certify((9000, 500, 500), (9000, 500, 500)), certify((9000, 500, 0), (9000, 0, 500))
    assert short.radius == whole.radius


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"sigmas must increase, .* got \[1.0, 0.5\]"):
        certify((9, 1), (9, 1), n=10, sigmas=(1.0, 0.5))
    with pytest.raises(ValueError, match=r"shape \[\.\.\., 2, num_classes\], got \(3, 2\)"):
        certify((9, 1), (9, 1), (9, 1), n=10)
    with pytest.raises(ValueError, match="rule must be one of max, cascade, released, got 'best'"):
        certify((9, 1), (9, 1), n=10, rule="best")
    with pytest.raises(ValueError, match="upper must be one of classes, runner-up"):
        certify((9, 1), (9, 1), n=10, upper="goodman")
    with pytest.raises(ValueError, match="sum to at most n"):
        certify((9, 2), (9, 1), n=10)
    with pytest.raises(ValueError, match="whole numbers"):
        certify((0.9, 0.1), (0.9, 0.1), n=1)
    with pytest.raises(ValueError, match=r"bounds must have shape \[\.\.\., 3, num_classes\]"):
        cascade_radii(np.ones((2, 2)), np.ones((2, 2)), sigmas=SIGMAS)
    with pytest.raises(ValueError, match="scales must be at least 1"):
        alpha_per_statement(0.1, 0)


# --- prediction without a certificate --------------------------------------------------------------------


def test_fast_prediction():
    counts = np.array([[120, 60, 20], [150, 30, 20]])  # accepted: the larger scale, 0.75 of the votes
    assert fast_predict(counts, np.array([0.0, 0.5, 0.0]), n=200)[0] == 0
    prior = 0.9 * np.array([150, 30, 20]) / 200 + 0.1 / 3
    needed = np.log(prior[0] / prior[1])
    for logit, answer in [(needed - 0.01, 0), (needed + 0.01, 1)]:
        classes, scales = fast_predict(counts, np.array([0.0, logit, 0.0]), n=200)
        assert (classes, scales) == (answer, 1)
    # the smaller scale is accepted where the larger one is not, none of them at p0 = 0.8: the clean answer
    assert fast_predict(np.array([[120, 60, 20], [90, 90, 20]]), np.zeros(3), n=200) == (0, 0)
    assert fast_predict(counts, np.array([0.0, 0.1, 0.0]), n=200, p0=0.8) == (1, NO_SCALE)
    with pytest.raises(ValueError, match="do not fit counts"):
        fast_predict(counts, np.zeros(4), n=200)


# --- from records ----------------------------------------------------------------------------------------


def record_of(sigma, rows, *, n=1000, labels=None, digest="d", alpha=0.001, noise="grid:256", seed=0):
    """A record in memory: rows of estimation counts, one an image; the selection votes for the first of the largest."""
    rule = StoppingRule(n0=100, n=n, alpha=alpha)
    identity = Identity("digits", "test", "all", "m", f"f{sigma}", len(rows[0]), sigma, seed, noise, "float32", rule)
    record = create_record(None, identity)
    for i, counts in enumerate(rows):
        top = int(np.argmax(counts))
        about = dict(index=i, key=f"i{i}", image_id=100 + i, digest=digest, label=0 if labels is None else labels[i])
        picked = tuple(100 if c == top else 0 for c in range(len(counts)))
        blocks = [
            ("select", 0, 100, picked),
            ("estimate", 0, 100, (0,) * len(counts)),
            ("estimate", 100, n, tuple(counts)),
        ]
        record.append([Row(**about, purpose=p, start=a, stop=b, counts=c) for p, a, b, c in blocks], {})
    return record


SMALL = [(890, 5, 5), (890, 5, 5), (600, 150, 150), (100, 100, 0), (5, 890, 5)]
LARGE = [(880, 10, 10), (300, 200, 300), (440, 460, 0), (100, 100, 0), (5, 890, 5)]


def test_certificates_of_records():
    records = {0.25: record_of(0.25, SMALL), 1.0: record_of(1.0, LARGE)}
    table = cascade_certificates(records, rule="cascade")
    assert table["predict"].tolist() == [0, 0, ABSTAIN, ABSTAIN, 1] and table["correct"].tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert table["scale"].tolist()[:2] == [1.0, 0.25] and np.isnan(table["scale"][3])
    assert table["reason"].tolist() == ["certified", "certified", "contested", "undecided", "certified"]
    assert table["calls"].tolist() == [1100, 2200, 2200, 2200, 1100]
    assert (table["alpha_statement"] == 0.001 / 4).all() and (table["rule"] == "cascade").all()
    best = cascade_certificates([records[1.0], records[0.25]], rule="max")
    assert (best["calls"] == 2200).all() and (best["radius"] >= table["radius"]).all()
    assert certified_accuracy(best, [0.0])[0] == 0.4 and average_certified_radius(best) > 0
    shared = ["idx", "label", "predict", "radius", "correct", "n0", "n", "alpha", "noise", "key", "image_id"]
    assert set(shared) <= set(table.columns)
    pd.testing.assert_series_equal(
        cascade_certificates([records[1.0]])["radius"], certificates(records[1.0])["radius"], check_exact=True
    )


def test_at_equal_alpha_per_statement_the_cascade_answers_where_the_largest_scale_does():
    records = {0.25: record_of(0.25, SMALL), 1.0: record_of(1.0, LARGE)}
    cascade = cascade_certificates(records, rule="cascade")
    single = certificates(records[1.0], alpha=alpha_per_statement(0.001, 2))
    assert certified_accuracy(cascade, [0.0]) >= certified_accuracy(single, [0.0])
    halted = (single["radius"] > 0).to_numpy()
    assert (cascade["radius"][halted] == single["radius"][halted]).all()


def test_only_images_complete_at_every_scale_are_certified():
    table = cascade_certificates([record_of(0.25, SMALL), record_of(1.0, LARGE[:2])])
    assert table["idx"].tolist() == [0, 1]


def test_images_that_halt_need_no_votes_below():
    """The first image halts at sigma 1; `cascade` does without its votes at 0.25, `max` leaves it out."""
    records = [record_of(0.25, SMALL[:1]), record_of(1.0, LARGE)]
    assert cascade_certificates(records)["idx"].tolist() == [0]
    records = [record_of(1.0, LARGE[:1])]
    early = cascade_certificates(records, rule="cascade", sigmas=(0.25, 1.0))
    both = cascade_certificates([record_of(0.25, SMALL[:1]), *records], rule="cascade")
    pd.testing.assert_frame_equal(early, both)
    assert early["alpha_statement"][0] == 0.001 / 4 and early["calls"][0] == 1100
    with pytest.raises(RecordError, match=r"no image is complete at all of the scales 0\.25, 1"):
        cascade_certificates(records, sigmas=(0.25, 1.0))
    with pytest.raises(RecordError, match=r"records at sigma 1 do not fit sigmas \[0.25, 0.5\]"):
        cascade_certificates(records, sigmas=(0.25, 0.5))


def test_sampling_stops_where_the_cascade_does(digits, starter, tmp_path):
    images = digits.take("every:30")
    bases = dict.fromkeys((0.12, 0.25, 0.5), starter)
    how = dict(n0=20, n=200, progress=False)
    early = sample_cascade(bases, images, out=tmp_path, **how)
    whole = {sigma: Smoothed(starter, sigma).sample(images, **how) for sigma in bases}
    settings = dict(rule="cascade", sigmas=sorted(bases))
    a, b = cascade_certificates(early, **settings), cascade_certificates(whole, **settings)
    assert a["image_id"].tolist() == b["image_id"].tolist() == list(images.ids)
    assert (a["scale"].fillna(0) == b["scale"].fillna(0)).all() and (a["calls"] == b["calls"]).all()
    assert (a["radius"] <= b["radius"]).all() and (b["radius"] - a["radius"]).max() < 0.01
    drawn = sum(sum(row.stop - row.start for row in r.rows().itertuples()) for r in early.values())
    assert drawn == a["calls"].sum() < cascade_certificates(whole)["calls"].sum() == 3 * 220 * len(images)
    again = sample_cascade(bases, images, out=tmp_path, **how)  # nothing is drawn twice
    assert {s: len(r.rows()) for s, r in again.items()} == {s: len(r.rows()) for s, r in early.items()}
    with pytest.raises(ValueError, match=r"n=10 cannot reach alpha=0\.000166667"):
        sample_cascade(bases, images, n0=10, n=10, progress=False)


def test_images_do_not_choose_how_alpha_is_shared(digits, starter):
    """Records of a sampled cascade know its scales: K is that of the cascade, not of the scales that images came to."""
    bases = dict.fromkeys((0.12, 0.25, 0.5), starter)
    few = sample_cascade(bases, digits.take("first:1"), n0=20, n=400, progress=False)
    asked = {0.5: few[0.5]}  # as if every image had been decided at the largest scale
    assert few[0.5].identity.scales == (0.12, 0.25, 0.5)
    table = cascade_certificates(asked, rule="cascade")
    assert (table["alpha_statement"] == alpha_per_statement(0.001, 3)).all()
    with pytest.raises(RecordError, match="were sampled for the scales"):
        cascade_certificates(asked, rule="cascade", sigmas=(0.25, 0.5))


def test_the_released_rule_states_what_is_proved():
    records = {0.25: record_of(0.25, SMALL), 1.0: record_of(1.0, LARGE)}
    alpha = records[0.25].stopping_rule.alpha
    stated = {rule: set(cascade_certificates(records, rule=rule)["alpha"]) for rule in ("cascade", "released")}
    assert stated == {"cascade": {alpha}, "released": {2 * alpha}}


def test_error_rates():
    records = {0.25: record_of(0.25, SMALL), 1.0: record_of(1.0, LARGE)}
    table = error_rates(records).set_index("sigma")
    assert table.loc[0.25].tolist() == [5, 0.6, 0.2, 0.2] and table.loc[1.0].tolist() == [5, 0.2, 0.6, 0.2]
    assert error_rates(records, p0=0.85)["right"].tolist() == [0.4, 0.2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(sigma=0.25), "one record a sigma"),
        (dict(sigma=1.0, digest="e"), "different images under the id 100"),
        (dict(sigma=1.0, alpha=0.01), "agree in alpha, got 0.001, 0.01"),
        (dict(sigma=1.0, noise="float"), "agree in noise, got float, grid:256"),
        (dict(sigma=1.0, labels=[1] * 5), "gives other labels"),
    ],
)
def test_records_that_do_not_belong_together(other, message):
    with pytest.raises(RecordError, match=message):
        cascade_certificates([record_of(0.25, SMALL), record_of(**{"rows": LARGE, **other})])


def test_a_record_under_another_sigma_is_refused():
    with pytest.raises(RecordError, match=r"given for sigma 0.5 was sampled at 0.25"):
        cascade_certificates({0.5: record_of(0.25, SMALL)})
    with pytest.raises(RecordError, match="at least one record"):
        cascade_certificates({})
