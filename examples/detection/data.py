"""Scenes with boxes: two aerial photos, composed digits, or your own images in COCO format."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import UsageError

TREES = Path(__file__).parent.parent / "data" / "trees"
IGNORE = -1  # label of a region in which nothing is taught and nothing is counted


class Scene:
    """One picture with boxes (n, 4: x1, y1, x2, y2 in pixels) and labels (n; -1: ignore)."""

    def __init__(self, image: np.ndarray | Path, boxes, labels, size=None, source: str = ""):
        self._image = image
        self._cached: Image.Image | None = None
        self.boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        self.labels = np.asarray(labels, np.int64).reshape(-1)
        self.size = size or (image.shape[1], image.shape[0])
        self.source = source

    @property
    def image(self) -> Image.Image:
        if self._cached is None:
            if isinstance(self._image, np.ndarray):
                self._cached = Image.fromarray(self._image)
            else:
                picture = _open(self._image, "--images").resize(self.size, Image.BILINEAR)
                if len(_kept_in_memory) >= 2000:
                    return picture
                _kept_in_memory.append(self._image)
                self._cached = picture
        return self._cached


_kept_in_memory: list[Path] = []  # decoded files; more than 2000 are read again when needed


@dataclass
class Dataset:
    """Training and test scenes and how to cut training crops from them."""

    name: str
    classes: list[str]
    train: list[Scene]
    test: list[Scene]
    crop: int
    scales: tuple[float, float] = (1.0, 1.0)
    flips: str = ""  # "h" left-right, "v" up-down, "t" transpose
    colour: float = 0.0
    bins: int = 8  # the largest distance from an anchor to a side, in strides
    source: str = ""  # where the pictures come from, and which are held back
    became: Counter = field(default_factory=Counter)  # of entries that are not taught as written
    skipped: list[str] = field(default_factory=list)  # why, of each broken entry left out

    def boxes_per_class(self, scenes: list[Scene]) -> dict[str, int]:
        labels = np.concatenate([scene.labels for scene in scenes] or [np.zeros(0, np.int64)])
        counts = np.bincount(labels[labels != IGNORE], minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def facts(self) -> dict:
        """What is trained and tested on, for people and for metrics.json."""
        parts = {"train": self.train, "test": self.test}
        return {
            "name": self.name,
            "source": self.source,
            "images": {part: len(scenes) for part, scenes in parts.items()},
            "boxes": {part: self.boxes_per_class(scenes) for part, scenes in parts.items()},
            "regions to ignore": {
                part: sum(int((scene.labels == IGNORE).sum()) for scene in scenes)
                for part, scenes in parts.items()
            },
            "entries not as written": dict(self.became),
            "skipped": self.skipped,
        }

    def summary(self) -> str:
        """The same as a few lines."""
        facts = self.facts()
        width = max(map(len, (*self.classes, "regions to ignore")))

        def row(name, train, test):
            return f"  {name:<{width}}  {train:>7,}  {test:>7,}"

        lines = [f"data: {self.name}, {self.source}", f"  {'':<{width}}  {'train':>7}  {'test':>7}"]
        lines.append(row("images", *facts["images"].values()))
        train, test = facts["boxes"].values()
        lines += [row(name, train[name], test[name]) for name in self.classes]
        if any(facts["regions to ignore"].values()):
            lines.append(row("regions to ignore", *facts["regions to ignore"].values()))
        lines += [f"  {count:,} {what}" for what, count in self.became.items()]
        lines += [f"    {why}" for why in self.skipped[:5]]
        if len(self.skipped) > 5:
            lines.append(f"    ... and {len(self.skipped) - 5:,} more (all are in metrics.json)")
        return "\n".join(lines)

    def batch(self, rng: np.random.Generator, size: int):
        """Images (B, 3, S, S) and padded boxes (B, M, 4), labels (B, M; -1 also where padded)."""
        area = np.array([scene.size[0] * scene.size[1] for scene in self.train], float)
        picks = rng.choice(len(self.train), size, p=area / area.sum())
        crops = [self._crop(self.train[i], rng) for i in picks]
        most = max(1, max(len(labels) for _, _, labels in crops))
        boxes = np.zeros((size, most, 4), np.float32)
        classes = np.full((size, most), IGNORE, np.int64)
        for row, (_, crop_boxes, labels) in enumerate(crops):
            boxes[row, : len(labels)], classes[row, : len(labels)] = crop_boxes, labels
        images = torch.stack([to_tensor(image) for image, _, _ in crops])
        if self.colour:
            contrast = 1 + self.colour * rng.uniform(-1, 1, (size, 3, 1, 1))
            brightness = 2 * self.colour * rng.uniform(-1, 1, (size, 1, 1, 1))
            images = (
                images * torch.from_numpy(contrast).float() + torch.from_numpy(brightness).float()
            )
        return images, torch.from_numpy(boxes), torch.from_numpy(classes)

    def _crop(self, scene: Scene, rng: np.random.Generator):
        side = self.crop / rng.uniform(*self.scales)
        # A scene smaller than the crop moves about inside it.
        x0, y0 = (rng.uniform(min(0.0, n - side), max(0.0, n - side)) for n in scene.size)
        if scene.size == (self.crop, self.crop) and self.scales == (1.0, 1.0):
            image = scene.image
        else:
            image = scene.image.transform(
                (self.crop, self.crop),
                Image.Transform.EXTENT,
                (x0, y0, x0 + side, y0 + side),
                Image.Resampling.BILINEAR,
            )
        scale = self.crop / side
        boxes = (scene.boxes - np.float32([x0, y0, x0, y0])) * np.float32(scale)
        boxes, labels = clip_boxes(boxes, scene.labels, (0, 0, self.crop, self.crop))
        if "h" in self.flips and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes[:, [0, 2]] = self.crop - boxes[:, [2, 0]]
        if "v" in self.flips and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            boxes[:, [1, 3]] = self.crop - boxes[:, [3, 1]]
        if "t" in self.flips and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.TRANSPOSE)
            boxes = boxes[:, [1, 0, 3, 2]]
        return image, boxes, labels


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32, roughly zero mean and unit variance."""
    pixels = torch.from_numpy(np.array(image, np.float32))
    return (pixels.permute(2, 0, 1) / 255 - 0.45) / 0.25


def clip_boxes(boxes, labels, window):
    """Cut boxes to a window; what keeps less than half of its area becomes a region to ignore."""
    x1, y1, x2, y2 = window
    low, high = np.float32([x1, y1, x1, y1]), np.float32([x2, y2, x2, y2])
    cut = np.clip(boxes, low, high)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    left = np.prod(cut[:, 2:] - cut[:, :2], axis=1)
    labels = np.where(left >= 0.5 * area, labels, IGNORE)
    return cut[left > 0], labels[left > 0]


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def _open(path: Path, argument: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UNREADABLE as error:
        raise UsageError(f"{argument}: cannot read the image {path}: {error}") from None


def trees() -> Dataset:
    """Tree crowns on two aerial photos: the left 70 % of each to train, the right 30 % to test."""
    train, test = [], []
    for path in sorted(TREES.glob("*.jpg")):
        image = np.asarray(_open(path, "--data trees"))
        with open(path.with_suffix(".csv"), newline="") as file:
            boxes = np.array([[float(v) for v in row] for row in list(csv.reader(file))[1:]])
        height, width = image.shape[:2]
        cut = round(0.7 * width)
        for scenes, x1, x2 in ((train, 0, cut), (test, cut, width)):
            part, labels = clip_boxes(
                boxes.astype(np.float32), np.zeros(len(boxes), np.int64), (x1, 0, x2, height)
            )
            part = part - np.float32([x1, 0, x1, 0])
            scenes.append(Scene(image[:, x1:x2], part, labels, source=path.name))
    if not train:
        raise UsageError(f"--data trees: no photos in {TREES}")
    return Dataset(
        "trees", ["tree"], train, test, 160, (0.7, 1.4), "hvt", 0.15,
        source="aerial photos: the left 70 % of each to train, the right 30 % to test",
    )  # fmt: skip


def digits(seed: int, n_train: int = 1500, n_test: int = 200) -> Dataset:
    """Real 8x8 scans of digits, pasted on crops of the photos: 96x96 pixels, 10 classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "--data digits: needs scikit-learn (pip install 'tritonloss[examples]')"
        ) from None
    scans = load_digits()
    ground = trees()
    rng = np.random.default_rng([seed, 96])
    order = np.random.default_rng(0).permutation(len(scans.images))

    def compose(first: int, last: int, scenes: list[Scene]) -> Scene:
        size = 96
        behind = scenes[rng.integers(len(scenes))].image
        x, y = (int(rng.integers(n - size)) for n in behind.size)
        canvas = np.asarray(behind.crop((x, y, x + size, y + size)), np.float32)
        canvas = 0.5 * canvas  # darker ground: the digits are to be told apart, not to be found
        boxes, labels = [], []
        for _ in range(rng.integers(2, 6)):
            index = order[rng.integers(first, last)]
            side = int(rng.integers(20, 37))
            ink = Image.fromarray((scans.images[index] / 16 * 255).astype(np.uint8))
            ink = np.asarray(ink.resize((side, side), Image.Resampling.BILINEAR)) / 255
            px, py = (int(v) for v in rng.integers(0, size - side + 1, 2))
            ys, xs = np.nonzero(ink > 0.3)
            box = [px + xs.min(), py + ys.min(), px + xs.max() + 1, py + ys.max() + 1]
            if any(_overlap(box, other) > 0 for other in boxes):
                continue
            shade = rng.uniform(190, 255) - rng.uniform(0, 40, 3)
            patch = canvas[py : py + side, px : px + side]
            patch += ink[..., None] * (shade - patch)
            boxes.append(box)
            labels.append(int(scans.target[index]))
        return Scene(canvas.astype(np.uint8), boxes, labels)

    # No scan and no piece of ground is in both parts.
    train = [compose(0, 1300, ground.train) for _ in range(n_train)]
    test = [compose(1300, len(scans.images), ground.test) for _ in range(n_test)]
    return Dataset(
        "digits", [str(k) for k in range(10)], train, test, 96, colour=0.1,
        source="scans of digits on pieces of aerial photos; no scan and no ground is in both parts",
    )  # fmt: skip


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def coco(
    annotations, images, val_annotations=None, seed: int = 0, side: int = 256,
    skip_broken: bool = False,
) -> Dataset:  # fmt: skip
    """Your own data in COCO format; without a second file, every fifth image is for testing.

    Every image is scaled so that its longer side has ``side`` pixels. A broken entry is an error;
    with ``skip_broken`` it is left out, and told.
    """
    if images is None:
        raise UsageError("--images: give the folder with the images of --coco")
    if not Path(images).is_dir():
        raise UsageError(f"--images: no such folder: {images}")
    files = [_Coco(Path(annotations), Path(images), "--coco", skip_broken)]
    names, train = files[0].names, files[0].scenes(side)
    source = f"{annotations}, images in {images} scaled to {side} pixels"
    if val_annotations is not None:
        files.append(_Coco(Path(val_annotations), Path(images), "--val-coco", skip_broken, names))
        test = files[1].scenes(side)
        source += f", test {val_annotations}"
    else:
        if len(train) < 2:
            raise UsageError(
                "--coco: needs at least 2 images to hold one back for testing (or --val-coco)"
            )
        order = np.random.default_rng([seed, 5]).permutation(len(train))
        held = max(1, len(train) // 5)
        train, test = [train[i] for i in order[held:]], [train[i] for i in order[:held]]
        source += f", every fifth held back to test (by --seed {seed})"
    return Dataset(
        "coco", list(names.values()), train, test, side, (0.7, 1.4), "h", 0.15, bins=16,
        source=source, became=sum((file.became for file in files), Counter()),
        skipped=[why for file in files for why in file.skipped],
    )  # fmt: skip


REQUIRED = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


class _Coco:
    """One annotation file, checked entry by entry.

    Attributes:
        names: of the categories by id, in the order of the ids.
        became, skipped: see ``Dataset``.
    """

    def __init__(self, path: Path, folder: Path, argument: str, skip_broken: bool, names=None):
        self.path, self.folder, self.argument, self.skip_broken = (
            path,
            folder,
            argument,
            skip_broken,
        )
        self.became: Counter = Counter()
        self.skipped: list[str] = []
        content = self._content()
        found: dict = {}
        for number, entry in enumerate(content["categories"]):
            if why := self._lacks("categories", entry) or self._twice(entry["id"], found):
                raise self._wrong(f"categories[{number}] {why}")
            found[entry["id"]] = str(entry["name"])
        found = dict(sorted(found.items(), key=lambda item: (str(type(item[0])), item[0])))
        for key, name in found.items():
            if names is not None and names.get(key, name) != name:
                raise self._wrong(f"category {key!r} is {name!r}, but in --coco {names[key]!r}")
        self.names = found if names is None else names
        self.files: dict = {}
        for number, entry in enumerate(content["images"]):
            if why := self._lacks("images", entry) or self._twice(entry["id"], self.files):
                self._broken("image", f"images[{number}] {why}")
            else:
                self.files[entry["id"]] = str(entry["file_name"])
        column = {category: k for k, category in enumerate(self.names)}
        self.boxes: dict = {image: [] for image in self.files}
        for number, entry in enumerate(content["annotations"]):
            if why := self._lacks("annotations", entry) or self._unfit(entry, column):
                self._broken("annotation", f"annotations[{number}] {why}")
                continue
            x, y, w, h = entry["bbox"]
            if not (w and h):  # COCO itself has a few
                self.became["boxes without area: left out"] += 1
                continue
            crowd = bool(entry.get("iscrowd"))
            self.became["crowd regions: ignored, they teach nothing"] += crowd
            label = IGNORE if crowd else column[entry["category_id"]]
            self.boxes[entry["image_id"]].append((x, y, x + w, y + h, label))
        self._any_box()

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"{self.argument}: {self.path}: {what}")

    def _broken(self, kind: str, why: str) -> None:
        if not self.skip_broken:
            raise self._wrong(f"{why} (--skip-broken leaves such entries out)")
        self.became[f"broken {kind}s: left out"] += 1
        self.skipped.append(f"{self.path.name}: {why}")

    def _content(self) -> dict:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"{self.argument}: cannot read {self.path}: {error.strerror}"
            ) from None
        except ValueError as error:
            raise UsageError(f"{self.argument}: {self.path} is not JSON: {error}") from None
        for key in REQUIRED:
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise self._wrong(f"has no list {key!r}")
        return content

    def _lacks(self, part: str, entry) -> str:
        for key in REQUIRED[part]:
            if not isinstance(entry, dict) or key not in entry:
                return f"has no {key!r}"
            if key.endswith("id") and not isinstance(entry[key], (int, float, str)):
                return f"has {key} {entry[key]!r}, which is no number or string"
        return ""

    @staticmethod
    def _twice(key, known) -> str:
        return f"has id {key!r}, as one before it" if key in known else ""

    def _unfit(self, entry: dict, column) -> str:
        box = entry["bbox"]
        if entry["image_id"] not in self.files:
            return f"is of an unknown image_id {entry['image_id']!r}"
        if entry["category_id"] not in column:
            return f"is of an unknown category_id {entry['category_id']!r}"
        if not isinstance(box, list) or len(box) != 4:
            return f"must have a bbox [x, y, width, height], got {box!r}"
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in box):
            return f"must have a bbox of four finite numbers, got {box!r}"
        if box[2] < 0 or box[3] < 0:
            return f"has a bbox with a negative width or height: {box!r}"
        return ""

    def _any_box(self) -> None:
        if not any(box[4] != IGNORE for rows in self.boxes.values() for box in rows):
            raise self._wrong("has no boxes to learn from")

    def _size(self, file: Path) -> tuple[int, int]:
        """Of a picture; its header alone is read, unless broken ones are to be left out."""
        if not file.is_file():
            raise UsageError(f"--images: {file} is missing ({self.path} names it)")
        if self.skip_broken:
            return _open(file, "--images").size
        try:
            with Image.open(file) as picture:
                return picture.size
        except UNREADABLE as error:
            raise UsageError(f"--images: cannot read the image {file}: {error}") from None

    def scenes(self, side: int) -> list[Scene]:
        scenes = []
        for image, name in self.files.items():
            file = self.folder / name
            try:
                width, height = self._size(file)
            except UsageError as error:
                if not self.skip_broken:
                    raise UsageError(f"{error} (--skip-broken leaves it out)") from None
                self._broken("image", str(error).removeprefix("--images: "))
                self.became["boxes of broken images: left out"] += len(self.boxes.pop(image))
                continue
            scale = side / max(width, height)
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            rows = np.array(self.boxes[image], np.float64).reshape(-1, 5)
            scaled = (rows[:, :4] * ([size[0] / width, size[1] / height] * 2)).astype(np.float32)
            before = rows[:, 4].astype(np.int64)
            cut, labels = clip_boxes(scaled, before, (0, 0, *size))
            inside = np.clip(scaled, 0, np.float32([*size, *size]))
            area, left = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (scaled, inside))
            half = left >= 0.5 * area  # as clip_boxes has it
            for what, those in (
                ("boxes outside their image: left out", left <= 0),
                ("boxes mostly outside their image: ignored", (left > 0) & ~half & (before >= 0)),
                ("boxes partly outside their image: cut", half & (left < 0.99 * area)),
            ):
                self.became[what] += int(those.sum())
            scenes.append(Scene(file, cut, labels, size, source=name))
        self._any_box()
        self.became = +self.became  # without what never happened
        return scenes
