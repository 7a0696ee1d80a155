"""One batch over several gloo processes: the loss and gradients of one process with all of it."""

from __future__ import annotations

import os
import re
import time
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from processes import Failed, PerRank, Pool
from ranking_cases import INPUTS, LOSSES, Problem, as_head, make, ours, relative_error

import tritonloss as tl
from perf import scaling
from perf.bench_distributed import COLLECTIVES
from tritonloss._dispatch import INTERPRET
from tritonloss.distributed import KernelExchange, Sharing

BACKEND = "triton" if INTERPRET else "eager"
N_POS, N_NEG = (40, 1500) if INTERPRET else (60, 4000)


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()


# -------------------------------------------------------------------------------------- ranking


def shards(problem: Problem, k: int, how: str) -> list[Problem]:
    """The rows of a problem over k processes."""
    n = len(problem.labels)
    order = torch.arange(n)
    positive = problem.positive.any(1)
    if how == "one has all positives":
        order = torch.cat([order[positive], order[~positive]])
        cuts = [int(positive.sum())] * (k > 1) + [n * i // k for i in range(2, k)]
    elif how == "uneven":
        cuts = [n * i * i // (k * k) for i in range(1, k)]
    elif how == "one has no anchors":
        cuts = [0, *(n * i // k for i in range(2, k))][: k - 1]
    elif how == "one has no positives":
        order = torch.cat([order[~positive][: n // k], order[positive], order[~positive][n // k :]])
        cuts = [n * i // k for i in range(1, k)]
    else:
        cuts = [n * i // k for i in range(1, k)]
    ends = [0, *sorted(cuts), n]
    rows = [order[a:b] for a, b in pairwise(ends)]
    return [Problem(*(t[part] for t in problem)) for part in rows]


def arguments(problem: Problem, form: str):
    targets = {
        "labels": problem.labels,
        "quality": (problem.labels, problem.quality),
        "dense": problem.dense,
    }[form]
    return problem.logits, targets, problem.quality.nan_to_num(0.3)


def ranking_step(group, rank, loss, problem, form, options):
    with tl.backend(BACKEND):
        return ours(loss, *arguments(problem, form), process_group=group, **options)


def whole(loss, parts, form, **options):
    """The parts' results one after the other, from one process that has them all."""
    one = Problem(*(torch.cat(t) for t in zip(*parts, strict=True)))
    with tl.backend(BACKEND):
        values, *grads = ours(loss, *arguments(one, form), **options)
    sizes = [len(part.labels) for part in parts]
    return values, [None if g is None else g.split(sizes) for g in grads]


def check_ranking(pool, loss, parts, form="quality", tolerance=1e-6, **options):
    shared = {name: options.pop(name) for name in ("capacity", "head") if name in options}
    k = len(parts)
    got = pool.run(ranking_step, k, loss, PerRank(parts), form, options | shared)
    want, want_grads = whole(loss, parts, form, **options)
    for values, *_ in got:
        assert all(torch.equal(a, b) for a, b in zip(values, got[0][0], strict=True))
        for value, w in zip(values, want, strict=True):
            assert value.dtype == w.dtype
            assert value.item() == pytest.approx(
                w.item(), rel=tolerance, abs=tolerance, nan_ok=True
            )
    for i, parts_of_grad in enumerate(want_grads):
        if parts_of_grad is None:
            continue
        ours_, theirs = torch.cat([g[1 + i] for g in got]), torch.cat(parts_of_grad)
        if theirs.isnan().any():
            assert torch.equal(ours_.isnan(), theirs.isnan())
        else:
            assert relative_error(ours_, theirs) <= tolerance


SHARDS = ("even", "uneven", "one has all positives", "one has no anchors", "one has no positives")


# How the call takes the anchors: in one tensor, or as levels with classes in that dim
HEADS = (None, 1, -1)


@pytest.mark.parametrize("how", SHARDS)
@pytest.mark.parametrize("head", HEADS[1:])
def test_ranking_of_levels_is_that_of_one_tensor(pool, how, head):
    parts = shards(make("random", N_POS, N_NEG), 2, how)
    for loss in LOSSES:
        check_ranking(pool, loss, parts, head=head)
    for loss in LOSSES[:3]:
        check_ranking(pool, loss, parts, "dense", head=head)


@pytest.mark.parametrize("k", [3] if INTERPRET else [1, 2, 3, 4])
@pytest.mark.parametrize("how", SHARDS)
def test_ranking_is_that_of_one_process(pool, how, k):
    parts = shards(make("random", N_POS, N_NEG), k, how)
    for loss in LOSSES:
        check_ranking(pool, loss, parts)


@pytest.mark.parametrize("kind", ("tied", "equal positives") if INTERPRET else INPUTS[1:])
def test_ranking_inputs(pool, kind):
    """Ties and equal values across processes among them."""
    parts = shards(make(kind, N_POS, N_NEG), 3, "uneven")
    for loss in LOSSES:
        check_ranking(pool, loss, parts)


@pytest.mark.parametrize("delta", [0, 5] if INTERPRET else [0, 1e-3, 0.1, 1, 5])
@pytest.mark.parametrize("loss", LOSSES)
def test_ranking_deltas(pool, loss, delta):
    check_ranking(pool, loss, shards(make("tied", N_POS, N_NEG), 3, "uneven"), delta=delta)


@pytest.mark.parametrize("form", ["labels", "dense"])
@pytest.mark.parametrize("k", [2, 4])
def test_ranking_targets(pool, form, k):
    for loss in LOSSES[:3]:  # aLRP reads labels alone
        check_ranking(pool, loss, shards(make("random", N_POS, N_NEG), k, "uneven"), form)


def test_no_positives_anywhere(pool):
    for loss in LOSSES:
        check_ranking(pool, loss, shards(make("random", 0, N_NEG), 3, "uneven"))


def test_one_process_and_a_group_of_one_are_the_same(pool):
    (part,) = shards(make("random", N_POS, N_NEG), 1, "even")
    ((values, *grads),) = pool.run(ranking_step, 1, "rank_sort", part, "quality", {})
    want, want_grads = whole("rank_sort", [part], "quality")
    assert values == want and torch.equal(grads[0], want_grads[0][0])


def lists_step(group, rank, loss, x, labels, quality, lists, n):
    with tl.backend(BACKEND):
        targets = (labels, quality)
        return ours(loss, x, targets, quality, group=lists, num_groups=n, process_group=group)


@pytest.mark.parametrize("by", ["image", "class", "both"])
@pytest.mark.parametrize("loss", LOSSES)
def test_lists(pool, loss, by):
    """A list may lie in one process or in all; some have no positive, or none here."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(5, 60, 4, generator=g)
    labels = torch.randint(-1, 5, (5, 60), generator=g)
    labels[1] = 4
    labels[3:][labels[3:] == 2] = 4
    quality = torch.rand(5, 60, generator=g)
    lists = {
        "image": torch.arange(5)[:, None, None].expand(5, 1, 1),
        "class": torch.arange(4).expand(5, 1, 4),
        "both": torch.arange(20).view(5, 1, 4),
    }[by]
    n, sizes = int(lists.max()) + 1, [2, 1, 2]
    split = [PerRank(t.split(sizes)) for t in (x, labels, quality, lists)]
    got = pool.run(lists_step, 3, loss, *split, n)
    with tl.backend(BACKEND):
        want, *want_grads = ours(loss, x, (labels, quality), quality, group=lists, num_groups=n)
    for values, *_ in got:
        assert all(torch.equal(a, b) for a, b in zip(values, got[0][0], strict=True))
        for value, w in zip(values, want, strict=True):
            assert value.item() == pytest.approx(w.item(), rel=1e-6, abs=1e-6)
    for i, w in enumerate(want_grads):
        assert w is None or relative_error(torch.cat([g[1 + i] for g in got]), w) <= 1e-6


@pytest.mark.parametrize("where", ["positive", "negative"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_logit_is_seen_by_all(pool, where, bad):
    parts = shards(make("random", N_POS, N_NEG), 3, "even")
    row, column = getattr(parts[1], where).nonzero()[0].tolist()
    parts[1].logits[row, column] = bad
    for loss in LOSSES:
        for values, *_ in pool.run(ranking_step, 3, loss, PerRank(parts), "quality", {}):
            assert values[0].isnan()


@pytest.mark.skipif(INTERPRET, reason="the kernels take no float64")
def test_float64_and_halves(pool):
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.bfloat16, 1e-6)]:
        problem = make("random", N_POS, N_NEG)
        problem = problem._replace(logits=problem.logits.to(dtype))
        check_ranking(pool, "rank_sort", shards(problem, 2, "uneven"), tolerance=tolerance)


def scaled_step(group, rank, parts):
    """Gradient of a shared weight after the trainer's reduction: plain sum, and mean."""
    problem, results = parts[rank], []
    for averaged in (False, True):
        w = torch.ones((), requires_grad=True)
        with tl.backend(BACKEND):
            options = {"process_group": group, "gradients_averaged": averaged}
            targets = (problem.labels, problem.quality)
            e = problem.quality.nan_to_num(0.3) * w
            losses = [
                *tl.rank_sort_loss(problem.logits * w, targets, **options),
                tl.ap_loss(problem.logits * w, problem.labels, **options),
                *tl.alrp_loss(problem.logits * w, problem.labels, e, **options),
            ]
        sum(losses).backward()
        dist.all_reduce(w.grad, group=group)
        results.append((torch.stack(losses).detach(), w.grad / (group.size() if averaged else 1)))
    return results


def test_averaged_gradients(pool):
    parts = shards(make("random", N_POS, N_NEG), 3, "uneven")
    alone = make("random", N_POS, N_NEG)
    for summed, averaged in pool.run(scaled_step, 3, parts):
        assert torch.equal(summed[0], averaged[0])
        torch.testing.assert_close(summed[1], averaged[1], rtol=1e-5, atol=1e-6)
    w = torch.ones((), requires_grad=True)
    targets, e = (alone.labels, alone.quality), alone.quality.nan_to_num(0.3) * w
    with tl.backend(BACKEND):
        sum([
            *tl.rank_sort_loss(alone.logits * w, targets),
            tl.ap_loss(alone.logits * w, alone.labels),
            *tl.alrp_loss(alone.logits * w, alone.labels, e),
        ]).backward()  # fmt: skip
    torch.testing.assert_close(averaged[1], w.grad, rtol=1e-4, atol=1e-5)


def example_step(group, rank):
    """The worked example of rank_sort_loss."""
    gradients = []
    for averaged in (False, True):
        w = torch.ones((), requires_grad=True)
        x, label = ((1.0, 0), (4.0, 1))[rank]
        with tl.backend(BACKEND):
            loss = tl.rank_sort_loss(
                w * torch.tensor([[x]]), torch.tensor([label]), process_group=group,
                gradients_averaged=averaged,
            )  # fmt: skip
        loss.rank.backward()
        gradients.append(w.grad.item())
    return loss.rank.item(), *gradients


def test_worked_example(pool):
    for (rank, *gradients), sign in zip(pool.run(example_step, 2), (-1, 4), strict=True):
        assert rank == pytest.approx(2 / 3)
        assert gradients == pytest.approx([sign * 2 / 3, sign * 4 / 3])


def capacity_step(group, rank, problem):
    """Enough room; too little; the call after; and the call after that."""
    results = []
    with tl.backend(BACKEND):
        for capacity in (64, 8, 64, 64):
            try:
                x = problem.logits.clone().requires_grad_()
                loss = tl.ap_loss(x, problem.labels, process_group=group, capacity=capacity)
                loss.backward()
                results.append((loss.item(), bool(x.grad[problem.negative].isnan().all())))
            except ValueError as error:
                results.append(str(error))
    return results


def test_a_fixed_capacity_is_never_a_silent_cut(pool):
    parts = shards(make("random", 40, 1000), 2, "one has all positives")
    for enough, cut, after, again in pool.run(capacity_step, 2, PerRank(parts)):
        want = whole("ap", parts, "quality")[0][0].item()
        assert enough == (pytest.approx(want, rel=1e-6), False)
        assert cut == (pytest.approx(float("nan"), nan_ok=True), True)
        assert "capacity is 8 positives" in after and "40" in after
        assert again == enough


def cut_step(group, rank):
    """The kernels' exchange where process 1 found one positive more than it could write down."""
    exchange = KernelExchange(Sharing(group.group_name), {"loss": "ap_loss"})
    found = torch.tensor([4 + rank, 0])
    exchange.agree(found[0], 10)
    raw = torch.arange(8.0).view(2, 4) + 10 * rank
    lists, items = torch.zeros(4, dtype=torch.int32), torch.arange(4)
    return exchange.positives(raw, lists, items, found), exchange.positives(
        raw, lists, items, torch.tensor([2, 0])
    )


def test_positives_of_the_kernels_are_closed_up_and_a_cut_is_seen(pool):
    for rank, (cut, whole) in enumerate(pool.run(cut_step, 2)):
        assert cut[3].tolist() == [9, 1]
        raw, _, items, counter = whole
        assert counter.tolist() == [4, 0]
        assert raw[:, :4].tolist() == [[0, 1, 10, 11], [4, 5, 14, 15]]
        mine = items[:4].view(2, 2)
        assert mine[rank].tolist() == [0, 1] and (mine[1 - rank] < 0).all()
        assert len(set(items.tolist())) == len(items)


# ------------------------------------------------------------------------------------------ GHM


def harmonised_inputs(rows: int = 400, seed: int = 0, spread: float = 3.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=g) * spread
    return x, torch.randint(-1, 5, (rows,), generator=g), torch.rand(rows, 4, generator=g)


def ghm_step(group, rank, x, labels, y, options, head=None):
    """(loss, state, gradient) of both losses; with ``head`` of levels."""
    results = []
    if head is not None:
        options = options | {"class_dim": head}

    def arranged(t):
        return t if head is None else as_head(t, head)

    with tl.backend(BACKEND):
        for loss, target in ((tl.ghm_c_loss, labels), (tl.ghm_r_loss, y)):
            leaf = x.clone().requires_grad_()
            state = torch.zeros(10), torch.zeros(10)
            inputs = arranged(leaf), arranged(target)
            value, state = loss(*inputs, state=state, process_group=group, **options)
            value.backward()
            results.append((value.detach(), *state, leaf.grad))
    return results


GHM_OPTIONS = [
    {},
    {"momentum": 0.75, "bias_correction": True},
    {"momentum": torch.tensor(0.5), "normalize": "all"},
    {"gradients_averaged": True},
]


@pytest.mark.parametrize("options", GHM_OPTIONS, ids=lambda o: "-".join(o) or "defaults")
@pytest.mark.parametrize("sizes", [[400], [150, 250], [0, 400], [0, 30, 300, 70]], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_ghm_is_that_of_one_process(pool, head, sizes, options, monkeypatch):
    inputs = harmonised_inputs()
    split = [PerRank(t.split(sizes)) for t in inputs]
    got = pool.run(ghm_step, len(sizes), *split, options, head)
    scale = len(sizes) if options.get("gradients_averaged") else 1
    alone = {k: v for k, v in options.items() if k != "gradients_averaged"}
    for i, (*want, want_grad) in enumerate(ghm_step(None, 0, *inputs, alone)):
        for result in got:
            for a, b, first in zip(result[i][:3], want, got[0][i][:3], strict=True):
                assert torch.equal(a, first)
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        grad = torch.cat([result[i][3] for result in got])
        assert relative_error(grad, scale * want_grad) <= 1e-6


def large_ghm_step(group, rank, x, labels):
    leaf = x.clone().requires_grad_()
    value = tl.ghm_c_loss(leaf, labels, process_group=group)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.skipif(INTERPRET, reason="the eager path has two forms")
@pytest.mark.parametrize("bad", [None, torch.nan])
def test_ghm_by_blocks_beside_ghm_as_a_whole(pool, bad):
    """One process has enough logits to go by blocks."""
    x, labels, _ = harmonised_inputs(20_000)
    if bad is not None:
        x[-1, 0], labels[-1] = bad, 0
    split = [PerRank(t.split([300, 19_700])) for t in (x, labels)]
    got = pool.run(large_ghm_step, 2, *split)
    want, want_grad = large_ghm_step(None, 0, x, labels)
    for value, _ in got:
        torch.testing.assert_close(value, want, equal_nan=True, rtol=1e-6, atol=0)
    if bad is None:
        assert relative_error(torch.cat([g for _, g in got]), want_grad) <= 1e-6


def module_step(group, rank, seeds, k, saved):
    """Steps of a module on this process' share of each batch."""
    module = tl.GHMCLoss(momentum=0.75, process_group=group)
    if saved is not None:
        module.load_state_dict(saved)
    losses = []
    for seed in seeds:
        x, labels, _ = harmonised_inputs(seed=seed, spread=1.0 + seed)
        with tl.backend(BACKEND):
            losses.append(module(x.chunk(k)[rank], labels.chunk(k)[rank]).item())
    return losses, module.state_dict()


def test_a_checkpoint_goes_on_with_another_number_of_processes(pool):
    straight, want = module_step(None, 0, range(6), 1, None)
    losses, saved = [], None
    for k, seeds in ((2, [0, 1]), (3, [2, 3]), (1, [4, 5])):
        results = pool.run(module_step, k, seeds, k, saved)
        assert all(r[0] == results[0][0] for r in results)
        for _, state in results:
            assert all(torch.equal(state[name], results[0][1][name]) for name in state)
        losses += results[0][0]
        saved = results[0][1]
    assert losses == pytest.approx(straight, rel=1e-6)
    for name, value in want.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-6, atol=0)


def ranking_modules_step(group, rank, problem):
    options = {"process_group": group, "capacity": 64, "gradients_averaged": True}
    with tl.backend(BACKEND):
        targets = (problem.labels, problem.quality)
        error = problem.quality.nan_to_num(0.3)
        values = [
            *tl.RankSortLoss(**options)(problem.logits, targets),
            tl.APLoss(**options)(problem.logits, problem.labels),
            *tl.ALRPLoss(**options)(problem.logits, problem.labels, error),
        ]
    return torch.stack(values)


def test_modules(pool):
    problem = make("random", 30, 1500)
    got = pool.run(ranking_modules_step, 2, PerRank(shards(problem, 2, "uneven")))
    want = ranking_modules_step(None, 0, problem)
    for values in got:
        torch.testing.assert_close(values, want, rtol=1e-6, atol=1e-6)


def double_step(group, rank, x, labels):
    x = x.double().requires_grad_()
    (grad,) = torch.autograd.grad(
        tl.ghm_c_loss(x, labels, process_group=group), x, create_graph=True
    )
    return torch.autograd.grad(grad.pow(2).sum(), x)[0]


def test_ghm_twice_differentiated(pool):
    x, labels, _ = harmonised_inputs(40)
    split = [PerRank(t.split([15, 25])) for t in (x, labels)]
    got = torch.cat(pool.run(double_step, 2, *split))
    torch.testing.assert_close(got, double_step(None, 0, x, labels))


def compiled_ghm_step(group, rank, x, labels, y):
    def both(x, state, momentum):
        options = {"momentum": momentum, "process_group": group, "gradients_averaged": True}
        first, state = tl.ghm_c_loss(x, labels, state=state, **options)
        return first + tl.ghm_r_loss(x, y, process_group=group), state

    results = []
    for run in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        with tl.backend(BACKEND):
            leaf = x.clone().requires_grad_()
            loss, state = run(leaf, (torch.ones(10), torch.ones(10)), torch.tensor(0.75))
            loss.backward()
        results.append((loss.detach(), *state, leaf.grad))
    return results


def test_compiled_ghm(pool):
    split = [PerRank(t.split([150, 250])) for t in harmonised_inputs()]
    for eager, compiled in pool.run(compiled_ghm_step, 2, *split):
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# -------------------------------------------------------------------------------------- compile


def everything(x, targets, error, delta, group, capacity):
    options = {"process_group": group, "capacity": capacity, "delta": delta}
    rank, sort = tl.rank_sort_loss(x, targets, **options)
    cls, loc = tl.alrp_loss(x, targets[0], error, **options, gradients_averaged=True)
    return rank + 2 * sort + 3 * tl.ap_loss(x, targets[0], **options) + 4 * cls + 5 * loc


def compiled_step(group, rank, problem, capacity):
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    results = []
    for run in (everything, compiled):
        for delta in (0.5, 0.25):
            with tl.backend(BACKEND):
                x = problem.logits.clone().requires_grad_()
                e = problem.quality.nan_to_num(0.3).requires_grad_()
                targets = (problem.labels, problem.quality)
                loss = run(x, targets, e, torch.tensor(delta), group, capacity)
                loss.backward()
            results.append((loss.detach(), x.grad, e.grad))
    return results


def test_compile(pool):
    """fullgraph; the kernels need a fixed capacity."""
    parts = PerRank(shards(make("random", 30, 1500), 2, "uneven"))
    for results in pool.run(compiled_step, 2, parts, 64 if INTERPRET else None):
        for eager, compiled in zip(results[:2], results[2:], strict=True):
            for a, b in zip(eager, compiled, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    if INTERPRET:
        with pytest.raises(Failed, match="capacity must be a number"):
            pool.run(compiled_step, 2, parts, None)


# --------------------------------------------------------------------------- arguments, faults


def differing_step(group, rank, options):
    x, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 3, 3])
    logits = options.pop("logits", {}).get(rank, x)
    functions = {"ap": tl.ap_loss, "rank_sort": tl.rank_sort_loss, "ghm_c": tl.ghm_c_loss}
    function = functions[options.pop("loss", ["ap"] * 3)[rank]]
    targets = labels.clamp(max=logits.shape[-1])
    if options.pop("dense", [False] * 3)[rank]:
        targets = torch.zeros_like(logits)
    options = {name: values[rank] for name, values in options.items()}
    if "momentum" in options:
        options["state"] = (torch.zeros(10), torch.zeros(10))
    with tl.backend(BACKEND):
        return function(logits, targets, process_group=group, **options)


DIFFERENT = [
    ({"delta": [1.0, 0.5, 1.0]}, "delta differs .* from 0.5 to 1:"),
    ({"ignore_index": [-1, -1, -2]}, "ignore_index differs .* from -2 to -1"),
    ({"interpolated": [True, False, True]}, "interpolated differs"),
    ({"capacity": [None, 8, 8]}, "capacity differs .* from None to 8"),
    ({"gradients_averaged": [False, True, True]}, "gradients_averaged differs"),
    ({"loss": ["ghm_c"] * 3, "bins": [10, 10, 30]}, "bins differs .* from 10 to 30"),
    ({"loss": ["ghm_c"] * 3, "momentum": [0.5, 0.75, 0.5]}, "momentum differs .* from 0.5 to 0.75"),
    ({"loss": ["ghm_c"] * 3, "normalize": ["all", "nonempty", "all"]}, "normalize differs"),
    ({"loss": ["ghm_c", "ap", "ap"]}, "loss differs .* from ap_loss to ghm_c_loss"),
    ({"dense": [False, False, True]}, "targets differs .* from labels to dense"),
    ({"loss": ["ap", "ap", "rank_sort"]}, "loss differs .* from rank_sort_loss to ap_loss"),
    ({"logits": {1: torch.zeros(6, 4)}}, "number of classes differs .* from 3 to 4"),
    ({"logits": {1: torch.zeros(6, 3).half()}}, "dtype differs .* from float16 to float32"),
]


@pytest.mark.parametrize(("options", "words"), DIFFERENT, ids=lambda p: str(p)[:24])
def test_what_differs_is_named_in_all_processes(pool, options, words):
    for failed in pool.run(differing_step, 3, options, check=False):
        assert isinstance(failed, Failed) and failed.kind == "ValueError"
        assert re.search(words, failed.message)
    pool.run(differing_step, 3, {})  # and the group is as good as before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"process_group": "all"}, TypeError, "process_group must be .* or None; got str"),
        ({"capacity": 0}, ValueError, "capacity must be >= 1 .* got 0"),
        ({"capacity": 1.5}, TypeError, "capacity must be an int; got float"),
        ({"gradients_averaged": 2}, TypeError, "gradients_averaged must be a bool; got int"),
    ],
)
def test_wrong_arguments(options, error, words):
    with pytest.raises(error, match=words):
        tl.ap_loss(torch.zeros(2, 1), torch.tensor([0, 1]), **options)


def outsider_step(group, rank):
    others = dist.new_group([0]) if dist.get_world_size() == 2 else None
    return tl.ap_loss(torch.zeros(2, 1), torch.tensor([0, 1]), process_group=others)


def failing_step(group, rank, how):
    if rank == 1 and how == "leaves":
        os._exit(1)
    if rank == 1:
        raise ValueError("out of data")
    began = time.monotonic()
    try:
        tl.ap_loss(torch.zeros(2, 1), torch.tensor([0, 1]), process_group=group)
    except RuntimeError as error:
        return time.monotonic() - began, str(error)


@pytest.mark.skipif(INTERPRET, reason="says the same in the plain run")
@pytest.mark.parametrize("how", ["raises", "leaves"])
def test_a_lost_process_is_an_error_and_no_hang(how):
    pool = Pool(2, timeout=3)
    try:
        (seconds, message), lost = pool.run(failing_step, 2, how, check=False)
        assert seconds < 6
        assert "did not reach every process of process_group" in message
        assert lost.kind == ("ValueError" if how == "raises" else "EOFError")
    finally:
        pool.close()


@pytest.mark.skipif(INTERPRET, reason="says the same in the plain run")
def test_a_group_of_others_is_named():
    pool = Pool(2, timeout=10)
    try:
        good, failed = pool.run(outsider_step, 2, check=False)
        assert good.item() > 0 and "got a group of others" in failed.message
    finally:
        pool.close()


def factor_step(group, rank):
    x, labels = torch.arange(6.0).view(3, 2) + rank, torch.tensor([0, 2, 2])
    count = (labels < 2).sum() * (rank + 1)
    results = []
    for averaged in (False, True):
        factor = tl.reduce_avg_factor(count, group, gradients_averaged=averaged)
        loss = tl.sigmoid_focal_loss(x, labels, avg_factor=factor)
        results.append((factor, loss))
    run = torch.compile(
        lambda n, g: tl.reduce_avg_factor(n, g) * 2, fullgraph=True, backend="aot_eager"
    )
    return *results, run(count, group)


def test_reduce_avg_factor(pool):
    results = pool.run(factor_step, 3)
    x = torch.cat([torch.arange(6.0).view(3, 2) + rank for rank in range(3)])
    labels = torch.tensor([0, 2, 2]).repeat(3)
    want = tl.sigmoid_focal_loss(x, labels, avg_factor=6)
    summed, averaged = (torch.stack([r[i][1] for r in results]) for i in (0, 1))
    torch.testing.assert_close(summed.sum(), want)
    torch.testing.assert_close(averaged.mean(), want)
    for (total, _), (mean, _), compiled in results:
        assert total == 6 and mean == 2 and compiled == 12
    with pytest.raises(TypeError, match="x must be a tensor; got int"):
        tl.reduce_avg_factor(3, None)


def divided_step(group, rank, logits, labels, averaged):
    """The loss of a share of the batch, its gradient, and that of SetCriterion's class loss."""
    x = logits.clone().requires_grad_()
    count = tl.reduce_avg_factor((labels < 2).sum(), group, gradients_averaged=averaged)
    loss = tl.sigmoid_focal_loss(x, labels, avg_factor=count)
    (gradient,) = torch.autograd.grad(loss, x)
    criterion = tl.SetCriterion(process_group=group, gradients_averaged=averaged)
    objects = labels[labels < 2]
    x = logits.view(1, 1, *logits.shape).clone().requires_grad_()
    boxes = torch.full((1, 1, len(logits), 4), 0.5)
    losses = criterion(x, boxes, [objects], [torch.full((len(objects), 4), 0.3)])
    return loss.detach(), gradient, torch.autograd.grad(losses["total"], x)[0][0, 0]


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("positives", ["everywhere", "in one process", "nowhere"])
@pytest.mark.parametrize("k", [2, 3])
def test_the_normaliser_gives_the_gradient_of_one_process(pool, k, positives, averaged):
    x, labels = torch.randn(k, 5, 2), torch.full((k, 5), 2)
    if positives != "nowhere":
        labels[:, 1], labels[:, 3] = 0, 1
    if positives == "in one process":
        labels[1:] = 2
    shares = PerRank(x), PerRank(labels)
    results = pool.run(divided_step, k, *shares, averaged)
    loss, gradient, of_class = (torch.stack(r) for r in zip(*results, strict=True))
    whole = x.flatten(0, 1).requires_grad_()
    count = (labels < 2).sum()
    want = tl.sigmoid_focal_loss(whole, labels.flatten(), avg_factor=count)
    (expected,) = torch.autograd.grad(want, whole)
    times = k if averaged else 1  # the trainer divides by it
    torch.testing.assert_close(loss.sum() / times, want)
    torch.testing.assert_close(gradient.flatten(0, 1) / times, expected)
    # the objects of an image are matched with its own queries: all that is shared is their number
    alone = []
    for mine, its in zip(x, labels, strict=True):
        one = mine.clone().requires_grad_()
        objects = its[its < 2]
        losses = tl.SetCriterion()(
            one[None, None], torch.full((1, 1, 5, 4), 0.5), [objects],
            [torch.full((len(objects), 4), 0.3)], num_boxes=count,
        )  # fmt: skip
        alone.append(torch.autograd.grad(losses["total"], one)[0])
    torch.testing.assert_close(of_class / times, torch.stack(alone))


# -------------------------------------------------------------------------------------- traffic


def traffic_step(group, rank, rows):
    """(calls, bytes) that one step of each loss hands to the collectives."""
    problem = make("random", 30, 2000, seed=rank)
    x = torch.randn(rows, 4)
    x[: len(problem.labels)] = problem.logits
    labels = torch.full((rows,), 4)
    labels[: len(problem.labels)] = problem.labels
    calls, sizes = dict.fromkeys(TRAFFIC, 0), dict.fromkeys(TRAFFIC, 0)

    def counting(real, loss):
        def collective(tensor, *args, **kwargs):
            calls[loss] += 1
            sizes[loss] += tensor.nbytes
            return real(tensor, *args, **kwargs)

        return collective

    for loss, function in TRAFFIC.items():
        with pytest.MonkeyPatch.context() as patch:
            for name in COLLECTIVES:
                patch.setattr(dist, name, counting(getattr(dist, name), loss))
            with tl.backend(BACKEND):
                function(x, labels, group)
    return calls, sizes


TRAFFIC = {
    "rank_sort": lambda x, labels, g: tl.rank_sort_loss(x, labels, process_group=g),
    "ap": lambda x, labels, g: tl.ap_loss(x, labels, process_group=g),
    "alrp": lambda x, labels, g: tl.alrp_loss(x, labels, torch.rand(len(x)), process_group=g),
    "ghm_c": lambda x, labels, g: tl.ghm_c_loss(x, labels, process_group=g),
    "ghm_r": lambda x, labels, g: tl.ghm_r_loss(x, torch.zeros_like(x), process_group=g),
}


@pytest.mark.parametrize("k", [2, 3])
def test_traffic_does_not_grow_with_the_logits(pool, k):
    """1e4, 1e5 and 1e6 logits in each process, 30 positives in each; as perf/scaling.py counts."""
    logits = (10**4,) if INTERPRET else (10**4, 10**5, 10**6)
    (calls, sizes), *others = [pool.run(traffic_step, k, n // 4)[0] for n in logits]
    assert all(other == (calls, sizes) for other in others)
    for loss in TRAFFIC:
        messages = scaling.traffic(loss, k, 30, kernels=INTERPRET)
        assert (calls[loss], sizes[loss]) == (len(messages), scaling.payload(messages, k))
