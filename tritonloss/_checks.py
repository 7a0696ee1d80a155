"""Checks of arguments: each error names the argument, what came and what is accepted."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor

from ._dispatch import _transforms_active

REDUCTIONS = ("none", "sum", "mean")
WORDS = tuple(map(repr, REDUCTIONS))
Function = TypeVar("Function", bound=Callable)


def by_name(function: Function) -> Function:
    """The function, with a sentence for what is passed by position and must have a name, and for a
    reduction where there is none to choose."""
    parameters = inspect.signature(function).parameters.values()
    first = [p.name for p in parameters if p.kind != p.KEYWORD_ONLY]
    most, has_reduction = len(first), "reduction" in (p.name for p in parameters)

    @functools.wraps(function)
    def call(*args, **kwargs):
        if len(args) > most:
            given = "a tensor" if isinstance(args[most], Tensor) else repr(args[most])
            hint = f", such as reduction={given}" if has_reduction and given in WORDS else ""
            raise TypeError(
                f"{function.__name__} takes {', '.join(first)} by position, and all else by name"
                f"{hint}; got {given} without one"
            )
        if "reduction" in kwargs and not has_reduction:
            raise TypeError(
                f"{function.__name__} takes no reduction: its docstring says what it returns; got "
                f"{kwargs['reduction']!r}"
            )
        return function(*args, **kwargs)

    return call


def is_tensor(name: str, value) -> None:
    if isinstance(value, Tensor):
        return
    hint = ""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        hint = ", here one for all levels"
    elif type(value).__module__ == "numpy":
        hint = ": torch.from_numpy makes one"
    raise TypeError(f"{name} must be a tensor{hint}; got {type(value).__name__}")


def is_floating(name: str, value: Tensor) -> None:
    is_tensor(name, value)
    if not value.dtype.is_floating_point or value.dtype.itemsize == 1:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got {str(value.dtype)[6:]}"
        )


def holds_values(name: str, x: Tensor) -> None:
    """What sorts or picks by value can do nothing with a tensor that has only a shape."""
    if x.is_meta and _has_data(x):
        raise ValueError(
            f"{name} must hold values, for they decide what is computed: pass a tensor on a CPU or "
            "a GPU; got one on meta"
        )


WITHOUT_FLOAT64 = {"mps"}  # kinds of devices


def float64_beside(name: str, x: Tensor) -> None:
    """What is summed or subtracted in float64 cannot run on every device."""
    if x.device.type in WITHOUT_FLOAT64:
        raise TypeError(
            f"{name} must be on a device with float64, such as a CPU: it counts in float64, which "
            f"{x.device.type} lacks; got a tensor on {x.device}"
        )


def is_integer(name: str, value: Tensor) -> None:
    is_tensor(name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        hint = f" ({name}.long() makes one)" if value.dtype.is_floating_point else ""
        raise TypeError(f"{name} must be an integer tensor{hint}; got {str(value.dtype)[6:]}")
    if value.dtype == torch.uint64 and values_checked(value):
        # widened to int64 it would be negative, such as the ignore_index
        require(value.view(torch.int64) >= 0, f"{name} must be below 2**63", value)


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


def is_number(name: str, value, low=None, high=None, *, open_low=False, open_high=False):
    """``value``: a finite number from low to high, or a 0-d tensor, which is read on the CPU alone.

    What numpy made comes back as a number of Python; a graph holds it as an array, and it comes
    back as a tensor.
    """
    if torch.compiler.is_compiling() and type(value).__module__ == "numpy":
        value = torch.as_tensor(value, device="cpu")
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor; got {tuple(value.shape)}")
        is_constant(name, value)
        if value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number; got {str(value.dtype)[6:]}")
        if not values_checked(value):
            return value
        if value.is_cuda:
            _is_number_on_device(name, value, low, high, open_low, open_high)
        else:
            is_number(name, value.item(), low, high, open_low=open_low, open_high=open_high)
        return value
    # A scheduled value is symbolic while compiling: comparisons are guards, isfinite is not
    compiling = torch.compiler.is_compiling()
    plain = type(value) in (float, int)  # asking an abstract class costs a microsecond
    if not (plain or compiling) and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a number or a 0-d tensor; got {type(value).__name__}")
    if (
        (not compiling and not math.isfinite(value))
        or (low is not None and (value <= low if open_low else value < low))
        or (high is not None and (value >= high if open_high else value > high))
    ):
        raise ValueError(f"{_range(name, low, high, open_low, open_high)}; got {value}")
    return value.item() if not plain and type(value).__module__ == "numpy" else value


def _range(name: str, low, high, open_low: bool, open_high: bool) -> str:
    left = "" if low is None else f" and {'>' if open_low else '>='} {low}"
    right = "" if high is None else f" and {'<' if open_high else '<='} {high}"
    return f"{name} must be finite{left}{right}"


def _is_number_on_device(name: str, value: Tensor, low, high, open_low, open_high) -> None:
    valid = value.isfinite()
    if low is not None:
        valid = valid & (value > low if open_low else value >= low)
    if high is not None:
        valid = valid & (value < high if open_high else value <= high)
    require(valid, _range(name, low, high, open_low, open_high), value)


def is_reduction(reduction: str, avg_factor) -> tuple | None:
    """``avg_factor``, checked as a number: a tuple of one."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if avg_factor is None:
        return None
    if reduction != "mean":
        raise ValueError(f"avg_factor divides a 'mean'; got reduction {reduction!r} with it")
    return (is_number("avg_factor", avg_factor),)


def _has_data(x: Tensor) -> bool:
    """False for fake tensors and their like; a plain subclass holds values as a tensor does."""
    kind = type(x)
    return kind in (Tensor, torch.nn.Parameter) or (
        kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and not torch._is_functional_tensor(x)
    )


_looks_left = 100


def are_logits(name: str, x: Tensor) -> None:
    """Warn, once in a process, where logits look like what a sigmoid or a softmax returned.

    On the CPU alone, and in its first calls: a head that does so does it from the beginning. Nearly
    all logits are told by the first few, of which one is negative.
    """
    global _looks_left
    if torch.compiler.is_compiling() or not _looks_left:  # a graph would be guarded by the number
        return
    if x.device.type != "cpu" or not values_checked(x):
        return
    if x.numel() < 8:  # so few are between 0 and 1 by chance
        return
    _looks_left -= 1
    first = x[(0,) * (x.dim() - 1)][:16].tolist()
    if min(first) < 0 or max(first) > 1:
        return
    low, high = torch.aminmax(x.detach())
    if not 0 <= low < high <= 1:  # all the same: a head that was just initialised
        return
    _looks_left = 0
    warnings.warn(
        f"all {name} lie between 0 and 1: are they probabilities? The loss applies the sigmoid or "
        "the softmax itself: pass what the head returns before it",
        stacklevel=_depth(),
    )


def _depth() -> int:
    """Of the caller's line, for a warning of the function that asks."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back and frame.f_globals["__name__"].startswith(("tritonloss.", "torch.")):
        frame, depth = frame.f_back, depth + 1
    return depth


def values_checked(x: Tensor) -> bool:
    """True where values may be looked at: plain eager CPU tensors, or TRITONLOSS_CHECK=1."""
    if torch.compiler.is_compiling() or not _has_data(x):
        return False
    if x.device.type == "cpu":
        return not _transforms_active()
    return x.is_cuda and os.environ.get("TRITONLOSS_CHECK", "0") == "1"


def all_lie_in(x: Tensor, low, high) -> bool:
    """True if all values of a CPU tensor do, by one look; where not, ``require`` tells which."""
    if x.is_cuda:
        return False
    if x.numel() == 0:
        return True
    least, most = torch.aminmax(x.detach())
    return low <= least.item() and most.item() <= high


def require(valid: Tensor, sentence: str, values: Tensor) -> None:
    """Raise unless all is valid, and show a few of the values that are not.

    On a GPU it is an asynchronous device assert, which cannot tell them.
    """
    if valid.is_cuda:
        torch._assert_async(valid.all(), sentence)
    elif not valid.all():
        wrong = values[~valid]
        if wrong.dtype != torch.uint64:  # of which torch finds no unique ones
            wrong = wrong.unique()
        wrong = wrong[:5].tolist()
        raise ValueError(f"{sentence}; got {', '.join(_in_full(v, values.dtype) for v in wrong)}")


def _in_full(value, dtype: torch.dtype) -> str:
    """The shortest decimals that are this value in its dtype."""
    if not isinstance(value, float):
        return str(value)
    for digits in range(6, 18):
        text = f"{value:.{digits}g}"
        if value != value or torch.tensor(float(text), dtype=dtype, device="cpu").item() == value:
            break
    return text
