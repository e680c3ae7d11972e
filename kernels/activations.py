"""The activations that a projection can end with in the same kernel: a PyTorch and a Triton form each."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ._triton import jit, tl

REFERENCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@jit
def activate(x, ACTIVATION: tl.constexpr):
    """`REFERENCE[ACTIVATION](x)` for an fp32 tile. NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    elif ACTIVATION == "relu2":
        return tl.where(x <= 0.0, 0.0, x * x)
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # tanh(y) = 2 sigmoid(2y) - 1, so 0.5 (1 + tanh(y)) is one sigmoid
        y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * y))
    else:
        return x
