"""Known answers, identities, stability and errors of the pointwise losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, generator, pointwise_problem, recorded
from conftest import DEVICE
from ptx.switch import PTX

import tritonloss as tl
from tritonloss.eager import _blocks, pointwise


def logits_and_labels(seed=0, rows=300, classes=7):
    g = generator(seed)
    x = torch.randn(rows, classes, generator=g) * 3
    labels = torch.randint(0, classes + 1, (rows,), generator=g)
    return x.to(DEVICE), labels.to(DEVICE)


def one_hot(labels, classes):
    return F.one_hot(labels.long().clamp(0, classes), classes + 1)[..., :classes].float()


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_focal_without_gamma_is_bce(backend):
    x, labels = logits_and_labels()
    loss = tl.sigmoid_focal_loss(x, labels, alpha=None, gamma=0.0, reduction="none")
    close(loss, F.binary_cross_entropy_with_logits(x, one_hot(labels, 7), reduction="none"), 2e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.0])
def test_focal_scales_cross_entropy_by_the_modulating_factor(backend, gamma):
    x, labels = logits_and_labels(1)
    focal = tl.sigmoid_focal_loss(x, labels, alpha=None, gamma=gamma, reduction="none")
    entropy = tl.sigmoid_focal_loss(x, labels, alpha=None, gamma=0, reduction="none")
    y = one_hot(labels, 7)
    p_t = torch.sigmoid(x) * y + torch.sigmoid(-x) * (1 - y)
    close(focal / entropy, (1 - p_t) ** gamma, 1e-4)


@pytest.mark.parametrize(("alpha", "killed"), [(0.0, 1.0), (1.0, 0.0)])
def test_alpha_at_its_ends_kills_one_side(backend, alpha, killed):
    x, labels = logits_and_labels(2)
    y = one_hot(labels, 7)
    for targets in (labels, y):
        x.requires_grad_()
        loss = tl.sigmoid_focal_loss(x, targets, alpha=alpha, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert not loss[y == killed].any() and not gradient[y == killed].any()
        assert loss[y != killed].all()


def test_focal_star_with_gamma_one_and_no_shift_is_bce(backend):
    x, labels = logits_and_labels(3)
    loss = tl.focal_star_loss(x, labels, gamma=1.0, beta=0.0, reduction="none")
    close(loss, F.binary_cross_entropy_with_logits(x, one_hot(labels, 7), reduction="none"), 2e-6)


def test_quality_one_is_focal_without_alpha(backend):
    x, labels = logits_and_labels(4)
    quality = torch.ones(labels.shape, device=DEVICE)
    qfl = tl.quality_focal_loss(x, (labels, quality), beta=2.0, reduction="none")
    close(qfl, tl.sigmoid_focal_loss(x, labels, alpha=None, gamma=2.0, reduction="none"))
    close(qfl, tl.quality_focal_loss(x, labels, reduction="none"))


def test_quality_reached_costs_nothing(backend):
    x = torch.randn(50, 1, generator=generator(5)).to(DEVICE).requires_grad_()
    quality = torch.sigmoid(x.detach()).squeeze(-1)
    labels = torch.zeros(50, dtype=torch.int64, device=DEVICE)
    loss = tl.quality_focal_loss(x, (labels, quality), beta=2.0, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss < 1e-10 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("function", [tl.quality_focal_loss, tl.varifocal_loss])
def test_pair_and_dense_targets_agree(backend, function):
    x, labels = logits_and_labels(6)
    quality = torch.rand(labels.shape, generator=generator(7)).clamp(min=0.05).to(DEVICE)
    dense = one_hot(labels, 7) * quality.unsqueeze(-1)
    close(function(x, (labels, quality), reduction="none"), function(x, dense, reduction="none"))


def test_varifocal_positive_of_quality_zero_weighs_nothing(backend):
    x = torch.tensor([[2.0, -1.0]], device=DEVICE)
    labels, quality = torch.tensor([0], device=DEVICE), torch.tensor([0.0], device=DEVICE)
    pair = tl.varifocal_loss(x, (labels, quality), reduction="none")
    dense = tl.varifocal_loss(x, torch.zeros(1, 2, device=DEVICE), reduction="none")
    assert pair[0, 0] == 0 and dense[0, 0] > 0 and pair[0, 1] == dense[0, 1]


def test_varifocal_detached_weight_has_the_same_value_and_another_gradient(backend):
    x, labels = logits_and_labels(8)
    x.requires_grad_()
    values, gradients = [], []
    for detach in (False, True):
        loss = tl.varifocal_loss(x, labels, detach_weight=detach, reduction="sum")
        values.append(loss)
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert values[0] == values[1] and not torch.allclose(*gradients)


def test_small_losses_keep_their_digits(backend):
    # softplus(x) - x y is 0 here
    x = torch.tensor([[17.0], [30.0], [-17.0]], device=DEVICE)
    labels = torch.tensor([0, 0, 1], device=DEVICE)
    loss = tl.sigmoid_focal_loss(x, labels, alpha=None, gamma=0.0, reduction="none").squeeze(-1)
    expected = torch.tensor([math.log1p(math.exp(-v)) for v in (17, 30, 17)], device=DEVICE)
    torch.testing.assert_close(loss, expected, rtol=3e-6, atol=0)


FUNCTIONS = {
    "focal": [tl.sigmoid_focal_loss, {}],
    "focal g<1": [tl.sigmoid_focal_loss, {"gamma": 0.3}],
    "focal g=0": [tl.sigmoid_focal_loss, {"gamma": 0.0, "alpha": None}],
    "star": [tl.focal_star_loss, {}],
    "quality": [tl.quality_focal_loss, {}],
    "quality b<1": [tl.quality_focal_loss, {"beta": 0.5}],
    "quality b=0": [tl.quality_focal_loss, {"beta": 0.0}],
    "varifocal": [tl.varifocal_loss, {}],
    "varifocal g<1": [tl.varifocal_loss, {"gamma": 0.2}],
}
# Every other loss of the table that takes labels
FUNCTIONS |= {
    f"{c.name} {hyper}": [c.function, hyper]
    for c in CASES
    if c.problem is pointwise_problem and "form" not in c.axes
    if c.function not in [function for function, _ in FUNCTIONS.values()]
    for hyper in c.hyper
}
every_loss = pytest.mark.parametrize(("function", "hyper"), FUNCTIONS.values(), ids=FUNCTIONS)
EXTREME = [0.0, 1e-30, 0.5, 18, 40, 90, 104, 1e3, 65504, 1e10, 1e30]


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(backend, function, hyper, dtype):
    values = [v for v in EXTREME if v <= torch.finfo(dtype).max]
    x = torch.tensor([[s * v] for v in values for s in (1, -1)], dtype=dtype, device=DEVICE)
    for y in (0.0, 1e-4, 0.3, 0.5, 1.0):
        dense = torch.full_like(x, y)
        rows = torch.zeros(len(x), dtype=torch.int64, device=DEVICE)
        quality = torch.full((len(x),), y, device=DEVICE)
        for targets in (dense, rows, rows + 1, (rows, quality)):
            x.requires_grad_()
            loss = function(x, targets, reduction="none", **hyper)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            assert loss.isfinite().all() and gradient.isfinite().all(), (y, loss, gradient)


@every_loss
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_non_finite_logits_give_nan_unless_they_do_not_count(backend, function, hyper, bad):
    for rows in (8, 40_000)[: 1 if backend == "triton" else 2]:  # one block of rows, and several
        x, _ = logits_and_labels(9, rows, 3)
        labels = torch.full((rows,), 3, device=DEVICE)
        x[rows // 2, 1] = bad
        if bad == -torch.inf:
            assert function(x, labels, **hyper).isfinite()  # a masked class
            labels[rows // 2] = 1
        assert function(x, labels, **hyper).isnan()
        labels[rows // 2] = -1
        x.requires_grad_()
        loss = function(x, labels, **hyper)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and gradient.isfinite().all() and not gradient[rows // 2].any()


@every_loss
@pytest.mark.parametrize("form", ["labels", "pair", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_class_masked_by_infinity_has_no_loss_and_no_gradient(
    backend, function, hyper, form, dtype
):
    """-inf at a negative: the rest is as it was, and the logit counts."""
    # the last class is the one that background reads
    calls = [(8, 1), (8, 2), (30_000, 1), (30_000, 2)]
    for rows, column in calls[: 2 if backend == "triton" else 4]:
        x, labels = logits_and_labels(21, rows, 3)
        labels = torch.where(labels == column, 3, labels)
        share = torch.rand(rows, generator=generator(22)).to(DEVICE)
        targets = {"labels": labels, "pair": (labels, share)}.get(form)
        if form == "dense":
            targets = F.one_hot(labels.clamp(0, 3), 4)[:, :3].to(dtype) * share[:, None].to(dtype)
        x = x.to(dtype)
        masked = torch.rand(rows, generator=generator(23)).to(DEVICE) < 0.3
        hidden = x.clone()
        hidden[masked, column] = -torch.inf
        x[masked, column] = -1e4  # whose loss is exactly 0
        sums = {}
        for name, logits in (("hidden", hidden), ("low", x)):
            logits.requires_grad_()
            loss = function(logits, targets, reduction="none", **hyper)
            total = function(logits, targets, **hyper)
            sums[name] = loss.detach(), *torch.autograd.grad(total, logits), total.detach()
        assert not any(found[masked, column].any() for found in sums["hidden"][:2])
        for got, want in zip(*sums.values(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-30)


@every_loss
def test_weight_zero_is_as_if_the_row_were_not_there(backend, function, hyper):
    x, labels = logits_and_labels(10)
    weight = (torch.rand(300, generator=generator(11)) - 0.4).clamp(min=0).to(DEVICE)
    kept = weight > 0
    whole = function(x, labels, weight=weight, **hyper)
    close(whole, function(x[kept], labels[kept], weight=weight[kept], **hyper))
    labels = torch.where(kept, labels, -1)
    close(whole, function(x, labels, weight=torch.where(kept, weight, 1.0), **hyper))


@every_loss
def test_permutation_of_anchors(backend, function, hyper):
    x, labels = logits_and_labels(12)
    order = torch.randperm(300, generator=generator(13)).to(DEVICE)
    loss = function(x, labels, reduction="none", **hyper)
    permuted = function(x[order], labels[order], reduction="none", **hyper)
    # eager: the CPU's vector and scalar code differ in the last bit
    tolerance = 0 if backend == "triton" else 1e-6
    torch.testing.assert_close(permuted, loss[order], rtol=tolerance, atol=tolerance / 100)


@every_loss
def test_blocks_of_rows_agree_with_the_whole(function, hyper, monkeypatch):
    """The CPU path, by blocks and in one, against the formula that autograd differentiates."""
    g = generator(14)
    x = torch.randn(3, 500, 20, generator=g).transpose(0, 1).requires_grad_()
    labels = torch.randint(-1, 21, (500, 3), generator=g)
    dense = torch.rand(500, 3, 20, generator=g)
    few = torch.where(torch.rand(500, 3, 20, generator=g) < 0.05, dense, 0)
    weight = (torch.rand(500, 3, generator=g) - 0.2).clamp(min=0)
    quality = torch.rand(500, 3, generator=g)
    for targets in (labels, (labels, quality), dense, few):
        results = []
        for block in (0, 1 << 30, 1000):
            monkeypatch.setattr(_blocks, "usable", lambda *xs, block=block: block > 0)
            monkeypatch.setattr(_blocks, "BLOCK", block)
            with tl.backend("eager"):
                loss = function(x, targets, weight=weight, **hyper)
            results.append((loss, *torch.autograd.grad(loss * 3, x)))
        formula = results[0]
        for found in results[1:]:
            assert found[1].stride() == x.stride()
            for whole, blocks in zip(formula, found, strict=True):
                torch.testing.assert_close(whole, blocks, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("mu", [1e-20, 0.02, torch.tensor(3.0)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_blocks_of_a_regression_agree_with_the_formula(mu, reduction, monkeypatch):
    pred, target = torch.randn(2, 300, 4)
    pred[:50] = target[:50] + torch.randn(50, 4) * 1e-4
    pred[50:60] = target[50:60]
    for largest in (1.0, 1e25, math.inf):  # squares overflow, and the formula takes over
        pred[60, 0] = largest
        results = []
        for usable in (False, True):
            monkeypatch.setattr(_blocks, "usable", lambda *xs, usable=usable: usable)
            x = pred.clone().requires_grad_()
            loss = tl.authentic_smooth_l1_loss(x, target, mu=mu, reduction=reduction)
            upstream = torch.linspace(1, 2, loss.numel()).view(loss.shape)
            results.append((loss, *torch.autograd.grad(loss, x, upstream)))
        for formula, blocks in zip(*results, strict=True):
            torch.testing.assert_close(blocks, formula, rtol=3e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("ignore_index", [-(2**31) - 1, 2**32 + 3, 2**32 - 1, 3, 8])
def test_an_ignored_label_is_no_other(backend, ignore_index):
    x, labels = logits_and_labels(17, classes=8)
    assert (labels == 3).any() and (labels == 8).any()
    loss = tl.sigmoid_focal_loss(x, labels, ignore_index=ignore_index, reduction="none")
    plain = tl.sigmoid_focal_loss(x, labels, reduction="none")
    close(loss, torch.where((labels == ignore_index)[:, None], 0, plain))


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_programs_of_several_tiles(backend, function, hyper, reduction, monkeypatch):
    if backend == "triton":  # 5 tiles and a part of one: a program of four, and one of the rest
        monkeypatch.setattr("tritonloss.kernels.pointwise.POINTWISE_PROGRAMS", 1)
    x, labels = logits_and_labels(15, rows=1041, classes=10)
    labels[::7] = -1
    options = {"weight": torch.rand(1041, generator=generator(16)).to(DEVICE), **hyper}
    results = []
    for logits in (x.requires_grad_(), x.detach().double().requires_grad_()):
        loss = function(logits, labels, reduction=reduction, **options)
        results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found, exact.to(found.dtype), rtol=1e-5, atol=1e-7)


@every_loss
def test_gradcheck(function, hyper):
    if hyper.get("beta", 1) == 0.5:
        pytest.skip("|y - p|^0.5 has no bounded second derivative")
    g = generator(15)
    x = (torch.randn(5, 3, generator=g) * 2).double().requires_grad_()
    labels = torch.tensor([0, 3, 2, -1, 1])
    quality = torch.rand(5, generator=g).double()
    dense = torch.rand(5, 3, generator=g).double()
    for targets in (labels, (labels, quality), dense):
        for reduction in ("none", "mean"):
            torch.autograd.gradcheck(
                lambda x, t=targets, r=reduction: function(x, t, reduction=r, **hyper), x
            )
    torch.autograd.gradgradcheck(lambda x: function(x, dense, **hyper), x)


@every_loss
def test_double_backward(backend, function, hyper):
    x, labels = logits_and_labels(16, 40, 5)
    x.requires_grad_()
    seconds = []
    for name in (backend, "eager"):
        with tl.backend(name):
            (first,) = torch.autograd.grad(function(x, labels, **hyper), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-9)


@every_loss
@pytest.mark.parametrize("form", ["labels", "quality", "dense"])
def test_second_derivatives_in_a_graph_are_whole_or_an_error(function, hyper, form):
    """Where a derivative is written out, a graph knows no further one: none of it, not a part."""
    torch._dynamo.reset()
    g = generator(23)
    x = torch.randn(20, 5, generator=g, requires_grad=True)
    labels = torch.randint(-1, 6, (20,), generator=g)
    quality, dense = torch.rand(20, generator=g), torch.rand(20, 5, generator=g)
    targets = {"labels": labels, "quality": (labels, quality), "dense": dense}[form]

    def second(call):
        (first,) = torch.autograd.grad(call(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    def call(x):
        return function(x, targets, reduction="sum", **hyper)

    try:
        found = second(torch.compile(call, backend="eager", fullgraph=True))
    except RuntimeError as error:
        assert "does not require grad" in str(error)
    else:
        torch.testing.assert_close(found, second(call), rtol=1e-4, atol=1e-7)


def test_logarithm_of_a_graph():
    """The series in place of log1p, which every logit of a compiled loss takes."""
    smaller = torch.logspace(-37, math.log10(0.5), 20_001, dtype=torch.float64).float()
    exact = torch.log1p(-smaller.double())
    found = torch.compile(pointwise.log_of_rest_, backend="eager")(smaller.clone())
    assert ((found.double() - exact) / exact).abs().max() < 2e-7
    assert not torch.equal(found, torch.log1p(-smaller)), "the graph takes log1p"


@every_loss
def test_functional_transforms(function, hyper):
    x, labels = logits_and_labels(17, 6, 4)
    x, labels = x.cpu(), labels.cpu()

    def loss(x, labels):
        return function(x, labels, **hyper)

    gradient = torch.func.grad(loss)(x, labels)
    x.requires_grad_()
    close(gradient, torch.autograd.grad(loss(x, labels), x)[0])
    x = x.detach()
    rows = torch.func.vmap(loss)(x.unsqueeze(1), labels.unsqueeze(1))
    close(rows.mean(), loss(x, labels))
    direction = torch.randn(x.shape, generator=generator(18))
    _, slope = torch.func.jvp(lambda x: loss(x, labels), (x,), (direction,))
    close(slope, (gradient * direction).sum())


def test_autocast_does_not_lower_the_precision(backend):
    x, labels = logits_and_labels(19)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = tl.sigmoid_focal_loss(x, labels)
    assert loss.dtype == torch.float32
    close(loss, tl.sigmoid_focal_loss(x, labels), 1e-7)


@pytest.mark.skipif(bool(PTX), reason="no kernel runs")
def test_export_on_the_eager_path():
    class Step(torch.nn.Module):
        def forward(self, x, labels):
            return tl.sigmoid_focal_loss(x, labels)

    x, labels = logits_and_labels(20)
    x, labels = x.cpu(), labels.cpu()
    program = torch.export.export(Step(), (x, labels))
    close(program.module()(x, labels), tl.sigmoid_focal_loss(x, labels))
    assert "tritonloss" not in program.graph_module.code


def test_recorded_detector(backend):
    """A trained detector's logits: the loss of all classes and anchors at once."""
    data = recorded()
    size = len(data["labels"]) if DEVICE != "cpu" else 1  # photos; the interpreter is slow
    x, labels = (data[k][:size].to(DEVICE) for k in ("cls_logits", "labels"))
    quality = data["quality"][:size].float().to(DEVICE)
    loss = tl.quality_focal_loss(x, (labels, quality), reduction="sum")
    p = torch.sigmoid(x.double())
    y = one_hot(labels, 80).double() * quality.double().unsqueeze(-1)
    formula = ((y - p).abs() ** 2 * F.binary_cross_entropy(p, y, reduction="none")).sum()
    close(loss.double(), formula, 1e-5)


def test_scheduled_hyper_parameters_as_tensors(backend):
    x, labels = logits_and_labels(21)
    for gamma in (0.5, 2.0):
        number = tl.sigmoid_focal_loss(x, labels, gamma=gamma, alpha=0.3)
        tensors = tl.sigmoid_focal_loss(
            x,
            labels,
            gamma=torch.tensor(gamma, device=DEVICE),
            alpha=torch.tensor(0.3, device=DEVICE),
        )
        close(number, tensors)


def test_one_logit_repeated_is_read_where_it_lies(backend):
    """Steps of 0 in every dim: nothing lies behind the only element."""
    one = torch.full((1, 1), 0.7, device=DEVICE)
    x, labels = one.expand(6, 1), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    close(tl.sigmoid_focal_loss(x, labels), tl.sigmoid_focal_loss(x.contiguous(), labels))
    dense = torch.ones(1, 1, device=DEVICE).expand(6, 1)
    close(tl.sigmoid_focal_loss(x, dense), tl.sigmoid_focal_loss(x.contiguous(), labels))


def test_more_than_four_dims_that_do_not_merge():
    g = generator(22)
    x = torch.randn(3, 5, 2, 4, 3, 6, generator=g)[:, 1:4, :, 1:3, :, ::2]
    labels = torch.randint(0, 4, x.shape[:-1], generator=g)
    close(tl.sigmoid_focal_loss(x, labels), tl.sigmoid_focal_loss(x.contiguous(), labels))


ONES, LABELS = torch.ones(2, 3), torch.tensor([0, 1])
GIVEN = (ONES, LABELS)
ERRORS = {
    "logits type": (TypeError, "logits", ([1.0], LABELS), {}),
    "logits dtype": (TypeError, "logits", (ONES.int(), LABELS), {}),
    "logits 0-d": (ValueError, "logits", (torch.tensor(1.0), torch.tensor(0)), {}),
    "label shape": (ValueError, "targets", (ONES, torch.tensor([0])), {}),
    "label range": (ValueError, r"0\.\.3.*got 4, 9$", (ONES, torch.tensor([4, 9])), {}),
    "dense shape": (ValueError, "targets", (ONES, torch.ones(2)), {}),
    "dense range": (ValueError, "targets", (ONES, torch.full((2, 3), 1.5)), {}),
    "dense nan": (ValueError, "targets", (ONES, torch.full((2, 3), math.nan)), {}),
    "targets type": (TypeError, "targets", (ONES, "cat"), {}),
    "bool targets": (TypeError, "targets", (ONES, torch.ones(2).bool()), {}),
    "quality range": (ValueError, "quality", (ONES, (LABELS, torch.tensor([0.5, 1.5]))), {}),
    "target grad": (ValueError, "requires grad", (ONES, torch.ones(2, 3).requires_grad_()), {}),
    "weight shape": (ValueError, "weight", GIVEN, {"weight": torch.ones(3)}),
    "weight dtype": (TypeError, "weight", GIVEN, {"weight": torch.ones(2).cfloat()}),
    "class weight": (ValueError, "class_weight", GIVEN, {"class_weight": torch.ones(2)}),
    "device": (ValueError, "meta", (ONES, torch.tensor([0, 1], device="meta")), {}),
    "gamma range": (ValueError, "gamma", GIVEN, {"gamma": -1}),
    "gamma nan": (ValueError, "gamma", GIVEN, {"gamma": math.nan}),
    "gamma type": (TypeError, "gamma", GIVEN, {"gamma": "2"}),
    "alpha range": (ValueError, "alpha", GIVEN, {"alpha": 1.5}),
    "reduction": (ValueError, "reduction", GIVEN, {"reduction": "avg"}),
    "avg_factor": (ValueError, "avg_factor", GIVEN, {"reduction": "sum", "avg_factor": 2}),
    "ignore_index": (TypeError, "ignore_index", GIVEN, {"ignore_index": 1.5}),
}


@pytest.mark.parametrize(("error", "words", "args", "kwargs"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(backend, error, words, args, kwargs):
    def move(v):
        if isinstance(v, torch.Tensor) and v.device.type != "meta":
            return v.detach().to(DEVICE).requires_grad_(v.requires_grad)
        return tuple(map(move, v)) if isinstance(v, tuple) else v

    if DEVICE != "cpu" and (r"\.\." in words or words in ("targets", "quality")):
        pytest.skip("values are not read on a GPU")
    with pytest.raises(error, match=words):
        tl.sigmoid_focal_loss(*map(move, args), **{k: move(v) for k, v in kwargs.items()})


def test_unchecked_invalid_labels_count_as_ignored(backend, monkeypatch):
    from tritonloss import _checks

    monkeypatch.setattr(_checks, "values_checked", lambda x: False)
    x, labels = logits_and_labels(23)
    wrong = labels.clone()
    wrong[::3] = torch.tensor(2**40 + 2)
    ignored = torch.where(wrong > 7, -1, wrong)
    assert torch.equal(tl.sigmoid_focal_loss(x, wrong), tl.sigmoid_focal_loss(x, ignored))
