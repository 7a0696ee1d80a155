"""Losses of mmdetection for ours, configs unchanged; and heads that train with a ranking loss.

``install()`` exchanges what the loss classes compute, for the whole process and for models that
are already built; ``uninstall()`` puts it back. A ``with installed():`` block does both.

Example:
    >>> from tritonloss.integrations import mmdet as host  # doctest: +SKIP
    >>> host.install()  # doctest: +SKIP
    >>> model = MODELS.build(config.model)  # doctest: +SKIP

Ours then are ``FocalLoss``, ``QualityFocalLoss``, ``VarifocalLoss``, ``DistributionFocalLoss``,
``GHMC``, ``GHMR``, ``IoULoss``, ``GIoULoss``, ``DIoULoss``, ``CIoULoss``, and ISR-P and CARL of the
PISA heads.
The classes, their constructors, buffers (GHM's ``acc_sum``) and checkpoints stay the host's.

The host computes what ours do not take: probabilities in place of logits (``activated=True``) and
GHM with a reduction that is no mean. DIoU and CIoU differ where an area is near eps: the host adds
it, and ours is at least eps. ISR-P numbers the objects over the batch, where the host gives objects
of the first and the third image one number; equal IoUs share a rank.

Entries of the registry that the host does not have:

* losses ``RankSortLoss``, ``APLoss`` and ``ALRPLoss``;
* heads ``RankingRetinaHead`` and ``RankingATSSHead``, which give them all levels at once and scale
  the box loss to the size of the classification loss::

    bbox_head=dict(type="RankingRetinaHead", reg_decoded_bbox=True,
                   loss_cls=dict(type="RankSortLoss"), loss_bbox=dict(type="GIoULoss"), ...)
"""

from __future__ import annotations

import importlib
from functools import wraps

import torch
from torch import Tensor, nn

from tritonloss import modules
from tritonloss._checks import REDUCTIONS
from tritonloss.losses import pointwise, prime_sample
from tritonloss.losses.boxes import ciou_loss, diou_loss, giou_loss, iou, iou_loss
from tritonloss.losses.distribution import distribution_focal_loss
from tritonloss.losses.ghm import ghm_c_loss, ghm_r_loss
from tritonloss.losses.ranking import self_balanced_weight

from ._host import Host, Place

EPS = torch.finfo(torch.float32).eps  # the host adds it to avg_factor


def _reduction(module, override) -> str:
    assert override in (None, *REDUCTIONS), f"reduction_override is one of {REDUCTIONS}"
    return override or module.reduction


def _reduced(module, loss, override, avg_factor, weight, count: int, columns: bool = False):
    """``loss(reduction=, weight=)``, weighted and divided as the host does it.

    Args:
        count: what a mean without avg_factor divides by: all values, those of weight 0 included.
        columns: the host adds up the columns before it reduces.
    """
    reduction = _reduction(module, override)
    if reduction == "none":
        value = loss(reduction="none", weight=weight)
        value = value.sum(-1) if columns else value
    elif reduction == "sum":
        if avg_factor is not None:
            raise ValueError('avg_factor can not be used with reduction="sum"')
        value = loss(reduction="sum", weight=weight)
    else:
        divisor = max(count, 1) if avg_factor is None else avg_factor + EPS
        if isinstance(divisor, Tensor) or divisor <= 0:  # of any shape, of any sign
            value = loss(reduction="sum", weight=weight) / divisor
        else:
            value = loss(reduction="mean", weight=weight, avg_factor=divisor)
    return value if module.loss_weight == 1 else module.loss_weight * value


def _rows_or_logits(weight: Tensor | None, pred: Tensor) -> Tensor | None:
    """The host's weights: of rows (N,) or (N, 1), of logits (N, C), those flattened, too."""
    if weight is None or weight.shape in (pred.shape, pred.shape[:-1]):
        return weight
    if weight.numel() == pred.numel():
        return weight.reshape(pred.shape)
    return weight.reshape(pred.shape[:-1])


def _background(labels: Tensor, n_classes: int) -> Tensor:
    """Negative labels are background there."""
    return labels.where(labels >= 0, n_classes)


def _focal(original):
    @wraps(original)
    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        if self.activated:
            return original(self, pred, target, weight, avg_factor, reduction_override)
        _reduction(self, reduction_override)
        if pred.dim() == target.dim():
            target = target.type_as(pred)

        def loss(**reduced):
            return pointwise.sigmoid_focal_loss(
                pred, target, alpha=self.alpha, gamma=self.gamma, **reduced
            )

        weight = _rows_or_logits(weight, pred)
        return _reduced(self, loss, reduction_override, avg_factor, weight, pred.numel())

    return forward


def _quality_focal(original):
    @wraps(original)
    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        if self.activated:
            return original(self, pred, target, weight, avg_factor, reduction_override)
        _reduction(self, reduction_override)
        if not isinstance(target, Tensor):
            labels, quality = target
            target = _background(labels, pred.shape[-1]), quality.detach()

        def loss(**reduced):
            return pointwise.quality_focal_loss(pred, target, beta=self.beta, **reduced)

        return _reduced(self, loss, reduction_override, avg_factor, weight, len(pred), columns=True)

    return forward


def _varifocal(original):
    @wraps(original)
    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        _reduction(self, reduction_override)

        def loss(**reduced):
            return pointwise.varifocal_loss(
                pred, target.type_as(pred), alpha=self.alpha, gamma=self.gamma,
                iou_weighted=self.iou_weighted, **reduced,
            )  # fmt: skip

        if weight is not None and weight.shape != pred.shape:
            weight = weight.expand_as(pred)
        return _reduced(self, loss, reduction_override, avg_factor, weight, pred.numel())

    return forward


def _distribution_focal(original):
    @wraps(original)
    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        _reduction(self, reduction_override)

        def loss(**reduced):
            return distribution_focal_loss(pred, target, **reduced)

        return _reduced(self, loss, reduction_override, avg_factor, weight, len(pred))

    return forward


def _boxes(ours, mode_of=lambda module: {}):
    def make(original):
        @wraps(original)
        def forward(
            self, pred, target, weight=None, avg_factor=None, reduction_override=None, **kwargs
        ):
            _reduction(self, reduction_override)
            if weight is not None and weight.dim() > 1:
                weight = weight.mean(-1)

            def loss(**reduced):
                return ours(pred, target, eps=self.eps, **mode_of(self), **kwargs, **reduced)

            return _reduced(self, loss, reduction_override, avg_factor, weight, len(pred))

        return forward

    return make


def _harmonised(self, loss) -> Tensor:
    """The host's running counts as the state of ours."""
    if self.momentum == 0:
        return loss()
    counts = self.acc_sum
    # a copy: the counts change before the backward
    state = counts.to(torch.float32, copy=True), torch.zeros_like(counts, dtype=torch.float32)
    value, (amount, _) = loss(state=state, momentum=self.momentum)
    with torch.no_grad():
        counts.copy_(amount)
    return value


def _ghm_c(original):
    @wraps(original)
    def forward(self, pred, target, label_weight, reduction_override=None, **kwargs):
        if _reduction(self, reduction_override) != "mean":
            return original(self, pred, target, label_weight, reduction_override, **kwargs)
        if pred.dim() == target.dim():
            target = target.type_as(pred)
        else:
            target = _background(target, pred.shape[-1])

        def loss(**state):
            return ghm_c_loss(pred, target, bins=self.bins, weight=label_weight, **state)

        return _harmonised(self, loss) * self.loss_weight

    return forward


def _ghm_r(original):
    @wraps(original)
    def forward(self, pred, target, label_weight, avg_factor=None, reduction_override=None):
        if _reduction(self, reduction_override) != "mean":
            return original(self, pred, target, label_weight, avg_factor, reduction_override)

        def loss(**state):
            return ghm_r_loss(
                pred, target, mu=self.mu, bins=self.bins, weight=label_weight, **state
            )

        return _harmonised(self, loss) * self.loss_weight

    return forward


# --------------------------------------------------------------------------- prime sample attention


def _positives(labels: Tensor, num_class: int) -> Tensor:
    return ((labels >= 0) & (labels < num_class)).nonzero()[:, 0]


def _of_class(bbox_pred: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Boxes of these rows, those of their class where each has its own."""
    if bbox_pred.shape[-1] == 4:
        return bbox_pred[rows]
    return bbox_pred.unflatten(-1, (-1, 4))[rows, labels]


def _isr_p(original):
    @wraps(original)
    @torch.no_grad()
    def isr_p(
        cls_score, bbox_pred, bbox_targets, rois, sampling_results, loss_cls, bbox_coder,
        k=2, bias=0, num_class=80,
    ):  # fmt: skip
        labels, label_weights, targets, bbox_weights = bbox_targets
        rows = _positives(labels, num_class)
        if len(rows) == 0:
            return bbox_targets
        objects, before = [], 0
        for result in sampling_results:
            objects.append(result.pos_assigned_gt_inds + before)
            before += int(result.num_gts)
        labels_here, anchors = labels[rows], rois[rows][:, -4:]
        predicted = bbox_coder.decode(anchors, _of_class(bbox_pred, rows, labels_here))
        wanted = bbox_coder.decode(anchors, targets[rows].reshape(-1, 4))
        overlap = iou(predicted, wanted)
        loss = loss_cls(cls_score[rows], labels_here, reduction_override="none")
        prime = prime_sample.isr_p_weight(
            loss, overlap, torch.cat(objects), labels_here, k=k, bias=bias,
            weight=label_weights[rows],
        )  # fmt: skip
        weights = label_weights.index_copy(0, rows, prime.to(label_weights.dtype))
        return labels, weights, targets, bbox_weights

    return isr_p


def _carl(original):
    @wraps(original)
    def carl_loss(
        cls_score, labels, bbox_pred, bbox_targets, loss_bbox, k=1, bias=0.2, avg_factor=None,
        sigmoid=False, num_class=80,
    ):  # fmt: skip
        rows = _positives(labels, num_class)
        if len(rows) == 0:
            return {"loss_carl": cls_score.sum()[None] * 0.0}
        here = labels[rows]
        box_loss = loss_bbox(
            _of_class(bbox_pred, rows, here), bbox_targets[rows], reduction_override="none"
        )
        loss = prime_sample.carl_loss(
            cls_score[rows], here, box_loss, k=k, bias=bias,
            activation="sigmoid" if sigmoid else "softmax",
            avg_factor=len(bbox_targets) if avg_factor is None else avg_factor,
        )  # fmt: skip
        return {"loss_carl": loss[None]}

    return carl_loss


# ----------------------------------------------------------------------------------- ranking losses


class _Level:
    """What one level of a head gave its losses."""

    def __init__(self, logits: Tensor, labels: Tensor, weight: Tensor | None):
        self.logits, self.labels, self.weight = logits, labels, weight
        self.boxes: tuple[Tensor, Tensor] | None = None  # predicted and wanted: all, or positives

    def of_positives(self, value) -> Tensor:
        """``value(predicted, wanted)`` at the positives, 0 elsewhere."""
        rows = _positives(self.labels, self.logits.shape[-1])
        spread = self.logits.new_zeros(len(self.labels), dtype=torch.float32)
        if self.boxes is None or len(rows) == 0:
            return spread
        predicted, wanted = self.boxes
        if len(predicted) != len(rows):
            predicted, wanted = predicted[rows], wanted[rows]
        found = value(predicted, wanted)
        return spread.to(found.dtype).index_copy(0, rows, found)


class _RankingLoss(nn.Module):
    """A loss of all levels together, for a head that collects them.

    Args:
        loss_weight: scales the classification loss.
        self_balanced: scale the box loss to the size of the classification loss; the weight of the
            head's ``loss_bbox`` then means nothing.
        hyper: keyword arguments of the loss, see the function of tritonloss.
    """

    use_sigmoid = True
    kind: type[nn.Module]

    def __init__(self, loss_weight: float = 1.0, self_balanced: bool = True, **hyper):
        super().__init__()
        hyper.pop("use_sigmoid", None)
        self.loss = self.kind(**hyper)
        self.loss_weight, self.self_balanced = loss_weight, self_balanced
        self.levels: list[_Level] | None = None  # a list while a head collects

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        """Keeps a level; the value comes from the head."""
        if self.levels is None:
            raise RuntimeError(
                f"{type(self).__name__} ranks the anchors of all levels together: its head is "
                "RankingRetinaHead, RankingATSSHead or another heir of RankingHead"
            )
        self.levels.append(_Level(pred, target, weight))
        return pred.sum() * 0

    def losses(self, levels: list[_Level], loss_bbox: nn.Module, box_loss: Tensor) -> dict:
        """Losses of all levels, by name."""
        logits = torch.cat([level.logits for level in levels])
        labels = torch.cat([level.labels for level in levels])
        weight = None
        if levels[0].weight is not None:
            weight = torch.cat([level.weight for level in levels])
        parts, box_loss = self.values(logits, labels, weight, levels, loss_bbox, box_loss)
        found = {name: self.loss_weight * value for name, value in parts.items()}
        if self.self_balanced:
            total = sum(found.values())
            if isinstance(self, ALRPLoss):  # whose box loss is a part of it
                total = total + box_loss
            box_loss = self_balanced_weight(total, box_loss) * box_loss
        return found | {"loss_bbox": box_loss}

    def values(self, logits, labels, weight, levels, loss_bbox, box_loss) -> tuple[dict, Tensor]:
        raise NotImplementedError


class RankSortLoss(_RankingLoss):
    """Rank & Sort: see :func:`tritonloss.rank_sort_loss`. Qualities are the IoUs of the boxes."""

    kind = modules.RankSortLoss

    def values(self, logits, labels, weight, levels, loss_bbox, box_loss):
        with torch.no_grad():
            quality = torch.cat([level.of_positives(iou) for level in levels])
        found = self.loss(logits, (labels, quality), weight=weight)
        return {"loss_cls": found.rank, "loss_sort": found.sort}, box_loss


class APLoss(_RankingLoss):
    """Average precision: see :func:`tritonloss.ap_loss`."""

    kind = modules.APLoss

    def values(self, logits, labels, weight, levels, loss_bbox, box_loss):
        return {"loss_cls": self.loss(logits, labels, weight=weight)}, box_loss


class ALRPLoss(_RankingLoss):
    """aLRP: see :func:`tritonloss.alrp_loss`. The localisation errors are the head's box losses."""

    kind = modules.ALRPLoss

    def values(self, logits, labels, weight, levels, loss_bbox, box_loss):
        def each(predicted, wanted):
            return loss_bbox(predicted, wanted, reduction_override="none")

        error = torch.cat([level.of_positives(each) for level in levels])
        found = self.loss(logits, labels, error, weight=weight)
        return {"loss_cls": found.cls}, found.loc + 0 * box_loss  # a gradient without positives


class RankingHead:
    """Before a dense head of mmdetection: a ranking loss of all levels, with its box loss.

    ``class Mine(RankingHead, SomeHead)`` works for a head whose ``loss_by_feat`` calls, level by
    level, ``loss_cls(logits, labels, weight)`` and at most once ``loss_bbox(predicted, wanted)`` of
    decoded boxes, either of all anchors or of the positives alone, in order.
    """

    def __init__(self, *args, loss_cls: dict, **kwargs):
        super().__init__(*args, loss_cls=dict(loss_cls, use_sigmoid=True), **kwargs)
        if not isinstance(self.loss_cls, _RankingLoss):
            raise TypeError(
                "loss_cls must be RankSortLoss, APLoss or ALRPLoss; "
                f"got {type(self.loss_cls).__name__}"
            )
        if not (self.reg_decoded_bbox or isinstance(self.loss_cls, APLoss)):
            raise ValueError(
                f"{type(self.loss_cls).__name__} compares boxes: set reg_decoded_bbox=True, with a "
                "loss_bbox of boxes, as GIoULoss"
            )

    def loss_by_feat(self, *args, **kwargs) -> dict:
        levels = self.loss_cls.levels = []

        def keep(module, inputs):
            levels[-1].boxes = inputs[:2]

        hook = self.loss_bbox.register_forward_pre_hook(keep)
        try:
            losses = super().loss_by_feat(*args, **kwargs)
        finally:
            hook.remove()
            self.loss_cls.levels = None
        return losses | self.loss_cls.losses(levels, self.loss_bbox, sum(losses["loss_bbox"]))


HEADS = {"RankingRetinaHead": "RetinaHead", "RankingATSSHead": "ATSSHead"}
LOSSES = (RankSortLoss, APLoss, ALRPLoss)


def __getattr__(name: str):
    """Heads, made of the host's when they are asked for."""
    if name not in HEADS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(importlib.import_module("mmdet.models.dense_heads"), HEADS[name])
    globals()[name] = head = type(name, (RankingHead, base), {"__module__": __name__})
    return head


def _places() -> list[Place]:
    losses, heads = "mmdet.models.losses", "mmdet.models.dense_heads"
    forwards = {
        f"{losses}.focal_loss": {"FocalLoss": _focal},
        f"{losses}.gfocal_loss": {
            "QualityFocalLoss": _quality_focal,
            "DistributionFocalLoss": _distribution_focal,
        },
        f"{losses}.varifocal_loss": {"VarifocalLoss": _varifocal},
        f"{losses}.ghm_loss": {"GHMC": _ghm_c, "GHMR": _ghm_r},
        f"{losses}.iou_loss": {
            "IoULoss": _boxes(iou_loss, lambda module: {"mode": module.mode}),
            "GIoULoss": _boxes(giou_loss),
            "DIoULoss": _boxes(diou_loss),
            "CIoULoss": _boxes(ciou_loss),
        },
    }
    found = [
        Place(module, f"{name}.forward", make)
        for module, classes in forwards.items()
        for name, make in classes.items()
    ]
    for module in (f"{heads}.pisa_retinanet_head", f"{heads}.pisa_ssd_head",
                   "mmdet.models.roi_heads.pisa_roi_head"):  # fmt: skip
        found.append(Place(module, "isr_p", _isr_p))
        found.append(Place(module, "carl_loss", _carl))
    registry = "MODELS.module_dict."
    found += [
        Place("mmdet.registry", registry + kind.__name__, lambda kind=kind: kind, new=True)
        for kind in LOSSES
    ]
    found += [
        Place("mmdet.registry", registry + name, lambda name=name: __getattr__(name), new=True)
        for name in HEADS
    ]
    return found


_host = Host("mmdet", "mmdet 3.3.0", _places)
install, uninstall, installed = _host.install, _host.uninstall, _host.installed
