"""The graph of a random decoder, rewritten and run, and what it has to equal."""

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from decoders import DecoderSpec, Keep, RandomDecoder
from hypothesis import currently_in_test_context, given, note, settings
from hypothesis import strategies as st
from models import assert_as_exact_as, forced, listing
from torch import Tensor, fx

from dejavu_compile.passes.find_sites import find_sites
from dejavu_compile.passes.normalize import Normalized, normalize
from dejavu_compile.passes.rewrite import rewrite
from dejavu_compile.passes.site import (
    Decision,
    Execution,
    Found,
    Policy,
    PredictorWeights,
    Site,
    SiteKind,
)

SCRIPT = """
# {name}: run this in the project's folder.
import sys
import dejavu_compile
sys.path.insert(0, "tests")
from {module} import *
{name}.hypothesis.inner_test({arguments})
"""


def holds_for(*strategies: st.SearchStrategy, one_in: int = 2) -> Callable:
    """`given`, where a failure also prints a script that shows it.

    Each example compiles a graph: of cheap ones the profile has `one_in` times as many.
    """

    def decorate(test: Callable) -> Callable:
        module = test.__module__.split(".")[-1]

        @functools.wraps(test)
        def run(*args: Any, **drawn: Any) -> None:
            arguments = ", ".join([*map(_pasteable, args), *map(_pasteable, drawn.values())])
            if currently_in_test_context():  # not in the script itself
                note(SCRIPT.format(name=test.__name__, module=module, arguments=arguments))
            with torch.no_grad():
                test(*args, **drawn)

        number = max(1, settings.default.max_examples // one_in)
        return settings(max_examples=number)(given(*strategies)(run))

    return decorate


def _pasteable(value: Any) -> str:
    return (
        str(value.__class__.__name__) + f".{value.name}"
        if isinstance(value, enum.Enum)
        else repr(value)
    )


class Graph:
    """The normalised graph of a spec's decoder, as Dynamo captures it, and inputs for it."""

    gm: fx.GraphModule
    inputs: list[Any]
    captured: list[str]  # the nodes that Dynamo made
    normalized: Normalized
    found: Found

    def __init__(self, spec: DecoderSpec, model: RandomDecoder | None = None) -> None:
        self.spec, self.model = spec, spec.model() if model is None else model
        torch.compiler.reset()
        torch.compile(self.model, backend=self._backend, fullgraph=True)(*spec.inputs())

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        self.gm, self.inputs, self.captured = gm, list(inputs), listing(gm)
        self.normalized = normalize(gm, inputs)
        self.found = find_sites(gm)
        return gm.forward

    def sites(self, kind: SiteKind) -> list[Site]:
        """One a layer, in order; an escape can only cost the last layer its site."""
        return [s for s in self.found.sites if s.kind is kind]

    def tensor(self, node: fx.Node) -> Tensor:
        """The parameter behind a node."""
        return self.inputs[self.gm.graph.find_nodes(op="placeholder").index(node)]

    def run(self) -> tuple[Tensor, ...]:
        self.gm.graph.lint()
        self.gm.recompile()
        return self.gm(*self.inputs)


# --- oracles ---------------------------------------------------------------------------------------------


def everything(spec: DecoderSpec) -> list[Keep]:
    """All units and heads of each layer."""
    units, heads = (torch.ones(n, dtype=torch.bool) for n in (spec.units, spec.heads))
    return [Keep(units, heads[None, None])] * spec.layers


def assert_same(
    spec: DecoderSpec,
    got: Sequence[Tensor],
    keep: list[Keep] | None = None,
    inputs: tuple[Tensor, Tensor] | None = None,
) -> None:
    """`got` is what the plain decoder gives with the others zeroed, in float64, but for rounding.

    In 8 or 11 bits, steps like x**3 without norms turn one rounding into several per cent: 16 of them are allowed. In any, the
    plain decoder may be rounded well by luck, so where that decides, its neighbours say how it is rounded.
    """
    ids, past = spec.inputs() if inputs is None else inputs
    plain, want = _rounded(spec, ids, past, keep)
    for i, (eager, ours, true) in enumerate(zip(plain, got, want, strict=True)):
        assert ours.dtype is eager.dtype
        # A zero logit and a small one round alike: errors are those of the values that were added up.
        among = torch.cat((true.flatten(), true.new_full((1,), 16.0)))
        among = among if spec.dtype == "float32" else 16 * among
        try:
            assert_as_exact_as(eager, ours, true, among)
        except AssertionError:
            # Three layers of |x**3|, 41 draws: the plain decoder errs by 4 eps in the median and 14 at most, ours by 4 and 14.
            near = [_rounded(spec, ids, past, keep, 1 + step / 1024) for step in range(1, 6)]
            others = [(low[i], exact[i]) for low, exact in near]
            assert_as_exact_as(eager, ours, true, among, others)


def _rounded(
    spec: DecoderSpec, ids: Tensor, past: Tensor, keep: list[Keep] | None, factor: float = 1.0
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What the plain decoder gives, its weights times `factor`, and what it would in float64."""
    model = spec.model()
    for weight in model.parameters():
        weight.data.mul_(factor)
    plain = model(ids, past, keep)
    return plain, model.double()(ids, past.double(), keep)


# --- rewriting -------------------------------------------------------------------------------------------


def choose(graph: Graph, execution: Execution) -> tuple[Decision, ...]:
    """A predictor for each site: the spec's units, and heads by what the layer's own input says."""
    spec, decisions = graph.spec, []
    generator = torch.Generator().manual_seed(spec.kept)
    for site, units in zip(graph.sites(SiteKind.MLP), spec.kept_units(), strict=False):
        how = Execution.GATHERED if execution is Execution.CACHE else execution
        decisions.append(forced(site, units, how))
    for site in graph.sites(SiteKind.ATTENTION):
        source = site.input.meta["val"]
        up = torch.randn(site.units, source.shape[-1], generator=generator).to(source.dtype)
        bias = torch.full((site.units,), {0.0: -1e4, 1.0: 1e4}.get(spec.share, 0.0))
        predictor = PredictorWeights(None, up, bias)
        decisions.append(Decision(site, Policy.PREDICT, execution, site.input, predictor))
    return tuple(decisions)


class Watching(fx.Interpreter):
    """Runs a graph and keeps the scores of heads, by the number of their decision."""

    def __init__(self, gm: fx.GraphModule, decisions: Sequence[Decision]) -> None:
        super().__init__(gm)
        self.scores: dict[int, Tensor] = {}
        self.numbers: dict[fx.Node, int] = {}
        for number, decision in enumerate(decisions):
            if decision.site.kind is SiteKind.ATTENTION:
                (bias,) = gm.graph.find_nodes(op="get_attr", target=f"dejavu_{number}_bias")
                self.numbers |= dict.fromkeys(bias.users, number)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.numbers:
            self.scores[self.numbers[n]] = value
        return value


class Sparse:
    """A graph after `decisions`; `then` stands for the passes behind the rewrite."""

    def __init__(
        self,
        graph: Graph,
        decisions: tuple[Decision, ...],
        then: Callable[[fx.GraphModule, Any], None] = lambda gm, done: None,
    ) -> None:
        self.graph, self.decisions = graph, decisions
        then(graph.gm, rewrite(graph.gm, decisions))
        graph.gm.graph.lint()
        self.watching = Watching(graph.gm, decisions)

    def run(self, *inputs: Any) -> tuple[tuple[Tensor, ...], list[Keep]]:
        """What the graph returns, and what it ran of each layer."""
        spec = self.graph.spec
        result = self.watching.run(*(inputs or self.graph.inputs))
        keep = everything(spec)
        for number, decision in enumerate(self.decisions):
            layer = self.graph.sites(decision.site.kind).index(decision.site)
            if decision.site.kind is SiteKind.MLP:
                change = {"units": spec.kept_units()[layer]}
            else:
                heads = ~(self.watching.scores[number] <= 0)
                change = {"heads": heads.view(result[0].shape[0], -1, spec.heads)}
            keep[layer] = dataclasses.replace(keep[layer], **change)
        return result, keep
