"""Passes over the positives of the ranking losses.

With ``H`` the step of half-width delta, ``s`` scores, ``y`` qualities, ``e`` localisation errors:

* ``settle`` a program a list, which scans: the negatives above each knot and from them
  FP_i = sum_j H(s_j - s_i); ranks, precisions, the weight w_i of i's negatives; and at each knot
  value and slope of the negatives' gradient, sum_i w_i H(s - s_i). Beside them the other programs
  ``spread`` Rank & Sort's sorting gradient: what a positive receives as violator of others.
* ``means``  over the lists, where there are several.

Sums are of positive terms, or over what is above in the list, so that small ranks keep their
digits; in a fixed order. Grids are fixed; a program loops to the P that it reads. What comes
before, and ``spread``: `_ranking_pairs`.
"""

import triton
import triton.language as tl

from ._numbers import Constant
from ._ranking_pairs import spread
from ._ranking_scratch import (
    AHEAD,
    AHEAD_DISTANCE,
    COUNT,
    DISTANCE,
    FIRST,
    HIGH,
    LOW,
    LOWER,
    MISS,
    OFFSET,
    OTHER,
    OWN,
    RAMP,
    RANK_PLUS,
    SCORE,
    SECOND,
    SIZE,
    START,
    SUM_DISTANCE,
    TIED,
    UPPER,
    VALUE,
    WEIGHT,
    WINDOW_END,
    WINDOW_START,
    count_positives,
    is_broken,
    load_delta,
    tables,
    wide,
)
from ._ranking_table import packed

# Below this FP_i aLRP's published gradient skips positive i.
ALRP_EPS = Constant(1e-5)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def width_of(knot, per_unit, mask, last, capacity):
    """Of the segments from ``knot`` (a pointer into the table) to the next, in units of 2 delta.

    Inside a window it is at most 1; elsewhere, where it does not matter, it is cut to that. The
    last knot has none.
    """
    inner = mask & ~last
    high = tl.load(knot + HIGH * 2 * capacity, mask=mask, other=0.0).to(tl.float64)
    low = tl.load(knot + LOW * 2 * capacity, mask=mask, other=0.0).to(tl.float64)
    next_high = tl.load(knot + HIGH * 2 * capacity + 1, mask=inner, other=0.0).to(tl.float64)
    next_low = tl.load(knot + LOW * 2 * capacity + 1, mask=inner, other=0.0).to(tl.float64)
    gap = ((next_high - high) + (next_low - low)) * per_unit
    return tl.where(inner, tl.minimum(gap, 1.0), 0.0)


@triton.jit
def settle_kernel(
    # pointers
    float_ptr,  # see ``tables``; of positives out: MISS, WEIGHT, OWN; AP: FIRST; aLRP: SECOND,
    # OTHER; rank_sort: OTHER; and the scale, 1; with groups no scale
    place_ptr,
    lookup_ptr,  # out: words of the backward, see ``lookup_words``
    sum_ptr,  # table of float64 sums, scratch
    list_ptr,
    counter_ptr,
    delta_ptr,
    first_ptr,  # [] float32 out: the first value; and with groups nothing
    second_ptr,  # [] float32 out: the second
    # shapes
    capacity,
    num_groups,
    scanners,
    # scalars
    delta,
    # constants
    HAS_GROUP: tl.constexpr,
    LOSS: tl.constexpr,
    INTERPOLATED: tl.constexpr,
    TILE: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """1-D grid: ``scanners`` programs over lists, the others over blocks of positives to spread.

    What follows from the histogram of a list, by scans over its positives and knots. The gradients
    are those of the list's own mean."""
    capacity = wide(capacity)
    positive_ptr, knot_ptr, value_ptr, scale_ptr = tables(float_ptr, capacity)
    delta, per_unit = load_delta(delta_ptr, delta)
    n_pos = count_positives(counter_ptr, capacity)
    lane = tl.arange(0, TILE)
    group = tl.program_id(0)
    if LOSS == "rank_sort":  # noqa: SIM102 (decided when compiled)
        if group >= scanners:
            spread(
                positive_ptr,
                place_ptr,
                value_ptr,
                sum_ptr,
                capacity,
                n_pos,
                delta,
                per_unit,
                group - scanners,
                tl.num_programs(0) - scanners,
                ACROSS,
            )
            group = num_groups
    per_unit = per_unit.to(tl.float64)
    while group < num_groups:
        start = tl.cast(0, tl.int32)
        size = n_pos
        if HAS_GROUP:
            start = tl.load(list_ptr + group)
            size = tl.load(list_ptr + num_groups + group)
        end = start + size
        each = 1.0 / tl.maximum(size, 1).to(tl.float64)

        # From the highest knot down: RAMP is how far, summed over negatives and in units of
        # 2 delta, they reach above a knot. With a hard step: how many.
        over = tl.cast(0.0, tl.float64)
        reach = tl.cast(0.0, tl.float64)
        done = tl.cast(0, tl.int32)
        while done < 2 * size:
            mask = lane < 2 * size - done
            k = 2 * end - 1 - done - lane
            row = knot_ptr + k
            count = tl.load(row + COUNT * 2 * capacity, mask=mask, other=0.0).to(tl.float64)
            offset = tl.load(row + OFFSET * 2 * capacity, mask=mask, other=0.0).to(tl.float64)
            width = width_of(row, per_unit, mask, k == 2 * end - 1, capacity)
            from_here = tl.cumsum(count, 0) + over
            part = offset + width * (from_here - count)
            ramp = tl.cumsum(part, 0) + reach
            ramp = tl.where(delta > 0, ramp, from_here)
            tl.store(sum_ptr + RAMP * capacity + k, ramp, mask=mask)
            over += tl.sum(count, 0)
            reach += tl.sum(part, 0)
            done += TILE

        if LOSS != "rank_sort":
            # From the highest positive down: its distance to it in units of 2 delta, in which a
            # gap wider than a window counts as one; sums of these, of errors, and of products.
            distance_above = tl.cast(0.0, tl.float64)
            sum_above = tl.cast(0.0, tl.float64)
            error_above = tl.cast(0.0, tl.float64)
            product_above = tl.cast(0.0, tl.float64)
            done = tl.cast(0, tl.int32)
            while done < size:
                mask = lane < size - done
                i = end - 1 - done - lane
                row = positive_ptr + i
                inner = mask & (i < end - 1)
                score = tl.load(row + SCORE * capacity, mask=mask, other=0.0).to(tl.float64)
                following = tl.load(row + SCORE * capacity + 1, mask=inner, other=0.0)
                gap = (following.to(tl.float64) - score) * per_unit
                gap = tl.where(inner, tl.minimum(gap, 1.0), 0.0)
                distance = tl.cumsum(gap, 0) + distance_above
                distance_above += tl.sum(gap, 0)
                distance = tl.where(mask, distance, 0.0)
                sums = sum_ptr + i
                tl.store(sums + DISTANCE * capacity, distance, mask=mask)
                total = tl.cumsum(distance, 0) + sum_above
                sum_above += tl.sum(distance, 0)
                tl.store(sums + SUM_DISTANCE * capacity, total, mask=mask)
                if LOSS == "alrp":
                    error = tl.load(row + VALUE * capacity, mask=mask, other=0.0).to(tl.float64)
                    total = tl.cumsum(error, 0) + error_above
                    error_above += tl.sum(error, 0)
                    tl.store(sums + AHEAD * capacity, total, mask=mask)
                    total = tl.cumsum(error * distance, 0) + product_above
                    product_above += tl.sum(error * distance, 0)
                    tl.store(sums + AHEAD_DISTANCE * capacity, total, mask=mask)
                done += TILE
        tl.debug_barrier()

        # Up the positives: ranks, weights; COUNT has served, and holds the change of the slope.
        value = tl.cast(0.0, tl.float64)
        second = tl.cast(0.0, tl.float64)
        inverse_below = tl.cast(0.0, tl.float64)
        best_below = tl.cast(float("inf"), tl.float32)
        done = tl.cast(0, tl.int32)
        while done < size:
            mask = lane < size - done
            i = start + done + lane
            row = positive_ptr + i
            lower = tl.load(place_ptr + LOWER * capacity + i, mask=mask, other=0)
            upper = tl.load(place_ptr + UPPER * capacity + i, mask=mask, other=0)
            ramp = sum_ptr + RAMP * capacity
            false = tl.load(ramp + upper, mask=mask, other=0.0)
            false = tl.where(delta > 0, tl.load(ramp + lower, mask=mask, other=0.0) - false, false)
            if LOSS == "rank_sort":
                rank_plus = tl.load(row + RANK_PLUS * capacity, mask=mask, other=1.0)
                rank_plus = rank_plus.to(tl.float64)
            else:
                window = tl.load(place_ptr + WINDOW_START * capacity + i, mask=mask, other=0)
                window_end = tl.load(place_ptr + WINDOW_END * capacity + i, mask=mask, other=0)
                beyond = mask & (window_end < end)
                middle = tl.load(sum_ptr + DISTANCE * capacity + i, mask=mask, other=0.0) + 0.5
                sums = sum_ptr + SUM_DISTANCE * capacity
                inside = tl.load(sums + window, mask=mask & (window < end), other=0.0)
                inside -= tl.load(sums + window_end, mask=beyond, other=0.0)
                self_step = tl.where(delta > 0, 0.5, 1.0)
                rank_plus = (window_end - window) * middle - inside
                rank_plus += (end - window_end) + (1.0 - self_step)
            rank = tl.where(mask, rank_plus + false, 1.0)
            miss = (false / rank).to(tl.float32)
            own = -miss * each
            weight = each / rank
            if LOSS == "ap":
                best = miss
                if INTERPOLATED:
                    # the smallest 1 - precision at i's score or below
                    best = tl.where(mask, best, float("inf"))
                    best = tl.minimum(tl.associative_scan(best, 0, smaller), best_below)
                    best_below = tl.minimum(best_below, tl.min(best, 0))
                    factor = best / tl.where(best < miss, miss, 1.0)
                    weight = tl.where(best < miss, weight * factor, weight)
                    own = -best * each
                tl.store(row + FIRST * capacity, best, mask=mask)
                value += tl.sum(tl.where(mask, best, 0.0).to(tl.float64), 0)
            else:
                value += tl.sum(tl.where(mask, miss, 0.0).to(tl.float64), 0)
            if LOSS == "rank_sort":
                error = tl.load(row + FIRST * capacity, mask=mask, other=0.0)
                second += tl.sum(error.to(tl.float64), 0)
            if LOSS == "alrp":
                error = tl.load(row + VALUE * capacity, mask=mask, other=0.0).to(tl.float64)
                sums = sum_ptr + AHEAD * capacity
                above = tl.load(sums + window_end, mask=beyond, other=0.0)
                inside = tl.load(sums + window, mask=mask & (window < end), other=0.0) - above
                ahead = above + inside * middle - self_step * error
                sums = sum_ptr + AHEAD_DISTANCE * capacity
                ahead -= tl.load(sums + window, mask=mask & (window < end), other=0.0)
                ahead += tl.load(sums + window_end, mask=beyond, other=0.0)
                counts = mask & (false > ALRP_EPS)
                own = tl.where(counts, -(ahead + false) / rank * each, 0.0)
                weight = tl.where(counts, -own / tl.where(counts, false, 1.0), 0.0)
                inverse = tl.where(mask, 1.0 / rank, 0.0)
                total = tl.cumsum(inverse, 0) + inverse_below
                inverse_below += tl.sum(inverse, 0)
                tl.store(row + SECOND * capacity, total.to(tl.float32), mask=mask)
            weight = weight.to(tl.float32)
            tl.store(row + MISS * capacity, miss, mask=mask)
            tl.store(row + WEIGHT * capacity, weight, mask=mask)
            tl.store(row + OWN * capacity, own.to(tl.float32), mask=mask)
            tl.store(knot_ptr + COUNT * 2 * capacity + lower, weight, mask=mask)
            tl.store(knot_ptr + COUNT * 2 * capacity + upper, -weight, mask=mask)
            done += TILE
        tl.debug_barrier()

        if LOSS == "alrp":
            # The coefficient of an error in loc: positives at i's score or below
            done = tl.cast(0, tl.int32)
            while done < size:
                mask = lane < size - done
                i = start + done + lane
                tied = tl.load(place_ptr + TIED * capacity + i, mask=mask, other=1)
                total = tl.load(positive_ptr + SECOND * capacity + tied - 1, mask=mask, other=0.0)
                total = (total * each).to(tl.float32)
                tl.store(positive_ptr + OTHER * capacity + i, total, mask=mask)
                error = tl.load(positive_ptr + VALUE * capacity + i, mask=mask, other=0.0)
                second += tl.sum(total.to(tl.float64) * error.to(tl.float64), 0) * size
                done += TILE

        # Up the knots: the gradient of a negative there, and its slope.
        slope_below = tl.cast(0.0, tl.float64)
        level_below = tl.cast(0.0, tl.float64)
        closed_below = tl.cast(0.0, tl.float64)
        done = tl.cast(0, tl.int32)
        while done < 2 * size:
            mask = lane < 2 * size - done
            k = 2 * start + done + lane
            row = knot_ptr + k
            change = tl.load(row + COUNT * 2 * capacity, mask=mask, other=0.0).to(tl.float64)
            width = width_of(row, per_unit, mask, k == 2 * end - 1, capacity)
            slope = tl.cumsum(change, 0) + slope_below
            slope_below += tl.sum(change, 0)
            rise = slope * width
            level = tl.cumsum(rise, 0) - rise + level_below
            level_below += tl.sum(rise, 0)
            closed = tl.maximum(-change, 0.0)
            hard_level = tl.cumsum(closed, 0) + closed_below
            closed_below += tl.sum(closed, 0)
            level = tl.where(delta > 0, level, hard_level)
            high = tl.load(row + HIGH * 2 * capacity, mask=mask, other=0.0)
            low = tl.load(row + LOW * 2 * capacity, mask=mask, other=0.0)
            word = lookup_ptr + 2 * k
            tl.store(word, packed(high, low), mask=mask)
            tl.store(word + 1, packed(level.to(tl.float32), slope.to(tl.float32)), mask=mask)
            done += TILE

        if not HAS_GROUP:
            broken = is_broken(counter_ptr, n_pos, capacity)
            scale = tl.where(broken, float("nan"), 1.0)
            tl.store(first_ptr, (value * each * scale).to(tl.float32))
            tl.store(second_ptr, (second * each * scale).to(tl.float32))
            tl.store(scale_ptr, scale)
        group += scanners


@triton.jit
def means_kernel(
    # pointers
    float_ptr,  # see ``tables``; out: the scale, 1 / lists with a positive
    place_ptr,
    counter_ptr,
    first_ptr,  # [] float32 out: mean of VALUE_ROW
    second_ptr,  # [] float32 out: mean of FIRST; aLRP: loc
    # shapes
    capacity,
    # constants
    VALUE_ROW: tl.constexpr,  # row of the first value
    LOSS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: means over the positives of each list and over lists; NaN if a logit was, but 0
    without positives.
    """
    capacity = wide(capacity)
    positive_ptr, _, _, scale_ptr = tables(float_ptr, capacity)
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
    broken = is_broken(counter_ptr, n_pos, capacity)
    scale = tl.where(broken, float("nan"), scale)
    tl.store(first_ptr, (tl.sum(value, 0) * scale).to(tl.float32))
    tl.store(second_ptr, (tl.sum(second, 0) * scale).to(tl.float32))
    tl.store(scale_ptr, scale.to(tl.float32))
