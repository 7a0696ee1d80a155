"""Every loss of the table against its written-out formula, over a covering set of the axes."""

from __future__ import annotations

import zlib

import pytest
import torch
from cases import CASES, Axes, Case, Problem, generator, points
from conftest import DEVICE

from tritonloss._dispatch import use_triton

# Relative errors in L2 and in max norm. 16-bit gradients carry one rounding to the dtype; the
# interpreter truncates bfloat16 instead of rounding it.
TOLERANCE = {"float64": 1e-12, "float32": 3e-6, "float16": 1e-3, "bfloat16": 1.6e-2}


def pytest_generate_tests(metafunc):
    if "axes" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--full")
    pairs = [(c, axes) for c in CASES for axes in points(c, full)]
    ids = [f"{c.name}-{'-'.join(str(v) for v in axes)}" for c, axes in pairs]
    metafunc.parametrize(("loss", "axes"), pairs, ids=ids)


def to_device(value):
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, tuple):
        return tuple(to_device(v) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v) for k, v in value.items()}
    return value


def run(loss: Case, problem: Problem, hyper: dict, upstream, mode: str):
    """Loss and gradient through the public function."""
    x = problem.x.detach()
    if DEVICE != "cpu":  # .to() would make the strides dense
        span = sum((s - 1) * t for s, t in zip(x.shape, x.stride(), strict=True)) + 1
        block = torch.empty(span if x.numel() else 0, device=DEVICE, dtype=x.dtype)
        x = block.as_strided(x.shape, x.stride()).copy_(x)
    x.requires_grad_()
    args, kwargs = to_device(problem.args), to_device(problem.kwargs)

    def call(x):
        return loss.function(x, *args, **kwargs, **hyper)

    if mode == "traced":
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=False)
    value = call(x)
    grad = upstream(value)
    (gradient,) = torch.autograd.grad(value, x, grad)
    assert gradient.dtype == x.dtype
    dense = x.numel() and torch.empty_like(x).stride() == x.stride()
    if dense and use_triton(x) and mode == "plain":
        assert gradient.stride() == x.stride(), "the gradient keeps the logits' strides"
    return value.cpu(), gradient.cpu(), grad.cpu()


def expected(loss: Case, problem: Problem, hyper: dict, grad):
    """The same by the formula in float64, with weights and reduction written out."""
    full = torch.where(_per_element(problem), problem.x.detach(), 0).double().requires_grad_()
    kwargs = problem.kwargs
    value = loss.formula(full, problem, **hyper)
    weight = kwargs.get("weight")
    if weight is not None:
        weight = torch.where(weight > 0, weight, 0).double()
        value = value * (weight.unsqueeze(-1) if weight.dim() < value.dim() else weight)
    if kwargs.get("class_weight") is not None:
        value = value * kwargs["class_weight"].double()
    value = torch.where(problem.keep, value, 0)
    if kwargs["reduction"] != "none":
        value = value.sum()
    if kwargs["reduction"] == "mean":
        avg = kwargs.get("avg_factor")
        divisor = max(int(problem.keep.sum()), 1) if avg is None else float(avg)
        value = value / (divisor if divisor > 0 else 1)
    (gradient,) = torch.autograd.grad(value, full, grad.double())
    return value.detach(), gradient


def _per_element(problem: Problem):
    keep = problem.keep
    return keep if keep.dim() == problem.x.dim() else keep.unsqueeze(-1)


def assert_close(actual, reference, tolerance, what, smallest=0.0):
    """``smallest``: rounding error of an entry that underflows in the dtype."""
    actual, reference = actual.double(), reference.double()
    assert actual.shape == reference.shape, what
    assert bool(actual.isfinite().all()), f"{what} is not finite"
    if reference.numel() == 0:
        return
    difference = actual - reference
    for norm in (2, float("inf")):
        size = torch.linalg.vector_norm(reference, norm)
        error = torch.linalg.vector_norm(difference, norm)
        lost = smallest * (reference.numel() ** 0.5 if norm == 2 else 1)
        assert error <= tolerance * size + lost + 1e-30, (
            f"{what}: norm {norm}, relative error {float(error / size):.2e} > {tolerance:.0e}"
        )


def upstream_of(axes: Axes, g):
    def upstream(value):
        if axes.upstream == "random":
            return torch.randn(value.shape, generator=g).to(value)
        scale = 65536.0 if axes.upstream == "loss scale" and axes.reduction == "mean" else 1.0
        return torch.tensor(scale).to(value).expand(value.shape)  # stride 0 for "none"

    return upstream


def test_formula(loss, axes, backend):
    seed = zlib.crc32(repr(axes).encode())
    g = generator(seed)
    problem = loss.problem(axes, g)
    hyper = loss.hyper[seed % len(loss.hyper)]
    value, gradient, grad = run(loss, problem, hyper, upstream_of(axes, g), axes.mode)
    if axes.dtype == "float16":
        # an entry beyond 65504 overflows whatever computes it
        grad = grad.clamp(max=65536.0)
    reference, slope = expected(loss, problem, hyper, grad)
    assert value.dtype == (torch.float64 if axes.dtype == "float64" else torch.float32)
    assert_close(value, reference, min(TOLERANCE[axes.dtype], 3e-6), "value")
    tolerance = TOLERANCE[axes.dtype]
    positive = problem.positive.broadcast_to(gradient.shape)
    smallest = 0.0
    if axes.dtype == "float16":
        fits = slope.abs() < 65000
        gradient, slope = torch.where(fits, gradient, 0), torch.where(fits, slope, 0)
        smallest = 3e-8
    for where, name in ((positive, "positives"), (~positive, "negatives")):
        assert_close(gradient[where], slope[where], tolerance, f"gradient at {name}", smallest)
    dropped = ~_per_element(problem).broadcast_to(gradient.shape)
    assert not gradient[dropped].any(), "what does not count has a gradient of exactly 0"
    if axes.reduction == "none":
        assert not value[~problem.keep].any(), "what does not count has a loss of exactly 0"


@pytest.mark.parametrize("loss", CASES, ids=lambda c: c.name)
def test_empty_mean_is_zero(loss, backend):
    axes = points(loss)[0]._replace(rows=0, reduction="mean", avg_factor=None)
    problem = loss.problem(axes, generator(0))
    value, gradient, _ = run(loss, problem, {}, torch.ones_like, "plain")
    assert value == 0 and gradient.shape == problem.x.shape
