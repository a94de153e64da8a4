"""SPSA with gradient correction: on a quadratic, and on a coordinator."""

import copy

import pytest
import torch
from torch import nn

from smoothbook import adapters
from smoothbook.training import SPSA, GradientFreeSettings, TrainingDiverged, fit_gradient_free
from smoothbook.training.gradient_free import image_slopes, slopes, spsa_step, statistics_held
from smoothbook.training.schedules import generator_for
from smoothkit import data, models


@pytest.fixture(scope="module")
def base():
    return models.load("starter:digits-vit-clean")


@pytest.fixture(scope="module")
def images():
    return data.load("digits", split="train", subset="first:256")


def coordinator(base, box=None, **settings):
    return adapters.coordinator(
        base if box is None else box, base, image_shape=(1, 8, 8), cube=20, widths=(8,), **settings
    )


SHORT = dict(steps=6, batch=64, spsa=SPSA(repeats=2), schedule=0.25, report_every=3, progress=False)


def learn(model, images, on_report=None, **settings):
    return fit_gradient_free(model, images, GradientFreeSettings(**{**SHORT, **settings}), on_report=on_report)


# --- the estimate ----------------------------------------------------------------------------------


def test_slopes_of_a_linear_function_average_to_its_gradient():
    """E[direction_j / direction_i] = 0 for i != j, so the estimate has no bias; here within five standard errors."""
    gradient = torch.tensor([3.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    generator, n = torch.Generator().manual_seed(0), 4000
    w = torch.zeros(4, dtype=torch.float64)
    estimates = torch.stack([
        slopes(lambda v: float(gradient @ v), w, displacement=0.1, repeats=1, generator=generator)[0] for _ in range(n)
    ])  # fmt: skip
    error = (estimates.mean(0) - gradient).abs()
    assert (error <= 5 * estimates.std(0) / n**0.5 + 1e-9).all()


def test_one_slope_is_exact_in_one_dimension():
    """(f(w + h) - f(w - h)) / 2h has no error on a quadratic, whatever h."""
    generator, w = torch.Generator().manual_seed(0), torch.tensor([2.0], dtype=torch.float64)
    slope, seen = slopes(lambda v: float(v[0] ** 2), w, displacement=0.3, repeats=3, generator=generator)
    assert float(slope) == pytest.approx(4.0, abs=1e-12) and 4 < seen <= 4 + 0.09


def test_directions_keep_away_from_zero():
    asked = []
    slopes(
        lambda v: asked.append(v) or 0.0, torch.zeros(1000), displacement=1.0, repeats=1, generator=torch.Generator()
    )
    above, below = asked
    assert torch.equal(above, -below) and float(above.abs().min()) >= 0.5 and float(above.abs().max()) <= 1
    assert 400 < int((above > 0).sum()) < 600


def test_image_slopes_average_to_each_images_gradient():
    """Two images with losses of their own, quadratic in the pixels; within five standard errors of 2 (x - t)."""
    target = torch.tensor([0.2, 0.7], dtype=torch.float64).reshape(2, 1, 1, 1)
    shown = torch.linspace(0.3, 0.6, 8, dtype=torch.float64).reshape(2, 1, 2, 2)
    generator, n = torch.Generator().manual_seed(0), 4000
    settings = dict(displacement=0.05, repeats=1, generator=generator)
    estimates = torch.stack(
        [image_slopes(lambda x: ((x - target) ** 2).sum((1, 2, 3)), shown, **settings) for _ in range(n)]
    )
    error = (estimates.mean(0) - 2 * (shown - target)).abs()
    assert (error <= 5 * estimates.std(0) / n**0.5 + 1e-9).all()


def test_image_slopes_of_clipped_pixels_are_zero_and_the_box_sees_images():
    shown, asked = torch.tensor([-0.5, 0.5, 1.5, 1.01]).reshape(1, 1, 2, 2), []

    def losses(x):
        asked.append(x)
        return x.sum((1, 2, 3))

    slope = image_slopes(losses, shown, displacement=0.1, repeats=3, generator=torch.Generator().manual_seed(0))
    assert len(asked) == 6 and all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in asked)
    assert slope.flatten()[[0, 2]].tolist() == [0, 0] and bool((slope.flatten()[[1, 3]] != 0).all())


def test_look_ahead_momentum_by_hand():
    """Two steps of m <- beta m + g, w <- w - rate (g + beta m), with g = 1 and then 2."""
    w, m = spsa_step(torch.tensor(0.0), None, torch.tensor(1.0), rate=0.1, beta=0.5)
    assert float(m) == 1 and float(w) == pytest.approx(-0.15)
    w, m = spsa_step(w, m, torch.tensor(2.0), rate=0.1, beta=0.5)
    assert float(m) == 2.5 and float(w) == pytest.approx(-0.15 - 0.1 * (2 + 1.25))


def test_minimises_a_quadratic():
    """f(w) = sum_i d_i (w_i - t_i)^2 in ten dimensions, to under a thousandth of its start."""
    scale, target = torch.linspace(0.5, 2, 10, dtype=torch.float64), torch.linspace(-1, 1, 10, dtype=torch.float64)

    def f(w):
        return float((scale * (w - target) ** 2).sum())

    start = torch.full((10,), 2.0, dtype=torch.float64)

    def minimise(spsa, steps=300):
        w, momentum = start, None
        for i in range(1, steps + 1):
            probes = dict(repeats=spsa.repeats, generator=generator_for(0, "spsa", i))
            slope, _ = slopes(f, w, displacement=spsa.displacement(i), **probes)
            w, momentum = spsa_step(w, momentum, slope, rate=spsa.rate(i), beta=spsa.beta)
        return w

    end = minimise(SPSA(a=0.05, c=0.01, beta=0.5, repeats=2))
    assert f(end) < 1e-3 * f(start)
    assert torch.equal(end, minimise(SPSA(a=0.05, c=0.01, beta=0.5, repeats=2)))
    assert f(minimise(SPSA(a=0.05, beta=0.0))) < 0.1 * f(start)


def test_schedules():
    spsa = SPSA(a=1, c=2, o=1, alpha=0.5, gamma=0.5)
    assert (spsa.rate(3), spsa.displacement(4)) == (0.5, 1.0)


# --- the coordinator -------------------------------------------------------------------------------


def pixel_classifier():
    """Ridge regression from pixels to one-hot labels: a fast box, 90% right on clean digits."""
    known = data.load("digits", split="train")
    x = torch.cat([known.batch().flatten(1), torch.ones(len(known), 1)], dim=1)
    targets = nn.functional.one_hot(torch.from_numpy(known.labels), 10).float()
    weights = torch.linalg.solve(x.T @ x + torch.eye(65), x.T @ targets)
    return lambda images: 10 * (images.flatten(1) @ weights[:-1] + weights[-1])


@pytest.mark.parametrize(
    "spsa, steps", [(SPSA(a=0.02, c=0.01, repeats=4), 90), (SPSA(a=0.02, c=0.05, repeats=1, per="images"), 90)]
)
def test_learns_from_predictions_alone(images, spsa, steps):
    """The box wants images whose upper half is brighter by 0.3, and only says so by its answers."""
    classify, asked = pixel_classifier(), []
    missing = torch.zeros(1, 1, 8, 8)
    missing[:, :, :4] = 0.3

    def remote(x):
        assert not torch.is_grad_enabled() and not x.requires_grad
        asked.append(len(x))
        return classify(x - missing)

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    model = adapters.coordinator(remote, encoder, image_shape=(1, 8, 8), cube=4, widths=(4,), model_id="remote")
    before = copy.deepcopy(model.state_dict())
    done = learn(model, images, steps=steps, spsa=spsa, schedule=0.1, report_every=30)
    assert done.history.loss.iloc[-1] < 0.9 * done.history.loss.iloc[0]
    assert done.history.queries.iloc[-1] == model.queries == sum(asked) == steps * 2 * spsa.repeats * 64
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("network.decoder.") for k in changed)
    assert not model.training


@pytest.mark.parametrize("per", ["weights", "images"])
def test_statistics_move_once_a_step_and_cost_no_query(base, images, per):
    model = coordinator(base)
    learn(model, images, steps=3, spsa=SPSA(repeats=2, per=per))
    norm = next(m for m in model.network.decoder.modules() if isinstance(m, nn.BatchNorm2d))
    assert int(norm.num_batches_tracked) == 3 and norm.momentum == 0.1
    assert model.queries == 3 * 2 * 2 * 64
    model.train()
    with statistics_held(model), torch.no_grad():
        before = norm.running_mean.clone()
        model.network.prompted(images.batch(0, 8))
        assert torch.equal(norm.running_mean, before)
    assert int(norm.num_batches_tracked) == 3


@pytest.mark.parametrize("validation, per", [(None, "weights"), (0.25, "weights"), (None, "images")])
def test_stopped_and_resumed_is_uninterrupted(base, images, tmp_path, validation, per):
    def interrupt(rows):
        raise KeyboardInterrupt

    whole, part, again = (coordinator(base) for _ in range(3))
    settings = {"validation": validation, "spsa": SPSA(repeats=2, per=per)}
    rows = learn(whole, images, **settings).rows
    first = learn(part, images, **settings, out=tmp_path, on_report=interrupt)
    assert first.interrupted and first.steps == 3
    resumed = learn(again, images, **settings, out=tmp_path, resume=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert again.queries == whole.queries and resumed.steps == 6
    for a, b in zip(rows, resumed.rows, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    with pytest.raises(ValueError, match="of another run: batch was 64, now 32"):
        learn(coordinator(base), images, **settings, batch=32, out=tmp_path, resume=True)


def test_a_box_that_raises_loses_nothing(base, images, tmp_path):
    calls = []

    def flaky(x):
        calls.append(1)
        if len(calls) == 18:  # in the fifth step
            raise ConnectionError("no route")
        return base(x)

    model, whole = (coordinator(base, box, model_id="flaky") for box in (flaky, lambda x: base(x)))
    with pytest.raises(adapters.BlackBoxError, match="raised ConnectionError"):
        learn(model, images, out=tmp_path)
    learn(model, images, out=tmp_path, resume=True)
    learn(whole, images)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in whole.state_dict().items())


@pytest.mark.parametrize("per", ["weights", "images"])
def test_a_box_of_nans_stops(base, images, per):
    model = coordinator(base, lambda x: base(x) * float("nan"), model_id="nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingDiverged, match="the loss is nan at step 1, after 64 queries"):
        learn(model, images, spsa=SPSA(per=per))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_bar_shows_queries(base, images, capsys):
    learn(coordinator(base), images, steps=2, progress=True)
    assert "512 queries" in capsys.readouterr().err


def test_bad_settings(base, images):
    for act, message in [
        (lambda: learn(base, images), "must be a Coordinator"),
        (lambda: learn(coordinator(base), images, steps=0), "must be at least 1"),
        (lambda: learn(coordinator(base), data.load("digits")), "a test split, which is certified"),
        (lambda: SPSA(per="pixels"), "per must be weights or images, got 'pixels'"),
        (lambda: SPSA(temperature=0), "temperature must be above 0"),
        (lambda: SPSA(c=0), "a and c must be above 0"),
        (lambda: SPSA(beta=1), "beta must lie in"),
        (lambda: SPSA(alpha=-1), "must be at least 0"),
        (lambda: SPSA(repeats=0), "repeats must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            act()
