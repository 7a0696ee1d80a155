"""none | sum | mean on the eager path."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_divisor(count, avg_factor):
    """What ``"mean"`` divides by: avg_factor, or the number of elements that count; >= 1 of them.

    ``count`` is an int or an integer tensor.
    """
    if avg_factor is None:
        return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
    if isinstance(avg_factor, Tensor):
        return torch.where(avg_factor <= 0, 1, avg_factor)
    return 1.0 if avg_factor <= 0 else avg_factor


def reduced(loss: Tensor, count, reduction: str, avg_factor) -> Tensor:
    """Reduce per-element losses of which ``count`` count."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / mean_divisor(count, avg_factor)
