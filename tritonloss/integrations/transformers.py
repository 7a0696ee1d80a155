"""Matching cost and losses of transformers' detectors: RT-DETR, RT-DETRv2, D-FINE, Deformable DETR.

``install()`` exchanges the methods that compute them, for the whole process; ``uninstall()`` puts
the originals back. A ``with installed():`` block does both.

Example:
    >>> from tritonloss.integrations import transformers as host  # doctest: +SKIP
    >>> with host.installed():  # doctest: +SKIP
    ...     loss = model(pixel_values, labels=labels).loss

The models' files stay as they are, and so do options, weights and checkpoints. Values agree with
the host's to float32 rounding. Conditional and DAB DETR share the classes of Deformable DETR and
are served, too; masks, the fine-grained losses of D-FINE and RT-DETR with softmax costs stay the
host's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonloss.losses.boxes import giou_loss, iou
from tritonloss.losses.matching import assign, matching_cost
from tritonloss.losses.pointwise import sigmoid_focal_loss, varifocal_loss
from tritonloss.set_criterion import _corners

from ._host import Host, Place


def _match(outputs, targets, weights, alpha: float, gamma: float):
    """Per image ``(queries, objects)`` as the host's matchers return them, sorted by query."""
    labels = [t["class_labels"] for t in targets]
    boxes = [t["boxes"] for t in targets]
    cost = matching_cost(
        outputs["logits"], outputs["pred_boxes"], labels, boxes,
        weights=weights, alpha=alpha, gamma=gamma,
    )  # fmt: skip
    sizes = [len(row) for row in labels]
    table = assign(cost.cpu(), torch.tensor(sizes))
    found = []
    for row, size in zip(table, sizes, strict=True):
        objects = (row[:size] >= 0).nonzero()[:, 0]
        queries, order = row[objects].sort()
        found.append((queries, objects[order]))
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


def _loss_labels_vfl(self, outputs, targets, indices, num_boxes, log=True):
    logits = outputs["logits"]
    boxes, wanted = _pairs(outputs, targets, indices)
    corners = _corners(boxes.detach(), "cxcywh"), _corners(wanted, "cxcywh")
    overlap = iou(*corners)
    quality = overlap.new_zeros(logits.shape[:2])
    quality[_at(indices)] = overlap
    loss = varifocal_loss(
        logits, (_labels(logits, targets, indices), quality), alpha=self.alpha, gamma=self.gamma,
        detach_weight=True, avg_factor=num_boxes,
    )  # fmt: skip
    return {"loss_vfl": loss}


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
        def forward(self, outputs, targets):
            weights = self.class_cost, self.bbox_cost, self.giou_cost
            return _match(outputs, targets, weights, 0.25, 2.0)

        return forward

    return rt_detr, deformable


def _places() -> list[Place]:
    rt_detr, deformable = _matchers()
    theirs, other = "transformers.loss.loss_rt_detr", "transformers.loss.loss_deformable_detr"
    return [
        Place(theirs, "RTDetrHungarianMatcher.forward", rt_detr),
        Place(theirs, "RTDetrLoss.loss_labels_vfl", lambda original: _loss_labels_vfl),
        Place(theirs, "RTDetrLoss.loss_boxes", lambda original: _loss_boxes),
        Place(other, "DeformableDetrHungarianMatcher.forward", deformable),
        Place(other, "DeformableDetrImageLoss.loss_labels", lambda original: _loss_labels),
        # inherited from ImageLoss, whose other heirs keep theirs
        Place(other, "DeformableDetrImageLoss.loss_boxes", lambda original: _loss_boxes),
    ]


_host = Host("transformers", "transformers 5.23.0", _places)
install, uninstall, installed = _host.install, _host.uninstall, _host.installed
