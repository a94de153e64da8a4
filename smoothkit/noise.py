"""The noise: a pure function of (seed, purpose, image id, sample index, pixel).

Nothing here holds state. Asking for sample 70,000 of an image needs no earlier sample, so results do
not depend on batch size, order, process or machine, and an interrupted run goes on where it stopped.

The bits are made in two steps, and both are part of the format of every record:

1. Philox4x32-10 turns a 128-bit counter and the 64-bit seed into four 32-bit words. The counter, from
   its lowest bit: pixel block (24 bits, four pixels each), sample (40), image id (56), purpose (8).
2. Box-Muller turns two words into two normals, with polynomials in place of log, sin and cos: only
   float32 additions, multiplications, square roots and bit moves, each rounded once and never fused,
   so that any IEEE machine gives the same bits. Uniforms have 32 bits; the tails end at 6.76.

The reference is NumPy. With numba (the extra `fast`) a compiled kernel makes the same bits sooner; `road()`
names what is in use, and SMOOTHKIT_NO_KERNELS=1 keeps to NumPy.

Reference: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import enum
import functools
import hashlib
import os
import secrets
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

MAX_PIXELS = 4 * 2**24
MAX_SAMPLE = 2**40
IMAGE_ID_BITS = 56


class Purpose(enum.IntEnum):
    """What draws are for. Purposes never share draws: what was trained or searched on never certifies."""

    TRAIN = 0
    PILOT = 1
    ATTACK = 2
    SELECT = 3
    ESTIMATE = 4
    PREDICT = 5


def fresh_seed() -> int:
    """A seed from the system's entropy, for answers that must not be foreseen (PREDICT)."""
    return secrets.randbits(64)


def image_id(name: str) -> int:
    """The 56-bit id of an image known by name, as `dataset:split:key`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=IMAGE_ID_BITS // 8).digest(), "big")


def content_digest(image: Tensor) -> str:
    """A 56-bit hexadecimal digest of an image's shape and float32 values."""
    array = np.ascontiguousarray(image.detach().cpu().numpy(), dtype="<f4")
    return hashlib.blake2b(repr(array.shape).encode() + array.tobytes(), digest_size=IMAGE_ID_BITS // 8).hexdigest()


# --- words -----------------------------------------------------------------------------------------

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: tuple, key: tuple[int, int]) -> tuple:
    """Philox4x32 with ten rounds.

    Parameters
    ----------
    counter : four arrays (or integers) of 32-bit values, broadcast against each other; lowest word first.
    key : two 32-bit integers, lowest first.

    Returns
    -------
    Four uint64 arrays that hold 32-bit words.
    """
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _counter(purpose: int, image_id: int, samples: np.ndarray, blocks: np.ndarray) -> tuple:
    samples = samples.astype(np.uint64)[:, None]  # [n, 1]
    return (
        blocks.astype(np.uint64)[None, :] | (samples & np.uint64(0xFF)) << np.uint64(24),
        samples >> np.uint64(8),
        np.uint64(image_id & 0xFFFFFFFF),
        np.uint64(image_id >> 32 | purpose << 24),
    )


# --- normals ---------------------------------------------------------------------------------------

# Fits at Chebyshev nodes, rounded to float32; tests/test_noise.py makes them again. Highest power first.
# log1p(f) = f - f²/2 + f³ P(f) on [√½ - 1, √2 - 1]; cos t = 1 - t²/2 + t⁴ C(t²), sin t = t + t³ S(t²) on |t| <= π/4
LOG_COEFFICIENTS = (
    0.0697161183, -0.114797339, 0.116854198, -0.124256872, 0.142490581,
    -0.166678026, 0.200007156, -0.24999997, 0.333333313,
)  # fmt: skip
COS_COEFFICIENTS = (2.45479423e-05, -0.00138883025, 0.0416666642)
SIN_COEFFICIENTS = (-0.000195878907, 0.00833274797, -0.166666642)
_LN2_HIGH, _LN2_LOW = (
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)  # the first has few bits: its multiples are exact
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_NEAR_ONE = np.uint32(0xB504F334)  # words from here on give u >= √½
_HALF, _TWO_TO_MINUS_32 = np.float32(0.5), np.float32(2.0**-32)


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    value = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value *= x
        value += np.float32(c)
    return value


def _minus_log_uniform(words: np.ndarray) -> np.ndarray:
    """-ln((w + ½) / 2³²) as float32, for uint32 words."""
    near_one = words >= _NEAR_ONE
    # 1 - u is exact in integers; taking it from a rounded u would lose the digits of small radii
    f_near = -(((~words).astype(np.float32) + _HALF) * _TWO_TO_MINUS_32)
    bits = (words.astype(np.float32) + _HALF).view(np.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> np.int32(23)
    mantissa = (bits - (exponent << np.int32(23))).view(np.float32)  # in [√½, √2)
    f = np.where(near_one, f_near, mantissa - np.float32(1))
    k = np.where(near_one, np.float32(0), (exponent - np.int32(32)).astype(np.float32))
    square = f * f
    log1p = f - (_HALF * square - square * f * _polynomial(f, LOG_COEFFICIENTS))
    return -(k * _LN2_HIGH) - (k * _LN2_LOW + log1p)


def _cos_sin_turn(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of 2π (w + ½) / 2³² as float32, for uint32 words."""
    quadrant = (words + np.uint32(1 << 29)) >> np.uint32(30)  # nearest quarter turn, modulo 4
    remainder = (words - (quadrant << np.uint32(30))).view(np.int32)  # [-2²⁹, 2²⁹)
    t = (remainder.astype(np.float32) + _HALF) * np.float32(2 * np.pi * 2.0**-32)  # |t| <= π/4
    square = t * t
    cos = np.float32(1) - (_HALF * square - square * square * _polynomial(square, COS_COEFFICIENTS))
    sin = t + t * square * _polynomial(square, SIN_COEFFICIENTS)
    odd = (quadrant & np.uint32(1)).astype(bool)
    cos, sin = np.where(odd, sin, cos), np.where(odd, cos, sin)
    cos = np.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = np.where(quadrant >= 2, -sin, sin)
    return cos, sin


def box_muller(radius_words: np.ndarray, angle_words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two standard normals (float32) from each pair of uint32 words."""
    radius = np.sqrt(np.float32(2) * _minus_log_uniform(radius_words))
    cos, sin = _cos_sin_turn(angle_words)
    return radius * cos, radius * sin


def standard_normal(
    num_pixels: int, *, seed: int, purpose: Purpose, image_id: int, start: int, stop: int
) -> np.ndarray:
    """Standard normals for samples start..stop-1 of one image: `standard_normal_reference`, by the faster road.

    Returns
    -------
    float32 array [stop - start, num_pixels]; entry (i, p) depends only on (seed, purpose, image_id, start + i, p).

    Raises
    ------
    ValueError
        If an argument does not fit into its bits of the counter.
    """
    _check_counter(num_pixels, seed, purpose, image_id, start, stop)
    counter = dict(seed=seed, purpose=purpose, image_id=image_id, start=start)
    kernels = _kernels() if num_pixels >= KERNEL_PIXELS else None
    if kernels is None:
        return standard_normal_reference(num_pixels, stop=stop, **counter)
    out = np.empty((stop - start, num_pixels), dtype=np.float32)
    kernels.standard_normal_into(out, threads=torch.get_num_threads(), **counter)
    return out


def standard_normal_reference(
    num_pixels: int, *, seed: int, purpose: Purpose, image_id: int, start: int, stop: int
) -> np.ndarray:
    """The bits of `standard_normal` by definition, in NumPy."""
    _check_counter(num_pixels, seed, purpose, image_id, start, stop)
    blocks = np.arange(-(-num_pixels // 4))
    out = np.empty((stop - start, 4 * len(blocks)), dtype=np.float32)
    rows = max(1, 16_384 // len(blocks))  # a working set that stays in the cache
    for low in range(0, stop - start, rows):
        samples = np.arange(start + low, min(start + low + rows, stop))
        counter = _counter(int(purpose), image_id, samples, blocks)
        words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
        w0, w1, w2, w3 = (w.astype(np.uint32) for w in words)
        chunk = out[low : low + rows].reshape(len(samples), len(blocks), 4)
        chunk[..., 0], chunk[..., 1] = box_muller(w0, w1)
        chunk[..., 2], chunk[..., 3] = box_muller(w2, w3)
    return out[:, :num_pixels]


def _check_counter(num_pixels: int, seed: int, purpose: int, image_id: int, start: int, stop: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    if not 0 <= purpose < 2**8:
        raise ValueError(f"purpose must lie in [0, 256), got {purpose}; use smoothkit.noise.Purpose")
    if not 0 <= image_id < 2**IMAGE_ID_BITS:
        raise ValueError(
            f"image_id must lie in [0, 2**56), got {image_id}; make one with smoothkit.noise.image_id(name)"
        )
    if not 0 <= start <= stop <= MAX_SAMPLE:
        raise ValueError(f"samples must satisfy 0 <= start <= stop <= 2**40, got start={start}, stop={stop}")
    if not 0 < num_pixels <= MAX_PIXELS:
        raise ValueError(f"an image must have 1 to {MAX_PIXELS} values, got {num_pixels}")


# --- noisy copies ----------------------------------------------------------------------------------


def noisy_copies(
    image: Tensor, *, sigma: float, seed: int, purpose: Purpose, image_id: int, start: int, stop: int, grid: int | None
) -> Tensor:
    """Noisy copies start..stop-1 of one image.

    With a `grid` g the image's values are multiples of 1/g, and the noise is rounded to multiples of
    1/g before it is added. A float sum would be rounded in a way that depends on the image, and a
    classifier that reads those last bits can be certified falsely (Voráček and Hein, "Sound Randomized
    Smoothing in Floating-Point Arithmetic", ICLR 2023); rounding noise alone is part of a fixed base
    classifier, to which the theorem applies with the same sigma for adversarial images on the grid.

    Parameters
    ----------
    image : float32 tensor [C, H, W] on [0, 1].
    sigma : standard deviation in pixel units on [0, 1], above 0.
    grid : int or None
        Number of steps from 0 to 1, or None for float noise.

    Returns
    -------
    float32 tensor [stop - start, C, H, W] on the CPU; not clipped.
    """
    counter = dict(seed=seed, purpose=purpose, image_id=image_id, start=start)
    kernels = _kernels() if image.numel() >= KERNEL_PIXELS else None
    if kernels is None or image.dtype != torch.float32 or grid == 0:  # the kernel's 0 means None
        return noisy_copies_reference(image, sigma=sigma, stop=stop, grid=grid, **counter)
    _check_counter(image.numel(), seed, purpose, image_id, start, stop)
    out = np.empty((stop - start, image.numel()), dtype=np.float32)
    kernels.noisy_copies_into(
        out,
        image.detach().cpu().reshape(-1).numpy(),
        scale=_float32_at_least(sigma * (grid or 1)),
        grid=grid or 0,
        threads=torch.get_num_threads(),
        **counter,
    )
    return torch.from_numpy(out).reshape(stop - start, *image.shape)


def noisy_copies_reference(
    image: Tensor, *, sigma: float, seed: int, purpose: Purpose, image_id: int, start: int, stop: int, grid: int | None
) -> Tensor:
    """The bits of `noisy_copies` by definition, in NumPy."""
    z = standard_normal_reference(image.numel(), seed=seed, purpose=purpose, image_id=image_id, start=start, stop=stop)
    flat = image.detach().cpu().reshape(1, -1).numpy()
    if grid is None:
        noisy = flat + _float32_at_least(sigma) * z
    else:
        steps = np.rint(_float32_at_least(sigma * grid) * z)
        noisy = (np.rint(flat * np.float32(grid)) + steps) / np.float32(grid)
    return torch.from_numpy(noisy).reshape(stop - start, *image.shape)


def _float32_at_least(value: float) -> np.float32:
    """The noise is never weaker than stated: its scale is rounded up to float32."""
    rounded = np.float32(value)
    return rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(np.inf))


def off_grid(image: Tensor, grid: int) -> float:
    """The largest distance of a pixel value from the grid, in grid steps."""
    scaled = image.double() * grid
    return float((scaled - scaled.round()).abs().max())


# --- the road --------------------------------------------------------------------------------------


# Loading numba takes seconds; below this size the noise is a small share of any forward pass.
KERNEL_PIXELS = 1024


def road(num_pixels: int = 3 * 32 * 32) -> str:
    """What makes the noise of images of this size here, "numba" or "numpy"; the bits are the same."""
    return "numba" if num_pixels >= KERNEL_PIXELS and _kernels() is not None else "numpy"


@functools.cache
def _kernels() -> ModuleType | None:
    """The compiled kernels; None without numba, or where SMOOTHKIT_NO_KERNELS is set to anything but 0."""
    if os.environ.get("SMOOTHKIT_NO_KERNELS", "0") not in ("", "0"):
        return None
    try:
        from smoothkit.kernels import noise_cpu

        if _same_bits(noise_cpu):
            return noise_cpu
        problem = "gives other bits on this machine; please report it"
    except ModuleNotFoundError:
        return None
    except Exception as error:
        problem = f"does not work here: {error}"
    warnings.warn(f"the noise is made by NumPy, since the kernel compiled by numba {problem}", stacklevel=4)
    return None


def _same_bits(kernels: ModuleType) -> bool:
    """Whether the kernel's bits are the reference's, on some thousand values.

    A compiler that fuses multiplications with additions changes about one normal in a hundred.
    """
    n, num_pixels = 64, 67
    counter = dict(seed=2**63 + 1, purpose=Purpose.PILOT, image_id=2**55 + 1, start=2**33)
    z = standard_normal_reference(num_pixels, stop=2**33 + n, **counter)
    image = np.linspace(0, 1, num_pixels, dtype=np.float32)
    expected = [
        z,
        image + np.float32(0.3) * z,
        (np.rint(image * np.float32(255)) + np.rint(np.float32(76.5) * z)) / np.float32(255),
    ]
    made = np.full((3, n, num_pixels), np.nan, dtype=np.float32)
    kernels.standard_normal_into(made[0], **counter)
    kernels.noisy_copies_into(made[1], image, scale=np.float32(0.3), grid=0, **counter)
    kernels.noisy_copies_into(made[2], image, scale=np.float32(76.5), grid=255, **counter)
    return np.array_equal(made.view(np.uint32), np.stack(expected).view(np.uint32))
