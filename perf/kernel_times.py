"""Time of each kernel of a loss, forward and backward: ``python -m perf.kernel_times --out CSV``.

The host is left out: torch's profiler reads the GPU's own clock around every kernel, so that the
figures of small inputs are not those of launching. Inputs are 176000 anchors (8 images) of 80
classes (17 bins, 4 sides), larger than the L2 cache; the options take others. ``us`` is the time of
a kernel, ``x_floor`` the same as a multiple of reading the logits twice and writing them once at
copy speed. The line ``host`` is the other half: microseconds of Python and launching for a call on
1000 anchors.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import triton

import tritonloss as tl

from . import workloads
from ._measure import commit, copy_bandwidth, write_rows
from .workloads import LOSSES, Point

COLUMNS = ("loss", *Point._fields, "kernel", "launches", "us", "share", "x_floor", "device",
           "torch", "triton", "commit")  # fmt: skip
REPETITIONS = 15


def kernel_times(call: workloads.Call) -> dict[str, list[float]]:
    """Microseconds of each launch of each kernel in one forward and backward, medians."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        workloads.value_and_gradient(call)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPETITIONS):
            workloads.value_and_gradient(call)
        torch.cuda.synchronize()
    found = defaultdict(list)
    events = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    for event in sorted(events, key=lambda e: e.time_range.start):
        found[event.name].append(event.device_time)
    # the launches of a kernel have times of their own: those of the forward and of the backward
    return {
        name: [statistics.median(times[k::each]) for k in range(each)]
        for name, times in found.items()
        if (each := len(times) // REPETITIONS)
    }


def host_time(call: workloads.Call, calls: int = 200) -> float:
    """Microseconds that the host takes for a forward and backward whose kernels are short."""
    for _ in range(20):
        workloads.value_and_gradient(call)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        workloads.value_and_gradient(call)
    ended = time.perf_counter()
    torch.cuda.synchronize()
    return (ended - begin) / calls * 1e6


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV to write or to go on with")
    parser.add_argument("--loss", action="append", choices=LOSSES, help="only this (repeatable)")
    parser.add_argument("--rows", type=int, default=176_000, help="anchors: 8 images of 22k")
    parser.add_argument("--positives", type=int, action="append", help="default 500")
    parser.add_argument("--dtype", action="append", help="default float32")
    parser.add_argument("--inputs", action="append", help="random, recorded or initial")
    parser.add_argument("--layout", default="contiguous")
    args = parser.parse_args(argv)
    copy = copy_bandwidth("cuda")
    versions = (torch.cuda.get_device_name(), torch.__version__, triton.__version__,
                commit())  # fmt: skip
    grid = itertools.product(
        args.loss or LOSSES,
        args.positives or [500],
        args.dtype or ["float32"],
        args.inputs or ["random"],
    )
    for loss, positives, dtype, inputs in grid:
        classes = LOSSES[loss].classes or 80
        point = Point(args.rows, classes, positives, dtype, inputs, args.layout)
        with tl.backend("triton"):
            times = kernel_times(workloads.call_of(loss, point, "cuda"))
            host = host_time(workloads.call_of(loss, point._replace(rows=1000), "cuda"))
        total = sum(map(sum, times.values()))
        floor = 3e-3 * point.logits * getattr(torch, dtype).itemsize / copy
        lines = sorted(times.items(), key=lambda item: -sum(item[1]))
        lines += [("all", [us for each in times.values() for us in each])]
        print(loss, *point, flush=True)
        rows = []
        for name, each in [*lines, ("host", [host])]:
            us = sum(each)
            rows.append(dict(zip(
                COLUMNS,
                (loss, *point, name, len(each) if name != "host" else 0, f"{us:.2f}",
                 f"{us / total:.3f}", f"{us / floor:.3f}", *versions), strict=True)))  # fmt: skip
            apart = " + ".join(f"{us:.1f}" for us in each) if 1 < len(each) < 5 else ""
            print(f"    {us:10.1f} us  {us / floor:7.3f} x floor  {name[:60]}  {apart}")
        write_rows(args.out, rows, COLUMNS, append=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
