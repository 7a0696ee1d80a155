"""Inductor, forward and backward in one graph: every loss once."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

import tritonloss as tl
from perf import workloads
from tritonloss._dispatch import INTERPRET

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.skipif(INTERPRET, reason="Inductor compiles kernels, it does not interpret them"),
]


@pytest.mark.parametrize("loss", workloads.LOSSES)
def test_inductor(loss):
    torch._dynamo.reset()
    call = workloads.call_of(loss, workloads.Point(300, 6, 20), DEVICE)
    compiled = torch.compile(call.loss, fullgraph=True)
    found = workloads.value_and_gradient(call._replace(loss=compiled))
    torch.testing.assert_close(found, workloads.value_and_gradient(call), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", workloads.LOSSES)
def test_symbolic_sizes(loss):
    """With dynamic=True every number that Dynamo finds outside the code is symbolic, too."""
    torch._dynamo.reset()
    for rows in (60, 90):
        call = workloads.call_of(loss, workloads.Point(rows, 7, 11), DEVICE)
        compiled = torch.compile(call.loss, fullgraph=True, dynamic=True, backend="aot_eager")
        expected = workloads.value_and_gradient(call)
        found = workloads.value_and_gradient(call._replace(loss=compiled))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", workloads.LOSSES)
def test_not_finite(loss):
    """An infinite logit and a NaN give what they give without a compiler, which takes 0 * x for 0
    and may compare the other way round."""
    torch._dynamo.reset()
    call = workloads.call_of(loss, workloads.Point(300, 6, 20), DEVICE)
    with torch.no_grad():
        flat = call.x.view(-1, call.x.shape[-1])
        flat[7, 1], flat[8, 2], flat[9, 1] = float("inf"), float("nan"), -float("inf")
    compiled = torch.compile(call.loss, fullgraph=True)
    found = workloads.value_and_gradient(call._replace(loss=compiled))
    expected = workloads.value_and_gradient(call)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", ["distillation", "weighted distillation", "expectation"])
def test_bins_without_a_share(kind):
    """Derivatives written out for a graph are those of the formula where bins are masked: by both,
    by the teacher alone, by the student alone (NaN); where a logit is not finite; and where a row
    has no weight."""
    inf, nan = float("inf"), float("nan")
    g = torch.Generator().manual_seed(1)
    x = torch.randn(12, 5, generator=g, dtype=torch.float64)
    teacher = torch.randn(12, 5, generator=g, dtype=torch.float64)
    x[0, :2], teacher[0, :2] = -inf, -inf
    teacher[1, 3], x[2, 3] = -inf, -inf
    x[3, 1], teacher[4, 1], x[5, 0], teacher[6, 0] = nan, nan, inf, inf
    weight = torch.rand(12, generator=g)
    weight[[2, 3, 7, 8]] = torch.tensor([0, -1.0, 0, -1])  # of rows that are NaN without, too
    x, teacher, weight = (t.to(DEVICE, torch.float32) for t in (x, teacher, weight))
    upstream = torch.rand(12, generator=g).to(DEVICE)

    def loss(x):
        if kind == "expectation":
            return tl.distribution_expectation(x)
        mask = weight if kind == "weighted distillation" else None
        return tl.distribution_distillation_loss(
            x, teacher, temperature=2.0, weight=mask, reduction="none"
        )

    def value_and_gradient(function):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        value.backward(upstream)
        return value.detach(), leaf.grad

    torch._dynamo.reset()
    found = value_and_gradient(torch.compile(loss, fullgraph=True))
    value, gradient = value_and_gradient(loss)
    torch.testing.assert_close(found, (value, gradient), rtol=1e-5, atol=1e-7, equal_nan=True)
    assert value.isnan().any() and gradient.isfinite().any()
