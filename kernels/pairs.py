"""Weights of two bits: four in a byte, -1.5, -0.5, 0.5 or 1.5 steps each. (docs/predictors.md, "What a gate doesn't know")

A row of w columns lies in w / 4 bytes. Byte i holds columns i, i + w / 4, i + w / 2 and i + 3 w / 4 from its low
bits up, as 0 to 3, so that a kernel which reads bytes in order meets each quarter of a vector in order too.
"""

import torch
from torch import Tensor
from torch.library import triton_op

# A 32-bit word holds four columns of each quarter.
MULTIPLE = 16
MIDDLE = 1.5


def pack_pairs(codes: Tensor) -> Tensor:
    """Integers [rows, columns] of 0 to 3, as uint8 [rows, columns / 4]. Columns are a multiple of 16."""
    if codes.shape[1] % MULTIPLE:
        raise ValueError(
            f"rows of two-bit values have a multiple of {MULTIPLE} columns: found {codes.shape[1]}"
        )
    if codes.numel() and not 0 <= codes.min() <= codes.max() <= 3:
        raise ValueError(
            f"two bits hold 0 to 3: found {codes.min().item()} to {codes.max().item()}"
        )
    a, b, c, d = codes.to(torch.uint8).chunk(4, dim=1)
    return a | (b << 2) | (c << 4) | (d << 6)


@triton_op("dejavu::unpack_pairs", mutates_args=())
def unpack_pairs(packed: Tensor) -> Tensor:
    """The weights in steps, fp32 [rows, columns]. An op, so that graphs hold it; compilers look into it."""
    codes = torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    return codes.float() - MIDDLE
