"""What each unit of a gated MLP probably adds to a token, from a sketch of the two projections into it.

    score[t, u] = |act(a G[u] @ x[t] + b)| * sqrt((c U[u] @ x[t] + d)^2 + f)

G is the gate's projection in four bits a weight (`nibbles`), U the other in two (`pairs`), both in steps; a, b, c, d and
f are one number a unit each. f is the mean square of what U misses: a unit of which nothing but its gate is known counts
by that. x is written in balanced base 256 (`digits_of`), for four products of bytes an instruction; one launch then reads
both matrices, and `compact` lists what is above a threshold.
"""

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
    start_next,
    tl,
    wait_for_previous,
    wrap_triton,
)
from .activations import REFERENCE, activate
from .nibbles import unpack
from .pairs import MULTIPLE, unpack_pairs
from .select_int8 import _dp4a
from .tuning import Config, candidates, config_for, key_of

NUMBERS = 5  # a unit


def sketch_score_reference(
    x: Tensor, gate: Tensor, up: Tensor, numbers: Tensor, activation: str
) -> Tensor:
    """x [m, d], any float dtype; gate [n, d / 2] and up [n, d / 4] uint8; numbers [5, n] fp32: a, b, c, d, f.

    Returns [m, n] fp32, computed in fp32; NaN where any of x is NaN. Kernels keep of x so many bits below its largest
    element: 20 of fp32 and on CPUs, else 13.
    """
    x, (a, b, c, d, f) = x.float(), numbers
    gated = REFERENCE[activation](F.linear(x, unpack(gate).float()) * a + b)
    other = F.linear(x, unpack_pairs(up)) * c + d
    return gated.abs() * (other.square() + f).sqrt()


def digits_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [m, d] as step * (d0 + 256 d1 + ...): int8 digits [m, 2 or 3, d], steps [m] fp32, sums of the integers [m] fp32.

    13 bits below the largest element, of fp32 20. In torch's ops, which Inductor compiles into the norm before: made
    anew by each program of the kernel, they would take it longer than the products. A step is NaN where any element is, or inf.
    """
    count, bits = (3, 20) if x.dtype is torch.float32 else (2, 13)
    x = x.float()
    step = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) * 2.0**-bits
    whole = (x / step).round()
    sums, rest, digits = whole.sum(dim=1), whole.to(torch.int32), []
    for _ in range(count):
        # Balanced: -128 to 127
        digit = ((rest + 128) & 255) - 128
        digits.append(digit)
        rest = (rest - digit) >> 8
    # Zeros times an infinite step are NaN, as they should be
    return torch.stack(digits, dim=1).to(torch.int8), step.squeeze(1), sums


@jit
def _sketch_kernel(
    digits_ptr, step_ptr, sum_ptr, gate_ptr, up_ptr, numbers_ptr, score_ptr, n,
    TOKENS: tl.constexpr, DIGITS: tl.constexpr, WORDS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: one program for BLOCK_R units. All but a row's first words waits for the kernel before.

    A word of U holds four columns of each quarter of a row; of G, word `at` those of the first and the third quarter,
    word WORDS + at those of the other two.
    """
    start_next(EARLY)
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
        x_ptr = digits_ptr.to(tl.pointer_type(tl.int32)) + token * (DIGITS * 4 * WORDS)
        gate, up = _products(
            first_low, first_high, first_pairs, x_ptr, column, column < WORDS, DIGITS, WORDS
        )
        for start in range(BLOCK_S, WORDS, BLOCK_S):
            at = start + column
            inside = live[:, None] & (at < WORDS)[None, :]
            pairs = tl.load(pairs_ptr + at[None, :], mask=inside, other=0)
            low = tl.load(words_ptr + at[None, :], mask=inside, other=0)
            high = tl.load(words_ptr + WORDS + at[None, :], mask=inside, other=0)
            more_gate, more_up = _products(low, high, pairs, x_ptr, at, at < WORDS, DIGITS, WORDS)
            gate += more_gate
            up += more_up
        step = tl.load(step_ptr + token)
        # Nibbles were taken 16 times; two bits are 0 to 3, for -1.5 to 1.5
        known = gate * (0.0625 * step) * a + b
        other = (up - 1.5 * tl.load(sum_ptr + token)) * step * c + d
        score = tl.abs(activate(known, ACTIVATION)) * tl.sqrt(other * other + f)
        tl.store(score_ptr + token * n + row, score, mask=live)


@jit
def _products(low, high, pairs, x_ptr, at, inside, DIGITS: tl.constexpr, WORDS: tl.constexpr):
    """16 times G, and the codes of U, times the digits of a block of words: two of [rows] fp32."""
    # [rows, words]
    gate = tl.zeros(pairs.shape, dtype=tl.float32)
    up = tl.zeros(pairs.shape, dtype=tl.float32)
    weight = 1.0
    for digit in tl.static_range(DIGITS):
        whole_gate = tl.zeros_like(pairs)
        whole_up = tl.zeros_like(pairs)
        for quarter in tl.static_range(4):
            place = (digit * 4 + quarter) * WORDS + at
            x = tl.load(x_ptr + place, mask=inside, other=0)[None, :]
            # Moved to the upper half of each byte, nibbles are 16 times what they say, with their sign.
            nibbles = low if quarter % 2 == 0 else high
            nibbles = ((nibbles << 4) if quarter < 2 else nibbles) & -0x0F0F0F10
            whole_gate = _dp4a(nibbles, x, whole_gate)
            whole_up = _dp4a((pairs >> (2 * quarter)) & 0x03030303, x, whole_up)
        gate += weight * whole_gate.to(tl.float32)
        up += weight * whole_up.to(tl.float32)
        weight = weight * 256.0
    return tl.sum(gate, axis=1), tl.sum(up, axis=1)


def sketch_config(words: int) -> Config:
    """Few rows for one warp each: no sums across warps. (H200, 14336 rows of 256 words: 13.6 us; eight rows for four warps 21)"""
    return {"BLOCK_R": 2, "BLOCK_S": min(128, power_of_2(words)), "num_warps": 1}


def sketch_candidates(words: int) -> list[Config]:
    """`sketch_config`, and other rows a program, words at a time and warps."""
    rule = sketch_config(words)
    others = [
        {"BLOCK_R": rows, "BLOCK_S": min(block, power_of_2(words)), "num_warps": warps}
        for rows, block, warps in (
            (8, 256, 4), (8, 64, 4), (16, 128, 8), (16, 64, 4), (2, 256, 1), (4, 128, 2), (4, 256, 4),
        )
    ]  # fmt: skip
    return candidates(rule, others)


def sketch_key(x: Tensor, up: Tensor) -> str:
    """Of a launch."""
    return key_of("sketch", x, tokens=x.shape[0], n=up.shape[0], d=x.shape[1])


def launch_sketch(
    kernel, x: Tensor, gate: Tensor, up: Tensor, numbers: Tensor, activation: str,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launch `_sketch_kernel`, wrapped or not."""
    gate, up, numbers = (t.contiguous() for t in (gate, up, numbers))
    digits, step, sums = digits_of(x)
    (tokens, d), n = x.shape, up.shape[0]
    score, words = empty(tokens, n, like=x, dtype=torch.float32), d // MULTIPLE
    config = dict(config or config_for(sketch_key(x, up), sketch_config(words)))
    kernel[(cdiv(n, config["BLOCK_R"]),)](
        digits, step, sums, gate, up, numbers, score, n,
        TOKENS=tokens, DIGITS=digits.shape[1], WORDS=words, ACTIVATION=activation, EARLY=False, **config,
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
