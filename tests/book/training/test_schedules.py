"""Sigma schedules, noise and augmentation."""

import pytest
import torch

from smoothbook.training.schedules import (
    Curriculum,
    Fixed,
    Grid,
    Mixture,
    Uniform,
    crop_and_flip,
    draw_noise,
    generator_for,
    parse,
)


def draw(schedule, n=4000, progress=1.0, seed=0):
    return schedule(n, progress=progress, generator=torch.Generator().manual_seed(seed))


def test_fixed_and_uniform():
    assert set(draw(Fixed(0.25)).tolist()) == {0.25}
    sigma = draw(Uniform(1.0, low=0.5))
    assert float(sigma.min()) >= 0.5 and float(sigma.max()) <= 1
    assert float(sigma.mean()) == pytest.approx(0.75, abs=5 * 0.5 / (12 * 4000) ** 0.5)  # five standard errors


def test_grid_is_balanced_in_every_batch():
    sigmas = (0.0, 0.25, 0.5, 1.0)
    for n in (4, 10, 127):
        counts = [(draw(Grid(sigmas), n, seed=n) == s).sum() for s in sigmas]
        assert max(counts) - min(counts) <= 1 and sum(counts) == n
    free = draw(Grid(sigmas, balanced=False))
    assert set(free.tolist()) == set(sigmas)
    assert not torch.equal(draw(Grid(sigmas), 64, seed=1), draw(Grid(sigmas), 64, seed=2))


def test_mixture_has_its_clean_share():
    sigma = draw(Mixture(0.25, Uniform(1.0, low=0.5)))
    assert float((sigma == 0).float().mean()) == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 4000) ** 0.5)
    assert float(sigma[sigma > 0].min()) >= 0.5


def test_curriculum_rises_and_stays():
    schedule = Curriculum(Fixed(1.0), start=0.25, over=0.5)
    assert [float(draw(schedule, 1, p)) for p in (0, 0.25, 0.5, 1)] == [0.25, 0.625, 1, 1]


@pytest.mark.parametrize(
    "line, schedule",
    [
        (0.25, Fixed(0.25)),
        ("clean", Fixed(0)),
        ("fixed:0.5", Fixed(0.5)),
        ("grid:0,0.25,0.5", Grid((0, 0.25, 0.5))),
        ("uniform:1", Uniform(1)),
        ("uniform:0.1:1", Uniform(1, low=0.1)),
        ("mix:0.25:1", Mixture(0.25, Uniform(1))),
        ("mix:0.5:grid:0.25,0.5", Mixture(0.5, Grid((0.25, 0.5)))),
        ("curriculum:fixed:0.5", Curriculum(Fixed(0.5))),
    ],
)
def test_lines(line, schedule):
    assert parse(line) == schedule and parse(schedule) is schedule


@pytest.mark.parametrize("line", [
    "gird:0,1", "fixed:", "uniform:", "uniform:1:0", "uniform::1", "uniform:0:1:2", "mix:2:1", "fixed:-1", "curriculum:",
    None, True,
])  # fmt: skip
def test_bad_lines(line):
    with pytest.raises(ValueError, match="use clean, fixed"):
        parse(line)


def test_noise_has_each_images_own_sigma_and_keeps_the_grid():
    images = torch.zeros(3, 1, 40, 40)
    sigma = torch.tensor([0.0, 0.25, 1.0])
    noise = draw_noise(images, sigma, copies=4, generator=torch.Generator().manual_seed(0))
    assert noise.shape == (4, 3, 1, 40, 40) and not noise[:, 0].any()
    for i in (1, 2):  # the standard deviation of 6,400 draws is off by 0.9% (one standard error)
        assert float(noise[:, i].std()) == pytest.approx(float(sigma[i]), rel=0.05)
    on_grid = draw_noise(images, sigma, grid=256, generator=torch.Generator().manual_seed(0)) * 256
    assert torch.equal(on_grid, on_grid.round())
    with pytest.raises(ValueError, match="copies"):
        draw_noise(images, sigma, copies=0, generator=torch.Generator())


def test_generators_are_a_function_of_their_key():
    def first(*key):
        return float(torch.rand((), generator=generator_for(*key)))

    assert first(1, "noise", 2) == first(1, "noise", 2)
    assert len({first(1, "noise", 2), first(2, "noise", 2), first(1, "order", 2), first(1, "noise", 3)}) == 4


def test_crop_and_flip_moves_whole_images():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4) + 1
    assert torch.equal(crop_and_flip(images, torch.Generator(), pad=0, flip=False), images)
    moved = crop_and_flip(images, torch.Generator().manual_seed(3), pad=1)
    assert moved.shape == images.shape and not torch.equal(moved, images)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    for image, wide in zip(moved, padded, strict=True):
        crops = [wide[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
        assert any(torch.equal(image, c) or torch.equal(image, c.flip(-1)) for c in crops)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Fixed(-0.1), "sigma must be at least 0"),
        (lambda: Grid(()), "must not be empty"),
        (lambda: Curriculum(0.5, over=0), "over must lie in"),
        (lambda: Curriculum(0.5, start=2), "start must lie in"),
        (lambda: Mixture(1.5, 0.5), "clean_share must lie in"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
