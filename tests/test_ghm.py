"""GHM-C, GHM-R and authentic smooth L1 against loops over bins in float64."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import recorded
from conftest import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

import tritonloss as tl
from tritonloss._dispatch import INTERPRET
from tritonloss.eager import _blocks

pytestmark = pytest.mark.usefixtures("on_device")

BINS = (1, 10, 30, 256)


def relative(got, want):
    """Relative error in L2 and in max norm, the larger of both; 0 of 0 is no error."""
    got, want = got.detach().double(), want.detach().double()
    errors = [0.0]
    for norm in (lambda t: t.norm(), lambda t: t.abs().max()):
        if want.numel() and norm(want) > 0:
            errors.append((norm(got - want) / norm(want)).item())
        elif want.numel():
            errors.append(norm(got).item())
    return max(errors)


def bce64(x, y):
    return (
        torch.where(y > 0.5, x.neg(), x).clamp(min=0)
        + (-x.abs()).exp().log1p()
        + torch.where(y > 0.5, (1 - y) * x, -y * x)
    )


def loop(pred, y, keep, bins, kind="c", mu=0.02, m=0.0, state=None, correct=False, norm="nonempty"):
    """``(loss, gradient, state)``: one pass per region, float64, regions from float32."""
    x, y = (
        pred.detach().double().where(keep, torch.zeros(())),
        y.double().where(keep, torch.zeros(())),
    )
    if kind == "c":
        g = (torch.sigmoid(x.float()) - y.float()).abs()
        value, slope = bce64(x, y), torch.sigmoid(x) * (1 - y) - torch.sigmoid(-x) * y
    else:
        d = x - y
        g = d.float().abs() / torch.hypot(d.float(), torch.tensor(mu))
        value, slope = (d * d + mu * mu).sqrt() - mu, d / (d * d + mu * mu).sqrt()
    A, t = (torch.zeros(bins).double(), torch.zeros(bins).double()) if state is None else state
    A, t = A.double().clone(), t.double().clone()
    loss, gradient, n = 0.0, torch.zeros_like(x), 0
    for k in range(bins):
        inside = keep & (g * bins >= k) & ((g * bins < k + 1) | (k == bins - 1))
        if not inside.any():
            continue
        n, t[k] = n + 1, t[k] + 1
        A[k] = m * A[k] + (1 - m) * inside.sum()
        amount = A[k] / (1 - m ** t[k]) if correct else A[k]
        loss += value[inside].sum() / amount
        gradient[inside] = slope[inside] / amount
    n = max(n, 1) if norm == "nonempty" else bins
    return torch.as_tensor(loss) / n, gradient / n, (A, t)


def make(form, shape=(40, 5), dtype=torch.float32, seed=0, spread=3.0):
    """``(logits, targets, dense targets, keep)``; some rows ignored where there are labels."""
    make = torch.Generator(DEVICE).manual_seed(seed)
    x = (torch.randn(shape, generator=make) * spread).to(dtype)
    n_classes = shape[-1]
    if form == "dense":
        y = torch.rand(shape, generator=make) * (torch.rand(shape, generator=make) < 0.3)
        return x, y, y, torch.ones(shape, dtype=torch.bool)
    labels = torch.randint(-1, n_classes + 1, shape[:-1], generator=make)
    quality = torch.rand(shape[:-1], generator=make)
    hot = F.one_hot(labels.clamp(min=0), n_classes + 1)[..., :n_classes].float()
    keep = (labels >= 0).unsqueeze(-1).expand(shape)
    if form == "quality":
        return x, (labels, quality), hot * quality.unsqueeze(-1), keep
    return x, labels, hot, keep


def step(function, x, *args, scale=1, **options):
    """``(output, gradient)``; the output's first entry is the loss where there is a state."""
    x = x.detach().requires_grad_()
    output = function(x, *args, **options)
    loss = output[0] if isinstance(output, tuple) else output
    (loss * scale).backward()
    return output, x.grad


@pytest.fixture(params=["whole"] if INTERPRET else ["whole", "blocks"])
def path(request, monkeypatch, backend):
    """Both CPU paths, whatever the size of the input; or the kernels."""
    monkeypatch.setattr(_blocks, "BLOCK", 64 if request.param == "blocks" else 10**9)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("form", ["labels", "quality", "dense"])
def test_ghm_c_is_the_loop_over_bins(form, bins, path):
    x, targets, y, keep = make(form)
    loss, grad = step(tl.ghm_c_loss, x, targets, bins=bins)
    want, want_grad, _ = loop(x, y, keep, bins)
    assert relative(loss, want) < 1e-6
    for side in (y > 0, y == 0):
        assert relative(grad[side], want_grad[side]) < 1e-5
    assert loss.dtype == torch.float32
    assert torch.all(grad[~keep] == 0)


@pytest.mark.parametrize("bins", BINS)
def test_ghm_r_is_the_loop_over_bins(bins, path):
    x, _, y, keep = make("dense", (60, 4), spread=0.05)
    loss, grad = step(tl.ghm_r_loss, x, y, bins=bins)
    want, want_grad, _ = loop(x, y, keep, bins, "r")
    assert relative(loss, want) < 1e-6
    assert relative(grad, want_grad) < 1e-5


@pytest.mark.parametrize("form", ["labels", "dense"])
@pytest.mark.parametrize("per_logit", [False, True])
def test_weights_are_a_mask(form, per_logit, path):
    x, targets, y, keep = make(form)
    weight = torch.rand(x.shape if per_logit else x.shape[:-1]) * 2
    weight[torch.rand(weight.shape) < 0.4] = 0
    kept = keep & ((weight if per_logit else weight.unsqueeze(-1)) > 0)
    x = x.masked_fill(~kept, math.nan)
    loss, grad = step(tl.ghm_c_loss, x, targets, weight=weight)
    want, want_grad, _ = loop(x, y, kept, 10)
    assert relative(loss, want) < 1e-6
    assert relative(grad, want_grad) < 1e-5
    same = tl.ghm_c_loss(x, targets, weight=(weight > 0).float() * 7)
    assert same == loss


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("norm", ["nonempty", "all"])
@pytest.mark.parametrize("kind", ["c", "r"])
def test_momentum_over_five_steps(kind, norm, correct, path):
    """Regions that vanish keep their running count and leave n."""
    options = dict(bins=10, momentum=0.75, bias_correction=correct, normalize=norm)
    state, want_state = (torch.zeros(10), torch.zeros(10)), None
    spreads = (3.0, 0.1, 6.0, 0.0, 2.0) if kind == "c" else (0.1, 0.001, 3.0, 0.0, 0.02)
    for seed, spread in enumerate(spreads):
        x, y, _, keep = make("dense", seed=seed, spread=spread)
        before = tuple(s.clone() for s in state)
        function = tl.ghm_c_loss if kind == "c" else tl.ghm_r_loss
        (loss, new), grad = step(function, x, y, state=state, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
        state = new
        want, want_grad, want_state = loop(
            x, y, keep, 10, kind, m=0.75, state=want_state, correct=correct, norm=norm
        )
        assert relative(loss, want) < 1e-6
        assert relative(grad, want_grad) < 1e-5
        assert relative(state[0], want_state[0]) < 1e-6
        assert torch.equal(state[1].double(), want_state[1])
        assert not state[0].requires_grad and state[0].dtype == torch.float32


def test_the_first_published_step_is_inflated_and_the_corrected_one_is_not():
    x, labels, _, _ = make("labels")
    plain = tl.ghm_c_loss(x, labels)
    begin = {"momentum": 0.75, "state": (torch.zeros(10), torch.zeros(10))}
    assert torch.allclose(tl.ghm_c_loss(x, labels, **begin)[0], 4 * plain)
    corrected, _ = tl.ghm_c_loss(x, labels, **begin, bias_correction=True)
    assert torch.allclose(corrected, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_saturated_wrong_logit_counts_in_every_dtype(dtype, path):
    """Region M - 1 is closed at 1; an edge of 1 + 1e-6 rounds to 1 in float16."""
    x = torch.tensor([[60.0], [-60.0]], dtype=dtype).repeat(100, 1)
    loss, grad = step(tl.ghm_c_loss, x, torch.ones(200, dtype=torch.int64))
    assert loss.item() == pytest.approx(30)  # mean of 60 in the last region and 0 in the first
    assert torch.all(grad[::2] > 0)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_give_the_float32_result(dtype, path):
    x, labels, y, keep = make("labels", dtype=dtype)
    loss, grad = step(tl.ghm_c_loss, x, labels, bins=30)
    want, want_grad, _ = loop(x, y, keep, 30)
    assert relative(loss, want) < 1e-6
    assert grad.dtype == dtype
    assert relative(grad, want_grad) < 2.0 ** (-10 if dtype == torch.float16 else -7)
    scaled = step(tl.ghm_c_loss, x, labels, bins=30, scale=1024)[1]
    assert relative(scaled / 1024, want_grad) < 2.0 ** (-10 if dtype == torch.float16 else -7)


def test_float64_keeps_float64(path):
    x, labels, y, keep = make("labels", dtype=torch.float64)
    loss, grad = step(tl.ghm_c_loss, x, labels)
    want, want_grad, _ = loop(x, y, keep, 10)
    assert relative(loss, want) < 1e-12
    assert relative(grad, want_grad) < 1e-12


def test_nothing_that_counts_gives_zero(path):
    x = torch.randn(300, 3)
    for labels, weight in (
        (torch.full((300,), -1), None),
        (torch.zeros(300).long(), torch.zeros(300)),
    ):
        state = torch.rand(10), torch.ones(10)
        loss, grad = step(tl.ghm_c_loss, x, labels, weight=weight)
        assert loss == 0 and torch.all(grad == 0)
        _, new = tl.ghm_c_loss(x, labels, weight=weight, momentum=0.5, state=state)
        assert all(torch.equal(a, b) for a, b in zip(state, new, strict=True))
    loss, grad = step(tl.ghm_c_loss, x[:0], torch.empty(0, dtype=torch.int64))
    assert loss == 0 and grad.shape == (0, 3)
    assert tl.ghm_r_loss(torch.empty(0, 4), torch.empty(0, 4)) == 0


def test_one_region_is_the_mean(path):
    """bins = 1, or all norms in one region: plain cross entropy."""
    x, y, _, _ = make("dense")
    assert torch.allclose(tl.ghm_c_loss(x, y, bins=1), F.binary_cross_entropy_with_logits(x, y))
    easy = torch.full((50, 4), -9.0)
    want = F.softplus(torch.tensor(-9.0))
    assert torch.allclose(tl.ghm_c_loss(easy, torch.full((50,), 4), bins=30), want)
    d = torch.randn(50, 4)
    asl1 = tl.authentic_smooth_l1_loss(d, torch.zeros_like(d))
    assert torch.allclose(tl.ghm_r_loss(d, torch.zeros_like(d), bins=1), asl1)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_non_finite_logit_that_counts_gives_nan(bad, path):
    x, labels, _, _ = make("labels")
    x[0, 0], labels[0] = bad, 0
    assert tl.ghm_c_loss(x, labels).isnan()
    labels[0] = -1
    assert tl.ghm_c_loss(x, labels).isfinite()


@pytest.mark.parametrize("form", ["labels", "quality", "dense"])
def test_a_class_masked_by_infinity_is_an_easy_negative(form, path):
    """It counts in the first region, as a logit of very low score does."""
    x, y, labels = torch.randn(300, 4), torch.zeros(300, 4), torch.full((300,), 4)
    labels[::7], y[::7, 2] = 2, 0.7
    targets = {"labels": labels, "quality": (labels, torch.full((300,), 0.7)), "dense": y}[form]
    x[::3, 1] = -1e4
    want = step(tl.ghm_c_loss, x, targets)
    hidden = torch.where(x == -1e4, -math.inf, x)
    for got, wanted in zip(step(tl.ghm_c_loss, hidden, targets), want, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-9)
    hidden[0, 2] = -math.inf
    assert tl.ghm_c_loss(hidden, targets).isnan()
    assert tl.ghm_r_loss(hidden, y).isnan()


@pytest.mark.parametrize("x", [1e30, -1e30, 1e4, -88.0, -104.0, 17.0])
def test_large_logits_stay_finite(x, path):
    logits = torch.full((100, 2), x)
    for targets in (torch.zeros(100).long(), torch.full((100,), 2)):
        loss, grad = step(tl.ghm_c_loss, logits, targets)
        assert loss.isfinite() and grad.isfinite().all()
    loss, grad = step(tl.ghm_r_loss, logits, torch.zeros_like(logits))
    assert loss.isfinite() and grad.isfinite().all()
    assert loss.item() == pytest.approx(abs(x), rel=1e-2)


def test_permuted_logits_keep_their_strides(path):
    x = torch.randn(2, 7, 5, 3).permute(0, 2, 3, 1)
    labels = torch.randint(0, 8, (2, 5, 3))
    _, grad = step(tl.ghm_c_loss, x, labels)
    assert grad.stride() == x.stride()
    assert torch.allclose(grad, step(tl.ghm_c_loss, x.contiguous(), labels)[1])


# ---- authentic smooth L1


def test_asl1_is_its_formula_and_keeps_small_distances():
    d = torch.tensor([0.0, 1e-6, -1e-3, 0.02, -0.5, 3.0, 1e30])
    got = tl.authentic_smooth_l1_loss(d, torch.zeros_like(d), reduction="none")
    wide = d.double()
    want = wide * wide / ((wide * wide + 0.0004).sqrt() + 0.02)
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_asl1_reductions_and_weights(reduction):
    pred, target = torch.randn(6, 4), torch.randn(6, 4)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])
    pred[1] = math.nan
    got = tl.authentic_smooth_l1_loss(pred, target, weight=weight, reduction=reduction)
    d = (pred - target)[weight > 0].double()
    value = ((d * d + 0.0004).sqrt() - 0.02) * weight[weight > 0].unsqueeze(-1)
    if reduction == "none":
        assert torch.allclose(got[weight > 0].double(), value, rtol=1e-5)
        assert torch.all(got[weight == 0] == 0)
    else:
        want = value.sum() / (value.numel() if reduction == "mean" else 1)
        assert torch.allclose(got.double(), want, rtol=1e-5)


def test_gradcheck():
    pred = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.randint(-1, 5, (5,))
    functions = (
        lambda x: tl.authentic_smooth_l1_loss(x, target, mu=0.3),
        lambda x: tl.ghm_r_loss(x, target, mu=0.3),
        lambda x: tl.ghm_c_loss(x, labels),
    )
    for function in functions:
        assert torch.autograd.gradcheck(function, pred)
        assert torch.autograd.gradgradcheck(function, pred)


def test_double_backward_by_blocks(monkeypatch):
    x, labels, _, _ = make("labels", dtype=torch.float64)
    seconds = []
    for block in (64, 10**9):
        monkeypatch.setattr(_blocks, "BLOCK", block)
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(tl.ghm_c_loss(x, labels), x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.pow(2).sum(), x)[0])
    assert torch.allclose(*seconds)


def test_func_transforms():
    x, labels, _, _ = make("labels")
    want = step(tl.ghm_c_loss, x, labels)[1]
    assert torch.allclose(torch.func.grad(lambda x: tl.ghm_c_loss(x, labels))(x), want)
    batch = torch.stack([x, x * 0.5])
    rows = torch.func.vmap(lambda x: tl.ghm_c_loss(x, labels))(batch)
    assert torch.allclose(rows, torch.stack([tl.ghm_c_loss(x, labels) for x in batch]))


# ---- the paper's density


def density(g, width):
    """Exact gradient density of the paper: how many norms lie within width / 2, per length."""
    ordered = g.sort().values
    low = torch.searchsorted(ordered, g - width / 2)
    high = torch.searchsorted(ordered, g + width / 2, right=True)
    return (high - low) / ((g + width / 2).clamp(max=1) - (g - width / 2).clamp(min=0))


@pytest.mark.parametrize("bins", [10, 30])
def test_unit_regions_approximate_the_density_of_the_paper(bins):
    """On smoothly spread norms; next, a real detector's."""
    x = (
        torch.randn(20000, 1, dtype=torch.float64, generator=torch.Generator(DEVICE).manual_seed(3))
        * 2
    )
    g = torch.sigmoid(x).flatten()
    exact = (F.softplus(x).flatten() / density(g, 1 / bins)).sum()
    regions = tl.ghm_c_loss(x, torch.ones(20000).long(), bins=bins, normalize="all")
    assert regions.item() == pytest.approx(exact.item(), rel=0.03)


@pytest.mark.parametrize(("bins", "error"), [(10, 0.036), (30, 0.037), (256, -0.003)])
def test_unit_regions_on_a_recorded_detector(bins, error):
    """How far the published approximation is from the paper's density: 4 % of the loss."""
    x = recorded()["cls_logits"].to(DEVICE).flatten(0, 1).double()
    labels = recorded()["labels"].to(DEVICE).flatten().long()
    y = F.one_hot(labels, 81)[:, :80].double()
    norm = (x.sigmoid() - y).abs().flatten()
    exact = (bce64(x, y).flatten() / density(norm, 1 / bins)).sum()
    regions = tl.ghm_c_loss(x, labels, bins=bins, normalize="all")
    assert regions.item() / exact.item() - 1 == pytest.approx(error, abs=0.002)


# ---- tracing


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph_with_state(compiler, backend):
    torch._dynamo.reset()
    x, labels, _, _ = make("labels")

    @torch.compile(fullgraph=True, backend=compiler)
    def run(x, A, t, momentum):
        return tl.ghm_c_loss(
            x, labels, bins=30, momentum=momentum, state=(A, t), bias_correction=True
        )

    eager, compiled = ((torch.zeros(30), torch.zeros(30)) for _ in range(2))
    for seed, momentum in enumerate((0.5, 0.5, 0.7)):
        x = make("labels", seed=seed)[0].requires_grad_()
        loss, compiled = run(x, *compiled, torch.tensor(momentum))
        loss.backward()
        wanted, x.grad = x.grad, None
        want, eager = tl.ghm_c_loss(
            x, labels, bins=30, momentum=momentum, state=eager, bias_correction=True
        )
        want.backward()
        assert torch.allclose(loss, want)
        assert torch.allclose(wanted, x.grad, atol=1e-7)
        assert torch.allclose(compiled[0], eager[0])


def test_compile_fullgraph_ghm_r():
    torch._dynamo.reset()
    x, y, _, _ = make("dense", (30, 4))
    run = torch.compile(tl.ghm_r_loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(x, y), tl.ghm_r_loss(x, y))


@pytest.mark.skipif(INTERPRET, reason="the eager op runs where no kernel does")
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("want_grad", [False, True])
def test_opcheck_of_the_eager_op(state, want_grad):
    from tritonloss.losses.ghm import ghm_eager

    x, labels, _, _ = make("labels")
    A = torch.rand(10) if state else None
    params = torch.tensor([0.0, 0.5, 0.5, math.log(0.5)])
    levels = ([x[:20], x[20:].half()], [labels[:20], labels[20:]], [], [], [])
    args = (*levels, A, A, params, "bce", 10, True, "nonempty", -1, want_grad)
    torch.library.opcheck(ghm_eager.op, args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_levels_in_a_graph(dtype, backend):
    torch._dynamo.reset()
    levels = [make("labels", seed=seed)[:2] for seed in range(2)]
    labels = [target for _, target in levels]
    xs = [x.to(dtype).requires_grad_() for x, _ in levels]
    call = partial(tl.ghm_c_loss, bins=30)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, want = compiled(xs, labels), call(xs, labels)
    torch.testing.assert_close(found, want)
    gradients = [torch.autograd.grad(value, xs) for value in (found, want)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(compiled(xs, labels), want)


# ---- modules


def train(loss, steps, call=None, seed=0):
    """Loss values of a few training steps on fresh logits."""
    values = []
    for step in range(steps):
        x, labels, _, _ = make("labels", seed=seed + step, spread=1.0 + step)
        x.requires_grad_()
        value = (loss if call is None else call)(x, labels)
        value.backward()
        values.append(value.detach())
    return values


def test_module_is_the_function_and_resumes_from_its_state_dict(backend):
    options = dict(bins=10, momentum=0.75, bias_correction=True)
    loss, state = tl.GHMCLoss(**options), (torch.zeros(10), torch.zeros(10))
    for seed, got in enumerate(train(loss, 3)):
        x, labels, _, _ = make("labels", seed=seed, spread=1.0 + seed)
        want, state = tl.ghm_c_loss(x, labels, state=state, **options)
        assert torch.allclose(got, want)
    assert torch.equal(loss.amount, state[0])
    resumed = tl.GHMCLoss(**options)
    resumed.load_state_dict(loss.state_dict())
    copied = copy.deepcopy(loss)
    want = train(loss, 2, seed=3)
    assert train(resumed, 2, seed=3) == want
    assert train(copied, 2, seed=3) == want


@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_module_takes_buffers_of_mmdetection(momentum):
    theirs = {"loss_cls.edges": torch.arange(11) / 10}
    if momentum:
        theirs["loss_cls.acc_sum"] = torch.rand(10) * 5 * (torch.arange(10) != 4)
    counts = theirs.get("loss_cls.acc_sum", torch.zeros(10))
    for correct in (False, True):  # as many updates as nothing knows: none to correct
        head = torch.nn.ModuleDict(
            {"loss_cls": tl.GHMCLoss(momentum=momentum, bias_correction=correct)}
        )
        head.load_state_dict(theirs)
        loss = head["loss_cls"]
        assert loss.amount.equal(counts) and "edges" not in head.state_dict()
        x, labels = torch.randn(20, 3) * 2, torch.randint(0, 4, (20,))
        state = (counts, torch.zeros(10)) if momentum else None
        if correct and momentum:
            state = (counts, torch.full((10,), 1e6) * (counts > 0))
        expected = tl.ghm_c_loss(x, labels, momentum=momentum, state=state, bias_correction=correct)
        expected = expected if state is None else expected[0]
        torch.testing.assert_close(loss(x, labels), expected)
    assert len(theirs) == 1 + bool(momentum)  # a copy was loaded


def test_module_keeps_its_counts_in_float32(backend):
    loss = tl.GHMCLoss(momentum=0.75)
    train(loss, 2)
    before = loss.amount.clone()
    for cast in ("half", "bfloat16", "double"):
        getattr(nn.Sequential(nn.Linear(2, 2), loss), cast)()
        assert loss.amount.dtype == loss.updates.dtype == torch.float32
        assert torch.equal(loss.amount, before)
    assert loss.to("meta").amount.device.type == "meta"


def test_module_does_not_learn_in_eval_mode(backend):
    loss = tl.GHMCLoss(momentum=0.75)
    train(loss, 2)
    before, counted = loss.amount.clone(), loss.updates.clone()
    train(loss.eval(), 2)
    assert torch.equal(loss.amount, before) and torch.equal(loss.updates, counted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_module_counts_once(reentrant, backend):
    def gradients(checkpointed):
        loss, found = tl.GHMCLoss(momentum=0.75, bias_correction=True), []
        for seed in range(3):
            x, labels, _, _ = make("labels", seed=seed)
            x.requires_grad_()
            if checkpointed:
                # the loss behind another operation, so that something is recomputed
                value = checkpoint(
                    lambda x, labels=labels: loss(x.sin(), labels), x, use_reentrant=reentrant
                )
            else:
                value = loss(x.sin(), labels)
            value.backward()
            found += [x.grad, loss.amount.clone(), loss.updates.clone()]
        return found

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rows", [(60, 20, 7), (30, 30, 30)])
@pytest.mark.parametrize("regions", ["one", "each"])
def test_checkpointed_calls_of_a_step_begin_where_they_did(regions, rows, reentrant, backend):
    """A level a call; of one shape, which call is run again has to be told by its counts."""

    def gradients(checkpointed):
        loss, found = tl.GHMCLoss(momentum=0.75), []
        for step in range(3):
            drawn = [make("labels", (n, 7), seed=10 * step + k) for k, n in enumerate(rows)]
            xs, labels = [d[0].requires_grad_() for d in drawn], [d[1] for d in drawn]
            again = partial(checkpoint, use_reentrant=reentrant) if checkpointed else apply

            def total(*xs, labels=labels):
                return sum(loss(x.sin(), t) for x, t in zip(xs, labels, strict=True))

            if regions == "one":
                value = again(total, *xs)
            else:
                parts = zip(xs, labels, strict=True)
                value = sum(again(partial(total, labels=[t]), x) for x, t in parts)
            value.backward()
            found += [*(x.grad for x in xs), loss.amount.clone()]
        return found

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, want)


def apply(function, *args):
    return function(*args)


def test_two_forwards_before_a_backward(backend):
    loss = tl.GHMCLoss(momentum=0.5)
    (a, labels, _, _), (b, other, _, _) = make("labels", seed=0), make("labels", seed=1)
    a, b = a.requires_grad_(), b.requires_grad_()
    (loss(a, labels) + loss(b, other)).backward()
    assert loss.updates.max() == 2


def test_compiled_module_updates_its_buffers(backend):
    torch._dynamo.reset()
    losses = [tl.GHMCLoss(momentum=0.75) for _ in range(2)]
    compiled = torch.compile(losses[1], fullgraph=True, backend="aot_eager")
    for want, got in zip(train(losses[0], 3), train(losses[1], 3, compiled), strict=True):
        assert torch.allclose(got, want)
    assert torch.allclose(losses[0].amount, losses[1].amount)
    assert torch.equal(losses[0].updates, losses[1].updates)


def test_regression_module(backend):
    loss = tl.GHMRLoss(momentum=0.7)
    x, y, _, _ = make("dense", (60, 4), spread=0.05)
    state = torch.zeros(10), torch.zeros(10)
    want, state = tl.ghm_r_loss(x, y, momentum=0.7, state=state)
    assert torch.equal(loss(x, y), want) and torch.equal(loss.amount, state[0])


# ---- kernels


@pytest.mark.skipif(not INTERPRET, reason="runs the kernels, interpreted")
@pytest.mark.parametrize(("form", "bins"), [("labels", 10), ("dense", 40)])
def test_few_programs_walk_over_many_tiles(form, bins, monkeypatch):
    """Two tiles a program and a rest; the recorded detector's logits beside spread ones."""
    from tritonloss.kernels import ghm

    monkeypatch.setattr(ghm, "HISTOGRAM_PROGRAMS", 2)
    x, targets, y, keep = make(form, (50, 40))
    x[10:] = recorded()["cls_logits"].to(DEVICE).flatten()[: 40 * 40].reshape(40, 40)
    want, want_grad, _ = loop(x, y, keep, bins)
    with tl.backend("triton"):
        loss, grad = step(tl.ghm_c_loss, x, targets, bins=bins)
        again, grad_again = step(tl.ghm_c_loss, x, targets, bins=bins)
    assert relative(loss, want) < 1e-6
    assert relative(grad, want_grad) < 1e-5
    assert torch.equal(loss, again) and torch.equal(grad, grad_again)


@pytest.mark.skipif(not INTERPRET, reason="opcheck needs an op that runs")
@pytest.mark.parametrize("state", [False, True])
def test_opcheck(state):
    from tritonloss.kernels import ghm

    x, labels, _, _ = make("labels")
    A = torch.rand(10) if state else None
    params = torch.tensor([0.0, 0.5, 0.5, math.log(0.5)])
    rest = (A, A, params, "bce", 10, True, "nonempty", -1)
    levels = ([x[:20], x[20:]], [labels[:20], labels[20:]], [], [], [])
    torch.library.opcheck(ghm.forward.op, (*levels, *rest))
    weights = ghm.forward(*levels, *rest)[3]
    level = (x, labels, None, None, None)
    torch.library.opcheck(ghm.backward.op, (torch.tensor(1.0), weights, *level, *rest))


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(bins=0), ValueError, "bins must be in 1..256; got 0"),
        (dict(bins=257), ValueError, "bins must be in 1..256; got 257"),
        (dict(bins=10.0), TypeError, "bins must be an int; got float"),
        (dict(momentum=1.0), ValueError, "momentum must be >= 0 and < 1; got 1.0"),
        (dict(momentum=-0.1), ValueError, "momentum"),
        (dict(normalize="mean"), ValueError, "normalize must be one of nonempty, all; got 'mean'"),
        (dict(state=torch.zeros(10)), TypeError, "state must be a pair"),
        (dict(state=(torch.zeros(9), torch.zeros(10))), ValueError, r"state\[0\] \(A\) must have"),
        (dict(state=(torch.zeros(10), torch.zeros(10).half())), TypeError, r"state\[1\] \(t\)"),
        (dict(weight=torch.ones(3)), ValueError, "weight must have shape"),
    ],
)
def test_errors_name_the_argument(change, error, says):
    x, labels, _, _ = make("labels")
    if isinstance(change.get("state"), tuple):
        change = change | {"state": tuple(t.to(DEVICE) for t in change["state"])}
    with pytest.raises(error, match=says):
        tl.ghm_c_loss(x, labels, **change)


def test_regression_errors():
    pred, target = torch.randn(5, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="mu must be"):
        tl.ghm_r_loss(pred, target, mu=0)
    with pytest.raises(ValueError, match="target must have shape"):
        tl.ghm_r_loss(pred, target[:4])
    with pytest.raises(ValueError, match="target requires grad"):
        tl.ghm_r_loss(pred, target.requires_grad_())
    with pytest.raises(TypeError, match="pred must be"):
        tl.authentic_smooth_l1_loss(pred.long(), pred)


@pytest.mark.slow
def test_full_product(monkeypatch):
    axes = itertools.product(
        ("labels", "quality", "dense"), BINS, (1.0, 8.0), (64, 10**9), range(5)
    )
    for form, bins, spread, block, seed in axes:
        monkeypatch.setattr(_blocks, "BLOCK", block)
        x, targets, y, keep = make(form, (37, 9), seed=seed, spread=spread)
        loss, grad = step(tl.ghm_c_loss, x, targets, bins=bins)
        want, want_grad, _ = loop(x, y, keep, bins)
        assert relative(loss, want) < 1e-6
        assert relative(grad, want_grad) < 1e-5
