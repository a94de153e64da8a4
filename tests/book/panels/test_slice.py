"""The slice panel: planes, votes on them, and a circle that nothing inside contradicts."""

import numpy as np
import pytest
import torch
import traitlets

from smoothbook.panels import slice as slices
from smoothbook.panels.plane import (
    EDGES,
    Plane,
    answers_inside,
    attack_path,
    base_regions,
    centre_votes,
    decide,
    make_plane,
    orthonormal,
    plane_points,
    sample_plane,
)
from smoothbook.panels.slice import SlicePanel
from smoothkit.certify import fixed, predict_votes
from smoothkit.types import ABSTAIN, Votes

COARSE = 6


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer points than a reader wants to see; the numbers are no others."""
    monkeypatch.setattr(slices, "COARSE", COARSE)
    monkeypatch.setattr(slices, "BASE_SIDE", 12)


def plane_at(patches, image=5, direction="random", classifier=None):
    how = dict(direction=direction, sigma=0.25, seed=0, pool=patches.batch(), pool_labels=patches.labels)
    return make_plane(classifier, patches, image, **how)


def test_directions_are_orthonormal():
    first, second = orthonormal(
        [torch.tensor([3.0, 4.0, 0.0]), torch.tensor([6.0, 8.0, 0.0]), torch.tensor([1.0, 0, 1])]
    )
    assert torch.allclose(
        torch.stack([first @ first, second @ second, first @ second]), torch.tensor([1.0, 1, 0]), atol=1e-6
    )
    with pytest.raises(ValueError, match="span no plane"):
        orthonormal([torch.ones(3), 2 * torch.ones(3)])


def test_a_plane_towards_another_image_reaches_it(patches):
    plane = plane_at(patches, direction="towards another image")
    ((name, (u, v)),) = plane.marks.items()
    assert "dark" in name and v == 0
    assert torch.allclose(plane.point(u, v), patches[3], atol=1e-5)  # the nearest of the other class
    assert plane.half == pytest.approx(1.15 * u)


def test_an_attack_lies_in_its_plane_and_crosses_the_border(patches, half_space):
    plane = plane_at(patches, direction="attack", classifier=half_space)
    steps = attack_path(half_space, patches, 5, sigma=0.25, seed=0, epsilon=plane.half / 1.15)
    end = plane.point(*plane.path[-1])
    assert plane.path.shape == (13, 2) and np.allclose(plane.path[0], 0)
    assert torch.allclose(end, steps[-1], atol=1e-4) and end.mean() < 0.5 < patches[5].mean()
    assert np.linalg.norm(plane.path, axis=1).max() <= plane.half / 1.15 + 1e-4


def test_points_may_leave_the_unit_cube_but_the_image_may_not(patches):
    plane = plane_at(patches)
    points = plane_points(plane, 4)
    values = torch.stack(list(points))
    assert values.min() < 0 or values.max() > 1
    assert torch.allclose(points[0], plane.point(*[plane.axis(4)[0]] * 2)) and len(set(points.ids)) == 16
    with pytest.raises(ValueError, match=r"the image in the middle must lie in \[0, 1\]"):
        plane_points(Plane(plane.origin + 2, plane.first, plane.second, 1.0, ("", ""), plane.path, {}), 4)
    with pytest.raises(ValueError, match=r"point .* must not contain NaN"):
        plane_points(Plane(plane.origin, plane.first * torch.nan, plane.second, 1.0, ("", ""), plane.path, {}), 4)[0]


def test_regions_are_those_of_the_classifier(patches, half_space):
    plane = plane_at(patches, direction="towards another image")
    base = base_regions(half_space, plane, 8)
    axis = plane.axis(8)
    for i, j in ((0, 0), (7, 3), (2, 6)):
        assert base[i, j] == int(plane.point(axis[j], axis[i]).mean() > 0.5)


def test_decisions_are_those_of_predict():
    counts = np.array([[90, 10, 0], [60, 40, 0], [34, 33, 33], [0, 0, 0], [5, 5, 90], [50, 50, 0]])
    for alpha in (0.001, 0.06, 0.5):
        votes = [predict_votes(Votes(c, 100), alpha=alpha) for c in counts]
        assert decide(counts, 100, alpha).tolist() == votes
    # while sampling goes on there may be too few votes for any answer, which `predict_votes` refuses
    assert decide(np.array([[20, 0], [3, 17]]), 20, 1e-6).tolist() == [ABSTAIN, ABSTAIN]


def test_votes_are_kept_in_blocks(patches, half_space):
    plane = plane_at(patches)
    *growing, counts = sample_plane(half_space, plane, 3, sigma=0.25, seed=0)
    assert counts.shape == (len(EDGES), 9, 2) and (counts.sum(axis=2) == np.array(EDGES)[:, None]).all()
    assert [len(c) for c in growing] == [1, 2] and all(np.array_equal(c, counts[: len(c)]) for c in growing)
    (first,) = sample_plane(half_space, plane, 3, sigma=0.25, seed=0, edges=EDGES[:1])
    assert np.array_equal(first, growing[0])
    selection, estimation = centre_votes(half_space, patches, 5, sigma=0.25, seed=0)
    assert selection.n == 100 and [e.n for e in estimation] == list(EDGES)


def test_the_panel_from_image_to_circle(patches, half_space):
    panel = SlicePanel(half_space, patches, image=7, direction="towards another image")
    panel.settle()
    meta = panel.figure.layout.meta
    assert not panel.error and meta["side"] == COARSE and meta["n"] == 100 and meta["radius"] > 0
    kept = panel._kept[panel._key()]
    smoothed = decide(kept.counts[COARSE][-1], 100, panel.alpha).reshape(COARSE, COARSE)
    drawn = [t for t in panel.figure.data if t.name == "regions"][1]
    # the colour of a cell is its class: one value of z for each answer, and -1 for none
    assert {(int(a), int(z)) for a, z in zip(smoothed.ravel(), np.asarray(drawn.z).ravel(), strict=True)} <= {
        (ABSTAIN, -1), (0, 0), (1, 1)
    }  # fmt: skip
    circle = next(t for t in panel.figure.data if t.name == "certified circle")
    assert np.allclose(np.hypot(circle.x, circle.y), meta["radius"])
    # the half-space's border is closer than the truth's radius nowhere inside the circle
    assert meta["radius"] <= float((patches[7].mean() - 0.5) * 2)
    panel.alpha = 0.3
    assert panel.figure.layout.meta["radius"] > meta["radius"]
    panel.n_control.slider.value = 20
    assert panel.figure.layout.meta["n"] == 20 and panel.n == 20 and "of 20 votes" in panel.words


def test_nothing_inside_the_circle_answers_otherwise(patches, half_space):
    panel = SlicePanel(half_space, patches, image=7, direction="towards another image", alpha=0.01)
    panel.settle()
    kept = panel._kept[panel._key()]
    smoothed = decide(kept.counts[COARSE][-1], 100, 0.01).reshape(COARSE, COARSE)
    certificate = fixed.certify_votes(kept.selection, kept.estimation[-1], sigma=0.25, alpha=0.01)
    inside = answers_inside(kept.plane, smoothed, certificate)
    assert inside.agree > 0 and inside.otherwise == 0 and "0 answer otherwise" in panel.words
    flipped = np.where(smoothed == 1, 0, smoothed)
    assert answers_inside(kept.plane, flipped, certificate).otherwise == inside.agree


def test_planes_are_remembered_and_others_asked_for(patches, half_space, monkeypatch):
    asked = []
    sample = slices.sample_plane

    def counted(*args, **how):
        asked.append((args[2], how["sigma"]))
        return sample(*args, **how)

    monkeypatch.setattr(slices, "sample_plane", counted)
    monkeypatch.setattr(slices, "FINE", 9)
    panel = SlicePanel(half_space, patches, direction="random")
    panel.settle()
    panel.sigma = 0.5
    panel.settle()
    panel.sigma_slider.value = 0.25
    panel.settle()
    assert asked == [(COARSE, 0.25), (COARSE, 0.5)] and panel.figure.layout.meta["sigma"] == 0.25
    panel.job.start_button.click()
    panel.settle()
    assert asked[-1] == (9, 0.25) and panel.figure.layout.meta["side"] == 9
    panel.direction_choice.value = "attack"
    panel.settle()
    assert panel.figure.layout.meta["direction"] == "attack" and panel.figure.layout.meta["side"] == COARSE
    assert any(t.name == "the attack’s path" for t in panel.figure.data)


def test_the_picture_appears_with_the_first_votes_and_a_stop_keeps_them(patches, half_space, monkeypatch):
    panel = SlicePanel(half_space, patches, direction="random")
    panel.settle()
    assert panel.figure.layout.meta["votes"] == 100 and "so far" not in panel.words
    seen, refresh = [], panel.refresh

    def stop_after_the_first(change=None):
        refresh(change)
        seen.append((panel.figure.layout.meta["side"], panel.figure.layout.meta["votes"]))
        if seen[-1] == (9, EDGES[0]):
            panel.job.stop()

    monkeypatch.setattr(slices, "FINE", 9)
    monkeypatch.setattr(panel, "refresh", stop_after_the_first)
    panel.refine()
    panel.settle()
    assert seen[-1] == (9, EDGES[0]) and "20 votes each so far" in panel.words and not panel.error
    monkeypatch.setattr(panel, "refresh", refresh)
    panel.refine()  # goes on to the end, and to what would have been there without the stop
    panel.settle()
    kept = panel._kept[panel._key()]
    *_, whole = sample_plane(half_space, kept.plane, 9, sigma=panel.sigma, seed=panel.seed)
    assert np.array_equal(kept.counts[9], whole) and panel.figure.layout.meta["votes"] == 100


def test_a_refinement_stopped_at_once_leaves_the_coarse_picture(patches, half_space, monkeypatch):
    class Stopped:
        stopped = True

        def progress(self, *_):
            raise AssertionError("nothing to tell after a stop")

    assert list(sample_plane(half_space, plane_at(patches), 3, sigma=0.25, seed=0, job=Stopped())) == []
    panel = SlicePanel(half_space, patches, direction="random")
    panel.settle()
    monkeypatch.setattr(slices, "sample_plane", lambda *args, **how: iter(()))
    panel.refine()
    panel.settle()
    assert panel.figure.layout.meta["side"] == COARSE and not panel.error


def test_settings_are_checked(patches, half_space):
    with pytest.raises(traitlets.TraitError, match="n must be a block edge, one of 20, 50, 100; got 70"):
        SlicePanel(half_space, patches, n=70)
    with pytest.raises(traitlets.TraitError, match="direction"):
        SlicePanel(half_space, patches, direction="up")
    panel = SlicePanel(half_space, patches.take("first:2"))
    panel.settle()
    assert "one of another class" in panel.error
