"""Which cell learns what, and the table of losses that the example can be trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

import tritonloss

from .model import decode

BOX_WEIGHT, DFL_WEIGHT, CARL_WEIGHT = 1.0, 0.25, 0.2
GHM_C_WEIGHT, GHM_R_WEIGHT = 5.0, 0.5
LARGE = 28.0  # boxes larger than this (root of the area, pixels) belong to stride 8
BOX_LOSSES = {
    "iou": tritonloss.iou_loss,
    "giou": tritonloss.giou_loss,
    "diou": tritonloss.diou_loss,
    "ciou": tritonloss.ciou_loss,
    "ghm_r": None,  # of all sides at once: see Criterion
}


class Targets(NamedTuple):
    """What each cell should say."""

    labels: torch.Tensor  # (B, N) int64: class, C for background, -1 ignored
    boxes: torch.Tensor  # (B, N, 4) the box of a positive cell, zeros elsewhere
    gt_index: torch.Tensor  # (B, N) int64: which box of the batch, -1 where not positive
    count: torch.Tensor  # () float32: number of positive cells
    rows: torch.Tensor  # (K,) int64: cells of the batch, flattened, that the box losses read


class Predicted(NamedTuple):
    """What a classification loss may read beside the targets; 0 at cells that are not positive."""

    quality: torch.Tensor  # (B, N) IoU of the predicted box with its target, without gradient
    box_loss: torch.Tensor  # (B, N) box loss of each cell, with gradient


@torch.no_grad()
def assign(
    points, strides, gt_boxes, gt_labels, n_classes: int, every: bool = False, radius: float = 1.5
) -> Targets:
    """Centre sampling: cells inside a box and within ``radius`` strides of its centre.

    Among several boxes the smallest wins. Cells inside a region to ignore (label -1) that belong
    to no box are ignored.

    Args:
        points, strides: centres (N, 2) and strides (N,) of the cells.
        gt_boxes, gt_labels: (B, M, 4) and (B, M); rows of zeros are padding.
        every: ``rows`` are all cells, so that no shape depends on the data (to compile, and to
            spare a GPU the wait); otherwise the positive cells alone, which is faster on a CPU.
    """
    x, boxes = points[:, None], gt_boxes[:, None]  # (N, 1, 2), (B, 1, M, 4)
    inside = torch.minimum(x - boxes[..., :2], boxes[..., 2:] - x).amin(-1) > 0
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    near = (x - centre).abs().amax(-1) < radius * strides[:, None]
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    level = (area > LARGE**2) == (strides[:, None] > strides.min())
    teaches = gt_labels[:, None] >= 0
    area = torch.where(inside & near & level & teaches, area, torch.inf)
    smallest, index = area.min(-1)  # (B, N)
    positive = smallest < torch.inf
    ignored = (inside & ~teaches).any(-1)

    outside = torch.where(ignored, -1, n_classes)
    labels = torch.where(positive, gt_labels.gather(1, index), outside)
    targets = gt_boxes.gather(1, index[..., None].expand(-1, -1, 4))
    targets = torch.where(positive[..., None], targets, 0.0)
    offset = torch.arange(len(gt_boxes), device=index.device)[:, None] * gt_boxes.shape[1]
    gt_index = torch.where(positive, index + offset, -1)
    flat = positive.flatten()
    rows = torch.arange(len(flat), device=flat.device) if every else flat.nonzero()[:, 0]
    return Targets(labels, targets, gt_index, positive.sum().float(), rows)


# A classification loss takes the logits (B, N, C), the targets and what the boxes predict, and
# returns one value, or a named tuple of values that are added up. One that is called `loc` stands
# for the box loss.


@dataclass(frozen=True)
class Pointwise:
    """A classification loss that is a sum over the logits; --pisa can weight its rows."""

    loss: Callable
    quality: bool = False  # its targets are IoUs, not 0 and 1

    def __call__(self, logits, targets: Targets, predicted: Predicted, **options):
        wanted = (targets.labels, predicted.quality) if self.quality else targets.labels
        return self.loss(logits, wanted, **(options or {"avg_factor": targets.count}))


class GradientHarmonising(nn.Module):
    """Keeps running counts: a module, so that they are saved in the checkpoint."""

    def __init__(self, **shared):
        super().__init__()
        self.loss = tritonloss.GHMCLoss(bins=30, momentum=0.75, bias_correction=True, **shared)

    def forward(self, logits, targets: Targets, predicted: Predicted):
        return GHM_C_WEIGHT * self.loss(logits, targets.labels)


def rank_sort(logits, targets: Targets, predicted: Predicted, **shared):
    return tritonloss.rank_sort_loss(logits, (targets.labels, predicted.quality), **shared)


def average_precision(logits, targets: Targets, predicted: Predicted, **shared):
    return tritonloss.ap_loss(logits, targets.labels, **shared)


def alrp(logits, targets: Targets, predicted: Predicted, **shared):
    return tritonloss.alrp_loss(logits, targets.labels, predicted.box_loss, **shared)


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
    """The losses of one step: tensors in, their sum and a dict of the parts out, all 0-d.

    It compiles into one graph. A balanced box loss counts in the sum with its weight and stands
    in the dict without. The processes of ``group`` share a batch, and the trainer averages their
    gradients: the mean of their losses is that of one process with the whole batch.
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
            self.sides = tritonloss.GHMRLoss(momentum=0.7, bias_correction=True, **shared)
        self.balance = recipe.balance
        self.diagnosis: tritonloss.Diagnosis | None = None  # counts the logits of each step
        self.pisa = pisa
        self.bins = bins if recipe.dfl else 0

    def forward(self, logits, outputs, points, strides, targets: Targets):
        count = tritonloss.reduce_avg_factor(targets.count, self.group).clamp(min=1)
        if self.group is not None:
            count = count / self.group.size()
        targets = targets._replace(count=count)
        rows, cell = targets.rows, targets.rows % len(points)
        points, strides = points[cell], strides[cell]
        wanted = targets.boxes.flatten(0, 1)[rows]
        weight = (targets.gt_index.flatten()[rows] >= 0).float()  # 0 removes a cell
        outputs = outputs.flatten(0, 1)[rows]
        boxes = decode(outputs, points, strides, self.bins)
        error = self.box(boxes, wanted, weight=weight, reduction="none")
        with torch.no_grad():
            overlap = 1 - tritonloss.iou_loss(boxes, wanted, reduction="none")
            overlap = (overlap * weight).clamp(0, 1)
        predicted = Predicted(*(self._spread(x, targets) for x in (overlap, error)))

        if self.diagnosis is not None:
            self.diagnosis.update(logits, (targets.labels, predicted.quality))
        weighted = {}
        if self.pisa:
            prime = self._prime_weight(logits, targets, predicted)
            weighted = {"weight": prime, "avg_factor": targets.count}
        values = self.classification(logits, targets, predicted, **weighted)
        losses = values._asdict() if hasattr(values, "_asdict") else {"classification": values}
        box_loss = BOX_WEIGHT * error.sum() / count
        if self.sides is not None:
            scale = strides[:, None]
            box_loss = GHM_R_WEIGHT * self.sides(boxes / scale, wanted / scale, weight=weight)
        box_loss = losses.pop("loc", box_loss)
        total = sum(losses.values())
        if self.balance:
            common = self.mean_over_processes(box_loss)
            total = total + tritonloss.self_balanced_weight(total, common) * box_loss
        else:
            total = total + box_loss
        losses[self.box_name] = box_loss
        if self.bins:
            sides = torch.cat([points - wanted[:, :2], wanted[:, 2:] - points], 1)
            losses["dfl"] = DFL_WEIGHT * tritonloss.distribution_focal_loss(
                outputs.unflatten(1, (4, -1)),
                (sides / strides[:, None]).clamp(0, self.bins),
                weight=weight[:, None].expand(-1, 4),
                avg_factor=count,
            )
            total = total + losses["dfl"]
        if self.pisa:
            losses["carl"] = CARL_WEIGHT * tritonloss.carl_loss(
                logits, targets.labels, predicted.box_loss, avg_factor=count
            )
            total = total + losses["carl"]
        return total, losses

    def mean_over_processes(self, x):
        """Without gradient; losses of single processes have the whole batch's as their mean."""
        return tritonloss.reduce_avg_factor(x, self.group, gradients_averaged=True)

    @torch.no_grad()
    def _prime_weight(self, logits, targets: Targets, predicted: Predicted):
        """Weight of each row of logits, high where the box fits best (ISR-P)."""
        each = self.classification(logits, targets, predicted, reduction="none")
        flat = (predicted.quality, targets.gt_index, targets.labels)
        weight = tritonloss.isr_p_weight(each.flatten(0, 1), *(x.flatten() for x in flat))
        return weight.view_as(targets.labels)

    @staticmethod
    def _spread(values, targets: Targets):
        """(K,) back to (B, N), 0 where nothing was computed."""
        flat = values.new_zeros(targets.labels.numel()).index_copy(0, targets.rows, values)
        return flat.view_as(targets.labels)
