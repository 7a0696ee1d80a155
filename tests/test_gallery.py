"""The gallery: every loss is drawn, by calling this package; what is committed is complete."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import tritonloss as tl
from tritonloss._dispatch import INTERPRET

pytest.importorskip("matplotlib", reason="the gallery needs tritonloss[viz]")
if INTERPRET:
    pytest.skip("says the same in the plain run", allow_module_level=True)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
gallery = importlib.import_module("gallery")
COMMITTED = ROOT / "docs" / "gallery"
# A ratio of two losses, a table of costs and its assignment: without a curve of their own
NOT_DRAWN = {"iou", "self_balanced_weight", "matching_cost", "assign"}


@pytest.fixture(scope="module")
def drawn():
    """Name -> figure, and the functions of the package that were called."""
    called = set()

    def watched(name, function):
        def call(*args, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        return call

    patch = pytest.MonkeyPatch()
    for name in tl.functional.__all__:
        if name.islower():
            patch.setattr(tl, name, watched(name, getattr(tl, name)))
    figures = {name: draw() for name, draw in gallery.PICTURES.items()}
    patch.undo()
    yield figures, called
    gallery.plt.close("all")


def test_every_loss_is_drawn(drawn):
    assert drawn[1] == {n for n in tl.functional.__all__ if n.islower()} - NOT_DRAWN


@pytest.mark.parametrize("name", gallery.PICTURES)
def test_pictures_are_labelled_and_state_the_formula(name, drawn):
    figure = drawn[0][name]
    assert figure.get_suptitle()
    for axis in figure.axes:
        assert axis.has_data()
        shared = any(other is not axis for other in axis.get_shared_x_axes().get_siblings(axis))
        assert (axis.get_xlabel() or shared) and (axis.get_ylabel() or axis.get_legend()), name


def curves(figure, axis: int) -> dict:
    return {
        line.get_label(): tuple(np.asarray(v, float) for v in line.get_data())
        for line in figure.axes[axis].lines
    }


def test_curves_are_the_formulas(drawn):
    x, y = curves(drawn[0]["focal"], 0)["γ = 2"]
    p = 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(y, -((1 - p) ** 2) * np.log(p), rtol=1e-9)
    p, y = curves(drawn[0]["quality_focal"], 0)["y = 0.5, β = 2"]
    expected = (0.5 - p) ** 2 * -0.5 * (np.log(p) + np.log(1 - p))
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-15)
    d, y = curves(drawn[0]["authentic_smooth_l1"], 1)["ASL1, μ = 0.1"]
    np.testing.assert_allclose(y, d / np.hypot(d, 0.1), rtol=1e-9)
    d, y = curves(drawn[0]["step_function"], 0)["δ = 0.5"]
    np.testing.assert_allclose(y, np.clip(d + 0.5, 0, 1), atol=1e-9)


def test_committed_gallery_is_complete():
    assert (COMMITTED / "README.md").read_text() == gallery.page(), "python examples/gallery.py"
    assert {p.stem for p in COMMITTED.glob("*.png")} == set(gallery.PICTURES)


def test_command_line_writes_one_picture(tmp_path, capsys):
    gallery.main(["--out", str(tmp_path / "new"), "--only", "focal"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "new" / "focal.png")]
    assert (tmp_path / "new" / "focal.png").stat().st_size > 10_000
