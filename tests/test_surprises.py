"""Inputs that users did pass, and once got a wrong number, or a failure, for."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE

import tritonloss as tl
from tritonloss._dispatch import HAS_TRITON, INTERPRET
from tritonloss.losses.boxes import KINDS

ROWS = 3
INTEGERS = (
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64,
)  # fmt: skip
LABELLED = {
    "focal": lambda x, y: tl.sigmoid_focal_loss(x, y),
    "focal star": lambda x, y: tl.focal_star_loss(x, y),
    "quality": lambda x, y: tl.quality_focal_loss(x, (y, torch.full(y.shape, 0.5))),
    "varifocal": lambda x, y: tl.varifocal_loss(x, (y, torch.full(y.shape, 0.5))),
    "softmax": lambda x, y: tl.softmax_focal_loss(x, y),
    "ghm": lambda x, y: tl.ghm_c_loss(x, y),
    "rank & sort": lambda x, y: sum(tl.rank_sort_loss(x, y)),
    "ap": lambda x, y: tl.ap_loss(x, y),
    "alrp": lambda x, y: sum(tl.alrp_loss(x, y, torch.full(y.shape, 0.5))),
    "carl": lambda x, y: tl.carl_loss(x, y, torch.ones(y.shape)),
}
BOX_LOSSES = [getattr(tl, f"{kind}_loss") for kind in KINDS]
MODULES = [
    value for value in vars(tl).values()
    if isinstance(value, type) and issubclass(value, tl.modules._Loss)
]  # fmt: skip


@pytest.mark.parametrize("classes", [100, 127, 128, 200, 255, 256, 300, 1203])
@pytest.mark.parametrize("loss", LABELLED)
def test_labels_of_every_integer_dtype_mean_the_same(loss, classes, backend, on_device):
    x = torch.randn(ROWS, classes)
    labels = torch.tensor([3, 99, 7])
    expected = LABELLED[loss](x, labels)
    assert expected > 0
    for dtype in INTEGERS:
        assert LABELLED[loss](x, labels.to(dtype)) == expected, dtype


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on the CPU")
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_quality_is_checked_for_labels_of_every_dtype(dtype):
    targets = torch.tensor([3, 7], dtype=dtype), torch.tensor([0.5, 1.5])
    with pytest.raises(ValueError, match="quality must lie in"):
        tl.quality_focal_loss(torch.zeros(2, 300), targets)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16], ids=str)
def test_lists_of_every_integer_dtype(dtype, backend, on_device):
    x, labels = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    group = torch.tensor([[0], [1], [0], [1]])
    expected = tl.ap_loss(x, labels, group=group, num_groups=200)
    assert tl.ap_loss(x, labels, group=group.to(dtype), num_groups=200) == expected


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_default_dtype_does_not_round_scalars(default, backend, on_device):
    x, labels = torch.randn(4, 5), torch.tensor([0, 5, 2, 5])
    alpha, divisor = torch.tensor(0.3), torch.tensor(70001.0)
    expected = tl.sigmoid_focal_loss(x, labels, alpha=alpha, gamma=1.7, avg_factor=divisor)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        loss = tl.sigmoid_focal_loss(x, labels, alpha=alpha, gamma=1.7, avg_factor=divisor)
    finally:
        torch.set_default_dtype(before)
    assert loss == expected


@pytest.mark.parametrize("rows", [4, 30_000])
def test_float64_divisor_keeps_the_dtype(rows, backend, on_device):
    labels = torch.zeros(rows, dtype=torch.long)
    divisor = torch.tensor(2.0, dtype=torch.float64)
    logits, boxes = torch.zeros(rows, 4), torch.rand(rows, 4).cumsum(-1)
    for loss in (
        tl.sigmoid_focal_loss(logits, labels, avg_factor=divisor),
        tl.softmax_focal_loss(logits, labels, avg_factor=divisor),
        tl.distribution_focal_loss(logits, labels.float(), avg_factor=divisor),
        tl.iou_loss(boxes, boxes.flip(0).sort(-1).values, avg_factor=divisor),
        tl.carl_loss(logits, labels, torch.ones(rows), avg_factor=divisor),
    ):
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", BOX_LOSSES, ids=lambda f: f.__name__)
def test_flat_boxes_on_one_line_have_a_bounded_gradient(loss, dtype, backend, on_device):
    flat = [[0.0, 0, 10, 0], [0, 0, 0, 10], [3, 3, 3, 3], [0, 0, 10, 0], [1, 1, 1, 1]]
    other = [[2.0, 0, 8, 0], [0, 2, 0, 8], [3, 3, 3, 3], [20, 0, 30, 0], [1, 1, 5, 1]]
    pred = torch.tensor(flat, dtype=dtype, requires_grad=True)
    value = loss(pred, torch.tensor(other, dtype=dtype), reduction="sum")
    (gradient,) = torch.autograd.grad(value, pred)
    assert value.isfinite()
    assert gradient.abs().max() <= 10


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on the CPU")
@pytest.mark.parametrize("loss", BOX_LOSSES, ids=lambda f: f.__name__)
def test_targets_that_are_no_corners(loss):
    pred, target = (
        torch.tensor([[0.0, 0, 4, 4]] * 2),
        torch.tensor([[0.0, 0, 4, 4], [10, 10, 4, 4]]),
    )
    with pytest.raises(ValueError, match="target must be boxes x1, y1, x2, y2"):
        loss(pred, target)
    assert loss(pred, target, weight=torch.tensor([True, False])) == 0


def test_masks_and_counts_are_weights(backend, on_device):
    x, labels, mask = torch.randn(4, 3), torch.tensor([0, 3, 1, 3]), torch.tensor([1, 0, 1, 0])
    expected = tl.sigmoid_focal_loss(x, labels, weight=mask.float())
    for weight in (mask, mask.bool(), mask.to(torch.uint8)):
        assert tl.sigmoid_focal_loss(x, labels, weight=weight) == expected
        assert tl.softmax_focal_loss(x, labels % 3, weight=weight).isfinite()


def test_weights_of_rows_may_have_a_column(backend, on_device):
    x, weight = torch.randn(2, 5, 3), torch.rand(2, 5) - 0.2
    labels = torch.randint(0, 4, (2, 5))
    boxes = torch.rand(2, 2, 5, 4).sort(-1).values
    calls = [
        lambda w: tl.sigmoid_focal_loss(x, labels, weight=w, reduction="none"),
        lambda w: tl.quality_focal_loss(x, (labels, weight * 0 + 0.5), weight=w),
        lambda w: tl.distribution_focal_loss(x, labels * 0.5, weight=w),
        lambda w: tl.distribution_distillation_loss(x, x * 2, weight=w),
        lambda w: tl.softmax_focal_loss(x, labels.clamp(max=2), weight=w),
        lambda w: tl.giou_loss(*boxes, weight=w, reduction="sum"),
        lambda w: tl.ghm_c_loss(x, labels, weight=w),
        lambda w: sum(tl.rank_sort_loss(x, (labels, weight * 0 + 0.5), weight=w)),
    ]
    for call in calls:
        torch.testing.assert_close(call(weight.unsqueeze(-1)), call(weight))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64], ids=str)
def test_one_hot_targets(dtype, backend, on_device):
    x, hot = torch.randn(4, 3), torch.eye(4, 3)
    for loss in (tl.sigmoid_focal_loss, tl.quality_focal_loss, tl.varifocal_loss, tl.ghm_c_loss):
        assert loss(x, hot.to(dtype)) == loss(x, hot)


class Named(torch.Tensor):
    """A plain subclass: it holds values as a tensor does."""


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on the CPU")
@pytest.mark.parametrize("loss", LABELLED)
def test_subclassed_logits_are_checked(loss):
    with pytest.raises(ValueError, match="got 77"):
        LABELLED[loss](torch.zeros(2, 4).as_subclass(Named), torch.tensor([1, 77]))


def test_blocks_of_two_threads_leave_the_process_as_it_was():
    before = tl.show_config()
    entered, left = threading.Event(), threading.Event()

    def outer():
        with tl.backend("eager"):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=outer)
    thread.start()
    entered.wait(10)
    with tl.backend("auto"):
        left.set()
        thread.join()
        assert "auto ->" in tl.show_config()
    assert tl.show_config() == before


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


SHARED = [m for m in MODULES if "process_group" in m.__signature__.parameters] + [tl.SetCriterion]


@pytest.mark.parametrize("module", SHARED, ids=lambda m: m.__name__)
def test_modules_with_a_process_group_can_be_copied_and_saved(module, group):
    loss = module(process_group=group)
    assert copy.deepcopy(loss).process_group is group
    torch.optim.swa_utils.AveragedModel(torch.nn.Sequential(loss))
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).process_group is group
    dist.destroy_process_group()
    file.seek(0)
    orphan = torch.load(file, weights_only=False)
    inputs = torch.zeros(2, 3), torch.tensor([1, 2])
    if module is tl.SetCriterion:
        inputs = (
            torch.zeros(1, 1, 2, 3),
            torch.rand(1, 1, 2, 4),
            inputs[1][None],
            torch.rand(1, 2, 4),
        )
    with pytest.raises(RuntimeError, match=r"process_group .* does not exist in this process"):
        orphan(*inputs)


def test_a_step_without_positives_is_that_of_one_process(group):
    none = torch.zeros((), dtype=torch.long)
    assert tl.reduce_avg_factor(none, group, gradients_averaged=True) == 1 / group.size()


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules_take_arguments_by_name(module):
    with pytest.raises(TypeError, match=f"{module.__name__} takes its arguments by name"):
        module(0.25)


def test_reduction_of_one_call():
    loss, x, y = tl.FocalLoss(), torch.zeros(2, 3), torch.tensor([1, 3])
    assert loss(x, y, reduction="none").shape == (2, 3)
    assert loss(x, y).shape == ()


NUMBERED = {
    "focal": lambda x, y, n: tl.sigmoid_focal_loss(x, y, gamma=n, alpha=n / 4),
    "divided": lambda x, y, n: tl.sigmoid_focal_loss(x, y, avg_factor=n),
    "softmax": lambda x, y, n: tl.softmax_focal_loss(x, y % 3, gamma=n, avg_factor=n),
    "quality": lambda x, y, n: tl.quality_focal_loss(x, (y, x.detach()[:, 0].sigmoid()), beta=n),
    "dfl": lambda x, y, n: tl.distribution_focal_loss(x, y / 2, avg_factor=n),
    "boxes": lambda x, y, n: tl.ciou_loss(
        x[:, [0, 1, 2, 0]], x.detach().abs()[:, [0, 1, 2, 0]].cumsum(-1), eps=n, avg_factor=n
    ),
    "rank & sort": lambda x, y, n: sum(tl.rank_sort_loss(x, y, delta=n)),
    "carl": lambda x, y, n: tl.carl_loss(x, y, x[:, 0] ** 2, k=n, bias=n / 4, avg_factor=n),
    "ghm": lambda x, y, n: tl.ghm_c_loss(
        x, y, momentum=n / 4, state=(torch.ones(10, device=DEVICE), torch.ones(10, device=DEVICE))
    )[0],
    "general": lambda x, y, n: tl.generalized_focal_loss(
        x[:, 0], x[:, 1], 0.5 * y, 0 * n, n, beta=n / 4, avg_factor=n
    ),
    "matching": lambda x, y, n: tl.matching_cost(
        x[None], 0.5 + x.detach()[None, :, [0, 1, 2, 0]].sigmoid(), y[None] % 3,
        torch.ones(1, 6, 4, device=DEVICE), weights=(n, 1.0, n), alpha=n / 4, nonfinite_cost=n,
    ).sum() + x.sum(),
}  # fmt: skip


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64])
@pytest.mark.parametrize("loss", NUMBERED)
def test_numpy_numbers_are_numbers_in_a_graph_too(loss, kind, backend):
    torch._dynamo.reset()
    number = kind(2)
    x = torch.randn(6, 3, device=DEVICE, requires_grad=True)
    y = torch.tensor([0, 3, 1, 2, 3, 3], device=DEVICE)

    def call(x, y):
        return NUMBERED[loss](x, y, number)

    values = [call(x, y), torch.compile(call, backend="aot_eager", fullgraph=True)(x, y)]
    torch.testing.assert_close(values[1], NUMBERED[loss](x, y, number.item()))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in values))


def test_numpy_numbers_of_a_criterion():
    """Its settings are numbers of Python once it is built, for a graph and for a file."""
    numbers = np.array([2.0, 5.0, 0.5])
    settings = {
        "loss_weights": tuple(numbers),
        "cost_weights": list(numbers),
        "cost_alpha": numbers[2],
        "layer_weights": tuple(numbers[:1]),
        "class_params": {"gamma": numbers[0]},
    }
    x, boxes = torch.randn(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    objects = torch.zeros(2, 2).long(), torch.rand(2, 2, 4)
    indices, n = torch.tensor([[[0, 2], [1, -1]]]), np.float32(3)
    totals = []
    for compiled in (False, True):
        criterion = tl.SetCriterion(**settings)
        assert all(type(v) is float for v in (*criterion.loss_weights, criterion.cost_alpha))
        criterion = torch.compile(criterion, backend="aot_eager") if compiled else criterion
        totals.append(criterion(x, boxes, *objects, indices=indices, num_boxes=n)["total"])
    torch.testing.assert_close(*totals)


# Called with rows that a mask chose: logits, boxes, labels, a number in [0, 1]
ROWS_OF_A_MASK = {
    **{name: lambda x, b, y, q, f=f: f(x, y) for name, f in LABELLED.items()},
    **{f.__name__: lambda x, b, y, q, f=f: f(b, 0.9 * b.detach()) for f in BOX_LOSSES},
    "ghm-r": lambda x, b, y, q: tl.ghm_r_loss(b, 0.9 * b.detach()),
    "dfl": lambda x, b, y, q: tl.distribution_focal_loss(x, 3 * q),
    "distillation": lambda x, b, y, q: tl.distribution_distillation_loss(x, x.detach().flip(-1)),
    "softmax carl": lambda x, b, y, q: tl.carl_loss(x, y, q, activation="softmax"),
    "isr-p": lambda x, b, y, q: (tl.isr_p_weight(x.sum(-1), q, y, y) * x.sum(-1)).sum(),
    "hlr": lambda x, b, y, q: (tl.iou_hlr(q, y, y) * x.sum(-1)).sum(),
}


@pytest.mark.skipif(INTERPRET, reason="says the same in the plain run")
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("loss", ROWS_OF_A_MASK)
def test_rows_of_a_mask_in_one_graph(loss, kernels, monkeypatch):
    # as on a GPU, where the kernels would be traced
    monkeypatch.setattr("tritonloss._dispatch._FORCE_ON_CPU", kernels and HAS_TRITON)
    torch._dynamo.reset()
    x, y, q = torch.randn(12, 5), torch.randint(5, (12,)), torch.rand(12)
    b = torch.rand(12, 4).cumsum(-1)

    def call(x, b, kept):
        return ROWS_OF_A_MASK[loss](x[kept], b[kept], y[kept], q[kept])

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for kept in (q > 0.4, q > 2):
        inputs = x.clone().requires_grad_(), b.clone().requires_grad_()
        value = compiled(*inputs, kept)
        found = value, *torch.autograd.grad(value, inputs, allow_unused=True)
        monkeypatch.setattr("tritonloss._dispatch._FORCE_ON_CPU", False)
        value = call(*inputs, kept)
        expected = value, *torch.autograd.grad(value, inputs, allow_unused=True)
        monkeypatch.setattr("tritonloss._dispatch._FORCE_ON_CPU", kernels and HAS_TRITON)
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("loss", [tl.rank_sort_loss, tl.alrp_loss], ids=lambda f: f.__name__)
def test_backward_of_two_parts_says_to_add_them(loss, backend):
    x = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    y = torch.tensor([0, 3, 1, 3], device=DEVICE)
    error = () if loss is tl.rank_sort_loss else (torch.rand(4, device=DEVICE),)
    with pytest.raises(TypeError, match=r"two parts, \w+ and \w+: call sum\(loss\).backward\(\)"):
        loss(x, y, *error).backward()


def test_a_diagnosis_is_read_whatever_the_default_device():
    diagnosis = tl.Diagnosis()
    diagnosis.update(torch.randn(9, 3), torch.tensor([0, 3, 1] * 3))
    expected = repr(diagnosis.read().figures)
    with torch.device("meta"):
        assert repr(diagnosis.read().figures) == expected


# No sums of Rank & Sort: a tuple is written too
EXPORTED = {
    **ROWS_OF_A_MASK,
    "rank & sort": lambda x, b, y, q: tl.rank_sort_loss(x, y),
    "alrp": lambda x, b, y, q: tl.alrp_loss(x, y, q),
}


@pytest.mark.skipif(INTERPRET, reason="says the same in the plain run")
@pytest.mark.parametrize("loss", EXPORTED)
def test_exports_take_any_number_of_rows(loss):
    class Step(torch.nn.Module):
        def forward(self, *inputs):
            return EXPORTED[loss](*inputs)

    def inputs(rows):
        boxes = torch.rand(rows, 4).cumsum(-1)
        return torch.randn(rows, 5), boxes, torch.randint(5, (rows,)), torch.rand(rows)

    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(Step(), inputs(6), dynamic_shapes={"inputs": 4 * ({0: rows},)})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    later = inputs(12)
    torch.testing.assert_close(torch.export.load(file).module()(*later), Step()(*later))


IN_FLOAT64 = {
    "rank & sort": lambda x, y: tl.rank_sort_loss(x, y),
    "ap": lambda x, y: tl.ap_loss(x, y),
    "alrp": lambda x, y: tl.alrp_loss(x, y, torch.full(y.shape, 0.5)),
    "momentum": lambda x, y: tl.ghm_c_loss(
        x, y, momentum=torch.tensor(0.75), state=(torch.zeros(10), torch.zeros(10))
    ),
    "class balanced": lambda x, y: tl.class_balanced_weight(y),
}


@pytest.mark.parametrize("loss", IN_FLOAT64)
def test_a_device_without_float64_is_named(loss, monkeypatch):
    x, y = torch.randn(4, 3), torch.tensor([0, 3, 1, 2])
    monkeypatch.setattr("tritonloss._checks.WITHOUT_FLOAT64", {"cpu"})
    with pytest.raises(TypeError, match="counts in float64, which cpu lacks"):
        IN_FLOAT64[loss](x, y)


# The input that changes comes second.
IN_PLACE = {
    **{name: lambda x, y, b, n, f=f: f(x, y) for name, f in LABELLED.items() if name != "carl"},
    **{f.__name__: lambda x, b, y, n, f=f: f(x[:, :4], b) for f in BOX_LOSSES},
    "dfl": lambda x, b, y, n: tl.distribution_focal_loss(x, b[:, 0]),
    "divided": lambda x, n, y, b: tl.sigmoid_focal_loss(x, y, avg_factor=n),
    "divided boxes": lambda x, n, y, b: tl.giou_loss(x[:, :4], b, avg_factor=n),
}


@pytest.mark.parametrize("rows", [4, 30_000])
@pytest.mark.parametrize("loss", IN_PLACE)
def test_inputs_changed_in_place_before_the_backward_are_noticed(loss, rows, backend):
    if rows > 4 and (INTERPRET or loss in ("rank & sort", "ap", "alrp")):
        pytest.skip("as few rows are as good")
    x = torch.randn(rows, 5, device=DEVICE, requires_grad=True)
    b = torch.rand(rows, 4, device=DEVICE).cumsum(-1)
    y, n = torch.randint(4, (rows,), device=DEVICE), torch.tensor(3.0, device=DEVICE)
    first = y if loss in LABELLED else n if loss.startswith("divided") else b
    value = IN_PLACE[loss](x, first, *(t for t in (y, b, n) if t is not first))
    torch.autograd.grad(value, x, retain_graph=True)
    first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, x)


def of_queries(x, y):
    """Matching takes images, queries and objects."""
    boxes = torch.rand(1, len(x), 4)
    return tl.matching_cost(x[None], boxes, y[None], boxes)


SCORED = {
    **LABELLED,
    "matching": of_queries,
    "mal": lambda x, y: tl.mal_loss(x, (y, torch.full(y.shape, 0.5))),
    "diagnosis": lambda x, y: tl.Diagnosis().update(x, y),
    "dfl": lambda x, y: tl.distribution_focal_loss(x, torch.full(y.shape, 0.5)),
    "expectation": lambda x, y: tl.distribution_expectation(x),
}


def told(monkeypatch, function, *args) -> list[str]:
    """Warnings of one call of a process that has warned of nothing yet, and where they point."""
    monkeypatch.setattr("tritonloss._checks._looks_left", 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
        function(*args)
    return [f"{w.filename}: {w.message}" for w in caught if "probabilities" in str(w.message)]


@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on the CPU")
@pytest.mark.parametrize("loss", SCORED)
def test_probabilities_in_place_of_logits_are_told_once(loss, monkeypatch):
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    for scores in (x.sigmoid(), x.softmax(-1).half(), x.sigmoid().t().contiguous().t()):
        if loss in ("mal", "matching"):  # quality and boxes are float32 beside
            scores = scores.float()
        (warning,) = told(monkeypatch, SCORED[loss], scores, y)
        assert warning.startswith(__file__) and "all logits lie between 0 and 1" in warning
    for logits in (x, x.abs() + 0.5, torch.zeros(6, 5), x.sigmoid()[:1], x[:0]):
        assert not told(monkeypatch, SCORED[loss], logits, y[: len(logits)])


@pytest.mark.skipif(INTERPRET, reason="says the same in the plain run")
@pytest.mark.parametrize("loss", LABELLED)
def test_a_graph_looks_at_no_logit(loss, monkeypatch):
    torch._dynamo.reset()
    x, y = torch.rand(6, 5, device=DEVICE), torch.randint(5, (6,), device=DEVICE)
    compiled = torch.compile(LABELLED[loss], backend="aot_eager", fullgraph=True)
    assert not told(monkeypatch, compiled, x, y)
    # nor is it guarded by how often others looked
    LABELLED[loss](torch.randn(6, 5, device=DEVICE), y)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x, y)


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on the CPU")
@pytest.mark.parametrize("loss", LABELLED)
def test_a_label_beyond_int64_is_no_ignored_one(loss):
    labels = torch.from_numpy(np.array([1, 2**64 - 1], np.uint64))
    with pytest.raises(ValueError, match=r"must be below 2\*\*63; got 18446744073709551615"):
        LABELLED[loss](torch.zeros(2, 4), labels)


FUNCTIONS = {
    name: getattr(tl.functional, name)
    for name in tl.functional.__all__
    if not isinstance(getattr(tl.functional, name), type)
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_has_to_be_named(name):
    """As torchvision's functions take it: loss(x, y, 0.25, 2, "mean")."""
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    first = [p for p in parameters.values() if p.kind != p.KEYWORD_ONLY]
    reduced = "reduction" in parameters
    hint = r", such as reduction='sum'; got 'sum'" if reduced else "; got 'sum'"
    with pytest.raises(TypeError, match=f"{name} takes {first[0].name}.*{hint} without one"):
        function(*[None] * len(first), "sum")
    with pytest.raises(TypeError, match="all else by name; got a tensor without one"):
        function(*[None] * len(first), torch.zeros(2))
    if reduced:
        with pytest.raises(TypeError, match="got 'sum' without one"):
            function(*[None] * len(first), "sum", reduction="mean")
    else:
        with pytest.raises(TypeError, match=f"{name} takes no reduction.*; got 'sum'"):
            function(*[None] * len(first), reduction="sum")
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_what_has_to_be_named_in_a_call_of_a_module(module):
    loss, positional = module(), inspect.signature(module.function).parameters.values()
    first = [None for p in positional if p.kind != p.KEYWORD_ONLY]
    with pytest.raises(TypeError, match=r"all else by name.*; got 'sum' without one"):
        loss(*first, "sum")
    if "reduction" in module.__signature__.parameters:
        assert "reduction" in module(reduction="sum").extra_repr()
    else:
        with pytest.raises(TypeError, match="got reduction"):
            module(reduction="sum")


def test_a_reduction_given_twice_is_that_of_the_call():
    loss, x, y = tl.FocalLoss(reduction="sum"), torch.randn(2, 3), torch.tensor([1, 3])
    torch.testing.assert_close(loss(x, y, reduction="none").sum(), loss(x, y))


NEED_VALUES = {"rank & sort", "ap", "alrp"}  # they sort
# Nothing is made in them, on whatever device
OF_INPUTS = {
    **ROWS_OF_A_MASK,
    "quality": lambda x, b, y, q: tl.quality_focal_loss(x, (y, q)),
    "varifocal": lambda x, b, y, q: tl.varifocal_loss(x, (y, q)),
    "alrp": lambda x, b, y, q: sum(tl.alrp_loss(x, y, q)),
    "carl": lambda x, b, y, q: tl.carl_loss(x, y, q),
}


@pytest.mark.skipif(INTERPRET or DEVICE != "cpu", reason="says the same in the plain run")
@pytest.mark.parametrize("loss", OF_INPUTS)
def test_tensors_without_values_have_a_shape(loss):
    inputs = torch.randn(6, 5), torch.rand(6, 4), torch.randint(5, (6,)), torch.rand(6)
    inputs = [t.to("meta") for t in inputs]
    if loss in NEED_VALUES:
        with pytest.raises(ValueError, match=r"logits must hold values, .*; got one on meta"):
            OF_INPUTS[loss](*inputs)
        return
    value = OF_INPUTS[loss](*(t.requires_grad_(t.dim() > 1) for t in inputs))
    assert value.is_meta and value.shape == () and value.dtype == torch.float32
    value.backward()
    with pytest.raises(ValueError, match="cost must hold values"):
        tl.assign(torch.rand(1, 3, 2, device="meta"))


def of_images(x, b, y, q, **options):
    """Set prediction: an image, its queries at b, and an object for each."""
    criterion = tl.SetCriterion(**options)
    return criterion(x[None, None], b[None, None], y[None], b[None] * 0.9)["total"]


ANYWHERE = {
    **OF_INPUTS,
    "expectation": lambda x, b, y, q: tl.distribution_expectation(x).sum(),
    "iou": lambda x, b, y, q: tl.iou(b, 0.9 * b).sum(),
    "sides": lambda x, b, y, q: tl.distribution_focal_loss(x.repeat(1, 4), b, sides=4),
    "expected sides": lambda x, b, y, q: (
        tl.distribution_expectation(x.repeat(1, 4), sides=4) * b
    ).sum(),
    "mal": lambda x, b, y, q: tl.mal_loss(x, (y, q)),
    "general": lambda x, b, y, q: tl.generalized_focal_loss(x[:, 0], x[:, 1], q, 0, 1, beta=2),
    "lists": lambda x, b, y, q: tl.ap_loss(x, y, group=y[:, None], num_groups=5),
    "matching": lambda x, b, y, q: tl.matching_cost(x[None], b[None], y[None], b[None]).sum(),
}
BY_HAND = {  # assignment is SciPy's, which no graph holds
    "criterion": of_images,
    "softmax criterion": lambda *t: of_images(*t, class_loss="softmax"),
    "lists of objects": lambda x, b, y, q: tl.SetCriterion()(
        x[None, None], b[None, None], [y], [b]
    )["total"],
    "class balanced": lambda x, b, y, q: tl.class_balanced_weight(y + 1).sum(),
}


def at_random():
    x = torch.randn(6, 5, requires_grad=True)
    return x, torch.rand(6, 4).cumsum(-1), torch.randint(4, (6,)), torch.rand(6)


def value_and_gradient(function, x, *inputs):
    value = function(x, *inputs)
    return value, *(torch.autograd.grad(value, x, allow_unused=True) if value.grad_fn else ())


@pytest.mark.skipif(DEVICE != "cpu", reason="the tensors are on the CPU, whatever the default")
@pytest.mark.parametrize("loss", {**ANYWHERE, **BY_HAND})
def test_the_default_device_is_nobodys(loss, backend):
    inputs, function = at_random(), (ANYWHERE | BY_HAND)[loss]
    expected = value_and_gradient(function, *inputs)
    torch.set_default_device("meta")
    try:
        found = value_and_gradient(function, *inputs)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("module", SHARED, ids=lambda m: m.__name__)
def test_the_default_device_is_no_groups(module, group):
    loss, (x, b, y, q) = module(process_group=group), at_random()
    inputs = {"GHMRLoss": (b.clone().requires_grad_(), 0.9 * b), "ALRPLoss": (x, y, q)}
    inputs = inputs.get(module.__name__, (x, y))
    if module is tl.SetCriterion:
        inputs = x[None, None], b[None, None], y[None], b[None]

    def call(*inputs):
        result = loss(*inputs)
        return result["total"] if isinstance(result, dict) else sum(result) if isinstance(
            result, tuple) else result  # fmt: skip

    expected = value_and_gradient(call, *inputs)
    torch.set_default_device("meta")
    try:
        found = value_and_gradient(call, *inputs)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(INTERPRET, reason="says the same in the plain run")
@pytest.mark.parametrize("default", [torch.float16, "meta"], ids=str)
@pytest.mark.parametrize("loss", ANYWHERE)
def test_a_graph_made_under_another_default(loss, default):
    torch._dynamo.reset()
    inputs, function = at_random(), ANYWHERE[loss]
    expected = value_and_gradient(function, *inputs)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    before = torch.get_default_dtype()
    torch.set_default_device(default if default == "meta" else None)
    torch.set_default_dtype(before if default == "meta" else default)
    try:
        found = value_and_gradient(compiled, *inputs)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, expected)
