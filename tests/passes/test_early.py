"""What kernels may read before the one before them has ended."""

import sys

import models
import pytest
import torch
from tiny import text, texts, tiny
from torch import nn

import dejavu_compile as dv
from dejavu_compile.kernels import HEADS_START, HEADS_WAIT
from dejavu_compile.passes import gemv
from dejavu_compile.passes.early import early_launch
from dejavu_compile.passes.emit import Emitter
from dejavu_compile.passes.gemv import use_gemv

ops = torch.ops.dejavu


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(gemv, "CPU_FROM", 0)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs as our passes leave them."""
    backend = sys.modules["dejavu_compile.backend"]
    seen, run = [], backend.prepare

    def spy(gm, *args, **kwargs):
        result = run(gm, *args, **kwargs)
        seen.append(gm.graph)
        return result

    monkeypatch.setattr(backend, "prepare", spy)
    return seen


def reason_for(model, change=None, width=32):
    """Why the GEMVs of a model may not read early, after `change` to its graph."""
    found = []

    def ask(gm):
        use_gemv(gm)
        if change is not None:
            change(
                Emitter(gm), gm.graph.find_nodes(op="call_function", target=ops.gemv.default)[0]
            )
        found.append(early_launch(gm.graph).reason)

    models.record(model, models.tokens(count=1, width=width), passes=(ask,))
    return found[0]


def test_parameters_may_be_read_early():
    assert reason_for(nn.Linear(32, 24)) is None


def test_a_computed_weight_may_not():
    def double(emit, node):
        with emit.before(node):
            doubled = emit.call(torch.ops.aten.mul.Tensor, node.args[1][0], 2)
        node.args = (node.args[0], [doubled], *node.args[2:])

    assert "the graph computes" in reason_for(nn.Linear(32, 24), double)


def test_a_weight_that_is_written_may_not():
    def write(emit, node):
        with emit.before(node):
            emit.call(torch.ops.aten.mul_.Tensor, node.args[1][0], 2)

    with torch.no_grad():
        assert "or writes" in reason_for(nn.Linear(32, 24), write)


def decode_step(graphs, name, **how):
    """The graph of a decode step of a tiny decoder of three layers."""
    model = tiny(name, layers=3)
    dv.calibrate(model, texts(), progress=False, **how)
    graphs.clear()
    model.compile(backend="dejavu_eager")
    model.generate(
        text(5, batch=1, length=8), max_new_tokens=3, do_sample=False,
        cache_implementation="static",
    )  # fmt: skip
    return graphs[-1]


def calls(graph, op):
    return graph.find_nodes(op="call_function", target=op)


@pytest.mark.parametrize("name", ["opt", "llama"])
@torch.no_grad()
def test_a_selection_may_be_read_early_behind_rows_that_wait_first(name, graphs):
    graph = decode_step(graphs, name, density=0.5, head_density=0.5)
    assert all(
        calls(graph, op)
        for op in (ops.gathered_sum.default, ops.head_sum.default, ops.gemv.default)
    )
    # Rows of the layer before stand between the scores of its heads and the sum that reads them.
    assert early_launch(graph).mode == HEADS_START
    # Without the rows between them, a sum could start before its selection is there.
    alone = next(node for node in calls(graph, ops.gathered_sum.default) if node.args[4])
    alone.args = (graph.find_nodes(op="placeholder")[0], *alone.args[1:])
    early = early_launch(graph)
    assert early.mode == 0
    assert f"{alone.name} reads" in early.reason


@torch.no_grad()
def test_where_no_rows_are_gathered_kernels_that_skip_heads_wait_first(graphs):
    graph = decode_step(graphs, "opt", density=1.0, head_density=0.5)
    assert calls(graph, ops.head_sum.default)
    assert not calls(graph, ops.gathered_rows.default)
    assert early_launch(graph).mode == HEADS_WAIT


@torch.no_grad()
def test_a_scale_that_the_graph_writes_may_not_be_read_early(graphs):
    graph = decode_step(graphs, "llama", density=0.5, policy="gate")
    compact = calls(graph, ops.compact.default)[0]
    assert early_launch(graph).mode == HEADS_START
    with graph.inserting_before(compact):
        graph.call_function(torch.ops.aten.mul_.Tensor, (compact.args[2], 2))
    assert "or writes" in early_launch(graph).reason
