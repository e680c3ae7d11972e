"""What kernels may read before the one before them has ended."""

import random
from functools import cache

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import decode_graph, texts, tiny
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


def decode_step(name, **how):
    """The graph of a decode step of a tiny decoder of three layers, as our passes leave it."""
    model = tiny(name, layers=3)
    dv.calibrate(model, texts(), progress=False, **how)
    return decode_graph(model)


def calls(graph, op):
    return graph.find_nodes(op="call_function", target=op)


@pytest.mark.parametrize("name", ["opt", "llama"])
@torch.no_grad()
def test_a_selection_may_be_read_early_behind_rows_that_wait_first(name):
    graph = decode_step(name, density=0.5, head_density=0.5)
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
def test_where_no_rows_are_gathered_kernels_that_skip_heads_wait_first():
    graph = decode_step("opt", density=1.0, head_density=0.5)
    assert calls(graph, ops.head_sum.default)
    assert not calls(graph, ops.gathered_rows.default)
    assert early_launch(graph).mode == HEADS_WAIT


@torch.no_grad()
def test_a_scale_that_the_graph_writes_may_not_be_read_early():
    graph = decode_step("llama", density=0.5, policy="gate")
    compact = calls(graph, ops.compact.default)[0]
    assert early_launch(graph).mode == HEADS_START
    with graph.inserting_before(compact):
        graph.call_function(torch.ops.aten.mul_.Tensor, (compact.args[2], 2))
    assert "or writes" in early_launch(graph).reason


# --- in every order that kernels could be launched in ----------------------------------------------------

DECODERS = {
    "opt": {"density": 0.5, "head_density": 0.5},
    "opt, heads": {"density": 1.0, "head_density": 0.5},
    "llama, gate": {"density": 0.5, "policy": "gate"},
    "falcon": {"density": 0.5, "head_density": 0.5},
    "gpt_neox": {"density": 0.5, "head_density": 0.5},
}


@cache
def graph_of(name):
    with torch.no_grad():
        return decode_step(name.split(",")[0], **DECODERS[name])


def shuffled(graph, seed):
    """The ops of a graph in an order that their inputs allow, and that keeps ops that write among themselves."""
    pick, order, last = random.Random(seed), [], None
    missing, users = {}, {node: [] for node in graph.nodes}
    for node in graph.nodes:
        needed = set(node.all_input_nodes)
        if node.op == "call_function" and node.is_impure():
            needed |= {last} - {None}
            last = node
        missing[node] = len(needed)
        for one in needed:
            users[one].append(node)
    ready = [node for node, count in missing.items() if count == 0]
    while ready:
        node = ready.pop(pick.randrange(len(ready)))
        order.append(node)
        for user in users[node]:
            missing[user] -= 1
            if missing[user] == 0:
                ready.append(user)
    assert len(order) == len(graph.nodes)
    return order


def waits_first(node, mode):
    """As the kernels are written (`start_next`)."""
    if node.target in {ops.gathered_rows.default, ops.gathered_glu.default}:
        return True
    if node.target is ops.gathered_sum.default:
        return not node.args[4]
    return mode == HEADS_WAIT and node.target is ops.gemv.default and len(node.args) > 4


def read_before_waiting(node):
    if node.target is ops.gathered_sum.default and node.args[4]:
        return node.args[2]
    return node.args[2] if node.target is ops.head_sum.default else None


def written_by(node):
    while node.target in {torch.ops.aten.reshape.default, torch.ops.aten.slice.Tensor}:
        node = node.args[0]
    return node


@given(name=st.sampled_from(list(DECODERS)), seed=st.integers(0, 2**32 - 1))
def test_what_is_read_early_has_ended_whatever_the_order_of_launches(name, seed):
    """The device's rules, one launch after the other, where each of our ops may or may not be several."""
    graph = graph_of(name)
    mode, order = early_launch(graph).mode, shuffled(graph, seed)
    assert mode in {HEADS_START, HEADS_WAIT}
    at, ended, checked = {node: i for i, node in enumerate(order)}, 0, 0
    for i, node in enumerate(order):
        # `ended`: launches before this place have ended when the programs of launch i start.
        chosen = read_before_waiting(node)
        if chosen is not None:
            assert at[written_by(chosen)] < ended
            checked += 1
        if waits_first(node, mode):
            ended = i
    assert checked > 0
