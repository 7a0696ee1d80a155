"""Losses whose batch is spread over local gloo processes: calls, bytes and time of a step.

    python -m perf.bench_distributed --out perf/results/distributed_cpu.csv

Each process has 1e4 to 1e6 logits of 4 classes and 30 or 300 positives; 1 to 4 processes.

One thread per process. ``step_ms`` is the slowest process of the fastest round, forward and
backward; ``alone_ms`` the same without process_group, all processes at work; ``collective_ms`` the
mean time in collectives, waiting included; ``payload_bytes`` what one process hands to all_reduce
and gets from all_gather, ``wire_bytes`` what all of them together sent over the loopback device,
per step. Rows called ``all_reduce`` and ``all_gather`` time
one collective. ``perf/scaling.py`` holds its model against this table.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tritonloss as tl

from ._measure import write_rows

CLASSES = 4
MANY = 1200  # positives of one process alone, to tell pairs from positives
COLUMNS = (
    "what", "processes", "positives", "logits", "calls", "payload_bytes", "wire_bytes", "step_ms",
    "alone_ms", "collective_ms",
)  # fmt: skip
LOSSES = {
    "rank_sort": lambda x, y, q, g: sum(tl.rank_sort_loss(x, (y, q), process_group=g)),
    "ap": lambda x, y, q, g: tl.ap_loss(x, y, process_group=g),
    "alrp": lambda x, y, q, g: tl.alrp_loss(x, y, q, process_group=g).cls,
    "ghm_c": lambda x, y, q, g: tl.ghm_c_loss(x, y, process_group=g),
}
# torch 2.13 has a new name for the second
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
COLLECTIVES = ("all_reduce", GATHER)


class Counted:
    """What went through the collectives."""

    def __init__(self):
        self.calls, self.bytes, self.seconds = 0, 0, 0.0

    @contextmanager
    def counting(self):
        real = {name: getattr(dist, name) for name in COLLECTIVES}

        def wrap(function):
            def counted(tensor, *args, **kwargs):
                began = time.perf_counter()
                function(tensor, *args, **kwargs)
                self.seconds += time.perf_counter() - began
                self.calls, self.bytes = self.calls + 1, self.bytes + tensor.nbytes

            return counted

        for name, function in real.items():
            setattr(dist, name, wrap(function))
        try:
            yield self
        finally:
            for name, function in real.items():
                setattr(dist, name, function)


def loopback_bytes() -> int | None:
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.strip().startswith("lo:")), None)


def shard(rank: int, logits: int, positives: int):
    g = torch.Generator().manual_seed(rank)
    rows = logits // CLASSES
    labels = torch.full((rows,), CLASSES)
    labels[torch.randperm(rows, generator=g)[:positives]] = 1
    x = 2 * torch.randn(rows, CLASSES, generator=g)
    return x.requires_grad_(), labels, torch.rand(rows, generator=g)


def slowest(seconds: list[float]) -> float:
    """The slowest process of the fastest round, in ms: other load on the machine only adds."""
    times = torch.tensor(seconds)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return 1e3 * float(times.min())


def timed(step, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 2):
        dist.barrier()
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return slowest(seconds[2:])


def cell(loss: str, logits: int, positives: int, rounds: int) -> dict:
    x, labels, quality = shard(dist.get_rank(), logits, positives)
    group = dist.group.WORLD

    def step(group=group):
        x.grad = None
        LOSSES[loss](x, labels, quality, group).backward()

    step()
    counted = Counted()
    dist.barrier()
    before = loopback_bytes()
    with counted.counting():
        for _ in range(rounds):
            step()
    dist.barrier()
    after = loopback_bytes()
    return {
        "what": loss,
        "positives": positives,
        "logits": logits,
        "calls": counted.calls / rounds,
        "payload_bytes": counted.bytes / rounds,
        "wire_bytes": "" if before is None else round((after - before) / rounds),
        "step_ms": timed(step, rounds),
        "alone_ms": timed(lambda: step(None), rounds),
        "collective_ms": 1e3 * counted.seconds / rounds,
    }


def one_collective(what: str, size: int, rounds: int) -> dict:
    x = torch.zeros(size // 8, dtype=torch.float64)
    out = x.new_empty(dist.get_world_size() * x.numel())

    def step():
        if what == "all_reduce":
            dist.all_reduce(x)
        else:
            getattr(dist, GATHER)(out, x)

    return {"what": what, "payload_bytes": size, "calls": 1, "step_ms": timed(step, rounds)}


def work(rank: int, processes: int, port: int, options, rows) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes
    )
    found = [
        one_collective(what, size, 5 * options.rounds)
        for what in ("all_reduce", "all_gather")
        for size in (256, 65536, 1048576)
    ]
    counts = options.positives + [MANY] * (processes == 1)
    for logits in map(int, options.logits):
        for loss in options.losses:
            for positives in counts if loss != "ghm_c" else counts[:1]:
                found.append(cell(loss, logits, positives, options.rounds))
    if rank == 0:
        rows.put([{"processes": processes, **row} for row in found])
    dist.barrier()
    dist.destroy_process_group()


def measure(processes: int, options) -> list[dict]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    rows = context.SimpleQueue()
    workers = mp.spawn(work, (processes, port, options, rows), processes, join=False)
    found = rows.get()
    while not workers.join():
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--positives", nargs="+", type=int, default=[30, 300], help="per process")
    parser.add_argument("--logits", nargs="+", type=float, default=[1e4, 1e5, 1e6])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args()
    rows = []
    for processes in options.processes:
        for row in measure(processes, options):
            rows.append({k: f"{row[k]:.6g}" if isinstance(row.get(k), float) else row.get(k, "")
                         for k in COLUMNS})  # fmt: skip
            print(*(f"{k} {v}" for k, v in rows[-1].items() if v != ""), sep="  ", flush=True)
    if options.out:
        machine = {"cores": os.cpu_count(), "torch": torch.__version__, "cpu": platform.machine()}
        write_rows(options.out, [row | machine for row in rows])


if __name__ == "__main__":
    main()
