"""Two signed values of four bits in a byte: at equal bytes, a predictor of twice the rank; gates in a sketch. (docs/predictors.md)

A row of w columns lies in w / 2 bytes. Byte i holds column i in its low bits and column i + w / 2 in its high
bits, so that a kernel which reads bytes in order meets each half of a vector in order too. The dtype of a packed
matrix is uint8, which no other has.
"""

import torch
from torch import Tensor
from torch.library import triton_op

# A 32-bit word holds four columns of each half.
MULTIPLE = 8


def pack(values: Tensor) -> Tensor:
    """Integers [rows, columns] of -8 to 7, as uint8 [rows, columns / 2]. Columns are a multiple of 8."""
    if values.shape[1] % MULTIPLE:
        raise ValueError(
            f"rows of four-bit values have a multiple of {MULTIPLE} columns: found {values.shape[1]}"
        )
    if values.numel() and not -8 <= values.min() <= values.max() <= 7:
        raise ValueError(
            f"four bits hold -8 to 7: found {values.min().item()} to {values.max().item()}"
        )
    low, high = values.to(torch.int8).view(torch.uint8).chunk(2, dim=1)
    return (low & 15) | (high << 4)


@triton_op("dejavu::unpack", mutates_args=())
def unpack(packed: Tensor) -> Tensor:
    """What was packed, as int8 [rows, columns]. An op, so that graphs hold it; compilers look into it."""
    both = torch.cat([packed & 15, packed >> 4], dim=1)
    # Two's complement of four bits: flipping its sign bit adds 8.
    return (both ^ 8).to(torch.int8) - 8


def is_packed(matrix: Tensor) -> bool:
    """Whether its bytes hold two columns each."""
    return matrix.dtype is torch.uint8


def unpacked(matrix: Tensor) -> Tensor:
    """The matrix with a column an element, whatever it is stored as."""
    return unpack(matrix) if is_packed(matrix) else matrix


def columns(matrix: Tensor) -> int:
    """How many columns it has, packed or not."""
    return matrix.shape[1] * (2 if is_packed(matrix) else 1)
