"""Counter-based random words and normals: the format of the noise, in NumPy, the reference for every kernel."""

import enum
import hashlib
import secrets

import numpy as np
from torch import Tensor

MAX_PIXELS = 4 * 2**24
MAX_SAMPLE = 2**40
IMAGE_ID_BITS = 56
DIGEST_BITS = 128


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
    return _counter_of_words(np.array([image_id | int(purpose) << IMAGE_ID_BITS], dtype=np.uint64), samples, blocks)


def _counter_of_words(words: np.ndarray, samples: np.ndarray, blocks: np.ndarray) -> tuple:
    """For rows with counter words (uint64 [n] or [1]) and samples [n]: four arrays [n or 1, blocks or 1]."""
    words, samples = words.astype(np.uint64)[:, None], samples.astype(np.uint64)[:, None]
    return (
        blocks.astype(np.uint64)[None, :] | (samples & np.uint64(0xFF)) << np.uint64(24),
        samples >> np.uint64(8),
        words & _LOW,
        words >> _SHIFT,
    )


def counter_word(purpose: int, image_id: int) -> int:
    """The upper half of the counter, image_id | purpose << 56, as the int64 with these bits: `rows[1]` of `noisy_rows`."""
    _check_counter(1, 0, purpose, image_id, 0, 0)
    return signed_bits(image_id | int(purpose) << IMAGE_ID_BITS)


def signed_bits(value: int) -> int:
    """The int64 that has the bits of a uint64, such as a seed: what an operator of PyTorch can take."""
    if not 0 <= value < 2**64:
        raise ValueError(f"value must lie in [0, 2**64), got {value}")
    return value - 2**64 if value >= 2**63 else value


# --- normals ---------------------------------------------------------------------------------------

# Fits at Chebyshev nodes, rounded to float32; tests/kernels/test_noise.py makes them again. Highest power first.
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


def _normals_of_words(num_pixels: int, seed: int, words: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Standard normals, float32 [n, num_pixels], of rows with counter words and samples, uint64 [n]."""
    blocks = np.arange(-(-num_pixels // 4))
    out = np.empty((len(words), 4 * len(blocks)), dtype=np.float32)
    rows = max(1, 16_384 // len(blocks))  # a working set that stays in the cache
    for low in range(0, len(words), rows):
        counter = _counter_of_words(words[low : low + rows], samples[low : low + rows], blocks)
        w0, w1, w2, w3 = (w.astype(np.uint32) for w in philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)))
        chunk = out[low : low + rows].reshape(-1, len(blocks), 4)
        chunk[..., 0], chunk[..., 1] = box_muller(w0, w1)
        chunk[..., 2], chunk[..., 3] = box_muller(w2, w3)
    return out[:, :num_pixels]


def _check_counter(num_pixels: int, seed: int, purpose: int, image_id: int, start: int, stop: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    if not 0 <= purpose < 2**8:
        raise ValueError(f"purpose must lie in [0, 256), got {purpose}; use smoothkit.Purpose")
    if not 0 <= image_id < 2**IMAGE_ID_BITS:
        raise ValueError(
            f"image_id must lie in [0, 2**56), got {image_id}; make one with smoothkit.kernels.philox.image_id(name)"
        )
    if not 0 <= start <= stop <= MAX_SAMPLE:
        raise ValueError(f"samples must satisfy 0 <= start <= stop <= 2**40, got start={start}, stop={stop}")
    if not 0 < num_pixels <= MAX_PIXELS:
        raise ValueError(f"an image must have 1 to {MAX_PIXELS} values, got {num_pixels}")


def off_grid(image: Tensor, grid: int) -> float:
    """The largest distance of a pixel value from the grid, in grid steps."""
    scaled = image.double() * grid
    return float((scaled - scaled.round()).abs().max())
