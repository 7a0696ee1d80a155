"""Points that cover every pair of values of the test axes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence


def all_pairs(
    values: Sequence[Sequence], allowed: Callable[[Sequence], bool], tries: int = 30
) -> list[tuple]:
    """Greedy and always the same. (allpairspy left out pairs that ``allowed`` would let pass.)"""
    rng = random.Random(0)
    places = list(itertools.combinations(range(len(values)), 2))
    open_pairs = {
        (i, a, j, b)
        for i, j in places
        for a in range(len(values[i]))
        for b in range(len(values[j]))
    }

    def pairs(choice):
        return {(i, choice[i], j, choice[j]) for i, j in places} & open_pairs

    points = []
    for pair in sorted(open_pairs):
        if pair not in open_pairs:
            continue
        i, a, j, b = pair
        best: list[int] | None = None
        for _ in range(tries):
            choice = [rng.randrange(len(v)) for v in values]
            choice[i], choice[j] = a, b
            if not allowed([v[k] for v, k in zip(values, choice, strict=True)]):
                continue
            if best is None or len(pairs(choice)) > len(pairs(best)):
                best = choice
        open_pairs.discard(pair)
        if best is not None:
            open_pairs -= pairs(best)
            points.append(tuple(v[k] for v, k in zip(values, best, strict=True)))
    return points
