"""The one table of losses: inputs, written-out formula, tolerance. Tests and perf read it.

A new loss is one row of CASES: how to make its inputs from the axes, its formula in float64, and
which axes apply to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from axes import all_pairs
from torch import Tensor

import tritonloss as tl
from tritonloss.diagnose import recorded as recorded_file

BLOCK = 2048  # logits per program of the pointwise kernel

AXES: dict[str, list] = {
    "rows": [7, 0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 8400],
    "classes": [20, 1, 80, 1203],
    "form": ["labels", "quality", "dense"],
    "layout": ["contiguous", "nchw", "sliced"],
    "dtype": ["float32", "float16", "bfloat16", "float64"],
    "reduction": ["mean", "sum", "none"],
    "weight": [None, "row", "logit"],
    "class_weight": [False, True],
    "labels": ["int64", "int16", "uint8", "no positives"],
    "avg_factor": [None, "number", "tensor", "zero"],
    "upstream": ["one", "loss scale", "random"],
    "logits": ["random", "recorded", "saturated"],
    "mode": ["plain", "traced"],
}


class Axes(NamedTuple):
    """One point of the product of the axes."""

    rows: int
    classes: int
    form: str
    layout: str
    dtype: str
    reduction: str
    weight: str | None
    class_weight: bool
    labels: str
    avg_factor: str | None
    upstream: str
    logits: str
    mode: str


@dataclass
class Problem:
    """Arguments of one call; ``x`` is the input that gets the gradient."""

    x: Tensor
    args: tuple
    kwargs: dict[str, Any]
    keep: Tensor  # bool, per output element of reduction "none": counts in loss and divisor
    positive: Tensor  # bool, per element of x: where errors are measured apart


@dataclass
class Case:
    """A loss, its inputs and its formula."""

    name: str
    function: Callable
    problem: Callable[[Axes, torch.Generator], Problem]
    # (x float64, problem, hyper) -> loss per element of reduction "none", without weights
    formula: Callable
    hyper: list[dict] = field(default_factory=lambda: [{}])
    axes: dict[str, list] = field(default_factory=dict)  # instead of AXES' values
    # of the forward and of the backward; every mean and sum ends in finish_kernel
    kernels: tuple[str, str] = ("pointwise_kernel", "pointwise_kernel")


@cache
def recorded() -> dict[str, Tensor]:
    """Head outputs of a trained dense detector: almost all easy negatives."""
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(recorded_file()).items()}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_logits(axes: Axes, g: torch.Generator, classes: int | None = None) -> Tensor:
    """Logits (rows, C) or (B, rows / B, C) in the layout, as float32 values of the dtype."""
    n, c = axes.rows, classes or axes.classes
    if axes.logits == "recorded":
        pool = recorded()["cls_logits"].float().reshape(-1)
        x = pool[torch.randint(len(pool), (n, c), generator=g)]
    else:
        x = torch.randn(n, c, generator=g) * (40 if axes.logits == "saturated" else 3)
    return in_layout(x, axes)


def in_layout(x: Tensor, axes: Axes) -> Tensor:
    """Float32 values (rows, C), in the dtype and the layout."""
    n, c = x.shape
    dtype = getattr(torch, axes.dtype)
    if axes.layout == "sliced":
        wide = torch.full((n, c + 3), float("nan"), dtype=dtype)
        wide[:, 1 : c + 1] = x
        return wide[:, 1 : c + 1]
    x = x.to(dtype)
    if axes.layout == "nchw":
        batch = 2 if n % 2 == 0 and n else 1
        x = x.reshape(batch, n // batch, c).transpose(1, 2).contiguous().transpose(1, 2)
    return x


def draw_labels(axes: Axes, rows, classes: int, g: torch.Generator) -> Tensor:
    """Mostly background (= classes), some objects, some ignored (-1; 255 where unsigned)."""
    labels = torch.full(rows, classes)
    chance = torch.rand(rows, generator=g)
    if axes.labels != "no positives":
        objects = torch.randint(classes, rows, generator=g)
        labels = torch.where(chance < 0.3, objects, labels)
    labels = torch.where(chance > 0.9, -1, labels)
    dtype = "int64" if axes.labels == "no positives" else axes.labels
    if dtype == "uint8":
        labels = torch.where(labels < 0, 255, labels)
    return labels.to(getattr(torch, dtype))


def reduction_kwargs(axes: Axes, g: torch.Generator) -> dict:
    """reduction and avg_factor, which only goes with "mean"."""
    kwargs: dict[str, Any] = {"reduction": axes.reduction}
    if axes.reduction == "mean" and axes.avg_factor:
        value = 0.0 if axes.avg_factor == "zero" else 3.7
        kwargs["avg_factor"] = torch.tensor(value) if axes.avg_factor == "tensor" else value
    return kwargs


def draw_weight(shape, g: torch.Generator) -> Tensor:
    """A third of the elements is removed by a weight of 0."""
    return (torch.rand(shape, generator=g) * 1.5 - 0.5).clamp(min=0)


def pointwise_problem(axes: Axes, g: torch.Generator) -> Problem:
    x = draw_logits(axes, g)
    rows, classes = x.shape[:-1], x.shape[-1]
    kwargs = reduction_kwargs(axes, g)
    keep = torch.ones(x.shape, dtype=torch.bool)
    if axes.form == "dense":
        share = torch.rand(x.shape, generator=g)
        y = torch.where(share > 0.8, torch.rand(x.shape, generator=g), 0.0)
        y = torch.where(share > 0.95, 1.0, y).to(x.dtype)
        targets, positive = y, y > 0
    else:
        labels = draw_labels(axes, rows, classes, g)
        ignore = 255 if labels.dtype == torch.uint8 else -1
        kwargs["ignore_index"] = ignore
        keep &= ((labels != ignore) & (labels <= classes)).unsqueeze(-1)
        positive = (labels.unsqueeze(-1) == torch.arange(classes)) & keep
        targets = labels
        if axes.form == "quality":
            quality = torch.rand(rows, generator=g)
            # read only at classes: NaN elsewhere is harmless
            quality = torch.where(positive.any(-1), quality, float("nan"))
            targets = (labels, quality)
    if axes.weight:
        weight = draw_weight(rows if axes.weight == "row" else x.shape, g)
        kwargs["weight"] = weight
        keep &= (weight.unsqueeze(-1) if axes.weight == "row" else weight) > 0
        # what does not count poisons nothing
        x = torch.where(keep, x, float("nan")) if x.is_contiguous() else x
    if axes.class_weight:
        kwargs["class_weight"] = torch.rand(classes, generator=g) + 0.1
    return Problem(x, (targets,), kwargs, keep, positive)


def dense_targets(problem: Problem) -> Tensor:
    """The targets of any form as float64 per logit, 0 where nothing counts."""
    (targets,) = problem.args
    if isinstance(targets, Tensor) and targets.is_floating_point():
        y = targets.double()
    elif isinstance(targets, Tensor):
        y = problem.positive.double()
    else:
        y = torch.where(problem.positive, targets[1].double().unsqueeze(-1), 0.0)
    return torch.where(problem.keep, y, 0.0)


def _bce(x, y):
    # -y log p - (1-y) log(1-p), written out with log-sigmoids
    return -y * torch.nn.functional.logsigmoid(x) - (1 - y) * torch.nn.functional.logsigmoid(-x)


def focal_formula(x, problem, alpha=0.25, gamma=2.0, label_smoothing=0.0):
    y = dense_targets(problem)
    p, not_p = torch.sigmoid(x), torch.sigmoid(-x)
    # 1 - p_t = p (1-y) + (1-p) y
    loss = (p * (1 - y) + not_p * y) ** gamma
    loss = loss * _bce(x, y * (1 - label_smoothing) + label_smoothing / 2)
    return loss if alpha is None else (alpha * y + (1 - alpha) * (1 - y)) * loss


def focal_star_formula(x, problem, gamma=2.0, beta=1.0, alpha=None):
    y = dense_targets(problem)
    log = torch.nn.functional.logsigmoid
    loss = -(y * log(gamma * x + beta) + (1 - y) * log(-gamma * x + beta)) / gamma
    return loss if alpha is None else (alpha * y + (1 - alpha) * (1 - y)) * loss


def quality_formula(x, problem, beta=2.0):
    y = dense_targets(problem)
    return (y * torch.sigmoid(-x) - (1 - y) * torch.sigmoid(x)).abs() ** beta * _bce(x, y)


def varifocal_formula(x, problem, alpha=0.75, gamma=2.0, iou_weighted=True, detach_weight=False):
    y = dense_targets(problem)
    p = torch.sigmoid(x)
    p = p.detach() if detach_weight else p
    positive = (y if iou_weighted else 1) * _bce(x, y)
    return torch.where(problem.positive, positive, alpha * p**gamma * _bce(x, torch.zeros(())))


def gaussian_formula(x, problem, alpha=2.0, beta=4.0):
    y = dense_targets(problem)
    log = torch.nn.functional.logsigmoid
    positive = -(torch.sigmoid(-x) ** alpha) * log(x)
    negative = -((1 - y) ** beta) * torch.sigmoid(x) ** alpha * log(-x)
    return torch.where(y == 1, positive, negative)


def asymmetric_formula(x, problem, gamma_pos=1.0, gamma_neg=4.0, margin=0.05):
    y = dense_targets(problem)
    log = torch.nn.functional.logsigmoid
    positive = -(torch.sigmoid(-x) ** gamma_pos) * log(x)
    shifted = (torch.sigmoid(x) - margin).clamp(min=0)
    if margin == 0:
        log_rest = log(-x)  # 1 - p underflows
    else:
        # 1 - p + m where p is large: 1 - (p - m) would cancel
        near = torch.log1p(-torch.where(shifted < 0.5, shifted, 0))
        beyond = (torch.sigmoid(-x) + margin).log()
        log_rest = torch.where(shifted < 0.5, near, beyond)
    return y * positive - (1 - y) * shifted**gamma_neg * log_rest


def row_weight(axes: Axes, x: Tensor, keep: Tensor, kwargs: dict, g: torch.Generator):
    """Draw the weight of rows, and fill what it removes with NaN: it poisons nothing."""
    if axes.weight:
        kwargs["weight"] = draw_weight(x.shape[:-1], g)
        keep &= kwargs["weight"] > 0
        x = torch.where(keep.unsqueeze(-1), x, float("nan")) if x.is_contiguous() else x
    return x


def softmax_problem(axes: Axes, g: torch.Generator) -> Problem:
    x = draw_logits(axes, g)
    classes = x.shape[-1]
    kwargs = reduction_kwargs(axes, g)
    labels = torch.randint(-1, classes, x.shape[:-1], generator=g)
    if axes.labels == "uint8":
        labels = labels.clamp(max=250)
        labels = torch.where(labels < 0, 255, labels)
        kwargs["ignore_index"] = 255
    labels = labels.to(getattr(torch, axes.labels))
    keep = labels != kwargs.get("ignore_index", -1)
    positive = (labels.unsqueeze(-1) == torch.arange(classes)) & keep.unsqueeze(-1)
    if axes.class_weight:
        kwargs["alpha"] = torch.rand(classes, generator=g) + 0.1
    x = row_weight(axes, x, keep, kwargs, g)
    return Problem(x, (labels,), kwargs, keep, positive & keep.unsqueeze(-1))


def softmax_formula(x, problem, gamma=2.0):
    label = problem.args[0].long().where(problem.keep, 0).unsqueeze(-1)
    log_p = x.log_softmax(-1)
    others = log_p.masked_fill(label == torch.arange(x.shape[-1]), -float("inf"))
    # 1 - p as a sum: 1.0 - p would cancel
    not_p = others.exp().sum(-1)
    loss = -(not_p**gamma) * log_p.gather(-1, label).squeeze(-1)
    alpha = problem.kwargs.get("alpha")
    return loss if alpha is None else alpha.double()[label.squeeze(-1)] * loss


def distribution_problem(axes: Axes, g: torch.Generator) -> Problem:
    x = draw_logits(axes, g)
    n = x.shape[-1] - 1
    kwargs = reduction_kwargs(axes, g)
    y = torch.rand(x.shape[:-1], generator=g) * n
    chance = torch.rand(y.shape, generator=g)
    y = torch.where(chance < 0.1, y.round(), torch.where(chance > 0.9, float(n), y))
    keep = torch.ones_like(y, dtype=torch.bool)
    positive = (y.unsqueeze(-1) - torch.arange(n + 1)).abs() < 1
    x = row_weight(axes, x, keep, kwargs, g)
    y = torch.where(keep, y, float("nan"))
    return Problem(x, (y,), kwargs, keep, positive)


def distribution_formula(x, problem):
    y = torch.where(problem.keep, problem.args[0].double(), 0)
    left = y.floor().clamp(max=x.shape[-1] - 2)
    log_p = x.log_softmax(-1)
    at = log_p.gather(-1, torch.stack([left, left + 1], -1).long())
    return -(left + 1 - y) * at[..., 0] - (y - left) * at[..., 1]


def distillation_problem(axes: Axes, g: torch.Generator) -> Problem:
    x = draw_logits(axes, g)
    kwargs = reduction_kwargs(axes, g)
    teacher = torch.randn(x.shape, generator=g) * 3
    close = torch.rand(x.shape[:-1], generator=g).unsqueeze(-1) < 0.2
    teacher = torch.where(close, x.float(), teacher)  # it says the same
    keep = torch.ones(x.shape[:-1], dtype=torch.bool)
    positive = teacher == teacher.amax(-1, keepdim=True)
    x = row_weight(axes, x, keep, kwargs, g)
    teacher = torch.where(keep.unsqueeze(-1), teacher, float("nan"))
    return Problem(x, (teacher,), kwargs, keep, positive)


def distillation_formula(x, problem, temperature=5.0):
    teacher = torch.where(problem.keep.unsqueeze(-1), problem.args[0].double(), 0)
    q, p = (teacher / temperature).softmax(-1), (x / temperature).softmax(-1)
    return temperature**2 * (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum(-1)


def box_problem(axes: Axes, g: torch.Generator) -> Problem:
    centre, size = torch.rand(axes.rows, 2, generator=g), torch.rand(axes.rows, 2, generator=g)
    target = torch.cat([centre - size / 2, centre + size / 2], -1) * 64
    pred = target + torch.randn(axes.rows, 4, generator=g) * 8
    chance = torch.rand(axes.rows, 1, generator=g)
    pred = torch.where(chance < 0.1, target, pred)  # equal boxes: every min and max is a tie
    pred = torch.where(chance > 0.9, pred + 100, pred)  # boxes apart
    pred = torch.where((chance > 0.8) & (chance < 0.9), pred.round(), pred)
    x = in_layout(pred, axes)
    target = target.reshape(x.shape)
    target = torch.where(target == pred.reshape(x.shape), x.float(), target)
    kwargs = reduction_kwargs(axes, g)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool)
    positive = (chance > 0.9).reshape(keep.shape).unsqueeze(-1)
    x = row_weight(axes, x, keep, kwargs, g)
    return Problem(x, (target,), kwargs, keep, positive)


def box_formula(kind: str):
    def formula(x, problem, eps=1e-7, alpha_threshold=0.5, mode="linear"):
        target = problem.args[0].double()
        low, high = torch.minimum(x, target), torch.maximum(x, target)

        def sides(left_top, right_bottom):
            return (right_bottom - left_top).clamp(min=0).unbind(-1)

        (wp, hp), (wt, ht) = sides(x[..., :2], x[..., 2:]), sides(target[..., :2], target[..., 2:])
        (wi, hi), (wc, hc) = sides(high[..., :2], low[..., 2:]), sides(low[..., :2], high[..., 2:])
        union = (wp * hp + wt * ht - wi * hi).clamp(min=eps)
        iou = wi * hi / union
        if kind == "iou":
            if mode == "log":
                return -iou.clamp(min=eps).log()
            return 1 - (iou if mode == "linear" else iou**2)
        if kind == "giou":
            hull = (wc * hc).clamp(min=eps)
            return 1 - iou + (hull - union) / hull
        centres = (x[..., :2] + x[..., 2:] - target[..., :2] - target[..., 2:]) / 2
        loss = 1 - iou + centres.square().sum(-1) / (wc**2 + hc**2).clamp(min=eps)
        if kind == "diou":
            return loss
        if kind == "eiou":
            width, height = (wc * wc).clamp(min=eps), (hc * hc).clamp(min=eps)
            return loss + (wp - wt) ** 2 / width + (hp - ht) ** 2 / height
        point = (wp == 0) & (hp == 0)  # no size, no aspect ratio; atan2(0, 0) has a NaN derivative
        angle = torch.atan2(wt, ht) - torch.atan2(wp, torch.where(point, 1, hp))
        v = torch.where(point, 0, 4 / torch.pi**2 * angle**2)
        alpha = (v / (1 - iou + v).clamp(min=eps)).detach()
        return loss + torch.where(iou > alpha_threshold, alpha, 0) * v

    return formula


# For losses with one value per row: sizes around their blocks, weights per row, own inputs. Each of
# their test files traces them once.
ROW_AXES = {
    "rows": [7, 0, 1, 257, 600],
    "form": ["labels"],
    "weight": [None, "row"],
    "labels": ["int64"],
    "class_weight": [False],
    "mode": ["plain"],
}
BOX_AXES = ROW_AXES | {"classes": [4], "logits": ["random"]}


def asl1_formula(x, problem, mu=0.02):
    d = x - dense_targets(problem)
    return d * d / ((d * d + mu * mu).sqrt() + mu)


def box_case(kind: str, function: Callable, hyper=({},)) -> Case:
    kernels = ("box_kernel", "box_kernel")
    return Case(kind, function, box_problem, box_formula(kind), list(hyper), BOX_AXES, kernels)


CASES = [
    Case(
        "asymmetric",
        tl.asymmetric_loss,
        pointwise_problem,
        asymmetric_formula,
        [
            {},
            {"gamma_pos": 0.0, "gamma_neg": 2.0, "margin": 0.0},
            {"gamma_pos": 2.0, "gamma_neg": 1.5, "margin": 0.2},
        ],
    ),
    Case(
        "authentic_smooth_l1",
        tl.authentic_smooth_l1_loss,
        pointwise_problem,
        asl1_formula,
        [{}, {"mu": 1.5}],
        {"form": ["dense"], "class_weight": [False], "labels": ["int64"]},
    ),
    Case(
        "focal",
        tl.sigmoid_focal_loss,
        pointwise_problem,
        focal_formula,
        [
            {},
            {"gamma": 0.5, "alpha": 0.6},
            {"gamma": 0.0, "alpha": None},
            {"gamma": 1.5},
            {"label_smoothing": 0.1},
            {"label_smoothing": 0.3, "gamma": 0.0, "alpha": 0.6},
        ],
    ),
    Case(
        "focal_star",
        tl.focal_star_loss,
        pointwise_problem,
        focal_star_formula,
        [{}, {"gamma": 0.7, "beta": -0.5, "alpha": 0.3}],
    ),
    Case(
        "quality_focal",
        tl.quality_focal_loss,
        pointwise_problem,
        quality_formula,
        [{}, {"beta": 1.0}, {"beta": 0.0}, {"beta": 2.5}],
    ),
    Case(
        "gaussian_focal",
        tl.gaussian_focal_loss,
        pointwise_problem,
        gaussian_formula,
        [{}, {"alpha": 0.5, "beta": 1.5}, {"alpha": 0.0, "beta": 0.0}],
    ),
    Case(
        "varifocal",
        tl.varifocal_loss,
        pointwise_problem,
        varifocal_formula,
        [
            {},
            {"gamma": 1.5, "alpha": 0.5, "iou_weighted": False},
            {"detach_weight": True, "gamma": 0.5},
        ],
    ),
    Case(
        "softmax_focal",
        tl.softmax_focal_loss,
        softmax_problem,
        softmax_formula,
        [{}, {"gamma": 0.0}, {"gamma": 0.5}, {"gamma": 1.5}],
        ROW_AXES | {"labels": ["int64", "int16", "uint8"], "class_weight": [False, True]},
        ("softmax_focal_kernel", "softmax_focal_kernel"),
    ),
    Case(
        "distribution_focal",
        tl.distribution_focal_loss,
        distribution_problem,
        distribution_formula,
        axes=ROW_AXES | {"classes": [17, 16, 2, 101]},
        kernels=("distribution_focal_kernel", "distribution_focal_kernel"),
    ),
    Case(
        "distribution_distillation",
        tl.distribution_distillation_loss,
        distillation_problem,
        distillation_formula,
        [{}, {"temperature": 1.0}],
        ROW_AXES | {"classes": [33, 17, 2, 101]},
        ("distillation_kernel", "distillation_kernel"),
    ),
    box_case("iou", tl.iou_loss, [{}, {"mode": "square"}, {"mode": "log"}]),
    box_case("giou", tl.giou_loss),
    box_case("diou", tl.diou_loss),
    box_case("eiou", tl.eiou_loss),
    box_case("ciou", tl.ciou_loss, [{}, {"alpha_threshold": 0.0}, {"alpha_threshold": -1.0}]),
]


def plain_point(**axes) -> Axes:
    """The first value of every axis, but for these."""
    return Axes(**{name: values[0] for name, values in AXES.items()})._replace(**axes)


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def _sensible(values, largest=170_000) -> bool:
    """Leave out points that are too large for an interpreter, and those that say nothing new."""
    point = dict(zip(AXES, values, strict=False))
    if point.get("rows", 0) * point.get("classes", 1) > largest:
        return False
    return not (point.get("upstream") == "random" and point.get("reduction", "none") != "none")


def points(c: Case, full: bool = False) -> list[Axes]:
    """A pairwise covering set of this case's axes, or their product."""
    values = [c.axes.get(name, default) for name, default in AXES.items()]
    if full:
        return [Axes(*p) for p in itertools.product(*values) if _sensible(p, 2_600_000)]
    return [Axes(*p) for p in all_pairs(values, _sensible)]
