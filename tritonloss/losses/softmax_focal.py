"""Focal loss on the softmax over classes: one value per row of logits."""

from __future__ import annotations

from torch import Tensor

from tritonloss import _checks as check
from tritonloss._dispatch import launchers
from tritonloss._levels import Levels
from tritonloss._loss import Loss, OverLevels
from tritonloss._targets import check_logits, parse_class_weight, parse_labels, parse_row_weight
from tritonloss.eager import softmax_focal as eager

kernels = launchers("softmax_focal")
_loss = Loss(
    eager.softmax_focal,
    kernels.forward,
    kernels.backward,
    kernels.takes,
    by_blocks=eager.softmax_focal_by_blocks,
    has_blocks=eager.has_blocks,
    levels=OverLevels(3, 4, eager.counted, kernels.forward_levels),
)


def by_layer(logits: Tensor, labels: Tensor, alpha: Tensor, divisor: Tensor) -> Tensor:
    """The sums of each entry of the first dim, gamma 0, by its divisor, in one call: ``(L,)``.

    Arguments are known to be right.
    """
    args = labels.contiguous(), None, alpha
    if not _loss.by_kernels(logits, *args):
        return _loss(logits, *args, (divisor,), (0.0,), -1, "layers")
    rows = _loss(logits, *args, None, (0.0,), -1, "none")
    return rows.flatten(1).sum(1) / divisor


@check.by_name
def softmax_focal_loss(
    logits: Levels,
    labels: Levels,
    *,
    alpha: Tensor | None = None,
    gamma: float | Tensor = 2.0,
    weight: Levels | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
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
        class_dim: where logits has its classes; with 1 ``(B, C, H, W)`` is read in place.

    Logits may be a list of levels, with labels and weight lists of the same length: one result, as
    of all levels in one tensor; ``"none"`` gives a list.

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
    gamma = check.is_number("gamma", gamma, 0)
    avg_factor = check.is_reduction(reduction, avg_factor)
    check.is_index("ignore_index", ignore_index)

    def parse(logits, labels, weight):
        check_logits(logits)
        weight = parse_row_weight(logits, weight)
        labels = parse_labels("labels", labels, logits, ignore_index, logits.shape[-1] - 1)
        return logits, labels, weight, parse_class_weight(logits, alpha, "alpha")

    common = (avg_factor, (gamma,), ignore_index, reduction)
    return _loss.of(parse, logits, {"labels": labels, "weight": weight}, common, class_dim)
