"""Predictor matrices in int8 or in nibbles, multiplied four weights an instruction.

A byte costs one instruction to widen, one to multiply and one to add; a chip that reads 4 TB/s has no
room for three per byte. `dp4a` multiplies four pairs of bytes and adds them up. So each block of the
vector is written in balanced base 256, as two or three int8 digits:

    x = step * (d0 + 256 d1 + 65536 d2);  W @ x = step * (W @ d0 + 256 W @ d1 + 65536 W @ d2)

The integer products are exact; the vector keeps 13 bits below its largest element with two digits,
20 with three. A NaN or infinity anywhere makes every product NaN.

Nibbles (see `nibbles`) become bytes in two or three instructions for eight: moved to the upper half of each byte they
are 16 times what they say, in the range of int8, and with their sign.
"""

import os

import torch
from torch import Tensor

from ._triton import jit, start_next, tl, wait_for_previous
from .nibbles import is_packed
from .selection import list_segment

# The interpreter and AMD's compiler have no such assembly.
EMULATE = tl.constexpr(
    os.environ.get("TRITON_INTERPRET") == "1" or torch.version.hip is not None
) if tl.constexpr is not None else True  # fmt: skip


@jit
def _dp4a(a, b, total):
    """total + the dot product of four bytes of `a` with four bytes of `b`."""
    if EMULATE:
        for shift in tl.static_range(0, 32, 8):
            total += ((a << (24 - shift)) >> 24) * ((b << (24 - shift)) >> 24)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@jit
def _step(largest, DIGITS: tl.constexpr):
    """The scale, a power of two: it divides exactly, and small integers stay what they are."""
    below: tl.constexpr = 2.0**-13 if DIGITS == 2 else 2.0**-20
    power = tl.maximum(largest, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    return power.to(tl.float32, bitcast=True) * below


@jit
def _whole(x, per_step):
    """x in steps, to the nearest integer of at most 22 bits: adding 1.5 * 2^23 leaves no fraction."""
    return (x * per_step + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@jit
def _packed(q0, q1, q2, q3):
    """The lowest byte of each, in one word; and what remains of each, a digit further."""
    word = (q0 & 255) | ((q1 & 255) << 8) | ((q2 & 255) << 16) | (q3 << 24)
    return word, (q0 + 128) >> 8, (q1 + 128) >> 8, (q2 + 128) >> 8, (q3 + 128) >> 8


@jit
def _largest(x0, x1, x2, x3):
    """The largest magnitude of four vectors, element by element."""
    return tl.maximum(
        tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3))
    )  # fmt: skip


@jit
def _whole_words(x0, x1, x2, x3, per_step):
    return _whole(x0, per_step), _whole(x1, per_step), _whole(x2, per_step), _whole(x3, per_step)


@jit
def _product(words, x0, x1, x2, x3, DIGITS: tl.constexpr):
    """The matrix tile `words` [rows, columns / 4] times x: [rows] fp32.

    x0..x3 [columns / 4] are every fourth element of x.
    """
    step = _step(tl.max(_largest(x0, x1, x2, x3), axis=0), DIGITS)
    q0, q1, q2, q3 = _whole_words(x0, x1, x2, x3, 1.0 / step)
    zero = tl.zeros_like(words)
    word, q0, q1, q2, q3 = _packed(q0, q1, q2, q3)
    total = tl.sum(_dp4a(words, word[None, :], zero), axis=1).to(tl.float32)
    word, q0, q1, q2, q3 = _packed(q0, q1, q2, q3)
    total += 256.0 * tl.sum(_dp4a(words, word[None, :], zero), axis=1).to(tl.float32)
    if DIGITS == 3:
        word, q0, q1, q2, q3 = _packed(q0, q1, q2, q3)
        total += 65536.0 * tl.sum(_dp4a(words, word[None, :], zero), axis=1).to(tl.float32)
    # `max` passes NaN over, and no integer is one: 0, or NaN where any element isn't finite
    return total * (step + tl.sum((x0 + x1 + x2 + x3) * 0.0, axis=0))


@jit
def _product_of_nibbles(words, x0, x1, x2, x3, y0, y1, y2, y3, DIGITS: tl.constexpr):
    """The same of a tile [rows, columns / 8]: its low nibbles times x and its high ones times y."""
    low, high = (words << 4) & -0x0F0F0F10, words & -0x0F0F0F10
    largest = tl.maximum(_largest(x0, x1, x2, x3), _largest(y0, y1, y2, y3))
    step = _step(tl.max(largest, axis=0), DIGITS)
    q0, q1, q2, q3 = _whole_words(x0, x1, x2, x3, 1.0 / step)
    r0, r1, r2, r3 = _whole_words(y0, y1, y2, y3, 1.0 / step)
    zero = tl.zeros_like(words)
    word, q0, q1, q2, q3 = _packed(q0, q1, q2, q3)
    other, r0, r1, r2, r3 = _packed(r0, r1, r2, r3)
    part = _dp4a(high, other[None, :], _dp4a(low, word[None, :], zero))
    total = tl.sum(part, axis=1).to(tl.float32)
    word, q0, q1, q2, q3 = _packed(q0, q1, q2, q3)
    other, r0, r1, r2, r3 = _packed(r0, r1, r2, r3)
    part = _dp4a(high, other[None, :], _dp4a(low, word[None, :], zero))
    total += 256.0 * tl.sum(part, axis=1).to(tl.float32)
    if DIGITS == 3:
        word, q0, q1, q2, q3 = _packed(q0, q1, q2, q3)
        other, r0, r1, r2, r3 = _packed(r0, r1, r2, r3)
        part = _dp4a(high, other[None, :], _dp4a(low, word[None, :], zero))
        total += 65536.0 * tl.sum(part, axis=1).to(tl.float32)
    total *= 0.0625  # nibbles in the upper halves of bytes
    return total * (step + tl.sum((x0 + x1 + x2 + x3 + y0 + y1 + y2 + y3) * 0.0, axis=0))


@jit
def _every_fourth(x_ptr, at, inside):
    """Elements 4 at .. 4 at + 3 as four fp32 vectors."""
    x0 = tl.load(x_ptr + 4 * at, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(x_ptr + 4 * at + 1, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + 4 * at + 2, mask=inside, other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr + 4 * at + 3, mask=inside, other=0.0).to(tl.float32)
    return x0, x1, x2, x3


@jit
def inner_int8_kernel(
    source_ptr, down_ptr, inner_ptr, rank, width,
    TOKENS: tl.constexpr, DIGITS: tl.constexpr, NIBBLES: tl.constexpr,
    WORDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (rank blocks, splits): one part of `down @ source`, over BLOCKS blocks of BLOCK_S words, of which the first is asked
    for before it waits for the kernel before.

    WORDS, of a row, is known to the compiler: a width is to it a multiple of 16 at best, which leaves rows of
    nibbles on any 8 bytes, too little for whole vectors. Every fourth element is stored beside each other, as they are read.
    """
    start_next(EARLY)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    base = down_ptr.to(tl.pointer_type(tl.int32)) + row[:, None].to(tl.int64) * WORDS
    first = split * BLOCKS * BLOCK_S + tl.arange(0, BLOCK_S)
    live = row[:, None] < rank
    begun = tl.load(base + first[None, :], mask=live & (first < WORDS)[None, :], other=0)
    wait_for_previous(EARLY)
    for token in tl.static_range(TOKENS):
        total = tl.zeros([BLOCK_R], dtype=tl.float32)
        for block in tl.static_range(BLOCKS):
            at = first + block * BLOCK_S
            inside = at < WORDS
            w = begun
            if block > 0:
                w = tl.load(base + at[None, :], mask=live & inside[None, :], other=0)
            x_ptr = source_ptr + token * width
            x0, x1, x2, x3 = _every_fourth(x_ptr, at, inside)
            if NIBBLES:
                y0, y1, y2, y3 = _every_fourth(x_ptr + 4 * WORDS, at, inside)
                total += _product_of_nibbles(w, x0, x1, x2, x3, y0, y1, y2, y3, DIGITS)
            else:
                total += _product(w, x0, x1, x2, x3, DIGITS)
        place = row % 4 * (rank // 4) + row // 4
        tl.store(inner_ptr + (split * TOKENS + token) * rank + place, total, mask=row < rank)


@jit
def _from_each(first, inside, QUARTER: tl.constexpr):
    """The elements at `first` and those that lie one, two and three QUARTERs further."""
    z0 = tl.load(first, mask=inside, other=0.0)
    z1 = tl.load(first + QUARTER, mask=inside, other=0.0)
    z2 = tl.load(first + 2 * QUARTER, mask=inside, other=0.0)
    z3 = tl.load(first + 3 * QUARTER, mask=inside, other=0.0)
    return z0, z1, z2, z3


@jit
def _inner(
    inner_ptr, token, at, inside, TOKENS: tl.constexpr, SPLITS: tl.constexpr, QUARTER: tl.constexpr
):
    """Elements 4 at .. 4 at + 3 of `down @ source`, from its parts; QUARTER of them lie beside each other."""
    first = inner_ptr + token * 4 * QUARTER + at
    z0, z1, z2, z3 = _from_each(first, inside, QUARTER)
    for split in tl.static_range(1, SPLITS):
        p0, p1, p2, p3 = _from_each(first + split * TOKENS * 4 * QUARTER, inside, QUARTER)
        z0, z1, z2, z3 = z0 + p0, z1 + p1, z2 + p2, z3 + p3
    return z0, z1, z2, z3


@jit
def score_int8_kernel(
    inner_ptr, up_ptr, bias_ptr, local_ptr, counts_ptr, n, rank,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr, DIGITS: tl.constexpr, NIBBLES: tl.constexpr,
    SEGMENT: tl.constexpr, WORDS: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: one program a segment of units: their scores, and the list of those above zero.

    The weights of the first BLOCK_R words are asked for before it waits for the kernel before.
    """
    start_next(EARLY)
    QUARTER: tl.constexpr = 2 * WORDS if NIBBLES else WORDS
    segment = tl.program_id(0)
    unit = segment * SEGMENT + tl.arange(0, SEGMENT)
    base = up_ptr.to(tl.pointer_type(tl.int32)) + unit[:, None].to(tl.int64) * WORDS
    bias = tl.load(bias_ptr + unit, mask=unit < n, other=0.0)
    # Loads are here, in no function: the list's places depend on them, see `_compact_kernel`.
    first, live = tl.arange(0, BLOCK_R), unit[:, None] < n
    begun = tl.load(base + first[None, :], mask=live & (first < WORDS)[None, :], other=0)
    wait_for_previous(EARLY)
    keep = tl.zeros([SEGMENT], dtype=tl.int32)
    for token in tl.static_range(TOKENS):
        score = bias
        # Each block of the rank has its own scale.
        for start in tl.static_range(0, WORDS, BLOCK_R):
            at = start + tl.arange(0, BLOCK_R)
            inside = at < WORDS
            w = begun
            if start > 0:
                w = tl.load(base + at[None, :], mask=live & inside[None, :], other=0)
            z0, z1, z2, z3 = _inner(inner_ptr, token, at, inside, TOKENS, SPLITS, QUARTER)
            if NIBBLES:
                y0, y1, y2, y3 = _inner(
                    inner_ptr, token, WORDS + at, inside, TOKENS, SPLITS, QUARTER
                )
                score += _product_of_nibbles(w, z0, z1, z2, z3, y0, y1, y2, y3, DIGITS)
            else:
                score += _product(w, z0, z1, z2, z3, DIGITS)
        # "not below", so that NaN is kept
        keep = keep | tl.where(score <= 0.0, 0, 1)
    keep = tl.where(unit < n, keep, 0)
    list_segment(keep, unit, local_ptr, counts_ptr, segment, n, SEGMENT)


def fits(source: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether rows are whole words: nibbles always are, int8 of lengths that four divides."""
    both = down.dtype is up.dtype is torch.int8
    return is_packed(down) or (both and source.shape[1] % 4 == up.shape[1] % 4 == 0)
