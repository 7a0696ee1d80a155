"""The training example: command line, resume, COCO files, and what a small detector reaches."""

import dataclasses
import functools
import importlib
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import ranking_reference as reference
import torch

import tritonloss
from tritonloss.losses.ranking import ALRP, RankSort

for module in ("pycocotools", "sklearn", "matplotlib", "PIL", "tqdm"):
    pytest.importorskip(module, reason="the example needs tritonloss[examples]")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the plain run of the suite has these tests", allow_module_level=True)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
Image = importlib.import_module("PIL.Image")
train_detector = importlib.import_module("train_detector")
train_detr = importlib.import_module("train_detr")
data, evaluate = train_detector.data, train_detector.evaluate
losses = importlib.import_module("detection.losses")
pictures = importlib.import_module("detection.pictures")
model = importlib.import_module("detection.model")
bench = importlib.import_module("perf.bench_compiled_step")
LOSSES, rows = losses.LOSSES, bench.joined

SMALL = {"data": "digits", "digits": (24, 8), "batch": 2, "channels": 16, "steps": 10}


def config(**settings):
    return train_detector.Config(**{**SMALL, **settings})


def values(result):
    return np.array([list(step.values()) for step in result.losses])


@pytest.fixture
def coco(tmp_path):
    """Six images with coloured squares of two categories, as a user's own data."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for k in range(6):
        pixels = rng.integers(0, 60, (60, 80, 3), dtype=np.uint8)
        x, y, side = (int(v) for v in rng.integers((2, 2, 12), (50, 30, 25)))
        pixels[y : y + side, x : x + side, k % 2] = 250
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png", "width": 80, "height": 60})
        annotations.append(
            {"id": k, "image_id": k, "category_id": 7 + 10 * (k % 2), "bbox": [x, y, side, side]}
        )
    categories = [{"id": 17, "name": "green"}, {"id": 7, "name": "red"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    return path, content


def test_coco_files_give_the_boxes_and_classes_written_in_them(coco):
    path, content = coco
    dataset = data.coco(path, path.parent, side=160)
    assert dataset.classes == ["red", "green"]
    assert (len(dataset.train), len(dataset.test)) == (5, 1)
    for scene in dataset.train + dataset.test:
        k = int(Path(scene.source).stem)
        x, y, w, h = content["annotations"][k]["bbox"]
        np.testing.assert_allclose(scene.boxes, 2 * np.array([[x, y, x + w, y + h]]))
        assert scene.labels.tolist() == [k % 2]
        assert scene.image.size == scene.size == (160, 120)


def test_coco_run_writes_what_it_promises(coco, tmp_path):
    path, _ = coco
    out = tmp_path / "out"
    arguments = ["--coco", path, "--images", path.parent, "--out", out, "--steps", 3, "--batch", 2]
    arguments += ["--channels", 16, "--diagnose", "--side", 128]
    assert train_detector.main([str(a) for a in arguments]) == 0
    # cells of boxes that a crop cuts off are ignored
    assert 0.95 < diagnosed_logits(out) / (3 * 2 * logits_of_a_crop(path, 128)) <= 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["losses"]) == 3
    assert {"AP40", "AP50"} <= set(metrics["AP"])
    for picture in ("detections.png", "training.png"):
        assert min(Image.open(out / picture).size) > 200


def logits_of_a_crop(path, side=train_detector.SIDE) -> int:
    """Of the two categories of the images above."""
    dataset = data.coco(str(path), str(path.parent), None, 0, side)
    return 2 * sum(grid.points[0].numel() for grid in model.cells(dataset.crop, dataset.crop))


def diagnosed_logits(out) -> int:
    assert (out / "diagnosis" / "index.html").exists()
    summary = json.loads((out / "diagnosis" / "report.json").read_text())["summary"]
    return summary["positives"] + summary["negatives"]


def test_crowd_regions_teach_nothing(coco, tmp_path):
    path, content = coco
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    dataset = data.coco(path, path.parent, side=160)
    labels = [s.labels.tolist() for s in dataset.train + dataset.test if s.source == "0.png"]
    assert labels == [[data.IGNORE]]


def without(part, key):
    return lambda c: c[part][0].pop(key)


def first_box(value):
    return lambda c: c["annotations"][0].update(bbox=value)


BROKEN = {
    "no list": (lambda c: c.pop("annotations"), "--coco", "has no list 'annotations'"),
    "no bbox": (without("annotations", "bbox"), "--coco", "annotations[0] has no 'bbox'"),
    "no file_name": (without("images", "file_name"), "--coco", "images[0] has no 'file_name'"),
    "image twice": (lambda c: c["images"][1].update(id=0), "--coco", "images[1] has id 0, as one"),
    "category twice": (lambda c: c["categories"][1].update(id=17), "--coco", "has id 17, as one"),
    "id": (lambda c: c["annotations"][0].update(image_id=[1]), "--coco", "no number or string"),
    "no boxes": (lambda c: c["annotations"].clear(), "--coco", "no boxes"),
    "not finite": (first_box([1, 2, math.nan, 4]), "--coco", "finite"),
    "not numbers": (first_box([1, 2, "a", 4]), "--coco", "finite"),
    "too short": (first_box([1, 2, 3]), "--coco", "[x, y, width, height]"),
    "negative": (first_box([1, 2, -3, 4]), "--coco", "negative"),
    "category": (
        lambda c: c["annotations"][0].update(category_id=99),
        "--coco",
        "unknown category_id 99",
    ),
    "image": (lambda c: c["annotations"][0].update(image_id=99), "--coco", "unknown image_id 99"),
    "missing image": (
        lambda c: c["images"][0].update(file_name="gone.png"),
        "--images",
        "gone.png",
    ),
    "unreadable image": (
        lambda c: c["images"][0].update(file_name="boxes.json"),
        "--images",
        "cannot read the image",
    ),
}


def fails(capsys, arguments, *parts):
    """Exit code 2 and one last line on stderr that holds every part."""
    assert train_detector.main([str(a) for a in arguments]) == 2
    *before, message = capsys.readouterr().err.strip().splitlines()
    assert not before or before[-1].startswith("\r") or "step/s" in before[-1]  # progress bar
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", BROKEN)
def test_broken_annotations_are_named(coco, capsys, name):
    path, content = coco
    spoil, *parts = BROKEN[name]
    spoil(content)
    path.write_text(json.dumps(content))
    fails(capsys, ["--coco", path, "--images", path.parent], *parts)


def test_what_became_of_the_entries_is_told(coco, capsys, tmp_path):
    path, content = coco
    for number, entry in enumerate(content["annotations"]):
        entry["bbox"] = [10, 10, 20, 20]
        entry["category_id"] = 7 if number < 4 else 17
    more = {
        "crowd": {"bbox": [40, 10, 20, 20], "iscrowd": 1},
        "empty": {"bbox": [40, 10, 0, 20]},
        "outside": {"bbox": [200, 10, 20, 20]},
        "mostly": {"bbox": [75, 10, 20, 20]},
        "partly": {"bbox": [65, 10, 20, 20]},
        "broken": {"bbox": [1, 2, 3]},
        "unknown": {"bbox": [1, 2, 3, 4], "category_id": 99},
        "list": {"bbox": [1, 2, 3, 4], "image_id": [1]},
    }
    content["annotations"] += [{"image_id": 0, "category_id": 7} | entry for entry in more.values()]
    content["images"] += [{"id": 6, "file_name": "none.png"}, {"id": 7}]
    content["annotations"].append({"image_id": 6, "category_id": 7, "bbox": [1, 2, 30, 40]})
    path.write_text(json.dumps(content))
    out = tmp_path / "out"
    arguments = ["--coco", path, "--images", path.parent, "--out", out, "--steps", 1, "--batch", 2]
    arguments = [str(a) for a in [*arguments, "--channels", 16]]
    fails(capsys, arguments, "--coco", "images[7] has no 'file_name'", "--skip-broken")
    assert train_detector.main([*arguments, "--skip-broken"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((out / "metrics.json").read_text())
    facts = found["data"]
    assert facts["entries not as written"] == {
        "broken images: left out": 2,
        "crowd regions: ignored, they teach nothing": 1,
        "boxes without area: left out": 1,
        "broken annotations: left out": 3,
        "boxes of broken images: left out": 1,
        "boxes outside their image: left out": 1,
        "boxes mostly outside their image: ignored": 1,
        "boxes partly outside their image: cut": 1,
    }
    assert facts["images"] == {"train": 5, "test": 1}
    boxes = facts["boxes"]
    assert boxes["train"]["red"] + boxes["test"]["red"] == 5  # one of them cut
    assert boxes["train"]["green"] + boxes["test"]["green"] == 2
    assert sum(facts["regions to ignore"].values()) == 2
    assert len(facts["skipped"]) == 5 and str(path) in facts["source"]
    for count, words in ((3, "broken annotations: left out"), (1, "crowd regions: ignored")):
        assert f"{count} {words}" in shown
    assert "annotations[11] must have a bbox [x, y, width, height], got [1, 2, 3]" in shown
    assert "none.png is missing" in " ".join(facts["skipped"])
    assert shown.index("red") < shown.index("1 steps")  # before training
    assert found["config"]["data"] == facts["name"] == "coco"
    assert set(found["AP of each class"]) == {"red", "green"} and "AP50:95" in found["AP"]


def test_a_category_of_another_name_is_no_match(coco, capsys):
    path, content = coco
    content["categories"][0]["name"] = "blue"
    other = path.parent / "other.json"
    other.write_text(json.dumps(content))
    fails(capsys, ["--coco", path, "--images", path.parent, "--val-coco", other],
          "--val-coco", "category 17 is 'blue', but in --coco 'green'")  # fmt: skip


def test_truncated_image_is_named(coco, capsys, tmp_path):
    path, _ = coco
    for file in path.parent.glob("*.png"):
        file.write_bytes(file.read_bytes()[:500])
    arguments = ["--coco", path, "--images", path.parent, "--out", tmp_path / "out", "--steps", 1]
    fails(capsys, arguments, "--images", "cannot read the image")


class Other:
    """No tensor and no plain value."""


UNFIT = {
    "object": ({"config": Other()}, "objects other than tensors and plain values"),
    "pickle": (pickle.dumps(Other()), "objects other than tensors and plain values"),
    "bytes": (b"abc", "is damaged, or no file of torch.save"),
    "nothing": (b"", "is damaged, or no file of torch.save"),
    "list": ([1, 2], "config, model, criterion, optimizer, rng, losses are missing"),
    "weights": ({"model": {}}, "config, criterion, optimizer, rng, losses are missing"),
    "numbers": (dict.fromkeys(train_detector.CHECKPOINT, 1), "config, model, criterion, optimizer"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_cannot_be_resumed(name, tmp_path, capsys):
    path = tmp_path / "unfit.pt"
    content, words = UNFIT[name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert train_detector.main(["--resume", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume" in error and "unfit.pt" in error and words in error
    assert "weights_only" not in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved["config"].update(colour="red"), "colour is missing or not what"),
        (lambda saved: saved["model"].popitem(), "is of another model"),
        (lambda saved: saved["optimizer"].update(param_groups=[]), "is of another model"),
        (lambda saved: saved.update(rng=torch.zeros(3)), "is of another model"),
    ],
)
def test_a_checkpoint_of_another_model(change, words, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    train_detector.train(config(steps=2, stop_after=1, out=str(tmp_path)))
    saved = torch.load(path)
    change(saved)
    torch.save(saved, path)
    fails(capsys, ["--resume", path], "--resume", words)


def test_bad_arguments_are_named(coco, capsys, tmp_path):
    path, _ = coco
    folder = path.parent
    text = tmp_path / "text.json"
    text.write_text("{")
    fails(capsys, ["--coco", tmp_path / "none.json", "--images", folder], "--coco", "none.json")
    fails(capsys, ["--coco", text, "--images", folder], "--coco", "not JSON")
    fails(capsys, ["--coco", path, "--images", tmp_path / "none"], "--images", "none")
    fails(capsys, ["--coco", path], "--images")
    fails(capsys, ["--images", folder], "--images", "--coco")
    fails(capsys, ["--val-coco", path], "--val-coco", "--coco")
    fails(capsys, ["--skip-broken"], "--skip-broken", "--coco")
    fails(capsys, ["--out", text], "--out")
    fails(capsys, ["--device", "tpu7"], "--device")
    fails(capsys, ["--resume", tmp_path / "none.pt"], "--resume", "none.pt")
    fails(capsys, ["--resume", text], "--resume", "text.json")
    fails(capsys, ["--channels", 20], "--channels")
    fails(capsys, ["--side", 100], "--side: must be a multiple of 16, got 100")
    fails(capsys, ["--side", 128], "--side: only together with --coco")
    fails(capsys, ["--seed", -1], "--seed")
    fails(capsys, ["--pisa", "--loss", "ap"], "--pisa", "ap")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_missing_gpu_is_named(capsys):
    fails(capsys, ["--device", "cuda"], "--device cuda")


def test_triton_on_the_cpu_is_named(capsys):
    fails(capsys, ["--backend", "triton"], "--backend triton")


def test_command_line_without_traceback(tmp_path):
    """As a user runs it: a process of its own, from another folder."""
    command = [sys.executable, str(ROOT / "examples" / "train_detector.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    failed = subprocess.run(
        [*command, "--coco", "none", "--images", "."],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1 and "--coco" in failed.stderr
    assert not list(tmp_path.iterdir())


def test_help_lists_the_losses(capsys):
    with pytest.raises(SystemExit) as exit:
        train_detector.main(["--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0
    for name, recipe in LOSSES.items():
        assert f"{name} " in shown and recipe.help in shown


@pytest.mark.parametrize("wrong", [["--loss", "nothing"], ["--steps", "0"], ["--lr", "nan"]])
def test_values_out_of_range_are_named(capsys, wrong):
    with pytest.raises(SystemExit) as exit:
        train_detector.main(wrong)
    assert exit.value.code == 2 and wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(loss):
    result = train_detector.train(config(loss=loss, steps=20))
    assert np.isfinite(values(result)).all()
    if loss == "ghm":  # its scale is a running mean that starts at 0
        return
    # What must fall from the start: quality targets grow with the boxes, so their classification
    # loss does not; aLRP's box loss grows with the ranks.
    falling = np.array(
        [step["cls" if loss == "alrp" else LOSSES[loss].box] for step in result.losses]
    )
    assert falling[-5:].mean() < falling[:5].mean()
    assert 0 <= result.ap["AP50"] <= result.ap["AP40"] <= 1


@pytest.mark.parametrize("loss", ["gfl", "focal"])
def test_prime_samples_join(loss):
    plain, prime = (train_detector.train(config(loss=loss, steps=5, pisa=p)) for p in (False, True))
    assert np.isfinite(values(prime)).all()
    assert "carl" in prime.losses[0] and "carl" not in plain.losses[0]
    # The reweighted classification loss keeps the sum it had.
    first, second = (run.losses[0]["classification"] for run in (plain, prime))
    assert first == pytest.approx(second, rel=1e-5)


def test_same_seed_same_losses():
    first, again, other = (train_detector.train(config(steps=4, seed=s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(values(first), values(again))
    assert (values(first) != values(other)).all()


@pytest.mark.parametrize("loss", ["gfl", "ghm", "rank_sort"])
def test_resumed_run_repeats_the_straight_one(loss, tmp_path):
    out = str(tmp_path / "run")
    settings = config(loss=loss, out=out)
    straight = train_detector.train(dataclasses.replace(settings, out=None))
    half = train_detector.train(dataclasses.replace(settings, stop_after=5))
    assert len(half.losses) == 5 and not half.ap
    resumed = train_detector.train(
        dataclasses.replace(settings, resume=f"{out}/checkpoint.pt", out=None)
    )
    np.testing.assert_array_equal(values(straight), values(resumed))
    assert straight.ap == resumed.ap


def test_resume_takes_its_settings_from_the_checkpoint(tmp_path, capsys):
    out = str(tmp_path / "run")
    train_detector.train(config(steps=3, stop_after=1, out=out))
    checkpoint = f"{out}/checkpoint.pt"
    fails(capsys, ["--resume", checkpoint, "--loss", "focal"], "--loss", "gfl")
    assert train_detector.main(["--resume", checkpoint, "--backend", "eager"]) == 0
    assert len(json.loads(Path(out, "metrics.json").read_text())["losses"]) == 3


def test_a_batch_without_objects_trains():
    criterion = losses.Criterion("gfl")
    network = model.Detector(10, 8, 16)
    grids = model.cells(32, 32)
    targets = losses.assign(grids, torch.zeros(2, 1, 4), torch.full((2, 1), -1), 10)
    total, parts = criterion(*network(torch.randn(2, 3, 32, 32)), grids, targets)
    total.backward()
    assert parts["giou"] == parts["dfl"] == 0 < total
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def head(loss, images=2, seed=0):
    """Outputs of a new network on digits, and their targets."""
    dataset = data.digits(seed, 6, 0)
    pixels, boxes, labels = dataset.batch(np.random.default_rng(seed), images)
    torch.manual_seed(seed)
    bins = losses.Criterion(loss).bins
    network = model.Detector(10, bins, 16)
    for part in (network.classify, network.regress):  # unlike each other, as trained ones are
        torch.nn.init.normal_(part.weight, std=0.1)
    outputs = [[x.detach() for x in levels] for levels in network(pixels)]
    grids = model.cells(96, 96)
    return outputs, grids, losses.assign(grids, boxes, labels, 10), bins


def leaves_of(outputs):
    return [[x.clone().requires_grad_() for x in levels] for levels in outputs]


def flat(heads):
    return [x for levels in heads for x in levels]


def box_rows(outputs, grids, targets, bins):
    """Of the positive cells: predicted boxes, wanted ones, outputs, cells and strides."""
    labels = rows(targets.labels)
    positive = (labels >= 0) & (labels < 10)
    points, strides = (each[positive] for each in bench.of_rows(grids, len(outputs[0])))
    chosen = rows(outputs)[positive]
    sides = torch.nn.functional.softplus(chosen)
    if bins:
        sides = tritonloss.distribution_expectation(chosen, sides=4)
    x1y1, x2y2 = points - sides[:, :2] * strides, points + sides[:, 2:] * strides
    return torch.cat([x1y1, x2y2], 1), rows(targets.boxes)[positive], chosen, points, strides


def classified_rows(loss, x, labels, quality, error, n):
    """The classification loss of rows; of aLRP with its box loss."""
    graded = labels, quality
    if loss == "ghm":
        state = torch.zeros(30), torch.zeros(30)
        options = {"bins": 30, "momentum": 0.99, "state": state, "bias_correction": True}
        return losses.GHM_C_WEIGHT * tritonloss.ghm_c_loss(x, labels, **options)[0]
    return {
        "gfl": lambda: tritonloss.quality_focal_loss(x, graded, avg_factor=n),
        "focal": lambda: tritonloss.sigmoid_focal_loss(x, labels, avg_factor=n),
        "focal_star": lambda: tritonloss.focal_star_loss(x, labels, avg_factor=n),
        "varifocal": lambda: tritonloss.varifocal_loss(x, graded, avg_factor=n),
        "rank_sort": lambda: sum(tritonloss.rank_sort_loss(x, graded)),
        "ap": lambda: tritonloss.ap_loss(x, labels),
        "alrp": lambda: tritonloss.alrp_loss(x, labels, error),
    }[loss]()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_levels_and_masks_give_what_the_positive_rows_give(loss, seed):
    outputs, grids, targets, bins = head(loss, seed=seed)
    mine, theirs = leaves_of(outputs), leaves_of(outputs)
    total, _ = losses.Criterion(loss)(*mine, grids, targets)

    labels = rows(targets.labels)
    positive = (labels >= 0) & (labels < 10)
    boxes, wanted, chosen, points, strides = box_rows(theirs[1], grids, targets, bins)
    assert targets.count == len(boxes) > 0
    quality, error = torch.zeros(len(labels)), torch.zeros(len(labels))
    quality[positive] = tritonloss.iou(boxes, wanted).detach()
    each = losses.BOX_LOSSES[LOSSES[loss].box]
    if each is not None:
        error = error.masked_scatter(positive, each(boxes, wanted, reduction="none"))
    found = classified_rows(loss, rows(theirs[0]), labels, quality, error, targets.count)
    box = losses.BOX_WEIGHT * error.sum() / targets.count
    if loss == "alrp":
        found, box = found
    if loss == "ghm":
        state = torch.zeros(10), torch.zeros(10)
        options = {"momentum": 0.7, "state": state, "bias_correction": True}
        scaled = boxes / strides, wanted / strides
        box = losses.GHM_R_WEIGHT * tritonloss.ghm_r_loss(*scaled, **options)[0]
    scale = (found / box).detach() if LOSSES[loss].balance else 1
    want = found + scale * box
    if bins:
        sides = torch.cat([points - wanted[:, :2], wanted[:, 2:] - points], 1) / strides
        want = want + losses.DFL_WEIGHT * tritonloss.distribution_focal_loss(
            chosen.unflatten(1, (4, -1)), sides.clamp(0, bins), avg_factor=targets.count
        )
    torch.testing.assert_close(total, want)
    for ours, plain in zip(flat(mine), flat(theirs), strict=True):
        grads = [torch.autograd.grad(t, x, retain_graph=True)[0] for t, x in
                 ((total, ours), (want, plain))]  # fmt: skip
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_one_graph_serves_every_batch():
    """With masks; the rows of the positive cells break it, and compile again and again."""
    steps = bench.steps(4, 2)
    counted = {way: bench.graphs(make(), steps) for way, make in bench.WAYS.items()}
    assert counted["masks"] == {"graph_breaks": 0, "graphs": 1, "recompiles": 0}
    assert counted["rows"]["graph_breaks"] > 0 and counted["rows"]["graphs"] > 2, counted
    values = [
        torch.stack([bench.step(make(), *one) for one in steps]) for make in bench.WAYS.values()
    ]
    torch.testing.assert_close(*values)


def criterion_step(group, rank, loss, outputs, boxes, labels):
    """Losses and gradients of a share of a batch."""
    torch.manual_seed(0)
    grids = model.cells(96, 96)
    targets = losses.assign(grids, boxes, labels, 10)
    leaves = leaves_of(outputs)
    criterion = losses.Criterion(loss, group=group)
    total, parts = criterion(*leaves, grids, targets)
    values = criterion.mean_over_processes(torch.stack([total, *parts.values()]))
    return values, torch.autograd.grad(total, flat(leaves))


def test_processes_share_a_batch():
    """The mean of their gradients, which DDP takes, is the gradient of one with all of it."""
    images, boxes, labels = data.digits(0, 4, 0).batch(np.random.default_rng(0), 3)
    pool = processes.Pool(2)
    try:
        for loss in LOSSES:
            network = model.Detector(10, losses.Criterion(loss).bins, 16)
            outputs = [[x.detach() for x in levels] for levels in network(images)]
            whole, whole_grads = criterion_step(None, 0, loss, outputs, boxes, labels)
            shares = processes.PerRank(
                [[x.tensor_split(2)[rank] for x in levels] for levels in outputs]
                for rank in range(2)
            )
            split = [processes.PerRank(x.tensor_split(2)) for x in (boxes, labels)]
            (got, grads), (other, more) = pool.run(criterion_step, 2, loss, shares, *split)
            torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-6)
            assert torch.equal(got, other)
            for a, b, w in zip(grads, more, whole_grads, strict=True):
                torch.testing.assert_close(torch.cat([a, b]) / 2, w, rtol=1e-4, atol=1e-6)
    finally:
        pool.close()


@pytest.mark.parametrize("loss", ["rank_sort", "ghm"])
def test_two_processes_train_and_report_once(coco, tmp_path, loss):
    path, _ = coco
    out = tmp_path / "run"
    arguments = ["--coco", path, "--images", path.parent, "--out", out, "--steps", 4, "--batch", 3,
                 "--channels", 16, "--loss", loss, "--threads", 1, "--diagnose"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
               ROOT / "examples" / "train_detector.py", *arguments]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AP40") == 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["losses"]) == 4 and {"AP40", "AP50"} <= set(metrics["AP"])
    assert 0.95 < diagnosed_logits(out) / (4 * 3 * logits_of_a_crop(path)) <= 1  # of both
    assert (out / "checkpoint.pt").exists()
    assert train_detector.main(["--resume", str(out / "checkpoint.pt"), "--steps", "6"]) == 0


MISMATCH = """
import dataclasses, sys
sys.path.insert(0, {examples!r})
import torch, train_detector
from detection import losses
plain = losses.rank_sort
def other(*args, **shared):
    return plain(*args, delta=0.25 + torch.distributed.get_rank(), **shared)
recipe = dataclasses.replace(losses.LOSSES["rank_sort"], classification=other)
losses.LOSSES["rank_sort"] = recipe
sys.exit(train_detector.main(sys.argv[1:]))
"""


def test_a_process_that_raised_ends_without_an_abort(coco, tmp_path):
    """Of two whose settings differ, without a launcher that kills the other: 1 is the error."""
    path, _ = coco
    script = MISMATCH.format(examples=str(ROOT / "examples"))
    arguments = ["--coco", path, "--images", path.parent, "--steps", 4, "--batch", 4, "--channels",
                 16, "--loss", "rank_sort", "--threads", 1]  # fmt: skip
    port = str(processes.free_port())
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments), "--out", f"{tmp_path}/{rank}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
                 "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port},
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in pair:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 1, (process.returncode, error)
        assert error.strip().splitlines()[-1].startswith("ValueError: delta differs between"), error


@pytest.mark.parametrize(
    "loss", ["gfl", *(pytest.param(n, marks=pytest.mark.slow) for n in LOSSES if n != "gfl")]
)
def test_compiled_losses_are_the_same(loss):
    # A small learning rate: with the usual one, rounding alone grows to 1e-3 within a few steps.
    settings = {"loss": loss, "steps": 5, "lr": 1e-4}
    eager = train_detector.train(config(**settings))
    compiled = train_detector.train(config(**settings, compile=True))
    np.testing.assert_allclose(values(compiled), values(eager), rtol=1e-4)


def with_gradient(value, *pairs):
    """A value whose gradients are given: (tensor, gradient) pairs."""
    return value + sum(((x - x.detach()) * g.to(x.dtype).view_as(x)).sum() for x, g in pairs)


def loop(name):
    """A classification loss of the example from the loops over positives."""

    def loss(logits, targets, predicted):
        logits, labels = rows(logits), rows(targets.labels)
        n_classes = logits.shape[-1]
        pos = (labels[:, None] == torch.arange(n_classes)).flatten()
        neg = (labels >= 0).repeat_interleave(n_classes) & ~pos
        flat = logits.flatten()

        def wide(levels):
            return rows(levels).repeat_interleave(n_classes)

        if name == "rank_sort":
            rank, sort, *grads = reference.rank_sort(flat, pos, neg, wide(predicted.quality), 0.5)
            return RankSort(
                *(with_gradient(v, (flat, g)) for v, g in zip((rank, sort), grads, strict=True))
            )
        if name == "ap":
            value, grad = reference.average_precision(flat, pos, neg, 1.0, True)
            return with_gradient(value, (flat, grad))
        error = wide(predicted.box_loss)
        cls, loc, grad, error_grad = reference.alrp(flat, pos, neg, error.detach(), 1.0)
        return ALRP(with_gradient(cls, (flat, grad)), with_gradient(loc, (error, error_grad)))

    return loss


@pytest.mark.parametrize("loss", ["rank_sort", "ap", "alrp"])
def test_ranking_losses_train_like_the_loops(loss, monkeypatch):
    settings = config(loss=loss, steps=20, digits=(40, 2), lr=1e-4)
    ours = train_detector.train(settings)
    recipe = dataclasses.replace(LOSSES[loss], classification=loop(loss))
    monkeypatch.setitem(LOSSES, loss, recipe)
    loops = train_detector.train(settings)
    assert ours.losses[0].keys() == loops.losses[0].keys()
    np.testing.assert_allclose(values(ours), values(loops), rtol=1e-4, atol=1e-7)


def test_cells_learn_the_smallest_box_around_them():
    grids = model.cells(64, 64)
    assert [grid.stride for grid in grids] == [4, 8, 16]
    boxes = torch.tensor(
        [[[8.0, 8, 28, 28], [14, 14, 22, 22], [0, 0, 64, 64], [40, 0, 60, 20], [2, 14, 42, 54]]]
    )
    targets = losses.assign(grids, boxes, torch.tensor([[0, 1, 2, -1, 1]]), 3)
    at = {}
    for grid, labels, index in zip(grids, targets.labels, targets.gt_index, strict=True):
        assert labels.shape == index.shape == (1, *grid.points.shape[1:])
        for y, x in np.ndindex(*labels.shape[1:]):
            place = *grid.points[:, y, x].tolist(), grid.stride
            at[place] = labels[0, y, x].item(), index[0, y, x].item()
    assert at[18, 18, 4] == (1, 1)  # in both of the first two boxes
    assert at[22, 14, 4] == (0, 0)
    assert at[20, 36, 8] == (1, 4)  # 40 pixels wide: of the middle level alone
    assert at[24, 24, 16][1] != 4 and at[22, 34, 4] == (3, -1)
    assert at[40, 40, 16] == (2, 2)
    assert at[36, 36, 8][1] != 2
    assert at[50, 10, 4] == (-1, -1) and at[62, 62, 4] == (3, -1)
    for label, index in at.values():
        assert (index >= 0) == (0 <= label < 3)
    assert targets.count == sum(index >= 0 for _, index in at.values())
    for grid, wanted, index in zip(grids, targets.boxes, targets.gt_index, strict=True):
        assert wanted.shape == (1, 4, *grid.points.shape[1:])
        for y, x in np.ndindex(*index.shape[1:]):
            k = index[0, y, x]
            want = boxes[0, k] if k >= 0 else torch.zeros(4)
            assert torch.equal(wanted[0, :, y, x], want)


def test_each_level_has_the_boxes_of_its_size():
    """Up to 28 pixels on stride 4, up to 56 on stride 8, the larger ones on stride 16."""
    grids = model.cells(256, 256)
    for side, level in ((5, 0), (27, 0), (28, 0), (29, 1), (56, 1), (57, 2), (250, 2)):
        box = torch.tensor([[[2.0, 2, 2 + side, 2 + side]]])
        targets = losses.assign(grids, box, torch.tensor([[0]]), 1)
        counts = [int((index >= 0).sum()) for index in targets.gt_index]
        assert counts[level] > 0 and sum(counts) == counts[level], (side, counts)


def test_nms_keeps_the_best_of_each_class():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [20, 0, 30, 10]])
    kept = model.nms(boxes, torch.tensor([0.5, 0.9, 0.4, 0.3]), torch.tensor([0, 0, 1, 0]))
    assert kept.tolist() == [1, 2, 3]


def detections(scenes, moved=0.0):
    """The true boxes, to the right by this part of their width."""
    found = []
    for scene in scenes:
        boxes = torch.from_numpy(scene.boxes.copy())
        shift = moved * (boxes[:, 2] - boxes[:, 0])
        boxes[:, [0, 2]] += shift[:, None]
        found.append((boxes, torch.ones(len(boxes)), torch.from_numpy(scene.labels)))
    return found


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        (1, {"AP40": 1, "AP50": 1, "AP50:95": 1}),
        (0.72, {"AP40": 1, "AP50": 1, "AP50:95": 0.5}),  # 0.50, 0.55 ... 0.70 of ten thresholds
        (0.45, {"AP40": 1, "AP50": 0, "AP50:95": 0}),
    ],
)
def test_average_precision_of_boxes_with_a_known_overlap(overlap, expected):
    scenes = data.digits(0, 0, 40).test
    classes = [*map(str, range(10)), "none"]
    moved = (1 - overlap) / (1 + overlap)  # of two boxes side by side this is their IoU
    ap, by_class = evaluate.average_precision(scenes, detections(scenes, moved), classes)
    assert {name: ap[name] for name in expected} == pytest.approx(expected)
    assert by_class.pop("none") == {"AP50": None, "AP50:95": None}
    for name, value in by_class.items():
        assert value == pytest.approx({k: expected[k] for k in value}), name


def test_average_precision_of_no_detections():
    scenes = data.digits(0, 0, 6).test
    nothing = [tuple(x[:0] for x in one) for one in detections(scenes)]
    ap, by_class = evaluate.average_precision(scenes, nothing, [*map(str, range(10)), "none"])
    assert ap["AP50"] == ap["AP50:95"] == 0
    present = {str(label) for scene in scenes for label in scene.labels}
    assert {k for k, v in by_class.items() if v == {"AP50": 0, "AP50:95": 0}} == present


def test_the_better_of_two_detections_lies_on_top(tmp_path):
    """In any order, each in the colour of its class, and the truth with its name."""
    scene = data.Scene(np.zeros((96, 96, 3), np.uint8), [[60, 60, 80, 80]], [2])
    box = torch.tensor([[10.0, 20, 50, 60]]).expand(2, 4)
    classes = ["zero", "one", "two"]
    pixels, counts = [], []
    for better in (0, 1):
        found = [
            (box, torch.tensor([0.9, 0.6] if better == 0 else [0.6, 0.9]), torch.tensor([0, 1]))
        ]
        path = tmp_path / f"{better}.png"
        pictures.draw_detections(path, [scene], found, classes, 0.5, "a title")
        picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
        # without the legend, which has both colours
        picture = picture[picture.shape[0] // 4 :]
        counts.append([has_colour(picture, pictures.colour_of(label)) for label in (0, 1)])
        pixels.append(has_colour(picture, pictures.TRUTH))
    assert counts[0][0] > 4 * counts[0][1] and counts[1][1] > 4 * counts[1][0], counts
    assert min(pixels) > 100


def has_colour(picture, colour: str) -> int:
    rgb = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return int((abs(picture - rgb).max(-1) < 20).sum())


@pytest.mark.parametrize("loss", ["gfl", pytest.param("focal", marks=pytest.mark.slow)])
def test_digits_are_found(loss):
    result = train_detector.train(train_detector.Config(data="digits", loss=loss, steps=500))
    assert result.ap["AP50"] >= 0.90


# ----------------------------------------------------------------------- a detector of queries

FEW_QUERIES = {"digits": (24, 8), "batch": 2, "channels": 16, "steps": 40, "queries": 12}


def detr_config(**settings):
    return train_detr.Config(**{**FEW_QUERIES, **settings})


@pytest.mark.parametrize("loss", train_detr.LOSSES)
def test_every_loss_trains_queries(loss):
    result = train_detr.train(detr_config(loss=loss))
    assert np.isfinite(values(result)).all()
    l1 = np.array([step["l1"] for step in result.losses])
    assert l1[-5:].mean() < l1[:5].mean()
    assert 0 <= result.ap["AP50"] <= result.ap["AP40"] <= 1


def test_queries_with_the_same_seed_have_the_same_losses():
    first, again, other = (train_detr.train(detr_config(steps=4, seed=s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(values(first), values(again))
    assert (values(first) != values(other)).all()


def test_a_run_of_queries_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    small = functools.partial(data.digits, n_train=24, n_test=8)
    monkeypatch.setattr(data, "digits", lambda seed, *_: small(seed))
    arguments = ["--out", out, "--steps", 3, "--batch", 2, "--channels", 16, "--loss", "mal"]
    assert train_detr.main([str(a) for a in arguments]) == 0
    assert "AP50" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["config"]["loss"] == "mal" and len(metrics["losses"]) == 3
    for picture in ("detections.png", "training.png"):
        assert min(Image.open(out / picture).size) > 200


def test_wrong_options_of_queries_are_named(capsys, tmp_path):
    for option, value in {"--channels": "20", "--queries": "145", "--seed": "-1"}.items():
        assert train_detr.main([option, value]) == 2
        assert option in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert train_detr.main(["--out", str(tmp_path / "file" / "folder")]) == 2
    assert "--out" in capsys.readouterr().err


def test_objects_are_centred_boxes_in_units_of_the_image():
    boxes = torch.tensor([[[12.0, 24, 36, 48], [0, 0, 0, 0]]])
    labels, centred, sizes = train_detr.objects_of(boxes, torch.tensor([[7, data.IGNORE]]), 96)
    assert labels.tolist() == [[7, 0]] and sizes.tolist() == [1]
    assert centred[0, 0].tolist() == [0.25, 0.375, 0.25, 0.25]


def test_each_query_finds_one_object_without_suppression():
    detr = importlib.import_module("detection.detr")
    torch.manual_seed(0)
    network = detr.SmallDETR(10, 16, queries=5, layers=1).eval()
    images = torch.randn(2, 3, 96, 64)
    logits, boxes = network(images)
    assert logits.shape == (2, 2, 5, 10) and boxes.shape == (2, 2, 5, 4)
    found = detr.detect(network, images, min_score=0.0)
    for image, (places, scores, labels) in enumerate(found):
        assert scores.shape == labels.shape == (50,) and (scores.diff() <= 0).all()
        x, y, w, h = boxes[-1, image, logits[-1, image].amax(-1).argmax()].tolist()
        want = [(x - w / 2) * 64, (y - h / 2) * 96, (x + w / 2) * 64, (y + h / 2) * 96]
        np.testing.assert_allclose(places[0].tolist(), want, rtol=1e-4, atol=1e-3)
        assert labels[0] == logits[-1, image].flatten().argmax() % 10


@pytest.mark.slow
def test_digits_are_found_by_queries():
    assert train_detr.train(train_detr.Config()).ap["AP50"] >= 0.90
