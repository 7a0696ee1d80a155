"""Plots of a sweep: ``python -m perf.plot sweep.csv --out folder``.

Of float32, random, contiguous logits, forward and backward, a curve for each way to compute a loss:
time by anchors beside the time at copy speed, time by positives (ranking losses), peak memory, and
the largest points as multiples of copy speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

COLORS = {"triton": "#d62728", "compiled": "#1f77b4", "eager": "#7f7f7f", "published": "#9467bd"}
USUAL = {"dtype": "float32", "inputs": "random", "layout": "contiguous"}


def usual(frame: pd.DataFrame, **also) -> pd.DataFrame:
    """float32, random, contiguous, forward and backward."""
    for column, value in (USUAL | {"mode": "both"} | also).items():
        frame = frame[frame[column] == value]
    return frame


def grid(losses, title: str):
    columns = min(len(losses), 4)
    rows = -(-len(losses) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3 * rows + 0.8), squeeze=False, sharex=True,
        layout="constrained",
    )  # fmt: skip
    figure.suptitle(title, fontsize=10)
    for axis in axes.flat[len(losses) :]:
        axis.set_visible(False)
    return figure, dict(zip(losses, axes.flat, strict=False))


def curves(frame: pd.DataFrame, x: str, label: str, title: str, floor=False, y="ms"):
    """Time, or another column, against one axis, log-log, one panel per loss."""
    figure, panels = grid(list(frame["loss"].unique()), title)
    for loss, axis in panels.items():
        part = frame[frame["loss"] == loss]
        for provider, color in COLORS.items():
            line = part[part["provider"] == provider].sort_values(x)
            if len(line):
                axis.plot(line[x], line[y], "o-", ms=3, color=color, label=provider)
                if y == "ms":
                    band = line["ms_p20"], line["ms_p80"]
                    axis.fill_between(line[x], *band, color=color, alpha=0.2)
        if floor:
            line = part.drop_duplicates(x).sort_values(x)
            axis.plot(line[x], line["floor_ms"], "k--", lw=1, label="floor: 3 n b at copy speed")
        axis.set(xscale="log", yscale="log", title=loss, xlabel=label)
        axis.set_ylabel({"ms": "ms", "peak_mb": "peak MB"}[y])
        axis.xaxis.set_tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    handles = {}
    for axis in panels.values():
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def speedups(frame: pd.DataFrame, title: str):
    """Time of each provider at the largest point that all have, as a multiple of the floor."""
    point = ["loss", "rows", "positives"]
    measured = frame.groupby(point)["provider"].transform("nunique")
    frame = frame[measured == measured.groupby(frame["loss"]).transform("max")]
    largest = frame.loc[frame.groupby(["loss", "provider"], sort=False)["bytes"].idxmax()]
    table = largest.pivot(index="loss", columns="provider", values="x_floor")
    table = table.loc[largest["loss"].unique()]  # in the sweep's order
    table = table[[p for p in COLORS if p in table]]
    axis = table.plot.barh(color=COLORS, figsize=(7, 0.5 * len(table) + 1.5), logx=True, width=0.8)
    axis.axvline(1, color="k", ls="--", lw=1)
    axis.set(xlabel="time / floor (forward + backward; 1 = copy speed)", ylabel="")
    axis.set_title(title, fontsize=8)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.figure.tight_layout()
    return axis.figure


def figures_of(frame: pd.DataFrame) -> dict:
    """Name -> figure, of what the sweep holds."""
    frame = frame[frame["status"] == "ok"]
    first = frame.iloc[0]
    title = f"{first['device']}, torch {first['torch']}, commit {first['commit']}, {first['date']}"
    both = usual(frame)
    at_80 = both[both["classes"].isin([80, 17, 4])]
    by_anchors = at_80[at_80["positives"] == at_80.groupby("loss")["positives"].transform("min")]
    found = {
        "anchors": curves(
            by_anchors, "rows", "anchors", f"forward + backward, {title}", floor=True
        ),
        "floor": speedups(at_80, title),
    }
    largest = at_80[at_80["rows"] == at_80.groupby("loss")["rows"].transform("max")]
    ranking = largest[largest.groupby("loss")["positives"].transform("nunique") > 1]
    if len(ranking):
        found["positives"] = curves(ranking, "positives", "positives", title)
    if at_80["peak_mb"].notna().any():
        found["memory"] = curves(by_anchors, "rows", "anchors", title, y="peak_mb")
    return found


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--format", default="png", choices=("png", "svg"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures_of(pd.read_csv(args.sweep)).items():
        path = args.out / f"{args.sweep.stem}_{name}.{args.format}"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
