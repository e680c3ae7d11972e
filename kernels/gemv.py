"""Dense projections of a few tokens, one or several of the same input in one launch.

    y[t] = act([W0 @ x[t] + b0, W1 @ x[t] + b1, ...])

A launch that reads 34 MB loses a quarter of the bandwidth to filling and draining the chip, so Q, K and
V go together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from . import cpu
from ._triton import cdiv, empty, jit, tl, wrap_triton
from .activations import REFERENCE, activate
from .rows import check_rows, dots, row_blocks

MOST = 3  # projections in one launch


def gemv_reference(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str
) -> Tensor:
    """x [m, d]; each weight [n_i, d] of its dtype, rows contiguous, any row stride; a bias [n_i] for each,
    or none at all. Returns [m, sum of n_i] of x's dtype; accumulated in fp32."""
    wide = [b.float() for b in biases] or [None] * len(weights)
    parts = [F.linear(x.float(), w.float(), b) for w, b in zip(weights, wide, strict=True)]
    return REFERENCE[activation](torch.cat(parts, dim=1)).to(x.dtype)


@jit
def _gemv_block(
    block, x_ptr, weight0, weight1, weight2, bias0, bias1, bias2, out_ptr,
    n0, n1, n2, stride0, stride1, stride2,
    D: tl.constexpr, TOKENS: tl.constexpr, WEIGHTS: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_J rows of one of the weights."""
    total = n0 + n1 + n2
    weight_ptr, bias_ptr, n, stride, first = weight0, bias0, n0, stride0, 0
    if WEIGHTS > 1:
        blocks0 = tl.cdiv(n0, BLOCK_J)
        blocks1 = blocks0 + tl.cdiv(n1, BLOCK_J)
        # Selects rather than branches: the compiler keeps what it knows of the pointers' alignment.
        is0, is1 = block < blocks0, block < blocks1
        weight_ptr = tl.where(is0, weight0, tl.where(is1, weight1, weight2))
        bias_ptr = tl.where(is0, bias0, tl.where(is1, bias1, bias2))
        n = tl.where(is0, n0, tl.where(is1, n1, n2))
        stride = tl.where(is0, stride0, tl.where(is1, stride1, stride2))
        first = tl.where(is0, 0, tl.where(is1, n0, n0 + n1))
        block -= tl.where(is0, 0, tl.where(is1, blocks0, blocks1))
    unit = block * BLOCK_J + tl.arange(0, BLOCK_J)
    live = unit < n
    row = weight_ptr + unit[:, None].to(tl.int64) * stride
    for token in tl.static_range(TOKENS):
        y = dots(x_ptr + token * D, row, live, D, BLOCK_J, BLOCK_D)
        if BIAS:
            y += tl.load(bias_ptr + unit, mask=live, other=0.0).to(tl.float32)
        y = activate(y, ACTIVATION)
        out = out_ptr + token * total + first + unit
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=live)


@jit
def _gemv_kernel(
    x_ptr, weight0, weight1, weight2, bias0, bias1, bias2, out_ptr,
    n0, n1, n2, stride0, stride1, stride2,
    D: tl.constexpr, TOKENS: tl.constexpr, WEIGHTS: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Grid: the row blocks of each weight, one weight after the other, one program each.

    LOOP says so in a loop that turns once: the same work, scheduled otherwise by the compiler.
    """
    if LOOP:
        blocks = tl.cdiv(n0, BLOCK_J) + tl.cdiv(n1, BLOCK_J) + tl.cdiv(n2, BLOCK_J)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            _gemv_block(
                block, x_ptr, weight0, weight1, weight2, bias0, bias1, bias2, out_ptr,
                n0, n1, n2, stride0, stride1, stride2,
                D, TOKENS, WEIGHTS, BIAS, ACTIVATION, BLOCK_J, BLOCK_D,
            )  # fmt: skip
    else:
        _gemv_block(
            tl.program_id(0), x_ptr, weight0, weight1, weight2, bias0, bias1, bias2, out_ptr,
            n0, n1, n2, stride0, stride1, stride2,
            D, TOKENS, WEIGHTS, BIAS, ACTIVATION, BLOCK_J, BLOCK_D,
        )  # fmt: skip


def gemv_config(d: int) -> dict[str, int]:
    """The loop is 8 % faster for rows in short steps (d 9216 on an H200), 10 % slower for long ones (4096)."""
    blocks = row_blocks(d)
    return {**blocks, "LOOP": d % blocks["BLOCK_D"] == 0 and blocks["BLOCK_D"] < 2048}


def launch_gemv(
    kernel, x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Launch `_gemv_kernel`, wrapped or not, for at most `MOST` weights."""
    x = x.contiguous()
    for weight in weights:
        check_rows(weight)
    tokens, d = x.shape
    sizes = [weight.shape[0] for weight in weights]
    config = config or gemv_config(d)
    out = empty(tokens, sum(sizes), like=x)
    absent = MOST - len(weights)
    bias = [*(b.contiguous() for b in biases or [x] * len(weights)), *([x] * absent)]
    kernel[(sum(cdiv(n, config["BLOCK_J"]) for n in sizes),)](
        x, *weights, *([x] * absent), *bias, out,
        *sizes, *([0] * absent), *(weight.stride(0) for weight in weights), *([0] * absent),
        D=d, TOKENS=tokens, WEIGHTS=len(weights), BIAS=bool(biases), ACTIVATION=activation, **config,
    )  # fmt: skip
    return out


def _fake_gemv(x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str) -> Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


@cpu.cpu_op("dejavu::gemv_cpu", _fake_gemv)
def gemv_cpu(x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str) -> Tensor:
    """Opaque to tracing: a call into C++, or PyTorch's own projections where there is no C++ form."""
    sizes = [weight.shape[0] for weight in weights]
    out = x.new_empty(x.shape[0], sum(sizes))
    with_bias = biases or [None] * len(weights)
    for part, weight, bias in zip(out.split(sizes, dim=1), weights, with_bias, strict=True):
        if not cpu.rows(part, x, weight, bias, None, weight.shape[0], activation):
            part.copy_(REFERENCE[activation](F.linear(x, weight, bias)))
    return out


@triton_op("dejavu::gemv", mutates_args=())
def gemv(x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str) -> Tensor:
    """See `gemv_reference`."""
    if not x.is_cuda:
        return gemv_cpu(x, weights, biases, activation)
    return launch_gemv(wrap_triton(_gemv_kernel), x, weights, biases, activation)
