"""Cross-compile a recorded launch for a GPU that is not there, and read the binary.

cuobjdump and nvdisasm ship inside the Triton wheel; AMD's figures stand in the assembly text.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from ._record import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

POINTEES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Source:
    """What the compiler gets: as the JIT specialises the arguments of a launch. Picklable."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[str, ...]
    within_2_gib: tuple[str, ...]  # tensors that AMD's 32-bit buffer offsets reach
    options: tuple[tuple[str, Any], ...]


def source_of(launch: Launch, float_type: str = "fp32") -> Source:
    """``float_type``: how Python floats arrive, "fp32" from eager code, "fp64" from Inductor."""
    signature, constants, divisible, near = {}, {}, [], []
    for param in launch.kernel.params:
        value = launch.args[param.name]
        if param.is_constexpr or value is None:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTEES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(param.name)
            if value.untyped_storage().nbytes() < 2**31:
                near.append(param.name)
        elif isinstance(value, bool):
            signature[param.name] = "i1"
        elif isinstance(value, float):
            signature[param.name] = float_type
        elif value == 1:  # the JIT compiles ones in
            signature[param.name], constants[param.name] = "constexpr", 1
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(param.name)
    return Source(
        launch.kernel.fn.__module__,
        launch.name,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(near),
        tuple(launch.options.items()),
    )


@dataclass(frozen=True)
class Figures:
    """What one binary costs; ``spills`` counts accesses of registers kept in memory."""

    registers: int
    stack: int
    spills: int
    shared: int
    wide_loads: int
    wide_stores: int
    fp64: int
    instructions: int

    asdict = asdict


def _given(source: Source, arch: str) -> ASTSource:
    fn = getattr(importlib.import_module(source.module), source.kernel)
    attrs: dict[tuple, list] = {}
    for name in source.divisible_by_16:
        attrs.setdefault((fn.arg_names.index(name),), []).append(["tt.divisibility", 16])
    for name in source.within_2_gib if TARGETS[arch].backend == "hip" else ():
        attrs.setdefault((fn.arg_names.index(name),), []).append(["tt.pointer_range", 32])
    return ASTSource(fn, dict(source.signature), dict(source.constants), attrs)


def compiled_for(source: Source, arch: str):
    """Triton's compiled kernel."""
    given = _given(source, arch)
    return triton.compile(given, target=TARGETS[arch], options=dict(source.options))


def mlir_of(source: Source, arch: str) -> list[str]:
    """Triton's own code of a kernel, without layouts and with them; no further stage runs."""
    given, target = _given(source, arch), TARGETS[arch]
    backend, stages, metadata = make_backend(target), {}, {}
    options = backend.parse_options(dict(source.options))
    backend.add_stages(stages, options, given.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parts = backend.get_codegen_implementation(options), backend.get_module_map()
    module, texts = given.make_ir(target, options, *parts, context), []
    for name in ("ttir", "ttgir"):
        module = stages[name](module, metadata)
        texts.append(str(module))
    return texts


def compile_for(source: Source, arch: str) -> Figures:
    compiled = compiled_for(source, arch)
    shared = compiled.metadata.shared
    if TARGETS[arch].backend == "hip":
        return _read_amdgcn(compiled.asm["amdgcn"], shared)
    return _read_cubin(compiled.asm["cubin"], shared)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def _read_cubin(cubin: bytes, shared: int) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(*command) -> str:
            command = [str(TOOLS / command[0]), *command[1:], file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        # comments, labels and directives carry no instruction
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", tool("nvdisasm", "-c"), re.M)
    if len(lines) < 10:
        raise RuntimeError(f"nvdisasm gave {len(lines)} instructions: its format is not understood")
    # "@!P0 LDG.E.128 ..." -> "LDG.E.128"
    opcodes = "\n".join(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in lines)
    return Figures(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        stack=int(re.search(r"STACK:(\d+)", usage).group(1)),
        spills=_count(r"^(LDL|STL)", opcodes),
        shared=shared,
        wide_loads=_count(r"^LDG\.\S*128", opcodes),
        wide_stores=_count(r"^STG\.\S*128", opcodes),
        fp64=_count(r"^(DADD|DMUL|DFMA|DSETP|DMNMX|MUFU\.\w+64H)", opcodes),
        instructions=_count(r"^(?!NOP)\w", opcodes),
    )


def _read_amdgcn(text: str, shared: int) -> Figures:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    return Figures(
        registers=field("vgpr_count"),
        stack=field("private_segment_fixed_size"),
        # scalar registers spill to lanes of a vector register, not to memory
        spills=field("vgpr_spill_count"),
        shared=shared,
        wide_loads=_count(r"^\s+(global|buffer)_load_dwordx4", text),
        wide_stores=_count(r"^\s+(global|buffer)_store_dwordx4", text),
        fp64=_count(r"^\s+v_(?!cvt)\w+_f64", text),
        instructions=_count(r"^\s+[sv]_\w+|^\s+(global|buffer|ds|flat)_\w+", text),
    )
