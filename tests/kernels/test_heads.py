"""Projections of some heads against float64, with NaN wherever nothing may be read."""

import models
import pytest
import torch
import torch.nn.functional as F

from dejavu_compile.kernels import (
    cpu,
    head_rows,
    head_rows_reference,
    head_sum,
    head_sum_reference,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TOKENS = pytest.mark.parametrize("m", [1, 3], ids=["m1", "m3"])
SHARES = pytest.mark.parametrize("share", ["none", "one", "some", "all"])
HEADS = 6

# Rows of a projection by head: a query projection; [head, q k v]; queries, then keys and values
OWNERS = {
    "query": torch.arange(HEADS),
    "interleaved": torch.stack([torch.arange(HEADS), *[torch.full((HEADS,), -1)] * 2], 1).flatten(),
    "fused": torch.cat([torch.arange(HEADS), torch.full((4,), -1)]),
    "halves": torch.arange(HEADS).repeat_interleave(2),
}  # fmt: skip


def kept(m, share):
    return torch.stack(
        [
            {
                "none": torch.zeros(HEADS, dtype=torch.bool),
                "one": torch.arange(HEADS) == (t + 2) % HEADS,
                "some": torch.arange(HEADS) % 3 == t % 3,
                "all": torch.ones(HEADS, dtype=torch.bool),
            }[share]
            for t in range(m)
        ]
    )


@pytest.mark.parametrize("form", [head_rows, head_rows_reference])
@DTYPES
@TOKENS
@SHARES
@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("bias", [True, False])
def test_rows_equal_float64(form, dtype, m, share, owners, bias):
    owner, keep, block = OWNERS[owners].int(), kept(m, share), 8
    n, d = block * len(owner), 40
    x, weight = torch.randn(m, d).to(dtype), torch.randn(n, d).to(dtype)
    bias = torch.randn(n).to(dtype) if bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = F.linear(x, weight, bias)
    runs = torch.cat([keep.any(0), torch.ones(1, dtype=torch.bool)])[owner.long()]
    runs = runs.repeat_interleave(block)
    weight = weight.masked_fill(~runs[:, None], float("nan"))
    got = form(x, weight, bias, owner, keep)
    assert got.dtype is dtype
    assert got.shape == (m, n)
    plain, got, exact = (y.masked_fill(~runs, 0.0) for y in (plain, got, exact))
    models.assert_as_exact_as(plain, got, exact)


@pytest.mark.parametrize("form", [head_sum, head_sum_reference])
@DTYPES
@TOKENS
@SHARES
@pytest.mark.parametrize("width", [8, 5])
def test_sums_equal_float64(form, dtype, m, share, width):
    keep, d = kept(m, share), 37
    every = keep.repeat_interleave(width, dim=1)
    hidden = torch.randn(m, HEADS * width).to(dtype)
    weight = torch.randn(HEADS * width, d).to(dtype)
    exact = (hidden.double() * every) @ weight.double()
    plain = (hidden * every) @ weight
    got = form(hidden.masked_fill(~every, float("nan")), weight, keep)
    assert got.dtype is torch.float32
    models.assert_as_exact_as(plain, got.sum(0), exact)


def test_without_a_compiler(monkeypatch):
    arguments = (torch.randn(2, 40), torch.randn(48, 40), torch.randn(48))
    more = (OWNERS["query"].int(), kept(2, "some"))
    hidden, weight = torch.randn(2, 48), torch.randn(48, 40)
    want = head_rows(*arguments, *more), head_sum(hidden, weight, more[1])
    monkeypatch.setattr(cpu, "function", lambda op, dtype: None)
    models.assert_near(head_rows(*arguments, *more), want[0].double(), 1e-5)
    models.assert_near(head_sum(hidden, weight, more[1]), want[1].double(), 1e-5)


def test_opcheck():
    keep = kept(2, "some")
    rows = (torch.randn(2, 40), torch.randn(48, 40), None, OWNERS["query"].int(), keep)
    torch.library.opcheck(torch.ops.dejavu.head_rows.default, rows)
    torch.library.opcheck(
        torch.ops.dejavu.head_sum.default, (torch.randn(2, 48), torch.randn(48, 40), keep)
    )
