"""What a diagnosis costs beside the loss that it watches: one focal loss, forward and backward.

    python -m perf.bench_diagnose --out perf/results/diagnose_cpu.csv

Logits of the recorded detector, tiled. The counts are checked against the eager path before they
are timed; ratios hold within one run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import tritonloss as tl

from . import baselines
from ._measure import machine, quantiles, timed_in_turn, write_rows
from .workloads import Point, draw


def inputs(rows: int, dtype: str, form: str, device: str):
    """``(logits, targets)``."""
    x, labels, _ = draw(Point(rows, 80, rows // 400, dtype, "recorded"), device)
    return x, labels if form == "labels" else baselines.one_hot(labels, x.detach())


def check(x, targets) -> None:
    """Wrong counts are not timed."""
    found, expected = tl.Diagnosis(), tl.Diagnosis()
    found.update(x, targets)
    with tl.backend("eager"):
        expected.update(x, targets)
    if not torch.equal(found.counts, expected.counts):
        raise SystemExit("the counts differ from those of the eager path")


def measure(rows: int, dtype: str, form: str, device: str) -> list[dict]:
    x, targets = inputs(rows, dtype, form, device)
    check(x, targets)
    diagnosis = tl.Diagnosis()
    diagnosis.update(x, targets)

    def focal():
        return torch.autograd.grad(tl.sigmoid_focal_loss(x, targets), x)

    candidates = {
        "focal, forward + backward": focal,
        "diagnosis, one update": lambda: diagnosis.update(x, targets),
    }
    runs = {name: lambda f=f: quantiles(f, device)[0] for name, f in candidates.items()}
    best = {name: min(times) for name, times in timed_in_turn(runs, 3).items()}
    focal_ms = best["focal, forward + backward"]
    return [
        {
            "anchors": rows, "classes": 80, "dtype": dtype, "targets": form, "what": name,
            "ms": f"{ms:.4g}", "times_focal": f"{ms / focal_ms:.2f}",
            "gbps": f"{x.nbytes / ms / 1e6:.4g}",
        }
        for name, ms in best.items()
    ]  # fmt: skip


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--anchors", type=int, help="default: 1e5 on a CPU, 176000 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    on_gpu = args.device != "cpu"
    rows = [
        row
        for dtype in ("float32", "bfloat16")
        for form in ("labels", "dense")
        for row in measure(
            args.anchors or (176_000 if on_gpu else 100_000), dtype, form, args.device
        )
    ]
    where = machine(args.device)
    write_rows(args.out, [row | where for row in rows])
    for row in rows:
        print(
            *(f"{v!s:>{w}}" for v, w in zip(row.values(), (7, 4, 9, 7, 26, 9, 6, 7), strict=True))
        )


if __name__ == "__main__":
    main()
