"""The noise: a pure function of (seed, purpose, image id, sample index, pixel).

Nothing here holds state. Asking for sample 70,000 of an image needs no earlier sample, so results do
not depend on batch size, order, process or machine, and an interrupted run goes on where it stopped.

The bits are made in two steps, and both are part of the format of every record:

1. Philox4x32-10 turns a 128-bit counter and the 64-bit seed into four 32-bit words. The counter, from
   its lowest bit: pixel block (24 bits, four pixels each), sample (40), image id (56), purpose (8).
2. Box-Muller turns two words into two normals, with polynomials in place of log, sin and cos: only
   float32 additions, multiplications, square roots and bit moves, each rounded once and never fused,
   so that any IEEE machine gives the same bits. Uniforms have 32 bits; the tails end at 6.76.

`noisy_rows` makes all noise: it fills a batch that mixes images, as a model wants it. `noisy_copies` and
`standard_normal` are its rows for one image. The definition is NumPy (`noisy_rows_reference`, and `philox` for the
two steps). Compiled kernels give the same bits sooner, numba's (the extra `fast`) on a CPU and Triton's on a CUDA
device. `backend()` names what is in use; SMOOTHKIT_NO_KERNELS=1 keeps to NumPy.

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
    MAX_PIXELS,
    MAX_SAMPLE,
    OFF_GRID,
    Purpose,
    counter_word,
    normals,
    off_grid,
    rows_of_one_image,
    signed_bits,
)

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
    _fill(out, images, rows, scale, seed, grid, mean, std)


@noisy_rows.register_fake
def _check_rows(out, images, rows, scale, seed, grid, mean=None, std=None) -> None:
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


def _fill(out, images, rows, scale, seed, grid, mean=None, std=None) -> None:
    """`noisy_rows` for tensors that have been checked, on their device or else on the CPU."""
    if len(out) == 0:
        return
    given = (images, rows, scale, seed, grid, mean, std)
    if out.device.type == "cuda" and (kernels := _kernels(out.device)) is not None:
        kernels.noisy_rows_into(out, *given)
        return
    images, rows, *_ = given = [x.detach().cpu().contiguous() if isinstance(x, Tensor) else x for x in given]
    low, high = rows.amin(1).tolist(), rows.amax(1).tolist()
    if low[0] < -1 or high[0] >= len(images):
        raise ValueError(f"rows[0] must hold -1 or indices of the {len(images)} images, got {low[0]} to {high[0]}")
    if low[2] < 0 or high[2] >= MAX_SAMPLE:
        raise ValueError(f"rows[2] must hold samples in [0, 2**40), got {low[2]} to {high[2]}")
    host = out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")
    _fill_on_cpu(out[0].numel())(host, *given)
    if host is not out:
        out.copy_(host)


def _fill_on_cpu(num_pixels: int) -> Callable[..., None]:
    """`noisy_rows` for images of this size, for tensors on the CPU that have been checked."""
    return _kernels(CPU).noisy_rows_into if backend(num_pixels) == "numba" else noisy_rows_reference


def noisy_rows_reference(out, images, rows, scale, seed, grid, mean=None, std=None) -> None:
    """The bits of `noisy_rows` by definition, in NumPy, for tensors on the CPU."""
    real = rows.numpy()[0] >= 0
    index, words, samples = rows.numpy()[:, real]
    values = np.zeros((len(out), math.prod(out.shape[1:])), dtype=images.numpy().dtype)
    x, z = images.flatten(1).numpy()[index], normals(values.shape[1], seed % 2**64, words, samples)
    noise = scale.numpy()[real, None] * z
    noisy = (np.rint(x * np.float32(grid)) + np.rint(noise)) / np.float32(grid) if grid else x + noise
    if mean is not None:
        mean, std = (m.numpy().repeat(values.shape[1] // len(m)) for m in (mean, std))
        noisy = (noisy - mean) / std
    values[real] = noisy
    out.copy_(torch.from_numpy(values).reshape(out.shape))  # to bfloat16: rounded to nearest even


def noise_scale(sigma: float, grid: int | None) -> np.float32:
    """What `noisy_rows` takes as the scale of a row's noise: sigma (in grid steps), rounded up to float32.

    The noise is never weaker than stated.
    """
    exact = sigma * (grid or 1)
    rounded = np.float32(exact)
    return rounded if float(rounded) >= exact else np.nextafter(rounded, np.float32(np.inf))


# --- rows of one image -----------------------------------------------------------------------------


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
    image : float32 tensor [C, H, W] on [0, 1]; for float64 the copies are float64.
    sigma : standard deviation in pixel units on [0, 1], above 0.
    seed, purpose, image_id, start, stop : the counter, see `smoothkit.kernels.noise`.
    grid : int or None
        Number of steps from 0 to 1, or None for float noise.

    Returns
    -------
    float32 tensor [stop - start, C, H, W] on the CPU; not clipped.

    Raises
    ------
    ValueError
        If `grid` is below 1 or the image is not on it, or an argument does not fit into its bits of the counter.
    """
    if grid is not None and grid < 1:
        raise ValueError(f"grid must be a number of steps of at least 1, or None for float noise, got {grid}")
    if grid is not None and (off := off_grid(image, grid)) > OFF_GRID:
        raise ValueError(
            f"the image has values up to {off:.3f} steps off the 1/{grid} grid; use grid=None for float noise"
        )
    pixels = image.detach().cpu().reshape(-1).numpy()
    rows = rows_of_one_image(pixels.size, seed=seed, purpose=purpose, image_id=image_id, start=start, stop=stop)
    return _copies(pixels, rows, noise_scale(sigma, grid), seed, grid or 0).reshape(stop - start, *image.shape)


def standard_normal(
    num_pixels: int, *, seed: int, purpose: Purpose, image_id: int, start: int, stop: int
) -> np.ndarray:
    """Standard normals for samples start..stop-1 of one image.

    Returns
    -------
    float32 array [stop - start, num_pixels]; entry (i, p) depends only on (seed, purpose, image_id, start + i, p).

    Raises
    ------
    ValueError
        If an argument does not fit into its bits of the counter.
    """
    rows = rows_of_one_image(num_pixels, seed=seed, purpose=purpose, image_id=image_id, start=start, stop=stop)
    # 0 + 1 z has the bits of z, as no normal is a zero: neither a radius nor a sine is
    return _copies(np.zeros(num_pixels, dtype=np.float32), rows, 1.0, seed, 0).reshape(-1, num_pixels).numpy()


def standard_normal_reference(
    num_pixels: int, *, seed: int, purpose: Purpose, image_id: int, start: int, stop: int
) -> np.ndarray:
    """The bits of `standard_normal` by definition, in NumPy."""
    rows = rows_of_one_image(num_pixels, seed=seed, purpose=purpose, image_id=image_id, start=start, stop=stop)
    return normals(num_pixels, seed, rows[1], rows[2])


def _copies(pixels: np.ndarray, rows: np.ndarray, scale: float, seed: int, grid: int) -> Tensor:
    """Noisy copies [n, 1, 1, P] of one image's values [P]; float32, or float64 where NumPy adds them so."""
    pixels = np.ascontiguousarray(pixels, dtype=np.result_type(pixels.dtype, np.float32)).reshape(1, 1, 1, -1)
    out = np.empty((rows.shape[1], *pixels.shape[1:]), dtype=pixels.dtype)
    scales = np.full(len(out), scale, dtype=np.float32)
    out, pixels, rows, scales = map(torch.from_numpy, (out, pixels, rows, scales))
    fill = _fill_on_cpu(pixels.numel()) if pixels.dtype == torch.float32 else noisy_rows_reference
    fill(out, pixels, rows, scales, int(seed), grid)
    return out


# --- backends --------------------------------------------------------------------------------------

CPU = torch.device("cpu")
# Loading numba takes seconds; below this size the noise is a small share of any forward pass. See `load_kernels`.
KERNEL_PIXELS = 1024


def backend(num_pixels: int = 3 * 32 * 32, device: str | torch.device = "cpu") -> str:
    """What makes the noise of images of this size, "numba", "numpy" or (on a CUDA device) "triton"; same bits."""
    device = torch.device(device)
    if device.type == "cuda" and _kernels(device) is not None:
        return "triton"
    return "numba" if num_pixels >= KERNEL_PIXELS and _kernels(CPU) is not None else "numpy"


def load_kernels() -> None:
    """Use numba's kernel for small images too, from now on: worth its seconds of loading to a long run."""
    global KERNEL_PIXELS
    KERNEL_PIXELS = 1


def kernels_wanted() -> bool:
    """Whether SMOOTHKIT_NO_KERNELS is unset, empty or 0."""
    return os.environ.get("SMOOTHKIT_NO_KERNELS", "0") in ("", "0")


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels for a device, numba's or Triton's; None where they are unwanted, missing or not right.

    A user is told once, except that a machine without numba is nothing to speak of.
    """
    if not kernels_wanted():
        return None
    by, instead = ("Triton", f"on the CPU and copied to {device}") if device.type == "cuda" else ("numba", "by NumPy")
    try:  # loading takes seconds, and either library may be missing
        if by == "Triton":
            from smoothkit.kernels import noise_triton as kernels
        else:
            from smoothkit.kernels import noise_numba as kernels
        if _same_rows(kernels.noisy_rows_into, device):
            return kernels
        problem = f"the {by} kernel gives other bits there; please report it"
    except ModuleNotFoundError as error:
        if by == "numba":
            return None
        problem = f"{error.name} is not installed"
    except Exception as error:
        problem = f"the {by} kernel does not work there: {error}"
    warnings.warn(f"the noise is made {instead}, since {problem}", stacklevel=4)
    return None


def _same_rows(fill: Callable[..., None], device: torch.device) -> bool:
    """Whether `fill`, called as `noisy_rows`, gives the reference's bits on some thousand values of each type.

    A compiler that fuses multiplications with additions changes about one normal in a hundred. The first image is
    black and its rows have scale 1, so that among the values are the normals themselves.
    """
    n, images = 120, torch.linspace(0, 1, 2 * 105).reshape(2, 3, 5, 7)
    images[0] = 0
    word = counter_word(Purpose.PILOT, 2**55 + 1)
    rows = torch.tensor([[i % 3 - 1, word + i % 2, 2**33 + i] for i in range(n)]).T.contiguous()
    scale = torch.linspace(0.1, 80, n).where(rows[0] != 0, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
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
