"""The launches of a graph whose block sizes can be searched, and arguments made up to time them with."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from dejavu_compile._compat import has_early_launch
from dejavu_compile.kernels._triton import LaunchedEarly
from dejavu_compile.kernels.attention import (
    _attention_kernel,
    attention_candidates,
    attention_key,
    launch_attention,
)
from dejavu_compile.kernels.gathered_sum import _sum_kernel, launch_sum, sum_candidates, sum_key
from dejavu_compile.kernels.gemv import (
    _gemv_kernel,
    gemv_candidates,
    gemv_key,
    launch_gemv,
    running_rows,
)
from dejavu_compile.kernels.heads import (
    _head_sum_kernel,
    head_sum_candidates,
    head_sum_key,
    launch_head_sum,
)
from dejavu_compile.kernels.rows import _rows_kernel, launch_rows, rows_candidates, rows_key
from dejavu_compile.kernels.sketch import (
    _sketch_kernel,
    launch_sketch,
    sketch_candidates,
    sketch_key,
)
from dejavu_compile.kernels.tuning import Config
from dejavu_compile.passes.site import SiteKind

Arguments = SimpleNamespace  # of an op, by the names of its schema

ops = torch.ops.dejavu
WEIGHTS = {"weight", "weights", "gate", "up", "k", "v"}  # what a step reads once
SETS = 64  # of weights, at most, for launches in a row
CACHES = 3  # times the size of the L2 cache: what is read before a weight is read again


def in_a_step(kernel: Any, device: torch.device | None = None) -> Any:
    """One of our kernels as a compiled decode step launches it: early, where the device, the GPU by default, can."""
    early = has_early_launch(device or torch.device("cuda"))
    return LaunchedEarly(kernel) if early else kernel


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """An op's launcher, by the op's own arguments.

    `selected`: whose density its time depends on, None where it reads everything. `written`: what of its result has
    values.
    """

    kernel: Any
    launch: Callable[[Any, Arguments, Config], Tensor]
    key: Callable[[Arguments], str]
    candidates: Callable[[Arguments], list[Config]]
    selected: Callable[[Arguments], SiteKind | None]
    written: Callable[[Arguments, Tensor], Tensor] = lambda a, out: out


def _heads(a: Arguments) -> SiteKind | None:
    return None if a.score is None else SiteKind.ATTENTION


def _gemv_written(a: Arguments, out: Tensor) -> Tensor:
    if a.owner is None:
        return out
    rows = running_rows(a.weights[0], a.owner, a.score)
    rest = rows.new_ones(out.shape[1] - rows.numel())
    return out[:, torch.cat([rows, rest])]


def _added_up(a: Arguments, out: Tensor) -> Tensor:
    """A launcher leaves parts [parts, m, d]; an op has added them up."""
    return out.sum(dim=0) if out.dim() == 3 else out


GEMV = Kernel(
    _gemv_kernel,
    lambda kernel, a, config: launch_gemv(
        kernel, a.x, a.weights, a.biases, a.activation, a.owner, a.score, config
    ),
    lambda a: gemv_key(a.x, a.weights, a.owner, a.score),
    lambda a: gemv_candidates(
        a.x.shape[1],
        0 if a.owner is None else a.weights[0].shape[0] // a.owner.numel(),
        a.x.shape[0],
        len(a.weights),
    ),
    _heads,
    _gemv_written,
)
KERNELS = {
    ops.gathered_rows.default: Kernel(
        _rows_kernel,
        lambda kernel, a, config: launch_rows(
            kernel, a.x, a.weight, a.bias, (a.index, a.count), a.activation, times=a.times, config=config
        ),
        lambda a: rows_key(a.x, a.weight, None, a.times),
        lambda a: rows_candidates(a.weight.shape[0], a.x.shape[1], a.x.shape[0]),
        lambda a: SiteKind.MLP,
        lambda a, out: out[:, : int(a.count)],
    ),
    ops.gathered_glu.default: Kernel(
        _rows_kernel,
        lambda kernel, a, config: launch_rows(
            kernel, a.x, a.gate, a.gate_bias, (a.index, a.count), a.activation, a.up, a.up_bias, config=config
        ),
        lambda a: rows_key(a.x, a.gate, a.up, None),
        lambda a: rows_candidates(a.gate.shape[0], a.x.shape[1], a.x.shape[0]),
        lambda a: SiteKind.MLP,
        lambda a, out: out[:, : int(a.count)],
    ),
    ops.gathered_sum.default: Kernel(
        _sum_kernel,
        lambda kernel, a, config: launch_sum(
            kernel, a.hidden, a.weight, a.index, a.count, a.compacted, a.arrived, config
        ),
        lambda a: sum_key(a.hidden, a.weight, a.compacted),
        lambda a: sum_candidates(*a.weight.shape, a.hidden.shape[0]),
        lambda a: SiteKind.MLP,
        _added_up,
    ),
    ops.gemv.default: GEMV,
    ops.gemv_into.default: GEMV,
    ops.head_sum.default: Kernel(
        _head_sum_kernel,
        lambda kernel, a, config: launch_head_sum(
            kernel, a.hidden, a.weight, a.score, a.arrived, config
        ),
        lambda a: head_sum_key(a.hidden, a.weight, a.score),
        lambda a: head_sum_candidates(
            a.score.shape[1], a.weight.shape[0] // a.score.shape[1], a.weight.shape[1], a.score.shape[0]
        ),
        _heads,
        _added_up,
    ),
    ops.sketch_score.default: Kernel(
        _sketch_kernel,
        lambda kernel, a, config: launch_sketch(
            kernel, a.x, a.gate, a.up, a.numbers, a.activation, config
        ),
        lambda a: sketch_key(a.x, a.up),
        lambda a: sketch_candidates(a.x.shape[1] // 16),
        lambda a: None,
    ),
    ops.decode_attention.default: Kernel(
        _attention_kernel,
        lambda kernel, a, config: launch_attention(
            kernel, a.q, a.k, a.v, a.mask, a.scale, a.softcap, a.score, a.arrived, config
        ),
        lambda a: attention_key(a.q, a.k, a.v, a.mask, a.softcap, a.score),
        lambda a: attention_candidates(
            a.k.shape[0] * a.k.shape[1], a.k.shape[2], a.k.element_size(), a.q.shape[1] // a.k.shape[1]
        ),
        _heads,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """Launches of a graph that ask with one key, `count` of them. `arguments` are those of the first, without numbers.

    density: of the units that its kernel selects from, in steps of half an octave; None where it reads everything.
    """

    kernel: Kernel
    key: str
    arguments: Arguments
    density: float | None
    count: int = 1

    @property
    def name(self) -> str:
        """The key, and the density that its launcher doesn't know."""
        return self.key if self.density is None else f"{self.key} density={self.density:.3g}"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(t.device for value in vars(self.arguments).values() for t in _tensors(value))

    @property
    def candidates(self) -> list[Config]:
        """Configurations to choose from, the rule first."""
        return self.kernel.candidates(self.arguments)

    @property
    def weight_bytes(self) -> int:
        """Of one set of weights, selected or not."""
        return sum(
            tensor.numel() * tensor.element_size()
            for name, value in vars(self.arguments).items() if name in WEIGHTS
            for tensor in _tensors(value)
        )  # fmt: skip

    @property
    def read_bytes(self) -> float:
        """What one launch reads of them, about."""
        return self.weight_bytes * (1.0 if self.density is None else self.density)


def step_of(density: float) -> float:
    """The nearest of 1, 0.71, 0.5, 0.35, ... 0.03: what is searched at one density serves others near it.

    It is searched at that step itself, so what is found doesn't depend on which model came first.
    """
    return 2.0 ** (max(-10, min(0, round(2 * math.log2(max(density, 1e-3))))) / 2)


def launches_of(graph: fx.Graph, densities: Mapping[SiteKind, float]) -> tuple[Launch, ...]:
    """Each kind of launch in a graph that our passes rewrote; those of symbolic shapes keep their rule.

    `densities`: of MLP units and of heads, one for all layers. Launchers can't tell layers of one shape apart, and so
    these share a configuration.
    """
    found: dict[str, Launch] = {}
    for node in graph.nodes:
        kernel = KERNELS.get(node.target)
        if kernel is None:
            continue
        values = fx.map_arg(node.args, lambda n: n.meta["val"])
        arguments = arguments_of(node.target, values)
        key = kernel.key(arguments)
        if key in found:
            found[key] = replace(found[key], count=found[key].count + 1)
        elif all(_is_static(value) for value in vars(arguments).values()):
            kind = kernel.selected(arguments)
            density = None if kind is None else step_of(densities[kind])
            found[key] = Launch(kernel, key, arguments, density)
    return tuple(found.values())


def arguments_of(op: Any, values: Sequence[Any]) -> Arguments:
    """The arguments of a call by name, with defaults for those that it leaves out."""
    schema = op._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, values, strict=False)}
    return Arguments(**{a.name: given.get(a.name, a.default_value) for a in schema})


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _is_static(value: Any) -> bool:
    return all(
        isinstance(size, int) for t in _tensors(value) for size in (*t.shape, *t.stride())
    ) and not isinstance(value, torch.SymInt | torch.SymFloat)  # fmt: skip


def made_up(launch: Launch, cache_bytes: int) -> list[Arguments]:
    """Arguments for launches in a row that find no weight in a cache of this size.

    Weights differ from one launch to the next, or what is selected of them does. Shapes, strides and dtypes are the
    graph's, caches of keys are full, and the numbers are random: no kernel's time depends on them.
    """
    device = launch.device
    generator = torch.Generator(device).manual_seed(0)

    def made(name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [made(name, v) for v in value]
        return _made(name, value, device, generator) if isinstance(value, Tensor) else value

    needed = CACHES * cache_bytes
    sets = min(SETS, max(1, math.ceil(needed / launch.weight_bytes)))
    number = min(SETS, max(4, sets, math.ceil(needed / launch.read_bytes)))
    given = vars(launch.arguments)
    weights = [
        {name: made(name, value) for name, value in given.items() if name in WEIGHTS}
        for _ in range(sets)
    ]
    others = {name: made(name, value) for name, value in given.items() if name not in WEIGHTS}
    if others.get("owner") is not None:
        blocks, num_heads = others["owner"].numel(), others["score"].shape[1]
        others["owner"] = (torch.arange(blocks, device=device) * num_heads // blocks).int()
    return [
        Arguments(
            **{**others, **weights[i % sets], **_selected(launch, others, i // sets, generator)}
        )
        for i in range(number)
    ]


def _made(name: str, value: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    """A tensor that lies as `value` does."""
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)
    )
    memory = torch.zeros(extent, dtype=value.dtype, device=device)
    if value.dtype is torch.bool:
        memory.fill_(True)
    elif value.is_floating_point() and name != "mask":
        memory.normal_(0.0, 0.05, generator=generator)
    return memory.as_strided(value.shape, value.stride())  # fmt: skip


def _selected(
    launch: Launch, given: dict[str, Any], part: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The selection or the scores of one launch: parts that follow each other have no unit in common, while that lasts."""
    if launch.density is None:
        return {}
    over = given["index"] if "index" in given else given["score"]
    units, device = over.shape[-1], over.device
    number = max(1, round(launch.density * units))
    order = torch.randperm(units, generator=generator.manual_seed(1), device=device)
    if "index" in given:
        index = torch.zeros_like(over)
        index[:number] = order.roll(-part * number)[:number].sort().values
        return {"index": index, "count": torch.full_like(given["count"], number)}
    score = torch.full_like(over, -1.0)
    for token in range(over.shape[0]):
        score[token, order.roll(-(part + token) * number)[:number]] = 1.0
    return {"score": score}
