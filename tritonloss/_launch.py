"""Launches of kernels that cost the host a third of Triton's own."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # no launchers
    triton = None


def release(version: str) -> tuple[int, ...]:
    """(2, 11) of 2.11.0+cu130."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


MOST = 4096  # keys that a kernel remembers
# On ROCm it counts how large the memory behind a pointer is, too; and only these releases are known
# to take what ``Remembering.launch`` gives a binary. Else launches are Triton's own.
REMEMBERS = (
    triton is not None
    and torch.version.hip is None
    and (3, 6) <= release(triton.__version__) <= (3, 9)
)


class Remembering:
    """Launches a kernel as Triton does, and remembers which binary ran.

    Triton looks at each argument in turn, 10 to 60 of them, to find the binary that was compiled
    for such. On CUDA what decides is of a pointer its dtype and whether it is aligned, of an
    integer whether it is 1, a multiple of 16 or wide, of a float nothing, and all constants and
    options. Here integers count by their value: a key that is finer than Triton's never finds
    another binary than Triton would. What a kernel reads of its module does not change.
    """

    __slots__ = ("kernel", "known")

    def __init__(self, kernel):
        self.kernel, self.known = kernel, {}

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple, *args, **constants):
        """``args``: pointers, at least one, then integers, then floats; the first decides the
        device, which is the current one."""
        kinds, aligned = [], 0
        for a in args:
            if a is None:
                kinds.append(a)
            elif isinstance(a, Tensor):
                kinds.append(a.dtype)
                aligned |= a.data_ptr()
            else:
                break
        first, last = len(kinds), len(args)
        while type(args[last - 1]) is float:  # a scheduled value is another one at each step
            last -= 1
        if aligned & 15:  # seldom, and then it matters whose
            kinds += [a is not None and a.data_ptr() & 15 for a in args[:first]]
        device = args[0].get_device()
        key = (device, *kinds, args[first:last], *constants.items())
        found = self.known.get(key)
        if self.kernel.pre_run_hooks or _watched():
            self.kernel[grid](*args, **constants)
        elif found is None:
            self.remember(key, self.kernel[grid](*args, **constants), len(args), constants)
        else:
            run, function, metadata, rest = found
            stream = triton.runtime.driver.active.get_current_stream(device)
            x, y, *_ = *grid, 1
            run(x, y, 1, stream, function, metadata, None, None, None, *args, *rest)

    def remember(self, key: tuple, binary, n_args: int, constants: dict) -> None:
        if binary is None:  # of a stand-in for Triton's launch
            return
        if len(self.known) >= MOST:
            self.known.clear()
        rest = tuple(constants[name] for name in self.kernel.arg_names[n_args:])
        self.known[key] = binary.run, binary.function, binary.packed_metadata, rest


def _watched() -> bool:
    """Whether somebody looks at launches, such as a profiler: Triton tells them."""
    runtime = triton.knobs.runtime
    # a function may stand in the place of the list of them
    enter = getattr(runtime.launch_enter_hook, "calls", True)
    return enter or getattr(runtime.launch_exit_hook, "calls", True)


known: dict[int, Remembering] = {}  # by the identity of kernels, which live as long as their module


def remembering(kernel):
    """The kernel, to be launched as ``kernel[grid](...)``."""
    if not REMEMBERS:
        return kernel
    found = known.get(id(kernel))
    if found is None:
        found = known[id(kernel)] = Remembering(kernel)
    return found
