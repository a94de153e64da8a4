"""The noise of `smoothkit.kernels.noise` on a CUDA device, by Triton: the same bits, written where the model reads them.

Every float operation is rounded once: multiplications are not fused with additions (`enable_fp_fusion=False` at the
launch), square roots and divisions are the exact ones, and what a GPU's instructions or Triton's interpreter would
round otherwise (to an integer, to bfloat16) is done on the bits.
"""

import torch
import triton
import triton.language as tl

from smoothkit.kernels import philox

BLOCKS = 256  # pixel blocks, of four values each, that one program makes
WARPS = 4

# a program reads constants only if they are marked as such
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (tl.constexpr(c.item()) for c in philox.LOG_COEFFICIENTS)
_C0, _C1, _C2 = (tl.constexpr(c.item()) for c in philox.COS_COEFFICIENTS)
_S0, _S1, _S2 = (tl.constexpr(c.item()) for c in philox.SIN_COEFFICIENTS)
_LN2_HIGH, _LN2_LOW = tl.constexpr(philox.LN2_HIGH.item()), tl.constexpr(philox.LN2_LOW.item())
_TWO_TO_MINUS_32, _TURN = tl.constexpr(philox.TWO_TO_MINUS_32.item()), tl.constexpr(philox.TURN.item())
_SQRT_HALF_BITS = tl.constexpr(philox.SQRT_HALF_BITS.item())
_NEAR_ONE = tl.constexpr(philox.NEAR_ONE.item())
_MAX_SAMPLE = tl.constexpr(philox.MAX_SAMPLE)
_INTEGERS = tl.constexpr(2.0**23)  # float32 values from here on are integers


@triton.jit
def _box_muller(radius_word, angle_word):
    """Two normals from two uint32 words, step by step as in `smoothkit.kernels.philox.box_muller`."""
    # -ln u
    bits = (radius_word.to(tl.float32) + 0.5).to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    near_one = radius_word >= _NEAR_ONE
    f_near = -(((~radius_word).to(tl.float32) + 0.5) * _TWO_TO_MINUS_32)
    f = tl.where(near_one, f_near, mantissa - 1.0)
    k = tl.where(near_one, 0.0, (exponent - 32).to(tl.float32))
    square = f * f
    p = ((((((((_L0 * f + _L1) * f + _L2) * f + _L3) * f + _L4) * f + _L5) * f + _L6) * f + _L7) * f) + _L8
    log1p = f - (0.5 * square - square * f * p)
    minus_log = -(k * _LN2_HIGH) - (k * _LN2_LOW + log1p)
    radius = tl.sqrt_rn(2.0 * minus_log)
    # cosine and sine of the turn
    quadrant = (angle_word + 0x20000000) >> 30
    remainder = (angle_word - (quadrant << 30)).to(tl.int32, bitcast=True)
    t = (remainder.to(tl.float32) + 0.5) * _TURN
    square = t * t
    cos = 1.0 - (0.5 * square - square * square * ((_C0 * square + _C1) * square + _C2))
    sin = t + t * square * ((_S0 * square + _S1) * square + _S2)
    odd = (quadrant & 1) != 0
    x, y = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    x = tl.where((quadrant == 1) | (quadrant == 2), -x, x)
    y = tl.where(quadrant >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def _rint(x):
    """To the nearest integer, ties to even, the sign of zero kept: adding 2**23 rounds what is below it."""
    bits = x.to(tl.int32, bitcast=True)
    size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    rounded = tl.where(size < _INTEGERS, (size + _INTEGERS) - _INTEGERS, size)
    sign = bits & -0x80000000
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _bfloat16_bits(x):
    """To the nearest bfloat16, ties to even, as int16 bits; any NaN becomes torch's."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit(do_not_specialize=["num_images", "batch", "seed", "grid"])
def _noisy_rows_kernel(
    out_ptr,  # [B, C, H, W] in the layout the strides say; float32, or int16 for the bits of bfloat16
    images_ptr,  # [num_images, C, H, W] float32
    rows_ptr,  # [3, B] int64: image, counter word, sample
    scale_ptr,  # [B] float32
    mean_ptr,  # [C] float32, read only if NORMALISE
    std_ptr,
    num_images: tl.int64,
    batch: tl.int64,
    seed: tl.int64,
    grid: tl.float32,
    NUM_PIXELS: tl.constexpr,
    PLANE: tl.constexpr,  # H * W
    CHANNEL_STRIDE: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr,
    ON_GRID: tl.constexpr,
    NORMALISE: tl.constexpr,
    BFLOAT16: tl.constexpr,
    BLOCKS: tl.constexpr,  # a power of two
):
    # one program makes 4 BLOCKS values of one row; int64 because a batch can pass 2**31 values
    programs: tl.constexpr = (NUM_PIXELS + 4 * BLOCKS - 1) // (4 * BLOCKS)
    row = tl.program_id(0).to(tl.int64) // programs
    block = (tl.program_id(0) % programs) * BLOCKS + tl.arange(0, BLOCKS)
    image = tl.load(rows_ptr + row)
    word = tl.load(rows_ptr + batch + row)
    sample = tl.load(rows_ptr + 2 * batch + row)
    scale = tl.load(scale_ptr + row)
    valid = (image >= 0) & (image < num_images) & (sample >= 0) & (sample < _MAX_SAMPLE)

    low = block.to(tl.uint32) | ((sample & 0xFF) << 24).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, (sample >> 8).to(tl.uint32), word.to(tl.uint32), (word >> 32).to(tl.uint32))
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCKS, 4))  # a block's normals side by side

    pixel = 4 * block[:, None] + tl.arange(0, 4)[None, :]
    inside = pixel < NUM_PIXELS
    readable = pixel < tl.where(valid, NUM_PIXELS, 0)
    x = tl.load(images_ptr + image * NUM_PIXELS + pixel, mask=readable, other=0.0)
    noise = scale * z
    if ON_GRID:
        steps = _rint(x * grid) + _rint(noise)
        value = tl.div_rn(steps, grid + tl.zeros_like(steps))
    else:
        value = x + noise
    # where planes hold whole blocks, a block has one channel
    channel = (4 * block // PLANE)[:, None] if PLANE % 4 == 0 else pixel // PLANE
    if NORMALISE:
        known = channel < NUM_PIXELS // PLANE
        mean = tl.load(mean_ptr + channel, mask=known, other=0.0)
        std = tl.load(std_ptr + channel, mask=known, other=1.0)
        value = tl.div_rn(value - mean, std + tl.zeros_like(value))
    value = tl.where(valid, value, tl.where(image == -1, 0.0, float("nan")))

    offset = channel * CHANNEL_STRIDE + (pixel - channel * PLANE) * PIXEL_STRIDE
    if BFLOAT16:
        tl.store(out_ptr + row * NUM_PIXELS + offset, _bfloat16_bits(value), mask=inside)
    else:
        tl.store(out_ptr + row * NUM_PIXELS + offset, value, mask=inside)


def noisy_rows_into(out, images, rows, scale, seed, grid, mean=None, std=None) -> None:
    """Fill `out` as `smoothkit.kernels.noise.noisy_rows` says, which has checked the arguments; waits for nothing."""
    batch, channels, height, width = out.shape
    num_pixels, plane = channels * height * width, height * width
    if batch == 0:
        return
    channels_last = not out.is_contiguous()
    with torch.cuda.device_of(out):
        _noisy_rows_kernel[(batch * triton.cdiv(num_pixels, 4 * BLOCKS),)](
            out.view(torch.int16) if out.dtype == torch.bfloat16 else out,
            images,
            rows.contiguous(),
            scale.contiguous(),
            images if mean is None else mean.contiguous(),
            images if std is None else std.contiguous(),
            len(images),
            batch,
            seed,
            float(grid),
            NUM_PIXELS=num_pixels,
            PLANE=plane,
            CHANNEL_STRIDE=1 if channels_last else plane,
            PIXEL_STRIDE=channels if channels_last else 1,
            ON_GRID=grid != 0,
            NORMALISE=mean is not None,
            BFLOAT16=out.dtype == torch.bfloat16,
            BLOCKS=BLOCKS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
