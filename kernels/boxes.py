"""IoU, GIoU, DIoU and CIoU loss: one forward and one backward kernel, the loss chosen by KIND.

Boxes that lie in memory one after the other are read as a stream of 16-byte words and taken apart
in registers; all others through their strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._index import load_or_zero, offset_of
from ._launch import BOXES, scalar_args
from ._reduce import finish_kernel
from ._rows import (
    backward_rows,
    forward_rows,
    load_rows,
    locate,
    n_rows,
    number,
    row_layout,
    store_rows,
    upstream,
)
from ._tiles import box_loss


@triton.jit
def load_boxes(
    ptr,
    start,
    n,
    coords,
    strides,
    corner_stride,
    keep,
    N_DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of boxes ``(x1, y1, x2, y2)`` in float32, 0 where not kept."""
    if WIDE:
        lanes = tl.arange(0, 4 * BLOCK)
        words = load_or_zero(ptr + start * 4 + lanes, MASKED, lanes < 4 * (n - start))
        low, high = tl.split(tl.trans(tl.reshape(words, (BLOCK, 2, 2)), 0, 2, 1))
        x1, y1 = tl.split(low)
        x2, y2 = tl.split(high)
    else:
        ptrs = ptr + offset_of(coords, strides, N_DIMS)
        step = tl.cast(corner_stride, tl.int64)
        x1 = tl.load(ptrs, mask=keep, other=0)
        y1 = tl.load(ptrs + step, mask=keep, other=0)
        x2 = tl.load(ptrs + 2 * step, mask=keep, other=0)
        y2 = tl.load(ptrs + 3 * step, mask=keep, other=0)
    return (
        tl.where(keep, x1.to(tl.float32), 0.0),
        tl.where(keep, y1.to(tl.float32), 0.0),
        tl.where(keep, x2.to(tl.float32), 0.0),
        tl.where(keep, y2.to(tl.float32), 0.0),
    )


@triton.jit
def store_boxes(
    ptr,
    boxes,
    start,
    n,
    coords,
    strides,
    corner_stride,
    inside,
    N_DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The inverse of ``load_boxes``."""
    x1, y1, x2, y2 = boxes
    if WIDE:
        words = tl.trans(tl.join(tl.join(x1, y1), tl.join(x2, y2)), 0, 2, 1)
        lanes = tl.arange(0, 4 * BLOCK)
        words = tl.reshape(words, (4 * BLOCK,))
        if MASKED:
            tl.store(ptr + start * 4 + lanes, words, mask=lanes < 4 * (n - start))
        else:
            tl.store(ptr + start * 4 + lanes, words)
    else:
        ptrs = ptr + offset_of(coords, strides, N_DIMS)
        step = tl.cast(corner_stride, tl.int64)
        tl.store(ptrs, x1, mask=inside)
        tl.store(ptrs + step, y1, mask=inside)
        tl.store(ptrs + 2 * step, x2, mask=inside)
        tl.store(ptrs + 3 * step, y2, mask=inside)


@triton.jit
def _load_pair(
    pred_ptr, target_ptr, weight_ptr, start, n, coords, row, pred_strides, pred_sc, target_strides,
    target_sc, N_DIMS: tl.constexpr, PRED_WIDE: tl.constexpr, TARGET_WIDE: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inside, keep, scale = load_rows(start, tl.arange(0, BLOCK), n, weight_ptr, row)
    pred = load_boxes(
        pred_ptr, start, n, coords, pred_strides, pred_sc, keep, N_DIMS, PRED_WIDE, MASKED, BLOCK
    )
    target = load_boxes(
        target_ptr, start, n, coords, target_strides, target_sc, keep, N_DIMS, TARGET_WIDE, MASKED,
        BLOCK,
    )  # fmt: skip
    return pred, target, inside, keep, scale


@triton.jit
def _forward_block(
    pred_ptr, target_ptr, weight_ptr, out_ptr, count_ptr, pid, n, sizes, pred_strides, pred_sc,
    target_strides, target_sc, row_strides, eps, alpha_threshold, KIND: tl.constexpr,
    REDUCED: tl.constexpr, N_DIMS: tl.constexpr, PRED_WIDE: tl.constexpr,
    TARGET_WIDE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = pid * BLOCK
    coords, row = locate(start, tl.arange(0, BLOCK), sizes, row_strides, N_DIMS)
    pred, target, inside, keep, scale = _load_pair(
        pred_ptr, target_ptr, weight_ptr, start, n, coords, row, pred_strides, pred_sc,
        target_strides, target_sc, N_DIMS, PRED_WIDE, TARGET_WIDE, MASKED, BLOCK,
    )  # fmt: skip
    loss, _ = box_loss(pred, target, eps, alpha_threshold, KIND)
    store_rows(loss * scale, row, inside, keep, pid, out_ptr, count_ptr, REDUCED)


@triton.jit
def box_forward_kernel(
    # pointers
    pred_ptr,  # boxes
    target_ptr,  # boxes
    weight_ptr,  # [rows], or None
    params_ptr,  # [2] eps and alpha_threshold, or None
    out_ptr,  # [rows], or [programs] partial sums
    count_ptr,  # [programs] int32, or None
    # shapes
    n,
    size_1,
    size_2,
    size_3,
    # strides
    pred_s0,
    pred_s1,
    pred_s2,
    pred_s3,
    pred_sc,
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    target_s0,
    target_s1,
    target_s2,
    target_s3,
    target_sc,
    # scalars
    eps,
    alpha_threshold,
    # constants
    KIND: tl.constexpr,
    REDUCED: tl.constexpr,
    N_DIMS: tl.constexpr,
    PRED_WIDE: tl.constexpr,
    TARGET_WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1-D grid over blocks of boxes."""
    pid = tl.program_id(0).to(tl.int64)
    sizes = (1, size_1, size_2, size_3)
    pred_strides = (pred_s0, pred_s1, pred_s2, pred_s3)
    row_strides = (row_s0, row_s1, row_s2, row_s3)
    target_strides = (target_s0, target_s1, target_s2, target_s3)
    eps = number(params_ptr, 0, eps)
    alpha_threshold = number(params_ptr, 1, alpha_threshold)
    if (pid + 1) * BLOCK <= n:
        _forward_block(
            pred_ptr, target_ptr, weight_ptr, out_ptr, count_ptr, pid, n, sizes, pred_strides,
            pred_sc, target_strides, target_sc, row_strides, eps, alpha_threshold, KIND, REDUCED,
            N_DIMS, PRED_WIDE, TARGET_WIDE, False, BLOCK,
        )  # fmt: skip
    else:
        _forward_block(
            pred_ptr, target_ptr, weight_ptr, out_ptr, count_ptr, pid, n, sizes, pred_strides,
            pred_sc, target_strides, target_sc, row_strides, eps, alpha_threshold, KIND, REDUCED,
            N_DIMS, PRED_WIDE, TARGET_WIDE, True, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward_block(
    pred_ptr, target_ptr, weight_ptr, grad_ptr, scale_ptr, out_ptr, start, n, sizes, pred_strides,
    pred_sc, target_strides, target_sc, row_strides, out_strides, out_sc, grad_strides, eps,
    alpha_threshold, KIND: tl.constexpr, REDUCED: tl.constexpr, N_DIMS: tl.constexpr,
    PRED_WIDE: tl.constexpr, TARGET_WIDE: tl.constexpr, OUT_WIDE: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    coords, row = locate(start, tl.arange(0, BLOCK), sizes, row_strides, N_DIMS)
    pred, target, inside, keep, scale = _load_pair(
        pred_ptr, target_ptr, weight_ptr, start, n, coords, row, pred_strides, pred_sc,
        target_strides, target_sc, N_DIMS, PRED_WIDE, TARGET_WIDE, MASKED, BLOCK,
    )  # fmt: skip
    grad = upstream(grad_ptr, scale_ptr, coords, grad_strides, keep, N_DIMS, REDUCED) * scale
    _, slopes = box_loss(pred, target, eps, alpha_threshold, KIND)
    x1, y1, x2, y2 = slopes
    result = (
        tl.where(keep, x1 * grad, 0.0),
        tl.where(keep, y1 * grad, 0.0),
        tl.where(keep, x2 * grad, 0.0),
        tl.where(keep, y2 * grad, 0.0),
    )
    store_boxes(
        out_ptr, result, start, n, coords, out_strides, out_sc, inside, N_DIMS, OUT_WIDE, MASKED,
        BLOCK,
    )  # fmt: skip


@triton.jit
def box_backward_kernel(
    # pointers
    pred_ptr,  # boxes
    target_ptr,  # boxes
    weight_ptr,  # [rows], or None
    params_ptr,  # [2] eps and alpha_threshold, or None
    grad_ptr,  # upstream gradient: [] or per row
    scale_ptr,  # [] float32, 1 / divisor, or None
    out_ptr,  # gradient of the predicted boxes
    # shapes
    n,
    size_1,
    size_2,
    size_3,
    # strides
    pred_s0,
    pred_s1,
    pred_s2,
    pred_s3,
    pred_sc,
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    out_s0,
    out_s1,
    out_s2,
    out_s3,
    out_sc,
    grad_s0,
    grad_s1,
    grad_s2,
    grad_s3,
    target_s0,
    target_s1,
    target_s2,
    target_s3,
    target_sc,
    # scalars
    eps,
    alpha_threshold,
    # constants
    KIND: tl.constexpr,
    REDUCED: tl.constexpr,
    N_DIMS: tl.constexpr,
    PRED_WIDE: tl.constexpr,
    TARGET_WIDE: tl.constexpr,
    OUT_WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1-D grid over blocks of boxes; the forward is computed again, nothing of it is kept."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    sizes = (1, size_1, size_2, size_3)
    pred_strides = (pred_s0, pred_s1, pred_s2, pred_s3)
    row_strides = (row_s0, row_s1, row_s2, row_s3)
    target_strides = (target_s0, target_s1, target_s2, target_s3)
    out_strides = (out_s0, out_s1, out_s2, out_s3)
    grad_strides = (grad_s0, grad_s1, grad_s2, grad_s3)
    eps = number(params_ptr, 0, eps)
    alpha_threshold = number(params_ptr, 1, alpha_threshold)
    if start + BLOCK <= n:
        _backward_block(
            pred_ptr, target_ptr, weight_ptr, grad_ptr, scale_ptr, out_ptr, start, n, sizes,
            pred_strides, pred_sc, target_strides, target_sc, row_strides, out_strides, out_sc,
            grad_strides, eps, alpha_threshold, KIND, REDUCED, N_DIMS, PRED_WIDE, TARGET_WIDE,
            OUT_WIDE, False, BLOCK,
        )  # fmt: skip
    else:
        _backward_block(
            pred_ptr, target_ptr, weight_ptr, grad_ptr, scale_ptr, out_ptr, start, n, sizes,
            pred_strides, pred_sc, target_strides, target_sc, row_strides, out_strides, out_sc,
            grad_strides, eps, alpha_threshold, KIND, REDUCED, N_DIMS, PRED_WIDE, TARGET_WIDE,
            OUT_WIDE, True, BLOCK,
        )  # fmt: skip


def _wide(boxes, layout, strides) -> bool:
    """True if the walk takes these boxes one after the other in memory."""
    one_by_one = layout.n_dims == 1 and strides[-1] == 4
    return boxes.stride(-1) == 1 and (one_by_one or n_rows(boxes) == 1)


def launch_box_forward(
    pred, target, weight, avg_factor, params, kind, reduction,
    kernel=box_forward_kernel, finish_with=finish_kernel,
):  # fmt: skip
    """Loss of all pairs of boxes, and the factor that the backward needs.

    Args:
        pred, target: boxes (..., 4), any strides.
        weight: contiguous (...), or None.
        avg_factor, params: numbers or float tensors of 1 and 2 entries; params holds eps and
            alpha_threshold.
        kernel, finish_with: the wrapped kernels in an op body.

    Returns:
        ``(loss, scale)``, float32.
    """
    layout = row_layout(pred, target)
    pred_s, row_s, target_s = layout.strides
    pointer, numbers = scalar_args(params, 2)

    def launch(out, counts):
        kernel[(triton.cdiv(n_rows(pred), BOXES.block),)](
            pred,
            target,
            weight,
            pointer,
            out,
            counts,
            n_rows(pred),
            *layout.sizes[1:],
            *pred_s,
            pred.stride(-1),
            *row_s,
            *target_s,
            target.stride(-1),
            *numbers,
            KIND=kind,
            REDUCED=reduction != "none",
            N_DIMS=layout.n_dims,
            PRED_WIDE=_wide(pred, layout, pred_s),
            TARGET_WIDE=_wide(target, layout, target_s),
            BLOCK=BOXES.block,
            num_warps=BOXES.num_warps,
        )

    return forward_rows(pred, BOXES.block, avg_factor, reduction, launch, finish_with)


def launch_box_backward(
    pred, grad, scale, target, weight, params, kind, reduction, kernel=box_backward_kernel
):
    """Gradient of pred: its dtype, and its strides if it is dense in memory."""
    grad_pred = torch.empty_like(pred)
    layout, grad, scale, reduced = backward_rows(pred, grad_pred, grad, scale, reduction, target)
    pred_s, row_s, out_s, grad_s, target_s = layout.strides
    pointer, numbers = scalar_args(params, 2)
    kernel[(triton.cdiv(n_rows(pred), BOXES.block),)](
        pred,
        target,
        weight,
        pointer,
        grad,
        scale,
        grad_pred,
        n_rows(pred),
        *layout.sizes[1:],
        *pred_s,
        pred.stride(-1),
        *row_s,
        *out_s,
        grad_pred.stride(-1),
        *grad_s,
        *target_s,
        target.stride(-1),
        *numbers,
        KIND=kind,
        REDUCED=reduced,
        N_DIMS=layout.n_dims,
        PRED_WIDE=_wide(pred, layout, pred_s),
        TARGET_WIDE=_wide(target, layout, target_s),
        OUT_WIDE=_wide(grad_pred, layout, out_s),
        BLOCK=BOXES.block,
        num_warps=BOXES.num_warps,
    )
    return grad_pred
