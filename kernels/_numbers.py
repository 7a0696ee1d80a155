"""Hyper-parameters of a kernel: numbers among its arguments, or tensors on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


class Constant(tl.constexpr):
    """A number that kernels read as a global.

    At each launch Triton asks of each global whether it still is what it was when the kernel was
    compiled. Its own constants are copied, and compared by making another: a microsecond each, of
    which the ranking losses' launches have sixty.
    """

    def __deepcopy__(self, memo):
        return self  # nothing can change it

    def __ne__(self, other):
        return False if other is self else super().__ne__(other)


def scalar_args(values: Tensor | tuple[float, ...] | None, count: int):
    """``(pointer, numbers)`` for a kernel that takes hyper-parameters from either."""
    if values is None or isinstance(values, Tensor):
        return values, (0.0,) * count
    return None, (*map(float, values), *(0.0,) * (count - len(values)))


@triton.jit
def number(pointer, index: tl.constexpr, value):
    """A hyper-parameter as float32: from memory when traced, else from the argument."""
    if pointer is not None:
        result = tl.load(pointer + index).to(tl.float32)
    else:
        result = tl.cast(value, tl.float32)  # Inductor passes Python floats as float64
    return result


@triton.jit
def load_params(params_ptr, numbers):
    """Hyper-parameters as float32: from memory when traced, else from the arguments."""
    if params_ptr is not None:
        p0 = tl.load(params_ptr).to(tl.float32)
        p1 = tl.load(params_ptr + 1).to(tl.float32)
        p2 = tl.load(params_ptr + 2).to(tl.float32)
        p3 = tl.load(params_ptr + 3).to(tl.float32)
    else:
        # Inductor passes Python floats as float64
        p0 = tl.cast(numbers[0], tl.float32)
        p1 = tl.cast(numbers[1], tl.float32)
        p2 = tl.cast(numbers[2], tl.float32)
        p3 = tl.cast(numbers[3], tl.float32)
    return p0, p1, p2, p3
