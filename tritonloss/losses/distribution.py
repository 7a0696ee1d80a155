"""Distribution focal loss, and the expectation that turns distributions into box sides."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tritonloss import _checks as check
from tritonloss._dispatch import launchers
from tritonloss._levels import Levels, class_back, is_levels, parsed, parsed_one
from tritonloss._loss import Loss, OverLevels
from tritonloss._targets import parse_row_weight
from tritonloss.eager import _blocks
from tritonloss.eager import distribution as eager
from tritonloss.eager._entry import rows_that_count

kernels = launchers("distribution")
_loss = Loss(
    eager.distribution_focal,
    kernels.forward,
    kernels.backward,
    kernels.takes,
    of_finite=eager.distribution_focal_of_finite,
    by_blocks=eager.distribution_focal_by_blocks,
    has_blocks=lambda x, *args: _blocks.many(x, blocks=2),  # for the memory: no faster
    levels=OverLevels(3, 3, rows_that_count, kernels.forward_levels),
)
_distillation = Loss(
    eager.distillation,
    kernels.distillation,
    kernels.distillation_backward,
    kernels.takes,
    by_blocks=eager.distillation_by_blocks,
    levels=OverLevels(3, 3, rows_that_count, kernels.distillation_levels),
)
_expectation = Loss(
    eager.expectation,
    kernels.expectation,
    kernels.expectation_backward,
    kernels.takes,
    of_finite=eager.expectation_of_few,
    by_blocks=eager.expectation_by_blocks,
    has_blocks=_blocks.many,
)


def _check_target(logits, target, weight) -> None:
    last = logits.shape[-1] - 1
    if check.all_lie_in(target, 0, last):
        return
    inside = (target >= 0) & (target <= last)
    if weight is not None:
        inside = inside | ~(weight > 0)
    where = "" if weight is None else " wherever the weight is above 0"
    check.require(inside, f"target must lie in [0, {last}]{where}", target)


def _has_bins(logits) -> None:
    check.is_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"logits must have shape (..., n + 1) with n >= 1; got {tuple(logits.shape)}"
        )
    check.are_logits("logits", logits)


def _by_sides(logits: Tensor, sides: int) -> Tensor:
    """(..., sides * bins) -> (..., sides, bins), for more than one."""
    if isinstance(sides, bool) or not isinstance(sides, int) or sides < 1:
        raise ValueError(f"sides must be an int >= 1; got {sides!r}")
    check.is_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0 or logits.shape[-1] % sides:
        raise ValueError(
            f"logits must have shape (..., {sides} * (n + 1)) for sides = {sides}; "
            f"got {tuple(logits.shape)}"
        )
    # not unflatten: a graph that is made under a default device traces no such method
    bins = logits.shape[-1] // sides
    return logits if sides == 1 else logits.view(*logits.shape[:-1], sides, bins)


@check.by_name
def distribution_focal_loss(
    logits: Levels,
    target: Levels,
    *,
    sides: int = 1,
    weight: Levels | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Distribution focal loss: cross entropy with the two bins beside a real target.

    .. math:: L = -(l + 1 - y) \log S_l - (y - l) \log S_{l+1},
              \quad S = \mathrm{softmax}(x), \quad l = \min(\lfloor y \rfloor, n - 1)

    Args:
        logits: ``(..., n + 1)``, one per bin 0..n, n >= 1; float16, bfloat16, float32 or float64,
            any strides; or ``(..., sides * (n + 1))`` with the bins of a side together.
        target: ``(...)``, or ``(..., sides)`` for more than one side; floating, in [0, n]; n itself
            is valid. What lies outside is clamped, and is an error on the CPU (see
            ``TRITONLOSS_CHECK`` for a GPU).
        sides: number of distributions in the last dim; 4 for the rows of a box head.
        weight: of the target's shape; rows whose weight is not above 0 are removed from loss,
            gradient and divisor, whatever stands in them.
        reduction: ``"none"`` (one value per row), ``"sum"`` or ``"mean"``.
        avg_factor: number or 0-d tensor; with ``"mean"``, divide the sum by this; a value <= 0
            counts as 1. Without it, divide by the number of rows that have a weight above 0.
        class_dim: where logits has its bins; with 1 ``(B, n + 1, H, W)`` is read in place.

    Logits may be a list of levels, with target and weight lists of the same length: one result, as
    of all levels in one tensor; ``"none"`` gives a list.

    Returns:
        float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> logits = torch.tensor([[0.0, 2.0, 2.0, 0.0]])
        >>> loss = tritonloss.distribution_focal_loss(logits, torch.tensor([1.5]))
        >>> round(loss.item(), 4)
        0.8201

    Reference:
        Li et al., Generalized Focal Loss, NeurIPS 2020.
    """
    avg_factor = check.is_reduction(reduction, avg_factor)
    beside = {"target": target, "weight": weight}
    parse = partial(_parse, sides)
    return _loss.of(parse, logits, beside, (avg_factor, reduction), class_dim)


def _parse(sides, logits, target, weight) -> tuple:
    logits = _by_sides(logits, sides)
    _has_bins(logits)
    check.is_input("target", target, logits.shape[:-1], "one per row of logits", "logits", logits)
    weight = parse_row_weight(logits, weight)
    if check.values_checked(logits):
        _check_target(logits, target, weight)
    return logits, target, weight


@check.by_name
def distribution_distillation_loss(
    logits: Levels,
    teacher: Levels,
    *,
    temperature: float | Tensor = 5.0,
    weight: Levels | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    r"""Divergence of each distribution from a teacher's, both softened by a temperature.

    .. math:: L = T^2 \sum_k q_k (\log q_k - \log p_k), \quad
              q = \mathrm{softmax}(t / T), \quad p = \mathrm{softmax}(x / T)

    D-FINE's decoupled distillation focal loss takes it with T = 5, the last decoder layer as the
    teacher and the best class score of each query, or its IoU where it is matched, as the weight.

    Args:
        logits: ``(..., n + 1)``, one per bin, n >= 1; float16, bfloat16, float32 or float64, any
            strides. -inf masks a bin, but not one that the teacher gives a probability: NaN.
        teacher: logits of the same shape, floating; they get no gradient.
        temperature: T > 0, a number or a 0-d tensor.
        weight: ``(...)``; rows whose weight is not above 0 are removed from loss, gradient and
            divisor, whatever stands in them.
        reduction: ``"none"`` (one value per row), ``"sum"`` or ``"mean"``.
        avg_factor: number or 0-d tensor; with ``"mean"``, divide the sum by this; a value <= 0
            counts as 1. Without it, divide by the number of rows that have a weight above 0.
        class_dim: where both have their bins; with 1 ``(B, n + 1, H, W)`` is read in place.

    Logits may be a list of levels, with teacher and weight lists of the same length: one result, as
    of all levels in one tensor; ``"none"`` gives a list.

    Returns:
        float32 (float64 for float64 logits); computed in it, too.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> logits, teacher = torch.tensor([[0.0, 5.0, 0.0]]), torch.tensor([[0.0, 0.0, 5.0]])
        >>> loss = tritonloss.distribution_distillation_loss(logits, teacher)
        >>> round(loss.item(), 4)
        9.1044

    Reference:
        Peng et al., D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution
        Refinement, ICLR 2025.
    """
    temperature = check.is_number("temperature", temperature, 0, open_low=True)
    avg_factor = check.is_reduction(reduction, avg_factor)
    beside = {"teacher": teacher, "weight": weight}
    common = (avg_factor, (temperature,), reduction)
    return _distillation.of(_parse_pair, logits, beside, common, class_dim)


def _parse_pair(logits, teacher, weight) -> tuple:
    _has_bins(logits)
    check.is_input("teacher", teacher, logits.shape, "as logits", "logits", logits)
    return logits, teacher, parse_row_weight(logits, weight)


@check.by_name
def distribution_expectation(logits: Levels, *, sides: int = 1, class_dim: int = -1) -> Tensor:
    r"""Mean bin of each distribution: what a head that was trained with DFL predicts.

    .. math:: \sum_{k=0}^{n} k \, \mathrm{softmax}(x)_k

    Args:
        logits: ``(..., n + 1)``, or ``(..., sides * (n + 1))`` with the bins of a side together;
            float16, bfloat16, float32 or float64, any strides.
        sides: number of distributions in the last dim; 4 for a box.
        class_dim: the dim in place of the last one; ``(B, 4 * (n + 1), H, W)`` has 1, and the
            result ``(B, 4, H, W)``.

    Logits may be a list of levels, and so is the result then.

    Returns:
        float32 (float64 for float64 logits): ``(...)`` for one side, else ``(..., sides)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.

    Example:
        >>> import torch, tritonloss
        >>> logits = torch.tensor([[5.0, 5.0, 5.0, 0.0, 0.0, 90.0]])
        >>> sides = tritonloss.distribution_expectation(logits, sides=2)
        >>> [round(v, 4) for v in sides[0].tolist()]
        [1.0, 2.0]

    Reference:
        Li et al., Generalized Focal Loss, NeurIPS 2020.
    """

    def parse(logits):
        by_sides = _by_sides(logits, sides)
        check.are_logits("logits", logits)
        return logits, by_sides

    def means(level):
        last, by_sides = level
        means = _expectation(by_sides)
        return means if sides == 1 else class_back(means, class_dim, last)

    if is_levels(logits):
        return [means(level) for level in parsed(parse, logits, {}, class_dim)]
    return means(parsed_one(parse, logits, (), class_dim))
