"""How a kernel walks over tensors of any strides without copying them.

On the host, the dims that all operands share become a Layout; in the kernel, an element's place in
the walk becomes coordinates and offsets.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import triton
import triton.language as tl

MAX_DIMS = 4
MAX_INNER_SIZE = 2**31 - 2**16  # inner coordinates are 32-bit inside the kernels


class Layout(NamedTuple):
    """Index space shared by several operands, in the memory order of the first.

    ``sizes`` and each tuple of ``strides`` have MAX_DIMS entries, outermost first, padded in front.
    """

    n_dims: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def numbers(self, *operands: int) -> tuple[int, ...]:
        """What a kernel takes: inner sizes and the strides of these operands, or of all."""
        strides = [self.strides[k] for k in operands] if operands else self.strides
        return *self.sizes[1:], *itertools.chain(*strides)


class Walk(NamedTuple):
    """What a kernel takes of a layout."""

    numbers: tuple[int, ...]  # see ``Layout.numbers``
    constants: dict  # what is known when it is compiled, by name


def cached(function):
    """Remember what was worked out for sizes and strides: they repeat in every step."""
    remembered = functools.lru_cache(maxsize=4096)(function)

    @functools.wraps(function)
    def look_up(*args):
        try:
            return remembered(*args)
        except TypeError:  # a graph's symbolic sizes have no hash
            return function(*args)

    return look_up


def cdiv(a, b):
    """Programs that take b of a each. Triton's function of this name costs the host as much as an
    allocation."""
    return -(-a // b)


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


def same_memory_order(shape, operands) -> bool:
    """True if all operands lie in one dense block of memory in the same order."""
    layout = merged_dims(shape, operands[:1])
    if layout is None or layout.n_dims > 1:
        return False
    if layout.strides[0][-1] != 1 and layout.sizes[-1] != 1:  # a broadcast operand has steps of 0
        return False
    dims = [d for d in range(len(shape)) if shape[d] != 1]
    return all(op[d] == operands[0][d] for op in operands[1:] for d in dims)


@triton.jit
def tile_of(BLOCK: tl.constexpr, RUN: tl.constexpr):
    """Offsets of the runs of a tile, [runs, 1], and within one, [1, RUN]; or [BLOCK], 0."""
    if RUN == 1:
        run = tl.arange(0, BLOCK)
        within = 0
    else:
        run = (tl.arange(0, BLOCK // RUN) * RUN)[:, None]
        within = tl.arange(0, RUN)[None, :]
    return run, within


@triton.jit
def coordinates(start, offs, sizes, N_DIMS: tl.constexpr, within=0):
    """Coordinates of elements start + offs: 64-bit division once a program, 32-bit per element.

    ``within``, offsets that do not leave the innermost dim, costs no division: ``offs`` of shape
    [runs, 1] and ``within`` of [1, elements] divide once a run.
    """
    c0 = tl.zeros(offs.shape, tl.int64)
    c1 = c0
    c2 = c0
    if N_DIMS == 1:
        c3 = start + offs
    else:
        outer = start // sizes[3]
        inner = (start - outer * sizes[3]).to(tl.int32) + offs
        carry = inner // sizes[3]
        c3 = inner - carry * sizes[3]
        if N_DIMS == 2:
            c2 = outer + carry
        else:
            rest = outer // sizes[2]
            inner = (outer - rest * sizes[2]).to(tl.int32) + carry
            carry = inner // sizes[2]
            c2 = inner - carry * sizes[2]
            if N_DIMS == 3:
                c1 = rest + carry
            else:
                outest = rest // sizes[1]
                inner = (rest - outest * sizes[1]).to(tl.int32) + carry
                carry = inner // sizes[1]
                c1 = inner - carry * sizes[1]
                c0 = outest + carry
    return c0, c1, c2, c3 + within


@triton.jit
def offset_of(coords, strides, N_DIMS: tl.constexpr):
    """64-bit offset of coordinates under strides."""
    offset = coords[3] * tl.cast(strides[3], tl.int64)
    if N_DIMS > 1:
        offset += coords[2] * tl.cast(strides[2], tl.int64)
    if N_DIMS > 2:
        offset += coords[1] * tl.cast(strides[1], tl.int64)
    if N_DIMS > 3:
        offset += coords[0] * tl.cast(strides[0], tl.int64)
    return offset


@triton.jit
def load_or_zero(ptr, MASKED: tl.constexpr, mask):
    """A load that the compiler proves to be 16 bytes wide where nothing is masked."""
    if MASKED:
        value = tl.load(ptr, mask=mask, other=0)
    else:
        value = tl.load(ptr)
    return value
