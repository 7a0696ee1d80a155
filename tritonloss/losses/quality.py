"""Cross entropy towards a quality: special cases of the focal and the varifocal loss."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tritonloss import _checks as check
from tritonloss._levels import Levels, LevelTargets
from tritonloss._targets import Targets

from .pointwise import evaluate, sigmoid_focal_loss


def _of_quality(quality_for):
    """The learnt quality in place of the one given: ``quality_for(logits, labels, quality)``."""

    def prepared(logits: Tensor, targets: Targets) -> Targets:
        if targets.quality is None:
            given = "labels alone" if targets.dense is None else "a floating tensor"
            raise TypeError(f"targets must be a pair (labels, quality); got {given}")
        quality = quality_for(logits, targets.labels, targets.quality)
        return targets._replace(quality=quality)

    return prepared


@check.by_name
def bce_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    class_weight: Tensor | None = None,
    weight: Levels | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Binary cross entropy of every logit.

    .. math:: L = \mathrm{BCE}(x, y)

    y is the quality at the labelled class (1 for labels alone), 0 elsewhere. The arguments, result
    and errors are those of :func:`sigmoid_focal_loss`, whose case gamma = 0 it is.

    Example:
        >>> import torch, tritonloss
        >>> targets = torch.tensor([1, 2]), torch.tensor([0.5, 0.0])
        >>> loss = tritonloss.bce_loss(torch.zeros(2, 2), targets, reduction="sum")
        >>> round(loss.item(), 4)
        2.7726

    Reference:
        Redmon and Farhadi, YOLOv3: An Incremental Improvement, 2018.
    """
    return sigmoid_focal_loss(
        logits, targets, alpha=None, gamma=0.0, class_weight=class_weight, weight=weight,
        ignore_index=ignore_index, reduction=reduction, avg_factor=avg_factor, class_dim=class_dim,
    )  # fmt: skip


@check.by_name
def mal_loss(
    logits: Levels,
    targets: tuple[Levels, Levels],
    *,
    gamma: float | Tensor = 1.5,
    alpha: float | Tensor | None = None,
    class_weight: Tensor | None = None,
    weight: Levels | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Matchability-aware loss: a matched query learns a power of its IoU, at full weight.

    .. math:: L = \mathrm{BCE}(x, u^\gamma) \ \text{(positive)}, \quad
              \alpha p^\gamma \, \mathrm{BCE}(x, 0) \ \text{(negative)}

    :math:`p^\gamma` is not differentiated.

    Args:
        targets: a pair ``(labels, quality)``, the IoU u in [0, 1].
        gamma: power of the IoU and of the negatives' weight, >= 0.
        alpha: weight of negatives, >= 0; None is 1.

    The other arguments, result and errors are those of :func:`sigmoid_focal_loss`.

    Example:
        >>> import torch, tritonloss
        >>> targets = torch.tensor([0]), torch.tensor([0.25])
        >>> loss = tritonloss.mal_loss(torch.zeros(1, 2), targets, reduction="none")
        >>> [round(v, 3) for v in loss[0].tolist()]
        [0.693, 0.245]

    Reference:
        Huang et al., DEIM: DETR with Improved Matching for Fast Convergence, CVPR 2025.
    """
    gamma = check.is_number("gamma", gamma, 0)
    alpha = 1.0 if alpha is None else check.is_number("alpha", alpha, 0)
    params = (alpha, gamma, 0.0, 1.0)
    rest = (weight, class_weight, ignore_index, reduction, avg_factor, class_dim)
    powered = _of_quality(lambda x, labels, quality: quality**gamma)
    return evaluate("varifocal", logits, targets, params, *rest, powered)


@torch.no_grad()
def iou_aware_target(logits: Tensor, labels: Tensor, quality: Tensor, alpha) -> Tensor:
    """The mean of score and IoU that a labelled logit learns, 0 in rows without a class."""
    # those read column 0
    known = (labels >= 0) & (labels < logits.shape[-1])
    column = torch.where(known, labels.long(), 0).unsqueeze(-1)
    score = logits.detach().gather(-1, column).squeeze(-1)
    score = score.to(torch.promote_types(score.dtype, torch.float32)).sigmoid()
    target = (score**alpha * quality ** (1 - alpha)).clamp(min=0.01)
    return torch.where(known, target, 0)


@check.by_name
def iou_aware_bce_loss(
    logits: Levels,
    targets: tuple[Levels, Levels],
    *,
    alpha: float | Tensor = 0.25,
    gamma: float | Tensor = 2.0,
    class_weight: Tensor | None = None,
    weight: Levels | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""IoU-aware cross entropy: a matched query learns a mean of its own score and its IoU.

    .. math:: L = \mathrm{BCE}(x, t), \ t = \max(p^\alpha u^{1-\alpha}, 0.01)
              \ \text{(positive)}, \quad p^\gamma \, \mathrm{BCE}(x, 0) \ \text{(negative)}

    t is not differentiated; :math:`p^\gamma` is.

    Args:
        targets: a pair ``(labels, quality)``, the IoU u in [0, 1].
        alpha: the score's part in the target, in [0, 1].
        gamma: focusing power of the negatives, >= 0.

    The other arguments, result and errors are those of :func:`sigmoid_focal_loss`.

    Example:
        >>> import torch, tritonloss
        >>> targets = torch.tensor([0]), torch.tensor([0.5])
        >>> loss = tritonloss.iou_aware_bce_loss(torch.zeros(1, 2), targets, reduction="none")
        >>> [round(v, 3) for v in loss[0].tolist()]
        [0.693, 0.173]

    Reference:
        Cai et al., Align-DETR: Improving DETR with Simple IoU-aware BCE Loss, 2023.
    """
    alpha = check.is_number("alpha", alpha, 0, 1)
    gamma = check.is_number("gamma", gamma, 0)
    params = (1.0, gamma, 0.0, 0.0)
    rest = (weight, class_weight, ignore_index, reduction, avg_factor, class_dim)
    prepared = _of_quality(partial(iou_aware_target, alpha=alpha))
    return evaluate("varifocal", logits, targets, params, *rest, prepared)
