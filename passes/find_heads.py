"""Find the attention before an output projection: the heads that its input consists of.

    q = linear(x, Wq); y = attention(rope(q), k, v); o = linear(merge_heads(y), Wo)
        ->
    Site(ATTENTION, units=heads, owned=[Wq by head], cores=[attention by head], output=Wo)

`demand` says for which head each element is needed. A site is there if attention was met on the way back
and some projection's rows are needed by one head each. Keys and values escape to the cache, so they belong
to no head; without a cache theirs are owned too. A unit is what the innermost merged axis holds: one head, or what
is made of several heads before they are merged (a difference of two). Nothing here knows an architecture.
"""

from collections.abc import Callable

import torch
from torch import fx

from .demand import MANY, Demand, demand, merged, sizes
from .separable import IDENTITY, PRODUCTS, SDPA, SOFTMAX, VIEWS, aten, is_pointwise
from .site import Core, OwnedRows, Projection

KEEP_ATTENTION = IDENTITY | VIEWS | PRODUCTS | {
    aten.transpose.int, aten.permute.default, aten.slice.Tensor,
}  # fmt: skip
LINEAR = {aten.linear.default, aten.addmm.default, aten.mm.default}
AsProjection = Callable[[fx.Node], Projection | None]


def _head_dim(output: Projection) -> int | None:
    """The length of the innermost axis that is merged into the output projection's input."""
    pending, seen = [output.input], set()
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function" or sizes(node) is None:
            continue
        seen.add(node)
        if node.target in VIEWS:
            source = sizes(node.args[0])
            if source and source[-1] != sizes(node)[-1]:
                return source[-1]
            pending.append(node.args[0])
        elif node.target in IDENTITY:
            pending.append(node.args[0])
        elif is_pointwise(node):
            pending.extend(n for n in node.all_input_nodes if sizes(n) == sizes(node))
    return None


def _owned(projection: Projection, label: torch.Tensor, units: int) -> OwnedRows | None:
    """Which rows each unit owns, if every unit owns as many."""
    owner = merged(label, tuple(range(label.dim() - 1))).flatten()
    owner = torch.where(owner < 0, MANY, owner)
    counts = torch.bincount(owner[owner >= 0].long(), minlength=units)
    if counts.numel() != units or counts.min() == 0 or counts.min() != counts.max():
        return None
    # The largest power of two such that no block of rows has two owners
    block = 1
    while owner.numel() % (2 * block) == 0 and block < 256:
        blocks = owner.view(-1, 2 * block)
        if bool((blocks != blocks[:, :1]).any()):
            break
        block *= 2
    return OwnedRows(projection, owner[::block].contiguous(), block)


def find_heads(
    output: Projection, as_projection: AsProjection, written: frozenset[fx.Node] = frozenset()
) -> tuple[int, tuple[OwnedRows, ...], tuple[fx.Node, ...], tuple[Core, ...]] | str:
    """(units, owned, attended, cores) of the attention before `output`, or the reason that there is none."""
    width, shape = _head_dim(output), sizes(output.input)
    if width is None or shape is None or width == 0 or output.in_features % width:
        return "its input isn't made of heads"
    units = output.in_features // width
    if units < 2:
        return "its attention has a single head"
    label = torch.arange(units, dtype=torch.int32).repeat_interleave(width).expand(shape)
    found = demand(
        output.input, label, lambda n: as_projection(n) is not None, output.node, written
    )
    attended = _attended(found)
    if not attended:
        ends = [n for n in found.ends if _of_attention(n, as_projection)]
        if any(_escapes(n, output.node) for n in ends):
            return "what its attention computes is read elsewhere too"
        return "its input isn't attention that keeps heads apart"
    owned = []
    for node, rows in found.labels.items():
        projection = as_projection(node)
        if projection is None or projection.operands & written:
            continue
        if (owner := _owned(projection, rows, units)) is not None:
            owned.append(owner)
    if not owned:
        # Its queries are normalised over all heads at once, so each needs all rows: the cache and the output
        # projection can still be skipped.
        entry = _entry(attended[0], as_projection)
        if entry is None:
            return "no projection was found before its attention"
        owned.append(
            OwnedRows(entry, torch.full((1,), MANY, dtype=torch.int32), entry.out_features)
        )
    # In graph order: the first is the one whose input later predictors read.
    owned.sort(key=lambda o: o.projection.node)
    tokens = torch.Size(shape[:-1]).numel()
    cores = tuple(
        Core(node, of_heads)
        for node in attended
        if (of_heads := _units_of_heads(found.labels[node], tokens)) is not None
    )
    return units, tuple(owned), attended, cores


def _entry(core: fx.Node, as_projection: AsProjection) -> Projection | None:
    """The projection that the queries of an attention op come from."""
    pending, seen = [core.args[0]], set()
    while pending:
        node = pending.pop()
        if node in seen or not isinstance(node, fx.Node):
            continue
        seen.add(node)
        projection = as_projection(node)
        if projection is not None:
            return projection
        if (
            node.target in LINEAR
        ):  # by what isn't a matrix of its own: nothing earlier is its entry
            return None
        pending.extend(node.all_input_nodes)
    return None


def _attended(found: Demand) -> tuple[fx.Node, ...]:
    """The attention ops of a region, in graph order."""
    return tuple(sorted(filter(_attends, found.region)))


def _of_attention(node: fx.Node, as_projection: AsProjection) -> bool:
    """The weights of an attention or what it computes, in whatever dtype and shape."""
    while node.target in KEEP_ATTENTION and as_projection(node) is None:
        node = node.args[0]
    return _attends(node)


def _escapes(value: fx.Node, reader: fx.Node) -> bool:
    """Some way from `value` to what the graph returns or writes leads past `reader`: it isn't just mixed on its way."""
    pending, seen = [value], {reader}
    while pending:
        node = pending.pop()
        if not node.users and node is not reader:
            return True
        if node not in seen:
            seen.add(node)
            pending.extend(node.users)
    return False


def _attends(node: fx.Node) -> bool:
    return node.target is SDPA or node.target in SOFTMAX


def _units_of_heads(label: torch.Tensor, tokens: int) -> tuple[int, ...] | None:
    """The unit that needs each head of [batch, heads, queries, ...] or [batch * heads, queries, ...].

    None where a head is needed by several, or by another in another sequence.
    """
    head = merged(label, tuple(range(label.dim() - 2, label.dim()))).flatten()
    batch = max(1, tokens // label.shape[-2])
    if head.numel() % batch:
        return None
    rows = head.view(batch, -1)
    if bool((rows < 0).any() | (rows != rows[0]).any()):
        return None
    return tuple(rows[0].tolist())
