"""IoU, GIoU, DIoU, CIoU and EIoU: losses, and IoU and its relatives as values."""

from __future__ import annotations

from torch import Tensor

from tritonloss import _checks as check
from tritonloss._dispatch import launchers
from tritonloss._levels import Levels, is_levels, of_levels
from tritonloss._loss import Loss, OverLevels
from tritonloss._targets import as_weight, parse_row_weight
from tritonloss.eager import boxes as eager
from tritonloss.eager._entry import rows_that_count

kernels = launchers("boxes")
_loss = Loss(
    eager.box_loss,
    kernels.forward,
    kernels.backward,
    kernels.takes,
    by_blocks=eager.box_loss_by_blocks,
    levels=OverLevels(3, 3, rows_that_count, kernels.forward_levels),
)


KINDS = ("iou", "giou", "diou", "ciou", "eiou")
MODES = {"linear": "iou", "square": "iou_square", "log": "iou_log"}


def _check_boxes(target, weight) -> None:
    if not target.is_cuda and (target[..., 2:] >= target[..., :2]).all():
        return
    wrong = (target[..., 2:] < target[..., :2]).any(-1)
    if weight is not None:
        wrong = wrong & (weight > 0)
    check.require(~wrong, "target must be boxes x1, y1, x2, y2 with x2 >= x1 and y2 >= y1", target)


def _box_loss(
    kind, pred, target, eps, alpha_threshold, weight, reduction, avg_factor, class_dim,
    gradient_to_target=False,
):  # fmt: skip
    """Checks and call: the same for every box loss."""
    eps = check.is_number("eps", eps, 0, open_low=True)
    alpha_threshold = check.is_number("alpha_threshold", alpha_threshold)
    avg_factor = check.is_reduction(reduction, avg_factor)
    common = (avg_factor, (eps, alpha_threshold), kind, reduction)
    if not gradient_to_target:
        beside = {"target": target, "weight": weight}
        return _loss.of(_parse, pred, beside, common, class_dim, "pred")
    beside = {"target": of_levels(Tensor.detach, target), "weight": weight}
    loss = _loss.of(_parse, pred, beside, common, class_dim, "pred")
    # the losses are symmetric: the same with the boxes exchanged, for its gradient alone
    beside = {"pred": of_levels(Tensor.detach, pred), "weight": weight}
    other = _loss.of(_parse_exchanged, target, beside, common, class_dim, "target")
    if is_levels(loss):
        return [_with_gradient_of(*pair) for pair in zip(loss, other, strict=True)]
    return _with_gradient_of(loss, other)


def _with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    return value + (other - other.detach()).to(value.dtype)


def _parse(pred, target, weight) -> tuple:
    pred, target, weight = _parse_pair("pred", pred, "target", target, weight)
    if check.values_checked(pred):
        _check_boxes(target, weight)
    return pred, target, weight


def _parse_exchanged(target, pred, weight) -> tuple:
    return _parse_pair("target", target, "pred", pred, weight)


def _parse_pair(x_name, x, other_name, other, weight) -> tuple:
    check.is_floating(x_name, x)
    if x.dim() == 0 or x.shape[-1] != 4:
        raise ValueError(f"{x_name} must have shape (..., 4); got {tuple(x.shape)}")
    check.is_input(other_name, other, x.shape, f"as {x_name}", x_name, x)
    if isinstance(weight, Tensor) and weight.shape == x.shape:
        weight = as_weight(weight).mean(-1)
    return x, other, parse_row_weight(x, weight, x_name)


def overlap_of_pairs(pred: Tensor, target: Tensor) -> Tensor:
    """IoU of pairs that are known to be right, without a gradient."""
    loss = _loss(pred.detach(), target, None, None, (1e-7, 0.5), "iou", "none")
    return (1 - loss).clamp_(0, 1)


@check.by_name
def iou(
    pred: Levels,
    target: Levels,
    *,
    kind: str = "iou",
    eps: float | Tensor = 1e-7,
    class_dim: int = -1,
) -> Tensor:
    r"""Intersection over union of each pair of boxes: the quality of a predicted box.

    .. math:: \mathrm{IoU} = |P \cap T| / \max(|P \cup T|, \epsilon)

    Pair by pair, not every box with every other. The IoU lies in [0, 1], so it can be the quality
    of :func:`quality_focal_loss` and others as it is; the gradient flows into ``pred``.

    Args:
        pred: boxes ``(..., 4)`` as x1, y1, x2, y2; float16, bfloat16, float32 or float64, any
            strides.
        target: boxes of the same shape, floating.
        kind: ``"iou"``, or one of its relatives, which fall below 0 for boxes apart: ``"giou"``,
            ``"diou"``, ``"ciou"``, ``"eiou"``, each one minus its loss.
        eps: smallest union, > 0; for the relatives as in their losses.
        class_dim: where the boxes have their coordinates.

    Boxes may be lists of levels, and so is the result then.

    Returns:
        ``(...)``, float32 (float64 for float64 boxes).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> pred = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
        >>> target = torch.tensor([[0.0, 0.0, 2.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
        >>> tritonloss.iou(pred, target).tolist()
        [0.5, 0.0]

    Reference:
        Yu et al., UnitBox: An Advanced Object Detection Network, ACM MM 2016.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    loss = _box_loss(kind, pred, target, eps, 0.5, None, "none", None, class_dim)

    def of(loss):
        value = 1 - loss
        return value.clamp(0, 1) if kind == "iou" else value  # a rounding beyond is none

    return of_levels(of, loss)


@check.by_name
def iou_loss(
    pred: Levels,
    target: Levels,
    *,
    mode: str = "linear",
    eps: float | Tensor = 1e-7,
    weight: Levels | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
    gradient_to_target: bool = False,
) -> Tensor:
    r"""One minus the intersection over union of each pair of boxes, its square, or its logarithm.

    .. math:: L = 1 - \mathrm{IoU}, \quad 1 - \mathrm{IoU}^2, \quad \text{or} \quad
              -\log \max(\mathrm{IoU}, \epsilon); \quad
              \mathrm{IoU} = |P \cap T| / \max(|P \cup T|, \epsilon)

    Widths and heights are clamped at 0: an inverted box is empty, and an empty box has IoU 0. Value
    and gradient are finite for all coordinates up to 1e9.

    Args:
        pred: boxes ``(..., 4)`` as x1, y1, x2, y2; float16, bfloat16, float32 or float64, any
            strides.
        target: boxes of the same shape, floating.
        mode: ``"linear"``, ``"square"``, or ``"log"`` as in UnitBox and FCOS.
        eps: smallest union, and smallest IoU of which the logarithm is taken, > 0.
        weight: ``(...)``, or ``(..., 4)``, whose mean over a box counts; boxes whose weight is not
            above 0 are removed from loss, gradient and divisor, whatever stands in them.
        reduction: ``"none"`` (one value per pair), ``"sum"`` or ``"mean"``.
        avg_factor: number or 0-d tensor; with ``"mean"``, divide the sum by this; a value <= 0
            counts as 1. Without it, divide by the number of boxes that have a weight above 0.
        class_dim: where pred has its coordinates; with 1 ``(B, 4, H, W)`` is read in place.
        gradient_to_target: whether the target gets a gradient, too, as boxes that are predicted
            from others want it; it takes a second pass. Without it, a target that requires one is
            an error.

    ``pred`` may be a list of levels, with target and weight lists of the same length: one result,
    as of all levels in one tensor; ``"none"`` gives a list.

    Returns:
        float32 (float64 for float64 boxes).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> pred = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
        >>> target = torch.tensor([[0.0, 0.0, 2.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
        >>> tritonloss.iou_loss(pred, target, reduction="none").tolist()
        [0.5, 1.0]

    Reference:
        Yu et al., UnitBox: An Advanced Object Detection Network, ACM MM 2016, which takes the
        logarithm; 1 - IoU is what came to be used.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    rest = (weight, reduction, avg_factor, class_dim, gradient_to_target)
    return _box_loss(MODES[mode], pred, target, eps, 0.0, *rest)


@check.by_name
def giou_loss(
    pred: Levels,
    target: Levels,
    *,
    eps: float | Tensor = 1e-7,
    weight: Levels | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
    gradient_to_target: bool = False,
) -> Tensor:
    r"""IoU loss with a penalty for the empty part of the smallest box around both.

    .. math:: L = 1 - \mathrm{IoU} + (|C| - |P \cup T|) / |C|

    The arguments, result and errors are those of :func:`iou_loss`; eps is the smallest area of C.

    Example:
        >>> import torch, tritonloss
        >>> pred = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        >>> tritonloss.giou_loss(pred, pred + 1).item()
        1.5

    Reference:
        Rezatofighi et al., Generalized Intersection over Union, CVPR 2019.
    """
    rest = (weight, reduction, avg_factor, class_dim, gradient_to_target)
    return _box_loss("giou", pred, target, eps, 0.0, *rest)


@check.by_name
def diou_loss(
    pred: Levels,
    target: Levels,
    *,
    eps: float | Tensor = 1e-7,
    weight: Levels | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
    gradient_to_target: bool = False,
) -> Tensor:
    r"""IoU loss with a penalty for the distance of the centres.

    .. math:: L = 1 - \mathrm{IoU} + \rho^2 / c^2

    with :math:`\rho` the distance of the centres and c the diagonal of the smallest box around
    both. The arguments, result and errors are those of :func:`iou_loss`; eps is the smallest
    :math:`c^2`.

    Example:
        >>> import torch, tritonloss
        >>> pred = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        >>> tritonloss.diou_loss(pred, pred + 1).item()
        1.25

    Reference:
        Zheng et al., Distance-IoU Loss, AAAI 2020.
    """
    rest = (weight, reduction, avg_factor, class_dim, gradient_to_target)
    return _box_loss("diou", pred, target, eps, 0.0, *rest)


@check.by_name
def eiou_loss(
    pred: Levels,
    target: Levels,
    *,
    eps: float | Tensor = 1e-7,
    weight: Levels | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
    gradient_to_target: bool = False,
) -> Tensor:
    r"""DIoU loss with a penalty for the difference of each side.

    .. math:: L = 1 - \mathrm{IoU} + \rho^2 / c^2 + (w_p - w_t)^2 / w_c^2 + (h_p - h_t)^2 / h_c^2

    with :math:`w_c, h_c` the sides of the smallest box around both, c its diagonal and
    :math:`\rho` the distance of the centres. The arguments, result and errors are those of
    :func:`iou_loss`; eps is the smallest :math:`c^2, w_c^2` and :math:`h_c^2`.

    Example:
        >>> import torch, tritonloss
        >>> pred = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
        >>> target = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> loss = tritonloss.eiou_loss(pred, target) - tritonloss.diou_loss(pred, target)
        >>> loss.item()
        0.25

    Reference:
        Zhang et al., Focal and Efficient IOU Loss, Neurocomputing 2022.
    """
    rest = (weight, reduction, avg_factor, class_dim, gradient_to_target)
    return _box_loss("eiou", pred, target, eps, 0.0, *rest)


@check.by_name
def ciou_loss(
    pred: Levels,
    target: Levels,
    *,
    eps: float | Tensor = 1e-7,
    alpha_threshold: float | Tensor = 0.5,
    weight: Levels | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
    gradient_to_target: bool = False,
) -> Tensor:
    r"""DIoU loss with a penalty for the difference of the aspect ratios.

    .. math:: L = 1 - \mathrm{IoU} + \rho^2 / c^2 + \alpha v, \quad
              v = \frac{4}{\pi^2} \left( \arctan \frac{w_t}{h_t} - \arctan \frac{w_p}{h_p}
              \right)^2, \quad \alpha = \frac{v}{\max(1 - \mathrm{IoU} + v, \epsilon)}

    :math:`\alpha` is not differentiated. A box of width and height 0 has no aspect ratio: v = 0.

    Args:
        alpha_threshold: :math:`\alpha` applies where the IoU is above this, and is 0 elsewhere.
            0.5 as the paper and mmdetection have it; 0 for every pair that overlaps, -1 for all
            pairs, as in torchvision and ultralytics.

    The other arguments, result and errors are those of :func:`diou_loss`.

    Example:
        >>> import torch, tritonloss
        >>> pred = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
        >>> target = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> loss = tritonloss.ciou_loss(pred, target, alpha_threshold=0)
        >>> round((loss - tritonloss.diou_loss(pred, target)).item(), 4)
        0.0032

    Reference:
        Zheng et al., Distance-IoU Loss, AAAI 2020.
    """
    rest = (weight, reduction, avg_factor, class_dim, gradient_to_target)
    return _box_loss("ciou", pred, target, eps, alpha_threshold, *rest)
