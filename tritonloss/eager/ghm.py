"""Gradient harmonising in plain torch: count the gradient norms, then weigh each by its region.

Elements that do not count fall into one region more, whose weight is 0. On the CPU the passes run
over cache-sized blocks of rows, and what is kept of a logit is its region and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from tritonloss.distributed import ProcessGroup, all_reduce, group_of, summed_regions, valued

from . import _blocks as blocks
from ._entry import at_class, finite_or_nan, masked_classes, without_autocast
from .pointwise import (
    asl1,
    asl1_radius,
    bce,
    bce_slope,
    label_rows,
    softplus,
    split_weight,
    upcast,
)


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
    return torch.sigmoid(x) if y is None else bce_slope(x, y)


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
    y: Tensor  # (..., C)
    keep: Tensor | None  # broadcasts to x; False where the element does not count


def elements_of(x, y, keep) -> Elements:
    """Upcast, and put zeros where an element does not count."""
    x = finite_or_nan(upcast(x))
    if keep is not None:
        x, y = torch.where(keep, x, torch.zeros_like(x)), torch.where(keep, y, 0)
    return Elements(x, y.to(x.dtype), keep)


def region_of(g: Tensor, bins: int, dtype) -> Tensor:
    """Unit region of a gradient norm in float32."""
    # min and not a last edge a little above 1, which 16-bit types round away
    return (g * bins).to(dtype).clamp_(0, bins - 1)


def regions(elements: Elements, mu, kind: str, bins: int, dtype) -> Tensor:
    """Unit region of each element's gradient norm, taken from float32; ``bins`` where dropped."""
    x, y, keep = elements
    g = KINDS[kind].norm(x.detach().float(), y.float(), mu)
    region = region_of(g, bins, dtype)
    return region if keep is None else torch.where(keep, region, bins)


def region_weights(count, state, params, bias_correction: bool, normalize: str, dtype):
    """``(weights, amount, updates)``: 1 / (n A_k), with a 0 for the region of dropped elements, and
    the state.

    Args:
        count: (bins,) elements per region.
        state: running (A, t), each (bins,), or a pair of None for a fresh start.
        params: (mu, m, 1 - m, log m), numbers or 0-d tensors.
    """
    _, keep, take, log_keep = params
    filled = count > 0
    seen, updates, dtypes = take * count.to(dtype), filled.to(dtype), (torch.float32,) * 2
    if state[0] is not None:
        dtypes = (state[0].dtype, state[1].dtype)
        before = state[0].to(dtype)
        seen = torch.where(filled, keep * before + seen, before)
        updates = state[1].to(dtype) + filled
    amount = seen
    if bias_correction:
        # 1 - m^t, without cancellation for m near 1
        amount = amount / -torch.expm1(updates.clamp(min=1) * log_keep)
    n = filled.sum().clamp(min=1) if normalize == "nonempty" else count.shape[-1]
    weights = torch.where(filled, 1 / (n * torch.where(filled, amount, 1)), 0)
    weights = torch.cat([weights, torch.zeros_like(weights[:1])])
    return weights, seen.to(dtypes[0]), updates.to(dtypes[1])


def _of_all(count: Tensor, process_group, flag: Tensor | None) -> Tensor:
    return summed_regions(count, flag, group_of(process_group)) if process_group else count


def _loss_of_all(loss: Tensor, process_group, flag: Tensor | None) -> Tensor:
    """The whole batch's value, this process' gradient."""
    if not process_group:
        return loss
    whole = all_reduce(loss.detach() + flag, "the loss of GHM", group_of(process_group))
    return valued(whole.to(loss.dtype), loss)


def harmonised(
    levels: list[tuple],
    amount: Tensor | None,
    updates: Tensor | None,
    params: tuple,
    kind: str,
    bins: int,
    bias_correction: bool,
    normalize: str,
    ignore_index: int,
    process_group: str | ProcessGroup = "",
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and new state: the reference of ``kernels/ghm.py``, and the CPU path.

    Args:
        levels: ``(x, labels, quality, dense, weight)`` of each.
        process_group: the processes that share the batch.
        flag: that of their agreement.
    """
    with without_autocast(levels[0][0]):
        mu, found, count = params[0], [], 0
        for level in levels:
            elements = _whole(*level, kind, ignore_index)
            region = regions(elements, mu, kind, bins, torch.int64)
            found.append((elements, region))
            count = count + _counted(region, bins)
        count = _of_all(count, process_group, flag)
        weights, *new_state = region_weights(
            count, (amount, updates), params, bias_correction, normalize, elements.x.dtype
        )
        value = KINDS[kind].value
        loss = sum((weights[region] * value(of.x, of.y, mu)).sum() for of, region in found)
        return _loss_of_all(loss, process_group, flag), *new_state


def _counted(region: Tensor, bins: int) -> Tensor:
    flat = region.reshape(-1)
    count = torch.zeros(bins + 1, dtype=torch.int64, device=region.device)
    return count.scatter_add(0, flat, torch.ones_like(flat))[:bins]


def _targets_of(x, labels, quality, dense, weight, ignore_index):
    """``(y, index, rows, logit_weight)``: targets as Elements takes them, and rows that count."""
    row_weight, logit_weight = split_weight(x, weight)
    if labels is None:
        return dense, None, None if row_weight is None else row_weight > 0, logit_weight
    rows = label_rows(x.detach(), labels, quality, ignore_index, row_weight)
    y = torch.where(rows.positive, rows.y, 0).unsqueeze(-1)
    return y, rows.index, rows.keep, logit_weight


def _whole(x, labels, quality, dense, weight, kind, ignore_index) -> Elements:
    y, index, rows, logit_weight = _targets_of(x, labels, quality, dense, weight, ignore_index)
    x = upcast(x)
    if index is not None:  # no scatter, which a graph would not fuse
        labelled = at_class(index, x)
        y = torch.where(labelled, y, 0)
    if kind == "bce" and index is None:
        x = masked_classes(x, y == 0)
    elif kind == "bce":
        positive = (labels >= 0) & (labels < x.shape[-1])
        x = masked_classes(x, ~(labelled & positive.unsqueeze(-1)))
    keep = None if rows is None else rows.unsqueeze(-1)
    if logit_weight is not None:
        keep = logit_weight > 0 if keep is None else keep & (logit_weight > 0)
    return elements_of(x, y, keep)


# The CPU path. Blocks of twice the common size: few temporaries, and half the calls.


def _blocks(x, y, index, rows, logit_weight, *at_index):
    """``(where, x, y, keep, at_index)`` of each block of rows; rows that do not count are left out.

    ``where`` cuts the block, then takes the rows that count if some are left out; y and keep are
    None where all is 0 and all counts; ``at_index`` are (index, values, ...) to be put there.
    """
    for cut in blocks.row_blocks(x.shape[:-1], (x.shape[-1] + 1) // 2):
        where = (cut,) if rows is None or rows[cut].all() else (cut, rows[cut])
        block, weight = upcast(_take(x, where)), _take(logit_weight, where)
        keep = None if weight is None else weight > 0
        if keep is not None:
            block = torch.where(keep, block, 0)
        target = None
        if index is None:
            target = _take(y, where).to(block.dtype)
            target = target if keep is None else torch.where(keep, target, 0)
        yield where, block, target, keep, [_take(t, where) for t in (index, *at_index)]


def _take(tensor, where):
    for part in where:
        tensor = None if tensor is None else tensor[part]
    return tensor


def _put(out, index, values):
    return out if index is None else out.scatter_(-1, index, values)


def harmonised_by_blocks(*lists_and_args):
    """``(loss, *new state, [gradient])`` of a list for each of a level's arguments, of the rest of
    the arguments of ``harmonised``, and want_grad."""
    lists, args = lists_and_args[:5], lists_and_args[5:]
    levels = list(zip(*(of or [None] * len(lists[0]) for of in lists), strict=True))
    with without_autocast(levels[0][0]):
        return _by_blocks(levels, *args)


class _Level:
    """One level in the two passes over its blocks."""

    def __init__(self, x, labels, quality, dense, weight, kind, mu, ignore_index):
        self.x, self.mu = x, mu
        self.kind = KINDS[kind]
        targets = _targets_of(x, labels, quality, dense, weight, ignore_index)
        y, index, _, logit_weight = self.targets = targets
        self.at = None
        if index is not None:
            keep = None if logit_weight is None else logit_weight.gather(-1, index) > 0
            at = elements_of(x.gather(-1, index), y, keep)
            self.at = at._replace(keep=None)
        self.stored = []  # regions, in a byte each

    def count(self, kind: str, bins: int):
        """Elements of each region and the dropped ones; and a sum that shows what is infinite."""
        region_at = None if self.at is None else regions(self.at, self.mu, kind, bins, torch.int32)
        count = torch.zeros(bins + 1, dtype=torch.int64, device=self.x.device)
        finite = torch.zeros((), dtype=upcast(self.x[:0]).dtype, device=self.x.device)
        for _, block, target, keep, (at, put) in _blocks(self.x, *self.targets, region_at):
            finite = finite + block.sum()
            g = self.kind.norm(block.float(), None if target is None else target.float(), self.mu)
            region = region_of(g, bins, torch.int32)
            _put(region, at, put)
            if keep is not None:
                region = torch.where(keep, region, bins)
            self.stored.append(region.to(torch.uint8 if bins < 256 else torch.int16))
            count += torch.bincount(self.stored[-1].reshape(-1), minlength=bins + 1)
        return count[:bins], finite

    def weighed(self, weights: Tensor, want_grad: bool) -> tuple[Tensor, Tensor]:
        """The level's loss and gradient."""
        value_at = slope_at = None
        if self.at is not None:
            value_at = self.kind.fast_value(self.at.x, self.at.y, self.mu)
            slope_at = self.kind.slope(self.at.x, self.at.y, self.mu)
        gradient = weights.new_empty(0)
        if want_grad:
            gradient = torch.empty_like(self.x, dtype=weights.dtype)
        totals = [weights.new_zeros(())]
        passes = _blocks(self.x, *self.targets, value_at, slope_at)
        for (where, block, target, _, (at, values, slopes)), region in zip(
            passes, self.stored, strict=True
        ):
            factor = weights.index_select(0, region.to(torch.int32).reshape(-1)).view(block.shape)
            value = self.kind.fast_value(block, target, self.mu)
            totals.append(_put(value, at, values).mul_(factor).sum())
            if want_grad:
                grad = _put(self.kind.slope(block, target, self.mu), at, slopes).mul_(factor)
                if len(where) > 1:
                    gradient[where[0]] = 0
                    gradient[where[0]][where[1]] = grad
                else:
                    gradient[where[0]] = grad
        return torch.stack(totals).sum(), gradient


def _by_blocks(levels, amount, updates, params, kind, bins, bias_correction, normalize,
               ignore_index, *shared_and_want_grad):  # fmt: skip
    """Count the regions, and remember them; then value and gradient together."""
    *shared, want_grad = shared_and_want_grad
    shared = shared or ("", None)
    passes = [_Level(*level, kind, params[0], ignore_index) for level in levels]
    counts, finite = zip(*(level.count(kind, bins) for level in passes), strict=True)
    if not sum(finite).isfinite():
        # Rare, and a case for the formula: an infinite logit gives NaN.
        return _formula_and_gradient(
            levels, amount, updates, params, kind, bins, bias_correction, normalize, ignore_index,
            *shared, want_grad,
        )  # fmt: skip
    weights, *new_state = region_weights(
        _of_all(sum(counts), *shared), (amount, updates), params, bias_correction, normalize,
        finite[0].dtype,
    )  # fmt: skip
    totals, gradients = zip(*(level.weighed(weights, want_grad) for level in passes), strict=True)
    return _loss_of_all(sum(totals), *shared), *new_state, list(gradients)


def _formula_and_gradient(levels, *args):
    *args, want_grad = args
    with torch.set_grad_enabled(want_grad):
        leaves = [level[0].detach().requires_grad_(want_grad) for level in levels]
        if want_grad and not leaves[0].view_as(leaves[0]).requires_grad:
            # The body of an op runs where autograd records nothing; in a new thread it does.
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(_formula_and_gradient, levels, *args, want_grad).result()
        of_leaves = [(x, *level[1:]) for x, level in zip(leaves, levels, strict=True)]
        loss, *new_state = harmonised(of_leaves, *args)
    gradients = [x.new_empty(0) for x in leaves]
    if want_grad:
        gradients = list(torch.autograd.grad(loss, leaves))
    return loss.detach(), *new_state, gradients
