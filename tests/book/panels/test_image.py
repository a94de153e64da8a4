"""The image panel: votes come in pieces, may be stopped, and the certificate holds at every moment."""

import math
import time

import numpy as np
import pytest
import traitlets

from smoothbook.panels.image import ImagePanel, certificate_so_far, distances_from
from smoothkit import data
from smoothkit.certify import certificates
from smoothkit.certify.betting import kt_lower
from smoothkit.certify.bounds import clopper_pearson_lower, radius, sigma_of_proof
from smoothkit.types import ABSTAIN, NoiseForm, Votes


def test_a_certificate_that_may_be_looked_at_never_passes_one_for_a_fixed_n():
    selection = Votes(np.array([10, 90]), 100)
    for n_a, n in ((900, 1000), (1000, 1000), (510, 1000), (0, 0)):
        found = certificate_so_far(
            selection, Votes(np.array([n - n_a, n_a]), n), sigma=0.5, alpha=0.01, noise="float", class_names=("a", "b")
        )
        assert found.rule == "kt" and found.n == n
        if n:
            assert found.radius == float(radius(float(kt_lower(n_a, n, 0.01)), 0.5))
            assert found.radius <= float(radius(clopper_pearson_lower(n_a, n, 0.01), 0.5))
        assert found.predicted == (1 if found.radius > 0 else ABSTAIN)


def test_the_bound_holds_at_all_looks_together():
    """Peeking after every 100 of 1,000 votes, at p = 0.8: it may exceed p in at most alpha of the runs."""
    alpha, runs, p = 0.05, 2_000, 0.8
    votes = np.random.default_rng(0).binomial(100, p, (runs, 10)).cumsum(axis=1)
    looks = 100 * np.arange(1, 11)
    ever = (kt_lower(votes, np.broadcast_to(looks, votes.shape), alpha) > p).any(axis=1).mean()
    peeked = (clopper_pearson_lower(votes, np.broadcast_to(looks, votes.shape), alpha) > p).any(axis=1).mean()
    assert ever <= alpha < peeked  # 0.05 would need a deviation of many standard errors of 0.005


def test_distances():
    image, others = np.zeros((1, 2, 2)), np.stack([np.zeros((1, 2, 2)), np.ones((1, 2, 2)), np.full((1, 2, 2), 0.5)])
    found = distances_from(image, 0, others, np.array([0, 0, 1]), 0.25)
    assert (found.noise, found.same, found.other) == (0.5, 2.0, 1.0)
    assert math.isnan(distances_from(image, 5, others, np.array([0, 0, 1]), 0.25).same)


def test_sampling_ends_at_n_with_the_votes_of_the_engine(half_space, patches, patch_record):
    panel = ImagePanel(half_space, patches, image=6, n=1_000, n0=50)
    assert panel.figure.layout.meta["n"] == 0 and "No votes yet" in panel.words
    panel.job.start_button.click()
    panel.settle()
    assert not panel.error and panel.figure.layout.meta["n"] == 1_000
    wanted = patch_record.votes().iloc[6]["counts_estimation"]
    (bars,) = panel.figure.select_traces({"name": "votes"})
    assert list(bars.customdata) == wanted.tolist() and np.allclose(bars.y, wanted / 1_000)
    proof = sigma_of_proof(0.25, NoiseForm(patches.grid))
    expected = float(radius(float(kt_lower(int(wanted.max()), 1_000, 0.001)), proof))
    assert panel.figure.layout.meta["radius"] == expected
    (ball,) = panel.figure.select_traces({"name": "certified ball"})
    assert np.allclose(np.hypot(ball.x, ball.y), expected) and "no change of L2 size below" in panel.words
    # alpha acts on the votes at hand
    panel.alpha = 0.2
    assert panel.figure.layout.meta["radius"] > expected and panel.figure.layout.meta["n"] == 1_000
    assert bars.error_y.arrayminus is not None


def test_other_settings_ask_for_other_votes(half_space, patches):
    panel = ImagePanel(half_space, patches, n=200)
    panel.job.start()
    panel.settle()
    assert panel.figure.layout.meta["n"] == 200
    panel.image = 3
    assert panel.figure.layout.meta["n"] == 0 and panel.figure.layout.title.text.startswith("Image 3, a “dark”")
    panel.job.start()
    panel.settle()
    panel.sigma = 0.5
    assert panel.figure.layout.meta == {"n": 0, "alpha": 0.001, "sigma": 0.5, "radius": 0.0}
    assert panel.number.value == 3 and panel.sigma_slider.value == 0.5


def test_stop_keeps_what_was_counted(half_space, patches):
    class Slow(type(half_space)):
        def forward(self, images):
            time.sleep(0.01)
            return super().forward(images)

    panel = ImagePanel(Slow(), patches, image=7, n=1_000_000)
    panel.job.start()
    end = time.monotonic() + 600
    while panel.figure.layout.meta["n"] == 0 and time.monotonic() < end:
        time.sleep(0.02)
    panel.job.stop_button.click()
    panel.job.wait(600)
    counted = panel.figure.layout.meta["n"]
    assert 0 < counted < 1_000_000 and not panel.job.running and not panel.error
    assert f"of {counted:,} votes" in panel.words


def test_the_hardest_and_easiest_are_offered(half_space, patches, patch_record, digits, kept):
    panel = ImagePanel(half_space, patches, certificates(patch_record))
    assert len(panel.picker.options) == 1 + len(patches)
    panel.picker.value = 5
    assert panel.image == 5
    table = certificates(kept["digits-vit-0.25-sigma-0.25"])
    from smoothbook.panels.image import _offered

    offered = _offered(digits, table)
    radii = table["radius"].to_numpy()
    assert len(offered) == 10 and radii[offered[0][0]] == radii.min() and radii[offered[-1][0]] == radii.max()


def test_a_broken_classifier_is_told_in_the_panel(half_space, patches):
    panel = ImagePanel(half_space, patches, n=200)

    def fails(images):
        raise RuntimeError("out of order")

    panel.base_classifier = fails
    panel.job.start()
    panel.settle()
    assert "out of order" in panel.error and not panel.job.running


def test_settings_are_checked(half_space, patches):
    with pytest.raises(traitlets.TraitError, match=r"image must lie in 0..7, got 8"):
        ImagePanel(half_space, patches, image=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'samples'"):
        ImagePanel(half_space, patches, samples=3)
    colour = data.from_arrays(np_images(), np.arange(3) % 2, class_names=("a", "b"))
    panel = ImagePanel(lambda x: x.flatten(1)[:, :2], colour, sigma=0.1)
    assert not panel.error and panel.figure.data[0].type == "image"


def np_images():
    import torch

    return torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
