"""What each unit of a gated MLP probably adds to a token, from a sketch of the two projections into it.

    score[t, u] = |act(a G[u] @ x[t] + b)| * sqrt((c U[u] @ x[t] + d)^2 + f)

G is the gate's projection in four bits a weight (`nibbles`), U the other in two (`pairs`), both in steps; a, b, c, d and
f are one number a unit each. f is the mean square of what U misses: a unit of which nothing but its gate is known counts
by that. One launch, which reads the same digits of x for both; `compact` lists what is above a threshold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import cdiv, empty, jit, power_of_2, tl, wait_for_previous, wrap_triton
from .activations import REFERENCE, activate
from .nibbles import unpack
from .pairs import MULTIPLE, unpack_pairs
from .select_int8 import _dp4a, _every_fourth, _largest, _packed, _step, _whole_words

NUMBERS = 5  # a unit


def sketch_score_reference(
    x: Tensor, gate: Tensor, up: Tensor, numbers: Tensor, activation: str
) -> Tensor:
    """x [m, d], any float dtype; gate [n, d / 2] and up [n, d / 4] uint8; numbers [5, n] fp32: a, b, c, d, f.

    Returns [m, n] fp32, computed in fp32; NaN where any of x is NaN.
    """
    x, (a, b, c, d, f) = x.float(), numbers
    gated = REFERENCE[activation](F.linear(x, unpack(gate).float()) * a + b)
    other = F.linear(x, unpack_pairs(up)) * c + d
    return gated.abs() * (other.square() + f).sqrt()


@jit
def _largest_of(x_ptr, at, inside):
    """The largest magnitude of elements 4 at .. 4 at + 3, and NaN or 0."""
    x0, x1, x2, x3 = _every_fourth(x_ptr, at, inside)
    return _largest(x0, x1, x2, x3), (x0 + x1 + x2 + x3) * 0.0


@jit
def _products(low, high, pairs, x_ptr, at, inside, DIGITS: tl.constexpr, WORDS: tl.constexpr):
    """G and U times the elements of x that belong to a block of words: two of [rows] fp32.

    A word of U holds four columns of each quarter of a row; of G, word `at` holds those of the first and the third
    quarter (`low`), word WORDS + at those of the other two (`high`).
    """
    quarter: tl.constexpr = 4 * WORDS
    l0, f0 = _largest_of(x_ptr, at, inside)
    l1, f1 = _largest_of(x_ptr + quarter, at, inside)
    l2, f2 = _largest_of(x_ptr + 2 * quarter, at, inside)
    l3, f3 = _largest_of(x_ptr + 3 * quarter, at, inside)
    step = _step(tl.max(tl.maximum(tl.maximum(l0, l1), tl.maximum(l2, l3)), axis=0), DIGITS)
    gate = tl.zeros([pairs.shape[0]], dtype=tl.float32)
    up = tl.zeros([pairs.shape[0]], dtype=tl.float32)
    sums = tl.zeros([pairs.shape[1]], dtype=tl.float32)
    for part in tl.static_range(4):
        codes = (pairs >> (2 * part)) & 0x03030303
        # Moved to the upper half of each byte, nibbles are 16 times what they say, with their sign.
        nibbles = low if part % 2 == 0 else high
        nibbles = ((nibbles << 4) if part < 2 else nibbles) & -0x0F0F0F10
        x0, x1, x2, x3 = _every_fourth(x_ptr + part * quarter, at, inside)
        q0, q1, q2, q3 = _whole_words(x0, x1, x2, x3, 1.0 / step)
        sums += (q0 + q1 + q2 + q3).to(tl.float32)
        zero = tl.zeros_like(pairs)
        weight = 1.0
        for _ in tl.static_range(DIGITS):
            word, q0, q1, q2, q3 = _packed(q0, q1, q2, q3)
            gate += weight * tl.sum(_dp4a(nibbles, word[None, :], zero), axis=1).to(tl.float32)
            up += weight * tl.sum(_dp4a(codes, word[None, :], zero), axis=1).to(tl.float32)
            weight = weight * 256.0
    # Two bits are 0 to 3, for -1.5 to 1.5. `max` passes NaN over, and no integer is one: 0, or NaN where any
    # element isn't finite.
    step += tl.sum(f0 + f1 + f2 + f3, axis=0)
    return gate * (0.0625 * step), (up - 1.5 * tl.sum(sums, axis=0)) * step


@jit
def _sketch_kernel(
    x_ptr, gate_ptr, up_ptr, numbers_ptr, score_ptr, n,
    TOKENS: tl.constexpr, DIGITS: tl.constexpr, WORDS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: one program for BLOCK_R units. All but a row's first words waits for the kernel before."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < n
    column = tl.arange(0, BLOCK_S)
    # [BLOCK_R, BLOCK_S]
    pairs_ptr = up_ptr.to(tl.pointer_type(tl.int32)) + row[:, None].to(tl.int64) * WORDS
    words_ptr = gate_ptr.to(tl.pointer_type(tl.int32)) + row[:, None].to(tl.int64) * (2 * WORDS)
    inside = live[:, None] & (column < WORDS)[None, :]
    first_pairs = tl.load(pairs_ptr + column[None, :], mask=inside, other=0)
    first_low = tl.load(words_ptr + column[None, :], mask=inside, other=0)
    first_high = tl.load(words_ptr + WORDS + column[None, :], mask=inside, other=0)
    a = tl.load(numbers_ptr + row, mask=live, other=0.0)
    b = tl.load(numbers_ptr + n + row, mask=live, other=0.0)
    c = tl.load(numbers_ptr + 2 * n + row, mask=live, other=0.0)
    d = tl.load(numbers_ptr + 3 * n + row, mask=live, other=0.0)
    f = tl.load(numbers_ptr + 4 * n + row, mask=live, other=0.0)
    wait_for_previous(EARLY)
    # Loops, not unrolled: tens of thousands of lines of assembly for several tokens of a wide model.
    for token in range(TOKENS):
        source = x_ptr + token * (16 * WORDS)
        gate, up = _products(
            first_low, first_high, first_pairs, source, column, column < WORDS, DIGITS, WORDS
        )
        for start in range(BLOCK_S, WORDS, BLOCK_S):
            at = start + column
            inside = live[:, None] & (at < WORDS)[None, :]
            pairs = tl.load(pairs_ptr + at[None, :], mask=inside, other=0)
            low = tl.load(words_ptr + at[None, :], mask=inside, other=0)
            high = tl.load(words_ptr + WORDS + at[None, :], mask=inside, other=0)
            more_gate, more_up = _products(low, high, pairs, source, at, at < WORDS, DIGITS, WORDS)
            gate += more_gate
            up += more_up
        other = up * c + d
        score = tl.abs(activate(gate * a + b, ACTIVATION)) * tl.sqrt(other * other + f)
        tl.store(score_ptr + token * n + row, score, mask=live)


def launch_sketch(
    kernel, x: Tensor, gate: Tensor, up: Tensor, numbers: Tensor, activation: str
) -> Tensor:
    """Launch `_sketch_kernel`, wrapped or not."""
    x, gate, up, numbers = (t.contiguous() for t in (x, gate, up, numbers))
    (tokens, d), n = x.shape, up.shape[0]
    score, words = empty(tokens, n, like=x, dtype=torch.float32), d // MULTIPLE
    kernel[(cdiv(n, 16),)](
        x, gate, up, numbers, score, n,
        TOKENS=tokens, DIGITS=3 if x.dtype is torch.float32 else 2, WORDS=words, ACTIVATION=activation,
        BLOCK_R=16, BLOCK_S=min(256, power_of_2(words)), EARLY=False, num_warps=4,
    )  # fmt: skip
    return score


def check_sketch(x: Tensor, gate: Tensor, up: Tensor, numbers: Tensor) -> None:
    """Raise ValueError where they don't belong together."""
    n, d = up.shape[0], x.shape[1]
    expected = (n, d // 2), (n, d // 4), (NUMBERS, n)
    found = tuple(gate.shape), tuple(up.shape), tuple(numbers.shape)
    if d % MULTIPLE or found != expected:
        raise ValueError(
            f"a sketch for inputs of width {d}, which has to be a multiple of {MULTIPLE}, is {expected}: found {found}"
        )


def _fake_sketch_score(
    x: Tensor, gate: Tensor, up: Tensor, numbers: Tensor, activation: str
) -> Tensor:
    return x.new_empty(x.shape[0], up.shape[0], dtype=torch.float32)


@cpu.cpu_op("dejavu::sketch_score_cpu", _fake_sketch_score)
def sketch_score_cpu(
    x: Tensor, gate: Tensor, up: Tensor, numbers: Tensor, activation: str
) -> Tensor:
    """Opaque to tracing: a call into C++, or the reference where there is no C++ form."""
    score = cpu.sketch_score(x, gate, up, numbers, activation)
    return sketch_score_reference(x, gate, up, numbers, activation) if score is None else score


@triton_op("dejavu::sketch_score", mutates_args=())
def sketch_score(x: Tensor, gate: Tensor, up: Tensor, numbers: Tensor, activation: str) -> Tensor:
    """See `sketch_score_reference`. Raises ValueError where the sketch is of another width."""
    check_sketch(x, gate, up, numbers)
    if not x.is_cuda:
        return sketch_score_cpu(x, gate, up, numbers, activation)
    return launch_sketch(wrap_triton(_sketch_kernel), x, gate, up, numbers, activation)
