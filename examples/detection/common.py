"""What every training script does beside the training: options, schedule, and what a run leaves."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch

import tritonloss

from . import UsageError


def positive(kind):
    """Type of an option: a number above 0."""

    def parse(text: str):
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def learning_rate(step: int, config) -> float:
    """Linear warm-up over the first 5 %, then a cosine to 1 %."""
    warm = max(1, config.steps // 20)
    if step < warm:
        return config.lr * (step + 1) / warm
    done = (step - warm) / max(1, config.steps - warm)
    return config.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def make_folder(path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot make the folder {path}: {error.strerror}") from None


def is_finite(losses: dict, step: int, lr: float) -> None:
    if not all(map(math.isfinite, losses.values())):
        raise UsageError(
            f"--lr {lr}: the loss is not finite at step {step + 1}; try a smaller value"
        )


def summary(result) -> str:
    """What to print: the size of the run, and AP if it came to its end."""
    took = f"{result.parameters:,} parameters, {result.train_seconds:.0f} s"
    lines = [f"{len(result.losses)} steps, {took}"]
    if result.ap:
        names = ("AP40", "AP50", "AP50:95")
        lines.append("  ".join(f"{name} {result.ap[name]:.3f}" for name in names))
    if len(result.by_class) > 1:
        width = max(map(len, result.by_class))
        for name, ap in result.by_class.items():
            shown = (f"{k} {'none' if v is None else f'{v:.3f}'}" for k, v in ap.items())
            lines.append(f"  {name:<{width}}  {'  '.join(shown)}")
    return "\n".join(lines)


def write_results(config, dataset, found, result) -> str:
    """Pictures and metrics.json in the folder ``config.out``; their title."""
    from . import pictures

    out = Path(config.out)
    settings = dataclasses.asdict(config)
    if "data" in settings:  # the option's default, where other data were given
        settings["data"] = dataset.name
    metrics = {
        "config": settings,
        "data": dataset.facts(),
        "AP": result.ap,
        "AP of each class": result.by_class,
        "parameters": result.parameters,
        "train_seconds": round(result.train_seconds, 2),
        "versions": {"tritonloss": tritonloss.__version__, "torch": torch.__version__},
        "losses": result.losses,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    title = f"{dataset.name}, loss {config.loss}: " + ", ".join(
        f"{name} {result.ap[name]:.2f}" for name in ("AP40", "AP50")
    )
    pictures.draw_training(out / "training.png", result.losses, title)
    pictures.draw_detections(
        out / "detections.png", dataset.test, found, dataset.classes, result.ap["score"], title
    )
    return title
