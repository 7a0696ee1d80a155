"""A covering set covers every pair that is allowed."""

from __future__ import annotations

import itertools

from axes import all_pairs

VALUES = [[0, 1, 2, 3], ["a", "b"], [None, False, True], [5, 6]]


def test_every_allowed_pair_is_covered():
    def allowed(point):
        return not (len(point) > 1 and point[0] == 3 and point[1] == "b")

    points = all_pairs(VALUES, allowed)
    assert points == all_pairs(VALUES, allowed) and all(map(allowed, points))
    assert len(points) <= 20
    for i, j in itertools.combinations(range(len(VALUES)), 2):
        seen = {(p[i], p[j]) for p in points}
        wanted = set(itertools.product(VALUES[i], VALUES[j]))
        if (i, j) == (0, 1):
            wanted.discard((3, "b"))
        assert seen == wanted
