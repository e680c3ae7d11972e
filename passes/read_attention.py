"""Read attention of one query per sequence, called or spelled out op by op, as what one op computes.

    softmax(softcap * tanh(q @ k.T * scale / softcap) + alibi + mask) @ v   ->   Attention(q, k, v, [alibi, mask], ...)

The logits of a softmax are followed back to the product of queries and keys. Casts, views of the leading
dims, scalings, one tanh and whatever is added or filled in are folded into the arguments of
`decode_attention`; anything else in between means that this attention stays as it is.
"""

import sys
from dataclasses import dataclass, replace

import torch
from torch import fx

import dejavu_compile.kernels  # noqa: F401  registers torch.ops.dejavu
from dejavu_compile._compat import storage_id

from .emit import Emitter
from .in_place import targets_of
from .separable import (
    ADD,
    DIVIDE,
    IDENTITY,
    MULTIPLY,
    PRODUCTS,
    SDPA,
    SOFTMAX,
    VIEWS,
    aten,
    same_size,
    shape_of,
)

ops = torch.ops.dejavu
SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
TANH = aten.tanh.default
FULL = {aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0}
LOWEST_LOGIT = -1e4  # exp of anything this far below another logit is 0 in fp32


@dataclass(frozen=True, slots=True)
class Bias:
    """A value added to logits of `rank` dims: `value` itself, or `fill` where it is true (or isn't)."""

    value: fx.Node
    rank: int
    fill: float | None = None
    where: bool = True


@dataclass(frozen=True, slots=True)
class Attention:
    """softmax(cap(scale * q @ k.T) + biases) @ v with one query per sequence: what replaces `end`.

    `q`, `k` and `v` are [batch, heads, length, dim] or, where `end` is, [batch * heads, length, dim];
    `keys_last`: k is [..., dim, length] instead. `mask` is boolean. `divisor` divides q.
    """

    end: fx.Node
    batch: int
    heads: int
    q: fx.Node
    k: fx.Node
    v: fx.Node
    keys_last: bool = False
    mask: fx.Node | None = None
    biases: tuple[Bias, ...] = ()
    scale: float = 1.0
    softcap: float = 0.0
    divisor: fx.Node | None = None

    @property
    def kv_heads(self) -> int:
        """Heads of keys, which several heads of queries may share."""
        shape = shape_of(self.k)
        return shape[1] if len(shape) == 4 else self.heads

    @property
    def sizes(self) -> tuple[int | torch.SymInt, ...]:
        """The shape of the keys."""
        return shape_of(self.k)


def as_decode_attention(core: fx.Node) -> Attention | None:
    """Read `scaled_dot_product_attention`, or the softmax of one that is spelled out; None: it can't be."""
    if core.target is SDPA:
        found = _called(core)
    elif core.target in SOFTMAX:
        found = _spelled_out(core)
    else:
        return None
    if found is None or len({n.meta["val"].dtype for n in (found.q, found.k, found.v)}) > 1:
        return None
    return found if _has_keys_of_its_own(found) else None


def _has_keys_of_its_own(found: Attention) -> bool:
    """Whether every sequence has keys and values, its heads share them evenly, and nothing makes more sequences or heads of them.

    The op reads a cache by its query's number: of one that is broadcast it would read what lies behind.
    """
    q, k, v, end = (_lead(found, node) for node in (found.q, found.k, found.v, found.end))
    if any(lead is None or not isinstance(lead[1], int) for lead in (q, k, v, end)):
        return False
    if not all(same_size(lead[:1], (found.batch,)) for lead in (q, k, v, end)):
        return False
    return q[1] == end[1] == found.heads and k[1] == v[1] and found.heads % k[1] == 0


def _lead(found: Attention, node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    """The sequences and heads of a value of attention, also where they are one dim; None: that doesn't hold all of them."""
    shape, both = shape_of(node), (found.batch, found.heads)
    if len(shape) == 4:
        return shape[:2]
    return both if same_size(shape[:1], both) else None


def _called(node: fx.Node) -> Attention | None:
    found = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None,
             **dict(zip(SDPA_NAMES, node.args, strict=False)), **node.kwargs}  # fmt: skip
    q, k, v, mask = (found[n] for n in SDPA_NAMES[:4])
    shape = shape_of(q)
    if len(shape) != 4 or shape[2] != 1 or found["dropout_p"] or found["is_causal"]:
        return None
    boolean = mask is not None and mask.meta["val"].dtype is torch.bool
    biases = () if mask is None or boolean else (Bias(mask, rank=4),)
    scale = found["scale"] if found["scale"] is not None else shape[3] ** -0.5
    k, v = _shared(k, v)
    return Attention(
        node, shape[0], shape[1], q, k, v, mask=mask if boolean else None, biases=biases, scale=scale
    )  # fmt: skip


def _spelled_out(softmax: fx.Node) -> Attention | None:
    shape = shape_of(softmax)
    dim = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs["dim"]
    if dim % len(shape) != len(shape) - 1 or len(shape) not in (3, 4) or shape[-2] != 1:
        return None
    batch, heads = shape[:2] if len(shape) == 4 else (shape[0], 1)
    end = _end(softmax)
    logits = _logits(softmax.args[0])
    if end is None or logits is None or not isinstance(batch, int) or not isinstance(heads, int):
        return None
    if _writes_between(logits.end, end):
        return None
    rank, keys_last, k, v = len(shape), True, _uncast(logits.k), _uncast(end.args[1])
    if k.target is aten.transpose.int and {d % rank for d in k.args[1:]} == {rank - 1, rank - 2}:
        keys_last, k = False, _uncast(k.args[0])
        if rank == 4:
            k, v = _shared(k, v)
    return replace(
        logits, end=end, batch=batch, heads=heads, q=_uncast(logits.q), k=k, v=v, keys_last=keys_last
    )  # fmt: skip


def _end(node: fx.Node) -> fx.Node | None:
    """The product of the softmax with the values, where nothing else reads it."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in PRODUCTS:
            return user if user.args[0] is node and len(shape_of(user)) in (3, 4) else None
        if not _passes(user):
            return None
        node = user
    return None


def _writes_between(start: fx.Node, end: fx.Node, into: fx.Node | None = None) -> bool:
    """Something is written in place on the way (into the memory of `into`, where that is given): a node there may not keep the value
    that it was made with."""
    memory = None if into is None else storage_id(into.meta["val"])
    node = start
    while node is not end:
        if any(into is None or storage_id(t.meta["val"]) == memory for t in targets_of(node)):
            return True
        node = node.next
    return False


def _passes(node: fx.Node) -> bool:
    """Keeps values, and their last two dims."""
    if node.target in IDENTITY:
        return node.target is not aten.dropout.default or not node.args[2]
    return node.target in VIEWS and same_size(shape_of(node)[-2:], shape_of(node.args[0])[-2:])


def _uncast(node: fx.Node) -> fx.Node:
    """Without a copy or a widening, which the op does itself."""
    while node.target in IDENTITY and _passes(node):
        source = node.args[0]
        if source.meta["val"].dtype.itemsize > node.meta["val"].dtype.itemsize:
            break
        node = source
    return node


def _logits(node: object) -> Attention | None:
    """What is known of the attention from a value between the product of queries and keys and the softmax."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or shape_of(node) is None:
        return None
    target, rank = node.target, len(shape_of(node))
    if target in PRODUCTS:
        q, k = node.args[:2]
        fits = rank in (3, 4) and len(shape_of(q)) == len(shape_of(k)) == rank
        return Attention(node, 0, 0, q, k, k) if fits else None
    if target is aten.baddbmm.default:
        added, q, k = node.args
        beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
        biases = (Bias(added, rank),) if beta == 1 else ()
        return (
            Attention(node, 0, 0, q, k, k, biases=biases, scale=alpha) if beta in (0, 1) else None
        )
    if _passes(node):
        return _logits(node.args[0])
    if target is TANH:
        inner = _logits(node.args[0])
        bent = inner is None or inner.softcap or inner.biases
        return None if bent else replace(inner, softcap=1.0)
    if target in MULTIPLY | DIVIDE:
        return _scaled(node)
    return _biased(node, rank)


def _scaled(node: fx.Node) -> Attention | None:
    (inner, factor), divides = node.args[:2], node.target in DIVIDE
    if not isinstance(inner, fx.Node) and not divides:
        inner, factor = factor, inner
    found = _logits(inner)
    if found is None or found.biases:
        return None
    if isinstance(factor, fx.Node):  # a scale that is a tensor: GPT-J's
        plain = divides and not shape_of(factor) and found.divisor is None and not found.softcap
        return replace(found, divisor=factor) if plain else None
    if not isinstance(factor, int | float) or (divides and factor == 0):
        return None
    factor = 1 / factor if divides else factor
    if found.softcap:
        return replace(found, softcap=found.softcap * factor)
    return replace(found, scale=found.scale * factor)


def _biased(node: fx.Node, rank: int) -> Attention | None:
    args, target = node.args, node.target
    if target in ADD - {aten.sub.Tensor} and not node.kwargs and len(args) == 2:
        for inner, other in (args, args[::-1]):
            if isinstance(other, fx.Node) and (found := _wide(inner, rank)) is not None:
                return _with(found, Bias(other, rank))
        return None
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        found, mask, fill, where = _wide(args[0], rank), args[1], _number(args[2]), True
    elif target in (aten.where.self, aten.where.ScalarOther):
        found, mask, fill, where = _wide(args[1], rank), args[0], _number(args[2]), False
    else:
        return None
    # Adding so low a number leaves the same weight as filling it in: none.
    if found is None or fill is None or fill > LOWEST_LOGIT:
        return None
    return _with(found, Bias(mask, rank, fill, where))


def _number(value: object) -> float | None:
    """A number that was written into the program, as such or as a tensor that is full of it."""
    while isinstance(value, fx.Node) and value.target in IDENTITY:
        value = value.args[0]
    if isinstance(value, fx.Node) and value.target in FULL:
        value = value.args[FULL[value.target]]
    return value if isinstance(value, int | float) else None


def _wide(node: object, rank: int) -> Attention | None:
    """The logits of a value that isn't broadcast."""
    found = _logits(node)
    return found if found is not None and len(shape_of(node)) == rank else None


def _with(found: Attention, bias: Bias) -> Attention:
    return replace(found, biases=(*found.biases, bias))


# --- keys that several heads share ---------------------------------------------------------------------


def _shared(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values as they are before they are repeated for the heads of each group."""
    keys, values = _unexpanded(k), _unexpanded(v)
    return (keys, values) if shape_of(keys)[1] == shape_of(values)[1] else (k, v)


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


# --- the op that takes its place -----------------------------------------------------------------------


def emit_attention(emit: Emitter, found: Attention, score: fx.Node | None) -> None:
    """Replace `found.end` by the op. `score` [batch, heads]: which heads run, None for all."""
    scale = found.scale * _take_scale(emit, emit.current(found.q), found.end)
    with emit.before(found.end):
        q = emit.current(found.q)
        if found.divisor is not None:
            dtype = q.meta["val"].dtype
            q = emit.call(aten.to.dtype, emit.call(aten.div.Tensor, q, found.divisor), dtype)
        q, k, v = (_in_four(emit, found, x) for x in (q, found.k, found.v))
        if found.keys_last:
            k = emit.call(aten.transpose.int, k, -1, -2)
        mask = None if found.mask is None else _with_leading(emit, found.mask, 4)
        for bias in found.biases:
            added = _added(emit, found, bias)
            mask = added if mask is None else emit.call(aten.add.Tensor, mask, added)
        if score is not None:
            score = emit.call(aten.reshape.default, score, [found.batch, found.heads])
        arguments = (q, k, v, mask, scale, found.softcap, score)
        if q.meta["val"].is_cuda:
            more = emit.arrived(found.batch * found.kv_heads)
            y = emit.call(ops.decode_attention.default, *arguments, more)
        else:
            y = emit.call(ops.decode_attention_cpu.default, *arguments)
        value = found.end.meta["val"]
        if value.dim() == 3:
            y = emit.call(aten.reshape.default, y, [found.batch * found.heads, 1, value.shape[-1]])
        if y.meta["val"].dtype is not value.dtype:
            y = emit.call(aten.to.dtype, y, value.dtype)
    emit.replace(found.end, y)


def _take_scale(emit: Emitter, q: fx.Node, end: fx.Node) -> float:
    """The number that a query is multiplied by, which it no longer is: a launch less. 1 where there is none.

    What is multiplied is read at `end` then.
    """
    node = q
    moved = {aten.transpose.int, aten.permute.default}
    while node.target in VIEWS | moved and len(node.users) == 1:
        node = node.args[0]
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar) or len(node.users) > 1:
        return 1.0
    value, factor = node.args
    if (
        not isinstance(factor, int | float)
        or value.meta["val"].dtype is not node.meta["val"].dtype
        or _writes_between(node, end, into=value)
    ):
        return 1.0
    emit.replace(node, value)
    node.graph.erase_node(node)
    return factor


def _added(emit: Emitter, found: Attention, bias: Bias) -> fx.Node:
    """What `bias` adds to logits."""
    value = emit.current(bias.value)
    if bias.fill is not None:
        inside, outside = (bias.fill, 0.0) if bias.where else (0.0, bias.fill)
        value = emit.call(aten.where.Scalar, value, inside, outside)
    return _in_four(emit, found, _with_leading(emit, value, bias.rank))


def _with_leading(emit: Emitter, node: fx.Node, rank: int) -> fx.Node:
    """A value that broadcasts to `rank` dims, with that many."""
    node = emit.current(node)
    while len(shape_of(node)) < rank:
        node = emit.call(aten.unsqueeze.default, node, 0)
    return node


def _in_four(emit: Emitter, found: Attention, node: fx.Node) -> fx.Node:
    """A value of [batch * heads, ...], or of 1 for both, as [batch, heads, ...]."""
    node = emit.current(node)
    if len(shape_of(node)) == 4:
        return node
    if shape_of(node)[0] == 1:
        return emit.call(aten.unsqueeze.default, node, 0)
    return emit.call(aten.unflatten.int, node, 0, [found.batch, found.heads])
