"""Random words and normals from a counter: the definition in NumPy, and the constants of every kernel.

`smoothkit.kernels.noise` explains the format.
"""

import enum
import hashlib
import math
import secrets
from collections.abc import Iterator

import numpy as np
from torch import Tensor

MAX_PIXELS = 4 * 2**24
MAX_SAMPLE = 2**40
IMAGE_ID_BITS = 56
DIGEST_BITS = 128
OFF_GRID = 1e-3  # steps; more than float32 images of a grid are off it


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


def content_digest(image: Tensor, bits: int = DIGEST_BITS) -> str:
    """A hexadecimal digest of an image's shape and float32 values; no two images can be made to share one of 128 bits.

    Records of earlier versions hold digests of 56 bits, which are no part of those of 128.
    """
    array = np.ascontiguousarray(image.detach().cpu().numpy(), dtype="<f4")
    return hashlib.blake2b(repr(array.shape).encode() + array.tobytes(), digest_size=bits // 8).hexdigest()


# --- words -----------------------------------------------------------------------------------------

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


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
    k0, k1 = map(np.uint64, key)
    for _ in range(10):
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> SHIFT) ^ c1 ^ k0, product1 & LOW, (product0 >> SHIFT) ^ c3 ^ k1, product0 & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def signed_bits(value: int) -> int:
    """The int64 that has the bits of a uint64, such as a seed: what an operator of PyTorch can take."""
    if not 0 <= value < 2**64:
        raise ValueError(f"value must lie in [0, 2**64), got {value}")
    return int(value) - 2**64 if value >= 2**63 else int(value)


def counter_word(purpose: int, image_id: int) -> int:
    """The upper half of the counter, image_id | purpose << 56, as the int64 with these bits: `rows[1]` of `noisy_rows`."""
    if not 0 <= purpose < 2**8:
        raise ValueError(f"purpose must lie in [0, 256), got {purpose}; use smoothkit.Purpose")
    if not 0 <= image_id < 2**IMAGE_ID_BITS:
        raise ValueError(
            f"image_id must lie in [0, 2**56), got {image_id}; make one with smoothkit.kernels.philox.image_id(name)"
        )
    return signed_bits(int(image_id) | int(purpose) << IMAGE_ID_BITS)


def rows_of_one_image(num_pixels: int, *, seed: int, purpose: int, image_id: int, start: int, stop: int) -> np.ndarray:
    """The `rows` of `noisy_rows` for samples start..stop-1 of the first image, int64 [3, stop - start].

    Raises
    ------
    ValueError
        If an argument does not fit into its bits of the counter.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    word = counter_word(purpose, image_id)
    if not 0 <= start <= stop <= MAX_SAMPLE:
        raise ValueError(f"samples must satisfy 0 <= start <= stop <= 2**40, got start={start}, stop={stop}")
    if not 0 < num_pixels <= MAX_PIXELS:
        raise ValueError(f"an image must have 1 to {MAX_PIXELS} values, got {num_pixels}")
    rows = np.zeros((3, stop - start), dtype=np.int64)
    rows[1], rows[2] = word, np.arange(start, stop)
    return rows


def _counter(words: np.ndarray, samples: np.ndarray, blocks: np.ndarray) -> tuple:
    """The counter, lowest word first, of rows with these counter words and samples [n]: uint64 [n or 1, blocks or 1]."""
    words, samples = words.astype(np.uint64)[:, None], samples.astype(np.uint64)[:, None]
    low = blocks.astype(np.uint64)[None, :] | (samples & np.uint64(0xFF)) << np.uint64(24)
    return low, samples >> np.uint64(8), words & LOW, words >> SHIFT


def random_words(
    seed: int, words: np.ndarray, samples: np.ndarray, num_blocks: int
) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """The four random words of each pixel block, uint32 [rows, num_blocks], for one slice of the rows after another."""
    step = max(1, 16_384 // num_blocks)  # a working set that stays in the cache
    for low in range(0, len(words), step):
        rows = slice(low, low + step)
        counter = _counter(words[rows], samples[rows], np.arange(num_blocks))
        yield rows, [w.astype(np.uint32) for w in philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))]


# --- normals ---------------------------------------------------------------------------------------

# Fits at Chebyshev nodes, rounded to float32; tests/kernels/test_noise.py makes them again. Highest power first.
# log1p(f) = f - f²/2 + f³ P(f) on [√½ - 1, √2 - 1]; cos t = 1 - t²/2 + t⁴ C(t²), sin t = t + t³ S(t²) on |t| <= π/4
LOG_COEFFICIENTS = tuple(map(np.float32, (
    0.0697161183, -0.114797339, 0.116854198, -0.124256872, 0.142490581,
    -0.166678026, 0.200007156, -0.24999997, 0.333333313,
)))  # fmt: skip
COS_COEFFICIENTS = tuple(map(np.float32, (2.45479423e-05, -0.00138883025, 0.0416666642)))
SIN_COEFFICIENTS = tuple(map(np.float32, (-0.000195878907, 0.00833274797, -0.166666642)))
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # multiples of the first are exact
SQRT_HALF_BITS = np.int32(0x3F3504F3)
NEAR_ONE = np.uint32(0xB504F334)  # words from here on give u >= √½
TWO_TO_MINUS_32, TURN = np.float32(2.0**-32), np.float32(2 * math.pi * 2.0**-32)


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    value = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value *= x
        value += c
    return value


def _minus_log_uniform(words: np.ndarray) -> np.ndarray:
    """-ln((w + ½) / 2³²) as float32, for uint32 words."""
    near_one = words >= NEAR_ONE
    # 1 - u is exact in integers; taking it from a rounded u would lose the digits of small radii
    f_near = -(((~words).astype(np.float32) + 0.5) * TWO_TO_MINUS_32)
    bits = (words.astype(np.float32) + 0.5).view(np.int32)
    exponent = (bits - SQRT_HALF_BITS) >> np.int32(23)
    mantissa = (bits - (exponent << np.int32(23))).view(np.float32)  # in [√½, √2)
    f = np.where(near_one, f_near, mantissa - 1)
    k = np.where(near_one, np.float32(0), (exponent - np.int32(32)).astype(np.float32))
    square = f * f
    log1p = f - (0.5 * square - square * f * _polynomial(f, LOG_COEFFICIENTS))
    return -(k * LN2_HIGH) - (k * LN2_LOW + log1p)


def _cos_sin_turn(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of 2π (w + ½) / 2³² as float32, for uint32 words."""
    quadrant = (words + np.uint32(1 << 29)) >> np.uint32(30)  # nearest quarter turn, modulo 4
    remainder = (words - (quadrant << np.uint32(30))).view(np.int32)  # [-2²⁹, 2²⁹)
    t = (remainder.astype(np.float32) + 0.5) * TURN  # |t| <= π/4
    square = t * t
    cos = 1 - (0.5 * square - square * square * _polynomial(square, COS_COEFFICIENTS))
    sin = t + t * square * _polynomial(square, SIN_COEFFICIENTS)
    odd = (quadrant & np.uint32(1)).astype(bool)
    cos, sin = np.where(odd, sin, cos), np.where(odd, cos, sin)
    cos = np.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = np.where(quadrant >= 2, -sin, sin)
    return cos, sin


def box_muller(radius_words: np.ndarray, angle_words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two standard normals (float32) from each pair of uint32 words."""
    radius = np.sqrt(2 * _minus_log_uniform(radius_words))
    cos, sin = _cos_sin_turn(angle_words)
    return radius * cos, radius * sin


def normals(num_pixels: int, seed: int, words: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Standard normals, float32 [n, num_pixels], of rows with these counter words and samples, int64 or uint64 [n]."""
    blocks = -(-num_pixels // 4)
    out = np.empty((len(words), blocks, 4), dtype=np.float32)
    for rows, (w0, w1, w2, w3) in random_words(seed, words, samples, blocks):
        out[rows, :, 0], out[rows, :, 1] = box_muller(w0, w1)
        out[rows, :, 2], out[rows, :, 3] = box_muller(w2, w3)
    return out.reshape(len(words), 4 * blocks)[:, :num_pixels]


def off_grid(image: Tensor, grid: int) -> float:
    """The largest distance of a pixel value from the grid, in grid steps."""
    scaled = image.double() * grid
    return float((scaled - scaled.round()).abs().max())
