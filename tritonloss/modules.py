"""The losses as modules: hyper-parameters in the constructor, tensors in ``forward``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .losses.ghm import ghm_c_loss, ghm_r_loss
from .losses.prime_sample import carl_loss

__all__ = ["CARLLoss", "GHMCLoss", "GHMRLoss"]


class _Loss(nn.Module):
    """Keeps the keyword arguments of a function."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _recomputing() -> bool:
    """True inside a backward: a checkpoint runs its forward once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Harmonised(_Loss):
    """Running counts of the gradient norms, kept between steps.

    Attributes:
        amount: ``(bins,)`` float32, the running count A of each region.
        updates: ``(bins,)`` float32, how often it was updated.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("amount", torch.zeros(options["bins"], dtype=torch.float32))
        self.register_buffer("updates", torch.zeros(options["bins"], dtype=torch.float32))
        self._before = None  # the state that the last training step began with

    def _apply(self, fn, recurse=True):
        # half() and its like move the counts, but do not round them.
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _call(self, function, *args, **kwargs) -> Tensor:
        momentum = self.options["momentum"]
        if not isinstance(momentum, Tensor) and momentum == 0:
            return function(*args, **kwargs, **self.options)
        if _recomputing() and self._before is not None:
            # The same weights as the first time, and the step counts once.
            return function(*args, **kwargs, **self.options, state=self._before)[0]
        # A copy: the backward reads it after the buffers have moved on.
        state = self.amount.clone(), self.updates.clone()
        loss, (amount, updates) = function(*args, **kwargs, **self.options, state=state)
        if self.training:
            self._before = state
            with torch.no_grad():
                self.amount.copy_(amount)
                self.updates.copy_(updates)
        return loss


class GHMCLoss(_Harmonised):
    """GHM-C with its running counts, see :func:`tritonloss.ghm_c_loss`.

    The counts are buffers: part of the ``state_dict``, float32 in a half-precision model, updated
    once per forward in training mode. A forward that a checkpoint runs again does not count; it
    sees the state of the module's last forward.

    Args:
        bins, momentum, bias_correction, normalize, ignore_index: as the function takes them.

    Example:
        >>> import torch, tritonloss
        >>> loss = tritonloss.GHMCLoss(bins=30, momentum=0.75)
        >>> value = loss(torch.randn(8, 3), torch.randint(0, 4, (8,)))
        >>> loss.updates.sum() > 0
        tensor(True)
    """

    def __init__(
        self,
        bins: int = 10,
        momentum: float | Tensor = 0.0,
        bias_correction: bool = False,
        normalize: str = "nonempty",
        ignore_index: int = -1,
    ):
        super().__init__(
            bins=bins,
            momentum=momentum,
            bias_correction=bias_correction,
            normalize=normalize,
            ignore_index=ignore_index,
        )

    def forward(self, logits: Tensor, targets, weight: Tensor | None = None) -> Tensor:
        return self._call(ghm_c_loss, logits, targets, weight=weight)


class GHMRLoss(_Harmonised):
    """GHM-R with its running counts, see :func:`tritonloss.ghm_r_loss` and :class:`GHMCLoss`.

    Args:
        mu, bins, momentum, bias_correction, normalize: as the function takes them.

    Example:
        >>> import torch, tritonloss
        >>> loss = tritonloss.GHMRLoss(momentum=0.7)
        >>> value = loss(torch.randn(8, 4), torch.randn(8, 4))
    """

    def __init__(
        self,
        mu: float | Tensor = 0.02,
        bins: int = 10,
        momentum: float | Tensor = 0.0,
        bias_correction: bool = False,
        normalize: str = "nonempty",
    ):
        super().__init__(
            mu=mu,
            bins=bins,
            momentum=momentum,
            bias_correction=bias_correction,
            normalize=normalize,
        )

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return self._call(ghm_r_loss, pred, target, weight=weight)


class CARLLoss(_Loss):
    """Classification-aware regression loss, see :func:`tritonloss.carl_loss`.

    Args:
        k, bias, activation, keep_loss: as the function takes them.

    Example:
        >>> import torch, tritonloss
        >>> loss = tritonloss.CARLLoss(k=1.0, bias=0.2)
        >>> value = loss(torch.randn(3, 2), torch.tensor([0, 1, 2]), torch.rand(3, 4))
    """

    def __init__(
        self,
        k: float | Tensor = 1.0,
        bias: float | Tensor = 0.2,
        activation: str = "sigmoid",
        keep_loss: bool = False,
    ):
        super().__init__(k=k, bias=bias, activation=activation, keep_loss=keep_loss)

    def forward(self, logits: Tensor, labels: Tensor, box_loss: Tensor, avg_factor=None) -> Tensor:
        return carl_loss(logits, labels, box_loss, avg_factor=avg_factor, **self.options)
