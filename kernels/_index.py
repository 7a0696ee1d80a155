"""From an element's place in the walk to its coordinates and offsets."""

import triton
import triton.language as tl


@triton.jit
def tile_of(BLOCK: tl.constexpr, RUN: tl.constexpr):
    """Offsets of the runs of a tile, [runs, 1], and within one, [1, RUN]; or [BLOCK], 0."""
    if RUN == 1:
        run = tl.arange(0, BLOCK)
        within = 0
    else:
        run = (tl.arange(0, BLOCK // RUN) * RUN)[:, None]
        within = tl.arange(0, RUN)[None, :]
    return run, within


@triton.jit
def coordinates(start, offs, sizes, N_DIMS: tl.constexpr, within=0):
    """Coordinates of elements start + offs: 64-bit division once a program, 32-bit per element.

    ``within``, offsets that do not leave the innermost dim, costs no division: ``offs`` of shape
    [runs, 1] and ``within`` of [1, elements] divide once a run.
    """
    c0 = tl.zeros(offs.shape, tl.int64)
    c1 = c0
    c2 = c0
    if N_DIMS == 1:
        c3 = start + offs
    else:
        outer = start // sizes[3]
        inner = (start - outer * sizes[3]).to(tl.int32) + offs
        carry = inner // sizes[3]
        c3 = inner - carry * sizes[3]
        if N_DIMS == 2:
            c2 = outer + carry
        else:
            rest = outer // sizes[2]
            inner = (outer - rest * sizes[2]).to(tl.int32) + carry
            carry = inner // sizes[2]
            c2 = inner - carry * sizes[2]
            if N_DIMS == 3:
                c1 = rest + carry
            else:
                outest = rest // sizes[1]
                inner = (rest - outest * sizes[1]).to(tl.int32) + carry
                carry = inner // sizes[1]
                c1 = inner - carry * sizes[1]
                c0 = outest + carry
    return c0, c1, c2, c3 + within


@triton.jit
def offset_of(coords, strides, N_DIMS: tl.constexpr):
    """64-bit offset of coordinates under strides."""
    offset = coords[3] * tl.cast(strides[3], tl.int64)
    if N_DIMS > 1:
        offset += coords[2] * tl.cast(strides[2], tl.int64)
    if N_DIMS > 2:
        offset += coords[1] * tl.cast(strides[1], tl.int64)
    if N_DIMS > 3:
        offset += coords[0] * tl.cast(strides[0], tl.int64)
    return offset


@triton.jit
def load_or_zero(ptr, MASKED: tl.constexpr, mask):
    """A load that the compiler proves to be 16 bytes wide where nothing is masked."""
    if MASKED:
        value = tl.load(ptr, mask=mask, other=0)
    else:
        value = tl.load(ptr)
    return value
