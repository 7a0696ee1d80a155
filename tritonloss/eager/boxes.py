"""IoU, GIoU, DIoU, CIoU and EIoU loss in plain torch.

1 - IoU and its like are computed in two ways. Where boxes are close, differences of areas are sums
of products of differences of sides, which are exactly 0 for equal boxes; where they are apart, the
plain form has the accurate gradient. Nothing is lost to cancellation in either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._entry import entered, reduced, without_autocast


def _side(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0)


def _side_difference(p1, p2, t1, t2) -> Tensor:
    """Side of p minus side of t, or distances of corners where those are smaller and round less."""
    p, t, low, high = _side(p1, p2), _side(t1, t2), p1 - t1, p2 - t2
    near = low.abs() + high.abs() < p + t
    return torch.where(near & (p2 >= p1) & (t2 >= t1), high - low, p - t)


def _passing(x: Tensor, solid: Tensor) -> Tensor:
    """x, without its gradient where what divides it is below eps: 1 / eps is no slope."""
    return torch.where(solid, x, x.detach())


def _area_minus(w, h, inner_w, inner_h) -> Tensor:
    """w h - inner_w inner_h, for sides that are at least the inner ones."""
    return w * (h - inner_h) + inner_h * (w - inner_w)


def _direction(w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(w, h) scaled to a larger side of 1, so that products neither overflow nor vanish."""
    longer = torch.maximum(w, h).detach()
    scale = torch.where(longer > 1e-30, longer, 1)
    return w / scale, h / scale


def _aspect_penalty(wp, hp, wt, ht) -> Tensor:
    """4/pi^2 (atan(wt/ht) - atan(wp/hp))^2, the difference as one angle."""
    wp, hp = _direction(wp, hp)
    wt, ht = _direction(wt, ht)
    sine = ht * (wt - wp) + wt * (hp - ht)
    cosine = ht * hp + wt * wp
    # A box of size 0 has no aspect ratio, and no penalty.
    cosine = torch.where((sine == 0) & (cosine == 0), 1, cosine)
    return 4 / math.pi**2 * torch.atan2(sine, cosine).square()


def box_values(pred: Tensor, target: Tensor, eps, alpha_threshold, kind: str) -> Tensor:
    """Loss of each pair of boxes (..., 4)."""
    # both axes in one tensor (..., 2) as far as they go the same way
    p1, p2 = pred.chunk(2, -1)
    t1, t2 = target.chunk(2, -1)
    wp, hp = _side(p1, p2).unbind(-1)
    wt, ht = _side(t1, t2).unbind(-1)
    wi, hi = _side(torch.maximum(p1, t1), torch.minimum(p2, t2)).unbind(-1)
    inter = wi * hi
    area = wp * hp + wt * ht - inter
    union = area.clamp(min=eps)
    solid = area >= eps
    inter = _passing(inter, solid)
    target_alone = _area_minus(wt, ht, wi, hi)
    either_alone = _area_minus(wp, hp, wi, hi) + target_alone
    close = solid & (2 * inter > union)
    loss = torch.where(close, either_alone / union, 1 - inter / union)
    if kind == "iou":
        return loss
    if kind == "iou_square":
        return loss * (2 - loss)
    if kind == "iou_log":
        overlap = torch.where(close, 1, inter / union).clamp(min=eps)
        return -torch.where(close, torch.log1p(-torch.where(close, loss, 0)), overlap.log())

    sides = _side(torch.minimum(p1, t1), torch.maximum(p2, t2))
    wc, hc = sides.unbind(-1)
    if kind == "giou":
        hull = (wc * hc).clamp(min=eps)
        gap = _area_minus(wc, hc, wp, hp) - target_alone
        close = solid & (2 * union > hull)
        return loss + torch.where(close, gap / hull, 1 - union / hull)

    dx, dy = (((p1 - t1) + (p2 - t2)) / 2).unbind(-1)
    diagonal = wc * wc + hc * hc
    distance = _passing(dx * dx + dy * dy, diagonal >= eps)
    penalised = loss + distance / diagonal.clamp(min=eps)
    if kind == "diou":
        return penalised

    if kind == "eiou":
        squares = sides * sides
        more = _passing(_side_difference(p1, p2, t1, t2), squares >= eps)
        wider, higher = (more / squares.clamp(min=eps) * more).unbind(-1)
        return penalised + wider + higher

    v = _aspect_penalty(wp, hp, wt, ht)
    alpha = v.detach() / (loss + v).detach().clamp(min=eps)
    return penalised + torch.where((inter / union).detach() > alpha_threshold, alpha, 0) * v


def box_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    avg_factor,
    params: tuple,
    kind: str,
    reduction: str,
) -> Tensor:
    """Any box loss: the reference of ``kernels/boxes.py``, and the CPU path."""
    with without_autocast(pred):
        pred = entered(pred)
        target = entered(target.to(pred.dtype))
        count = pred[..., 0].numel()  # numel() of a shape would bake it into an export
        if weight is not None:
            keep = weight > 0
            count = keep.sum()
            pred = torch.where(keep.unsqueeze(-1), pred, 0)
            target = torch.where(keep.unsqueeze(-1), target, 0)
        value = box_values(pred, target, *params, kind)
        if weight is not None:
            value = torch.where(keep, value * weight.to(pred.dtype), 0)
        return reduced(value, count, reduction, avg_factor)
