"""Gradient harmonising: GHM-C and GHM-R.

One kernel reads the logits once and sums count and loss of each region; a small one turns the sums
into the loss, the running state and a weight per region; the backward is that of the pointwise
losses, times the weight of the region.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonloss import _checks as check
from tritonloss import _op
from tritonloss._dispatch import launchers
from tritonloss._levels import Levels, LevelTargets, parsed_levels
from tritonloss._loss import WholeBatch
from tritonloss._targets import check_logits, parse_targets, parse_weight
from tritonloss.distributed import (
    ProcessGroup,
    agree,
    group_of,
    parse_sharing,
    scaled_gradient,
    summed_regions,
)
from tritonloss.eager import ghm as eager

from .pointwise import parse_regression

NORMALIZE = ("nonempty", "all")
State = tuple[Tensor, Tensor]

kernels = launchers("ghm")


def _fake_shared(x, labels, quality, dense, weight, amount, updates, params, kind, bins, *args):
    weights = x[0].new_empty(bins, dtype=torch.float32)
    new_state = (torch.empty_like(weights if t is None else t) for t in (amount, updates))
    return x[0].new_empty((), dtype=torch.float32), *new_state, weights


@_op.opaque(_fake_shared)
def ghm_forward_shared(
    x: list[Tensor],
    labels: list[Tensor],
    quality: list[Tensor],
    dense: list[Tensor],
    weight: list[Tensor],
    amount: Tensor | None,
    updates: Tensor | None,
    params: Tensor,
    kind: str,
    bins: int,
    bias_correction: bool,
    normalize: str,
    ignore_index: int,
    process_group: str,
    flag: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``kernels.forward`` with a sum over the processes between its kernels."""
    total = kernels.region_totals(
        x, labels, quality, dense, weight, params, kind, bins, ignore_index
    )
    total = summed_regions(total, flag, group_of(process_group)).float()
    loss, *rest = kernels.harmonise(
        total, amount, updates, params, bins, bias_correction, normalize
    )
    return loss + flag.float(), *rest


def _fake_blocks(x, labels, quality, dense, weight, amount, updates, params, kind, bins, *args):
    *outputs, weights = _fake_shared(x, labels, quality, dense, weight, amount, updates, params,
                                     kind, bins)  # fmt: skip
    if not args[-1]:
        return *outputs, [weights.new_empty(0) for _ in x]
    return *outputs, [torch.empty_like(t, dtype=weights.dtype) for t in x]


@_op.opaque(_fake_blocks)
def ghm_eager(
    x: list[Tensor],
    labels: list[Tensor],
    quality: list[Tensor],
    dense: list[Tensor],
    weight: list[Tensor],
    amount: Tensor | None,
    updates: Tensor | None,
    params: Tensor,
    kind: str,
    bins: int,
    bias_correction: bool,
    normalize: str,
    ignore_index: int,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """An op, for what a graph makes of the formula is slower and keeps more."""
    if isinstance(params, Tensor):  # packed
        params = tuple(params.unbind())
    return eager.harmonised_by_blocks(
        x, labels, quality, dense, weight, amount, updates, params, kind, bins, bias_correction,
        normalize, ignore_index, want_grad,
    )  # fmt: skip


def _family(forward, by_blocks, **options) -> WholeBatch:
    return WholeBatch(
        eager.harmonised, forward, kernels.backward, kernels.takes, 5, reference=eager.harmonised,
        by_blocks=by_blocks, outputs=3, constants=2, **options,
    )  # fmt: skip


_loss = _family(kernels.forward, ghm_eager)
_regression = _family(kernels.forward, eager.harmonised_by_blocks)  # few elements: no op in a graph
_shared = _family(ghm_forward_shared, eager.harmonised_by_blocks, empty=True)


def _check_parameters(x, bins, momentum, state, normalize) -> None:
    if not isinstance(bins, int) or isinstance(bins, bool):
        raise TypeError(f"bins must be an int; got {type(bins).__name__}")
    if not 1 <= bins <= 256:
        raise ValueError(f"bins must be in 1..256; got {bins}")
    momentum = check.is_number("momentum", momentum, 0)
    if not isinstance(momentum, Tensor) and momentum >= 1:
        raise ValueError(f"momentum must be >= 0 and < 1; got {momentum}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}; got {normalize!r}")
    if state is None:
        if isinstance(momentum, Tensor) or momentum > 0:
            raise ValueError(
                f"state must be the pair (A, t) where momentum is above 0 (GHMCLoss and GHMRLoss "
                f"keep it); got None with momentum {momentum}"
            )
        return
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"state must be a pair (A, t) of tensors; got {type(state).__name__}")
    for name, tensor in zip(("state[0] (A)", "state[1] (t)"), state, strict=True):
        check.is_tensor(name, tensor)
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64; got {str(tensor.dtype)[6:]}")
        check.is_input(name, tensor, (bins,), "one per region", "the prediction", x)


def _harmonised(
    kind, levels, mu, bins, momentum, state, bias_correction, normalize, ignore_index,
    process_group, gradients_averaged,
):  # fmt: skip
    """The call, for checked levels."""
    x, labels, quality, *_ = levels[0]
    _check_parameters(x, bins, momentum, state, normalize)
    sharing = parse_sharing(process_group, gradients_averaged)
    momentum = check.is_number("momentum", momentum, 0, 1, open_high=True)
    # 1 - m and log m are formed in float64: float32 would lose both for m near 1
    if isinstance(momentum, Tensor):
        check.float64_beside("momentum", momentum)
        params = (mu, momentum, 1 - momentum.double(), momentum.double().log())
    else:
        params = (mu, momentum, 1 - momentum, math.log(momentum) if momentum else -math.inf)
    amount, updates = (None, None) if state is None else (s.contiguous() for s in state)
    of_regions = (kind, bins, bool(bias_correction), normalize, ignore_index)
    args = (levels, amount, updates, params, *of_regions)
    loss = _loss if kind == "bce" else _regression
    if sharing.group:
        loss, by_kernels = _shared, _shared.by_kernels(*args)
        form = "labels" if quality is None else "(labels, quality)"
        settings = {
            "loss": "ghm_c_loss" if kind == "bce" else "ghm_r_loss",
            "implementation": "triton" if by_kernels else "eager",
            "dtype": str(x.dtype)[6:],
            "number of classes": x.shape[-1],
            "targets": "dense" if labels is None else form,
            "ignore_index": ignore_index,
            "bins": bins,
            "momentum": momentum,
            "mu": mu,
            "bias_correction": bool(bias_correction),
            "normalize": normalize,
            "state": state is not None,
            "gradients_averaged": gradients_averaged,
        }
        flag = agree(settings, x.device, sharing.group)
        args += (sharing.group if by_kernels else process_group), flag
    value, *new_state = loss(*args)
    value = scaled_gradient(value, sharing)
    return value if state is None else (value, tuple(new_state))


@check.by_name
def ghm_c_loss(
    logits: Levels,
    targets: LevelTargets,
    *,
    bins: int = 10,
    momentum: float | Tensor = 0.0,
    state: State | None = None,
    bias_correction: bool = False,
    normalize: str = "nonempty",
    weight: Levels | None = None,
    ignore_index: int = -1,
    process_group: ProcessGroup | None = None,
    gradients_averaged: bool = False,
    class_dim: int = -1,
) -> Tensor | tuple[Tensor, State]:
    r"""GHM-C: cross entropy in which every region of the gradient norm weighs the same.

    .. math:: L = \frac{1}{n} \sum_k \frac{1}{A_k} \sum_{i \in k} \mathrm{BCE}(x_i, y_i), \quad
              g = |p - y|, \quad i \in k \iff k \le M g_i < k + 1

    :math:`A_k` is the number of logits in region k, or its running mean
    :math:`m A_k + (1-m) R_k`, which only regions that are not empty update; n is the number of
    regions that are not empty. g is a constant for the gradient.

    Args:
        logits: ``(..., C)``, float16, bfloat16, float32 or float64, any strides.
        targets: integer labels ``(...)``, C for background; or a pair ``(labels, quality)``; or a
            floating tensor ``(..., C)`` with a (soft) target in [0, 1] per logit.
        bins: number M of unit regions, 1..256; the last one is closed at 1.
        momentum: m of the running mean, in [0, 1).
        state: ``(A, t)``, two float32 tensors ``(bins,)``: running counts and numbers of updates.
            Begin with zeros. It is not changed; a new one is returned.
        bias_correction: divide :math:`A_k` by :math:`1 - m^{t_k}`. Without it, as published, a
            region's first losses are 1 / (1 - m) times too large.
        normalize: ``"nonempty"`` divides by n; ``"all"`` by M, as the paper's formula does.
        weight: ``(...)`` per anchor or ``(..., C)`` per logit, a mask: what is above 0 counts.
        ignore_index: label whose rows contribute exactly 0.
        process_group: processes that share one batch, each with its own anchors (none is fine):
            :math:`A_k` and n are those of the whole batch, and so are the loss and the state, the
            same in all of them; the gradient is the logits' own part. All must call. A checkpoint
            of the state does not depend on their number. None: this process alone.
        gradients_averaged: True where the trainer averages gradients over the processes, as
            DistributedDataParallel does; worked out in :func:`rank_sort_loss`.
        class_dim: where the logits have their classes; with 1 ``(B, C, H, W)`` is read in place.

    Logits may be a list of levels, with targets and weight lists of the same length (a pair two
    lists): the regions, the state and the loss are those of all levels together.

    Returns:
        The loss, float32 (float64 for float64 logits); with ``state`` the pair
        ``(loss, new_state)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, or one that
            differs between processes (named in all of them; on a GPU the loss is NaN, and the next
            call raises).
        RuntimeError: a process left, raised, or did not call within the group's timeout.

    Example:
        >>> import torch, tritonloss
        >>> logits, labels = torch.tensor([[-3.0], [-3.0], [-3.0], [2.0]]), torch.tensor([1, 1, 1, 1])
        >>> round(tritonloss.ghm_c_loss(logits, labels).item(), 4)  # two regions: 3 easy, 1 hard
        1.0878
        >>> state = torch.zeros(10), torch.zeros(10)
        >>> loss, state = tritonloss.ghm_c_loss(logits, labels, momentum=0.75, state=state)
        >>> state[0].tolist()
        [0.75, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.0]

    Reference:
        Li et al., Gradient Harmonized Single-stage Detector, AAAI 2019.
    """  # noqa: E501

    def parse(logits, targets, weight):
        check_logits(logits)
        weight = parse_weight(logits, weight)
        return logits, *parse_targets(logits, targets, ignore_index, weight), weight

    levels = parsed_levels(parse, logits, {"targets": targets, "weight": weight}, class_dim)
    of_regions = (bins, momentum, state, bias_correction, normalize)
    sharing = (process_group, gradients_averaged)
    return _harmonised("bce", levels, 0.0, *of_regions, ignore_index, *sharing)


@check.by_name
def ghm_r_loss(
    pred: Levels,
    target: Levels,
    *,
    mu: float | Tensor = 0.02,
    bins: int = 10,
    momentum: float | Tensor = 0.0,
    state: State | None = None,
    bias_correction: bool = False,
    normalize: str = "nonempty",
    weight: Levels | None = None,
    process_group: ProcessGroup | None = None,
    gradients_averaged: bool = False,
    class_dim: int = -1,
) -> Tensor | tuple[Tensor, State]:
    r"""GHM-R: authentic smooth L1 in which every region of the gradient norm weighs the same.

    .. math:: L = \frac{1}{n} \sum_k \frac{1}{A_k} \sum_{i \in k} (\sqrt{d_i^2 + \mu^2} - \mu),
              \quad g = |d| / \sqrt{d^2 + \mu^2}, \quad d = pred - target

    Args:
        pred: ``(..., D)``, float16, bfloat16, float32 or float64, any strides.
        target: shape of ``pred``.
        mu: half-width of the quadratic part, > 0.
        weight: ``(...)`` per box or ``(..., D)`` per coordinate, a mask: what is above 0 counts.

    The other arguments, result and errors are those of :func:`ghm_c_loss`.

    Example:
        >>> import torch, tritonloss
        >>> pred, target = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.zeros(1, 4)
        >>> round(tritonloss.ghm_r_loss(pred, target).item(), 4)
        0.4901

    Reference:
        Li et al., Gradient Harmonized Single-stage Detector, AAAI 2019.
    """
    mu = check.is_number("mu", mu, 0, open_low=True)
    beside = {"target": target, "weight": weight}
    levels = parsed_levels(parse_regression, pred, beside, class_dim, "pred")
    of_regions = (bins, momentum, state, bias_correction, normalize)
    sharing = (process_group, gradients_averaged)
    return _harmonised("asl1", levels, mu, *of_regions, -1, *sharing)
