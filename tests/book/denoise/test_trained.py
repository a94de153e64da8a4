"""Denoisers trained in front of a frozen classifier."""

import dataclasses

import pytest
import torch
from torch import nn

from smoothbook.denoise import (
    DenoisedClassifier,
    Denoiser,
    Denoising,
    DnCNN,
    Identity,
    fit_denoiser,
    load_denoiser,
    psnr,
)
from smoothbook.training import FitSettings
from smoothkit import Smoothed, data, models
from smoothkit.models import fingerprint

SIGMA = 0.5
QUICK = FitSettings(epochs=2, batch=64, lr=3e-3, validation=None, progress=False)


@pytest.fixture(scope="module")
def training():
    return data.load("digits", split="train").take("first:256")


@pytest.fixture(scope="module")
def clean():
    return models.load("starter:digits-vit-clean")


def small(**settings) -> DnCNN:
    return DnCNN(1, **{"sigma": SIGMA, "depth": 4, "width": 8, **settings})


def noisy_batch(images, sigma=SIGMA):
    pixels, labels = images.batch(), torch.from_numpy(images.labels)
    noise = sigma * torch.randn(1, *pixels.shape, generator=torch.Generator().manual_seed(0))
    return pixels, labels, noise


# --- the network -----------------------------------------------------------------------------------------


def test_an_untrained_denoiser_is_the_identity():
    images = torch.randn(3, 1, 8, 8)
    for network in (small(), DnCNN(1, sigma=0.25)):
        assert torch.equal(network.eval()(images), images)
    first, again, other = small(), small(), small(seed=1)
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    kernel = first.net[2].weight.flatten(1)
    torch.testing.assert_close(kernel @ kernel.T, torch.eye(8), atol=1e-5, rtol=0)  # orthogonal
    with pytest.raises(ValueError, match="depth must be at least 2"):
        small(depth=1)


def test_dncnn_is_the_published_network():
    """Depth 17, width 64: 3x3 convolutions, a bias on the first only, BatchNorm on the fifteen in between."""
    network = DnCNN(3, sigma=0.25)
    convolutions = [m for m in network.net if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.net if isinstance(m, nn.BatchNorm2d)]
    assert len(convolutions) == 17 and [c.bias is not None for c in convolutions] == [True] + [False] * 16
    assert len(norms) == 15 and (norms[0].eps, norms[0].momentum) == (1e-4, 0.95)
    parameters = 3 * 64 * 9 + 64 + 15 * 64 * 64 * 9 + 15 * 2 * 64 + 64 * 3 * 9
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_batch_norm_does_not_mix_the_votes(clean):
    """In eval mode, which the engine sets, an image's answer does not depend on its batch."""
    network = small()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    base = DenoisedClassifier(network.train(), clean)
    images = data.load("digits").take("first:2")
    many = Smoothed(base, SIGMA).sample(images, n=100, n0=10, progress=False).rows()
    one = Smoothed(base, SIGMA).sample(images.take("first:1"), n=100, n0=10, progress=False).rows()
    assert base.training and many["counts"].tolist()[:2] == one["counts"].tolist()


def test_saved_and_loaded(tmp_path):
    network = small()
    nn.init.normal_(network.net[-1].weight)
    images = torch.randn(2, 1, 8, 8)
    again = load_denoiser(network.eval().save(tmp_path / "d"))
    assert torch.equal(again(images), network(images)) and (again.sigma, again.name) == (SIGMA, "dncnn@0.5")
    (tmp_path / "d" / "denoiser.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks denoiser\.safetensors"):
        load_denoiser(tmp_path / "d")


# --- the objectives --------------------------------------------------------------------------------------


class Brighter(Denoiser):
    """Adds a trained constant."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.by = nn.Parameter(torch.tensor(0.1))

    def estimate(self, rows):
        return rows + self.by


def test_objectives_are_their_formulas(training, clean):
    pixels, labels, noise = noisy_batch(training.take("first:8"))
    noise = torch.cat([noise, -noise])
    base = DenoisedClassifier(Brighter(sigma=SIGMA), clean)
    denoised = pixels + noise + 0.1
    logits = torch.stack([clean(d) for d in denoised])
    said = clean(pixels).argmax(1)
    labels[0] = (said[0] + 1) % 10  # a label that the classifier does not give
    cross_entropy = nn.functional.cross_entropy
    expected = {
        "mse": (denoised - pixels).square().mean(),
        "stability": (cross_entropy(logits[0], said) + cross_entropy(logits[1], said)) / 2,
        "classification": (cross_entropy(logits[0], labels) + cross_entropy(logits[1], labels)) / 2,
    }
    for objective, value in expected.items():
        terms = Denoising(objective)(base, pixels, labels, noise=noise, sigma=None)
        torch.testing.assert_close(terms.loss, value, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(terms.logits, logits, atol=1e-4, rtol=1e-4)
        gradient = torch.autograd.grad(terms.loss, base.denoiser.by)[0]
        assert float(gradient) != 0
        if objective != "classification":  # labels deleted
            again = Denoising(objective)(base, pixels, None, noise=noise, sigma=None)
            assert torch.equal(again.loss, terms.loss)


def test_surrogates_stand_in_for_the_classifier(training, clean):
    pixels, _, noise = noisy_batch(training.take("first:4"))
    asked = []

    class Surrogate(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, images):
            asked.append(self.number)
            return images.flatten(1)[:, :10] * (self.number + 1)

    class BlackBox(nn.Module):
        def forward(self, images):
            raise AssertionError("a black box was asked")

    base = DenoisedClassifier(Brighter(sigma=SIGMA), BlackBox())
    loss = Denoising("stability", (Surrogate(0), Surrogate(1), Surrogate(2)))
    drawn = []
    for seed in range(12):
        torch.manual_seed(seed)
        loss(base, pixels, None, noise=noise, sigma=None).loss.backward()
        assert asked[-1] == asked[-2]  # pseudo-labels come from the surrogate of that batch
        drawn.append(asked[-1])
    assert set(drawn) == {0, 1, 2}


def test_arguments_are_checked(training, clean):
    for call, message in [
        (lambda: Denoising("psnr"), "objective must be one of mse, stability, classification, got 'psnr'"),
        (lambda: Denoising(copies=0), "copies must be at least 1"),
        (lambda: fit_denoiser(small(), training, QUICK, objective="stability"), "needs classifier= or surrogates="),
        (lambda: fit_denoiser(Identity(), training), "identity has no sigma"),
        (lambda: fit_denoiser(small(), training, FitSettings(schedule=0.1)), "schedule is set by the objective"),
        (lambda: fit_denoiser(small(), training, objective="psnr"), "stability-after-mse, got 'psnr'"),
        (lambda: fit_denoiser(small(), training, mse={}), "mse= goes with the objective 'stability-after-mse'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# --- training --------------------------------------------------------------------------------------------


def test_mse_needs_neither_labels_nor_a_classifier(training):
    unlabelled = dataclasses.replace(training, labels=training.labels * 0 - 1)
    done = fit_denoiser(small(), unlabelled, dataclasses.replace(QUICK, epochs=6))
    assert done.rows[-1]["loss"] < 0.6 * SIGMA**2 and "accuracy" not in done.rows[0] and not done.model.training
    pixels, _, noise = noisy_batch(data.load("digits", split="validation").take("first:64"))
    with torch.no_grad():
        assert psnr(done.model(pixels + noise[0]), pixels).mean() > psnr(pixels + noise[0], pixels).mean() + 2
    both = fit_denoiser(
        small(),
        unlabelled,
        dataclasses.replace(QUICK, epochs=1),
        objective="stability-after-mse",
        surrogates=[nn.Flatten()],
    )
    assert len(both.rows) == 2 and not any("accuracy" in row for row in both.rows)  # there is no label to tell
    with pytest.raises(ValueError, match="'classification' needs labels"):
        fit_denoiser(small(), unlabelled, objective="classification", surrogates=[nn.Identity()])


def test_stability_after_mse_leaves_the_classifier_as_it_was(training, clean, tmp_path):
    before = fingerprint(clean)
    denoiser = small()
    settings, mse = dataclasses.replace(QUICK, out=tmp_path), dict(epochs=3)
    done = fit_denoiser(denoiser, training, settings, objective="stability-after-mse", classifier=clean, mse=mse)
    assert done.model is denoiser and fingerprint(clean) == before and all(p.requires_grad for p in clean.parameters())
    assert [row["objective"] for row in done.rows] == ["mse"] * 3 + ["stability"] * 2
    assert done.rows[-1]["loss"] < done.rows[3]["loss"] and 0 < done.rows[-1]["accuracy"] <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mse", "stability"]
    denoised = DenoisedClassifier(denoiser, clean)
    pixels, labels, noise = noisy_batch(data.load("digits", split="validation"))
    with torch.inference_mode():
        right = [(f(pixels + noise[0]).argmax(1) == labels).float().mean() for f in (denoised.eval(), clean)]
    assert right[0] > right[1]


def test_a_classifier_can_be_tuned_on_denoised_images(training, clean):
    """The other way round: the denoiser stays, the classifier learns; `training.fit` as it is."""
    import copy

    from smoothbook.training import fit

    denoiser = small().requires_grad_(False)
    base = DenoisedClassifier(denoiser, copy.deepcopy(clean))
    before = fingerprint(denoiser)
    done = fit(base, training, dataclasses.replace(QUICK, schedule=SIGMA, lr=1e-3))
    assert done.rows[-1]["loss"] < done.rows[0]["loss"] and fingerprint(denoiser) == before
