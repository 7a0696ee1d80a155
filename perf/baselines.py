"""What users run today, written from the papers' formulas: the peers of the benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ghm_c_loop(logits: Tensor, targets: Tensor, bins: int = 10) -> Tensor:
    """GHM-C with one pass per region and a weight per logit; ``targets`` dense."""
    edges = torch.arange(bins + 1, dtype=torch.float32) / bins
    edges[-1] += 1e-6
    norm = (torch.sigmoid(logits.detach()) - targets).abs()
    weights = torch.zeros_like(logits)
    total, n = logits.numel(), 0
    for k in range(bins):
        inside = (norm >= edges[k]) & (norm < edges[k + 1])
        count = inside.sum().item()
        if count > 0:
            weights[inside] = total / count
            n += 1
    weights = weights / max(n, 1)
    return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum") / total


def isr_p_loop(cls_loss: Tensor, iou: Tensor, gt_index: Tensor, labels: Tensor, k=2.0) -> Tensor:
    """ISR-P weights with a loop over classes and one over the objects of each; positives alone."""
    classes, sizes = labels.unique(return_counts=True)
    largest = sizes.max().item()
    weights = torch.ones_like(cls_loss)
    for c in classes:
        of_class = (labels == c).nonzero().squeeze(1)
        score = torch.zeros(len(of_class))
        for g in gt_index[of_class].unique():
            of_object = (gt_index[of_class] == g).nonzero().squeeze(1)
            order = iou[of_class[of_object]].argsort(descending=True)
            # a better place within the object is worth more than any IoU
            score[of_object[order]] = largest - torch.arange(len(order), dtype=torch.float32)
        order = (score + iou[of_class]).argsort(descending=True)
        rank = torch.empty(len(order))
        rank[order] = torch.arange(len(order), dtype=torch.float32)
        weights[of_class] = ((largest - rank) / largest) ** k
    return weights * (cls_loss.sum() / (weights * cls_loss).sum())
