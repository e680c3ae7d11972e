"""The output projection of attention, of the heads that run only. Every head keeps its place.

    y[t] = sum over running heads h of hidden[t, h] @ weight[h]

A head runs for a token where its score isn't at most zero. Heads are few, so nothing is compacted in memory:
each program counts the running ones itself. Selections differ from token to token; a weight is read once if
any token's head runs. (Deja Vu, section 4.2)
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
from .gathered_sum import quarters, rows_of, times_of
from .gemv import running
from .rows import check_rows
from .tuning import Config, candidates, config_for, key_of


def head_sum_reference(hidden: Tensor, weight: Tensor, score: Tensor) -> Tensor:
    """hidden [m, heads * width], weight [heads * width, d], rows contiguous; score [m, heads].

    Nothing of a head that doesn't run is read, token by token. Returns [m, d] fp32.
    """
    kept = running(score).repeat_interleave(hidden.shape[1] // score.shape[1], dim=1)
    return hidden.float().masked_fill(~kept, 0.0) @ weight.float()


@jit
def _block_of(item, running, place, head, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr):
    """The heads and the rows of the weight that the item's BLOCK_J rows of running heads are, and which there are."""
    j = item * BLOCK_J + tl.arange(0, BLOCK_J)
    if BLOCK_J <= WIDTH and WIDTH % BLOCK_J == 0:
        at = tl.sum(tl.where(place == item * BLOCK_J // WIDTH, head, 0), axis=0) + 0 * j
    else:
        order = tl.sum(tl.where(place[None, :] == head[:, None], head[None, :], 0), axis=1)
        at = tl.gather(order, tl.minimum(j // WIDTH, head.shape[0] - 1), axis=0)
    return at, at * WIDTH + j % WIDTH, j < running * WIDTH


@jit
def _of_token(hidden_ptr, score_ptr, at, row, live, w, SEVERAL: tl.constexpr):
    """Rows of the weight times what attention gave for them, of one token's running heads."""
    if SEVERAL:
        score = tl.load(score_ptr + at, mask=live, other=-1.0).to(tl.float32)
        live = live & ((score > 0) | (score != score))
    return times_of(hidden_ptr, row, live, w)


@jit
def _add(
    total0, total1, total2, total3, hidden_ptr, score_ptr, heads, at, row, live, w,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """Rows that are read once, weighed by up to four tokens and added to their sums."""
    n = heads * WIDTH
    total0 += _of_token(hidden_ptr, score_ptr, at, row, live, w, SEVERAL)
    if TOKENS > 1:
        total1 += _of_token(hidden_ptr + n, score_ptr + heads, at, row, live, w, SEVERAL)
    if TOKENS > 2:
        total2 += _of_token(hidden_ptr + 2 * n, score_ptr + 2 * heads, at, row, live, w, SEVERAL)
    if TOKENS > 3:
        total3 += _of_token(hidden_ptr + 3 * n, score_ptr + 3 * heads, at, row, live, w, SEVERAL)
    return total0, total1, total2, total3


@jit
def _begin_of(item, items, place, head, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr):
    """The first row of the item, BLOCK_J rows of one running head; past the last item -1."""
    at = tl.sum(tl.where(place == item * BLOCK_J // WIDTH, head, 0), axis=0)
    return tl.where(item < items, at * WIDTH + item * BLOCK_J % WIDTH, -1)


@jit
def _asked(weight_ptr, begin, column, d, stride, BLOCK_J: tl.constexpr):
    """The weights of an item's rows, which are on their way."""
    row = begin + tl.arange(0, BLOCK_J)
    return rows_of(weight_ptr, row, (row >= 0) & (begin >= 0), column, d, stride)


@jit
def _head_sum_kernel(
    hidden_ptr, weight_ptr, score_ptr, part_ptr, arrived_ptr, out_ptr, heads, d, weight_stride,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr, ADD: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, FOUR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, splits). A split takes every num_splits-th block of BLOCK_J rows of the running heads.

    HEADS is a power of two, at least `heads`. The weights of its first block, or first FOUR for one token, are asked for
    before it waits for the kernel before. Where there is more than one split (SPLIT), each leaves its part; with ADD the last to
    finish a block of columns adds them up.
    """
    start_next(EARLY)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split, splits = tl.program_id(1), tl.num_programs(1)
    head = tl.arange(0, HEADS)
    any_runs = tl.zeros([HEADS], dtype=tl.int32)
    for token in tl.static_range(TOKENS):
        at = score_ptr + token * heads + head
        scores = tl.load(at, mask=head < heads, other=-1.0, cache_modifier=".cg")
        any_runs = any_runs | ((scores > 0) | (scores != scores)).to(tl.int32)
    place = tl.where(any_runs != 0, tl.cumsum(any_runs, axis=0) - 1, -1)
    running = tl.sum(any_runs, axis=0)
    items = tl.cdiv(running * WIDTH, BLOCK_J)
    for group in tl.static_range(0, TOKENS, 4):
        total0 = tl.zeros([BLOCK_J, BLOCK_D], dtype=tl.float32)
        total1, total2, total3 = total0, total0, total0
        hidden, scores = hidden_ptr + group * heads * WIDTH, score_ptr + group * heads
        begin = split
        if FOUR:
            begin0 = _begin_of(split, items, place, head, WIDTH, BLOCK_J)
            begin1 = _begin_of(split + splits, items, place, head, WIDTH, BLOCK_J)
            begin2 = _begin_of(split + 2 * splits, items, place, head, WIDTH, BLOCK_J)
            begin3 = _begin_of(split + 3 * splits, items, place, head, WIDTH, BLOCK_J)
            w0 = _asked(weight_ptr, begin0, column, d, weight_stride, BLOCK_J)
            w1 = _asked(weight_ptr, begin1, column, d, weight_stride, BLOCK_J)
            w2 = _asked(weight_ptr, begin2, column, d, weight_stride, BLOCK_J)
            w3 = _asked(weight_ptr, begin3, column, d, weight_stride, BLOCK_J)
            every = tl.arange(0, 4 * BLOCK_J)
            of = every % 4
            first = tl.where(
                of < 2, tl.where(of == 0, begin0, begin1), tl.where(of == 2, begin2, begin3)
            )
            wait_for_previous(EARLY)
            values = tl.load(hidden_ptr + first + every // 4, mask=first >= 0, other=0.0)
            h0, h1, h2, h3 = quarters(values.to(tl.float32), BLOCK_J)
            total0 += h0[:, None] * w0.to(tl.float32)
            total0 += h1[:, None] * w1.to(tl.float32)
            total0 += h2[:, None] * w2.to(tl.float32)
            total0 += h3[:, None] * w3.to(tl.float32)
            begin += 4 * splits
        at, row, live = _block_of(begin, running, place, head, WIDTH, BLOCK_J)
        w = rows_of(weight_ptr, row, live, column, d, weight_stride)
        if not FOUR:
            wait_for_previous(EARLY)
        for item in range(begin, items, splits):
            # The next round's weights are asked for before this one's are waited for.
            next_at, next_row, next_live = _block_of(
                item + splits, running, place, head, WIDTH, BLOCK_J
            )
            next_w = rows_of(weight_ptr, next_row, next_live, column, d, weight_stride)
            total0, total1, total2, total3 = _add(
                total0, total1, total2, total3, hidden, scores, heads, at, row, live, w,
                WIDTH, TOKENS - group, TOKENS > 1,
            )  # fmt: skip
            at, row, live, w = next_at, next_row, next_live, next_w
        totals = total0, total1, total2, total3
        for token in tl.static_range(TOKENS - group if TOKENS - group < 4 else 4):
            part = (split * TOKENS + group + token).to(tl.int64) * d + column
            target = part_ptr if SPLIT else out_ptr
            tl.store(target + part, tl.sum(totals[token], axis=0), mask=column < d)
    if ADD:
        if is_last(arrived_ptr + tl.program_id(0), splits):
            add_up(part_ptr, out_ptr, column, splits, TOKENS, d, 16, BLOCK_D)


def head_sum_config(heads: int, width: int, d: int, tokens: int = 1) -> Config:
    """Two to five programs a multiprocessor, with tiles that keep memory busy. (H200, d 4096 and 9216)"""
    if tokens > 1:
        block_j, block_d = min(16, power_of_2(width)), min(128, power_of_2(d))
        most = min(16, 4 * PROCESSORS // cdiv(d, block_d))
    elif d <= 4096:
        block_j, block_d, most = min(128, power_of_2(width)), min(64, power_of_2(d)), 4
    else:
        block_j, block_d = min(64, power_of_2(width)), 64
        most = min(16, 5 * PROCESSORS // cdiv(d, block_d))
    splits = max(1, min(heads * cdiv(width, block_j), most))
    return {
        "BLOCK_J": block_j, "BLOCK_D": block_d, "num_warps": 4, "splits": splits,
        "FOUR": tokens == 1,
    }  # fmt: skip


def head_sum_candidates(heads: int, width: int, d: int, tokens: int = 1) -> list[Config]:
    """`head_sum_config`, with half and twice as many splits, with other weights at hand, and in other tiles."""
    rule = head_sum_config(heads, width, d, tokens)
    most = heads * cdiv(width, rule["BLOCK_J"])
    others = [{**rule, "splits": max(1, rule["splits"] // 2)}]
    others += [{**rule, "splits": min(32, most, 2 * rule["splits"])}]
    tiles = [(32, 64, 4, False), (16, 64, 4, False), (32, 128, 8, False), (8, 128, 4, False)]
    if tokens == 1:
        others += [{**rule, "FOUR": not rule["FOUR"]}]
        tiles = [
            (64, 64, 4, True), (64, 128, 4, False), (128, 64, 4, False), (32, 128, 4, True), (32, 64, 4, True),
            (64, 128, 8, True), (32, 128, 4, False), (128, 32, 4, True),
        ]  # fmt: skip
    for block_j, block_d, warps, four in tiles:
        block_j, block_d = min(block_j, power_of_2(width)), min(block_d, power_of_2(d))
        splits = min(16, 4 * PROCESSORS // cdiv(d, block_d), heads * cdiv(width, block_j))
        others.append(
            {"BLOCK_J": block_j, "BLOCK_D": block_d, "num_warps": warps, "splits": max(1, splits), "FOUR": four}
        )  # fmt: skip
    return candidates(rule, others)


def head_sum_key(hidden: Tensor, weight: Tensor, score: Tensor) -> str:
    """Of a launch."""
    tokens, heads = score.shape
    return key_of(
        "head_sum", hidden, tokens=tokens, heads=heads, n=weight.shape[0], d=weight.shape[1]
    )


def launch_head_sum(
    kernel, hidden: Tensor, weight: Tensor, score: Tensor, arrived: Tensor,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launch `_head_sum_kernel`, wrapped or not. Returns [parts, m, d], as `launch_sum` does."""
    hidden, score = hidden.contiguous(), score.contiguous()
    check_rows(weight)
    (tokens, heads), d = score.shape, weight.shape[1]
    width = weight.shape[0] // heads
    rule = head_sum_config(heads, width, d, tokens)
    config = dict(config or config_for(head_sum_key(hidden, weight, score), rule))
    config["FOUR"] = config["FOUR"] and tokens == 1 and width % config["BLOCK_J"] == 0
    splits, blocks = config.pop("splits"), cdiv(d, config["BLOCK_D"])
    check_arrived(arrived, blocks)
    left = leaves_parts(splits, tokens, d)
    out = part = empty(splits if left else 1, tokens, d, like=hidden, dtype=torch.float32)
    if splits > 1 and not left:
        part = empty(splits, tokens, d, like=hidden, dtype=torch.float32)
    kernel[(blocks, splits)](
        hidden, weight, score, part, arrived, out, heads, d, weight.stride(0),
        WIDTH=width, TOKENS=tokens, HEADS=power_of_2(heads), SPLIT=splits > 1, ADD=splits > 1 and not left,
        EARLY=False, **config,
    )  # fmt: skip
    return out


def _fake_head_sum(hidden: Tensor, weight: Tensor, score: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[1], dtype=torch.float32)


@cpu.cpu_op("dejavu::head_sum_cpu", _fake_head_sum)
def head_sum_cpu(hidden: Tensor, weight: Tensor, score: Tensor) -> Tensor:
    """Opaque to tracing: how much it reads depends on the heads."""
    rows = running(score).repeat_interleave(hidden.shape[1] // score.shape[1], dim=1)
    if score.shape[0] > 1:
        hidden = hidden.masked_fill(~rows, 0.0)
    index = rows.any(dim=0).nonzero().flatten().int()
    total = cpu.summed(hidden, weight, index, index.numel(), False)
    if total is not None:
        return total
    return (hidden[:, index] @ weight[index]).float()


@triton_op("dejavu::head_sum", mutates_args=("arrived",))
def head_sum(hidden: Tensor, weight: Tensor, score: Tensor, arrived: Tensor) -> Tensor:
    """See `head_sum_reference`. `arrived` [column blocks] int32 holds zeros before and after, on a GPU."""
    if not hidden.is_cuda:
        return head_sum_cpu(hidden, weight, score)
    kernel = wrap_triton(_head_sum_kernel)
    return added_up(launch_head_sum(kernel, hidden, weight, score, arrived))
