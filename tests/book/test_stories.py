"""What the notebooks say in prose: tests they name exist, numbers they state are right."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from scipy.special import ndtr, ndtri

from smoothkit.certify.bounds import clopper_pearson_lower, radius, radius_cap
from smoothkit.types import round_down

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
A_TEST = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")
LONGEST = 25  # lines of a cell


def cells(path) -> list[tuple[str, str]]:
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text())["cells"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_test_that_a_notebook_names_exists(path):
    named = set(A_TEST.findall("\n".join(text for _, text in cells(path))))
    missing = [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in (ROOT / file).read_text()]
    assert not missing
    assert path.stem != "70_scale_and_trust" or len(named) > 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_are_short(path):
    long = {text.splitlines()[0]: len(text.splitlines()) for kind, text in cells(path) if kind == "code"}
    assert {head: lines for head, lines in long.items() if lines > LONGEST} == {}


def test_ten_times_the_samples_lift_the_cap_by_less_than_one_sigma():
    """Exercise 3 of 00_start_here, at its alpha."""
    assert all(radius_cap(10 * n, 0.001, 1.0) - radius_cap(n, 0.001, 1.0) < 1 for n in (1_000, 10_000, 100_000))


def test_what_the_notebook_on_sigma_selection_states():
    """The cap at n = 1,000, the end of the released clamp, and the best sigma of the slab at n = 100,000."""
    assert [round_down(radius_cap(n, 0.001, 1.0), 2) for n in (1_000, 100_000)] == ["2.46", "3.81"]
    assert [round(float(ndtri(1 - clamp)), 2) for clamp in (0.02, 0.001)] == [2.05, 3.09]
    sigma, n = np.linspace(0.05, 1.4, 271), 100_000
    votes = np.floor(n * (2 * ndtr(1 / sigma) - 1)).astype(np.int64)
    assert sigma[(sigma * ndtri(clopper_pearson_lower(votes, n, 0.001))).argmax()] == pytest.approx(0.3, abs=0.05)


def test_another_alpha_moves_radii_most_where_votes_are_unanimous():
    """60_paper_figures on the alpha of logs, and 50_radius_explorer on its slider."""
    votes = np.array([60_000, 90_000, 99_000, 99_900, 100_000])
    strict, loose = (radius(clopper_pearson_lower(votes, 100_000, alpha), 1.0) for alpha in (0.001, 0.05))
    assert (np.diff(loose - strict) > 0).all()
