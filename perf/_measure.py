"""One way to time, to describe the machine, to refuse a wrong candidate, and to write a CSV."""

from __future__ import annotations

import csv
import ctypes
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.utils.benchmark

ROOT = Path(__file__).parent.parent


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as the allocators do that are recommended for torch on CPUs.

    A page that is new to the process costs about as much as the maths on it; whether a call gets
    some is chance otherwise, and a candidate's time that of the one before it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def quantiles(function, device: str) -> tuple[float, float, float]:
    """Median, p20 and p80 in milliseconds; the L2 cache is cold on a GPU."""
    if device != "cpu":
        import triton

        return tuple(triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8]))
    timer = torch.utils.benchmark.Timer("f()", globals={"f": function})
    timer.timeit(2)
    times = sorted(1e3 * t for t in timer.blocked_autorange(min_run_time=0.2).times)
    if len(times) < 5:
        times = sorted(1e3 * timer.timeit(1).median for _ in range(5))
    return statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5]


def copy_bandwidth(device: str) -> float:
    """GB/s of a copy, read and write counted."""
    source = torch.empty((512 if device != "cpu" else 64) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms, *_ = quantiles(lambda: target.copy_(source), device)
    return 2 * source.numel() / ms / 1e6


def timed_in_turn(candidates: dict, rounds: int) -> dict:
    """Name -> times of the rounds; a candidate is a function that returns its own time.

    Round after round, so that what changes the machine's speed hits all of them: read the ratios.
    """
    keep_freed_memory()
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(run())
    return times


def gate(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """A wrong candidate is not timed."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    if not error <= tolerance:
        raise SystemExit(f"{name}: relative error {error:.1e} > {tolerance:.0e}, not timed")


def peak_bytes(function, device: str) -> int:
    """Most memory in use during a call above what was before; on the CPU resident, in pages."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def peak_tensor_bytes(function) -> int:
    """Most memory of CPU tensors during a call above what was before, as torch hands it out.

    Unlike resident memory it does not depend on what earlier calls left in the allocator.
    """
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    most = used = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        used += change
        most = max(most, used)
    return most


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def cuda_tool(name: str) -> str | None:
    """Path of a tool of CUDA or of Nsight Compute, if it is installed."""
    places = [shutil.which(name), f"/usr/local/cuda/bin/{name}"]
    places += sorted(map(str, Path("/opt/nvidia").glob(f"nsight-compute/*/{name}")), reverse=True)
    return next((place for place in places if place and Path(place).exists()), None)


def commit() -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def device_name(device: str) -> str:
    name = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    return "".join(c if c.isalnum() else "_" for c in name).lower()


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else 'CPU'}, {threads} thread{'s' * (threads > 1)}"


def machine(device: str = "cpu") -> dict[str, str]:
    """Columns that say where a figure comes from."""
    return {
        "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def write_rows(
    path: Path,
    rows: Iterable[dict],
    columns: Iterable[str] | None = None,
    *,
    append: bool = False,
) -> None:
    """A CSV of rows with the same keys; ``append``: behind what the file has."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not append or not path.exists()
    with path.open("w" if new else "a", newline="") as file:
        writer = csv.DictWriter(file, list(columns or rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
