"""Matching cost of queries and objects of the same image, all layers and groups in one launch.

A program takes a tile of queries x objects of one image. Of the logits it reads the columns of the
labels alone (the softmax cost reads the rows once more, for their sum).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonloss._op import launcher, wrap_triton

from ._config import MATCHING, MATCHING_CLASSES, MATCHING_OBJECTS
from ._formulas import power, safe_log, sigmoid_parts
from ._numbers import number, scalar_args
from ._walk import cdiv
from .boxes import box_loss

# Smallest area that counts: far below that of a pixel of the largest image, in units of the image.
EPS = 1e-12


@triton.jit
def _corners(ptrs, step, mask, CENTRED: tl.constexpr):
    """Boxes as they are stored, and as ``(x1, y1, x2, y2)``, float32; 0 where not kept."""
    a = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    b = tl.load(ptrs + step, mask=mask, other=0).to(tl.float32)
    c = tl.load(ptrs + 2 * step, mask=mask, other=0).to(tl.float32)
    d = tl.load(ptrs + 3 * step, mask=mask, other=0).to(tl.float32)
    if CENTRED:
        corners = (a - 0.5 * c, b - 0.5 * d, a + 0.5 * c, b + 0.5 * d)
    else:
        corners = (a, b, c, d)
    return (a, b, c, d), corners


@triton.jit
def _iou(p, g, EPS: tl.constexpr):
    """IoU of boxes x1, y1, x2, y2; small ones have large powers, and 1 - loss is not exact."""
    width = tl.maximum(tl.minimum(p[2], g[2]) - tl.maximum(p[0], g[0]), 0.0)
    height = tl.maximum(tl.minimum(p[3], g[3]) - tl.maximum(p[1], g[1]), 0.0)
    area = tl.maximum(p[2] - p[0], 0.0) * tl.maximum(p[3] - p[1], 0.0)
    area += tl.maximum(g[2] - g[0], 0.0) * tl.maximum(g[3] - g[1], 0.0)
    return width * height / tl.maximum(area - width * height, EPS)


@triton.jit
def _log_sum_exp(rows, step, inside, C, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """log of the sum of exp over the classes of each query."""
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for first in range(0, C, BLOCK_C):
        classes = first + tl.arange(0, BLOCK_C)
        x = tl.load(
            rows[:, None] + classes[None, :] * step,
            mask=inside[:, None] & (classes < C)[None, :],
            other=float("-inf"),
        ).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        top = higher
    return tl.where(top == float("-inf"), 0.0, top) + tl.log(total)


@triton.jit
def matching_cost_kernel(
    # pointers
    logits_ptr,  # [outer, groups, images, queries, classes]
    boxes_ptr,  # [outer, groups, images, queries, 4]
    labels_ptr,  # [images, objects], contiguous
    target_ptr,  # [images, objects, 4], contiguous
    sizes_ptr,  # [images]
    params_ptr,  # [6] weights of class, L1 and GIoU; alpha, gamma; substitute; or None
    out_ptr,  # [outer, groups, images, queries, objects], contiguous float32
    # shapes
    groups,
    images,
    queries,
    objects,
    classes,
    # strides
    logits_so,
    logits_sg,
    logits_sb,
    logits_sq,
    logits_sc,
    boxes_so,
    boxes_sg,
    boxes_sb,
    boxes_sq,
    boxes_sc,
    # scalars
    w_class,
    w_l1,
    w_giou,
    alpha,
    gamma,
    substitute,
    # constants
    KIND: tl.constexpr,
    CENTRED: tl.constexpr,
    SQUARE: tl.constexpr,
    SUBSTITUTE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """1-D grid: tiles of objects within tiles of queries within images."""
    pid = tl.program_id(0).to(tl.int64)
    tiles_t = tl.cdiv(objects, BLOCK_T)
    tiles_q = tl.cdiv(queries, BLOCK_Q)
    tile_t = pid % tiles_t
    tile_q = (pid // tiles_t) % tiles_q
    place = pid // (tiles_t * tiles_q)  # of the image among all layers and groups
    image = place % images
    group = (place // images) % groups
    outer = place // images // groups

    q = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    size = tl.load(sizes_ptr + image).to(tl.int64)
    known = t < tl.minimum(size, objects)
    inside = q < queries
    keep = inside[:, None] & known[None, :]
    flat = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)

    w_class = number(params_ptr, 0, w_class)
    w_l1 = number(params_ptr, 1, w_l1)
    w_giou = number(params_ptr, 2, w_giou)
    alpha = number(params_ptr, 3, alpha)
    gamma = number(params_ptr, 4, gamma)
    substitute = number(params_ptr, 5, substitute)

    boxes = boxes_ptr + outer * boxes_so + group * boxes_sg + image * boxes_sb + q * boxes_sq
    pred, p = _corners(boxes, boxes_sc, inside, CENTRED)
    objects_of = target_ptr + (image * objects + t) * 4
    target, g = _corners(objects_of, 1, known, CENTRED)
    l1 = flat
    for k in tl.static_range(4):
        l1 += tl.abs(pred[k][:, None] - target[k][None, :])
    p1 = (p[0][:, None] + flat, p[1][:, None] + flat, p[2][:, None] + flat, p[3][:, None] + flat)
    g1 = (g[0][None, :] + flat, g[1][None, :] + flat, g[2][None, :] + flat, g[3][None, :] + flat)
    outside, _ = box_loss(p1, g1, EPS, 0.0, "giou")  # 1 - GIoU

    rows = logits_ptr + outer * logits_so + group * logits_sg + image * logits_sb + q * logits_sq
    label = tl.load(labels_ptr + image * objects + t, mask=known, other=0).to(tl.int64)
    valid = (label >= 0) & (label < classes)
    x = tl.load(rows[:, None] + label[None, :] * logits_sc, mask=keep & valid[None, :], other=0).to(
        tl.float32
    )
    prob, not_prob, _ = sigmoid_parts(x)
    if KIND == "focal":
        with_object = alpha * power(not_prob, safe_log(not_prob), gamma, SQUARE)
        with_object *= -tl.log(prob + 1e-8)
        without = (1.0 - alpha) * power(prob, safe_log(prob), gamma, SQUARE)
        without *= -tl.log(not_prob + 1e-8)
        named = with_object - without
    elif KIND == "bce":
        named = -x
    elif KIND == "softmax":
        total = _log_sum_exp(rows, logits_sc, inside, classes, BLOCK_Q, BLOCK_C)
        named = -tl.exp(x - total[:, None])
    else:
        overlap = _iou(p1, g1, EPS)
        named = -tl.exp(alpha * safe_log(prob)) * tl.exp((1.0 - alpha) * safe_log(overlap))
        named += 0.0 * prob  # the maximum in safe_log may drop a NaN
    cost = w_class * named + w_l1 * l1 + w_giou * (outside - 1.0)
    finite = (tl.abs(cost) < float("inf")) & valid[None, :]
    if SUBSTITUTE:
        cost = tl.where(finite, cost, substitute)
    else:
        cost = tl.where(valid[None, :], cost, float("nan"))
    cost = tl.where(known[None, :], cost, float("inf"))
    out = out_ptr + (place * queries + q[:, None]) * objects + t[None, :]
    tl.store(out, cost, mask=inside[:, None] & (t < objects)[None, :])


@launcher
def cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    sizes: Tensor,
    params: Tensor,
    kind: str,
    centred: bool,
    square: bool,
    substituted: bool,
) -> Tensor:
    """Cost of every query with the objects of its image, +inf where there is none.

    Args:
        logits, boxes: (O, G, B, Q, C) and (O, G, B, Q, 4), any strides.
        labels, target_boxes, sizes: contiguous (B, T), (B, T, 4) and (B,).
        params: numbers or a float tensor of 6 entries.
        square: gamma is known to be 2.

    Returns:
        float32 (O, G, B, Q, T).
    """
    outer, groups, images, queries, classes = logits.shape
    objects = labels.shape[1]
    shape = (outer, groups, images, queries, objects)
    out = torch.empty(shape, dtype=torch.float32, device=logits.device)
    block_t = min(triton.next_power_of_2(objects), MATCHING_OBJECTS)
    block_q = MATCHING.block // block_t
    tiles = cdiv(queries, block_q) * cdiv(objects, block_t)
    pointer, numbers = scalar_args(params, 6)
    wrap_triton(matching_cost_kernel, logits)[(outer * groups * images * tiles,)](
        logits,
        boxes,
        labels,
        target_boxes,
        sizes,
        pointer,
        out,
        groups,
        images,
        queries,
        objects,
        classes,
        *logits.stride(),
        *boxes.stride(),
        *numbers,
        KIND=kind,
        CENTRED=centred,
        SQUARE=square,
        SUBSTITUTE=substituted,
        EPS=EPS,
        BLOCK_Q=block_q,
        BLOCK_T=block_t,
        BLOCK_C=MATCHING_CLASSES,
        num_warps=MATCHING.num_warps,
    )
    return out
