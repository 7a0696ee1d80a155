"""PTX text to instructions in basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Fault(Exception):
    """A kernel does what it must not, or what the interpreter does not know."""


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands``; vectors keep their braces, addresses their brackets."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Kernel:
    """A parsed entry point."""

    name: str
    threads: int
    params: dict[str, int] = field(default_factory=dict)  # bytes of each
    registers: dict[str, str] = field(default_factory=dict)  # type of each: pred, b16, b32, b64
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)  # block that each label begins


IGNORED = re.compile(r"\.(loc|file|pragma)\b[^\n;]*;?")
CONSTANT = re.compile(r"\.global \.align 1 \.b8 _\$_str\S* = \{[^}]*\};")  # never read
SHARED = ".extern .shared .align 16 .b8 global_smem[];"
ENDS_BLOCK = re.compile(r"bra.*|ret|bar\.sync")


def parse(text: str) -> Kernel:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    before, entry = text.split(".visible .entry", 1)
    before = CONSTANT.sub("", before).replace(SHARED, "")
    entry = re.sub(r"\bglobal_smem\b", "0", entry)  # the address where it begins
    header = r"\s*\.version \S+\s+\.target \S+\s+\.address_size 64\s*"
    if not re.fullmatch(header, before):
        raise Fault(f"directives not understood: {before.strip()}")
    signature, rest = entry.split(")", 1)
    name, params = signature.split("(")
    head, _, rest = rest.partition("{")
    threads = re.fullmatch(r"\s*\.reqntid (\d+)\s*(\.maxnreg \d+|\.minnctapersm 1)?\s*", head)
    if threads is None:
        raise Fault(f"directives not understood: {head.strip()}")
    kernel = Kernel(name.strip(), int(threads[1]))
    for param in filter(None, map(str.strip, params.split(","))):
        m = re.fullmatch(r"\.param \.[usbf](\d+)(?: \.ptr \.global \.align 1)? (\w+)", param)
        if m is None:
            raise Fault(f"parameter not understood: {param}")
        kernel.params[m[2]] = int(m[1]) // 8
    body = IGNORED.sub("", re.split(r"\n\}", rest, maxsplit=1)[0])
    for statement in re.split(r";|(?<=:)\s*\n", body):
        if statement := statement.strip():
            _add(kernel, statement)
    return kernel


def _add(kernel: Kernel, statement: str) -> None:
    if statement.endswith(":"):
        if kernel.blocks[-1]:
            kernel.blocks.append([])
        kernel.labels[statement[:-1]] = len(kernel.blocks) - 1
        return
    if m := re.fullmatch(r"\.reg \.(\w+)\s+(%\w+?)<(\d+)>", statement):
        kernel.registers.update({f"{m[2]}{i}": m[1] for i in range(int(m[3]))})
        return
    m = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement, re.S)
    if m is None:
        raise Fault(f"cannot parse {statement!r}")
    text = re.sub(r"\{\s*([^,\s]+)\s*\}", r"\1", m[4] or "")  # a vector of one
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)
    parsed = Instruction(m[3], tuple(o.strip() for o in operands), m[2], bool(m[1]))
    kernel.blocks[-1].append(parsed)
    if ENDS_BLOCK.fullmatch(parsed.opcode):
        kernel.blocks.append([])
