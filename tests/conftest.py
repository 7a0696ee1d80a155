"""Fixtures for all runs of the suite: plain (eager), TRITON_INTERPRET=1 and PTX=sm_90 (kernels)."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from ptx.switch import PTX
from torch import Tensor

import tritonloss
from tritonloss._dispatch import HAS_TRITON, INTERPRET

torch.set_num_threads(1)
EMPTY = torch.empty

GPU = HAS_TRITON and torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
# The kernels run on a GPU, or interpreted on the CPU; without either the eager path is tested.
BACKENDS = ["eager", "triton"] if GPU else ["triton"] if INTERPRET else ["eager"]


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the product of the test axes")


# What makes launches of its own, or asks for Triton's interpreter in another process.
NOT_ON_PTX = {
    "test_lockstep": "trains models: too slow here",
    "test_distributed": "its processes have no interpreter of PTX",
    "test_compile": "Inductor makes its own launches",
    "test_launch": "its launches end in a driver of its own",
}


def pytest_collection_modifyitems(config, items):
    for item in items:
        if PTX and (reason := NOT_ON_PTX.get(item.module.__name__)):
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU"))


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    """Which test a worker runs first does not change what the next one draws."""
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on every backend that this process offers."""
    with tritonloss.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True, scope="session" if not PTX else "function")
def compiled_kernels():
    """With PTX=..., every launch of the test is compiled, checked and interpreted."""
    if not PTX:
        yield
        return
    from ptx.harness import interpreted

    with interpreted(PTX):
        yield


@pytest.fixture
def on_device():
    """What the test makes lies where the kernels run."""
    with torch.device(DEVICE):
        yield


class _PoisonedTorch:
    """``torch`` for the launchers, whose ``empty*`` hand out NaN, or the smallest and the largest
    integer in turn: a value left unwritten shows."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def _poison(tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(tensor) is not Tensor:
            return tensor
        if torch.empty is not EMPTY:  # the interpreter of PTX has its own poison
            return tensor
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        limits = torch.iinfo(tensor.dtype)
        tensor.fill_(limits.min)
        tensor.as_strided((tensor.numel() // 2,), (2,), tensor.storage_offset() + 1).fill_(
            limits.max
        )
        return tensor

    def empty(self, *args, **kwargs):
        return self._poison(torch.empty(*args, **kwargs))

    def empty_like(self, *args, **kwargs):
        return self._poison(torch.empty_like(*args, **kwargs))

    def empty_strided(self, *args, **kwargs):
        return self._poison(torch.empty_strided(*args, **kwargs))


@pytest.fixture(autouse=True, scope="session")
def poisoned_outputs():
    """Every buffer that a launcher allocates is full of NaN before its kernel runs."""
    if not HAS_TRITON:
        yield
        return
    kernels = importlib.import_module("tritonloss.kernels")
    modules = [
        importlib.import_module(f"tritonloss.kernels.{info.name}")
        for info in pkgutil.iter_modules(kernels.__path__)
    ]
    patch = pytest.MonkeyPatch()
    for module in modules:
        if hasattr(module, "torch"):
            patch.setattr(module, "torch", _PoisonedTorch())
    yield
    patch.undo()
