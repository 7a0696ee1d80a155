"""Softmax focal loss over any number of classes: two passes over the logits, none kept.

With ``d = x_label - logsumexp(other logits)`` the softmax probability of the label is sigmoid(d):
the loss is a binary focal loss of d, and the others' gradients share its slope in proportion to
their softmax among themselves. Nothing cancels, however sure the prediction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonloss._op import launcher, wrap_triton

from ._config import SOFTMAX, SOFTMAX_BY_ROW
from ._finish import at, over_levels
from ._formulas import hard_derivative, hard_value
from ._numbers import number, scalar_args
from ._rows import (
    by_row,
    columns_innermost,
    columns_of,
    forward_rows,
    load_columns,
    load_row_weights,
    locate,
    n_rows,
    row_layout,
    rows_walkable,
    store_columns,
    store_rows,
    tile_of_rows,
    top_of_columns,
    upstream,
    upstream_of,
)
from ._walk import cdiv, offset_of


@triton.jit
def _labels(label_ptr, row, inside, keep, n_classes, ignore_index):
    label = tl.load(label_ptr + row, mask=inside, other=-1).to(tl.int64)
    keep = keep & (label >= 0) & (label < n_classes) & (label != ignore_index)
    return label.to(tl.int32), keep


@triton.jit
def _alpha(alpha_ptr, label, keep):
    alpha = tl.full(label.shape, 1.0, tl.float32)
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + label, mask=keep, other=0).to(tl.float32)
    return alpha


@triton.jit(do_not_specialize=["cell"])
def softmax_focal_kernel(
    # pointers
    x_ptr,  # logits
    label_ptr,  # [rows] integers
    alpha_ptr,  # [classes], or None
    weight_ptr,  # [rows], or None
    params_ptr,  # [1] gamma, or None
    grad_ptr,  # upstream gradient: [] or per row
    scale_ptr,  # [] float32, 1 / divisor, or None
    stats_ptr,  # [3, rows] in memory order: maximum and sum of exp of the others, and d
    out_ptr,  # forward: [rows], or [programs] partial sums; backward: gradient of the logits
    count_ptr,  # [programs] int32, or None
    # shapes
    cell,  # of the first program's sum
    n,
    n_classes,
    size_1,
    size_2,
    size_3,
    # strides
    x_s0,
    x_s1,
    x_s2,
    x_s3,
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    out_s0,
    out_s1,
    out_s2,
    out_s3,
    grad_s0,
    grad_s1,
    grad_s2,
    grad_s3,
    x_sc,
    out_sc,
    # scalars
    ignore_index,
    gamma,
    # constants
    BACKWARD: tl.constexpr,
    REDUCED: tl.constexpr,
    N_DIMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WHOLE: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """1-D grid over blocks of rows. Forward: an online softmax walks over tiles of classes;
    backward: one read and one write of the logits."""
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK_R
    offs = tl.arange(0, BLOCK_R)
    gamma = number(params_ptr, 0, gamma)
    sizes = (1, size_1, size_2, size_3)
    coords, row = locate(start, offs, sizes, (row_s0, row_s1, row_s2, row_s3), N_DIMS)
    inside, keep, scale = load_row_weights(start, offs, n, weight_ptr, row)
    label, keep = _labels(label_ptr, row, inside, keep, n_classes, ignore_index)
    stats_ptrs = stats_ptr + start + offs
    x_at = offset_of(coords, (x_s0, x_s1, x_s2, x_s3), N_DIMS)
    first = tl.cast(0, tl.int32)
    if BACKWARD:
        top = tl.load(stats_ptrs, mask=keep, other=0.0)
        total = tl.load(stats_ptrs + n, mask=keep, other=1.0)
        total = tl.where(total == 0.0, 1.0, total)
        d = tl.load(stats_ptrs + 2 * tl.cast(n, tl.int64), mask=keep, other=0.0)
        grad_strides = (grad_s0, grad_s1, grad_s2, grad_s3)
        grad = upstream(grad_ptr, scale_ptr, coords, grad_strides, keep, N_DIMS, REDUCED)
        slope = hard_derivative(d, keep, 1.0, 1.0, gamma, 0.0, "focal", False)
        slope *= _alpha(alpha_ptr, label, keep)
        slope = tl.where(keep, slope * (grad * scale), 0.0)

        out_at = offset_of(coords, (out_s0, out_s1, out_s2, out_s3), N_DIMS)
        others = -slope / total  # of exp(x - top)
        while first < n_classes:
            x = load_columns(x_ptr, x_at, first, x_sc, inside, n_classes, WHOLE, STEPS, LANES)
            result = ()
            for step in tl.static_range(STEPS):
                e = tl.exp(tl.minimum(x[step] - by_row(top), 0.0))
                here = first + columns_of(step, LANES) == by_row(label)
                g = tl.where(here, by_row(slope), e * by_row(others))
                result = result + (tl.where(by_row(keep), g, 0.0),)
            store_columns(
                out_ptr, out_at, first, out_sc, inside, n_classes, result, WHOLE, STEPS, LANES
            )
            first += STEPS * LANES
    else:
        top = tl.full([BLOCK_R], -1e38, tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        x_label = tl.zeros([BLOCK_R], tl.float32)
        while first < n_classes:
            # in rows not kept, too: the logits need not wait for the labels
            x = load_columns(x_ptr, x_at, first, x_sc, inside, n_classes, WHOLE, STEPS, LANES)
            own = tl.zeros([BLOCK_R, LANES], tl.float32)
            others = ()
            for step in tl.static_range(STEPS):
                here = first + columns_of(step, LANES) == by_row(label)
                own += tl.where(here, x[step], 0.0)
                others = others + (tl.where(here, float("-inf"), x[step]),)
            x_label += tl.sum(own, 1)
            new_top = tl.maximum(top, top_of_columns(others, STEPS))
            below = tl.zeros([BLOCK_R, LANES], tl.float32)
            for step in tl.static_range(STEPS):
                below += tl.exp(others[step] - by_row(new_top))
            total = total * tl.exp(top - new_top) + tl.sum(below, 1)
            top = new_top
            first += STEPS * LANES
        x_label += 0.0 * x_label  # a masked label gives NaN
        # one class alone: d is huge, the loss exactly 0
        d = (x_label - top) - tl.log(tl.where(total == 0.0, 1.0, total))
        value = hard_value(d, keep, 1.0, 1.0, gamma, 0.0, "focal", False)
        value *= _alpha(alpha_ptr, label, keep) * scale
        store_rows(value, row, inside, keep, cell + pid, out_ptr, count_ptr, REDUCED)
        tl.store(stats_ptrs, top, mask=inside)
        tl.store(stats_ptrs + n, total, mask=inside)
        tl.store(stats_ptrs + 2 * tl.cast(n, tl.int64), d, mask=inside)


def _tile(x, rows) -> dict:
    """With WHOLE: steps of which none has a column beyond the last."""
    classes = x.shape[-1]
    config, most = SOFTMAX if columns_innermost(x, rows) else SOFTMAX_BY_ROW
    tiles = cdiv(classes, most)
    tile = tile_of_rows(x, rows, config, cdiv(classes, tiles))
    whole = tile["STEPS"] if classes % (tile["STEPS"] * tile["LANES"]) == 0 else 0
    return tile | {"WHOLE": classes // tile["LANES"] if tiles == 1 else whole}


def _launch(
    x, labels, weight, alpha, params, ignore_index, stats, rows, tile, out, count=None, grad=None,
    scale=None, *, backward, reduced, cell=0,
):  # fmt: skip
    """Loss or gradient of one tensor of logits; a sum and a count of each program if reduced."""
    pointer, (gamma,) = scalar_args(params, 1)
    wrap_triton(softmax_focal_kernel, x)[(cdiv(n_rows(x), tile["BLOCK_R"]),)](
        x,
        labels,
        alpha,
        weight,
        pointer,
        grad,
        scale,
        stats,
        out,
        count,
        cell,
        n_rows(x),
        x.shape[-1],
        *rows.numbers,
        x.stride(-1),
        out.stride(-1) if backward else 0,
        ignore_index,
        gamma,
        BACKWARD=backward,
        REDUCED=reduced,
        **tile,
    )


def takes(x, *args) -> bool:
    """True if the kernels can read the logits in place."""
    return rows_walkable(x)


def _prepared(x) -> tuple:
    """Room for the statistics of each row, the walk and the tile of a forward."""
    rows = row_layout(x, None, None)
    stats = torch.empty((3, n_rows(x)), dtype=torch.float32, device=x.device)
    return stats, rows, _tile(x, rows)


@launcher
def forward(
    x: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of all rows, and what the backward needs.

    Args:
        x: logits (..., C), any strides.
        labels: contiguous (...).
        weight: contiguous (...), or None.
        alpha: contiguous (C,), or None.
        avg_factor, params: numbers or float tensors of 1 entry; params holds gamma.

    Returns:
        ``(loss, scale, stats)``, float32; stats has shape (3, rows).
    """
    stats, rows, tile = _prepared(x)
    args = (x, labels, weight, alpha, params, ignore_index, stats, rows, tile)

    def launch(out, count, reduced):
        _launch(*args, out, count, backward=False, reduced=reduced)

    return *forward_rows(x, tile["BLOCK_R"], avg_factor, reduction, launch), stats


@launcher
def forward_levels(
    x: list[Tensor],
    labels: list[Tensor],
    weight: list[Tensor],
    alpha: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The sum or mean of ``forward`` over levels; a list may be empty where that has None."""
    stats, walks, tiles = zip(*map(_prepared, x), strict=True)

    def launch(k, cell, out, count):
        args = (x[k], labels[k], at(weight, k), alpha, params, ignore_index, stats[k], walks[k])
        _launch(*args, tiles[k], out, count, backward=False, reduced=True, cell=cell)

    def programs(k):
        return cdiv(n_rows(x[k]), tiles[k]["BLOCK_R"])

    return *over_levels(x, programs, avg_factor, reduction, launch), list(stats)


@launcher
def backward(
    grad: Tensor,
    scale: Tensor,
    stats: Tensor,
    x: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Gradient of the logits: their dtype, and their strides if they are dense in memory."""
    out = torch.empty_like(x)
    grad, scale, reduced = upstream_of(x, out, grad, scale, reduction)
    rows = row_layout(x, out, None if reduced else grad)
    args = (x, labels, weight, alpha, params, ignore_index, stats, rows, _tile(x, rows), out)
    _launch(*args, None, grad, scale, backward=True, reduced=reduced)
    return out
