"""Projections of a few tokens by the weight rows that a selection names.

    gathered_rows  y[t, j] = act(weight[index[j]] @ x[t] + bias[index[j]]) * times[t, index[j]]   for j < count
    gathered_glu   y[t, j] = act(gate[index[j]] @ x[t]) * (up[index[j]] @ x[t])                   for j < count

Slots from `count` on are left as they are: nothing may read them. (Deja Vu, section 4.4)
"""

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
    present,
    start_next,
    tl,
    wait_for_previous,
    wrap_triton,
)
from .activations import REFERENCE, activate
from .tuning import Config, candidates, config_for, key_of

# Above this share of selected units the CPU multiplies densely: a gather copies each row before it is
# read, and on 2 cores gains nothing from about a third on. (facts: CPU numbers)
CPU_DENSE_ABOVE = 0.3


def gathered_rows_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, count: Tensor, activation: str,
    times: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [m, d]; weight [n, d] of its dtype, rows contiguous, any row stride; bias [n] or None.

    index [n] int32 and count [] int32 are a selection. times [m, n] of x's dtype, by unit, is None for ones: a gate
    that is known. Returns [m, n] of x's dtype, by slot, here with zeros from `count` on; accumulated in fp32.
    """
    k = int(count)
    chosen = index[:k]
    y = F.linear(x.float(), weight[chosen].float(), None if bias is None else bias[chosen].float())
    y = REFERENCE[activation](y)
    result = x.new_zeros(x.shape[0], weight.shape[0])
    result[:, :k] = (y if times is None else y * times[:, chosen].float()).to(x.dtype)
    return result


def gathered_glu_reference(
    x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None,
    index: Tensor, count: Tensor, activation: str,
) -> Tensor:  # fmt: skip
    """A gated pair of `gathered_rows_reference`: act(gate) * up, rounded once at the end."""
    wide = x.float()
    a = gathered_rows_reference(wide, gate.float(), gate_bias, index, count, activation)
    return (a * gathered_rows_reference(wide, up.float(), up_bias, index, count, "identity")).to(
        x.dtype
    )


@jit
def once(pointer, mask):
    """Part of a weight, zero where masked. A step reads it once, so it is the first to leave the caches, and what is small
    (norms, tables, the caches of keys) stays for the next step."""
    return tl.load(pointer, mask=mask, other=0.0, eviction_policy="evict_first")


@jit
def first_columns(row, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first block of columns of some rows of a weight; `row` [BLOCK_J, 1] points to their beginnings."""
    at = tl.arange(0, BLOCK_D)
    return once(row + at[None, :], live[:, None] & (at[None, :] < D))


@jit
def _products(x_ptr, w, at, D: tl.constexpr):
    """Some columns of rows of a weight, times those of one token."""
    x = tl.load(x_ptr + at, mask=at < D, other=0.0).to(tl.float32)
    return w.to(tl.float32) * x[None, :]


@jit
def dots(x_ptr, row, begun, live, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The dot products of the first four tokens of x [TOKENS, D] with each of some rows, of which `begun` are the first columns.

    Four values, [BLOCK_J] each: the row is read once for all of them, and those past TOKENS are those of the first.
    """
    # Products are added up per column and reduced once: no cross-warp sum in the loop.
    at = tl.arange(0, BLOCK_D)
    total0 = _products(x_ptr, begun, at, D)
    total1 = total0
    total2 = total0
    total3 = total0
    if TOKENS > 1:
        total1 = _products(x_ptr + D, begun, at, D)
    if TOKENS > 2:
        total2 = _products(x_ptr + 2 * D, begun, at, D)
    if TOKENS > 3:
        total3 = _products(x_ptr + 3 * D, begun, at, D)
    for start in tl.static_range(BLOCK_D, D, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        w = once(row + at[None, :], live[:, None] & (at[None, :] < D))
        total0 += _products(x_ptr, w, at, D)
        if TOKENS > 1:
            total1 += _products(x_ptr + D, w, at, D)
        if TOKENS > 2:
            total2 += _products(x_ptr + 2 * D, w, at, D)
        if TOKENS > 3:
            total3 += _products(x_ptr + 3 * D, w, at, D)
    y0 = tl.sum(total0, axis=1)
    y1 = y0
    y2 = y0
    y3 = y0
    if TOKENS > 1:
        y1 = tl.sum(total1, axis=1)
    if TOKENS > 2:
        y2 = tl.sum(total2, axis=1)
    if TOKENS > 3:
        y3 = tl.sum(total3, axis=1)
    return y0, y1, y2, y3


@jit
def _rows_kernel(
    x_ptr, weight_ptr, bias_ptr, up_ptr, up_bias_ptr, times_ptr, index_ptr, count_ptr, out_ptr,
    n, weight_stride, up_stride,
    D: tl.constexpr, TOKENS: tl.constexpr,
    GLU: tl.constexpr, TIMES: tl.constexpr,
    BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: a fixed number of programs, each taking every num_programs-th block of BLOCK_J slots.

    With ROWS_START it asks for the first columns of its first block before it waits. Without, what
    comes next knows the selection: a sum that follows reads it before it waits.
    """
    start_next(EARLY, 4)  # ROWS_START, which a kernel can't name
    if (EARLY & 4) == 0:
        wait_for_previous(EARLY)
        start_next(EARLY)
    step = tl.num_programs(0) * BLOCK_J
    slot = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    # Loaded beside the count and ahead of each round: one latency less before the weights are asked for.
    unit = tl.load(index_ptr + slot, mask=slot < n, other=0, cache_modifier=".cg")
    count = tl.load(count_ptr, cache_modifier=".cg")
    live = slot < count
    row = weight_ptr + unit[:, None].to(tl.int64) * weight_stride  # [BLOCK_J, 1]
    begun = first_columns(row, live, D, BLOCK_D)
    # Beside the weights: behind their sums it would be another way to memory.
    bias = tl.zeros([BLOCK_J], dtype=tl.float32)
    up_bias = bias
    if BIAS:
        bias = tl.load(bias_ptr + unit, mask=live, other=0.0).to(tl.float32)
    if UP_BIAS:
        up_bias = tl.load(up_bias_ptr + unit, mask=live, other=0.0).to(tl.float32)
    if EARLY & 4:
        wait_for_previous(EARLY)
    for _ in range(tl.program_id(0) * BLOCK_J, count, step):
        for first in tl.static_range(0, TOKENS, 4):
            x = x_ptr + first * D
            if first > 0:
                begun = first_columns(row, live, D, BLOCK_D)
            ys = dots(x, row, begun, live, D, TOKENS - first, BLOCK_D)
            if GLU:
                up_row = up_ptr + unit[:, None].to(tl.int64) * up_stride
                up_begun = first_columns(up_row, live, D, BLOCK_D)
                ups = dots(x, up_row, up_begun, live, D, TOKENS - first, BLOCK_D)
            for token in tl.static_range(TOKENS - first if TOKENS - first < 4 else 4):
                y = ys[token]
                if BIAS:
                    y += bias
                y = activate(y, ACTIVATION)
                if GLU:
                    up = ups[token]
                    if UP_BIAS:
                        up += up_bias
                    y = y * up
                if TIMES:
                    times = tl.load(times_ptr + (first + token) * n + unit, mask=live, other=0.0)
                    y = y * times.to(tl.float32)
                out = out_ptr + (first + token) * n + slot
                tl.store(out, y.to(out_ptr.dtype.element_ty), mask=live)
        slot += step
        unit = tl.load(index_ptr + slot, mask=slot < n, other=0, cache_modifier=".cg")
        live = slot < count
        row = weight_ptr + unit[:, None].to(tl.int64) * weight_stride
        begun = first_columns(row, live, D, BLOCK_D)
        if BIAS:
            bias = tl.load(bias_ptr + unit, mask=live, other=0.0).to(tl.float32)
        if UP_BIAS:
            up_bias = tl.load(up_bias_ptr + unit, mask=live, other=0.0).to(tl.float32)


def row_blocks(d: int, tokens: int = 1) -> Config:
    """Few rows a program and long steps along them, so that no load waits alone. (H200, d 4096 to 9216)"""
    # Rows of odd length waste less of a shorter block; the sums of several tokens fill the registers.
    block_d = min(2048 if d % 2048 == 0 and tokens == 1 else 1024, power_of_2(d))
    return {"BLOCK_J": 2, "BLOCK_D": block_d, "num_warps": 4}


# Steps along a row are unrolled, for each token. More of them, or of longer rows more of a row in one thread than
# `row_blocks` gives, take seconds to compile.
MOST_STEPS = 64
LONG_ROW = 12288


def other_row_blocks(d: int, tokens: int = 1) -> list[Config]:
    """Other tiles whose sums, one for each token, still fit into registers."""
    tiles = [(2, 1024, 4), (1, 2048, 4), (1, 1024, 4), (4, 1024, 4), (4, 512, 4), (2, 4096, 8)]
    tiles += [(1, 1024, 2)]
    if tokens > 1:
        tiles = [(1, 1024, 4), (2, 512, 4), (4, 512, 4), (2, 1024, 8), (1, 2048, 8), (4, 256, 4)]
    return [
        {"BLOCK_J": j, "BLOCK_D": min(block_d, power_of_2(d)), "num_warps": warps}
        for j, block_d, warps in tiles
        if cdiv(d, block_d) * min(tokens, 4) <= MOST_STEPS and (d <= LONG_ROW or 2 * j <= warps)
    ]


def rows_config(n: int, d: int, tokens: int = 1) -> Config:
    """Eight programs a multiprocessor share the live slots: half of what fits, so that the next kernel's fit beside them. For several
    tokens all. (H200, d 4096 to 12288 at 10 %, half of 14336; H100, 2 to 8 tokens)"""
    share = 16 if tokens > 1 and d <= 4096 else 8
    blocks = row_blocks(d, tokens)
    if d > 4096:
        blocks["BLOCK_D"] = min(blocks["BLOCK_D"], 1024)
    return {**blocks, "programs": min(cdiv(n, 2), share * PROCESSORS)}


def rows_candidates(n: int, d: int, tokens: int = 1) -> list[Config]:
    """`rows_config`, with fewer and more programs, and in other tiles."""
    rule = rows_config(n, d, tokens)
    others = [
        {**rule, "programs": min(cdiv(n, rule["BLOCK_J"]), share * PROCESSORS)}
        for share in (4, 8, 16, 32)
    ]
    others += [
        {**blocks, "programs": min(cdiv(n, blocks["BLOCK_J"]), 16 * PROCESSORS)}
        for blocks in other_row_blocks(d, tokens)
    ]
    return candidates(rule, others)


def rows_key(x: Tensor, weight: Tensor, up: Tensor | None, times: Tensor | None) -> str:
    """Of a launch of either op."""
    return key_of(
        "rows", x, tokens=x.shape[0], n=weight.shape[0], d=x.shape[1],
        glu=up is not None, times=times is not None,
    )  # fmt: skip


def check_rows(weight: Tensor) -> None:
    """Raise ValueError unless the weight's rows are contiguous: a kernel would read other elements."""
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise ValueError(
            f"a gathered weight needs contiguous rows: found strides {weight.stride()} of shape "
            f"{tuple(weight.shape)}"
        )


def launch_rows(
    kernel, x: Tensor, weight: Tensor, bias: Tensor | None, selection: tuple[Tensor, Tensor],
    activation: str, up: Tensor | None = None, up_bias: Tensor | None = None, times: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launch `_rows_kernel` (wrapped or not) for either op."""
    x = x.contiguous()
    check_rows(weight)
    if up is not None:
        check_rows(up)
    # A bias sliced like an interleaved weight is strided too; the kernel reads it as adjacent.
    bias = None if bias is None else bias.contiguous()
    up_bias = None if up_bias is None else up_bias.contiguous()
    times = None if times is None else times.contiguous()
    (tokens, d), n = x.shape, weight.shape[0]
    config = dict(config or config_for(rows_key(x, weight, up, times), rows_config(n, d, tokens)))
    grid = (config.pop("programs"),)
    out = empty(tokens, n, like=x)
    kernel[grid](
        x, weight, present(bias, weight), present(up, weight), present(up_bias, weight), present(times, weight),
        *selection, out,
        n, weight.stride(0), 0 if up is None else up.stride(0),
        D=d, TOKENS=tokens, GLU=up is not None, TIMES=times is not None, BIAS=bias is not None,
        UP_BIAS=up_bias is not None, ACTIVATION=activation, EARLY=False, **config,
    )  # fmt: skip
    return out


def _cpu_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, activation: str
) -> Tensor:
    """[m, k] for the chosen rows, in x's dtype, where there is no C++ form."""
    if chosen.numel() > CPU_DENSE_ABOVE * weight.shape[0]:
        return REFERENCE[activation](F.linear(x, weight, bias)).index_select(1, chosen)
    rows = weight.index_select(0, chosen)
    return REFERENCE[activation](F.linear(x, rows, None if bias is None else bias[chosen]))


def _fake_gathered_rows(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, count: Tensor,
      activation: str, times: Tensor | None = None) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0])


@cpu.cpu_op("dejavu::gathered_rows_cpu", _fake_gathered_rows)
def gathered_rows_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, count: Tensor, activation: str,
    times: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Opaque to tracing: how much it reads depends on the count."""
    k = int(count)
    result = x.new_zeros(x.shape[0], weight.shape[0])
    if not cpu.rows(result, x, weight, bias, index, k, activation):
        result[:, :k] = _cpu_rows(x, weight, bias, index[:k], activation)
    if times is not None:
        result[:, :k] *= times.index_select(1, index[:k])
    return result


def _fake_gathered_glu(x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None,
      index: Tensor, count: Tensor, activation: str) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], gate.shape[0])


@cpu.cpu_op("dejavu::gathered_glu_cpu", _fake_gathered_glu)
def gathered_glu_cpu(
    x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None,
    index: Tensor, count: Tensor, activation: str,
) -> Tensor:  # fmt: skip
    """The gated pair, opaque to tracing."""
    k = int(count)
    result = x.new_zeros(x.shape[0], gate.shape[0])
    if not cpu.rows(result, x, gate, gate_bias, index, k, activation, up, up_bias):
        a = _cpu_rows(x, gate, gate_bias, index[:k], activation)
        result[:, :k] = a * _cpu_rows(x, up, up_bias, index[:k], "identity")
    return result


@triton_op("dejavu::gathered_rows", mutates_args=())
def gathered_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, count: Tensor, activation: str,
    times: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `gathered_rows_reference`."""
    if not x.is_cuda:
        return gathered_rows_cpu(x, weight, bias, index, count, activation, times)
    kernel, selection = wrap_triton(_rows_kernel), (index, count)
    return launch_rows(kernel, x, weight, bias, selection, activation, times=times)


@triton_op("dejavu::gathered_glu", mutates_args=())
def gathered_glu(
    x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None,
    index: Tensor, count: Tensor, activation: str,
) -> Tensor:  # fmt: skip
    """See `gathered_glu_reference`."""
    if not x.is_cuda:
        return gathered_glu_cpu(x, gate, gate_bias, up, up_bias, index, count, activation)
    return launch_rows(
        wrap_triton(_rows_kernel), x, gate, gate_bias, (index, count), activation, up, up_bias
    )
