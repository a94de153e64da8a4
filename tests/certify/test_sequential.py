"""Sequential certification: sound at every look together, equal to worked values, and thrifty."""

import contextlib
import dataclasses
from collections.abc import Iterator

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats

from smoothkit import Smoothed, data
from smoothkit.certify import certificates, sequential_rule
from smoothkit.certify.betting import (
    clopper_pearson_count,
    decision_probabilities,
    kt_boundaries,
    kt_lower,
    kt_upper,
    log_wealth_above,
    log_wealth_below,
)
from smoothkit.certify.bounds import clopper_pearson_lower, radius, radius_cap, sigma_of_proof
from smoothkit.certify.sequential import (
    CERTIFIED,
    GIVEN_UP,
    OPEN,
    boundaries,
    check_rule,
    claims,
    decide,
    default_looks,
    lower_bounds,
    possible_gain,
    still_open,
)
from smoothkit.records import RecordError, open_record
from smoothkit.types import ABSTAIN, NoiseForm, StoppingRule


def sampled(smoothed, images, radii=(), *, out=None, seed=0, progress=True, **rule):
    return smoothed.sample(images, rule=sequential_rule(radii, **rule), out=out, seed=seed, progress=progress)


@contextlib.contextmanager
def interrupted_after(tasks: int) -> Iterator[None]:
    """Ctrl-C when so many tasks have been counted and another is done."""
    from smoothkit.sampling.run import RecordWriter

    add, counted = RecordWriter.add, []

    def add_or_interrupt(self, *task) -> None:
        if len(counted) == tasks:
            raise KeyboardInterrupt
        counted.append(task)
        add(self, *task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordWriter, "add", add_or_interrupt)
        yield


ONE_SIGMA = float(stats.norm.cdf(1.0))


# --- worked values -------------------------------------------------------------------------------------

WEALTH = {  # (h, t): log wealth above, below, at p_r = Phi(1); by 40-digit arithmetic
    (1, 1): (0.1171379042, -0.8982302605),
    (0, 1): (-1.0759440157, 1.4214507928),
    (10, 10): (1.2737168168, -2.5236597093),
    (47, 47): (6.9632384748, -3.9179046878),
    (95, 100): (4.5707965828, -4.3042200263),
    (90, 100): (0.2110253954, -3.8250182424),
    (60, 100): (-4.0261811440, 14.4761805223),
}


@pytest.mark.parametrize(("case", "values"), WEALTH.items())
def test_wealth(case, values):
    h, t = case
    assert float(log_wealth_above(h, t, ONE_SIGMA)) == pytest.approx(values[0], abs=1e-9)
    assert float(log_wealth_below(h, t, ONE_SIGMA)) == pytest.approx(values[1], abs=1e-9)


def test_boundaries():
    up, down = kt_boundaries(np.array([100, 200, 500, 1000, 2000]), ONE_SIGMA, 0.001, 0.001)
    assert up.tolist() == [97, 188, 453, 889, 1752] and down.tolist() == [66, 143, 382, 786, 1605]
    early, all_failed = kt_boundaries(np.arange(1, 60), ONE_SIGMA, 0.001, 0.001)
    assert int(np.flatnonzero(early <= np.arange(1, 60))[0]) + 1 == 47  # the fewest unanimous votes that certify
    assert int(np.flatnonzero(all_failed >= 0)[0]) + 1 == 5


@pytest.mark.parametrize("p_r", [0.5, 0.69146, ONE_SIGMA, 0.97725])
def test_wealth_has_mean_one_at_the_boundary_and_less_below(p_r):
    for t in (1, 2, 7, 50):
        h = np.arange(t + 1)
        assert np.sum(stats.binom.pmf(h, t, p_r) * np.exp(log_wealth_above(h, t, p_r))) == pytest.approx(1, abs=1e-12)
        assert np.sum(stats.binom.pmf(h, t, p_r) * np.exp(log_wealth_below(h, t, p_r))) == pytest.approx(1, abs=1e-12)
        assert np.sum(stats.binom.pmf(h, t, p_r - 0.05) * np.exp(log_wealth_above(h, t, p_r))) <= 1


@pytest.mark.parametrize(
    ("p_r", "p", "draws"),
    [(0.69146, 0.6, 492), (0.69146, 0.8, 280), (0.69146, 0.9, 62), (0.69146, 0.99, 24), (ONE_SIGMA, 0.6, 51),
     (ONE_SIGMA, 0.8, 1661), (ONE_SIGMA, 0.9, 575), (ONE_SIGMA, 0.99, 57), (ONE_SIGMA, 0.999, 48)],
)  # fmt: skip
def test_expected_draws(p_r, p, draws):
    """A look after every draw, alpha = beta = 0.001; exact sums done independently to whole draws."""
    looks = np.arange(1, 10_001)
    result = decision_probabilities(looks, *kt_boundaries(looks, p_r, 0.001, 0.001), p)
    assert result["draws"] == pytest.approx(draws, abs=1)
    assert (result["certified"] if p > p_r else result["rejected"]) > 0.9999


KT_LOWER = {  # (h, t): the largest p_r with wealth 1000, by 40-digit arithmetic
    (20, 20): 0.6688616464,
    (100, 100): 0.9224980189,
    (950, 1_000): 0.9154767224,
    (990, 1_000): 0.9712482626,
    (1_000, 1_000): 0.9919602279,
    (9_900, 10_000): 0.9851173239,
    (99_900, 100_000): 0.9985084616,
    (100_000, 100_000): 0.9999192748,
}


@pytest.mark.parametrize(("case", "value"), KT_LOWER.items())
def test_confidence_sequence(case, value):
    h, t = case
    lower = float(kt_lower(h, t, 0.001))
    assert value - 1e-7 < lower < value + 5e-11 and lower < clopper_pearson_lower(h, t, 0.001)
    assert float(kt_upper(t - h, t, 0.001)) == pytest.approx(1 - lower, abs=1e-12)


def some_counts(size: int = 3_000) -> tuple[np.ndarray, np.ndarray]:
    """t log-uniform up to a million, h uniform or near t or near 0."""
    rng = np.random.default_rng(0)
    t = np.exp(rng.uniform(0, np.log(1e6), size)).astype(np.int64)
    few = np.minimum(t, rng.geometric(0.1, size) - 1)
    return np.choose(rng.integers(0, 3, size), [rng.integers(0, t + 1), t - few, few]), t


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-9])
def test_confidence_sequence_lies_where_the_wealth_reaches_one_over_alpha(alpha):
    h, t = some_counts()
    lower = kt_lower(h, t, alpha)
    assert (lower[h == 0] == 0).all() and (lower <= clopper_pearson_lower(h, t, alpha)).all()
    h, t, lower = h[h > 0], t[h > 0], lower[h > 0]
    assert (log_wealth_above(h, t, lower) >= -np.log(alpha)).all()
    a_little_more = special.expit(special.logit(lower) + 2e-8)
    more = special.expit(special.logit(lower) + 1e-4)
    assert (log_wealth_above(h, t, a_little_more) < log_wealth_above(h, t, lower)).mean() > 0.99
    assert (log_wealth_above(h, t, more) < -np.log(alpha)).mean() > 0.99  # close below it, but for a few


@pytest.mark.parametrize(("h", "t"), [(1, 1), (19, 20), (90, 100), (999, 1_000), (600, 1_000)])
def test_confidence_sequence_against_mpmath(h, t):
    """The wealth as the mixture it is defined as, integrated with 40 digits, is 1 / alpha at the bound and not below."""
    with mpmath.workdps(40):
        for alpha in (0.05, 0.001):
            p = mpmath.mpf(float(kt_lower(h, t, alpha)))
            mixture = mpmath.betainc(h + 0.5, t - h + 0.5, p, 1) / mpmath.betainc(0.5, 0.5, p, 1)
            wealth = mixture / (p**h * (1 - p) ** (t - h))
            assert 1 / mpmath.mpf(alpha) <= wealth <= (1 + mpmath.mpf("1e-5")) / mpmath.mpf(alpha)


@pytest.mark.parametrize(("h", "t"), [(1, 1), (1, 30), (29, 30), (30, 30), (700, 1_000), (999, 1_000)])
def test_wealth_falls_as_the_tested_probability_grows(h, t):
    """What makes the largest p_r with enough wealth a bound; and above h / t the wealth is at most 1."""
    p_r = special.expit(np.linspace(-8, 8, 4_001))
    wealth = log_wealth_above(h, t, p_r)
    below = p_r < h / t
    assert (np.diff(wealth[below]) < 1e-9).all() and (wealth[~below] < 1e-9).all()


def test_confidence_sequence_grows_with_the_votes():
    for t in (1, 10, 501):
        assert (np.diff(kt_lower(np.arange(t + 1), t, 0.001)) >= 0).all()


# --- soundness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hybrid", "kt", "staged"])
@pytest.mark.parametrize("radius", [0.0, 0.25, 0.5, 1.0])
def test_false_certificates_are_at_most_alpha_exactly(kind, radius):
    """The exact chance, over all looks together, of certifying a radius that is just not true, or far from it."""
    rule = sequential_rule([radius], n_max=20_000, alpha=0.001, kind=kind)
    up, down = boundaries(rule, 0.5)
    for p in (special.ndtr(radius / 0.5), special.ndtr(radius / 0.5) - 0.02):
        result = decision_probabilities(rule.looks, up[0], down[0], p)
        assert result["certified"] <= rule.alpha
        assert sum(result[k] for k in ("certified", "rejected", "undecided")) == pytest.approx(1, abs=1e-9)


def test_futility_never_buys_certificates():
    """Without giving up, the chance of a false certificate is still at most alpha."""
    rule = sequential_rule([0.5], n_max=20_000, kind="hybrid")
    up, down = boundaries(rule, 0.5)
    assert decision_probabilities(rule.looks, up[0], np.full_like(down[0], -1), ONE_SIGMA)["certified"] <= 0.001


def test_repeated_clopper_pearson_is_unsound_and_ours_is_not():
    """Looking every 100 draws with the ordinary bound: some twenty times alpha. With every 1,000: twelve."""
    for every, low, high in ((100, 0.019, 0.024), (1_000, 0.011, 0.015)):
        looks = np.arange(every, 100_001, every)
        naive = decision_probabilities(
            looks, clopper_pearson_count(looks, ONE_SIGMA, 0.001), np.full(len(looks), -1), ONE_SIGMA
        )
        assert low < naive["certified"] < high
    ours = decision_probabilities(looks, *kt_boundaries(looks, ONE_SIGMA, 0.001, 0.001), ONE_SIGMA)
    assert ours["certified"] <= 0.001


def test_several_radii_share_alpha():
    """Simulated streams at p just below the smallest radius' need: none of the radii may be certified too often."""
    rule = sequential_rule([0.25, 0.3, 0.5, 0.75], n_max=2_000, alpha=0.05, beta=0.5)
    up, down = boundaries(rule, 0.5)
    assert (np.diff(up, axis=0) >= 0).all() and (np.diff(down, axis=0) >= 0).all()
    p, runs = special.ndtr(0.25 / 0.5), 4_000
    steps = np.diff(rule.looks, prepend=0)
    paths = np.random.default_rng(0).binomial(steps, p, size=(runs, len(steps))).cumsum(axis=1)
    false = sum((decide(rule, 0.5, path) == CERTIFIED).any() for path in paths)
    assert false <= stats.binom.ppf(0.9999, runs, rule.alpha)


def test_boundaries_agree_with_the_bound():
    n = np.array([10, 100, 1_000])
    least = clopper_pearson_count(n, 0.8, 0.01)
    for k, m in zip(least, n, strict=True):
        if k <= m:
            assert clopper_pearson_lower(int(k), int(m), 0.01) > 0.8 >= clopper_pearson_lower(int(k) - 1, int(m), 0.01)
    assert clopper_pearson_count(np.array([5]), 0.999, 0.001).tolist() == [6]  # out of reach


@pytest.mark.slow
@pytest.mark.parametrize("margin", [0.8, 1.5])
def test_half_space_is_never_certified_beyond_its_distance(linear, margin):
    sigma = 0.25
    w = torch.randn(3 * 8 * 8, generator=torch.Generator().manual_seed(1))
    image = torch.full((3, 8, 8), 0.5)
    base = linear(w, float(margin * sigma * w.norm() - w.sum() * 0.5))
    radii = [sigma * margin * share for share in (0.5, 0.9, 1.02, 1.3)]
    for kind in ("hybrid", "kt", "staged"):
        record = sampled(Smoothed(base, sigma), image[None], radii, n_max=20_000, kind=kind, progress=False)
        row = certificates(record).iloc[0]
        assert row["predict"] == 1 and row["radius"] == pytest.approx(radii[1])


# --- finding the radius ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_claimed_bounds_exceed_the_truth_with_probability_at_most_alpha_exactly(alpha):
    """The exact chance that the bound of *any* look lies above p, as if no run ever stopped early."""
    rule = sequential_rule(within=0.01, n_max=3_000, alpha=alpha)
    bounds_at = [lower_bounds(rule, np.arange(t + 1), np.full(t + 1, t)) for t in rule.looks]
    assert all((np.diff(b) >= 0).all() for b in bounds_at)
    worst = 0.0
    for p in (0.2, 0.5, 0.6, 0.9, 0.975, 0.99, 0.999, *np.random.default_rng(0).uniform(0.5, 1, 20)):
        least = np.array(
            [np.searchsorted(b, p, side="right") for b in bounds_at]
        )  # the first count whose bound is above p
        result = decision_probabilities(rule.looks, least, np.full(len(least), -1), p)
        worst = max(worst, result["certified"])
        assert result["certified"] <= alpha
    assert worst > alpha / 3  # and not far below, so that the test would see a fault


def test_all_of_alpha_at_every_look_would_be_unsound():
    """The same test sees Clopper-Pearson re-computed at every look fail: some five times alpha."""
    looks = np.arange(100, 3_001, 100)
    least = clopper_pearson_count(looks, 0.9, 0.001)
    assert decision_probabilities(looks, least, np.full(len(looks), -1), 0.9)["certified"] > 0.004


def sampled_paths(rule: StoppingRule, p: float, runs: int) -> np.ndarray:
    steps = np.diff(rule.looks, prepend=0)
    return np.random.default_rng(0).binomial(steps, p, size=(runs, len(steps))).cumsum(axis=1)


def stopped(rule: StoppingRule, sigma: float, paths: np.ndarray) -> list[np.ndarray]:
    """Each path up to the look at which its image stops."""
    ends, runs = np.zeros(len(paths), dtype=int), np.arange(len(paths))
    for look in range(1, len(rule.looks) + 1):
        ends[runs] = look
        runs = runs[still_open(rule, sigma, [paths[i, :look] for i in runs])]
        if not len(runs):
            break
    return [path[:end] for path, end in zip(paths, ends, strict=True)]


@pytest.mark.parametrize(
    ("p", "at_most"),
    [(0.3, 110), (0.5, 800), (0.6, 3_300), (0.9, 6_000), (0.99, 22_000), (0.999, 55_000), (1.0, 60_000)],
)
def test_samples_saved(p, at_most):
    """Mean number of samples of 100,000 at precision 0.05, sigma 0.25; what is given up for it stays within the precision."""
    sigma, rule = 0.25, sequential_rule(within=0.05)
    paths = sampled_paths(rule, p, 40)
    seen = stopped(rule, sigma, paths)
    assert np.mean([rule.looks[len(s) - 1] for s in seen]) < at_most
    found = np.array([r for _, r in claims(rule, sigma, seen)])
    at_n = radius(clopper_pearson_lower(paths[:, -1], rule.n, rule.alpha / 2), sigma)
    assert (at_n - found > rule.within).mean() <= 0.1
    assert (found <= max(0.0, sigma * special.ndtri(p))).all()  # each fails with probability 0.001


def test_the_promise_about_the_precision():
    """More than the precision is lost in no more than beta of runs; 1,000 runs, chance of failure 1e-4."""
    sigma, rule = 0.5, sequential_rule(within=0.1, n_max=10_000, beta=0.3)
    paths = sampled_paths(rule, 0.9, 1_000)
    found = np.array([r for _, r in claims(rule, sigma, stopped(rule, sigma, paths))])
    at_n = radius(clopper_pearson_lower(paths[:, -1], rule.n, rule.alpha / 2), sigma)
    assert (at_n - found > rule.within).sum() <= stats.binom.ppf(0.9999, 1_000, rule.beta)


def test_possible_gain():
    rule = sequential_rule(within=0.05, n_max=1_000)
    t = np.full(3, 500)
    gain = possible_gain(rule, 0.25, np.array([0, 400, 500]), t)
    assert gain[0] == 0 < gain[1] and gain[2] == pytest.approx(  # nothing is known against p = 1: up to the cap
        radius_cap(1_000, 0.0005, 0.25) - float(radius(kt_lower(500, 500, 0.0005), 0.25)), abs=1e-9
    )
    assert (possible_gain(rule, 0.25, np.array([500, 1_000]), np.array([1_000, 1_000])) == 0).all()


def test_the_largest_bound_of_all_looks_is_claimed():
    rule = sequential_rule(within=0.001, n_max=300)
    for path in ([95, 190, 230], [95, 190, 285], [60, 120, 290]):
        bounds_seen = lower_bounds(rule, np.array(path), np.array(rule.looks))
        ((p, r),) = claims(rule, 0.25, [np.array(path)])
        assert p == bounds_seen.max() and r == float(radius(p, 0.25))
    last = lower_bounds(rule, np.array([290]), np.array([300]))
    assert last == clopper_pearson_lower(290, 300, 0.0005) > kt_lower(290, 300, 0.0005)
    assert lower_bounds(rule, np.array([190]), np.array([200])) == kt_lower(190, 200, 0.0005)


def test_half_space_radius_is_found_to_the_precision(linear):
    sigma, margin, within = 0.25, 0.8, 0.05
    w = torch.randn(3 * 8 * 8, generator=torch.Generator().manual_seed(1))
    base = linear(w, float(margin * sigma * w.norm() - w.sum() * 0.5))
    image = torch.full((1, 3, 8, 8), 0.5)
    record = sampled(Smoothed(base, sigma), image, within=within, n_max=20_000, progress=False)
    row = certificates(record).iloc[0]
    assert row["predict"] == 1 and sigma * margin - 2 * within < row["radius"] <= sigma * margin
    assert row["n"] < 8_000 and row["radius"] == float(
        radius(row["p_a_lower"], sigma_of_proof(sigma, NoiseForm.parse(row["noise"])))
    )


def test_found_radii_do_not_depend_on_submissions_or_interruptions(starter, digits, tmp_path):
    smoothed, images = Smoothed(starter, 0.25), digits.take("range:6:10")
    settings = dict(within=0.15, n_max=1_000, seed=3, progress=False)
    whole = certificates(sampled(smoothed, images, **settings))
    columns = ["idx", "predict", "radius", "n", "n_a", "p_a_lower"]
    alone = [certificates(sampled(smoothed, images.take(f"range:{i}:{i + 1}"), **settings)) for i in range(4)]
    assert whole[columns].to_numpy().tolist() == [t[columns].to_numpy()[0].tolist() for t in alone]

    with interrupted_after(8), pytest.raises(KeyboardInterrupt):
        sampled(smoothed, images, out=tmp_path / "r", **settings)
    assert len(open_record(tmp_path / "r").rows()) == 8
    resumed = sampled(smoothed, images, out=tmp_path / "r", **settings)
    assert certificates(resumed)[columns].equals(whole[columns])
    assert certificates(open_record(tmp_path / "r"))[columns].equals(whole[columns])
    assert whole["n"].nunique() > 1 and (whole["radius"] <= radius_cap(1_000, 0.0005, 0.25)).all()
    for other in (dict(alpha=0.05), dict(n=100)):
        with pytest.raises(RecordError, match=r"'radius' at alpha=0.001; it can be read by that rule only"):
            certificates(resumed, **other)
    with pytest.raises(RecordError, match="is the record of another run"):
        sampled(smoothed, images, out=tmp_path / "r", **{**settings, "within": 0.1})


def test_an_image_without_an_answer_stops_early(digits):
    """p_A below 1/2: nothing can be gained, and the answer is to abstain."""
    base = lambda x: torch.nn.functional.one_hot((x[:, 0, 0, 0] * 1e4).long() % 10, 10).float()  # noqa: E731
    record = sampled(Smoothed(base, 0.25), digits.take("first:2"), within=0.05, n_max=5_000, progress=False)
    table = certificates(record)
    assert (table["predict"] == ABSTAIN).all() and (table["radius"] == 0).all() and (table["n"] == 100).all()


def test_rules_of_older_records_still_load():
    rule = sequential_rule([0.5], n_max=1_000)
    fields = dataclasses.asdict(rule)
    assert fields.pop("within") is None
    assert StoppingRule(**fields) == rule
    found = sequential_rule(within=0.05, n_max=1_000)
    assert found.kind == "radius" and found.beta == 0.05 and rule.beta == 0.001
    assert StoppingRule(**dataclasses.asdict(found)) == found


# --- decisions and records -------------------------------------------------------------------------------


def test_decide():
    rule = sequential_rule([0.25, 0.5], n_max=1_000, looks=[100, 500, 1_000])
    up, down = boundaries(rule, 0.5)
    assert decide(rule, 0.5, np.array([], dtype=int)).tolist() == [OPEN, OPEN]
    assert decide(rule, 0.5, np.array([100])).tolist() == [CERTIFIED, CERTIFIED]
    assert decide(rule, 0.5, np.array([0])).tolist() == [GIVEN_UP, GIVEN_UP]
    between = int(up[0, 0])
    assert decide(rule, 0.5, np.array([between])).tolist() == [CERTIFIED, OPEN]
    later = np.array([between, int(down[1, 1]), 1_000])
    assert decide(rule, 0.5, later[:2]).tolist() == [CERTIFIED, GIVEN_UP]
    assert decide(rule, 0.5, later).tolist() == [CERTIFIED, GIVEN_UP]  # what was decided stays so


def test_looks():
    looks = default_looks(100_000)
    assert looks[:3] == (100, 200, 300) and looks[-1] == 100_000 and len(looks) < 150
    assert default_looks(250) == (100, 200, 250) and default_looks(50) == (50,)
    assert sequential_rule([0.5], n_max=20_000, kind="staged").looks == (100, 1_000, 10_000, 20_000)


@pytest.mark.slow
def test_digits_are_decided_as_by_many_samples_with_far_fewer(starter, digits):
    from conftest import ROOT

    images, radii = digits.take("first:16"), (0.25, 0.5)
    record = sampled(Smoothed(starter, 0.25), images, radii, n_max=10_000, progress=False)
    table = certificates(record)
    fixed = certificates(open_record(ROOT / "data" / "records" / "digits-vit-0.25-sigma-0.25")).iloc[:16]
    assert table["idx"].tolist() == fixed["idx"].tolist()
    for r in radii:
        ours, theirs = (t["correct"] & (t["radius"] >= r) for t in (table, fixed))
        assert not (ours & ~theirs.to_numpy()).sum() > 1 and abs(int(ours.sum()) - int(theirs.sum())) <= 1
    assert table["n"].mean() < 4_000
    assert set(table["radius"]) <= {0.0, *radii} and (table["predict"][table["radius"] == 0] == ABSTAIN).all()


@pytest.mark.slow
def test_submissions_and_interruptions_change_nothing(starter, digits, tmp_path):
    smoothed, images = Smoothed(starter, 0.25), digits.take("range:6:12")
    settings = dict(radii=[0.25, 0.5], n_max=1_000, seed=3, progress=False)
    whole = certificates(sampled(smoothed, images, **settings))
    alone = [certificates(sampled(smoothed, images.take(f"range:{i}:{i + 1}"), **settings)) for i in range(6)]
    columns = ["idx", "predict", "radius", "n", "n_a"]
    assert whole[columns].to_numpy().tolist() == [t[columns].to_numpy()[0].tolist() for t in alone]

    with interrupted_after(20), pytest.raises(KeyboardInterrupt):
        sampled(smoothed, images, out=tmp_path / "r", **settings)
    assert len(open_record(tmp_path / "r").rows()) > 0
    resumed = sampled(smoothed, images, out=tmp_path / "r", **settings)
    assert certificates(resumed)[columns].equals(whole[columns])
    parts = len(resumed.parts())
    assert len(sampled(smoothed, images, out=tmp_path / "r", **settings).parts()) == parts


@pytest.mark.slow
def test_a_part_moved_away_is_sampled_again(starter, digits, tmp_path, monkeypatch):
    """A gap in the middle: what lies behind it does not count until the gap is filled, and then all is as before."""
    from smoothkit.sampling import run

    monkeypatch.setattr(run, "PART_SECONDS", 0.0)
    settings = dict(radii=[0.25, 0.5], n_max=2_000, out=tmp_path / "r", progress=False)
    smoothed, images = Smoothed(starter, 0.25), digits.take("range:20:24")
    whole = certificates(sampled(smoothed, images, **settings))
    parts = open_record(tmp_path / "r").parts()
    for part in (parts[1], parts[5], parts[len(parts) // 2]):  # a selection, an early look, one in the middle
        part.unlink()
    assert len(certificates(open_record(tmp_path / "r"))) < len(whole)
    assert certificates(sampled(smoothed, images, **settings)).equals(whole)


def test_a_record_that_stopped_early_accepts_only_its_own_rule(digits):
    record = sampled(
        Smoothed(lambda x: x.flatten(1)[:, :10], 0.25), digits.take("first:2"), [0.1], n_max=500, progress=False
    )
    assert len(certificates(record, alpha=0.001)) == 2
    for other in (dict(alpha=0.05), dict(n=100)):
        with pytest.raises(RecordError, match="can be read by that rule only"):
            certificates(record, **other)
    with pytest.raises(RecordError, match="no fixed-n sample"):
        record.votes()


def test_wrong_guesses_are_skipped_when_only_certified_accuracy_is_wanted(digits):
    labels = np.array([0, 1])
    images = data.from_arrays(torch.stack([digits[0], digits[0] * 0.999]), labels)
    base = lambda x: torch.nn.functional.one_hot(torch.ones(len(x), dtype=torch.long), 3).float()  # noqa: E731
    record = sampled(Smoothed(base, 0.25), images, [0.25], n_max=500, skip_wrong=True, progress=False)
    table = certificates(record).sort_values("label", ignore_index=True)
    assert table["n"].tolist()[0] == 0 < table["n"].tolist()[1] and table["correct"].tolist() == [False, True]
    assert record.stopping_rule.skip_wrong  # stated in the record


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: sequential_rule([]), "radii must be increasing"),
        (lambda: sequential_rule([-0.1]), "at least 0"),
        (lambda: sequential_rule([0.5], kind="fixed"), "hybrid, kt or staged"),
        (lambda: sequential_rule([0.5], kind="other"), "kind must be one of"),
        (lambda: sequential_rule([0.5], beta=0), "beta must lie"),
        (lambda: sequential_rule([0.5], n_max=0), "n_max must be"),
        (lambda: sequential_rule([0.5], looks=[10, 5, 100_000]), "looks must be increasing"),
        (lambda: sequential_rule([0.5], looks=[10]), "end at n=100000"),
        (lambda: StoppingRule(10, 10, 0.1, radii=(0.5,)), "a fixed rule has no radii"),
        (
            lambda: sampled(Smoothed(lambda x: x, 0.25), torch.zeros(1, 1, 2, 2), [0.9], n_max=1_000),
            "beyond reach",
        ),
        (lambda: sequential_rule([0.5], within=0.1), "not both"),
        (lambda: sequential_rule(within=0.0), "within must be a finite number above 0"),
        (lambda: sequential_rule(within="fine"), "within must be a finite number above 0"),
        (lambda: sequential_rule(kind="radius"), "within must be a finite number above 0"),
        (lambda: sequential_rule([0.5], kind="radius"), "is given none"),
        (lambda: sequential_rule(within=0.1, kind="kt"), "goes with the kind 'radius' only"),
        (
            lambda: StoppingRule(10, 10, 0.1, within=0.1),
            "a fixed rule has no radii, looks, beta, skip_wrong or with",
        ),
        (lambda: check_rule(sequential_rule(within=2.0, n_max=1_000), 0.25), "too coarse: 1,000 unanimous votes"),
        (
            lambda: sampled(Smoothed(lambda x: x, 0.25), torch.zeros(1, 1, 2, 2), [9.0]),
            "no number of samples",
        ),
    ],
)
def test_bad_rules(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("kind", ["hybrid", "kt", "staged"])
def test_radii_beyond_the_cap_are_named_with_the_cap_and_the_n_that_would_do(kind):
    rule = sequential_rule([0.25, 0.7, 0.9], n_max=1_000, kind=kind)
    with pytest.raises(ValueError, match=r"radii 0.7, 0.9 are beyond reach: 1,000 unanimous votes") as caught:
        check_rule(rule, 0.25)
    cap = float(str(caught.value).split("the cap, ")[1].split(";")[0])
    check_rule(sequential_rule([cap], n_max=1_000, kind=kind), 0.25)  # what it names can be certified
    with pytest.raises(ValueError, match=r"radius .* is beyond reach"):
        check_rule(sequential_rule([cap + 0.002], n_max=1_000, kind=kind), 0.25)
    n = int(str(caught.value).split("use n of at least ")[1].replace(",", ""))
    check_rule(sequential_rule(rule.radii, n_max=n, kind=kind), 0.25)
    with pytest.raises(ValueError, match="beyond reach"):
        check_rule(sequential_rule(rule.radii, n_max=n - 1, kind=kind), 0.25)


def test_a_radius_beyond_all_reason_has_no_n_that_would_do():
    with pytest.raises(ValueError, match=r"radius 1.75 is beyond reach.*no number of samples .* 7.0 sigma$"):
        check_rule(sequential_rule([0.25, 1.75], n_max=1_000), 0.25)


def test_command_line(tmp_path, capsys):
    from smoothbook.cli import main

    command = ["certify", "--model", "starter:digits-vit-0.25", "--data", "digits", "--sigma", "0.25", "--n", "2000"]
    assert main([*command, "--subset", "first:5", "--radii", "0.5", "0.25", "--out", str(tmp_path / "r")]) == 0
    assert open_record(tmp_path / "r").stopping_rule.radii == (0.25, 0.5)
    assert main(["report", str(tmp_path / "r"), "--radii", "0.25", "0.5"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].split()[1] == "5"
    assert main(["report", str(tmp_path / "r"), "--alpha", "0.05"]) == 2
    assert "can be read by that rule only" in capsys.readouterr().err


def test_command_line_to_a_radius(tmp_path, capsys):
    from smoothbook.cli import main

    command = ["certify", "--model", "starter:digits-vit-0.25", "--data", "digits", "--sigma", "0.25", "--n", "1000"]
    command += ["--subset", "first:3", "--out", str(tmp_path / "r")]
    assert main([*command, "--within", "0.2"]) == 0
    rule = open_record(tmp_path / "r").stopping_rule
    assert rule.kind == "radius" and rule.within == 0.2
    head, row = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert head[-4:] == ["0", "0.25", "0.5", "ACR"] and row[1] == "3"
    for more, message in ((["--within", "-1"], "within must be"), (["--within", "5"], "too coarse"),
                          (["--radii", "0.25", "2"], "radius 2 is beyond reach: 1,000 unanimous votes")):  # fmt: skip
        assert main([*command[:-1], str(tmp_path / "none"), *more]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        main([*command, "--within", "0.2", "--radii", "0.5"])
    assert "not allowed with" in capsys.readouterr().err
