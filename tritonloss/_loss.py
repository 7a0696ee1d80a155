"""One declaration per family of losses: its eager formula, its launchers, and which of them runs.

All of a family take the same arguments in the same order: ``(x, labels, quality, dense, weight,
..., avg_factor, params, kind, ..., reduction)``, as far as it has them; the backward after the
gradients of the outputs and what the forward saved. A tuple among them holds hyper-parameters,
numbers or 0-d tensors, and reaches a launcher packed: see ``_op.packed``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _op
from ._dispatch import not_empty, use_triton
from .eager import _blocks


class Loss:
    """A function of ``(x, *args)``, differentiable in ``x``.

    Args:
        eager: the formula in plain torch; None where it has no derivative to differentiate again.
        forward: launcher ``(x, *args) -> (*outputs, *saved)``.
        backward: launcher ``(*gradients, *saved, x, *args) -> gradient of x``; None where there is
            no gradient.
        takes: ``(x, *args) -> bool``: whether the kernels can read what they get.
        by_blocks: the formula on the CPU, block by block: ``(x, *args, want_grad) -> (*outputs,
            gradient of the sum, 1 / divisor)``, and ``(x, *args) -> bool``: whether it applies.
        outputs, constants: see ``_op.differentiable``.
        empty: whether the launchers take tensors without elements.
    """

    def __init__(
        self,
        eager: Callable,
        forward: Callable,
        backward: Callable | None,
        takes: Callable,
        *,
        by_blocks: tuple[Callable, Callable] | None = None,
        outputs: int = 1,
        constants: int = 0,
        empty: bool = False,
    ):
        self.eager, self.takes, self.kernels, self.empty = eager, takes, forward, empty
        if backward is not None:
            self.kernels = _op.differentiable(
                forward, backward, eager, outputs=outputs, constants=constants
            )
        self.blockwise = self.has_blocks = None
        if by_blocks is not None:
            function, self.has_blocks = by_blocks
            self.blockwise = _op.differentiable(
                function, _backward_by_blocks, lambda x, *args: eager(x, *args[:-1]),
                outputs=outputs, constants=constants,
            )  # fmt: skip

    def by_kernels(self, x: Tensor, *args) -> bool:
        """Whether the kernels run; ``args`` may end where ``takes`` needs no more."""
        return use_triton(x) and (self.empty or not_empty(x)) and self.takes(x, *args)

    def __call__(self, x: Tensor, *args):
        if self.by_kernels(x, *args):
            return self.kernels(x, *_op.packed(x, args))
        if self.has_blocks is not None and _blocks.usable(x) and self.has_blocks(x, *args):
            result = self.blockwise(x, *args, x.requires_grad and torch.is_grad_enabled())
        else:
            result = self.eager(x, *args)
        return result if _op.traced(x) else watched(result, (x, *args))


def watched(result, args: tuple):
    """The result, whose backward raises if an input was changed in place since, as the kernels'.

    Plain torch may keep a copy of an input and not notice, or the input and notice.
    """
    outputs = [r for r in ((result,) if isinstance(result, Tensor) else result) if r.requires_grad]
    if not outputs:
        return result
    inputs = [a for a in args if isinstance(a, Tensor)]
    for arg in args:
        if type(arg) is tuple:
            inputs += [a for a in arg if isinstance(a, Tensor)]
    try:
        versions = [a._version for a in inputs]
    except RuntimeError:  # tensors of inference mode have none
        return result

    def check(gradients):
        if [a._version for a in inputs] != versions:
            raise RuntimeError(
                "an input of the loss (logits, boxes, targets, weights, avg_factor ...) has been "
                "modified by an inplace operation between the loss and its backward: clone it first"
            )

    for output in outputs:
        output.grad_fn.register_prehook(check)
    return result


def _backward_by_blocks(grad, gradient, scale, x, *args):
    return (gradient * (grad * scale)).to(x.dtype)
