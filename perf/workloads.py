"""The inputs of sweeps and GPU checks: one table of losses, each ready to be called on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import tritonloss as tl

from . import baselines

RECORDED = Path(__file__).parent.parent / "tests" / "data" / "recorded" / "nanodet_g_416.npz"


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


class Call(NamedTuple):
    """A loss with all but its logits filled in."""

    loss: Callable[[Tensor], Tensor]
    x: Tensor
    published: Callable[[Tensor], Tensor] | None


def draw(point: Point, device: str, seed: int = 0):
    """``(logits, labels, quality)``; ``positives`` of the labels are classes."""
    g = torch.Generator(device).manual_seed(seed)
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
    positives = min(point.positives, point.rows)
    step = max(point.rows // max(positives, 1), 1)
    objects = torch.randint(point.classes, (positives,), generator=g, device=device)
    labels[: positives * step : step] = objects
    quality = torch.rand(point.rows, generator=g, device=device)
    x = x.to(getattr(torch, point.dtype))
    if point.layout == "nchw":
        x = x.t().contiguous().t()
    return x.requires_grad_(), labels, quality


@cache
def _recorded() -> Tensor:
    return torch.from_numpy(np.load(RECORDED)["cls_logits"]).float().reshape(-1)


def _one_hot(labels, quality, classes: int) -> Tensor:
    dense = torch.zeros(len(labels), classes + 1, device=labels.device)
    return dense.scatter_(1, labels[:, None], quality[:, None])[:, :classes]


def _pointwise(loss, with_quality=False):
    def make(point, x, labels, quality):
        targets = (labels, quality) if with_quality else labels
        return Call(lambda x: loss(x, targets, avg_factor=100.0), x, None)

    return make


def _dense(loss):
    def make(point, x, labels, quality):
        targets = _one_hot(labels, quality, point.classes).to(x.dtype)
        return Call(lambda x: loss(x, targets, avg_factor=100.0), x, None)

    return make


def _ghm_c(point, x, labels, quality):
    published = None
    if x.device.type == "cpu":
        targets = _one_hot(labels, torch.ones_like(quality), point.classes)

        def published(x):
            return baselines.ghm_c_loop(x, targets, 30)

    return Call(lambda x: tl.ghm_c_loss(x, labels, bins=30), x, published)


def _rank_sort(point, x, labels, quality):
    targets = _one_hot(labels, quality, point.classes).reshape(-1)
    return Call(
        lambda x: sum(tl.rank_sort_loss(x, (labels, quality))),
        x,
        lambda x: baselines.loop_rank_sort(x.reshape(-1), targets),
    )


def _ap(point, x, labels, quality):
    targets = _one_hot(labels, torch.ones_like(quality), point.classes).reshape(-1)
    return Call(
        lambda x: tl.ap_loss(x, labels), x, lambda x: baselines.loop_ap(x.reshape(-1), targets)
    )


def _alrp(point, x, labels, quality):
    return Call(lambda x: sum(tl.alrp_loss(x, labels, quality)), x, None)


def _softmax(point, x, labels, quality):
    labels = labels.clamp(max=point.classes - 1)
    return Call(lambda x: tl.softmax_focal_loss(x, labels), x, None)


def _distribution(point, x, labels, quality):
    target = quality * (point.classes - 1)
    return Call(lambda x: tl.distribution_focal_loss(x, target), x, None)


def _expectation(point, x, labels, quality):
    return Call(lambda x: tl.distribution_expectation(x).sum(), x, None)


def _boxes(loss):
    def make(point, x, labels, quality):
        centre = torch.rand(point.rows, 2, device=x.device) * 512
        target = torch.cat([centre, centre + 32 + 64 * quality[:, None]], 1)
        pred = (target + x.detach().float() * 4).to(x.dtype).requires_grad_()
        return Call(lambda x: loss(x, target), pred, None)

    return make


def _smooth_l1(loss):
    def make(point, x, labels, quality):
        target = x.detach().float() + quality[:, None] - 0.5
        return Call(lambda x: loss(x, target), x, None)

    return make


class Workload(NamedTuple):
    make: Callable[..., Call]
    classes: int | None = None  # columns, where the loss fixes them


LOSSES: dict[str, Workload] = {
    "focal": Workload(_pointwise(tl.sigmoid_focal_loss)),
    "focal_dense": Workload(_dense(tl.sigmoid_focal_loss)),
    "focal_star": Workload(_pointwise(tl.focal_star_loss)),
    "quality_focal": Workload(_pointwise(tl.quality_focal_loss, True)),
    "varifocal": Workload(_pointwise(tl.varifocal_loss, True)),
    "softmax_focal": Workload(_softmax),
    "ghm_c": Workload(_ghm_c),
    "rank_sort": Workload(_rank_sort),
    "ap": Workload(_ap),
    "alrp": Workload(_alrp),
    "distribution_focal": Workload(_distribution, 17),
    "expectation": Workload(_expectation, 17),
    "ghm_r": Workload(_smooth_l1(tl.ghm_r_loss), 4),
    "authentic_smooth_l1": Workload(_smooth_l1(tl.authentic_smooth_l1_loss), 4),
    "iou": Workload(_boxes(tl.iou_loss), 4),
    "giou": Workload(_boxes(tl.giou_loss), 4),
    "diou": Workload(_boxes(tl.diou_loss), 4),
    "ciou": Workload(_boxes(tl.ciou_loss), 4),
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
