"""Distribution focal loss and the expectation of a distribution, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._entry import entered, reduced, without_autocast


def distribution_focal(
    x: Tensor, target: Tensor, weight: Tensor | None, avg_factor, reduction: str
) -> Tensor:
    """Cross entropy with the two bins beside the target."""
    with without_autocast(x):
        x = entered(x, masked=True)
        last = x.shape[-1] - 1
        y = target.to(x.dtype).clamp(0, last)
        count = target.numel()
        if weight is not None:
            keep = weight > 0
            count = keep.sum()
            x, y = torch.where(keep.unsqueeze(-1), x, 0), torch.where(keep, y, 0)
        # y == n belongs to the bins n - 1 and n; a NaN has no bin, and makes the loss NaN below
        left = torch.where(y >= 0, y, 0).long().clamp(max=last - 1)
        log_p = torch.log_softmax(x, -1).gather(-1, torch.stack((left, left + 1), -1))
        right_share = y - left
        share = torch.stack((1 - right_share, right_share), -1)
        share = share + torch.where(share == 0, 0, log_p.detach() * 0)  # a masked target gives NaN
        value = -torch.where(share == 0, 0, share * log_p).sum(-1)
        if weight is not None:
            value = torch.where(keep, value * weight.to(x.dtype), 0)
        return reduced(value, count, reduction, avg_factor)


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
        x = entered(x, masked=True)
        teacher = entered(teacher.to(x.dtype), masked=True)
        count = x[..., 0].numel()  # numel() of a shape would bake it into an export
        if weight is not None:
            keep = weight > 0
            count = keep.sum()
            x = torch.where(keep.unsqueeze(-1), x, 0)
            teacher = torch.where(keep.unsqueeze(-1), teacher, 0)
        log_p, log_q = (torch.log_softmax(t / temperature, -1) for t in (x, teacher))
        q = log_q.exp()
        log_p = torch.where(q == 0, 0, log_p)  # what the teacher excludes says nothing
        log_p = log_p * (1 + log_p.detach() * 0)  # what the student alone excludes gives NaN
        value = (q * (torch.where(q == 0, 0, log_q) - log_p)).sum(-1) * temperature**2
        if weight is not None:
            value = torch.where(keep, value * weight.to(x.dtype), 0)
        return reduced(value, count, reduction, avg_factor)


def expectation(x: Tensor) -> Tensor:
    """Mean bin of softmax(x): (..., bins) -> (...)."""
    with without_autocast(x):
        x = entered(x, masked=True)
        bins = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
        return (torch.softmax(x, -1) * bins).sum(-1)
