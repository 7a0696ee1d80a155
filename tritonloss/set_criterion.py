"""The criterion of set prediction (DETR and its relatives), over all decoder layers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _checks as check
from .distributed import HoldsGroup, ProcessGroup, parse_sharing, reduce_avg_factor
from .losses import pointwise, softmax_focal
from .losses.boxes import giou_loss, overlap_of_pairs
from .losses.matching import (
    BOX_FORMATS,
    CLASS_COSTS,
    assign,
    is_choice,
    matching_cost,
    parse_objects,
    parse_queries,
    three_numbers,
)
from .losses.quality import iou_aware_target

# Class loss: its default parameters, and the class cost that goes with it.
CLASS_LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "focal": ({"alpha": 0.25, "gamma": 2.0}, "focal"),
    "varifocal": ({"alpha": 0.75, "gamma": 2.0}, "focal"),
    "mal": ({"alpha": None, "gamma": 1.5}, "focal"),
    "iou_aware_bce": ({"alpha": 0.25, "gamma": 2.0}, "focal"),
    "softmax": ({"no_object_weight": 0.1}, "softmax"),
}


def _corners(boxes: Tensor, box_format: str) -> Tensor:
    if box_format == "xyxy":
        return boxes
    centre, size = boxes.split(2, -1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], -1)


class SetCriterion(HoldsGroup, nn.Module):
    r"""Match queries with objects, then class, L1 and GIoU loss of every decoder layer.

    .. math:: L = \sum_l w_l \left( w_1 L_{class} + w_2 \sum \lVert b_\sigma - b \rVert_1 / n
              + w_3 \sum (1 - \mathrm{GIoU}(b_\sigma, b)) / n \right)

    n is the number of objects (times the number of groups), the class loss is a sum over n, too;
    that of ``"softmax"`` is the mean weighted by class.

    Args:
        class_loss: ``"focal"``, ``"varifocal"`` (the weight of negatives is detached, as in RT-DETR
            and D-FINE), ``"mal"``, ``"iou_aware_bce"`` or ``"softmax"``, whose logits have a last
            column for no object.
        class_params: parameters of that loss by name: ``alpha`` and ``gamma``, for softmax
            ``no_object_weight``.
        loss_weights: of class, L1 and GIoU loss in the total.
        cost_weights: of class, L1 and GIoU cost, see :func:`tritonloss.matching_cost`.
        class_cost: None takes ``"softmax"`` for softmax and ``"focal"`` for the others.
        cost_alpha, cost_gamma: parameters of the class cost.
        box_format: ``"cxcywh"`` or ``"xyxy"``.
        groups: equal groups of neighbouring queries, each of which is matched with all objects.
        layer_weights: one number per layer, in the total; None: 1 each.
        process_group: n is summed over its processes.
        gradients_averaged: n is averaged instead, as DistributedDataParallel needs it.

    ``forward(logits, boxes, labels, target_boxes, sizes=None, *, indices=None, num_boxes=None)``
    takes logits ``(L, B, Q, C)`` and boxes ``(L, B, Q, 4)`` of L layers, the objects as
    :func:`tritonloss.matching_cost` takes them, and

        indices: int64 ``(L, B, T)``, or ``(L, B, groups, T)`` with groups: the query (of its group)
            of each object, -1 for none. None matches. Denoising queries come with theirs, see
            ``denoising_indices``; their number of groups is that of the indices. With indices
            nothing waits for the device, and the call compiles as one graph.
        num_boxes: n, a number or 0-d tensor; <= 0 counts as 1. None counts.

    and returns a dict of ``class``, ``l1`` and ``giou``, each ``(L,)`` and not weighted, ``total``,
    the weighted sum of all, and ``indices``. All stay on the device.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.SetCriterion("focal")
        >>> logits = torch.zeros(6, 2, 10, 3, requires_grad=True)  # layers, images, queries
        >>> boxes = torch.rand(6, 2, 10, 4)
        >>> labels = [torch.tensor([0, 2]), torch.tensor([], dtype=torch.int64)]
        >>> losses = criterion(logits, boxes, labels, [torch.rand(2, 4), torch.rand(0, 4)])
        >>> losses["total"].backward()
        >>> losses["class"].shape, losses["indices"].shape
        (torch.Size([6]), torch.Size([6, 2, 2]))

    Reference:
        Carion et al., End-to-End Object Detection with Transformers, ECCV 2020; Chen et al., Group
        DETR, ICCV 2023.
    """

    def __init__(
        self,
        class_loss: str = "focal",
        *,
        class_params: dict[str, Any] | None = None,
        loss_weights: tuple[float, float, float] = (1.0, 5.0, 2.0),
        cost_weights: tuple[float, float, float] = (2.0, 5.0, 2.0),
        class_cost: str | None = None,
        cost_alpha: float = 0.25,
        cost_gamma: float = 2.0,
        box_format: str = "cxcywh",
        groups: int = 1,
        layer_weights: tuple[float, ...] | None = None,
        process_group: ProcessGroup | None = None,
        gradients_averaged: bool = False,
    ) -> None:
        super().__init__()
        is_choice("class_loss", class_loss, tuple(CLASS_LOSSES))
        params, cost = CLASS_LOSSES[class_loss]
        if not isinstance(class_params, (dict, type(None))):
            raise TypeError(f"class_params must be a dict; got {type(class_params).__name__}")
        unknown = sorted(set(class_params or {}) - set(params))
        if unknown:
            raise ValueError(
                f"class_params of {class_loss} are {', '.join(params)}; got {', '.join(unknown)}"
            )
        is_choice("class_cost", cost if class_cost is None else class_cost, CLASS_COSTS)
        is_choice("box_format", box_format, BOX_FORMATS)
        check.is_index("groups", groups)
        check.is_number("groups", groups, 1)
        if layer_weights is not None:
            if not isinstance(layer_weights, (tuple, list)):
                raise TypeError(f"layer_weights must be numbers, one a layer; got {layer_weights}")
            layer_weights = tuple(
                check.is_number(f"layer_weights ({k})", w) for k, w in enumerate(layer_weights)
            )
        parse_sharing(process_group, gradients_averaged)
        self.class_loss: str = class_loss
        self.class_params: dict[str, Any] = {**params, **(class_params or {})}
        self.loss_weights: tuple[float, ...] = three_numbers("loss_weights", loss_weights)
        self.cost_weights: tuple[float, ...] = three_numbers("cost_weights", cost_weights)
        self.class_cost: str = class_cost or cost
        self.cost_alpha: float = check.is_number("cost_alpha", cost_alpha, 0, 1)
        self.cost_gamma: float = check.is_number("cost_gamma", cost_gamma, 0)
        self.box_format: str = box_format
        self.groups: int = groups
        self.layer_weights: tuple[float, ...] | None = layer_weights
        self.process_group: ProcessGroup | None = process_group
        self.gradients_averaged: bool = gradients_averaged
        self._check_class_params()

    def _check_class_params(self) -> None:
        for name, value in self.class_params.items():
            if value is None and self.class_loss in ("focal", "mal"):
                continue  # as their functions take it
            most = 1 if name == "alpha" and self.class_loss in ("focal", "iou_aware_bce") else None
            check.is_number(name, value, 0, most)

    def match(
        self,
        logits: Tensor,
        boxes: Tensor,
        labels: Tensor | list[Tensor],
        target_boxes: Tensor | list[Tensor],
        sizes: Tensor | None = None,
    ) -> Tensor:
        """The query of each object: ``indices`` as ``forward`` takes them."""
        parse_queries(logits, boxes)
        last = logits.shape[-1] - (2 if self.class_loss == "softmax" else 1)
        labels, target_boxes, sizes = parse_objects(logits, labels, target_boxes, sizes, last)
        cost = matching_cost(
            logits,
            boxes,
            labels,
            target_boxes,
            sizes,
            class_cost=self.class_cost,
            weights=self.cost_weights,
            alpha=self.cost_alpha,
            gamma=self.cost_gamma,
            box_format=self.box_format,
        )
        if self.groups == 1:
            return assign(cost, sizes)
        # the cost of a query does not depend on its group
        cost = cost.unflatten(2, (self.groups, -1)).movedim(2, 1)
        return assign(cost, sizes).movedim(1, 2)

    @staticmethod
    def denoising_indices(
        labels: Tensor | list[Tensor],
        sizes: Tensor | None = None,
        *,
        layers: int,
        groups: int = 1,
    ) -> Tensor:
        """The query of each object among denoising queries, whose objects are known.

        A group holds a query for each of T objects, in their order and padded to T; what follows
        them in the group belongs to no object (the negatives of contrastive denoising). Pass the
        queries of the groups, one after the other, to a call of their own:

        >>> criterion = SetCriterion("varifocal")
        >>> labels = [torch.tensor([0, 2]), torch.tensor([1])]
        >>> boxes = [torch.rand(2, 4), torch.rand(1, 4)]
        >>> indices = criterion.denoising_indices(labels, layers=6, groups=5)
        >>> queries = 5 * 2 * 2  # groups of T = 2 positives and as many negatives
        >>> logits, predicted = torch.zeros(6, 2, queries, 3), torch.rand(6, 2, queries, 4)
        >>> losses = criterion(logits, predicted, labels, boxes, indices=indices)

        Args:
            labels: of the objects, ``(B, T)`` or a list, as ``forward`` takes them.
            sizes: number of objects of each image, ``(B,)``; None: all T.
            layers: L.
            groups: how often each object was noised.

        Returns:
            int64 ``(L, B, groups, T)``, -1 where there is no object.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        for name, value in (("layers", layers), ("groups", groups)):
            check.is_index(name, value)
            check.is_number(name, value, 1)
        if isinstance(labels, (list, tuple)):
            if sizes is not None:
                raise ValueError("sizes go with padded objects; lists have their own lengths")
            for value in labels:
                check.is_tensor("labels", value)
            counts = [len(value) for value in labels]
            device = labels[0].device if labels else None
            objects, sizes = max(counts, default=0), torch.tensor(counts, device=device)
        else:
            check.is_integer("labels", labels)
            if labels.dim() != 2:
                raise ValueError(f"labels must have shape (B, T); got {tuple(labels.shape)}")
            objects = labels.shape[1]
            if sizes is None:
                sizes = labels.new_full(labels.shape[:1], objects)
            check.is_integer("sizes", sizes)
            check.has_shape("sizes", sizes, labels.shape[:1], "one per image")
            check.on_device_of("sizes", sizes, "labels", labels)
        query = torch.arange(objects, device=sizes.device)
        query = torch.where(query < sizes.unsqueeze(1), query, -1)
        return query.unsqueeze(1).expand(layers, -1, groups, -1)

    def _class_terms(self, logits, labels, quality, divisor) -> Tensor:
        """Class loss of each layer, in one call."""
        params = self.class_params
        if self.class_loss == "softmax":
            weight = logits.new_ones(logits.shape[-1], dtype=torch.float32)
            weight[-1] = params["no_object_weight"]
            divisor = weight[labels].flatten(1).sum(1)
            return softmax_focal.by_layer(
                logits, labels, weight, torch.where(divisor <= 0, 1, divisor)
            )
        alpha, gamma = params["alpha"], params["gamma"]
        if self.class_loss == "focal":
            numbers = (*pointwise.balance(alpha), gamma)
            return pointwise.by_layer("focal", logits, labels, None, numbers, divisor)
        if self.class_loss == "varifocal":
            numbers = (alpha, gamma, 1.0, 1.0)
        elif self.class_loss == "mal":
            numbers = (1.0 if alpha is None else alpha, gamma, 0.0, 1.0)
            quality = quality**gamma
        else:
            numbers = (1.0, gamma, 0.0, 0.0)
            quality = iou_aware_target(logits, labels, quality, alpha)
        return pointwise.by_layer("varifocal", logits, labels, quality, numbers, divisor)

    def forward(
        self,
        logits: Tensor,
        boxes: Tensor,
        labels: Tensor | list[Tensor],
        target_boxes: Tensor | list[Tensor],
        sizes: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        num_boxes: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        parse_queries(logits, boxes)
        if logits.dim() != 4:
            raise ValueError(f"logits must have shape (L, B, Q, C); got {tuple(logits.shape)}")
        layers, images, queries, columns = logits.shape
        groups = self.groups
        if isinstance(indices, Tensor) and indices.dim() == 4:
            groups = max(indices.shape[2], 1)
        if queries % groups:
            raise ValueError(f"{queries} queries do not make {groups} equal groups")
        weights = self.layer_weights
        if weights is not None and len(weights) != layers:
            raise ValueError(f"layer_weights must be {layers} numbers; got {len(weights)}")
        if self.class_loss == "softmax" and columns < 2:
            raise ValueError(
                f"logits must have a class beside the column for no object; got {columns} columns"
            )
        background = columns - 1 if self.class_loss == "softmax" else columns
        labels, target_boxes, sizes = parse_objects(
            logits, labels, target_boxes, sizes, background - 1
        )
        objects = labels.shape[1]
        if indices is None:
            indices = self.match(logits, boxes, labels, target_boxes, sizes)
        shape = (layers, images, groups, objects)
        check.is_integer("indices", indices)
        grouped = groups > 1 or indices.dim() == 4
        check.has_shape(
            "indices", indices, shape if grouped else shape[:2] + shape[3:], "as matched"
        )
        check.on_device_of("indices", indices, "logits", logits)
        per_group = queries // groups
        if check.values_checked(logits):
            valid = (indices >= -1) & (indices < per_group)
            check.require(valid, f"indices must lie in -1..{per_group - 1}", indices)

        known = torch.arange(objects, device=labels.device) < sizes.unsqueeze(1)  # (B, T)
        place = indices.reshape(shape).long()
        valid = (place >= 0) & known.unsqueeze(1)
        first = torch.arange(groups, device=place.device) * per_group
        place = torch.where(valid, place + first.unsqueeze(1), queries).flatten(2)
        valid = valid.flatten(2)  # (L, B, groups T)
        wanted = target_boxes.to(boxes.dtype).repeat(1, groups, 1)  # (B, groups T, 4)
        wanted = wanted.expand(layers, -1, -1, -1)
        chosen = torch.where(valid, place, 0).unsqueeze(-1).expand(-1, -1, -1, 4)
        if queries == 0:
            chosen = boxes.new_zeros(wanted.shape)
        else:
            chosen = boxes.gather(2, chosen)
        # a pair that does not exist has the loss 0, whatever stands there
        chosen = torch.where(valid.unsqueeze(-1), chosen, 0)
        wanted = torch.where(valid.unsqueeze(-1), wanted, 0)

        if num_boxes is None:
            num_boxes = sizes.sum() * groups
            num_boxes = reduce_avg_factor(
                num_boxes, self.live_group(), gradients_averaged=self.gradients_averaged
            )
        num_boxes = check.is_number("num_boxes", num_boxes)
        # below 1 it may be, where it is a mean over processes; <= 0 counts as 1, as avg_factor does
        if isinstance(num_boxes, Tensor):
            divisor = num_boxes.detach().to(logits.device, torch.float32)
            divisor = torch.where(divisor <= 0, 1, divisor)
        else:
            divisor = float(num_boxes) if num_boxes > 0 else 1.0

        paired = torch.promote_types(boxes.dtype, torch.float32)
        l1 = (chosen.to(paired) - wanted.to(paired)).abs().sum((1, 2, 3)) / divisor
        corners = _corners(chosen.to(paired), self.box_format)
        target_corners = _corners(wanted.to(paired), self.box_format)
        apart = giou_loss(corners, target_corners, reduction="none")
        giou = (apart * valid).sum((1, 2)) / divisor

        # column Q takes what belongs to no query
        query_labels = place.new_full((layers, images, queries + 1), background)
        repeated = labels.long().repeat(1, groups).expand(layers, -1, -1)
        query_labels = query_labels.scatter_(2, place, repeated)[..., :queries]
        quality = None
        if self.class_loss not in ("focal", "softmax"):
            with torch.no_grad():
                overlap = overlap_of_pairs(corners, target_corners)
                quality = overlap.new_zeros(layers, images, queries + 1)
                quality = quality.scatter_(2, place, overlap)[..., :queries]
        named = self._class_terms(logits, query_labels, quality, divisor)
        terms = {"class": named, "l1": l1, "giou": giou}
        of_class, of_l1, of_giou = self.loss_weights
        total = of_class * named + of_l1 * l1 + of_giou * giou
        if weights is not None:
            # one number after the other: a tensor of them would be copied to the device
            total = torch.stack([total[i] * weight for i, weight in enumerate(weights)])
        return terms | {"total": total.sum(), "indices": indices}

    if TYPE_CHECKING:  # nn.Module's takes and returns Any

        def __call__(
            self,
            logits: Tensor,
            boxes: Tensor,
            labels: Tensor | list[Tensor],
            target_boxes: Tensor | list[Tensor],
            sizes: Tensor | None = None,
            *,
            indices: Tensor | None = None,
            num_boxes: float | Tensor | None = None,
        ) -> dict[str, Tensor]: ...
