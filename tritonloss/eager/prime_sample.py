"""Prime sample attention in plain torch: sorts and searches, no loop over classes or objects.

Rows that are no positives make a group of their own, so that no row is taken out of a tensor and
nothing is read on the host.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._entry import divided_by, mean_divisor, upcast, without_autocast
from .pointwise import softplus


def _run_starts(*keys: Tensor) -> Tensor:
    """Where the run of equal keys begins that each element of a sorted list belongs to."""
    position = torch.arange(keys[0].numel(), device=keys[0].device)
    inside = position > 0  # the first element begins a run
    before = (position - 1).clamp(min=0)
    for key in keys:
        inside = inside & (key == key[before])
    starts = torch.where(inside, 0, position)
    return F.pad(starts, (0, 1)).cummax(0).values[:-1]  # of none, too


def rank_in_group(*keys: Tensor) -> Tensor:
    """Number of elements of the same last key that lie strictly before by the others.

    Keys ascend, later ones are more significant; equal elements share a rank.
    """
    order = torch.arange(keys[0].numel(), device=keys[0].device)
    for key in keys:
        order = order[torch.argsort(key[order], stable=True)]
    keys = [key[order] for key in keys]
    rank = _run_starts(*keys) - _run_starts(keys[-1])
    return torch.zeros_like(rank).scatter(0, order, rank)


def _flat(gt_index: Tensor, labels: Tensor):
    """``(gt_index, labels, positive)`` as lists; -1 and one more class where not positive."""
    gt_index = gt_index.reshape(-1).long()
    positive = gt_index >= 0
    nowhere = torch.iinfo(torch.int64).min
    return (
        torch.where(positive, gt_index, -1),
        torch.where(positive, labels.reshape(-1).long(), nowhere),
        positive,
    )


def iou_hlr(iou: Tensor, gt_index: Tensor, labels: Tensor) -> Tensor:
    """By place within the object first, by IoU second, within the class."""
    gt, label, positive = _flat(gt_index, labels)
    badness = torch.where(positive, -iou.detach().reshape(-1), 0)
    place = rank_in_group(badness, gt)
    rank = rank_in_group(badness, place, label)
    return torch.where(positive, rank, -1).reshape(gt_index.shape)


def loss_of_rows(cls_loss: Tensor, labels: Tensor) -> Tensor:
    """One per row, without gradient, in float32 or float64."""
    cls_loss = cls_loss.detach()
    if cls_loss.dtype != torch.float64:
        cls_loss = cls_loss.float()
    return cls_loss.sum(-1) if cls_loss.dim() > labels.dim() else cls_loss


def isr_p_weight(cls_loss, iou, gt_index, labels, weight, k, bias, normalizer) -> Tensor:
    """Weights that grow with the rank and keep the summed loss of the positives."""
    dtype = cls_loss.dtype
    old = torch.ones_like(cls_loss) if weight is None else weight.detach().to(dtype)
    gt_index = torch.where(old > 0, gt_index, -1)
    rank = iou_hlr(iou, gt_index, labels)
    _, label, positive = _flat(gt_index, labels)
    ordered = label.sort().values
    size = torch.searchsorted(ordered, label, right=True) - torch.searchsorted(ordered, label)
    positive, size = positive.view(rank.shape), size.view(rank.shape)
    if normalizer == "max":
        size = F.pad(torch.where(positive, size, 0).flatten(), (0, 1)).max()  # of none, too
    share = torch.where(positive, (size - rank).to(dtype) / size, 1)
    new = (bias + (1 - bias) * share) ** k

    def total(weight):
        return torch.where(positive, weight * cls_loss, 0).sum()

    old_total, new_total = total(old), total(new)
    usable = positive & (new_total > 0)
    return torch.where(usable, new * (old_total / torch.where(new_total > 0, new_total, 1)), old)


def _labelled(logits: Tensor, labels: Tensor, box_loss: Tensor, activation: str) -> tuple:
    """``(log of the score of the label, box loss, whether it is a positive)`` of each row.

    Rows that do not count are emptied first: what stands there reaches nothing.
    """
    x, box_loss = upcast(logits), upcast(box_loss)
    n_classes = x.shape[-1]
    if box_loss.dim() > labels.dim():
        box_loss = box_loss.sum(-1)
    labels = labels.long()  # a narrow one may not hold n_classes
    positive = (labels >= 0) & (labels < n_classes)
    index = labels.clamp(0, n_classes - 1).unsqueeze(-1)
    if activation == "sigmoid":
        x = torch.where(positive, x.gather(-1, index).squeeze(-1), 0)
        log_p = -softplus(-x)
    else:
        x = torch.where(positive.unsqueeze(-1), x, 0)
        log_p = F.log_softmax(x, -1).gather(-1, index).squeeze(-1)
    return log_p.flatten(), torch.where(positive, box_loss, 0).flatten(), positive.flatten()


def carl_loss(levels: list[tuple], k, bias, activation: str, keep_loss: bool, avg_factor) -> Tensor:
    """Box losses times v / mean(v), with v from its logarithm: no 0 / 0 for tiny p."""
    with without_autocast(levels[0][0]):
        rows = zip(*(_labelled(*level, activation) for level in levels), strict=True)
        log_p, box_loss, positive = (
            torch.cat(parts) if len(parts) > 1 else parts[0] for parts in rows
        )
        count = positive.sum()

        log_v = k * _log_mix(log_p, bias)
        # Relative to their sum, so that they do not all underflow.
        counted = torch.where(positive, log_v, -torch.inf).detach()
        log_sum = F.pad(counted, (0, 1), value=-torch.inf).logsumexp(0)  # of none, too
        v = torch.where(positive, log_v - log_sum, -torch.inf).exp()
        v = v * (count / torch.where(count > 0, v.sum(), 1))
        weighted = (box_loss * v).sum()
        if keep_loss:
            plain, value = box_loss.detach().sum(), weighted.detach()
            weighted = weighted * torch.where(
                value > 0, plain / torch.where(value > 0, value, 1), 1
            )
        return divided_by(weighted, mean_divisor(count, avg_factor))


def _log_mix(log_p: Tensor, bias) -> Tensor:
    """log((1 - bias) p + bias)."""
    if isinstance(bias, Tensor):
        bias = bias.to(log_p)
        return torch.logaddexp(log_p + torch.log1p(-bias), bias.log())
    if bias == 0:
        return log_p
    if bias == 1:
        return log_p * 0
    return torch.logaddexp(log_p + math.log1p(-bias), torch.full_like(log_p, math.log(bias)))
