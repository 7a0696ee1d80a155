"""Matching cost and losses of transformers' RT-DETR, D-FINE, DEIMv2, Deformable DETR and LW-DETR.

``install()`` exchanges the methods that compute them, for the whole process; ``uninstall()`` puts
the originals back. A ``with installed():`` block does both.

Example:
    >>> from tritonloss.integrations import transformers as host  # doctest: +SKIP
    >>> with host.installed():  # doctest: +SKIP
    ...     loss = model(pixel_values, labels=labels).loss

The models' files stay as they are, and so do options, weights and checkpoints. Values agree with
the host's to float32 rounding. RT-DETRv2, Conditional and DAB DETR and the detectors of RF-DETR
share these classes and are served, too. Masks, D-FINE's distillation of distributions and RT-DETR
with softmax costs stay the host's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonloss.losses.boxes import giou_loss, iou
from tritonloss.losses.distribution import distribution_focal_loss
from tritonloss.losses.matching import assign, matching_cost
from tritonloss.losses.pointwise import sigmoid_focal_loss, varifocal_loss
from tritonloss.losses.quality import iou_aware_bce_loss, mal_loss
from tritonloss.set_criterion import _corners

from ._host import Host, Place


def _match(outputs, targets, weights, alpha: float, gamma: float, groups: int = 1):
    """Per image ``(queries, objects)`` as the host's matchers return them, sorted by query.

    Each group of queries is matched with all objects.
    """
    labels = [t["class_labels"] for t in targets]
    boxes = [t["boxes"] for t in targets]
    cost = matching_cost(
        outputs["logits"], outputs["pred_boxes"], labels, boxes,
        weights=weights, alpha=alpha, gamma=gamma,
    )  # fmt: skip
    sizes = [len(row) for row in labels]
    queries_each = cost.shape[1] // groups
    cost = cost.unflatten(1, (groups, queries_each)).movedim(1, 0)
    first = torch.arange(groups)[:, None, None] * queries_each
    table = assign(cost.cpu(), torch.tensor(sizes))
    table = torch.where(table >= 0, table + first, -1)
    found = []
    for i, size in enumerate(sizes):
        rows = table[:, i, :size]
        order = rows.flatten().argsort(stable=True)
        order = order[rows.flatten()[order] >= 0]
        found.append((rows.flatten()[order], order % max(size, 1)))
    return found


def _at(indices) -> tuple[Tensor, Tensor]:
    images = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(indices)])
    return images, torch.cat([queries for queries, _ in indices])


def _wanted(name: str, targets, indices) -> Tensor:
    """What the matched objects have under a name, in the order of the pairs."""
    return torch.cat([t[name][objects] for t, (_, objects) in zip(targets, indices, strict=True)])


def _labels(logits: Tensor, targets, indices) -> Tensor:
    """(B, Q) the class of each query, C where there is none."""
    labels = torch.full(logits.shape[:2], logits.shape[2], device=logits.device)
    labels[_at(indices)] = _wanted("class_labels", targets, indices)
    return labels


def _pairs(outputs, targets, indices) -> tuple[Tensor, Tensor]:
    """Boxes of the pairs, cxcywh, at least float32."""
    boxes = outputs["pred_boxes"][_at(indices)]
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    return boxes, _wanted("boxes", targets, indices).to(boxes.dtype)


def _loss_boxes(self, outputs, targets, indices, num_boxes):
    boxes, wanted = _pairs(outputs, targets, indices)
    corners = _corners(boxes, "cxcywh"), _corners(wanted, "cxcywh")
    return {
        "loss_bbox": (boxes - wanted).abs().sum() / num_boxes,
        "loss_giou": giou_loss(*corners, reduction="mean", avg_factor=num_boxes),
    }


def _of_quality(outputs, targets, indices) -> tuple[Tensor, Tensor]:
    """(B, Q) class of each query, and the IoU of its box with that of its object."""
    boxes, wanted = _pairs(outputs, targets, indices)
    overlap = iou(_corners(boxes.detach(), "cxcywh"), _corners(wanted, "cxcywh"))
    quality = overlap.new_zeros(outputs["logits"].shape[:2])
    quality[_at(indices)] = overlap
    return _labels(outputs["logits"], targets, indices), quality


def _loss_labels_vfl(self, outputs, targets, indices, num_boxes, log=True):
    loss = varifocal_loss(
        outputs["logits"], _of_quality(outputs, targets, indices), alpha=self.alpha,
        gamma=self.gamma, detach_weight=True, avg_factor=num_boxes,
    )  # fmt: skip
    return {"loss_vfl": loss}


def _loss_labels_mal(self, outputs, targets, indices, num_boxes):
    loss = mal_loss(
        outputs["logits"], _of_quality(outputs, targets, indices), alpha=self.mal_alpha,
        gamma=self.gamma, avg_factor=num_boxes,
    )  # fmt: skip
    return {"loss_mal": loss}


def _loss_labels_iou_aware(self, outputs, targets, indices, num_boxes):
    loss = iou_aware_bce_loss(
        outputs["logits"], _of_quality(outputs, targets, indices), alpha=self.focal_alpha,
        gamma=2.0, avg_factor=num_boxes,
    )  # fmt: skip
    return {"loss_ce": loss}


def _fine_grained(
    self, pred, label, weight_right, weight_left, weight=None, reduction="sum", avg_factor=None
):
    # the bins are not uniform, but what lies between two of them is divided as a distance would be
    target = label.floor() + weight_right.reshape(-1)
    if avg_factor is not None or reduction == "mean":
        divisor = len(pred) if avg_factor is None else avg_factor
        return distribution_focal_loss(pred, target, weight=weight, reduction="sum") / divisor
    return distribution_focal_loss(pred, target, weight=weight, reduction=reduction)


def _loss_labels(self, outputs, targets, indices, num_boxes):
    logits = outputs["logits"]
    alpha = None if self.focal_alpha < 0 else self.focal_alpha
    loss = sigmoid_focal_loss(
        logits, _labels(logits, targets, indices), alpha=alpha, gamma=2.0, avg_factor=num_boxes
    )
    return {"loss_ce": loss}


def _matchers():
    """Replacements that fall back on the original where the cost is another."""

    def rt_detr(original):
        @torch.no_grad()
        def forward(self, outputs, targets):
            if not self.use_focal_loss:
                return original(self, outputs, targets)
            weights = self.class_cost, self.bbox_cost, self.giou_cost
            return _match(outputs, targets, weights, self.alpha, self.gamma)

        return forward

    def deformable(original):
        @torch.no_grad()
        def forward(self, outputs, targets, group_detr=1):
            weights = self.class_cost, self.bbox_cost, self.giou_cost
            return _match(outputs, targets, weights, 0.25, 2.0, group_detr)

        return forward

    return rt_detr, deformable


def _places() -> list[Place]:
    rt_detr, deformable = _matchers()
    theirs, other, third, d_fine, deim = (
        f"transformers.loss.loss_{name}"
        for name in ("rt_detr", "deformable_detr", "lw_detr", "d_fine", "deimv2")
    )
    return [
        Place(theirs, "RTDetrHungarianMatcher.forward", rt_detr),
        Place(theirs, "RTDetrLoss.loss_labels_vfl", lambda original: _loss_labels_vfl),
        Place(theirs, "RTDetrLoss.loss_boxes", lambda original: _loss_boxes),
        Place(other, "DeformableDetrHungarianMatcher.forward", deformable),
        Place(other, "DeformableDetrImageLoss.loss_labels", lambda original: _loss_labels),
        # inherited from ImageLoss, whose other heirs keep theirs
        Place(other, "DeformableDetrImageLoss.loss_boxes", lambda original: _loss_boxes),
        Place(third, "LwDetrHungarianMatcher.forward", deformable),
        Place(third, "LwDetrImageLoss.loss_labels", lambda original: _loss_labels_iou_aware),
        Place(third, "LwDetrImageLoss.loss_boxes", lambda original: _loss_boxes),
        Place(d_fine, "DFineLoss.unimodal_distribution_focal_loss", lambda _: _fine_grained),
        Place(deim, "Deimv2Loss.loss_labels_mal", lambda original: _loss_labels_mal),
    ]


_host = Host("transformers", "transformers 5.23.0", _places)
install, uninstall, installed = _host.install, _host.uninstall, _host.installed
