"""Passes over the positives of the ranking losses.

With ``H`` the step of half-width delta, ``s`` scores, ``y`` qualities, ``e`` localisation errors:

* ``order``    sorts the positives by (list, score, value), by counting how many precede each.
* ``pairs``    rank+_i = sum_j H(s_j - s_i), the sums of qualities or errors ahead of i, and the
  places of the 2P knots s_i - delta, s_i + delta.
* ``settle``   FP_i, the negatives above i, from the segments between the knots; and from it
  1 - precision = FP_i / rank_i, the weight w_i of i's negatives, and i's own gradient.
* ``spread``   what a positive receives from other positives once all ranks are known.
* ``tabulate`` value and slope at each knot of the negatives' gradient, sum_i w_i H(s - s_i).
* ``means``    over positives and lists.

Sums are of positive terms in a fixed order: no cancellation. Grids are fixed; a program loops to
the P that it reads.
"""

import triton
import triton.language as tl

from ._ranking_scratch import (
    COUNT,
    FIRST,
    HIGH,
    KEY,
    LEVEL,
    LIST,
    LOW,
    LOWER,
    MISS,
    OFFSET,
    OTHER,
    OWN,
    RANK_PLUS,
    SCORE,
    SECOND,
    SIZE,
    SLOPE,
    START,
    UPPER,
    VALUE,
    WEIGHT,
    count_positives,
    load_delta,
    wide,
)

# Below this FP_i aLRP's published gradient skips positive i.
ALRP_EPS = tl.constexpr(1e-5)


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
    capacity = wide(capacity)
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
    capacity = wide(capacity)
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
    capacity = wide(capacity)
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
    capacity = wide(capacity)
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
    capacity = wide(capacity)
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
def means_kernel(
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
    capacity = wide(capacity)
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
