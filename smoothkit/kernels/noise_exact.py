"""Noise that is the rounded Gaussian exactly, bit for bit of 64: for who does not want to trust a float.

`noise.noisy_copies` on a grid draws a float32 normal and rounds it to the grid. Nothing of the image leaks into
that, but the normal itself is an approximation: its tails end at 6.76 and its last bits are rounded. Here the integer
noise k is drawn with

    P(k) = Phi((k + 1/2) / (g sigma)) - Phi((k - 1/2) / (g sigma)),

the distribution of a Gaussian of standard deviation g sigma rounded to integers, by comparing uniform 64-bit integers
with thresholds 2^64 Phi(.) computed in 60-digit decimal arithmetic. For an image on the grid, rounding the sum
is adding the rounded noise, so votes are those of a fixed classifier (the base classifier after rounding to the grid)
under true Gaussian noise, and Cohen's theorem applies with the same sigma to adversarial images on the grid.

The 64-bit integer u stands for a real number in [u, u + 1) / 2^64, which lies on one side of every threshold unless u
is the integer part of one. A draw within 1 of such an integer part is *uncertain*: its copy fails as a whole,
becomes NaN, and must vote for nobody while it counts in n. All other draws are those of the exact distribution, tails
included: thresholds beyond the first and last of the table all have integer part 0 or 2^64 - 1, where draws
are uncertain too, so nothing is merged or cut off and the distance from the exact distribution in total variation is
no more than the chance of a failure, below 2^-64 times thrice the number of thresholds a value (7e-16 at g sigma = 255).
What is left to trust is that Philox's words are as good as uniform and independent.

Words come from the counter of `smoothkit.kernels.noise`, whose fields, seed and purposes are the same, but a block of four
words makes two pixels instead of four: pixel p has block p // 2, and u is word 0 << 32 | word 1 for even p, word 2 << 32
| word 3 for odd p. The pixel block thus runs to half the number of pixels. The words of a block are those `noise` turns
into normals, so a certificate takes its draws from one of the two kinds, never from both.

References
----------
Voráček and Hein, "Sound Randomized Smoothing in Floating-Point Arithmetic", ICLR 2023.
"""

import dataclasses
import functools
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from smoothkit.kernels.philox import Purpose, random_words, rows_of_one_image
from smoothkit.types import check_sigma

# --- thresholds --------------------------------------------------------------------------------------

DIGITS = 60
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
TOP = 2**64 - 1
MAX_PIXELS = 2 * 2**24  # two to a block of the counter
TOP_BITS = 16  # of a draw, that the table is indexed by
MAX_SCALE = 2**14  # a table of 300,000 thresholds, half a minute to make
MAX_STEPS = 2**22  # of an image's values; with noise added they are exact in float32
MANY = np.int32(-1)  # a place of the table where more than one threshold may matter


def upper_half(x: Fraction) -> Decimal:
    """Phi(x) - 1/2 for x >= 0, to a relative 1e-50.

    phi(x) (x + x^3 / 3 + x^5 / (3 5) + ...): all terms are positive, so nothing cancels.
    """
    with localcontext(prec=DIGITS):
        value = Decimal(x.numerator) / Decimal(x.denominator)
        square = value * value
        term = total = value
        odd = 1
        while term > total * Decimal("1e-52"):
            odd += 2
            term = term * square / odd
            total += term
        return total * (-square / 2).exp() / (2 * PI).sqrt()


@dataclasses.dataclass(frozen=True, eq=False)
class Thresholds:
    """Integer parts of 2^64 Phi((k + 1/2) / (g sigma)), increasing, from the first above 0 to the last below 2^64 - 1.

    Noise is the smallest k whose threshold lies above the draw: `first` + the number of thresholds at or below it.
    The other fields are for look-up by a draw's highest 16 bits: `below`, the number of thresholds below all draws
    with these bits (MANY where a search is needed), and `next_high`, the upper 32 bits of the one after.
    """

    values: np.ndarray  # uint64 [thresholds]
    first: int
    below: np.ndarray  # int32 [2^16]
    next_high: np.ndarray  # uint32 [2^16]


@functools.lru_cache(maxsize=16)
def thresholds(sigma: float, grid: int) -> Thresholds:
    """The table for noise of standard deviation sigma (pixel units) on a grid of `grid` steps, made once: 0.1 to 0.4 s at 255."""
    _check_scale(sigma, grid)
    scale = Fraction(sigma) * grid
    above: list[Decimal] = []  # at 1/2, 3/2, ...; those below follow by symmetry
    with localcontext(prec=DIGITS):
        while (value := 2**64 * (Decimal("0.5") + upper_half(Fraction(2 * len(above) + 1, 2) / scale))) < TOP:
            above.append(value)
        integer_parts = [int(2**64 - value) for value in reversed(above)] + [int(value) for value in above]
    values = np.array(integer_parts, dtype=np.uint64)
    return Thresholds(values, -len(above), *_by_top_bits(values))


def _by_top_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shift = np.uint64(64 - TOP_BITS)
    starts = np.arange(2**TOP_BITS, dtype=np.uint64) << shift
    below = np.searchsorted(values, starts)
    after = np.append(below[1:], len(values))  # thresholds at or below the last draw of each place
    search = after - below > 1
    # also where a threshold just across the edge makes draws uncertain; those not in the table are at 0 and 2^64 - 1
    first, last = np.uint64(0), np.uint64(TOP >> TOP_BITS)
    in_place = values & last
    search[(values[in_place == first] >> shift).astype(np.intp) - 1] = True
    search[(values[in_place == last] >> shift).astype(np.intp) + 1] = True
    search[[0, -1]] = True
    next_high = np.append(values >> np.uint64(32), 2**32 - 1).astype(np.uint32)[below]
    return np.where(search, MANY, below).astype(np.int32), next_high


def _check_scale(sigma: float, grid: int) -> None:
    check_sigma(sigma)
    _check_grid(grid)
    if sigma * grid > MAX_SCALE:
        raise ValueError(
            f"sigma * grid must be at most {MAX_SCALE:,}, got {sigma * grid:g}; use a coarser grid, such as 255"
        )


def _check_grid(grid: int) -> None:
    if isinstance(grid, bool) or not isinstance(grid, (int, np.integer)) or grid < 1:
        raise ValueError(f"grid must be a whole number of steps from 0 to 1, such as 255, got {grid!r}")


# --- draws -------------------------------------------------------------------------------------------


def steps_reference(high: np.ndarray, low: np.ndarray, table: Thresholds) -> tuple[np.ndarray, np.ndarray]:
    """Integer noise and whether it is uncertain, by definition: one search among the thresholds a draw.

    Parameters
    ----------
    high, low : uint32 arrays of one shape, the halves of the 64-bit draws

    Returns
    -------
    int32 and bool arrays of the same shape
    """
    draws = high.astype(np.uint64) << np.uint64(32) | low
    values = table.values
    at_or_below = np.searchsorted(values, draws, side="right")
    padded = np.concatenate([[np.uint64(0)], values, [np.uint64(TOP)]])  # all further thresholds end there
    before, after = padded[at_or_below], padded[at_or_below + 1]
    uncertain = (draws - before <= 1) | (after - draws <= 1)
    return (at_or_below + table.first).astype(np.int32), uncertain


def steps(high: np.ndarray, low: np.ndarray, table: Thresholds) -> tuple[np.ndarray, np.ndarray]:
    """`steps_reference`, by look-up: a draw's highest 16 bits leave one threshold to compare with its upper half.

    Where they leave more, and where the upper halves are equal or neighbours, which is rare, the reference decides.
    """
    place = (high >> np.uint32(32 - TOP_BITS)).astype(np.intp)
    below, next_high = table.below[place], table.next_high[place]
    uncertain = np.zeros(high.shape, dtype=bool)
    rare = np.nonzero((below == MANY) | (high - next_high + np.uint32(1) <= 2))
    below += high > next_high
    below += np.int32(table.first)
    below[rare], uncertain[rare] = steps_reference(high[rare], low[rare], table)
    return below, uncertain


def exact_noisy_copies(
    image: Tensor,
    *,
    sigma: float,
    seed: int,
    purpose: Purpose,
    image_id: int,
    start: int,
    stop: int,
    grid: int,
) -> tuple[Tensor, Tensor]:
    """Noisy copies start..stop-1 of one image on the grid, with exactly rounded Gaussian noise, and which of them failed.

    Parameters
    ----------
    image : float32 tensor [C, H, W], multiples of 1 / grid.
    sigma : standard deviation in pixel units on [0, 1], above 0.
    seed, purpose, image_id, start, stop : as in `noise.noisy_copies`
    grid : number of steps from 0 to 1.

    Returns
    -------
    copies : float32 tensor [stop - start, C, H, W] on the CPU: (x + k) / grid for integers x and k, divided once in
        float32; not clipped. A copy that failed is NaN throughout.
    failed : bool tensor [stop - start]. Such a copy votes for nobody and counts in n, whatever the base classifier
        makes of NaN.

    Raises
    ------
    ValueError
        If the image is not on the grid, or an argument does not fit into the counter.
    """
    whole = _integers(image, grid)  # [pixels]
    table = thresholds(float(sigma), int(grid))
    counter = dict(seed=seed, purpose=purpose, image_id=image_id, start=start, stop=stop)
    made, uncertain = exact_steps(whole.size, table, **counter)
    failed = uncertain.any(axis=1)
    copies = (whole + made).astype(np.float32) / np.float32(grid)
    copies[failed] = np.nan
    return torch.from_numpy(copies).reshape(stop - start, *image.shape), torch.from_numpy(failed)


def exact_steps(
    num_pixels: int, table: Thresholds, *, seed: int, purpose: Purpose, image_id: int, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Integer noise of samples start..stop-1 and which of it is uncertain: int32 and bool, [stop - start, num_pixels]."""
    rows = rows_of_one_image(num_pixels, seed=seed, purpose=purpose, image_id=image_id, start=start, stop=stop)
    if num_pixels > MAX_PIXELS:
        raise ValueError(f"an image must have at most {MAX_PIXELS:,} values for exact noise, got {num_pixels:,}")
    blocks = -(-num_pixels // 2)
    made = np.empty((stop - start, blocks, 2), dtype=np.int32)
    uncertain = np.empty(made.shape, dtype=bool)
    for piece, (w0, w1, w2, w3) in random_words(seed, rows[1], rows[2], blocks):
        made[piece, :, 0], uncertain[piece, :, 0] = steps(w0, w1, table)
        made[piece, :, 1], uncertain[piece, :, 1] = steps(w2, w3, table)
    flat = stop - start, 2 * blocks
    return made.reshape(flat)[:, :num_pixels], uncertain.reshape(flat)[:, :num_pixels]


def _integers(image: Tensor, grid: int) -> np.ndarray:
    """The image in grid steps, int32 [pixels]."""
    _check_grid(grid)
    scaled = image.detach().cpu().double().reshape(-1) * int(grid)
    if not bool(scaled.isfinite().all()):
        raise ValueError("the image has values that are not finite; exact noise needs multiples of 1 / grid")
    if float(scaled.abs().max()) > MAX_STEPS:
        raise ValueError(f"values must lie within {MAX_STEPS:,} grid steps of 0, got {float(scaled.abs().max()):,.0f}")
    off = float((scaled - scaled.round()).abs().max())
    if off > max(1e-3, grid * 2**-24):  # of a step; a multiple of 1 / grid near 1 is rounded by less in float32
        raise ValueError(
            f"exact noise needs an image on the grid of {grid} steps, but values lie off it by up to {off:.3g} steps; "
            f"round the image to the grid first, or use float noise"
        )
    return scaled.round().to(torch.int32).numpy()
