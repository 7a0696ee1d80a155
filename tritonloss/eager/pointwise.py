"""Pointwise classification losses in plain torch.

With label targets almost every logit is a negative: the loss of a negative is computed for all of
them, and that of a positive only for the one labelled logit per row. No one-hot is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonloss.eager._blocks import divided, in_graph, summed, written_out

from ._entry import (
    NO_LOSS,
    at_class,
    finite_or_nan,
    laid_out,
    masked_classes,
    reduced,
    total_of,
    upcast,
    without_autocast,
)

# Share of targets above 0 up to which they are worth a pass of their own.
FEW = 0.1


class Pointwise(NamedTuple):
    """One loss in three views; ``params`` in the order that the public function packs them."""

    negative: Callable  # (x, *params): target 0
    positive: Callable  # (x, y, *params): the labelled class, y its quality (1 for labels)
    dense: Callable  # (x, y, *params): any y in [0, 1]
    # (x, out, *params): negative, its derivative written to out; x may be overwritten
    slopes: Callable | None = None
    # (x, y, out, *params): the same of dense and of positive, None where dense is positive, too
    dense_slopes: Callable | None = None
    positive_slopes: Callable | None = None


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); linear only where that is exact in the dtype."""
    return F.softplus(x, threshold=20 if x.dtype == torch.float32 else 40)


def log_of_rest_(smaller: Tensor) -> Tensor:
    """log(1 - smaller) for a probability of at most 1/2, which is overwritten."""
    if smaller.dtype != torch.float32 or not torch.compiler.is_compiling():
        return smaller.neg_().log1p_()
    # log1p of Inductor would cost more than all the rest. This is 2 atanh(s) = 2 s + 2/3 s^3 + ...
    # for s in [-1/3, 0], by the best polynomial of its degree: 4e-9 of the value, less than a bit.
    s = smaller / (smaller - 2)
    square, series = s * s, 0.28157778
    for term in (0.27965158, 0.40024595, 0.66666322, 2.00000001):
        series = series * square + term
    return s * series


def power(base: Tensor, exponent, log: Tensor | None = None) -> Tensor:
    """base ** exponent for base in [0, 1], with 0^0 = 1 and a gradient of 0 at 0.

    ``log`` of the base, where it is known, spares a graph a logarithm.
    """
    smallest = 1e-37 if base.dtype == torch.float32 else 1e-300
    if not isinstance(exponent, Tensor):
        if exponent == 1 or exponent == 2:
            return base.pow(int(exponent))
        if exponent == 0.5:
            return base.clamp(min=smallest).sqrt()
        if torch.compiler.is_compiling():
            # As a tensor, a scheduled number stays symbolic and does not recompile. By exp and log,
            # for pow and its derivative are slower than all else of a loss that is one loop.
            exponent = exponent * torch.ones((), dtype=base.dtype, device=base.device)
            return (exponent * (base.clamp(min=smallest).log() if log is None else log)).exp()
        if exponent > 1:
            return base.pow(exponent)
    return base.clamp(min=smallest).pow(exponent)


def bce(x: Tensor, y: Tensor) -> Tensor:
    """Binary cross entropy, a sum of non-negative terms: nothing cancels."""
    return torch.lerp(softplus(x), softplus(-x), y)


def bce_slope(x: Tensor, y: Tensor) -> Tensor:
    """p - y as p (1 - y) - (1 - p) y: exact at y = 0 and y = 1."""
    return torch.lerp(torch.sigmoid(x), -torch.sigmoid(-x), y)


def balance(y: Tensor, a1, a0) -> Tensor | float:
    """y a1 + (1 - y) a0."""
    if isinstance(a1, (int, float)) and a1 == a0:
        return a1
    return y * (a1 - a0) + a0


def _focal_dense(x, y, a1, a0, gamma, _=None):
    q = torch.lerp(torch.sigmoid(x), torch.sigmoid(-x), y)
    return balance(y, a1, a0) * power(q, gamma) * bce(x, y)


def _focal_slopes(x, out, a0, gamma, detached=False):
    """Value of a0 p^gamma softplus(x); its derivative, where ``detached`` only by the softplus.

    x is overwritten: fewer blocks fit the cache better.
    """
    cost = x.relu()
    low = (-x).relu() if torch.compiler.is_compiling() else None
    p = x.sigmoid_()
    torch.sub(1, p, out=out)
    near = log_of_rest_(torch.minimum(p, out))
    cost -= near  # softplus, and cheaper
    factor = power(p, gamma, low if low is None else near - low).mul_(a0)
    if detached:
        torch.mul(factor, p, out=out)
    else:
        out.mul_(cost).mul_(gamma).add_(p).mul_(factor)
    return cost.mul_(factor)


class _Parts(NamedTuple):
    """What losses with any target are made of, as accurate as the functions above."""

    p: Tensor
    rest: Tensor  # 1 - p
    negative: Tensor  # bce with 0
    cost: Tensor  # bce with y
    slope: Tensor  # p - y


def _parts(x, y) -> _Parts:
    p, rest = torch.sigmoid(x), torch.sigmoid(-x)
    high, near = x.relu(), log_of_rest_(torch.minimum(p, rest))
    cost = torch.lerp(high, high - x, y).sub_(near)
    return _Parts(p, rest, high.sub_(near), cost, torch.lerp(p, -rest, y))


def _focal_dense_slopes(x, y, out, a1, a0, gamma, _=None):
    p, rest, _, cost, slope = _parts(x, y)
    q = torch.lerp(p, rest, y).clamp_(min=1e-37)
    factor = power(q, gamma) * balance(y, a1, a0)
    torch.mul(1 - 2 * y, p, out=out).mul_(rest).mul_(cost).mul_(gamma).div_(q)
    out.add_(slope).mul_(factor)
    return cost.mul_(factor)


def _quality_dense_slopes(x, y, out, beta, *_):
    p, rest, _, cost, slope = _parts(x, y)
    factor = power(slope.abs(), beta)
    divisor = torch.where(slope == 0, 1, slope)  # the factor is 0 there, or constant
    torch.mul(p, rest, out=out).mul_(cost).mul_(beta).div_(divisor).add_(slope).mul_(factor)
    return cost.mul_(factor)


def _varifocal_positive_slopes(x, y, out, alpha, gamma, iou_weighted, detach):
    _, _, _, cost, slope = _parts(x, y)
    factor = balance(y, 1, 1 - iou_weighted)
    torch.mul(slope, factor, out=out)
    return cost.mul_(factor)


def _varifocal_dense_slopes(x, y, out, alpha, gamma, iou_weighted, detach):
    p, rest, negative, cost, slope = _parts(x, y)
    positive = y.sign()  # a comparison costs more
    factor = power(p, gamma).mul_(alpha).mul_(1 - positive)
    if detach:
        torch.mul(factor, p, out=out)
    else:
        torch.mul(rest, negative, out=out).mul_(gamma).add_(p).mul_(factor)
    weight = y if iou_weighted else positive
    out.addcmul_(slope, weight)
    return negative.mul_(factor).addcmul_(cost, weight)


def _smoothed_dense(x, y, a1, a0, gamma, smoothing):
    q = torch.lerp(torch.sigmoid(x), torch.sigmoid(-x), y)
    flat = (softplus(x) + softplus(-x)) / 2
    return balance(y, a1, a0) * power(q, gamma) * (bce(x, y) * (1 - smoothing) + flat * smoothing)


def _smoothed_negative(x, *params):
    value = _smoothed_dense(x, torch.zeros_like(x), *params)
    return torch.where(x == NO_LOSS, 0, value)


FOCAL_SMOOTHED = Pointwise(_smoothed_negative, _smoothed_dense, _smoothed_dense)


def _star(x, gamma, beta):
    return softplus(gamma * x - beta) / gamma


FOCAL = Pointwise(
    lambda x, a1, a0, gamma, _=None: a0 * power(torch.sigmoid(x), gamma) * softplus(x),
    _focal_dense,
    _focal_dense,
    lambda x, out, a1, a0, gamma, _=None: _focal_slopes(x, out, a0, gamma),
    _focal_dense_slopes,
)


def _focal_star_dense(x, y, a1, a0, gamma, beta):
    return balance(y, a1, a0) * torch.lerp(_star(x, gamma, beta), _star(-x, gamma, beta), y)


def _softplus_and_slope_(z):
    """softplus(z) and sigmoid(z); z is overwritten."""
    cost, p = z.relu(), z.sigmoid_()
    return cost.sub_(log_of_rest_(torch.minimum(p, 1 - p))), p


def _star_slopes(x, out, a1, a0, gamma, beta):
    cost, p = _softplus_and_slope_(gamma * x - beta)
    torch.mul(p, a0, out=out)
    return cost.mul_(a0 / gamma)


def _star_dense_slopes(x, y, out, a1, a0, gamma, beta):
    high, p = _softplus_and_slope_(gamma * x - beta)
    low, rest = _softplus_and_slope_(-gamma * x - beta)
    factor = balance(y, a1, a0)
    torch.mul(torch.lerp(p, rest.neg_(), y), factor, out=out)
    return torch.lerp(high, low, y).mul_(factor).div_(gamma)


FOCAL_STAR = Pointwise(
    lambda x, a1, a0, gamma, beta: a0 * _star(x, gamma, beta),
    _focal_star_dense,
    _focal_star_dense,
    _star_slopes,
    _star_dense_slopes,
)


def _quality_dense(x, y, beta, *_):
    return power(bce_slope(x, y).abs(), beta) * bce(x, y)


QUALITY = Pointwise(
    lambda x, beta, *_: power(torch.sigmoid(x), beta) * softplus(x),
    _quality_dense,
    _quality_dense,
    lambda x, out, beta, *_: _focal_slopes(x, out, 1.0, beta),
    _quality_dense_slopes,
)


def _varifocal_negative(x, alpha, gamma, iou_weighted, detach):
    factor = power(torch.sigmoid(x), gamma)
    if isinstance(detach, Tensor):  # the flags travel as numbers when traced
        factor = torch.where(detach > 0, factor.detach(), factor)
    elif detach:
        factor = factor.detach()
    return alpha * factor * softplus(x)


def _varifocal_positive(x, y, alpha, gamma, iou_weighted, detach):
    return balance(y, 1, 1 - iou_weighted) * bce(x, y)


VARIFOCAL = Pointwise(
    _varifocal_negative,
    _varifocal_positive,
    lambda x, y, *params: torch.where(
        y > 0, _varifocal_positive(x, y, *params), _varifocal_negative(x, *params)
    ),
    lambda x, out, alpha, gamma, iou_weighted, detach: _focal_slopes(
        x, out, alpha, gamma, bool(detach)
    ),
    _varifocal_dense_slopes,
    _varifocal_positive_slopes,
)


def _gaussian_dense(x, y, alpha, beta, *_):
    peak = y == 1
    z = torch.where(peak, -x, x)
    beside = torch.where(peak, 1, power(1 - y, beta))
    return beside * power(torch.sigmoid(z), alpha) * softplus(z)


def _gaussian_slopes(x, y, out, alpha, beta, *_):
    peak = y == 1
    value = _focal_slopes(torch.where(peak, -x, x), out, 1.0, alpha)
    beside = torch.where(peak, 1, power(1 - y, beta))
    out.mul_(torch.where(peak, -1, beside))
    return value.mul_(beside)


GAUSSIAN = Pointwise(
    lambda x, alpha, *_: power(torch.sigmoid(x), alpha) * softplus(x),
    _gaussian_dense,
    _gaussian_dense,
    lambda x, out, alpha, *_: _focal_slopes(x, out, 1.0, alpha),
    _gaussian_slopes,
)


def _shifted_focal(z, gamma, margin):
    """q^gamma -log(1 - q), q = max(sigmoid(z) - margin, 0): the focal loss of a shifted score."""
    high = z > 0
    smaller = torch.sigmoid(torch.where(high, -z, z))  # whose derivative does not cancel
    s = torch.where(high, 1 - smaller, smaller)
    easy = s <= margin
    q = torch.where(easy, 0, s - margin)
    near = q < 0.5
    rest = torch.where(high, smaller, 1 - smaller) + margin  # 1 - q, where not easy
    far = rest > 1e-30  # beyond, there is no margin, and -log(1 - q) is z
    beyond = torch.where(far, -torch.where(near | ~far, 1, rest).log(), z)
    bce = torch.where(near, -torch.log1p(-torch.where(near, q, 0)), beyond)
    return power(q, gamma) * bce


def _asymmetric_dense(x, y, gamma_pos, gamma_neg, margin, *_):
    return torch.lerp(_shifted_focal(x, gamma_neg, margin), _shifted_focal(-x, gamma_pos, 0), y)


def _shifted_focal_and_slope(z, gamma, margin):
    p, rest = torch.sigmoid(z), torch.sigmoid(-z)
    q = (p - margin).clamp_(min=0)
    left = rest + margin  # 1 - q, where q is above 0
    near, far = q < 0.5, left > 1e-30
    bce = torch.where(far, left.clamp(min=1e-30).log(), -z)
    bce = torch.where(near, log_of_rest_(torch.where(near, q, 0)), bce).neg_()
    slope = torch.where(far, rest / left, 1).add_(gamma * bce * rest / q.clamp(min=1e-37))
    factor = power(q, gamma)
    return bce.mul_(factor), torch.where(q <= 0, 0, slope.mul_(p).mul_(factor))  # NaN stays


def _asymmetric_slopes(x, out, gamma_pos, gamma_neg, margin, *_):
    value, slope = _shifted_focal_and_slope(x, gamma_neg, margin)
    out.copy_(slope)
    return value


def _asymmetric_dense_slopes(x, y, out, gamma_pos, gamma_neg, margin, *_):
    negative, slope = _shifted_focal_and_slope(x, gamma_neg, margin)
    positive, rise = _shifted_focal_and_slope(-x, gamma_pos, 0)
    torch.lerp(slope, rise.neg_(), y, out=out)
    return torch.lerp(negative, positive, y)


ASYMMETRIC = Pointwise(
    lambda x, gamma_pos, gamma_neg, margin, *_: _shifted_focal(x, gamma_neg, margin),
    _asymmetric_dense,
    _asymmetric_dense,
    _asymmetric_slopes,
    _asymmetric_dense_slopes,
)


def asl1_radius(d: Tensor, mu) -> Tensor:
    """sqrt(d^2 + mu^2); the square of neither is formed, so that nothing overflows."""
    mu = torch.as_tensor(mu, dtype=d.dtype, device=d.device)
    if not torch.compiler.is_compiling():
        return torch.hypot(d, mu)
    size = d.abs()  # Inductor has no hypot of vectors
    high = torch.maximum(size, mu)
    return high * (1 + (torch.minimum(size, mu) / high.clamp(min=1e-37)).square()).sqrt()


def _asl1_slopes(x, y, out, mu, *_):
    """NaN where the square of x - y overflows, but in a graph."""
    if torch.compiler.is_compiling():
        torch.div(x - y, asl1_radius(x - y, mu), out=out)
        return asl1(x, y, mu)
    square = torch.sub(x, y, out=out).square()
    radius = (square + mu**2).sqrt_() if mu > 1e-15 else asl1_radius(out, mu)
    out.div_(radius)
    return square.div_(radius.add_(mu))


def asl1(x, y, mu, *_):
    """sqrt(d^2 + mu^2) - mu as d^2 / (sqrt(d^2 + mu^2) + mu): nothing cancels for small d."""
    d = x - y
    return d * (d / (asl1_radius(d, mu) + mu))


AUTHENTIC_SMOOTH_L1 = Pointwise(asl1, asl1, asl1, dense_slopes=_asl1_slopes)

KINDS = {
    "asl1": AUTHENTIC_SMOOTH_L1,
    "asymmetric": ASYMMETRIC,
    "focal": FOCAL,
    "focal_smoothed": FOCAL_SMOOTHED,
    "focal_star": FOCAL_STAR,
    "gaussian": GAUSSIAN,
    "quality": QUALITY,
    "varifocal": VARIFOCAL,
}


def _unmasked(x: Tensor, mask: Tensor) -> Tensor:
    """Negatives, and the value of no loss where they are masked, by -inf, too."""
    # torch.where is half the price of masked_fill on the CPU; no clamp: its gradient at NaN is 0
    return finite_or_nan(torch.where(mask | (x == -torch.inf), NO_LOSS, x))


def _kept(x: Tensor, y: Tensor, keep: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    if kind != "asl1":
        x = masked_classes(x, y == 0)
    x = finite_or_nan(x)
    return (x, y) if keep is None else (torch.where(keep, x, 0), torch.where(keep, y, 0))


class Masked(NamedTuple):
    """A loss that takes logits as they come."""

    negative: Callable  # (x, mask, *params): 0 where masked
    positive: Callable  # (x, y, *params)
    dense: Callable  # (x, y, keep or None, *params): something finite where not kept


def _formulas(kind: str) -> Masked:
    loss = KINDS[kind]
    return Masked(
        lambda x, mask, *params: loss.negative(_unmasked(x, mask), *params),
        lambda x, y, *params: loss.positive(finite_or_nan(x), y, *params),
        lambda x, y, keep, *params: loss.dense(*_kept(x, y, keep, kind), *params),
    )


FORMULAS = {kind: _formulas(kind) for kind in KINDS}


def _for_graphs(kind: str) -> Masked:
    """The same with derivatives written out: a graph gets one loop each way, with one exponential,
    in place of what autograd makes of the formula.

    All of it or nothing, masks included: a second derivative then raises, rather than lack a part;
    and what the compiler keeps for the backward is one tensor, whichever it chooses.
    """
    loss, formulas = KINDS[kind], FORMULAS[kind]
    of_positive = loss.positive_slopes or loss.dense_slopes
    slopes = Masked(
        lambda out, x, mask, *params: loss.slopes(_unmasked(x, mask), out, *params),
        lambda out, x, y, *params: of_positive(finite_or_nan(x), y, out, *params),
        lambda out, x, y, keep, *params: loss.dense_slopes(*_kept(x, y, keep, kind), out, *params),
    )
    return Masked(*map(_written_out, formulas, slopes))


def _written_out(formula: Callable, slopes: Callable) -> Callable:
    """``formula(x, *args)``, whose derivative ``slopes(out, x, *args)`` writes."""

    def both(x, *args):
        slope = x.new_empty(x.shape)  # Dynamo takes an out= only if it is contiguous
        return slopes(slope, x, *args), slope

    return written_out(formula, both)


IN_GRAPHS = {kind: _for_graphs(kind) for kind, loss in KINDS.items() if loss.dense_slopes}


def _loss_of(kind: str) -> Masked:
    """With derivatives written out in a graph, unless something differentiates in other ways."""
    return IN_GRAPHS.get(kind, FORMULAS[kind]) if in_graph() else FORMULAS[kind]


def pointwise(
    x: Tensor,
    labels: Tensor | None,
    quality: Tensor | None,
    dense: Tensor | None,
    weight: Tensor | None,
    class_weight: Tensor | None,
    avg_factor,
    params: tuple,
    kind: str,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Any pointwise loss: the reference of ``kernels/pointwise.py``, and the CPU path."""
    with without_autocast(x):
        x = laid_out(x)
        row_weight, logit_weight = split_weight(x, weight)
        if dense is not None:
            value, count = _dense(x, dense, row_weight, logit_weight, params, kind)
        else:
            rows = label_rows(x, labels, quality, ignore_index, row_weight)
            whole = reduction != "none" and class_weight is None and logit_weight is None
            value, count = _labelled(x, rows, logit_weight, params, kind, whole and reduction)
        if class_weight is not None:
            value = value * class_weight.to(x.dtype)
        return reduced(value, count, reduction, avg_factor)


def counted(x, labels, quality, dense, weight, class_weight, avg_factor, params, kind,
            ignore_index, reduction):  # fmt: skip
    """How many logits count."""
    row_weight, logit_weight = split_weight(x, weight)
    if dense is not None:
        count = x.numel() if weight is None else (weight > 0).sum()
        return count * x.shape[-1] if row_weight is not None else count
    keep = label_rows(x, labels, None, ignore_index, row_weight).keep
    if logit_weight is None:
        return keep.sum() * x.shape[-1]
    return (keep.unsqueeze(-1) & (logit_weight > 0)).sum()


def has_blocks(x, labels, quality, dense, weight, class_weight, avg_factor, *args) -> bool:
    """True for sums over rows, with weights per row; and for values of a regression."""
    if args[-1] == "none":
        return args[1] == "asl1" and weight is None
    by_row = class_weight is None and (weight is None or weight.dim() < x.dim())
    return by_row and x.dim() > 1


def pointwise_by_blocks(
    x, labels, quality, dense, weight, class_weight, avg_factor, params, kind, ignore_index,
    reduction, want_grad,
):  # fmt: skip
    """``(loss, gradient of the sum, 1 / divisor)`` of a pointwise loss with weights per row."""
    x, count = x.detach(), x.numel()
    if reduction == "none":
        return *_values(x, dense, params, kind, want_grad), None
    weight, _ = split_weight(x, weight)
    if dense is not None:
        keep = None if weight is None else weight > 0
        total, gradient = _dense_by_blocks(x, dense, weight, params, kind, want_grad)
    else:
        rows = label_rows(x, labels, quality, ignore_index, weight)
        keep = rows.keep
        total, gradient = _labelled_by_blocks(x, rows, params, kind, reduction, want_grad)
    if keep is not None and avg_factor is None:
        count = keep.sum() * x.shape[-1]
    return divided(total, gradient, count, reduction, avg_factor)


def _values(x, y, params, kind, want_grad):
    """Values, and the gradient of their sum."""

    def values(x):
        return _dense(x, y, None, None, params, kind)[0]

    def slopes(x, out):
        return KINDS[kind].dense_slopes(x, y.to(x.dtype), out, *params)

    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return values_and_slopes(x, values, want_grad, slopes)


def _labelled_by_blocks(x, rows, params, kind, reduction, want_grad):
    """All as negatives but the labelled logits, which take the value of no loss; then those."""
    x_at_index = x.gather(-1, rows.index).to(rows.y.dtype)
    fill = torch.where(rows.positive.unsqueeze(-1), NO_LOSS, x_at_index.clamp(min=NO_LOSS))
    every = bool(rows.keep.all())
    if not every:
        fill = torch.where(rows.keep.unsqueeze(-1), fill, NO_LOSS)

    def of_negatives(block, index):
        if not every:
            block = torch.where(rows.keep[index].unsqueeze(-1), block, NO_LOSS)
        # no out-of-place scatter: it would copy a channels-first block into rows
        block = block.clamp(min=NO_LOSS)  # a masked class
        return block.scatter_(-1, rows.index[index], fill[index])

    places = rows.positive.nonzero(as_tuple=True)
    y = rows.y[places]
    w = None if rows.weight is None else rows.weight[places]
    total, gradient = _negatives(x, of_negatives, rows.weight, params, kind, reduction, want_grad)
    loss = KINDS[kind]
    there = x_at_index.squeeze(-1)[places]
    slopes = loss.positive_slopes or loss.dense_slopes

    def positive_values(x_there):
        return loss.positive(x_there, y, *params) * (1 if w is None else w)

    of_positives = slopes and (lambda x, out: slopes(x, y, out, *params))
    value, slope = values_and_slopes(there, positive_values, want_grad, of_positives, w)
    if want_grad:  # 0 until now
        gradient[(*places, rows.labels[places])] = slope
    if reduction == "layers":
        return total.index_add(0, places[0], value), gradient
    return total + value.sum(), gradient


def _negatives(x, prepare, weight, params, kind, reduction, want_grad):
    """Sum and gradient of logits of which all are negative, or the value of no loss."""
    loss = KINDS[kind]

    def checked(block, index):
        block = prepare(block, index)
        return block.add_(block, alpha=0)  # an infinite logit gives NaN

    def values(block, index):
        value = loss.negative(block, *params).sum(-1)
        return value if weight is None else value * weight[index]

    def slopes(block, index, out):
        value = loss.slopes(prepare(block, index), out, *params)
        return _weighed(value, out, None if weight is None else weight[index])

    by_layer = reduction == "layers"
    return summed(x, checked, values, want_grad, slopes=loss.slopes and slopes, by_layer=by_layer)


def _weighed(value, slopes, weight):
    if weight is not None:
        slopes.mul_(weight.unsqueeze(-1))
        value.mul_(weight.unsqueeze(-1))
    return value


def _dense_by_blocks(x, y, weight, params, kind, want_grad):
    """Sum and gradient; where few targets are above 0, the rest costs what a negative does."""
    loss = KINDS[kind]
    slopes = loss.dense_slopes

    def of_dense(block, index, out):
        value = slopes(block, y[index].to(block.dtype), out, *params)
        return _weighed(value, out, None if weight is None else weight[index])

    if slopes or kind == "asl1" or int(y.count_nonzero()) > FEW * y.numel():

        def values(block, index):
            block_weight = None if weight is None else weight[index]
            return _dense(block, y[index], block_weight, None, params, kind)[0]

        def masked(block, index):
            return block.clone() if kind == "asl1" else masked_classes(block, y[index] == 0)

        return summed(x, masked, values, want_grad, slopes=slopes and of_dense)

    def negatives_alone(block, index):
        negative = y[index] == 0
        if weight is not None:
            negative &= weight[index].unsqueeze(-1) > 0
        return torch.where(negative & (block != -torch.inf), block, NO_LOSS)

    total, gradient = _negatives(x, negatives_alone, weight, params, kind, "sum", want_grad)
    places = y.nonzero(as_tuple=True)
    w = None if weight is None else weight[places[:-1]]
    there = x[places].to(gradient.dtype)

    def positive_values(x_there):
        return _dense(x_there, y[places], None, w, params, kind)[0]

    value, slope = values_and_slopes(there, positive_values, want_grad)
    if want_grad:
        gradient[places] = slope
    return total + value.sum(), gradient


def values_and_slopes(x: Tensor, values: Callable, want_grad: bool, slopes=None, weight=None):
    """Values at a few logits x, and their derivatives; by ``slopes``, where all is finite."""
    if slopes is not None and want_grad:
        slope = torch.empty_like(x)
        value = slopes(x, slope)
        if weight is not None:
            value.mul_(weight)
            slope.mul_(weight)
        if math.isfinite(value.sum().item()):
            return value, slope
    with torch.set_grad_enabled(want_grad):
        x = x.add(x, alpha=0).requires_grad_(want_grad)  # an infinite logit gives NaN
        value = values(x)
        slope = torch.autograd.grad(value.sum(), x)[0] if want_grad else None
    return value.detach(), slope


def split_weight(x: Tensor, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``(per row, per logit)``, what does not count at exactly 0."""
    if weight is None:
        return None, None
    weight = torch.where(weight > 0, weight, 0)
    weight = weight.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (weight, None) if weight.dim() < x.dim() else (None, weight)


def _dense(x, y, row_weight, logit_weight, params, kind):
    """Losses (..., C) and how many of them count."""
    y = y.to(x.dtype)
    weight = logit_weight if row_weight is None else row_weight.unsqueeze(-1)
    if weight is None:
        return _loss_of(kind).dense(x, y, None, *params), x.numel()
    keep = (weight > 0).expand(x.shape)
    return _loss_of(kind).dense(x, y, keep, *params) * weight, keep.sum()


class LabelRows(NamedTuple):
    """What the labels say of each row."""

    labels: Tensor  # (...) int64
    keep: Tensor  # (...) bool: neither ignored nor of weight 0
    positive: Tensor  # (...) bool: the label is a class
    index: Tensor  # (..., 1) a valid class, the label where positive
    y: Tensor  # (...) quality where positive, else 1
    weight: Tensor | None  # (...) 0 where not kept


def label_rows(x: Tensor, labels: Tensor, quality, ignore_index: int, weight) -> LabelRows:
    """An invalid label counts as ignored."""
    n_classes = x.shape[-1]
    labels = labels.long()
    keep = (labels >= 0) & (labels <= n_classes) & (labels != ignore_index)
    if weight is not None:
        keep = keep & (weight > 0)
        weight = torch.where(keep, weight, 0)
    positive = keep & (labels < n_classes)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.ones(labels.shape, dtype=dtype, device=x.device)
    if quality is not None:
        y = torch.where(positive, quality.to(dtype), y)
    return LabelRows(
        labels, keep, positive, labels.clamp(0, n_classes - 1).unsqueeze(-1), y, weight
    )


def _labelled(x, rows, logit_weight, params, kind, whole):
    """Losses per logit, or as a ``whole`` (a reduction) their sum, and how many logits count."""
    loss = _loss_of(kind)
    labelled = at_class(rows.labels.unsqueeze(-1), x)
    dropped = ~rows.keep.unsqueeze(-1)
    count = rows.keep.sum() * x.shape[-1]
    if logit_weight is not None:
        dropped = dropped | (logit_weight == 0)
        count = (~dropped).sum()
        kept = rows.positive & (logit_weight.gather(-1, rows.index).squeeze(-1) > 0)
        rows = rows._replace(positive=kept)
    negatives = loss.negative(x, labelled | dropped, *params)
    # a masked sum, not a gather: Inductor fuses it, and its gradient, with the negatives
    x_labelled = torch.where(labelled & rows.positive.unsqueeze(-1), x, 0).sum(-1)
    positives = torch.where(rows.positive, loss.positive(x_labelled, rows.y, *params), 0)
    if whole:  # by rows first: one loop with the sum above
        value = negatives.sum(-1) + positives
        return total_of(value if rows.weight is None else value * rows.weight, whole), count
    if rows.weight is not None:
        negatives = negatives * rows.weight.unsqueeze(-1)
        positives = positives * rows.weight
    value = torch.where(labelled, positives.unsqueeze(-1), negatives)
    return value if logit_weight is None else value * logit_weight, count


def generalized_focal(x_left, x_right, y, y_left, y_right, beta, reduction, avg_factor):
    """General form of the GFocal paper on the softmax of a pair of logits."""
    with without_autocast(x_left):
        x = finite_or_nan(upcast(x_right) - upcast(x_left))
        y, y_left, y_right = (
            t.to(x.dtype) if isinstance(t, Tensor) else t for t in (y, y_left, y_right)
        )
        width = y_right - y_left
        share = (y - y_left) / width  # of the right value
        # y - (y_l p_l + y_r p_r) = (y_r - y_l) (share - p_r), exact at either end
        signed = bce_slope(x, share) * width
        value = power(signed.abs(), beta) * width * bce(x, share)
        return reduced(value, x.numel(), reduction, avg_factor)


def class_balanced_weight(samples: Tensor, beta: float, normalize: bool) -> Tensor:
    """(1 - beta) / (1 - beta^n), 0 where n = 0."""
    n = samples.double()
    safe = torch.where(n > 0, n, 1)
    if beta == 0:
        weight = torch.ones_like(n)
    else:
        # expm1 and log1p: 1 - beta^n would cancel for beta -> 1
        weight = (beta - 1) / torch.expm1(safe * math.log1p(beta - 1))
    weight = torch.where(n > 0, weight, 0)
    if normalize:
        total = weight.sum()
        weight = weight * (n.numel() / torch.where(total > 0, total, 1))
    return weight.float()
