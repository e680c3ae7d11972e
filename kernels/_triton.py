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


def present(tensor: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """What is passed where a kernel may do without `tensor`: a weight, or anything that no kernel has just computed.

    Of an activation Inductor writes a copy for each argument that it is passed as: 14 for one norm, in the kernel that makes it.
    """
    return weight if tensor is None else tensor


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


# Programmatic dependent launch, the EARLY of every kernel: the compiler decides (`passes/early.py`). 0 is without, else a sum of
EARLY = 1
HEADS_START = 2  # kernels that skip heads let the next one start before they wait, as most do
ROWS_START = 4  # gathered rows do too, and read their selection before they wait


class LaunchedEarly:
    """A kernel whose programs start while the kernel before drains (`start_next`): it reads nothing before it waits that the one
    before could have written."""

    def __init__(self, kernel: Any, mode: int = EARLY | HEADS_START) -> None:
        self.kernel, self.mode = kernel, mode

    def __getitem__(self, grid: tuple) -> Callable[..., Any]:
        run, early = self.kernel[grid], {"EARLY": self.mode, "launch_pdl": True}
        return lambda *args, **kwargs: run(*args, **{**kwargs, **early})


@jit
def start_next(EARLY: tl.constexpr, FLAG: tl.constexpr = 0):
    """Let the next kernel's programs start, where there is room, as soon as all of this one's have.

    Said before `wait_for_previous`, three and more kernels overlap: weights arrive while small kernels run. Said behind
    it, the next kernel knows that all before this one have ended, and before it waits may read what they wrote: a
    selection. Not by the L1 cache, which may hold older values. With a FLAG it counts only where EARLY has it.
    """
    if EARLY and (EARLY & FLAG) == FLAG:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait_for_previous(EARLY: tl.constexpr):
    """Wait until the kernel before has ended, and with it all before that: every program of every kernel waits."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@jit
def is_last(arrived_ptr, programs):
    """Whether this is the last of `programs` programs to get here; it leaves the counter at zero.

    What the others stored before is visible then, to loads that pass by the L1 cache (".cg").
    """
    tl.debug_barrier()  # the stores of all warps come before the one atomic
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last


@jit
def add_up(
    part_ptr, out_ptr, column, splits, tokens, d, TILE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[t, column] = sum over s of part[s, t, column], always in the same order."""
    s = tl.arange(0, TILE)
    for token in range(tokens):
        total = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
        for start in range(0, splits, TILE):
            row = ((start + s) * tokens + token).to(tl.int64) * d
            total += tl.load(
                part_ptr + row[:, None] + column[None, :],
                mask=((start + s) < splits)[:, None] & (column < d)[None, :],
                other=0.0, cache_modifier=".cg",
            )  # fmt: skip
        tl.store(out_ptr + token * d + column, tl.sum(total, axis=0), mask=column < d)


# Elements of parts that the kernel behind adds up faster than the last program of this one
MOST_LEFT = 8 * 4096


def leaves_parts(splits: int, tokens: int, d: int) -> bool:
    """Whether a sum of one token leaves its parts for what comes next to add up, in the compiler's hands: a norm, mostly.

    It reads them in its own launch: no program waits for others, and one way through memory less. (H200, d 4096: 1.2 us a
    sum; of d 9216 in seven parts the norm, one program, loses more)
    """
    return tokens == 1 and splits > 1 and splits * d <= MOST_LEFT


def added_up(parts: torch.Tensor) -> torch.Tensor:
    """The sum of parts [splits, m, d], one or more, always in the same order."""
    return sum(parts.unbind()[1:], start=parts.select(0, 0))


def check_arrived(arrived: torch.Tensor, needed: int) -> None:
    """Raise ValueError unless there are counters enough, one for each sum that programs share."""
    if arrived.numel() < needed or arrived.dtype is not torch.int32:
        raise ValueError(
            f"{needed} int32 zeros are needed to count arrivals: found {arrived.numel()} of {arrived.dtype}"
        )


# Multiprocessors to spread work over: an H100 or H200 has 132, an A100 108. Grids are a multiple of it.
PROCESSORS = 132
