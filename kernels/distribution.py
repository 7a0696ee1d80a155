"""Distribution focal loss, distillation, expectation: each program holds whole rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonloss._op import launcher, wrap_triton

from ._config import DISTRIBUTION
from ._finish import at, over_levels
from ._formulas import log1p_unit
from ._numbers import number, scalar_args
from ._rows import (
    by_row,
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

MAX_BINS = 1024  # a program holds whole rows


@triton.jit
def load_bins(
    x_ptr, coords, strides, x_sc, keep, n_bins: tl.constexpr, N_DIMS: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Logits of the kept rows, see ``load_columns``."""
    row_at = offset_of(coords, strides, N_DIMS)
    first = tl.cast(0, tl.int32)
    return load_columns(x_ptr, row_at, first, x_sc, keep, n_bins, n_bins // LANES, STEPS, LANES)


@triton.jit
def store_bins(
    out_ptr, coords, strides, out_sc, inside, n_bins: tl.constexpr, tiles, N_DIMS: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row_at = offset_of(coords, strides, N_DIMS)
    first = tl.cast(0, tl.int32)
    store_columns(
        out_ptr, row_at, first, out_sc, inside, n_bins, tiles, n_bins // LANES, STEPS, LANES
    )


@triton.jit
def exp_below(tiles, top, STEPS: tl.constexpr):
    """``exp(x - top)`` of each column, and their sum in each row."""
    result = ()
    total = tl.zeros(tiles[0].shape, tl.float32)
    for step in tl.static_range(STEPS):
        e = tl.exp(tiles[step] - by_row(top))
        total += e
        result = result + (e,)
    return result, tl.sum(total, 1)


@triton.jit
def load_target(target_ptr, coords, strides, keep, n_bins, N_DIMS: tl.constexpr):
    """The targets of rows, clamped to 0..n; NaN stays NaN."""
    target_ptrs = target_ptr + offset_of(coords, strides, N_DIMS)
    y = tl.load(target_ptrs, mask=keep, other=0).to(tl.float32)
    last = tl.cast(n_bins - 1, tl.float32)  # .to() fails where torch.compile makes it a constant
    return tl.where(y < 0.0, 0.0, tl.where(y > last, last, y))


@triton.jit
def target_of(x, y, step, LANES: tl.constexpr):
    """Weight of each bin of a step: a hat of width 1 around y; of a masked bin NaN."""
    hat = 1.0 - tl.abs(columns_of(step, LANES).to(tl.float32) - by_row(y))
    return tl.where(hat <= 0.0, 0.0, hat + 0.0 * x)


@triton.jit(do_not_specialize=["cell"])
def distribution_focal_kernel(
    # pointers
    x_ptr,  # logits
    target_ptr,  # real targets, per row
    weight_ptr,  # [rows], or None
    grad_ptr,  # upstream gradient: [] or per row
    scale_ptr,  # [] float32, 1 / divisor, or None
    out_ptr,  # forward: [rows], or [programs] partial sums; backward: gradient of the logits
    count_ptr,  # [programs] int32, or None
    # shapes
    cell,  # of the first program's sum
    n,
    n_bins: tl.constexpr,  # few values, and what lies beyond the last bin drops out
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
    target_s0,
    target_s1,
    target_s2,
    target_s3,
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
    # constants
    BACKWARD: tl.constexpr,
    REDUCED: tl.constexpr,
    N_DIMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """1-D grid over blocks of rows."""
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK_R
    offs = tl.arange(0, BLOCK_R)
    sizes = (1, size_1, size_2, size_3)
    x_strides = (x_s0, x_s1, x_s2, x_s3)
    target_strides = (target_s0, target_s1, target_s2, target_s3)
    coords, row = locate(start, offs, sizes, (row_s0, row_s1, row_s2, row_s3), N_DIMS)
    inside, keep, scale = load_row_weights(start, offs, n, weight_ptr, row)
    x = load_bins(x_ptr, coords, x_strides, x_sc, keep, n_bins, N_DIMS, STEPS, LANES)
    y = load_target(target_ptr, coords, target_strides, keep, n_bins, N_DIMS)
    top = top_of_columns(x, STEPS)
    if BACKWARD:
        grad_strides = (grad_s0, grad_s1, grad_s2, grad_s3)
        grad = upstream(grad_ptr, scale_ptr, coords, grad_strides, keep, N_DIMS, REDUCED) * scale
        e, total = exp_below(x, top, STEPS)
        share = by_row(1.0 / total)
        result = ()
        for step in tl.static_range(STEPS):
            g = (e[step] * share - target_of(x[step], y, step, LANES)) * by_row(grad)
            result = result + (tl.where(by_row(keep), g, 0.0),)
        out_strides = (out_s0, out_s1, out_s2, out_s3)
        store_bins(
            out_ptr, coords, out_strides, out_sc, inside, n_bins, result, N_DIMS, STEPS, LANES
        )
    else:
        value = tl.zeros([BLOCK_R, LANES], tl.float32)
        rest = tl.zeros([BLOCK_R, LANES], tl.float32)
        at_top = tl.zeros([BLOCK_R, LANES], tl.int32)
        for step in tl.static_range(STEPS):
            below = by_row(top) - x[step]
            # total - 1 without cancellation: the bins at the maximum are exactly 1 each
            at_top += (below == 0.0).to(tl.int32)
            rest += tl.where(below == 0.0, 0.0, tl.exp(-below))
            hat = target_of(x[step], y, step, LANES)
            value += tl.where(hat == 0.0, 0.0, hat * below)
        rest = tl.sum(rest, 1) + (tl.sum(at_top, 1) - 1).to(tl.float32)
        log_total = tl.where(rest < 1.0, log1p_unit(rest), tl.log(1.0 + rest))
        value = tl.sum(value, 1) + log_total
        store_rows(value * scale, row, inside, keep, cell + pid, out_ptr, count_ptr, REDUCED)


@triton.jit
def tempered_softmax(
    x_ptr, coords, strides, x_sc, keep, n_bins: tl.constexpr, temperature, N_DIMS: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Softmax of the logits over the temperature, and its logarithm."""
    x = load_bins(x_ptr, coords, strides, x_sc, keep, n_bins, N_DIMS, STEPS, LANES)
    cooler = ()
    for step in tl.static_range(STEPS):
        cooler = cooler + (x[step] / temperature,)
    top = top_of_columns(cooler, STEPS)
    e, total = exp_below(cooler, top, STEPS)
    share, log_total = by_row(1.0 / total), by_row(tl.log(total))
    p = ()
    log_p = ()
    for step in tl.static_range(STEPS):
        p = p + (e[step] * share,)
        log_p = log_p + ((cooler[step] - by_row(top)) - log_total,)
    return p, log_p


@triton.jit(do_not_specialize=["cell"])
def distillation_kernel(
    # pointers
    x_ptr,  # logits
    teacher_ptr,  # the teacher's, alike
    weight_ptr,  # [rows], or None
    params_ptr,  # [1] temperature, or None
    grad_ptr,  # upstream gradient: [] or per row
    scale_ptr,  # [] float32, 1 / divisor, or None
    out_ptr,  # forward: [rows], or [programs] partial sums; backward: gradient of the logits
    count_ptr,  # [programs] int32, or None
    # shapes
    cell,  # of the first program's sum
    n,
    n_bins: tl.constexpr,  # few values, and what lies beyond the last bin drops out
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
    teacher_s0,
    teacher_s1,
    teacher_s2,
    teacher_s3,
    out_s0,
    out_s1,
    out_s2,
    out_s3,
    grad_s0,
    grad_s1,
    grad_s2,
    grad_s3,
    x_sc,
    teacher_sc,
    out_sc,
    # scalars
    temperature,
    # constants
    BACKWARD: tl.constexpr,
    REDUCED: tl.constexpr,
    N_DIMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """1-D grid over blocks of rows."""
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK_R
    offs = tl.arange(0, BLOCK_R)
    temperature = number(params_ptr, 0, temperature)
    sizes = (1, size_1, size_2, size_3)
    x_strides = (x_s0, x_s1, x_s2, x_s3)
    teacher_strides = (teacher_s0, teacher_s1, teacher_s2, teacher_s3)
    coords, row = locate(start, offs, sizes, (row_s0, row_s1, row_s2, row_s3), N_DIMS)
    inside, keep, scale = load_row_weights(start, offs, n, weight_ptr, row)
    p, log_p = tempered_softmax(
        x_ptr, coords, x_strides, x_sc, keep, n_bins, temperature, N_DIMS, STEPS, LANES
    )
    q, log_q = tempered_softmax(
        teacher_ptr, coords, teacher_strides, teacher_sc, keep, n_bins, temperature, N_DIMS, STEPS,
        LANES,
    )  # fmt: skip
    # what the student alone excludes gives NaN
    poison = tl.zeros([BLOCK_R, LANES], tl.float32)
    for step in tl.static_range(STEPS):
        poison += tl.where(q[step] == 0.0, 0.0, 0.0 * log_p[step])
    poison = tl.sum(poison, 1)
    if BACKWARD:
        grad_strides = (grad_s0, grad_s1, grad_s2, grad_s3)
        grad = upstream(grad_ptr, scale_ptr, coords, grad_strides, keep, N_DIMS, REDUCED)
        grad = by_row(temperature * grad * scale + poison)
        result = ()
        for step in tl.static_range(STEPS):
            result = result + (tl.where(by_row(keep), (p[step] - q[step]) * grad, 0.0),)
        out_strides = (out_s0, out_s1, out_s2, out_s3)
        store_bins(
            out_ptr, coords, out_strides, out_sc, inside, n_bins, result, N_DIMS, STEPS, LANES
        )
    else:
        value = tl.zeros([BLOCK_R, LANES], tl.float32)
        for step in tl.static_range(STEPS):
            value += tl.where(q[step] == 0.0, 0.0, q[step] * (log_q[step] - log_p[step]))
        value = (poison + tl.sum(value, 1)) * temperature * temperature
        store_rows(value * scale, row, inside, keep, cell + pid, out_ptr, count_ptr, REDUCED)


@triton.jit
def expectation_kernel(
    # pointers
    x_ptr,  # logits
    grad_ptr,  # [rows] upstream gradient, any strides; None in the forward
    out_ptr,  # forward: [rows]; backward: gradient of the logits
    # shapes
    n,
    n_bins: tl.constexpr,  # few values, and what lies beyond the last bin drops out
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
    # constants
    N_DIMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """1-D grid over blocks of rows; forward and backward of the mean bin."""
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK_R
    offs = tl.arange(0, BLOCK_R)
    coords, row = locate(
        start, offs, (1, size_1, size_2, size_3), (row_s0, row_s1, row_s2, row_s3), N_DIMS
    )
    inside, keep, _ = load_row_weights(start, offs, n, None, row)
    x_strides = (x_s0, x_s1, x_s2, x_s3)
    x = load_bins(x_ptr, coords, x_strides, x_sc, keep, n_bins, N_DIMS, STEPS, LANES)
    e, total = exp_below(x, top_of_columns(x, STEPS), STEPS)
    mean = tl.zeros([BLOCK_R, LANES], tl.float32)
    for step in tl.static_range(STEPS):
        k = columns_of(step, LANES).to(tl.float32)
        # The where keeps the product out of the sum: fused with it, a sum over two lanes has other
        # last bits in the one than in the other, and both store it.
        mean += tl.where(k < n_bins, e[step] * k, 0.0)
    share = 1.0 / total
    mean = tl.sum(mean, 1) * share
    if grad_ptr is None:
        tl.store(out_ptr + row, mean, mask=inside)
    else:
        grad_strides = (grad_s0, grad_s1, grad_s2, grad_s3)
        grad = upstream(grad_ptr, None, coords, grad_strides, keep, N_DIMS, False)
        result = ()
        for step in tl.static_range(STEPS):
            k = columns_of(step, LANES).to(tl.float32)
            result = result + (e[step] * by_row(share * grad) * (k - by_row(mean)),)
        out_strides = (out_s0, out_s1, out_s2, out_s3)
        store_bins(
            out_ptr, coords, out_strides, out_sc, inside, n_bins, result, N_DIMS, STEPS, LANES
        )


def takes(x, target=None, *args) -> bool:
    """True if the kernels can read the operands in place and a row fits in a tile."""
    others = () if target is None else (target,)
    return x.shape[-1] <= MAX_BINS and rows_walkable(x, *others)


def _tile(x, rows) -> dict:
    return tile_of_rows(x, rows, DISTRIBUTION, x.shape[-1])


def _launch(
    x, target, weight, rows, tile, out, count=None, grad=None, scale=None, *, backward, reduced,
    cell=0,
):  # fmt: skip
    """Loss or gradient of one tensor of logits; a sum and a count of each program if reduced."""
    wrap_triton(distribution_focal_kernel, x)[(cdiv(n_rows(x), tile["BLOCK_R"]),)](
        x, target, weight, grad, scale, out, count, cell, n_rows(x), x.shape[-1],
        *rows.numbers, x.stride(-1), out.stride(-1) if backward else 0, BACKWARD=backward,
        REDUCED=reduced, **tile,
    )  # fmt: skip


def _over_levels(launch, x, other, weight, params, avg_factor, reduction):
    """The sum or mean over levels of what ``launch`` computes of each; see ``forward_levels``."""
    walks = [row_layout(level, y, None, None) for level, y in zip(x, other, strict=True)]
    tiles = [_tile(*level) for level in zip(x, walks, strict=True)]

    def launch_level(k, cell, out, count):
        args = (x[k], other[k], at(weight, k), *params, walks[k], tiles[k], out, count)
        launch(*args, backward=False, reduced=True, cell=cell)

    def programs(k):
        return cdiv(n_rows(x[k]), tiles[k]["BLOCK_R"])

    return over_levels(x, programs, avg_factor, reduction, launch_level)


@launcher
def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, avg_factor: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """Loss of all rows, and the factor that the backward needs.

    Args:
        x: logits (..., bins), any strides.
        target: (...), any strides.
        weight: contiguous (...), or None.
        avg_factor: a number or a tensor of 1 entry.

    Returns:
        ``(loss, scale)``, float32.
    """
    rows = row_layout(x, target, None, None)
    tile = _tile(x, rows)

    def launch(out, count, reduced):
        _launch(x, target, weight, rows, tile, out, count, backward=False, reduced=reduced)

    return forward_rows(x, tile["BLOCK_R"], avg_factor, reduction, launch)


@launcher
def forward_levels(
    x: list[Tensor],
    target: list[Tensor],
    weight: list[Tensor],
    avg_factor: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The sum or mean of ``forward`` over levels; a list may be empty where that has None."""
    return _over_levels(_launch, x, target, weight, (), avg_factor, reduction)


@launcher
def backward(
    grad: Tensor,
    scale: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    reduction: str,
) -> Tensor:
    """Gradient of the logits: their dtype, and their strides if they are dense in memory."""
    out = torch.empty_like(x)
    grad, scale, reduced = upstream_of(x, out, grad, scale, reduction, target)
    rows = row_layout(x, target, out, None if reduced else grad)
    args = (x, target, weight, rows, _tile(x, rows), out)
    _launch(*args, None, grad, scale, backward=True, reduced=reduced)
    return out


def _launch_distillation(
    x, teacher, weight, params, rows, tile, out, count=None, grad=None, scale=None, *, backward,
    reduced, cell=0,
):  # fmt: skip
    pointer, (temperature,) = scalar_args(params, 1)
    wrap_triton(distillation_kernel, x)[(cdiv(n_rows(x), tile["BLOCK_R"]),)](
        x, teacher, weight, pointer, grad, scale, out, count, cell, n_rows(x), x.shape[-1],
        *rows.numbers, x.stride(-1), teacher.stride(-1), out.stride(-1) if backward else 0,
        temperature, BACKWARD=backward, REDUCED=reduced, **tile,
    )  # fmt: skip


@launcher
def distillation(
    x: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Divergence of all rows from the teacher's, and the factor that the backward needs.

    Args:
        x, teacher: logits (..., bins), any strides.
        weight: contiguous (...), or None.
        avg_factor, params: numbers or float tensors of 1 entry; params holds the temperature.

    Returns:
        ``(loss, scale)``, float32.
    """
    rows = row_layout(x, teacher, None, None)
    args = (x, teacher, weight, params, rows, _tile(x, rows))

    def launch(out, count, reduced):
        _launch_distillation(*args, out, count, backward=False, reduced=reduced)

    return forward_rows(x, args[-1]["BLOCK_R"], avg_factor, reduction, launch)


@launcher
def distillation_levels(
    x: list[Tensor],
    teacher: list[Tensor],
    weight: list[Tensor],
    avg_factor: Tensor | None,
    params: Tensor,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The sum or mean of ``distillation`` over levels; see ``forward_levels``."""
    args = (x, teacher, weight, (params,), avg_factor, reduction)
    return _over_levels(_launch_distillation, *args)


@launcher
def distillation_backward(
    grad: Tensor,
    scale: Tensor,
    x: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    reduction: str,
) -> Tensor:
    """Gradient of the logits: their dtype, and their strides if they are dense in memory."""
    out = torch.empty_like(x)
    grad, scale, reduced = upstream_of(x, out, grad, scale, reduction, teacher)
    rows = row_layout(x, teacher, out, None if reduced else grad)
    args = (x, teacher, weight, params, rows, _tile(x, rows), out)
    _launch_distillation(*args, None, grad, scale, backward=True, reduced=reduced)
    return out


def _launch_expectation(x, out, grad=None):
    rows = row_layout(x, None if grad is None else out, grad)
    tile = _tile(x, rows)
    wrap_triton(expectation_kernel, x)[(cdiv(n_rows(x), tile["BLOCK_R"]),)](
        x, grad, out, n_rows(x), x.shape[-1], *rows.numbers, x.stride(-1),
        0 if grad is None else out.stride(-1), **tile,
    )  # fmt: skip


@launcher
def expectation(x: Tensor) -> Tensor:
    """Mean bin, float32: (..., bins) with any strides -> (...) contiguous."""
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch_expectation(x, mean)
    return mean


@launcher
def expectation_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the logits: their dtype, and their strides if they are dense in memory."""
    out = torch.empty_like(x)
    _launch_expectation(x, out, grad if rows_walkable(x, out, grad) else grad.contiguous())
    return out
