"""The short version of `make coverage`, and that it would notice a bound that is too high."""

import measure_coverage
import numpy as np
import pytest
from measure_coverage import attacks, fixed, measure
from results import read
from scipy import stats

from smoothkit.certify import bounds
from smoothkit.certify import fixed as certify_fixed


def test_no_kind_is_false_more_often_than_alpha():
    rows = measure(1_000)
    assert [r for r in rows if not r["kept"]] == []
    kinds = {r["certificate"].split(",")[0] for r in rows}
    assert kinds == {"fixed", "sequential", "max over k", "cascade", "predict", "sound sigma"}
    for row in rows:  # simulation and exact sum agree, where there is one; each fails once in a million by chance
        if row["exact"]:
            assert stats.binomtest(row["false"], row["issued"], row["exact"]).pvalue > 1e-6, row


def test_it_would_notice(monkeypatch):
    """A bound at ten times the alpha it claims."""
    honest = bounds.clopper_pearson_lower
    monkeypatch.setattr(certify_fixed, "clopper_pearson_lower", lambda k, n, alpha: honest(k, n, 10 * alpha))
    assert any(not r["kept"] for r in fixed(np.random.default_rng(0), 400))


@pytest.mark.slow
def test_an_attack_stays_inside_and_would_be_noticed(monkeypatch):
    found = attacks(2, 8, steps=4, samples=200)
    assert found["successes"] == 0 and 0.5 < found["largest_used_of_radius"] < 1 and found["upper"] < 1
    outside = measure_coverage.certificates

    def too_large(record):
        table = outside(record)
        return table.assign(radius=table["radius"].where(table["predict"] < 0, 3.0))

    monkeypatch.setattr(measure_coverage, "certificates", too_large)
    assert attacks(2, 8, steps=6, samples=200)["successes"] > 0  # radii of 3 are false, and the attack finds it


def test_the_kept_result():
    kept = read("coverage")
    assert kept["cases_above_alpha"] == 0 and kept["issued"] > 300_000 and kept["false"] > 0
    attack = kept["attacks"]
    assert attack["restarts"] >= 100 and attack["successes"] == 0 and attack["upper"] == pytest.approx(
        1 - 0.05 ** (1 / attack["attempts"]), rel=1e-6
    )  # fmt: skip
