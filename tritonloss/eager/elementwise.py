"""Pointwise classification losses in plain torch.

With label targets almost every logit is a negative: the loss of a negative is computed for all of
them, and that of a positive only for the one labelled logit per row. No one-hot is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonloss._reduce import reduced
from tritonloss._targets import Targets

# A logit that is no negative is replaced by this one, whose loss and gradient are exactly 0.
NO_LOSS = -1e30


class Pointwise(NamedTuple):
    """One loss in three views; ``params`` in the order that the public function packs them."""

    negative: Callable  # (x, *params): target 0
    positive: Callable  # (x, y, *params): the labelled class, y its quality (1 for labels)
    dense: Callable  # (x, y, *params): any y in [0, 1]


def upcast(x: Tensor) -> Tensor:
    """float32 for 16-bit inputs."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); linear only where that is exact in the dtype."""
    return F.softplus(x, threshold=20 if x.dtype == torch.float32 else 40)


def power(base: Tensor, exponent) -> Tensor:
    """base ** exponent for base in [0, 1], with 0^0 = 1 and a gradient of 0 at 0."""
    if not isinstance(exponent, (int, float)) or exponent < 1:
        base = base.clamp(min=1e-37 if base.dtype == torch.float32 else 1e-300)
    return base.pow(exponent)


def bce(x: Tensor, y: Tensor) -> Tensor:
    """Binary cross entropy, a sum of non-negative terms: nothing cancels."""
    return torch.lerp(softplus(x), softplus(-x), y)


def balance(y: Tensor, a1, a0) -> Tensor | float:
    """y a1 + (1 - y) a0."""
    if isinstance(a1, (int, float)) and a1 == a0:
        return a1
    return y * a1 + (1 - y) * a0


def _focal_dense(x, y, a1, a0, gamma, _=None):
    q = torch.lerp(torch.sigmoid(x), torch.sigmoid(-x), y)
    return balance(y, a1, a0) * power(q, gamma) * bce(x, y)


def _star(x, gamma, beta):
    return softplus(gamma * x - beta) / gamma


FOCAL = Pointwise(
    lambda x, a1, a0, gamma, _=None: a0 * power(torch.sigmoid(x), gamma) * softplus(x),
    _focal_dense,
    _focal_dense,
)


def _focal_star_dense(x, y, a1, a0, gamma, beta):
    return balance(y, a1, a0) * torch.lerp(_star(x, gamma, beta), _star(-x, gamma, beta), y)


FOCAL_STAR = Pointwise(
    lambda x, a1, a0, gamma, beta: a0 * _star(x, gamma, beta),
    _focal_star_dense,
    _focal_star_dense,
)


def _quality_dense(x, y, beta, *_):
    # p - y = p (1-y) - (1-p) y: exact at y = 0 and y = 1
    signed = torch.lerp(torch.sigmoid(x), -torch.sigmoid(-x), y)
    return power(signed.abs(), beta) * bce(x, y)


QUALITY = Pointwise(
    lambda x, beta, *_: power(torch.sigmoid(x), beta) * softplus(x),
    _quality_dense,
    _quality_dense,
)


def _varifocal_negative(x, alpha, gamma, iou_weighted, detach):
    factor = power(torch.sigmoid(x), gamma)
    if isinstance(detach, Tensor):  # the flags travel as numbers when traced
        factor = torch.where(detach > 0, factor.detach(), factor)
    elif detach:
        factor = factor.detach()
    return alpha * factor * softplus(x)


def _varifocal_positive(x, y, alpha, gamma, iou_weighted, detach):
    return balance(y, 1, 1 - iou_weighted) * bce(x, y)


VARIFOCAL = Pointwise(
    _varifocal_negative,
    _varifocal_positive,
    lambda x, y, *params: torch.where(
        y > 0, _varifocal_positive(x, y, *params), _varifocal_negative(x, *params)
    ),
)

KINDS = {
    "focal": FOCAL,
    "focal_star": FOCAL_STAR,
    "quality": QUALITY,
    "varifocal": VARIFOCAL,
}


def pointwise(
    x: Tensor,
    targets: Targets,
    weight: Tensor | None,
    class_weight: Tensor | None,
    avg_factor,
    params: tuple,
    kind: str,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Any pointwise loss: the reference of ``kernels/elementwise.py``, and the CPU path."""
    with torch.autocast(x.device.type, enabled=False):
        x = upcast(x)
        # An infinite logit gives NaN, not a plausible number.
        x = torch.add(x, x.detach(), alpha=0)
        if weight is not None:
            weight = weight.to(x.dtype)
        if class_weight is not None:
            class_weight = class_weight.to(x.dtype)
        rest = (weight, class_weight, avg_factor, params, KINDS[kind], reduction)
        if targets.dense is not None:
            return _dense(x, targets.dense, *rest)
        return _labelled(x, targets, ignore_index, *rest)


def _dense(x, y, weight, class_weight, avg_factor, params, loss, reduction):
    y = y.to(x.dtype)
    count = x.numel()
    if weight is not None:
        if weight.dim() < x.dim():
            weight = weight.unsqueeze(-1)
        keep = (weight > 0).expand(x.shape)
        count = keep.sum()
        weight = torch.where(weight > 0, weight, 0)
        x, y = torch.where(keep, x, 0), torch.where(keep, y, 0)
    value = loss.dense(x, y, *params)
    if class_weight is not None:
        value = value * class_weight
    if weight is not None:
        value = value * weight
    return reduced(value, count, reduction, avg_factor)


def _labelled(x, targets, ignore_index, weight, class_weight, avg_factor, params, loss, reduction):
    n_classes = x.shape[-1]
    labels = targets.labels.long()
    row_weight = weight if weight is not None and weight.dim() < x.dim() else None
    logit_weight = weight if row_weight is None else None

    keep = (labels >= 0) & (labels <= n_classes) & (labels != ignore_index)
    if row_weight is not None:
        keep = keep & (row_weight > 0)
        row_weight = torch.where(keep, row_weight, 0)
    positive = keep & (labels < n_classes)
    labelled = labels.unsqueeze(-1) == torch.arange(n_classes, device=x.device)
    dropped = ~keep.unsqueeze(-1)
    count = keep.sum() * n_classes
    index = labels.clamp(0, n_classes - 1).unsqueeze(-1)
    if logit_weight is not None:
        dropped = dropped | ~(logit_weight > 0)
        count = (~dropped).sum()
        positive = positive & (logit_weight.gather(-1, index).squeeze(-1) > 0)
        logit_weight = torch.where(dropped, 0, logit_weight)

    negatives = loss.negative(x.masked_fill(labelled | dropped, NO_LOSS), *params)
    x_labelled = torch.where(positive, x.gather(-1, index).squeeze(-1), 0)
    y = torch.ones_like(x_labelled)
    if targets.quality is not None:
        y = torch.where(positive, targets.quality.to(x.dtype), y)
    positives = torch.where(positive, loss.positive(x_labelled, y, *params), 0)

    if reduction != "none" and class_weight is None and logit_weight is None:
        value = negatives.sum(-1) + positives
        if row_weight is not None:
            value = value * row_weight
    else:
        value = torch.where(labelled, positives.unsqueeze(-1), negatives)
        if class_weight is not None:
            value = value * class_weight
        if row_weight is not None:
            value = value * row_weight.unsqueeze(-1)
        if logit_weight is not None:
            value = value * logit_weight
    return reduced(value, count, reduction, avg_factor)


def generalized_focal(x_left, x_right, y, y_left, y_right, beta, reduction, avg_factor):
    """General form of the GFocal paper on the softmax of a pair of logits."""
    with torch.autocast(x_left.device.type, enabled=False):
        x = upcast(x_right) - upcast(x_left)
        y, y_left, y_right = (t.to(x.dtype) for t in (y, y_left, y_right))
        share = (y - y_left) / (y_right - y_left)  # of the right value
        # y - (y_l p_l + y_r p_r) = (y_r - y_l) (share - p_r), exact at either end
        signed = torch.lerp(torch.sigmoid(x), -torch.sigmoid(-x), share) * (y_right - y_left)
        distance = signed.abs()
        factor = distance.clamp(min=1e-37).pow(beta) if beta < 1 else distance.pow(beta)
        return reduced(
            factor * (y_right - y_left) * bce(x, share), x.numel(), reduction, avg_factor
        )


def class_balanced_weight(samples: Tensor, beta: float, normalize: bool) -> Tensor:
    """(1 - beta) / (1 - beta^n), 0 where n = 0."""
    n = samples.double()
    # expm1 and log1p: 1 - beta^n would cancel for beta -> 1
    log_beta = torch.log1p(torch.tensor(beta - 1.0, dtype=torch.float64, device=n.device))
    safe = n.clamp(min=1)
    weight = torch.expm1(log_beta) / torch.expm1(safe * log_beta) if beta < 1 else 1 / safe
    weight = torch.where(n > 0, weight, 0)
    if normalize:
        total = weight.sum()
        weight = weight * (n.numel() / torch.where(total > 0, total, 1))
    return weight
