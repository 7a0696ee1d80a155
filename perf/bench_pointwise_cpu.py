"""Pointwise losses on the CPU, forward and backward, as multiples of torch's own BCE.

    python -m perf.bench_pointwise_cpu --out perf/results/pointwise_cpu.csv

1e5 anchors of 80 classes, float32, logits of mean -2 and deviation 1; 1 % of the anchors are
objects, 0.5 % are ignored. One thread. All candidates run in turn, round after round, so that a
change of the machine's speed hits them alike; the ratio is that of the fastest rounds. Each is
first checked against float64.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch
import torch._dynamo
import torch.nn.functional as F

import tritonloss as tl

from ._measure import gate, timed_in_turn, write_rows


def inputs(anchors: int, classes: int):
    """1 % of the anchors are objects, 0.5 % ignored."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(anchors, classes, generator=g) - 2
    order = torch.randperm(anchors, generator=g)
    objects, ignored = order[: anchors // 100], order[-anchors // 200 :]
    labels = torch.full((anchors,), classes)
    labels[objects] = torch.randint(classes, objects.shape, generator=g)
    dense = torch.zeros(anchors, classes)
    dense[objects, labels[objects]] = 1.0
    labels[ignored] = -1
    quality = torch.rand(anchors, generator=g)
    return x.requires_grad_(), labels, quality, dense


def candidates(x, labels, quality, dense) -> dict:
    """name -> (loss, the same in float64)."""
    losses = {
        "focal, labels": (tl.sigmoid_focal_loss, labels),
        "focal gamma=0.5, labels": (tl.sigmoid_focal_loss, labels, {"gamma": 0.5}),
        "focal_star, labels": (tl.focal_star_loss, labels),
        "quality_focal, labels": (tl.quality_focal_loss, (labels, quality)),
        "varifocal, labels": (tl.varifocal_loss, (labels, quality)),
        "focal, dense": (tl.sigmoid_focal_loss, dense),
        "focal_star, dense": (tl.focal_star_loss, dense),
        "quality_focal, dense": (tl.quality_focal_loss, dense),
        "varifocal, dense": (tl.varifocal_loss, dense),
    }
    found = {}
    for name, (function, targets, *hyper) in losses.items():
        kwargs = hyper[0] if hyper else {}

        def call(x=x, f=function, t=targets, k=kwargs):
            return f(x, t, **k)

        found[name] = call
    return found


def check(name, call, x) -> None:
    """A wrong candidate is not timed."""
    reference = x.detach().double().requires_grad_()
    call(reference).backward()
    x.grad = None
    call().backward()
    gate(f"{name}, gradient", x.grad, reference.grad, 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--anchors", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("perf/results/pointwise_cpu.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 100  # one graph per candidate of the same lambda
    x, labels, quality, dense = inputs(options.anchors, options.classes)
    calls = candidates(x, labels, quality, dense)
    for name, call in calls.items():
        check(name, call, x)
    runs = {("bce", "torch"): lambda: F.binary_cross_entropy_with_logits(x, dense)}
    for name, call in calls.items():
        runs[name, "eager"] = call
        runs[name, "compiled"] = torch.compile(lambda c=call: c(), fullgraph=True)
        runs[name, "compiled"]().backward()

    def seconds(run):
        x.grad = None
        start = time.perf_counter()
        run().backward()
        return time.perf_counter() - start

    times = timed_in_turn({k: lambda r=r: seconds(r) for k, r in runs.items()}, options.rounds)
    base = min(times["bce", "torch"])
    machine = {
        "anchors": options.anchors,
        "classes": options.classes,
        "threads": options.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    rows = []
    for (name, provider), found in times.items():
        best, middle = min(found), sorted(found)[len(found) // 2]
        rows.append({
            "loss": name, "provider": provider, "best_ms": f"{1e3 * best:.1f}",
            "median_ms": f"{1e3 * middle:.1f}", "times_bce": f"{best / base:.2f}", **machine,
        })  # fmt: skip
        print(f"{name:26s}{provider:10s}{1e3 * best:>8.1f} ms{best / base:>7.2f} x BCE")
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
