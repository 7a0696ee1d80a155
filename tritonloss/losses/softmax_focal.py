"""Focal loss on the softmax over classes: one value per row of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonloss import _checks as check
from tritonloss import _op
from tritonloss._dispatch import not_empty, use_triton
from tritonloss._op import wrap_triton
from tritonloss._targets import is_logits, parse_class_weight, parse_labels, parse_row_weight
from tritonloss.eager import _blocks
from tritonloss.eager import softmax_focal as eager

from .pointwise import backward_by_blocks

try:
    from tritonloss.kernels._finish import finish_kernel
    from tritonloss.kernels._rows import rows_walkable
    from tritonloss.kernels.softmax_focal import (
        launch_backward,
        launch_forward,
        softmax_focal_backward_kernel,
        softmax_focal_forward_kernel,
    )
except ImportError:  # no Triton: the eager path alone
    launch_forward = launch_backward = finish_kernel = None
    softmax_focal_forward_kernel = softmax_focal_backward_kernel = None


def _fake_forward(x, *args):
    stats = x.new_empty((3, x.numel() // x.shape[-1]), dtype=torch.float32)
    return *_op.fake_row_loss(x, *args), stats


@_op.kernel_op(_fake_forward)
def softmax_focal_forward(
    x: Tensor,
    labels: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    params: Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(
        x, labels, alpha, weight, avg_factor, params, ignore_index, reduction,
        wrap_triton(softmax_focal_forward_kernel), wrap_triton(finish_kernel),
    )  # fmt: skip


@_op.kernel_op(lambda x, *args: torch.empty_like(x))
def softmax_focal_backward(
    x: Tensor,
    grad: Tensor,
    scale: Tensor,
    stats: Tensor,
    labels: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    params: Tensor,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    return launch_backward(
        x, grad, scale, stats, labels, alpha, weight, params, ignore_index, reduction,
        wrap_triton(softmax_focal_backward_kernel),
    )  # fmt: skip


def _forward(x, *args):
    loss, *saved = _op.call(softmax_focal_forward, launch_forward, x, *args)
    return (loss,), tuple(saved)


def _backward(grads, saved, x, labels, alpha, weight, avg_factor, *rest):
    return _op.call(
        softmax_focal_backward, launch_backward, x, grads[0], *saved,
        labels, alpha, weight, *rest,
    )  # fmt: skip


def _reference(x, labels, alpha, weight, avg_factor, params, ignore_index, reduction):
    avg_factor = None if avg_factor is None else avg_factor[0]
    return eager.softmax_focal(
        x, labels, alpha, weight, avg_factor, tuple(params), ignore_index, reduction
    )


def _forward_by_blocks(x, *args):
    loss, gradient, scale = eager.softmax_focal_by_blocks(x, *args)
    return (loss,), (gradient, scale)


_kernels = _op.differentiable(_forward, _backward, _reference)
_eager_by_blocks = _op.differentiable(
    _forward_by_blocks, backward_by_blocks, lambda x, *args: eager.softmax_focal(x, *args[:-1])
)


def softmax_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: Tensor | None = None,
    gamma: float | Tensor = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    r"""Focal loss on the softmax over classes, of which one is right.

    .. math:: L = -\alpha_y (1-p_y)^\gamma \log p_y, \quad p = \mathrm{softmax}(x)

    Args:
        logits: ``(..., C)``, float16, bfloat16, float32 or float64, any strides. Background, if
            there is one, is a class with a logit of its own. -inf masks a class: it has probability
            0, and the loss is NaN where it is the label.
        labels: integers ``(...)`` in 0..C-1, or ``ignore_index``.
        alpha: ``(C,)`` floating, weight of the rows of each class.
        gamma: focusing power, >= 0; 0 is cross entropy. A number or a 0-d tensor.
        weight: ``(...)`` per row; rows whose weight is not above 0 are removed from loss, gradient
            and divisor.
        ignore_index: label whose rows contribute exactly 0.
        reduction: ``"none"`` (one value per row), ``"sum"`` or ``"mean"``.
        avg_factor: number or 0-d tensor; with ``"mean"``, divide the sum by this; a value <= 0
            counts as 1. Without it, divide by the number of rows that are not ignored and have a
            weight above 0.

    Returns:
        float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> loss = tritonloss.softmax_focal_loss(logits, torch.tensor([0, 1]), reduction="none")
        >>> [round(v, 4) for v in loss.tolist()]
        [0.0109, 0.9635]

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017.
    """
    is_logits(logits)
    gamma = check.is_number("gamma", gamma, 0)
    avg_factor = check.is_reduction(reduction, avg_factor)
    check.is_index("ignore_index", ignore_index)
    weight = parse_row_weight(logits, weight)
    alpha = parse_class_weight(logits, alpha, "alpha")
    labels = parse_labels("labels", labels, logits, ignore_index, logits.shape[-1] - 1)
    if use_triton(logits) and not_empty(logits) and rows_walkable(logits):
        return _kernels(
            logits,
            labels,
            alpha,
            weight,
            None if avg_factor is None else _op.scalars(logits, avg_factor),
            _op.scalars(logits, gamma),
            ignore_index,
            reduction,
        )
    args = (labels, alpha, weight, avg_factor, (gamma,), ignore_index, reduction)
    if reduction != "none" and _blocks.usable(logits):
        want_grad = logits.requires_grad and torch.is_grad_enabled()
        return _eager_by_blocks(logits, *args, want_grad)
    return eager.softmax_focal(logits, *args)
