"""Projections of some heads against float64, with NaN wherever nothing may be read."""

from functools import partial

import models
import pytest
import torch
import torch.nn.functional as F

from dejavu_compile.kernels import (
    cpu,
    gemv,
    gemv_reference,
    head_sum,
    head_sum_reference,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TOKENS = pytest.mark.parametrize("m", [1, 3], ids=["m1", "m3"])
SHARES = pytest.mark.parametrize("share", ["none", "one", "some", "all"])
HEADS = 6
ARRIVED = torch.zeros(256, dtype=torch.int32)

# Rows of a projection by head: a query projection; [head, q k v]; queries, then keys and values
OWNERS = {
    "query": torch.arange(HEADS),
    "interleaved": torch.stack([torch.arange(HEADS), *[torch.full((HEADS,), -1)] * 2], 1).flatten(),
    "fused": torch.cat([torch.arange(HEADS), torch.full((4,), -1)]),
    "halves": torch.arange(HEADS).repeat_interleave(2),
}  # fmt: skip


def scores(m, share):
    keep = torch.stack(
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
    return torch.where(keep, 0.1, 0.0)


@pytest.mark.parametrize("form", [gemv, gemv_reference])
@DTYPES
@TOKENS
@SHARES
@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("bias", [True, False])
def test_rows_equal_float64(form, dtype, m, share, owners, bias):
    """Some rows of the first weight are skipped, none of the second."""
    owner, score, block = OWNERS[owners].int(), scores(m, share), 8
    n, d = block * len(owner), 40
    x, weight, other = (torch.randn(k, d).to(dtype) for k in (m, n, 5))
    bias = torch.randn(n).to(dtype) if bias else None
    wide = None if bias is None else bias.double()
    exact = torch.cat(
        [F.linear(x.double(), weight.double(), wide), x.double() @ other.double().T], 1
    )
    plain = torch.cat([F.linear(x, weight, bias), x @ other.T], 1)
    runs = torch.cat([(score > 0).any(0), torch.ones(1, dtype=torch.bool)])[owner.long()]
    runs = runs.repeat_interleave(block)
    weight = weight.masked_fill(~runs[:, None], float("nan"))
    got = form(x, [weight, other], [bias, None], "identity", owner, score)
    assert got.dtype is dtype
    assert got.shape == (m, n + 5)
    runs = torch.cat([runs, torch.ones(5, dtype=torch.bool)])
    plain, got, exact = (y.masked_fill(~runs, 0.0) for y in (plain, got, exact))
    models.assert_as_exact_as(plain, got, exact)


@pytest.mark.parametrize("form", [partial(head_sum, arrived=ARRIVED), head_sum_reference])
@DTYPES
@TOKENS
@SHARES
@pytest.mark.parametrize("width", [8, 5])
def test_sums_equal_float64(form, dtype, m, share, width):
    score, d = scores(m, share), 37
    every = (score > 0).repeat_interleave(width, dim=1)
    hidden = torch.randn(m, HEADS * width).to(dtype)
    weight = torch.randn(HEADS * width, d).to(dtype)
    exact = (hidden.double() * every) @ weight.double()
    plain = (hidden * every) @ weight
    got = form(hidden.masked_fill(~every, float("nan")), weight, score)
    assert got.dtype is torch.float32
    models.assert_as_exact_as(plain, got, exact)


@pytest.mark.parametrize("form", [partial(head_sum, arrived=ARRIVED), head_sum_reference])
def test_score_that_is_nan_keeps_its_head(form):
    hidden, weight = torch.randn(1, HEADS * 8), torch.randn(HEADS * 8, 37)
    want = hidden.double() @ weight.double()
    got = form(hidden, weight, torch.full((1, HEADS), float("nan")))
    models.assert_near(got, want, 1e-5)


def test_without_a_compiler(monkeypatch):
    x, weight, bias = torch.randn(2, 40), torch.randn(48, 40), torch.randn(48)
    rows = (x, [weight], [bias], "relu", OWNERS["query"].int(), scores(2, "some"))
    sums = torch.randn(2, 48), torch.randn(48, 40), scores(2, "some")
    runs = (rows[-1] > 0).any(0).repeat_interleave(8)
    want = gemv(*rows)[:, runs], head_sum(*sums, ARRIVED)
    monkeypatch.setattr(cpu, "function", lambda op, dtype: None)
    models.assert_near(gemv(*rows)[:, runs], want[0].double(), 1e-5)
    models.assert_near(head_sum(*sums, ARRIVED), want[1].double(), 1e-5)


def test_opcheck():
    score, x = scores(2, "some"), torch.randn(2, 40)
    # Whatever a head that doesn't run leaves there differs from run to run: let all run.
    every = torch.ones_like(score)
    rows = (x, [torch.randn(48, 40)], [None], "identity", OWNERS["query"].int(), every)
    torch.library.opcheck(torch.ops.dejavu.gemv.default, rows)
    torch.library.opcheck(
        torch.ops.dejavu.head_sum.default,
        (torch.randn(2, 48), torch.randn(48, 40), score, ARRIVED),
    )
