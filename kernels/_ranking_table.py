"""How the passes over the logits of the ranking losses find a segment, and count in it.

A table of equal cells over the range of the knots says which knots lie in a logit's cell, mostly
none; only among those a binary search is left. Any rounding of the cell is right, as long as it
never falls while the logit grows. With several lists the search is over the knots of the list.

The histogram has private copies, as many as spread the atomics. Counts and distances are integers,
so that atomics in any order give the same bits. A word of 64 bits holds both, the count above and
the distance in fixed point below, with as many fraction bits as a copy's logits leave room for.
"""

import triton
import triton.language as tl

from ._numbers import Constant
from ._ranking_pairs import windows
from ._ranking_scratch import (
    CELL_BLOCKS,
    HIGH,
    LOW,
    MOST_CELLS,
    count_positives,
    load_delta,
    lookup_tables,
    tables,
    wide,
)

# Cells of the table: eight a knot, of which most hold none.
LEAST_CELLS = Constant(256)
CELLS_PER_POSITIVE = Constant(16)
# Words of all copies together: more copies would take longer to add up than they spare.
WORDS = 1 << 20
# With fewer, the rounding of a distance shows in the loss: count and distance take a word each.
LEAST_FRACTION = 24
MOST_FRACTION = Constant(40)


@triton.jit
def load_plan(plan_ptr):
    """``(copies, fraction bits, shift)`` of the histogram, see ``histogram_plan``."""
    copies = tl.load(plan_ptr).to(tl.int32)
    return copies, tl.load(plan_ptr + 1).to(tl.int32), tl.load(plan_ptr + 2).to(tl.int32)


@triton.jit
def packed(a, b):
    """Two float32 in a word, so that one load brings both."""
    low = a.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return low | (b.to(tl.int32, bitcast=True).to(tl.int64) << 32)


@triton.jit
def unpacked(word):
    a = word.to(tl.int32).to(tl.float32, bitcast=True)
    return a, (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def power_of_2(bits):
    """2 ** bits as float32."""
    return ((bits + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def histogram_plan(n, n_pos, n_words, programs, fraction, LEAST: tl.constexpr, TILE: tl.constexpr):
    """``(copies, fraction bits, shift)`` of the histogram.

    A word holds a distance and, above ``shift`` bits, a count; with a shift of 0, where no LEAST
    bits would be left for the distance, each has a word. ``programs`` take tiles of TILE of the n
    logits, program i adds to copy i modulo copies. ``fraction``: bits of a distance that has a word
    of its own.
    """
    segments = tl.maximum(2 * n_pos, 1).to(tl.int64)
    programs = tl.cast(programs, tl.int64)
    tiles = (tl.cast(n, tl.int64) + (TILE - 1)) // TILE
    fraction = tl.cast(fraction, tl.int32)
    copies = tl.minimum(tl.maximum(n_words // segments, 1), programs)
    most = ((programs + copies - 1) // copies) * ((tiles + programs - 1) // programs) * TILE
    width = tl.cast(1, tl.int64)  # bits of a copy's count
    while (most >> width) > 0:
        width += 1
    width = width.to(tl.int32)
    room = 63 - 2 * width
    both = room >= LEAST
    fraction = tl.where(both, tl.minimum(room, MOST_FRACTION), fraction)
    apart = tl.minimum(tl.maximum(n_words // (2 * segments), 1), programs)
    return tl.where(both, copies, apart), fraction, tl.where(both, 63 - width, 0)


@triton.jit
def words_of(n_pos, shift):
    """Words of a copy of the histogram."""
    return n_pos.to(tl.int64) * tl.where(shift > 0, 2, 4)


@triton.jit
def table_scale(knot_ptr, n_pos):
    """``(cells, lowest key, cells per unit)`` of the table; no cells without positives."""
    cells = LEAST_CELLS * tl.minimum(n_pos, 1)
    while (cells < MOST_CELLS) & (cells // CELLS_PER_POSITIVE < n_pos):
        cells *= 2
    lowest = tl.load(knot_ptr, mask=n_pos > 0, other=0.0)
    span = tl.load(knot_ptr + (2 * n_pos - 1), mask=n_pos > 0, other=0.0) - lowest
    # divided exactly, so that all kernels get the same cells
    per_unit = tl.div_rn(cells.to(tl.float32), tl.where(span > 0, span, 1.0))
    return cells, lowest, tl.where(span > 0, per_unit, 0.0)


@triton.jit
def cell_of(x, cells, lowest, per_unit):
    """Cell of a logit; that of NaN is the first."""
    at = (x - lowest) * per_unit
    at = tl.where(at > 0, at, 0.0)
    last = (cells - 1).to(tl.float32)
    return tl.where(at < last, at, last).to(tl.int32)


@triton.jit
def first_jump(n):
    """Where a binary search among n begins: the first power of 2 that is not below n."""
    jump = tl.minimum(n, 1)
    while jump < n:
        jump *= 2
    return jump


@triton.jit
def prepare_kernel(
    # pointers
    float_ptr,  # see ``tables``
    lookup_ptr,  # int64 out, see ``lookup_words``
    histogram_ptr,  # [n_words] int64 out: zeros where the histogram is
    place_ptr,  # table of places out: see ``windows``
    sum_ptr,
    counter_ptr,
    delta_ptr,
    # shapes
    n,
    n_words,
    capacity,
    programs,  # of the pass over the logits
    cell_programs,
    # scalars
    fraction,
    delta,
    # constants
    LEAST: tl.constexpr,
    TABLE: tl.constexpr,
    TILE: tl.constexpr,  # of the pass over the logits
    PAIRS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """1-D grid: ``cell_programs``, at least CELL_BLOCKS, make all that the pass over the logits
    needs; the others ``windows``."""
    capacity = wide(capacity)
    positive_ptr, knot_ptr, value_ptr, _scale_ptr = tables(float_ptr, capacity)
    pid = tl.program_id(0)
    if pid >= cell_programs:
        half, _ = load_delta(delta_ptr, delta)
        windows(
            positive_ptr,
            place_ptr,
            value_ptr,
            sum_ptr,
            capacity,
            count_positives(counter_ptr, capacity),
            half,
            pid - cell_programs,
            tl.num_programs(0) - cell_programs,
            PAIRS,
            ACROSS,
        )
        return
    BLOCK: tl.constexpr = MOST_CELLS // CELL_BLOCKS
    lanes = tl.arange(0, BLOCK)
    n_pos = count_positives(counter_ptr, capacity)
    table_ptr, most_ptr, plan_ptr, _ = lookup_tables(lookup_ptr, capacity)
    step = tl.cast(cell_programs, tl.int64) * BLOCK
    copies, fraction, shift = histogram_plan(n, n_pos, n_words, programs, fraction, LEAST, TILE)
    if pid == 0:
        tl.store(plan_ptr, copies)
        tl.store(plan_ptr + 1, fraction.to(tl.int64))
        tl.store(plan_ptr + 2, shift.to(tl.int64))
    words = copies * words_of(n_pos, shift)
    start = pid.to(tl.int64) * BLOCK
    while start < words:
        zero = tl.zeros([BLOCK], tl.int64)
        tl.store(histogram_ptr + start + lanes, zero, mask=lanes < words - start)
        start += step
    start = pid.to(tl.int64) * BLOCK
    while start < 2 * n_pos:
        row = knot_ptr + start + lanes
        mask = lanes < 2 * n_pos - start
        high = tl.load(row + HIGH * 2 * capacity, mask=mask, other=0.0)
        low = tl.load(row + LOW * 2 * capacity, mask=mask, other=0.0)
        tl.store(lookup_ptr + start + lanes, packed(high, low), mask=mask)
        start += step
    cells, lowest, per_unit = table_scale(knot_ptr, n_pos if TABLE else n_pos * 0)
    if pid * BLOCK < cells:
        cell = pid * BLOCK + lanes
        # knots in the cells below this one, and below the next
        first = tl.zeros([BLOCK], tl.int32)
        end = tl.zeros([BLOCK], tl.int32)
        jump = first_jump(2 * n_pos)
        while jump > 0:
            at = tl.minimum(first + jump, 2 * n_pos)
            theirs = cell_of(tl.load(knot_ptr + at - 1), cells, lowest, per_unit)
            first = tl.where(theirs < cell, at, first)
            at = tl.minimum(end + jump, 2 * n_pos)
            theirs = cell_of(tl.load(knot_ptr + at - 1), cells, lowest, per_unit)
            end = tl.where(theirs <= cell, at, end)
            jump = jump // 2
        many = end - first
        tl.store(table_ptr + cell, first.to(tl.int64) | (many.to(tl.int64) << 32))
        tl.store(most_ptr + pid, tl.max(many, 0).to(tl.int64))


@triton.jit
def most_of_a_cell(most_ptr, cells):
    """Most knots that one cell of the table holds."""
    blocks = tl.arange(0, CELL_BLOCKS)
    filled = blocks * (MOST_CELLS // CELL_BLOCKS) < cells
    return tl.max(tl.load(most_ptr + blocks, mask=filled, other=0), 0).to(tl.int32)


@triton.jit
def search(x, active, knot_ptr, first, many, jump):
    """How many of the ``many`` knots from ``first`` on are not above x; ``many`` <= ``jump``."""
    below = tl.zeros(x.shape, tl.int32)
    while jump > 0:
        at = tl.minimum(below + jump, many)
        # nothing is loaded where nothing is left to find
        key = tl.load(knot_ptr + first + at - 1, mask=active & (at > below), other=float("inf"))
        below = tl.where(key <= x, at, below)
        jump = jump // 2
    return below
