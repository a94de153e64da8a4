"""A sigma for each image: search, memory, selectors, ledgers."""

import contextlib
import dataclasses
import math
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from properties.inputs import (
    Halves,
    alphas,
    certificate_tables,
    eight,
    folder,
    holds,
    mostly,
    nested,
    numbers,
    odd_floats,
    patches,
    shares,
    sigmas,
    small,
    some_of,
    wholes,
)
from smoothbook.sigma.distances import distances, exact_squared_distance, inside
from smoothbook.sigma.ledger import Ledger
from smoothbook.sigma.memory import RULES, Memory, settle
from smoothbook.sigma.reading import accuracy_by_reading, best_of_grid, three_radii, through_memory
from smoothbook.sigma.search import (
    ClampedRadius,
    FiniteSampleRadius,
    PilotNoise,
    ReleasedRadius,
    SigmaSearch,
    ascend,
    search_sigma,
    soft_probabilities,
)
from smoothbook.sigma.selectors import NearestPrototype, prototypes_by_sigma
from smoothbook.sigma.sound import min_rule
from smoothbook.tables.selectors import read_search, read_selector, read_table
from smoothkit.certify import bounds, certificates
from smoothkit.sampling.run import collect_votes
from smoothkit.types import StoppingRule, check_sigma


@holds(
    mostly(st.sampled_from([0.25, [0.25, 0.5]]), st.one_of(sigmas, st.lists(sigmas, max_size=3))),
    mostly(st.just(60), st.integers(-1, 60)),
    mostly(st.just(0.05), alphas),
    share=0.2,
)
def certificates_at_frozen_sigmas(sigma, n, alpha):
    two = patches().take("every:5")
    rule = StoppingRule(n0=10, n=n, alpha=alpha)
    table = certificates(collect_votes(Halves(), two, sigma=sigma, stopping_rule=rule, progress=False, batch=64))
    assert (table["radius"] <= [bounds.radius_cap(n, alpha, s) for s in table["sigma"]]).all()


OF_SEARCH = {
    "objective": "clamped",
    "steps": 3,
    "step_size": 1e-3,
    "draws": 1,
    "pilot": 4,
    "guard": True,
    "average": 0.0,
}


@holds(
    st.one_of(
        some_of(OF_SEARCH, ("clamp", "n", "alpha", "x")),
        st.just(OF_SEARCH),
        nested(*OF_SEARCH).filter(lambda x: isinstance(x, dict)),
    ),
    sigmas,
)
def settings_of_a_search(settings, sigma0):
    made = read_search(settings)
    assert made.steps >= 1 and made.draws >= 1 and 0 < made.step_size < math.inf
    table = read_table(sigma0, {**settings, "fixed_for": 0.5})
    assert table.search == made


@holds(
    st.one_of(
        some_of({"kind": "prototypes", "sigmas": [0.25], "each": 1, "train_images": "all"}),
        nested("kind", "sigmas").filter(lambda x: isinstance(x, dict)),
    )
)
def settings_of_a_selector(settings):
    read_selector(settings)
    assert settings["kind"] in ("prototypes", "smoothed") and settings["sigmas"]


objectives = st.one_of(
    st.builds(lambda clamp: lambda: ClampedRadius(clamp), mostly(st.just(0.001), shares)),
    st.builds(lambda clamp: lambda: ReleasedRadius(clamp), mostly(st.just(0.02), shares)),
    st.builds(
        lambda n, alpha: lambda: FiniteSampleRadius(n, alpha), wholes.filter(lambda n: not 10**5 < n < 10**7), alphas
    ),
)


@holds(
    objectives,
    mostly(st.just([0.25, 0.5]), st.lists(sigmas, min_size=1, max_size=3)),
    mostly(st.just(1e-3), numbers),
    st.booleans(),
    st.booleans(),
    mostly(st.just(0.0), shares),
    st.sampled_from([0.0, 0.3, math.nan]),
)
def the_ascent_of_sigma(objective, sigma0, step_size, positive, guard, average, base):
    search = SigmaSearch(objective(), steps=4, step_size=step_size, positive=positive, guard=guard, average=average)

    def probabilities(sigma, step):
        p = torch.sigmoid(base + 1 / (sigma + 0.1))
        return torch.stack([p, 1 - p], dim=1)

    found = ascend(probabilities, torch.tensor(sigma0, dtype=torch.float64), search)
    assert (found.sigma > 0).all() and np.isfinite(found.sigma).all() and len(found.sigma) == len(sigma0)
    assert not guard or ((found.after >= found.before) | found.kept).all() or math.isnan(base)


@holds(
    mostly(st.sampled_from([0.25, [0.25, 0.5]]), st.one_of(sigmas, st.lists(sigmas, max_size=3))),
    mostly(st.just(2), small),
    mostly(st.just(0), st.sampled_from([-1, 2**64 - 1, 2**64])),
    share=0.3,
)
def searches_of_sigma(sigma0, batch, seed):
    two = patches().take("every:5")
    search = SigmaSearch(steps=2, pilot=3)
    found = search_sigma(Halves(), two, sigma0=sigma0, search=search, batch=batch, seed=seed, progress=False)
    assert found.sigma.shape == (2,) and (found.sigma > 0).all() and np.isfinite(found.sigma).all()


@holds(sigmas, st.integers(-1, 3), st.integers(-1, 3), st.sampled_from([0, 2**64 - 1]))
def pilot_noise_and_soft_probabilities(sigma, start, stop, seed):
    check_sigma(sigma)
    z = PilotNoise([1, 2], (1, 2, 2), seed, "cpu")(start, stop)
    assert z.shape == (stop - start, 2, 1, 2, 2) and bool(z.isfinite().all())
    p = soft_probabilities(Halves(), torch.rand(2, 1, 2, 2), torch.full((2,), sigma), z)
    assert torch.allclose(p.sum(1), torch.ones(2, dtype=p.dtype)) or not len(z)


vectors = npst.arrays(
    np.float32, 2, elements=st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 1e-38, 1e-45]))
)
questions = st.lists(
    st.tuples(vectors, st.integers(-2, 2), st.one_of(st.floats(0, 2), odd_floats(min_value=-1, max_value=3))),
    max_size=7,
)


@holds(questions, st.sampled_from(RULES))
def a_memory_never_contradicts_itself(asked, rule):
    """Whatever goes in: balls of different labels stay disjoint, and what was promised is answered."""
    memory = Memory(model="m", shape=(1, 1, 2), rule=rule)
    for x, predicted, radius in asked:
        with contextlib.suppress(ValueError):
            memory.answer(x.reshape(1, 1, 2), predicted, radius)
    assert memory.overlaps() == []
    for x, label, radius in zip(memory.points, memory.labels, memory.radii, strict=True):
        assert radius >= 0 and math.isfinite(radius)
        found, room = memory.look_up(x)
        assert radius == 0 or (found == label and room >= radius * (1 - 1e-9))
    settle(np.zeros(2, np.float32), 1, 0.5, memory.points.reshape(-1, 2), memory.labels, memory.radii, rule=rule)


@holds(
    mostly(
        npst.arrays(np.float32, (1, 2, 2), elements=st.floats(0, 1, width=32)),
        npst.arrays(
            st.sampled_from([np.float32, np.float64, np.uint8]), npst.array_shapes(min_dims=0, max_dims=4, max_side=3)
        ),
    ),
    mostly(st.just(1), small),
    mostly(st.just(0.5), numbers),
    mostly(st.just([1, 2, 2]), st.lists(small, max_size=3)),
)
def questions_of_any_shape(image, predicted, radius, shape):
    memory = Memory(model="m", shape=shape)
    answer = memory.answer(image, predicted, radius)
    assert (answer.predicted, answer.radius) == (predicted, radius) and image.shape == memory.shape


@holds(
    mostly(st.lists(st.binary(min_size=4, max_size=4), max_size=3), st.lists(st.binary(max_size=4), max_size=2)),
    st.one_of(st.binary(max_size=60), st.none()),
    st.sampled_from(["entries.bin", "head.json", "ledger.json"]),
)
def ledgers_of_any_bytes(payloads, content, damaged):
    with folder() as place:
        about = {"about": "x"}
        with Ledger(place / "l", about, size=4) as ledger:
            ledger.append(payloads)
            receipt = ledger.receipt
        with Ledger(place / "l", about, size=4, receipt=receipt) as ledger:
            assert ledger.found == payloads
        kept = (place / "l" / damaged).read_bytes()
        (place / "l" / damaged).write_bytes(kept + b"torn" if content is None else content)
        with Ledger(place / "l", about, size=4) as ledger:  # what opens has lost nothing that was told of
            assert ledger.found[: len(payloads)] == payloads


@holds(
    vectors,
    npst.arrays(np.float32, (3, 2), elements=st.floats(0, 1, width=32)),
    npst.arrays(np.float64, 3, elements=st.floats(0, 2)),
)
def distances_are_never_too_generous(x, points, radii):
    low, high = distances(x, points)
    exact = [exact_squared_distance(x, p) for p in points]
    assert all(Fraction(a) ** 2 <= e <= Fraction(b) ** 2 for a, e, b in zip(low, exact, high, strict=True))
    held = inside(x, points, radii, low, high)
    assert held.tolist() == [e < Fraction(float(r)) ** 2 for e, r in zip(exact, radii, strict=True)]


@holds(
    npst.arrays(
        np.float32,
        st.tuples(mostly(st.just(2), st.integers(0, 3)), st.just(1), st.just(1), st.just(2)),
        elements=st.floats(0, 1, width=32),
    ),
    mostly(st.just([0.25, 0.5]), st.lists(sigmas, max_size=3)),
    vectors,
)
def prototypes_keep_sigma_within_their_radius(prototypes, given, x):
    made = NearestPrototype(torch.from_numpy(prototypes), given)
    image = torch.from_numpy(x).reshape(1, 1, 2)
    sigma, radius = made.at(image)
    assert sigma in given and radius >= 0
    if 0 < radius < math.inf:
        towards = torch.from_numpy(np.array([1.0, 0.0], np.float32)).reshape(1, 1, 2)
        for way in (towards, -towards):
            assert made.at(image + 0.99 * radius * way)[0] == sigma


@holds(
    mostly(st.just([0.25] * 4 + [0.6] * 4), st.lists(sigmas, max_size=9)),
    mostly(st.just([0.25, 0.5]), st.lists(sigmas, max_size=3)),
    mostly(st.just(1), small),
    share=0.1,
)
def prototypes_from_found_sigmas(found, sigmas, each):
    train = dataclasses.replace(eight(), split="train")
    made = prototypes_by_sigma(train, found, sigmas=sigmas, each=each)
    assert set(made.sigmas) <= set(sigmas)


@holds(numbers, numbers)
def the_min_rule(sigma_radius, class_radius):
    assert min_rule(sigma_radius, class_radius) == min(sigma_radius, class_radius) >= 0


@holds(
    certificate_tables,
    certificate_tables,
    mostly(st.just([0.25]), st.lists(numbers, max_size=2)),
    mostly(st.none(), numbers),
)
def readings_of_tables(frozen, sound, radii, at):
    with contextlib.suppress(ValueError):
        found = accuracy_by_reading({"frozen": frozen, "sound": sound}, radii)
        assert ((found[[f"{r:g}" for r in radii]] >= 0) & (found[[f"{r:g}" for r in radii]] <= 1)).to_numpy().all()
    with contextlib.suppress(ValueError):
        assert len(three_radii({"frozen": frozen, "sound": sound})) == len(frozen)
    with contextlib.suppress(ValueError):
        memory = Memory(model="m", shape=(1, 1, 2))
        asked = through_memory(memory, [np.full((1, 1, 2), i / 6, np.float32) for i in range(len(frozen))], frozen)
        assert not memory.overlaps() and len(asked) == len(frozen)
    best = best_of_grid({0.25: frozen, 0.5: sound}, at=at)
    assert best.sigma in (0.25, 0.5) and not math.isnan(best.scores[best.sigma])
