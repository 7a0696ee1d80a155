"""One kernel, compiled as forward and as backward, for every pointwise loss.

Each program takes tiles of BLOCK consecutive logits in memory order, as ``_logits.py`` loads them.
A loss is a pair of functions in ``_formulas.py``, chosen by the string KIND.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonloss._op import launcher, wrap_triton

from ._config import POINTWISE, POINTWISE_PROGRAMS, POINTWISE_TILES
from ._finish import at, finish, no_scale, over_levels, room_for_sums
from ._formulas import POWER, is_hard, pointwise_derivative, pointwise_value, region_of
from ._logits import load_logits, walk_over, walkable
from ._numbers import load_params, scalar_args
from ._walk import cdiv, coordinates, load_or_zero, offset_of, tile_of


@triton.jit
def _pointwise_tile(
    tile,
    pointers,
    region_ptr,
    bins,
    out_ptr,
    grad_ptr,
    grad_scale,
    classes,
    layout,  # sizes; strides of operands, of the output, of the upstream gradient
    params,
    KIND: tl.constexpr,
    SQUARE: tl.constexpr,
    HARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    REDUCED: tl.constexpr,
    WALK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Loss or gradient of one tile, stored if there is a value per logit; ``(result, keep)``."""
    start, run, within, n = tile
    sizes, strides, out_strides, grad_strides = layout
    N_DIMS: tl.constexpr = WALK[0]
    LINEAR: tl.constexpr = WALK[2]
    # Apart from the pointers, which torch.compile would else take for written (see _rows.locate).
    coords = coordinates(start, run, sizes, N_DIMS, within)
    offs = run + within
    x, y, positive, keep, scale = load_logits(
        tile, pointers, classes, coords, strides, WALK, MASKED, KIND != "asl1"
    )
    p0, p1, p2, p3 = params
    if region_ptr is not None:
        region = region_of(x, y, positive, p0, bins, KIND, HARD)
        scale = tl.where(keep, tl.load(region_ptr + region), 0.0)
    if BACKWARD:
        result = pointwise_derivative(x, y, positive, p0, p1, p2, p3, KIND, SQUARE, HARD)
        if REDUCED:
            result *= grad_scale * scale
        else:
            if LINEAR:
                grad = load_or_zero(grad_ptr + start + offs, MASKED, keep)
            else:
                grad = load_or_zero(
                    grad_ptr + offset_of(coords, grad_strides, N_DIMS), MASKED, keep
                )
            result *= grad.to(tl.float32) * scale
    else:
        result = pointwise_value(x, y, positive, p0, p1, p2, p3, KIND, SQUARE, HARD) * scale
    result = tl.where(keep, result, 0.0)
    if BACKWARD or not REDUCED:
        if LINEAR:
            out_ptrs = out_ptr + start + offs
        else:
            out_ptrs = out_ptr + offset_of(coords, out_strides, N_DIMS)
        if MASKED:
            tl.store(out_ptrs, result, mask=run < n - start)
        else:
            tl.store(out_ptrs, result)
    return result, tl.broadcast_to(keep, result.shape)


@triton.jit(do_not_specialize=["cell"])
def pointwise_kernel(
    # pointers
    x_ptr,  # logits
    dense_ptr,  # dense targets, or None
    label_ptr,  # [rows] integers, or None
    quality_ptr,  # [rows], or None
    weight_ptr,  # [rows] or per logit, or None
    class_weight_ptr,  # [classes], or None
    region_ptr,  # [bins] float32, weight of each region of the gradient norm, or None
    params_ptr,  # [4] float32, or None
    grad_ptr,  # upstream gradient: [] or per logit
    scale_ptr,  # [] float32, 1 / divisor, or None
    out_ptr,  # per logit: loss or gradient; forward and reduced: [programs] partial sums
    count_ptr,  # [programs] int32, or None
    # shapes
    cell,  # of the first program's sum
    n,  # logits, of a layer
    span,
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
    out_s0,
    out_s1,
    out_s2,
    out_s3,
    grad_s0,
    grad_s1,
    grad_s2,
    grad_s3,
    x_layer,
    row_layer,
    out_layer,
    grad_layer,
    # scalars
    ignore_index,
    p0,
    p1,
    p2,
    p3,
    # constants
    KIND: tl.constexpr,
    SQUARE: tl.constexpr,
    HARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    REDUCED: tl.constexpr,
    N_DIMS: tl.constexpr,
    CLASS_DIM: tl.constexpr,
    LINEAR: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
    LAYERED: tl.constexpr,
    RUN: tl.constexpr,  # logits that share a row or a class
    BLOCK: tl.constexpr,
):
    """Program i takes logits [i span, (i+1) span) in memory order, BLOCK at a time; of the layer
    that is the second axis of the grid, if there are layers."""
    pid = tl.program_id(0).to(tl.int64)
    if LAYERED:  # labels and qualities of rows, and sums, of each layer
        layer = tl.program_id(1).to(tl.int64)
        x_ptr += layer * x_layer
        label_ptr += layer * row_layer
        if quality_ptr is not None:
            quality_ptr += layer * row_layer
        if BACKWARD:
            grad_ptr += layer * grad_layer
            scale_ptr += layer
            out_ptr += layer * out_layer
        else:
            out_ptr += layer * tl.num_programs(0)
    run, within = tile_of(BLOCK, RUN)
    pointers = (x_ptr, dense_ptr, label_ptr, quality_ptr, weight_ptr, class_weight_ptr)
    sizes = (1, size_1, size_2, size_3)
    strides = (
        (x_s0, x_s1, x_s2, x_s3),
        (row_s0, row_s1, row_s2, row_s3),
        (dense_s0, dense_s1, dense_s2, dense_s3),
        (weight_s0, weight_s1, weight_s2, weight_s3),
    )
    out_strides = (out_s0, out_s1, out_s2, out_s3)
    grad_strides = (grad_s0, grad_s1, grad_s2, grad_s3)
    layout = (sizes, strides, out_strides, grad_strides)
    classes = (n_classes, ignore_index)
    WALK: tl.constexpr = (N_DIMS, CLASS_DIM, LINEAR, ROW_WEIGHT)
    params = load_params(params_ptr, (p0, p1, p2, p3))
    grad_scale = 1.0
    if BACKWARD and REDUCED:
        grad_scale = tl.load(grad_ptr).to(tl.float32)
        if scale_ptr is not None:
            grad_scale *= tl.load(scale_ptr)
    total = tl.zeros((run + within).shape, tl.float32)
    count = tl.zeros(total.shape, tl.int32)
    start = pid * span
    end = tl.minimum(start + span, n)
    while start + BLOCK <= end:
        result, keep = _pointwise_tile(
            (start, run, within, n), pointers, region_ptr, bins, out_ptr, grad_ptr, grad_scale,
            classes, layout, params, KIND, SQUARE, HARD, BACKWARD, REDUCED, WALK, False,
        )  # fmt: skip
        total += result
        count += keep.to(tl.int32)
        start += BLOCK
    if start < end:
        result, keep = _pointwise_tile(
            (start, run, within, n), pointers, region_ptr, bins, out_ptr, grad_ptr, grad_scale,
            classes, layout, params, KIND, SQUARE, HARD, BACKWARD, REDUCED, WALK, True,
        )  # fmt: skip
        total += result
        count += keep.to(tl.int32)
    if REDUCED and not BACKWARD:
        tl.store(out_ptr + cell + pid, tl.sum(total))
        if count_ptr is not None:
            tl.store(count_ptr + cell + pid, tl.sum(count))


def span_of(n: int) -> int:
    """Logits a program takes: of few, one tile."""
    tiles = n // (POINTWISE.block * POINTWISE_PROGRAMS)
    return POINTWISE.block * min(max(tiles, 1), POINTWISE_TILES)


def takes(x, labels, quality, dense, weight, *args) -> bool:
    """True if the kernel can read the operands in place."""
    return walkable(x, dense, weight)


def _launch(
    x, labels, quality, dense, weight, class_weight, params, kind, ignore_index, out, count=None,
    grad=None, scale=None, regions=None, *, backward, reduced, cell=0, layered=False,
):  # fmt: skip
    """Loss or gradient of one tensor of logits; a sum and a count of each program if reduced.

    With ``layered`` the first dim of x, labels and quality is one of equal parts, each with its own
    sums.
    """
    per_logit = [out if backward or not reduced else None, None if reduced else grad]
    part = x
    if layered:
        part, per_logit = x[0], [out[0] if backward else None, None]
    walk = walk_over(part, dense, labels, weight, class_weight, per_logit)
    pointer, numbers = scalar_args(params, 4)
    n = part.numel()
    span = span_of(x.numel())
    grid = (cdiv(n, span), len(x)) if layered else (cdiv(n, span),)
    wrap_triton(pointwise_kernel, x)[grid](
        x,
        dense,
        labels,
        quality,
        weight,
        class_weight,
        regions,
        pointer,
        grad,
        scale,
        out,
        count,
        cell,
        n,
        span,
        x.shape[-1],
        0 if regions is None else regions.numel(),
        *walk.numbers,
        x.stride(0) if layered else 0,
        labels.stride(0) if layered else 0,
        out.stride(0) if layered and backward else 0,
        grad.stride(0) if layered and backward else 0,
        ignore_index,
        *numbers,
        KIND=kind,
        SQUARE=pointer is None and kind in POWER and numbers[POWER[kind]] == 2.0,
        HARD=is_hard(kind, labels, quality),
        BACKWARD=backward,
        REDUCED=reduced,
        LAYERED=layered,
        **walk.constants,
        BLOCK=POINTWISE.block,
        num_warps=POINTWISE.num_warps,
    )


@launcher
def forward(
    x: Tensor,
    labels: Tensor | None,
    quality: Tensor | None,
    dense: Tensor | None,
    weight: Tensor | None,
    class_weight: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    kind: str,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Loss of all logits, and the factor that the backward needs.

    Args:
        x: logits (..., C), any strides.
        labels, quality: contiguous (...), or None.
        dense: targets (..., C), any strides, or None.
        weight: contiguous (...), or (..., C) with any strides, or None.
        class_weight: contiguous (C,), or None.
        avg_factor, params: numbers or float tensors of 1 and 4 entries.
        reduction: or ``"layers"``, see ``losses.pointwise.by_layer``.

    Returns:
        ``(loss, scale)``, float32.
    """
    args = (x, labels, quality, dense, weight, class_weight, params, kind, ignore_index)
    if reduction == "layers":
        programs = cdiv(x[0].numel(), span_of(x.numel()))
        partials, _ = room_for_sums(x, len(x) * programs, avg_factor, reduction)
        _launch(*args, partials, backward=False, reduced=True, layered=True)
        return finish(partials, None, avg_factor, reduction, len(x))
    if reduction == "none":
        loss = torch.empty_like(x, dtype=torch.float32)
        _launch(*args, loss, backward=False, reduced=False)
        return loss, no_scale(x)
    partials, counts = room_for_sums(x, cdiv(x.numel(), span_of(x.numel())), avg_factor, reduction)
    _launch(*args, partials, counts, backward=False, reduced=True)
    return finish(partials, counts, avg_factor, reduction)


@launcher
def forward_levels(
    x: list[Tensor],
    labels: list[Tensor],
    quality: list[Tensor],
    dense: list[Tensor],
    weight: list[Tensor],
    class_weight: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    kind: str,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The sum or mean of ``forward`` over levels; a list may be empty where that has None."""

    def launch(k, cell, partials, counts):
        level = (at(a, k) for a in (x, labels, quality, dense, weight))
        args = (*level, class_weight, params, kind, ignore_index, partials, counts)
        _launch(*args, backward=False, reduced=True, cell=cell)

    def programs(k):
        return cdiv(x[k].numel(), span_of(x[k].numel()))

    return over_levels(x, programs, avg_factor, reduction, launch)


def gradient(grad, scale, reduction, args, regions=None):
    """Gradient of the logits: their dtype, and their strides if they are dense in memory.

    Args:
        args: x and all others that ``_launch`` takes before the output.
        regions: one weight for each region of the gradient norm, which stands in for the weights:
            those only say what counts.
    """
    x, _, _, dense, weight, *_ = args
    grad_x = torch.empty_like(x)
    reduced = reduction != "none"
    if not reduced:
        scale = None
        if not any(grad.stride()):
            reduced = True  # an expanded scalar, as .sum() sends back
        elif not walkable(x, dense, weight, grad):
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    args = (*args, grad_x, None, grad, scale, regions)
    _launch(*args, backward=True, reduced=reduced, layered=reduction == "layers")
    return grad_x


@launcher
def backward(
    grad: Tensor,
    scale: Tensor,
    x: Tensor,
    labels: Tensor | None,
    quality: Tensor | None,
    dense: Tensor | None,
    weight: Tensor | None,
    class_weight: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    kind: str,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """See ``gradient``."""
    args = (x, labels, quality, dense, weight, class_weight, params, kind, ignore_index)
    return gradient(grad, scale, reduction, args)
