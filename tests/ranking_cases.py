"""Inputs of the ranking tests, and the comparison with the written-out reference."""

from typing import NamedTuple

import numpy as np
import ranking_reference as reference
import torch
from conftest import DEVICE

import tritonloss.losses.ranking as ranking
from tritonloss.diagnose import recorded

INPUTS = (
    "random",
    "recorded",
    "tied",  # rounded to 1/4
    "nearly constant",  # an untrained model
    "+500",
    "-500",
    "separated",
    "just separated",
    "inverted",
    "outlier positive",
    "outlier negative",
    "equal positives",
    "equal qualities",
    "quality 0",
)
LOSSES = ("rank_sort", "ap", "ap_plain", "alrp")


class Problem(NamedTuple):
    logits: torch.Tensor  # (anchors, classes)
    labels: torch.Tensor  # (anchors,), classes for background, -1 ignored
    quality: torch.Tensor  # (anchors,), NaN where there is no positive

    @property
    def positive(self):
        return (
            torch.nn.functional.one_hot(self.labels.clamp(min=0), self.logits.shape[1] + 1)[
                :, :-1
            ].bool()
            & (self.labels >= 0)[:, None]
        )

    @property
    def negative(self):
        return ~self.positive & (self.labels >= 0)[:, None]

    @property
    def dense(self):
        """Dense targets; a quality of 0 is not representable in them."""
        value = torch.where(self.positive, self.quality[:, None], 0.0)
        return torch.where((self.labels < 0)[:, None], -1.0, value)


def make(kind: str, n_pos: int, n_neg: int, dtype=torch.float32, seed=0) -> Problem:
    """n_pos positives and about n_neg negatives (exactly, below 1000) in shuffled rows."""
    g = torch.Generator().manual_seed(seed)
    n_classes = 1 if n_neg < 1000 else 4
    rows = max(n_pos, -(-(n_pos + n_neg) // n_classes))
    labels = torch.full((rows,), n_classes)
    where = torch.randperm(rows, generator=g)
    labels[where[:n_pos]] = torch.randint(n_classes, (n_pos,), generator=g)
    if n_neg >= 1000:
        labels[where[n_pos : n_pos + rows // 20]] = -1
    x = 2 * torch.randn(rows, n_classes, generator=g)
    if kind == "recorded":
        data = torch.from_numpy(np.load(recorded())["cls_logits"]).flatten().float()
        x = data[torch.randint(len(data), x.shape, generator=g)]
        # labelled logits of a trained detector are high, but no higher than the best negatives
        x[where[:n_pos]] = (x[where[:n_pos]] / 4).clamp(max=0.7)
    problem = Problem(x, labels, torch.rand(rows, generator=g))
    pos, neg = problem.positive, problem.negative
    quality = problem.quality
    if kind == "tied":
        x, quality = (4 * x).round() / 4, (4 * quality).round() / 4
    elif kind == "nearly constant":
        x = 0.005 * x - 4.6
    elif kind in ("+500", "-500"):
        x = x + float(kind)
    elif kind == "separated":
        x = torch.where(pos, x + 40, x - 40)
    elif kind == "just separated":
        x = torch.where(pos, x.abs() + 0.3, -x.abs())
    elif kind == "inverted":
        x = torch.where(pos, x - 40, x + 40)
    elif kind == "outlier positive" and n_pos:
        x.view(-1)[pos.flatten().nonzero()[0]] = 1e6
    elif kind == "outlier negative" and neg.any():
        x.view(-1)[neg.flatten().nonzero()[0]] = 1e6
    elif kind == "equal positives":
        x = torch.where(pos, 0.3, x)
    elif kind == "equal qualities":
        quality = torch.full_like(quality, 0.6)
    elif kind == "quality 0":
        quality = torch.where(quality < 0.7, 0.0, quality)
    quality = torch.where(pos.any(1), quality, torch.nan)
    return Problem(x.to(dtype), labels, quality.to(torch.float64 if dtype.itemsize == 8 else
                                                    torch.float32))  # fmt: skip


def to_device(t):
    """Arguments on the device under test, with their strides."""
    if isinstance(t, torch.Tensor):
        return t.to(DEVICE)
    return tuple(map(to_device, t)) if isinstance(t, tuple) else t


def as_head(t, class_dim: int):
    """Three levels, the second empty, of what has one row per anchor; (1, C, rows) with 1."""
    if isinstance(t, tuple):
        return tuple(as_head(part, class_dim) for part in t)
    sizes = [2 * len(t) // 3, 0, len(t) - 2 * len(t) // 3]
    levels = [part.unsqueeze(0) for part in t.split(sizes)]
    return [v.movedim(-1, class_dim).contiguous() if t.dim() == 2 else v for v in levels]


def ours(loss: str, logits, targets, error, *, head: int | None = None, **options):
    """Two values; gradients in logits of each, and of the second in ``error``.

    With ``head``, a class_dim, the call is one of levels.
    """
    if head is not None:
        options["class_dim"] = head

    def arranged(t):
        return t if head is None else as_head(t, head)

    x = to_device(logits.detach()).clone(memory_format=torch.preserve_format).requires_grad_()
    targets = to_device(targets)
    labels = targets[0] if isinstance(targets, tuple) else targets
    options = {name: to_device(value) for name, value in options.items()}
    second, grad_2, error_grad = torch.zeros(()), None, None
    if loss == "rank_sort":
        first, second = ranking.rank_sort_loss(arranged(x), arranged(targets), **options)
        (grad_2,) = torch.autograd.grad(second, x, retain_graph=True)
    elif loss == "alrp":
        e = to_device(error.detach()).clone().requires_grad_()
        first, second = ranking.alrp_loss(*map(arranged, (x, labels, e)), **options)
        (error_grad,) = torch.autograd.grad(second, e)
    else:
        x_of_call, labels = arranged(x), arranged(labels)
        first = ranking.ap_loss(x_of_call, labels, interpolated=loss == "ap", **options)
    (grad_1,) = torch.autograd.grad(first, x)
    grads = [None if g is None else g.cpu() for g in (grad_1, grad_2, error_grad)]
    return (first.detach().cpu(), second.detach().cpu()), *grads


def expected(loss: str, problem: Problem, delta: float):
    """The same from the reference."""
    x = problem.logits
    pos, neg = problem.positive.flatten(), problem.negative.flatten()
    quality = problem.quality.repeat_interleave(x.shape[1])
    if loss == "rank_sort":
        rank, sort, g1, g2 = reference.rank_sort(x.flatten(), pos, neg, quality, delta)
        return (rank, sort), g1.view(x.shape), g2.view(x.shape), None
    if loss == "alrp":
        cls, loc, g1, ge = reference.alrp(x.flatten(), pos, neg, quality, delta)
        return (cls, loc), g1.view(x.shape), None, ge.view(x.shape).sum(1)
    value, g1 = reference.average_precision(x.flatten(), pos, neg, delta, loss == "ap")
    return (value, 0.0), g1.view(x.shape), None, None


def relative_error(ours, reference) -> float:
    """The larger of the relative errors in L2 and in max norm; absolute where all is 0."""
    ours, reference = ours.double().flatten(), reference.double().flatten()
    if reference.numel() == 0:
        return 0.0
    assert not ours.isnan().any()
    gap = ours - reference
    sizes = [(gap.norm(), reference.norm()), (gap.abs().max(), reference.abs().max())]
    return max(float(g / r if r > 0 else g) for g, r in sizes)


def assert_agrees(got, want, problem: Problem, value_tolerance: float, tolerance: float):
    """Values; gradients separately over positives and negatives; exact 0 elsewhere."""
    values, *grads = got
    want_values, *want_grads = want
    for value, w in zip(values, want_values, strict=True):
        assert abs(value.double() - w) <= value_tolerance * max(1.0, abs(w))
    pos, neg = problem.positive, problem.negative
    for grad, w in zip(grads, want_grads, strict=True):
        if grad is None:
            continue
        if grad.shape != pos.shape:  # of localisation errors
            assert relative_error(grad, w) <= tolerance
            continue
        assert relative_error(grad[pos], w[pos]) <= tolerance
        assert relative_error(grad[neg], w[neg]) <= tolerance
        assert not grad[~pos & ~neg].any()
