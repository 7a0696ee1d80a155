"""One batch over many processes: what a loss tells the others, and the common normaliser.

Every exchange begins with a header of fixed size, reduced by maximum: the largest number of
positives, and the settings beside their negatives, so that each process sees who differs. What
follows has a size that all have agreed on. ``docs/scaling.md`` says what a step costs.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks as check
from . import _op
from ._dispatch import _transforms_active

__all__ = ["reduce_avg_factor"]

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:  # torch may be built without distributed
    ProcessGroup = dist.ProcessGroup if dist.is_available() else None

WORDS = (
    "rank_sort_loss", "ap_loss", "alrp_loss", "ghm_c_loss", "ghm_r_loss",
    "float16", "bfloat16", "float32", "float64", "labels", "(labels, quality)", "dense",
    "eager", "triton", "nonempty", "all",
)  # fmt: skip
SETTINGS = 16  # slots of the header
MAX_REGIONS = 256  # of GHM
SIZES = 2  # and before them: positives, logits
# Of all processes together, where the host reads no sizes: fixed-point sums have room for so many.
ASSUMED_LOGITS = 1 << 32


class Sharing(NamedTuple):
    """Checked arguments of a shared loss; plain values, which an op's schema takes."""

    group: str = ""  # name of the process group; empty: this process alone
    capacity: int = 0  # positives of one process there is room for; 0: agreed at each call
    scale: int = 1  # of the gradient: the group's size where the trainer averages gradients


ALONE = Sharing()


def parse_sharing(process_group, gradients_averaged, capacity: int | None = None) -> Sharing:
    """Check the arguments that all shared losses have."""
    if not isinstance(gradients_averaged, bool):
        raise TypeError(
            f"gradients_averaged must be a bool; got {type(gradients_averaged).__name__}"
        )
    if capacity is not None:
        check.is_index("capacity", capacity)
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1 positives of one process; got {capacity}")
    if process_group is None:
        return ALONE
    if not is_group(process_group):
        outside = ProcessGroup and process_group is dist.GroupMember.NON_GROUP_MEMBER
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this process belongs to, "
            f"or None; got {'a group of others' if outside else type(process_group).__name__}"
        )
    if _transforms_active():
        raise RuntimeError("process_group does not go together with torch.func transforms")
    scale = process_group.size() if gradients_averaged else 1
    return Sharing(process_group.group_name, capacity or 0, scale)


def is_group(value) -> bool:
    return ProcessGroup is not None and isinstance(value, ProcessGroup)


def group_of(group: str | ProcessGroup) -> ProcessGroup:
    """The group of this name, which an op's schema can hold; Dynamo needs the group itself."""
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)
    return group


class _GroupName(NamedTuple):
    """Stands for a process group in a copy or a file."""

    name: str

    def exists(self) -> bool:
        try:
            group_of(self.name)
        except (RuntimeError, LookupError, AttributeError):
            return False
        return True

    def found(self):
        if not self.exists():
            raise RuntimeError(
                f"process_group {self.name!r}, with which this module was saved, does not exist "
                "in this process: call init_process_group first, or set module.process_group"
            )
        return group_of(self.name)


class HoldsGroup:
    """Of a module with a process group, a live handle: its name is copied and saved, and looked up
    again."""

    def live_group(self):
        if isinstance(self.process_group, _GroupName):
            self.process_group = self.process_group.found()
        return self.process_group

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if is_group(state.get("process_group")):
            state["process_group"] = _GroupName(state["process_group"].group_name)
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        group = self.__dict__.get("process_group")
        if isinstance(group, _GroupName) and group.exists():
            self.process_group = group.found()


def scaled_gradient(loss: Tensor, sharing: Sharing) -> Tensor:
    """The same value, its gradient as the trainer needs it."""
    return valued(loss.detach(), sharing.scale * loss) if sharing.scale > 1 else loss


def valued(value: Tensor, like: Tensor) -> Tensor:
    """``value``, with the gradient of ``like``."""
    return value + (like - like.detach())


# ---------------------------------------------------------------------------------- collectives


@contextmanager
def _explained(what: str):
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} did not reach every process of process_group: one has left, raised an error, "
            f"did not call the loss, or took longer than the group's timeout ({error})"
        ) from error


def all_reduce(x: Tensor, what: str, group: ProcessGroup, largest: bool = False) -> Tensor:
    """The sum or the maximum over the processes, a new tensor. Dynamo makes it functional."""
    x, op = x.clone(), dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    if torch.compiler.is_compiling():
        dist.all_reduce(x, op=op, group=group)
        return x
    with _explained(what):
        dist.all_reduce(x, op=op, group=group)
    return x


def summed_regions(x: Tensor, flag: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the processes of (..., regions) figures, float64; NaN if the flag is.

    A message of one size, whatever the number of regions; after the agreement that gave the flag.
    """
    padded = torch.nn.functional.pad(x.double() + flag, (0, MAX_REGIONS - x.shape[-1]))
    return all_reduce(padded, "the regions of GHM", group)[..., : x.shape[-1]]


def all_gather(x: Tensor, what: str, group: ProcessGroup) -> Tensor:
    """(K, *shape of x), in the order of the ranks."""
    out = x.new_empty(group.size(), *x.shape)
    # torch 2.13 has a new name for it and warns of the old one
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with _explained(what):
        gather(out.view(-1), x.reshape(-1), group=group)
    return out


# --------------------------------------------------------------------------------------- header


def header(settings: dict, device) -> tuple[Tensor, str]:
    """``(values, names)`` of settings: numbers, WORDS, None, or 0-d tensors, which stay there."""
    values = [_number(value) for value in settings.values()]
    values += [0.0] * (SETTINGS - len(values))
    if torch.device(device).type == "cpu" and not torch.compiler.is_compiling():
        numbers = [float(value) for value in values]
        packed = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    else:  # nothing is copied from the host, which a CUDA graph could not replay
        like = torch.zeros((), dtype=torch.float64, device=device)
        packed = torch.stack(
            [v.detach().to(like).reshape(()) if isinstance(v, Tensor) else like + v for v in values]
        )
    return packed, "|".join(settings)


def _number(value):
    if isinstance(value, str):
        return WORDS.index(value)
    return -1 if value is None else value


def _shown(name: str, value: float) -> str:
    if name in ("loss", "dtype", "targets", "implementation", "normalize"):
        return WORDS[int(value)]
    return "None" if value == -1 and name in ("num_groups", "capacity") else f"{value:.17g}"


class _Found(NamedTuple):
    """A reduced header on its way to the host."""

    values: Tensor  # [2 (SIZES + SETTINGS)] maxima of sizes and settings, and of their negatives
    names: str
    capacity: int
    ready: torch.cuda.Event | None

    def check(self, overflow: bool = True) -> list[int]:
        """The largest sizes, or the error that all processes raise alike."""
        if self.ready is not None:
            self.ready.synchronize()
        high, low = self.values.view(2, -1).tolist()
        for name, top, bottom in zip(
            self.names.split("|"), high[SIZES:], low[SIZES:], strict=False
        ):
            if top != -bottom:
                raise ValueError(
                    f"{name} differs between the processes of process_group, from "
                    f"{_shown(name, -bottom)} to {_shown(name, top)}: all must pass the same"
                )
        if overflow and 0 < self.capacity < high[0]:
            raise ValueError(
                f"capacity is {self.capacity} positives of one process, but one had {high[0]:.0f} "
                "in the last call with this process_group, whose loss was NaN: pass a larger one"
            )
        return [int(size) for size in high[:SIZES]]


# What the last call with a group left to be checked by the next, by the name of the group.
_left: dict[str, _Found] = {}


def reduced_header(values: Tensor, sizes: Tensor, names: str, sharing: Sharing) -> _Found:
    """Exchange headers. What the call before left is raised first, on all processes."""
    if not _capturing(values) and sharing.group in _left:
        _left.pop(sharing.group).check()
    both = torch.cat([sizes.to(torch.float64), values])
    loss = WORDS[int(values[0])] if values.device.type == "cpu" else "the loss"
    found = all_reduce(
        torch.cat([both, -both]), f"the header of {loss}", group_of(sharing.group), True
    )
    return _Found(found, names, sharing.capacity, None)


def _capturing(x: Tensor) -> bool:
    """True while a CUDA graph is recorded, which cannot wait for a value."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def leave(found: _Found, group: str) -> None:
    """Let the next call with this group check: by then the values have arrived."""
    if _capturing(found.values):
        return
    if found.values.is_cuda:
        host = torch.empty(found.values.shape, dtype=torch.float64, pin_memory=True, device="cpu")
        host.copy_(found.values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        found = found._replace(values=host, ready=ready)
    _left[group] = found


@_op.opaque(lambda values, names, group: values.new_empty(()))
def agreement_shared(values: Tensor, names: str, group: str) -> Tensor:
    """0 where all processes have the same settings. On the CPU an error otherwise; on a GPU, which
    the host does not wait for, NaN, and the error at the next call."""
    sizes = values.new_zeros(SIZES)
    found = reduced_header(values, sizes, names, Sharing(group))
    if values.device.type == "cpu":
        found.check()
        return values.new_zeros(())
    leave(found, group)
    return _broken(found)


def _broken(found: _Found) -> Tensor:
    """NaN where settings differ or positives overflow, 0 elsewhere; stays on the device."""
    high, low = found.values.view(2, -1)
    broken = (high != -low)[SIZES:].any()
    if found.capacity:
        broken = broken | (high[0] > found.capacity)
    return torch.where(broken, torch.nan, 0.0)


def agree(settings: dict, device, group: str) -> Tensor:
    """0, or NaN, where there are no sizes to agree on."""
    return agreement_shared(*header(settings, device), group)


class Exchange:
    """What the processes tell each other between the stages of a ranking loss; alone, nothing."""

    def __init__(self, sharing: Sharing, settings: dict):
        self.sharing, self.settings = sharing, settings
        self.group = group_of(sharing.group) if sharing.group else None
        self.size = 1 if self.group is None else self.group.size()
        self.rank = 0 if self.group is None else self.group.rank()
        self.room = 0  # positives of one process
        self.broken: bool | Tensor = False  # some would be cut off: the loss becomes NaN

    def agree(self, n_positives: Tensor, n_logits: int) -> int:
        """Compare settings and agree on ``room``; returns the most logits of one process."""
        if self.group is None:
            return n_logits
        fixed = self.sharing.capacity
        settings = self.settings | {
            "capacity": fixed or None,
            "gradients_averaged": self.sharing.scale > 1,
        }
        values, names = header(settings, n_positives.device)
        sizes = torch.stack([n_positives, torch.full_like(n_positives, n_logits)])
        found = reduced_header(values, sizes, names, self.sharing)
        if fixed and values.is_cuda:
            self.room, self.broken = fixed, _broken(found).isnan()
            leave(found, self.sharing.group)
            return ASSUMED_LOGITS // self.size
        most, n_logits = found.check(overflow=False)
        self.room = fixed or most
        self.broken = most > self.room
        if self.broken:
            leave(found, self.sharing.group)
        return n_logits

    def positives(self, rows: Tensor) -> tuple[Tensor, int]:
        """The rows of all processes in the order of the ranks, and where this one's begin.

        The first column of a row is >= 0. On the CPU.
        """
        if self.group is None or self.room == 0:
            return rows, 0
        padded = rows.new_full((self.room, rows.shape[1]), -1.0)
        padded[: len(rows)] = rows
        everyone = all_gather(padded, "the positives", self.group)
        real = everyone[..., 0] >= 0
        return everyone[real], int(real[: self.rank].sum())

    def total(self, parts: list[Tensor]) -> list[Tensor]:
        """The sum over the processes of each tensor, exchanged as one."""
        if self.group is None or not parts:
            return parts
        flat = torch.cat([part.flatten() for part in parts])
        flat = all_reduce(flat, "the histogram of the negatives", self.group)
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


class KernelExchange(Exchange):
    """The same for the kernels: the number of positives stays on the device."""

    def positives(
        self, raw: Tensor, lists: Tensor, items: Tensor, counter: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four of all processes: [2, K room] scores and values, their lists, their items
        (negative, where they belong to another process), and (positives, flag)."""
        room, own = max(self.room, 1), min(self.room, items.numel())
        rows = raw.new_zeros(3, room, dtype=torch.int32)
        rows[:2, :own] = raw[:, :own].view(torch.int32)
        rows[2, :own] = lists[:own]
        # of dense targets there may be more than this process had room to write down
        flag = (counter[1] > 0) | (counter[0] > items.numel()) | self.broken
        message = torch.cat([torch.stack([counter[0].clamp(max=room), flag]).int(), rows.view(-1)])
        everyone = all_gather(message, "the positives", self.group)
        counts = everyone[:, :1].long()
        # close up: what is no positive goes to a place behind all of them
        behind = self.size * room
        lane = torch.arange(room, device=raw.device)
        place = torch.where(lane < counts, counts.cumsum(0) - counts + lane, behind)
        columns = everyone[:, 2:].view(self.size, 3, room).transpose(0, 1).reshape(3, -1)
        closed = columns.new_zeros(3, behind + 1)
        closed = closed.scatter(1, place.view(1, -1).expand(3, -1), columns)[:, :-1]
        owned = torch.arange(-1, -behind - 2, -1, device=raw.device)
        owned = owned.scatter(0, place[self.rank, :own], items[:own])[:-1]
        counter = torch.stack([counts.sum(), everyone[:, 1].max().long()])
        return closed[:2].contiguous().view(torch.float32), closed[2], owned, counter

    def integers(self, x: Tensor) -> Tensor:
        """Their sum over the processes: exact, in any order."""
        return all_reduce(x, "the histogram of the negatives", self.group)


def reduce_avg_factor(
    x: Tensor,
    process_group: ProcessGroup | None,
    *,
    gradients_averaged: bool = False,
) -> Tensor:
    r"""Normaliser of a loss whose batch is spread over the processes of a group.

    .. math:: \sum_{k=1}^{K} x_k \quad \text{or, for averaged gradients,} \quad
              \frac{1}{K} \sum_{k=1}^{K} x_k
              \quad \text{(a sum} \le 0 \text{ counts as 1)}

    With it as ``avg_factor`` the losses of the processes add up (or average) to the loss of one
    process with the whole batch, and so do their gradients.

    Args:
        x: what this process would divide by, usually its number of positives: a tensor of any shape
            and dtype, on the group's device. Exchanged in one call of its own size.
        process_group: None gives x itself.
        gradients_averaged: True under DistributedDataParallel, which averages gradients.

    Returns:
        Detached, of the shape of x; floating if averaged.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: a process left, or did not call within the group's timeout.

    Example:
        >>> import torch, tritonloss
        >>> labels = torch.tensor([0, 3, 1, 3])  # two positives
        >>> count = tritonloss.reduce_avg_factor((labels < 3).sum(), None)
        >>> loss = tritonloss.sigmoid_focal_loss(torch.zeros(4, 3), labels, avg_factor=count)
        >>> round(loss.item(), 4)
        0.6931
    """
    check.is_tensor("x", x)
    sharing = parse_sharing(process_group, gradients_averaged)
    x = x.detach()
    if not sharing.group:
        return x
    total = all_reduce(x, "the normaliser", process_group)
    if not gradients_averaged:
        return total
    # A step without positives divides by 1, as one process would, before the mean is formed
    return torch.where(total <= 0, 1, total) / process_group.size()
