"""IoU, GIoU, DIoU, CIoU and EIoU loss in plain torch.

1 - IoU and its like are computed in two ways. Where boxes are close, differences of areas are sums
of products of differences of sides, which are exactly 0 for equal boxes; where they are apart, the
plain form has the accurate gradient. Nothing is lost to cancellation in either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._entry import entered, reduced


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
    px1, py1, px2, py2 = pred.unbind(-1)
    tx1, ty1, tx2, ty2 = target.unbind(-1)
    wp, hp = _side(px1, px2), _side(py1, py2)
    wt, ht = _side(tx1, tx2), _side(ty1, ty2)
    wi = _side(torch.maximum(px1, tx1), torch.minimum(px2, tx2))
    hi = _side(torch.maximum(py1, ty1), torch.minimum(py2, ty2))
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

    wc = _side(torch.minimum(px1, tx1), torch.maximum(px2, tx2))
    hc = _side(torch.minimum(py1, ty1), torch.maximum(py2, ty2))
    if kind == "giou":
        hull = (wc * hc).clamp(min=eps)
        gap = _area_minus(wc, hc, wp, hp) - target_alone
        close = solid & (2 * union > hull)
        return loss + torch.where(close, gap / hull, 1 - union / hull)

    dx = ((px1 - tx1) + (px2 - tx2)) / 2
    dy = ((py1 - ty1) + (py2 - ty2)) / 2
    diagonal = wc * wc + hc * hc
    distance = _passing(dx * dx + dy * dy, diagonal >= eps)
    penalised = loss + distance / diagonal.clamp(min=eps)
    if kind == "diou":
        return penalised

    if kind == "eiou":
        width, height = wc * wc, hc * hc
        wider = _passing(_side_difference(px1, px2, tx1, tx2), width >= eps)
        higher = _passing(_side_difference(py1, py2, ty1, ty2), height >= eps)
        width, height = width.clamp(min=eps), height.clamp(min=eps)
        return penalised + wider / width * wider + higher / height * higher

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
    with torch.autocast(pred.device.type, enabled=False):
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
