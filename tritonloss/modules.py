"""The losses as modules: hyper-parameters in ``__init__``, tensors in ``forward``.

A module of a stateless loss is its function and a docstring; names, defaults and meaning of all
arguments are those of the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from .losses import boxes, distribution, elementwise, ranking

# Arguments that belong to a batch, not to the module.
PER_CALL = ("weight", "avg_factor", "group")


class _Loss(nn.Module):
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

    def __init__(self, **hyper):
        super().__init__()
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

    def forward(self, *inputs: Tensor, **per_call) -> Tensor:
        hyper = {name: getattr(self, name) for name in self._hyper}
        return type(self).function(*inputs, **per_call, **hyper)

    def extra_repr(self) -> str:
        values = ((name, getattr(self, name)) for name in self._hyper)
        return ", ".join(f"{k}={v}" for k, v in values if not isinstance(v, Tensor))


class FocalLoss(_Loss):
    """``forward(logits, targets, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.sigmoid_focal_loss`.

    Example:
        >>> import torch, tritonloss
        >>> loss = tritonloss.FocalLoss(gamma=2.0)(torch.zeros(2, 3), torch.tensor([1, 3]))
        >>> round(loss.item(), 4)
        0.1155
    """

    function = staticmethod(elementwise.sigmoid_focal_loss)


class FocalStarLoss(_Loss):
    """``forward(logits, targets, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.focal_star_loss`.
    """

    function = staticmethod(elementwise.focal_star_loss)


class QualityFocalLoss(_Loss):
    """``forward(logits, (labels, quality), *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.quality_focal_loss`.
    """

    function = staticmethod(elementwise.quality_focal_loss)


class VarifocalLoss(_Loss):
    """``forward(logits, (labels, quality), *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.varifocal_loss`.
    """

    function = staticmethod(elementwise.varifocal_loss)


class SoftmaxFocalLoss(_Loss):
    """``forward(logits, labels, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.softmax_focal_loss`.
    """

    function = staticmethod(elementwise.softmax_focal_loss)


class DistributionFocalLoss(_Loss):
    """``forward(logits, target, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.distribution_focal_loss`.
    """

    function = staticmethod(distribution.distribution_focal_loss)


class Integral(_Loss):
    """``forward(logits)``: the mean bin of each distribution.

    See :func:`tritonloss.distribution_expectation`.
    """

    function = staticmethod(distribution.distribution_expectation)


class IoULoss(_Loss):
    """``forward(pred, target, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.iou_loss`.
    """

    function = staticmethod(boxes.iou_loss)


class GIoULoss(_Loss):
    """``forward(pred, target, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.giou_loss`.
    """

    function = staticmethod(boxes.giou_loss)


class DIoULoss(_Loss):
    """``forward(pred, target, *, weight=None, avg_factor=None)``.

    See :func:`tritonloss.diou_loss`.
    """

    function = staticmethod(boxes.diou_loss)


class CIoULoss(_Loss):
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
