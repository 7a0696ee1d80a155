"""Time every loss over anchors, classes, positives and dtypes: ``python -m perf.sweep``.

The anchors grow from 1e3 to 1e7 (1e5 on a CPU) at 80 classes and 200 positives (ranking: 50 to
8000); then other classes, dtypes, layouts and recorded logits at 176000 (22000). A figure is the
median time of the forward, the backward or both, the peak memory, and ``x_floor``, the multiple of
copy speed. A provider is checked against the eager loss in float64 before it is timed; a wrong one
is written down as wrong. Figures go to a long CSV, one line per loss, point, provider and mode,
next to the device, the versions and the commit. A run that was cut off goes on where it stopped,
and a point that takes the process down is written down and passed by.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.utils.benchmark
import triton

import tritonloss as tl

from . import workloads
from ._measure import (
    commit,
    copy_bandwidth,
    cpu_name,
    keep_freed_memory,
    peak_bytes,
    quantiles,
    write_rows,
)
from .workloads import LOSSES, Call, Point

try:
    from tqdm import tqdm
except ImportError:  # a machine for GPU checks may have torch alone

    def tqdm(items, **_):
        return items


PROVIDERS = ("triton", "eager", "compiled", "published")
MODES = {"forward": 1, "backward": 2, "both": 3}  # passes over the logits that have to be
KEY = ("loss", "provider", "mode", *Point._fields)
COLUMNS = (*KEY, "status", "ms", "ms_p20", "ms_p80", "peak_mb", "bytes", "gbps", "floor_ms",
           "x_floor", "copy_gbps", "device", "torch", "triton", "commit", "date")  # fmt: skip
# Bytes in use per byte of logits: gradient, targets and the temporaries of plain autograd.
FOOTPRINT = {"triton": 4, "eager": 24, "compiled": 12, "published": 60}
# Logits times positives (bins): a published loop takes minutes beyond this, with all repetitions.
LARGEST_PUBLISHED = 250_000_000
GATE_LOGITS = 10_000_000
QUICK = ((1000, 10_000), (100_000, 1_000_000))  # anchors on a CPU, on a GPU
RANKING = ("rank_sort", "ap", "alrp")


def points(loss: str, quick: bool, device: str) -> Iterator[Point]:
    """The grid: growth in anchors (ranking: and positives), then the other axes around it.

    A CPU is given the same axes at a tenth of the anchors; a quick sweep is a part of the whole, so
    that the two can be compared.
    """
    columns = LOSSES[loss].classes or 80
    most = 7 if device != "cpu" else 5 if columns == 80 else 6
    several = (50, 500, 2000, 8000) if loss in RANKING else (200,)
    for exponent, positives in itertools.product(range(3, most + 1), several):
        shown = 10**exponent in QUICK[device != "cpu"] and positives in (200, 500)
        if positives * 4 <= 10**exponent and (shown or not quick):
            yield Point(10**exponent, 80, positives)
    rows = 22_000 if device == "cpu" else 176_000  # 8 images of 22k anchors
    for number in (1, 20, 1203) if LOSSES[loss].classes is None and not quick else ():
        yield Point(rows if number < 1203 else rows // 8, number, 500)
    others = [
        ("bfloat16", "random", "nchw"),
        ("bfloat16", "random", "contiguous"),
        ("float16", "random", "contiguous"),
        ("float32", "recorded", "contiguous"),
        ("float32", "initial", "contiguous"),
        ("float32", "random", "nchw"),
    ]
    for dtype, inputs, layout in others[: 1 if quick else None]:
        yield Point(rows, 80, 500, dtype, inputs, layout)


def provide(provider: str, call: Call):
    """``(loss of the logits, backend)`` of a provider."""
    if provider == "triton":
        return call.loss, "triton"
    if provider == "published":  # in float32, as trainers run it: in 16 bits it is wrong
        return (lambda x: call.published(x.float())), "eager"
    loss = call.loss
    if provider == "compiled":
        torch._dynamo.reset()
        # a backward that is timed again and again needs its inputs once more
        torch._functorch.config.donated_buffer = False
        loss = torch.compile(loss, dynamic=False)
    return loss, "eager"


def is_right(loss, backend: str, call: Call) -> bool:
    """Value and gradient against the eager loss of the same logits in float64."""
    with tl.backend("eager"):
        exact = call._replace(x=call.x.detach().double().requires_grad_())
        expected = workloads.value_and_gradient(exact)
    with tl.backend(backend):
        found = workloads.value_and_gradient(call._replace(loss=loss))
    tolerances = (1e-4, 1e-4 if call.x.dtype == torch.float32 else 2e-2)
    for a, b, tolerance in zip(expected, found, tolerances, strict=True):
        error = torch.linalg.vector_norm(a - b.double())
        # Gradients of a mean may lie where float16 has steps of 6e-8, and no relative accuracy.
        steps = torch.finfo(b.dtype).smallest_normal * torch.finfo(b.dtype).eps * b.numel() ** 0.5
        if not error <= tolerance * torch.linalg.vector_norm(a) + steps + 1e-12:
            return False
    return True


def measure(loss, backend: str, call: Call, mode: str, device: str) -> dict:
    x = call.x
    with tl.backend(backend):
        if mode == "backward":
            value = loss(x)

            def function():
                return torch.autograd.grad(value, x, retain_graph=True)
        elif mode == "forward":

            def function():
                return loss(x)
        else:

            def function():
                return torch.autograd.grad(loss(x), x)

        function()
        peak = peak_bytes(function, device) / 1e6
        ms, low, high = quantiles(function, device)
    return {"ms": ms, "ms_p20": low, "ms_p80": high, "peak_mb": peak}


def free_memory(device: str) -> float:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        available = next(line for line in file if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


class Sweep:
    """The CSV being written."""

    def __init__(self, path: Path, device: str):
        self.path, self.device = path, device
        self.running = path.with_suffix(".running")
        if not path.exists():
            write_rows(path, [], COLUMNS)
        with path.open(newline="") as file:
            self.done = {tuple(row[k] for k in KEY) for row in csv.DictReader(file)}
        self.constant = {
            "device": torch.cuda.get_device_name() if device != "cpu" else cpu_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
        }

    def write(self, key: tuple[str, ...], status: str, **figures) -> None:
        row = dict.fromkeys(COLUMNS, "") | dict(zip(KEY, key, strict=True)) | self.constant
        row |= {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in figures.items()}
        row["status"] = status
        write_rows(self.path, [row], COLUMNS, append=True)
        self.done.add(key)

    def bury(self) -> bool:
        """Write down the point that took the last process with it, if there is one."""
        if not self.running.exists():
            return False
        key = tuple(json.loads(self.running.read_text()))
        self.running.unlink()
        for mode in MODES:
            if (key[0], key[1], mode, *key[2:]) not in self.done:
                self.write((key[0], key[1], mode, *key[2:]), "crashed")
        return True


def providers_of(point: Point, quick: bool, device: str) -> list[str]:
    """Compiling takes longer than all the timing: on a CPU and in a quick sweep at a few points."""
    compiled = not quick and device != "cpu"
    if point == Point(point.rows, 80, point.positives):
        sizes = QUICK[device != "cpu"][1:] if quick else (10**3, 10**4, 10**5)
        compiled = compiled or point.rows in sizes
    left_out = {"triton"} if device == "cpu" else set()
    if not compiled:
        left_out |= {"compiled", "published"} if quick else {"compiled"}
    return [p for p in PROVIDERS if p not in left_out]


def work(sweep: Sweep, losses: list[str], quick: bool) -> None:
    """All that is not done yet, in this process."""
    device = sweep.device
    copy = copy_bandwidth(device)
    todo = [
        (loss, point, provider)
        for loss in losses
        for point in points(loss, quick, device)
        for provider in providers_of(point, quick, device)
    ]
    for loss, point, provider in tqdm(todo, disable=None):
        point = point._replace(classes=LOSSES[loss].classes or point.classes)
        keys = {mode: (loss, provider, mode, *map(str, point)) for mode in MODES}
        if all(key in sweep.done for key in keys.values()):
            continue
        sweep.running.write_text(json.dumps([loss, provider, *map(str, point)]))
        outcome, rows = measure_point(loss, point, provider, device)
        if outcome.startswith("failed") and device != "cpu":
            torch.cuda.synchronize()  # an error that stays takes this process down, and no more
        for mode, key in keys.items():
            sweep.write(key, outcome, copy_gbps=copy, **floor(rows.get(mode), point, mode, copy))
        sweep.running.unlink()


def gate_of(point: Point) -> Point:
    """Where a provider is checked: in float64, which takes memory."""
    return point._replace(rows=min(point.rows, max(GATE_LOGITS // point.classes, 1)))


def measure_point(loss: str, point: Point, provider: str, device: str):
    """``(status, figures per mode)``."""
    size = point.logits * getattr(torch, point.dtype).itemsize
    if size * FOOTPRINT[provider] > 0.8 * free_memory(device):
        return "skipped: memory", {}
    turns = point.positives if loss in RANKING else 30 if loss.startswith("ghm") else 1
    if provider == "published" and point.logits * turns > LARGEST_PUBLISHED:
        return "skipped: time", {}
    gated = gate_of(point)
    gate = workloads.call_of(loss, gated, device)
    offered = provide(provider, gate)
    try:
        if not is_right(*offered, gate):
            return "WRONG", {}
        call = gate
        if gated != point:
            call = workloads.call_of(loss, point, device)
            offered = provide(provider, call)
        return "ok", {mode: measure(*offered, call, mode, device) for mode in MODES}
    except torch.OutOfMemoryError:
        return "out of memory", {}
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        return f"failed: {type(error).__name__}: {words}", {}


def floor(figures: dict | None, point: Point, mode: str, copy: float) -> dict:
    """Bytes that have to move, and how far from it the time is."""
    if figures is None:
        return {}
    size = point.logits * getattr(torch, point.dtype).itemsize * MODES[mode]
    lowest = size / copy / 1e6
    return figures | {
        "bytes": size,
        "gbps": size / figures["ms"] / 1e6,
        "floor_ms": lowest,
        "x_floor": figures["ms"] / lowest,
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV; continued if it exists")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few points")
    parser.add_argument("--loss", action="append", choices=LOSSES, help="only this (repeatable)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    losses = args.loss or list(LOSSES)
    if args.worker:
        keep_freed_memory()
        torch.set_num_threads(args.threads)
        work(Sweep(args.out, args.device), losses, args.quick)
        return 0
    # Another process works, and is started again after a point that takes it down.
    command = [sys.executable, "-m", "perf.sweep", "--worker", "--out", str(args.out)]
    command += ["--device", args.device, "--threads", str(args.threads)]
    command += ["--quick"] if args.quick else []
    command += [word for loss in losses for word in ("--loss", loss)]
    while subprocess.run(command).returncode:
        if not Sweep(args.out, args.device).bury():
            return 1
    with args.out.open(newline="") as file:
        wrong = [row for row in csv.DictReader(file) if row["status"] == "WRONG"]
    for row in wrong:
        print("WRONG:", ", ".join(row[k] for k in KEY))
    # The published code may be wrong.
    return int(any(row["provider"] != "published" for row in wrong))


if __name__ == "__main__":
    sys.exit(main())
