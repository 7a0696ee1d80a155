"""Which implementation runs: Triton kernels or eager torch.

The choice is plain Python on the device, the dtype and the active transforms, so that Dynamo
traces and guards it. It is never cached.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import threading

import torch

try:
    from torch.fx.experimental.symbolic_shapes import guard_or_false
except ImportError:  # its name before torch 2.8
    from torch.fx.experimental.symbolic_shapes import definitely_true as guard_or_false

from . import _op
from ._launch import release, triton
from ._op import interpret_asked

KERNELS = (
    "boxes", "diagnose", "distribution", "ghm", "matching", "pointwise", "ranking", "softmax_focal",
)  # fmt: skip


# The oldest pair that compiled the kernels in a test; eager torch works with older ones.
NEEDED = {"torch": (2, 11), "triton": (3, 6)}


def _import_kernels() -> str:
    """Why there are none; empty where there are."""
    if triton is None:
        return "Triton cannot be imported"
    found = {"torch": str(torch.__version__), "triton": triton.__version__}
    if any(release(found[name]) < least for name, least in NEEDED.items()):
        least = " and ".join(f"{n} >= {a}.{b}" for n, (a, b) in NEEDED.items())
        return f"the kernels need {least}; here are " + " and ".join(map(" ".join, found.items()))
    try:
        for name in KERNELS:
            importlib.import_module(f"tritonloss.kernels.{name}")
    except ImportError as error:  # all or none: half of them would fail at the first call
        return f"the kernels cannot be imported ({error})"
    return ""


_NO_KERNELS = _import_kernels()
HAS_TRITON = not _NO_KERNELS
INTERPRET = HAS_TRITON and _op.INTERPRET
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = ("auto", "triton", "eager")

# Tests only: trace the kernels' ops on CPU tensors without running them.
_FORCE_ON_CPU = False


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


class _NoLaunchers:
    """Without Triton nothing asks for a launcher."""

    def __getattr__(self, name: str) -> None:
        return None


def launchers(family: str):
    """The module with the launchers of a family."""
    return sys.modules[f"tritonloss.kernels.{family}"] if HAS_TRITON else _NoLaunchers()


_mode = _outside = _checked(os.environ.get("TRITONLOSS_BACKEND", "auto"), "TRITONLOSS_BACKEND")
_open_blocks: list[list[str]] = []
_lock = threading.Lock()


class backend:
    """Choose the implementation inside a ``with`` block (process-wide, re-entrant).

    Args:
        name: ``"auto"`` takes the Triton kernels for float16, bfloat16 and float32 tensors on a
            CUDA or ROCm device and eager torch for everything else; ``"triton"`` insists on the
            kernels and raises where they cannot run (float64 takes the eager path all the same);
            ``"eager"`` takes plain torch everywhere.

    The environment variable ``TRITONLOSS_BACKEND`` sets the value outside any block.

    Example:
        >>> import torch, tritonloss
        >>> with tritonloss.backend("eager"):
        ...     loss = tritonloss.sigmoid_focal_loss(torch.randn(4, 3), torch.tensor([0, 3, 1, 3]))
    """

    def __init__(self, name: str):
        self.name: str = _checked(name, "backend")
        self._entered: list[list[str]] = []

    def __enter__(self) -> backend:
        global _mode
        block = [self.name]  # a list, to be found again by identity
        self._entered.append(block)
        with _lock:
            _open_blocks.append(block)
            _mode = self.name
        return self

    def __exit__(self, *exc: object) -> None:
        global _mode
        block = self._entered.pop()
        with _lock:
            # Blocks of several threads may end in any order
            _open_blocks[:] = [b for b in _open_blocks if b is not block]
            _mode = _open_blocks[-1][0] if _open_blocks else _outside


def _transforms_active() -> bool:
    # peek_interpreter_stack() would answer wrongly under Dynamo.
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def not_empty(x: torch.Tensor) -> bool:
    """True if there is something to launch a kernel for.

    False for as many rows as a mask has True in a graph, which nothing knows while it is traced:
    the formula needs no such number.
    """
    if not torch.compiler.is_compiling():
        return x.numel() > 0
    return guard_or_false(x.numel() > 0)


def is_empty(x: torch.Tensor) -> bool:
    """True if there is nothing; both are False for a size that nothing knows."""
    if not torch.compiler.is_compiling():
        return x.numel() == 0
    return guard_or_false(x.numel() == 0)


def use_triton(x: torch.Tensor) -> bool:
    """True if the kernels take ``x``; raises where an explicit ``"triton"`` cannot run."""
    if _mode == "eager" or x.dtype not in KERNEL_DTYPES:
        return False
    on_device = HAS_TRITON and (x.is_cuda or _FORCE_ON_CPU)
    if _mode == "auto":
        return on_device and not _transforms_active()
    if not HAS_TRITON:
        raise RuntimeError(f"backend 'triton' was asked for, but {_NO_KERNELS}")
    if not on_device and not (INTERPRET and x.device.type == "cpu"):
        raise RuntimeError(
            f"backend 'triton' was asked for, but the tensor is on {x.device}: the kernels run on "
            "CUDA or ROCm devices (and on CPU tensors if TRITON_INTERPRET=1 is set before Python "
            f"starts{', not after tritonloss was imported' if interpret_asked() else ''})"
        )
    if _transforms_active():
        raise RuntimeError(
            "backend 'triton' was asked for, but the kernels do not run under torch.func "
            "transforms or forward-mode AD: use backend 'auto' or 'eager' there"
        )
    return True


def show_config() -> str:
    """Versions, device, chosen backend and why, as a printable text.

    Example:
        >>> import tritonloss
        >>> print(tritonloss.show_config())  # doctest: +ELLIPSIS
        tritonloss ...
    """
    from ._version import __version__

    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} ({'ROCm' if torch.version.hip else 'CUDA'})"
    else:
        device = "no CUDA or ROCm device"
    if not HAS_TRITON:
        why = f"eager torch: {_NO_KERNELS}"
    elif _mode == "eager":
        why = "eager torch: asked for"
    elif _mode == "triton":
        why = "Triton kernels: asked for" + (", interpreted on the CPU" if INTERPRET else "")
    elif torch.cuda.is_available():
        why = "Triton kernels for 16- and 32-bit GPU tensors, eager torch for the rest"
    else:
        why = "eager torch: no CUDA or ROCm device"
    return "\n".join(
        [
            f"tritonloss {__version__}",
            f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
            f"torch      {torch.__version__}",
            f"triton     {triton.__version__ if triton else 'not installed'}"
            + (" (interpreting)" if INTERPRET else ""),
            f"device     {device}",
            f"backend    {_mode} -> {why}",
        ]
    )
