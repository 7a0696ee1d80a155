"""IoU, GIoU, DIoU, CIoU and EIoU loss: formula, known answers, degenerate boxes."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from conftest import DEVICE

import tritonloss as tl
from tritonloss.eager import _blocks
from tritonloss.losses.boxes import KINDS

LOSSES = {kind: getattr(tl, f"{kind}_loss") for kind in KINDS} | {
    "ciou everywhere": partial(tl.ciou_loss, alpha_threshold=-1),
}
MODES = {
    "iou square": partial(tl.iou_loss, mode="square"),
    "iou log": partial(tl.iou_loss, mode="log"),
}
each_loss = pytest.mark.parametrize("loss", (LOSSES | MODES).values(), ids=LOSSES | MODES)


def written_out(p, t, kind, alpha_threshold=0.5, eps=1e-7):
    """The formula for one pair, in plain Python."""
    wp, hp = max(p[2] - p[0], 0), max(p[3] - p[1], 0)
    wt, ht = max(t[2] - t[0], 0), max(t[3] - t[1], 0)
    wi, hi = max(min(p[2], t[2]) - max(p[0], t[0]), 0), max(min(p[3], t[3]) - max(p[1], t[1]), 0)
    wc, hc = max(p[2], t[2]) - min(p[0], t[0]), max(p[3], t[3]) - min(p[1], t[1])
    union = max(wp * hp + wt * ht - wi * hi, eps)
    iou = wi * hi / union
    if kind == "iou":
        return 1 - iou
    if kind == "giou":
        return 1 - iou + (max(wc * hc, eps) - union) / max(wc * hc, eps)
    dx, dy = (p[0] + p[2] - t[0] - t[2]) / 2, (p[1] + p[3] - t[1] - t[3]) / 2
    loss = 1 - iou + (dx**2 + dy**2) / max(wc**2 + hc**2, eps)
    if kind == "eiou":
        loss += (wp - wt) ** 2 / max(wc * wc, eps) + (hp - ht) ** 2 / max(hc * hc, eps)
    if kind == "ciou" and iou > alpha_threshold:
        v = 4 / math.pi**2 * (math.atan2(wt, ht) - math.atan2(wp, hp)) ** 2
        loss += v * v / max(1 - iou + v, eps)
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_written_out(kind, backend):
    g = torch.Generator().manual_seed(3)
    target = torch.rand(60, 4, generator=g) * 10
    target[:, 2:] += target[:, :2] + 0.1
    pred = target + torch.randn(60, 4, generator=g) * 0.8
    loss = LOSSES[kind](pred.to(DEVICE), target.to(DEVICE), reduction="none")
    pairs = zip(pred.tolist(), target.tolist(), strict=True)
    expected = torch.tensor([written_out(p, t, kind) for p, t in pairs])
    torch.testing.assert_close(loss.cpu(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-7, 1e-2])
def test_modes_of_iou(eps, backend):
    pred, target = torch.rand(2, 60, 4).sort(-1).values * 10
    pred[:20] = target[:20] + torch.randn(20, 4) * 0.01
    pred[20:24] += 50
    pairs = list(zip(pred.tolist(), target.tolist(), strict=True))
    overlap = torch.tensor([1 - written_out(p, t, "iou", eps=eps) for p, t in pairs]).clamp(min=eps)
    for mode, expected in (
        ("linear", 1 - torch.where(overlap == eps, 0, overlap)),
        ("square", 1 - torch.where(overlap == eps, 0, overlap) ** 2),
        ("log", -overlap.log()),
    ):
        x, t = pred.to(DEVICE).requires_grad_(), target.to(DEVICE)
        loss = tl.iou_loss(x, t, mode=mode, eps=eps, reduction="none")
        torch.testing.assert_close(loss.detach().cpu(), expected, rtol=1e-5, atol=1e-6)
        (slope,) = torch.autograd.grad(loss.sum(), x)
        assert not slope[20:24].any() and slope.isfinite().all()
    with pytest.raises(ValueError, match="mode must be one of linear, square, log; got 'exp'"):
        tl.iou_loss(pred, target, mode="exp")


@each_loss
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradient_to_target(loss, reduction, backend):
    """What the plain formula gives both boxes; the losses are symmetric."""
    pred, target = (torch.rand(2, 40, 4).sort(-1).values * 10).to(DEVICE)
    pred[:10] = target[:10] + torch.randn(10, 4, device=DEVICE).abs() * 0.1
    weight = torch.rand(40, device=DEVICE) - 0.2
    x, y = pred.clone().requires_grad_(), target.clone().requires_grad_()
    options = {"weight": weight, "reduction": reduction}
    with pytest.raises(ValueError, match="target requires grad"):
        loss(x, y, **options)
    value = loss(x, y, gradient_to_target=True, **options)
    expected = loss(pred, target, **options)
    assert value.equal(expected)
    upstream = torch.rand_like(value)
    found = torch.autograd.grad(value, (x, y), upstream)
    double = [t.double().requires_grad_() for t in (pred, target)]
    same = loss(double[0], target.double(), **options)
    swapped = loss(double[1], pred.double(), **options)
    expected = [torch.autograd.grad(v, t, upstream.double())[0]
                for v, t in zip((same, swapped), double, strict=True)]  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    # by differences, in the eager formula
    if loss is tl.ciou_loss or loss is LOSSES["ciou everywhere"]:
        return  # its alpha is a constant
    step = torch.randn(40, 4, dtype=torch.float64, device=DEVICE) * 1e-6
    with tl.backend("eager"):
        ends = [loss(pred.double(), target.double() + s, **options) for s in (step, -step)]
    moved = ((ends[0] - ends[1]) / 2 * upstream.double()).sum()
    torch.testing.assert_close((expected[1] * step).sum(), moved, rtol=1e-3, atol=1e-9)


def test_weights_of_coordinates_are_averaged(backend):
    pred, target = (torch.rand(2, 30, 4).sort(-1).values).to(DEVICE)
    weight = torch.rand(30, 4, device=DEVICE)
    weight[:5] = 0
    for reduction in ("none", "mean"):
        found = tl.giou_loss(pred, target, weight=weight, reduction=reduction)
        expected = tl.giou_loss(pred, target, weight=weight.mean(-1), reduction=reduction)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_iou_is_written_out_and_differentiable(kind, dtype, backend):
    target = torch.rand(60, 4) * 10
    target[:, 2:] += target[:, :2] + 0.1
    pred = target + torch.randn(60, 4) * 0.8
    pred[:5] += 100
    pred, target = pred.to(dtype), target.to(dtype)
    x = pred.to(DEVICE).requires_grad_()
    value = tl.iou(x, target.to(DEVICE), kind=kind)
    assert value.dtype == torch.promote_types(dtype, torch.float32) and value.shape == (60,)
    pairs = zip(pred.tolist(), target.tolist(), strict=True)
    expected = torch.tensor([1 - written_out(p, t, kind) for p, t in pairs], dtype=value.dtype)
    torch.testing.assert_close(value.detach().cpu(), expected, rtol=2e-6, atol=1e-6)
    if kind == "iou":
        assert ((value >= 0) & (value <= 1)).all() and not value[:5].any()
    upstream = torch.randn(60, device=DEVICE, dtype=value.dtype)
    y = x.detach().clone().requires_grad_()
    loss = LOSSES[kind](y, target.to(DEVICE), reduction="none")
    gradients = torch.autograd.grad(value, x, upstream) + torch.autograd.grad(loss, y, -upstream)
    torch.testing.assert_close(*gradients)


def test_iou_is_a_quality(backend):
    """In [0, 1] for any pair of boxes, so that losses take it as it is."""
    pred, target = torch.rand(2, 4000, 4, device=DEVICE).sort(-1).values
    target[:2000] = pred[:2000] + torch.randn(2000, 4, device=DEVICE) * 1e-4
    target = target.sort(-1).values
    labels = torch.zeros(4000, dtype=torch.long, device=DEVICE)
    assert (tl.iou_loss(pred, target, reduction="none") == 1).any()  # boxes apart
    loss = tl.quality_focal_loss(
        torch.zeros(4000, 1, device=DEVICE), (labels, tl.iou(pred, target))
    )
    assert loss.isfinite()


def test_published_values(backend):
    a, b, c, d = torch.tensor(
        [[-1, -1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 2], [1, 1, 2, 2]],
        dtype=torch.float32,
        device=DEVICE,
    )
    giou = tl.giou_loss(torch.stack([a, a, b, b]), torch.stack([a, b, c, d]), reduction="none")
    assert giou.tolist() == [0.0, 0.75, 1.0, 1.5]
    target = torch.stack([a, b, c, d])
    ciou = tl.ciou_loss(a.expand(4, 4), target, reduction="none", alpha_threshold=-1)
    torch.testing.assert_close(ciou.cpu(), torch.tensor([0.0, 0.8125, 1.19230769, 1.25]))


@each_loss
def test_equal_boxes_have_no_loss(loss, backend):
    corner = torch.rand(50, 2, device=DEVICE)
    boxes = torch.cat([corner, corner + torch.rand(50, 2, device=DEVICE) + 0.01], -1)
    for scale in (1.0, 100.0, 1e9 / 4):
        pred = (boxes * scale).requires_grad_()
        value = loss(pred, pred.detach().clone(), reduction="none")
        assert not value.any()
        (gradient,) = torch.autograd.grad(value.sum(), pred)
        # Ties share the gradient of min and max: it pulls no side more than its opposite.
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient[:, :2], -gradient[:, 2:], rtol=1e-5, atol=1e-12)


def test_empty_boxes_have_no_iou(backend):
    point = torch.tensor([[1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    for loss in LOSSES.values():
        assert loss(point, point.clone()) == 1
    inverted = torch.tensor([[2.0, 2.0, 1.0, 1.0]], device=DEVICE)
    assert tl.iou_loss(inverted, point) == 1


@each_loss
def test_any_box_is_finite_and_agrees_with_float64(loss, backend):
    values = [-1e9, -1.0, 0.0, 1e-6, 2.0, 1e9]
    boxes = torch.tensor(list(itertools.product(values, repeat=4)), device=DEVICE)
    order = torch.randperm(len(boxes), generator=torch.Generator().manual_seed(5))
    upright = (boxes[:, 2:] >= boxes[:, :2]).all(-1)
    pairs = upright[order]  # any prediction, targets that are boxes
    boxes, target, upright = boxes[pairs], boxes[order][pairs], upright[pairs]
    results = []
    for dtype in (torch.float32, torch.float64):
        pred = boxes.to(dtype, copy=True).requires_grad_()
        value = loss(pred, target, reduction="none")
        (gradient,) = torch.autograd.grad(value.sum(), pred)
        assert value.isfinite().all() and gradient.isfinite().all()
        results.append((value.detach().double(), gradient.double()))
    (value, gradient), (value_64, gradient_64) = results
    if loss is tl.ciou_loss:
        return  # halves of 1e9 have an IoU of 0.5, the threshold, give or take a rounding
    # an inverted box 1e9 wide has a centre that float32 does not hold
    torch.testing.assert_close(value[upright], value_64[upright], rtol=1e-5, atol=1e-6)
    # per box: the gradients of small boxes are a million times those of large ones
    size = gradient_64.abs().amax(-1, keepdim=True)
    difference = (gradient - gradient_64).abs()
    assert (difference <= 1e-5 * size + 1e-9)[upright].all()


@each_loss
def test_ties_are_those_of_torch(loss, backend):
    grid = torch.tensor(list(itertools.product([0.0, 1.0, 2.0], repeat=4)), device=DEVICE)
    boxes = grid[(grid[:, 0] <= grid[:, 2]) & (grid[:, 1] <= grid[:, 3])]
    pred, target = boxes.repeat(len(boxes), 1), boxes.repeat_interleave(len(boxes), 0)
    gradients = []
    for dtype in (torch.float32, torch.float64):  # float64 runs in plain torch
        x = pred.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x, target, reduction="sum"), x)
        gradients.append(gradient.double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@each_loss
def test_order_and_translation_do_not_matter(loss, backend):
    pred, target = torch.rand(2, 40, 4, device=DEVICE).sort(-1).values
    value = loss(pred, target, reduction="none")
    order = torch.randperm(40)
    # eager: the CPU's vector and scalar code differ in the last bit
    tolerance = 0 if backend == "triton" else 1e-6
    torch.testing.assert_close(
        loss(pred[order], target[order], reduction="none"),
        value[order],
        rtol=tolerance,
        atol=tolerance,
    )
    moved = loss(pred + 1, target + 1, reduction="none")
    torch.testing.assert_close(moved, value, rtol=1e-4, atol=1e-4)


@each_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_only_a_box_that_counts_poisons(value, loss, backend):
    pred = torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 3, device=DEVICE)
    target = pred + 1
    pred[:2, 2] = value
    target[0] = value
    pred.requires_grad_()
    weight = torch.tensor([0.0, 1.0, 2.0], device=DEVICE)
    result = loss(pred, target, weight=weight, reduction="none")
    assert result[0] == 0 and result[1].isnan() and result[2].isfinite()
    (gradient,) = torch.autograd.grad(result[0] + result[2], pred)
    assert not gradient[0].any() and gradient[2].isfinite().all()


def test_traced(backend):
    pred, target = torch.rand(2, 15, 4, device=DEVICE).sort(-1).values.unbind(0)
    pred, target = pred.clone(), target.clone()
    target[0] = pred[0]  # equal, as tall as the other is wide, flat, a point, turned around
    pred[1:5] = torch.tensor([[0, 0, 1, 9], [0, 0, 1, 0], [1, 1, 1, 1], [2, 2, 1, 1.0]])
    target[1:5] = torch.tensor([[0, 0, 9, 1], [0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 2, 3.0]])
    target[5], pred[6, 2:] = torch.tensor([0, 0, 0, 1.0]), pred[6, :2]
    pred.requires_grad_()

    def call(pred):
        return sum(loss(pred, target) for loss in LOSSES.values())

    values = [call(pred), torch.compile(call, backend="aot_eager", fullgraph=True)(pred)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, pred)[0] for v in values))


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])  # CIoU's alpha is not differentiated
def test_derivatives_of_any_order(kind):
    pred = torch.tensor([[0, 0, 3, 2], [1, 1, 4, 7.5], [0, 0, 1, 1]], dtype=torch.float64)
    target = torch.tensor([[0.5, -1, 2, 3], [0.9, 1.2, 4.1, 7], [5, 6, 7, 9]], dtype=torch.float64)
    call = partial(LOSSES[kind], target=target, reduction="none")
    pred.requires_grad_()
    assert torch.autograd.gradcheck(call, pred, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, pred)


@each_loss
def test_vmap_of_grad(loss):
    pred, target = torch.rand(2, 3, 5, 4).sort(-1).values
    per_image = torch.func.vmap(torch.func.grad(loss))(pred, target)
    for image in range(3):
        expected = torch.func.grad(loss)(pred[image], target[image])
        torch.testing.assert_close(per_image[image], expected)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"pred": torch.zeros(2, 5)}, ValueError, r"pred must have shape \(\.\.\., 4\)"),
        ({"target": torch.zeros(3, 4)}, ValueError, r"target must have shape \(2, 4\)"),
        ({"target": torch.zeros(2, 4).int()}, TypeError, "target must be float16"),
        ({"target": torch.zeros(2, 4, requires_grad=True)}, ValueError, "target requires grad"),
        ({"eps": 0}, ValueError, "eps must be finite and > 0"),
        ({"weight": torch.rand(2, 3)}, ValueError, r"weight must have shape \(2,\)"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    arguments = {"pred": torch.zeros(2, 4), "target": torch.zeros(2, 4)} | change
    with pytest.raises(error, match=match):
        tl.ciou_loss(**arguments)
    if set(change) & {"weight", "reduction"}:
        return
    with pytest.raises(error, match=match):
        tl.iou(**arguments)


def test_kinds_of_iou_are_named():
    with pytest.raises(ValueError, match=r"kind must be one of iou, giou, .*; got 'GIoU'"):
        tl.iou(torch.zeros(2, 4), torch.zeros(2, 4), kind="GIoU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@each_loss
def test_blocks_have_the_gradient_of_the_formula(loss, weighted, dtype, monkeypatch):
    """The CPU path, whose gradient is written out, against the formula that autograd takes."""
    pred, target = (torch.rand(2, 3, 40, 50, 4).sort(-1).values * 8).to(dtype)
    pred = pred[..., torch.randperm(4)]  # inverted ones, too
    pred[0], target[1, :9] = target[0] + torch.randn(40, 50, 4) * 0.05, 3.0
    pred[2, :5] = 2.0
    pred[2, 5:9] = target[2, 5:9]
    weight = torch.rand(3, 40, 50) - 0.3 if weighted else None
    heads = pred.movedim(-1, 1).contiguous()
    for reduction in ("none", "sum", "mean"):
        results = []
        for usable in (False, True):
            monkeypatch.setattr(_blocks, "usable", lambda *x, usable=usable: usable)
            monkeypatch.setattr(_blocks, "BLOCK", 1000)
            x = heads.clone().requires_grad_()
            with tl.backend("eager"):
                value = loss(x.movedim(1, -1), target, weight=weight, reduction=reduction)
            upstream = torch.linspace(0.5, 2, value.numel(), dtype=dtype).view(value.shape)
            results.append((value, *torch.autograd.grad(value, x, upstream)))
        tolerance = 2e-4 if dtype == torch.float32 else 1e-9
        for formula, blocks in zip(*results, strict=True):
            torch.testing.assert_close(blocks, formula, rtol=tolerance, atol=tolerance / 10)
        assert results[1][1].is_contiguous()
