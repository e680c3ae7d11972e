"""Timing a decode step: what `benchmarks/`, `dejavu bench` and the demo share."""

import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ._compat import compile_counters
from .breakdown import breakdown as by_kernel
from .breakdown import trace
from .decode_step import DecodeStep, Share
from .errors import OptionError
from .evaluate import masked
from .step_bytes import capture_step, total


def time_us(
    call: Callable[[], Any],
    repeats: int,
    *,
    warmup: int = 3,
    together: int = 1,
    prepare: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """p20, p50 and p80 of one call in microseconds; on CUDA by events around `together` calls in a row, behind one more.

    Decoding queues one step behind the other, so the host's share shows only where it is the longer one: what the first
    call of a sample waits for the host isn't counted. `prepare` runs before each sample, outside its time.
    """
    for _ in range(warmup):
        call()
    samples = []
    for _ in range(repeats):
        if prepare is not None:
            prepare()
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            call()  # the GPU is busy while the host gets ahead of it
            begin.record()
            for _ in range(together):
                call()
            end.record()
            torch.cuda.synchronize()
            samples.append(1e3 * begin.elapsed_time(end) / together)
        else:
            start = time.perf_counter()
            call()
            samples.append(1e6 * (time.perf_counter() - start))
    quantiles = statistics.quantiles(samples, n=10)
    return {"p20": quantiles[1], "p50": statistics.median(samples), "p80": quantiles[7]}


@cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB on this GPU: what a byte floor is reckoned with.

    4.27e12 on an H200, some 3.0e12 on an H100.
    """
    source = torch.zeros(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = time_us(lambda: target.copy_(source), 10)["p50"]
    return 2 * source.numel() / us * 1e6


STEPS = 16  # from the middle of the cache on: what runs before it is put back there
TOGETHER = 10  # steps a sample on CUDA, queued behind each other


def measure(
    model: nn.Module,
    provider: str,
    length: int,
    repeats: int,
    expected: torch.Tensor,
    batch: int = 1,
    breakdown: bool = False,
    shares: dict[int, Share] | None = None,
    otherwise: Callable[[], AbstractContextManager[None]] = nullcontext,
    **compile_args: Any,
) -> dict[str, Any]:
    """Compile, check against the oracle, time, and count recompiles and skipped CUDA graphs.

    `otherwise`: a context in which the step before the checked one runs, with other selections: what reads the last step's is
    wrong then. `breakdown`: also what the compiled graph must read, given the oracle's `shares`, the plan's decisions, and on
    a GPU the time by kernel.
    """
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    assert length - length // 2 >= STEPS, "the cache is too short for so many steps"
    started = time.monotonic()
    step = DecodeStep(model, torch.compile(model.forward, **compile_args), length, batch)
    for _ in range(4):
        step.reset()
        step()
        step()  # a cache that counts in Python has its second graph here
    with otherwise():
        step.reset()
        step()
    step.reset()
    logits = step().float().clone()
    compile_s = time.monotonic() - started
    error = ((logits - expected).norm() / expected.norm()).item()
    before = compile_counters()
    step.reset()
    together = TOGETHER if torch.cuda.is_available() else 1
    times = time_us(step, repeats, together=together, prepare=step.reset)
    after = compile_counters()
    row = {
        "provider": provider, "error": error, "compile_s": compile_s, **times,
        "recompiles": after["graphs"] - before["graphs"], "cudagraph_skips": after["cudagraph_skips"],
    }  # fmt: skip
    steps = None
    if breakdown and torch.cuda.is_available():
        step.reset()
        steps = trace(step, TOGETHER)
    if breakdown:
        captured = capture_step(step, model.forward, **compile_args)
        reads = captured.reads(shares)
        row |= {"read_bytes": total(reads), "sites": captured.sites}
        if steps is not None:
            row |= by_kernel(steps, TOGETHER, reads, copy_bandwidth(), times["p50"])
    return row


def compare_steps(
    model: nn.Module, length: int, batch: int = 1, repeats: int = 20
) -> list[dict[str, Any]]:
    """A decode step of `model` dense by Inductor, then by dejavu with what is attached: rows of `measure`.

    Errors: Inductor's against the eager step, dejavu's against the masked graph run without Inductor, which makes the
    same selections. Raises OptionError for a cache too short for the steps, or longer than the model's context.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or length
    if not 2 * STEPS <= length <= longest:
        raise OptionError(
            "the cache's length doesn't fit",
            found=f"{length} slots for {STEPS} steps that begin in its middle",
            expected=f"{2 * STEPS} to {longest}",
            fix="another length",
        )
    options = {"triton.cudagraphs": True} if torch.cuda.is_available() else {}
    rows = []
    for provider, reference, backend in (
        ("dense Inductor", model.forward, "inductor"),
        ("dejavu", masked(model), "dejavu"),
    ):
        torch.compiler.reset()
        expected = DecodeStep(model, reference, length, batch)().float().clone()
        rows.append(
            measure(model, provider, length, repeats, expected, batch, backend=backend, options=options)
        )  # fmt: skip
    return rows


def environment() -> dict[str, str]:
    """Machine, versions and commit, for the head of every result."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "device": device or platform.machine(),
        "cores": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit or "unknown",
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON with the environment first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"environment": environment(), **result}, indent=1), encoding="utf-8"
    )
