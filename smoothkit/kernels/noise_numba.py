"""The noise of `smoothkit.kernels.noise` on a CPU, compiled by numba: the same bits, sooner.

`smoothkit.kernels.noise` explains the format and is the reference. Here a loop over pixel blocks holds the
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
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import boolean, float32, int64, njit, types, uint16, uint64, void
from numba.extending import intrinsic

PIECE = 2**18  # values a thread takes at a time; with less than that for each, one thread is sooner done

# as in smoothkit.kernels.philox, highest power first
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
_NOTHING = np.zeros(0, dtype=np.float32)
TILE = 4096  # values worked on at a time: with the image and the output they stay in the cache


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


@njit(nogil=True, fastmath=False, error_model="numpy")
def _normals(out, block, sample, image_low, image_high, k0, k1):
    """Fill `out`, float32 [num_values], with the normals of one sample, from pixel block `block` on."""
    left = len(out) % 4
    for b in range(len(out) // 4):
        z0, z1, z2, z3 = _block(block + np.uint64(b), sample, image_low, image_high, k0, k1)
        out[4 * b] = z0
        out[4 * b + 1] = z1
        out[4 * b + 2] = z2
        out[4 * b + 3] = z3
    if left:
        z = _block(block + np.uint64(len(out) // 4), sample, image_low, image_high, k0, k1)
        for j in range(left):
            out[len(out) - left + j] = z[j]


@njit(forceinline=True)
def _bfloat16_bits(value):
    """A float32 rounded to the nearest bfloat16, ties to even; any NaN becomes torch's."""
    bits = np.uint32(_bits_of(value))
    odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
    return rounded if value == value else np.uint16(0x7FC0)


def _standard_normals(out, low, high, start, image_low, image_high, k0, k1):
    """Rows low..high-1 of `out`: plain normals."""
    for i in range(low, high):
        _normals(out[i], np.uint64(0), start + np.uint64(i), image_low, image_high, k0, k1)


def _noisy_rows(
    out, halves, images, indices, words, samples, scales, low, high, grid, mean, std, planes, last, tile, k0, k1
):
    """Rows low..high-1 of `out`, or of `halves` if that has columns: what `noisy_rows_into` says."""
    plane = images.shape[1] // planes
    width = min(plane, max(4, tile // planes // 4 * 4))
    scratch = np.empty(width + 4, dtype=np.float32)  # a piece of one plane, near enough to stay in the L1 cache
    for i in range(low, high):
        if indices[i] < 0:
            out[i, :] = _ZERO
            halves[i, :] = np.uint16(0)
            continue
        image, scale = images[indices[i]], scales[i]
        image_low, image_high = words[i] & _LOW, words[i] >> _SHIFT
        for begin in range(0, plane, width):
            n = min(width, plane - begin)
            # all planes of a piece in turn: interleaved, they fill the same cache lines
            for c in range(planes):
                first = c * plane + begin
                extra = first % 4  # pixel blocks count from the image's first value, whatever the piece
                _normals(scratch[: extra + n], np.uint64(first // 4), samples[i], image_low, image_high, k0, k1)
                v, x = scratch[extra : extra + n], image[first : first + n]
                if grid == _ZERO:
                    for j in range(n):
                        v[j] = x[j] + scale * v[j]
                else:
                    for j in range(n):
                        v[j] = (np.rint(x[j] * grid) + np.rint(scale * v[j])) / grid
                if len(mean):
                    m, s = mean[c], std[c]
                    for j in range(n):
                        v[j] = (v[j] - m) / s
                # slices, as an index like first + j would be checked for a negative sign, one value at a time
                if halves.shape[1]:
                    if last:
                        h = halves[i, begin * planes + c :: planes]
                        for j in range(n):
                            h[j] = _bfloat16_bits(v[j])
                    else:
                        h = halves[i, first : first + n]
                        for j in range(n):
                            h[j] = _bfloat16_bits(v[j])
                elif last:
                    o = out[i, begin * planes + c :: planes]
                    for j in range(n):
                        o[j] = v[j]
                else:
                    o = out[i, first : first + n]
                    for j in range(n):
                        o[j] = v[j]


def _compiled(function, signature):
    """Compiled on import, or read from numba's cache: beside the module, else in the user's cache folder."""
    options = dict(nogil=True, fastmath=False, error_model="numpy")
    try:
        return njit(signature, cache=True, **options)(function)
    except Exception:  # no folder that can be written to, a full disk, a damaged cache
        return njit(signature, **options)(function)


_fill_normals = _compiled(
    _standard_normals, void(float32[:, ::1], int64, int64, uint64, uint64, uint64, uint64, uint64)
)
_fill_rows = _compiled(
    _noisy_rows,
    void(
        *(float32[:, ::1], uint16[:, ::1], float32[:, ::1]),
        *(int64[::1], uint64[::1], uint64[::1], float32[::1], int64, int64),
        *(float32, float32[::1], float32[::1], int64, boolean, int64, uint64, uint64),
    ),
)


def _in_pieces(fill: Callable[[int, int], None], n: int, num_pixels: int, threads: int) -> None:
    """Call fill(low, high) for pieces that cover rows 0..n-1, in up to so many threads."""
    rows = max(1, PIECE // max(1, num_pixels))
    # taken one by one: torch's own threads may still spin on the other cores, and a thread beside one is slow
    pieces = collections.deque((low, min(low + rows, n)) for low in range(0, n, rows))

    def work() -> None:
        while True:
            try:
                low, high = pieces.popleft()
            except IndexError:
                return
            fill(low, high)

    threads = min(threads, len(pieces), n * num_pixels // PIECE)
    others = [threading.Thread(target=work) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()


def _key(seed: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)


def standard_normal_into(
    out: np.ndarray, *, seed: int, purpose: int, image_id: int, start: int, threads: int = 1
) -> None:
    """Fill `out`, float32 [n, num_pixels], with the normals of samples start..start+n-1.

    The arguments must fit their bits of the counter, as `smoothkit.kernels.noise.standard_normal` checks.
    """
    words = (start, image_id & 0xFFFFFFFF, image_id >> 32 | int(purpose) << 24)
    counter = (*map(np.uint64, words), *_key(seed))
    _in_pieces(lambda low, high: _fill_normals(out, low, high, *counter), *out.shape, threads)


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
    n = len(out)
    rows = np.zeros((3, n), dtype=np.uint64)
    rows[1] = image_id | int(purpose) << 56
    rows[2] = np.arange(start, start + n, dtype=np.uint64)
    image = np.ascontiguousarray(image)[None]
    noisy_rows_into(
        out, image, rows.view(np.int64), np.full(n, scale, np.float32), seed=seed, grid=grid, threads=threads
    )


def noisy_rows_into(
    out: np.ndarray,
    images: np.ndarray,
    rows: np.ndarray,
    scale: np.ndarray,
    *,
    seed: int,
    grid: int,
    mean: np.ndarray | None = None,
    std: np.ndarray | None = None,
    planes: int = 1,
    channels_last: bool = False,
    threads: int = 1,
    tile: int = TILE,
) -> None:
    """Fill `out` [B, num_pixels] with noisy copies of rows of `images`, float32 [M, num_pixels].

    The values are those of `smoothkit.kernels.noise.noisy_rows`, which also says what `rows` int64 [3, B], `scale`,
    `mean` and `std` float32 hold, and has checked them. `out` is float32, or uint16 for the bits of bfloat16; with
    `channels_last` the `planes` values of a pixel lie side by side in it. About `tile` values are made at a time.
    """
    n, num_pixels = out.shape
    if images.shape[1] != num_pixels:
        raise ValueError(f"image must have {num_pixels} values, one for each column of out, got {images.shape[1]}")
    if num_pixels % planes:
        raise ValueError(f"planes must divide the {num_pixels} values of an image, got {planes}")
    rows = np.ascontiguousarray(rows)
    others = np.empty((n, 0), dtype=np.uint16 if out.dtype == np.float32 else np.float32)
    outs = (out, others) if out.dtype == np.float32 else (others, out)
    what = (images, rows[0], rows[1].view(np.uint64), rows[2].view(np.uint64), np.ascontiguousarray(scale))
    norm = (_NOTHING, _NOTHING) if mean is None else (mean, std)
    how = (np.float32(grid), *norm, planes, channels_last, tile, *_key(seed))
    _in_pieces(lambda low, high: _fill_rows(*outs, *what, low, high, *how), n, num_pixels, threads)


@njit(error_model="numpy")
def box_muller_into(z0, z1, radius_words, angle_words):
    """Two normals from each pair of uint32 words, for tests; compiled when called."""
    for i in range(len(z0)):
        z0[i], z1[i] = _box_muller(radius_words[i], angle_words[i])


@njit(error_model="numpy")
def bfloat16_bits_into(out, values):
    """The bits of float32 values rounded to bfloat16, for tests; compiled when called."""
    for i in range(len(values)):
        out[i] = _bfloat16_bits(values[i])
