"""What a step of a shared loss costs, from 1 to 1024 processes: the model of docs/scaling.md.

    python -m perf.scaling                        # the tables of docs/scaling.md
    python -m perf.scaling --out perf/results/scaling_cpu.csv

``traffic`` is exact and held against the counted bytes; times come from constants. Those of the
local processes are fitted to perf/results/distributed_cpu.csv: the computation to its rows of one
process alone, a collective to the rows that time nothing else. What is left, losses among 2 to 4
processes, is predicted and compared. Times of kernels on a GPU are fitted to those measured on one;
its network is assumed, and said to be.
"""

from __future__ import annotations

import argparse
import csv
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ._measure import write_rows

RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "distributed_cpu.csv"
KERNELS = RESULTS / "kernels_nvidia_h100_80gb_hbm3.csv"
HEADER = 2 * 18 * 8
RANKING = ("rank_sort", "ap", "alrp")


class Message(NamedTuple):
    """One collective; ``size`` is what one process hands in, in bytes."""

    kind: str  # "all_reduce" or "all_gather"
    size: int


def traffic(loss: str, processes: int, positives: int, kernels: bool = False) -> list[Message]:
    """The messages of one step; ``positives`` of the process with most, in one list, delta > 0."""
    total = processes * positives
    header = Message("all_reduce", HEADER)
    if loss not in RANKING:
        if kernels:
            return [header, Message("all_reduce", 2 * 256 * 8)]
        return [header, Message("all_reduce", 256 * 8), Message("all_reduce", 8)]
    if kernels:
        gathered, histogram = 4 * (2 + 3 * positives), 8 * (2 * 2 * total + 1)
    else:
        gathered, histogram = 8 * 3 * positives, 2 * 8 * (1 + 2 * total)
    return [header, Message("all_gather", gathered), Message("all_reduce", histogram)]


def payload(messages: list[Message], processes: int) -> int:
    """Bytes that a process hands to all_reduce and gets from all_gather."""
    return sum(m.size * (processes if m.kind == "all_gather" else 1) for m in messages)


class Computation(NamedTuple):
    """Seconds of a process: a constant, per logit, per positive and per pair of positives."""

    fixed: float
    logit: float
    positive: float
    pair: float

    def seconds(self, logits: float, positives: float) -> float:
        return (
            self.fixed + self.logit * logits + self.positive * positives + self.pair * positives**2
        )


class Network(NamedTuple):
    """A step of a ring or tree takes ``latency`` and the bytes over ``bandwidth``."""

    latency: float
    bandwidth: float  # bytes a second into and out of a process

    def seconds(self, message: Message, processes: int) -> float:
        """Ring, or for small sums a tree: the faster."""
        k, size = processes, message.size
        if k == 1:
            return 0.0
        if message.kind == "all_gather":
            return (k - 1) * (self.latency + size / self.bandwidth)
        ring = 2 * (k - 1) * (self.latency + size / k / self.bandwidth)
        tree = 2 * math.ceil(math.log2(k)) * (self.latency + size / self.bandwidth)
        return min(ring, tree)


# ------------------------------------------------------------------------ local CPU processes


def rows_of(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def least_squares(logits, positives, seconds, pairs: bool = True) -> Computation:
    """By relative error; no constant is negative."""
    logits, positives, seconds = map(np.array, (logits, positives, seconds))
    columns = [np.ones(len(seconds)), logits, positives, positives**2][: 4 if pairs else 3]
    if len(set(positives)) == 1:  # a loss that does not see them
        columns = columns[:2]
    kept = list(range(len(columns)))
    while True:
        a = np.stack([columns[k] for k in kept], 1) / seconds[:, None]
        found = np.linalg.lstsq(a, np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept.pop(int(found.argmin()))
    constants = np.zeros(4)
    constants[kept] = found
    return Computation(*constants.tolist())


def fitted_computation(rows: list[dict], loss: str) -> Computation:
    """To the times of one process alone."""
    mine = [r for r in rows if r["what"] == loss and r["processes"] == "1"]
    return least_squares(
        [float(r["logits"]) for r in mine],
        [float(r["positives"]) for r in mine],
        [float(r["alone_ms"]) / 1e3 for r in mine],
    )


def local_collective(rows: list[dict], processes: int, message: Message) -> float:
    """Between the measured sizes, along the line; below the smallest, as that."""
    mine = [r for r in rows if r["what"] == message.kind and int(r["processes"]) == processes]
    sizes = [float(r["payload_bytes"]) for r in mine]
    return float(np.interp(message.size, sizes, [float(r["step_ms"]) / 1e3 for r in mine]))


class Prediction(NamedTuple):
    """One cell of the measured table beside the model."""

    loss: str
    processes: int
    positives: int
    logits: int
    calls: int
    calls_predicted: int
    bytes: float
    bytes_predicted: int
    step_ms: float
    predicted_ms: float  # from one process alone and single collectives
    given_alone_ms: float  # the same, from the measured time of all processes without process_group


def predictions(path: Path = MEASURED) -> list[Prediction]:
    rows = rows_of(path)
    cells = [r for r in rows if r["logits"]]
    cores = int(rows[0]["cores"])
    fits = {loss: fitted_computation(rows, loss) for loss in {r["what"] for r in cells}}
    result = []
    for r in cells:
        loss, k, p, n = r["what"], *(int(r[c]) for c in ("processes", "positives", "logits"))
        messages, turns = traffic(loss, k, p), max(1, k / cores)
        exchange = 1e3 * sum(local_collective(rows, k, m) for m in messages)
        compute, alone = (1e3 * turns * fits[loss].seconds(n, q) for q in (k * p, p))
        result.append(
            Prediction(
                loss, k, p, n, round(float(r["calls"])), len(messages), float(r["payload_bytes"]),
                payload(messages, k), float(r["step_ms"]), compute + exchange,
                float(r["alone_ms"]) + compute - alone + exchange,
            )
        )  # fmt: skip
    return result


# ------------------------------------------------------------------------------------- GPUs

# Assumed. Up to eight share NVLink; beyond, a 400 Gb/s port each. 20 launches of 5 us.
NEAR, FAR = Network(5e-6, 300e9), Network(15e-6, 45e9)
LAUNCHES = 100e-6


@cache
def on_a_gpu(loss: str) -> Computation:
    """Fitted to the kernels' own times on one GPU, of small and large inputs."""
    wanted = {"loss": loss, "kernel": "all", "dtype": "float32", "inputs": "random"}
    rows = [r for r in rows_of(KERNELS) if all(r[k] == v for k, v in wanted.items())]
    found = least_squares(
        [float(r["rows"]) * float(r["classes"]) for r in rows],
        [float(r["positives"]) if loss in RANKING else 0.0 for r in rows],
        [1e-6 * float(r["us"]) for r in rows],
        pairs=False,
    )
    return found._replace(fixed=found.fixed + LAUNCHES)


def gpu_step(loss: str, processes: int, positives: int, logits: int) -> dict:
    network = NEAR if processes <= 8 else FAR
    messages = traffic(loss, processes, positives, kernels=True)
    total = processes * positives if loss in RANKING else 0
    gpu = on_a_gpu(loss)
    return {
        "logits": 1e3 * gpu.logit * logits,
        "positives": 1e3 * gpu.positive * total,
        "network": 1e3 * sum(network.seconds(m, processes) for m in messages),
        "launches": 1e3 * gpu.fixed,
        "bytes": payload(messages, processes),
    }


def gpu_table(logits: int = 10**6) -> list[str]:
    """Markdown: a million logits on each GPU."""
    lines = [
        "| loss | GPUs | logits | positives | bytes of a GPU | logits, ms | positives, ms | "
        "network, ms | step, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for loss, positives in (("rank_sort", 50), ("rank_sort", 500), ("ghm_c", 0)):
        for processes in (1, 8, 64, 256, 1024):
            step = gpu_step(loss, processes, positives, logits)
            total = sum(step[k] for k in ("logits", "positives", "network", "launches"))
            lines.append(
                f"| {loss} | {processes} | {processes * logits:.0e} | {processes * positives} "
                f"| {step['bytes']:.2g} | {step['logits']:.3f} | {step['positives']:.3g} "
                f"| {step['network']:.2f} | {total:.3g} |"
            )
    return lines


def local_table(found: list[Prediction]) -> list[str]:
    lines = [
        "| processes | cells | measured / predicted: median (least to most) | the same, given the "
        "time without exchange |",
        "|---|---|---|---|",
    ]
    for k in sorted({p.processes for p in found}):
        mine = [p for p in found if p.processes == k]
        shown = []
        for name in ("predicted_ms", "given_alone_ms"):
            ratios = sorted(p.step_ms / getattr(p, name) for p in mine)
            middle = float(np.median(ratios))
            shown.append(f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append(f"| {k} | {len(mine)} | {shown[0]} | {shown[1]} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args()
    found = predictions(options.measured)
    wrong = [p for p in found if (p.calls, p.bytes) != (p.calls_predicted, p.bytes_predicted)]
    for p in wrong:
        print(f"WRONG traffic: {p}")
    print(f"calls and bytes as predicted: {len(found) - len(wrong)} of {len(found)} cells\n")
    print("\n".join([*local_table(found), "", *gpu_table()]))
    for loss in sorted({p.loss for p in found}):
        print(loss, fitted_computation(rows_of(options.measured), loss))
    if options.out:
        write_rows(options.out, [
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in p._asdict().items()}
            for p in found
        ])  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
