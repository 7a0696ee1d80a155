"""Inductor, forward and backward in one graph: every loss once."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

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
