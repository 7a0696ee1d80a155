"""Passes over the logits of the ranking losses.

* ``compact``   collects the P positives in any order.
* ``negatives`` forward: count and summed distance to the knot of the negatives in each segment
  between two knots; backward: their gradient, by a look-up of value and slope.
* ``collect``   adds the private copies of that histogram; integers, so that no order of atomics
  shows.
* ``scatter``   writes what belongs to the positives.
"""

import triton
import triton.language as tl

from ._logits import offsets, targets_and_mask
from ._numbers import Constant
from ._ranking_pairs import violators
from ._ranking_scratch import (
    COUNT,
    OFFSET,
    OTHER,
    OWN,
    count_positives,
    load_delta,
    lookup_tables,
    tables,
    wide,
)
from ._ranking_table import (
    cell_of,
    first_jump,
    load_plan,
    most_of_a_cell,
    power_of_2,
    search,
    table_scale,
    unpacked,
    words_of,
)
from ._walk import coordinates, offset_of, tile_of

# Where a thread's count begins beside its sum of distances: with `fraction_bits` of n logits, of
# which at most 2**-18 are its own, the sum lies below 2**45, and 2**31 logits are 2**13 a thread.
OWN_SHIFT = Constant(48)


@triton.jit(do_not_specialize=["item_start"])
def compact_kernel(
    # pointers
    x_ptr,  # logits
    dense_ptr,  # dense targets, or None
    label_ptr,  # [rows] integers, or None
    value_ptr,  # [rows] quality or localisation error, or None
    weight_ptr,  # [rows] or per logit, or None
    group_ptr,  # list of each logit, or None
    raw_ptr,  # [2, capacity] float32 out: score, value
    raw_list_ptr,  # [capacity] int32 out, or None
    raw_item_ptr,  # [capacity] int64 out
    counter_ptr,  # [2] int64: positives, flag of something not finite
    # shapes
    item_start,  # items of the levels before
    n_items,  # rows with labels, logits with dense targets
    n_classes,
    num_groups,
    capacity,
    size_1,
    size_2,
    size_3,
    # strides
    x_s0,
    x_s1,
    x_s2,
    x_s3,
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    dense_s0,
    dense_s1,
    dense_s2,
    dense_s3,
    weight_s0,
    weight_s1,
    weight_s2,
    weight_s3,
    group_s0,
    group_s1,
    group_s2,
    group_s3,
    x_class,  # strides over classes, read with labels
    weight_class,
    group_class,
    # scalars
    ignore_index,
    # constants
    HAS_KEY: tl.constexpr,  # dense targets are qualities to sort by
    N_DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1-D grid; program i takes items [i BLOCK, (i+1) BLOCK)."""
    capacity = wide(capacity)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    inside = offs < n_items - start
    coords = coordinates(start, offs, (1, size_1, size_2, size_3), N_DIMS)
    row = offset_of(coords, (row_s0, row_s1, row_s2, row_s3), N_DIMS)
    if label_ptr is not None:
        cls = tl.load(label_ptr + row, mask=inside, other=-1).to(tl.int64)
        positive = inside & (cls >= 0) & (cls < n_classes) & (cls != ignore_index)
        value = tl.full(offs.shape, 1.0, tl.float32)
    else:
        cls = tl.zeros(offs.shape, tl.int64)
        dense = offset_of(coords, (dense_s0, dense_s1, dense_s2, dense_s3), N_DIMS)
        value = tl.load(dense_ptr + dense, mask=inside, other=0.0).to(tl.float32)
        positive = inside & (value > 0)
    if weight_ptr is not None:
        weight = offset_of(coords, (weight_s0, weight_s1, weight_s2, weight_s3), N_DIMS)
        weight += cls * weight_class
        weight = tl.load(weight_ptr + weight, mask=positive, other=0.0).to(tl.float32)
        positive = positive & (weight > 0)
    group = tl.zeros(offs.shape, tl.int64)
    if group_ptr is not None:
        group = offset_of(coords, (group_s0, group_s1, group_s2, group_s3), N_DIMS)
        group += cls * group_class
        group = tl.load(group_ptr + group, mask=positive, other=-1).to(tl.int64)
        positive = positive & (group >= 0) & (group < num_groups)
    if value_ptr is not None:
        value = tl.load(value_ptr + row, mask=positive, other=0.0).to(tl.float32)
    elif not HAS_KEY:
        value = tl.zeros(offs.shape, tl.float32)
    x = offset_of(coords, (x_s0, x_s1, x_s2, x_s3), N_DIMS) + cls * x_class
    x = tl.load(x_ptr + x, mask=positive, other=0.0).to(tl.float32)
    # Neither may reach the order of the positives, which a NaN would make intransitive.
    x_bad = positive & (0.0 * x != 0.0)
    value_bad = positive & (0.0 * value != 0.0)
    if tl.sum((x_bad | value_bad).to(tl.int32), 0) > 0:
        tl.store(counter_ptr + 1, 1)

    found = positive.to(tl.int32)
    place = tl.cumsum(found, 0) - found
    first = tl.atomic_add(counter_ptr, tl.sum(found, 0).to(tl.int64), sem="relaxed")
    place = first + place
    mask = positive & (place < capacity)
    tl.store(raw_ptr + place, tl.where(x_bad, 0.0, x), mask=mask)
    tl.store(raw_ptr + capacity + place, tl.where(value_bad, 0.0, value), mask=mask)
    if raw_list_ptr is not None:
        tl.store(raw_list_ptr + place, group.to(tl.int32), mask=mask)
    tl.store(raw_item_ptr + place, item_start + start + offs, mask=mask)


@triton.jit
def segment_of(
    x, active, group, knot_ptr, list_ptr, table_ptr, num_groups, table, jump,
    HAS_GROUP: tl.constexpr,
):  # fmt: skip
    """Knot at the start of x's segment, and whether there is one."""
    if HAS_GROUP:
        first = 2 * tl.load(list_ptr + group, mask=active, other=0)
        many = 2 * tl.load(list_ptr + num_groups + group, mask=active, other=0)
        lowest = first
    else:
        cells = table[0]  # none without positives
        cell_ptrs = table_ptr + cell_of(x, cells, table[1], table[2])
        cell = tl.load(cell_ptrs, mask=active & (cells > 0), other=0)
        first = cell.to(tl.int32)
        many = (cell >> 32).to(tl.int32)
        lowest = 0
    knot = first + search(x, active, knot_ptr, first, many, jump) - 1
    return knot, active & (knot >= lowest)


@triton.jit
def negatives_kernel(
    # pointers
    x_ptr,  # logits
    dense_ptr,  # dense targets, or None
    label_ptr,  # [rows] integers, or None
    weight_ptr,  # [rows] or per logit, or None
    group_ptr,  # list of each logit, or None
    float_ptr,  # see ``tables``
    lookup_ptr,  # int64, see ``lookup_words``
    list_ptr,  # [2, num_groups]
    histogram_ptr,  # forward: [copies, 2 P] int64, or [copies, 2 P, 2]; or None
    counter_ptr,
    delta_ptr,
    grad_ptr,  # backward: [] upstream gradient, or None
    out_ptr,  # backward: gradient of the logits
    # shapes
    n,
    n_classes,
    num_groups,
    capacity,
    size_1,
    size_2,
    size_3,
    # strides
    x_s0,
    x_s1,
    x_s2,
    x_s3,
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    dense_s0,
    dense_s1,
    dense_s2,
    dense_s3,
    weight_s0,
    weight_s1,
    weight_s2,
    weight_s3,
    out_s0,
    out_s1,
    out_s2,
    out_s3,
    group_s0,
    group_s1,
    group_s2,
    group_s3,
    # scalars
    ignore_index,
    delta,
    # constants
    BACKWARD: tl.constexpr,
    APART: tl.constexpr,  # the common segment is kept, too, where count and distance are apart
    N_DIMS: tl.constexpr,
    CLASS_DIM: tl.constexpr,
    LINEAR: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
    RUN: tl.constexpr,  # logits that share a row or a class
    BLOCK: tl.constexpr,
):
    """Forward: histogram of the negatives over segments. Backward: gradient of all logits.

    1-D grid of persistent programs; each takes every num_programs-th tile of BLOCK logits.
    """
    capacity = wide(capacity)
    _, knot_ptr, _, scale_ptr = tables(float_ptr, capacity)
    _, per_unit = load_delta(delta_ptr, delta)
    n_pos = count_positives(counter_ptr, capacity)
    run, within = tile_of(BLOCK, RUN)
    offs = run + within
    sizes = (1, size_1, size_2, size_3)
    strides = (
        (x_s0, x_s1, x_s2, x_s3),
        (row_s0, row_s1, row_s2, row_s3),
        (dense_s0, dense_s1, dense_s2, dense_s3),
        (weight_s0, weight_s1, weight_s2, weight_s3),
    )
    group_strides = (group_s0, group_s1, group_s2, group_s3)
    # How the search begins: in a cell of the table, or among the knots of a list.
    table_ptr, most_ptr, plan_ptr, _ = lookup_tables(lookup_ptr, capacity)
    table = table_scale(knot_ptr, n_pos)
    if group_ptr is not None:
        jump = first_jump(2 * n_pos)
    else:
        jump = first_jump(most_of_a_cell(most_ptr, table[0]))
    upstream = 0.0
    if BACKWARD:
        upstream = tl.load(grad_ptr).to(tl.float32) * tl.load(scale_ptr)
    else:
        copies, fraction, shift = load_plan(plan_ptr)
        histogram_ptr += (tl.program_id(0) % copies) * words_of(n_pos, shift)
        units = power_of_2(fraction)
        # the count and the distance of a thread's own logits share a word in any case
        own_shift = tl.where(shift > 0, shift, OWN_SHIFT) if APART else shift
        one = tl.cast(1, tl.int64) << own_shift
        bad = tl.zeros(offs.shape, tl.int32)
        in_common = tl.zeros(offs.shape, tl.int64)
        common = tl.cast(-1, tl.int32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if not BACKWARD and group_ptr is None:
        # Most logits of an untrained model lie in one segment. What lies in that of the program's
        # first logit stays in registers, or all would wait for one address.
        one_item = tl.zeros([1], tl.int32)
        if LINEAR:
            sample_at = start + one_item
        else:
            sample_at = offset_of(coordinates(start, one_item, sizes, N_DIMS), strides[0], N_DIMS)
        sample = tl.load(x_ptr + sample_at).to(tl.float32)
        common_knot, any_knot = segment_of(
            sample, one_item == 0, one_item, knot_ptr, list_ptr, table_ptr, num_groups, table, jump,
            False,
        )  # fmt: skip
        common = tl.max(tl.where(any_knot, common_knot, -1), 0)
    while start < n:
        coords = coordinates(start, run, sizes, N_DIMS, within)
        x_at, row, dense_at, weight_at, cls = offsets(
            start, offs, coords, strides, N_DIMS, CLASS_DIM, LINEAR, ROW_WEIGHT
        )
        group_at = offset_of(coords, group_strides, N_DIMS)
        inside = run < n - start
        # Loaded here, not in a function: see ``targets_and_mask``. Unmasked loads take 16 bytes.
        if start + BLOCK <= n:
            x = tl.load(x_ptr + x_at)
            dense = tl.load(dense_ptr + dense_at) if dense_ptr is not None else run
            label = tl.load(label_ptr + row) if label_ptr is not None else run
            weight = tl.load(weight_ptr + weight_at) if weight_ptr is not None else run
            group = tl.load(group_ptr + group_at) if group_ptr is not None else run
        else:
            x = tl.load(x_ptr + x_at, inside, 0)
            dense = tl.load(dense_ptr + dense_at, inside, 0) if dense_ptr is not None else run
            label = tl.load(label_ptr + row, inside, 0) if label_ptr is not None else run
            weight = tl.load(weight_ptr + weight_at, inside, 0) if weight_ptr is not None else run
            group = tl.load(group_ptr + group_at, inside, 0) if group_ptr is not None else run
        x, y, positive, keep, _scale = targets_and_mask(
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
        )
        negative = keep & (y == 0.0) & ~positive
        if group_ptr is not None:
            negative = negative & (group >= 0) & (group < num_groups)
            group = tl.where(negative, group, 0).to(tl.int32)
        knot, found = segment_of(
            x, negative, group, knot_ptr, list_ptr, table_ptr, num_groups, table, jump,
            group_ptr is not None,
        )  # fmt: skip
        word_ptr = lookup_ptr + (2 * knot if BACKWARD else knot)
        high, low = unpacked(tl.load(word_ptr, mask=found, other=0))
        # Outside all windows the distance can be anything: it is never used.
        distance = tl.minimum(tl.maximum(((x - high) - low) * per_unit, 0.0), 1.0)
        if BACKWARD:
            level, slope = unpacked(tl.load(word_ptr + 1, mask=found, other=0))
            g = tl.where(found, (level + slope * distance) * upstream, 0.0)
            # a non-finite logit makes the scale NaN: every negative shows it
            g = tl.where(negative, g + 0.0 * upstream, 0.0)
            if LINEAR:
                out = out_ptr + start + offs
            else:
                out = out_ptr + offset_of(coords, (out_s0, out_s1, out_s2, out_s3), N_DIMS)
            if start + BLOCK <= n:
                tl.store(out, g)
            else:
                tl.store(out, g, mask=inside)
        else:
            bad = bad | (negative & (x != x)).to(tl.int32)
            amount = tl.where(found, distance * units, 0.0).to(tl.int64)
            theirs = found & (knot == common)
            elsewhere = found & (knot != common)
            slot = histogram_ptr + knot
            if APART or shift > 0:
                in_common += tl.where(theirs, one + amount, 0)
                found = elsewhere
            if shift > 0:
                tl.atomic_add(slot, one + amount, mask=found, sem="relaxed")
            else:
                slot += knot
                tl.atomic_add(slot, tl.full(slot.shape, 1, tl.int64), mask=found, sem="relaxed")
                tl.atomic_add(slot + 1, amount, mask=found & (amount > 0), sem="relaxed")
        start += tl.num_programs(0).to(tl.int64) * BLOCK
    if not BACKWARD:
        if common >= 0:
            common_slot = histogram_ptr + common
            if shift > 0:
                tl.atomic_add(common_slot, tl.sum(in_common), sem="relaxed")
            elif APART:
                common_slot += common
                tl.atomic_add(common_slot, tl.sum(in_common >> own_shift), sem="relaxed")
                tl.atomic_add(common_slot + 1, tl.sum(in_common & (one - 1)), sem="relaxed")
        if tl.sum(bad) > 0:
            tl.store(counter_ptr + 1, 1)


@triton.jit
def collect_kernel(
    # pointers
    histogram_ptr,  # [copies, 2 P] int64, or [copies, 2 P, 2]
    float_ptr,  # see ``tables``; of knots out: COUNT, OFFSET; PAIRS: as `violators` takes them
    total_ptr,  # [2, 2 capacity] int64 out instead, for other processes to add to; or None
    lookup_ptr,
    place_ptr,
    sum_ptr,
    counter_ptr,
    delta_ptr,
    # shapes
    capacity,
    collectors,
    # scalars
    delta,
    # constants
    PAIRS: tl.constexpr,
    ACROSS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1-D grid: ``collectors`` programs over blocks of segments add the copies, COPIES at a time;
    the others look for ``violators``."""
    capacity = wide(capacity)
    positive_ptr, knot_ptr, value_ptr, _ = tables(float_ptr, capacity)
    n_pos = count_positives(counter_ptr, capacity)
    if PAIRS:  # noqa: SIM102 (decided when compiled)
        if tl.program_id(0) >= collectors:
            half, per_unit = load_delta(delta_ptr, delta)
            violators(
                positive_ptr,
                place_ptr,
                value_ptr,
                sum_ptr,
                capacity,
                n_pos,
                half,
                per_unit,
                tl.program_id(0) - collectors,
                tl.num_programs(0) - collectors,
                ACROSS,
            )
            return
    _, _, plan_ptr, _ = lookup_tables(lookup_ptr, capacity)
    copies, fraction, shift = load_plan(plan_ptr)
    each = words_of(n_pos, shift)
    amount_bits = (tl.cast(1, tl.int64) << shift) - 1
    first = tl.program_id(0) * BLOCK
    while first < 2 * n_pos:
        k = first + tl.arange(0, BLOCK)
        mask = k < 2 * n_pos
        count = tl.zeros([COPIES, BLOCK], tl.int64)
        offset = tl.zeros([COPIES, BLOCK], tl.int64)
        copy = tl.cast(0, tl.int64)
        while copy < copies:
            theirs = copy + tl.arange(0, COPIES)
            there = (theirs < copies)[:, None] & mask[None, :]
            slot = histogram_ptr + (theirs * each)[:, None] + k[None, :]
            if shift > 0:
                word = tl.load(slot, mask=there, other=0)
                count += word >> shift
                offset += word & amount_bits
            else:
                slot += k[None, :]
                count += tl.load(slot, mask=there, other=0)
                offset += tl.load(slot + 1, mask=there, other=0)
            copy += COPIES
        count = tl.sum(count, 0)
        offset = tl.sum(offset, 0)
        if total_ptr is not None:
            tl.store(total_ptr + k, count, mask=mask)
            tl.store(total_ptr + 2 * capacity + k, offset, mask=mask)
        else:
            offset = offset.to(tl.float32) * power_of_2(-fraction)
            row = knot_ptr + k
            tl.store(row + COUNT * 2 * capacity, count.to(tl.float32), mask=mask)
            tl.store(row + OFFSET * 2 * capacity, offset, mask=mask)
        first += collectors * BLOCK


@triton.jit(do_not_specialize=["item_start"])
def scatter_kernel(
    # pointers
    float_ptr,  # see ``tables``
    lookup_ptr,  # int64, see ``lookup_words``
    label_ptr,  # [rows] integers where the item's class counts, or None
    counter_ptr,
    first_grad_ptr,  # [] upstream gradient of the first value, or None
    second_grad_ptr,  # [] of the second, or None
    out_ptr,
    # shapes
    item_start,  # items of the levels before
    n_items,
    capacity,
    size_1,
    size_2,
    size_3,
    # strides
    row_s0,
    row_s1,
    row_s2,
    row_s3,
    out_s0,
    out_s1,
    out_s2,
    out_s3,
    out_class,
    # constants
    COEFFICIENT: tl.constexpr,  # write OTHER itself
    N_DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1-D grid over blocks of positives; each writes to the place of its own item."""
    capacity = wide(capacity)
    positive_ptr, _, _, scale_ptr = tables(float_ptr, capacity)
    _, _, _, item_ptr = lookup_tables(lookup_ptr, capacity)
    n_pos = count_positives(counter_ptr, capacity)
    scale = tl.load(scale_ptr)
    first = tl.program_id(0) * BLOCK
    while first < n_pos:
        i = first + tl.arange(0, BLOCK)
        mask = i < n_pos
        item = tl.load(item_ptr + i, mask=mask, other=0) - item_start
        # those of other levels lie elsewhere, and those of other processes have none here: below 0
        mask = mask & (item >= 0) & (item < n_items)
        item = tl.where(mask, item, 0)
        here = tl.zeros([BLOCK], tl.int32)
        coords = coordinates(item, here, (1, size_1, size_2, size_3), N_DIMS)
        out = offset_of(coords, (out_s0, out_s1, out_s2, out_s3), N_DIMS)
        if label_ptr is not None:
            row = offset_of(coords, (row_s0, row_s1, row_s2, row_s3), N_DIMS)
            out += tl.load(label_ptr + row, mask=mask, other=0).to(tl.int64) * out_class
        g = tl.zeros([BLOCK], tl.float32)
        if COEFFICIENT:
            g += tl.load(positive_ptr + OTHER * capacity + i, mask=mask, other=0.0) * scale
        if first_grad_ptr is not None:
            own = tl.load(positive_ptr + OWN * capacity + i, mask=mask, other=0.0)
            g += own * (tl.load(first_grad_ptr).to(tl.float32) * scale)
        if second_grad_ptr is not None:
            other = tl.load(positive_ptr + OTHER * capacity + i, mask=mask, other=0.0)
            g += other * (tl.load(second_grad_ptr).to(tl.float32) * scale)
        tl.store(out_ptr + out, g, mask=mask)
        first += tl.num_programs(0) * BLOCK
