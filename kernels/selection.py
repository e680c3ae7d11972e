"""A selection: which units run, as a sorted list on the device with its count beside it.

    compact: values [m, n], threshold, scale [n]  ->  index [n] int32, count [] int32

The first `count` entries of `index` are the selected units in ascending order, the rest are 0 (a valid
unit, never read for its weights). No host sync, no atomics: the same input gives the same list, always. Of values
that are there each program counts for itself how many units come before its own. Scores that are computed on the
way (select.py) are listed by segments, and a second launch moves every list to its place.
(facts: topk of 16k to 49k scores costs as much as the sparse MLP that it serves)
"""

import torch
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import (
    cdiv,
    empty,
    jit,
    power_of_2,
    start_next,
    tl,
    wait_for_previous,
    wrap_triton,
)

COMPACTED = 1024  # units that one program of `compact` lists
EVERY = 16384  # units that it counts at a time
SEGMENT = 32  # units that one program of `select` lists
SCATTERED = 1024  # units that one program of the launch after that moves


def compact_reference(
    values: Tensor, threshold: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A unit is selected if |value| * scale is above `threshold` for any token; NaN always is.

    values [m, n], any float dtype; scale [n] fp32, None for ones. Compared in fp32.
    """
    score = values.abs().float()
    return listed(~((score if scale is None else score * scale) <= threshold))


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
def _above(value, scale, limit):
    """1 where a value counts, else 0: not below the limit, so that NaN does."""
    return tl.where(tl.abs(value.to(tl.float32)) * scale <= limit, 0, 1)


@jit
def _compact_kernel(
    values_ptr, scale_ptr, index_ptr, count_ptr, threshold, n,
    SCALE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, EVERY: tl.constexpr, ROUNDS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: one program for BLOCK units. Each counts all units anew, EVERY a round, so that none waits for another.

    The scales of its own units, and of the first round, are asked for before it waits for the kernel before. All loads
    are here, none in a function that is called: where values come back from one that was given a pointer, and a place to
    store at depends on them, torch takes it that the pointer is written to, and copies what it points to at every step.
    """
    start_next(EARLY)
    first = tl.program_id(0) * BLOCK
    own, every = first + tl.arange(0, BLOCK), tl.arange(0, EVERY)
    own_scale = tl.full([BLOCK], 1.0, tl.float32)
    scale = tl.full([EVERY], 1.0, tl.float32)
    if SCALE:
        own_scale = tl.load(scale_ptr + own, mask=own < n, other=0.0)
        scale = tl.load(scale_ptr + every, mask=every < n, other=0.0)
    wait_for_previous(EARLY)
    # Inductor hands Python floats over as fp64, which would make the comparison one in fp64.
    limit = tl.full([1], threshold, tl.float32)
    mine = tl.zeros([BLOCK], dtype=tl.int32)
    for token in tl.static_range(TOKENS):
        mine = mine | _above(
            tl.load(values_ptr + token * n + own, mask=own < n, other=0.0), own_scale, limit
        )
    mine = tl.where(own < n, mine, 0)
    kept = tl.zeros([EVERY], dtype=tl.int32)
    earlier = tl.zeros([EVERY], dtype=tl.int32)
    for turn in tl.static_range(ROUNDS):
        unit = turn * EVERY + every
        if SCALE and turn > 0:
            scale = tl.load(scale_ptr + unit, mask=unit < n, other=0.0)
        keep = tl.zeros([EVERY], dtype=tl.int32)
        for token in tl.static_range(TOKENS):
            keep = keep | _above(
                tl.load(values_ptr + token * n + unit, mask=unit < n, other=0.0), scale, limit
            )
        keep = tl.where(unit < n, keep, 0)
        kept += keep
        earlier += tl.where(unit < first, keep, 0)
    total = tl.sum(kept, axis=0)

    place = tl.sum(earlier, axis=0) + tl.cumsum(mine, axis=0) - mine
    tl.store(index_ptr + place, own, mask=mine != 0)
    tl.store(index_ptr + own, 0, mask=(own >= total) & (own < n))
    if first == 0:
        tl.store(count_ptr, total)


@jit
def scatter_kernel(
    local_ptr, counts_ptr, index_ptr, count_ptr, n, segments,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
    GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: one program for GROUP segments. Move their lists behind those of all segments before."""
    start_next(EARLY)
    wait_for_previous(EARLY)
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


def _outputs(like: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A list of n, and a count of one element: Inductor fills an empty tensor without dims by a launch of its own."""
    return empty(n, like=like, dtype=torch.int32), empty(1, like=like, dtype=torch.int32)


def scatter(kernel, local: Tensor, counts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Local lists [segments * SEGMENT] and their counts to one selection."""
    segments = counts.numel()
    index, count = _outputs(local, n)
    group = SCATTERED // SEGMENT
    kernel[(cdiv(segments, group),)](
        local, counts, index, count, n, segments,
        SEGMENTS=power_of_2(segments), SEGMENT=SEGMENT, GROUP=group, EARLY=False,
    )  # fmt: skip
    return index, count.view(())


def launch_compact(
    kernel, values: Tensor, threshold: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch `_compact_kernel`, wrapped or not."""
    values = values.contiguous()
    scale = None if scale is None else scale.contiguous()
    tokens, n = values.shape
    index, count = _outputs(values, n)
    every = min(EVERY, power_of_2(n))
    kernel[(cdiv(n, COMPACTED),)](
        values, values if scale is None else scale, index, count, threshold, n,
        SCALE=scale is not None, TOKENS=tokens, BLOCK=COMPACTED, EVERY=every,
        ROUNDS=cdiv(n, every), EARLY=False, num_warps=min(16, max(4, every // 1024)),
    )  # fmt: skip
    return index, count.view(())


def fake_selection(like: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Shapes of a selection."""
    return like.new_empty(n, dtype=torch.int32), like.new_empty((), dtype=torch.int32)


def _fake_compact(
    values: Tensor, threshold: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return fake_selection(values, values.shape[1])


@cpu.cpu_op("dejavu::compact_cpu", _fake_compact)
def compact_cpu(
    values: Tensor, threshold: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Opaque to tracing: how many units it finds depends on the data."""
    listed_by_cpp = cpu.compacted(values, threshold, scale)
    return listed_by_cpp or compact_reference(values, threshold, scale)


@triton_op("dejavu::compact", mutates_args=())
def compact(
    values: Tensor, threshold: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `compact_reference`."""
    if not values.is_cuda:
        return compact_cpu(values, threshold, scale)
    return launch_compact(wrap_triton(_compact_kernel), values, threshold, scale)
