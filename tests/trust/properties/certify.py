"""Bounds, rules and certificates."""

import functools
import itertools
import math

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from properties.inputs import (
    alphas,
    halves,
    holds,
    mostly,
    numbers,
    odd_floats,
    patch_record,
    shares,
    sigmas,
    small,
    wholes,
)
from smoothkit.certify import (
    betting,
    bounds,
    cascade_certificates,
    certificates,
    certify_votes,
    predict_votes,
    sequential_rule,
)
from smoothkit.certify.cascade import (
    alpha_per_statement,
    cascade_classes,
    cascade_radii,
    certify_cascade,
    fast_predict,
)
from smoothkit.certify.sequential import CERTIFIED, boundaries, claims, decide
from smoothkit.certify.table import error_rates
from smoothkit.records import Identity, Row, create_record
from smoothkit.types import (
    ABSTAIN,
    Certificate,
    NoiseForm,
    StoppingRule,
    Votes,
    block_edges,
    check_alpha,
    check_samples,
    check_sigma,
    check_within,
    round_down,
)


@holds(st.one_of(st.integers(-1, 300), wholes), wholes, alphas)
def clopper_pearson_is_ordered(k, n, alpha):
    low, high = float(bounds.clopper_pearson_lower(k, n, alpha)), float(bounds.clopper_pearson_upper(k, n, alpha))
    assert 0 <= low <= high <= 1 and (alpha >= 0.5 or low <= k / n <= high)


@holds(st.one_of(st.floats(0.4, 0.999), odd_floats(min_value=-0.5, max_value=1.5)), sigmas)
def radius_is_never_negative(p, sigma):
    r = float(bounds.radius(p, sigma))
    assert math.isfinite(r) and r >= 0 and (p > 0.5 or r == 0)
    assert all(0 < bounds.sigma_of_proof(sigma, form) <= sigma for form in (NoiseForm(None), NoiseForm(255)))
    assert 0 <= bounds.radius_for_all(r, 64, 255) <= r


@holds(st.integers(-1, 500), st.integers(200, 2_000), alphas)
def confidence_sequence_below_clopper_pearson(h, t, alpha):
    low = float(betting.kt_lower(h, t, alpha))
    assert (
        0 <= low <= float(bounds.clopper_pearson_lower(h, t, alpha)) and float(betting.kt_upper(h, t, alpha)) >= h / t
    )


@holds(st.integers(-2, 500), st.integers(-2, 500))
def predict_p_values(top, runner_up):
    if top + runner_up >= 0 <= min(top, runner_up):
        assert 0 <= float(bounds.predict_p_value(top, runner_up)) <= 1


@holds(alphas)
def smallest_numbers_of_samples(alpha):
    n = bounds.smallest_n_certify(alpha)
    assert bounds.radius_cap(n, alpha, 1.0) > 0 and (n == 1 or not bounds.radius_cap(n - 1, alpha, 1.0) > 0)


@holds(
    st.one_of(st.just([0.1, 0.25]), st.lists(odd_floats(min_value=-1, max_value=4), max_size=3)),
    wholes,
    alphas,
    st.sampled_from(["hybrid", "hybrid", "kt", "staged", "fixed", "x"]),
)
def sequential_rules(radii, n, alpha, kind):
    rule = sequential_rule(radii, kind=kind, n_max=min(n, 3_000), alpha=alpha)
    up, down = boundaries(rule, 0.25)
    assert (np.diff(up, axis=0) >= 0).all() and (up > down).all()
    assert all(p == 0 and r == 0 for p, r in claims(rule, 0.25, [np.zeros(1, dtype=np.int64)]))


@holds(odd_floats(), st.integers(0, 6))
def radii_are_rounded_down(value, digits):
    if math.isfinite(value) and abs(value) < 1e12:
        assert float(round_down(value, digits)) <= value


three = npst.arrays(np.int64, 3, elements=st.integers(0, 40))
odd_counts = npst.arrays(
    st.sampled_from([np.int64, np.int32, np.float64, np.uint8, bool]),
    npst.array_shapes(min_dims=0, max_dims=2, max_side=4),
)
one_class = npst.arrays(np.int64, 1, elements=st.integers(0, 120))
counts = st.one_of(three, three, one_class, odd_counts)


@holds(counts, counts, wholes, wholes, sigmas, alphas)
def certificates_from_votes(selection, estimation, n0, n, sigma, alpha):
    found = certify_votes(Votes(selection, n0), Votes(estimation, n), sigma=sigma, alpha=alpha)
    assert found.abstained == (found.radius == 0) and found.sentence() and 0 <= found.p_a_lower < 1
    assert found.abstained or found.p_a_lower > 0.5


@holds(counts, wholes, alphas)
def predictions_from_votes(votes, n, alpha):
    answer = predict_votes(Votes(votes, n), alpha=alpha)
    assert answer == ABSTAIN or votes[answer] == votes.max()


@holds(st.integers(1, 3), st.integers(1, 4), st.integers(300, 500), st.data())
def cascades_from_votes(scales, classes, n, drawn):
    votes = [drawn.draw(npst.arrays(np.int64, (2, scales, classes), elements=st.integers(0, 100))) for _ in range(2)]
    wanted = drawn.draw(
        st.one_of(st.just([0.12, 0.25, 1.0][:scales]), st.lists(sigmas, min_size=scales, max_size=scales))
    )
    found = certify_cascade(
        *votes,
        n=n,
        sigmas=wanted,
        alpha=drawn.draw(alphas),
        rule=drawn.draw(st.sampled_from(["max", "cascade", "released"])),
    )
    assert ((found.radius > 0) == (found.predict != ABSTAIN)).all() and not np.isnan(found.radius).any()


@holds(npst.arrays(np.float64, (2, 3), elements=odd_floats(min_value=-1, max_value=2)))
def cascades_of_probabilities(p):
    cascade_classes(p)
    assert not np.isnan(cascade_radii(p, p, sigmas=(0.25, 0.5))).any()


@holds(mostly(st.floats(0.5, 0.999), shares), mostly(st.floats(0.001, 0.5), shares), sigmas)
def two_class_radii(p_a, p_b, sigma):
    r = bounds.two_class_radius(p_a, p_b, sigma)
    assert math.isfinite(r) and r >= 0 and (p_a > p_b or r == 0)
    if p_a < 1 and p_b >= 1 - p_a:  # no longer than with one bound for both
        assert r <= float(bounds.radius(p_a, sigma)) * (1 + 1e-9)


@holds(alphas)
def fewest_samples_that_let_predict_answer(alpha):
    n = bounds.smallest_n_predict(alpha)
    assert bounds.predict_p_value(n, 0) <= alpha and (n == 1 or bounds.predict_p_value(n - 1, 0) > alpha)
    bounds.check_reach(n, alpha, predict=True)


@holds(
    mostly(st.lists(st.integers(1, 400), max_size=4, unique=True).map(sorted), st.lists(wholes, max_size=3)),
    mostly(st.floats(0.1, 0.99), shares),
    alphas,
    alphas,
)
def boundaries_of_the_wealth(looks, p_r, alpha, beta):
    up, down = betting.kt_boundaries(looks, p_r, alpha, beta)
    assert (up > down).all() and (up >= 1).all() and (up <= np.array(looks) + 1).all()
    enough = up <= looks
    proved = betting.log_wealth_above(up[enough], np.array(looks)[enough], p_r)
    assert (proved >= -math.log(alpha)).all()


@holds(wholes, mostly(st.floats(0.1, 0.99), shares), alphas)
def fewest_successes_for_clopper_pearson(n, p_r, alpha):
    k = int(betting.clopper_pearson_count(n, p_r, alpha))
    assert 0 < k <= n + 1 and (k == n + 1 or bounds.clopper_pearson_lower(k, n, alpha) >= p_r * (1 - 1e-9))


boundaries_of_a_test = mostly(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(-1, 0)), min_size=1, max_size=3).map(
        lambda steps: (list(itertools.accumulate(s[0] for s in steps)), [s[1] for s in steps], [s[2] for s in steps])
    ),
    st.tuples(st.lists(wholes, max_size=3), st.lists(small, max_size=3), st.lists(small, max_size=3)),
)


@holds(boundaries_of_a_test, mostly(st.floats(0, 1), shares))
def chances_of_decisions_sum_to_one(test, p):
    looks, up, down = test
    found = betting.decision_probabilities(looks, up, down, p)
    assert abs(found["certified"] + found["rejected"] + found["undecided"] - 1) < 1e-9
    assert 0 <= found["draws"] <= (looks[-1] if looks else 0) * (1 + 1e-12)


@holds(st.one_of(wholes, st.integers(1, 10**9)))
def blocks_cover_all_samples(n):
    edges = block_edges(n)
    assert edges[0] == 0 and edges[-1] == n and (np.diff(edges) > 0).all()


@holds(alphas, sigmas, numbers, wholes)
def checks_refuse_what_is_out_of_range(alpha, sigma, within, n):
    for check, value, right in (
        (check_alpha, alpha, 0 < alpha < 1),
        (check_sigma, sigma, 0 < sigma <= 20),
        (check_within, within, 0 < within < math.inf),
        (functools.partial(check_samples, "n"), n, 1 <= n <= 10**9),
    ):
        try:
            check(value)
        except ValueError as error:
            assert not right and str(value)[:3] in str(error).replace(",", "")
        else:
            assert right


kinds_of_rules = st.sampled_from(
    [("fixed", (), (), None, None), ("hybrid", (0.1, 0.5), (100, 300), 0.01, None), ("radius", (), (300,), 0.01, 0.1)]
)


@holds(
    wholes,
    mostly(st.just(300), wholes),
    alphas,
    st.one_of(kinds_of_rules, st.just(("x", (0.1,), (300,), 0.5, 1.0))),
    mostly(
        st.just({}),
        st.fixed_dictionaries(
            {},
            optional={
                "radii": st.lists(numbers, max_size=3),
                "looks": st.lists(wholes, max_size=3),
                "beta": alphas,
                "within": numbers,
            },
        ),
    ),
)
def stopping_rules(n0, n, alpha, known, odd):
    kind, radii, looks, beta, within = known
    known = {"radii": radii, "looks": looks, "beta": beta, "within": within} | odd
    rule = StoppingRule(n0, n, alpha, kind, **known)
    edges = rule.edges()
    assert edges[-1] == n and (np.diff(edges) > 0).all() and all(math.isfinite(r) for r in rule.radii)


@holds(st.integers(-1, 3), st.floats(0, 9), sigmas, alphas, st.text(max_size=8))
def certificates_in_words(predicted, radius, sigma, alpha, name):
    made = Certificate(predicted, radius, sigma, 10, 100, alpha, 0.9, 95, class_name=name or None)
    assert made.sentence() and "<script" not in made._repr_html_().replace("&lt;", "")


@holds(
    mostly(st.just([0.12, 0.25]), st.lists(st.sampled_from([0.12, 0.25, 0.5]), max_size=3)),
    st.one_of(st.none(), alphas),
    halves,
    st.sampled_from(["max", "cascade", "released", "x"]),
    mostly(st.none(), st.sampled_from([100, 300, 7, 10**30])),
)
def cascades_of_records(scales, alpha, p0, rule, n):
    records = [patch_record(sigma) for sigma in scales]
    table = cascade_certificates(records, alpha=alpha, p0=p0, rule=rule, n=n)
    assert len(table) == 6 and ((table["radius"] > 0) == (table["predict"] != ABSTAIN)).all()
    cap = max(bounds.radius_cap(300, table["alpha"][0], s) for s in scales)  # with the whole of alpha on one scale
    assert (table["radius"] <= cap).all()


@holds(
    mostly(st.just([0.12, 0.25]), st.lists(st.sampled_from([0.12, 0.25]), max_size=3)),
    halves,
    mostly(st.none(), st.sampled_from([100, 300, 7, -1])),
)
def error_rates_are_shares(scales, p0, n):
    found = error_rates([patch_record(sigma) for sigma in scales], p0=p0, n=n)
    parts = found[["right", "over_smoothing", "over_confidence"]].to_numpy()
    assert (parts >= 0).all() and np.allclose(parts.sum(axis=1), 1)


@holds(alphas, wholes)
def shares_of_alpha(alpha, scales):
    assert (
        0 < alpha_per_statement(alpha, scales) * (1 if scales == 1 else 2 * scales) <= alpha * (1 + 1e-12)
        or alpha < 1e-300
    )


@holds(st.integers(1, 3), st.integers(1, 3), mostly(st.just(60), wholes), halves, st.data())
def fast_predictions(scales, count, n, p0, drawn):
    votes = drawn.draw(
        npst.arrays(np.int64, (2, scales, count), elements=mostly(st.integers(0, 20), st.integers(-1, 20)))
    )
    shape = (2, drawn.draw(mostly(st.just(count), st.just(1))))
    logits = drawn.draw(npst.arrays(np.float64, shape, elements=odd_floats()))
    answer, scale = fast_predict(votes, logits, n=n, p0=p0)
    assert ((answer >= 0) & (answer < count)).all() and ((scale >= -1) & (scale < scales)).all()


made_rules = st.builds(
    lambda kind, n, radii, within, alpha: sequential_rule(
        () if kind == "radius" else radii, n0=10, n_max=n, alpha=alpha, kind=kind, within=within if kind == "radius" else None
    ),
    st.sampled_from(["hybrid", "kt", "staged", "radius"]), st.integers(100, 1_500), st.just([0.05, 0.2]),
    st.floats(0.01, 0.5), st.sampled_from([0.05, 0.001]),
)  # fmt: skip


@holds(made_rules, st.lists(st.floats(0, 1), max_size=30), sigmas)
def decisions_are_made_once(rule, steps, sigma):
    if rule.kind == "radius":
        return
    drawn = np.diff(rule.looks, prepend=0)[: len(steps)]  # samples between looks, of which a share are votes
    successes = np.cumsum(np.rint(drawn * np.array(steps[: len(drawn)])).astype(np.int64))
    state = decide(rule, sigma, successes)
    assert len(state) == len(rule.radii)
    certified = np.flatnonzero(state == CERTIFIED)
    assert (
        not len(certified) or (state[: certified[-1]] == CERTIFIED).all()
    )  # a larger radius certifies the smaller ones
    up, _ = boundaries(rule, sigma)
    for r in certified:
        assert (successes[: up.shape[1]] >= up[r, : len(successes)]).any()


@st.composite
def sequential_records(draw):
    """Counts of an image or two, whole blocks of the rule from the first on."""
    rule = draw(made_rules)
    known = Identity("d", "test", "all", "m", "f", 2, 0.25, 0, "float", "float32", rule)
    record = create_record(None, known)
    for i in range(draw(st.integers(0, 2))):
        about = dict(index=i, key=str(i), image_id=i, digest=f"{i}", label=0)
        blocks = [("select", a, b) for a, b in itertools.pairwise(block_edges(rule.n0))]
        blocks += [("estimate", a, b) for a, b in itertools.pairwise(rule.edges())][: draw(st.integers(0, 40))]
        share = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
        record.append(
            [
                Row(**about, purpose=p, start=a, stop=b, counts=(k := int(share * (b - a)), b - a - k))
                for p, a, b in blocks
            ],
            {},
        )
    return record


@holds(sequential_records())
def sequential_records_prove_no_more_than_their_counts(record):
    table = certificates(record)
    for row in table.itertuples():
        limit = float(bounds.radius(bounds.clopper_pearson_lower(row.n_a, row.n, row.alpha), 0.25)) if row.n else 0.0
        assert 0 <= row.radius <= limit * (1 + 1e-9)
        assert row.predict != ABSTAIN or row.radius == 0
