"""Matching cost and losses of transformers' RT-DETR, D-FINE, DEIMv2, Deformable DETR and LW-DETR.

``install()`` exchanges the methods that compute them, for the whole process; ``uninstall()`` puts
the originals back. A ``with installed():`` block does both. One ``SetCriterion`` matches and
computes the losses of all layers of a step.

Example:
    >>> from tritonloss.integrations import transformers as host  # doctest: +SKIP
    >>> with host.installed():  # doctest: +SKIP
    ...     loss = model(pixel_values, labels=labels).loss

The models' files stay as they are, and so do options, weights and checkpoints. Values agree with
the host's to float32 rounding. RT-DETRv2, Conditional and DAB DETR and the detectors of RF-DETR
share these classes and are served, too. Masks and RT-DETR with softmax costs stay the host's.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tritonloss.losses.boxes import giou_loss, iou
from tritonloss.losses.distribution import distribution_distillation_loss, distribution_focal_loss
from tritonloss.losses.matching import assign, matching_cost
from tritonloss.losses.pointwise import sigmoid_focal_loss, varifocal_loss
from tritonloss.losses.quality import iou_aware_bce_loss, mal_loss
from tritonloss.set_criterion import SetCriterion, _corners

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
    table = assign(cost.cpu(), torch.tensor(sizes))
    return _as_pairs(table.movedim(0, 1), sizes, queries_each)


def _as_pairs(table: Tensor, sizes: list[int], queries_each: int) -> list:
    """The queries of each group (B, groups, T), as the host's matchers return them."""
    first = torch.arange(table.shape[1], device=table.device)[:, None] * queries_each
    table = torch.where(table >= 0, table + first, -1)
    found = []
    for rows, size in zip(table, sizes, strict=True):
        flat = rows[:, :size].flatten()
        order = flat.argsort(stable=True)
        order = order[flat[order] >= 0]
        found.append((flat[order], order % max(size, 1)))
    return found


def _at(indices) -> tuple[Tensor, Tensor]:
    images = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(indices)])
    return images, torch.cat([queries for queries, _ in indices])


def _wanted(name: str, targets, indices) -> Tensor:
    """What the matched objects have under a name, in the order of the pairs."""
    return torch.cat([t[name][objects] for t, (_, objects) in zip(targets, indices, strict=True)])


def _labels(logits: Tensor, targets, indices, at=None) -> Tensor:
    """(B, Q) the class of each query, C where there is none."""
    labels = torch.full(logits.shape[:2], logits.shape[2], device=logits.device)
    labels[at or _at(indices)] = _wanted("class_labels", targets, indices)
    return labels


def _pairs(outputs, targets, indices, at=None) -> tuple[Tensor, Tensor]:
    """Boxes of the pairs, cxcywh, at least float32."""
    boxes = outputs["pred_boxes"][at or _at(indices)]
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
    at = _at(indices)
    boxes, wanted = _pairs(outputs, targets, indices, at)
    overlap = iou(_corners(boxes.detach(), "cxcywh"), _corners(wanted, "cxcywh"))
    quality = overlap.new_zeros(outputs["logits"].shape[:2])
    quality[at] = overlap
    return _labels(outputs["logits"], targets, indices, at), quality


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
    target = label.floor().add_(weight_right.reshape(-1))
    divisor = len(pred) if avg_factor is None and reduction == "mean" else avg_factor
    if isinstance(divisor, (int, float)) and divisor > 0:
        return distribution_focal_loss(pred, target, weight=weight, avg_factor=divisor)
    if divisor is not None:
        return distribution_focal_loss(pred, target, weight=weight, reduction="sum") / divisor
    return distribution_focal_loss(pred, target, weight=weight, reduction=reduction)


def _loss_local(original):
    host = importlib.import_module(original.__module__)

    def loss_local(self, outputs, targets, indices, num_boxes, T=5):
        if "pred_corners" not in outputs:
            return {}
        bins, at = self.max_num_bins + 1, _at(indices)
        boxes, wanted = _pairs(outputs, targets, indices, at)
        wanted = _corners(wanted, "cxcywh")
        overlap = iou(_corners(boxes.detach(), "cxcywh"), wanted)
        student, teacher = outputs["pred_corners"], outputs["teacher_corners"].detach()
        with torch.no_grad():
            self.fgl_targets = host.bbox2distance(
                outputs["ref_points"][at], wanted, self.max_num_bins, self.reg_scale, self.up
            )
        fine = self.unimodal_distribution_focal_loss(
            student[at].reshape(-1, bins), *self.fgl_targets,
            overlap.repeat_interleave(4), avg_factor=num_boxes,
        )  # fmt: skip
        # the last layer is its own teacher: nothing to learn, and its divergence is 0
        weight = outputs["teacher_logits"].detach().amax(-1).sigmoid().to(overlap.dtype)
        weight[at] = overlap
        matched = torch.zeros_like(weight, dtype=torch.bool)
        matched[at] = True
        # the mean over each kind's sides, weighted by the root of their number
        sides = 4 * torch.stack([matched.sum(), (~matched).sum()]).to(weight.dtype)
        self.num_pos, self.num_neg = roots = (sides / len(weight)).sqrt()
        share = roots / sides.clamp(min=1) / roots.sum()
        weight = weight * torch.where(matched, share[0], share[1])
        distilled = distribution_distillation_loss(
            student.reshape(-1, bins), teacher.reshape(-1, bins), temperature=T,
            weight=weight.flatten().repeat_interleave(4), reduction="sum",
        )  # fmt: skip
        return {"loss_fgl": fine, "loss_ddf": distilled}

    return loss_local


def _loss_labels(self, outputs, targets, indices, num_boxes):
    logits = outputs["logits"]
    alpha = None if self.focal_alpha < 0 else self.focal_alpha
    loss = sigmoid_focal_loss(
        logits, _labels(logits, targets, indices), alpha=alpha, gamma=2.0, avg_factor=num_boxes
    )
    return {"loss_ce": loss}


@functools.lru_cache(maxsize=32)
def _criterion(loss: str, params: tuple, weights: tuple, alpha, gamma, groups: int):
    return SetCriterion(
        loss, class_params=dict(params), cost_weights=weights, cost_alpha=alpha, cost_gamma=gamma,
        groups=groups,
    )  # fmt: skip


class _Plan(NamedTuple):
    """What one of the host's criteria computes: its class loss, and the cost of its matcher."""

    host_loss: str  # in the host's list of losses
    key: str  # of the class term in the host's results
    loss: str
    params: tuple
    alpha: float
    gamma: float
    groups: int = 1


def _plan(criterion) -> _Plan | None:
    """None for what SetCriterion does not compute, or a class that the host does not have."""
    classes = type(criterion), type(criterion.matcher)
    if not all(c.__module__.startswith("transformers.") for c in classes):
        return None
    name, matcher = classes[0].__name__, criterion.matcher
    if classes[1].__name__ == "RTDetrHungarianMatcher" and matcher.use_focal_loss:
        if "vfl" in criterion.losses:
            params = (("alpha", criterion.alpha), ("gamma", criterion.gamma))
            plan = "vfl", "loss_vfl", "varifocal", params
        elif "mal" in criterion.losses:
            params = (("alpha", criterion.mal_alpha), ("gamma", criterion.gamma))
            plan = "mal", "loss_mal", "mal", params
        else:
            return None
        return _Plan(*plan, matcher.alpha, matcher.gamma)
    alpha = criterion.focal_alpha if hasattr(criterion, "focal_alpha") else None
    if classes[1].__name__ == "DeformableDetrHungarianMatcher":
        params = (("alpha", None if alpha < 0 else alpha), ("gamma", 2.0))
        return _Plan("labels", "loss_ce", "focal", params, 0.25, 2.0)
    if name == "LwDetrImageLoss" and classes[1].__name__ == "LwDetrHungarianMatcher":
        groups = criterion.group_detr if criterion.training else 1
        params = (("alpha", alpha), ("gamma", 2.0))
        return _Plan("labels", "loss_ce", "iou_aware_bce", params, 0.25, 2.0, groups)
    return None


def _layers(outputs, rt_detr: bool) -> list[tuple[dict, str]] | None:
    """The outputs of each layer with the ending of its results; None if they do not stack."""
    aux = "_aux_" if rt_detr else "_"
    more = [(o, f"{aux}{i}") for i, o in enumerate(outputs.get("auxiliary_outputs") or [])]
    if not rt_detr and "enc_outputs" in outputs:
        more.append((outputs["enc_outputs"], "_enc"))
    shapes = {(o["logits"].shape, o["pred_boxes"].shape) for o, _ in [(outputs, ""), *more]}
    return [(outputs, ""), *more] if len(shapes) == 1 else None


def _known_queries(positive, groups: int, per_group: int) -> Tensor:
    """(B, groups, T) from the host's list of all denoising queries that have an object."""
    rows = [p.reshape(groups, len(p) // groups).t() for p in positive]
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    first = torch.arange(groups, device=table.device) * per_group
    return torch.where(table >= 0, table - first, -1).mT


class _Step:
    """The losses of one call of a host's criterion."""

    def __init__(self, criterion, plan: _Plan, targets):
        self.criterion, self.plan, self.targets = criterion, plan, targets
        self.labels = [t["class_labels"] for t in targets]
        self.boxes = [t["boxes"] for t in targets]
        self.sizes = [len(row) for row in self.labels]
        matcher = criterion.matcher
        weights = matcher.class_cost, matcher.bbox_cost, matcher.giou_cost
        self.ours = _criterion(plan.loss, plan.params, weights, plan.alpha, plan.gamma, plan.groups)
        self.losses: dict = {}

    def add(self, layers, num_boxes, indices: Tensor | None = None) -> None:
        """All terms of the layers, under the host's names and in its order.

        What is not ours takes the host's way, layer by layer, with our pairs.
        """
        plan, host = self.plan, self.criterion
        logits, boxes = (
            torch.stack([o[name] for o, _ in layers]) for name in ("logits", "pred_boxes")
        )
        found = self.ours(
            logits, boxes, self.labels, self.boxes, indices=indices, num_boxes=num_boxes
        )
        terms = zip(*(found[name].unbind() for name in ("class", "l1", "giou")), strict=True)
        indices = found["indices"]
        indices = indices if indices.dim() == 4 else indices.unsqueeze(2)
        others = set(host.losses) - {plan.host_loss, "boxes"}
        pairs = [None] * len(layers)
        if others - {"cardinality"}:  # on the host, as its own matchers have them
            queries_each = logits.shape[2] // indices.shape[2]
            pairs = [_as_pairs(table.cpu(), self.sizes, queries_each) for table in indices]
        for (outputs, ending), (named, l1, giou), pair in zip(layers, terms, pairs, strict=True):
            for loss in host.losses:
                if loss == "masks" and ending not in ("", "_enc"):
                    continue
                if loss == plan.host_loss:
                    values = {plan.key: named}
                elif loss == "boxes":
                    values = {"loss_bbox": l1, "loss_giou": giou}
                else:
                    values = host.get_loss(loss, outputs, self.targets, pair, num_boxes)
                weights = getattr(host, "weight_dict", None)
                if weights is not None:
                    values = {k: v * weights[k] for k, v in values.items() if k in weights}
                self.losses |= {k + ending: v for k, v in values.items()}


def _rt_detr(original):
    @functools.wraps(original)
    def forward(self, outputs, targets):
        plan = _plan(self)
        layers = _layers(outputs, True)
        if plan is None or layers is None:
            return original(self, outputs, targets)
        step = _Step(self, plan, targets)
        num_boxes = float(max(sum(step.sizes), 1))
        step.add(layers, num_boxes)
        if "dn_auxiliary_outputs" in outputs:
            known = outputs["denoising_meta_values"]
            groups = known["dn_num_group"]
            layers = [(o, f"_dn_{i}") for i, o in enumerate(outputs["dn_auxiliary_outputs"])]
            per_group = layers[0][0]["logits"].shape[1] // groups
            indices = _known_queries(known["dn_positive_idx"], groups, per_group)
            step.add(layers, num_boxes * groups, indices.expand(len(layers), -1, -1, -1))
        return step.losses

    return forward


def _image_loss(num_boxes_of):
    """``num_boxes_of(number of pairs, device)``: the host's divisor, a mean over processes."""

    def make(original):
        @functools.wraps(original)
        def forward(self, outputs, targets):
            plan = _plan(self)
            layers = _layers(outputs, False)
            if plan is None or layers is None:
                return original(self, outputs, targets)
            step = _Step(self, plan, targets)
            pairs = sum(step.sizes) * plan.groups
            step.add(layers, num_boxes_of(pairs, outputs["logits"].device))
            return step.losses

        return forward

    return make


def _over_accelerate(pairs: int, device):
    """Where the host asks accelerate for the number of processes."""
    host = importlib.import_module("transformers.loss.loss_for_object_detection")
    state = getattr(host, "PartialState", None)
    if state is None or state._shared_state == {}:
        return float(max(pairs, 1))
    count = host.reduce(torch.as_tensor([pairs], dtype=torch.float, device=device))
    return (count / state().num_processes).clamp(min=1).squeeze(0)


def _over_processes(pairs: int, device):
    """Where the host asks torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return float(max(pairs, 1))
    count = torch.as_tensor(float(pairs), device=device)
    dist.all_reduce(count)
    return (count / dist.get_world_size()).clamp(min=1)


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
        Place(theirs, "RTDetrLoss.forward", _rt_detr),
        Place(theirs, "RTDetrLoss.loss_labels_vfl", lambda original: _loss_labels_vfl),
        Place(theirs, "RTDetrLoss.loss_boxes", lambda original: _loss_boxes),
        Place(other, "DeformableDetrHungarianMatcher.forward", deformable),
        # inherited from ImageLoss, as loss_boxes below
        Place(other, "DeformableDetrImageLoss.forward", _image_loss(_over_accelerate)),
        Place(other, "DeformableDetrImageLoss.loss_labels", lambda original: _loss_labels),
        # inherited from ImageLoss, whose other heirs keep theirs
        Place(other, "DeformableDetrImageLoss.loss_boxes", lambda original: _loss_boxes),
        Place(third, "LwDetrHungarianMatcher.forward", deformable),
        Place(third, "LwDetrImageLoss.forward", _image_loss(_over_processes)),
        Place(third, "LwDetrImageLoss.loss_labels", lambda original: _loss_labels_iou_aware),
        Place(third, "LwDetrImageLoss.loss_boxes", lambda original: _loss_boxes),
        Place(d_fine, "DFineLoss.unimodal_distribution_focal_loss", lambda _: _fine_grained),
        Place(d_fine, "DFineLoss.loss_local", _loss_local),
        Place(deim, "Deimv2Loss.loss_labels_mal", lambda original: _loss_labels_mal),
    ]


_host = Host("transformers", "transformers 5.23.0", _places)
install, uninstall, installed = _host.install, _host.uninstall, _host.installed
