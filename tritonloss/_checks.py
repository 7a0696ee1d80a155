"""Checks of arguments: each error names the argument, what came and what is accepted."""

from __future__ import annotations

import math
import os
from numbers import Real

import torch
from torch import Tensor

from ._dispatch import _transforms_active

REDUCTIONS = ("none", "sum", "mean")


def is_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def is_floating(name: str, value: Tensor) -> None:
    is_tensor(name, value)
    if not value.dtype.is_floating_point or value.dtype.itemsize == 1:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got {str(value.dtype)[6:]}"
        )


def is_integer(name: str, value: Tensor) -> None:
    is_tensor(name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor; got {str(value.dtype)[6:]}")


def has_shape(name: str, value: Tensor, shape, meaning: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)} ({meaning}); got {tuple(value.shape)}"
        )


def on_device_of(name: str, value: Tensor, x_name: str, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, but {x_name} is on {x.device}")


def is_constant(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but gets no gradient here: pass {name}.detach()")


def is_input(name: str, value, shape, meaning: str, x_name: str, x: Tensor) -> None:
    """A floating tensor of this shape beside ``x`` that gets no gradient."""
    is_floating(name, value)
    has_shape(name, value, shape, meaning)
    on_device_of(name, value, x_name, x)
    is_constant(name, value)


def is_index(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")


def is_number(name: str, value, low=None, high=None, *, open_low=False, open_high=False) -> None:
    """A finite number (or a 0-d tensor, whose value is not read) from low to high."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor; got {tuple(value.shape)}")
        is_constant(name, value)
        return
    # A scheduled value is symbolic while compiling: comparisons are guards, isfinite is not
    compiling = torch.compiler.is_compiling()
    if not compiling and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a number or a 0-d tensor; got {type(value).__name__}")
    left = "any number" if low is None else f"{'>' if open_low else '>='} {low}"
    right = "" if high is None else f" and {'<' if open_high else '<='} {high}"
    if (
        (not compiling and not math.isfinite(value))
        or (low is not None and (value <= low if open_low else value < low))
        or (high is not None and (value >= high if open_high else value > high))
    ):
        raise ValueError(f"{name} must be finite and {left}{right}; got {value}")


def is_reduction(reduction: str, avg_factor) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if avg_factor is None:
        return
    if reduction != "mean":
        raise ValueError(f"avg_factor divides a 'mean'; got reduction {reduction!r} with it")
    is_number("avg_factor", avg_factor)


def values_checked(x: Tensor) -> bool:
    """True where values may be looked at: plain eager CPU tensors, or TRITONLOSS_CHECK=1."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    if x.device.type == "cpu":
        return not _transforms_active()
    return x.is_cuda and os.environ.get("TRITONLOSS_CHECK", "0") == "1"


def require(valid: Tensor, sentence: str, values: Tensor) -> None:
    """Raise unless all is valid, and show a few of the values that are not.

    On a GPU it is an asynchronous device assert, which cannot tell them.
    """
    if valid.is_cuda:
        torch._assert_async(valid.all(), sentence)
    elif not valid.all():
        wrong = values[~valid].unique()[:5].tolist()
        raise ValueError(f"{sentence}; got {', '.join(f'{v:g}' for v in wrong)}")
