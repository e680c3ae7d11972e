"""Block sizes for this machine: searched once, kept on disk, looked up whenever a graph is compiled.

A launch runs with what a search on this machine chose for it, else with its kernel's rule, which is made of
measurements on an H200 and an H100 (`*_config` in kernels/). A search (option `dejavu.autotune`) times a few
candidates, in a CUDA graph over more weights than the L2 cache holds, and takes another than the rule only if
it computes the same and is faster twice by more than MARGIN.

Two configurations may add in another order, and round otherwise. So a search's result belongs to what is stable on a
machine: once found it is used by every later compile, with the option or without, until its file is deleted.
"""

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dejavu_compile.kernels
from dejavu_compile.kernels.tuning import Config

from ._compat import inductor_cache_dir, unset_fake_temporarily
from .launches import Launch, in_a_step, made_up

log = logging.getLogger(__name__)

FORMAT = 1  # of the file
BUDGET_S = 20.0  # of one graph's search
MARGIN = 0.03
REPLAYS = 20

Time = Callable[[Config], float | None]
"""Microseconds of a launch with a configuration; None where it doesn't fit the chip, or computes something else."""


class Origin(StrEnum):
    """Where a configuration comes from."""

    SEARCH = "search"
    RULE = "rule"


@dataclass(frozen=True, slots=True)
class Choice:
    """What a launch runs with."""

    launch: Launch
    config: Config
    origin: Origin

    @property
    def is_rule(self) -> bool:
        """Also where a search found nothing better."""
        return self.config == self.launch.candidates[0]


@dataclass(frozen=True, slots=True)
class Timed:
    """The result of one search: the best configuration, its time and that of the rule, and how many were tried."""

    config: Config
    us: float
    rule_us: float
    tried: int


# --- what was found, on disk ------------------------------------------------------------------------------


class ConfigFile:
    """What searches found: machine -> launch -> result, as JSON.

    A file that can't be read counts as empty, and one that can't be written is kept in memory; either is logged once.
    What is there stays: of two processes that search at once, both use what was written first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own: dict[str, dict[str, Any]] = {}
        self._said: set[str] = set()

    def _warn_once(self, message: str, error: Exception) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning(message, self.path, error)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            machines = content["machines"] if content["format"] == FORMAT else {}
            return {name: dict(entries) for name, entries in machines.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self._warn_once("%s can't be read, block sizes are those of the rules: %r", error)
            return {}

    def entries(self, machine: str) -> dict[str, Any]:
        """Launch -> result, not checked."""
        return {**self._own.get(machine, {}), **self._read().get(machine, {})}

    def add(self, machine: str, found: Mapping[Launch, Timed]) -> None:
        """Keep results, for this process at least, but for launches that have one."""
        machines = self._read()
        entries = self.entries(machine)
        new = {
            launch.name: asdict(timed)
            for launch, timed in found.items()
            if _known(launch, entries) is None
        }
        machines[machine] = self._own[machine] = {**entries, **new}
        text = json.dumps({"format": FORMAT, "machines": machines}, indent=1)
        part = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            self._warn_once("%s can't be written, block sizes are searched again: %r", error)


def _known(launch: Launch, entries: Mapping[str, Any]) -> Config | None:
    """The configuration that was found for a launch, if it is one of its candidates still."""
    entry, candidates = entries.get(launch.name), launch.candidates
    config = entry.get("config") if isinstance(entry, dict) else None
    return candidates[candidates.index(config)] if config in candidates else None


@cache
def _file_at(path: Path) -> ConfigFile:
    return ConfigFile(path)


def config_file() -> ConfigFile:
    """Beside Inductor's own results on disk."""
    return _file_at(Path(inductor_cache_dir()) / "dejavu" / f"block_sizes-{FORMAT}.json")


def can_search(device: torch.device) -> bool:
    """Whether our Triton kernels run there."""
    return device.type == "cuda"


@cache
def machine(device: torch.device) -> str:
    """What a result is good for: this GPU, this compiler, these kernels."""
    import triton

    digest = hashlib.sha256()
    for file in sorted(Path(dejavu_compile.kernels.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return f"{name} sm_{major}{minor} triton {triton.__version__} kernels {digest.hexdigest()[:12]}"  # fmt: skip


# --- look-up ----------------------------------------------------------------------------------------------


def look_up(launches: Iterable[Launch], machine: str, file: ConfigFile) -> tuple[Choice, ...]:
    """What each launch runs with: a search's result, if it is one of its candidates still, else the rule."""
    entries = file.entries(machine)
    choices = []
    for launch in launches:
        config = _known(launch, entries)
        origin = Origin.RULE if config is None else Origin.SEARCH
        choices.append(Choice(launch, config or launch.candidates[0], origin))
    return tuple(choices)


def in_table(choices: Iterable[Choice]) -> dict[str, Config]:
    """What launchers don't get by their rules: key -> configuration, to put in force and into cache keys."""
    return {c.launch.key: c.config for c in choices if not c.is_rule}


def block_sizes(launches: tuple[Launch, ...], search: bool) -> tuple[Choice, ...]:
    """What the launches of one graph run with. `search`: first look for what isn't known yet."""
    if not launches or not can_search(launches[0].device):
        return ()
    here, file = machine(launches[0].device), config_file()
    choices = look_up(launches, here, file)
    missing = [choice.launch for choice in choices if choice.origin is Origin.RULE]
    if search and missing:
        with unset_fake_temporarily(), torch.no_grad():
            found = find_best(missing, GraphTimer, BUDGET_S)
        file.add(here, found)
        choices = look_up(launches, here, file)
    for choice in choices:
        log.debug("%s: %s, by %s", choice.launch.name, choice.config, choice.origin)
    log.info("block sizes of %d kinds of launch by search, %d by rule", *_by_origin(choices))
    return choices


def _by_origin(choices: Iterable[Choice]) -> tuple[int, int]:
    origins = [choice.origin for choice in choices]
    return origins.count(Origin.SEARCH), origins.count(Origin.RULE)


# --- search -----------------------------------------------------------------------------------------------


class _OutOfTimeError(Exception):
    """Ends a search. Never leaves this module."""


def find_best(
    launches: Iterable[Launch],
    timer: Callable[[Launch], Time],
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Launch, Timed]:
    """Search each launch, those that read most of a step first.

    Where time is up before all candidates of a launch are timed it has no result: what is kept never depends on how
    busy the machine was.
    """
    ordered = sorted(launches, key=lambda launch: -launch.count * launch.read_bytes)
    start, found = clock(), {}
    try:
        for launch in ordered:
            timed = _best(launch, timer, lambda: clock() - start > budget_s)
            if timed is not None:
                found[launch] = timed
                log.info("searched %s: %.2f us by rule, %.2f with %s", launch.name, timed.rule_us, timed.us, timed.config)  # fmt: skip
    except _OutOfTimeError:
        left = [launch.name for launch in ordered if launch not in found]
        log.warning(
            "the search for block sizes stopped after %.0f s; these stay with the rule until a next one: %s",
            budget_s, "; ".join(left),
        )  # fmt: skip
    log.info("searched %d of %d kinds of launch in %.1f s", len(found), len(ordered), clock() - start)  # fmt: skip
    return found


def _best(
    launch: Launch, timer: Callable[[Launch], Time], is_over: Callable[[], bool]
) -> Timed | None:
    """None where the rule itself can't be timed: memory is full, say."""
    if is_over():
        raise _OutOfTimeError
    rule, *others = launch.candidates
    try:
        time_us = timer(launch)
        rule_us = time_us(rule)
        times = []
        for config in others:
            if is_over():
                raise _OutOfTimeError
            times.append((time_us(config), config))
    except torch.OutOfMemoryError as error:
        log.info("%s stays with the rule: %s", launch.name, error)
        return None
    if rule_us is None:
        return None
    fit = [(us, config) for us, config in times if us is not None]
    us, best = min(fit, key=lambda pair: pair[0], default=(rule_us, rule))
    if us < (1 - MARGIN) * rule_us:
        # Once more, one after the other: clocks and neighbours change.
        rule_us, us = time_us(rule) or rule_us, time_us(best) or rule_us
    if us >= (1 - MARGIN) * rule_us:
        us, best = rule_us, rule
    return Timed(best, us, rule_us, 1 + len(fit))


class GraphTimer:
    """Times one launch on a GPU: launches in a row, each with weights that the L2 cache doesn't hold, in a CUDA graph.

    They are launched early where the device can (`kernels._triton.start_next`), as in a decode step: what a
    kernel has loaded before it waits is part of what makes it fast.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch, self.device = launch, launch.device
        cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.arguments = made_up(launch, cache_bytes)
        self.kernel = in_a_step(launch.kernel.kernel, self.device)
        self.stream = torch.cuda.Stream(self.device)
        self.expected: torch.Tensor | None = None

    def _run(self, arguments: Any, config: Config) -> torch.Tensor:
        return self.launch.kernel.launch(self.kernel, arguments, config)

    def __call__(self, config: Config) -> float | None:
        """See `Time`. The first configuration is the one that others are compared with."""
        from triton.errors import TritonError

        try:
            with torch.cuda.device(self.device):
                return self._time(config)
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError) as error:  # the compiler's passes raise the latter
            log.debug("%s can't run with %s: %s", self.launch.name, config, error)
            return None

    def _time(self, config: Config) -> float | None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            first = self.arguments[0]
            result = self.launch.kernel.written(first, self._run(first, config))
            if not self._is_same(result):
                log.warning("%s computes something else with %s", self.launch.name, config)
                return None
            # Not `torch.cuda.graph`: that collects garbage, which takes longer than all the rest.
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for arguments in self.arguments:
                    self._run(arguments, config)
            finally:
                graph.capture_end()
            samples = [self._replay_us(graph) for _ in range(3 + REPLAYS)][3:]
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return statistics.median(samples) / len(self.arguments)

    def _is_same(self, result: torch.Tensor) -> bool:
        """Up to the order of sums, and a rounding."""
        if self.expected is None:
            self.expected = result.clone()
            return True
        scale = self.expected.float().abs().max().clamp_min(1e-6)
        error = (result.float() - self.expected.float()).abs().max()
        # A NaN compares as false
        return bool(error <= (2 * torch.finfo(result.dtype).eps + 1e-5) * scale)

    def _replay_us(self, graph: "torch.cuda.CUDAGraph") -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)
