"""A small anchor-free detector with strides 4, 8 and 16, and what turns its outputs into boxes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import tritonloss

STRIDES = (4, 8, 16)


class Grid(NamedTuple):
    """The cells of a level."""

    points: torch.Tensor  # (2, H, W) centres, x and y in pixels
    stride: float


def conv(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    # Batch norm: with group norm the classes are learnt about three times slower here.
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.body = nn.Sequential(conv(n, n), conv(n, n))

    def forward(self, x):
        return x + self.body(x)


class Tower(nn.Module):
    """Convolutions shared by the strides; each stride has its own normalisation."""

    def __init__(self, n: int, depth: int = 2):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n, n, 3, 1, 1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(n) for _ in range(depth)) for _ in STRIDES
        )

    def forward(self, levels):
        towers = []
        for x, norms in zip(levels, self.norms, strict=True):
            for conv, norm in zip(self.convs, norms, strict=True):
                x = F.relu(norm(conv(x)))
            towers.append(x)
        return towers


class Pyramid(nn.Module):
    """Image (B, 3, H, W) -> features (B, channels, ...) at strides 4, 8 and 16, each with the
    coarser ones added."""

    def __init__(self, channels: int):
        super().__init__()
        c = channels
        self.stem = conv(3, c // 2, 2)
        self.stage4 = nn.Sequential(conv(c // 2, c, 2), Residual(c))
        self.stage8 = nn.Sequential(conv(c, c, 2), Residual(c))
        self.stage16 = nn.Sequential(conv(c, c, 2), Residual(c))
        self.lateral = nn.ModuleList(nn.Conv2d(c, c, 1) for _ in range(3))

    def forward(self, images):
        x4 = self.stage4(self.stem(images))
        x8 = self.stage8(x4)
        y16 = self.lateral[2](self.stage16(x8))
        y8 = self.lateral[1](x8) + F.interpolate(y16, scale_factor=2.0)
        return self.lateral[0](x4) + F.interpolate(y8, scale_factor=2.0), y8, y16


class Detector(nn.Module):
    """Image (B, 3, H, W) -> for each level class logits (B, C, h, w) and box outputs
    (B, 4 * (bins + 1), h, w), two lists.

    With ``bins`` 0 the box output is the four distances themselves, (B, 4, h, w). H and W are
    multiples of 16.
    """

    def __init__(self, n_classes: int, bins: int = 8, channels: int = 48, prior: float = 0.01):
        super().__init__()
        c = channels
        self.bins = bins
        self.pyramid = Pyramid(c)
        self.tower = Tower(c)
        self.classify = nn.Conv2d(c, n_classes, 3, padding=1)
        self.regress = nn.Conv2d(c, 4 * (bins + 1), 3, padding=1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.constant_(self.classify.bias, -math.log(1 / prior - 1))
        nn.init.normal_(self.regress.weight, std=0.01)
        nn.init.constant_(self.regress.bias, 0.0 if bins else 2.0)

    def forward(self, images):
        towers = self.tower(self.pyramid(images))
        return [self.classify(t) for t in towers], [self.regress(t) for t in towers]


def cells(height: int, width: int, device=None) -> list[Grid]:
    """The cells of an image, level by level."""
    levels = []
    for stride in STRIDES:
        x, y = ((torch.arange(n // stride, device=device) + 0.5) * stride for n in (width, height))
        levels.append(Grid(torch.stack(torch.meshgrid(x, y, indexing="xy")), float(stride)))
    return levels


def decode(outputs, grids: list[Grid], bins: int):
    """Box outputs (B, 4 * (bins + 1), H, W) of each level to boxes (B, 4, H, W)."""
    if bins:
        distances = tritonloss.distribution_expectation(outputs, sides=4, class_dim=1)
    else:
        distances = [F.softplus(x.float()) for x in outputs]
    boxes = []
    for (points, stride), sides in zip(grids, distances, strict=True):
        sides = sides * stride
        boxes.append(torch.cat([points - sides[:, :2], points + sides[:, 2:]], 1))
    return boxes


def iou_matrix(a, b):
    """IoU of every box in a (n, 4) with every box in b (m, 4)."""
    corner = torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])
    inter = corner.clamp(min=0).prod(-1)
    area_a, area_b = (x[:, 2:].sub(x[:, :2]).clamp(min=0).prod(-1) for x in (a, b))
    return inter / (area_a[:, None] + area_b - inter).clamp(min=1e-9)


def nms(boxes, scores, labels, threshold: float = 0.5):
    """Indices kept by greedy non-maximum suppression within each class, best score first."""
    order = scores.argsort(descending=True, stable=True)
    same = labels[order, None] == labels[order]
    overlaps = ((iou_matrix(boxes[order], boxes[order]) > threshold) & same).cpu().numpy()
    keep = torch.ones(len(order), dtype=torch.bool)
    alive = keep.numpy()
    for i in range(len(order)):
        if alive[i]:
            alive[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[keep.to(order.device)]


@torch.no_grad()
def detect(model: Detector, images, min_score: float = 0.005, candidates: int = 1000):
    """Boxes, scores and labels found in each image of a batch (B, 3, H, W), on the CPU."""
    logits, outputs = model(images)
    grids = cells(*images.shape[-2:], device=images.device)
    boxes, logits = (
        torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)
        for levels in (decode(outputs, grids, model.bins), logits)
    )
    found = []
    for scores, places in zip(logits.sigmoid().float(), boxes, strict=True):
        best, index = scores.flatten().topk(min(candidates, scores.numel()))
        index = index[best > min_score]
        best = best[best > min_score]
        cell, label = index // scores.shape[1], index % scores.shape[1]
        kept = nms(places[cell], best, label)
        found.append(tuple(x[kept].cpu() for x in (places[cell], best, label)))
    return found
