"""Bad input for the public functions, the command line and the log reader: `make fuzz`.

Properties are written with hypothesis: whatever goes in, a function gives a result that keeps its promise, or raises a
ValueError or OSError of one line. `python tests/trust/fuzz_inputs.py` tries many inputs and keeps how many; the tests try few.
"""

import argparse
import contextlib
import io
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fuzz_logs import fuzz_logs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from results import keep, read

from smoothbook.bench.plan import plan
from smoothbook.cli import main as command
from smoothkit import Purpose, data, models, noisy_copies
from smoothkit.certify import betting, bounds, certificates, certify_votes, predict_votes, sequential_rule
from smoothkit.certify.cascade import cascade_classes, cascade_radii, certify_cascade
from smoothkit.certify.sequential import boundaries, claims
from smoothkit.kernels.noise import standard_normal, standard_normal_reference
from smoothkit.kernels.votes import add_votes, count_votes_reference
from smoothkit.reading import average_certified_radius, certified_accuracy, format_table
from smoothkit.records import Identity, RecordError, Row, create_record, merge, open_record, pack
from smoothkit.types import ABSTAIN, StoppingRule, Votes, round_down

REFUSED = (ValueError, OSError)
TRIED, REFUSALS = Counter(), Counter()
PROPERTIES: dict[str, Callable] = {}
# without deadline: the machine may be busy; the same examples every time
QUICK = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def holds(*strategies, share: float = 1.0):
    """A property of a function; the fuzzer tries `share` of the usual number of inputs."""

    def register(check: Callable) -> Callable:
        def counted(drawn: tuple) -> None:
            TRIED[check.__name__] += 1
            try:
                check(*drawn)
            except REFUSED as error:
                REFUSALS[check.__name__] += 1
                assert str(error).strip(), f"{type(error).__name__} without a word"

        def run(examples: int) -> None:
            settings(max_examples=max(5, int(share * examples)), database=None, **QUICK)(
                given(st.tuples(*strategies))(counted)
            )()

        PROPERTIES[check.__name__] = run
        return check

    return register


def odd_floats(**limits):
    return st.one_of(
        st.floats(**limits), st.sampled_from([0.0, -0.0, 1.0, 0.5, math.nan, math.inf, -math.inf, 1e-320, 1e308])
    )


sizes = st.integers(100, 3_000)  # what is mostly allowed, beside what is odd
wholes = st.one_of(sizes, sizes, st.integers(-3, 99), st.sampled_from([10**6, 2**31 - 1, 2**31, 2**53, 2**63, 10**30]))
usual = st.sampled_from([0.05, 0.001, 1e-9])
alphas = st.one_of(usual, usual, usual, odd_floats(min_value=-1, max_value=100))
levels = st.sampled_from([0.12, 0.25, 1.0])
sigmas = st.one_of(levels, levels, levels, odd_floats(min_value=-1, max_value=300))
names = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)


# --- bounds and rules ----------------------------------------------------------------------------------


@holds(st.one_of(st.integers(-1, 300), wholes), wholes, alphas)
def clopper_pearson_is_ordered(k, n, alpha):
    low, high = float(bounds.clopper_pearson_lower(k, n, alpha)), float(bounds.clopper_pearson_upper(k, n, alpha))
    assert 0 <= low <= high <= 1 and (alpha >= 0.5 or low <= k / n <= high)


@holds(st.one_of(st.floats(0.4, 0.999), odd_floats(min_value=-0.5, max_value=1.5)), sigmas)
def radius_is_never_negative(p, sigma):
    r = float(bounds.radius(p, sigma))
    assert math.isfinite(r) and r >= 0 and (p > 0.5 or r == 0)


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


# --- votes and certificates ----------------------------------------------------------------------------

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


@holds(
    npst.arrays(
        np.float32,
        npst.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.one_of(st.floats(-2, 2, width=32), st.sampled_from([np.nan, np.inf, -np.inf])),
    )
)
def votes_are_counted_as_defined(logits):
    logits = torch.from_numpy(logits)
    votes = torch.zeros(1, logits.shape[1], dtype=torch.int64)
    add_votes(votes, logits, torch.zeros(len(logits), dtype=torch.int64))
    assert torch.equal(votes[0], count_votes_reference(logits)) and votes.sum() <= len(logits)


# --- images, noise, models -----------------------------------------------------------------------------

greys = npst.arrays(np.float32, (2, 1, 2, 2), elements=st.integers(0, 255).map(lambda k: np.float32(k / 255)))
pixels = st.one_of(
    greys,
    npst.arrays(
        st.sampled_from([np.float32, np.float64, np.uint8, np.int64]),
        npst.array_shapes(min_dims=0, max_dims=5, max_side=3),
    ),
)


@holds(
    pixels,
    st.one_of(st.none(), st.just([0, 1]), st.lists(st.integers(-2, 3), max_size=3)),
    st.sampled_from([None, 255, 256, 1, 0]),
)
def images_from_arrays(values, labels, grid):
    images = data.from_arrays(torch.from_numpy(values), None if labels is None else np.array(labels), grid=grid)
    assert len(images) == len(values) and torch.equal(images.batch(), torch.from_numpy(values).float())


@holds(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [
                "first:0",
                "every:2",
                "range:1:3",
                "range:3:1",
                "classes:0-0",
                "classes:1-0",
                "first:99999999999999999999",
                "all",
            ]
        ),
    )
)
def subsets(rule):
    images = data.from_arrays(
        torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)), np.array([0, 0, 1, 1, 1])
    )
    chosen = images.take(rule)
    assert 0 < len(chosen) <= 5 and set(chosen.ids) <= set(images.ids)


@holds(
    st.one_of(names, st.sampled_from(["digits", "digit", "folder:", "parquet:", "folder:/no/such", "imagenet"])),
    st.sampled_from(["test", "train", "", "x"]),
)
def data_sets_by_name(name, split):
    assert len(data.load(name, split=split)) > 0


@holds(st.integers(1, 40), st.integers(-1, 2**64), st.integers(0, 2**56 - 1), st.integers(0, 5), share=0.5)
def noise_is_what_it_is_defined_to_be(size, seed, image, start):
    known = dict(seed=seed, purpose=Purpose.ESTIMATE, image_id=image, start=start, stop=start + 2)
    assert np.array_equal(standard_normal(size, **known), standard_normal_reference(size, **known))


@holds(sigmas, st.sampled_from([None, 255, 0, -1]), st.integers(-2, 3), st.integers(-2, 4), share=0.5)
def noisy_copies_are_finite(sigma, grid, start, stop):
    made = noisy_copies(
        torch.full((1, 2, 2), 0.5),
        sigma=sigma,
        seed=0,
        purpose=Purpose.SELECT,
        image_id=1,
        start=start,
        stop=stop,
        grid=grid,
    )
    assert made.shape == (stop - start, 1, 2, 2) and bool(made.isfinite().all())


@holds(
    st.one_of(
        names,
        st.sampled_from(
            ["starter:x", "starter:../digits-vit-0.25", "local-dir:/", "weights.pth", "local-dir:x.bin", "resnt18"]
        ),
    ),
    share=0.2,
)
def models_by_name(name):
    models.load(name, pretrained=False)


# --- records -------------------------------------------------------------------------------------------


@holds(names, names, st.just(1), st.lists(st.integers(-1, 61), min_size=1, max_size=2), share=0.3)
def records_give_back_what_was_put_in(folder, key, classes, votes):
    """Unicode paths and keys, one class, counts that fit or do not."""
    rule = StoppingRule(n0=50, n=60, alpha=0.05)
    known = Identity("d", "test", "all", "m", "f", classes, 0.25, 0, "float", "float32", rule)
    with tempfile.TemporaryDirectory() as place:
        record = create_record(Path(place) / f"r{folder}", known)
        row = Row(0, key, 1, "d", 0, "estimate", 0, 60, tuple(votes))
        record.append([row], {"compute_batch": 1})
        record.journal().add(row, {"compute_batch": 1})
        rows = open_record(record.path).rows()
        assert rows["key"].tolist() == [key] and rows["counts"].tolist() == [tuple(votes)] and min(votes) >= 0
        with contextlib.suppress(RecordError):  # its selection is not there
            certificates(record)
        assert merge([record.path], Path(place) / "m").rows().equals(rows)
        assert pack(record.path, Path(place) / "p.zip").is_file()


@holds(st.binary(max_size=300), share=0.5)
def descriptions_of_any_bytes(content):
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "run.json").write_bytes(content)
        open_record(place)


@holds(
    st.recursive(
        st.one_of(st.none(), st.booleans(), wholes, st.text(max_size=3)),
        lambda x: st.one_of(
            st.lists(x, max_size=3),
            st.dictionaries(
                st.sampled_from(["format", "identity", "class_names", "stopping_rule", "n"]), x, max_size=4
            ),
        ),
        max_leaves=8,
    ),
    share=0.5,
)
def descriptions_of_any_json(content):
    import json

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "run.json").write_text(json.dumps(content))
        open_record(place)


@holds(npst.arrays(np.float64, st.integers(0, 5), elements=odd_floats()), st.lists(odd_floats(), max_size=3))
def rates_lie_between_0_and_1(radius, radii):
    table = pd.DataFrame({"predict": np.zeros(len(radius), int), "radius": radius, "correct": True})
    assert ((certified_accuracy(table, radii) >= 0) & (certified_accuracy(table, radii) <= 1)).all()
    average_certified_radius(table)
    format_table(table, "latex")


@holds(st.sampled_from(["digits", "imagenet", "cifar10", "x"]), names, wholes, alphas, wholes, odd_floats(), share=0.1)
def plans_of_anything(dataset, model, n, alpha, gpus, rate):
    found = plan(dataset, model, n=n, alpha=alpha, gpus=gpus, rate=rate)
    assert found.costs[0].calls >= n and len(found.table()) > 3


# --- the command line ----------------------------------------------------------------------------------

JUNK = ["0", "-1", "nan", "inf", "1e400", "9" * 30, "0.25", "10", "", "∞", "--", ".", "digits", "first:1"]
values = st.one_of(names, st.sampled_from([*JUNK, "starter:digits-vit-0.25"]))
commands = st.sampled_from(["report", "certify", "audit", "merge", "pack", "plan", "claim", ""])
options = st.sampled_from(
    [
        "--n",
        "--n0",
        "--alpha",
        "--sigma",
        "--data",
        "--model",
        "--radii",
        "--subset",
        "--batch",
        "--rate",
        "--gpus",
        "--redraw",
        "--seed",
        "--within",
        "--nonsense",
    ]
)


@holds(commands, st.lists(st.tuples(options, values), max_size=5), st.lists(values, max_size=2), share=0.3)
def command_lines(name, pairs, positional):
    """Exit status 0 to 3, never a traceback; nothing long is started, since no line names all that certify needs."""
    arguments = [name, *positional, *itertools.chain.from_iterable(pairs)]
    needed = {"--model", "--data", "--sigma", "--n"} if name == "certify" else set()
    if needed and needed <= {option for option, _ in pairs}:
        arguments.remove("--data")
    here, said = Path.cwd(), io.StringIO()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                status = command([a for a in arguments if a != "--help"])
        except SystemExit as error:
            status = error.code
        finally:
            os.chdir(here)
    assert status in (0, 1, 2, 3) and "Traceback" not in said.getvalue(), said.getvalue()
    assert status != 2 or said.getvalue().strip()


# --- all ------------------------------------------------------------------------------------------------


def run_properties(examples: int) -> list[dict]:
    """Every property with about so many inputs: what was tried, refused, and what did not hold."""
    found = []
    for name, run in PROPERTIES.items():
        TRIED[name] = REFUSALS[name] = 0
        problem = ""
        try:
            run(examples)
        except Exception as error:  # hypothesis gives the smallest input that it found
            problem = f"{type(error).__name__}: {error}"[:600]
        found.append({"property": name, "tried": TRIED[name], "refused": REFUSALS[name], "problem": problem})
    return found


def _logs(part: tuple[int, int, float]) -> dict:
    number, seed, seconds = part
    return fuzz_logs(number, seed, time.perf_counter() + seconds)


def _all_logs(number: int, jobs: int, seconds: float) -> tuple[dict[str, int], list]:
    """How many logs were tried, read and refused, and those that were read wrongly."""
    share = -(-number // jobs)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        parts = pool.map(_logs, [(share, seed, seconds) for seed in range(jobs)])
    counted = {name: sum(part[name] for part in parts) for name in ("tried", "read", "refused")}
    return counted, [w for part in parts for w in part["wrong"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=300, help="inputs for each property")
    parser.add_argument("--logs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=400, help="for the logs, at the most")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--keep-logs", action="store_true", help="try no logs, and keep what the last run found of them"
    )
    chosen = parser.parse_args()
    begin = time.perf_counter()
    if chosen.keep_logs:
        last = read("fuzz")
        logs, wrong = {**last["logs"], "of": "an earlier run"}, last["logs_read_wrongly"]
    else:
        logs, wrong = _all_logs(chosen.logs, chosen.jobs, chosen.seconds)
    properties = run_properties(chosen.examples)
    broken = [p for p in properties if p["problem"]]
    tried = logs["tried"] + sum(p["tried"] for p in properties)
    silent = len(wrong) + len(broken)
    keep(
        "fuzz",
        begin,
        {
            "made_by": "make fuzz",
            "headline": f"{tried:,} inputs tried, {logs['tried']:,} of them mutated logs; {silent} silent errors",
            "tried": tried,
            "silent_errors": silent,
            "logs": logs,
            "logs_read_wrongly": wrong[:20],
            "properties": properties,
        },
    )
    sys.exit(bool(wrong or broken))


if __name__ == "__main__":
    from fuzz_methods import main  # registers its properties beside those of this file, in the module of this name

    main()
