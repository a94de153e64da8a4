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
names what is in use, and SMOOTHKIT_NO_KERNELS=1 keeps to NumPy. `noisy_rows` fills a batch that mixes images,
as the model wants it; on a CUDA device a Triton kernel makes the same bits there.

Reference: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from smoothkit.kernels.philox import (
    IMAGE_ID_BITS,
    MAX_PIXELS,
    MAX_SAMPLE,
    Purpose,
    _check_counter,
    _normals_of_words,
    counter_word,
    signed_bits,
)


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
    kernels = _kernels_for(num_pixels)
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
    word = np.array([image_id | int(purpose) << IMAGE_ID_BITS], dtype=np.uint64)
    return _normals_of_words(num_pixels, seed, np.repeat(word, stop - start), np.arange(start, stop, dtype=np.uint64))


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
    if grid is not None and grid < 1:
        raise ValueError(f"grid must be a number of steps of at least 1, or None for float noise, got {grid}")
    counter = dict(seed=seed, purpose=purpose, image_id=image_id, start=start)
    kernels = _kernels_for(image.numel())
    if kernels is None or image.dtype != torch.float32:
        return noisy_copies_reference(image, sigma=sigma, stop=stop, grid=grid, **counter)
    _check_counter(image.numel(), seed, purpose, image_id, start, stop)
    out = np.empty((stop - start, image.numel()), dtype=np.float32)
    kernels.noisy_copies_into(
        out,
        image.detach().cpu().reshape(-1).numpy(),
        scale=noise_scale(sigma, grid),
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


# --- rows of a batch -------------------------------------------------------------------------------


@torch.library.custom_op("smoothkit::noisy_rows", mutates_args=("out",))
def noisy_rows(
    out: Tensor,
    images: Tensor,
    rows: Tensor,
    scale: Tensor,
    seed: int,
    grid: int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> None:
    """Fill a batch with noisy copies of several images, in the type and layout a model wants.

    With z the normals of a row's counter and x its image, a value is `x + scale z` if `grid` is 0, else
    `(rint(x grid) + rint(scale z)) / grid`; with `mean` and `std` then `(value - mean[c]) / std[c]`. Every operation
    is float32 and rounded once, so that a row without `mean` has the bits of `noisy_copies`; bfloat16 is rounded
    from that, to nearest even. The values depend neither on the layout nor on the row's place in the batch.

    All tensors lie on one device. On a CUDA device nothing waits for the host; call it once before a CUDA graph
    is captured, as the first call compiles the kernel and compares its bits with the reference's.

    Parameters
    ----------
    out : float32 or bfloat16 tensor [B, C, H, W], contiguous or channels_last. Overwritten.
    images : float32 tensor [M, C, H, W] on [0, 1], contiguous.
    rows : int64 tensor [3, B]
        For each row: index into `images`, or -1 for padding, which becomes zeros; `counter_word(purpose, image_id)`;
        sample index.
    scale : float32 tensor [B]
        Standard deviation of each row's noise, in pixel units if `grid` is 0, else in grid steps; see `noise_scale`.
    seed : `signed_bits` of the 64-bit seed.
    grid : number of steps from 0 to 1, or 0 for float noise.
    mean, std : float32 tensors [C], or None for values on the scale of `images`.

    Raises
    ------
    ValueError
        If a tensor is not of the shape, type, layout or device said above. On the CPU also if an index or a sample
        is out of range; elsewhere such a row is NaN, which votes for nobody.
    """
    _check_rows(out, images, rows, scale, seed, grid, mean, std)
    _noisy_rows_by_the_cpu(out, images, rows, scale, seed, grid, mean, std)


@noisy_rows.register_kernel("cuda")
def _noisy_rows_on_cuda(
    out: Tensor,
    images: Tensor,
    rows: Tensor,
    scale: Tensor,
    seed: int,
    grid: int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> None:
    _check_rows(out, images, rows, scale, seed, grid, mean, std)
    kernels = _cuda_kernels(out.device)
    fill = _noisy_rows_by_the_cpu if kernels is None else kernels.noisy_rows_into
    fill(out, images, rows, scale, seed, grid, mean, std)


@noisy_rows.register_fake
def _check_rows(
    out: Tensor,
    images: Tensor,
    rows: Tensor,
    scale: Tensor,
    seed: int,
    grid: int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> None:
    if out.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"out must be float32 or bfloat16, got {out.dtype}")
    if out.ndim != 4 or not (out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(
            f"out must be [B, C, H, W], contiguous or channels_last, got shape {tuple(out.shape)}, strides {out.stride()}"
        )
    batch, channels = out.shape[:2]
    if images.ndim != 4 or images.shape[1:] != out.shape[1:] or not images.is_contiguous():
        raise ValueError(
            f"images must be contiguous, [M, C, H, W] for out {tuple(out.shape)}, got shape {tuple(images.shape)}"
        )
    given = {"images": (images, images.shape, torch.float32), "rows": (rows, (3, batch), torch.int64)}
    given |= {"scale": (scale, (batch,), torch.float32)}
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together, got one of them")
    if mean is not None:
        given |= {"mean": (mean, (channels,), torch.float32), "std": (std, (channels,), torch.float32)}
    for name, (tensor, shape, dtype) in given.items():
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != out.device:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {out.device}, got {tensor.dtype} {list(tensor.shape)} "
                f"on {tensor.device}"
            )
    if not 0 <= grid < 2**24:
        raise ValueError(f"grid must lie in [0, 2**24), 0 for float noise, got {grid}")
    if not 0 < math.prod(out.shape[1:]) <= MAX_PIXELS:
        raise ValueError(f"an image must have 1 to {MAX_PIXELS} values, got {math.prod(out.shape[1:])}")


def _noisy_rows_by_the_cpu(out, images, rows, scale, seed, grid, mean, std) -> None:
    if len(out) == 0:
        return
    tensors = [None if x is None else x.detach().cpu().contiguous() for x in (images, rows, scale, mean, std)]
    images, rows, scale, mean, std = tensors
    low, high = rows.amin(1).tolist(), rows.amax(1).tolist()
    if low[0] < -1 or high[0] >= len(images):
        raise ValueError(f"rows[0] must hold -1 or indices of the {len(images)} images, got {low[0]} to {high[0]}")
    if low[2] < 0 or high[2] >= MAX_SAMPLE:
        raise ValueError(f"rows[2] must hold samples in [0, 2**40), got {low[2]} to {high[2]}")
    host = out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")
    kernels = _kernels_for(out[0].numel())
    fill = noisy_rows_reference if kernels is None else functools.partial(_noisy_rows_by_numba, kernels)
    fill(host, images, rows, scale, seed, grid, mean, std)
    if host is not out:
        out.copy_(host)


def _noisy_rows_by_numba(kernels: ModuleType, out, images, rows, scale, seed, grid, mean=None, std=None) -> None:
    channels_last = not out.is_contiguous()
    memory = (out.permute(0, 2, 3, 1) if channels_last else out).reshape(len(out), -1)  # a view
    memory = memory.view(torch.int16).numpy().view(np.uint16) if out.dtype == torch.bfloat16 else memory.numpy()
    kernels.noisy_rows_into(
        memory,
        images.reshape(len(images), -1).numpy(),
        rows.numpy(),
        scale.numpy(),
        seed=seed % 2**64,
        grid=grid,
        mean=None if mean is None else mean.numpy(),
        std=None if std is None else std.numpy(),
        planes=out.shape[1],
        channels_last=channels_last,
        threads=torch.get_num_threads(),
    )


def noisy_rows_reference(
    out: Tensor,
    images: Tensor,
    rows: Tensor,
    scale: Tensor,
    seed: int,
    grid: int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> None:
    """The bits of `noisy_rows` by definition, in NumPy, for tensors on the CPU."""
    values = np.zeros(out.shape, dtype=np.float32)
    real = rows[0].numpy() >= 0
    index, words, samples = rows.numpy()[:, real]
    z = _normals_of_words(math.prod(out.shape[1:]), seed % 2**64, words.view(np.uint64), samples.view(np.uint64))
    x, z, scales = images.numpy()[index], z.reshape(-1, *out.shape[1:]), scale.numpy()[real, None, None, None]
    noisy = x + scales * z
    if grid:
        noisy = (np.rint(x * np.float32(grid)) + np.rint(scales * z)) / np.float32(grid)
    if mean is not None:
        noisy = (noisy - mean.numpy()[:, None, None]) / std.numpy()[:, None, None]
    values[real] = noisy
    out.copy_(torch.from_numpy(values))  # to bfloat16: rounded to nearest even


def noise_scale(sigma: float, grid: int | None) -> np.float32:
    """What `noisy_rows` takes as the scale of a row's noise: sigma (in grid steps), rounded up to float32."""
    return _float32_at_least(sigma * (grid or 1))


# --- the road --------------------------------------------------------------------------------------


# Loading numba takes seconds; below this size the noise is a small share of any forward pass. See `load_kernels`.
KERNEL_PIXELS = 1024


def road(num_pixels: int = 3 * 32 * 32, device: str | torch.device = "cpu") -> str:
    """What makes the noise of images of this size, "numba", "numpy" or (on a CUDA device) "triton"; same bits."""
    if torch.device(device).type == "cuda" and _cuda_kernels(torch.device(device)) is not None:
        return "triton"
    return "numba" if _kernels_for(num_pixels) is not None else "numpy"


def load_kernels() -> None:
    """Use the compiled kernel for small images too, from now on: worth its seconds of loading to a long run."""
    global KERNEL_PIXELS
    KERNEL_PIXELS = 1


def _kernels_for(num_pixels: int) -> ModuleType | None:
    return _kernels() if num_pixels >= KERNEL_PIXELS else None


def _kernels_wanted() -> bool:
    return os.environ.get("SMOOTHKIT_NO_KERNELS", "0") in ("", "0")


@functools.cache
def _kernels() -> ModuleType | None:
    """The compiled kernels; None without numba, or where SMOOTHKIT_NO_KERNELS is set to anything but 0."""
    if not _kernels_wanted():
        return None
    try:
        from smoothkit.kernels import noise_numba

        if _same_bits(noise_numba):
            return noise_numba
        problem = "gives other bits on this machine; please report it"
    except ModuleNotFoundError:
        return None
    except Exception as error:
        problem = f"does not work here: {error}"
    warnings.warn(f"the noise is made by NumPy, since the kernel compiled by numba {problem}", stacklevel=4)
    return None


@functools.cache
def _cuda_kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernel; None where it is missing, unwanted or not right on this device, which is said once."""
    if not _kernels_wanted():
        return None
    try:
        from smoothkit.kernels import noise_triton

        if _same_rows(noise_triton.noisy_rows_into, device):
            return noise_triton
        problem = "the Triton kernel gives other bits there; please report it"
    except ModuleNotFoundError as error:
        problem = f"{error.name} is not installed"
    except Exception as error:
        problem = f"the Triton kernel does not work there: {error}"
    warnings.warn(f"the noise is made on the CPU and copied to {device}, since {problem}", stacklevel=4)
    return None


def _same_bits(kernels: ModuleType) -> bool:
    """Whether the bits of the kernels compiled by numba are the reference's, on some thousand values.

    A compiler that fuses multiplications with additions changes about one normal in a hundred.
    """
    n, num_pixels = 64, 67
    counter = dict(seed=2**63 + 1, purpose=Purpose.PILOT, image_id=2**55 + 1, start=2**33)
    expected = standard_normal_reference(num_pixels, stop=2**33 + n, **counter)
    made = np.full((n, num_pixels), np.nan, dtype=np.float32)
    kernels.standard_normal_into(made, **counter)
    same_normals = np.array_equal(made.view(np.uint32), expected.view(np.uint32))
    return same_normals and _same_rows(functools.partial(_noisy_rows_by_numba, kernels), torch.device("cpu"))


def _same_rows(fill: Callable[..., None], device: torch.device) -> bool:
    """Whether `fill`, called as `noisy_rows`, gives the reference's bits on a batch of each type."""
    n, images = 64, torch.linspace(0, 1, 2 * 105).reshape(2, 3, 5, 7)
    word = counter_word(Purpose.PILOT, 2**55 + 1)
    rows = torch.tensor([[i % 3 - 1, word + i % 2, 2**33 + i] for i in range(n)]).T.contiguous()
    scale, mean, std = (
        torch.linspace(0.1, 80, n),
        torch.tensor([0.485, 0.456, 0.406]),
        torch.tensor([0.229, 0.224, 0.225]),
    )
    for dtype, layout, settings in (
        (torch.float32, torch.contiguous_format, (signed_bits(2**63 + 1), 0)),
        (torch.bfloat16, torch.channels_last, (7, 255, mean, std)),
    ):
        expected = torch.empty(n, *images.shape[1:], dtype=dtype).to(memory_format=layout)
        noisy_rows_reference(expected, images, rows, scale, *settings)
        made = torch.full_like(expected, torch.nan, device=device)
        fill(made, *(x.to(device) if isinstance(x, Tensor) else x for x in (images, rows, scale, *settings)))
        if not torch.equal(made.cpu().float().view(torch.int32), expected.float().view(torch.int32)):
            return False
    return True
