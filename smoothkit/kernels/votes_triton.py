"""The votes of `smoothkit.kernels.votes` on a CUDA device, by Triton.

A hundred thousand additions to one counter would queue up, and most rows of a batch do vote alike. So a program
takes a block of rows and first counts, among themselves, those that vote for one class in one slot; only the first
of these adds to the counter, once for all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CLASSES = 1024  # at most so many classes of a row are read at a time
VALUES = 8192  # rows of a program times classes read at a time
ROWS = 64  # at most


@triton.jit
def _add_votes_kernel(
    counts_ptr,  # [num_slots, num_classes] int64
    logits_ptr,  # [batch, num_classes]
    slots_ptr,  # [batch] int64
    num_slots: tl.int64,
    batch: tl.int64,
    num_classes,
    row_stride: tl.int64,
    class_stride: tl.int64,
    ROWS: tl.constexpr,  # powers of two
    CLASSES: tl.constexpr,
):
    # int64 because batch * num_classes can pass 2**31
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    best = tl.full((ROWS,), -float("inf"), tl.float32)
    winner = tl.zeros((ROWS,), tl.int32)  # a row of -inf votes for class 0, as a tie of all
    has_nan = tl.zeros((ROWS,), tl.int32)
    for first in range(0, num_classes, CLASSES):
        cls = first + tl.arange(0, CLASSES)
        inside = (row < batch)[:, None] & (cls < num_classes)[None, :]
        x = tl.load(
            logits_ptr + row[:, None] * row_stride + cls[None, :].to(tl.int64) * class_stride,
            mask=inside,
            other=-float("inf"),
        ).to(tl.float32)
        is_nan = x != x
        has_nan = tl.maximum(has_nan, tl.max(is_nan.to(tl.int32), axis=1))
        x = tl.where(is_nan, -float("inf"), x)
        top = tl.max(x, axis=1)
        at = first + tl.argmax(x, axis=1, tie_break_left=True)
        winner = tl.where(top > best, at, winner)  # a tie stays with the lower class
        best = tl.maximum(best, top)

    slot = tl.load(slots_ptr + row, mask=row < batch, other=-1)
    voting = (slot >= 0) & (slot < num_slots) & (has_nan == 0)
    cell = tl.where(voting, slot * num_classes + winner, -1)
    place = tl.arange(0, ROWS)
    alike = (cell[:, None] == cell[None, :]).to(tl.int32)  # [ROWS, ROWS]
    earlier = tl.max(alike * (place[None, :] < place[:, None]).to(tl.int32), axis=1)
    votes = tl.sum(alike, axis=1)
    tl.atomic_add(counts_ptr + cell, votes.to(tl.int64), mask=voting & (earlier == 0), sem="relaxed")


def add_votes_into(counts: Tensor, logits: Tensor, slots: Tensor) -> None:
    """`smoothkit.kernels.votes.add_votes`, which has checked the arguments, for logits of at most 32 bits."""
    (num_slots, num_classes), batch = counts.shape, len(logits)
    if batch == 0 or num_slots == 0:
        return
    classes = min(CLASSES, triton.next_power_of_2(num_classes))
    rows = min(ROWS, VALUES // classes)
    with torch.cuda.device_of(counts):
        _add_votes_kernel[(triton.cdiv(batch, rows),)](
            counts,
            logits,
            slots.contiguous(),
            num_slots,
            batch,
            num_classes,
            *logits.stride(),
            ROWS=rows,
            CLASSES=classes,
            num_warps=4,
            enable_fp_fusion=False,  # said only because Triton warns where it is not
        )
