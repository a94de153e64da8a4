"""What notebooks 40 and 41 say, from the committed votes of their table."""

import pytest

from smoothbook import tables
from smoothbook.tables.claims import _parts, _side
from smoothkit.certify import cascade_certificates, certificates
from smoothkit.certify.bounds import radius_cap
from smoothkit.certify.cascade import alpha_per_statement
from smoothkit.certify.table import error_rates
from smoothkit.reading import average_certified_radius, certified_accuracy, compare
from smoothkit.records import open_record

SIGMAS = (0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def folder():
    return tables.open("denoising").folder


def scales(folder, kind="diffusion"):
    return {s: open_record(folder / f"{kind}-{s:.2f}") for s in SIGMAS}


def test_diffusion_is_fifty_points_above_the_clean_classifier_alone(folder):
    """At sigma 0.5 and radius 0.25, on the same images; beside LoRA and full noise training."""
    names = [f"{k}-0.50" for k in ("clean-base", "diffusion", "lora-16", "full")]
    curves = tables.open("denoising").certificates(names, shared=True)
    assert len(curves["diffusion"]) >= 60
    apart = compare(curves, "clean base", [0.25]).set_index(["row", "what"])
    assert apart.loc[("diffusion", "0.25"), "difference"] >= 0.5 and apart.loc[("diffusion", "0.25"), "low"] > 0.4
    beside = compare(curves, "diffusion", [0.25]).set_index(["row", "what"])
    assert {"LoRA, rank 16", "full noise training"} <= {row for row, _ in beside.index}


@pytest.mark.parametrize("kind", ["diffusion", "mixture", "calibrated"])
def test_the_cascade_beside_its_largest_scale_and_the_best_of_all(folder, kind):
    records = scales(folder, kind)
    alpha = records[0.75].stopping_rule.alpha
    cascade, best = (cascade_certificates(records, rule=rule) for rule in ("cascade", "max"))
    largest = certificates(records[0.75], alpha=alpha_per_statement(alpha, 3))
    assert certified_accuracy(cascade, [0.0])[0] >= certified_accuracy(largest, [0.0])[0]
    assert (best.radius >= cascade.radius).all() and average_certified_radius(best) > average_certified_radius(cascade)
    one = records[0.25].stopping_rule.n0 + records[0.25].stopping_rule.n
    assert one < cascade.calls.mean() < best.calls.mean() == 3 * one  # network calls for an image
    assert (cascade_certificates(records, upper="classes").radius <= best.radius).all()


def test_the_cascade_reaches_beyond_its_smallest_sigma(folder):
    records = scales(folder)
    rule = records[0.25].stopping_rule
    cap = radius_cap(rule.n, rule.alpha, 0.25)
    for rule in ("cascade", "max"):
        table = cascade_certificates(records, rule=rule)
        assert table.radius[table.correct].max() > cap


def test_error_rates_are_shares_of_images(folder):
    for kind in ("diffusion", "calibrated", "calibrated-neither", "calibrated-brier", "calibrated-anti"):
        rates = error_rates(scales(folder, kind))
        assert rates.sigma.tolist() == list(SIGMAS) and (rates.images == 60).all()
        assert rates[["right", "over_smoothing", "over_confidence"]].sum(axis=1).to_numpy() == pytest.approx(1)
        assert rates.right.is_monotonic_decreasing and rates.over_smoothing.is_monotonic_increasing


def test_a_side_of_a_claim_may_be_several_scales(folder):
    name = "max: " + " ".join(f"diffusion-{s:.2f}" for s in SIGMAS)
    assert _parts(name) == ("max", ["diffusion-0.25", "diffusion-0.50", "diffusion-0.75"])
    assert _parts("full-0.50") == ("", ["full-0.50"])
    assert _side(tables.open("denoising"), name).radius.tolist() == cascade_certificates(scales(folder)).radius.tolist()
    assert len(_side(tables.open("denoising"), "full-0.50")) == 360


def test_claims_of_one_table_are_those_of_all():
    """Every claim on this table is decided; the ones on others are left alone."""
    found = tables.claims("denoising")
    assert set(found.experiment.str.split(":").str[0]) == {"denoising"} and len(found) >= 15
    assert set(found.holds) <= {"yes", "no", "unclear"}
    fifty = found[found.margin == "+0.5"]
    assert fifty.holds.tolist() == ["yes"] and tables.claims("noise-training").empty
