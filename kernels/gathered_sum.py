"""Output projection of the selected units: their weight rows, weighted and summed.

    y[t] = sum over slots j of hidden[t, j] * weight[index[j]]

Programs share the slots. What they leave is added up in one order, by the last to arrive or, where that is little, by the kernel
behind: no second launch, and unlike with float atomics the result is the same on every run.
"""

import torch
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import (
    PROCESSORS,
    add_up,
    added_up,
    cdiv,
    check_arrived,
    empty,
    is_last,
    jit,
    leaves_parts,
    power_of_2,
    start_next,
    tl,
    wait_for_previous,
    wrap_triton,
)
from .rows import CPU_DENSE_ABOVE, check_rows, once
from .tuning import Config, candidates, config_for, key_of


def gathered_sum_reference(
    hidden: Tensor, weight: Tensor, index: Tensor, count: Tensor, compacted: bool
) -> Tensor:
    """hidden [m, n]: by slot if `compacted`, else by unit; weight [n, d], rows contiguous.

    index [n] int32 and count [] int32 are a selection; nothing of a slot at or past `count` is read.
    Returns [m, d] fp32.
    """
    k = int(count)
    chosen = index[:k].long()
    values = hidden[:, :k] if compacted else hidden[:, chosen]
    return values.float() @ weight[chosen].float()


@jit
def rows_of(weight_ptr, unit, live, column, d, stride):
    """Some columns of the rows of these units, zero where not `live`."""
    row = weight_ptr + unit[:, None].to(tl.int64) * stride
    return once(row + column[None, :], live[:, None] & (column[None, :] < d))


@jit
def _unit(index_ptr, slot, n):
    """The units of some slots."""
    return tl.load(index_ptr + slot, mask=slot < n, other=0, cache_modifier=".cg")


@jit
def quarters(values, BLOCK_J: tl.constexpr):
    """4 * BLOCK_J values as four blocks: every fourth, from the first, the second, the third and the fourth on.

    A block loaded by itself goes through shared memory to where it is used, and the next load waits for that. One load of
    all goes there once.
    """
    even, odd = tl.split(tl.reshape(values, [BLOCK_J, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@jit
def times_of(values, at, live, w):
    """The rows of a weight, each times its value."""
    h = tl.load(values + at, mask=live, other=0.0).to(tl.float32)
    return h[:, None] * w.to(tl.float32)


@jit
def _add(
    total0, total1, total2, total3, values, n, slot, unit, w, last,
    TOKENS: tl.constexpr, COMPACTED: tl.constexpr,
):  # fmt: skip
    """Rows that are read once, weighed by up to four tokens and added to their sums."""
    at, live = slot if COMPACTED else unit, slot < last
    total0 += times_of(values, at, live, w)
    if TOKENS > 1:
        total1 += times_of(values + n, at, live, w)
    if TOKENS > 2:
        total2 += times_of(values + 2 * n, at, live, w)
    if TOKENS > 3:
        total3 += times_of(values + 3 * n, at, live, w)
    return total0, total1, total2, total3


@jit
def _sum_kernel(
    hidden_ptr, weight_ptr, index_ptr, count_ptr, part_ptr, arrived_ptr, out_ptr, n, d, weight_stride,
    TOKENS: tl.constexpr, COMPACTED: tl.constexpr, SPLIT: tl.constexpr, ADD: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, FOUR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, splits). Each split takes an equal, contiguous share of the live slots.

    The weights of its first block of slots, or first FOUR for one token, are asked for before it waits for the kernel before.
    Where there is more than one split (SPLIT), each leaves its part; with ADD the last to finish a block of columns adds them up.
    """
    if not COMPACTED:
        # Its selection may come from the very kernel before; of compacted values that is the one that made them.
        wait_for_previous(EARLY)
    start_next(EARLY)
    block = tl.program_id(0)
    column = block * BLOCK_D + tl.arange(0, BLOCK_D)
    split, splits = tl.program_id(1), tl.num_programs(1)
    count = tl.load(count_ptr, cache_modifier=".cg")
    share = tl.cdiv(count, splits)
    first = split * share
    last = tl.minimum(first + share, count)
    for group in tl.static_range(0, TOKENS, 4):
        values = hidden_ptr + group * n
        total0 = tl.zeros([BLOCK_J, BLOCK_D], dtype=tl.float32)
        total1, total2, total3 = total0, total0, total0
        start = first
        if FOUR:
            every = first + tl.arange(0, 4 * BLOCK_J)
            fourth = first + 4 * tl.arange(0, BLOCK_J)
            units = _unit(index_ptr, every, n)
            unit0, unit1, unit2, unit3 = quarters(units, BLOCK_J)
            w0 = rows_of(weight_ptr, unit0, fourth < last, column, d, weight_stride)
            w1 = rows_of(weight_ptr, unit1, fourth + 1 < last, column, d, weight_stride)
            w2 = rows_of(weight_ptr, unit2, fourth + 2 < last, column, d, weight_stride)
            w3 = rows_of(weight_ptr, unit3, fourth + 3 < last, column, d, weight_stride)
            if COMPACTED:
                wait_for_previous(EARLY)
            at = every if COMPACTED else units
            h = tl.load(values + at, mask=every < last, other=0.0).to(tl.float32)
            h0, h1, h2, h3 = quarters(h, BLOCK_J)
            total0 += h0[:, None] * w0.to(tl.float32)
            total0 += h1[:, None] * w1.to(tl.float32)
            total0 += h2[:, None] * w2.to(tl.float32)
            total0 += h3[:, None] * w3.to(tl.float32)
            start += 4 * BLOCK_J
        slot = start + tl.arange(0, BLOCK_J)
        unit = _unit(index_ptr, slot, n)
        w = rows_of(weight_ptr, unit, slot < last, column, d, weight_stride)
        if COMPACTED and not FOUR:
            wait_for_previous(EARLY)
        next_unit = _unit(index_ptr, slot + BLOCK_J, n)
        for _ in range(start, last, BLOCK_J):
            following = slot + BLOCK_J
            # The next round's weights are asked for before this one's are waited for, and its units a round earlier.
            next_w = rows_of(weight_ptr, next_unit, following < last, column, d, weight_stride)
            unit_after = _unit(index_ptr, following + BLOCK_J, n)
            total0, total1, total2, total3 = _add(
                total0, total1, total2, total3, values, n, slot, unit, w, last, TOKENS - group, COMPACTED
            )  # fmt: skip
            slot, unit, w, next_unit = following, next_unit, next_w, unit_after
        totals = total0, total1, total2, total3
        for token in tl.static_range(TOKENS - group if TOKENS - group < 4 else 4):
            part = (split * TOKENS + group + token).to(tl.int64) * d + column
            target = part_ptr if SPLIT else out_ptr
            tl.store(target + part, tl.sum(totals[token], axis=0), mask=column < d)
    if ADD:
        if is_last(arrived_ptr + block, splits):
            add_up(part_ptr, out_ptr, column, splits, TOKENS, d, 16, BLOCK_D)


def sum_config(n: int, d: int, tokens: int = 1) -> Config:
    """Weights that fill the registers before the wait; of several tokens, sums. Sixteen warps a multiprocessor. (H200, d 4096 to
    12288 at 10 and 50 %; H100, 2 to 8 tokens)"""
    if tokens > 1:
        block_j, block_d = (32, 64) if d <= 4096 else (16, 128)
        block_d = min(block_d, power_of_2(d))
        splits = max(1, min(16, 4 * PROCESSORS // cdiv(d, block_d), cdiv(n, 64)))
        return {
            "BLOCK_J": block_j,
            "BLOCK_D": block_d,
            "num_warps": 4,
            "splits": splits,
            "FOUR": False,
        }
    if d <= 4096:
        block_d = min(64, power_of_2(d))
        splits = max(1, min(16, 2 * PROCESSORS // cdiv(d, block_d), cdiv(n, 512)))
        return {"BLOCK_J": 128, "BLOCK_D": block_d, "num_warps": 8, "splits": splits, "FOUR": True}
    splits = max(1, min(32, 4 * PROCESSORS // cdiv(d, 512), cdiv(n, 64)))
    return {"BLOCK_J": 8, "BLOCK_D": 512, "num_warps": 4, "splits": splits, "FOUR": True}


def sum_candidates(n: int, d: int, tokens: int = 1) -> list[Config]:
    """`sum_config`, with half and twice as many splits, with other weights at hand, and in other tiles."""
    rule = sum_config(n, d, tokens)
    others = [{**rule, "splits": max(1, rule["splits"] // 2)}]
    others += [{**rule, "splits": max(1, min(32, 2 * rule["splits"], cdiv(n, 64)))}]
    tiles = [
        (16, 128, 4, False),
        (64, 64, 4, False),
        (16, 64, 4, False),
        (32, 64, 8, False),
        (8, 256, 4, False),
    ]
    if tokens == 1:
        others += [{**rule, "FOUR": not rule["FOUR"]}]
        tiles = [
            (64, 64, 4, True), (8, 512, 4, True), (32, 128, 4, True), (32, 64, 4, True), (64, 128, 4, True),
            (64, 64, 4, False), (32, 128, 4, False), (128, 32, 4, True),
        ]  # fmt: skip
    for block_j, block_d, warps, four in tiles:
        block_d = min(block_d, power_of_2(d))
        splits = max(1, min(32, 4 * PROCESSORS // cdiv(d, block_d), cdiv(n, 64)))
        others.append(
            {"BLOCK_J": block_j, "BLOCK_D": block_d, "num_warps": warps, "splits": splits, "FOUR": four}
        )  # fmt: skip
    return candidates(rule, others)


def sum_key(hidden: Tensor, weight: Tensor, compacted: bool) -> str:
    """Of a launch."""
    (tokens, n), d = hidden.shape, weight.shape[1]
    return key_of("sum", hidden, tokens=tokens, n=n, d=d, compacted=compacted)


def launch_sum(
    kernel, hidden: Tensor, weight: Tensor, index: Tensor, count: Tensor, compacted: bool,
    arrived: Tensor, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launch `_sum_kernel`, wrapped or not. Returns [parts, m, d], one part or as many as it leaves (`leaves_parts`)."""
    hidden = hidden.contiguous()
    check_rows(weight)
    (tokens, n), d = hidden.shape, weight.shape[1]
    config = dict(
        config or config_for(sum_key(hidden, weight, compacted), sum_config(n, d, tokens))
    )
    config["FOUR"] = config["FOUR"] and tokens == 1
    splits, blocks = config.pop("splits"), cdiv(d, config["BLOCK_D"])
    check_arrived(arrived, blocks)
    left = leaves_parts(splits, tokens, d)
    out = part = empty(splits if left else 1, tokens, d, like=hidden, dtype=torch.float32)
    if splits > 1 and not left:
        part = empty(splits, tokens, d, like=hidden, dtype=torch.float32)
    kernel[(blocks, splits)](
        hidden, weight, index, count, part, arrived, out, n, d, weight.stride(0),
        TOKENS=tokens, COMPACTED=compacted, SPLIT=splits > 1, ADD=splits > 1 and not left, EARLY=False, **config,
    )  # fmt: skip
    return out


def _fake_gathered_sum(
    hidden: Tensor, weight: Tensor, index: Tensor, count: Tensor, compacted: bool
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[1], dtype=torch.float32)


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
        return (by_unit @ weight).float()
    values = hidden[:, :k] if compacted else hidden.index_select(1, chosen)
    return (values @ weight.index_select(0, chosen)).float()


@triton_op("dejavu::gathered_sum", mutates_args=("arrived",))
def gathered_sum(
    hidden: Tensor, weight: Tensor, index: Tensor, count: Tensor, compacted: bool, arrived: Tensor
) -> Tensor:
    """See `gathered_sum_reference`. `arrived` [column blocks] int32 holds zeros before and after, on a GPU."""
    if not hidden.is_cuda:
        return gathered_sum_cpu(hidden, weight, index, count, compacted)
    kernel = wrap_triton(_sum_kernel)
    return added_up(launch_sum(kernel, hidden, weight, index, count, compacted, arrived))
