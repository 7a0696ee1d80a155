"""A pool of gloo processes on this machine, started once and used by many tests."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import socket
import traceback
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

SIZE = 4
TIMEOUT = 30.0  # of a collective, seconds


class Failed(Exception):
    """What a process raised: its rank, type and message."""

    def __init__(self, rank: int, kind: str, message: str, trace: str):
        super().__init__(f"process {rank}: {kind}: {message}\n{trace}")
        self.rank, self.kind, self.message = rank, kind, message


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, size: int, port: int, timeout: float, pipe) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", limit, rank=rank, world_size=size
    )  # fmt: skip
    groups = {k: dist.new_group(range(k), limit) for k in range(1, size + 1)}
    while True:
        request = pipe.recv_bytes()
        if not request:
            os._exit(0)  # a broken group may not end by itself
        function, k, args = pickle.loads(request)
        try:
            answer = (True, function(groups[k], rank, *args))
        except Exception as error:
            answer = (False, (type(error).__name__, str(error), traceback.format_exc()))
        pipe.send_bytes(pickle.dumps(answer))


class Pool:
    """``run(f, k, *args)`` calls ``f(group, rank, *args)`` in k processes."""

    def __init__(self, size: int = SIZE, timeout: float = TIMEOUT):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, port, timeout, there), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function, k: int, *args, check: bool = True) -> list:
        """Results by rank; what was raised is raised here, or returned if not ``check``.

        An argument that is a ``PerRank`` goes to each process in its part.
        """
        for rank in range(k):
            mine = [a[rank] if isinstance(a, PerRank) else a for a in args]
            self.pipes[rank].send_bytes(pickle.dumps((function, k, mine)))
        results: list = [None] * k
        waiting = set(range(k))
        while waiting:
            ends = [(self.pipes[rank], self.processes[rank].sentinel) for rank in waiting]
            ready = wait([end for pair in ends for end in pair])
            for rank, pair in zip(list(waiting), ends, strict=True):
                if not set(pair) & set(ready):
                    continue
                try:
                    good, result = pickle.loads(pair[0].recv_bytes())
                except EOFError:
                    good, result = False, ("EOFError", "the process has ended", "")
                waiting.remove(rank)
                results[rank] = result if good else Failed(rank, *result)
        for result in results:
            if check and isinstance(result, Failed):
                raise result
        return results

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send_bytes(b"")
            process.join(5)


class PerRank(list):
    """An argument of which each process gets its own part."""
