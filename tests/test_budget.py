"""The kernel budget: every kernel keeps it, and planted faults do not."""

from __future__ import annotations

import pytest
import torch

from tritonloss._dispatch import HAS_TRITON, INTERPRET

if not HAS_TRITON or INTERPRET:
    pytest.skip("the kernels are not compiled", allow_module_level=True)

import triton
import triton.language as tl

from perf import _examples, budget, executed
from perf._binary import source_of
from perf._record import recorded_launches


def test_the_kernels_keep_their_budget():
    assert budget.main(["--check", "--quick"]) == 0


def test_the_table_is_complete():
    todo = budget.binaries(_examples.EXAMPLES, budget.TARGETS)
    assert {b.key for b in todo} == set(budget.read_table()), "python -m perf.budget --write"


def test_the_kernels_execute_no_more_than_committed():
    assert executed.main(["--check", "--loss", "focal", "--loss", "distribution_focal"]) == 0


@pytest.mark.slow
def test_no_kernel_executes_more_than_committed():
    assert executed.main(["--check"]) == 0


def test_more_instructions_than_committed_are_found():
    row = dict(next(iter(executed.read_table().values())))
    assert executed.grown(row, row) == []
    assert "integer" in executed.grown(row | {"integer": float(row["integer"]) * 1.2}, row)[0]
    assert "not in the committed" in executed.grown(row, None)[0]


@triton.jit
def sound_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(0) + 1) * BLOCK <= n:
        tl.store(out_ptr + offs, tl.exp(tl.load(x_ptr + offs)))
    else:
        mask = offs < n
        tl.store(out_ptr + offs, tl.exp(tl.load(x_ptr + offs, mask=mask, other=0)), mask=mask)


@triton.jit
def masked_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(out_ptr + offs, tl.exp(tl.load(x_ptr + offs, mask=mask, other=0)), mask=mask)


@triton.jit
def float64_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # a literal below the smallest normal float32 makes the comparison float64
    tl.store(out_ptr + offs, tl.log(tl.maximum(tl.load(x_ptr + offs), 1e-38)))


@triton.jit
def spilling_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """All pairs of a tile at once: far more values than there are registers."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    pairs = tl.exp(x[:, None] - x[None, :])
    rows = tl.sum(pairs, 1)
    tl.store(out_ptr + offs, tl.sum(pairs / rows[:, None], 0))


def faults_of(kernel, block: int, monkeypatch) -> str:
    streams = {"x_ptr": block, "out_ptr": block} if block > 256 else {}
    monkeypatch.setitem(_examples.STREAMS, kernel.fn.__name__, lambda args: streams)
    x, out = _examples.empty(4099), _examples.empty(4099)
    with recorded_launches() as launches:
        kernel[(1,)](x, out, 4099, BLOCK=block, num_warps=4)
    needed = _examples.wide_accesses(launches[0], 32)
    binary = budget.Binary("", kernel.fn.__name__, "sm_90", source_of(launches[0]), *needed)
    committed = {"triton": "another", "registers": "0", "fp64": "0"}
    return "; ".join(budget.faults(binary, budget.measure(binary), committed))


@pytest.mark.parametrize(
    ("kernel", "block", "word"),
    [
        (sound_kernel, 2048, ""),
        (masked_kernel, 2048, "16-byte loads"),
        (float64_kernel, 2048, "float64"),
        (spilling_kernel, 256, "spills"),
    ],
    ids=lambda v: getattr(getattr(v, "fn", None), "__name__", None),
)
def test_planted_faults_are_found(kernel, block, word, monkeypatch):
    found = faults_of(kernel, block, monkeypatch)
    assert (word in found) if word else found == "", found


def test_more_registers_than_committed_are_found():
    (binary,) = budget.binaries(["asl1"], ["sm_90"])[:1]
    figures = budget.measure(binary)
    before = {"triton": budget.TRITON, "fp64": "0", "registers": str(figures.registers // 2)}
    assert "registers" in " ".join(budget.faults(binary, figures, before))


def test_sixteen_byte_needs_follow_the_dtype():
    launch = _examples.launches_of("focal dense bf16")[0]
    assert _examples.wide_accesses(launch, 32) == (2, 0)
    assert launch.args["x_ptr"].dtype == torch.bfloat16
