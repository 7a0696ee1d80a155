"""A tile of logits with their targets and weights, for every kernel that reads logits.

A tile takes consecutive logits in memory order. With label targets it finds rows and classes by
division, once for the run of neighbours that a 16-byte load brings; dense operands that lie in
memory like the logits need no index at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._walk import (
    MAX_DIMS,
    MAX_INNER_SIZE,
    Walk,
    cached,
    contiguous_strides,
    load_or_zero,
    merged_dims,
    offset_of,
    same_memory_order,
)


@triton.jit
def offsets(
    start,
    offs,
    coords,  # of offs; the outer three may have fewer elements: [runs, 1]
    strides,  # of x, rows, dense target, weight
    N_DIMS: tl.constexpr,
    CLASS_DIM: tl.constexpr,
    LINEAR: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
):
    """Where a tile of logits lies: offsets of x, rows, dense targets and weights; its classes.

    A tile is [logits], or [runs, logits of a run]: those of a run are neighbours in the
    innermost dim, so that all that does not change along it is worked out once a run.
    """
    x_strides, row_strides, dense_strides, weight_strides = strides
    if CLASS_DIM == 3:  # rows do not end inside a run
        row = offset_of((coords[0], coords[1], coords[2], 0), row_strides, 4)
    else:
        row = offset_of(coords, row_strides, N_DIMS)
    if CLASS_DIM < 0:
        cls = tl.zeros(coords[2].shape, tl.int64)
    else:
        cls = coords[CLASS_DIM]
    if LINEAR:
        x = start + offs
        dense = x
        weight = x
    else:
        x = offset_of(coords, x_strides, N_DIMS)
        dense = offset_of(coords, dense_strides, N_DIMS)
        weight = offset_of(coords, weight_strides, N_DIMS)
    if ROW_WEIGHT:
        weight = row
    return x, row, dense, weight, cls


@triton.jit
def targets_and_mask(
    x,
    dense,
    label,
    weight,
    inside,
    cls,
    within,
    n_classes,
    ignore_index,
    HAS_LABEL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IS_LOGIT: tl.constexpr = True,
):
    """What the loaded values mean: ``(x, y, positive, keep, scale)``, y without box qualities.

    ``keep`` is False beyond the end, for ignored rows and for weights of 0: whatever was stored
    there, NaN included, x and scale hold it, and the caller drops what it made of them.

    A function without pointers, like ``offsets``: where a value that came out of a function decides
    what a kernel writes to, torch.compile takes all pointers that went in for written, and copies
    what they point to. Such a kernel loads in its own body.
    """
    keep = inside
    scale = tl.full(inside.shape, 1.0, tl.float32)
    if HAS_WEIGHT:
        scale = weight.to(tl.float32)
        keep = keep & (scale > 0)
    if HAS_LABEL:
        label = label.to(tl.int64)
        # One comparison of 64 bits: below 0 is far above as an unsigned number. Then 32 are enough.
        keep = keep & (label.to(tl.uint64, bitcast=True) <= tl.cast(n_classes, tl.uint64))
        ignored = tl.cast(ignore_index, tl.int64)
        ignored = tl.where((ignored >= 0) & (ignored <= n_classes), ignored, -1).to(tl.int32)
        keep = keep & (label.to(tl.int32) != ignored)
        # a difference: nothing but the comparison is left for each logit of a run
        positive = keep & ((label - (cls - within)).to(tl.int32) == within)
        y = tl.where(positive, 1.0, 0.0)
    else:
        y = tl.where(keep, dense.to(tl.float32), 0.0)
        positive = y > 0
    x = x.to(tl.float32)
    if IS_LOGIT:  # a class that -inf masks: neither loss nor gradient
        x = tl.maximum(x, tl.where(positive, float("-inf"), -1e30), tl.PropagateNan.ALL)
    x += 0.0 * x  # an infinite logit gives NaN, not a plausible number
    return x, y, positive, keep, scale


@triton.jit
def load_logits(
    tile,  # start, run [runs, 1], within [1, logits of a run], n
    pointers,  # x, dense target, label, quality, weight, class weight
    classes,  # n_classes, ignore_index
    coords,
    strides,  # of x, rows, dense target, weight
    WALK: tl.constexpr,  # N_DIMS, CLASS_DIM, LINEAR, ROW_WEIGHT
    MASKED: tl.constexpr,
    IS_LOGIT: tl.constexpr,
):
    """A tile of logits with their targets, as ``targets_and_mask`` returns them."""
    start, run, within, n = tile
    x_ptr, dense_ptr, label_ptr, quality_ptr, weight_ptr, class_weight_ptr = pointers
    n_classes, ignore_index = classes
    CLASS_DIM: tl.constexpr = WALK[1]
    offs = run + within
    # a run lies inside as a whole, or not at all
    inside = run < n - start if MASKED else tl.full(run.shape, 1, tl.int1)
    x_at, row, dense_at, weight_at, cls = offsets(
        start, offs, coords, strides, WALK[0], WALK[1], WALK[2], WALK[3]
    )
    x = load_or_zero(x_ptr + x_at, MASKED, inside)
    dense = run
    label = run
    weight = run
    if weight_ptr is not None:
        weight = load_or_zero(weight_ptr + weight_at, MASKED, inside)
    if label_ptr is not None:
        label = load_or_zero(label_ptr + row, MASKED, inside)
    else:
        dense = load_or_zero(dense_ptr + dense_at, MASKED, inside)
    x, y, positive, keep, scale = targets_and_mask(
        x,
        dense,
        label,
        weight,
        inside,
        cls,
        within,
        n_classes,
        ignore_index,
        label_ptr is not None,
        weight_ptr is not None,
        IS_LOGIT,
    )
    if quality_ptr is not None:
        if CLASS_DIM == 3:
            read = inside & (label >= 0) & (label < n_classes)
            quality = tl.load(quality_ptr + row, mask=read, other=0.0).to(tl.float32)
            y = tl.where(positive, quality, 0.0)
        else:
            y = tl.load(quality_ptr + row, mask=positive, other=0.0).to(tl.float32)
    if class_weight_ptr is not None:
        scale *= load_or_zero(class_weight_ptr + cls, MASKED, inside).to(tl.float32)
    return x, y, positive, keep, scale


def walkable(x, *others) -> bool:
    """True if the kernel can read ``x`` and the other per-logit tensors in place."""
    if x.dim() <= MAX_DIMS and x.numel() <= MAX_INNER_SIZE:
        return True
    rows = (*contiguous_strides(x.shape[:-1]), 0)
    class_index = (*(0,) * (x.dim() - 1), 1)
    per_logit = [t.stride() for t in others if t is not None and t.dim() == x.dim()]
    return merged_dims(x.shape, [x.stride(), rows, class_index, *per_logit]) is not None


def walk_over(x, dense, labels, weight, class_weight=None, per_logit=(), *strides) -> Walk:
    """How a kernel goes over the logits and what lies beside them: numbers of x, rows, dense
    targets, weights, then what else is read.

    ``per_logit``: further tensors of x' shape, or None; ``strides``: of what else is read.
    """
    row_weight = weight is not None and weight.dim() < x.dim()
    beside = dense, None if row_weight else weight, *per_logit
    by_row = labels is not None or row_weight
    return _walk(
        x.shape,
        x.stride(),
        tuple([None if t is None else t.stride() for t in beside]),
        strides,
        by_row,
        row_weight,
        by_row or class_weight is not None,
        x.element_size(),
    )


@cached
def _walk(shape, x_strides, beside, strides, by_row, row_weight, by_class, itemsize) -> Walk:
    zeros = (0,) * len(shape)
    linear = same_memory_order(shape, [x_strides, *[s for s in beside if s is not None]])
    rows = (*contiguous_strides(shape[:-1]), 0) if by_row else zeros
    classes = (*zeros[:-1], 1 if by_class else 0)
    beside = [zeros if s is None or linear else s for s in beside]
    layout = merged_dims(shape, [x_strides, rows, classes, *beside, *strides])
    run = 16 // itemsize if layout.n_dims > 1 else 1
    while layout.sizes[-1] % run:
        run //= 2
    class_s = layout.strides[2]
    constants = {
        "N_DIMS": layout.n_dims,
        # where the kernel finds the class, or -1
        "CLASS_DIM": class_s.index(1) if 1 in class_s else -1,
        # all of them lie in one block of memory in the same order
        "LINEAR": linear,
        "ROW_WEIGHT": row_weight,
        # neighbours that share all but the innermost coordinate: a 16-byte load of them
        "RUN": run,
    }
    read = [k for k in range(len(layout.strides)) if k != 2]
    return Walk(layout.numbers(*read), constants)
