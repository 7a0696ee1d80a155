"""What a CUDA compile sees: the graphs that torch.compile captures, without a GPU.

Losses of CPU tensors take the kernels' path (``_FORCE_ON_CPU``) under a fake driver; the graphs of
AOTAutograd are looked at and never run. Numbers do not show what is wrong here: a loss that quietly
takes the eager path, or copies the logits first, is still right.
"""

from __future__ import annotations

import operator

import pytest
import torch
from cases import CASES, case, generator, points

import tritonloss as tl
from tritonloss import _dispatch, _op
from tritonloss import _grid as grid
from tritonloss._dispatch import HAS_TRITON, INTERPRET

if not HAS_TRITON or INTERPRET:
    pytest.skip("the kernels are not compiled", allow_module_level=True)

import triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops import triton_kernel_wrap
from torch._library.triton import get_triton_kernels_for_op
from torch.utils._pytree import tree_map_only

from perf._record import recorded_launches, sm_90

LAUNCHES = ("triton_kernel_wrapper_functional", "triton_kernel_wrapper_mutation")
COPIES = ("clone", "expand", "copy", "contiguous", "_to_copy", "cat", "constant_pad_nd")


@pytest.fixture
def cuda_compile(monkeypatch):
    """Compile on CPU tensors as a machine with an sm_90 would; yields the captured graphs."""
    monkeypatch.setattr(triton.runtime.driver, "_active", sm_90())
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda *a: True)
    monkeypatch.setattr(_dispatch, "_FORCE_ON_CPU", True)
    torch._dynamo.reset()
    triton_kernel_wrap.kernel_side_table.reset_table()
    graphs: list[torch.fx.GraphModule] = []
    yield graphs
    torch._dynamo.reset()


def compiled(function, graphs):
    """``function`` compiled into ``graphs``; running it gives zeros."""

    def capture(module, inputs):
        graphs.append(module)
        outputs = [n and n.meta["val"] for n in module.graph.output_node().args[0]]

        def zeros(*args):
            return [
                torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).zero_()
                if isinstance(v, torch.Tensor)
                else v
                for v in outputs
            ]

        return make_boxed_func(zeros)

    backend = aot_autograd(fw_compiler=capture, bw_compiler=capture)
    return torch.compile(function, backend=backend, fullgraph=True)


def kernels_of(graph) -> list[str]:
    """Names of the kernels that a graph launches, in order."""
    table = triton_kernel_wrap.kernel_side_table
    return [
        table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target.__name__ in LAUNCHES
    ]


def large_copies(graph, size: int) -> list[str]:
    """Nodes that may write ``size`` elements again."""
    return [
        str(node)
        for node in graph.graph.nodes
        if node.op == "call_function"
        and str(node.target).split(".")[-2:-1] in [[name] for name in COPIES]
        and node.meta["val"].numel() >= size
    ]


def mutated_inputs(graph) -> list[str]:
    """Pointers to what the graph did not allocate, yet believes to be written by a kernel."""

    def origin(written):
        """What launch after launch wrote to."""
        while written.target is operator.getitem:
            launch, name = written.args
            written = launch.kwargs["kwargs"][name]
        return written

    return [
        name
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target.__name__ in LAUNCHES
        for name in node.kwargs.get("tensors_to_clone", ())
        if "empty" not in str(origin(node.kwargs["kwargs"][name]).target)
    ]


def plain_axes(loss, **axes):
    """A contiguous float32 point of this loss' axes that reduces to a mean."""
    first = points(loss)[0]._replace(
        rows=64, layout="contiguous", dtype="float32", reduction="mean", weight=None,
        class_weight=False, avg_factor=None, logits="random",
    )  # fmt: skip
    return first._replace(**axes)


def capture_both(loss, graphs, axes):
    """Forward and backward graph of one call, and the problem."""
    problem = loss.problem(axes, generator(0))
    x = problem.x.detach().requires_grad_()

    def call(x):
        return loss.function(x, *problem.args, **problem.kwargs)

    value = compiled(call, graphs)(x)
    value.backward(torch.ones((), dtype=value.dtype).expand(value.shape))
    forward, backward = graphs
    return forward, backward, problem


def _variants():
    for loss in CASES:
        for reduction in ("mean", "sum", "none"):
            yield pytest.param(loss, {"reduction": reduction}, id=f"{loss.name}-{reduction}")
        yield pytest.param(loss, {"dtype": "bfloat16", "layout": "nchw"}, id=f"{loss.name}-nchw")
        weighted = {"weight": "row", "layout": "sliced", "reduction": "none"}
        yield pytest.param(loss, weighted, id=f"{loss.name}-sliced-weighted")
    for form in ("quality", "dense"):
        for reduction in ("mean", "none"):
            axes = {"form": form, "weight": "logit", "layout": "sliced", "reduction": reduction}
            yield pytest.param(case("focal"), axes, id=f"focal-{form}-sliced-{reduction}")


@pytest.mark.parametrize(("loss", "axes"), list(_variants()))
def test_one_kernel_each_way_and_no_copy(loss, axes, cuda_compile):
    point = plain_axes(loss, **axes)
    forward, backward, problem = capture_both(loss, cuda_compile, point)
    names = loss.kernels
    finish = [] if point.reduction == "none" else ["finish_kernel"]
    assert kernels_of(forward) == [names[0], *finish]
    assert kernels_of(backward) == [names[1]]
    for graph in (forward, backward):
        assert not large_copies(graph, problem.x.shape[:-1].numel()), graph.code
        # An input that a kernel is believed to write would be copied, and keep CUDA graphs away.
        assert not mutated_inputs(graph), graph.code


def head(sizes, channels: int = 20):
    """Levels of a channels-first head."""
    return [torch.randn(2, channels, s, s, requires_grad=True) for s in sizes]


def by_row(levels, last: int) -> list[torch.Tensor]:
    return [torch.randint(last, (2, *t.shape[2:])) for t in levels]


# name -> (loss of levels with class_dim=1, channels, what lies beside)
HEADS = {
    "focal": (tl.sigmoid_focal_loss, 20, lambda x: by_row(x, 21)),
    "quality_focal": (
        tl.quality_focal_loss,
        20,
        lambda x: (by_row(x, 21), [torch.rand(2, *t.shape[2:]) for t in x]),
    ),
    "softmax_focal": (tl.softmax_focal_loss, 20, lambda x: by_row(x, 20)),
    "distribution_focal": (
        tl.distribution_focal_loss,
        17,
        lambda x: [torch.rand(2, *t.shape[2:]) for t in x],
    ),
    "giou": (tl.giou_loss, 4, lambda x: [torch.zeros(t.shape) for t in x]),
    "ghm_c": (tl.ghm_c_loss, 20, lambda x: by_row(x, 21)),
    "rank_sort": (
        lambda *args, **kwargs: sum(tl.rank_sort_loss(*args, **kwargs)),
        20,
        lambda x: (by_row(x, 21), [torch.rand(2, *t.shape[2:]) for t in x]),
    ),
    "ap": (tl.ap_loss, 20, lambda x: by_row(x, 21)),
}


RANKED = ("rank_sort", "ap")  # their scratch, a few numbers, is written by kernel after kernel


def head_kernels(name: str, n: int) -> tuple[list[str], list[str]]:
    """Of forward and backward over n levels: the passes over logits run once a level."""
    if name in RANKED:
        forward = [*["compact_kernel"] * n, "order_kernel", "merge_kernel", "prepare_kernel",
                   *["negatives_kernel"] * n, "collect_kernel", "settle_kernel"]  # fmt: skip
        return forward, ["negatives_kernel", "scatter_kernel"] * n
    if name == "ghm_c":
        forward = [*["region_sums_kernel"] * n, "region_totals_kernel", "harmonise_kernel"]
        return forward, ["pointwise_kernel"] * n
    first, second = case(name).kernels
    return [*[first] * n, "finish_kernel"], [second] * n


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_read_where_it_lies(name, cuda_compile):
    function, channels, beside = HEADS[name]
    x = head([16, 8, 4, 2, 2], channels)
    targets = beside(x)
    call = compiled(lambda x: function(x, targets, class_dim=1), cuda_compile)
    call(x).backward()
    forward, backward = cuda_compile
    assert (kernels_of(forward), kernels_of(backward)) == head_kernels(name, 5)
    for graph in cuda_compile:
        assert not large_copies(graph, x[-1][:, 0].numel()), graph.code
        assert name in RANKED or not mutated_inputs(graph), graph.code


@pytest.mark.parametrize("name", HEADS)
def test_other_sizes_of_levels_compile_once_more(name, cuda_compile):
    """Multi-scale training: the second size makes the sizes symbolic."""
    function, channels, beside = HEADS[name]
    call = compiled(lambda x, targets: function(x, targets, class_dim=1), cuda_compile)
    # ranking chooses its numbers of programs by the size: these lie between two of its limits
    sizes = (20, 26, 22, 24, 18) if name in RANKED else (8, 12, 10, 14, 20, 16)
    for size in sizes:
        x = head([4 * size, 2 * size, size], channels)
        with torch.no_grad():
            call(x, beside(x))
    assert len(cuda_compile) <= 2, "fixed and symbolic sizes"


def count_graphs(call, graphs, values) -> int:
    x = torch.randn(64, 80, requires_grad=True)
    labels = torch.zeros(64, dtype=torch.long)
    function = compiled(lambda x, v: call(x, labels, v), graphs)
    for value in values:
        function(x, value).backward()
    assert len(graphs) % 2 == 0
    assert all("pointwise_kernel" in kernels_of(graph) for graph in graphs)
    return len(graphs) // 2


SCHEDULES = {
    "focal gamma": lambda x, t, v: tl.sigmoid_focal_loss(x, t, gamma=v),
    "quality_focal beta": lambda x, t, v: tl.quality_focal_loss(x, t, beta=v),
    "varifocal gamma": lambda x, t, v: tl.varifocal_loss(x, t, gamma=v),
    "focal avg_factor": lambda x, t, v: tl.sigmoid_focal_loss(x, t, avg_factor=v),
}


@pytest.mark.parametrize("call", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_scheduled_numbers_compile_at_most_twice(call, cuda_compile):
    values = [2.0 + 0.1 * i for i in range(12)]  # Dynamo gives up after 8 graphs
    assert count_graphs(call, cuda_compile, values) <= 2


@pytest.mark.parametrize("call", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_scheduled_tensors_compile_once(call, cuda_compile):
    values = [torch.tensor(2.0 + 0.1 * i) for i in range(3)]
    assert count_graphs(call, cuda_compile, values) == 1


def diagnosed(x, labels, diagnosis=tl.Diagnosis()):  # noqa: B008 (one that outlives the call)
    """A diagnosis beside the loss that it watches."""
    if diagnosis.counts is None:
        diagnosis.counts = torch.zeros(grid.ROWS, grid.COLUMNS, dtype=torch.int64)
    diagnosis.update(x, labels)
    return tl.sigmoid_focal_loss(x, labels)


RANKING = [
    "compact_kernel", "order_kernel", "merge_kernel", "prepare_kernel", "negatives_kernel",
    "collect_kernel",
]  # fmt: skip
# Loss of (x, labels, quality) -> kernels of its forward
WHOLE_BATCH = {
    "rank_sort": (
        lambda x, l, q: sum(tl.rank_sort_loss(x, (l, q))),
        [*RANKING, "settle_kernel"],
    ),
    "ap": (lambda x, l, q: tl.ap_loss(x, l), [*RANKING, "settle_kernel"]),
    "alrp": (
        lambda x, l, q: sum(tl.alrp_loss(x, l, q)),
        [*RANKING, "settle_kernel", "scatter_kernel"],
    ),
    "ghm_c": (
        lambda x, l, q: tl.ghm_c_loss(x, l),
        ["region_sums_kernel", "region_totals_kernel", "harmonise_kernel"],
    ),
    "diagnosis": (
        lambda x, l, q: diagnosed(x, l),
        ["count_kernel", "sum_copies_kernel", "pointwise_kernel", "finish_kernel"],
    ),
}


@pytest.mark.parametrize("name", WHOLE_BATCH)
def test_losses_of_the_whole_batch_copy_nothing(name, cuda_compile):
    """A kernel that torch.compile believes to write to its inputs gets a copy of them."""
    loss, kernels = WHOLE_BATCH[name]
    rows = 640
    x = torch.randn(rows, 80, requires_grad=True)
    labels, quality = torch.full((rows,), 80), torch.rand(rows)
    compiled(lambda x: loss(x, labels, quality), cuda_compile)(x).backward()
    forward, _ = cuda_compile
    assert kernels_of(forward) == kernels
    for graph in cuda_compile:
        assert not large_copies(graph, rows), graph.code


def registered_ops() -> list[str]:
    schemas = torch._C._jit_get_all_schemas()
    prefix = f"{_op.NAMESPACE}::"
    names = sorted(s.name for s in schemas if s.name.startswith(prefix))
    # plain torch, and what talks to other processes, stand in a graph as they are
    return [name for name in names if not name.endswith(("_eager", "_shared"))]


@pytest.mark.parametrize("name", registered_ops())
def test_compile_cache_sees_the_kernels(name):
    """Else a compiled graph would outlive an edit of its kernels."""
    kernels = get_triton_kernels_for_op(name)
    assert kernels, f"{name}: write wrap_triton(kernel) with the kernel's own name in the op's body"
    names = {k.fn.__name__ for k in kernels}
    backward = name.endswith("_backward") or "expectation" in name
    last = {
        "finish_kernel", "means_kernel", "harmonise_kernel", "sum_copies_kernel",
        "matching_cost_kernel",
    }  # fmt: skip
    assert backward or names & last, "the last kernel is missing"


@pytest.mark.parametrize("loss", CASES, ids=lambda c: c.name)
def test_eager_launches_the_kernel_itself(loss, monkeypatch):
    """Not through the wrapper for graphs, which costs more than a small kernel."""

    def refuse(*args, **kwargs):
        raise AssertionError("an eager launch went through wrap_triton")

    monkeypatch.setattr(triton_kernel_wrap.TraceableTritonKernelWrapper, "__getitem__", refuse)
    problem = loss.problem(plain_axes(loss), generator(0))
    with recorded_launches() as launches:
        x = problem.x.detach().to("meta").requires_grad_()
        args, kwargs = tree_map_only(
            torch.Tensor, lambda t: t.to("meta"), (problem.args, problem.kwargs)
        )
        loss.function(x, *args, **kwargs).backward()
    forward, backward = loss.kernels
    assert [launch.name for launch in launches] == [forward, "finish_kernel", backward]


def test_functorch_predicate_is_right_under_dynamo(cuda_compile):
    """peek_interpreter_stack() is set there without any transform: all would be eager."""
    x, labels = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)

    def uses_kernels(x):
        return x + _dispatch.use_triton(x)

    seen = torch.compile(uses_kernels, backend="eager", fullgraph=True)(torch.zeros(3))
    assert seen.all(), "traced code takes the eager path"
    gradient = torch.func.grad(lambda x: tl.sigmoid_focal_loss(x, labels))(x)
    assert gradient.abs().sum() > 0, "under a transform the eager path runs"
