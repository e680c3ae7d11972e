"""Run the selected heads of an attention only.

    q = linear(x, Wq); y = attention(rope(q), k, v); o = linear(merge_heads(y), Wo)
        ->
    score = linear(source, Ws, bs)                                  where the source is made, a layer earlier
    q = gemv(x, [Wq], [bq], "identity", owner, score); y = decode_attention(rope(q), k, v, score)
    o = head_sum(merge_heads(y), Wo.T, score)

Each token has its own selection: the heads whose score isn't at most zero. Heads keep their places, so the ops in between stay as they are: what they
compute for other heads is read by nothing. Keys and values that a cache needs are computed for every head.
Attention spelled out op by op (scores, softmax, values) runs for all heads, between sparse projections.
"""

import sys
from dataclasses import dataclass

import torch
from torch import fx

import dejavu_compile.kernels  # noqa: F401  registers torch.ops.dejavu

from .emit import Emitter
from .find_heads import SDPA
from .separable import aten, shape_of
from .site import Decision, Execution, OwnedRows, Projection

ops = torch.ops.dejavu
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True, slots=True)
class Attention:
    """The arguments of a `scaled_dot_product_attention` node with one query per sequence."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float

    @property
    def groups(self) -> int:
        """Sequences times heads of keys."""
        return shape_of(self.q)[0] * shape_of(self.k)[1]


def as_decode_attention(node: fx.Node) -> Attention | None:
    """Read a node as attention that `decode_attention` computes, keys shared by heads read where they are."""
    if node.target is not SDPA:
        return None
    found = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None,
             **dict(zip(NAMES, node.args, strict=False)), **node.kwargs}  # fmt: skip
    q, k, v, mask = (found[n] for n in ("query", "key", "value", "attn_mask"))
    if len(shape_of(q)) != 4 or shape_of(q)[2] != 1 or found["dropout_p"] or found["is_causal"]:
        return None
    if mask is not None and (
        len(shape_of(mask)) != 4 or mask.meta["val"].dtype not in {torch.bool, q.meta["val"].dtype}
    ):
        return None
    scale = found["scale"] if found["scale"] is not None else shape_of(q)[3] ** -0.5
    shared = _unexpanded(k), _unexpanded(v)
    if shape_of(shared[0])[1] == shape_of(shared[1])[1]:
        k, v = shared
    return Attention(q, k, v, mask, scale)


def _unexpanded(node: fx.Node) -> fx.Node:
    """The [b, g, s, d] value that `node` repeats for the heads of each group, or `node` itself.

    `repeat_kv` is an unsqueeze, an expand and a reshape: a copy of the whole cache each step.
    """
    reshaped = node
    while reshaped.target in (aten.clone.default, aten.contiguous.default):
        reshaped = reshaped.args[0]
    if reshaped.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return node
    expanded = reshaped.args[0]
    if expanded.target is not aten.expand.default or len(shape_of(expanded)) != 5:
        return node
    unsqueezed = expanded.args[0]
    while _slices_nothing(unsqueezed):  # x[:, :, None, :, :] with a length that has no number
        unsqueezed = unsqueezed.args[0]
    if unsqueezed.target is not aten.unsqueeze.default or unsqueezed.args[1] not in (2, -3):
        return node
    base = unsqueezed.args[0]
    (_, groups, repeats, *_), (_, heads, *_) = shape_of(expanded), shape_of(reshaped)
    if shape_of(base)[1] != groups or groups * repeats != heads:
        return node
    return base


def _slices_nothing(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    _, _, start, stop, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    return start in (0, None) and step == 1 and (stop is None or stop == sys.maxsize)


def _tokens_by(emit: Emitter, value: fx.Node, width: int) -> fx.Node:
    return emit.call(aten.reshape.default, value, [-1, width])


def _score(emit: Emitter, decision: Decision, tag: str) -> fx.Node:
    """[tokens, heads], in the model's dtype."""
    predictor = decision.predictor
    weight = emit.buffer(f"dejavu_{tag}_up", predictor.up)
    bias = emit.buffer(f"dejavu_{tag}_bias", predictor.bias.to(predictor.up.dtype))
    score = emit.call(aten.linear.default, decision.source, weight, bias)
    return _tokens_by(emit, score, decision.site.units)


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
    site = decision.site
    with emit.before(decision.source.next):
        score = _score(emit, decision, tag)
    if decision.execution is Execution.MASKED:
        with emit.before(site.output.node):
            _masked(emit, decision, emit.call(aten.le.Scalar, score, 0.0))
        return
    for i, owned in enumerate(o for o in site.owned if o.per_unit):
        with emit.before(owned.projection.node):
            _rows(emit, owned, score, f"dejavu_{tag}_owner{i}")
    for core in site.cores:
        attention = as_decode_attention(core)
        if attention is not None and shape_of(attention.q)[1] == site.units:
            with emit.before(core):
                y = emit.call(
                    ops.decode_attention.default,
                    attention.q, attention.k, attention.v, attention.mask, attention.scale, score,
                    emit.arrived(attention.groups),
                )  # fmt: skip
            emit.replace(core, y)
    with emit.before(site.output.node):
        _output(emit, site.output, score)
