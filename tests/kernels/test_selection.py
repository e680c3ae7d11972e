"""`compact` lists exactly the units above the threshold, in order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dejavu_compile.kernels import compact, compact_reference

ids = {"ids": lambda v: str(v).removeprefix("torch.")}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], **ids)
TOKENS = pytest.mark.parametrize("m", [1, 3], ids=["m1", "m3"])


def units_above(values, threshold):
    """An oracle in plain Python."""
    return [
        unit
        for unit in range(values.shape[1])
        if any(not abs(float(row[unit])) <= threshold for row in values)
    ]


def assert_lists(selection, units, n):
    index, count = selection
    assert (index.dtype, count.dtype) == (torch.int32, torch.int32)
    assert (index.shape, count.shape) == ((n,), ())
    assert int(count) == len(units)
    assert index.tolist() == units + [0] * (n - len(units))


@DTYPES
@TOKENS
@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000], ids=lambda n: f"n{n}")
def test_equals_plain_python(n, m, dtype):
    values = torch.randn(m, n).to(dtype)
    for op in (compact, compact_reference):
        assert_lists(op(values, 1.5), units_above(values, 1.5), n)


@pytest.mark.parametrize("op", [compact, compact_reference])
def test_counts_none_one_all(op):
    values = torch.zeros(2, 100)
    assert_lists(op(values, 0.0), [], 100)
    values[1, 63] = -1e-30
    assert_lists(op(values, 0.0), [63], 100)
    assert_lists(op(torch.ones(2, 100), 0.5), list(range(100)), 100)


@pytest.mark.parametrize("op", [compact, compact_reference])
def test_threshold_itself_is_not_above(op):
    assert_lists(op(torch.tensor([[1.0, -1.0, 1.5, -1.5]]), 1.0), [2, 3], 4)


@pytest.mark.parametrize("op", [compact, compact_reference])
def test_nan_and_infinity_are_selected(op):
    values = torch.tensor([[0.0, float("nan"), float("inf"), -float("inf"), 1.0]])
    assert_lists(op(values, 1e30), [1, 2, 3], 5)


def test_strided_values():
    values = torch.randn(100, 6).T[::2]
    assert_lists(compact(values, 1.0), units_above(values, 1.0), 100)


@given(st.integers(1, 200), st.integers(1, 4), st.floats(0, 3), st.integers(0, 2**16))
def test_any_size_and_threshold(n, m, threshold, seed):
    values = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    limit = torch.tensor(threshold).item()  # fp32, like the values
    assert_lists(compact(values, limit), units_above(values, limit), n)


@TOKENS
def test_opcheck(m):
    torch.library.opcheck(torch.ops.dejavu.compact.default, (torch.randn(m, 63), 1.0))
    torch.library.opcheck(torch.ops.dejavu.compact.default, (torch.randn(63, m).T, 1.0))
