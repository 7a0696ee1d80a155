"""How a kernel walks over tensors of any strides without copying them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

MAX_DIMS = 4
MAX_INNER_SIZE = 2**31 - 2**16  # inner coordinates are 32-bit inside the kernels


class Layout(NamedTuple):
    """Index space shared by several operands, in the memory order of the first.

    ``sizes`` and each tuple of ``strides`` have MAX_DIMS entries, outermost first, padded in front.
    """

    n_dims: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


def cached(function):
    """Remember what was worked out for sizes and strides: they repeat in every step."""
    remembered = lru_cache(maxsize=4096)(function)

    def look_up(shape, operands):
        shape, operands = tuple(shape), tuple(map(tuple, operands))
        try:
            return remembered(shape, operands)
        except TypeError:  # a graph's symbolic sizes have no hash
            return function(shape, operands)

    look_up.__doc__ = function.__doc__
    return look_up


@cached
def merged_dims(shape, operands) -> Layout | None:
    """Drop dims of size 1 and merge neighbours that every operand walks with one stride.

    Args:
        shape: logical shape.
        operands: one tuple of strides per operand; the first decides the order of the walk.

    Returns:
        None if more than MAX_DIMS dims are left or an inner one is too large for the kernels.
    """
    dims = [d for d in range(len(shape)) if shape[d] != 1]
    dims.sort(key=lambda d: operands[0][d], reverse=True)
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for d in dims:
        if sizes and all(
            s[-1] == op[d] * shape[d] for s, op in zip(strides, operands, strict=True)
        ):
            sizes[-1] = sizes[-1] * shape[d]
            for s, op in zip(strides, operands, strict=True):
                s[-1] = op[d]
        else:
            sizes.append(shape[d])
            for s, op in zip(strides, operands, strict=True):
                s.append(op[d])
    n_dims = max(len(sizes), 1)
    if n_dims > MAX_DIMS or any(size > MAX_INNER_SIZE for size in sizes[1:]):
        return None
    pad = MAX_DIMS - len(sizes)
    return Layout(
        n_dims,
        (1,) * pad + tuple(sizes),
        tuple((0,) * pad + tuple(s) for s in strides),
    )


def contiguous_strides(shape) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))


@cached
def same_memory_order(shape, operands) -> bool:
    """True if all operands lie in one dense block of memory in the same order."""
    layout = merged_dims(shape, operands[:1])
    if layout is None or layout.n_dims > 1 or layout.strides[0][-1] not in (0, 1):
        return False
    dims = [d for d in range(len(shape)) if shape[d] != 1]
    return all(op[d] == operands[0][d] for op in operands[1:] for d in dims)
