"""Fine-tuning a diffusion model through a frozen classifier."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from smoothbook.denoise import (
    Calibration,
    DenoisedClassifier,
    DiffusionDenoiser,
    Identity,
    calibrate,
    denoise_at,
    timestep_for,
)
from smoothbook.denoise.calibrate import anti_consistency, brier_loss, denoising_loss
from smoothbook.training import FitSettings
from smoothkit import data, models
from smoothkit.models import fingerprint

LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


class Answer(nn.Module):
    """Predicts a share of x_t as noise, more at later timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, timesteps):
        return self.share * x * (timesteps.reshape(-1, 1, 1, 1) / 1000).sqrt()


def test_terms_are_their_formulas():
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 2
    labels = torch.tensor([0, 1, 2, 3, 0])
    p = logits.softmax(-1)
    brier = sum(((p[i, b] - torch.eye(4)[labels[b]]) ** 2).sum() for i in range(3) for b in range(5)) / 15
    torch.testing.assert_close(brier_loss(logits, labels), brier)
    total = 0.0
    for b in range(5):
        if int(p[:, b].mean(0).argmax()) != labels[b]:
            total += float(p[0, b] @ p[1, b] + p[0, b] @ p[2, b] + p[1, b] @ p[2, b]) / 3
    assert total > 0 and float(anti_consistency(logits, labels)) == pytest.approx(total / 5, rel=1e-5)
    right = p.mean(0).argmax(-1)
    assert float(anti_consistency(logits, right)) == 0


def test_each_image_is_denoised_at_its_own_level():
    denoiser = DiffusionDenoiser(Answer(), LINEAR, sigma=0.25)
    images = torch.rand(3, 1, 4, 4)
    sigmas = torch.tensor([0.12, 0.25, 1.0])
    with torch.no_grad():
        together = denoise_at(denoiser, images, sigmas)
        alone = torch.cat([denoiser.at(float(s))(x[None]) for s, x in zip((0.12, 0.25, 1.0), images, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"reaches sigma 78\.7"):
        denoise_at(denoiser, images, torch.full((3,), 100.0))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_denoising_loss_vanishes_for_a_model_that_knows(prediction):
    torch.manual_seed(0)
    images = torch.full((4, 1, 4, 4), 0.75)  # all pixels known: z = 1/2

    class Knows(nn.Module):
        def forward(self, x, t):
            alpha_bar = torch.tensor(LINEAR)[t].reshape(-1, 1, 1, 1).to(x)
            noise = (x - alpha_bar.sqrt() * 0.5) / (1 - alpha_bar).sqrt()
            z = torch.full_like(x, 0.5)
            v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z
            return {"epsilon": noise, "sample": z, "v_prediction": v}[prediction]

    denoiser = DiffusionDenoiser(Knows(), LINEAR, sigma=0.25, prediction=prediction)
    assert float(denoising_loss(denoiser, images)) < 1e-8


def test_calibration_moves_the_diffusion_model_and_nothing_else():
    images = data.load("digits", split="train").take("first:128")
    classifier = models.load("starter:digits-vit-clean")
    denoiser = DiffusionDenoiser(Answer().requires_grad_(False), LINEAR, sigma=0.25)
    before = fingerprint(classifier)
    quick = FitSettings(epochs=4, batch=64, lr=0.05, validation=None, progress=False)
    loss = Calibration(anti=0.5, denoising=0.1)
    done = calibrate(denoiser, classifier, images, quick, sigmas=(0.25, 0.5), loss=loss)
    assert fingerprint(classifier) == before and done.model is denoiser and denoiser.clamp == "hard"
    assert done.rows[-1]["loss"] < done.rows[0]["loss"] and float(denoiser.unet.share) != 0.5
    assert not denoiser.unet.share.requires_grad  # as it was found
    assert denoiser.at(0.5).unet is denoiser.unet


def test_only_what_wants_a_gradient_is_trained():
    """As a model with LoRA put in by peft, whose own weights are frozen."""
    images = data.load("digits", split="train").take("first:64")
    pair = nn.ModuleDict({"frozen": Answer().requires_grad_(False), "adapter": Answer()})
    pair.forward = lambda x, t: pair["frozen"](x, t) + pair["adapter"](x, t)
    denoiser = DiffusionDenoiser(pair, LINEAR, sigma=0.25)
    quick = FitSettings(epochs=1, batch=32, lr=5e-5, validation=None, progress=False)
    calibrate(denoiser, models.load("starter:digits-vit-clean"), images, quick, sigmas=(0.25,))
    assert pair["frozen"].share == 0.5 and pair["adapter"].share != 0.5
    assert not pair["frozen"].share.requires_grad and pair["adapter"].share.requires_grad


def test_images_of_odd_size_are_padded():
    from test_diffusion import tiny

    denoiser = DiffusionDenoiser(tiny()[0], LINEAR, sigma=0.25)
    images = torch.rand(2, 1, 7, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            denoise_at(denoiser, images, torch.full((2,), 0.25)), denoiser(images), atol=1e-5, rtol=0
        )
        assert denoising_loss(denoiser, images).isfinite()


def test_gradients_pass_a_clamp_that_saturates():
    classifier = models.load("starter:digits-vit-clean").requires_grad_(False)
    images = torch.rand(2, 1, 8, 8)
    noise = torch.randn(2, 2, 1, 8, 8)
    sigma = torch.full((2,), timestep_for(LINEAR, 1.0).sigma)
    for clamp in ("hard", "straight-through"):
        base = DenoisedClassifier(DiffusionDenoiser(Answer(), LINEAR, sigma=1.0, clamp=clamp), classifier)
        with torch.no_grad():
            base.denoiser.unet.share.fill_(-1e9)  # far outside: every pixel is clamped
        loss = Calibration(denoising=0.0)(base, images, torch.tensor([0, 1]), noise=noise, sigma=sigma).loss
        loss.backward()
        assert math.isfinite(loss.item()) and (base.denoiser.unet.share.grad.item() == 0) == (clamp == "hard")


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="brier must be at least 0, got -1"):
        Calibration(brier=-1)
    with pytest.raises(ValueError, match="copies must be at least 2"):
        Calibration(copies=1)
    with pytest.raises(ValueError, match="denoiser must be a DiffusionDenoiser, got Identity"):
        calibrate(Identity(), nn.Identity(), data.load("digits", split="train"), sigmas=(0.25,))
