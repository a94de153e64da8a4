"""The search for sigma on classifiers whose smoothed probabilities are known, and on the engine's noise."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from smoothbook.sigma.search import (
    GUARD,
    GUARD_SAMPLES,
    ClampedRadius,
    FiniteSampleRadius,
    PilotNoise,
    ReleasedRadius,
    SigmaSearch,
    ascend,
    search_sigma,
    slope_of,
    step_of,
)
from smoothkit import Purpose
from smoothkit.data import from_arrays
from smoothkit.kernels.noise import standard_normal

normal_cdf = torch.special.ndtr
# the search as the authors' scripts do it: two largest probabilities, clamp 0.02, plain ascent, no guard
RELEASED = SigmaSearch(ReleasedRadius(), steps=100, guard=False, positive=False)


def two_classes(p: torch.Tensor) -> torch.Tensor:
    return torch.stack([p, 1 - p], dim=1)


def slab(sigma: torch.Tensor, step: int) -> torch.Tensor:
    """|u| < 1 at u = 0, in one dimension."""
    return two_classes(2 * normal_cdf(1 / sigma) - 1)


def half_space(margin: float):
    return lambda sigma, step: two_classes(normal_cdf(margin / sigma))


def sigmas(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def constant(*p: float):
    row = torch.tensor(p, dtype=torch.float64)
    return lambda sigma, step: row.expand(len(sigma), -1) + 0 * sigma[:, None]


# --- objectives --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "radius"), [(0.25, 0.958204), (0.5, 0.845072), (0.75, 0.679629), (1.0, 0.475233)])
def test_radius_of_the_slab(sigma, radius):
    """Section 5.2 of the method note: R(sigma) = sigma Phi^-1(2 Phi(1/sigma) - 1), from SciPy."""
    value = ClampedRadius(0.0)(slab(sigmas(sigma), 0), torch.tensor([0]), sigmas(sigma))
    assert float(value) == pytest.approx(radius, abs=5e-7)
    assert float(ClampedRadius(0.0)(slab(sigmas(1.482602), 0), torch.tensor([0]), sigmas(1.482602))) == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize(
    ("p", "coarse", "fine"),
    [
        ((0.9, 0.05, 0.05), 0.365801, 0.365801),
        ((0.6, 0.3, 0.1), 0.0972185, 0.0972185),
        ((0.995, 0.004, 0.001), 0.513437, 0.653487),
    ],
)
def test_surrogates_at_one_sigma(p, coarse, fine):
    """The note's surrogate values at sigma 0.25, for clamps of 0.02 and 0.001."""
    row, sigma = torch.tensor([p], dtype=torch.float64), sigmas(0.25)
    for clamp, expected in ((0.02, coarse), (0.001, fine)):
        for objective in (ClampedRadius(clamp), ReleasedRadius(clamp)):
            assert float(objective(row, torch.tensor([0]), sigma)) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(("clamp", "step"), [(0.02, 2.0537489e-4), (0.001, 3.0902323e-4)])
def test_a_saturated_step(clamp, step):
    """Where all is certain only the factor sigma carries a gradient; plain ascent adds alpha Phi^-1(1 - clamp)."""
    sure, sigma0 = constant(1.0, 0.0), sigmas(0.25, 0.5)
    for objective in (ClampedRadius(clamp), ReleasedRadius(clamp)):
        plain = ascend(sure, sigma0, SigmaSearch(objective=objective, steps=1, guard=False, positive=False))
        assert plain.trace[1] - plain.trace[0] == pytest.approx([step, step], rel=1e-7)
        positive = ascend(sure, sigma0, SigmaSearch(objective=objective, steps=1))
        assert positive.trace[1] - positive.trace[0] == pytest.approx([step, step], rel=1e-3)


def test_steps_that_the_illustrated_example_takes():
    """The note: 0.25 to 0.423 takes at least 843 saturated steps; 100 steps move 0.0205, and 900 end at 0.4348."""
    search = dataclasses.replace(RELEASED, steps=900)
    trace = ascend(constant(1.0, 0.0), sigmas(0.25), search).trace[:, 0]
    assert int((trace < 0.423).sum()) == 843
    assert trace[100] - trace[0] == pytest.approx(0.0205, abs=5e-5) and trace[-1] == pytest.approx(0.4348, abs=5e-5)


def test_gradients_are_those_of_the_formula():
    """Against differences of the objective; a clamp in place would lose the gradient of what is not clamped."""
    for objective in (ClampedRadius(0.001), ClampedRadius(0.02), ReleasedRadius(), FiniteSampleRadius(10_000)):
        for start in (0.35, 0.6, 1.0):
            class_a, h = torch.tensor([0]), 1e-7  # short: the finite-sample radius has a bend at every whole count
            value, slope = slope_of(objective, slab, class_a, sigmas(start), 0)
            low, high = (objective(slab(sigmas(s), 0), class_a, sigmas(s)) for s in (start - h, start + h))
            assert float(slope) == pytest.approx(float(high - low) / (2 * h), rel=1e-5, abs=1e-6), (objective, start)
            assert float(value) == pytest.approx(float(high + low) / 2, abs=1e-5)


def test_finite_sample_radius_is_the_expected_certificate():
    """Between the Clopper-Pearson bounds (SciPy) of the whole counts around n p; the note's R = 0.9118 at 0.297."""
    value = FiniteSampleRadius()(slab(sigmas(0.297), 0), torch.tensor([0]), sigmas(0.297))
    assert float(value) == pytest.approx(0.9118, abs=1e-4)
    for p in (0.2, 0.51, 0.9, 0.99999, 1.0):
        k, n, alpha = 1000 * p, 1000, 0.01
        own = float(FiniteSampleRadius(n, alpha)(torch.tensor([[p, 1 - p]]).double(), torch.tensor([0]), sigmas(0.5)))
        ends = [0.5 * stats.norm.ppf(stats.beta.ppf(alpha, j, n - j + 1)) for j in {math.floor(k), math.ceil(k)}]
        assert min(ends) - 1e-6 <= own <= max(ends) + 1e-6
    never = FiniteSampleRadius(1000)(torch.tensor([[0.0, 1.0]]).double(), torch.tensor([0]), sigmas(0.5))
    assert bool(never.isfinite()) and float(never) < 0


# --- the ascent --------------------------------------------------------------------------------------


def test_a_half_space_gains_nothing():
    """R(sigma) = margin for every sigma: a search that reports a gain here is broken."""
    start = sigmas(0.15, 0.25, 0.5)
    found = ascend(half_space(0.3), start, SigmaSearch(objective=ClampedRadius(0.0), steps=50, step_size=0.05))
    assert found.before == pytest.approx([0.3] * 3, rel=1e-12) and found.after == pytest.approx([0.3] * 3, rel=1e-12)
    assert found.sigma == pytest.approx(start.numpy(), abs=1e-9)
    assert found.objective == pytest.approx(np.full((50, 3), 0.3))


@pytest.mark.parametrize(
    ("objective", "sigma", "radius"),
    [
        (FiniteSampleRadius(), 0.297, 0.9118),
        (ClampedRadius(0.001), 0.3039027, 0.9391300),
        (ClampedRadius(0.02), 0.4298583, 0.8828211),
    ],
)
def test_the_slab_has_its_best_sigma(objective, sigma, radius):
    """The note's optima, found within 3% from below and from above, and again by a search of SciPy's."""

    def value(s: float) -> float:
        return float(objective(slab(sigmas(s), 0), torch.tensor([0]), sigmas(s)))

    best = optimize.minimize_scalar(lambda s: -value(s), bounds=(0.2, 0.6), method="bounded")
    assert best.x == pytest.approx(sigma, rel=0.01) and -best.fun == pytest.approx(radius, abs=1e-4)
    search = SigmaSearch(objective=objective, steps=400, step_size=0.002, average=0.3)
    found = ascend(slab, sigmas(0.25, 0.5), search)
    assert found.sigma == pytest.approx([sigma, sigma], rel=0.03)
    assert found.after == pytest.approx([radius, radius], abs=0.005)
    assert (found.after >= found.before).all() and not found.kept.any()


def test_never_worse_than_it_began():
    """Steps far too long throw sigma about; the guard puts sigma0 back where that lost."""
    wild = SigmaSearch(objective=ClampedRadius(0.001), steps=3, step_size=2.0)
    start = sigmas(0.28, 0.3, 0.32, 1.2)
    unguarded = ascend(slab, start, SigmaSearch(**{**vars(wild), "guard": False}))
    guarded = ascend(slab, start, wild)
    assert (unguarded.after < unguarded.before).any() and (guarded.after >= guarded.before).all()
    lost = unguarded.after < unguarded.before
    assert (guarded.kept == lost).all()
    assert (guarded.sigma[lost] == start.numpy()[lost]).all()
    assert (guarded.sigma > 0).all() and (unguarded.trace > 0).all()


def test_plain_ascent_can_reach_zero_and_says_so():
    with pytest.raises(ValueError, match="sigma of 0 or below"):
        ascend(slab, sigmas(1.0), dataclasses.replace(RELEASED, step_size=5.0))


def test_an_image_without_a_slope_stays():
    def broken(sigma: torch.Tensor, step: int) -> torch.Tensor:
        return slab(sigma, step) * torch.tensor([[math.nan], [1.0]])

    found = ascend(broken, sigmas(0.5, 0.5), SigmaSearch(steps=5, step_size=0.01))
    assert found.sigma[0] == 0.5 and found.sigma[1] < 0.5 and found.kept.tolist() == [True, False]


def test_the_class_is_fixed_where_the_search_begins():
    """An island of class 1 seen at small sigma only: the released search changes the class on the way, this one not."""

    def island(sigma: torch.Tensor, step: int) -> torch.Tensor:
        p = 2 * normal_cdf(0.2 / sigma) - 1  # of class 1
        return two_classes(1 - p)

    start = sigmas(0.28)
    fixed = ascend(island, start, SigmaSearch(objective=ClampedRadius(0.02), steps=200, step_size=0.02))
    top_two = ascend(island, start, SigmaSearch(objective=ReleasedRadius(), steps=200, step_size=0.02))
    assert fixed.c_a.tolist() == [1] and top_two.c_a.tolist() == [1]
    assert int(island(sigmas(*fixed.sigma), 0).argmax()) == 1
    assert fixed.sigma[0] < 0.28
    start = sigmas(0.31)  # just beyond: class 0 by a hair
    assert ascend(island, start, SigmaSearch(steps=50, step_size=0.02)).c_a.tolist() == [0]


def test_start_is_not_changed_and_trace_is_kept():
    start = sigmas(0.5, 0.75)
    found = ascend(slab, start, SigmaSearch(steps=7, step_size=0.01))
    assert start.tolist() == [0.5, 0.75] and found.sigma0.tolist() == [0.5, 0.75]
    assert found.trace.shape == (8, 2) and found.objective.shape == (7, 2)
    assert (found.trace[0] == found.sigma0).all() and (found.trace[-1] == found.sigma).all()


def test_averaged_ends():
    search = SigmaSearch(steps=10, step_size=0.05, average=0.3, guard=False)
    found = ascend(slab, sigmas(0.5), search)
    assert found.sigma[0] == pytest.approx(np.exp(np.log(found.trace[-3:, 0]).mean()))


def test_one_step_keeps_sigma_positive():
    slope = torch.tensor([-1e6, 1e3, math.nan, math.inf], dtype=torch.float64)
    assert (step_of(sigmas(0.5, 0.5, 0.5, 0.5), slope, SigmaSearch(step_size=1e-3)) >= 0).all()
    assert step_of(sigmas(0.5), torch.tensor([math.nan]), SigmaSearch()).tolist() == [0.5]


# --- on images ---------------------------------------------------------------------------------------


class SoftSlab(nn.Module):
    """Class 0 where the only pixel is within 1 of one half, with a steep sigmoid at the edges."""

    def __init__(self, steepness: float = 30.0) -> None:
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor(steepness))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = self.steepness * (1 - (images.flatten(1)[:, 0] - 0.5).abs())
        return torch.stack([score, -score], dim=1)


def test_pilot_noise_is_the_engines():
    ids, shape = (3, 2**55 + 1), (1, 2, 3)
    noise = PilotNoise(ids, shape, seed=2**63 + 5, device="cpu")
    made = noise(GUARD_SAMPLES - 2, GUARD_SAMPLES + 3)
    for b, image_id in enumerate(ids):
        counter = dict(seed=2**63 + 5, purpose=Purpose.PILOT, image_id=image_id)
        expected = standard_normal(6, start=GUARD_SAMPLES - 2, stop=GUARD_SAMPLES + 3, **counter)
        assert np.array_equal(made[:, b].reshape(5, 6).numpy(), expected)


def test_the_slab_on_sampled_noise():
    """With some hundred draws a step the bias is small, and the search lands near the optimum of the clamped surrogate."""
    images = from_arrays(torch.full((1, 1, 1, 1), 0.5))
    search = SigmaSearch(ClampedRadius(0.02), steps=60, step_size=0.005, draws=400, pilot=1000, average=0.4)
    found = search_sigma(SoftSlab(), images, sigma0=0.38, search=search, progress=False)
    assert found.sigma == pytest.approx([0.4298583], rel=0.06)
    assert (found.after > found.before).all()


def test_one_draw_drifts_beyond_the_optimum():
    """The gradient is biased at one draw a step: the note's 900 steps of 1e-4 pass 0.297 and go on."""
    images = from_arrays(torch.full((1, 1, 1, 1), 0.5))
    search = dataclasses.replace(RELEASED, steps=150, step_size=3e-3)
    found = search_sigma(SoftSlab(), images, sigma0=0.25, search=search, progress=False)
    assert found.sigma[0] > 0.45


def test_batches_and_company_do_not_matter(starter, digits):
    images = digits.take("first:5")
    search = SigmaSearch(steps=4, step_size=0.01, draws=2, pilot=20)
    whole = search_sigma(starter, images, sigma0=0.25, search=search, progress=False)
    parts = search_sigma(starter, images, sigma0=0.25, search=search, batch=2, progress=False)
    alone = search_sigma(starter, images.take("range:3:4"), sigma0=0.25, search=search, progress=False)
    assert parts.sigma == pytest.approx(whole.sigma, rel=1e-5) and parts.trace.shape == (5, 5)
    assert alone.sigma == pytest.approx(whole.sigma[3:4], rel=1e-5)
    assert (whole.sigma != 0.25).any() and (whole.after >= whole.before).all()
    other = search_sigma(starter, images, sigma0=0.25, search=search, seed=1, progress=False)
    assert (other.trace[1] != whole.trace[1]).any()


def test_the_network_is_asked_in_eval_mode_and_left_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    images = from_arrays(torch.rand(3, 1, 8, 8))
    search_sigma(network, images, sigma0=[0.1, 0.2, 0.3], search=SigmaSearch(steps=3), progress=False)
    assert network.training and all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma0", [0.0, -0.25, math.nan, [0.25, 0.0]])
def test_sigma0_must_be_above_0(sigma0, digits, starter):
    with pytest.raises(ValueError, match="above 0"):
        search_sigma(starter, digits.take("first:2"), sigma0=sigma0, progress=False)
    with pytest.raises(ValueError, match="above 0"):
        ascend(slab, torch.atleast_1d(torch.tensor(sigma0, dtype=torch.float64)), SigmaSearch())


def test_images_outside_0_1_are_refused(starter):
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]|NaN"):
            search_sigma(starter, from_arrays(torch.full((1, 1, 8, 8), bad)), sigma0=0.25, progress=False)


def test_a_black_box_is_refused(digits, starter):
    def black_box(images):
        with torch.no_grad():
            return starter(images)

    with pytest.raises(ValueError, match="passes no gradient"):
        search_sigma(black_box, digits.take("first:1"), sigma0=0.25, search=SigmaSearch(steps=1), progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"draws": 0}, "draws"),
        ({"pilot": 0}, "pilot"),
        ({"step_size": 0.0}, "step_size"),
        ({"average": 1.5}, "average"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SigmaSearch(**settings)
    with pytest.raises(ValueError, match="clamp must lie in"):
        ClampedRadius(0.5)
    assert GUARD < 0
