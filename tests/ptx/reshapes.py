"""Reshapes that the compiler may reorder must not meet another operand element by element."""

from __future__ import annotations

import re

LINE = re.compile(r"\s*(?:(%[\w#:]+(?:, %\w+)*) = )?(\"?[\w.]+\"?)(.*)")
UNIFORM = ("tt.splat", "arith.constant")  # the same value everywhere: any order will do


def reordered(mlir: str) -> list[str]:
    """Operations that pair the result of a reshape which may reorder with something else.

    ``mlir`` is Triton's, with or without layouts. What one reshape gave may be computed on, and be
    summed or counted, for that has no order; two of them need not have the same.
    """
    origin: dict[str, str] = {}  # value -> the reshape that it comes from
    uniform: set[str] = set()
    found = []
    for line in mlir.splitlines():
        line = re.sub(r"loc\(.*", "", line)
        m = LINE.match(line)
        if not m or not m[3]:
            continue
        result, name, rest = m[1], m[2].strip('"'), m[3]
        for value in re.findall(r"%\w+", result or ""):  # regions side by side use names again
            origin.pop(value, None)
            uniform.discard(value)
        operands = re.findall(r"%\w+(?:#\d+)?", rest.split(" : ")[0])
        if name == "tt.reshape" and "allow_reorder" in rest:
            origin[result] = result
            continue
        if name in UNIFORM:
            uniform.add(result)
            continue
        origins = {origin.get(o) for o in operands if o not in uniform}
        if origins <= {None}:
            if operands and all(o in uniform for o in operands):
                uniform.add(result)
            continue
        if len(origins) > 1:
            found.append(line.strip())
        elif result and name not in ("tt.reduce", "tt.histogram"):
            origin[result] = next(iter(origins))
    return found
