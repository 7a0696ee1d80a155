"""Gradient harmonising in plain torch: count the gradient norms, then weigh each by its region.

Elements that do not count fall into one region more, whose weight is 0. On the CPU the passes run
over cache-sized blocks of rows, and no buffer as large as the logits is made but the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tritonloss import _op
from tritonloss._targets import Targets

from . import _blocks as blocks
from .elementwise import asl1, asl1_radius, bce, label_rows, softplus, split_weight, upcast


class Harmonised(NamedTuple):
    """One loss of the family on prediction x and target y; y None stands for zeros."""

    norm: Callable  # (x, y, mu): |dL/dx|, in [0, 1]
    value: Callable  # (x, y, mu): the loss
    fast_value: Callable  # the same, where no derivative is taken
    slope: Callable  # (x, y, mu): dL/dx


def _bce_norm(x, y, _):
    p = torch.sigmoid(x)
    return p if y is None else (p - y).abs()


def _bce_slope(x, y, _):
    # p (1 - y) - (1 - p) y: exact at y = 0 and y = 1
    p = torch.sigmoid(x)
    return p if y is None else torch.lerp(p, -torch.sigmoid(-x), y)


def _bce_fast(x, y, _):
    # one transcendental pair instead of two; abs() has no derivative at 0
    if y is None:
        return softplus(x)
    return torch.lerp(x.relu(), (-x).relu_(), y).add_(x.abs().neg_().exp_().log1p_())


KINDS = {
    "bce": Harmonised(
        _bce_norm,
        lambda x, y, _: softplus(x) if y is None else bce(x, y),
        _bce_fast,
        _bce_slope,
    ),
    "asl1": Harmonised(
        lambda x, y, mu: (x - y).abs() / asl1_radius(x - y, mu),
        asl1,
        asl1,
        lambda x, y, mu: (x - y) / asl1_radius(x - y, mu),
    ),
}


class Elements(NamedTuple):
    """Predictions and targets of the rows that count, or of all rows with ``keep``."""

    x: Tensor  # (..., C) float32 or float64
    y: Tensor  # (..., C), or with index (..., 1): the target there, 0 elsewhere
    index: Tensor | None  # (..., 1) a class
    keep: Tensor | None  # broadcasts to x; False where the element does not count


def _each(function: Callable, elements: Elements, mu) -> Tensor:
    """function(x, y, mu) of each element: with labels, all as negatives and one a row again."""
    x, y, index, _ = elements
    if index is None:
        return function(x, y, mu)
    return function(x, None, mu).scatter(-1, index, function(x.gather(-1, index), y, mu))


def elements_of(x, y, index, keep) -> Elements:
    """Upcast, and put zeros where an element does not count."""
    x = upcast(x)
    x = torch.add(x, x.detach(), alpha=0)  # an infinite logit gives NaN, not a plausible number
    if keep is not None:
        x = torch.where(keep, x, torch.zeros_like(x))
        if index is None:
            y = torch.where(keep, y, 0)
    return Elements(x, y.to(x.dtype), index, keep)


def regions(elements: Elements, mu, kind: str, bins: int, dtype) -> Tensor:
    """Unit region of each element's gradient norm, taken from float32; ``bins`` where dropped."""
    x, y, index, keep = elements
    g = _each(KINDS[kind].norm, Elements(x.detach().float(), y.float(), index, keep), mu)
    # min and not a last edge a little above 1, which 16-bit types round away
    region = (g * bins).to(dtype).clamp(0, bins - 1)
    return region if keep is None else torch.where(keep, region, bins)


def region_weights(count, state, momentum, bias_correction: bool, normalize: str, dtype):
    """``(weights, state)``: 1 / (n A_k), with a 0 for the region of dropped elements, and (A, t).

    Args:
        count: (bins,) elements per region.
        state: running (A, t), each (bins,), or None for a fresh start.
        momentum: number or 0-d tensor.
    """
    filled = count > 0
    seen, updates = torch.zeros((2, *count.shape), dtype=dtype, device=count.device).unbind()
    if state is not None:
        seen, updates = state[0].to(dtype), state[1].to(dtype)
    seen = torch.where(filled, momentum * seen + (1 - momentum) * count.to(dtype), seen)
    updates = updates + filled
    amount = seen
    if bias_correction:
        if isinstance(momentum, Tensor):
            log_m = momentum.to(dtype).log()
        else:
            log_m = math.log(momentum) if momentum else -math.inf
        # 1 - m^t, without cancellation for m near 1
        amount = amount / -torch.expm1(updates.clamp(min=1) * log_m)
    n = filled.sum().clamp(min=1) if normalize == "nonempty" else count.shape[-1]
    weights = torch.where(filled, 1 / (n * torch.where(filled, amount, 1)), 0)
    weights = torch.cat([weights, torch.zeros_like(weights[:1])])
    dtypes = (torch.float32,) * 2 if state is None else (state[0].dtype, state[1].dtype)
    return weights, (seen.to(dtypes[0]), updates.to(dtypes[1]))


def harmonised(
    x: Tensor,
    targets: Targets,
    weight: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    momentum,
    mu,
    kind: str,
    bins: int,
    bias_correction: bool,
    normalize: str,
    ignore_index: int,
):
    """Loss and new state: the reference of ``kernels/ghm.py``, and the CPU path."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    how = (state, momentum, bias_correction, normalize, dtype)
    with torch.autocast(x.device.type, enabled=False):
        args = (targets.dense, targets.labels, targets.quality, weight)
        if blocks.usable(x):
            count = _blockwise_count(x, *args, mu, kind, bins, ignore_index)
            weights, new_state = region_weights(count, *how)
            return _blockwise(x, *args, weights, mu, kind, ignore_index), new_state
        elements = _whole(x, *args, ignore_index)
        region = regions(elements, mu, kind, bins, torch.int64)
        flat = region.reshape(-1)
        count = torch.zeros(bins + 1, dtype=torch.int64, device=x.device)
        count = count.scatter_add(0, flat, torch.ones_like(flat))[:bins]
        weights, new_state = region_weights(count, *how)
        return (weights[region] * _each(KINDS[kind].value, elements, mu)).sum(), new_state


def _targets_of(x, dense, labels, quality, weight, ignore_index):
    """``(y, index, rows, logit_weight)``: targets as Elements takes them, and rows that count."""
    row_weight, logit_weight = split_weight(x, weight)
    if labels is None:
        return dense, None, None if row_weight is None else row_weight > 0, logit_weight
    rows = label_rows(x.detach(), Targets(labels, quality, None), ignore_index, row_weight)
    y = torch.where(rows.positive, rows.y, 0).unsqueeze(-1)
    return y, rows.index, rows.keep, logit_weight


def _whole(x, dense, labels, quality, weight, ignore_index) -> Elements:
    y, index, rows, logit_weight = _targets_of(x, dense, labels, quality, weight, ignore_index)
    keep = None if rows is None else rows.unsqueeze(-1)
    if logit_weight is not None:
        keep = logit_weight > 0 if keep is None else keep & (logit_weight > 0)
    return elements_of(x, y, index, keep)


def _blocks(x, *targets):
    """``(where, Elements)`` of each block of rows; rows that do not count are left out.

    ``where`` cuts the block, then takes the rows that count if some are left out.
    """
    y, index, rows, logit_weight = _targets_of(x, *targets)
    for cut in blocks.row_blocks(x.shape[:-1], x.shape[-1]):
        where = (cut,)
        if rows is not None and not rows[cut].all():
            where = (cut, rows[cut])
        x_, y_, index_, weight_ = (_take(t, where) for t in (x, y, index, logit_weight))
        yield where, elements_of(x_, y_, index_, None if weight_ is None else weight_ > 0)


def _take(tensor, where):
    for part in where:
        tensor = None if tensor is None else tensor[part]
    return tensor


@torch.no_grad()
def _blockwise_count(x, dense, labels, quality, weight, mu, kind, bins, ignore_index):
    count = torch.zeros(bins + 1, dtype=torch.int64)
    for _, elements in _blocks(x, dense, labels, quality, weight, ignore_index):
        region = regions(elements, mu, kind, bins, torch.int32)
        count += torch.bincount(region.reshape(-1), minlength=bins + 1)
    return count[:bins]


def _weights_of(elements, weights, mu, kind):
    region = regions(elements, mu, kind, weights.numel() - 1, torch.int32)
    return weights.index_select(0, region.reshape(-1)).view(region.shape)


def _forward(x, dense, labels, quality, weight, weights, mu, kind, ignore_index):
    totals = []
    for _, elements in _blocks(x, dense, labels, quality, weight, ignore_index):
        value = _each(KINDS[kind].fast_value, elements, mu)
        totals.append((value * _weights_of(elements, weights, mu, kind)).sum())
    return (torch.stack(totals).sum(),), ()


def _backward(grads, saved, x, dense, labels, quality, weight, weights, mu, kind, ignore_index):
    # Regions are found again: cheaper than a buffer as large as the logits.
    grad_x = torch.empty_like(x)
    for where, elements in _blocks(x, dense, labels, quality, weight, ignore_index):
        grad = _each(KINDS[kind].slope, elements, mu)
        grad = grad * _weights_of(elements, weights * grads[0], mu, kind)
        if len(where) > 1:
            grad_x[where[0]] = 0
            grad_x[where[0]][where[1]] = grad.to(x.dtype)
        else:
            grad_x[where[0]] = grad
    return grad_x


def _reference(x, dense, labels, quality, weight, weights, mu, kind, ignore_index):
    elements = _whole(x, dense, labels, quality, weight, ignore_index)
    region = regions(elements, mu, kind, weights.numel() - 1, torch.int64)
    return (weights[region] * _each(KINDS[kind].value, elements, mu)).sum()


_blockwise = _op.differentiable(_forward, _backward, _reference)
