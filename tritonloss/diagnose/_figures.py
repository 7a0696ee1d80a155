"""From counts on the grid to figures: everything that a report says, as plain numbers.

Losses and their gradients are those of this package, called once for each cell of the grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonloss import _grid as grid
from tritonloss.eager.ghm import region_of
from tritonloss.losses.ghm import ghm_c_loss
from tritonloss.losses.pointwise import quality_focal_loss, sigmoid_focal_loss

GAMMAS = (0.0, 0.5, 1.0, 2.0)
EASY, HARD = 0.1, 0.5  # a negative below, from p on
TINY = 1e-300


def cross_entropy(x, labels, quality):
    return sigmoid_focal_loss(x, labels, alpha=None, gamma=0.0, reduction="none")


def focal(x, labels, quality):
    return sigmoid_focal_loss(x, labels, alpha=0.25, gamma=2.0, reduction="none")


def quality_focal(x, labels, quality):
    return quality_focal_loss(x, (labels, quality), beta=2.0, reduction="none")


LOSSES = {"cross entropy": cross_entropy, "focal": focal, "quality focal": quality_focal}


def figures_of(counts: Tensor, bins: int) -> dict:
    """All figures of a (ROWS, COLUMNS) table of counts."""
    cells = Cells(counts)
    return {
        "summary": summary(cells),
        "scores": scores(cells),
        "gradient_norms": gradient_norms(cells, bins),
        "loss_shares": loss_shares(cells),
        "gradient_shares": gradient_shares(cells, bins),
        "ranking": ranking(cells),
        "sorting": sorting(cells),
        "calibration": calibration(cells),
    }


class Cells:
    """Counts as float64, and what each cell stands for: (ROWS, POINTS) tables, row 0 negatives."""

    def __init__(self, counts: Tensor):
        self.not_finite = int(counts[:, -1].sum())
        self.count = counts[:, :-1].double()
        self.negative, self.positive = self.count[0], self.count[1:]
        self.n_negative, self.n_positive = int(self.negative.sum()), int(self.positive.sum())
        self.at_limit = int(counts[:, [0, grid.POINTS - 1]].sum())
        self.x, self.quality = grid.logits(), grid.qualities()
        self.p = torch.sigmoid(self.x)
        is_positive = torch.zeros_like(self.count)
        is_positive[1:] = 1
        # As GHM sees them: the norm is that of float32.
        self.norm = (torch.sigmoid(self.x.float()) - is_positive.float()).abs()

    @property
    def has_quality(self) -> bool:
        """Labels alone are positives of quality 1."""
        return bool(self.positive[:-1].any())

    def inputs(self, chosen: Tensor):
        """``(x (cells, 1), labels, quality)`` of the chosen cells."""
        row, column = chosen.nonzero(as_tuple=True)
        labels = (row == 0).long()  # 1 is the background of one class
        return self.x[column].unsqueeze(-1), labels, self.quality[(row - 1).clamp(min=0)]


def numbers(values: Tensor) -> list:
    """For JSON, which knows no NaN."""
    return [None if math.isnan(v) else v for v in values.double().tolist()]


def ratio(part, whole) -> float | None:
    return float(part) / float(whole) if float(whole) else None


def binned(amount: Tensor, index: Tensor, bins: int) -> Tensor:
    """Sum of the amounts by index."""
    total = torch.zeros(bins, dtype=torch.float64)
    return total.index_add_(0, index.reshape(-1), amount.reshape(-1).double())


def summary(cells: Cells) -> dict:
    easy = cells.negative[cells.p < EASY].sum()
    hard = cells.negative[cells.p >= HARD].sum()
    found = cells.x[cells.count.any(0)]
    return {
        "negatives": cells.n_negative,
        "positives": cells.n_positive,
        "negatives_per_positive": ratio(cells.n_negative, cells.n_positive),
        "easy_negatives": ratio(easy, cells.n_negative),
        "hard_negatives": ratio(hard, cells.n_negative),
        "mean_p_of_negatives": ratio((cells.negative * cells.p).sum(), cells.n_negative),
        "mean_p_of_positives": ratio((cells.positive * cells.p).sum(), cells.n_positive),
        "has_quality": cells.has_quality,
        "lowest_logit": float(found[0]) if len(found) else None,
        "highest_logit": float(found[-1]) if len(found) else None,
        "not_finite": cells.not_finite,
        "at_limit": cells.at_limit,
        "limit": grid.LIMIT,
    }


def scores(cells: Cells) -> dict:
    """Negatives and positives by logit, in steps of 1/4."""
    width = grid.STEPS // 4
    index = (torch.arange(grid.POINTS) // width).clamp(max=8 * grid.LIMIT - 1)
    found = {
        "logit_edges": [k / 4 - grid.LIMIT for k in range(8 * grid.LIMIT + 1)],
        "negatives": numbers(binned(cells.negative, index, 8 * grid.LIMIT)),
        "positives": numbers(binned(cells.positive.sum(0), index, 8 * grid.LIMIT)),
    }
    filled = [k for k, pair in enumerate(zip(*list(found.values())[1:], strict=True)) if any(pair)]
    first, last = (filled[0], filled[-1] + 1) if filled else (0, 0)
    return {name: values[first : last + (name == "logit_edges")] for name, values in found.items()}


def gradient_norms(cells: Cells, bins: int) -> dict:
    """Logits by unit region of the gradient norm g = abs(p - y), y the label."""
    region = region_of(cells.norm, bins, torch.int64)
    return {
        "edges": [k / bins for k in range(bins + 1)],
        "negatives": numbers(binned(cells.negative, region[0], bins)),
        "positives": numbers(binned(cells.positive, region[1:], bins)),
    }


def loss_shares(cells: Cells) -> dict:
    """Share of the focal loss that the hardest logits hold, for each gamma, without alpha.

    Positives and negatives apart, each normalised to 1: Figure 4 of the focal paper, counted from
    the hardest.
    """
    x = cells.x.unsqueeze(-1)
    found = {"gammas": list(GAMMAS)}
    for name, label, count in (
        ("negatives", 1, cells.negative),
        ("positives", 0, cells.positive.sum(0)),
    ):
        total = int(count.sum())
        if not total:
            found[name] = None
            continue
        labels = torch.full(x.shape[:1], label)
        fraction = torch.logspace(-math.log10(total), 0, 121, dtype=torch.float64)
        fraction[-1] = 1.0
        curves = []
        for gamma in GAMMAS:
            loss = sigmoid_focal_loss(x, labels, alpha=None, gamma=gamma, reduction="none")
            curves.append(numbers(held_by_hardest(loss.squeeze(-1), count, fraction)))
        found[name] = {"hardest_fraction": numbers(fraction), "share_of_loss": curves}
    return found


def held_by_hardest(loss: Tensor, count: Tensor, fraction: Tensor) -> Tensor:
    """Share of the whole loss that the hardest fractions of the logits hold."""
    order = loss.argsort(descending=True, stable=True)
    loss, count = loss[order], count[order]
    loss, count = loss[count > 0], count[count > 0]
    logits, held = count.cumsum(0), (loss * count).cumsum(0)
    wanted = fraction * logits[-1]
    cell = torch.searchsorted(logits, wanted).clamp(max=len(logits) - 1)
    # All logits of a cell have the same loss.
    return (held[cell] - (logits[cell] - wanted) * loss[cell]) / held[-1].clamp(min=TINY)


def gradients(cells: Cells, bins: int) -> dict[str, Tensor]:
    """abs(dL/dx) of all logits of each cell together, (ROWS, POINTS), for each loss.

    A loss sees each filled cell once. GHM-C takes the true counts of the regions as its running
    ones, which a momentum next to 1 leaves as they are.
    """
    amount = binned(cells.count, region_of(cells.norm, bins, torch.int64), bins)
    state = amount, torch.ones_like(amount)

    def ghm_c(x, labels, quality):
        return ghm_c_loss(x, labels, bins=bins, momentum=1 - 2**-53, state=state)[0]

    filled = cells.count > 0
    x, *targets = cells.inputs(filled)
    found = {}
    for name, loss in (LOSSES | {"GHM-C": ghm_c}).items():
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(loss(x, *targets).sum(), x)
        found[name] = torch.zeros_like(cells.count)
        found[name][filled] = slope.abs().squeeze(-1)
        found[name] *= cells.count
    return found


def gradient_shares(cells: Cells, bins: int) -> dict | None:
    """Share of the whole gradient of each loss by unit region of g, and by kind of logit."""
    if not cells.count.any():
        return None
    region = region_of(cells.norm, bins, torch.int64)
    kinds = {
        "positives": (slice(1, None), slice(None)),
        f"negatives, p ≥ {HARD}": (0, cells.p >= HARD),
        f"negatives, {EASY} ≤ p < {HARD}": (0, (cells.p >= EASY) & (cells.p < HARD)),
        f"negatives, p < {EASY}": (0, cells.p < EASY),
    }
    by_region, by_kind = {}, {}
    for name, amount in gradients(cells, bins).items():
        whole = amount.sum().clamp(min=TINY)
        by_region[name] = numbers(binned(amount, region, bins) / whole)
        by_kind[name] = {kind: float(amount[where].sum() / whole) for kind, where in kinds.items()}
    return {
        "edges": [k / bins for k in range(bins + 1)],
        "by_region": by_region,
        "by_kind": by_kind,
    }


def bins_of_quality(number: int) -> Tensor:
    """Bin of each quality of the grid, of which every bin has as many; the last is closed at 1."""
    points = torch.arange(grid.QUALITY_STEPS + 1) // (grid.QUALITY_STEPS // number)
    return points.clamp(max=number - 1)


def above(count: Tensor) -> Tensor:
    """How many stand above each point of the grid (last dim); those at the same point count half.

    That is the sum of H(s_j - s_i) for any delta below the grid's step.
    """
    return count.flip(-1).cumsum(-1).flip(-1) - count / 2


def ranking(cells: Cells) -> dict:
    """How many negatives outrank a positive, precision over rank, and the ranking errors."""
    positive = cells.positive.sum(0)
    false, true = above(cells.negative), above(positive) + 0.5  # a positive counts itself
    where = positive > 0
    positive, false, true, x = (t[where].flip(0) for t in (positive, false, true, cells.x))
    if not len(positive):
        return {"average_precision": None, "ranking_error": None, "outranked": None, "curve": None}
    rank = true + false
    share = positive / positive.sum()
    decades = [0.0, *(10.0**k for k in range(len(str(cells.n_negative)) + 1))]
    inside = torch.bucketize(false, torch.tensor(decades).double(), right=True) - 1
    order = false.argsort()
    reached = positive[order].cumsum(0) / positive.sum()
    quantiles = {
        f"{q}%": float(false[order][torch.searchsorted(reached, q / 100 - 1e-12)])
        for q in (10, 50, 90)
    }
    return {
        # 1 - AP loss, and the ranking error of Rank & Sort, whose rank lacks half of itself
        "average_precision": float((share * true / rank).sum()),
        "ranking_error": float((share * false / (rank - 0.5)).sum()),
        "outranked": {
            "mean": float((share * false).sum()),
            "quantiles": quantiles,
            "edges": decades,
            "positives": numbers(binned(positive, inside, len(decades) - 1)),
        },
        "curve": {
            "logit": numbers(x),
            "positives": numbers(positive),
            "rank": numbers(rank),
            "precision": numbers(true / rank),
            "recall": numbers(true / cells.n_positive),
        },
    }


def sorting(cells: Cells) -> dict | None:
    """Positives that stand above better ones: sorting error, and violations by IoU."""
    if not cells.n_positive or not cells.has_quality:
        return None
    count, y = cells.positive, cells.quality[:, None]

    def at_least_as_good(amount):
        return amount.flip(0).cumsum(0).flip(0)

    # Sums over positives j above i, those with y_j >= y_i, then all
    better, better_error = (above(at_least_as_good(t)) for t in (count, count * (1 - y)))
    every, every_error = better[:1], better_error[:1]
    excess = every_error / every.clamp(min=TINY) - better_error / better.clamp(min=TINY)
    excess = torch.where(count > 0, excess, 0)
    worse_above = torch.where(count > 0, every - better, 0)
    worse = cells.n_positive - at_least_as_good(count.sum(1, keepdim=True))
    tenth = bins_of_quality(10)

    def by_iou(amount):
        return binned(amount.sum(1), tenth, 10)

    number, pairs = by_iou(count), by_iou(count * worse)
    violations = by_iou(count * worse_above)
    return {
        "sorting_error": float((count * excess).sum() / cells.n_positive),
        "violations": ratio(violations.sum(), pairs.sum()),
        "iou_edges": [k / 10 for k in range(11)],
        "positives": numbers(number),
        "violations_by_iou": numbers(violations / torch.where(pairs > 0, pairs, torch.nan)),
        "error_by_iou": numbers(
            by_iou(count * excess) / torch.where(number > 0, number, torch.nan)
        ),
    }


def calibration(cells: Cells) -> dict | None:
    """Score against IoU, positives alone: mean IoU by score, and both together."""
    if not cells.n_positive or not cells.has_quality:
        return None
    tenth = (cells.p * 10).long().clamp(max=9)
    count, by_score = cells.positive, cells.positive.sum(0)
    number = binned(by_score, tenth, 10)
    known = torch.where(number > 0, number, torch.nan)
    p = binned(by_score * cells.p, tenth, 10) / known
    iou = binned((count * cells.quality[:, None]).sum(0), tenth, 10) / known
    fine = 20
    columns = (cells.p * fine).long().clamp(max=fine - 1)
    rows = bins_of_quality(fine)
    cell = rows[:, None] * fine + columns
    return {
        "score_edges": [k / 10 for k in range(11)],
        "positives": numbers(number),
        "mean_score": numbers(p),
        "mean_iou": numbers(iou),
        "error": float((number * (p - iou).abs()).nansum() / cells.n_positive),
        "joint_edges": [k / fine for k in range(fine + 1)],
        "joint": [numbers(row) for row in binned(count, cell, fine * fine).view(fine, fine)],
    }
