"""Value and gradient together, one cache-sized block of rows after the other.

Plain autograd keeps a dozen temporaries as large as the logits; on the CPU writing them costs more
than the maths. Here a block's temporaries stay in the cache, and what is kept is the gradient.
Used where nothing traces or transforms the call; elsewhere the same formula runs as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tritonloss._dispatch import _transforms_active
from tritonloss._op import differentiable

from ._entry import mean_divisor

BLOCK = 128 * 1024  # elements: a few float32 temporaries of this size fit a core's cache


def usable(*xs: Tensor) -> bool:
    """True in plain eager execution on the CPU, where there is something to compute."""
    return (
        not torch.compiler.is_compiling()
        and xs[0].device.type == "cpu"
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in xs)
        and any(x.numel() for x in xs)
        and not _transforms_active()
    )


def in_graph() -> bool:
    """True where Dynamo compiles, and nothing but the graph's own backward will differentiate."""
    return (
        torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and not _transforms_active()
    )


def written_out(formula: Callable, both: Callable) -> Callable:
    """``formula(x, *args)`` for graphs: ``both(x, *args) -> (values, derivatives by x)``, of one
    value for each entry of x or for each row.

    A graph gets one loop each way, in place of what autograd makes of the formula.
    """

    def slopes(gradient, x, *args):
        value, slope = both(x, *args)
        return (gradient if value.dim() == x.dim() else gradient.unsqueeze(-1)) * slope

    function = differentiable(lambda x, *args: both(x, *args)[0], slopes, formula)

    def call(x, *args):
        # Dynamo reads a symbolic number where it is first used; within the function of autograd
        # it would be lost for the next one.
        return function(x, *(a * 1.0 if isinstance(a, float) else a for a in args))

    return call


def many(*xs: Tensor, blocks: float = 1 / 8) -> bool:
    """True for more than so many blocks; two passes over an eighth cost less than autograd."""
    return sum(x.numel() for x in xs) > blocks * BLOCK


def row_blocks(shape, per_row: int) -> Iterator[tuple]:
    """Indices that cut leading dims of this shape into blocks of about BLOCK elements."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:]) * per_row
    if inner > BLOCK and len(shape) > 1:
        for i in range(shape[0]):
            for rest in row_blocks(shape[1:], per_row):
                yield (i, *rest)
        return
    rows = max(BLOCK // max(inner, 1), 1)
    for start in range(0, shape[0], rows):
        yield (slice(start, start + rows),)


def in_one(x: Tensor) -> bool:
    return x.numel() <= BLOCK


def cuts(x: Tensor) -> Iterable[tuple]:
    """Indices of the blocks of rows of x; of an only one, all."""
    return [()] if in_one(x) else row_blocks(x.shape[:-1], x.shape[-1])


def with_strides_of(x: Tensor, gradient: Tensor) -> Tensor:
    if gradient.stride() == x.stride():
        return gradient
    return torch.empty_like(x, dtype=gradient.dtype).copy_(gradient)


def summed(
    x: Tensor,
    prepare: Callable,
    values: Callable,
    want_grad: bool,
    *,
    slopes: Callable | None = None,
    by_layer: bool = False,
):
    """Sum of ``values`` over all rows, and its gradient.

    Args:
        x: (..., C).
        prepare: ``(block of x, index) -> new block``, before the gradient is recorded; where it
            puts a constant, the gradient is the loss' slope at that constant.
        values: ``(block, index) -> values`` whose sum is the block's loss.
        slopes: ``(block of x, index, out) -> values``, whose derivatives go to ``out``; taken where
            the values are finite, if need be those of the prepared block. None differentiates.
        by_layer: a sum for each entry of the first dim.

    Returns:
        ``(total, gradient)``; the gradient is float32 or float64, empty if not wanted.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gradient = torch.empty_like(x, dtype=dtype) if want_grad else x.new_empty(0, dtype=dtype)
    x = x.detach()

    one_block = in_one(x)

    def sum_of(values) -> Tensor:
        return values.reshape(len(x), -1).sum(1) if one_block and by_layer else values.sum()

    def of_slopes(block, index) -> Tensor | None:
        total = sum_of(slopes(block, index, gradient[index] if index else gradient))
        return total if math.isfinite((total.sum() if by_layer else total).item()) else None

    def of_block(index) -> Tensor:
        block = (x[index] if index else x).to(dtype)
        known = slopes is not None and want_grad
        if known and (total := of_slopes(block, index)) is not None:
            return total
        block = prepare(block, index)
        if known and (total := of_slopes(block, index)) is not None:
            return total
        if not want_grad:
            return sum_of(values(block, index))
        with torch.enable_grad():
            total = sum_of(values(block.requires_grad_(), index))
            (gradient[index],) = torch.autograd.grad(total.sum(), block)
        return total.detach()

    def total(first: tuple) -> Tensor:
        rest = row_blocks(x.shape[len(first) : -1], x.shape[-1])
        return torch.stack([of_block((*first, *index)) for index in rest]).sum()

    if one_block:
        return of_block(()), gradient
    if by_layer:
        return torch.stack([total((k,)) for k in range(len(x))]), gradient
    return total(()), gradient


def divided(total: Tensor, gradient: Tensor, count, reduction: str, avg_factor):
    """``(loss, gradient of the sum, 1 / divisor)``; None where nothing divides."""
    if reduction == "none" or reduction == "sum":
        return total, gradient, None
    divisor = mean_divisor(count, avg_factor)
    if isinstance(divisor, Tensor):
        divisor = divisor.to(total.device, total.dtype)
    return total / divisor, gradient, 1 / divisor


def per_row(
    values: Callable,
    formula: Callable,
    x: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    avg_factor,
    reduction: str,
    want_grad: bool,
):
    """``(loss, gradient of the sum, 1 / divisor)`` of a loss with one value per row.

    Args:
        values: ``(block of x (..., C), block of the target) -> (new values (...), their
            derivatives (..., C) or None)``, or None where it does not know them.
        formula: ``(block of x, of the target, of the weight) -> weighted values``; differentiated
            there, and where something is not finite.
        x: (..., C).
        target: (..., C) or (...).
        weight: (...) or None; what is not above 0 is removed.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.detach()
    whole = in_one(x)
    gradient = torch.empty_like(x, dtype=dtype) if want_grad and not whole else None
    found = []
    for index in cuts(x):
        block, y, w = (t if whole or t is None else t[index] for t in (x, target, weight))
        block = block.to(dtype)
        pair = total = None
        if w is None or w.min().item() >= 0:
            pair = values(block, y if y is None else y.to(dtype))
        if pair is not None:
            value, slopes = pair
            if w is not None:
                value.mul_(w)
                slopes = slopes if slopes is None else slopes.mul_(w.unsqueeze(-1))
            total = value.sum()
        if total is None or not math.isfinite(total.item()):
            with torch.set_grad_enabled(want_grad):
                leaf = block.detach().requires_grad_(want_grad)
                value = formula(leaf, y, w)
                total = value.sum()
            slopes = torch.autograd.grad(total, leaf)[0] if want_grad else None
            value, total = value.detach(), total.detach()
        if gradient is not None:
            gradient[index] = slopes
        found.append(value.flatten() if reduction == "none" else total)
    if whole and want_grad:
        gradient = with_strides_of(x, slopes)
    result = found[0]
    if not whole:
        result = torch.cat(found) if reduction == "none" else torch.stack(found).sum()
    if reduction == "none":
        result = result.view(x.shape[:-1])
    count = x.numel() // x.shape[-1]
    if weight is not None and reduction == "mean" and avg_factor is None:
        count = (weight > 0).sum()
    return divided(result, gradient, count, reduction, avg_factor)
