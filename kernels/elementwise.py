"""One kernel, compiled as forward and as backward, for every pointwise loss.

Each program takes tiles of BLOCK consecutive logits in memory order. With label targets it finds
rows and classes by division, once for the run of neighbours that a 16-byte load brings; dense
operands that lie in memory like the logits need no index at all. A loss is a pair of
tile functions in ``_tiles.py``, chosen by the string KIND.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._index import coordinates, load_or_zero, offset_of, tile_of
from ._launch import POINTWISE, POINTWISE_PROGRAMS, POINTWISE_TILES, scalar_args
from ._layout import (
    MAX_DIMS,
    MAX_INNER_SIZE,
    Layout,
    contiguous_strides,
    merged_dims,
    same_memory_order,
)
from ._reduce import finish, finish_kernel
from ._tiles import pointwise_derivative, pointwise_value, region_of

# Which parameter is the power of the modulating factor.
POWER = {"focal": 2, "quality": 0, "varifocal": 1}
# Losses with a shorter formula for targets of 0 and 1, in ``_tiles.hard_value``.
HARD = frozenset({"focal", "focal_star", "quality", "varifocal", "bce"})


def is_hard(kind: str, labels, quality) -> bool:
    """True if the targets are 0 and 1, and the loss has a formula for them."""
    return kind in HARD and labels is not None and quality is None


@triton.jit
def places(
    start,
    offs,
    coords,  # of offs; the outer three may have fewer elements: [runs, 1]
    strides,  # of x, rows, dense target, weight
    N_DIMS: tl.constexpr,
    CLASS_DIM: tl.constexpr,
    LINEAR: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
):
    """Where a tile of logits lies: offsets of x, rows, dense targets and weights; its classes.

    A tile is [logits], or [runs, logits of a run]: those of a run are neighbours in the
    innermost dim, so that all that does not change along it is worked out once a run.
    """
    x_strides, row_strides, dense_strides, weight_strides = strides
    if CLASS_DIM == 3:  # rows do not end inside a run
        row = offset_of((coords[0], coords[1], coords[2], 0), row_strides, 4)
    else:
        row = offset_of(coords, row_strides, N_DIMS)
    if CLASS_DIM < 0:
        cls = tl.zeros(coords[2].shape, tl.int64)
    else:
        cls = coords[CLASS_DIM]
    if LINEAR:
        x = start + offs
        dense = x
        weight = x
    else:
        x = offset_of(coords, x_strides, N_DIMS)
        dense = offset_of(coords, dense_strides, N_DIMS)
        weight = offset_of(coords, weight_strides, N_DIMS)
    if ROW_WEIGHT:
        weight = row
    return x, row, dense, weight, cls


@triton.jit
def judged(
    x,
    dense,
    label,
    weight,
    inside,
    cls,
    within,
    n_classes,
    ignore_index,
    HAS_LABEL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """What the loaded values mean: ``(x, y, positive, keep, scale)``, y without box qualities.

    ``keep`` is False beyond the end, for ignored rows and for weights of 0: whatever was stored
    there, NaN included, x and scale hold it, and the caller drops what it made of them.

    A function without pointers, like ``places``: where a value that came out of a function decides
    what a kernel writes to, torch.compile takes all pointers that went in for written, and copies
    what they point to. Such a kernel loads in its own body.
    """
    keep = inside
    scale = tl.full(inside.shape, 1.0, tl.float32)
    if HAS_WEIGHT:
        scale = weight.to(tl.float32)
        keep = keep & (scale > 0)
    if HAS_LABEL:
        label = label.to(tl.int64)
        # One comparison of 64 bits: below 0 is far above as an unsigned number. Then 32 are enough.
        keep = keep & (label.to(tl.uint64, bitcast=True) <= tl.cast(n_classes, tl.uint64))
        ignored = tl.cast(ignore_index, tl.int64)
        ignored = tl.where((ignored >= 0) & (ignored <= n_classes), ignored, -1).to(tl.int32)
        keep = keep & (label.to(tl.int32) != ignored)
        # a difference: nothing but the comparison is left for each logit of a run
        positive = keep & ((label - (cls - within)).to(tl.int32) == within)
        y = tl.where(positive, 1.0, 0.0)
    else:
        y = tl.where(keep, dense.to(tl.float32), 0.0)
        positive = y > 0
    x = x.to(tl.float32)
    x += 0.0 * x  # an infinite logit gives NaN, not a plausible number
    return x, y, positive, keep, scale


@triton.jit
def load_logits(
    start,
    run,  # [runs, 1]
    within,  # [1, logits of a run]
    n,
    pointers,  # x, dense target, label, quality, weight, class weight
    n_classes,
    ignore_index,
    coords,
    strides,  # of x, rows, dense target, weight
    N_DIMS: tl.constexpr,
    CLASS_DIM: tl.constexpr,
    LINEAR: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile of logits with their targets: ``(x, y, positive, keep, scale)``, see ``judged``."""
    x_ptr, dense_ptr, label_ptr, quality_ptr, weight_ptr, class_weight_ptr = pointers
    offs = run + within
    # a run lies inside as a whole, or not at all
    inside = run < n - start if MASKED else tl.full(run.shape, 1, tl.int1)
    x_at, row, dense_at, weight_at, cls = places(
        start, offs, coords, strides, N_DIMS, CLASS_DIM, LINEAR, ROW_WEIGHT
    )
    x = load_or_zero(x_ptr + x_at, MASKED, inside)
    dense = run
    label = run
    weight = run
    if weight_ptr is not None:
        weight = load_or_zero(weight_ptr + weight_at, MASKED, inside)
    if label_ptr is not None:
        label = load_or_zero(label_ptr + row, MASKED, inside)
    else:
        dense = load_or_zero(dense_ptr + dense_at, MASKED, inside)
    x, y, positive, keep, scale = judged(
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
    if quality_ptr is not None:
        if CLASS_DIM == 3:
            read = inside & (label >= 0) & (label < n_classes)
            quality = tl.load(quality_ptr + row, mask=read, other=0.0).to(tl.float32)
            y = tl.where(positive, quality, 0.0)
        else:
            y = tl.load(quality_ptr + row, mask=positive, other=0.0).to(tl.float32)
    if class_weight_ptr is not None:
        scale *= load_or_zero(class_weight_ptr + cls, MASKED, inside).to(tl.float32)
    return x, y, positive, keep, scale


@triton.jit
def load_params(params_ptr, numbers):
    """Hyper-parameters as float32: from memory when traced, else from the arguments."""
    if params_ptr is not None:
        p0 = tl.load(params_ptr).to(tl.float32)
        p1 = tl.load(params_ptr + 1).to(tl.float32)
        p2 = tl.load(params_ptr + 2).to(tl.float32)
        p3 = tl.load(params_ptr + 3).to(tl.float32)
    else:
        # Inductor passes Python floats as float64
        p0 = tl.cast(numbers[0], tl.float32)
        p1 = tl.cast(numbers[1], tl.float32)
        p2 = tl.cast(numbers[2], tl.float32)
        p3 = tl.cast(numbers[3], tl.float32)
    return p0, p1, p2, p3


@triton.jit
def _pointwise_tile(
    start,
    run,
    within,
    n,
    pointers,
    region_ptr,
    bins,
    out_ptr,
    grad_ptr,
    grad_scale,
    n_classes,
    ignore_index,
    sizes,
    strides,
    out_strides,
    grad_strides,
    params,
    KIND: tl.constexpr,
    SQUARE: tl.constexpr,
    HARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    REDUCED: tl.constexpr,
    N_DIMS: tl.constexpr,
    CLASS_DIM: tl.constexpr,
    LINEAR: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Loss or gradient of one tile, stored if there is a value per logit; ``(result, keep)``."""
    # Apart from the pointers, which torch.compile would else take for written (see _rows.locate).
    coords = coordinates(start, run, sizes, N_DIMS, within)
    offs = run + within
    x, y, positive, keep, scale = load_logits(
        start,
        run,
        within,
        n,
        pointers,
        n_classes,
        ignore_index,
        coords,
        strides,
        N_DIMS,
        CLASS_DIM,
        LINEAR,
        ROW_WEIGHT,
        MASKED,
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


@triton.jit
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
    n,
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
    RUN: tl.constexpr,  # logits that share a row or a class
    BLOCK: tl.constexpr,
):
    """1-D grid; program i takes logits [i span, (i+1) span) in memory order, BLOCK at a time."""
    pid = tl.program_id(0).to(tl.int64)
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
            start, run, within, n, pointers, region_ptr, bins, out_ptr, grad_ptr, grad_scale,
            n_classes, ignore_index, sizes, strides, out_strides, grad_strides, params,
            KIND, SQUARE, HARD, BACKWARD, REDUCED, N_DIMS, CLASS_DIM, LINEAR, ROW_WEIGHT, False,
        )  # fmt: skip
        total += result
        count += keep.to(tl.int32)
        start += BLOCK
    if start < end:
        result, keep = _pointwise_tile(
            start, run, within, n, pointers, region_ptr, bins, out_ptr, grad_ptr, grad_scale,
            n_classes, ignore_index, sizes, strides, out_strides, grad_strides, params,
            KIND, SQUARE, HARD, BACKWARD, REDUCED, N_DIMS, CLASS_DIM, LINEAR, ROW_WEIGHT, True,
        )  # fmt: skip
        total += result
        count += keep.to(tl.int32)
    if REDUCED and not BACKWARD:
        tl.store(out_ptr + pid, tl.sum(total))
        if count_ptr is not None:
            tl.store(count_ptr + pid, tl.sum(count))


def walkable(x, *others) -> bool:
    """True if the kernel can read ``x`` and the other per-logit tensors in place."""
    if x.dim() <= MAX_DIMS and x.numel() <= MAX_INNER_SIZE:
        return True
    rows = (*contiguous_strides(x.shape[:-1]), 0)
    class_index = (*(0,) * (x.dim() - 1), 1)
    per_logit = [t.stride() for t in others if t is not None and t.dim() == x.dim()]
    return merged_dims(x.shape, [x.stride(), rows, class_index, *per_logit]) is not None


class Walk(NamedTuple):
    """How a kernel goes over the logits and what lies beside them."""

    layout: Layout  # strides of x, rows, classes, dense targets, weights, then what else is read
    linear: bool  # all of them lie in one block of memory in the same order
    row_weight: bool
    class_dim: int  # where the kernel finds the class, or -1
    run: int  # neighbours that share all but the innermost coordinate: a 16-byte load of them


def walk_over(x, dense, labels, weight, class_weight=None, per_logit=(), *strides) -> Walk:
    """``per_logit``: further tensors of x' shape, or None; ``strides``: of what else is read."""
    shape = tuple(x.shape)
    zeros = (0,) * len(shape)
    row_weight = weight is not None and weight.dim() < x.dim()
    per_logit = [dense, None if row_weight else weight, *per_logit]
    linear = same_memory_order(
        shape, [x.stride(), *(t.stride() for t in per_logit if t is not None)]
    )
    rows = (*contiguous_strides(shape[:-1]), 0) if labels is not None or row_weight else zeros
    by_class = labels is not None or class_weight is not None or row_weight
    layout = merged_dims(
        shape,
        [
            x.stride(),
            rows,
            (*zeros[:-1], 1 if by_class else 0),
            *(zeros if t is None or linear else t.stride() for t in per_logit),
            *strides,
        ],
    )
    class_s = layout.strides[2]
    run = 16 // x.element_size() if layout.n_dims > 1 else 1
    while layout.sizes[-1] % run:
        run //= 2
    return Walk(layout, linear, row_weight, class_s.index(1) if 1 in class_s else -1, run)


def span_of(n: int) -> int:
    """Logits a program takes: of few, one tile."""
    tiles = n // (POINTWISE.block * POINTWISE_PROGRAMS)
    return POINTWISE.block * min(max(tiles, 1), POINTWISE_TILES)


def _launch(
    kernel, x, dense, labels, quality, weight, class_weight, regions, params, grad, scale, out,
    count, kind, ignore_index, backward, reduced,
):  # fmt: skip
    per_logit = [out if backward or not reduced else None, None if reduced else grad]
    walk = walk_over(x, dense, labels, weight, class_weight, per_logit)
    x_s, row_s, _, dense_s, weight_s, out_s, grad_s = walk.layout.strides
    pointer, numbers = scalar_args(params, 4)
    n = x.numel()
    span = span_of(n)
    kernel[(triton.cdiv(n, span),)](
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
        n,
        span,
        x.shape[-1],
        0 if regions is None else regions.numel(),
        *walk.layout.sizes[1:],
        *x_s,
        *row_s,
        *dense_s,
        *weight_s,
        *out_s,
        *grad_s,
        ignore_index,
        *numbers,
        KIND=kind,
        SQUARE=pointer is None and kind in POWER and numbers[POWER[kind]] == 2.0,
        HARD=is_hard(kind, labels, quality),
        BACKWARD=backward,
        REDUCED=reduced,
        N_DIMS=walk.layout.n_dims,
        CLASS_DIM=walk.class_dim,
        LINEAR=walk.linear,
        ROW_WEIGHT=walk.row_weight,
        RUN=walk.run,
        BLOCK=POINTWISE.block,
        num_warps=POINTWISE.num_warps,
    )


def launch_forward(
    x, dense, labels, quality, weight, class_weight, avg_factor, params,
    kind, ignore_index, reduction, kernel=pointwise_kernel, finish_with=finish_kernel,
):  # fmt: skip
    """Loss of all logits, and the factor that the backward needs.

    Args:
        x: logits (..., C), any strides.
        dense: targets (..., C), any strides, or None.
        labels, quality: contiguous (...), or None.
        weight: contiguous (...), or (..., C) with any strides, or None.
        class_weight: contiguous (C,), or None.
        avg_factor, params: numbers or float tensors of 1 and 4 entries.
        kernel, finish_with: the wrapped kernels in an op body.

    Returns:
        ``(loss, scale)``, float32.
    """
    args = (x, dense, labels, quality, weight, class_weight, None, params, None, None)
    if reduction == "none":
        loss = torch.empty_like(x, dtype=torch.float32)
        _launch(kernel, *args, loss, None, kind, ignore_index, False, False)
        return loss, torch.empty(0, dtype=torch.float32, device=x.device)
    n_programs = triton.cdiv(x.numel(), span_of(x.numel()))
    partials = torch.empty(n_programs, dtype=torch.float32, device=x.device)
    counts = None
    if reduction == "mean" and avg_factor is None:
        counts = torch.empty(n_programs, dtype=torch.int32, device=x.device)
    _launch(kernel, *args, partials, counts, kind, ignore_index, False, True)
    return finish(partials, counts, avg_factor, reduction, finish_with)


def launch_backward(
    x, grad, scale, dense, labels, quality, weight, class_weight, params,
    kind, ignore_index, reduction, kernel=pointwise_kernel, regions=None,
):  # fmt: skip
    """Gradient of the logits: their dtype, and their strides if they are dense in memory.

    ``regions``, one weight for each region of the gradient norm, stands in for the weights: those
    only say what counts.
    """
    grad_x = torch.empty_like(x)
    reduced = reduction != "none"
    if not reduced:
        scale = None
        if not any(grad.stride()):
            reduced = True  # an expanded scalar, as .sum() sends back
        elif not walkable(x, dense, weight, grad):
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    _launch(
        kernel, x, dense, labels, quality, weight, class_weight, regions, params, grad, scale,
        grad_x, None, kind, ignore_index, True, reduced,
    )  # fmt: skip
    return grad_x
