"""Sequential certification: sound at every look together, equal to worked values, and thrifty."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from smoothkit import ABSTAIN, Smoothed, data
from smoothkit.bounds import (
    clopper_pearson_count,
    clopper_pearson_lower,
    decision_probabilities,
    kt_boundaries,
    log_wealth_above,
    log_wealth_below,
)
from smoothkit.certify import certificates, sequential_rule
from smoothkit.certify.sequential import CERTIFIED, GIVEN_UP, OPEN, boundaries, decide, default_looks
from smoothkit.records import RecordError, open_record
from smoothkit.types import StoppingRule

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


@pytest.mark.parametrize("margin", [0.8, 1.5])
def test_half_space_is_never_certified_beyond_its_distance(linear, margin):
    sigma = 0.25
    w = torch.randn(3 * 8 * 8, generator=torch.Generator().manual_seed(1))
    image = torch.full((3, 8, 8), 0.5)
    base = linear(w, float(margin * sigma * w.norm() - w.sum() * 0.5))
    radii = [sigma * margin * share for share in (0.5, 0.9, 1.02, 1.3)]
    for kind in ("hybrid", "kt", "staged"):
        record = Smoothed(base, sigma).sample_sequentially(image[None], radii, n_max=20_000, kind=kind, progress=False)
        row = certificates(record).iloc[0]
        assert row["predict"] == 1 and row["radius"] == pytest.approx(radii[1])


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


def test_digits_are_decided_as_by_many_samples_with_far_fewer(starter, digits):
    from conftest import ROOT

    images, radii = digits.take("first:40"), (0.25, 0.5)
    record = Smoothed(starter, 0.25).sample_sequentially(images, radii, n_max=10_000, progress=False)
    table = certificates(record)
    fixed = certificates(open_record(ROOT / "data" / "records" / "digits-vit-0.25-sigma-0.25")).iloc[:40]
    assert table["idx"].tolist() == fixed["idx"].tolist()
    for r in radii:
        ours, theirs = (t["correct"] & (t["radius"] >= r) for t in (table, fixed))
        assert not (ours & ~theirs.to_numpy()).sum() > 1 and abs(int(ours.sum()) - int(theirs.sum())) <= 2
    assert table["n"].mean() < 4_000
    assert set(table["radius"]) <= {0.0, *radii} and (table["predict"][table["radius"] == 0] == ABSTAIN).all()


def test_submissions_and_interruptions_change_nothing(starter, digits, tmp_path):
    smoothed, images = Smoothed(starter, 0.25), digits.take("range:6:12")
    settings = dict(radii=[0.25, 0.5], n_max=1_000, seed=3, progress=False)
    whole = certificates(smoothed.sample_sequentially(images, **settings))
    alone = [
        certificates(smoothed.sample_sequentially(images.take(f"range:{i}:{i + 1}"), **settings)) for i in range(6)
    ]
    columns = ["idx", "predict", "radius", "n", "n_a"]
    assert whole[columns].to_numpy().tolist() == [t[columns].to_numpy()[0].tolist() for t in alone]

    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt

    hook = starter.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        smoothed.sample_sequentially(images, out=tmp_path / "r", **settings)
    hook.remove()
    assert len(open_record(tmp_path / "r").rows()) > 0
    resumed = smoothed.sample_sequentially(images, out=tmp_path / "r", **settings)
    assert certificates(resumed)[columns].equals(whole[columns])
    parts = len(resumed.parts())
    assert len(smoothed.sample_sequentially(images, out=tmp_path / "r", **settings).parts()) == parts


def test_a_part_moved_away_is_sampled_again(starter, digits, tmp_path, monkeypatch):
    """A gap in the middle: what lies behind it does not count until the gap is filled, and then all is as before."""
    from smoothkit import votes

    monkeypatch.setattr(votes, "PART_SECONDS", 0.0)
    settings = dict(radii=[0.25, 0.5], n_max=2_000, out=tmp_path / "r", progress=False)
    smoothed, images = Smoothed(starter, 0.25), digits.take("range:20:24")
    whole = certificates(smoothed.sample_sequentially(images, **settings))
    parts = open_record(tmp_path / "r").parts()
    for part in (parts[1], parts[5], parts[len(parts) // 2]):  # a selection, an early look, one in the middle
        part.unlink()
    assert len(certificates(open_record(tmp_path / "r"))) < len(whole)
    assert certificates(smoothed.sample_sequentially(images, **settings)).equals(whole)


def test_a_record_that_stopped_early_accepts_only_its_own_rule(digits):
    record = Smoothed(lambda x: x.flatten(1)[:, :10], 0.25).sample_sequentially(
        digits.take("first:2"), [0.1], n_max=500, progress=False
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
    record = Smoothed(base, 0.25).sample_sequentially(images, [0.25], n_max=500, skip_wrong=True, progress=False)
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
            lambda: Smoothed(lambda x: x, 0.25).sample_sequentially(torch.zeros(1, 1, 2, 2), [0.9], n_max=1_000),
            "beyond reach",
        ),
        (
            lambda: Smoothed(lambda x: x, 0.25).sample_sequentially(torch.zeros(1, 1, 2, 2), [9.0]),
            "no number of samples",
        ),
    ],
)
def test_bad_rules(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_command_line(tmp_path, capsys):
    from smoothkit.cli import main

    command = ["certify", "--model", "starter:digits-vit-0.25", "--data", "digits", "--sigma", "0.25", "--n", "2000"]
    assert main([*command, "--subset", "first:5", "--radii", "0.5", "0.25", "--out", str(tmp_path / "r")]) == 0
    assert open_record(tmp_path / "r").stopping_rule.radii == (0.25, 0.5)
    assert main(["report", str(tmp_path / "r"), "--radii", "0.25", "0.5"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].split()[1] == "5"
    assert main(["report", str(tmp_path / "r"), "--alpha", "0.05"]) == 2
    assert "can be read by that rule only" in capsys.readouterr().err
