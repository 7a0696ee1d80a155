"""Set criterion: loops in plain Python, gradients, groups, compiled, class losses."""

from __future__ import annotations

import math

import processes
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from test_matching import corners_of, draw, giou_of
from test_sync import NoReads, unchecked  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import tritonloss as tl
from tritonloss._dispatch import HAS_TRITON, INTERPRET
from tritonloss.losses import pointwise, softmax_focal
from tritonloss.set_criterion import CLASS_LOSSES

each_loss = pytest.mark.parametrize("loss", CLASS_LOSSES)


def bce(x, y):
    return torch.clamp(x, min=0) - x * y + torch.log1p(torch.exp(-x.abs()))


def class_formula(loss, x, label, quality):
    """Sum over the classes of one query, float64; label None is background."""
    p = x.sigmoid()
    hot = torch.zeros_like(x)
    if label is not None:
        hot[label] = 1
    if loss == "focal":
        alpha = 0.25 * hot + 0.75 * (1 - hot)
        return (alpha * (p - hot).abs() ** 2 * bce(x, hot)).sum()
    if loss == "varifocal":
        negative = 0.75 * p.detach() ** 2 * bce(x, 0 * x)
        positive = quality * bce(x, quality * hot)
    elif loss == "mal":
        negative = p.detach() ** 1.5 * bce(x, 0 * x)
        positive = bce(x, quality**1.5 * hot)
    else:
        negative = p**2 * bce(x, 0 * x)
        t = (p.detach() ** 0.25 * quality**0.75).clamp(min=0.01)
        positive = bce(x, t * hot)
    return torch.where(hot > 0, positive, negative).sum()


def written_out(loss, logits, boxes, labels, targets, sizes, indices, n):
    """Terms of each layer as 0-d float64 tensors: loops over layers, images and queries."""
    layers, images, queries, columns = logits.shape
    terms = {"class": [], "l1": [], "giou": []}
    for layer in range(layers):
        named, l1, giou, weight = 0.0, 0.0, 0.0, 0.0
        for image in range(images):
            owner = {}
            for t in range(int(sizes[image])):
                q = int(indices[layer, image, t])
                if q < 0:
                    continue
                p, g = boxes[layer, image, q], targets[image, t]
                owner[q] = t
                l1 = l1 + (p - g).abs().sum()
                iou, value = giou_in_torch(p, g)
                owner[q] = t, iou.detach()
                giou = giou + 1 - value
            for q in range(queries):
                x = logits[layer, image, q]
                label = int(labels[image, owner[q][0]]) if q in owner else None
                if loss == "softmax":
                    w = 0.1 if label is None else 1.0
                    target = torch.tensor(columns - 1 if label is None else label)
                    named = named + w * F.cross_entropy(x, target)
                    weight += w
                else:
                    named = named + class_formula(loss, x, label, owner[q][1] if q in owner else 0)
        terms["class"].append(named / (weight if loss == "softmax" else n))
        terms["l1"].append(l1 / n)
        terms["giou"].append(giou / n)
    return {
        k: torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in terms[k]]) for k in terms
    }


def giou_in_torch(p, g):
    p1, p2 = p[:2] - p[2:] / 2, p[:2] + p[2:] / 2
    g1, g2 = g[:2] - g[2:] / 2, g[:2] + g[2:] / 2
    inter = (torch.minimum(p2, g2) - torch.maximum(p1, g1)).clamp(min=0).prod()
    hull = (torch.maximum(p2, g2) - torch.minimum(p1, g1)).prod()
    union = p[2:].prod() + g[2:].prod() - inter
    plain = giou_of(corners_of(p.tolist(), "cxcywh"), corners_of(g.tolist(), "cxcywh"))
    assert math.isclose(plain[0], float((inter / union).detach()), rel_tol=1e-6, abs_tol=1e-9)
    return inter / union, inter / union - (hull - union) / hull


def problem(seed, loss, layers=2, images=3, queries=7, objects=3, classes=4):
    columns = classes + (loss == "softmax")
    logits, boxes, labels, targets, sizes = draw(seed, (layers,), images, queries, objects, columns)
    return logits, boxes, labels.clamp(max=classes - 1), targets, sizes


@each_loss
@pytest.mark.parametrize("seed", [0, 1])
def test_written_out(loss, seed, backend):
    logits, boxes, labels, targets, sizes = problem(seed, loss)
    logits.requires_grad_(), boxes.requires_grad_()
    criterion = tl.SetCriterion(loss, layer_weights=(0.5, 2.0))
    found = criterion(logits, boxes, labels, targets, sizes)
    x, b = (v.detach().cpu().double().requires_grad_() for v in (logits, boxes))
    n = int(sizes.sum())
    expected = written_out(
        loss, x, b, labels.cpu(), targets.cpu().double(), sizes, found["indices"], n
    )
    total = sum(
        w * (expected[k] * torch.tensor([0.5, 2.0])).sum()
        for k, w in {"class": 1.0, "l1": 5.0, "giou": 2.0}.items()
    )
    for k, value in expected.items():
        torch.testing.assert_close(found[k].cpu().double(), value, rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(found["total"].cpu().double(), total, rtol=5e-6, atol=1e-6)
    found["total"].backward()
    total.backward()
    torch.testing.assert_close(logits.grad.cpu().double(), x.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(boxes.grad.cpu().double(), b.grad, rtol=1e-4, atol=1e-5)


@each_loss
def test_no_objects_at_all(loss, backend):
    logits, boxes, *_ = problem(2, loss)
    logits.requires_grad_(), boxes.requires_grad_()
    labels = [torch.zeros(0, dtype=torch.int64, device=DEVICE)] * 3
    empty = [torch.zeros(0, 4, device=DEVICE)] * 3
    found = tl.SetCriterion(loss)(logits, boxes, labels, empty)
    assert (found["l1"] == 0).all() and (found["giou"] == 0).all() and (found["class"] > 0).all()
    found["total"].backward()
    assert logits.grad.abs().sum() > 0 and (boxes.grad == 0).all()


@each_loss
def test_a_query_that_is_not_matched_may_hold_any_box(loss, backend):
    logits, boxes, labels, targets, sizes = problem(3, loss)
    boxes[:, :, 0] = math.nan
    boxes.requires_grad_()
    found = tl.SetCriterion(loss)(logits, boxes, labels, targets, sizes)
    assert not (found["indices"] == 0).any()
    assert all(found[k].isfinite().all() for k in ("class", "l1", "giou", "total"))
    found["total"].backward()
    assert boxes.grad.isfinite().all()


def test_groups_are_criteria_of_their_own(backend):
    logits, boxes, labels, targets, sizes = problem(4, "varifocal", queries=12)
    found = tl.SetCriterion("varifocal", groups=3)(logits, boxes, labels, targets, sizes)
    alone = [
        tl.SetCriterion("varifocal")(x, b, labels, targets, sizes)
        for x, b in zip(logits.chunk(3, 2), boxes.chunk(3, 2), strict=True)
    ]
    for k in ("class", "l1", "giou", "total"):
        mean = sum(a[k] for a in alone) / 3
        torch.testing.assert_close(found[k], mean, rtol=1e-5, atol=1e-6)
    assert found["indices"].equal(torch.stack([a["indices"] for a in alone], 2))


@each_loss
@pytest.mark.parametrize("per_object", [1, 2])
def test_denoising_queries(loss, per_object, backend):
    """Each group as a call of its own, and each image of it: the t-th query has the t-th object."""
    groups, objects = 3, 4
    queries = groups * per_object * objects
    logits, boxes, labels, targets, sizes = problem(
        15, loss, queries=queries, objects=objects, classes=5
    )
    criterion = tl.SetCriterion(loss, groups=2)  # the matched queries', not the denoising ones'
    indices = criterion.denoising_indices(labels, sizes, layers=2, groups=groups)
    found = criterion(logits, boxes, labels, targets, sizes, indices=indices)
    n = int(sizes.sum()) * groups
    known = torch.stack([torch.arange(objects)] * logits.shape[1])
    known = known.where(known < sizes.cpu()[:, None], -1).expand(2, -1, -1)
    for k in ("class", "l1", "giou"):
        parts = []
        for x, b in zip(logits.chunk(groups, 2), boxes.chunk(groups, 2), strict=True):
            terms = written_out(
                loss, x.cpu().double(), b.cpu().double(), labels.cpu(), targets.cpu().double(),
                sizes, known, n,
            )  # fmt: skip
            parts.append(terms[k])
        whole = sum(parts) / (groups if (loss, k) == ("softmax", "class") else 1)
        torch.testing.assert_close(found[k].cpu().double(), whole, rtol=5e-6, atol=1e-6)


def test_denoising_indices_of_lists_and_of_padded_objects():
    labels = [torch.tensor([4, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([1])]
    found = tl.SetCriterion.denoising_indices(labels, layers=2, groups=3)
    assert found.shape == (2, 3, 3, 2)
    assert found[1, :, 2].tolist() == [[0, 1], [-1, -1], [0, -1]]
    padded = torch.tensor([[4, 2], [0, 0], [1, 0]], dtype=torch.int16)
    sizes = torch.tensor([2, 0, 1])
    again = tl.SetCriterion.denoising_indices(padded, sizes, layers=2, groups=3)
    assert again.equal(found)
    whole = tl.SetCriterion.denoising_indices(padded, layers=1)
    assert whole.tolist() == [[[[0, 1]]] * 3]
    assert tl.SetCriterion.denoising_indices([], layers=2).shape == (2, 0, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((torch.zeros(2),), {}, TypeError, "labels must"),
        ((torch.zeros(2, dtype=torch.int64),), {}, ValueError, r"labels must have shape \(B, T\)"),
        (([torch.zeros(2)], torch.tensor([2])), {}, ValueError, "sizes go with padded objects"),
        ((torch.zeros(2, 1, dtype=torch.int64), torch.tensor([1])), {}, ValueError, "sizes must"),
        (([3],), {}, TypeError, "labels must"),
        (([],), {"layers": 0}, ValueError, "layers must be"),
        (([],), {"groups": 1.5}, TypeError, "groups must be"),
    ],
)
def test_errors_of_denoising_indices(arguments, options, error, says):
    with pytest.raises(error, match=says):
        tl.SetCriterion.denoising_indices(*arguments, **{"layers": 1, **options})


def test_given_indices_and_number(backend):
    logits, boxes, labels, targets, sizes = problem(5, "focal")
    criterion = tl.SetCriterion("focal")
    matched = criterion.match(logits, boxes, labels, targets, sizes)
    found = criterion(logits, boxes, labels, targets, sizes)
    again = criterion(logits, boxes, labels, targets, sizes, indices=matched, num_boxes=1.0)
    for k in ("class", "l1", "giou", "total"):
        torch.testing.assert_close(found[k] * sizes.sum(), again[k], rtol=1e-5, atol=1e-5)


def test_objects_in_lists(backend):
    logits, boxes, labels, targets, sizes = problem(6, "mal")
    lists = [v[:n] for v, n in zip(labels, sizes, strict=True)]
    box_lists = [v[:n] for v, n in zip(targets, sizes, strict=True)]
    criterion = tl.SetCriterion("mal")
    found = criterion(logits, boxes, lists, box_lists)
    assert found["total"].equal(criterion(logits, boxes, labels, targets, sizes)["total"])
    assert criterion.match(logits, boxes, lists, box_lists).equal(found["indices"])


@each_loss
@pytest.mark.parametrize("groups", [1, 2])
def test_compiled_whole_after_the_assignment(loss, groups, backend):
    logits, boxes, labels, targets, sizes = problem(7, loss, queries=8)
    criterion = tl.SetCriterion(loss, groups=groups)
    indices = criterion.match(logits, boxes, labels, targets, sizes)
    torch._dynamo.reset()  # each case is a graph of its own
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    results = []
    for call in (criterion, compiled):
        x, b = logits.clone().requires_grad_(), boxes.clone().requires_grad_()
        found = call(x, b, labels, targets, sizes, indices=indices)
        found["total"].backward()
        results.append((found["class"], found["l1"], found["giou"], x.grad, b.grad))
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"class_loss": "dice"}, ValueError, "class_loss must be one of focal"),
        ({"class_params": {"beta": 1}}, ValueError, "class_params of focal are alpha, gamma"),
        ({"groups": 0}, ValueError, "groups must be"),
        ({"cost_weights": (1.0,)}, ValueError, "cost_weights must be three numbers"),
        ({"box_format": "xywh"}, ValueError, "box_format must be one of"),
    ],
)
def test_errors_of_the_module(options, error, says):
    with pytest.raises(error, match=says):
        tl.SetCriterion(**options)


def test_errors_of_a_call():
    arguments = [t.cpu() for t in problem(8, "focal")]
    with pytest.raises(ValueError, match="do not make 2 equal groups"):
        tl.SetCriterion(groups=2)(*arguments)
    with pytest.raises(ValueError, match="layer_weights must be 2 numbers; got 3"):
        tl.SetCriterion(layer_weights=(1.0, 1.0, 1.0))(*arguments)
    with pytest.raises(ValueError, match="indices must have shape"):
        tl.SetCriterion()(*arguments, indices=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices must lie in -1\.\.6"):
        tl.SetCriterion()(*arguments, indices=torch.full((2, 3, 3), 7))
    with pytest.raises(ValueError, match="logits must have shape"):
        tl.SetCriterion()(arguments[0][0], arguments[1][0], *arguments[2:])


# ---- class losses with a quality


QUALITY_LOSSES = {"bce": tl.bce_loss, "mal": tl.mal_loss, "iou_aware_bce": tl.iou_aware_bce_loss}


@pytest.mark.parametrize("loss", QUALITY_LOSSES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_quality_losses(loss, reduction, backend):
    g = torch.Generator().manual_seed(9)
    x = (torch.randn(11, 5, generator=g) * 3).to(DEVICE).requires_grad_()
    labels = torch.randint(-1, 6, (11,), generator=g)
    quality = torch.rand(11, generator=g)
    quality[labels >= 5] = 0.5  # of background: not looked at
    found = QUALITY_LOSSES[loss](x, (labels.to(DEVICE), quality.to(DEVICE)), reduction=reduction)
    z = x.detach().cpu().double().requires_grad_()
    if reduction == "none":
        assert found.shape == x.shape
        found = found.sum()
    rows = []
    for i in range(11):
        label = int(labels[i])
        if label == -1:
            continue
        label, u = (None, 0) if label == 5 else (label, quality[i].double())
        if loss == "bce":
            y = torch.zeros(5, dtype=torch.float64)
            if label is not None:
                y[label] = u
            rows.append(bce(z[i], y).sum())
        else:
            rows.append(class_formula(loss, z[i], label, u))
    expected = sum(rows) / (5 * len(rows) if reduction == "mean" else 1)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=5e-6, atol=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(x.grad.cpu().double(), z.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [tl.mal_loss, tl.iou_aware_bce_loss])
def test_quality_losses_need_a_pair(loss):
    x, labels = torch.zeros(3, 2), torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match="targets must be a pair"):
        loss(x, labels)
    with pytest.raises(ValueError, match="quality must have shape"):
        loss(x, (labels, torch.zeros(1)))


# ---- what a step costs: launches, operations, reads


def step(loss, layers, images, queries=24, objects=3, classes=6, groups=1, device="cpu"):
    """A call after the assignment, without its backward."""
    columns = classes + (loss == "softmax")
    x = torch.randn(layers, images, queries, columns, device=device, requires_grad=True)
    boxes = (torch.rand(layers, images, queries, 4, device=device) / 2 + 0.1).requires_grad_()
    labels = torch.zeros(images, objects, dtype=torch.int64, device=device)
    targets = torch.rand(images, objects, 4, device=device) / 2 + 0.1
    sizes = torch.full((images,), objects, device=device)
    criterion = tl.SetCriterion(loss)
    indices = criterion.denoising_indices(labels, sizes, layers=layers, groups=groups)
    return lambda: criterion(x, boxes, labels, targets, sizes, indices=indices)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are other operations")
@each_loss
def test_operations_of_a_step_do_not_grow_with_layers_images_or_groups(loss):
    """None of them is looped over; blocks of logits are, and there is less than one here."""
    found = []
    for layers, images, groups in ((2, 2, 2), (6, 2, 2), (2, 8, 2), (2, 2, 6)):
        call = step(loss, layers, images, groups=groups)
        with tl.backend("eager"), Operations() as operations:
            call()["total"].backward()
        found.append(operations.names)
    assert all(names == found[0] for names in found)


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels read values")
@each_loss
def test_a_step_reads_nothing_after_the_assignment(loss, unchecked):  # noqa: F811
    call = step(loss, 3, 2, groups=2)
    with tl.backend("eager"), NoReads():
        call()["total"].backward()


@pytest.mark.skipif(INTERPRET or not HAS_TRITON, reason="launches of compiled kernels")
@each_loss
@pytest.mark.parametrize("layers", [1, 6])
def test_launches_of_a_step(loss, layers):
    """However many layers: two for the class term and one for its backward, three for boxes."""
    from perf._record import recorded_launches

    call = step(loss, layers, 2, device="meta")
    with recorded_launches() as launches, NoReads():
        call()["total"].backward()
    named = ["pointwise_kernel", "finish_kernel"]
    last = ["pointwise_kernel"]
    if loss == "softmax":
        named = last = ["softmax_focal_kernel"]
    quality = [] if loss in ("focal", "softmax") else ["box_kernel"]
    names = [launch.name for launch in launches]
    assert names[: 1 + len(quality)] == ["box_kernel", *quality]  # forward of GIoU, IoU
    assert names[1 + len(quality) : -2] == named
    assert sorted(names[-2:]) == sorted(["box_kernel", *last])
    for launch in launches:
        if launch.name == "pointwise_kernel":
            assert launch.grid[1] == layers


# ---- sums of layers


def layered_problem(seed, classes=50):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 5, 100, classes, generator=g) * 3).to(DEVICE)  # more than a block
    labels = torch.randint(0, classes + 1, (3, 5, 100), generator=g).to(DEVICE)
    return x, labels, torch.rand(3, 5, 100, generator=g).to(DEVICE)


@pytest.mark.parametrize("kind", ["focal", "varifocal", "softmax"])
@pytest.mark.parametrize("strided", [False, True])
def test_sums_of_layers_are_those_of_calls(kind, strided, backend):
    x, labels, quality = layered_problem(30)
    if strided:  # the queries of a wider tensor
        x = torch.stack([x, -x], 3).flatten(2, 3)[:, :, ::2]
    if kind == "softmax":
        weight = torch.rand(x.shape[-1], device=DEVICE)
        labels = labels.clamp(max=x.shape[-1] - 1)
        divisors = torch.tensor([2.0, 3.0, 5.0], device=DEVICE)

        def all_of(x):
            return softmax_focal.by_layer(x, labels, weight, divisors)

        def one(x, k):
            options = {"alpha": weight, "gamma": 0.0, "avg_factor": divisors[k]}
            return tl.softmax_focal_loss(x, labels[k], **options)
    elif kind == "focal":

        def all_of(x):
            return pointwise.by_layer("focal", x, labels, None, (0.3, 0.7, 1.5), 7.0)

        def one(x, k):
            return tl.sigmoid_focal_loss(x, labels[k], alpha=0.3, gamma=1.5, avg_factor=7.0)
    else:

        def all_of(x):
            return pointwise.by_layer("varifocal", x, labels, quality, (0.6, 2.0, 1.0, 0.0), 7.0)

        def one(x, k):
            return tl.varifocal_loss(x, (labels[k], quality[k]), alpha=0.6, avg_factor=7.0)

    results = []
    slope = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    for call in (all_of, lambda x: torch.stack([one(x[k], k) for k in range(3)])):
        leaf = x.detach().requires_grad_()
        value = call(leaf)
        results.append((value.detach(), *torch.autograd.grad(value, leaf, slope)))
    torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [tl.sigmoid_focal_loss, tl.varifocal_loss, tl.softmax_focal_loss])
def test_a_retained_graph_has_the_same_gradient_again(loss, backend):
    """On the CPU a backward overwrites the gradient that the forward made."""
    x, labels, _ = layered_problem(31)
    labels = labels.clamp(max=x.shape[-1] - 1)
    x.requires_grad_()
    value = loss(x, labels)
    first = torch.autograd.grad(value, x, retain_graph=True)[0].clone()
    again = torch.autograd.grad(3 * value, x, retain_graph=True)[0]
    torch.testing.assert_close(again, 3 * first, rtol=1e-6, atol=0)
    value.backward()
    torch.testing.assert_close(x.grad, first, rtol=1e-6, atol=0)
    value = loss(x, labels)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        value.backward()


# ---- several processes


def shared_step(group, rank, loss, averaged, logits, boxes, labels, targets, sizes):
    """The terms of a share of the images, and the gradients of their total."""
    x, b = logits.clone().requires_grad_(), boxes.clone().requires_grad_()
    criterion = tl.SetCriterion(loss, process_group=group, gradients_averaged=averaged)
    found = criterion(x, b, labels, targets, sizes)
    terms = torch.stack([found[k].detach() for k in ("class", "l1", "giou")])
    return terms, *torch.autograd.grad(found["total"], (x, b))


@pytest.mark.skipif(INTERPRET or DEVICE != "cpu", reason="gloo on CPUs; says the same plain")
def test_processes_share_the_number_of_objects():
    """Their terms add up to those of one process with all images, and so do their gradients."""
    pool = processes.Pool(2)
    try:
        for loss in ("focal", "varifocal", "mal", "iou_aware_bce"):
            logits, boxes, labels, targets, sizes = problem(40, loss, images=5)
            want = shared_step(None, 0, loss, False, logits, boxes, labels, targets, sizes)
            dims = (1, 1, 0, 0, 0)  # where the images are: 2 of them, and 3
            shares = [
                processes.PerRank(t.split([2, 3], dim))
                for t, dim in zip((logits, boxes, labels, targets, sizes), dims, strict=True)
            ]
            for averaged in (False, True):
                parts = pool.run(shared_step, 2, loss, averaged, *shares)
                times = 2 if averaged else 1  # the trainer divides by it
                terms, *gradients = zip(*parts, strict=True)
                torch.testing.assert_close(sum(terms) / times, want[0], rtol=1e-5, atol=1e-6)
                for mine, whole in zip(gradients, want[1:], strict=True):
                    mine = torch.cat(mine, 1) / times
                    torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-6)
    finally:
        pool.close()
