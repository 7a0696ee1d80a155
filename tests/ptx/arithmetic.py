"""What an instruction computes: types, and one table of opcodes with NumPy functions of arrays.

Types are PTX's; "f32x2" is two numbers in one register, an array whose last axis has both. "bf16"
is seen as the float32 of the same value.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

# ---------------------------------------------------------------------------------------- types


@cache
def split(type_: str) -> tuple[str, int, int]:
    """Type of a part, its bits, and how many parts there are."""
    m = re.fullmatch(r"(pred|(?:[busf]|bf)(\d+))(?:x([248]))?", type_)
    return m[1], int(m[2] or 1), int(m[3] or 1)


@cache
def numpy_type(type_: str) -> np.dtype:
    """How a part of the type is seen by functions."""
    base, bits, _ = split(type_)
    if base in ("pred", "bf16", "f80"):
        return np.dtype({"pred": bool, "bf16": np.float32, "f80": np.longdouble}[base])
    return np.dtype({"s": "i", "f": "f"}.get(base[0], "u") + str(bits // 8))


def unsigned(bits: int) -> np.dtype:
    """How a register holds them."""
    return numpy_type("pred" if bits == 1 else f"u{bits}")


def constant(value: int, bits: int):
    return unsigned(bits).type(value & (1 << bits) - 1)


@cache
def seen_as(type_: str) -> Callable:
    """From the bits of registers to values."""
    base, bits, parts = split(type_)
    part, as_ = unsigned(bits), numpy_type(base)

    def seen(x):
        x = x[..., None].view(part) if parts > 1 else x
        return (x.astype(np.uint32) << 16).view(as_) if base == "bf16" else x.view(as_)

    return seen


@cache
def bits_from(type_: str) -> Callable:
    """From values to the bits of registers; floats are rounded, to the nearest and ties to even."""
    base, bits, parts = split(type_)
    part, whole, as_ = unsigned(bits), unsigned(bits * parts), numpy_type(base)

    def raw(x):
        x = np.asarray(x).astype(as_, copy=False)
        x = torch.tensor(x).bfloat16().view(torch.int16).numpy() if base == "bf16" else x
        return np.ascontiguousarray(x.view(part)).view(whole)[..., 0] if parts > 1 else x.view(part)

    return raw


# ------------------------------------------------------------------------------------ functions


def flushing(function: Callable) -> Callable:
    """Subnormals, given and returned, count as 0 of the same sign."""

    def flush(x):
        return x * (np.abs(x) >= np.float32(2.0**-126))

    return lambda *values: flush(function(*map(flush, values)).astype(np.float32))


def to_integer(bits: int) -> Callable:
    """Toward zero and saturated; NaN becomes 0, or the smallest of 64 bits."""
    as_ = numpy_type(f"s{bits}")
    least, largest = np.iinfo(as_).min, np.iinfo(as_).max

    def function(x):
        x = np.where(np.isnan(x), least if bits == 64 else 0, x)
        return np.clip(x, least, largest).astype(as_)

    return function


def bit_field(x, start, length):
    """To the top, and down again: zeros or copies of the sign come after it."""
    bits = 8 * x.dtype.itemsize
    start = np.minimum(start & 255, bits)
    length = np.minimum(length & 255, bits - start)
    up, down = ((bits - k).astype(x.dtype) for k in (start + length, length))
    return np.where(length == 0, 0, x << up >> down)


def permuted(a, b, selector):
    """Each nibble of the selector takes one of eight bytes, or copies of its sign."""
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    nibbles = selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)
    bytes_ = (pool[..., None] >> ((nibbles & 7) * 8).astype(np.uint64)).astype(np.int8)
    return np.where(nibbles & 8, bytes_ >> 7, bytes_)


def same(x):
    return x


def product_and_sum(a, b, c):
    return a * b + c


def shuffled(mode: str) -> Callable:
    """Lanes get the value of another one, or their own where none is within reach."""
    lane = np.arange(32, dtype=np.int32)

    def function(values, by, clamp):
        b, c = by.astype(np.int32) & 31, clamp.astype(np.int32)
        segment, c = c >> 8 & 31, c & 31
        low, high = lane & segment, (lane & segment) | (c & ~segment)
        source = {"up": lane - b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[mode]
        reached = source >= high if mode == "up" else source <= high
        return np.take_along_axis(values, np.where(reached, source, lane), 1)

    return function


def reduced(function: np.ufunc) -> Callable:
    return lambda values: function.reduce(values, 1, dtype=values.dtype, keepdims=True)


def ballot(votes):
    lane = np.arange(32, dtype=np.uint32)
    return (votes << lane).sum(1, dtype=np.uint32, keepdims=True)


def unordered(a, b):
    return np.isnan(a) | np.isnan(b)


def not_(function: Callable) -> Callable:
    return lambda *values: ~function(*values)


def of_three(function: Callable) -> Callable:
    return lambda a, b, c: function(function(a, b), c)


# ---------------------------------------------------------------------------------------- table


class Operation(NamedTuple):
    """``result = function(*sources)``, elementwise."""

    result: str  # type
    sources: tuple[str, ...]  # types
    function: Callable
    ulp: float = 0.0  # documented error of an approximate instruction
    warps: bool = False  # of [warps, lanes]; another source, the mask of lanes, is the last

    def off_by(self, noise: float) -> Callable:
        """The function, off by up to so many documented errors; the same for equal results."""

        def function(*values):
            x = self.function(*values).astype(np.float32)
            hashed = np.asarray(x).view(np.uint32).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            share = (hashed >> np.uint64(40)) / 2.0**23 - 1
            return x * (1 + share * noise * self.ulp * 2.0**-23)

        return function


TABLE: dict[tuple[str, int], Operation] = {}  # by opcode and number of sources


def define(opcodes: str, types: str, shape: str, function, through="", ulp=0.0, warps=False):
    """Rows of the table, for each opcode and type.

    ``shape`` is "result = sources": T is the type, W one of twice the bits, P a predicate for each
    part. Sources are converted to the type ``through`` first; D is the next wider float.
    """
    for opcode, type_ in itertools.product(opcodes.split(), types.split()):
        base, bits, parts = split(type_)
        special = {
            "T": type_,
            "W": f"{base[0]}{2 * bits}",
            "P": "predx2" if parts > 1 else "pred",
            "D": "f64" if bits == 32 else "f80",
        }
        result, _, *sources = (special.get(word, word) for word in shape.split())
        computed = function
        if through:
            computed = _converting(function, numpy_type(special.get(through, through)))
        key = opcode.replace("T", type_), len(sources)
        TABLE[key] = Operation(result, tuple(sources), computed, ulp, warps)


def _converting(function: Callable, as_) -> Callable:
    return lambda *values: function(*[x.astype(as_, copy=False) for x in values])


BITS = "b16 b32 b64"
INTEGERS = "s16 s32 s64 u16 u32 u64"
FLOATS = "f32 f64 f32x2"

define("add.T", f"{INTEGERS} s16x2 {FLOATS}", "T = T T", np.add)
define("sub.T", f"{INTEGERS} s16x2 {FLOATS}", "T = T T", np.subtract)
define("neg.T", "s16 s32 s64 f32 f64", "T = T", np.negative)
define("mul.lo.T", INTEGERS, "T = T T", np.multiply)
define("mad.lo.T", INTEGERS, "T = T T T", product_and_sum)
define("mul.wide.T", "s16 u16 s32 u32", "W = T T", np.multiply, through="W")
define("mad.wide.T", "s16 u16 s32 u32", "W = T T W", product_and_sum, through="W")
define("div.T", INTEGERS, "T = T T", lambda a, b: (a - np.fmod(a, b)) // b)  # toward zero
define("rem.T", INTEGERS, "T = T T", np.fmod)
define("min.relu.T", "s32", "T = T T", lambda a, b: np.maximum(np.minimum(a, b), 0))
define("and.T", f"{BITS} pred", "T = T T", np.bitwise_and)
define("or.T", f"{BITS} pred", "T = T T", np.bitwise_or)
define("xor.T", f"{BITS} pred", "T = T T", np.bitwise_xor)
define("not.T", f"{BITS} pred", "T = T", np.invert)
define("shl.T", BITS, "T = T u32", lambda x, by: x << np.minimum(by, 64).astype(x.dtype))
define("shr.T", INTEGERS, "T = T u32", lambda x, by: x >> np.minimum(by, 64).astype(x.dtype))
define("popc.T", "b32", "u32 = T", np.bitwise_count)
define("bfe.T", "s32 u32 s64 u64", "T = T u32 u32", bit_field)
define("prmt.T", "b32", "s8x4 = T T T", permuted)
define("mov.T", f"{BITS} u16 u32 u64 pred", "T = T", same)
define("selp.T", f"{BITS} f32 f64", "T = T T pred", lambda a, b, p: np.where(p, a, b))

define("add.rn.T", FLOATS, "T = T T", np.add)
define("sub.rn.T", FLOATS, "T = T T", np.subtract)
define("mul.T mul.rn.T", FLOATS, "T = T T", np.multiply)
define("div.rn.T", "f32 f64", "T = T T", np.divide)
define("fma.rn.T", FLOATS, "T = T T T", product_and_sum, through="D")
define("fma.rn.ftz.T", "f32", "T = T T T", flushing(TABLE["fma.rn.f32", 3].function))
define("abs.T", "f32 f64 bf16", "T = T", np.abs)
for name, number, nan in (("min", np.fmin, np.minimum), ("max", np.fmax, np.maximum)):
    define(f"{name}.T", f"{INTEGERS} f32 f64", "T = T T", number)  # of a NaN and a number, that
    define(f"{name}.NaN.T", "f32", "T = T T", nan)
    # Blackwell
    define(f"{name}.T", "f32", "T = T T T", of_three(number))
    define(f"{name}.NaN.T", "f32", "T = T T T", of_three(nan))
# Blackwell, too: float32 and narrower numbers
define("add.f32.T add.rn.f32.T", "f16 bf16", "f32 = T f32", np.add, through="f32")
define("sub.f32.T sub.rn.f32.T", "f16 bf16", "f32 = T f32", np.subtract, through="f32")
define("fma.f32.T fma.rn.f32.T", "f16 bf16", "f32 = T T f32", product_and_sum, "f64")
define("div.full.T", "f32", "T = T T", np.divide, through="f64", ulp=2)
define("ex2.approx.T", "f32", "T = T", np.exp2, through="f64", ulp=2)
define("sqrt.approx.ftz.T", "f32", "T = T", flushing(np.sqrt), through="f64", ulp=1)
# What ``contract`` makes of a product in a sum
define("contracted.add.T", "f32", "T = T T T", lambda x, y, c: x * y + c, through="f64")
define("contracted.sub.T", "f32", "T = T T T", lambda x, y, c: x * y - c, through="f64")
define("contracted.from.T", "f32", "T = T T T", lambda x, y, c: c - x * y, through="f64")

define("setp.eq.T", BITS, "P = T T", np.equal)
define("setp.ne.T", BITS, "P = T T", np.not_equal)
COMPARED = "f32 f64 f16 bf16 f16x2 bf16x2"
define("setp.nan.T", COMPARED, "P = T T", unordered)
define("setp.num.T", COMPARED, "P = T T", not_(unordered))
ORDERS = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less, "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal,
}  # fmt: skip
OPPOSITES = ("ne", "eq", "ge", "lt", "le", "gt")
for (name, test), opposite in zip(ORDERS.items(), OPPOSITES, strict=True):
    define(f"setp.{name}.T", f"{INTEGERS} {COMPARED}", "P = T T", test)
    define(f"setp.{name}u.T", COMPARED, "P = T T", not_(ORDERS[opposite]))  # or unordered

for narrow in f"s8 u8 {INTEGERS}".split():
    define(f"cvt.T.{narrow}", f"s8 u8 {INTEGERS}", f"T = {narrow}", same)
define("cvt.f32.T", "f16 bf16", "f32 = T", same)
define("cvt.f64.T", "f32", "f64 = T", same)
define("cvt.rn.f32.T", f"{INTEGERS} f64", "f32 = T", same)
define("cvt.rn.f64.T", INTEGERS, "f64 = T", same)
define("cvt.rn.T.f32", "f16 bf16", "T = f32", same)
define("cvt.rn.T.f32", "f16x2 bf16x2", "T = f32 f32",
       lambda high, low: np.stack(np.broadcast_arrays(low, high), -1))  # fmt: skip
define("cvt.rzi.T.f32", "s32", "T = f32", to_integer(32), through="f64")
define("cvt.rzi.T.f32", "s64", "T = f32", to_integer(64), through="f80")  # has 2**63 - 1

for mode in ("up", "bfly", "idx"):
    define(f"shfl.sync.{mode}.T", "b32", "T = T u32 u32 u32", shuffled(mode), warps=True)
for name, function in (("add", np.add), ("min", np.minimum), ("max", np.maximum)):
    define(f"redux.sync.{name}.T", "s32 u32", "T = T u32", reduced(function), warps=True)
define("redux.sync.or.T", "b32", "T = T u32", reduced(np.bitwise_or), warps=True)
define("redux.sync.min.T", "f32", "T = T u32", reduced(np.fmin), warps=True)  # Blackwell
define("redux.sync.max.T", "f32", "T = T u32", reduced(np.fmax), warps=True)
define("vote.sync.ballot.T", "b32", "T = pred u32", ballot, warps=True)
