"""GHM and ISR-P on the CPU beside what users run today; each is checked before it is timed.

GHM-C: 1e5 anchors of 80 classes, drawn at random with 5 % of objects, and those of the recorded
detector, repeated; forward and backward, as a multiple of torch's BCE. ISR-P: 100 and 2000
positives, ten an object, as a multiple of ours. Processor time of one thread, all candidates of a
shape in turn, minimum over the rounds: read the ratios.

    python -m perf.bench_ghm_cpu
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import tritonloss as tl
from tritonloss.diagnose import recorded

from ._measure import gate, timed_in_turn, write_rows
from .baselines import ghm_c_loop, isr_p_loop


def logits_like(kind: str, anchors: int, classes: int):
    """``(logits, labels)``: spread ones, or a trained detector's, repeated."""
    if kind == "random":
        x = torch.randn(anchors, classes) * 2 - 2
        labels = torch.randint(classes, (anchors,))
        return x, torch.where(torch.rand(anchors) < 0.95, classes, labels)
    data = np.load(recorded())
    x = torch.from_numpy(data["cls_logits"]).float().flatten(0, 1)
    labels = torch.from_numpy(data["labels"]).long().flatten()
    rows = torch.arange(anchors) % len(x)
    return x[rows].contiguous(), labels[rows]


def step(function, *args):
    """Forward and backward; ``(seconds of this process, loss, gradient)``."""
    x = args[0].detach().requires_grad_()
    start = time.process_time()
    loss = function(x, *args[1:])
    loss.backward()
    return time.process_time() - start, loss.detach(), x.grad


def ghm(kind, anchors, classes, bins, rounds):
    x, labels = logits_like(kind, anchors, classes)
    y = F.one_hot(labels, classes + 1)[:, :classes].float()

    def ours(x, targets):
        return tl.ghm_c_loss(x, targets, bins=bins)

    _, want, want_grad = step(lambda x, y: ghm_c_loop(x, y, bins), x, y)
    for name, targets in (("labels", labels), ("dense", y)):
        _, loss, grad = step(ours, x, targets)
        gate(f"ghm_c {name}", loss, want, 1e-4)  # the loop sums weights in float32
        gate(f"ghm_c {name} gradient", grad, want_grad, 1e-4)
    candidates = {
        "bce": lambda: step(F.binary_cross_entropy_with_logits, x, y)[0],
        "ghm_c labels": lambda: step(ours, x, labels)[0],
        "ghm_c dense": lambda: step(ours, x, y)[0],
        "loop over bins": lambda: step(lambda x, y: ghm_c_loop(x, y, bins), x, y)[0],
    }
    best = {name: min(found) for name, found in timed_in_turn(candidates, rounds).items()}
    shape = f"{anchors}x{classes} {kind} {bins} bins"
    return [(shape, name, s, s / best["bce"]) for name, s in best.items()]


def isr(positives, rounds):
    n_gt, n_classes = max(positives // 10, 1), 20
    gt_index = torch.randint(n_gt, (positives,))
    labels = torch.randint(n_classes, (n_gt,))[gt_index]
    iou, loss = torch.rand(positives), torch.rand(positives) + 0.1
    gate("isr_p", tl.isr_p_weight(loss, iou, gt_index, labels),
         isr_p_loop(loss, iou, gt_index, labels), 1e-5)  # fmt: skip

    def timed(function):
        start = time.process_time()
        function(loss, iou, gt_index, labels)
        return time.process_time() - start

    candidates = {"isr_p": lambda: timed(tl.isr_p_weight), "loops": lambda: timed(isr_p_loop)}
    best = {name: min(found) for name, found in timed_in_turn(candidates, rounds).items()}
    return [(f"{positives} positives", k, s, s / best["isr_p"]) for k, s in best.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--anchors", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--bins", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("perf/results/ghm_cpu.csv"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for kind in ("random", "recorded"):
        rows += ghm(kind, args.anchors, args.classes, args.bins, args.rounds)
    for positives in (100, 2000):
        rows += isr(positives, args.rounds)
    for shape, name, seconds, ratio in rows:
        print(f"{shape:32} {name:16} {seconds * 1e3:9.2f} ms  {ratio:7.2f} x")
    where = {"torch": torch.__version__, "machine": platform.machine() + ", 1 thread"}
    write_rows(args.out, [
        {"shape": shape, "what": name, "cpu_ms": f"{1e3 * seconds:.3f}", "ratio": f"{ratio:.2f}"}
        | where
        for shape, name, seconds, ratio in rows
    ])  # fmt: skip


if __name__ == "__main__":
    main()
