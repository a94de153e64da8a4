"""The command line, plans, presets, workshop and exercises."""

import contextlib
import io
import itertools
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from properties.inputs import (
    alphas,
    as_yaml,
    folder,
    holds,
    mostly,
    names,
    nested,
    odd_floats,
    scalars,
    small,
    texts,
    wholes,
)
from smoothbook.bench import plan as planning
from smoothbook.bench.plan import plan
from smoothbook.cli import main as command
from smoothbook.runner import exercises as checks
from smoothbook.runner import notebooks as workbook
from smoothbook.runner.workshop import write_workshop


@holds(st.sampled_from(["digits", "imagenet", "cifar10", "x"]), names, wholes, alphas, wholes, odd_floats(), share=0.1)
def plans_of_anything(dataset, model, n, alpha, gpus, rate):
    found = plan(dataset, model, n=n, alpha=alpha, gpus=gpus, rate=rate)
    assert found.costs[0].calls >= n and len(found.table()) > 3


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
