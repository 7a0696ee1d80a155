"""Ranking losses on small drawn problems; needs hypothesis."""

from __future__ import annotations

import pytest
import torch
from ranking_cases import LOSSES, Problem, assert_agrees, expected, ours, relative_error

from tritonloss._dispatch import INTERPRET

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("backend")


@st.composite
def small_problems(draw):
    scores = st.integers(-6, 6).map(lambda k: k / 4)
    n = draw(st.integers(1, 12))
    x = torch.tensor(draw(st.lists(scores, min_size=n, max_size=n)))
    labels = torch.tensor(draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=n, max_size=n)))
    quality = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=n,
                                         max_size=n)))  # fmt: skip
    delta = draw(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 2.0]))
    return x[:, None], labels, quality, delta


@settings(max_examples=20 if INTERPRET else 150, deadline=None)
@given(small_problems(), st.sampled_from(LOSSES))
def test_small_problems(small, loss):
    x, labels, quality, delta = small
    problem = Problem(x, labels, quality)
    got = ours(loss, x, (labels, quality), quality, delta=delta)
    assert_agrees(got, expected(loss, problem, delta), problem, 1e-6, 1e-5)
    # a permutation and a shift on a coarse grid change nothing
    again = ours(loss, x.flip(0) + 8, (labels.flip(0), quality.flip(0)), quality.flip(0),
                 delta=delta)  # fmt: skip
    assert relative_error(again[1].flip(0), got[1]) <= 1e-6
