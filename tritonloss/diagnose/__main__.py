"""``python -m tritonloss.diagnose LOGITS.npz``: the report of logits in a file."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from . import Diagnosis, recorded
from ._report import Report

ARRAYS = """
arrays of LOGITS.npz:
  logits (or cls_logits)  (..., C), floating; with --class-dim 1 (B, C, H, W), labels (B, H, W)
  labels                  (...), integers: 0..C-1 a class, C background, --ignore-index ignored
  quality                 (...), IoU of the predicted boxes in [0, 1]; optional, read at positives
  targets                 (..., C), floating, instead of labels: > 0 positive, 0 negative, < 0 ignored
  weight                  (...) or (..., C); optional: what is not above 0 does not count
Logits that count have to be finite. Other arrays are not read, but for a name that is nearly one of
these: that is an error.
"""  # noqa: E501


class UsageError(Exception):
    """Printed as one line."""


READ = ("labels", "quality", "targets", "weight")


def _misspelt(names: set[str], found) -> tuple[str, str] | None:
    """An array that would be passed over, and what it was probably meant to be."""
    absent = [name for name in READ if name not in found]
    if "labels" in found or "targets" in found:  # one stands in place of the other
        absent = [name for name in absent if name not in ("labels", "targets")]
    for name in sorted(names - {"logits", "cls_logits", *READ}):
        if close := difflib.get_close_matches(name.lower().strip(" _"), absent, 1, 0.8):
            return name, close[0]
    return None


def load(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of the file that are read here, and the names of the others."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is no .npz archive of named arrays, as numpy.savez writes it")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            logits = "logits" if "logits" in names else "cls_logits"
            wanted = {"logits": logits} | {name: name for name in READ}
            found = {name: file[key] for name, key in wanted.items() if key in names}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        if "pickle" in str(error):
            error = "an array holds Python objects; expected numbers"
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    held = f"{path} holds {', '.join(sorted(names)) or 'nothing'}"
    if wrong := _misspelt(names, found):
        raise UsageError(
            f"{wrong[0]}: looks like '{wrong[1]}' misspelt, and would not be read: rename it, or "
            f"leave it out; {held}"
        )
    if "logits" not in found:
        raise UsageError(f"logits: no array 'logits' or 'cls_logits'; {held}")
    if {"logits", "cls_logits"} <= names:
        raise UsageError(f"logits: both 'logits' and 'cls_logits', of which one is meant; {held}")
    if "labels" in found and "targets" in found:
        raise UsageError(
            f"labels: both 'labels' and dense 'targets', of which one is meant; {held}"
        )
    if "labels" not in found and "targets" not in found:
        raise UsageError(f"labels: neither 'labels' nor dense 'targets'; {held}")
    if "quality" in found and "targets" in found:
        raise UsageError("quality: goes with 'labels'; dense 'targets' hold it already")
    return found, sorted(names - {logits, *found})


def report_of(
    arrays: dict[str, np.ndarray], ignore_index: int, bins: int, class_dim: int
) -> Report:
    """Check the arrays and count them."""
    for name, array in arrays.items():
        kinds, words = ("iu", "integers") if name == "labels" else ("f", "floating")
        if array.dtype.kind not in kinds:
            raise UsageError(f"{name}: must be {words}; got {array.dtype}")
    tensors = {
        name: torch.from_numpy(a.astype(a.dtype.newbyteorder("=") if name == "labels" else "f4"))
        for name, a in arrays.items()
    }
    logits = tensors["logits"]
    targets = tensors.get("targets")
    if targets is None:
        quality = tensors.get("quality")
        if quality is None:  # labels alone are positives of quality 1
            quality = torch.ones(tensors["labels"].shape)
        targets = tensors["labels"], quality
    try:
        diagnosis = Diagnosis(ignore_index=ignore_index)
        diagnosis.update(logits, targets, weight=tensors.get("weight"), class_dim=class_dim)
        report = diagnosis.read(bins=bins)
    except (TypeError, ValueError) as error:
        raise UsageError(re.sub("class_dim[= ]", "--class-dim ", str(error))) from None
    found = report.figures["summary"]
    if found["not_finite"]:
        raise UsageError(f"logits: {found['not_finite']:,} values that count are not finite")
    if not found["negatives"] + found["positives"]:
        raise UsageError(
            f"logits: nothing counts of shape {tuple(logits.shape)}: it is empty, all labels are "
            f"ignored ({ignore_index}), or no weight is above 0"
        )
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tritonloss.diagnose",
        description="What a loss sees of a detector: a page with pictures and figures.",
        epilog=ARRAYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "logits", nargs="?", type=Path, metavar="LOGITS.npz",
        help="logits and targets; default: a recorded detector (NanoDet-g on three photographs)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("diagnosis"), metavar="DIR",
                        help="folder of the page; default: diagnosis")  # fmt: skip
    parser.add_argument("--title", help="of the page; default: the name of the file")
    parser.add_argument("--ignore-index", type=int, default=-1, help="default: -1")
    parser.add_argument("--class-dim", type=int, default=-1,
                        help="where the logits have their classes; default: -1")  # fmt: skip
    parser.add_argument("--bins", type=int, default=30, help="regions of the gradient norm; 30")
    args = parser.parse_args(argv)
    path = args.logits or recorded()
    title = f"Diagnosis of {path.name}"
    if args.logits is None:
        title = "Diagnosis of a recorded detector: NanoDet-g on three photographs"
    try:
        arrays, others = load(path)
        report = report_of(arrays, args.ignore_index, args.bins, args.class_dim)
        page = report.write(args.out, args.title or title)
    except (UsageError, ImportError) as error:
        print(f"tritonloss.diagnose: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        words = f"--out: cannot write into {args.out}: {error.strerror}"
        print(f"tritonloss.diagnose: error: {words}", file=sys.stderr)
        return 2
    print(args.title or title)
    print(f"read: {', '.join(arrays)}" + (f"; not read: {', '.join(others)}" if others else ""))
    print(report)
    print(f"page, pictures and report.json: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
