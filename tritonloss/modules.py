"""The losses as modules: hyper-parameters in ``__init__``, tensors in ``forward``.

A module of a stateless loss is its function and a docstring; names, defaults and meaning of all
arguments are those of the function.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._dispatch import backend
from .distributed import HoldsGroup, parse_sharing
from .losses import (
    boxes,
    distribution,
    ghm,
    pointwise,
    prime_sample,
    quality,
    ranking,
    softmax_focal,
)

# Arguments that belong to a batch, not to the module.
PER_CALL = ("weight", "avg_factor", "group", "state")


def _pair_of_no_rows(width: int, device) -> tuple[Tensor, Tensor]:
    return torch.zeros(0, width, device=device), torch.zeros(0, width, device=device)


class _Loss(HoldsGroup, nn.Module):
    """Holds the keyword arguments of ``function``; tensors among them become buffers.

    The attributes may be changed between steps, to schedule them.
    """

    function: ClassVar[Callable]
    _hyper: ClassVar[dict]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        parameters = inspect.signature(cls.function).parameters.values()
        own = [p for p in parameters if p.kind == p.KEYWORD_ONLY and p.name not in PER_CALL]
        cls._hyper = {p.name: p.default for p in own}
        cls.__signature__ = inspect.Signature(own)

    def __init__(self, *positional, **hyper):
        super().__init__()
        if positional:
            raise TypeError(
                f"{type(self).__name__} takes its arguments by name ({', '.join(self._hyper)}); "
                f"got {', '.join(map(repr, positional))} without one"
            )
        unknown = sorted(set(hyper) - set(self._hyper))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} takes {', '.join(self._hyper)}; got {', '.join(unknown)}"
            )
        for name, value in (self._hyper | hyper).items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._check()

    def _check(self) -> None:
        """Errors of hyper-parameters when the module is built: a call without any row."""
        hyper = {name: getattr(self, name) for name in self._hyper}
        tensors = [v for v in hyper.values() if isinstance(v, Tensor)]
        if "process_group" in hyper:
            group, averaged = hyper.pop("process_group"), hyper["gradients_averaged"]
            parse_sharing(group, averaged, hyper.get("capacity"))
        device = next((t.device for t in tensors if t.dim()), torch.device("cpu"))
        if device.type == "meta":
            return
        n_classes = next((t.numel() for t in tensors if t.dim()), 8)
        with backend("eager"), torch.no_grad():
            type(self).function(*self._no_rows(n_classes, device), **self._no_state(), **hyper)

    def _no_rows(self, n_classes: int, device) -> tuple:
        """Inputs of no row: logits and labels."""
        labels = torch.zeros(0, dtype=torch.long, device=device)
        return torch.zeros(0, n_classes, dtype=torch.float32, device=device), labels

    def _no_state(self) -> dict:
        return {}

    def forward(self, *inputs: Tensor, **per_call) -> Tensor:
        hyper = {name: getattr(self, name) for name in self._hyper}
        if "process_group" in hyper:
            hyper["process_group"] = self.live_group()
        return type(self).function(*inputs, **hyper | per_call)

    def extra_repr(self) -> str:
        values = ((name, getattr(self, name)) for name in self._hyper)
        return ", ".join(f"{k}={v}" for k, v in values if not isinstance(v, Tensor))


class _OfQuality:
    def _no_rows(self, n_classes, device) -> tuple:
        logits, labels = super()._no_rows(n_classes, device)
        return logits, (labels, torch.zeros(0, device=device))


class _OfBoxes:
    def _no_rows(self, n_classes, device) -> tuple:
        return _pair_of_no_rows(4, device)


class FocalLoss(_Loss):
    """``forward(logits, targets, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.sigmoid_focal_loss`.

    Example:
        >>> import torch, tritonloss
        >>> loss = tritonloss.FocalLoss(gamma=2.0)(torch.zeros(2, 3), torch.tensor([1, 3]))
        >>> round(loss.item(), 4)
        0.1155
    """

    function = staticmethod(pointwise.sigmoid_focal_loss)


class FocalStarLoss(_Loss):
    """``forward(logits, targets, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.focal_star_loss`.
    """

    function = staticmethod(pointwise.focal_star_loss)


class QualityFocalLoss(_Loss):
    """``forward(logits, (labels, quality), *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.quality_focal_loss`.
    """

    function = staticmethod(pointwise.quality_focal_loss)


class VarifocalLoss(_Loss):
    """``forward(logits, (labels, quality), *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.varifocal_loss`.
    """

    function = staticmethod(pointwise.varifocal_loss)


class GaussianFocalLoss(_Loss):
    """``forward(logits, heat_map, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.gaussian_focal_loss`.
    """

    function = staticmethod(pointwise.gaussian_focal_loss)

    def _no_rows(self, n_classes, device) -> tuple:
        return _pair_of_no_rows(n_classes, device)


class AsymmetricLoss(_Loss):
    """``forward(logits, targets, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.asymmetric_loss`.
    """

    function = staticmethod(pointwise.asymmetric_loss)


class BCELoss(_Loss):
    """``forward(logits, targets, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.bce_loss`.
    """

    function = staticmethod(quality.bce_loss)


class MALLoss(_OfQuality, _Loss):
    """``forward(logits, (labels, quality), *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.mal_loss`.
    """

    function = staticmethod(quality.mal_loss)


class IoUAwareBCELoss(_OfQuality, _Loss):
    """``forward(logits, (labels, quality), *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.iou_aware_bce_loss`.
    """

    function = staticmethod(quality.iou_aware_bce_loss)


class SoftmaxFocalLoss(_Loss):
    """``forward(logits, labels, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.softmax_focal_loss`.
    """

    function = staticmethod(softmax_focal.softmax_focal_loss)


class DistributionFocalLoss(_Loss):
    """``forward(logits, target, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.distribution_focal_loss`.
    """

    function = staticmethod(distribution.distribution_focal_loss)

    def _no_rows(self, n_classes, device) -> tuple:
        return torch.zeros(0, 2, device=device), torch.zeros(0, device=device)


class DistributionDistillationLoss(_Loss):
    """``forward(logits, teacher, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.distribution_distillation_loss`.
    """

    function = staticmethod(distribution.distribution_distillation_loss)

    def _no_rows(self, n_classes, device) -> tuple:
        return _pair_of_no_rows(2, device)


class Integral(_Loss):
    """``forward(logits)``: the mean bin of each distribution.

    See :func:`tritonloss.distribution_expectation`.
    """

    function = staticmethod(distribution.distribution_expectation)

    def _no_rows(self, n_classes, device) -> tuple:
        n_bins = self.sides if isinstance(self.sides, int) and self.sides > 0 else 1
        return (torch.zeros(0, 2 * n_bins, device=device),)


class IoULoss(_OfBoxes, _Loss):
    """``forward(pred, target, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.iou_loss`.
    """

    function = staticmethod(boxes.iou_loss)


class GIoULoss(_OfBoxes, _Loss):
    """``forward(pred, target, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.giou_loss`.
    """

    function = staticmethod(boxes.giou_loss)


class DIoULoss(_OfBoxes, _Loss):
    """``forward(pred, target, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.diou_loss`.
    """

    function = staticmethod(boxes.diou_loss)


class EIoULoss(_OfBoxes, _Loss):
    """``forward(pred, target, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.eiou_loss`.
    """

    function = staticmethod(boxes.eiou_loss)


class CIoULoss(_OfBoxes, _Loss):
    """``forward(pred, target, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.ciou_loss`.
    """

    function = staticmethod(boxes.ciou_loss)


class RankSortLoss(_Loss):
    """``forward(logits, targets, *, weight=None, group=None) -> RankSort``.

    See :func:`tritonloss.rank_sort_loss`.

    Example:
        >>> import torch, tritonloss
        >>> loss = tritonloss.RankSortLoss(delta=0.5)(torch.tensor([[3.0, 0.0]]), torch.tensor([1]))
        >>> round(loss.rank.item(), 4)
        0.6667
    """

    function = staticmethod(ranking.rank_sort_loss)


class APLoss(_Loss):
    """``forward(logits, targets, *, weight=None, group=None)``.

    See :func:`tritonloss.ap_loss`.

    Example:
        >>> import torch, tritonloss
        >>> tritonloss.APLoss()(torch.tensor([[3.0, 0.0]]), torch.tensor([1])).item()
        0.5
    """

    function = staticmethod(ranking.ap_loss)


class ALRPLoss(_Loss):
    """``forward(logits, targets, localization_error, *, weight=None, group=None) -> ALRP``.

    See :func:`tritonloss.alrp_loss`.

    Example:
        >>> import torch, tritonloss
        >>> error = torch.tensor([0.5])
        >>> tritonloss.ALRPLoss()(torch.tensor([[3.0, 0.0]]), torch.tensor([1]), error).cls.item()
        0.5
    """

    function = staticmethod(ranking.alrp_loss)

    def _no_rows(self, n_classes, device) -> tuple:
        return *super()._no_rows(n_classes, device), torch.zeros(0, device=device)


def _recomputing() -> bool:
    """True inside a backward: a checkpoint runs its forward once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _shapes(inputs: tuple, per_call: dict) -> list:
    x = inputs[0] if inputs else next(iter(per_call.values()))
    return [t.shape for t in (x if isinstance(x, (list, tuple)) else [x])]


class _Harmonised(nn.Module):
    """Keeps running counts of the gradient norms between steps.

    Attributes:
        amount: ``(bins,)`` float32, the running count A of each region.
        updates: ``(bins,)`` float32, how often it was updated.
    """

    def __init__(self, *positional, **hyper):
        super().__init__(*positional, **hyper)
        self.register_buffer("amount", torch.zeros(self.bins, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros(self.bins, dtype=torch.float32))
        self._calls = deque(maxlen=32)  # of a training step: (shapes, state before, counts after)
        self._repeated = False  # a backward ran one of them again

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # mmdetection's buffers: edges of the regions, which ours does not keep, and with momentum
        # the counts, without the number of their updates; many, so nothing is corrected for it
        if f"{prefix}edges" in state_dict and f"{prefix}amount" not in state_dict:
            del state_dict[f"{prefix}edges"]
            counts = state_dict.pop(f"{prefix}acc_sum", self.amount * 0)
            state_dict[f"{prefix}amount"] = counts
            state_dict[f"{prefix}updates"] = (counts > 0) * 1e6
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _no_state(self) -> dict:
        if not isinstance(self.bins, int) or not 1 <= self.bins <= 256:
            return {}  # said by the loss
        return {"state": (torch.zeros(self.bins, device="cpu"),) * 2}

    def _apply(self, fn, recurse=True):
        # half() and its like move the counts, but do not round them.
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def forward(self, *inputs: Tensor, **per_call) -> Tensor:
        if not isinstance(self.momentum, Tensor) and self.momentum == 0:
            return super().forward(*inputs, **per_call)
        if _recomputing() and self._calls:
            # The same weights as the first time, and the step counts once.
            self._repeated = True
            state = self._state_of(inputs, per_call)
            return super().forward(*inputs, **per_call, state=state)[0]
        # A copy: the backward reads it after the buffers have moved on.
        state = self.amount.clone(), self.updates.clone()
        loss, (amount, updates) = super().forward(*inputs, **per_call, state=state)
        if self.training:
            if not torch.compiler.is_compiling():
                if self._repeated:
                    self._calls.clear()
                    self._repeated = False
                self._calls.append((_shapes(inputs, per_call), state, amount))
            with torch.no_grad():
                self.amount.copy_(amount)
                self.updates.copy_(updates)
        return loss

    def _state_of(self, inputs, per_call) -> ghm.State:
        """What the call that is run again began with: where several fit, the one whose counts come
        out as they did."""
        shapes = _shapes(inputs, per_call)
        calls = [call for call in self._calls if call[0] == shapes]
        if len(calls) < 2:
            return (calls or self._calls)[-1][1]
        apart = []
        with torch.no_grad():
            for _, state, after in calls:
                _, (amount, _) = super().forward(*inputs, **per_call, state=state)
                apart.append((amount - after).abs().sum())
        return calls[int(torch.stack(apart).argmin())][1]


class GHMCLoss(_Harmonised, _Loss):
    """``forward(logits, targets, *, weight=None)``.

    See :func:`tritonloss.ghm_c_loss`. The running counts are buffers: part of the ``state_dict``,
    float32 in a half-precision model, updated once per forward in training mode. A forward that a
    checkpoint runs again does not count; it begins with the state that it had before.
    ``load_state_dict`` takes the buffers of mmdetection's GHM losses, too.

    Example:
        >>> import torch, tritonloss
        >>> loss = tritonloss.GHMCLoss(bins=30, momentum=0.75)
        >>> value = loss(torch.randn(8, 3), torch.randint(0, 4, (8,)))
        >>> loss.updates.sum() > 0
        tensor(True)
    """

    function = staticmethod(ghm.ghm_c_loss)


class GHMRLoss(_Harmonised, _Loss):
    """``forward(pred, target, *, weight=None)``.

    See :func:`tritonloss.ghm_r_loss`; buffers as in :class:`GHMCLoss`.
    """

    function = staticmethod(ghm.ghm_r_loss)

    def _no_rows(self, n_classes, device) -> tuple:
        return _pair_of_no_rows(n_classes, device)


class CARLLoss(_Loss):
    """``forward(logits, labels, box_loss, *, avg_factor=None)``.

    See :func:`tritonloss.carl_loss`.
    """

    function = staticmethod(prime_sample.carl_loss)

    def _no_rows(self, n_classes, device) -> tuple:
        return *super()._no_rows(n_classes, device), torch.zeros(0, device=device)
