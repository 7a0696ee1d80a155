"""The launches whose binaries are watched: each loss on meta tensors, which need no memory.

A new kernel is a line of EXAMPLES, and one of STREAMS if it walks over contiguous tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch

import tritonloss as tl
from tritonloss.losses.pointwise import by_layer

from ._record import Launch, recorded_launches

# Odd on purpose: a size divisible by 16 hides a load that is 16 bytes wide for such sizes only.
ROWS, CLASSES = 1001, 81


class Operands:
    """Makes what an example takes: here on the meta device, where nothing has values."""

    rows = ROWS

    def make(self, kind: str, shape: tuple[int, ...], dtype: str, classes: int) -> torch.Tensor:
        """An operand of the kind: logits, labels, classes (labels without background), dense
        (targets), quality, weight, boxes, distances (of a distribution), number."""
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


class Drawn(Operands):
    """Random numbers, the same in float64 as in the example's dtype; ``logits`` collects leaves."""

    def __init__(self, rows: int, seed: int, double: bool = False):
        self.rows, self.double, self.logits = rows, double, []
        self.generator = torch.Generator().manual_seed(seed)

    def share(self, shape) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def make(self, kind, shape, dtype, classes):
        if dtype == "int64":
            labels = torch.randint(classes, shape, generator=self.generator)
            chance = self.share(shape)
            if kind == "labels":  # most rows are background
                labels = torch.where(chance < 0.7, classes, labels)
            return torch.where(chance > 0.95, -1, labels)
        if kind == "logits":
            values = torch.randn(shape, generator=self.generator) * 3
        elif kind == "dense":
            values = self.share(shape)
            values = torch.where(self.share(shape) < 0.995, 0.0, values)
        elif kind == "boxes":
            corner = self.share((*shape[:-1], 2)) * 3 - 2
            values = torch.cat([corner, corner + self.share((*shape[:-1], 2)) * 3], -1)
        elif kind == "distances":
            values = self.share(shape) * (classes - 1)
        else:
            values = self.share(shape) + (0.5 if kind == "number" else 0.0)
        values = values.to(getattr(torch, dtype))
        return values.double() if self.double else values


_operands = Operands()


@contextmanager
def operands(chosen: Operands):
    """Examples called inside take these."""
    global _operands
    before, _operands = _operands, chosen
    try:
        yield chosen
    finally:
        _operands = before


def empty(
    *shape, dtype: str = "float32", kind: str = "weight", classes: int = CLASSES
) -> torch.Tensor:
    return _operands.make(kind, shape, dtype, classes)


def logits(rows: int, classes: int, dtype: str, layout: str) -> torch.Tensor:
    """Contiguous, a permuted NCHW head output, or a slice of the columns."""

    def make(*shape):
        return empty(*shape, dtype=dtype, kind="logits", classes=classes)

    if layout == "nchw":
        x = make(2, classes, 20, rows // 20).permute(0, 2, 3, 1)
    elif layout == "sliced":
        x = make(rows, classes + 3)[:, 1 : classes + 1]
    else:
        x = make(rows, classes)
    x = x.detach().requires_grad_()
    if isinstance(_operands, Drawn):
        _operands.logits.append(x)
    return x


def pointwise(
    loss: Callable,
    form: str = "labels",
    dtype: str = "float32",
    layout: str = "contiguous",
    weight: str | None = None,
    class_weight: bool = False,
    classes: int = CLASSES,
    scheduled: tuple[str, ...] = (),
    **kwargs,
) -> Callable:
    """A call of a pointwise loss; its result is differentiated, if it can be.

    ``scheduled`` names the hyper-parameters that arrive as tensors.
    """

    def call():
        x = logits(_operands.rows, classes, dtype, layout)
        rows, options = x.shape[:-1], dict(kwargs)
        options |= {name: empty(kind="number") for name in scheduled}
        if form == "dense":
            targets = empty(*x.shape, dtype=dtype, kind="dense")
        else:
            targets = empty(*rows, dtype="int64", kind="labels", classes=classes)
        if form == "quality":
            targets = (targets, empty(*rows, kind="quality"))
        if weight:
            options["weight"] = empty(*(rows if weight == "row" else x.shape))
        if class_weight:
            options["class_weight"] = empty(classes)
        return loss(x, targets, **options)

    return call


def rowwise(
    loss: Callable,
    classes: int,
    kind: str | None,
    dtype: str = "float32",
    layout: str = "contiguous",
    scheduled: str | None = None,
    **kwargs,
) -> Callable:
    """A call of a loss with one value per row; ``kind`` of its targets."""

    def call():
        x = logits(_operands.rows, classes, dtype, layout)
        if kind in ("boxes", "logits"):
            targets = (empty(*x.shape, kind=kind),)
        elif kind:
            targets = (empty(*x.shape[:-1], dtype="int64" if kind == "classes" else "float32",
                             kind=kind, classes=classes),)  # fmt: skip
        else:
            targets = ()
        options = {scheduled: empty(kind="number")} if scheduled else {}
        return loss(x, *targets, **kwargs, **options)

    return call


def boxes(loss: Callable, *args, **kwargs) -> Callable:
    return rowwise(loss, 4, "boxes", *args, **kwargs)


def softmax(*args, **kwargs) -> Callable:
    return rowwise(tl.softmax_focal_loss, CLASSES, "classes", *args, **kwargs)


def distribution(*args, **kwargs) -> Callable:
    return rowwise(tl.distribution_focal_loss, 17, "distances", *args, **kwargs)


def distillation(*args, **kwargs) -> Callable:
    return rowwise(tl.distribution_distillation_loss, 33, "logits", *args, **kwargs)


def ranking(loss: Callable, form: str = "labels", dtype: str = "float32", layout="contiguous",
            classes: int = CLASSES, scheduled: bool = False, **kwargs) -> Callable:  # fmt: skip
    def call():
        x = logits(_operands.rows, classes, dtype, layout)
        rows, options = x.shape[:-1], dict(kwargs)
        if scheduled:
            options["delta"] = empty(kind="number")
        if form == "dense":
            return loss(x, empty(*x.shape, kind="dense"), **options)
        labels = empty(*rows, dtype="int64", kind="labels", classes=classes)
        value = empty(*rows, kind="quality")
        if loss is tl.rank_sort_loss:
            return sum(loss(x, (labels, value), **options))
        if loss is tl.alrp_loss:
            return sum(loss(x, labels, value, **options))
        return loss(x, labels, **options)

    return call


def layers(dtype: str = "float32", kind: str = "focal") -> Callable:
    """The sums of two layers, as SetCriterion takes them."""

    def call():
        rows, classes = _operands.rows // 2, 80
        x = logits(2 * rows, classes, dtype, "contiguous").unflatten(0, (2, rows))
        labels = empty(2, rows, dtype="int64", kind="labels", classes=classes)
        quality = None if kind == "focal" else empty(2, rows)
        params = (0.25, 0.75, 2.0) if kind == "focal" else (0.75, 2.0, 1.0, 1.0)
        return by_layer(kind, x, labels, quality, params, 7.0)

    return call


def matching(dtype: str = "float32", scheduled: bool = False, **kwargs) -> Callable:
    """A matching cost of two images and up to 7 objects."""

    def call():
        queries = _operands.rows // 4
        x = logits(2 * queries, CLASSES, dtype, "contiguous").detach().unflatten(0, (2, queries))
        labels = empty(2, 7, dtype="int64", kind="classes")
        sizes, options = None, dict(kwargs)
        if scheduled:
            sizes = (labels % 8).amax(1)
            options["alpha"] = empty(kind="number") / 2  # at most 1
        return tl.matching_cost(
            x, empty(2, queries, 4, kind="boxes"), labels.clamp(min=0),
            empty(2, 7, 4, kind="boxes"), sizes, box_format="xyxy", **options,
        )  # fmt: skip

    return call


def diagnosed(x, targets, **options) -> torch.Tensor:
    diagnosis = tl.Diagnosis()
    diagnosis.update(x, targets, **options)
    return diagnosis.counts


focal = tl.sigmoid_focal_loss

EXAMPLES: dict[str, Callable] = {
    "focal": pointwise(focal),
    "focal dense": pointwise(focal, "dense"),
    "focal gamma 1.5": pointwise(focal, gamma=1.5),
    "focal 80 classes": pointwise(focal, classes=80),
    "focal 80 classes bf16": pointwise(focal, dtype="bfloat16", classes=80),
    "focal 80 classes row weight": pointwise(focal, classes=80, weight="row"),
    "focal fp16": pointwise(focal, dtype="float16"),
    "focal bf16": pointwise(focal, dtype="bfloat16"),
    "focal dense bf16": pointwise(focal, "dense", dtype="bfloat16"),
    "focal nchw": pointwise(focal, layout="nchw"),
    "focal nchw, targets nhwc": pointwise(focal, "dense", layout="nchw"),
    "focal sliced": pointwise(focal, layout="sliced"),
    "focal row weight": pointwise(focal, weight="row"),
    "focal logit weight": pointwise(focal, weight="logit"),
    "focal class weight": pointwise(focal, class_weight=True),
    "focal none": pointwise(focal, reduction="none"),
    "focal avg_factor": pointwise(focal, avg_factor=7.0),
    "focal layers": layers(),
    "varifocal layers bf16": layers("bfloat16", "varifocal"),
    "focal scheduled": pointwise(focal, scheduled=("gamma", "avg_factor")),
    "focal smoothed": pointwise(focal, label_smoothing=0.1),
    "focal smoothed dense": pointwise(focal, "dense", label_smoothing=0.1),
    "focal_star": pointwise(tl.focal_star_loss),
    "focal_star dense": pointwise(tl.focal_star_loss, "dense"),
    "asymmetric": pointwise(tl.asymmetric_loss),
    "asymmetric dense": pointwise(tl.asymmetric_loss, "dense"),
    "gaussian_focal": pointwise(tl.gaussian_focal_loss, "dense"),
    "quality_focal": pointwise(tl.quality_focal_loss, "quality"),
    "quality_focal 80 classes bf16": pointwise(
        tl.quality_focal_loss, "quality", dtype="bfloat16", classes=80
    ),
    "quality_focal dense": pointwise(tl.quality_focal_loss, "dense"),
    "varifocal": pointwise(tl.varifocal_loss, "quality"),
    "varifocal dense": pointwise(tl.varifocal_loss, "dense"),
    "softmax_focal": softmax(),
    "softmax_focal bf16": softmax("bfloat16"),
    "softmax_focal nchw": softmax(layout="nchw"),
    "softmax_focal scheduled": softmax(scheduled="gamma"),
    "distribution_focal": distribution(),
    "distribution_focal bf16": distribution("bfloat16"),
    "distribution_focal nchw": distribution(layout="nchw"),
    "distribution_focal none": distribution(reduction="none"),
    "distribution_distillation": distillation(),
    "distribution_distillation bf16 nchw": distillation("bfloat16", "nchw"),
    "distribution_distillation none": distillation(reduction="none"),
    "distribution_distillation scheduled": distillation(scheduled="temperature"),
    "expectation": rowwise(tl.distribution_expectation, 17, None),
    "iou": boxes(tl.iou_loss),
    "iou square": boxes(tl.iou_loss, mode="square"),
    "iou log": boxes(tl.iou_loss, mode="log"),
    "giou": boxes(tl.giou_loss),
    "giou nchw": boxes(tl.giou_loss, layout="nchw"),
    "diou": boxes(tl.diou_loss),
    "eiou": boxes(tl.eiou_loss),
    "ciou": boxes(tl.ciou_loss),
    "ciou bf16": boxes(tl.ciou_loss, "bfloat16"),
    "ciou scheduled": boxes(tl.ciou_loss, scheduled="alpha_threshold"),
    "asl1": boxes(tl.authentic_smooth_l1_loss),
    "ghm_c": pointwise(tl.ghm_c_loss, bins=30),
    "ghm_c 80 classes": pointwise(tl.ghm_c_loss, bins=30, classes=80),
    "ghm_c 256 bins": pointwise(tl.ghm_c_loss, bins=256),
    "ghm_c dense bf16": pointwise(tl.ghm_c_loss, "dense", "bfloat16", bins=30),
    "ghm_c nchw, targets nhwc": pointwise(tl.ghm_c_loss, "dense", layout="nchw", bins=30),
    "ghm_r": boxes(tl.ghm_r_loss),
    "rank_sort": ranking(tl.rank_sort_loss),
    "rank_sort bf16 nchw": ranking(tl.rank_sort_loss, dtype="bfloat16", layout="nchw"),
    "rank_sort scheduled": ranking(tl.rank_sort_loss, scheduled=True),
    "rank_sort 80 classes": ranking(tl.rank_sort_loss, classes=80),
    "ap": ranking(tl.ap_loss),
    "ap dense": ranking(tl.ap_loss, "dense"),
    "alrp": ranking(tl.alrp_loss),
    "matching": matching(),
    "matching bf16": matching("bfloat16"),
    "matching softmax": matching(class_cost="softmax"),
    "matching iou_aware": matching(class_cost="iou_aware"),
    "matching scheduled": matching(class_cost="iou_aware", scheduled=True),
    "diagnose": pointwise(diagnosed, "quality"),
    "diagnose 80 classes": pointwise(diagnosed, "quality", classes=80),
    "diagnose dense bf16": pointwise(diagnosed, "dense", "bfloat16"),
    "diagnose nchw": pointwise(diagnosed, layout="nchw"),
    "diagnose row weight": pointwise(diagnosed, weight="row"),
}

# Compiled in a quick check: every kernel once, the pointwise one at its widest.
QUICK = [
    "focal",
    "focal dense bf16",
    "focal nchw, targets nhwc",
    "softmax_focal",
    "distribution_focal",
    "distribution_distillation",
    "expectation",
    "ciou",
    "ghm_c",
    "rank_sort",
    "matching",
    "diagnose",
]


def _pointwise_streams(args) -> dict[str, int]:
    names = ["x_ptr", "dense_ptr"]
    names += [] if args["ROW_WEIGHT"] else ["weight_ptr"]
    names += [] if args["REDUCED"] else ["grad_ptr"]
    names += ["out_ptr"] if args["BACKWARD"] or not args["REDUCED"] else []
    return {name: args["BLOCK"] for name in names} if args["LINEAR"] else {}


def _negatives_streams(args) -> dict[str, int]:
    names = ["x_ptr", "dense_ptr", "out_ptr"] if args["BACKWARD"] else ["x_ptr", "dense_ptr"]
    return {name: args["BLOCK"] for name in names} if args["LINEAR"] else {}


def _region_streams(args) -> dict[str, int]:
    return {name: args["BLOCK"] for name in ("x_ptr", "dense_ptr")} if args["LINEAR"] else {}


def _box_streams(args) -> dict[str, int]:
    wide = {"pred_ptr": "PRED_WIDE", "target_ptr": "TARGET_WIDE", "out_ptr": "OUT_WIDE"}
    return {name: 4 * args["BLOCK"] for name, flag in wide.items() if args.get(flag)}


# Per kernel: the pointers through which a program walks over consecutive elements, and how many.
STREAMS: dict[str, Callable] = {
    "pointwise_kernel": _pointwise_streams,
    "negatives_kernel": _negatives_streams,
    "region_sums_kernel": _region_streams,
    "count_kernel": _region_streams,
    "box_kernel": _box_streams,
}
WRITTEN = "out_ptr"

# Kernels that add up in float64 on purpose, and never once per logit.
FLOAT64 = ("prepare_kernel", "collect_kernel", "settle_kernel", "means_kernel")


def wide_accesses(launch: Launch, warp_size: int) -> tuple[int, int]:
    """The 16-byte loads and stores per thread that the contiguous operands of a launch need."""
    streams = STREAMS.get(launch.name, lambda args: {})(launch.args)
    needed = [0, 0]
    for name, elements in streams.items():
        tensor = launch.args[name]
        if tensor is not None:
            a_thread = 16 * warp_size * launch.options["num_warps"]
            needed[name == WRITTEN] += elements * tensor.element_size() // a_thread
    return needed[0], needed[1]


def upstream(loss: torch.Tensor) -> torch.Tensor:
    """The gradient that comes back to an example's result."""
    return empty(*loss.shape, kind="weight").to(loss.dtype)


def run(example: str) -> torch.Tensor:
    """An example's result, after its backward."""
    loss = EXAMPLES[example]()
    if loss.requires_grad:
        loss.backward(upstream(loss))
    return loss.detach()


def launches_of(example: str) -> list[Launch]:
    with recorded_launches() as launches:
        run(example)
    return launches
