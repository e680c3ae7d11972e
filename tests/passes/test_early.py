"""What kernels may read before the one before them has ended."""

import random
from functools import cache
from unittest import mock

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import decode_graph, texts, tiny
from torch import nn

import dejavu_compile as dv
from dejavu_compile.kernels import EARLY, HEADS_START, ROWS_START
from dejavu_compile.passes import gemv
from dejavu_compile.passes.early import early_launch
from dejavu_compile.passes.emit import Emitter
from dejavu_compile.passes.gemv import use_gemv
from dejavu_compile.passes.in_place import targets_of

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


def test_a_computed_predictor_may_not():
    def predict(emit, node):
        x, (weight, *_) = node.args[:2]
        with emit.before(node):
            doubled = emit.call(torch.ops.aten.mul.Tensor, weight, 2)
            up, bias = (emit.call(torch.ops.aten.zeros.default, size) for size in ([8, 24], [8]))
            emit.call(ops.select.default, x, doubled, up, bias)

    assert "select_default reads mul" in reason_for(nn.Linear(32, 24), predict)


@pytest.mark.parametrize(
    ("spell", "reason"),
    [
        (lambda emit, bias: emit.call(torch.ops.aten.mul.Tensor, bias, 2), "the graph computes"),
        (lambda emit, bias: emit.call(torch.ops.aten.as_strided.default, bias, [24], [0]), "makes a copy"),
    ],
    ids=["computed", "strided"],
)  # fmt: skip
def test_a_bias_is_read_early_like_a_weight(spell, reason):
    def change(emit, node):
        x, (weight,), (bias,), *rest = node.args
        with emit.before(node):
            node.args = (x, [weight], [spell(emit, bias)], *rest)

    assert reason in reason_for(nn.Linear(32, 24), change)


@pytest.mark.parametrize(
    "name", ["opt", "gpt2"]
)  # of which the rows and the projections have a bias
@torch.no_grad()
def test_biases_of_rows_are_read_early_like_weights(name):
    graph = decode_step(name, "side_stream", density=0.5, policy="predict")
    assert early_launch(graph).mode & ROWS_START
    rows = calls(graph, ops.gathered_rows.default)[-1]
    emit = Emitter(graph.owning_module)
    with emit.before(rows):
        doubled = emit.call(torch.ops.aten.mul.Tensor, rows.args[2], 2)
    rows.args = (*rows.args[:2], doubled, *rows.args[3:])
    assert not early_launch(graph).mode & ROWS_START


def test_a_weight_that_is_written_may_not():
    def write(emit, node):
        with emit.before(node):
            emit.call(torch.ops.aten.mul_.Tensor, node.args[1][0], 2)

    with torch.no_grad():
        assert "or writes" in reason_for(nn.Linear(32, 24), write)


def decode_step(name, issue="inline", **how):
    """The graph of a decode step of a tiny decoder of three layers, as our passes leave it."""
    model = tiny(name, layers=3)
    dv.calibrate(model, texts(), progress=False, **how)
    return decode_graph(model, issue=issue)


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
    assert early_launch(graph).mode == EARLY | HEADS_START
    # Without the rows between them, a sum could start before its selection is there.
    alone = next(node for node in calls(graph, ops.gathered_sum.default) if node.args[4])
    alone.args = (graph.find_nodes(op="placeholder")[0], *alone.args[1:])
    found = early_launch(graph)
    assert found.mode == 0
    assert f"{alone.name} reads" in found.reason


@torch.no_grad()
def test_rows_read_early_what_the_side_stream_selected():
    graph = decode_step("opt", "side_stream", density=0.5)
    assert early_launch(graph).mode == EARLY | HEADS_START | ROWS_START
    # Where they don't wait first, those that skip heads have to.
    with_heads = decode_step("opt", "side_stream", density=0.5, head_density=0.5)
    assert early_launch(with_heads).mode == EARLY | ROWS_START
    # Each of a selection has to have been joined,
    join = calls(graph, ops.select_join.default)[-1]
    source = join.args[3]
    pieces = source.meta["val"].new_empty(source.meta["val"].shape[::-1]).T
    with mock.patch.dict(source.meta, val=pieces.expand(2, -1)[:, ::2]):
        assert early_launch(graph).mode == EARLY | HEADS_START
    # and no weight be written that they read.
    rows = calls(graph, ops.gathered_rows.default)[-1]
    with graph.inserting_before(rows):
        graph.call_function(torch.ops.aten.mul_.Tensor, (rows.args[1], 2))
    assert early_launch(graph).mode == EARLY | HEADS_START


@torch.no_grad()
def test_where_no_rows_are_gathered_kernels_that_skip_heads_wait_first():
    graph = decode_step("opt", density=1.0, head_density=0.5)
    assert calls(graph, ops.head_sum.default)
    assert not calls(graph, ops.gathered_rows.default)
    assert early_launch(graph).mode == EARLY


@torch.no_grad()
def test_a_scale_that_the_graph_writes_may_not_be_read_early():
    graph = decode_step("llama", density=0.5, policy="gate")
    compact = calls(graph, ops.compact.default)[0]
    assert early_launch(graph).mode == EARLY | HEADS_START
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
    "opt, side stream": {"density": 0.5, "issue": "side_stream"},
    "opt, side stream, heads": {"density": 0.5, "head_density": 0.5, "issue": "side_stream"},
    "llama, side stream": {"density": 0.5, "policy": "predict", "issue": "side_stream"},
}


@cache
def graph_of(name):
    with torch.no_grad():
        return decode_step(name.split(",")[0], **DECODERS[name])


def shuffled(graph, seed):
    """The ops of a graph in an order that their inputs allow, that keeps ops that write among themselves, and what reads after
    them."""
    pick, order, last, writer = random.Random(seed), [], None, {}
    missing, users = {}, {node: [] for node in graph.nodes}
    for node in graph.nodes:
        needed = set(node.all_input_nodes)
        needed |= {writer[value] for value in node.all_input_nodes if value in writer}
        writer |= dict.fromkeys(targets_of(node), node)
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


ROWS = {ops.gathered_rows.default: 3, ops.gathered_glu.default: 5}


def waits_first(node, mode):
    """As the kernels are written (`start_next`)."""
    if node.target in ROWS:
        return not mode & ROWS_START
    if node.target is ops.gathered_sum.default:
        return not node.args[4]
    scores = {ops.gemv.default: 5, ops.decode_attention.default: 6}.get(node.target, 9)
    skips_heads = len(node.args) > scores and node.args[scores] is not None
    return skips_heads and not mode & HEADS_START


def read_before_waiting(node, mode):
    if node.target in ROWS and mode & ROWS_START:
        return node.args[ROWS[node.target]]
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
    assert mode
    at, ended, joined, checked = {node: i for i, node in enumerate(order)}, 0, set(), 0
    for i, node in enumerate(order):
        # `ended`: launches before this place have ended when the programs of launch i start.
        chosen = read_before_waiting(node, mode)
        if chosen is not None:
            made = written_by(chosen)
            assert made in joined or at[made] < ended
            checked += 1
        if waits_first(node, mode):
            ended = i
        if node.target is ops.select_join.default:
            joined.add(node.args[0])
    assert checked > 0
