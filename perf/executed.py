"""What kernels execute on reference inputs: ``python -m perf.executed``.

The interpreter of ``tests/ptx`` runs the PTX of sm_90 and counts. Per logit (per pair of positives
for the passes over pairs): instructions of a thread, by class; bytes of the 32-byte sectors that
warps load and store, and the share of them that the warps asked for; atomics. Per launch: the
largest number of atomics at one address, and barriers of a warp.

Without an option the table is printed; ``--write`` puts it into ``results/executed.csv``;
``--check`` compares with that file and exits 1 where a figure grew by more than a tenth. It says
nothing about time.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import tritonloss as tl
from tritonloss.diagnose import recorded

from ._measure import ROOT, write_rows
from .budget import TRITON, print_table, title

TABLE = Path(__file__).parent / "results" / "executed.csv"
ARCH = "sm_90"
SLACK = 1.1
PAIRS = ("order_kernel", "merge_kernel")  # per pair of positives
CLASSES = {  # of opcodes; the first that fits
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
SHOWN = [name for name in CLASSES if name not in ("atomic", "barrier")]  # of a logit or pair
INPUTS = ("recorded", "random", "constant")


def logits_of(kind: str, rows: int, classes: int) -> torch.Tensor:
    """Of a trained detector, of none, of one before its first step."""
    g = torch.Generator().manual_seed(0)
    if kind == "recorded":
        pool = torch.from_numpy(np.load(recorded())["cls_logits"]).float().flatten()
        return pool[torch.randint(len(pool), (rows, classes), generator=g)]
    x = torch.randn(rows, classes, generator=g)
    return 3 * x if kind == "random" else 0 * x - 4.6


def labels_of(rows: int, classes: int, positives: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    labels = torch.full((rows,), classes)
    labels[torch.randperm(rows, generator=g)[:positives]] = torch.randint(
        classes, (positives,), generator=g
    )
    return labels


def diagnosed(x, labels):
    diagnosis = tl.Diagnosis()
    diagnosis.update(x.detach(), labels)


def matched(x, labels, quality):
    """800 queries of two images with 20 objects each: a pair for every four logits."""
    boxes = torch.cat([quality[:800, None].expand(-1, 2), quality[:800, None].expand(-1, 2) / 4], 1)
    objects = labels[labels < x.shape[1]].unflatten(0, (2, -1))
    places = boxes[: objects.numel()].unflatten(0, (2, -1)) + 0.05
    tl.matching_cost(x[:800].unflatten(0, (2, -1)), boxes.unflatten(0, (2, -1)), objects, places)


# Five levels of 80 classes, and all of their rows
SIDES = (56, 28, 14, 7, 4)
ROWS = sum(side**2 for side in SIDES)


def of_head(loss: Callable) -> Callable:
    """The rows as levels ``(1, C, H, W)``, read where they lie."""

    def levels(t, *channels):
        pairs = zip(t.split([side**2 for side in SIDES]), SIDES, strict=True)
        return [part.reshape(1, *channels, side, side) for part, side in pairs]

    def call(x, t, q):
        return loss(levels(x, x.shape[-1]), levels(t), levels(q), class_dim=1)

    return call


def focal(x, t, q, **options):
    return tl.sigmoid_focal_loss(x, t, **options)


def quality_focal(x, t, q, **options):
    return tl.quality_focal_loss(x, (t, q), **options)


def ghm_c(x, t, q, **options):
    return tl.ghm_c_loss(x, t, **options)


# name -> (call of logits, labels and qualities; rows; classes; numbers of positives)
LOSSES: dict[str, tuple[Callable, int, int, tuple[int, ...]]] = {
    "focal": (focal, 801, 80, (40,)),
    "quality_focal": (quality_focal, 801, 80, (40,)),
    "varifocal": (lambda x, t, q: tl.varifocal_loss(x, (t, q)), 801, 80, (40,)),
    "ghm_c": (ghm_c, 801, 80, (40,)),
    "softmax_focal": (
        lambda x, t, q: tl.softmax_focal_loss(x, torch.where(t == 80, -1, t)), 801, 80, (400,),
    ),
    "distribution_focal": (
        lambda x, t, q: tl.distribution_focal_loss(x, 16 * q), 2001, 17, (0,),
    ),
    "rank_sort": (lambda x, t, q: sum(tl.rank_sort_loss(x, (t, q))), 2001, 20, (200, 1600)),
    "matching": (matched, 801, 80, (40,)),
    "diagnose": (lambda x, t, q: diagnosed(x, t), 801, 80, (40,)),
    "focal of a head": (of_head(focal), ROWS, 80, (200,)),
    "focal of its rows": (focal, ROWS, 80, (200,)),
    "quality_focal of a head": (of_head(quality_focal), ROWS, 80, (200,)),
    "quality_focal of its rows": (quality_focal, ROWS, 80, (200,)),
    "ghm_c of a head": (of_head(ghm_c), ROWS, 80, (200,)),
    "ghm_c of its rows": (ghm_c, ROWS, 80, (200,)),
}  # fmt: skip


def class_of(opcode: str) -> str:
    return next(c for c, pattern in CLASSES.items() if re.fullmatch(pattern, opcode))


def rows_of(name: str, kind: str, positives: int) -> list[dict]:
    """One row per kernel: what it executed."""
    sys.path.insert(0, str(ROOT / "tests"))
    from ptx.harness import interpreted

    call, n_rows, classes, _ = LOSSES[name]
    x = logits_of(kind, n_rows, classes).requires_grad_()
    quality = torch.rand(n_rows, generator=torch.Generator().manual_seed(2))
    with interpreted(ARCH, counted=True) as interpreter:
        loss = call(x, labels_of(n_rows, classes, positives), quality)
        if loss is not None:
            loss.backward()
    sums: dict[str, Counter] = {}
    hottest: Counter[str] = Counter()
    for executed in interpreter.executed:
        kernel = title(executed.launch)
        counts = sums.setdefault(kernel, Counter())
        for opcode, n in executed.opcodes.items():
            counts[class_of(opcode)] += n
        counts.update(executed.memory)
        hottest[kernel] = max(hottest[kernel], executed.hottest)
    out = []
    for kernel, counts in sums.items():
        pairs = kernel.split()[0] in PAIRS
        work = positives**2 if pairs else x.numel()
        row = {"loss": name, "inputs": kind, "positives": positives, "kernel": kernel,
               "per": "pair" if pairs else "logit"}  # fmt: skip
        row |= {c: f"{32 * counts[c] / work:.4g}" for c in SHOWN}
        for what in ("load", "store"):
            moved = 32 * counts[f"{what} sectors"]
            row[f"{what} bytes"] = f"{moved / work:.4g}"
            row[f"{what} share"] = f"{counts[f'{what} bytes'] / max(moved, 1):.3g}"
        row["atomics"] = f"{counts['atomics'] / work:.4g}"
        out.append(row | {"hottest": hottest[kernel], "barriers": counts["barrier"],
                          "triton": TRITON})  # fmt: skip
    return out


def measured(losses=LOSSES) -> list[dict]:
    return [
        row
        for name in losses
        for kind in INPUTS
        for positives in LOSSES[name][3]
        for row in rows_of(name, kind, positives)
    ]


def key(row: dict) -> tuple:
    return tuple(str(row[k]) for k in ("loss", "inputs", "positives", "kernel"))


def read_table() -> dict[tuple, dict]:
    with TABLE.open(newline="") as file:
        return {key(row): row for row in csv.DictReader(file)}


def grown(row: dict, before: dict | None) -> list[str]:
    """Figures that are worse than committed."""
    if before is None:
        return ["not in the committed table: python -m perf.executed --write"]
    if before["triton"] != row["triton"]:
        return []
    names = (*SHOWN, "load bytes", "store bytes", "atomics", "hottest", "barriers")
    return [
        f"{name} {row[name]}, {before[name]} before"
        for name in names
        # hundredths of an instruction for each logit are no news
        if float(row[name]) > SLACK * float(before[name]) + 0.05
    ]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure grew")
    parser.add_argument("--write", action="store_true", help="write the committed table")
    parser.add_argument("--loss", action="append", choices=LOSSES, help="only this (repeatable)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = measured(args.loss or LOSSES)
    print_table(rows)
    if args.write:
        kept = {k: r for k, r in (read_table() if TABLE.exists() else {}).items()
                if args.loss and k[0] not in args.loss}  # fmt: skip
        order = list(LOSSES)
        write_rows(TABLE, sorted([*kept.values(), *rows], key=lambda r: order.index(r["loss"])))
    if not args.check:
        return 0
    committed, failed = read_table(), False
    for row in rows:
        for fault in grown(row, committed.get(key(row))):
            failed = True
            print(f"FAIL {' / '.join(key(row))}: {fault}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
