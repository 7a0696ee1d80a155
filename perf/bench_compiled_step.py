"""The losses of one training step under torch.compile: masks as weights beside chosen rows.

The example's head of three levels, quality focal, distribution focal and GIoU loss. Masks: what
`examples/train_detector.py` does. Rows: permute and cat, then `boxes[positive]`, as most training
code does. Both have the same value. Counted over some steps with other numbers of objects: breaks
of the graph, graphs, recompiles. Timed, forward and backward to the head, one thread: a step as it
is and compiled (least processor time of the rounds).

    python -m perf.bench_compiled_step
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

import tritonloss as tl

from ._measure import ROOT, gate, machine, timed_in_turn, write_rows

sys.path.insert(0, str(ROOT / "examples"))

from detection import data, losses, model

SIDE = 160  # pixels of a crop of the trees


def by_masks():
    return losses.Criterion("gfl")


def by_rows():
    """The same losses of the positive rows of one tensor."""

    def criterion(logits, outputs, grids, targets):
        logits, outputs, labels, boxes = map(
            joined, (logits, outputs, targets.labels, targets.boxes)
        )
        positive = (labels >= 0) & (labels < logits.shape[1])
        boxes, outputs, count = boxes[positive], outputs[positive], targets.count.clamp(min=1)
        points, strides = (each[positive] for each in of_rows(grids, len(targets.labels[0])))
        sides = tl.distribution_expectation(outputs, sides=4) * strides
        found = torch.cat([points - sides[:, :2], points + sides[:, 2:]], 1)
        quality = torch.zeros_like(logits[:, 0])
        quality[positive] = tl.iou(found, boxes).detach()
        wanted = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], 1) / strides
        parts = {
            "classification": tl.quality_focal_loss(logits, (labels, quality), avg_factor=count),
            "giou": losses.BOX_WEIGHT * tl.giou_loss(found, boxes, avg_factor=count),
            "dfl": losses.DFL_WEIGHT
            * tl.distribution_focal_loss(outputs, wanted.clamp(0, 8), sides=4, avg_factor=count),
        }
        return sum(parts.values()), parts

    return criterion


def joined(levels) -> torch.Tensor:
    """(n, C) or (n,) of all levels."""
    if levels[0].dim() == 4:
        levels = [level.movedim(1, -1) for level in levels]
    return torch.cat([level.flatten(0, 2) for level in levels])


def of_rows(grids, images: int):
    """Centres and strides of all cells, in the order of the rows."""
    points = joined([grid.points.expand(images, -1, -1, -1) for grid in grids])
    strides = [torch.full_like(grid.points[:1], grid.stride) for grid in grids]
    return points, joined([stride.expand(images, -1, -1, -1) for stride in strides])


WAYS = {"masks": by_masks, "rows": by_rows}


def steps(count: int, images: int) -> list[tuple]:
    """Outputs of a new detector and targets, other ones in each step."""
    torch.manual_seed(0)
    dataset, grids = data.trees(), model.cells(SIDE, SIDE)
    network = model.Detector(len(dataset.classes), 8, 16)
    found = []
    for seed in range(count):
        pixels, boxes, labels = dataset.batch(np.random.default_rng(seed), images)
        with torch.no_grad():
            head = network(pixels.contiguous(memory_format=torch.channels_last))
        found.append((*head, grids, losses.assign(grids, boxes, labels, len(dataset.classes))))
    return found


def step(criterion, logits, outputs, grids, targets) -> torch.Tensor:
    leaves = [[x.detach().requires_grad_() for x in levels] for levels in (logits, outputs)]
    total, _ = criterion(*leaves, grids, targets)
    total.backward()
    return total.detach()


def graphs(criterion, of_steps: list[tuple]) -> dict[str, int]:
    """What Dynamo makes of some steps; it runs what it captured as it is."""
    utils = torch._dynamo.utils
    torch._dynamo.reset()
    utils.counters.clear()
    utils.clear_compilation_metrics()
    compiled = torch.compile(criterion, backend="eager")
    for one in of_steps:
        step(compiled, *one)
    found = utils.get_compilation_metrics()
    counted = {
        "graph_breaks": sum(utils.counters["graph_break"].values()),
        "graphs": utils.counters["stats"]["unique_graphs"],
        "recompiles": sum(not metrics.compile_id.endswith("/0") for metrics in found),
    }
    torch._dynamo.reset()
    return counted


def timed(images: int, rounds: int) -> dict[str, dict[str, str]]:
    every = steps(rounds, images)
    waiting = {}
    for way, make in WAYS.items():
        for kind, function in (("eager", make()), ("compiled", torch.compile(make()))):
            waiting[way, kind] = function
            for one in every:  # what compiles again does so before the clock runs
                step(function, *one)

    def time_of(function) -> float:
        start = time.process_time()
        for one in every:
            step(function, *one)
        return (time.process_time() - start) / len(every)

    times = timed_in_turn({k: lambda f=f: time_of(f) for k, f in waiting.items()}, rounds)
    return {
        way: {f"{kind}_ms": f"{1e3 * min(times[way, kind]):.1f}" for kind in ("eager", "compiled")}
        for way in WAYS
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of which graphs are counted")
    parser.add_argument("--out", type=Path, default=Path("perf/results/compiled_step_cpu.csv"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    every = steps(args.steps, args.images)
    masks, rows = (torch.stack([step(make(), *one) for one in every]) for make in WAYS.values())
    gate("rows", rows, masks, 1e-5)
    times = timed(args.images, args.rounds)
    found = []
    for way, make in WAYS.items():
        row = {"positives": way, "steps": args.steps, **graphs(make(), every), **times[way]}
        found.append({**row, **machine()})
        print("  ".join(f"{k} {v}" for k, v in found[-1].items()), flush=True)
    write_rows(args.out, found)


if __name__ == "__main__":
    main()
