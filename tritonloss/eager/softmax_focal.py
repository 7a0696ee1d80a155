"""Focal loss on the softmax over classes in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._blocks import cuts, divided, in_one, with_strides_of
from ._entry import at_class, entered, finite_or_nan, reduced, total_of, without_autocast
from .pointwise import FOCAL, values_and_slopes

# Stands in for the labelled logit among the others: far below every allowed logit.
NO_LOGIT = -1e38


def softmax_focal(
    x: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    alpha: Tensor | None,
    avg_factor,
    params: tuple,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Softmax focal loss: the reference of ``kernels/softmax_focal.py``, and the CPU path.

    The label's probability is sigmoid(d), d = x_label - logsumexp(others): a binary focal loss.
    """
    with without_autocast(x):
        x = entered(x, masked=True)
        keep, index, factor = _rows(x, labels, alpha, weight, ignore_index)
        x = torch.where(keep.unsqueeze(-1), x, 0)
        others = x.masked_fill(at_class(index, x), NO_LOGIT)
        top = others.detach().amax(-1, keepdim=True)
        log_total = torch.exp(others - top).sum(-1).log()
        x_label = finite_or_nan(x.gather(-1, index))  # a masked label gives NaN
        d = (x_label - top).squeeze(-1) - log_total
        value = torch.where(keep, FOCAL.negative(-d, 1.0, 1.0, *params) * factor, 0)
        return reduced(value, keep.sum(), reduction, avg_factor)


def _rows(x, labels, alpha, weight, ignore_index):
    """``(keep, index (..., 1), factor)`` of each row: a valid class, alpha of it times weight."""
    labels = labels.long()
    keep = (labels >= 0) & (labels < x.shape[-1]) & (labels != ignore_index)
    index = labels.clamp(0, x.shape[-1] - 1).unsqueeze(-1)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = torch.ones((), dtype=dtype, device=x.device)
    if alpha is not None:
        factor = alpha.to(dtype)[index.squeeze(-1)]
    if weight is not None:
        keep = keep & (weight > 0)
        factor = factor * weight.to(dtype)
    return keep, index, factor


def counted(x, labels, weight, alpha, avg_factor, params, ignore_index, reduction):
    """How many rows count."""
    return _rows(x, labels, None, weight, ignore_index)[0].sum()


def has_blocks(x, labels, weight, alpha, avg_factor, params, ignore_index, reduction) -> bool:
    return reduction != "none" and x.shape[-1] > 1  # of one class, others have no logit


def softmax_focal_by_blocks(
    x, labels, weight, alpha, avg_factor, params, ignore_index, reduction, want_grad
):
    """``(loss, gradient of the sum, 1 / divisor)``: the derivative of d written out.

    d = x_label - logsumexp(others) moves by 1 with x_label, and by -p_j / (1 - p_label) with the
    others; 1 - p_label is the sum of theirs.
    """
    x = x.detach()
    keep, index, factor = _rows(x, labels, alpha, weight, ignore_index)
    every, factor = bool(keep.all()), torch.where(keep, factor, 0)
    whole = in_one(x)
    value = torch.empty_like(factor)
    gradient = torch.empty_like(x, dtype=factor.dtype) if want_grad and not whole else None
    for cut in cuts(x):
        block, at = x[cut].to(factor.dtype), index[cut]
        if not every:
            block = torch.where(keep[cut].unsqueeze(-1), block, 0)
        p = torch.softmax(block, -1)
        label = p.gather(-1, at)
        log_label = label.log()
        if not label.min().item() > 1e-30:  # about to underflow; the logarithm is not
            log_label = block.log_softmax(-1).gather(-1, at)
            log_label.add_(log_label, alpha=0)  # a masked label gives NaN
        others = p.scatter_(-1, at, 0).sum(-1, True).clamp_(min=torch.finfo(p.dtype).tiny)
        value[cut], slope = _of_difference(
            others.log().sub_(log_label), factor[cut].unsqueeze(-1), params, want_grad
        )
        if want_grad:
            p.mul_(slope / others).scatter_(-1, at, slope.neg_())
            if whole:
                gradient = with_strides_of(x, p)
            else:
                gradient[cut] = p
    return divided(total_of(value, reduction), gradient, keep.sum(), reduction, avg_factor)


def _of_difference(x, factor, params, want_grad):
    """Values (...) of -d (..., 1), and their derivatives (..., 1)."""
    value, slope = values_and_slopes(
        x,
        lambda x: FOCAL.negative(x, 1.0, 1.0, *params) * factor,
        want_grad,
        lambda x, out: FOCAL.slopes(x.clone(), out, 1.0, 1.0, *params),
        factor,
    )
    return value.squeeze(-1), slope
