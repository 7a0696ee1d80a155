"""IoU, GIoU, DIoU, CIoU and EIoU loss: a forward and a backward kernel, the loss chosen by KIND.

Boxes that lie in memory one after the other are read as a stream of 16-byte words and taken apart
in registers; all others through their strides.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonloss._op import launcher, wrap_triton

from ._config import BOXES
from ._finish import at, over_levels
from ._formulas import log1p_unit
from ._numbers import number, scalar_args
from ._rows import (
    forward_rows,
    load_row_weights,
    locate,
    n_rows,
    rows_of,
    rows_walkable,
    store_rows,
    upstream,
    upstream_of,
)
from ._walk import Walk, cached, cdiv, load_or_zero, offset_of

# Box losses. A box is (x1, y1, x2, y2); sides are clamped at 0, as torch.clamp does: a side of
# exactly 0 still has a gradient. Ties of min and max share the gradient evenly.


@triton.jit
def atan_unit(t):
    """atan(t) for t in [0, 1], relative error below 2e-7."""
    # atan(t) = pi/4 + atan((t - 1) / (t + 1)): the series is needed up to tan(pi/8) only
    large = t > 0.41421357
    u = tl.where(large, (t - 1.0) / (t + 1.0), t)
    z = u * u
    series = -0.14243533 + z * (0.10593813 - z * 0.0607822)
    series = -0.33333315 + z * (0.19998472 + z * series)
    a = u + u * z * series
    return tl.where(large, 0.78539816 + a, a)


@triton.jit
def atan2_right(y, x):
    """atan2(y, x) for x >= 0; 0 at (0, 0)."""
    steep = tl.abs(y) > x
    longer = tl.where(steep, tl.abs(y), x)
    shorter = tl.where(steep, x, tl.abs(y))
    a = atan_unit(shorter / tl.where(longer > 0.0, longer, 1.0))
    a = tl.where(steep, 1.57079633 - a, a)
    return tl.where(y < 0.0, -a, a)


@triton.jit
def direction(w, h):
    """(w, h) scaled to a larger side of 1, and the scale."""
    longer = tl.maximum(w, h)
    scale = tl.where(longer > 1e-30, longer, 1.0)
    return w / scale, h / scale, scale


@triton.jit
def aspect_angle(wp, hp, wt, ht):
    """atan(wt/ht) - atan(wp/hp), and its derivatives by wp and hp."""
    wp, hp, scale = direction(wp, hp)
    wt, ht, _ = direction(wt, ht)
    angle = atan2_right(ht * (wt - wp) + wt * (hp - ht), ht * hp + wt * wp)
    norm = wp * wp + hp * hp
    norm = tl.where(norm > 0.0, norm, 1.0) * scale
    return angle, -hp / norm, wp / norm


@triton.jit
def area_minus(w, h, inner_w, inner_h):
    """w h - inner_w inner_h, for sides that are at least the inner ones: 0 if they are equal."""
    return w * (h - inner_h) + inner_h * (w - inner_w)


@triton.jit
def share_if_smaller(a, b):
    """d min(a, b) / d a."""
    return tl.where(a < b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def side_difference(p1, p2, t1, t2):
    """Side of p minus side of t, or distances of corners where those are smaller and round less."""
    p, t, low, high = tl.maximum(p2 - p1, 0.0), tl.maximum(t2 - t1, 0.0), p1 - t1, p2 - t2
    near = tl.abs(low) + tl.abs(high) < p + t
    return tl.where(near & (p2 >= p1) & (t2 >= t1), high - low, p - t)


@triton.jit
def box_loss(p, t, eps, alpha_threshold, KIND: tl.constexpr):
    """Loss of each pair of boxes, and its derivatives by the corners of p: ``(loss, corners)``."""
    px1, py1, px2, py2 = p
    tx1, ty1, tx2, ty2 = t
    wp = tl.maximum(px2 - px1, 0.0)
    hp = tl.maximum(py2 - py1, 0.0)
    wt = tl.maximum(tx2 - tx1, 0.0)
    ht = tl.maximum(ty2 - ty1, 0.0)
    wi_raw = tl.minimum(px2, tx2) - tl.maximum(px1, tx1)
    hi_raw = tl.minimum(py2, ty2) - tl.maximum(py1, ty1)
    wi = tl.maximum(wi_raw, 0.0)
    hi = tl.maximum(hi_raw, 0.0)

    pred_alone = area_minus(wp, hp, wi, hi)
    target_alone = area_minus(wt, ht, wi, hi)
    area = wp * hp + target_alone
    solid = area >= eps
    union = tl.where(solid, area, eps)
    iou = wi * hi / union
    one_minus_iou = tl.where(solid, pred_alone + target_alone, eps - wi * hi) / union
    loss = one_minus_iou
    # derivatives by the areas of p and of the intersection, through IoU and union
    d_pred = tl.where(solid, iou / union, 0.0)
    # 1 / eps is no slope: where it divides, what is divided is a constant
    # -(1 + IoU) / union, so that of equal boxes the two cancel whatever a division rounds to
    d_inter = tl.where(solid, -2.0 * d_pred - one_minus_iou / union, 0.0)
    if KIND == "iou_square":
        loss *= 1.0 + iou
        d_pred *= 2.0 * iou
        d_inter *= 2.0 * iou
    if KIND == "iou_log":
        # -log(1 - l) = log(1 + l / (1 - l)) where little is missing
        near = one_minus_iou < 0.5
        missing = tl.where(near, one_minus_iou, 0.0)
        loss = tl.where(near, log1p_unit(missing / (1.0 - missing)), -tl.log(tl.maximum(iou, eps)))
        slope = tl.where(iou >= eps, 1.0 / tl.maximum(iou, eps), 0.0)
        d_pred *= slope
        d_inter *= slope
    # derivatives by the sides of p alone, by the sides of the hull, by the centre of p
    d_wp = tl.zeros(px1.shape, tl.float32)
    d_hp = d_wp
    d_wc = d_wp
    d_hc = d_wp
    d_x = d_wp
    d_y = d_wp
    wc_raw = tl.maximum(px2, tx2) - tl.minimum(px1, tx1)
    hc_raw = tl.maximum(py2, ty2) - tl.minimum(py1, ty1)
    wc = tl.maximum(wc_raw, 0.0)
    hc = tl.maximum(hc_raw, 0.0)
    if KIND == "giou":
        open_hull = wc * hc >= eps
        hull = tl.where(open_hull, wc * hc, eps)
        gap = tl.where(solid, area_minus(wc, hc, wp, hp) - target_alone, hull - union)
        loss += gap / hull
        d_union = tl.where(solid, 1.0 / hull, 0.0)
        d_pred -= d_union
        d_inter += d_union
        # exactly that of the union where there is no gap
        filled = tl.where(gap < 0.5 * hull, 1.0 - gap / hull, union / hull)
        d_hull = tl.where(open_hull, filled * (1.0 / hull), 0.0)
        d_wc = d_hull * hc
        d_hc = d_hull * wc
    if KIND == "diou" or KIND == "ciou" or KIND == "eiou":
        d_x = ((px1 - tx1) + (px2 - tx2)) * 0.5
        d_y = ((py1 - ty1) + (py2 - ty2)) * 0.5
        far = wc * wc + hc * hc >= eps
        diagonal = tl.where(far, wc * wc + hc * hc, eps)
        penalty = (d_x * d_x + d_y * d_y) / diagonal
        loss += penalty
        d_wc = tl.where(far, -2.0 * penalty / diagonal, 0.0) * wc
        d_hc = tl.where(far, -2.0 * penalty / diagonal, 0.0) * hc
        d_x = tl.where(far, d_x / diagonal, 0.0)
        d_y = tl.where(far, d_y / diagonal, 0.0)
    if KIND == "eiou":
        wide, high = wc * wc >= eps, hc * hc >= eps
        width, height = tl.where(wide, wc * wc, eps), tl.where(high, hc * hc, eps)
        wider = side_difference(px1, px2, tx1, tx2)
        higher = side_difference(py1, py2, ty1, ty2)
        d_wp = wider / width
        d_hp = higher / height
        loss += d_wp * wider + d_hp * higher
        d_wc -= tl.where(wide, 2.0 * d_wp * d_wp, 0.0) * wc
        d_hc -= tl.where(high, 2.0 * d_hp * d_hp, 0.0) * hc
        d_wp = tl.where(wide, 2.0 * d_wp, 0.0)
        d_hp = tl.where(high, 2.0 * d_hp, 0.0)
    if KIND == "ciou":
        angle, angle_wp, angle_hp = aspect_angle(wp, hp, wt, ht)
        v = 0.40528473 * angle * angle
        alpha = tl.where(iou > alpha_threshold, v / tl.maximum(one_minus_iou + v, eps), 0.0)
        loss += alpha * v
        d_wp = alpha * (0.81056947 * angle * angle_wp)
        d_hp = alpha * (0.81056947 * angle * angle_hp)

    d_wp = tl.where(px2 - px1 >= 0.0, d_wp + d_pred * hp, 0.0)
    d_hp = tl.where(py2 - py1 >= 0.0, d_hp + d_pred * wp, 0.0)
    d_wi = tl.where(wi_raw >= 0.0, d_inter * hi, 0.0)
    d_hi = tl.where(hi_raw >= 0.0, d_inter * wi, 0.0)
    d_wc = tl.where(wc_raw >= 0.0, d_wc, 0.0)
    d_hc = tl.where(hc_raw >= 0.0, d_hc, 0.0)
    # the corner of p is that of the intersection with this share, else that of the hull
    x1_in = share_if_smaller(tx1, px1)
    y1_in = share_if_smaller(ty1, py1)
    x2_in = share_if_smaller(px2, tx2)
    y2_in = share_if_smaller(py2, ty2)
    # min and max may drop a NaN: a coordinate that is not finite must not pass unseen
    poison = 0.0 * (px1 + py1 + px2 + py2) + 0.0 * (tx1 + ty1 + tx2 + ty2)
    d_x += poison
    d_y += poison
    corners = (
        d_x - d_wp - d_wi * x1_in - d_wc * (1.0 - x1_in),
        d_y - d_hp - d_hi * y1_in - d_hc * (1.0 - y1_in),
        d_x + d_wp + d_wi * x2_in + d_wc * (1.0 - x2_in),
        d_y + d_hp + d_hi * y2_in + d_hc * (1.0 - y2_in),
    )
    return loss + poison, corners


@triton.jit
def load_boxes(
    ptr,
    block,  # start, n, coordinates
    strides,
    corner_stride,
    keep,
    N_DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A block of boxes ``(x1, y1, x2, y2)`` in float32, 0 where not kept."""
    start, n, coords = block
    BLOCK: tl.constexpr = keep.shape[0]
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
    block,  # start, n, coordinates
    strides,
    corner_stride,
    inside,
    N_DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The inverse of ``load_boxes``."""
    start, n, coords = block
    BLOCK: tl.constexpr = inside.shape[0]
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
def _block(
    pointers,
    start,
    cell,
    n,
    sizes,
    strides,  # of pred, rows, target, out, upstream gradient
    corner_strides,  # of pred, target, out
    params,
    KIND: tl.constexpr,
    BACKWARD: tl.constexpr,
    REDUCED: tl.constexpr,
    N_DIMS: tl.constexpr,
    WIDE: tl.constexpr,  # pred, target, out
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss or gradient of one block of pairs."""
    pred_ptr, target_ptr, weight_ptr, grad_ptr, scale_ptr, out_ptr, count_ptr = pointers
    pred_s, row_s, target_s, out_s, grad_s = strides
    pred_sc, target_sc, out_sc = corner_strides
    eps, alpha_threshold = params
    coords, row = locate(start, tl.arange(0, BLOCK), sizes, row_s, N_DIMS)
    inside, keep, scale = load_row_weights(start, tl.arange(0, BLOCK), n, weight_ptr, row)
    block = (start, n, coords)
    pred = load_boxes(pred_ptr, block, pred_s, pred_sc, keep, N_DIMS, WIDE[0], MASKED)
    target = load_boxes(target_ptr, block, target_s, target_sc, keep, N_DIMS, WIDE[1], MASKED)
    if BACKWARD:
        grad = upstream(grad_ptr, scale_ptr, coords, grad_s, keep, N_DIMS, REDUCED) * scale
    loss, slopes = box_loss(pred, target, eps, alpha_threshold, KIND)
    if BACKWARD:
        x1, y1, x2, y2 = slopes
        result = (
            tl.where(keep, x1 * grad, 0.0),
            tl.where(keep, y1 * grad, 0.0),
            tl.where(keep, x2 * grad, 0.0),
            tl.where(keep, y2 * grad, 0.0),
        )
        store_boxes(out_ptr, result, block, out_s, out_sc, inside, N_DIMS, WIDE[2], MASKED)
    else:
        store_rows(loss * scale, row, inside, keep, cell, out_ptr, count_ptr, REDUCED)


@triton.jit(do_not_specialize=["cell"])
def box_kernel(
    # pointers
    pred_ptr,  # boxes
    target_ptr,  # boxes
    weight_ptr,  # [rows], or None
    params_ptr,  # [2] eps and alpha_threshold, or None
    grad_ptr,  # upstream gradient: [] or per row
    scale_ptr,  # [] float32, 1 / divisor, or None
    out_ptr,  # forward: [rows], or [programs] partial sums; backward: gradient of the pred boxes
    count_ptr,  # [programs] int32, or None
    # shapes
    cell,  # of the first program's sum
    n,
    size_1,
    size_2,
    size_3,
    # strides
    pred_s0,
    pred_s1,
    pred_s2,
    pred_s3,
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    target_s0,
    target_s1,
    target_s2,
    target_s3,
    out_s0,
    out_s1,
    out_s2,
    out_s3,
    grad_s0,
    grad_s1,
    grad_s2,
    grad_s3,
    pred_sc,
    target_sc,
    out_sc,
    # scalars
    eps,
    alpha_threshold,
    # constants
    KIND: tl.constexpr,
    BACKWARD: tl.constexpr,
    REDUCED: tl.constexpr,
    N_DIMS: tl.constexpr,
    PRED_WIDE: tl.constexpr,
    TARGET_WIDE: tl.constexpr,
    OUT_WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1-D grid over blocks of boxes; the backward keeps nothing of the forward."""
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    pointers = (pred_ptr, target_ptr, weight_ptr, grad_ptr, scale_ptr, out_ptr, count_ptr)
    sizes = (1, size_1, size_2, size_3)
    strides = (
        (pred_s0, pred_s1, pred_s2, pred_s3),
        (row_s0, row_s1, row_s2, row_s3),
        (target_s0, target_s1, target_s2, target_s3),
        (out_s0, out_s1, out_s2, out_s3),
        (grad_s0, grad_s1, grad_s2, grad_s3),
    )
    corner_strides = (pred_sc, target_sc, out_sc)
    params = (number(params_ptr, 0, eps), number(params_ptr, 1, alpha_threshold))
    WIDE: tl.constexpr = (PRED_WIDE, TARGET_WIDE, OUT_WIDE)
    if start + BLOCK <= n:
        _block(
            pointers, start, cell + pid, n, sizes, strides, corner_strides, params, KIND, BACKWARD,
            REDUCED, N_DIMS, WIDE, False, BLOCK,
        )  # fmt: skip
    else:
        _block(
            pointers, start, cell + pid, n, sizes, strides, corner_strides, params, KIND, BACKWARD,
            REDUCED, N_DIMS, WIDE, True, BLOCK,
        )  # fmt: skip


def _walk_over(pred, target, out, grad) -> Walk:
    """How a kernel walks over boxes and what lies beside them: numbers of pred, rows, target, out,
    grad, and the strides of boxes over coordinates. ``out`` and ``grad`` may be None."""
    others = tuple([None if t is None else t.stride() for t in (target, out, grad)])
    return _walk(pred.shape, pred.stride(), others)


@cached
def _walk(shape, pred, others) -> Walk:
    layout = rows_of(shape, pred, others).layout
    one_by_one = [layout.n_dims == 1 and strides[-1] == 4 for strides in layout.strides]
    alone = math.prod(shape[:-1]) == 1

    def wide(boxes, k):
        """True if the walk takes these boxes one after the other in memory."""
        return boxes is not None and boxes[-1] == 1 and (one_by_one[k] or alone)

    target, out, _ = others
    constants = {
        "N_DIMS": layout.n_dims,
        "PRED_WIDE": wide(pred, 0),
        "TARGET_WIDE": wide(target, 2),
        "OUT_WIDE": wide(out, 3),
    }
    by_coordinate = pred[-1], target[-1], 0 if out is None else out[-1]
    return Walk((*layout.numbers(), *by_coordinate), constants)


def takes(pred, target, *args) -> bool:
    """True if the kernels can read the boxes in place."""
    return rows_walkable(pred, target)


def _launch(
    pred, target, weight, params, kind, out, count=None, grad=None, scale=None, *, backward,
    reduced, cell=0,
):  # fmt: skip
    """Loss or gradient of one tensor of boxes; a sum and a count of each program if reduced."""
    walk = _walk_over(pred, target, out if backward else None, None if reduced else grad)
    pointer, numbers = scalar_args(params, 2)
    wrap_triton(box_kernel, pred)[(cdiv(n_rows(pred), BOXES.block),)](
        pred,
        target,
        weight,
        pointer,
        grad,
        scale,
        out,
        count,
        cell,
        n_rows(pred),
        *walk.numbers,
        *numbers,
        KIND=kind,
        BACKWARD=backward,
        REDUCED=reduced,
        **walk.constants,
        BLOCK=BOXES.block,
        num_warps=BOXES.num_warps,
    )


@launcher
def forward(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    kind: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Loss of all pairs of boxes, and the factor that the backward needs.

    Args:
        pred, target: boxes (..., 4), any strides.
        weight: contiguous (...), or None.
        avg_factor, params: numbers or float tensors of 1 and 2 entries; params holds eps and
            alpha_threshold.

    Returns:
        ``(loss, scale)``, float32.
    """

    def launch(out, count, reduced):
        _launch(pred, target, weight, params, kind, out, count, backward=False, reduced=reduced)

    return forward_rows(pred, BOXES.block, avg_factor, reduction, launch)


@launcher
def forward_levels(
    pred: list[Tensor],
    target: list[Tensor],
    weight: list[Tensor],
    avg_factor: Tensor | None,
    params: Tensor,
    kind: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The sum or mean of ``forward`` over levels; a list may be empty where that has None."""

    def launch(k, cell, out, count):
        args = (pred[k], target[k], at(weight, k), params, kind, out, count)
        _launch(*args, backward=False, reduced=True, cell=cell)

    def programs(k):
        return cdiv(n_rows(pred[k]), BOXES.block)

    return over_levels(pred, programs, avg_factor, reduction, launch)


@launcher
def backward(
    grad: Tensor,
    scale: Tensor,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    kind: str,
    reduction: str,
) -> Tensor:
    """Gradient of pred: its dtype, and its strides if it is dense in memory."""
    out = torch.empty_like(pred)
    grad, scale, reduced = upstream_of(pred, out, grad, scale, reduction, target)
    _launch(
        pred, target, weight, params, kind, out, None, grad, scale, backward=True, reduced=reduced
    )
    return out
