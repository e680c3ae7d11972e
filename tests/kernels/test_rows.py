"""`gathered_rows` and `gathered_glu` against float64, in every layout that a rewrite makes."""

import models
import pytest
import torch
import torch.nn.functional as F
from strategies import ACTIVATIONS

from dejavu_compile.kernels import (
    gathered_glu,
    gathered_glu_reference,
    gathered_rows,
    gathered_rows_reference,
)
from dejavu_compile.kernels.activations import REFERENCE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TOKENS = pytest.mark.parametrize("m", [1, 3], ids=["m1", "m3"])
SIZES = pytest.mark.parametrize(
    ("n", "d"), [(100, 63), (1000, 128)], ids=["n100-d63", "n1000-d128"]
)
COUNTS = pytest.mark.parametrize("share", ["none", "one", "few", "most", "all"])
FORMS = pytest.mark.parametrize("form", [gathered_rows, gathered_rows_reference])


def selection(n, share):
    """Of `few` the CPU gathers rows, of `most` it multiplies densely."""
    keep = {
        "none": torch.zeros(n, dtype=torch.bool),
        "one": torch.arange(n) == n - 1,
        "few": torch.arange(n) % 7 == 2,
        "most": torch.arange(n) % 3 != 0,
        "all": torch.ones(n, dtype=torch.bool),
    }[share]
    index = torch.zeros(n, dtype=torch.int32)
    chosen = keep.nonzero().flatten()
    index[: len(chosen)] = chosen
    return index, torch.tensor(len(chosen), dtype=torch.int32)


def by_slot(y, index, count):
    """Move [m, n] by unit to slots; the rest is zero."""
    k = int(count)
    result = torch.zeros_like(y)
    result[:, :k] = y[:, index[:k].long()]
    return result


def act64(name, x):
    """Written out, apart from `REFERENCE`."""
    return {
        "identity": lambda: x,
        "relu": lambda: x.clamp(min=0),
        "relu2": lambda: x.clamp(min=0) ** 2,
        "silu": lambda: x * torch.sigmoid(x),
        "gelu": lambda: x * torch.special.ndtr(x),
        "gelu_tanh": lambda: ACTIVATIONS["handspelled_gelu"](x),
    }[name]()


def dense64(x, weight, bias, activation):
    y = x.double() @ weight.double().T
    return act64(activation, y if bias is None else y + bias.double())


def plain(x, weight, bias, activation):
    """The same in the dtype of `x`."""
    return REFERENCE[activation](F.linear(x, weight, bias))


@FORMS
@DTYPES
@TOKENS
@SIZES
@COUNTS
def test_rows_equal_float64(form, dtype, m, n, d, share):
    x, weight, bias = (
        torch.randn(m, d).to(dtype),
        torch.randn(n, d).to(dtype),
        torch.randn(n).to(dtype),
    )
    chosen = selection(n, share)
    got = form(x, weight, bias, *chosen, "silu")
    assert got.dtype is dtype
    exact = dense64(x, weight, bias, "silu")
    low = by_slot(plain(x, weight, bias, "silu"), *chosen)
    models.assert_as_exact_as(low, got, by_slot(exact, *chosen), among=exact)
    assert not got[:, int(chosen[1]) :].any()


@FORMS
@pytest.mark.parametrize("activation", REFERENCE)
def test_activations(form, activation):
    x, weight = torch.randn(2, 63), torch.randn(100, 63) / 8
    chosen = selection(100, "few")
    exact = by_slot(dense64(x, weight, None, activation), *chosen)
    models.assert_near(form(x, weight, None, *chosen, activation), exact, 1e-5)


LAYOUTS = {
    "every_second": lambda w: w[::2],
    "every_second_from_1": lambda w: w[1::2],
    "first_half": lambda w: w[:100],
    "second_half": lambda w: w[100:],
    "wide_rows": lambda w: w[:100, :40],
}


@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", ["few", "most"])
def test_strided_rows(form, layout, share):
    weight = LAYOUTS[layout](torch.randn(200, 63))
    bias = LAYOUTS[layout](torch.randn(200, 1).expand(200, 63))[:, 0]
    x, chosen = torch.randn(3, weight.shape[1]), selection(100, share)
    exact = by_slot(dense64(x, weight, bias, "relu"), *chosen)
    models.assert_near(form(x, weight, bias, *chosen, "relu"), exact, 1e-5)


def test_strided_x():
    x, weight = torch.randn(63, 6).T[::2], torch.randn(100, 63)
    chosen = selection(100, "few")
    exact = by_slot(dense64(x, weight, None, "identity"), *chosen)
    models.assert_near(gathered_rows(x, weight, None, *chosen, "identity"), exact, 1e-5)


@FORMS
@pytest.mark.parametrize("share", ["few", "most"])
def test_nan_is_not_hidden(form, share):
    x, weight = torch.randn(2, 63), torch.randn(100, 63)
    x[1, 62] = float("nan")
    chosen = selection(100, share)
    k = int(chosen[1])
    for activation in REFERENCE:
        got = form(x, weight, None, *chosen, activation)
        assert got[1, :k].isnan().all()
        assert not got[0].isnan().any()
        assert not got[:, k:].isnan().any()


@FORMS
def test_wild_index_past_the_count_is_not_read(form):
    index, count = selection(100, "few")
    index[int(count) :] = 2**30
    got = form(torch.randn(1, 63), torch.randn(100, 63), None, index, count, "relu")
    assert got.isfinite().all()


@pytest.mark.parametrize("form", [gathered_glu, gathered_glu_reference])
@DTYPES
@TOKENS
@COUNTS
@pytest.mark.parametrize("biased", [True, False])
def test_glu_equals_float64(form, dtype, m, share, biased):
    n, d = 100, 63
    both, x = torch.randn(2 * n, d).to(dtype), torch.randn(m, d).to(dtype)
    gate, up = both[::2], both[1::2]
    gate_bias, up_bias = torch.randn(2, n).to(dtype) if biased else (None, None)
    chosen = selection(n, share)
    got = form(x, gate, gate_bias, up, up_bias, *chosen, "silu")
    assert got.dtype is dtype
    low = plain(x, gate, gate_bias, "silu") * plain(x, up, up_bias, "identity")
    exact = dense64(x, gate, gate_bias, "silu") * dense64(x, up, up_bias, "identity")
    models.assert_as_exact_as(by_slot(low, *chosen), got, by_slot(exact, *chosen), among=exact)


OPS = torch.ops.dejavu


def cases():
    n, d = 50, 63
    x, weight = torch.randn(3, d), torch.randn(n, d)
    chosen = selection(n, "few")
    return {
        "rows": (OPS.gathered_rows.default, (x, weight, torch.randn(n), *chosen, "relu")),
        "rows_no_bias": (OPS.gathered_rows.default, (x, weight, None, *chosen, "identity")),
        "rows_times": (
            OPS.gathered_rows.default,
            (x, weight, None, *chosen, "relu", torch.randn(3, n)),
        ),
        "rows_strided": (
            OPS.gathered_rows.default,
            (torch.randn(d, 3).T, torch.randn(2 * n, d)[::2], None, *chosen, "gelu"),
        ),
        "glu": (OPS.gathered_glu.default, (x, weight, None, weight + 1, None, *chosen, "silu")),
        "glu_bias": (
            OPS.gathered_glu.default,
            (x, weight, torch.randn(n), weight + 1, torch.randn(n), *chosen, "silu"),
        ),
    }


@pytest.mark.parametrize("case", cases())
def test_opcheck(case):
    torch.library.opcheck(*cases()[case])
