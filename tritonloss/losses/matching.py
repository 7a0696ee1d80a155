"""Matching cost of set prediction, and the assignment of queries to objects."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonloss import _checks as check
from tritonloss import _op
from tritonloss._dispatch import launchers, use_triton
from tritonloss._targets import check_logits
from tritonloss.eager import matching as eager
from tritonloss.eager._entry import without_autocast

kernels = launchers("matching")
CLASS_COSTS = ("focal", "bce", "softmax", "iou_aware")
BOX_FORMATS = ("cxcywh", "xyxy")
SUBSTITUTE = 1e8  # large, and still far from the end of float32 in a sum


def pad_objects(labels, target_boxes, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lists with the objects of each image as ``(labels, boxes, sizes)``, padded with 0."""
    if not isinstance(target_boxes, (list, tuple)) or len(labels) != len(target_boxes):
        raise ValueError(
            "labels and target_boxes must be two lists of the same length where one is a list"
        )
    for name, dims, values in (("labels", 1, labels), ("target_boxes", 2, target_boxes)):
        for value in values:
            check.is_tensor(name, value)
            if value.dim() != dims or (dims == 2 and value.shape[1] != 4):
                shape = "(T,)" if dims == 1 else "(T, 4)"
                raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
    counts = [len(v) for v in labels]
    if counts != [len(v) for v in target_boxes]:
        raise ValueError(
            f"labels and target_boxes must have the same objects; got {counts} and "
            f"{[len(v) for v in target_boxes]}"
        )
    sizes = torch.tensor(counts, device=x.device)
    if not counts:
        return sizes.reshape(0, 0), x.new_zeros(0, 0, 4), sizes
    pad = torch.nn.utils.rnn.pad_sequence
    labels, target_boxes = pad(list(labels), True), pad(list(target_boxes), True)
    return labels, target_boxes, sizes


def parse_objects(logits: Tensor, labels, target_boxes, sizes, last: int):
    """The objects of each image, padded and contiguous: ``(labels, boxes, sizes)``."""
    if isinstance(labels, (list, tuple)):
        if sizes is not None:
            raise ValueError("sizes go with padded objects; lists have their own lengths")
        labels, target_boxes, sizes = pad_objects(labels, target_boxes, logits)
    check.is_integer("labels", labels)
    images = logits.shape[-3]
    if labels.dim() != 2 or labels.shape[0] != images:
        raise ValueError(f"labels must have shape ({images}, T); got {tuple(labels.shape)}")
    check.on_device_of("labels", labels, "logits", logits)
    check.is_input(
        "target_boxes", target_boxes, (*labels.shape, 4), "4 for each label", "logits", logits
    )
    if sizes is None:
        sizes = labels.new_full((images,), labels.shape[1])
    check.is_integer("sizes", sizes)
    check.has_shape("sizes", sizes, (images,), "one per image")
    check.on_device_of("sizes", sizes, "logits", logits)
    if check.values_checked(logits):
        valid = (sizes >= 0) & (sizes <= labels.shape[1])
        check.require(valid, f"sizes must lie in 0..{labels.shape[1]}", sizes)
        known = torch.arange(labels.shape[1], device=labels.device) < sizes.unsqueeze(1)
        wide = labels.long()
        valid = ~known | ((wide >= 0) & (wide <= last))
        check.require(valid, f"labels of objects must lie in 0..{last}", wide)
    return labels.contiguous(), target_boxes.contiguous(), sizes.contiguous()


def parse_queries(logits: Tensor, boxes: Tensor) -> None:
    check_logits(logits)
    if logits.dim() < 3:
        raise ValueError(f"logits must have shape (..., B, Q, C); got {tuple(logits.shape)}")
    check.is_floating("boxes", boxes)
    check.has_shape("boxes", boxes, (*logits.shape[:-1], 4), "4 for each query")
    check.on_device_of("boxes", boxes, "logits", logits)


def is_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def three_numbers(name: str, values) -> tuple:
    """Weights of the class, the L1 and the GIoU term."""
    if not isinstance(values, (tuple, list)) or len(values) != 3:
        error = ValueError if isinstance(values, (tuple, list)) else TypeError
        raise error(f"{name} must be three numbers (class, L1, GIoU); got {values!r}")
    terms = zip(("class", "L1", "GIoU"), values, strict=True)
    return tuple(check.is_number(f"{name} ({term})", value) for term, value in terms)


def _two_leading(x: Tensor) -> Tensor:
    """(..., B, Q, D) as (O, G, B, Q, D): a view, but for more than two leading dims."""
    while x.dim() < 5:
        x = x.unsqueeze(0)
    return x.flatten(0, x.dim() - 5) if x.dim() > 5 else x


@check.by_name
@torch.no_grad()
def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor | list[Tensor],
    target_boxes: Tensor | list[Tensor],
    sizes: Tensor | None = None,
    *,
    class_cost: str = "focal",
    weights: tuple[float, float, float] = (2.0, 5.0, 2.0),
    alpha: float | Tensor = 0.25,
    gamma: float | Tensor = 2.0,
    box_format: str = "cxcywh",
    nonfinite_cost: float | Tensor | None = SUBSTITUTE,
) -> Tensor:
    r"""Cost of matching every query with every object of its own image.

    .. math:: C_{qt} = w_1 \, c(q, t) + w_2 \, \lVert b_q - b_t \rVert_1
              - w_3 \, \mathrm{GIoU}(b_q, b_t)

    The class cost c, with x the logit of the object's class and p = sigmoid(x):

    * ``"focal"``: :math:`-\alpha (1-p)^\gamma \log(p + 10^{-8}) + (1-\alpha) p^\gamma
      \log(1 - p + 10^{-8})`, what the focal loss gains (Deformable DETR, RT-DETR, D-FINE);
    * ``"bce"``: -x, what cross entropy gains;
    * ``"softmax"``: minus the softmax of all logits of the query at the class (DETR);
    * ``"iou_aware"``: :math:`-p^\alpha \mathrm{IoU}^{1-\alpha}`.

    Layers and query groups are leading dims. Images do not meet: nothing of the size of all queries
    x all objects of a batch is made. There is no gradient.

    Args:
        logits: ``(..., B, Q, C)``, float16, bfloat16, float32 or float64, any strides.
        boxes: ``(..., B, Q, 4)``, floating.
        labels: integers ``(B, T)``, 0..C-1 where there is an object; or a list of B tensors.
        target_boxes: ``(B, T, 4)``, floating; or a list of B tensors ``(T_b, 4)``.
        sizes: integers ``(B,)``, the number of objects of each image: what stands behind them in
            labels and target_boxes is not looked at. None: all T; must be None with lists.
        class_cost: ``"focal"``, ``"bce"``, ``"softmax"`` or ``"iou_aware"``.
        weights: of the class, L1 and GIoU cost; numbers or 0-d tensors.
        alpha: in [0, 1], of the focal and the IoU-aware cost.
        gamma: focusing power of the focal cost, >= 0.
        box_format: ``"cxcywh"`` (centre and size) or ``"xyxy"``, for both kinds of boxes; L1 is
            that of the boxes as they are given.
        nonfinite_cost: stands in for every cost that is NaN or infinite; None leaves it.

    Returns:
        ``(..., B, Q, T)``, float32 (float64 for float64 inputs), +inf where there is no object.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.

    Example:
        >>> import torch, tritonloss
        >>> boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2]]])  # one image
        >>> logits = torch.zeros(1, 2, 3)
        >>> objects = torch.tensor([[1]]), torch.tensor([[[0.1, 0.1, 0.2, 0.2]]])
        >>> cost = tritonloss.matching_cost(logits, boxes, *objects)
        >>> [round(v, 3) for v in cost.flatten().tolist()]
        [5.382, -2.173]
        >>> tritonloss.assign(cost).tolist()  # the second query takes the object
        [[1]]

    Reference:
        Carion et al., End-to-End Object Detection with Transformers, ECCV 2020; Zhu et al.,
        Deformable DETR, ICLR 2021.
    """
    parse_queries(logits, boxes)
    is_choice("class_cost", class_cost, CLASS_COSTS)
    is_choice("box_format", box_format, BOX_FORMATS)
    labels, target_boxes, sizes = parse_objects(
        logits, labels, target_boxes, sizes, logits.shape[-1] - 1
    )
    weights = three_numbers("weights", weights)
    alpha = check.is_number("alpha", alpha, 0, 1)
    gamma = check.is_number("gamma", gamma, 0)
    if nonfinite_cost is not None:
        nonfinite_cost = check.is_number("nonfinite_cost", nonfinite_cost)
    substituted = nonfinite_cost is not None
    params = (*weights, alpha, gamma, nonfinite_cost if substituted else 0.0)
    centred = box_format == "cxcywh"
    shape = (*logits.shape[:-1], labels.shape[1])
    logits, boxes = logits.detach(), boxes.detach()
    wide = torch.float64 in (logits.dtype, boxes.dtype)
    if not wide and 0 not in shape and use_triton(logits):
        square = not isinstance(gamma, Tensor) and gamma == 2
        args = _op.packed(logits, (
            _two_leading(boxes), labels, target_boxes, sizes, params, class_cost, centred, square,
            substituted,
        ))  # fmt: skip
        return kernels.cost(_two_leading(logits), *args).reshape(shape)
    if 0 in shape:
        return logits.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    with without_autocast(logits):
        return eager.matching_cost(
            logits.flatten(0, -3), boxes.flatten(0, -3), labels, target_boxes, sizes, params,
            class_cost, centred, substituted,
        ).reshape(shape)  # fmt: skip


def _device_solver(cost: Tensor):
    """torch-linear-assignment's solver, if it is installed and the cost lies on a GPU."""
    if not cost.is_cuda:
        return None
    try:
        from torch_linear_assignment import batch_linear_assignment
    except ImportError:
        return None
    return batch_linear_assignment


def _solve_on_device(solver, cost: Tensor, sizes: Tensor | None) -> Tensor:
    """The solution for cost (N, Q, T), T <= Q, where it lies: queries (N, T)."""
    objects = cost.shape[2]
    # in rows: of what is not finite the solver may never come to an end
    table = cost.float().nan_to_num(nan=SUBSTITUTE, posinf=SUBSTITUTE, neginf=-SUBSTITUTE).mT
    if sizes is None:
        return solver(table.contiguous()).long()
    unknown = torch.arange(objects, device=cost.device) >= sizes.unsqueeze(1)
    unknown = unknown.repeat(len(cost) // len(sizes), 1)
    # every query costs it the same: one that the objects leave
    table = table.masked_fill(unknown.unsqueeze(2), 0)
    return solver(table.contiguous()).long().masked_fill(unknown, -1)


def _solve(cost: Tensor, counts: list[int]) -> Tensor:
    """SciPy's solution for cost (N, Q, T) on the CPU, the images in turn: queries (N, T)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("assign needs SciPy: pip install tritonloss[detr]") from error
    n, _, objects = cost.shape
    found = torch.full((n, objects), -1, dtype=torch.int64, device="cpu")
    table, result = cost.numpy(), found.numpy()
    for i in range(n):
        try:
            queries, matched = linear_sum_assignment(table[i, :, : counts[i % len(counts)]])
        except ValueError:
            raise ValueError(
                "cost must be finite, or +inf where a query must not take an object, and leave "
                f"enough queries for the objects; got other values in image {i % len(counts)}"
            ) from None
        result[i, matched] = queries
    return found


@check.by_name
@torch.no_grad()
def assign(cost: Tensor, sizes: Tensor | None = None) -> Tensor:
    r"""The query of each object in the cheapest assignment, one query an object.

    .. math:: \min_\sigma \sum_t C_{\sigma(t)\, t}, \quad \sigma(t) \ne \sigma(t')

    SciPy solves it on the CPU; from a GPU the cost is fetched once for all layers and images, which
    waits for the device, and the result is sent back without waiting. With torch-linear-assignment
    installed, costs on a GPU with T <= Q are solved there in float32, and nothing waits; entries
    that are not finite count as 1e8 then, and sizes are not checked. Among equally cheap
    assignments the solver's choice counts, which depends on the cost alone.

    Args:
        cost: ``(..., B, Q, T)`` floating, as :func:`matching_cost` returns it.
        sizes: integers ``(B,)``, the number of objects of each image; None: all T.

    Returns:
        int64 ``(..., B, T)`` on the device of cost: the query of each object; -1 where there is no
        object, or none of the Q queries is left for it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; a NaN or -inf in the
            cost of an object.
        ImportError: SciPy is absent (``pip install tritonloss[detr]``).

    Example:
        >>> import torch, tritonloss
        >>> cost = torch.tensor([[[1.0, 0.0], [5.0, 4.5]]])
        >>> tritonloss.assign(cost).tolist()  # 5.0 + 0.0 is less than 1.0 + 4.5
        [[1, 0]]

    Reference:
        Crouse, On implementing 2D rectangular assignment algorithms, IEEE TAES 2016 (SciPy's).
    """
    check.is_floating("cost", cost)
    check.holds_values("cost", cost)
    if cost.dim() < 3:
        raise ValueError(f"cost must have shape (..., B, Q, T); got {tuple(cost.shape)}")
    images, queries, objects = cost.shape[-3:]
    if sizes is not None:
        check.is_integer("sizes", sizes)
        check.has_shape("sizes", sizes, (images,), "one per image")
    shape = (*cost.shape[:-2], objects)
    if 0 in (*shape, queries):
        return torch.full(shape, -1, dtype=torch.int64, device=cost.device)
    solver = _device_solver(cost) if objects <= queries else None
    if solver is not None:
        if sizes is not None:
            check.on_device_of("sizes", sizes, "cost", cost)
        return _solve_on_device(solver, cost.flatten(0, -3), sizes).reshape(shape)
    counts = [objects] * images
    if sizes is not None:
        counts = sizes.tolist()
        if counts and not 0 <= min(counts) <= max(counts) <= objects:
            raise ValueError(f"sizes must lie in 0..{objects}; got {counts}")
    table = cost.detach().flatten(0, -3).cpu()
    if table.dtype in (torch.float16, torch.bfloat16):
        table = table.float()
    return _solve(table, counts).reshape(shape).to(cost.device, non_blocking=True)
