"""Ranking losses on the CPU beside what users run today: time, error, memory.

    python -m perf.bench_ranking_cpu                 # all cells, one thread
    python -m perf.bench_ranking_cpu --losses rank_sort --logits 1e5

Flat logits of deviation 2, with 100, 300 and 1000 positives of quality 0.1 to 1 among 1e5 and 1e6
negatives. Figures: the median time of forward and backward, as a multiple of ours, too, and the
error of the gradient beside the loop's; `--growth` and `--memory` have ours up to 1e7 logits and up
to 30,000 positives. Every cell is first checked against the per-positive loop; a disagreement stops
the run. Ratios hold within one run: the machine's speed changes between runs.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from tritonloss.losses import ranking

from . import baselines
from ._measure import peak_bytes, write_rows

HERE = Path(__file__).parent
# The loop over positives takes seconds at 1e6 logits: timed up to here.
LOOP_PAIRS = 3.1e8


def make(n_pos: int, n_neg: int):
    g = torch.Generator().manual_seed(0)
    n = n_pos + n_neg
    logits = 2 * torch.randn(n, generator=g)
    targets = torch.zeros(n)
    targets[torch.randperm(n, generator=g)[:n_pos]] = 0.1 + 0.9 * torch.rand(n_pos, generator=g)
    return logits, targets


def competitors(loss: str, targets):
    """``name -> function of flat logits``; dense targets for all, as the published code has."""
    dense = targets[:, None]
    if loss == "rank_sort":
        return {
            "ours": lambda x: sum(ranking.rank_sort_loss(x[:, None], dense)),
            "loop": lambda x: baselines.loop_rank_sort(x, targets),
            "bucketed": lambda x: baselines.bucketed_rank_sort(x, targets),
        }
    if loss == "ap":
        return {
            "ours": lambda x: ranking.ap_loss(x[:, None], dense),
            "loop": lambda x: baselines.loop_ap(x, targets),
            "bucketed": lambda x: baselines.bucketed_ap(x, targets),
        }
    error = targets[targets > 0]
    return {
        "ours": lambda x: ranking.alrp_loss(x[:, None], dense, targets).cls,
        "loop": lambda x: baselines.loop_alrp(x, targets, error)[0],
    }


def train(function, logits):
    x = logits.clone().requires_grad_()
    value = function(x)
    value.backward()
    return value.detach(), x.grad


def timed(function, logits, min_time: float):
    """Of forward and backward."""
    x = logits.clone().requires_grad_()
    timer = Timer("function(x).backward()", globals={"function": function, "x": x},
                  num_threads=torch.get_num_threads())  # fmt: skip
    return timer.blocked_autorange(min_run_time=min_time)


def gradient_error(gradient, reference, targets) -> float:
    negative = targets == 0
    gap = (gradient - reference)[negative].norm() / reference[negative].norm()
    return float(gap)


def measure(loss: str, n_pos: int, n_neg: int, min_time: float):
    logits, targets = make(n_pos, n_neg)
    functions = competitors(loss, targets)
    with_loop = n_pos * n_neg <= LOOP_PAIRS
    if not with_loop:
        del functions["loop"]
    results = {name: train(f, logits) for name, f in functions.items()}
    if with_loop:
        value, gradient = results["loop"]
        torch.testing.assert_close(results["ours"][0], value, rtol=1e-5, atol=1e-5)
        if gradient_error(results["ours"][1], gradient, targets) > 1e-5:
            raise SystemExit(f"{loss} at P = {n_pos}, N = {n_neg} disagrees with the loop")
    reference = results["loop" if with_loop else "ours"][1]
    rows = []
    for name, function in functions.items():
        sample = timed(function, logits, min_time)
        rows.append({
            "loss": loss, "positives": n_pos, "logits": n_neg, "implementation": name,
            "median_ms": round(1e3 * sample.median, 3),
            "iqr_ms": round(1e3 * sample.iqr, 3),
            "gradient_error": f"{gradient_error(results[name][1], reference, targets):.1e}",
        })  # fmt: skip
    ours = rows[0]["median_ms"]
    for row in rows:
        row["times_ours"] = round(row["median_ms"] / ours, 2)
        print(*row.values(), sep="\t", flush=True)
    return rows


def memory(n: int, n_pos: int) -> None:
    """Peak resident memory of one step, over the logits' own bytes."""
    train(competitors("rank_sort", make(10, 1000)[1])["ours"], make(10, 1000)[0])
    logits = 2 * torch.randn(n // 80, 80)
    labels = torch.full((n // 80,), 80)
    labels[torch.randperm(n // 80)[:n_pos]] = 3
    logits.requires_grad_()
    step = peak_bytes(lambda: sum(ranking.rank_sort_loss(logits, labels)).backward(), "cpu")
    ratio = step / logits.nbytes + 1
    print(f"peak memory at {n:.0e} logits, over the logits' own bytes, these included: {ratio:.2f}")


def growth(options) -> list[dict]:
    """Rank & Sort at 1e5 to 1e7 logits; the peak memory in a process of its own."""
    rows = []
    for n in (10**5, 10**6, 10**7):
        ms = step_ms("rank_sort", 300, n, options)
        ratio = ms / rows[-1]["median_ms"] if rows else 1
        rows.append({"logits": n, "median_ms": round(ms, 2), "growth": round(ratio, 2)})
    command = [sys.executable, "-m", __spec__.name, "--memory", "--threads", str(options.threads)]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    for row in rows:
        row["peak_memory"] = words[-1] if row["logits"] == 10**7 else ""
        print(*row.values(), sep="\t")
    return rows


def growth_of_positives(options) -> list[dict]:
    """All losses at 300 to 30,000 positives among 1e6 logits, as multiples of the first."""
    rows = []
    for loss in options.losses:
        for n_pos in (300, 1000, 3000, 10_000, 30_000):
            ms = step_ms(loss, n_pos, 10**6, options)
            row = {"loss": loss, "positives": n_pos, "logits": 10**6, "median_ms": round(ms, 2)}
            first = next((r for r in rows if r["loss"] == loss), row)
            rows.append(row | {"growth": round(ms / first["median_ms"], 2)})
            print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def step_ms(loss: str, n_pos: int, n: int, options) -> float:
    """Median time of our forward and backward."""
    logits, targets = make(n_pos, n)
    ours = competitors(loss, targets)["ours"]
    return 1e3 * timed(ours, logits, 2 * options.min_time).median


def write(path: Path, rows: list[dict], threads: int) -> None:
    machine = {"torch": torch.__version__, "threads": threads, "cpu": platform.machine()}
    write_rows(path, [row | machine for row in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--losses", nargs="+", default=["rank_sort", "ap", "alrp"])
    parser.add_argument("--positives", nargs="+", type=int, default=[100, 300, 1000])
    parser.add_argument("--logits", nargs="+", type=float, default=[1e5, 1e6])
    parser.add_argument("--growth", action="store_true", help="ours with more logits, positives")
    parser.add_argument("--memory", action="store_true", help="peak memory at 1e7 logits, alone")
    parser.add_argument("--min-time", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results/ranking_cpu.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        memory(10**7, 300)
        return
    if options.growth:
        write(options.out.with_stem("ranking_growth_cpu"), growth(options), options.threads)
        rows = growth_of_positives(options)
        write(options.out.with_stem("ranking_positives_cpu"), rows, options.threads)
        return
    rows = [
        row
        for loss in options.losses
        for n in options.logits
        for n_pos in options.positives
        for row in measure(loss, n_pos, int(n), options.min_time)
    ]
    write(options.out, rows, options.threads)


if __name__ == "__main__":
    main()
