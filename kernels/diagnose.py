"""Counting logits on a grid: one read of the logits, integers throughout.

Nearly all are negatives, and many of them share a few cells: each program adds to one of several
copies of their row, which a second kernel sums. Positives are rare and go to the table itself.
Integer additions give the same counts in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonloss._grid import COLUMNS, LIMIT, QUALITY_STEPS, ROWS, STEPS
from tritonloss._op import launcher, wrap_triton

from ._config import COUNTING, COUNTING_COPIES, LOGITS_PER_COPY
from ._logits import offsets, targets_and_mask, walk_over, walkable
from ._walk import cdiv, coordinates, tile_of


@triton.jit
def _nearest(v):
    """Nearest integer, the even one between two, for abs(v) < 2^22: beside 1.5 * 2^23 there is no
    room for a fraction."""
    return ((v + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def count_kernel(
    # pointers
    x_ptr,  # logits
    dense_ptr,  # dense targets, or None
    label_ptr,  # [rows] integers, or None
    quality_ptr,  # [rows], or None
    weight_ptr,  # [rows] or per logit, or None: a mask
    copy_ptr,  # [copies, columns] int32, zeros: negatives
    count_ptr,  # [quality steps + 2, columns] int64, zeros: positives from the second row on
    # shapes
    n,
    n_classes,
    copies,
    size_1,
    size_2,
    size_3,
    # strides
    x_s0,
    x_s1,
    x_s2,
    x_s3,
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    dense_s0,
    dense_s1,
    dense_s2,
    dense_s3,
    weight_s0,
    weight_s1,
    weight_s2,
    weight_s3,
    # scalars
    ignore_index,
    # constants
    LIMIT: tl.constexpr,
    STEPS: tl.constexpr,
    QUALITY_STEPS: tl.constexpr,
    N_DIMS: tl.constexpr,
    CLASS_DIM: tl.constexpr,
    LINEAR: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
    RUN: tl.constexpr,  # logits that share a row or a class
    BLOCK: tl.constexpr,
):
    """1-D grid; program i takes logits [i BLOCK, (i+1) BLOCK) in memory order."""
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    run, within = tile_of(BLOCK, RUN)
    sizes = (1, size_1, size_2, size_3)
    strides = (
        (x_s0, x_s1, x_s2, x_s3),
        (row_s0, row_s1, row_s2, row_s3),
        (dense_s0, dense_s1, dense_s2, dense_s3),
        (weight_s0, weight_s1, weight_s2, weight_s3),
    )
    mine = copy_ptr + pid % copies * (2 * LIMIT * STEPS + 2)
    for MASKED in tl.static_range(2):
        if (start + BLOCK > n) == MASKED:
            coords = coordinates(start, run, sizes, N_DIMS, within)
            offs = run + within
            x_at, row, dense_at, weight_at, cls = offsets(
                start, offs, coords, strides, N_DIMS, CLASS_DIM, LINEAR, ROW_WEIGHT
            )
            # Loaded here, not in a function: see ``targets_and_mask``.
            if MASKED:
                inside = run < n - start
                x = tl.load(x_ptr + x_at, inside, 0)
                dense = tl.load(dense_ptr + dense_at, inside, 0) if dense_ptr is not None else run
                label = tl.load(label_ptr + row, inside, 0) if label_ptr is not None else run
                weight = (
                    tl.load(weight_ptr + weight_at, inside, 0) if weight_ptr is not None else run
                )
            else:
                inside = tl.full(run.shape, 1, tl.int1)
                x = tl.load(x_ptr + x_at)
                dense = tl.load(dense_ptr + dense_at) if dense_ptr is not None else run
                label = tl.load(label_ptr + row) if label_ptr is not None else run
                weight = tl.load(weight_ptr + weight_at) if weight_ptr is not None else run
            x, y, positive, keep, _ = targets_and_mask(
                x,
                dense,
                label,
                weight,
                inside,
                cls,
                within,
                n_classes,
                ignore_index,
                label_ptr is not None,
                weight_ptr is not None,
            )
            keep = keep & (y >= 0)  # a dense target below 0 is ignored
            half = LIMIT * STEPS
            finite = x == x  # targets_and_mask makes NaN of what is infinite
            place = tl.minimum(tl.maximum(tl.where(finite, x, 0.0) * STEPS, -half), half)
            column = tl.where(finite, _nearest(place) + half, 2 * half + 1)
            tl.atomic_add(mine + column, 1, mask=keep & (positive == 0), sem="relaxed")
            quality = tl.where(positive & keep, y, 0.0)
            if quality_ptr is not None:
                quality = tl.load(quality_ptr + row, mask=positive, other=0.0).to(tl.float32)
            quality = tl.where(quality > 0, quality, 0.0)
            # never out of bounds; and between product and sum, so that they are rounded one by one
            quality_row = _nearest(tl.minimum(quality * QUALITY_STEPS, QUALITY_STEPS)) + 1
            cell = quality_row * (2 * half + 2) + column
            one = tl.full(cell.shape, 1, tl.int64)
            tl.atomic_add(count_ptr + cell, one, mask=keep & positive, sem="relaxed")


@triton.jit
def sum_copies_kernel(
    copy_ptr,  # [copies, columns] int32
    count_ptr,  # [columns] int64
    copies,
    columns,
    BLOCK: tl.constexpr,
):
    """1-D grid; program i sums columns [i BLOCK, (i+1) BLOCK) of all copies."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < columns
    total = tl.zeros([BLOCK], tl.int64)
    copy = tl.cast(0, tl.int64)
    while copy < copies:
        total += tl.load(copy_ptr + copy * columns + offs, mask=mask, other=0).to(tl.int64)
        copy += 1
    tl.store(count_ptr + offs, total, mask=mask)


def takes(x, labels, quality, dense, weight, *args) -> bool:
    """True if the kernel can read the operands in place."""
    return walkable(x, dense, weight)


@launcher
def count(
    x: Tensor,
    labels: Tensor | None,
    quality: Tensor | None,
    dense: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """How often each cell of the grid occurs, int64 (ROWS, COLUMNS).

    Args:
        x: logits (..., C), any strides.
        labels, quality: contiguous (...), or None.
        dense: targets (..., C), any strides, or None.
        weight: contiguous (...), or (..., C) with any strides, or None: a mask.
    """
    n = x.numel()
    table = torch.zeros((ROWS, COLUMNS), dtype=torch.int64, device=x.device)
    copies = min(max(n // LOGITS_PER_COPY, 1), COUNTING_COPIES)
    negatives = torch.zeros((copies, COLUMNS), dtype=torch.int32, device=x.device)
    walk = walk_over(x, dense, labels, weight)
    wrap_triton(count_kernel, x)[(cdiv(n, COUNTING.block),)](
        x,
        dense,
        labels,
        quality,
        weight,
        negatives,
        table,
        n,
        x.shape[-1],
        copies,
        *walk.numbers,
        ignore_index,
        LIMIT=LIMIT,
        STEPS=STEPS,
        QUALITY_STEPS=QUALITY_STEPS,
        **walk.constants,
        BLOCK=COUNTING.block,
        num_warps=COUNTING.num_warps,
    )
    # one column a thread: neighbours read neighbours
    wrap_triton(sum_copies_kernel, x)[(cdiv(COLUMNS, 128),)](
        negatives, table, copies, COLUMNS, BLOCK=128, num_warps=4
    )
    return table
