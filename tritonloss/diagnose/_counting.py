"""From logits and targets to counts on the grid: checks, choice of the implementation, op."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonloss import _grid as grid
from tritonloss import _op
from tritonloss._dispatch import use_triton
from tritonloss._op import wrap_triton
from tritonloss._targets import is_logits, parse_targets, parse_weight
from tritonloss.eager import diagnose as eager

try:
    from tritonloss.kernels._logits import walkable
    from tritonloss.kernels.diagnose import count_kernel, launch_count, sum_copies_kernel
except ImportError:  # no Triton: the eager path alone
    launch_count = count_kernel = sum_copies_kernel = None


@_op.kernel_op(lambda x, *args: x.new_empty((grid.ROWS, grid.COLUMNS), dtype=torch.int64))
def diagnose_count(
    x: Tensor,
    dense: Tensor | None,
    labels: Tensor | None,
    quality: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    limit: int,
    steps: int,
    quality_steps: int,
) -> Tensor:
    return launch_count(
        x, dense, labels, quality, weight, ignore_index, limit, steps, quality_steps,
        (wrap_triton(count_kernel), wrap_triton(sum_copies_kernel)),
    )  # fmt: skip


@torch.no_grad()
def counted(logits, targets, weight, ignore_index: int) -> Tensor:
    """(ROWS, COLUMNS) int64 on the logits' device, where nothing waits for it."""
    is_logits(logits)
    weight = parse_weight(logits, weight)
    targets = parse_targets(logits, targets, ignore_index, weight, dense_low=-torch.inf)
    x = logits.detach()
    if use_triton(x) and walkable(x, targets.dense, weight):
        args = (targets.dense, targets.labels, targets.quality, weight, ignore_index)
        return _op.call(
            diagnose_count, launch_count, x, *args, grid.LIMIT, grid.STEPS, grid.QUALITY_STEPS
        )
    return eager.counts(x, targets, weight, ignore_index)
