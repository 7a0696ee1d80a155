"""Losses with one value per row of ``(..., C)``: how their kernels walk, reduce and store.

A program takes BLOCK_R consecutive rows in the memory order of the logits or boxes. Labels, weights
and losses of rows are contiguous and indexed by ``row``; everything else is read through strides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._config import LANES_OF_ROW, MAX_STEPS, Config
from ._finish import finish, no_scale, room_for_sums
from ._walk import (
    MAX_DIMS,
    MAX_INNER_SIZE,
    Layout,
    cached,
    cdiv,
    contiguous_strides,
    coordinates,
    merged_dims,
    offset_of,
)


@triton.jit
def locate(start, offs, sizes, row_strides, N_DIMS: tl.constexpr):
    """Coordinates of rows start + offs, and their index.

    A function without pointers: torch.compile would take a pointer that goes in for one that is
    written where an index comes out, and copy what it points to.
    """
    coords = coordinates(start, offs, sizes, N_DIMS)
    return coords, offset_of(coords, row_strides, N_DIMS)


# A row's columns (classes, bins) are a tuple of STEPS tiles [rows, LANES]: lanes are neighbours in
# memory and the threads of a row, each holds its column of every step. What is done once a row is
# done by LANES threads, and a sum over columns is one over steps, within a thread, and then one
# over lanes, log2(LANES) shuffles. As a dim of the tile the steps would be shared out among warps
# by Triton 3.6, and a row of 17 bins would take 32.


@triton.jit
def columns_of(step, LANES: tl.constexpr):
    """Columns of a step, beside rows."""
    return step * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def by_row(v):
    """[rows] beside a tile."""
    return v[:, None]


@triton.jit
def load_columns(
    x_ptr, row_at, first, x_sc, rows, n_columns, WHOLE: tl.constexpr, STEPS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """STEPS tiles of logits from column ``first`` on, float32: -inf beyond the last column, 0 in
    other rows than ``rows``. Steps before WHOLE lie within the columns."""
    tiles = ()
    x_ptr += by_row(row_at)
    for step in tl.static_range(STEPS):
        columns = first + columns_of(step, LANES)
        x_ptrs = x_ptr + columns * tl.cast(x_sc, tl.int64)
        if step < WHOLE:
            x = tl.load(x_ptrs, mask=by_row(rows), other=0).to(tl.float32)
        else:
            inside = columns < n_columns
            x = tl.load(x_ptrs, mask=by_row(rows) & inside, other=0).to(tl.float32)
            x = tl.where(inside, x, float("-inf"))
        # +inf gives NaN, and -inf a masked column: probability 0
        tiles = tiles + (x + 0.0 * tl.maximum(x, 0.0),)
    return tiles


@triton.jit
def store_columns(
    out_ptr, row_at, first, out_sc, rows, n_columns, tiles, WHOLE: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """STEPS tiles to where ``load_columns`` would find them."""
    out_ptr += by_row(row_at)
    for step in tl.static_range(STEPS):
        columns = first + columns_of(step, LANES)
        mask = by_row(rows)
        if step >= WHOLE:
            mask = mask & (columns < n_columns)
        tl.store(out_ptr + columns * tl.cast(out_sc, tl.int64), tiles[step], mask=mask)


@triton.jit
def top_of_columns(tiles, STEPS: tl.constexpr):
    """Maximum of each row, of whose columns not all are -inf."""
    top = tl.maximum(tiles[0], -1e38)
    for step in tl.static_range(1, STEPS):
        top = tl.maximum(top, tiles[step])
    return tl.max(top, 1)


@triton.jit
def load_row_weights(start, offs, n_rows, weight_ptr, row):
    """``(inside, keep, scale)``: which rows exist, which of them count, and their weights."""
    inside = offs < n_rows - start
    keep = inside
    scale = tl.full(offs.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + row, mask=inside, other=0).to(tl.float32)
        keep = keep & (scale > 0)
        scale = tl.where(keep, scale, 0.0)
    return inside, keep, scale


@triton.jit
def store_rows(
    value, row, inside, keep, cell, out_ptr, count_ptr, REDUCED: tl.constexpr
):  # fmt: skip
    """Losses of a block of rows, or in one cell their sum and the number of rows that count."""
    value = tl.where(keep, value, 0.0)
    if REDUCED:
        tl.store(out_ptr + cell, tl.sum(value, 0))
        if count_ptr is not None:
            tl.store(count_ptr + cell, tl.sum(keep.to(tl.int32), 0))
    else:
        tl.store(out_ptr + row, value, mask=inside)


@triton.jit
def upstream(
    grad_ptr, scale_ptr, coords, strides, keep, N_DIMS: tl.constexpr, REDUCED: tl.constexpr
):
    """Upstream gradient of each row, float32."""
    if REDUCED:
        grad = tl.load(grad_ptr).to(tl.float32)
        if scale_ptr is not None:
            grad *= tl.load(scale_ptr)
    else:
        grad_ptrs = grad_ptr + offset_of(coords, strides, N_DIMS)
        grad = tl.load(grad_ptrs, mask=keep, other=0).to(tl.float32)
    return grad


class Rows(NamedTuple):
    """How a kernel walks over the rows of x, in its memory order."""

    layout: Layout  # strides of x, of contiguous rows, then what else is read
    numbers: tuple[int, ...]  # of the layout


def row_layout(x, *others) -> Rows | None:
    """The walk over the rows of ``x`` and of the others, which may be None."""
    strides = tuple([None if t is None else t.stride() for t in others])
    return rows_of(x.shape, x.stride(), strides)


@cached
def rows_of(shape, x_strides, others) -> Rows | None:
    rows = shape[:-1]
    n, none = len(rows), (0,) * len(rows)
    walks = [x_strides[:n], contiguous_strides(rows)]
    walks += [none if s is None else s[:n] for s in others]
    layout = merged_dims(rows, walks)
    return layout and Rows(layout, layout.numbers())


def rows_walkable(x, *others) -> bool:
    """True if a kernel can read ``x`` and the others in place."""
    if x.dim() - 1 <= MAX_DIMS and x.numel() <= MAX_INNER_SIZE:
        return True
    return row_layout(x, *others) is not None


def columns_innermost(x, rows: Rows) -> bool:
    """True if neighbours in memory belong to one row; False for a permuted NCHW head output."""
    row_step = rows.layout.strides[0][-1]
    return row_step == 0 or x.stride(-1) <= row_step


def tile_of_rows(x, rows: Rows, config: Config, columns: int) -> dict:
    """Constants of a launch over tiles of so many columns. Threads follow the memory: along a row
    where its columns are neighbours, else along the rows."""
    lanes = LANES_OF_ROW if columns_innermost(x, rows) else 1
    while lanes * MAX_STEPS < columns:
        lanes *= 2
    steps = cdiv(columns, lanes)
    block = config.block // (steps * lanes)
    return {
        "N_DIMS": rows.layout.n_dims,
        "BLOCK_R": 1 << (block.bit_length() - 1),  # a power of 2
        "STEPS": steps,
        "LANES": lanes,
        "num_warps": config.num_warps,
    }


def n_rows(x) -> int:
    return x.numel() // x.shape[-1]


def forward_rows(x, block, avg_factor, reduction, launch):
    """Run ``launch(out, counts, reduced)`` over the rows of ``x``: ``(loss, scale)`` as in
    ``finish``."""
    if reduction == "none":
        loss = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        launch(loss, None, False)
        return loss, no_scale(x)
    partials, counts = room_for_sums(x, cdiv(n_rows(x), block), avg_factor, reduction)
    launch(partials, counts, True)
    return finish(partials, counts, avg_factor, reduction)


def upstream_of(x, out, grad, scale, reduction, *others):
    """``(grad, scale, reduced)``: the upstream gradient as a kernel takes it."""
    if reduction != "none":
        return grad, scale, True
    if not any(grad.stride()):
        return grad, None, True  # an expanded scalar, as .sum() sends back
    if not rows_walkable(x, out, grad, *others):
        grad = grad.contiguous()
    return grad, None, False
