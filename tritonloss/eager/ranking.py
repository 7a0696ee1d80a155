"""AP, aLRP and Rank & Sort in plain PyTorch, exact and without positive-negative pairs.

``H`` is piecewise linear, so for fixed positives both maps between P positives and n negatives,

    FP_i = Σ_j H(s_j - s_i)        and        g(s_j) = Σ_i w_i H(s_j - s_i),

are piecewise linear in ``s_j`` with 2P **knots** ``s_i ± δ``. One pass over the negatives counts
them per segment between two knots and sums their distances to the segment's knot; the second pass
looks up value and slope of g. `Negatives` is that engine; the three losses differ in the weights
``w_i`` and in sums over positives, which the same windows give (`sums_above`); those that look at
a second order too, Rank & Sort's over positives of lower quality, go bit by bit
(`sums_over_lower`).

Several processes share a batch in two exchanges (`over_lists`): all know all positives, and add up
what each counted. Alone, the exchanges do nothing.

Everything between the passes is float64 and of size P. Shapes depend on P (`nonzero`), so the
functions run inside an opaque op when they are compiled, and read P on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial, wraps
from typing import NamedTuple

import torch
from torch import Tensor

from tritonloss.distributed import Exchange, Sharing

# Logits per step of a pass: a few float64 temporaries of this size stay in a core's L2.
CHUNK = 1 << 16
# Pairs of positives per block.
PAIR_TILE = 1 << 16
# Positives up to which looking at all their pairs is quicker than sorting by bits.
PAIRS_UP_TO = 1000
# Stands for a hidden logit, and for -inf: below every knot, and finite, for 0 * BELOW is 0.
BELOW = -1e307
# Below this FP_i aLRP's published gradient skips positive i.
ALRP_EPS = 1e-5


def on_device_of_logits(function: Callable) -> Callable:
    """New tensors lie beside the logits, wherever the default device is."""

    @wraps(function)
    def there(logits: Tensor, *args):
        # entered only where it changes something, for it slows every operation down
        if logits.device == torch.get_default_device():
            return function(logits, *args)
        with logits.device:
            return function(logits, *args)

    return there


class Positives(NamedTuple):
    """The positives of one list by ascending score, those of other processes among them."""

    score: Tensor  # (P,) float64
    value: Tensor | None  # (P,) float64, quality or localisation error


class Negatives:
    """What P sorted positives see of the other logits of their list in this process.

    A uniform grid over the knots' range finds segments: a cell without a knot lies in one segment,
    and the few logits whose cell holds knots search among those.

    Args:
        x: flat logits of the list.
        hidden: flat mask of the ignored logits, or None.
        index: int64, where in x the positives of this process stand.
        score: (P,) float64, all positives by ascending score; at least one.
        delta: half-width of the step.
    """

    def __init__(
        self, x: Tensor, hidden: Tensor | None, index: Tensor, score: Tensor, delta: float
    ):
        self.x, self.hidden, self.delta = x, hidden, delta
        self.masks = x.numel() > 0 and bool(x.amin() == -torch.inf)
        self.where = index.sort().values
        starts = torch.arange(0, x.numel() + CHUNK, CHUNK)
        self.where_bounds = torch.searchsorted(self.where, starts).tolist()
        self.found: list[tuple[Tensor, Tensor]] = []  # what `_search` found, for the second pass
        self._place_knots(score)
        self._place_cells()

    def _place_knots(self, score: Tensor) -> None:
        n_pos = score.numel()
        if self.delta == 0:
            self.knots = self.keys = score
            self.low = self.width = torch.zeros_like(score)
            self.lower = self.upper = torch.arange(n_pos)
            return
        # A knot is the sum knots + low: s_i ± delta rounds where the scores are large.
        shift = torch.tensor([-self.delta, self.delta], dtype=torch.float64)[:, None]
        high = score + shift
        back = high - score
        low = (score - (high - back) + (shift - back)).flatten()
        order = low.argsort(stable=True)
        order = order[high.flatten()[order].argsort(stable=True)]
        self.knots, self.low = high.flatten()[order], low[order]
        # x >= key exactly where x >= knot
        above = torch.nextafter(self.knots, torch.full_like(self.knots, torch.inf))
        self.keys = torch.where(self.low > 0, above, self.knots)
        place = torch.empty_like(order)
        place[order] = torch.arange(2 * n_pos)
        self.lower, self.upper = place[:n_pos], place[n_pos:]
        # Only segments inside some window have a width: however far an outlier, nothing is lost.
        windows = torch.where(order < n_pos, 1, -1).cumsum(0)
        gap = self.knots.diff(append=self.knots[-1:]) + self.low.diff(append=self.low[-1:])
        self.width = torch.where(windows > 0, gap, 0.0)

    def _place_cells(self) -> None:
        n_knots = self.knots.numel()
        # Sixteen cells per knot, unless the logits are too few to pay for the table.
        wanted = min(max(16 * n_knots, 1024), max(self.x.numel() // 16, 1024), 1 << 16)
        self.n_cells = 1 << (wanted - 1).bit_length()
        span = float(self.keys[-1] - self.keys[0])
        self.per_unit = min(max(self.n_cells / max(span, 1e-200), 1e-300), 1e200)
        self.origin = float(self.keys[0]) - 1 / self.per_unit
        in_cell = torch.bincount(self._cells(self.keys).long(), minlength=self.n_cells + 2)
        self.before = in_cell.cumsum(0) - in_cell  # knots in lower cells
        self.has_knot = in_cell > 0
        self.search_steps = [1 << b for b in range(int(in_cell.max()).bit_length())][::-1]
        padding = self.keys.new_full((2 * self.search_steps[0],), torch.inf)
        self.padded_keys = torch.cat([self.keys, padding])
        # Segment k starts at knot k - 1; segment 0 is never measured.
        self.start = torch.cat([self.knots[:1], self.knots])
        self.start_low = torch.cat([self.low[:1], self.low])
        edge = torch.arange(self.n_cells + 2, dtype=torch.float64) / self.per_unit + self.origin
        self.cell_shift = edge - self.start[self.before] - self.start_low[self.before]

    def _cells(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Position in the grid. Rounded the same way for every element: it must be monotone."""
        out = torch.sub(x, self.origin, out=out)
        return out.mul_(self.per_unit).clamp_(0, self.n_cells + 1)

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """(where, cell, distance from the cell's start; and among cells with knots: index,
        segment, logit). Segment k is preceded by k knots; hidden logits lie below every knot.

        The tensors are overwritten by the next chunk."""
        size = min(CHUNK, self.x.numel())
        logit, position = torch.empty(2, size, dtype=torch.float64)
        cells = torch.empty(size, dtype=torch.int32)
        for k, start in enumerate(range(0, self.x.numel(), CHUNK)):
            part = slice(start, min(start + CHUNK, self.x.numel()))
            here = slice(0, part.stop - start)
            x = logit[here].copy_(self.x[part])
            if self.masks:
                x.clamp_(min=BELOW)
            x.index_fill_(0, self.where[slice(*self.where_bounds[k : k + 2])] - start, BELOW)
            if self.hidden is not None:
                x.masked_fill_(self.hidden[part], BELOW)
            fraction = self._cells(x, out=position[here])
            cell = cells[here].copy_(fraction)
            if k == len(self.found):
                self.found.append(self._search(x, cell))
            index, segment = self.found[k]
            yield part, cell, fraction.frac_(), index, segment, x.index_select(0, index)

    def _search(self, x: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Which logits share a cell with knots, and their segments."""
        index = self.has_knot.index_select(0, cell).nonzero()[:, 0]
        x, segment = x.index_select(0, index), self.before.index_select(0, cell[index])
        for step in self.search_steps:
            reached = self.padded_keys.index_select(0, segment + (step - 1)) <= x
            segment += reached * step
        return index.int(), segment.int()

    def histogram(self) -> Tensor:
        """(2, segments) float64: number of negatives, and sum of their distances to the knot.

        NaN if a logit that counts is not finite.
        """
        n_segments, size = self.start.numel(), self.n_cells + 2
        if not is_finite(self.x, self.hidden):
            return torch.full((2, n_segments), torch.nan, dtype=torch.float64)
        cell_count, cell_offset = torch.zeros(2, size, dtype=torch.float64)
        count, offset = torch.zeros(2, n_segments, dtype=torch.float64)
        ones = torch.ones(CHUNK, dtype=torch.float64)
        for _, cell, fraction, _, segment, x in self._chunks():
            cell_count.index_add_(0, cell, ones[: cell.numel()])
            count.index_add_(0, segment, ones[: segment.numel()])
            if self.delta > 0:
                cell_offset.index_add_(0, cell, fraction)
                offset.index_add_(0, segment, x.sub_(self.start.index_select(0, segment)))

        # Logits in cells with knots went to their segments one by one.
        plain = ~self.has_knot
        offset -= count * self.start_low
        count.index_add_(0, self.before, cell_count * plain)
        if self.delta > 0:
            distance = cell_offset / self.per_unit + cell_count * self.cell_shift
            offset.index_add_(0, self.before, distance * plain)
        return torch.stack([count, offset])

    def false_positives(self, histogram: Tensor) -> Tensor:
        """FP_i for every positive from the histogram of all negatives, float64."""
        count, offset = histogram.unbind()
        above = count[1:].flip(0).cumsum(0).flip(0)  # negatives at or above each knot
        if self.delta == 0:
            return above
        # ramp_k: how far the negatives reach above knot k, measured inside windows. All terms are
        # positive, so that FP_i keeps its relative accuracy however small it is.
        inside = torch.where(self.width > 0, offset[1:], 0.0)
        inside[:-1] += self.width[:-1] * above[1:]
        ramp = inside.flip(0).cumsum(0).flip(0)
        return (ramp[self.lower] - ramp[self.upper]) / (2 * self.delta)

    def gradient(self, weight: Tensor, out: Tensor) -> None:
        """Write Σ_i weight_i H(x - s_i) for every negative, 0 elsewhere, to ``out``."""
        zero = weight.new_zeros(1)
        if self.delta == 0:
            value = torch.cat([zero, weight.cumsum(0)])
            slope = torch.zeros_like(value)
        else:
            rise = torch.zeros_like(self.knots)
            rise.index_add_(0, self.lower, weight).index_add_(0, self.upper, -weight)
            rise = torch.where(self.width > 0, rise.cumsum(0) / (2 * self.delta), 0.0)
            reached = (rise * self.width).cumsum(0)
            value = torch.cat([zero, zero, reached[:-1]])
            slope = torch.cat([zero, rise])

        cell_value = value[self.before] + slope[self.before] * self.cell_shift
        cell_slope = slope[self.before] / self.per_unit
        value = value - slope * self.start_low
        for part, cell, fraction, index, segment, x in self._chunks():
            g = fraction.mul_(cell_slope.index_select(0, cell))
            g += cell_value.index_select(0, cell)
            bent = x.sub_(self.start.index_select(0, segment)).mul_(slope.index_select(0, segment))
            bent += value.index_select(0, segment)
            out[part] = g.index_copy_(0, index.long(), bent)


def pair_tiles(column: Tensor, delta: float) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of H(s_j - s_i), rows i and all columns j, each overwritten by the next."""
    n = column.numel()
    rows = max(PAIR_TILE // n, 1)
    block = column.new_empty(min(rows, n), n)
    for first in range(0, n, rows):
        part = slice(first, min(first + rows, n))
        row, tile = column[part, None], block[: min(rows, n - first)]
        if delta == 0:
            yield part, torch.ge(column, row, out=tile)
        else:
            yield part, torch.sub(column, row, out=tile).mul_(0.5 / delta).add_(0.5).clamp_(0, 1)


class Steps:
    """Positives by ascending score, in a coordinate ``at`` in which the step has width 1.

    ``H(s_j - s_i) = clamp(at_j - at_i + self_step, 0, 1)``: a gap wider than a window counts as 1,
    so that an outlier takes no digits from the others, and with a hard step scores are numbered.
    """

    def __init__(self, score: Tensor, delta: float):
        if delta == 0:
            self.at = torch.searchsorted(score, score).double()
        else:
            gaps = (score.diff() / (2 * delta)).clamp_(max=1)
            self.at = torch.cat([score.new_zeros(1), gaps.cumsum(0)])
        self.self_step = 1.0 if delta == 0 else 0.5  # H(0)

    def mirrored(self) -> Steps:
        """With the order of positives reversed: H_ij of these is H_ji of those."""
        other = object.__new__(Steps)
        other.at, other.self_step = (self.at[-1] - self.at).flip(0), self.self_step
        return other

    @cached_property
    def windows(self) -> Tensor:
        """(3, P) int64: the first positive inside i's window, the first in the next whole number of
        ``at``, and the first above the window."""
        begin = self.at - self.self_step
        return torch.stack(
            [torch.searchsorted(self.at, t) for t in (begin, begin.floor() + 1, begin + 1)]
        )

    def summands(self, weights: Tensor) -> Tensor:
        """(P, 2K): what `sums` needs sums of, for weights (P, K). All are no larger than these."""
        return torch.cat([weights, weights * self.at.frac()[:, None]], 1)

    def sums(self, inside: Tensor, next_cell: Tensor, above: Tensor, rows: Tensor) -> Tensor:
        """Σ_j H_ij weight_j, (rows, K), of the sums of summands over the j inside i's window, over
        those of them in the next whole number, and over those above."""
        begin = self.at[rows, None] - self.self_step
        k = inside.shape[1] // 2
        start = (begin - begin.floor()) * inside[:, :k]
        return above[:, :k] + inside[:, k:] + next_cell[:, :k] - start


def sums_above(steps: Steps, weights: Tensor) -> Tensor:
    """Σ_j H_ij weight_j for weights (P, K), j = i among them."""
    summands = steps.summands(weights)
    # from the top, where sums may be small
    down = torch.cat([summands.flip(0).cumsum(0).flip(0), torch.zeros_like(summands[:1])])
    first, middle, last = (down.index_select(0, place) for place in steps.windows)
    return steps.sums(first - last, middle - last, last, slice(None))


def positive_ranks(positives: Positives, delta: float) -> tuple[Tensor, Tensor | None]:
    """rank⁺ with a self term of 1, and Σ_{j≠i} H_ij value_j."""
    score, value = positives.score, positives.value
    steps = Steps(score, delta)
    ones = torch.ones_like(score)
    weights = torch.stack([ones] if value is None else [ones, value], 1)
    rank, *ahead = sums_above(steps, weights).unbind(1)
    rank += 1 - steps.self_step
    return rank, ahead[0] - steps.self_step * value if ahead else None


def sums_over_lower(steps: Steps, level: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j H_ij weight_j over the j with ``level_j < level_i``, and how many of them are in or above
    i's window.

    A pair is told apart by the highest bit in which its levels differ. So, from the highest bit on,
    positives without it and those with it are parted, each half by what came before and the score:
    those that agree in all higher bits stay side by side. Before, those with the bit look up sums
    over those without. A range of positives becomes a range of either half, found by counting.

    Args:
        level: (P,) int64, 0..P-1.
        weights: (P, K).
    """
    n = level.numel()
    total = torch.zeros_like(weights)
    reached = torch.zeros_like(level)
    index = torch.arange(n)
    summands = steps.summands(weights)
    sums = torch.cat([summands, summands[:1]]).zero_()
    below = torch.zeros(n + 1, dtype=torch.int64)
    # of each: its window's places, and the end of those that agree with it so far
    places = torch.cat([steps.windows, torch.full((1, n), n)])

    def look_up(table: Tensor, at: Tensor) -> Tensor:
        return table.index_select(0, at.flatten()).unflatten(0, at.shape)

    for bit in reversed(range((n - 1).bit_length())):
        has_bit = (level >> bit) & 1
        without, having = (has_bit == 0).nonzero()[:, 0], has_bit.nonzero()[:, 0]
        torch.cumsum(1 - has_bit, 0, out=below[1:])
        torch.cumsum(summands * (1 - has_bit)[:, None], 0, out=sums[1:])

        theirs = places.index_select(1, having)
        first, middle, last, end = look_up(sums, theirs)
        i = index.index_select(0, having)
        found = steps.sums(last - first, last - middle, end - last, i)
        total.index_add_(0, i, found)
        counted = look_up(below, theirs)
        reached.index_add_(0, i, counted[3] - counted[0])

        others = look_up(below, places.index_select(1, without))
        places = torch.cat([others, theirs.sub_(counted).add_(without.numel())], 1)
        order = torch.cat([without, having])
        summands = summands.index_select(0, order)
        level, index = level.index_select(0, order), index.index_select(0, order)
    return total, reached


def sorting(positives: Positives, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rank & Sort's rank⁺ (self term H(0)), sorting errors, and their gradient times P."""
    if positives.score.numel() <= PAIRS_UP_TO:
        return sorting_by_pairs(positives, delta)
    quality = positives.value
    level = torch.searchsorted(quality.sort().values, quality)
    steps = Steps(positives.score, delta)
    weights = torch.stack([torch.ones_like(quality), 1 - quality], 1)
    rank, total = sums_above(steps, weights).unbind(1)
    lower, violators = sums_over_lower(steps, level, weights)
    wrong, excess = lower.unbind(1)
    error, share = sorting_error(rank, total, wrong, excess, (violators > 0) & (wrong > 0))
    opposite = (level.numel() - 1 - level).flip(0)
    received, _ = sums_over_lower(steps.mirrored(), opposite, share.flip(0)[:, None])
    return rank, error, received[:, 0].flip(0) - error


def sorting_error(rank, total, wrong, excess, violated) -> tuple[Tensor, Tensor]:
    """Current minus target sorting error, in the form that does not cancel; and its share per
    violator."""
    target = (total - excess) / (rank - wrong)
    error = torch.where(violated, (excess - wrong * target) / rank, 0.0)
    return error, torch.where(violated, error / wrong, 0.0)


def sorting_by_pairs(positives: Positives, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """`sorting` in P² steps, fewer while P is small."""
    order = positives.value.argsort(stable=True)
    quality = positives.value[order]
    badness = torch.stack([torch.ones_like(quality), 1 - quality], 1)
    # With ascending quality, i's violators (H_ij > 0, y_j < y_i) stand in the columns before this.
    first_equal = torch.searchsorted(quality, quality)
    rank, error, grad = (torch.zeros_like(quality) for _ in range(3))
    for part, above in pair_tiles(positives.score[order], delta):
        all_wrong, some_wrong = (int(first_equal[i]) for i in (part.start, part.stop - 1))
        surely = above[:, :all_wrong]
        partly = above[:, all_wrong:some_wrong]
        partly = torch.where(quality[all_wrong:some_wrong] < quality[part, None], partly, 0.0)
        rank[part], total = (above @ badness).unbind(1)
        wrong, excess = (
            surely @ badness[:all_wrong] + partly @ badness[all_wrong:some_wrong]
        ).unbind(1)
        error[part], share = sorting_error(rank[part], total, wrong, excess, wrong > 0)
        grad[:all_wrong] += share @ surely
        grad[all_wrong:some_wrong] += share @ partly
    grad -= error
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    return rank[back], error[back], grad[back]


class ListResult(NamedTuple):
    """One list's values, the gradient at its positives, and the weights w_i of its negatives."""

    values: list[Tensor]  # 0-d each
    at_positives: Tensor  # (P,)
    weight: Tensor  # (P,)
    extra: Tensor | None  # (P,), sorting gradient or localisation coefficient


def rank_sort_list(positives: Positives, false: Tensor, delta: float) -> ListResult:
    rank_plus, sort_error, sort_grad = sorting(positives, delta)
    rank = rank_plus + false
    error, n_pos = false / rank, rank.numel()
    values = [error.mean(), sort_error.mean()]
    return ListResult(values, -error / n_pos, 1 / rank / n_pos, sort_grad / n_pos)


def ap_list(positives: Positives, false: Tensor, delta: float, interpolated: bool) -> ListResult:
    rank_plus, _ = positive_ranks(positives, delta)
    rank = rank_plus + false
    miss, n_pos = false / rank, rank.numel()  # 1 - precision
    used = miss.cummin(0).values if interpolated else miss
    weight = torch.where(used < miss, used / miss, 1.0) / rank / n_pos
    return ListResult([used.mean()], -used / n_pos, weight, None)


def alrp_list(positives: Positives, false: Tensor, delta: float) -> ListResult:
    rank_plus, ahead = positive_ranks(positives, delta)
    rank = rank_plus + false
    n_pos = rank.numel()
    counts = false > ALRP_EPS
    pull = torch.where(counts, (ahead + false) / rank, 0.0) / n_pos
    weight = torch.where(counts, pull / false, 0.0)
    last_tied = torch.searchsorted(positives.score, positives.score, right=True) - 1
    coefficient = (1 / rank).cumsum(0)[last_tied] / n_pos
    loc = (coefficient * positives.value).sum()
    return ListResult([(false / rank).mean(), loc], -pull, weight, coefficient)


class Problem(NamedTuple):
    """Targets in normal form; "flat" is the order in which the logits lie in memory."""

    x: Tensor  # (n,) flat logits
    hidden: Tensor | None  # (n,) flat, True where ignored
    group: Tensor | None  # (n,) flat list ids
    index: Tensor  # (P,) flat position of each positive
    anchor: Tensor  # (P,) its anchor, counted in the order of the labels
    value: Tensor | None  # (P,) float64, what the loss reads at positives
    order: list[int]  # permutation of the logits' dimensions that makes them lie flat


def flat(t: Tensor, order: list[int]) -> Tensor:
    return t.permute(order).reshape(-1)


def unflat(t: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    back = sorted(range(len(shape)), key=order.__getitem__)
    return t.view([shape[d] for d in order]).permute(back)


def take(t: Tensor, where: Tensor) -> Tensor:
    """Entries of ``t`` at (P, dims) coordinates, whose surplus dimensions are left out."""
    where = where[:, : t.dim()]
    return t[tuple(where.unbind(1))] if t.dim() else t.expand(len(where))


def normalise(
    logits: Tensor,
    targets: Tensor,
    value: Tensor | None,
    weight: Tensor | None,
    group: Tensor | None,
    ignore_index: int,
    num_groups: int | None,
) -> Problem:
    """Either form of targets, weights and groups as indices and a mask.

    ``value`` is read at the positives: one per anchor, or one per logit.
    """
    logits = logits.detach()
    shape, n_classes = logits.shape, logits.shape[-1]
    order = sorted(range(logits.dim()), key=lambda d: -logits.stride(d))
    if targets.is_floating_point():
        nothing_ignored = targets.numel() > 0 and bool(targets.min() >= 0)
        keep = torch.ones((), dtype=torch.bool) if nothing_ignored else targets >= 0
        where = (targets > 0).nonzero()
    else:
        targets = targets.long()
        keep = (targets >= 0) & (targets <= n_classes) & (targets != ignore_index)
        anchors = (keep & (targets < n_classes)).nonzero()
        keep = keep[..., None]
        where = torch.cat([anchors, take(targets, anchors)[:, None]], 1)
    if weight is not None:
        keep = keep & ((weight if weight.shape == shape else weight[..., None]) > 0)
    if group is not None:
        keep = keep & (group >= 0)
        if num_groups is not None:
            keep &= group < num_groups
    where = where[take(keep.expand(shape), where)]
    if value is not None:
        value = take(value.detach(), where).double()

    index, anchor = torch.zeros(2, len(where), dtype=torch.int64)
    for d in order:
        index = index * shape[d] + where[:, d]
    for d in range(logits.dim() - 1):
        anchor = anchor * shape[d] + where[:, d]
    hidden = None if bool(keep.all()) else flat(~keep.expand(shape), order)
    group = None if group is None else flat(group.expand(shape), order)
    return Problem(flat(logits, order), hidden, group, index, anchor, value, order)


def side_by_side(problem: Problem) -> tuple[Problem, Tensor | None]:
    """The problem with each list in one piece, and the permutation if one was needed."""
    group = problem.group
    if group is None or not bool((group.diff() < 0).any()):
        return problem, None
    group, permutation = group.sort(stable=True)
    place = torch.empty_like(permutation)
    place[permutation] = torch.arange(place.numel())
    problem = problem._replace(
        x=problem.x[permutation],
        hidden=None if problem.hidden is None else problem.hidden[permutation],
        group=group,
        index=place[problem.index],
    )
    return problem, permutation


def is_finite(x: Tensor, hidden: Tensor | None) -> bool:
    """Whether every logit that counts is finite, or -inf, which a negative may be."""
    if x.numel() == 0 or bool(x.amax() < torch.inf):  # a NaN is the maximum
        return True
    return hidden is not None and bool(((x < torch.inf) | hidden).all())


class List(NamedTuple):
    """One list: its positives in all processes, and what of it is here."""

    part: slice  # its logits among those that lie side by side
    positives: Positives
    place: Tensor  # of this process' positives among all
    mine: Tensor  # the same in the order of `Problem.index`
    index: Tensor  # and in the list
    negatives: Negatives | None  # None if a positive's score or value is not finite


def lists_of(problem: Problem, everyone: Tensor, first: int, delta: float) -> Iterator[List]:
    """The lists with a positive, by their ids.

    Args:
        problem: with its lists side by side.
        everyone: (list, score, value) of the positives of all processes.
        first: row of this process' first.
    """
    names, scores, values = everyone.unbind(1)
    for name in names.unique().long():
        part = slice(0, problem.x.numel())
        if problem.group is not None:
            ends = [torch.searchsorted(problem.group, name.to(problem.group.dtype), right=right)
                    for right in (False, True)]  # fmt: skip
            part = slice(*map(int, ends))
        rows = (names == name).nonzero()[:, 0]
        rows = rows[scores[rows].argsort(stable=True)]
        score = scores[rows]
        mine = rows - first
        place = ((mine >= 0) & (mine < problem.index.numel())).nonzero()[:, 0]
        mine = mine[place]
        index = problem.index[mine] - part.start
        hidden = None if problem.hidden is None else problem.hidden[part]
        negatives = None
        if bool(everyone[rows, 1:].isfinite().all()):
            negatives = Negatives(problem.x[part], hidden, index, score, delta)
        yield List(part, Positives(score, values[rows]), place, mine, index, negatives)


def over_lists(
    loss: Callable[[Positives, Tensor, float], ListResult],
    n_values: int,
    problem: Problem,
    delta: float,
    need_grad: bool,
    sharing: Sharing,
    shared_settings: dict,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of ``loss`` over the lists: values, flat gradient of the first value, and ``extra``.

    Values are float64 (n_values,), the gradient has one entry per logit (or none), ``extra`` one
    float64 per positive. Values are those of all processes, the rest is this one's.
    """
    problem, permutation = side_by_side(problem)
    x, n_pos = problem.x, problem.index.numel()
    exchange = Exchange(sharing, shared_settings)
    exchange.agree(torch.tensor(n_pos), x.numel())
    dtype = result_dtype(x)
    fill = torch.nan if exchange.broken else 0.0
    values = torch.full((n_values,), fill, dtype=torch.float64)
    extra = torch.full((n_pos,), fill, dtype=torch.float64)
    grad = torch.full((x.numel() if need_grad else 0,), fill, dtype=dtype)
    if exchange.broken:
        return values, grad, extra

    rows = torch.zeros(n_pos, 3, dtype=torch.float64)
    if problem.group is not None:
        rows[:, 0] = problem.group[problem.index]
    rows[:, 1] = x[problem.index]
    if problem.value is not None:
        rows[:, 2] = problem.value
    everyone, first = exchange.positives(rows)
    lists = list(lists_of(problem, everyone, first, delta))
    unknown = x.new_full((2, 1), torch.nan, dtype=torch.float64)
    histograms = exchange.total(
        [unknown if one.negatives is None else one.negatives.histogram() for one in lists]
    )
    for one, histogram in zip(lists, histograms, strict=True):
        if bool(histogram.isnan().any()):
            values += torch.nan
            extra[one.mine] = torch.nan
            if need_grad:
                grad[one.part] = torch.nan
            continue
        false = one.negatives.false_positives(histogram)
        result = loss(one.positives, false, delta)
        values += torch.stack(result.values) / len(lists)
        if result.extra is not None:
            extra[one.mine] = result.extra[one.place] / len(lists)
        if need_grad:
            one.negatives.gradient(result.weight / len(lists), grad[one.part])
            own = result.at_positives[one.place] / len(lists)
            grad[one.part][one.index] = own.to(dtype)
    if permutation is not None and need_grad:
        grad = torch.empty_like(grad).index_copy_(0, permutation, grad)
    return values, grad, extra


class Spec(NamedTuple):
    """One ranking loss of a list."""

    name: str  # of the public function
    of_list: Callable
    n_values: int = 2
    settings: dict = {}  # noqa: RUF012 (not changed)


SPECS = {
    "rank_sort": Spec("rank_sort_loss", rank_sort_list),
    "ap": Spec("ap_loss", partial(ap_list, interpolated=True), 1, {"interpolated": True}),
    "ap_plain": Spec("ap_loss", partial(ap_list, interpolated=False), 1, {"interpolated": False}),
    "alrp": Spec("alrp_loss", alrp_list),
}


def settings(
    implementation: str, x: Tensor, labels: Tensor | None, value: Tensor | None, delta, loss: str,
    ignore_index: int, num_groups: int,
) -> dict:  # fmt: skip
    """What must be the same in all processes that share a batch."""
    with_quality = loss == "rank_sort" and value is not None
    form = "(labels, quality)" if with_quality else "labels"
    return {
        "loss": SPECS[loss].name,
        "implementation": implementation,
        "dtype": str(x.dtype)[6:],
        "number of classes": x.shape[-1],
        "targets": "dense" if labels is None else form,
        "delta": delta,
        "ignore_index": ignore_index,
        "num_groups": num_groups,
        **SPECS[loss].settings,
    }


@on_device_of_logits
def ranking(
    x: Tensor,
    labels: Tensor | None,
    value: Tensor | None,
    dense: Tensor | None,
    weight: Tensor | None,
    group: Tensor | None,
    delta: Tensor | float,
    loss: str,
    ignore_index: int,
    num_groups: int,
    process_group: str,
    capacity: int,
    scale: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(first value, second value, coefficient, gradient of the first, of the second)``.

    The second value is Rank & Sort's sorting error, whose gradient lives at positives: one entry
    per anchor with labels, per logit otherwise; or aLRP's loc, with the coefficient of each
    anchor's error in it. What a loss lacks is empty.
    """
    delta = float(delta)
    shared = settings("eager", x, labels, value, delta, loss, ignore_index, num_groups)
    targets = labels if dense is None else dense
    if loss == "rank_sort" and value is None:
        value = torch.ones_like(targets, dtype=torch.float32) if dense is None else dense
    spec, dtype = SPECS[loss], result_dtype(x)
    problem = normalise(x, targets, value, weight, group, ignore_index, num_groups)
    values, grad, extra = over_lists(
        spec.of_list, spec.n_values, problem, delta, need_grad,
        Sharing(process_group, capacity, scale), shared,
    )  # fmt: skip
    if need_grad:
        grad = unflat(grad, x.shape, problem.order)
    coefficient = second_grad = torch.zeros(0, dtype=dtype)
    if loss == "alrp":
        coefficient = torch.zeros(value.numel(), dtype=dtype)
        coefficient.index_add_(0, problem.anchor, extra.to(dtype))
        coefficient = coefficient.view(value.shape)
    if loss == "rank_sort" and need_grad:
        second_grad = torch.zeros(targets.numel(), dtype=dtype)
        second_grad[problem.index if dense is not None else problem.anchor] = extra.to(dtype)
        if dense is not None:
            second_grad = unflat(second_grad, x.shape, problem.order)
        second_grad = second_grad.view(targets.shape)
    values = values.to(dtype)
    second = values[1].clone() if spec.n_values > 1 else torch.zeros((), dtype=dtype)
    return values[0].clone(), second, coefficient, grad, second_grad.clone()


def result_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
