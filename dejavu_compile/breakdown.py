"""Where a decode step's time goes on a GPU: each kernel against the bytes that it must read, and the gaps.

Kernels overlap, on two streams or since one may start while the one before drains. So a kernel has two times: how long
it ran, and its own, by which it moved the end of what ran before it. Own times and gaps add up to the step.

Bytes come from the compiled graph (`step_bytes`). A Triton kernel of ours has the name of its function in a profile.
The products and attentions of a library have names of their own: they are told apart by their order, if there are as
many launches as the graph has products and each shape of weight always meets the same kernel. What neither way
explains has no bytes here. A kernel that Inductor fused reads activations, and parameters too small to matter.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .step_bytes import ATTENTION, PRODUCT, Read, total

_OF_LIBRARY = {
    PRODUCT: re.compile(r"nvjet|gemm|gemv|cutlass|cublas|xmma|^triton_tem_|^triton_(red|per)_\w*_(add)?mm_"),
    ATTENTION: re.compile(r"^(?!triton_).*(flash|fmha|sdpa|attention)"),
}  # fmt: skip
# They add up what another launch left in parts, or only prepare for a product
_BESIDE = re.compile(r"splitK_?reduce|combine|^triton_poi_", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Launch:
    """One piece of work of the GPU, in microseconds from the first."""

    kernel: str
    stream: int
    start_us: float
    us: float


@dataclass(slots=True)
class KernelRow:
    """All launches of one kernel in a step, together. bytes None: not known which of the step's are its.

    `gap_us`: nothing ran before it that long. `share_of_copy`: its bytes at the copy bandwidth, as a share of `us`.
    `above_floor_us`: its own time less that of its bytes; what it hides behind others is negative.
    """

    kernel: str
    launches: float = 0.0
    us: float = 0.0
    own_us: float = 0.0
    gap_us: float = 0.0
    bytes: int | None = None
    share_of_copy: float | None = None
    above_floor_us: float | None = None


def trace(call: Callable[[], Any], calls: int = 10) -> list[list[Launch]]:
    """What the GPU does in each of `calls` calls that are queued one behind the other, by start.

    One list for all where they don't do alike.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    begin = events[0].time_range.start
    return in_steps(
        [
            Launch(e.name, e.device_resource_id, e.time_range.start - begin, e.time_range.elapsed_us())
            for e in events
        ],
        calls,
    )  # fmt: skip


def in_steps(launches: list[Launch], calls: int) -> list[list[Launch]]:
    """Launches by start, apart by call if each made the same ones, else in one list."""
    each = len(launches) // calls
    steps = [launches[i : i + each] for i in range(0, len(launches), each)] if each else []
    if len(steps) == calls and len({frozenset(_names(s).items()) for s in steps}) == 1:
        return steps
    return [launches]


def _names(step: list[Launch]) -> Counter[str]:
    return Counter(launch.kernel for launch in step)


def breakdown(
    steps: list[list[Launch]], calls: int, reads: list[Read], copy_bandwidth: float, step_us: float
) -> dict[str, Any]:
    """The rows by kernel, longest own time first, their sums against a step of `step_us`, and one step in order.

    `steps` from `trace` of that many `calls`. The first waits for the host, and counts only where it is the only one.
    """
    rows: dict[str, KernelRow] = defaultdict(lambda: KernelRow(""))
    counted = steps[1:] or steps
    number = calls if len(steps) == 1 else len(counted)
    end, between = 0.0, 0.0
    for step in steps:
        for launch in step:
            gap = max(0.0, launch.start_us - end)
            own = max(0.0, launch.start_us + launch.us - max(end, launch.start_us))
            end = max(end, launch.start_us + launch.us)
            if step is steps[0] and len(steps) > 1:
                continue
            if launch is step[0]:
                between += gap / number
                gap = 0.0
            row = rows[launch.kernel]
            row.kernel = launch.kernel
            row.launches += 1 / number
            row.us += launch.us / number
            row.own_us += own / number
            row.gap_us += gap / number
    for kernel, num_bytes in attributed(counted[0], reads).items():
        row = rows[kernel]
        row.bytes = num_bytes
        floor_us = 1e6 * num_bytes / copy_bandwidth
        row.share_of_copy, row.above_floor_us = floor_us / row.us, row.own_us - floor_us
    kernels = sorted(rows.values(), key=lambda row: -row.own_us)
    known, needed = sum(row.bytes or 0 for row in kernels), total(reads)
    summary = {
        "step_us": step_us, "own_us": sum(r.own_us for r in kernels), "between_steps_us": between,
        "gaps_us": sum(r.gap_us for r in kernels), "launches": sum(r.launches for r in kernels),
        "without_bytes_us": sum(r.own_us for r in kernels if r.bytes is None),
        "bytes": needed, "bytes_of_kernels": known,
        "floor_us": 1e6 * needed / copy_bandwidth if needed is not None else None,
    }  # fmt: skip
    shown = counted[len(counted) // 2]
    timeline = [
        {"kernel": x.kernel[:100], "stream": x.stream, "us": round(x.us, 2),
         "start_us": round(x.start_us - shown[0].start_us, 2)}
        for x in shown
    ]  # fmt: skip
    by_kernel = [{**asdict(row), "kernel": row.kernel[:100]} for row in kernels]
    return {"kernels": by_kernel, "sum": summary, "timeline": timeline}


def attributed(step: list[Launch], reads: list[Read]) -> dict[str, int]:
    """The bytes that all launches of a kernel must read, by its name in the profile, where that is certain."""
    functions = {read.kernel for read in reads}
    found: dict[str, int] = {}
    for function in functions:
        wanted = [read for read in reads if read.kernel == function]
        launched = [launch.kernel for launch in step if _runs(launch.kernel, function, functions)]
        found |= _in_order(launched, wanted) or _without_products(launched, wanted)
    return found


def _runs(kernel: str, function: str, functions: set[str]) -> bool:
    """Whether a kernel of the profile is `function`, one of those that the step's graph has."""
    own = re.sub(r"_\d+$", "", kernel).replace(
        "_int8", ""
    )  # `inner_int8_kernel_3` is an `inner_kernel`
    if function not in _OF_LIBRARY or own in functions:
        return own == function
    return bool(_OF_LIBRARY[function].search(kernel)) and not _BESIDE.search(kernel)


def _without_products(kernels: list[str], reads: list[Read]) -> dict[str, int]:
    """The order of the weights alone: a product of activations, as of a rotary embedding's angles, may run any time.

    It is told by how often it runs, if only leaving out that one kernel lets the others be in order.
    """
    weights = [read for read in reads if read.op != "product"]
    often = len(reads) - len(weights)
    names = {name for name, launches in Counter(kernels).items() if launches == often}
    fits = [_in_order([k for k in kernels if k != name], weights) for name in names]
    fits += [_in_order(kernels, weights)] if often else []
    fits = [fit for fit in fits if fit]
    return fits[0] if len(fits) == 1 else {}


def _in_order(kernels: list[str], reads: list[Read]) -> dict[str, int]:
    """Each launch with the read in its place; nothing if that can't be."""
    if len(kernels) != len(reads):
        return {}
    of_shape: dict[tuple[int, ...], set[str]] = defaultdict(set)
    sizes: dict[str, list[int | None]] = defaultdict(list)
    for kernel, read in zip(kernels, reads, strict=True):
        of_shape[read.shape].add(kernel)
        sizes[kernel].append(read.num_bytes)
    if any(len(names) > 1 for names in of_shape.values()):
        return {}
    return {kernel: sum(known) for kernel, known in sizes.items() if None not in known}


def table(parts: dict[str, Any], most: int = 20) -> str:
    """The rows as text, and their sum."""
    lines = [
        f"    {'own us':>8}{'us':>8}{'n':>6}{'MB':>9}{'of copy':>9}{'above':>8}{'gap':>7}  kernel"
    ]
    for k in parts["kernels"][:most]:
        size = f"{'-':>9}{'-':>9}{'-':>8}"
        if k["bytes"] is not None:
            size = f"{k['bytes'] / 1e6:9.2f}{k['share_of_copy']:9.0%}{k['above_floor_us']:8.1f}"
        lines.append(
            f"    {k['own_us']:8.1f}{k['us']:8.1f}{k['launches']:6.0f}{size}{k['gap_us']:7.1f}  {k['kernel'][:60]}"
        )
    s = parts["sum"]
    total = (
        "not known"
        if s["bytes"] is None
        else f"{s['bytes'] / 1e6:.1f} MB, {s['floor_us']:.1f} us at copy speed"
    )
    lines.append(
        f"    {s['own_us']:8.1f} us of kernels ({s['without_bytes_us']:.1f} of them without known bytes) + "
        f"{s['gaps_us']:.1f} of gaps + {s['between_steps_us']:.1f} between steps; a step takes {s['step_us']:.1f}\n"
        f"    must read: {total}; {s['bytes_of_kernels'] / 1e6:.1f} MB in the rows above"
    )  # fmt: skip
    return "\n".join(lines)
