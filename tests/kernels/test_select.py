"""`select` lists the units whose predictor score is above zero for any token."""

import pytest
import torch

from dejavu_compile.kernels import select, select_reference
from dejavu_compile.kernels.nibbles import pack, unpacked

SIZES = pytest.mark.parametrize(
    ("n", "s", "r"), [(100, 63, 16), (1000, 128, 48), (33, 7, 1)], ids=lambda v: str(v)
)
TOKENS = pytest.mark.parametrize("m", [1, 3], ids=["m1", "m3"])


def predictor(m, n, s, r, dtype=torch.float32, shift=0.0):
    source = torch.randn(m, s).to(dtype)
    down, up = torch.randn(r, s) / s**0.5, torch.randn(n, r) / r**0.5
    return source, down.to(dtype), up.to(dtype), torch.randn(n) - shift


def scores(source, down, up, bias):
    """[m, n] in float64."""
    down, up = unpacked(down), unpacked(up)
    return (source.double() @ down.double().T) @ up.double().T + bias.double()


def assert_selects(selection, arguments, margin):
    """Right for every unit whose best score is further than `margin` from zero; sorted; padded by 0."""
    index, count = selection
    n, k = arguments[2].shape[0], int(count)
    assert (index.dtype, count.dtype, index.shape) == (torch.int32, torch.int32, (n,))
    best = scores(*arguments).max(0).values
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[index[:k].long()] = True
    assert int(chosen.sum()) == k
    assert torch.equal(index[:k], index[:k].sort().values)
    assert not index[k:].any()
    sure = best.abs() > margin
    assert torch.equal(chosen[sure], (best > 0)[sure])
    assert sure.float().mean() > 0.7


@SIZES
@TOKENS
@pytest.mark.parametrize("op", [select, select_reference])
def test_equals_float64(op, m, n, s, r):
    arguments = predictor(m, n, s, r)
    assert_selects(op(*arguments), arguments, margin=1e-5)


@SIZES
@TOKENS
@pytest.mark.parametrize("op", [select, select_reference])
def test_bf16(op, m, n, s, r):
    arguments = predictor(m, n, s, r, torch.bfloat16)
    assert_selects(op(*arguments), arguments, margin=0.05)


@TOKENS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [select, select_reference])
def test_int8_weights(op, dtype, m):
    source, _, _, bias = predictor(m, 100, 63, 16, dtype)
    down = torch.randint(-128, 128, (16, 63), dtype=torch.int8)
    up = torch.randint(-128, 128, (100, 16), dtype=torch.int8)
    arguments = (source, down, up, bias)
    scale = scores(*arguments).abs().max().item()
    assert_selects(
        op(*arguments), arguments, margin=scale * (1e-5 if dtype.itemsize == 4 else 0.02)
    )


@TOKENS
@pytest.mark.parametrize(("n", "s", "r"), [(100, 64, 16), (33, 8, 8), (1000, 1000, 232)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [select, select_reference])
def test_packed_weights(op, dtype, n, s, r, m):
    source, _, _, bias = predictor(m, n, s, r, dtype)
    down, up = (pack(torch.randint(-8, 8, shape)) for shape in ((r, s), (n, r)))
    arguments = (source, down, up, bias)
    scale = scores(*arguments).abs().max().item()
    assert_selects(
        op(*arguments), arguments, margin=scale * (1e-5 if dtype.itemsize == 4 else 0.02)
    )


@pytest.mark.parametrize("op", [select, select_reference])
def test_int8_scores_may_pass_the_range_of_fp16(op):
    down, up = (
        torch.full((16, 64), 127, dtype=torch.int8),
        torch.full((4, 16), 127, dtype=torch.int8),
    )
    score = 64 * 127 * 16 * 127.0
    bias = torch.tensor([1 - score, -1e6 - score, 1e6 - score, -2 * score])
    index, count = op(torch.ones(1, 64, dtype=torch.float16), down, up, bias)
    assert index[: int(count)].tolist() == [0, 2]


@pytest.mark.parametrize("op", [select, select_reference])
@pytest.mark.parametrize("units", [[], [0], [99], list(range(100))], ids=["0", "1", "last", "all"])
def test_counts(op, units):
    source, down, up, bias = predictor(3, 100, 63, 16)
    bias = torch.full((100,), -1e6)
    bias[units] = 1e6
    index, count = op(source, down, up, bias)
    assert index[: int(count)].tolist() == units


@pytest.mark.parametrize("op", [select, select_reference])
def test_score_of_zero_is_not_selected(op):
    _, count = op(torch.zeros(1, 8), torch.ones(2, 8), torch.ones(5, 2), torch.zeros(5))
    assert int(count) == 0


@pytest.mark.parametrize("op", [select, select_reference])
def test_nan_selects(op):
    source, down, up, bias = predictor(2, 100, 63, 16)
    bias[:] = -1e6
    bias[7] = float("nan")
    index, count = op(source, down, up, bias)
    assert index[: int(count)].tolist() == [7]
    source[1, 3] = float("nan")
    _, count = op(source, down, up, bias)
    assert int(count) == 100


@TOKENS
def test_opcheck(m):
    arguments = predictor(m, 100, 63, 16)
    torch.library.opcheck(torch.ops.dejavu.select.default, arguments)
    packed = (torch.randn(m, 64), *(torch.randint(0, 256, s).byte() for s in ((16, 32), (100, 8))))
    torch.library.opcheck(torch.ops.dejavu.select.default, (*packed, torch.randn(100)))
    strided = (torch.randn(63, m).T, *arguments[1:])
    torch.library.opcheck(torch.ops.dejavu.select.default, strided)
