"""Matching cost and criterion on the CPU beside transformers' own; each is checked, then timed.

RT-DETR's matcher and varifocal, L1 and GIoU losses, and with 13 query groups LW-DETR's matcher and
losses: of all layers, the criterion with its backward. The assignment is the same SciPy on both
sides; the cost is timed without it, the step with it. One thread, all candidates in turn, minimum
over the rounds: read the ratios. Random logits and boxes of 2 to 8 images, 100 to 3900 queries, 5
to 100 objects, 2 to 6 layers and 20 to 1203 classes (`SHAPES`).

    python -m perf.bench_detr_cpu
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import RTDetrConfig
from transformers.loss import loss_lw_detr, loss_rt_detr

import tritonloss as tl

from ._measure import gate, machine, peak_tensor_bytes, timed_in_turn, write_rows

WEIGHTS = (1.0, 5.0, 2.0)


class Shape(NamedTuple):
    images: int
    queries: int
    objects: int
    layers: int
    classes: int
    groups: int = 1

    def __str__(self) -> str:
        return "x".join(map(str, self[:5])) + (f" {self.groups} groups" if self.groups > 1 else "")


SHAPES = (
    Shape(2, 100, 5, 2, 20),
    Shape(8, 300, 20, 6, 80),
    Shape(4, 900, 100, 6, 80),
    Shape(2, 300, 50, 3, 1203),
    Shape(2, 3900, 20, 3, 80, 13),
)


class Batch(NamedTuple):
    logits: Tensor  # (L, B, Q, C)
    boxes: Tensor  # (L, B, Q, 4)
    labels: list[Tensor]
    target_boxes: list[Tensor]

    @property
    def targets(self) -> list[dict]:
        pairs = zip(self.labels, self.target_boxes, strict=True)
        return [{"class_labels": labels, "boxes": boxes} for labels, boxes in pairs]

    def layers(self) -> list[dict]:
        """As the host takes them."""
        pairs = zip(self.logits, self.boxes, strict=True)
        return [{"logits": x, "pred_boxes": boxes} for x, boxes in pairs]

    def leaves(self) -> Batch:
        return self._replace(
            logits=self.logits.detach().requires_grad_(), boxes=self.boxes.detach().requires_grad_()
        )


def drawn(shape: Shape) -> Batch:
    def boxes(*sizes):
        return torch.cat([torch.rand(*sizes, 2), torch.rand(*sizes, 2) / 2 + 0.01], -1)

    layers = shape.layers, shape.images, shape.queries
    return Batch(
        torch.randn(*layers, shape.classes) * 2 - 3,
        boxes(*layers),
        [torch.randint(shape.classes, (shape.objects,)) for _ in range(shape.images)],
        [boxes(shape.objects) for _ in range(shape.images)],
    )


class Theirs:
    """The host's matcher and losses, called layer by layer as its criteria do."""

    def __init__(self, shape: Shape):
        self.more = ()
        if shape.groups == 1:
            self.module = loss_rt_detr
            self.losses = loss_rt_detr.RTDetrLoss(RTDetrConfig(num_labels=shape.classes))
            self.matcher = self.losses.matcher
        else:
            self.module, self.more = loss_lw_detr, (shape.groups,)
            self.matcher = loss_lw_detr.LwDetrHungarianMatcher(2, 5, 2)
            self.losses = loss_lw_detr.LwDetrImageLoss(
                self.matcher, shape.classes, 0.25, [], shape.groups
            )
        self.count = float(shape.images * shape.objects * shape.groups)

    def match(self, batch: Batch) -> list:
        return [self.matcher(layer, batch.targets, *self.more) for layer in batch.layers()]

    def cost(self, batch: Batch, keep: bool = False) -> list:
        """Without the solver; the matrices that it would get, which the host drops by layer."""
        seen = []

        def unsolved(cost):
            if keep:
                seen.append(cost)
            return np.arange(0), np.arange(0)

        with mock.patch.object(self.module, "linear_sum_assignment", unsolved):
            self.match(batch)
        return seen

    def loss(self, batch: Batch, indices: list) -> Tensor:
        named = self.losses.loss_labels if self.more else self.losses.loss_labels_vfl
        total = 0
        for layer, found in zip(batch.layers(), indices, strict=True):
            args = layer, batch.targets, found, self.count
            (of_class,) = named(*args).values()
            boxes = self.losses.loss_boxes(*args)
            values = of_class, boxes["loss_bbox"], boxes["loss_giou"]
            total = total + sum(w * v for w, v in zip(WEIGHTS, values, strict=True))
        return total


class Ours:
    def __init__(self, shape: Shape):
        name = "varifocal" if shape.groups == 1 else "iou_aware_bce"
        self.criterion = tl.SetCriterion(name, groups=shape.groups, loss_weights=WEIGHTS)

    def match(self, batch: Batch) -> Tensor:
        return self.criterion.match(*batch)

    def cost(self, batch: Batch) -> Tensor:
        return tl.matching_cost(*batch)

    def loss(self, batch: Batch, indices: Tensor) -> Tensor:
        return self.criterion(*batch, indices=indices)["total"]


def check(shape: Shape, batch: Batch, theirs: Theirs, ours: Ours) -> tuple[list, Tensor]:
    """Costs, assignments, loss and gradients agree; the assignments."""
    cost = ours.cost(batch).unflatten(2, (shape.groups, -1)).movedim(2, 1).flatten(0, 2)
    gate(f"{shape} cost", cost, torch.stack(theirs.cost(batch, keep=True)), 1e-5)
    indices, found = theirs.match(batch), ours.match(batch)
    pairs = found.flatten(2).sort(-1).values
    if shape.groups > 1:  # the host numbers the queries of all groups
        first = torch.arange(shape.groups) * (shape.queries // shape.groups)
        pairs = (found + first[:, None]).flatten(2).sort(-1).values
    want = torch.stack([torch.stack([q.sort().values for q, _ in layer]) for layer in indices])
    if not pairs.equal(want):
        raise SystemExit(f"{shape}: other queries are matched, not timed")
    results = []
    for side, known in ((theirs, indices), (ours, found)):
        leaves = batch.leaves()
        loss = side.loss(leaves, known)
        loss.backward()
        results.append((loss.detach(), leaves.logits.grad, leaves.boxes.grad))
    for name, want, got in zip(("loss", "gradient", "box gradient"), *results, strict=True):
        gate(f"{shape} {name}", got, want, 1e-4)
    return indices, found


def step(side, batch: Batch, indices=None) -> None:
    """Forward and backward; matched before, where there are no indices."""
    leaves = batch.leaves()
    side.loss(leaves, side.match(leaves) if indices is None else indices).backward()


def measured(shape: Shape, rounds: int) -> list[dict]:
    batch, theirs, ours = drawn(shape), Theirs(shape), Ours(shape)
    indices, padded = check(shape, batch, theirs, ours)
    rows = []
    for what, pair in {
        "cost": (lambda: theirs.cost(batch), lambda: ours.cost(batch)),
        "criterion": (lambda: step(theirs, batch, indices), lambda: step(ours, batch, padded)),
        "step": (lambda: step(theirs, batch), lambda: step(ours, batch)),
    }.items():

        def timed(call):
            start = time.process_time()
            call()
            return time.process_time() - start

        sides = dict(zip(("host", "ours"), pair, strict=True))
        times = timed_in_turn({k: lambda f=f: timed(f) for k, f in sides.items()}, rounds)
        best = {k: min(t) for k, t in times.items()}
        peak = {k: peak_tensor_bytes(f) for k, f in sides.items()}
        rows.append(
            {"shape": str(shape), "what": what}
            | {f"{k}_ms": f"{1e3 * s:.2f}" for k, s in best.items()}
            | {"time_ratio": f"{best['ours'] / best['host']:.2f}"}
            | {f"{k}_peak_mib": f"{b / 2**20:.1f}" for k, b in peak.items()}
            | {"peak_ratio": f"{peak['ours'] / max(peak['host'], 1):.2f}"}
        )
        print("  ".join(f"{v:>10}" for v in rows[-1].values()), flush=True)
    return rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("perf/results/detr_cpu.csv"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    where = machine()
    write_rows(args.out, [row | where for s in SHAPES for row in measured(s, args.rounds)])


if __name__ == "__main__":
    main()
