"""Attacks on the soft smoothed classifier: a closed form, finite differences, and the ball."""

import copy
import math

import pytest
import torch
from torch import nn

from smoothbook.training.attacks import DDN, PGD, into_ball, log_mean_softmax, noisy_logits, norms, soft_smoothed_loss
from smoothkit import data
from smoothkit.models import evaluating


@pytest.fixture(scope="module")
def batch():
    images = data.load("digits", split="train", subset="first:8")
    return images.batch(), torch.from_numpy(images.labels)


def noise_for(images, copies=3, sigma=0.25, seed=0):
    return sigma * torch.randn(copies, *images.shape, generator=torch.Generator().manual_seed(seed), dtype=images.dtype)


def test_objective_is_the_log_of_the_mean():
    """Worked numbers of papers/foundations.md, section 5: the mean of logs, 0.425, is the wrong objective."""
    logits = torch.tensor([[[2.0, 0, -1]], [[1, 0.5, 0]]], dtype=torch.float64)
    assert -float(log_mean_softmax(logits)[0, 0]) == pytest.approx(0.3928388122, abs=1e-9)
    assert -float(logits.log_softmax(-1).mean(0)[0, 0]) == pytest.approx(0.4250578451, abs=1e-9)


def test_gradient_of_the_objective_against_finite_differences(starter, batch):
    images, labels = batch[0][:2].double(), batch[1][:2]
    network, noise = copy.deepcopy(starter).double(), noise_for(images)
    point = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(soft_smoothed_loss(network, point, labels, noise).sum(), point)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction, h = torch.randn(images.shape, generator=generator, dtype=torch.float64), 1e-5
        with torch.no_grad():
            above = soft_smoothed_loss(network, images + h * direction, labels, noise).sum()
            below = soft_smoothed_loss(network, images - h * direction, labels, noise).sum()
        assert float((gradient * direction).sum()) == pytest.approx(float((above - below) / (2 * h)), rel=1e-5)


@pytest.mark.parametrize("attack", [PGD(0.5, steps=5), DDN(0.5, steps=5), DDN(0.5, steps=5, levels=None)])
def test_attacks_stay_in_the_ball_and_raise_the_loss(starter, batch, attack):
    images, labels = batch
    noise = noise_for(images)
    attacked = attack(starter, images, labels, noise)
    assert float(norms((attacked - images).double()).max()) <= 0.5 + 1e-5
    assert float(attacked.min()) >= 0 and float(attacked.max()) <= 1 and not attacked.requires_grad
    with torch.no_grad():
        before, after = (soft_smoothed_loss(starter, x, labels, noise) for x in (images, attacked))
    assert (after > before).all() and float(after.mean()) > 2 * float(before.mean())


def test_pgd_walks_to_the_wall_of_a_half_space(linear):
    """For a linear classifier the best attack of norm epsilon is against w, whatever the noise."""
    w = torch.tensor([3.0, 4.0]) / 5
    images, labels = torch.full((1, 1, 1, 2), 0.5), torch.tensor([1])
    attacked = PGD(0.2, steps=4)(linear(w, -0.5), images, labels, noise_for(images))
    assert torch.allclose((attacked - images).flatten(), -0.2 * w, atol=1e-6)


def test_ddn_finds_the_nearest_wrong_image(linear):
    """Distance to the plane is w . x + b; DDN ends within a few gamma of it, and inside a larger ball."""
    w = torch.tensor([1.0, 0.0])
    images, labels = torch.tensor([[[[0.6, 0.5]]]]), torch.tensor([1])
    attack = DDN(0.4, steps=40, gamma=0.05, levels=None)
    attacked = attack(linear(w, -0.5), images, labels, torch.zeros(1, *images.shape))
    assert 0.1 <= float(norms(attacked - images)) < 0.115


def test_a_flat_loss_gets_a_random_direction(batch):
    images, labels = batch
    torch.manual_seed(0)
    flat = lambda x: x.flatten(1).sum(1, keepdim=True) * torch.zeros(10)  # noqa: E731
    attacked = PGD(0.3, steps=1)(flat, images, labels, noise_for(images))
    assert attacked.isfinite().all() and (norms(attacked - images) > 0).all()


def test_zero_radius_and_warm_up_override(starter, batch):
    images, labels = batch
    noise = noise_for(images, copies=1)
    for attack in (PGD(0.5, steps=2), DDN(0.5, steps=2)):
        assert torch.equal(attack(starter, images, labels, noise, epsilon=0.0), images)
        assert float(norms(attack(starter, images, labels, noise, epsilon=0.1) - images).max()) <= 0.1 + 1e-6


def test_attack_leaves_modes_statistics_and_gradients_alone(batch):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).train()
    network[1].eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    PGD(0.1, steps=2)(network, *batch, noise_for(batch[0]))
    assert network.training and not network[1].training and network[3].training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    with pytest.raises(ZeroDivisionError), evaluating(network):
        1 / 0  # noqa: B018
    assert network.training


def test_projection_never_leaves_ball_or_box():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, 3, 4, 4, generator=generator)
    y = x + 3 * torch.randn(x.shape, generator=generator)
    z = into_ball(x, y, 0.25)
    assert float(norms((z - x).double()).max()) <= 0.25 + 1e-6 and z.min() >= 0 and z.max() <= 1
    assert torch.equal(into_ball(x, x, 0.25), x)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PGD(-1.0), "epsilon must be at least 0"),
        (lambda: PGD(math.inf), "epsilon"),
        (lambda: PGD(0.5, steps=0), "steps must be at least 1"),
        (lambda: DDN(0.5, gamma=1.0), "gamma must lie in"),
        (lambda: DDN(0.5, levels=1), "levels must be at least 2"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_noise_and_no_gradient(batch):
    images, labels = batch
    with pytest.raises(ValueError, match=r"noise must have shape \[copies"):
        noisy_logits(lambda x: x, images, torch.zeros_like(images))
    blind = torch.no_grad()(lambda x: x.flatten(1)[:, :10])
    with pytest.raises(ValueError, match="passes no gradient"):
        PGD(0.1)(blind, images, labels, noise_for(images))
