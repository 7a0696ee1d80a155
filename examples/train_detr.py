"""Train a small detector of the DETR family: queries are matched with objects, without suppression.

    python examples/train_detr.py --loss varifocal

writes detections.png, training.png and metrics.json into the folder --out. The images are digits on
aerial photos. `tritonloss.SetCriterion` matches and computes the losses of all layers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch

try:
    from detection import UsageError, common, data, evaluate
    from detection.detr import SmallDETR, detect
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    sys.exit(f"train_detr.py needs {missing.name}: pip install 'tritonloss[detr,examples]'")

import tritonloss

# DETR's own loss, softmax, needs a class for "no object", which this detector does not have.
LOSSES = ("varifocal", "focal", "mal", "iou_aware_bce")


@dataclass
class Config:
    """Settings of a run; the command line has one option for each, but for the last two."""

    loss: str = "varifocal"
    device: str = "cpu"
    steps: int = 2500
    batch: int = 8
    lr: float = 1e-3
    seed: int = 0
    out: str | None = None
    threads: int | None = None
    channels: int = 48
    layers: int = 2
    queries: int = 30
    digits: tuple[int, int] = (1500, 200)  # composed images: training, test
    progress: bool = False


@dataclass
class Result:
    losses: list[dict] = field(default_factory=list)  # one dict per step, of the last layer
    ap: dict = field(default_factory=dict)  # AP40, AP50, ...
    by_class: dict = field(default_factory=dict)
    parameters: int = 0
    train_seconds: float = 0.0
    model: torch.nn.Module | None = None


def objects_of(boxes, labels, side: int):
    """Padded corners in pixels as cx, cy, w, h in [0, 1], labels, and the number of each image."""
    corners = boxes / side
    centred = torch.cat(
        [(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], -1
    )
    known = labels != data.IGNORE  # the padding alone: no digit is cut off
    return labels.clamp(min=0), centred, known.sum(1)


def train(config: Config) -> Result:
    """Train, evaluate on the held-out part and, with ``config.out``, write pictures and figures.

    The same settings give the same losses on the same machine.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    dataset = data.digits(config.seed, *config.digits)
    if config.progress:
        print(dataset.summary(), flush=True)
    if config.out is not None:
        common.make_folder(config.out)
    torch.manual_seed(config.seed)
    model = SmallDETR(len(dataset.classes), config.channels, config.queries, config.layers)
    model = model.to(config.device, memory_format=torch.channels_last)
    criterion = tritonloss.SetCriterion(config.loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4)
    result = Result(parameters=sum(p.numel() for p in model.parameters()), model=model)
    waiting: list[dict] = []
    began = time.perf_counter()
    steps = range(config.steps)
    for step in tqdm(steps, unit="step", disable=not config.progress, mininterval=0.2):
        rng = np.random.default_rng([config.seed, 1, step])
        images, boxes, labels = (x.to(config.device) for x in dataset.batch(rng, config.batch))
        images = images.contiguous(memory_format=torch.channels_last)
        labels, targets, sizes = objects_of(boxes, labels, dataset.crop)
        for parameters in optimizer.param_groups:
            parameters["lr"] = common.learning_rate(step, config)
        found = criterion(*model(images), labels, targets, sizes)
        optimizer.zero_grad(set_to_none=True)
        found["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        waiting.append({name: found[name][-1].detach() for name in ("class", "l1", "giou")})
        if len(waiting) == 20 or step + 1 == config.steps:  # reading a value waits for the device
            for row in waiting:
                result.losses.append({name: value.item() for name, value in row.items()})
            waiting.clear()
            common.is_finite(result.losses[-1], step, config.lr)
    result.train_seconds = time.perf_counter() - began
    found = evaluate.run(model, detect, dataset.test, config.device)
    result.ap, result.by_class = evaluate.average_precision(dataset.test, found, dataset.classes)
    if config.out is not None:
        common.write_results(config, dataset, found, result)
    return result


def parse_arguments(arguments: list[str] | None) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = {f.name: f.default for f in dataclasses.fields(Config)}

    def add(name: str, help: str, **options):
        parser.add_argument(f"--{name}", default=default[name], help=help, **options)

    add("loss", "class loss", choices=LOSSES)
    add("device", "cpu, cuda, cuda:1, ...")
    add("steps", "training steps", type=common.positive(int))
    add("batch", "images per step", type=common.positive(int))
    add("lr", "highest learning rate", type=common.positive(float))
    add("channels", "width of the network, in 16s", type=common.positive(int))
    add("layers", "of the decoder", type=common.positive(int))
    add("queries", "of an image, at most 144", type=common.positive(int))
    add("seed", "of weights and images", type=int)
    add("threads", "CPU threads; None is torch's choice", type=common.positive(int))
    add("out", "folder; None is runs/detr-LOSS", metavar="DIR")
    config = Config(**vars(parser.parse_args(arguments)))
    if config.channels % 16:
        raise UsageError(f"--channels: must be a multiple of 16, got {config.channels}")
    if config.queries > 144:
        raise UsageError(f"--queries: an image has 144 cells, got {config.queries}")
    if config.seed < 0:
        raise UsageError(f"--seed: must not be negative, got {config.seed}")
    config.out = config.out or f"runs/detr-{config.loss}"
    config.progress = True
    return config


def main(arguments: list[str] | None = None) -> int:
    try:
        config = parse_arguments(arguments)
        result = train(config)
    except UsageError as error:
        print(f"train_detr.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{common.summary(result)}\npictures and metrics: {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
