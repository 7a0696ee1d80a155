"""Ranking losses against the written-out loops, known answers and identities."""

import inspect
import itertools

import pytest
import ranking_reference as reference
import torch
from axes import all_pairs
from ranking_cases import (
    INPUTS,
    LOSSES,
    assert_agrees,
    expected,
    make,
    ours,
    relative_error,
    to_device,
)
from torch._dynamo.testing import CompileCounterWithBackend

import tritonloss
import tritonloss.losses.ranking as ranking
from tritonloss._dispatch import HAS_TRITON, INTERPRET
from tritonloss.eager import ranking as eager

if HAS_TRITON:
    import triton
    from tritonloss.kernels._ranking_scratch import wide

    @triton.jit
    def end_of_rows(end_ptr, rows, capacity):
        triton.language.store(end_ptr, rows * wide(capacity))


# The interpreter takes a millisecond a program, and its kernels take no float64.
POSITIVES = (0, 1, 2, 7, 130) if INTERPRET else (0, 1, 2, 7, 300, 2000)
NEGATIVES = (0, 1, 1000, 5000) if INTERPRET else (0, 1, 1000, 100_000)
DTYPES = (torch.float32,) if INTERPRET else (torch.float32, torch.float64)
MANY = 5000 if INTERPRET else 300_000
DELTAS = (0, 1e-3, 0.1, 0.5, 1, 5)
AXES = (LOSSES, INPUTS, POSITIVES, NEGATIVES, DELTAS, DTYPES)

pytestmark = pytest.mark.usefixtures("backend")


def check(loss, kind, n_pos, n_neg, delta, dtype):
    problem = make(kind, n_pos, n_neg, dtype)
    targets = (problem.labels, problem.quality)
    got = ours(loss, problem.logits, targets, problem.quality, delta=delta)
    tolerances = (1e-9, 1e-9) if dtype == torch.float64 else (1e-6, 1e-5)
    assert_agrees(got, expected(loss, problem, delta), problem, *tolerances)
    assert all(v.dtype == dtype for v in got[0][: 1 + (loss in ("rank_sort", "alrp"))])


def quick(row):
    """The loops over 2000 positives and 100,000 negatives take seconds each."""
    return len(row) < 4 or (row[2], row[3]) != (2000, 100_000)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        cases = itertools.product(*AXES) if full else all_pairs(AXES, quick)
        metafunc.parametrize("case", list(cases), ids=lambda c: "-".join(map(str, c)))


def test_reference(case):
    check(*case)


@pytest.mark.parametrize("delta", [0, 0.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_many_logits(loss, delta):
    """Several chunks, ignored rows among them."""
    problem = make("random", 20, MANY)
    got = ours(loss, problem.logits, (problem.labels, problem.quality), problem.quality,
               delta=delta)  # fmt: skip
    assert_agrees(got, expected(loss, problem, delta), problem, 1e-6, 1e-5)


BLOCKS = (
    ("random", "recorded", "tied", "nearly constant", "+500"),
    (64, 257, 700),
    (0, 1e-3, 0.5, 5),
)


@pytest.mark.parametrize("kind, n_pos, delta", all_pairs(BLOCKS, lambda row: True))
def test_positives_of_several_blocks(kind, n_pos, delta):
    """Windows that begin and end inside blocks and on their borders, of one list and of three."""
    problem = make(kind, n_pos, 300)
    lists = {"group": torch.arange(len(problem.labels))[:, None] % 3, "num_groups": 3}
    for loss, options in (("rank_sort", {}), ("rank_sort", lists), ("alrp", {})):
        rows = problem.logits, (problem.labels, problem.quality), problem.quality
        got = ours(loss, *rows, delta=delta, **options)
        x, (labels, quality), error = rows
        wide = x.double(), (labels, quality.double()), error.double()
        assert_agrees(got, ours(loss, *wide, delta=delta, **options), problem, 1e-6, 1e-6)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("kind", ["random", "nearly constant"])
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_count_and_distance_each_in_a_word(loss, common, kind, monkeypatch):
    """As of too many logits for one word; with and without a common segment that is kept apart."""
    from tritonloss.kernels import ranking as kernels

    monkeypatch.setitem(kernels.SPECS, loss, kernels.SPECS[loss]._replace(fraction=64))
    monkeypatch.setattr(kernels, "LEAST_FRACTION", 24 if common else 64)
    problem = make(kind, 60, 1500)
    rows = problem.logits, (problem.labels, problem.quality), problem.quality
    assert_agrees(ours(loss, *rows, delta=0.5), expected(loss, problem, 0.5), problem, 1e-6, 1e-5)


def quality_of(kind, n_pos):
    steps = {"distinct": 1 << 24, "few values": 7, "long runs": 2, "one value": 1}[kind]
    return (torch.rand(n_pos) * steps).floor().double() / steps


QUALITIES = (
    INPUTS,
    (0, 1e-3, 0.5, 5),
    ("distinct", "few values", "long runs", "one value"),
    (1, 33, 150, 700),
)


@pytest.mark.parametrize("kind, delta, qualities, n_pos", all_pairs(QUALITIES, lambda row: True))
def test_violators_found_bit_by_bit(kind, delta, qualities, n_pos, monkeypatch):
    """What the eager path does for many positives gives what it does for few; 0 stays 0."""
    problem = make(kind, n_pos, 100, torch.float64)
    score = problem.logits[problem.positive].sort().values
    positives = eager.Positives(score, quality_of(qualities, n_pos))
    monkeypatch.setattr(eager, "FEW", n_pos)
    want = eager.sorting(positives, delta)
    monkeypatch.setattr(eager, "FEW", 0)
    tolerance = 1e-12 * max(1, n_pos / 150)  # of differences between sums of so many terms
    for a, b in zip(eager.sorting(positives, delta), want, strict=True):
        assert relative_error(a, b) <= tolerance
        assert torch.equal(a == 0, b == 0)


# ------------------------------------------------------------------------------- known answers


def one_pair(gap, delta):
    """A positive at 0 and a negative ``gap`` above it."""
    x = torch.tensor([[gap, 0.0]])
    rank, sort = ranking.rank_sort_loss(x, torch.tensor([1]), delta=delta)
    assert sort == 0
    return rank.item()


@pytest.mark.usefixtures("on_device")
def test_one_positive_one_negative():
    assert one_pair(3.0, 0.5) == pytest.approx(2 / 3)
    assert one_pair(3.0, 0) == pytest.approx(0.5)
    assert one_pair(0.0, 0.5) == pytest.approx(0.5)
    ap = [ranking.ap_loss(torch.tensor([[g, 0.0]]), torch.tensor([1])).item() for g in (3, 0)]
    assert ap == pytest.approx([0.5, 1 / 3])


@pytest.mark.usefixtures("on_device")
def test_figure_of_the_bucketed_paper():
    """Order n n p n n n n p: each positive's error falls evenly on the negatives above it."""
    x = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])[:, None].requires_grad_()
    labels = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0])
    loss = ranking.ap_loss(x, labels, delta=0, interpolated=False)
    assert loss.item() == pytest.approx((2 / 3 + 3 / 4) / 2)
    loss.backward()
    upper, lower = (1 / 3 + 1 / 8) / 2, 1 / 8 / 2
    assert x.grad[:, 0].tolist() == pytest.approx(
        [upper, upper, -2 / 3 / 2, lower, lower, lower, lower, -3 / 4 / 2]
    )


def test_separated_ap_has_no_nan():
    """Precision 1 below the maximum: the published factor (1 - max) / (1 - current) is 0 / 0."""
    problem = make("just separated", 90, 18_000)
    _, grad, _, _ = ours("ap", problem.logits, problem.labels, None)
    assert not grad.isnan().any()


# ---------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_sum_to_zero(loss, kind):
    problem = make(kind, 40, 1500, torch.float64)
    _, grad_1, grad_2, _ = ours(
        loss, problem.logits, (problem.labels, problem.quality), problem.quality
    )
    for grad in (grad_1, grad_2):
        assert grad is None or abs(grad.sum()) <= 1e-12 * max(1, grad.abs().sum())


@pytest.mark.parametrize("loss", LOSSES)
def test_permutation(loss, backend):
    """The kernels give the same bits; eager promises rounding."""
    problem = make("tied", 40, 1500)
    targets = (problem.labels, problem.quality)
    order = torch.randperm(len(problem.labels))
    shuffled = ours(loss, problem.logits[order], tuple(t[order] for t in targets),
                    problem.quality[order])  # fmt: skip
    straight = ours(loss, problem.logits, targets, problem.quality)
    tolerance = 0 if backend == "triton" else 1e-6
    for a, b in zip(shuffled[0], straight[0], strict=True):
        assert a == pytest.approx(b.item(), rel=tolerance, abs=0)
    for a, b in zip(shuffled[1:], straight[1:], strict=True):
        assert a is None or relative_error(a, b[order]) <= tolerance


@pytest.mark.parametrize("loss", LOSSES)
def test_constant_on_all_logits(loss):
    problem = make("random", 30, 1500)
    x = (problem.logits * 1024).round() / 1024
    first, second = (
        ours(loss, x + c, (problem.labels, problem.quality), problem.quality, delta=0.25)
        for c in (0, 512)
    )
    for a, b in zip(first[0], second[0], strict=True):
        assert a == pytest.approx(b.item(), rel=1e-6)
    for a, b in zip(first[1:], second[1:], strict=True):
        assert a is None or relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_far_negatives_and_ignored_entries_get_nothing(loss):
    problem = make("random", 30, 1500)
    x, pos = problem.logits, problem.positive
    _, grad, _, _ = ours(loss, x, (problem.labels, problem.quality), problem.quality, delta=0.5)
    assert not grad[~pos & (x < x[pos].min() - 0.5)].any()
    assert not grad[problem.labels < 0].any()


@pytest.mark.parametrize("form", ["labels", "dense", "row weight", "logit weight"])
@pytest.mark.parametrize("loss", LOSSES)
def test_forms_agree(loss, form):
    """Ignored labels, negative dense targets and zero weights remove the same entries."""
    problem = make("random", 30, 1500)
    e, keep = problem.quality.nan_to_num(0.3), problem.labels >= 0
    targets = (problem.labels, problem.quality)
    want = ours(loss, problem.logits, targets, e)
    options, x = {}, problem.logits.clone()
    x[~keep] = torch.nan  # what is removed is not looked at
    if form == "dense":
        targets = problem.dense
    elif form != "labels":
        targets = (problem.labels.clamp(min=0), torch.where(keep, problem.quality, 0.5))
        weight = keep.float() * 0.3
        options["weight"] = weight if form == "row weight" else weight[:, None].expand(x.shape)
    got = ours(loss, x, targets, e, **options)
    for a, b in zip(got[0], want[0], strict=True):
        assert a == pytest.approx(b.item(), rel=1e-6)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a is None or relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_strides(loss):
    """A permuted head output: same numbers, gradient with its strides."""
    problem = make("random", 30, 2000)
    image = problem.logits[: 2 * 12 * 20].reshape(2, 12, 20, 4)
    nchw = image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    labels, quality = (t[: 2 * 12 * 20].reshape(2, 12, 20) for t in problem[1:])
    want = ours(loss, image, (labels, quality), quality)
    got = ours(loss, nchw, (labels, quality), quality)
    assert got[1].stride() == nchw.stride()
    assert [v.item() for v in got[0]] == pytest.approx([v.item() for v in want[0]], rel=1e-6)
    assert relative_error(got[1], want[1]) <= 1e-6
    sliced = torch.randn(2, 12, 20, 9)[..., 3:7].copy_(image)
    got = ours(loss, sliced, (labels, quality), quality)
    assert relative_error(got[1], want[1]) <= 1e-6


@pytest.mark.parametrize("by", ["image", "class", "both", "anything"])
@pytest.mark.parametrize("loss", LOSSES)
def test_groups_are_separate_calls(loss, by):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(3, 50, 4, generator=g)
    labels = torch.randint(-1, 5, (3, 50), generator=g)
    labels[1] = 4  # a list without positives does not count
    quality, error = torch.rand(2, 3, 50, generator=g)
    group = {
        "image": torch.arange(3)[:, None, None],
        "class": torch.arange(4),
        "both": torch.arange(12).view(3, 1, 4),
        "anything": torch.randint(7, x.shape, generator=g),
    }[by]
    n = int(group.max()) + 1
    got = ours(loss, x, (labels, quality), error, group=group, num_groups=n)
    ids = group.expand(x.shape)
    parts, lists = [], 0
    for k in range(n):
        mine = ours(loss, x, (labels, quality), error, weight=(ids == k).float())
        parts.append(mine)
        here = torch.nn.functional.one_hot(labels.clamp(min=0), 5)[..., :4].bool()
        lists += bool((here & (labels >= 0)[..., None] & (ids == k)).any())
    for k in (0, 1):
        want = sum(p[0][k].item() for p in parts) / lists
        assert got[0][k].item() == pytest.approx(want, rel=1e-6)
    for k in (1, 2, 3):
        if got[k] is not None:
            assert relative_error(got[k], sum(p[k] for p in parts) / lists) <= 1e-6


def test_each_output_has_its_own_gradient():
    problem = make("random", 30, 1500)
    x = to_device(problem.logits).clone().requires_grad_()
    rank, sort = ranking.rank_sort_loss(x, to_device((problem.labels, problem.quality)))
    (2 * rank + 3 * sort).backward()
    _, rank_grad, sort_grad, _ = ours(
        "rank_sort", problem.logits, (problem.labels, problem.quality), None
    )
    assert relative_error(x.grad.cpu(), 2 * rank_grad + 3 * sort_grad) <= 1e-6
    assert sort_grad[problem.positive].any() and not sort_grad[~problem.positive].any()


@pytest.mark.usefixtures("on_device")
def test_no_positives():
    x = torch.randn(5, 3, requires_grad=True)
    labels = torch.full((5,), 3)
    loss = (
        sum(ranking.rank_sort_loss(x, labels))
        + ranking.ap_loss(x, labels)
        + sum(ranking.alrp_loss(x, labels, torch.full((5,), torch.nan)))
    )
    assert loss == 0
    loss.backward()
    assert x.grad is not None and not x.grad.any()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_without_positives_a_logit_that_is_not_finite_has_no_part(bad):
    x = torch.randn(5, 3)
    x[2, 1] = bad
    x.requires_grad_()
    labels = torch.full((5,), 3)
    loss = sum(ranking.rank_sort_loss(x, labels)) + ranking.ap_loss(x, labels)
    assert loss == 0
    loss.backward()
    assert not x.grad.any()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (3,)])
def test_few_dims_and_no_anchors(shape):
    x = torch.zeros(shape, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    sum(ranking.rank_sort_loss(x, labels)).backward()
    ranking.ap_loss(x, labels).backward()
    assert x.grad.shape == shape


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_non_finite_logits_give_nan(bad, where):
    x = torch.randn(4, 2)
    x[where, 0] = bad
    labels = torch.tensor([0, 2, 1, 2])
    values = [*ranking.rank_sort_loss(x, labels), ranking.ap_loss(x, labels),
              *ranking.alrp_loss(x, labels, torch.rand(4))]  # fmt: skip
    masked = where == 1 and bad == -torch.inf  # the class of a negative
    assert all(v.isfinite() if masked else v.isnan() for v in values)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("form", ["labels", "dense", "grouped"])
def test_a_class_masked_by_infinity_lies_below_everything(form, delta):
    labels = torch.randint(0, 9, (120,))
    labels = torch.where(labels < 3, labels, 3)
    x = torch.randn(120, 3)
    x[torch.rand(120, 3) < 0.3] = -1e4
    x[labels < 3] = torch.randn(int((labels < 3).sum()), 3)
    more = {"delta": delta}
    targets, error = labels, torch.rand(120)
    if form == "dense":
        targets = torch.nn.functional.one_hot(labels, 4)[:, :3].float() * error[:, None]
    elif form == "grouped":
        more |= {"group": torch.arange(120)[:, None] % 2, "num_groups": 2}
    found = []
    for logits in (x, torch.where(x == -1e4, -torch.inf, x)):
        logits = logits.clone().requires_grad_()
        values = [*ranking.rank_sort_loss(logits, targets, **more),
                  ranking.ap_loss(logits, targets, **more)]  # fmt: skip
        if form != "dense":
            values += ranking.alrp_loss(logits, targets, error, **more)
        found.append([*values, *torch.autograd.grad(sum(values), logits)])
        assert not found[-1][-1][x == -1e4].any()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", ["quality", "dense", "error"])
def test_non_finite_values_at_positives_give_nan(form, bad, monkeypatch):
    """With tied scores, whose order the values decide."""
    monkeypatch.setattr("tritonloss._checks.values_checked", lambda x: False)
    x = torch.zeros(4, 1, requires_grad=True)
    labels, value = torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, bad, 0.0, 0.5])
    if form == "error":
        value.requires_grad_()
        values = ranking.alrp_loss(x, labels, value)
    elif form == "quality":
        values = ranking.rank_sort_loss(x, (labels, value))
    else:  # NaN or negative, a dense target is ignored
        values = ranking.rank_sort_loss(x, value[:, None])
    ignored = form == "dense" and bad != torch.inf
    sum(values).backward()
    for result in (*values, *x.grad[:3, 0], *(value.grad[:3] if form == "error" else ())):
        assert result.isnan() or ignored
    assert not ignored or (x.grad.isfinite().all() and sum(values).isfinite())
    # elsewhere nobody reads it
    other = torch.tensor([1.0, 0.25, 0.0, bad])
    assert all(v.isfinite() for v in ranking.alrp_loss(x, labels, other))
    assert all(v.isfinite() for v in ranking.rank_sort_loss(x, (labels, other)))


@pytest.mark.parametrize("loss", LOSSES)
def test_huge_logits_stay_finite(loss):
    x = torch.tensor([[1e30], [-1e30], [1e30], [0.0], [-1e30]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    values, *grads = ours(loss, x, (labels, torch.rand(5)), torch.rand(5))
    assert all(v.isfinite() for v in values)
    assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision(loss, dtype):
    """Computed in float32 from the rounded logits; only the gradient is rounded."""
    problem = make("random", 30, 1500)
    x = problem.logits.to(dtype)
    targets = (problem.labels, problem.quality)
    want = ours(loss, x.float(), targets, problem.quality)
    got = ours(loss, x, targets, problem.quality)
    assert got[1].dtype == dtype and got[0][0].dtype == torch.float32
    assert got[0][0] == want[0][0]
    assert relative_error(got[1], want[1].to(dtype)) <= torch.finfo(dtype).eps
    scaled = to_device(x.detach()).clone().requires_grad_()
    first = ranking.ap_loss(scaled, to_device(problem.labels))
    (first * 2.0**14).backward()  # loss scaling: multiplied before the rounding
    assert scaled.grad.cpu()[problem.negative & (x > -2)].count_nonzero() > 100


@pytest.mark.parametrize("shape", [(30, 10), (1, 64)])
def test_most_dense_targets_positive(shape):
    g = torch.Generator().manual_seed(0)
    x, targets = torch.randn(shape, generator=g), torch.rand(shape, generator=g)
    targets[torch.rand(shape, generator=g) < 0.2] = 0
    pos = targets.flatten() > 0
    want = reference.average_precision(x.flatten(), pos, ~pos, 1.0, True)
    assert float(ranking.ap_loss(*to_device((x, targets)), delta=1.0)) == pytest.approx(
        float(want[0]), rel=1e-6
    )


@pytest.mark.usefixtures("on_device")
def test_more_dense_positives_than_room_is_loud(monkeypatch):
    """Dense scratch holds an eighth of many logits: more positives give NaN, not a wrong number."""
    if INTERPRET:
        monkeypatch.setattr("tritonloss.kernels.ranking.DENSE_POSITIVES", 64)
    loss = ranking.ap_loss(torch.zeros(300, 10), torch.ones(300, 10))
    assert loss.isnan() if INTERPRET else loss == 0


def kernels_with_rows():
    from tritonloss.kernels import _ranking_logits, _ranking_pairs, _ranking_positives

    names = {}
    for module in (_ranking_logits, _ranking_pairs, _ranking_positives):
        names |= {name: getattr(module, name) for name in dir(module) if name.endswith("_kernel")}
    return names


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_rows_of_the_scratch_lie_beyond_32_bits():
    """12 rows of 1.8e8 entries are more than 2**31, and a capacity is an int32 to a kernel."""
    kernels = kernels_with_rows()
    assert len(kernels) >= 8
    for name, kernel in kernels.items():
        source = inspect.getsource(kernel.fn)
        body = source.split('"""')[-1].strip()
        assert body.startswith("capacity = wide(capacity)"), name
    if INTERPRET:
        end = torch.zeros(1, dtype=torch.int64)
        end_of_rows[(1,)](end, 12, 180_000_000)
        assert end.item() == 12 * 180_000_000


def test_reference_agrees_with_known_answers():
    x = torch.tensor([3.0, 0.0])
    pos = torch.tensor([False, True])
    one = torch.ones(2)
    assert reference.rank_sort(x, pos, ~pos, one, 0.5)[0] == pytest.approx(2 / 3)
    assert reference.average_precision(x, pos, ~pos, 1.0, True)[0] == pytest.approx(0.5)


# --------------------------------------------------------------- compile, transforms, arguments


def everything(x, targets, error, delta):
    labels = targets[0] if isinstance(targets, tuple) else targets
    rank, sort = ranking.rank_sort_loss(x, targets, delta=delta)
    cls, loc = ranking.alrp_loss(x, labels, error, delta=delta)
    return rank + 2 * sort + 3 * ranking.ap_loss(x, labels, delta=delta) + 4 * cls + 5 * loc


@pytest.mark.parametrize(
    "form, backend", [("labels", "aot_eager"), ("quality", "inductor"), ("dense", "aot_eager")]
)
def test_compile(form, backend):
    """fullgraph, forward and backward; a new P or delta (as a tensor) does not recompile."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(everything, fullgraph=True, backend=counter)
    for n_pos, delta in [(50, 0.5), (150, 0.5), (0, 0.5), (20, 0.25)]:
        problem = make("random", n_pos, 1600)
        rows = slice(0, 380)
        labels, quality = problem.labels[rows], problem.quality[rows].nan_to_num(0.5)
        targets = {"labels": labels, "quality": (labels, quality), "dense": problem.dense[rows]}
        results = []
        for run in (everything, compiled):
            x = problem.logits[rows].clone().requires_grad_()
            e = quality.clone().requires_grad_()
            loss = run(x, targets[form], e, torch.tensor(delta))
            loss.backward()
            results.append((loss.detach(), x.grad, e.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("on_device")
def test_transforms_and_double_backward_say_no():
    x, labels = torch.randn(4, 6, 2, requires_grad=True), torch.zeros(4, 6, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="error-driven"):
        torch.vmap(ranking.ap_loss)(x, labels)
    with pytest.raises(RuntimeError, match="error-driven"):
        torch.func.grad(lambda t: ranking.rank_sort_loss(t, labels).rank)(x)
    with pytest.raises(RuntimeError, match="error-driven"):
        torch.autograd.grad(ranking.ap_loss(x, labels), x, create_graph=True)


def test_nothing_is_mutated():
    problem = make("random", 30, 1500)
    inputs = [problem.logits, problem.labels, problem.quality]
    before = [t.clone() for t in inputs]
    ours("rank_sort", problem.logits, (problem.labels, problem.quality), None)
    ours("alrp", problem.logits, problem.labels, problem.quality)
    for a, b in zip(inputs, before, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


def test_same_bits_every_time():
    problem = make("tied", 40, 5000)
    runs = [ours("rank_sort", problem.logits, (problem.labels, problem.quality), None)
            for _ in range(2)]  # fmt: skip
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])


X, LABELS = torch.zeros(4, 3), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"delta": -1}, ValueError, "delta .*>= 0.*-1"),
        ({"delta": "1"}, TypeError, "delta .*number.*str"),
        ({"logits": X.long()}, TypeError, "logits .*float.*int64"),
        ({"logits": torch.zeros(())}, ValueError, r"logits .*\(\.\.\., C\)"),
        ({"targets": LABELS[:2]}, ValueError, r"targets .*\(4,\).*\(2,\)"),
        ({"targets": LABELS + 1}, ValueError, r"targets .*0\.\.3.*4"),
        ({"targets": (LABELS, torch.full((4,), 2.0))}, ValueError, "quality .*0, 1"),
        ({"targets": torch.full((4, 3), 2.0)}, ValueError, "targets .*1"),
        ({"targets": "boxes"}, TypeError, "targets .*labels.*str"),
        ({"weight": torch.ones(3)}, ValueError, r"weight .*\(4,\).*\(3,\)"),
        ({"weight": torch.ones(4, requires_grad=True)}, ValueError, "weight requires grad"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index .*int.*float"),
        ({"group": torch.zeros(5, dtype=torch.int64), "num_groups": 1}, ValueError,
         r"group .*broadcast.*\(4, 3\).*\(5,\)"),
        ({"group": torch.zeros(3), "num_groups": 1}, TypeError, "group .*integer.*float32"),
        ({"group": torch.arange(3), "num_groups": 2}, ValueError, r"group .*0\.\.1"),
        ({"group": torch.arange(3)}, ValueError, "num_groups .*None"),
        ({"num_groups": 3}, ValueError, "num_groups .*3 without group"),
    ],
)  # fmt: skip
def test_errors(options, error, words):
    arguments = {"logits": X, "targets": LABELS} | options
    with pytest.raises(error, match=words):
        ranking.rank_sort_loss(**arguments)
    with pytest.raises(error, match=words):
        ranking.ap_loss(**arguments)


def test_errors_of_localization_error():
    with pytest.raises(ValueError, match=r"localization_error .*\(4,\).*\(4, 3\)"):
        ranking.alrp_loss(X, LABELS, X)
    with pytest.raises(TypeError, match=r"localization_error .*int64"):
        ranking.alrp_loss(X, LABELS, LABELS)


def test_self_balanced_weight():
    box = torch.tensor([0.5, 0.0, 2.0], requires_grad=True)
    weight = ranking.self_balanced_weight(torch.tensor(-3.0), box)
    assert weight.tolist() == [6, 1, 1.5] and not weight.requires_grad
    assert ranking.self_balanced_weight(torch.tensor(1.0).half(), box).dtype == torch.float32


def test_backends():
    with tritonloss.backend("eager"):
        ranking.ap_loss(X, LABELS)
