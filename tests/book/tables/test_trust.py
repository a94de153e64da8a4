"""Results of data/trust, as notebook 70 reads them, and their figures."""

import json

import pandas as pd
import pytest

from smoothbook.figures import trust as drawn
from smoothbook.tables import trust

REFEREE = {
    "rules": [
        {"rule": "fixed", "case": "n = 12", "alpha": 0.1, "chance": 0.05, "of alpha": 0.5, "held": True},
        {"rule": "fixed", "case": "n = 100", "alpha": 0.1, "chance": 0.0999912, "of alpha": 0.999912, "held": True},
        {"rule": "predict", "case": "n = 40", "alpha": 0.1, "chance": 0.1, "of alpha": 1 + 1e-12, "held": True},
        {"rule": "kt", "case": "radius 0", "alpha": 0.1, "chance": 0.11, "of alpha": 1.1, "held": False},
    ],
    "attacks": [{"attack": "a seed", "about": "Known beforehand.", "held": True}],
}


def test_the_worst_of_every_rule_is_shown_and_rounded_up():
    shown = trust.rules_refereed(REFEREE)
    assert shown.to_numpy().tolist() == [
        ["fixed", 2, "1.0000", "n = 100", "yes"], ["predict", 1, "1.0000", "n = 40", "yes"],
        ["kt", 1, "1.1000", "radius 0", "NO"],
    ]  # fmt: skip
    assert trust.attacks_refereed(REFEREE).to_numpy().tolist() == [["a seed", "Known beforehand.", "yes"]]


def test_a_result_that_is_not_there_is_none_and_a_damaged_one_named(tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "data_folder", lambda: tmp_path)
    (tmp_path / "trust").mkdir()
    assert trust.trust_result("referee") is None
    (tmp_path / "trust" / "referee.json").write_text(json.dumps({"made_by": "make referee", **REFEREE}))
    assert trust.trust_result("referee")["rules"] == REFEREE["rules"]
    (tmp_path / "trust" / "referee.json").write_text("{")
    with pytest.raises(ValueError, match=r"referee\.json"):
        trust.trust_result("referee")


def test_versions_are_a_line_each():
    found = trust.versions_tried(trust.trust_result("versions"))
    assert list(found.columns) == [
        "versions", "torch", "timm", "peft", "diffusers", "numpy", "tests", "passed", "failed", "skipped",
    ]  # fmt: skip
    assert set(found["versions"]) == {"lowest", "newest"} and not found["tests"].str.contains("--ignore").any()


def test_hours_are_shared_evenly():
    hours = drawn.hours_on_gpus(pd.Series({"fixed": 100.0, "early": 10.0}), most=100)
    at = hours.set_index(["rule", "gpus"])["hours"]
    assert at["fixed", 1] == 100 and at["fixed", 100] == 1 and at["early", 100] == 0.1
    fig = drawn.hours_figure(hours, "hours")
    assert [t.name for t in fig.data] == ["fixed", "early"]
    assert fig.layout.xaxis.type == fig.layout.yaxis.type == "log"


def test_figures_draw_the_numbers_they_are_given():
    driver = pd.DataFrame({"images": [1, 10], "driver seconds": [2.0, 3.0], "driver MB": [4.0, 5.0]})
    assert [list(t.y) for t in drawn.driver_figure(driver).data] == [[2.0, 3.0], [4.0, 5.0]]
    faults = pd.DataFrame({"fault": ["a", "b"], "injected": [5, 7], "survived": [5, 4]})
    assert [list(t.x) for t in drawn.faults_figure(faults).data] == [[5, 4], [0, 3]]
    cases = pd.DataFrame({
        "certificate": ["fixed", "kt"], "case": ["x", "y"], "false": [1, 3], "issued": [100, 100], "alpha": [0.01, 0.02],
    })  # fmt: skip
    assert [list(t.x) for t in drawn.coverage_figure(cases).data] == [[1.0], [1.5]]
