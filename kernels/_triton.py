"""Triton where it exists. Without it (CPU-only wheels, macOS) every op still runs on the CPU."""

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from torch.library import wrap_triton

    HAS_TRITON = True
    jit = triton.jit
except ImportError:
    HAS_TRITON = False

    class tl:
        """What kernel signatures name; bodies are never run."""

        constexpr = None

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        """Leaves a kernel's source uncompiled: it can't be launched."""
        return function

    def wrap_triton(kernel: Any) -> Any:
        """Never reached on the CPU; says what is missing on a GPU."""
        raise ImportError("dejavu's GPU kernels need triton: pip install triton")


def empty(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Every launcher allocates its outputs here, so that a test can fill them with NaN first."""
    return torch.empty(shape, device=like.device, dtype=dtype or like.dtype)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


# Multiprocessors to spread work over: an H100 or H200 has 132, an A100 108. Grids are a multiple of it.
PROCESSORS = 132
