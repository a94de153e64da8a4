"""Votes are counted where the logits are: rows of a batch belong to several images, each with its own histogram.

The reference defines the corner cases: ties go to the lowest class, and a row with NaN votes for nobody.
"""

import functools
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from smoothkit.kernels.noise import kernels_wanted


def count_votes_reference(logits: Tensor) -> Tensor:
    """Votes of logits [n, num_classes]: ties go to the lowest class, a row with NaN votes for nobody."""
    voting = ~logits.isnan().any(dim=-1)  # [n]
    return torch.bincount(logits[voting].argmax(dim=-1), minlength=logits.shape[-1])


def add_votes_reference(counts: Tensor, logits: Tensor, slots: Tensor) -> None:
    """`add_votes` by definition, one slot after another."""
    for slot in slots.unique().tolist():
        if slot >= 0:
            counts[slot] += count_votes_reference(logits[slots == slot])


@torch.library.custom_op("smoothkit::add_votes", mutates_args=("counts",))
def add_votes(counts: Tensor, logits: Tensor, slots: Tensor) -> None:
    """Add one vote a row to counts[slot, class], without waiting for the device.

    Parameters
    ----------
    counts : int64 tensor [num_slots, num_classes], contiguous. Added to.
    logits : floating-point tensor [B, num_classes]
    slots : int64 tensor [B]
        Which row of `counts` a row of `logits` votes in; -1 for padding, which votes for nobody.

    Raises
    ------
    ValueError
        If a tensor is not of the shape, type or device said above. On the CPU also if a slot is out of range;
        elsewhere such a row votes for nobody.
    """
    _check_votes(counts, logits, slots)
    # the kernel compares in float32, which would make ties of different float64 logits
    by_kernel = counts.device.type == "cuda" and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if by_kernel and (kernels := _cuda_kernels()) is not None:
        kernels.add_votes_into(counts, logits, slots)
    elif counts.device.type == "cpu":
        _add_votes_by_numpy(counts, logits, slots)
    else:
        _add_votes_by_torch(counts, logits, slots)


@add_votes.register_fake
def _check_votes(counts: Tensor, logits: Tensor, slots: Tensor) -> None:
    if counts.ndim != 2 or counts.dtype != torch.int64 or not counts.is_contiguous():
        raise ValueError(
            f"counts must be int64 [num_slots, num_classes], contiguous, got {counts.dtype} {list(counts.shape)}"
        )
    if logits.ndim != 2 or logits.shape[1] != counts.shape[1] or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating-point [B, {counts.shape[1]}], got {logits.dtype} {list(logits.shape)}"
        )
    if slots.shape != logits.shape[:1] or slots.dtype != torch.int64:
        raise ValueError(f"slots must be int64 [{logits.shape[0]}], got {slots.dtype} {list(slots.shape)}")
    if not counts.device == logits.device == slots.device:
        raise ValueError(
            f"counts, logits and slots must be on one device, got {counts.device}, {logits.device}, {slots.device}"
        )
    if counts.shape[1] == 0:
        raise ValueError("counts must have at least one class, got none")


def _add_votes_by_numpy(counts: Tensor, logits: Tensor, slots: Tensor) -> None:
    """The same for a batch of a hundred or so, where a dozen calls of torch would take longer than the counting."""
    if len(slots) == 0:
        return
    winners = logits.argmax(dim=1)  # the first of the largest; of a NaN if there is one
    invalid = logits.gather(1, winners[:, None])[:, 0].isnan().numpy()
    slots = slots.numpy()
    if slots.min() < -1 or slots.max() >= len(counts):
        raise ValueError(f"slots must be -1 or rows of the {len(counts)} of counts, got {slots.min()} to {slots.max()}")
    voting = (slots >= 0) & ~invalid
    cells = slots[voting] * counts.shape[1] + winners.numpy()[voting]
    np.add.at(counts.numpy().reshape(-1), cells, 1)


def _add_votes_by_torch(counts: Tensor, logits: Tensor, slots: Tensor) -> None:
    """One indexed addition, in which rows that vote for nobody add 0 to some cell."""
    if counts.shape[0] == 0:
        return
    top, winners = logits.max(dim=1)  # NaN if there is one; the first of equals
    voting = (slots >= 0) & (slots < len(counts)) & ~top.isnan()
    cells = slots.clamp(0, len(counts) - 1) * counts.shape[1] + winners
    counts.view(-1).index_add_(0, cells, voting.long())


@functools.cache
def _cuda_kernels() -> ModuleType | None:
    """The Triton kernel; None without Triton, which is said once, or where SMOOTHKIT_NO_KERNELS is set."""
    if not kernels_wanted():
        return None
    try:  # for CUDA devices only
        from smoothkit.kernels import votes_triton

        return votes_triton
    except Exception as error:
        warnings.warn(f"votes are counted by plain PyTorch, since the Triton kernel is missing: {error}", stacklevel=4)
        return None
