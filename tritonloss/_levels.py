"""Heads as they come: a list of levels in place of one tensor, and classes in any dim.

A level of a pyramid is read where it lies. With ``class_dim`` a channels-first head is seen through
a view; nothing is permuted in memory, and nothing is concatenated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _checks as check

# What takes a tensor takes the levels of a head.
Levels = Tensor | Sequence[Tensor]
# Labels or dense targets, or a pair (labels, quality).
LevelTargets = Levels | tuple[Levels, Levels]


def is_levels(x) -> bool:
    return isinstance(x, (list, tuple))


def of_levels(function: Callable, x):
    """``function`` of a tensor, or of each level."""
    return [function(level) for level in x] if is_levels(x) else function(x)


def class_last(x: Tensor, class_dim: int, name: str) -> Tensor:
    """A view of ``x`` whose last dim is ``class_dim``."""
    check.is_tensor(name, x)
    check.is_index("class_dim", class_dim)
    if class_dim == -1 or x.dim() == 0:
        return x
    if not -x.dim() <= class_dim < x.dim():
        raise ValueError(
            f"class_dim must be a dim of {name}, which has shape {tuple(x.shape)}; got {class_dim}"
        )
    return x.movedim(class_dim, -1)


def _beside(x: Tensor, value, class_dim: int):
    """What lies beside ``x``: values per logit move their classes along, values per row have none.

    A pair (labels, quality) is looked into.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(_beside(x, v, class_dim) for v in value)
    if not isinstance(value, Tensor) or value.dim() != x.dim() or x.dim() < 2:
        return value
    return value.movedim(class_dim, -1)


def class_back(value: Tensor, class_dim: int, x: Tensor) -> Tensor:
    """A result per logit in the layout of the head."""
    return value.movedim(-1, class_dim) if value.dim() == x.dim() > 1 else value


def _split(name: str, value, x: Sequence, x_name: str) -> list:
    """The argument of each level; of a pair of lists (labels, quality) the pair of each level."""
    if value is None:
        return [None] * len(x)
    if not is_levels(value):
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = f"a tensor of shape {tuple(value.shape)}"
        raise TypeError(f"{name} must be a list of {len(x)} levels, as {x_name} is; got {got}")
    if value and all(map(is_levels, value)):
        if len(value) != 2:
            raise ValueError(
                f"{name} must be a list of {len(x)} levels or a pair of such lists; got "
                f"{len(value)} lists"
            )
        parts = [_split(f"{name}[{k}]", part, x, x_name) for k, part in enumerate(value)]
        return list(zip(*parts, strict=True))
    if len(value) != len(x):
        raise ValueError(
            f"{name} must have one entry for each of {len(x)} levels; got {len(value)}"
        )
    return list(value)


def _alike(levels: Sequence[tuple], x_name: str, names: Sequence[str], classes: bool) -> None:
    """Raise unless levels have one dtype, one device and, with ``classes``, one number of them, and
    each has beside it what the others have."""
    first = levels[0]
    for k, level in enumerate(levels):
        for what in ("dtype", "device"):
            here, there = (getattr(of[0], what) for of in (level, first))
            if here != there:
                raise ValueError(
                    f"level {k}: {x_name} must have one {what} in all levels; got {here} beside "
                    f"{there}"
                )
        if classes and level[0].shape[-1] != first[0].shape[-1]:
            raise ValueError(
                f"level {k}: {x_name} must have as many classes in all levels; got "
                f"{level[0].shape[-1]} beside {first[0].shape[-1]}"
            )
        if [a is None for a in level] != [a is None for a in first]:
            raise ValueError(
                f"level {k}: {' and '.join(names)} must have one form in all levels; got another "
                "than in level 0"
            )


def parsed(
    parse: Callable,
    x: Levels,
    beside: dict[str, object],
    class_dim: int = -1,
    name: str = "logits",
    classes: bool = True,
) -> list[tuple]:
    """``parse(x, *beside)`` of each level, classes last; an error tells the level.

    Args:
        beside: what comes with ``x``, by the name of the argument.
        classes: whether what ``parse`` gives first has classes, as many in each level.
    """
    if not x:
        raise ValueError(f"{name} must have at least one level; got an empty {type(x).__name__}")
    each = [_split(key, value, x, name) for key, value in beside.items()]
    levels = []
    for k, (level, *rest) in enumerate(zip(x, *each, strict=True)):
        try:
            levels.append(parsed_one(parse, level, rest, class_dim, name))
        except (TypeError, ValueError) as error:
            raise type(error)(f"level {k}: {error}") from None
    _alike(levels, name, list(beside), classes)
    return levels


def parsed_levels(
    parse: Callable,
    x: Levels,
    beside: dict,
    class_dim: int,
    name: str = "logits",
    classes: bool = True,
):
    """``parsed``, where a tensor is a list of one."""
    if is_levels(x):
        return parsed(parse, x, beside, class_dim, name, classes)
    return [parsed_one(parse, x, beside.values(), class_dim, name)]


def parsed_one(
    parse: Callable, x: Tensor, beside: Sequence, class_dim: int = -1, name: str = "logits"
) -> tuple:
    """``parse`` of one tensor and what lies beside it, classes last."""
    if class_dim == -1:
        return parse(x, *beside)
    last = class_last(x, class_dim, name)
    try:
        return parse(last, *(_beside(x, v, class_dim) for v in beside))
    except ValueError as error:
        shown = f" (shapes with dim {class_dim} last)" if "shape" in str(error) else ""
        raise ValueError(f"{error}{shown}") from None


def joined(levels: Sequence[Sequence[Tensor | None]]) -> tuple[list[Tensor | None], list[int]]:
    """The first tensors of all levels as one, (B, rows, C), then what lies beside them, (B, rows)
    or (B, rows, C); and how many rows each level has. A level is copied once."""
    shapes = [level[0].shape for level in levels]
    images = shapes[0][0] if all(len(s) > 2 and s[0] == shapes[0][0] for s in shapes) else 1
    sizes = [math.prod(shape[:-1]) // max(images, 1) for shape in shapes]

    def rows(values: tuple) -> Tensor | None:
        if values[0] is None:
            return None
        pairs = list(zip(values, shapes, strict=True))
        if len({v.dim() < len(s) for v, s in pairs}) > 1:  # weights of rows beside those of logits
            values = [(v[..., None] if v.dim() < len(s) else v).expand(s) for v, s in pairs]
        parts = zip(values, sizes, shapes, strict=True)
        return torch.cat([v.reshape(images, n, *v.shape[len(s) - 1 :]) for v, n, s in parts], 1)

    return [rows(values) for values in zip(*levels, strict=True)], sizes
