"""Losses with one value per logit, the general form behind them, and class-balanced weights.

CONTRIBUTING.md says what it takes to add one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonloss import _checks as check
from tritonloss._dispatch import launchers
from tritonloss._levels import Levels, LevelTargets
from tritonloss._loss import Loss, OverLevels
from tritonloss._targets import (
    check_logits,
    parse_class_weight,
    parse_targets,
    parse_weight,
)
from tritonloss.eager import pointwise as eager

kernels = launchers("pointwise")
_loss = Loss(
    eager.pointwise,
    kernels.forward,
    kernels.backward,
    kernels.takes,
    by_blocks=eager.pointwise_by_blocks,
    has_blocks=eager.has_blocks,
    levels=OverLevels(5, 6, eager.counted, kernels.forward_levels),
)


def evaluate(
    kind, logits, targets, params, weight, class_weight, ignore_index, reduction, avg_factor,
    class_dim, prepared=lambda logits, targets: targets,
):  # fmt: skip
    """Checks and call: the same for every pointwise loss of logits.

    ``prepared(logits, targets)``: the ``Targets`` that the formula takes for those given.
    """
    avg_factor = check.is_reduction(reduction, avg_factor)
    params = (*params, 0.0, 0.0, 0.0)[:4]  # as many as the kernel reads

    def parse(logits, targets, weight):
        check_logits(logits)
        weight = parse_weight(logits, weight)
        targets = prepared(logits, parse_targets(logits, targets, ignore_index, weight))
        return logits, *targets, weight, parse_class_weight(logits, class_weight)

    common = (avg_factor, params, kind, ignore_index, reduction)
    return _loss.of(parse, logits, {"targets": targets, "weight": weight}, common, class_dim)


def by_layer(kind: str, logits: Tensor, labels: Tensor, quality, params: tuple, divisor) -> Tensor:
    """The sums of each entry of the first dim, divided, in one call: ``(L,)``.

    Arguments and parameters are known to be right.
    """
    labels = labels.contiguous()
    quality = None if quality is None else quality.contiguous()
    params = (*params, 0.0, 0.0, 0.0)[:4]
    return _loss(logits, labels, quality, None, None, None, (divisor,), params, kind, -1, "layers")


def balance(alpha) -> tuple:
    """``(weight of y = 1, weight of y = 0)``."""
    if alpha is None:
        return 1.0, 1.0
    if isinstance(alpha, (int, float)) and alpha == -1:
        raise ValueError("alpha must lie in [0, 1], and None turns balancing off; got -1")
    alpha = check.is_number("alpha", alpha, 0, 1)
    return alpha, 1 - alpha


@check.by_name
def sigmoid_focal_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    alpha: float | Tensor | None = 0.25,
    gamma: float | Tensor = 2.0,
    label_smoothing: float | Tensor = 0.0,
    class_weight: Tensor | None = None,
    weight: Levels | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Focal loss: cross entropy that lets easy logits count little.

    .. math:: L = \alpha_t (1-p_t)^\gamma \, \mathrm{BCE}(x, y), \quad p_t = p y + (1-p)(1-y),
              \quad \alpha_t = \alpha y + (1-\alpha)(1-y)

    With label smoothing s the cross entropy alone is that with :math:`y (1 - s) + s / 2`.

    Args:
        logits: ``(..., C)``, float16, bfloat16, float32 or float64, any strides.
        targets: integer labels ``(...)``, C for background; or a pair ``(labels, quality)``, whose
            quality is the soft target at the labelled class; or a floating tensor ``(..., C)``
            with a (soft) target in [0, 1] per logit.
        alpha: weight of positives in [0, 1]; None turns balancing off.
        gamma: focusing power, >= 0; 0 is (balanced) cross entropy.
        label_smoothing: s in [0, 1), as EfficientDet has it. Every negative then has a loss.
        class_weight: ``(C,)``, scales the columns.
        weight: ``(...)`` per anchor or ``(..., C)`` per logit; elements whose weight is not above 0
            are removed from loss, gradient and divisor.
        ignore_index: label whose rows contribute exactly 0.
        reduction: ``"none"`` (one value per logit), ``"sum"`` or ``"mean"``.
        avg_factor: with ``"mean"``, divide the sum by this; a value <= 0 counts as 1. Without it,
            divide by the number of logits that are not ignored and have a weight above 0.
        class_dim: where the logits have their classes; with 1 a head's ``(B, C, H, W)`` is read in
            place, beside labels ``(B, H, W)``.

    Logits may be a list of levels, as a head returns them. Targets and weight are lists of the same
    length then, a pair two lists, and the result is that of all levels in one tensor, with one
    divisor; ``"none"`` gives a list. Levels are read in place, and none is copied.

    Hyper-parameters and avg_factor may be numbers or 0-d tensors; tensors are not read on the host.

    Returns:
        float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> logits = torch.tensor([[2.0, -1.0], [0.5, -3.0]], requires_grad=True)
        >>> loss = tritonloss.sigmoid_focal_loss(logits, torch.tensor([0, 2]), avg_factor=1)
        >>> round(loss.item(), 4)
        0.3006

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017.
    """
    gamma = check.is_number("gamma", gamma, 0)
    params = (*balance(alpha), gamma)
    kind = "focal"
    if isinstance(label_smoothing, Tensor) or label_smoothing != 0:
        label_smoothing = check.is_number("label_smoothing", label_smoothing, 0, 1, open_high=True)
        kind, params = "focal_smoothed", (*params, label_smoothing)
    rest = (weight, class_weight, ignore_index, reduction, avg_factor, class_dim)
    return evaluate(kind, logits, targets, params, *rest)


@check.by_name
def focal_star_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    gamma: float | Tensor = 2.0,
    beta: float | Tensor = 1.0,
    alpha: float | Tensor | None = None,
    class_weight: Tensor | None = None,
    weight: Levels | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""FL*: the focal loss' steeper and shifted relative.

    .. math:: L = y f(x) + (1-y) f(-x), \quad f(x) = -\log \sigma(\gamma x + \beta) / \gamma

    Args:
        gamma: steepness, > 0.
        beta: shift, any finite number.
        alpha: weight of positives in [0, 1]; None turns balancing off.

    The other arguments, result and errors are those of :func:`sigmoid_focal_loss`.

    Example:
        >>> import torch, tritonloss
        >>> loss = tritonloss.focal_star_loss(torch.zeros(1, 1), torch.tensor([0]), gamma=1, beta=0)
        >>> round(loss.item(), 4)
        0.6931

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, appendix A.
    """
    gamma = check.is_number("gamma", gamma, 0, open_low=True)
    beta = check.is_number("beta", beta)
    params = (*balance(alpha), gamma, beta)
    rest = (weight, class_weight, ignore_index, reduction, avg_factor, class_dim)
    return evaluate("focal_star", logits, targets, params, *rest)


@check.by_name
def quality_focal_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    beta: float | Tensor = 2.0,
    class_weight: Tensor | None = None,
    weight: Levels | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Quality focal loss: the score of the labelled class learns the quality of its box.

    .. math:: L = |y - p|^\beta \, \mathrm{BCE}(x, y)

    y is the quality (usually the IoU of the predicted box) at the labelled class, 0 elsewhere. The
    gradient flows through the modulating factor.

    Args:
        targets: a pair ``(labels, quality)``, integers and values in [0, 1] of shape ``(...)``; or
            labels alone (quality 1); or a floating tensor ``(..., C)``.
        beta: focusing power, >= 0.

    The other arguments, result and errors are those of :func:`sigmoid_focal_loss`.

    Example:
        >>> import torch, tritonloss
        >>> targets = torch.tensor([1, 2]), torch.tensor([0.5, 0.0])
        >>> loss = tritonloss.quality_focal_loss(torch.zeros(2, 2), targets, reduction="none")
        >>> [[round(v, 3) for v in row] for row in loss.tolist()]
        [[0.173, 0.0], [0.173, 0.173]]

    Reference:
        Li et al., Generalized Focal Loss, NeurIPS 2020.
    """
    beta = check.is_number("beta", beta, 0)
    rest = (weight, class_weight, ignore_index, reduction, avg_factor, class_dim)
    return evaluate("quality", logits, targets, (beta,), *rest)


@check.by_name
def varifocal_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    alpha: float | Tensor = 0.75,
    gamma: float | Tensor = 2.0,
    iou_weighted: bool = True,
    detach_weight: bool = False,
    class_weight: Tensor | None = None,
    weight: Levels | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Varifocal loss: negatives are focused, positives weigh what their box is worth.

    .. math:: L = y \, \mathrm{BCE}(x, y) \ \text{(positive)}, \quad
              \alpha p^\gamma \, \mathrm{BCE}(x, 0) \ \text{(negative)}

    Args:
        targets: a pair ``(labels, quality)``: positive is what the label says, a positive of
            quality 0 weighs 0; or labels alone (quality 1); or a floating tensor ``(..., C)``,
            where positive is y > 0.
        alpha: weight of negatives, >= 0.
        gamma: focusing power, >= 0.
        iou_weighted: False gives every positive the weight 1 instead of y.
        detach_weight: do not differentiate :math:`p^\gamma`. Same value, other gradient: RT-DETR
            and D-FINE detach it, mmdetection does not.

    The other arguments, result and errors are those of :func:`sigmoid_focal_loss`.

    Example:
        >>> import torch, tritonloss
        >>> targets = torch.tensor([0]), torch.tensor([0.5])
        >>> loss = tritonloss.varifocal_loss(torch.zeros(1, 2), targets, reduction="none")
        >>> [round(v, 3) for v in loss[0].tolist()]
        [0.347, 0.13]

    Reference:
        Zhang et al., VarifocalNet: An IoU-aware Dense Object Detector, CVPR 2021.
    """
    alpha = check.is_number("alpha", alpha, 0)
    gamma = check.is_number("gamma", gamma, 0)
    params = (alpha, gamma, float(iou_weighted), float(detach_weight))
    rest = (weight, class_weight, ignore_index, reduction, avg_factor, class_dim)
    return evaluate("varifocal", logits, targets, params, *rest)


@check.by_name
def asymmetric_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    gamma_pos: float | Tensor = 1.0,
    gamma_neg: float | Tensor = 4.0,
    margin: float | Tensor = 0.05,
    class_weight: Tensor | None = None,
    weight: Levels | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Asymmetric loss: negatives are focused more than positives, and the easiest are dropped.

    .. math:: L = -y \, (1-p)^{\gamma_+} \log p - (1-y) \, p_m^{\gamma_-} \log(1-p_m),
              \quad p_m = \max(p - m, 0)

    The gradient flows through the modulating factors.

    Args:
        gamma_pos: focusing power of positives, >= 0.
        gamma_neg: focusing power of negatives, >= 0.
        margin: m, in [0, 1): a negative whose score is not above it costs nothing.

    The other arguments, result and errors are those of :func:`sigmoid_focal_loss`.

    Example:
        >>> import torch, tritonloss
        >>> logits = torch.tensor([[0.0, 0.0, -4.0]])
        >>> loss = tritonloss.asymmetric_loss(logits, torch.tensor([0]), reduction="none")
        >>> [round(v, 4) for v in loss[0].tolist()]
        [0.3466, 0.0245, 0.0]

    Reference:
        Ridnik et al., Asymmetric Loss For Multi-Label Classification, ICCV 2021.
    """
    gamma_pos = check.is_number("gamma_pos", gamma_pos, 0)
    gamma_neg = check.is_number("gamma_neg", gamma_neg, 0)
    margin = check.is_number("margin", margin, 0, 1, open_high=True)
    params = (gamma_pos, gamma_neg, margin)
    rest = (weight, class_weight, ignore_index, reduction, avg_factor, class_dim)
    return evaluate("asymmetric", logits, targets, params, *rest)


@check.by_name
def gaussian_focal_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    alpha: float | Tensor = 2.0,
    beta: float | Tensor = 4.0,
    class_weight: Tensor | None = None,
    weight: Levels | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Focal loss on heat maps: what lies beside a peak is a negative that counts less.

    .. math:: L = (1-p)^\alpha \, \mathrm{BCE}(x, 1) \ (y = 1), \quad
              (1-y)^\beta \, p^\alpha \, \mathrm{BCE}(x, 0) \ (y < 1)

    Args:
        targets: a floating tensor ``(..., C)``, the heat map: 1 at the centre of an object, a
            Gaussian around it, 0 elsewhere; or integer labels, which give the peaks alone.
        alpha: focusing power, >= 0.
        beta: how fast a negative counts again with its distance from the peak, >= 0.
        avg_factor: the number of objects, as the paper has it.

    The other arguments, result and errors are those of :func:`sigmoid_focal_loss`. A peak is a
    target of exactly 1.

    Example:
        >>> import torch, tritonloss
        >>> heat = torch.tensor([[1.0], [0.5], [0.0]])
        >>> loss = tritonloss.gaussian_focal_loss(torch.zeros(3, 1), heat, reduction="none")
        >>> [round(v, 4) for v in loss.squeeze(1).tolist()]
        [0.1733, 0.0108, 0.1733]

    Reference:
        Zhou et al., Objects as Points, 2019; Law and Deng, CornerNet, ECCV 2018.
    """
    alpha = check.is_number("alpha", alpha, 0)
    beta = check.is_number("beta", beta, 0)
    rest = (weight, class_weight, ignore_index, reduction, avg_factor, class_dim)
    return evaluate("gaussian", logits, targets, (alpha, beta), *rest)


def parse_regression(pred, target, weight) -> tuple:
    """``(pred, labels, quality, dense, weight)``."""
    check_logits(pred, "pred")
    check.is_input("target", target, pred.shape, "as pred", "pred", pred)
    return pred, None, None, target, parse_weight(pred, weight)


@check.by_name
def authentic_smooth_l1_loss(
    pred: Levels,
    target: Levels,
    *,
    mu: float | Tensor = 0.02,
    weight: Levels | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Authentic smooth L1: quadratic near 0, linear far away, all derivatives continuous.

    .. math:: L = \sqrt{d^2 + \mu^2} - \mu, \quad d = pred - target

    Args:
        pred: ``(..., D)``, float16, bfloat16, float32 or float64, any strides.
        target: shape of ``pred``.
        mu: half-width of the quadratic part, > 0.
        weight: ``(...)`` per box or ``(..., D)`` per coordinate; elements whose weight is not above
            0 are removed from loss, gradient and divisor.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``.
        avg_factor: with ``"mean"``, divide the sum by this; a value <= 0 counts as 1.

    Returns:
        float32 (float64 for float64 predictions).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> pred, target = torch.tensor([[0.03, -1.0]]), torch.tensor([[0.0, 0.0]])
        >>> loss = tritonloss.authentic_smooth_l1_loss(pred, target, mu=0.04, reduction="none")
        >>> [round(v, 4) for v in loss[0].tolist()]
        [0.01, 0.9608]

    Reference:
        Li et al., Gradient Harmonized Single-stage Detector, AAAI 2019.
    """
    mu = check.is_number("mu", mu, 0, open_low=True)
    avg_factor = check.is_reduction(reduction, avg_factor)
    common = (None, avg_factor, (mu, 0.0, 0.0, 0.0), "asl1", -1, reduction)
    beside = {"target": target, "weight": weight}
    return _loss.of(parse_regression, pred, beside, common, class_dim, "pred")


@check.by_name
def generalized_focal_loss(
    x_left: Tensor,
    x_right: Tensor,
    y: Tensor,
    y_left: float | Tensor,
    y_right: float | Tensor,
    *,
    beta: float | Tensor,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    r"""The general form behind focal, quality focal and distribution focal loss.

    .. math:: L = -|y - (y_l p_l + y_r p_r)|^\beta
              \left( (y_r - y) \log p_l + (y - y_l) \log p_r \right),
              \quad (p_l, p_r) = \mathrm{softmax}(x_l, x_r)

    It is plain torch on every backend: a form to derive losses from, not one to train with.
    With :math:`x_l = 0, y_l = 0, y_r = 1` it is the quality focal loss of :math:`x_r`, and for hard
    y the focal loss; with :math:`\beta = 0` and neighbouring bins the distribution focal loss.

    Args:
        x_left, x_right: logits of the two values, of one shape; any floating dtype and strides.
        y: the target, same shape, between y_left and y_right.
        y_left, y_right: the two values, y_left < y_right: numbers or tensors of that shape.
        beta: focusing power, >= 0.
        reduction: ``"none"`` (one value per pair), ``"sum"`` or ``"mean"``.
        avg_factor: number or 0-d tensor; with ``"mean"``, divide the sum by this; a value <= 0
            counts as 1.

    Returns:
        float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> x, zero = torch.tensor([0.4]), torch.zeros(1)
        >>> y = torch.tensor([0.7])
        >>> loss = tritonloss.generalized_focal_loss(zero, x, y, 0, 1, beta=2)
        >>> qfl = tritonloss.quality_focal_loss(x, y)
        >>> torch.allclose(loss, qfl)
        True

    Reference:
        Li et al., Generalized Focal Loss, NeurIPS 2020.
    """
    check.is_floating("x_left", x_left)
    check.is_floating("x_right", x_right)
    check.has_shape("x_right", x_right, x_left.shape, "as x_left")
    check.on_device_of("x_right", x_right, "x_left", x_left)
    beta = check.is_number("beta", beta, 0)
    avg_factor = check.is_reduction(reduction, avg_factor)
    values = {"y": y, "y_left": y_left, "y_right": y_right}
    for name, value in values.items():
        if name == "y" or isinstance(value, Tensor):
            check.is_input(name, value, x_left.shape, "as x_left", "x_left", x_left)
        else:
            values[name] = check.is_number(name, value)
    y, y_left, y_right = values.values()
    if check.values_checked(x_left):
        left, right = (torch.as_tensor(v, device=x_left.device) for v in (y_left, y_right))
        check.require(left < right, "y_left must be below y_right", left.expand_as(left < right))
        ordered = (y_left <= y) & (y <= y_right)
        check.require(ordered, "y must lie between y_left and y_right", y)
    return eager.generalized_focal(x_left, x_right, y, y_left, y_right, beta, reduction, avg_factor)


@check.by_name
def class_balanced_weight(
    samples_per_class: Tensor, *, beta: float = 0.9999, normalize: bool = True
) -> Tensor:
    r"""Class weights by the effective number of samples.

    .. math:: w_c = (1-\beta) / (1-\beta^{n_c})

    A weight is for whole rows, by the class of the row: ``weight = w[label]``, and 1 for
    background. Scaling the columns of the logits, as ``class_weight`` does, is something else.

    Args:
        samples_per_class: ``(C,)``, the number of samples of each class; a class with none gets
            weight 0.
        beta: in [0, 1); 0 weights all classes alike, towards 1 the weight becomes 1 / n.
        normalize: scale the weights so that they sum to C.

    Returns:
        float32 ``(C,)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.

    Example:
        >>> import torch, tritonloss
        >>> w = tritonloss.class_balanced_weight(torch.tensor([30, 100, 25]), beta=0.999)
        >>> [round(v, 3) for v in w.tolist()]
        [1.196, 0.372, 1.432]
        >>> labels = torch.tensor([0, 2, 3])  # 3 is background
        >>> weight = torch.cat([w, w.new_ones(1)])[labels]
        >>> loss = tritonloss.sigmoid_focal_loss(torch.zeros(3, 3), labels, weight=weight)

    Reference:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019.
    """
    check.is_tensor("samples_per_class", samples_per_class)
    if samples_per_class.dtype.is_complex or samples_per_class.dtype == torch.bool:
        raise TypeError("samples_per_class must be an integer or floating tensor")
    if samples_per_class.dim() != 1:
        raise ValueError(
            f"samples_per_class must have shape (C,); got {tuple(samples_per_class.shape)}"
        )
    beta = check.is_number("beta", beta, 0, 1, open_high=True)
    if isinstance(beta, Tensor):
        raise TypeError("beta must be a number; got a tensor")
    if check.values_checked(samples_per_class):
        valid = samples_per_class >= 0
        check.require(valid, "samples_per_class must be >= 0", samples_per_class)
    check.float64_beside("samples_per_class", samples_per_class)
    return eager.class_balanced_weight(samples_per_class, beta, normalize)
