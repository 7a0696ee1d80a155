"""No public loss lacks what CONTRIBUTING.md asks of it."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES

import tritonloss as tl
from tritonloss._dispatch import HAS_TRITON, INTERPRET

if INTERPRET:
    pytest.skip("says the same in the plain run", allow_module_level=True)

ROOT = Path(__file__).parent.parent
FUNCTIONS = [name for name in tl.functional.__all__ if name.islower()]
LOSSES = [name for name in FUNCTIONS if name.endswith("_loss")]
# Tested in files of their own, against loops: what they look at is the whole batch.
OWN_TESTS = {
    "alrp_loss": "test_ranking.py",
    "ap_loss": "test_ranking.py",
    "bce_loss": "test_set_criterion.py",
    "carl_loss": "test_prime_sample.py",
    "ghm_c_loss": "test_ghm.py",
    "ghm_r_loss": "test_ghm.py",
    "iou_aware_bce_loss": "test_set_criterion.py",
    "mal_loss": "test_set_criterion.py",
    "rank_sort_loss": "test_ranking.py",
}
# A form to derive losses from; weights of other losses
PLAIN_TORCH = {"generalized_focal_loss", "carl_loss"}
# Calls of the focal and the varifocal loss, whose workloads and budgets are theirs
SPECIAL_CASES = {"bce_loss", "iou_aware_bce_loss", "mal_loss"}
# Elements of a box regression that take no module of their own
NO_MODULE = {"authentic_smooth_l1_loss", "generalized_focal_loss"}


def called(run) -> set[str]:
    """Public functions that ``run`` calls, whatever name it has for them."""
    names = {inspect.unwrap(getattr(tl, name)).__code__: name for name in FUNCTIONS}
    found = set()

    def watch(frame, event, _):
        if event == "call" and frame.f_code in names:
            found.add(names[frame.f_code])

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_formula_is_tested(name):
    function = getattr(tl, name)
    if name in OWN_TESTS:
        assert name in (ROOT / "tests" / OWN_TESTS[name]).read_text()
    elif name not in PLAIN_TORCH:
        assert any(case.function is function for case in CASES), f"{name}: a row of tests/cases.py"


@pytest.mark.parametrize("name", LOSSES)
def test_module_is_exported(name):
    modules = [getattr(tl, exported) for exported in tl.__all__]
    functions = {
        getattr(m, "function", None)
        for m in modules
        if inspect.isclass(m) and issubclass(m, torch.nn.Module)
    }
    stateful = {"ghm_c_loss": tl.GHMCLoss, "ghm_r_loss": tl.GHMRLoss}
    known = getattr(tl, name) in functions or name in stateful or name in NO_MODULE
    assert known, f"{name}: a class in tritonloss/modules.py, named in tritonloss/__init__.py"


# Of classes, pairs or queries instead of anchors; HLR has nothing but rows
NO_LEVELS = {
    "assign", "class_balanced_weight", "generalized_focal_loss", "matching_cost",
    "self_balanced_weight",
}  # fmt: skip
ROWS_ONLY = {"iou_hlr"}


@pytest.mark.parametrize("name", tl.__all__)
def test_a_head_may_come_as_levels(name):
    """``class_dim``, and annotations that take a list; tests/test_levels.py compares the values."""
    function = getattr(tl, name)
    function = getattr(function, "function", function)
    if getattr(function, "__name__", None) not in FUNCTIONS or function.__name__ in NO_LEVELS:
        return
    parameters = inspect.signature(function).parameters
    per_anchor = [p for p in parameters.values() if p.kind != p.KEYWORD_ONLY]
    missing = [p.name for p in per_anchor if "Level" not in p.annotation]
    assert not missing, f"{name}: {missing} as lists of levels, see tritonloss/_levels.py"
    assert "class_dim" in parameters or function.__name__ in ROWS_ONLY, name
    tested = function.__name__ in (ROOT / "tests" / "test_levels.py").read_text()
    assert tested or any(case.function is function for case in CASES), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_readme_has_a_row_with_the_defaults(name):
    table = (ROOT / "README.md").read_text().split("## Losses")[1].split("\n## ")[0]
    rows = [row for row in table.splitlines() if f"`{name}`" in row.split(" | ")[0]]
    assert len(rows) == 1, f"{name}: a row of the table in README.md"
    functions, _, _, stated, _ = re.split(r"(?<!\\)\|", rows[0])[1:-1]
    stated = eval(f"dict({stated.strip(' `')})")
    defaults = {k: p.default for k, p in inspect.signature(getattr(tl, name)).parameters.items()}
    assert stated.items() <= defaults.items(), f"{name}: its defaults in README.md"
    if "," not in functions:  # a row of several functions states what they share
        tuned = {k for k, v in defaults.items() if isinstance(v, float)} - {"nonfinite_cost"}
        assert tuned <= set(stated), f"{name}: its defaults in README.md"


def test_every_loss_has_a_workload():
    from perf import workloads

    def run():
        for loss in workloads.LOSSES:
            call = workloads.call_of(loss, workloads.Point(12, 3, 2), "cpu")
            call.loss(call.x)

    missing = set(LOSSES) - called(run) - PLAIN_TORCH - SPECIAL_CASES
    assert not missing, f"LOSSES of perf/workloads.py lacks {missing}"


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels are not compiled")
def test_every_loss_has_a_budget():
    from perf import _examples

    def run():
        for example in _examples.EXAMPLES:
            _examples.launches_of(example)

    missing = set(LOSSES) - called(run) - PLAIN_TORCH - SPECIAL_CASES
    assert not missing, f"EXAMPLES of perf/_examples.py lacks {missing}"
