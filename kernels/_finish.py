"""Sum of per-program partial results and division by the divisor, in one small launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tritonloss._op import wrap_triton

from ._config import FINISH
from ._numbers import scalar_args


@triton.jit
def finish_kernel(
    # pointers
    partial_ptr,  # [n_partials] float32, of each layer
    count_ptr,  # [n_partials] int32, elements that count
    avg_factor_ptr,  # [1] or None
    loss_ptr,  # [] or [layers] float32
    scale_ptr,  # the same, what the backward multiplies the upstream gradient with
    # shapes
    n_partials,
    # scalars
    avg_factor,
    # constants
    MEAN: tl.constexpr,
    HAS_AVG_FACTOR: tl.constexpr,
    LAYERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for each result; compensated sums per lane, then a tree over the lanes: a fixed
    order."""
    if LAYERED:
        layer = tl.program_id(0).to(tl.int64)
        partial_ptr += layer * n_partials
        loss_ptr += layer
        scale_ptr += layer
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    lost = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int64)
    start = tl.cast(0, tl.int64)
    while start < n_partials:
        mask = start + lanes < n_partials
        value = tl.load(partial_ptr + start + lanes, mask=mask, other=0.0) - lost
        bigger = total + value
        # An infinite sum stays infinite: inf - inf would make it NaN.
        lost = tl.where(tl.abs(bigger) < float("inf"), (bigger - total) - value, 0.0)
        total = bigger
        if MEAN and not HAS_AVG_FACTOR:
            count += tl.load(count_ptr + start + lanes, mask=mask, other=0).to(tl.int64)
        start += BLOCK
    loss = tl.sum(total, 0)
    scale = tl.cast(1.0, tl.float32)
    if MEAN:
        if HAS_AVG_FACTOR:
            if avg_factor_ptr is not None:
                divisor = tl.load(avg_factor_ptr).to(tl.float32)
            else:
                divisor = tl.cast(avg_factor, tl.float32)
            divisor = tl.where(divisor <= 0.0, 1.0, divisor)
        else:
            divisor = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
        loss = loss / divisor
        scale = 1.0 / divisor
    tl.store(loss_ptr, loss)
    tl.store(scale_ptr, scale)


def finish(partials, counts, avg_factor, reduction: str, layers: int | None = None):
    """``(loss, scale)`` from partial sums and, for a mean without avg_factor, counts.

    With ``layers`` one of each, from as many equal parts of the partial sums.
    """
    shape = () if layers is None else (layers,)
    loss = torch.empty(shape, dtype=torch.float32, device=partials.device)
    scale = torch.empty_like(loss)
    pointer, (number,) = scalar_args(avg_factor, 1)
    wrap_triton(finish_kernel, partials)[(layers or 1,)](
        partials,
        counts,
        pointer,
        loss,
        scale,
        partials.numel() // (layers or 1),
        number,
        MEAN=reduction != "sum",
        HAS_AVG_FACTOR=avg_factor is not None,
        LAYERED=layers is not None,
        BLOCK=FINISH.block,
        num_warps=FINISH.num_warps,
    )
    return loss, scale


def room_for_sums(x, n_programs: int, avg_factor, reduction: str):
    """``(partials, counts)``, which the programs of a launch, or of several, write; None for counts
    that nothing needs."""
    partials = torch.empty(n_programs, dtype=torch.float32, device=x.device)
    if reduction != "mean" or avg_factor is not None:
        return partials, None
    return partials, torch.empty(n_programs, dtype=torch.int32, device=x.device)


def over_levels(x: list, programs, avg_factor, reduction: str, launch):
    """``finish`` after a launch for each level that is not empty, each into its own cells.

    Args:
        programs: ``(number of the level) -> `` programs of its launch.
        launch: ``(number of the level, first cell, partials, counts)``; not a slice of them, of
            which a captured graph would make copies.
    """
    n = [0 if level.numel() == 0 else programs(k) for k, level in enumerate(x)]
    partials, counts = room_for_sums(x[0], sum(n), avg_factor, reduction)
    cell = 0
    for k, n_programs in enumerate(n):
        if x[k].numel() > 0:
            launch(k, cell, partials, counts)
            cell += n_programs
    return finish(partials, counts, avg_factor, reduction)


def at(levels: list, k: int):
    """An argument of level k; the list of what no level has is empty."""
    return levels[k] if levels else None


def no_scale(x):
    """What a loss that is not reduced returns in place of a scale."""
    return torch.empty(0, dtype=torch.float32, device=x.device)
