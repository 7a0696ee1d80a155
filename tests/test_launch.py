"""Launches that remember their binaries do what Triton's own do, and tell who watches."""

from __future__ import annotations

import random

import pytest
import torch
import triton
import triton.language as tl

from perf import _examples
from perf._record import fake_driver
from tritonloss import _launch
from tritonloss._dispatch import HAS_TRITON, INTERPRET

if not HAS_TRITON or INTERPRET:
    pytest.skip("the kernels are not compiled", allow_module_level=True)
if not _launch.REMEMBERS:
    pytest.skip("launches are Triton's own here", allow_module_level=True)


@triton.jit
def one_kernel(
    x_ptr, y_ptr, out_ptr, n, step, scale, SQUARE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0).to(tl.float32)
    if y_ptr is not None:
        x += tl.load(y_ptr + offs * step, mask=offs < n, other=0).to(tl.float32)
    x *= scale
    tl.store(out_ptr + offs, x * x if SQUARE else x, mask=offs < n)


DTYPES = (torch.float32, torch.float16)
SIZES = (1, 16, 48, 7, -1, 2**31 + 16)  # what Triton tells apart, and of one kind two


@pytest.fixture
def launched():
    """The binary, grid and arguments of each launch."""
    seen = []

    def note(name, digest, grid, args):
        seen.append((digest, grid, [_described(a) for a in args]))

    with fake_driver(note):
        yield seen


def _described(a):
    if isinstance(a, torch.Tensor):
        return a.data_ptr(), a.dtype
    return type(a), a


def draw(g: random.Random) -> tuple[tuple, tuple, dict]:
    """``(grid, args, constants)`` of a launch; storages are aligned, what begins in one is not."""

    def pointer():
        return torch.zeros(64, dtype=g.choice(DTYPES))[g.choice((0, 0, 0, 1, 4)) :]

    y = None if g.random() < 0.3 else pointer()
    args = (pointer(), y, torch.zeros(64), g.choice(SIZES), g.choice(SIZES[:3]), g.random())
    constants = {"SQUARE": g.random() < 0.5, "BLOCK": 64, "num_warps": g.choice((1, 2))}
    grid = (g.randrange(1, 9), g.randrange(1, 3))[: g.choice((1, 2))]
    return grid, args, constants


@pytest.mark.parametrize("most", [_launch.MOST, 3], ids=["all remembered", "few remembered"])
def test_launches_as_triton_does(launched, monkeypatch, most):
    monkeypatch.setattr(_launch, "MOST", most)
    g = random.Random(most)
    kernel = _launch.remembering(one_kernel)
    for _ in range(150):
        grid, args, constants = draw(g)
        one_kernel[grid](*args, **constants)
        kernel[grid](*args, **constants)
        kernel[grid](*args, **constants)
        tritons, *ours = launched[-3:]
        assert ours == [tritons, tritons]
    assert len({digest for digest, *_ in launched}) > 20, "few binaries were told apart"
    assert len(kernel.known) <= most


def test_a_known_binary_is_not_looked_for(launched, monkeypatch):
    kernel = _launch.remembering(one_kernel)
    args = torch.zeros(64), None, torch.zeros(64), 64, 1
    kernel[(2,)](*args, 0.5, SQUARE=True, BLOCK=64, num_warps=2)

    def look(*args, **kwargs):
        raise AssertionError("Triton looks at the arguments of a launch like the last")

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", look)
    # a scheduled number and another tensor change nothing
    kernel[(3,)](torch.ones(64), *args[1:], 0.25, SQUARE=True, BLOCK=64, num_warps=2)
    assert launched[-1][1] == (3, 1, 1) and launched[-1][2][5] == (float, 0.25)
    with pytest.raises(AssertionError, match="Triton looks"):
        kernel[(2,)](*args[:3], 65, 1, 0.5, SQUARE=True, BLOCK=64, num_warps=2)


def test_who_watches_is_told(launched, monkeypatch):
    """Profilers add hooks, to the kernel or to all launches."""
    kernel = _launch.remembering(one_kernel)
    args = torch.zeros(64), None, torch.zeros(64), 64, 1, 0.5
    constants = {"SQUARE": True, "BLOCK": 64, "num_warps": 2}
    kernel[(2,)](*args, **constants)
    names = []
    hooks = triton.knobs.runtime.launch_enter_hook
    note = lambda launch: names.append(launch.get()["name"])  # noqa: E731
    hooks.add(note)
    try:
        kernel[(2,)](*args, **constants)
    finally:
        hooks.remove(note)
    assert names == ["one_kernel"]
    runs = []
    monkeypatch.setattr(one_kernel, "pre_run_hooks", [lambda *args, **kwargs: runs.append(args)])
    kernel[(2,)](*args, **constants)
    assert len(runs) == 1 and len(launched) == 3 and launched[0] == launched[1] == launched[2]


@pytest.mark.parametrize("example", _examples.EXAMPLES)
def test_arguments_come_in_the_order_that_is_remembered(example):
    """Pointers, integers, floats: another order would keep tensors alive, or never find a binary
    again while a number is scheduled."""
    for launch in _examples.launches_of(example):
        values = [launch.args[name] for name in launch.kernel.arg_names if name in launch.args]
        values = values[: sum(not p.is_constexpr for p in launch.kernel.params)]
        order = {torch.Tensor: 0, type(None): 0, int: 1, float: 2}
        kinds = [order[type(v)] for v in values]  # nothing else comes
        assert values[0] is not None and kinds == sorted(kinds), launch.name


def test_elsewhere_launches_are_tritons_own(monkeypatch):
    """On ROCm, and with a release of Triton that came later."""
    monkeypatch.setattr(_launch, "REMEMBERS", False)
    assert _launch.remembering(one_kernel) is one_kernel
