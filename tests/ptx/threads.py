"""Threads, registers and control flow: every instruction becomes a closure over all threads.

Threads that diverge run apart, those furthest behind first, until they meet again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from .arithmetic import TABLE, Operation, bits_from, constant, numpy_type, seen_as, split, unsigned
from .memory import Shared, Space
from .parser import Fault, Instruction, Kernel, parse

WARP = 32
GARBAGE = 0xDEADBEEFDEADBEEF  # what a register holds before anything is written to it
THREADS_AT_ONCE = 4096
VISITS = 2_000_000  # of a block, by warps: what goes on for longer has no end
ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%ntid.x")


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
        self.kernel.registers |= dict.fromkeys(SPECIAL, "b32")
        widths = {name: split(type_)[1] for name, type_ in self.kernel.registers.items()}
        self.garbage = {name: constant(GARBAGE, bits) for name, bits in widths.items()}
        self.blocks = [[(self.built(i), i) for i in block] for block in self.kernel.blocks]
        self.opcodes = [Counter(i.opcode for i in block) for block in self.kernel.blocks]

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
        if operand not in self.kernel.registers:
            value = see(literal(operand, type_, width))
            return lambda m: value
        has = split(declared := self.kernel.registers[operand])[1]
        if has < width or (has > width and not cut):
            raise Fault(f"{operand}, a {declared}, read as {type_}")
        if has > width:
            return lambda m: see(m.registers[operand].astype(unsigned(width)))
        return lambda m: see(m.registers[operand])

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

    def built(self, i: Instruction) -> Callable:
        """``run(machine, on)``"""
        try:
            run = self.plain(i)
            guard = self.source(i.guard, "pred") if i.guard else None
        except Fault as fault:
            raise Fault(f"{self.kernel.name}: {i}: {fault}") from None
        if guard is None:
            return run

        def guarded(m, on):
            passing = guard(m) ^ i.negated
            passing = np.broadcast_to(passing if on is None else on & passing, m.n)
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

    def go(self, i: Instruction) -> Callable:
        place = self.kernel.labels[i.operands[0]] if i.operands else len(self.kernel.blocks)
        return lambda m, on: np.copyto(m.place, place, where=on is None or on)

    def wait(self, i: Instruction) -> Callable:
        if i.operands != ("0",):
            raise Fault("only barrier 0 is known")
        return lambda m, on: np.copyto(m.waiting, True, where=on is None or on)

    def meet(self, i: Instruction) -> Callable:
        """A barrier of one warp, within which conflicts are not looked for."""
        self.source(i.operands[0], "u32")
        return lambda m, on: m.together(on)

    # ------------------------------------------------------------------------------------ memory

    def load_param(self, i: Instruction, type_: str) -> Callable:
        name, offset = ADDRESS.fullmatch(i.operands[1]).groups()
        put, as_ = self.target(i.operands[0], type_, extend=True), numpy_type(type_)
        part = slice(int(offset or 0), int(offset or 0) + as_.itemsize)
        return lambda m, on: put(m, np.frombuffer(m.params[name][part], as_)[0], on)

    def access(self, i: Instruction, verb: str, space: str, type_: str) -> Callable:
        """``ld``, ``st``, and sums: ``atom`` returns what it found, ``red`` nothing."""
        kind = {"ld": "load", "st": "store"}.get(verb, "atomic")
        as_, parts, operands = numpy_type(type_), split(type_)[2], iter(i.operands)
        put = read = None
        if verb in ("ld", "atom"):
            put = self.target(next(operands), type_, extend=verb == "ld")
        address = self.address(next(operands), space)
        if verb != "ld":
            read = self.source(next(operands), f"b{type_[1:]}", cut=verb == "st")

        def run(m, on):
            values = read and np.asarray(read(m)).reshape(-1, parts)
            found = m.access(space, kind, address(m), on, as_.itemsize * parts, values)
            if put:
                found = found.view(as_)
                put(m, found if parts > 1 else found[:, 0], on)

        return run

    def matrices(self, i: Instruction, verb: str, count: str, transposed: str | None) -> Callable:
        """Of 8 by 8 numbers of 16 bits: lane k has the address of row k % 8 of matrix k // 8, and
        in register r the pair k of matrix r."""
        place, named = i.operands if verb == "st" else i.operands[::-1]
        address, words, n = self.address(place, "shared"), f"b32x{count}", int(count)
        put = self.target(named, words) if verb == "ld" else None
        read = self.source(named, words) if verb == "st" else None

        def load(m, on):
            rows = m.access("shared", "load", address(m), m.first_lanes(8 * n, on), 16)
            found = rows.view(np.uint16).reshape(-1, 4, 8, 8)
            found = np.ascontiguousarray(found.swapaxes(2, 3) if transposed else found)
            found = found.view(np.uint32).reshape(-1, 4, WARP).swapaxes(1, 2).reshape(m.n, 4)
            put(m, found[:, :n], on)

        def store(m, on):
            pairs = np.zeros((m.n, 4), np.uint32)
            pairs[:, :n] = read(m)
            rows = pairs.reshape(-1, WARP, 4).swapaxes(1, 2).reshape(m.n, 4)
            m.access("shared", "store", address(m), m.first_lanes(8 * n, on), 16, rows)

        return load if verb == "ld" else store


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
MATRIX = r"\.sync\.aligned\.m8n8\.x([24])(\.trans)?\.shared(?:::cta)?\.b16"
INSTRUCTIONS: list[tuple[re.Pattern, Callable, int]] = [
    (re.compile(pattern), method, count)
    for pattern, method, count in (
        (r"bra(?:\.uni)?", Code.go, 1),
        (r"ret", Code.go, 0),
        (r"bar\.sync", Code.wait, 1),
        (r"bar\.warp\.sync", Code.meet, 1),
        (r"ld\.param" + TYPE, Code.load_param, 2),
        (r"(ld|st)\.(global|shared)(?:::cta)?" + TYPE, Code.access, 2),
        (r"(atom)" + ADD, Code.access, 3),
        (r"(red)" + ADD, Code.access, 2),
        (r"(ld|st)matrix" + MATRIX, Code.matrices, 2),
    )
]


class Machine:
    """Some programs of a launch."""

    def __init__(self, code: Code, grid, programs, params, memory: Space, shared: int, rng):
        self.code, self.params, self.threads = code, params, code.kernel.threads
        self.n = len(programs) * self.threads
        self.warps = (np.arange(self.n) // WARP).astype(np.int32)
        ids = np.repeat(programs.astype(np.int32), self.threads)
        x, y, p = np.uint32(grid[0]), np.uint32(grid[1]), ids.view(np.uint32)
        self.registers: dict[str, np.ndarray] = code.garbage | {
            "%tid.x": np.arange(self.n, dtype=np.uint32) % np.uint32(self.threads),
            "%ntid.x": np.uint32(self.threads), "%nctaid.x": x, "%nctaid.y": y,
            "%ctaid.x": p % x, "%ctaid.y": p // x % y, "%ctaid.z": p // (x * y),
        }  # fmt: skip
        self.shared = Shared(shared, len(programs), self.threads // WARP, rng)
        self.spaces = {"global": (memory, ids), "shared": (self.shared, self.warps)}
        self.visits = np.zeros(len(code.blocks), np.int64)  # of each block, by warps
        self.place = np.zeros(self.n, np.int32)  # block of each thread
        self.waiting = np.zeros(self.n, bool)  # at a barrier

    def write(self, name: str, value, on) -> None:
        self.registers[name] = value if on is None else np.where(on, value, self.registers[name])

    def access(self, space: str, kind: str, address, on, size: int, values=None):
        """What the threads that are ``on`` do to memory; bytes that they find, others zeros."""
        (memory, agents), which = self.spaces[space], slice(None) if on is None else on
        address, warps = np.broadcast_to(address, self.n)[which], self.warps[which]
        if values is not None:
            values = np.broadcast_to(values, (self.n, values.shape[1]))[which]
            values = np.ascontiguousarray(values).view(np.uint8)
        found = memory.access(kind, address, agents[which], warps, size, values)
        if on is None:
            return found
        out = np.zeros((self.n, size), np.uint8)
        out[on] = found
        return out

    def together(self, on) -> None:
        """All lanes of a warp take part, or none."""
        if on is not None:
            lanes = on.reshape(-1, WARP)
            if (lanes.any(1) != lanes.all(1)).any():
                raise Fault("in a diverged warp")

    def first_lanes(self, count: int, on):
        """Of each warp, which takes part as one."""
        self.together(on)
        return np.tile(np.arange(WARP) < count, self.n // WARP) & (on is None or on)

    def run(self) -> None:
        end = len(self.code.blocks)
        while True:
            ready = ~self.waiting & (self.place < end)
            if ready.any():
                here = int(self.place[ready].min())
                on = ready & (self.place == here)
                self.execute(here, None if on.all() else on)
            elif self.waiting.any():
                self.barrier()
            else:
                return

    def execute(self, block: int, on) -> None:
        self.visits[block] += self.n // WARP if on is None else on.reshape(-1, WARP).any(1).sum()
        if self.visits[block] > VISITS:
            raise Fault(f"{self.code.kernel.name}: a loop without an end")
        np.copyto(self.place, block + 1, where=on is None or on)
        for run, instruction in self.code.blocks[block]:
            try:
                run(self, on)
            except Exception as error:
                what = error if isinstance(error, Fault) else repr(error)
                raise Fault(f"{self.code.kernel.name}: {instruction}: {what}") from error

    def barrier(self) -> None:
        """All threads of a program have to wait at the same barrier."""
        place, waiting = (a.reshape(-1, self.threads) for a in (self.place, self.waiting))
        here = waiting.all(1) & (place == place[:, :1]).all(1)
        if (waiting.any(1) & ~here).any():
            raise Fault(f"{self.code.kernel.name}: a barrier that not all threads reach")
        self.shared.barrier(here)
        self.waiting[:] = False


def launch(code: Code, grid, params: list[bytes], memory: Space, shared: int, rng) -> Counter:
    """Run all programs in random order; the instructions that warps executed, by opcode."""
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
            for opcodes, visits in zip(code.opcodes, machine.visits, strict=True):
                counts.update({opcode: n * int(visits) for opcode, n in opcodes.items()})
    return counts
