"""Where the slowest kernels lose their time: ``python -m perf.profile SWEEP.csv --out DIR``.

Takes the points of a GPU sweep that are furthest from the floor, one a loss, and runs forward and
backward of each once under Nsight Compute (``ncu``). ``DIR/profile_*.csv`` holds what it read, and
``DIR/profile.txt`` a line for each kernel.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ._measure import ROOT, cuda_tool
from .workloads import Point

SMALLEST = 10_000_000  # logits: below, launches take the time
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats")
# In base units: nanoseconds, bytes a second, percent.
TIME = "gpu__time_duration.sum"
TRAFFIC = "dram__bytes.sum.per_second"
FIGURES = {
    "dram %": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm %": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
STALL = re.compile(r"issue_stalled_(\w+?)(?:_not_issued)?(?:_per_\w+)?\.")


class NoCounters(Exception):
    """Nsight Compute cannot be used here."""


def slowest(rows: Iterable[dict[str, str]], number: int) -> list[tuple[str, Point, float]]:
    """``(loss, point, x floor)`` of the kernels' slowest points, one a loss, the slowest first."""
    timed = ("ok", "triton", "both")
    found = [
        (row["loss"], point_of(row), float(row["x_floor"]))
        for row in rows
        if (row["status"], row["provider"], row["mode"]) == timed
    ]
    worst = {}
    for candidate in sorted(found, key=lambda f: -f[2]):
        if candidate[1].logits >= SMALLEST:
            worst.setdefault(candidate[0], candidate)
    return list(worst.values())[:number]


def point_of(row: dict[str, str]) -> Point:
    return Point(*map(int, (row["rows"], row["classes"], row["positives"])),
                 row["dtype"], row["inputs"], row["layout"])  # fmt: skip


def find_ncu() -> str:
    """The profiler's path."""
    found = cuda_tool("ncu")
    if found is None:
        raise NoCounters("ncu is absent")
    return found


def profile(ncu: str, loss: str, point: Point, log: Path) -> None:
    """Run a point under the profiler; what it read goes to ``log``."""
    command = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--csv"]
    command += ["--page", "raw", "--print-units", "base"]
    command += ["--log-file", str(log), "--force-overwrite"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += [sys.executable, "-m", "perf.profile", "--run", json.dumps([loss, *point])]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    words = (log.read_text(errors="replace") if log.exists() else "") + ended.stdout + ended.stderr
    errors = [line for line in words.splitlines() if line.startswith("==ERROR==")]
    if errors:
        raise NoCounters(errors[0].removeprefix("==ERROR==").strip())
    if ended.returncode:
        last = (words.strip().splitlines() or [""])[-1]
        raise SystemExit(f"{loss}: ncu, or what it ran, ended with {ended.returncode}: {last}")


def kernels(text: str) -> Iterator[dict[str, str]]:
    """The metrics of each launch, from ncu's raw page: names, units, then a line a launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches = csv.DictReader(lines)
    next(launches, None)  # units
    yield from launches


def number(words: str | None) -> float | None:
    """``1,234.5`` as a float; None for what was not read."""
    try:
        return float((words or "").replace(",", ""))
    except ValueError:
        return None


def line_of(launch: dict[str, str]) -> str:
    """Name, microseconds, megabytes, the figures, and what warps wait for most."""
    time, traffic = number(launch.get(TIME)), number(launch.get(TRAFFIC))
    moved = None if None in (time, traffic) else time * traffic / 1e15
    values = [None if time is None else time / 1e3, moved]
    values += [number(launch.get(name)) for name in FIGURES.values()]
    stalls = {
        match[1]: number(value) or 0.0
        for name, value in launch.items()
        if name and (match := STALL.search(name))
    }
    words = "".join(f"{'-' if v is None else format(v, '.1f'):>13}" for v in values)
    return f"{launch['Kernel Name'][:40]:40}{words}  {max(stalls, key=stalls.get, default='-')}"


def run_once(loss: str, point: Point) -> None:
    """Forward and backward; the profiler sees the last of several."""
    import torch

    from . import workloads

    call = workloads.call_of(loss, point, "cuda")
    for _ in range(3):
        workloads.value_and_gradient(call)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    workloads.value_and_gradient(call)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profiled(sweep: Path, out: Path, points: int) -> None:
    """Profile the slowest points of a sweep, and print and write what was found."""
    with sweep.open(newline="") as file:
        chosen = slowest(csv.DictReader(file), points)
    if not chosen:
        raise NoCounters(f"{sweep.name} times no kernel at {SMALLEST:,} logits or more")
    ncu = find_ncu()
    out.mkdir(parents=True, exist_ok=True)
    head = f"{'kernel':40}" + "".join(f"{name:>13}" for name in ("us", "MB", *FIGURES))
    lines = []
    for loss, point, times in chosen:
        log = out / f"profile_{loss}.csv"
        profile(ncu, loss, point, log)
        launches = map(line_of, kernels(log.read_text()))
        lines += [f"{loss} at {' '.join(map(str, point))}: {times:.2f} x floor"]
        lines += [f"{head}  waits for", *launches, ""]
    text = "\n".join(lines)
    (out / "profile.txt").write_text(text)
    print(text)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, nargs="?", help="CSV of perf.sweep on this GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "profile")
    parser.add_argument("--points", type=int, default=3, help="how many")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        loss, *point = json.loads(args.run)
        run_once(loss, Point(*point))
        return 0
    if args.sweep is None or not args.sweep.is_file():
        parser.error(f"SWEEP.csv has to be a sweep that perf.sweep wrote; got {args.sweep}")
    try:
        profiled(args.sweep, args.out, args.points)
    except NoCounters as reason:
        print(f"no profile: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
