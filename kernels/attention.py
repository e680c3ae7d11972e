"""Attention of one query per sequence, of the heads that run, over a cache that is read in place.

    y[b, h] = softmax(cap(scale * q[b, h] @ k[b, g].T) + mask) @ v[b, g],    g = h * kv_heads // heads

where cap(x) = softcap * tanh(x), or x where softcap is 0. (Gemma 2, section 2: their s is scale * softcap)

A head whose score is at most zero doesn't run: it reads nothing and gives zero. Slots that a boolean mask
rules out aren't read either: a static cache costs what it holds, not what it could hold. Keys shared by
several heads (GQA, MQA) are read where they are, never expanded to a copy. (Deja Vu, section 4.2; split along
the sequence as in Flash-Decoding)
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import (
    PROCESSORS,
    cdiv,
    check_arrived,
    empty,
    is_last,
    jit,
    power_of_2,
    present,
    start_next,
    tl,
    wait_for_previous,
    wrap_triton,
)
from .gemv import running
from .tuning import Config, candidates, config_for, key_of

NEGATIVE = float("-inf")


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float = 0.0,
    score: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [b, h, 1, d]; k [b, g, s, d], v [b, g, s, e], where g divides h, last dim contiguous.

    mask broadcasts to [b, h, 1, s]: bool (True: attend) or added to the logits. score [b, h]: which heads run,
    None for all. Returns [b, h, 1, e] of q's dtype, accumulated in fp32 at least; zero where nothing
    may be attended. The query of a head that doesn't run isn't read: it may be anything.
    """
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(groups, dim=1).to(wide) for x in (k, v))
    logits = scale * q.to(wide) @ k.mT
    logits = softcap * logits.tanh() if softcap else logits
    if mask is not None:
        boolean = mask.dtype is torch.bool
        logits = logits.masked_fill(~mask, NEGATIVE) if boolean else logits + mask.to(wide)
    weight = logits.softmax(dim=-1).masked_fill((logits == NEGATIVE).all(-1, keepdim=True), 0.0)
    y = weight @ v
    if score is not None:
        y = y.masked_fill(~running(score)[:, :, None, None], 0.0)
    return y.to(q.dtype)


@jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, score_ptr, part_ptr, stats_ptr, arrived_ptr, out_ptr,
    scale, softcap, kv_heads, slots, per_split,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, mask_b, mask_h, mask_s,
    D: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
    SELECT: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, JOIN: tl.constexpr,
    SCAN: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, DOT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (batch * kv_heads, splits): the GROUP heads that share keys are ROWS rows of one product, by tensor cores (DOT) or,
    of one row, without.

    MASK: 0 none, 1 boolean, 2 added. SCAN, a power of two, at least `per_split`: one boolean mask for all heads is
    read ahead, and no more where the slots that it allows have no holes between them; 0: it isn't. GATED: keys and
    values that a boolean mask hides aren't read, so the others wait for it.
    A group of which no head runs ends at once. Of the others the last split to finish joins what all of them left, of JOIN
    heads at a time. SPLITS is a power of two, at least the number of splits.
    """
    start_next(EARLY, 2 if SELECT else 0)  # HEADS_START, which a kernel can't name
    wait_for_previous(EARLY)
    start_next(EARLY)
    at, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, g = at // kv_heads, at % kv_heads
    row = tl.arange(0, ROWS)
    head = g * GROUP + row
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    # All are asked for beside the score: one latency less each. Heads that don't run may hold anything, and are dropped below.
    begin = split * per_split
    stop = tl.minimum(begin + per_split, slots)
    mask_ptr += b * mask_b
    if SCAN:
        every = begin + tl.arange(0, SCAN)
        seen = tl.load(mask_ptr + every * mask_s, mask=every < stop, other=0) != 0
    q = tl.load(
        q_ptr + b * q_b + head[:, None] * q_h + d[None, :],
        mask=(row < GROUP)[:, None] & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    runs = row < GROUP
    if SELECT:
        score = tl.load(score_ptr + at * GROUP + row, mask=runs, other=-1.0).to(tl.float32)
        if not DOT:
            # The compiler would ask for the query where it is used, behind the branch that waits for the score.
            tl.debug_barrier()
        runs = runs & ((score > 0) | (score != score))
    if tl.max(runs.to(tl.int32), axis=0) != 0:
        # Python floats arrive as fp64 from Inductor
        factor = tl.full([1], scale, tl.float32)
        cap = tl.full([1], softcap, tl.float32)
        k_ptr += b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
        v_ptr += b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
        if SCAN:
            begin = tl.min(tl.where(seen, every, stop), axis=0)
            stop = tl.max(tl.where(seen, every + 1, begin), axis=0)
            if tl.sum(seen.to(tl.int32), axis=0) == stop - begin:
                largest, total, y = _attend(
                    begin, stop, q, runs, head, k_ptr, v_ptr, mask_ptr, factor, cap, k_s, v_s, mask_h, mask_s,
                    D, E, 0, CAP, ROWS, BLOCK_S, BLOCK_D, BLOCK_E, STAGES, GATED, DOT,
                )  # fmt: skip
            else:
                # Not staged: shared memory holds the buffers of both loops.
                largest, total, y = _attend(
                    begin, stop, q, runs, head, k_ptr, v_ptr, mask_ptr, factor, cap, k_s, v_s, mask_h, mask_s,
                    D, E, MASK, CAP, ROWS, BLOCK_S, BLOCK_D, BLOCK_E, 1, GATED, DOT,
                )  # fmt: skip
        else:
            largest, total, y = _attend(
                begin, stop, q, runs, head, k_ptr, v_ptr, mask_ptr, factor, cap, k_s, v_s, mask_h, mask_s,
                D, E, MASK, CAP, ROWS, BLOCK_S, BLOCK_D, BLOCK_E, STAGES, GATED, DOT,
            )  # fmt: skip
        if SPLITS == 1:
            whole = tl.where(runs & (total != 0.0), total, 1.0)
            y = tl.where(runs[:, None], y / whole[:, None], 0.0).to(out_ptr.dtype.element_ty)
            out = out_ptr + (at * GROUP + row)[:, None] * E + e[None, :]
            tl.store(out, y, mask=(row < GROUP)[:, None] & (e[None, :] < E))
        else:
            place = (at * GROUP + row).to(tl.int64) * splits + split
            tl.store(
                part_ptr + place[:, None] * E + e[None, :],
                y,
                mask=runs[:, None] & (e[None, :] < E),
            )
            tl.store(stats_ptr + 2 * place, largest, mask=runs)
            tl.store(stats_ptr + 2 * place + 1, total, mask=runs)
            if is_last(arrived_ptr + at, splits):
                for r in range(0, GROUP, JOIN):
                    _join(
                        at * GROUP, r, part_ptr, stats_ptr, score_ptr, out_ptr, splits,
                        E, GROUP, SELECT, SPLITS, JOIN, BLOCK_E,
                    )  # fmt: skip
    elif split == 0:
        zero = tl.zeros([ROWS, BLOCK_E], dtype=out_ptr.dtype.element_ty)
        out = out_ptr + (at * GROUP + row)[:, None] * E + e[None, :]
        tl.store(out, zero, mask=(row < GROUP)[:, None] & (e[None, :] < E))


@jit
def _attend(
    begin, stop, q, runs, head, k_ptr, v_ptr, mask_ptr, factor, cap, k_s, v_s, mask_h, mask_s,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The slots from `begin` to `stop`: largest logit, sum of the weights, and the values' weighted sum, by row."""
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    y = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    for start in tl.range(begin, stop, BLOCK_S, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_S)
        live = slot < stop
        allowed = runs[:, None] & live[None, :]  # [ROWS, BLOCK_S]
        added = tl.zeros([ROWS, BLOCK_S], dtype=tl.float32)
        if MASK != 0:
            at_mask = mask_ptr + head[:, None] * mask_h + slot[None, :] * mask_s
            if MASK == 1:
                allowed = allowed & (tl.load(at_mask, mask=allowed, other=0) != 0)
                shown = live & (tl.max(allowed.to(tl.int32), axis=0) != 0)
                if GATED:
                    live = shown
            else:
                added = tl.load(at_mask, mask=allowed, other=0.0).to(tl.float32)
        slot = slot.to(tl.int64)
        if DOT:
            # [BLOCK_D, BLOCK_S]
            k = tl.load(
                k_ptr + slot[None, :] * k_s + d[:, None],
                mask=live[None, :] & (d[:, None] < D), other=0.0,
            )  # fmt: skip
        else:
            # [BLOCK_S, BLOCK_D]
            k = tl.load(
                k_ptr + slot[:, None] * k_s + d[None, :],
                mask=live[:, None] & (d[None, :] < D), other=0.0,
            )  # fmt: skip
        # [BLOCK_S, BLOCK_E]
        v = tl.load(
            v_ptr + slot[:, None] * v_s + e[None, :],
            mask=live[:, None] & (e[None, :] < E), other=0.0,
        )  # fmt: skip
        if MASK == 1 and not GATED:
            v = tl.where(
                shown[:, None], v, 0.0
            )  # what is hidden may be anything, and zero times NaN is NaN
        if DOT:
            s = tl.dot(q, k, input_precision="ieee") * factor
        else:
            s = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[None, :] * factor
        if CAP:
            s = cap * (2 * tl.sigmoid(2 * s) - 1)  # tanh
        s = tl.where(allowed, s + added, float("-inf"))
        higher = tl.maximum(largest, tl.max(s, axis=1))
        # Nothing seen so far that may be attended: -inf minus -inf would be NaN
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(s - anchor[:, None])
        shrunk = tl.exp(largest - anchor)
        if DOT:
            more = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        else:
            more = tl.sum(tl.trans(weight) * v.to(tl.float32), axis=0)[None, :]
        y = y * shrunk[:, None] + more
        total = total * shrunk + tl.sum(weight, axis=1)
        largest = higher
    return largest, total, y


@jit
def _join(
    group_at, first, part_ptr, stats_ptr, score_ptr, out_ptr, splits,
    E: tl.constexpr, GROUP: tl.constexpr, SELECT: tl.constexpr, SPLITS: tl.constexpr, JOIN: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """JOIN heads from what their splits left, all asked for at once; zero for one that doesn't run, which left nothing."""
    e = tl.arange(0, BLOCK_E)
    s = tl.arange(0, SPLITS)
    row = first + tl.arange(0, JOIN)
    inside = row < GROUP
    at = group_at + row
    mine = inside[:, None] & (s < splits)[None, :]  # [JOIN, SPLITS]
    place = at[:, None] * splits + s[None, :]
    largest = tl.load(stats_ptr + 2 * place, mask=mine, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(stats_ptr + 2 * place + 1, mask=mine, other=0.0, cache_modifier=".cg")
    # [JOIN, SPLITS, BLOCK_E]
    part = tl.load(
        part_ptr + place.to(tl.int64)[:, :, None] * E + e[None, None, :],
        mask=mine[:, :, None] & (e < E)[None, None, :], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    if SELECT and GROUP > 1:  # a lone head runs, or nothing would be joined
        score = tl.load(score_ptr + at, mask=inside, other=-1.0).to(tl.float32)
        runs = ((score > 0) | (score != score))[:, None]
        largest = tl.where(runs, largest, float("-inf"))
        total = tl.where(runs, total, 0.0)
        part = tl.where(runs[:, :, None], part, 0.0)
    highest = tl.max(largest, axis=1)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp(largest - anchor[:, None])
    whole = tl.sum(weight * total, axis=1)
    y = tl.sum(weight[:, :, None] * part, axis=1) / tl.where(whole == 0.0, 1.0, whole)[:, None]
    out = out_ptr + at[:, None] * E + e[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


BLOCK_S = 64
MOST_SCANNED = 4096  # slots of a mask
GATED_ABOVE = 2 * PROCESSORS  # blocks of keys
LEAST = 16  # rows and columns of a matrix product
MOST_JOINED = 8192  # elements of parts that one program holds at a time
MOST_SPLITS = 128  # whose parts one program joins
MOST_OF_A_WARP = 32  # whose parts one warp joined when smaller blocks were timed


def attention_config(groups: int, slots: int, itemsize: int, group: int = 1) -> Config:
    """One block a program where that fills the chip a few times over at most; else four programs a multiprocessor.

    `groups` of `group` heads that share keys, of all sequences; `itemsize`: bytes of an element of the cache. Of heads that share
    none a block is one warp's, and smaller while there are few. (H200, 8 to 72 groups, 512 to 32k slots)
    """
    blocks = cdiv(slots, BLOCK_S)
    if groups * blocks <= 6 * PROCESSORS:
        small = BLOCK_S // 4
        splits = cdiv(slots, small)
        if splits > MOST_OF_A_WARP or groups * splits > 8 * PROCESSORS:
            small = BLOCK_S // 2
        block_s, warps = (BLOCK_S, 4) if group > 1 else (small, 1)
        return {
            "splits": cdiv(slots, block_s), "per_split": block_s, "BLOCK_S": block_s,
            "num_warps": warps, "STAGES": 1,
        }  # fmt: skip
    splits = max(1, min(cdiv(4 * PROCESSORS, groups), 64, cdiv(blocks, 2)))
    per_split = cdiv(blocks, splits)
    return {
        "splits": cdiv(blocks, per_split), "per_split": per_split * BLOCK_S, "BLOCK_S": BLOCK_S,
        "num_warps": 4, "STAGES": 1 if per_split == 1 else 3 if itemsize <= 2 else 2,
    }  # fmt: skip


def attention_candidates(groups: int, slots: int, itemsize: int, group: int = 1) -> list[Config]:
    """`attention_config`, with other warps, and with half to four times as many slots a program, in other blocks."""
    rule = attention_config(groups, slots, itemsize, group)
    others = [{**rule, "num_warps": warps} for warps in (2, 4, 8)]
    per_split = rule["per_split"]
    for share, block_s, warps in (
        (64, 64, 4), (per_split // 2, 64, 4), (2 * per_split, 64, 4), (per_split, 128, 4), (per_split, 32, 2),
        (2 * per_split, 128, 4), (per_split // 2, 32, 4), (4 * per_split, 64, 4), (16, 16, 1),
    ):  # fmt: skip
        share = max(share, block_s)
        others.append(
            {"splits": cdiv(slots, share), "per_split": share, "BLOCK_S": block_s, "num_warps": warps,
             "STAGES": 1 if share == block_s else 3 if itemsize <= 2 else 2}
        )  # fmt: skip
    return candidates(rule, (other for other in others if other["splits"] <= MOST_SPLITS))


def attention_key(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float, score: Tensor | None
) -> str:
    """Of a launch."""
    (batch, heads, _, d), (kv_heads, slots, e) = q.shape, v.shape[1:]
    return key_of(
        "attention", k, batch=batch, heads=heads, kv_heads=kv_heads, slots=slots, d=d, e=e,
        mask="none" if mask is None else str(mask.dtype).removeprefix("torch."), capped=softcap != 0,
        selected=score is not None,
    )  # fmt: skip


def launch_attention(
    kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float,
    score: Tensor | None, arrived: Tensor, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launch `_attention_kernel`, wrapped or not."""
    (batch, heads, _, d), (kv_heads, slots, e) = q.shape, v.shape[1:]
    groups, group = batch * kv_heads, heads // kv_heads
    rule = attention_config(groups, slots, k.element_size(), group)
    config = dict(config or config_for(attention_key(q, k, v, mask, softcap, score), rule))
    splits, per_split = config.pop("splits"), config.pop("per_split")
    check_arrived(arrived, groups)
    part = empty(batch * heads * splits, e, like=q, dtype=torch.float32)
    stats = empty(batch * heads * splits, 2, like=q, dtype=torch.float32)
    out = empty(batch, heads, 1, e, like=q)
    kind, mask_strides, scan = 0, (0, 0, 0), 0
    # Little to read in one block a program: its latency counts, not its bytes.
    gated = per_split > config["BLOCK_S"] or groups * splits > GATED_ABOVE
    if mask is not None:
        mask = mask.expand(batch, heads, 1, slots)
        kind = 1 if mask.dtype is torch.bool else 2
        mask_strides = mask.stride(0), mask.stride(1), mask.stride(3)
        if kind == 1 and gated and mask.stride(1) == 0 and per_split <= MOST_SCANNED:
            scan = power_of_2(per_split)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    score = None if score is None else score.contiguous()
    # One row in one block: to lay keys out for the tensor cores would take longer than the product.
    dot = group > 1 or per_split > config["BLOCK_S"]
    block_e, padded = max(LEAST, power_of_2(e)), power_of_2(splits)
    kernel[(groups, splits)](
        q, k, v, present(mask, k), present(score, k), part, stats, arrived, out,
        scale, softcap, kv_heads, slots, per_split, q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), *mask_strides,
        D=d, E=e, GROUP=group, MASK=kind, CAP=softcap != 0, SELECT=score is not None,
        ROWS=max(LEAST, power_of_2(group)) if dot else 1, SPLITS=padded,
        JOIN=min(power_of_2(group), max(1, MOST_JOINED // (padded * block_e))), SCAN=scan, GATED=gated,
        DOT=dot, EARLY=False, BLOCK_D=max(LEAST, power_of_2(d)), BLOCK_E=block_e, **config,
    )  # fmt: skip
    return out


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless each sequence has keys and values, of as many heads, which divide the queries'."""
    if (
        q.shape[2] != 1 or not q.shape[0] == k.shape[0] == v.shape[0]
        or k.shape[1:3] != v.shape[1:3] or q.shape[1] % k.shape[1]
    ):  # fmt: skip
        raise ValueError(
            f"decode attention takes one query a sequence, keys and values for each, and as many heads and slots of keys as of "
            f"values: found queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
        )


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float,
    score: Tensor | None,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3])


@cpu.cpu_op("dejavu::decode_attention_cpu", _fake_attention)
def decode_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float,
    score: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `attention_reference`; PyTorch's where there is no C++ form."""
    check_attention(q, k, v)
    keep = None if score is None else running(score)
    y = cpu.attended(q, k, v, mask, scale, softcap, keep)
    if y is not None:
        return y
    if softcap:
        return attention_reference(q, k, v, mask, scale, softcap, score)
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return y.clone() if keep is None else y.masked_fill(~keep[:, :, None, None], 0.0)


@triton_op("dejavu::decode_attention", mutates_args=("arrived",))
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float,
    score: Tensor | None, arrived: Tensor,
) -> Tensor:  # fmt: skip
    """See `attention_reference`. `arrived` [b * g] int32 holds zeros before and after, on a GPU."""
    if not q.is_cuda:
        return decode_attention_cpu(q, k, v, mask, scale, softcap, score)
    check_attention(q, k, v)
    kernel = wrap_triton(_attention_kernel)
    return launch_attention(kernel, q, k, v, mask, scale, softcap, score, arrived)
