"""Losses of ultralytics' detectors with distributed boxes (YOLOv8 and its heirs) for ours.

``install()`` exchanges what their criterion computes, for the whole process; ``uninstall()`` puts
it back. A ``with installed():`` block does both.

Example:
    >>> from tritonloss.integrations import ultralytics as host  # doctest: +SKIP
    >>> with host.installed():  # doctest: +SKIP
    ...     YOLO("yolov8n.yaml").train(data="coco8.yaml", epochs=3)

Ours then are the cross entropy with the aligned scores (summed in one pass, without a value per
logit), the complete IoU of the box loss and the distribution focal loss; the assigner stays the
host's. A criterion built in a block keeps our cross entropy beyond it: the host holds it as an
attribute.

The package is AGPL-3.0: nothing of it is in tritonloss, which does not require it.
"""

from __future__ import annotations

from functools import wraps

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tritonloss._dispatch import use_triton
from tritonloss.losses.boxes import ciou_loss
from tritonloss.losses.distribution import distribution_focal_loss
from tritonloss.losses.quality import bce_loss

from ._host import Host, Place


class _Scores:
    """In place of a cross entropy with a value per logit, which the criterion weights and sums."""

    def __init__(self, criterion):
        self.criterion = criterion

    def __call__(self, logits: Tensor, scores: Tensor) -> Tensor:
        if getattr(self.criterion, "class_weights", None) is not None:
            return bce_loss(logits, scores, reduction="none")
        if not use_triton(logits):  # torch has this sum in one pass, too
            return binary_cross_entropy_with_logits(logits, scores, reduction="sum").reshape(1)
        return bce_loss(logits, scores, reduction="sum").reshape(1)


def _criterion(original):
    @wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.bce = _Scores(self)

    return __init__


def _distribution(original):
    @wraps(original)
    def __call__(self, pred_dist, target):
        last = self.reg_max - 1 - 0.01
        rows = distribution_focal_loss(
            pred_dist, target.clamp(0, last).reshape(-1), reduction="none"
        )
        return rows.view(target.shape).mean(-1, keepdim=True)

    return __call__


def _iou(original):
    @wraps(original)
    def bbox_iou(box1, box2, xywh=True, GIoU=False, DIoU=False, CIoU=False, eps=1e-7):
        other = xywh or GIoU or DIoU or not CIoU
        if other or box1.shape != box2.shape or box2.requires_grad:
            return original(box1, box2, xywh, GIoU, DIoU, CIoU, eps)
        loss = ciou_loss(box1, box2, eps=eps, alpha_threshold=-1, reduction="none")
        return (1 - loss).unsqueeze(-1)

    return bbox_iou


def _places() -> list[Place]:
    module = "ultralytics.utils.loss"
    return [
        Place(module, "v8DetectionLoss.__init__", _criterion),
        Place(module, "DFLoss.__call__", _distribution),
        Place(module, "bbox_iou", _iou),
    ]


_host = Host("ultralytics", "ultralytics 8.4.190", _places)
install, uninstall, installed = _host.install, _host.uninstall, _host.installed
