"""The binding of kernels to autograd and to torch.compile. No other file names these APIs.

A launcher is a function that launches kernels, and an op:

* eager, it is called directly: the dispatcher costs more than a small kernel;
* traced (``torch.compile``, fake or subclass tensors), its op stands in the graph and its body is
  inlined, so that Inductor sees the Triton kernels;
* ``create_graph=True`` differentiates the eager formula instead.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._launch import remembering, triton

NAMESPACE = "tritonloss"
PLAIN = (Tensor, torch.nn.Parameter)


def interpret_asked() -> bool:
    """As Triton reads its variable."""
    value = os.environ.get("TRITON_INTERPRET", "0").lower()
    return value in ("1", "true", "yes", "on", "y")


# Read once: Triton decides at import whether its decorator builds interpreted kernels.
INTERPRET = triton is not None and interpret_asked()


def traced(x: Tensor) -> bool:
    """True if ``x`` is on its way into a graph, where only ops may touch it."""
    return type(x) not in PLAIN or torch.compiler.is_compiling()


class _Nothing:
    """In place of an interpreted kernel, which is plain Python and stands in no graph."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def wrap_triton(kernel, x: Tensor):
    """What a launcher launches: the kernel, or where ``x`` is traced its node in the graph.

    torch finds the kernels of an op by this name, ``wrap_triton(kernel, ...)`` in the source. Its
    body never runs where Dynamo traces: the type of ``x`` tells.
    """
    if type(x) in PLAIN:
        return kernel if INTERPRET else remembering(kernel)
    return _Nothing() if INTERPRET else torch.library.wrap_triton(kernel)


class Op:
    """A function of a tensor and more: its body for plain tensors, its op for traced ones."""

    def __init__(self, body: Callable, op: Callable):
        functools.update_wrapper(self, body)
        self.body, self.op = body, op

    def __call__(self, xs, *args):
        x = xs[0] if isinstance(xs, list) else xs
        if traced(x):
            return self.op(xs, *args)
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            # Triton launches on the current device, whatever the tensors say.
            with torch.cuda.device(x.device):
                return self.body(xs, *args)
        return self.body(xs, *args)


def launcher(body: Callable) -> Op:
    """Make a launcher of an annotated function: see above. Its first argument is a tensor, or a
    list of them.

    It is its own fake: traced, it allocates its outputs and launches nothing.
    """
    name = f"{body.__module__.rpartition('.')[2]}_{body.__name__}"
    if INTERPRET:  # cannot be traced
        return Op(body, _opaque(body, body, name))
    return Op(body, torch.library.triton_op(f"{NAMESPACE}::{name}", mutates_args=())(body))


def opaque(fake: Callable) -> Callable[[Callable], Op]:
    """Make an op of an annotated function that cannot be traced, for its shapes depend on values or
    it talks to other processes; ``fake`` allocates its outputs."""
    return lambda body: Op(body, _opaque(body, fake, body.__name__))


def _opaque(body: Callable, fake: Callable, name: str):
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())(body)
    op.register_fake(fake)
    return op


def packed(x: Tensor, args: tuple) -> tuple | list:
    """The arguments as a launcher takes them: tuples of hyper-parameters, where one is a tensor or
    a graph is made, as vectors."""
    if traced(x):
        return [_vector(x, a) if isinstance(a, tuple) else a for a in distinct(x, args)]
    for a in args:
        if isinstance(a, tuple):
            for value in a:
                if isinstance(value, Tensor):
                    return [_vector(x, a) if _holds_tensor(a) else a for a in args]
    return args


def _holds_tensor(a) -> bool:
    return isinstance(a, tuple) and any(isinstance(v, Tensor) for v in a)


def _vector(x: Tensor, values: tuple) -> Tensor:
    """Hyper-parameters as one float32 vector on the device of ``x``.

    A graph gets it, so that a scheduled value does not recompile it.
    """
    tensors = [
        v.detach().to(x.device, non_blocking=True) if isinstance(v, Tensor) else v for v in values
    ]
    if len(values) == 1 and isinstance(values[0], Tensor):
        return tensors[0].reshape(1)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    # A product, because Dynamo keeps a scheduled number symbolic there, unlike in torch.full
    return torch.stack([(v * one).float() for v in tensors])


def differentiable(
    forward: Callable,
    backward: Callable,
    reference: Callable | None,
    *,
    outputs: int = 1,
    constants: int = 0,
    given: int = 0,
):
    """Tie a forward and a backward into one function of ``(x, *args)``, differentiable in ``x``.

    Args:
        forward: ``(x, *args) -> (*outputs, *saved)``, or the only output.
        backward: ``(*gradients of the outputs, *saved, x, *args) -> gradient of x``.
        reference: ``(x, *args) -> outputs``, the eager formula, used for double backward; None
            where the gradient is not the derivative of the value.
        outputs: how many of the results are outputs.
        constants: so many of the last outputs carry no gradient (a running state).
        given: so many of the first saved results are the backward's own, to be overwritten; if it
            runs again, for the graph was retained, the forward makes them again.
    """

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *args):
            results = forward(x, *args)
            if isinstance(results, Tensor):
                results = (results,)
            found, saved = results[:outputs], results[outputs + given :]
            ctx.given = results[outputs : outputs + given]
            if constants:
                ctx.mark_non_differentiable(*found[-constants:])
            ctx.static = [None if isinstance(a, Tensor) else a for a in args]
            ctx.save_for_backward(x, *saved, *_tensors_of(args))
            return found if outputs > 1 else found[0]

        @staticmethod
        def backward(ctx, *grads):
            x, *rest = ctx.saved_tensors
            grads = grads[: outputs - constants]
            n_saved = len(rest) - len(ctx.static)
            saved, args = rest[:n_saved], _with_tensors(ctx.static, rest[n_saved:])
            if torch.is_grad_enabled():  # create_graph=True
                (grad_x,) = _through_reference(reference, grads, (x,), (x, *args))
            else:
                own = ctx.given
                if given:
                    if own is None:
                        own = forward(x, *args)[outputs : outputs + given]
                    ctx.given = None
                grad_x = backward(*grads, *own, *saved, x, *args)
            return grad_x, *[None] * len(args)

    return Kernel.apply


def differentiable_levels(
    forward: Callable,
    backward: Callable,
    reference: Callable | None,
    n: int,
    *,
    outputs: int = 1,
    constants: int = 0,
):
    """The same for a loss over levels: a function of ``(levels, rest)``, differentiable in the
    first of the n tensors (or None) that each level has.

    Args:
        forward: ``([first of each level], ..., [n-th], *rest) -> (*outputs, *saved)``; the list of
            what is None is empty, and what is saved may be a list with an entry for each level.
        backward: as ``differentiable`` takes it; called for each level that has elements.
        reference: ``(levels, *rest) -> outputs``, used for double backward, or None.
        outputs, constants: see ``differentiable``.
    """

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, n_levels, *args):
            cut = n_levels * n
            # what one level lacks, all of them lack
            lists = [[] if args[k] is None else list(args[k:cut:n]) for k in range(n)]
            results = forward(*lists, *args[cut:])
            found, saved = results[:outputs], results[outputs:]
            if constants:
                ctx.mark_non_differentiable(*found[-constants:])
            ctx.n_levels = n_levels
            # entries of a list, None of what all levels share
            ctx.sizes = [len(s) if isinstance(s, list) else None for s in saved]
            flat = []
            for s in saved:
                flat += s if isinstance(s, list) else (s,)
            ctx.static = [None if isinstance(a, Tensor) else a for a in args]
            ctx.save_for_backward(*flat, *_tensors_of(args))
            return found if outputs > 1 else found[0]

        @staticmethod
        def backward(ctx, *grads):
            tensors = ctx.saved_tensors
            n_saved = len(tensors) - len(ctx.static)
            args = _with_tensors(ctx.static, tensors[n_saved:])
            grads = grads[: outputs - constants]
            cut = ctx.n_levels * n
            levels = [args[k : k + n] for k in range(0, cut, n)]
            if torch.is_grad_enabled():  # create_graph=True
                xs = [level[0] for level in levels]
                grads_x = _through_reference(reference, grads, xs, (levels, *args[cut:]))
            else:
                grads_x = []
                for k, level in enumerate(levels):
                    if level[0].numel() == 0:
                        grads_x.append(torch.empty_like(level[0]))
                        continue
                    of, first = [], 0
                    for size in ctx.sizes:
                        of.append(tensors[first if size is None else first + k])
                        first += 1 if size is None else size
                    grads_x.append(backward(*grads, *of, *level, *args[cut:]))
            result = [None] * len(args)
            result[0:cut:n] = grads_x
            return None, *result

    def run(levels: list[tuple], rest: Sequence):
        flat = [t for level in levels for t in level]
        args = (*flat, *rest)
        if traced(flat[0]):
            args = (args[0], *distinct(args[0], args[1:]))
        return Kernel.apply(len(levels), *args)

    return run


def _tensors_of(args) -> list[Tensor | None]:
    return [a if isinstance(a, Tensor) else None for a in args]


def _with_tensors(static: list, tensors) -> list:
    """The arguments, of which autograd saved the tensors."""
    return [s if t is None else t for s, t in zip(static, tensors, strict=True)]


def distinct(x: Tensor, args: tuple) -> list:
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
    return result


def _through_reference(reference, grads, xs, args):
    if reference is None:
        raise RuntimeError(
            "this loss has an error-driven gradient, which is no derivative of its value: it "
            "cannot be differentiated twice (create_graph=True)"
        )
    outputs = reference(*args)
    outputs = outputs[: len(grads)] if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, xs, grads, create_graph=True)
