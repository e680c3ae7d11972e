"""Dense projections of a few tokens, one or several of the same input in one launch.

    y[t] = act([W0 @ x[t] + b0, W1 @ x[t] + b1, ...])

A launch that reads 34 MB loses a quarter of the bandwidth to filling and draining the chip, so Q, K and
V go together, and so does the predictor of a later layer's heads, which reads the same input. Rows of W0 may
be owned by heads: they are skipped where no token runs their head (scores: see heads.py). What belongs to a
head that doesn't run is left as it is, and nothing may read it. (Deja Vu, section 4.2)

`gemv_into` writes keys and values to their caches instead, at the slot that a counter on the device says: no launch of theirs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import (
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
from .rows import check_rows, dots, first_columns, other_row_blocks, row_blocks
from .tuning import Config, candidates, config_for, key_of

MOST = 4  # projections in one launch


def running(score: Tensor) -> Tensor:
    """Which heads run, bool: a score that isn't at most zero. A NaN runs, and stays visible."""
    return ~(score <= 0)


def running_rows(weight: Tensor, owner: Tensor, score: Tensor) -> Tensor:
    """Which rows of a weight run for any token, [n] bool."""
    runs = torch.cat([running(score).any(dim=0), score.new_ones(1, dtype=torch.bool)])
    return runs[owner.long()].repeat_interleave(weight.shape[0] // owner.numel())


def gemv_reference(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str,
    owner: Tensor | None = None, score: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [m, d]; each weight [n_i, d] of its dtype, rows contiguous, any row stride; a bias [n_i] or None for each.

    owner [n_0 / block] int32: the head that alone reads this block of rows of the first weight, or -1: always
    computed; score [m, heads], both or none. Returns [m, sum of n_i] of x's dtype, here with zeros where no
    token's head runs; accumulated in fp32.
    """
    parts = [
        F.linear(x.float(), w.float(), None if b is None else b.float())
        for w, b in zip(weights, biases, strict=True)
    ]
    if owner is not None:
        parts[0] = parts[0].masked_fill(~running_rows(weights[0], owner, score), 0.0)
    return REFERENCE[activation](torch.cat(parts, dim=1)).to(x.dtype)


@jit
def _gemv_block(
    block, x_ptr, weight0, weight1, weight2, weight3, bias0, bias1, bias2, bias3, owner_ptr, score_ptr, out_ptr,
    keys_ptr, values_ptr, n0, n1, n2, n3, stride0, stride1, stride2, stride3, heads, owned_rows,
    position, slots, cache_b, cache_g, cache_s, head_dim,
    D: tl.constexpr, TOKENS: tl.constexpr, WEIGHTS: tl.constexpr, BIAS: tl.constexpr, OWNED: tl.constexpr,
    ACTIVATION: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_J rows of one of the weights. BIAS has a bit for each weight that has one. Where KEY isn't -1, the results of that
    weight and of VALUE go to caches, where a token is a sequence.

    All but a weight's first columns waits for the kernel before.
    """
    total = n0 + n1 + n2 + n3
    weight_ptr, bias_ptr, n, stride, first = weight0, bias0, n0, stride0, 0
    with_bias = BIAS
    which = 0
    runs = block >= 0
    if OWNED:
        # A branch, not a masked load: other weights' blocks don't wait for a score.
        if block * BLOCK_J < n0:
            owner = tl.load(owner_ptr + block * BLOCK_J // owned_rows)
            if owner >= 0:
                wait_for_previous(EARLY)
                runs = block < 0
                for token in tl.static_range(TOKENS):
                    score = tl.load(score_ptr + token * heads + owner).to(tl.float32)
                    runs = runs | (score > 0) | (score != score)
    if WEIGHTS > 1:
        blocks0 = tl.cdiv(n0, BLOCK_J)
        blocks1 = blocks0 + tl.cdiv(n1, BLOCK_J)
        blocks2 = blocks1 + tl.cdiv(n2, BLOCK_J)
        # Selects rather than branches: the compiler keeps what it knows of the pointers' alignment.
        is0, is1, is2 = block < blocks0, block < blocks1, block < blocks2
        weight_ptr = tl.where(
            is0, weight0, tl.where(is1, weight1, tl.where(is2, weight2, weight3))
        )
        bias_ptr = tl.where(is0, bias0, tl.where(is1, bias1, tl.where(is2, bias2, bias3)))
        n = tl.where(is0, n0, tl.where(is1, n1, tl.where(is2, n2, n3)))
        stride = tl.where(is0, stride0, tl.where(is1, stride1, tl.where(is2, stride2, stride3)))
        first = tl.where(is0, 0, tl.where(is1, n0, tl.where(is2, n0 + n1, n0 + n1 + n2)))
        with_bias = tl.where(
            is0, BIAS & 1, tl.where(is1, BIAS & 2, tl.where(is2, BIAS & 4, BIAS & 8))
        )
        which = tl.where(is0, 0, tl.where(is1, 1, tl.where(is2, 2, 3)))
        block -= tl.where(is0, 0, tl.where(is1, blocks0, tl.where(is2, blocks1, blocks2)))
    if runs:
        unit = block * BLOCK_J + tl.arange(0, BLOCK_J)
        live = unit < n
        row = weight_ptr + unit[:, None].to(tl.int64) * stride
        begun = first_columns(row, live, D, BLOCK_D)
        bias = tl.zeros([BLOCK_J], dtype=tl.float32)
        if BIAS and BLOCK_J == 1:
            # Behind the sum it would be another way to memory. Several go through shared memory, which takes as long.
            bias = tl.load(bias_ptr + unit, mask=live & (with_bias != 0), other=0.0).to(tl.float32)
        wait_for_previous(EARLY)
        if OWNED:
            start_next(EARLY)
        for start in tl.static_range(0, TOKENS, 4):
            ys = dots(x_ptr + start * D, row, begun, live, D, TOKENS - start, BLOCK_D)
            for token in tl.static_range(TOKENS - start if TOKENS - start < 4 else 4):
                y = ys[token]
                if BIAS and BLOCK_J > 1:
                    bias = tl.load(bias_ptr + unit, mask=live & (with_bias != 0), other=0.0)
                y += bias.to(tl.float32)
                y = activate(y, ACTIVATION)
                out = out_ptr + (start + token) * total + first + unit
                if KEY >= 0:
                    slot = (
                        (start + token) * cache_b + unit // head_dim * cache_g + position * cache_s
                    )
                    cache = tl.where(which == KEY, keys_ptr, values_ptr) + slot + unit % head_dim
                    cached = (which == KEY) | (which == VALUE)
                    out = tl.where(cached, cache, out)
                    # Past the end of a cache is somebody else's memory, also where no assertion is compiled in.
                    live = live & ((position < slots) | (not cached))
                tl.store(out, y.to(out_ptr.dtype.element_ty), mask=live)


@jit
def _gemv_kernel(
    x_ptr, weight0, weight1, weight2, weight3, bias0, bias1, bias2, bias3, owner_ptr, score_ptr, out_ptr,
    keys_ptr, values_ptr, position_ptr, n0, n1, n2, n3, stride0, stride1, stride2, stride3, heads, owned_rows,
    slots, cache_b, cache_g, cache_s, head_dim,
    D: tl.constexpr, TOKENS: tl.constexpr, WEIGHTS: tl.constexpr, BIAS: tl.constexpr, OWNED: tl.constexpr,
    ACTIVATION: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr, LOOP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: the row blocks of each weight, one weight after the other, one program each.

    LOOP says so in a loop that turns once: the same work, scheduled otherwise by the compiler.
    """
    start_next(EARLY, 2 if OWNED else 0)  # HEADS_START, which a kernel can't name
    first = tl.program_id(0)
    if OWNED:
        # Rows that wait for a score come last.
        first = tl.num_programs(0) - 1 - first
    position = 0
    if KEY >= 0:
        # Nothing in the graph has written it yet, so it is read before the wait. Here, where torch sees that it is only read.
        position = tl.load(position_ptr, cache_modifier=".cg").to(tl.int64)
        tl.device_assert((position >= 0) & (position < slots), "the cache has no such slot")
    if LOOP:
        blocks = (
            tl.cdiv(n0, BLOCK_J)
            + tl.cdiv(n1, BLOCK_J)
            + tl.cdiv(n2, BLOCK_J)
            + tl.cdiv(n3, BLOCK_J)
        )
        for block in range(first, blocks, tl.num_programs(0)):
            _gemv_block(
                block, x_ptr, weight0, weight1, weight2, weight3, bias0, bias1, bias2, bias3,
                owner_ptr, score_ptr, out_ptr, keys_ptr, values_ptr,
                n0, n1, n2, n3, stride0, stride1, stride2, stride3, heads, owned_rows,
                position, slots, cache_b, cache_g, cache_s, head_dim,
                D, TOKENS, WEIGHTS, BIAS, OWNED, ACTIVATION, KEY, VALUE, BLOCK_J, BLOCK_D, EARLY,
            )  # fmt: skip
    else:
        _gemv_block(
            first, x_ptr, weight0, weight1, weight2, weight3, bias0, bias1, bias2, bias3,
            owner_ptr, score_ptr, out_ptr, keys_ptr, values_ptr,
            n0, n1, n2, n3, stride0, stride1, stride2, stride3, heads, owned_rows,
            position, slots, cache_b, cache_g, cache_s, head_dim,
            D, TOKENS, WEIGHTS, BIAS, OWNED, ACTIVATION, KEY, VALUE, BLOCK_J, BLOCK_D, EARLY,
        )  # fmt: skip


def gemv_config(d: int, owned: bool = False, tokens: int = 1, weights: int = 1) -> Config:
    """One short step a thread where rows are short; whole rows, which are asked for ahead, where heads own some. (H200, d 4096)

    The loop is 8 % faster for rows in short steps (d 9216 on an H200), but 15 % slower for several weights, and where heads
    own rows 20 %, for reasons of the compiler's that we don't know.
    """
    if tokens > 1:
        return {**row_blocks(d, tokens), "LOOP": False}
    if d <= 4096:
        block_d = 4096 if owned else 1024
        return {
            "BLOCK_J": 1,
            "BLOCK_D": min(block_d, power_of_2(d)),
            "num_warps": 4,
            "LOOP": False,
        }
    if owned:
        return {"BLOCK_J": 4, "BLOCK_D": 2048, "num_warps": 4, "LOOP": False}
    blocks = row_blocks(d)
    loops = weights == 1 and d % blocks["BLOCK_D"] == 0 and blocks["BLOCK_D"] < 2048
    return {**blocks, "LOOP": loops}


def gemv_candidates(
    d: int, owned_rows: int = 0, tokens: int = 1, weights: int = 1
) -> list[Config]:
    """`gemv_config`, its other form, and other tiles in both; `owned_rows` of a head, 0 for none, are never split."""
    rule = gemv_config(d, owned_rows > 0, tokens, weights)
    tiles = [row_blocks(d, tokens), *other_row_blocks(d, tokens)]
    tiles = [blocks for blocks in tiles if owned_rows % blocks["BLOCK_J"] == 0]
    others = [{**rule, "LOOP": not rule["LOOP"]}]
    others += [{**blocks, "LOOP": False} for blocks in tiles]
    others += [{**blocks, "LOOP": True} for blocks in tiles]
    return candidates(rule, others)


def gemv_key(x: Tensor, weights: list[Tensor], owner: Tensor | None, score: Tensor | None) -> str:
    """Of a launch."""
    rows, heads = "+".join(str(weight.shape[0]) for weight in weights), 0
    if owner is not None:
        heads, rows = score.shape[1], f"{owner.shape[0]}x{rows}"
    return key_of("gemv", x, tokens=x.shape[0], n=rows, d=x.shape[1], heads=heads)


@dataclass(frozen=True, slots=True, eq=False)
class Caches:
    """Where the results of two weights go: keys and values [m, groups, slots, head_dim] of one layout, rows contiguous, at slot `position`,
    one integer; `key` and `value`: which weights these are."""

    keys: Tensor
    values: Tensor
    position: Tensor
    key: int
    value: int

    def check(self, x: Tensor, sizes: list[int]) -> None:
        """Raise ValueError unless they can hold these results."""
        (tokens, groups, _, width), strides = self.keys.shape, self.keys.stride()
        found = [(t.shape, t.stride(), t.dtype) for t in (self.keys, self.values)]
        elements = {sizes[self.key], sizes[self.value], groups * width}
        if (
            found[0] != found[1] or (tokens, self.keys.dtype) != (x.shape[0], x.dtype)
            or len(elements) > 1 or strides[3] != 1
        ):  # fmt: skip
            raise ValueError(
                f"keys and values of {sizes[self.key]} and {sizes[self.value]} elements for each of {x.shape[0]} tokens, "
                f"{x.dtype}, need caches of one layout: found {tuple(self.keys.shape)} {self.keys.dtype} and "
                f"{tuple(self.values.shape)} {self.values.dtype}, strides {strides} and {self.values.stride()}"
            )


def launch_gemv(
    kernel, x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str,
    owner: Tensor | None = None, score: Tensor | None = None, config: Config | None = None,
    caches: Caches | None = None,
) -> Tensor:  # fmt: skip
    """Launch `_gemv_kernel`, wrapped or not, for at most `MOST` weights."""
    x = x.contiguous()
    for weight in weights:
        check_rows(weight)
    tokens, d = x.shape
    sizes = [weight.shape[0] for weight in weights]
    rule = gemv_config(d, owner is not None, tokens, len(weights))
    config = dict(config or config_for(gemv_key(x, weights, owner, score), rule))
    owned_rows = heads = 1
    if owner is not None:
        owned_rows, heads = sizes[0] // owner.numel(), score.shape[1]
        score = score.contiguous()
        if owned_rows % config["BLOCK_J"]:
            config["BLOCK_J"] = 1
    out = empty(tokens, sum(sizes), like=x)
    absent = MOST - len(weights)
    bias = [present(None if b is None else b.contiguous(), weights[0]) for b in biases]
    nothing = [weights[0]] * absent
    cached, layout = (weights[0],) * 3, (0, 0, 0, 0, 1)
    if caches is not None:
        caches.check(x, sizes)
        cached, keys = (caches.keys, caches.values, caches.position), caches.keys
        layout = (keys.shape[2], keys.stride(0), keys.stride(1), keys.stride(2), keys.shape[3])
    kernel[(sum(cdiv(n, config["BLOCK_J"]) for n in sizes),)](
        x, *weights, *nothing, *bias, *nothing, present(owner, weights[0]), present(score, weights[0]), out,
        *cached, *sizes, *([0] * absent), *(weight.stride(0) for weight in weights), *([0] * absent), heads, owned_rows,
        *layout,
        D=d, TOKENS=tokens, WEIGHTS=len(weights), BIAS=sum(1 << i for i, b in enumerate(biases) if b is not None),
        OWNED=owner is not None, ACTIVATION=activation, KEY=-1 if caches is None else caches.key,
        VALUE=-1 if caches is None else caches.value, EARLY=False, **config,
    )  # fmt: skip
    return out


def _fake_gemv(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str,
    owner: Tensor | None = None, score: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


@cpu.cpu_op("dejavu::gemv_cpu", _fake_gemv)
def gemv_cpu(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str,
    owner: Tensor | None = None, score: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Opaque to tracing: a call into C++, or PyTorch's own projections where there is no C++ form."""
    sizes = [weight.shape[0] for weight in weights]
    out = x.new_empty(x.shape[0], sum(sizes))
    index = None
    if owner is not None:
        index = running_rows(weights[0], owner, score).nonzero().flatten().int()
    for part, weight, bias in zip(out.split(sizes, dim=1), weights, biases, strict=True):
        slots = weight.shape[0] if index is None else index.numel()
        if not cpu.rows(
            part, x, weight, bias, index, slots, activation, in_place=index is not None
        ):
            if index is None:
                part.copy_(REFERENCE[activation](F.linear(x, weight, bias)))
            else:
                rows = F.linear(x, weight[index], None if bias is None else bias[index])
                part[:, index] = REFERENCE[activation](rows)
        index = None
    return out


@triton_op("dejavu::gemv", mutates_args=())
def gemv(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str,
    owner: Tensor | None = None, score: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `gemv_reference`."""
    if not x.is_cuda:
        return gemv_cpu(x, weights, biases, activation, owner, score)
    return launch_gemv(wrap_triton(_gemv_kernel), x, weights, biases, activation, owner, score)


@triton_op("dejavu::gemv_into", mutates_args=("keys", "values"))
def gemv_into(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str, owner: Tensor | None,
    score: Tensor | None, keys: Tensor, values: Tensor, position: Tensor, key: int, value: int,
) -> Tensor:  # fmt: skip
    """`gemv`, whose results of weights `key` and `value` go to caches (see `Caches`). Nothing may read them in what it returns.

    On a GPU `position` is read at once, so no kernel of the same graph may have written it just before.
    """
    caches = Caches(keys, values, position, key, value)
    if x.is_cuda:
        kernel = wrap_triton(_gemv_kernel)
        return launch_gemv(kernel, x, weights, biases, activation, owner, score, caches=caches)
    sizes = [weight.shape[0] for weight in weights]
    caches.check(x, sizes)
    y = gemv_cpu(x, weights, biases, activation, owner, score)
    for cache, at in ((keys, key), (values, value)):
        part = y.split(sizes, dim=1)[at].unflatten(1, (cache.shape[1], 1, cache.shape[3]))
        cache.index_copy_(2, position.reshape(1), part)
    return y
