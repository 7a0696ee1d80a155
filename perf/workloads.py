"""The inputs of sweeps and GPU checks: one table of losses, each ready to be called on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import tritonloss as tl
from tritonloss.diagnose import recorded
from tritonloss.losses.boxes import KINDS

from . import baselines


class Point(NamedTuple):
    """Where a loss is measured."""

    rows: int  # anchors
    classes: int
    positives: int
    dtype: str = "float32"
    inputs: str = "random"  # random, initial (a head before training) or recorded
    layout: str = "contiguous"  # or nchw

    @property
    def logits(self) -> int:
        return self.rows * self.classes

    @property
    def positive_rows(self) -> slice:
        positives = min(self.positives, self.rows)
        step = max(self.rows // max(positives, 1), 1)
        return slice(0, positives * step, step)


class Call(NamedTuple):
    """A loss with all but its logits filled in."""

    loss: Callable[[Tensor], Tensor]
    x: Tensor
    published: Callable[[Tensor], Tensor]  # the same loss as users run it today


def draw(point: Point, device: str, seed: int = 0):
    """``(logits, labels, quality)``; ``positives`` of the labels are classes."""
    g = torch.Generator("cpu" if device == "meta" else device).manual_seed(seed)
    shape = (point.rows, point.classes)
    x = torch.randn(shape, generator=g, device=device, dtype=torch.float32)
    if point.inputs == "initial":
        x.mul_(0.1).sub_(4.6)  # a prior of 0.01
    elif point.inputs == "recorded":
        pool = _recorded().to(device)
        x = pool[torch.arange(x.numel(), device=device) % len(pool)].view(shape)
    else:
        x.mul_(2).sub_(3)
    labels = torch.full((point.rows,), point.classes, device=device)
    objects = labels[point.positive_rows]
    objects[:] = torch.randint(point.classes, objects.shape, generator=g, device=device)
    quality = torch.rand(point.rows, generator=g, device=device)
    x = x.to(getattr(torch, point.dtype))
    if point.layout == "nchw":
        x = x.t().contiguous().t()
    return x.requires_grad_(), labels, quality


@cache
def _recorded() -> Tensor:
    return torch.from_numpy(np.load(recorded())["cls_logits"]).float().reshape(-1)


def _by_quality(labels, quality, x) -> Tensor:
    """Dense targets: the quality at the labelled class."""
    return baselines.one_hot(labels, x.detach()) * quality.to(x.dtype).unsqueeze(-1)


AVG_FACTOR = 100.0


def _summed(published) -> Callable[[Tensor], Tensor]:
    return lambda x: published(x).sum() / AVG_FACTOR


def _pointwise(loss, published):
    """Labels alone; the published code builds the one-hot targets within the step."""

    def make(point, x, labels, quality):
        return Call(
            lambda x: loss(x, labels, avg_factor=AVG_FACTOR),
            x,
            _summed(lambda x: published(x, baselines.one_hot(labels, x))),
        )

    return make


def _focal_dense(point, x, labels, quality):
    targets = _by_quality(labels, quality, x)
    return Call(
        lambda x: tl.sigmoid_focal_loss(x, targets, avg_factor=AVG_FACTOR),
        x,
        _summed(lambda x: baselines.focal(x, targets)),
    )


def _gaussian_focal(point, x, labels, quality):
    """A heat map: peaks of 1, and beside them what falls off."""
    peaks = baselines.one_hot(labels, x.detach())
    heat = torch.maximum(peaks, 0.7 * (peaks.roll(1, 0) + peaks.roll(-1, 0)).clamp(max=1))
    return Call(
        lambda x: tl.gaussian_focal_loss(x, heat, avg_factor=AVG_FACTOR),
        x,
        _summed(lambda x: baselines.gaussian_focal(x, heat)),
    )


def _quality_focal(point, x, labels, quality):
    return Call(
        lambda x: tl.quality_focal_loss(x, (labels, quality), avg_factor=AVG_FACTOR),
        x,
        _summed(lambda x: baselines.quality_focal(x, labels, quality)),
    )


def _varifocal(point, x, labels, quality):
    return Call(
        lambda x: tl.varifocal_loss(x, (labels, quality), avg_factor=AVG_FACTOR),
        x,
        _summed(lambda x: baselines.varifocal(x, _by_quality(labels, quality, x))),
    )


def _ghm_c(point, x, labels, quality):
    return Call(
        lambda x: tl.ghm_c_loss(x, labels, bins=30),
        x,
        lambda x: baselines.ghm_c_loop(x, baselines.one_hot(labels, x), 30),
    )


def _rank_sort(point, x, labels, quality):
    return Call(
        lambda x: sum(tl.rank_sort_loss(x, (labels, quality))),
        x,
        lambda x: baselines.loop_rank_sort(
            x.reshape(-1), _by_quality(labels, quality, x).reshape(-1)
        ),
    )


def _ap(point, x, labels, quality):
    return Call(
        lambda x: tl.ap_loss(x, labels),
        x,
        lambda x: baselines.loop_ap(x.reshape(-1), baselines.one_hot(labels, x).reshape(-1)),
    )


def _alrp(point, x, labels, quality):
    def published(x):
        targets = baselines.one_hot(labels, x).reshape(-1)
        return sum(baselines.loop_alrp(x.reshape(-1), targets, quality[labels < point.classes]))

    return Call(lambda x: sum(tl.alrp_loss(x, labels, quality)), x, published)


def _softmax(point, x, labels, quality):
    labels = labels.clamp(max=point.classes - 1)
    return Call(
        lambda x: tl.softmax_focal_loss(x, labels),
        x,
        lambda x: baselines.softmax_focal(x, labels).mean(),
    )


def _distribution(point, x, labels, quality):
    target = quality * (point.classes - 1)
    return Call(
        lambda x: tl.distribution_focal_loss(x, target),
        x,
        lambda x: baselines.distribution_focal(x, target).mean(),
    )


def _distillation(point, x, labels, quality):
    teacher = x.detach().float().roll(1, 0)
    return Call(
        lambda x: tl.distribution_distillation_loss(x, teacher),
        x,
        lambda x: baselines.distribution_distillation(x, teacher).mean(),
    )


def _expectation(point, x, labels, quality):
    return Call(
        lambda x: tl.distribution_expectation(x).sum(),
        x,
        lambda x: baselines.expectation(x).sum(),
    )


def _box(kind):
    loss = getattr(tl, f"{kind}_loss")

    def make(point, x, labels, quality):
        centre = torch.rand(point.rows, 2, device=x.device) * 512
        target = torch.cat([centre, centre + 32 + 64 * quality[:, None]], 1)
        # a few pixels off; the published code takes no box whose sides are out of order
        pred = (target + x.detach().float()).to(x.dtype).requires_grad_()
        return Call(
            lambda x: loss(x, target), pred, lambda x: baselines.box(x, target, kind).mean()
        )

    return make


def _regression(loss, published):
    def make(point, x, labels, quality):
        target = x.detach().float() + quality[:, None] - 0.5
        return Call(lambda x: loss(x, target), x, lambda x: published(x, target))

    return make


def _set_criterion(point, x, labels, quality):
    """One layer of one image, whose pairs are known: focal, L1 and GIoU loss."""
    queries = torch.arange(point.rows, device=x.device)[point.positive_rows]
    centre = torch.rand(point.rows, 2, device=x.device) / 2 + 0.2
    boxes = torch.cat([centre, 0.1 + 0.1 * quality[:, None].expand(-1, 2)], 1)
    targets = boxes[queries] + 0.01
    criterion = tl.SetCriterion("focal")
    objects = labels[queries][None], targets[None]
    options = {"indices": queries[None, None], "num_boxes": AVG_FACTOR}

    def corners(boxes):
        return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)

    def published(x):
        found = boxes[queries]
        named = baselines.focal(x, baselines.one_hot(labels, x)).sum()
        giou = baselines.box(corners(found), corners(targets), "giou").sum()
        return (named + 5 * (found - targets).abs().sum() + 2 * giou) / AVG_FACTOR

    return Call(
        lambda x: criterion(x[None, None], boxes[None, None], *objects, **options)["total"],
        x,
        published,
    )


class Workload(NamedTuple):
    make: Callable[..., Call]
    classes: int | None = None  # columns, where the loss fixes them


LOSSES: dict[str, Workload] = {
    "asymmetric": Workload(_pointwise(tl.asymmetric_loss, baselines.asymmetric)),
    "focal": Workload(_pointwise(tl.sigmoid_focal_loss, baselines.focal)),
    "focal_dense": Workload(_focal_dense),
    "focal_star": Workload(_pointwise(tl.focal_star_loss, baselines.focal_star)),
    "gaussian_focal": Workload(_gaussian_focal),
    "quality_focal": Workload(_quality_focal),
    "varifocal": Workload(_varifocal),
    "set_criterion": Workload(_set_criterion),
    "softmax_focal": Workload(_softmax),
    "ghm_c": Workload(_ghm_c),
    "rank_sort": Workload(_rank_sort),
    "ap": Workload(_ap),
    "alrp": Workload(_alrp),
    "distribution_focal": Workload(_distribution, 17),
    "distribution_distillation": Workload(_distillation, 33),
    "expectation": Workload(_expectation, 17),
    "ghm_r": Workload(_regression(tl.ghm_r_loss, baselines.ghm_r_loop), 4),
    "authentic_smooth_l1": Workload(
        _regression(
            tl.authentic_smooth_l1_loss, lambda *args: baselines.authentic_smooth_l1(*args).mean()
        ),
        4,
    ),
    **{kind: Workload(_box(kind), 4) for kind in KINDS},
}


def call_of(loss: str, point: Point, device: str) -> Call:
    point = point._replace(classes=LOSSES[loss].classes or point.classes)
    return LOSSES[loss].make(point, *draw(point, device))


def value_and_gradient(call: Call) -> tuple[Tensor, Tensor]:
    value = call.loss(call.x)
    return value.detach(), *torch.autograd.grad(value, call.x)


def every_loss(device: str, rows: int = 3000, classes: int = 20) -> Iterator[tuple[str, Call]]:
    """Each loss of the table once, small: float32, and bfloat16 in NCHW order."""
    for name in LOSSES:
        for dtype, layout in (("float32", "contiguous"), ("bfloat16", "nchw")):
            point = Point(rows, classes, 50, dtype, layout=layout)
            yield f"{name} {dtype} {layout}", call_of(name, point, device)


def kernels_or_eager(device: str):
    """The kernels on a GPU and under the interpreter, and nothing else in their place."""
    from tritonloss._dispatch import INTERPRET

    return tl.backend("triton") if device != "cpu" or INTERPRET else nullcontext()
