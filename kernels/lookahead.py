"""Issue a predictor on a side stream: `select_begin` launches it there, `select_join` waits for it.

Inductor emits no stream contexts, and CUDA graph trees can't capture allocations made on a side stream.
So both are opaque ops: everything is allocated on the current stream and only launched on the other,
and the join also takes what the side stream still reads, so that its memory isn't used again before.

A join waits for its own predictor, by an event that its begin left under the ticket that they share. To wait
for the stream would be to wait for the next layer's predictor too, which was issued just before.
"""

from functools import cache

import torch
from torch import Tensor
from torch.library import custom_op

from ._triton import LaunchedEarly
from .select import launch_select, scratch, select_cpu, select_kernels
from .selection import fake_selection


@cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


@cache
def _done(device: torch.device, ticket: int) -> "torch.cuda.Event":
    """Recorded when the predictor with this ticket has been launched."""
    return torch.cuda.Event()


@custom_op("dejavu::select_begin", mutates_args=())
def select_begin(
    source: Tensor, down: Tensor, up: Tensor, bias: Tensor, ticket: int, early: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Start `select` on the side stream. Returns index, count and scratch, not to be read before the join.

    `ticket`: any number that no other predictor has which is under way on this device. `early`: the second launch is (the device has to
    know that). The first waits for all that is on the current stream, so weights are there. The last neither is nor lets what comes
    next start early: in a CUDA graph a join is an edge to a kernel that may read the selection before it waits (`passes/early.py`).
    """
    if not source.is_cuda:
        index, count = select_cpu(source, down, up, bias)
        return index, count, source.new_empty(0), index.new_empty(0), index.new_empty(0)
    kernels = select_kernels(source, down, up)
    if early:
        kernels = (kernels[0], LaunchedEarly(kernels[1]), kernels[2])
    if not source.is_contiguous():
        # A contiguous copy would be freed here, while the side stream still reads it: stay in line.
        results = launch_select(kernels, source, down, up, bias)
        _done(source.device, ticket).record()
        return results
    current, side = torch.cuda.current_stream(source.device), _side_stream(source.device)
    launch = _Deferred(kernels)
    results = launch_select(launch.kernels, source, down, up, bias)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        launch.run()
        _done(source.device, ticket).record()
    return results


class _Deferred:
    """Collects launches, so that all memory is allocated before the stream changes."""

    def __init__(self, kernels) -> None:
        self._calls = []
        self.kernels = tuple(_Recorded(kernel, self._calls) for kernel in kernels)

    def run(self) -> None:
        for call in self._calls:
            call()


class _Recorded:
    def __init__(self, kernel, calls: list) -> None:
        self._kernel, self._calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self._calls.append(
            lambda: self._kernel[grid](*args, **kwargs)
        )


@select_begin.register_fake
def _(source: Tensor, down: Tensor, up: Tensor, bias: Tensor, ticket: int, early: bool = False):
    index, count = fake_selection(source, up.shape[0])
    if not source.is_cuda:
        return index, count, source.new_empty(0), index.new_empty(0), index.new_empty(0)
    return index, count, *scratch(source, down, up)


@custom_op("dejavu::select_join", mutates_args=("index", "count"))
def select_join(
    index: Tensor, count: Tensor, scratch: list[Tensor], source: Tensor, ticket: int
) -> None:
    """Make the current stream wait for the predictor that was begun with this ticket.

    Moves no data; says that it writes the selection, so that nothing reads it earlier.
    """
    if source.is_cuda:
        torch.cuda.current_stream(source.device).wait_event(_done(source.device, ticket))
