"""Launches of the ranking losses: exact, without positive-negative pairs, without a host sync.

Forward: ``compact`` finds the positives, ``order`` and ``merge`` sort them and place the knots,
``prepare``, ``negatives`` and ``collect`` count the negatives between knots, ``settle`` makes
ranks, gradients and values of it, ``means`` averages them over lists. In the launches of
``prepare``, ``collect`` and ``settle`` programs of their own do what only positives need.
Backward: ``negatives`` reads the logits once and writes their gradient, ``scatter`` adds the
positives'. The passes: `_ranking_logits`, `_ranking_pairs`, `_ranking_positives`; their tables:
`_ranking_scratch`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonloss._op import launcher, wrap_triton

from ._config import (
    COLLECT,
    COLLECT_COPIES,
    MERGE,
    MERGE_ACROSS,
    PAIRED_ACROSS,
    PAIRS,
    PAIRS_ACROSS,
    RANKING,
    SCANS,
)
from ._finish import at
from ._logits import walk_over, walkable
from ._numbers import scalar_args
from ._ranking_logits import collect_kernel, compact_kernel, negatives_kernel, scatter_kernel
from ._ranking_pairs import PAIRED, merge_kernel, order_kernel
from ._ranking_positives import means_kernel, settle_kernel
from ._ranking_scratch import (
    CELL_BLOCKS,
    COUNT,
    FIRST,
    KNOT_ROWS,
    KNOTS,
    MISS,
    OFFSET,
    PLACE_ROWS,
    SCALE,
    SORTED_VALUES,
    SUM_ROWS,
    float_words,
    lookup_words,
)
from ._ranking_table import LEAST_FRACTION, WORDS, prepare_kernel
from ._walk import cached, cdiv, contiguous_strides, merged_dims

# Programs of a grid that loops: about eight to a multiprocessor of a large GPU.
MAX_PROGRAMS = 1024


class Spec(NamedTuple):
    """In what the ranking losses differ."""

    name: str  # of the public function
    LOSS: str  # what the passes over positives compute
    sorts_by: str | None = None  # "quality" or "error" at a positive, None: the score alone
    spreads: bool = False  # positives of lower quality receive a share of the others' errors
    interpolated: bool = False  # the best precision at a score or below it counts
    first_row: Any = MISS  # whose mean is the first value
    coefficient: bool = False  # the second value is differentiated in the rows' errors
    second_gradient: bool = False  # the second value has a gradient of its own in the logits
    fraction: int = LEAST_FRACTION  # bits that a distance needs beside a count in a word


SPECS = {
    "rank_sort": Spec("rank_sort_loss", "rank_sort", "quality", spreads=True, second_gradient=True),
    "ap": Spec("ap_loss", "ap", interpolated=True, first_row=FIRST),
    "ap_plain": Spec("ap_loss", "ap", first_row=FIRST),
    # it divides by sums of distances as small as 1e-5
    "alrp": Spec("alrp_loss", "alrp", "error", coefficient=True, fraction=34),
}


# With dense targets, positives there is room for whatever the number of logits: 11 MiB of scratch.
DENSE_POSITIVES = 65536


def capacity_of(n: int, labels) -> int:
    """Positives there is room for: every anchor has one class; of dense targets, an eighth of the
    n logits, which keeps the scratch at about 32 bytes a logit, or ``DENSE_POSITIVES``. More gives
    NaN, never a wrong number.
    """
    if labels:
        return max(sum(map(Tensor.numel, labels)), 1)
    return max(n // 8, min(n, DENSE_POSITIVES))


class _Level(NamedTuple):
    """What the kernels read of a level, and the number of items of the levels before it."""

    x: Tensor
    labels: Tensor | None
    value: Tensor | None
    dense: Tensor | None
    weight: Tensor | None
    group: Tensor | None
    start: int


def _levels_of(x, labels, value, dense, weight, group, start) -> list[_Level]:
    """Those that have elements."""
    levels = []
    for k, logits in enumerate(x):
        if logits.numel() > 0:
            groups = group[k].expand(logits.shape) if group else None
            beside = (at(labels, k), at(value, k), at(dense, k), at(weight, k))
            levels.append(_Level(logits, *beside, groups, start[k]))
    return levels


def fraction_bits(n: int) -> int:
    """Bits of a fixed-point distance in [0, 1] of which n sum below 2**62."""
    bits = 40
    while n >= 1 << (62 - bits):  # of a graph's symbolic n, bit_length() would fix the value
        bits -= 1
    return bits


class _Items(NamedTuple):
    """How the kernels that look at positives walk over items: rows or, with dense targets, logits.

    ``compact``: inner sizes, strides of x, rows, dense, weight, group; those of x, weight and group
    over classes. ``scatter``: inner sizes, strides of rows and out; that of out over classes.
    """

    count: int
    n_dims: int
    compact: tuple[int, ...]
    scatter: tuple[int, ...]


def _items(level: _Level, out=None) -> _Items:
    operands = level.dense, level.weight, level.group, out
    strides = tuple([None if t is None else t.stride() for t in operands])
    return _items_of(level.x.shape, level.x.stride(), strides, level.labels is not None)


@cached
def _items_of(shape, x_strides, others, by_row) -> _Items:
    none, rows = (0,) * len(shape), (*contiguous_strides(shape[:-1]), 0)
    # a weight may have no dim of classes
    others = [none if s is None else (*s, 0)[: len(shape)] for s in others]
    operands = [x_strides, rows, *others]
    x_class, weight_class, group_class, out_class = 0, 0, 0, 0
    if by_row:
        x_class, _, _, weight_class, group_class, out_class = (s[-1] for s in operands)
        shape = shape[:-1]
        # rows in the order of the labels
        layout = merged_dims(shape, [s[:-1] for s in (rows, *operands)])
    else:
        layout = merged_dims(shape, [x_strides, *operands])
    return _Items(
        math.prod(shape),
        layout.n_dims,
        (*layout.numbers(1, 2, 3, 4, 5), x_class, weight_class, group_class),
        (*layout.numbers(2, 6), out_class),
    )


def _programs(n: int) -> int:
    """Of the pass over n logits."""
    return min(cdiv(n, RANKING.block), MAX_PROGRAMS)


def _negatives(
    scratch, level, delta, ignore_index, num_groups, histogram=None, apart=False, upstream=None,
    out=None,
):  # fmt: skip
    """Launch the pass over all logits of a level, forward or backward."""
    x, labels, _, dense, weight, group, _ = level
    lists = (0,) * x.dim() if group is None else group.stride()
    walk = walk_over(x, dense, labels, weight, None, [out], lists)
    pointer, (number,) = scalar_args(delta, 1)
    n = x.numel()
    wrap_triton(negatives_kernel, x)[(_programs(n),)](
        x,
        dense,
        labels,
        weight,
        group,
        scratch.floats,
        scratch.lookup,
        scratch.lists,
        histogram,
        scratch.counter,
        pointer,
        upstream,
        out,
        n,
        x.shape[-1],
        num_groups,
        scratch.capacity,
        *walk.numbers,
        ignore_index,
        number,
        BACKWARD=out is not None,
        APART=apart,
        **walk.constants,
        BLOCK=RANKING.block,
        num_warps=RANKING.num_warps,
    )


class Scratch(NamedTuple):
    """What the backward needs of the forward."""

    floats: Tensor  # float32 tables of positives and knots, and the scale
    lookup: Tensor  # int64, what the pass over the logits looks up, and the positives' items
    lists: Tensor  # [2, num_groups] int32
    counter: Tensor  # [2] int64

    @property
    def capacity(self) -> int:
        """Positives there is room for."""
        return self.floats.numel() // SCALE.value


def scratch_of(x, capacity, has_group, num_groups, counter) -> Scratch:
    device = x.device
    return Scratch(
        torch.empty(float_words(capacity), dtype=torch.float32, device=device),
        torch.empty(lookup_words(capacity), dtype=torch.int64, device=device),
        # without groups nobody looks for an empty list
        (torch.zeros if has_group else torch.empty)(
            2, num_groups, dtype=torch.int32, device=device
        ),
        counter,
    )


def takes(x, labels, value, dense, weight, group, *args) -> bool:
    """True if the kernels can read the operands in place."""
    return walkable(x, dense, weight, None if group is None else group.expand(x.shape))


def _compact(level, spec, raw, raw_list, raw_item, counter, ignore_index, num_groups):
    x, labels, value, dense, weight, group, start = level
    items = _items(level)
    wrap_triton(compact_kernel, x)[(cdiv(items.count, RANKING.block),)](
        x, dense, labels, value, weight, group, raw, raw_list, raw_item, counter,
        start, items.count, x.shape[-1], num_groups, raw_item.numel(), *items.compact,
        ignore_index,
        HAS_KEY=spec.sorts_by == "quality", N_DIMS=items.n_dims, BLOCK=RANKING.block,
        num_warps=RANKING.num_warps,
    )  # fmt: skip


def launch(
    x, labels, value, dense, weight, group, start, delta, loss, ignore_index, num_groups,
    exchange=None,
):  # fmt: skip
    """See ``forward``.

    ``exchange``: None, or what the processes that share the batch tell each other:
    ``agree(positives, n) -> most logits of one process``, ``positives(raw, lists, items, counter)
    -> the same of all`` and ``integers(tensor) -> sum``.
    """
    levels = _levels_of(x, labels, value, dense, weight, group, start)
    spec, device, x_all, x = SPECS[loss], x[0].device, x, x[0]
    n = sum(map(Tensor.numel, x_all))
    capacity = capacity_of(n, labels)
    raw = torch.empty(2, capacity, dtype=torch.float32, device=device)
    has_group = len(group) > 0
    raw_list = None
    if has_group or exchange is not None:
        raw_list = torch.empty(capacity, dtype=torch.int32, device=device)
    raw_item = torch.empty(capacity, dtype=torch.int64, device=device)
    counter = torch.zeros(2, dtype=torch.int64, device=device)
    for level in levels:
        _compact(level, spec, raw, raw_list, raw_item, counter, ignore_index, num_groups)
    bits = fraction_bits(n)
    if exchange is not None:
        bits = fraction_bits(exchange.size * exchange.agree(counter[0], n))
        raw, raw_list, raw_item, counter = exchange.positives(raw, raw_list, raw_item, counter)
        capacity = raw_item.numel()

    places = torch.empty(PLACE_ROWS, capacity, dtype=torch.int32, device=device)
    scratch = scratch_of(x, capacity, has_group, num_groups, counter)
    floats, lookup, lists, _ = scratch
    programs = max([_programs(level.x.numel()) for level in levels], default=1)
    n_words = min(max(WORDS, 4 * capacity), 12 * capacity)  # at most 96 bytes a positive's place
    histogram = torch.empty(n_words, dtype=torch.int64, device=device)
    # processes add theirs up: no word holds both
    least = spec.fraction if exchange is None else 64
    first = torch.empty((), dtype=torch.float32, device=device)
    second = torch.empty((), dtype=torch.float32, device=device)

    pointer, (number,) = scalar_args(delta, 1)
    grid = (min(cdiv(capacity, PAIRS.block), MAX_PROGRAMS),)
    wrap_triton(order_kernel, x)[grid](
        raw, raw_list, raw_item, floats, places, lookup, counter, capacity,
        HAS_GROUP=has_group, TILE=PAIRS.block, ACROSS=PAIRS_ACROSS, num_warps=PAIRS.num_warps,
    )  # fmt: skip
    wrap_triton(merge_kernel, x)[grid](
        floats, places, lookup, lists, counter, pointer, capacity, num_groups, number,
        HAS_GROUP=has_group, TILE=MERGE.block, ACROSS=MERGE_ACROSS, num_warps=MERGE.num_warps,
    )  # fmt: skip
    # what goes on beside the passes over logits and histogram
    beside = min(cdiv(capacity, PAIRED.value), MAX_PROGRAMS)
    sums = torch.empty(SUM_ROWS, capacity, dtype=torch.float64, device=device)
    cells = max(CELL_BLOCKS.value, min(cdiv(n_words, 4096), 256))
    wrap_triton(prepare_kernel, x)[(cells + beside,)](
        floats, lookup, histogram, places, sums, counter, pointer, n, n_words, capacity, programs,
        cells, bits, number, LEAST=least, TABLE=not has_group, TILE=RANKING.block,
        PAIRS=spec.spreads, ACROSS=PAIRED_ACROSS, num_warps=RANKING.num_warps,
    )  # fmt: skip
    for level in levels:
        apart = least > LEAST_FRACTION
        _negatives(scratch, level, delta, ignore_index, num_groups, histogram, apart)
    total = None
    if exchange is not None:
        total = torch.zeros(2, 2 * capacity, dtype=torch.int64, device=device)
    collectors = min(cdiv(2 * capacity, COLLECT.block), MAX_PROGRAMS)
    beside = beside if spec.spreads else 0
    wrap_triton(collect_kernel, x)[(collectors + beside,)](
        histogram, floats, total, lookup, places, sums, counter, pointer, capacity, collectors,
        number,
        PAIRS=spec.spreads, ACROSS=PAIRED_ACROSS, COPIES=COLLECT_COPIES, BLOCK=COLLECT.block,
        num_warps=COLLECT.num_warps,
    )  # fmt: skip
    if exchange is not None:
        whole = exchange.integers(torch.cat([total.view(-1), counter[1:]]))
        counter[1:] = whole[-1:]
        count, offset = whole[:-1].view(2, -1)
        knots = floats[KNOTS.value * capacity : SORTED_VALUES.value * capacity].view(KNOT_ROWS, -1)
        knots[COUNT.value] = count
        knots[OFFSET.value] = offset * 0.5**bits
    scanners = min(num_groups, MAX_PROGRAMS)
    wrap_triton(settle_kernel, x)[(scanners + beside,)](
        floats, places, lookup, sums, lists, counter, pointer, first, second, capacity, num_groups,
        scanners, number, HAS_GROUP=has_group, LOSS=spec.LOSS, INTERPOLATED=spec.interpolated,
        TILE=SCANS.block, ACROSS=PAIRED_ACROSS, num_warps=SCANS.num_warps,
    )  # fmt: skip
    if has_group:
        wrap_triton(means_kernel, x)[(1,)](
            floats, places, counter, first, second, capacity,
            VALUE_ROW=spec.first_row.value, LOSS=spec.LOSS, TILE=RANKING.block,
            num_warps=RANKING.num_warps,
        )  # fmt: skip

    return first, second, _coefficient(scratch, levels, x_all, spec), *scratch


def _coefficient(scratch, levels, x, spec):
    """Of each row's error, in the order of levels and rows."""
    if not spec.coefficient:
        return torch.empty(0, dtype=torch.float32, device=x[0].device)
    rows = sum(math.prod(level.shape[:-1]) for level in x)
    coefficient = torch.zeros(rows, dtype=torch.float32, device=x[0].device)
    if not rows:
        return coefficient
    if not levels or levels[0].labels is not None:  # rows are the items
        items = _Items(rows, 1, (), (1, 1, rows, *[0, 0, 0, 1] * 2, 0))
        _scatter(scratch, items, 0, None, coefficient, (None, None), True)
        return coefficient
    found = []
    for level in levels:
        of_logits = torch.zeros(level.x.shape, dtype=torch.float32, device=coefficient.device)
        items = _items(level, of_logits)
        _scatter(scratch, items, level.start, None, of_logits, (None, None), True)
        found.append(of_logits.sum(-1).reshape(-1))
    return torch.cat(found) if len(found) > 1 else found[0]


@launcher
def forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values of a ranking loss, and what its backward needs.

    Args, of each level or an empty list for None:
        x: logits (..., C), any strides.
        labels: contiguous (...).
        value: contiguous (...), quality or localisation error.
        dense: targets (..., C), any strides.
        weight: contiguous (...), or (..., C) with any strides.
        group: integers that broadcast to x.
        start: items (rows with labels, logits with dense targets) of the levels before.

    Args:
        delta: a tuple of one number, or a float tensor of one entry.
        loss: a key of ``SPECS``.

    Returns:
        ``(first value, second value, coefficient of the rows' errors, *Scratch)``. The second is
        Rank & Sort's sorting error or aLRP's loc; the coefficient, flat, is empty but for aLRP.
    """
    return launch(
        x, labels, value, dense, weight, group, start, delta, loss, ignore_index, num_groups
    )


def _scatter(scratch, items, start, labels, out, upstream, coefficient):
    capacity = scratch.capacity
    wrap_triton(scatter_kernel, out)[(min(cdiv(capacity, RANKING.block), MAX_PROGRAMS),)](
        scratch.floats, scratch.lookup, labels, scratch.counter, *upstream, out, start,
        items.count, capacity, *items.scatter, COEFFICIENT=coefficient,
        N_DIMS=items.n_dims, BLOCK=RANKING.block, num_warps=RANKING.num_warps,
    )  # fmt: skip


@launcher
def backward(
    first_grad: Tensor,
    second_grad: Tensor,
    floats: Tensor,
    lookup: Tensor,
    lists: Tensor,
    counter: Tensor,
    x: Tensor,
    labels: Tensor | None,
    value: Tensor | None,
    dense: Tensor | None,
    weight: Tensor | None,
    group: Tensor | None,
    start: int,
    delta: Tensor,
    loss: str,
    ignore_index: int,
    num_groups: int,
    process_group: str = "",
    capacity: int = 0,
    factor: int = 1,
) -> Tensor:
    """Gradient of the logits: their dtype, and their strides if they are dense in memory."""
    scratch = Scratch(floats, lookup, lists, counter)
    group = None if group is None else group.expand(x.shape)
    grad = torch.empty_like(x)
    level = _Level(x, labels, value, dense, weight, group, start)
    _negatives(scratch, level, delta, ignore_index, num_groups, upstream=first_grad, out=grad)
    places = _items(level, grad)
    second_grad = second_grad if SPECS[loss].second_gradient else None
    upstream = first_grad, second_grad
    _scatter(scratch, places, start, labels, grad, upstream, False)
    return grad
