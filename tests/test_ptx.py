"""The compiled kernels against float64 eager: their PTX, interpreted, without a GPU.

``tests/ptx`` says what this proves and what it does not.
"""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

import tritonloss as tl
from tritonloss._dispatch import HAS_TRITON, INTERPRET

if not HAS_TRITON or INTERPRET:
    pytest.skip("the kernels are not compiled", allow_module_level=True)

from ptx.harness import interpreted

from perf import _examples

ARCH = "sm_90"
# Of the largest entry. Values are float32 for every dtype; gradients carry one rounding to it.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float16: 6e-4,
    torch.bfloat16: 4.5e-3,
}
VALUE_TOLERANCE = 2e-6


def errors(got: Tensor, want: Tensor) -> float:
    """Largest difference of finite entries over the largest entry; the others have to agree."""
    lost = 3e-8 if got.dtype == torch.float16 else 0.0  # what underflows there
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan()), "NaN in one of them"
    finite = want.isfinite()
    assert torch.equal(got[~finite].nan_to_num(0.0), want[~finite].nan_to_num(0.0)), "infinities"
    if not finite.any():
        return 0.0
    largest = want[finite].abs().max().clamp(min=1e-30)
    return float(((got - want)[finite].abs().max() - lost).clamp(min=0) / largest)


# ------------------------------------------------------------------------------------ examples

VARIANTS = [
    pytest.param("sm_90", {}, id="sm_90"),
    pytest.param("sm_80", {}, id="sm_80", marks=pytest.mark.slow),
    pytest.param("sm_100", {}, id="sm_100", marks=pytest.mark.slow),
    pytest.param("sm_90", {"noise": 1.0}, id="noise", marks=pytest.mark.slow),
    pytest.param("sm_90", {"contract": True}, id="contract", marks=pytest.mark.slow),
]


def example_errors(example: str, arch: str, rows: int = 201, **options) -> dict:
    """Errors of value and gradient, and the interpreter; a fault raises."""
    seed = zlib.crc32(example.encode())
    with tl.backend("eager"), _examples.operands(_examples.Drawn(rows, seed, True)) as exact:
        want = _examples.run(example)
    if "scheduled" in example:
        options["float_type"] = "fp64"
    with (
        _examples.operands(_examples.Drawn(rows, seed)) as drawn,
        interpreted(arch, **options) as interpreter,
    ):
        got = _examples.run(example)
    assert interpreter.executed
    found = {"value": errors(got, want), "gradient": 0.0, "dtype": drawn.logits[0].dtype}
    for x, y in zip(drawn.logits, exact.logits, strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            found["gradient"] = max(found["gradient"], errors(x.grad, y.grad))
    return found | {"interpreter": interpreter}


@pytest.mark.parametrize(("arch", "options"), VARIANTS)
@pytest.mark.parametrize("example", _examples.EXAMPLES)
def test_examples(example, arch, options):
    found = example_errors(example, arch, **options)
    if "noise" in options and example.startswith("ghm_c"):
        return  # noise moves logits that lie at the edge of a region into the next
    slack = 4 if options else 1
    assert found["value"] <= slack * VALUE_TOLERANCE
    assert found["gradient"] <= slack * TOLERANCE[found["dtype"]]
