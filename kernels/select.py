"""Predict which units of a site matter, and list them. (Deja Vu, section 4.1)

    score = up @ (down @ source) + bias;  unit u is selected where score[u] > 0 for any token

The calibrated threshold is part of the bias. Three launches: `down @ source`, split so that a small
rank fills the chip; the scores with a list per program; the lists moved to their places. Launched early, the first
two ask for weights before they wait.
Matrices in int8 and in nibbles are read by the kernels of `select_int8`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import (
    PROCESSORS,
    cdiv,
    empty,
    jit,
    power_of_2,
    start_next,
    tl,
    wait_for_previous,
    wrap_triton,
)
from .nibbles import columns, is_packed, unpacked
from .select_int8 import fits, inner_int8_kernel, score_int8_kernel
from .selection import SEGMENT, fake_selection, list_segment, listed, scatter, scatter_kernel


def select_reference(
    source: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """source [m, s]; down [r, s] and up [n, r] of its dtype, int8 or packed; bias [n] fp32. Scores in fp32.

    Packed, both are uint8 of half as many columns (see `nibbles`), and s and r multiples of 8. Returns a
    selection (see `selection`). A NaN score selects the unit, so that it stays visible.
    """
    inner = F.linear(source.float(), unpacked(down).float())
    return listed(~(F.linear(inner, unpacked(up).float(), bias) <= 0))


@jit
def inner_kernel(
    source_ptr, down_ptr, inner_ptr, rank, width, chunk,
    TOKENS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (rank blocks, splits): one part of `down @ source`, over one chunk of the source."""
    start_next(EARLY)
    wait_for_previous(EARLY)
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
            total += w.to(tl.float32) * x[None, :]
        out = (split * TOKENS + token) * rank + row
        tl.store(inner_ptr + out, tl.sum(total, axis=1), mask=row < rank)


@jit
def score_kernel(
    inner_ptr, up_ptr, bias_ptr, local_ptr, counts_ptr, n, rank,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: one program a segment of units: their scores, and the list of those above zero."""
    start_next(EARLY)
    wait_for_previous(EARLY)
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
            total += w.to(tl.float32) * z[None, :]
        score = tl.sum(total, axis=1) + bias
        keep = keep | tl.where(score <= 0.0, 0, 1)
    keep = tl.where(unit < n, keep, 0)
    list_segment(keep, unit, local_ptr, counts_ptr, segment, n, SEGMENT)


@dataclass(frozen=True, slots=True)
class _Shape:
    """How `down @ source` is cut up: blocks of rows, and splits of `chunk` columns, `block` at a time.

    `per_word`: columns in a word of 32 bits, where the rows are read as words; `block` then counts words.
    """

    per_word: int | None
    block_rows: int
    block: int
    chunk: int
    splits: int


def _shape(source: Tensor, down: Tensor, up: Tensor) -> _Shape:
    """About four programs a multiprocessor in the first launch; block sizes measured on an H200."""
    width, rank = source.shape[1], columns(up)
    if fits(source, down, up):
        # A block's digits are made once for all its rows: of nibbles, twice as many rows have the bytes of int8.
        per_word, block_rows = (8, 16) if is_packed(down) else (4, 8)
        block = min(2048 if width > 4096 else 1024, power_of_2(width)) // per_word
        # Every program of the second launch adds the splits up: no more than fill the chip twice.
        blocks = cdiv(width, per_word * block)
        splits = min(cdiv(2 * PROCESSORS, cdiv(rank, block_rows)), 5)
        each = cdiv(blocks, splits)
        if each % 2 == 0:  # one long block, all of it asked for early, instead of two
            block, each = 2 * block, each // 2
        chunk = per_word * block * each
        return _Shape(per_word, block_rows, block, chunk, cdiv(width, chunk))
    block = min(2048, power_of_2(width))
    splits = max(1, min(cdiv(4 * PROCESSORS, cdiv(rank, 2)), cdiv(width, 2048), 8))
    chunk = cdiv(cdiv(width, splits), block) * block
    return _Shape(None, 2, block, chunk, splits)


def select_kernels(source: Tensor, down: Tensor, up: Tensor) -> tuple:
    """The kernels of the three launches, not wrapped."""
    if fits(source, down, up):
        return inner_int8_kernel, score_int8_kernel, scatter_kernel
    return inner_kernel, score_kernel, scatter_kernel


def scratch(source: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the launches hand on: parts of `down @ source`, lists by segment, their lengths."""
    n, rank = up.shape[0], columns(up)
    splits, segments = _shape(source, down, up).splits, cdiv(n, SEGMENT)
    return (
        empty(splits, source.shape[0], rank, like=source, dtype=torch.float32),
        empty(segments * SEGMENT, like=source, dtype=torch.int32),
        empty(segments, like=source, dtype=torch.int32),
    )


def launch_select(
    kernels, source: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All three launches; returns the selection and the scratch that they used.

    `kernels`: those of `select_kernels`, wrapped or not.
    """
    source = source.contiguous()
    (tokens, width), n, rank = source.shape, up.shape[0], columns(up)
    shape = _shape(source, down, up)
    inner, local, counts = scratch(source, down, up)
    grid = (cdiv(rank, shape.block_rows), shape.splits)
    if shape.per_word:
        nibbles = is_packed(down)
        digits = 3 if source.dtype is torch.float32 else 2
        kernels[0][grid](
            source, down, inner, rank, width,
            TOKENS=tokens, DIGITS=digits, NIBBLES=nibbles, WORDS=width // shape.per_word,
            BLOCK_R=shape.block_rows, BLOCK_S=shape.block,
            BLOCKS=shape.chunk // (shape.per_word * shape.block), EARLY=False, num_warps=4,
        )  # fmt: skip
        words = rank // shape.per_word
        kernels[1][counts.shape](
            inner, up, bias, local, counts, n, rank,
            TOKENS=tokens, SPLITS=shape.splits, DIGITS=digits, NIBBLES=nibbles, SEGMENT=SEGMENT,
            WORDS=words, BLOCK_R=min(128, power_of_2(words)), EARLY=False, num_warps=4,
        )  # fmt: skip
    else:
        kernels[0][grid](
            source, down, inner, rank, width, shape.chunk,
            TOKENS=tokens, BLOCK_R=shape.block_rows, BLOCK_S=shape.block, EARLY=False, num_warps=4,
        )  # fmt: skip
        kernels[1][counts.shape](
            inner, up, bias, local, counts, n, rank, TOKENS=tokens, SPLITS=shape.splits,
            SEGMENT=SEGMENT, BLOCK_R=min(256, power_of_2(rank)), EARLY=False, num_warps=4,
        )  # fmt: skip
    index, count = scatter(kernels[2], local, counts, n)
    return index, count, inner, local, counts


def _fake_select(source: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return fake_selection(source, up.shape[0])


@cpu.cpu_op("dejavu::select_cpu", _fake_select)
def select_cpu(source: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Opaque to tracing; where there is no C++ form, in the source's dtype, which is the faster one."""
    selection = cpu.selected(source, down, up, bias)
    if selection is not None:
        return selection
    if source.dtype is torch.float16:
        # whole weights leave their scale to the bias, so scores pass fp16's 65504
        source = source.float()
    inner = F.linear(source, unpacked(down).to(source.dtype))
    return listed(~(F.linear(inner, unpacked(up).to(source.dtype)).float() + bias <= 0))


@triton_op("dejavu::select", mutates_args=())
def select(source: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See `select_reference`."""
    if not source.is_cuda:
        return select_cpu(source, down, up, bias)
    if fits(source, down, up):
        first, second = wrap_triton(inner_int8_kernel), wrap_triton(score_int8_kernel)
    else:
        first, second = wrap_triton(inner_kernel), wrap_triton(score_kernel)
    kernels = (first, second, wrap_triton(scatter_kernel))
    index, count, *_ = launch_select(kernels, source, down, up, bias)
    return index, count
