"""Threads, registers and control flow: every instruction becomes a closure over all threads.

Threads that diverge run apart, those furthest behind first, until they meet again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from .arithmetic import (
    TABLE,
    UNSIGNED,
    Operation,
    bits_from,
    constant,
    numpy_type,
    seen_as,
    split,
)
from .memory import Shared, Space
from .parser import Fault, Instruction, Kernel, parse

WARP = 32
GARBAGE = 0xDEADBEEFDEADBEEF  # what a register holds before anything is written to it
THREADS_AT_ONCE = 4096
VISITS = 2_000_000  # of a block, by warps: what goes on for longer has no end
ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%ntid.x")
CLASSES = {  # of executed instructions; the first that fits
    "special": r"(ex2|sqrt|div\.full)\..*",
    "float64": r"(?!selp|mov|ld|st).*\.f64.*",
    "move": r"(mov|selp|cvt|ld\.param).*",
    "warp": r"(shfl|vote|redux)\..*",
    "global": r"(ld|st)\.global.*",
    "atomic": r"(atom|red)\..*",
    "shared": r"(ld|st)\.shared.*|(ld|st)matrix.*",
    "barrier": r"bar\..*",
    "control": r"(bra|ret).*",
    "float": r".*\.(f32|f16|bf16|f32x2|f16x2|bf16x2)|setp.*f.*",
    "integer": r".*",
}


def class_of(opcode: str) -> str:
    return next(c for c, pattern in CLASSES.items() if re.fullmatch(pattern, opcode))


def names_in(operand: str) -> list[str]:
    """Of ``{a, b}``, ``p|q`` or a lone register."""
    return [name.strip() for name in re.split(r"[,|]", operand.strip("{} "))]


def contracted(kernel: Kernel) -> None:
    """Fuse products with the sums that take them, as ptxas may: within a block, in place."""
    for block in kernel.blocks:
        products: dict[str, tuple[str, str]] = {}
        for i, step in enumerate(block):
            operands = step.operands
            if step.opcode in ("add.f32", "sub.f32") and not step.guard:
                place = next((k for k in (1, 2) if operands[k] in products), 0)
                if place:
                    name = "from" if (step.opcode, place) == ("sub.f32", 2) else step.opcode[:3]
                    sources = *products[operands[place]], operands[3 - place]
                    block[i] = Instruction(f"contracted.{name}.f32", (operands[0], *sources))
            for name in names_in(operands[0]) if operands else ():
                products = {p: ab for p, ab in products.items() if name not in (p, *ab)}
            if step.opcode == "mul.f32" and not step.guard and operands[0] not in operands[1:]:
                products[operands[0]] = operands[1], operands[2]


class Code:
    """A kernel, ready to run."""

    def __init__(self, ptx: str, *, noise: float = 0.0, contract: bool = False):
        self.kernel, self.noise = parse(ptx), noise
        if contract:
            contracted(self.kernel)
        self.kernel.registers.update(dict.fromkeys(SPECIAL, "b32"))
        widths = {name: split(type_)[1] for name, type_ in self.kernel.registers.items()}
        self.garbage = {name: constant(GARBAGE, bits) for name, bits in widths.items()}
        self.blocks, self.ends = [], []
        for block in self.kernel.blocks:
            end = self.end(block[-1]) if block else None
            self.blocks.append([(self.built(i), i) for i in (block[:-1] if end else block)])
            self.ends.append(end or ("", None, 0))
        self.classes = [Counter(class_of(i.opcode) for i in b) for b in self.kernel.blocks]

    # ---------------------------------------------------------------------------------- operands

    def source(self, operand: str, type_: str, cut: bool = False) -> Callable:
        """How to read an operand; ``cut``: the register may be wider than the type."""
        base, bits, parts = split(type_)
        if operand[0] == "{":
            reads = [self.source(name, base, cut) for name in names_in(operand)]
            if len(reads) != parts:
                raise Fault(f"{operand} read as {type_}")
            return lambda m: np.stack(np.broadcast_arrays(*[read(m) for read in reads]), -1)
        width, see = bits * parts, seen_as(type_)
        if declared := self.kernel.registers.get(operand):
            has = split(declared)[1]
            if has != width and (not cut or has < width):
                raise Fault(f"{operand}, a {declared}, read as {type_}")
            if has != width:
                return lambda m: see(m.registers[operand].astype(UNSIGNED[width]))
            return lambda m: see(m.registers[operand])
        value = see(literal(operand, type_, width))
        return lambda m: value

    def target(self, operand: str, type_: str, extend: bool = False) -> Callable:
        """How to write a register; ``extend``: it may be wider than the type."""
        base, bits, parts = split(type_)
        if operand[0] == "{" or "|" in operand:
            puts = [self.target(name, base, extend) for name in names_in(operand)]
            if len(puts) != parts:
                raise Fault(f"{operand} written as {type_}")

            def put(m, values, on):
                for k, part in enumerate(puts):
                    part(m, values[..., k], on)

            return put
        if operand == "_":
            return lambda m, value, on: None
        declared = self.kernel.registers[operand]
        has = split(declared)[1]
        if has != bits * parts and (not extend or has < bits * parts):
            raise Fault(f"{operand}, a {declared}, written as {type_}")
        # a wider one gets zeros, or copies of the sign
        raw = bits_from(type_ if has == bits * parts else f"{base[0]}{has}")
        return lambda m, value, on: m.write(operand, raw(value), on)

    def address(self, operand: str, space: str) -> Callable:
        m, bits = ADDRESS.fullmatch(operand), 64 if space == "global" else 32
        if m is None:
            raise Fault(f"address {operand} is not known")
        base, offset = self.source(m[1], f"u{bits}"), constant(int(m[2] or "0", 0), bits)
        return lambda machine: base(machine) + offset

    # ------------------------------------------------------------------------------ instructions

    def guard(self, i: Instruction) -> Callable | None:
        read = self.source(i.guard, "pred") if i.guard else None
        return (lambda m: ~read(m)) if i.negated else read

    def end(self, i: Instruction):
        """How a block ends: kind, guard and target, or None for any other instruction."""
        if i.opcode in ("bra", "bra.uni"):
            return "go", self.guard(i), self.kernel.labels[i.operands[0]]
        if i.opcode == "ret":
            return "go", self.guard(i), len(self.kernel.blocks)
        if i.opcode == "bar.sync" and i.operands == ("0",) and not i.guard:
            return "barrier", None, 0
        return None

    def built(self, i: Instruction) -> Callable:
        """``run(machine, on)``"""
        try:
            run, guard = self.plain(i), self.guard(i)
        except Fault as fault:
            raise Fault(f"{self.kernel.name}: {i}: {fault}") from None
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
        opcode = re.sub(r"\.v([248])(\.\w+)$", r"\2x\1", i.opcode)
        for pattern, method, count in INSTRUCTIONS:
            if (m := pattern.fullmatch(opcode)) and len(i.operands) == count:
                return method(self, i, *m.groups())
        found = TABLE.get((i.opcode, len(i.operands) - 1))
        if found is None:
            raise Fault(f"{i.opcode} with {len(i.operands)} operands is not known")
        if i.opcode.startswith("mov") and (whole := next((o for o in i.operands if "{" in o), "")):
            parts = len(names_in(whole))  # packs a register, or unpacks it
            type_ = f"b{split(found.result)[1] // parts}x{parts}"
            found = Operation(type_, (type_,), found.function)
        put = self.target(i.operands[0], found.result)
        function = found.off_by(self.noise) if found.ulp and self.noise else found.function
        cut = i.opcode.startswith("cvt")
        pairs = zip(i.operands[1:], found.sources, strict=True)
        sources = [self.source(operand, type_, cut) for operand, type_ in pairs]
        if found.warps:
            return self.of_warps(put, function, sources)
        if len(sources) == 2:  # without a list it is faster
            one, two = sources
            return lambda m, on: put(m, function(one(m), two(m)), on)
        return lambda m, on: put(m, function(*[read(m) for read in sources]), on)

    def of_warps(self, put: Callable, function: Callable, sources: list[Callable]) -> Callable:
        """Operands come as [warps, lanes], of warps that take part as one; the mask is the last."""

        def run(m, on):
            m.together(on)
            *values, mask = (np.broadcast_to(read(m), m.n).reshape(-1, WARP) for read in sources)
            if (mask[... if on is None else on.reshape(-1, WARP)] != 2**32 - 1).any():
                raise Fault("only whole warps are known")
            found = np.broadcast_to(function(*values), (m.n // WARP, WARP))
            put(m, found.reshape(-1), on)

        return run

    def meet(self, i: Instruction) -> Callable:
        """A barrier of one warp, within which conflicts are not looked for."""
        self.source(i.operands[0], "u32")
        return lambda m, on: m.together(on)

    # ------------------------------------------------------------------------------------ memory

    def load_param(self, i: Instruction, type_: str) -> Callable:
        name, offset = ADDRESS.fullmatch(i.operands[1]).groups()
        put, as_ = self.target(i.operands[0], type_, extend=True), numpy_type(type_)
        part = slice(int(offset or 0), int(offset or 0) + split(type_)[1] // 8)
        return lambda m, on: put(m, np.frombuffer(m.params[name][part], as_)[0], on)

    def load(self, i: Instruction, space: str, type_: str) -> Callable:
        put = self.target(i.operands[0], type_, extend=True)
        address = self.address(i.operands[1], space)
        as_, (_, bits, parts) = numpy_type(type_), split(type_)

        def run(m, on):
            values = m.access(space, "load", address(m), on, bits * parts // 8).view(as_)
            put(m, values if parts > 1 else values[:, 0], on)

        return run

    def store(self, i: Instruction, space: str, type_: str) -> Callable:
        _, bits, parts = split(type_)
        read = self.source(i.operands[1], f"b{type_[1:]}", cut=True)
        address = self.address(i.operands[0], space)

        def run(m, on):
            values = read(m) if parts > 1 else read(m)[..., None]
            data = np.ascontiguousarray(np.broadcast_to(values, (m.n, parts))).view(np.uint8)
            m.access(space, "store", address(m), on, bits * parts // 8, data)

        return run

    def add(self, i: Instruction, space: str, type_: str) -> Callable:
        """The atomic; without a result it is ``red``."""
        *result, place, operand = i.operands
        put = self.target(result[0] if result else "_", type_)
        address, read = self.address(place, space), self.source(operand, type_)

        def run(m, on):
            values = np.ascontiguousarray(np.broadcast_to(read(m), m.n))
            found = m.access(space, "atomic", address(m), on, values.itemsize, values)
            put(m, found.view(values.dtype)[:, 0], on)

        return run

    # Up to four matrices of 8 by 8 numbers of 16 bits: lane k of 32 has the address of row k % 8
    # of matrix k // 8, and in register r the pair k of matrix r.

    def load_matrix(self, i: Instruction, count: str, transposed: str | None) -> Callable:
        puts = [self.target(name, "b32") for name in names_in(i.operands[0])]
        address = self.address(i.operands[1], "shared")

        def run(m, on):
            rows = m.access("shared", "load", address(m), m.first_lanes(8 * int(count), on), 16)
            matrices = rows.view(np.uint16).reshape(-1, 4, 8, 8)
            if transposed:
                matrices = matrices.swapaxes(2, 3)
            pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4, WARP)
            for k, put in enumerate(puts):
                put(m, pairs[:, k].reshape(-1), on)

        return run

    def store_matrix(self, i: Instruction, count: str) -> Callable:
        reads = [self.source(name, "b32") for name in names_in(i.operands[1])]
        address = self.address(i.operands[0], "shared")

        def run(m, on):
            pairs = np.zeros((m.n // WARP, 4, WARP), np.uint32)
            for k, read in enumerate(reads):
                pairs[:, k] = np.broadcast_to(read(m), m.n).reshape(-1, WARP)
            rows, giving = pairs.reshape(-1, 4).view(np.uint8), m.first_lanes(8 * int(count), on)
            m.access("shared", "store", address(m), giving, 16, rows)

        return run


def literal(text: str, type_: str, bits: int):
    if m := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text):
        if bits == {"f": 32, "d": 64}[m[1]]:
            return constant(int(m[2], 16), bits)
    elif re.fullmatch(r"-?(?:0x[0-9A-Fa-f]+|\d+)U?", text) and (type_[0] != "f" or "x" in type_):
        return constant(int(text.rstrip("U"), 0), bits)
    raise Fault(f"{text} read as {type_} is not known")


# As Triton 3.6 to 3.9 spell them; the methods get what stands in parentheses.
TYPE = r"\.([busf](?:8|16|32|64)(?:x[248])?)"
ADD = r"(?:\.relaxed\.sys)?\.(global|shared)(?:\.gpu\.relaxed)?\.add\.([us](?:32|64))"
MATRIX = r"matrix\.sync\.aligned\.m8n8\.x([124])"
INSTRUCTIONS: list[tuple[re.Pattern, Callable, int]] = [
    (re.compile(pattern), method, count)
    for pattern, method, count in (
        (r"ld\.param\.([busf](?:16|32|64))", Code.load_param, 2),
        (r"ld\.(global|shared)(?:::cta)?" + TYPE, Code.load, 2),
        (r"st\.(global|shared)(?:::cta)?" + TYPE, Code.store, 2),
        (r"atom" + ADD, Code.add, 3),
        (r"red" + ADD, Code.add, 2),
        (r"bar\.warp\.sync", Code.meet, 1),
        (r"ld" + MATRIX + r"(\.trans)?\.shared(?:::cta)?\.b16", Code.load_matrix, 2),
        (r"st" + MATRIX + r"\.shared(?:::cta)?\.b16", Code.store_matrix, 2),
    )
]


class Machine:
    """Some programs of a launch."""

    def __init__(self, code: Code, grid, programs, params, memory: Space, shared: int, rng):
        self.code, self.params = code, params
        count, self.threads = len(programs), code.kernel.threads
        self.n = count * self.threads
        self.warps = (np.arange(self.n) // WARP).astype(np.int32)
        ids = np.repeat(programs.astype(np.int32), self.threads)
        x, y = np.uint32(grid[0]), np.uint32(grid[1])
        p = ids.view(np.uint32) if count > 1 else np.uint32(programs[0])
        self.registers: dict[str, np.ndarray] = code.garbage | {
            "%tid.x": np.tile(np.arange(self.threads, dtype=np.uint32), count),
            "%ntid.x": np.uint32(self.threads), "%nctaid.x": x, "%nctaid.y": y,
            "%ctaid.x": p % x, "%ctaid.y": p // x % y, "%ctaid.z": p // (x * y),
        }  # fmt: skip
        self.shared = Shared(shared, count, self.threads // WARP, rng)
        self.spaces = {"global": (memory, ids), "shared": (self.shared, self.warps)}
        self.visits = np.zeros(len(code.blocks), np.int64)  # of each block, by warps

    def write(self, name: str, value, on) -> None:
        self.registers[name] = value if on is None else np.where(on, value, self.registers[name])

    def access(self, space: str, kind: str, address, on, size: int, values=None):
        """What the threads that are ``on`` do to memory; bytes that they find, others zeros."""
        (memory, agents), which = self.spaces[space], slice(None) if on is None else on
        address, warps = np.broadcast_to(address, self.n)[which], self.warps[which]
        values = None if values is None else values[which]
        found = memory.access(kind, address, agents[which], warps, size, values)
        if on is None or kind == "store":
            return found
        out = np.zeros((self.n, size), np.uint8)
        out[which] = found
        return out

    def together(self, on) -> None:
        """All lanes of a warp take part, or none."""
        if on is not None:
            lanes = on.reshape(-1, WARP)
            if (lanes.any(1) != lanes.all(1)).any():
                raise Fault("in a diverged warp")

    def first_lanes(self, count: int, on):
        """Of each warp that takes part as one."""
        self.together(on)
        lanes = np.tile(np.arange(WARP) < count, self.n // WARP)
        return lanes if on is None else lanes & on

    def run(self) -> None:
        end = len(self.code.blocks)
        place = np.zeros(self.n, np.int64)  # block of each thread, while they are apart
        waiting = np.zeros(self.n, bool)
        here, apart = 0, False
        while apart or here != end:
            on = None
            if apart:
                ready = place[~waiting & (place != end)]
                if not len(ready):
                    if not waiting.any():
                        return
                    self.barrier(waiting, place)
                    waiting[:] = False
                    continue
                here = int(ready.min())
                on = (place == here) & ~waiting
                if on.all():
                    apart, on = False, None
            self.execute(here, on)
            kind, guard, target = self.code.ends[here]
            taken = guard(self) if guard else np.bool_(kind == "go")
            if kind == "barrier" and on is None:
                self.shared.barrier(slice(None))
            elif kind == "barrier":
                waiting |= on
            here += 1
            if on is None and (taken.all() or not taken.any()):
                here = target if taken.all() else here
                continue
            on = np.ones(self.n, bool) if on is None else on
            place[on] = here
            place[on & taken] = target
            here, apart = int(place[0]), waiting.any() or (place != place[0]).any()

    def execute(self, block: int, on) -> None:
        self.visits[block] += (
            len(self.warps) // WARP if on is None else on.reshape(-1, WARP).any(1).sum()
        )
        if self.visits[block] > VISITS:
            raise Fault(f"{self.code.kernel.name}: a loop without an end")
        for run, instruction in self.code.blocks[block]:
            try:
                run(self, on)
            except Exception as error:
                what = error if isinstance(error, Fault) else repr(error)
                raise Fault(f"{self.code.kernel.name}: {instruction}: {what}") from error

    def barrier(self, waiting, place) -> None:
        """All threads of a program have to wait at the same barrier."""
        place, waiting = (a.reshape(-1, self.threads) for a in (place, waiting))
        here = waiting.all(1) & (place == place[:, :1]).all(1)
        if (waiting.any(1) & ~here).any():
            raise Fault(f"{self.code.kernel.name}: a barrier that not all threads reach")
        self.shared.barrier(here)


def launch(code: Code, grid, params: list[bytes], memory: Space, shared: int, rng) -> Counter:
    """Run all programs in random order; the instructions that warps executed, by class."""
    kernel = code.kernel
    if [len(p) for p in params] != list(kernel.params.values()):
        raise Fault(f"{kernel.name}: {len(params)} arguments for {len(kernel.params)} parameters")
    named = dict(zip(kernel.params, params, strict=True))
    programs = rng.permutation(int(np.prod(grid)))
    at_once = max(1, THREADS_AT_ONCE // kernel.threads)
    counts: Counter[str] = Counter()
    with np.errstate(all="ignore"):
        for k in range(0, len(programs), at_once):
            machine = Machine(code, grid, programs[k : k + at_once], named, memory, shared, rng)
            machine.run()
            for classes, visits in zip(code.classes, machine.visits, strict=True):
                counts.update({name: n * int(visits) for name, n in classes.items()})
    return counts
