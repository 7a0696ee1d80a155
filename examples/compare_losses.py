"""Train the small detector with each loss, same steps and seed; write AP40 and AP50 as a table.

    python examples/compare_losses.py --data digits --out digits.csv

One process per loss; losses that the file already holds are not trained again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from detection.losses import LOSSES
from tqdm import tqdm

HERE = Path(__file__).parent
RUNS = {name: ["--loss", name] for name in LOSSES}
RUNS |= {f"{name}, pisa": ["--loss", name, "--pisa"] for name in ("gfl", "focal")}
COLUMNS = ("data", "loss", "steps", "seed", "AP40", "AP50", "torch")


def train(name: str, options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, HERE / "train_detector.py", *RUNS[name], "--out", folder]
        command += ["--data", options.data, "--seed", str(options.seed)]
        command += ["--steps", str(options.steps)] if options.steps else []
        command += ["--threads", str(options.threads)] if options.threads else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    return {
        "data": options.data,
        "loss": name,
        "steps": metrics["config"]["steps"],
        "seed": options.seed,
        "AP40": f"{metrics['AP']['AP40']:.3f}",
        "AP50": f"{metrics['AP']['AP50']:.3f}",
        "torch": metrics["versions"]["torch"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("trees", "digits"), default="digits")
    parser.add_argument("--loss", action="append", choices=RUNS, help="only this (repeatable)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True, help="CSV; continued if it exists")
    options = parser.parse_args()
    rows = []
    if options.out.exists():
        with options.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(r["data"], r["loss"], int(r["seed"])) for r in rows}
    wanted = options.loss or list(RUNS)
    for name in tqdm([n for n in wanted if (options.data, n, options.seed) not in done]):
        rows.append(train(name, options))
        rows.sort(key=lambda row: (row["data"], list(RUNS).index(row["loss"]), int(row["seed"])))
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        print(f"{row['data']:8} {row['loss']:14} AP40 {row['AP40']}  AP50 {row['AP50']}")


if __name__ == "__main__":
    main()
