"""Predict which units of a site matter, and list them. (Deja Vu, section 4.1)

    score = up @ (down @ source) + bias;  unit u is selected where score[u] > 0 for any token

The calibrated threshold is part of the bias. Three launches: `down @ source`, split so that a small
rank fills the chip; the scores with a list per program; the lists moved to their places.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op, triton_op

from ._triton import PROCESSORS, cdiv, empty, jit, power_of_2, tl, wrap_triton
from .selection import SEGMENT, fake_selection, list_segment, listed, scatter, scatter_kernel


def select_reference(
    source: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """source [m, s]; down [r, s] and up [n, r] of its dtype or int8; bias [n] fp32. Scores in fp32.

    Returns a selection (see `selection`). A NaN score selects the unit, so that it stays visible.
    """
    inner = F.linear(source.float(), down.float())
    return listed(~(F.linear(inner, up.float(), bias) <= 0))


@jit
def _widened(weight):
    """A tile of predictor weights in fp32.

    An int8 x is written into the mantissa of 2^23 and 2^23 subtracted again, two plain instructions:
    the conversion instruction has a fraction of their throughput.
    """
    if weight.dtype == tl.int8:
        magic = weight.to(tl.int32) + 0x4B000080  # the bits of 2^23 + 128 + x
        return magic.to(tl.float32, bitcast=True) - 8388736.0
    return weight.to(tl.float32)


@jit
def _inner_kernel(
    source_ptr, down_ptr, inner_ptr, rank, width, chunk,
    TOKENS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (rank blocks, splits): one part of `down @ source`, over one chunk of the source."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    column = tl.arange(0, BLOCK_S)
    base = down_ptr + row[:, None].to(tl.int64) * width
    for token in tl.static_range(TOKENS):
        total = tl.zeros([BLOCK_R, BLOCK_S], dtype=tl.float32)
        for start in range(split * chunk, tl.minimum(split * chunk + chunk, width), BLOCK_S):
            at = start + column
            inside = (at < width) & (at < split * chunk + chunk)
            x = tl.load(source_ptr + token * width + at, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(base + at[None, :], mask=(row[:, None] < rank) & inside[None, :], other=0)
            total += _widened(w) * x[None, :]
        out = (split * TOKENS + token) * rank + row
        tl.store(inner_ptr + out, tl.sum(total, axis=1), mask=row < rank)


@jit
def _score_kernel(
    inner_ptr, up_ptr, bias_ptr, local_ptr, counts_ptr, n, rank,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: one program a segment of units: their scores, and the list of those above zero."""
    segment = tl.program_id(0)
    unit = segment * SEGMENT + tl.arange(0, SEGMENT)
    column = tl.arange(0, BLOCK_R)
    base = up_ptr + unit[:, None].to(tl.int64) * rank
    bias = tl.load(bias_ptr + unit, mask=unit < n, other=0.0)
    keep = tl.zeros([SEGMENT], dtype=tl.int32)
    for token in tl.static_range(TOKENS):
        total = tl.zeros([SEGMENT, BLOCK_R], dtype=tl.float32)
        for start in range(0, rank, BLOCK_R):
            at = start + column
            w = tl.load(
                base + at[None, :], mask=(unit[:, None] < n) & (at[None, :] < rank), other=0
            )
            z = tl.zeros([BLOCK_R], dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                part = (split * TOKENS + token) * rank + at
                z += tl.load(inner_ptr + part, mask=at < rank, other=0.0)
            total += _widened(w) * z[None, :]
        score = tl.sum(total, axis=1) + bias
        keep = keep | tl.where(score <= 0.0, 0, 1)
    keep = tl.where(unit < n, keep, 0)
    list_segment(keep, unit, local_ptr, counts_ptr, segment, n, SEGMENT)


BLOCK_RANK = 2  # rows of `down` that one program reads


def num_splits(rank: int, width: int) -> int:
    """Chunks of the source, so that the first launch has about four programs a multiprocessor."""
    return max(1, min(cdiv(4 * PROCESSORS, cdiv(rank, BLOCK_RANK)), cdiv(width, 2048), 8))


def launch_select(
    kernels, source: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All three launches; returns the selection and the scratch that they used.

    `kernels`: (`_inner_kernel`, `_score_kernel`, `scatter_kernel`), wrapped or not.
    """
    source = source.contiguous()
    (tokens, width), (n, rank) = source.shape, up.shape
    splits = num_splits(rank, width)
    block_s = min(2048, power_of_2(width))
    chunk = cdiv(cdiv(width, splits), block_s) * block_s
    segments = cdiv(n, SEGMENT)
    inner = empty(splits, tokens, rank, like=source, dtype=torch.float32)
    local = empty(segments * SEGMENT, like=source, dtype=torch.int32)
    counts = empty(segments, like=source, dtype=torch.int32)
    kernels[0][(cdiv(rank, BLOCK_RANK), splits)](
        source, down, inner, rank, width, chunk,
        TOKENS=tokens, BLOCK_R=BLOCK_RANK, BLOCK_S=block_s, num_warps=4,
    )  # fmt: skip
    kernels[1][(segments,)](
        inner, up, bias, local, counts, n, rank,
        TOKENS=tokens, SPLITS=splits, SEGMENT=SEGMENT, BLOCK_R=min(256, power_of_2(rank)), num_warps=4,
    )  # fmt: skip
    index, count = scatter(kernels[2], local, counts, n)
    return index, count, inner, local, counts


@custom_op("dejavu::select_cpu", mutates_args=())
def select_cpu(source: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Opaque to tracing, and in the source's dtype, which is the CPU's fast path."""
    if source.dtype is torch.float16:
        # int8 weights leave their scale to the bias, so scores pass fp16's 65504
        source = source.float()
    inner = _project(source, down)
    return listed(~(_project(inner, up).float() + bias <= 0))


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T; an int8 weight is read as it lies, a quarter to half of the bytes."""
    # PyTorch's int8 kernel has no tail loop: it reads past rows whose length isn't a multiple of 16.
    if weight.dtype is torch.int8 and weight.shape[1] % 16 == 0:
        return torch._weight_int8pack_mm(x.contiguous(), weight, x.new_ones(weight.shape[0]))
    return F.linear(x, weight.to(x.dtype))


@select_cpu.register_fake
def _(source: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return fake_selection(source, up.shape[0])


@triton_op("dejavu::select", mutates_args=())
def select(source: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See `select_reference`."""
    if not source.is_cuda:
        return select_cpu(source, down, up, bias)
    kernels = (wrap_triton(_inner_kernel), wrap_triton(_score_kernel), wrap_triton(scatter_kernel))
    index, count, *_ = launch_select(kernels, source, down, up, bias)
    return index, count
