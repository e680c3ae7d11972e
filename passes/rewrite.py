"""Run a site on the selected units only.

predict, gathered (decode):
    g = linear(x, Wg); u = linear(x, Wu); h = silu(g) * u; y = linear(h, Wo)
        ->
    index, count = select(source, down, up, bias)
    g = gathered_rows(x, Wg, index, count); u = gathered_rows(x, Wu, index, count)
    h = silu(g) * u; y = gathered_sum(h, Wo.T, index, count)

sketch scores the units from the site's own input and compacts the scores into a selection.

exact and gate compute the carrier (the activated gate) for every unit, `compact` it into a selection,
and skip what is left. Masked execution zeroes h outside the selection instead, token by token: the same
predictor, source and threshold, so that quality is measured on what runs fast.

Slot j < count of a gathered value belongs to unit index[j]; gathered values keep the dense shape, with
room for every unit. So the ops between leaves and output are copied as they are, whatever they are.
Values that something outside the site reads keep their dense nodes.
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx

import dejavu_compile.kernels  # noqa: F401  registers torch.ops.dejavu
from dejavu_compile.kernels.nibbles import is_packed

from .emit import Emitter
from .glu import as_glu
from .rewrite_heads import rewrite_heads
from .separable import aten, shape_of
from .site import Decision, Execution, Leaf, LeafKind, Policy, Projection, SiteKind

ops = torch.ops.dejavu


@dataclass(frozen=True, slots=True)
class Rewritten:
    """`selects` are the predictor nodes, in graph order, for the schedule to move."""

    modified: bool
    selects: tuple[fx.Node, ...] = ()


@dataclass(frozen=True, slots=True)
class _Selection:
    index: fx.Node
    count: fx.Node


def _tokens_by(emit: Emitter, value: fx.Node, width: int) -> fx.Node:
    """`value` [..., width] as [tokens, width]."""
    return emit.call(aten.reshape.default, value, [-1, width])


def _unit_rows(emit: Emitter, leaf: Leaf, units: int) -> tuple[fx.Node, fx.Node | None]:
    """The weight [units, in_features] and bias [units] of a ROWS leaf, as views."""
    projection = leaf.projection
    weight, bias = projection.weight, projection.bias
    if projection.contracted == 0:
        weight = emit.call(aten.t.default, weight)
    if (leaf.offset, leaf.step, projection.out_features) != (0, 1, units):
        stop = leaf.offset + leaf.step * (units - 1) + 1
        weight = emit.call(aten.slice.Tensor, weight, 0, leaf.offset, stop, leaf.step)
        if bias is not None:
            bias = emit.call(aten.slice.Tensor, bias, 0, leaf.offset, stop, leaf.step)
    return weight, bias


def _unit_columns(emit: Emitter, output: Projection) -> fx.Node:
    """The output projection's weight as [units, out_features], a view."""
    if output.contracted == 1:
        return emit.call(aten.t.default, output.weight)
    return output.weight


def _gather_leaf(emit: Emitter, leaf: Leaf, units: int, chosen: _Selection) -> fx.Node:
    """The leaf's values for the selected units, in slots, in the leaf's dense shape."""
    if leaf.kind is not LeafKind.ROWS:
        return emit.call(aten.index_select.default, leaf.node, leaf.dim, chosen.index)
    weight, bias = _unit_rows(emit, leaf, units)
    source = _tokens_by(emit, leaf.projection.input, leaf.projection.in_features)
    rows = emit.call(
        ops.gathered_rows.default, source, weight, bias, chosen.index, chosen.count, "identity"
    )
    return emit.call(aten.reshape.default, rows, list(_static(leaf.node)))


def _static(node: fx.Node) -> tuple[int, ...]:
    shape = shape_of(node)
    assert all(isinstance(size, int) for size in shape), "the plan gathers static shapes only"
    return shape


def _gathered(
    emit: Emitter, decision: Decision, chosen: _Selection, start: fx.Node | None
) -> None:
    """Replace the output projection. `start` is the carrier that `chosen` came from, if any."""
    site, units = decision.site, decision.site.units
    mapping: dict[fx.Node, fx.Node] = {}
    compacted = True
    if start is site.hidden:
        mapping[start], compacted = start, False
    elif start is not None:
        mapping[start] = emit.call(
            aten.index_select.default, start, site.dims[start], chosen.index
        )
    leaves = {emit.current(leaf.node): leaf for leaf in site.leaves}
    for node in _interior_after(decision, start):
        for value in node.all_input_nodes:
            if value in leaves and value not in mapping:
                mapping[value] = _gather_leaf(emit, leaves[value], units, chosen)
        mapping[node] = emit.copy(node, mapping)
    output = site.output
    result = emit.call(
        ops.gathered_sum.default,
        _tokens_by(emit, mapping[site.hidden], units),
        _unit_columns(emit, output),
        chosen.index,
        chosen.count,
        compacted,
        emit.arrived(output.out_features),
    )
    if output.bias is not None:
        result = emit.call(aten.add.Tensor, result, output.bias)
    dtype = output.node.meta["val"].dtype
    result = emit.call(aten.to.dtype, result, dtype)
    result = emit.call(aten.reshape.default, result, list(_static(output.node)))
    emit.replace(output.node, result)


def _interior_after(decision: Decision, start: fx.Node | None) -> list[fx.Node]:
    """The interior ops that still have to run once `start` is known."""
    site = decision.site
    interior = set(site.interior)
    pending, needed = [site.hidden], set()
    while pending:
        node = pending.pop()
        if node in interior and node is not start and node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return [node for node in site.interior if node in needed]


def _predicted(emit: Emitter, decision: Decision, tag: str) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The predictor's weights as static buffers."""
    weights = decision.predictor
    return (
        emit.buffer(f"dejavu_{tag}_down", weights.down),
        emit.buffer(f"dejavu_{tag}_up", weights.up),
        emit.buffer(f"dejavu_{tag}_bias", weights.bias),
    )


def _sensitivity(emit: Emitter, decision: Decision, tag: str) -> fx.Node:
    """What a gate's units count, as a static buffer."""
    return emit.buffer(f"dejavu_{tag}_sensitivity", decision.sensitivity)


def _sketched(emit: Emitter, decision: Decision, tag: str) -> tuple[fx.Node, ...]:
    """The site's input [tokens, width], and the sketch as static buffers."""
    site, weights = decision.site, decision.sketch
    width = as_glu(site).gate.projection.in_features
    parts = ("gate", "up", "numbers")
    buffers = (emit.buffer(f"dejavu_{tag}_sketch_{p}", getattr(weights, p)) for p in parts)
    return _tokens_by(emit, site.input, width), *buffers


def _activated(emit: Emitter, value: fx.Node, activation: str) -> fx.Node:
    """`kernels/activations.py` in the graph's ops."""
    if activation == "gelu_tanh":
        return emit.call(aten.gelu.default, value, approximate="tanh")
    return emit.call(getattr(aten, activation).default, value)


def _sketch_score(emit: Emitter, decision: Decision, tag: str) -> fx.Node:
    """`sketch_score_reference` in the graph's ops, for any number of tokens."""
    x, gate, up, numbers = _sketched(emit, decision, tag)
    x = emit.call(aten.to.dtype, x, torch.float32)
    a, b, c, d, f = (emit.call(aten.select.int, numbers, 0, i) for i in range(5))

    def product(weight: fx.Node, scale: fx.Node, bias: fx.Node) -> fx.Node:
        scaled = emit.call(aten.mul.Tensor, emit.call(aten.linear.default, x, weight), scale)
        return emit.call(aten.add.Tensor, scaled, bias)

    known = product(_widened(emit, gate), a, b)
    known = emit.call(aten.abs.default, _activated(emit, known, as_glu(decision.site).activation))
    other = product(emit.call(ops.unpack_pairs.default, up), c, d)
    other = emit.call(aten.add.Tensor, emit.call(aten.mul.Tensor, other, other), f)
    return emit.call(aten.mul.Tensor, known, emit.call(aten.sqrt.default, other))


def _widened(emit: Emitter, matrix: fx.Node) -> fx.Node:
    """A predictor's matrix in fp32."""
    if is_packed(matrix.meta["val"]):
        matrix = emit.call(ops.unpack.default, matrix)
    return emit.call(aten.to.dtype, matrix, torch.float32)


def _masked(emit: Emitter, decision: Decision, tag: str) -> None:
    """Zero the hidden units outside the selection, each token on its own."""
    site = decision.site
    hidden = site.hidden
    if decision.policy is Policy.PREDICT:
        down, up, bias = _predicted(emit, decision, tag)
        width = decision.predictor.source_width
        source = emit.call(aten.to.dtype, _tokens_by(emit, decision.source, width), torch.float32)
        down, up = _widened(emit, down), _widened(emit, up)
        score = emit.call(aten.linear.default, source, down)
        score = emit.call(aten.linear.default, score, up, bias)
        dropped = emit.call(aten.le.Scalar, score, 0.0)
    elif decision.policy is Policy.SKETCH:
        score = _sketch_score(emit, decision, tag)
        dropped = emit.call(aten.le.Scalar, score, decision.threshold)
    else:
        score = emit.call(aten.abs.default, _tokens_by(emit, site.gate.node, site.units))
        if decision.sensitivity is not None:
            score = emit.call(aten.mul.Tensor, score, _sensitivity(emit, decision, tag))
        dropped = emit.call(aten.le.Scalar, score, decision.threshold)
    # Written as "not above", so that a NaN score or activation is kept and stays visible.
    dropped = emit.call(aten.reshape.default, dropped, _like(emit, hidden))
    result = emit.call(aten.masked_fill.Scalar, hidden, dropped, 0.0)
    site.output.node.replace_input_with(hidden, result)


def _like(emit: Emitter, node: fx.Node) -> list:
    return [
        size if isinstance(size, int) else emit.call(aten.sym_size.int, node, dim)
        for dim, size in enumerate(shape_of(node))
    ]


def rewrite(gm: fx.GraphModule, decisions: tuple[Decision, ...]) -> Rewritten:
    """Carry out `decisions` on the graph that their sites were found in, in place."""
    emit, selects = Emitter(gm), []
    for tag, decision in enumerate(decisions):
        site = decision.site
        if decision.policy is Policy.DENSE:
            continue
        if site.kind is SiteKind.ATTENTION:
            rewrite_heads(emit, decision, str(tag))
            continue
        if decision.execution is Execution.CACHE:
            raise ValueError(
                f"{site.name}: an MLP has no cache; expected gathered or masked execution"
            )
        if decision.execution is Execution.MASKED:
            if decision.policy is not Policy.EXACT:
                with emit.before(site.output.node):
                    _masked(emit, decision, str(tag))
            continue
        start = None
        if decision.policy not in {Policy.PREDICT, Policy.SKETCH}:
            carrier = site.exact if decision.policy is Policy.EXACT else site.gate
            start = carrier.node
        with emit.before(site.output.node):
            if decision.policy is Policy.SKETCH:
                sketch, activation = _sketched(emit, decision, str(tag)), as_glu(site).activation
                score = emit.call(ops.sketch_score.default, *sketch, activation)
                pair = emit.call(ops.compact.default, score, decision.threshold)
            elif start is None:
                weights = _predicted(emit, decision, str(tag))
                source = _tokens_by(emit, decision.source, decision.predictor.source_width)
                pair = emit.call(ops.select.default, source, *weights)
                selects.append(pair)
            else:
                score = _tokens_by(emit, start, site.units), decision.threshold
                if decision.sensitivity is not None:
                    score = *score, _sensitivity(emit, decision, str(tag))
                pair = emit.call(ops.compact.default, *score)
            chosen = _Selection(*(emit.call(operator.getitem, pair, i) for i in (0, 1)))
            _gathered(emit, decision, chosen, start)
    modified = any(d.policy is not Policy.DENSE for d in decisions)
    if modified:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return Rewritten(modified, tuple(selects))
