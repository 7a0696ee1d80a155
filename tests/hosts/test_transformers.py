"""Costs, assignments and losses of transformers' detectors: theirs and ours on the same batch."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from shadow import (
    assert_a_missing_place_is_named,
    assert_nothing_is_left_behind,
    run_example,
    run_page,
    shadowed,
)

import tritonloss as tl
from tritonloss.integrations import transformers as integration

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("PIL", reason="pillow is not installed")

import transformers
from torch.utils._pytree import tree_leaves
from transformers import DFineConfig, RTDetrConfig
from transformers.loss import (
    loss_d_fine,
    loss_deformable_detr,
    loss_deimv2,
    loss_for_object_detection,
    loss_lw_detr,
    loss_rt_detr,
)

# float64 in the host: it takes differences from 1 that float32 rounds
SIZES = [4, 0, 1, 9]
QUERIES, CLASSES = 30, 12


def batch(seed, columns=CLASSES):
    g = torch.Generator().manual_seed(seed)

    def boxes(*shape):
        place = torch.rand(*shape, 2, generator=g, dtype=torch.float64)
        size = torch.rand(*shape, 2, generator=g, dtype=torch.float64) / 2 + 0.01
        return torch.cat([place, size], -1)

    images = len(SIZES)
    logits = torch.randn(images, QUERIES, columns, generator=g, dtype=torch.float64) * 3
    outputs = {"logits": logits.requires_grad_(), "pred_boxes": boxes(images, QUERIES)}
    outputs["pred_boxes"].requires_grad_()
    targets = [
        {"class_labels": torch.randint(0, CLASSES, (n,), generator=g), "boxes": boxes(n)}
        for n in SIZES
    ]
    return outputs, targets


def ours_of(outputs, targets):
    labels = [t["class_labels"] for t in targets]
    return outputs["logits"], outputs["pred_boxes"], labels, [t["boxes"] for t in targets]


# module of the matcher, its instance, our class cost
MATCHERS = {
    "rt_detr": lambda: (loss_rt_detr, loss_rt_detr.RTDetrHungarianMatcher(RTDetrConfig()), "focal"),
    "d_fine": lambda: (loss_rt_detr, loss_d_fine.DFineLoss(DFineConfig()).matcher, "focal"),
    "deformable_detr": lambda: (
        loss_deformable_detr,
        loss_deformable_detr.DeformableDetrHungarianMatcher(2, 5, 2),
        "focal",
    ),
    "detr": lambda: (
        loss_for_object_detection, loss_for_object_detection.HungarianMatcher(2, 5, 2), "softmax",
    ),
}  # fmt: skip


@pytest.mark.parametrize("host", MATCHERS)
@pytest.mark.parametrize("seed", range(3))
def test_cost_and_assignment(host, seed, monkeypatch):
    module, matcher, class_cost = MATCHERS[host]()
    outputs, targets = batch(seed)
    recorded, solve = [], module.linear_sum_assignment

    def record(cost):
        recorded.append(torch.as_tensor(cost))
        return solve(cost)

    monkeypatch.setattr(module, "linear_sum_assignment", record)
    indices = matcher(outputs, targets)
    cost = tl.matching_cost(*ours_of(outputs, targets), class_cost=class_cost)
    assert len(recorded) == len(SIZES)
    for i, (n, theirs) in enumerate(zip(SIZES, recorded, strict=True)):
        torch.testing.assert_close(cost[i, :, :n], theirs.double(), rtol=1e-6, atol=1e-6)
    single = {k: v.detach().float() for k, v in outputs.items()}
    objects = [{**t, "boxes": t["boxes"].float()} for t in targets]
    narrow = tl.matching_cost(*ours_of(single, objects), class_cost=class_cost)
    for found in (tl.assign(cost, torch.tensor(SIZES)), tl.assign(narrow, torch.tensor(SIZES))):
        for row, (queries, matched) in zip(found, indices, strict=True):
            assert row[matched].equal(queries) and (row >= 0).sum() == len(queries)


def close_with_gradients(theirs, ours, outputs):
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name][0], value, rtol=1e-6, atol=1e-7)
        inputs = [outputs["logits"], outputs["pred_boxes"]]
        pair = [
            torch.autograd.grad(v.sum(), inputs, retain_graph=True, allow_unused=True)
            for v in (value, ours[name])
        ]
        for a, b in zip(*pair, strict=True):
            if a is None:
                assert b is None or not b.any()
            else:
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)


def criterion_of(loss, outputs, targets):
    logits, boxes, labels, target_boxes = ours_of(outputs, targets)
    return tl.SetCriterion(loss)(logits[None], boxes[None], labels, target_boxes)


RT_DETR_LOSSES = {
    "rt_detr": lambda: loss_rt_detr.RTDetrLoss(RTDetrConfig(num_labels=CLASSES)),
    "d_fine": lambda: loss_d_fine.DFineLoss(DFineConfig(num_labels=CLASSES)),
}


@pytest.mark.parametrize("name", RT_DETR_LOSSES)
def test_losses_of_rt_detr(name):
    outputs, targets = batch(7)
    host = RT_DETR_LOSSES[name]().double()
    indices, n = host.matcher(outputs, targets), sum(SIZES)
    named = host.loss_labels_vfl(outputs, targets, indices, n)["loss_vfl"]
    boxes = host.loss_boxes(outputs, targets, indices, n)
    theirs = {"class": named, "l1": boxes["loss_bbox"], "giou": boxes["loss_giou"]}
    close_with_gradients(theirs, criterion_of("varifocal", outputs, targets), outputs)


def test_losses_of_deformable_detr():
    outputs, targets = batch(8)
    _, matcher, _ = MATCHERS["deformable_detr"]()
    host = loss_deformable_detr.DeformableDetrImageLoss(matcher, CLASSES, 0.25, [])
    indices, n = matcher(outputs, targets), sum(SIZES)
    named = host.loss_labels(outputs, targets, indices, n)["loss_ce"]
    boxes = host.loss_boxes(outputs, targets, indices, n)
    theirs = {"class": named, "l1": boxes["loss_bbox"], "giou": boxes["loss_giou"]}
    close_with_gradients(theirs, criterion_of("focal", outputs, targets), outputs)


def test_losses_of_detr():
    outputs, targets = batch(9, CLASSES + 1)
    _, matcher, _ = MATCHERS["detr"]()
    host = loss_for_object_detection.ImageLoss(matcher, CLASSES, 0.1, []).double()
    indices, n = matcher(outputs, targets), sum(SIZES)
    named = host.loss_labels(outputs, targets, indices, n)["loss_ce"]
    boxes = host.loss_boxes(outputs, targets, indices, n)
    theirs = {"class": named, "l1": boxes["loss_bbox"], "giou": boxes["loss_giou"]}
    close_with_gradients(theirs, criterion_of("softmax", outputs, targets), outputs)


# ------------------------------------------------------------------------------- the integration


def deformable_criterion():
    _, matcher, _ = MATCHERS["deformable_detr"]()
    losses = ["labels", "boxes", "cardinality"]
    return loss_deformable_detr.DeformableDetrImageLoss(matcher, CLASSES, 0.25, losses)


def lw_criterion(groups=3):
    matcher = loss_lw_detr.LwDetrHungarianMatcher(2, 5, 2)
    losses = ["labels", "boxes", "cardinality"]
    return loss_lw_detr.LwDetrImageLoss(matcher, CLASSES, 0.25, losses, groups).train()


def deim_criterion(mal_alpha=None, **options):
    config = transformers.Deimv2Config(num_labels=CLASSES, mal_alpha=mal_alpha, **options)
    return loss_deimv2.Deimv2Loss(config)


CRITERIA = RT_DETR_LOSSES | {
    "deformable_detr": deformable_criterion,
    "lw_detr": lw_criterion,
    "deimv2": deim_criterion,
    "deimv2 with alpha": lambda: deim_criterion(0.6),
}


def run(criterion, outputs, targets) -> tuple[dict, list]:
    """Losses, and gradients of their sum."""
    losses = criterion(outputs, targets)
    inputs = [outputs["logits"], outputs["pred_boxes"]]
    total = sum(v for v in losses.values() if v.requires_grad)
    return losses, torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("seed", range(3))
def test_installed_criterion_equals_the_hosts(name, seed, monkeypatch):
    outputs, targets = batch(seed)
    criterion = CRITERIA[name]().double()
    theirs = run(criterion, outputs, targets)
    with integration.installed():
        # what would still be the host's
        for module in (loss_rt_detr, loss_deformable_detr, loss_lw_detr):
            monkeypatch.setattr(module, "linear_sum_assignment", None)
            monkeypatch.setattr(module, "generalized_box_iou", None)
        ours = run(criterion, outputs, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CRITERIA)
def test_installed_criterion_without_objects_and_with_too_many(name):
    outputs, targets = batch(0)
    none = [{k: v[:0] for k, v in t.items()} for t in targets]
    many = [{k: v.repeat(8, *[1] * (v.dim() - 1)) for k, v in t.items()} for t in targets]
    many = [{k: v + 0.01 * torch.arange(len(v))[:, None] / 8 if k == "boxes" else v
             for k, v in t.items()} for t in many]  # fmt: skip
    for objects in (none, many):
        criterion = CRITERIA[name]().double()
        theirs = run(criterion, outputs, objects)
        with integration.installed():
            ours = run(criterion, outputs, objects)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def layered(seed, layers=3):
    """A batch with the outputs of more layers, and those of encoder and denoising queries."""
    outputs, targets = batch(seed)
    more = [batch(100 * seed + k)[0] for k in range(1, layers + 1)]
    return outputs | {"auxiliary_outputs": more[:-1], "enc_outputs": more[-1]}, targets


def denoising(seed, targets, groups=3, layers=2):
    """As RT-DETR lays them out: in each group the positives of all images, then the negatives."""
    most = max(SIZES)
    known = [
        torch.cat([2 * most * k + torch.arange(len(t["boxes"])) for k in range(groups)])
        for t in targets
    ]
    g = torch.Generator().manual_seed(seed)
    shape = len(targets), 2 * most * groups
    dn = [
        {
            "logits": torch.randn(*shape, CLASSES, generator=g, dtype=torch.float64),
            "pred_boxes": torch.rand(*shape, 4, generator=g, dtype=torch.float64) / 2 + 0.2,
        }
        for _ in range(layers)
    ]
    for each in dn:
        for value in each.values():
            value.requires_grad_()
    meta = {"dn_positive_idx": known, "dn_num_group": groups}
    return {"dn_auxiliary_outputs": dn, "denoising_meta_values": meta}


ALL_AT_ONCE = {
    "rt_detr": RT_DETR_LOSSES["rt_detr"],
    "d_fine": RT_DETR_LOSSES["d_fine"],
    "deformable_detr": deformable_criterion,
    "lw_detr": lw_criterion,
    "deimv2": lambda: deim_criterion(0.6, use_dense_one_to_one=False),
}


@pytest.mark.parametrize("name", ALL_AT_ONCE)
@pytest.mark.parametrize("seed", range(2))
def test_all_layers_at_once(name, seed, monkeypatch):
    """One call for the matched queries of all layers, one for the denoising queries."""
    outputs, targets = layered(seed)
    rt_detr = name in ("rt_detr", "d_fine", "deimv2")
    if rt_detr:
        outputs |= denoising(seed, targets)
    if name != "lw_detr":
        del outputs["enc_outputs"]
    inputs = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    criterion, calls = ALL_AT_ONCE[name]().double(), []
    call = tl.SetCriterion.forward

    def counted(self, logits, *args, **options):
        calls.append(len(logits))
        return call(self, logits, *args, **options)

    monkeypatch.setattr(tl.SetCriterion, "forward", counted)
    found = []
    for installed in (False, True):
        with integration.installed() if installed else contextlib.nullcontext():
            losses = criterion(outputs, targets)
        total = sum(v for v in losses.values() if v.requires_grad)
        found.append((losses, torch.autograd.grad(total, inputs)))
    assert calls == ([3, 2] if rt_detr else [3 + (name == "lw_detr")])
    assert list(found[0][0]) == list(found[1][0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


class Changed(loss_rt_detr.RTDetrLoss):
    """A user's own boxes."""

    def loss_boxes(self, outputs, targets, indices, num_boxes):
        losses = super().loss_boxes(outputs, targets, indices, num_boxes)
        return {k: 3 * v for k, v in losses.items()}


def layers_of_two_sizes(outputs):
    small = {k: v[:, :20] for k, v in outputs["auxiliary_outputs"][0].items()}
    return outputs | {"auxiliary_outputs": [small, *outputs["auxiliary_outputs"][1:]]}


OTHERWISE = {
    "a class of the user's": (lambda: Changed(RTDetrConfig(num_labels=CLASSES)), lambda o: o),
    "layers of two sizes": (RT_DETR_LOSSES["rt_detr"], layers_of_two_sizes),
    "DEIMv2's union of all layers' pairs": (lambda: deim_criterion(), lambda o: o),
    "another matcher": (
        lambda: loss_deformable_detr.DeformableDetrImageLoss(
            loss_for_object_detection.HungarianMatcher(2, 5, 2), CLASSES, 0.25,
            ["labels", "boxes", "cardinality"],
        ),
        lambda o: o,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_does_not_stack_takes_the_hosts_way(case, monkeypatch):
    make, change = OTHERWISE[case]
    outputs, targets = layered(3)
    del outputs["enc_outputs"]
    outputs, criterion = change(outputs), make().double()
    theirs = criterion(outputs, targets)
    monkeypatch.setattr(tl.SetCriterion, "forward", None)
    with integration.installed():
        ours = criterion(outputs, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_fine_grained_distribution():
    g = torch.Generator().manual_seed(4)
    host = loss_d_fine.DFineLoss(DFineConfig(num_labels=CLASSES))
    logits = torch.randn(40, 33, generator=g, dtype=torch.float64).requires_grad_()
    label = torch.rand(40, generator=g, dtype=torch.float64) * 32
    right, weight = torch.rand(2, 40, generator=g, dtype=torch.float64)
    weight = weight.float().double()  # so the host rounds it
    right[:3] = torch.tensor([0.0, 1.0, 1.0])
    for options in ({"avg_factor": 7}, {}, {"reduction": "mean"}, {"reduction": "none"}):
        for each in (weight, None):
            found = []
            for installed in (False, True):
                if installed:
                    integration.install()
                value = host.unimodal_distribution_focal_loss(
                    logits, label, right, 1 - right, each, **options
                )
                integration.uninstall()
                found.append((value, torch.autograd.grad(value.sum(), logits)))
            torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["teacher", "own teacher", "no objects", "every query", "plain"])
def test_local_losses_of_d_fine(kind):
    """Distributions of the matched boxes, and their distillation from the last layer."""
    g = torch.Generator().manual_seed(5)
    draw = functools.partial(torch.rand, generator=g)  # float32: the host's bins have no other
    host = loss_d_fine.DFineLoss(DFineConfig(num_labels=CLASSES))
    sizes = {"no objects": (0, 0), "every query": (6, 6)}.get(kind, (3, 1))
    outputs = {
        "logits": draw(2, 6, CLASSES),
        "pred_boxes": (draw(2, 6, 4) / 4 + 0.3).requires_grad_(),
        "ref_points": draw(2, 6, 4) / 4 + 0.3,
        "pred_corners": (4 * draw(2, 6, 4 * 33)).requires_grad_(),
        "teacher_logits": 4 * draw(2, 6, CLASSES) - 2,
        "teacher_corners": 4 * draw(2, 6, 4 * 33),
    }
    if kind == "own teacher":
        outputs["teacher_corners"] = outputs["pred_corners"].clone()
    if kind == "plain":
        del outputs["pred_corners"]
    targets = [{"boxes": draw(n, 4) / 4 + 0.3} for n in sizes]
    indices = [(torch.randperm(6, generator=g)[:n], torch.randperm(n, generator=g)) for n in sizes]
    found = []
    for installed in (False, True):
        if installed:
            integration.install()
        losses = host.loss_local(outputs, targets, indices, 4.0)
        integration.uninstall()
        found.append(losses)
        if kind != "plain":
            grad = torch.autograd.grad(sum(losses.values()), outputs["pred_corners"])
            found[-1] = losses, grad
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def tiny(name):
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    if name == "DeformableDetr":
        backbone = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
        config = transformers.DeformableDetrConfig(
            backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False,
            backbone=None, num_labels=3, num_queries=20, d_model=32, encoder_layers=1,
            decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_feature_levels=3,
            encoder_attention_heads=2, decoder_attention_heads=2, auxiliary_loss=True,
        )  # fmt: skip
    else:
        config = getattr(transformers, f"{name}Config")(
            backbone_config=backbone, num_labels=3, num_queries=20, num_denoising=10, d_model=32,
            encoder_hidden_dim=32, encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_layers=2,
            encoder_in_channels=[8, 16, 16], decoder_in_channels=[32, 32, 32],
            encoder_attention_heads=2, decoder_attention_heads=2,
        )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForObjectDetection")(config).train()


@pytest.mark.parametrize("name", ["RTDetr", "RTDetrV2", "DFine", "DeformableDetr"])
def test_model_trains_on_the_same_losses(name):
    model, images = tiny(name), torch.rand(2, 3, 128, 128)
    labels = [
        {"class_labels": torch.randint(3, (n,)), "boxes": torch.rand(n, 4) / 4 + 0.3}
        for n in (3, 1)
    ]

    def step():
        torch.manual_seed(1)  # denoising queries and dropout
        return model(images, labels=labels)

    theirs = step()
    with integration.installed():
        ours = step()
        ours.loss.backward()
    assert theirs.loss_dict.keys() == ours.loss_dict.keys()
    torch.testing.assert_close(dict(ours.loss_dict), dict(theirs.loss_dict), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["RTDetr", "RTDetrV2", "DFine", "DeformableDetr"])
def test_model_trains_in_the_shadow_and_on_ours(name):
    """Each call repeated with ours while the host trains, then the same steps on ours alone."""
    images = torch.rand(2, 3, 128, 128)
    labels = [
        {"class_labels": torch.randint(3, (n,)), "boxes": torch.rand(n, 4) / 4 + 0.3}
        for n in (2, 4)
    ]

    def train():
        model = tiny(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        losses = []
        for step in range(3):
            torch.manual_seed(step)  # denoising queries and dropout
            loss = model(images, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.item())
        return losses

    with shadowed(integration) as calls:
        theirs = train()
    whole = "DeformableDetrImageLoss" if name == "DeformableDetr" else "RTDetrLoss"
    assert calls[f"{whole}.forward"][0] == 3
    assert all(value < 1e-4 and slope < 1e-3 for _, value, slope in calls.values()), calls
    with integration.installed():
        ours = train()
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_nothing_is_left_behind():
    assert_nothing_is_left_behind(integration, "transformers")


def test_a_missing_method_is_named_and_nothing_is_installed(monkeypatch):
    monkeypatch.delattr(loss_rt_detr.RTDetrLoss, "loss_boxes")
    assert_a_missing_place_is_named(integration, "transformers", "RTDetrLoss.loss_boxes", "5.23.0")


def test_example():
    assert run_example("transformers_detr")["loss"].isfinite()
    assert loss_rt_detr.RTDetrLoss.loss_boxes.__module__.startswith("transformers")


def test_page():
    model = run_page("transformers", integration)["model"]
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
