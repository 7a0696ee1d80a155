"""The pictures of a report, one function each: figures in, a matplotlib Figure out.

No pyplot: nothing here changes the state of the program that draws.
"""

from __future__ import annotations

import itertools
import math

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

NEGATIVE, POSITIVE, GREY = "#0072b2", "#d55e00", "#666666"
LOSS_COLORS = {"cross entropy": "#000000", "focal": "#0072b2", "quality focal": "#009e73",
               "GHM-C": "#d55e00"}  # fmt: skip
KIND_COLORS = ("#d55e00", "#005b8f", "#5ba4d4", "#bfdcee")
WIDTH = 7.5  # inches at DPI: the width of a README
DPI = 110


def _figure(panels: int = 1, height: float = 3.8, **kwargs):
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    axes = figure.subplots(1, panels, squeeze=False, **kwargs)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return (figure, *axes)


def _counts(axis, edges, figures, names=("negatives", "positives")):
    """Both kinds of logits as steps, on a logarithmic scale."""
    for name, color in zip(names, (NEGATIVE, POSITIVE), strict=True):
        total = sum(figures[name])
        axis.stairs(figures[name], edges, color=color, label=f"{name} ({total:,.0f})", lw=1.8)
    axis.set(yscale="log", ylabel="logits")
    axis.set_ylim(bottom=0.5)
    axis.legend(frameon=False)


def scores(figures: dict) -> Figure:
    edges = figures["logit_edges"]
    figure, axis = _figure()
    _counts(axis, edges, figures)
    axis.set_xlabel("logit x")
    top = axis.secondary_xaxis("top")
    marks = [p for p in (1e-6, 1e-4, 1e-2, 0.1, 0.5, 0.9, 0.99, 0.9999)
             if edges[0] <= math.log(p / (1 - p)) <= edges[-1]]  # fmt: skip
    top.set_xticks([math.log(p / (1 - p)) for p in marks], [f"{p:g}" for p in marks])
    top.set_xlabel("score p = σ(x)")
    return figure


def gradient_norms(figures: dict) -> Figure:
    figure, axis = _figure()
    _counts(axis, figures["edges"], figures)
    axis.set_xlabel("gradient norm g = |p − y|")
    return figure


def loss_shares(figures: dict) -> Figure:
    figure, *axes = _figure(2, sharey=True)
    for axis, name in zip(axes, ("positives", "negatives"), strict=True):
        curves = figures[name]
        axis.set_title(name, fontsize=11)
        axis.set_xlabel(f"hardest fraction of the {name}")
        if curves is None:
            axis.text(0.5, 0.5, f"no {name}", ha="center", transform=axis.transAxes)
            continue
        shades = ("#9ecae1", "#4292c6", "#08519c", "#08306b")
        if name == "positives":
            shades = ("#fdbe85", "#fd8d3c", "#d94701", "#7f2704")
        for gamma, share, shade in zip(
            figures["gammas"], curves["share_of_loss"], shades, strict=True
        ):
            axis.plot(curves["hardest_fraction"], share, color=shade, label=f"γ = {gamma:g}")
        axis.set(xscale="log", ylim=(0, 1.02))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(frameon=False)
    axes[0].set_ylabel("share of their focal loss")
    return figure


def gradient_shares(figures: dict) -> Figure:
    figure, left, right = _figure(2, height=4.8)
    for name, share in figures["by_region"].items():
        left.stairs(share, figures["edges"], color=LOSS_COLORS[name], label=name)
    left.set(xlabel="gradient norm g = |p − y|", ylabel="share of the gradient")
    smallest = min(s for share in figures["by_region"].values() for s in share if s)
    left.set(yscale="log", ylim=(min(max(smallest / 2, 1e-9), 0.1), 2))
    left.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.2))
    names = list(figures["by_kind"])
    start = [0.0] * len(names)
    for kind, color in zip(figures["by_kind"][names[0]], KIND_COLORS, strict=True):
        share = [figures["by_kind"][name][kind] for name in names]
        right.barh(names, share, left=start, color=color, label=kind)
        start = [a + b for a, b in zip(start, share, strict=True)]
    right.invert_yaxis()
    right.set(xlim=(0, 1), xlabel="share of the gradient")
    right.grid(axis="y", visible=False)
    right.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.35, -0.2))
    return figure


def outranked(figures: dict) -> Figure | None:
    if figures["outranked"] is None:
        return None
    figure, axis = _figure()
    found = figures["outranked"]
    names = ["0", *(f"{_short(a)}–{_short(b)}" for a, b in itertools.pairwise(found["edges"][1:]))]
    filled = max(k for k, n in enumerate(found["positives"]) if n) + 1
    bars = axis.bar(names[:filled], found["positives"][:filled], color=POSITIVE)
    axis.bar_label(bars, fmt="{:,.0f}")
    axis.set(xlabel="negatives with a higher score", ylabel="positives")
    axis.grid(axis="x", visible=False)
    return figure


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def precision(figures: dict) -> Figure | None:
    curve = figures["curve"]
    if curve is None:
        return None
    figure, axis = _figure()
    label = f"precision (mean at the positives: {figures['average_precision']:.3f})"
    axis.plot(curve["rank"], curve["precision"], ".-", ms=5, color=POSITIVE, label=label)
    axis.plot(curve["rank"], curve["recall"], ".--", ms=3, color=GREY, label="recall")
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="rank among all logits", ylabel="share")
    axis.legend(frameon=False)
    return figure


def sorting(figures: dict | None) -> Figure | None:
    if figures is None:
        return None
    figure, axis = _figure()
    columns = zip(
        figures["iou_edges"], figures["violations_by_iou"], figures["positives"], strict=False
    )
    for left, violations, number in columns:
        if not number:
            continue
        words = f"n = {number:,.0f}"
        if violations is None:
            words += "\nnone\nis worse"
        else:
            axis.bar(left, violations, width=0.09, align="edge", color=POSITIVE)
        axis.annotate(
            words, (left + 0.045, violations or 0), (0, 3), textcoords="offset points",
            ha="center", fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    if figures["violations"] is not None:
        label = f"all pairs: {figures['violations']:.3f}"
        axis.axhline(figures["violations"], color=GREY, ls="--", lw=1, zorder=1, label=label)
        axis.legend(frameon=False)
    axis.set(xlabel="IoU of the positive", xlim=(0, 1), ylim=(0, 1),
             ylabel="share of worse positives above it")  # fmt: skip
    axis.grid(axis="x", visible=False)
    return figure


def calibration(figures: dict | None) -> Figure | None:
    if figures is None:
        return None
    figure, left, right = _figure(2, height=3.9)
    known = [k for k, n in enumerate(figures["positives"]) if n]
    size = [max(150 * figures["positives"][k] / max(figures["positives"]), 3) for k in known]
    left.plot([0, 1], [0, 1], "--", color=GREY, lw=1, label="score = IoU")
    left.scatter(
        [figures["mean_score"][k] for k in known],
        [figures["mean_iou"][k] for k in known],
        s=size, color=POSITIVE, label="positives (area by number)",
    )  # fmt: skip
    left.set(xlim=(0, 1), ylim=(0, 1), xlabel="mean score", ylabel="mean IoU", aspect="equal")
    left.legend(frameon=False, fontsize=9, loc="lower right")
    edges = figures["joint_edges"]
    joint = [[n or math.nan for n in row] for row in figures["joint"]]
    mesh = right.pcolormesh(edges, edges, joint, cmap="Oranges", vmin=0)
    right.plot([0, 1], [0, 1], "--", color=GREY, lw=1)
    right.set(xlabel="score", ylabel="IoU", aspect="equal")
    figure.colorbar(mesh, ax=right, label="positives", shrink=0.8)
    return figure


def pictures_of(figures: dict) -> dict[str, Figure]:
    """Name -> picture; what has nothing to show is left out."""
    if not figures["summary"]["positives"] + figures["summary"]["negatives"]:
        return {}
    found = {
        "scores": scores(figures["scores"]),
        "gradient_norms": gradient_norms(figures["gradient_norms"]),
        "loss_shares": loss_shares(figures["loss_shares"]),
        "gradient_shares": gradient_shares(figures["gradient_shares"]),
        "outranked": outranked(figures["ranking"]),
        "precision": precision(figures["ranking"]),
        "sorting": sorting(figures["sorting"]),
        "calibration": calibration(figures["calibration"]),
    }
    return {name: figure for name, figure in found.items() if figure is not None}
