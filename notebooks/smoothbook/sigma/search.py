"""OptimizeSigma: for each image the sigma at which its certified radius looks largest.

Gradient ascent on an estimate of the radius, in which the noise sigma * z carries the gradient and the base classifier
stays as it is, in eval mode. Noise comes from the engine's pilot samples, which never certify, so a certificate
at the sigma found needs no correction: it holds given that sigma. It is about the smoothed classifier with that one
sigma *frozen*; of a classifier that chooses sigma anew for each input it says nothing (`memory`, `selectors`).

The objective is made of soft probabilities (means of softmax) and the certificate of hard votes, so the best sigma
of one need not be that of the other; from few draws its gradient is biased towards large sigma as well. Steps and step
size therefore act as early stopping, and the guard compares the ends on common noise. Noise is not rounded to
a grid here, as rounding passes no gradient.

References
----------
Alfarra, Bibi, Torr and Ghanem, "Data Dependent Randomized Smoothing", UAI 2022, Algorithm 1. arXiv:2012.04351.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from smoothbook.adapters.base import device_of
from smoothbook.training.attacks import log_mean_softmax, noisy_logits
from smoothkit import Purpose
from smoothkit.certify.bounds import lower_bound_table
from smoothkit.data import Images
from smoothkit.kernels.noise import noisy_rows
from smoothkit.kernels.philox import counter_word, signed_bits
from smoothkit.models import evaluating
from smoothkit.sampling.progress import Progress
from smoothkit.types import check_alpha, check_samples, check_sigma

GUARD_SAMPLES = 2**39  # pilot samples from here on are the guard's; those of the steps are below

# (sigma [B], purpose of the asking: step number or GUARD) -> probabilities [B, K], differentiable in sigma
Probabilities = Callable[[Tensor, int], Tensor]
GUARD = -1


# --- objectives --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClampedRadius:
    """(sigma / 2)(Phi^-1(p_A) - Phi^-1(p_B)), class A as given and p_B the largest of the others, within [clamp, 1 - clamp].

    The clamp caps the estimate at sigma Phi^-1(1 - clamp): where all is certain the radius seems to grow with sigma.
    The released scripts clamp at 0.02, which caps it at 2.05 sigma though 100,000 samples certify 3.81; 0.001 is
    the released package's.
    """

    clamp: float = 0.001

    def __post_init__(self) -> None:
        if not 0 <= self.clamp < 0.5:
            raise ValueError(f"clamp must lie in [0, 1/2), as 0.001, got {self.clamp}")

    def __call__(self, probabilities: Tensor, c_a: Tensor, sigma: Tensor) -> Tensor:
        # clamp out of place: done in place it would cut the gradients of what is not clamped as well
        p_a, p_b = (torch.special.ndtri(p.clamp(self.clamp, 1 - self.clamp)) for p in self.pair(probabilities, c_a))
        return sigma / 2 * (p_a - p_b).to(sigma)

    def pair(self, probabilities: Tensor, c_a: Tensor) -> tuple[Tensor, Tensor]:
        """p_A and p_B, [B] each."""
        others = probabilities.scatter(1, c_a[:, None], -1.0)
        return probabilities.gather(1, c_a[:, None])[:, 0], others.amax(1)


@dataclasses.dataclass(frozen=True)
class ReleasedRadius(ClampedRadius):
    """The same for the two largest probabilities, whichever they are at this step: what the authors' code climbs.

    The class can change on the way, so that accuracy at radius 0 can fall: by 2.7 points for Cohen et al.'s training on
    CIFAR-10 in the paper's Table 1.
    """

    clamp: float = 0.02

    def pair(self, probabilities: Tensor, c_a: Tensor) -> tuple[Tensor, Tensor]:
        if probabilities.shape[1] < 2:
            raise ValueError("the released radius compares two classes, and the base classifier has one")
        return probabilities.topk(2, dim=1).values.unbind(1)


@dataclasses.dataclass(frozen=True)
class FiniteSampleRadius:
    """sigma Phi^-1(lower bound on p_A), for the expected count of n votes: what certifying will give, on average.

    The Clopper-Pearson bound at n * p_A votes, linear between whole counts; negative where the bound is below one half.
    """

    n: int = 100_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_samples("n", self.n)
        check_alpha(self.alpha)

    def __call__(self, probabilities: Tensor, c_a: Tensor, sigma: Tensor) -> Tensor:
        own = probabilities.gather(1, c_a[:, None])[:, 0].double()
        count = (own * self.n).clamp(0, self.n)
        quantiles = torch.from_numpy(_quantiles(self.n, self.alpha)).to(own.device)
        below = count.detach().nan_to_num().floor().clamp_max(self.n - 1).long()  # of NaN comes NaN below
        low, high = quantiles[below], quantiles[below + 1]
        return sigma * (low + (count - below) * (high - low)).to(sigma)


@functools.lru_cache(maxsize=4)
def _quantiles(n: int, alpha: float) -> np.ndarray:
    """Phi^-1 of the lower bound for each count, float64 [n + 1]; finite at 0 too, where the bound is 0."""
    table = torch.special.ndtri(torch.from_numpy(lower_bound_table(n, alpha).copy())).numpy()
    table[0] = 2 * table[1] - table[2] if n > 1 else table[1]
    return table


Objective = ClampedRadius | FiniteSampleRadius


# --- the ascent --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SigmaSearch:
    """How sigma is searched.

    Parameters
    ----------
    objective : ClampedRadius, ReleasedRadius or FiniteSampleRadius
    steps : int
        A saturated step adds `step_size` Phi^-1(1 - clamp), 2 to 3 times 1e-4, so a move of 0.17 takes some 800.
    step_size : float
        sigma is multiplied by exp(step_size * slope / sigma): it stays positive, and moves by step_size * slope as in
        plain ascent, to first order.
    draws : int
        Noisy copies of an image in each step, fresh ones in each; the paper takes 1, and 8 for MACER's base classifiers.
    pilot : int
        Noisy copies on which the class is fixed at sigma0, and on which the ends are compared.
    guard : bool
        Keep sigma0 where the objective at the sigma found is lower, on the same `pilot` copies.
    average : float
        Share of the steps, the last ones, whose sigmas are averaged (geometrically); 0 takes the last.
    positive : bool
        False is plain ascent on sigma, which can reach 0 and below and is then refused.
    """

    objective: Objective = ClampedRadius()
    steps: int = 900
    step_size: float = 1e-4
    draws: int = 1
    pilot: int = 100
    guard: bool = True
    average: float = 0.0
    positive: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "draws", "pilot"):
            check_samples(name, getattr(self, name))
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size must be above 0, got {self.step_size}")
        if not 0 <= self.average <= 1:
            raise ValueError(f"average must be a share of the steps in [0, 1], got {self.average}")
        if self.steps * self.draws > GUARD_SAMPLES:
            raise ValueError(f"steps * draws must be at most {GUARD_SAMPLES}, got {self.steps * self.draws}")


@dataclasses.dataclass(frozen=True)
class SigmaChoice:
    """What a search found for B images.

    `sigma` and `sigma0` are float64 [B]; `c_a` int64 [B] is the class at sigma0; `before` and `after` the objective at
    both on the guard's copies (`after` at the sigma chosen); `kept` bool [B] says where the guard put sigma0 back.
    `trace` is float64 [steps + 1, B], the sigmas on the way, and `objective` [steps, B] what was climbed, on each step's
    own noise.
    """

    sigma: np.ndarray
    sigma0: np.ndarray
    c_a: np.ndarray
    before: np.ndarray
    after: np.ndarray
    kept: np.ndarray
    trace: np.ndarray
    objective: np.ndarray

    def __len__(self) -> int:
        return len(self.sigma)


def ascend(probabilities: Probabilities, sigma0: Tensor, search: SigmaSearch) -> SigmaChoice:
    """The search itself, for any probabilities as a function of sigma: sampled, or known in closed form.

    Parameters
    ----------
    probabilities : callable
        (sigma [B], step) -> class probabilities [B, K], differentiable in sigma, each row in its own; step is GUARD for
        those that fix the class and compare the ends.
    sigma0 : float tensor [B], above 0. Not changed.
    search : SigmaSearch

    Raises
    ------
    ValueError
        If a sigma is not above 0, at the start or, in plain ascent, on the way.
    """
    if sigma0.ndim != 1 or not sigma0.is_floating_point():
        raise ValueError(f"sigma0 must be a float tensor [B], got {sigma0.dtype} {tuple(sigma0.shape)}")
    for s in sigma0.unique().tolist():
        check_sigma(s)
    sigma = sigma0 = sigma0.detach().clone()
    with torch.no_grad():
        at_start = probabilities(sigma0, GUARD)
        c_a = at_start.argmax(1)
        before = search.objective(at_start, c_a, sigma0)
    trace, climbed = [sigma0], []
    for step in range(search.steps):
        value, slope = slope_of(search.objective, probabilities, c_a, sigma, step)
        sigma = step_of(sigma, slope, search)
        trace.append(sigma)
        climbed.append(value)
    last = max(1, round(search.average * search.steps))
    found = torch.stack(trace[-last:]).log().mean(0).exp() if last > 1 else sigma
    with torch.no_grad():
        after = search.objective(probabilities(found, GUARD), c_a, found)
    kept = ~(after >= before) if search.guard else torch.zeros_like(c_a, dtype=torch.bool)  # NaN is no gain either
    found, after = torch.where(kept, sigma0, found), torch.where(kept, before, after)
    if not bool((found.isfinite() & (found > 0)).all()):
        raise ValueError(f"the ascent diverged, to sigma {found.tolist()[:3]}; use a smaller step_size or guard=True")
    floats = (found, sigma0, before, after, torch.stack(trace), torch.stack(climbed))
    found, sigma0, before, after, trace, climbed = (x.double().cpu().numpy() for x in floats)
    return SigmaChoice(found, sigma0, c_a.cpu().numpy(), before, after, kept.cpu().numpy(), trace, climbed)


def slope_of(
    objective: Objective, probabilities: Probabilities, c_a: Tensor, sigma: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """The objective [B] and its derivative in sigma [B]; an image's depends on its own sigma only."""
    sigma = sigma.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(probabilities(sigma, step), c_a, sigma)
        slope = torch.autograd.grad(value.sum(), sigma)[0]
    return value.detach(), slope


def step_of(sigma: Tensor, slope: Tensor, search: SigmaSearch) -> Tensor:
    """One step uphill; an image whose slope is NaN or infinite stays where it is."""
    slope = torch.where(slope.isfinite(), slope, 0.0)
    if search.positive:
        return sigma * (search.step_size * slope / sigma).exp()
    sigma = sigma + search.step_size * slope
    if not bool((sigma > 0).all()):
        raise ValueError("plain ascent reached a sigma of 0 or below; use positive=True, or a smaller step_size")
    return sigma


# --- images ------------------------------------------------------------------------------------------


def soft_probabilities(base_classifier: Callable[[Tensor], Tensor], images: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
    """Mean softmax [B, K] over the copies images + sigma z[i], float64; z is [draws, B, C, H, W]."""
    noise = z * sigma.to(z).reshape(1, -1, 1, 1, 1)
    return log_mean_softmax(noisy_logits(base_classifier, images, noise).double()).exp()


class PilotNoise:
    """Standard normals of the engine's pilot samples, for several images at once.

    `noise(start, stop)` is float32 [stop - start, B, *shape] on the device; the values of an image do not depend on
    its company.
    """

    def __init__(self, ids: Sequence[int], shape: tuple[int, ...], seed: int, device: torch.device | str) -> None:
        self.shape, self.seed, self.device = shape, signed_bits(seed), torch.device(device)
        self._words = torch.tensor([counter_word(Purpose.PILOT, i) for i in ids], device=self.device)
        self._black = torch.zeros(1, *shape, device=self.device)  # noise on a black image is the noise itself

    def __call__(self, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop:
            raise ValueError(f"samples must lie in order from 0 on, got {start} to {stop}")
        samples = torch.arange(start, stop, device=self.device)
        words = self._words.repeat(len(samples))
        rows = torch.stack([torch.zeros_like(words), words, samples.repeat_interleave(len(self._words))])
        z = torch.empty(len(words), *self.shape, device=self.device)
        noisy_rows(z, self._black, rows, torch.ones(len(words), device=self.device), self.seed, 0)
        return z.unflatten(0, (len(samples), len(self._words)))


@dataclasses.dataclass(frozen=True)
class _Sampled:
    """Soft probabilities of some images: on fresh pilot samples in each step, on the guard's where `step` is GUARD."""

    base_classifier: Callable[[Tensor], Tensor]
    pixels: Tensor  # [B, C, H, W]
    noise: PilotNoise
    search: SigmaSearch
    batch: int

    def __call__(self, sigma: Tensor, step: int) -> Tensor:
        if step == GUARD:
            return self._of_the_guard(sigma)
        probabilities = self._on(sigma, step * self.search.draws, (step + 1) * self.search.draws)
        if not probabilities.requires_grad:
            raise ValueError(
                "the base classifier passes no gradient, so sigma cannot be searched by ascent; is it a black box, or does "
                "it run under no_grad?"
            )
        return probabilities

    def _of_the_guard(self, sigma: Tensor) -> Tensor:
        """They need no gradient, and come in pieces of the size of a step."""
        piece, pilot = max(1, self.batch * self.search.draws // len(self.pixels)), self.search.pilot
        total = 0.0
        for low in range(0, pilot, piece):
            high = min(pilot, low + piece)
            total = total + (high - low) * self._on(sigma, GUARD_SAMPLES + low, GUARD_SAMPLES + high)
        return total / pilot

    def _on(self, sigma: Tensor, start: int, stop: int) -> Tensor:
        return soft_probabilities(self.base_classifier, self.pixels, sigma, self.noise(start, stop))


def search_sigma(
    base_classifier: Callable[[Tensor], Tensor],
    images: Images,
    *,
    sigma0: float | Sequence[float],
    search: SigmaSearch | None = None,
    seed: int = 0,
    batch: int = 128,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> SigmaChoice:
    """A sigma for each image.

    Parameters
    ----------
    base_classifier : callable, images [B, C, H, W] on [0, 1] -> logits [B, K], differentiable
    images : Images
    sigma0 : float, or one for each image
        Where the search begins: what the base classifier was trained with. Pixel units, above 0.
    search : SigmaSearch; its defaults if not given
    seed : int
        Of the pilot noise. May be the certificate's: purposes never share draws.
    batch : int
        Images searched at a time. It does not change an image's noise; logits may differ in their last bit.
    device : str, optional
        Where batches, and the module, go; where the module is, if not given.

    Returns
    -------
    SigmaChoice

    Raises
    ------
    ValueError
        If sigma0 is not above 0, or the base classifier passes no gradient.
    """
    search = SigmaSearch() if search is None else search
    check_samples("batch", batch)
    is_module = isinstance(base_classifier, nn.Module)
    device = torch.device(device or (device_of(base_classifier) if is_module else "cpu"))
    if is_module:
        base_classifier.to(device)
    start = np.broadcast_to(np.asarray(sigma0, dtype=np.float64), len(images))
    for s in np.unique(start):
        check_sigma(float(s))
    choices = []
    with evaluating(base_classifier), Progress(len(images), "searching sigma", show=progress) as bar:
        for low in range(0, len(images), batch):
            high = min(len(images), low + batch)
            pixels = images.batch(low, high).to(device)
            noise = PilotNoise(images.ids[low:high], tuple(pixels.shape[1:]), seed, device)
            sampled = _Sampled(base_classifier, pixels, noise, search, batch)
            choices.append(ascend(sampled, torch.from_numpy(start[low:high].copy()).to(device), search))
            bar.update(high - low)
    names = [field.name for field in dataclasses.fields(SigmaChoice)]
    return SigmaChoice(*(np.concatenate([getattr(c, name) for c in choices], axis=-1) for name in names))
