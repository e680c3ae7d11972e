"""The attention that is in no site, and why: for the report.

    o = linear(norm(merge_heads(softmax(q @ k.T) @ v)), Wo)     what `Wo` says: the norm mixes heads
    o = einsum("bqhd,hdo->bqo", softmax(q @ k.T) @ v, Wo)       `Wo` isn't a matrix
    return softmax(q @ k.T) @ v                                 `Wo` is in another graph

The reason lies where what an attention computes first meets a weight. Together with the sites', every attention of
a graph is accounted for. An attention is a fused one, or a softmax of a product by which something is multiplied (one
of the two may be in another graph): the softmax of a router is neither.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import fx

from .others import PARTS, SAME_ELEMENTS, op_name, others_in
from .separable import ATTENTION, SDPA, SOFTMAX, aten, is_pointwise, same_size, shape_of
from .site import LoneAttention, NoSite, Projection, Site, Unmatched

PRODUCTS = (ATTENTION | {aten.einsum.default}) - {SDPA, *SOFTMAX}
CARRY = SAME_ELEMENTS | PARTS | {aten.cat.default}
AsProjection = Callable[[fx.Node], Projection | None]
Next = Callable[[fx.Node], Iterator[fx.Node]]


def _inputs(node: fx.Node) -> Iterator[fx.Node]:
    return iter(node.all_input_nodes)


def _users(node: fx.Node) -> Iterator[fx.Node]:
    return iter(node.users)


def _first(start: fx.Node, step: Next, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nodes where `stop` first holds on each way from `start`, in graph order."""
    found, seen, pending = set(), set(), list(step(start))
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if stop(node):
            found.add(node)
        else:
            pending.extend(step(node))
    return sorted(found)


def _beside(softmax: fx.Node, step: Next) -> list[fx.Node]:
    """What is next to a softmax, but for ops element by element and what moves elements."""
    return _first(softmax, step, lambda node: not (is_pointwise(node) or node.target in CARRY))


def _weighs(node: fx.Node, as_projection: AsProjection) -> bool:
    """A product with a weight, in whatever form."""
    return as_projection(node) is not None or next(others_in(node), None) is not None


def _is_end(node: fx.Node, softmax: fx.Node) -> bool:
    """Where a graph was cut: what it returns, or is given in a softmax's own size (a mask or a bias has another)."""
    if node.op == "placeholder":
        return same_size(shape_of(node) or (), shape_of(softmax))
    return node.op == "output"


def _is_attention(node: fx.Node, as_projection: AsProjection) -> bool:
    if node.target not in SOFTMAX:
        return node.target is SDPA
    sides = [_beside(node, step) for step in (_inputs, _users)]
    multiplied = [
        any(n.target in PRODUCTS and not _weighs(n, as_projection) for n in side) for side in sides
    ]
    elsewhere = [any(_is_end(n, node) for n in side) for side in sides]
    return any(multiplied) and all(
        here or other for here, other in zip(multiplied, elsewhere, strict=True)
    )


def _why(
    node: fx.Node, reasons: dict[fx.Node, Unmatched], as_projection: AsProjection
) -> LoneAttention:
    readers = _first(node, _users, lambda user: _weighs(user, as_projection))
    if not readers:
        reason = "what it computes leaves its graph before a projection reads it"
        return LoneAttention(node, None, f"{reason}: at a graph break, or as a result")
    reader = readers[0]
    projection = as_projection(reader)
    if projection is None:
        _, other = next(others_in(reader))
        reason = f"what reads it isn't a projection: {other.reason}"
        return LoneAttention(node, other.name, reason)
    known = reasons.get(reader)
    if known is None:
        reason = "the site of the projection that reads it doesn't reach it"
    elif known.code is NoSite.ATTENTION:
        reason = known.reason
    else:  # that of the projection, which may speak of the residual stream: here, attention went into it
        op = op_name(projection.input)
        reason = f"its heads aren't kept apart up to the projection that reads it ({op})"
    return LoneAttention(node, projection.name, reason)


def find_lone_attention(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    unmatched: Sequence[Unmatched],
    as_projection: AsProjection,
) -> tuple[LoneAttention, ...]:
    """Every attention op that is in none of `sites`, in graph order."""
    held = {node for site in sites for node in site.attended}
    reasons = {u.projection.node: u for u in unmatched}
    return tuple(
        _why(node, reasons, as_projection)
        for node in gm.graph.nodes
        if node not in held and _is_attention(node, as_projection)
    )
