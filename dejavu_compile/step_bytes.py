"""What a decode step must read, op by op, from the graph that is compiled.

    y = linear(x, W, b)                              W and b
    y = gathered_rows(x, W, b, index, count)         of W the share of the units that run
    y = decode_attention(q, k, v, mask, ..., score)  of k and v the share of the heads that run, by sequence

Only weights, predictors, keys and values count: a step's activations stay in a GPU's caches, and of an embedding it
reads a row. How many units run isn't in a graph, since it depends on the text: `shares` says it
(`decode_step.oracle_step`), or else the densities of the artifact, as if each sequence chose on its own.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dejavu_compile.passes.find_sites import as_projection, resolve
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.read_attention import as_decode_attention
from dejavu_compile.passes.separable import SDPA, aten
from dejavu_compile.passes.site import Policy, SiteKind

from ._compat import unset_fake_temporarily
from .backend import Prepared, prepare
from .decode_step import DecodeStep, Share
from .options import split_options
from .plan import SitePlan

ops = torch.ops.dejavu

PRODUCT, ATTENTION = "library product", "library attention"
_PRODUCTS = {aten.mm.default, aten.matmul.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}  # fmt: skip
_ATTENTION = {"decode_attention", "decode_attention_cpu"}
_SELECT = {"select", "select_begin"}
# Ops of ours that launch one kernel, and those that have nothing to read but activations
KERNEL = {
    "gemv": "_gemv_kernel", "gemv_into": "_gemv_kernel", "gathered_rows": "_rows_kernel", "gathered_glu": "_rows_kernel",
    "gathered_sum": "_sum_kernel", "head_sum": "_head_sum_kernel", "compact": "_compact_kernel",
    "sketch_score": "_sketch_kernel",
}  # fmt: skip
OF_SELECT = ("inner_kernel", "score_kernel", "scatter_kernel")  # in this order
NO_LAUNCH = {"select_join", "unpack", "unpack_pairs"}


@dataclass(frozen=True, slots=True)
class Read:
    """What one launch must read. `kernel`: the Triton function, PRODUCT or ATTENTION; bytes None: not known.

    `shape` is that of the weight, or of the keys: launches of one shape run the same kernel of a library.
    """

    op: str
    kernel: str
    num_bytes: int | None
    shape: tuple[int, ...] = ()


def total(reads: list[Read]) -> int | None:
    """Bytes of all together; None if those of one aren't known."""
    sizes = [read.num_bytes for read in reads]
    return None if None in sizes else sum(sizes)


class _CapturedError(Exception):
    """Ends a call whose graph has been read: nothing has to run. Never leaves this module."""


def capture_step(
    step: DecodeStep,
    forward: Callable[..., Any],
    *,
    backend: str | Callable[..., Any],
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> "CapturedStep":
    """The graph of `step` as `backend` compiles `forward`: `dejavu`, or another, which runs it dense.

    Runs our passes on it, but nothing else. Drops what is compiled.
    """
    found: list[CapturedStep] = []

    def capture(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        prepared = None
        if getattr(backend, "__name__", backend) == "dejavu":
            prepared = prepare(gm, inputs, split_options(mode, options)[0])
        if prepared is None or not prepared.modified:
            normalize(gm, inputs)
        found.append(CapturedStep(gm, inputs, prepared))

        def stop(*_: Any) -> None:
            raise _CapturedError

        return stop

    torch.compiler.reset()
    before, step.forward = step.forward, torch.compile(forward, backend=capture)
    try:
        with suppress(_CapturedError):
            step()
    finally:
        step.forward = before
        torch.compiler.reset()
    return found[0]


class CapturedStep:
    """The graph of a step after our passes, with what they decided."""

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], prepared: Prepared | None
    ) -> None:
        self.gm = gm
        self.inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        self.plans = prepared.plan.sites if prepared is not None else ()
        # Dense sites are read in full. Where there are no others, they name nodes of a graph that was given up.
        self.running = [p for p in self.plans if p.decision.policy is not Policy.DENSE]
        self.share_of_weight: dict[fx.Node, Share | None] = {}
        self.share_of_attention: dict[fx.Node, Share | None] = {}

    def _weight(self, plan: SitePlan) -> torch.Tensor:
        return resolve(self.gm, plan.site.output.weight, self.inputs)

    @property
    def sparse(self) -> set[int]:
        """The ids of the weights out of the sites that aren't dense."""
        return {id(self._weight(plan)) for plan in self.running}

    @property
    def sites(self) -> list[dict[str, str]]:
        """What the plan decided about each, for JSON."""
        return [
            {"name": plan.site.name, "kind": str(plan.site.kind), "policy": str(plan.decision.policy),
             "execution": str(plan.decision.execution), "reason": plan.reason}
            for plan in self.plans
        ]  # fmt: skip

    def reads(self, shares: dict[int, Share] | None = None) -> list[Read]:
        """What each launch must read, in the graph's order. `shares` by the id of the weight out of a site."""
        with unset_fake_temporarily():
            self._set_shares(shares or {})
            nodes = [node for node in self.gm.graph.nodes if node.op == "call_function"]
            return [read for node in nodes for read in self._reads(node)]

    def _set_shares(self, shares: dict[int, Share]) -> None:
        scored = []
        for plan in self.running:
            share = self._share(plan, shares)
            for projection in (*plan.site.projections, plan.site.output):
                self.share_of_weight[projection.weight] = share
            if plan.site.kind is SiteKind.ATTENTION:
                scored += [share] * len(plan.site.cores)
        # Attention has no weight to be known by: those with scores come in the order of their sites.
        with_score = [
            n for n in self.gm.graph.nodes if _name(n) in _ATTENTION and n.args[6] is not None
        ]
        alike = len(scored) == len(with_score)
        self.share_of_attention = dict(
            zip(with_score, scored if alike else [None] * len(with_score), strict=True)
        )

    def _share(self, plan: SitePlan, shares: dict[int, Share]) -> Share | None:
        """Of the units of a site, as measured or as the artifact has it; None if neither is known."""
        known = shares.get(id(self._weight(plan)))
        if known is not None or math.isnan(plan.density) or plan.site.num_tokens is None:
            return known
        return Share(1 - (1 - plan.density) ** plan.site.num_tokens, plan.density)

    def _reads(self, node: fx.Node) -> list[Read]:
        name = _name(node)
        if name is None:
            return self._of_library(node)
        name = name.removesuffix("_cpu")
        if name in _SELECT:
            _, down, up, bias = node.args[:4]
            sizes = (_extent(down), _extent(up) + _extent(bias), 0)
            return [Read(name, k, b, _shape(up)) for k, b in zip(OF_SELECT, sizes, strict=True)]
        if name in NO_LAUNCH:
            return []
        if name == "decode_attention":
            k, v = node.args[1:3]
            share = self.share_of_attention.get(node, Share(1.0))
            size = None if share is None else round(share.cache * (_extent(k) + _extent(v)))
            return [Read(name, "_attention_kernel", size, _shape(k))]
        weights, size = self._weights(name, node)
        shape = _shape(weights[0]) if weights else ()
        # An op that this file doesn't know yet: its bytes aren't either.
        return [Read(name, KERNEL.get(name, name), size, shape)]

    def _weights(self, name: str, node: fx.Node) -> tuple[list[fx.Node], int | None]:
        """The weights that an op of ours reads, and the bytes of those rows that it needs."""
        args = node.args
        if name in {"gemv", "gemv_into"}:
            weights, biases = list(args[1]), [b for b in args[2] if b is not None]
            size = sum(map(_extent, (*weights, *biases)))
            if len(args) > 4 and args[4] is not None:
                share = self.share_of_weight.get(_parameter(weights[0]))
                owner = resolve(self.gm, args[4], self.inputs)
                owned = (owner >= 0).float().mean().item() * _extent(weights[0])
                return weights, None if share is None else round(
                    size - owned * (1 - share.weights)
                )
            return weights, size
        if name == "compact":
            scale = args[2:3]
            return [], sum(_extent(s) for s in scale if s is not None)
        if name == "sketch_score":
            return list(args[1:3]), sum(map(_extent, args[1:4]))
        gathered = {"gathered_rows": (1, 2), "gathered_glu": (1, 2, 3, 4), "gathered_sum": (1,), "head_sum": (1,)}  # fmt: skip
        if name not in gathered:
            return [], None
        read = [args[i] for i in gathered[name] if args[i] is not None]
        share = self.share_of_weight.get(_parameter(args[1]))
        return read, None if share is None else round(share.weights * sum(map(_extent, read)))

    def _of_library(self, node: fx.Node) -> list[Read]:
        """A product or an attention that stays with torch."""
        attention = as_decode_attention(node)
        if attention is not None and node.target is SDPA:
            size = _extent(attention.k) + _extent(attention.v)
            return [Read("attention", ATTENTION, size, _shape(attention.k))]
        projection = as_projection(node)
        if projection is not None:
            size = _extent(projection.weight)
            size += _extent(projection.bias) if projection.bias is not None else 0
            return [Read("linear", PRODUCT, size, _shape(projection.weight))]
        if node.target in _PRODUCTS or node.target is aten.linear.default:
            factors = [a for a in node.args if isinstance(a, fx.Node)]
            return [Read("product", PRODUCT, sum(map(_extent, factors)), _shape(factors[-1]))]
        return []


def _name(node: fx.Node) -> str | None:
    """The name of an op of ours, without its namespace."""
    namespace, _, name = str(node.target).partition(".")
    return name.split(".")[0] if node.op == "call_function" and namespace == "dejavu" else None


def _parameter(node: fx.Node) -> fx.Node:
    """The weight that a node is a view of."""
    while node.op == "call_function":
        node = node.args[0]
    return node


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _extent(node: fx.Node) -> int:
    """Bytes of a value, what an expanded one repeats once."""
    value = node.meta["val"]
    sizes = (s for s, stride in zip(value.shape, value.stride(), strict=True) if stride or s == 0)
    return math.prod(int(size) for size in sizes) * value.element_size()
