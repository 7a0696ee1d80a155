"""What users run today, written from the papers: the other side of every benchmark.

Ranking losses take flat logits and flat dense targets, as published: > 0 positive (its quality),
0 background, < 0 ignored. Losses of labels build the one-hot targets that their formula needs.
"""

from __future__ import annotations

import math

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


def loop_alrp(logits: Tensor, targets: Tensor, error: Tensor, delta: float = 1.0):
    """aLRP by a Python loop, ``(cls, loc)``; ``error`` has one value per positive."""
    x = logits.detach()
    grad = torch.zeros_like(x)
    positive, background = _relevant(x, targets, delta)
    s, t = x[positive], x[background]
    s_grad, t_grad = torch.zeros_like(s), torch.zeros_like(t)
    precision, ranks = torch.zeros_like(s), torch.zeros_like(s)
    for i in s.argsort():
        above, false = _step(s - s[i], delta), _step(t - s[i], delta)
        above[i] = 0
        rank_plus, false_sum = above.sum() + 1, false.sum()
        rank = ranks[i] = rank_plus + false_sum
        precision[i] = rank_plus / rank
        if false_sum > 1e-5:
            pull = ((above * error).sum() + false_sum) / rank
            s_grad[i] = -pull
            t_grad += false * (pull / false_sum)
    grad[positive], grad[background] = s_grad / len(s), t_grad / len(s)
    best_first = s.argsort(descending=True)
    loc = (error[best_first].cumsum(0) / ranks[best_first]).mean()
    return _ErrorDriven.apply(logits, 1 - precision.mean(), grad), loc


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


# --------------------------------------------------------------------- pointwise, in plain torch


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Labels, C for background, as dense targets beside the logits."""
    return F.one_hot(labels, like.shape[-1] + 1)[..., :-1].to(like.dtype)


def focal(x: Tensor, y: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    p = torch.sigmoid(x)
    p_t = p * y + (1 - p) * (1 - y)
    balance = alpha * y + (1 - alpha) * (1 - y)
    return balance * (1 - p_t) ** gamma * _bce(x, y)


def focal_star(x: Tensor, y: Tensor, gamma: float = 2.0, beta: float = 1.0) -> Tensor:
    return -F.logsigmoid(gamma * x * (2 * y - 1) + beta) / gamma


def quality_focal(x: Tensor, labels: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    p = torch.sigmoid(x)
    loss = _bce(x, torch.zeros_like(x)) * p**beta
    rows = (labels < x.shape[-1]).nonzero().squeeze(1)
    at = rows, labels[rows]
    y = quality[rows].to(x.dtype)
    loss[at] = _bce(x[at], y) * (y - p[at]).abs() ** beta
    return loss


def varifocal(x: Tensor, y: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    p = torch.sigmoid(x)
    factor = y * (y > 0) + alpha * (p - y).abs() ** gamma * (y <= 0)
    return _bce(x, y) * factor


def gaussian_focal(x: Tensor, y: Tensor, alpha: float = 2.0, beta: float = 4.0) -> Tensor:
    p = torch.sigmoid(x).clamp(1e-4, 1 - 1e-4)
    positive = y.eq(1).to(p.dtype)
    negative = 1 - positive
    return -(
        torch.log(p) * (1 - p) ** alpha * positive
        + torch.log(1 - p) * p**alpha * (1 - y) ** beta * negative
    )


def asymmetric(
    x: Tensor, y: Tensor, gamma_pos: float = 1.0, gamma_neg: float = 4.0, margin: float = 0.05
) -> Tensor:
    p = torch.sigmoid(x)
    rest = (1 - p + margin).clamp(max=1)
    loss = y * torch.log(p.clamp(min=1e-8)) + (1 - y) * torch.log(rest.clamp(min=1e-8))
    p_t = p * y + rest * (1 - y)
    return -loss * (1 - p_t) ** (gamma_pos * y + gamma_neg * (1 - y))


def softmax_focal(x: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    log_p = F.log_softmax(x, -1).gather(-1, labels[:, None]).squeeze(-1)
    return -((1 - log_p.exp()) ** gamma) * log_p


def _bce(x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, y, reduction="none")


# -------------------------------------------------------------------------- boxes, in plain torch


def distribution_focal(x: Tensor, target: Tensor) -> Tensor:
    left = target.long().clamp(max=x.shape[-1] - 2)
    to_left, to_right = left + 1 - target, target - left
    by_label = (F.cross_entropy(x, label, reduction="none") for label in (left, left + 1))
    return sum(w * loss for w, loss in zip((to_left, to_right), by_label, strict=True))


def distribution_distillation(x: Tensor, teacher: Tensor, temperature: float = 5.0) -> Tensor:
    log_p, q = F.log_softmax(x / temperature, -1), F.softmax(teacher / temperature, -1)
    return temperature**2 * F.kl_div(log_p, q, reduction="none").sum(-1)


def expectation(x: Tensor) -> Tensor:
    return F.softmax(x, -1) @ torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)


def authentic_smooth_l1(pred: Tensor, target: Tensor, mu: float = 0.02) -> Tensor:
    return torch.sqrt((pred - target) ** 2 + mu**2) - mu


def box(pred: Tensor, target: Tensor, kind: str, eps: float = 1e-7) -> Tensor:
    """1 - IoU, GIoU, DIoU, EIoU or CIoU of boxes (..., 4)."""
    (wp, hp), (wt, ht) = ((b[..., 2:] - b[..., :2]).unbind(-1) for b in (pred, target))
    low, high = torch.minimum(pred, target), torch.maximum(pred, target)
    wi, hi = (low[..., 2:] - high[..., :2]).clamp(min=0).unbind(-1)
    wc, hc = (high[..., 2:] - low[..., :2]).unbind(-1)
    union = wp * hp + wt * ht - wi * hi + eps
    iou = wi * hi / union
    if kind == "iou":
        return 1 - iou
    if kind == "giou":
        hull = wc * hc + eps
        return 1 - iou + (hull - union) / hull
    apart = (pred[..., :2] + pred[..., 2:] - target[..., :2] - target[..., 2:]) / 2
    loss = 1 - iou + (apart**2).sum(-1) / (wc**2 + hc**2 + eps)
    if kind == "diou":
        return loss
    if kind == "eiou":
        return loss + (wp - wt) ** 2 / (wc**2 + eps) + (hp - ht) ** 2 / (hc**2 + eps)
    v = 4 / math.pi**2 * (torch.atan(wt / (ht + eps)) - torch.atan(wp / (hp + eps))) ** 2
    with torch.no_grad():
        alpha = (iou > 0.5) * v / (1 - iou + v + eps)
    return loss + alpha * v


# ----------------------------------------------------------------------------- GHM, prime samples


def ghm_c_loop(logits: Tensor, targets: Tensor, bins: int = 10) -> Tensor:
    """GHM-C with one pass per region and a weight per logit; ``targets`` dense."""
    norm = (torch.sigmoid(logits.detach()) - targets).abs()
    weights = _harmonising_weights(norm, bins)
    loss = F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum")
    return loss / logits.numel()


def ghm_r_loop(pred: Tensor, target: Tensor, mu: float = 0.02, bins: int = 10) -> Tensor:
    """GHM-R in the same way."""
    d = (pred - target).detach()
    weights = _harmonising_weights((d / torch.sqrt(d**2 + mu**2)).abs(), bins)
    return (authentic_smooth_l1(pred, target, mu) * weights).sum() / pred.numel()


def _harmonising_weights(norm: Tensor, bins: int) -> Tensor:
    edges = torch.arange(bins + 1, dtype=torch.float32) / bins
    edges[-1] += 1e-6
    weights = torch.zeros_like(norm)
    total, n = norm.numel(), 0
    for k in range(bins):
        inside = (norm >= edges[k]) & (norm < edges[k + 1])
        count = inside.sum().item()
        if count > 0:
            weights[inside] = total / count
            n += 1
    return weights / max(n, 1)


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
