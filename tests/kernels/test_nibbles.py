"""Four-bit values, two a byte."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dejavu_compile.kernels.nibbles import columns, is_packed, pack, unpack, unpacked


@st.composite
def matrices(draw):
    """Values of four bits, [rows, a multiple of 8 columns]."""
    rows, width = draw(st.integers(0, 5)), 8 * draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, high = sorted(draw(st.tuples(st.integers(-8, 7), st.integers(-8, 7))))
    return torch.randint(low, high + 1, (rows, width), generator=generator, dtype=torch.int8)


@given(matrices())
def test_unpacking_undoes_packing(values):
    packed = pack(values)
    assert (packed.dtype, packed.shape) == (torch.uint8, (len(values), values.shape[1] // 2))
    assert torch.equal(unpack(packed), values)
    assert torch.equal(pack(unpack(packed)), packed)


@given(matrices())
def test_both_forms_say_how_many_columns_they_have(values):
    packed = pack(values)
    assert is_packed(packed) and not is_packed(values)
    assert columns(packed) == columns(values) == values.shape[1]
    assert torch.equal(unpacked(packed), unpacked(values))


def test_every_byte_is_a_pair():
    every = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 4)
    pairs = {tuple(row) for row in unpack(every)[:, [0, 4]].tolist()}
    assert pairs == {(low, high) for low in range(-8, 8) for high in range(-8, 8)}
    assert torch.equal(pack(unpack(every)), every)


def test_what_does_not_fit_is_refused():
    for value in (-9, 8):
        with pytest.raises(ValueError, match=f"-8 to 7: found .*{value}"):
            pack(torch.tensor([[value] + [0] * 7]))
    with pytest.raises(ValueError, match="multiple of 8 columns: found 12"):
        pack(torch.zeros(3, 12))


def test_opcheck():
    packed = torch.randint(0, 256, (5, 12), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.dejavu.unpack.default, (packed,))
