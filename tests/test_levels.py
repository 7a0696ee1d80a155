"""Heads as they come: levels and channels-first layouts against one concatenated tensor."""

from __future__ import annotations

import zlib

import pytest
import torch
from axes import all_pairs
from cases import CASES, case, draw_weight, generator, plain_point
from conftest import DEVICE
from test_losses import TOLERANCE, assert_close, to_device
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritonloss as tl
from tritonloss._dispatch import use_triton

# Shares of the rows; a level may have none.
LEVELS = {1: [1.0], 3: [0.7, 0.2, 0.1], 5: [0.5, 0.3, 0.0, 0.1, 0.1]}

AXES: dict[str, list] = {
    "levels": [3, 1, 5],
    "class_dim": [1, -1],
    "rows": [480, 60],
    "classes": [20, 1, 81],
    "form": ["labels", "quality", "dense"],
    "reduction": ["mean", "sum", "none"],
    "weight": [None, "row", "logit"],
    "class_weight": [False, True],
    "avg_factor": [None, "number", "tensor"],
    "dtype": ["float32", "float16", "float64"],
}


def points(loss):
    values = [
        v
        if name not in loss.axes
        else [a for a in v if a in loss.axes[name]] or loss.axes[name][:1]
        for name, v in AXES.items()
        if name != "rows"
    ]
    names = [name for name in AXES if name != "rows"]
    found = all_pairs([*values, AXES["rows"]], lambda p: True)
    return [dict(zip([*names, "rows"], p, strict=True)) for p in found]


def pytest_generate_tests(metafunc):
    if "point" in metafunc.fixturenames:
        pairs = [(loss, p) for loss in CASES for p in points(loss)]
        ids = ["-".join([loss.name, *map(str, p.values())]) for loss, p in pairs]
        metafunc.parametrize(("loss", "point"), pairs, ids=ids)


def sizes_of(rows: int, levels: int) -> list[int]:
    """Even numbers of rows that make up ``rows``."""
    sizes = [int(share * rows) // 2 * 2 for share in LEVELS[levels]]
    sizes[0] += rows - sum(sizes)
    return sizes


def split(t: Tensor, x: Tensor, sizes, class_dim: int):
    """Levels (B, H, 2, C) or (B, C, H, 2) of (B, rows, C), and what lies beside them."""
    per_logit = t.shape == x.shape
    parts = t.split(sizes, 1)
    parts = [p.unflatten(1, (-1, 2) if p.shape[1] else (0, 2)) for p in parts]
    if per_logit and class_dim != -1:
        return [p.movedim(-1, class_dim).contiguous() for p in parts]
    return [p.contiguous() for p in parts]


def joined(levels: list[Tensor], class_dim: int, per_logit: bool) -> Tensor:
    """``split`` undone."""
    if per_logit and class_dim != -1:
        levels = [t.movedim(class_dim, -1) for t in levels]
    return torch.cat([t.flatten(1, 2) for t in levels], 1)


def of_rows(value, x: Tensor, sizes, class_dim: int):
    """The levels of a tensor of the rows or logits; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(of_rows(v, x, sizes, class_dim) for v in value)
    if isinstance(value, Tensor) and value.shape[:2] == x.shape[:2]:
        return split(value, x, sizes, class_dim)
    return value


def both(
    function, x: Tensor, args: tuple, kwargs: dict, levels: int, class_dim: int, upstream=None
):
    """``((value, gradient) of one tensor, the same of levels)``, put together again."""
    x = x.detach()
    sizes = sizes_of(x.shape[1], levels)
    heads = [t.requires_grad_() for t in split(x, x, sizes, class_dim)]
    args_of, kwargs_of = of_rows(args, x, sizes, class_dim), {
        k: of_rows(v, x, sizes, class_dim) for k, v in kwargs.items()
    }  # fmt: skip
    x.requires_grad_()
    value = function(x, *args, **kwargs)
    got = function(heads, *args_of, **kwargs_of, class_dim=class_dim)
    if isinstance(got, list):
        assert all(v.is_contiguous() or v.dim() == t.dim() for v, t in zip(got, heads, strict=True))
        per_logit = value.shape == x.shape
        got = joined(got, class_dim, per_logit)
    assert got.dtype == value.dtype and got.shape == value.shape
    grad = torch.ones_like(value) if upstream is None else upstream(value)
    (gradient,) = torch.autograd.grad(value, x, grad)
    gradients = torch.autograd.grad(got, heads, grad)
    for t, g in zip(heads, gradients, strict=True):
        assert g.dtype == t.dtype and g.shape == t.shape
        if t.numel() and use_triton(t):
            assert g.stride() == t.stride(), "the gradient keeps the strides of the head"
    return (value, gradient), (got, joined(list(gradients), class_dim, True))


def test_levels_are_the_concatenation(loss, point, backend):
    point = dict(point)
    levels, class_dim = point.pop("levels"), point.pop("class_dim")
    g = generator(zlib.crc32(repr((loss.name, levels, class_dim, point)).encode()))
    axes = plain_point(layout="nchw", **point)
    problem = loss.problem(axes, g)
    kwargs = to_device(problem.kwargs)
    (value, gradient), (got, slope) = both(
        loss.function, problem.x.to(DEVICE), to_device(problem.args), kwargs, levels, class_dim,
        lambda v: torch.randn(v.shape, generator=g).to(v),
    )  # fmt: skip
    assert_close(got, value, min(TOLERANCE[axes.dtype], 2e-6), "value")
    assert_close(slope, gradient, TOLERANCE[axes.dtype], "gradient")


def of_qualities(classes: int = 5):
    g = generator(zlib.crc32(b"qualities"))
    x = torch.randn(2, 60, classes, generator=g)
    labels = torch.randint(-1, classes + 1, (2, 60), generator=g)
    return x.to(DEVICE), (labels.to(DEVICE), torch.rand(2, 60, generator=g).to(DEVICE))


@pytest.mark.parametrize("class_dim", [1, -1])
@pytest.mark.parametrize("function", [tl.bce_loss, tl.mal_loss, tl.iou_aware_bce_loss])
def test_losses_of_a_quality(function, class_dim, backend):
    x, targets = of_qualities()
    (value, gradient), (got, slope) = both(function, x, (targets,), {}, 3, class_dim)
    assert_close(got, value, 1e-6, "value")
    assert_close(slope, gradient, 3e-6, "gradient")


@pytest.mark.parametrize("levels", LEVELS)
def test_values_of_levels(levels, backend):
    """What is no loss gives a list, too."""
    x = torch.randn(2, 60, 4 * 9, generator=generator(levels)).to(DEVICE)
    want = tl.distribution_expectation(x, sides=4)
    sizes = sizes_of(60, levels)
    got = tl.distribution_expectation(split(x, x, sizes, 1), sides=4, class_dim=1)
    assert [t.shape for t in got] == [(2, 4, n // 2, 2) for n in sizes]
    assert_close(joined(got, 1, True), want, 1e-6, "expectation")
    one = tl.distribution_expectation(split(x, x, sizes, 1), class_dim=1)
    assert_close(joined(one, 1, False), tl.distribution_expectation(x), 1e-6, "one side")
    boxes = torch.rand(2, 2, 60, 4, generator=generator(levels)).cumsum(-1).to(DEVICE)
    for kind in ("iou", "eiou"):
        got = tl.iou(*(split(b, b, sizes, 1) for b in boxes), kind=kind, class_dim=1)
        assert_close(joined(got, 1, False), tl.iou(*boxes, kind=kind), 1e-6, kind)


@pytest.mark.parametrize("class_dim", [1, -1, 0, 3, -4])
@pytest.mark.parametrize("loss", ["focal", "softmax_focal"])
def test_one_tensor_with_classes_in_any_dim(loss, class_dim, backend):
    g = generator(class_dim + 10)
    x = torch.randn(2, 3, 4, 5, generator=g).to(DEVICE)
    function = case(loss).function
    last = x.movedim(class_dim, -1)
    labels = torch.randint(last.shape[-1], last.shape[:-1], generator=g).to(DEVICE)
    for reduction in ("none", "mean"):
        got = function(x, labels, reduction=reduction, class_dim=class_dim)
        want = function(last, labels, reduction=reduction)
        if reduction == "none" and loss == "focal":
            want = want.movedim(-1, class_dim)
        assert_close(got, want, 1e-6, reduction)


def test_shapes_that_fit_both_ways_follow_class_dim(backend):
    x = torch.randn(4, 4, 4, generator=generator(0)).to(DEVICE)
    dense = torch.rand(4, 4, 4, generator=generator(1)).to(DEVICE)
    weight = torch.rand(4, 4, generator=generator(2)).to(DEVICE)
    for c in (0, 1, 2):
        want = tl.sigmoid_focal_loss(x.movedim(c, -1), dense.movedim(c, -1), weight=weight)
        got = tl.sigmoid_focal_loss(x, dense, weight=weight, class_dim=c)
        assert_close(got, want, 1e-6, "value")


@pytest.mark.parametrize("loss", ["focal", "softmax_focal", "distribution_focal", "giou"])
def test_double_backward(loss, backend):
    loss = case(loss)
    axes = plain_point(rows=60, classes=loss.axes.get("classes", [7])[0], layout="nchw")
    problem = loss.problem(axes, generator(0))
    x = problem.x.to(DEVICE).detach()
    sizes = sizes_of(x.shape[1], 3)
    heads = [t.requires_grad_() for t in split(x, x, sizes, 1)]
    args = to_device(problem.args)
    x.requires_grad_()

    def penalty(value, inputs):
        slopes = torch.autograd.grad(value, inputs, create_graph=True)
        total = sum(s.square().sum() for s in slopes)
        return torch.autograd.grad(total, inputs)

    (want,) = penalty(loss.function(x, *args), x)
    levels = of_rows(args, x, sizes, 1)
    got = penalty(loss.function(heads, *levels, class_dim=1), heads)
    assert_close(joined(list(got), 1, True), want, 1e-5, "second derivative")


@pytest.mark.parametrize("shape", [(2, 30), (60,)], ids=["images", "rows"])
@pytest.mark.parametrize("loss", ["focal", "quality_focal", "rank_sort"])
def test_weights_of_rows_beside_those_of_logits(loss, shape, backend):
    g = generator(5)
    function = {
        "focal": tl.sigmoid_focal_loss,
        "quality_focal": tl.quality_focal_loss,
        "rank_sort": lambda *args, weight: sum(tl.rank_sort_loss(*args, weight=weight)),
    }[loss]
    x = torch.randn(*shape, 4, generator=g)
    targets = torch.rand(x.shape, generator=g) * (torch.rand(x.shape, generator=g) < 0.2)
    row, logit = draw_weight(shape, g), draw_weight(x.shape, g)
    dim, half = len(shape) - 1, shape[-1] // 2
    mixed = torch.cat([row[..., None].expand(x.shape).narrow(dim, 0, half),
                       logit.narrow(dim, half, half)], dim)  # fmt: skip
    x, targets, row, logit, mixed = (to_device(t) for t in (x, targets, row, logit, mixed))
    weights = [row.narrow(dim, 0, half), logit.narrow(dim, half, half)]
    heads = [t.clone().requires_grad_() for t in x.chunk(2, dim)]
    got = function(heads, list(targets.chunk(2, dim)), weight=weights)
    x.requires_grad_()
    want = function(x, targets, weight=mixed)
    assert_close(got, want, 1e-6, "value")
    slopes = torch.cat(torch.autograd.grad(got, heads), dim)
    assert_close(slopes, *torch.autograd.grad(want, x), 1e-5, "gradient")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", CASES, ids=lambda c: c.name)
def test_empty_levels(loss, reduction, backend):
    axes = plain_point(rows=0, classes=loss.axes.get("classes", [7])[0], layout="contiguous")
    form = loss.axes.get("form", ["labels"])[0]
    problem = loss.problem(axes._replace(reduction=reduction, form=form), generator(0))
    x = [problem.x.to(DEVICE).requires_grad_() for _ in range(3)]
    value = loss.function(x, *([to_device(a)] * 3 for a in problem.args), reduction=reduction)
    total = sum(v.sum() for v in value) if reduction == "none" else value
    assert total == 0
    for t, g in zip(x, torch.autograd.grad(total, x), strict=True):
        assert g.shape == t.shape


def test_modules_know_the_dim_of_the_classes(backend):
    x, (labels, _) = of_qualities()
    sizes = sizes_of(60, 3)
    module = tl.FocalLoss(class_dim=1, gamma=1.5)
    assert "class_dim=1" in repr(module)
    got = module(split(x, x, sizes, 1), split(labels, x, sizes, 1))
    assert_close(got, tl.sigmoid_focal_loss(x, labels, gamma=1.5), 1e-6, "value")


def harmonised_cases(backend):
    """``(loss of x and what lies beside, x, targets, weight)``."""
    g = generator(7)
    x = torch.randn(2, 90, 11, generator=g) * 3
    labels = torch.randint(-1, 12, (2, 90), generator=g)
    share = torch.rand(2, 90, generator=g)
    dense = (torch.rand(2, 90, 11, generator=g) - 0.6).clamp(min=0)
    row, logit = draw_weight((2, 90), g), draw_weight((2, 90, 11), g)
    yield tl.ghm_c_loss, x, labels, None
    yield tl.ghm_c_loss, x, (labels, share), row
    yield tl.ghm_c_loss, x, dense, logit
    yield tl.ghm_r_loss, x, dense, row
    if backend == "eager":  # of many logits, which go by blocks
        x = torch.randn(2, 4000, 11, generator=g)
        labels = torch.randint(-1, 12, (2, 4000), generator=g)
        yield tl.ghm_c_loss, x, labels, draw_weight((2, 4000), g)
        yield tl.ghm_r_loss, x, x.flip(0), draw_weight((2, 4000, 11), g)


@pytest.mark.parametrize("class_dim", [1, -1])
@pytest.mark.parametrize("levels", LEVELS)
def test_harmonising_sees_one_batch(levels, class_dim, backend):
    for function, x, targets, weight in harmonised_cases(backend):
        x, targets, weight = (to_device(t) for t in (x, targets, weight))
        state = tuple(torch.rand(10, device=DEVICE).ceil() * 30 for _ in range(2))
        new_states = []

        def loss(x, targets, function=function, state=state, new=new_states, **kwargs):
            value, new_state = function(x, targets, momentum=0.75, state=state, **kwargs)
            new.append(new_state)
            return value

        kwargs = {} if weight is None else {"weight": weight}
        (value, gradient), (got, slope) = both(loss, x, (targets,), kwargs, levels, class_dim)
        assert_close(got, value, 1e-6, "value")
        assert_close(slope, gradient, 1e-6, "gradient")
        for one, of_levels in zip(*new_states, strict=True):
            assert torch.equal(one, of_levels), "counts are integers"


def test_harmonised_module_has_one_state(backend):
    x, (labels, _) = of_qualities()
    sizes = sizes_of(60, 3)
    one, of_levels = tl.GHMCLoss(momentum=0.5), tl.GHMCLoss(momentum=0.5, class_dim=1)
    one, of_levels = one.to(DEVICE), of_levels.to(DEVICE)
    for step in range(3):
        value = one(x * (step + 1), labels)
        got = of_levels(split(x * (step + 1), x, sizes, 1), split(labels, x, sizes, 1))
        assert_close(got, value, 1e-6, "value")
    assert torch.equal(one.amount, of_levels.amount)


def test_harmonised_levels_are_counted_once_under_checkpointing(backend):
    x, (labels, _) = of_qualities()
    sizes = sizes_of(60, 3)
    label_levels = split(labels, x, sizes, 1)

    def trained(checkpointed: bool):
        module = tl.GHMCLoss(momentum=0.5, class_dim=1).to(DEVICE)
        found = []
        for step in range(3):
            levels = [t.requires_grad_() for t in split(x.detach() * (step + 1), x, sizes, 1)]

            def loss(*levels):
                return module(list(levels), label_levels)

            value = (
                checkpoint(loss, *levels, use_reentrant=False) if checkpointed else loss(*levels)
            )
            found.append((value.detach(), *torch.autograd.grad(value, levels)))
        return found, module.amount

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=0)


def test_harmonised_levels_without_anchors(backend):
    x = [torch.zeros(2, 5, 0, 3, device=DEVICE, requires_grad=True) for _ in range(2)]
    labels = [torch.zeros(2, 0, 3, dtype=torch.long, device=DEVICE) for _ in range(2)]
    loss = tl.ghm_c_loss(x, labels, class_dim=1)
    assert loss == 0
    loss.backward()
    assert x[0].grad.shape == x[0].shape


def ranking_cases():
    """``(values and gradients of x and what lies beside it, x, targets, further arguments)``."""
    g = generator(11)
    x = torch.randn(2, 90, 7, generator=g)
    labels = torch.randint(-1, 8, (2, 90), generator=g)
    share = torch.rand(2, 90, generator=g)
    dense = (torch.rand(2, 90, 7, generator=g) - 0.9).clamp(min=0) * 10
    row, logit = draw_weight((2, 90), g), draw_weight((2, 90, 7), g)
    image = torch.arange(2).view(2, 1, 1).expand(2, 90, 7)
    yield "rank_sort", tl.rank_sort_loss, x, (labels, share), {}
    yield "rank_sort dense", tl.rank_sort_loss, x, dense, {"weight": row}
    yield "rank_sort lists", tl.rank_sort_loss, x, labels, {"group": image, "num_groups": 2}
    yield "ap", tl.ap_loss, x, labels, {"weight": row}
    yield "ap dense", tl.ap_loss, x, dense, {"weight": logit, "interpolated": False}
    yield "alrp", tl.alrp_loss, x, labels, {"localization_error": share}
    yield "alrp dense", tl.alrp_loss, x, dense, {"localization_error": share, "delta": 0.0}


def total_of(value):
    return sum(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("class_dim", [1, -1])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("case", list(ranking_cases()), ids=lambda c: c[0])
def test_all_levels_are_ranked_together(case, levels, class_dim, backend):
    _, function, x, targets, kwargs = case
    values = []

    def loss(*args, **kwargs):
        values.append(function(*args, **kwargs))
        return total_of(values[-1])

    (_, gradient), (_, slope) = both(
        loss, x.to(DEVICE), (to_device(targets),), to_device(kwargs), levels, class_dim
    )
    parts = [v if isinstance(v, tuple) else (v,) for v in values]
    for one, of_levels in zip(*parts, strict=True):
        assert_close(of_levels.detach(), one.detach(), 1e-6, "value")
    assert_close(slope, gradient, 1e-6, "gradient")


def test_the_error_of_alrp_gets_its_gradient_in_each_level(backend):
    g = generator(3)
    x, labels = torch.randn(2, 60, 5, generator=g), torch.randint(6, (2, 60), generator=g)
    x, labels = x.to(DEVICE), labels.to(DEVICE)
    error = torch.rand(2, 60, generator=g).to(DEVICE)
    sizes = sizes_of(60, 5)
    errors = [t.requires_grad_() for t in split(error, x, sizes, 1)]
    error.requires_grad_()
    (want,) = torch.autograd.grad(tl.alrp_loss(x, labels, error).loc, error)
    loss = tl.alrp_loss(split(x, x, sizes, 1), split(labels, x, sizes, 1), errors, class_dim=1)
    got = torch.autograd.grad(loss.loc, errors)
    assert_close(joined(list(got), 1, False), want, 1e-6, "gradient")


def test_ranked_levels_without_anchors(backend):
    x = [torch.zeros(2, 5, 0, 3, device=DEVICE, requires_grad=True) for _ in range(2)]
    labels = [torch.zeros(2, 0, 3, dtype=torch.long, device=DEVICE) for _ in range(2)]
    loss = tl.ap_loss(x, labels, class_dim=1)
    assert loss == 0
    loss.backward()
    assert x[0].grad.shape == x[0].shape


def prime_samples(levels: int):
    """``(IoU, object, class, weight)`` of rows; some rows are no positives."""
    g = generator(levels + 40)
    objects = torch.randint(-6, 9, (2, 60), generator=g).clamp(min=-1)
    labels = torch.where(objects >= 0, objects % 4, 5)
    overlap, weight = torch.rand(2, 60, generator=g), torch.rand(2, 60, generator=g) - 0.2
    return tuple(t.to(DEVICE) for t in (overlap, objects, labels, weight))


@pytest.mark.parametrize("levels", LEVELS)
def test_prime_samples_are_ranked_over_all_levels(levels, backend):
    overlap, objects, labels, weight = prime_samples(levels)
    sizes = sizes_of(60, levels)
    iou, gt, label, of_weight = (split(t, t[..., None], sizes, 1) for t in prime_samples(levels))
    got = joined(tl.iou_hlr(iou, gt, label), 1, False)
    assert torch.equal(got, tl.iou_hlr(overlap, objects, labels))
    each = torch.rand(2, 60, 5, generator=generator(levels)).to(DEVICE)
    for class_dim in (1, -1):
        for losses, x in ((each, split(each, each, sizes, class_dim)),
                          (each[..., 0], split(each[..., 0], each, sizes, class_dim))):  # fmt: skip
            for given, of_levels in ((None, None), (weight, of_weight)):
                want = tl.isr_p_weight(losses, overlap, objects, labels, weight=given)
                got = tl.isr_p_weight(x, iou, gt, label, weight=of_levels, class_dim=class_dim)
                assert [t.shape for t in got] == [t.shape for t in iou]
                assert_close(joined(got, 1, False), want, 1e-6, "weight")


@pytest.mark.parametrize("class_dim", [1, -1])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("coordinates", [None, 4, 5])
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "softmax", "k": 2}, {"keep_loss": True, "avg_factor": 7}],
    ids=str,
)
def test_carl_has_the_mean_of_all_levels(options, coordinates, levels, class_dim, backend):
    x, (labels, _) = of_qualities()
    shape = labels.shape if coordinates is None else (*labels.shape, coordinates)
    box_loss = torch.rand(shape, generator=generator(levels)).to(DEVICE)
    sizes = sizes_of(60, levels)

    def call(x, box_loss, as_head):
        leaves = [t.detach().clone().requires_grad_() for t in (x, box_loss)]
        x, box_loss = leaves
        if not as_head:
            return tl.carl_loss(x, labels, box_loss, **options), leaves
        like = x if coordinates is None else box_loss
        heads = split(x, x, sizes, class_dim), split(labels, x, sizes, class_dim)
        loss = tl.carl_loss(
            *heads, split(box_loss, like, sizes, class_dim), class_dim=class_dim, **options
        )
        return loss, leaves

    (value, leaves), (got, of_levels) = (call(x, box_loss, head) for head in (False, True))
    assert_close(got.detach(), value.detach(), 1e-6, "value")
    pairs = zip(
        torch.autograd.grad(got, of_levels), torch.autograd.grad(value, leaves), strict=True
    )
    for slope, gradient in pairs:
        assert_close(slope, gradient, 2e-6, "gradient")


@pytest.mark.parametrize("class_dim", [1, -1])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("form", ["labels", "quality", "dense"])
def test_a_diagnosis_counts_all_levels(form, levels, class_dim, backend):
    x, targets = of_qualities()
    g = generator(levels)
    weight = (torch.rand(2, 60, generator=g) - 0.2).to(DEVICE)
    if form == "dense":
        targets = (torch.rand(x.shape, generator=g) - 0.8).to(DEVICE)
        weight = (torch.rand(x.shape, generator=g) - 0.2).to(DEVICE)
    targets = targets[0] if form == "labels" else targets
    one, several = tl.Diagnosis(), tl.Diagnosis()
    sizes = sizes_of(60, levels)
    for step in (1, 2):  # the second is added
        y = x * step
        one.update(y, targets, weight=weight)
        several.update(
            split(y, x, sizes, class_dim),
            of_rows(targets, x, sizes, class_dim),
            weight=of_rows(weight, x, sizes, class_dim),
            class_dim=class_dim,
        )
    assert several.counts.equal(one.counts) and one.counts.sum() > 0


def test_a_wrong_level_leaves_a_diagnosis_as_it_was(backend):
    x, (labels, _) = of_qualities()
    diagnosis = tl.Diagnosis()
    diagnosis.update([x, x], [labels, labels])
    before = diagnosis.counts.clone()
    with pytest.raises(ValueError, match="level 1: targets must have shape"):
        diagnosis.update([x, x], [labels, labels[:1]])
    with pytest.raises(ValueError, match="one entry for each of 2 levels; got 1"):
        diagnosis.update([x, x], [labels])
    assert diagnosis.counts.equal(before)
