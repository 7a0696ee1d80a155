"""What every eager formula does first with the input that gets the gradient, and last: reduce."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

# A logit that is no negative is replaced by this one, whose loss and gradient are exactly 0.
NO_LOSS = -1e30


def without_autocast(x: Tensor):
    """No autocast inside; of tensors without values there is none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def upcast(x: Tensor) -> Tensor:
    """float32 for 16-bit inputs."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def entered(x: Tensor, *, masked: bool = False) -> Tensor:
    """``x`` in at least float32; what is infinite becomes NaN, not a plausible number.

    With ``masked``, -inf stays: probability 0. The gradient leaves with the strides of x.
    """
    x = laid_out(x)
    return without_infinity(x) if masked else finite_or_nan(x)


def laid_out(x: Tensor) -> Tensor:
    """``x`` in at least float32, and contiguous; the gradient leaves with the strides of x."""
    if not x.is_contiguous():
        # The backward of torch.where lays its result out like its first operand, the mask.
        x = torch.where(torch.ones_like(x, dtype=torch.bool), x, 0)
    return upcast(x)


def finite_or_nan(x: Tensor) -> Tensor:
    """``x`` with NaN for what is infinite."""
    return torch.add(x, x.detach(), alpha=0)


def without_infinity(x: Tensor) -> Tensor:
    """``x`` with NaN for +inf; -inf stays."""
    return torch.add(x, x.detach().clamp(min=0), alpha=0)


def at_class(index: Tensor, x: Tensor) -> Tensor:
    """True where the class of ``x`` (..., C) is the row's (..., 1)."""
    # 32 bits: Inductor vectorises this comparison on the CPU, and not the one of 64 bits
    return index.to(torch.int32) == torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)


def masked_classes(x: Tensor, negative: Tensor) -> Tensor:
    """``x`` without the classes that -inf masks: there, of negatives, loss and gradient are 0."""
    return torch.where((x == -torch.inf) & negative, NO_LOSS, x)


def rows_that_count(x: Tensor, _, weight: Tensor | None, *args):
    """Of a loss with one value per row and nothing to ignore."""
    return x[..., 0].numel() if weight is None else (weight > 0).sum()


def mean_divisor(count, avg_factor):
    """What ``"mean"`` divides by: avg_factor, or the number of elements that count; >= 1 of them.

    ``count`` is an int or an integer tensor, ``avg_factor`` None, a tuple or a vector of one.
    """
    if avg_factor is None:
        return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    avg_factor = avg_factor[0]
    if isinstance(avg_factor, Tensor):
        return torch.where(avg_factor <= 0, 1, avg_factor)
    return 1.0 if avg_factor <= 0 else avg_factor


def total_of(x: Tensor, reduction: str) -> Tensor:
    """The sum of all, or with ``"layers"`` of each entry of the first dim, unless it is that."""
    if reduction != "layers":
        return x.sum()
    return x if x.dim() == 1 else x.flatten(1).sum(1)


def reduced(loss: Tensor, count, reduction: str, avg_factor) -> Tensor:
    """Reduce per-element losses of which ``count`` count."""
    if reduction == "none":
        return loss
    total = total_of(loss, reduction)
    return total if reduction == "sum" else divided_by(total, mean_divisor(count, avg_factor))


def divided_by(total: Tensor, divisor) -> Tensor:
    """In the dtype of the total: a 0-d float64 divisor would promote it."""
    return total / (divisor.to(total.dtype) if isinstance(divisor, Tensor) else divisor)
