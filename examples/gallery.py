"""Every loss as a picture: its curve, its derivative, and what its parameters change.

    python examples/gallery.py --out docs/gallery

writes one picture for each function below, and a page that shows them all. Whatever is drawn comes
out of a call of tritonloss.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import tritonloss as tl
from tritonloss.diagnose import recorded

PICTURES: dict[str, Callable] = {}


def picture(draw: Callable) -> Callable:
    """Register a function that draws one picture; its docstring is the caption."""
    PICTURES[draw.__name__] = draw
    return draw


def panels(formula: str, columns: int = 2, rows: int = 1, height: float = 3.6, **kwargs):
    """``(figure, axes in a row)`` under a formula."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(9, height * rows + 0.4), layout="constrained", squeeze=False,
        **kwargs,
    )  # fmt: skip
    figure.suptitle(formula, fontsize=13)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, list(axes.flat)


def value_and_slope(loss: Callable, x: torch.Tensor):
    """The loss of each x, and its derivative."""
    x = x.detach().requires_grad_()
    value = loss(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), slope


def plot(axes, loss: Callable, x: torch.Tensor, **style) -> None:
    """The loss on the first axis, its derivative on the second."""
    for axis, y in zip(axes, value_and_slope(loss, x), strict=True):
        axis.plot(x, y, **{"lw": 1.6} | style)


def label(axes, x: str, y: str = "loss", slope: str = "derivative", top: float | None = None):
    """Name both axes, and cut the loss at the top."""
    axes[0].set(xlabel=x, ylabel=y, ylim=(0, top))
    axes[1].set(xlabel=x, ylabel=slope)
    axes[1].axhline(0, color="k", lw=0.8)
    axes[0].legend(fontsize=9, frameon=False)


def each(loss: Callable, *target, **options) -> Callable:
    """``loss`` of single logits (n,): (n, 1) inside, a value for each outside."""

    def call(x):
        args = tuple(t.expand(x.shape) for t in target)
        args = args if len(args) > 1 else args[0]
        return loss(x.unsqueeze(-1), args, reduction="none", **options).squeeze(-1)

    return call


def heat_of(loss: Callable, y: torch.Tensor, **options) -> Callable:
    """``loss`` of single logits (n,) against one dense target (1,)."""

    def call(x):
        dense = y.to(x.dtype).expand(len(x), 1)
        return loss(x.unsqueeze(-1), dense, reduction="none", **options).squeeze(-1)

    return call


def shades(name: str, number: int):
    return [plt.get_cmap(name)(0.35 + 0.6 * k / max(number - 1, 1)) for k in range(number)]


X = torch.linspace(-6, 6, 601, dtype=torch.float64)
POSITIVE, NEGATIVE = torch.tensor(0), torch.tensor(1)  # labels of a single class


@picture
def focal():
    """Focal loss of a positive: the larger γ, the less an easy logit counts. α scales the curve."""
    figure, axes = panels(r"$FL = -\alpha_t\,(1-p_t)^\gamma\,\log p_t$")
    gammas = (0.0, 0.5, 1.0, 2.0, 5.0)
    for gamma, color in zip(gammas, shades("Blues", 5), strict=True):
        name = f"γ = {gamma:g}" + (": cross entropy" if gamma == 0 else "")
        loss = each(tl.sigmoid_focal_loss, POSITIVE, alpha=None, gamma=gamma)
        plot(axes, loss, X, color=color, label=name)
    loss = each(tl.sigmoid_focal_loss, POSITIVE, alpha=0.25, gamma=2.0)
    plot(axes, loss, X, color="tab:orange", ls="--", label="γ = 2, α = 0.25")
    label(axes, "logit x of a positive", top=6)
    return figure


@picture
def focal_star():
    """FL*, one-sided: γ makes the slope steeper, β shifts it towards hard logits."""
    figure, axes = panels(r"$FL^* = -\log\,\sigma(\gamma x_t + \beta)\,/\,\gamma$")
    for (gamma, beta), color in zip(
        ((1, 0), (2, 0), (2, 1), (4, 0), (4, 2)), shades("Greens", 5), strict=True
    ):
        name = f"γ = {gamma}, β = {beta}" + (": cross entropy" if (gamma, beta) == (1, 0) else "")
        loss = each(tl.focal_star_loss, POSITIVE, gamma=float(gamma), beta=float(beta))
        plot(axes, loss, X, color=color, label=name)
    loss = each(tl.sigmoid_focal_loss, POSITIVE, alpha=None, gamma=2.0)
    plot(axes, loss, X, color="tab:blue", ls="--", label="focal, γ = 2")
    label(axes, r"$x_t$ (the logit of a positive, minus that of a negative)", top=6)
    return figure


@picture
def softmax_focal():
    """Softmax focal loss of one class among 80 whose other logits are 0."""
    figure, axes = panels(r"$FL = -(1-p_y)^\gamma\,\log p_y,\quad p = \mathrm{softmax}(x)$")
    x = torch.linspace(-4, 12, 601, dtype=torch.float64)
    for gamma, color in zip((0.0, 0.5, 1.0, 2.0), shades("Purples", 4), strict=True):

        def loss(x, gamma=gamma):
            others = torch.zeros(len(x), 79, dtype=x.dtype)
            logits = torch.cat([x.unsqueeze(-1), others], -1)
            labels = torch.zeros(len(x), dtype=torch.int64)
            return tl.softmax_focal_loss(logits, labels, gamma=gamma, reduction="none")

        plot(axes, loss, x, color=color, label=f"γ = {gamma:g}")
    label(axes, "logit of the true class")
    return figure


@picture
def quality_focal():
    """Quality focal loss around its target: for β > 0 it is 0 where the score is the IoU."""
    figure, axes = panels(r"$QFL = |y - p|^\beta\,\mathrm{BCE}(x, y)$", rows=2)
    score = torch.linspace(0.002, 0.998, 500, dtype=torch.float64)
    logit = torch.logit(score)

    def curve(pair, y, beta, **style):
        quality = torch.tensor(y, dtype=torch.float64)
        loss = each(tl.quality_focal_loss, POSITIVE, quality, beta=beta)
        for axis, values in zip(pair, value_and_slope(loss, logit), strict=True):
            axis.plot(score, values, lw=1.6, **style)

    for beta, color in zip((0.0, 1.0, 2.0, 2.5), shades("Blues", 4), strict=True):
        curve(axes[:2], 0.5, beta, color=color, label=f"y = 0.5, β = {beta:g}")
    for y, color in zip((0.0, 0.25, 0.5, 0.75, 1.0), shades("Oranges", 5), strict=True):
        curve(axes[2:], y, 2.0, color=color, label=f"y = {y:g}, β = 2")
    for pair in (axes[:2], axes[2:]):
        label(pair, "score p", slope="derivative by the logit", top=2)
    return figure


@picture
def generalized_focal():
    """The general form between two values 0 and 1: QFL for β = 2, DFL for β = 0."""
    figure, axes = panels(
        r"$GFL = -|y-\hat y|^\beta\,((y_r-y)\log p_l + (y-y_l)\log p_r),"
        r"\quad \hat y = y_l p_l + y_r p_r$"
    )
    for y, name in ((0.3, "Blues"), (0.8, "Oranges")):
        for beta, color in zip((0.0, 1.0, 2.0), shades(name, 3), strict=True):

            def loss(x, y=y, beta=beta):
                return tl.generalized_focal_loss(
                    torch.zeros_like(x), x, torch.full_like(x, y), 0, 1, beta=beta,
                    reduction="none",
                )  # fmt: skip

            plot(axes, loss, X, color=color, label=f"y = {y}, β = {beta:g}")
    label(axes, r"$x_r - x_l$", top=4)
    return figure


@picture
def varifocal():
    """Varifocal loss: a positive counts with its IoU y, an easy negative little."""
    figure, axes = panels(
        r"$VFL = y\,\mathrm{BCE}(x, y)$ for positives, "
        r"$\alpha\,p^\gamma\,\mathrm{BCE}(x, 0)$ for negatives",
        rows=2,
    )
    for y, color in zip((0.25, 0.5, 0.75, 1.0), shades("Oranges", 4), strict=True):
        quality = torch.tensor(y, dtype=torch.float64)
        loss = each(tl.varifocal_loss, POSITIVE, quality)
        plot(axes[:2], loss, X, color=color, label=f"positive, y = {y:g}")
    for gamma, color in zip((1.0, 2.0, 3.0), shades("Blues", 3), strict=True):
        quality = torch.tensor(1.0, dtype=torch.float64)
        loss = each(tl.varifocal_loss, NEGATIVE, quality, gamma=gamma)
        plot(axes[2:], loss, X, color=color, label=f"negative, α = 0.75, γ = {gamma:g}")
    loss = each(tl.varifocal_loss, NEGATIVE, quality, detach_weight=True)
    plot(axes[2:], loss, X, color="k", ls=":", label="γ = 2, weight detached")
    label(axes[:2], "logit x", top=6)
    label(axes[2:], "logit x", top=4.5)
    return figure


@picture
def matched_queries():
    """Losses of set prediction: what a matched query learns of its IoU u, and what others cost."""
    figure, axes = panels(
        r"matched: BCE towards u (bce), $u^\gamma$ (mal), "
        r"$\max(p^\alpha u^{1-\alpha}, 0.01)$ (iou-aware);"
        "\n"
        r"others: $\mathrm{BCE}(x, 0)$, or $p^\gamma\,\mathrm{BCE}(x, 0)$",
        rows=2,
    )
    losses = (
        (tl.bce_loss, "bce", "Blues"),
        (tl.mal_loss, "mal", "Oranges"),
        (tl.iou_aware_bce_loss, "iou-aware", "Greens"),
    )
    for function, name, map_name in losses:
        for u, color in zip((0.4, 0.9), shades(map_name, 2), strict=True):
            loss = each(function, POSITIVE, torch.tensor(u, dtype=torch.float64))
            plot(axes[:2], loss, X, color=color, label=f"{name}, u = {u:g}")
        loss = each(function, NEGATIVE, torch.tensor(0.0, dtype=torch.float64))
        style = "--" if name == "iou-aware" else "-"
        plot(axes[2:], loss, X, color=color, ls=style, label=f"{name}, not matched")
    label(axes[:2], "logit x", top=6)
    label(axes[2:], "logit x", top=6)
    return figure


@picture
def gaussian_focal():
    """Gaussian focal loss on a heat map: a negative counts less, the nearer it lies to a peak."""
    figure, axes = panels(
        r"$L = (1-p)^\alpha\,\mathrm{BCE}(x, 1)$ at peaks y = 1, "
        r"$(1-y)^\beta\,p^\alpha\,\mathrm{BCE}(x, 0)$ elsewhere",
        rows=2,
    )
    for alpha, color in zip((1.0, 2.0, 3.0), shades("Oranges", 3), strict=True):
        peak = torch.ones(1, dtype=torch.float64)
        loss = heat_of(tl.gaussian_focal_loss, peak, alpha=alpha)
        plot(axes[:2], loss, X, color=color, label=f"peak, α = {alpha:g}")
    for y, color in zip((0.75, 0.5, 0.25, 0.0), shades("Blues", 4), strict=True):
        target = torch.full((1,), y, dtype=torch.float64)
        loss = heat_of(tl.gaussian_focal_loss, target)
        plot(axes[2:], loss, X, color=color, label=f"y = {y:g}, α = 2, β = 4")
    label(axes[:2], "logit x", top=6)
    label(axes[2:], "logit x", top=6)
    return figure


@picture
def asymmetric():
    """Asymmetric loss: a negative is focused more than a positive; below the margin it is free."""
    figure, axes = panels(
        r"$L = (1-p)^{\gamma_+}\,\mathrm{BCE}(x, 1)$ for positives, "
        r"$-p_m^{\gamma_-}\,\log(1-p_m),\ p_m = \max(p-m, 0)$ for negatives",
        rows=2,
    )
    for gamma, color in zip((0.0, 1.0, 2.0), shades("Oranges", 3), strict=True):
        loss = each(tl.asymmetric_loss, POSITIVE, gamma_pos=gamma)
        plot(axes[:2], loss, X, color=color, label=f"positive, γ+ = {gamma:g}")
    for gamma, color in zip((1.0, 2.0, 4.0), shades("Blues", 3), strict=True):
        loss = each(tl.asymmetric_loss, NEGATIVE, gamma_neg=gamma)
        plot(axes[2:], loss, X, color=color, label=f"negative, γ− = {gamma:g}, m = 0.05")
    for margin, style in ((0.0, ":"), (0.2, "--")):
        loss = each(tl.asymmetric_loss, NEGATIVE, margin=margin)
        plot(axes[2:], loss, X, color="k", ls=style, label=f"γ− = 4, m = {margin:g}")
    label(axes[:2], "logit x", top=6)
    label(axes[2:], "logit x", top=4)
    return figure


@picture
def class_balanced():
    """Class-balanced weights: β says from how many samples on more of them say nothing new."""
    figure, axes = panels(r"$w = (1-\beta)\,/\,(1-\beta^n)$", columns=1)
    n = torch.logspace(0, 6, 200).round()
    for beta, color in zip((0.9, 0.99, 0.999, 0.9999), shades("Greens", 4), strict=True):
        weight = tl.class_balanced_weight(n, beta=beta, normalize=False)
        axes[0].plot(n, weight, color=color, lw=1.6, label=f"β = {beta:g}")
    axes[0].set(xscale="log", yscale="log", xlabel="samples of the class n", ylabel="weight")
    axes[0].legend(frameon=False)
    return figure


@picture
def distribution_focal():
    """Distribution focal loss of two bins, and of 9: the expectation moves to the target."""
    figure, axes = panels(
        r"$DFL = -(l{+}1-y)\log S_l - (y-l)\log S_{l+1},\quad S = \mathrm{softmax}(x)$", columns=3
    )
    for y, color in zip((0.0, 0.25, 0.5, 0.75, 1.0), shades("Oranges", 5), strict=True):

        def loss(x, y=y):
            bins = torch.stack([torch.zeros_like(x), x], -1)
            return tl.distribution_focal_loss(bins, torch.full_like(x, y), reduction="none")

        plot(axes[:2], loss, X, color=color, label=f"y = l + {y:g}")
    label(axes[:2], r"$x_{l+1} - x_l$", top=6)
    bins, target = torch.arange(9.0), torch.tensor(4.3)
    logits = -((bins - 5.5) ** 2) / 3
    _, slope = value_and_slope(lambda x: tl.distribution_focal_loss(x[None], target[None]), logits)
    axes[2].bar(bins - 0.2, logits.softmax(0), 0.4, color="tab:blue", label="S")
    axes[2].bar(bins + 0.2, slope, 0.4, color="tab:orange", label="derivative")
    expected = tl.distribution_expectation(logits[None]).item()
    axes[2].axvline(expected, color="tab:blue", ls="--", lw=1, label=f"expectation {expected:.1f}")
    axes[2].axvline(target, color="k", ls=":", lw=1.2, label=f"target {target:.1f}")
    axes[2].axhline(0, color="k", lw=0.8)
    axes[2].set(xlabel="bin", ylabel="probability, derivative", ylim=(-0.6, 0.55))
    axes[2].legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
    return figure


@picture
def distribution_distillation():
    """Distillation of a distribution: a high temperature looks at all bins, not at the best."""
    figure, axes = panels(
        r"$L = T^2\,KL(\mathrm{softmax}(t/T)\,\|\,\mathrm{softmax}(x/T))$", columns=3
    )
    temperatures = (1.0, 2.0, 5.0, 20.0)
    bins = torch.arange(9.0)
    teacher, student = -((bins - 3.3) ** 2) / 3, -((bins - 5.5) ** 2) / 3
    for t, color in zip(temperatures, shades("Purples", 4), strict=True):

        def loss(x, t=t):
            logits = torch.stack([torch.zeros_like(x), x], -1)
            wanted = torch.tensor([0.0, 2.0]).to(x).expand_as(logits)
            return tl.distribution_distillation_loss(
                logits, wanted, temperature=t, reduction="none"
            )

        plot(axes[:2], loss, X, color=color, label=f"T = {t:g}")
    label(axes[:2], r"$x_1 - x_0$, the teacher's is 2", top=8)
    _, slope = value_and_slope(
        lambda x: tl.distribution_distillation_loss(x[None], teacher[None]), student
    )
    axes[2].bar(bins - 0.3, teacher.softmax(0), 0.3, color="k", label="teacher")
    axes[2].bar(bins, student.softmax(0), 0.3, color="tab:blue", label="student")
    axes[2].bar(bins + 0.3, slope, 0.3, color="tab:orange", label="derivative, T = 5")
    axes[2].axhline(0, color="k", lw=0.8)
    axes[2].set(xlabel="bin", ylabel="probability, derivative")
    axes[2].legend(fontsize=8, frameon=False)
    return figure


@picture
def authentic_smooth_l1():
    """Authentic smooth L1 beside smooth L1: no corner in the derivative."""
    figure, axes = panels(r"$ASL_1 = \sqrt{d^2 + \mu^2} - \mu$")
    d = torch.linspace(-1, 1, 801, dtype=torch.float64)
    for mu, color in zip((0.02, 0.1, 0.5), shades("Blues", 3), strict=True):

        def loss(d, mu=mu):
            zeros = torch.zeros_like(d)
            return tl.authentic_smooth_l1_loss(d[:, None], zeros[:, None], mu=mu, reduction="none")[
                :, 0
            ]

        plot(axes, loss, d, color=color, label=f"ASL1, μ = {mu:g}")

    def smooth(d):
        return F.smooth_l1_loss(d, torch.zeros_like(d), beta=1 / 9, reduction="none")

    plot(axes, smooth, d, color="tab:orange", ls="--", label="smooth L1, β = 1/9 (torch)")
    label(axes, "d = prediction − target")
    for axis in axes:
        axis.set_xticks([-1, -0.5, 0, 0.5, 1])
    return figure


@picture
def boxes():
    """Box losses as a box leaves its target, and as it grows around or inside it.

    IoU alone is flat from afar. While sides and shape stay as they are, DIoU and CIoU are one; of
    boxes around one centre, one inside the other, all agree but for CIoU's small α v and
    EIoU, which counts the width itself.
    """
    figure, axes = panels(
        "IoU: 1 − IoU      GIoU: 1 − IoU + (hull − union) / hull\n"
        "DIoU: 1 − IoU + distance² / diagonal²      CIoU: DIoU + α v\n"
        "EIoU: DIoU + (difference of widths / width of the hull)², the same for heights",
        rows=2,
    )
    target = torch.tensor([-0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    shift = torch.linspace(0, 2.5, 400, dtype=torch.float64)
    width = torch.logspace(-1, 1, 400, dtype=torch.float64)

    def moved(s):
        return target + s[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)

    def grown(w):
        half = torch.full_like(w, 0.5)
        return torch.stack([-w / 2, -half, w / 2, half], -1)

    losses = {
        "IoU": (tl.iou_loss, "-"),
        "GIoU": (tl.giou_loss, "-"),
        "DIoU": (tl.diou_loss, "--"),
        "CIoU": (tl.ciou_loss, ":"),
        "EIoU": (tl.eiou_loss, (0, (5, 1))),
        "CIoU, also for IoU < 0.5": (partial(tl.ciou_loss, alpha_threshold=-1), "-."),
    }
    for name, (function, style) in losses.items():
        for pair, place, x in ((axes[:2], moved, shift), (axes[2:], grown, width)):

            def loss(s, function=function, place=place):
                return function(place(s), target.expand(len(s), 4), reduction="none")

            plot(pair, loss, x, label=name, ls=style, lw=2)
    label(axes[:2], "shift to the right, in widths")
    label(axes[2:], "width, in widths of the target")
    axes[2].get_legend().remove()
    for axis in axes[2:]:
        axis.set_xscale("log")
    return figure


@picture
def step_function():
    """The smoothed step H_δ, read off the AP loss of one positive and one negative.

    Ranking losses are error-driven: the gradient of a negative is not the derivative of the loss
    (mostly 0) but the error that it causes, here the loss itself.
    """
    figure, axes = panels(
        r"$H_\delta(x) = \mathrm{clamp}(x / 2\delta + 1/2,\,0,\,1),"
        r"\quad AP\ loss = H / (1 + H)$ for one pair"
    )
    distance = torch.linspace(-2, 2, 161, dtype=torch.float64)
    for delta, color in zip((0.0, 0.25, 0.5, 1.0), shades("Oranges", 4), strict=True):
        found = []
        for x in distance:
            logits = torch.stack([torch.zeros_like(x), x]).unsqueeze(-1)
            labels = torch.tensor([0, 1])
            value, slope = value_and_slope(
                lambda x, delta=delta, labels=labels: tl.ap_loss(x, labels, delta=delta), logits
            )
            found.append((value / (1 - value), slope[1, 0]))
        for axis, values in zip(axes, zip(*found, strict=True), strict=True):
            axis.plot(distance, values, color=color, lw=1.6, label=f"δ = {delta:g}")
    axes[0].set(xlabel="logit of the negative − logit of the positive", ylabel=r"$H_\delta$")
    axes[1].set(xlabel="logit of the negative − logit of the positive",
                ylabel="gradient at the negative = AP loss")  # fmt: skip
    axes[0].legend(frameon=False)
    return figure


@picture
def ranking():
    """Four positives (their IoUs above) among six negatives: what each ranking loss does to them.

    Rank & Sort has two parts. Ranking lifts positives that stand below negatives, and pushes those
    negatives; sorting lifts positives that stand below worse ones, and pushes those. AP and aLRP
    know the ranking alone. Bars are negative gradients: up is where the logit goes. Below means
    within δ = 0.5 above a negative, too; negatives far below all positives (dots) get no gradient.
    """
    figure, axes = panels(
        r"$rank_i = FP_i\,/\,(rank^+_i + FP_i),\quad sort_i = "
        r"mean(1-y)_{above} - mean(1-y)_{above,\ y_j \geq y_i}$",
        columns=1, rows=4, height=1.7, sharex=True,
    )  # fmt: skip
    logits = torch.tensor([2.6, 2.0, 1.7, 1.2, 0.9, 0.1, -0.4, -0.8, -1.5, -2.4]).double()
    iou = torch.tensor([0.55, 0, 0.9, 0, 0, 0.75, 0, 0.6, 0, 0]).double()
    labels = torch.where(iou > 0, 0, 1)

    def parts(x):
        x = x.unsqueeze(-1)
        rank, sort = tl.rank_sort_loss(x, (labels, iou), delta=0.5)
        alrp = tl.alrp_loss(x, labels, 1 - iou, delta=0.5)
        return {
            "Rank & Sort: rank": rank,
            "Rank & Sort: sort": sort,
            "AP": tl.ap_loss(x, labels, delta=0.5),
            "aLRP: classification": alrp.cls,
        }

    names = parts(logits).keys()
    colors = ["tab:orange" if y > 0 else "tab:blue" for y in iou]
    for axis, name in zip(axes, names, strict=True):
        value, slope = value_and_slope(lambda x, name=name: parts(x)[name], logits)
        axis.bar(logits, -slope, width=0.09, color=colors)
        axis.scatter(logits, torch.zeros_like(logits), s=9, color=colors, zorder=3)
        axis.axhline(0, color="k", lw=0.8)
        axis.set_title(f"{name} = {value.item():.3f}", fontsize=10, loc="left")
        axis.set_ylabel("−gradient")
        axis.margins(y=0.2)
    for x, y in zip(logits, iou, strict=True):
        if y > 0:
            axes[0].text(x, axes[0].get_ylim()[1], f"{y:.2f}", ha="center", fontsize=9)
    axes[-1].set_xlabel("logit (orange: positives with their IoU, blue: negatives)")
    return figure


def head():
    """``(logits (N, 80), labels, IoU, gt_index, distances to the target sides)`` as recorded."""
    data = {k: torch.from_numpy(v) for k, v in np.load(recorded()).items()}
    logits = data["cls_logits"].float().flatten(0, 1)
    labels, gt_index = data["labels"].long().flatten(), data["gt_index"].long().flatten()
    # Sides in units of the stride: the expectation of the predicted distribution, and its target.
    sides = tl.distribution_expectation(data["box_logits"].float(), sides=4)
    boxes = data["gt_boxes"][gt_index.clamp(min=0)].view(*data["gt_index"].shape, 4)
    wanted = torch.cat([data["centres"] - boxes[..., :2], boxes[..., 2:] - data["centres"]], -1)
    distance = (sides - wanted / data["strides"][:, None]).flatten(0, 1)
    return logits, labels, data["quality"].flatten(), gt_index, distance[gt_index >= 0]


def share_by(position, amount, edges):
    """Share of the whole amount that falls into each bin."""
    bins = torch.bucketize(position.double(), edges[1:-1].double(), right=True)
    share = torch.zeros(len(edges) - 1, dtype=torch.float64)
    return share.index_add(0, bins.flatten(), amount.flatten().double()) / amount.sum()


@picture
def ghm_c():
    """GHM-C on a recorded detector: what a logit of each gradient norm is given in the end.

    R_k is the number of logits in region k of the gradient norm, n the number of regions that are
    not empty. Beside it cross entropy and focal loss (α = 0.25, γ = 2).
    """
    figure, axes = panels(
        r"$L = (1/n)\;\Sigma_k\;(1/R_k)\;\Sigma_{i \in k}\;\mathrm{BCE}_i$", columns=1
    )
    logits, labels, *_ = head()
    positive = labels.unsqueeze(-1) == torch.arange(logits.shape[-1])
    norm = (torch.sigmoid(logits) - positive.float()).abs().flatten()
    order = norm.argsort()[:: max(norm.numel() // 4000, 1)]
    order = torch.cat([order, norm.argsort()[-2000:]]).unique()
    order = order[norm[order].argsort()]
    losses = {
        "cross entropy": lambda x: tl.sigmoid_focal_loss(x, labels, alpha=None, gamma=0),
        "focal": lambda x: tl.sigmoid_focal_loss(x, labels),
        "GHM-C, 10 regions": lambda x: tl.ghm_c_loss(x, labels),
        "GHM-C, 30 regions": lambda x: tl.ghm_c_loss(x, labels, bins=30),
    }
    for name, loss in losses.items():
        _, slope = value_and_slope(loss, logits)
        slope = slope.abs().flatten() / slope.abs().sum()
        axes[0].plot(norm[order], slope[order], ".", ms=2, label=name)
    axes[0].set(yscale="log", xlabel="gradient norm g = |p − y|",
                ylabel="share of the gradient of one logit")  # fmt: skip
    axes[0].legend(frameon=False, markerscale=5)
    return figure


@picture
def ghm_r():
    """GHM-R on the boxes of a recorded detector: outliers no longer hold all of the gradient."""
    figure, axes = panels(r"$g = |d|\,/\,\sqrt{d^2 + \mu^2}$, regions as in GHM-C", columns=3)
    *_, distance = head()
    mu, bins, zeros = 0.02, 30, torch.zeros_like(distance)
    norm = distance.abs() / torch.hypot(distance, torch.tensor(mu))
    edges = torch.linspace(0, 1, bins + 1)
    sides = torch.histc(norm, bins, 0, 1)
    axes[0].stairs(sides, edges, label=f"{distance.numel():,} box sides")
    losses = {
        "smooth L1 (β = 1/9)": lambda d: F.smooth_l1_loss(d, zeros, beta=1 / 9),
        "ASL1 (μ = 0.02)": lambda d: tl.authentic_smooth_l1_loss(d, zeros, mu=mu),
        "GHM-R": lambda d: tl.ghm_r_loss(d, zeros, mu=mu, bins=bins),
    }
    far = torch.logspace(-3, 1, 25)
    for name, loss in losses.items():
        _, slope = value_and_slope(loss, distance)
        axes[1].stairs(share_by(norm, slope.abs(), edges), edges, label=name)
        position = distance.abs().clamp(1e-3, 9.99)
        axes[2].stairs(share_by(position, slope.abs(), far), far, label=name)
    axes[0].set(yscale="log", xlabel="gradient norm g", ylabel="box sides")
    axes[1].set(yscale="log", xlabel="gradient norm g", ylabel="share of the gradient")
    axes[2].set(xscale="log", xlabel="|d| in strides", ylabel="share of the gradient")
    axes[2].set_ylim(0, 0.26)  # room for the legend
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    return figure


@picture
def prime_samples():
    """Prime samples of a recorded detector: neither random nor hard, but those whose boxes fit.

    Left: a sixth of the positives, chosen in three ways. Middle: the weight that ISR-P gives, with
    u = (N - rank) / N falling from 1 with the rank in IoU-HLR, N being the size of the largest
    class, which alone is shown. Right: the weight that CARL gives a box by the score p at its
    class, read off as the gradient of its box loss.
    """
    figure, axes = panels(
        r"ISR-P: $w \propto ((1-b)\,u + b)^k$ with $b = 0$,"
        r"   CARL: $c \propto ((1-b)\,p + b)^k$",
        columns=3,
    )  # fmt: skip
    logits, labels, quality, gt_index, _ = head()
    positive = gt_index >= 0
    logits, labels, iou, gt = (t[positive] for t in (logits, labels, quality, gt_index))
    loss = tl.sigmoid_focal_loss(logits, labels, alpha=None, gamma=0, reduction="none").sum(-1)
    rank = tl.iou_hlr(iou, gt, labels)
    few = len(loss) // 6
    torch.manual_seed(0)
    chosen = {
        "random": (torch.randperm(len(loss))[:few], "o", "tab:blue"),
        "hard: largest loss": (loss.argsort(descending=True)[:few], "s", "tab:green"),
        "prime: best IoU-HLR": (rank.argsort(stable=True)[:few], "^", "tab:red"),
    }
    axes[0].scatter(iou, loss, s=4, c="lightgrey", label=f"all {len(loss)} positives")
    for name, (rows, marker, color) in chosen.items():
        axes[0].scatter(iou[rows], loss[rows], s=20, marker=marker, label=name,
                        facecolors="none", edgecolors=color)  # fmt: skip
    axes[0].set(xlabel="IoU", ylabel="classification loss of the anchor")
    axes[0].set_ylim(0, float(loss.max()) * 1.5)
    largest = labels == labels.mode().values
    for k, color in zip((1.0, 2.0, 3.0), shades("Reds", 3), strict=True):
        weight = tl.isr_p_weight(loss, iou, gt, labels, k=k)[largest]
        axes[1].scatter(rank[largest], weight, s=6, color=color, label=f"ISR-P, k = {k:g}")
    axes[1].set(xlabel="rank in IoU-HLR, within the class", ylabel="weight")
    p = torch.sigmoid(logits.gather(-1, labels[:, None])).squeeze(-1)
    for (k, bias), color in zip(
        ((1.0, 0.2), (1.0, 0.0), (2.0, 0.2)), shades("Blues", 3), strict=True
    ):
        _, weight = value_and_slope(
            lambda box, k=k, bias=bias: (
                tl.carl_loss(logits, labels, box, k=k, bias=bias) * len(labels)
            ),
            torch.ones(len(labels)),
        )
        axes[2].scatter(p, weight, s=6, color=color, label=f"CARL, k = {k:g}, b = {bias:g}")
    axes[2].set(xlabel="score p at the labelled class", ylabel="weight of the box loss")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    return figure


def page() -> str:
    """The pictures with their captions, in Markdown."""
    lines = ["# Gallery", "", "Drawn by `python examples/gallery.py --out docs/gallery`.", ""]
    for name, draw in PICTURES.items():
        caption = " ".join(inspect.getdoc(draw).split())
        lines += [f"## {name.replace('_', ' ')}", "", caption, "", f"![{caption}]({name}.png)", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gallery"), metavar="DIR")
    parser.add_argument("--only", choices=PICTURES, action="append", help="this one; repeatable")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only or PICTURES:
        figure = PICTURES[name]()
        figure.savefig(args.out / f"{name}.png", dpi=100)
        plt.close(figure)
        print(args.out / f"{name}.png")
    if not args.only or (args.out / "README.md").exists():
        (args.out / "README.md").write_text(page())


if __name__ == "__main__":
    main()
