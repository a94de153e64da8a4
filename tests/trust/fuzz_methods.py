"""Bad input for what a user of the five systems calls, beyond the core of `fuzz_inputs`: more properties for `make fuzz`.

As there: whatever number, text, array, JSON or YAML goes in, a function keeps its promise or says in a line what would do.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from fuzz_inputs import alphas, greys, holds, main, names, odd_floats, sigmas, wholes
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from traitlets import TraitError

from smoothbook import adapters, denoise, figures, training
from smoothbook.adapters.base import read_config
from smoothbook.bench import plan as planning
from smoothbook.panels.attack import AttackPanel
from smoothbook.panels.compare import ComparePanel
from smoothbook.panels.curve import CurvePanel, curve_frames, read_counts
from smoothbook.panels.explorer import Explorer
from smoothbook.panels.image import ImagePanel
from smoothbook.panels.memory import MemoryPanel
from smoothbook.panels.slice import SlicePanel
from smoothbook.runner import exercises as checks
from smoothbook.runner import run as workbook
from smoothbook.runner.workshop import write_workshop
from smoothbook.sigma.certificates import frozen_certificates
from smoothbook.sigma.distances import distances, exact_squared_distance, inside, nearest
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
from smoothbook.tables import claims, make, settings
from smoothbook.tables import table as tables
from smoothbook.tables.denoisers import check_settings
from smoothbook.tables.published import cohen_log, cohen_tables
from smoothbook.tables.selectors import check_selector, parse_search, parse_table
from smoothbook.training import attacks
from smoothbook.training.gradient_free import image_slopes, slopes
from smoothbook.training.schedules import draw_noise
from smoothkit import Purpose, Smoothed, data, models
from smoothkit.certify import betting, bounds, cascade_certificates, certificates, sequential_rule
from smoothkit.certify.cascade import alpha_per_statement, error_rates, fast_predict
from smoothkit.certify.sequential import CERTIFIED, boundaries, decide, sequential_certificates
from smoothkit.kernels import noise_exact
from smoothkit.kernels.noise import noisy_rows, road
from smoothkit.reading import (
    about_records,
    alpha,
    audit,
    certified_accuracy_interval,
    envelope,
    intervals,
    logs,
    report,
)
from smoothkit.reading.audit import FAILED, PASSED
from smoothkit.records import Identity, Row, create_record
from smoothkit.sampling.cascade import sample_cascade
from smoothkit.sampling.run import certify_sequentially, collect_votes
from smoothkit.sampling.stream import VoteStream
from smoothkit.types import (
    ABSTAIN,
    Certificate,
    StoppingRule,
    block_edges,
    check_alpha,
    check_samples,
    check_sigma,
    check_within,
    round_down,
)

# --- what goes in --------------------------------------------------------------------------------------

numbers = odd_floats(min_value=-2, max_value=300)
shares = st.one_of(st.floats(0, 1), odd_floats(min_value=-0.5, max_value=1.5))
few = st.sampled_from([0.0, 0.1, 0.5, 1.0])


def mostly(usual, odd):
    """What would do three times of four, so that several arguments together still do now and then."""
    return st.one_of(usual, usual, usual, odd)


halves = mostly(st.floats(0.5, 0.9), shares)  # p0 of a cascade
float32s = st.one_of(st.floats(-2, 2, width=32), st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e-38, 2.0**127]))
small = st.integers(-2, 9)
texts = st.text(max_size=20)
scalars = st.one_of(st.none(), st.booleans(), wholes, odd_floats(), st.text(max_size=6))


def nested(*keys: str):
    """JSON values, often with these keys."""
    return st.recursive(
        scalars,
        lambda x: st.one_of(
            st.lists(x, max_size=3),
            st.dictionaries(st.one_of(st.sampled_from(keys), st.text(max_size=4)), x, max_size=5),
        ),
        max_leaves=8,
    )


def some_of(right: dict, keys: tuple[str, ...] = (), odd=scalars):
    """Settings that would do, with some replaced by what may not."""
    changed = st.dictionaries(st.sampled_from([*right, *keys]), odd, max_size=2)
    return st.builds(lambda change: {**right, **change}, changed)


@contextlib.contextmanager
def refused(*kinds: type[Exception]):
    """Errors of other kinds that a function states as its own count as a refusal, if they say something."""
    try:
        yield
    except kinds as error:
        raise ValueError(str(error)) from None


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Path(place)


# --- small objects, made once --------------------------------------------------------------------------


class Halves(torch.nn.Module):
    """Class 1 where the mean of the pixels passes one half, of two classes; differentiable."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = images.flatten(1).mean(dim=1) - 0.5
        return torch.stack([-side, side], dim=1)


class Constant(torch.nn.Module):
    """The same logits for every image: as many classes as there are values, and any values."""

    def __init__(self, values) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor(values, dtype=torch.float32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.values.expand(len(images), -1)


@functools.cache
def eight() -> data.Images:
    """Eight grey 8x8 images of three classes, of no test split."""
    pixels = torch.randint(0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float() / 255
    return data.from_arrays(pixels, np.arange(8) % 3, class_names=("a", "b", "c"), grid=255)


@functools.cache
def patches() -> data.Images:
    """Six grey 2x2 images on both sides of one half."""
    values = np.rint(255 * np.linspace(0.1, 0.9, 6)) / 255
    pixels = torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(6, 1, 2, 2).contiguous()
    return data.from_arrays(pixels, (values > 0.5).astype(np.int64), class_names=("dark", "bright"), grid=255)


@functools.cache
def patch_record(sigma: float = 0.25, n: int = 300):
    return collect_votes(
        Halves(), patches(), sigma=sigma, stopping_rule=StoppingRule(50, n, 0.05), model_id="halves", progress=False
    )


@functools.cache
def vit() -> models.BaseClassifier:
    """A timm vision transformer of one block on 8x8 images; small enough to copy for every example."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=8,
            patch_size=4,
            in_chans=1,
            depth=1,
            embed_dim=8,
            num_heads=2,
            num_classes=3,
        )
    return models.wrap(network, mean=(0.5,), std=(0.5,), channels=1, size=(8, 8), name="one-block")


def table_of(radius, predict, label) -> pd.DataFrame:
    n = len(radius)
    predict, label = np.asarray(predict[:n], dtype=np.int64), np.asarray(label[:n], dtype=np.int64)
    return pd.DataFrame(
        {
            "idx": np.arange(n),
            "label": label,
            "predict": predict,
            "radius": np.asarray(radius, dtype=np.float64),
            "correct": (predict == label) & (predict != ABSTAIN),
            "sigma": 0.25,
            "key": [str(i) for i in range(n)],
            "image_id": np.arange(n),
        }
    )


classes = st.lists(st.integers(-1, 2), min_size=6, max_size=6)
right_tables = st.builds(table_of, st.lists(st.floats(0, 3), min_size=4, max_size=4), classes, classes)
odd_tables = st.builds(table_of, st.lists(odd_floats(min_value=-1, max_value=3), max_size=6), classes, classes)
certificate_tables = mostly(right_tables, odd_tables)

# --- bounds and types ----------------------------------------------------------------------------------


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


# --- images and noise ----------------------------------------------------------------------------------


@functools.cache
def pictures() -> tuple[bytes, ...]:
    from PIL import Image

    found = []
    for kind in ("png", "gif", "bmp", "jpeg", "tiff", "ppm", "webp"):
        file = io.BytesIO()
        Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(file, kind)
        found.append(file.getvalue())
    return tuple(found)


@st.composite
def damaged_pictures(draw):
    content = bytearray(draw(st.sampled_from(pictures())))
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


@holds(
    st.one_of(st.binary(max_size=80), damaged_pictures(), st.sampled_from(range(7)).map(lambda i: pictures()[i])),
    mostly(st.none(), st.sampled_from([1, 8, 0, -3, 10**30])),
    st.sampled_from([1, 3, 3, 2]),
)
def pictures_of_any_bytes(content, size, channels):
    with folder() as place:
        (place / "bild ∞.png").write_bytes(content)
        (image,) = data.load_image(place / "bild ∞.png", size=size, channels=channels)
        assert len(image) == channels and bool(((image >= 0) & (image <= 1)).all())
        assert size is None or image.shape[1:] == (size, size)


@holds(st.one_of(st.binary(max_size=200), texts.map(str.encode)))
def parquet_files_of_any_bytes(content):
    with folder() as place:
        (place / "x.parquet").write_bytes(content)
        assert len(data.load(f"parquet:{place / 'x.parquet'}").batch()) > 0


rules = st.one_of(
    texts,
    st.builds(
        lambda k, *v: ":".join([k, *map(str, v)]), st.sampled_from(["first", "every", "range", "all"]), wholes, wholes
    ),
    st.builds(lambda a, b: f"classes:{a}-{b}", wholes, wholes),
    st.builds("{}:{}".format, st.sampled_from(["first", "every"]), wholes),
)


@holds(rules, st.one_of(small, st.integers(0, 50)))
def subset_rules(rule, n):
    with contextlib.suppress(ValueError):
        first, last = data.class_range(rule, n)
        assert 0 <= first <= last < n
    chosen = data.subset_indices(rule, n)
    assert len(chosen) and (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] < n


@holds(
    mostly(
        npst.arrays(
            np.float32, npst.array_shapes(min_dims=4, max_dims=4, max_side=3), elements=st.floats(0, 1, width=32)
        ),
        npst.arrays(
            st.sampled_from([np.float32, np.float16, np.int64]), npst.array_shapes(min_dims=0, max_dims=5, max_side=3)
        ),
    ),
    st.booleans(),
)
def images_that_pass_the_check(values, check_range):
    data.check_images(torch.from_numpy(values), check_range=check_range)
    assert values.ndim == 4 and values.size and not np.isnan(values).any()
    assert not check_range or ((values >= 0) & (values <= 1)).all()


@holds(
    greys, sigmas, st.sampled_from([255, 255, 256, 1, 0, -1, 10**9]), st.integers(-2, 3), st.integers(-2, 4), share=0.1
)
def exact_noise(images, sigma, grid, start, stop):
    known = dict(sigma=sigma, seed=0, purpose=Purpose.SELECT, image_id=1, start=start, stop=stop, grid=grid)
    copies, failed = noise_exact.exact_noisy_copies(torch.from_numpy(images[0]), **known)
    assert copies.shape == (stop - start, *images.shape[1:]) and bool(copies[~failed].isfinite().all())
    steps = copies[~failed].double() * grid
    assert float((steps - steps.round()).abs().max() if len(steps) else 0) < 1e-3


@holds(
    st.integers(0, 3),
    st.integers(1, 3),
    mostly(st.integers(-1, 0), st.integers(-2, 3)),
    mostly(st.integers(0, 2**40 - 1), st.integers(-2, 2**41)),
    float32s,
    st.sampled_from([0, 255, -1, 2**24]),
)
def noise_of_rows(batch, number, index, sample, scale, grid):
    rows = torch.tensor([[index], [5], [sample]]).repeat(1, batch)
    out = torch.full((batch, 1, 2, 2), math.nan)
    noisy_rows(out, torch.full((number, 1, 2, 2), 0.5), rows, torch.full((batch,), scale), 0, grid)
    assert bool(out.isfinite().all()) or not abs(scale) < 1e30


@holds(wholes)
def the_road_of_the_noise(pixels):
    assert road(pixels) in ("numba", "numpy")


# --- certificates --------------------------------------------------------------------------------------


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
    table = sequential_certificates(record)
    for row in table.itertuples():
        limit = float(bounds.radius(bounds.clopper_pearson_lower(row.n_a, row.n, row.alpha), 0.25)) if row.n else 0.0
        assert 0 <= row.radius <= limit * (1 + 1e-9)
        assert row.predict != ABSTAIN or row.radius == 0


logit_values = st.lists(float32s, min_size=1, max_size=3)


@holds(
    logit_values,
    sigmas,
    mostly(st.integers(20, 60), wholes),
    alphas,
    mostly(st.just(0), st.sampled_from([2**64 - 1, -1, 2**64])),
    mostly(st.just("data"), st.sampled_from([255, None, "exact", 0, "x"])),
    share=0.25,
)
def smoothing_a_constant(values, sigma, n, alpha, seed, grid):
    """Any logits, one class, NaN: a certificate for the class that all votes are for, or none."""
    if 10**5 < n < 10**10:  # allowed, and takes its time
        return
    smoothed = Smoothed(Constant(values), sigma, model_id="constant", batch=64)
    known = dict(n0=10, n=n, alpha=alpha, seed=seed, grid=grid, progress=False)
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
    known = dict(n0=10, n_max=n, alpha=alpha, progress=False)
    two = patches().take("every:5")
    with contextlib.suppress(ValueError):
        table = certificates(smoothed.sample_to_radius(two, within, **known))
        assert (table["radius"] <= smoothed.radius_cap(n, alpha)).all()
    table = certificates(smoothed.sample_sequentially(two, radii, **known))
    assert set(table["radius"]) <= {0.0, *radii}


@holds(mostly(st.just(0.1), numbers), sigmas, share=0.15)
def sequential_rules_are_followed(radius, sigma):
    rule = sequential_rule([radius], n0=10, n_max=200, alpha=0.05)
    record = certify_sequentially(
        Halves(), patches().take("first:2"), sigma=sigma, rule=rule, model_id="h", progress=False
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
    mostly(st.sampled_from([0.25, [0.25, 0.5]]), st.one_of(sigmas, st.lists(sigmas, max_size=3))),
    mostly(st.just(60), st.integers(-1, 60)),
    mostly(st.just(0.05), alphas),
    share=0.2,
)
def certificates_at_frozen_sigmas(sigma, n, alpha):
    two = patches().take("every:5")
    table = frozen_certificates(Halves(), two, sigma, n0=10, n=n, alpha=alpha, progress=False, batch=64)
    assert (table["radius"] <= [bounds.radius_cap(n, alpha, s) for s in table["sigma"]]).all()


@holds(
    mostly(st.just({}), some_of({"batch": 8, "seed": 0, "grid": 255}, odd=st.one_of(small, st.just(2**64)))),
    sigmas,
    share=0.2,
)
def streams_of_votes(settings, sigma):
    two = patches().take("first:2")
    stream = VoteStream(Halves(), two, **{"sigma": sigma, "seed": 1, "grid": 255, **settings})
    from smoothkit.sampling.batches import Task

    ((_, counts, _),) = stream.run([Task(1, Purpose.PREDICT, 0, 20)])
    assert counts.sum() <= 20 and len(counts) == 2


# --- a sigma for each image ----------------------------------------------------------------------------

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
    made = parse_search(settings)
    assert made.steps >= 1 and made.draws >= 1 and 0 < made.step_size < math.inf
    table = parse_table(sigma0, {**settings, "fixed_for": 0.5})
    assert table.search == made


@holds(
    st.one_of(
        some_of({"kind": "prototypes", "sigmas": [0.25], "each": 1, "train_images": "all"}),
        nested("kind", "sigmas").filter(lambda x: isinstance(x, dict)),
    )
)
def settings_of_a_selector(settings):
    check_selector(settings)
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
    assert all(
        float(a) ** 2 <= e * (1 + 1e-12) and e <= float(b) ** 2 * (1 + 1e-12)
        for a, e, b in zip(low, exact, high, strict=True)
    )
    held = inside(x, points, radii, low, high)
    from fractions import Fraction

    assert held.tolist() == [e < Fraction(float(r)) ** 2 for e, r in zip(exact, radii, strict=True)]
    assert exact[nearest(x, points)] == min(exact)


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
        found = accuracy_by_reading(radii, frozen=frozen, sound=sound)
        assert ((found[[f"{r:g}" for r in radii]] >= 0) & (found[[f"{r:g}" for r in radii]] <= 1)).to_numpy().all()
    with contextlib.suppress(ValueError):
        assert len(three_radii(frozen=frozen, sound=sound)) == len(frozen)
    with contextlib.suppress(ValueError):
        memory = Memory(model="m", shape=(1, 1, 2))
        asked = through_memory(memory, [np.full((1, 1, 2), i / 6, np.float32) for i in range(len(frozen))], frozen)
        assert not memory.overlaps() and len(asked) == len(frozen)
    best = best_of_grid({0.25: frozen, 0.5: sound}, at=at)
    assert best.sigma in (0.25, 0.5) and not math.isnan(best.scores[best.sigma])


# --- training ------------------------------------------------------------------------------------------

words = ["clean", "fixed", "grid", "uniform", "mix", "curriculum", "0.25", "1", "-1", "nan", "inf", "1e400", "0,1"]
lines = st.one_of(texts, st.lists(st.sampled_from(words), max_size=5).map(":".join))


@holds(st.one_of(lines, numbers, lines.map(lambda x: f"fixed:{x}")), st.integers(0, 5), st.floats(0, 1))
def schedules_of_any_text(line, n, progress):
    made = training.parse(line)
    sigma = made(n, progress=progress, generator=torch.Generator().manual_seed(0))
    assert sigma.shape == (n,) and bool((sigma.isfinite() & (sigma >= 0)).all())


@holds(
    st.sampled_from(["fixed", "grid", "uniform", "mixture", "curriculum"]),
    numbers,
    numbers,
    st.lists(numbers, max_size=3),
)
def schedules_of_any_number(kind, a, b, several):
    make = {
        "fixed": lambda: training.Fixed(a),
        "grid": lambda: training.Grid(tuple(several), balanced=a > 0),
        "uniform": lambda: training.Uniform(a, b),
        "mixture": lambda: training.Mixture(a, b),
        "curriculum": lambda: training.Curriculum(a, start=b, over=several[0] if several else 0.5),
    }[kind]
    sigma = make()(4, progress=0.3, generator=torch.Generator().manual_seed(0))
    assert sigma.shape == (4,) and bool((sigma.isfinite() & (sigma >= 0)).all())


@holds(mostly(st.just(2), small), mostly(st.sampled_from([None, 255]), small), mostly(st.just(1), small), st.booleans())
def noise_and_shifts_for_training(copies, grid, pad, flip):
    images, generator = eight().batch(0, 2), torch.Generator().manual_seed(0)
    shifted = training.crop_and_flip(images, generator, pad=pad, flip=flip)
    assert shifted.shape == images.shape and bool(((shifted >= 0) & (shifted <= 1)).all())
    noise = draw_noise(images, torch.full((2,), 0.25), copies=copies, grid=grid, generator=generator)
    assert noise.shape == (copies, *images.shape) and bool(noise.isfinite().all())


def one_of_the_losses(kind: str, a: float, b: float, copies: int) -> Callable:
    attack = attacks.PGD(0.2, 1)
    return {
        "gaussian": lambda: training.Gaussian(copies, label_smoothing=a),
        "smoothadv": lambda: training.SmoothAdv(attack, copies=copies),
        "macer": lambda: training.MACER(lambda_=a, gamma=b, copies=copies),
        "consistency": lambda: training.Consistency(a, b, copies=copies),
        "stability": lambda: training.Stability(a, copies=copies),
        "noise-level": lambda: training.NoiseLevel((0.1, a), copies=copies),
        "calibration": lambda: denoise.Calibration(a, b, copies=copies),
        "denoising": lambda: denoise.Denoising(copies=copies),
    }[kind]()


LOSSES = ["gaussian", "smoothadv", "macer", "consistency", "stability", "noise-level"]


@holds(
    st.sampled_from(LOSSES),
    mostly(few, shares),
    mostly(st.just(1.0), numbers),
    mostly(st.just(2), st.integers(-1, 3)),
    st.lists(st.one_of(st.floats(-3, 3), float32s), min_size=1, max_size=3),
    st.integers(0, 3),
)
def losses_of_any_logits(kind, a, b, copies, values, label):
    """A finite loss of finite logits; of NaN a NaN, which `fit` stops at, and never a number."""
    loss = one_of_the_losses(kind, a, b, copies)
    images = torch.full((2, 1, 2, 2), 0.5)
    weights = torch.tensor(values, dtype=torch.float32)

    def classifier(x):
        return weights + 0.01 * x.flatten(1).sum(1, keepdim=True)

    how = dict(noise=torch.zeros(loss.copies, *images.shape), sigma=torch.full((2,), 0.25))
    terms = loss(classifier, images, torch.full((2,), min(label, len(values) - 1)), **how)
    assert terms.loss.ndim == 0 and terms.logits.shape == (loss.copies, 2, len(values))
    if bool((weights.abs() < 100).all()) and b < 100:
        assert bool(terms.loss.isfinite())
    assert not bool(weights.isnan().any()) or bool(terms.loss.isnan())


FIT = dict(
    epochs=1, batch=4, lr=1e-3, optimiser="sgd", weight_decay=0.05, momentum=0.9, warmup=0.1, cosine=True, clip_norm=1.0,
    validation=None, seed=0, schedule=0.25, checkpoint_every=1, precision="float32", ema=None, layer_decay=None,
)  # fmt: skip
FIT_NUMBERS = {"lr", "weight_decay", "momentum", "warmup", "clip_norm", "validation", "ema", "layer_decay", "schedule"}
fit_settings = st.one_of(
    st.tuples(st.sampled_from(sorted(FIT_NUMBERS)), st.one_of(numbers, shares)),
    st.tuples(st.sampled_from(["epochs", "batch", "checkpoint_every", "seed"]), st.one_of(small, st.just(2**31))),
    st.tuples(
        st.sampled_from(["optimiser", "precision", "schedule"]),
        st.one_of(texts, st.sampled_from(["adamw", "bf16", "clean"])),
    ),
)


@holds(st.lists(fit_settings, max_size=2), share=0.25)
def training_with_odd_settings(changed):
    settings = {**FIT, **dict(changed)}
    if settings["epochs"] > 9:
        return
    model = models.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)))
    torch.nn.init.zeros_(model.network[1].weight)
    with refused(training.TrainingDiverged):
        done = training.fit(model, eight(), progress=False, **settings)
    assert isinstance(done, training.Fitted) and len(done.rows) == settings["epochs"]
    assert all(bool(p.isfinite().all()) for p in done.model.parameters()), "trained into NaN"


SPSA_NUMBERS = ("a", "c", "o", "alpha", "gamma", "beta", "temperature")


@holds(
    mostly(st.just({}), st.dictionaries(st.sampled_from(SPSA_NUMBERS), numbers, max_size=2)),
    mostly(st.sampled_from(["weights", "images"]), st.just("x")),
    mostly(st.just(1), small),
    mostly(st.just(2), small),
    share=0.2,
)
def training_without_gradients(changed, per, repeats, steps):
    spsa = training.SPSA(per=per, repeats=repeats, **changed)
    assert math.isfinite(spsa.rate(1)) and spsa.displacement(1) > 0
    model = adapters.coordinator(Constant([0.0, 1.0, 0.5]), vit(), image_shape=(1, 8, 8), cube=3, model_id="constant")
    with refused(training.TrainingDiverged, adapters.BlackBoxError):
        done = training.fit_gradient_free(model, eight(), steps=min(steps, 2), batch=4, spsa=spsa, progress=False)
    assert done.steps == min(steps, 2)


@holds(mostly(st.floats(0.01, 1), numbers), mostly(st.just(2), small))
def slopes_of_a_line(displacement, repeats):
    known = dict(displacement=displacement, repeats=repeats, generator=torch.Generator().manual_seed(0))
    slope, mean = slopes(lambda w: float(w.sum()), torch.zeros(3), **known)
    assert slope.shape == (3,) and bool(slope.isfinite().all()) and math.isfinite(mean)
    shown = torch.full((2, 1, 2, 2), 0.5)
    assert bool(image_slopes(lambda x: x.flatten(1).sum(1), shown, **known).isfinite().all())


@holds(
    st.sampled_from(["pgd", "ddn"]),
    mostly(st.floats(0, 2), numbers),
    mostly(st.just(2), small),
    mostly(st.none(), numbers),
    mostly(st.just(0.05), shares),
    mostly(st.sampled_from([None, 256]), small),
    st.integers(0, 1),
)
def attacks_stay_in_their_ball(kind, epsilon, steps, step_size, gamma, levels, label):
    attack = attacks.PGD(epsilon, steps, step_size) if kind == "pgd" else attacks.DDN(epsilon, steps, gamma, levels)
    images = patches().batch(0, 2)
    noise = 0.1 * torch.ones(2, *images.shape)
    attacked = attack(Halves(), images, torch.full((2,), label), noise)
    assert attacked.shape == images.shape and bool(((attacked >= 0) & (attacked <= 1)).all())
    assert bool((attacks.norms(attacked - images) <= epsilon * (1 + 1e-5) + 1e-6).all())


@holds(npst.arrays(np.float32, (2, 1, 2, 2), elements=float32s), mostly(st.floats(0, 2), numbers))
def points_into_the_ball(points, epsilon):
    images = patches().batch(0, 2)
    moved = attacks.into_ball(images, torch.from_numpy(points), epsilon)
    assert bool((attacks.norms(moved - images) <= epsilon * (1 + 1e-5) + 1e-6).all()) or np.isnan(points).any()


# --- adapters ------------------------------------------------------------------------------------------


def answers_alike(make: Callable[[], torch.nn.Module], num_classes: int | None) -> torch.nn.Module:
    """An adapted model answers in the shape that was asked for, with finite logits."""
    made = make()
    with torch.no_grad(), refused(AssertionError):  # timm's word for images of another size than a network's
        logits = made.eval()(eight().batch(0, 2))
    assert logits.shape == (2, num_classes or 3) and bool(logits.isfinite().all())
    assert isinstance(adapters.trainable(made), adapters.Trainable)
    adapters.set_train_mode(made, True)
    return made


heads = mostly(st.just("trained"), st.sampled_from(["frozen", "x"]))
new_heads = mostly(st.none(), small)


@holds(
    mostly(st.just(2), st.integers(-1, 20)),
    mostly(st.none(), numbers),
    mostly(
        st.sampled_from(["blocks", "qkv", "attention", "convolutions", ".*", ".*qkv"]),
        st.one_of(texts, st.sampled_from(["(", "head"])),
    ),
    mostly(few, shares),
    heads,
    new_heads,
    mostly(st.just("one"), texts),
    share=0.15,
)
def lora_of_any_settings(rank, alpha, targets, dropout, head, num_classes, name):
    known = dict(
        rank=rank, alpha=alpha, targets=targets, dropout=dropout, head=head, num_classes=num_classes, name=name
    )
    made = answers_alike(lambda: adapters.lora(vit(), **known), num_classes)
    assert isinstance(made, adapters.LoraClassifier)


@holds(
    mostly(st.sampled_from(["houlsby", "pfeiffer", "parallel"]), st.just("x")),
    mostly(st.none(), st.integers(-1, 9)),
    mostly(st.just(1.0), numbers),
    mostly(few, shares),
    heads,
    new_heads,
    share=0.15,
)
def bottlenecks_of_any_settings(place, width, scale, dropout, head, num_classes):
    known = dict(place=place, width=width, scale=scale, dropout=dropout, head=head, num_classes=num_classes)
    assert isinstance(answers_alike(lambda: adapters.bottleneck(vit(), **known), num_classes), adapters.Adapted)


@holds(mostly(st.integers(1, 9), st.integers(-1, 12)), st.booleans(), mostly(few, shares), heads, new_heads, share=0.15)
def prompts_of_any_settings(length, deep, dropout, head, num_classes):
    known = dict(length=length, deep=deep, dropout=dropout, head=head, num_classes=num_classes)
    answers_alike(lambda: adapters.prompts(vit(), **known), num_classes)


@holds(
    mostly(st.sampled_from(["resnet", "vit"]), st.just("x")),
    mostly(
        st.just({}),
        st.dictionaries(
            st.sampled_from(["width", "depth", "stages", "patch_size", "image_size", "heads", "z"]), small, max_size=3
        ),
    ),
    st.booleans(),
    st.booleans(),
    mostly(st.sampled_from(["base", "new"]), st.just("x")),
    new_heads,
    mostly(st.none(), small),
    share=0.15,
)
def certifying_adapters_of_any_settings(adapter, settings, use_features, use_adapter, head, num_classes, channels):
    wanted = {"width": 4, "depth": 1} | ({"stages": 1} if adapter == "resnet" else {"image_size": 8}) | settings
    known = dict(
        adapter=adapter, adapter_settings=wanted, use_features=use_features, use_adapter=use_adapter, head=head,
        num_classes=num_classes, channels=channels,
    )  # fmt: skip
    made = answers_alike(lambda: adapters.certifying(vit(), **known), num_classes)
    assert isinstance(made, adapters.CertifyingClassifier)


@functools.cache
def member(seed: int, use_adapter: bool = True) -> adapters.CertifyingClassifier:
    small_net = {"width": 4, "depth": 1, "stages": 1}
    return adapters.certifying(vit(), adapter_settings=small_net, seed=seed, use_adapter=use_adapter)


@holds(
    mostly(st.just([0.25, 0.5]), st.lists(sigmas, max_size=3)),
    mostly(st.sampled_from(["logits", "features", "noise"]), st.just("x")),
    st.booleans(),
    sigmas,
    share=0.15,
)
def ensembles_of_any_members(scales, design, whole, sigma):
    members = {s: member(i, whole or i > 0) for i, s in enumerate(scales)}
    answers_alike(lambda: adapters.ensemble(members, design=design), None)
    each = adapters.per_sigma(members)
    assert isinstance(each, adapters.PerSigma) and each.at(sigma) is members[sigma]


@holds(
    mostly(st.just([1, 8, 8]), st.lists(st.sampled_from([1, 8, 7, 4, 0, -2, 16]), min_size=2, max_size=4)),
    mostly(st.sampled_from(["features", "pixels", "both"]), st.just("x")),
    mostly(st.just(0.5), numbers),
    mostly(st.just(32), st.integers(-1, 40)),
    mostly(st.none(), st.lists(small, max_size=2).map(tuple)),
    mostly(st.just("logits"), st.sampled_from(["probabilities", "x"])),
    logit_values,
    share=0.15,
)
def coordinators_of_any_settings(shape, sees, strength, cube, widths, returns, values):
    box = adapters.BlackBox(Constant(values), returns=returns, model_id="constant")
    made = adapters.coordinator(
        box,
        vit(),
        image_shape=shape,
        sees=sees,
        strength=strength,
        cube=cube,
        widths=widths,
    )
    assert isinstance(made, adapters.Coordinator)
    with refused(adapters.BlackBoxError):
        assert made(eight().batch(0, 2)).shape == (2, len(values))


CONFIG = {
    "kind": "bottleneck", "settings": {"place": "parallel", "width": 2, "head": "trained"}, "class_names": [],
    "base": {"name": "b", "fingerprint": "f"},
}  # fmt: skip


@holds(
    st.one_of(
        nested("kind", "settings", "base"), some_of(CONFIG, odd=nested("head", "fingerprint", "members", "names"))
    ),
    st.sampled_from(
        [
            "lora",
            "bottleneck",
            "prompts",
            "certifying",
            "certifying-ensemble",
            "certifying-per-sigma",
            "coordinator",
            "",
        ]
    ),
)
def adapters_of_any_config(content, kind):
    if kind and isinstance(content, dict):
        content["kind"] = kind
    with folder() as place:
        (place / "adapter.json").write_text(json.dumps(content))
        assert read_config(place) == content
        adapters.load(place, vit())
        raise AssertionError("no weights were there")


# --- denoisers -----------------------------------------------------------------------------------------


class Nothing(torch.nn.Module):
    """Predicts no noise at any timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale * x


falling = np.cumprod(1 - np.linspace(1e-4, 0.02, 200))
schedules = st.one_of(
    st.just(falling),
    st.just(falling),
    npst.arrays(
        np.float64,
        npst.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=5),
        elements=odd_floats(min_value=-1, max_value=2),
    ),
)


@holds(schedules, sigmas)
def timesteps_are_noisy_enough(alphas_bar, sigma):
    step = denoise.timestep_for(alphas_bar, sigma)
    assert isinstance(step, denoise.Timestep) and step.sigma >= sigma and 0 < step.alpha_bar <= 1
    assert step.t == 0 or denoise.schedule_sigmas(alphas_bar)[step.t - 1] < sigma


@holds(schedules)
def noise_levels_rise(alphas_bar):
    levels = denoise.schedule_sigmas(alphas_bar)
    assert len(levels) and (levels >= 0).all() and (levels[1:] >= levels[:-1]).all()


@holds(npst.arrays(np.float32, st.integers(0, 4), elements=float32s))
def schedules_of_schedulers(betas):
    found = denoise.alphas_bar_of(types.SimpleNamespace(betas=torch.from_numpy(betas)))
    assert len(found) and ((found >= 0) & (found <= 1)).all()


@holds(
    schedules,
    sigmas,
    mostly(st.sampled_from(["epsilon", "sample", "v_prediction"]), st.just("x")),
    mostly(st.sampled_from(["exact", "schedule"]), st.just("x")),
    mostly(st.sampled_from(["hard", "straight-through", "none"]), st.just("x")),
    mostly(st.just(1), small),
    mostly(st.sampled_from([None, 12]), small),
)
def diffusion_denoisers(alphas_bar, sigma, prediction, noise, clamp, steps, pad_to):
    known = dict(prediction=prediction, noise=noise, clamp=clamp, steps=steps, pad_to=pad_to)
    made = denoise.DiffusionDenoiser(Nothing(), alphas_bar, sigma=sigma, **known)
    images = eight().batch(0, 2)
    clean = made(images)
    assert clean.shape == images.shape and bool(clean.isfinite().all()) and made.noise_sigma >= sigma
    assert clamp != "hard" or bool(((clean >= -1e-6) & (clean <= 1 + 1e-6)).all())
    assert isinstance(denoise.DenoisedClassifier(made, Halves()).denoiser, denoise.Denoiser)


@holds(st.lists(sigmas, min_size=2, max_size=2), schedules)
def denoising_at_a_sigma_each(wanted, alphas_bar):
    made = denoise.DiffusionDenoiser(Nothing(), alphas_bar, sigma=0.1)
    clean = denoise.denoise_at(made, eight().batch(0, 2), torch.tensor(wanted))
    assert clean.shape == (2, 1, 8, 8) and bool(clean.isfinite().all())


@holds(
    st.sampled_from(["calibration", "denoising", "objective"]),
    mostly(few, shares),
    mostly(st.just(1.0), numbers),
    mostly(st.just(2), small),
    mostly(st.just("mse"), texts),
    mostly(st.just([0.1, 0.25]), st.lists(sigmas, max_size=2)),
    share=0.15,
)
def denoisers_in_training(kind, a, b, copies, objective, scales):
    if kind == "objective":
        loss = denoise.Denoising(objective, copies=copies)
        assert loss.objective == objective
        return
    loss = one_of_the_losses(kind, a, b, copies)
    settings = dict(epochs=1, batch=4, progress=False, validation=None)
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    with refused(training.TrainingDiverged):
        if kind == "denoising":
            net = denoise.DnCNN(1, sigma=scales[0] if scales else 0.25, depth=2, width=2)
            done = denoise.fit_denoiser(net, eight(), **settings)
        else:
            made = denoise.DiffusionDenoiser(Nothing(), falling, sigma=0.1)
            done = denoise.calibrate(made, head, eight(), sigmas=tuple(scales), loss=loss, **settings)
    assert all(bool(p.isfinite().all()) for p in done.model.parameters())


@holds(mostly(st.just(2), small), mostly(st.just(2), small), mostly(st.just(1), small), sigmas, share=0.3)
def trained_denoisers(depth, width, channels, sigma):
    made = denoise.DnCNN(channels, sigma=sigma, depth=depth, width=width).eval()
    rows = torch.rand(2, channels, 4, 4)
    assert torch.equal(made(rows), rows) and torch.equal(denoise.Identity()(rows), rows)  # before training
    with folder() as place:
        again = denoise.load_denoiser(made.save(place / "d"))
        assert torch.equal(again(rows), rows)


@holds(nested("kind", "settings", "sigma", "depth"), share=0.5)
def saved_denoisers_of_any_json(content):
    with folder() as place:
        (place / "denoiser.json").write_text(json.dumps(content))
        (place / "denoiser.safetensors").write_bytes(b"")
        denoise.load_denoiser(place)
        raise AssertionError("no weights were there")


@holds(
    st.one_of(
        nested("diffusion", "dncnn", "calibration", "sigmas", "objective"),
        some_of(
            {"diffusion": "x", "lora": 2, "calibration": {"brier": 1.0}, "sigmas": [0.25]},
            ("noise", "steps"),
            nested("brier", "anti"),
        ),
        some_of({"dncnn": {"depth": 4}, "objective": "mse"}, ("mse",), nested("depth", "epochs")),
    ).filter(lambda x: isinstance(x, dict)),
    st.booleans(),
)  # fmt: skip
def settings_of_a_denoiser(settings, trained):
    check_settings(settings, trained=trained)
    assert len({"diffusion", "dncnn"} & settings.keys()) == 1


@holds(
    npst.arrays(np.float32, (2, 1, 2, 2), elements=float32s),
    npst.arrays(
        np.float32,
        mostly(st.just((2, 1, 2, 2)), st.sampled_from([(1, 1, 2, 2), (3, 2)])),
        elements=st.floats(0, 1, width=32),
    ),
)
def signal_to_noise(images, clean):
    found = denoise.psnr(torch.from_numpy(images), torch.from_numpy(clean))
    assert found.shape == (2,) and (not np.isfinite(images).all() or not bool(found.isnan().any()))


UNET = {"_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1, "sample_size": 8}
BETAS = {
    "_class_name": "DDPMScheduler",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": 10,
    "beta_schedule": "linear",
}


@holds(
    st.one_of(nested(*UNET), some_of(UNET)),
    st.one_of(nested(*BETAS), some_of(BETAS, ("trained_betas", "prediction_type"))),
    st.binary(max_size=30),
    st.booleans(),
    share=0.3,
)
def diffusion_folders_of_any_json(unet, scheduler, weights, side_by_side):
    with folder() as place:
        for sub, name, content in (("unet", "config.json", unet), ("scheduler", "scheduler_config.json", scheduler)):
            at = place if side_by_side else place / sub
            at.mkdir(exist_ok=True)
            (at / name).write_text(json.dumps(content))
        (place / ("" if side_by_side else "unet") / "diffusion_pytorch_model.safetensors").write_bytes(weights)
        denoise.load_diffusion(place, sigma=0.25)
        raise AssertionError("no weights were there")


# --- tables of rows, claims ----------------------------------------------------------------------------

ROW = {"name": "a", "sigma": 0.25, "method": "lora", "epochs": 1, "adapter": {"rank": 2}}
ROW_KEYS = tuple(f.name for f in dataclasses.fields(settings.Row))
OF_ADAPTERS = ("rank", "members", "encoder", "objective", "attack", "epsilon", "kind", "sigmas", "dncnn", "a", "copies")
row_values = st.one_of(
    scalars,
    nested(*OF_ADAPTERS),
    st.sampled_from(
        ["lora", "clean", "full", "ensemble", "coordinator", "denoiser", "smoothadv", "macer", "row:a", "row:", "0.25"]
    ),
)
rows_of_tables = st.lists(some_of(ROW, ROW_KEYS, row_values), max_size=2)
whole_tables = st.one_of(
    nested("rows", "defaults", "variants", "name", "sigma"),
    st.fixed_dictionaries(
        {"rows": rows_of_tables}, optional={"defaults": row_values, "variants": row_values, "title": scalars}
    ),
)


def as_yaml(content) -> str:
    return yaml.safe_dump(content, allow_unicode=True)


@holds(
    st.one_of(
        whole_tables.map(as_yaml),
        texts,
        st.sampled_from(["rows: [{name: a", "&a [*a]", "rows: &a [*a]", "rows: [{? [1] : 2}]", "\0"]),
    ),
    st.one_of(st.none(), st.sampled_from(["reduced", "x"])),
)
def tables_of_any_yaml(content, variant):
    with folder() as place:
        (place / "t.yaml").write_text(content, encoding="utf-8")
        found = settings.load_rows(place / "t.yaml", variant)
        assert all(0 < row.sigma <= 20 for row in found) and len({row.name for row in found}) == len(found)
        assert all(row.training_digest({r.name: r for r in found}) for row in found)


@holds(
    st.one_of(texts, st.sampled_from(["sigma", "peft", "cifar10-peft:reduced", "peft:", ":", "../peft"])), share=0.15
)
def tables_by_name(name):
    found, place = tables.open_table(name)
    assert found and name in tables.kept_tables() and tables.protocol(name)
    assert {path.name for path in tables.row_folders(place)} <= set(found)


CARD = {
    "row": {"name": "a", "sigma": 0.25, "n0": 50, "n": 300}, "trained": 1, "parameters": 2, "steps": 1, "seconds": 1.0,
    "fingerprint": "",
}  # fmt: skip


@holds(
    st.one_of(nested("row", "trained", "seconds"), some_of(CARD, ("queries",), nested("name", "sigma", "n"))),
    st.one_of(st.just([0.25]), st.lists(numbers, max_size=2)),
    share=0.4,
)
def cards_of_any_json(content, radii):
    record = kept_record()
    if isinstance(content, dict) and content.get("fingerprint") == "":
        content["fingerprint"] = record["identity"]["fingerprint"]
    with folder() as place:
        copy_record(place / "a")
        (place / "a" / "card.json").write_text(json.dumps(content))
        shown = tables.read_rows(place, radii)
        assert len(shown) == 1 and len(tables.format_rows(shown, radii)) == 1
        row, _ = tables.read_card(place / "a")
        assert isinstance(row, settings.Row)
        assert tables.read_certificates(place) or shown["problem"][0]


@holds(
    st.one_of(st.just({}), st.dictionaries(st.sampled_from(ROW_KEYS), row_values, max_size=2)),
    st.sampled_from(["full", "head", "clean", "lora", "bottleneck", "prompts"]),
    share=0.15,
)
def rows_built_trained_and_certified(changed, method):
    """A row of any settings on the small base: its classifier, its training on eight images, its votes."""
    row = settings.Row(**{"name": "a", "sigma": 0.25, "epochs": 1, "batch": 4, "n": 20, "method": method} | changed)
    if (
        max(row.epochs, row.n0 / 100, row.n / 100, row.batch / 100) > 9
        or row.denoiser
        or row.search
        or row.base != settings.Row.base
    ):
        return
    with refused(training.TrainingDiverged):
        trained = make.train_row(row, eight(), base=vit(), progress=False).model
    assert type(make.build(row, vit(), image_shape=(1, 8, 8))) is type(trained)
    record = make.certify_row(row, trained, eight().take("first:2"), progress=False, batch=64)
    assert len(certificates(record)) == 2


@holds(
    st.sampled_from(["noise-training", "peft"]),
    st.one_of(texts, st.sampled_from(["full-0.25", "clean-0.25", "lora-16-0.25"])),
    share=0.05,
)
def classifiers_of_kept_rows(table, name):
    """The stored classifier, or why there is none; what a row was trained from is there whenever the row is."""
    found, place = tables.open_table(table)
    with contextlib.suppress(KeyError):
        make.load_base(found, place, found[name])
    assert isinstance(make.load_classifier(found, place, name), models.BaseClassifier)


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


CLAIM = {"claim": "c", "least": "gaussian-{sigma}", "tables": {"noise-training": [0.25]}, "radius": 0.25, "margin": 0.1}
CLAIMS = [{"system": "s", "source": "p", "claims": [CLAIM]}]
claim_values = st.one_of(
    scalars, nested("noise-training", "x"), st.sampled_from([["clean-0.25", "x"], {"peft": [0.25]}, "max: a b"])
)
claim_files = st.one_of(
    nested("system", "source", "claims", "tables"),
    st.builds(
        lambda claim, group: [{**CLAIMS[0], "claims": [claim], **group}],
        some_of(CLAIM, ("more", "alike"), claim_values),
        st.one_of(st.just({}), some_of({}, ("system", "source", "claims"))),
    ),
)


@holds(st.one_of(claim_files.map(as_yaml), texts), share=0.3)
def claims_of_any_yaml(content):
    """The reader of data/claims.yaml, at a file of any content."""
    with folder() as place:
        (place / "claims.yaml").write_text(content, encoding="utf-8")
        found = claims.read_claims(place / "claims.yaml")
        assert all(c.holds in ("yes", "no", "unclear", "not measured") for c in found)


@holds(st.sampled_from(["sigma", "noise-training", "nonsense", ""]), share=0.02)
def claims_of_a_table(name):
    assert set(claims.claims(name)["holds"]) <= {"yes", "no", "unclear", "not measured"}


@holds(
    mostly(st.integers(0, 40), wholes),
    mostly(st.integers(0, 40), wholes),
    mostly(st.integers(80, 99), wholes),
    mostly(st.just(0.95), shares),
)
def intervals_of_paired_proportions(gained, lost, n, level):
    low, high = intervals.paired_difference_interval(gained, lost, n, level)
    assert low <= high and math.isfinite(low) and math.isfinite(high)


# --- reports, plans, the workbook ----------------------------------------------------------------------


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


@holds(st.sampled_from(["cifar10", "imagenet", "x"]), numbers, numbers, names, share=0.3)
def where_cohen_kept_logs(dataset, trained, sigma, place):
    assert cohen_log(place, dataset, trained=trained, sigma=sigma).name.startswith("sigma_")
    cohen_tables(place)
    raise AssertionError("no logs were there")


@holds(
    st.one_of(names, st.sampled_from(["starter:digits-vit-0.25", "resnet50"])),
    nested("rows", "network", "device"),
    share=0.3,
)
def speeds_known_from_benchmarks(model, content):
    rate, said = planning.known_rate(model)
    assert said and (rate is None or rate > 0)
    with folder() as place:
        (place / "rates.json").write_text(json.dumps(content))
        rate, said = planning.known_rate(model, place)
        assert rate is None and said


@holds(mostly(st.just(100), wholes), mostly(st.just(1_000), wholes), alphas, mostly(st.just(10), small), share=0.1)
def sizes_of_records(n0, n, alpha, number):
    assert planning.bytes_per_image(n0, n, alpha, number) > 0


@holds(
    st.one_of(
        nested("a_b", "_description", "n").map(as_yaml),
        st.sampled_from(["a_b: {n: 3}", "_description: x", "a_b:"]),
        texts,
    ),
    mostly(st.just("smoke"), st.sampled_from(["smok", "../smoke", ""])),
)
def presets_of_any_yaml(content, name):
    with folder() as place:
        (place / "presets").mkdir()
        (place / "presets" / "smoke.yaml").write_text(content, encoding="utf-8")
        (place / "a_b.ipynb").write_text("{}")
        found = workbook.load_preset(name, place)
        assert set(found) <= {"a_b"} and all(isinstance(p, dict) for p in found.values())
        assert set(workbook.presets(place)) == {"smoke"}


@holds(
    mostly(
        st.sampled_from([{}, {"n": 3}]),
        st.dictionaries(st.one_of(texts, st.sampled_from(["n", "figures_dir", "alpha"])), scalars, max_size=3),
    ),
    share=0.1,
)
def parameters_of_a_notebook(parameters):
    known = workbook.check_parameters(workbook.notebooks_dir() / "00_start_here.ipynb", parameters)
    assert set(parameters) <= set(known)


@holds(
    mostly(names, st.sampled_from(["a/b", ".", "x" * 300])),
    mostly(st.just(["00"]), st.lists(st.one_of(texts, st.sampled_from(["00", "50_radius_explorer"])), max_size=2)),
    st.booleans(),
    share=0.05,
)
def workshops_in_any_folder(name, chosen, again):
    with folder() as place, contextlib.chdir(place):
        found = write_workshop(Path(name), chosen, again=again)
        assert len(found) == len({workbook.chosen_notebooks([c], workbook.notebooks_dir())[0] for c in chosen})
        assert all("solution" not in str(json.loads(p.read_text())["cells"][0]["metadata"]) for p in found)


@holds(st.sampled_from(sorted(name for name in vars(checks) if name.startswith("check_"))), odd_floats(), share=0.5)
def exercises_with_any_answer(name, value):
    """A check says which case an answer gets wrong and raises nothing; with `strict` it raises."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), np.errstate(all="ignore"):
        getattr(checks, name)(lambda *case: value)
    assert said.getvalue().strip()


@holds(
    mostly(
        st.dictionaries(st.sampled_from(["a", 0.25, 0.5]), right_tables, min_size=1, max_size=3),
        st.dictionaries(sigmas, odd_tables, max_size=2),
    ),
    mostly(st.none(), st.lists(numbers, max_size=2)),
    mostly(st.just(12), small),
    st.booleans(),
    share=0.1,
)
def figures_of_any_table(found, radii, bins, best):
    points = figures.certified_accuracy_points(found, radii=radii, envelope=best)
    assert points["certified_accuracy"].between(0, 1).all()
    for fig in (figures.certified_accuracy_curve(found, envelope=best), figures.radius_histogram(found, bins=bins)):
        assert fig.data and "nan" not in fig.layout.title.text.lower()


@holds(st.one_of(sigmas, names))
def looks_of_a_sigma(sigma):
    assert figures.sigma_label(sigma)
    if not isinstance(sigma, str):
        assert (
            figures.sigma_colour(sigma) == figures.sigma_style(sigma).colour and len(figures.sigma_colour(sigma)) == 7
        )


@holds(
    mostly(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.lists(small, max_size=3)),
    st.lists(st.text(max_size=3), max_size=3),
    mostly(st.just(120), wholes),
    mostly(st.just(12), small),
)
def figures_of_any_votes(counts, class_names, n, most):
    fig = figures.votes_figure(counts, class_names, n, most=most)
    assert all(0 <= y <= 1 for y in fig.data[0].y)


@holds(
    npst.arrays(
        np.float32, mostly(st.just((2, 1, 3, 3)), npst.array_shapes(max_dims=5, max_side=3)), elements=float32s
    ),
    mostly(st.none(), st.lists(texts, max_size=2)),
    mostly(st.none(), small),
)
def grids_of_any_images(images, captions, columns):
    assert len(figures.image_grid(images, captions, columns).data) == len(images)


@holds(
    mostly(right_tables, certificate_tables),
    st.lists(st.fixed_dictionaries({"epoch": small, "loss": numbers, "accuracy": shares}), max_size=3),
    share=0.1,
)
def figures_of_training_and_differences(table, epochs):
    with contextlib.suppress(ValueError):
        assert figures.training_curves(epochs).data
    found = intervals.compare({"a": table, "b": table}, "b", draws=20)
    fig = figures.difference_figure(found, "b")
    figures.dress(fig, "title", "x", "y")
    assert fig.data and fig.layout.title.text


# --- audits --------------------------------------------------------------------------------------------


@functools.cache
def kept_record() -> dict:
    """What a small record of `patches` on the disk says of itself, with its parts' bytes."""
    with folder() as place:
        rule = StoppingRule(50, 300, 0.05)
        how = dict(sigma=0.25, stopping_rule=rule, model_id="halves", progress=False, batch=64, compile=False)
        collect_votes(Halves(), patches(), out=place / "r", **how)
        about = json.loads((place / "r" / "run.json").read_text())
        return about | {"parts": {p.name: p.read_bytes() for p in (place / "r" / "parts").iterdir()}}


def copy_record(place: Path, about: dict | None = None) -> Path:
    known = kept_record()
    (place / "parts").mkdir(parents=True)
    for name, content in known["parts"].items():
        (place / "parts" / name).write_bytes(content)
    about = {k: v for k, v in known.items() if k != "parts"} if about is None else about
    (place / "run.json").write_text(json.dumps(about))
    return place


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


# --- panels --------------------------------------------------------------------------------------------


@functools.cache
def panels() -> dict:
    """Every panel once; examples set its settings one after the other, as a reader does."""
    records = {"a": patch_record(0.25), "b": patch_record(0.12)}
    return {
        "attack": AttackPanel(Halves(), patches(), records["a"], number=2),
        "compare": ComparePanel(records),
        "curve": CurvePanel(records, patches()),
        "image": ImagePanel(Halves(), patches()),
        "memory": MemoryPanel(),
        "slice": SlicePanel(Halves(), patches()),
    }


panel_settings = {
    "alpha": alphas,
    "n": st.one_of(st.sampled_from([100, 300]), wholes),
    "n0": wholes,
    "number": wholes,
    "reach": numbers,
    "seed": st.one_of(small, st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64, 10**30])),
    "first": st.sampled_from(["a", "b", "", "∞"]),
    "second": st.sampled_from(["a", "b", "", "∞"]),
    "brush": st.lists(numbers, max_size=3).map(tuple),
    "image": st.one_of(st.integers(0, 5), wholes),
    "sigma": sigmas,
    "questions": st.lists(st.lists(numbers, max_size=5), max_size=3).map(tuple),
    "label": st.integers(-2, 2),
    "radius": numbers,
    "rule": st.sampled_from([*RULES, "x"]),
    "order": st.sampled_from(["as asked", "reversed", "x"]),
    "direction": st.sampled_from(["two random directions", "towards another image", "attack", "x"]),
}
moves = st.sampled_from(["attack", "compare", "curve", "image", "memory", "slice"]).flatmap(
    lambda name: st.tuples(
        st.just(name), st.sampled_from(SETTINGS[name]).flatmap(lambda s: st.tuples(st.just(s), panel_settings[s]))
    )
)
SETTINGS = {
    name: kind.settings()
    for name, kind in dict(
        attack=AttackPanel,
        compare=ComparePanel,
        curve=CurvePanel,
        image=ImagePanel,
        memory=MemoryPanel,
        slice=SlicePanel,
    ).items()
}


@holds(moves, share=0.5)
def panels_at_any_setting(move):
    """A setting is refused by its trait, or the figure moves; whatever was wrong is one line, and no title says NaN."""
    name, (setting, value) = move
    panel = panels()[name]
    before = getattr(panel, setting)
    with refused(TraitError):
        setattr(panel, setting, value)
    panel.settle()
    title = panel.figure.layout.title.text or ""
    assert "nan" not in title.lower() and "inf" not in title.lower() and "\n" not in panel.error
    assert not panel.error or panel.error.startswith(("ValueError: ", "RecordError: ")), panel.error
    setattr(panel, setting, before)
    panel.settle()
    assert panel.error == ""


@holds(mostly(st.sampled_from([100, 300]), wholes), mostly(st.just([0.05]), st.lists(alphas, max_size=2)), share=0.1)
def sliders_that_need_no_python(n, several):
    with refused(TraitError):
        fig = curve_frames({0.25: read_counts(patch_record())}, n=n, alphas=several)
    assert len(fig.frames) == len(several) and "nan" not in fig.layout.title.text


@holds(
    mostly(st.just(["a", "b"]), st.lists(st.sampled_from(["a", "b"]), max_size=2)),
    mostly(st.just("b"), st.just("x")),
    share=0.1,
)
def explorers_of_some_panels(found, current):
    made = Explorer({name: lambda: panels()["curve"] for name in found})
    with refused(TraitError):
        made.current = current
    assert made.current in found and made[current].figure is not None


if __name__ == "__main__":
    main()
