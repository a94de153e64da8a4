"""The noise of `smoothkit.noise` on a CPU, compiled by numba: the same bits, sooner.

`smoothkit.noise` explains the format and is the reference. Here a loop over pixel blocks holds the
whole recipe, so that the compiler turns sixteen (or eight, or four) blocks at a time into vector
instructions. Every float operation is float32 and rounded once: `fastmath` stays off, as it would
fuse a multiplication with an addition.

Rows are shared out over plain Python threads that release the interpreter lock. Numba's own parallel
loops would end a process that forks after the first of them (GNU OpenMP), or one that calls them from
two threads (its work queue); these threads live for one call and leave nothing behind.
"""

import collections
import math
import threading

import numpy as np
from llvmlite import ir
from numba import float32, njit, types, uint64, void
from numba.extending import intrinsic

PIECE = 2**18  # values a thread takes at a time; with less than that for each, one thread is sooner done

# as in smoothkit.noise, highest power first
LOG_COEFFICIENTS = (
    0.0697161183, -0.114797339, 0.116854198, -0.124256872, 0.142490581,
    -0.166678026, 0.200007156, -0.24999997, 0.333333313,
)  # fmt: skip
COS_COEFFICIENTS = (2.45479423e-05, -0.00138883025, 0.0416666642)
SIN_COEFFICIENTS = (-0.000195878907, 0.00833274797, -0.166666642)

# float32 one by one: a Python float in an expression would make it float64
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (np.float32(c) for c in LOG_COEFFICIENTS)
_C0, _C1, _C2 = (np.float32(c) for c in COS_COEFFICIENTS)
_S0, _S1, _S2 = (np.float32(c) for c in SIN_COEFFICIENTS)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_TWO_TO_MINUS_32, _TURN = np.float32(2.0**-32), np.float32(2 * np.pi * 2.0**-32)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_NEAR_ONE = np.uint32(0xB504F334)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEP_0, _KEY_STEP_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_NO_IMAGE = np.zeros(0, dtype=np.float32)


@intrinsic
def _bits_of(typing_context, x):
    """The bits of a float32 as int32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@intrinsic
def _float_of(typing_context, bits):
    """The float32 that has these int32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@njit(forceinline=True)
def _philox4x32(c0, c1, c2, c3, k0, k1):
    # 64-bit lanes, of which the lower halves count
    for _ in range(10):
        product0, product1 = _MULTIPLIER_0 * (c0 & _LOW), _MULTIPLIER_1 * (c2 & _LOW)
        c0, c1, c2, c3 = (product1 >> _SHIFT) ^ c1 ^ k0, product1, (product0 >> _SHIFT) ^ c3 ^ k1, product0
        k0, k1 = (k0 + _KEY_STEP_0) & _LOW, (k1 + _KEY_STEP_1) & _LOW
    return np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)


# numba widens the sum of two 32-bit integers to 64 bits: each is cut back by hand
@njit(forceinline=True)
def _box_muller(radius_word, angle_word):
    # -ln u
    bits = _bits_of(np.float32(radius_word) + _HALF)
    exponent = np.int32(np.int32(bits - _SQRT_HALF_BITS) >> np.int32(23))
    mantissa = _float_of(np.int32(bits - np.int32(exponent << np.int32(23))))
    near_one = radius_word >= _NEAR_ONE
    f_near = -((np.float32(np.uint32(~radius_word)) + _HALF) * _TWO_TO_MINUS_32)
    f = f_near if near_one else mantissa - _ONE
    k = _ZERO if near_one else np.float32(np.int32(exponent - np.int32(32)))
    square = f * f
    p = ((((((((_L0 * f + _L1) * f + _L2) * f + _L3) * f + _L4) * f + _L5) * f + _L6) * f + _L7) * f) + _L8
    log1p = f - (_HALF * square - square * f * p)
    minus_log = -(k * _LN2_HIGH) - (k * _LN2_LOW + log1p)
    radius = math.sqrt(_TWO * minus_log)
    # cosine and sine of the turn
    quadrant = np.uint32(np.uint32(angle_word + np.uint32(1 << 29)) >> np.uint32(30))
    remainder = np.int32(np.uint32(angle_word - np.uint32(quadrant << np.uint32(30))))
    t = (np.float32(remainder) + _HALF) * _TURN
    square = t * t
    cos = _ONE - (_HALF * square - square * square * ((_C0 * square + _C1) * square + _C2))
    sin = t + t * square * ((_S0 * square + _S1) * square + _S2)
    odd = (quadrant & np.uint32(1)) != np.uint32(0)
    x, y = (sin if odd else cos), (cos if odd else sin)
    x = -x if (quadrant == np.uint32(1)) | (quadrant == np.uint32(2)) else x
    y = -y if quadrant >= np.uint32(2) else y
    return radius * x, radius * y


@njit(forceinline=True)
def _block(block, sample, image_low, image_high, k0, k1):
    """The four normals of a pixel block."""
    c0 = block | (sample & np.uint64(0xFF)) << np.uint64(24)
    w0, w1, w2, w3 = _philox4x32(c0, sample >> np.uint64(8), image_low, image_high, k0, k1)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


def _rows(out, image, scale, grid, start, image_low, image_high, k0, k1):
    """Fill the rows of `out`: plain normals if `image` is empty, else what `noisy_copies_into` says."""
    num_pixels = out.shape[1]
    left = num_pixels % 4
    for i in range(out.shape[0]):
        sample = start + np.uint64(i)
        for block in range(num_pixels // 4):
            z0, z1, z2, z3 = _block(np.uint64(block), sample, image_low, image_high, k0, k1)
            out[i, 4 * block] = z0
            out[i, 4 * block + 1] = z1
            out[i, 4 * block + 2] = z2
            out[i, 4 * block + 3] = z3
        if left:
            z = _block(np.uint64(num_pixels // 4), sample, image_low, image_high, k0, k1)
            for j in range(left):
                out[i, num_pixels - left + j] = z[j]
        if len(image) == 0:
            continue
        if grid == _ZERO:
            for p in range(num_pixels):
                out[i, p] = image[p] + scale * out[i, p]
        else:
            for p in range(num_pixels):
                out[i, p] = (image[p] + np.rint(scale * out[i, p])) / grid


def _compiled(function, signature):
    """Compiled on import, or read from numba's cache: beside the module, else in the user's cache folder."""
    options = dict(nogil=True, fastmath=False, error_model="numpy")
    try:
        return njit(signature, cache=True, **options)(function)
    except Exception:  # no folder that can be written to, a full disk, a damaged cache
        return njit(signature, **options)(function)


_fill_rows = _compiled(
    _rows, void(float32[:, ::1], float32[::1], float32, float32, uint64, uint64, uint64, uint64, uint64)
)


def _fill(out, image, scale, grid, seed, purpose, image_id, start, threads) -> None:
    n, num_pixels = out.shape
    rows = max(1, PIECE // num_pixels)
    # taken one by one: torch's own threads may still spin on the other cores, and a thread beside one is slow
    pieces = collections.deque((low, min(low + rows, n)) for low in range(0, n, rows))

    def work() -> None:
        while True:
            try:
                low, high = pieces.popleft()
            except IndexError:
                return
            words = start + low, image_id & 0xFFFFFFFF, image_id >> 32 | purpose << 24, seed & 0xFFFFFFFF, seed >> 32
            _fill_rows(out[low:high], image, np.float32(scale), np.float32(grid), *map(np.uint64, words))

    threads = min(threads, len(pieces), n * num_pixels // PIECE)
    others = [threading.Thread(target=work) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()


def standard_normal_into(
    out: np.ndarray, *, seed: int, purpose: int, image_id: int, start: int, threads: int = 1
) -> None:
    """Fill `out`, float32 [n, num_pixels], with the normals of samples start..start+n-1.

    The arguments must fit their bits of the counter, as `smoothkit.noise.standard_normal` checks.
    """
    _fill(out, _NO_IMAGE, 0, 0, seed, int(purpose), image_id, start, threads)


def noisy_copies_into(
    out: np.ndarray,
    image: np.ndarray,
    *,
    scale: np.float32,
    grid: int,
    seed: int,
    purpose: int,
    image_id: int,
    start: int,
    threads: int = 1,
) -> None:
    """Fill `out`, float32 [n, num_pixels], with noisy copies of `image`, float32 [num_pixels].

    With normals z: image + scale z if `grid` is 0, else (rint(image grid) + rint(scale z)) / grid, in float32.
    """
    if len(image) != out.shape[1]:
        raise ValueError(f"image must have {out.shape[1]} values, one for each column of out, got {len(image)}")
    values = np.rint(image * np.float32(grid)) if grid else np.ascontiguousarray(image)
    _fill(out, values, scale, grid, seed, int(purpose), image_id, start, threads)


@njit(error_model="numpy")
def box_muller_into(z0, z1, radius_words, angle_words):
    """Two normals from each pair of uint32 words, for tests; compiled when called."""
    for i in range(len(z0)):
        z0[i], z1[i] = _box_muller(radius_words[i], angle_words[i])
