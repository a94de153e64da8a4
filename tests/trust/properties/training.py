"""Losses, schedules, attacks and both loops."""

import math
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from properties.inputs import (
    Constant,
    Halves,
    eight,
    few,
    float32s,
    holds,
    mostly,
    numbers,
    patches,
    refused,
    shares,
    small,
    texts,
    vit,
)
from smoothbook import adapters, denoise, training
from smoothbook.training import attacks
from smoothbook.training.gradient_free import image_slopes, slopes
from smoothbook.training.schedules import draw_noise
from smoothkit import models

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
        done = training.fit(model, eight(), training.FitSettings(progress=False, **settings))
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
        settings = training.GradientFreeSettings(steps=min(steps, 2), batch=4, spsa=spsa, progress=False)
        done = training.fit_gradient_free(model, eight(), settings)
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
