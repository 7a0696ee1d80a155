"""Value and gradient together, one cache-sized block of rows after the other.

Plain autograd keeps a dozen temporaries as large as the logits; on the CPU writing them costs more
than the maths. Here a block's temporaries stay in the cache, and what is kept is the gradient.
Used where nothing traces or transforms the call; elsewhere the same formula runs as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tritonloss._dispatch import _transforms_active

BLOCK = 64 * 1024  # elements: a dozen float32 temporaries of this size fit a core's cache


def usable(*xs: Tensor) -> bool:
    """True in plain eager execution on the CPU, for inputs of more than one block."""
    return (
        xs[0].device.type == "cpu"
        and sum(x.numel() for x in xs) > BLOCK
        and not torch.compiler.is_compiling()
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in xs)
        and not _transforms_active()
    )


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
        prepare: ``(block of x, index) -> block``, before the gradient is recorded; where it puts a
            constant, the gradient is the loss' slope at that constant.
        values: ``(block, index) -> values`` whose sum is the block's loss.
        slopes: ``(block, index, out) -> values``, whose derivatives go to ``out``; None
            differentiates.
        by_layer: a sum for each entry of the first dim.

    Returns:
        ``(total, gradient)``; the gradient is float32 or float64, empty if not wanted.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gradient = torch.empty_like(x, dtype=dtype) if want_grad else x.new_empty(0, dtype=dtype)
    x = x.detach()

    def of_block(index) -> Tensor:
        block = prepare(x[index].to(dtype), index)
        if not want_grad:
            return values(block, index).sum()
        if slopes is not None:
            return slopes(block, index, gradient[index]).sum()
        with torch.enable_grad():
            total = values(block.requires_grad_(), index).sum()
        (gradient[index],) = torch.autograd.grad(total, block)
        return total.detach()

    def total(first: tuple) -> Tensor:
        rest = row_blocks(x.shape[len(first) : -1], x.shape[-1])
        return torch.stack([of_block((*first, *index)) for index in rest]).sum()

    if by_layer:
        return torch.stack([total((k,)) for k in range(len(x))]), gradient
    return total(()), gradient
