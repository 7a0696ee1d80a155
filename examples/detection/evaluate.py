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


def average_precision(scenes: list[Scene], found: list[tuple], n_classes: int) -> dict:
    """AP at IoU 0.40 and 0.50, and the score that gives the best F1 at 0.50."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = [], []
    for image, (scene, (boxes, scores, labels)) in enumerate(zip(scenes, found, strict=True)):
        for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            for category in range(n_classes) if label == IGNORE else [label]:
                truth.append(_entry(image, category, box, iscrowd=int(label == IGNORE)))
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
            results.append(_entry(image, label, box, score=score))
    for number, entry in enumerate(truth):
        entry["id"] = number + 1
    if not results:
        return {"AP40": 0.0, "AP50": 0.0, "score": 1.0}

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
        judge.params.iouThrs = np.array([0.40, 0.50])
        judge.params.maxDets = [1000]
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, 0]  # thresholds, recalls, classes
    present = precision[0, 0] > -1
    if not present.any():
        return {"AP40": 0.0, "AP50": 0.0, "score": 1.0}
    precision = precision[:, :, present]
    recall = judge.params.recThrs[:, None]
    f1 = 2 * precision[1] * recall / (precision[1] + recall + 1e-9)
    scores = judge.eval["scores"][1, :, present, 0, 0]  # classes first: numpy's indexing rule
    best = scores[np.arange(len(scores)), f1.argmax(0)]
    ap40, ap50 = precision.mean((1, 2))
    return {"AP40": float(ap40), "AP50": float(ap50), "score": float(np.mean(best))}


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
