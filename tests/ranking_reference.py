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
    return difference.div_(2 * delta).add_(0.5).clamp_(0, 1)


def split(logits, positive, negative):
    """Indices and float64 scores of the positives and of the negatives."""
    x = logits.detach().double()
    pos, neg = positive.nonzero()[:, 0], negative.nonzero()[:, 0]
    return pos, neg, x[pos], x[neg]


def spread(logits, parts):
    """A full-length gradient from (indices, values) pairs."""
    grad = torch.zeros(logits.shape, dtype=torch.float64)
    for index, values in parts:
        grad[index] = values
    return grad


def rank_sort(logits, positive, negative, quality, delta):
    """(ranking error, sorting error, gradient of the first, gradient of the second)."""
    pos, neg, s, t = split(logits, positive, negative)
    rank, sort = 0.0, 0.0
    s_rank, s_sort, t_rank = torch.zeros_like(s), torch.zeros_like(s), torch.zeros_like(t)
    n_pos = max(len(pos), 1)
    y = quality.double()[pos]
    for i in range(len(pos)):
        above, false = step(s - s[i], delta), step(t - s[i], delta)
        fp_i = false.sum()
        rank_i = above.sum() + fp_i
        rank += fp_i / rank_i / n_pos
        s_rank[i] -= fp_i / rank_i / n_pos
        t_rank += false.div_(rank_i * n_pos)

        better = above * (y >= y[i])
        worse = above * (y < y[i])
        ideal = (better * (1 - y)).sum() / better.sum()
        current = (above * (1 - y)).sum() / above.sum()
        if worse.sum() > 0:
            excess = current - ideal
            sort += excess / n_pos
            s_sort[i] -= excess / n_pos
            s_sort += worse * excess / worse.sum() / n_pos
    rank_grad = spread(logits, [(pos, s_rank), (neg, t_rank)])
    return float(rank), float(sort), rank_grad, spread(logits, [(pos, s_sort)])


def average_precision(logits, positive, negative, delta, interpolated):
    """(1 - mean precision, gradient)."""
    pos, neg, s, t = split(logits, positive, negative)
    n_pos = max(len(pos), 1)
    loss, best = 0.0, None
    s_grad, t_grad = torch.zeros_like(s), torch.zeros_like(t)
    for i in s.argsort().tolist():
        above, false = step(s - s[i], delta), step(t - s[i], delta)
        above[i] = 1
        fp_i = false.sum()
        rank_i = above.sum() + fp_i
        miss = fp_i / rank_i  # 1 - precision
        best = miss if best is None else torch.minimum(best, miss)
        used = best if interpolated else miss
        loss += used / n_pos
        s_grad[i] -= used / n_pos
        factor = used / miss if used < miss else 1.0
        t_grad += false.mul_(factor / rank_i / n_pos)
    return float(loss), spread(logits, [(pos, s_grad), (neg, t_grad)])


def alrp(logits, positive, negative, error, delta):
    """(cls, loc, gradient of cls in the logits, gradient of loc in ``error``).

    ``error`` has one value per logit here and is read at the positives.
    """
    pos, neg, s, t = split(logits, positive, negative)
    n_pos = max(len(pos), 1)
    e = error.double()[pos]
    cls, loc = 0.0, 0.0
    s_grad, t_grad, e_grad = torch.zeros_like(s), torch.zeros_like(t), torch.zeros_like(s)
    for i in range(len(pos)):
        above, false = step(s - s[i], delta), step(t - s[i], delta)
        above[i] = 1
        fp_i = false.sum()
        rank_i = above.sum() + fp_i
        cls += fp_i / rank_i / n_pos
        above[i] = 0
        if fp_i > 1e-5:
            pull = ((above * e).sum() + fp_i) / rank_i
            s_grad[i] -= pull / n_pos
            t_grad += false.mul_(pull / fp_i / n_pos)
        ahead = (s >= s[i]).double()
        loc += (ahead * e).sum() / rank_i / n_pos
        e_grad += ahead / rank_i / n_pos
    grad = spread(logits, [(pos, s_grad), (neg, t_grad)])
    return float(cls), float(loc), grad, spread(logits, [(pos, e_grad)])
