"""What a certificate says of noise on a grid: how long a radius is proved, where, and of which images."""

import math

import numpy as np
import pytest
import torch

from smoothkit import Smoothed, certificates, data
from smoothkit.certify.bounds import OUTWARD, radius, radius_for_all, sigma_of_proof
from smoothkit.types import Certificate, NoiseForm


class Bright(torch.nn.Module):
    """Class 1 for images whose mean is above one half: a half-space, whose radius is known."""

    def forward(self, images):
        above = images.flatten(1).double().mean(1) - 0.5
        return torch.stack([-above, above], 1).float()


def on_grid(value: int, grid: int = 255) -> torch.Tensor:
    return torch.full((1, 1, 4, 4), value, dtype=torch.float32) / grid


@pytest.mark.parametrize("s", [1, 64, 255, 256, 510, 2_040, 16_384])
def test_the_factor_covers_what_parity_separates(s):
    """sqrt(1 + 4 E eps^2 s^2), with the mean of the squared share of even steps taken from the spacing of float32."""
    z = np.abs(np.random.default_rng(0).standard_normal(200_000)) * s
    exponents = np.floor(np.log2(np.maximum(z, 2.0**-60)))
    mean_square = (4.0 ** (exponents - 23)).mean()
    factor = s / 255 / float(sigma_of_proof(s / 255, NoiseForm(255)))
    assert math.sqrt(1 + 4 * mean_square * s**2) <= factor * (1 + 1e-3 * (factor - 1)) and factor >= 1


def test_other_noise_needs_no_factor():
    assert sigma_of_proof(0.25, NoiseForm(None)) == 0.25 and sigma_of_proof(9.0, NoiseForm(65_535, exact=True)) == 9.0
    both = sigma_of_proof(np.array([0.25, 1.0]), NoiseForm(256))
    assert (both < [0.25, 1.0]).all() and both[1] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.slow
def test_too_fine_a_grid_for_rounded_noise_is_refused_and_drawn_exactly_by_default():
    images = data.from_arrays(on_grid(3_000, 4_095), grid=4_095)
    with pytest.raises(ValueError, match=r"'grid:4095' at sigma=1 has 4,095 steps a sigma.*exact-grid:4095"):
        Smoothed(Bright(), 1.0).sample(images, n=100, noise="grid", progress=False)
    assert Smoothed(Bright(), 1.0).sample(images, n=100, progress=False).identity.noise == "exact-grid:4095"
    assert Smoothed(Bright(), 0.25).sample(on_grid(200), n=100, progress=False).identity.noise == "grid:255"


def test_certificates_take_the_factor_off():
    record = Smoothed(Bright(), 1.0).sample(on_grid(255), n=1_000, noise="grid", progress=False)
    row = certificates(record).iloc[0]
    whole = float(radius(row["p_a_lower"], 1.0))
    assert 1e-5 * whole < whole - row["radius"] < 1e-4 * whole and row["sigma"] == 1.0


# --- off the grid --------------------------------------------------------------------------------------


def test_the_radius_for_real_perturbations_by_brute_force():
    """|round(t)|, the perturbation that the classifier sees, never exceeds R for |t| below the radius for all."""
    rng = np.random.default_rng(0)
    for values in (1, 3, 16, 192):
        for steps in (0.3, 0.9, 2.0, 7.5, 40.0):
            limit = float(radius_for_all(steps / 255, values, 255)) * 255
            t = rng.standard_normal((4_000, values)) * 10.0 ** rng.uniform(-2, 1, (4_000, 1))
            t = np.concatenate([t, np.sign(t) * 0.5000001])  # the worst there is: just over half a step
            t *= np.minimum(1, limit * rng.uniform(0.9, 1, (len(t), 1)) / np.linalg.norm(t, axis=1, keepdims=True))
            assert np.linalg.norm(np.rint(t), axis=1).max() <= steps * (1 + 1e-12)
    assert radius_for_all(0.5, 3_072, 255) == pytest.approx(max(0.25, 0.5 - math.sqrt(3_072) / 510), rel=10 * OUTWARD)
    assert (radius_for_all(np.array([0.0, 1e-6]), 64, 255) >= 0).all()


def test_an_image_off_the_declared_grid_is_refused_everywhere():
    """Declared to lie on 1/255, it was certified where a step of 1.5e-4 turned it."""
    off = on_grid(140) + 0.4 / 255
    smoothed = Smoothed(Bright(), 0.25)
    for ask in (smoothed.sample, smoothed.certify, smoothed.predict):
        with pytest.raises(ValueError, match=r"0.400 steps off the 1/255 grid"):
            ask(off, n=100, noise="grid:255")
    with pytest.raises(ValueError, match="values lie off it by up to"):
        data.from_arrays(off, grid=255)


def test_predict_and_certify_speak_of_one_classifier():
    """Certified as a data set on 1/255 and asked as a tensor of the same pixels, it was two classifiers."""
    smoothed = Smoothed(Bright(), 0.25)
    images = data.from_arrays(on_grid(200), grid=255)
    (certificate,) = smoothed.certify(images, n=200, progress=False)
    assert str(smoothed.noise) == certificate.noise == "grid:255"
    smoothed.predict(images.batch(), n=100)
    assert str(smoothed.noise) == "grid:255"
    with pytest.raises(ValueError, match="off the 1/255 grid"):
        smoothed.predict(on_grid(200) + 0.4 / 255, n=100)


@pytest.mark.parametrize(("grid", "form"), [(255, "grid:255"), (256, "grid:256"), (254, "float")])
def test_a_tensor_gets_the_grid_it_lies_on(grid, form):
    pixels = torch.arange(17, 33).reshape(1, 1, 4, 4) / grid
    (certificate,) = Smoothed(Bright(), 0.25).certify(pixels, n=100, progress=False)
    assert certificate.noise == form
    assert ("float noise, whose rounding can show the image" in certificate.sentence()) == (form == "float")


# --- the sentence ----------------------------------------------------------------------------------------


def claim(**changed) -> Certificate:
    known = dict(
        predicted=1, radius=0.61999, sigma=0.25, n0=100, n=1_000, alpha=0.001, p_a_lower=0.99, n_a=999, noise="grid:255",
        class_name="one", radius_for_all=0.31999,
    )  # fmt: skip
    return Certificate(**{**known, **changed})


def test_the_sentence_says_where_the_radius_holds_and_rounds_down():
    assert "below 0.619 on the 1/255 grid, or 0.319 off it, moves this prediction: one" in claim().sentence()
    assert "below 0.619 moves this prediction" in claim(noise="float").sentence()
    assert "seed 7, fixed beforehand" in claim(seed=7).sentence() and "seed" not in claim().sentence()


@pytest.mark.parametrize("alpha", [0.5, 0.001, 1e-9, 1e-12, 1e-17, 1e-99])
def test_it_is_never_certain(alpha):
    for certificate in (claim(alpha=alpha), claim(alpha=alpha, predicted=-1, radius=0.0)):
        assert "100% confidence" not in certificate.sentence() and "confidence" in certificate.sentence()


def test_certify_draws_a_fresh_seed_unless_one_is_fixed_beforehand(tmp_path):
    smoothed, image = Smoothed(Bright(), 0.25), on_grid(140)
    counts = {smoothed.certify(image, n=1_000, progress=False)[0].n_a for _ in range(6)}
    assert len(counts) > 1
    fixed = [smoothed.certify(image, n=1_000, seed=4, progress=False)[0] for _ in range(2)]
    assert fixed[0].n_a == fixed[1].n_a and fixed[0].seed == 4
    kept = smoothed.certify(image, n=1_000, out=tmp_path / "record", progress=False, noise="grid:255")[0]
    assert kept.seed == 0 and "seed 0, fixed beforehand" in kept.sentence()


def test_equal_images_with_two_labels_are_refused():
    with pytest.raises(ValueError, match="images 0 and 1 are equal and have the labels 0 and 1"):
        data.from_arrays(on_grid(140).expand(3, 1, 4, 4), np.array([0, 1, 1]))
    assert len(data.from_arrays(on_grid(140).expand(2, 1, 4, 4), np.array([1, 1]))) == 2
