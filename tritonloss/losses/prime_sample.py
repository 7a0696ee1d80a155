"""Prime sample attention: the rank of a positive, weights by rank, and CARL."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonloss import _checks as check
from tritonloss._levels import Levels, class_last, is_levels, parsed_levels
from tritonloss._targets import check_logits, parse_labels
from tritonloss.eager import prime_sample as eager

NORMALIZERS = ("max", "class")
ACTIVATIONS = ("sigmoid", "softmax")


def _check_positives(iou: Tensor, gt_index: Tensor, labels: Tensor) -> None:
    check.is_floating("iou", iou)
    for name, value in (("gt_index", gt_index), ("labels", labels)):
        check.is_integer(name, value)
        check.has_shape(name, value, iou.shape, "as iou")
        check.on_device_of(name, value, "iou", iou)
    check.is_constant("iou", iou)


def _listed(levels: list[tuple]) -> list[Tensor | None]:
    """What all levels have per row, one after the other: few numbers beside the logits."""
    columns = zip(*levels, strict=True)
    return [
        None if column[0] is None else torch.cat([t.reshape(-1) for t in column])
        for column in columns
    ]


def _over_rows(function, levels: list[tuple], listed: bool) -> Tensor | list[Tensor]:
    """``function`` of the rows of all levels, of the shapes of what each level has first;
    ``listed``: as a list."""
    if not listed:
        return function(*levels[0])
    like = [level[0] for level in levels]
    parts = function(*_listed(levels)).split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


@check.by_name
def iou_hlr(iou: Levels, gt_index: Levels, labels: Levels) -> Tensor | list[Tensor]:
    r"""Hierarchical local rank of positives by IoU: 0 is the most important of its class.

    Within each object the positives are placed by IoU; then all first places of a class are ranked
    by IoU, behind them all second places, and so on.

    Args:
        iou: ``(N,)`` (any shape), IoU of each box with its object.
        gt_index: integers, shape of ``iou``: the object, unique over the batch; < 0 where the row
            is no positive.
        labels: integers, shape of ``iou``: the class of each positive; not read elsewhere.

    All three may be lists of levels: the ranks are those of all levels together, in a list.

    Returns:
        int64, shape of ``iou``: the number of positives of the same class strictly before; equal
        ones share the rank (0, 0, 2); -1 where the row is no positive.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.

    Example:
        >>> import torch, tritonloss
        >>> iou = torch.tensor([0.9, 0.8, 0.6, 0.0])
        >>> gt_index, labels = torch.tensor([5, 5, 7, -1]), torch.tensor([0, 0, 0, 1])
        >>> tritonloss.iou_hlr(iou, gt_index, labels).tolist()
        [0, 2, 1, -1]

    Reference:
        Cao et al., Prime Sample Attention in Object Detection, CVPR 2020.
    """

    def parse(iou, gt_index, labels):
        _check_positives(iou, gt_index, labels)
        return iou, gt_index, labels

    beside = {"gt_index": gt_index, "labels": labels}
    levels = parsed_levels(parse, iou, beside, -1, "iou", classes=False)
    return _over_rows(eager.iou_hlr, levels, is_levels(iou))


@check.by_name
def isr_p_weight(
    cls_loss: Levels,
    iou: Levels,
    gt_index: Levels,
    labels: Levels,
    *,
    k: float | Tensor = 2.0,
    bias: float | Tensor = 0.0,
    normalizer: str = "max",
    weight: Levels | None = None,
    class_dim: int = -1,
) -> Tensor | list[Tensor]:
    r"""ISR-P: weights of the classification loss that favour prime positives.

    .. math:: u_i = \frac{n - r_i}{n}, \quad w_i = (b + (1-b) u_i)^k, \quad
              w_i' = w_i \, \frac{\sum_j weight_j L_j}{\sum_j w_j L_j}

    r is the rank of :func:`iou_hlr`; the sums run over the positives, whose total loss is kept.

    Args:
        cls_loss: ``(N,)``, or ``(N, C)`` to be summed over C: loss of each row, unweighted.
        iou, gt_index, labels: as :func:`iou_hlr` takes them.
        k: power, >= 0.
        bias: b in [0, 1].
        normalizer: n is ``"max"``, the size of the largest class, as in the published code, or
            ``"class"``, the size of the row's own class.
        weight: ``(N,)``, the weights so far, 1 if None. A row whose weight is not above 0 keeps it
            and does not count.
        class_dim: where a ``cls_loss`` of classes has them.

    ``cls_loss`` may be a list of levels, with all that is per row lists of the same length: the
    ranks, sums and sizes are those of all levels together, and the weights a list.

    Returns:
        float32 (float64 for a float64 loss) of the shape of ``iou``: a new tensor, without a
        gradient. Rows that are no positives keep their weight.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> iou = torch.tensor([0.9, 0.8, 0.6, 0.0])
        >>> gt_index, labels = torch.tensor([5, 5, 7, -1]), torch.tensor([0, 0, 0, 1])
        >>> w = tritonloss.isr_p_weight(torch.ones(4), iou, gt_index, labels, k=1)
        >>> [round(v, 3) for v in w.tolist()]
        [1.5, 0.5, 1.0, 1.0]

    Reference:
        Cao et al., Prime Sample Attention in Object Detection, CVPR 2020.
    """
    k = check.is_number("k", k, 0)
    bias = check.is_number("bias", bias, 0, 1)
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}; got {normalizer!r}")

    def parse(cls_loss, iou, gt_index, labels, weight):
        _check_positives(iou, gt_index, labels)
        check.is_floating("cls_loss", cls_loss)
        if cls_loss.dim() > iou.dim():
            cls_loss = class_last(cls_loss, class_dim, "cls_loss")
        if iou.shape not in (cls_loss.shape, cls_loss.shape[:-1]):
            raise ValueError(
                f"cls_loss must have shape {tuple(iou.shape)} (as iou), or that and a dimension "
                f"of classes, the last or class_dim; got {tuple(cls_loss.shape)}"
            )
        check.on_device_of("cls_loss", cls_loss, "iou", iou)
        if weight is not None:
            check.is_input("weight", weight, iou.shape, "as iou", "iou", iou)
        return eager.loss_of_rows(cls_loss, labels), iou, gt_index, labels, weight

    beside = {"iou": iou, "gt_index": gt_index, "labels": labels, "weight": weight}
    levels = parsed_levels(parse, cls_loss, beside, -1, "cls_loss", classes=False)

    def of_rows(*rows):
        return eager.isr_p_weight(*rows, k, bias, normalizer)

    return _over_rows(of_rows, levels, is_levels(cls_loss))


@check.by_name
def carl_loss(
    logits: Levels,
    labels: Levels,
    box_loss: Levels,
    *,
    k: float | Tensor = 1.0,
    bias: float | Tensor = 0.2,
    activation: str = "sigmoid",
    keep_loss: bool = False,
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Classification-aware regression loss: boxes count as much as their class is certain.

    .. math:: L = \frac{1}{avg} \sum_i \frac{v_i}{\frac{1}{P} \sum_j v_j} \, L^{box}_i, \quad
              v_i = ((1-b) p_i + b)^k

    p is the score of the labelled class; the sums run over the P positives. The gradient reaches
    the logits, through the mean too, and the box losses.

    Args:
        logits: ``(..., C)``, float16, bfloat16, float32 or float64.
        labels: integers ``(...)``: 0..C-1 marks a positive; C or -1 any other row. With softmax, C
            counts the columns: mark rows of a background column like other rows without object.
        box_loss: ``(...)``, or ``(..., D)`` to be summed over D; not read where not positive.
        k: power, >= 0.
        bias: b in [0, 1].
        activation: ``"sigmoid"`` or ``"softmax"``.
        keep_loss: rescale so that the value is that of the plain box losses.
        avg_factor: divisor, a value <= 0 counts as 1; None: the number of positives.
        class_dim: where logits has its classes, and a ``box_loss`` of D its D; with 1
            ``(B, C, H, W)`` is read in place.

    Logits may be a list of levels, with labels and box losses lists of the same length: the
    positives and the mean are those of all levels together.

    Returns:
        float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, -2.0], [0.0, 0.0]], requires_grad=True)
        >>> labels, box_loss = torch.tensor([0, 1, 2]), torch.tensor([0.4, 0.8, 0.0])
        >>> round(tritonloss.carl_loss(logits, labels, box_loss).item(), 4)
        0.4985

    Reference:
        Cao et al., Prime Sample Attention in Object Detection, CVPR 2020.
    """
    k = check.is_number("k", k, 0)
    bias = check.is_number("bias", bias, 0, 1)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if avg_factor is not None:
        avg_factor = (check.is_number("avg_factor", avg_factor),)

    def parse(logits, labels, box_loss):
        check_logits(logits)
        labels = parse_labels("labels", labels, logits, -1, logits.shape[-1])
        check.is_floating("box_loss", box_loss)
        if labels.shape not in (box_loss.shape, box_loss.shape[:-1]):
            raise ValueError(
                f"box_loss must have shape {tuple(labels.shape)} (logits without the classes), or "
                f"that and a last dimension; got {tuple(box_loss.shape)}"
            )
        check.on_device_of("box_loss", box_loss, "logits", logits)
        return logits, labels, box_loss

    levels = parsed_levels(parse, logits, {"labels": labels, "box_loss": box_loss}, class_dim)
    return eager.carl_loss(levels, k, bias, activation, keep_loss, avg_factor)
