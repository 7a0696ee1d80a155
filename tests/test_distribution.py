"""Distribution focal loss and expectation: formula, known answers, edges."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

import tritonloss as tl
from tritonloss.eager import _blocks


def written_out(row, y):
    """The formula for one row, in plain Python."""
    top = max(row)
    log_total = top + math.log(sum(math.exp(v - top) for v in row))
    left = min(math.floor(y), len(row) - 2)
    return -(left + 1 - y) * (row[left] - log_total) - (y - left) * (row[left + 1] - log_total)


@pytest.mark.parametrize("bins", [2, 16, 17])
def test_written_out(bins, backend):
    g = torch.Generator().manual_seed(bins)
    x, y = torch.randn(12, bins, generator=g) * 3, torch.rand(12, generator=g) * (bins - 1)
    loss = tl.distribution_focal_loss(x.to(DEVICE), y.to(DEVICE), reduction="none")
    rows = zip(x.double().tolist(), y.tolist(), strict=True)
    expected = torch.tensor([written_out(row, v) for row, v in rows])
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_whole_targets_are_cross_entropy(backend):
    x = torch.randn(17, 17, device=DEVICE, requires_grad=True)
    y = torch.arange(17, device=DEVICE)  # 16, the last bin, included
    loss, expected = tl.distribution_focal_loss(x, y.float()), F.cross_entropy(x, y)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(v, x)[0] for v in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_targets_outside_are_an_error_or_clamped(backend, monkeypatch):
    x = torch.randn(3, 8, device=DEVICE)
    y = torch.tensor([-1.0, 7.5, float("inf")], device=DEVICE)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"target must lie in \[0, 7\]"):
            tl.distribution_focal_loss(x, y)
    monkeypatch.setattr("tritonloss._checks.values_checked", lambda x: False)
    torch.testing.assert_close(
        tl.distribution_focal_loss(x, y), tl.distribution_focal_loss(x, y.clamp(0, 7))
    )
    y[0] = float("nan")
    loss = tl.distribution_focal_loss(x, y, reduction="none")
    assert loss[0].isnan() and loss[1:].isfinite().all()


def test_extreme_logits_are_finite(backend):
    values = torch.tensor([-1e30, -65504.0, 0.0, 65504.0, 1e30], device=DEVICE)
    x = torch.cartesian_prod(values, values, values).requires_grad_()
    y = torch.linspace(0, 2, len(x), device=DEVICE)
    loss = tl.distribution_focal_loss(x, y, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isfinite().all() and gradient.isfinite().all() and (loss >= 0).all()
    side = tl.distribution_expectation(x)
    assert side.isfinite().all() and torch.autograd.grad(side.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_only_a_row_that_counts_poisons(value, backend):
    x = torch.zeros(3, 17, device=DEVICE)
    x[:2, 3] = value
    x.requires_grad_()
    y = torch.tensor([value, 1.0, 1.0], device=DEVICE)
    weight = torch.tensor([0.0, 1.0, 2.0], device=DEVICE)
    loss = tl.distribution_focal_loss(x, y, weight=weight, reduction="none")
    assert loss[0] == 0 and loss[1].isnan() and loss[2].isfinite()
    (gradient,) = torch.autograd.grad(loss[0] + loss[2], x)
    assert not gradient[0].any() and gradient[2].isfinite().all()
    side = tl.distribution_expectation(x)
    assert side[:2].isnan().all() and side[2] == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_masked_bins_have_probability_zero(dtype, backend):
    x = torch.randn(40, 6, device=DEVICE).to(dtype).requires_grad_()
    wide = torch.full((40, 9), -torch.inf, dtype=dtype, device=DEVICE)
    wide[:, :6] = x.detach()
    wide.requires_grad_()
    y = torch.cat((torch.tensor([0.0, 5.0]), torch.rand(38) * 5)).to(DEVICE)
    for expected, found in (
        (tl.distribution_focal_loss(x, y), tl.distribution_focal_loss(wide, y)),
        (tl.distribution_expectation(x).mean(), tl.distribution_expectation(wide).mean()),
    ):
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found, wide)
        torch.testing.assert_close(gradient[:, :6], torch.autograd.grad(expected, x)[0])
        assert not gradient[:, 6:].any()
    loss = tl.distribution_focal_loss(wide, y + 3, reduction="none")
    assert (loss.isnan() == (y + 3 > 5)).all()
    (gradient,) = torch.autograd.grad(loss.sum(), wide)
    assert (gradient.isnan().any(-1) == (y + 3 > 5)).all()


@pytest.mark.parametrize("bins", [2, 3, 6, 9, 17, 33])
def test_expectation_of_any_number_of_bins(bins, backend):
    x = torch.randn(70, bins, device=DEVICE, requires_grad=True)
    side = tl.distribution_expectation(x)
    (gradient,) = torch.autograd.grad(side.square().sum(), x)
    p = x.detach().double().softmax(-1)
    k = torch.arange(bins, device=DEVICE)
    mean = (p * k).sum(-1, keepdim=True)
    torch.testing.assert_close(side.double(), mean[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), 2 * mean * p * (k - mean), rtol=1e-5, atol=1e-5)


def test_flat_rows_of_sides(backend):
    x, y = torch.randn(5, 3, 4 * 17, device=DEVICE), torch.rand(5, 3, 4, device=DEVICE) * 16
    weight = torch.rand(5, 3, 4, device=DEVICE) - 0.2
    x.requires_grad_()
    for reduction in ("none", "sum", "mean"):
        options = {"weight": weight, "reduction": reduction}
        found = tl.distribution_focal_loss(x, y, sides=4, **options)
        expected = tl.distribution_focal_loss(x.unflatten(-1, (4, 17)), y, **options)
        assert found.equal(expected)
        slopes = [torch.autograd.grad(v.sum(), x)[0] for v in (found, expected)]
        assert slopes[0].equal(slopes[1])
    head = x.detach().movedim(-1, 1).contiguous()
    found = tl.distribution_focal_loss(
        head, y.movedim(-1, 1), sides=4, class_dim=1, reduction="none"
    )
    expected = tl.distribution_focal_loss(x, y, sides=4, reduction="none")
    assert found.shape == (5, 4, 3)
    torch.testing.assert_close(found.movedim(1, -1), expected, rtol=1e-6, atol=1e-6)
    for sides in (0, 3, True):
        with pytest.raises(ValueError, match="sides"):
            tl.distribution_focal_loss(x, y, sides=sides)


def distilled(row, teacher, temperature):
    """The divergence of one row, in plain Python."""
    p, q = ([math.exp(v / temperature) for v in r] for r in (row, teacher))
    p, q = ([v / sum(r) for v in r] for r in (p, q))
    return temperature**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [0.7, 5.0, torch.tensor(3.0)], ids=str)
def test_distillation_is_written_out(temperature, backend):
    x, teacher = torch.randn(2, 12, 33) * 4
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(DEVICE)
    loss = tl.distribution_distillation_loss(
        x.to(DEVICE), teacher.to(DEVICE), temperature=temperature, reduction="none"
    )
    rows = zip(x.double().tolist(), teacher.double().tolist(), strict=True)
    expected = torch.tensor([distilled(*pair, float(temperature)) for pair in rows])
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_distillation_ends_at_the_teacher(backend):
    teacher = torch.randn(50, 17, device=DEVICE)
    shift = torch.randn(50, 1, device=DEVICE)
    x = (teacher + shift).requires_grad_()  # the same distributions
    loss = tl.distribution_distillation_loss(x, teacher, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.abs().max() < 1e-4 and gradient.abs().max() < 1e-5
    # sharp: T (p - q), whatever the temperature
    x = torch.randn(50, 17, device=DEVICE, requires_grad=True)
    loss = tl.distribution_distillation_loss(x, teacher, temperature=2.0, reduction="sum")
    expected = 2 * ((x / 2).softmax(-1) - (teacher / 2).softmax(-1))
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_distillation_of_extremes(backend):
    values = torch.tensor([-1e30, -65504.0, 0.0, 65504.0, 1e30], device=DEVICE)
    x = torch.cartesian_prod(values, values, values).requires_grad_()
    for teacher in (x.detach().flip(0), x.detach().flip(1)):
        loss = tl.distribution_distillation_loss(x, teacher, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert loss.isfinite().all() and gradient.isfinite().all() and (loss >= 0).all()
    for value in (torch.nan, torch.inf):
        x = torch.zeros(4, 9, device=DEVICE)
        teacher = torch.zeros(4, 9, device=DEVICE)
        x[0, 3] = x[1, 3] = teacher[2, 3] = value
        x.requires_grad_()
        weight = torch.tensor([0.0, 1.0, 1.0, 2.0], device=DEVICE)
        loss = tl.distribution_distillation_loss(x, teacher, weight=weight, reduction="none")
        assert loss[0] == 0 and loss[1:3].isnan().all() and loss[3] == 0
        (gradient,) = torch.autograd.grad(loss[0] + loss[3], x)
        assert not gradient[0].any() and gradient[3].isfinite().all()


def test_distillation_with_masked_bins(backend):
    x, teacher = torch.randn(2, 20, 6, device=DEVICE)
    wide = torch.full((2, 20, 9), -torch.inf, device=DEVICE)
    wide[:, :, :6] = torch.stack([x, teacher])
    x.requires_grad_()
    expected = tl.distribution_distillation_loss(x, teacher)
    (slope,) = torch.autograd.grad(expected, x)
    student = wide[0].clone().requires_grad_()
    found = tl.distribution_distillation_loss(student, wide[1])
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(gradient[:, :6], slope)
    assert not gradient[:, 6:].any()
    # a bin that the student alone excludes
    loss = tl.distribution_distillation_loss(student, torch.zeros_like(wide[1]))
    assert loss.isnan() and torch.autograd.grad(loss, student)[0].isnan().all()
    student = torch.zeros(20, 9, device=DEVICE, requires_grad=True)
    loss = tl.distribution_distillation_loss(student, wide[1])
    assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "nchw", "sliced"])
@pytest.mark.parametrize("sides", [1, 4])
def test_expectation(sides, layout, backend):
    x = torch.randn(2, 6, 5, sides * 17, device=DEVICE)
    if layout == "nchw":
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif layout == "sliced":
        x = x[..., 1 : 1 + sides * 16]
    x = x.requires_grad_()
    side = tl.distribution_expectation(x, sides=sides)
    p = x.double().unflatten(-1, (sides, -1)).softmax(-1)
    expected = (p * torch.arange(p.shape[-1], device=DEVICE)).sum(-1)
    expected = expected.squeeze(-1) if sides == 1 else expected
    torch.testing.assert_close(side.double(), expected, rtol=1e-6, atol=1e-6)
    grad = torch.randn_like(side)
    (gradient,) = torch.autograd.grad(side, x, grad)
    (reference,) = torch.autograd.grad(expected, x, grad.double())
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)
    if layout != "sliced":
        assert gradient.stride() == x.stride()


def test_traced(backend):
    x, y = torch.randn(6, 17, device=DEVICE, requires_grad=True), torch.rand(6, device=DEVICE) * 16
    teacher = torch.randn(6, 17, device=DEVICE)

    def call(x):  # one tensor in two places, as a quality that is also the weight
        side = tl.distribution_expectation(x).sum()
        side = side + tl.distribution_distillation_loss(x, teacher, weight=y)
        return side + tl.distribution_focal_loss(x, y, weight=y)

    values = [call(x), torch.compile(call, backend="aot_eager", fullgraph=True)(x)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in values))


def test_derivatives_of_any_order():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.0, 1.3, 4.0, 2.7], dtype=torch.float64)
    teacher = torch.randn(4, 5, dtype=torch.float64)

    def call(x):
        loss = tl.distribution_focal_loss(x, y, reduction="none")
        distilled = tl.distribution_distillation_loss(x, teacher, reduction="none")
        return loss, distilled, tl.distribution_expectation(x)

    assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, x)


def test_vmap_of_grad():
    x, y = torch.randn(3, 4, 5), torch.rand(3, 4) * 4
    per_image = torch.func.vmap(torch.func.grad(tl.distribution_focal_loss))(x, y)
    for image in range(3):
        expected = torch.func.grad(tl.distribution_focal_loss)(x[image], y[image])
        torch.testing.assert_close(per_image[image], expected)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": torch.randn(2, 1)}, ValueError, r"logits must have shape \(\.\.\., n \+ 1\)"),
        ({"logits": torch.ones(2, 4).int()}, TypeError, "logits must be float16"),
        ({"target": torch.zeros(3)}, ValueError, r"target must have shape \(2,\)"),
        ({"target": torch.zeros(2).long()}, TypeError, "target must be float16"),
        ({"target": torch.zeros(2, requires_grad=True)}, ValueError, "target requires grad"),
        ({"weight": torch.rand(2, 4)}, ValueError, r"weight must have shape \(2,\)"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    arguments = {"logits": torch.randn(2, 4), "target": torch.zeros(2)} | change
    with pytest.raises(error, match=match):
        tl.distribution_focal_loss(**arguments)


def test_expectation_errors():
    with pytest.raises(ValueError, match=r"logits must have shape \(\.\.\., 4 \* \(n \+ 1\)\)"):
        tl.distribution_expectation(torch.randn(2, 17), sides=4)
    with pytest.raises(ValueError, match="sides must be an int >= 1"):
        tl.distribution_expectation(torch.randn(2, 17), sides=0)


@pytest.mark.parametrize(("rows", "block"), [(40, _blocks.BLOCK), (3000, _blocks.BLOCK), (40, 64)])
def test_the_short_ways_agree_with_the_formula(rows, block, monkeypatch):
    """Of plain CPU tensors, many and few; a masked bin, a negative weight, infinity."""
    monkeypatch.setattr(_blocks, "BLOCK", block)
    x, y, weight = torch.randn(rows, 17), torch.rand(rows) * 16, torch.rand(rows)
    teacher = torch.randn(rows, 17)
    y[:3] = torch.tensor([0.0, 16.0, 5.0])
    losses = [
        tl.distribution_expectation,
        *(
            partial(function, weight=w, reduction=reduction)
            for function in (
                partial(tl.distribution_focal_loss, target=y),
                partial(tl.distribution_distillation_loss, teacher=teacher, temperature=3.0),
            )
            for w in (None, weight, weight - 0.2)
            for reduction in ("none", "sum", "mean")
        ),
    ]
    for value in (1.0, -math.inf, math.inf):
        x[0, 9] = value
        for loss in losses:
            results = []
            for usable in (False, True):
                monkeypatch.setattr(_blocks, "usable", lambda *xs, usable=usable: usable)
                leaf = x.clone().requires_grad_()
                found = loss(leaf)
                upstream = torch.linspace(1, 2, found.numel()).view(found.shape)
                results.append((found, *torch.autograd.grad(found, leaf, upstream)))
            for formula, short in zip(*results, strict=True):
                torch.testing.assert_close(short, formula, rtol=1e-5, atol=1e-6, equal_nan=True)
