"""Distribution focal loss and the expectation of a distribution, in plain torch."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ._blocks import in_graph, per_row, written_out
from ._entry import (
    entered,
    laid_out,
    mean_divisor,
    reduced,
    rows_that_count,
    without_autocast,
)


def distribution_focal(
    x: Tensor, target: Tensor, weight: Tensor | None, avg_factor, reduction: str
) -> Tensor:
    """Cross entropy with the two bins beside the target."""
    with without_autocast(x):
        x = entered(x, masked=True)
        y = target.to(x.dtype)
        count = target.numel()
        if weight is not None:
            keep = weight > 0
            count = keep.sum()
            x, y = torch.where(keep.unsqueeze(-1), x, 0), torch.where(keep, y, 0)
        # no gather, which a graph would not fuse
        share = -_minus_shares(y, torch.arange(x.shape[-1], device=x.device, dtype=x.dtype))
        log_p = torch.log_softmax(x, -1)
        # A masked target gives NaN: not by a product with 0, which a compiler takes for 0
        share = torch.where((share != 0) & (log_p == -torch.inf), torch.nan, share)
        value = -torch.where(share == 0, 0, share * log_p).sum(-1)
        if weight is not None:
            value = torch.where(keep, value * weight.to(x.dtype), 0)
        return reduced(value, count, reduction, avg_factor)


def distribution_focal_of_finite(
    x: Tensor, target: Tensor, weight: Tensor | None, avg_factor, reduction: str
) -> Tensor | None:
    """The same in few operations, each of which small inputs feel; None where not all is finite."""
    if weight is not None and not weight.min().item() >= 0:
        return None
    x = laid_out(x)
    share = _minus_shares(target.to(x.dtype), _bins(x.shape[-1], x.dtype))
    if weight is not None:
        share *= weight.unsqueeze(-1)
    if reduction == "mean":
        mean = avg_factor is None
        share /= mean_divisor(rows_that_count(x, target, weight) if mean else None, avg_factor)
    value = share * torch.log_softmax(x, -1)
    value = value.sum(-1) if reduction == "none" else value.sum()
    total = value.detach()
    total = total.sum() if reduction == "none" else total
    return value if math.isfinite(total.item()) else None


def distribution_focal_by_blocks(
    x: Tensor, target: Tensor, weight: Tensor | None, avg_factor, reduction: str, want_grad: bool
):
    """``(loss, gradient of the sum, 1 / divisor)``, block by block."""

    def values(block, y):
        share = _minus_shares(y, _bins(block.shape[-1], block.dtype))
        log_p = torch.log_softmax(block, -1)
        value = (share * log_p).sum(-1)
        return value, share.add_(log_p.exp_()) if want_grad else None

    def formula(x, y, w):
        return distribution_focal(x, y, w, None, "none")

    return per_row(values, formula, x, target, weight, avg_factor, reduction, want_grad)


def _minus_shares(y: Tensor, bins: Tensor) -> Tensor:
    """Minus what each bin gets of the targets, (..., bins)."""
    away = (y.clamp(0, bins.shape[0] - 1).unsqueeze(-1) - bins).abs_()
    return away.sub_(1).clamp_(max=0)


@functools.lru_cache(maxsize=64)
def _bins(n: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(n, dtype=dtype, device="cpu")


def distillation(
    x: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    avg_factor,
    params: tuple,
    reduction: str,
) -> Tensor:
    """Divergence of each distribution from the teacher's, at a temperature, times its square."""
    (temperature,) = params
    with without_autocast(x):
        x = _entered(x)
        teacher = _entered(teacher.to(x.dtype))
        # numel() of a shape would bake it into an export
        count = x[..., 0].numel() if weight is None else (weight > 0).sum()
        divergence = _divergence_in_graphs if in_graph() else _divergence
        value = divergence(x, teacher, weight, temperature)
        return reduced(value, count, reduction, avg_factor)


def _entered(x: Tensor) -> Tensor:
    """Of an infinite logit softmax makes NaN in any case; a graph would work it out each way."""
    return laid_out(x) if in_graph() else entered(x, masked=True)


def _divergence(x: Tensor, teacher: Tensor, weight: Tensor | None, temperature) -> Tensor:
    """Of each row, weighted."""
    return _divergence_and_shares(x, teacher, weight, temperature)[0]


def _divergence_and_shares(x, teacher, weight, temperature) -> tuple[Tensor, Tensor, Tensor]:
    """That, and the logarithm of the student's share of each bin and the teacher's share."""
    if weight is not None:
        keep = weight > 0
        x = torch.where(keep.unsqueeze(-1), x, 0)
        teacher = torch.where(keep.unsqueeze(-1), teacher, 0)
    log_p, log_q = (torch.log_softmax(t / temperature, -1) for t in (x, teacher))
    q = log_q.exp()
    read = torch.where(q == 0, 0, log_p)  # what the teacher excludes says nothing
    read = read * torch.where(read == -torch.inf, torch.nan, 1)  # what the student alone excludes
    value = (q * (torch.where(q == 0, 0, log_q) - read)).sum(-1) * temperature**2
    if weight is not None:
        value = torch.where(keep, value * weight.to(x.dtype), 0)
    return value, log_p, q


def _divergence_and_slopes(x, teacher, weight, temperature) -> tuple[Tensor, Tensor]:
    value, log_p, q = _divergence_and_shares(x, teacher, weight, temperature)
    slopes = torch.where(value.isnan().unsqueeze(-1), torch.nan, (log_p.exp() - q) * temperature)
    if weight is not None:
        slopes = torch.where((weight > 0).unsqueeze(-1), slopes * weight.unsqueeze(-1), 0)
    return value, slopes.to(x.dtype)


_divergence_in_graphs = written_out(_divergence, _divergence_and_slopes)


def distillation_by_blocks(
    x: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    avg_factor,
    params: tuple,
    reduction: str,
    want_grad: bool,
):
    """``(loss, gradient of the sum, 1 / divisor)``, block by block."""
    (temperature,) = params

    def values(block, teacher):
        log_p, log_q = (torch.log_softmax(t / temperature, -1) for t in (block, teacher))
        q = log_q.exp()
        value = log_q.sub_(log_p).mul_(q).sum(-1).mul_(temperature**2)
        return value, log_p.exp_().sub_(q).mul_(temperature) if want_grad else None

    def formula(x, teacher, w):
        return distillation(x, teacher, w, None, params, "none")

    return per_row(values, formula, x, teacher, weight, avg_factor, reduction, want_grad)


def expectation(x: Tensor) -> Tensor:
    """Mean bin of softmax(x): (..., bins) -> (...)."""
    with without_autocast(x):
        x = _entered(x)
        return _mean_in_graphs(x) if in_graph() else _mean(x)


def _mean(x: Tensor) -> Tensor:
    return _mean_and_shares(x)[0]


def _mean_and_shares(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bins = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
    share = torch.softmax(x, -1)
    return (share * bins).sum(-1), share, bins


def _mean_and_slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, share, bins = _mean_and_shares(x)
    return mean, share.mul_(bins - mean.unsqueeze(-1))


_mean_in_graphs = written_out(_mean, _mean_and_slopes)


def expectation_of_few(x: Tensor) -> Tensor:
    """The same in two operations: an infinite logit makes softmax NaN, too."""
    if torch.is_autocast_enabled(x.device.type):
        return expectation(x)
    x = laid_out(x)
    return torch.softmax(x, -1) @ _bins(x.shape[-1], x.dtype)


def expectation_by_blocks(x: Tensor, want_grad: bool):
    """The same, and its gradient."""

    def values(block, _):
        return _mean_and_slopes(block) if want_grad else (_mean(block), None)

    def formula(x, *_):
        return expectation(x)

    return per_row(values, formula, x, None, None, None, "none", want_grad)
