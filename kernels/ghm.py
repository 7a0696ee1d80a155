"""Gradient harmonising: one read of the logits gives the count and the loss of every region.

Each program keeps a table of its own. Of a tile it asks which regions are filled, mostly few, for
nearly all logits of a detector are easy; these say which sums to take. Tables are added
up in a fixed order: no atomics, and the same bits in every run. The backward is
``pointwise_kernel`` with the weight of each region.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonloss._op import launcher, wrap_triton

from ._config import HISTOGRAM, HISTOGRAM_PROGRAMS, REGION_TOTALS
from ._finish import at
from ._formulas import is_hard, pointwise_value, region_of
from ._logits import load_logits, walk_over, walkable
from ._numbers import load_params, scalar_args
from ._walk import cdiv, coordinates, tile_of
from .pointwise import gradient


@triton.jit
def _lowest_bit(bits):
    """Position of the lowest bit set: the exponent of that bit as a float."""
    alone = (bits & -bits).to(tl.float32)
    return ((alone.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _add_few(total, count, region, value):
    """``(total, count)`` of 32 regions plus the values of a tile; region -1 is dropped.

    Most tiles of a detector fill a few regions: asking each logit for its bit is less than a
    histogram of the tile.
    """
    regions = tl.arange(0, 32)
    here = tl.where(region >= 0, 1 << tl.maximum(region, 0), 0)
    bits = tl.reduce(here, None, _either)
    while bits != 0:
        k = _lowest_bit(bits)
        theirs = region == k
        amount = tl.sum(tl.where(theirs, value, 0.0))
        number = tl.sum(theirs.to(tl.int32))
        total = tl.where(regions == k, total + amount, total)
        count = tl.where(regions == k, count + number, count)
        bits = bits & (bits - 1)
    return total, count


@triton.jit
def _add_many(total, count, region, value, REGIONS: tl.constexpr):
    """The same for more regions: a histogram counts them, and says which are filled."""
    regions = tl.arange(0, REGIONS)
    # One reshape, and the mask out of it: of two, each may be compiled to an order of its own.
    flat = tl.reshape(region, [region.numel])
    counts = tl.histogram(tl.maximum(flat, 0), REGIONS, mask=flat >= 0)
    word = 0
    while word < REGIONS // 32:
        filled = (counts > 0) & (regions // 32 == word)
        bits = tl.sum(tl.where(filled, 1 << (regions % 32), 0), 0)
        while bits != 0:
            k = word * 32 + _lowest_bit(bits)
            amount = tl.sum(tl.where(region == k, value, 0.0))
            total = tl.where(regions == k, total + amount, total)
            bits = bits & (bits - 1)
        word += 1
    return total, count + counts


@triton.jit
def _add_tile(
    total,
    count,
    tile,
    pointers,
    classes,
    bins,
    sizes,
    strides,
    mu,
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    REGIONS: tl.constexpr,
    WALK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``(total, count)`` plus the losses of a tile."""
    start, run, within, _ = tile
    coords = coordinates(start, run, sizes, WALK[0], within)
    x, y, positive, keep, _ = load_logits(
        tile, pointers, classes, coords, strides, WALK, MASKED, KIND != "asl1"
    )
    value = pointwise_value(x, y, positive, mu, 0.0, 0.0, 0.0, KIND, False, HARD)
    region = tl.where(keep, region_of(x, y, positive, mu, bins, KIND, HARD), -1)
    if REGIONS == 32:
        total, count = _add_few(total, count, region, value)
    else:
        total, count = _add_many(total, count, region, value, REGIONS)
    return total, count


@triton.jit(do_not_specialize=["cell", "width"])
def region_sums_kernel(
    # pointers
    x_ptr,  # logits
    dense_ptr,  # dense targets, or None
    label_ptr,  # [rows] integers, or None
    quality_ptr,  # [rows], or None
    weight_ptr,  # [rows] or per logit, or None: a mask
    params_ptr,  # [4] float32, or None
    loss_ptr,  # [REGIONS, width] float32
    count_ptr,  # [REGIONS, width] int32
    # shapes
    cell,  # of the first program
    width,  # programs of all launches
    n,
    n_classes,
    bins,
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
    p0,
    p1,
    p2,
    p3,
    # constants
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    REGIONS: tl.constexpr,
    N_DIMS: tl.constexpr,
    CLASS_DIM: tl.constexpr,
    LINEAR: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
    RUN: tl.constexpr,  # logits that share a row or a class
    BLOCK: tl.constexpr,
):
    """1-D grid; program i takes tiles i, i + programs, ... of BLOCK logits in memory order."""
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    run, within = tile_of(BLOCK, RUN)
    pointers = (x_ptr, dense_ptr, label_ptr, quality_ptr, weight_ptr, None)
    sizes = (1, size_1, size_2, size_3)
    strides = (
        (x_s0, x_s1, x_s2, x_s3),
        (row_s0, row_s1, row_s2, row_s3),
        (dense_s0, dense_s1, dense_s2, dense_s3),
        (weight_s0, weight_s1, weight_s2, weight_s3),
    )
    classes = (n_classes, ignore_index)
    WALK: tl.constexpr = (N_DIMS, CLASS_DIM, LINEAR, ROW_WEIGHT)
    mu, _, _, _ = load_params(params_ptr, (p0, p1, p2, p3))
    total = tl.zeros([REGIONS], tl.float32)
    count = tl.zeros([REGIONS], tl.int32)
    start = pid * BLOCK
    while start + BLOCK <= n:
        tile = (start, run, within, n)
        total, count = _add_tile(
            total, count, tile, pointers, classes, bins, sizes, strides, mu, KIND, HARD, REGIONS,
            WALK, False,
        )  # fmt: skip
        start += programs * BLOCK
    if start < n:
        tile = (start, run, within, n)
        total, count = _add_tile(
            total, count, tile, pointers, classes, bins, sizes, strides, mu, KIND, HARD, REGIONS,
            WALK, True,
        )  # fmt: skip
    cells = tl.arange(0, REGIONS) * tl.cast(width, tl.int64) + cell + pid
    tl.store(loss_ptr + cells, total)
    tl.store(count_ptr + cells, count)


@triton.jit
def region_totals_kernel(
    loss_ptr,  # [regions, programs] float32
    count_ptr,  # [regions, programs] int32
    total_ptr,  # [2, regions] float32: loss and count
    programs,
    BLOCK: tl.constexpr,
):
    """One program per region, a tree over all programs' tables, lane by lane."""
    region = tl.program_id(0)
    regions = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)  # of a few programs each
    start = tl.cast(0, tl.int32)
    while start < programs:
        mask = start + lanes < programs
        cells = region * programs + start + lanes
        loss += tl.load(loss_ptr + cells, mask=mask, other=0.0)
        count += tl.load(count_ptr + cells, mask=mask, other=0)
        start += BLOCK
    tl.store(total_ptr + region, tl.sum(loss, 0))
    tl.store(total_ptr + regions + region, tl.sum(count.to(tl.int64), 0).to(tl.float32))


@triton.jit
def _one_minus_exp(z):
    """1 - exp(z) for z <= 0, without cancellation near 0."""
    series = 1.0 + z / 5.0 * (1.0 + z / 6.0)
    series = 1.0 + z / 2.0 * (1.0 + z / 3.0 * (1.0 + z / 4.0 * series))
    return tl.where(z > -0.1, -z * series, 1.0 - tl.exp(z))


@triton.jit
def harmonise_kernel(
    # pointers
    total_ptr,  # [2, REGIONS] float32: loss and count
    amount_ptr,  # [bins], running counts A, or None
    updates_ptr,  # [bins], numbers of updates t, or None
    params_ptr,  # [4] float32, or None
    loss_ptr,  # [] float32
    weight_ptr,  # [bins] float32, weight of each region
    new_amount_ptr,  # [bins]
    new_updates_ptr,  # [bins]
    # shapes
    bins,
    # scalars
    p0,
    p1,
    p2,
    p3,
    # constants
    BIAS_CORRECTION: tl.constexpr,
    NONEMPTY: tl.constexpr,
    REGIONS: tl.constexpr,
):
    """One program: the running state, a weight per region, the loss."""
    _, keep, take, log_keep = load_params(params_ptr, (p0, p1, p2, p3))
    region = tl.arange(0, REGIONS)
    inside = region < bins
    loss = tl.load(total_ptr + region)
    count = tl.load(total_ptr + REGIONS + region)
    filled = inside & (count > 0)
    seen = tl.zeros([REGIONS], tl.float32)
    updates = tl.zeros([REGIONS], tl.float32)
    if amount_ptr is not None:
        seen = tl.load(amount_ptr + region, mask=inside, other=0.0).to(tl.float32)
        updates = tl.load(updates_ptr + region, mask=inside, other=0.0).to(tl.float32)
    seen = tl.where(filled, keep * seen + take * count, seen)
    updates = tl.where(filled, updates + 1.0, updates)
    tl.store(new_amount_ptr + region, seen, mask=inside)
    tl.store(new_updates_ptr + region, updates, mask=inside)
    amount = tl.where(filled, seen, 1.0)
    if BIAS_CORRECTION:
        amount /= tl.where(filled, _one_minus_exp(updates * log_keep), 1.0)
    if NONEMPTY:
        n = tl.maximum(tl.sum(filled.to(tl.int32), 0), 1).to(tl.float32)
    else:
        n = tl.cast(bins, tl.float32)
    weight = tl.where(filled, 1.0 / (n * amount), 0.0)
    tl.store(weight_ptr + region, weight, mask=inside)
    tl.store(loss_ptr, tl.sum(tl.where(filled, loss * weight, 0.0), 0))


def takes(x, labels, quality, dense, weight, *args) -> bool:
    """True if the kernels can read the operands in place."""
    return walkable(x, dense, weight)


def _region_sums(
    x, labels, quality, dense, weight, params, kind, bins, ignore_index, losses, counts, programs,
    cell,
):  # fmt: skip
    walk = walk_over(x, dense, labels, weight)
    pointer, numbers = scalar_args(params, 4)
    wrap_triton(region_sums_kernel, x)[(programs,)](
        x,
        dense,
        labels,
        quality,
        weight,
        pointer,
        losses,
        counts,
        cell,
        losses.shape[1],
        x.numel(),
        x.shape[-1],
        bins,
        *walk.numbers,
        ignore_index,
        *numbers,
        KIND=kind,
        HARD=is_hard(kind, labels, quality),
        REGIONS=losses.shape[0],
        **walk.constants,
        BLOCK=HISTOGRAM.block,
        num_warps=HISTOGRAM.num_warps,
    )


def region_totals(x, labels, quality, dense, weight, params, kind, bins, ignore_index):
    """Loss and count of each region over all levels, float32 (2, regions)."""
    device = x[0].device
    regions = max(1 << (bins - 1).bit_length(), 32)
    total = torch.empty((2, regions), dtype=torch.float32, device=device)
    filled = [k for k, level in enumerate(x) if level.numel() > 0]
    if not filled:  # a process of several may have no anchors
        return total.zero_()
    programs = [min(cdiv(x[k].numel(), HISTOGRAM.block), HISTOGRAM_PROGRAMS) for k in filled]
    losses = torch.empty((regions, sum(programs)), dtype=torch.float32, device=device)
    counts = torch.empty_like(losses, dtype=torch.int32)
    cell = 0
    for k, n_programs in zip(filled, programs, strict=True):
        level = (at(a, k) for a in (x, labels, quality, dense, weight))
        args = (*level, params, kind, bins, ignore_index, losses, counts)
        _region_sums(*args, n_programs, cell)
        cell += n_programs
    wrap_triton(region_totals_kernel, x[0])[(regions,)](
        losses,
        counts,
        total,
        losses.shape[1],
        BLOCK=REGION_TOTALS.block,
        num_warps=REGION_TOTALS.num_warps,
    )
    return total


def harmonise(total, amount, updates, params, bins, bias_correction, normalize):
    """``(loss, new amount, new updates, weights)`` from the totals of all processes."""
    pointer, numbers = scalar_args(params, 4)
    loss = torch.empty((), dtype=torch.float32, device=total.device)
    weights = torch.empty(bins, dtype=torch.float32, device=total.device)
    new_amount = torch.empty_like(weights if amount is None else amount)
    new_updates = torch.empty_like(weights if updates is None else updates)
    wrap_triton(harmonise_kernel, total)[(1,)](
        total,
        amount,
        updates,
        pointer,
        loss,
        weights,
        new_amount,
        new_updates,
        bins,
        *numbers,
        BIAS_CORRECTION=bias_correction,
        NONEMPTY=normalize == "nonempty",
        REGIONS=total.shape[1],
        num_warps=1,
    )
    return loss, new_amount, new_updates, weights


@launcher
def forward(
    x: list[Tensor],
    labels: list[Tensor],
    quality: list[Tensor],
    dense: list[Tensor],
    weight: list[Tensor],
    amount: Tensor | None,
    updates: Tensor | None,
    params: Tensor,
    kind: str,
    bins: int,
    bias_correction: bool,
    normalize: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, new state and the weight of each region.

    Args, of each level or an empty list for None:
        x: predictions (..., C), any strides.
        labels, quality: contiguous (...).
        dense: targets (..., C), any strides.
        weight: contiguous (...), or (..., C) with any strides.

    Args:
        amount, updates: the state, each contiguous (bins,), or None.
        params: (mu, m, 1 - m, log m), numbers or a float32 tensor.

    Returns:
        ``(loss, new amount, new updates, weights)``.
    """
    total = region_totals(x, labels, quality, dense, weight, params, kind, bins, ignore_index)
    return harmonise(total, amount, updates, params, bins, bias_correction, normalize)


@launcher
def backward(
    grad: Tensor,
    weights: Tensor,
    x: Tensor,
    labels: Tensor | None,
    quality: Tensor | None,
    dense: Tensor | None,
    weight: Tensor | None,
    amount: Tensor | None,
    updates: Tensor | None,
    params: Tensor,
    kind: str,
    bins: int,
    bias_correction: bool,
    normalize: str,
    ignore_index: int,
    process_group: str = "",
    flag: Tensor | None = None,
) -> Tensor:
    """Gradient of the predictions: the pointwise one times the weight of the region."""
    args = (x, labels, quality, dense, weight, None, params, kind, ignore_index)
    return gradient(grad, None, "sum", args, weights)
