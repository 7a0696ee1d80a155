"""The way from a public function to its first launch: ``python -m perf.calls``.

Python calls within this package, how often the next one stands in another file than the last, and
microseconds of the host for the whole forward with its launches left out (fastest of many rounds;
read ratios), for 64 anchors of 80 classes with 8 positives. Nothing has to be compiled: launches
are recorded on CPU tensors.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time

import torch

from ._measure import ROOT
from ._record import recorded_launches
from .workloads import LOSSES, Point, call_of

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
    best = float("inf")
    with recorded_launches() as launches:
        for _ in range(rounds):
            launches.clear()
            began = time.perf_counter()
            function()
            best = min(best, time.perf_counter() - began)
    return 1e6 * best


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", action="append", choices=LOSSES, help="only this (repeatable)")
    parser.add_argument("--rounds", type=int, default=500)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{'loss':22}{'calls':>6}{'moves':>6}{'us':>8}")
    for loss in args.loss or LOSSES:
        call = call_of(loss, Point(64, 80, 8), "cpu")

        def forward(call=call):
            return call.loss(call.x)

        forward_way, us = way(forward), microseconds(forward, args.rounds)
        print(f"{loss:22}{forward_way[0]:>6}{forward_way[1]:>6}{us:>8.1f}")


if __name__ == "__main__":
    main()
