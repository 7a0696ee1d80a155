"""Which gradients train a detector: the pictures that GHM and prime samples are argued with.

Drawn from the recorded outputs of a trained dense detector (NanoDet-g on three photographs).

    python examples/gradient_norms.py --out docs/images/gradient_norms.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import tritonloss

RECORDED = Path(__file__).parents[1] / "tests/data/recorded/nanodet_g_416.npz"
BINS, MU = 30, 0.02


def recorded():
    """``(logits (N, 80), labels, IoU, gt_index, distances to the target sides)``, all anchors."""
    data = {k: torch.from_numpy(v) for k, v in np.load(RECORDED).items()}
    logits = data["cls_logits"].float().flatten(0, 1)
    labels, gt_index = data["labels"].long().flatten(), data["gt_index"].long().flatten()
    quality = data["quality"].flatten()
    # Sides in units of the stride: the expectation of the predicted distribution, and its target.
    sides = data["box_logits"].float().unflatten(-1, (4, 11)).softmax(-1) @ torch.arange(11.0)
    boxes = data["gt_boxes"][gt_index.clamp(min=0)].view(*data["gt_index"].shape, 4)
    wanted = torch.cat([data["centres"] - boxes[..., :2], boxes[..., 2:] - data["centres"]], -1)
    distance = (sides - wanted / data["strides"][:, None]).flatten(0, 1)
    return logits, labels, quality, gt_index, distance[gt_index >= 0]


def gradient(loss, x):
    x = x.detach().requires_grad_()
    loss(x).backward()
    return x.grad.abs().double()


def share_by_bin(position, amount, edges):
    """Share of the whole amount that falls into each bin."""
    bins = torch.bucketize(position.double(), edges[1:-1].double(), right=True)
    share = torch.zeros(len(edges) - 1, dtype=torch.float64)
    return share.index_add(0, bins.flatten(), amount.flatten()) / amount.sum()


def draw_shares(ax, losses, x, position, edges):
    """Share of each loss' gradient that comes from each bin of the position."""
    for name, loss in losses.items():
        share = share_by_bin(position, gradient(loss, x), edges)
        ax.stairs(share.numpy(), edges.numpy(), label=name)
    ax.set_ylabel("share of the whole gradient")


def draw_norms(ax, norm, positive, edges):
    for mask, name in ((~positive, "negatives"), (positive, "positives")):
        count = torch.histc(norm[mask].double(), BINS, 0, 1)
        ax.stairs(count.numpy(), edges.numpy(), label=f"{name} ({int(mask.sum()):,})")
    ax.set(yscale="log", xlabel="gradient norm g = |p - y|", ylabel="logits")
    ax.set_title("Nearly all logits are easy")


def draw_classification(ax, logits, labels, norm, edges):
    losses = {
        "cross entropy": lambda x: tritonloss.sigmoid_focal_loss(x, labels, alpha=None, gamma=0),
        "focal": lambda x: tritonloss.sigmoid_focal_loss(x, labels),
        "GHM-C": lambda x: tritonloss.ghm_c_loss(x, labels, bins=BINS),
    }
    draw_shares(ax, losses, logits, norm, edges)
    ax.set(xlabel="gradient norm g = |p - y|")
    ax.set_yscale("log")
    ax.set_title("Who the gradient comes from")


def regression_losses(distance):
    zeros = torch.zeros_like(distance)
    return {
        "smooth L1 (β = 1/9)": lambda d: F.smooth_l1_loss(d, zeros, beta=1 / 9),
        f"authentic smooth L1 (μ = {MU})": lambda d: tritonloss.authentic_smooth_l1_loss(
            d, zeros, mu=MU
        ),
        "GHM-R": lambda d: tritonloss.ghm_r_loss(d, zeros, mu=MU),
    }


def draw_side_norms(ax, distance, edges):
    norm = distance.abs() / torch.hypot(distance, torch.tensor(MU))
    count = torch.histc(norm.double(), BINS, 0, 1)
    ax.stairs(count.numpy(), edges.numpy(), label=f"sides of {len(distance)} positives")
    ax.set(yscale="log", xlabel="gradient norm g = |d| / √(d² + μ²)", ylabel="box sides")
    ax.set_title("Nearly all box sides are outliers")
    return norm


def draw_side_gradients(ax, distance, norm, edges):
    draw_shares(ax, regression_losses(distance), distance, norm, edges)
    ax.set(yscale="log", xlabel="gradient norm g = |d| / √(d² + μ²)")
    ax.set_title("GHM-R gives each region the same weight")


def draw_distances(ax, distance):
    edges = torch.logspace(-3, 1, 25)
    position = distance.abs().clamp(1e-3, 9.99)
    draw_shares(ax, regression_losses(distance), distance, position, edges)
    ax.set(xscale="log", xlabel="|d|, distance of a side from its target (strides)")
    ax.set_title("Which distances train the boxes")


def draw_samples(ax, logits, labels, quality, gt_index):
    positive = gt_index >= 0
    loss = tritonloss.sigmoid_focal_loss(logits, labels, alpha=None, gamma=0, reduction="none")
    loss, iou = loss.sum(-1)[positive], quality[positive]
    rank = tritonloss.iou_hlr(iou, gt_index[positive], labels[positive])
    few = len(loss) // 6
    torch.manual_seed(0)
    chosen = {
        "random": (torch.randperm(len(loss))[:few], "o", "tab:blue"),
        "hard: largest loss": (loss.argsort(descending=True)[:few], "s", "tab:green"),
        "prime: best IoU-HLR": (rank.argsort(stable=True)[:few], "^", "tab:red"),
    }
    ax.scatter(iou, loss, s=6, c="lightgrey", label=f"all {len(loss)} positives")
    for name, (rows, marker, colour) in chosen.items():
        ax.scatter(
            iou[rows], loss[rows], s=28, marker=marker, label=name, facecolors="none",
            edgecolors=colour,
        )  # fmt: skip
    ax.set(xlabel="IoU with the object", ylabel="classification loss of the anchor", ylim=(0, 6.5))
    ax.set_title("Random, hard and prime samples")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gradient_norms.png"))
    args = parser.parse_args()
    logits, labels, quality, gt_index, distance = recorded()
    positive = labels.unsqueeze(-1) == torch.arange(logits.shape[-1])
    norm = (logits.sigmoid() - positive.float()).abs()
    edges = torch.linspace(0, 1, BINS + 1)

    figure, axes = plt.subplots(2, 3, figsize=(16, 8), layout="constrained")
    draw_norms(axes[0, 0], norm, positive, edges)
    draw_classification(axes[0, 1], logits, labels, norm, edges)
    draw_samples(axes[0, 2], logits, labels, quality, gt_index)
    side_norm = draw_side_norms(axes[1, 0], distance, edges)
    draw_side_gradients(axes[1, 1], distance, side_norm, edges)
    draw_distances(axes[1, 2], distance)
    for ax in axes.flat:
        ax.legend(fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
