"""Costs, assignments and losses of transformers' detectors: theirs and ours on the same batch."""

from __future__ import annotations

import pytest
import torch

import tritonloss as tl
from tritonloss._dispatch import INTERPRET

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("PIL", reason="pillow is not installed")
if INTERPRET:
    pytest.skip("says the same in the plain run", allow_module_level=True)

from transformers import DFineConfig, RTDetrConfig
from transformers.loss import (
    loss_d_fine,
    loss_deformable_detr,
    loss_for_object_detection,
    loss_rt_detr,
)

# float64 in the host: it takes differences from 1 that float32 rounds
SIZES = [4, 0, 1, 9]
QUERIES, CLASSES = 30, 12


def batch(seed, columns=CLASSES):
    g = torch.Generator().manual_seed(seed)

    def boxes(*shape):
        place = torch.rand(*shape, 2, generator=g, dtype=torch.float64)
        size = torch.rand(*shape, 2, generator=g, dtype=torch.float64) / 2 + 0.01
        return torch.cat([place, size], -1)

    images = len(SIZES)
    logits = torch.randn(images, QUERIES, columns, generator=g, dtype=torch.float64) * 3
    outputs = {"logits": logits.requires_grad_(), "pred_boxes": boxes(images, QUERIES)}
    outputs["pred_boxes"].requires_grad_()
    targets = [
        {"class_labels": torch.randint(0, CLASSES, (n,), generator=g), "boxes": boxes(n)}
        for n in SIZES
    ]
    return outputs, targets


def ours_of(outputs, targets):
    labels = [t["class_labels"] for t in targets]
    return outputs["logits"], outputs["pred_boxes"], labels, [t["boxes"] for t in targets]


# module of the matcher, its instance, our class cost
MATCHERS = {
    "rt_detr": lambda: (loss_rt_detr, loss_rt_detr.RTDetrHungarianMatcher(RTDetrConfig()), "focal"),
    "d_fine": lambda: (loss_rt_detr, loss_d_fine.DFineLoss(DFineConfig()).matcher, "focal"),
    "deformable_detr": lambda: (
        loss_deformable_detr,
        loss_deformable_detr.DeformableDetrHungarianMatcher(2, 5, 2),
        "focal",
    ),
    "detr": lambda: (
        loss_for_object_detection, loss_for_object_detection.HungarianMatcher(2, 5, 2), "softmax",
    ),
}  # fmt: skip


@pytest.mark.parametrize("host", MATCHERS)
@pytest.mark.parametrize("seed", range(3))
def test_cost_and_assignment(host, seed, monkeypatch):
    module, matcher, class_cost = MATCHERS[host]()
    outputs, targets = batch(seed)
    recorded, solve = [], module.linear_sum_assignment

    def record(cost):
        recorded.append(torch.as_tensor(cost))
        return solve(cost)

    monkeypatch.setattr(module, "linear_sum_assignment", record)
    indices = matcher(outputs, targets)
    cost = tl.matching_cost(*ours_of(outputs, targets), class_cost=class_cost)
    assert len(recorded) == len(SIZES)
    for i, (n, theirs) in enumerate(zip(SIZES, recorded, strict=True)):
        torch.testing.assert_close(cost[i, :, :n], theirs.double(), rtol=1e-6, atol=1e-6)
    single = {k: v.detach().float() for k, v in outputs.items()}
    objects = [{**t, "boxes": t["boxes"].float()} for t in targets]
    narrow = tl.matching_cost(*ours_of(single, objects), class_cost=class_cost)
    for found in (tl.assign(cost, torch.tensor(SIZES)), tl.assign(narrow, torch.tensor(SIZES))):
        for row, (queries, matched) in zip(found, indices, strict=True):
            assert row[matched].equal(queries) and (row >= 0).sum() == len(queries)


def close_with_gradients(theirs, ours, outputs):
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name][0], value, rtol=1e-6, atol=1e-7)
        inputs = [outputs["logits"], outputs["pred_boxes"]]
        pair = [
            torch.autograd.grad(v.sum(), inputs, retain_graph=True, allow_unused=True)
            for v in (value, ours[name])
        ]
        for a, b in zip(*pair, strict=True):
            if a is None:
                assert b is None or not b.any()
            else:
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)


def criterion_of(loss, outputs, targets):
    logits, boxes, labels, target_boxes = ours_of(outputs, targets)
    return tl.SetCriterion(loss)(logits[None], boxes[None], labels, target_boxes)


RT_DETR_LOSSES = {
    "rt_detr": lambda: loss_rt_detr.RTDetrLoss(RTDetrConfig(num_labels=CLASSES)),
    "d_fine": lambda: loss_d_fine.DFineLoss(DFineConfig(num_labels=CLASSES)),
}


@pytest.mark.parametrize("name", RT_DETR_LOSSES)
def test_losses_of_rt_detr(name):
    outputs, targets = batch(7)
    host = RT_DETR_LOSSES[name]().double()
    indices, n = host.matcher(outputs, targets), sum(SIZES)
    named = host.loss_labels_vfl(outputs, targets, indices, n)["loss_vfl"]
    boxes = host.loss_boxes(outputs, targets, indices, n)
    theirs = {"class": named, "l1": boxes["loss_bbox"], "giou": boxes["loss_giou"]}
    close_with_gradients(theirs, criterion_of("varifocal", outputs, targets), outputs)


def test_losses_of_deformable_detr():
    outputs, targets = batch(8)
    _, matcher, _ = MATCHERS["deformable_detr"]()
    host = loss_deformable_detr.DeformableDetrImageLoss(matcher, CLASSES, 0.25, [])
    indices, n = matcher(outputs, targets), sum(SIZES)
    named = host.loss_labels(outputs, targets, indices, n)["loss_ce"]
    boxes = host.loss_boxes(outputs, targets, indices, n)
    theirs = {"class": named, "l1": boxes["loss_bbox"], "giou": boxes["loss_giou"]}
    close_with_gradients(theirs, criterion_of("focal", outputs, targets), outputs)


def test_losses_of_detr():
    outputs, targets = batch(9, CLASSES + 1)
    _, matcher, _ = MATCHERS["detr"]()
    host = loss_for_object_detection.ImageLoss(matcher, CLASSES, 0.1, []).double()
    indices, n = matcher(outputs, targets), sum(SIZES)
    named = host.loss_labels(outputs, targets, indices, n)["loss_ce"]
    boxes = host.loss_boxes(outputs, targets, indices, n)
    theirs = {"class": named, "l1": boxes["loss_bbox"], "giou": boxes["loss_giou"]}
    close_with_gradients(theirs, criterion_of("softmax", outputs, targets), outputs)
