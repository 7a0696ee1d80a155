"""What users run today, written from the papers: the other side of every benchmark.

Ranking losses take flat logits and flat dense targets, as published: > 0 positive (its quality),
0 background, < 0 ignored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------- ranking


class _ErrorDriven(torch.autograd.Function):
    """A value with a gradient that was computed beside it."""

    @staticmethod
    def forward(ctx, logits, value, grad):
        ctx.save_for_backward(grad)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None, None


def _relevant(logits: Tensor, targets: Tensor, delta: float):
    """Positive mask, and the background that can still reach a positive's window."""
    positive = targets > 0
    background = (targets == 0) & (logits >= logits[positive].min() - delta)
    return positive, background


def _step(difference: Tensor, delta: float) -> Tensor:
    if delta == 0:
        return (difference >= 0).float()
    return (difference / (2 * delta) + 0.5).clamp_(0, 1)


def loop_rank_sort(logits: Tensor, targets: Tensor, delta: float = 0.5) -> Tensor:
    """Rank & Sort, rank + sort, by a Python loop over positives."""
    x = logits.detach()
    grad = torch.zeros_like(x)
    positive, background = _relevant(x, targets, delta)
    s, y, t = x[positive], targets[positive], x[background]
    s_grad, t_grad = torch.zeros_like(s), torch.zeros_like(t)
    loss = x.new_zeros(())
    for i in range(len(s)):
        above, false = _step(s - s[i], delta), _step(t - s[i], delta)
        rank_plus, false_sum = above.sum(), false.sum()
        error = false_sum / (rank_plus + false_sum)
        current = (above * (1 - y)).sum() / rank_plus
        better = above * (y >= y[i])
        excess = current - (better * (1 - y)).sum() / better.sum()
        loss += error + excess
        if false_sum > 1e-10:
            s_grad[i] -= error
            t_grad += false * (error / false_sum)
        worse = above * (y < y[i])
        worse_sum = worse.sum()
        if worse_sum > 1e-10:
            s_grad[i] -= excess
            s_grad += worse * (excess / worse_sum)
    grad[positive], grad[background] = s_grad / len(s), t_grad / len(s)
    return _ErrorDriven.apply(logits, loss / len(s), grad)


def loop_ap(logits: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
    """AP loss, interpolated, by a Python loop over positives in ascending score."""
    x = logits.detach()
    grad = torch.zeros_like(x)
    positive, background = _relevant(x, targets, delta)
    s, t = x[positive], x[background]
    s_grad, t_grad = torch.zeros_like(s), torch.zeros_like(t)
    precision, best = torch.zeros_like(s), 0.0
    for i in s.argsort():
        above, false = _step(s - s[i], delta), _step(t - s[i], delta)
        above[i] = 0
        rank_plus, false_sum = above.sum() + 1, false.sum()
        rank = rank_plus + false_sum
        current = rank_plus / rank
        share = false / rank
        if best <= current:
            best = current
        else:
            share *= (1 - best) / (1 - current)
        t_grad += share
        precision[i] = best
        s_grad[i] = -(1 - best)
    grad[positive], grad[background] = s_grad / len(s), t_grad / len(s)
    return _ErrorDriven.apply(logits, 1 - precision.mean(), grad)


def loop_alrp(logits: Tensor, targets: Tensor, error: Tensor, delta: float = 1.0) -> Tensor:
    """aLRP's classification part by a Python loop; ``error`` has one value per positive."""
    x = logits.detach()
    grad = torch.zeros_like(x)
    positive, background = _relevant(x, targets, delta)
    s, t = x[positive], x[background]
    s_grad, t_grad = torch.zeros_like(s), torch.zeros_like(t)
    precision = torch.zeros_like(s)
    for i in s.argsort():
        above, false = _step(s - s[i], delta), _step(t - s[i], delta)
        above[i] = 0
        rank_plus, false_sum = above.sum() + 1, false.sum()
        rank = rank_plus + false_sum
        precision[i] = rank_plus / rank
        if false_sum > 1e-5:
            pull = ((above * error).sum() + false_sum) / rank
            s_grad[i] = -pull
            t_grad += false * (pull / false_sum)
    grad[positive], grad[background] = s_grad / len(s), t_grad / len(s)
    return _ErrorDriven.apply(logits, 1 - precision.mean(), grad)


def _buckets(s: Tensor, t: Tensor):
    """Runs of background between neighbouring positives, all by descending score.

    Returns mean score and size of each bucket, and the bucket of each background logit.
    """
    scores, order = torch.cat([s, t]).sort(descending=True)
    is_background = order >= len(s)
    bucket = (~is_background).cumsum(0)[is_background]  # positives ahead of it
    size = torch.zeros(len(s) + 1).index_add_(0, bucket, torch.ones(len(bucket)))
    total = torch.zeros(len(s) + 1, dtype=torch.float64)
    total.index_add_(0, bucket, scores[is_background].double())
    filled = size > 0
    position = filled.cumsum(0) - 1
    of_background = torch.empty(len(t), dtype=torch.int64)
    of_background[order[is_background] - len(s)] = position[bucket]
    return (total[filled] / size[filled]).float(), size[filled], of_background


def bucketed_rank_sort(logits: Tensor, targets: Tensor, delta: float = 0.5) -> Tensor:
    """Rank & Sort with each bucket of background replaced by its mean: exact for delta 0 only."""
    x = logits.detach()
    grad = torch.zeros_like(x)
    positive, background = _relevant(x, targets, delta)
    s, y, t = x[positive], targets[positive], x[background]
    mean, size, bucket = _buckets(s, t)
    above = _step(s[None, :] - s[:, None], delta)
    false = _step(mean[None, :] - s[:, None], delta) * size
    rank_plus, false_sum = above.sum(1), false.sum(1)
    error = false_sum / (rank_plus + false_sum)
    current = (above * (1 - y)).sum(1) / rank_plus
    better = above * (y[None, :] >= y[:, None])
    excess = current - (better * (1 - y)).sum(1) / better.sum(1)
    share = torch.where(false_sum > 1e-10, error / false_sum, 0.0)
    t_grad = (share @ false / size)[bucket]
    worse = above * (y[None, :] < y[:, None])
    worse_sum = worse.sum(1)
    excess = torch.where(worse_sum > 1e-10, excess, 0.0)
    share = torch.where(worse_sum > 1e-10, excess / worse_sum, 0.0)
    s_grad = share @ worse - error - excess
    grad[positive], grad[background] = s_grad / len(s), t_grad / len(s)
    return _ErrorDriven.apply(logits, (error + excess).mean(), grad)


def bucketed_ap(logits: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
    """AP loss with buckets: exact for delta -> 0 only, and not interpolated."""
    x = logits.detach()
    grad = torch.zeros_like(x)
    positive, background = _relevant(x, targets, delta)
    s, t = x[positive], x[background]
    mean, size, bucket = _buckets(s, t)
    rank_plus = _step(s[None, :] - s[:, None], delta).sum(1) + (0.5 if delta > 0 else 0)
    false = _step(mean[None, :] - s[:, None], delta) * size
    rank = rank_plus + false.sum(1)
    error = false.sum(1) / rank
    t_grad = ((1 / rank) @ false / size)[bucket]
    grad[positive], grad[background] = -error / len(s), t_grad / len(s)
    return _ErrorDriven.apply(logits, error.mean(), grad)


# ----------------------------------------------------------------------------- GHM, prime samples


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
