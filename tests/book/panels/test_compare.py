"""The compare panel: common images, the table by class, and the paired difference."""

import numpy as np
import pytest
import traitlets

from smoothbook.panels.compare import ComparePanel, by_class, common_images, counted_radius
from smoothbook.panels.curve import read_counts
from smoothkit.certify import certificates
from smoothkit.reading import paired_bootstrap
from smoothkit.sampling.run import collect_votes
from smoothkit.types import StoppingRule

NAMES = ("digits-vit-0.12-sigma-0.12", "digits-vit-0.25-sigma-0.25")


@pytest.fixture(scope="module")
def panel(kept):
    return ComparePanel(kept, [str(c) for c in range(10)])


def test_it_shows_the_radii_of_each_image(panel, kept):
    first, second = (certificates(kept[name]) for name in NAMES)
    assert (panel.first, panel.second) == NAMES and not panel.error
    one, two = counted_radius(first), counted_radius(second)
    traces = [t for t in panel.figure.data if t.name.startswith("longer") or t.name == "neither"]
    points = np.concatenate([np.c_[t.customdata, t.x, t.y] for t in traces])
    assert np.allclose(points[points[:, 0].argsort()], np.c_[first["idx"], one, two])
    assert all((np.asarray(t.y) > t.x).all() for t in traces if t.name == f"longer: {NAMES[1]}")


def test_the_difference_is_the_paired_one(panel, kept):
    wanted = paired_bootstrap(*(certificates(kept[name]) for name in NAMES[::-1]), (0.0, 0.25, 0.5, 0.75), draws=4_000)
    shown = next(t for t in panel.figure.data if t.name == "difference")
    assert np.allclose(shown.y, wanted["difference"]) and np.allclose(shown.customdata, wanted[["low", "high"]])
    assert f"{wanted['difference'].iloc[-1]:+.3f}" in panel.words


def test_the_table_by_class_adds_up(kept):
    first, second = (certificates(kept[name]) for name in NAMES)
    table = by_class(first, second, NAMES)
    classes, total = table.iloc[:-1], table.iloc[-1]
    assert total["images"] == classes["images"].sum() == 360 and len(classes) == 10
    for name, source in zip(NAMES, (first, second), strict=True):
        assert total[name] == pytest.approx((classes[name] * classes["images"]).sum() / 360)
        assert total[name] == pytest.approx(counted_radius(source).mean())
    assert total["difference"] == pytest.approx(total[NAMES[1]] - total[NAMES[0]])
    assert total[f"longer: {NAMES[0]}"] + total[f"longer: {NAMES[1]}"] <= 360


def test_settings_and_controls_move_it(panel, kept):
    panel.choices[1].value = "digits-vit-0.50-sigma-0.50"
    assert panel.second == "digits-vit-0.50-sigma-0.50" == panel.figure.layout.meta["second"]
    panel.n_control.slider.value = 100
    panel.alpha = 0.2
    assert panel.figure.layout.meta["alpha"] == 0.2 and "n = 100" in panel.figure.layout.title.text
    first = certificates(kept[NAMES[0]], alpha=0.2, n=100)
    assert panel.tables()[0]["radius"].tolist() == first["radius"].tolist()
    panel.second, panel.n, panel.alpha = NAMES[1], 10_000, 0.001


def test_only_common_images_are_compared(half_space, patches):
    how = dict(sigma=0.25, stopping_rule=StoppingRule(n0=20, n=100, alpha=0.001), model_id="h", progress=False)
    few, others = (collect_votes(half_space, patches.take(rule), **how) for rule in ("first:5", "range:3:8"))
    panel = ComparePanel({"few": few, "others": others})
    assert [len(t) for t in panel.tables()] == [2, 2] and "2 common images" in panel.figure.layout.title.text
    apart = collect_votes(half_space, patches.take("range:6:8"), **how)
    with pytest.raises(ValueError, match="few and apart have no image in common"):
        common_images(read_counts(few, "few"), read_counts(apart, "apart"))
    panel = ComparePanel({"few": few, "apart": apart})
    assert "no image in common" in panel.error


def test_settings_are_checked(kept):
    with pytest.raises(ValueError, match="at least two, got 1"):
        ComparePanel({"one": kept[NAMES[0]]})
    with pytest.raises(traitlets.TraitError, match="second must be one of"):
        ComparePanel(kept, second="mine")
