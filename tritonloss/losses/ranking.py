"""Average Precision loss, aLRP loss, Rank & Sort loss, and the self-balanced weight.

Their gradients are error-driven: designed from the ranking error, not derived from the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from tritonloss import _checks as check
from tritonloss import _op
from tritonloss._dispatch import _transforms_active, launchers
from tritonloss._levels import Levels, LevelTargets, joined, parsed_levels
from tritonloss._loss import WholeBatch
from tritonloss._targets import check_logits, parse_targets, parse_weight
from tritonloss.distributed import (
    KernelExchange,
    ProcessGroup,
    Sharing,
    group_of,
    parse_sharing,
    scaled_gradient,
    valued,
)
from tritonloss.eager import ranking as eager

kernels = launchers("ranking")


def _two_parts(loss: tuple) -> TypeError:
    names = " and ".join(loss._fields)
    return TypeError(f"the loss has two parts, {names}: call sum(loss).backward()")


class RankSort(NamedTuple):
    """The two parts of Rank & Sort, each with its own gradient; their sum is the paper's loss."""

    rank: Tensor
    sort: Tensor

    def backward(self) -> None:
        raise _two_parts(self)


class ALRP(NamedTuple):
    """The two parts of aLRP; their sum is the paper's loss."""

    cls: Tensor
    loc: Tensor

    def backward(self) -> None:
        raise _two_parts(self)


for parts in (RankSort, ALRP):  # torch.export writes no tuple without a name
    _pytree._register_namedtuple(parts, serialized_type_name=f"tritonloss.{parts.__name__}")

# The eager engine: its shapes depend on the number of positives, so it cannot be traced.


def _fake_eager(x, labels, value, dense, weight, group, delta, loss, *args):
    def empty(shape):
        return x.new_empty(shape, dtype=eager.result_dtype(x))

    need_grad = args[-1]
    second = (dense if labels is None else labels).shape
    return (
        empty(()),
        empty(()),
        empty(x.shape[:-1] if loss == "alrp" else 0),
        torch.empty_like(x, dtype=eager.result_dtype(x)) if need_grad else empty(0),
        empty(second if loss == "rank_sort" and need_grad else 0),
    )


@_op.opaque(_fake_eager)
def ranking_eager(
    x: Tensor,
    labels: Tensor | None,
    value: Tensor | None,
    dense: Tensor | None,
    weight: Tensor | None,
    group: Tensor | None,
    delta: Tensor,
    loss: str,
    ignore_index: int,
    num_groups: int,
    process_group: str,
    capacity: int,
    scale: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return eager.ranking(
        x, labels, value, dense, weight, group, delta, loss, ignore_index, num_groups,
        process_group, capacity, scale, need_grad,
    )  # fmt: skip


def _backward_eager(first_grad, second_grad, grad, sort_grad, x, labels, value, dense, weight,
                    group, delta, loss, *args):  # fmt: skip
    grad = grad * first_grad
    if loss == "rank_sort":
        sort_grad = sort_grad * second_grad
        if labels is None:
            grad = grad.add_(sort_grad)
        else:
            column = labels.long().clamp(0, x.shape[-1] - 1)  # sort_grad is 0 at other labels
            grad = grad.scatter_add_(-1, column[..., None], sort_grad[..., None])
    return grad.to(x.dtype)


_by_engine = _op.differentiable(ranking_eager, _backward_eager, None, outputs=3, constants=1)


def _as_one(levels: list[tuple]) -> tuple[Sequence, list[int] | None]:
    """The levels as one tensor (B, rows, C) and what lies beside it, and how many rows each has.

    The eager engine sorts logits into lists, and reads a copy of them anyway.
    """
    if len(levels) == 1:
        return levels[0][:6], None
    return joined([
        (*level, None if group is None else group.expand(level[0].shape))
        for *level, group, _ in levels
    ])  # fmt: skip


def _eager(levels, delta, *args):
    (delta,) = delta
    (x, *beside), sizes = _as_one(levels)
    check.holds_values("logits", x)
    if _op.traced(x):
        if not isinstance(delta, Tensor):
            # an op's float would recompile the graph at each new value
            delta = torch.full((), delta, dtype=torch.float64, device="cpu")
        beside = _op.distinct(x, beside)
    need_grad = x.requires_grad and torch.is_grad_enabled()
    first, second, coefficient = _by_engine(x, *beside, delta, *args, need_grad)
    if sizes and coefficient.dim() > 1:  # level after level
        return first, second, torch.cat([c.flatten() for c in coefficient.split(sizes, 1)])
    return first, second, coefficient.reshape(-1)


def _fake_shared(x, labels, value, dense, weight, group, start, delta, loss, ignore_index,
                 num_groups, process_group, capacity, scale):  # fmt: skip
    room = group_of(process_group).size() * capacity
    first = x[0].new_empty((), dtype=torch.float32)
    rows = sum(math.prod(level.shape[:-1]) for level in x) if loss == "alrp" else 0
    coefficient = first.new_empty(rows)
    counter = x[0].new_empty(2, dtype=torch.int64)
    scratch = kernels.scratch_of(x[0], room, False, num_groups, counter)
    return first, torch.empty_like(first), coefficient, *scratch


@_op.opaque(_fake_shared)
def ranking_forward_shared(
    x: list[Tensor],
    labels: list[Tensor],
    value: list[Tensor],
    dense: list[Tensor],
    weight: list[Tensor],
    group: list[Tensor],
    start: list[int],
    delta: Tensor,
    loss: str,
    ignore_index: int,
    num_groups: int,
    process_group: str,
    capacity: int,
    scale: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``kernels.forward`` with exchanges between its kernels."""
    settings = eager.settings(
        "triton", x[0], labels or None, value or None, delta[0], loss, ignore_index, num_groups
    )
    exchange = KernelExchange(Sharing(process_group, capacity, scale), settings)
    return kernels.launch(
        x, labels, value, dense, weight, group, start, delta, loss, ignore_index, num_groups,
        exchange,
    )  # fmt: skip


def _family(engine, forward, **options) -> WholeBatch:
    return WholeBatch(
        engine, forward, kernels.backward, kernels.takes, 7, outputs=3, constants=1, **options
    )


_loss = _family(lambda *args: _eager(*args, *Sharing()), kernels.forward)
_shared = _family(_eager, ranking_forward_shared, empty=True)


class _Inputs(NamedTuple):
    """Checked arguments that all ranking losses share."""

    levels: list[tuple]  # logits, labels, quality, dense, weight, group, localisation error
    delta: float | Tensor
    ignore_index: int
    num_groups: int
    sharing: Sharing


def _parse(
    logits, targets, delta, weight, ignore_index, group, num_groups, process_group, capacity,
    gradients_averaged, class_dim, **more,
) -> _Inputs:  # fmt: skip
    if _transforms_active():
        raise RuntimeError(
            "ranking losses have an error-driven gradient, which is no derivative of their value: "
            "torch.func transforms (vmap, grad, jvp) and forward-mode AD do not apply to them"
        )
    delta = check.is_number("delta", delta, 0)
    if group is None and num_groups is not None:
        raise ValueError(f"num_groups counts the ids of group; got {num_groups} without group")

    def parse(logits, targets, weight, group, *error):
        check_logits(logits)
        check.float64_beside("logits", logits)
        weight = parse_weight(logits, weight)
        targets = parse_targets(logits, targets, ignore_index, weight, dense_low=-torch.inf)
        for value in error:
            _check_error(logits, value)
        return logits, *targets, weight, _parse_group(logits, group, num_groups), *error

    beside = {"targets": targets, "weight": weight, "group": group, **more}
    levels = parsed_levels(parse, logits, beside, class_dim)
    sharing = parse_sharing(process_group, gradients_averaged, capacity)
    return _Inputs(levels, delta, ignore_index, num_groups or 1, sharing)


def _check_error(logits: Tensor, error) -> None:
    name, meaning = "localization_error", "one per anchor: logits without the classes"
    check.is_floating(name, error)
    check.has_shape(name, error, logits.shape[:-1], meaning)
    check.on_device_of(name, error, "logits", logits)


def _run(loss: str, inputs: _Inputs):
    """``(first value, second value, coefficient)``."""
    found, delta, ignore_index, num_groups, sharing = inputs
    levels, start = [], 0
    for logits, labels, value, dense, weight, group, *error in found:
        if loss != "rank_sort":
            value = error[0].detach().contiguous() if error else None
        levels.append((logits, labels, value, dense, weight, group, start))
        start += (dense if labels is None else labels).numel()
    args = levels, (delta,), loss, ignore_index, num_groups
    if not sharing.group:
        return _loss(*args)
    if not sharing.capacity and _op.traced(levels[0][0]) and _shared.by_kernels(*args):
        raise RuntimeError(
            "capacity must be a number of positives to compile the kernels with process_group: a "
            "graph cannot hold the sizes that the processes agree on at each call; got None"
        )
    return _shared(*args, *sharing)


def _parse_group(logits: Tensor, group: Tensor | None, num_groups: int | None) -> Tensor | None:
    if group is None:
        return None
    check.is_integer("group", group)
    check.on_device_of("group", group, "logits", logits)
    if not isinstance(num_groups, int) or isinstance(num_groups, bool) or num_groups < 1:
        raise ValueError(
            f"num_groups must be a positive int, the number of lists in group; got {num_groups!r}"
        )
    sizes = zip(reversed(group.shape), reversed(logits.shape), strict=False)
    if group.dim() > logits.dim() or any(g not in (1, x) for g, x in sizes):
        raise ValueError(
            f"group must broadcast to the logits' shape {tuple(logits.shape)}; got "
            f"{tuple(group.shape)}"
        )
    if group.dtype not in (torch.int32, torch.int64):
        group = group.long()  # a narrow one may not hold num_groups
    if check.values_checked(logits):
        wide = group.long()
        check.require(
            (wide >= 0) & (wide < num_groups),
            f"group must lie in 0..{num_groups - 1} (num_groups - 1)",
            group,
        )
    return group


@check.by_name
def rank_sort_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    delta: float | Tensor = 0.5,
    weight: Levels | None = None,
    ignore_index: int = -1,
    group: Levels | None = None,
    num_groups: int | None = None,
    process_group: ProcessGroup | None = None,
    capacity: int | None = None,
    gradients_averaged: bool = False,
    class_dim: int = -1,
) -> RankSort:
    r"""Rank & Sort loss: rank positives above negatives, and sort positives by quality.

    .. math::
        \mathrm{rank} = \frac{1}{P} \sum_{i \in P} \frac{FP_i}{rank_i}, \quad
        \mathrm{sort} = \frac{1}{P} \sum_{i \in P} \Big(
            \frac{\sum_{j \in P} H_{ij} (1 - y_j)}{\sum_{j \in P} H_{ij}}
          - \frac{\sum_{j \in P, y_j \ge y_i} H_{ij} (1 - y_j)}{\sum_{j \in P, y_j \ge y_i} H_{ij}}
        \Big)

    with :math:`H_{ij} = H(s_j - s_i)`, the step :math:`H(x) = \mathrm{clamp}(x / 2\delta + 1/2,
    0, 1)`, :math:`FP_i = \sum_{j \in N} H_{ij}` and :math:`rank_i = \sum_{j \in P} H_{ij} + FP_i`.

    The whole tensor is one list, or every ``group`` is a list of its own and the result is the mean
    over the lists that have a positive. The result is exact for every delta. Each output carries
    its own gradient; that of the sum is the published one. Without positives both are 0.

    Args:
        logits: ``(..., C)``, float16, bfloat16, float32 or float64, any strides.
        targets: a pair ``(labels, quality)``, labels ``(...)`` with C for background and the
            quality in [0, 1] (usually the box's IoU) of shape ``(...)``; or labels alone (quality
            1); or a floating tensor ``(..., C)``: > 0 the quality of a positive, 0 background, < 0
            ignored.
        delta: half-width of the step in logits, >= 0; with 0 ties count as misranked.
        weight: ``(...)`` or ``(..., C)``, a mask: entries not above 0 are removed.
        ignore_index: label whose rows are removed.
        group: integers that broadcast to the logits, the list of each logit: ``(B, 1, 1)`` per
            image, ``(C,)`` per class.
        num_groups: number of lists; ids are 0..num_groups-1.
        process_group: processes that share one batch, each with its own anchors (none is fine): the
            loss is that of the whole batch, the same bits in all of them, and the gradient is the
            logits' own part of the whole batch's. All must call. None: this process alone.
        capacity: room for the positives of one process, the same in all. Without it they agree on
            the size at each call, for which the host reads a few numbers; with it a GPU is not
            waited for, and more positives make the loss NaN in all processes and raise at the next
            call. Compiling the kernels together with ``process_group`` needs it.
        gradients_averaged: True where the trainer averages gradients over the processes, as
            DistributedDataParallel does: the gradient, not the value, is multiplied by their
            number. False where it sums them.
        class_dim: where the logits have their classes; with 1 ``(B, C, H, W)`` is read in place. A
            group with as many dims has them there too, and one with fewer broadcasts as if they
            came last.

    Logits may be a list of levels, with targets, weight and group (and aLRP's error) lists of the
    same length, a pair two lists: all levels are ranked together. The kernels read each in place;
    the eager path puts them side by side.

    On a GPU the eager path reads the number of positives on the host; the Triton path does not,
    but for the sizes above.

    Returns:
        ``RankSort(rank, sort)``, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or one that
            differs between processes (named in all of them).
        RuntimeError: under torch.func transforms, or differentiated twice; or a process left,
            raised, or did not call within the group's timeout.

    Several processes:
        A logit is w x, w = 1. Process 0 has a positive with x = 1, process 1 a negative with x = 4:
        both get rank = 2/3 at delta 0.5, with the gradient -2/3 in the logit of process 0 and +2/3
        in that of process 1. One process with both has dL/dw = -2/3 + 4 * 2/3 = 2, the sum of what
        the two find. DistributedDataParallel takes the mean, 1; with ``gradients_averaged=True``
        the gradients are -4/3 and 4/3, and the mean of -4/3 and 16/3 is 2.

    Example:
        >>> import torch, tritonloss
        >>> logits = torch.tensor([[3.0, 0.0]], requires_grad=True)
        >>> loss = tritonloss.rank_sort_loss(logits, (torch.tensor([1]), torch.tensor([0.8])))
        >>> round(loss.rank.item(), 4), loss.sort.item()
        (0.6667, 0.0)
        >>> (loss.rank + loss.sort).backward()
        >>> [round(g, 4) for g in logits.grad[0].tolist()]
        [0.6667, -0.6667]

    Reference:
        Oksuz et al., Rank & Sort Loss for Object Detection and Instance Segmentation, ICCV 2021.
    """
    rest = (weight, ignore_index, group, num_groups)
    sharing = (process_group, capacity, gradients_averaged)
    inputs = _parse(logits, targets, delta, *rest, *sharing, class_dim)
    rank, sort, _ = _run("rank_sort", inputs)
    return RankSort(*(scaled_gradient(loss, inputs.sharing) for loss in (rank, sort)))


@check.by_name
def ap_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    delta: float | Tensor = 1.0,
    interpolated: bool = True,
    weight: Levels | None = None,
    ignore_index: int = -1,
    group: Levels | None = None,
    num_groups: int | None = None,
    process_group: ProcessGroup | None = None,
    capacity: int | None = None,
    gradients_averaged: bool = False,
    class_dim: int = -1,
) -> Tensor:
    r"""Average Precision loss.

    .. math:: L = 1 - \frac{1}{P} \sum_{i \in P} \frac{rank^+_i}{rank^+_i + FP_i}, \quad
              rank^+_i = 1 + \sum_{j \in P, j \ne i} H(s_j - s_i)

    Args:
        targets: as in :func:`rank_sort_loss`; a quality only says that its entry is positive.
        delta: half-width of the step in logits, >= 0.
        interpolated: replace each precision by the highest at its score or below.

    The other arguments, lists, processes and errors are those of :func:`rank_sort_loss`.

    Returns:
        0-d, float32 (float64 for float64 logits).

    Example:
        >>> import torch, tritonloss
        >>> loss = tritonloss.ap_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([1]))
        >>> loss.item()
        0.5

    Reference:
        Chen et al., Towards Accurate One-Stage Object Detection with AP-Loss, CVPR 2019; AP-loss
        for Accurate One-Stage Object Detection, TPAMI 2021.
    """
    rest = (weight, ignore_index, group, num_groups)
    sharing = (process_group, capacity, gradients_averaged)
    inputs = _parse(logits, targets, delta, *rest, *sharing, class_dim)
    value, _, _ = _run("ap" if interpolated else "ap_plain", inputs)
    return scaled_gradient(value, inputs.sharing)


@check.by_name
def alrp_loss(
    logits: Levels,
    targets: LevelTargets,
    localization_error: Levels,
    *,
    delta: float | Tensor = 1.0,
    weight: Levels | None = None,
    ignore_index: int = -1,
    group: Levels | None = None,
    num_groups: int | None = None,
    process_group: ProcessGroup | None = None,
    capacity: int | None = None,
    gradients_averaged: bool = False,
    class_dim: int = -1,
) -> ALRP:
    r"""Average Localisation Recall Precision loss: ranking and localisation in one error.

    .. math::
        \mathrm{cls} = \frac{1}{P} \sum_{i \in P} \frac{FP_i}{rank_i}, \quad
        \mathrm{loc} = \frac{1}{P} \sum_{i \in P} \frac{1}{rank_i} \sum_{j \in P, s_j \ge s_i} e_j

    with :math:`rank_i = rank^+_i + FP_i` as in :func:`ap_loss`. The gradient of cls in the logits
    also pulls a positive up for the localisation errors ranked above it; loc is differentiable in
    ``localization_error`` alone. Positives with equal scores count each other.

    Args:
        targets: as in :func:`ap_loss`.
        localization_error: ``(...)``, one per anchor, read at positives: usually 1 - GIoU, divided
            by 2 or by 1 - tau.
        delta: half-width of the step in logits, >= 0.

    The other arguments, lists, processes and errors are those of :func:`rank_sort_loss`.

    Returns:
        ``ALRP(cls, loc)``, float32 (float64 for float64 logits).

    Example:
        >>> import torch, tritonloss
        >>> logits = torch.tensor([[2.0], [0.0], [5.0]])
        >>> error = torch.tensor([0.5, 0.1, 0.3])
        >>> loss = tritonloss.alrp_loss(logits, torch.tensor([0, 1, 0]), error)
        >>> loss.cls.item(), round(loss.loc.item(), 3)
        (0.0, 0.35)

    Reference:
        Oksuz et al., A Ranking-based, Balanced Loss Function Unifying Classification and
        Localisation in Object Detection, NeurIPS 2020.
    """
    rest = (weight, ignore_index, group, num_groups)
    sharing = (process_group, capacity, gradients_averaged)
    inputs = _parse(
        logits, targets, delta, *rest, *sharing, class_dim, localization_error=localization_error
    )
    cls, loc_of_all, coefficient = _run("alrp", inputs)
    errors = [level[-1].reshape(-1) for level in inputs.levels]
    error = torch.cat(errors) if len(errors) > 1 else errors[0]
    loc = (coefficient * torch.where(coefficient != 0, error.to(coefficient.dtype), 0.0)).sum()
    # the value of all processes, whose sum does not depend on the order of the anchors
    loc = valued(loc_of_all.detach(), loc)
    return ALRP(*(scaled_gradient(loss, inputs.sharing) for loss in (cls, loc)))


@check.by_name
def self_balanced_weight(cls_loss: Tensor, box_loss: Tensor) -> Tensor:
    """Weight that gives a box loss the size of the classification loss: no weights to tune.

    ``|cls_loss / box_loss|``, without gradient, and 1 where ``box_loss`` is 0. Stays on the device.

    Args:
        cls_loss: floating, usually 0-d; with Rank & Sort the sum of both parts.
        box_loss: floating, broadcastable to ``cls_loss``.

    Returns:
        The weight, float32 (float64 if either is float64).

    Example:
        >>> import torch, tritonloss
        >>> box_loss = torch.tensor(0.5, requires_grad=True)
        >>> weight = tritonloss.self_balanced_weight(torch.tensor(2.0), box_loss)
        >>> (weight * box_loss).item()
        2.0

    Reference:
        Oksuz et al., Rank & Sort Loss for Object Detection and Instance Segmentation, ICCV 2021.
    """
    check.is_floating("cls_loss", cls_loss)
    check.is_floating("box_loss", box_loss)
    check.on_device_of("box_loss", box_loss, "cls_loss", cls_loss)
    wide = torch.promote_types(torch.promote_types(cls_loss.dtype, box_loss.dtype), torch.float32)
    cls_loss, box_loss = cls_loss.detach().to(wide), box_loss.detach().to(wide)
    zero = box_loss == 0
    return torch.where(zero, 1.0, (cls_loss / torch.where(zero, 1.0, box_loss)).abs())
