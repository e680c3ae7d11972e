"""Attention of one query per sequence, of the heads that run, over a cache that is read in place.

    y[b, h] = softmax(scale * q[b, h] @ k[b, g].T + mask) @ v[b, g]  where keep[b, h],    g = h * kv_heads // heads

A head that doesn't run reads nothing and gives zero. Slots that a boolean mask rules out aren't read either:
a static cache costs what it holds, not what it could hold. Keys shared by several heads (GQA, MQA) are read
where they are, never expanded to a copy. (Deja Vu, section 4.2; split along the sequence as in Flash-Decoding)
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import PROCESSORS, cdiv, empty, jit, power_of_2, tl, wrap_triton

NEGATIVE = float("-inf")


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, keep: Tensor | None = None
) -> Tensor:
    """q [b, h, 1, d]; k [b, g, s, d], v [b, g, s, e], where g divides h, last dim contiguous.

    mask broadcasts to [b, h, 1, s]: bool (True: attend) or added to the scores. keep [b, h] bool: which
    heads run, None for all. Returns [b, h, 1, e] of q's dtype, accumulated in fp32; zero where nothing may
    be attended. The query of a head that doesn't run isn't read: it may be anything.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).float() for x in (k, v))
    score = scale * q.float() @ k.mT
    if mask is not None:
        boolean = mask.dtype is torch.bool
        score = score.masked_fill(~mask, NEGATIVE) if boolean else score + mask.float()
    weight = score.softmax(dim=-1).masked_fill((score == NEGATIVE).all(-1, keepdim=True), 0.0)
    y = weight @ v
    if keep is not None:
        y = y.masked_fill(~keep[:, :, None, None], 0.0)
    return y.to(q.dtype)


@jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, keep_ptr, part_ptr, stats_ptr, scale,
    heads, group, slots, per_split,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, mask_b, mask_h, mask_s,
    D: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid (batch * heads, splits). MASK: 0 none, 1 boolean, 2 added. Heads that don't run end at once."""
    at, split = tl.program_id(0), tl.program_id(1)
    b, head = at // heads, at % heads
    runs = True
    if KEEP:
        runs = tl.load(keep_ptr + at) != 0
    if runs:
        # Python floats arrive as fp64 from Inductor
        factor = tl.full([1], scale, tl.float32)
        d = tl.arange(0, BLOCK_D)
        e = tl.arange(0, BLOCK_E)
        q = (
            tl.load(q_ptr + b * q_b + head * q_h + d, mask=d < D, other=0.0).to(tl.float32)
            * factor
        )
        k_ptr += b.to(tl.int64) * k_b + (head // group).to(tl.int64) * k_h
        v_ptr += b.to(tl.int64) * v_b + (head // group).to(tl.int64) * v_h
        mask_ptr += b.to(tl.int64) * mask_b + head * mask_h
        largest = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], dtype=tl.float32)
        y = tl.zeros([BLOCK_E], dtype=tl.float32)
        stop = tl.minimum((split + 1) * per_split, slots)
        for start in range(split * per_split, stop, BLOCK_S):
            slot = start + tl.arange(0, BLOCK_S)
            live = slot < stop
            added = tl.zeros([BLOCK_S], dtype=tl.float32)
            if MASK == 1:
                live = live & (tl.load(mask_ptr + slot * mask_s, mask=live, other=0) != 0)
            if MASK == 2:
                added = tl.load(mask_ptr + slot * mask_s, mask=live, other=0.0).to(tl.float32)
            rows = slot.to(tl.int64)[:, None]
            # [BLOCK_S, BLOCK_D]
            k = tl.load(
                k_ptr + rows * k_s + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0
            ).to(tl.float32)  # fmt: skip
            score = tl.where(live, tl.sum(k * q[None, :], axis=1) + added, float("-inf"))
            higher = tl.maximum(largest, tl.max(score, axis=0))
            # Nothing seen so far that may be attended: -inf minus -inf would be NaN
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp(score - anchor)
            shrunk = tl.exp(largest - anchor)
            v = tl.load(
                v_ptr + rows * v_s + e[None, :], mask=live[:, None] & (e[None, :] < E), other=0.0
            ).to(tl.float32)  # fmt: skip
            y = y * shrunk + tl.sum(weight[:, None] * v, axis=0)
            total = total * shrunk + tl.sum(weight, axis=0)
            largest = higher
        place = at * tl.num_programs(1) + split
        tl.store(part_ptr + place.to(tl.int64) * E + e, y, mask=e < E)
        one = tl.arange(0, 1)
        tl.store(stats_ptr + 2 * place + one, largest)
        tl.store(stats_ptr + 2 * place + 1 + one, total)


@jit
def _combine_kernel(
    part_ptr, stats_ptr, keep_ptr, out_ptr, splits,
    E: tl.constexpr, KEEP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid (batch * heads,). Join the splits of one head; zero for one that doesn't run."""
    at = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    runs = True
    if KEEP:
        runs = tl.load(keep_ptr + at) != 0
    y = tl.zeros([BLOCK_E], dtype=tl.float32)
    if runs:
        s = tl.arange(0, SPLITS)
        place = at * splits + s
        largest = tl.load(stats_ptr + 2 * place, mask=s < splits, other=float("-inf"))
        total = tl.load(stats_ptr + 2 * place + 1, mask=s < splits, other=0.0)
        highest = tl.max(largest, axis=0)
        anchor = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp(largest - anchor)
        # [SPLITS, BLOCK_E]
        part = tl.load(
            part_ptr + place.to(tl.int64)[:, None] * E + e[None, :],
            mask=(s < splits)[:, None] & (e < E)[None, :], other=0.0,
        )  # fmt: skip
        whole = tl.sum(weight * total, axis=0)
        y = tl.sum(weight[:, None] * part, axis=0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out_ptr + at * E + e, y.to(out_ptr.dtype.element_ty), mask=e < E)


BLOCK_S = 64


def attention_splits(batch_heads: int, slots: int) -> int:
    """Enough programs to fill the chip, none shorter than a few blocks."""
    return max(1, min(cdiv(4 * PROCESSORS, batch_heads), cdiv(slots, 2 * BLOCK_S), 64))


def launch_attention(
    kernels, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float,
    keep: Tensor | None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """`kernels`: (`_attention_kernel`, `_combine_kernel`), wrapped or not."""
    (batch, heads, _, d), (kv_heads, slots, e) = q.shape, v.shape[1:]
    splits = splits or attention_splits(batch * heads, slots)
    per_split = cdiv(cdiv(slots, splits), BLOCK_S) * BLOCK_S
    part = empty(batch * heads * splits, e, like=q, dtype=torch.float32)
    stats = empty(batch * heads * splits, 2, like=q, dtype=torch.float32)
    out = empty(batch, heads, 1, e, like=q)
    kind, mask_strides = 0, (0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, heads, 1, slots)
        kind = 1 if mask.dtype is torch.bool else 2
        mask_strides = mask.stride(0), mask.stride(1), mask.stride(3)
    keep = None if keep is None else keep.contiguous()
    kernels[0][(batch * heads, splits)](
        q, k, v, q if mask is None else mask, q if keep is None else keep, part, stats, scale,
        heads, heads // kv_heads, slots, per_split, q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), *mask_strides,
        D=d, E=e, MASK=kind, KEEP=keep is not None,
        BLOCK_S=BLOCK_S, BLOCK_D=power_of_2(d), BLOCK_E=power_of_2(e), num_warps=4,
    )  # fmt: skip
    kernels[1][(batch * heads,)](
        part, stats, q if keep is None else keep, out, splits,
        E=e, KEEP=keep is not None, SPLITS=power_of_2(splits), BLOCK_E=power_of_2(e), num_warps=4,
    )  # fmt: skip
    return out


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless keys and values have as many heads, which divide the queries'."""
    if q.shape[2] != 1 or k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"decode attention takes one query a sequence, and as many heads of keys as of values: found "
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
        )


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, keep: Tensor | None
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@cpu.cpu_op("dejavu::decode_attention_cpu", _fake_attention)
def decode_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, keep: Tensor | None
) -> Tensor:
    """See `attention_reference`; PyTorch's where there is no C++ form."""
    check_attention(q, k, v)
    y = cpu.attended(q, k, v, mask, scale, keep)
    if y is not None:
        return y
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return y.clone() if keep is None else y.masked_fill(~keep[:, :, None, None], 0.0)


@triton_op("dejavu::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, keep: Tensor | None
) -> Tensor:
    """See `attention_reference`."""
    if not q.is_cuda:
        return decode_attention_cpu(q, k, v, mask, scale, keep)
    check_attention(q, k, v)
    kernels = (wrap_triton(_attention_kernel), wrap_triton(_combine_kernel))
    return launch_attention(kernels, q, k, v, mask, scale, keep)
