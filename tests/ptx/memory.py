"""Global memory, which is the tensors of a launch, shared memory, and who may touch what."""

from __future__ import annotations

import ctypes
from collections import Counter

import numpy as np
import torch

from .parser import Fault

NOBODY, SEVERAL = -1, -2
SECTOR = 32  # bytes that a GPU moves at once
# Bytes of torch.empty: NaN; and as an index, far beyond whatever it is used for.
POISON = {True: 0xFF, False: 0x7F}  # floating point?


class Fresh:
    """Storages that ``torch.empty`` handed out, poisoned, and which of their bytes were stored.

    A byte counts as written once a kernel stored it, an element also once it no longer holds the
    poison alone (torch itself may fill what it allocated).
    """

    def __init__(self):
        self.storages: dict[tuple, tuple] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            poison = POISON[tensor.is_floating_point()]
            raw = torch.tensor([], dtype=torch.uint8).set_(storage)
            raw.fill_(poison)
            key = storage.data_ptr(), storage.nbytes()
            self.storages[key] = poison, np.zeros(storage.nbytes(), bool), storage
        return tensor

    def of(self, tensor: torch.Tensor):
        """``(start, poison, written)`` of the tensor's storage, or None."""
        storage = tensor.untyped_storage()
        found = self.storages.get((storage.data_ptr(), storage.nbytes()))
        return found and (storage.data_ptr(), *found[:2])


class Conflicts:
    """Who loaded, stored and atomically changed each cell; agents are programs, or warps."""

    def __init__(self, size: int, stores_meet: bool):
        self.by = {k: np.full(size, NOBODY, np.int32) for k in ("load", "store", "atomic")}
        self.rivals = {
            "load": ("store", "atomic"),
            "store": ("load", "atomic", "store") if stores_meet else ("load", "atomic"),
            "atomic": ("load", "store"),
        }

    def forget(self, cells=slice(None)) -> None:
        for last in self.by.values():
            last[cells] = NOBODY

    def meet(self, kind: str, cells, agents) -> str | None:
        """Note the accesses; the kind of an earlier one by another agent, if there is one."""
        found = None
        for rival in self.rivals[kind]:
            last = self.by[rival][cells]
            if ((last != NOBODY) & (last != agents)).any():
                found = rival
        mine = self.by[kind]
        last = mine[cells]
        mine[cells] = np.where((last == NOBODY) | (last == agents), agents, SEVERAL)
        if (lost := mine[cells] != agents).any():  # several at once
            mine[cells[lost]] = SEVERAL
            found = found or (kind if kind in self.rivals[kind] else None)
        return found


class Region:
    """Memory of one tensor, or of several that overlap."""

    def __init__(self, name: str, start: int, end: int, tensors, fresh: Fresh | None):
        self.name, self.start, self.end = name, start, end
        raw = (ctypes.c_uint8 * (end - start)).from_address(start)
        self.bytes = np.frombuffer(raw, np.uint8)
        self.cell = min(t.element_size() for t in tensors)
        n = (end - start) // self.cell
        self.conflicts = Conflicts(n, stores_meet=True)
        # elements of the tensors: a slice's range has others between them
        self.belongs = np.zeros(n, bool)
        for t in tensors:
            per = t.element_size() // self.cell
            first = (t.data_ptr() - start) // self.cell
            index = torch.arange(extent(t)).as_strided(t.shape, t.stride()).numpy().ravel()
            for k in range(per):
                self.belongs[first + index * per + k] = True
        if self.belongs.all():
            self.belongs = None
        self.poison = None
        if fresh is not None and (found := fresh.of(tensors[0])):
            base, self.poison, written = found
            self.written = written[start - base : end - base]
        self.atomics = np.zeros(n, np.int64)


def extent(t: torch.Tensor) -> int:
    """Elements from the first to the last."""
    return sum((s - 1) * d for s, d in zip(t.shape, t.stride(), strict=True)) + 1


def regions_of(tensors: dict[str, torch.Tensor], fresh: Fresh | None) -> list[Region]:
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + extent(t) * t.element_size(), name)
        for name, t in tensors.items()
        if t.numel()
    )
    merged: list[list] = []
    for start, end, name in spans:
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
            merged[-1][2].append(name)
        else:
            merged.append([start, end, [name]])
    return [
        Region(" = ".join(names), start, end, [tensors[n] for n in names], fresh)
        for start, end, names in merged
    ]


class Global:
    """The tensors of a launch. Threads are given by index, programs by number."""

    def __init__(self, kernel: str, tensors, fresh: Fresh | None, rng, counted: bool):
        self.kernel, self.rng, self.counted = kernel, rng, counted
        self.regions = regions_of(tensors, fresh)
        self.starts = np.array([r.start for r in self.regions], np.uint64)
        self.ends = np.array([r.end for r in self.regions], np.uint64)
        self.counts: Counter[str] = Counter()

    def fault(self, where, what: str):
        raise Fault(f"{self.kernel}: {where}: {what}")

    def count(self, kind: str, address, warps, size: int) -> None:
        """Sectors of each warp, and the bytes of them that it wants."""
        key = warps.astype(np.uint64) << np.uint64(48) | address
        spread = np.arange(0, size, min(size, 4), dtype=np.uint64)
        bytes_ = np.unique(key[:, None] + spread).size * min(size, 4)
        self.counts[f"{kind} sectors"] += np.unique(key // np.uint64(SECTOR)).size
        self.counts[f"{kind} bytes"] += bytes_

    def accesses(self, kind: str, address, programs, warps, size: int, where):
        """Yield ``(region, which of the threads, byte offsets)`` after all checks."""
        if (address % np.uint64(size)).any():
            self.fault(where, f"misaligned {kind} of {size} bytes")
        at = np.searchsorted(self.starts, address, "right") - 1
        if (at < 0).any() or (address + np.uint64(size) > self.ends[at]).any():
            bad = address[(at < 0) | (address + np.uint64(size) > self.ends[at])]
            first = int(bad[0])
            near = min(self.regions, key=lambda r: min(abs(first - r.start), abs(first - r.end)))
            place = f"byte {first - near.start} of {near.end - near.start} of {near.name}"
            self.fault(where, f"out of bounds: {kind} at {place}, {len(bad)} threads")
        if self.counted:
            self.count(kind, address, warps, size)
        for k in np.unique(at):
            region = self.regions[k]
            which = np.nonzero(at == k)[0]
            offset = (address[which] - np.uint64(region.start)).astype(np.int64)
            if size % region.cell:
                self.fault(where, f"{kind} of {size} bytes in {region.name}, of {region.cell} each")
            self.check(region, kind, offset, programs[which], size, where)
            yield region, which, offset

    def check(self, region: Region, kind: str, offset, programs, size: int, where) -> None:
        width = size // region.cell
        cells = (offset[:, None] // region.cell + np.arange(width)).ravel()
        if region.belongs is not None and not region.belongs[cells].all():
            self.fault(where, f"out of bounds: {kind} between the elements of {region.name}")
        if region.poison is not None:
            bytes_ = offset[:, None] + np.arange(size)
            if kind != "store":
                left = ~region.written[bytes_] & (region.bytes[bytes_] == region.poison)
                if left.reshape(-1, region.cell).all(1).any():
                    self.fault(where, f"never written: {kind} of {region.name}")
            if kind != "load":
                region.written[bytes_] = True
        rival = region.conflicts.meet(kind, cells, np.repeat(programs, width))
        if rival:
            self.fault(where, f"race: {kind} of {region.name} after another program's {rival}")

    def load(self, address, programs, warps, size: int, where):
        out = np.empty((len(address), size), np.uint8)
        for region, which, offset in self.accesses("load", address, programs, warps, size, where):
            out[which] = region.bytes[offset[:, None] + np.arange(size)]
        return out

    def store(self, address, programs, warps, data, where) -> None:
        size = data.shape[1]
        for region, which, offset in self.accesses("store", address, programs, warps, size, where):
            bytes_ = offset[:, None] + np.arange(size)
            order = self.rng.permutation(len(which))
            region.bytes[bytes_[order]] = data[which[order]]
            if (region.bytes[bytes_] != data[which]).any():
                self.fault(where, f"race: threads store different values to {region.name}")

    def atomic(self, address, programs, warps, values, function, where):
        size = values.dtype.itemsize
        old = np.empty_like(values)
        for region, which, offset in self.accesses("atomic", address, programs, warps, size, where):
            cells = region.bytes[: len(region.bytes) // size * size].view(values.dtype)
            if self.counted:
                np.add.at(region.atomics, offset // region.cell, 1)
            in_any_order(self.rng, cells, offset // size, values, old, which, function)
        self.counts["atomics"] += len(address)
        return old

    @property
    def hottest(self) -> int:
        """Atomics at the address that has most."""
        return max((int(r.atomics.max()) for r in self.regions), default=0)


def in_any_order(rng, cells, at, values, old, which, function) -> None:
    """Each thread's value into its cell, one after the other; ``old`` is what it found."""
    for i in rng.permutation(len(at)):
        old[which[i]] = cells[at[i]]
        cells[at[i]] = function(cells[at[i]], values[which[i]])


class Shared:
    """Shared memory of several programs side by side, full of garbage."""

    def __init__(self, kernel: str, size: int, programs: int, rng):
        self.kernel, self.size, self.rng = kernel, -(-max(size, 16) // 16) * 16, rng
        self.bytes = np.full(programs * self.size, 0xFF, np.uint8)
        self.written = np.zeros(len(self.bytes), bool)
        # several warps may store the same value: what they hold in common
        self.conflicts = Conflicts(len(self.bytes), stores_meet=False)

    def fault(self, where, what: str):
        raise Fault(f"{self.kernel}: {where}: {what}")

    def barrier(self, programs) -> None:
        """All warps of these programs have met."""
        for p in programs:
            self.conflicts.forget(slice(p * self.size, (p + 1) * self.size))

    def bytes_of(self, kind: str, address, slots, warps, size: int, where):
        if (address.astype(np.int64) + size > self.size).any():
            self.fault(
                where, f"out of bounds: {kind} at {address.max()} of {self.size} shared bytes"
            )
        if (address % size).any():
            self.fault(where, f"misaligned {kind} of {size} bytes")
        at = (address.astype(np.int64) + slots * self.size)[:, None] + np.arange(size)
        if kind != "store" and not self.written[at].all():
            self.fault(where, f"never written: {kind} of shared memory")
        return at

    def meet(self, kind: str, at, warps, where) -> None:
        rival = self.conflicts.meet(kind, at.ravel(), np.repeat(warps, at.shape[1]))
        if rival:
            self.fault(where, f"no barrier between {kind} and another warp's {rival}")

    def load(self, address, slots, warps, size: int, where):
        at = self.bytes_of("load", address, slots, warps, size, where)
        self.meet("load", at, warps, where)
        return self.bytes[at]

    def store(self, address, slots, warps, data, where) -> None:
        at = self.bytes_of("store", address, slots, warps, data.shape[1], where)
        stored = self.conflicts.by["store"][at]
        others = (stored != NOBODY) & (stored != warps[:, None])
        clash = (others & (self.bytes[at] != data)).any()
        self.bytes[at] = data
        if clash or (self.bytes[at] != data).any():
            self.fault(where, "threads store different values to shared memory")
        self.written[at] = True
        self.meet("store", at, warps, where)

    def atomic(self, address, slots, warps, values, function, where):
        size = values.dtype.itemsize
        at = self.bytes_of("atomic", address, slots, warps, size, where)
        self.meet("atomic", at, warps, where)
        old = np.empty_like(values)
        cells, place = self.bytes.view(values.dtype), at[:, 0] // size
        in_any_order(self.rng, cells, place, values, old, np.arange(len(at)), function)
        return old
