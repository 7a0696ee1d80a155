"""Run the library on CPU tensors with every launch compiled for an absent GPU and interpreted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from perf._binary import Source, compiled_for, source_of
from perf._record import Launch, replaced_launches

from .memory import Fresh, global_memory
from .parser import Fault
from .reshapes import reordered
from .threads import Code, launch

SCALARS = {"i1": np.int8, "i32": np.int32, "i64": np.int64, "fp32": np.float32, "fp64": np.float64}


@dataclass
class Executed:
    """One launch."""

    launch: Launch
    opcodes: Counter[str]  # instructions of warps
    memory: Counter[str]  # bytes and sectors of global memory, atomics
    hottest: int  # atomics at the address that has most


@dataclass
class Interpreter:
    """Executes launches. ``edit`` changes the PTX of a kernel of a name first (planted faults)."""

    arch: str
    noise: float = 0.0  # of approximate instructions, in documented errors
    contract: bool = False  # fuse products with sums
    counted: bool = False  # sectors of memory, which takes time
    reshapes: bool = True  # must not reorder what is paired with another operand
    float_type: str = "fp32"  # how Python floats arrive; "fp64" from Inductor
    edit: Callable[[str, str], str] | None = None
    seed: int = 0
    executed: list[Executed] = field(default_factory=list)

    def __post_init__(self):
        self.fresh, self.rng = Fresh(), np.random.default_rng(self.seed)

    def __call__(self, call: Launch) -> None:
        source = source_of(call, self.float_type)
        ptx, shared, pairs = binary_of(source, self.arch)
        if pairs and self.reshapes:
            raise Fault(f"{call.name}: a reshape that may reorder is paired: {pairs[0]}")
        if self.edit:
            ptx = self.edit(call.name, ptx)
        code = code_of(ptx, self.noise, self.contract)
        given = [(n, t, call.args[n]) for n, t in source.signature if t != "constexpr"]
        tensors = {name: value for name, _, value in given if isinstance(value, Tensor)}
        memory = global_memory(tensors, self.fresh, self.rng, self.counted)
        params = [_raw(type_, value) for _, type_, value in given]
        params += [bytes(8)] * (len(code.kernel.params) - len(params))  # scratch, not used
        grid = (*call.grid, 1, 1)[:3]
        opcodes = launch(code, grid, params, memory, shared, self.rng)
        self.executed.append(Executed(call, opcodes, memory.counts, memory.hottest))


def _raw(type_: str, value) -> bytes:
    if isinstance(value, Tensor):
        return np.uint64(value.data_ptr()).tobytes()
    return SCALARS[type_](value).tobytes()


@cache
def binary_of(source: Source, arch: str) -> tuple[str, int, list[str]]:
    """PTX, bytes of shared memory, and what ``reordered`` says of the kernel."""
    compiled = compiled_for(source, arch)
    pairs = reordered(compiled.asm["ttir"]) + reordered(compiled.asm["ttgir"])
    return compiled.asm["ptx"], compiled.metadata.shared, pairs


@cache
def code_of(ptx: str, noise: float, contract: bool) -> Code:
    return Code(ptx, noise=noise, contract=contract)


@contextmanager
def interpreted(arch: str, **options):
    """Losses of CPU tensors run their kernels' PTX; yields the ``Interpreter``."""
    interpreter = Interpreter(arch, **options)
    with replaced_launches(interpreter), poisoned_empty(interpreter.fresh.add):
        yield interpreter


@contextmanager
def poisoned_empty(poison: Callable[[Tensor], Tensor]):
    """What ``torch.empty*`` hand out goes through ``poison`` first."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            plain = type(tensor) is Tensor and tensor.device.type == "cpu"
            return poison(tensor) if plain and not torch.compiler.is_compiling() else tensor

        return made

    names = ("empty", "empty_like", "empty_strided")
    with mock.patch.multiple(torch, **{name: poisoned(getattr(torch, name)) for name in names}):
        yield
