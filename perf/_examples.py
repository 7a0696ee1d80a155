"""The launches whose binaries are watched: each loss on meta tensors, which need no memory.

A new kernel is a line of EXAMPLES, and one of STREAMS if it walks over contiguous tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tritonloss as tl

from ._record import Launch, recorded_launches

# Odd on purpose: a size divisible by 16 hides a load that is 16 bytes wide for such sizes only.
ROWS, CLASSES = 1001, 81


def empty(*shape, dtype: str = "float32", grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta", requires_grad=grad)


def logits(rows: int, classes: int, dtype: str, layout: str) -> torch.Tensor:
    """Contiguous, a permuted NCHW head output, or a slice of the columns."""
    if layout == "nchw":
        x = empty(2, classes, 20, rows // 20, dtype=dtype).permute(0, 2, 3, 1)
    elif layout == "sliced":
        x = empty(rows, classes + 3, dtype=dtype)[:, 1 : classes + 1]
    else:
        x = empty(rows, classes, dtype=dtype)
    return x.requires_grad_()


def pointwise(
    loss: Callable,
    form: str = "labels",
    dtype: str = "float32",
    layout: str = "contiguous",
    weight: str | None = None,
    class_weight: bool = False,
    classes: int = CLASSES,
    **kwargs,
) -> Callable:
    """A call of a pointwise loss; its result is differentiated, if it can be."""

    def call():
        x = logits(ROWS, classes, dtype, layout)
        rows, options = x.shape[:-1], dict(kwargs)
        targets = empty(*rows, dtype="int64")
        if form == "quality":
            targets = (targets, empty(*rows))
        elif form == "dense":
            targets = empty(*x.shape, dtype=dtype)
        if weight:
            options["weight"] = empty(*(rows if weight == "row" else x.shape))
        if class_weight:
            options["class_weight"] = empty(classes)
        return loss(x, targets, **options)

    return call


def boxes(loss: Callable, dtype: str = "float32", layout: str = "contiguous") -> Callable:
    return lambda: loss(logits(ROWS, 4, dtype, layout), empty(*_rows(layout), 4))


def softmax(dtype: str = "float32", layout: str = "contiguous", **kwargs) -> Callable:
    return lambda: tl.softmax_focal_loss(
        logits(ROWS, CLASSES, dtype, layout), empty(*_rows(layout), dtype="int64"), **kwargs
    )


def distribution(dtype: str = "float32", layout: str = "contiguous", **kwargs) -> Callable:
    return lambda: tl.distribution_focal_loss(
        logits(ROWS, 17, dtype, layout), empty(*_rows(layout)), **kwargs
    )


def ranking(loss: Callable, form: str = "labels", dtype: str = "float32", layout="contiguous",
            classes: int = CLASSES, **kwargs) -> Callable:  # fmt: skip
    def call():
        x = logits(ROWS, classes, dtype, layout)
        labels, value = empty(*x.shape[:-1], dtype="int64"), empty(*x.shape[:-1])
        if form == "dense":
            return loss(x, empty(*x.shape), **kwargs)
        if loss is tl.rank_sort_loss:
            return sum(loss(x, (labels, value), **kwargs))
        if loss is tl.alrp_loss:
            return sum(loss(x, labels, value, **kwargs))
        return loss(x, labels, **kwargs)

    return call


def diagnosed(x, targets, **options) -> torch.Tensor:
    diagnosis = tl.Diagnosis()
    diagnosis.update(x, targets, **options)
    return diagnosis.counts


def regression(loss: Callable) -> Callable:
    return lambda: loss(logits(ROWS, 4, "float32", "contiguous"), empty(ROWS, 4))


def _rows(layout: str) -> tuple[int, ...]:
    return tuple(logits(ROWS, 1, "float32", layout).shape[:-1])


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
    "focal scheduled": pointwise(focal, gamma=empty(), avg_factor=empty()),
    "focal_star": pointwise(tl.focal_star_loss),
    "focal_star dense": pointwise(tl.focal_star_loss, "dense"),
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
    "softmax_focal scheduled": softmax(gamma=empty()),
    "distribution_focal": distribution(),
    "distribution_focal bf16": distribution("bfloat16"),
    "distribution_focal nchw": distribution(layout="nchw"),
    "distribution_focal none": distribution(reduction="none"),
    "expectation": lambda: tl.distribution_expectation(logits(ROWS, 17, "float32", "contiguous")),
    "iou": boxes(tl.iou_loss),
    "giou": boxes(tl.giou_loss),
    "giou nchw": boxes(tl.giou_loss, layout="nchw"),
    "diou": boxes(tl.diou_loss),
    "ciou": boxes(tl.ciou_loss),
    "ciou bf16": boxes(tl.ciou_loss, "bfloat16"),
    "ciou scheduled": lambda: tl.ciou_loss(
        logits(ROWS, 4, "float32", "contiguous"), empty(ROWS, 4), alpha_threshold=empty()
    ),
    "asl1": regression(tl.authentic_smooth_l1_loss),
    "ghm_c": pointwise(tl.ghm_c_loss, bins=30),
    "ghm_c 80 classes": pointwise(tl.ghm_c_loss, bins=30, classes=80),
    "ghm_c 256 bins": pointwise(tl.ghm_c_loss, bins=256),
    "ghm_c dense bf16": pointwise(tl.ghm_c_loss, "dense", "bfloat16", bins=30),
    "ghm_c nchw, targets nhwc": pointwise(tl.ghm_c_loss, "dense", layout="nchw", bins=30),
    "ghm_r": regression(tl.ghm_r_loss),
    "rank_sort": ranking(tl.rank_sort_loss),
    "rank_sort bf16 nchw": ranking(tl.rank_sort_loss, dtype="bfloat16", layout="nchw"),
    "rank_sort scheduled": ranking(tl.rank_sort_loss, delta=empty()),
    "rank_sort 80 classes": ranking(tl.rank_sort_loss, classes=80),
    "ap": ranking(tl.ap_loss),
    "ap dense": ranking(tl.ap_loss, "dense"),
    "alrp": ranking(tl.alrp_loss),
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
    "expectation",
    "ciou",
    "ghm_c",
    "rank_sort",
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
    "box_forward_kernel": _box_streams,
    "box_backward_kernel": _box_streams,
}
WRITTEN = "out_ptr"

# Kernels that add up in float64 on purpose, and never once per logit.
FLOAT64 = ("pairs_kernel", "settle_kernel", "spread_kernel", "means_kernel")


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


def launches_of(example: str) -> list[Launch]:
    with recorded_launches() as launches:
        loss = EXAMPLES[example]()
        if loss.requires_grad:
            loss.backward(torch.empty_like(loss))
    return launches
