"""Lets hosts be imported whose compiled part does not load here: only what training needs.

The wheel of torchvision beside a torch without CUDA cannot load its operators, and mmcv-lite has
none. Where they load, nothing is replaced.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types

import torch
from torch import Tensor

_libraries = []  # what they define ends with them


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than the threshold."""
    sides = (boxes[:, 2:] - boxes[:, :2] + offset).clamp(min=0)
    area = sides.prod(1)
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    inner = (high - low + offset).clamp(min=0).prod(2)
    overlapping = inner > iou_threshold * (area[:, None] + area[None] - inner)
    kept, left = [], torch.ones(len(boxes), dtype=torch.bool)
    for i in scores.argsort(descending=True, stable=True).tolist():
        if left[i]:
            kept.append(i)
            left &= ~overlapping[i]
    return torch.tensor(kept, dtype=torch.long)


def make_torchvision_importable() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or "torchvision" in sys.modules:
        return
    try:
        torch.ops.load_library(os.path.join(os.path.dirname(spec.origin), "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", nms, "CPU")
        _libraries.append(library)
        extension = importlib.import_module("torchvision.extension")
        extension._assert_has_ops = lambda: None  # nms is there


class _Operators(types.ModuleType):
    """Every operator, to be imported; nms alone, to be called."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args, **kwargs):
            raise NotImplementedError(f"mmcv's operator {name} is not compiled here")

        return absent


def make_mmcv_importable() -> None:
    if importlib.util.find_spec("mmcv") is None or importlib.util.find_spec("mmcv._ext"):
        return
    operators = _Operators("mmcv._ext")
    operators.nms = lambda boxes, scores, iou_threshold, offset: nms(
        boxes, scores, iou_threshold, offset
    )
    sys.modules["mmcv._ext"] = operators


def make_hosts_importable() -> None:
    make_torchvision_importable()
    make_mmcv_importable()
