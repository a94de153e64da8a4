"""The noise of `smoothkit.kernels.noise` on a CPU, compiled by numba: the same bits, sooner.

A loop over pixel blocks holds the whole recipe, so that the compiler turns sixteen (or eight, or four) blocks
at a time into vector instructions. Every float operation is float32 and rounded once: `fastmath` stays off, as it
would fuse a multiplication with an addition.

Rows are shared out over plain Python threads that release the interpreter lock. Numba's own parallel
loops would end a process that forks after the first of them (GNU OpenMP), or one that calls them from
two threads (its work queue); these threads live for one call and leave nothing behind.
"""

import collections
import math
import threading
from collections.abc import Callable

import numpy as np
import torch
from numba import boolean, config, float32, int64, njit, types, uint16, uint64, void

from smoothkit.kernels.philox import (
    COS_COEFFICIENTS,
    KEY_STEPS,
    LN2_HIGH,
    LN2_LOW,
    LOG_COEFFICIENTS,
    LOW,
    MULTIPLIERS,
    NEAR_ONE,
    SHIFT,
    SIN_COEFFICIENTS,
    SQRT_HALF_BITS,
    TURN,
    TWO_TO_MINUS_32,
)

PIECE = 2**18  # values a thread takes at a time; with less than that for each, one thread is sooner done
TILE = 4096  # values worked on at a time: with the image and the output they stay in the cache

# Numba compiles constants in, each of the type it has here: a Python float would make an expression float64. Its cache
# does not see changes of philox.py; `noise` compares the bits of whatever was loaded.
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = LOG_COEFFICIENTS
_C0, _C1, _C2 = COS_COEFFICIENTS
_S0, _S1, _S2 = SIN_COEFFICIENTS
_MULTIPLIER_0, _MULTIPLIER_1 = MULTIPLIERS
_KEY_STEP_0, _KEY_STEP_1 = KEY_STEPS
_ZERO, _HALF, _ONE, _TWO = map(np.float32, (0, 0.5, 1, 2))


@njit(forceinline=True)
def _philox4x32(c0, c1, c2, c3, k0, k1):
    # 64-bit lanes, of which the lower halves count
    for _ in range(10):
        product0, product1 = _MULTIPLIER_0 * (c0 & LOW), _MULTIPLIER_1 * (c2 & LOW)
        c0, c1, c2, c3 = (product1 >> SHIFT) ^ c1 ^ k0, product1, (product0 >> SHIFT) ^ c3 ^ k1, product0
        k0, k1 = (k0 + _KEY_STEP_0) & LOW, (k1 + _KEY_STEP_1) & LOW
    return np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)


# numba widens the sum of two 32-bit integers to 64 bits: each is cut back by hand
@njit(forceinline=True)
def _box_muller(radius_word, angle_word):
    # -ln u
    bits = np.float32(np.float32(radius_word) + _HALF).view(np.int32)
    exponent = np.int32(np.int32(bits - SQRT_HALF_BITS) >> np.int32(23))
    mantissa = np.int32(bits - np.int32(exponent << np.int32(23))).view(np.float32)
    near_one = radius_word >= NEAR_ONE
    f_near = -((np.float32(np.uint32(~radius_word)) + _HALF) * TWO_TO_MINUS_32)
    f = f_near if near_one else mantissa - _ONE
    k = _ZERO if near_one else np.float32(np.int32(exponent - np.int32(32)))
    square = f * f
    p = ((((((((_L0 * f + _L1) * f + _L2) * f + _L3) * f + _L4) * f + _L5) * f + _L6) * f + _L7) * f) + _L8
    log1p = f - (_HALF * square - square * f * p)
    minus_log = -(k * LN2_HIGH) - (k * LN2_LOW + log1p)
    radius = math.sqrt(_TWO * minus_log)
    # cosine and sine of the turn
    quadrant = np.uint32(np.uint32(angle_word + np.uint32(1 << 29)) >> np.uint32(30))
    remainder = np.int32(np.uint32(angle_word - np.uint32(quadrant << np.uint32(30))))
    t = (np.float32(remainder) + _HALF) * TURN
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
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
    return rounded if value == value else np.uint16(0x7FC0)


def _noisy_rows(
    out, halves, images, indices, words, samples, scales, low, high, grid, mean, std, planes, last, tile, k0, k1
):
    """Rows low..high-1 of `out`, or of `halves` if that has columns: what `noisy_rows` says."""
    plane = images.shape[1] // planes
    width = min(plane, max(4, tile // planes // 4 * 4))
    scratch = np.empty(width + 4, dtype=np.float32)  # a piece of one plane, near enough to stay in the L1 cache
    for i in range(low, high):
        if indices[i] < 0:
            out[i, :] = _ZERO
            halves[i, :] = np.uint16(0)
            continue
        image, scale = images[indices[i]], scales[i]
        image_low, image_high = words[i] & LOW, words[i] >> SHIFT
        for begin in range(0, plane, width):
            n = min(width, plane - begin)
            # all planes of a piece in turn: interleaved, they fill the same cache lines
            for c in range(planes):
                first = c * plane + begin
                extra = first % 4  # pixel blocks count from the image's first value, whatever the piece
                straight = not (last or halves.shape[1] or extra)
                v = out[i, first : first + n] if straight else scratch[: extra + n]
                _normals(v, np.uint64(first // 4), samples[i], image_low, image_high, k0, k1)
                v, x = v[extra:], image[first : first + n]
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
                elif not straight:
                    o = out[i, first : first + n]
                    for j in range(n):
                        o[j] = v[j]


if config.DISABLE_JIT:
    raise RuntimeError("NUMBA_DISABLE_JIT is set, and not compiled this is slower than NumPy")


def _compiled(function: Callable, signature: types.Type) -> Callable:
    """Compiled on import, or read from numba's cache: beside the module, else in the user's cache folder."""
    options = dict(nogil=True, fastmath=False, error_model="numpy")
    try:
        return njit(signature, cache=True, **options)(function)
    except Exception:  # no folder that can be written to, a full disk, a damaged cache
        return njit(signature, **options)(function)


_fill_rows = _compiled(
    _noisy_rows,
    void(
        *(float32[:, ::1], uint16[:, ::1], float32[:, ::1]),
        *(int64[::1], uint64[::1], uint64[::1], float32[::1], int64, int64),
        *(float32, float32[::1], float32[::1], int64, boolean, int64, uint64, uint64),
    ),
)


def noisy_rows_into(out, images, rows, scale, seed, grid, mean=None, std=None, *, threads=None, tile=TILE) -> None:
    """Fill `out` as `smoothkit.kernels.noise.noisy_rows` says, which has checked the tensors; they lie on the CPU.

    The work is shared by so many threads, by default as many as PyTorch has; each makes some `tile` values at a time.
    """
    n, num_planes, num_pixels = *out.shape[:2], math.prod(out.shape[1:])
    channels_last = not out.is_contiguous()
    memory = (out.permute(0, 2, 3, 1) if channels_last else out).view(n, num_pixels)
    floats, halves = np.empty((n, 0), dtype=np.float32), np.empty((n, 0), dtype=np.uint16)
    if out.dtype == torch.bfloat16:
        halves = memory.view(torch.int16).numpy().view(np.uint16)
    else:
        floats = memory.numpy()
    rows = rows.numpy()
    what = (images.view(len(images), num_pixels).numpy(), rows[0], *rows[1:].view(np.uint64), scale.numpy())
    norm = np.empty((2, 0), dtype=np.float32) if mean is None else (mean.numpy(), std.numpy())
    seed %= 2**64
    key = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    how = (np.float32(grid), *norm, num_planes, channels_last, tile, *key)
    threads = torch.get_num_threads() if threads is None else threads
    _in_pieces(lambda low, high: _fill_rows(floats, halves, *what, low, high, *how), n, num_pixels, threads)


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
