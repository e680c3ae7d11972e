"""Run the selected heads of an attention only.

    q = linear(x, Wq); y = attention(rope(q), k, v); o = linear(merge_heads(y), Wo)
        ->
    score = linear(source, Ws, bs)                                  where the source is made, a layer earlier
    q = gemv(x, [Wq], [bq], "identity", owner, score); y = decode_attention(rope(q), k, v, score)
    o = head_sum(merge_heads(y), Wo.T, score)

Each token has its own selection: the heads whose score isn't at most zero. Heads keep their places, so the
ops in between stay as they are: what they compute for other heads is read by nothing. Keys and values that a
cache needs are computed for every head. Attention that `read_attention` can't read runs for all heads, between
sparse projections.
"""

import torch
from torch import fx

import dejavu_compile.kernels  # noqa: F401  registers torch.ops.dejavu

from .emit import Emitter
from .read_attention import as_decode_attention, emit_attention
from .separable import aten, shape_of
from .site import Core, Decision, Execution, OwnedRows, Projection

ops = torch.ops.dejavu


def _tokens_by(emit: Emitter, value: fx.Node, width: int) -> fx.Node:
    return emit.call(aten.reshape.default, value, [-1, width])


def _score(emit: Emitter, decision: Decision, tag: str) -> fx.Node:
    """[tokens, heads], in the model's dtype."""
    predictor = decision.predictor
    weight = emit.buffer(f"dejavu_{tag}_up", predictor.up)
    bias = emit.buffer(f"dejavu_{tag}_bias", predictor.bias.to(predictor.up.dtype))
    score = emit.call(aten.linear.default, decision.source, weight, bias)
    return _tokens_by(emit, score, decision.site.units)


def _score_of_heads(emit: Emitter, score: fx.Node, core: Core, name: str) -> fx.Node:
    """[tokens, heads of the core]: that of the unit which needs each head."""
    if core.units == tuple(range(shape_of(score)[-1])):
        return score
    units = torch.tensor(core.units, device=score.meta["val"].device)
    return emit.call(aten.index_select.default, score, 1, emit.buffer(name, units))


def _rows(emit: Emitter, owned: OwnedRows, score: fx.Node, name: str) -> None:
    """Replace a projection by one that skips the rows of heads that no token runs."""
    projection = owned.projection
    device = projection.weight.meta["val"].device
    owner = emit.buffer(name, owned.owner.to(device))
    weight = projection.weight
    if projection.contracted == 0:
        weight = emit.call(aten.t.default, weight)
    source = _tokens_by(emit, projection.input, projection.in_features)
    y = emit.call(ops.gemv.default, source, [weight], [projection.bias], "identity", owner, score)
    shape = list(shape_of(projection.node))
    emit.replace(projection.node, emit.call(aten.reshape.default, y, shape))


def _output(emit: Emitter, output: Projection, score: fx.Node) -> None:
    weight = output.weight
    if output.contracted == 1:
        weight = emit.call(aten.t.default, weight)
    hidden = _tokens_by(emit, output.input, output.in_features)
    arrived = emit.arrived(output.out_features)
    result = emit.call(ops.head_sum.default, hidden, weight, score, arrived)
    if output.bias is not None:
        result = emit.call(aten.add.Tensor, result, output.bias)
    result = emit.call(aten.to.dtype, result, output.node.meta["val"].dtype)
    shape = list(shape_of(output.node))
    emit.replace(output.node, emit.call(aten.reshape.default, result, shape))


def _masked(emit: Emitter, decision: Decision, dropped: fx.Node) -> None:
    """Zero the other heads before the output projection, each token on its own."""
    site = decision.site
    hidden, units = site.hidden, site.units
    heads = emit.call(aten.reshape.default, hidden, [-1, units, site.width])
    kept = emit.call(
        aten.masked_fill.Scalar, heads, emit.call(aten.unsqueeze.default, dropped, -1), 0.0
    )
    shape = [
        s if isinstance(s, int) else emit.call(aten.sym_size.int, hidden, dim)
        for dim, s in enumerate(shape_of(hidden))
    ]
    result = emit.call(aten.reshape.default, kept, shape)
    site.output.node.replace_input_with(emit.current(hidden), result)


def rewrite_heads(emit: Emitter, decision: Decision, tag: str) -> None:
    """Carry out a decision about an attention site."""
    site, execution = decision.site, decision.execution
    with emit.before(decision.source.next):
        score = _score(emit, decision, tag)
    if execution is not Execution.MASKED:
        for i, core in enumerate(site.cores):
            attention = as_decode_attention(core.node)
            if attention is not None:
                with emit.before(core.node):
                    of_heads = _score_of_heads(emit, score, core, f"dejavu_{tag}_heads{i}")
                emit_attention(emit, attention, of_heads)
    if execution is not Execution.GATHERED:
        with emit.before(site.output.node):
            _masked(emit, decision, emit.call(aten.le.Scalar, score, 0.0))
        return
    for i, owned in enumerate(o for o in site.owned if o.per_unit):
        with emit.before(owned.projection.node):
            _rows(emit, owned, score, f"dejavu_{tag}_owner{i}")
    with emit.before(site.output.node):
        _output(emit, site.output, score)
