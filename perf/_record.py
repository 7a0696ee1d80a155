"""Get hold of kernel launches, so that no kernel's arguments are typed twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tritonloss import _dispatch, _launch


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
def _kernels_on_cpu(place, name: str, stand_in):
    """Losses of CPU or meta tensors take the kernels' path, with something in place of Triton's."""
    with (
        mock.patch.object(place, name, stand_in),
        mock.patch.object(_launch, "known", {}),  # binaries that ran before
        mock.patch.object(_dispatch, "_FORCE_ON_CPU", True),
    ):
        yield


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

    with _kernels_on_cpu(JITFunction, "run", run):
        yield


@contextmanager
def recorded_launches():
    """Launches land in the list and do not run."""
    launches: list[Launch] = []
    with replaced_launches(launches.append):
        yield launches


class _Launcher:
    """What a binary is launched by."""

    # of all: Triton keeps binaries and their launchers
    handle: Callable = print

    def __init__(self, src, metadata):
        self.binary = metadata.name, metadata.hash

    def __call__(self, x, y, z, stream, function, metadata, launch, enter, leave, *args):
        if enter is not None:
            enter(launch)
        _Launcher.handle(*self.binary, (x, y, z), args)
        if leave is not None:
            leave(launch)


def sm_90() -> SimpleNamespace:
    """What Triton asks of the driver of such a GPU."""
    properties = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        # no number: Triton keeps what it compiled by device
        get_current_device=lambda: "fake",
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
        utils=SimpleNamespace(
            # module, function, registers, spills, most threads of a block
            load_binary=lambda *args: (0, 0, 0, 0, 1024),
            get_device_properties=lambda device: properties,
        ),
        launcher_cls=_Launcher,
    )


@contextmanager
def fake_driver(handle: Callable[[str, str, tuple, tuple], None]):
    """Losses of CPU tensors take the kernels' path, compiled for sm_90; launches end where the
    driver would begin, and ``handle`` gets the binary's name and hash, the grid, the arguments."""
    with (
        _kernels_on_cpu(triton.runtime.driver, "_active", sm_90()),
        mock.patch.object(_Launcher, "handle", handle),
    ):
        yield
