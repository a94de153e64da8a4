"""How good slopes that are estimated from answers are, where the true gradient is at hand to compare with."""

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from smoothbook.adapters import Coordinator
from smoothbook.training.gradient_free import image_slopes, slopes


def gradient_cosines(
    coordinator: Coordinator,
    box: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    sigma: float,
    *,
    directions: tuple[int, ...] = (1, 4, 16),
    estimates: int = 8,
    temperature: float = 4.0,
) -> pd.DataFrame:
    """The cosine between estimated and true gradient of a decoder's weights, by the number of questions.

    Two estimates are compared: all weights are displaced at once, or each image that the box is shown by itself, with the
    chain rule for the rest. The decoder's last layer gets random weights, so that there is a gradient to estimate.

    Parameters
    ----------
    coordinator : Coordinator
    box : callable, [B, C, H, W] -> logits [B, num_classes]
        With gradients: the true one is computed through it.
    images : float tensor [B, C, H, W] on [0, 1]
    labels : int64 tensor [B]
    sigma : float
        Of the noise on the images, pixel units.
    directions : tuple of int
        Numbers of displacements; each asks about 2 * B images.
    estimates : int
        Repetitions for each number.
    temperature : float
        Divides the logits in the loss.

    Returns
    -------
    DataFrame
        displaced, queries, mean and std of the cosine; `attrs` holds the numbers of `weights` and `pixels`.
    """
    network, weights = coordinator.network, [p for p in coordinator.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(network.decoder.body[-1].weight, std=0.05, generator=generator)
    start = parameters_to_vector(weights).detach()
    noisy = images + sigma * torch.randn(images.shape, generator=generator)
    z = network.encoded(noisy)
    shown = network.changed(noisy, z)

    def losses(seen: Tensor) -> Tensor:
        return F.cross_entropy(box(seen) / temperature, labels, reduction="none")

    @torch.no_grad()
    def loss_at(w: Tensor) -> float:
        vector_to_parameters(w, weights)
        return float(losses(network.prompted(noisy, z)).mean())

    def gradient(output: Tensor, grad: Tensor | None = None) -> Tensor:
        return parameters_to_vector(torch.autograd.grad(output, weights, grad, retain_graph=True))

    exact = gradient(losses(shown.clamp(0, 1)).mean())
    points = []
    for k in directions:
        for _ in range(estimates):
            by_weights, _ = slopes(loss_at, start, displacement=0.01, repeats=k, generator=generator)
            vector_to_parameters(start, weights)
            with torch.no_grad():
                guess = image_slopes(losses, shown.detach(), displacement=0.1, repeats=k, generator=generator)
            by_images = gradient(shown, guess / len(images))
            for displaced, found in (("all weights at once", by_weights), ("each image by itself", by_images)):
                cosine = float(F.cosine_similarity(found, exact, dim=0))
                points.append({"displaced": displaced, "queries": 2 * k * len(images), "cosine": cosine})
    cosines = pd.DataFrame(points).groupby(["displaced", "queries"])["cosine"].agg(["mean", "std"]).reset_index()
    cosines.attrs = {"weights": len(start), "pixels": shown[0].numel()}
    return cosines
