"""Output projection of the selected units: their weight rows, weighted and summed.

    partials[s, t] = sum over slots j of split s of hidden[t, j] * weight[index[j]]

Summing over dim 0 finishes it. The caller does that, so that Inductor fuses it with the residual add
and the next norm. Two stages instead of float atomics: the result is the same on every run.
"""

import torch
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import PROCESSORS, cdiv, empty, jit, power_of_2, tl, wrap_triton
from .rows import CPU_DENSE_ABOVE, check_rows


def gathered_sum_reference(
    hidden: Tensor, weight: Tensor, index: Tensor, count: Tensor, compacted: bool
) -> Tensor:
    """hidden [m, n]: by slot if `compacted`, else by unit; weight [n, d], rows contiguous.

    index [n] int32 and count [] int32 are a selection; nothing of a slot at or past `count` is read.
    Returns [1, m, d] fp32.
    """
    k = int(count)
    chosen = index[:k].long()
    values = hidden[:, :k] if compacted else hidden[:, chosen]
    return (values.float() @ weight[chosen].float())[None]


@jit
def _sum_kernel(
    hidden_ptr, weight_ptr, index_ptr, count_ptr, out_ptr, n, d, weight_stride,
    TOKENS: tl.constexpr, COMPACTED: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, splits). Each split takes an equal, contiguous share of the live slots."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    count = tl.load(count_ptr)
    share = tl.cdiv(count, tl.num_programs(1))
    first = split * share
    last = tl.minimum(first + share, count)
    for token in tl.static_range(TOKENS):
        total = tl.zeros([BLOCK_J, BLOCK_D], dtype=tl.float32)
        for start in range(first, last, BLOCK_J):
            slot = start + tl.arange(0, BLOCK_J)
            live = slot < last
            unit = tl.load(index_ptr + slot, mask=live, other=0)
            at = slot if COMPACTED else unit
            h = tl.load(hidden_ptr + token * n + at, mask=live, other=0.0).to(tl.float32)
            w = tl.load(
                weight_ptr + unit[:, None].to(tl.int64) * weight_stride + column[None, :],
                mask=live[:, None] & (column[None, :] < d), other=0.0,
            ).to(tl.float32)  # fmt: skip
            total += h[:, None] * w
        out = (split * TOKENS + token).to(tl.int64) * d + column
        tl.store(out_ptr + out, tl.sum(total, axis=0), mask=column < d)


def sum_config(n: int, d: int) -> dict[str, int]:
    """Wide columns, and four programs a multiprocessor: measured on an H200 at d 4096 to 9216."""
    block_d = min(1024, power_of_2(d))
    splits = max(1, min(4 * PROCESSORS // cdiv(d, block_d), cdiv(n, 64)))
    return {"BLOCK_J": 8, "BLOCK_D": block_d, "num_warps": 4, "splits": splits}


def launch_sum(
    kernel, hidden: Tensor, weight: Tensor, index: Tensor, count: Tensor, compacted: bool,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Launch `_sum_kernel`, wrapped or not."""
    hidden = hidden.contiguous()
    check_rows(weight)
    (tokens, n), d = hidden.shape, weight.shape[1]
    config = dict(config or sum_config(n, d))
    splits = config.pop("splits")
    out = empty(splits, tokens, d, like=hidden, dtype=torch.float32)
    kernel[(cdiv(d, config["BLOCK_D"]), splits)](
        hidden, weight, index, count, out, n, d, weight.stride(0),
        TOKENS=tokens, COMPACTED=compacted, **config,
    )  # fmt: skip
    return out


def _fake_gathered_sum(
    hidden: Tensor, weight: Tensor, index: Tensor, count: Tensor, compacted: bool
) -> Tensor:
    return hidden.new_empty(1, hidden.shape[0], weight.shape[1], dtype=torch.float32)


@cpu.cpu_op("dejavu::gathered_sum_cpu", _fake_gathered_sum)
def gathered_sum_cpu(
    hidden: Tensor, weight: Tensor, index: Tensor, count: Tensor, compacted: bool
) -> Tensor:
    """Opaque to tracing; where there is no C++ form, gathered and multiplied in the weights' dtype."""
    k, n = int(count), weight.shape[0]
    total = cpu.summed(hidden, weight, index, k, compacted)
    if total is not None:
        return total
    chosen = index[:k]
    if k > CPU_DENSE_ABOVE * n:
        by_unit = torch.zeros_like(hidden)
        values = hidden[:, :k] if compacted else hidden.index_select(1, chosen)
        by_unit[:, chosen.long()] = values
        return (by_unit @ weight).float()[None]
    values = hidden[:, :k] if compacted else hidden.index_select(1, chosen)
    return (values @ weight.index_select(0, chosen)).float()[None]


@triton_op("dejavu::gathered_sum", mutates_args=())
def gathered_sum(
    hidden: Tensor, weight: Tensor, index: Tensor, count: Tensor, compacted: bool
) -> Tensor:
    """See `gathered_sum_reference`; [splits, m, d] fp32, to be summed over dim 0."""
    if not hidden.is_cuda:
        return gathered_sum_cpu(hidden, weight, index, count, compacted)
    return launch_sum(wrap_triton(_sum_kernel), hidden, weight, index, count, compacted)
