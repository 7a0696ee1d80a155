"""Matching cost and assignment: loops in plain Python, hard inputs, brute force, compiled."""

from __future__ import annotations

import itertools
import math
import sys
import types

import pytest
import torch
from conftest import DEVICE
from test_opcheck import recorded_ops
from test_sync import NoReads

import tritonloss as tl
from tritonloss._dispatch import INTERPRET
from tritonloss.losses import matching

KINDS = ["focal", "bce", "softmax", "iou_aware"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def draw(seed, lead, images, queries, objects, classes, dtype=torch.float32):
    """Random logits, boxes and objects; of the images one is full and one is empty."""
    g = torch.Generator().manual_seed(seed)

    def boxes(*shape):
        return torch.cat(
            [torch.rand(*shape, 2, generator=g), torch.rand(*shape, 2, generator=g) / 2], -1
        )

    logits = torch.randn(*lead, images, queries, classes, generator=g) * 3
    labels = torch.randint(0, classes, (images, objects), generator=g)
    sizes = torch.randint(0, objects + 1, (images,), generator=g)
    sizes[0] = objects
    sizes[-1] = 0 if images > 1 else objects
    pred = boxes(*lead, images, queries)
    targets = boxes(images, objects)
    made = logits.to(dtype), pred.to(dtype), labels, targets, sizes
    return tuple(t.to(DEVICE) for t in made)


def giou_of(p, t):
    """IoU and GIoU of two boxes x1, y1, x2, y2."""

    def area(x1, y1, x2, y2):
        return max(x2 - x1, 0) * max(y2 - y1, 0)

    inter = area(max(p[0], t[0]), max(p[1], t[1]), min(p[2], t[2]), min(p[3], t[3]))
    hull = area(min(p[0], t[0]), min(p[1], t[1]), max(p[2], t[2]), max(p[3], t[3]))
    union = area(*p) + area(*t) - inter
    return inter / union, inter / union - (hull - union) / hull


def corners_of(box, box_format):
    if box_format == "xyxy":
        return box
    x, y, w, h = box
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def written_out(logits, box, label, target, kind, weights, alpha, gamma, box_format):
    """The cost of one query and one object."""
    p = 1 / (1 + math.exp(-logits[label]))
    iou, giou = giou_of(corners_of(box, box_format), corners_of(target, box_format))
    named = {
        "focal": (1 - alpha) * p**gamma * math.log(1 - p + 1e-8)
        - alpha * (1 - p) ** gamma * math.log(p + 1e-8),
        "bce": math.log(1 - p) - math.log(p),
        "softmax": -math.exp(logits[label]) / sum(math.exp(v) for v in logits),
        "iou_aware": -(p**alpha) * iou ** (1 - alpha),
    }[kind]
    l1 = sum(abs(a - b) for a, b in zip(box, target, strict=True))
    return weights[0] * named + weights[1] * l1 - weights[2] * giou


@each_kind
@pytest.mark.parametrize("box_format", ["cxcywh", "xyxy"])
@pytest.mark.parametrize("options", [{}, {"weights": (1.0, 0.5, 3.0), "alpha": 0.6, "gamma": 1.5}])
def test_written_out(kind, box_format, options, backend):
    logits, boxes, labels, targets, sizes = draw(1, (2,), 3, 5, 4, 6)
    if box_format == "xyxy":
        boxes[..., 2:] += boxes[..., :2]
        targets[..., 2:] += targets[..., :2]
    cost = tl.matching_cost(
        logits, boxes, labels, targets, sizes, class_cost=kind, box_format=box_format, **options
    )
    options = {"weights": (2.0, 5.0, 2.0), "alpha": 0.25, "gamma": 2.0} | options
    expected = torch.full((2, 3, 5, 4), math.inf)
    x, b, t = logits.double().tolist(), boxes.double().tolist(), targets.double().tolist()
    for layer, image, q in itertools.product(range(2), range(3), range(5)):
        for k in range(sizes[image]):
            expected[layer, image, q, k] = written_out(
                x[layer][image][q], b[layer][image][q], labels[image, k].item(), t[image][k], kind,
                options["weights"], options["alpha"], options["gamma"], box_format,
            )  # fmt: skip
    torch.testing.assert_close(cost.cpu(), expected, rtol=2e-6, atol=2e-6)


def close_to_float64(arguments, **options):
    logits, boxes, labels, targets, sizes = arguments
    cost = tl.matching_cost(*arguments, **options)
    with tl.backend("eager"):
        expected = tl.matching_cost(
            logits.double(), boxes.double(), labels, targets.double(), sizes, **options
        )
    assert cost.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(cost.double(), expected, rtol=3e-6, atol=3e-6)
    return cost


@each_kind
@pytest.mark.parametrize(
    ("lead", "images", "queries", "objects", "classes"),
    [
        ((), 1, 1, 1, 1),
        ((2,), 3, 33, 7, 80),
        ((2, 3), 2, 17, 5, 3),
        ((2, 1, 2), 2, 9, 2, 1),
        ((1,), 2, 40, 300, 80),
        ((2,), 2, 20, 3, 1203),
        ((), 4, 130, 33, 1),
    ],
)
def test_kernel_and_shapes(kind, lead, images, queries, objects, classes, backend):
    seed = queries * objects
    arguments = draw(seed, lead, images, queries, objects, classes)
    cost = close_to_float64(arguments, class_cost=kind)
    assert cost.shape == (*lead, images, queries, objects)
    unknown = torch.arange(objects, device=DEVICE) >= arguments[4].unsqueeze(1)
    assert cost.isposinf().equal(unknown.unsqueeze(1).expand_as(cost))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_float32(dtype, backend):
    close_to_float64(draw(5, (2,), 2, 20, 6, 9, dtype), class_cost="focal")


def test_strides(backend):
    logits, boxes, labels, targets, sizes = draw(6, (2,), 3, 12, 5, 4)
    expected = tl.matching_cost(logits, boxes, labels, targets, sizes)
    strided = logits.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert strided.equal(logits) and not strided.is_contiguous()
    sliced = boxes.repeat(1, 1, 2, 1)[:, :, :12]
    cost = tl.matching_cost(strided, sliced, labels.int(), targets, sizes.to(torch.uint8))
    torch.testing.assert_close(cost, expected, rtol=0, atol=0)
    groups = tl.matching_cost(
        logits.unflatten(2, (3, 4)).movedim(2, 1),
        boxes.unflatten(2, (3, 4)).movedim(2, 1),
        labels, targets, sizes,
    )  # fmt: skip
    by_group = expected.unflatten(2, (3, 4)).movedim(2, 1)
    torch.testing.assert_close(groups, by_group, rtol=0, atol=0)


def test_lists_are_the_padded_batch(backend):
    logits, boxes, labels, targets, sizes = draw(7, (2,), 3, 8, 4, 5)
    lists = [v[:n] for v, n in zip(labels, sizes, strict=True)]
    box_lists = [v[:n] for v, n in zip(targets, sizes, strict=True)]
    cost = tl.matching_cost(logits, boxes, lists, box_lists)
    assert cost.equal(tl.matching_cost(logits, boxes, labels, targets, sizes))


def test_what_stands_behind_the_objects_is_not_looked_at(backend):
    logits, boxes, labels, targets, sizes = draw(8, (2,), 4, 9, 6, 5)
    expected = tl.matching_cost(logits, boxes, labels, targets, sizes)
    unknown = torch.arange(6, device=DEVICE) >= sizes.unsqueeze(1)
    labels = labels.masked_fill(unknown, 2**40)
    targets = targets.masked_fill(unknown.unsqueeze(-1), math.nan)
    assert tl.matching_cost(logits, boxes, labels, targets, sizes).equal(expected)


@each_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entries_that_are_not_finite(kind, bad, backend):
    arguments = draw(9, (1,), 2, 10, 5, 3)
    logits, boxes, _labels, targets, _sizes = arguments
    logits[0, 0, 1] = bad
    boxes[0, 0, 2, 1] = bad
    targets[0, 3, 2] = bad
    cost = close_to_float64(arguments, class_cost=kind)
    # as the numbers are, NaN included, on both paths
    assert cost[0, 0].isfinite().all()
    assert (cost[0, 0, 2] == 1e8).all() and (cost[0, 0, :, 3] == 1e8).all()
    assert (cost[0, 0, 1, :3] == 1e8).all() or not math.isnan(bad)
    assert (close_to_float64(arguments, class_cost=kind, nonfinite_cost=50.0)[0, 0, 2] == 50).all()
    raw = tl.matching_cost(*arguments, class_cost=kind, nonfinite_cost=None)[0, 0]
    assert not raw[2].isfinite().any() and not raw[:, 3].isfinite().any()
    assert raw[4:, :3].isfinite().all()
    rest = tl.assign(cost, arguments[4])
    assert (rest[0, 0] >= 0).all() and rest[0, 0].unique().numel() == 5


def test_equal_boxes_and_boxes_of_size_0(backend):
    logits = torch.zeros(1, 2, 1, device=DEVICE)
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.0, 0.0]]], device=DEVICE)
    labels = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    cost = tl.matching_cost(logits, boxes, labels, boxes, weights=(0.0, 0.0, 1.0))
    torch.testing.assert_close(cost.cpu(), torch.tensor([[[-1.0, 0.0], [0.0, 0.0]]]))


@pytest.mark.parametrize(("queries", "objects", "images"), [(5, 0, 2), (0, 3, 2), (5, 3, 0)])
def test_nothing_to_match(queries, objects, images, backend):
    logits = torch.zeros(2, images, queries, 3, device=DEVICE)
    boxes = torch.zeros(2, images, queries, 4, device=DEVICE)
    labels = torch.zeros(images, objects, dtype=torch.int64, device=DEVICE)
    targets = torch.zeros(images, objects, 4, device=DEVICE)
    cost = tl.matching_cost(logits, boxes, labels, targets)
    assert cost.shape == (2, images, queries, objects)
    assert (tl.assign(cost) == -1).all() and tl.assign(cost).shape == (2, images, objects)


def test_hyper_parameters_as_tensors(backend):
    arguments = draw(10, (2,), 2, 6, 3, 4)
    numbers = {"weights": (1.0, 2.0, 3.0), "alpha": 0.4, "gamma": 1.5, "nonfinite_cost": 9.0}
    tensors = {
        "weights": tuple(torch.tensor(w, device=DEVICE) for w in numbers["weights"]),
        **{k: torch.tensor(v, device=DEVICE) for k, v in numbers.items() if k != "weights"},
    }
    expected = tl.matching_cost(*arguments, **numbers)
    torch.testing.assert_close(tl.matching_cost(*arguments, **tensors), expected)


def test_compiled_whole(backend):
    arguments = draw(11, (2,), 2, 6, 3, 4)
    compiled = torch.compile(tl.matching_cost, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), tl.matching_cost(*arguments))


@pytest.mark.skipif(not INTERPRET, reason="opcheck runs the op")
def test_opcheck(monkeypatch):
    arguments = draw(12, (2,), 2, 6, 3, 4)
    (op, args), = recorded_ops(monkeypatch, lambda: tl.matching_cost(*arguments))  # fmt: skip
    torch.library.opcheck(op, args)


def test_no_gradient(backend):
    logits, *rest = draw(13, (1,), 2, 6, 3, 4)
    assert not tl.matching_cost(logits.requires_grad_(), *rest).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"labels": torch.full((2, 3), 9)},
            ValueError,
            "labels of objects must lie in 0..3; got",
        ),
        ({"labels": torch.zeros(2, 3)}, TypeError, "labels must be an integer"),
        ({"labels": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, "labels must have shape"),
        ({"target_boxes": torch.zeros(2, 4, 4)}, ValueError, "target_boxes must have shape"),
        ({"sizes": torch.tensor([1, 4])}, ValueError, "sizes must lie in 0..3; got 4"),
        ({"boxes": torch.zeros(2, 6, 5)}, ValueError, "boxes must have shape"),
        ({"logits": torch.zeros(6, 4)}, ValueError, "logits must have shape"),
        ({"class_cost": "dice"}, ValueError, "class_cost must be one of focal"),
        ({"box_format": "xywh"}, ValueError, "box_format must be one of"),
        ({"weights": (1.0, 2.0)}, ValueError, "weights must be three numbers"),
        ({"gamma": -1.0}, ValueError, "gamma must be"),
        ({"alpha": 1.5}, ValueError, "alpha must be"),
    ],
)
def test_errors(change, error, says):
    names = ("logits", "boxes", "labels", "target_boxes", "sizes")
    drawn = (t.cpu() for t in draw(14, (), 2, 6, 3, 4))
    with pytest.raises(error, match=says):
        tl.matching_cost(**(dict(zip(names, drawn, strict=True)) | change))


def test_lists_that_do_not_fit():
    x, boxes = torch.zeros(2, 6, 4), torch.zeros(2, 6, 4)
    labels = [torch.tensor([1]), torch.tensor([2, 3])]
    with pytest.raises(ValueError, match="same objects"):
        tl.matching_cost(x, boxes, labels, [torch.zeros(1, 4), torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="same length"):
        tl.matching_cost(x, boxes, labels, [torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="sizes go with padded objects"):
        both = [torch.zeros(1, 4), torch.zeros(2, 4)]
        tl.matching_cost(x, boxes, labels, both, torch.tensor([1, 2]))


# ---- assignment


@pytest.mark.parametrize(("queries", "objects"), [(5, 3), (3, 5), (4, 4), (1, 1), (5, 0)])
def test_assignment_is_the_cheapest(queries, objects):
    cost = torch.randn(2, 3, queries, objects, dtype=torch.float64)
    sizes = torch.tensor([objects, objects // 2, 0])
    found = tl.assign(cost, sizes)
    assert found.shape == (2, 3, objects) and found.dtype == torch.int64
    for layer, image in itertools.product(range(2), range(3)):
        size = int(sizes[image])
        indices = found[layer, image]
        assert (indices[size:] == -1).all()
        pairs = [(int(q), t) for t, q in enumerate(indices[:size]) if q >= 0]
        assert len({q for q, _ in pairs}) == len(pairs) == min(queries, size)
        table = cost[layer, image].tolist()
        total = sum(table[q][t] for q, t in pairs)
        k = min(queries, size)
        best = min(
            sum(table[q][t] for q, t in zip(chosen, of, strict=True))
            for of in itertools.combinations(range(size), k)
            for chosen in itertools.permutations(range(queries), k)
        )
        assert total == pytest.approx(best, abs=1e-12)


def test_assignment_of_16_bit_costs():
    cost = torch.tensor([[[1.0, 0.0], [5.0, 4.5]]])
    assert tl.assign(cost.bfloat16()).tolist() == [[1, 0]]


def test_assignment_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install tritonloss\[detr\]"):
        tl.assign(torch.zeros(1, 2, 2))


def of_a_gpu(monkeypatch, seen):
    """A stand-in for torch-linear-assignment, and costs that count as those of a GPU.

    As the package's, the solver takes float32 (N, workers, tasks), of what is finite alone.
    """
    from scipy.optimize import linear_sum_assignment

    def batch_linear_assignment(cost):
        assert cost.dtype == torch.float32 and cost.is_contiguous() and cost.isfinite().all()
        seen.append(tuple(cost.shape))
        found = torch.full(cost.shape[:2], -1, device=cost.device)
        for i, table in enumerate(cost.cpu()):
            workers, tasks = linear_sum_assignment(table)
            found[i, torch.from_numpy(workers)] = torch.from_numpy(tasks).to(cost.device)
        return found

    package = types.SimpleNamespace(batch_linear_assignment=batch_linear_assignment)
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", package)
    inner = matching._device_solver
    gpu = types.SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(matching, "_device_solver", lambda cost: inner(gpu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_sizes", [True, False])
def test_assignment_on_the_device(monkeypatch, dtype, with_sizes):
    arguments = draw(20, (2, 2), 4, 7, 7, 3)
    cost = tl.matching_cost(*(arguments if with_sizes else arguments[:4])).to(dtype)
    sizes = arguments[4] if with_sizes else None
    host, seen = tl.assign(cost, sizes), []
    of_a_gpu(monkeypatch, seen)
    found = tl.assign(cost, sizes)
    assert seen == [(16, 7, 7)]
    assert found.dtype == torch.int64 and found.equal(host)


def test_assignment_on_the_device_waits_for_nothing(monkeypatch):
    cost, sizes = torch.randn(2, 3, 9, 4, device=DEVICE), torch.tensor([4, 1, 0], device=DEVICE)
    cost[0, 0, 0, 0], cost[0, 1, 2, 0], cost[1, 0, 5] = math.nan, -math.inf, math.inf
    monkeypatch.setattr(
        matching,
        "_device_solver",
        lambda _: lambda cost: cost.argmin(2),  # of the right shape
    )
    with NoReads():
        found = tl.assign(cost, sizes)
    assert found.shape == (2, 3, 4)
    assert ((found == -1) == (torch.arange(4, device=DEVICE) >= sizes[:, None])).all()


def test_more_objects_than_queries_are_assigned_on_the_host(monkeypatch):
    seen = []
    of_a_gpu(monkeypatch, seen)
    found = tl.assign(torch.randn(1, 2, 3), torch.tensor([2]))
    assert not seen and sorted(found[0].tolist()) == [-1, 0, 1]


def test_the_device_solver_is_taken_for_costs_of_a_gpu_where_it_is_installed(monkeypatch):
    gpu = types.SimpleNamespace(is_cuda=True)
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", None)
    assert matching._device_solver(gpu) is None
    package = types.SimpleNamespace(batch_linear_assignment=len)
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", package)
    assert matching._device_solver(gpu) is len
    assert matching._device_solver(torch.zeros(1)) is None


def test_assignment_errors():
    with pytest.raises(ValueError, match="cost must have shape"):
        tl.assign(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"sizes must lie in 0\.\.2; got \[3\]"):
        tl.assign(torch.zeros(1, 2, 2), torch.tensor([3]))
    with pytest.raises(ValueError, match="cost must be finite"):
        tl.assign(torch.full((1, 2, 2), math.nan))


def test_every_kind_is_tested():
    assert set(KINDS) == set(matching.CLASS_COSTS)
