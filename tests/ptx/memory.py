"""Global memory, which is the tensors of a launch, shared memory, and who may touch what."""

from __future__ import annotations

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
        self.storages: dict[int, tuple] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        bytes_, poison = bytes_of(tensor), POISON[tensor.is_floating_point()]
        if len(bytes_):
            bytes_[:] = poison
            # the bytes keep the storage alive, and so its address its own
            self.storages[bytes_.ctypes.data] = poison, np.zeros(len(bytes_), bool), bytes_
        return tensor


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Of the tensor's whole storage."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


class Region:
    """Bytes that belong together, in cells, and what was done to them.

    Agents are programs, or warps. Two of them must not meet in a cell, but to load or to change it
    atomically; where they may store ``alike``, two may store the same value.
    """

    def __init__(self, name: str, start: int, bytes_, cell: int, agent: str, alike: bool = False):
        self.name, self.start, self.bytes, self.cell = name, start, bytes_, cell
        self.agent, self.alike = agent, alike
        n = -(-len(bytes_) // cell)
        self.belongs: np.ndarray | None = None  # the bytes that are a tensor's, if not all
        self.poison, self.written = None, None
        self.last = {k: np.full(n, NOBODY, np.int32) for k in ("load", "store", "atomic")}
        self.atomics = np.zeros(n, np.int64)

    def check(self, kind: str, bytes_) -> None:
        """``bytes_``: the places [threads, size] of an access."""
        if self.belongs is not None and not self.belongs[bytes_].all():
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
        for other, last in self.last.items():
            before = last[cells]
            met = (before != NOBODY) & (before != agents)
            if other == kind:
                last[cells] = agents
                met |= last[cells] != agents
                last[cells[met]] = SEVERAL
            if met.any() and (other != kind or (kind == "store" and not self.alike)):
                what = "race" if self.agent == "program" else "no barrier"
                raise Fault(f"{what}: {kind} of {self.name} after another {self.agent}'s {other}")

    def store(self, bytes_, data, agents) -> None:
        if self.alike:
            stored = self.last["store"][bytes_]
            others = (stored != NOBODY) & (stored != agents[:, None])
            if (others & (self.bytes[bytes_] != data)).any():
                raise Fault(f"race: warps store different values to {self.name}")
        self.bytes[bytes_] = data
        if (self.bytes[bytes_] != data).any():
            raise Fault(f"race: threads store different values to {self.name}")

    def add(self, bytes_, values, rng):
        """Each thread's value, one after the other; what it found."""
        found, number = np.empty_like(values), f"u{values.shape[1]}"
        for i in rng.permutation(len(values)):
            found[i] = self.bytes[bytes_[i]]
            self.bytes[bytes_[i]] = (found[i].view(number) + values[i].view(number)).view(np.uint8)
        return found


class Space:
    """Regions that threads reach by address; the tensors of a launch, or shared memory."""

    def __init__(self, regions: list[Region], rng, counted: bool = False):
        self.regions, self.rng, self.counted = regions, rng, counted
        self.starts = np.array([r.start for r in regions], np.uint64)
        self.ends = np.array([r.start + len(r.bytes) for r in regions], np.uint64)
        self.counts: Counter[str] = Counter()

    def access(self, kind: str, address, agents, warps, size: int, values=None):
        """Load, store bytes, or add numbers atomically; the bytes found, zeros where stored."""
        if (address % size).any():
            raise Fault(f"misaligned {kind} of {size} bytes")
        address = address.astype(np.uint64)
        at = np.searchsorted(self.starts, address, "right") - 1
        beyond = (at < 0) | (address + np.uint64(size) > self.ends[at])
        if beyond.any():
            self.out_of_bounds(kind, address[beyond])
        if self.counted:
            self.count(kind, address, warps, size)
        found = np.zeros((len(address), size), np.uint8)
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
                region.store(bytes_, values[which], agents[which])
            else:
                found[which] = region.add(bytes_, values[which], self.rng)
                np.add.at(region.atomics, bytes_[:, 0] // region.cell, 1)
                self.counts["atomics"] += len(bytes_)
            region.meet(kind, bytes_, agents[which])
        return found

    def out_of_bounds(self, kind: str, addresses) -> None:
        def beyond(region: Region) -> int:
            return max(region.start - first, first - region.start - len(region.bytes))

        first = int(addresses[0])
        near = min(self.regions, key=beyond)
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
    storages: dict[int, dict[str, torch.Tensor]] = {}
    for name, t in tensors.items():
        if t.numel():
            storages.setdefault(t.untyped_storage().data_ptr(), {})[name] = t
    regions = [region_of(named, start, fresh) for start, named in sorted(storages.items())]
    return Space(regions, rng, counted)


def region_of(tensors: dict[str, torch.Tensor], start: int, fresh: Fresh) -> Region:
    """The storage of the tensors, whose elements may have others between them."""
    bytes_ = bytes_of(next(iter(tensors.values())))
    cell = min(t.element_size() for t in tensors.values())
    region = Region(", ".join(tensors), start, bytes_, cell, "program")
    region.poison, region.written, _ = fresh.storages.get(start, (None, None, None))
    belongs = np.zeros(len(bytes_), bool)
    for t in tensors.values():
        elements = torch.zeros(len(bytes_) // t.element_size(), dtype=torch.bool)
        elements.as_strided(t.shape, t.stride(), t.storage_offset()).numpy()[...] = True
        each = np.repeat(elements.numpy(), t.element_size())
        belongs[: len(each)] |= each
    if not belongs.all():
        region.belongs = belongs
    return region
