"""Block sizes and warps, each with its reason; and what every launcher needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int


# 16 elements a thread: four 16-byte loads of float32 in flight before the first use.
POINTWISE = Config(block=2048, num_warps=4)
# One program sums all partial results in a fixed order.
FINISH = Config(block=1024, num_warps=4)


@dataclass(frozen=True)
class Histogram:
    """Regions as a table of ``high`` rows and ``low`` columns; BLOCK logits, PARTS products."""

    high: int
    low: int
    block: int
    parts: int


# One warp a program, for warps cannot share a product this small. 16 rows are the least that a
# tensor core takes; 4 low columns (two halves of the loss, a one, a spare) at a time make 8
# columns. A product of 128 logits (64 in large tables) keeps both operands in registers and the
# sums that the tensor core truncates short.
HISTOGRAMS = {
    32: Histogram(high=16, low=2, block=512, parts=4),
    64: Histogram(high=16, low=4, block=512, parts=4),
    128: Histogram(high=32, low=4, block=256, parts=4),
    256: Histogram(high=32, low=8, block=256, parts=4),
}
# Enough single-warp programs to fill the largest GPU (32 on each multiprocessor), and so few that
# summing their tables costs nothing.
HISTOGRAM_PROGRAMS = 4096


def scalar_args(values: Tensor | tuple[float, ...] | None, count: int):
    """``(pointer, numbers)`` for a kernel that takes hyper-parameters from either."""
    if values is None or isinstance(values, Tensor):
        return values, (0.0,) * count
    return None, tuple(float(v) for v in values) + (0.0,) * (count - len(values))
