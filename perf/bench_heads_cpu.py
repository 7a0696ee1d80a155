"""A head of five levels on the CPU: the levels as they come beside permute, cat and the same loss.

Levels of a 512 x 512 image at strides 8 to 128, channels first, two images; forward and backward to
the levels. Values and gradients are checked, then timed. One thread, both in turn, minimum over the
rounds: read the ratios.

    python -m perf.bench_heads_cpu
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import tritonloss as tl

from ._measure import gate, machine, peak_tensor_bytes, timed_in_turn, write_rows

IMAGES, CLASSES, BINS = 2, 80, 17
SIZES = [512 // stride for stride in (8, 16, 32, 64, 128)]


def head(channels: int) -> list[Tensor]:
    return [torch.randn(IMAGES, channels, size, size) - 2 for size in SIZES]


def per_anchor(make) -> list[Tensor]:
    return [make(IMAGES, size, size) for size in SIZES]


def labels(*shape: int) -> Tensor:
    found = torch.randint(CLASSES, shape)
    return found.where(torch.rand(shape) < 0.01, CLASSES)


def joined(levels: list[Tensor]) -> Tensor:
    """As most training code does it."""
    return torch.cat([t.permute(0, 2, 3, 1).flatten(1, 2) for t in levels], 1)


def rows(levels: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten(1) for t in levels], 1)


def boxes() -> list[Tensor]:
    return [torch.rand(IMAGES, 4, size, size).cumsum(1) for size in SIZES]


def cases() -> dict:
    """Name -> (levels, loss of the levels, loss of the joined ones); targets are joined before."""
    of_anchors, quality = per_anchor(labels), per_anchor(torch.rand)
    positive = [y < CLASSES for y in of_anchors]
    all_labels, all_quality, all_positive = rows(of_anchors), rows(quality), rows(positive)
    sides, target = [torch.rand(IMAGES, 4, s, s) * 16 for s in SIZES], boxes()
    all_sides, all_target = joined(sides), joined(target)
    of_sides = [p[:, None].expand(-1, 4, -1, -1) for p in positive]
    all_of_sides = joined(of_sides)

    def classes(loss):
        return head(CLASSES), lambda x: loss(x, of_anchors, 1), lambda x: loss(x, all_labels, -1)

    return {
        "focal": classes(lambda x, y, c: tl.sigmoid_focal_loss(x, y, class_dim=c)),
        "quality_focal": (
            head(CLASSES),
            lambda x: tl.quality_focal_loss(x, (of_anchors, quality), class_dim=1),
            lambda x: tl.quality_focal_loss(x, (all_labels, all_quality)),
        ),
        "distribution_focal": (
            head(4 * BINS),
            lambda x: tl.distribution_focal_loss(x, sides, sides=4, weight=of_sides, class_dim=1),
            lambda x: tl.distribution_focal_loss(x, all_sides, sides=4, weight=all_of_sides),
        ),
        "giou": (
            boxes(),
            lambda x: tl.giou_loss(x, target, weight=positive, class_dim=1),
            lambda x: tl.giou_loss(x, all_target, weight=all_positive),
        ),
        "ghm_c": classes(lambda x, y, c: tl.ghm_c_loss(x, y, class_dim=c)),
        "rank_sort": (
            head(CLASSES),
            lambda x: sum(tl.rank_sort_loss(x, (of_anchors, quality), class_dim=1)),
            lambda x: sum(tl.rank_sort_loss(x, (all_labels, all_quality))),
        ),
    }


def step(loss, levels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().requires_grad_() for t in levels]
    value = loss(leaves)
    value.backward()
    return value.detach(), [t.grad for t in leaves]


def measured(name: str, levels: list[Tensor], ours, of_joined, rounds: int) -> dict:
    sides = {"joined": lambda x: of_joined(joined(x)), "levels": ours}
    (want, slopes), (got, found) = (step(loss, levels) for loss in sides.values())
    gate(f"{name} value", got, want, 1e-5)
    flat = (torch.cat([g.flatten() for g in of]) for of in (found, slopes))
    gate(f"{name} gradient", *flat, 1e-5)

    def timed(loss) -> float:
        start = time.process_time()
        step(loss, levels)
        return time.process_time() - start

    times = timed_in_turn({k: lambda f=f: timed(f) for k, f in sides.items()}, rounds)
    best = {k: min(t) for k, t in times.items()}
    peak = {k: peak_tensor_bytes(lambda f=f: step(f, levels)) for k, f in sides.items()}
    return (
        {"loss": name, "logits": sum(t.numel() for t in levels)}
        | {f"{k}_ms": f"{1e3 * s:.2f}" for k, s in best.items()}
        | {"time_ratio": f"{best['levels'] / best['joined']:.2f}"}
        | {f"{k}_peak_mib": f"{b / 2**20:.1f}" for k, b in peak.items()}
        | {"peak_ratio": f"{peak['levels'] / max(peak['joined'], 1):.2f}"}
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("perf/results/heads_cpu.csv"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = []
    for name, case in cases().items():
        found.append(measured(name, *case, args.rounds) | machine())
        print("  ".join(f"{v:>10}" for v in found[-1].values()), flush=True)
    write_rows(args.out, found)


if __name__ == "__main__":
    main()
