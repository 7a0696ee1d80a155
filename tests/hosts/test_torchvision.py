"""Losses of torchvision's detectors: theirs and ours on the same call and over whole steps."""

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

pytest.importorskip("torchvision", reason="torchvision is not installed")

import torchvision
from torch import nn
from torchvision.models.detection import fcos, retinanet

import tritonloss as tl
from tritonloss.integrations import torchvision as integration

REDUCTIONS = ("none", "mean", "sum")
BOX_LOSSES = ("generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss")


def boxes(g, n):
    corner = torch.rand(n, 2, generator=g, dtype=torch.float64) * 50
    return torch.cat(
        [corner, corner + 5 + torch.rand(n, 2, generator=g, dtype=torch.float64) * 40], 1
    )


def both(name, *args, **options):
    """Values and gradients of the host's function and of ours."""
    found = []
    for installed in (False, True):
        if installed:
            integration.install()
        try:
            copies = [a.clone().requires_grad_(a.requires_grad) for a in args]
            value = getattr(torchvision.ops, name)(*copies, **options)
            found.append((value, gradients(value, [c for c in copies if c.requires_grad])))
        finally:
            integration.uninstall()
    return found


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2), (-1, 2.0), (0.6, 0.5), (1, 0)])
def test_focal_function(alpha, gamma, reduction):
    x = torch.randn(40, 7, dtype=torch.float64) * 4
    y = (torch.rand(40, 7) < 0.2).double()
    options = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
    theirs, ours = both("sigmoid_focal_loss", x.requires_grad_(), y, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", BOX_LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("both_learn", [False, True])
def test_box_function(name, reduction, both_learn):
    g = torch.Generator().manual_seed(len(name))
    a, b = boxes(g, 60).requires_grad_(), boxes(g, 60).requires_grad_(both_learn)
    theirs, ours = both(name, a, b, reduction=reduction)
    # eps is added there, and a floor here
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_wrong_arguments_are_the_hosts():
    x = torch.zeros(2, 4)
    with integration.installed():
        for name in ("sigmoid_focal_loss", *BOX_LOSSES):
            with pytest.raises(ValueError, match="Invalid"):
                getattr(torchvision.ops, name)(x, x, reduction="xyz")
        with pytest.raises(ValueError, match="Invalid"):
            torchvision.ops.sigmoid_focal_loss(x, x, alpha=2)


class Backbone(nn.Module):
    """Five levels of a few channels, strides 8 to 128."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 8, 4, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
        self.deeper = nn.ModuleList(nn.Conv2d(32, 32, 3, 2, 1) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        found = {"0": x}
        for i, layer in enumerate(self.deeper):
            x = layer(x.relu())
            found[str(i + 1)] = x
        return found


MODELS = {"retinanet": retinanet.RetinaNet, "fcos": fcos.FCOS}


def model_of(name, box_loss=None):
    torch.manual_seed(3)
    model = MODELS[name](Backbone(), 4, min_size=96, max_size=96)
    if box_loss is not None:
        model.head.regression_head._loss_type = box_loss
    return model.double().train()


def batch():
    g = torch.Generator().manual_seed(5)
    images = [torch.rand(3, 96, 96, generator=g, dtype=torch.float64) for _ in range(2)]
    targets = [
        {"boxes": boxes(g, n), "labels": torch.randint(1, 4, (n,), generator=g)} for n in (3, 0)
    ]
    return images, targets


def curve(name, box_loss, steps=8):
    model, (images, targets) = model_of(name, box_loss), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-2)
    found = []
    for _ in range(steps):
        total = sum(model(images, targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(total.item())
    return found


TRAINED = [("retinanet", None), ("retinanet", "giou"), ("retinanet", "diou"),
           ("retinanet", "ciou"), ("fcos", None)]  # fmt: skip


@pytest.mark.parametrize("name, box_loss", TRAINED)
def test_whole_curve_in_float64(name, box_loss):
    theirs = curve(name, box_loss)
    with integration.installed():
        ours = curve(name, box_loss)
    assert theirs[-1] < theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_each_call_of_a_step():
    model, (images, targets) = model_of("fcos"), batch()
    # at a side of exactly 0 the host drops a part of the gradient
    nn.init.ones_(model.head.regression_head.bbox_reg.bias)
    with shadowed(integration) as calls:
        sum(model(images, targets).values()).backward()
    assert set(calls) == {"fcos.sigmoid_focal_loss", "fcos.generalized_box_iou_loss"}
    assert all(max(errors) < 1e-8 for _, *errors in calls.values()), calls


def test_nothing_is_left_behind():
    assert_nothing_is_left_behind(integration, "torchvision")


def test_a_missing_function_is_named_and_nothing_is_installed(monkeypatch):
    monkeypatch.delattr(fcos, "generalized_box_iou_loss")
    assert_a_missing_place_is_named(
        integration, "torchvision", "fcos.generalized_box_iou_loss", "0.28.0"
    )


def test_example():
    losses = run_example("torchvision_retinanet")["losses"]
    assert set(losses) == {"classification", "bbox_regression"}
    assert all(v.isfinite() and v.requires_grad for v in losses.values())
    assert retinanet.sigmoid_focal_loss.__module__.startswith("torchvision")


def test_page():
    space = run_page("torchvision", integration)
    assert all(p.grad is not None for p in space["model"].head.parameters())


def test_the_pages_losses_see_what_the_host_sees():
    space = run_page("torchvision", integration)
    model, (images, targets) = model_of("retinanet", "giou"), batch()
    space["model"] = model  # of which the page's functions speak
    theirs = model(images[:1], targets[:1])

    def of_the_page(targets, outputs, anchors, matches):
        labels, quality, boxes, wanted = space["assigned"](targets, outputs, anchors, matches)
        positive = (labels >= 0) & (labels < outputs["cls_logits"].shape[-1])
        assert (quality[positive] > 0).any() and not quality[~positive].any()
        focal = tl.sigmoid_focal_loss(outputs["cls_logits"], labels, avg_factor=len(boxes))
        giou = tl.giou_loss(boxes, wanted, avg_factor=len(boxes))
        return {"classification": focal, "bbox_regression": giou}

    model.head.compute_loss = of_the_page
    torch.testing.assert_close(model(images[:1], targets[:1]), theirs, rtol=1e-9, atol=0)

    for name in ("rank_sort", "quality_focal"):
        model.head.compute_loss = space[name]
        for part in (slice(0, 2), slice(1, 2)):  # the second image has no object
            model.zero_grad()
            losses = model(images[part], targets[part])
            sum(losses.values()).backward()
            assert (losses["bbox_regression"] > 0) == (part.start == 0)
            for p in model.head.parameters():
                assert p.grad.isfinite().all()
