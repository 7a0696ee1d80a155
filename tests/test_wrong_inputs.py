"""What users pass by mistake: the type of the error, and a sentence that names the argument."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from conftest import DEVICE

import tritonloss as tl
from tritonloss.losses.boxes import KINDS

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on the CPU")

X = torch.zeros(2, 4)
Y = torch.tensor([1, 3])
HALF = torch.tensor([0.5, 0.5])
BOX = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 4]])
GRAD = torch.ones(2, requires_grad=True)
STATE = torch.zeros(10), torch.zeros(10)

# name of the loss -> (function, its inputs)
CLASSIFIERS = {
    "sigmoid_focal_loss": (tl.sigmoid_focal_loss, (X, Y)),
    "focal_star_loss": (tl.focal_star_loss, (X, Y)),
    "quality_focal_loss": (tl.quality_focal_loss, (X, (Y, HALF))),
    "varifocal_loss": (tl.varifocal_loss, (X, (Y, HALF))),
    "asymmetric_loss": (tl.asymmetric_loss, (X, Y)),
    "bce_loss": (tl.bce_loss, (X, (Y, HALF))),
    "mal_loss": (tl.mal_loss, (X, (Y, HALF))),
    "iou_aware_bce_loss": (tl.iou_aware_bce_loss, (X, (Y, HALF))),
    "gaussian_focal_loss": (tl.gaussian_focal_loss, (X, Y)),
    "softmax_focal_loss": (tl.softmax_focal_loss, (X, Y)),
    "ghm_c_loss": (tl.ghm_c_loss, (X, Y)),
    "rank_sort_loss": (tl.rank_sort_loss, (X, Y)),
    "ap_loss": (tl.ap_loss, (X, Y)),
    "alrp_loss": (tl.alrp_loss, (X, Y, HALF)),
    "carl_loss": (tl.carl_loss, (X, Y, HALF)),
}
BOX_LOSSES = {f"{kind}_loss": getattr(tl, f"{kind}_loss") for kind in KINDS}

WRONG = {}


def wrong(name, error, words, function, *args, **kwargs):
    assert name not in WRONG
    WRONG[name] = error, words, function, args, kwargs


for loss, (function, (_, targets, *more)) in CLASSIFIERS.items():
    labels, quality = targets if isinstance(targets, tuple) else (targets, None)

    def given(labels, quality=quality):
        return labels if quality is None else (labels, quality)

    def case(name, error, words, x, y, function=function, more=more, loss=loss, **kwargs):
        wrong(f"{loss}: {name}", error, words, function, x, y, *more, **kwargs)

    case("a tensor beside levels", TypeError, r"must be a list of 1 levels, as logits is; got "
         r"a tensor of shape \(2,\)", [X], Y, more=[[v] for v in more])  # fmt: skip
    case("levels beside a tensor", TypeError, "must be", X, [Y, Y, Y])
    for name, error, words, x, beside in (
        ("lengths", ValueError, "must have one entry for each of 2 levels; got 1", [X, X], [Y]),
        ("shape", ValueError, r"level 1: \w+ must have shape \(2,\)", [X, X], [Y, Y[:1]]),
        ("dtypes", ValueError, "level 1: logits must have one dtype", [X, X.half()], [Y, Y]),
        ("devices", ValueError, "level 1: \\w+ is on meta, but logits is", [X, X],
         [Y, Y.to("meta")]),
        ("classes", ValueError, "level 1: logits must have as many", [X, X.repeat(1, 2)], [Y, Y]),
    ):  # fmt: skip
        of_levels = beside if quality is None else (beside, [HALF] * len(beside))
        case(f"levels, {name}", error, words, x, of_levels, more=[[v, v] for v in more])
    case("numpy", TypeError, "logits must be a tensor: torch.from_numpy", np.zeros((2, 4)), targets)
    case("integer logits", TypeError, "logits must be float16", X.long(), targets)
    case("no class", ValueError, "logits must have shape", torch.zeros(2, 0), targets)
    case("label too large", ValueError, "got 77", X, given(torch.tensor([1, 77])))
    case("negative label", ValueError, "got -5", X, given(torch.tensor([1, -5])))
    case("fewer labels", ValueError, r"must have shape \(2,\)", X, given(Y[:1]))
    case("labels elsewhere", ValueError, "is on meta, but logits is on cpu", X, given(Y.to("meta")))
    case("channels first", ValueError, "class_dim=1 says that", torch.zeros(2, 4, 5, 6),
         given(torch.zeros(2, 5, 6).long()))  # fmt: skip
    case("misspelt argument", TypeError, "unexpected keyword argument 'gama'", X, targets, gama=2)
    if loss not in ("softmax_focal_loss", "carl_loss"):
        case("targets None", TypeError, "targets must be integer labels", X, None)
        case("three targets", TypeError, "targets must be integer labels", X, (Y, HALF, HALF))
        case("float labels", ValueError, r"targets\.long\(\)", X, Y.float())
        case("quality as integers", TypeError, "quality must be float16", X, (Y, Y))
        case(
            "quality above 1",
            ValueError,
            r"quality must lie in \[0, 1\].*got 1.5",
            X,
            (Y, HALF + 1),
        )
        case("quality with a gradient", ValueError, "quality requires grad", X, (Y, GRAD))
        case("ignore_index", TypeError, "ignore_index must be an int", X, targets, ignore_index=1.5)
    if loss != "carl_loss":
        case(
            "complex weight", TypeError, "weight must be float16", X, targets, weight=HALF.cfloat()
        )
        case(
            "shape of weight",
            ValueError,
            "weight must have shape",
            X,
            targets,
            weight=torch.ones(3),
        )
        case("weight with a gradient", ValueError, "weight requires grad", X, targets, weight=GRAD)
        case(
            "weight is a list", TypeError, "weight must be a tensor", X, targets, weight=[1.0, 1.0]
        )
    for number, parameter in inspect.signature(function).parameters.items():
        if parameter.annotation.startswith("float | Tensor"):
            for bad, error, got in (
                ("2", TypeError, "str"),
                (True, TypeError, "bool"),
                (float("nan"), ValueError, "nan"),
            ):
                words = f"{number} must be .*; got {got}"
                case(f"{number} {bad!r}", error, words, X, targets, **{number: bad})
    if loss != "carl_loss" and "reduction" in inspect.signature(function).parameters:
        case("reduction", ValueError, "reduction must be one of", X, targets, reduction="average")
        case("reduction False", ValueError, "reduction must be one of", X, targets, reduction=False)
        case("avg_factor of a sum", ValueError, "avg_factor divides", X, targets, reduction="sum",
             avg_factor=2)  # fmt: skip
        case("avg_factor of rows", ValueError, "avg_factor must be a number", X, targets,
             avg_factor=HALF)  # fmt: skip

for paired in (tl.mal_loss, tl.iou_aware_bce_loss):
    wrong(f"{paired.__name__}: labels", TypeError, "got labels alone", paired, X, Y)
    wrong(f"{paired.__name__}: dense", TypeError, "got a floating tensor", paired, X, X)
    # a square or a clamp would hide it
    wrong(f"{paired.__name__}: quality below 0", ValueError, "got -0.5", paired, X, (Y, -HALF),
          gamma=2.0)  # fmt: skip

for dense in (tl.sigmoid_focal_loss, tl.quality_focal_loss, tl.varifocal_loss, tl.ghm_c_loss):
    wrong(f"{dense.__name__}: just above 1", ValueError, "got 1.0000001", dense, X,
          torch.full((2, 4), 1.0000001))  # fmt: skip
    wrong(f"{dense.__name__}: dense below 0", ValueError, "got -1", dense, X, -torch.ones(2, 4))

LEVELS, OF_LEVELS = [X, X, X[:1]], [Y, Y, Y[:1]]
for name, error, words, x, targets, kwargs in (
    ("lengths", ValueError, "targets must have one entry for each of 3 levels; got 2", LEVELS,
     [Y, Y], {}),
    ("weight", ValueError, "weight must have one entry for each of 3 levels; got 1", LEVELS,
     OF_LEVELS, {"weight": [HALF]}),
    ("weight of one", TypeError, r"weight must be a list of 3 levels.*got a tensor of shape \(2,\)",
     LEVELS, OF_LEVELS, {"weight": HALF}),
    ("quality", ValueError, r"targets\[1\] must have one entry for each of 3 levels; got 1", LEVELS,
     (OF_LEVELS, [HALF]), {}),
    ("pairs", ValueError, "targets must be a list of 3 levels or a pair of such lists; got 3 lists",
     LEVELS, [(Y, HALF)] * 3, {}),
    ("shape", ValueError, r"level 2: targets must have shape \(1,\)", LEVELS, [Y, Y, Y], {}),
    ("label", ValueError, "level 1: targets must lie in 0..4.*got 6, 8", LEVELS,
     [Y, Y + 5, Y[:1]], {}),
    ("no tensor", TypeError, "level 1: logits must be a tensor; got int", [X, 3], [Y, Y], {}),
    ("no level", ValueError, "logits must have at least one level; got an empty list", [], [], {}),
    ("forms", ValueError, "level 1: targets and weight must have one form in all levels", [X, X],
     [Y, X], {}),
    ("no weight", ValueError, "level 1: targets and weight must have one form", [X, X], [Y, Y],
     {"weight": [HALF, None]}),
    ("dtypes", ValueError, "level 1: logits must have one dtype.*float16 beside torch.float32",
     [X, X.half()], [Y, Y], {}),
    ("devices", ValueError, "level 1: logits must have one device.*got meta beside cpu",
     [X, X.to("meta")], [Y, Y.to("meta")], {}),
    ("a device", ValueError, "level 1: targets is on meta, but logits is on cpu", [X, X],
     [Y, Y.to("meta")], {}),
    ("classes", ValueError, "level 1: logits must have as many classes.*got 5 beside 4",
     [X, torch.zeros(2, 5)], [Y, Y], {}),
    ("class_dim", ValueError, "class_dim must be a dim of logits", X, Y, {"class_dim": 2}),
    ("class_dim 1.0", TypeError, "class_dim must be an int", X, Y, {"class_dim": 1.0}),
    ("class_dim and labels", ValueError, r"level 0: targets must have shape \(2, 5, 6\).*1 last",
     [torch.zeros(2, 4, 5, 6)], [Y.new_zeros(2, 6, 5)], {"class_dim": 1}),
):  # fmt: skip
    wrong(f"levels: {name}", error, words, tl.sigmoid_focal_loss, x, targets, **kwargs)
INDEX = torch.tensor([0, -1])
for name, error, words, args in (
    ("IoU", ValueError, "level 1: gt_index must have shape",
     ([HALF] * 2, [INDEX, INDEX[:1]], [Y] * 2)),
    ("objects", ValueError, "gt_index must have one entry for each of 2",
     ([HALF] * 2, [INDEX], [Y] * 2)),
    ("dtypes of IoU", ValueError, "level 1: iou must have one dtype",
     ([HALF, HALF.half()], [INDEX] * 2, [Y] * 2)),
    ("tensor", TypeError, "gt_index must be a list of 1 levels, as iou is", ([HALF], INDEX, [Y])),
):  # fmt: skip
    wrong(f"levels: {name}", error, words, tl.iou_hlr, *args)
wrong("levels: cls_loss", ValueError, "level 1: cls_loss must have shape", tl.isr_p_weight,
      [HALF, HALF[:1]], [HALF] * 2, [INDEX] * 2, [Y] * 2)  # fmt: skip
wrong("levels: boxes", ValueError, "level 1: target must be boxes", tl.giou_loss, [BOX, BOX],
      [BOX, -BOX])  # fmt: skip
wrong("levels: target of bins", ValueError, r"level 1: target must lie in \[0, 3\]",
      tl.distribution_focal_loss, [X, X], [HALF, HALF + 3])  # fmt: skip

for name, bad, words in (
    ("alpha", -1, "None turns balancing off"),
    ("alpha", torch.tensor(7.0), "alpha must be finite and >= 0 and <= 1; got 7.0"),
    ("gamma", -1, "gamma must be finite and >= 0; got -1"),
    ("gamma", torch.tensor(float("inf")), "gamma must be finite and >= 0; got inf"),
    ("gamma", torch.tensor(True), "gamma must be a real number; got bool"),
    ("gamma", "2", "gamma must be a number or a 0-d tensor; got str"),
    ("gamma", None, "gamma must be a number or a 0-d tensor; got NoneType"),
    ("gamma", True, "gamma must be a number or a 0-d tensor; got bool"),
    ("class_weight", torch.ones(3), "class_weight must have shape"),
):
    error = (
        TypeError
        if "got str" in words or "NoneType" in words or "got bool" in words
        else ValueError
    )
    wrong(f"focal {name} {bad!r}", error, words, tl.sigmoid_focal_loss, X, Y, **{name: bad})
    wrong(
        f"FocalLoss {name} {bad!r}",
        error,
        words,
        lambda n, b: tl.FocalLoss(**{n: b})(X, Y),
        name,
        bad,
    )

for loss, function in BOX_LOSSES.items():
    wrong(f"{loss}: xywh", ValueError, "target must be boxes x1, y1, x2, y2", function, BOX,
          torch.tensor([[10.0, 10, 4, 4], [1, 1, 3, 4]]))  # fmt: skip
    wrong(f"{loss}: three numbers", ValueError, r"pred must have shape \(\.\.\., 4\)", function,
          BOX[:, :3], BOX[:, :3])  # fmt: skip
    wrong(f"{loss}: other boxes", ValueError, "target must have shape", function, BOX, BOX[:1])
    wrong(f"{loss}: integer boxes", TypeError, "pred must be float16", function, BOX.long(), BOX)
    wrong(
        f"{loss}: integer targets", TypeError, "target must be float16", function, BOX, BOX.long()
    )
    wrong(f"{loss}: eps 0", ValueError, "eps must be finite and > 0", function, BOX, BOX, eps=0)
    wrong(f"{loss}: weight", ValueError, "weight must have shape", function, BOX, BOX, weight=X[:1])
    wrong(f"{loss}: None", TypeError, "target must be a tensor; got NoneType", function, BOX, None)

GHM = {
    "bins 10.": (TypeError, "bins must be an int; got float", {"bins": 10.0}),
    "bins 0": (ValueError, "bins must be in 1..256; got 0", {"bins": 0}),
    "momentum 1": (ValueError, "momentum must be", {"momentum": 1, "state": STATE}),
    "momentum tensor": (ValueError, "momentum must be finite and >= 0 and < 1; got 1.5",
                        {"momentum": torch.tensor(1.5), "state": STATE}),
    "momentum -1": (ValueError, "momentum must be", {"momentum": -1}),
    "no state": (ValueError, "state must be the pair .*GHMCLoss", {"momentum": 0.75}),
    "state of one": (TypeError, "state must be a pair", {"state": STATE[:1]}),
    "state of integers": (TypeError, "must be float32", {"state": (Y, Y)}),
    "normalize": (ValueError, "normalize must be one of", {"normalize": "mean"}),
    "group": (TypeError, "process_group must be", {"process_group": "world"}),
    "averaged": (TypeError, "gradients_averaged must be a bool", {"gradients_averaged": 1}),
}  # fmt: skip
for name, (error, words, kwargs) in GHM.items():
    wrong(f"ghm_c_loss: {name}", error, words, tl.ghm_c_loss, X, Y, **kwargs)
    wrong(f"ghm_r_loss: {name}", error, words, tl.ghm_r_loss, BOX, BOX, **kwargs)

for ranking in (tl.rank_sort_loss, tl.ap_loss):
    for name, error, words, kwargs in (
        ("delta", ValueError, "delta must be finite and >= 0", {"delta": -1}),
        ("delta tensor", ValueError, "delta must be finite", {"delta": torch.tensor(-1.0)}),
        ("group alone", ValueError, "num_groups must be a positive int", {"group": Y[:, None]}),
        ("num_groups alone", ValueError, "num_groups counts", {"num_groups": 2}),
        ("ids", ValueError, "group must lie in", {"group": Y[:, None], "num_groups": 2}),
        ("float ids", TypeError, r"group\.long\(\)", {"group": X, "num_groups": 2}),
        ("capacity", ValueError, "capacity must be >= 1", {"capacity": 0}),
    ):
        wrong(f"{ranking.__name__}: {name}", error, words, ranking, X, Y, **kwargs)

wrong(
    "dfl: one bin", ValueError, "logits must have shape", tl.distribution_focal_loss, X[:, :1], HALF
)
wrong("dfl: beyond", ValueError, "target must lie in", tl.distribution_focal_loss, X, HALF + 3)
wrong("dfl: labels", TypeError, "target must be float16", tl.distribution_focal_loss, X, Y)
for name, error, words, args, kwargs in (
    ("one bin", ValueError, "logits must have shape", (X[:, :1], X[:, :1]), {}),
    ("teacher", ValueError, "teacher must have shape", (X, X[:, :1]), {}),
    ("labels", TypeError, "teacher must be float16", (X, Y), {}),
    ("no constant", ValueError, "teacher requires grad", (X, X.clone().requires_grad_()), {}),
    ("temperature", ValueError, "temperature must be finite and > 0", (X, X), {"temperature": 0}),
):
    wrong(f"distillation: {name}", error, words, tl.distribution_distillation_loss, *args, **kwargs)
wrong(
    "expectation: sides",
    ValueError,
    "sides must be an int",
    tl.distribution_expectation,
    X,
    sides=0,
)
wrong(
    "expectation: 3 of 4",
    ValueError,
    "logits must have shape",
    tl.distribution_expectation,
    X,
    sides=3,
)
for name, error, words, x, target, kwargs in (
    ("mu", ValueError, "mu must be finite and > 0; got 0", HALF, HALF, {"mu": 0}),
    ("integers", TypeError, "pred must be float16", Y, HALF, {}),
    ("shape", ValueError, "target must have shape", X, HALF, {}),
    ("gradient", ValueError, "target requires grad", HALF, GRAD, {}),
):
    wrong(f"asl1: {name}", error, words, tl.authentic_smooth_l1_loss, x, target, **kwargs)
for name, error, words, args, kwargs in (
    (
        "beta",
        ValueError,
        "beta must be finite and >= 0; got -1",
        (HALF, HALF, HALF, 0, 1),
        {"beta": -1},
    ),
    ("outside", ValueError, "y must lie", (HALF, HALF, HALF + 1, 0, 1), {"beta": 2}),
    ("order", ValueError, "y_left must be below y_right", (HALF, HALF, HALF, 1, 0), {"beta": 2}),
    ("shape", ValueError, "x_right must have shape", (HALF, X, HALF, 0, 1), {"beta": 2}),
):
    wrong(f"gfl: {name}", error, words, tl.generalized_focal_loss, *args, **kwargs)
wrong("hlr: float labels", TypeError, r"labels\.long\(\)", tl.iou_hlr, HALF, Y, HALF)
wrong("hlr: shape", ValueError, "gt_index must have shape", tl.iou_hlr, HALF, Y[:1], Y)
wrong("isr: bias", ValueError, "bias must be", tl.isr_p_weight, HALF, HALF, Y, Y, bias=2)
wrong(
    "isr: normalizer",
    ValueError,
    "normalizer must be",
    tl.isr_p_weight,
    HALF,
    HALF,
    Y,
    Y,
    normalizer="a",
)
wrong(
    "carl: activation",
    ValueError,
    "activation must be",
    tl.carl_loss,
    X,
    Y,
    HALF,
    activation="relu",
)
wrong("carl: k", ValueError, "k must be finite", tl.carl_loss, X, Y, HALF, k=torch.tensor(-1.0))
wrong("balanced: shape", ValueError, "samples_per_class must have", tl.class_balanced_weight, X)
wrong("balanced: beta", ValueError, "beta must be", tl.class_balanced_weight, HALF, beta=1)
wrong("balanced: negative", ValueError, "must be >= 0; got -0.5", tl.class_balanced_weight, -HALF)
wrong("backend", ValueError, "backend must be one of", tl.backend, "cuda")
wrong("normaliser", TypeError, "x must be a tensor", tl.reduce_avg_factor, 3, None)

MODULES = [v for v in vars(tl).values() if isinstance(v, type) and issubclass(v, tl.modules._Loss)]
for module in MODULES:
    own = module.__name__
    wrong(f"{own}: positional", TypeError, f"{own} takes its arguments by name",
          module, 0.25)  # fmt: skip
    wrong(f"{own}: misspelt", TypeError, f"{own} takes .*; got gama", module,
          gama=2)  # fmt: skip
    if "reduction" in module.__signature__.parameters:
        wrong(f"{module.__name__}: reduction", ValueError, "reduction must be one of", module,
              reduction="average")  # fmt: skip
    if "process_group" in module.__signature__.parameters:
        wrong(f"{module.__name__}: group", TypeError, "process_group must be", module,
              process_group="world")  # fmt: skip

# -------------------------------------------------------- set prediction: 2 images, 3 queries
QUERIES, PLACES = torch.zeros(2, 3, 4), torch.rand(2, 3, 4)
NAMES, PLACED, SIZES = torch.zeros(2, 2).long(), torch.rand(2, 2, 4), torch.tensor([2, 1])
LISTS = {"labels": list(NAMES), "target_boxes": list(PLACED), "sizes": None}
NAN, INF = float("nan"), float("inf")


def cost_of(logits=QUERIES, boxes=PLACES, labels=NAMES, target_boxes=PLACED, sizes=SIZES, **kwargs):
    return tl.matching_cost(logits, boxes, labels, target_boxes, sizes, **kwargs)


for name, error, words, kwargs in (
    ("numpy", TypeError, "logits must be a tensor: torch.from", {"logits": np.zeros((2, 3, 4))}),
    ("integers", TypeError, "logits must be float16", {"logits": QUERIES.long()}),
    ("of one image", ValueError, r"must have shape \(\.\.\., B, Q, C\)", {"logits": QUERIES[0]}),
    ("no class", ValueError, "with C >= 1", {"logits": QUERIES[..., :0]}),
    ("no boxes", TypeError, "boxes must be a tensor; got NoneType", {"boxes": None}),
    ("integer boxes", TypeError, "boxes must be float16", {"boxes": PLACES.long()}),
    ("fewer boxes", ValueError, r"boxes must have shape \(2, 3, 4\)", {"boxes": PLACES[:1]}),
    ("boxes elsewhere", ValueError, "boxes is on meta, but logits", {"boxes": PLACES.to("meta")}),
    ("no labels", TypeError, "labels must be a tensor; got NoneType", {"labels": None}),
    ("float labels", TypeError, r"labels\.long\(\)", {"labels": NAMES.float()}),
    ("one image's", ValueError, r"labels must have shape \(2, T\)", {"labels": NAMES[0]}),
    ("label too large", ValueError, "lie in 0..3; got 9", {"labels": NAMES + 9}),
    ("negative label", ValueError, "lie in 0..3; got -1", {"labels": NAMES - 1}),
    ("no objects", TypeError, "target_boxes must be a tensor; got None", {"target_boxes": None}),
    ("fewer objects", ValueError, "4 for each label", {"target_boxes": PLACED[:, :1]}),
    ("gradient", ValueError, "target_boxes requires grad",
     {"target_boxes": PLACED.clone().requires_grad_()}),
    ("sizes of lists", ValueError, "sizes go with padded objects", LISTS | {"sizes": SIZES}),
    ("one list", ValueError, "must be two lists", LISTS | {"target_boxes": PLACED}),
    ("other lengths", ValueError, "must be two lists of the same", LISTS | {"labels": [NAMES[0]]}),
    ("other objects", ValueError, r"same objects; got \[2, 1\] and \[2, 2\]",
     LISTS | {"labels": [NAMES[0], NAMES[1, :1]]}),
    ("lists of numpy", TypeError, "labels must be a tensor: torch.from_numpy",
     LISTS | {"labels": [v.numpy() for v in NAMES]}),
    ("lists of floats", TypeError, r"labels\.long\(\)", LISTS | {"labels": [*NAMES.float()]}),
    ("dicts of a dataset", TypeError, "labels must be a tensor; got dict",
     LISTS | {"labels": [{"labels": NAMES[0]}] * 2}),
    ("columns", ValueError, r"labels must have shape \(T,\)",
     LISTS | {"labels": [*NAMES[..., None]]}),
    ("three numbers", ValueError, r"target_boxes must have shape \(T, 4\)",
     LISTS | {"target_boxes": [*PLACED[..., :3]]}),
    ("float sizes", TypeError, r"sizes\.long\(\)", {"sizes": SIZES.float()}),
    ("sizes of one", ValueError, r"sizes must have shape \(2,\)", {"sizes": SIZES[:1]}),
    ("sizes too large", ValueError, "sizes must lie in 0..2; got 5, 6", {"sizes": SIZES + 4}),
    ("list of sizes", TypeError, "sizes must be a tensor; got list", {"sizes": [2, 1]}),
    ("class_cost", ValueError, "class_cost must be one of focal, bce", {"class_cost": "l1"}),
    ("box_format", ValueError, "box_format must be one of cxcywh", {"box_format": "xywh"}),
    ("two weights", ValueError, "weights must be three numbers", {"weights": (1, 2)}),
    ("one weight", TypeError, "weights must be three numbers", {"weights": 1.0}),
    ("weight nan", ValueError, r"weights \(class\) must be finite", {"weights": (NAN, 1, 1)}),
    ("weight str", TypeError, r"weights \(L1\) must be a number", {"weights": (1, "1", 1)}),
    ("alpha", ValueError, "alpha must be finite and >= 0 and <= 1; got 2", {"alpha": 2}),
    ("alpha None", TypeError, "alpha must be a number", {"alpha": None}),
    ("gamma", ValueError, "gamma must be finite and >= 0; got -1", {"gamma": -1}),
    ("nonfinite_cost", ValueError, "nonfinite_cost must be finite", {"nonfinite_cost": INF}),
):  # fmt: skip
    wrong(f"cost: {name}", error, words, cost_of, **kwargs)

COST = torch.rand(2, 3, 2)
for name, error, words, args in (
    ("None", TypeError, "cost must be a tensor; got NoneType", (None,)),
    ("numpy", TypeError, "cost must be a tensor: torch.from_numpy", (COST.numpy(),)),
    ("integers", TypeError, "cost must be float16", (COST.long(),)),
    ("of one image", ValueError, r"cost must have shape \(\.\.\., B, Q, T\)", (COST[0],)),
    ("nan", ValueError, "cost must be finite, or .*; got other values in image 0", (COST * NAN,)),
    ("-inf", ValueError, "cost must be finite", (COST - INF,)),
    ("inf", ValueError, "leave enough queries for the objects", (COST + INF,)),
    ("float sizes", TypeError, r"sizes\.long\(\)", (COST, SIZES.float())),
    ("sizes of one", ValueError, r"sizes must have shape \(2,\)", (COST, SIZES[:1])),
    ("sizes too large", ValueError, r"sizes must lie in 0..2; got \[7, 6\]", (COST, SIZES + 5)),
    ("list of sizes", TypeError, "sizes must be a tensor; got list", (COST, [1, 2])),
):
    wrong(f"assign: {name}", error, words, tl.assign, *args)

for name, error, words, kwargs in (
    ("class_loss", ValueError, "class_loss must be one of focal", {"class_loss": "ce"}),
    ("class_loss None", ValueError, "class_loss must be one of focal", {"class_loss": None}),
    ("other parameter", ValueError, "class_params of focal are alpha, gamma; got beta",
     {"class_params": {"beta": 1}}),
    ("list of parameters", TypeError, "class_params must be a dict", {"class_params": [1]}),
    ("alpha", ValueError, "alpha must be finite and >= 0 and <= 1; got 7",
     {"class_params": {"alpha": 7}}),
    ("gamma", TypeError, "gamma must be a number", {"class_params": {"gamma": "2"}}),
    ("gamma of mal", ValueError, "gamma must be finite and >= 0; got -1",
     {"class_loss": "mal", "class_params": {"gamma": -1}}),
    ("no_object_weight", ValueError, "no_object_weight must be finite and >= 0; got -1",
     {"class_loss": "softmax", "class_params": {"no_object_weight": -1}}),
    ("no_object_weight str", TypeError, "no_object_weight must be a number",
     {"class_loss": "softmax", "class_params": {"no_object_weight": "a"}}),
    ("two weights", ValueError, "loss_weights must be three numbers", {"loss_weights": (1, 2)}),
    ("weights None", TypeError, "loss_weights must be three numbers", {"loss_weights": None}),
    ("dict of weights", TypeError, "loss_weights must be three numbers",
     {"loss_weights": {"class": 1, "l1": 5, "giou": 2}}),
    ("weight nan", ValueError, r"loss_weights \(class\) must be finite",
     {"loss_weights": (NAN, 1, 1)}),
    ("cost weight", TypeError, r"cost_weights \(L1\) must be a number",
     {"cost_weights": (1, "a", 2)}),
    ("class_cost", ValueError, "class_cost must be one of focal", {"class_cost": "l1"}),
    ("cost_alpha", ValueError, "cost_alpha must be finite .* got 2", {"cost_alpha": 2}),
    ("cost_gamma", TypeError, "cost_gamma must be a number", {"cost_gamma": "x"}),
    ("box_format", ValueError, "box_format must be one of cxcywh", {"box_format": "xywh"}),
    ("no group", ValueError, "groups must be finite and >= 1; got 0", {"groups": 0}),
    ("float groups", TypeError, "groups must be an int; got float", {"groups": 2.0}),
    ("layer_weights", TypeError, "layer_weights must be numbers", {"layer_weights": 1.0}),
    ("layer weight", ValueError, r"layer_weights \(1\) must be finite",
     {"layer_weights": (1, NAN)}),
    ("group", TypeError, "process_group must be", {"process_group": "world"}),
    ("averaged", TypeError, "gradients_averaged must be a bool", {"gradients_averaged": 1}),
    ("misspelt", TypeError, "unexpected keyword argument 'gama'", {"gama": 2}),
):  # fmt: skip
    wrong(f"SetCriterion: {name}", error, words, tl.SetCriterion, **kwargs)


def criterion_of(logits=QUERIES[None], boxes=PLACES[None], labels=NAMES, sizes=SIZES, built=None,
                 **kwargs):  # fmt: skip
    return tl.SetCriterion(**(built or {}))(logits, boxes, labels, PLACED, sizes, **kwargs)


PAIRS = torch.zeros(1, 2, 2).long()
for name, error, words, kwargs in (
    ("no layers", ValueError, r"logits must have shape \(L, B, Q, C\)",
     {"logits": QUERIES, "boxes": PLACES}),
    ("list of layers", TypeError, "logits must be a tensor", {"logits": [QUERIES]}),
    ("boxes of no layer", ValueError, "boxes must have shape", {"boxes": PLACES}),
    ("dicts of a dataset", TypeError, "labels must be a tensor; got dict",
     {"labels": {"labels": NAMES}}),
    ("float indices", TypeError, r"indices\.long\(\)", {"indices": PAIRS.float()}),
    ("shape of indices", ValueError, "indices must have shape", {"indices": PAIRS[0]}),
    ("index too large", ValueError, "indices must lie in -1..2; got 9", {"indices": PAIRS + 9}),
    ("list of indices", TypeError, "indices must be a tensor", {"indices": [[0]]}),
    ("num_boxes str", TypeError, "num_boxes must be a number", {"num_boxes": "a"}),
    ("num_boxes nan", ValueError, "num_boxes must be finite", {"num_boxes": NAN}),
    ("num_boxes of rows", ValueError, "num_boxes must be a number or a 0-d tensor",
     {"num_boxes": HALF}),
    ("groups", ValueError, "3 queries do not make 2 equal groups", {"built": {"groups": 2}}),
    ("layer_weights", ValueError, "layer_weights must be 1 numbers; got 2",
     {"built": {"layer_weights": (1, 1)}}),
    ("no class", ValueError, "a class beside the column for no object; got 1 columns",
     {"built": {"class_loss": "softmax"}, "logits": QUERIES[None, ..., :1]}),
):  # fmt: skip
    wrong(f"criterion: {name}", error, words, criterion_of, **kwargs)


@pytest.mark.parametrize(
    ("error", "words", "function", "args", "kwargs"), WRONG.values(), ids=WRONG
)
def test_the_error_names_what_is_wrong(error, words, function, args, kwargs):
    with pytest.raises(error, match=words) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_every_loss_is_in_the_table():
    tested = {getattr(function, "__name__", None) for _, _, function, _, _ in WRONG.values()}
    losses = {name for name in tl.functional.__all__ if name.endswith("_loss")}
    assert losses <= tested, losses - tested
