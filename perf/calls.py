"""The way from a public function to its launches, and its time: ``python -m perf.calls``.

For 64 anchors of 80 classes with 8 positives: Python calls within this package, and how often the
next one stands in another file than the last; then launches of a forward and its backward, and the
microseconds that they take the host, fastest of many rounds: by Triton's own launches, and by those
that remember their binaries. CPU tensors stand in for a GPU's and the driver is a stand-in, so that
allocations and the driver's part of a launch are not those of a GPU. Read ratios. ``--write`` puts
the table into ``results/host_cpu.csv``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from unittest import mock

import torch
import triton

from tritonloss import _checks, _launch

from ._measure import ROOT, machine, write_rows
from ._record import fake_driver, recorded_launches
from .workloads import LOSSES, Point, call_of

TABLE = ROOT / "perf" / "results" / "host_cpu.csv"
PACKAGES = (str(ROOT / "tritonloss"), str(ROOT / "kernels"))


def way(function) -> tuple[int, int]:
    """``(calls, moves between files)`` until the first launch."""
    files = []

    def watch(frame, event, _):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGES) and not launches:
            files.append(name)

    with recorded_launches() as launches:
        function()  # what is remembered from step to step
        launches.clear()
        sys.setprofile(watch)
        try:
            function()
        finally:
            sys.setprofile(None)
    return len(files), sum(a != b for a, b in itertools.pairwise(files))


def microseconds(function, rounds: int) -> float:
    """Of the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
    return 1e6 * best


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", action="append", choices=LOSSES, help="only this (repeatable)")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--write", action="store_true", help="write the committed table")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for loss in args.loss or LOSSES:
        call = call_of(loss, Point(64, 80, 8), "cpu")

        def forward(call=call):
            return call.loss(call.x)

        def step(call=call):
            call.x.grad = None
            call.loss(call.x).backward()

        found = way(forward)
        # values are looked at on a CPU alone
        launches = itertools.count()
        driver = fake_driver(lambda *binary, launches=launches: next(launches))
        with driver, mock.patch.object(_checks, "values_checked", lambda x: 0):
            step()  # compiles
            n = next(launches)
            with mock.patch.object(_launch, "REMEMBERS", False):
                by_triton = microseconds(step, args.rounds)
            us = microseconds(step, args.rounds)
        row = {"loss": loss, "calls": found[0], "moves": found[1], "launches": n}
        row |= {"by_triton_us": f"{by_triton:.1f}", "us": f"{us:.1f}"}
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append(row | machine() | {"triton": triton.__version__})
    if args.write:
        write_rows(TABLE, rows)


if __name__ == "__main__":
    main()
