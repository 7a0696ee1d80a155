"""Distribution focal loss, distillation, expectation: each program holds whole rows in one tile."""

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
    load_rows,
    locate,
    n_rows,
    over_columns,
    row_layout,
    rows_walkable,
    store_rows,
    tile_of_rows,
    top_of_columns,
    upstream,
    upstream_of,
)
from ._walk import offset_of

MAX_BINS = 1024  # a row is one tile


@triton.jit
def load_bins(x_ptr, coords, bins, strides, x_sc, keep, n_bins, N_DIMS: tl.constexpr):
    """A tile of logits, their largest, and ``exp(x - top)``; x is 0 in rows not kept."""
    x_ptrs = x_ptr + by_row(offset_of(coords, strides, N_DIMS)) + bins * tl.cast(x_sc, tl.int64)
    x = tl.load(x_ptrs, mask=by_row(keep) & (bins < n_bins), other=0).to(tl.float32)
    x += 0.0 * tl.maximum(x, 0.0)  # +inf gives NaN, and -inf a masked bin: probability 0
    top = by_row(top_of_columns(tl.where(bins < n_bins, x, -1e38)))
    return x, top, tl.where(bins < n_bins, tl.exp(x - top), 0.0)


@triton.jit
def load_target(target_ptr, coords, strides, bins, keep, n_bins, N_DIMS: tl.constexpr):
    """Weight of each bin: a hat of width 1 around the target, clamped to 0..n; NaN stays NaN."""
    target_ptrs = target_ptr + offset_of(coords, strides, N_DIMS)
    y = tl.load(target_ptrs, mask=keep, other=0).to(tl.float32)
    last = tl.cast(n_bins - 1, tl.float32)  # .to() fails where torch.compile makes it a constant
    y = tl.where(y < 0.0, 0.0, tl.where(y > last, last, y))
    hat = 1.0 - tl.abs(bins.to(tl.float32) - by_row(y))
    return tl.where((hat <= 0.0) | (bins >= n_bins), 0.0, hat)


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
    inside, keep, scale = load_rows(start, offs, n, weight_ptr, row)
    bins = columns_of(STEPS, LANES)
    x, top, e = load_bins(x_ptr, coords, bins, x_strides, x_sc, keep, n_bins, N_DIMS)
    hat = load_target(target_ptr, coords, target_strides, bins, keep, n_bins, N_DIMS)
    hat += tl.where(hat == 0.0, 0.0, 0.0 * x)  # a masked target gives NaN
    if BACKWARD:
        grad_strides = (grad_s0, grad_s1, grad_s2, grad_s3)
        grad = upstream(grad_ptr, scale_ptr, coords, grad_strides, keep, N_DIMS, REDUCED)
        result = (e * by_row(1.0 / over_columns(e)) - hat) * by_row(grad * scale)
        result = tl.where(by_row(keep), result, 0.0)
        out_row = offset_of(coords, (out_s0, out_s1, out_s2, out_s3), N_DIMS)
        out_ptrs = out_ptr + by_row(out_row) + bins * tl.cast(out_sc, tl.int64)
        tl.store(out_ptrs, result, mask=by_row(inside) & (bins < n_bins))
    else:
        # total - 1 without cancellation: the bins at the maximum are exactly 1 each
        at_top = (x == top) & (bins < n_bins)
        rest = over_columns(tl.where(at_top, 0.0, e))
        rest += (over_columns(at_top.to(tl.int32)) - 1).to(tl.float32)
        log_total = tl.where(rest < 1.0, log1p_unit(rest), tl.log(1.0 + rest))
        value = over_columns(tl.where(hat == 0.0, 0.0, hat * (top - x))) + log_total
        store_rows(value * scale, row, inside, keep, cell + pid, out_ptr, count_ptr, REDUCED)


@triton.jit
def tempered(x_ptr, coords, bins, strides, x_sc, keep, n_bins, temperature, N_DIMS: tl.constexpr):
    """Softmax of the logits over the temperature, and its logarithm; 0 beyond the last bin."""
    x_ptrs = x_ptr + by_row(offset_of(coords, strides, N_DIMS)) + bins * tl.cast(x_sc, tl.int64)
    x = tl.load(x_ptrs, mask=by_row(keep) & (bins < n_bins), other=0).to(tl.float32) / temperature
    x += 0.0 * tl.maximum(x, 0.0)  # +inf gives NaN, and -inf a masked bin: probability 0
    shifted = x - by_row(top_of_columns(tl.where(bins < n_bins, x, -1e38)))
    e = tl.where(bins < n_bins, tl.exp(shifted), 0.0)
    total = over_columns(e)
    return e * by_row(1.0 / total), shifted - by_row(tl.log(total))


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
    inside, keep, scale = load_rows(start, offs, n, weight_ptr, row)
    bins = columns_of(STEPS, LANES)
    p, log_p = tempered(x_ptr, coords, bins, x_strides, x_sc, keep, n_bins, temperature, N_DIMS)
    q, log_q = tempered(
        teacher_ptr, coords, bins, teacher_strides, teacher_sc, keep, n_bins, temperature, N_DIMS
    )
    # what the student alone excludes gives NaN
    poison = over_columns(tl.where(q == 0.0, 0.0, 0.0 * log_p))
    if BACKWARD:
        grad_strides = (grad_s0, grad_s1, grad_s2, grad_s3)
        grad = upstream(grad_ptr, scale_ptr, coords, grad_strides, keep, N_DIMS, REDUCED)
        result = (p - q) * by_row(temperature * grad * scale + poison)
        result = tl.where(by_row(keep), result, 0.0)
        out_row = offset_of(coords, (out_s0, out_s1, out_s2, out_s3), N_DIMS)
        out_ptrs = out_ptr + by_row(out_row) + bins * tl.cast(out_sc, tl.int64)
        tl.store(out_ptrs, result, mask=by_row(inside) & (bins < n_bins))
    else:
        value = poison + over_columns(tl.where(q == 0.0, 0.0, q * (log_q - log_p)))
        value *= temperature * temperature
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
    inside, keep, _ = load_rows(start, offs, n, None, row)
    bins = columns_of(STEPS, LANES)
    _, _, e = load_bins(x_ptr, coords, bins, (x_s0, x_s1, x_s2, x_s3), x_sc, keep, n_bins, N_DIMS)
    k = bins.to(tl.float32)
    share = 1.0 / over_columns(e)
    # The where keeps the product out of the sum: fused with it, a sum over two lanes has other last
    # bits in the one than in the other, and both store it.
    mean = over_columns(tl.where(bins < n_bins, e * k, 0.0)) * share
    if grad_ptr is None:
        tl.store(out_ptr + row, mean, mask=inside)
    else:
        grad = upstream(
            grad_ptr, None, coords, (grad_s0, grad_s1, grad_s2, grad_s3), keep, N_DIMS, False
        )
        result = e * by_row(share * grad) * (k - by_row(mean))
        out_row = offset_of(coords, (out_s0, out_s1, out_s2, out_s3), N_DIMS)
        out_ptrs = out_ptr + by_row(out_row) + bins * tl.cast(out_sc, tl.int64)
        tl.store(out_ptrs, result, mask=by_row(inside) & (bins < n_bins))


def takes(x, target=None, *args) -> bool:
    """True if the kernels can read the operands in place and a row fits in a tile."""
    others = () if target is None else (target,)
    return x.shape[-1] <= MAX_BINS and rows_walkable(x, *others)


def _tile(x, layout) -> dict:
    return tile_of_rows(x, layout, DISTRIBUTION, triton.next_power_of_2(x.shape[-1]))


def _launch(
    x, target, weight, layout, tile, out, count=None, grad=None, scale=None, *, backward, reduced,
    cell=0,
):  # fmt: skip
    """Loss or gradient of one tensor of logits; a sum and a count of each program if reduced."""
    x_s, row_s, target_s, out_s, grad_s = layout.strides
    wrap_triton(distribution_focal_kernel, x)[(triton.cdiv(n_rows(x), tile["BLOCK_R"]),)](
        x, target, weight, grad, scale, out, count, cell, n_rows(x), x.shape[-1],
        *layout.sizes[1:], *x_s, *row_s, *target_s, *out_s, *grad_s, x.stride(-1),
        out.stride(-1) if backward else 0, BACKWARD=backward, REDUCED=reduced, **tile,
    )  # fmt: skip


def _over_levels(launch, x, other, weight, params, avg_factor, reduction):
    """The sum or mean over levels of what ``launch`` computes of each; see ``forward_levels``."""
    layouts = [row_layout(level, y, None, None) for level, y in zip(x, other, strict=True)]
    tiles = [_tile(*level) for level in zip(x, layouts, strict=True)]

    def launch_level(k, cell, out, count):
        args = (x[k], other[k], at(weight, k), *params, layouts[k], tiles[k], out, count)
        launch(*args, backward=False, reduced=True, cell=cell)

    def programs(k):
        return triton.cdiv(n_rows(x[k]), tiles[k]["BLOCK_R"])

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
    layout = row_layout(x, target, None, None)
    tile = _tile(x, layout)

    def launch(out, count, reduced):
        _launch(x, target, weight, layout, tile, out, count, backward=False, reduced=reduced)

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
    layout = row_layout(x, target, out, None if reduced else grad)
    args = (x, target, weight, layout, _tile(x, layout), out)
    _launch(*args, None, grad, scale, backward=True, reduced=reduced)
    return out


def _launch_distillation(
    x, teacher, weight, params, layout, tile, out, count=None, grad=None, scale=None, *, backward,
    reduced, cell=0,
):  # fmt: skip
    pointer, (temperature,) = scalar_args(params, 1)
    x_s, row_s, teacher_s, out_s, grad_s = layout.strides
    wrap_triton(distillation_kernel, x)[(triton.cdiv(n_rows(x), tile["BLOCK_R"]),)](
        x, teacher, weight, pointer, grad, scale, out, count, cell, n_rows(x), x.shape[-1],
        *layout.sizes[1:], *x_s, *row_s, *teacher_s, *out_s, *grad_s, x.stride(-1),
        teacher.stride(-1), out.stride(-1) if backward else 0, temperature,
        BACKWARD=backward, REDUCED=reduced, **tile,
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
    layout = row_layout(x, teacher, None, None)
    args = (x, teacher, weight, params, layout, _tile(x, layout))

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
    layout = row_layout(x, teacher, out, None if reduced else grad)
    args = (x, teacher, weight, params, layout, _tile(x, layout), out)
    _launch_distillation(*args, None, grad, scale, backward=True, reduced=reduced)
    return out


def _launch_expectation(x, out, grad=None):
    layout = row_layout(x, None if grad is None else out, grad)
    x_s, row_s, out_s, grad_s = layout.strides
    tile = _tile(x, layout)
    wrap_triton(expectation_kernel, x)[(triton.cdiv(n_rows(x), tile["BLOCK_R"]),)](
        x, grad, out, n_rows(x), x.shape[-1], *layout.sizes[1:],
        *x_s, *row_s, *out_s, *grad_s, x.stride(-1), 0 if grad is None else out.stride(-1), **tile,
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
