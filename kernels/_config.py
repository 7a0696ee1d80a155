"""Block sizes and warps, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int


# 8 elements a thread: one 16-byte load of 16-bit logits, two of float32. With 16 the backward
# spills registers.
POINTWISE = Config(block=2048, num_warps=8)
# Tiles a program takes, where enough programs are left to fill the largest GPU: the sum over its
# threads, and what it loads first, take as many instructions as half a tile.
POINTWISE_TILES = 4
POINTWISE_PROGRAMS = 2048
# Elements of a tile of rows x classes, and its classes at most. Of 80 classes 32 contiguous rows,
# two a thread; where rows lie side by side, one a thread.
SOFTMAX = Config(block=4096, num_warps=4), 128
SOFTMAX_BY_ROW = Config(block=2048, num_warps=4), 16
# Elements of a tile of rows x bins: 64 rows of 17 bins.
DISTRIBUTION = Config(block=2048, num_warps=4)
# Threads of a contiguous row: its sums are shuffles over three levels, and what is done once a row
# is done by eight threads, not by 32. Columns that a thread holds at most.
LANES_OF_ROW = 8
MAX_STEPS = 16
# Two boxes a thread: four 16-byte loads in flight, and the gradient still fits in registers.
BOXES = Config(block=256, num_warps=4)
# Pairs of queries and objects: four a thread, each with two boxes in registers. Objects of a tile
# at most: the queries' boxes are read once for all of them. Classes read at once for the softmax.
MATCHING = Config(block=512, num_warps=4)
MATCHING_OBJECTS = 32
MATCHING_CLASSES = 32
# One program sums all partial results in a fixed order.
FINISH = Config(block=1024, num_warps=4)
# Pairs of positives: so many i, one a lane, beside so many j, eight a thread. Sums stay in the
# thread's registers to the end of a block.
PAIRS = Config(block=32, num_warps=8)
PAIRS_ACROSS = 64
# Positives i, one a lane, and sorted blocks that they are searched in at once, one a warp.
MERGE = Config(block=32, num_warps=8)
MERGE_ACROSS = 8
# Blocks whose sums Rank & Sort looks up at once: two a thread.
PAIRED_ACROSS = 8
# One program scans a list: four float64 entries a thread, of which it holds a dozen at once.
SCANS = Config(block=1024, num_warps=8)
# Logits of a ranking pass: eight a thread, for each costs a dozen registers of search state.
RANKING = Config(block=1024, num_warps=8)


# Copies of a histogram x its segments: eight loads a thread in flight.
COLLECT, COLLECT_COPIES = Config(block=16, num_warps=8), 128
# One warp a program: its sums are shuffles, without a barrier, and it walks only the regions that
# its own 512 logits fall into (of a detector's head: a few).
HISTOGRAM = Config(block=512, num_warps=1)
# Enough programs to fill the largest GPU (32 warps on each multiprocessor), and so few that adding
# up their tables costs nothing.
HISTOGRAM_PROGRAMS = 4096
REGION_TOTALS = Config(block=1024, num_warps=4)

# Eight logits a thread: their atomics are in flight together, and nothing waits for them.
COUNTING = Config(block=2048, num_warps=8)
# Copies of a table that all programs add to: hot cells are spread over the memory's banks, and
# zeroing and summing the copies costs a byte for every logit.
COUNTING_COPIES = 128
LOGITS_PER_COPY = 1 << 14
