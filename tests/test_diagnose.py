"""The diagnosis: counts against a loop, figures against brute force, the page and its errors."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import draw_weight, generator, in_layout, plain_point
from conftest import DEVICE

import tritonloss as tl
from tritonloss import _grid as grid
from tritonloss._dispatch import INTERPRET
from tritonloss.diagnose import Diagnosis, Report, __main__, _advice, _figures, diagnose, recorded
from tritonloss.eager import _blocks

once = pytest.mark.skipif(INTERPRET, reason="says the same in the plain run")


# ------------------------------------------------------------------------------------- counts


def nearest(value: float, steps: int, low: float, high: float) -> int:
    """Steps from the lower end to the grid point nearest to the value, the even one of two."""
    return round(min(max(value, low), high) * steps) - low * steps


def counted_by_loop(x, y, positive, keep):
    """(ROWS, COLUMNS) counts, one logit after the other."""
    table = np.zeros((grid.ROWS, grid.COLUMNS), dtype=np.int64)
    for value, quality, is_positive, counts in zip(
        x.flatten().tolist(), y.flatten().tolist(), positive.flatten(), keep.flatten(), strict=True
    ):
        if not counts:
            continue
        row = 1 + nearest(quality, grid.QUALITY_STEPS, 0, 1) if is_positive else 0
        column = grid.COLUMNS - 1
        if math.isfinite(value) or (value == -math.inf and not is_positive):  # a masked class
            column = nearest(value, grid.STEPS, -grid.LIMIT, grid.LIMIT)
        table[row, column] += 1
    return torch.from_numpy(table)


def drawn(axes, weight_of, g):
    """``(logits, targets, weight, counts by loop)``."""
    x = torch.randn(axes.rows, axes.classes, generator=g) * 4
    for k, value in enumerate(
        (float("nan"), float("inf"), -float("inf"), 1e30, -50.0, 32.0, 0.5 / 64)
    ):
        if x.numel() > k:
            x.view(-1)[k * 7 % x.numel()] = value
    x = in_layout(x, axes)
    rows, classes = x.shape[:-1], x.shape[-1]
    weight = None
    keep = torch.ones(x.shape, dtype=torch.bool)
    if weight_of:
        weight = draw_weight(rows if weight_of == "row" else x.shape, g)
        keep = keep & ((weight.unsqueeze(-1) if weight_of == "row" else weight) > 0)
    if axes.form == "dense":
        share = torch.rand(x.shape, generator=g)
        y = torch.where(share > 0.8, torch.rand(x.shape, generator=g), 0.0)
        y = torch.where(share < 0.1, -1.0, y)
        targets, positive, keep = y, y > 0, keep & (y >= 0)
    else:
        labels = torch.randint(-1, 2 * classes, rows, generator=g).clamp(max=classes)
        targets = labels
        positive = labels.unsqueeze(-1) == torch.arange(classes)
        keep = keep & (labels >= 0).unsqueeze(-1)
        y = positive.float()
        if axes.form == "quality":
            quality = torch.rand(rows, generator=g)
            quality = torch.where(torch.rand(rows, generator=g) < 0.2, 0.0, quality)
            targets = (labels, quality)
            y = y * quality.unsqueeze(-1)
    return x, targets, weight, counted_by_loop(x.float(), y, positive, keep)


def to_device(value):
    if isinstance(value, tuple):
        return tuple(map(to_device, value))
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("weight", [None, "row", "logit"])
@pytest.mark.parametrize("form", ["labels", "quality", "dense"])
@pytest.mark.parametrize(
    ("layout", "dtype", "rows"),
    [
        ("contiguous", "float32", 500),
        ("nchw", "bfloat16", 500),
        ("sliced", "float16", 61),
        ("contiguous", "float64", 1),
        ("nchw", "float32", 0),
    ],
)
def test_counts_are_those_of_a_loop(
    layout, dtype, rows, form, weight, by_blocks, backend, monkeypatch
):
    if by_blocks and backend == "triton":
        pytest.skip("the kernels know no blocks")
    monkeypatch.setattr(_blocks, "BLOCK", 256 if by_blocks else 10**9)
    axes = plain_point(rows=rows, classes=7, form=form, layout=layout, dtype=dtype)
    x, targets, weight, expected = drawn(axes, weight, generator(rows))
    diagnosis = Diagnosis()
    diagnosis.update(to_device(x), to_device(targets), weight=to_device(weight))
    found = diagnosis.counts.cpu()
    assert found.dtype == torch.int64
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_several_tiles_and_copies(backend):
    """The kernel's last tile is masked, and its programs share copies."""
    g = generator(0)
    x = torch.randn(3001, 23, generator=g) * 2 - 4
    labels = torch.randint(0, 200, (3001,), generator=g).clamp(max=23)
    diagnosis = Diagnosis()
    diagnosis.update(x.to(DEVICE), labels.to(DEVICE))
    positive = labels.unsqueeze(-1) == torch.arange(23)
    column = (x.double() * 64).round().long() + 32 * 64
    expected = torch.bincount(column[~positive], minlength=grid.COLUMNS)
    torch.testing.assert_close(diagnosis.counts[0].cpu(), expected, rtol=0, atol=0)
    expected = torch.bincount(column[positive], minlength=grid.COLUMNS)
    torch.testing.assert_close(diagnosis.counts[-1].cpu(), expected, rtol=0, atol=0)
    assert not diagnosis.counts[1:-1].any()


def test_batches_add_up_to_one(backend):
    """In any cut and order, the same bits."""
    data = recorded_arrays()
    whole = Diagnosis()
    whole.update(data["logits"][0, :600], (data["labels"][0, :600], data["quality"][0, :600]))
    parts = Diagnosis()
    for cut in (slice(400, 600), slice(0, 10), slice(10, 400)):
        parts.update(data["logits"][0, cut], (data["labels"][0, cut], data["quality"][0, cut]))
    assert torch.equal(whole.counts, parts.counts)
    assert whole.read().figures == parts.read().figures


def recorded_arrays():
    with np.load(recorded()) as file:
        return {
            "logits": torch.from_numpy(file["cls_logits"]).float().to(DEVICE),
            "labels": torch.from_numpy(file["labels"]).long().to(DEVICE),
            "quality": torch.from_numpy(file["quality"]).float().to(DEVICE),
        }


def test_compiled_update_counts_the_same(backend):
    """In one graph, and into the counts that are there."""
    g = generator(3)
    x = torch.randn(40, 6, generator=g).to(DEVICE)
    labels = torch.randint(0, 9, (40,), generator=g).clamp(max=6).to(DEVICE)
    expected, found = Diagnosis(), Diagnosis()

    @torch.compile(fullgraph=True)
    def step(x, labels):
        found.update(x, labels)
        return tl.sigmoid_focal_loss(x, labels)

    for _ in range(3):
        expected.update(x, labels)
        step(x, labels)
    assert torch.equal(found.counts, expected.counts)


def test_logits_are_left_as_they_are(backend):
    x = torch.randn(30, 4).to(DEVICE).requires_grad_()
    before = x.detach().clone()
    diagnosis = Diagnosis()
    diagnosis.update(x, torch.full((30,), 4, device=DEVICE))
    assert torch.equal(x, before) and not diagnosis.counts.requires_grad


# ------------------------------------------------------------------------------------- figures


def small(seed: int, labels_alone: bool = False):
    """A few logits on the grid, ties among them: rounding changes nothing."""
    g = generator(seed)
    x = (torch.randn(40, 3, generator=g) * 24 - 40).round() / 16
    labels = torch.randint(0, 12, (40,), generator=g).clamp(max=3)
    x[labels < 3] += 1.5
    quality = (5 * torch.randint(0, 20, (40,), generator=g) + 3).double() / 100
    return x, labels, None if labels_alone else quality


def flat(seed: int):
    """``(negative logits, positive logits, their qualities)``, lists of numbers."""
    x, labels, quality = small(seed)
    positive = labels.unsqueeze(-1) == torch.arange(3)
    qualities = quality.unsqueeze(-1).expand(x.shape)[positive]
    return x[~positive].tolist(), x[positive].tolist(), qualities.tolist()


def report(seed: int, **kwargs) -> dict:
    x, labels, quality = small(seed)
    return diagnose(x, (labels, quality), **kwargs).figures


def step(difference: float) -> float:
    """H for a delta below every distance of the grid."""
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


seeds = pytest.mark.parametrize("seed", range(4))


@once
@seeds
def test_norms_and_scores_count_logits(seed):
    figures, (negatives, positives, _) = report(seed, bins=7), flat(seed)

    def by(values, edges):
        """The last bin is closed."""
        inside = [
            sum(a <= v < b or (v == b == edges[-1]) for v in values)
            for a, b in itertools.pairwise(edges)
        ]
        assert sum(inside) == len(values)
        return inside

    norms, scores = figures["gradient_norms"], figures["scores"]
    p = torch.sigmoid
    assert norms["negatives"] == by(p(torch.tensor(negatives)).tolist(), norms["edges"])
    assert norms["positives"] == by((1 - p(torch.tensor(positives))).tolist(), norms["edges"])
    assert scores["negatives"] == by(negatives, scores["logit_edges"])
    assert scores["positives"] == by(positives, scores["logit_edges"])
    assert figures["summary"]["negatives"] == len(negatives)
    easy = sum(v < math.log(0.1 / 0.9) for v in negatives) / len(negatives)
    assert figures["summary"]["easy_negatives"] == pytest.approx(easy)


@once
@seeds
def test_shares_of_the_loss_add_up_the_hardest(seed):
    figures, (negatives, positives, _) = report(seed)["loss_shares"], flat(seed)
    for name, values, y in (("negatives", negatives, 0), ("positives", positives, 1)):
        p_t = [1 / (1 + math.exp(v if y == 0 else -v)) for v in values]
        for gamma, curve in zip(figures["gammas"], figures[name]["share_of_loss"], strict=True):
            losses = sorted((-((1 - p) ** gamma) * math.log(p) for p in p_t), reverse=True)
            for fraction, share in zip(figures[name]["hardest_fraction"], curve, strict=True):
                whole, part = divmod(fraction * len(losses), 1)
                held = sum(losses[: int(whole)])
                if int(whole) < len(losses):
                    held += part * losses[int(whole)]
                assert share == pytest.approx(held / sum(losses), abs=1e-9)


@once
@seeds
@pytest.mark.parametrize("bins", [5, 30])
def test_shares_of_the_gradient_are_those_of_the_losses(seed, bins):
    """Taken from all logits at once, not from counts."""
    figures = report(seed, bins=bins)["gradient_shares"]
    x, labels, quality = small(seed)
    x = x.double().requires_grad_()
    losses = {
        "cross entropy": tl.sigmoid_focal_loss(x, labels, alpha=None, gamma=0),
        "focal": tl.sigmoid_focal_loss(x, labels),
        "quality focal": tl.quality_focal_loss(x, (labels, quality)),
        "GHM-C": tl.ghm_c_loss(x, labels, bins=bins),
    }
    positive = labels.unsqueeze(-1) == torch.arange(3)
    p = torch.sigmoid(x.detach().float())
    region = ((p - positive.float()).abs() * bins).long().clamp(max=bins - 1)
    assert figures["by_region"].keys() == losses.keys()
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, x)
        share = gradient.abs() / gradient.abs().sum()
        expected = [float(share[region == k].sum()) for k in range(bins)]
        assert figures["by_region"][name] == pytest.approx(expected, abs=1e-9)
        kinds = {
            "positives": positive,
            "negatives, p ≥ 0.5": ~positive & (p >= 0.5),
            "negatives, 0.1 ≤ p < 0.5": ~positive & (p >= 0.1) & (p < 0.5),
            "negatives, p < 0.1": ~positive & (p < 0.1),
        }
        expected = {kind: pytest.approx(float(share[m].sum())) for kind, m in kinds.items()}
        assert figures["by_kind"][name] == expected


@once
@seeds
def test_ranks_are_those_of_all_pairs(seed):
    figures, (negatives, positives, _) = report(seed)["ranking"], flat(seed)
    false = [sum(step(n - s) for n in negatives) for s in positives]
    true = [1 + sum(step(t - s) for t in positives) - 0.5 for s in positives]
    precision = [t / (t + f) for t, f in zip(true, false, strict=True)]
    assert figures["average_precision"] == pytest.approx(np.mean(precision))
    error = [f / (f + t - 0.5) for t, f in zip(true, false, strict=True)]
    assert figures["ranking_error"] == pytest.approx(np.mean(error))
    above = figures["outranked"]
    assert above["mean"] == pytest.approx(np.mean(false))
    for name, value in above["quantiles"].items():
        share = float(name[:-1]) / 100
        lowest = next(f for f in sorted(false) if sum(g <= f for g in false) >= share * len(false))
        assert value == lowest
    inside = [sum(a <= f < b for f in false) for a, b in itertools.pairwise(above["edges"])]
    assert above["positives"] == inside and sum(inside) == len(positives)
    curve = figures["curve"]
    by_score = dict(zip(curve["logit"], zip(curve["rank"], curve["precision"], strict=True),
                        strict=True))  # fmt: skip
    for s, t, f, p in zip(positives, true, false, precision, strict=True):
        assert by_score[s] == (t + f, pytest.approx(p))
    assert curve["rank"] == sorted(curve["rank"])


@once
@seeds
def test_ranks_are_those_of_the_ranking_losses(seed):
    """For a delta below the grid's step, every tie is a half there, too."""
    x, labels, quality = small(seed)
    figures = report(seed)
    loss = tl.rank_sort_loss(x.double(), (labels, quality.double()), delta=1 / 256)
    assert figures["ranking"]["ranking_error"] == pytest.approx(loss.rank.item())
    assert figures["sorting"]["sorting_error"] == pytest.approx(loss.sort.item())
    loss = tl.ap_loss(x.double(), labels, delta=1 / 256, interpolated=False)
    assert figures["ranking"]["average_precision"] == pytest.approx(1 - loss.item())


@once
@seeds
def test_violations_are_pairs_in_the_wrong_order(seed):
    figures, (_, positives, qualities) = report(seed)["sorting"], flat(seed)
    pairs, wrong = np.zeros(10), np.zeros(10)
    for s, y in zip(positives, qualities, strict=True):
        for other, worse in zip(positives, qualities, strict=True):
            if worse < y:
                pairs[min(int(y * 10), 9)] += 1
                wrong[min(int(y * 10), 9)] += step(other - s)
    assert figures["violations"] == pytest.approx(wrong.sum() / pairs.sum())
    for found, a, b in zip(figures["violations_by_iou"], wrong, pairs, strict=True):
        assert found is None if b == 0 else found == pytest.approx(a / b)


@once
@seeds
def test_calibration_is_that_of_the_positives(seed):
    figures, (_, positives, qualities) = report(seed)["calibration"], flat(seed)
    p = [1 / (1 + math.exp(-s)) for s in positives]
    error = 0
    for k in range(10):
        inside = [i for i, v in enumerate(p) if k / 10 <= v < (k + 1) / 10]
        assert figures["positives"][k] == len(inside)
        if inside:
            score, iou = np.mean([p[i] for i in inside]), np.mean([qualities[i] for i in inside])
            assert figures["mean_score"][k] == pytest.approx(score)
            assert figures["mean_iou"][k] == pytest.approx(iou)
            error += len(inside) * abs(score - iou)
    assert figures["error"] == pytest.approx(error / len(p))
    joint = np.histogram2d(qualities, p, bins=np.linspace(0, 1, 21))[0]
    assert figures["joint"] == joint.tolist()


@once
def test_rounding_to_the_grid_costs_little():
    """Figures of the recorded logits, rounded and as they are."""
    data = recorded_arrays()
    x = data["logits"].flatten(0, 1).double()
    labels, quality = data["labels"].flatten(), data["quality"].flatten().double()
    figures = diagnose(x, (labels, quality)).figures
    loss = tl.rank_sort_loss(x, (labels, quality), delta=1e-6)
    assert figures["ranking"]["ranking_error"] == pytest.approx(loss.rank.item(), rel=1e-3)
    # boxes whose IoUs round to the same are in no wrong order
    assert figures["sorting"]["sorting_error"] == pytest.approx(loss.sort.item(), rel=5e-2)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(tl.sigmoid_focal_loss(x, labels), x)
    positive = labels.unsqueeze(-1) == torch.arange(80, device=DEVICE)
    share = gradient[positive].abs().sum() / gradient.abs().sum()
    found = figures["gradient_shares"]["by_kind"]["focal"]["positives"]
    assert found == pytest.approx(share.item(), rel=1e-3)


# ---------------------------------------------------------------------------------- what is odd


def words(**kwargs) -> str:
    return str(diagnose(**kwargs))


@once
def test_what_the_figures_leave_out_is_said():
    x = torch.zeros(5, 2)
    labels = torch.tensor([2, 0, 1, 2, 2])
    assert "nothing can be said about IoUs" in words(logits=x, targets=labels)
    assert "no positive" in words(logits=x, targets=torch.full((5,), 2))
    nothing = words(logits=x, targets=torch.full((5,), -1))
    assert "Nothing was counted" in nothing and "no positive" not in nothing
    assert "Are they probabilities?" in words(logits=torch.rand(5, 2), targets=labels)
    x[0] = torch.tensor([40.0, -1e30])
    assert "2 logits lie at ±32 or beyond" in words(logits=x, targets=labels)
    x[1, 1] = float("nan")
    assert "1 logits are not finite" in words(logits=x, targets=labels)
    figures = diagnose(x, torch.full((5,), -1)).figures
    assert figures["summary"]["negatives"] == 0
    assert figures["summary"]["mean_p_of_negatives"] is None


@once
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: d.read(), RuntimeError, r"call update\(logits, targets\) first"),
        (lambda d: d.update(1.0, torch.zeros(1)), TypeError, "logits must be a tensor"),
        (
            lambda d: d.update([1.0], [torch.zeros(1)]),
            TypeError,
            "level 0: logits must be a tensor",
        ),
        (
            lambda d: d.update(torch.zeros(3, 2), torch.zeros(4, dtype=torch.long)),
            ValueError,
            r"targets must have shape \(3,\)",
        ),
        (
            lambda d: d.update(torch.zeros(3, 2), torch.full((3,), 7)),
            ValueError,
            r"targets must lie in 0..2 \(background\) or be ignore_index = -1; got 7",
        ),
        (
            lambda d: d.update(torch.zeros(1, 2), (torch.tensor([0]), torch.tensor([1.5]))),
            ValueError,
            r"quality must lie in \[0, 1\] where the label is a class; got 1.5",
        ),
        (
            lambda d: d.update(torch.zeros(3, 2), torch.full((3, 2), 2)),
            ValueError,
            "targets must be at most 1; got 2",
        ),
        (
            lambda d: d.update(torch.zeros(3, 2), torch.full((3, 2), 3.0)),
            ValueError,
            "targets must be at most 1; got 3",
        ),
        (
            lambda d: d.update(torch.zeros(3, 2), torch.zeros(3, 3)),
            ValueError,
            r"targets must have shape \(3, 2\) \(dense, as logits; background has no column\)",
        ),
        (lambda d: Diagnosis(ignore_index=0.5), TypeError, "ignore_index must be an int"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(Diagnosis())


@once
@pytest.mark.parametrize("bins", [0, 257])
def test_bins_have_a_range(bins):
    with pytest.raises(ValueError, match=r"bins must be in 1\.\.256"):
        diagnose(torch.zeros(3, 2), torch.full((3,), 2), bins=bins)


@once
def test_reset_begins_anew():
    diagnosis = Diagnosis()
    diagnosis.update(torch.zeros(3, 2), torch.full((3,), 2))
    diagnosis.reset()
    diagnosis.update(torch.zeros(1, 2), torch.full((1,), 2))
    assert diagnosis.read().figures["summary"]["negatives"] == 2


# ------------------------------------------------------------------------------------- the page


class Page(html.parser.HTMLParser):
    """Tags, texts and addresses of a page; every tag that opens has to close."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def viz():
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")


@once
def test_page_holds_all_it_shows(tmp_path, viz, capsys):
    assert __main__.main(["--out", str(tmp_path / "new" / "folder")]) == 0
    out = tmp_path / "new" / "folder"
    assert str(out / "index.html") in capsys.readouterr().out
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert page.tags.count("section") == page.tags.count("img") + 1 == 9
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in page.addresses)
    pictures = {p.stem for p in out.glob("*.png")}
    assert pictures == {
        "scores", "gradient_norms", "loss_shares", "gradient_shares", "outranked", "precision",
        "sorting", "calibration",
    }  # fmt: skip
    figures = json.loads((out / "report.json").read_text())
    data = recorded_arrays()
    expected = diagnose(data["logits"], (data["labels"], data["quality"])).figures
    assert figures == json.loads(json.dumps(expected))
    text = "".join(page.text)
    assert "851,465" in text and "Who outranks the positives" in text
    sentences = [*Report(figures).advice(), _advice.YOURS]
    assert len(sentences) == 6 and all(words in text for words in sentences)


@once
def test_pictures_are_labelled(viz):
    from tritonloss.diagnose import _pictures

    data = recorded_arrays()
    figures = diagnose(data["logits"], (data["labels"], data["quality"])).figures
    for name, picture in _pictures.pictures_of(figures).items():
        for axis in picture.axes:
            assert axis.get_xlabel() or axis.get_ylabel(), name
            assert axis.has_data() or axis.get_label() == "<colorbar>", name


@once
@pytest.mark.parametrize("kind", ["labels alone", "no positives", "nothing", "all alike"])
def test_odd_batches_are_drawn(kind, tmp_path, viz):
    x, labels, quality = small(0)
    if kind == "labels alone":
        found = diagnose(x, labels)
    elif kind == "no positives":
        found = diagnose(x, torch.full_like(labels, 3))
    elif kind == "nothing":
        found = diagnose(x, torch.full_like(labels, -1))
    else:
        found = diagnose(torch.zeros_like(x), (labels, quality))
    page = Page(found.write(tmp_path).read_text(encoding="utf-8"))
    assert ("calibration" in {p.stem for p in tmp_path.glob("*.png")}) == (kind == "all alike")
    if kind == "nothing":
        assert "img" not in page.tags
    for sentence in found.remarks():
        assert sentence in "".join(page.text)


@once
def test_names_are_escaped(tmp_path, viz):
    name = "<script>alert(1)</script> & $x$ {{ 7 * 7 }}"
    page = diagnose(torch.zeros(3, 2), torch.full((3,), 2)).write(tmp_path, title=name)
    parsed = Page(page.read_text(encoding="utf-8"))
    assert "script" not in parsed.tags and name in parsed.text


@once
def test_missing_packages_are_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jinja2: pip install 'tritonloss\[viz\]'"):
        Report(_figures.figures_of(torch.zeros(grid.ROWS, grid.COLUMNS), 10)).write(tmp_path)


GOOD = {
    "logits": np.zeros((4, 3), np.float16),
    "labels": np.array([0, 3, 3, -1], np.int32),
    "quality": np.array([0.5, np.nan, np.nan, np.nan]),
}


@once
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"logits": None}, r"logits: no array 'logits' or 'cls_logits'; .* holds labels, quality"),
        ({"labels": None}, r"labels: neither 'labels' nor dense 'targets'; .* holds logits, qual"),
        ({"targets": np.zeros((4, 3))}, r"labels: both 'labels' and dense 'targets'"),
        ({"cls_logits": np.zeros((4, 3))}, r"logits: both 'logits' and 'cls_logits'"),
        ({"logits": np.zeros((4, 3), int)}, "logits: must be floating; got int64"),
        ({"labels": np.zeros(4)}, "labels: must be integers; got float64"),
        ({"labels": np.zeros((2, 4), int)}, r"labels must have shape \(4,\) .*; got \(2, 4\)"),
        ({"labels": np.full(4, 9)}, r"labels must lie in 0..3 \(background\) or be .* = -1; got 9"),
        ({"logits": np.full((4, 3), np.nan, np.float32)}, "logits: 9 values that count are not"),
        (
            {"labels": np.full(4, -1)},
            r"logits: nothing counts of shape \(4, 3\): .* all labels are",
        ),
        ({"weight": np.zeros(4)}, r"logits: nothing counts of shape \(4, 3\)"),
        (
            {
                "logits": np.zeros((0, 3), np.float32),
                "labels": np.zeros(0, int),
                "quality": np.zeros(0),
            },
            r"logits: nothing counts of shape \(0, 3\): it is empty",
        ),
        ({"quality": np.full(4, np.nan)}, r"quality must lie in \[0, 1\]"),
        ({"quality": np.zeros(3)}, r"quality must have shape \(4,\)"),
        ({"weight": np.ones((2, 2))}, r"weight must have shape \(4,\)"),
        ({"labels": None, "targets": np.zeros((4, 2)), "quality": None}, "targets must have shape"),
        ({"labels": None, "targets": np.zeros((4, 3))}, "quality: goes with 'labels'"),
        ({"logits": np.array([None, {}])}, "cannot read .*Python objects; expected numbers"),
        ({"quality": None, "qualty": np.zeros(4)}, "qualty: looks like 'quality' misspelt, and"),
        ({"Weights": np.zeros(4)}, "Weights: looks like 'weight' misspelt, .*; .* holds Weights, "),
        ({"labels": None, "label": np.zeros(4, int)}, "label: looks like 'labels' misspelt"),
        ({"logits": None, "logit": np.zeros((4, 3))}, "no array 'logits' .* holds labels, logit, "),
        (
            {"labels": np.array([0, 1, 2, 2**64 - 1], np.uint64)},
            r"labels must be below 2\*\*63; got 18446744073709551615",
        ),
    ],
)
def test_command_line_errors_are_one_sentence(change, sentence, tmp_path, capsys):
    arrays = {k: v for k, v in (GOOD | change).items() if v is not None}
    path = tmp_path / "logits.npz"
    np.savez(path, **arrays)
    assert __main__.main([str(path), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert re.search(sentence, captured.err) and captured.err.count("\n") == 1, captured.err
    assert not (tmp_path / "out").exists() and not captured.out


@once
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such file"),
        (b"no archive", "is no .npz archive of named arrays"),
        (b"", "is no .npz archive"),
        (b"PK\x05\x06" + b"\x00" * 18, "holds nothing"),
    ],
)
def test_files_that_are_none(content, sentence, tmp_path, capsys):
    path = tmp_path / "logits.npz"
    if content is not None:
        path.write_bytes(content)
    assert __main__.main([str(path)]) == 2
    assert re.search(sentence, capsys.readouterr().err)


@once
def test_a_folder_that_cannot_be_made(tmp_path, capsys, viz):
    np.savez(tmp_path / "a.npz", **GOOD)
    (tmp_path / "file").write_text("")
    assert __main__.main([str(tmp_path / "a.npz"), "--out", str(tmp_path / "file" / "x")]) == 2
    assert re.search("error: --out: cannot write into .*: Not a dir", capsys.readouterr().err)


@once
def test_a_single_array_is_no_archive(tmp_path, capsys):
    np.save(tmp_path / "a.npy", GOOD["logits"])
    assert __main__.main([str(tmp_path / "a.npy")]) == 2
    assert "is no .npz archive" in capsys.readouterr().err


@once
def test_what_is_ignored_may_hold_anything(tmp_path, capsys, viz):
    logits = np.zeros((4, 3), np.float32)
    logits[3] = np.nan
    np.savez(tmp_path / "a.npz", **GOOD | {"logits": logits, "iou": np.zeros(4)})
    assert __main__.main([str(tmp_path / "a.npz"), "--out", str(tmp_path / "out")]) == 0
    assert "read: logits, labels, quality; not read: iou\n" in capsys.readouterr().out


@once
def test_command_line_takes_dense_targets_and_weights(tmp_path, viz):
    arrays = {
        "cls_logits": np.zeros((4, 3), np.float32),
        "targets": np.eye(4, 3, dtype=np.float32) * 0.5,
        "weight": np.array([1.0, 1.0, 0.0, 1.0]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    out = tmp_path / "out"
    assert __main__.main([str(tmp_path / "a.npz"), "--out", str(out), "--bins", "4"]) == 0
    figures = json.loads((out / "report.json").read_text())
    assert (figures["summary"]["positives"], figures["summary"]["negatives"]) == (2, 7)
    assert len(figures["gradient_norms"]["negatives"]) == 4


@once
def test_command_line_takes_channels_first(tmp_path, capsys, viz):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 4, 5, generator=g)
    labels, quality = torch.randint(-1, 4, (2, 4, 5), generator=g), torch.rand(2, 4, 5, generator=g)
    arrays = {"logits": x, "labels": labels, "quality": quality}
    np.savez(tmp_path / "a.npz", **{name: t.numpy() for name, t in arrays.items()})
    command = [str(tmp_path / "a.npz"), "--out", str(tmp_path / "out")]
    assert __main__.main(command) == 2
    assert "(logits without the classes; --class-dim 1 says that" in capsys.readouterr().err
    assert __main__.main([*command, "--class-dim", "1"]) == 0
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    expected = diagnose(x.movedim(1, -1), (labels, quality)).figures
    assert figures == json.loads(json.dumps(expected))
    assert __main__.main([*command, "--class-dim", "7"]) == 2
    assert "--class-dim must be a dim of logits" in capsys.readouterr().err


def trained(n: int = 4000, seed: int = 0):
    """Logits (n, 4) of a model that does all that the advice asks for."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.where(torch.rand(n, generator=g) < 0.4, torch.randint(4, (n,), generator=g), 4)
    quality = torch.rand(n, generator=g) * 0.9 + 0.05
    x = torch.full((n, 4), -8.0)
    positive = (labels < 4).nonzero()[:, 0]
    x[positive, labels[positive]] = torch.logit(quality[positive])
    return x, labels, quality


@once
def test_advice_on_models_that_are_known():
    x, labels, quality = trained()
    good = diagnose(x, (labels, quality)).advice()
    kept = ("does not ask for", "Up to 10 %", "0.5 or more", "at most 30 %", "at most 0.1")
    assert len(good) == 5
    for words, sentence in zip(kept, good, strict=True):
        assert words in sentence

    g = torch.Generator().manual_seed(1)
    new = torch.randn(x.shape, generator=g) * 0.01
    words = " ".join(diagnose(new, (labels, quality)).advice())
    assert "does not tell them apart" in words and "floods" in words and "below 0.5" in words

    unsorted = quality[torch.randperm(len(quality), generator=g)]
    words = " ".join(diagnose(x, (labels, unsorted)).advice())
    assert "NMS keeps worse boxes" in words and "do not read a score as an IoU" in words

    missing = torch.where(torch.rand(len(labels), generator=g) < 0.5, 4, labels)
    assert "without a label, or" in " ".join(diagnose(x, missing).advice())
    assert not any("IoU" in words for words in diagnose(x, labels).advice())
    assert "Only 3 positives" in diagnose(torch.zeros(3, 1), torch.zeros(3).long()).advice()[0]
    nothing = diagnose(x, torch.full_like(labels, 4))
    assert nothing.advice() == [] and _advice.YOURS not in str(nothing)
    assert str(diagnose(x, labels)).endswith(_advice.YOURS)


@once
@pytest.mark.parametrize(
    ("threshold", "place", "below", "above"),
    [
        ("SHARE", "gradient_shares by_kind 'cross entropy' -1", "does not ask", "more than 50 %"),
        ("HARD_SHARE", "gradient_shares by_kind focal 1", "Up to 10 %", "Above 10 %"),
        ("PRECISION", "ranking average_precision", "below 0.5", "0.5 or more"),
        ("WRONG_ORDER", "sorting violations", "at most 30 %", "more than 30 %"),
        ("CALIBRATION", "calibration error", "at most 0.1", "more than 0.1"),
        ("FLOODED", "summary mean_p_of_negatives", "", "floods"),
    ],
)
def test_advice_turns_at_its_threshold(threshold, place, below, above):
    value = getattr(_advice, threshold)
    said = []
    for moved in (value - 0.01, value + 0.01):
        x, labels, quality = trained()
        figures = diagnose(x, (labels, quality)).figures
        *path, last = shlex.split(place)
        at = figures
        for key in path:
            at = at[key]
        at[list(at)[int(last)] if last.lstrip("-").isdigit() else last] = moved
        said.append(" ".join(Report(figures).advice()))
        # the figure stands beside the threshold
        in_percent = threshold in ("SHARE", "HARD_SHARE", "WRONG_ORDER")
        number = _advice.percent(moved) if in_percent else f"{moved:.3g}"
        assert number in said[-1] or (threshold == "FLOODED" and moved < value)
    low, high = said
    assert below in low and above in high and above not in low


@once
def test_the_guide_states_the_thresholds():
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "diagnosis.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (?:above|below) ([\d.]+)( %)? \|", guide, re.MULTILINE)
    stated = [float(number) / (100 if percent else 1) for number, percent in rows]
    assert stated == [
        _advice.FEW, _advice.APART, _advice.FLOODED, _advice.SHARE, _advice.SHARE,
        _advice.HARD_SHARE, _advice.PRECISION, _advice.WRONG_ORDER, _advice.CALIBRATION,
    ]  # fmt: skip
