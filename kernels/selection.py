"""A selection: which units run, as a sorted list on the device with its count beside it.

    compact: values [m, n], threshold  ->  index [n] int32, count [] int32

The first `count` entries of `index` are the selected units in ascending order, the rest are 0 (a valid
unit, never read for its weights). No host sync, no atomics: each program lists its own units, then a
second launch moves every list to its place. So the same input gives the same list, always.
(facts: topk of 16k to 49k scores costs as much as the sparse MLP that it serves)
"""

import torch
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import cdiv, empty, jit, power_of_2, tl, wrap_triton

SEGMENT = 32  # units that one program lists
SCATTERED = 1024  # units that one program of the second launch moves


def compact_reference(values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """A unit is selected if |value| is above `threshold` for any token; NaN always is.

    values [m, n], any float dtype.
    """
    return listed(~(values.abs().float() <= threshold))


def listed(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The selection of a mask [m, n]: the union over its tokens."""
    chosen = keep.any(dim=0).nonzero().flatten().int()
    index = torch.zeros(keep.shape[1], dtype=torch.int32, device=keep.device)
    index[: chosen.numel()] = chosen
    return index, torch.tensor(chosen.numel(), dtype=torch.int32, device=keep.device)


@jit
def list_segment(keep, unit, local_ptr, counts_ptr, segment, n, SEGMENT: tl.constexpr):
    """Write the kept units of one segment to the front of its part of `local`, and how many."""
    # keep, unit: [SEGMENT]
    kept = keep.to(tl.int32)
    place = tl.cumsum(kept, axis=0) - 1
    tl.store(local_ptr + segment * SEGMENT + place, unit, mask=(kept != 0) & (unit < n))
    tl.store(counts_ptr + segment, tl.sum(kept, axis=0))


@jit
def _compact_kernel(
    values_ptr, local_ptr, counts_ptr, threshold, n,
    TOKENS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Grid: one program a segment."""
    segment = tl.program_id(0)
    unit = segment * SEGMENT + tl.arange(0, SEGMENT)
    # Inductor hands Python floats over as fp64, which would make the comparison one in fp64.
    limit = tl.full([SEGMENT], threshold, tl.float32)
    keep = tl.zeros([SEGMENT], dtype=tl.int32)
    for token in tl.static_range(TOKENS):
        value = tl.load(values_ptr + token * n + unit, mask=unit < n, other=0.0).to(tl.float32)
        # "not below", so that NaN is kept
        keep = keep | tl.where(tl.abs(value) <= limit, 0, 1)
    keep = tl.where(unit < n, keep, 0)
    list_segment(keep, unit, local_ptr, counts_ptr, segment, n, SEGMENT)


@jit
def scatter_kernel(
    local_ptr, counts_ptr, index_ptr, count_ptr, n, segments,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Grid: one program for GROUP segments. Move their lists behind those of all segments before."""
    first = tl.program_id(0) * GROUP
    every = tl.arange(0, SEGMENTS)
    counts = tl.load(counts_ptr + every, mask=every < segments, other=0)
    total = tl.sum(counts, axis=0)
    before = tl.sum(tl.where(every < first, counts, 0), axis=0)

    mine = first + tl.arange(0, GROUP)
    lengths = tl.load(counts_ptr + mine, mask=mine < segments, other=0)
    starts = before + tl.cumsum(lengths, axis=0) - lengths
    lane = tl.arange(0, SEGMENT)
    inside = lane[None, :] < lengths[:, None]
    # [GROUP, SEGMENT]
    unit = tl.load(local_ptr + mine[:, None] * SEGMENT + lane[None, :], mask=inside, other=0)
    tl.store(index_ptr + starts[:, None] + lane[None, :], unit, mask=inside)

    slot = mine[:, None] * SEGMENT + lane[None, :]
    tl.store(index_ptr + slot, 0, mask=(slot >= total) & (slot < n))
    if first == 0:
        tl.store(count_ptr, total)


def scatter(kernel, local: Tensor, counts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Second launch: local lists [segments * SEGMENT] and their counts to one selection."""
    segments = counts.numel()
    index = empty(n, like=local, dtype=torch.int32)
    # Of one element, then none: Inductor fills an empty tensor without dims by a launch of its own.
    count = empty(1, like=local, dtype=torch.int32)
    group = SCATTERED // SEGMENT
    kernel[(cdiv(segments, group),)](
        local, counts, index, count, n, segments,
        SEGMENTS=power_of_2(segments), SEGMENT=SEGMENT, GROUP=group,
    )  # fmt: skip
    return index, count.view(())


def launch_compact(kernels, values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Both launches. `kernels`: (`_compact_kernel`, `scatter_kernel`), wrapped or not."""
    values = values.contiguous()
    tokens, n = values.shape
    segments = cdiv(n, SEGMENT)
    local = empty(segments * SEGMENT, like=values, dtype=torch.int32)
    counts = empty(segments, like=values, dtype=torch.int32)
    kernels[0][(segments,)](
        values, local, counts, threshold, n, TOKENS=tokens, SEGMENT=SEGMENT, num_warps=2
    )
    return scatter(kernels[1], local, counts, n)


def fake_selection(like: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Shapes of a selection."""
    return like.new_empty(n, dtype=torch.int32), like.new_empty((), dtype=torch.int32)


def _fake_compact(values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    return fake_selection(values, values.shape[1])


@cpu.cpu_op("dejavu::compact_cpu", _fake_compact)
def compact_cpu(values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Opaque to tracing: how many units it finds depends on the data."""
    return cpu.compacted(values, threshold) or compact_reference(values, threshold)


@triton_op("dejavu::compact", mutates_args=())
def compact(values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """See `compact_reference`."""
    if not values.is_cuda:
        return compact_cpu(values, threshold)
    kernels = (wrap_triton(_compact_kernel), wrap_triton(scatter_kernel))
    return launch_compact(kernels, values, threshold)
