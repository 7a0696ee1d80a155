"""Losses of mmdetection: theirs and ours on the same call and in training; ranking heads."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

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

import tritonloss as tl

pytest.importorskip("mmdet", reason="mmdet is not installed")
pytest.importorskip("mmcv", reason="mmcv is not installed")

import mmdet.models
from mmdet.models import losses
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

from tritonloss.integrations import mmdet as integration

register_all_modules()
CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
N, C = 90, 6


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boxes(seed, n=N):
    corner, size = draw(seed, n, 2) * 10, draw(seed + 1, n, 2).abs() * 20 + 4
    return torch.cat([corner, corner + size], 1)


LABELS = (draw(1, N).abs() * 4).long().clamp(max=C)
QUALITY = draw(2, N).sigmoid()
MASK = (draw(3, N) > -0.5).double()
ONE_HOT = torch.nn.functional.one_hot(LABELS, C + 1)[:, :C]
DENSE = ONE_HOT * QUALITY[:, None]
LOGITS, SIDES = draw(4, N, C) * 2, draw(5, N, 9)
BOXES, WANTED = boxes(6), boxes(8) * 0.3 + boxes(6) * 0.7
WEIGHT = MASK * (0.5 + draw(7, N).sigmoid())

# name of the test -> the host's loss, prediction, target, weights that it takes
CALLS = {
    "focal": (lambda **o: losses.FocalLoss(**o), LOGITS, LABELS,
              [None, WEIGHT, WEIGHT[:, None].expand(-1, C).reshape(-1)]),
    "focal one-hot": (lambda **o: losses.FocalLoss(gamma=1.5, alpha=0.4, **o), LOGITS, ONE_HOT,
                      [None, WEIGHT[:, None], WEIGHT[:, None].expand(-1, C)]),
    "quality focal": (lambda **o: losses.QualityFocalLoss(**o), LOGITS, (LABELS, QUALITY),
                      [None, WEIGHT]),
    "quality focal dense": (lambda **o: losses.QualityFocalLoss(beta=1.0, **o), LOGITS, DENSE,
                            [None, WEIGHT]),
    "varifocal": (lambda **o: losses.VarifocalLoss(**o), LOGITS, DENSE,
                  [None, WEIGHT[:, None].expand(-1, C)]),
    "varifocal unweighted": (lambda **o: losses.VarifocalLoss(iou_weighted=False, gamma=1.5, **o),
                             LOGITS, DENSE, [None, WEIGHT[:, None]]),
    "distribution focal": (lambda **o: losses.DistributionFocalLoss(**o), SIDES,
                           QUALITY * 7.9, [None, WEIGHT]),
    "iou": (lambda **o: losses.IoULoss(mode="linear", eps=1e-12, **o), BOXES, WANTED,
            [None, WEIGHT]),
    "iou square": (lambda **o: losses.IoULoss(mode="square", eps=1e-12, **o), BOXES, WANTED,
                   [None, WEIGHT[:, None].expand(-1, 4)]),
    "iou log": (lambda **o: losses.IoULoss(**o), BOXES, WANTED, [None, WEIGHT]),
    "giou": (lambda **o: losses.GIoULoss(**o), BOXES, WANTED,
             [None, WEIGHT, WEIGHT[:, None].expand(-1, 4)]),
    "diou": (lambda **o: losses.DIoULoss(eps=1e-12, **o), BOXES, WANTED, [None, WEIGHT]),
    "ciou": (lambda **o: losses.CIoULoss(eps=1e-12, **o), BOXES, WANTED, [None, WEIGHT]),
}  # fmt: skip


def both(module, pred, *args, **kwargs) -> list[tuple]:
    """Value and gradient of the host's forward, then of ours."""
    found = []
    for installed in (False, True):
        here, leaf = copy.deepcopy(module), pred.clone().requires_grad_()
        if installed:
            integration.install()
        try:
            value = here(leaf, *args, **kwargs)
        finally:
            integration.uninstall()
        found.append((value, gradients(value, [leaf]), here))
    return found


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_call(name, reduction):
    make, pred, target, weights = CALLS[name]
    for weight in weights:
        for avg_factor in (None, 7, torch.tensor([3.5])):
            if avg_factor is not None and reduction != "mean":
                continue
            module = make(loss_weight=1.7)
            options = {"avg_factor": avg_factor, "reduction_override": reduction}
            (theirs, wanted, _), (ours, found, _) = both(module, pred, target, weight, **options)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_weights_of_zero():
    with integration.installed():
        pred = BOXES.clone().requires_grad_()
        loss = losses.GIoULoss()(pred, WANTED, WEIGHT * 0, avg_factor=0)
        assert loss == 0 and not gradients(loss, [pred])[0].any()


@pytest.mark.parametrize("name", CALLS)
def test_refused_calls(name):
    make, pred, target, _ = CALLS[name]
    with integration.installed():
        with pytest.raises(AssertionError):
            make()(pred, target, reduction_override="other")
        with pytest.raises(ValueError, match="avg_factor"):
            make()(pred, target, avg_factor=2, reduction_override="sum")


@pytest.mark.parametrize("kind", [losses.FocalLoss, losses.QualityFocalLoss])
def test_probabilities_stay_the_hosts(kind):
    pred = LOGITS.sigmoid()
    target = (LABELS, QUALITY) if kind is losses.QualityFocalLoss else LABELS
    (theirs, wanted, _), (ours, found, _) = both(kind(activated=True), pred, target)
    assert ours.equal(theirs) and found[0].equal(wanted[0])


@pytest.mark.parametrize("momentum", [0, 0.75])
@pytest.mark.parametrize("name", ["labels", "one-hot", "sides"])
def test_harmonising_keeps_the_hosts_counts(name, momentum):
    ours = theirs = losses.GHMC(bins=20, momentum=momentum, loss_weight=0.7)
    if name == "sides":
        ours = theirs = losses.GHMR(bins=10, momentum=momentum)
    ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
    for step in range(4):
        pred = (draw(10 + step, N, C) * 2).float()
        weight = MASK.float()
        if name == "labels":
            args = LABELS.roll(step), weight
        else:
            target = ONE_HOT if name == "one-hot" else draw(20 + step, N, C).float()
            args = target.roll(step), weight[:, None].expand(-1, C)
        (value, wanted, theirs), (_, _, _) = both(theirs, pred, *args)
        (_, _, _), (found, gradient, ours) = both(ours, pred, *args)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert momentum == 0 or ours.acc_sum.any()


@pytest.mark.parametrize("name", ["labels", "sides"])
def test_counts_load_into_our_modules(name):
    theirs, ours = losses.GHMC(bins=20, momentum=0.75), tl.GHMCLoss(bins=20, momentum=0.75)
    if name == "sides":
        theirs, ours = losses.GHMR(bins=20, momentum=0.75), tl.GHMRLoss(bins=20, momentum=0.75)
    for step in range(3):
        pred, weight = (draw(30 + step, N, C) * 2).float(), MASK.float()
        target = LABELS.roll(step)
        if name == "sides":
            target, weight = draw(40 + step, N, C).float(), weight[:, None].expand(-1, C)
        if step == 2:
            ours.load_state_dict(theirs.state_dict())
            found = ours(pred, target, weight=weight)
        expected = theirs(pred, target, weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.amount, theirs.acc_sum)


# ----------------------------------------------------------------------------------------- training

SIZE, CLASSES = 128, 5


def config_of(path: str, **head) -> dict:
    model = Config.fromfile(CONFIGS / path).model
    model.backbone.init_cfg = None
    if model.backbone.type == "ResNet":
        model.backbone.depth = 18
        model.neck.in_channels = [64, 128, 256, 512]
    model.bbox_head.num_classes = CLASSES
    model.bbox_head.update(head)
    return model


def model_of(path: str, **head):
    torch.manual_seed(0)
    model = MODELS.build(config_of(path, **head))
    model.init_weights()
    return model.train()


def batch(counts=(3, 2)):
    g = torch.Generator().manual_seed(2)
    samples = []
    for n in counts:
        sample = DetDataSample(metainfo={
            "img_shape": (SIZE, SIZE), "pad_shape": (SIZE, SIZE), "scale_factor": (1.0, 1.0),
            "batch_input_shape": (SIZE, SIZE),
        })  # fmt: skip
        corner = torch.rand(n, 2, generator=g) * 60
        size = torch.rand(n, 2, generator=g) * 50 + 15
        labels = torch.randint(CLASSES, (n,), generator=g)
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corner, corner + size], 1), labels=labels
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=labels[:0])
        samples.append(sample)
    return torch.rand(len(counts), 3, SIZE, SIZE, generator=g) * 255, samples


def total(losses) -> torch.Tensor:
    values = [value for name, value in losses.items() if "loss" in name]
    return sum(v.sum() for value in values for v in (value if isinstance(value, list) else [value]))


GFL = {"QualityFocalLoss", "DistributionFocalLoss", "GIoULoss"}
TRAINED = {
    "gfl": ("gfl/gfl_r50_fpn_1x_coco.py", GFL),
    "atss": ("atss/atss_r50_fpn_1x_coco.py", {"FocalLoss", "GIoULoss"}),
    "retinanet": ("retinanet/retinanet_r50_fpn_1x_coco.py", {"FocalLoss"}),
    "rtmdet": ("rtmdet/rtmdet_tiny_8xb32-300e_coco.py", {"QualityFocalLoss", "GIoULoss"}),
    "pisa": ("pisa/retinanet-r50_fpn_pisa_1x_coco.py", {"FocalLoss", "isr_p", "carl_loss"}),
}  # fmt: skip


def steps_of(model, n, images, samples, lr=3e-4) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    found = []
    for _ in range(n):
        value = total(model.loss(images, samples))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_each_call_while_the_host_trains(name):
    path, used = TRAINED[name]
    model, data = model_of(path), batch()
    with shadowed(integration) as calls:
        steps_of(model, 2, *data, lr=1e-5)
    assert {n.replace(".forward", "").rpartition(".")[2] for n in calls} == used
    for _, value, gradient in calls.values():
        assert value < 1e-5 and gradient < 1e-4, calls


# their class losses grow with the quality of the boxes that they learn
GROWS = {"gfl", "rtmdet"}


@pytest.mark.parametrize("name", TRAINED)
def test_training_on_ours(name):
    path, _ = TRAINED[name]
    theirs = steps_of(model_of(path), 3, *batch(), lr=3e-5)
    with integration.installed():
        ours = steps_of(model_of(path), 3, *batch(), lr=3e-5)
    # float32, and steps that amplify what it rounds
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[-1] < 0.99 * ours[0] or name in GROWS


# ----------------------------------------------------------------------------------- ranking losses

RANKED = {
    "retinanet": (
        "retinanet/retinanet_r50_fpn_1x_coco.py",
        {"type": "RankingRetinaHead", "reg_decoded_bbox": True, "loss_bbox": {"type": "GIoULoss"}},
    ),
    "atss": ("atss/atss_r50_fpn_1x_coco.py", {"type": "RankingATSSHead"}),
}


def ranked(name: str, loss: str, **options):
    path, head = RANKED[name]
    config = config_of(path)
    for key, value in {**head, "loss_cls": {"type": loss, **options}}.items():
        config.bbox_head.pop(key, None)
        config.bbox_head[key] = value
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    return model.train()


@pytest.mark.parametrize("loss", ["RankSortLoss", "APLoss", "ALRPLoss"])
@pytest.mark.parametrize("name", RANKED)
def test_ranking_head_trains(name, loss):
    with integration.installed():
        model = ranked(name, loss)
        found = steps_of(model, 5, *batch())
    assert found[-1] < 0.98 * found[0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def anchors_of(model, images, samples):
    """What the head's losses see, written out: logits, labels, predicted and wanted boxes."""
    head = model.bbox_head
    outputs = head(model.extract_feat(images))
    scores, deltas = outputs[0], outputs[1]
    instances = [s.gt_instances for s in samples]
    infos = [s.metainfo for s in samples]
    anchors, flags = head.get_anchors([s.shape[-2:] for s in scores], infos, device="cpu")
    targets = head.get_targets(anchors, flags, instances, infos)
    start = 0 if len(targets) == 5 else 1  # ATSS returns the anchors, too
    labels, _, wanted = targets[start : start + 3]
    anchors, _ = head.get_anchors([s.shape[-2:] for s in scores], infos, device="cpu")
    rows = [[], [], [], []]
    for level, score in enumerate(scores):
        base = torch.stack([a[level] for a in anchors]).reshape(-1, 4)
        delta = deltas[level].permute(0, 2, 3, 1).reshape(-1, 4)
        rows[0].append(score.permute(0, 2, 3, 1).reshape(-1, CLASSES))
        rows[1].append(labels[level].reshape(-1))
        rows[2].append(head.bbox_coder.decode(base, delta))
        rows[3].append(wanted[level].reshape(-1, 4))
    return [torch.cat(r) for r in rows]


@pytest.mark.parametrize("loss", ["RankSortLoss", "APLoss", "ALRPLoss"])
@pytest.mark.parametrize("name", RANKED)
def test_ranking_head_ranks_all_levels_together(name, loss):
    images, samples = batch()
    with integration.installed():
        model = ranked(name, loss, delta=0.7, loss_weight=1.5)
        images = model.data_preprocessor({"inputs": images, "data_samples": samples})["inputs"]
        found = model.bbox_head.loss(model.extract_feat(images), samples)
        logits, labels, predicted, wanted = anchors_of(model, images, samples)
    positive = labels < CLASSES
    assert 0 < positive.sum() < len(labels)
    values = torch.zeros(2, len(labels))  # quality, box loss
    values[0, positive] = tl.iou(predicted[positive], wanted[positive]).detach()
    each = tl.giou_loss(predicted[positive], wanted[positive], reduction="none")
    values[1, positive] = model.bbox_head.loss_bbox.loss_weight * each.detach()
    if loss == "RankSortLoss":
        both = tl.rank_sort_loss(logits, (labels, values[0]), delta=0.7)
        parts = {"loss_cls": 1.5 * both.rank, "loss_sort": 1.5 * both.sort}
    elif loss == "APLoss":
        parts = {"loss_cls": 1.5 * tl.ap_loss(logits, labels, delta=0.7)}
    else:
        both = tl.alrp_loss(logits, labels, values[1], delta=0.7)
        parts = {"loss_cls": 1.5 * both.cls}
    for key, value in parts.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    # balanced: the box loss is as large as what it is scaled to
    size = sum(parts.values()) + (both.loc if loss == "ALRPLoss" else 0)
    torch.testing.assert_close(found["loss_bbox"], size, rtol=1e-4, atol=1e-6)
    assert found["loss_bbox"].requires_grad


def test_ranking_head_without_objects():
    for loss in ("RankSortLoss", "APLoss", "ALRPLoss"):
        with integration.installed():
            model = ranked("retinanet", loss)
            value = total(model.loss(*batch((0, 0))))
        value.backward()
        assert value == 0
        assert all(p.grad is not None for p in model.bbox_head.parameters())


def test_ranking_head_refuses_other_losses():
    with integration.installed():
        with pytest.raises(TypeError, match="RankSortLoss"):
            ranked("retinanet", "FocalLoss")
        path, _ = RANKED["retinanet"]
        config = config_of(path, type="RankingRetinaHead")
        config.bbox_head.pop("loss_cls")
        config.bbox_head.loss_cls = {"type": "RankSortLoss"}
        with pytest.raises(ValueError, match="reg_decoded_bbox"):
            MODELS.build(config)
    with pytest.raises(RuntimeError, match="RankingRetinaHead"):
        integration.RankSortLoss()(LOGITS, LABELS)


# --------------------------------------------------------------------------------- the installation


def test_nothing_is_left_behind():
    registered = dict(MODELS.module_dict)
    assert_nothing_is_left_behind(integration, "mmdet")
    assert MODELS.module_dict == registered


def test_a_missing_class_is_named_and_nothing_is_installed(monkeypatch):
    module = importlib.import_module("mmdet.models.losses.iou_loss")
    monkeypatch.delattr(module, "CIoULoss")
    assert_a_missing_place_is_named(integration, "mmdet", "CIoULoss.forward", "3.3.0")


def test_example():
    found = run_example("mmdet_retinanet")["losses"]
    assert found["loss_sort"].isfinite() and found["loss_bbox"].requires_grad
    assert losses.GIoULoss.forward.__module__.startswith("mmdet")


def test_page():
    found = run_page("mmdet", integration)
    assert found["logits"].grad.any() and found["found"]["loss_sort"].isfinite()
    assert losses.GIoULoss.forward.__module__.startswith("mmdet")
