"""Compare two sweeps: ``python -m perf.compare before.csv after.csv``; exit code 1 if slower.

A point counts as slower if its median grew past the threshold and its p20 lies above the old p80:
noise that overlaps is none.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from .workloads import Point

KEY = ("loss", "provider", "mode", *Point._fields)


def read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return {tuple(row[k] for k in KEY): row for row in rows}


def verdict(before: dict[str, str], after: dict[str, str], threshold: float) -> tuple[str, str]:
    """``(word, ratio)`` of one point."""
    if before["status"] != "ok" or after["status"] != "ok":
        same = before["status"] == after["status"]
        return ("", "") if same else ("CHANGED", f"{before['status']} -> {after['status']}")
    ratio = float(after["ms"]) / float(before["ms"])
    if ratio > threshold and float(after["ms_p20"]) > float(before["ms_p80"]):
        return "SLOWER", f"{ratio:.2f}"
    if ratio < 1 / threshold and float(after["ms_p80"]) < float(before["ms_p20"]):
        return "faster", f"{ratio:.2f}"
    return "", f"{ratio:.2f}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=1.1, help="ratio of medians")
    parser.add_argument("--provider", default="triton", help="whose times decide; 'all' for all")
    args = parser.parse_args(argv)
    before, after = read(args.before), read(args.after)
    slower = 0
    for key in (k for k in before if k in after):
        word, ratio = verdict(before[key], after[key], args.threshold)
        decides = args.provider in ("all", key[1])
        slower += decides and (word == "SLOWER" or (word == "CHANGED" and ratio[:2] == "ok"))
        if word:
            print(f"{word:8} {ratio:>6}  {' '.join(key)}")
    shared = len(before.keys() & after.keys())
    print(f"{shared} points in both, {slower} slower")
    return int(slower > 0 or not shared)


if __name__ == "__main__":
    sys.exit(main())
