"""Threads, registers and control flow: every instruction becomes a closure over all threads.

Threads that diverge run apart, those furthest behind first, until they meet again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from .arithmetic import (
    BINARY,
    COMPARE,
    NUMBER,
    SIGNED,
    UNSIGNED,
    Operation,
    bits_of,
    from_bf16,
    halves_of,
    numpy_type,
    operation,
    to_bf16,
)
from .memory import Global, Shared
from .parser import Fault, Instruction, Kernel, parse

WARP = 32
GARBAGE = 0xDEADBEEFDEADBEEF  # what a register holds before anything is written to it
THREADS_AT_ONCE = 4096
VISITS = 2_000_000  # of a block, by warps: what goes on for longer has no end
ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
ATOMICS = BINARY | {"exch": lambda old, new: new}
SPACES = {"global": 64, "shared": 32}  # bits of an address
CACHING = r"(?:\.L1::evict_(?:last|first|normal))?"


def raw_type(type_: str):
    return np.bool_ if type_ == "pred" else UNSIGNED[bits_of(type_)]


def names_in(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def contracted(kernel: Kernel) -> None:
    """Fuse products with the sums that take them, as ptxas may: within a block, in place."""
    for block in kernel.blocks:
        products: dict[str, tuple[str, str]] = {}
        for i, step in enumerate(block):
            parts, operands = step.opcode.split("."), step.operands
            if step.opcode in ("add.f32", "sub.f32") and not step.guard:
                place = next((k for k in (1, 2) if operands[k] in products), None)
                if place:
                    factors = products[operands[place]]
                    block[i] = Instruction(
                        f"contracted.{parts[0]}.{place - 1}",
                        (operands[0], *factors, operands[3 - place]),
                    )
            written = names_in(operands[0]) if operands else []
            for name in written:
                products.pop(name, None)
                stale = [p for p, factors in products.items() if name in factors]
                for p in stale:
                    del products[p]
            if step.opcode == "mul.f32" and not step.guard and operands[0] not in operands[1:]:
                products[operands[0]] = operands[1], operands[2]


CLASSES = {
    "float": r"(?!setp|selp|mov|ld|st|cvt|atom|red).*\.(f32|f16|bf16|f32x2|f16x2|bf16x2)|setp.*f.*",
    "float64": r"(?!selp|mov|ld|st).*\.f64.*",
    "special": r"(ex2|lg2|rcp|sqrt|rsqrt|div\.full|div\.approx)\..*",
    "warp": r"(shfl|vote|redux)\..*",
    "global": r"(ld|st)\.global.*",
    "atomic": r"(atom|red)\..*",
    "shared": r"(ld|st)\.shared.*|(ld|st)matrix.*",
    "barrier": r"bar\..*",
    "control": r"(bra|ret).*",
    "move": r"(mov|selp|cvt|ld\.param).*",
}
ORDER = ("special", "float64", "move", "warp", "global", "atomic", "shared", "barrier", "control",
         "float")  # fmt: skip


def class_of(opcode: str) -> str:
    return next((c for c in ORDER if re.fullmatch(CLASSES[c], opcode)), "integer")


class Code:
    """A kernel, ready to run."""

    def __init__(self, ptx: str, *, noise: float = 0.0, contract: bool = False):
        self.kernel, self.noise = parse(ptx), noise
        if contract:
            contracted(self.kernel)
        self.written = {
            name
            for i in self.kernel.instructions
            if i.operands and not i.opcode.startswith(("st", "red.", "bra", "bar"))
            for name in re.findall(r"%\w+", i.operands[0])
        }
        self.blocks = [[(self.built(i), i) for i in block] for block in self.kernel.blocks]
        self.classes = [Counter(class_of(i.opcode) for i in b) for b in self.kernel.blocks]

    # ---------------------------------------------------------------------------------- operands

    def source(self, operand: str, type_: str, cut: bool = False) -> Callable:
        """How to read an operand; ``cut``: the register may be wider than the type."""
        if type_ == "bf16":
            raw = self.source(operand, "b16", cut)
            return lambda m: from_bf16(raw(m))
        as_, raw = numpy_type(type_), raw_type(type_)
        if operand.startswith("!"):
            inner = self.source(operand[1:], type_)
            return lambda m: ~inner(m)
        if declared := self.kernel.registers.get(operand):
            if operand not in self.written:  # LLVM's undef
                value = np.bool_(True) if as_ is np.bool_ else constant(GARBAGE, as_)
                return lambda m: value
            if declared == type_ == "pred":
                return lambda m: m.registers[operand]
            if declared == "pred" or bits_of(declared) < bits_of(type_):
                raise Fault(f"{operand}, a {declared}, read as {type_}")
            if bits_of(declared) == bits_of(type_):
                return lambda m: m.registers[operand].view(as_)
            if not cut:
                raise Fault(f"{operand}, a {declared}, read as {type_}")
            return lambda m: m.registers[operand].astype(raw).view(as_)
        if operand.startswith("%"):
            if operand not in Machine.SPECIAL or bits_of(type_) != 32:
                raise Fault(f"{operand} of {type_} is not known")
            return lambda m: m.special[operand].view(as_)
        if m := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", operand):
            width = 32 if m[1] == "f" else 64
            if bits_of(type_) != width:
                raise Fault(f"literal {operand} read as {type_}")
            value = UNSIGNED[width](int(m[2], 16)).view(as_)
        elif re.fullmatch(r"-?(?:0x[0-9A-Fa-f]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            if type_[0] == "f" and not type_.endswith("x2"):
                raise Fault(f"literal {operand} read as {type_}")
            value = np.bool_(number) if as_ is np.bool_ else constant(number, as_)
        elif operand == "global_smem":
            value = as_(0)
        else:
            raise Fault(f"operand {operand} is not known")
        return lambda m: value

    def target(self, operand: str, type_: str, extend: bool = False) -> Callable:
        """How to write a register; ``extend``: it may be wider than the type."""
        if operand == "_":
            return lambda m, value, on: None
        declared = self.kernel.registers[operand]
        if declared != "pred" and bits_of(declared) > bits_of(type_) and extend:
            table = SIGNED if type_[0] == "s" else UNSIGNED
            wide, narrow = table[bits_of(declared)], table[bits_of(type_)]
            raw = raw_type(declared)
            return lambda m, value, on: m.write(
                operand, np.asarray(value).view(narrow).astype(wide).view(raw), on
            )
        if bits_of(declared) != bits_of(type_):
            raise Fault(f"{operand}, a {declared}, written as {type_}")
        raw, expected = raw_type(declared), numpy_type(type_)
        if type_ == "bf16":
            return lambda m, value, on: m.write(operand, to_bf16(value), on)

        def put(m, value, on):
            value = np.asarray(value)
            if value.dtype != expected:
                raise Fault(f"{operand} gets {value.dtype}, not {type_}")
            m.write(operand, value.view(raw), on)

        return put

    def address(self, operand: str, space: str) -> Callable:
        m = ADDRESS.fullmatch(operand)
        if m is None:
            raise Fault(f"address {operand} is not known")
        base = self.source(m[1], f"u{SPACES[space]}")
        offset = constant(int(m[2] or "0", 0), UNSIGNED[SPACES[space]])
        return lambda machine: base(machine) + offset

    # ------------------------------------------------------------------------------ instructions

    def built(self, i: Instruction):
        """``run(machine, on)``; for control flow its kind, guard and target."""
        guard = None
        if i.guard:
            guard = self.source(("!" if i.negated else "") + i.guard, "pred")
        if i.opcode in ("bra", "bra.uni"):
            return "bra", guard, self.kernel.labels[i.operands[0]]
        if i.opcode == "ret":
            return "ret", guard, len(self.kernel.blocks)
        if i.opcode == "bar.sync" and i.operands == ("0",) and not guard:
            return "bar", None, None
        run = self.plain(i)
        if guard is None:
            return run

        def guarded(m, on):
            passing = np.broadcast_to(guard(m) if on is None else on & guard(m), m.n)
            if passing.all():
                run(m, None)
            elif passing.any():
                run(m, passing)

        return guarded

    def plain(self, i: Instruction) -> Callable:
        for pattern, method, count in INSTRUCTIONS:
            if m := pattern.fullmatch(i.opcode):
                if len(i.operands) != count:
                    raise Fault(f"{i.opcode} with {len(i.operands)} operands is not known")
                if (run := method(self, i, *m.groups())) is not None:
                    return run
        found = operation(i.opcode, len(i.operands))
        if found is None:
            raise Fault(f"{i.opcode} is not known")
        narrow = i.opcode.startswith("cvt")
        sources = [
            self.source(o, t, narrow) for o, t in zip(i.operands[1:], found.sources, strict=True)
        ]
        put = self.target(i.operands[0], found.result, narrow)
        function = self.noisy(found) if found.ulp and self.noise else found.function
        if len(sources) == 1:
            (one,) = sources
            return lambda m, on: put(m, function(one(m)), on)
        if len(sources) == 2:
            one, two = sources
            return lambda m, on: put(m, function(one(m), two(m)), on)
        return lambda m, on: put(m, function(*[s(m) for s in sources]), on)

    def noisy(self, found: Operation) -> Callable:
        """Off by up to the documented error; the same for equal results."""

        def function(*values):
            x = found.function(*values)
            hashed = np.asarray(x).view(np.uint32).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            share = (hashed >> np.uint64(40)) / 2.0**23 - 1
            size = np.maximum(np.abs(x), np.float32(found.absolute))
            size = np.where(np.isfinite(x), size, 0)  # infinity is exact
            return (x + share * self.noise * found.ulp * 2.0**-23 * size).astype(np.float32)

        return function

    def moved_parts(self, i: Instruction, bits: str):
        """``mov`` that packs or unpacks a vector."""
        vectors = [o.startswith("{") for o in i.operands]
        if not any(vectors):
            return None
        parts = names_in(i.operands[0] if vectors[0] else i.operands[1])
        each = int(bits) // len(parts)
        whole, part = UNSIGNED[int(bits)], UNSIGNED[each]
        if vectors[0]:
            read = self.source(i.operands[1], f"b{bits}")
            puts = [self.target(p, f"b{each}") for p in parts]

            def unpack(m, on):
                value = read(m)
                for k, put in enumerate(puts):
                    put(m, (value >> whole(k * each)).astype(part), on)

            return unpack
        reads = [self.source(p, f"b{each}") for p in parts]
        put = self.target(i.operands[0], f"b{bits}")

        def pack(m, on):
            value = whole(0)
            for k, read in enumerate(reads):
                value = value | read(m).astype(whole) << whole(k * each)
            put(m, value, on)

        return pack

    def compared_pairs(self, i: Instruction, name: str, type_: str):
        puts = [self.target(t.strip(), "pred") for t in i.operands[0].split("|")]
        a, b = (self.source(o, "b32") for o in i.operands[1:])
        test, ordered = COMPARE[name[:2]], not name.endswith("u")

        def run(m, on):
            pairs = zip(puts, halves_of(a(m), type_), halves_of(b(m), type_), strict=True)
            for put, x, y in pairs:
                nan = np.isnan(x) | np.isnan(y)
                put(m, (test(x, y) & ~nan) if ordered else (test(x, y) | nan), on)

        return run

    def load_param(self, i: Instruction, vector: str | None, type_: str):
        m = re.fullmatch(r"\[(\w+?)(?:\+(\d+))?\]", i.operands[1])
        size = bits_of(type_) // 8
        puts = [self.target(r, type_, extend=True) for r in names_in(i.operands[0])]

        def run(machine, on):
            raw = machine.params[m[1]]
            for k, put in enumerate(puts):
                start = int(m[2] or 0) + k * size
                put(machine, np.frombuffer(raw[start : start + size], numpy_type(type_))[0], on)

        return run

    def load(self, i: Instruction, space: str, vector: str | None, type_: str):
        registers = names_in(i.operands[0])
        if len(registers) != int(vector or 1):
            raise Fault(f"{i}: {len(registers)} registers")
        puts = [self.target(r, type_, extend=True) for r in registers]
        address, size = self.address(i.operands[1], space), bits_of(type_) // 8 * len(registers)

        def run(m, on):
            data = m.memory(space, "load", address(m), on, i, size)
            values = data.view(numpy_type(type_))
            for k, put in enumerate(puts):
                put(m, values[:, k], on)

        return run

    def store(self, i: Instruction, space: str, vector: str | None, type_: str):
        values = names_in(i.operands[1])
        if len(values) != int(vector or 1):
            raise Fault(f"{i}: {len(values)} values")
        raw = f"b{bits_of(type_)}"
        reads = [self.source(v, raw, cut=True) for v in values]
        address = self.address(i.operands[0], space)

        def run(m, on):
            data = np.stack([np.broadcast_to(read(m), m.n) for read in reads], 1)
            m.memory(space, "store", address(m), on, i, data.view(np.uint8))

        return run

    def atomic(self, i: Instruction, which: str, space: str, name: str, type_: str):
        operands = i.operands if which == "atom" else ("_", *i.operands)
        put = self.target(operands[0], type_)
        address, read = self.address(operands[1], space), self.source(operands[2], type_)
        function = ATOMICS[name]

        def run(m, on):
            value = np.ascontiguousarray(np.broadcast_to(read(m), m.n))
            put(m, m.memory(space, "atomic", address(m), on, i, value, function), on)

        return run

    def red(self, i: Instruction, *groups):
        return self.atomic(i, "red", *groups)

    def atom(self, i: Instruction, *groups):
        return self.atomic(i, "atom", *groups)

    # -------------------------------------------------------------------------------- whole warps

    def lanes(self, i: Instruction, type_: str = "b32") -> Callable:
        """Values as [warps, lanes], of warps that take part as one; their mask comes last."""
        read = self.source(i.operands[1], type_)
        mask = self.source(i.operands[-1], "u32")

        def run(m, on):
            m.together(on, i)
            whole = mask(m) == 2**32 - 1
            if not (whole if on is None else whole | ~on).all():
                raise Fault(f"{self.kernel.name}: {i}: only whole warps are known")
            return np.broadcast_to(read(m), m.n).reshape(-1, WARP)

        return run

    def meet(self, i: Instruction):
        """A barrier of one warp, within which conflicts are not looked for."""
        self.source(i.operands[0], "u32")
        return lambda m, on: m.together(on, i)

    def shuffle(self, i: Instruction, mode: str):
        put, values = self.target(i.operands[0], "b32"), self.lanes(i)
        by, clamp = (self.source(o, "u32") for o in i.operands[2:4])
        lane = np.arange(WARP)

        def run(m, on):
            v = values(m, on)
            b, c = (
                np.broadcast_to(o(m), m.n).reshape(-1, WARP).astype(np.int64) for o in (by, clamp)
            )
            b, segment, c = b & 31, c >> 8 & 31, c & 31
            low, high = lane & segment, (lane & segment) | (c & ~segment & 31)
            source = {
                "up": lane - b,
                "down": lane + b,
                "bfly": lane ^ b,
                "idx": low | (b & ~segment & 31),
            }[mode]
            reached = source >= high if mode == "up" else source <= high
            source = np.where(reached, source, lane) & 31
            put(m, np.take_along_axis(v, source, 1).reshape(-1), on)

        return run

    def reduce_warp(self, i: Instruction, name: str, type_: str):
        put, values = self.target(i.operands[0], type_), self.lanes(i, type_)
        function = (NUMBER if type_ == "f32" else BINARY)[name]

        def run(m, on):
            v = values(m, on)
            put(m, np.repeat(function.reduce(v, 1, dtype=v.dtype), WARP), on)

        return run

    def ballot(self, i: Instruction):
        put, values = self.target(i.operands[0], "b32"), self.lanes(i, "pred")
        bit = np.uint32(1) << np.arange(WARP, dtype=np.uint32)

        def run(m, on):
            put(m, np.repeat((values(m, on) * bit).sum(1, dtype=np.uint32), WARP), on)

        return run

    def load_matrix(self, i: Instruction, count: str, transposed: str | None):
        puts = [self.target(r, "b32") for r in names_in(i.operands[0])]
        address, lane = self.address(i.operands[1], "shared"), np.arange(WARP)

        def run(m, on):
            m.together(on, i)
            giving = np.tile(lane < 8 * int(count), m.n // WARP)
            giving = giving if on is None else giving & on
            rows = m.memory("shared", "load", address(m), giving, i, 16)
            rows = rows.view(np.uint16).reshape(-1, WARP, 8)
            for k, put in enumerate(puts):
                matrix = rows[:, 8 * k : 8 * k + 8]
                if transposed:
                    matrix = matrix.transpose(0, 2, 1)
                pair = matrix[:, lane // 4].reshape(-1, WARP, 4, 2)[:, lane, lane % 4]
                put(m, np.ascontiguousarray(pair).view(np.uint32).reshape(-1), on)

        return run

    def store_matrix(self, i: Instruction, count: str):
        reads = [self.source(r, "b32") for r in names_in(i.operands[1])]
        address, lane = self.address(i.operands[0], "shared"), np.arange(WARP)

        def run(m, on):
            m.together(on, i)
            giving = np.tile(lane < 8 * int(count), m.n // WARP)
            giving = giving if on is None else giving & on
            rows = np.zeros((m.n // WARP, WARP, 4), np.uint32)
            for k, read in enumerate(reads):
                rows[:, 8 * k : 8 * k + 8] = np.broadcast_to(read(m), m.n).reshape(-1, 8, 4)
            m.memory("shared", "store", address(m), giving, i, rows.reshape(-1, 4).view(np.uint8))

        return run


def constant(value: int, as_):
    bits = np.dtype(as_).itemsize * 8
    return UNSIGNED[bits](value & (1 << bits) - 1).view(as_)


SHARED = r"(?:::cta)?"  # as Triton 3.9 spells it
ORDERING = r"(?:\.(?:relaxed|acquire|release|acq_rel))?(?:\.(?:cta|gpu|sys))?"
ATOM = rf"{ORDERING}\.(global|shared){SHARED}(?:\.(?:gpu|cta))?{ORDERING}" \
       r"\.(add|min|max|and|or|exch)\.([busf](?:32|64))"  # fmt: skip
MATRIX, BITS_16 = r"{}matrix\.sync\.aligned\.m8n8\.x([124])", SHARED + r"\.b16"
VECTOR = r"(?:\.v([248]))?\.([busf](?:8|16|32|64))"
INSTRUCTIONS: list[tuple[re.Pattern, Callable, int]] = [
    (re.compile(pattern), method, count)
    for pattern, method, count in (
        (r"mov\.b(32|64)", Code.moved_parts, 2),
        (r"setp\.(eq|ne|lt|le|gt|ge|neu)\.(bf16x2|f16x2)", Code.compared_pairs, 3),
        (r"ld\.param" + VECTOR, Code.load_param, 2),
        (rf"ld\.(global){CACHING}" + VECTOR, Code.load, 2),
        (rf"st\.(global){CACHING}" + VECTOR, Code.store, 2),
        (rf"ld\.(shared){SHARED}" + VECTOR, Code.load, 2),
        (rf"st\.(shared){SHARED}" + VECTOR, Code.store, 2),
        ("atom" + ATOM, Code.atom, 3),
        ("red" + ATOM, Code.red, 2),
        (r"bar\.warp\.sync", Code.meet, 1),
        (r"shfl\.sync\.(up|down|bfly|idx)\.b32", Code.shuffle, 5),
        (r"redux\.sync\.(add|min|max|and|or|xor)\.(s32|u32|b32)", Code.reduce_warp, 3),
        (r"redux\.sync\.(min|max)\.(f32)", Code.reduce_warp, 3),
        (r"vote\.sync\.ballot\.b32", Code.ballot, 3),
        (MATRIX.format("ld") + r"(\.trans)?\.shared" + BITS_16, Code.load_matrix, 2),
        (MATRIX.format("st") + r"\.shared" + BITS_16, Code.store_matrix, 2),
    )
]  # fmt: skip


class Machine:
    """Some programs of a launch."""

    SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%ntid.x")

    def __init__(self, code: Code, grid, programs, params, memory: Global, shared: int, rng):
        self.code, self.params, self.rng = code, params, rng
        threads = code.kernel.threads
        self.n, self.per_program = len(programs) * threads, threads
        self.registers: dict[str, np.ndarray] = {}
        self.programs = np.repeat(np.array(programs, np.int32), threads)
        self.slots = np.repeat(np.arange(len(programs)), threads)
        self.warps = (np.arange(self.n) // WARP).astype(np.int32)
        x, y = np.uint32(grid[0]), np.uint32(grid[1])
        p = self.programs.view(np.uint32)
        if len(programs) == 1:
            p = p[0]
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(programs))
        self.special = {
            "%tid.x": thread, "%ntid.x": np.uint32(threads), "%nctaid.x": x, "%nctaid.y": y,
            "%ctaid.x": p % x, "%ctaid.y": p // x % y, "%ctaid.z": p // (x * y),
        }  # fmt: skip
        self.spaces = {
            "global": (memory, self.programs),
            "shared": (Shared(code.kernel.name, shared, len(programs), rng), self.slots),
        }
        self.visits = np.zeros(len(code.blocks), np.int64)  # of each block, by warps

    def write(self, name: str, value, on) -> None:
        if on is not None:
            old = self.registers.get(name)
            if old is None:
                old = np.bool_(True) if value.dtype == bool else constant(GARBAGE, value.dtype.type)
            value = np.where(on, value, old)
        self.registers[name] = value

    def memory(self, space: str, kind: str, address, on, where, what, function=None):
        """The threads that are ``on`` access memory; others get zeros."""
        memory, agents = self.spaces[space]
        which = slice(None) if on is None else np.nonzero(on)[0]
        address = np.broadcast_to(address, self.n)[which]
        who = address, agents[which], self.warps[which]
        if kind == "store":
            return memory.store(*who, what[which], where)
        if kind == "load":
            found = memory.load(*who, what, where)
        else:
            found = memory.atomic(*who, what[which], function, where)
        if on is None:
            return found
        out = np.zeros((self.n, *found.shape[1:]), found.dtype)
        out[which] = found
        return out

    def together(self, on, where) -> None:
        """All lanes of a warp take part, or none."""
        if on is not None:
            lanes = np.broadcast_to(on, self.n).reshape(-1, WARP)
            if (lanes.any(1) != lanes.all(1)).any():
                raise Fault(f"{self.code.kernel.name}: {where}: in a diverged warp")

    def run(self) -> None:
        with np.errstate(all="ignore"):
            self._run()

    def _run(self) -> None:
        end = len(self.code.blocks)
        place = np.zeros(self.n, np.int64)  # block of each thread, while they are apart
        waiting = np.zeros(self.n, bool)
        apart, here = False, 0
        while True:
            on = None
            if apart:
                ready = place[~waiting & (place != end)]
                if not len(ready):
                    if not waiting.any():
                        return
                    self.barrier(waiting, place)
                    waiting[:] = False
                    ready = place[place != end]
                here = int(ready.min())
                on = (place == here) & ~waiting
                if on.all():
                    apart, on = False, None
            elif here == end:
                return
            self.visits[here] += self.n // WARP if on is None else on.reshape(-1, WARP).any(1).sum()
            if self.visits[here] > VISITS:
                raise Fault(f"{self.code.kernel.name}: a loop without an end")
            following, branch = here + 1, None
            for run, instruction in self.code.blocks[here]:
                if isinstance(run, tuple):
                    branch = run
                    break
                try:
                    run(self, on)
                except Fault:
                    raise
                except Exception as error:
                    raise Fault(f"{self.code.kernel.name}: {instruction}: {error!r}") from error
            if branch is None:
                kind, taken = None, np.False_
            else:
                kind, guard, target = branch
                taken = np.True_ if guard is None else guard(self)
            if kind == "bar":
                if on is None:
                    self.barrier(None, None)
                else:
                    waiting |= on
                taken = np.False_
            if on is None and (taken.ndim == 0 or taken.all() or not taken.any()):
                here = target if taken.flat[0] else following
                continue
            if on is None:
                apart, on = True, np.ones(self.n, bool)
            place[on] = following
            if kind in ("bra", "ret"):
                place[on & taken] = target
            if not waiting.any() and (place == place[0]).all():
                apart, here = False, int(place[0])

    def barrier(self, waiting, place) -> None:
        """All threads of a program have to wait at the same barrier."""
        shared = self.spaces["shared"][0]
        slots = range(self.n // self.per_program)
        if waiting is not None:
            at = place.reshape(-1, self.per_program)
            waits = waiting.reshape(-1, self.per_program)
            if (waits.any(1) & ((at != at[:, :1]).any(1) | ~waits.all(1))).any():
                raise Fault(f"{self.code.kernel.name}: a barrier that not all threads reach")
            slots = [k for k in slots if waits[k].all()]
        shared.barrier(slots)


def launch(code: Code, grid, params: list[bytes], memory: Global, shared: int, rng) -> Counter:
    """Run all programs in random order; the instructions that warps executed, by class."""
    kernel = code.kernel
    if [len(p) for p in params] != list(kernel.params.values()):
        raise Fault(f"{kernel.name}: {len(params)} arguments for {len(kernel.params)} parameters")
    named = dict(zip(kernel.params, params, strict=True))
    programs = rng.permutation(int(np.prod(grid)))
    at_once = max(1, THREADS_AT_ONCE // kernel.threads)
    counts: Counter[str] = Counter()
    for k in range(0, len(programs), at_once):
        machine = Machine(code, grid, programs[k : k + at_once], named, memory, shared, rng)
        machine.run()
        for classes, visits in zip(code.classes, machine.visits, strict=True):
            for name, n in classes.items():
                counts[name] += n * int(visits)
    return counts
