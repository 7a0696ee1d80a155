"""torch.library.opcheck of every op, on the arguments that the losses call it with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from perf import workloads
from tritonloss import _op, backend
from tritonloss._dispatch import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="opcheck runs the op")

# Strides and devices agree with the fake function, and no input is written or returned.
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def recorded_ops(monkeypatch, function) -> list:
    """``(op, arguments)`` of the launchers that a function calls, as it calls them in a graph."""
    calls = []
    call_before = _op.Op.__call__

    def call(self, *args):
        # traced, hyper-parameters travel as tensors
        packed = [torch.tensor(a) if isinstance(a, tuple) else a for a in args]
        calls.append((self.op, tree_map_only(Tensor, Tensor.detach, packed)))
        return call_before(self, *args)

    with monkeypatch.context() as patch, backend("triton"):
        patch.setattr(_op.Op, "__call__", call)
        function()
    return calls


@pytest.mark.parametrize("loss", workloads.LOSSES)
def test_every_op_of_a_loss(loss, monkeypatch):
    call = workloads.call_of(loss, workloads.Point(40, 5, 9), "cpu")
    calls = recorded_ops(monkeypatch, lambda: workloads.value_and_gradient(call))
    assert len(calls) >= 2
    for op, args in calls:
        # the ranking ops return scratch, of which only a part is written
        tests = TESTS[:2] if "ranking" in str(op) else TESTS
        torch.library.opcheck(op, args, test_utils=tests)
