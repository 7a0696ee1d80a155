"""One declaration per family of losses: its eager formula, its launchers, and which of them runs.

All of a family take the same arguments in the same order: ``(x, labels, quality, dense, weight,
..., avg_factor, params, kind, ..., reduction)``, as far as it has them; the backward after the
gradients of the outputs and what the forward saved. A tuple among them holds hyper-parameters,
numbers or 0-d tensors, and reaches a launcher packed: see ``_op.packed``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _op
from ._dispatch import is_empty, not_empty, use_triton
from ._levels import Levels, class_back, is_levels, joined, parsed, parsed_one
from .eager import _blocks
from .eager._entry import divided_by, mean_divisor


class OverLevels(NamedTuple):
    """How a family whose loss is a sum takes several levels.

    Args:
        per_level: so many arguments, ``x`` among them, are a level's own; the rest is shared.
        avg_factor: place of the avg_factor among all arguments.
        count: ``(*level, *rest) -> `` number of elements that count: what a mean divides by.
        forward: launcher of all levels, ``([x], [...], ..., *rest) -> (loss, scale, *saved)``.
    """

    per_level: int
    avg_factor: int
    count: Callable
    forward: Callable | None = None


class Loss:
    """A function of ``(x, *args)``, differentiable in ``x``.

    Args:
        eager: the formula in plain torch; None where it has no derivative to differentiate again.
        forward: launcher ``(x, *args) -> (*outputs, *saved)``.
        backward: launcher ``(*gradients, *saved, x, *args) -> gradient of x``; None where there is
            no gradient.
        takes: ``(x, *args) -> bool``: whether the kernels can read what they get.
        by_blocks: the formula on the CPU, block by block: ``(x, *args, want_grad) -> (loss,
            gradient of the sum, 1 / divisor or None)``.
        has_blocks: ``(x, *args) -> bool``: whether that applies.
        of_finite: a shorter formula on the CPU, ``(x, *args) -> outputs``, or None where it finds
            something that is not finite; runs where ``by_blocks`` does not.
        outputs, constants: see ``_op.differentiable``.
        empty: whether the launchers take tensors without elements.
        levels: how several levels are taken.
    """

    def __init__(
        self,
        eager: Callable,
        forward: Callable,
        backward: Callable | None,
        takes: Callable,
        *,
        by_blocks: Callable | None = None,
        has_blocks: Callable = lambda *args: True,
        of_finite: Callable | None = None,
        outputs: int = 1,
        constants: int = 0,
        empty: bool = False,
        levels: OverLevels | None = None,
    ):
        self.of_finite = of_finite
        self.eager, self.takes, self.kernels, self.empty = eager, takes, forward, empty
        if backward is not None:
            self.kernels = _op.differentiable(
                forward, backward, eager, outputs=outputs, constants=constants
            )
        self.levels = levels
        if levels is not None and levels.forward is not None:
            self.level_kernels = _op.differentiable_levels(
                levels.forward, backward, self._levels_of_eager, levels.per_level
            )
        self.by_blocks, self.has_blocks = by_blocks, has_blocks
        self.blockwise = by_blocks and _op.differentiable(
            by_blocks, _backward_in_place, lambda x, *args: eager(x, *args[:-1]),
            outputs=outputs, constants=constants, given=2,
        )  # fmt: skip

    def by_kernels(self, x: Tensor, *args) -> bool:
        """Whether the kernels run; ``args`` may end where ``takes`` needs no more."""
        return use_triton(x) and (self.empty or not_empty(x)) and self.takes(x, *args)

    def __call__(self, x: Tensor, *args):
        if self.by_kernels(x, *args):
            return self.kernels(x, *_op.packed(x, args))
        # not "if self.blockwise": torch 2.11 cannot trace the truth of a function of autograd
        if self.by_blocks is not None and _blocks.usable(x) and self.has_blocks(x, *args):
            if not (x.requires_grad and torch.is_grad_enabled()):
                return self.by_blocks(x, *args, False)[0]
            result = self.blockwise(x, *args, True)
            # it notices a change of its own arguments, but not of what these hold
            return watched(result, [a for a in args if isinstance(a, tuple)])
        result = self.of_finite(x, *args) if self.of_finite and _blocks.usable(x) else None
        if result is None:
            result = self.eager(x, *args)
        return result if _op.traced(x) else watched(result, (x, *args))

    def of(
        self,
        parse: Callable,
        x: Levels,
        beside: dict,
        common: tuple,
        class_dim: int = -1,
        name: str = "logits",
    ) -> Tensor | list[Tensor]:
        """The loss of what ``parse`` makes of ``x`` and what lies beside it: see ``_levels``."""
        if not is_levels(x):
            value = self(*parsed_one(parse, x, beside.values(), class_dim, name), *common)
            return value if class_dim == -1 else class_back(value, class_dim, x)
        levels = parsed(parse, x, beside, class_dim, name)
        if common[-1] == "none":
            values = [self(*level, *common) for level in levels]
            return [class_back(v, class_dim, level) for v, level in zip(values, x, strict=True)]
        return self.over_levels(levels, common)

    def over_levels(self, levels: list[tuple], common: tuple) -> Tensor:
        """One value of all levels, with one divisor."""
        n = self.levels.per_level
        rest = (*levels[0][n:], *common)
        own = [level[:n] for level in levels]
        if self.levels.forward and all(self._kernels_take_level(*level, *rest) for level in own):
            return self.level_kernels(own, _op.packed(own[0][0], rest))
        xs = [level[0] for level in own]
        if len(xs) > 1 and _blocks.usable(*xs) and not _blocks.many(*xs, blocks=1):
            # a call costs more than what it computes
            return watched(self(*joined(own)[0], *rest), (own, rest))
        return self._summed_levels(self, own, rest)

    def _kernels_take_level(self, x: Tensor, *args) -> bool:
        return self.by_kernels(x, *args) or (use_triton(x) and is_empty(x))

    def _levels_of_eager(self, levels, *rest) -> Tensor:
        return self._summed_levels(self.eager, levels, rest)

    def _summed_levels(self, loss: Callable, levels, rest) -> Tensor:
        total = sum(loss(*level, *rest[:-1], "sum") for level in levels)
        if rest[-1] == "sum":
            return total
        avg_factor = rest[self.levels.avg_factor - self.levels.per_level]
        count = 0
        if avg_factor is None:
            count = sum(self.levels.count(*level, *rest) for level in levels)
        return divided_by(total, mean_divisor(count, avg_factor))


def _tensors(args):
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (tuple, list)):
            yield from _tensors(a)


def watched(result, args: tuple):
    """The result, whose backward raises if an input was changed in place since, as the kernels'.

    Plain torch may keep a copy of an input and not notice, or the input and notice.
    """
    outputs = [r for r in ((result,) if isinstance(result, Tensor) else result) if r.requires_grad]
    if not outputs:
        return result
    inputs = list(_tensors(args))
    if not inputs:
        return result
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


class WholeBatch:
    """The same for a loss that looks at all levels at once, of ``(levels, *rest)``.

    Args:
        eager: ``(levels, *rest) -> outputs``; None for ``reference`` where it has no derivative.
        forward: launcher ``([x of each level], ..., *rest) -> (*outputs, *saved)``.
        backward: launcher of each level.
        per_level: so many arguments are a level's own.
        by_blocks: ``([x], ..., *rest, whether a gradient is wanted) -> (*outputs, [gradient])``, an
            op where a graph is to have it, too.
        reference: what double backward differentiates.
        empty: whether the launchers take a batch without elements.
    """

    def __init__(
        self,
        eager: Callable,
        forward: Callable,
        backward: Callable,
        takes: Callable,
        per_level: int,
        *,
        reference: Callable | None = None,
        by_blocks: Callable | None = None,
        outputs: int = 1,
        constants: int = 0,
        empty: bool = False,
    ):
        self.eager, self.takes, self.empty = eager, takes, empty
        options = {"outputs": outputs, "constants": constants}
        self.kernels = _op.differentiable_levels(forward, backward, reference, per_level, **options)
        self.by_blocks = by_blocks
        self.blockwise = by_blocks and _op.differentiable_levels(
            by_blocks,
            _backward_by_blocks,
            lambda levels, *rest: reference(levels, *rest[:-1]),
            per_level,
            **options,
        )

    def by_kernels(self, levels: list[tuple], *rest) -> bool:
        """Whether the kernels run."""
        full = self.empty
        for level in levels:  # a generator would cost a call a level
            x = level[0]
            if not (use_triton(x) and self.takes(*level, *rest)):
                return False
            if not self.empty:
                if not_empty(x):
                    full = True
                elif not is_empty(x):
                    return False
        return full

    def __call__(self, levels: list[tuple], *rest):
        xs = [level[0] for level in levels]
        if self.by_kernels(levels, *rest):
            return self.kernels(levels, _op.packed(xs[0], rest))
        if self.runs_by_blocks(xs):
            want_grad = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
            if _op.traced(xs[0]):
                rest = _op.packed(xs[0], rest)
            result = self.blockwise(levels, (*rest, want_grad))
        else:
            result = self.eager(levels, *rest)
        return result if _op.traced(xs[0]) else watched(result, (levels, rest))

    def runs_by_blocks(self, xs: list[Tensor]) -> bool:
        """Whether ``by_blocks`` runs; a graph packs hyper-parameters, too short for float64."""
        if self.by_blocks is None:
            return False
        if isinstance(self.by_blocks, _op.Op) and _blocks.in_graph():
            return all(
                x.device.type == "cpu" and x.dtype != torch.float64 and not_empty(x) for x in xs
            )
        return _blocks.usable(*xs) and _blocks.many(*xs)


def _backward_by_blocks(grad, gradient, x, *args):
    return (gradient * grad).to(x.dtype)


def _backward_in_place(grad, gradient, scale, x, *args):
    factor = grad if scale is None else grad * scale
    if factor.dim() > 0:  # one of each layer, row or logit
        factor = factor.reshape(*factor.shape, *[1] * (x.dim() - factor.dim()))
    return gradient.mul_(factor).to(x.dtype)
