"""Losses of ultralytics' detection criterion: theirs and ours on the same call and in training."""

from __future__ import annotations

import pytest
import torch
from shadow import (
    assert_a_missing_place_is_named,
    assert_nothing_is_left_behind,
    gradients,
    run_example,
    run_page,
    shadowed,
)

pytest.importorskip("ultralytics", reason="ultralytics is not installed")
pytest.importorskip("cv2", reason="OpenCV is not installed")

from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import loss as host

from tritonloss.integrations import ultralytics as integration

SIZE, CLASSES = 128, 3


def model_of(class_weights=None):
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=CLASSES, verbose=False).train()
    model.args = get_cfg()
    if class_weights is not None:
        model.class_weights = class_weights
    return model


def batch():
    g = torch.Generator().manual_seed(1)
    n = 5
    size = torch.rand(n, 2, generator=g) * 0.3 + 0.2
    return {
        "img": torch.rand(2, 3, SIZE, SIZE, generator=g),
        "batch_idx": torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]),
        "cls": torch.randint(CLASSES, (n, 1), generator=g).float(),
        "bboxes": torch.cat([torch.rand(n, 2, generator=g) * 0.4 + 0.3, size], 1),
    }


def curve(steps, class_weights=None):
    model, data = model_of(class_weights), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        total = model.loss(data)[0].sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(total.item())
    return found


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0])])
def test_curve(weights):
    theirs = curve(4, class_weights=weights)
    with integration.installed():
        ours = curve(4, class_weights=weights)
    assert ours == pytest.approx(theirs, rel=1e-3)  # float32, amplified by the steps
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert ours[-1] < 0.9 * ours[0]


def test_each_call_while_the_host_trains():
    model, data = model_of(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with shadowed(integration) as calls:
        for _ in range(4):
            model.loss(data)[0].sum().backward()
            optimizer.step()
    assert calls["DFLoss.__call__"][0] == calls["loss.bbox_iou"][0] == 4
    for _, value, gradient in calls.values():
        assert value < 1e-5 and gradient < 1e-5, calls


def test_scores():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 40, CLASSES, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.rand(2, 40, CLASSES, generator=g, dtype=torch.float64)
    for weights in (None, torch.tensor([[[0.5, 1.0, 2.0]]], dtype=torch.float64)):
        found = []
        for installed in (False, True):
            if installed:
                integration.install()
            try:
                criterion = host.v8DetectionLoss(model_of())
            finally:
                integration.uninstall()
            criterion.class_weights = weights
            value = criterion.bce(x, y)
            value = (value if weights is None else value * weights).sum()
            found.append((value, gradients(value, [x])))
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)


def test_other_overlaps_stay_the_hosts():
    g = torch.Generator().manual_seed(3)
    a, b = torch.rand(2, 6, 4, generator=g)
    a, b = (torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], 1) for x in (a, b))
    for options in ({"xywh": False}, {"xywh": True, "CIoU": True}, {"xywh": False, "GIoU": True}):
        theirs = host.bbox_iou(a, b, **options)
        with integration.installed():
            assert host.bbox_iou(a, b, **options).equal(theirs)


def test_nothing_is_left_behind():
    assert_nothing_is_left_behind(integration, "ultralytics")


def test_a_missing_name_is_named_and_nothing_is_installed(monkeypatch):
    monkeypatch.delattr(host, "bbox_iou")
    assert_a_missing_place_is_named(integration, "ultralytics", "bbox_iou", "8.4.190")


def test_example():
    losses = run_example("ultralytics_yolo")["losses"]
    assert losses.shape == (3,) and losses.isfinite().all()
    assert host.bbox_iou.__module__.startswith("ultralytics")


def test_page():
    assert run_page("ultralytics", integration)["losses"].isfinite().all()
