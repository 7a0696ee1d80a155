"""Figures of docs/compiled.md: ``python -m perf.compiled [--arch sm_90] [--mutants 6]``.

All examples on interpreted PTX against float64 eager; then two kernels with one edit of their PTX
at a time, and how many of the edits the checks notice.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

from . import _examples

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

# What an edit does to a line that it fits. Guards of shared stores are left alone (the lanes hold
# one value after a butterfly); a butterfly over lane 3 for 1 or 2 would reach the same lanes.
EDITS = {
    "guard dropped": (r"@!?%p\d+ (?=(ld|st|atom|red)\.global)", ""),
    "barrier dropped": (r"bar\.sync\s+0;", ""),
    "operands swapped": (r"((?:sub|setp\.[lg][te])\S*\s+\S+, )(\S+), ([^,;]+);", r"\1\3, \2;"),
    "comparison": (r"setp\.lt", "setp.le"),
    "shuffle": (r"(shfl\.sync\.bfly\.b32\s+\S+, \S+), \d+,", r"\1, 0,"),
    "store elsewhere": (r"(st\.global[^;]*)\+ 0 \]", r"\1+ 16 ]"),
}
MUTATED = {"focal": "pointwise_kernel", "rank_sort": "negatives_kernel"}
TRAP = "st.global.b32 [ 0 + 0 ], 0; "
ROWS = (201, 7, 75)  # a guard may hold for all threads of one size


def errors_by_dtype(arch: str) -> None:
    from test_ptx import example_errors

    worst = defaultdict(lambda: [0, 0, 0.0, 0.0, 0.0])
    for example in _examples.EXAMPLES:
        start = time.perf_counter()
        found = example_errors(example, arch)
        row = worst[str(found["dtype"]).removeprefix("torch.")]
        row[0] += 1
        row[1] += len(found["interpreter"].executed)
        row[2] += time.perf_counter() - start
        row[3], row[4] = max(row[3], found["value"]), max(row[4], found["gradient"])
    print("| target | dtype | examples | launches | s | value | gradient |")
    print("|---|---|---|---|---|---|---|")
    for dtype, (n, launches, seconds, value, gradient) in worst.items():
        figures = f"{n} | {launches} | {seconds:.0f} | {value:.1e} | {gradient:.1e}"
        print(f"| {arch} | {dtype} | {figures} |")


def verdict(example: str, rows: int, edit) -> str:
    from ptx.parser import Fault
    from test_ptx import TOLERANCE, VALUE_TOLERANCE, example_errors

    try:
        found = example_errors(example, "sm_90", rows, edit=edit)
    except Fault:
        return "fault"
    except AssertionError:
        return "wrong"
    right = found["value"] <= VALUE_TOLERANCE
    right &= found["gradient"] <= TOLERANCE[torch.float32]
    return "survived" if right else "wrong"


def noticed(example: str, kernel: str, most: int) -> None:
    """A mutant is one edit in the binary of the first launch of the kernel, where it runs."""
    from test_ptx import example_errors

    seen: list[str] = []

    def remember(name, ptx):
        seen.extend([ptx] * (name == kernel and not seen))
        return ptx

    def found(mutant: str) -> str:
        def swap(name, ptx):
            return mutant if ptx == original else ptx

        verdicts = (verdict(example, rows, swap) for rows in ROWS)
        return next((v for v in verdicts if v != "survived"), "survived")

    example_errors(example, "sm_90", edit=remember)
    original, draw = seen[0], random.Random(0)
    for what, (pattern, new) in EDITS.items():
        places = list(re.finditer(pattern, original))
        draw.shuffle(places)
        counts: Counter[str] = Counter()
        for m in places:
            head, tail = original[: m.start()], original[m.end() :]
            if counts.total() == most:
                break
            if found(head + TRAP + m[0] + tail) == "fault":  # else it never runs
                counts[found(head + m.expand(new) + tail)] += 1
        figures = " | ".join(str(counts[v]) for v in ("fault", "wrong", "survived"))
        print(f"| {kernel} | {what} | {figures} |", flush=True)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="repeatable; sm_90 if not given")
    parser.add_argument("--mutants", type=int, default=6, help="edits of each kind, 0 for none")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for arch in args.arch or ["sm_90"]:
        errors_by_dtype(arch)
    if args.mutants:
        print("\n| kernel | edit | fault | wrong result | survived |\n|---|---|---|---|---|")
        for example, kernel in MUTATED.items():
            noticed(example, kernel, args.mutants)


if __name__ == "__main__":
    main()
