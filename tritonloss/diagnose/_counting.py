"""From logits and targets to counts on the grid: checks and call."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonloss._dispatch import launchers
from tritonloss._levels import parsed_levels
from tritonloss._loss import Loss
from tritonloss._targets import check_logits, parse_targets, parse_weight
from tritonloss.eager import diagnose as eager

kernels = launchers("diagnose")
_counts = Loss(eager.counts, kernels.count, None, kernels.takes)


@torch.no_grad()
def counted(logits, targets, weight, ignore_index: int, class_dim: int) -> Tensor:
    """(ROWS, COLUMNS) int64 on the logits' device, where nothing waits for it."""

    def parse(logits, targets, weight):
        check_logits(logits)
        weight = parse_weight(logits, weight)
        targets = parse_targets(logits, targets, ignore_index, weight, dense_low=-torch.inf)
        return logits.detach(), *targets, weight, ignore_index

    levels = parsed_levels(parse, logits, {"targets": targets, "weight": weight}, class_dim)
    counts = _counts(*levels[0])
    for level in levels[1:]:
        counts += _counts(*level)
    return counts
