"""Projections around attention of which only some heads run. Every head keeps its place.

    head_rows   y[t, r] = weight[r] @ x[t] + bias[r]      for rows r that no head owns, or one that runs
    head_sum    partials[s, t] = sum over running heads h of split s of hidden[t, h] @ weight[h]

Heads are few and wide, so nothing is compacted: a program asks whether its head runs, and ends at once where
it doesn't. What belongs to the other heads is left as it is, and nothing may read it. Selections differ from
token to token; a weight is read once if any token's head runs. (Deja Vu, section 4.2)
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import PROCESSORS, cdiv, empty, jit, power_of_2, tl, wrap_triton
from .rows import check_rows, dots, row_blocks


def head_rows_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor, keep: Tensor
) -> Tensor:
    """x [m, d]; weight [n, d] of its dtype, rows contiguous; bias [n] or None; keep [m, heads] bool.

    owner [n / block] int32: the head that alone reads this block of rows, or -1: always computed. Returns
    [m, n] of x's dtype, here with zeros where no token's head runs; accumulated in fp32.
    """
    runs = torch.cat([keep.any(dim=0), keep.new_ones(1)])[owner.long()]
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    rows = runs.repeat_interleave(weight.shape[0] // owner.numel())
    return y.masked_fill(~rows, 0.0).to(x.dtype)


def head_sum_reference(hidden: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """hidden [m, heads * block], weight [heads * block, d], rows contiguous; keep [m, heads] bool.

    Nothing of a head that doesn't run is read, token by token. Returns [1, m, d] fp32.
    """
    kept = keep.repeat_interleave(hidden.shape[1] // keep.shape[1], dim=1)
    return (hidden.float().masked_fill(~kept, 0.0) @ weight.float())[None]


@jit
def _head_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, owner_ptr, keep_ptr, out_ptr, n, heads, block, weight_stride,
    D: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (n / BLOCK_J,): rows of one program have one owner."""
    first = tl.program_id(0) * BLOCK_J
    owner = tl.load(owner_ptr + first // block)
    runs = owner < 0
    for token in tl.static_range(TOKENS):
        runs = runs | (tl.load(keep_ptr + token * heads + tl.maximum(owner, 0)) != 0)
    if runs:
        unit = first + tl.arange(0, BLOCK_J)
        live = unit < n
        row = weight_ptr + unit[:, None].to(tl.int64) * weight_stride  # [BLOCK_J, 1]
        for token in tl.static_range(TOKENS):
            y = dots(x_ptr + token * D, row, live, D, BLOCK_J, BLOCK_D)
            if BIAS:
                y += tl.load(bias_ptr + unit, mask=live, other=0.0).to(tl.float32)
            tl.store(out_ptr + token * n + unit, y.to(out_ptr.dtype.element_ty), mask=live)


@jit
def _head_sum_kernel(
    hidden_ptr, weight_ptr, keep_ptr, out_ptr, heads, d, weight_stride, per_split,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, splits). Each split takes `per_split` heads of WIDTH rows."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    first = split * per_split
    last = tl.minimum(first + per_split, heads)
    for token in tl.static_range(TOKENS):
        total = tl.zeros([BLOCK_J, BLOCK_D], dtype=tl.float32)
        for head in range(first, last):
            if tl.load(keep_ptr + token * heads + head) != 0:
                for start in range(0, WIDTH, BLOCK_J):
                    j = start + tl.arange(0, BLOCK_J)
                    at = head * WIDTH + j
                    h = tl.load(
                        hidden_ptr + token * heads * WIDTH + at, mask=j < WIDTH, other=0.0
                    ).to(tl.float32)  # fmt: skip
                    w = tl.load(
                        weight_ptr + at[:, None].to(tl.int64) * weight_stride + column[None, :],
                        mask=(j < WIDTH)[:, None] & (column[None, :] < d), other=0.0,
                    ).to(tl.float32)  # fmt: skip
                    total += h[:, None] * w
        out = (split * TOKENS + token).to(tl.int64) * d + column
        tl.store(out_ptr + out, tl.sum(total, axis=0), mask=column < d)


def launch_head_rows(
    kernel, x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor, keep: Tensor
) -> Tensor:
    """Launch `_head_rows_kernel`, wrapped or not."""
    x, keep = x.contiguous(), keep.contiguous()
    check_rows(weight)
    (tokens, d), n = x.shape, weight.shape[0]
    block = n // owner.numel()
    config = row_blocks(d)
    if block % config["BLOCK_J"]:
        config["BLOCK_J"] = 1
    out = empty(tokens, n, like=x)
    kernel[(cdiv(n, config["BLOCK_J"]),)](
        x, weight, x if bias is None else bias.contiguous(), owner, keep, out,
        n, keep.shape[1], block, weight.stride(0),
        D=d, TOKENS=tokens, BIAS=bias is not None, **config,
    )  # fmt: skip
    return out


def launch_head_sum(kernel, hidden: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """Launch `_head_sum_kernel`, wrapped or not."""
    hidden, keep = hidden.contiguous(), keep.contiguous()
    check_rows(weight)
    (tokens, heads), d = keep.shape, weight.shape[1]
    block_d = min(512, power_of_2(d))
    per_split = cdiv(heads, max(1, min(heads, 4 * PROCESSORS // cdiv(d, block_d))))
    splits = cdiv(heads, per_split)
    out = empty(splits, tokens, d, like=hidden, dtype=torch.float32)
    kernel[(cdiv(d, block_d), splits)](
        hidden, weight, keep, out, heads, d, weight.stride(0), per_split,
        WIDTH=weight.shape[0] // heads, TOKENS=tokens, BLOCK_J=8, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out


def _running_rows(runs: Tensor, block: int) -> Tensor:
    """The rows of the blocks that run, ascending, int32."""
    first = runs.nonzero() * block
    return (first + torch.arange(block)).flatten().int()


def _fake_head_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor, keep: Tensor
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@cpu.cpu_op("dejavu::head_rows_cpu", _fake_head_rows)
def head_rows_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor, keep: Tensor
) -> Tensor:
    """Opaque to tracing: how much it reads depends on the heads."""
    runs = (owner < 0) | keep.any(dim=0)[owner.clamp(min=0).long()]
    index = _running_rows(runs, weight.shape[0] // owner.numel())
    result = x.new_zeros(x.shape[0], weight.shape[0])
    if not cpu.rows(result, x, weight, bias, index, index.numel(), "identity", in_place=True):
        rows = F.linear(x, weight[index], None if bias is None else bias[index])
        result[:, index] = rows
    return result


def _fake_head_sum(hidden: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    return hidden.new_empty(1, hidden.shape[0], weight.shape[1], dtype=torch.float32)


@cpu.cpu_op("dejavu::head_sum_cpu", _fake_head_sum)
def head_sum_cpu(hidden: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """Opaque to tracing."""
    block = hidden.shape[1] // keep.shape[1]
    if keep.shape[0] > 1:
        hidden = hidden.masked_fill(~keep.repeat_interleave(block, dim=1), 0.0)
    index = _running_rows(keep.any(dim=0), block)
    total = cpu.summed(hidden, weight, index, index.numel(), False)
    if total is not None:
        return total
    return (hidden[:, index] @ weight[index]).float()[None]


@triton_op("dejavu::head_rows", mutates_args=())
def head_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor, keep: Tensor
) -> Tensor:
    """See `head_rows_reference`."""
    if not x.is_cuda:
        return head_rows_cpu(x, weight, bias, owner, keep)
    return launch_head_rows(wrap_triton(_head_rows_kernel), x, weight, bias, owner, keep)


@triton_op("dejavu::head_sum", mutates_args=())
def head_sum(hidden: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """See `head_sum_reference`."""
    if not hidden.is_cuda:
        return head_sum_cpu(hidden, weight, keep)
    return launch_head_sum(wrap_triton(_head_sum_kernel), hidden, weight, keep)
