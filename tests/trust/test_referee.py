"""The referee in its short form, and that it knows every rule of the package."""

import pytest
import referee
from results import read

from smoothkit.certify import bounds


@pytest.mark.slow
def test_no_rule_claims_too_often_and_no_attack_gets_through():
    found = referee.judge(thorough=False)
    assert [x for x in [*found["rules"], *found["attacks"]] if not x["held"]] == []
    assert len(found["rules"]) > 60 and max(x["of alpha"] for x in found["rules"]) > 0.9, (
        "the checks are near what is promised"
    )


def test_every_rule_of_the_package_is_listed():
    assert set(referee.RULES) == referee.OF_THE_PACKAGE


def test_it_notices_a_bound_that_is_too_large(monkeypatch):
    honest = bounds.clopper_pearson_lower
    monkeypatch.setattr(referee, "clopper_pearson_lower", lambda k, n, alpha: honest(k, n, 1.01 * alpha))
    assert any(chance > alpha for _, chance, alpha in referee.fixed(False))


def test_the_kept_result_held():
    kept = read("referee")
    assert kept["held"] and {x["rule"] for x in kept["rules"]} == set(referee.RULES)
    assert {x["attack"] for x in kept["attacks"]} == set(referee.ATTACKS)
