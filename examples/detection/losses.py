"""Which cell learns what, and the table of losses that the example can be trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

import tritonloss

from .model import Grid, decode

BOX_WEIGHT, DFL_WEIGHT, CARL_WEIGHT = 1.0, 0.25, 0.2
GHM_C_WEIGHT, GHM_R_WEIGHT = 20.0, 0.5
SPAN = 7.0  # a level has the boxes of up to this many strides (root of the area), the last any
BOX_LOSSES = {
    "iou": tritonloss.iou_loss,
    "giou": tritonloss.giou_loss,
    "diou": tritonloss.diou_loss,
    "ciou": tritonloss.ciou_loss,
    "ghm_r": None,  # of all sides at once: see Criterion
}


class Targets(NamedTuple):
    """What each cell should say: lists of levels."""

    labels: list[torch.Tensor]  # (B, H, W) int64: class, C for background, -1 ignored
    boxes: list[torch.Tensor]  # (B, 4, H, W) the box of a positive cell, zeros elsewhere
    gt_index: list[torch.Tensor]  # (B, H, W) int64: which box of the batch, -1 if not positive
    count: torch.Tensor  # () float32: number of positive cells


class Predicted(NamedTuple):
    """What a classification loss may read beside the targets; 0 at cells that are not positive."""

    quality: list[torch.Tensor]  # (B, H, W) IoU of predicted box and target, without gradient
    box_loss: list[torch.Tensor]  # (B, H, W) box loss of each cell, with gradient


@torch.no_grad()
def assign(grids: list[Grid], gt_boxes, gt_labels, n_classes: int, radius: float = 1.5) -> Targets:
    """Centre sampling, as FCOS does it: cells inside a box and within ``radius`` strides of its
    centre, on the level that has the boxes of this size.

    Among several boxes the smallest wins. Cells inside a region to ignore (label -1) that belong
    to no box are ignored.

    Args:
        gt_boxes, gt_labels: (B, M, 4) and (B, M); rows of zeros are padding.
    """
    boxes, teaches = gt_boxes[:, None], gt_labels[:, None] >= 0  # (B, 1, M, 4), (B, 1, M)
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    first = torch.arange(len(gt_boxes), device=gt_boxes.device)[:, None] * gt_boxes.shape[1]
    labels, wanted, gt_index = [], [], []
    low = 0.0
    for points, stride in grids:
        high = (SPAN * stride) ** 2 if stride < grids[-1].stride else torch.inf
        x = points.flatten(1).t()[:, None]  # (H * W, 1, 2)
        inside = torch.minimum(x - boxes[..., :2], boxes[..., 2:] - x).amin(-1) > 0
        near = (x - centre).abs().amax(-1) < radius * stride
        mine = inside & near & teaches & (low < area) & (area <= high)
        smallest, index = torch.where(mine, area, torch.inf).min(-1)  # (B, H * W)
        positive = smallest < torch.inf
        ignored = (inside & ~teaches).any(-1)

        outside = torch.where(ignored, -1, n_classes)
        each = torch.where(positive, gt_labels.gather(1, index), outside)
        target = gt_boxes.gather(1, index[..., None].expand(-1, -1, 4))
        target = torch.where(positive[..., None], target, 0.0)
        labels.append(each.unflatten(1, points.shape[1:]))
        wanted.append(target.transpose(1, 2).unflatten(2, points.shape[1:]))
        gt_index.append(torch.where(positive, index + first, -1).unflatten(1, points.shape[1:]))
        low = high
    count = sum((index >= 0).sum() for index in gt_index).float()
    return Targets(labels, wanted, gt_index, count)


# A classification loss takes the levels of logits (B, C, H, W), the targets and what the boxes
# predict, and returns one value, or a named tuple of values that are added up. One that is called
# `loc` stands for the box loss.


@dataclass(frozen=True)
class Pointwise:
    """A classification loss that is a sum over the logits; --pisa can weight its rows."""

    loss: Callable
    quality: bool = False  # its targets are IoUs, not 0 and 1

    def __call__(self, logits, targets: Targets, predicted: Predicted, **options):
        wanted = (targets.labels, predicted.quality) if self.quality else targets.labels
        options = options or {"avg_factor": targets.count}
        return self.loss(logits, wanted, class_dim=1, **options)


class GradientHarmonising(nn.Module):
    """Keeps running counts: a module, so that they are saved in the checkpoint.

    mmdetection has momentum 0.75 and weight 1. Its batches have some hundred times as many logits
    as ours, where the regions between easy and hard have few and their counts are noise, so ours
    average over more batches. With 30 bins, 300 steps on digits and GIoU, AP40 is 0.35 with
    momentum 0.75 and weight 5, 0.49 with momentum 0.99, 0.68 with weight 20, too; four times the
    batch does as much (0.61 with momentum 0.75, weight 5), fewer bins do not (10: 0.51 with 0.99).
    Focal loss has 0.70.
    """

    def __init__(self, **shared):
        super().__init__()
        self.loss = tritonloss.GHMCLoss(
            bins=30, momentum=0.99, bias_correction=True, class_dim=1, **shared
        )

    def forward(self, logits, targets: Targets, predicted: Predicted):
        return GHM_C_WEIGHT * self.loss(logits, targets.labels)


def rank_sort(logits, targets: Targets, predicted: Predicted, **shared):
    wanted = targets.labels, predicted.quality
    return tritonloss.rank_sort_loss(logits, wanted, class_dim=1, **shared)


def average_precision(logits, targets: Targets, predicted: Predicted, **shared):
    return tritonloss.ap_loss(logits, targets.labels, class_dim=1, **shared)


def alrp(logits, targets: Targets, predicted: Predicted, **shared):
    labels, error = targets.labels, predicted.box_loss
    return tritonloss.alrp_loss(logits, labels, error, class_dim=1, **shared)


@dataclass(frozen=True)
class Recipe:
    """One entry of ``LOSSES``.

    Args:
        help: the line that ``--help`` prints.
        classification: a function as above, or a class of ``nn.Module`` with such a ``forward`` if
            the loss has state.
        box: the default box loss.
        dfl: predict each side as a distribution and train it with the distribution focal loss.
        balance: scale the box loss to the size of the classification loss.
    """

    help: str
    classification: Callable
    box: str = "giou"
    dfl: bool = False
    balance: bool = False


LOSSES = {
    "gfl": Recipe(
        "quality focal + distribution focal + GIoU",
        Pointwise(tritonloss.quality_focal_loss, quality=True),
        dfl=True,
    ),
    "focal": Recipe("sigmoid focal + GIoU", Pointwise(tritonloss.sigmoid_focal_loss)),
    "focal_star": Recipe(
        "FL*, the one-sided form of focal loss, + GIoU", Pointwise(tritonloss.focal_star_loss)
    ),
    "varifocal": Recipe(
        "varifocal + CIoU", Pointwise(tritonloss.varifocal_loss, quality=True), box="ciou"
    ),
    "ghm": Recipe("gradient harmonising: GHM-C + GHM-R", GradientHarmonising, box="ghm_r"),
    "rank_sort": Recipe("Rank & Sort + GIoU, balanced by itself", rank_sort, balance=True),
    "ap": Recipe("average precision (AP) loss + GIoU", average_precision, balance=True),
    "alrp": Recipe("aLRP: ranking and GIoU in one, balanced by itself", alrp, balance=True),
}


class Criterion(nn.Module):
    """The losses of one step: levels in, their sum and a dict of the parts out, all 0-d.

    The losses take the head as it comes, and masks as weights pick the positive cells: no level
    is permuted, concatenated or indexed, and one graph serves every step. A balanced box loss
    counts in the sum with its weight and stands in the dict without. The processes of ``group``
    share a batch, and the trainer averages their gradients: the mean of their losses is that of
    one process with the whole batch.
    """

    def __init__(
        self,
        loss: str = "gfl",
        box: str | None = None,
        bins: int = 8,
        pisa: bool = False,
        group=None,
    ):
        super().__init__()
        recipe = LOSSES[loss]
        make = recipe.classification
        self.group = group
        shared = {} if group is None else {"process_group": group, "gradients_averaged": True}
        if isinstance(make, type):
            make = make(**shared)
        elif shared and not isinstance(make, Pointwise):
            make = partial(make, **shared)
        self.classification = make
        self.box_name = box or recipe.box
        # What a single box is worth to aLRP and CARL, where the box loss is none of single boxes.
        self.box = BOX_LOSSES[self.box_name] or tritonloss.giou_loss
        self.sides = None
        if self.box_name == "ghm_r":
            self.sides = tritonloss.GHMRLoss(
                momentum=0.7, bias_correction=True, class_dim=1, **shared
            )
        self.balance = recipe.balance
        self.diagnosis: tritonloss.Diagnosis | None = None  # counts the logits of each step
        self.pisa = pisa
        self.bins = bins if recipe.dfl else 0

    def forward(self, logits, outputs, grids: list[Grid], targets: Targets):
        count = tritonloss.reduce_avg_factor(targets.count, self.group).clamp(min=1)
        if self.group is not None:
            count = count / self.group.size()
        targets = targets._replace(count=count)
        wanted = targets.boxes
        # Masks as weights, not boxes[positive], which has other rows in each step: that takes 3
        # graph breaks and 9 recompiles (12 graphs) in 8 steps under torch.compile (2.13), masks
        # none (one graph); and on a GPU it waits for the number of rows. Figures:
        # python -m perf.bench_compiled_step
        positive = [index >= 0 for index in targets.gt_index]
        boxes = decode(outputs, grids, self.bins)
        error = self.box(boxes, wanted, weight=positive, reduction="none", class_dim=1)
        with torch.no_grad():
            overlap = tritonloss.iou(boxes, wanted, class_dim=1)
            overlap = [torch.where(*x, 0.0) for x in zip(positive, overlap, strict=True)]
        predicted = Predicted(overlap, error)

        if self.diagnosis is not None:
            self.diagnosis.update(logits, (targets.labels, overlap), class_dim=1)
        weighted = {}
        if self.pisa:
            prime = self._prime_weight(logits, targets, predicted)
            weighted = {"weight": prime, "avg_factor": count}
        values = self.classification(logits, targets, predicted, **weighted)
        losses = values._asdict() if hasattr(values, "_asdict") else {"classification": values}
        box_loss = BOX_WEIGHT * sum(level.sum() for level in error) / count
        if self.sides is not None:
            ours, theirs = (
                [x / grid.stride for x, grid in zip(levels, grids, strict=True)]
                for levels in (boxes, wanted)
            )
            box_loss = GHM_R_WEIGHT * self.sides(ours, theirs, weight=positive)
        box_loss = losses.pop("loc", box_loss)
        total = sum(losses.values())
        if self.balance:
            common = self.mean_over_processes(box_loss)
            total = total + tritonloss.self_balanced_weight(total, common) * box_loss
        else:
            total = total + box_loss
        losses[self.box_name] = box_loss
        if self.bins:
            sides = [self._sides(x, grid) for x, grid in zip(wanted, grids, strict=True)]
            losses["dfl"] = DFL_WEIGHT * tritonloss.distribution_focal_loss(
                outputs,
                sides,
                sides=4,
                weight=[mask[:, None].expand(-1, 4, -1, -1) for mask in positive],
                avg_factor=count,
                class_dim=1,
            )
            total = total + losses["dfl"]
        if self.pisa:
            losses["carl"] = CARL_WEIGHT * tritonloss.carl_loss(
                logits, targets.labels, error, avg_factor=count, class_dim=1
            )
            total = total + losses["carl"]
        return total, losses

    def mean_over_processes(self, x):
        """Without gradient; losses of single processes have the whole batch's as their mean."""
        return tritonloss.reduce_avg_factor(x, self.group, gradients_averaged=True)

    def _sides(self, boxes, grid: Grid):
        """Distances from each cell to the sides of its box, in strides, as far as bins reach."""
        sides = torch.cat([grid.points - boxes[:, :2], boxes[:, 2:] - grid.points], 1)
        return (sides / grid.stride).clamp(0, self.bins)

    @torch.no_grad()
    def _prime_weight(self, logits, targets: Targets, predicted: Predicted):
        """Weight of each cell, high where the box fits best (ISR-P)."""
        each = self.classification(logits, targets, predicted, reduction="none")
        return tritonloss.isr_p_weight(
            each, predicted.quality, targets.gt_index, targets.labels, class_dim=1
        )
