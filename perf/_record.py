"""Get hold of kernel launches, so that no kernel's arguments are typed twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import JITFunction

from tritonloss import _dispatch


@dataclass(frozen=True)
class Launch:
    """One ``kernel[grid](...)``: its arguments by name and its compiler options."""

    kernel: JITFunction
    grid: tuple
    args: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextmanager
def replaced_launches(handle: Callable[[Launch], None]):
    """Losses of CPU or meta tensors take the kernels' path; ``handle`` gets each launch."""

    def run(kernel, *args, grid, warmup, **kwargs):
        names = kernel.arg_names
        bound = dict(zip(names, args, strict=False))
        known = set(names)  # asking a list would cost what a host's time is measured against
        bound |= {k: v for k, v in kwargs.items() if k in known}
        options = {k: v for k, v in kwargs.items() if k not in known}
        handle(Launch(kernel, grid, bound, options))

    run_before, force_before = JITFunction.run, _dispatch._FORCE_ON_CPU
    JITFunction.run, _dispatch._FORCE_ON_CPU = run, True
    try:
        yield
    finally:
        JITFunction.run, _dispatch._FORCE_ON_CPU = run_before, force_before


@contextmanager
def recorded_launches():
    """Launches land in the list and do not run."""
    launches: list[Launch] = []
    with replaced_launches(launches.append):
        yield launches
