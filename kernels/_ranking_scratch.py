"""Scratch of the ranking kernels: tables of rows, with an entry for each positive or knot; and what
all passes read first.

P stays on the device: a table has room for ``capacity`` positives, and each pass reads P. Tables of
one dtype lie in one tensor, for every tensor and every pointer costs the host: float32 those of
positives and of knots, and the scale (``tables``), int64 the words that a pass over the logits
looks up and the positives' items (``lookup_tables``). What only lives from one launch to the next
lies where a later one writes.
"""

import triton
import triton.language as tl

from ._numbers import Constant

# Entries of a table of positives, float32, by ascending (list, score, value).
SCORE, VALUE, RANK_PLUS, MISS, FIRST, SECOND, WEIGHT, OWN, OTHER = (Constant(k) for k in range(9))
# int32: the places of its two knots; start, size and id of its list; the first positive inside its
# window, the first above it, and the first with a higher score. BY_VALUE: blocks by quality.
LOWER, UPPER, START, SIZE, LIST, WINDOW_START, WINDOW_END, TIED = (Constant(k) for k in range(8))
BY_VALUE = TIED
# Entries of a table of knots, float32, by ascending (list, knot).
KEY, HIGH, LOW, COUNT, OFFSET = (Constant(k) for k in range(5))
# Sums over what is above, float64: RAMP at the knots (two rows), the others at positives.
RAMP, DISTANCE, SUM_DISTANCE, AHEAD, AHEAD_DISTANCE = (Constant(k) for k in (0, 2, 3, 4, 5))
# Rank & Sort's, in each block by quality: up from the lowest, and of shares down from the highest.
SUM_VALUE, SUM_SCORE, SUM_PRODUCT, SUM_SHARE, SUM_SHARE_SCORE = (
    Constant(k) for k in (2, 3, 4, 5, 6)
)
PLACE_ROWS, KNOT_ROWS, SUM_ROWS = 8, 5, 7
# Rows of the float32 tensor, capacity wide: positives, knots (two each), qualities sorted in blocks
# (Rank & Sort); then the scale, what the upstream gradients are multiplied with.
KNOTS, SORTED_VALUES, SCALE = (Constant(k) for k in (9, 19, 20))
# From ``order`` to ``merge``: score and value in two rows of positives, the list in one of places,
# the item where the words of knots will be.
BLOCKS, BLOCK_LISTS = RANK_PLUS, WINDOW_START

# Cells of the table by which a key is searched: the largest fits an L1 cache.
MOST_CELLS = Constant(16384)
CELL_BLOCKS = Constant(16)
PLAN_WORDS = Constant(3)


def float_words(capacity: int) -> int:
    """Size of the float32 tensor."""
    return SCALE.value * capacity + 1


def lookup_words(capacity: int) -> int:
    """Size of the int64 tensor. What a pass over the logits looks up: forward, HIGH and LOW of each
    knot in a word; backward, these in one and the gradient there and its slope in the next. The
    first knot of each cell and, above it, how many the cell holds; most knots of a cell in each
    block; the plan of the histogram. And the item of each positive.
    """
    return 5 * capacity + MOST_CELLS.value + CELL_BLOCKS.value + PLAN_WORDS.value


@triton.jit
def tables(float_ptr, capacity):
    """Where the tables of positives and of knots begin, and that of sorted qualities; the scale."""
    rows = float_ptr + KNOTS * capacity
    return float_ptr, rows, float_ptr + SORTED_VALUES * capacity, float_ptr + SCALE * capacity


@triton.jit
def lookup_tables(lookup_ptr, capacity):
    """Where cells, the most knots of a cell, the plan and the items begin."""
    table_ptr = lookup_ptr + 4 * capacity
    plan_ptr = table_ptr + (MOST_CELLS + CELL_BLOCKS)
    return table_ptr, table_ptr + MOST_CELLS, plan_ptr, plan_ptr + PLAN_WORDS


@triton.jit
def wide(capacity):
    """The length of a row in 64 bits: rows begin beyond 2**31 elements."""
    return tl.cast(capacity, tl.int64)


@triton.jit
def count_positives(counter_ptr, capacity):
    """P, an int32; no more than there is room for (``means`` tells)."""
    return tl.minimum(tl.load(counter_ptr), capacity).to(tl.int32)


@triton.jit
def is_broken(counter_ptr, n_pos, capacity):
    """True if the loss is NaN: something not finite beside positives, or too many positives."""
    broken = (tl.load(counter_ptr + 1) > 0) & (n_pos > 0)
    return broken | (tl.load(counter_ptr) > capacity)


@triton.jit
def load_delta(delta_ptr, delta):
    """``(delta, 1 / (2 delta))``; the latter 0 for a hard step."""
    if delta_ptr is not None:
        delta = tl.load(delta_ptr).to(tl.float32)
    else:
        delta = tl.cast(delta, tl.float32)
    return delta, tl.where(delta > 0, 0.5 / tl.where(delta > 0, delta, 1.0), 0.0)
