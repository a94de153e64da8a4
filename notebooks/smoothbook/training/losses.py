"""Losses that make a base classifier good under noise.

Each is a small frozen dataclass called as `loss(base_classifier, images, labels, noise=..., sigma=..., epoch=...)`
with noise [copies, B, C, H, W] already drawn (see `schedules.draw_noise`), so that it is a plain function of
its arguments; `copies` says how many it wants. Under each stands its formula as a function of logits.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from smoothbook.training.attacks import DDN, PGD, log_mean_softmax, noisy_logits

Classifier = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a loss found: the number to descend on, and the logits [copies, B, K] it came from, for the accuracy."""

    loss: Tensor
    logits: Tensor


# --- Gaussian --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Cross-entropy on noisy copies.

    References
    ----------
    Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019, Section 3.3.
    """

    copies: int = 1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_copies(self.copies)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")

    def __call__(
        self, base_classifier: Classifier, images: Tensor, labels: Tensor, *, noise, sigma, epoch=None
    ) -> Terms:
        logits = noisy_logits(base_classifier, images, noise)
        return Terms(cross_entropy(logits, labels, self.label_smoothing), logits)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over copies and images; logits [m, B, K], labels [B]."""
    repeated = labels.expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), repeated.flatten(), label_smoothing=label_smoothing)


# --- SmoothAdv -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SmoothAdv:
    """Cross-entropy on the noisy copies of an attacked image; attack and loss see the same noise.

    The attack runs in eval mode with the weights fixed; its radius grows linearly over the first
    `warmup_epochs` (Salman et al.: 10). The released code splits a batch of B into m batches of B/m images, each
    repeated m times, with a step each; here all copies of a batch make one step, so give batch = B/m for the same.

    References
    ----------
    Salman et al., "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers", NeurIPS 2019.
    """

    attack: PGD | DDN
    copies: int = 2
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        _check_copies(self.copies)

    def __call__(
        self, base_classifier: Classifier, images: Tensor, labels: Tensor, *, noise, sigma, epoch=None
    ) -> Terms:
        attacked = _attacked(self.attack, self.warmup_epochs, base_classifier, images, labels, noise, epoch)
        logits = noisy_logits(base_classifier, attacked, noise)
        return Terms(cross_entropy(logits, labels), logits)


def _attacked(attack, warmup_epochs, base_classifier, images, labels, noise, epoch) -> Tensor:
    grown = 1.0 if epoch is None or not warmup_epochs else min(1.0, (epoch + 1) / warmup_epochs)
    return attack(base_classifier, images, labels, noise, epsilon=grown * attack.epsilon)


# --- MACER -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MACER:
    """Cross-entropy of the soft smoothed classifier, and a hinge on its certified radius.

    L = mean_b( -log p_y + lambda_ (sigma/2) max(gamma - gap, 0) [argmax q = y] ), with p the mean softmax of the
    copies, q the mean softmax at inverse temperature beta, and gap the difference of the normal quantiles of its
    two largest entries. `defer_epochs` leaves the hinge out at first, which large sigma needs.

    References
    ----------
    Zhai et al., "MACER: Attack-free and Scalable Robust Training via Maximizing Certified Radius", ICLR 2020.
    arXiv:2001.02378.
    """

    lambda_: float = 12.0
    gamma: float = 8.0
    beta: float = 16.0
    copies: int = 16
    defer_epochs: int = 0

    def __post_init__(self) -> None:
        _check_copies(self.copies)
        _check_positive(gamma=self.gamma, beta=self.beta)
        _check_weight(lambda_=self.lambda_)

    def __call__(
        self, base_classifier: Classifier, images: Tensor, labels: Tensor, *, noise, sigma, epoch=None
    ) -> Terms:
        logits = noisy_logits(base_classifier, images, noise)
        classification = F.nll_loss(log_mean_softmax(logits), labels)
        weight = 0.0 if epoch is not None and epoch < self.defer_epochs else self.lambda_
        if weight == 0:
            return Terms(classification, logits)
        hinge = macer_hinge(logits, labels, sigma, gamma=self.gamma, beta=self.beta)
        return Terms(classification + weight * hinge.mean().to(classification.dtype), logits)


def macer_hinge(logits: Tensor, labels: Tensor, sigma: Tensor, *, gamma: float, beta: float) -> Tensor:
    """(sigma/2) max(gamma - gap, 0) where the soft smoothed classifier is right, else 0; float64 [B].

    Images beyond the hinge, and those whose gap overflows, are left out before anything is differentiated, as
    in the released code: an infinite quantile masked afterwards still has a NaN gradient. The mean is over all
    images. In float64: float32 cannot tell 1 - 1e-8 from 1, and would drop images from a gap of about 5 on.
    """
    if logits.shape[-1] < 2:
        raise ValueError("the hinge of MACER compares two classes, and the base classifier has one")
    q = (beta * logits.double()).softmax(-1).mean(0)  # [B, K]
    with torch.no_grad():
        gap = _quantile_gap(q)
        kept = (q.argmax(1) == labels) & (gap < gamma)  # an infinite or NaN gap is not below gamma
    hinge = torch.zeros(len(q), dtype=q.dtype, device=q.device)
    sigma = sigma.to(q).expand(len(q))
    return hinge.masked_scatter(kept, sigma[kept] / 2 * (gamma - _quantile_gap(q[kept])))


def _quantile_gap(q: Tensor) -> Tensor:
    first, second = q.topk(2, dim=1).values.unbind(1)
    return torch.special.ndtri(first) - torch.special.ndtri(second)


# --- consistency -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Consistency:
    """Cross-entropy on the copies, plus lambda_ times their divergence from their mean, plus eta times its entropy.

    L = mean_i CE(f(x + d_i), y) + lambda_ (1/m) sum_i KL(p || p_i) + eta H(p), p the mean of the p_i. This is the
    final revision of the released code; an early one, still copied around, takes the entropy of softmax(p). With
    `attack` the image is attacked first, as in SmoothAdv.

    References
    ----------
    Jeong and Shin, "Consistency Regularization for Certified Robustness of Smoothed Classifiers", NeurIPS 2020.
    arXiv:2006.04062.
    """

    lambda_: float = 10.0
    eta: float = 0.5
    copies: int = 2
    attack: PGD | DDN | None = None
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        if self.copies < 2:
            raise ValueError(f"copies must be at least 2 for consistency, got {self.copies}")
        _check_weight(lambda_=self.lambda_, eta=self.eta)

    def __call__(
        self, base_classifier: Classifier, images: Tensor, labels: Tensor, *, noise, sigma, epoch=None
    ) -> Terms:
        if self.attack is not None:
            images = _attacked(self.attack, self.warmup_epochs, base_classifier, images, labels, noise, epoch)
        logits = noisy_logits(base_classifier, images, noise)
        divergence, entropy = consistency_terms(logits)
        regularisation = self.lambda_ * divergence.mean() + self.eta * entropy.mean()
        return Terms(cross_entropy(logits, labels) + regularisation, logits)


def consistency_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(1/m) sum_i KL(p || p_i) and H(p), each [B], with p = (1/m) sum_i p_i; logits [m, B, K].

    The gradient flows through p as well.
    """
    log_each, log_mean = logits.log_softmax(-1), log_mean_softmax(logits)
    mean = log_mean.exp()
    divergence = (mean * (log_mean - log_each)).sum(-1).mean(0)
    return divergence, -(mean * log_mean).sum(-1)


# --- stability -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stability:
    """Cross-entropy on the clean image, plus lambda_ KL(f(x) || f(x + d)); the older baseline.

    `distance="cross-entropy"` takes -sum f(x) log f(x + d) instead, which also pulls at the entropy of f(x).

    References
    ----------
    Zheng et al., "Improving the Robustness of Deep Neural Networks via Stability Training", CVPR 2016; for smoothing:
    Li et al., "Certified Adversarial Robustness with Additive Noise", NeurIPS 2019.
    """

    lambda_: float = 2.0
    distance: str = "kl"
    copies: int = 1

    def __post_init__(self) -> None:
        _check_copies(self.copies)
        _check_weight(lambda_=self.lambda_)
        if self.distance not in {"kl", "cross-entropy"}:
            raise ValueError(f"distance must be kl or cross-entropy, got {self.distance!r}")

    def __call__(
        self, base_classifier: Classifier, images: Tensor, labels: Tensor, *, noise, sigma, epoch=None
    ) -> Terms:
        # clean and noisy in one batch: with BatchNorm in train mode two batches would be two functions
        logits = noisy_logits(base_classifier, images, torch.cat([torch.zeros_like(noise[:1]), noise]))
        clean, noisy = logits[0], logits[1:]
        apart = stability_distance(clean, noisy, self.distance).mean()
        return Terms(F.cross_entropy(clean, labels) + self.lambda_ * apart, noisy)


def stability_distance(clean: Tensor, noisy: Tensor, distance: str = "kl") -> Tensor:
    """KL or cross-entropy of f(x) [B, K] and f(x + d) [m, B, K], averaged over the copies: [B]."""
    log_clean = clean.log_softmax(-1)
    against = noisy.log_softmax(-1).mean(0)
    own = log_clean if distance == "kl" else torch.zeros_like(log_clean)
    return (log_clean.exp() * (own - against)).sum(-1)


# --- the noise level itself ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NoiseLevel:
    """Which of `sigmas` is in the noisy image? Trains the estimator of a noise-conditioned ensemble.

    `base_classifier` gives one logit a sigma; labels are not used.
    """

    sigmas: tuple[float, ...]
    copies: int = 1

    def __post_init__(self) -> None:
        _check_copies(self.copies)
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        if not self.sigmas:
            raise ValueError("sigmas must not be empty")

    def targets(self, sigma: Tensor, labels: Tensor) -> Tensor:
        """The index of the nearest sigma for each image; `fit` counts accuracy against it."""
        return (sigma[:, None] - sigma.new_tensor(self.sigmas)).abs().argmin(1)

    def __call__(
        self, base_classifier: Classifier, images: Tensor, labels: Tensor, *, noise, sigma, epoch=None
    ) -> Terms:
        logits = noisy_logits(base_classifier, images, noise)
        return Terms(cross_entropy(logits, self.targets(sigma, labels)), logits)


# --- checks ----------------------------------------------------------------------------------------


def _check_copies(copies: int) -> None:
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")


def _check_weight(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0, got {value}")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")
