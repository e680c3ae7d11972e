"""What holds of every decoder: each property for random ones, against plain PyTorch in float64.

Those of single ops are beside the ops' tests. A failure prints the smallest decoder that fails, as a script.
"""

import weakref
from typing import Any

import pytest
import torch
from decoder_graph import Graph, Sparse, assert_same, choose, everything, holds_for
from decoders import STEPS, DecoderSpec  # noqa: F401  for the scripts that failures print
from hypothesis import strategies as st
from models import listing
from strategies import decoder_specs
from torch import Tensor, fx

import dejavu_compile as dv
from dejavu_compile._compat import TracingContext
from dejavu_compile.attachments import Attachment, attach, fingerprint, make_unit_major
from dejavu_compile.backend import prepare
from dejavu_compile.options import Options
from dejavu_compile.passes.decode_attention import use_decode_attention
from dejavu_compile.passes.find_sites import as_projection, find_sites
from dejavu_compile.passes.fuse import fuse
from dejavu_compile.passes.gemv import use_gemv
from dejavu_compile.passes.normalize import normalize
from dejavu_compile.passes.rewrite import rewrite
from dejavu_compile.passes.schedule import Issue, schedule
from dejavu_compile.passes.site import Decision, Execution, Policy, Site, SiteKind

MAKE_ZEROS = {"relu", "relu6", "clamp", "clamp_min", "threshold", "relu_"}
EXECUTIONS = st.sampled_from(list(Execution))

# --- the analysis ----------------------------------------------------------------------------------------


@holds_for(decoder_specs())
def test_normalising_changes_no_value_and_nothing_when_repeated(spec):
    graph = Graph(spec)
    assert_same(spec, graph.run())
    once = [str(n.target) for n in graph.gm.graph.nodes if n.op == "call_function"]
    normalize(graph.gm, graph.inputs)
    assert [str(n.target) for n in graph.gm.graph.nodes if n.op == "call_function"] == once


@holds_for(decoder_specs())
def test_every_mlp_and_attention_is_found_unless_its_values_escape(spec):
    graph = Graph(spec)
    escaping = {
        SiteKind.MLP: spec.escape == "hidden"
        or (spec.escape == "first" and spec.mlp not in ("gated", "added", "mixed")),
        SiteKind.ATTENTION: spec.escape in ("attended", "attention"),
    }
    for kind in SiteKind:
        expected = spec.layers - escaping[kind]
        if kind is SiteKind.MLP and spec.is_linear:
            expected = 0
        found = graph.sites(kind)
        assert len(found) == expected, [u.reason for u in graph.found.unmatched]
        units = spec.units if kind is SiteKind.MLP else spec.heads
        assert all(site.units == units for site in found)


@holds_for(decoder_specs())
def test_every_projection_is_in_one_site_or_has_one_reason(spec):
    graph = Graph(spec)
    there = [n for n in graph.gm.graph.nodes if as_projection(n) is not None]
    sites, unmatched = graph.found.sites, graph.found.unmatched
    outputs = [site.output.node for site in sites]
    inputs = {p.node for site in sites for p in site.projections} - set(outputs)
    assert sorted([*outputs, *inputs, *(u.projection.node for u in unmatched)]) == there
    assert all(u.reason for u in unmatched)
    matrices = {n for n, p in graph.model.named_parameters() if p.dim() == 2} - {
        "embedding.weight"
    }
    named = {p.name for site in sites for p in (*site.projections, site.output)}
    assert named | {u.projection.name for u in unmatched} >= matrices


@holds_for(decoder_specs(activation=("negate", "halve"), heads=1, groups=1))
def test_a_graph_without_a_site_is_left_node_for_node(spec):
    """A linear MLP, and attention of one head."""
    prepared = Prepared(spec)
    assert not prepared.done.modified
    assert not prepared.done.found.sites
    assert listing(prepared.gm) == Graph(spec).captured


@pytest.mark.parametrize("step", STEPS)
@holds_for(decoder_specs(escape="nothing", layers=1, share=0.5), one_in=20)
def test_where_a_carrier_is_zero_its_unit_contributes_nothing(step, spec):
    """Whatever comes after a ReLU."""
    spec = spec.but(activation=("relu", step))
    graph = Graph(spec)
    (site,) = graph.sites(SiteKind.MLP)
    assert site.exact is not None or step not in MAKE_ZEROS
    seen: dict[fx.Node, Tensor] = {}

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    Keeping(graph.gm).run(*graph.inputs)
    if site.exact is not None:
        silent = seen[site.exact.node].flatten() == 0
        assert (seen[site.hidden].flatten()[silent] == 0).all()


# --- what a rewrite means ----------------------------------------------------------------------------------


@holds_for(decoder_specs(), EXECUTIONS)
def test_only_selected_units_and_heads_run(spec, execution):
    graph = Graph(spec)
    assert_same(spec, *Sparse(graph, choose(graph, execution)).run())


@holds_for(decoder_specs(share=1.0), EXECUTIONS)
def test_everything_selected_equals_dense(spec, execution):
    graph = Graph(spec)
    got, _ = Sparse(graph, choose(graph, execution)).run()
    assert_same(spec, got)


@holds_for(decoder_specs(tokens=1), st.sampled_from(Issue))
def test_fusing_scheduling_and_decode_kernels_change_no_value(spec, issue):
    graph = Graph(spec)

    def finish(gm: fx.GraphModule, done: Any) -> None:
        fuse(gm)
        schedule(gm, done.selects, issue)
        use_gemv(gm)
        use_decode_attention(gm)

    assert_same(spec, *Sparse(graph, choose(graph, Execution.GATHERED), finish).run())


@holds_for(
    decoder_specs(tokens=1, mlp="gated", escape="nothing", dtype="float32"),
    st.sampled_from(["relu", "silu", "gelu"]),
    one_in=5,
)
def test_gate_activation_and_up_of_selected_units_become_one_launch(spec, activation):
    graph = Graph(spec.but(activation=(activation,)))

    def finish(gm: fx.GraphModule, _: Any) -> None:
        assert fuse(gm).pairs == len(graph.sites(SiteKind.MLP))

    assert_same(graph.spec, *Sparse(graph, choose(graph, Execution.GATHERED), finish).run())


@holds_for(decoder_specs(tokens=1))
def test_decode_kernels_alone_are_lossless(spec):
    graph = Graph(spec)
    use_gemv(graph.gm)
    use_decode_attention(graph.gm)
    assert_same(spec, graph.run())


@holds_for(
    decoder_specs(escape="nothing"), st.sampled_from([Execution.GATHERED, Execution.MASKED])
)
def test_exact_is_lossless(spec, execution):
    graph = Graph(spec)
    sites = [site for site in graph.sites(SiteKind.MLP) if site.exact is not None]
    rewrite(graph.gm, tuple(Decision(site, Policy.EXACT, execution) for site in sites))
    assert_same(spec, graph.run())


@holds_for(
    decoder_specs(share=0.0),
    st.sampled_from(["hidden", "first", "queries", "attended", "attention"]),
    EXECUTIONS,
)
def test_what_is_read_elsewhere_is_computed_in_full(spec, escape, execution):
    """With nothing selected, what is returned still holds every unit; so does the cache."""
    spec = spec.but(escape=escape)
    graph = Graph(spec)
    got, keep = Sparse(graph, choose(graph, execution)).run()
    assert_same(spec, got, keep)


@holds_for(decoder_specs(tokens=1, batch=1, shared=False, tied=False, units=20))
def test_weights_of_what_does_not_run_are_not_read(spec):
    """They may hold NaN."""
    graph = Graph(spec)
    sparse = Sparse(graph, choose(graph, Execution.GATHERED))
    want, keep = sparse.run()
    for decision in sparse.decisions:
        site = decision.site
        ran = keep[graph.sites(site.kind).index(site)]
        ran = ran.units if site.kind is SiteKind.MLP else ran.heads.flatten()
        # On a CPU a gather of more rows than this is slower than reading them all
        if site.kind is SiteKind.ATTENTION or ran.float().mean() <= 0.3:
            poison(graph, site, ~ran)
    got, _ = sparse.run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def poison(graph: Graph, site: Site, dropped: Tensor) -> None:
    """NaN in the columns of the output projection, and in the rows, that belong to these units."""
    output = graph.tensor(site.output.weight)
    columns = output if site.output.contracted == 0 else output.T
    columns[dropped.repeat_interleave(site.width)] = torch.nan
    for leaf in site.row_leaves:
        weight = graph.tensor(leaf.projection.weight)
        rows = weight if leaf.projection.contracted == 1 else weight.T
        rows[leaf.offset + leaf.step * dropped.nonzero().flatten()] = torch.nan
    for owned in site.owned:
        weight = graph.tensor(owned.projection.weight)
        rows = weight if owned.projection.contracted == 1 else weight.T
        owner = owned.owner.repeat_interleave(owned.block).long()
        rows[(owner >= 0) & dropped[owner.clamp(min=0)]] = torch.nan


@holds_for(decoder_specs(share=0.2))
def test_a_nan_is_never_hidden(spec):
    """In the embedding it reaches the logits, whatever is selected."""
    graph = Graph(spec.but(escape="nothing"))
    sparse = Sparse(graph, choose(graph, Execution.GATHERED))
    graph.model.embedding.weight.fill_(torch.nan)
    got, _ = sparse.run()
    assert got[0].isnan().all()


# --- attaching and detaching -------------------------------------------------------------------------------


@holds_for(decoder_specs(tokens=1, escape="nothing", share=0.2))
def test_detaching_restores_the_model(spec):
    model = spec.model()
    graph = Graph(spec, model)
    for decision in choose(graph, Execution.GATHERED):
        site = decision.site
        out = graph.tensor(site.output.weight)
        for projection in (*site.projections, site.output):
            weight, into = graph.tensor(projection.weight), projection is not site.output
            make_unit_major(weight, projection.contracted, produces_units=into)
        # The site's own input stands for an earlier layer's
        attach(out, Attachment(Policy.PREDICT, 0.01, fingerprint(out), predictor=decision.predictor,
                               source=weakref.ref(out)))  # fmt: skip
    assert Prepared(spec, model).done.modified == bool(graph.found.sites)
    dv.detach(model)
    restored = Prepared(spec, model)
    assert not restored.done.modified
    assert listing(restored.gm) == graph.captured
    assert_same(spec, restored.run())
    for parameter, fresh in zip(model.parameters(), spec.model().parameters(), strict=True):
        assert torch.equal(parameter, fresh)


class Prepared(Graph):
    """The graph as the backend leaves it."""

    def _backend(self, gm: fx.GraphModule, inputs: Any) -> Any:
        self.gm, self.inputs = gm, list(inputs)
        self.done = prepare(gm, inputs, Options(gemv=False, exact=False))
        return gm.forward


# --- sizes without numbers ---------------------------------------------------------------------------------


@holds_for(decoder_specs(escape="nothing", dtype="float32"), one_in=5)  # each compiles six graphs
def test_sizes_without_numbers_stay_without(spec):
    """One graph serves other batches, lengths and caches, in full and restricted."""
    spec = spec.but(batch=5, tokens=3, past=11)
    sparse: list[Sparse] = []

    class Symbolic(Graph):
        def __init__(self) -> None:
            self.spec = spec

        def backend(self, gm: fx.GraphModule, inputs: Any) -> Any:
            self.gm, self.inputs, self.normalized = gm, list(inputs), normalize(gm, inputs)
            environment = TracingContext.get().fake_mode.shape_env
            guards = len(environment.guards)
            self.found = find_sites(gm)
            assert len(environment.guards) == guards, "the analysis asked about a size"
            sparse.append(Sparse(self, choose(self, Execution.MASKED)))
            self.keep = None

            def run(*args: Any) -> Any:
                result, self.keep = sparse[-1].run(*args)
                return result

            return run

    symbolic, dense_graphs = Symbolic(), []

    def count(gm: fx.GraphModule, inputs: Any) -> Any:
        dense_graphs.append(gm)
        return gm.forward

    for backend in (count, symbolic.backend):
        torch.compiler.reset()
        compiled = torch.compile(spec.model(), backend=backend, dynamic=True)
        for batch, tokens, past in ((5, 3, 11), (7, 4, 13), (4, 7, 23)):
            inputs = spec.but(batch=batch, tokens=tokens, past=past).inputs()
            got = compiled(*inputs)
            keep = everything(spec) if backend is count else symbolic.keep
            assert_same(spec, got, keep, inputs)
    assert len(sparse) == len(dense_graphs)
