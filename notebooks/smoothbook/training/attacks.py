"""Attacks on the soft smoothed classifier: the mean of softmax over noisy copies.

Training uses them (SmoothAdv), and so does the hunt for broken certificates. Perturbations are measured in
L2 over all values of an image, in pixel units on [0, 1]; attacked images stay on [0, 1].

The noise is an argument, so that an attack is a function that a test can differentiate. For a hunt draw it
with Purpose.ATTACK: what an attack was tuned on never certifies.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from smoothkit.models import evaluating


def noisy_logits(base_classifier: Callable[[Tensor], Tensor], images: Tensor, noise: Tensor) -> Tensor:
    """Logits [m, B, K] of the copies images + noise[i], asked in one batch; noise [m, B, C, H, W]."""
    if noise.ndim != 5 or noise.shape[1:] != images.shape:
        raise ValueError(
            f"noise must have shape [copies, *images.shape] = [copies, {', '.join(map(str, images.shape))}], "
            f"got {tuple(noise.shape)}"
        )
    return base_classifier((images + noise).flatten(0, 1)).unflatten(0, noise.shape[:2])


def log_mean_softmax(logits: Tensor) -> Tensor:
    """log((1/m) sum_i softmax(logits[i])) over the first axis: [m, B, K] -> [B, K].

    The log of the mean, not the mean of logs; by logsumexp, so no clamp is needed.
    """
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def soft_smoothed_loss(
    base_classifier: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, noise: Tensor
) -> Tensor:
    """The attacker's objective J [B]: minus the log probability that the soft smoothed classifier gives the label.

    Parameters
    ----------
    images : Tensor [B, C, H, W] on [0, 1]
    labels : Tensor [B] of class indices
    noise : Tensor [m, B, C, H, W]
        sigma times standard normals, held fixed.

    References
    ----------
    Salman et al., "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers", NeurIPS 2019,
    equation (S) with m samples. arXiv:1906.04584.
    """
    return F.nll_loss(log_mean_softmax(noisy_logits(base_classifier, images, noise)), labels, reduction="none")


@dataclasses.dataclass(frozen=True)
class PGD:
    """Projected gradient ascent on J, from the image itself.

    Each step moves `step_size` (2 epsilon / steps if not given) along the gradient of unit length, clips to
    [0, 1] and projects onto the ball of radius `epsilon`.
    """

    epsilon: float
    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        _check_budget(self.epsilon, self.steps)
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size must be above 0, or None for 2 epsilon / steps, got {self.step_size}")

    def __call__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        noise: Tensor,
        *,
        epsilon: float | None = None,
    ) -> Tensor:
        """Attacked images [B, C, H, W]; `epsilon` overrides the ball's radius, as a warm-up does."""
        epsilon = self.epsilon if epsilon is None else epsilon
        step = 2 * epsilon / self.steps if self.step_size is None else self.step_size
        attacked = images.detach()
        with evaluating(base_classifier):
            for _ in range(self.steps if epsilon > 0 else 0):
                gradient, _ = _gradient(base_classifier, attacked, labels, noise)
                attacked = into_ball(images, attacked + step * gradient, epsilon)
        return attacked.detach()


@dataclasses.dataclass(frozen=True)
class DDN:
    """Decoupled direction and norm: seeks the nearest image that the soft smoothed classifier gets wrong.

    The norm shrinks by the factor 1 - gamma while the image is misclassified and grows by 1 + gamma while not; the
    step follows a cosine from 1 to 0.01. The nearest misclassified image is returned, pulled into the ball of radius
    `epsilon`. Where none was found the last one is: training wants an attack there most. `levels` rounds to that many
    pixel values in every step (None: no rounding).

    References
    ----------
    Rony et al., "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and Defenses",
    CVPR 2019, Algorithm 1; on smoothed classifiers: Salman et al. 2019.
    """

    epsilon: float
    steps: int = 10
    gamma: float = 0.05
    levels: int | None = 256

    def __post_init__(self) -> None:
        _check_budget(self.epsilon, self.steps)
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must lie in (0, 1), got {self.gamma}")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels must be at least 2, or None for no rounding, got {self.levels}")

    def __call__(
        self,
        base_classifier: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        noise: Tensor,
        *,
        epsilon: float | None = None,
    ) -> Tensor:
        """Attacked images [B, C, H, W]; `epsilon` overrides the ball's radius and the first norm."""
        epsilon = self.epsilon if epsilon is None else epsilon
        images = images.detach()
        if epsilon == 0:
            return images
        farthest = norms(torch.maximum(images, 1 - images))  # nothing on [0, 1] is farther away
        norm = torch.minimum(torch.full_like(farthest, epsilon), farthest)
        attacked, best = images, images
        best_norm = torch.full_like(farthest, math.inf)
        with evaluating(base_classifier):
            for i in range(self.steps):
                gradient, wrong = _gradient(base_classifier, attacked, labels, noise)
                best, best_norm = _nearer(images, attacked, wrong, best, best_norm)
                size = 0.01 + 0.99 * (1 + math.cos(math.pi * i / self.steps)) / 2
                delta = attacked - images + size * gradient
                norm = torch.minimum(norm * torch.where(wrong, 1 - self.gamma, 1 + self.gamma), farthest)
                delta = delta * _per_image(norm / norms(delta).clamp_min(1e-12), delta)
                attacked = self._round((images + delta).clamp(0, 1))
            with torch.no_grad():  # the last one counts too
                wrong = log_mean_softmax(noisy_logits(base_classifier, attacked, noise)).argmax(1) != labels
        best, best_norm = _nearer(images, attacked, wrong, best, best_norm)
        found = _per_image(best_norm.isfinite(), images)
        return into_ball(images, torch.where(found, best, attacked), epsilon).detach()

    def _round(self, images: Tensor) -> Tensor:
        return images if self.levels is None else (images * (self.levels - 1)).round() / (self.levels - 1)


def into_ball(images: Tensor, attacked: Tensor, epsilon: float) -> Tensor:
    """The points moved into [0, 1] and then towards `images` until within L2 distance `epsilon` (in float32)."""
    _check_budget(epsilon)
    delta = attacked.clamp(0, 1) - images
    shrink = (epsilon / norms(delta).clamp_min(1e-12)).clamp_max(1)
    return (images + delta * _per_image(shrink, delta)).clamp(0, 1)


def norms(delta: Tensor) -> Tensor:
    """L2 norm [B] of each image of a batch."""
    return delta.flatten(1).norm(dim=1)


def _gradient(
    base_classifier: Callable[[Tensor], Tensor], attacked: Tensor, labels: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of J scaled to length 1 per image, and who is misclassified [B].

    A gradient of zero (a saturated softmax) is replaced by a random direction of torch's global generator.
    """
    point = attacked.detach().requires_grad_()
    with torch.enable_grad():
        log_probability = log_mean_softmax(noisy_logits(base_classifier, point, noise))
        loss = F.nll_loss(log_probability, labels, reduction="sum")
        gradient = torch.autograd.grad(loss, point, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise ValueError(
            "the base classifier passes no gradient to its images, so it cannot be attacked by gradients; "
            "is it a black box, or does it run under no_grad?"
        )
    length = norms(gradient)
    flat = (length == 0) | ~length.isfinite()
    if bool(flat.any()):
        gradient = torch.where(_per_image(flat, gradient), torch.randn_like(gradient), gradient)
        length = norms(gradient)
    return gradient / _per_image(length, gradient), log_probability.detach().argmax(1) != labels


def _nearer(images: Tensor, attacked: Tensor, wrong: Tensor, best: Tensor, best_norm: Tensor) -> tuple[Tensor, Tensor]:
    distance = norms(attacked - images)
    better = wrong & (distance < best_norm)
    return torch.where(_per_image(better, images), attacked, best), torch.where(better, distance, best_norm)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (images.ndim - 1))


def _check_budget(epsilon: float, steps: int = 1) -> None:
    if not 0 <= epsilon < 1e30:  # and float32 holds its multiples
        raise ValueError(f"epsilon must be at least 0, an L2 distance in pixel units on [0, 1], got {epsilon}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
