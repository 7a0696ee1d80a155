"""The grid on which a diagnosis counts: logits and qualities rounded to their nearest point.

One table holds it all: row 0 the negatives, row 1 + k the positives whose quality is nearest to
k / QUALITY_STEPS; a column for each logit of the grid, the last one for what is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 32  # beyond it a sigmoid is 0 or 1 to 14 digits: counted as +-LIMIT
STEPS = 64  # points per unit of the logit
QUALITY_STEPS = 100
POINTS = 2 * LIMIT * STEPS + 1
COLUMNS = POINTS + 1
ROWS = QUALITY_STEPS + 2


def logits() -> Tensor:
    """(POINTS,) float64."""
    return torch.arange(-LIMIT * STEPS, LIMIT * STEPS + 1, dtype=torch.float64) / STEPS


def qualities() -> Tensor:
    """(ROWS - 1,) float64."""
    return torch.arange(QUALITY_STEPS + 1, dtype=torch.float64) / QUALITY_STEPS
