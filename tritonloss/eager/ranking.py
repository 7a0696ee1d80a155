"""AP, aLRP and Rank & Sort in plain PyTorch, exact and without positive-negative pairs.

``H`` is piecewise linear, so for fixed positives both maps between P positives and n negatives,

    FP_i = Σ_j H(s_j - s_i)        and        g(s_j) = Σ_i w_i H(s_j - s_i),

are piecewise linear in ``s_j`` with 2P **knots** ``s_i ± δ``. One pass over the negatives counts
them per segment between two knots and sums their distances to the segment's knot; the second pass
looks up value and slope of g. `Negatives` is that engine; the three losses differ in the weights
``w_i`` and in sums over positives, which the same windows give (`sums_above`); those that look at
a second order too, Rank & Sort's over positives of lower quality, go bit by bit (`LowerQuality`).

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
# Of so many positives Rank & Sort looks at all pairs.
FEW = 320
# And of so many neighbours by quality if there are more: 2 ** TILE_BITS in a tile.
TILE_BITS = 5
TILE = 1 << TILE_BITS
# Tiles per step: a few temporaries of theirs stay in a core's L2.
TILES = 64
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
        # what `_search` found, for the second pass
        self.found: list[tuple[Tensor | None, Tensor]] = []
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
        self.before = (in_cell.cumsum(0) - in_cell).int()  # knots in lower cells
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

    def _chunks(self) -> Iterator[tuple]:
        """(where, cell, distance from the cell's start; and among cells with knots: index,
        segment, logit). Segment k is preceded by k knots; hidden logits lie below every knot.

        Without an index, segment and logit are of all, and cells are left out where they are known
        not to be needed. The tensors are overwritten by the next chunk."""
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
            if k < len(self.found) and self.found[k][0] is None:
                yield part, None, None, *self.found[k], x
                continue
            fraction = self._cells(x, out=position[here])
            cell = cells[here].copy_(fraction)
            if k == len(self.found):
                self.found.append(self._search(x, cell))
            index, segment = self.found[k]
            searched = x if index is None else x.index_select(0, index)
            yield part, cell, fraction.frac_(), index, segment, searched

    def _search(self, x: Tensor, cell: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which logits share a cell with knots, None if most do; and their segments, or all."""
        has_knot, index = self.has_knot.index_select(0, cell), None
        if 2 * int(has_knot.count_nonzero()) < len(x):
            index = has_knot.nonzero()[:, 0].int()
            x, cell = x.index_select(0, index), cell.index_select(0, index)
        segment = self.before.index_select(0, cell)
        at, key = torch.empty_like(segment), torch.empty_like(x)
        reached = torch.empty_like(x, dtype=torch.bool)
        for step in self.search_steps:
            torch.add(segment, step - 1, out=at)
            torch.le(torch.index_select(self.padded_keys, 0, at, out=key), x, out=reached)
            segment.add_(reached, alpha=step)
        return index, segment

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
        for _, cell, fraction, index, segment, x in self._chunks():
            count.index_add_(0, segment, ones[: segment.numel()])
            if index is not None:
                cell_count.index_add_(0, cell, ones[: cell.numel()])
            if self.delta > 0:
                offset.index_add_(0, segment, x.sub_(self.start.index_select(0, segment)))
                if index is not None:
                    cell_offset.index_add_(0, cell, fraction)

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
            bent = x.sub_(self.start.index_select(0, segment)).mul_(slope.index_select(0, segment))
            bent += value.index_select(0, segment)
            if index is not None:
                g = fraction.mul_(cell_slope.index_select(0, cell))
                g += cell_value.index_select(0, cell)
                bent = g.index_copy_(0, index.long(), bent)
            out[part] = bent


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

    @cached_property
    def places(self) -> Tensor:
        """(4, P) int32: the first positive inside i's window, the first in the next whole number of
        ``at``, the first above the window, and the end."""
        begin = self.at - self.self_step
        found = [torch.searchsorted(self.at, t) for t in (begin, begin.floor() + 1, begin + 1)]
        return torch.stack([*found, torch.full_like(found[0], begin.numel())]).int()

    @cached_property
    def start(self) -> Tensor:
        """(P,), how far into a whole number i's window begins."""
        begin = self.at - self.self_step
        return begin - begin.floor()

    def summands(self, weights: Tensor) -> Tensor:
        """(P, 2K): what `sums` needs sums of, for weights (P, K). All are no larger than these."""
        return torch.cat([weights, weights * self.at.frac()[:, None]], 1)

    def sums(self, table: Tensor, places: Tensor, start: Tensor) -> Tensor:
        """Σ_j H_ij weight_j, (rows, K), of the sums of the summands before each place.

        The part of H_ij beyond its whole numbers is ``frac(at_j) - start_i`` in i's window, and 1
        more from the next whole number on.
        """
        k = table.shape[1] // 2
        first, middle, last, end = look_up(table, places)
        inside = last - first
        found = inside[:, k:] - inside[:, :k] * start[:, None]
        return found.add_(end[:, :k]).sub_(middle[:, :k])


def look_up(table: Tensor, places: Tensor) -> Tensor:
    return table.index_select(0, places.flatten()).unflatten(0, places.shape)


def covered(n: int, begin: Tensor, end: Tensor, amount: Tensor) -> Tensor:
    """Of each of n places, the sum of the amounts on it: from ``begin`` to before ``end``."""
    table = amount.new_zeros(n + 1)
    table.index_add_(0, begin, amount).index_add_(0, end, amount, alpha=-1)
    return table.cumsum_(0)[:n]


def sums_above(steps: Steps, weights: Tensor) -> Tensor:
    """Σ_j H_ij weight_j for weights (P, K), j = i among them."""
    summands = steps.summands(weights)
    # from the top, where sums may be small
    down = torch.cat([summands.flip(0).cumsum(0).flip(0), torch.zeros_like(summands[:1])])
    return steps.sums(down.neg_(), steps.places, steps.start)


def positive_ranks(positives: Positives, delta: float) -> tuple[Tensor, Tensor | None]:
    """rank⁺ with a self term of 1, and Σ_{j≠i} H_ij value_j."""
    score, value = positives.score, positives.value
    steps = Steps(score, delta)
    ones = torch.ones_like(score)
    weights = torch.stack([ones] if value is None else [ones, value], 1)
    rank, *ahead = sums_above(steps, weights).unbind(1)
    rank += 1 - steps.self_step
    return rank, ahead[0] - steps.self_step * value if ahead else None


class Split(NamedTuple):
    """Two halves of positives whose levels agree in all higher bits than one."""

    without: Tensor  # (L,) int64, positives without the bit, by groups and score
    having: Tensor  # (M,) int64, those with it
    places: Tensor  # (4, M) int32, `Steps.places` of those with it among those without


class LowerQuality:
    """Sums over the pairs in which j has a lower quality than i, in both directions.

    Qualities are numbered by levels. Pairs of one block of TILE levels are looked at one by one, in
    tiles. All other pairs are told apart by the highest bit in which their levels differ. So, from
    the highest bit on, positives without it and those with it are parted, each half by what came
    before and the score: those that agree in all higher bits stay side by side. Those with the bit
    look up sums over those without; a range of positives becomes a range of either half, found by
    counting.
    """

    def __init__(self, steps: Steps, quality: Tensor):
        self.steps = steps
        self.order = quality.argsort(stable=True)
        ordered = quality[self.order]
        level = torch.searchsorted(ordered, ordered)  # equal qualities share one
        self._place_tiles(level)
        self._split(torch.empty_like(level).scatter_(0, self.order, level), int(level[-1]))

    def _in_tiles(self, t: Tensor, fill: float = 0) -> Tensor:
        """Rows by quality, as (tiles, TILE, ...)."""
        n_tiles = -(-len(t) // TILE)
        padded = t.new_full((n_tiles * TILE, *t.shape[1:]), fill)
        padded[: len(t)] = t
        return padded.unflatten(0, (n_tiles, TILE))

    def _from_tiles(self, t: Tensor) -> Tensor:
        """Rows by score again."""
        n = len(self.order)
        return t.new_empty(n, *t.shape[2:]).index_copy_(0, self.order, t.flatten(0, 1)[:n])

    def _place_tiles(self, level: Tensor) -> None:
        block = self._in_tiles(level >> TILE_BITS, -1)
        place = self._in_tiles(level & (TILE - 1)).to(torch.int8)
        tiles = torch.arange(len(block))
        # equal qualities that began in an earlier tile have their lower ones there
        late = (block[:, 0] != tiles).nonzero()[:, 0]
        self.rows = torch.cat([tiles, late])
        self.columns = torch.cat([tiles, block[late, 0]])
        self.at = self._in_tiles(self.steps.at[self.order])
        self.column_place = place.where(block == tiles[:, None], TILE)
        same = block[self.rows] == self.columns[:, None]
        self.row_place = place[self.rows].where(same, -1)

    def _tiles(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(tiles of i, tiles of j, H_ij where j's quality is lower and 0 elsewhere)"""
        for pairs in torch.arange(len(self.rows)).split(TILES):
            i, j = self.rows[pairs], self.columns[pairs]
            above = self.at[j][:, None, :] - (self.at[i] - self.steps.self_step)[:, :, None]
            lower = self.column_place[j][:, None, :] < self.row_place[pairs][:, :, None]
            yield i, j, torch.where(lower, above.clamp_(0, 1), 0.0)

    def _split(self, level: Tensor, highest: int) -> None:
        n = level.numel()
        self.splits = []
        index = rows = torch.arange(n)
        places = self.steps.places
        below = torch.zeros(n + 1, dtype=torch.int32)
        for bit in reversed(range(TILE_BITS, highest.bit_length())):
            lacks = (level >> bit) & 1 == 0
            torch.cumsum(lacks, 0, out=below[1:])
            n_without = int(below[-1])
            to = torch.where(lacks, below[:-1], rows + n_without - below[:-1])
            order = torch.empty_like(rows).scatter_(0, to, rows)
            level, index = level.index_select(0, order), index.index_select(0, order)
            places = places.index_select(1, order)
            before = look_up(below, places)
            without, having = index.tensor_split([n_without])
            self.splits.append(Split(without, having, before[:, n_without:].clone()))
            places = torch.where(rows < n_without, before, n_without + places - before)

    def sums(self, weights: Tensor) -> Tensor:
        """Σ_j H_ij weight_j, for weights (P, K)."""
        in_tiles = self._in_tiles(weights[self.order])
        total = torch.zeros_like(in_tiles)
        for i, j, above in self._tiles():
            total.index_add_(0, i, above @ in_tiles[j])
        result = self._from_tiles(total)
        summands = self.steps.summands(weights)
        for without, having, places in self.splits:
            table = summands.new_zeros(len(without) + 1, summands.shape[1])
            torch.cumsum(summands.index_select(0, without), 0, out=table[1:])
            start = self.steps.start.index_select(0, having)
            result.index_add_(0, having, self.steps.sums(table, places, start))
        return result

    def spread(self, share: Tensor) -> Tensor:
        """Σ_i H_ij share_i, for shares (P,) that are not negative; 0 where every term is."""
        in_tiles = self._in_tiles(share[self.order])
        total = torch.zeros_like(in_tiles)
        for i, j, above in self._tiles():
            total.index_add_(0, j, (in_tiles[i][:, None, :] @ above)[:, 0])
        result = self._from_tiles(total)
        fraction = self.steps.at.frac()
        for without, having, places in self.splits:
            # `Steps.sums` the other way round: what is looked up at a place goes to all before it
            first, middle, last, end = places.long()
            whole = share.index_select(0, having)
            part = whole * self.steps.start.index_select(0, having)
            gives = (whole > 0).double()
            n = len(without)
            received = covered(n, first, last, whole) * fraction.index_select(0, without)
            received += covered(n, middle, end, whole) - covered(n, first, last, part)
            received.mul_(covered(n, first, end, gives) > 0)  # no rounding where nothing comes
            result.index_add_(0, without, received)
        return result


def sorting(positives: Positives, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rank & Sort's rank⁺ (self term H(0)), sorting errors, and their gradient times P."""
    score, quality = positives
    steps = Steps(score, delta)
    weights = torch.stack([torch.ones_like(quality), 1 - quality], 1)
    if len(score) <= FEW:
        above = (steps.at - (steps.at - steps.self_step)[:, None]).clamp_(0, 1)
        above_and_lower = above * (quality < quality[:, None])
        rank = above @ weights
        lower = above_and_lower @ weights
        error, share = sorting_error(rank, lower)
        return rank[:, 0], error, share @ above_and_lower - error
    rank = sums_above(steps, weights)
    violators = LowerQuality(steps, quality)
    error, share = sorting_error(rank, violators.sums(weights))
    return rank[:, 0], error, violators.spread(share) - error


def sorting_error(rank: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Current minus target sorting error, in the form that does not cancel; and its share per
    violator. Of sums of 1 and of 1 - quality, (P, 2), over all positives and over violators."""
    (rank, total), (wrong, excess) = rank.unbind(1), lower.unbind(1)
    target = (total - excess) / (rank - wrong)
    error = torch.where(wrong > 0, (excess - wrong * target) / rank, 0.0)
    return error, torch.where(wrong > 0, error / wrong, 0.0)


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
