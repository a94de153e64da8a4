"""How votes, certificates and records show themselves, in a notebook and in plain text."""

import numpy as np
import pytest

from smoothkit.records import Identity, Row, create_record
from smoothkit.types import ABSTAIN, Certificate, StoppingRule, Votes


def test_votes_rank_their_classes_and_leave_nobody_out():
    votes = Votes(np.array([5, 0, 80, 1, 1, 1, 1, 1, 1, 1]), n=100)
    assert votes.ranked(3) == [("class 2", 80), ("class 0", 5), ("class 3", 1), ("other classes", 6), ("nobody", 8)]
    assert sum(k for _, k in votes.ranked()) == votes.n
    assert repr(votes).startswith("Votes(n=100: class 2 80, class 0 5, class 3 1,")
    assert repr(Votes(np.zeros(3, dtype=int), n=0)) == "Votes(n=0: none)"
    page = votes._repr_html_()
    assert page.count("<tr>") == 8 and "width:144.0px" in page  # 80 of 100 on 180 pixels
    assert "<tr>" not in Votes(np.zeros(3, dtype=int), n=0)._repr_html_()


@pytest.mark.parametrize("predicted, word", [(1, "moves this prediction"), (ABSTAIN, "No answer")])
def test_a_certificate_shows_its_sentence_and_its_settings_escaped(predicted, word):
    name = "<img src=x onerror=alert(1)>"
    certificate = Certificate(
        predicted, 0.5, 0.25, n0=100, n=1_000, alpha=0.001, p_a_lower=0.97725, n_a=990, class_name=name
    )
    page = certificate._repr_html_()
    assert word in page and "<img" not in page and "n0 = 100, n = 1,000, alpha = 0.001" in page
    assert "0.9772" in page and "0.9773" not in page  # rounded down


def test_a_record_shows_what_it_is_about():
    identity = Identity(
        "digits",
        "test",
        "all",
        "<b>mine</b>",
        "f",
        2,
        0.25,
        7,
        "grid:256",
        "float32",
        StoppingRule(n0=10, n=100, alpha=0.001),
    )
    record = create_record(None, identity)
    record.append([Row(3, "3", 33, "d", 1, "select", 0, 10, (10, 0))], {})
    page = record._repr_html_()
    assert "&lt;b&gt;mine" in page and "<b>" not in page
    assert "1 with votes so far" in page and "sigma = 0.25, grid:256, seed 7" in page and "n = 100, rule fixed" in page
    assert repr(record).startswith("Record(in memory: <b>mine</b> on digits")
