"""Smoothing, streams of votes and cascades that are sampled."""

import contextlib
import warnings

import numpy as np
from hypothesis import strategies as st

from properties.inputs import (
    Constant,
    Halves,
    alphas,
    halves,
    holds,
    logit_values,
    mostly,
    numbers,
    patches,
    sigmas,
    small,
    some_of,
    wholes,
)
from smoothkit import Purpose, Smoothed
from smoothkit.certify import (
    cascade_certificates,
    certificates,
    sequential_rule,
)
from smoothkit.sampling.cascade import sample_cascade
from smoothkit.sampling.run import collect_votes
from smoothkit.sampling.stream import VoteStream
from smoothkit.types import ABSTAIN


@holds(
    logit_values,
    sigmas,
    mostly(st.integers(20, 60), wholes),
    alphas,
    mostly(st.just(0), st.sampled_from([2**64 - 1, -1, 2**64])),
    mostly(st.none(), st.sampled_from(["grid:255", "float", "grid", "exact-grid", "grid:0", "grid:x", 255, "x"])),
    share=0.25,
)
def smoothing_a_constant(values, sigma, n, alpha, seed, noise):
    """Any logits, one class, NaN: a certificate for the class that all votes are for, or none."""
    if 10**5 < n < 10**10:  # allowed, and takes its time
        return
    smoothed = Smoothed(Constant(values), sigma, model_id="constant", batch=64)
    known = dict(n0=10, n=n, alpha=alpha, seed=seed, noise=noise, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for made in smoothed.certify(patches().take("first:2"), **known):
            assert 0 <= made.radius <= smoothed.radius_cap(n, alpha)
            assert not np.isnan(values).any() or made.abstained
        answers = smoothed.predict(patches().take("first:2"), n=n, alpha=alpha, seed=seed)
    assert set(answers.tolist()) <= {ABSTAIN, *range(len(values))}


@holds(
    mostly(st.just([0.05, 0.1]), st.lists(numbers, max_size=2)),
    sigmas,
    mostly(st.integers(100, 200), wholes),
    mostly(st.just(0.05), alphas),
    mostly(st.just(0.05), numbers),
    share=0.25,
)
def smoothing_until_it_is_decided(radii, sigma, n, alpha, within):
    if 10**5 < n < 10**10:
        return
    smoothed = Smoothed(Halves(), sigma, model_id="halves", batch=64)
    known = dict(n0=10, n_max=n, alpha=alpha)
    two = patches().take("every:5")
    with contextlib.suppress(ValueError):
        table = certificates(smoothed.sample(two, rule=sequential_rule(within=within, **known), progress=False))
        assert (table["radius"] <= smoothed.radius_cap(n, alpha)).all()
    table = certificates(smoothed.sample(two, rule=sequential_rule(radii, **known), progress=False))
    assert set(table["radius"]) <= {0.0, *radii}


@holds(mostly(st.just(0.1), numbers), sigmas, share=0.15)
def sequential_rules_are_followed(radius, sigma):
    rule = sequential_rule([radius], n0=10, n_max=200, alpha=0.05)
    record = collect_votes(
        Halves(), patches().take("first:2"), sigma=sigma, stopping_rule=rule, model_id="h", progress=False
    )
    assert len(certificates(record)) == 2


@holds(
    mostly(st.sampled_from([[0.25], [0.5, 0.25]]), st.lists(sigmas, max_size=3)),
    mostly(st.just(0.05), alphas),
    halves,
    mostly(st.just(100), wholes),
    share=0.15,
)
def cascades_from_the_largest_scale_down(scales, alpha, p0, n):
    if 10**5 < n < 10**10:
        return
    two = patches().take("every:5")
    records = sample_cascade(
        dict.fromkeys(scales, Halves()), two, n0=10, n=n, alpha=alpha, p0=p0, progress=False, batch=64
    )
    table = cascade_certificates(records, p0=p0, rule="cascade", sigmas=sorted(set(scales)))
    assert len(table) == 2


@holds(
    mostly(st.just({}), some_of({"batch": 8, "seed": 0, "noise": "grid:255"}, odd=st.one_of(small, st.just(2**64)))),
    sigmas,
    share=0.2,
)
def streams_of_votes(settings, sigma):
    two = patches().take("first:2")
    stream = VoteStream(Halves(), two, **{"sigma": sigma, "seed": 1, "noise": "grid:255", **settings})
    from smoothkit.sampling.batches import Task

    ((_, counts, _),) = stream.run([Task(1, Purpose.PREDICT, 0, 20)])
    assert counts.sum() <= 20 and len(counts) == 2
