"""Losses against the worked numbers of papers/foundations.md, and their gradients against finite differences."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from smoothbook.training.attacks import DDN, PGD
from smoothbook.training.losses import (
    MACER,
    Consistency,
    Gaussian,
    NoiseLevel,
    SmoothAdv,
    Stability,
    consistency_terms,
    macer_hinge,
    stability_distance,
)
from smoothkit import data


@pytest.fixture(scope="module")
def batch():
    images = data.load("digits", split="train", subset="first:6")
    return images.batch(), torch.from_numpy(images.labels)


def noise_for(images, copies, sigma=0.25):
    return sigma * torch.randn(copies, *images.shape, generator=torch.Generator().manual_seed(0), dtype=images.dtype)


def logits_of(*probabilities):
    """Logits [m, 1, K] whose softmax is given."""
    return torch.tensor(probabilities, dtype=torch.float64).log()[:, None]


# --- worked numbers --------------------------------------------------------------------------------


def test_macer_worked_number():
    """q = (0.9, 0.05, 0.05), sigma 0.25, gamma 8: gap 2.9264051925, hinge 0.6341993509."""
    hinge = macer_hinge(logits_of([0.9, 0.05, 0.05]), torch.tensor([0]), torch.tensor([0.25]), gamma=8, beta=1)
    assert float(hinge) == pytest.approx(0.6341993509, abs=1e-9)


def test_macer_leaves_out_wrong_images_and_those_beyond_the_hinge():
    logits = torch.tensor([[[1.0, 0], [1, 0], [900, 0], [0.5, 0]]], requires_grad=True)
    labels, sigma = torch.tensor([0, 1, 0, 0]), torch.tensor([0.25, 0.25, 0.25, 0.0])
    hinge = macer_hinge(logits, labels, sigma, gamma=2.5, beta=1)
    assert hinge[0] > 0 and hinge[1:].tolist() == [0, 0, 0]
    hinge.sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[0, 0] != 0).all() and not logits.grad[0, 1:].any()


def test_macer_without_any_kept_image_still_has_a_gradient():
    logits = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    hinge = macer_hinge(logits, torch.tensor([0]), torch.tensor([0.5]), gamma=8, beta=16)
    hinge.sum().backward()
    assert not hinge.any() and not logits.grad.any()


def test_macer_divides_by_the_batch_and_defers(starter, batch):
    images, labels = batch
    sigma, noise = torch.full((6,), 0.25), noise_for(images, 4)
    loss = MACER(lambda_=3, copies=4, defer_epochs=2)
    with torch.no_grad():
        early = loss(starter, images, labels, noise=noise, sigma=sigma, epoch=1)
        late = loss(starter, images, labels, noise=noise, sigma=sigma, epoch=2)
    hinge = macer_hinge(late.logits, labels, sigma, gamma=8, beta=16)
    assert float(late.loss - early.loss) == pytest.approx(3 * float(hinge.sum()) / 6, rel=1e-5)


@pytest.mark.parametrize(
    "logits, divergence, entropy, total",
    [
        ([[2.0, 0, -1], [1, 0.5, 0]], 0.0756631103, 0.8410979523, 1.1771800795),
        ([[1.0, 0], [0, 1]], 0.1201145070, 0.6931471806, 1.5477186599),
    ],
)
def test_consistency_worked_numbers(logits, divergence, entropy, total):
    """The early, buggy entropy of softmax(p) would give 1.0663643558 in the first row."""
    kl, h = consistency_terms(torch.tensor(logits, dtype=torch.float64)[:, None])
    assert float(kl) == pytest.approx(divergence, abs=1e-9)
    assert float(h) == pytest.approx(entropy, abs=1e-9)
    assert float(10 * kl + 0.5 * h) == pytest.approx(total, abs=1e-8)


def test_stability_distance_by_hand():
    clean, noisy = logits_of([0.8, 0.2])[0], logits_of([0.5, 0.5], [0.4, 0.6])
    kl = [0.8 * math.log(0.8 / p) + 0.2 * math.log(0.2 / (1 - p)) for p in (0.5, 0.4)]
    own = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert float(stability_distance(clean, noisy)) == pytest.approx(sum(kl) / 2, abs=1e-12)
    assert float(stability_distance(clean, noisy, "cross-entropy")) == pytest.approx(sum(kl) / 2 + own, abs=1e-12)


# --- gradients -------------------------------------------------------------------------------------


def check_gradient(function, logits):
    """Autograd against central differences along random directions, in float64."""
    point = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(point), point)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction, h = torch.randn(logits.shape, generator=generator, dtype=torch.float64), 1e-6
        slope = float(function(logits + h * direction) - function(logits - h * direction)) / (2 * h)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_gradients_of_the_formulas():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    labels = logits.softmax(-1).mean(0).argmax(1)
    sigma = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    for beta in (1, 4, 16):
        check_gradient(lambda z, beta=beta: macer_hinge(z, labels, sigma, gamma=8, beta=beta).sum(), logits)
    check_gradient(lambda z: sum(t.sum() for t in consistency_terms(z)), logits)
    check_gradient(lambda z: stability_distance(z[0], z[1:]).sum(), logits)


@pytest.mark.parametrize(
    "loss",
    [
        Gaussian(copies=2),
        SmoothAdv(PGD(0.0), copies=2),
        MACER(copies=4),
        Consistency(),
        Stability(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_gradients_in_the_weights(starter, batch, loss):
    """Through a whole network, noise held fixed; SmoothAdv at radius 0, where its attack does not move with the weights."""
    images, labels = batch[0].double(), batch[1]
    network, noise = copy.deepcopy(starter).double().eval(), noise_for(batch[0].double(), loss.copies)
    weight, sigma = network.network.blocks[1].mlp.fc1.weight, torch.full((6,), 0.25)
    value = lambda: loss(network, images, labels, noise=noise, sigma=sigma).loss  # noqa: E731
    (gradient,) = torch.autograd.grad(value(), weight)
    direction, h = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1e-6
    with torch.no_grad():
        weight += h * direction
        above = float(value())
        weight -= 2 * h * direction
        below = float(value())
    assert float((gradient * direction).sum()) == pytest.approx((above - below) / (2 * h), rel=1e-4)


# --- what each does --------------------------------------------------------------------------------


def test_gaussian_is_cross_entropy_on_the_copies(starter, batch):
    images, labels = batch
    noise = noise_for(images, 2)
    with torch.no_grad():
        terms = Gaussian(copies=2)(starter, images, labels, noise=noise, sigma=torch.full((6,), 0.25))
        by_hand = (
            F.cross_entropy(starter(images + noise[0]), labels) + F.cross_entropy(starter(images + noise[1]), labels)
        ) / 2
    assert float(terms.loss) == pytest.approx(float(by_hand), rel=1e-5) and terms.logits.shape == (2, 6, 10)


def test_smoothadv_attacks_with_the_noise_it_trains_on(starter, batch):
    images, labels = batch
    noise, sigma = noise_for(images, 2), torch.full((6,), 0.25)
    loss = SmoothAdv(PGD(0.5, steps=3), copies=2, warmup_epochs=10)
    starter.train()
    try:
        strong = loss(starter, images, labels, noise=noise, sigma=sigma, epoch=9)
        weak = loss(starter, images, labels, noise=noise, sigma=sigma, epoch=0)
        plain = Gaussian(copies=2)(starter, images, labels, noise=noise, sigma=sigma)
        assert starter.training
    finally:
        starter.eval()
    assert strong.loss > weak.loss > plain.loss
    attacked = loss.attack(starter, images, labels, noise)
    same = F.cross_entropy(starter((attacked + noise).flatten(0, 1)), labels.repeat(2))
    assert strong.loss.item() == pytest.approx(same.item(), rel=1e-4)


def test_consistency_with_an_attack(starter, batch):
    images, labels = batch
    noise, sigma = noise_for(images, 2), torch.full((6,), 0.25)
    plain, attacked = (
        Consistency(attack=a)(starter, images, labels, noise=noise, sigma=sigma).loss for a in (None, DDN(0.5, steps=3))
    )
    assert attacked > plain


def test_noise_level_targets():
    loss = NoiseLevel((0.0, 0.25, 0.5))
    assert loss.targets(torch.tensor([0.0, 0.3, 0.9]), torch.zeros(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Gaussian(copies=0), "copies must be at least 1"),
        (lambda: Consistency(copies=1), "at least 2"),
        (lambda: MACER(gamma=0), "gamma must be above 0"),
        (lambda: MACER(lambda_=-1), "lambda_ must be at least 0"),
        (lambda: Stability(distance="l2"), "kl or cross-entropy"),
        (lambda: NoiseLevel(()), "sigmas must not be empty"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
