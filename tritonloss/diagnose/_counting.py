"""From logits and targets to counts on the grid: checks and call."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonloss._dispatch import launchers
from tritonloss._loss import Loss
from tritonloss._targets import is_logits, parse_targets, parse_weight
from tritonloss.eager import diagnose as eager

kernels = launchers("diagnose")
_counts = Loss(eager.counts, kernels.count, None, kernels.takes)


@torch.no_grad()
def counted(logits, targets, weight, ignore_index: int) -> Tensor:
    """(ROWS, COLUMNS) int64 on the logits' device, where nothing waits for it."""
    is_logits(logits)
    weight = parse_weight(logits, weight)
    targets = parse_targets(logits, targets, ignore_index, weight, dense_low=-torch.inf)
    return _counts(logits.detach(), *targets, weight, ignore_index)
