"""The compiled kernels against float64 eager: their PTX, interpreted, without a GPU.

``tests/ptx`` says what this proves and what it does not.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from axes import all_pairs
from torch import Tensor

import tritonloss as tl
from tritonloss._dispatch import HAS_TRITON, INTERPRET

if not HAS_TRITON or INTERPRET:
    pytest.skip("the kernels are not compiled", allow_module_level=True)

import triton
import triton.language as tl_
from ptx.harness import interpreted
from ptx.memory import POISON
from ptx.parser import Fault
from ptx.reshapes import reordered

from perf import _examples, sweep, workloads
from perf._binary import TARGETS, Source, mlir_of, source_of
from perf._record import recorded_launches

ARCH = "sm_90"
# Of the largest entry. Values are float32 for every dtype; gradients carry one rounding to it.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float16: 6e-4,
    torch.bfloat16: 4.5e-3,
}
VALUE_TOLERANCE = 2e-6


def errors(got: Tensor, want: Tensor, least: float = 1e-30) -> float:
    """Largest difference of finite entries over the largest entry, or over ``least``; the others
    have to agree."""
    lost = 0.0
    if got.dtype == torch.float16:  # what underflows and overflows there
        lost, want = 3e-8, torch.where(want.abs() > 65504, want * torch.inf, want)
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan()), "NaN in one of them"
    finite = want.isfinite()
    assert torch.equal(got[~finite].nan_to_num(0.0), want[~finite].nan_to_num(0.0)), "infinities"
    if not finite.any():
        return 0.0
    largest = want[finite].abs().max().clamp(min=least)
    return float(((got - want)[finite].abs().max() - lost).clamp(min=0) / largest)


# ------------------------------------------------------------------------------------ examples

VARIANTS = [
    pytest.param("sm_90", {}, id="sm_90"),
    pytest.param("sm_80", {}, id="sm_80", marks=pytest.mark.slow),
    pytest.param("sm_100", {}, id="sm_100", marks=pytest.mark.slow),
    pytest.param("sm_90", {"noise": 1.0}, id="noise", marks=pytest.mark.slow),
    pytest.param("sm_90", {"contract": True}, id="contract", marks=pytest.mark.slow),
]


def example_errors(example: str, arch: str, rows: int = 201, **options) -> dict:
    """Errors of value and gradient, and the interpreter; a fault raises."""
    seed = zlib.crc32(example.encode())
    with tl.backend("eager"), _examples.operands(_examples.Drawn(rows, seed, True)) as exact:
        want = _examples.run(example)
    if "scheduled" in example:
        options["float_type"] = "fp64"
    with (
        _examples.operands(_examples.Drawn(rows, seed)) as drawn,
        interpreted(arch, **options) as interpreter,
    ):
        got = _examples.run(example)
    assert interpreter.executed
    found = {"value": errors(got, want), "gradient": 0.0, "dtype": drawn.logits[0].dtype}
    for x, y in zip(drawn.logits, exact.logits, strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            found["gradient"] = max(found["gradient"], errors(x.grad, y.grad))
    return found | {"interpreter": interpreter}


@pytest.mark.parametrize(("arch", "options"), VARIANTS)
@pytest.mark.parametrize("example", _examples.EXAMPLES)
def test_examples(example, arch, options):
    found = example_errors(example, arch, **options)
    if "noise" in options and example.startswith("ghm_c"):
        return  # noise moves logits that lie at the edge of a region into the next
    slack = 4 if options else 1
    assert found["value"] <= slack * VALUE_TOLERANCE
    assert found["gradient"] <= slack * TOLERANCE[found["dtype"]]


# --------------------------------------------------------------- orders, sizes and hard values

ORDERS = ("contiguous", "nchw", "sliced", "broadcast")


def relaid(t: Tensor, order: str) -> Tensor:
    """``t`` of shape (2, rows, ...), or what it repeats of itself, in another memory order."""
    if order == "nchw":
        return t.movedim(-1, 1).contiguous().movedim(1, -1)
    if order == "sliced":
        wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]
    return t[:1].expand(t.shape) if order == "broadcast" else t.contiguous()


@dataclass
class Drawn:
    """Operands of any loss: logits (2, rows, classes), the others by row or by logit."""

    x: Tensor
    labels: Tensor
    share: Tensor
    dense: Tensor
    weight: Tensor | None


# name -> (call, classes, None for any; reads dense targets; its weights)
LOSSES: dict[str, tuple] = {
    "focal": (
        lambda o, **k: tl.sigmoid_focal_loss(o.x, o.labels, weight=o.weight, **k),
        None, False, "any",
    ),
    "focal dense": (
        lambda o, **k: tl.sigmoid_focal_loss(o.x, o.dense, gamma=1.5, weight=o.weight, **k),
        None, True, "any",
    ),
    "focal_star": (
        lambda o, **k: tl.focal_star_loss(o.x, o.labels, weight=o.weight, **k), None, False, "any",
    ),
    "quality": (
        lambda o, **k: tl.quality_focal_loss(o.x, (o.labels, o.share), weight=o.weight, **k),
        None, False, "any",
    ),
    "varifocal dense": (
        lambda o, **k: tl.varifocal_loss(o.x, o.dense, weight=o.weight, **k), None, True, "any",
    ),
    "softmax": (
        lambda o, **k: tl.softmax_focal_loss(
            o.x, torch.where(o.labels >= o.x.shape[-1], -1, o.labels), weight=o.weight, **k
        ),
        None, False, "row",
    ),
    "distribution": (
        lambda o, **k: tl.distribution_focal_loss(o.x, o.share * 16, weight=o.weight, **k),
        17, False, "row",
    ),
    "distillation": (
        lambda o, **k: tl.distribution_distillation_loss(
            o.x, o.dense, temperature=0.5, weight=o.weight, **k
        ),
        33, True, "row",
    ),
    "ciou": (
        lambda o, **k: tl.ciou_loss(o.x, o.dense.sort(-1).values * 4, weight=o.weight, **k),
        4, True, "row",
    ),
    "ghm_c": (lambda o: tl.ghm_c_loss(o.x, o.labels, weight=o.weight), None, False, "any"),
    "ghm_c dense": (lambda o: tl.ghm_c_loss(o.x, o.dense, weight=o.weight), None, True, "any"),
    "ghm_r": (lambda o: tl.ghm_r_loss(o.x, o.dense, weight=o.weight), 4, True, "any"),
    "rank_sort": (
        lambda o: sum(tl.rank_sort_loss(o.x, (o.labels, o.share), weight=o.weight)),
        None, False, "any",
    ),
    "ap dense": (lambda o: tl.ap_loss(o.x, o.dense, weight=o.weight), None, True, "any"),
    "alrp": (
        lambda o: sum(tl.alrp_loss(o.x, o.labels, o.share, delta=0.0)), None, False, None,
    ),
    "diagnose": (lambda o: _diagnosed(o.x, o.dense, weight=o.weight), None, True, "row"),
}  # fmt: skip
REDUCED = ("ghm_c", "ghm_c dense", "ghm_r", "rank_sort", "ap dense", "alrp", "diagnose")


def _diagnosed(x, targets, **kwargs) -> Tensor:
    diagnosis = tl.Diagnosis()
    diagnosis.update(x.detach(), targets, **kwargs)
    return diagnosis.counts


ORDER_AXES: dict[str, list] = {
    "loss": list(LOSSES),
    "x": list(ORDERS),
    "dense": list(ORDERS),
    "weight": [None, *(f"{by} {o}" for by in ("row", "logit") for o in ORDERS)],
    "upstream": [None, *ORDERS],  # None: reduction "mean"
    "rows": [5, 1, 64, 257],
    "classes": [20, 1, 81],
    "dtype": ["float32", "float16", "bfloat16"],
    "values": ["random", "huge", "inf", "nan", "tied", "constant"],
    "labels": ["mixed", "no positive", "all positive", "all ignored"],
}


def _worth_it(values) -> bool:
    """Each operand in its other orders only where the loss reads it."""
    p = dict(zip(ORDER_AXES, values, strict=True))
    _, classes, reads_dense, weights = LOSSES[p["loss"]]
    by = p["weight"].split()[0] if p["weight"] else None
    return (
        (classes is None or p["classes"] == ORDER_AXES["classes"][0])
        and (reads_dense or p["dense"] == ORDERS[0])
        and (not reads_dense or p["labels"] == "mixed")
        and (by is None or weights == "any" or by == weights)
        and (p["upstream"] is None or p["loss"] not in REDUCED)
        # 16-bit logits saturate, and a loss of them has infinities that float64 has not
        and (p["values"] != "huge" or p["dtype"] != "float16")
    )


def every_order() -> list[tuple]:
    """The product of losses and memory orders; sizes, dtypes and values are drawn for each."""
    draw, points = random.Random(0), []
    axes = list(ORDER_AXES.values())
    for orders in itertools.product(*axes[:5]):
        candidates = ((*orders, *map(draw.choice, axes[5:])) for _ in range(20))
        points += itertools.islice(filter(_worth_it, candidates), 1)
    return points


def pytest_generate_tests(metafunc):
    if "point" in metafunc.fixturenames:
        if metafunc.config.getoption("--full"):
            points = every_order()
        else:
            points = all_pairs(list(ORDER_AXES.values()), _worth_it)
        names = ["-".join(str(v).replace(" ", "_") for v in p) for p in points]
        metafunc.parametrize("point", points, ids=names)


def drawn(point: dict, double: bool) -> Drawn:
    g = torch.Generator().manual_seed(zlib.crc32(repr(point).encode()))
    rows, classes = point["rows"], LOSSES[point["loss"]][1] or point["classes"]
    shape, dtype = (2, rows, classes), getattr(torch, point["dtype"])

    def share(*size):
        return torch.rand(size, generator=g)

    x = torch.randn(shape, generator=g) * (100 if point["values"] == "huge" else 3)
    if point["values"] == "tied":
        x = (x / 2).round()
    elif point["values"] == "constant":
        x = torch.full(shape, -4.6)
    elif point["values"] == "nan":
        x[0, rows // 2, 0] = float("nan")
    elif point["values"] == "inf":
        x[0, rows // 2, 0], x[0, 0, classes // 2] = float("inf"), float("-inf")
    positives = {"mixed": 0.3, "all positive": 1.1}.get(point["labels"], 0.0)
    labels = torch.randint(classes, shape[:2], generator=g)
    labels = torch.where(share(*shape[:2]) < positives, labels, classes)
    if point["labels"] == "all ignored":
        labels[:] = -1
    elif point["labels"] == "mixed":
        labels[share(*shape[:2]) < 0.1] = -1
    dense = torch.where(share(*shape) < 0.95, 0.0, share(*shape))
    weight = None
    if point["weight"]:
        by, order = point["weight"].split()
        size = shape if by == "logit" else shape[:2]
        weight = relaid((share(*size) * 1.5 - 0.5).clamp(min=0), order)
    made = Drawn(
        relaid(x.to(dtype), point["x"]),
        labels,
        share(*shape[:2]),
        relaid(dense.to(dtype), point["dense"]),
        weight,
    )
    for name, value in vars(made).items():
        if double and value is not None and value.is_floating_point():
            setattr(made, name, value.double())
    made.x = made.x.detach().requires_grad_()
    return made


def differentiated(point: dict, double: bool) -> tuple[Tensor, Tensor | None]:
    made = drawn(point, double)
    options = {} if point["loss"] in REDUCED else {"reduction": "none"}
    if point["upstream"] is None and options:
        options = {"reduction": "mean"}
    loss = LOSSES[point["loss"]][0](made, **options)
    if loss.requires_grad:
        upstream = torch.ones(loss.shape)
        if point["upstream"]:
            upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1))
            upstream = relaid(upstream, point["upstream"])
        loss.backward(upstream.to(loss.dtype) if double else upstream)
    return loss.detach(), made.x.grad


BOX_LOSSES = {
    "iou": tl.iou_loss,
    "iou square": partial(tl.iou_loss, mode="square"),
    "iou log": partial(tl.iou_loss, mode="log"),
    "giou": tl.giou_loss,
    "diou": tl.diou_loss,
    "ciou": tl.ciou_loss,
    "eiou": tl.eiou_loss,
}


@pytest.mark.parametrize("loss", BOX_LOSSES)
def test_equal_boxes_have_no_gradient_whatever_a_division_rounds_to(loss):
    """Thin boxes, whose IoU has gradients in the thousands on both sides of the tie."""
    g = torch.Generator().manual_seed(4)
    corner = torch.rand(200, 2, generator=g) * 500
    sides = torch.rand(200, 2, generator=g) * torch.tensor([60.0, 0.1])
    boxes = torch.cat([corner, corner + sides], 1)
    pred = boxes.clone().requires_grad_()
    with interpreted("sm_90", noise=1.0):
        value = BOX_LOSSES[loss](pred, boxes, reduction="none")
        value.sum().backward()
    assert not pred.grad.any() and not value.any()


def test_memory_orders(point):
    """Every kernel on operands that lie in memory alike, and not alike."""
    point = dict(zip(ORDER_AXES, point, strict=True))
    with tl.backend("eager"):
        value, gradient = differentiated(point, double=True)
    with interpreted(ARCH) as interpreter:
        got, slope = differentiated(point, double=False)
    assert interpreter.executed
    # of nearly equal distributions, what the terms of the divergence leave of each other
    alike = (point["loss"], point["values"]) == ("distillation", "constant")
    least = 0.05 if alike else 1e-30
    assert errors(got, value, least) <= VALUE_TOLERANCE
    if gradient is not None:
        if point["loss"] == "ciou":  # one coordinate makes the box's gradient NaN, or all four
            row = (gradient.isnan() | slope.isnan()).any(-1, keepdim=True)
            slope, gradient = (torch.where(row, torch.nan, t) for t in (slope, gradient))
        elif got.isnan().all():  # what does not count has no gradient; eager may show NaN there
            gradient = torch.where(slope == 0, 0.0, gradient)
        assert errors(slope, gradient, least) <= TOLERANCE[slope.dtype]


# ------------------------------------------------------------------------------ planted faults


def edited(kernel: str, pattern: str, new: str, count: int = 1):
    """An edit of the PTX of one kernel, which has to find its place."""

    def edit(name: str, ptx: str) -> str:
        if name != kernel:
            return ptx
        changed, n = re.subn(pattern, new, ptx, count=count)
        if not n:
            pytest.fail(f"{pattern} is not in {kernel}")
        return changed

    return edit


GUARDED = r"@!?%p\d+ (?={}\.global)"
# Triton 3.9 writes red, which returns nothing
ATOMIC = r"(@!?%p\d+ )?(?:atom|red)\.\S*global\S*\.add\.\w(\d+)\s+(?:%\w+, )?(\[.*?\]), (%\w+);"
PLAIN = (
    r"\n.reg .b\2 %plain\2_<1>;\n\1ld.global.b\2 %plain\2_0, \3; "
    r"\1add.s\2 %plain\2_0, %plain\2_0, \4; \1st.global.b\2 \3, %plain\2_0;"
)

DIVERGED = "setp.lt.u32 %p1, %tid.x, 7; @%p1 "
MISPLACED = r"(ld\.global\.v4[^;]*)\+ 0 \]", r"\1+ 4 ]"
SWAPPED = r"(fma\.rn\.f32\s+\S+, )(\S+), (\S+), (\S+);", r"\1\2, \4, \3;"

PLANTED = [
    ("focal", edited("pointwise_kernel", GUARDED.format("ld"), "", 0), "out of bounds"),
    ("focal", edited("pointwise_kernel", GUARDED.format("st"), "", 0), "race|out of bounds"),
    ("focal", edited("pointwise_kernel", r"(@%p\d+ )?st\.global[^;]*;", "", 0), "never written"),
    ("focal none", edited("pointwise_kernel", r"%ctaid\.x", "0", 0), "race"),
    ("focal", edited("pointwise_kernel", r"bar\.sync\s+0;", "", 0), "barrier|never written"),
    ("focal", edited("finish_kernel", r"bar\.sync\s+0;", "", 0), "barrier|never written"),
    ("focal", edited("pointwise_kernel", r"(?=shfl\.sync)", DIVERGED), "diverged"),
    ("focal", edited("pointwise_kernel", *MISPLACED), "misaligned"),
    ("rank_sort", edited("negatives_kernel", ATOMIC, PLAIN, 0), "race"),
    ("focal", edited("pointwise_kernel", *SWAPPED), "wrong"),
    ("focal", edited("pointwise_kernel", r"fma\.rn\.f32", "fma.rz.f32"), "not known"),
    ("focal", edited("pointwise_kernel", r"max\.f32", "max.relu.f32"), "not known"),
    ("focal", edited("pointwise_kernel", r"mul\.f32", "mul.f16"), "not known"),
    ("focal", edited("pointwise_kernel", r"(mul\.f32[^,]*,[^,]*),[^;]*", r"\1"), "not known"),
    ("focal", edited("pointwise_kernel", r"selp\.f32", "selp.f64"), "read as|written as"),
]  # fmt: skip


@pytest.mark.parametrize(("example", "edit", "word"), PLANTED)
def test_planted_faults_are_found(example, edit, word):
    try:
        found = example_errors(example, ARCH, edit=edit)
    except (Fault, AssertionError) as error:
        what = str(error) if isinstance(error, Fault) else "wrong"
    else:
        right = found["value"] <= VALUE_TOLERANCE and found["gradient"] <= TOLERANCE[torch.float32]
        what = "nothing" if right else "wrong"
    assert re.search(word, what), what


@pytest.mark.parametrize("written", [True, False])
def test_what_torch_wrote_is_no_fault(written):
    """A float of which one byte is that of the poison counts as written."""
    labels = torch.randint(9, (500,))
    with interpreted(ARCH):
        x = torch.empty(500, 8)
        if written:
            x.copy_(torch.randn(500, 8))
            assert (x.view(torch.uint8) == POISON[True]).any()
        with nullcontext() if written else pytest.raises(Fault, match="never written"):
            tl.sigmoid_focal_loss(x, labels)


@triton.jit
def mask_apart_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl_.constexpr, TWICE: tl_.constexpr):
    """Counts what x holds where y is positive; x lies by rows, y by columns."""
    row, column = tl_.arange(0, BLOCK)[:, None], tl_.arange(0, BLOCK)[None, :]
    x = tl_.load(x_ptr + row * BLOCK + column)
    keep = tl_.load(y_ptr + row + column * BLOCK) > 0
    if TWICE:  # two reshapes, each of which may reorder
        flat, mask = tl_.reshape(x, [BLOCK * BLOCK]), tl_.reshape(keep, [BLOCK * BLOCK])
        counts = tl_.histogram(flat, 16, mask=mask)
    else:
        flat = tl_.reshape(tl_.where(keep, x, -1), [BLOCK * BLOCK])
        counts = tl_.histogram(tl_.maximum(flat, 0), 16, mask=flat >= 0)
    tl_.store(out_ptr + tl_.arange(0, 16), counts)


@pytest.mark.parametrize("twice", [False, True])
def test_a_mask_of_another_layout_is_found(twice):
    x = torch.randint(16, (32, 32), dtype=torch.int32)
    y = torch.randint(-1, 2, (32, 32), dtype=torch.int32)
    out = torch.empty(16, dtype=torch.int32)
    with interpreted(ARCH, reshapes=False) as interpreter:
        mask_apart_kernel[(1,)](x, y, out, BLOCK=32, TWICE=twice, num_warps=4)
    right = torch.equal(out, torch.bincount(x[y.T > 0], minlength=16).int())
    assert right == (not twice)
    interpreter.reshapes = True
    with pytest.raises(Fault, match="may reorder") if twice else nullcontext():
        interpreter(interpreter.executed[0].launch)


# -------------------------------------------------------------------- what a sweep would launch


@cache
def sources_of_a_sweep() -> list[Source]:
    """On a GPU, at all its sizes: tensors without values take no memory."""
    found: dict[Source, None] = {}
    for loss, workload in workloads.LOSSES.items():
        for point in sweep.points(loss, quick=False, device="cuda"):
            point = point._replace(classes=workload.classes or point.classes)
            for size in {point, sweep.gate_of(point)}:
                with recorded_launches() as launches:
                    workloads.value_and_gradient(workloads.call_of(loss, size, "meta"))
                found |= dict.fromkeys(map(source_of, launches))
    return list(found)


def cover(sources: list[Source]) -> list[Source]:
    """Every type, constant and option that an argument of a kernel has, once at least."""
    traits = {
        s: {(s.kernel, *pair) for pair in (*s.signature, *s.constants, *s.options)} for s in sources
    }
    missing, chosen = set().union(*traits.values()), []
    while missing:
        chosen.append(max(sources, key=lambda s: len(traits[s] & missing)))
        missing -= traits[chosen[-1]]
    return chosen


def reshapes(sources: list[Source], arch: str) -> tuple[int, list[tuple]]:
    """How many kernels have one that may reorder, and where it is paired with something else."""
    count, found = 0, []
    for source in sources:
        texts = mlir_of(source, arch)
        count += any("allow_reorder" in text for text in texts)
        found += [(source.kernel, source.constants, line) for t in texts for line in reordered(t)]
    return count, found


def test_a_sweep_pairs_no_reshape_that_may_reorder():
    count, found = reshapes(cover(sources_of_a_sweep()), ARCH)
    assert count and not found, found


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_the_whole_sweep_pairs_no_reshape_that_may_reorder(arch):
    count, found = reshapes(sources_of_a_sweep(), arch)
    assert count and not found, found


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("twice", [False, True])
def test_a_paired_reshape_is_found_without_a_launch(arch, twice):
    x = torch.empty(32, 32, dtype=torch.int32, device="meta")
    with recorded_launches() as launches:
        mask_apart_kernel[(1,)](x, x.clone(), x[0], BLOCK=32, TWICE=twice, num_warps=4)
    _, found = reshapes([source_of(launches[0])], arch)
    assert bool(found) == twice
