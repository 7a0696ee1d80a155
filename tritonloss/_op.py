"""The binding of kernels to autograd and to torch.compile. No other file names these APIs.

A loss brings a pair of launchers (forward, backward) and their pair of ops, and gets one
differentiable function:

* eager, the launchers are called directly: the dispatcher costs more than a small kernel;
* traced (``torch.compile``, fake or subclass tensors), the ops stand in the graph and their bodies
  are inlined, so that Inductor sees the Triton kernels;
* ``create_graph=True`` differentiates the eager reference instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._dispatch import HAS_TRITON, INTERPRET

if HAS_TRITON and not INTERPRET:
    from torch.library import triton_op, wrap_triton
else:

    def wrap_triton(kernel):
        """Interpreted kernels are plain Python: nothing to trace."""
        return kernel


NAMESPACE = "tritonloss"


def kernel_op(fake: Callable):
    """Register a launcher-calling function as an op; ``fake`` allocates its outputs.

    Interpreted kernels cannot be traced: there the op is opaque, and ``fake`` stands in for it.
    """

    def decorate(body: Callable):
        if not HAS_TRITON:
            return body
        if INTERPRET:
            return opaque_op(fake)(body)
        return triton_op(f"{NAMESPACE}::{body.__name__}", mutates_args=())(body)

    return decorate


def opaque_op(fake: Callable, name: str | None = None):
    """Register a function that cannot be traced, for its shapes depend on values or it talks to
    other processes; ``fake`` allocates its outputs."""

    def decorate(body: Callable):
        op = torch.library.custom_op(f"{NAMESPACE}::{name or body.__name__}", mutates_args=())(body)
        op.register_fake(fake)
        return op

    return decorate


def fake_row_loss(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    """``(loss, scale)`` of a loss with one value per row of x; args end with the reduction."""
    if args[-1] == "none":
        loss, scale = x.shape[:-1], (0,)
    else:
        loss, scale = (), ()
    return x.new_empty(loss, dtype=torch.float32), x.new_empty(scale, dtype=torch.float32)


def traced(x: Tensor) -> bool:
    """True if ``x`` is on its way into a graph, where only ops may touch it."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def scalars(x: Tensor, *values: float | Tensor) -> Tensor | tuple[float, ...]:
    """Hyper-parameters for a kernel: plain numbers, or one float32 vector on the device.

    A graph gets the vector, so that a scheduled value does not recompile it.
    """
    if not traced(x) and not any(isinstance(v, Tensor) for v in values):
        return values
    tensors = [
        v.detach().to(x.device, non_blocking=True) if isinstance(v, Tensor) else v for v in values
    ]
    if len(values) == 1 and isinstance(values[0], Tensor):
        return tensors[0].reshape(1)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    # A product, because Dynamo keeps a scheduled number symbolic there, unlike in torch.full
    return torch.stack([(v * one).float() for v in tensors])


def call(op: Callable, launch: Callable, x: Tensor, *args):
    """Run the launcher, or put its op into the graph being traced."""
    if traced(x):
        return op(x, *args)
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever the tensors say.
        with torch.cuda.device(x.device):
            return launch(x, *args)
    return launch(x, *args)


def differentiable(
    forward: Callable, backward: Callable, reference: Callable | None, *, constants: int = 0
):
    """Tie a forward and a backward into one function of ``(x, *args)``, differentiable in ``x``.

    Args:
        forward: ``(x, *args) -> (outputs, saved)``, two tuples of tensors.
        backward: ``(grads, saved, x, *args) -> grad_x``.
        reference: ``(x, *args) -> outputs``, the eager formula, used for double backward; None
            where the gradient is not the derivative of the value.
        constants: so many of the last outputs carry no gradient (a running state).
    """

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *args):
            outputs, saved = forward(x, *args)
            if constants:
                ctx.mark_non_differentiable(*outputs[-constants:])
            tensors = [a for a in args if isinstance(a, Tensor)]
            ctx.save_for_backward(x, *saved, *tensors)
            ctx.n_saved = len(saved)
            ctx.is_tensor = tuple(isinstance(a, Tensor) for a in args)
            ctx.static = tuple(None if isinstance(a, Tensor) else a for a in args)
            return outputs if len(outputs) > 1 else outputs[0]

        @staticmethod
        def backward(ctx, *grads):
            x, *rest = ctx.saved_tensors
            grads = grads[: len(grads) - constants]
            saved, tensors = rest[: ctx.n_saved], iter(rest[ctx.n_saved :])
            args = [
                next(tensors) if is_tensor else value
                for is_tensor, value in zip(ctx.is_tensor, ctx.static, strict=True)
            ]
            if torch.is_grad_enabled():  # create_graph=True
                grad_x = _through_reference(reference, grads, x, args)
            else:
                grad_x = backward(grads, saved, x, *args)
            return grad_x, *(None for _ in args)

    return lambda x, *args: Kernel.apply(x, *(distinct(x, args) if traced(x) else args))


def distinct(x: Tensor, args: tuple) -> tuple:
    """The arguments with a view in place of each repetition, which Dynamo does not take.

    A box quality may well be the weight of its row, too.
    """
    seen = [x]
    result = []
    for a in args:
        if isinstance(a, Tensor):
            if any(a is b for b in seen):
                a = a.view_as(a)
            seen.append(a)
        result.append(a)
    return tuple(result)


def _through_reference(reference, grads, x, args):
    if reference is None:
        raise RuntimeError(
            "this loss has an error-driven gradient, which is no derivative of its value: it "
            "cannot be differentiated twice (create_graph=True)"
        )
    outputs = reference(x, *args)
    outputs = outputs[: len(grads)] if isinstance(outputs, tuple) else (outputs,)
    (grad_x,) = torch.autograd.grad(outputs, (x,), grads, create_graph=True)
    return grad_x
