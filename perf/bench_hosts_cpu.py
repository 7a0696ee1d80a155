"""Losses on the CPU beside those of the detectors' libraries, on the calls that their heads make.

Each call is forward and backward of what an integration exchanges: the host's own and ours on the
same inputs, checked, then timed in turn in one process. Time is that of the processor, one thread;
the ratio is the median of those of the rounds. Hosts that are not installed are left out.

    make .venv-hosts/installed && .venv-hosts/bin/python -m perf.bench_hosts_cpu
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._measure import ROOT, gate, machine, timed_in_turn, write_rows

# transformers looks for a package that is called kernels, as our folder is
sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT] + [str(ROOT / "tests" / "hosts")]


class Call(NamedTuple):
    """One exchanged function on one shape."""

    place: str  # as install() returns it
    shape: str
    leaf: Tensor  # gets a gradient
    run: Callable  # (function, leaf) -> loss


def labels_of(n: int, classes: int, positives: int) -> Tensor:
    labels = torch.full((n,), classes)
    labels[torch.randperm(n)[:positives]] = torch.randint(classes, (positives,))
    return labels


def boxes_of(n: int, scale: float = 100.0) -> Tensor:
    corner = torch.rand(n, 2) * scale
    return torch.cat([corner, corner + (torch.rand(n, 2) * 0.5 + 0.05) * scale], 1)


def near(boxes: Tensor) -> Tensor:
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + (torch.rand_like(boxes) - 0.5) * 0.3 * sides


def dense_of(labels: Tensor, classes: int) -> Tensor:
    one_hot = torch.nn.functional.one_hot(labels, classes + 1)[:, :classes]
    return one_hot * torch.rand(len(labels), 1)


def torchvision() -> Iterator[Call]:
    n, classes = 24_000, 91
    dense = dense_of(labels_of(n, classes, 60), classes).ceil()
    focal = "retinanet.sigmoid_focal_loss"
    yield Call(focal, f"{n}x{classes}", torch.randn(n, classes) - 4,
               lambda f, x: f(x, dense, reduction="sum"))  # fmt: skip
    for name in ("generalized", "distance", "complete"):
        for n in (64, 2000):
            boxes = boxes_of(n)
            yield Call(f"_utils.{name}_box_iou_loss", str(n), near(boxes),
                       lambda f, x, boxes=boxes: f(x, boxes, reduction="sum"))  # fmt: skip


def mmdet() -> Iterator[Call]:
    losses = importlib.import_module("mmdet.models.losses")

    def call(kind, name, shape, leaf, *args, **options) -> Call:
        module = getattr(losses, name)(**kind)
        return Call(f"{name}.forward", shape, leaf, lambda f, x: f(module, x, *args, **options))

    for n, positives in ((24_000, 60), (1_000, 5)):
        logits, labels = torch.randn(n, 80) - 4, labels_of(n, 80, positives)
        shape, count, ones = f"{n}x80", float(positives), torch.ones(n)
        yield call({}, "FocalLoss", shape, logits, labels, ones, avg_factor=count)
        pair = labels, torch.rand(n)
        yield call({}, "QualityFocalLoss", shape, logits, pair, ones, avg_factor=count)
        dense = dense_of(labels, 80)
        yield call({}, "VarifocalLoss", shape, logits, dense, avg_factor=count)
        yield call({"bins": 30}, "GHMC", shape, logits, labels, ones)
        sides = torch.randn(n, 4) * 0.1
        yield call({}, "GHMR", f"{n}x4", sides, torch.randn(n, 4) * 0.1, torch.ones(n, 4))
    for rows in (144, 4_000):
        target = torch.rand(rows) * 15.9
        yield call({}, "DistributionFocalLoss", f"{rows}x17", torch.randn(rows, 17), target,
                   torch.rand(rows), avg_factor=4.0)  # fmt: skip
    for n in (36, 2_000):
        boxes = boxes_of(n)
        for name in ("GIoULoss", "DIoULoss", "CIoULoss"):
            yield call({}, name, str(n), near(boxes), boxes, torch.rand(n), avg_factor=1.0)


def transformers() -> Iterator[Call]:
    host = importlib.import_module("transformers")
    from transformers.loss import loss_d_fine, loss_deformable_detr, loss_deimv2, loss_lw_detr
    from transformers.loss.loss_rt_detr import RTDetrLoss

    matcher = loss_deformable_detr.DeformableDetrHungarianMatcher(2, 5, 2)
    criteria = {
        "RTDetrLoss.loss_labels_vfl": RTDetrLoss(host.RTDetrConfig(num_labels=80)),
        "RTDetrLoss.loss_boxes": RTDetrLoss(host.RTDetrConfig(num_labels=80)),
        "DeformableDetrImageLoss.loss_labels": loss_deformable_detr.DeformableDetrImageLoss(
            matcher, 80, 0.25, []
        ),
        "LwDetrImageLoss.loss_labels": loss_lw_detr.LwDetrImageLoss(None, 80, 0.25, [], 1),
        "Deimv2Loss.loss_labels_mal": loss_deimv2.Deimv2Loss(host.Deimv2Config(num_labels=80)),
    }
    images, queries = 4, 300

    def cxcywh(*sizes) -> Tensor:
        return torch.cat([torch.rand(*sizes, 2), torch.rand(*sizes, 2) / 2 + 0.05], -1)

    for objects in (7, 100):
        targets = [
            {"class_labels": torch.randint(80, (objects,)), "boxes": boxes}
            for boxes in cxcywh(images, objects)
        ]
        indices = [
            (torch.randperm(queries)[:objects].sort().values, torch.randperm(objects))
            for _ in range(images)
        ]
        outputs = {
            "logits": torch.randn(images, queries, 80) - 3,
            "pred_boxes": cxcywh(images, queries),
        }
        shape = f"{images}x{queries}x80, {images * objects} objects"
        for name, criterion in criteria.items():
            learns = "pred_boxes" if name.endswith("boxes") else "logits"

            def run(f, x, args=(criterion, outputs, targets, indices), learns=learns):
                criterion, outputs, *rest = args
                return sum(f(criterion, {**outputs, learns: x}, *rest, 28.0).values())

            yield Call(name, shape, outputs[learns], run)
    criterion = loss_d_fine.DFineLoss(host.DFineConfig(num_labels=80))
    for rows in (112, 3_200):
        label, right, weight = torch.rand(rows) * 32, torch.rand(rows), torch.rand(rows)
        yield Call(
            "DFineLoss.unimodal_distribution_focal_loss", f"{rows}x33", torch.randn(rows, 33),
            lambda f, x, a=(label, right, 1 - right, weight): f(criterion, x, *a, avg_factor=28.0),
        )  # fmt: skip


def ultralytics() -> Iterator[Call]:
    host = importlib.import_module("ultralytics.utils.loss")
    for n in (64, 640):
        boxes, dfl = boxes_of(n, 20.0), host.DFLoss(16)
        yield Call("loss.bbox_iou", str(n), near(boxes),
                   lambda f, x, b=boxes: (1 - f(x, b, xywh=False, CIoU=True)).sum())  # fmt: skip
        target = torch.rand(n, 4) * 14.9
        yield Call("DFLoss.__call__", f"{4 * n}x16", torch.randn(4 * n, 16),
                   lambda f, x, dfl=dfl, t=target: f(dfl, x, t).sum())  # fmt: skip


HOSTS = {f.__name__: f for f in (torchvision, mmdet, transformers, ultralytics)}


def scores() -> tuple[Call, Callable, Callable]:
    """The cross entropy of ultralytics' criterion, whose constructor the integration exchanges."""
    ours = importlib.import_module("tritonloss.integrations.ultralytics")._Scores(None)
    logits = torch.randn(8, 2100, 80) - 5
    dense = dense_of(labels_of(8 * 2100, 80, 400), 80).view_as(logits)
    call = Call("v8DetectionLoss.bce", "8x2100x80", logits, lambda f, x: f(x, dense).sum() / 50)
    return call, torch.nn.BCEWithLogitsLoss(reduction="none"), ours


def pairs_of(name: str) -> Iterator[tuple[Call, Callable, Callable]]:
    """Calls of a host with its function and ours."""
    integration = importlib.import_module(f"tritonloss.integrations.{name}")
    places = {str(place): place for place in integration._host._places()}
    for call in HOSTS[name]():
        place = places[call.place]
        theirs = getattr(place.owner(), place.key)
        yield call, theirs, place.make(theirs)
    if name == "ultralytics":
        yield scores()


def gradient(call: Call, function: Callable) -> tuple[Tensor, Tensor]:
    leaf = call.leaf.detach().requires_grad_()
    loss = call.run(function, leaf)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def timed(call: Call, function: Callable, times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        gradient(call, function)
    return (time.process_time() - start) / times


def measured(host: str, call: Call, theirs: Callable, ours: Callable, rounds: int) -> dict:
    want, got = gradient(call, theirs), gradient(call, ours)
    gate(f"{host} {call.place}", got[0], want[0], 1e-4)
    gate(f"{host} {call.place} gradient", got[1], want[1], 1e-3)
    times = max(1, int(0.02 / timed(call, theirs, 1)))
    both = {"host": theirs, "ours": ours}
    found = timed_in_turn({k: lambda f=f: timed(call, f, times) for k, f in both.items()}, rounds)
    ratios = [o / h for o, h in zip(found["ours"], found["host"], strict=True)]
    return {
        "host": f"{host} {importlib.import_module(host).__version__}",
        "loss": call.place,
        "shape": call.shape,
        "host_ms": f"{1e3 * statistics.median(found['host']):.3f}",
        "ours_ms": f"{1e3 * statistics.median(found['ours']):.3f}",
        "ratio": f"{statistics.median(ratios):.2f}",
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "hosts_cpu.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp()  # ultralytics writes there when imported
    importlib.import_module("shims").make_hosts_importable()
    rows = []
    for host in HOSTS:
        if importlib.util.find_spec(host) is None:
            print(f"{host} is not installed")
            continue
        torch.manual_seed(0)
        for call, theirs, ours in pairs_of(host):
            rows.append(measured(host, call, theirs, ours, args.rounds))
            print(*list(rows[-1].values())[:6], flush=True)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
