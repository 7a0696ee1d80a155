"""What every eager formula does with the input that gets the gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """float32 for 16-bit inputs."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def entered(x: Tensor) -> Tensor:
    """``x`` in at least float32; what is infinite becomes NaN, not a plausible number.

    The gradient leaves with the strides of x.
    """
    if not x.is_contiguous():
        # The backward of torch.where lays its result out like its first operand, the mask.
        x = torch.where(torch.ones_like(x, dtype=torch.bool), x, 0)
    x = upcast(x)
    return torch.add(x, x.detach(), alpha=0)
