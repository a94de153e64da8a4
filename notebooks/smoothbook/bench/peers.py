"""What the engine is compared with: the plain published loop, and ART.

The loop follows the description in Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via
Randomized Smoothing", ICML 2019, Section 3.2.2, and is run as users run it: eager float32, one image at a time.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from smoothkit.types import ABSTAIN

PLAIN_BATCHES = (400, 1_000)  # of the published scripts, and the published default
ART_MISSING = "ART is not installed, its rows are left out; pip install -e '.[peers]' brings it"


def plain_counts(
    base_classifier: Callable[[Tensor], Tensor], image: Tensor, num: int, *, sigma: float, batch: int, num_classes: int
) -> np.ndarray:
    """Class counts of `num` noisy copies of an image [C, H, W], by the plain loop; int64 [num_classes]."""
    counts = np.zeros(num_classes, dtype=np.int64)
    with torch.no_grad():
        for start in range(0, num, batch):
            copies = image.repeat((min(batch, num - start), 1, 1, 1))
            noise = torch.randn_like(copies) * sigma
            predicted = base_classifier(copies + noise).argmax(1)
            for c in predicted.cpu().numpy():
                counts[c] += 1
    return counts


def plain_certify(
    base_classifier: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    batch: int,
    num_classes: int,
) -> tuple[int, float]:
    """Class (ABSTAIN = -1) and L2 radius of one image [C, H, W], by the plain loop."""
    settings = dict(sigma=sigma, batch=batch, num_classes=num_classes)
    c_a = int(plain_counts(base_classifier, image, n0, **settings).argmax())
    n_a = int(plain_counts(base_classifier, image, n, **settings)[c_a])
    p_a_lower = stats.beta.ppf(alpha, n_a, n - n_a + 1) if n_a else 0.0
    return (c_a, float(sigma * stats.norm.ppf(p_a_lower))) if p_a_lower > 0.5 else (ABSTAIN, 0.0)


def art_certify(
    base_classifier: nn.Module,
    shape: tuple[int, ...],
    *,
    num_classes: int,
    sigma: float,
    n0: int,
    alpha: float,
    batch: int,
    device: str = "cpu",
) -> Callable[[np.ndarray, int], tuple[int, float]]:
    """ART's randomized smoothing of a network: (image [C, H, W], n) -> class and radius.

    Raises
    ------
    ImportError
        Without ART, or without statsmodels, which its bound needs and its installation does not bring.
    """
    import statsmodels.stats.proportion  # noqa: F401
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    smoothed = PyTorchRandomizedSmoothing(
        base_classifier,
        nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=num_classes,
        device_type="gpu" if device == "cuda" else "cpu",
        sample_size=n0,
        scale=sigma,
        alpha=alpha,
    )

    def certify(image: np.ndarray, n: int) -> tuple[int, float]:
        predicted, radius = smoothed.certify(image[None], n=n, batch_size=batch)
        return int(predicted[0]), float(radius[0])

    return certify
