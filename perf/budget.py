"""What every kernel costs on GPUs that need not be there: ``python -m perf.budget``.

Without an option the table is printed; ``--write`` puts its rows into ``results/budget.csv``;
``--check`` compares with that file and exits 1 past the bounds:

* hard: no spills, no float64 arithmetic (no more of it in kernels that use it on purpose), 16-byte
  loads and stores of contiguous tensors;
* loose: a quarter more registers, compared where the same Triton wrote the file.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from ._binary import TARGETS, Figures, Source, compile_for, source_of
from ._examples import EXAMPLES, FLOAT64, QUICK, launches_of, wide_accesses
from ._measure import write_rows
from ._record import Launch

TABLE = Path(__file__).parent / "results" / "budget.csv"
REGISTER_SLACK = 1.25
# ptxas gives up a register or two of a rare branch to reach a round number of warps.
SPILL_SLACK = 4  # accesses
TRITON = ".".join(triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Binary:
    """One kernel of one example for one target."""

    example: str
    kernel: str
    arch: str
    source: Source
    wide_loads: int  # needed
    wide_stores: int  # needed

    @property
    def key(self) -> tuple[str, str, str]:
        return self.example, self.kernel, self.arch


def title(launch: Launch) -> str:
    backward = launch.args.get("BACKWARD")
    return launch.name + ("" if backward is None else " backward" if backward else " forward")


def binaries(examples, archs) -> list[Binary]:
    """Those of the examples; each distinct binary once, under the first of all that launches it."""
    found: dict[tuple, Binary] = {}
    for example in EXAMPLES:
        for launch in launches_of(example):
            # Inductor hands Python floats to kernels as float64.
            source = source_of(launch, "fp64" if "scheduled" in example else "fp32")
            for arch in archs:
                needed = wide_accesses(launch, TARGETS[arch].warp_size)
                binary = Binary(example, title(launch), arch, source, *needed)
                found.setdefault((source, arch), binary)
    return [binary for binary in found.values() if binary.example in examples]


def measure(binary: Binary) -> Figures:
    return compile_for(binary.source, binary.arch)


def measure_all(todo: list[Binary], jobs: int) -> list[Figures]:
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(measure, todo))


def faults(binary: Binary, figures: Figures, committed: dict[str, str] | None) -> list[str]:
    """What is wrong with one binary; empty if nothing."""
    found = []
    if figures.spills > SPILL_SLACK:
        found.append(f"spills: {figures.spills} accesses, {figures.stack} bytes of stack")
    allowed = int(committed["fp64"]) if committed and binary.kernel in FLOAT64 else 0
    if figures.fp64 > allowed:
        found.append(f"{figures.fp64} float64 instructions, not {allowed}")
    if figures.wide_loads < binary.wide_loads:
        found.append(f"{figures.wide_loads} 16-byte loads, not {binary.wide_loads}")
    if figures.wide_stores < binary.wide_stores:
        found.append(f"{figures.wide_stores} 16-byte stores, not {binary.wide_stores}")
    if committed is None:
        found.append("not in the committed table: python -m perf.budget --write")
    elif committed["triton"] == TRITON:
        before = int(committed["registers"])
        if figures.registers > before * REGISTER_SLACK:
            found.append(f"{figures.registers} registers, {before} before")
    return found


def read_table(path: Path = TABLE) -> dict[tuple, dict[str, str]]:
    with path.open(newline="") as file:
        return {(r["example"], r["kernel"], r["arch"]): r for r in csv.DictReader(file)}


def rows_of(todo, figures) -> list[dict]:
    names = ("example", "kernel", "arch")
    return [
        dict(zip(names, b.key, strict=True)) | f.asdict() | {"triton": TRITON}
        for b, f in zip(todo, figures, strict=True)
    ]


def merged(rows: list[dict]) -> list[dict]:
    """All rows of the table: those measured now, and the others as they were."""
    known = read_table() | {(r["example"], r["kernel"], r["arch"]): r for r in rows}
    keys = [binary.key for binary in binaries(EXAMPLES, TARGETS)]
    return [known[key] for key in dict.fromkeys(keys) if key in known]


def print_table(rows: list[dict]) -> None:
    widths = {k: max(len(k), *(len(str(r[k])) for r in rows)) for k in rows[0]}
    for row in ({k: k for k in widths}, *rows):
        print("  ".join(f"{row[k]!s:{'<' if i < 3 else '>'}{w}}"
                        for i, (k, w) in enumerate(widths.items())))  # fmt: skip


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 past the bounds")
    parser.add_argument("--write", action="store_true", help="write the committed table")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} examples only")
    parser.add_argument("--example", action="append", help="only this example (repeatable)")
    parser.add_argument("--arch", action="append", choices=TARGETS, help="only this target")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    args = parser.parse_args(argv)
    examples = args.example or (QUICK if args.quick else list(EXAMPLES))
    archs = args.arch or list(TARGETS)
    torch.set_num_threads(1)
    todo = binaries(examples, archs)
    figures = measure_all(todo, args.jobs)
    rows = rows_of(todo, figures)
    print_table(rows)
    if args.write:
        write_rows(TABLE, merged(rows))
    if not args.check:
        return 0
    committed = read_table()
    failed = False
    for binary, figure in zip(todo, figures, strict=True):
        for fault in faults(binary, figure, committed.get(binary.key)):
            failed = True
            print(f"FAIL {' / '.join(binary.key)}: {fault}")
    print("budget exceeded" if failed else f"{len(todo)} binaries within the budget")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
