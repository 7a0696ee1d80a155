"""``python -m tritonloss.diagnose LOGITS.npz``: the report of logits in a file."""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from . import Diagnosis, recorded
from ._report import Report

ARRAYS = """
arrays of LOGITS.npz:
  logits (or cls_logits)  (..., C), floating
  labels                  (...), integers: 0..C-1 a class, C background, --ignore-index ignored
  quality                 (...), IoU of the predicted boxes in [0, 1]; optional, read at positives
  targets                 (..., C), floating, instead of labels: > 0 positive, 0 negative, < 0 ignored
  weight                  (...) or (..., C); optional: what is not above 0 does not count
"""  # noqa: E501


class UsageError(Exception):
    """Printed as one line."""


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file that are read here."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UsageError(f"{path} holds a single array; expected an .npz of named arrays")
            names = set(file.files)
            logits = "logits" if "logits" in names else "cls_logits"
            wanted = {"logits": logits} | {k: k for k in ("labels", "quality", "targets", "weight")}
            found = {name: file[key] for name, key in wanted.items() if key in names}
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    held = f"{path} holds {', '.join(sorted(names)) or 'nothing'}"
    if "logits" not in found:
        raise UsageError(f"logits: no array 'logits' or 'cls_logits'; {held}")
    if ("labels" in found) == ("targets" in found):
        raise UsageError(f"labels: expected either 'labels' or dense 'targets'; {held}")
    if "quality" in found and "targets" in found:
        raise UsageError("quality: goes with 'labels'; dense 'targets' hold it already")
    return found


def report_of(arrays: dict[str, np.ndarray], ignore_index: int, bins: int) -> Report:
    """Check the arrays and count them."""
    for name, array in arrays.items():
        kinds, words = ("iu", "integers") if name == "labels" else ("f", "floating")
        if array.dtype.kind not in kinds:
            raise UsageError(f"{name}: must be {words}; got {array.dtype}")
    tensors = {
        name: torch.from_numpy(a.astype(np.int64 if name == "labels" else np.float32))
        for name, a in arrays.items()
    }
    logits = tensors["logits"]
    if not logits.numel():
        raise UsageError(f"logits: holds no values; its shape is {tuple(logits.shape)}")
    if not logits.isfinite().all():
        raise UsageError(f"logits: {int((~logits.isfinite()).sum()):,} values are not finite")
    targets = tensors.get("targets")
    if targets is None:
        quality = tensors.get("quality")
        if quality is None:  # labels alone are positives of quality 1
            quality = torch.ones(tensors["labels"].shape)
        targets = tensors["labels"], quality
    try:
        diagnosis = Diagnosis(ignore_index=ignore_index)
        diagnosis.update(logits, targets, weight=tensors.get("weight"))
        return diagnosis.read(bins=bins)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None


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
    parser.add_argument("--bins", type=int, default=30, help="regions of the gradient norm; 30")
    args = parser.parse_args(argv)
    path = args.logits or recorded()
    try:
        report = report_of(load(path), args.ignore_index, args.bins)
        page = report.write(args.out, args.title or f"Diagnosis of {path.name}")
    except (UsageError, ImportError) as error:
        print(f"tritonloss.diagnose: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tritonloss.diagnose: error: --out: {error}", file=sys.stderr)
        return 2
    print(report)
    print(f"page, pictures and report.json: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
