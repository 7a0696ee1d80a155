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
            torch.tensor([], dtype=torch.uint8).set_(storage).fill_(poison)
            key = storage.data_ptr(), storage.nbytes()
            self.storages[key] = poison, np.zeros(storage.nbytes(), bool), storage
        return tensor

    def of(self, tensor: torch.Tensor, start: int, end: int):
        """Poison of the tensor's storage, and which of the bytes from start to end were stored."""
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        poison, written, _ = self.storages.get((base, storage.nbytes()), (None, None, None))
        return poison, None if written is None else written[start - base : end - base]


class Region:
    """Bytes that belong together, in cells, and what was done to them.

    Agents are programs, or warps. Two of them must not meet in a cell, but to load or to change it
    atomically; where they may store ``alike``, two may store the same value.
    """

    def __init__(self, name: str, start: int, bytes_, cell: int, agent: str, alike: bool = False):
        self.name, self.start, self.bytes, self.cell = name, start, bytes_, cell
        self.agent, self.alike = agent, alike
        n = len(bytes_) // cell
        self.belongs: np.ndarray | None = None  # the cells that are a tensor's, if not all
        self.poison, self.written = None, None
        self.last = {k: np.full(n, NOBODY, np.int32) for k in ("load", "store", "atomic")}
        self.atomics = np.zeros(n, np.int64)

    def check(self, kind: str, bytes_) -> None:
        """``bytes_``: the places [threads, size] of an access."""
        if self.belongs is not None and not self.belongs[bytes_ // self.cell].all():
            raise Fault(f"out of bounds: {kind} between the elements of {self.name}")
        if self.poison is not None and kind != "store":
            left = ~self.written[bytes_] & (self.bytes[bytes_] == self.poison)
            if left.reshape(-1, self.cell).all(1).any():
                raise Fault(f"never written: {kind} of {self.name}")
        if self.poison is not None and kind != "load":
            self.written[bytes_] = True

    def meet(self, kind: str, bytes_, agents) -> None:
        """Note the accesses, unless one conflicts with an earlier one of another agent."""
        cells = bytes_[:, :: self.cell] // self.cell
        agents = np.repeat(agents, cells.shape[1])
        cells = cells.ravel()
        rivals = [k for k in self.last if k != kind or (k == "store" and not self.alike)]
        for rival in rivals:
            last = self.last[rival][cells]
            if ((last != NOBODY) & (last != agents)).any():
                self.conflict(kind, rival)
        last = self.last[kind][cells]
        self.last[kind][cells] = np.where((last == NOBODY) | (last == agents), agents, SEVERAL)
        several = self.last[kind][cells] != agents
        if several.any():
            self.last[kind][cells[several]] = SEVERAL
            if kind in rivals:
                self.conflict(kind, kind)

    def conflict(self, kind: str, rival: str) -> None:
        what = "race" if self.agent == "program" else "no barrier"
        raise Fault(f"{what}: {kind} of {self.name} after another {self.agent}'s {rival}")

    def store(self, bytes_, data, agents, rng) -> None:
        if self.alike:
            stored = self.last["store"][bytes_]
            others = (stored != NOBODY) & (stored != agents[:, None])
            if (others & (self.bytes[bytes_] != data)).any():
                raise Fault(f"race: warps store different values to {self.name}")
        order = rng.permutation(len(data))
        self.bytes[bytes_[order]] = data[order]
        if (self.bytes[bytes_] != data).any():
            raise Fault(f"race: threads store different values to {self.name}")

    def add(self, bytes_, values, rng):
        """Each thread's value, one after the other; what it found."""
        size, found = values.itemsize, np.empty_like(values)
        cells = self.bytes[: len(self.bytes) // size * size].view(values.dtype)
        for i in rng.permutation(len(values)):
            at = bytes_[i, 0] // size
            found[i] = cells[at]
            cells[at] += values[i]
        return found[:, None].view(np.uint8)


class Space:
    """Regions that threads reach by address; the tensors of a launch, or shared memory."""

    def __init__(self, regions: list[Region], rng, counted: bool = False):
        self.regions, self.rng, self.counted = regions, rng, counted
        self.starts = np.array([r.start for r in regions], np.uint64)
        self.ends = np.array([r.start + len(r.bytes) for r in regions], np.uint64)
        self.counts: Counter[str] = Counter()

    def access(self, kind: str, address, agents, warps, size: int, values=None):
        """Load, store bytes, or add numbers atomically; the bytes found, unless stored."""
        if (address % size).any():
            raise Fault(f"misaligned {kind} of {size} bytes")
        address = address.astype(np.uint64)
        at = np.searchsorted(self.starts, address, "right") - 1
        beyond = (at < 0) | (address + np.uint64(size) > self.ends[at])
        if beyond.any():
            self.out_of_bounds(kind, address[beyond])
        if self.counted:
            self.count(kind, address, warps, size)
        found = np.zeros((len(address), size if kind != "store" else 0), np.uint8)
        present = np.flatnonzero(np.bincount(at))
        for k in present:
            region, which = self.regions[k], slice(None) if len(present) == 1 else at == k
            bytes_ = (address[which] - self.starts[k]).astype(np.int64)[:, None] + np.arange(size)
            if size % region.cell:
                raise Fault(f"{kind} of {size} bytes in {region.name}, of {region.cell} each")
            region.check(kind, bytes_)
            if kind == "load":
                found[which] = region.bytes[bytes_]
            elif kind == "store":
                region.store(bytes_, values[which], agents[which], self.rng)
            else:
                found[which] = region.add(bytes_, values[which], self.rng)
                np.add.at(region.atomics, bytes_[:, 0] // region.cell, 1)
                self.counts["atomics"] += len(bytes_)
            region.meet(kind, bytes_, agents[which])
        return found

    def out_of_bounds(self, kind: str, addresses) -> None:
        first = int(addresses[0])
        near = min(
            self.regions,
            key=lambda r: min(abs(first - r.start), abs(first - r.start - len(r.bytes))),
        )
        place = f"byte {first - near.start} of {len(near.bytes)} of {near.name}"
        raise Fault(f"out of bounds: {kind} at {place}, {len(addresses)} threads")

    def count(self, kind: str, address, warps, size: int) -> None:
        """Sectors of each warp, and the bytes of them that it wants."""
        key = warps.astype(np.uint64) << np.uint64(48) | address
        part = min(size, 4)
        spread = np.arange(0, size, part, dtype=np.uint64)
        self.counts[f"{kind} sectors"] += np.unique(key // np.uint64(SECTOR)).size
        self.counts[f"{kind} bytes"] += np.unique(key[:, None] + spread).size * part

    @property
    def hottest(self) -> int:
        """Atomics at the address that has most."""
        return max((int(r.atomics.max()) for r in self.regions), default=0)


class Shared(Space):
    """Shared memory of several programs side by side, full of garbage."""

    def __init__(self, size: int, programs: int, warps: int, rng):
        self.size, self.warps = -(-max(size, 16) // 16) * 16, warps
        total = programs * self.size
        self.region = Region("shared memory", 0, np.full(total, 0xFF, np.uint8), 1, "warp", True)
        self.region.poison, self.region.written = 0xFF, np.zeros(total, bool)
        super().__init__([self.region], rng)

    def access(self, kind: str, address, agents, warps, size: int, values=None):
        if (address > self.size - size).any():
            raise Fault(f"out of bounds: {kind} at byte {address.max()} of {self.size} shared ones")
        place = address + warps // self.warps * self.size  # of the program
        return super().access(kind, place, agents, warps, size, values)

    def barrier(self, programs) -> None:
        """All warps of these programs have met."""
        for last in self.region.last.values():
            last.reshape(-1, self.size)[programs] = NOBODY


def global_memory(tensors: dict[str, torch.Tensor], fresh: Fresh, rng, counted: bool) -> Space:
    """A region for each tensor, or for several that overlap."""
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
    regions = [
        region_of({name: tensors[name] for name in names}, start, end, fresh)
        for start, end, names in merged
    ]
    return Space(regions, rng, counted)


def extent(t: torch.Tensor) -> int:
    """Elements from the first to the last."""
    return sum((s - 1) * d for s, d in zip(t.shape, t.stride(), strict=True)) + 1


def region_of(tensors: dict[str, torch.Tensor], start: int, end: int, fresh: Fresh) -> Region:
    raw = (ctypes.c_uint8 * (end - start)).from_address(start)
    cell = min(t.element_size() for t in tensors.values())
    region = Region(" = ".join(tensors), start, np.frombuffer(raw, np.uint8), cell, "program")
    # a slice's range has elements between its own
    belongs = np.zeros((end - start) // cell, bool)
    for t in tensors.values():
        per = t.element_size() // cell
        index = torch.arange(extent(t)).as_strided(t.shape, t.stride()).numpy().ravel()
        first = (t.data_ptr() - start) // cell
        belongs[(first + index[:, None] * per + np.arange(per)).ravel()] = True
    if not belongs.all():
        region.belongs = belongs
    some = next(iter(tensors.values()))
    region.poison, region.written = fresh.of(some, start, end)
    return region
