"""Launches of kernels that cost the host a third of Triton's own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MOST = 4096  # keys that a kernel remembers
# On ROCm it counts how large the memory behind a pointer is, too: Triton's own way.
REMEMBERS = torch.version.hip is None


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
        if found is not None and not self.kernel.pre_run_hooks:
            binary, rest = found
            binary[(*grid, 1, 1)](*args, *rest)
            return
        binary = self.kernel[grid](*args, **constants)
        if binary is not None:  # a stand-in for Triton's launch returns nothing
            if len(self.known) >= MOST:
                self.known.clear()
            names = self.kernel.arg_names[len(args) :]
            self.known[key] = binary, tuple(constants[name] for name in names)


known: dict[int, Remembering] = {}  # by the identity of kernels, which live as long as their module


def remembering(kernel):
    """The kernel, to be launched as ``kernel[grid](...)``."""
    if not REMEMBERS:
        return kernel
    found = known.get(id(kernel))
    if found is None:
        found = known[id(kernel)] = Remembering(kernel)
    return found
