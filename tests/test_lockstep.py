"""Training step by step with the kernels and with eager torch: the losses must stay together.

Early steps tell more than the final AP: a wrong gradient moves them by 1e-2 and more, rounding by
less than 1e-6. The kernels run interpreted, which needs TRITON_INTERPRET=1 before Python starts.
"""

import functools
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
for module in ("pycocotools", "sklearn", "PIL", "tqdm"):
    pytest.importorskip(module, reason="the example needs tritonloss[examples]")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
train_detector = importlib.import_module("train_detector")
losses = importlib.import_module("detection.losses")

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def calm_steps(monkeypatch):
    """Adam divides by the size of a gradient: where that should be 0, rounding takes a whole step
    of its own. With a large eps it takes a small one."""
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))


def run(backend, loss, steps=20):
    # A small learning rate: with the usual one, rounding alone grows to 1e-3 within 20 steps.
    config = train_detector.Config(
        data="digits",
        digits=(40, 2),
        loss=loss,
        backend=backend,
        steps=steps,
        batch=2,
        channels=16,
        # GHM jumps where rounding puts a logit into the next region: smaller still.
        lr=1e-5 if loss == "ghm" else 1e-4,
    )
    return np.array([list(step.values()) for step in train_detector.train(config).losses])


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_kernels_and_eager_train_in_lockstep(loss):
    steps = 5 if loss in ("rank_sort", "ap", "alrp", "ghm") else 10  # these are slow, interpreted
    kernels, eager = run("triton", loss, steps), run("eager", loss, steps)
    assert kernels.shape == eager.shape and len(eager) == steps
    assert distance(kernels, eager) <= TOLERANCE


def distance(a, b):
    return np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-6))


def test_a_halved_box_gradient_is_noticed(monkeypatch):
    eager = run("eager", "focal")
    exact = losses.BOX_LOSSES["giou"]

    def halved(*args, **kwargs):
        return [0.5 * level + 0.5 * level.detach() for level in exact(*args, **kwargs)]

    monkeypatch.setitem(losses.BOX_LOSSES, "giou", halved)
    disturbed = run("eager", "focal")
    np.testing.assert_array_equal(disturbed[0], eager[0])  # the values are right, the step is not
    assert distance(disturbed, eager) > 100 * TOLERANCE
