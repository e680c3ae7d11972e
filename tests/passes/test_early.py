"""What kernels may read before the one before them has ended."""

import sys

import models
import pytest
import torch
from tiny import text, texts, tiny
from torch import nn

import dejavu_compile as dv
from dejavu_compile.passes import gemv
from dejavu_compile.passes.early import why_not_early
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
        found.append(why_not_early(gm.graph))

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


@pytest.mark.parametrize("name", ["opt", "llama"])
@torch.no_grad()
def test_a_selection_may_be_read_early_once_another_kernel_has_read_it(name, graphs):
    model = tiny(name, layers=3)
    dv.calibrate(model, texts(), density=0.5, head_density=0.5, progress=False)
    graphs.clear()
    model.compile(backend="dejavu_eager")
    model.generate(
        text(5, batch=1, length=8), max_new_tokens=3, do_sample=False,
        cache_implementation="static",
    )  # fmt: skip
    targets = {node.target for node in graphs[-1].nodes}
    assert {ops.gathered_sum.default, ops.head_sum.default, ops.gemv.default} <= targets
    assert why_not_early(graphs[-1]) is None
    # Without the rows between them, a sum could start before its selection is there.
    sums = graphs[-1].find_nodes(op="call_function", target=ops.gathered_sum.default)
    alone = next(node for node in sums if node.args[4])
    alone.args = (graphs[-1].find_nodes(op="placeholder")[0], *alone.args[1:])
    assert f"{alone.name} depends on reads" in why_not_early(graphs[-1])
