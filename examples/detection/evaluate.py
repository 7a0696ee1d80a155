"""Average precision on held-out scenes, by pycocotools."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .data import IGNORE, Scene, to_tensor


def run(model: nn.Module, detect, scenes: list[Scene], device="cpu", batch: int = 32) -> list:
    """Boxes, scores and labels that ``detect(model, images)`` finds in each scene."""
    found = []
    model.eval()
    start = 0
    while start < len(scenes):
        size = scenes[start].size
        end = start + 1
        while end < min(len(scenes), start + batch) and scenes[end].size == size:
            end += 1
        pad = (0, -size[0] % 16, 0, -size[1] % 16)
        images = torch.stack([to_tensor(scene.image) for scene in scenes[start:end]])
        images = F.pad(images, pad).to(device, memory_format=torch.channels_last)
        found += detect(model, images)
        start = end
    model.train()
    return found


THRESHOLDS = (0.40, *np.arange(0.50, 1.0, 0.05).round(2))


def average_precision(scenes: list[Scene], found: list[tuple], classes: list[str]):
    """``(ap, by class)``: AP at IoU 0.40 and 0.50, COCO's mean over 0.50, 0.55 ... 0.95, and the
    score that gives the best F1 at 0.50; AP of each class, None of one without any box."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    n_classes = len(classes)
    truth, results = [], []
    for image, (scene, (boxes, scores, labels)) in enumerate(zip(scenes, found, strict=True)):
        for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            for category in range(n_classes) if label == IGNORE else [label]:
                truth.append(_entry(image, category, box, iscrowd=int(label == IGNORE)))
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
            results.append(_entry(image, label, box, score=score))
    for number, entry in enumerate(truth):
        entry["id"] = number + 1
    real = {entry["category_id"] for entry in truth if not entry["iscrowd"]}
    if not results or not real:
        named = {
            name: dict.fromkeys(("AP50", "AP50:95"), 0.0 if k in real else None)
            for k, name in enumerate(classes)
        }
        return {"AP40": 0.0, "AP50": 0.0, "AP50:95": 0.0, "score": 1.0}, named

    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(scenes))],
            "annotations": truth,
            "categories": [{"id": k} for k in range(n_classes)],
        }
        data.createIndex()
        judge = COCOeval(data, data.loadRes(results), "bbox")
        judge.params.iouThrs = np.array(THRESHOLDS)
        judge.params.maxDets = [1000]
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, 0]  # thresholds, recalls, classes
    present = precision[0, 0] > -1
    by_class = {}
    for k, name in enumerate(classes):
        at_50, all_over = (float(precision[part, :, k].mean()) for part in (1, slice(1, None)))
        if not present[k]:
            at_50 = all_over = None
        by_class[name] = {"AP50": at_50, "AP50:95": all_over}
    precision = precision[:, :, present]
    recall = judge.params.recThrs[:, None]
    f1 = 2 * precision[1] * recall / (precision[1] + recall + 1e-9)
    scores = judge.eval["scores"][1, :, present, 0, 0]  # classes first: numpy's indexing rule
    best = scores[np.arange(len(scores)), f1.argmax(0)]
    ap40, ap50, *_ = each = precision.mean((1, 2))
    ap = {"AP40": ap40, "AP50": ap50, "AP50:95": each[1:].mean(), "score": np.mean(best)}
    return {name: float(value) for name, value in ap.items()}, by_class


def _entry(image: int, category: int, box, **more) -> dict:
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x1, y1, width, height],
        "area": width * height,
        "iscrowd": 0,
        **more,
    }
