"""Train a small object detector with a loss of your choice, on a CPU or a GPU.

    python examples/train_detector.py --data trees --loss gfl

writes detections.png, training.png, metrics.json and checkpoint.pt into the folder --out.

    torchrun --nproc-per-node 2 examples/train_detector.py --data trees --loss rank_sort

shares each batch among two processes (gloo on CPUs, NCCL on GPUs): the losses and their normalisers
are those of the whole batch; batch norm alone sees what its process has.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import pickle
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

try:
    from detection import UsageError, common, data, evaluate
    from detection.losses import BOX_LOSSES, LOSSES, Criterion, Pointwise, assign
    from detection.model import Detector, cells, detect
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    sys.exit(f"train_detector.py needs {missing.name}: pip install 'tritonloss[examples]'")

import tritonloss
from tritonloss.diagnose import Report

SIDE = 256  # pixels
STEPS = {"trees": 600, "digits": 500, "coco": 1000}
# A resumed run may change these; everything else must be as it was.
FREE = {
    "steps", "stop_after", "out", "device", "backend", "compile", "threads", "resume", "diagnose",
}  # fmt: skip
DIAGNOSED = 100  # last steps that --diagnose counts


@dataclass
class Config:
    """Settings of a run; the command line has one option for each, but for the last three."""

    data: str = "trees"
    coco: str | None = None
    images: str | None = None
    val_coco: str | None = None
    skip_broken: bool = False
    side: int | None = None
    loss: str = "gfl"
    box_loss: str | None = None
    pisa: bool = False
    diagnose: bool = False
    device: str = "cpu"
    backend: str = "auto"
    compile: bool = False
    steps: int | None = None
    stop_after: int | None = None
    batch: int = 8
    lr: float = 4e-3
    seed: int = 0
    out: str | None = None
    threads: int | None = None
    resume: str | None = None
    channels: int = 48
    digits: tuple[int, int] = (1500, 200)  # composed images: training, test
    progress: bool = False


@dataclass
class Result:
    losses: list[dict] = field(default_factory=list)  # one dict per step
    ap: dict = field(default_factory=dict)  # AP40, AP50, ...; empty if the run stopped early
    by_class: dict = field(default_factory=dict)
    parameters: int = 0
    train_seconds: float = 0.0
    model: torch.nn.Module | None = None
    report: Report | None = None


def load_data(config: Config) -> data.Dataset:
    if config.coco is not None:
        return data.coco(
            config.coco, config.images, config.val_coco, config.seed, config.side or SIDE,
            config.skip_broken,
        )  # fmt: skip
    for name in ("images", "val_coco", "skip_broken", "side"):
        if getattr(config, name):
            raise UsageError(f"--{name.replace('_', '-')}: only together with --coco")
    if config.data == "digits":
        return data.digits(config.seed, *config.digits)
    return data.trees()


def pick_device(config: Config) -> torch.device:
    """The device, once it is clear that it and the backend work."""
    try:
        device = torch.device(config.device)
        if device.type == "cuda" and dist.is_initialized():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"--device {config.device}: cannot be used here: {first}") from None
    try:
        with tritonloss.backend(config.backend):
            tritonloss.iou_loss(torch.ones(1, 4, device=device), torch.ones(1, 4, device=device))
    except RuntimeError as error:
        raise UsageError(f"--backend {config.backend}: {error}") from None
    return device


def train(config: Config) -> Result:
    """Train, evaluate on the held-out part and, with ``config.out``, write pictures and figures.

    The same settings give the same losses on the same machine. Among several processes each step's
    crops are shared out; all return the losses, the first one alone evaluates and writes.
    """
    saved = load_checkpoint(config.resume) if config.resume else None
    if saved:
        same_settings(config, saved)
    config = dataclasses.replace(config)
    if config.steps is None:
        config.steps = saved["config"]["steps"] if saved else STEPS[_data_name(config)]
    if config.pisa and not isinstance(LOSSES[config.loss].classification, Pointwise):
        raise UsageError(f"--pisa: weights single logits, which --loss {config.loss} cannot use")
    if config.threads:
        torch.set_num_threads(config.threads)
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, processes = (0, 1) if group is None else (group.rank(), group.size())
    if config.batch < processes:
        raise UsageError(f"--batch: {config.batch} crops are too few for {processes} processes")
    if config.pisa and processes > 1:
        raise UsageError("--pisa: compares the boxes of one process, and there are several")
    device = pick_device(config)
    dataset = load_data(config)
    if rank > 0:
        config.out, config.progress = None, False
    if config.progress:
        print(dataset.summary(), flush=True)
    if config.out is not None:
        common.make_folder(config.out)

    torch.manual_seed(config.seed)
    torch.backends.cudnn.deterministic = True
    criterion = Criterion(config.loss, config.box_loss, dataset.bins, config.pisa, group)
    criterion = criterion.to(device)
    model = Detector(len(dataset.classes), criterion.bins, config.channels)
    model = model.to(device, memory_format=torch.channels_last)  # a third faster on a CPU
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *criterion.parameters()], lr=config.lr, weight_decay=0.05
    )
    compute = torch.compile(criterion, fullgraph=True) if config.compile else criterion
    predict = model if group is None else DistributedDataParallel(model)
    grids = cells(dataset.crop, dataset.crop, device)

    result = Result(parameters=sum(p.numel() for p in model.parameters()))
    if saved:
        try:
            model.load_state_dict(saved["model"])
            criterion.load_state_dict(saved["criterion"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0]
            raise UsageError(f"--resume: {config.resume} is of another model: {first}") from None
        result.losses = saved["losses"]
    first, last = len(result.losses), min(config.steps, config.stop_after or config.steps)
    waiting: list[dict] = []
    bar = tqdm(
        total=config.steps,
        initial=first,
        unit="step",
        disable=not config.progress,
        mininterval=0.2 if sys.stderr.isatty() else 15,  # a log file gets few lines
    )
    began = time.perf_counter()
    with tritonloss.backend(config.backend), bar:
        for step in range(first, last):
            # The crops of a step depend on the seed and the step alone, so a run can be resumed.
            rng = np.random.default_rng([config.seed, 1, step])
            share = (x.tensor_split(processes)[rank] for x in dataset.batch(rng, config.batch))
            images, gt_boxes, gt_labels = (x.to(device) for x in share)
            targets = assign(grids, gt_boxes, gt_labels, len(dataset.classes))
            for parameters in optimizer.param_groups:
                parameters["lr"] = common.learning_rate(step, config)
            if config.diagnose and step == max(first, last - DIAGNOSED):
                criterion.diagnosis = tritonloss.Diagnosis()
            logits, outputs = predict(images.contiguous(memory_format=torch.channels_last))
            total, losses = compute(logits, outputs, grids, targets)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()

            waiting.append(losses)
            bar.update()
            if len(waiting) == 20 or step + 1 == last:  # reading a value waits for the GPU
                rows = torch.stack([torch.stack(list(row.values())).detach() for row in waiting])
                rows = criterion.mean_over_processes(rows).tolist()
                result.losses += [dict(zip(losses, row, strict=True)) for row in rows]
                waiting.clear()
                bar.set_postfix({k: f"{v:.3f}" for k, v in result.losses[-1].items()})
                common.is_finite(result.losses[-1], step, config.lr)
                if config.out is not None and ((step + 1) % 100 == 0 or step + 1 == last):
                    save_checkpoint(config, model, criterion, optimizer, result)
    result.train_seconds = time.perf_counter() - began
    if config.diagnose and last > first:
        result.report = criterion.diagnosis.read(process_group=group)
    result.model = model
    if last == config.steps and rank == 0:
        found = evaluate.run(model, detect, dataset.test, device)
        result.ap, result.by_class = evaluate.average_precision(
            dataset.test, found, dataset.classes
        )
        if config.out is not None:
            title = common.write_results(config, dataset, found, result)
            if result.report:
                seen = f"{title}, the last {min(DIAGNOSED, len(result.losses))} training steps"
                result.report.write(Path(config.out) / "diagnosis", seen)
    return result


def _data_name(config: Config) -> str:
    return "coco" if config.coco is not None else config.data


def save_checkpoint(config, model, criterion, optimizer, result) -> None:
    path = Path(config.out) / "checkpoint.pt"
    state = {
        "config": dataclasses.asdict(config),
        "model": model.state_dict(),
        "criterion": criterion.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "losses": result.losses,
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)  # an interrupted run leaves the last whole one


CHECKPOINT = {
    "config": dict, "model": dict, "criterion": dict, "optimizer": dict, "rng": torch.Tensor,
    "losses": list,
}  # fmt: skip


def load_checkpoint(path: str) -> dict:
    """What ``save_checkpoint`` wrote: tensors and plain values, nothing that could run code."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"--resume: cannot read {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:  # torch's words recommend to unpickle whatever it holds
        what = "it holds objects other than tensors and plain values, or is no file of torch.save"
        raise UsageError(f"--resume: {path} was not written by this example: {what}") from None
    except Exception:
        raise UsageError(
            f"--resume: {path} is damaged, or no file of torch.save: give a checkpoint.pt that "
            "this example wrote"
        ) from None
    parts = saved if isinstance(saved, dict) else {}
    wrong = [name for name, kind in CHECKPOINT.items() if not isinstance(parts.get(name), kind)]
    if not wrong:  # settings of another version of the example
        wrong = sorted(set(saved["config"]) - {f.name for f in dataclasses.fields(Config)})
    if wrong:
        raise UsageError(
            f"--resume: {path} was not written by this example: {', '.join(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or not what it writes"
        )
    return saved


def same_settings(config: Config, saved: dict) -> None:
    for name, before in saved["config"].items():
        now = getattr(config, name)
        if name not in {*FREE, "progress"} and now != before:
            raise UsageError(
                f"--{name.replace('_', '-')}: the checkpoint was trained with {before}, not {now}"
            )


def parse_arguments(arguments: list[str] | None) -> Config:
    width = max(map(len, LOSSES))
    table = "\n".join(f"  {name:<{width}}  {recipe.help}" for name, recipe in LOSSES.items())
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=f"losses:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--data", choices=("trees", "digits"), help="two aerial photos (default) or digits")
    add("--coco", metavar="JSON", help="train on your own boxes: annotations in COCO format")
    add("--images", metavar="DIR", help="the folder with the images of --coco")
    add("--val-coco", metavar="JSON", help="test annotations; default: a fifth of the images")
    add("--skip-broken", action="store_true", help="leave out broken entries of --coco, and say so")
    add(
        "--side",
        type=common.positive(int),
        metavar="PIXELS",
        help=f"scale the images of --coco to this longer side, a multiple of 16; default: {SIDE}",
    )
    add("--loss", choices=LOSSES, help="see below; default: gfl")
    add("--box-loss", choices=BOX_LOSSES, help="default: the one that belongs to --loss")
    add("--pisa", action="store_true", help="prime sample attention: best boxes count most")
    add(
        "--diagnose",
        action="store_true",
        help=f"a page on the logits of the last {DIAGNOSED} steps",
    )
    add("--device", help="cpu (default), cuda, cuda:1, ...")
    add("--backend", choices=("auto", "triton", "eager"), help="of the losses; default: auto")
    # Not by default: the first start on a CPU takes longer than the demo's steps win back, see
    # docs/guides/heads.md.
    add("--compile", action="store_true", help="torch.compile the losses into one graph")
    steps = ", ".join(f"{count} for {name}" for name, count in STEPS.items())
    add("--steps", type=common.positive(int), help=f"default: {steps}")
    add(
        "--stop-after",
        type=common.positive(int),
        metavar="STEP",
        help="stop early, to resume later",
    )
    add("--batch", type=common.positive(int), help="crops per step; default: 8")
    add("--lr", type=common.positive(float), help="highest learning rate; default: 0.004")
    add("--channels", type=common.positive(int), help="width of the network, in 16s; default: 48")
    add("--seed", type=int, help="default: 0")
    add("--threads", type=common.positive(int), help="CPU threads; default: torch's choice")
    add("--out", metavar="DIR", help="default: runs/DATA-LOSS")
    add("--resume", metavar="CHECKPOINT", help="continue with the settings of this checkpoint")
    given = vars(parser.parse_args(arguments))
    if "resume" in given:
        before = load_checkpoint(given["resume"])["config"]
        kept = {name: v for name, v in before.items() if name not in {"stop_after", "resume"}}
        config = Config(**{**kept, **given, "digits": tuple(kept.get("digits", Config.digits))})
    else:
        config = Config(**given)
    if config.channels % 16:
        raise UsageError(f"--channels: must be a multiple of 16, got {config.channels}")
    if config.side is not None and config.side % 16:
        raise UsageError(f"--side: must be a multiple of 16, got {config.side}")
    if config.seed < 0:
        raise UsageError(f"--seed: must not be negative, got {config.seed}")
    config.out = config.out or f"runs/{_data_name(config)}-{config.loss}"
    config.progress = True
    return config


def main(arguments: list[str] | None = None) -> int:
    first = True
    try:
        config = parse_arguments(arguments)
        if "LOCAL_RANK" in os.environ:  # started by torchrun
            dist.init_process_group("nccl" if "cuda" in config.device else "gloo")
            first = dist.get_rank() == 0
        result = train(config)
    except UsageError as error:
        print(f"train_detector.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    except Exception:
        # Printed here, so that what the error holds (DistributedDataParallel, and with it threads
        # of the process group) is gone before the group is, and the interpreter ends without them
        traceback.print_exc()
        return 1
    finally:
        if dist.is_initialized():
            # Here, not at the interpreter's end: a thread of gloo that is still connected when the
            # peer has gone raises in a destructor, and that aborts the process.
            gc.collect()
            dist.destroy_process_group()
    if not first:
        return 0
    print(common.summary(result))
    if not result.ap:
        print(f"continue with --resume {config.out}/checkpoint.pt")
        return 0
    print(f"pictures, metrics and checkpoint: {config.out}")
    if result.report:
        print(f"{result.report}\nas a page: {config.out}/diagnosis/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
