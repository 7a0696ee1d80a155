"""What an instruction computes, one thread at a time: NumPy functions of whole arrays.

``operation`` finds the opcode in a table of exact forms. Types are PTX's, and "bf16" arrives as
the float32 of the same value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .parser import Fault

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


def bits_of(type_: str) -> int:
    return {"bf16x2": 32, "f16x2": 32, "f32x2": 64, "pred": 1}.get(type_) or int(
        re.fullmatch(r"(?:[busf]|bf)(\d+)", type_)[1]
    )


def numpy_type(type_: str):
    """How a value of the type is seen by the functions here."""
    if type_ == "pred":
        return np.bool_
    kinds = {"s": SIGNED, "f": FLOAT}
    raw = type_.startswith("b") or type_.endswith("x2")
    return (UNSIGNED if raw else kinds.get(type_[0], UNSIGNED))[bits_of(type_)]


class Operation(NamedTuple):
    """``result = function(*sources)``, elementwise."""

    result: str  # type
    sources: tuple[str, ...]  # types
    function: Callable
    ulp: float = 0.0  # documented error of an approximate instruction
    absolute: float = 0.0  # smallest size that the error is relative to


FORMS: list[tuple[re.Pattern, Callable]] = []


def form(pattern: str):
    """Register a maker of operations for opcodes that match the whole pattern."""

    def register(make):
        FORMS.append((re.compile(pattern), make))
        return make

    return register


def operation(opcode: str, n_operands: int) -> Operation | None:
    """The operation, or None where the opcode is none of arithmetic."""
    for pattern, make in FORMS:
        if (m := pattern.fullmatch(opcode)) and (found := make(n_operands - 1, *m.groups())):
            if len(found.sources) != n_operands - 1:
                raise Fault(f"{opcode} with {n_operands} operands is not known")
            return found
    return None


# ------------------------------------------------------------------------------- number formats


def from_bf16(halves):
    return (np.asarray(halves).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x):
    """The nearest, ties to even; every NaN becomes the same."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    nearest = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), nearest)


def halves_of(x, type_: str):
    """Low and high value of a packed pair."""
    x = np.asarray(x)
    if type_ == "f32x2":
        pair = [(x >> np.uint64(32 * i)).astype(np.uint32) for i in (0, 1)]
        return [p.view(np.float32) for p in pair]
    pair = [(x >> np.uint32(16 * i)).astype(np.uint16) for i in (0, 1)]
    if type_ == "s16x2":
        return [p.view(np.int16) for p in pair]
    return [from_bf16(p) if type_ == "bf16x2" else p.view(np.float16) for p in pair]


def packed(low, high, type_: str):
    if type_ == "f32x2":
        low, high = (
            np.asarray(v, np.float32).view(np.uint32).astype(np.uint64) for v in (low, high)
        )
        return low | high << np.uint64(32)
    if type_ == "bf16x2":
        low, high = to_bf16(low), to_bf16(high)
    else:
        as_ = np.int16 if type_ == "s16x2" else np.float16
        low, high = (np.asarray(v).astype(as_).view(np.uint16) for v in (low, high))
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def flush(x):
    """Subnormals count as 0 of the same sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def to_integer(x, type_: str, rounding: str):
    """Rounded and saturated; NaN becomes 0, or the smallest of 64 bits."""
    integer = numpy_type(type_)
    info = np.iinfo(integer)
    x = {"z": np.trunc, "n": np.rint, "m": np.floor, "p": np.ceil}[rounding](
        np.asarray(x, np.float64)
    )
    # as float64 the largest of 64 bits is one too many
    high, low = x >= float(info.max), x <= float(info.min)
    inside = np.where(high | low | np.isnan(x), 0, x).astype(integer)
    nan = info.min if info.bits == 64 else 0
    saturated = np.where(high, integer(info.max), np.where(low, integer(info.min), inside))
    return np.where(np.isnan(x), integer(nan), saturated).astype(integer)


# ----------------------------------------------------------------------------------- functions


def fused(a, b, c, sign_ab=1, sign_c=1):
    """a * b + c with one rounding, for float32 as good as always: through float64."""
    wide = np.longdouble if np.result_type(c) == np.float64 else np.float64
    product = np.asarray(a).astype(wide) * np.asarray(b).astype(wide)
    return (sign_ab * product + sign_c * np.asarray(c).astype(wide)).astype(np.result_type(c))


def truncated_quotient(a, b):
    safe = np.where(b == 0, 1, b).astype(np.result_type(b))
    q = a // safe
    return q + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(np.result_type(q))


def truncated_remainder(a, b):
    return a - truncated_quotient(a, b) * b


BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "div": truncated_quotient,
    "rem": truncated_remainder,
}
NUMBER = {"min": np.fmin, "max": np.fmax}  # of a NaN and a number, the number
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
    "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
LOGICAL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
INT = r"[us](?:16|32|64)"
BITS = r"b(?:16|32|64)"


def flushing(function, ftz):
    return (lambda *a: flush(function(*map(flush, a)))) if ftz else function


@form(rf"(add|sub|min|max|div|rem)\.({INT})")
@form(rf"(and|or|xor)\.({BITS})")
@form(rf"(mul)\.lo\.({INT})")
def integer_binary(n, name, type_):
    return Operation(type_, (type_, type_), BINARY[name])


@form(r"(min|max)\.relu\.s32")
def clamped(n, name):
    clamp = lambda a, b: np.maximum(BINARY[name](a, b), np.int32(0))  # noqa: E731
    return Operation("s32", ("s32", "s32"), clamp)


@form(r"(and|or|xor|not)\.pred")
def predicates(n, name):
    if name == "not":
        return Operation("pred", ("pred",), np.logical_not)
    return Operation("pred", ("pred", "pred"), LOGICAL[name])


@form(r"(add|sub|min|max)\.(s16x2)")
def integer_pairs(n, name, type_):
    def both(a, b):
        pairs = zip(halves_of(a, type_), halves_of(b, type_), strict=True)
        return packed(*(BINARY[name](x, y) for x, y in pairs), type_)

    return Operation("b32", ("b32", "b32"), both)


@form(r"(add|sub|mul)(?:\.rn)?(\.ftz)?\.(f32|f64)")
def float_binary(n, name, ftz, type_):
    return Operation(type_, (type_, type_), flushing(BINARY[name], ftz))


@form(r"(min|max)(\.ftz)?(\.NaN)?\.(f32|f64)")
def float_extreme(n, name, ftz, nan, type_):
    function = flushing((BINARY if nan else NUMBER)[name], ftz)
    if n == 3 and type_ == "f32":  # Blackwell
        return Operation(type_, (type_,) * 3, lambda a, b, c: function(function(a, b), c))
    return Operation(type_, (type_, type_), function)


@form(r"fma\.rn(\.ftz)?\.(f32|f64)")
def fma(n, ftz, type_):
    return Operation(type_, (type_,) * 3, flushing(fused, ftz))


@form(r"contracted\.(add|sub)\.([01])")
def contracted(n, name, place):
    """What ``contract`` makes of add or sub: x * y in place 0 or 1, and the other operand last."""
    minus = -1 if name == "sub" else 1
    signs = (1, minus) if place == "0" else (minus, 1)
    return Operation("f32", ("f32",) * 3, lambda x, y, c: fused(x, y, c, *signs))


@form(r"(add|sub|mul|fma)(?:\.rn)?\.(f32x2)")
@form(r"(add|sub|mul|fma)\.rn\.(bf16x2|f16x2|bf16|f16)")
def float_pairs(n, name, type_):
    count = 3 if name == "fma" else 2
    function = {**BINARY, "fma": fused}[name]
    if not type_.endswith("x2"):
        wide = lambda *a: function(*(np.asarray(v, np.float64) for v in a))  # noqa: E731
        return Operation(type_, (type_,) * count, wide)

    def both(*values):
        pairs = zip(*(halves_of(v, type_) for v in values), strict=True)
        if type_ != "f32x2":
            pairs = [[np.asarray(v, np.float64) for v in pair] for pair in pairs]
        return packed(*(function(*pair) for pair in pairs), type_)

    return Operation(type_, (type_,) * count, both)


@form(r"(add|sub|fma)\.rn\.f32\.(bf16|f16)")
@form(r"(add|sub|fma)\.f32\.(bf16|f16)")
def mixed(n, name, type_):
    """Blackwell: float32 and narrower numbers."""
    if name == "fma":
        return Operation("f32", (type_, type_, "f32"), fused)
    function = BINARY[name]
    return Operation("f32", (type_, "f32"), lambda a, b: function(np.asarray(a, np.float32), b))


@form(r"(abs|neg)(\.ftz)?\.(f32|f64|bf16)")
def sign(n, name, ftz, type_):
    return Operation(type_, (type_,), flushing({"abs": np.abs, "neg": np.negative}[name], ftz))


@form(r"(neg|abs|not)\.(s16|s32|s64|b16|b32|b64)")
def integer_unary(n, name, type_):
    if (name == "not") != (type_[0] == "b"):
        return None
    return Operation(type_, (type_,), {"neg": np.negative, "abs": np.abs, "not": np.invert}[name])


APPROXIMATE = {
    "div.full": (np.divide, 2, 2),
    "div.approx": (np.divide, 2, 2),
    "ex2.approx": (np.exp2, 1, 2),
    "lg2.approx": (np.log2, 1, 2),
    "rcp.approx": (np.reciprocal, 1, 1),
    "sqrt.approx": (np.sqrt, 1, 1),
    "rsqrt.approx": (lambda x: 1 / np.sqrt(x), 1, 2),
}


@form(r"(div\.full|(?:ex2|lg2|rcp|sqrt|rsqrt)\.approx)(\.ftz)?\.f32")
def approximate(n, name, ftz):
    function, count, ulp = APPROXIMATE[name]

    def nearest(*values):
        return function(*(np.asarray(v, np.float64) for v in values)).astype(np.float32)

    # log2 has an absolute error where it is below 1
    absolute = 1.0 if name.startswith("lg2") else 0.0
    return Operation("f32", ("f32",) * count, flushing(nearest, ftz), ulp, absolute)


@form(r"(div|rcp|sqrt)\.rn(\.ftz)?\.(f32|f64)")
def rounded(n, name, ftz, type_):
    function = {"div": np.divide, "rcp": np.reciprocal, "sqrt": np.sqrt}[name]
    return Operation(type_, (type_,) * (2 if name == "div" else 1), flushing(function, ftz))


@form(rf"setp\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)(\.and|\.or|\.xor)?\.({INT}|{BITS})")
@form(
    r"setp\.(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)(\.and|\.or|\.xor)?\.(f32|f64|bf16|f16)"
)
def setp(n, name, combine, type_):
    def test(a, b):
        unordered = np.isnan(a) | np.isnan(b) if "f" in type_ else None
        if name in ("nan", "num"):
            return unordered ^ (name == "num")
        if unordered is not None and name.endswith("u"):
            return COMPARE[name[:-1]](a, b) | unordered
        result = COMPARE[name](a, b)
        return result & ~unordered if unordered is not None else result

    if combine:
        both = lambda a, b, p: LOGICAL[combine[1:]](test(a, b), p)  # noqa: E731
        return Operation("pred", (type_, type_, "pred"), both)
    return Operation("pred", (type_, type_), test)


@form(r"selp\.([busf](?:16|32|64))")
def selp(n, type_):
    type_ = f"b{bits_of(type_)}"
    return Operation(type_, (type_, type_, "pred"), lambda a, b, p: np.where(p, a, b))


@form(r"mov\.([busf](?:16|32|64)|pred)")
def mov(n, type_):
    return Operation(type_, (type_,), lambda a: a)


@form(rf"(shl|shr)\.({BITS}|{INT})")
def shift(n, name, type_):
    bits, last = bits_of(type_), bits_of(type_) - 1

    def function(x, by):
        beyond, by = by >= bits, np.minimum(by, np.uint32(last)).astype(np.result_type(x))
        if name == "shr" and type_[0] == "s":
            return x >> by
        moved = x << by if name == "shl" else x >> by
        return np.where(beyond, np.zeros((), np.result_type(x)), moved)

    return Operation(type_, (type_, "u32"), function)


@form(r"(mul|mad)\.wide\.([us])(16|32)")
def wide(n, name, sign_, bits):
    narrow, result = f"{sign_}{bits}", f"{sign_}{2 * int(bits)}"
    as_ = numpy_type(result)
    product = lambda a, b: a.astype(as_) * b.astype(as_)  # noqa: E731
    if name == "mul":
        return Operation(result, (narrow, narrow), product)
    return Operation(result, (narrow, narrow, result), lambda a, b, c: product(a, b) + c)


@form(rf"mad\.lo\.({INT})")
def mad(n, type_):
    return Operation(type_, (type_,) * 3, lambda a, b, c: a * b + c)


@form(r"mul\.hi\.([us])(32|64)")
def high_product(n, sign_, bits):
    type_, b = f"{sign_}{bits}", int(bits)

    def function(x, y):
        if b == 32:
            as_ = numpy_type(f"{sign_}64")
            return ((x.astype(as_) * y.astype(as_)) >> as_(32)).astype(numpy_type(type_))
        x, y = np.broadcast_arrays(x, y)
        exact = (x.astype(object) * y.astype(object)) >> 64
        return np.asarray(exact & ((1 << 64) - 1)).astype(np.uint64).view(numpy_type(type_))

    return Operation(type_, (type_, type_), function)


@form(r"(popc|clz)\.b(32|64)")
def counts(n, name, bits):
    unsigned = UNSIGNED[int(bits)]

    def clz(x):
        for k in range(int(bits).bit_length() - 1):
            x = x | x >> unsigned(1 << k)
        return np.bitwise_count(~x)

    function = np.bitwise_count if name == "popc" else clz
    return Operation("u32", (f"b{bits}",), lambda x: function(x).astype(np.uint32))


@form(r"bfe\.([us])(32|64)")
def bit_field(n, sign_, bits):
    type_, width, raw = f"{sign_}{bits}", int(bits), UNSIGNED[int(bits)]

    def function(x, start, length):
        start, length = (np.minimum(k & np.uint32(255), np.uint32(width)) for k in (start, length))
        length = np.minimum(length, np.uint32(width) - start)
        # to the top, and down again: zeros or copies of the sign come after it
        up, down = (np.minimum(width - k, width - 1).astype(raw) for k in (start + length, length))
        moved = (x.view(raw) << up).view(numpy_type(type_)) >> down.view(numpy_type(type_))
        return np.where(length == 0, 0, moved).astype(numpy_type(type_))

    return Operation(type_, (type_, "u32", "u32"), function)


@form(r"prmt\.b32")
def permute(n):
    def function(a, b, selector):
        pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.uint32(0)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (pool >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))).astype(
                np.uint32
            )
            byte = byte & np.uint32(255)
            sign_ = np.where(byte >> np.uint32(7), np.uint32(255), np.uint32(0))
            result = result | np.where(nibble >> np.uint32(3), sign_, byte) << np.uint32(8 * i)
        return result

    return Operation("b32", ("b32", "b32", "b32"), function)


@form(r"lop3\.b32")
def any_logic(n):
    def function(a, b, c, table):
        result = np.uint32(0)
        for i in range(8):
            on = np.where(
                (table >> np.uint32(i)) & np.uint32(1), np.uint32(2**32 - 1), np.uint32(0)
            )
            result = result | on & (a if i & 4 else ~a) & (b if i & 2 else ~b) & (
                c if i & 1 else ~c
            )
        return result

    return Operation("b32", ("b32",) * 4, function)


NUMBERS = r"[us](?:8|16|32|64)|f16|f32|f64"


@form(rf"cvt(?:\.rn)?\.(f16|f32|f64)\.({NUMBERS}|bf16)")
@form(r"cvt\.rn\.(bf16)\.(f32)")
def to_float(n, result, source):
    as_ = np.float32 if result == "bf16" else numpy_type(result)  # rounded where it is stored
    return Operation(result, (source,), lambda x: x.astype(as_))


@form(r"cvt\.([us](?:8|16|32|64))\.([us](?:8|16|32|64))")
def between_integers(n, result, source):
    return Operation(result, (source,), lambda x: x.astype(numpy_type(result)))


@form(r"cvt\.r([znmp])i(\.ftz)?\.([us](?:8|16|32|64))\.(f16|f32|f64)")
def float_to_integer(n, rounding, ftz, result, source):
    return Operation(result, (source,), lambda x: to_integer(x, result, rounding))


@form(r"cvt\.r([znmp])i\.(f32|f64)\.(f32|f64)")
def to_whole(n, rounding, result, source):
    if result != source:
        return None
    function = {"z": np.trunc, "n": np.rint, "m": np.floor, "p": np.ceil}[rounding]
    return Operation(result, (source,), function)


@form(r"cvt\.rn\.(bf16x2|f16x2)\.f32")
def packing(n, result):
    return Operation(result, ("f32", "f32"), lambda high, low: packed(low, high, result))
