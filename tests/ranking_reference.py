"""AP, aLRP and Rank & Sort as float64 loops over the positives: the oracle of the tests.

Every function takes one list: flat ``logits``, boolean ``positive`` and ``negative`` of the same
length (neither: ignored), and returns values and full-length gradients in float64. The formulas
are those of the papers; nothing here is shared with the package.
"""

import torch


def step(difference, delta):
    """The smoothed step H of a difference of logits; a hard one that counts ties for delta 0."""
    if delta == 0:
        return (difference >= 0).double()
    return (difference / (2 * delta) + 0.5).clamp(0, 1)


def split(logits, positive, negative):
    """Indices and float64 scores of the positives and of the negatives."""
    x = logits.detach().double()
    pos, neg = positive.nonzero()[:, 0], negative.nonzero()[:, 0]
    return pos, neg, x[pos], x[neg], torch.zeros_like(x)


def rank_sort(logits, positive, negative, quality, delta):
    """(ranking error, sorting error, gradient of the first, gradient of the second)."""
    pos, neg, s, t, zero = split(logits, positive, negative)
    rank, sort = 0.0, 0.0
    rank_grad, sort_grad = zero, zero.clone()
    n_pos = max(len(pos), 1)
    y = quality.double()[pos]
    for i in range(len(pos)):
        above, false = step(s - s[i], delta), step(t - s[i], delta)
        rank_i = above.sum() + false.sum()
        error = false.sum() / rank_i
        rank += error / n_pos
        rank_grad[pos[i]] -= error / n_pos
        rank_grad[neg] += false / rank_i / n_pos

        better = above * (y >= y[i])
        worse = above * (y < y[i])
        ideal = (better * (1 - y)).sum() / better.sum()
        current = (above * (1 - y)).sum() / above.sum()
        if worse.sum() > 0:
            excess = current - ideal
            sort += excess / n_pos
            sort_grad[pos[i]] -= excess / n_pos
            sort_grad[pos] += worse * excess / worse.sum() / n_pos
    return float(rank), float(sort), rank_grad, sort_grad


def average_precision(logits, positive, negative, delta, interpolated):
    """(1 - mean precision, gradient)."""
    pos, neg, s, t, grad = split(logits, positive, negative)
    n_pos = max(len(pos), 1)
    loss, best = 0.0, None
    for i in s.argsort().tolist():
        above, false = step(s - s[i], delta), step(t - s[i], delta)
        above[i] = 1
        rank_i = above.sum() + false.sum()
        miss = false.sum() / rank_i  # 1 - precision
        best = miss if best is None else torch.minimum(best, miss)
        used = best if interpolated else miss
        loss += used / n_pos
        grad[pos[i]] -= used / n_pos
        factor = used / miss if used < miss else 1.0
        grad[neg] += false / rank_i * factor / n_pos
    return float(loss), grad


def alrp(logits, positive, negative, error, delta):
    """(cls, loc, gradient of cls in the logits, gradient of loc in ``error``).

    ``error`` has one value per logit here and is read at the positives.
    """
    pos, neg, s, t, grad = split(logits, positive, negative)
    n_pos = max(len(pos), 1)
    e = error.double()[pos]
    cls, loc, loc_grad = 0.0, 0.0, torch.zeros_like(grad)
    for i in range(len(pos)):
        above, false = step(s - s[i], delta), step(t - s[i], delta)
        above[i] = 1
        rank_i, fp_i = above.sum() + false.sum(), false.sum()
        cls += fp_i / rank_i / n_pos
        above[i] = 0
        if fp_i > 1e-5:
            pull = ((above * e).sum() + fp_i) / rank_i
            grad[pos[i]] -= pull / n_pos
            grad[neg] += pull * false / fp_i / n_pos
        ahead = (s >= s[i]).double()
        loc += (ahead * e).sum() / rank_i / n_pos
        loc_grad[pos] += ahead / rank_i / n_pos
    return float(cls), float(loc), grad, loc_grad
