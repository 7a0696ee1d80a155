"""Matching cost in plain torch, a few images at a time: nothing as large as the result is held."""

from __future__ import annotations

import torch
from torch import Tensor

from ._entry import upcast

# Entries of a block: its dozen temporaries stay in the processor's cache.
BLOCK = 1 << 15
# Smallest area that counts, as in the kernel.
EPS = 1e-12


def corners(boxes: Tensor, centred: bool) -> tuple[Tensor, ...]:
    """``(x1, y1, x2, y2)`` of boxes (..., 4)."""
    if not centred:
        return boxes.unbind(-1)
    x, y, w, h = boxes.unbind(-1)
    return x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h


def overlaps(boxes: Tensor, targets: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of boxes (n, Q, 4) with targets (n, T, 4): each (n, Q, T)."""
    px1, py1, px2, py2 = corners(boxes.unsqueeze(2), centred)
    tx1, ty1, tx2, ty2 = corners(targets.unsqueeze(1), centred)
    wi = (torch.minimum(px2, tx2) - torch.maximum(px1, tx1)).clamp_(min=0)
    hi = (torch.minimum(py2, ty2) - torch.maximum(py1, ty1)).clamp_(min=0)
    inter = wi.mul_(hi)
    pred_area = (px2 - px1).clamp(min=0) * (py2 - py1).clamp(min=0)
    target_area = (tx2 - tx1).clamp(min=0) * (ty2 - ty1).clamp(min=0)
    union = (pred_area + target_area).sub_(inter).clamp_(min=EPS)
    wc = (torch.maximum(px2, tx2) - torch.minimum(px1, tx1)).clamp_(min=0)
    hc = (torch.maximum(py2, ty2) - torch.minimum(py1, ty1)).clamp_(min=0)
    hull = wc.mul_(hc).clamp_(min=EPS)
    iou = inter.div_(union)
    return iou, iou - 1 + union.div_(hull)


def _class_cost(rows, labels, iou, alpha, gamma, kind: str) -> Tensor:
    """Cost of the labels (n, T) for logits (n, Q, C): (n, Q, T)."""
    index = labels.unsqueeze(1).expand(-1, rows.shape[1], -1)
    x = upcast(rows.gather(2, index))
    if kind == "bce":
        return -x
    if kind == "softmax":
        return (x - upcast(rows).logsumexp(2, keepdim=True)).exp_().neg_()
    p = x.sigmoid()
    if kind == "iou_aware":
        return -(p**alpha) * iou ** (1 - alpha)
    not_p = x.neg_().sigmoid_()
    with_object = not_p**gamma * (p + 1e-8).log_() * -alpha
    without = p**gamma * (not_p + 1e-8).log_() * (alpha - 1)
    return with_object.sub_(without)


def _block(logits, boxes, labels, targets, unknown, params, kind, centred, substituted) -> Tensor:
    w_class, w_l1, w_giou, alpha, gamma, substitute = params
    iou, giou = overlaps(boxes, targets, centred)
    cost = w_class * _class_cost(logits, labels, iou, alpha, gamma, kind) - w_giou * giou
    for k in range(4):
        apart = boxes[:, :, None, k] - targets[:, None, :, k]
        cost.add_(apart.abs_() * w_l1)
    if substituted:
        cost = torch.where(cost.isfinite(), cost, substitute)
    return cost.masked_fill_(unknown.unsqueeze(1), torch.inf)


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    sizes: Tensor,
    params: tuple,
    kind: str,
    centred: bool,
    substituted: bool,
) -> Tensor:
    """(N, Q, C) and (N, Q, 4), N a multiple of the B images of (B, T): cost (N, Q, T)."""
    n, queries = logits.shape[:2]
    images, objects = labels.shape
    boxes = upcast(boxes)
    dtype = torch.promote_types(upcast(logits[:0]).dtype, boxes.dtype)
    boxes = boxes.to(dtype)
    target_boxes = target_boxes.to(dtype)
    unknown = torch.arange(objects, device=labels.device) >= sizes.unsqueeze(1)
    # what is written beside the objects is not read, but it must be a place in memory
    labels = labels.long().masked_fill(unknown, 0).repeat(n // images, 1)
    target_boxes = target_boxes.repeat(n // images, 1, 1)
    unknown = unknown.repeat(n // images, 1)
    step = max(BLOCK // max(queries * objects, 1), 1)
    if step >= n:
        return _block(
            logits, boxes, labels, target_boxes, unknown, params, kind, centred, substituted
        )
    out = torch.empty(n, queries, objects, dtype=dtype, device=logits.device)
    for first in range(0, n, step):
        part = slice(first, first + step)
        out[part] = _block(
            logits[part], boxes[part], labels[part], target_boxes[part], unknown[part], params,
            kind, centred, substituted,
        )  # fmt: skip
    return out
