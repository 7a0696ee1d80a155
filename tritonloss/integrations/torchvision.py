"""Focal and box losses of torchvision's RetinaNet and FCOS.

``install()`` exchanges the functions that their training computes, for the whole process;
``uninstall()`` puts the originals back. A ``with installed():`` block does both.

Example:
    >>> from tritonloss.integrations import torchvision as host  # doctest: +SKIP
    >>> with host.installed():  # doctest: +SKIP
    ...     losses = model(images, targets)

``torchvision.ops.sigmoid_focal_loss``, ``generalized_box_iou_loss``, ``distance_box_iou_loss`` and
``complete_box_iou_loss`` are exchanged, too, for who calls them there. What has imported a name
before keeps the host's.

Values agree with the host's to rounding, where the area that a box loss divides by is well above
its eps: torchvision adds eps to it, and ours is at least eps. A box of height 0 has no aspect
penalty in the complete IoU loss. The result is float32 for 16-bit inputs. A gradient into the
second box argument is computed by the host's own function, as are integer inputs. TorchScript takes
the host's functions alone: script a model before ``install()``.
"""

from __future__ import annotations

from functools import wraps

from tritonloss._checks import REDUCTIONS
from tritonloss.losses.boxes import ciou_loss, diou_loss, giou_loss
from tritonloss.losses.pointwise import sigmoid_focal_loss

from ._host import Host, Place


def _known(reduction) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"Invalid reduction {reduction!r}: one of {', '.join(REDUCTIONS)}")


def _focal(original):
    @wraps(original)
    def loss(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
        if not (0 <= alpha <= 1 or alpha == -1):
            raise ValueError(f"Invalid alpha {alpha}: in [0, 1], or -1 for none")
        _known(reduction)
        if targets.requires_grad or inputs.dim() == 0:
            return original(inputs, targets, alpha, gamma, reduction)
        alpha = None if alpha < 0 else alpha
        return sigmoid_focal_loss(inputs, targets, alpha=alpha, gamma=gamma, reduction=reduction)

    return loss


def _boxes(ours, **options):
    def make(original):
        @wraps(original)
        def loss(boxes1, boxes2, reduction="none", eps=1e-7):
            _known(reduction)
            floating = boxes1.is_floating_point() and boxes2.is_floating_point()
            if boxes2.requires_grad or not floating:
                return original(boxes1, boxes2, reduction, eps)
            return ours(boxes1, boxes2, eps=eps, reduction=reduction, **options)

        return loss

    return make


def _places() -> list[Place]:
    ops, models = "torchvision.ops", "torchvision.models.detection"
    makers = {
        "sigmoid_focal_loss": (_focal, (ops, f"{models}.retinanet", f"{models}.fcos")),
        "generalized_box_iou_loss": (
            _boxes(giou_loss),
            (ops, f"{models}._utils", f"{models}.fcos"),
        ),
        "distance_box_iou_loss": (_boxes(diou_loss), (ops, f"{models}._utils")),
        "complete_box_iou_loss": (_boxes(ciou_loss, alpha_threshold=-1), (ops, f"{models}._utils")),
    }
    return [Place(m, name, make) for name, (make, modules) in makers.items() for m in modules]


_host = Host("torchvision", "torchvision 0.28.0 and 0.29.1", _places)
install, uninstall, installed = _host.install, _host.uninstall, _host.installed
