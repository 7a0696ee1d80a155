"""IoU, GIoU, DIoU, CIoU and EIoU loss in plain torch.

1 - IoU and its like are computed in two ways. Where boxes are close, differences of areas are sums
of products of differences of sides, which are exactly 0 for equal boxes; where they are apart, the
plain form has the accurate gradient. Nothing is lost to cancellation in either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._blocks import per_row
from ._entry import entered, reduced, without_autocast


def _side(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0)


def _inner_side(p1, p2, t1, t2) -> Tensor:
    return _side(torch.maximum(p1, t1), torch.minimum(p2, t2))


def _outer_side(p1, p2, t1, t2) -> Tensor:
    return _side(torch.minimum(p1, t1), torch.maximum(p2, t2))


def _centre_difference(p1, p2, t1, t2) -> Tensor:
    return ((p1 - t1) + (p2 - t2)) / 2


def _corners(boxes: Tensor) -> tuple:
    """(x1, y1) and (x2, y2): in one tensor each, or in a graph, which fuses all in one loop only
    over tensors of one shape, apart."""
    if not torch.compiler.is_compiling():
        return boxes.chunk(2, -1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x1, y1), (x2, y2)


def _by_axis(function, *corners) -> tuple[Tensor, Tensor]:
    """The function of each axis."""
    if isinstance(corners[0], Tensor):
        return function(*corners).unbind(-1)
    return tuple(function(*axis) for axis in zip(*corners, strict=True))


def _side_difference(p1, p2, t1, t2) -> Tensor:
    """Side of p minus side of t, or distances of corners where those are smaller and round less."""
    p, t, low, high = _side(p1, p2), _side(t1, t2), p1 - t1, p2 - t2
    near = low.abs() + high.abs() < p + t
    return torch.where(near & (p2 >= p1) & (t2 >= t1), high - low, p - t)


def _side_penalty(p1, p2, t1, t2, eps) -> Tensor:
    square = _outer_side(p1, p2, t1, t2).square()
    more = _passing(_side_difference(p1, p2, t1, t2), square >= eps)
    return more / square.clamp(min=eps) * more


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


def _angle(sine: Tensor, cosine: Tensor) -> Tensor:
    """atan2 for a cosine of at least 0, not both 0."""
    if not torch.compiler.is_compiling():
        return torch.atan2(sine, cosine)
    # Inductor has no atan2 of vectors, and leaves the whole loop to scalars
    steep = sine.abs() > cosine
    angle = torch.atan(torch.where(steep, -cosine, sine) / torch.where(steep, sine, cosine))
    return torch.where(steep, angle + sine.detach().sign() * (math.pi / 2), angle)


def _aspect_penalty(wp, hp, wt, ht) -> Tensor:
    """4/pi^2 (atan(wt/ht) - atan(wp/hp))^2, the difference as one angle."""
    wp, hp = _direction(wp, hp)
    wt, ht = _direction(wt, ht)
    sine = ht * (wt - wp) + wt * (hp - ht)
    cosine = ht * hp + wt * wp
    # A box of size 0 has no aspect ratio, and no penalty.
    cosine = torch.where((sine == 0) & (cosine == 0), 1, cosine)
    return 4 / math.pi**2 * _angle(sine, cosine).square()


def box_values(pred: Tensor, target: Tensor, eps, alpha_threshold, kind: str) -> Tensor:
    """Loss of each pair of boxes (..., 4)."""
    if isinstance(eps, Tensor):  # a clamp takes no bound on another device
        eps = eps.to(pred.device)
    pairs = *_corners(pred), *_corners(target)
    wp, hp = _by_axis(_side, *pairs[:2])
    wt, ht = _by_axis(_side, *pairs[2:])
    wi, hi = _by_axis(_inner_side, *pairs)
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

    wc, hc = _by_axis(_outer_side, *pairs)
    if kind == "giou":
        hull = (wc * hc).clamp(min=eps)
        gap = _area_minus(wc, hc, wp, hp) - target_alone
        close = solid & (2 * union > hull)
        return loss + torch.where(close, gap / hull, 1 - union / hull)

    dx, dy = _by_axis(_centre_difference, *pairs)
    diagonal = wc * wc + hc * hc
    distance = _passing(dx * dx + dy * dy, diagonal >= eps)
    penalised = loss + distance / diagonal.clamp(min=eps)
    if kind == "diou":
        return penalised

    if kind == "eiou":
        wider, higher = _by_axis(lambda *pair: _side_penalty(*pair, eps), *pairs)
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


def box_loss_by_blocks(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    avg_factor,
    params: tuple,
    kind: str,
    reduction: str,
    want_grad: bool,
):
    """``(loss, gradient of the sum, 1 / divisor)``, block by block: the gradient written out."""

    def values(*boxes):
        p, t = (b.movedim(-1, 0).reshape(4, -1) for b in boxes)
        found = _values_and_slopes(p, t, *params, kind, want_grad)
        if found is None:
            return None
        value, slopes = found
        rows = boxes[0].shape[:-1]
        return value.view(rows), slopes if slopes is None else slopes.view(4, *rows).movedim(0, -1)

    def formula(p, t, w):
        return box_loss(p, t, w, None, params, kind, "none")

    return per_row(values, formula, pred, target, weight, avg_factor, reduction, want_grad)


def _values_and_slopes(p, t, eps, alpha_threshold, kind: str, want_grad: bool):
    """Loss of each pair of boxes (4, n), and its derivatives by the corners of p, (4, n) or None.

    The same as ``box_values`` of columns, where all is finite and no area below eps; else None. Few
    operations: of small inputs, each costs a microsecond or two, whatever it computes. So both axes
    go together, in (2, n), and boxes alike.
    """
    (p1, p2), (t1, t2) = p.chunk(2), t.chunk(2)
    low1, low2 = torch.minimum(p, t).chunk(2)
    high1, high2 = torch.maximum(p, t).chunk(2)
    side, shared = p2 - p1, low2 - high1
    # sides of t, p and hull, then those of a box inside each; negative where there is none
    raw = torch.stack((t2 - t1, side, high2 - low1, shared, shared, side))
    sides = raw.clamp(min=0)
    outer = sides[2]
    w, h = sides.unbind(1)
    (_, wp, wc, wi, *_), (_, hp, hc, hi, *_) = w.unbind(), h.unbind()
    # the areas outside that box, of equal ones exactly 0
    beside = torch.addcmul(w[:3] * (h[:3] - h[3:]), w[:3] - w[3:], h[3:])
    of_t, of_p, of_hull = beside.unbind()
    union = torch.addcmul(of_t, wp, hp)
    if not (union.min().item() >= eps and math.isfinite(raw.sum().item())):
        return None
    inverse = union.reciprocal()
    iou = (wi * hi).div_(union)
    missing = (of_p + of_t).div_(union)  # 1 - IoU
    # derivatives by the areas of p, of the hull and of what p and t share
    by_p, by_hull = iou * inverse, None
    by_shared = (inverse + by_p).neg_()
    by_side = by_outer = by_centre = None  # of the penalties
    if kind == "iou":
        loss = missing
    elif kind == "iou_square":
        loss = missing * (1 + iou)
        by_p, by_shared = by_p * (2 * iou), by_shared * (2 * iou)
    elif kind == "iou_log":
        overlap = iou.clamp(min=eps)
        near = missing < 0.5
        loss = -torch.where(near, torch.log1p(-torch.where(near, missing, 0)), overlap.log())
        slope = (iou >= eps) / overlap
        by_p, by_shared = by_p * slope, by_shared * slope
    elif kind == "giou":
        hull = wc * hc
        loss = (of_hull - of_t).div_(hull).add_(missing)
        inverse = hull.reciprocal()
        by_hull = (union / hull).mul_(inverse)
        by_p, by_shared = by_p - inverse, by_shared + inverse
    elif kind in ("diou", "eiou", "ciou"):
        apart = (p - t).view(2, 2, -1).sum(0).mul_(0.5)
        squares = outer.square()
        inverse = squares.sum(0).reciprocal_()
        distance = apart.square().sum(0).mul_(inverse)
        loss = missing + distance
        by_centre = apart.mul_(inverse)
        by_outer = outer * distance.mul_(inverse).mul_(-2)
    else:
        return None  # the formula is always right
    if kind == "eiou":
        more = _side_difference(p1, p2, t1, t2)
        share = more / squares.clamp(min=eps)
        loss += (share * more).sum(0)
        by_side = share.mul_(squares >= eps).mul_(2)  # 1 / eps is no slope
        by_outer -= by_side.square().mul_(outer).mul_(0.5)
    elif kind == "ciou":
        # directions, scaled to a larger side of 1, so that products neither overflow nor vanish
        w, h = w[:2], h[:2]
        scale = torch.maximum(w, h).clamp_(min=1e-30)
        (wt, wp), (ht, hp) = w / scale, h / scale
        sine = torch.addcmul(ht * (wt - wp), wt, hp - ht)
        angle = torch.atan2(sine, torch.addcmul(ht * hp, wt, wp))
        v = angle.square().mul_(4 / math.pi**2)
        alpha = (v / (missing + v).clamp_(min=eps)).mul_(iou > alpha_threshold)
        loss.addcmul_(alpha, v)
        norm = torch.addcmul(hp * hp, wp, wp).clamp_(min=0.5).mul_(scale[1])
        slope = alpha.mul_(angle).div_(norm).mul_(8 / math.pi**2)
        by_side = torch.stack((-hp, wp)).mul_(slope)
    if not want_grad:
        return loss, None
    by_hull = torch.zeros_like(by_p) if by_hull is None else by_hull
    by_sides = torch.stack((by_p, by_hull, by_shared)).unsqueeze(1) * sides[1:4].flip(1)
    if by_side is not None:
        by_sides[0] += by_side
    if by_outer is not None:
        by_sides[1] += by_outer
    by_sides.masked_fill_(raw[1:4] < 0, 0)  # a side of exactly 0 still has a slope
    # a corner of p belongs to what is shared, or to the hull; half to each where it is that of t
    ends, above = by_sides[1:], (p - t).sign_().add_(1).mul_(0.5).view(2, 2, -1)
    slopes = torch.lerp(ends, ends.flip(0), above).add_(by_sides[0])
    slopes[0].neg_()
    if by_centre is not None:
        slopes += by_centre
    return loss, slopes.view(4, -1)
