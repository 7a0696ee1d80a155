"""The two pictures of a run: detections on held-out scenes, and the loss curves."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from .data import IGNORE, Scene

TRUTH, DASHES = "#35d0ff", (0, (4, 2))
FOUND = [
    "#ffb000", "#ff5c8a", "#7bd23c", "#c58cff", "#ff7a45", "#00c2a8", "#f5ee4f", "#ff4d4d",
    "#9fb4ff", "#c8a26b",
]  # fmt: skip


def colour_of(label: int) -> str:
    """Of a class; there are ten."""
    return FOUND[label % len(FOUND)]


def draw_detections(path, scenes: list[Scene], found, classes, min_score: float, title: str):
    """Ground truth and detections above ``min_score`` on up to 8 windows of the scenes.

    Detections are drawn in the order of their scores, so that the best lie on top.
    """
    panels = []
    for scene, (boxes, scores, labels) in zip(scenes, found, strict=True):
        width, height = scene.size
        rows, columns = max(1, round(height / 320)), max(1, round(width / 320))
        for k in range(rows * columns):
            y, x = divmod(k, columns)
            window = (
                x * width // columns,
                y * height // rows,
                (x + 1) * width // columns,
                (y + 1) * height // rows,
            )
            panels.append((scene, boxes.numpy(), scores.numpy(), labels.numpy(), window))
        if len(panels) >= 8:
            break
    panels = panels[:8] if len(panels) >= 8 else panels[:4]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    shape = max((w[3] - w[1]) / (w[2] - w[0]) for *_, w in panels)  # of the tallest window
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3.6 * shape * rows + 0.5), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    drawn: set[int] = set()
    for axis, (scene, boxes, scores, labels, window) in zip(axes.flat, panels, strict=False):
        axis.imshow(np.asarray(scene.image))
        known = scene.labels != IGNORE
        named = len(classes) > 1
        for box, label in zip(scene.boxes[known], scene.labels[known], strict=True):
            _box(axis, box, TRUTH, width=1.2, style=DASHES)
            if named and _inside(box[None], window)[0]:
                _name(axis, box[0], box[3] + 1, classes[label], TRUTH, "top", 1.5)
        shown = np.flatnonzero((scores >= min_score) & _inside(boxes, window))
        best = shown[np.argsort(-scores[shown], kind="stable")][:100]  # untrained, it finds all
        drawn |= set(labels[best].tolist())
        for place, index in reversed(list(enumerate(best))):
            box, colour = boxes[index], colour_of(labels[index])
            height = 3 - place / 100  # the best on top
            _box(axis, box, colour, width=1.6, height=height)
            if named and place < 15:
                words = f"{classes[labels[index]]} {scores[index]:.2f}"
                _name(axis, box[0], box[1] - 1, words, colour, "bottom", height)
        axis.set_xlim(window[0] - 0.5, window[2] - 0.5)
        axis.set_ylim(window[3] - 0.5, window[1] - 0.5)
    handles = [
        Line2D([], [], color=TRUTH, linewidth=2, linestyle=(0, (4, 2)), label="ground truth")
    ]
    words = f"detected (score ≥ {min_score:.2f})"
    for label in sorted(drawn)[:8] if len(classes) > 1 else [0]:
        name = classes[label] if len(classes) > 1 else words
        handles.append(Line2D([], [], color=colour_of(label), linewidth=2, label=name))
    if len(classes) > 1:
        title += f"\n{words}: a colour for each class" + (", some more" if len(drawn) > 8 else "")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.legend(handles=handles, loc="upper right", ncols=5, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()), pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _inside(boxes, window):
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    return (window[0] <= x) & (x < window[2]) & (window[1] <= y) & (y < window[3])


def _box(axis, box, colour, width, height=1.0, style="solid"):
    x1, y1, x2, y2 = box
    axis.add_patch(
        Rectangle(
            (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, ec=colour, lw=width, ls=style,
            zorder=height,
        )
    )  # fmt: skip


def _name(axis, x, y, words, colour, side, height):
    axis.text(
        x, y, words, color="black", fontsize=7, clip_on=True, va=side, zorder=height,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def draw_training(path, losses: list[dict], title: str):
    """One curve per loss: every step faintly, a running mean on top."""
    names = list(losses[0])
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.6 * len(names), 3.4), sharex=True, squeeze=False
    )
    window = max(1, min(50, len(losses) // 10))
    for k, (name, axis) in enumerate(zip(names, axes[0], strict=True)):
        values = np.array([step[name] for step in losses])
        steps = np.arange(1, len(values) + 1)
        axis.plot(steps, values, color=f"C{k}", alpha=0.25, linewidth=0.8)
        mean = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(steps[window - 1 :], mean, color=f"C{k}", linewidth=2)
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("step")
        # of a long run the first steps may leave the frame
        top = np.quantile(values, 0.98 if len(values) >= 200 else 1) * 1.15
        axis.set_ylim(min(0.0, values.min()), top if top > 0 else 1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"loss (bold: mean of {window} steps)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
