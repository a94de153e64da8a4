"""The attack panel: attacks are judged by fresh noise, and a crossing is red and kept."""

import numpy as np
import pandas as pd
import pytest
import traitlets

from smoothbook.panels.attack import (
    CROSSING,
    AttackPanel,
    Broken,
    attack_figure,
    attack_images,
    attack_table,
    save_case,
)
from smoothkit import Smoothed
from smoothkit.sampling.run import collect_votes
from smoothkit.types import ABSTAIN, StoppingRule


def certificates():
    return pd.DataFrame({"idx": [3, 5, 8], "label": 1, "predict": [1, 1, ABSTAIN], "radius": [0.4, 0.2, 0.0]})


BROKEN = [Broken(0.3, 0, np.zeros((1, 2, 2))), Broken(0.5, 0, np.zeros((1, 2, 2))), None]


def test_a_crossing_is_an_attack_below_the_radius():
    table = attack_table(certificates(), BROKEN)
    assert table["crossing"].tolist() == [True, False, False]
    assert table["instead"].tolist() == [0, 0, ABSTAIN] and np.isnan(table["distance"][2])


def test_the_figure_shows_a_crossing_in_red_and_by_name():
    fig = attack_figure(attack_table(certificates(), BROKEN), sigma=0.25, reach=1.0, title="")
    traces = {trace.name: trace for trace in fig.data}
    assert list(traces["CROSSING"].x) == [0.4] and list(traces["CROSSING"].y) == [0.3]
    assert traces["CROSSING"].marker.color == CROSSING and traces["CROSSING"].marker.symbol == "x"
    assert list(traces["attack succeeds here"].x) == [0.2] and list(traces["none succeeds"].x) == [0.0]
    line = traces["the certified radius"]
    assert line.x == line.y
    at = np.asarray(traces["certified"].x)
    assert np.allclose(traces["certified"].y, [(certificates()["radius"] >= r).mean() for r in at])
    stands = traces["stands under attack"]
    assert np.allclose(stands.y, [1 - np.mean([r >= 0.3, r >= 0.5, False]) for r in stands.x])


def test_an_attack_stops_at_the_border_of_a_half_space(half_space, patches):
    """The smoothed classifier of a half-space changes at its border: no success before it, and one soon after."""
    only = patches.take("range:6:8")
    border = ((only.batch().mean(dim=(1, 2, 3)) - 0.5) * 2).tolist()  # L2 distance in four pixels
    budgets = np.arange(0.1, 1.3, 0.1)
    found = attack_images(Smoothed(half_space, 0.25, model_id="h"), only, [1, 1], budgets, seed=0)
    for broken, distance in zip(found, border, strict=True):
        assert distance - 0.01 < broken.distance < distance + 0.35 and broken.instead == 0
        assert np.allclose(broken.attacked * 255, np.rint(broken.attacked * 255), atol=1e-3)  # on the grid


@pytest.fixture
def panel(half_space, patches, patch_record, tmp_path):
    return AttackPanel(half_space, patches, patch_record, number=8, reach=1.0, cases_dir=tmp_path / "cases")


def test_the_panel_attacks_and_nothing_crosses(panel):
    assert panel.table() is None and "No attack yet" in panel.words
    assert {trace.name for trace in panel.figure.data} == {"certified", "the certified radius"}
    panel.job.start_button.click()
    panel.settle()
    table = panel.table()
    assert not panel.error and len(table) == 8 and not table["crossing"].any() and not panel.cases
    reached = table[table["distance"].notna()]
    assert len(reached) >= 4 and (reached["distance"] > reached["radius"]).all()
    assert "None crossed" in panel.words and panel.figure.layout.meta["attacked"]


def test_alpha_and_n_move_the_line_and_keep_the_attack(panel):
    panel.job.start()
    panel.settle()
    before, distances = panel.table(), panel.table()["distance"]
    panel.alpha_control.slider.value = 0.1
    panel.n_control.slider.value = 100
    after = panel.table()
    assert after["distance"].equals(distances) and not after["radius"].equals(before["radius"])
    assert panel.figure.layout.meta["n"] == 100 and "n = 100" in panel.figure.layout.title.text
    panel.reach = 0.6
    assert panel.table() is None and "No attack yet" in panel.words


def test_a_broken_certificate_is_shown_and_kept(panel, tmp_path, monkeypatch):
    """Radii three times as long as they are must be contradicted."""
    honest = AttackPanel._certificates
    monkeypatch.setattr(
        AttackPanel, "_certificates", lambda self: honest(self).assign(radius=lambda t: 3 * t["radius"])
    )
    panel.job.start()
    panel.settle()
    crossed = panel.table()["crossing"].sum()
    assert crossed > 0 and len(panel.cases) == crossed and f"{crossed} crossed" in panel.words
    assert panel.words.count("<img") == crossed
    files = sorted((tmp_path / "cases").glob("*.npz"))
    assert len(files) == crossed
    case = np.load(files[0])
    assert case["distance"] < case["radius"] and case["attacked"].shape == (1, 2, 2)
    apart = np.linalg.norm(case["attacked"].astype(float) - case["image"].astype(float))
    assert apart == pytest.approx(float(case["distance"]))


def test_attacked_images_are_asked_with_the_noise_of_the_record(half_space, patches):
    rule = StoppingRule(n0=20, n=100, alpha=0.001)
    for noise in ("float", "exact-grid:255"):
        record = collect_votes(
            half_space, patches, sigma=0.25, stopping_rule=rule, noise=noise, model_id="h", progress=False
        )
        assert str(AttackPanel(half_space, patches, record).smoothed.noise) == noise


def test_a_case_is_a_file(tmp_path):
    path = save_case(tmp_path / "new", {"idx": 7, "image": np.zeros((1, 2, 2)), "distance": 0.1, "radius": 0.2})
    assert path.name == "case-image-7.npz" and np.load(path)["radius"] == 0.2


def test_settings_are_checked(half_space, patches, patch_record):
    with pytest.raises(traitlets.TraitError, match="n must be a block edge, one of 100, 1,000; got 300"):
        AttackPanel(half_space, patches, patch_record, n=300)
    with pytest.raises(TypeError, match="unexpected keyword argument 'radius'"):
        AttackPanel(half_space, patches, patch_record, radius=1)
