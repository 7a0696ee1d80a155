"""torch.library.opcheck of every op, on the arguments that the losses call it with."""

from __future__ import annotations

import pytest
import torch

from perf import workloads
from tritonloss import _op, backend
from tritonloss._dispatch import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="opcheck runs the op")

# Strides and devices agree with the fake function, and no input is written or returned.
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("loss", workloads.LOSSES)
def test_every_op_of_a_loss(loss, monkeypatch):
    calls = []
    call_before = _op.call

    def call(op, launch, x, *args):
        # as traced: hyper-parameters travel as tensors
        args = [torch.tensor(a) if isinstance(a, tuple) else a for a in args]
        calls.append((op, [a.detach() if isinstance(a, torch.Tensor) else a for a in (x, *args)]))
        return call_before(op, launch, x, *args)

    monkeypatch.setattr(_op, "call", call)
    with backend("triton"):
        workloads.value_and_gradient(workloads.call_of(loss, workloads.Point(40, 5, 9), "cpu"))
    assert len(calls) >= 2
    for op, args in calls:
        # the ranking ops return scratch, of which only a part is written
        tests = TESTS[:2] if "ranking" in str(op) else TESTS
        torch.library.opcheck(op, args, test_utils=tests)
