"""IoU-HLR, ISR-P and CARL against loops written from the paper."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import tritonloss as tl


def make(n=60, n_gt=8, n_classes=3, seed=0, ties=False):
    """``(iou, gt_index, labels)`` with background rows; one class per object."""
    generator = torch.Generator().manual_seed(seed)
    iou = torch.rand(n, generator=generator)
    if ties:
        iou = (iou * 4).round() / 4
    gt = torch.randint(-2, n_gt, (n,), generator=generator).clamp(min=-1)
    classes = torch.randint(0, n_classes, (n_gt,), generator=generator)
    return iou, gt, torch.where(gt >= 0, classes[gt.clamp(min=0)], n_classes)


def rank_loop(iou, gt, labels):
    """The two levels of the paper, by counting."""
    n = len(iou)
    place, rank = [0] * n, [-1] * n
    for i in range(n):
        place[i] = sum(bool(gt[j] == gt[i] and iou[j] > iou[i]) for j in range(n))
    for i in range(n):
        if gt[i] >= 0:
            rank[i] = sum(
                gt[j] >= 0
                and bool(labels[j] == labels[i])
                and (place[j], -iou[j].item()) < (place[i], -iou[i].item())
                for j in range(n)
            )
    return torch.tensor(rank, dtype=torch.int64)


def weight_loop(cls_loss, iou, gt, labels, k, bias, normalizer, weight):
    """Published order: importance, power, then the summed loss is put back."""
    rank, new = rank_loop(iou, gt, labels), weight.clone()
    positive = [i for i in range(len(gt)) if gt[i] >= 0]
    size = {c: sum(bool(labels[i] == c) for i in positive) for c in set(labels.tolist())}
    for i in positive:
        n = max(size.values()) if normalizer == "max" else size[int(labels[i])]
        new[i] = (bias + (1 - bias) * (n - int(rank[i])) / n) ** k
    old_sum = sum(weight[i] * cls_loss[i] for i in positive)
    new_sum = sum(new[i] * cls_loss[i] for i in positive)
    for i in positive:
        new[i] *= old_sum / new_sum
    return new


def carl_loop(logits, labels, box_loss, k, bias, activation):
    scores = logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)
    rows = [i for i in range(len(labels)) if 0 <= labels[i] < logits.shape[-1]]
    v = [((1 - bias) * scores[i, labels[i]] + bias) ** k for i in rows]
    mean = sum(v) / len(v)
    return sum(vi / mean * box_loss[i].sum() for vi, i in zip(v, rows, strict=True)) / len(v)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rank_is_the_loop(seed, ties):
    iou, gt, labels = make(seed=seed, ties=ties)
    rank = tl.iou_hlr(iou, gt, labels)
    assert rank.dtype == torch.int64
    assert torch.equal(rank, rank_loop(iou, gt, labels))
    order = torch.randperm(len(iou))
    assert torch.equal(tl.iou_hlr(iou[order], gt[order], labels[order]), rank[order])


def test_rank_of_positives_alone_is_that_of_the_full_list():
    iou, gt, labels = make()
    positive = gt >= 0
    alone = tl.iou_hlr(iou[positive], gt[positive], labels[positive])
    assert torch.equal(alone, tl.iou_hlr(iou, gt, labels)[positive])


def test_tied_boxes_share_the_better_rank():
    zeros = torch.zeros(3, dtype=torch.int64)
    rank = tl.iou_hlr(torch.tensor([0.5, 0.5, 0.1]), torch.arange(3), zeros)
    assert rank.tolist() == [0, 0, 2]
    assert tl.iou_hlr(torch.zeros(3), zeros, zeros).tolist() == [0, 0, 0]


def test_background_rows_are_not_read():
    iou, gt, labels = make()
    rank = tl.iou_hlr(iou, gt, labels)
    background = gt < 0
    iou[background] = math.nan
    labels[background] = -(2**40)
    assert torch.equal(tl.iou_hlr(iou, gt, labels), rank)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("normalizer", ["max", "class"])
@pytest.mark.parametrize(("k", "bias"), [(2.0, 0.0), (0.5, 0.2), (1.0, 1.0)])
def test_isr_weights_are_the_loop(k, bias, normalizer, ties):
    iou, gt, labels = make(ties=ties)
    cls_loss, weight = torch.rand(60).double(), torch.rand(60).double() + 0.1
    options = dict(k=k, bias=bias, normalizer=normalizer)
    inputs = [t.clone() for t in (cls_loss, iou, gt, labels, weight)]
    got = tl.isr_p_weight(cls_loss, iou, gt, labels, weight=weight, **options)
    want = weight_loop(cls_loss, iou, gt, labels, weight=weight, **options)
    assert torch.allclose(got, want, rtol=1e-9)
    for before, after in zip(inputs, (cls_loss, iou, gt, labels, weight), strict=True):
        assert torch.equal(before, after)
    positive = gt >= 0
    total = (got * cls_loss)[positive].sum()
    assert torch.allclose(total, (weight * cls_loss)[positive].sum())


def test_isr_weights_of_rows_and_classes():
    iou, gt, labels = make()
    cls_loss = torch.rand(60, 3)
    by_row = tl.isr_p_weight(cls_loss.sum(-1), iou, gt, labels)
    assert torch.allclose(tl.isr_p_weight(cls_loss, iou, gt, labels), by_row)
    assert torch.all(by_row[gt < 0] == 1)
    positive = gt >= 0
    alone = [t[positive] for t in (cls_loss, iou, gt, labels)]
    assert torch.allclose(tl.isr_p_weight(*alone), by_row[positive])


def test_isr_rows_of_weight_zero_are_not_there():
    iou, gt, labels = make()
    weight = torch.ones(60)
    weight[::5] = 0
    cls_loss = torch.rand(60)
    got = tl.isr_p_weight(cls_loss, iou, gt, labels, weight=weight)
    without = torch.where(weight > 0, gt, -1)
    want = tl.isr_p_weight(cls_loss, iou, without, labels, weight=weight)
    assert torch.equal(got, want)
    assert torch.all(got[::5] == 0)


def test_isr_without_loss_or_positives_keeps_the_weights():
    iou, gt, labels = make()
    assert torch.all(tl.isr_p_weight(torch.zeros(60), iou, gt, labels) == 1)
    nowhere = torch.full_like(gt, -1)
    assert torch.all(tl.isr_p_weight(torch.rand(60), iou, nowhere, labels) == 1)
    empty = [t[:0] for t in (torch.rand(60), iou, gt, labels)]
    assert tl.isr_p_weight(*empty).shape == (0,)
    assert tl.iou_hlr(*empty[1:]).shape == (0,)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("k", "bias"), [(1.0, 0.2), (2.0, 0.0), (0.5, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("coordinates", [False, True])
def test_carl_is_the_loop(coordinates, k, bias, activation):
    torch.manual_seed(1)
    logits = (torch.randn(20, 4).double() * 3).requires_grad_()
    labels = torch.randint(-1, 5, (20,))
    box_loss = torch.rand(20, 4) if coordinates else torch.rand(20)
    box_loss = box_loss.double().requires_grad_()
    options = dict(k=k, bias=bias, activation=activation)
    got = tl.carl_loss(logits, labels, box_loss, **options)
    want = carl_loop(logits, labels, box_loss, **options)
    assert torch.allclose(got, want, rtol=1e-10)
    got_grads = torch.autograd.grad(got, (logits, box_loss))
    want_grads = torch.autograd.grad(want, (logits, box_loss), materialize_grads=True)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_carl_gradcheck(activation):
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    box_loss = torch.rand(6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 2, -1, 1, 0])

    def function(logits, box_loss):
        return tl.carl_loss(logits, labels, box_loss, k=2, activation=activation)

    assert torch.autograd.gradcheck(function, (logits, box_loss))
    assert torch.autograd.gradgradcheck(function, (logits, box_loss))


def test_carl_divisor_and_kept_loss():
    logits, box_loss = torch.randn(9, 3), torch.rand(9)
    labels = torch.tensor([0, 1, 2, 3, -1, 0, 1, 2, 3])
    positive = (labels >= 0) & (labels < 3)
    mean = tl.carl_loss(logits, labels, box_loss)
    assert torch.allclose(tl.carl_loss(logits, labels, box_loss, avg_factor=2), mean * 6 / 2)
    assert torch.allclose(tl.carl_loss(logits, labels, box_loss, avg_factor=0), mean * 6)
    kept = tl.carl_loss(logits.requires_grad_(), labels, box_loss, keep_loss=True)
    assert torch.allclose(kept, box_loss[positive].mean())
    assert torch.autograd.grad(kept, logits)[0].abs().sum() > 0


def test_carl_rows_without_object_reach_nothing():
    logits, box_loss = torch.randn(9, 3), torch.rand(9)
    labels = torch.tensor([0, 1, 2, 3, -1, 0, 1, 2, 3])
    want = tl.carl_loss(logits, labels, box_loss)
    other = (labels < 0) | (labels > 2)
    logits[other], box_loss[other] = math.nan, math.inf
    for activation in ("sigmoid", "softmax"):
        x, b = logits.clone().requires_grad_(), box_loss.clone().requires_grad_()
        loss = tl.carl_loss(x, labels, b, activation=activation)
        loss.backward()
        assert torch.all(x.grad[other] == 0) and torch.all(b.grad[other] == 0)
        assert x.grad.isfinite().all()
    assert torch.allclose(tl.carl_loss(logits, labels, box_loss), want)


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("bias", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("x", [-1e30, -200.0, 200.0, 1e30])
def test_carl_is_finite_for_every_logit(x, bias, k):
    logits = torch.full((4, 2), x, requires_grad=True)
    loss = tl.carl_loss(logits, torch.tensor([0, 1, 0, 2]), torch.ones(4), k=k, bias=bias)
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert logits.grad.isfinite().all()


def test_carl_without_positives_is_an_attached_zero():
    logits, box_loss = torch.randn(3, 2, requires_grad=True), torch.rand(3, requires_grad=True)
    for n in (3, 0):
        loss = tl.carl_loss(logits[:n], torch.full((n,), 2), box_loss[:n])
        loss.backward()
        assert loss == 0 and torch.all(logits.grad == 0) and torch.all(box_loss.grad == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_carl_16_bit_logits(dtype):
    logits, labels, box_loss = torch.randn(8, 3).to(dtype), torch.arange(8) % 4, torch.rand(8)
    loss = tl.carl_loss(logits, labels, box_loss)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, tl.carl_loss(logits.float(), labels, box_loss))


def test_compile_fullgraph():
    torch._dynamo.reset()
    iou, gt, labels = make()
    logits, box_loss = torch.randn(60, 3), torch.rand(60, 4)
    cls_loss = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")

    def both(logits, box_loss, cls_loss, k):
        weight = tl.isr_p_weight(cls_loss, iou, gt, labels, k=k)
        return weight, tl.carl_loss(logits, labels, box_loss)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    k = torch.tensor(2.0)
    for got, want in zip(
        compiled(logits, box_loss, cls_loss, k), both(logits, box_loss, cls_loss, 2.0), strict=True
    ):
        assert torch.allclose(got, want)


def test_errors_name_the_argument():
    iou, gt, labels = make()
    loss, logits = torch.rand(60), torch.randn(60, 3)
    with pytest.raises(ValueError, match="gt_index must have shape"):
        tl.iou_hlr(iou, gt[:5], labels)
    with pytest.raises(TypeError, match="labels must be an integer"):
        tl.iou_hlr(iou, gt, labels.float())
    with pytest.raises(ValueError, match="normalizer must be one of max, class; got 'mean'"):
        tl.isr_p_weight(loss, iou, gt, labels, normalizer="mean")
    with pytest.raises(ValueError, match="bias must be"):
        tl.isr_p_weight(loss, iou, gt, labels, bias=2)
    with pytest.raises(ValueError, match="cls_loss must have shape"):
        tl.isr_p_weight(loss[:5], iou, gt, labels)
    with pytest.raises(ValueError, match="box_loss must have shape"):
        tl.carl_loss(logits, labels, loss[:5])
    with pytest.raises(ValueError, match="activation must be one of sigmoid, softmax"):
        tl.carl_loss(logits, labels, loss, activation="relu")
    with pytest.raises(ValueError, match="labels must lie in"):
        tl.carl_loss(logits, labels + 9, loss)
