"""Every row of the migration tables: our call against the formula of the other code base."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tritonloss as tl
from tritonloss._dispatch import INTERPRET

if INTERPRET:
    pytest.skip("says the same in the plain run", allow_module_level=True)

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "migration.md").read_text()
# "| `theirs` | `ours` | what differs |", below a heading that names the host
ROW = re.compile(r"^\| (`[^|]+`) \| (`[^|]+`) \| .+ \|$", re.MULTILINE)
ROWS = {
    theirs.strip("`"): (part.split("\n")[0], ours.strip("`"))
    for part in PAGE.split("\n## From ")[1:]
    for theirs, ours in ROW.findall(part)
}
N, C = 40, 7


def inputs(seed: int) -> dict:
    """What the rows name, in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=g, dtype=torch.float64) * 2
    labels = torch.where(torch.rand(N, generator=g) < 0.5, C, torch.randint(C, (N,), generator=g))
    quality = torch.rand(N, generator=g, dtype=torch.float64) * 0.9 + 0.1
    one_hot = F.one_hot(labels, C + 1)[:, :C].double()
    corner = torch.rand(N, 2, generator=g, dtype=torch.float64) * 5
    size = torch.rand(N, 2, generator=g, dtype=torch.float64) + 0.5
    target = torch.cat([corner, corner + size], 1)
    pred = target + torch.randn(N, 4, generator=g, dtype=torch.float64) * 0.2
    return {
        "tl": tl,
        "torch": torch,
        "C": C,
        "x": x,
        "labels": labels,
        "one_hot": one_hot,
        "quality": quality,
        "scores": one_hot * quality[:, None],
        "pred": pred,
        "target": target,
        "weight": torch.rand(N, generator=g, dtype=torch.float64).add(0.1),
        "bins": torch.randn(N, 4, 17, generator=g, dtype=torch.float64),
        "distance": torch.rand(N, 4, generator=g, dtype=torch.float64) * 16,
        "classes": torch.where(labels == C, -1, labels),
        "n": (labels < C).sum(),
    }


def bce(x, y):
    return F.binary_cross_entropy_with_logits(x, y, reduction="none")


def focal(x, y, alpha=0.25, gamma=2.0):
    """For targets 0 and 1; alpha < 0 is none."""
    p_t = torch.where(y == 1, x.sigmoid(), 1 - x.sigmoid())
    alpha_t = torch.where(y == 1, alpha, 1 - alpha) if alpha >= 0 else 1
    return -alpha_t * (1 - p_t) ** gamma * p_t.log()


def smoothed(v):
    p, y = v["x"].sigmoid(), v["one_hot"]
    p_t, alpha_t = p * y + (1 - p) * (1 - y), 0.25 * y + 0.75 * (1 - y)
    loss = alpha_t * (1 - p_t) ** 1.5 * bce(v["x"], y * (1 - 0.1) + 0.5 * 0.1)
    return (loss / v["n"]).sum()


def sides(boxes):
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


def iou_parts(pred, target):
    low = torch.maximum(pred[:, :2], target[:, :2])
    high = torch.minimum(pred[:, 2:], target[:, 2:])
    inter = (high - low).clamp(min=0).prod(1)
    (w, h), (tw, th) = sides(pred), sides(target)
    union = w * h + tw * th - inter
    outer = torch.maximum(pred[:, 2:], target[:, 2:]) - torch.minimum(pred[:, :2], target[:, :2])
    return inter / union, union, outer


def giou(pred, target):
    iou, union, outer = iou_parts(pred, target)
    hull = outer.prod(1)
    return iou - (hull - union) / hull


def diou(pred, target):
    iou, _, outer = iou_parts(pred, target)
    centres = (pred[:, :2] + pred[:, 2:] - target[:, :2] - target[:, 2:]) / 2
    return iou - centres.square().sum(1) / outer.square().sum(1)


def ciou(pred, target, threshold):
    iou = iou_parts(pred, target)[0]
    (w, h), (tw, th) = sides(pred), sides(target)
    v = 4 / math.pi**2 * ((tw / th).atan() - (w / h).atan()) ** 2
    alpha = torch.where(iou > threshold, v / (1 - iou + v), 0).detach()
    return diou(pred, target) - alpha * v


def dfl(bins, distance):
    left = distance.long().clamp(max=bins.shape[-1] - 2)
    share = distance - left
    log_p = bins.log_softmax(-1)
    at_left, at_right = (log_p.gather(-1, (left + k)[..., None])[..., 0] for k in (0, 1))
    return -((1 - share) * at_left + share * at_right)


def quality_focal(x, scores):
    return (scores - x.sigmoid()).abs() ** 2 * bce(x, scores)


def varifocal(x, scores, detached=False):
    p = x.sigmoid().detach() if detached else x.sigmoid()
    return torch.where(scores > 0, scores, 0.75 * p**2) * bce(x, scores)


def ghm(x, one_hot):
    g = (x.sigmoid() - one_hot).abs().detach()
    region = (g.float() * 10).long().clamp(max=9)
    counts = torch.bincount(region.flatten(), minlength=10)
    return (bce(x, one_hot) / counts[region]).sum() / (counts > 0).sum()


def with_no_object(v):
    """Softmax over C - 1 classes and a column for none, which weighs 0.1."""
    v["empty_weight"] = torch.ones(C, dtype=torch.float64)
    v["empty_weight"][-1] = 0.1
    v["labels"] = v["labels"].clamp(max=C - 1)
    return F.cross_entropy(v["x"], v["labels"], v["empty_weight"])


def in_queries(v):
    """Two images of N / 2 queries."""
    x, y = v["x"].unflatten(0, (2, -1)), v["one_hot"].unflatten(0, (2, -1))
    v["x"], v["labels"] = x, v["labels"].unflatten(0, (2, -1))
    return focal(x, y).mean(1).sum() / v["n"] * x.shape[1]


def some_ignored(v):
    v["classes"][:5] = -2
    return focal(v["x"], v["one_hot"])[5:].sum() / v["n"]


def clamped_below_the_last_bin(v):
    v["distance"][:4] = 16
    return dfl(v["bins"], v["distance"].clamp(max=17 - 1 - 0.01)).mean(-1, keepdim=True)


FORMULAS = {
    "sigmoid_focal_loss(x, one_hot, reduction='sum') / n": lambda v: (
        focal(v["x"], v["one_hot"]).sum() / v["n"]
    ),
    "sigmoid_focal_loss(x, one_hot, alpha=-1)": lambda v: focal(v["x"], v["one_hot"], alpha=-1),
    "generalized_box_iou_loss(pred, target, reduction='sum')": lambda v: (
        1 - giou(v["pred"], v["target"])
    ).sum(),
    "complete_box_iou_loss(pred, target)": lambda v: 1 - ciou(v["pred"], v["target"], -1),
    "distance_box_iou_loss(pred, target)": lambda v: 1 - diou(v["pred"], v["target"]),
    "FocalLoss(use_sigmoid=True)(x, labels, weight, avg_factor=n)": lambda v: (
        (focal(v["x"], v["one_hot"]) * v["weight"][:, None]).sum() / v["n"]
    ),
    "QualityFocalLoss()(x, (labels, quality))": lambda v: (
        quality_focal(v["x"], v["scores"]).sum(1).mean()
    ),
    "VarifocalLoss()(x, scores, avg_factor=n)": lambda v: (
        varifocal(v["x"], v["scores"]).sum() / v["n"]
    ),
    "DistributionFocalLoss()(bins.view(-1, 17), distance.view(-1), weight.repeat_interleave(4), "
    "avg_factor=4 * n)": lambda v: (
        (dfl(v["bins"], v["distance"]) * v["weight"][:, None]).sum() / (4 * v["n"])
    ),
    "GHMC(bins=10, momentum=0)(x, one_hot, mask)": lambda v: ghm(v["x"], v["one_hot"]),
    "CIoULoss(eps=1e-6)(pred, target, weight, avg_factor=n)": lambda v: (
        ((1 - ciou(v["pred"], v["target"], 0.5)) * v["weight"]).sum() / v["n"]
    ),
    "self.bce(x, scores).sum() / n": lambda v: bce(v["x"], v["scores"]).sum() / v["n"],
    "((1 - bbox_iou(pred, target, CIoU=True)) * weight).sum() / n": lambda v: (
        ((1 - ciou(v["pred"], v["target"], -1)) * v["weight"]).sum() / v["n"]
    ),
    "DFLoss(17)(bins.view(-1, 17), distance)": clamped_below_the_last_bin,
    "sigmoid_focal_loss(x, one_hot, n) * x.shape[1]": in_queries,
    "RTDetrLoss.loss_labels_vfl": lambda v: (
        varifocal(v["x"], v["scores"], detached=True).sum() / v["n"]
    ),
    "cross_entropy(x, labels, empty_weight)": with_no_object,
    "(1 - generalized_box_iou(pred, target).diag()).sum() / n": lambda v: (
        (1 - giou(v["pred"], v["target"])).sum() / v["n"]
    ),
    "sigmoid_focal_loss_jit(x, one_hot, alpha=0.25, reduction='sum') / n": lambda v: (
        focal(v["x"], v["one_hot"], 0.25).sum() / v["n"]
    ),
    "sigmoid_focal_loss_star(x, one_hot)": lambda v: -F.logsigmoid(v["x"] * (2 * v["one_hot"] - 1)),
    "giou_loss(pred, target, reduction='mean')": lambda v: (
        1 - giou(v["pred"], v["target"])
    ).mean(),
    "focal_loss(x, classes, n, num_real_classes=C, alpha=0.25, gamma=2)": some_ignored,
    "focal_loss_legacy(x, one_hot, alpha=0.25, gamma=1.5, normalizer=n).sum()": lambda v: (
        focal(v["x"], v["one_hot"], 0.25, 1.5) / v["n"]
    ).sum(),
    "focal_loss(x, one_hot, alpha=0.25, gamma=1.5, normalizer=n, label_smoothing=0.1).sum()": (
        smoothed
    ),
}


def test_every_row_has_a_formula():
    assert list(ROWS) == list(FORMULAS)
    # no row slips through: a table has a head and a ruler
    tables = PAGE.split("\n## From ")[1:]
    assert sum(t.count("\n|") - 2 for t in tables) == len(ROWS)


@pytest.mark.parametrize("theirs", ROWS, ids=lambda theirs: f"{ROWS[theirs][0]}: {theirs}")
@pytest.mark.parametrize("seed", range(3))
def test_ours_is_theirs(theirs, seed):
    values = inputs(seed)
    moving = [values[k] for k in ("x", "pred", "bins")]
    for tensor in moving:
        tensor.requires_grad_()
    expected = FORMULAS[theirs](values)
    found = eval(ROWS[theirs][1], values)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(loss, moving, upstream, allow_unused=True) for loss in (found, expected)
    ]
    assert any(g is not None and g.any() for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_readme_takes_its_rows_from_the_page():
    readme = (ROOT / "README.md").read_text().split("\n## Migration")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^`|]+ \| `([^|]+)` \| `([^|]+)` \|$", readme, re.MULTILINE)
    assert len(rows) >= 7 and readme.count("\n|") == len(rows) + 2
    for theirs, ours in rows:
        assert ROWS[theirs][1] == ours, theirs
