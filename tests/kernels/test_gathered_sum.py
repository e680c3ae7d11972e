"""`gathered_sum` against float64, and the whole chain of ops under Inductor."""

from functools import partial

import models
import pytest
import torch

from dejavu_compile.kernels import gathered_sum, gathered_sum_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TOKENS = pytest.mark.parametrize("m", [1, 3], ids=["m1", "m3"])
SIZES = pytest.mark.parametrize(
    ("n", "d"), [(100, 63), (1000, 128)], ids=["n100-d63", "n1000-d128"]
)
ARRIVED = torch.zeros(256, dtype=torch.int32)
FORMS = pytest.mark.parametrize(
    "form",
    [partial(gathered_sum, arrived=ARRIVED), gathered_sum_reference],
    ids=["op", "reference"],
)
COMPACTED = pytest.mark.parametrize("compacted", [True, False], ids=["by_slot", "by_unit"])
KEEP = {
    "none": lambda n: torch.zeros(n, dtype=torch.bool),
    "one": lambda n: torch.arange(n) == n - 1,
    "few": lambda n: torch.arange(n) % 7 == 2,
    "most": lambda n: torch.arange(n) % 3 != 0,
    "all": lambda n: torch.ones(n, dtype=torch.bool),
}


def prepared(by_unit, keep, compacted):
    """`hidden` as the op takes it, with junk wherever it must not read, and the selection."""
    n = len(keep)
    chosen = keep.nonzero().flatten()
    index = torch.zeros(n, dtype=torch.int32)
    index[: len(chosen)] = chosen
    hidden = torch.full_like(by_unit, float("nan"))
    if compacted:
        hidden[:, : len(chosen)] = by_unit[:, chosen]
    else:
        hidden[:, chosen] = by_unit[:, chosen]
    return hidden, index, torch.tensor(len(chosen), dtype=torch.int32)


@FORMS
@DTYPES
@TOKENS
@SIZES
@COMPACTED
@pytest.mark.parametrize("share", KEEP)
def test_equals_float64(form, dtype, m, n, d, compacted, share):
    by_unit, weight, keep = (
        torch.randn(m, n).to(dtype),
        torch.randn(n, d).to(dtype),
        KEEP[share](n),
    )
    hidden, index, count = prepared(by_unit, keep, compacted)
    got = form(hidden, weight, index, count, compacted)
    assert got.dtype is torch.float32
    assert got.shape == (m, d)
    exact = (by_unit.double() * keep) @ weight.double()
    models.assert_as_exact_as((by_unit * keep) @ weight, got, exact)


@FORMS
@COMPACTED
@pytest.mark.parametrize("share", ["few", "most"])
def test_strided_rows(form, compacted, share):
    by_unit, keep = torch.randn(3, 100), KEEP[share](100)
    hidden, index, count = prepared(by_unit, keep, compacted)
    for weight in (
        torch.randn(200, 63)[::2],
        torch.randn(200, 63)[100:],
        torch.randn(100, 99)[:, :63],
    ):
        exact = (by_unit.double() * keep) @ weight.double()
        models.assert_near(form(hidden, weight, index, count, compacted), exact, 1e-5)


@FORMS
@COMPACTED
@pytest.mark.parametrize("share", ["few", "most"])
def test_nan_is_not_hidden(form, compacted, share):
    by_unit, keep = torch.randn(3, 100), KEEP[share](100)
    by_unit[1, 2] = float("nan")
    keep[2] = True
    got = form(*_with(prepared(by_unit, keep, compacted), torch.randn(100, 63)), compacted)
    assert got[1].isnan().all()
    assert not got[[0, 2]].isnan().any()


def _with(arguments, weight):
    hidden, index, count = arguments
    return hidden, weight, index, count


@FORMS
def test_rows_past_the_count_are_not_read(form):
    """A unit that isn't listed doesn't matter, whatever its weights are."""
    by_unit, keep, weight = torch.randn(1, 100), KEEP["few"](100), torch.randn(100, 63)
    weight[~keep] = float("nan")
    hidden, index, count = prepared(by_unit, keep, True)
    index[int(count) :] = 2**30
    assert form(hidden, weight, index, count, True).isfinite().all()


@COMPACTED
@TOKENS
def test_opcheck(compacted, m):
    op = torch.ops.dejavu.gathered_sum.default
    hidden, index, count = prepared(torch.randn(m, 50), KEEP["few"](50), compacted)
    hidden = hidden.nan_to_num(0.0)
    torch.library.opcheck(op, (hidden, torch.randn(50, 63), index, count, compacted, ARRIVED))
    strided = hidden.T.contiguous().T
    torch.library.opcheck(
        op, (strided, torch.randn(100, 63)[::2], index, count, compacted, ARRIVED)
    )


# --- the ops in a row --------------------------------------------------------------------------------


def chain(source, down, up, bias, gate, weight, out):
    """What a predicted gated MLP is rewritten to."""
    ops = torch.ops.dejavu
    index, count = ops.select(source, down, up, bias)
    hidden = ops.gathered_glu(source, gate, None, weight, None, index, count, "silu")
    dense = ops.gemv(source, [out], [None], "identity")
    return (
        ops.gathered_sum(hidden, out, index, count, True, ARRIVED)
        + torch.relu(source)
        + dense.sum()
    )


def exact_chain(source, weight, out):
    ops = torch.ops.dejavu
    hidden = ops.gemv(source, [weight], [None], "relu")
    index, count = ops.compact(hidden, 0.0)
    return ops.gathered_sum(hidden, out, index, count, False, ARRIVED) + source


@pytest.mark.slow
@torch.no_grad()
def test_inductor_equals_eager():
    n, d, r = 100, 63, 8
    weights = (
        torch.randn(r, d), torch.randn(n, r), torch.randn(n),
        torch.randn(n, d), torch.randn(n, d), torch.randn(n, d),
    )  # fmt: skip
    compiled = torch.compile(chain, backend="inductor", fullgraph=True)
    exact = torch.compile(exact_chain, backend="inductor", fullgraph=True)
    for _ in range(2):
        source = torch.randn(2, d)
        torch.testing.assert_close(
            compiled(source, *weights), chain(source, *weights), rtol=1e-4, atol=1e-3
        )
        arguments = (source, weights[3], weights[5])
        torch.testing.assert_close(
            exact(*arguments), exact_chain(*arguments), rtol=1e-4, atol=1e-3
        )
