"""Accuracy, intervals, logs and audits."""

import functools
import json
import math

import numpy as np
import pandas as pd
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from properties.inputs import (
    Halves,
    alphas,
    certificate_tables,
    copy_record,
    folder,
    holds,
    kept_record,
    mostly,
    numbers,
    odd_floats,
    patch_record,
    patches,
    right_tables,
    scalars,
    shares,
    sigmas,
    small,
    wholes,
)
from smoothkit.reading import (
    about_records,
    alpha,
    audit,
    average_certified_radius,
    certified_accuracy,
    certified_accuracy_interval,
    envelope,
    format_table,
    intervals,
    logs,
    report,
)
from smoothkit.reading.audit import FAILED, PASSED
from smoothkit.types import ABSTAIN, round_down


@holds(npst.arrays(np.float64, st.integers(0, 5), elements=odd_floats()), st.lists(odd_floats(), max_size=3))
def rates_lie_between_0_and_1(radius, radii):
    table = pd.DataFrame({"predict": np.zeros(len(radius), int), "radius": radius, "correct": True})
    assert ((certified_accuracy(table, radii) >= 0) & (certified_accuracy(table, radii) <= 1)).all()
    average_certified_radius(table)
    format_table(table, "latex")


@holds(mostly(st.integers(0, 50), wholes), mostly(st.integers(50, 99), wholes), mostly(st.just(0.95), shares))
def wilson_intervals(k, n, level):
    low, high = intervals.wilson_interval(k, n, level)
    assert 0 <= low <= high <= 1 and low <= k / n * (1 + 1e-9) and k / n <= high * (1 + 1e-9)


@holds(
    certificate_tables,
    certificate_tables,
    mostly(st.just([0.25]), st.lists(numbers, max_size=2)),
    mostly(st.just(0.95), shares),
    mostly(st.just(20), small),
    mostly(st.just(0), small),
)
def paired_differences(table, other, radii, level, draws, seed):
    found = intervals.paired_bootstrap(table, other, radii, level=level, draws=draws, seed=seed)
    assert len(found) == len(set(map("{:g}".format, radii))) + 1
    assert (found["low"] <= found["high"]).all() and not found[["difference", "low", "high"]].isna().any(axis=None)
    against = intervals.compare({"a": table, "b": other}, "b", radii, draws=draws, seed=seed)
    assert set(against["verdict"]) <= {"above", "below", "not told apart"}


@holds(
    mostly(st.integers(0, 40), wholes),
    mostly(st.integers(0, 40), wholes),
    mostly(st.integers(80, 99), wholes),
    mostly(st.just(0.95), shares),
)
def intervals_of_paired_proportions(gained, lost, n, level):
    low, high = intervals.paired_difference_interval(gained, lost, n, level)
    assert low <= high and math.isfinite(low) and math.isfinite(high)


@holds(certificate_tables, mostly(st.just(0.25), numbers), mostly(st.just(0.95), shares))
def intervals_of_certified_accuracy(table, r, level):
    low, high = certified_accuracy_interval(table, r, level)
    right = float((table["correct"] & (table["radius"] >= r)).mean())
    assert 0 <= low <= right <= high <= 1


@holds(
    mostly(st.lists(right_tables, min_size=1, max_size=3), st.lists(certificate_tables, max_size=3)),
    mostly(st.just([0.25]), st.lists(numbers, max_size=3)),
)
def envelopes(found, radii):
    named = {str(i): table for i, table in enumerate(found)}
    frame = envelope(named, radii)
    assert frame["envelope"].between(0, 1).all() and set(frame["which"]) <= named.keys()


@holds(
    mostly(st.just([0.12, 0.25]), st.lists(st.sampled_from([0.12, 0.25]), max_size=3)),
    mostly(st.none(), alphas),
    mostly(st.just([0.25]), st.lists(numbers, max_size=2)),
    share=0.3,
)
def records_in_words_and_tables(scales, alpha, radii):
    found = about_records([patch_record(s) for s in scales], alpha)
    assert "\n" not in found and "halves" in found
    with folder() as place:
        copy_record(place / "a")
        assert len(report([place / "a"], radii, alpha)) == 1


@holds(
    certificate_tables,
    mostly(st.just(0.25), sigmas),
    mostly(st.just(300), wholes.filter(lambda n: not 10**5 < n < 10**10)),
    mostly(st.just(0.001), alphas),
)
def logs_written_and_read(table, sigma, n, claimed):
    """What was written is read again, radii never longer; and a finding about alpha, or why there is none."""
    with folder() as place:
        logs.write_log(table, place / "sigma_0.25")
        again = logs.read_log(place / "sigma_0.25").table
        kept = table["predict"] != ABSTAIN
        assert (again["predict"].to_numpy() == table["predict"].to_numpy()).all()
        assert (again["radius"][kept] <= table["radius"][kept]).all()
        assert (again["radius"][kept] >= table["radius"][kept] - 1e-6).all()
    assert alpha.infer_alpha(table, sigma, n, claimed).text


@holds(odd_floats(), st.one_of(st.integers(0, 9), small))
def radii_as_text(value, digits):
    text = round_down(value, digits)
    assert math.isnan(value) or float(text) <= value


IDENTITY = ("dataset", "split", "subset", "model", "fingerprint", "num_classes", "sigma", "seed", "noise", "precision")
OF_RULE = ("n0", "n", "alpha", "kind", "radii", "looks", "beta", "skip_wrong", "within")
odd_values = st.one_of(
    scalars, st.lists(numbers, max_size=2),
    st.sampled_from(["grid:0", "grid:", "exact-grid:255", "float:3", "grid:255", 2, 3, 0.5, "hybrid", "kt", "radius", "per image"]),
)  # fmt: skip


@holds(
    st.one_of(
        st.sampled_from([("identity", k) for k in IDENTITY]),
        st.sampled_from([("identity", "stopping_rule", k) for k in OF_RULE]),
        st.sampled_from([("format",), ("identity",), ("class_names",), ("sha256",), ("identity", "stopping_rule")]),
    ),
    odd_values,
    share=0.5,
)
def audits_of_a_record_with_one_field_replaced(path, value):
    """Refused, or failed, or what was replaced said the same; a wrong description never passes."""
    known = json.loads(json.dumps({k: v for k, v in kept_record().items() if k not in ("parts", "sha256")}))
    place_in = functools.reduce(lambda d, k: d[k], path[:-1], known)
    same = path[-1] in place_in and place_in[path[-1]] == value
    place_in[path[-1]] = value
    with folder() as place:
        found = audit(copy_record(place / "r", known), redraw=2, seed=0, images=patches(), base_classifier=Halves())
        harmless = same or path[-1] in ("split", "subset", "model", "class_names", "alpha", "precision")
        assert found.verdict in (FAILED, "not checked") or harmless, (path, value, found.checks)
        assert found.exit_status in (0, 1, 3) and len(found.table()) == len(found.checks)


@holds(st.one_of(st.just(1), small), st.integers(0, 3))
def audits_of_a_good_record(redraw, seed):
    with folder() as place:
        found = audit(copy_record(place / "r"), redraw=redraw, seed=seed, images=patches(), base_classifier=Halves())
        assert found.verdict == (PASSED if redraw else "not checked"), found.checks
