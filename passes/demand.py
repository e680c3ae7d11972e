"""Which unit is each element of each value needed for?

The separable axis of attention is a head, and heads hide inside other axes: a projection's rows lie
[head, head_dim], or [head, q k v, head_dim], or [group, head in group, head_dim], and views, transposes,
slices and rotary embeddings rearrange them. So instead of following an axis, follow every element: the
input of the output projection is labelled with the unit that owns each element, and labels are pushed back
through the graph, op by op. An element gets

    u         if only unit u's contribution depends on it,
    MANY      if several units' do, or anything outside the region reads it (a cache write, an output),
    NOBODY    if nothing does.

What is labelled u need not be computed when u isn't selected; that is all that a rewrite has to know. An op
that isn't listed here is not looked through: its inputs are needed by many. (design: "the separable axis")

Labels are int32 tensors of the value's shape (symbolic sizes by their hints), expanded wherever possible, so
that those of a long cache cost nothing.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dejavu_compile._compat import unset_fake_temporarily

from .separable import IDENTITY, VIEWS, aten, is_pointwise

MANY = -1
NOBODY = -2

Pushed = Iterator[tuple[fx.Node, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """`labels` of every value in the region, in no order; `region` holds the ops that were looked through.

    `ends` are those where looking ended, since all of what they compute is needed by many.
    """

    labels: dict[fx.Node, Tensor]
    region: frozenset[fx.Node]
    ends: frozenset[fx.Node]


def sizes(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a tensor-valued node with a number for every symbol; None where there is none."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    found = [s if isinstance(s, int) else s.node.hint for s in value.shape]
    return None if None in found else tuple(found)


def merged(label: Tensor, dims: tuple[int, ...], *, keepdim: bool = True) -> Tensor:
    """What an element is needed for that all elements along `dims` are computed from."""
    if not dims or 0 in label.shape:
        return label
    low, high = label.amin(dims, keepdim=True), label.amax(dims, keepdim=True)
    result = torch.where(low == high, high, MANY)
    return result if keepdim else result.squeeze(dims)


def _united(one: Tensor, other: Tensor) -> Tensor:
    """Two readers of the same value."""
    either = torch.where(one == NOBODY, other, one)
    return torch.where((one == other) | (one == NOBODY) | (other == NOBODY), either, MANY)


def _to_shape(label: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo a broadcast of `shape` to the label's."""
    label = merged(label, tuple(range(label.dim() - len(shape))), keepdim=True)
    label = label.reshape(label.shape[label.dim() - len(shape) :])
    wide = tuple(d for d, s in enumerate(shape) if s == 1 and label.shape[d] != 1)
    return merged(label, wide)


# --- one handler a family of ops: (node, label of its output) -> labels of its inputs ----------------


def _same(node: fx.Node, label: Tensor) -> Pushed:
    yield node.args[0], label


def _pointwise(node: fx.Node, label: Tensor) -> Pushed:
    for source in node.all_input_nodes:
        shape = sizes(source)
        if shape is not None:
            yield source, _to_shape(label, shape)


def _view(node: fx.Node, label: Tensor) -> Pushed:
    yield node.args[0], label.reshape(sizes(node.args[0]))


def _expand(node: fx.Node, label: Tensor) -> Pushed:
    yield node.args[0], _to_shape(label, sizes(node.args[0]))


def _transpose(node: fx.Node, label: Tensor) -> Pushed:
    yield node.args[0], label.transpose(*node.args[1:3])


def _permute(node: fx.Node, label: Tensor) -> Pushed:
    rank = label.dim()
    inverse = [0] * rank
    for at, dim in enumerate(node.args[1]):
        inverse[dim % rank] = at
    yield node.args[0], label.permute(inverse)


def _filled(value: Tensor, label: int) -> Tensor:
    shape = [s if isinstance(s, int) else s.node.hint for s in value.shape]
    return torch.full((), label, dtype=torch.int32).expand(shape)


def _nobody(node: fx.Node) -> Tensor:
    return _filled(node.meta["val"], NOBODY).clone()


def _slice(node: fx.Node, label: Tensor) -> Pushed:
    source, dim, start, stop, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    if not all(x is None or isinstance(x, int) for x in (start, stop, step)):
        return
    whole = _nobody(source)
    at = [slice(None)] * whole.dim()
    at[dim] = slice(start, stop, step)
    whole[tuple(at)] = label
    yield source, whole


def _select(node: fx.Node, label: Tensor) -> Pushed:
    source, dim, index = node.args
    if not isinstance(index, int):
        return
    whole = _nobody(source)
    whole.select(dim, index).copy_(label)
    yield source, whole


def _constant(node: fx.Node) -> Tensor | None:
    """The value of a tensor that was written into the program, as `x[:, [-1]]` does."""
    while node.op == "call_function" and node.target in IDENTITY:
        node = node.args[0]
    if node.op != "get_attr" or not str(node.target).startswith("_tensor_constant"):
        return None
    with unset_fake_temporarily():
        return getattr(node.graph.owning_module, node.target).cpu()


def _index(node: fx.Node, label: Tensor) -> Pushed:
    source, indices = node.args
    at: list[object] = []
    for index in indices:
        constant = slice(None) if index is None else _constant(index)
        if constant is None:
            return
        at.append(constant)
    whole = _nobody(source)
    whole[tuple(at)] = label
    yield source, whole


def _cat(node: fx.Node, label: Tensor) -> Pushed:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    pieces = node.args[0]
    lengths = [sizes(piece)[dim] for piece in pieces]
    yield from zip(pieces, label.split(lengths, dim), strict=True)


def _stack(node: fx.Node, label: Tensor) -> Pushed:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    yield from zip(node.args[0], label.unbind(dim), strict=True)


def _reduction(node: fx.Node, label: Tensor) -> Pushed:
    source = node.args[0]
    shape = sizes(source)
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    dims = dims or range(len(shape))
    for dim in sorted(d % len(shape) for d in dims):
        if label.dim() < len(shape):
            label = label.unsqueeze(dim)
    yield source, label.expand(shape)


def _mixes(dims: Callable[[fx.Node, int], tuple[int, ...]]) -> Callable[[fx.Node, Tensor], Pushed]:
    """Every element along `dims` of the output depends on every element along them of the input."""

    def handler(node: fx.Node, label: Tensor) -> Pushed:
        yield node.args[0], merged(label, dims(node, label.dim())).expand(label.shape)

    return handler


def _softmax_dims(node: fx.Node, rank: int) -> tuple[int, ...]:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
    return (dim % rank,)


def _norm_dims(node: fx.Node, rank: int) -> tuple[int, ...]:
    return tuple(range(rank - len(node.args[1]), rank))


def _product(node: fx.Node, label: Tensor) -> Pushed:
    *added, left, right = node.args[:3] if node.target is aten.baddbmm.default else node.args[:2]
    for source in added:
        yield source, _to_shape(label, sizes(source))
    if len(sizes(left)) < 2 or len(sizes(right)) < 2:
        return
    by_row, by_column = merged(label, (-1,)), merged(label, (-2,))
    for source, found in ((left, by_row), (right, by_column)):
        shape = sizes(source)
        wide = found.expand(*found.shape[:-2], *shape[-2:])
        yield source, _to_shape(wide, shape)


def _sdpa(node: fx.Node, label: Tensor) -> Pushed:
    query, key, value = node.args[:3]
    yield query, merged(label, (-1,)).expand(sizes(query))
    head = merged(label, (-1, -2))
    for source in (key, value):
        shape = sizes(source)
        of_source = head
        if shape[-3] != head.shape[-3]:  # enable_gqa: consecutive heads share one of the keys
            of_source = head.unflatten(-3, (shape[-3], -1)).squeeze(-1)
            of_source = merged(of_source, (-2,))
        yield source, of_source.expand(shape)


HANDLERS: dict[object, Callable[[fx.Node, Tensor], Pushed]] = {
    **dict.fromkeys(IDENTITY, _same),
    **dict.fromkeys(VIEWS, _view),
    aten.expand.default: _expand,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.mean.dim: _reduction,
    aten.sum.dim_IntList: _reduction,
    aten.amax.default: _reduction,
    aten.linalg_vector_norm.default: _reduction,
    aten.softmax.int: _mixes(_softmax_dims),
    aten._softmax.default: _mixes(_softmax_dims),
    aten._safe_softmax.default: _mixes(_softmax_dims),
    aten.layer_norm.default: _mixes(_norm_dims),
    aten.rms_norm.default: _mixes(_norm_dims),
    aten.bmm.default: _product,
    aten.matmul.default: _product,
    aten.baddbmm.default: _product,
    aten.scaled_dot_product_attention.default: _sdpa,
}
for _op in ("numpy_T", "mT", "t"):
    HANDLERS[getattr(aten, _op).default] = lambda node, label: iter([(node.args[0], label.mT)])

# Ops that read a part of their input
CUTS = (aten.slice.Tensor, aten.select.int, aten.index.Tensor)
PIECES = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes,
          aten.unbind.int, aten.unsafe_split.Tensor, aten.unsafe_chunk.default)  # fmt: skip


def _joined(node: fx.Node, labels: dict[fx.Node, Tensor]) -> Pushed:
    """The source of a split, from the labels of its pieces."""
    if node.target is aten.unbind.int:
        dim = node.args[1] if len(node.args) > 1 else 0
    else:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    parts = [_filled(value, NOBODY) for value in node.meta["val"]]
    for piece in node.users:
        parts[piece.args[1]] = labels.get(piece, _filled(piece.meta["val"], MANY))
    join = torch.stack if node.target is aten.unbind.int else torch.cat
    yield node.args[0], join(parts, dim)


def _read_outside(user: fx.Node, node: fx.Node) -> Tensor:
    """What a reader outside the region needs of `node`: all of it, or the part that it cuts out."""
    if user.target in CUTS and sizes(user) is not None:
        for source, label in HANDLERS[user.target](user, _filled(user.meta["val"], MANY)):
            if source is node:
                return label
    return _filled(node.meta["val"], MANY)


def demand(
    start: fx.Node,
    label: Tensor,
    stop: Callable[[fx.Node], bool],
    reader: fx.Node,
    opaque: frozenset[fx.Node] = frozenset(),
) -> Demand:
    """Push `label` back from `start`, which `reader` reads, to the values where `stop` holds.

    A value whose every element is needed by many is left out: there is nothing to skip in it. Those of
    `opaque` (values that are written in place) are.
    """
    labels: dict[fx.Node, Tensor] = {start: label}
    region, ends = {reader}, set()
    for node in _backwards(start):
        if node.target in PIECES and any(piece in labels for piece in node.users):
            pushed = _joined(node, labels)
        elif node in labels:
            for user in node.users.keys() - region:
                labels[node] = _united(labels[node], _read_outside(user, node))
            if node in opaque or bool((labels[node] == MANY).all()):
                del labels[node]
                ends.add(node)
                continue
            if node.op != "call_function" or stop(node):
                continue
            if node.target is operator.getitem:
                region.add(node)
                continue
            handler = _handler(node)
            if handler is None:
                continue
            pushed = handler(node, labels[node])
        else:
            continue
        region.add(node)
        for source, found in _of_all_inputs(node, pushed):
            known = labels.get(source)
            labels[source] = found if known is None else _united(known, found)
    return Demand(labels, frozenset(region), frozenset(ends))


def _of_all_inputs(node: fx.Node, pushed: Pushed) -> Pushed:
    """What a handler pushed; an input that it says nothing about is needed by many."""
    silent = {n for n in node.all_input_nodes if sizes(n) is not None}
    for source, found in pushed:
        silent.discard(source)
        yield source, found
    for source in silent:
        yield source, _filled(source.meta["val"], MANY)


def _backwards(start: fx.Node) -> Iterator[fx.Node]:
    node = start
    while node.op != "root":
        yield node
        node = node.prev


def _handler(node: fx.Node) -> Callable[[fx.Node, Tensor], Pushed] | None:
    if any(sizes(n) is None for n in node.all_input_nodes if "val" in n.meta and
           isinstance(n.meta["val"], torch.Tensor)):  # fmt: skip
        return None
    if node.target in HANDLERS:
        return HANDLERS[node.target]
    return _pointwise if is_pointwise(node) else None
