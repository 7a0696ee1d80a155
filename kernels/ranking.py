"""Kernels of the ranking losses: exact, without positive-negative pairs, without a host sync.

1. ``compact``   collects the P positives in any order; P stays on the device.
2. ``order``     sorts them by (list, score, value) by counting how many precede each.
3. ``pairs``     sums over pairs of positives, and places the 2P knots s_i - delta, s_i + delta.
4. ``histogram`` one read of the logits: count and summed distance to the knot of each segment.
5. ``collect``   adds the private copies; integers, so that no order of atomics shows.
6. ``settle``    FP_i from the segments, then what each loss makes of it.
7. ``spread``    what a positive receives from other positives once all ranks are known.
8. ``tabulate``  value and slope of the negatives' gradient at each knot.
9. ``finish``    means over positives and lists.
10. ``gradient`` one read of the logits, one write; ``scatter`` adds the positives'.

Steps 2, 3 and 6 to 8 are passes over 64 x 64 pairs with sums of positive terms in a fixed order:
no scans, no cancellation. Grids are fixed; each program loops to the P that it reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._index import coordinates, offset_of, tile_of
from ._launch import PAIRS, RANKING, scalar_args
from ._layout import contiguous_strides, merged_dims
from .elementwise import judged, places, walk_over

MAX_COPIES = tl.constexpr(64)
# Programs of a grid that loops: about eight to a multiprocessor of a large GPU.
MAX_PROGRAMS = 1024
ALRP_EPS = tl.constexpr(1e-5)
# Rows of the scratch tensors.
SCORE, VALUE, RANK_PLUS, MISS, FIRST, SECOND, WEIGHT, OWN, OTHER = (
    tl.constexpr(k) for k in range(9)
)
POSITIVE_ROWS, KNOT_ROWS = 9, 7
LOWER, UPPER, START, SIZE, LIST = (tl.constexpr(k) for k in range(5))
KEY, HIGH, LOW, COUNT, OFFSET, LEVEL, SLOPE = (tl.constexpr(k) for k in range(7))


@triton.jit
def load_delta(delta_ptr, delta):
    """``(delta, 1 / (2 delta))``; the latter 0 for a hard step."""
    if delta_ptr is not None:
        delta = tl.load(delta_ptr).to(tl.float32)
    else:
        delta = tl.cast(delta, tl.float32)
    return delta, tl.where(delta > 0, 0.5 / tl.where(delta > 0, delta, 1.0), 0.0)


@triton.jit
def step(difference, delta, per_unit):
    """H of a difference of logits."""
    smooth = tl.minimum(tl.maximum(difference * per_unit + 0.5, 0.0), 1.0)
    return tl.where(delta > 0, smooth, tl.where(difference >= 0, 1.0, 0.0))


@triton.jit
def next_above(x):
    """The next larger float32 of a number that is not 0."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + tl.where(bits >= 0, 1, -1)).to(tl.float32, bitcast=True)


@triton.jit
def count_positives(counter_ptr, capacity):
    """P, an int32; no more than there is room for (``finish`` tells)."""
    return tl.minimum(tl.load(counter_ptr), capacity).to(tl.int32)


@triton.jit
def compact_kernel(
    # pointers
    x_ptr,  # logits
    dense_ptr,  # dense targets, or None
    label_ptr,  # [rows] integers, or None
    value_ptr,  # [rows] quality or localisation error, or None
    weight_ptr,  # [rows] or per logit, or None
    group_ptr,  # list of each logit, or None
    raw_ptr,  # [2, capacity] float32 out: score, value
    raw_list_ptr,  # [capacity] int32 out
    raw_item_ptr,  # [capacity] int64 out
    counter_ptr,  # [2] int64: positives, flag of something not finite
    # shapes
    n_items,  # rows with labels, logits with dense targets
    n_classes,
    num_groups,
    capacity,
    size_1,
    size_2,
    size_3,
    # strides
    x_s0,
    x_s1,
    x_s2,
    x_s3,
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    dense_s0,
    dense_s1,
    dense_s2,
    dense_s3,
    weight_s0,
    weight_s1,
    weight_s2,
    weight_s3,
    group_s0,
    group_s1,
    group_s2,
    group_s3,
    x_class,  # strides over classes, read with labels
    weight_class,
    group_class,
    # scalars
    ignore_index,
    # constants
    HAS_KEY: tl.constexpr,  # dense targets are qualities to sort by
    N_DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1-D grid; program i takes items [i BLOCK, (i+1) BLOCK)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    inside = offs < n_items - start
    coords = coordinates(start, offs, (1, size_1, size_2, size_3), N_DIMS)
    row = offset_of(coords, (row_s0, row_s1, row_s2, row_s3), N_DIMS)
    if label_ptr is not None:
        cls = tl.load(label_ptr + row, mask=inside, other=-1).to(tl.int64)
        positive = inside & (cls >= 0) & (cls < n_classes) & (cls != ignore_index)
        value = tl.full(offs.shape, 1.0, tl.float32)
    else:
        cls = tl.zeros(offs.shape, tl.int64)
        dense = offset_of(coords, (dense_s0, dense_s1, dense_s2, dense_s3), N_DIMS)
        value = tl.load(dense_ptr + dense, mask=inside, other=0.0).to(tl.float32)
        positive = inside & (value > 0)
    if weight_ptr is not None:
        weight = offset_of(coords, (weight_s0, weight_s1, weight_s2, weight_s3), N_DIMS)
        weight += cls * weight_class
        weight = tl.load(weight_ptr + weight, mask=positive, other=0.0).to(tl.float32)
        positive = positive & (weight > 0)
    group = tl.zeros(offs.shape, tl.int64)
    if group_ptr is not None:
        group = offset_of(coords, (group_s0, group_s1, group_s2, group_s3), N_DIMS)
        group += cls * group_class
        group = tl.load(group_ptr + group, mask=positive, other=-1).to(tl.int64)
        positive = positive & (group >= 0) & (group < num_groups)
    if value_ptr is not None:
        value = tl.load(value_ptr + row, mask=positive, other=0.0).to(tl.float32)
    elif not HAS_KEY:
        value = tl.zeros(offs.shape, tl.float32)
    x = offset_of(coords, (x_s0, x_s1, x_s2, x_s3), N_DIMS) + cls * x_class
    x = tl.load(x_ptr + x, mask=positive, other=0.0).to(tl.float32)
    # Neither may reach the order of the positives, which a NaN would make intransitive.
    x_bad = positive & (0.0 * x != 0.0)
    value_bad = positive & (0.0 * value != 0.0)
    if tl.sum((x_bad | value_bad).to(tl.int32), 0) > 0:
        tl.store(counter_ptr + 1, 1)

    found = positive.to(tl.int32)
    place = tl.cumsum(found, 0) - found
    first = tl.atomic_add(counter_ptr, tl.sum(found, 0).to(tl.int64), sem="relaxed")
    place = first + place
    mask = positive & (place < capacity)
    tl.store(raw_ptr + place, tl.where(x_bad, 0.0, x), mask=mask)
    tl.store(raw_ptr + capacity + place, tl.where(value_bad, 0.0, value), mask=mask)
    tl.store(raw_list_ptr + place, group.to(tl.int32), mask=mask)
    tl.store(raw_item_ptr + place, start + offs, mask=mask)


@triton.jit
def order_kernel(
    # pointers
    raw_ptr,  # [2, capacity]
    raw_list_ptr,
    raw_item_ptr,
    positive_ptr,  # [9, capacity] float32 out: SCORE, VALUE
    place_ptr,  # [5, capacity] int32 out: LIST
    item_ptr,  # [capacity] int64 out
    counter_ptr,
    # shapes
    capacity,
    # constants
    TILE: tl.constexpr,
):
    """1-D grid; a program takes blocks of TILE positives and counts what precedes each."""
    n_pos = count_positives(counter_ptr, capacity)
    first = tl.program_id(0) * TILE
    while first < n_pos:
        i = first + tl.arange(0, TILE)
        mask = i < n_pos
        s_i = tl.load(raw_ptr + i, mask=mask, other=0.0)
        v_i = tl.load(raw_ptr + capacity + i, mask=mask, other=0.0)
        g_i = tl.load(raw_list_ptr + i, mask=mask, other=0)
        k_i = tl.load(raw_item_ptr + i, mask=mask, other=0)
        before = tl.zeros([TILE], tl.int32)
        other = tl.cast(0, tl.int32)
        while other < n_pos:
            j = other + tl.arange(0, TILE)
            there = j < n_pos
            s_j = tl.load(raw_ptr + j, mask=there, other=0.0)[None, :]
            v_j = tl.load(raw_ptr + capacity + j, mask=there, other=0.0)[None, :]
            g_j = tl.load(raw_list_ptr + j, mask=there, other=0)[None, :]
            k_j = tl.load(raw_item_ptr + j, mask=there, other=0)[None, :]
            less = (v_j < v_i[:, None]) | ~(v_j > v_i[:, None]) & (k_j < k_i[:, None])
            less = (s_j < s_i[:, None]) | (s_j == s_i[:, None]) & less
            less = (g_j < g_i[:, None]) | (g_j == g_i[:, None]) & less
            before += tl.sum((less & there[None, :]).to(tl.int32), 1)
            other += TILE
        tl.store(positive_ptr + SCORE * capacity + before, s_i, mask=mask)
        tl.store(positive_ptr + VALUE * capacity + before, v_i, mask=mask)
        tl.store(place_ptr + LIST * capacity + before, g_i, mask=mask)
        tl.store(item_ptr + before, k_i, mask=mask)
        first += tl.num_programs(0) * TILE


@triton.jit
def pairs_kernel(
    # pointers
    positive_ptr,  # [9, capacity] out: RANK_PLUS, FIRST, SECOND
    place_ptr,  # [5, capacity] out: LOWER, UPPER, START, SIZE
    knot_ptr,  # [7, 2 capacity] out: KEY, HIGH, LOW
    list_ptr,  # [2, num_groups] int32 out: start and size
    counter_ptr,
    delta_ptr,
    # shapes
    capacity,
    num_groups,
    # scalars
    delta,
    # constants
    LOSS: tl.constexpr,
    TILE: tl.constexpr,
):
    """1-D grid over blocks of positives i; sums over all j of their list.

    rank_sort: FIRST the sorting error, SECOND its share per violator.
    alrp: FIRST the sum of the errors ahead.
    """
    delta, per_unit = load_delta(delta_ptr, delta)
    n_pos = count_positives(counter_ptr, capacity)
    first = tl.program_id(0) * TILE
    while first < n_pos:
        i = first + tl.arange(0, TILE)
        mask = i < n_pos
        s_i = tl.load(positive_ptr + SCORE * capacity + i, mask=mask, other=0.0)
        v_i = tl.load(positive_ptr + VALUE * capacity + i, mask=mask, other=0.0)
        g_i = tl.load(place_ptr + LIST * capacity + i, mask=mask, other=-1)
        start = tl.zeros([TILE], tl.int32)
        size = tl.zeros([TILE], tl.int32)
        ended = tl.zeros([TILE], tl.int32)  # windows that end below i's
        begun = tl.zeros([TILE], tl.int32)  # windows that begin before i's ends
        rank = tl.zeros([TILE], tl.float64)
        total = tl.zeros([TILE], tl.float64)
        wrong = tl.zeros([TILE], tl.float64)
        deficit = tl.zeros([TILE], tl.float64)
        surplus = tl.zeros([TILE], tl.float64)
        other = tl.cast(0, tl.int32)
        while other < n_pos:
            j = other + tl.arange(0, TILE)
            there = j < n_pos
            s_j = tl.load(positive_ptr + SCORE * capacity + j, mask=there, other=0.0)[None, :]
            g_j = tl.load(place_ptr + LIST * capacity + j, mask=there, other=-2)[None, :]
            start += tl.sum((there[None, :] & (g_j < g_i[:, None])).to(tl.int32), 1)
            mine = g_j == g_i[:, None]
            size += tl.sum(mine.to(tl.int32), 1)
            gap = s_j - s_i[:, None]
            ended += tl.sum((mine & (-gap > 2.0 * delta)).to(tl.int32), 1)
            begun += tl.sum((mine & ~(gap > 2.0 * delta)).to(tl.int32), 1)
            if LOSS != "rank_sort":
                mine = mine & (j[None, :] != i[:, None])
            above = tl.where(mine, step(gap, delta, per_unit), 0.0)
            rank += tl.sum(above, 1).to(tl.float64)
            if LOSS != "ap":
                v_j = tl.load(positive_ptr + VALUE * capacity + j, mask=there, other=0.0)[None, :]
                if LOSS == "rank_sort":
                    better = above * (v_j - v_i[:, None])
                    wrong += tl.sum(tl.where(better < 0, above, 0.0), 1).to(tl.float64)
                    deficit += tl.sum(tl.maximum(-better, 0.0), 1).to(tl.float64)
                    surplus += tl.sum(tl.maximum(better, 0.0), 1).to(tl.float64)
                else:
                    total += tl.sum(above * v_j, 1).to(tl.float64)
            other += TILE
        if LOSS == "rank_sort":
            # current - target sorting error, from qualities relative to v_i: nothing cancels
            right = tl.where(mask, rank - wrong, 1.0)
            error = (deficit + wrong * (surplus / right)) / tl.where(mask, rank, 1.0)
            error = tl.where(wrong > 0, error, 0.0)
            share = error / tl.where(wrong > 0, wrong, 1.0)
            tl.store(positive_ptr + FIRST * capacity + i, error.to(tl.float32), mask=mask)
            tl.store(positive_ptr + SECOND * capacity + i, share.to(tl.float32), mask=mask)
        else:
            rank += 1.0
            tl.store(positive_ptr + FIRST * capacity + i, total.to(tl.float32), mask=mask)
        tl.store(positive_ptr + RANK_PLUS * capacity + i, rank.to(tl.float32), mask=mask)
        # Scores and knots of a list lie together; knot i comes after i knots of its own kind.
        lower = start + i + ended
        upper = start + i + begun
        tl.store(place_ptr + LOWER * capacity + i, lower, mask=mask)
        tl.store(place_ptr + UPPER * capacity + i, upper, mask=mask)
        tl.store(place_ptr + START * capacity + i, start, mask=mask)
        tl.store(place_ptr + SIZE * capacity + i, size, mask=mask)
        leads = mask & (start == i)
        tl.store(list_ptr + g_i, start, mask=leads)
        tl.store(list_ptr + num_groups + g_i, size, mask=leads)
        store_knot(knot_ptr, capacity, lower, s_i, -delta, mask)
        store_knot(knot_ptr, capacity, upper, s_i, delta, mask)
        first += tl.num_programs(0) * TILE


@triton.jit
def store_knot(knot_ptr, capacity, place, score, shift, mask):
    """score + shift as the unevaluated sum HIGH + LOW, and the KEY: x >= KEY iff x >= knot."""
    high = score + shift
    back = high - score
    low = (score - (high - back)) + (shift - back)
    key = tl.where(low > 0, next_above(high), high)
    tl.store(knot_ptr + KEY * 2 * capacity + place, key, mask=mask)
    tl.store(knot_ptr + HIGH * 2 * capacity + place, high, mask=mask)
    tl.store(knot_ptr + LOW * 2 * capacity + place, low, mask=mask)


@triton.jit
def segment_of(x, active, group, knot_ptr, list_ptr, num_groups, n_pos, HAS_GROUP: tl.constexpr):
    """Knot at the start of x's segment, and whether there is one."""
    if HAS_GROUP:
        base = 2 * tl.load(list_ptr + group, mask=active, other=0)
        size = 2 * tl.load(list_ptr + num_groups + group, mask=active, other=0)
        active = active & (size > 0)
    else:
        base = tl.zeros(x.shape, tl.int32)
        size = 2 * n_pos
    jump = tl.minimum(n_pos, 1)  # without positives no key is read
    while jump < 2 * n_pos:
        jump *= 2
    below = tl.zeros(x.shape, tl.int32)
    while jump > 0:
        candidate = tl.minimum(below + jump, size)
        if HAS_GROUP:
            key = tl.load(knot_ptr + base + candidate - 1, mask=active, other=float("inf"))
        else:  # all may look, what comes of it is dropped
            key = tl.load(knot_ptr + candidate - 1)
        below = tl.where(key <= x, candidate, below)
        jump = jump // 2
    return base + below - 1, active & (below > 0)


@triton.jit
def negatives_kernel(
    # pointers
    x_ptr,  # logits
    dense_ptr,  # dense targets, or None
    label_ptr,  # [rows] integers, or None
    weight_ptr,  # [rows] or per logit, or None
    group_ptr,  # list of each logit, or None
    knot_ptr,  # [7, 2 capacity]
    list_ptr,  # [2, num_groups]
    histogram_ptr,  # forward: [copies, 2 P, 2] int64, or None
    counter_ptr,
    delta_ptr,
    grad_ptr,  # backward: [] upstream gradient, or None
    scale_ptr,  # backward: [] float32
    out_ptr,  # backward: gradient of the logits
    # shapes
    n,
    n_classes,
    num_groups,
    capacity,
    n_slots,  # entries of the histogram, all copies together
    size_1,
    size_2,
    size_3,
    # strides
    x_s0,
    x_s1,
    x_s2,
    x_s3,
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    dense_s0,
    dense_s1,
    dense_s2,
    dense_s3,
    weight_s0,
    weight_s1,
    weight_s2,
    weight_s3,
    group_s0,
    group_s1,
    group_s2,
    group_s3,
    out_s0,
    out_s1,
    out_s2,
    out_s3,
    # scalars
    ignore_index,
    delta,
    # constants
    BACKWARD: tl.constexpr,
    FRACTION_BITS: tl.constexpr,  # of a fixed-point distance in units of 2 delta
    N_DIMS: tl.constexpr,
    CLASS_DIM: tl.constexpr,
    LINEAR: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
    RUN: tl.constexpr,  # logits that share a row or a class
    BLOCK: tl.constexpr,
):
    """Forward: histogram of the negatives over segments. Backward: gradient of all logits.

    1-D grid of persistent programs; each takes every num_programs-th tile of BLOCK logits.
    """
    _, per_unit = load_delta(delta_ptr, delta)
    n_pos = count_positives(counter_ptr, capacity)
    run, within = tile_of(BLOCK, RUN)
    offs = run + within
    sizes = (1, size_1, size_2, size_3)
    strides = (
        (x_s0, x_s1, x_s2, x_s3),
        (row_s0, row_s1, row_s2, row_s3),
        (dense_s0, dense_s1, dense_s2, dense_s3),
        (weight_s0, weight_s1, weight_s2, weight_s3),
    )
    group_strides = (group_s0, group_s1, group_s2, group_s3)
    upstream = 0.0
    if BACKWARD:
        upstream = tl.load(grad_ptr).to(tl.float32) * tl.load(scale_ptr)
    else:
        copies = tl.minimum(n_slots // tl.maximum(2 * n_pos, 1), MAX_COPIES)
        histogram_ptr += (tl.program_id(0) % copies).to(tl.int64) * n_pos * 4
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        coords = coordinates(start, run, sizes, N_DIMS, within)
        x_at, row, dense_at, weight_at, cls = places(
            start, offs, coords, strides, N_DIMS, CLASS_DIM, LINEAR, ROW_WEIGHT
        )
        group_at = offset_of(coords, group_strides, N_DIMS)
        inside = run < n - start
        # Loaded here, not in a function: see ``judged``. Unmasked loads are 16 bytes wide.
        if start + BLOCK <= n:
            x = tl.load(x_ptr + x_at)
            dense = tl.load(dense_ptr + dense_at) if dense_ptr is not None else run
            label = tl.load(label_ptr + row) if label_ptr is not None else run
            weight = tl.load(weight_ptr + weight_at) if weight_ptr is not None else run
            group = tl.load(group_ptr + group_at) if group_ptr is not None else run
        else:
            x = tl.load(x_ptr + x_at, inside, 0)
            dense = tl.load(dense_ptr + dense_at, inside, 0) if dense_ptr is not None else run
            label = tl.load(label_ptr + row, inside, 0) if label_ptr is not None else run
            weight = tl.load(weight_ptr + weight_at, inside, 0) if weight_ptr is not None else run
            group = tl.load(group_ptr + group_at, inside, 0) if group_ptr is not None else run
        x, y, positive, keep, _scale = judged(
            x,
            dense,
            label,
            weight,
            inside,
            cls,
            within,
            n_classes,
            ignore_index,
            label_ptr is not None,
            weight_ptr is not None,
        )
        negative = keep & (y == 0.0) & ~positive
        if group_ptr is not None:
            negative = negative & (group >= 0) & (group < num_groups)
            group = tl.where(negative, group, 0).to(tl.int32)
        knot, found = segment_of(
            x, negative, group, knot_ptr, list_ptr, num_groups, n_pos, group_ptr is not None
        )
        high = tl.load(knot_ptr + HIGH * 2 * capacity + knot, mask=found, other=0.0)
        low = tl.load(knot_ptr + LOW * 2 * capacity + knot, mask=found, other=0.0)
        # Outside all windows the distance can be anything: it is never used.
        distance = tl.minimum(tl.maximum(((x - high) - low) * per_unit, 0.0), 1.0)
        if BACKWARD:
            level = tl.load(knot_ptr + LEVEL * 2 * capacity + knot, mask=found, other=0.0)
            slope = tl.load(knot_ptr + SLOPE * 2 * capacity + knot, mask=found, other=0.0)
            g = tl.where(found, (level + slope * distance) * upstream, 0.0)
            # a non-finite logit makes the scale NaN: every negative shows it
            g = tl.where(negative, g + 0.0 * upstream, 0.0)
            if LINEAR:
                out = out_ptr + start + offs
            else:
                out = out_ptr + offset_of(coords, (out_s0, out_s1, out_s2, out_s3), N_DIMS)
            if start + BLOCK <= n:
                tl.store(out, g)
            else:
                tl.store(out, g, mask=inside)
        else:
            bad = negative & (x != x)
            if tl.sum(bad.to(tl.int32)) > 0:
                tl.store(counter_ptr + 1, 1)
            units: tl.constexpr = 2.0**FRACTION_BITS
            amount = tl.where(found, distance * units, 0.0).to(tl.int64)
            lowest = tl.min(tl.where(found, knot, 2**31 - 1))
            highest = tl.max(tl.where(found, knot, -1))
            if lowest == highest:  # an untrained model: all in one segment
                common = histogram_ptr + 2 * lowest.to(tl.int64)
                tl.atomic_add(common, tl.sum(found.to(tl.int64)), sem="relaxed")
                tl.atomic_add(common + 1, tl.sum(amount), sem="relaxed")
            else:
                slot = histogram_ptr + 2 * knot.to(tl.int64)
                one = tl.full(slot.shape, 1, tl.int64)
                tl.atomic_add(slot, one, mask=found, sem="relaxed")
                tl.atomic_add(slot + 1, amount, mask=found & (amount > 0), sem="relaxed")
        start += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit
def collect_kernel(
    # pointers
    histogram_ptr,  # [copies, 2 P, 2] int64
    knot_ptr,  # [7, 2 capacity] out: COUNT, OFFSET
    total_ptr,  # [2, 2 capacity] int64 out instead, for other processes to add to; or None
    counter_ptr,
    # shapes
    capacity,
    n_slots,
    # constants
    FRACTION_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1-D grid over blocks of segments; adds the copies."""
    n_pos = count_positives(counter_ptr, capacity)
    copies = tl.minimum(n_slots // tl.maximum(2 * n_pos, 1), MAX_COPIES)
    first = tl.program_id(0) * BLOCK
    while first < 2 * n_pos:
        k = first + tl.arange(0, BLOCK)
        mask = k < 2 * n_pos
        count = tl.zeros([BLOCK], tl.int64)
        offset = tl.zeros([BLOCK], tl.int64)
        copy = tl.cast(0, tl.int64)
        while copy < copies:
            slot = histogram_ptr + (copy * n_pos * 2 + k) * 2
            count += tl.load(slot, mask=mask, other=0)
            offset += tl.load(slot + 1, mask=mask, other=0)
            copy += 1
        if total_ptr is not None:
            tl.store(total_ptr + k, count, mask=mask)
            tl.store(total_ptr + 2 * capacity + k, offset, mask=mask)
        else:
            unit: tl.constexpr = 0.5**FRACTION_BITS
            offset = offset.to(tl.float32) * unit
            tl.store(knot_ptr + COUNT * 2 * capacity + k, count.to(tl.float32), mask=mask)
            tl.store(knot_ptr + OFFSET * 2 * capacity + k, offset, mask=mask)
        first += tl.num_programs(0) * BLOCK


@triton.jit
def settle_kernel(
    # pointers
    positive_ptr,  # [9, capacity] out: FIRST (AP, aLRP), WEIGHT, OWN
    place_ptr,
    knot_ptr,
    counter_ptr,
    delta_ptr,
    # shapes
    capacity,
    # scalars
    delta,
    # constants
    LOSS: tl.constexpr,
    TILE: tl.constexpr,
):
    """FP_i as a sum over segments, and from it 1 - precision, weight w_i and own gradient.

    SECOND becomes 1 / rank (AP, aLRP). The gradients are those of the list's own mean.
    """
    _, per_unit = load_delta(delta_ptr, delta)
    n_pos = count_positives(counter_ptr, capacity)
    first = tl.program_id(0) * TILE
    while first < n_pos:
        i = first + tl.arange(0, TILE)
        mask = i < n_pos
        s_i = tl.load(positive_ptr + SCORE * capacity + i, mask=mask, other=0.0)
        lower = tl.load(place_ptr + LOWER * capacity + i, mask=mask, other=0)
        upper = tl.load(place_ptr + UPPER * capacity + i, mask=mask, other=0)
        start = tl.load(place_ptr + START * capacity + i, mask=mask, other=0)
        size = tl.load(place_ptr + SIZE * capacity + i, mask=mask, other=1)
        end = 2 * (start + size)
        false = tl.zeros([TILE], tl.float64)
        segment = tl.cast(0, tl.int32)
        while segment < 2 * n_pos:
            k = segment + tl.arange(0, TILE)
            there = k < 2 * n_pos
            row = knot_ptr + k
            count = tl.load(row + COUNT * 2 * capacity, mask=there, other=0.0)[None, :]
            offset = tl.load(row + OFFSET * 2 * capacity, mask=there, other=0.0)[None, :]
            high = tl.load(row + HIGH * 2 * capacity, mask=there, other=0.0)[None, :]
            low = tl.load(row + LOW * 2 * capacity, mask=there, other=0.0)[None, :]
            at_knot = ((high - s_i[:, None]) + low) * per_unit + 0.5
            at_knot = tl.minimum(tl.maximum(at_knot, 0.0), 1.0)
            k = k[None, :]
            above = (k >= upper[:, None]) & (k < end[:, None])
            within = (k >= lower[:, None]) & (k < upper[:, None])
            part = tl.where(within, count * at_knot + offset, tl.where(above, count, 0.0))
            false += tl.sum(part, 1).to(tl.float64)
            segment += TILE
        rank_plus = tl.load(positive_ptr + RANK_PLUS * capacity + i, mask=mask, other=1.0)
        rank = rank_plus + false.to(tl.float32)
        miss = false.to(tl.float32) / rank
        each = 1.0 / size.to(tl.float32)
        own = -miss * each
        weight = each / rank
        if LOSS == "alrp":
            ahead = tl.load(positive_ptr + FIRST * capacity + i, mask=mask, other=0.0)
            counts = false > ALRP_EPS
            own = tl.where(counts, -(ahead + false.to(tl.float32)) / rank * each, 0.0)
            weight = tl.where(counts, -own / tl.where(counts, false.to(tl.float32), 1.0), 0.0)
        if LOSS != "rank_sort":
            tl.store(positive_ptr + SECOND * capacity + i, 1.0 / rank, mask=mask)
        tl.store(positive_ptr + MISS * capacity + i, miss, mask=mask)
        tl.store(positive_ptr + WEIGHT * capacity + i, weight, mask=mask)
        tl.store(positive_ptr + OWN * capacity + i, own, mask=mask)
        first += tl.num_programs(0) * TILE


@triton.jit
def spread_kernel(
    # pointers
    positive_ptr,  # [9, capacity] out: OTHER; AP: WEIGHT, OWN and FIRST too
    place_ptr,
    counter_ptr,
    delta_ptr,
    # shapes
    capacity,
    # scalars
    delta,
    # constants
    LOSS: tl.constexpr,
    TILE: tl.constexpr,
):
    """What positive i receives from the positives j of its list.

    rank_sort: OTHER, the sorting gradient. alrp: OTHER, the coefficient of the error in loc.
    ap (interpolated): the smallest 1 - precision at i's score or below replaces i's.
    """
    delta, per_unit = load_delta(delta_ptr, delta)
    n_pos = count_positives(counter_ptr, capacity)
    first = tl.program_id(0) * TILE
    while first < n_pos:
        i = first + tl.arange(0, TILE)
        mask = i < n_pos
        s_i = tl.load(positive_ptr + SCORE * capacity + i, mask=mask, other=0.0)
        v_i = tl.load(positive_ptr + VALUE * capacity + i, mask=mask, other=0.0)
        g_i = tl.load(place_ptr + LIST * capacity + i, mask=mask, other=-1)
        size = tl.load(place_ptr + SIZE * capacity + i, mask=mask, other=1)
        miss = tl.load(positive_ptr + MISS * capacity + i, mask=mask, other=0.0)
        best = miss
        received = tl.zeros([TILE], tl.float64)
        other = tl.cast(0, tl.int32)
        while other < n_pos:
            j = other + tl.arange(0, TILE)
            there = j < n_pos
            row = positive_ptr + j
            s_j = tl.load(row + SCORE * capacity, mask=there, other=0.0)[None, :]
            g_j = tl.load(place_ptr + LIST * capacity + j, mask=there, other=-2)[None, :]
            mine = g_j == g_i[:, None]
            if LOSS == "rank_sort":
                v_j = tl.load(row + VALUE * capacity, mask=there, other=0.0)[None, :]
                share = tl.load(row + SECOND * capacity, mask=there, other=0.0)[None, :]
                above = step(s_i[:, None] - s_j, delta, per_unit)
                part = tl.where(mine & (v_i[:, None] < v_j), above * share, 0.0)
                received += tl.sum(part, 1).to(tl.float64)
            elif LOSS == "alrp":
                share = tl.load(row + SECOND * capacity, mask=there, other=0.0)[None, :]
                part = tl.where(mine & (s_j <= s_i[:, None]), share, 0.0)
                received += tl.sum(part, 1).to(tl.float64)
            else:
                miss_j = tl.load(row + MISS * capacity, mask=there, other=1.0)[None, :]
                part = tl.where(mine & (s_j <= s_i[:, None]), miss_j, 1.0)
                best = tl.minimum(best, tl.min(part, 1))
            other += TILE
        each = 1.0 / size.to(tl.float32)
        if LOSS == "rank_sort":
            error = tl.load(positive_ptr + FIRST * capacity + i, mask=mask, other=0.0)
            received = (received - error) * each
            tl.store(positive_ptr + OTHER * capacity + i, received.to(tl.float32), mask=mask)
        elif LOSS == "alrp":
            received = received.to(tl.float32) * each
            tl.store(positive_ptr + OTHER * capacity + i, received, mask=mask)
        else:
            share = tl.load(positive_ptr + SECOND * capacity + i, mask=mask, other=0.0)
            factor = tl.where(best < miss, best / tl.where(best < miss, miss, 1.0), 1.0)
            tl.store(positive_ptr + WEIGHT * capacity + i, share * factor * each, mask=mask)
            tl.store(positive_ptr + OWN * capacity + i, -best * each, mask=mask)
            tl.store(positive_ptr + FIRST * capacity + i, best, mask=mask)
        first += tl.num_programs(0) * TILE


@triton.jit
def tabulate_kernel(
    # pointers
    positive_ptr,
    place_ptr,
    knot_ptr,  # [7, 2 capacity] out: LEVEL, SLOPE
    counter_ptr,
    delta_ptr,
    # shapes
    capacity,
    # scalars
    delta,
    # constants
    TILE: tl.constexpr,
):
    """1-D grid over blocks of knots k: the negatives' gradient at the knot, and its slope."""
    _, per_unit = load_delta(delta_ptr, delta)
    n_pos = count_positives(counter_ptr, capacity)
    first = tl.program_id(0) * TILE
    while first < 2 * n_pos:
        k = first + tl.arange(0, TILE)
        mask = k < 2 * n_pos
        high = tl.load(knot_ptr + HIGH * 2 * capacity + k, mask=mask, other=0.0)
        low = tl.load(knot_ptr + LOW * 2 * capacity + k, mask=mask, other=0.0)
        level = tl.zeros([TILE], tl.float64)
        slope = tl.zeros([TILE], tl.float64)
        other = tl.cast(0, tl.int32)
        while other < n_pos:
            i = other + tl.arange(0, TILE)
            there = i < n_pos
            score = tl.load(positive_ptr + SCORE * capacity + i, mask=there, other=0.0)[None, :]
            weight = tl.load(positive_ptr + WEIGHT * capacity + i, mask=there, other=0.0)[None, :]
            lower = tl.load(place_ptr + LOWER * capacity + i, mask=there, other=0)[None, :]
            upper = tl.load(place_ptr + UPPER * capacity + i, mask=there, other=0)[None, :]
            start = tl.load(place_ptr + START * capacity + i, mask=there, other=0)[None, :]
            size = tl.load(place_ptr + SIZE * capacity + i, mask=there, other=0)[None, :]
            at_knot = ((high[:, None] - score) + low[:, None]) * per_unit + 0.5
            at_knot = tl.minimum(tl.maximum(at_knot, 0.0), 1.0)
            above = (k[:, None] >= upper) & (k[:, None] < 2 * (start + size))
            within = (k[:, None] >= lower) & (k[:, None] < upper)
            part = tl.where(within, weight * at_knot, tl.where(above, weight, 0.0))
            level += tl.sum(part, 1).to(tl.float64)
            slope += tl.sum(tl.where(within, weight, 0.0), 1).to(tl.float64)
            other += TILE
        tl.store(knot_ptr + LEVEL * 2 * capacity + k, level.to(tl.float32), mask=mask)
        tl.store(knot_ptr + SLOPE * 2 * capacity + k, slope.to(tl.float32), mask=mask)
        first += tl.num_programs(0) * TILE


@triton.jit
def finish_kernel(
    # pointers
    positive_ptr,
    place_ptr,
    counter_ptr,
    first_ptr,  # [] float32 out: mean of VALUE_ROW
    second_ptr,  # [] float32 out: mean of FIRST; aLRP: loc
    scale_ptr,  # [] float32 out: 1 / lists with a positive
    # shapes
    capacity,
    # constants
    VALUE_ROW: tl.constexpr,  # row of the first value
    LOSS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: means over the positives of each list and over lists; NaN if a logit was."""
    n_pos = count_positives(counter_ptr, capacity)
    value = tl.zeros([TILE], tl.float64)
    second = tl.zeros([TILE], tl.float64)
    n_lists = tl.zeros([TILE], tl.int32)
    first = tl.cast(0, tl.int32)
    while first < n_pos:
        i = first + tl.arange(0, TILE)
        mask = i < n_pos
        start = tl.load(place_ptr + START * capacity + i, mask=mask, other=-1)
        each = 1.0 / tl.load(place_ptr + SIZE * capacity + i, mask=mask, other=1).to(tl.float64)
        error = tl.load(positive_ptr + VALUE_ROW * capacity + i, mask=mask, other=0.0)
        value += error.to(tl.float64) * each
        if LOSS == "alrp":
            error = tl.load(positive_ptr + VALUE * capacity + i, mask=mask, other=0.0)
            each = tl.load(positive_ptr + OTHER * capacity + i, mask=mask, other=0.0).to(tl.float64)
        else:
            error = tl.load(positive_ptr + FIRST * capacity + i, mask=mask, other=0.0)
        second += error.to(tl.float64) * each
        n_lists += (mask & (start == i)).to(tl.int32)
        first += TILE
    scale = 1.0 / tl.maximum(tl.sum(n_lists, 0), 1).to(tl.float64)
    broken = (tl.load(counter_ptr + 1) > 0) | (tl.load(counter_ptr) > capacity)
    scale = tl.where(broken, float("nan"), scale)
    tl.store(first_ptr, (tl.sum(value, 0) * scale).to(tl.float32))
    tl.store(second_ptr, (tl.sum(second, 0) * scale).to(tl.float32))
    tl.store(scale_ptr, scale.to(tl.float32))


@triton.jit
def scatter_kernel(
    # pointers
    positive_ptr,
    item_ptr,
    label_ptr,  # [rows] integers where the item's class counts, or None
    counter_ptr,
    first_grad_ptr,  # [] upstream gradient of the first value, or None
    second_grad_ptr,  # [] of the second, or None
    scale_ptr,  # [] float32
    out_ptr,
    # shapes
    capacity,
    size_1,
    size_2,
    size_3,
    # strides
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    out_s0,
    out_s1,
    out_s2,
    out_s3,
    out_class,
    # constants
    COEFFICIENT: tl.constexpr,  # write OTHER itself
    N_DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1-D grid over blocks of positives; each writes to the place of its own item."""
    n_pos = count_positives(counter_ptr, capacity)
    scale = tl.load(scale_ptr)
    first = tl.program_id(0) * BLOCK
    while first < n_pos:
        i = first + tl.arange(0, BLOCK)
        mask = i < n_pos
        item = tl.load(item_ptr + i, mask=mask, other=0)
        mask = mask & (item >= 0)  # those of other processes have none here
        item = tl.maximum(item, 0)
        here = tl.zeros([BLOCK], tl.int32)
        coords = coordinates(item, here, (1, size_1, size_2, size_3), N_DIMS)
        out = offset_of(coords, (out_s0, out_s1, out_s2, out_s3), N_DIMS)
        if label_ptr is not None:
            row = offset_of(coords, (row_s0, row_s1, row_s2, row_s3), N_DIMS)
            out += tl.load(label_ptr + row, mask=mask, other=0).to(tl.int64) * out_class
        g = tl.zeros([BLOCK], tl.float32)
        if COEFFICIENT:
            g += tl.load(positive_ptr + OTHER * capacity + i, mask=mask, other=0.0) * scale
        if first_grad_ptr is not None:
            own = tl.load(positive_ptr + OWN * capacity + i, mask=mask, other=0.0)
            g += own * (tl.load(first_grad_ptr).to(tl.float32) * scale)
        if second_grad_ptr is not None:
            other = tl.load(positive_ptr + OTHER * capacity + i, mask=mask, other=0.0)
            g += other * (tl.load(second_grad_ptr).to(tl.float32) * scale)
        tl.store(out_ptr + out, g, mask=mask)
        first += tl.num_programs(0) * BLOCK


class Kernels(NamedTuple):
    """The kernels, or what an op body wrapped them in."""

    compact: Any = compact_kernel
    order: Any = order_kernel
    pairs: Any = pairs_kernel
    negatives: Any = negatives_kernel
    collect: Any = collect_kernel
    settle: Any = settle_kernel
    spread: Any = spread_kernel
    tabulate: Any = tabulate_kernel
    finish: Any = finish_kernel
    scatter: Any = scatter_kernel


KERNELS = Kernels()


# With dense targets, positives there is room for whatever the number of logits: 11 MiB of scratch.
DENSE_POSITIVES = 65536


def capacity_of(x, labels) -> int:
    """Positives there is room for: every anchor has one class; of dense targets, an eighth of the
    logits, which keeps the scratch below 32 bytes a logit, or ``DENSE_POSITIVES``. More gives NaN,
    never a wrong number.
    """
    if labels is not None:
        return max(labels.numel(), 1)
    return max(x.numel() // 8, min(x.numel(), DENSE_POSITIVES))


def fraction_bits(n: int) -> int:
    """Bits of a fixed-point distance in [0, 1] of which n sum below 2**62."""
    return min(40, 62 - n.bit_length())


def _broadcast_strides(t, shape):
    """Strides over ``shape``, 0 where ``t`` is absent or broadcast."""
    if t is None:
        return (0,) * len(shape)
    if t.dim() == len(shape) - 1 and t.shape == shape[:-1]:
        return (*t.stride(), 0)
    return t.expand(shape).stride()


class _Items(NamedTuple):
    """How the kernels that look at positives walk over items: rows or, with dense targets, logits.

    ``strides`` of x, rows, dense, weight, group, out; ``by_class`` those of x, weight, group, out.
    """

    count: int
    n_dims: int
    sizes: tuple[int, ...]
    strides: list[tuple[int, ...]]
    by_class: tuple[int, int, int, int]


def _items(x, dense, labels, weight, group, out) -> _Items:
    shape = x.shape
    rows = (*contiguous_strides(shape[:-1]), 0)
    operands = [x.stride(), rows, *(_broadcast_strides(t, shape) for t in (dense, weight, group))]
    operands.append(_broadcast_strides(out, shape))
    by_class = (0, 0, 0, 0)
    if labels is not None:
        by_class = tuple(operands[k][-1] for k in (0, 3, 4, 5))
        shape = shape[:-1]
        # rows in the order of the labels
        layout = merged_dims(shape, [op[:-1] for op in [rows, *operands]])
    else:
        layout = merged_dims(shape, [operands[0], *operands])
    return _Items(shape.numel(), layout.n_dims, layout.sizes[1:], layout.strides[1:], by_class)


def _negatives(kernel, scratch, x, dense, labels, weight, group, delta, ignore_index, num_groups,
               histogram=None, n_slots=0, bits=0, upstream=None, scale=None,
               out=None):  # fmt: skip
    """Launch the pass over all logits, forward or backward."""
    lists = _broadcast_strides(group, x.shape)
    walk = walk_over(x, dense, labels, weight, None, [out], lists)
    x_s, row_s, _, dense_s, weight_s, out_s, group_s = walk.layout.strides
    pointer, (number,) = scalar_args(delta, 1)
    n = x.numel()
    if n == 0:  # a process without anchors
        return
    kernel[(min(triton.cdiv(n, RANKING.block), MAX_PROGRAMS),)](
        x,
        dense,
        labels,
        weight,
        group,
        scratch.knots,
        scratch.lists,
        histogram,
        scratch.counter,
        pointer,
        upstream,
        scale,
        out,
        n,
        x.shape[-1],
        num_groups,
        scratch.items.numel(),
        n_slots,
        *walk.layout.sizes[1:],
        *x_s,
        *row_s,
        *dense_s,
        *weight_s,
        *group_s,
        *out_s,
        ignore_index,
        number,
        BACKWARD=out is not None,
        FRACTION_BITS=bits,
        N_DIMS=walk.layout.n_dims,
        CLASS_DIM=walk.class_dim,
        LINEAR=walk.linear,
        ROW_WEIGHT=walk.row_weight,
        RUN=walk.run,
        BLOCK=RANKING.block,
        num_warps=RANKING.num_warps,
    )


class Scratch(NamedTuple):
    """What the backward needs of the forward."""

    positives: Tensor  # [9, capacity] float32
    knots: Tensor  # [7, 2 capacity] float32
    items: Tensor  # [capacity] int64
    lists: Tensor  # [2, num_groups] int32
    counter: Tensor  # [2] int64
    scale: Tensor  # [] float32


def launch_forward(
    x, dense, labels, value, weight, group, delta, loss, ignore_index, num_groups, *,
    kernels=KERNELS, exchange=None,
):  # fmt: skip
    """Values of a ranking loss, and what its backward needs.

    Args:
        x: logits (..., C), any strides.
        dense: targets (..., C), any strides, or None.
        labels: contiguous (...), or None.
        value: contiguous (...), quality or localisation error, or None.
        weight: contiguous (...), or (..., C) with any strides, or None.
        group: integers that broadcast to x, or None.
        delta: a tuple of one number, or a float tensor of one entry.
        loss: "rank_sort", "ap", "ap_plain" or "alrp".
        exchange: None, or what the processes that share the batch tell each other:
            ``agree(positives, n) -> most logits of one process``, ``positives(raw, lists, items,
            counter) -> the same of all`` and ``integers(tensor) -> sum``.

    Returns:
        ``(first value, second value, coefficient of the rows' errors, *Scratch)``. The second is
        Rank & Sort's sorting error or aLRP's loc; the coefficient is empty but for aLRP.
    """
    device = x.device
    capacity = capacity_of(x, labels)
    raw = torch.empty(2, capacity, dtype=torch.float32, device=device)
    raw_list = torch.empty(capacity, dtype=torch.int32, device=device)
    raw_item = torch.empty(capacity, dtype=torch.int64, device=device)
    counter = torch.zeros(2, dtype=torch.int64, device=device)
    items = _items(x, dense, labels, weight, group, None)
    x_s, row_s, dense_s, weight_s, group_s, _ = items.strides
    if items.count > 0:
        kernels.compact[(triton.cdiv(items.count, RANKING.block),)](
            x, dense, labels, value, weight, group, raw, raw_list, raw_item, counter,
            items.count, x.shape[-1], num_groups, capacity, *items.sizes,
            *x_s, *row_s, *dense_s, *weight_s, *group_s, *items.by_class[:3], ignore_index,
            HAS_KEY=loss == "rank_sort", N_DIMS=items.n_dims, BLOCK=RANKING.block,
            num_warps=RANKING.num_warps,
        )  # fmt: skip
    bits = fraction_bits(x.numel())
    if exchange is not None:
        bits = fraction_bits(exchange.size * exchange.agree(counter[0], x.numel()))
        raw, raw_list, raw_item, counter = exchange.positives(raw, raw_list, raw_item, counter)
        capacity = raw_item.numel()

    places = torch.empty(5, capacity, dtype=torch.int32, device=device)
    scratch = Scratch(
        torch.empty(POSITIVE_ROWS, capacity, dtype=torch.float32, device=device),
        torch.empty(KNOT_ROWS, 2 * capacity, dtype=torch.float32, device=device),
        torch.empty(capacity, dtype=torch.int64, device=device),
        torch.zeros(2, num_groups, dtype=torch.int32, device=device),
        counter,
        torch.empty((), dtype=torch.float32, device=device),
    )
    positives, knots, order, lists, _, scale = scratch
    # Private copies for six slots per positive there is room for: with few positives, 64 copies.
    n_slots = 6 * capacity
    histogram = torch.zeros(n_slots, 2, dtype=torch.int64, device=device)
    first, second = (torch.empty((), dtype=torch.float32, device=device) for _ in range(2))

    pointer, (number,) = scalar_args(delta, 1)
    grid = (min(triton.cdiv(capacity, PAIRS.block), MAX_PROGRAMS),)
    tile = {"TILE": PAIRS.block, "num_warps": PAIRS.num_warps}
    kind = "ap" if loss == "ap_plain" else loss
    kernels.order[grid](raw, raw_list, raw_item, positives, places, order, counter, capacity,
                        **tile)  # fmt: skip
    kernels.pairs[grid](positives, places, knots, lists, counter, pointer, capacity, num_groups,
                        number, LOSS=kind, **tile)  # fmt: skip
    _negatives(kernels.negatives, scratch, x, dense, labels, weight, group, delta, ignore_index,
               num_groups, histogram, n_slots, bits)  # fmt: skip
    total = None
    if exchange is not None:
        total = torch.zeros(2, 2 * capacity, dtype=torch.int64, device=device)
    kernels.collect[(min(triton.cdiv(2 * capacity, RANKING.block), MAX_PROGRAMS),)](
        histogram, knots, total, counter, capacity, n_slots, FRACTION_BITS=bits,
        BLOCK=RANKING.block, num_warps=RANKING.num_warps,
    )  # fmt: skip
    if exchange is not None:
        whole = exchange.integers(torch.cat([total.view(-1), counter[1:]]))
        counter[1:] = whole[-1:]
        count, offset = whole[:-1].view(2, -1)
        knots[COUNT.value] = count
        knots[OFFSET.value] = offset * 0.5**bits
    kernels.settle[grid](positives, places, knots, counter, pointer, capacity, number, LOSS=kind,
                         **tile)  # fmt: skip
    if loss != "ap_plain":
        kernels.spread[grid](positives, places, counter, pointer, capacity, number, LOSS=kind,
                             **tile)  # fmt: skip
    kernels.tabulate[grid](positives, places, knots, counter, pointer, capacity, number, **tile)
    kernels.finish[(1,)](positives, places, counter, first, second, scale, capacity,
                         VALUE_ROW=(FIRST if loss == "ap" else MISS).value, LOSS=kind,
                         TILE=RANKING.block, num_warps=RANKING.num_warps)  # fmt: skip

    coefficient = torch.zeros(0, dtype=torch.float32, device=device)
    if loss == "alrp":
        shape = x.shape if labels is None else (*x.shape[:-1], 1)
        coefficient = torch.zeros(shape, dtype=torch.float32, device=device)
        items = _items(x, dense, labels, weight, group, coefficient)
        _scatter(kernels.scatter, scratch, items, None, coefficient, (None, None), 0, True)
        coefficient = coefficient.sum(-1)
    return first, second, coefficient, *scratch


def _scatter(kernel, scratch, items, labels, out, upstream, out_class, coefficient):
    capacity = scratch.items.numel()
    kernel[(min(triton.cdiv(capacity, RANKING.block), MAX_PROGRAMS),)](
        scratch.positives, scratch.items, labels, scratch.counter, *upstream, scratch.scale, out,
        capacity, *items.sizes, *items.strides[1], *items.strides[5], out_class,
        COEFFICIENT=coefficient, N_DIMS=items.n_dims, BLOCK=RANKING.block,
        num_warps=RANKING.num_warps,
    )  # fmt: skip


def launch_backward(
    x, first_grad, second_grad, dense, labels, weight, group, delta, ignore_index, num_groups,
    *scratch, kernels=KERNELS,
):  # fmt: skip
    """Gradient of the logits: their dtype, and their strides if they are dense in memory.

    ``second_grad`` is the upstream gradient of the sorting error, or None.
    """
    scratch = Scratch(*scratch)
    grad = torch.empty_like(x)
    _negatives(kernels.negatives, scratch, x, dense, labels, weight, group, delta, ignore_index,
               num_groups, upstream=first_grad, scale=scratch.scale, out=grad)  # fmt: skip
    items = _items(x, dense, labels, weight, group, grad)
    _scatter(kernels.scatter, scratch, items, labels, grad, (first_grad, second_grad),
             items.by_class[3], False)  # fmt: skip
    return grad
