"""Targets in their three forms, checked: labels, labels with quality, dense."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks as check


class Targets(NamedTuple):
    """Either ``labels`` (with or without ``quality``) or ``dense`` is set."""

    labels: Tensor | None  # (...) integers, contiguous
    quality: Tensor | None  # (...) floating, contiguous
    dense: Tensor | None  # (..., C) floating, any strides


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Raise unless they are floating, with at least one dim and one class."""
    check.is_floating(name, logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., C) with C >= 1; got {tuple(logits.shape)}")
    if name == "logits":
        check.are_logits(name, logits)


def parse_targets(
    logits: Tensor,
    targets,
    ignore_index: int,
    weight: Tensor | None = None,
    dense_low: float = 0.0,
) -> Targets:
    """Tell the forms apart by dtype and shape, and check them; dense ones lie in [dense_low, 1]."""
    check.is_index("ignore_index", ignore_index)
    rows, n_classes = logits.shape[:-1], logits.shape[-1]
    if isinstance(targets, Tensor):
        if _one_hot(targets, logits):
            targets = targets.to(logits.dtype)
        if not targets.dtype.is_floating_point:
            labels = parse_labels("targets", targets, logits, ignore_index, n_classes)
            return Targets(labels, None, None)
        meaning = "dense, as logits; background has no column"
        if targets.shape == logits.shape[:-1] and targets.shape != logits.shape:
            meaning += "; labels are integers: targets.long() makes them"
        check.is_input("targets", targets, logits.shape, meaning, "logits", logits)
        if check.values_checked(logits):
            _check_dense(targets, weight, dense_low)
        return Targets(None, None, targets)
    if not isinstance(targets, (tuple, list)) or len(targets) != 2:
        raise TypeError(
            "targets must be integer labels (...), a pair (labels, quality), or a floating tensor "
            f"with the logits' shape; got {type(targets).__name__}"
        )
    labels = parse_labels("labels", targets[0], logits, ignore_index, n_classes)
    quality = targets[1]
    check.is_input("quality", quality, rows, "logits without the classes", "logits", logits)
    if check.values_checked(logits) and not check.all_lie_in(quality, 0, 1):
        # compared in 64 bits: fewer may not hold ignore_index
        wide = labels.long()
        read = (wide >= 0) & (wide < n_classes) & (wide != ignore_index)
        if weight is not None and weight.dim() == labels.dim():
            read &= weight > 0
        valid = ~read | ((quality >= 0) & (quality <= 1))
        check.require(valid, "quality must lie in [0, 1] where the label is a class", quality)
    return Targets(labels, quality.contiguous(), None)


def parse_labels(name: str, labels: Tensor, logits: Tensor, ignore_index: int, last: int) -> Tensor:
    """Integer labels of the logits' rows, contiguous; accepted are 0..last and ignore_index."""
    check.is_integer(name, labels)
    rows, meaning = logits.shape[:-1], "logits without the classes"
    # looked at in this order, a graph gets no guard on sizes that have nothing to do with another
    if (
        labels.shape != rows
        and labels.dim() > 1
        and labels.shape == (*logits.shape[:1], *logits.shape[2:])
    ):
        meaning += "; class_dim=1 says that classes are in dim 1"
    check.has_shape(name, labels, rows, meaning)
    check.on_device_of(name, labels, "logits", logits)
    labels = widened(labels)
    lowest = -1 if ignore_index == -1 else 0
    if check.values_checked(logits) and not check.all_lie_in(labels, lowest, last):
        wide = labels.long()
        known = ((wide >= 0) & (wide <= last)) | (wide == ignore_index)
        check.require(
            known,
            f"{name} must lie in 0..{last}{' (background)' if last == logits.shape[-1] else ''} "
            f"or be ignore_index = {ignore_index}",
            wide,
        )
    return labels.contiguous()


def widened(integers: Tensor) -> Tensor:
    """In 64 bits where neither torch nor the kernels compare the dtype. Narrow ones stay: the
    kernels widen them in registers, and eager code widens them before it compares."""
    wide = integers.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return integers.long() if wide else integers


def _one_hot(targets: Tensor, logits: Tensor) -> bool:
    """Integers or bools with a value per logit; of one class they might be misplaced labels."""
    return (
        not targets.dtype.is_floating_point
        and not targets.dtype.is_complex
        and targets.shape == logits.shape
        and logits.shape[-1] > 1
    )


def as_weight(weight):
    """The weight, floating: masks and counts are weights, too."""
    if isinstance(weight, Tensor) and not (
        weight.dtype.is_floating_point or weight.dtype.is_complex
    ):
        return weight.float()
    return weight


def _check_dense(targets: Tensor, weight: Tensor | None, lowest: float) -> None:
    if check.all_lie_in(targets, lowest, 1):
        return
    counted = (targets >= lowest) & (targets <= 1)
    if weight is not None:
        rows = weight.unsqueeze(-1) if weight.dim() < targets.dim() else weight
        counted = counted | ~(rows > 0)
    where = "" if weight is None else " wherever the weight is above 0"
    accepted = "at most 1" if lowest == -torch.inf else f"in [{lowest:g}, 1]"
    check.require(counted, f"targets must be {accepted}{where}", targets)


def parse_weight(logits: Tensor, weight: Tensor | None) -> Tensor | None:
    """Weight per row (contiguous) or per logit (any strides)."""
    if weight is None:
        return None
    weight = as_weight(weight)
    check.is_floating("weight", weight)
    weight = _squeezed(logits, weight)
    if tuple(weight.shape) not in (tuple(logits.shape), tuple(logits.shape[:-1])):
        raise ValueError(
            f"weight must have shape {tuple(logits.shape[:-1])} (per anchor) or "
            f"{tuple(logits.shape)} (per logit); got {tuple(weight.shape)}"
        )
    check.on_device_of("weight", weight, "logits", logits)
    check.is_constant("weight", weight)
    return weight if weight.dim() == logits.dim() else weight.contiguous()


def parse_row_weight(x: Tensor, weight: Tensor | None, x_name: str = "logits") -> Tensor | None:
    """Weight per row, contiguous."""
    if weight is None:
        return None
    weight = as_weight(weight)
    check.is_floating("weight", weight)
    weight = _squeezed(x, weight)
    check.is_input("weight", weight, x.shape[:-1], "one per row", x_name, x)
    return weight.contiguous()


def _squeezed(x: Tensor, weight: Tensor) -> Tensor:
    """The weight without a last dim of 1: (..., 1) is one per row, too."""
    return weight.squeeze(-1) if weight.shape == (*x.shape[:-1], 1) else weight


def parse_class_weight(logits: Tensor, class_weight: Tensor | None, name="class_weight"):
    """One weight per class, contiguous, or None."""
    if class_weight is None:
        return None
    check.is_input(name, class_weight, logits.shape[-1:], "one per class", "logits", logits)
    return class_weight.contiguous()
