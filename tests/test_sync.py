"""No loss reads a value on the host: on a GPU that would make it wait for all that came before."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, generator, points
from ptx.switch import PTX
from torch.utils._python_dispatch import TorchDispatchMode

import tritonloss as tl
from perf import workloads
from tritonloss import _checks, _targets
from tritonloss._dispatch import HAS_TRITON, INTERPRET
from tritonloss.eager import _blocks

aten = torch.ops.aten
READING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten.unique_consecutive,
    aten._unique2,
    aten.equal,
}


class NoReads(TorchDispatchMode):
    """Raises where an operation waits for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READING:
            raise AssertionError(f"{func} reads values on the host")
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise AssertionError(f"{func} by a mask reads how many are chosen")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unchecked(monkeypatch):
    """Without what is for plain CPU tensors alone: value checks and the path by blocks."""
    monkeypatch.setattr(_blocks, "usable", lambda x: False)
    for module in (_checks, _targets.check):
        monkeypatch.setattr(module, "values_checked", lambda x: False)


def both_ways(function, x):
    with NoReads():
        value = function(x)
        value.backward(torch.ones((), device=x.device, dtype=value.dtype).expand(value.shape))


def _calls():
    for loss in CASES:
        for axes in points(loss)[:12]:
            yield pytest.param(loss, axes, id=f"{loss.name}-{'-'.join(map(str, axes))}")


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels read values")
@pytest.mark.parametrize(("loss", "axes"), list(_calls()))
def test_eager_path_reads_nothing(loss, axes, unchecked):
    problem = loss.problem(axes, generator(0))
    with tl.backend("eager"):
        both_ways(
            lambda x: loss.function(x, *problem.args, **problem.kwargs),
            problem.x.detach().requires_grad_(),
        )


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels read values")
@pytest.mark.parametrize("target_form", ["labels", "dense"])
def test_eager_ghm_reads_nothing(target_form, unchecked):
    labels = torch.randint(0, 6, (64,))
    targets = labels if target_form == "labels" else torch.rand(64, 5)
    with tl.backend("eager"):
        both_ways(lambda x: tl.ghm_c_loss(x, targets), torch.randn(64, 5, requires_grad=True))
        both_ways(
            lambda x: tl.ghm_r_loss(x, torch.zeros(64, 4)), torch.randn(64, 4, requires_grad=True)
        )


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels read values")
@pytest.mark.parametrize("weight", [None, "row", "logit"])
@pytest.mark.parametrize("target_form", ["labels", "quality", "dense"])
def test_eager_diagnosis_reads_nothing(target_form, weight, unchecked):
    labels, x = torch.randint(0, 6, (64,)), torch.randn(64, 5)
    targets = {"labels": labels, "quality": (labels, torch.rand(64)), "dense": torch.rand(64, 5)}
    weights = {None: None, "row": torch.rand(64), "logit": torch.rand(64, 5)}
    diagnosis = tl.Diagnosis()
    with tl.backend("eager"), NoReads():
        for _ in range(2):
            diagnosis.update(x, targets[target_form], weight=weights[weight])


def _examples():
    if not HAS_TRITON or INTERPRET:
        return []
    from perf._examples import EXAMPLES

    return list(EXAMPLES)


@pytest.mark.parametrize("example", _examples())
def test_launchers_read_nothing(example):
    """On meta tensors, which have no values to read."""
    from perf._examples import launches_of

    with NoReads():
        assert launches_of(example)


def test_a_read_is_noticed():
    x = torch.randn(4)
    for read in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero()):
        with pytest.raises(AssertionError, match="read"), NoReads():
            read()


@pytest.mark.skipif(bool(PTX), reason="the interpreter of PTX has no meta tensors")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", workloads.LOSSES)
def test_new_tensors_lie_on_the_device_of_the_logits(loss, dtype):
    """One that is made on the default device is here without values, on a GPU on the wrong side."""
    call = workloads.call_of(loss, workloads.Point(2000, 40, 60), "cpu")  # more than a block
    call = call._replace(x=call.x.detach().to(getattr(torch, dtype)).requires_grad_())
    with tl.backend("eager"):
        expected = workloads.value_and_gradient(call)
        with torch.device("meta"):
            found = workloads.value_and_gradient(call)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [50, 5000])
def test_counts_lie_on_the_device_of_the_logits(rows):
    x, labels = torch.randn(rows, 40), torch.randint(0, 60, (rows,)).clamp(max=40)
    expected, found = tl.Diagnosis(), tl.Diagnosis()
    with tl.backend("eager"):
        expected.update(x, labels)
        with torch.device("meta"):
            found.update(x, labels)
    assert torch.equal(found.counts, expected.counts)
