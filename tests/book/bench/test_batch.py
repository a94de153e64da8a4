"""Where the time of a batch goes."""

import pytest

from smoothbook.bench.batch import forward_microseconds, median_seconds, time_of_parts
from smoothkit import data, models
from smoothkit.sampling.stream import VoteStream


def test_shares_of_a_batch_add_up():
    images, classifier = data.load("digits", subset="first:1"), models.load("starter:digits-vit-0.25")
    stream = VoteStream(classifier, images, sigma=0.25, seed=0, batch=10)
    parts = time_of_parts(stream, repeats=2)
    assert parts.part.tolist() == ["noise", "forward pass", "votes"]
    assert parts.share.sum() == pytest.approx(1) and (parts["µs a sample"] > 0).all()
    assert forward_microseconds(stream, repeats=2) > 0


def test_the_median_is_of_all_calls():
    calls = []
    assert median_seconds(lambda: calls.append(0), repeats=3) >= 0 and len(calls) == 3
