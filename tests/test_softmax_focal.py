"""Softmax focal loss, general form of GFL, class-balanced weights: known answers, identities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

import tritonloss as tl
from tritonloss._dispatch import INTERPRET
from tritonloss.eager import _blocks


def written_out(row, label, alpha=1.0, gamma=2.0):
    """The formula for one row, in plain Python."""
    top = max(row)
    e = [math.exp(v - top) for v in row]
    p = e[label] / sum(e)
    not_p = sum(v for k, v in enumerate(e) if k != label) / sum(e)
    return -alpha * not_p**gamma * math.log(p)


def test_written_out(backend):
    g = torch.Generator().manual_seed(0)
    x, alpha = torch.randn(9, 7, generator=g) * 3, torch.rand(7, generator=g)
    labels = torch.randint(7, (9,), generator=g)
    loss = tl.softmax_focal_loss(
        x.to(DEVICE), labels.to(DEVICE), alpha=alpha.to(DEVICE), gamma=1.5, reduction="none"
    )
    rows = zip(x.double().tolist(), labels.tolist(), strict=True)
    expected = [written_out(row, y, alpha[y].item(), 1.5) for row, y in rows]
    torch.testing.assert_close(loss.cpu(), torch.tensor(expected), rtol=1e-6, atol=1e-12)


def test_gamma_zero_is_cross_entropy(backend):
    x = torch.randn(33, 12, device=DEVICE, requires_grad=True)
    labels = torch.randint(12, (33,), device=DEVICE)
    labels[::5] = -1
    loss = tl.softmax_focal_loss(x, labels, gamma=0)
    expected = F.cross_entropy(x, labels, ignore_index=-1)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(v, x)[0] for v in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_one_class_has_no_loss(backend):
    x = torch.tensor([[3.0], [-1e30]], device=DEVICE, requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        loss = tl.softmax_focal_loss(x, torch.tensor([0, 0], device=DEVICE), gamma=gamma)
        assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_extreme_logits_are_finite(gamma, backend):
    values = torch.tensor([-1e30, -65504.0, -100.0, 0.0, 100.0, 65504.0, 1e30], device=DEVICE)
    x = torch.cartesian_prod(values, values, values).requires_grad_()
    labels = torch.arange(len(x), device=DEVICE) % 3
    loss = tl.softmax_focal_loss(x, labels, gamma=gamma, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isfinite().all() and gradient.isfinite().all() and (loss >= 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_only_a_logit_that_counts_poisons(value, backend):
    x = torch.zeros(3, 40, device=DEVICE)
    x[0, 3] = x[1, 3] = value
    x.requires_grad_()
    labels = torch.tensor([-1, 0, 1], device=DEVICE)
    loss = tl.softmax_focal_loss(x, labels, reduction="none")
    assert loss[0] == 0 and loss[1].isnan() and loss[2].isfinite()
    (gradient,) = torch.autograd.grad(loss[0] + loss[2], x)
    assert not gradient[0].any() and gradient[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [6, 30_000])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_masked_classes_are_as_if_they_were_not_there(reduction, rows, dtype, backend):
    if rows > 6 and backend == "triton":
        rows = 300
    kept = torch.tensor([0, 3, 4], device=DEVICE)
    x = torch.randn(rows, 3, device=DEVICE).to(dtype).requires_grad_()
    labels = torch.randint(3, (rows,), device=DEVICE)
    wide = torch.full((rows, 6), -torch.inf, dtype=dtype, device=DEVICE)
    wide[:, kept] = x.detach()
    wide.requires_grad_()
    expected = tl.softmax_focal_loss(x, labels, reduction=reduction)
    loss = tl.softmax_focal_loss(wide, kept[labels], reduction=reduction)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), wide)
    torch.testing.assert_close(gradient[:, kept], torch.autograd.grad(expected.sum(), x)[0])
    assert not gradient[:, [1, 2, 5]].any()
    # with nothing beside the label left, it is certain; a masked label itself is an error
    alone = torch.full_like(wide, -torch.inf, requires_grad=False)
    alone[:, 2] = 1.0
    alone.requires_grad_()
    labels = torch.full_like(labels, 2)
    loss = tl.softmax_focal_loss(alone, labels, reduction=reduction).sum()
    assert loss < 1e-30 and (torch.autograd.grad(loss, alone)[0].abs() <= 1e-30).all()
    loss = tl.softmax_focal_loss(alone, labels + 1, reduction=reduction).sum()
    assert loss.isnan() and torch.autograd.grad(loss, alone)[0].isnan().any()


def test_unchecked_labels_count_as_ignored(backend, monkeypatch):
    monkeypatch.setattr("tritonloss._checks.values_checked", lambda x: False)
    x = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    labels = torch.tensor([0, 4, 2, -7, 1000], device=DEVICE)
    loss = tl.softmax_focal_loss(x, labels)
    torch.testing.assert_close(loss, tl.softmax_focal_loss(x[[0, 2]], labels[[0, 2]]))
    assert not torch.autograd.grad(loss, x)[0][[1, 3, 4]].any()


def test_traced(backend):
    weight = torch.rand(6, device=DEVICE)
    labels = torch.randint(5, (6,), device=DEVICE)
    x = torch.randn(6, 5, device=DEVICE, requires_grad=True)

    def call(x):
        return tl.softmax_focal_loss(x, labels, weight=weight)

    values = [call(x), torch.compile(call, backend="aot_eager", fullgraph=True)(x)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in values))


def test_derivatives_of_any_order():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, -1, 2])

    def call(x):
        return tl.softmax_focal_loss(x, labels, gamma=1.3, reduction="none")

    assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, x)


@pytest.fixture
def in_blocks(monkeypatch):
    """Small inputs take the path by blocks, several of them."""
    if INTERPRET:
        pytest.skip("says the same in the plain run")
    monkeypatch.setattr(_blocks, "BLOCK", 64)


@pytest.mark.parametrize("layout", ["contiguous", "nchw"])
@pytest.mark.parametrize("scale", [1, 30, 1e4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_blocks_give_what_the_formula_gives(gamma, scale, layout, in_blocks):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 11, 13, generator=g) * scale
    x = x.transpose(1, 2) if layout == "nchw" else x
    labels = torch.randint(-1, x.shape[-1], x.shape[:-1], generator=g)
    kwargs = {"gamma": gamma, "alpha": torch.rand(x.shape[-1]), "weight": torch.rand(6, 1) - 0.3}
    kwargs["weight"] = kwargs["weight"].expand(labels.shape)
    x32 = x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    loss = tl.softmax_focal_loss(x32, labels, **kwargs)
    formula = tl.softmax_focal_loss(x64, labels, reduction="none", **kwargs).sum()
    count = ((labels >= 0) & (kwargs["weight"] > 0)).sum()
    torch.testing.assert_close(loss.double(), formula / count, rtol=1e-5, atol=1e-12)
    (got,) = torch.autograd.grad(loss, x32, create_graph=True)
    (want,) = torch.autograd.grad(formula / count, x64, create_graph=True)
    (written,) = torch.autograd.grad(tl.softmax_focal_loss(x32, labels, **kwargs), x32)
    size = want.abs().max()
    for gradient in (got, written):
        torch.testing.assert_close(gradient.double() / size, want / size, rtol=1e-4, atol=1e-6)
    assert written.stride() == x32.stride()
    (got,) = torch.autograd.grad(got.square().sum(), x32)
    (want,) = torch.autograd.grad(want.square().sum(), x64)
    size = want.abs().max().clamp(min=1e-30)
    torch.testing.assert_close(got.double() / size, want / size, rtol=1e-3, atol=1e-5)


def test_blocks_know_what_counts(in_blocks):
    x, labels = torch.randn(40, 5), torch.full((40,), -1)
    x[3] = float("nan")
    x.requires_grad_()
    loss = tl.softmax_focal_loss(x, labels)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss == 0 and not gradient.any()
    labels[3] = 2
    assert tl.softmax_focal_loss(x, labels).isnan()


def test_vmap_of_grad():
    x, labels = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    per_image = torch.func.vmap(torch.func.grad(tl.softmax_focal_loss))(x, labels)
    for image in range(3):
        expected = torch.func.grad(tl.softmax_focal_loss)(x[image], labels[image])
        torch.testing.assert_close(per_image[image], expected)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"labels": torch.tensor([0, 4])}, ValueError, r"labels must lie in 0\.\.3"),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "labels must be an integer tensor"),
        ({"alpha": 0.25}, TypeError, "alpha must be a tensor"),
        ({"alpha": torch.rand(3)}, ValueError, r"alpha must have shape \(4,\)"),
        ({"gamma": -1}, ValueError, "gamma must be finite and >= 0"),
        ({"weight": torch.rand(2, 4)}, ValueError, r"weight must have shape \(2,\)"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int"),
        ({"reduction": "sum", "avg_factor": 2}, ValueError, "avg_factor divides a 'mean'"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    arguments = {"logits": torch.randn(2, 4), "labels": torch.tensor([0, 3])} | change
    with pytest.raises(error, match=match):
        tl.softmax_focal_loss(**arguments)


# The general form: the three losses are its cases.


def test_focal_and_quality_focal_are_cases_of_the_general_form():
    x, y = torch.randn(40) * 4, torch.rand(40)
    zero = torch.zeros(40)
    for beta in (0.0, 0.5, 1.0, 2.0, 2.5):
        general = tl.generalized_focal_loss(zero, x, y, 0, 1, beta=beta)
        torch.testing.assert_close(general, tl.quality_focal_loss(x, y, beta=beta))
        hard = y.round()
        general = tl.generalized_focal_loss(zero, x, hard, 0, 1, beta=beta)
        focal = tl.sigmoid_focal_loss(x, hard, alpha=None, gamma=beta)
        torch.testing.assert_close(general, focal)


@pytest.mark.parametrize("bins", [2, 17])
def test_distribution_focal_is_a_case_of_the_general_form(bins):
    y = torch.rand(40) * (bins - 1)
    left = y.floor()
    pair = torch.randn(40, 2)
    logits = torch.full((40, bins), -200.0)  # all other bins have no mass
    logits.scatter_(1, torch.stack([left, left + 1], 1).long(), pair)
    general = tl.generalized_focal_loss(*pair.unbind(1), y, left, left + 1, beta=0)
    torch.testing.assert_close(general, tl.distribution_focal_loss(logits, y))


def test_general_form_has_gradients_in_both_logits():
    left, right = torch.randn(2, 5, dtype=torch.float64).unbind(0)
    y = torch.rand(5, dtype=torch.float64)

    def call(left, right):
        return tl.generalized_focal_loss(left, right, y, -0.5, 2.0, beta=1.5, reduction="none")

    assert torch.autograd.gradcheck(call, (left.requires_grad_(), right.requires_grad_()))
    with pytest.raises(ValueError, match="y must lie between"):
        tl.generalized_focal_loss(left, right, y + 3, -0.5, 2.0, beta=1.5)


# Class-balanced weights.


def test_published_class_balanced_losses():
    logits = torch.tensor([[0.78, 0.1, 0.05], [0.78, 0.83, 0.05]])
    labels, samples = torch.tensor([0, 2]), torch.tensor([30, 100, 25])
    weight = tl.class_balanced_weight(samples, beta=0.999)[labels]
    focal = {"alpha": None, "avg_factor": 2}
    assert tl.sigmoid_focal_loss(logits, labels, **focal).item() == pytest.approx(0.85, abs=0.01)
    loss = tl.sigmoid_focal_loss(logits, labels, weight=weight, **focal)
    assert loss.item() == pytest.approx(1.17, abs=0.01)
    loss = tl.softmax_focal_loss(logits, labels, gamma=0, weight=weight)
    assert loss.item() == pytest.approx(1.59, abs=0.011)
    loss = tl.sigmoid_focal_loss(logits, labels, alpha=None, gamma=0, weight=weight)
    assert loss.item() == pytest.approx(1.08, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_class_balanced_weights(dtype):
    n = torch.tensor([1, 10, 0, 1_000_000], dtype=dtype)
    weight = tl.class_balanced_weight(n, beta=0.99, normalize=False)
    expected = [1.0, 0.01 / (1 - 0.99**10), 0.0, 0.01]
    torch.testing.assert_close(weight, torch.tensor(expected))
    assert tl.class_balanced_weight(n).sum().item() == pytest.approx(4)
    # beta -> 1 is one over the number of samples, without cancellation
    weight = tl.class_balanced_weight(n, beta=1 - 1e-13, normalize=False)
    torch.testing.assert_close(weight, torch.tensor([1.0, 0.1, 0.0, 1e-6]))
    assert tl.class_balanced_weight(n, beta=0, normalize=False).tolist() == [1, 1, 0, 1]
    assert not tl.class_balanced_weight(n * 0).any()


def test_class_balanced_weight_errors():
    with pytest.raises(ValueError, match="beta must be finite and >= 0 and < 1"):
        tl.class_balanced_weight(torch.ones(3), beta=1)
    with pytest.raises(ValueError, match="samples_per_class must be >= 0"):
        tl.class_balanced_weight(torch.tensor([1, -1]))
    with pytest.raises(ValueError, match=r"samples_per_class must have shape \(C,\)"):
        tl.class_balanced_weight(torch.ones(3, 1))
