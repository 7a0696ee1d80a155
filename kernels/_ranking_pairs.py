"""Order of the positives of the ranking losses, and sums over pairs of them.

In blocks, so that nothing is done for each pair of positives but within a block:

* ``order``  sorts each block of ``SORTED`` positives by (list, score, value), by counting.
* ``merge``  searches each positive and its knots s_i - delta, s_i + delta in all sorted blocks: the
  numbers found add up to its place and theirs.
* ``by_value`` (Rank & Sort) sorts each block of ``PAIRED`` neighbours in that order by quality, and
  adds up qualities and scores from the lowest quality on.
* ``violators`` and ``spread`` (Rank & Sort) sum over the j above i, or below it, of lower or higher
  quality, with the step H between the scores. In a block that lies wholly inside i's window, or
  wholly beyond it, H is linear, and what a search among the block's qualities finds in the sums of
  ``by_value`` is all there is to add. Only the blocks in which a window begins or ends are walked
  pair by pair.

The sums are float64, over one block each and relative to its lowest quality and score: they have no
more to cancel than one block's rounding. All are in a fixed order.
"""

import triton
import triton.language as tl

from ._numbers import Constant
from ._ranking_scratch import (
    BLOCK_LISTS,
    BLOCKS,
    BY_VALUE,
    FIRST,
    HIGH,
    KEY,
    LIST,
    LOW,
    LOWER,
    OTHER,
    RANK_PLUS,
    SCORE,
    SECOND,
    SIZE,
    START,
    SUM_PRODUCT,
    SUM_SCORE,
    SUM_SHARE,
    SUM_SHARE_SCORE,
    SUM_VALUE,
    TIED,
    UPPER,
    VALUE,
    WINDOW_END,
    WINDOW_START,
    count_positives,
    load_delta,
    lookup_tables,
    tables,
    wide,
)

# Positives of a block that is sorted: the counting grows with it, the searches fall.
SORTED = Constant(256)
# Positives of a block whose sums are looked up: so many pairs are walked where a window ends.
PAIRED = Constant(64)


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
def load_key(key_ptr, list_ptr, item_ptr, capacity, i, mask, HAS_GROUP: tl.constexpr):
    """``(score, value, list, item)`` of positives i, by which they are sorted."""
    score = tl.load(key_ptr + i, mask=mask, other=0.0)
    value = tl.load(key_ptr + capacity + i, mask=mask, other=0.0)
    group = tl.zeros(i.shape, tl.int32)
    if HAS_GROUP:
        group = tl.load(list_ptr + i, mask=mask, other=0)
    return score, value, group, tl.load(item_ptr + i, mask=mask, other=0)


@triton.jit
def precedes(g_j, g_i, less, HAS_GROUP: tl.constexpr):
    """True where j's list comes before i's, or is the same and ``less`` holds."""
    if HAS_GROUP:
        return (g_j < g_i) | (g_j == g_i) & less
    else:
        return less


@triton.jit
def order_kernel(
    # pointers
    raw_ptr,  # [2, capacity]: score, value
    raw_list_ptr,  # or None
    raw_item_ptr,
    float_ptr,  # the same out, each block of SORTED in order: BLOCKS of the table of positives
    place_ptr,  # BLOCK_LISTS
    lookup_ptr,  # items
    counter_ptr,
    # shapes
    capacity,
    # constants
    HAS_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """1-D grid; a program takes TILE positives of a block and counts what precedes each."""
    capacity = wide(capacity)
    block_ptr = float_ptr + BLOCKS * capacity
    n_pos = count_positives(counter_ptr, capacity)
    first = tl.program_id(0) * TILE
    while first < n_pos:
        i = first + tl.arange(0, TILE)
        mask = i < n_pos
        s_i, v_i, g_i, k_i = load_key(
            raw_ptr, raw_list_ptr, raw_item_ptr, capacity, i, mask, HAS_GROUP
        )
        # summed over j at the end: no shuffles in the loop
        before = tl.zeros([ACROSS, TILE], tl.int32)
        other = first // SORTED * SORTED
        end = tl.minimum(other + SORTED, n_pos)
        block = other
        while other < end:
            j = other + tl.arange(0, ACROSS)
            there = j < end
            s_j = tl.load(raw_ptr + j, mask=there, other=float("inf"))[:, None]
            v_j = tl.load(raw_ptr + capacity + j, mask=there, other=0.0)[:, None]
            k_j = tl.load(raw_item_ptr + j, mask=there, other=0)[:, None]
            less = (v_j < v_i[None, :]) | (v_j == v_i[None, :]) & (k_j < k_i[None, :])
            less = (s_j < s_i[None, :]) | (s_j == s_i[None, :]) & less
            g_j = g_i[None, :]
            if HAS_GROUP:
                g_j = tl.load(raw_list_ptr + j, mask=there, other=2**31 - 1)[:, None]
            before += precedes(g_j, g_i[None, :], less, HAS_GROUP).to(tl.int32)
            other += ACROSS
        place = block + tl.sum(before, 0)
        tl.store(block_ptr + place, s_i, mask=mask)
        tl.store(block_ptr + capacity + place, v_i, mask=mask)
        if HAS_GROUP:
            tl.store(place_ptr + BLOCK_LISTS * capacity + place, g_i, mask=mask)
        tl.store(lookup_ptr + place, k_i, mask=mask)
        first += tl.num_programs(0) * TILE


@triton.jit
def count_below(sorted_ptr, x, bound, size, most, CLOSED: tl.constexpr):
    """How many of the ``size`` <= ``most`` ascending entries from ``sorted_ptr`` on exceed x by
    less than ``bound`` (CLOSED: or by as much)."""
    jump = tl.cast(1, tl.int32)
    while jump < most:
        jump *= 2
    below = size * 0
    while jump > 0:
        candidate = tl.minimum(below + jump, size)
        entry = tl.load(sorted_ptr + candidate - 1, mask=candidate > 0, other=0)
        if CLOSED:
            below = tl.where((candidate > 0) & (entry - x <= bound), candidate, below)
        else:
            below = tl.where((candidate > 0) & (entry - x < bound), candidate, below)
        jump = jump // 2
    return below


@triton.jit
def merge_kernel(
    # pointers
    float_ptr,  # see ``order``; table of positives out: SCORE, VALUE; of knots: KEY, HIGH, LOW
    place_ptr,  # see ``order``; table of places out: LOWER, UPPER, START, SIZE, LIST
    lookup_ptr,  # see ``order``; items out
    list_ptr,  # [2, num_groups] int32 out: start and size
    counter_ptr,
    delta_ptr,
    # shapes
    capacity,
    num_groups,
    # scalars
    delta,
    # constants
    HAS_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """1-D grid over positives i; searches in ACROSS blocks at a time."""
    capacity = wide(capacity)
    positive_ptr, knot_ptr, _, _ = tables(float_ptr, capacity)
    _, _, _, item_ptr = lookup_tables(lookup_ptr, capacity)
    block_ptr = float_ptr + BLOCKS * capacity
    block_list_ptr = place_ptr + BLOCK_LISTS * capacity
    block_item_ptr = lookup_ptr
    delta, _ = load_delta(delta_ptr, delta)
    width = 2.0 * delta
    n_pos = count_positives(counter_ptr, capacity)
    first = tl.program_id(0) * TILE
    while first < n_pos:
        i = first + tl.arange(0, TILE)
        mask = i < n_pos
        s_i, v_i, g_i, k_i = load_key(
            block_ptr, block_list_ptr, block_item_ptr, capacity, i, mask, HAS_GROUP
        )
        x, y, g, item = s_i[None, :], v_i[None, :], g_i[None, :], k_i[None, :]
        # Positives before i, windows that end below i's, and that begin before i's ends
        before = tl.zeros([ACROSS, TILE], tl.int32)
        ended = tl.zeros([ACROSS, TILE], tl.int32)
        begun = tl.zeros([ACROSS, TILE], tl.int32)
        lists = tl.zeros([ACROSS, TILE], tl.int32)  # in the lists before
        with_own = tl.zeros([ACROSS, TILE], tl.int32)  # and in i's own
        block = tl.cast(0, tl.int32)
        while block < n_pos:
            start = (block + tl.arange(0, ACROSS) * SORTED)[:, None]
            size = tl.minimum(tl.maximum(n_pos - start, 0), SORTED)
            size = tl.where(mask[None, :], size, 0)
            a = size * 0
            b = size * 0
            c = size * 0
            d = size * 0
            e = size * 0
            jump = tl.cast(SORTED, tl.int32)
            while jump > 0:
                at = tl.minimum(a + jump, size)
                j = start + at - 1
                there = at > a
                s_j = tl.load(block_ptr + j, mask=there, other=float("inf"))
                tied = there & (s_j == x)
                v_j = tl.load(block_ptr + capacity + j, mask=tied, other=0.0)
                k_j = tl.load(block_item_ptr + j, mask=tied & (v_j == y), other=0)
                less = (s_j < x) | tied & ((v_j < y) | (v_j == y) & (k_j < item))
                g_j = g
                if HAS_GROUP:
                    g_j = tl.load(block_list_ptr + j, mask=there, other=2**31 - 1)
                a = tl.where(there & precedes(g_j, g, less, HAS_GROUP), at, a)
                jump = jump // 2
            jump = tl.cast(SORTED, tl.int32)
            while jump > 0:
                g_j = g
                at = tl.minimum(b + jump, size)
                j = start + at - 1
                there = at > b
                s_j = tl.load(block_ptr + j, mask=there, other=float("inf"))
                if HAS_GROUP:
                    g_j = tl.load(block_list_ptr + j, mask=there, other=2**31 - 1)
                b = tl.where(there & precedes(g_j, g, s_j - x < -width, HAS_GROUP), at, b)

                at = tl.minimum(c + jump, size)
                j = start + at - 1
                there = at > c
                s_j = tl.load(block_ptr + j, mask=there, other=float("inf"))
                if HAS_GROUP:
                    g_j = tl.load(block_list_ptr + j, mask=there, other=2**31 - 1)
                c = tl.where(there & precedes(g_j, g, s_j - x <= width, HAS_GROUP), at, c)
                if HAS_GROUP:
                    at = tl.minimum(d + jump, size)
                    there = at > d
                    g_j = tl.load(block_list_ptr + start + at - 1, mask=there, other=2**31 - 1)
                    d = tl.where(there & (g_j < g), at, d)
                    at = tl.minimum(e + jump, size)
                    there = at > e
                    g_j = tl.load(block_list_ptr + start + at - 1, mask=there, other=2**31 - 1)
                    e = tl.where(there & (g_j <= g), at, e)
                jump = jump // 2
            before += a
            ended += b
            begun += c
            lists += d
            with_own += e
            block += ACROSS * SORTED
        place = tl.sum(before, 0)
        # knot i comes after i knots of its own kind
        lower = place + tl.sum(ended, 0)
        upper = place + tl.sum(begun, 0)
        start = tl.zeros([TILE], tl.int32)
        size = tl.where(mask, n_pos, 0)
        if HAS_GROUP:
            start = tl.sum(lists, 0)
            size = tl.sum(with_own, 0) - start
        places = place_ptr + place
        tl.store(places + LOWER * capacity, lower, mask=mask)
        tl.store(places + UPPER * capacity, upper, mask=mask)
        tl.store(places + START * capacity, start, mask=mask)
        tl.store(places + SIZE * capacity, size, mask=mask)
        tl.store(places + LIST * capacity, g_i, mask=mask)
        tl.store(positive_ptr + SCORE * capacity + place, s_i, mask=mask)
        tl.store(positive_ptr + VALUE * capacity + place, v_i, mask=mask)
        tl.store(item_ptr + place, k_i, mask=mask)
        leads = mask & (start == place)
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
def windows(
    positive_ptr, place_ptr, value_ptr, sum_ptr, capacity, n_pos, delta, program, programs,
    PAIRS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Where the windows of the positives begin and end; PAIRS: ``by_value``, else TIED."""
    first = program * PAIRED
    while first < n_pos:
        i = first + tl.arange(0, PAIRED)
        mask = i < n_pos
        s_i = tl.load(positive_ptr + SCORE * capacity + i, mask=mask, other=0.0)
        start = tl.load(place_ptr + START * capacity + i, mask=mask, other=0)
        size = tl.load(place_ptr + SIZE * capacity + i, mask=mask, other=0)
        scores = positive_ptr + SCORE * capacity + start
        places = place_ptr + i
        begin = start + count_below(scores, s_i, -delta, size, n_pos, False)
        tl.store(places + WINDOW_START * capacity, begin, mask=mask)
        end = start + count_below(scores, s_i, delta, size, n_pos, False)
        tl.store(places + WINDOW_END * capacity, end, mask=mask)
        if PAIRS:
            by_value(positive_ptr, place_ptr, value_ptr, sum_ptr, capacity, first, n_pos, ACROSS)
        else:
            tied = start + count_below(scores, s_i, 0.0, size, n_pos, True)
            tl.store(places + TIED * capacity, tied, mask=mask)
        first += programs * PAIRED


@triton.jit
def by_value(
    positive_ptr, place_ptr, value_ptr, sum_ptr, capacity, first, n_pos, ACROSS: tl.constexpr
):
    """The block from ``first`` on by (quality, place): BY_VALUE the places, ``value_ptr`` the
    qualities, and sums up to each of quality, score and product, relative to the lowest quality and
    to the score of the block's first."""
    lane = tl.arange(0, PAIRED)
    i = first + lane
    end = tl.minimum(first + PAIRED, n_pos)
    mask = i < end
    v_i = tl.load(positive_ptr + VALUE * capacity + i, mask=mask, other=0.0)
    before = tl.zeros([ACROSS, PAIRED], tl.int32)
    other = first
    while other < end:
        j = other + tl.arange(0, ACROSS)
        v_j = tl.load(positive_ptr + VALUE * capacity + j, mask=j < end, other=float("inf"))
        v_j, j = v_j[:, None], j[:, None]
        before += ((v_j < v_i[None, :]) | (v_j == v_i[None, :]) & (j < i[None, :])).to(tl.int32)
        other += ACROSS
    place = first + tl.sum(before, 0)
    tl.store(value_ptr + place, v_i, mask=mask)
    tl.store(place_ptr + BY_VALUE * capacity + place, i, mask=mask)
    tl.debug_barrier()
    j = tl.load(place_ptr + BY_VALUE * capacity + i, mask=mask, other=0)
    score = tl.load(positive_ptr + SCORE * capacity + j, mask=mask, other=0.0).to(tl.float64)
    score -= tl.load(positive_ptr + SCORE * capacity + first).to(tl.float64)
    value = tl.load(value_ptr + i, mask=mask, other=0.0).to(tl.float64)
    value -= tl.load(value_ptr + first).to(tl.float64)
    sums = sum_ptr + i
    tl.store(sums + SUM_VALUE * capacity, tl.cumsum(value, 0), mask=mask)
    tl.store(sums + SUM_SCORE * capacity, tl.cumsum(score, 0), mask=mask)
    tl.store(sums + SUM_PRODUCT * capacity, tl.cumsum(value * score, 0), mask=mask)


@triton.jit
def up(i):
    """i, or the beginning of the next block."""
    return (i + (PAIRED - 1)) // PAIRED * PAIRED


@triton.jit
def pieces(low, middle, high, n_pos):
    """Split [low, middle) and [middle, high) into blocks and the rest.

    ``(first block, end, first block, end, low 1, high 1, low 2, high 2, low 3, high 3)``: blocks
    wholly inside the one and the other, and three stretches, each within a block. The last block
    ends at n_pos.
    """
    a = tl.minimum(up(low), high)
    b_down = middle // PAIRED * PAIRED
    b_down = tl.where(middle == n_pos, n_pos, b_down)
    b_low = tl.maximum(b_down, a)
    b = tl.maximum(tl.minimum(up(middle), high), a)
    c_down = tl.where(high == n_pos, n_pos, high // PAIRED * PAIRED)
    c_low = tl.maximum(c_down, b)
    whole = up(low) // PAIRED
    beyond = up(middle) // PAIRED
    end = (b_down + (PAIRED - 1)) // PAIRED
    return whole, end, beyond, (c_down + (PAIRED - 1)) // PAIRED, low, a, b_low, b, c_low, high


@triton.jit
def blocks_of(k, first, end, beyond, last, n_pos):
    """Of blocks k: ``(inside the first range, inside one of both, start, size)``."""
    one = (k >= first[None, :]) & (k < end[None, :])
    both = one | (k >= beyond[None, :]) & (k < last[None, :])
    start = k * PAIRED
    size = tl.minimum(tl.maximum(n_pos - start, 0), PAIRED)
    return one, both, start, tl.where(both, size, 0)


@triton.jit
def violators(
    positive_ptr, place_ptr, value_ptr, sum_ptr, capacity, n_pos, delta, per_unit, program,
    programs, ACROSS: tl.constexpr,
):  # fmt: skip
    """Over the positives j of i's list: RANK_PLUS the sum of H_ij, FIRST the sorting error, SECOND
    its share per violator; and of these shares the sums that ``spread`` looks up."""
    first = program * PAIRED
    while first < n_pos:
        i = first + tl.arange(0, PAIRED)
        mask = i < n_pos
        row = positive_ptr + i
        s_i = tl.load(row + SCORE * capacity, mask=mask, other=0.0)
        v_i = tl.load(row + VALUE * capacity, mask=mask, other=0.0)
        low = tl.load(place_ptr + WINDOW_START * capacity + i, mask=mask, other=0)
        middle = tl.load(place_ptr + WINDOW_END * capacity + i, mask=mask, other=0)
        high = tl.load(place_ptr + START * capacity + i, mask=mask, other=0)
        high += tl.load(place_ptr + SIZE * capacity + i, mask=mask, other=0)
        begin, end, beyond, last, low_1, high_1, low_2, high_2, low_3, high_3 = pieces(
            low, middle, high, n_pos
        )
        # sums of H, of those with y_j < y_i, and of H |y_j - y_i| on either side of y_i
        rank = tl.zeros([ACROSS, PAIRED], tl.float64)
        wrong = tl.zeros([ACROSS, PAIRED], tl.float64)
        deficit = tl.zeros([ACROSS, PAIRED], tl.float64)
        surplus = tl.zeros([ACROSS, PAIRED], tl.float64)
        block = tl.min(tl.where(mask, low, n_pos), 0) // PAIRED
        stop = (tl.max(high, 0) + (PAIRED - 1)) // PAIRED
        while block < stop:
            k = (block + tl.arange(0, ACROSS))[:, None]
            window, there, start, size = blocks_of(k, begin, end, beyond, last, n_pos)
            filled = start < n_pos
            s_0 = tl.load(positive_ptr + SCORE * capacity + start, mask=filled, other=0.0)
            v_0 = tl.load(value_ptr + start, mask=filled, other=0.0)
            at = count_below(value_ptr + start, v_i[None, :], 0.0, size, PAIRED, False)
            score = s_i[None, :].to(tl.float64) - s_0
            value = v_i[None, :].to(tl.float64) - v_0
            # H of j is constant + slope (s_j - s_0)
            constant = tl.where(window, 0.5 - per_unit * score, 1.0)
            slope = tl.where(window, per_unit, 0.0)
            h, h_value = linear_sums(sum_ptr, capacity, start, at, constant, slope)
            h_all, h_value_all = linear_sums(sum_ptr, capacity, start, size, constant, slope)
            rank += h_all
            wrong += tl.maximum(h, 0.0)
            deficit += tl.maximum(value * h - h_value, 0.0)
            surplus += tl.maximum((h_value_all - h_value) - value * (h_all - h), 0.0)
            block += ACROSS
        for piece in tl.static_range(3):
            if piece == 0:
                j_0, j_end = low_1, high_1
            elif piece == 1:
                j_0, j_end = low_2, high_2
            else:
                j_0, j_end = low_3, high_3
            rank_part = tl.zeros([ACROSS, PAIRED], tl.float32)
            wrong_part = tl.zeros([ACROSS, PAIRED], tl.float32)
            deficit_part = tl.zeros([ACROSS, PAIRED], tl.float32)
            surplus_part = tl.zeros([ACROSS, PAIRED], tl.float32)
            most = tl.max(j_end - j_0, 0)
            done = tl.cast(0, tl.int32)
            while done < most:
                j = j_0[None, :] + (done + tl.arange(0, ACROSS))[:, None]
                there = j < j_end[None, :]
                other = positive_ptr + j
                s_j = tl.load(other + SCORE * capacity, mask=there, other=-float("inf"))
                v_j = tl.load(other + VALUE * capacity, mask=there, other=0.0)
                above = step(s_j - s_i[None, :], delta, per_unit)
                better = above * (v_j - v_i[None, :])
                rank_part += above
                wrong_part += tl.where(v_j < v_i[None, :], above, 0.0)
                deficit_part += tl.maximum(-better, 0.0)
                surplus_part += tl.maximum(better, 0.0)
                done += ACROSS
            rank += rank_part.to(tl.float64)
            wrong += wrong_part.to(tl.float64)
            deficit += deficit_part.to(tl.float64)
            surplus += surplus_part.to(tl.float64)
        rank = tl.sum(rank, 0)
        wrong = tl.sum(wrong, 0)
        # current - target sorting error, from qualities relative to v_i: nothing cancels
        right = tl.where(mask & (rank > wrong), rank - wrong, 1.0)
        error = tl.sum(deficit, 0) + wrong * (tl.sum(surplus, 0) / right)
        error = tl.where(wrong > 0, error / tl.where(mask, rank, 1.0), 0.0)
        share = error / tl.where(wrong > 0, wrong, 1.0)
        tl.store(row + RANK_PLUS * capacity, rank.to(tl.float32), mask=mask)
        tl.store(row + FIRST * capacity, error.to(tl.float32), mask=mask)
        tl.store(row + SECOND * capacity, share.to(tl.float32), mask=mask)
        tl.debug_barrier()
        # From the highest quality down
        place = tl.minimum(first + PAIRED, n_pos) - 1 - tl.arange(0, PAIRED)
        j = tl.load(place_ptr + BY_VALUE * capacity + place, mask=place >= first, other=0)
        share = tl.load(positive_ptr + SECOND * capacity + j, mask=place >= first, other=0.0)
        share = share.to(tl.float64)
        score = tl.load(positive_ptr + SCORE * capacity + j, mask=place >= first, other=0.0)
        score = score.to(tl.float64) - tl.load(positive_ptr + SCORE * capacity + first)
        sums = sum_ptr + place
        tl.store(sums + SUM_SHARE * capacity, tl.cumsum(share, 0), mask=place >= first)
        total = tl.cumsum(share * score, 0)
        tl.store(sums + SUM_SHARE_SCORE * capacity, total, mask=place >= first)
        first += programs * PAIRED


@triton.jit
def linear_sums(sum_ptr, capacity, start, count, constant, slope):
    """Of the ``count`` lowest qualities of the blocks from ``start``: sums of h and of h (y - y_0),
    where h = constant + slope (s - s_0)."""
    some = count > 0
    sums = sum_ptr + start + count - 1
    value = tl.load(sums + SUM_VALUE * capacity, mask=some, other=0.0)
    score = tl.load(sums + SUM_SCORE * capacity, mask=some, other=0.0)
    product = tl.load(sums + SUM_PRODUCT * capacity, mask=some, other=0.0)
    return constant * count + slope * score, constant * value + slope * product


@triton.jit
def spread(
    positive_ptr, place_ptr, value_ptr, sum_ptr, capacity, n_pos, delta, per_unit, program,
    programs, ACROSS: tl.constexpr,
):  # fmt: skip
    """The sorting gradient, OTHER: i receives a share from each j of its list whose order it
    violates."""
    first = program * PAIRED
    while first < n_pos:
        i = first + tl.arange(0, PAIRED)
        mask = i < n_pos
        s_i = tl.load(positive_ptr + SCORE * capacity + i, mask=mask, other=0.0)
        v_i = tl.load(positive_ptr + VALUE * capacity + i, mask=mask, other=0.0)
        low = tl.load(place_ptr + START * capacity + i, mask=mask, other=0)
        middle = tl.load(place_ptr + WINDOW_START * capacity + i, mask=mask, other=0)
        high = tl.load(place_ptr + WINDOW_END * capacity + i, mask=mask, other=0)
        if delta == 0:  # H of equal scores is 1
            high = tl.load(place_ptr + UPPER * capacity + i, mask=mask, other=0)
            high = tl.where(mask, high - i, 0)
            middle = high
        begin, end, beyond, last, low_1, high_1, low_2, high_2, low_3, high_3 = pieces(
            low, middle, high, n_pos
        )
        received = tl.zeros([ACROSS, PAIRED], tl.float64)
        block = tl.min(tl.where(mask, low, n_pos), 0) // PAIRED
        stop = (tl.max(high, 0) + (PAIRED - 1)) // PAIRED
        while block < stop:
            k = (block + tl.arange(0, ACROSS))[:, None]
            below, there, start, size = blocks_of(k, begin, end, beyond, last, n_pos)
            s_0 = tl.load(positive_ptr + SCORE * capacity + start, mask=start < n_pos, other=0.0)
            at = count_below(value_ptr + start, v_i[None, :], 0.0, size, PAIRED, True)
            score = s_i[None, :].to(tl.float64) - s_0
            some = at < size
            sums = sum_ptr + start + at
            share = tl.load(sums + SUM_SHARE * capacity, mask=some, other=0.0)
            part = tl.load(sums + SUM_SHARE_SCORE * capacity, mask=some, other=0.0)
            part = (0.5 + per_unit * score) * share - per_unit * part
            received += tl.maximum(tl.where(below, share, part), 0.0)
            block += ACROSS
        for piece in tl.static_range(3):
            if piece == 0:
                j_0, j_end = low_1, high_1
            elif piece == 1:
                j_0, j_end = low_2, high_2
            else:
                j_0, j_end = low_3, high_3
            sums = tl.zeros([ACROSS, PAIRED], tl.float32)
            most = tl.max(j_end - j_0, 0)
            done = tl.cast(0, tl.int32)
            while done < most:
                j = j_0[None, :] + (done + tl.arange(0, ACROSS))[:, None]
                there = j < j_end[None, :]
                other = positive_ptr + j
                s_j = tl.load(other + SCORE * capacity, mask=there, other=float("inf"))
                v_j = tl.load(other + VALUE * capacity, mask=there, other=0.0)
                share = tl.load(other + SECOND * capacity, mask=there, other=0.0)
                share = tl.where(v_i[None, :] < v_j, share, 0.0)
                sums += step(s_i[None, :] - s_j, delta, per_unit) * share
                done += ACROSS
            received += sums.to(tl.float64)
        error = tl.load(positive_ptr + FIRST * capacity + i, mask=mask, other=0.0)
        size = tl.load(place_ptr + SIZE * capacity + i, mask=mask, other=1)
        received = (tl.sum(received, 0) - error) / size.to(tl.float32)
        tl.store(positive_ptr + OTHER * capacity + i, received.to(tl.float32), mask=mask)
        first += programs * PAIRED
