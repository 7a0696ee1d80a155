"""Counting logits on the grid of a diagnosis, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonloss._grid import COLUMNS, LIMIT, POINTS, QUALITY_STEPS, ROWS, STEPS

from . import _blocks as blocks
from .pointwise import label_rows, split_weight

DROPPED = ROWS * COLUMNS  # where an element goes that does not count


def column_of(x: Tensor, finite: bool = False, negative: bool | Tensor = False) -> Tensor:
    """Column of each logit, the one to even between two; ``finite``: all are known to be.

    A ``negative`` may be -inf: a class that is masked.
    """
    x = x.float()
    half = LIMIT * STEPS
    # The product is exact, and so is its rounding: nothing is added before.
    place = x.mul(STEPS).clamp_(-half, half).round_().add_(half)
    if finite:
        return place.int()
    known = x.isfinite() | ((x == -torch.inf) & negative)
    return torch.where(known, torch.where(known, place, 0), POINTS).int()


def row_of(y: Tensor) -> Tensor:
    """Row of a positive of this quality; never out of bounds, whatever it is."""
    y = torch.where(y > 0, y, 0).float()
    return y.mul(QUALITY_STEPS).clamp_(0, QUALITY_STEPS).round_().add_(1).int()


def counts(
    x: Tensor,
    labels: Tensor | None,
    quality: Tensor | None,
    dense: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """(ROWS, COLUMNS) int64: the reference of ``kernels/diagnose.py``, and the CPU path."""
    row_weight, logit_weight = split_weight(x, weight)
    if labels is None:
        count = _dense(x, dense, row_weight, logit_weight)
    else:
        rows = label_rows(x, labels, quality, ignore_index, row_weight)
        count = _labelled(x, rows, logit_weight)
    return count[:DROPPED].view(ROWS, COLUMNS)


def _labelled(x, rows, logit_weight):
    at = x.gather(-1, rows.index).squeeze(-1)
    column = column_of(at)
    counted = rows.positive
    if logit_weight is not None:
        counted = counted & (logit_weight.gather(-1, rows.index).squeeze(-1) > 0)
    positive = torch.where(counted, row_of(rows.y) * COLUMNS + column, DROPPED)
    # A positive is no negative; what stands at the class of another row is one.
    other = torch.where(rows.positive, DROPPED, column_of(at, negative=True)).unsqueeze(-1)
    count = _zeros(x)
    _add(count, positive)
    if not blocks.usable(x):
        negative = column_of(x, negative=True).scatter(-1, rows.index, other)
        keep = rows.keep.unsqueeze(-1)
        if logit_weight is not None:
            keep = keep & (logit_weight > 0)
        _add(count, torch.where(keep, negative, DROPPED))
        return count
    every = rows.keep.all()
    for cut in blocks.row_blocks(x.shape[:-1], x.shape[-1]):
        block, index, put = x[cut], rows.index[cut], other[cut]
        heavy = None if logit_weight is None else logit_weight[cut] > 0
        if not every:
            keep = rows.keep[cut]
            block, index, put = block[keep], index[keep], put[keep]
            heavy = None if heavy is None else heavy[keep]
        column = _column_of_block(block, True).scatter_(-1, index, put.clamp(max=COLUMNS))
        _add_negatives(count, column, heavy)
    return count


def _dense(x, y, row_weight, logit_weight):
    count = _zeros(x)
    weight = logit_weight if row_weight is None else row_weight.unsqueeze(-1).expand(x.shape)
    if not blocks.usable(x):
        column = column_of(x, negative=y == 0)
        cell = torch.where(y > 0, row_of(y) * COLUMNS + column, column)
        keep = y >= 0 if weight is None else (y >= 0) & (weight > 0)
        _add(count, torch.where(keep, cell, DROPPED))
        return count
    for cut in blocks.row_blocks(x.shape[:-1], x.shape[-1]):
        target = y[cut]
        negative, positive = target == 0, target > 0
        column = _column_of_block(x[cut], negative)
        if weight is not None:
            positive &= weight[cut] > 0
            negative &= weight[cut] > 0
        _add_negatives(count, column, negative)
        few = positive.nonzero(as_tuple=True)
        _add(count, row_of(target[few]) * COLUMNS + column[few])
    return count


def _column_of_block(block: Tensor, negative: bool | Tensor) -> Tensor:
    """A sum tells cheaply that all is finite; one that overflows costs time, no more."""
    return column_of(block, bool(block.sum(dtype=torch.float32).isfinite()), negative)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(DROPPED + 1, dtype=torch.int64, device=x.device)


def _add(count: Tensor, cell: Tensor) -> None:
    """One more in each cell."""
    cell = cell.reshape(-1).long()
    count.scatter_add_(0, cell, torch.ones_like(cell))


def _add_negatives(count: Tensor, column: Tensor, keep: Tensor | None) -> None:
    """One more in each column of the first row where kept; COLUMNS stands for what is dropped."""
    if keep is not None:
        column = torch.where(keep, column, COLUMNS)
    count[:COLUMNS] += torch.bincount(column.reshape(-1), minlength=COLUMNS + 1)[:COLUMNS]
