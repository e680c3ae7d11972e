"""What a unit of a gated MLP adds, from four and two bits a weight."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import sketch_inputs, sketch_oracle

from dejavu_compile.kernels import (
    pack_pairs,
    sketch_score,
    sketch_score_reference,
    unpack_pairs,
)
from dejavu_compile.kernels.nibbles import unpack
from dejavu_compile.kernels.sketch import digits_of

FORMS = pytest.mark.parametrize(
    "form", [sketch_score, sketch_score_reference], ids=["op", "reference"]
)


@st.composite
def codes(draw):
    """Values of two bits, [rows, a multiple of 16 columns]."""
    rows, width = draw(st.integers(0, 5)), 16 * draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, 4, (rows, width), generator=generator, dtype=torch.int8)


@given(codes())
def test_unpacking_undoes_packing(values):
    packed = pack_pairs(values)
    assert (packed.dtype, packed.shape) == (torch.uint8, (len(values), values.shape[1] // 4))
    assert torch.equal(unpack_pairs(packed), values - 1.5)


def test_every_byte_is_four_values():
    every = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 4).contiguous()
    values = unpack_pairs(every)
    assert torch.equal(pack_pairs((values + 1.5).to(torch.int8)), every)
    assert len({tuple(row) for row in values[:, [0, 4, 8, 12]].tolist()}) == 256


def test_what_does_not_fit_is_refused():
    for value in (-1, 4):
        with pytest.raises(ValueError, match=f"0 to 3: found .*{value}"):
            pack_pairs(torch.tensor([[value] + [0] * 15]))
    with pytest.raises(ValueError, match="multiple of 16 columns: found 12"):
        pack_pairs(torch.zeros(3, 12))


@given(
    st.integers(1, 4), st.integers(1, 40), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e4]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_digits_are_x_in_base_256(m, d, seed, size, dtype):
    x = (torch.randn(m, d, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    digits, step, sums = digits_of(x)
    weights = 256.0 ** torch.arange(digits.shape[1])[:, None]
    whole = (digits.double() * weights).sum(1)
    below = 2.0**-20 if dtype is torch.float32 else 2.0**-13
    assert (step <= below * x.float().abs().amax(1).clamp(min=1e-30) * 1.001).all()
    # Half a step, and what fp32 loses of 20 bits
    assert ((whole * step[:, None] - x.double()).abs() <= 0.6 * step[:, None]).all()
    assert torch.allclose(sums.double(), whole.sum(1), rtol=1e-5, atol=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_is_never_finite_where_x_is_not(value):
    x = torch.ones(2, 32)
    x[1, 7] = value
    _, step, _ = digits_of(x)
    assert step.isfinite().tolist() == [True, False]


@FORMS
@given(
    st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 99),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["silu", "relu", "identity"]),
)  # fmt: skip
def test_equals_the_products_in_float64(form, n, width, m, seed, dtype, activation):
    inputs = (*sketch_inputs(n, 16 * width, m, dtype, seed), activation)
    got, exact = form(*inputs), sketch_oracle(*inputs)
    assert (got.dtype, got.shape) == (torch.float32, (m, n))
    # Of less than its smallest normal number fp32 has no five digits: a silu of -130 is 0 there, and 1e-54 here.
    least = torch.finfo(torch.float32).tiny
    assert ((got - exact).abs() <= 1e-5 * exact.abs().max() + least).all()


@FORMS
def test_where_nothing_is_known_of_the_other_factor_the_gate_counts(form):
    x, gate, up, numbers = sketch_inputs(20, 32, 2)
    numbers[2:4], numbers[4] = 0, 4.0
    known = F.silu(F.linear(x, unpack(gate).float()) * numbers[0] + numbers[1])
    assert torch.allclose(form(x, gate, up, numbers, "silu"), 2 * known.abs(), atol=1e-4)


@FORMS
def test_nan_stays_visible(form):
    x, *rest = sketch_inputs(20, 32, 2)
    x[1, 5] = float("nan")
    got = form(x, *rest, "silu").isnan()
    assert got[1].all() and not got[0].any()


def test_another_width_is_refused():
    x, gate, up, numbers = sketch_inputs(5, 32, 1)
    with pytest.raises(ValueError, match=r"found \(\(5, 16\), \(5, 7\), \(5, 5\)\)"):
        sketch_score(x, gate, up[:, 1:], numbers, "silu")


def test_opcheck():
    packed = sketch_inputs(5, 32, 1)[2]
    torch.library.opcheck(torch.ops.dejavu.unpack_pairs.default, (packed,))
    for m in (1, 3):
        x, *rest = sketch_inputs(9, 32, m)
        torch.library.opcheck(torch.ops.dejavu.sketch_score.default, (x, *rest, "silu"))
        x = x.mT.contiguous().mT
        torch.library.opcheck(torch.ops.dejavu.sketch_score.default, (x, *rest, "silu"))


def test_compiles():
    inputs = sketch_inputs(30, 32, 2, torch.bfloat16)
    compiled = torch.compile(lambda *args: sketch_score(*args, "silu") + 1, fullgraph=True)
    assert torch.equal(compiled(*inputs), sketch_score(*inputs, "silu") + 1)
